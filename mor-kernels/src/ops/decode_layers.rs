//! Runs decode steps of one row, each from a token to its logits and the next token, in one dispatch.

mod products;
#[cfg(all(test, feature = "oracle"))]
mod tests;

use self::products::{Division, HEAD_PRODUCT, HEAD_TYPE, LAYER_PRODUCTS, LAYER_TYPE, Product, Teams, define_type};
use super::attention_decode::AttentionShape;
use super::grid_exchange::GridExchange;
use super::router_expert::{ExpertGate, check_router};
use super::router_token::TokenGate;
use super::sample_partial::{BEST_BYTES, SamplePartial};
use super::sample_token::{MIN_TEMPERATURE, SampleToken, check_sizes};
use crate::caps::DeviceCaps;
use crate::error::{KernelError, Result};
use crate::gpu::Gpu;
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::RowSet;
use crate::shader::Definitions;
use crate::tensor::{DType, Tensor};

/// How the row comes to its depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerRouting {
    /// It takes all layers: vanilla and recursive models.
    Fixed,
    /// A linear router before every recursion.
    Expert {
        /// The gate's function.
        gate: ExpertGate,
        /// A script decides in place of logits, as in [`RouterExpert`](super::RouterExpert).
        scripted: bool,
    },
    /// A linear router before the first recursion.
    Token {
        /// The gates' function.
        gate: TokenGate,
        /// Whether a bias takes part in the choice.
        bias: bool,
        /// Recursions R.
        num_recursions: u32,
    },
}

/// The kernel's sizes; what it is on a device, [`DecodeLayers`], follows from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayersShape {
    /// Elements of a residual stream C, a multiple of 8.
    pub hidden_size: u32,
    /// Elements inside the MLP, a multiple of 8.
    pub mlp_dim: u32,
    /// Tokens V.
    pub vocab_size: u32,
    /// Heads and caches; pages only.
    pub attention: AttentionShape,
    /// Type of the four matrices of layers.
    pub layer_dtype: DType,
    /// Type of the embeddings and of the head.
    pub head_dtype: DType,
    /// Type of the router.
    pub router_dtype: DType,
    /// How the row comes to its depth.
    pub routing: LayerRouting,
}

/// Decode steps of one row in one dispatch, whose workgroups wait for each other between the phases of a layer: embedding, layers,
/// head and draw. Without [`DecodeLayersParams::num_tokens`] a single one, and the draw comes after, from the list, the logits and the
/// partials that it leaves.
///
/// It needs a device that runs all of them at a time and whose coherent storage is coherent:
/// [`DecodeLayers::workgroups_to_try`] says how many may, a trial whether they do.
/// Should a workgroup ever wait in vain, the step ends without effect: `control[2]` is 1 and the row's flags are
/// [`ROW_FAILED`](crate::rows::ROW_FAILED).
///
/// # Source
/// Gupta, Stuart and Owens 2012, doi 10.1109/InPar.2012.6339596: persistent threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeLayers {
    /// Sizes.
    pub shape: LayersShape,
    /// Layers that a table of steps has room for.
    pub max_steps: u32,
    /// Threads of a workgroup: a power of two.
    pub workgroup_size: u32,
    /// Workgroups, all of which run at a time.
    pub num_workgroups: u32,
    /// Units of each of two rows of a layer's matrices that a lane has on their way, also before the activation is there.
    pub layer_prefetch: u32,
    /// The same of the head.
    pub head_prefetch: u32,
    /// Elements that a thread waits for at a time, or as many more as it stages next to each other.
    pub batch: u32,
    /// Keys that a lane fetches at a time.
    pub keys: u32,
}

/// [`LayerStep::flags`]: the first layer of a recursion's block.
pub const BLOCK_BEGIN: u32 = 1;
/// [`LayerStep::flags`]: the last layer of a recursion's block, whose gated output goes to the hidden stream.
pub const BLOCK_END: u32 = 2;
/// [`LayerStep::flags`]: every row that comes as far as the recursion takes it.
pub const ALWAYS: u32 = 4;

