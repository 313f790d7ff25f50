//! [`StepTensors`], [`KvTensors`] and [`SampleTensors`]: what a step reads and writes besides weights, and how much of it a
//! model needs.

use mor_kernels::Result;
use mor_kernels::ops::{AttentionDecode, AttentionPrefill, LinearTile, SamplePartial, SlotRecursion};
use mor_kernels::rows::{NONE, PAGE_SIZE, ROW_PADDING, Row, RowSet};
use mor_kernels::tensor::{DType, Tensor};
use mor_kernels::writes::Writes;

use crate::Mode;
use crate::device_weights::{LayerWeights, Precision, Projection};
use crate::layers::LayersTensors;
use crate::model::{Batching, MorModel};
use crate::recorder::MAX_FEW_ROWS;

/// The K/V side of a step: caches, tables and lengths of all sequences.
#[derive(Clone, Debug)]
pub struct KvTensors {
    /// Per K/V buffer of the [`KvLayout`](crate::KvLayout): keys and values `[num_slots, kv_dim]`.
    pub buffers: Vec<(Tensor, Tensor)>,
    /// All of them in one, where one binding holds it: keys, values, and the slot at which each buffer starts.
    pub whole: Option<(Tensor, Tensor, Vec<u32>)>,
    /// `[sequences, num_groups]` u32: entries stored.
    pub lengths: Tensor,
    /// `[sequences, num_groups, max_pages]` u32.
    pub pages: Tensor,
    /// `[sequences, num_groups, max_positions]` u32, hybrid only.
    pub slots: Option<Tensor>,
    /// `[max_positions, head_dim / 2]` of (cos, sin).
    pub rope: Tensor,
    /// Longest sequence.
    pub max_positions: usize,
}

/// Sampling state of all sequences.
#[derive(Clone, Debug)]
pub struct SampleTensors {
    /// `[sequences]` of [`GpuSampling`](mor_kernels::ops::GpuSampling).
    pub sampling: Tensor,
    /// `[sequences, ceil(V / 32)]` u32: tokens that occurred.
    pub seen: Tensor,
    /// `[sequences]` of [`Row`](mor_kernels::rows::Row): what the next decode step feeds.
    pub next_rows: Tensor,
    /// `[sequences, SampleToken::RESULTS]` of (next token, depth), a ring by position.
    pub results: Tensor,
}

/// The tensors one step works in, for up to `T` rows.
#[derive(Clone, Debug)]
pub struct StepTensors {
    /// Most rows T.
    pub capacity: usize,
    /// `[T]` of [`Row`](mor_kernels::rows::Row).
    pub rows: Tensor,
    /// `[T]` u32: recursions taken.
    pub depth: Tensor,
    /// All rows of the step.
    pub all: RowSet,
    /// Per recursion, the rows that run its block; in depth-wise batching one set, of rows at any recursion.
    pub recursions: Vec<RowSet>,
    /// The rows to sample.
    pub sampled: RowSet,
    /// Expert: per set of `recursions` `[T]`; token: one `[T, R]`.
    pub router_logits: Vec<Tensor>,
    /// As `router_logits`: the gates.
    pub router_weights: Vec<Tensor>,
    /// As the expert's `router_logits`, with an auxiliary router.
    pub aux_logits: Vec<Tensor>,
    /// Token choice: the chosen gate `[T]`.
    pub(crate) token_weight: Option<Tensor>,
    /// Top-k routing: `[1, 4]`, see [`TopkSequence`](mor_kernels::ops::TopkSequence), and the decisions `[T]`; one
    /// such range per recursion, because k differs.
    pub topk_sequences: Vec<Tensor>,
    pub(crate) topk_decision: Tensor,
    /// The residual stream between the parts of the model `[T, C]`.
    pub hidden: Tensor,
    /// Token choice: input of the next recursion `[T, C]`.
    pub running: Tensor,
    pub(crate) middle: Tensor,
    pub(crate) layer_out: Tensor,
    /// Normalised rows `[n, C]`; after a step over all rows, the final hidden states.
    pub normed: Tensor,
    /// `[n, q columns]` and behind them, where layers have adapters of them, what is added to the columns of q, k and v.
    pub(crate) q: Tensor,
    /// Keys and values `[n, kv_dim]` f16, each, on their way into caches of 8 bits.
    pub(crate) kv_staged: Option<(Tensor, Tensor)>,
    pub(crate) attention: Tensor,
    pub(crate) attention_stats: Tensor,
    /// `[n, inner columns]` and behind them, where layers have adapters of them, what is added to those of gate and up.
    pub(crate) mlp: Tensor,
    /// Results of the adapters' first factors `[n, ranks]`.
    pub(crate) adapted: Option<Tensor>,
    pub(crate) router_hidden: Option<Tensor>,
    /// `[n, V]`, V padded to an even number.
    pub logits: Tensor,
    /// `[n, parts of V, 4]` u32, see [`SamplePartial`].
    pub(crate) partials: Tensor,
    pub(crate) halves: Option<HalfTensors>,
    pub(crate) depthwise: Option<DepthwiseTensors>,
    /// Of decode steps of one row: one dispatch up to the logits.
    pub layers: Option<LayersTensors>,
}

