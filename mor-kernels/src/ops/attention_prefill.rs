//! Attention of many rows, tile by tile of rows and keys.

use crate::caps::{DeviceCaps, Lanes};
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::ops::attention_decode::{AttentionShape, describe};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::RowSet;
use crate::shader::Definitions;
use crate::tensor::{DType, Tensor};

/// Attention of many rows: every (tile of rows, query head) is a workgroup.
///
/// Rows that share a `kv_table` must lie together and ascend in `kv_len`, as rows in position order do. A tile
/// of rows of several sequences costs as much as one tile for each.
///
/// # Source
/// Dao 2023, FlashAttention-2, arXiv 2307.08691.
#[derive(Clone, Copy, Debug)]
pub struct AttentionPrefill {
    /// Heads and cache.
    pub shape: AttentionShape,
    /// About how many rows there will be: as many as there are are computed.
    pub num_rows: u32,
    /// Whether queries and weights may be rounded to f16, where the device has cooperative matrices and the cache holds f16.
    pub half_products: bool,
    /// Whether results are f16, where [`AttentionPrefill::can_write_halves`].
    pub half_output: bool,
}

/// Constants of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct AttentionPrefillParams {
    /// Factor on the scores, see [`AttentionShape::scale`].
    pub scale: f32,
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct AttentionPrefillBindings<'a> {
    /// The query rows, n of them, which its `dispatch` says.
    pub rows: &'a RowSet,
    /// `[n, H, D]` f32, rotated.
    pub q: &'a Tensor,
    /// `[slots, G, D]`.
    pub keys: &'a Tensor,
    /// `[slots, G, D]`.
    pub values: &'a Tensor,
    /// Pages or slots, u32.
    pub kv_table: &'a Tensor,
    /// `[n, H, D]` f32 or f16, written.
    pub out: &'a Tensor,
}

/// Sizes of the tiles of a specialisation.
#[derive(Clone, Copy)]
enum Tiles {
    /// f32 in registers.
    Staged {
        /// Rows of a workgroup.
        block_q: u32,
        /// Threads that share rows; the keys of a tile are four times as many.
        columns: u32,
        /// Units of 8 elements staged at a time.
        chunk_units: u32,
    },
    /// Cooperative matrices, 16 rows a subgroup.
    Cooperative {
        /// Parts of a workgroup that take turns at the tiles of keys.
        key_slices: u32,
    },
}

/// Subgroups of a slice of a workgroup that multiplies cooperative matrices.
const SUBGROUPS: u32 = 4;
/// Up to how many workgroups so many slices share the keys of each: few workgroups leave processors idle and take as long as the
/// longest of them, many have no time for adding up slices. On an H200, in us of a dispatch alone with one, two and four: 165
/// workgroups 37, 30 and 27; 288 80, 64 and 58; 330 62, 50 and 53; 480 91, 69 and 83; 645 52 and 62; 256 of 32 heads 33, 28 and 30
/// (`benches/runs/2026-11-29-nvidia-h200/attention-prefill-tiles.txt`).
const SLICES: [(u32, u32); 3] = [(300, 4), (560, 2), (u32::MAX, 1)];
/// Rows, columns and depth of the matrices that a subgroup multiplies.
const FRAGMENT: u32 = 16;

impl AttentionPrefill {
    /// The kernel for `shape` and about `num_rows` rows; `half_products` allows queries and weights to be rounded to f16.
    pub fn new(shape: AttentionShape, num_rows: u32, half_products: bool) -> Self {
        Self { shape, num_rows, half_products, half_output: false }
    }

    /// Whether a device with `caps` can write results as f16: one whose cooperative matrices serve.
    pub fn can_write_halves(&self, caps: &DeviceCaps) -> bool {
        matches!(self.tiles(caps), Tiles::Cooperative { .. })
    }

    /// Records the kernel over all active rows.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if a tensor does not fit the shape, and as [`PlanBuilder::dispatch`].
    pub fn record(
        &self,
        plan: &mut PlanBuilder<'_>,
        b: AttentionPrefillBindings<'_>,
        p: AttentionPrefillParams,
    ) -> Result<()> {
        self.shape.check(Self::NAME, b.rows.capacity, (b.q, b.keys, b.values))?;
        let num_elems = b.rows.capacity * (self.shape.num_attention_heads * self.shape.head_dim) as usize;
        if b.out.num_elems() < num_elems {
            return Err(KernelError::Shape {
                kernel: Self::NAME,
                what: "out",
                found: describe(b.out),
                expected: format!("at least {num_elems} elements"),
            });
        }
        let expected = if self.half_output { DType::F16 } else { DType::F32 };
        let caps = plan.gpu().caps();
        if b.out.dtype() != expected || self.half_output && !self.can_write_halves(caps) {
            let (found, expected) = (describe(b.out), format!("{expected:?}, f16 with cooperative matrices alone"));
            return Err(KernelError::Shape { kernel: Self::NAME, what: "out", found, expected });
        }
        let block_q = self.tiles(caps).block_q();
        plan.dispatch(self, &b, &p, Grid::rows(b.rows, self.shape.num_attention_heads, block_q))
    }

