//! How the products of `decode_layers` are divided over teams of lanes, and what its shader calls that.

use crate::quantize;
use crate::shader::Definitions;
use crate::tensor::DType;

/// A product of one row with a matrix.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    /// Outputs.
    pub(super) rows: u32,
    /// Elements of a row of the matrix.
    pub(super) in_features: u32,
    pub(super) dtype: DType,
    /// Units of each of two rows that a lane may have on their way.
    pub(super) prefetch: u32,
    /// Most teams that may share a pair of outputs, a power of two.
    pub(super) max_split: u32,
}

/// Who multiplies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Teams {
    pub(super) workgroups: u32,
    /// Teams of a workgroup.
    pub(super) teams: u32,
    /// Lanes of a team.
    pub(super) lanes: u32,
}

/// How a product is divided over teams of lanes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Division {
    pub(super) rows: u32,
    /// Units of a row, and units from row to row.
    quads: u32,
    stride: u32,
    /// Teams that share a pair of outputs.
    split: u32,
    /// Units a lane multiplies for a pair.
    steps: u32,
    /// Pairs a team multiplies, and how many of them at a time.
    pub(super) rounds: u32,
    abreast: u32,
    /// Units of each of those that are on their way.
    turn: u32,
    /// vec4s of the staged activation.
    pub(super) staged_vec4s: u32,
}

impl Division {
    /// The fastest.
    pub(super) fn fastest(product: &Product, by: &Teams) -> Self {
        let Product { rows, in_features, dtype, prefetch, max_split } = *product;
        let in_features = match dtype.is_quantized() {
            // Whole groups.
            true => in_features.next_multiple_of(quantize::GROUP as u32),
            false => in_features,
        };
        let quads = in_features / quad_elems(dtype);
        let stride = dtype.row_bytes(product.in_features as usize) as u32 / 16;
        // Elements, or digits of eight and half as much for their steps.
        let staged_vec4s = if dtype.is_quantized() { in_features / 16 * 3 } else { in_features / 4 };
        let pairs = rows.div_ceil(2).div_ceil(by.workgroups);
        // Teams that share a pair have fewer units each, but then more pairs follow one another. Pairs abreast share what is read of
        // the activation, and the wait for their sums. The costs are in multiplications of two units, about as measured.
        let splits = (0..=max_split.ilog2()).map(|log2| 1 << log2);
        let divisions = splits.flat_map(|split| (1..=max_abreast(dtype)).map(move |abreast| (split, abreast)));
        let divisions = divisions.map(|(split, abreast)| {
            let rounds = pairs.div_ceil(by.teams / split);
            let steps = quads.div_ceil(split * by.lanes);
            let abreast = abreast.min(rounds).min(prefetch);
            let turn = (prefetch / abreast).min(steps);
            let steps = steps.next_multiple_of(turn);
            let activation = f64::from(steps) * 0.4;
            let products = f64::from(steps * abreast);
            let sums = 0.7 + 0.2 * f64::from(abreast);
            let cost = f64::from(rounds.div_ceil(abreast)) * (activation + products + sums) + 0.1 * f64::from(split);
            (cost, Self { rows, quads, stride, split, steps, rounds, abreast, turn, staged_vec4s })
        });
        let (_, division) = divisions.min_by(|(a, _), (b, _)| a.total_cmp(b)).expect("one team may always have a pair");
        division
    }

