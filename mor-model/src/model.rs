//! [`MorModel`]: a model on the device, which records its steps as plans. It never submits, waits or loops over steps.
//!
//! Residual streams are `[T, C]` tensors that rows never leave: active rows are read and written through lists
//! ([`RowSet`]), so nothing is gathered into or scattered out of a batch, and a block costs what its active rows cost.

use std::ops::Range;

use mor_kernels::caps::DeviceCaps;
use mor_kernels::epilogue::{Epilogue, LinearParams};
use mor_kernels::ops::{
    AttentionDecode, AttentionDecodeBindings, AttentionDecodeParams, AttentionPrefill, AttentionPrefillBindings,
    AttentionPrefillParams, AttentionShape, DepthRule, EmbedTokens, EmbedTokensBindings, EmbedTokensParams, ExpertGate,
    Hybrid, KvGroups, Linear, LinearBindings, LinearDecode, LinearDecodeBindings, LinearTile, Prologue, RmsNorm,
    RmsNormBindings, RmsNormParams, RouterExpert, RouterExpertBindings, RouterExpertParams, RouterToken,
    RouterTokenBindings, RouterTokenParams, RouterTopk, RouterTopkBindings, RouterTopkParams, SamplePartial,
    SamplePartialBindings, SamplePartialParams, SampleToken, SampleTokenBindings, SampleTokenParams, Selection, SlotKv,
    SlotPhase, SlotsCompact, SlotsCompactBindings, TokenGate, TokensCompact, TokensCompactBindings,
};
use mor_kernels::plan::PlanBuilder;
use mor_kernels::rows::{KvTable, PAGE_SIZE, RowSet};
use mor_kernels::tensor::{DType, Tensor};
use mor_kernels::{Gpu, KernelError, Result};

use crate::device_weights::{
    Adapter, DeviceWeights, LayerWeights, Matrix, Precision, Projection, RouterWeights, device_head_dim,
};
use crate::step_tensors::{DepthwiseTensors, HalfTensors, KvTensors, SampleTensors, StepTensors};
use crate::{
    Checkpoint, DepthControl, Gating, KvLayout, KvStrategy, LayerLayout, Lora, Mode, ModelError, MorConfig, RouterFunc,
    SharingStrategy, UNSHARED_GROUP, recursion_group,
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
    /// One row a sequence; keys are split over `num_splits` workgroups.
    Decode {
        /// Parts of the keys, from 1 on; 1 for more than [`MAX_FEW_ROWS`] rows.
        num_splits: u32,
    },
    /// Many rows.
    Prefill,
    /// Few or many rows of either kind, computed alike: every sum has an order of its own, which no other row and no
    /// number of rows changes.
    Invariant,
}

/// The kernels that multiply rows with a weight.
#[derive(Clone, Copy, Debug)]
enum Product {
    /// [`LinearDecode`] for up to `max_rows` rows, norm and merge fused.
    FewRows { max_rows: u32 },
    /// [`Linear`]; `norm_apart`: after an [`RmsNorm`].
    ManyRows { tile: LinearTile, norm_apart: bool },
}

impl Phase {
    /// Parts into which [`AttentionDecode`] splits the keys; `None` where [`AttentionPrefill`] serves.
    fn key_splits(self) -> Option<u32> {
        match self {
            Phase::Decode { num_splits } => Some(num_splits),
            Phase::Invariant => Some(1),
            Phase::Prefill => None,
        }
    }

    /// The kernels for up to `max_rows` rows times `num_outputs` of the `weight_rows` rows of a weight. Products of
    /// halves, on cooperative matrices, are for models that are stored as such.
    fn product(
        self,
        caps: &DeviceCaps,
        precision: Precision,
        max_rows: usize,
        (num_outputs, weight_rows): (u32, u32),
    ) -> Product {
        let (max_rows, num_outputs) = match self {
            // Neither how many rows a step has room for nor which part of the weight it needs may choose the tile.
            Phase::Invariant => (INVARIANT_ROWS, weight_rows),
            _ if max_rows <= MAX_FEW_ROWS => return Product::FewRows { max_rows: max_rows as u32 },
            _ => (max_rows as u32, num_outputs),
        };
        let tile = LinearTile::for_shape(caps, max_rows, num_outputs, precision == Precision::F16);
        // Of the rows of a prompt, every tile of columns would read whole rows again to norm them.
        Product::ManyRows { tile, norm_apart: self == Phase::Prefill || !tile.fuses_norm() }
    }
}

/// How a batch of decoding sequences goes through the recursions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Batching {
    /// A step takes every token through all its recursions; it lasts as long as its deepest token.
    Lockstep,
    /// A tick takes every token through one recursion, whichever is its next: continuous depth-wise batching.
    Depthwise,
}

/// Rows that the tiles of [`Phase::Invariant`] are chosen for, whatever the number of rows: a batch of decoding sequences
/// that is worth batching.
const INVARIANT_ROWS: u32 = 64;