    /// Workgroups for `num_rows` rows on a device with `caps`.
    pub fn grid(&self, num_rows: u32, caps: &DeviceCaps) -> [u32; 3] {
        [self.shape.num_attention_heads, num_rows.div_ceil(self.tiles(caps).block_q()), 1]
    }

    /// The largest tiles that fit.
    fn tiles(&self, caps: &DeviceCaps) -> Tiles {
        let units = self.shape.head_units();
        let most = caps.max_workgroup_storage_bytes;
        let blocks = self.num_rows.div_ceil(FRAGMENT * SUBGROUPS);
        let workgroups = blocks.saturating_mul(self.shape.num_attention_heads);
        let slices = SLICES.iter().skip_while(|(most, _)| workgroups > *most);
        let cooperative = slices.map(|&(_, key_slices)| Tiles::Cooperative { key_slices });
        // A row has 1 to 4 lanes.
        let width = caps.subgroup_sizes.map_or(0, |(width, _)| width);
        let halves = self.half_products
            && caps.cooperative_matrices == Some(FRAGMENT)
            && self.shape.kv_dtype != DType::F32
            && self.shape.head_dim.is_multiple_of(FRAGMENT)
            && (FRAGMENT..=4 * FRAGMENT).contains(&width);
        let fits = |tiles: &Tiles| {
            halves && tiles.subgroups() * width <= caps.max_workgroup_size && self.storage_bytes(*tiles, caps) <= most
        };
        if let Some(tiles) = cooperative.into_iter().find(fits) {
            return tiles;
        }
        // A thread's sums are 32 * units / columns floats, so wide heads need more columns.
        let (columns, most_units) = if units <= 16 { (8, 8) } else { (16, 4) };
        let chunks = |most: u32| units.div_ceil(units.div_ceil(most));
        let large = Tiles::Staged { block_q: 32, columns, chunk_units: chunks(most_units) };
        if self.storage_bytes(large, caps) <= most {
            return large;
        }
        // What WebGPU guarantees, 16 KiB.
        Tiles::Staged { block_q: 16, columns, chunk_units: chunks(if columns == 8 { 8 } else { 3 }) }
    }

    /// Workgroup memory, in bytes.
    fn storage_bytes(&self, tiles: Tiles, caps: &DeviceCaps) -> u32 {
        match tiles {
            Tiles::Staged { block_q, columns, chunk_units } => {
                let block_k = 4 * columns;
                let q = block_q * 2 * chunk_units;
                let k = block_k * (2 * chunk_units + 1);
                let p = block_q * columns;
                let exchange = if tiles.uses_subgroups(caps) { 0 } else { block_q / 4 * columns };
                16 * (q + k + p + exchange) + 4 * 2 * block_k
            }
            Tiles::Cooperative { key_slices } => {
                let tile = FRAGMENT * (2 * self.shape.head_units() + 2);
                let fragments = tiles.block_q() * (FRAGMENT / 4 + 2);
                key_slices * (8 * (tile.max(fragments) + tile) + 16 * fragments)
            }
        }
    }
}

impl Tiles {
    /// Rows of a workgroup.
    fn block_q(self) -> u32 {
        match self {
            Tiles::Staged { block_q, .. } => block_q,
            Tiles::Cooperative { .. } => FRAGMENT * SUBGROUPS,
        }
    }

    /// Keys of a tile.
    fn block_k(self) -> u32 {
        match self {
            Tiles::Staged { columns, .. } => 4 * columns,
            Tiles::Cooperative { .. } => FRAGMENT,
        }
    }

    /// Subgroups of a workgroup that multiplies cooperative matrices.
    fn subgroups(self) -> u32 {
        match self {
            Tiles::Staged { .. } => 0,
            Tiles::Cooperative { key_slices } => key_slices * SUBGROUPS,
        }
    }

    fn uses_subgroups(self, caps: &DeviceCaps) -> bool {
        match (self, caps.lanes()) {
            (Tiles::Staged { columns, .. }, Lanes::Subgroup { width }) => columns <= width,
            _ => false,
        }
    }
}

impl Kernel for AttentionPrefill {
    const NAME: &'static str = "attention_prefill";
    type Params = AttentionPrefillParams;
    type Bindings<'a> = AttentionPrefillBindings<'a>;

