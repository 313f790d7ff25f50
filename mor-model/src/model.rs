//! [`MorModel`]: a model on the device, which records its steps as plans. It never submits, waits or loops over steps.
//!
//! Residual streams are `[T, C]` tensors that rows never leave: active rows are read and written through lists
//! ([`RowSet`]), so nothing is gathered into or scattered out of a batch, and a block costs what its active rows cost.

use mor_kernels::epilogue::{Epilogue, LinearParams};
use mor_kernels::ops::{
    AttentionDecode, AttentionDecodeBindings, AttentionDecodeParams, AttentionPrefill, AttentionPrefillBindings,
    AttentionPrefillParams, AttentionShape, EmbedTokens, EmbedTokensBindings, EmbedTokensParams, ExpertGate, Hybrid,
    KvGroups, Linear, LinearBindings, LinearDecode, LinearDecodeBindings, Prologue, RmsNorm, RmsNormBindings,
    RmsNormParams, RouterExpert, RouterExpertBindings, RouterExpertParams, RouterToken, RouterTokenBindings,
    RouterTokenParams, RouterTopk, RouterTopkBindings, RouterTopkParams, SampleToken, SampleTokenBindings,
    SampleTokenParams, Selection, TokenGate, TokensCompact, TokensCompactBindings,
};
use mor_kernels::plan::PlanBuilder;
use mor_kernels::rows::{KvTable, PAGE_SIZE, RowSet};
use mor_kernels::tensor::{DType, Tensor};
use mor_kernels::{Gpu, Result};

use crate::device_weights::{DeviceWeights, LayerWeights, Matrix, Precision, RouterWeights, device_head_dim};
use crate::{
    Checkpoint, Gating, KvLayout, KvStrategy, LayerLayout, Mode, MorConfig, RouterFunc, SharingStrategy,
    UNSHARED_GROUP, recursion_group,
};

/// How a full sequence is routed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Routing {
    /// Each token from its own state: what generation does.
    #[default]
    Causal,
    /// Expert choice selects the k best of the whole sequence, as in training; not causal.
    TopK,
}

/// What a step is for: it decides the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Few rows; keys are split over `num_splits` workgroups.
    Decode {
        /// Parts of the keys, from 1 on.
        num_splits: u32,
    },
    /// Many rows.
    Prefill,
}

/// The rows whose logits a step computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// Those flagged for sampling, and a token is drawn for each.
    Sampled,
    /// All.
    All,
}

/// The K/V side of a step: caches, tables and lengths of all sequences.
#[derive(Clone, Debug)]
pub struct KvTensors {
    /// Per K/V buffer of the [`KvLayout`]: keys and values `[num_slots, kv_dim]`.
    pub buffers: Vec<(Tensor, Tensor)>,
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
    /// `[sequences, max_positions]` of (next token, depth).
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
    /// Per recursion, the rows that run its block.
    pub recursions: Vec<RowSet>,
    /// The rows to sample.
    pub sampled: RowSet,
    /// Expert: per recursion `[T]`; token: one `[T, R]`.
    pub router_logits: Vec<Tensor>,
    /// As `router_logits`: the gates.
    pub router_weights: Vec<Tensor>,
    /// Per recursion `[T]`, with an auxiliary router.
    pub aux_logits: Vec<Tensor>,
    /// Token choice: the chosen gate `[T]`.
    token_weight: Option<Tensor>,
    /// Top-k routing: `[1, 4]`, see [`TopkSequence`](mor_kernels::ops::TopkSequence), and the decisions `[T]`; one
    /// such range per recursion, because k differs.
    pub topk_sequences: Vec<Tensor>,
    topk_decision: Tensor,
    /// The residual stream between the parts of the model `[T, C]`.
    pub hidden: Tensor,
    /// Token choice: input of the next recursion `[T, C]`.
    pub running: Tensor,
    middle: Tensor,
    layer_out: Tensor,
    /// Normalised rows `[n, C]`; after a step over all rows, the final hidden states.
    pub normed: Tensor,
    q: Tensor,
    attention: Tensor,
    attention_stats: Option<Tensor>,
    mlp: Tensor,
    router_hidden: Option<Tensor>,
    /// `[n, V]`, V padded to an even number.
    pub logits: Tensor,
}