/// What the projections of prefill read, where they would round it to f16 in any case: half the bytes, the same products.
#[derive(Clone, Debug)]
pub(crate) struct HalfTensors {
    /// As [`StepTensors::normed`], of layers; or rows that are multiplied with a norm's weight, and only that.
    pub(crate) normed: Tensor,
    /// What is left to do of the latter: parts of their squares.
    pub(crate) squares: Tensor,
    /// `[n, q columns]`, if attention can write it so.
    pub(crate) attention: Option<Tensor>,
    /// `[n, inner columns]`.
    pub(crate) mlp: Tensor,
    /// What [`PartSums`](mor_kernels::ops::PartSums) asks for, of any product that the device computes in parts.
    pub(crate) parts: Option<(Tensor, Tensor)>,
}

/// What depth-wise batching keeps from tick to tick besides the streams.
#[derive(Clone, Debug)]
pub(crate) struct DepthwiseTensors {
    /// `[T]` of (passes, recursions that counted).
    pub(crate) state: Tensor,
    /// Uniform `[R]` of [`SlotRecursion`].
    pub(crate) recursions: Tensor,
    /// Rows of the block at one recursion, where they need kernels of their own.
    pub(crate) at: RowSet,
}

/// The most parts in which a product leaves sums of squares of rows of `columns`, see
/// [`LinearTile::num_norm_parts`](mor_kernels::ops::LinearTile::num_norm_parts).
fn norm_parts(columns: usize) -> usize {
    columns / 16 + 8
}

impl KvTensors {
    /// Pages that the table of a sequence and group has room for.
    pub(crate) fn max_pages(&self) -> u32 {
        self.max_positions.div_ceil(PAGE_SIZE as usize) as u32
    }
}

impl StepTensors {
    /// The same tensors, used for at most `num_rows` rows.
    ///
    /// # Panics
    /// If there is no room for so many.
    #[must_use]
    pub fn limited_to(&self, num_rows: usize) -> Self {
        let mut step = self.clone();
        step.capacity = num_rows;
        let at = step.depthwise.as_mut().map(|depthwise| &mut depthwise.at);
        for set in [&mut step.all, &mut step.sampled].into_iter().chain(&mut step.recursions).chain(at) {
            *set = set.limited_to(num_rows);
        }
        step
    }

    /// Parts into which the keys of `num_rows` rows can be split: a power of two.
    pub fn max_key_splits(&self, num_rows: usize) -> u32 {
        let splits = (self.attention.shape()[0] / num_rows).clamp(1, AttentionDecode::MAX_SPLITS as usize);
        1 << splits.ilog2()
    }

    /// Forgets the tokens under way in sequence `sequence`'s slot.
    pub fn clear(&self, writes: &mut Writes, sequence: usize) {
        if self.depthwise.is_some() {
            let bytes = size_of::<Row>();
            writes.push(&self.rows, (sequence * bytes) as u64, bytemuck::bytes_of(&Row::ABSENT));
        }
    }
}

