//! [`LayersTensors`]: decode steps of one sequence in one dispatch, where model and device allow it.

use mor_kernels::ops::{
    ALWAYS, BLOCK_BEGIN, BLOCK_END, DecodeLayers, DecodeLayersBindings, DecodeLayersParams, ExpertGate, GridExchange,
    LayerRouting, LayerStep, LayersShape, TokenGate,
};
use mor_kernels::plan::PlanBuilder;
use mor_kernels::rows::{NONE, RowSet};
use mor_kernels::tensor::{DType, Tensor};
use mor_kernels::{KernelError, Result};

use crate::model::MorModel;
use crate::step_tensors::{KvTensors, SampleTensors, StepTensors};
use crate::{Gating, Mode, RouterFunc, UNSHARED_GROUP};

/// Streams of [`LayerStep`].
const HIDDEN: u32 = 0;
const RUNNING: u32 = 1;
const LAYER: u32 = 2;

/// Rounds of a trial of the kernel itself.
const TRIAL_ROUNDS: u32 = 100;

/// What steps need that are one dispatch, [`DecodeLayers`].
#[derive(Clone, Debug)]
pub struct LayersTensors {
    kernel: DecodeLayers,
    params: DecodeLayersParams,
    steps: Tensor,
    mail: Tensor,
    control: Tensor,
    /// What each workgroup would draw.
    partials: Tensor,
    /// The row to draw for; its grid is fixed.
    sampled: RowSet,
}

