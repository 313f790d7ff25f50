//! [`Phase`]: which kernels a step runs, by what it is for and how many rows it may have.

use mor_kernels::caps::DeviceCaps;
use mor_kernels::ops::LinearTile;

use crate::device_weights::Precision;

/// Rows up to which the matrix-vector kernels serve; they also merge the splits of attention.
pub const MAX_FEW_ROWS: usize = 8;

/// The same where cooperative matrices multiply halves, for all but that merge. A step of eight sequences of the 360M shape takes an
/// H200 3.3 ms with matrix-vector kernels, one of 32 with matrices 1.4 ms (`benches/runs/2026-11-28-nvidia-h200/batches.txt`).
const MAX_FEW_ROWS_BESIDE_MATRICES: usize = 2;

/// Rows that the tiles of [`Phase::Invariant`] are chosen for, whatever the number of rows: a batch of decoding sequences
/// that is worth batching.
const INVARIANT_ROWS: u32 = 64;

/// What a step is for: it decides the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// One row a sequence; keys are split over `num_splits` workgroups.
    Decode {
        /// Parts of the keys, from 1 on; 1 for more than [`MAX_FEW_ROWS`] rows.
        num_splits: u32,
    },
    /// Many rows.
    Prefill {
        /// Parts of the keys of those that end prompts, from 1 on: a workgroup a head would go through them one tile after
        /// the other. 1 for more than [`MAX_FEW_ROWS`] of them.
        num_splits: u32,
        /// About how many prompts end, from 1 on: whose tokens are drawn.
        num_ends: usize,
    },
    /// Few or many rows of either kind, computed alike: every sum has an order of its own, which no other row and no
    /// number of rows changes.
    Invariant,
}

/// The kernels that multiply rows with a weight.
#[derive(Clone, Copy, Debug)]
pub(super) enum Product {
    /// `LinearDecode` for up to `max_rows` rows, norm and merge fused.
    FewRows { max_rows: u32 },
    /// `Linear`; `norm_apart`: after an `RmsNorm`.
    ManyRows { tile: LinearTile, norm_apart: bool },
}

impl Phase {
    /// Parts into which `AttentionDecode` splits the keys of rows, which may be those that `are_sampled`; `None` where
    /// `AttentionPrefill` serves.
    pub(super) fn key_splits(self, are_sampled: bool) -> Option<u32> {
        match self {
            Phase::Decode { num_splits } => Some(num_splits),
            Phase::Invariant => Some(1),
            Phase::Prefill { num_splits, .. } => are_sampled.then_some(num_splits),
        }
    }

    /// Whether this is a [`Phase::Prefill`].
    pub(super) fn is_prefill(self) -> bool {
        matches!(self, Phase::Prefill { .. })
    }

    /// Whether [`Product::FewRows`] serves up to `num_rows` rows.
    pub(super) fn is_few(self, caps: &DeviceCaps, precision: Precision, num_rows: usize, merges: bool) -> bool {
        let has_matrices = precision == Precision::F16 && caps.cooperative_matrices.is_some();
        let most = if has_matrices && !merges { MAX_FEW_ROWS_BESIDE_MATRICES } else { MAX_FEW_ROWS };
        self != Phase::Invariant && num_rows <= most
    }

    /// The kernels for about `num_rows` rows, of up to [`MAX_FEW_ROWS`] no more than those, times `num_outputs` of the
    /// `weight_rows` rows of a weight; `merges` if the rows are merged from parts of attention. Products of
    /// halves, on cooperative matrices, are for models that are stored as such.
    pub(super) fn product(
        self,
        caps: &DeviceCaps,
        precision: Precision,
        num_rows: usize,
        [num_outputs, weight_rows]: [u32; 2],
        merges: bool,
    ) -> Product {
        let (num_rows, num_outputs) = match self {
            // Neither how many rows a step has room for nor which part of the weight it needs may choose the tile.
            Phase::Invariant => (INVARIANT_ROWS, weight_rows),
            _ if self.is_few(caps, precision, num_rows, merges) => {
                return Product::FewRows { max_rows: num_rows as u32 };
            }
            _ => (num_rows as u32, num_outputs),
        };
        let tile = LinearTile::for_shape(caps, [num_rows, num_outputs], precision == Precision::F16);
        // Of the rows of a prompt, every tile of columns would read whole rows again to norm them.
        Product::ManyRows { tile, norm_apart: self.is_prefill() || !tile.fuses_norm() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caps(cooperative_matrices: bool) -> DeviceCaps {
        DeviceCaps {
            subgroup_sizes: Some((32, 32)),
            shader_f16: cooperative_matrices,
            cooperative_matrices: cooperative_matrices.then_some(16),
            packed_dots: true,
            coherent_storage: false,
            timestamps: false,
            max_storage_binding_bytes: 128 << 20,
            max_buffer_bytes: 256 << 20,
            max_workgroup_storage_bytes: 48 << 10,
            max_workgroup_size: 1024,
            max_workgroups: 65535,
            max_storage_buffers: 8,
            uniform_alignment: 256,
            storage_alignment: 256,
            is_cpu: false,
        }
    }

    #[test]
    fn few_rows_are_fewer_beside_matrices() {
        let decode = Phase::Decode { num_splits: 1 };
        let is_few = |cooperative, precision, num_rows, merges| {
            let product = decode.product(&caps(cooperative), precision, num_rows, [960, 960], merges);
            matches!(product, Product::FewRows { max_rows } if max_rows as usize == num_rows)
        };
        let up_to = |cooperative, precision, merges| {
            (1..=16).take_while(|num_rows| is_few(cooperative, precision, *num_rows, merges)).count()
        };
        assert_eq!(up_to(true, Precision::F16, false), MAX_FEW_ROWS_BESIDE_MATRICES);
        assert_eq!(up_to(true, Precision::F16, true), MAX_FEW_ROWS, "only these kernels merge");
        assert_eq!(up_to(true, Precision::F32, false), MAX_FEW_ROWS, "halves are not for f32");
        assert_eq!(up_to(false, Precision::F16, false), MAX_FEW_ROWS);
    }
}
