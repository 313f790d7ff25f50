//! Weights as small integers: how a row of a matrix is quantised, and how the linear kernels find it packed.
//!
//! A row is divided along its inputs into groups of [`GROUP`] elements; the last is filled up with zeros. Each group has
//! parameters of its own in f16:
//!
//! - **q8**: `w = scale * code`, code a signed byte in -127..=127; 8.5 bits a weight.
//! - **q4**: `w = offset + scale * code`, code in 0..=15; 5 bits a weight. The pair (scale, offset) is the best in squared
//!   error that a short search finds, which costs nothing at run time and halves what 4 bits lose.
//!
//! A packed row is its codes, then the parameters of its groups, then zeros up to a multiple of 16 bytes:
//!
//! | | codes | parameters |
//! | --- | --- | --- |
//! | q8 | a byte each, in order | f16 scale a group |
//! | q4 | two a byte, in order, the first in the low half | f16 scale and f16 offset a group |
//!
//! Codes come first so that lanes fetch 16 bytes of them at once, and in order, so that a fetch matches a run of inputs.
//! Parameters lie in the row and not in a tensor of their own: the projection of q, k and v binds eight buffers already,
//! WebGPU's limit, and any range of rows is then a matrix.

use std::array;

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::tensor::DType;

/// Consecutive elements of a row that share their parameters.
pub const GROUP: usize = 32;
/// A packed row is a whole number of these, what one lane fetches.
const ROW_ALIGNMENT: usize = 16;
/// Largest code of q8; -128 is unused, so that negation is exact.
const Q8_MAX: f32 = 127.0;
/// Largest code of q4.
const Q4_MAX: f32 = 15.0;
/// Ranges that the search for a q4 group starts from, and refinements of each.
const Q4_STARTS: u32 = 8;
const Q4_REFINEMENTS: u32 = 3;
/// Groups that are fitted side by side, in vector registers.
const Q4_LANES: usize = 8;

/// A number of each group.
type Lanes = [f32; Q4_LANES];

/// Sizes of a quantised format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    code_bits: usize,
    /// f16 numbers of a group.
    num_parameters: usize,
}

pub(crate) const Q8: Format = Format { code_bits: 8, num_parameters: 1 };
pub(crate) const Q4: Format = Format { code_bits: 4, num_parameters: 2 };

impl Format {
    /// The format of a quantised type.
    pub(crate) const fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::Q8 => Some(Q8),
            DType::Q4 => Some(Q4),
            DType::F32 | DType::F16 | DType::BF16 | DType::Block8 | DType::U32 => None,
        }
    }

    /// Bytes of the codes of a row of `len` elements: whole 16-byte units, whatever the format.
    pub(crate) const fn code_bytes(self, len: usize) -> usize {
        len.div_ceil(GROUP) * (GROUP * self.code_bits / 8)
    }

    /// Bytes of a packed row of `len` elements.
    pub(crate) const fn row_bytes(self, len: usize) -> usize {
        let parameters = 2 * self.num_parameters * len.div_ceil(GROUP);
        (self.code_bytes(len) + parameters).next_multiple_of(ROW_ALIGNMENT)
    }
}

/// Packs a row of finite values as `dtype`.
///
/// # Errors
/// The first value whose size f16 cannot hold.
///
/// # Panics
/// If `dtype` is not quantised, or `row` does not have the bytes of a packed row.
pub fn quantize_row(dtype: DType, values: &[f32], row: &mut [u8]) -> Result<(), f32> {
    let format = Format::of(dtype).expect("a quantised type");
    assert_eq!(row.len(), format.row_bytes(values.len()), "bytes of a packed row");
    if let Some(value) = values.iter().find(|value| value.abs() > f16::MAX.to_f32()) {
        return Err(*value);
    }
    row.fill(0);
    let (codes, parameters) = row.split_at_mut(format.code_bytes(values.len()));
    match dtype {
        DType::Q8 => {
            for ((group, codes), scale) in
                values.chunks(GROUP).zip(codes.chunks_mut(GROUP)).zip(parameters.chunks_mut(2))
            {
                scale.copy_from_slice(&quantize_q8(group, codes).to_le_bytes());
            }
        }
        _ => {
            let codes = codes.chunks_mut(Q4_LANES * GROUP / 2);
            let parts = values.chunks(Q4_LANES * GROUP).zip(codes).zip(parameters.chunks_mut(Q4_LANES * 4));
            parts.for_each(|((values, codes), parameters)| quantize_q4(values, codes, parameters));
        }
    }
    Ok(())
}