impl LayersTensors {
    /// For steps of `step`, which has room for one row and the tensor that its rows come from, over the caches `kv`,
    /// with draws as `sample` has them; `None` where the model has what the kernel has not
    /// (adapters, encodings, K/V that recursions share or of 8 bits, routers of two matrices or with an auxiliary one, layers of different
    /// types, a head of several parts), or the device cannot run it. Waits for trials of how many workgroups run at a time.
    ///
    /// # Errors
    /// [`KernelError`] of a device that fails otherwise.
    pub fn new(model: &MorModel, step: &StepTensors, kv: &KvTensors, sample: &SampleTensors) -> Result<Option<Self>> {
        let (Some(shape), Some(steps)) = (shape(model), steps(model, kv)) else { return Ok(None) };
        if step.capacity != 1 {
            return Ok(None);
        }
        let gpu = model.gpu();
        let (num_steps, config) = (steps.len() as u32, model.config());
        let most = (shape.hidden_size / 2).min(shape.mlp_dim);
        let largest = match DecodeLayers::new(gpu.caps(), shape, num_steps, most) {
            Ok(kernel) => kernel,
            Err(KernelError::Limit { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let table = Tensor::zeros_uniform(gpu, "layers", size_of_val(&steps[..]) as u64)?;
        gpu.write(&table, 0, bytemuck::cast_slice(&steps));
        let seed = model.script().map_or(0, |(seed, _)| seed);
        let params = DecodeLayersParams {
            num_steps,
            trial_rounds: 0,
            poll_limit: GridExchange::POLL_LIMIT,
            num_groups: model.kv_layout().num_groups() as u32,
            max_pages: kv.max_pages(),
            unshared_group: if model.has_unshared_layers() { UNSHARED_GROUP as u32 } else { NONE },
            additive: (config.gating == Gating::Additive).into(),
            max_depth: model.max_depth() as u32,
            num_recursions: config.num_recursions as u32,
            vocab_size: config.vocab_size as u32,
            logits_stride: model.logits_stride() as u32,
            seen_words: sample.seen.shape()[1] as u32,
            base_depth: (config.mode == Mode::Vanilla).into(),
            final_norm: 2 * config.num_hidden_layers as u32,
            coda: steps.iter().rposition(|step| step.recursion != NONE).map_or(0, |last| last as u32 + 1),
            seed_low: seed as u32,
            seed_high: (seed >> 32) as u32,
            eps: config.rms_norm_eps as f32,
            attention_scale: (config.head_dim as f64).sqrt().recip() as f32,
            input_scale: config.temp.recip() as f32,
            alpha: config.alpha as f32,
            threshold: model.threshold(),
            depth_bias: model.depth_control().router_bias,
            num_tokens: 0,
        };
        // The trial below is run in any case; what is kept saves the search. A software rasteriser needs none,
        // and passes trials that it should fail, since it ends loops.
        let name = format!("{largest:?}");
        let tuned = gpu.tuned(&name).filter(|_| !gpu.caps().is_cpu);
        let passing = |num_workgroups| -> Result<Option<Self>> {
            let Ok(kernel) = DecodeLayers::new(gpu.caps(), shape, num_steps, num_workgroups) else { return Ok(None) };
            let layers = Self {
                kernel,
                params,
                steps: table.clone(),
                mail: Tensor::zeros(gpu, "mail", DType::U32, &[kernel.mail_elems(), 2])?,
                control: Tensor::zeros(gpu, "control", DType::U32, &[4 + config.num_recursions])?,
                partials: Tensor::zeros(gpu, "partials", DType::U32, &[num_workgroups as usize, 4])?,
                sampled: step.sampled.fixed(),
            };
            let passes = layers.passes_trial(model, step, kv, sample)?;
            if passes {
                tracing::debug!(num_workgroups, layers = num_steps, "decode steps run their layers in one dispatch");
            }
            Ok(passes.then_some(layers))
        };
        if let Some(layers) = tuned.map_or(Ok(None), |number| passing(number.clamp(1, most)))? {
            return Ok(Some(layers));
        }
        for num_workgroups in largest.workgroups_to_try(gpu)? {
            if let Some(layers) = passing(num_workgroups)? {
                gpu.remember(&name, num_workgroups);
                return Ok(Some(layers));
            }
        }
        Ok(None)
    }

    /// Whether the kernel's workgroups run at a time.
    fn passes_trial(
        &self,
        model: &MorModel,
        step: &StepTensors,
        kv: &KvTensors,
        sample: &SampleTensors,
    ) -> Result<bool> {
        let gpu = model.gpu();
        let mut plan = PlanBuilder::new(gpu)?;
        let params = DecodeLayersParams { trial_rounds: TRIAL_ROUNDS, ..self.params };
        self.kernel.record(&mut plan, self.bindings(model, step, kv, sample), params)?;
        gpu.run(&plan.finish()?)?;
        let control: Vec<u32> = gpu.read(&self.control)?;
        Ok(control[2] == 0)
    }

    /// So many steps, one after the other, which draw their tokens themselves: for samplings that are
    /// [plain](mor_kernels::ops::GpuSampling::is_plain). 0 for a step whose token another kernel draws.
    #[must_use]
    pub fn with_tokens(mut self, num_tokens: usize) -> Self {
        self.params.num_tokens = num_tokens as u32;
        self
    }

    /// Records the steps from the row `step.rows` on. Of a step whose token they do not draw, that is to be done for the rows that are
    /// returned, of the parts that are returned.
    ///
    /// # Errors
    /// As [`PlanBuilder::dispatch`].
    pub(crate) fn record(
        &self,
        plan: &mut PlanBuilder<'_>,
        model: &MorModel,
        step: &StepTensors,
        kv: &KvTensors,
        sample: &SampleTensors,
    ) -> Result<Option<(&RowSet, &Tensor)>> {
        self.kernel.record(plan, self.bindings(model, step, kv, sample), self.params)?;
        Ok((self.params.num_tokens == 0).then_some((&self.sampled, &self.partials)))
    }

    fn bindings<'a>(
        &'a self,
        model: &'a MorModel,
        step: &'a StepTensors,
        kv: &'a KvTensors,
        sample: &'a SampleTensors,
    ) -> DecodeLayersBindings<'a> {
        let weights = model.weights();
        let stacks = weights.stacks.as_ref().expect("shape() asks for them");
        let (keys, values, _) = kv.whole.as_ref().expect("steps() asks for them");
        let routers = weights.routers.as_ref();
        DecodeLayersBindings {
            steps: &self.steps,
            rows: &step.rows,
            sampled: &self.sampled,
            qkv_proj: &stacks.qkv_proj,
            o_proj: &stacks.o_proj,
            gate_up_proj: &stacks.gate_up_proj,
            down_proj: &stacks.down_proj,
            norms: &stacks.norms,
            rope: &kv.rope,
            pages: &kv.pages,
            kv_lengths: &kv.lengths,
            depth: &step.depth,
            keys,
            values,
            logits: &step.logits,
            mail: &self.mail,
            control: &self.control,
            embed_tokens: &weights.embed_tokens.shards[0].tensor,
            lm_head: &weights.lm_head.shards[0].tensor,
            sampling: &sample.sampling,
            seen: &sample.seen,
            partials: &self.partials,
            results: &sample.results,
            router: routers.map(|routers| &routers.router.output),
            bias_or_shares: model
                .script()
                .map(|(_, shares)| shares)
                .or(routers.and_then(|routers| routers.bias.as_ref())),
        }
    }

    /// Rows that took each recursion since these tensors were made; waits.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn rows_processed(&self, model: &MorModel) -> Result<Vec<u64>> {
        let control: Vec<u32> = model.gpu().read(&self.control)?;
        Ok(control[4..].iter().map(|rows| u64::from(*rows)).collect())
    }

