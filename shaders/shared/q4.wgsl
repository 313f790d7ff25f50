// Quantised to 4 bits (mor-kernels/src/quantize.rs): w = offset + scale * code, half a byte.

// f16 parameters of a group.
const Q4_PARAMETERS: u32 = 2u;

// As signed_bytes of shared/q8: below the exponents of 2^23, 2^19, 2^15 and 2^11.
fn nibbles(half: u32) -> vec4<f32> {
    let codes = vec4<u32>(half) & vec4<u32>(0xfu, 0xf0u, 0xf00u, 0xf000u);
    let exponents = vec4<u32>(0x4b000000u, 0x49000000u, 0x47000000u, 0x45000000u);
    return bitcast<vec4<f32>>(codes | exponents) - vec4<f32>(8388608.0, 524288.0, 32768.0, 2048.0);
}

// Codes of 8 elements.
fn q4_values(codes: u32) -> mat2x4<f32> {
    return mat2x4<f32>(nibbles(codes), nibbles(codes >> 16u));
}

// Scale and offset of a group.
fn q4_scale_offset(parameters: u32) -> vec2<f32> {
    return unpack2x16float(parameters);
}

// Codes of 8 elements as bytes: of the even ones, of the odd ones.
fn q4_words(codes: u32) -> vec2<u32> {
    return vec2<u32>(codes, codes >> 4u) & vec2<u32>(0x0f0f0f0fu);
}