/// Rows up to which the matrix-vector kernels serve; they also merge the splits of attention.
pub const MAX_FEW_ROWS: usize = 8;

/// The parts of a step or tick, as [`PlanBuilder::part`] is told: embedding and unshared first layer, the layers between with
/// their routers, unshared last layer with head and draw. Of a vanilla model the layers in the same places.
pub const PARTS: [&str; 3] = ["prelude", "block", "coda"];
const PRELUDE: &str = PARTS[0];
const BLOCK: &str = PARTS[1];
const CODA: &str = PARTS[2];

/// The rows whose logits a step computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// Those flagged for sampling, and a token is drawn for each.
    Sampled,
    /// All.
    All,
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
    batching: Batching,
    depth: DepthControl,
    script: Option<Script>,
}

/// Routing by draws in place of an expert-choice model's routers, for measurements alone: the routers of random weights
/// mean nothing, and what a token computes depends on its depth. A token that has come as far as recursion r takes it with
/// probability `keep[r]`, whatever the capacity and the router bias. Routers still run and gate, so the cost is that of the
/// model.
///
/// Draws depend on the seed, the token's position, its sequence's slot and the recursion, on nothing that was computed.
/// Top-k routing of full sequences does not follow them.
#[derive(Clone, Debug, PartialEq)]
pub struct ScriptedRouter {
    /// Seed of the draws.
    pub seed: u64,
    /// Per recursion, the share of the tokens that have taken all recursions before it.
    pub keep: Vec<f64>,
}

impl ScriptedRouter {
    /// Depths as the capacities give them: a share of `capacity[r]` of all tokens takes recursion r, so the mean depth is
    /// the sum of the capacities.
    pub fn by_capacity(config: &MorConfig, seed: u64) -> Self {
        let before = std::iter::once(&1.0).chain(&config.capacity);
        Self { seed, keep: config.capacity.iter().zip(before).map(|(capacity, before)| capacity / before).collect() }
    }

    /// Every token takes all recursions.
    pub fn full_depth(config: &MorConfig) -> Self {
        Self { seed: 0, keep: vec![1.0; config.num_recursions] }
    }
}

/// A [`ScriptedRouter`] on the device.
#[derive(Clone, Debug)]
struct Script {
    seed: u64,
    /// `[R]` f32.
    keep: Tensor,
}