/// A model on the device.
#[derive(Clone, Debug)]
pub struct MorModel {
    gpu: Gpu,
    config: MorConfig,
    layout: LayerLayout,
    kv_layout: KvLayout,
    precision: Precision,
    weights: DeviceWeights,
}

/// Where a layer's output goes.
enum LayerEnd<'a> {
    Stream(&'a Tensor),
    Block { recursion: u32 },
}

impl MorModel {
    /// Uploads a checkpoint.
    ///
    /// # Errors
    /// [`KernelError::Limit`](mor_kernels::KernelError::Limit), before anything is uploaded, for a shape that the
    /// kernels cannot run; [`KernelError::OutOfMemory`](mor_kernels::KernelError::OutOfMemory) if the device refuses a
    /// buffer.
    pub fn load(
        gpu: &Gpu,
        checkpoint: &Checkpoint,
        precision: Precision,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self> {
        let config = checkpoint.config().clone();
        let layout = checkpoint.layout().clone();
        let kv_layout = KvLayout::new(&config, &layout);
        AttentionShape::check_head_dim("attention", config.head_dim as u32)?;
        if config.mode == Mode::Token {
            RouterToken::check_recursions(config.num_recursions as u32)?;
        }
        let weights = DeviceWeights::upload(gpu, checkpoint, precision, progress)?;
        Ok(Self { gpu: gpu.clone(), config, layout, kv_layout, precision, weights })
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The model's configuration.
    pub fn config(&self) -> &MorConfig {
        &self.config
    }

    /// Which layers are tied.
    pub fn layout(&self) -> &LayerLayout {
        &self.layout
    }

    /// Which layers store K/V where.
    pub fn kv_layout(&self) -> &KvLayout {
        &self.kv_layout
    }

    /// How numbers are stored.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The uploaded weights.
    pub fn weights(&self) -> &DeviceWeights {
        &self.weights
    }

    /// Columns of a row of logits: the vocabulary, padded to an even number.
    pub fn logits_stride(&self) -> usize {
        self.config.vocab_size.next_multiple_of(2)
    }

    /// Elements of a head on the device: the configuration's, padded to a multiple of 8 with zeros.
    pub fn head_dim(&self) -> usize {
        device_head_dim(self.config.head_dim)
    }

    /// Columns of a row of queries on the device.
    pub fn q_dim(&self) -> usize {
        self.config.num_attention_heads * self.head_dim()
    }

    /// Columns of a row of keys, and of values, on the device.
    pub fn kv_dim(&self) -> usize {
        self.config.num_key_value_heads * self.head_dim()
    }

    /// Heads and caches as the attention kernels see them.
    pub fn attention_shape(&self) -> AttentionShape {
        AttentionShape {
            num_attention_heads: self.config.num_attention_heads as u32,
            num_key_value_heads: self.config.num_key_value_heads as u32,
            head_dim: self.head_dim() as u32,
            kv_dtype: self.precision.kv_dtype(),
            kv_table: KvTable::Pages,
        }
    }

    /// Allocates the tensors of steps of up to `capacity` rows, `logit_rows` of them with logits.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`](mor_kernels::KernelError::OutOfMemory).
    pub fn step_tensors(&self, capacity: usize, logit_rows: usize, phase: Phase) -> Result<StepTensors> {
        let (gpu, config) = (&self.gpu, &self.config);
        let t = capacity;
        let f32s = |label: &str, shape: &[usize]| Tensor::zeros(gpu, label, DType::F32, shape);
        let (c, q_dim) = (config.hidden_size, self.q_dim());
        let num_recursions = config.num_recursions;
        let sets = match config.mode {
            Mode::Vanilla => 0,
            _ => num_recursions,
        };
        let per_recursion = |label: &str, on: bool| -> Result<Vec<Tensor>> {
            (0..if on { num_recursions } else { 0 }).map(|r| f32s(&format!("{label}.{r}"), &[t])).collect()
        };
        let (expert, token) = (config.mode == Mode::Expert, config.mode == Mode::Token);
        let router = |label: &str| -> Result<Vec<Tensor>> {
            if token { Ok(vec![f32s(label, &[t, num_recursions])?]) } else { per_recursion(label, expert) }
        };
        let num_splits = match phase {
            Phase::Decode { num_splits } => num_splits as usize,
            Phase::Prefill => 1,
        };
        let router_width =
            self.weights.routers.iter().filter_map(|r| r.router.hidden.as_ref()).map(|m| m.num_rows).max();
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
            q: f32s("q", &[t, q_dim])?,
            attention: f32s("attention", &[t, num_splits * q_dim])?,
            attention_stats: (num_splits > 1)
                .then(|| f32s("attention_stats", &[t, config.num_attention_heads, num_splits, 2]))
                .transpose()?,
            mlp: f32s("mlp", &[t, config.intermediate_size.next_multiple_of(8)])?,
            router_hidden: router_width.map(|width| f32s("router_hidden", &[t, width])).transpose()?,
            logits: f32s("logits", &[logit_rows, self.logits_stride()])?,
        })
    }

