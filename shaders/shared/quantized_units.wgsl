// Quantised rows of a weight (mor-kernels/src/quantize.rs), and units of 8 of their elements, fetched and dequantised: codes in
// the order of the elements, then the parameters of each group of GROUP elements, in whole quads of four u32. Flags:
// QUANTISED, with WEIGHT_Q8 or WEIGHT_Q4; without, this file is empty.
//
// The including kernel declares `fn weight_word(at: u32) -> u32`: u32 number `at` of the weight.
#if QUANTISED
#if WEIGHT_Q8
#import shared/q8
// Quads of codes of a group, and its f16 parameters.
const GROUP_QUADS: u32 = GROUP / 16u;
const GROUP_PARAMETERS: u32 = Q8_PARAMETERS;
// Codes of 8 elements.
alias Codes = vec2<u32>;

fn code_values(codes: Codes) -> mat2x4<f32> {
    return q8_values(codes);
}

// Scale and offset of a group.
fn unpack_parameters(parameters: u32, group: u32) -> vec2<f32> {
    return vec2<f32>(q8_scale(parameters, group), 0.0);
}
#else
#import shared/q4
const GROUP_QUADS: u32 = GROUP / 32u;
const GROUP_PARAMETERS: u32 = Q4_PARAMETERS;
alias Codes = u32;

fn code_values(codes: Codes) -> mat2x4<f32> {
    return q4_values(codes);
}

fn unpack_parameters(parameters: u32, group: u32) -> vec2<f32> {
    return q4_scale_offset(parameters);
}
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
