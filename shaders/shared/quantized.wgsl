// Quantised rows of a weight (mor-kernels/src/quantize.rs): codes in the order of the elements, then the parameters of
// each group of GROUP elements, in whole quads of four u32. Flags: QUANTISED, with WEIGHT_Q8 (w = scale * code) or
// WEIGHT_Q4 (w = offset + scale * code); without, this file is empty.
#if QUANTISED
#if WEIGHT_Q8
// Quads of codes of a group, and its f16 parameters.
const GROUP_QUADS: u32 = GROUP / 16u;
const GROUP_PARAMETERS: u32 = 1u;
// Codes of 8 elements.
alias Codes = vec2<u32>;
#else
const GROUP_QUADS: u32 = GROUP / 32u;
const GROUP_PARAMETERS: u32 = 2u;
alias Codes = u32;
#endif

// Quads of a row.
fn row_quads(in_features: u32) -> u32 {
    let groups = (in_features + GROUP - 1u) / GROUP;
    return groups * GROUP_QUADS + (groups * GROUP_PARAMETERS + 7u) / 8u;
}

// Where in its row the u32 with the parameters of `group` is.
fn parameters_at(group: u32, in_features: u32) -> u32 {
    return (in_features + GROUP - 1u) / GROUP * GROUP_QUADS * 4u + group * GROUP_PARAMETERS / 2u;
}

// Integers become floats by their bits: set below the exponent of 2^23, 2^19, .. they are the last places of a fraction,
// and a subtraction leaves them, exactly. GPUs do that several times as fast as conversions.
#if WEIGHT_Q8
fn signed_bytes(word: u32) -> vec4<f32> {
    // Flipping the sign bit adds 128.
    let biased = word ^ 0x80808080u;
    let codes = vec2<u32>(biased, biased >> 16u).xxyy & vec4<u32>(0xffu, 0xff00u, 0xffu, 0xff00u);
    let exponents = vec4<u32>(0x4b000000u, 0x47000000u, 0x4b000000u, 0x47000000u);
    return bitcast<vec4<f32>>(codes | exponents) - vec4<f32>(8388736.0, 32896.0, 8388736.0, 32896.0);
}

fn code_values(codes: Codes) -> mat2x4<f32> {
    return mat2x4<f32>(signed_bytes(codes.x), signed_bytes(codes.y));
}

// Scale and offset of a group.
fn unpack_parameters(parameters: u32, group: u32) -> vec2<f32> {
    return vec2<f32>(unpack2x16float(parameters >> (group % 2u * 16u)).x, 0.0);
}
#else
fn nibbles(half: u32) -> vec4<f32> {
    let codes = vec4<u32>(half) & vec4<u32>(0xfu, 0xf0u, 0xf00u, 0xf000u);
    let exponents = vec4<u32>(0x4b000000u, 0x49000000u, 0x47000000u, 0x45000000u);
    return bitcast<vec4<f32>>(codes | exponents) - vec4<f32>(8388608.0, 524288.0, 32768.0, 2048.0);
}

fn code_values(codes: Codes) -> mat2x4<f32> {
    return mat2x4<f32>(nibbles(codes), nibbles(codes >> 16u));
}

fn unpack_parameters(parameters: u32, group: u32) -> vec2<f32> {
    return unpack2x16float(parameters);
}
#endif
#endif