/// A layer of the step. Mirrors `struct LayerStep` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct LayerStep {
    /// Its place in the stack of q, k and v projections.
    pub qkv_proj: u32,
    /// In that of output projections.
    pub o_proj: u32,
    /// In that of gate and up projections.
    pub gate_up_proj: u32,
    /// In that of down projections.
    pub down_proj: u32,
    /// In that of norms, two a place.
    pub norms: u32,
    /// First slot of its caches within `keys` and `values`.
    pub first_slot: u32,
    /// Stream that it reads: 0 hidden, 1 running, 2 layer; the first alone without routing.
    pub input: u32,
    /// Stream that it writes; not looked at where a block ends.
    pub output: u32,
    /// Recursion that it belongs to, or [`NONE`](crate::rows::NONE).
    pub recursion: u32,
    /// [`BLOCK_BEGIN`], [`BLOCK_END`] and [`ALWAYS`].
    pub flags: u32,
    /// K/V group that it stores in and attends to.
    pub group: u32,
    /// Unused; uniform arrays have strides of 16 bytes.
    pub reserved: u32,
}

/// Constants of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct DecodeLayersParams {
    /// Layers of the step.
    pub num_steps: u32,
    /// If not 0, rounds of waiting for each other in place of the step: whether this very kernel's workgroups run at a time.
    pub trial_rounds: u32,
    /// Polls after which a value is given up, see [`GridExchange::POLL_LIMIT`].
    pub poll_limit: u32,
    /// K/V groups.
    pub num_groups: u32,
    /// Pages a table has room for.
    pub max_pages: u32,
    /// K/V group of the layers in no recursion, or [`NONE`](crate::rows::NONE).
    pub unshared_group: u32,
    /// Whether a block's output is added without its gate.
    pub additive: u32,
    /// Recursions that the row may take.
    pub max_depth: u32,
    /// Recursions R.
    pub num_recursions: u32,
    /// Tokens V.
    pub vocab_size: u32,
    /// Elements of the logits, V at least.
    pub logits_stride: u32,
    /// Words of a sequence's seen bits: `ceil(V / 32)`.
    pub seen_words: u32,
    /// The first step after the shared block.
    pub coda: u32,
    /// What recursions are added to in the row's depth: 1 in vanilla models.
    pub base_depth: u32,
    /// Place of the head's norm within `norms`, in vectors.
    pub final_norm: u32,
    /// Seed of the script, low half.
    pub seed_low: u32,
    /// High half.
    pub seed_high: u32,
    /// Added to the mean square.
    pub eps: f32,
    /// Multiplies scores.
    pub attention_scale: f32,
    /// Multiplies the router's product.
    pub input_scale: f32,
    /// Multiplies sigmoid, tanh or softmax.
    pub alpha: f32,
    /// What expert choice compares logits with.
    pub threshold: f32,
    /// Added to token choice's scores once per recursion.
    pub depth_bias: f32,
    /// Tokens that the kernel draws, fewer than [`SampleToken::RESULTS`]: it goes on with the row that follows each, until the sequence
    /// ends. Only where the most likely token or one of all tokens is drawn: [`GpuSampling::is_plain`](super::GpuSampling::is_plain).
    /// 0: it stops at the logits, and [`SampleToken`] draws.
    pub num_tokens: u32,
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct DecodeLayersBindings<'a> {
    /// Uniform of [`LayerStep`], as many as the table has room for.
    pub steps: &'a Tensor,
    /// `[1]` of [`Row`](crate::rows::Row); written where the kernel draws, and where a workgroup waits in vain.
    pub rows: &'a Tensor,
    /// Of one row or more: the row if a token is to be drawn, or none. Its counts are not written: a
    /// [`fixed`](RowSet::fixed) set.
    pub sampled: &'a RowSet,
    /// `[matrices, q and kv columns, C]`.
    pub qkv_proj: &'a Tensor,
    /// `[matrices, C, q columns]`.
    pub o_proj: &'a Tensor,
    /// `[matrices, 2 mlp_dim, C]`.
    pub gate_up_proj: &'a Tensor,
    /// `[matrices, C, mlp_dim]`.
    pub down_proj: &'a Tensor,
    /// `[2 * layers + 1, C]` f32: of each layer before attention and before the MLP; somewhere the head's.
    pub norms: &'a Tensor,
    /// `[positions, head_dim / 2]` of (cos, sin).
    pub rope: &'a Tensor,
    /// `[sequences, num_groups, max_pages]` u32.
    pub pages: &'a Tensor,
    /// `[sequences, num_groups]` u32; updated for the recursions that the row takes.
    pub kv_lengths: &'a Tensor,
    /// `[1]` u32: recursions taken.
    pub depth: &'a Tensor,
    /// `[slots of all caches, kv columns]`.
    pub keys: &'a Tensor,
    /// `[slots of all caches, kv columns]`.
    pub values: &'a Tensor,
    /// `[1, V]` f32, V up to the next even number.
    pub logits: &'a Tensor,
    /// `[DecodeLayers::mail_elems(), 2]` u32, zeros before the first call: results on their way.
    pub mail: &'a Tensor,
    /// `[4 + R]` u32, zeros before the first call; then the last tag that is taken, 0, 1 if a workgroup waited in vain, 0, and
    /// the rows that took each recursion.
    pub control: &'a Tensor,
    /// `[V, C]`.
    pub embed_tokens: &'a Tensor,
    /// `[V, C]`; may be the same.
    pub lm_head: &'a Tensor,
    /// `[sequences]` of [`GpuSampling`](super::GpuSampling).
    pub sampling: &'a Tensor,
    /// `[sequences, seen_words]` u32: a bit for every token of the sequence so far.
    pub seen: &'a Tensor,
    /// `[num_workgroups, 4]` u32, written unless the kernel draws: as [`SamplePartial`] of the tokens whose logits are a workgroup's.
    pub partials: &'a Tensor,
    /// `[sequences, RESULTS, 2]` u32, written where the kernel draws: as [`SampleToken`]'s.
    pub results: &'a Tensor,
    /// `[R, C]`, of routed models.
    pub router: Option<&'a Tensor>,
    /// Token choice: `[R]` f32; a script: `[R]` shares.
    pub bias_or_shares: Option<&'a Tensor>,
}

