//! CPU reference of `rms_norm`.

use crate::rows::ActiveRow;

/// Normalises the rows `active` of `x` `[T, C]` into `[n, C]`.
///
/// # Source
/// Zhang and Sennrich 2019, arXiv 1910.07467.
pub fn rms_norm(active: &[ActiveRow], x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let hidden_size = weight.len();
    let mut y = Vec::with_capacity(active.len() * hidden_size);
    for entry in active {
        let row = &x[entry.row as usize * hidden_size..][..hidden_size];
        let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / hidden_size as f64;
        let scale = 1.0 / (mean + f64::from(eps)).sqrt();
        y.extend(row.iter().zip(weight).map(|(v, w)| (f64::from(*v) * scale * f64::from(*w)) as f32));
    }
    y
}
