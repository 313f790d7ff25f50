//! Attention of few rows, the keys of each row divided over workgroups.

use crate::caps::{DeviceCaps, Lanes};
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::{KvTable, PAGE_SIZE, RowSet};
use crate::shader::Definitions;
use crate::tensor::{DType, Tensor};

/// Largest head the attention kernels have room for.
const MAX_HEAD_DIM: u32 = 256;

/// Heads and cache of an attention layer, as both attention kernels specialise on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    /// Query heads H.
    pub num_attention_heads: u32,
    /// Key-value heads G; query head h uses key-value head `h / (H / G)`.
    pub num_key_value_heads: u32,
    /// Elements of a head, a multiple of 8 up to 256.
    pub head_dim: u32,
    /// Element type of the K and V tensors: [`DType::F32`] or [`DType::F16`].
    pub kv_dtype: DType,
    /// How keys are found.
    pub kv_table: KvTable,
}

impl AttentionShape {
    /// Query heads that share a key-value head.
    pub fn group_size(&self) -> u32 {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// The usual factor on scores, `1 / sqrt(head_dim)`.
    pub fn scale(&self) -> f32 {
        (f64::from(self.head_dim)).sqrt().recip() as f32
    }

    /// Units of 8 elements in a head.
    pub(crate) fn head_units(&self) -> u32 {
        self.head_dim / 8
    }

    pub(crate) fn definitions(&self) -> Definitions {
        Definitions::new()
            .u32("NUM_ATTENTION_HEADS", self.num_attention_heads)
            .u32("NUM_KEY_VALUE_HEADS", self.num_key_value_heads)
            .u32("GROUP_SIZE", self.group_size())
            .u32("HEAD_UNITS", self.head_units())
            .flag("KV_F16", self.kv_dtype == DType::F16)
            .flag("KV_BLOCKS", self.kv_dtype == DType::Block8)
            .flag("KV_SLOTS", self.kv_table == KvTable::Slots)
    }

    /// Refuses heads that the attention kernels have no room for; `kernel` is who asks.
    ///
    /// # Errors
    /// [`KernelError::Limit`].
    pub fn check_head_dim(kernel: &'static str, head_dim: u32) -> Result<()> {
        if head_dim <= MAX_HEAD_DIM {
            return Ok(());
        }
        Err(KernelError::Limit {
            kernel,
            what: "head_dim",
            found: u64::from(head_dim),
            limit: u64::from(MAX_HEAD_DIM),
            why: "the attention kernels hold of a head".to_owned(),
            advice: "this head size is not supported",
        })
    }

    /// Checks the shape itself and the tensors of `num_rows` rows against it.
    pub(crate) fn check(
        &self,
        kernel: &'static str,
        num_rows: usize,
        (q, keys, values): (&Tensor, &Tensor, &Tensor),
    ) -> Result<()> {
        let shape = |what, found: String, expected: String| Err(KernelError::Shape { kernel, what, found, expected });
        Self::check_head_dim(kernel, self.head_dim)?;
        if !self.head_dim.is_multiple_of(8) || self.head_dim == 0 {
            return shape("head_dim", self.head_dim.to_string(), "a positive multiple of 8".to_owned());
        }
        if self.num_key_value_heads == 0
            || self.num_attention_heads == 0
            || !self.num_attention_heads.is_multiple_of(self.num_key_value_heads)
        {
            let expected = format!("a positive multiple of num_key_value_heads = {}", self.num_key_value_heads);
            return shape("num_attention_heads", self.num_attention_heads.to_string(), expected);
        }
        if !matches!(self.kv_dtype, DType::F32 | DType::F16 | DType::Block8) {
            return shape("kv_dtype", format!("{:?}", self.kv_dtype), "F32, F16 or Block8".to_owned());
        }
        let q_row = (self.num_attention_heads * self.head_dim) as usize;
        if q.dtype() != DType::F32 || q.num_elems() < num_rows * q_row {
            return shape("q", describe(q), format!("F32 [{num_rows}, {q_row}]"));
        }
        let slot = (self.num_key_value_heads * self.head_dim) as usize;
        for (what, cache) in [("keys", keys), ("values", values)] {
            if cache.dtype() != self.kv_dtype || !cache.num_elems().is_multiple_of(slot) {
                return shape(what, describe(cache), format!("{:?} [slots, {slot}]", self.kv_dtype));
            }
        }
        if keys.num_elems() != values.num_elems() {
            return shape("values", describe(values), format!("as keys: {}", describe(keys)));
        }
        Ok(())
    }
}

/// Type and shape of a tensor, for messages.
pub(crate) fn describe(tensor: &Tensor) -> String {
    format!("{:?} {:?}", tensor.dtype(), tensor.shape())
}

/// Attention of few rows: every (row, key-value head, split of the keys) is a workgroup.
///
/// With more than one split it leaves partial results, which the next kernel merges: with `m = max_s m_s`,
/// `out = sum_s exp(m_s - m) * partial_out_s / sum_s exp(m_s - m) * sum_s`.
///
/// # Source
/// Dao et al. 2023, Flash-Decoding.
#[derive(Clone, Copy, Debug)]
pub struct AttentionDecode {
    /// Heads and cache.
    pub shape: AttentionShape,
    /// Workgroups that share the keys of a row, 1 to [`AttentionDecode::MAX_SPLITS`].
    pub num_splits: u32,
    /// Threads of a workgroup: a power of two.
    pub workgroup_size: u32,
}

/// Constants of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct AttentionDecodeParams {
    /// Factor on the scores, see [`AttentionShape::scale`].
    pub scale: f32,
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct AttentionDecodeBindings<'a> {
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
    /// Written: `[n, H, num_splits, D]` f32; with one split the result itself, `[n, H * D]`.
    pub partial_out: &'a Tensor,
    /// Written: `[n, H, num_splits, 2]` f32, the maximum and the sum of each split; `None` with one split.
    pub partial_stats: Option<&'a Tensor>,
}

