//! [`Recorder`]: records the steps and ticks of a [`MorModel`] as plans. It never submits, waits or loops over steps.
//!
//! Residual streams are `[T, C]` tensors that rows never leave: active rows are read and written through lists
//! ([`RowSet`]), so nothing is gathered into or scattered out of a batch, and a block costs what its active rows cost.
//!
//! Here is what comes in which order; the modules beneath have the rows of each part, layers, products, routers, and how
//! tokens become streams and streams tokens.

mod layer;
mod linear;
mod phase;
mod router;
mod rows;
mod tokens;

use mor_kernels::Result;
use mor_kernels::ops::{DepthRule, FirstRecursion, Selection, SlotPhase};
use mor_kernels::plan::PlanBuilder;
use mor_kernels::rows::RowSet;
use mor_kernels::tensor::Tensor;

use self::layer::{LayerEnd, LayerInput, Normed};
pub use self::phase::{MAX_FEW_ROWS, Phase};
use crate::model::MorModel;
use crate::step_tensors::{DepthwiseTensors, KvTensors, SampleTensors, StepTensors};
use crate::{KvStrategy, Mode, MorConfig, SharingStrategy, UNSHARED_GROUP, recursion_group};

/// How a full sequence is routed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Routing {
    /// Each token from its own state: what generation does.
    #[default]
    Causal,
    /// Expert choice selects the k best of the whole sequence, as in training; not causal.
    TopK,
}

/// The rows whose logits a step computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// Those flagged for sampling, and a token is drawn for each.
    Sampled,
    /// All.
    All,
}

/// The parts of a step or tick, as [`PlanBuilder::part`] is told: embedding and unshared first layer, the layers between with
/// their routers, unshared last layer with head and draw. Of a vanilla model the layers in the same places.
pub const PARTS: [&str; 3] = ["prelude", "block", "coda"];
const PRELUDE: &str = PARTS[0];
const BLOCK: &str = PARTS[1];
const CODA: &str = PARTS[2];

impl MorModel {
    /// Records a step over the rows in `step.rows`: embedding, layers, routing, head, and for
    /// [`LogitRows::Sampled`] the draw of the next token; then the last layer leaves a prompt's other rows at their keys
    /// and values. `after_recursion` is called where a recursion's results
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
        // Of a prompt's other rows nobody reads more than the last layer's keys and values. Other steps draw for every row.
        let draws_for_few = phase.is_prefill() && logit_rows == LogitRows::Sampled;
        let recorder = Recorder { model: self, step, kv, sample, phase, routing, draws_for_few };
        if let Some(layers) = &step.layers {
            plan.part(BLOCK);
            if let Some((sampled, partials)) = layers.record(plan, self, step, kv, sample)? {
                plan.part(CODA);
                recorder.record_token(plan, sampled, partials)?;
            }
            return Ok(());
        }
        plan.part(PRELUDE);
        let input = recorder.record_layers(plan, after_recursion)?;
        plan.part(CODA);
        if logit_rows == LogitRows::All {
            let stream = recorder.record_last_layer(plan, &step.all, input)?;
            return recorder.record_head(plan, stream, &step.all);
        }
        let group = (draws_for_few && recorder.has_unshared_last()).then_some(UNSHARED_GROUP);
        recorder.record_set(plan, Selection::Sample, 0, &step.sampled, group)?;
        let rows = if draws_for_few { &step.sampled } else { &step.all };
        let stream = recorder.record_last_layer(plan, rows, input)?;
        recorder.record_head(plan, stream, &step.sampled)?;
        recorder.record_draw(plan, &step.sampled)
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
        let (routing, draws_for_few) = (Routing::Causal, false);
        Recorder { model: self, step, kv, sample, phase, routing, draws_for_few }.record_tick(plan)
    }
}

/// A step or tick that is being recorded: whose it is, in which tensors, with which kernels.
struct Recorder<'a> {
    model: &'a MorModel,
    step: &'a StepTensors,
    kv: &'a KvTensors,
    sample: &'a SampleTensors,
    phase: Phase,
    routing: Routing,
    /// The results of the step are the tokens drawn for a few of its rows.
    draws_for_few: bool,
}

