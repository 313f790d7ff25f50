// Quantised to 8 bits (mor-kernels/src/quantize.rs): w = scale * code, a signed byte.

// f16 parameters of a group.
const Q8_PARAMETERS: u32 = 1u;

// Integers become floats by their bits: set below the exponent of 2^23 or 2^15 they are the last places of a fraction, and a
// subtraction leaves them, exactly. GPUs do that several times as fast as conversions.
fn signed_bytes(word: u32) -> vec4<f32> {
    // Flipping the sign bit adds 128.
    let biased = word ^ 0x80808080u;
    let codes = vec2<u32>(biased, biased >> 16u).xxyy & vec4<u32>(0xffu, 0xff00u, 0xffu, 0xff00u);
    let exponents = vec4<u32>(0x4b000000u, 0x47000000u, 0x4b000000u, 0x47000000u);
    return bitcast<vec4<f32>>(codes | exponents) - vec4<f32>(8388736.0, 32896.0, 8388736.0, 32896.0);
}

// Codes of 8 elements.
fn q8_values(codes: vec2<u32>) -> mat2x4<f32> {
    return mat2x4<f32>(signed_bytes(codes.x), signed_bytes(codes.y));
}

// Scale of a group; two share the u32.
fn q8_scale(parameters: u32, group: u32) -> f32 {
    return unpack2x16float(parameters >> (group % 2u * 16u)).x;
}
