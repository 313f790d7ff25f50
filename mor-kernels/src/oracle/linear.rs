//! CPU reference of `linear`: the product and the epilogues are those of `linear_decode`; what differs is that some tiles
//! round their inputs to f16, and where they do so when a norm comes first.

pub use super::linear_decode::{EpilogueState, epilogue, gather, linear};

/// `values` rounded to f16, as matrix units take them.
pub fn halves(values: &[f32]) -> Vec<f32> {
    values.iter().map(|v| half::f16::from_f32(*v).to_f32()).collect()
}

/// RMSNorm of the rows of `x` `[n, K]` in two parts: `x * norm_weight`, which is multiplied by the weights, and the
/// factor of each row, which multiplies the product.
pub fn norm_factors(x: &[f32], norm_weight: &[f32], eps: f64) -> (Vec<f32>, Vec<f32>) {
    let in_features = norm_weight.len();
    let scaled = x.iter().zip(norm_weight.iter().cycle()).map(|(x, weight)| x * weight).collect();
    let factor = |row: &[f32]| {
        let squares: f64 = row.iter().map(|v| f64::from(*v).powi(2)).sum();
        (squares / in_features as f64 + eps).sqrt().recip() as f32
    };
    (scaled, x.chunks(in_features).map(factor).collect())
}