/// How a specialisation lays its threads out.
struct Layout {
    subgroups: bool,
    /// Whether the workgroup is one subgroup that goes through the keys one by one.
    alone: bool,
    /// Threads that share a key.
    lanes: u32,
    /// Threads that leave one partial result.
    width: u32,
    /// Query heads of a workgroup.
    heads: u32,
    /// Keys that a thread fetches at a time.
    keys: u32,
}

impl AttentionDecode {
    /// Most splits.
    pub const MAX_SPLITS: u32 = 64;
    /// Workgroup memory that every device has.
    const WORKGROUP_BYTES: u32 = 16 << 10;

    /// The kernel for `shape` with `num_splits`, in the workgroup size that suits the device.
    pub fn new(shape: AttentionShape, num_splits: u32, caps: &DeviceCaps) -> Self {
        let of_size = |workgroup_size| Self { shape, num_splits, workgroup_size };
        let fits = |size: &u32| of_size(*size).workgroup_storage_bytes(caps) <= Self::WORKGROUP_BYTES;
        of_size(match caps.lanes() {
            // One subgroup where it holds a head: a software rasteriser runs it alone, and one partial needs no merge.
            Lanes::Subgroup { width } if caps.is_cpu && shape.head_units() <= width => width,
            _ if caps.is_cpu => 64,
            _ => Some(256).filter(fits).unwrap_or(128),
        })
    }

    /// A good number of splits for `num_rows` rows of up to `kv_len` keys: enough workgroups to fill a large
    /// device, none without four pages of keys (fewer leave threads idle; the merge costs more with every split), and a power of
    /// two so that few specialisations exist.
    pub fn suggest_splits(shape: &AttentionShape, num_rows: u32, kv_len: u32, caps: &DeviceCaps) -> u32 {
        // Measured on an H200, the merge included.
        const ENOUGH_WORKGROUPS: u32 = 256;
        if caps.is_cpu {
            return 1;
        }
        let wanted = ENOUGH_WORKGROUPS / (num_rows * shape.num_key_value_heads).max(1);
        let splits = wanted.min(kv_len.div_ceil(4 * PAGE_SIZE)).clamp(1, Self::MAX_SPLITS);
        1 << splits.ilog2()
    }