/// Keys up to which a workgroup has a head for itself, and those of each of several.
const ALONE_KEYS: u32 = 384;
const SPLIT_KEYS: u32 = 192;
/// Most workgroups that share a head.
const MAX_SPLITS: u32 = 16;

impl DecodeLayers {
    /// The kernel for `shape` on a device that runs `num_workgroups` workgroups at a time.
    ///
    /// # Errors
    /// [`KernelError::Limit`] if the device lacks what the kernel needs or is too small for the shape.
    pub fn new(caps: &DeviceCaps, shape: LayersShape, max_steps: u32, num_workgroups: u32) -> Result<Self> {
        // More threads would leave each few registers for what is on its way.
        let workgroup_size = caps.max_workgroup_size.min(512);
        // Measured on an H200.
        let prefetch = |dtype: DType| if dtype.is_quantized() { 3 } else { 4 };
        // What a thread has of a stream.
        let batch = shape.hidden_size.div_ceil(workgroup_size).next_power_of_two().clamp(2, 4);
        let kernel = Self {
            shape,
            max_steps,
            workgroup_size,
            num_workgroups,
            layer_prefetch: prefetch(shape.layer_dtype),
            head_prefetch: prefetch(shape.head_dtype),
            batch,
            keys: 2,
        };
        let refuse = |what, found: u32, limit: u32, why: &str| {
            Err(KernelError::Limit {
                kernel: Self::NAME,
                what,
                found: found.into(),
                limit: limit.into(),
                why: why.to_owned(),
                advice: "decode layer by layer",
            })
        };
        if !caps.coherent_storage || !caps.lanes().uses_subgroups() {
            return refuse("coherent storage and subgroups", 2, 0, "the device has not both, of which it needs");
        }
        let head_units = shape.attention.head_dim / 8;
        if head_units > caps.lanes().width() {
            return refuse(
                "units of a head",
                head_units,
                caps.lanes().width(),
                "lanes share a key, of which there are",
            );
        }
        let most = (shape.hidden_size / 2).min(shape.mlp_dim);
        if !(1..=most).contains(&num_workgroups) {
            return refuse(
                "workgroups",
                num_workgroups,
                most,
                "each has a part in what all wait for, of which there are",
            );
        }
        for division in kernel.divisions(caps) {
            let pairs = division.rows.div_ceil(2).div_ceil(num_workgroups);
            if pairs > workgroup_size {
                return refuse("pairs of outputs of a workgroup", pairs, workgroup_size, "it has threads");
            }
        }
        let storage = kernel.workgroup_storage_bytes(caps);
        if storage > caps.max_workgroup_storage_bytes {
            let limit = caps.max_workgroup_storage_bytes;
            return refuse("workgroup memory in bytes", storage, limit, "the device offers");
        }
        let buffers = 24;
        if buffers > caps.max_storage_buffers {
            return refuse("storage bindings", buffers, caps.max_storage_buffers, "the device offers");
        }
        Ok(kernel)
    }

