// Units of linear's weights, 8 elements each: where a row of them starts, how RUN of them are loaded at once, and what these hold.

#if WIDE_LOADS
// 16 bytes of codes, which share a scale.
const RUN: u32 = 2u;
alias StoredUnit = vec4<u32>;
struct LoadUnit {
    codes: vec4<u32>,
    parameters: u32,
    group: u32,
}

fn weight_word(at: u32) -> u32 {
    return w[at / 4u][at % 4u];
}

fn row_start(n: u32) -> u32 {
    return n * row_quads(in_features());
}

// The run that unit `unit` belongs to.
fn fetch(start: u32, unit: u32) -> LoadUnit {
    let group = unit / (GROUP / 8u);
    let parameters = weight_word(start * 4u + parameters_at(group, in_features()));
    return LoadUnit(w[start + unit / RUN], parameters, group);
}

// Four signed bytes times a scale, as halves: as in shared/q8, below the exponent of 2^10, and the product is what is rounded.
fn q8_halves(word: u32, scale: f16) -> vec4<f16> {
    let even = vec2<f16>(unpack2x16float((word & 0x00ff00ffu) ^ 0x64806480u)) - vec2<f16>(1152.0h);
    let odd = vec2<f16>(unpack2x16float(((word >> 8u) & 0x00ff00ffu) ^ 0x64806480u)) - vec2<f16>(1152.0h);
    return vec4<f16>(even.x, odd.x, even.y, odd.y) * scale;
}

fn unpack(u: LoadUnit) -> array<vec4<f16>, 4> {
    let scale = f16(q8_scale(u.parameters, u.group));
    return array<vec4<f16>, 4>(
        q8_halves(u.codes.x, scale),
        q8_halves(u.codes.y, scale),
        q8_halves(u.codes.z, scale),
        q8_halves(u.codes.w, scale),
    );
}

fn bits_of(u: LoadUnit) -> vec4<u32> {
    return u.codes ^ vec4<u32>(u.parameters, 0u, 0u, 0u);
}
#elif QUANTISED
const RUN: u32 = 1u;
alias LoadUnit = QuantisedUnit;
// The parts of a unit lie apart.
alias StoredUnit = u32;

fn weight_word(at: u32) -> u32 {
    return w[at];
}

fn row_start(n: u32) -> u32 {
    return n * row_quads(in_features());
}

fn fetch(start: u32, unit: u32) -> LoadUnit {
    return load_unit(start, unit, in_features());
}

#if COOPERATIVE
// 8 elements of q4 as halves: as in shared/q4, below the exponents of 2^10 and 2^6, and rounded once where fma is one operation.
fn q4_halves(codes: u32, scale_offset: vec2<f32>) -> mat2x4<f16> {
    let parameters = vec2<f16>(scale_offset);
    let above = codes >> 8u;
    let of_0_4 = vec2<f16>(unpack2x16float((codes & 0x000f000fu) | 0x64006400u)) - vec2<f16>(1024.0h);
    let of_1_5 = vec2<f16>(unpack2x16float((codes & 0x00f000f0u) | 0x54005400u)) - vec2<f16>(64.0h);
    let of_2_6 = vec2<f16>(unpack2x16float((above & 0x000f000fu) | 0x64006400u)) - vec2<f16>(1024.0h);
    let of_3_7 = vec2<f16>(unpack2x16float((above & 0x00f000f0u) | 0x54005400u)) - vec2<f16>(64.0h);
    let scale = parameters.xx;
    let offset = parameters.yy;
    let w_0_4 = fma(of_0_4, scale, offset);
    let w_1_5 = fma(of_1_5, scale, offset);
    let w_2_6 = fma(of_2_6, scale, offset);
    let w_3_7 = fma(of_3_7, scale, offset);
    return mat2x4<f16>(w_0_4.x, w_1_5.x, w_2_6.x, w_3_7.x, w_0_4.y, w_1_5.y, w_2_6.y, w_3_7.y);
}

fn unpack(u: LoadUnit) -> mat2x4<f16> {
    return q4_halves(u.codes, q4_scale_offset(u.parameters));
}
#else
fn unpack(u: LoadUnit) -> mat2x4<f32> {
    return dequantise(u);
}
#endif

// What depends on all that was loaded.
fn bits_of(u: LoadUnit) -> vec4<u32> {
#if WEIGHT_Q8
    return vec4<u32>(u.codes, u.parameters, 0u);
#else
    return vec4<u32>(u.codes, u.parameters, 0u, 0u);
#endif
}
#else
const RUN: u32 = 1u;
// Halves too are loaded as integers: a load of 16 bytes, which of f16 vectors would be two.
alias LoadUnit = WeightUnit;
alias StoredUnit = WeightUnit;

fn row_start(n: u32) -> u32 {
    return n * num_units();
}

fn fetch(start: u32, unit: u32) -> LoadUnit {
    return w[start + unit];
}

fn unpack(u: LoadUnit) -> mat2x4<f32> {
    return unpack_weights(u);
}

#if WEIGHT_F16
fn bits_of(u: LoadUnit) -> vec4<u32> {
    return u;
}
#elif WEIGHT_BF16
fn bits_of(u: LoadUnit) -> vec4<u32> {
    return u;
}
#else
fn bits_of(u: LoadUnit) -> vec4<u32> {
    return bitcast<vec4<u32>>(u[0]) ^ bitcast<vec4<u32>>(u[1]);
}
#endif
#endif
