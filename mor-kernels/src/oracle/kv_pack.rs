//! CPU reference of `kv_pack`.

use crate::kv_blocks::{BLOCK, pack_block};
use crate::rows::{ActiveRow, NONE};

/// Packs rows of `values` `[n, kv_dim]` into the blocks of their slots in `cache`.
///
/// # Source
/// Rouhani et al. 2023, Microscaling Data Formats, arXiv 2310.10537.
pub fn kv_pack(active: &[ActiveRow], values: &[f32], kv_dim: usize, cache: &mut [u64]) {
    for (entry, row) in active.iter().zip(values.chunks(kv_dim)).filter(|(entry, _)| entry.kv_slot != NONE) {
        let slot = &mut cache[entry.kv_slot as usize * kv_dim / BLOCK..][..kv_dim / BLOCK];
        for (block, values) in slot.iter_mut().zip(row.chunks_exact(BLOCK)) {
            *block = pack_block(values.try_into().expect("whole blocks"));
        }
    }
}
