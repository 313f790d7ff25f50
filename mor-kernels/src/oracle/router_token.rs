//! CPU reference of `router_token`.

use super::router_expert::router_logit;
use crate::ops::{RouterToken, RouterTokenParams, TokenGate};
use crate::rows::ActiveRow;

/// What the router writes, per row of the stream.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenChoices {
    /// `[T, R]`.
    pub logits: Vec<f32>,
    /// `[T, R]`, without bias.
    pub gates: Vec<f32>,
    /// `[T]`: recursions the row takes.
    pub depth: Vec<u32>,
    /// `[T]`: the gate of the recursion chosen.
    pub token_weight: Vec<f32>,
}

/// Writes the choices of the rows `active` of `x` `[T, K]`, or `[n, K]` unless the kernel reads by row.
///
/// # Source
/// Bae et al. 2025, arXiv 2507.10524.
pub fn router_token(
    kernel: &RouterToken,
    params: &RouterTokenParams,
    active: &[ActiveRow],
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    choices: &mut TokenChoices,
) {
    let num_recursions = kernel.num_recursions as usize;
    let k = params.in_features as usize;
    for (i, entry) in active.iter().enumerate() {
        let row = entry.row as usize;
        let input = &x[if kernel.x_by_row { row } else { i } * k..][..k];
        let logits: Vec<f64> = weight.chunks_exact(k).map(|w| router_logit(input, w, params.input_scale)).collect();
        let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = logits.iter().map(|logit| (logit - top).exp()).sum();
        let mut chosen = 0;
        let mut best = f32::NEG_INFINITY;
        for (r, logit) in logits.iter().enumerate() {
            let gate = match kernel.gate {
                TokenGate::Softmax => (logit - top).exp() / total,
                TokenGate::Sigmoid => 1.0 / (1.0 + (-logit).exp()),
            };
            // The choice is among f32 gates: those that saturate are equal.
            let gate = params.alpha * gate as f32;
            let score = if kernel.bias { gate + bias[r] } else { gate } + r as f32 * params.depth_bias;
            if r < params.max_depth as usize && score > best {
                (best, chosen) = (score, r);
            }
            choices.logits[row * num_recursions + r] = *logit as f32;
            choices.gates[row * num_recursions + r] = gate;
        }
        choices.depth[row] = chosen as u32 + 1;
        choices.token_weight[row] = choices.gates[row * num_recursions + chosen];
    }
}
