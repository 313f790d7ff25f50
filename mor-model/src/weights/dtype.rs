//! Element types of stored weights, and the way between their bytes and f32.

use std::fmt;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use mor_kernels::{quantize, tensor::DType};

/// Element type of a stored weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    BF16,
    /// Rows of 8-bit integers, packed by [`mor_kernels::quantize`].
    Q8,
    /// Rows of 4-bit integers, packed by [`mor_kernels::quantize`].
    Q4,
}

impl Dtype {
    /// Size of a row of `len` elements in bytes.
    pub const fn row_bytes(self, len: usize) -> usize {
        self.on_device().row_bytes(len)
    }

    /// The same type on a device.
    pub const fn on_device(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::Q8 => DType::Q8,
            Self::Q4 => DType::Q4,
        }
    }

    pub(super) fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::F32 => Some(Self::F32),
            safetensors::Dtype::F16 => Some(Self::F16),
            safetensors::Dtype::BF16 => Some(Self::BF16),
            _ => None,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        })
    }
}

/// Converts the bytes of a row to f32.
pub(crate) fn decode_row(dtype: Dtype, bytes: &[u8], values: &mut [f32]) {
    let halves = bytes.as_chunks::<2>().0;
    match dtype {
        Dtype::F32 => values.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(v, b)| *v = f32::from_le_bytes(*b)),
        Dtype::F16 => match bytemuck::try_cast_slice::<_, f16>(bytes) {
            // Several at a time, where the processor can.
            Ok(halves) if cfg!(target_endian = "little") => halves.convert_to_f32_slice(values),
            _ => values.iter_mut().zip(halves).for_each(|(v, b)| *v = f16::from_le_bytes(*b).to_f32()),
        },
        Dtype::BF16 => values.iter_mut().zip(halves).for_each(|(v, b)| *v = bf16::from_le_bytes(*b).to_f32()),
        Dtype::Q8 | Dtype::Q4 => quantize::dequantize_row(dtype.on_device(), bytes, values),
    }
}

/// Encodes one element; the second value is how many of the bytes count.
pub(super) fn encode(value: f32, dtype: Dtype) -> ([u8; 4], usize) {
    match dtype {
        Dtype::F32 => (value.to_le_bytes(), 4),
        Dtype::F16 => {
            let [a, b] = f16::from_f32(value).to_le_bytes();
            ([a, b, 0, 0], 2)
        }
        Dtype::BF16 => {
            let [a, b] = bf16::from_f32(value).to_le_bytes();
            ([a, b, 0, 0], 2)
        }
        Dtype::Q8 | Dtype::Q4 => unreachable!("generated tensors have elements"),
    }
}

/// Index of the first element that is NaN or infinite: whose exponent bits are all ones.
pub(super) fn first_non_finite(bytes: &[u8], dtype: Dtype, row_len: usize) -> Option<usize> {
    match dtype {
        Dtype::F32 => first_with_bits(bytes.as_chunks::<4>().0, |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        Dtype::F16 => first_with_bits(bytes.as_chunks::<2>().0, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        Dtype::BF16 => first_with_bits(bytes.as_chunks::<2>().0, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        Dtype::Q8 | Dtype::Q4 => {
            let rows = bytes.chunks(dtype.row_bytes(row_len));
            let row = rows.clone().position(|row| !quantize::is_finite(dtype.on_device(), row, row_len))?;
            let mut values = vec![0.0; row_len];
            rows.skip(row).take(1).for_each(|bytes| decode_row(dtype, bytes, &mut values));
            values.iter().position(|value| !value.is_finite()).map(|at| row * row_len + at)
        }
    }
}

/// Finds an element in two stages: whole blocks without early exit, which compiles to vector code, then the hit alone.
fn first_with_bits<const N: usize>(elems: &[[u8; N]], is_bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
    const BLOCK: usize = 4096;
    elems.chunks(BLOCK).enumerate().find_map(|(block, elems)| {
        let any = elems.iter().fold(false, |any, &elem| any | is_bad(elem));
        any.then(|| elems.iter().position(|&elem| is_bad(elem)).map(|i| block * BLOCK + i)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn non_finite_values_are_found_past_a_block() {
        for at in [0, 1, 4095, 4096, 9999] {
            let mut values = vec![1.0f32; 10_000];
            values[at] = f32::INFINITY;
            let bytes: &[u8] = bytemuck::cast_slice(&values);
            assert_eq!(first_non_finite(bytes, Dtype::F32, 10_000), Some(at));
        }
        assert_eq!(first_non_finite(&[], Dtype::BF16, 1), None);
        let largest: Vec<u8> = [f16::MAX, f16::MIN].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(first_non_finite(&largest, Dtype::F16, 2), None);
    }
}
