//! `y = x W^T` for many rows, with RMSNorm before it and an epilogue after it.

#[cfg(all(test, feature = "oracle"))]
mod tests;
mod tiles;

pub use self::tiles::LinearTile;
use self::tiles::{SHORT_LOOP_ROWS, subgroup_width};
use super::linear_decode::{Prologue, PrologueKind};
use crate::caps::DeviceCaps;
use crate::epilogue::{Epilogue, EpilogueKind, LinearParams, define_weight};
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::{ROW_PADDING, RowSet};
use crate::shader::Definitions;
use crate::tensor::{DType, Tensor};

/// Rows of a subgroup up to which a thread reads the entries of its own ones before it multiplies. For more it has no registers: gate
/// and up of 1,365 rows of 360M take 82 us with 64 rows a subgroup, and 87 so. Where a tile is one fragment of rows high, steps of 4
/// to 16 sequences are 1 % faster without (`benches/runs/2026-11-29-nvidia-h200/linear-epilogues.txt`).
const MOST_EARLY_ROWS: u32 = 32;

/// `y = f(x) W^T`, weights and activations each read once for a tile of the output.
///
/// # Source
/// Llama projections, arXiv 2302.13971; MoR block end, arXiv 2507.10524.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// Elements of a row of the weight; a multiple of 8.
    pub in_features: u32,
    /// Element type of the weight.
    pub weight_dtype: DType,
    /// Input side; [`PrologueKind::Norm`] where [`LinearTile::fuses_norm`], kinds that [`PrologueKind::reads_halves`] where
    /// [`LinearTile::multiplies_halves`], never [`PrologueKind::Merge`].
    pub prologue: PrologueKind,
    /// Output side; [`EpilogueKind::SwiGluF16`] and [`EpilogueKind::Scaled`] where [`LinearTile::multiplies_halves`].
    pub epilogue: EpilogueKind,
    /// How the product is computed.
    pub tile: LinearTile,
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct LinearBindings<'a> {
    /// The rows to compute, n of them.
    pub rows: &'a RowSet,
    /// `[O, K]`, K padded to a multiple of 8, O even; rows past `num_outputs` are left out.
    pub weight: &'a Tensor,
    /// Input.
    pub prologue: Prologue<'a>,
    /// Output.
    pub epilogue: Epilogue<'a>,
    /// Where workgroups leave the sums of their part of the inputs, for a tile that has several.
    pub parts: Option<PartSums<'a>>,
}

/// What the workgroups of a tile's parts meet in; what one dispatch leaves there the next one does not need.
#[derive(Clone, Copy, Debug)]
pub struct PartSums<'a> {
    /// `[tiles, parts, tile_m * tile_n]` f32 at least.
    pub sums: &'a Tensor,
    /// `[tiles]` u32 at least: parts that have come, 0 between dispatches.
    pub arrivals: &'a Tensor,
}

impl Linear {
    /// Records the kernel over all active rows.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the tile is none or not one of the device, the weight is too small or of another type,
    /// or prologue or epilogue are not those specialised for; else as [`PlanBuilder::dispatch`].
    pub fn record(&self, plan: &mut PlanBuilder<'_>, b: &LinearBindings<'_>, p: &LinearParams) -> Result<()> {
        self.check(plan.gpu().caps(), b, p)?;
        let [tile_m, tile_n] = self.tile.size();
        let (x, z) = (p.num_outputs.div_ceil(tile_n), self.tile.parts());
        plan.dispatch(self, b, p, Grid::Rows { set: b.rows, x, rows_per_workgroup: tile_m, z })
    }

