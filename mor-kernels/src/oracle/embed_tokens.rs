//! CPU reference of `embed_tokens`.

use crate::rows::{ActiveRow, Row};

/// Writes the embeddings of the active rows whose token lies in `first_token..` of `weight`
/// `[num_tokens, C]` into `x` `[T, C]`.
pub fn embed_tokens(
    rows: &[Row],
    active: &[ActiveRow],
    weight: &[f32],
    hidden_size: usize,
    first_token: usize,
    x: &mut [f32],
) {
    for entry in active {
        let row = entry.row as usize;
        let embedding = (rows[row].token as usize)
            .checked_sub(first_token)
            .and_then(|token| weight.get(token * hidden_size..(token + 1) * hidden_size));
        if let Some(embedding) = embedding {
            x[row * hidden_size..][..hidden_size].copy_from_slice(embedding);
        }
    }
}