impl MorModel {
    /// Allocates the tensors of steps of up to `capacity` rows, `logit_rows` of them with logits; `decode` says how
    /// decode steps run, `None` is for prefill.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`](mor_kernels::KernelError::OutOfMemory).
    pub fn step_tensors(&self, capacity: usize, logit_rows: usize, decode: Option<Batching>) -> Result<StepTensors> {
        let (gpu, config) = (self.gpu(), self.config());
        let t = capacity;
        let f32s = |label: &str, shape: &[usize]| Tensor::zeros(gpu, label, DType::F32, shape);
        let (c, q_dim) = (config.hidden_size, self.q_dim());
        let num_recursions = config.num_recursions;
        let depthwise = decode == Some(Batching::Depthwise);
        let sets = match config.mode {
            Mode::Vanilla => 0,
            _ if depthwise => 1,
            _ => num_recursions,
        };
        let per_recursion = |label: &str, on: bool| -> Result<Vec<Tensor>> {
            (0..if on { sets } else { 0 }).map(|r| f32s(&format!("{label}.{r}"), &[t])).collect()
        };
        let (expert, token) = (config.mode == Mode::Expert, config.mode == Mode::Token);
        let router = |label: &str| -> Result<Vec<Tensor>> {
            if token { Ok(vec![f32s(label, &[t, num_recursions])?]) } else { per_recursion(label, expert) }
        };
        // Rows whose attention is one result each, or parts that the next kernel merges.
        let num_partials = match decode {
            Some(_) => {
                let bound = gpu.caps().max_storage_binding_bytes as usize / (4 * q_dim);
                t.max(bound.min(t.min(MAX_FEW_ROWS) * AttentionDecode::MAX_SPLITS as usize))
            }
            None => t,
        };
        let (q_columns, mlp_columns) = self.wide_columns();
        let adapters = self.weights().layers.iter().flat_map(LayerWeights::projections);
        let most_ranks = adapters.filter_map(|projection| Some(projection.adapter.as_ref()?.a.num_rows)).max();
        let router_width = self.weights().routers.as_ref().and_then(|r| r.router.hidden.first()).map(|m| m.num_rows);
        Ok(StepTensors {
            capacity,
            rows: Tensor::zeros(gpu, "rows", DType::U32, &[t, 4])?,
            depth: Tensor::zeros(gpu, "depth", DType::U32, &[t])?,
            all: RowSet::new(gpu, "all", t)?,
            recursions: (0..sets).map(|r| RowSet::new(gpu, &format!("recursion.{r}"), t)).collect::<Result<_>>()?,
            sampled: RowSet::new(gpu, "sampled", t)?,
            router_logits: router("router_logits")?,
            router_weights: router("router_weights")?,
            aux_logits: per_recursion("aux_logits", config.has_aux_router())?,
            token_weight: token.then(|| f32s("token_weight", &[t])).transpose()?,
            topk_sequences: (0..if expert { num_recursions } else { 0 })
                .map(|r| Tensor::zeros(gpu, &format!("topk_sequences.{r}"), DType::U32, &[1, 4]))
                .collect::<Result<_>>()?,
            topk_decision: f32s("topk_decision", &[t])?,
            hidden: f32s("hidden", &[t, c])?,
            running: f32s("running", &[if token { t } else { 1 }, c])?,
            middle: f32s("middle", &[t, c])?,
            layer_out: f32s("layer_out", &[t, c])?,
            normed: f32s("normed", &[t, c])?,
            q: f32s("q", &[t, q_columns])?,
            kv_staged: (self.kv_dtype() == DType::Block8).then(|| self.kv_staging_tensors(t)).transpose()?,
            attention: f32s("attention", &[num_partials, q_dim])?,
            attention_stats: f32s("attention_stats", &[num_partials, config.num_attention_heads, 2])?,
            mlp: f32s("mlp", &[t, mlp_columns])?,
            adapted: most_ranks.map(|ranks| f32s("adapted", &[t, ranks])).transpose()?,
            router_hidden: router_width.map(|width| f32s("router_hidden", &[t, width])).transpose()?,
            logits: f32s("logits", &[logit_rows, self.logits_stride()])?,
            partials: Tensor::zeros(gpu, "partials", DType::U32, &[logit_rows, self.vocab_parts(), 4])?,
            halves: self.half_tensors(t, decode)?,
            depthwise: depthwise.then(|| self.depthwise_tensors(t)).transpose()?,
            layers: None,
        })
    }

    /// Of a step of `capacity` rows, if its projections multiply halves. Adapters add to what they read, in f32.
    fn half_tensors(&self, capacity: usize, decode: Option<Batching>) -> Result<Option<HalfTensors>> {
        let (gpu, caps) = (self.gpu(), self.gpu().caps());
        let adapts = self.weights().layers.iter().any(|layer| layer.projections().iter().any(|p| p.adapter.is_some()));
        if decode.is_some() || self.precision() != Precision::F16 || caps.cooperative_matrices.is_none() || adapts {
            return Ok(None);
        }
        let halves = |label, columns: usize| Tensor::zeros(gpu, label, DType::F16, &[capacity, columns]);
        let attention = AttentionPrefill::new(self.attention_shape(), 1, true).can_write_halves(caps);
        let columns = self.config().hidden_size;
        let squares = [norm_parts(columns), capacity + ROW_PADDING as usize];
        Ok(Some(HalfTensors {
            normed: halves("normed.half", columns)?,
            squares: Tensor::zeros(gpu, "squares", DType::F32, &squares)?,
            attention: attention.then(|| halves("attention.half", self.q_dim())).transpose()?,
            mlp: halves("mlp.half", self.mlp_dim())?,
            parts: LinearTile::has_parts(caps).then(|| self.part_tensors()).transpose()?,
        }))
    }