    fn check(&self, caps: &DeviceCaps, b: &LinearBindings<'_>, p: &LinearParams) -> Result<()> {
        let unfit = |what, found, expected: &str| {
            Err(KernelError::Shape { kernel: Self::NAME, what, found, expected: expected.to_owned() })
        };
        if let LinearTile::Cooperative { edge, .. } = self.tile
            && caps.cooperative_matrices != Some(edge)
        {
            return unfit("tile", format!("{:?}", self.tile), "one without such cooperative matrices on this device");
        }
        if !self.tile.is_valid(caps) {
            return unfit("tile", format!("{:?}", self.tile), "whole numbers of loads and columns for every thread");
        }
        if !p.in_features.is_multiple_of(8) || p.in_features == 0 {
            return unfit("in_features", p.in_features.to_string(), "a multiple of 8");
        }
        // The shader knows that half of it is 0.
        if p.additive > 1 {
            return unfit("additive", p.additive.to_string(), "0 or 1");
        }
        if p.in_features != self.in_features {
            return unfit("in_features", p.in_features.to_string(), &self.in_features.to_string());
        }
        if !p.num_outputs.is_multiple_of(2) || p.num_outputs == 0 || !p.first_output.is_multiple_of(2) {
            let found = format!("{} from {}", p.num_outputs, p.first_output);
            return unfit("num_outputs", found, "an even number from an even column");
        }
        if let LinearTile::Cooperative { lane_columns: 4, .. } = self.tile {
            let columns = [p.num_outputs, p.first_output, p.q_dim, p.kv_dim, p.head_dim, p.delta_start];
            let half =
                matches!(self.epilogue, EpilogueKind::SwiGlu | EpilogueKind::SwiGluF16 | EpilogueKind::SwiGluDelta);
            let out_stride = if half { 2 * p.out_stride } else { p.out_stride };
            if columns.into_iter().chain([out_stride]).any(|count| !count.is_multiple_of(4)) {
                return unfit("numbers of columns", format!("{p:?}"), "multiples of 4 for this tile");
            }
        }
        let (found, expected) = (b.weight.num_elems(), p.num_outputs as usize * p.in_features as usize);
        // More rows are fine: layers that share K/V read only the q rows of the fused projection.
        if found < expected || b.weight.dtype() != self.weight_dtype {
            let found = format!("{found} elements of {:?}", b.weight.dtype());
            return unfit("weight", found, &format!("at least {expected} of {:?}", self.weight_dtype));
        }
        let prologue = b.prologue.kind();
        if prologue != self.prologue {
            return unfit("prologue", format!("{prologue:?}"), &format!("{:?}", self.prologue));
        }
        match prologue {
            _ if prologue.reads_halves() && !self.tile.multiplies_halves() => {
                return unfit("prologue", format!("{prologue:?}"), "f32 for this tile");
            }
            PrologueKind::Compact | PrologueKind::CompactF16 | PrologueKind::Scaled { .. } => {}
            PrologueKind::Stream | PrologueKind::StreamF16 => {}
            PrologueKind::Norm if self.tile.fuses_norm() => {}
            PrologueKind::Norm => {
                return unfit("prologue", "Norm".to_owned(), "a tile that fuses it, or rms_norm before");
            }
            PrologueKind::Merge { .. } => {
                return unfit("prologue", format!("{prologue:?}"), "merged results, as attention_prefill writes them");
            }
        }
        if b.epilogue.kind() != self.epilogue {
            return unfit("epilogue", format!("{:?}", b.epilogue.kind()), &format!("{:?}", self.epilogue));
        }
        if matches!(self.epilogue, EpilogueKind::SwiGluF16 | EpilogueKind::Scaled) && !self.tile.multiplies_halves() {
            return unfit("epilogue", format!("{:?}", self.epilogue), "f32 for this tile");
        }
        if self.epilogue == EpilogueKind::Scaled && (p.first_output > 0 || p.num_outputs != p.out_stride) {
            let found = format!("{} from {}", p.num_outputs, p.first_output);
            return unfit("num_outputs", found, "all columns of a norm");
        }
        if self.tile.parts() > 1 {
            let tiles = self.tile.num_tiles([b.rows.capacity as u32, p.num_outputs]);
            let room = b.parts.map_or((0, 0), |parts| (parts.sums.num_elems(), parts.arrivals.num_elems()));
            let needed = (self.tile.part_sums(caps, tiles), tiles as usize);
            if room.0 < needed.0 || room.1 < needed.1 {
                return unfit("room for sums of parts", format!("{room:?}"), &format!("{needed:?}"));
            }
            if prologue == PrologueKind::Norm || p.in_features.div_ceil(self.tile.tile_k()) < self.tile.parts() {
                let found = format!("{prologue:?} of {}", p.in_features);
                return unfit("input in parts", found, "a tile of inputs for each part, normed before");
            }
        }
        let squares = match (b.prologue, b.epilogue) {
            (Prologue::Scaled { squares, num_parts, .. }, _) => Some((squares, num_parts)),
            (_, Epilogue::Scaled { next_squares, .. }) => {
                self.tile.num_norm_parts(p.num_outputs).map(|n| (next_squares, n))
            }
            _ => None,
        };
        if let Some((squares, num_parts)) = squares {
            let (found, expected) = (squares.num_elems(), num_parts as usize * p.part_stride as usize);
            if found < expected || (p.part_stride as usize) < b.rows.capacity + ROW_PADDING as usize {
                let found = format!("{found} in parts of {}", p.part_stride);
                let padded = b.rows.capacity + ROW_PADDING as usize;
                return unfit("squares", found, &format!("{num_parts} parts of {padded} at least"));
            }
        }
        Ok(())
    }
}

impl Kernel for Linear {
    const NAME: &'static str = "linear";
    type Params = LinearParams;
    type Bindings<'a> = LinearBindings<'a>;