    /// How many workgroups may run at a time on `gpu`, at most this kernel's, most first: as many as do of a kernel that takes as
    /// many threads and as much workgroup memory, then what is left if each processor has registers for fewer. Which of them do
    /// [`DecodeLayersParams::trial_rounds`] finds out. Waits for trials.
    ///
    /// # Errors
    /// As [`GridExchange::passes`].
    pub fn workgroups_to_try(&self, gpu: &Gpu) -> Result<Vec<u32>> {
        let storage = self.workgroup_storage_bytes(gpu.caps());
        let at_a_time = GridExchange::most_workgroups(gpu, self.workgroup_size, storage)?;
        let parts = [1, 2, 3, 4, 5, 6, 8, 16, 32].map(|part| (at_a_time / part).min(self.num_workgroups));
        let mut numbers: Vec<_> = parts.into_iter().filter(|number| *number > 0).collect();
        numbers.dedup();
        Ok(numbers)
    }

    /// K/V groups at most: a layer or more each, and that of layers in no recursion.
    fn max_groups(&self) -> u32 {
        self.max_steps + 1
    }

    /// Elements of the mail.
    pub fn mail_elems(&self) -> usize {
        let (heads, q_dim) = (self.shape.attention.num_attention_heads, self.q_dim());
        let attention = self.max_splits() * (q_dim + 2 * heads);
        let layer = 4 * self.shape.hidden_size + q_dim + 2 * self.kv_dim() + attention + self.shape.mlp_dim;
        // A draw takes four for each workgroup, behind the others; a trial two.
        (layer + 4 * self.num_workgroups) as usize
    }

    /// Elements next to each other that a thread stages of an activation: where matrices are quantised, eight become digits together.
    fn own_elems(&self) -> u32 {
        let quantized = self.shape.layer_dtype.is_quantized() || self.shape.head_dtype.is_quantized();
        if quantized { 8 } else { 1 }
    }

    fn q_dim(&self) -> u32 {
        self.shape.attention.num_attention_heads * self.shape.attention.head_dim
    }

    fn kv_dim(&self) -> u32 {
        self.shape.attention.num_key_value_heads * self.shape.attention.head_dim
    }

