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

use half::f16;

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
            DType::F32 | DType::F16 | DType::BF16 | DType::U32 => None,
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
    let groups = values.chunks(GROUP).zip(codes.chunks_mut(GROUP * format.code_bits / 8));
    for ((group, codes), parameters) in groups.zip(parameters.chunks_mut(2 * format.num_parameters)) {
        match dtype {
            DType::Q8 => parameters.copy_from_slice(&quantize_q8(group, codes).to_le_bytes()),
            _ => {
                let [scale, offset] = quantize_q4(group, codes);
                parameters[..2].copy_from_slice(&scale.to_le_bytes());
                parameters[2..].copy_from_slice(&offset.to_le_bytes());
            }
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
        *code = (value * inverse).round().clamp(-Q8_MAX, Q8_MAX) as i8 as u8;
    }
    scale
}

/// Writes the codes of a group; returns its scale and offset.
///
/// From ranges around the middle, of which the widest spans all values, codes and parameters are improved in turns: the
/// nearest codes, then the line through them that fits the values best.
fn quantize_q4(group: &[f32], codes: &mut [u8]) -> [f16; 2] {
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
    let [s, o] = best.1.map(f16::to_f32);
    let i = inverse(s);
    for (at, value) in group.iter().enumerate() {
        codes[at / 2] |= (code(*value, i, o) as u8) << (at % 2 * 4);
    }
    best.1
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