impl<'a> Recorder<'a> {
    fn config(&self) -> &'a MorConfig {
        self.model.config()
    }

    /// Embedding to the last layer but an unshared one; returns what that reads.
    fn record_layers(
        &self,
        plan: &mut PlanBuilder<'_>,
        after_recursion: &mut dyn FnMut(&mut PlanBuilder<'_>, usize),
    ) -> Result<LayerInput<'a>> {
        let (config, step) = (self.config(), self.step);
        let middle = config.sharing.is_middle();
        let layers = 0..config.num_hidden_layers - usize::from(self.has_unshared_last());
        match config.mode {
            Mode::Vanilla => {
                // A vanilla token takes its layers once: depth 1.
                self.record_set(plan, Selection::Fixed, 0, &step.all, Some(UNSHARED_GROUP))?;
                let out = &step.layer_out;
                self.record_embedding(plan, out)?;
                let mut input = LayerInput::from(out);
                for l in layers {
                    plan.part(if l == 0 { PRELUDE } else { BLOCK });
                    let end = LayerEnd::Between { out, next: l + 1 };
                    input.normed = self.record_layer(plan, l, [&step.all; 2], input, end)?;
                }
                Ok(input)
            }
            Mode::Recursive => {
                self.record_set(
                    plan,
                    Selection::Begin { first: None },
                    0,
                    &step.all,
                    middle.then_some(UNSHARED_GROUP),
                )?;
                for (r, set) in step.recursions.iter().enumerate() {
                    self.record_set(plan, Selection::Fixed, r, set, Some(recursion_group(r as u32)))?;
                }
                let out = &step.layer_out;
                self.record_embedding(plan, out)?;
                let mut input = LayerInput::from(out);
                for l in layers {
                    let recursion = self.model.layout().recursion(l);
                    plan.part(if recursion.is_some() { BLOCK } else { PRELUDE });
                    let set = recursion.map_or(&step.all, |r| &step.recursions[r as usize]);
                    let rows = self.record_ends(plan, l, set)?;
                    let goes_on = l + 1 < config.num_hidden_layers && self.model.layout().recursion(l + 1) == recursion;
                    let end = if goes_on { LayerEnd::Between { out, next: l + 1 } } else { LayerEnd::Stream(out) };
                    input.normed = self.record_layer(plan, l, [rows, set], input, end)?;
                }
                Ok(input)
            }
            Mode::Expert | Mode::Token => {
                let first = self.first_recursion();
                self.record_set(plan, Selection::Begin { first }, 0, &step.all, middle.then_some(UNSHARED_GROUP))?;
                if config.sharing == SharingStrategy::MiddleCycle {
                    self.record_embedding(plan, &step.layer_out)?;
                    let (input, end) = (LayerInput::from(&step.layer_out), LayerEnd::Stream(&step.hidden));
                    self.record_layer(plan, 0, [&step.all; 2], input, end)?;
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
                Ok(LayerInput::from(&step.hidden))
            }
        }
    }

    /// Whether the last layer is in no recursion: of vanilla models too.
    fn has_unshared_last(&self) -> bool {
        self.model.layout().recursion(self.config().num_hidden_layers - 1).is_none()
    }

    /// The last layer over `rows` of `input`, and its keys and values of all, unless it is in a recursion; returns the stream that
    /// holds the result.
    fn record_last_layer(
        &self,
        plan: &mut PlanBuilder<'_>,
        rows: &RowSet,
        input: LayerInput<'a>,
    ) -> Result<&'a Tensor> {
        if !self.has_unshared_last() {
            return Ok(input.stream);
        }
        let (last, out) = (self.config().num_hidden_layers - 1, &self.step.layer_out);
        self.record_layer(plan, last, [rows, &self.step.all], input, LayerEnd::Stream(out))?;
        Ok(out)
    }

    /// The rows over which layer `l` of a recursion runs, whose keys and values are stored for all of `set`: of the last layer of all,
    /// those that are drawn for where these are few.
    fn record_ends<'s>(&'s self, plan: &mut PlanBuilder<'_>, l: usize, set: &'s RowSet) -> Result<&'s RowSet> {
        let (step, recursion) = (self.step, self.model.layout().recursion(l));
        let is_last = |r: &u32| {
            *r as usize + 1 == self.model.max_depth() && self.model.layout().block_layers(*r).last() == Some(&l)
        };
        match recursion.filter(is_last).filter(|_| self.draws_for_few && !self.has_unshared_last()) {
            None => Ok(set),
            Some(r) => {
                self.record_set(plan, Selection::Ends, r as usize, &step.sampled, Some(recursion_group(r)))?;
                Ok(&step.sampled)
            }
        }
    }

    /// The first recursion of expert choice where it takes all rows, whatever the router says: their list is made with that of all rows,
    /// and the router has the gates left to say. Lists of slots are made apart: both lists and a table of slots are more
    /// bindings than WebGPU's default limits have.
    fn first_recursion(&self) -> Option<FirstRecursion<'a>> {
        let (config, step) = (self.config(), self.step);
        let takes_all = config.mode == Mode::Expert && self.routing == Routing::Causal && self.model.takes_all(0);
        (takes_all && config.kv != KvStrategy::Hybrid)
            .then(|| FirstRecursion { active: &step.recursions[0], group: recursion_group(0) as u32 })
    }

    /// Lists the rows that take recursion `r` by expert choice.
    fn record_expert_set(&self, plan: &mut PlanBuilder<'_>, r: usize) -> Result<()> {
        let step = self.step;
        // The K/V sharing strategies need every token's keys of the first recursion.
        let keep_all = r == 0 && self.config().kv != KvStrategy::RecursionWise;
        let selection = match self.routing {
            Routing::Causal => {
                let decision = step.aux_logits.get(r).unwrap_or(&step.router_logits[r]);
                let (threshold, always) = (self.model.threshold(), self.model.takes_all(r));
                Selection::Expert { decision, threshold, always, keep_all }
            }
            Routing::TopK => {
                let (decision, threshold) = (&step.topk_decision, 0.0);
                Selection::Expert { decision, threshold, always: false, keep_all }
            }
        };
        self.record_set(plan, selection, r, &step.recursions[r], Some(recursion_group(r as u32)))
    }

    fn record_recursion(&self, plan: &mut PlanBuilder<'_>, r: usize) -> Result<()> {
        let (config, step) = (self.config(), self.step);
        let candidates = if r == 0 { &step.all } else { &step.recursions[r - 1] };
        let set = &step.recursions[r];
        let mut input = LayerInput::from(&step.hidden);
        if config.mode == Mode::Expert {
            let first_layer = &self.model.weights().layers[self.model.layout().block_layers(r as u32)[0]];
            let norm_weight = Some(&first_layer.input_layernorm).filter(|_| self.routers_norm(candidates));
            if norm_weight.is_some() {
                input.normed = Normed::ByRow;
            }
            self.record_expert_router(plan, r, candidates, r, norm_weight)?;
            self.record_topk(plan, r)?;
            if r > 0 || self.first_recursion().is_none() {
                self.record_expert_set(plan, r)?;
            }
        } else {
            if r == 0 {
                self.record_token_router(plan)?;
            }
            self.record_set(plan, Selection::Token, r, set, Some(recursion_group(r as u32)))?;
        }
        if config.mode == Mode::Token && r > 0 {
            input.stream = &step.running;
        }
        self.record_block(plan, r, set, input)
    }

    /// The layers of recursion `r` over the rows of `set`; in depth-wise batching, where `r` is 0, of any recursion.
    fn record_block(&self, plan: &mut PlanBuilder<'_>, r: usize, set: &RowSet, input: LayerInput<'a>) -> Result<()> {
        let (mut input, step) = (input, self.step);
        let out = &step.layer_out;
        let layers = self.model.layout().block_layers(r as u32);
        // In depth-wise batching some rows store, and the others read the first recursion's cache.
        let some_store = step.depthwise.is_some() && self.config().kv == KvStrategy::Sharing;
        let stores = if some_store { &self.depthwise().at } else { set };
        for (j, l) in layers.iter().enumerate() {
            let end = match self.config().mode {
                _ if j + 1 < layers.len() => LayerEnd::Between { out, next: layers[j + 1] },
                Mode::Expert | Mode::Token => LayerEnd::Block { gates: r },
                Mode::Vanilla | Mode::Recursive => LayerEnd::Stream(&step.hidden),
            };
            let rows = self.record_ends(plan, *l, set)?;
            let normed = self.record_layer(plan, *l, [rows, stores], input, end)?;
            input = LayerInput { stream: out, normed };
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
            let end = LayerEnd::Stream(&step.layer_out);
            self.record_layer(plan, last, [&step.sampled; 2], stream.into(), end)?;
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
            self.record_layer(plan, 0, [all; 2], (&step.layer_out).into(), end)?;
        } else {
            self.record_embedding(plan, &step.hidden)?;
            if token {
                self.record_embedding(plan, &step.running)?;
            }
        }
        match config.mode {
            Mode::Expert => self.record_expert_router(plan, 0, all, 0, None)?,
            Mode::Token => self.record_token_router(plan)?,
            Mode::Vanilla | Mode::Recursive => {}
        }

        plan.part(BLOCK);
        self.record_slots(plan, SlotPhase::Block(rule), block, true)?;
        if config.kv == KvStrategy::Sharing {
            // Those that store keys and values.
            self.record_slots(plan, SlotPhase::At(0), &self.depthwise().at, true)?;
        }
        self.record_block(plan, 0, block, if token { &step.running } else { &step.hidden }.into())?;
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
            return self.record_expert_router(plan, 1, block, 0, None);
        }
        let at = &self.depthwise().at;
        for r in 1..max_depth {
            self.record_slots(plan, SlotPhase::At(r as u32 - 1), at, false)?;
            self.record_expert_router(plan, r, at, 0, None)?;
        }
        Ok(())
    }

    fn depthwise(&self) -> &'a DepthwiseTensors {
        self.step.depthwise.as_ref().expect("the tensors were made for depth-wise batching")
    }
}
