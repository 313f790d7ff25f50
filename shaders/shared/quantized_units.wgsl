// Units of 8 elements of quantised rows, fetched and dequantised. Without the flag QUANTISED this file is empty.
//
// The including kernel declares `fn weight_word(at: u32) -> u32`: u32 number `at` of the weight.
#import shared/quantized

#if QUANTISED
// A unit of 8 elements as it is fetched.
struct QuantisedUnit {
    codes: Codes,
    // The u32 with the parameters of `group`.
    parameters: u32,
    group: u32,
}

// Unit `unit` of the row that starts at quad `row`.
fn load_unit(row: u32, unit: u32, in_features: u32) -> QuantisedUnit {
    let group = unit / (GROUP / 8u);
    let parameters = weight_word(row * 4u + parameters_at(group, in_features));
#if WEIGHT_Q8
    let at = row * 4u + unit * 2u;
    return QuantisedUnit(vec2<u32>(weight_word(at), weight_word(at + 1u)), parameters, group);
#else
    return QuantisedUnit(weight_word(row * 4u + unit), parameters, group);
#endif
}

fn scaled(codes: mat2x4<f32>, parameters: vec2<f32>) -> mat2x4<f32> {
    return mat2x4<f32>(codes[0] * parameters.x + parameters.y, codes[1] * parameters.x + parameters.y);
}

fn dequantise(unit: QuantisedUnit) -> mat2x4<f32> {
    return scaled(code_values(unit.codes), unpack_parameters(unit.parameters, unit.group));
}
#endif
