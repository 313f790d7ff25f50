//! CPU reference of `router_expert`.

use super::sample_token::pcg4d;
use crate::ops::{ExpertGate, RouterExpert, RouterExpertParams};
use crate::rows::ActiveRow;

/// Writes logits and gates of the rows `active` of `x` `[T, K]`, or `[n, K]` unless the kernel reads by row;
/// `weight` is `[R, K]`.
///
/// # Source
/// Bae et al. 2025, arXiv 2507.10524.
pub fn router_expert(
    kernel: &RouterExpert,
    params: &RouterExpertParams,
    active: &[ActiveRow],
    x: &[f32],
    weight: &[f32],
    logits: &mut [f32],
    mut gates: Option<&mut [f32]>,
) {
    let alpha = f64::from(params.alpha);
    for (i, entry) in active.iter().enumerate() {
        let row = entry.row as usize;
        let from = if kernel.x_by_row { row } else { i };
        let k = kernel.in_features as usize;
        let Some(weight) = weight.chunks(k).nth(entry.recursion.wrapping_add(1) as usize) else { continue };
        let logit = router_logit(&x[from * k..][..k], weight, params.input_scale);
        logits[row] = logit as f32;
        if let Some(gates) = &mut gates {
            gates[row] = match kernel.gate {
                ExpertGate::Sigmoid => alpha / (1.0 + (-logit).exp()),
                ExpertGate::Tanh => alpha * logit.tanh(),
                ExpertGate::None => logit,
            } as f32;
        }
    }
}

/// Its fractional part, in units of 2^-32.
const GOLDEN_RATIO: u32 = 0x9e37_79b9;

/// Puts what the script decides in place of the logits of the rows `active`: `shares` `[R]` are those of all tokens that take
/// each recursion.
pub fn script(params: &RouterExpertParams, active: &[ActiveRow], shares: &[f32], logits: &mut [f32]) {
    for entry in active {
        let recursion = entry.recursion.wrapping_add(1);
        let Some(share) = shares.get(recursion as usize) else { continue };
        let [begin, ..] = pcg4d([params.seed_low, params.seed_high, entry.sequence, 0]);
        let bits = begin.wrapping_add(entry.position.wrapping_mul(GOLDEN_RATIO));
        let takes_it = f64::from(bits >> 8) / f64::from(1 << 24) < f64::from(*share);
        logits[entry.row as usize] = if takes_it { 1.0 } else { -1.0 };
    }
}

/// `scale * dot(x, weight)`.
pub(super) fn router_logit(x: &[f32], weight: &[f32], scale: f32) -> f64 {
    f64::from(scale) * x.iter().zip(weight).map(|(v, w)| f64::from(*v) * f64::from(*w)).sum::<f64>()
}