    /// Routers that are computed at a time, of routed models.
    fn routers(&self) -> Option<u32> {
        match self.shape.routing {
            LayerRouting::Fixed => None,
            LayerRouting::Expert { .. } => Some(1),
            LayerRouting::Token { num_recursions, .. } => Some(num_recursions),
        }
    }

    /// Residual streams: hidden alone, or with routing running and layer too.
    fn streams(&self) -> u32 {
        if self.shape.routing == LayerRouting::Fixed { 1 } else { 3 }
    }

    /// Most pairs of a stream's columns that are a workgroup's own.
    fn own_pairs(&self) -> u32 {
        (self.shape.hidden_size / 2).div_ceil(self.num_workgroups)
    }

    fn max_splits(&self) -> u32 {
        (self.num_workgroups / self.shape.attention.num_attention_heads).clamp(1, MAX_SPLITS)
    }

    /// Who multiplies on a device with `caps`.
    fn teams(&self, caps: &DeviceCaps) -> Teams {
        let lanes = caps.lanes().width();
        Teams { workgroups: self.num_workgroups, teams: self.workgroup_size / lanes, lanes }
    }

    /// How the four products of a layer are divided: q, k and v; output; gate and up; down.
    fn divisions(&self, caps: &DeviceCaps) -> [Division; 4] {
        let (hidden_size, mlp_dim) = (self.shape.hidden_size, self.shape.mlp_dim);
        let by = self.teams(caps);
        let products = [
            [self.q_dim() + 2 * self.kv_dim(), hidden_size],
            [hidden_size, self.q_dim()],
            [2 * mlp_dim, hidden_size],
            [hidden_size, mlp_dim],
        ];
        products.map(|[rows, in_features]| {
            let (dtype, prefetch) = (self.shape.layer_dtype, self.layer_prefetch);
            Division::fastest(&Product { rows, in_features, dtype, prefetch, max_split: by.teams }, &by)
        })
    }

    /// How the head is divided. Its outputs, of which a workgroup has more than threads, go where they belong as soon as a team has
    /// them, so no teams share any.
    fn head_division(&self, caps: &DeviceCaps) -> Division {
        let (rows, in_features) = (self.shape.vocab_size, self.shape.hidden_size);
        let (dtype, prefetch) = (self.shape.head_dtype, self.head_prefetch);
        Division::fastest(&Product { rows, in_features, dtype, prefetch, max_split: 1 }, &self.teams(caps))
    }

    /// Where attention whose parts are merged is staged before it becomes digits: behind the output projection's activation.
    fn merged_place(&self, caps: &DeviceCaps) -> u32 {
        self.divisions(caps)[1].staged_vec4s
    }

    /// vec4s that are staged at a time, and partial sums.
    fn storage(&self, caps: &DeviceCaps) -> (u32, u32) {
        let Teams { teams, .. } = self.teams(caps);
        let divisions = self.divisions(caps);
        let layer = divisions.iter().map(|division| division.staged_vec4s).max().unwrap_or(0);
        let activation = layer.max(self.head_division(caps).staged_vec4s);
        let merged = self.merged_place(caps) + self.q_dim() / 4;
        let activation = if self.own_elems() == 1 { activation } else { activation.max(merged) };
        let partials = divisions.iter().map(|division| division.rounds * teams).max().unwrap_or(0);
        let head_quads = self.shape.attention.head_dim / 4;
        let parts = self.shape.attention.num_attention_heads * self.max_splits();
        (activation.max((3 + teams) * head_quads), partials.max(teams).max(parts))
    }

