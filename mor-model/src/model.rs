//! [`MorModel`]: a model on the device. Its weights, layouts and sizes, and what decides how deep its tokens go.

use mor_kernels::ops::{AttentionShape, RouterToken};
use mor_kernels::rows::KvTable;
use mor_kernels::tensor::{DType, Tensor};
use mor_kernels::{Gpu, KernelError, Result};

use crate::device_weights::{DeviceWeights, Precision, device_head_dim};
use crate::{Checkpoint, DepthControl, KvLayout, LayerLayout, Mode, ModelError, MorConfig};

/// How a batch of decoding sequences goes through the recursions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Batching {
    /// A step takes every token through all its recursions; it lasts as long as its deepest token.
    Lockstep,
    /// A tick takes every token through one recursion, whichever is its next: continuous depth-wise batching.
    Depthwise,
}

/// A model on the device.
#[derive(Clone, Debug)]
pub struct MorModel {
    gpu: Gpu,
    config: MorConfig,
    layout: LayerLayout,
    kv_layout: KvLayout,
    precision: Precision,
    kv_dtype: DType,
    weights: DeviceWeights,
    batching: Batching,
    depth: DepthControl,
    script: Option<Script>,
}

/// Routing by draws in place of an expert-choice model's routers, for measurements alone: the routers of random weights
/// mean nothing, and what a token computes depends on its depth. Of n tokens in a row `shares[r] * n` take recursion r, but for
/// a few, as top-k routing has exactly so many of a sequence take it; whatever the capacity and the router bias. Routers still run and
/// gate, so the cost is that of the model.
///
/// Draws depend on the seed, the token's position and its sequence's slot, on nothing that was computed.
/// Top-k routing of full sequences does not follow them.
#[derive(Clone, Debug, PartialEq)]
pub struct ScriptedRouter {
    /// Seed of the draws.
    pub seed: u64,
    /// Per recursion, the share of all tokens that takes it, if it takes those before.
    pub shares: Vec<f64>,
}

impl ScriptedRouter {
    /// Depths as the capacities give them: a share of `capacity[r]` of all tokens takes recursion r, so the mean depth is
    /// the sum of the capacities.
    pub fn by_capacity(config: &MorConfig, seed: u64) -> Self {
        Self { seed, shares: config.capacity.clone() }
    }

    /// Every token takes all recursions.
    pub fn full_depth(config: &MorConfig) -> Self {
        Self { seed: 0, shares: vec![1.0; config.num_recursions] }
    }
}

/// A [`ScriptedRouter`] on the device.
#[derive(Clone, Debug)]
struct Script {
    router: ScriptedRouter,
    /// `[R]` f32.
    shares: Tensor,
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
        let kv_dtype = precision.kv_dtype();
        Ok(Self { gpu, config, layout, kv_layout, precision, kv_dtype, weights, batching, depth, script })
    }

    /// The model with keys and values in 8 bits, from the caches on that are made then: half the memory of f16, in
    /// [blocks](mor_kernels::kv_blocks). Decode steps are layer by layer then.
    #[must_use]
    pub fn with_packed_kv(mut self) -> Self {
        self.kv_dtype = DType::Block8;
        self
    }

    /// Element type of K/V caches.
    pub fn kv_dtype(&self) -> DType {
        self.kv_dtype
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
        if script.shares.len() != num_recursions || !script.shares.iter().all(|share| (0.0..=1.0).contains(share)) {
            let expected = format!("{num_recursions} shares from 0 to 1, one a recursion");
            return unfit("shares", format!("{:?}", script.shares), expected);
        }
        let shares: Vec<f32> = script.shares.iter().map(|share| *share as f32).collect();
        let shares = Tensor::from_slice(&self.gpu, "shares", DType::F32, &[num_recursions], &shares)?;
        self.script = Some(Script { router: script.clone(), shares });
        Ok(self)
    }

    /// What the values that expert choice decides by are compared with.
    pub(crate) fn threshold(&self) -> f32 {
        // A script's values are signs.
        if self.script.is_some() { 0.0 } else { self.depth.threshold() }
    }

    /// Whether every token that comes as far as recursion `r` takes it.
    pub(crate) fn takes_all(&self, r: usize) -> bool {
        let shares = self.script.as_ref().map_or(&self.config.capacity, |script| &script.router.shares);
        shares.get(r).is_none_or(|share| *share >= 1.0)
    }

    /// The seed and the shares of the script that routes, if one does.
    pub(crate) fn script(&self) -> Option<(u64, &Tensor)> {
        self.script.as_ref().map(|script| (script.router.seed, &script.shares))
    }

    /// Whether the first and the last layer, or of a vanilla model all, are in no recursion.
    pub(crate) fn has_unshared_layers(&self) -> bool {
        self.config.mode == Mode::Vanilla || self.config.sharing.is_middle()
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
            kv_dtype: self.kv_dtype,
            kv_table: KvTable::Pages,
        }
    }

    /// How this model's decode batches can run best: depth-wise if all recursions share their weights.
    pub fn batching(&self) -> Batching {
        self.batching
    }
}