/// The values of a packed row, as the kernels see them.
///
/// # Panics
/// If `dtype` is not quantised, or `row` is not a packed row of `values.len()` elements.
pub fn dequantize_row(dtype: DType, row: &[u8], values: &mut [f32]) {
    let format = Format::of(dtype).expect("a quantised type");
    assert_eq!(row.len(), format.row_bytes(values.len()), "bytes of a packed row");
    let (codes, parameters) = row.split_at(format.code_bytes(values.len()));
    let parameter = |at: usize| f16::from_le_bytes([parameters[2 * at], parameters[2 * at + 1]]).to_f32();
    for (i, value) in values.iter_mut().enumerate() {
        let group = i / GROUP;
        *value = match dtype {
            DType::Q8 => parameter(group) * f32::from(codes[i] as i8),
            _ => parameter(2 * group) * f32::from(codes[i / 2] >> (i % 2 * 4) & 15) + parameter(2 * group + 1),
        };
    }
}

/// Whether the parameters of a packed row of `len` elements are finite, and with them its values.
///
/// # Panics
/// As [`dequantize_row`].
pub fn is_finite(dtype: DType, row: &[u8], len: usize) -> bool {
    let format = Format::of(dtype).expect("a quantised type");
    assert_eq!(row.len(), format.row_bytes(len), "bytes of a packed row");
    let parameters = row[format.code_bytes(len)..].as_chunks::<2>().0;
    parameters.iter().all(|bytes| f16::from_le_bytes(*bytes).is_finite())
}

/// Writes the codes of a group; returns its scale.
fn quantize_q8(group: &[f32], codes: &mut [u8]) -> f16 {
    let largest = group.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let scale = f16::from_f32(largest / Q8_MAX);
    let inverse = inverse(scale.to_f32());
    for (code, value) in codes.iter_mut().zip(group) {
        let size = round((value * inverse).abs().min(Q8_MAX));
        *code = size.copysign(*value) as i8 as u8;
    }
    scale
}

/// Writes codes and parameters of up to [`Q4_LANES`] groups, of which the last may be short.
fn quantize_q4(values: &[f32], codes: &mut [u8], parameters: &mut [u8]) {
    let (whole, short) = values.split_at(values.len() / GROUP * GROUP);
    let mut fits = Vec::with_capacity(Q4_LANES);
    for groups in [whole, short].into_iter().filter(|groups| !groups.is_empty()) {
        // Lanes without a group have zeros.
        let mut lanes = [[0.0; Q4_LANES]; GROUP];
        for (lane, group) in groups.chunks(GROUP).enumerate() {
            lanes.iter_mut().zip(group).for_each(|(lanes, value)| lanes[lane] = *value);
        }
        let fit = fit_q4_at_best(&lanes[..GROUP.min(groups.len())]);
        fits.extend(fit.into_iter().take(groups.len().div_ceil(GROUP)));
    }
    let groups = values.chunks(GROUP).zip(codes.chunks_mut(GROUP / 2)).zip(parameters.chunks_mut(4));
    for (((group, codes), parameters), fit) in groups.zip(fits) {
        let [scale, offset] = fit.map(f16::to_f32);
        let inverse = inverse(scale);
        for (byte, pair) in codes.iter_mut().zip(group.chunks(2)) {
            let code = |value: &f32| q4_code(*value, inverse, offset) as u8;
            *byte = code(&pair[0]) | pair.get(1).map_or(0, code) << 4;
        }
        parameters[..2].copy_from_slice(&fit[0].to_le_bytes());
        parameters[2..].copy_from_slice(&fit[1].to_le_bytes());
    }
}