    /// Records the kernel over the row, if it takes part.
    ///
    /// # Errors
    /// [`KernelError::Limit`] for more than 2^18 tokens; [`KernelError::Shape`] if the mail or the partials are too small, sizes
    /// do not fit the vocabulary, the router has another size, or tensors are there without use or
    /// missing; else as [`PlanBuilder::dispatch`].
    pub fn record(&self, plan: &mut PlanBuilder<'_>, b: DecodeLayersBindings<'_>, p: DecodeLayersParams) -> Result<()> {
        let refuse = |what, found: String, expected: String| {
            Err(KernelError::Shape { kernel: Self::NAME, what, found, expected })
        };
        if p.num_steps > self.max_steps {
            return refuse("num_steps", p.num_steps.to_string(), format!("at most {}", self.max_steps));
        }
        if p.num_groups > self.max_groups() {
            return refuse("num_groups", p.num_groups.to_string(), format!("at most {}", self.max_groups()));
        }
        if b.mail.num_elems() < 2 * self.mail_elems() {
            let expected = format!("{} elements of 2", self.mail_elems());
            return refuse("mail", b.mail.num_elems().to_string(), expected);
        }
        if p.num_tokens >= SampleToken::RESULTS {
            return refuse("num_tokens", p.num_tokens.to_string(), format!("fewer than {}", SampleToken::RESULTS));
        }
        check_sizes(Self::NAME, p.vocab_size, p.logits_stride, p.seen_words)?;
        SamplePartial::check_partials(Self::NAME, b.partials, 1, self.num_workgroups)?;
        let (routed, extra) = match self.shape.routing {
            LayerRouting::Fixed => (false, false),
            LayerRouting::Expert { scripted, .. } => (true, scripted),
            LayerRouting::Token { bias, .. } => (true, bias),
        };
        if (b.router.is_some(), b.bias_or_shares.is_some()) != (routed, extra) {
            let found = format!("{:?}", (b.router.is_some(), b.bias_or_shares.is_some()));
            return refuse("router, and bias or script", found, format!("{:?}", (routed, extra)));
        }
        if let Some(router) = b.router {
            check_router(Self::NAME, router, self.shape.router_dtype, p.num_recursions, self.shape.hidden_size)?;
        }
        plan.dispatch(self, &b, &p, Grid::Fixed([self.num_workgroups, 1, 1]))
    }
}

impl Kernel for DecodeLayers {
    const NAME: &'static str = "decode_layers";
    type Params = DecodeLayersParams;
    type Bindings<'a> = DecodeLayersBindings<'a>;