    /// Has the next step end as if a workgroup had waited in vain, for tests of what follows then.
    #[doc(hidden)]
    pub fn give_up(&self, model: &MorModel) {
        model.gpu().write(&self.control, 8, bytemuck::bytes_of(&1_u32));
    }

    /// Workgroups that run at a time and wait for each other.
    pub fn num_workgroups(&self) -> u32 {
        self.kernel.num_workgroups
    }
}

/// The kernel's sizes, where it has all that the model needs.
fn shape(model: &MorModel) -> Option<LayersShape> {
    let (config, weights) = (model.config(), model.weights());
    weights.stacks.as_ref()?;
    let plain = weights.layers.iter().all(|layer| {
        layer.encoding.is_none() && layer.projections().iter().all(|projection| projection.adapter.is_none())
    });
    let linear =
        weights.routers.as_ref().is_none_or(|routers| routers.router.hidden.is_empty() && routers.aux.is_none());
    let (layer_dtype, head_dtype) = (weights.layers[0].o_proj.weight.dtype, weights.lm_head.dtype);
    let whole = [&weights.embed_tokens, &weights.lm_head]
        .iter()
        .all(|matrix| matrix.shards.len() == 1 && matrix.dtype == head_dtype);
    if !plain
        || !linear
        || !whole
        || model.kv_dtype() == DType::Block8
        || config.is_routed() != weights.routers.is_some()
    {
        return None;
    }
    let routing = match config.mode {
        Mode::Vanilla | Mode::Recursive => LayerRouting::Fixed,
        Mode::Expert => LayerRouting::Expert {
            gate: match config.router_func {
                RouterFunc::Sigmoid => ExpertGate::Sigmoid,
                RouterFunc::Tanh => ExpertGate::Tanh,
                _ => ExpertGate::None,
            },
            scripted: model.script().is_some(),
        },
        Mode::Token => LayerRouting::Token {
            gate: if config.router_func == RouterFunc::Sigmoid { TokenGate::Sigmoid } else { TokenGate::Softmax },
            bias: weights.routers.as_ref().is_some_and(|routers| routers.bias.is_some()),
            num_recursions: config.num_recursions as u32,
        },
    };
    Some(LayersShape {
        hidden_size: config.hidden_size as u32,
        mlp_dim: weights.layers[0].down_proj.weight.in_features as u32,
        vocab_size: config.vocab_size as u32,
        attention: model.attention_shape(),
        layer_dtype,
        head_dtype,
        router_dtype: weights.routers.as_ref().map_or(DType::F32, |routers| routers.router.output.dtype()),
        routing,
    })
}

/// The layers in the order in which they run, where every recursion stores keys and values of its own and its layers follow
/// one another.
fn steps(model: &MorModel, kv: &KvTensors) -> Option<Vec<LayerStep>> {
    let (config, layout, weights) = (model.config(), model.layout(), model.weights());
    let (_, _, first_slots) = kv.whole.as_ref()?;
    let mut steps = Vec::new();
    let mut before = None;
    for l in 0..config.num_hidden_layers {
        let recursion = layout.recursion(l);
        let place = model.kv_layout().layer(l);
        if place.write_group != Some(place.read_group) || place.fallback_group.is_some() {
            return None;
        }
        if recursion.is_some_and(|r| r as usize >= model.max_depth()) {
            continue;
        }
        let block = recursion.map_or(Vec::new(), |r| layout.block_layers(r));
        let (begins, ends) = (block.first() == Some(&l), block.last() == Some(&l));
        if recursion.is_some() && !begins && before != recursion {
            return None;
        }
        before = recursion;
        let is_routed = config.is_routed() && recursion.is_some();
        let input = match config.mode {
            _ if !is_routed => HIDDEN,
            _ if !begins => LAYER,
            Mode::Token if recursion > Some(0) => RUNNING,
            _ => HIDDEN,
        };
        let always = begins && config.mode == Mode::Expert && model.takes_all(recursion? as usize);
        let group = place.read_group as u32;
        let layer = &weights.layers[l];
        steps.push(LayerStep {
            qkv_proj: layer.qkv_proj.weight.place?,
            o_proj: layer.o_proj.weight.place?,
            gate_up_proj: layer.gate_up_proj.weight.place?,
            down_proj: layer.down_proj.weight.place?,
            norms: l as u32,
            first_slot: first_slots[place.buffer],
            input,
            output: if is_routed { LAYER } else { HIDDEN },
            recursion: recursion.unwrap_or(NONE),
            flags: (u32::from(begins) * BLOCK_BEGIN) | (u32::from(ends) * BLOCK_END) | (u32::from(always) * ALWAYS),
            group,
            reserved: 0,
        });
    }
    Some(steps)
}