/// As [`fit_q4`], by the best instructions that the processor has.
fn fit_q4_at_best(values: &[Lanes]) -> [[f16; 2]; Q4_LANES] {
    /// To the same bits, in registers of 8 numbers.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn fit_q4_avx2(values: &[Lanes]) -> [[f16; 2]; Q4_LANES] {
        fit_q4(values)
    }

    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has the instructions.
        return unsafe { fit_q4_avx2(values) };
    }
    fit_q4(values)
}

/// Scale and offset of each of several groups of one length, an array of `values` for each place in them.
///
/// From ranges around the middle, of which the widest spans all values, codes and parameters are improved in turns: the
/// nearest codes, then the line through them that fits the values best.
#[inline(always)]
fn fit_q4(values: &[Lanes]) -> [[f16; 2]; Q4_LANES] {
    let fold = |init: f32, f: fn(f32, f32) -> f32| {
        values.iter().fold([init; Q4_LANES], |sum, values| array::from_fn(|lane| f(sum[lane], values[lane])))
    };
    let (low, high) = (fold(f32::INFINITY, f32::min), fold(f32::NEG_INFINITY, f32::max));
    let (n, v) = (values.len() as f32, fold(0.0, |sum, value| sum + value));
    let (mut best, mut found) = ([f32::INFINITY; Q4_LANES], [[f16::ZERO; Q4_LANES]; 2]);
    for start in 0..Q4_STARTS {
        let part = 1.0 - 0.25 * start as f32 / (Q4_STARTS - 1) as f32;
        let half: Lanes = array::from_fn(|lane| 0.5 * (high[lane] - low[lane]) * part);
        let mut scale = half.map(|half| 2.0 * half / Q4_MAX);
        let mut offset: Lanes = array::from_fn(|lane| 0.5 * (low[lane] + high[lane]) - half[lane]);
        for _ in 0..Q4_REFINEMENTS {
            let rounded = [scale, offset].map(to_f16);
            let [s, o] = rounded.map(to_f32);
            let (rounded_inverse, i) = (s.map(inverse), scale.map(inverse));
            let [mut error, mut c, mut cc, mut cv] = [[0.0_f32; Q4_LANES]; 4];
            for values in values {
                for lane in 0..Q4_LANES {
                    let value = values[lane];
                    let code = q4_code(value, rounded_inverse[lane], o[lane]);
                    error[lane] += (value - o[lane] - s[lane] * code).powi(2);
                    let code = q4_code(value, i[lane], offset[lane]);
                    c[lane] += code;
                    cc[lane] += code * code;
                    cv[lane] += code * value;
                }
            }
            for lane in 0..Q4_LANES {
                if error[lane] < best[lane] {
                    best[lane] = error[lane];
                    (found[0][lane], found[1][lane]) = (rounded[0][lane], rounded[1][lane]);
                }
                let spread = n * cc[lane] - c[lane] * c[lane];
                // Where all codes are equal, no line is better than another.
                if spread > 0.0 {
                    scale[lane] = (n * cv[lane] - c[lane] * v[lane]) / spread;
                    offset[lane] = (v[lane] - scale[lane] * c[lane]) / n;
                }
            }
        }
    }
    array::from_fn(|lane| found.map(|parameters| parameters[lane]))
}

/// The nearest code of a value.
#[inline(always)]
fn q4_code(value: f32, inverse: f32, offset: f32) -> f32 {
    round(((value - offset) * inverse).clamp(0.0, Q4_MAX))
}