    /// Records the kernel over all active rows.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if a tensor does not fit the shape or the splits, [`KernelError::Limit`] if there
    /// are too many splits, and as [`PlanBuilder::dispatch`].
    pub fn record(
        &self,
        plan: &mut PlanBuilder<'_>,
        b: AttentionDecodeBindings<'_>,
        p: AttentionDecodeParams,
    ) -> Result<()> {
        let shape = &self.shape;
        shape.check(Self::NAME, b.rows.capacity, (b.q, b.keys, b.values))?;
        if !(1..=Self::MAX_SPLITS).contains(&self.num_splits) {
            return Err(KernelError::Limit {
                kernel: Self::NAME,
                what: "num_splits",
                found: u64::from(self.num_splits),
                limit: u64::from(Self::MAX_SPLITS),
                why: "the kernel divides keys into (and at least 1)".to_owned(),
                advice: "use suggest_splits",
            });
        }
        let num_partials = b.rows.capacity * (shape.num_attention_heads * self.num_splits) as usize;
        if b.partial_out.num_elems() < num_partials * shape.head_dim as usize {
            let expected = format!("at least {num_partials} * {} elements", shape.head_dim);
            return Err(KernelError::Shape {
                kernel: Self::NAME,
                what: "partial_out",
                found: describe(b.partial_out),
                expected,
            });
        }
        let stats_fit = match b.partial_stats {
            None => self.num_splits == 1,
            Some(stats) => self.num_splits > 1 && stats.num_elems() >= 2 * num_partials,
        };
        if !stats_fit {
            return Err(KernelError::Shape {
                kernel: Self::NAME,
                what: "partial_stats",
                found: b.partial_stats.map_or_else(|| "no tensor".to_owned(), describe),
                expected: if self.num_splits == 1 {
                    "none with one split".to_owned()
                } else {
                    format!("at least {num_partials} * 2 elements")
                },
            });
        }
        let [x, _, z] = self.grid(0);
        plan.dispatch(self, &b, &p, Grid::Rows { set: b.rows, x, rows_per_workgroup: 1, z })
    }

    /// Workgroups for `num_rows` rows.
    pub fn grid(&self, num_rows: u32) -> [u32; 3] {
        [self.shape.num_key_value_heads * self.head_blocks(), num_rows, self.num_splits]
    }

    /// Workgroups that share a group of query heads: a thread keeps sums of at most 4 heads, and 128 threads
    /// have memory for the sums of 3.
    fn head_blocks(&self) -> u32 {
        self.shape.group_size().div_ceil(if self.workgroup_size <= 64 { 4 } else { 3 })
    }

    fn layout(&self, caps: &DeviceCaps) -> Layout {
        let lanes = self.shape.head_units().next_power_of_two();
        let heads = self.shape.group_size().div_ceil(self.head_blocks());
        let (subgroups, width) = match caps.lanes() {
            Lanes::Subgroup { width } if lanes <= width => (true, width),
            _ => (false, lanes),
        };
        // Many hide latency; on a CPU they only lengthen compilation.
        let most = match self.shape.kv_dtype {
            _ if caps.is_cpu => 2,
            DType::F16 => 4,
            _ => 2,
        };
        // Those of all lanes lie in one page.
        let keys = (PAGE_SIZE * lanes / width).clamp(1, most);
        Layout { subgroups, alone: subgroups && lanes == self.workgroup_size, lanes, width, heads, keys }
    }
}

impl Kernel for AttentionDecode {
    const NAME: &'static str = "attention_decode";
    type Params = AttentionDecodeParams;
    type Bindings<'a> = AttentionDecodeBindings<'a>;

    fn definitions(&self, caps: &DeviceCaps) -> Definitions {
        let layout = self.layout(caps);
        self.shape
            .definitions()
            .u32("WORKGROUP_SIZE", self.workgroup_size)
            .u32("NUM_SPLITS", self.num_splits)
            .u32("HEAD_BLOCKS", self.head_blocks())
            .u32("HEADS", layout.heads)
            .u32("LANES", layout.lanes)
            .u32("WIDTH", layout.width)
            .u32("KEYS", layout.keys)
            .flag("SPLIT", self.num_splits > 1)
            .flag("SUBGROUP", layout.subgroups)
            .flag("ALONE", layout.alone)
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        let mut bindings = vec![
            Binding::read(1, &b.rows.active),
            Binding::read(2, b.q),
            Binding::read(3, b.keys),
            Binding::read(4, b.values),
            Binding::read(5, b.kv_table),
            Binding::write(6, b.partial_out),
        ];
        bindings.extend(b.partial_stats.map(|stats| Binding::write(7, stats)));
        bindings
    }

