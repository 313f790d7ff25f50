//! CPU reference of `router_topk`.

use std::cmp::Ordering;

use crate::ops::TopkSequence;

/// `(row, selected)` for every row of every sequence.
///
/// # Source
/// Bae et al. 2025, arXiv 2507.10524.
pub fn router_topk(sequences: &[TopkSequence], gates: &[f32], depth: &[u32], recursion: u32) -> Vec<(usize, bool)> {
    let mut decisions = Vec::new();
    for sequence in sequences {
        let rows = sequence.first_row as usize..(sequence.first_row + sequence.num_rows) as usize;
        let mut alive: Vec<usize> = rows.clone().filter(|row| depth[*row] == recursion).collect();
        // Stable: of equal gates the lower row stays first.
        alive.sort_by(|a, b| descending(gates[*a], gates[*b]));
        alive.truncate(sequence.k as usize);
        alive.sort_unstable();
        decisions.extend(rows.map(|row| (row, alive.binary_search(&row).is_ok())));
    }
    decisions
}

/// Larger first, NaN last; infinities equal the largest finite numbers, as in the kernels' order keys.
pub(super) fn descending(a: f32, b: f32) -> Ordering {
    let finite = |value: f32| value.clamp(-f32::MAX, f32::MAX);
    match (a.is_nan(), b.is_nan()) {
        (false, false) => finite(b).partial_cmp(&finite(a)).expect("neither is NaN"),
        (a_is_nan, b_is_nan) => a_is_nan.cmp(&b_is_nan),
    }
}
