//! CPU reference of `attention_prefill`.

use crate::ops::AttentionShape;
use crate::oracle::attention_decode::AttentionInputs;

/// Attention of every row and head: `[n, H, D]`.
///
/// # Source
/// Vaswani et al. 2017, arXiv 1706.03762, with the shared key-value heads of Ainslie et al. 2023, arXiv 2305.13245.
pub fn attention_prefill(shape: &AttentionShape, inputs: &AttentionInputs, scale: f32) -> Vec<f32> {
    let mut all = Vec::with_capacity(inputs.q.len());
    for (i, entry) in inputs.active.iter().enumerate() {
        for head in 0..shape.num_attention_heads as usize {
            let (_, sum, out) = inputs.softmax_over(shape, scale, (i, head), 0..entry.kv_len as usize);
            all.extend(out.into_iter().map(|value| (value / sum) as f32));
        }
    }
    all
}

/// Queries that the kernel scales and rounds to f16 without loss, near `q`.
pub fn half_queries(q: &[f32], scale: f32) -> Vec<f32> {
    let factor = scale * std::f32::consts::LOG2_E;
    q.iter().map(|value| half::f16::from_f32(value * factor).to_f32() / factor).collect()
}