/// As [`f32::round`], which is a call for each number where the processor is not known to round, of 0 to 2^22.
#[inline(always)]
fn round(value: f32) -> f32 {
    /// From here on, f32 has integers alone: a sum with it is rounded, half to even.
    const INTEGERS: f32 = (1 << 23) as f32;
    let even = (value + INTEGERS) - INTEGERS;
    even + if value - even == 0.5 { 1.0 } else { 0.0 }
}

#[inline(always)]
fn to_f16(values: Lanes) -> [f16; Q4_LANES] {
    let mut halves = [f16::ZERO; Q4_LANES];
    halves.convert_from_f32_slice(&values);
    halves
}

#[inline(always)]
fn to_f32(halves: [f16; Q4_LANES]) -> Lanes {
    let mut values = [0.0; Q4_LANES];
    halves.convert_to_f32_slice(&mut values);
    values
}

/// `1 / scale`; 0 for a group of equal values, whose codes are then 0.
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pseudo-random values of about -1..1.
    fn values(len: usize) -> Vec<f32> {
        (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    fn round_trip(dtype: DType, values: &[f32]) -> Vec<f32> {
        let (mut row, mut found) = (vec![0xff; dtype.row_bytes(values.len())], vec![f32::NAN; values.len()]);
        quantize_row(dtype, values, &mut row).expect("the values are small");
        assert!(is_finite(dtype, &row, values.len()));
        dequantize_row(dtype, &row, &mut found);
        found
    }

    #[test]
    fn rows_are_packed_in_units_of_sixteen_bytes() {
        // 960 and 30 scales, padded from 1020; 480 and 30 pairs, from 600.
        assert_eq!([DType::Q8, DType::Q4].map(|dtype| dtype.row_bytes(960)), [1024, 608]);
        // Whole groups, whatever the length.
        assert_eq!([1, 31, 32].map(|len| DType::Q8.row_bytes(len)), [48; 3]);
        assert_eq!([1, 31, 32].map(|len| DType::Q4.row_bytes(len)), [32; 3]);
    }

    #[test]
    fn values_come_back_within_half_a_step() {
        for len in [1, 8, 32, 40, 256, 1000] {
            let values = values(len);
            for (dtype, step) in [(DType::Q8, 1.0 / 127.0), (DType::Q4, 2.0 / 15.0)] {
                for (found, value) in round_trip(dtype, &values).iter().zip(&values) {
                    // f16 parameters are off by 2^-11 of their size, codes by one step where a range was narrowed.
                    let bound = if dtype == DType::Q8 { 0.51 * step + 1e-3 } else { 1.6 * step };
                    assert!((found - value).abs() <= bound, "{dtype:?} {len}: {found}, expected {value}");
                }
            }
        }
    }

    #[test]
    fn the_search_is_no_worse_than_the_whole_range() {
        let values = values(3200);
        let found = round_trip(DType::Q4, &values);
        let (mut error, mut plain) = (0.0, 0.0);
        for (group, found) in values.chunks(GROUP).zip(found.chunks(GROUP)) {
            let low = group.iter().copied().fold(f32::INFINITY, f32::min);
            let scale = (group.iter().copied().fold(f32::NEG_INFINITY, f32::max) - low) / Q4_MAX;
            for (value, found) in group.iter().zip(found) {
                error += (value - found).powi(2);
                plain += (value - low - scale * ((value - low) / scale).round()).powi(2);
            }
        }
        assert!(error < plain, "{error}, of the whole range {plain}");
    }

    #[test]
    fn numbers_are_rounded_as_by_the_standard_library() {
        for i in 0..=1050_u16 {
            let value = 0.125 * f32::from(i);
            for value in [value, value.next_up(), value.next_down().max(0.0)] {
                assert_eq!(round(value), value.round(), "{value}");
            }
        }
    }

    /// The fit of one group, a step at a time.
    fn fit_alone(group: &[f32]) -> [f16; 2] {
        let code = |value: f32, inverse: f32, offset: f32| ((value - offset) * inverse).round().clamp(0.0, Q4_MAX);
        let low = group.iter().copied().fold(f32::INFINITY, f32::min);
        let high = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut best = (f32::INFINITY, [f16::ZERO; 2]);
        for start in 0..Q4_STARTS {
            let half = 0.5 * (high - low) * (1.0 - 0.25 * start as f32 / (Q4_STARTS - 1) as f32);
            let (mut scale, mut offset) = (2.0 * half / Q4_MAX, 0.5 * (low + high) - half);
            for _ in 0..Q4_REFINEMENTS {
                let rounded = [scale, offset].map(f16::from_f32);
                let [s, o] = rounded.map(f16::to_f32);
                let i = inverse(s);
                let error = group.iter().map(|value| (value - o - s * code(*value, i, o)).powi(2)).sum();
                if error < best.0 {
                    best = (error, rounded);
                }
                let (n, i) = (group.len() as f32, inverse(scale));
                let [mut c, mut cc, mut v, mut cv] = [0.0_f32; 4];
                for value in group {
                    let code = code(*value, i, offset);
                    c += code;
                    cc += code * code;
                    v += value;
                    cv += code * value;
                }
                let spread = n * cc - c * c;
                if spread <= 0.0 {
                    break;
                }
                scale = (n * cv - c * v) / spread;
                offset = (v - scale * c) / n;
            }
        }
        best.1
    }

    #[test]
    fn groups_side_by_side_are_fitted_as_each_alone() {
        for (len, scale) in [(1, 1.0), (31, 0.02), (32, 1e-5), (300, 0.02), (1000, 3e4), (2048, 0.02), (4099, 1e-7)] {
            // Groups of equal values and of few different ones among the others.
            let coarse = |i: usize, value: f32| match i / GROUP % 5 {
                3 => 0.25,
                4 => (4.0 * value).round() / 4.0,
                _ => value,
            };
            let values: Vec<f32> = values(len).iter().enumerate().map(|(i, v)| scale * coarse(i, *v)).collect();
            let mut row = vec![0; DType::Q4.row_bytes(len)];
            quantize_row(DType::Q4, &values, &mut row).expect("the values are small");
            let (codes, parameters) = row.split_at(Q4.code_bytes(len));
            for (at, group) in values.chunks(GROUP).enumerate() {
                let fit = fit_alone(group);
                let bytes = fit.map(f16::to_le_bytes);
                assert_eq!(&parameters[4 * at..][..4], bytes.as_flattened(), "{len} {scale}: group {at}");
                let [scale, offset] = fit.map(f16::to_f32);
                for (i, value) in group.iter().enumerate() {
                    let code = ((value - offset) * inverse(scale)).round().clamp(0.0, Q4_MAX);
                    let found = codes[at * GROUP / 2 + i / 2] >> (i % 2 * 4) & 15;
                    assert_eq!(f32::from(found), code, "{len}: group {at}, value {i}");
                }
            }
        }
    }

    #[test]
    fn extreme_groups_stay_finite() {
        for dtype in [DType::Q8, DType::Q4] {
            assert_eq!(round_trip(dtype, &[0.0; 40]), [0.0; 40], "{dtype:?}");
            assert_eq!(round_trip(dtype, &[0.5; 40]).iter().filter(|v| (**v - 0.5).abs() < 1e-3).count(), 40);
            // Too small for f16: zeros.
            assert!(round_trip(dtype, &[1e-30, -1e-30]).iter().all(|v| v.abs() <= 1e-30), "{dtype:?}");
            let largest = f16::MAX.to_f32();
            let ends = round_trip(dtype, &[largest, -largest, 0.0, 1.0]);
            assert!(ends.iter().all(|v| v.is_finite()) && (ends[0] / largest - 1.0).abs() < 0.02, "{ends:?}");
            assert_eq!(quantize_row(dtype, &[1.0, -70000.0], &mut vec![0; dtype.row_bytes(2)]), Err(-70000.0));
        }
    }
}
