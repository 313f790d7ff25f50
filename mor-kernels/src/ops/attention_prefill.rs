//! Attention of many rows, tile by tile of rows and keys.

use crate::caps::{DeviceCaps, Lanes};
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::ops::attention_decode::{AttentionShape, describe};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::RowSet;
use crate::shader::Definitions;
use crate::tensor::Tensor;

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
    /// The query rows, n of them.
    pub rows: &'a RowSet,
    /// `[n, H, D]` f32, rotated.
    pub q: &'a Tensor,
    /// `[slots, G, D]`.
    pub keys: &'a Tensor,
    /// `[slots, G, D]`.
    pub values: &'a Tensor,
    /// Pages or slots, u32.
    pub kv_table: &'a Tensor,
    /// `[n, H, D]` f32, written.
    pub out: &'a Tensor,
}

/// Sizes of the tiles of a specialisation.
struct Tiles {
    /// Rows of a workgroup.
    block_q: u32,
    /// Threads that share rows; the keys of a tile are four times as many.
    columns: u32,
    /// Units of 8 elements staged at a time.
    chunk_units: u32,
}

impl AttentionPrefill {
    /// The kernel for `shape`.
    pub fn new(shape: AttentionShape) -> Self {
        Self { shape }
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
        let block_q = self.tiles(plan.gpu().caps()).block_q;
        plan.dispatch(self, &b, &p, Grid::rows(b.rows, self.shape.num_attention_heads, block_q))
    }

    /// Workgroups for `num_rows` rows on a device with `caps`.
    pub fn grid(&self, num_rows: u32, caps: &DeviceCaps) -> [u32; 3] {
        [self.shape.num_attention_heads, num_rows.div_ceil(self.tiles(caps).block_q), 1]
    }

    /// The largest tiles that fit, and their bytes of workgroup memory.
    fn tiles(&self, caps: &DeviceCaps) -> Tiles {
        let units = self.shape.head_units();
        // A thread's sums are 32 * units / columns floats, so wide heads need more columns.
        let (columns, most_units) = if units <= 16 { (8, 8) } else { (16, 4) };
        let chunks = |most: u32| units.div_ceil(units.div_ceil(most));
        let large = Tiles { block_q: 32, columns, chunk_units: chunks(most_units) };
        if self.storage_bytes(&large, caps) <= caps.max_workgroup_storage_bytes {
            return large;
        }
        // What WebGPU guarantees, 16 KiB.
        Tiles { block_q: 16, columns, chunk_units: chunks(if columns == 8 { 8 } else { 3 }) }
    }

    fn storage_bytes(&self, tiles: &Tiles, caps: &DeviceCaps) -> u32 {
        let Tiles { block_q, columns, chunk_units } = *tiles;
        let block_k = 4 * columns;
        let q = block_q * 2 * chunk_units;
        let k = block_k * (2 * chunk_units + 1);
        let p = block_q * columns;
        let exchange = if self.uses_subgroups(tiles, caps) { 0 } else { block_q / 4 * columns };
        16 * (q + k + p + exchange) + 4 * 2 * block_k
    }

    fn uses_subgroups(&self, tiles: &Tiles, caps: &DeviceCaps) -> bool {
        matches!(caps.lanes(), Lanes::Subgroup { width } if tiles.columns <= width)
    }
}

impl Kernel for AttentionPrefill {
    const NAME: &'static str = "attention_prefill";
    type Params = AttentionPrefillParams;
    type Bindings<'a> = AttentionPrefillBindings<'a>;

    fn definitions(&self, caps: &DeviceCaps) -> Definitions {
        let tiles = self.tiles(caps);
        let num_chunks = self.shape.head_units().div_ceil(tiles.chunk_units);
        self.shape
            .definitions()
            .u32("WORKGROUP_SIZE", tiles.block_q / 4 * tiles.columns)
            .u32("BLOCK_Q", tiles.block_q)
            .u32("COLUMNS", tiles.columns)
            .u32("CHUNK_UNITS", tiles.chunk_units)
            .u32("NUM_CHUNKS", num_chunks)
            .flag("ONE_CHUNK", num_chunks == 1)
            .flag("SUBGROUP", self.uses_subgroups(&tiles, caps))
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
        self.storage_bytes(&self.tiles(caps), caps)
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::gpu::Gpu;
    use crate::oracle::attention_decode::AttentionInputs;
    use crate::oracle::attention_prefill::attention_prefill;
    use crate::parity::{self, Rng, Tolerance};
    use crate::rows::KvTable;
    use crate::tensor::DType;

    fn check(gpu: &Gpu, what: &str, shape: AttentionShape, inputs: &AttentionInputs, tolerance: Tolerance) {
        let n = inputs.active.len();
        let out = parity::Output::new(gpu, n * (shape.num_attention_heads * shape.head_dim) as usize);
        let tensors = inputs.upload(gpu, &shape);
        let kernel = AttentionPrefill::new(shape);
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
        parity::assert_close(what, &out.read(gpu), &want, tolerance);
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
                kv_dtype: DType::F32,
                kv_table: KvTable::Pages,
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
}