    /// Bytes that [`MorModel::step_tensors`] allocates, about.
    pub fn step_bytes(&self, capacity: usize, logit_rows: usize) -> u64 {
        let config = &self.config;
        let per_row = 6 * config.hidden_size + 2 * self.q_dim() + config.intermediate_size + 64;
        4 * (capacity * per_row + logit_rows * self.logits_stride()) as u64
    }

    /// Records a step over the rows in `step.rows`: embedding, layers, routing, head, and for
    /// [`LogitRows::Sampled`] the draw of the next token. `after_recursion` is called where a recursion's results
    /// are complete, to record copies of them.
    ///
    /// # Errors
    /// As [`PlanBuilder::dispatch`].
    pub fn record_step(
        &self,
        plan: &mut PlanBuilder<'_>,
        step: &StepTensors,
        kv: &KvTensors,
        sample: &SampleTensors,
        how: (Phase, Routing, LogitRows),
        after_recursion: &mut dyn FnMut(&mut PlanBuilder<'_>, usize),
    ) -> Result<()> {
        let (phase, routing, logit_rows) = how;
        let recorder = Recorder { model: self, step, kv, sample, phase, routing };
        let last = recorder.record_layers(plan, after_recursion)?;
        recorder.record_head(plan, last, logit_rows)
    }
}

struct Recorder<'a> {
    model: &'a MorModel,
    step: &'a StepTensors,
    kv: &'a KvTensors,
    sample: &'a SampleTensors,
    phase: Phase,
    routing: Routing,
}