/// Where a layer's output goes.
enum LayerEnd<'a> {
    Stream(&'a Tensor),
    Streams(&'a Tensor, &'a Tensor),
    /// The end of a block; expert choice has gates per set of rows.
    Block {
        gates: usize,
    },
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
        // The configuration says which layers are tied; a checkpoint whose copies differ keeps them apart all the same.
        let relaxed = config.lora.is_some() || config.recursion_encoding;
        let is_tied = |l| !relaxed && checkpoint.layer(l) == checkpoint.layer(layout.owner(l));
        let shares_block = config.mode != Mode::Vanilla && config.sharing.is_cycle();
        let shares_weights = shares_block && (0..layout.num_layers()).all(is_tied);
        let batching = if shares_weights { Batching::Depthwise } else { Batching::Lockstep };
        let weights = DeviceWeights::upload(gpu, checkpoint, precision, progress)?;
        let (gpu, depth, script) = (gpu.clone(), DepthControl::default(), None);
        Ok(Self { gpu, config, layout, kv_layout, precision, weights, batching, depth, script })
    }

    /// The model with other depths, from the steps on that are recorded with it.
    ///
    /// # Errors
    /// [`ModelError::DepthControl`] as [`DepthControl::validate`].
    pub fn with_depth_control(mut self, depth: DepthControl) -> Result<Self, ModelError> {
        self.set_depth_control(depth)?;
        Ok(self)
    }

    /// Changes the depths, from the steps on that are recorded then.
    ///
    /// # Errors
    /// [`ModelError::DepthControl`] as [`DepthControl::validate`]; nothing is changed then.
    pub fn set_depth_control(&mut self, depth: DepthControl) -> Result<(), ModelError> {
        depth.validate(&self.config)?;
        self.depth = depth;
        Ok(())
    }

    /// How far tokens go, other than their routers alone would have it.
    pub fn depth_control(&self) -> DepthControl {
        self.depth
    }

    /// Recursions that a token takes at most.
    pub fn max_depth(&self) -> usize {
        self.depth.max_depth(&self.config)
    }

    /// The model, routed by a script from the steps on that are recorded with it: for measurements.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the model is not one of expert choice, or the script has
    /// not one share between 0 and 1 for every recursion.
    pub fn with_scripted_router(mut self, script: &ScriptedRouter) -> Result<Self> {
        let unfit = |what, found, expected| Err(KernelError::Shape { kernel: "router_expert", what, found, expected });
        if self.config.mode != Mode::Expert {
            return unfit("mode", format!("{:?}", self.config.mode), "Expert, to follow a script".to_owned());
        }
        let num_recursions = self.config.num_recursions;
        if script.keep.len() != num_recursions || !script.keep.iter().all(|keep| (0.0..=1.0).contains(keep)) {
            let expected = format!("{num_recursions} shares from 0 to 1, one a recursion");
            return unfit("keep", format!("{:?}", script.keep), expected);
        }
        let keep: Vec<f32> = script.keep.iter().map(|keep| *keep as f32).collect();
        let keep = Tensor::from_slice(&self.gpu, "keep", DType::F32, &[num_recursions], &keep)?;
        self.script = Some(Script { seed: script.seed, keep });
        Ok(self)
    }

    /// What the values that expert choice decides by are compared with.
    pub(crate) fn threshold(&self) -> f32 {
        // A script's values are signs.
        if self.script.is_some() { 0.0 } else { self.depth.threshold() }
    }

    /// Whether every token that comes as far as recursion `r` takes it.
    pub(crate) fn takes_all(&self, r: usize) -> bool {
        self.script.is_none() && self.config.capacity.get(r).is_none_or(|capacity| *capacity >= 1.0)
    }

    /// The seed and the shares of the script that routes, if one does.
    pub(crate) fn script(&self) -> Option<(u64, &Tensor)> {
        self.script.as_ref().map(|script| (script.seed, &script.keep))
    }

    /// Whether the first and the last layer, or of a vanilla model all, are in no recursion.
    pub(crate) fn has_unshared_layers(&self) -> bool {
        self.config.mode == Mode::Vanilla || self.config.sharing.is_middle()
    }

    /// Pages that a K/V table has room for.
    pub(crate) fn max_pages(&self, kv: &KvTensors) -> u32 {
        kv.max_positions.div_ceil(PAGE_SIZE as usize) as u32
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

    /// Columns of a row inside the MLP on the device.
    pub(crate) fn mlp_dim(&self) -> usize {
        self.config.intermediate_size.next_multiple_of(8)
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

    /// How this model's decode batches can run best: depth-wise if all recursions share their weights.
    pub fn batching(&self) -> Batching {
        self.batching
    }

    /// Records a step over the rows in `step.rows`: embedding, layers, routing, head, and for
    /// [`LogitRows::Sampled`] the draw of the next token. `after_recursion` is called where a recursion's results
    /// are complete, to record copies of them; also for those that no token may take.
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
        if let Some(layers) = &step.layers {
            plan.part(BLOCK);
            let sampled = layers.record(plan, self, step, kv)?;
            plan.part(CODA);
            return recorder.record_draw(plan, sampled);
        }
        plan.part(PRELUDE);
        let stream = recorder.record_layers(plan, after_recursion)?;
        plan.part(CODA);
        match logit_rows {
            LogitRows::Sampled => {
                recorder.record_set(plan, Selection::Sample, 0, &step.sampled, None)?;
                recorder.record_head(plan, stream, &step.sampled)?;
                recorder.record_draw(plan, &step.sampled)
            }
            LogitRows::All => recorder.record_head(plan, stream, &step.all),
        }
    }

    /// Records a tick of depth-wise batching over the slots of `step`, which was made for it, with the kernels of `phase`:
    /// tokens that have taken their last recursion run the last layers and are replaced by the next of their sequence,
    /// these run the first layers, and all run the shared block once.
    ///
    /// # Errors
    /// As [`PlanBuilder::dispatch`].
    ///
    /// # Panics
    /// If `step` was made for something else.
    pub fn record_tick(
        &self,
        plan: &mut PlanBuilder<'_>,
        step: &StepTensors,
        kv: &KvTensors,
        sample: &SampleTensors,
        phase: Phase,
    ) -> Result<()> {
        Recorder { model: self, step, kv, sample, phase, routing: Routing::Causal }.record_tick(plan)
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
        self.model.config()
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
                    plan.part(self.part_of(l));
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
                    plan.part(self.part_of(l));
                    let set = self.model.layout().recursion(l).map_or(&step.all, |r| &step.recursions[r as usize]);
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
                plan.part(BLOCK);
                for r in 0..config.num_recursions {
                    // What no token may take is not dispatched.
                    if r < self.model.max_depth() {
                        self.record_recursion(plan, r)?;
                    }
                    after_recursion(plan, r);
                }
                plan.part(CODA);
                if config.sharing == SharingStrategy::MiddleCycle {
                    self.record_layer(plan, last, &step.all, &step.hidden, LayerEnd::Stream(&step.layer_out))?;
                    Ok(&step.layer_out)
                } else {
                    Ok(&step.hidden)
                }
            }
        }
    }

    /// The part that layer `l` belongs to.
    fn part_of(&self, l: usize) -> &'static str {
        match l {
            _ if self.model.layout().recursion(l).is_some() => BLOCK,
            0 => PRELUDE,
            l if l + 1 == self.config().num_hidden_layers => CODA,
            _ => BLOCK,
        }
    }

    fn record_recursion(&self, plan: &mut PlanBuilder<'_>, r: usize) -> Result<()> {
        let (config, step) = (self.config(), self.step);
        let candidates = if r == 0 { &step.all } else { &step.recursions[r - 1] };
        let selection = match config.mode {
            Mode::Expert => {
                self.record_expert_router(plan, r, candidates, r)?;
                self.record_topk(plan, r)?;
                // The K/V sharing strategies need every token's keys of the first recursion.
                let keep_all = r == 0 && config.kv != KvStrategy::RecursionWise;
                match self.routing {
                    Routing::Causal => {
                        let decision = step.aux_logits.get(r).unwrap_or(&step.router_logits[r]);
                        let (threshold, always) = (self.model.threshold(), self.model.takes_all(r));
                        Selection::Expert { decision, threshold, always, keep_all }
                    }
                    Routing::TopK => {
                        let (decision, threshold) = (&step.topk_decision, 0.0);
                        Selection::Expert { decision, threshold, always: false, keep_all }
                    }
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
        let input = if config.mode == Mode::Token && r > 0 { &step.running } else { &step.hidden };
        self.record_block(plan, r, set, input)
    }

    /// The layers of recursion `r` over the rows of `set`; in depth-wise batching, where `r` is 0, of any recursion.
    fn record_block(&self, plan: &mut PlanBuilder<'_>, r: usize, set: &RowSet, mut input: &'a Tensor) -> Result<()> {
        let step = self.step;
        let layers = self.model.layout().block_layers(r as u32);
        for (j, l) in layers.iter().enumerate() {
            let end = match self.config().mode {
                _ if j + 1 < layers.len() => LayerEnd::Stream(&step.layer_out),
                Mode::Expert | Mode::Token => LayerEnd::Block { gates: r },
                Mode::Vanilla | Mode::Recursive => LayerEnd::Stream(&step.hidden),
            };
            self.record_layer(plan, *l, set, input, end)?;
            input = &step.layer_out;
        }
        Ok(())
    }

    fn record_tick(&self, plan: &mut PlanBuilder<'_>) -> Result<()> {
        let (config, step) = (self.config(), self.step);
        let (middle, token) = (config.sharing.is_middle(), config.mode == Mode::Token);
        let (all, block) = (&step.all, &step.recursions[0]);
        let rule = match config.mode {
            Mode::Expert => {
                let decision = step.aux_logits.first().unwrap_or(&step.router_logits[0]);
                let (threshold, keep_all) = (self.model.threshold(), config.kv != KvStrategy::RecursionWise);
                DepthRule::Expert { decision, threshold, keep_all }
            }
            Mode::Token => DepthRule::Token { target_depth: &step.depth },
            Mode::Vanilla | Mode::Recursive => DepthRule::Fixed,
        };

        plan.part(CODA);
        self.record_slots(plan, SlotPhase::Exit(rule), &step.sampled, middle)?;
        let mut stream = &step.hidden;
        if middle {
            let last = config.num_hidden_layers - 1;
            self.record_layer(plan, last, &step.sampled, stream, LayerEnd::Stream(&step.layer_out))?;
            stream = &step.layer_out;
        }
        self.record_head(plan, stream, &step.sampled)?;
        self.record_draw(plan, &step.sampled)?;

        plan.part(PRELUDE);
        self.record_slots(plan, SlotPhase::Enter { next_rows: &self.sample.next_rows }, all, middle)?;
        if middle {
            self.record_embedding(plan, &step.layer_out)?;
            let end =
                if token { LayerEnd::Streams(&step.hidden, &step.running) } else { LayerEnd::Stream(&step.hidden) };
            self.record_layer(plan, 0, all, &step.layer_out, end)?;
        } else {
            self.record_embedding(plan, &step.hidden)?;
            if token {
                self.record_embedding(plan, &step.running)?;
            }
        }
        match config.mode {
            Mode::Expert => self.record_expert_router(plan, 0, all, 0)?,
            Mode::Token => self.record_token_router(plan)?,
            Mode::Vanilla | Mode::Recursive => {}
        }

        plan.part(BLOCK);
        self.record_slots(plan, SlotPhase::Block(rule), block, true)?;
        if config.kv == KvStrategy::Sharing {
            // Those that store keys and values.
            self.record_slots(plan, SlotPhase::At(0), &self.depthwise().at, true)?;
        }
        self.record_block(plan, 0, block, if token { &step.running } else { &step.hidden })?;
        if config.mode == Mode::Expert {
            self.record_next_routers(plan, block)?;
        }
        Ok(())
    }

    /// Scores the rows of a tick's block for the recursion after the one they took.
    fn record_next_routers(&self, plan: &mut PlanBuilder<'_>, block: &RowSet) -> Result<()> {
        let routers = self.model.weights().routers.as_ref().expect("expert choice has routers");
        let max_depth = self.model.max_depth();
        if routers.router.hidden.is_empty() && max_depth > 1 {
            // The last matrices lie in one tensor, from which each row picks its own.
            return self.record_expert_router(plan, 1, block, 0);
        }
        let at = &self.depthwise().at;
        for r in 1..max_depth {
            self.record_slots(plan, SlotPhase::At(r as u32 - 1), at, false)?;
            self.record_expert_router(plan, r, at, 0)?;
        }
        Ok(())
    }

    fn depthwise(&self) -> &'a DepthwiseTensors {
        self.step.depthwise.as_ref().expect("the tensors were made for depth-wise batching")
    }

    /// Moves the slots on and lists those of `phase`.
    fn record_slots(&self, plan: &mut PlanBuilder<'_>, phase: SlotPhase<'_>, set: &RowSet, kv: bool) -> Result<()> {
        let depthwise = self.depthwise();
        let bindings = SlotsCompactBindings {
            rows: &self.step.rows,
            state: &depthwise.state,
            grids: &plan.grid_table(),
            recursions: &depthwise.recursions,
            active: set,
            phase,
            kv: kv.then(|| SlotKv {
                num_groups: self.model.kv_layout().num_groups() as u32,
                lengths: &self.kv.lengths,
                pages: &self.kv.pages,
                max_pages: self.max_pages(),
                slots: self.kv.slots.as_ref(),
            }),
            num_recursions: self.model.max_depth() as u32,
            max_positions: self.kv.max_positions as u32,
        };
        SlotsCompact::record(plan, &bindings)
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
        let kv_layout = self.model.kv_layout();
        // All layers over a set agree on their groups; any one of them tells.
        let layer = group.and_then(|group| {
            let of_group =
                |l: &usize| self.model.layout().recursion(*l).map_or(UNSHARED_GROUP, recursion_group) == group;
            (0..self.config().num_hidden_layers).find(of_group).map(|l| kv_layout.layer(l))
        });
        let kv = layer.map(|layer| {
            let hybrid = self.kv.slots.as_ref().and_then(|slots| {
                let first_group = (group == Some(recursion_group(0))).then(|| recursion_group(0) as u32);
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
        self.model.max_pages(self.kv)
    }

    fn record_embedding(&self, plan: &mut PlanBuilder<'_>, x: &Tensor) -> Result<()> {
        let matrix = &self.model.weights().embed_tokens;
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
        let weights: &'a LayerWeights = &self.model.weights().layers[layer];
        let place = self.model.kv_layout().layer(layer);
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

        // Layers that read another recursion's cache have no use for k and v; in depth-wise batching, rows.
        let all_columns = q_dim + 2 * kv_dim;
        let in_block = step.depthwise.is_some() && std::ptr::eq(rows, &step.recursions[0]);
        let some_store = in_block && config.kv == KvStrategy::Sharing;
        let qkv_columns = if place.write_group.is_some() && !some_store { 0..all_columns } else { 0..q_dim };
        let norm = |x| Input::Norm {
            x,
            weight: if std::ptr::eq(x, input) { &weights.input_layernorm } else { &weights.post_attention_layernorm },
        };
        let qkv = Epilogue::Qkv { rope: &self.kv.rope, q: &step.q, k_cache, v_cache, delta: false };
        let behind_q = LinearParams { delta_start: step.q.shape()[0] as u32 * q_dim, ..base };
        self.record_projection(plan, rows, norm(input), (&weights.qkv_proj, qkv_columns), qkv, behind_q)?;
        if some_store {
            let first = &self.depthwise().at;
            let kv_columns = (&weights.qkv_proj, q_dim..all_columns);
            self.record_projection(plan, first, norm(input), kv_columns, qkv, behind_q)?;
        }

        let is_shared = self.model.layout().recursion(layer).is_some();
        let kv_table = if is_shared && config.kv == KvStrategy::Hybrid { KvTable::Slots } else { KvTable::Pages };
        let attended = self.record_attention(plan, rows, (k_cache, v_cache), kv_table)?;

        let all = |projection: &'a Projection| (projection, 0..projection.weight.num_rows as u32);
        let o = Epilogue::Residual { residual: input, out: &step.middle, copy: None };
        self.record_projection(plan, rows, attended, all(&weights.o_proj), o, base)?;

        let mlp_dim = self.model.mlp_dim() as u32;
        let mlp = self.halves().map_or(&step.mlp, |halves| &halves.mlp);
        let swiglu = Epilogue::SwiGlu { out: mlp, delta: false };
        let behind_mlp =
            LinearParams { out_stride: mlp_dim, delta_start: step.mlp.shape()[0] as u32 * mlp_dim, ..base };
        self.record_projection(plan, rows, norm(&step.middle), all(&weights.gate_up_proj), swiglu, behind_mlp)?;

        let (residual, encoding) = (&step.middle, weights.encoding.as_ref());
        let down = match end {
            LayerEnd::Stream(out) => match encoding {
                Some(encoding) => Epilogue::Encoded { residual, out, encoding },
                None => Epilogue::Residual { residual, out, copy: None },
            },
            // Only the first layer, which no recursion encodes, ends in two streams.
            LayerEnd::Streams(out, copy) => Epilogue::Residual { residual, out, copy: Some(copy) },
            LayerEnd::Block { gates } => match &step.token_weight {
                Some(gates) => {
                    let (hidden, running) = (&step.hidden, &step.running);
                    Epilogue::BlockEndToken { residual, hidden, gates, running, encoding }
                }
                None => {
                    let gates = &step.router_weights[gates];
                    Epilogue::BlockEndExpert { residual, hidden: &step.hidden, gates, encoding }
                }
            },
        };
        self.record_projection(plan, rows, Input::Compact { x: mlp }, all(&weights.down_proj), down, base)
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
        match self.phase.key_splits() {
            Some(num_splits) => {
                let stats = (num_splits > 1).then_some(&step.attention_stats);
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
                    Some(stats) => {
                        Input::Merge { partial: &step.attention, stats, num_splits, head_dim: shape.head_dim }
                    }
                    None => Input::Compact { x: &step.attention },
                })
            }
            None => {
                let half_output = self.halves().and_then(|halves| halves.attention.as_ref());
                let out = half_output.unwrap_or(&step.attention);
                let bindings = AttentionPrefillBindings { rows, q, keys, values, kv_table, out };
                let kernel = AttentionPrefill::new(shape, self.model.precision() == Precision::F16);
                AttentionPrefill { half_output: half_output.is_some(), ..kernel }.record(
                    plan,
                    bindings,
                    AttentionPrefillParams { scale },
                )?;
                Ok(Input::Compact { x: out })
            }
        }
    }

    /// Records a projection over the rows `columns` of its weight. An adapter's product goes first, to where the projection's
    /// adds it: into the output tensor behind the output, or into a spare stream that has the residual in it.
    fn record_projection(
        &self,
        plan: &mut PlanBuilder<'_>,
        rows: &RowSet,
        input: Input<'_>,
        (projection, columns): (&Projection, Range<u32>),
        epilogue: Epilogue<'_>,
        params: LinearParams,
    ) -> Result<()> {
        let (weight, step) = (&projection.weight, self.step);
        let (Some(Adapter { a, b }), Some(adapted)) = (&projection.adapter, &step.adapted) else {
            return self.record_linear(plan, rows, input, (weight, columns), epilogue, params);
        };
        let input = match self.product(rows, columns.end - columns.start, weight) {
            // Both factors' norms are one.
            Product::ManyRows { .. } => self.record_norm(plan, rows, input, params.eps, &step.normed)?,
            Product::FewRows { .. } => input,
        };
        let ranks = a.num_rows as u32;
        let scale = self.config().lora.as_ref().map_or(1.0, Lora::scale) as f32;
        let to_ranks = LinearParams { out_stride: ranks, scale, ..params };
        self.record_linear(plan, rows, input, (a, 0..ranks), Epilogue::Store { out: adapted }, to_ranks)?;

        let spare = &step.normed;
        let into_spare = |residual| Epilogue::Residual { residual, out: spare, copy: None };
        let behind = LinearParams { first_output: params.delta_start, out_stride: b.num_rows as u32, ..params };
        let (delta, delta_params, epilogue) = match epilogue {
            Epilogue::Qkv { rope, q, k_cache, v_cache, .. } => {
                (Epilogue::Store { out: q }, behind, Epilogue::Qkv { rope, q, k_cache, v_cache, delta: true })
            }
            Epilogue::SwiGlu { out, .. } => (Epilogue::Store { out }, behind, Epilogue::SwiGlu { out, delta: true }),
            Epilogue::Residual { residual, out, copy } => {
                (into_spare(residual), params, Epilogue::Residual { residual: spare, out, copy })
            }
            Epilogue::Encoded { residual, out, encoding } => {
                (into_spare(residual), params, Epilogue::Encoded { residual: spare, out, encoding })
            }
            Epilogue::BlockEndExpert { residual, hidden, gates, encoding } => {
                let end = Epilogue::BlockEndExpert { residual: spare, hidden, gates, encoding };
                (into_spare(residual), params, end)
            }
            Epilogue::BlockEndToken { residual, hidden, gates, running, encoding } => {
                let end = Epilogue::BlockEndToken { residual: spare, hidden, gates, running, encoding };
                (into_spare(residual), params, end)
            }
            Epilogue::Store { .. } | Epilogue::Gelu { .. } => unreachable!("no projection of a layer ends so"),
        };
        let ranks = Input::Compact { x: adapted };
        self.record_linear(plan, rows, ranks, (b, columns.clone()), delta, delta_params)?;
        self.record_linear(plan, rows, input, (weight, columns), epilogue, params)
    }

    /// The kernels for `num_outputs` of the rows of `weight`.
    fn product(&self, rows: &RowSet, num_outputs: u32, weight: &Matrix) -> Product {
        let max_rows = match self.phase {
            // A prompt ends in one row.
            Phase::Prefill if std::ptr::eq(rows, &self.step.sampled) => 1,
            Phase::Prefill => self.step.capacity.max(MAX_FEW_ROWS + 1),
            _ => self.step.capacity,
        };
        let outputs = (num_outputs, weight.num_rows as u32);
        self.phase.product(self.model.gpu().caps(), self.model.precision(), max_rows, outputs)
    }

    /// The tensors in f16 between the kernels of prefill.
    fn halves(&self) -> Option<&'a HalfTensors> {
        self.step.halves.as_ref().filter(|_| self.phase == Phase::Prefill)
    }

    /// Normalises `input` into the dense batch `y`, if a norm is to come first.
    fn record_norm<'i>(
        &self,
        plan: &mut PlanBuilder<'_>,
        rows: &RowSet,
        input: Input<'i>,
        eps: f32,
        y: &'i Tensor,
    ) -> Result<Input<'i>> {
        let Input::Norm { x, weight } = input else { return Ok(input) };
        let norm = RmsNormParams { hidden_size: weight.num_elems() as u32, eps };
        let kernel = RmsNorm { half_output: y.dtype() == DType::F16, ..RmsNorm::default() };
        kernel.record(plan, RmsNormBindings { rows, x, weight, y }, norm)?;
        Ok(Input::Compact { x: y })
    }

    /// Records `input @ weight^T` over the rows `columns` of the weight, shard by shard; only the last shard of the
    /// range may be used in part. Output column 0 is `params.first_output`.
    fn record_linear(
        &self,
        plan: &mut PlanBuilder<'_>,
        rows: &RowSet,
        input: Input<'_>,
        (weight, columns): (&Matrix, Range<u32>),
        epilogue: Epilogue<'_>,
        params: LinearParams,
    ) -> Result<()> {
        let in_features = weight.in_features as u32;
        let product = self.product(rows, columns.end - columns.start, weight);
        // The final hidden states, which the head reads, are a result in f32.
        let halves = self.halves().filter(|_| !matches!(epilogue, Epilogue::Store { .. }));
        let normed = halves.map_or(&self.step.normed, |halves| &halves.normed);
        let x = match product {
            Product::ManyRows { norm_apart: true, .. } => self.record_norm(plan, rows, input, params.eps, normed)?,
            _ => input,
        };
        for shard in &weight.shards {
            let first_row = shard.first_row as u32;
            if !columns.contains(&first_row) {
                continue;
            }
            let num_outputs = (shard.num_rows as u32).min(columns.end - first_row);
            let first_output = params.first_output + first_row;
            let params = LinearParams { num_outputs, first_output, in_features, ..params };
            let prologue = match x {
                Input::Compact { x } => Prologue::Compact { x },
                Input::Stream { x } => Prologue::Stream { x },
                Input::Norm { x, weight } => Prologue::Norm { x, weight },
                Input::Merge { partial, stats, num_splits, head_dim } => {
                    Prologue::Merge { partial, stats, num_splits, head_dim }
                }
            };
            match product {
                Product::FewRows { max_rows } => {
                    let bindings = LinearDecodeBindings { rows, weight: &shard.tensor, prologue, epilogue };
                    let kinds = (prologue.kind(), epilogue.kind());
                    let size = [num_outputs, in_features];
                    let kernel = LinearDecode::new(plan.gpu().caps(), size, weight.dtype, kinds.0, kinds.1, max_rows);
                    LinearDecode { single_row: self.step.capacity == 1, ..kernel }.record(plan, &bindings, &params)?;
                }
                Product::ManyRows { tile, .. } => {
                    let bindings = LinearBindings { rows, weight: &shard.tensor, prologue, epilogue };
                    let (prologue, epilogue) = (prologue.kind(), epilogue.kind());
                    Linear { in_features, weight_dtype: weight.dtype, prologue, epilogue, tile }
                        .record(plan, &bindings, &params)?;
                }
            }
        }
        Ok(())
    }

    /// The input of a router's last matrix: the stream itself, or the hidden layer of the MLP types.
    fn record_router_hidden(
        &self,
        plan: &mut PlanBuilder<'_>,
        rows: &RowSet,
        hidden: Option<&Matrix>,
        input_scale: f32,
    ) -> Result<RouterInput<'a>> {
        let step = self.step;
        let (Some(hidden), Some(out)) = (hidden, &step.router_hidden) else {
            return Ok(RouterInput { x: &step.hidden, by_row: true, scale: input_scale });
        };
        let params = LinearParams { out_stride: out.shape()[1] as u32, scale: input_scale, ..LinearParams::default() };
        let x = Input::Stream { x: &step.hidden };
        self.record_linear(plan, rows, x, (hidden, 0..hidden.num_rows as u32), Epilogue::Gelu { out }, params)?;
        Ok(RouterInput { x: out, by_row: false, scale: 1.0 })
    }

    /// Scores `rows` for recursion `r`, their next; linear routers, for each row's own. Results go to the tensors at
    /// index `to`.
    fn record_expert_router(&self, plan: &mut PlanBuilder<'_>, r: usize, rows: &RowSet, to: usize) -> Result<()> {
        let (config, step) = (self.config(), self.step);
        let routers = self.model.weights().routers.as_ref().expect("expert choice has routers");
        let gate = match config.router_func {
            RouterFunc::Sigmoid => ExpertGate::Sigmoid,
            RouterFunc::Tanh => ExpertGate::Tanh,
            _ => ExpertGate::None,
        };
        let mut score = |router: &RouterWeights, temp: f64, logits: &Tensor, gates: Option<&Tensor>| {
            let input = self.record_router_hidden(plan, rows, router.hidden.get(r), (1.0 / temp) as f32)?;
            // The auxiliary router decides where there is one.
            let script = self.model.script().filter(|_| gates.is_none() || routers.aux.is_none());
            let kernel = RouterExpert {
                gate,
                weight_dtype: router.output.dtype(),
                x_by_row: input.by_row,
                logit_only: gates.is_none(),
                scripted: script.is_some(),
                ..RouterExpert::default()
            };
            let keep = script.map(|(_, keep)| keep);
            let bindings = RouterExpertBindings { rows, x: input.x, weight: &router.output, logits, gates, keep };
            let seed = script.map_or(0, |(seed, _)| seed);
            let num_recursions = config.num_recursions as u32;
            let params = RouterExpertParams {
                in_features: router.output.num_elems() as u32 / num_recursions,
                input_scale: input.scale,
                alpha: config.alpha as f32,
                num_recursions,
                seed_low: seed as u32,
                seed_high: (seed >> 32) as u32,
            };
            kernel.record(plan, bindings, params)
        };
        score(&routers.router, config.temp, &step.router_logits[to], Some(&step.router_weights[to]))?;
        if let Some(aux) = &routers.aux {
            // The auxiliary router sees the stream without the temperature.
            score(aux, 1.0, &step.aux_logits[to], None)?;
        }
        Ok(())
    }

    /// Ranks whole sequences for recursion `r`, under top-k routing.
    fn record_topk(&self, plan: &mut PlanBuilder<'_>, r: usize) -> Result<()> {
        let step = self.step;
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
        let routers = self.model.weights().routers.as_ref().expect("token choice has a router");
        let rows = &step.all;
        let input = self.record_router_hidden(plan, rows, routers.router.hidden.first(), (1.0 / config.temp) as f32)?;
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
        let params = RouterTokenParams {
            in_features,
            input_scale: input.scale,
            alpha: config.alpha as f32,
            max_depth: self.model.max_depth() as u32,
            depth_bias: self.model.depth_control().router_bias,
        };
        kernel.record(plan, bindings, params)
    }

    /// Logits of `rows` of a stream.
    fn record_head(&self, plan: &mut PlanBuilder<'_>, stream: &Tensor, rows: &RowSet) -> Result<()> {
        let (config, weights) = (self.config(), self.model.weights());
        let params = LinearParams {
            out_stride: self.model.logits_stride() as u32,
            eps: config.rms_norm_eps as f32,
            scale: 1.0,
            ..Default::default()
        };
        let head = (&weights.lm_head, 0..weights.lm_head.num_rows as u32);
        let input = Input::Norm { x: stream, weight: &weights.norm };
        self.record_linear(plan, rows, input, head, Epilogue::Store { out: &self.step.logits }, params)
    }

    /// Draws the tokens that follow `rows`.
    fn record_draw(&self, plan: &mut PlanBuilder<'_>, rows: &RowSet) -> Result<()> {
        let (step, sample) = (self.step, self.sample);
        let (logits, partials) = (&step.logits, &step.partials);
        let (sampling, seen) = (&sample.sampling, &sample.seen);
        let vocab_size = self.config().vocab_size as u32;
        let logits_stride = self.model.logits_stride() as u32;
        let seen_words = seen.shape()[1] as u32;
        let bindings = SamplePartialBindings { rows, logits, sampling, seen, partials };
        let params = SamplePartialParams { vocab_size, logits_stride, seen_words };
        SamplePartial::new(plan.gpu().caps()).record(plan, bindings, params)?;
        let (next_rows, results) = (&sample.next_rows, &sample.results);
        let bindings = SampleTokenBindings { rows, logits, sampling, partials, seen, next_rows, results };
        let params = SampleTokenParams { vocab_size, logits_stride, seen_words };
        SampleToken::new(plan.gpu().caps()).record(plan, bindings, params)
    }
}

/// What a linear kernel reads.
#[derive(Clone, Copy)]
enum Input<'a> {
    Compact { x: &'a Tensor },
    Stream { x: &'a Tensor },
    Norm { x: &'a Tensor, weight: &'a Tensor },
    Merge { partial: &'a Tensor, stats: &'a Tensor, num_splits: u32, head_dim: u32 },
}

struct RouterInput<'a> {
    x: &'a Tensor,
    by_row: bool,
    scale: f32,
}
