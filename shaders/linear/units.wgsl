// Units of linear's weights, 8 elements each: where a row of them starts, how one is loaded, and what it holds.

#if QUANTISED
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

fn unpack(u: LoadUnit) -> mat2x4<f32> {
    return dequantise(u);
}

// What depends on all that was loaded.
fn bits_of(u: LoadUnit) -> vec4<u32> {
#if WEIGHT_Q8
    return vec4<u32>(u.codes, u.parameters, 0u);
#else
    return vec4<u32>(u.codes, u.parameters, 0u, 0u);
#endif
}
#else
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