impl<'a> Recorder<'a> {
    fn config(&self) -> &'a MorConfig {
        &self.model.config
    }

    /// Embedding to the last layer; returns the stream that holds the result.
    fn record_layers(
        &self,
        plan: &mut PlanBuilder<'_>,
        after_recursion: &mut dyn FnMut(&mut PlanBuilder<'_>, usize),
    ) -> Result<&'a Tensor> {
        let (config, step) = (self.config(), self.step);
        let last = config.num_hidden_layers - 1;
        let middle = config.sharing.is_middle();
        match config.mode {
            Mode::Vanilla => {
                // A vanilla token takes its layers once: depth 1.
                self.record_set(plan, Selection::Fixed, 0, &step.all, Some(UNSHARED_GROUP))?;
                self.record_embedding(plan, &step.layer_out)?;
                for l in 0..=last {
                    self.record_layer(plan, l, &step.all, &step.layer_out, LayerEnd::Stream(&step.layer_out))?;
                }
                Ok(&step.layer_out)
            }
            Mode::Recursive => {
                self.record_set(plan, Selection::Begin, 0, &step.all, middle.then_some(UNSHARED_GROUP))?;
                for (r, set) in step.recursions.iter().enumerate() {
                    self.record_set(plan, Selection::Fixed, r, set, Some(recursion_group(r as u32)))?;
                }
                self.record_embedding(plan, &step.layer_out)?;
                for l in 0..=last {
                    let set = self.model.layout.recursion(l).map_or(&step.all, |r| &step.recursions[r as usize]);
                    self.record_layer(plan, l, set, &step.layer_out, LayerEnd::Stream(&step.layer_out))?;
                }
                Ok(&step.layer_out)
            }
            Mode::Expert | Mode::Token => {
                self.record_set(plan, Selection::Begin, 0, &step.all, middle.then_some(UNSHARED_GROUP))?;
                if config.sharing == SharingStrategy::MiddleCycle {
                    self.record_embedding(plan, &step.layer_out)?;
                    self.record_layer(plan, 0, &step.all, &step.layer_out, LayerEnd::Stream(&step.hidden))?;
                } else {
                    self.record_embedding(plan, &step.hidden)?;
                }
                for r in 0..config.num_recursions {
                    self.record_recursion(plan, r)?;
                    after_recursion(plan, r);
                }
                if config.sharing == SharingStrategy::MiddleCycle {
                    self.record_layer(plan, last, &step.all, &step.hidden, LayerEnd::Stream(&step.layer_out))?;
                    Ok(&step.layer_out)
                } else {
                    Ok(&step.hidden)
                }
            }
        }
    }

    fn record_recursion(&self, plan: &mut PlanBuilder<'_>, r: usize) -> Result<()> {
        let (config, step) = (self.config(), self.step);
        let candidates = if r == 0 { &step.all } else { &step.recursions[r - 1] };
        let selection = match config.mode {
            Mode::Expert => {
                self.record_expert_router(plan, r, candidates)?;
                // The K/V sharing strategies need every token's keys of the first recursion.
                let keep_all = r == 0 && config.kv != KvStrategy::RecursionWise;
                match self.routing {
                    Routing::Causal => {
                        let decision = step.aux_logits.get(r).unwrap_or(&step.router_logits[r]);
                        Selection::Expert { decision, always: config.capacity[r] >= 1.0, keep_all }
                    }
                    Routing::TopK => Selection::Expert { decision: &step.topk_decision, always: false, keep_all },
                }
            }
            _ => {
                if r == 0 {
                    self.record_token_router(plan)?;
                }
                Selection::Token
            }
        };
        let set = &step.recursions[r];
        self.record_set(plan, selection, r, set, Some(recursion_group(r as u32)))?;
        let layers = self.model.layout.block_layers(r as u32);
        let mut input = if config.mode == Mode::Token && r > 0 { &step.running } else { &step.hidden };
        for (j, l) in layers.iter().enumerate() {
            let end = if j + 1 == layers.len() {
                LayerEnd::Block { recursion: r as u32 }
            } else {
                LayerEnd::Stream(&step.layer_out)
            };
            self.record_layer(plan, *l, set, input, end)?;
            input = &step.layer_out;
        }
        Ok(())
    }

    /// Lists the rows of `selection`; `group` is where the layers that run over them store K/V.
    fn record_set(
        &self,
        plan: &mut PlanBuilder<'_>,
        selection: Selection<'_>,
        recursion: usize,
        set: &RowSet,
        group: Option<usize>,
    ) -> Result<()> {
        let kv_layout = &self.model.kv_layout;
        // All layers over a set agree on their groups; any one of them tells.
        let layer = group.and_then(|group| {
            let of_group = |l: &usize| self.model.layout.recursion(*l).map_or(UNSHARED_GROUP, recursion_group) == group;
            (0..self.config().num_hidden_layers).find(of_group).map(|l| kv_layout.layer(l))
        });
        let kv = layer.map(|layer| {
            let hybrid = self.kv.slots.as_ref().and_then(|slots| {
                let first_group = (group == Some(recursion_group(0))).then(|| recursion_group(1) as u32);
                (group != Some(UNSHARED_GROUP)).then_some(Hybrid { slots, first_group })
            });
            KvGroups {
                write: layer.write_group.map(|group| group as u32),
                read: layer.read_group as u32,
                num_groups: kv_layout.num_groups() as u32,
                lengths: &self.kv.lengths,
                pages: &self.kv.pages,
                max_pages: self.max_pages(),
                hybrid,
            }
        });
        TokensCompact::record(
            plan,
            &TokensCompactBindings {
                rows: &self.step.rows,
                depth: &self.step.depth,
                grids: &plan.grid_table(),
                active: set,
                selection,
                recursion: recursion as u32,
                kv,
                max_positions: self.kv.max_positions as u32,
            },
        )
    }

    fn max_pages(&self) -> u32 {
        self.kv.max_positions.div_ceil(PAGE_SIZE as usize) as u32
    }

    fn record_embedding(&self, plan: &mut PlanBuilder<'_>, x: &Tensor) -> Result<()> {
        let matrix = &self.model.weights.embed_tokens;
        for shard in &matrix.shards {
            let bindings =
                EmbedTokensBindings { rows: &self.step.all, tokens: &self.step.rows, weight: &shard.tensor, x };
            let params = EmbedTokensParams {
                hidden_size: self.config().hidden_size as u32,
                first_token: shard.first_row as u32,
                num_tokens: shard.num_rows as u32,
            };
            EmbedTokens::new(matrix.dtype).record(plan, bindings, params)?;
        }
        Ok(())
    }

    fn record_layer(
        &self,
        plan: &mut PlanBuilder<'_>,
        layer: usize,
        rows: &RowSet,
        input: &Tensor,
        end: LayerEnd<'_>,
    ) -> Result<()> {
        let (config, step) = (self.config(), self.step);
        let weights: &LayerWeights = &self.model.weights.layers[layer];
        let place = self.model.kv_layout.layer(layer);
        let (k_cache, v_cache) = &self.kv.buffers[place.buffer];
        let (q_dim, kv_dim) = (self.model.q_dim() as u32, self.model.kv_dim() as u32);
        let base = LinearParams {
            out_stride: config.hidden_size as u32,
            q_dim,
            kv_dim,
            head_dim: self.model.head_dim() as u32,
            additive: u32::from(config.gating == Gating::Additive),
            eps: config.rms_norm_eps as f32,
            scale: 1.0,
            ..Default::default()
        };

        // Layers that read another recursion's cache have no use for k and v.
        let qkv_columns = if place.write_group.is_some() { q_dim + 2 * kv_dim } else { q_dim };
        let norm = |x| Input::Norm {
            x,
            weight: if std::ptr::eq(x, input) { &weights.input_layernorm } else { &weights.post_attention_layernorm },
        };
        let qkv = Epilogue::Qkv { rope: &self.kv.rope, q: &step.q, k_cache, v_cache };
        self.record_linear(plan, rows, norm(input), (&weights.qkv_proj, qkv_columns), qkv, base)?;

        let kv_table = if place.fallback_group.is_some() { KvTable::Slots } else { KvTable::Pages };
        let attended = self.record_attention(plan, rows, (k_cache, v_cache), kv_table)?;

        let all = |matrix: &Matrix| matrix.num_rows as u32;
        let o = Epilogue::Residual { residual: input, out: &step.middle };
        self.record_linear(plan, rows, attended, (&weights.o_proj, all(&weights.o_proj)), o, base)?;

        let swiglu = LinearParams { out_stride: step.mlp.shape()[1] as u32, ..base };
        let gate_up = (&weights.gate_up_proj, all(&weights.gate_up_proj));
        self.record_linear(plan, rows, norm(&step.middle), gate_up, Epilogue::SwiGlu { out: &step.mlp }, swiglu)?;

        let residual = &step.middle;
        let down = match end {
            LayerEnd::Stream(out) => Epilogue::Residual { residual, out },
            LayerEnd::Block { recursion } => {
                let (hidden, depth) = (&step.hidden, &step.depth);
                match &step.token_weight {
                    Some(gates) => Epilogue::BlockEndToken { residual, hidden, depth, gates, running: &step.running },
                    None => {
                        let gates = &step.router_weights[recursion as usize];
                        Epilogue::BlockEndExpert { residual, hidden, depth, gates }
                    }
                }
            }
        };
        let recursion = if let LayerEnd::Block { recursion } = end { recursion } else { 0 };
        let x = Input::Compact { x: &step.mlp };
        let down_proj = (&weights.down_proj, all(&weights.down_proj));
        self.record_linear(plan, rows, x, down_proj, down, LinearParams { recursion, ..base })
    }

    /// Records attention of the queries in `step.q`; returns what `o_proj` reads.
    fn record_attention(
        &self,
        plan: &mut PlanBuilder<'_>,
        rows: &RowSet,
        (keys, values): (&Tensor, &Tensor),
        table: KvTable,
    ) -> Result<Input<'a>> {
        let (config, step) = (self.config(), self.step);
        let shape = AttentionShape { kv_table: table, ..self.model.attention_shape() };
        // Of the real head: padding adds nothing to a score.
        let scale = (config.head_dim as f64).sqrt().recip() as f32;
        let kv_table = match table {
            KvTable::Pages => &self.kv.pages,
            KvTable::Slots => self.kv.slots.as_ref().expect("hybrid caches have a slot table"),
        };
        let q = &step.q;
        match self.phase {
            Phase::Decode { num_splits } => {
                let stats = step.attention_stats.as_ref();
                let bindings = AttentionDecodeBindings {
                    rows,
                    q,
                    keys,
                    values,
                    kv_table,
                    partial_out: &step.attention,
                    partial_stats: stats,
                };
                AttentionDecode::new(shape, num_splits, plan.gpu().caps()).record(
                    plan,
                    bindings,
                    AttentionDecodeParams { scale },
                )?;
                Ok(match stats {
                    Some(stats) => Input::Merge { partial: &step.attention, stats, num_splits },
                    None => Input::Compact { x: &step.attention },
                })
            }
            Phase::Prefill => {
                let bindings = AttentionPrefillBindings { rows, q, keys, values, kv_table, out: &step.attention };
                AttentionPrefill::new(shape).record(plan, bindings, AttentionPrefillParams { scale })?;
                Ok(Input::Compact { x: &step.attention })
            }
        }
    }

    /// Records `input @ weight^T` over the first `num_columns` rows of the weight, shard by shard.
    fn record_linear(
        &self,
        plan: &mut PlanBuilder<'_>,
        rows: &RowSet,
        input: Input<'_>,
        (weight, num_columns): (&Matrix, u32),
        epilogue: Epilogue<'_>,
        params: LinearParams,
    ) -> Result<()> {
        let in_features = weight.in_features as u32;
        let few_rows = matches!(self.phase, Phase::Decode { .. }) || std::ptr::eq(rows, &self.step.sampled);
        let x = match input {
            Input::Norm { x, weight } if !few_rows => {
                let norm = RmsNormParams { hidden_size: in_features, eps: params.eps };
                let bindings = RmsNormBindings { rows, x, weight, y: &self.step.normed };
                RmsNorm::default().record(plan, bindings, norm)?;
                Input::Compact { x: &self.step.normed }
            }
            other => other,
        };
        for shard in &weight.shards {
            let first_output = shard.first_row as u32;
            if first_output >= num_columns {
                break;
            }
            let num_outputs = (shard.num_rows as u32).min(num_columns - first_output);
            let params = LinearParams { num_outputs, first_output, in_features, ..params };
            if few_rows {
                let prologue = match x {
                    Input::Compact { x } => Prologue::Compact { x },
                    Input::Stream { x } => Prologue::Stream { x },
                    Input::Norm { x, weight } => Prologue::Norm { x, weight },
                    Input::Merge { partial, stats, num_splits } => Prologue::Merge { partial, stats, num_splits },
                };
                let bindings = LinearDecodeBindings { rows, weight: &shard.tensor, prologue, epilogue };
                let max_rows = if std::ptr::eq(rows, &self.step.sampled) { 1 } else { self.step.capacity as u32 };
                LinearDecode::new(
                    plan.gpu().caps(),
                    in_features,
                    weight.dtype,
                    prologue.kind(),
                    epilogue.kind(),
                    max_rows,
                )
                .record(plan, &bindings, &params)?;
            } else {
                let prologue = match x {
                    Input::Compact { x } => Prologue::Compact { x },
                    Input::Stream { x } => Prologue::Stream { x },
                    Input::Norm { .. } | Input::Merge { .. } => unreachable!("normed above; merges are of decode only"),
                };
                let shape = [self.step.capacity as u32, num_outputs, in_features];
                let (prologue_kind, epilogue_kind) = (prologue.kind(), epilogue.kind());
                let kernel =
                    Linear::for_shape(plan.gpu().caps(), shape, false, weight.dtype, prologue_kind, epilogue_kind);
                let bindings = LinearBindings { rows, weight: &shard.tensor, prologue, epilogue };
                kernel.record(plan, &bindings, &params)?;
            }
        }
        Ok(())
    }

    /// The input of a router's last matrix: the stream itself, or the hidden layer of the MLP types.
    fn record_router_hidden(
        &self,
        plan: &mut PlanBuilder<'_>,
        rows: &RowSet,
        router: &RouterWeights,
        input_scale: f32,
    ) -> Result<RouterInput<'a>> {
        let step = self.step;
        let (Some(hidden), Some(out)) = (&router.hidden, &step.router_hidden) else {
            return Ok(RouterInput { x: &step.hidden, by_row: true, scale: input_scale });
        };
        let params = LinearParams { out_stride: out.shape()[1] as u32, scale: input_scale, ..LinearParams::default() };
        let x = Input::Stream { x: &step.hidden };
        self.record_linear(plan, rows, x, (hidden, hidden.num_rows as u32), Epilogue::Gelu { out }, params)?;
        Ok(RouterInput { x: out, by_row: false, scale: 1.0 })
    }

    fn record_expert_router(&self, plan: &mut PlanBuilder<'_>, r: usize, rows: &RowSet) -> Result<()> {
        let (config, step) = (self.config(), self.step);
        let routers = &self.model.weights.routers[r];
        let gate = match config.router_func {
            RouterFunc::Sigmoid => ExpertGate::Sigmoid,
            RouterFunc::Tanh => ExpertGate::Tanh,
            _ => ExpertGate::None,
        };
        let mut score = |router: &RouterWeights, temp: f64, logits: &Tensor, gates: Option<&Tensor>| {
            let input = self.record_router_hidden(plan, rows, router, (1.0 / temp) as f32)?;
            let kernel = RouterExpert {
                gate,
                weight_dtype: router.output.dtype(),
                x_by_row: input.by_row,
                logit_only: gates.is_none(),
                ..RouterExpert::default()
            };
            let bindings = RouterExpertBindings { rows, x: input.x, weight: &router.output, logits, gates };
            let in_features = router.output.num_elems() as u32;
            let params = RouterExpertParams { in_features, input_scale: input.scale, alpha: config.alpha as f32 };
            kernel.record(plan, bindings, params)
        };
        score(&routers.router, config.temp, &step.router_logits[r], Some(&step.router_weights[r]))?;
        if let Some(aux) = &routers.aux {
            // The auxiliary router sees the stream without the temperature.
            score(aux, 1.0, &step.aux_logits[r], None)?;
        }
        if self.routing == Routing::TopK {
            let bindings = RouterTopkBindings {
                sequences: &step.topk_sequences[r],
                gates: &step.router_weights[r],
                depth: &step.depth,
                decision: &step.topk_decision,
            };
            RouterTopk::default().record(plan, bindings, RouterTopkParams { recursion: r as u32 })?;
        }
        Ok(())
    }

    fn record_token_router(&self, plan: &mut PlanBuilder<'_>) -> Result<()> {
        let (config, step) = (self.config(), self.step);
        let routers = &self.model.weights.routers[0];
        let rows = &step.all;
        let input = self.record_router_hidden(plan, rows, &routers.router, (1.0 / config.temp) as f32)?;
        let weight = &routers.router.output;
        let kernel = RouterToken {
            gate: if config.router_func == RouterFunc::Sigmoid { TokenGate::Sigmoid } else { TokenGate::Softmax },
            weight_dtype: weight.dtype(),
            x_by_row: input.by_row,
            bias: routers.bias.is_some(),
            ..RouterToken::new(config.num_recursions as u32)
        };
        let bindings = RouterTokenBindings {
            rows,
            x: input.x,
            weight,
            logits: &step.router_logits[0],
            gates: &step.router_weights[0],
            depth: &step.depth,
            token_weight: step.token_weight.as_ref().expect("token choice has a chosen gate"),
            bias: routers.bias.as_ref(),
        };
        let in_features = (weight.num_elems() / config.num_recursions) as u32;
        let params = RouterTokenParams { in_features, input_scale: input.scale, alpha: config.alpha as f32 };
        kernel.record(plan, bindings, params)
    }

    fn record_head(&self, plan: &mut PlanBuilder<'_>, stream: &Tensor, logit_rows: LogitRows) -> Result<()> {
        let (config, step, weights) = (self.config(), self.step, &self.model.weights);
        let (rows, selection) = match logit_rows {
            LogitRows::Sampled => {
                let selection = Selection::Sample { results: &self.sample.results };
                self.record_set(plan, selection, 0, &step.sampled, None)?;
                (&step.sampled, true)
            }
            LogitRows::All => (&step.all, false),
        };
        let params = LinearParams {
            out_stride: self.model.logits_stride() as u32,
            eps: config.rms_norm_eps as f32,
            scale: 1.0,
            ..Default::default()
        };
        let head = (&weights.lm_head, weights.lm_head.num_rows as u32);
        let input = Input::Norm { x: stream, weight: &weights.norm };
        self.record_linear(plan, rows, input, head, Epilogue::Store { out: &step.logits }, params)?;
        if selection {
            let bindings = SampleTokenBindings {
                rows,
                logits: &step.logits,
                sampling: &self.sample.sampling,
                seen: &self.sample.seen,
                next_rows: &self.sample.next_rows,
                results: &self.sample.results,
            };
            let params = SampleTokenParams {
                vocab_size: config.vocab_size as u32,
                logits_stride: self.model.logits_stride() as u32,
                max_positions: self.kv.max_positions as u32,
                seen_words: self.sample.seen.shape()[1] as u32,
            };
            SampleToken::new(plan.gpu().caps()).record(plan, bindings, params)?;
        }
        Ok(())
    }
}

/// What a linear kernel reads.
#[derive(Clone, Copy)]
enum Input<'a> {
    Compact { x: &'a Tensor },
    Stream { x: &'a Tensor },
    Norm { x: &'a Tensor, weight: &'a Tensor },
    Merge { partial: &'a Tensor, stats: &'a Tensor, num_splits: u32 },
}

struct RouterInput<'a> {
    x: &'a Tensor,
    by_row: bool,
    scale: f32,
}