    /// Adds its constants to `definitions`.
    pub(super) fn define(&self, definitions: Definitions, names: &[&'static str; 8]) -> Definitions {
        let Self { rows, quads, stride, split, steps, rounds, abreast, turn, staged_vec4s: _ } = *self;
        let values = [rows, quads, stride, split, steps, rounds, abreast, turn];
        names.iter().zip(values).fold(definitions, |definitions, (name, value)| definitions.u32(name, value))
    }
}

/// Most pairs of outputs that a team multiplies at a time; more would take more registers than they save time.
fn max_abreast(dtype: DType) -> u32 {
    if dtype == DType::Q4 { 3 } else { 2 }
}

/// Names of a [`Division`]'s constants, for q, k and v; output; gate and up; down.
pub(super) const LAYER_PRODUCTS: [[&str; 8]; 4] = [
    ["QKV_ROWS", "QKV_QUADS", "QKV_STRIDE", "QKV_SPLIT", "QKV_STEPS", "QKV_ROUNDS", "QKV_ABREAST", "QKV_TURN"],
    ["O_ROWS", "O_QUADS", "O_STRIDE", "O_SPLIT", "O_STEPS", "O_ROUNDS", "O_ABREAST", "O_TURN"],
    [
        "GATE_UP_ROWS",
        "GATE_UP_QUADS",
        "GATE_UP_STRIDE",
        "GATE_UP_SPLIT",
        "GATE_UP_STEPS",
        "GATE_UP_ROUNDS",
        "GATE_UP_ABREAST",
        "GATE_UP_TURN",
    ],
    ["DOWN_ROWS", "DOWN_QUADS", "DOWN_STRIDE", "DOWN_SPLIT", "DOWN_STEPS", "DOWN_ROUNDS", "DOWN_ABREAST", "DOWN_TURN"],
];
/// For the head.
pub(super) const HEAD_PRODUCT: [&str; 8] =
    ["HEAD_ROWS", "HEAD_QUADS", "HEAD_STRIDE", "HEAD_SPLIT", "HEAD_STEPS", "HEAD_ROUNDS", "HEAD_ABREAST", "HEAD_TURN"];

/// What the shader calls the properties of a type of matrices.
pub(super) struct TypeNames {
    f16: &'static str,
    bf16: &'static str,
    q8: &'static str,
    q4: &'static str,
    quantised: &'static str,
    quad_elems: &'static str,
    unit_codes: &'static str,
    prefetch: &'static str,
}

/// Of the matrices of layers.
pub(super) const LAYER_TYPE: TypeNames = TypeNames {
    f16: "LAYER_F16",
    bf16: "LAYER_BF16",
    q8: "LAYER_Q8",
    q4: "LAYER_Q4",
    quantised: "LAYER_QUANTISED",
    quad_elems: "LAYER_QUAD_ELEMS",
    unit_codes: "LAYER_UNIT_CODES",
    prefetch: "LAYER_PREFETCH",
};

/// Of embeddings and head.
pub(super) const HEAD_TYPE: TypeNames = TypeNames {
    f16: "HEAD_F16",
    bf16: "HEAD_BF16",
    q8: "HEAD_Q8",
    q4: "HEAD_Q4",
    quantised: "HEAD_QUANTISED",
    quad_elems: "HEAD_QUAD_ELEMS",
    unit_codes: "HEAD_UNIT_CODES",
    prefetch: "HEAD_PREFETCH",
};

/// Adds what the shader has to know of a type of matrices to `definitions`.
pub(super) fn define_type(definitions: Definitions, names: &TypeNames, dtype: DType, prefetch: u32) -> Definitions {
    let definitions = definitions
        .flag(names.f16, dtype == DType::F16)
        .flag(names.bf16, dtype == DType::BF16)
        .flag(names.q8, dtype == DType::Q8)
        .flag(names.q4, dtype == DType::Q4)
        .flag(names.quantised, dtype.is_quantized())
        .u32(names.quad_elems, quad_elems(dtype))
        .u32(names.prefetch, prefetch);
    if !dtype.is_quantized() {
        return definitions;
    }
    definitions.u32("GROUP", quantize::GROUP as u32).u32(names.unit_codes, quad_elems(dtype) / 8)
}

/// Elements of 16 bytes of a row.
fn quad_elems(dtype: DType) -> u32 {
    match dtype {
        DType::F32 | DType::U32 => 4,
        DType::F16 | DType::BF16 => 8,
        DType::Q8 | DType::Block8 => 16,
        DType::Q4 => 32,
    }
}