    fn definitions(&self, caps: &DeviceCaps) -> Definitions {
        let tiles = self.tiles(caps);
        let definitions = self.shape.definitions().u32("BLOCK_Q", tiles.block_q()).u32("BLOCK_K", tiles.block_k());
        match tiles {
            Tiles::Staged { block_q, columns, chunk_units } => {
                let num_chunks = self.shape.head_units().div_ceil(chunk_units);
                definitions
                    .u32("WORKGROUP_SIZE", block_q / 4 * columns)
                    .u32("COLUMNS", columns)
                    .u32("CHUNK_UNITS", chunk_units)
                    .u32("NUM_CHUNKS", num_chunks)
                    .flag("ONE_CHUNK", num_chunks == 1)
                    .flag("SUBGROUP", tiles.uses_subgroups(caps))
            }
            Tiles::Cooperative { key_slices } => {
                let width = caps.subgroup_sizes.map_or(1, |(width, _)| width);
                definitions
                    .u32("WORKGROUP_SIZE", tiles.subgroups() * width)
                    .u32("KEY_SLICES", key_slices)
                    .flag("SLICED", key_slices > 1)
                    .u32("SUBGROUP_WIDTH", width)
                    .u32("FRAGMENTS_D", self.shape.head_dim / FRAGMENT)
                    .flag("OUT_F16", self.half_output)
                    .flag("COOPERATIVE", true)
            }
        }
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        vec![
            Binding::read(1, &b.rows.active),
            Binding::read(2, b.q),
            Binding::read(3, b.keys),
            Binding::read(4, b.values),
            Binding::read(5, b.kv_table),
            Binding::write(6, b.out),
        ]
    }