    fn kv_staging_tensors(&self, capacity: usize) -> Result<(Tensor, Tensor)> {
        let staged = |label| Tensor::zeros(self.gpu(), label, DType::F16, &[capacity, self.kv_dim()]);
        Ok((staged("k.staged")?, staged("v.staged")?))
    }

    fn part_tensors(&self) -> Result<(Tensor, Tensor)> {
        let sums = Tensor::zeros(self.gpu(), "part_sums", DType::F32, &[LinearTile::MOST_PART_SUMS])?;
        Ok((sums, Tensor::zeros(self.gpu(), "arrivals", DType::U32, &[LinearTile::MOST_PARTED_TILES])?))
    }

    fn depthwise_tensors(&self, capacity: usize) -> Result<DepthwiseTensors> {
        let (gpu, config) = (self.gpu(), self.config());
        let recursions: Vec<_> = (0..config.num_recursions)
            .map(|r| {
                let place = self.kv_layout().layer(self.layout().block_layers(r as u32)[0]);
                SlotRecursion {
                    write_group: place.write_group.map_or(NONE, |group| group as u32),
                    read_group: place.read_group as u32,
                    always: self.takes_all(r).into(),
                    reserved: 0,
                }
            })
            .collect();
        let table = Tensor::zeros_uniform(gpu, "recursions", size_of_val(&recursions[..]) as u64)?;
        gpu.write(&table, 0, bytemuck::cast_slice(&recursions));
        Ok(DepthwiseTensors {
            state: Tensor::zeros(gpu, "state", DType::U32, &[capacity, 2])?,
            recursions: table,
            at: RowSet::new(gpu, "at", capacity)?,
        })
    }

    /// Bytes that [`MorModel::step_tensors`] allocates for each row, about, and for each with logits besides.
    pub fn step_bytes_of_row(&self) -> [u64; 2] {
        let config = self.config();
        let (q_columns, mlp_columns) = self.wide_columns();
        let mut per_row = 6 * config.hidden_size + self.q_dim() + q_columns + mlp_columns + 64;
        if self.precision() == Precision::F16 {
            per_row +=
                (config.hidden_size + self.q_dim() + config.intermediate_size) / 2 + norm_parts(config.hidden_size);
        }
        if self.kv_dtype() == DType::Block8 {
            per_row += self.kv_dim();
        }
        [per_row, self.logits_stride() + 4 * self.vocab_parts()].map(|elements| 4 * elements as u64)
    }

    /// Bytes that [`MorModel::step_tensors`] allocates however many rows there are.
    pub fn step_bytes_of_all(&self) -> u64 {
        let adds_parts = self.precision() == Precision::F16 && LinearTile::has_parts(self.gpu().caps());
        if adds_parts { 4 * LinearTile::MOST_PART_SUMS as u64 } else { 0 }
    }

    /// Rows of a step none of whose tensors is larger than a binding.
    pub fn most_step_rows(&self) -> usize {
        let (q_columns, mlp_columns) = self.wide_columns();
        let widest = self.config().hidden_size.max(q_columns).max(mlp_columns);
        (self.gpu().caps().max_storage_binding_bytes / (4 * widest as u64)) as usize
    }

    /// Columns of a row of `q` and of `mlp`, behind which adapters leave what they add.
    fn wide_columns(&self) -> (usize, usize) {
        let (mut q_columns, mut mlp_columns) = (self.q_dim(), self.mlp_dim());
        if self.adapts(|layer| &layer.qkv_proj) {
            q_columns += self.q_dim() + 2 * self.kv_dim();
        }
        if self.adapts(|layer| &layer.gate_up_proj) {
            mlp_columns += 2 * self.mlp_dim();
        }
        (q_columns, mlp_columns)
    }

    /// Parts of the vocabulary that [`SamplePartial`] draws from.
    fn vocab_parts(&self) -> usize {
        SamplePartial::num_parts(self.config().vocab_size as u32) as usize
    }

    /// Whether the fused projection that `projection` picks has adapters in any layer.
    fn adapts(&self, projection: fn(&LayerWeights) -> &Projection) -> bool {
        self.weights().layers.iter().any(|layer| projection(layer).adapter.is_some())
    }
}
