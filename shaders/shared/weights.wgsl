// Weights in units of 8 consecutive elements of a row, in the type the checkpoint has.
// Flags: WEIGHT_F16, WEIGHT_BF16 (two elements in a u32, low half first), else f32.
#if WEIGHT_F16
alias WeightUnit = vec4<u32>;
fn unpack_weights(u: WeightUnit) -> mat2x4<f32> {
    return mat2x4<f32>(
        vec4<f32>(unpack2x16float(u.x), unpack2x16float(u.y)),
        vec4<f32>(unpack2x16float(u.z), unpack2x16float(u.w)),
    );
}
#elif WEIGHT_BF16
alias WeightUnit = vec4<u32>;
fn unpack_weights(u: WeightUnit) -> mat2x4<f32> {
    let low = bitcast<vec4<f32>>(u << vec4<u32>(16u));
    let high = bitcast<vec4<f32>>(u & vec4<u32>(0xffff0000u));
    return mat2x4<f32>(vec4<f32>(low.x, high.x, low.y, high.y), vec4<f32>(low.z, high.z, low.w, high.w));
}
#else
alias WeightUnit = mat2x4<f32>;
fn unpack_weights(u: WeightUnit) -> mat2x4<f32> {
    return u;
}
#endif