    fn workgroup_storage_bytes(&self, caps: &DeviceCaps) -> u32 {
        let layout = self.layout(caps);
        if layout.alone {
            return 0;
        }
        self.workgroup_size / layout.width * layout.heads * (4 * self.shape.head_dim + 8)
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::gpu::Gpu;
    use crate::oracle::attention_decode::{AttentionInputs, attention_decode, merge_partials};
    use crate::oracle::attention_prefill::attention_prefill;
    use crate::parity::{self, Rng, Tolerance};

    fn shape(heads: [u32; 3], kv_dtype: DType, kv_table: KvTable) -> AttentionShape {
        let [num_attention_heads, num_key_value_heads, head_dim] = heads;
        AttentionShape { num_attention_heads, num_key_value_heads, head_dim, kv_dtype, kv_table }
    }

    fn check(gpu: &Gpu, what: &str, kernel: &AttentionDecode, inputs: &AttentionInputs, tolerance: Tolerance) {
        let AttentionDecode { shape, num_splits, .. } = *kernel;
        let n = inputs.active.len();
        let num_partials = n * (shape.num_attention_heads * num_splits) as usize;
        let partial_out = parity::Output::new(gpu, num_partials * shape.head_dim as usize);
        let partial_stats = parity::Output::new(gpu, num_partials * 2);
        let tensors = inputs.upload(gpu, &shape);
        let bindings = AttentionDecodeBindings {
            rows: &tensors.rows,
            q: &tensors.q,
            keys: &tensors.keys,
            values: &tensors.values,
            kv_table: &tensors.table,
            partial_out: &partial_out.tensor,
            partial_stats: (num_splits > 1).then_some(&partial_stats.tensor),
        };
        let params = AttentionDecodeParams { scale: shape.scale() };
        parity::run(gpu, |plan| plan.dispatch(kernel, &bindings, &params, Grid::Fixed(kernel.grid(n as u32))));

        let (got_out, got_stats) = (partial_out.read(gpu), partial_stats.read(gpu));
        let want = attention_prefill(&shape, inputs, shape.scale());
        if num_splits == 1 {
            assert!(got_stats.iter().all(|value| parity::is_untouched(*value)), "{what}: no statistics");
            parity::assert_close(what, &got_out, &want, tolerance);
        } else {
            let (want_out, want_stats) = attention_decode(&shape, inputs, shape.scale(), num_splits);
            parity::assert_close(&format!("{what} out"), &got_out, &want_out, Tolerance::F32);
            parity::assert_close(&format!("{what} stats"), &got_stats, &want_stats, Tolerance::F32);
            let merged = merge_partials(&shape, num_splits, &got_out, &got_stats);
            parity::assert_close(&format!("{what} merged"), &merged, &want, tolerance);
        }
    }

    #[test]
    fn matches_oracle() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("attention_decode");
            let kernel = |shape, num_splits| AttentionDecode::new(shape, num_splits, gpu.caps());
            let lens = [1, 7, 33, 127, 128, 129, 1000];
            for (heads, kv_dtype, kv_table) in [
                ([2, 2, 8], DType::F32, KvTable::Slots),
                ([4, 2, 16], DType::F16, KvTable::Slots),
                ([6, 2, 64], DType::F32, KvTable::Pages),
                ([3, 3, 64], DType::F16, KvTable::Pages),
                ([6, 2, 128], DType::F16, KvTable::Pages),
                ([5, 1, 72], DType::F32, KvTable::Pages),
                ([4, 1, 256], DType::F32, KvTable::Pages),
                ([4, 2, 16], DType::Block8, KvTable::Slots),
                ([6, 2, 64], DType::Block8, KvTable::Pages),
            ] {
                let shape = shape(heads, kv_dtype, kv_table);
                let inputs = AttentionInputs::random(&mut rng, &shape, &lens.map(|len| (1, len)), 1.0);
                // Every split of the first shapes; llvmpipe compiles a specialisation in half a second.
                let splits: &[u32] = if heads[2] <= 16 { &[1, 3, 8] } else { &[3] };
                for &num_splits in splits {
                    let what = format!("attention_decode {profile} {shape:?} splits={num_splits}");
                    check(gpu, &what, &kernel(shape, num_splits), &inputs, Tolerance::F32);
                }
            }
            let shape = shape([4, 2, 16], DType::F16, KvTable::Slots);
            for num_rows in [0, 1, 7, 33] {
                let inputs = AttentionInputs::random(&mut rng, &shape, &[(num_rows, 50)], 1.0);
                for num_splits in [1, 3] {
                    let what = format!("attention_decode {profile} n={num_rows} splits={num_splits}");
                    check(gpu, &what, &kernel(shape, num_splits), &inputs, Tolerance::F32);
                }
            }
        });
    }

    #[test]
    fn survives_large_scores_and_other_workgroups() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("attention_decode large scores");
            for (group, workgroup_size, num_splits) in [(1, 128, 1), (2, 64, 8), (3, 64, 1), (7, 128, 8), (16, 64, 1)] {
                let shape = shape([2 * group, 2, 64], DType::F32, KvTable::Pages);
                let inputs = AttentionInputs::random(&mut rng, &shape, &[(2, 33), (1, 400)], 30.0);
                let kernel = AttentionDecode { shape, num_splits, workgroup_size };
                let what =
                    format!("attention_decode {profile} large scores group={group} {workgroup_size} {num_splits}");
                check(gpu, &what, &kernel, &inputs, Tolerance::F32);
            }
        });
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let gpu = parity::gpu();
        let good = shape([4, 2, 16], DType::F32, KvTable::Pages);
        let inputs = AttentionInputs::random(&mut Rng::new("attention_decode errors"), &good, &[(2, 40)], 1.0);
        let tensors = inputs.upload(gpu, &good);
        let out = parity::Output::new(gpu, 2 * 4 * 2 * 16);
        let message = |shape: AttentionShape, num_splits: u32, q: &Tensor| {
            let mut plan = PlanBuilder::new(gpu).expect("an empty plan fits");
            let bindings = AttentionDecodeBindings {
                rows: &tensors.rows,
                q,
                keys: &tensors.keys,
                values: &tensors.values,
                kv_table: &tensors.table,
                partial_out: &out.tensor,
                partial_stats: None,
            };
            let params = AttentionDecodeParams { scale: shape.scale() };
            match AttentionDecode::new(shape, num_splits, gpu.caps()).record(&mut plan, bindings, params) {
                Ok(()) => "recorded".to_owned(),
                Err(error) => error.to_string(),
            }
        };
        assert_eq!(message(good, 1, &tensors.q), "recorded");
        for (shape, num_splits, q, expected) in [
            (AttentionShape { head_dim: 12, ..good }, 1, &tensors.q, "head_dim has 12"),
            (AttentionShape { num_attention_heads: 3, ..good }, 1, &tensors.q, "num_attention_heads has 3"),
            (AttentionShape { kv_dtype: DType::BF16, ..good }, 1, &tensors.q, "kv_dtype has BF16"),
            (AttentionShape { kv_dtype: DType::F16, ..good }, 1, &tensors.q, "keys has F32"),
            (good, 1, &tensors.table, "q has U32"),
            (good, 2, &tensors.q, "partial_stats has no tensor"),
            (good, 65, &tensors.q, "num_splits = 65"),
        ] {
            let message = message(shape, num_splits, q);
            assert!(message.contains(expected), "{message} should say {expected}");
        }
    }

    #[test]
    fn suggests_splits() {
        let caps = DeviceCaps { is_cpu: false, ..parity::gpu().caps().clone() };
        let shape = shape([15, 5, 64], DType::F16, KvTable::Pages);
        let splits = |rows, kv_len| AttentionDecode::suggest_splits(&shape, rows, kv_len, &caps);
        assert_eq!([splits(1, 1), splits(1, 256), splits(1, 2048), splits(1, 32768)], [1, 2, 16, 32]);
        assert_eq!([splits(8, 2048), splits(64, 2048), splits(0, 0)], [4, 1, 1]);
    }
}