    fn definitions(&self, caps: &DeviceCaps) -> Definitions {
        use PrologueKind as K;
        let [tile_m, tile_n] = self.tile.size();
        let definitions = Definitions::new()
            .u32("TILE_M", tile_m)
            .u32("TILE_N", tile_n)
            .flag("X_BY_ROW", matches!(self.prologue, K::Stream | K::StreamF16 | K::Norm))
            .flag("X_F16", self.prologue.reads_halves())
            .flag("NORM", self.prologue == PrologueKind::Norm);
        // A prompt's two products with a residual in each layer are one kernel, so that its instructions are still near when the second
        // begins: 2,047 tokens of 360M win 1 %, in q8 4, 511 of 1.7B 1. Where K is no constant elsewhere, nothing is won, and up to 3 %
        // lost (`benches/runs/2026-11-30-nvidia-h200/linear-any-k.txt`).
        let ends_in_residual = matches!(self.epilogue, EpilogueKind::Residual | EpilogueKind::Scaled);
        let definitions = if ends_in_residual && self.prologue == K::CompactF16 {
            definitions.flag("ANY_K", true)
        } else {
            definitions.u32("IN_FEATURES", self.in_features)
        };
        let definitions = match self.prologue {
            PrologueKind::Scaled { num_parts } => definitions.flag("SCALED", true).u32("PARTS", num_parts),
            _ => definitions,
        };
        let definitions = match self.tile {
            LinearTile::Staged { tile_k, thread_m, thread_n, split_k, ahead, .. } => definitions
                .u32("TILE_K", tile_k)
                .u32("AHEAD", ahead)
                .flag("ONE_AHEAD", ahead == 1)
                .u32("THREAD_M", thread_m)
                .u32("THREAD_N", thread_n)
                .u32("SPLIT_K", split_k)
                .flag("STAGED", true)
                .flag("WHOLE_TILES", self.in_features.is_multiple_of(tile_k))
                .flag("WRITTEN_OUT", tile_m < SHORT_LOOP_ROWS),
            LinearTile::Cooperative {
                edge,
                tile_k,
                subgroups_m,
                subgroups_n,
                split_k,
                ahead,
                lane_columns,
                parts,
                ..
            } => {
                let definitions =
                    if parts > 1 { definitions.flag("PARTED", true).u32("K_PARTS", parts) } else { definitions };
                let definitions = definitions
                    .u32("TILE_K", tile_k)
                    .u32("AHEAD", ahead)
                    .flag("ONE_AHEAD", ahead == 1)
                    .flag("WIDE_LOADS", self.weight_dtype == DType::Q8)
                    .u32("EDGE", edge)
                    .flag("EDGE_8", edge == 8)
                    .u32("FRAGMENTS_M", tile_m / subgroups_m / edge)
                    .u32("FRAGMENTS_N", tile_n / subgroups_n / edge)
                    .u32("STEPS", tile_k / split_k / edge)
                    .u32("SUBGROUP_WIDTH", subgroup_width(caps))
                    .u32("SPLIT_K", split_k)
                    .flag("QUADS", lane_columns == 4)
                    .flag("SLICED", split_k > 1)
                    .flag("ROWS_EARLY", tile_m > edge && tile_m / subgroups_m <= MOST_EARLY_ROWS)
                    .flag("STAGED", true)
                    .flag("WHOLE_TILES", self.in_features.is_multiple_of(tile_k))
                    .flag("WRITTEN_OUT", tile_m < SHORT_LOOP_ROWS)
                    .flag("COOPERATIVE", true);
                // Those of a row of a fragment.
                match self.epilogue {
                    EpilogueKind::Scaled => definitions.u32("LANES", edge / lane_columns),
                    _ => definitions,
                }
            }
            LinearTile::Direct { thread_n, .. } => definitions
                .u32("THREAD_M", tile_m)
                .u32("THREAD_N", thread_n)
                .u32("SPLIT_K", 1)
                .flag("BROADCAST", self.tile.broadcasts(caps)),
        };
        self.epilogue.define(define_weight(definitions, self.weight_dtype))
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        let mut bindings = vec![Binding::read(1, &b.rows.active), Binding::weight(2, b.weight)];
        bindings.extend(b.prologue.bindings());
        bindings.extend(b.epilogue.bindings());
        if let Some(PartSums { sums, arrivals }) = b.parts.filter(|_| self.tile.parts() > 1) {
            bindings.extend([Binding::write(13, sums), Binding::write(14, arrivals)]);
        }
        bindings
    }

    fn workgroup_storage_bytes(&self, _: &DeviceCaps) -> u32 {
        let arrived = if self.tile.parts() > 1 { 16 } else { 0 };
        self.tile.storage_bytes(self.prologue) + arrived
    }
}