    fn workgroup_storage_bytes(&self, caps: &DeviceCaps) -> u32 {
        self.storage_bytes(self.tiles(caps), caps)
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::gpu::Gpu;
    use crate::oracle::attention_decode::AttentionInputs;
    use crate::oracle::attention_prefill::{attention_prefill, half_queries};
    use crate::parity::{self, Rng, Tolerance};
    use crate::rows::KvTable;

    fn check(gpu: &Gpu, what: &str, shape: AttentionShape, inputs: &AttentionInputs, tolerance: Tolerance) {
        check_kernel(gpu, what, AttentionPrefill::new(shape, 1, false), inputs, tolerance);
        // Whatever the number of slices is chosen for, they compute any number of rows.
        for num_rows in [1, 64 * 400 / shape.num_attention_heads, u32::MAX] {
            let kernel = AttentionPrefill::new(shape, num_rows, true);
            if matches!(kernel.tiles(gpu.caps()), Tiles::Cooperative { .. }) {
                let rounded = AttentionInputs { q: half_queries(&inputs.q, shape.scale()), ..inputs.clone() };
                // What is left are the weights, each rounded once.
                check_kernel(gpu, &format!("{what} halves for {num_rows}"), kernel, &rounded, Tolerance::F16);
            }
        }
    }

    /// Compares with the oracle and returns what the kernel computed.
    fn check_kernel(
        gpu: &Gpu,
        what: &str,
        kernel: AttentionPrefill,
        inputs: &AttentionInputs,
        tolerance: Tolerance,
    ) -> Vec<f32> {
        let (shape, n) = (kernel.shape, inputs.active.len());
        let out = parity::Output::new(gpu, n * (shape.num_attention_heads * shape.head_dim) as usize);
        let tensors = inputs.upload(gpu, &shape);
        let bindings = AttentionPrefillBindings {
            rows: &tensors.rows,
            q: &tensors.q,
            keys: &tensors.keys,
            values: &tensors.values,
            kv_table: &tensors.table,
            out: &out.tensor,
        };
        let params = AttentionPrefillParams { scale: shape.scale() };
        let grid = kernel.grid(n as u32, gpu.caps());
        parity::run(gpu, |plan| plan.dispatch(&kernel, &bindings, &params, Grid::Fixed(grid)));
        let want = attention_prefill(&shape, inputs, shape.scale());
        let found = out.read(gpu);
        parity::assert_close(what, &found, &want, tolerance);
        found
    }

    #[test]
    fn matches_oracle() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("attention_prefill");
            // (rows, keys of the last row) of each sequence.
            let ragged: &[(usize, usize)] = &[(1, 1), (5, 7), (33, 33), (3, 127), (1, 128), (2, 129), (9, 1000)];
            let single: &[(usize, usize)] = &[(70, 70)];
            for (heads, kv_dtype, kv_table, sequences) in [
                ([2, 2, 8], DType::F32, KvTable::Slots, ragged),
                ([4, 2, 16], DType::F16, KvTable::Slots, ragged),
                ([3, 1, 64], DType::F32, KvTable::Pages, ragged),
                ([3, 3, 64], DType::F16, KvTable::Pages, single),
                ([6, 2, 128], DType::F16, KvTable::Pages, single),
                ([5, 1, 72], DType::F32, KvTable::Pages, single),
                ([4, 1, 136], DType::F16, KvTable::Pages, single),
                ([2, 1, 256], DType::F32, KvTable::Pages, single),
                ([2, 1, 256], DType::F16, KvTable::Pages, single),
                ([4, 2, 16], DType::Block8, KvTable::Slots, ragged),
                ([3, 1, 64], DType::Block8, KvTable::Pages, single),
            ] {
                let [num_attention_heads, num_key_value_heads, head_dim] = heads;
                let shape = AttentionShape { num_attention_heads, num_key_value_heads, head_dim, kv_dtype, kv_table };
                let inputs = AttentionInputs::random(&mut rng, &shape, sequences, 1.0);
                let what = format!("attention_prefill {profile} {shape:?}");
                check(gpu, &what, shape, &inputs, Tolerance::F32);
            }
            let shape = AttentionShape {
                num_attention_heads: 4,
                num_key_value_heads: 2,
                head_dim: 16,
                kv_dtype: DType::F16,
                kv_table: KvTable::Slots,
            };
            for num_rows in [0, 1, 7, 31, 32, 33, 127, 128, 129] {
                for kv_len in [num_rows, 300] {
                    let inputs = AttentionInputs::random(&mut rng, &shape, &[(num_rows, kv_len)], 1.0);
                    let what = format!("attention_prefill {profile} n={num_rows} kv_len={kv_len}");
                    check(gpu, &what, shape, &inputs, Tolerance::F32);
                }
            }
            let inputs = AttentionInputs::random(&mut rng, &shape, &[(20, 33), (40, 200)], 30.0);
            check(gpu, &format!("attention_prefill {profile} large scores"), shape, &inputs, Tolerance::F32);
        });
    }

    /// Rows whose later keys score far above the first ones get right results, and their neighbours the same as without them.
    #[test]
    fn misled_rows_leave_others_alone() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("attention_prefill misled");
            let shape = AttentionShape {
                num_attention_heads: 4,
                num_key_value_heads: 2,
                head_dim: 64,
                kv_dtype: DType::F16,
                kv_table: KvTable::Pages,
            };
            let calm = AttentionInputs::random(&mut rng, &shape, &[(70, 300), (60, 129)], 1.0);
            let calm = AttentionInputs { q: half_queries(&calm.q, shape.scale()), ..calm };
            let row_elems = (shape.num_attention_heads * shape.head_dim) as usize;
            let misled = [3, 69, 100];
            let mut inputs = calm.clone();
            for row in misled {
                // A power of two, so that they remain halves once scaled.
                inputs.q[row * row_elems..][..row_elems].iter_mut().for_each(|q| *q *= 128.0);
            }
            for num_rows in [1, 64 * 400 / shape.num_attention_heads, u32::MAX] {
                let kernel = AttentionPrefill::new(shape, num_rows, true);
                let what = format!("attention_prefill {profile} misled for {num_rows}");
                let alone = check_kernel(gpu, &what, kernel, &calm, Tolerance::F16);
                let beside = check_kernel(gpu, &what, kernel, &inputs, Tolerance::F16);
                for (row, (alone, beside)) in alone.chunks(row_elems).zip(beside.chunks(row_elems)).enumerate() {
                    assert!(misled.contains(&row) || alone == beside, "{what}: row {row} depends on its neighbours");
                }
            }
        });
    }

    /// Sequences whose first key has 250 times the weight of an average one: what is small beside it is not lost.
    #[test]
    fn first_keys_may_be_heavy() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("attention_prefill heavy");
            let shape = AttentionShape {
                num_attention_heads: 2,
                num_key_value_heads: 2,
                head_dim: 64,
                kv_dtype: DType::F16,
                kv_table: KvTable::Slots,
            };
            let head_dim = shape.head_dim as usize;
            let slot_elems = shape.num_key_value_heads as usize * head_dim;
            let mut inputs = AttentionInputs::random(&mut rng, &shape, &[(70, 300), (60, 129)], 1.0);
            // Of every query the first element is 4, of the first keys alone one is not 0: their scores are 5.5.
            inputs.keys.iter_mut().step_by(head_dim).for_each(|k| *k = 0.0);
            inputs.q.iter_mut().step_by(head_dim).for_each(|q| *q = 4.0);
            for entry in &inputs.active {
                let slot = inputs.table[entry.kv_table as usize] as usize;
                let key = &mut inputs.keys[slot * slot_elems..][..slot_elems];
                key.fill(0.0);
                key.iter_mut().step_by(head_dim).for_each(|k| *k = 11.0);
            }
            check(gpu, &format!("attention_prefill {profile} heavy"), shape, &inputs, Tolerance::F32);
        });
    }
}
