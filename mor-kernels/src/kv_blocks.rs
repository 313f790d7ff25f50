//! Keys and values in 8 bits: blocks of [`BLOCK`] elements of a head, 8 bytes each, that share a scale.
//!
//! `w = scale * code`: codes are signed, of 7 bits, in -63..=63; the scale is a float of 5 bits of exponent and 3 of fraction, which with
//! zeros behind them are an f16. Each of the two u32 of a block has four codes from bit 0 on, in order, and in its highest four bits half
//! of the scale, the low half first. So blocks lie where units of other types do, and need neither rows of their own nor a binding.

/// Elements of a block: those of a unit that attention loads.
pub const BLOCK: usize = 8;
/// Largest code; -64 is unused.
pub(crate) const MOST: f32 = 63.0;
/// Bits of a code.
const CODE_BITS: usize = 7;

/// Packs finite values, as the kernel of that name does, to the bit. The scale is the least one with which the largest value has a code.
pub fn pack_block(values: [f32; BLOCK]) -> u64 {
    let largest = values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let bits = half::f16::from_f32(largest / MOST).to_bits();
    let scale_bits = u64::from((bits + 0x7f) >> 7);
    let scale = scale_of(scale_bits);
    let mut block = 0;
    for (i, value) in values.iter().enumerate() {
        let size = value.abs();
        let code =
            if scale > 0.0 { (f64::from(size) / f64::from(scale) + 0.5).floor().min(f64::from(MOST)) } else { 0.0 };
        let code = if *value < 0.0 { -code as i64 } else { code as i64 };
        block |= ((code as u64) & 0x7f) << (CODE_BITS * (i % 4) + 32 * (i / 4));
    }
    block | (scale_bits & 15) << 28 | (scale_bits >> 4) << 60
}

/// What a block holds.
pub fn unpack_block(block: u64) -> [f32; BLOCK] {
    let scale = scale_of((block >> 28 & 15) | (block >> 60) << 4);
    std::array::from_fn(|i| {
        let code = (block >> (CODE_BITS * (i % 4) + 32 * (i / 4)) & 0x7f) as i8;
        // The sign is bit 6.
        f32::from((code << 1) >> 1) * scale
    })
}

fn scale_of(bits: u64) -> f32 {
    half::f16::from_bits((bits << 7) as u16).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_keep_six_bits_beside_the_largest() {
        for largest in [0.0, 1e-7, 3e-4, 0.02, 1.0, 63.0, 64.0, 1000.0, 65504.0] {
            let values: [f32; BLOCK] = [1.0, -1.0, 0.5, -0.25, 0.0, 0.013, -0.77, 0.992].map(|v| v * largest);
            let got = unpack_block(pack_block(values));
            // Half of a step, of which the scale's rounding makes an eighth more; below, the scale is subnormal.
            let most = (largest / MOST * 1.125 / 2.0).max(2.0_f32.powi(-18)) * 1.001;
            for (value, got) in values.iter().zip(got) {
                assert!((value - got).abs() <= most, "{got} for {value} beside {largest}");
            }
        }
        assert_eq!(unpack_block(0), [0.0; BLOCK]);
    }
}