    fn definitions(&self, caps: &DeviceCaps) -> Definitions {
        let shape = &self.shape;
        let (staged, team_sums) = self.storage(caps);
        let lanes = caps.lanes().width();
        let gate = match shape.routing {
            LayerRouting::Expert { gate: ExpertGate::Sigmoid, .. } => "SIGMOID",
            LayerRouting::Expert { gate: ExpertGate::Tanh, .. } => "TANH",
            LayerRouting::Token { gate: TokenGate::Softmax, .. } => "SOFTMAX",
            _ => "",
        };
        let is_token = matches!(shape.routing, LayerRouting::Token { .. });
        let mut definitions = Definitions::new()
            .u32("WORKGROUP_SIZE", self.workgroup_size)
            .u32("NUM_WORKGROUPS", self.num_workgroups)
            .u32("LANES", lanes)
            .u32("MAX_STEPS", self.max_steps)
            .u32("MAX_GROUPS", self.max_groups())
            .u32("HIDDEN_SIZE", shape.hidden_size)
            .u32("MLP_DIM", shape.mlp_dim)
            .u32("NUM_ATTENTION_HEADS", shape.attention.num_attention_heads)
            .u32("NUM_KEY_VALUE_HEADS", shape.attention.num_key_value_heads)
            .u32("HEAD_DIM", shape.attention.head_dim)
            .u32("KEY_LANES", (shape.attention.head_dim / 8).next_power_of_two())
            .u32("KEYS", self.keys)
            .u32("BATCH", self.batch)
            .u32("OWN", self.own_elems())
            .flag("DIGITS", self.own_elems() == 8)
            .u32("STREAM_TURNS", shape.hidden_size.div_ceil(self.own_elems() * self.workgroup_size))
            .u32("BATCH_TURNS", self.batch.div_ceil(self.own_elems()))
            .u32("ALONE_KEYS", ALONE_KEYS)
            .u32("SPLIT_KEYS", SPLIT_KEYS)
            .u32("MAX_SPLITS", self.max_splits())
            .u32("STAGED", staged)
            .u32("STAGED_MERGED", self.merged_place(caps))
            .u32("NUM_TEAM_SUMS", team_sums)
            .u32("STREAMS", self.streams())
            .u32("OWN_PAIRS", self.own_pairs())
            .f32("MIN_TEMPERATURE", MIN_TEMPERATURE)
            .u32("RESULTS", SampleToken::RESULTS)
            .flag("SUBGROUP", true)
            .flag("ROUTED", shape.routing != LayerRouting::Fixed)
            .flag("EXPERT", matches!(shape.routing, LayerRouting::Expert { .. }))
            .flag("TOKEN", is_token)
            .flag("SCRIPTED", matches!(shape.routing, LayerRouting::Expert { scripted: true, .. }))
            .flag("BIAS", matches!(shape.routing, LayerRouting::Token { bias: true, .. }))
            .flag("SIGMOID", gate == "SIGMOID")
            .flag("TANH", gate == "TANH")
            .flag("SOFTMAX", gate == "SOFTMAX")
            .flag("KV_F16", shape.attention.kv_dtype == DType::F16)
            .flag("ROUTER_F16", shape.router_dtype == DType::F16)
            .flag("ROUTER_BF16", shape.router_dtype == DType::BF16);
        definitions = define_type(definitions, &LAYER_TYPE, shape.layer_dtype, self.layer_prefetch);
        definitions = define_type(definitions, &HEAD_TYPE, shape.head_dtype, self.head_prefetch);
        if let Some(routers) = self.routers() {
            definitions = definitions.u32("ROUTERS", routers);
        }
        for (division, names) in self.divisions(caps).iter().zip(&LAYER_PRODUCTS) {
            definitions = division.define(definitions, names);
        }
        self.head_division(caps).define(definitions, &HEAD_PRODUCT)
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        let mut bindings = vec![
            Binding::uniform(1, b.steps),
            Binding::write(2, &b.sampled.active),
            Binding::weight(3, b.qkv_proj),
            Binding::weight(4, b.o_proj),
            Binding::weight(5, b.gate_up_proj),
            Binding::weight(6, b.down_proj),
            Binding::read(7, b.norms),
            Binding::read(8, b.rope),
            Binding::read(9, b.pages),
            Binding::write(10, b.kv_lengths),
            Binding::write(11, b.rows),
            Binding::write(12, b.depth),
            Binding::write(13, b.keys),
            Binding::write(14, b.values),
            Binding::write(15, b.logits),
            Binding::write(16, b.mail),
            Binding::write(17, b.control),
            // A row of it.
            Binding::read(18, b.embed_tokens),
            Binding::weight(19, b.lm_head),
            Binding::read(20, b.sampling),
            Binding::read(21, b.seen),
            Binding::write(22, b.partials),
            Binding::write(25, b.results),
        ];
        bindings.extend(b.router.map(|router| Binding::read(23, router)));
        bindings.extend(b.bias_or_shares.map(|tensor| Binding::read(24, tensor)));
        bindings
    }

    fn workgroup_storage_bytes(&self, caps: &DeviceCaps) -> u32 {
        let (staged, team_sums) = self.storage(caps);
        let Teams { teams, .. } = self.teams(caps);
        // Parts of the routers' products, and what is decided.
        let routing = self.routers().map_or(0, |routers| 8 + 4 * routers * teams);
        let is_scripted = matches!(self.shape.routing, LayerRouting::Expert { scripted: true, .. });
        let routing = routing + if is_scripted { 4 * self.max_groups() } else { 0 };
        let own_streams = 8 * self.streams() * self.own_pairs();
        16 * staged + 8 * team_sums + own_streams + 4 * teams + routing + BEST_BYTES + 12 * self.max_groups() + 32
    }
}
