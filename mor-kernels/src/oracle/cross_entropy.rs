//! CPU reference of `cross_entropy`.

use crate::rows::ActiveRow;

/// Writes `logsumexp(logits[i, 0..vocab_size]) - logits[i, labels[r]]` to `nll[r]` for the active rows `r`;
/// 0 where the label is no token.
pub fn cross_entropy(
    active: &[ActiveRow],
    logits: &[f32],
    logits_stride: usize,
    vocab_size: usize,
    labels: &[u32],
    nll: &mut [f32],
) {
    for (i, entry) in active.iter().enumerate() {
        let row = entry.row as usize;
        let logits = &logits[i * logits_stride..][..vocab_size];
        nll[row] = match logits.get(labels[row] as usize) {
            None => 0.0,
            Some(label) => {
                let max = logits.iter().copied().map(f64::from).fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - max).exp()).sum();
                (sum.ln() + (max - f64::from(*label))) as f32
            }
        };
    }
}
