//! Runs a decode step of one row, from its token to its logits, in one dispatch.

mod products;

use self::products::{Division, HEAD_PRODUCT, HEAD_TYPE, LAYER_PRODUCTS, LAYER_TYPE, Product, Teams, define_type};
use super::attention_decode::AttentionShape;
use super::grid_exchange::GridExchange;
use super::router_expert::{ExpertGate, check_router};
use super::router_token::TokenGate;
use super::sample_partial::{BEST_BYTES, SamplePartial};
use super::sample_token::{MIN_TEMPERATURE, check_sizes};
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

/// A decode step of one row in one dispatch, whose workgroups wait for each other between the phases of a layer: embedding, layers
/// and head. The draw comes after, from the list, the logits and the partials that it leaves.
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
    /// Elements that a thread waits for at a time.
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
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct DecodeLayersBindings<'a> {
    /// Uniform of [`LayerStep`], as many as the table has room for.
    pub steps: &'a Tensor,
    /// `[1]` of [`Row`](crate::rows::Row); written where a workgroup waits in vain.
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
    /// `[num_workgroups, 4]` u32, written: as [`SamplePartial`] of the tokens whose logits are a workgroup's.
    pub partials: &'a Tensor,
    /// `[R, C]`, of routed models.
    pub router: Option<&'a Tensor>,
    /// Token choice: `[R]` f32; a script: `[R]` shares.
    pub bias_or_keep: Option<&'a Tensor>,
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
        let buffers = 23;
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
        // A trial takes two for each workgroup.
        layer.max(2 * self.num_workgroups) as usize
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
        check_sizes(Self::NAME, p.vocab_size, p.logits_stride, p.seen_words)?;
        SamplePartial::check_partials(Self::NAME, b.partials, 1, self.num_workgroups)?;
        let (routed, extra) = match self.shape.routing {
            LayerRouting::Fixed => (false, false),
            LayerRouting::Expert { scripted, .. } => (true, scripted),
            LayerRouting::Token { bias, .. } => (true, bias),
        };
        if (b.router.is_some(), b.bias_or_keep.is_some()) != (routed, extra) {
            let found = format!("{:?}", (b.router.is_some(), b.bias_or_keep.is_some()));
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
            .f32("MIN_TEMPERATURE", MIN_TEMPERATURE)
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
        ];
        bindings.extend(b.router.map(|router| Binding::read(23, router)));
        bindings.extend(b.bias_or_keep.map(|tensor| Binding::read(24, tensor)));
        bindings
    }

    fn workgroup_storage_bytes(&self, caps: &DeviceCaps) -> u32 {
        let (staged, team_sums) = self.storage(caps);
        let Teams { teams, .. } = self.teams(caps);
        // Parts of the routers' products, and what is decided.
        let routing = self.routers().map_or(0, |routers| 8 + 4 * routers * teams);
        let is_scripted = matches!(self.shape.routing, LayerRouting::Expert { scripted: true, .. });
        let routing = routing + if is_scripted { 4 * self.max_groups() } else { 0 };
        16 * staged + 8 * team_sums + 4 * teams + routing + BEST_BYTES + 12 * self.max_groups() + 12
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::ops::GpuSampling;
    use crate::oracle::decode_layers::{LayersState, decode_layers};
    use crate::oracle::sample_partial::sample_parts;
    use crate::oracle::sample_token::scores;
    use crate::parity::{self, Output, Rng, Tolerance};
    use crate::rows::{ActiveRow, KvTable, NONE, PAGE_SIZE, ROW_ACTIVE, ROW_FAILED, ROW_SAMPLE, Row};

    /// As in the shader.
    const FEW_TAGS_LEFT: u32 = 1 << 31;
    const MAX_PAGES: usize = 12;
    const NUM_PAGES: usize = 64;
    const NUM_RECURSIONS: usize = 3;
    const NUM_GROUPS: usize = 1 + NUM_RECURSIONS;
    /// Odd, and more than a round of one workgroup.
    const VOCAB_SIZE: u32 = 333;
    const TOKEN: u32 = 291;

    /// A model of a first layer, two layers that recur three times and a last layer, and one row of it.
    struct Case {
        shape: LayersShape,
        params: DecodeLayersParams,
        steps: Vec<LayerStep>,
        row: Row,
        /// That was taken before the step.
        last_tag: u32,
        state: LayersState,
        weights: [Tensor; 6],
        router: Option<Tensor>,
    }

    fn shape(sizes: [u32; 5], dtypes: [DType; 2], kv_dtype: DType, routing: LayerRouting) -> LayersShape {
        let [hidden_size, mlp_dim, num_attention_heads, num_key_value_heads, head_dim] = sizes;
        let kv_table = KvTable::Pages;
        let attention = AttentionShape { num_attention_heads, num_key_value_heads, head_dim, kv_dtype, kv_table };
        let [layer_dtype, head_dtype] = dtypes;
        let router_dtype = if layer_dtype.is_quantized() { DType::F16 } else { layer_dtype };
        let vocab_size = VOCAB_SIZE;
        LayersShape { hidden_size, mlp_dim, vocab_size, attention, layer_dtype, head_dtype, router_dtype, routing }
    }

    impl Case {
        /// At `position`, with as many entries in the recursions' caches as `lengths` says.
        fn new(
            gpu: &Gpu,
            rng: &mut Rng,
            shape: LayersShape,
            position: usize,
            lengths: [usize; NUM_RECURSIONS],
        ) -> Self {
            let (c, mlp_dim) = (shape.hidden_size as usize, shape.mlp_dim as usize);
            let head_dim = shape.attention.head_dim as usize;
            let (q_dim, kv_dim) = (
                shape.attention.num_attention_heads as usize * head_dim,
                shape.attention.num_key_value_heads as usize * head_dim,
            );
            let mut matrix = |rows: usize, columns: usize, dtype| parity::upload_weight(gpu, rng, rows, columns, dtype);
            let (layer_dtype, head_dtype) = (shape.layer_dtype, shape.head_dtype);
            let (qkv, qkv_proj) = matrix(4 * (q_dim + 2 * kv_dim), c, layer_dtype);
            let (o, o_proj) = matrix(4 * c, q_dim, layer_dtype);
            let (gate_up, gate_up_proj) = matrix(4 * 2 * mlp_dim, c, layer_dtype);
            let (down, down_proj) = matrix(4 * c, mlp_dim, layer_dtype);
            let (embed, embed_tokens) = matrix(VOCAB_SIZE as usize, c, head_dtype);
            let (head, lm_head) = matrix(VOCAB_SIZE as usize, c, head_dtype);
            let is_routed = shape.routing != LayerRouting::Fixed;
            let (router, router_values) = parity::upload_weight(gpu, rng, NUM_RECURSIONS, c, shape.router_dtype);

            let mut pages: Vec<u32> = (0..NUM_PAGES as u32).collect();
            for i in (1..pages.len()).rev() {
                pages.swap(i, rng.below(i + 1));
            }
            // The second of two sequences.
            pages.truncate(NUM_GROUPS * MAX_PAGES);
            let pages: Vec<u32> = std::iter::repeat_n(u32::MAX, pages.len()).chain(pages).collect();
            let mut kv_lengths = vec![7; NUM_GROUPS];
            kv_lengths.push(position as u32);
            kv_lengths.extend(lengths.map(|length| length as u32));
            let slot = |group: usize, key: usize| {
                let page = pages[(NUM_GROUPS + group) * MAX_PAGES + key / PAGE_SIZE as usize];
                page as usize * PAGE_SIZE as usize + key % PAGE_SIZE as usize
            };
            let cache_slots = NUM_PAGES * PAGE_SIZE as usize;
            let mut keys = vec![f32::NAN; 4 * cache_slots * kv_dim];
            let mut values = keys.clone();
            for (cache, groups) in [(0, 0..1), (1, 1..NUM_GROUPS), (2, 1..NUM_GROUPS), (3, 0..1)] {
                for group in groups {
                    let stored = if group == 0 { position } else { lengths[group - 1] };
                    for key in 0..stored {
                        for i in 0..kv_dim {
                            let at = (cache * cache_slots + slot(group, key)) * kv_dim + i;
                            for kv in [&mut keys, &mut values] {
                                let value = rng.normal();
                                let is_half = shape.attention.kv_dtype == DType::F16;
                                kv[at] = if is_half { half::f16::from_f32(value).to_f32() } else { value };
                            }
                        }
                    }
                }
            }
            let row = Row { token: TOKEN, position: position as u32, sequence: 1, flags: ROW_ACTIVE | ROW_SAMPLE };
            let mut steps = Vec::new();
            // The layers of the block are tied; norms are stored once for each.
            for (layer, matrix) in [0, 1, 2, 1, 2, 1, 2, 3].into_iter().enumerate() {
                let in_block = (1..7).contains(&layer);
                let first = in_block && layer % 2 == 1;
                let recursion = if in_block { (layer as u32 - 1) / 2 } else { NONE };
                let is_token = matches!(shape.routing, LayerRouting::Token { .. });
                let input = match (first, in_block) {
                    _ if !is_routed => 0,
                    (true, _) if is_token && recursion > 0 => 1,
                    (false, true) => 2,
                    _ => 0,
                };
                let ends = in_block && !first;
                steps.push(LayerStep {
                    qkv_proj: matrix,
                    o_proj: 3 - matrix,
                    gate_up_proj: matrix,
                    down_proj: matrix,
                    norms: layer as u32,
                    first_slot: matrix * cache_slots as u32,
                    input,
                    output: if first && is_routed { 2 } else { 0 },
                    recursion,
                    flags: (BLOCK_BEGIN * u32::from(first)) | (BLOCK_END * u32::from(ends)),
                    group: if in_block { 1 + recursion } else { 0 },
                    reserved: 0,
                });
            }
            let params = DecodeLayersParams {
                num_steps: steps.len() as u32,
                trial_rounds: 0,
                poll_limit: GridExchange::POLL_LIMIT,
                num_groups: NUM_GROUPS as u32,
                max_pages: MAX_PAGES as u32,
                unshared_group: 0,
                additive: 0,
                max_depth: NUM_RECURSIONS as u32,
                num_recursions: NUM_RECURSIONS as u32,
                vocab_size: VOCAB_SIZE,
                logits_stride: VOCAB_SIZE.next_multiple_of(2),
                seen_words: VOCAB_SIZE.div_ceil(32),
                coda: 7,
                base_depth: 0,
                final_norm: 2 * steps.len() as u32,
                seed_low: 3,
                seed_high: 4,
                eps: 1e-5,
                attention_scale: shape.attention.scale(),
                input_scale: 0.5,
                alpha: 0.7,
                threshold: 0.0,
                depth_bias: 0.0,
            };
            let state = LayersState {
                qkv_proj,
                o_proj,
                gate_up_proj,
                down_proj,
                embed_tokens,
                lm_head,
                norms: (0..(2 * steps.len() + 1) * c).map(|_| 1.0 + 0.1 * rng.normal()).collect(),
                rope: (0..(position + 1) * head_dim / 2)
                    .map(|i| [(i as f32 * 0.37).cos(), (i as f32 * 0.37).sin()])
                    .collect(),
                pages,
                kv_lengths,
                keys,
                values,
                router: router_values,
                bias_or_keep: vec![0.6, 0.5, 0.4],
                depth: 0,
                blocks: 0,
                logits: Vec::new(),
            };
            let router = is_routed.then_some(router);
            Self {
                shape,
                params,
                steps,
                row,
                last_tag: 0,
                state,
                weights: [qkv, o, gate_up, down, embed, head],
                router,
            }
        }

        /// Runs the kernel of `num_workgroups` and compares with the oracle; with `fails`, that nothing has changed.
        fn check(&self, gpu: &Gpu, what: &str, num_workgroups: u32, fails: bool) -> u32 {
            let max_steps = self.steps.len() as u32 + 3;
            let kernel = DecodeLayers::new(gpu.caps(), self.shape, max_steps, num_workgroups).expect("it fits");
            let caches = [&self.state.keys, &self.state.values].map(|cache| match self.shape.attention.kv_dtype {
                DType::F16 => {
                    let halves: Vec<_> = cache.iter().map(|v| half::f16::from_f32(*v)).collect();
                    Tensor::from_slice(gpu, "cache", DType::F16, &[halves.len()], &halves).expect("it fits")
                }
                _ => parity::upload(gpu, cache),
            });
            let logits = Output::new(gpu, VOCAB_SIZE.next_multiple_of(2) as usize);
            let mail = Output::from_words(gpu, &vec![0; 2 * kernel.mail_elems()]);
            let mut table = self.steps.clone();
            table.resize(max_steps as usize, LayerStep::default());
            let steps = Tensor::zeros_uniform(gpu, "steps", size_of_val(&table[..]) as u64).expect("it fits");
            gpu.write(&steps, 0, bytemuck::cast_slice(&table));
            let row = parity::upload_u32(gpu, bytemuck::cast_slice(&[self.row]));
            let sampled =
                RowSet::from_rows(gpu, "sampled", &[ActiveRow { row: 5, ..ActiveRow::ABSENT }]).expect("it fits");
            let kv_lengths = Output::from_words(gpu, &self.state.kv_lengths);
            let depth = Output::from_words(gpu, &[self.state.depth]);
            let sampling = GpuSampling {
                temperature: 0.8,
                repetition_penalty: 2.0,
                seed_low: 7,
                seed_high: 9,
                ..GpuSampling::default()
            };
            // Of the second of two sequences every third token.
            let seen_words = VOCAB_SIZE.div_ceil(32) as usize;
            let is_seen: Vec<u32> = (0..VOCAB_SIZE).step_by(3).collect();
            let mut seen = vec![0; 2 * seen_words];
            for token in &is_seen {
                seen[seen_words + *token as usize / 32] |= 1 << (token % 32);
            }
            let partials = Output::new(gpu, 4 * num_workgroups as usize);
            let control = Output::from_words(gpu, &[self.last_tag, 0, 0, 0, 0, 0, 0]);
            let extra = match self.shape.routing {
                LayerRouting::Expert { scripted: true, .. } | LayerRouting::Token { bias: true, .. } => {
                    Some(parity::upload(gpu, &self.state.bias_or_keep))
                }
                _ => None,
            };
            let bindings = DecodeLayersBindings {
                steps: &steps,
                rows: &row,
                sampled: &sampled,
                qkv_proj: &self.weights[0],
                o_proj: &self.weights[1],
                gate_up_proj: &self.weights[2],
                down_proj: &self.weights[3],
                norms: &parity::upload(gpu, &self.state.norms),
                rope: &parity::upload(gpu, self.state.rope.as_flattened()),
                pages: &parity::upload_u32(gpu, &self.state.pages),
                kv_lengths: &kv_lengths.tensor,
                depth: &depth.tensor,
                keys: &caches[0],
                values: &caches[1],
                logits: &logits.tensor,
                mail: &mail.tensor,
                control: &control.tensor,
                embed_tokens: &self.weights[4],
                lm_head: &self.weights[5],
                sampling: &parity::upload_u32(gpu, bytemuck::cast_slice(&[GpuSampling::default(), sampling])),
                seen: &parity::upload_u32(gpu, &seen),
                partials: &partials.tensor,
                router: self.router.as_ref(),
                bias_or_keep: extra.as_ref(),
            };
            let mut params = self.params;
            if fails {
                // A GPU runs as many as there are; there it is the first poll that is in vain.
                params.poll_limit = 1;
            }
            parity::run(gpu, |plan| plan.dispatch(&kernel, &bindings, &params, Grid::Fixed([num_workgroups, 1, 1])));

            let rows: Vec<Row> = gpu.read(&row).expect("the device answers");
            let listed: Vec<ActiveRow> = gpu.read(&sampled.active).expect("the device answers");
            if fails {
                assert_eq!(rows[0], Row { flags: ROW_FAILED, ..self.row }, "{what}: the row can be fed again");
                assert_eq!(kv_lengths.read_u32(gpu), self.state.kv_lengths, "{what}: lengths as before the step");
                assert_eq!(control.read_u32(gpu)[1..], [0, 1, 0, 0, 0, 0], "{what}");
                assert_eq!(listed[0], ActiveRow::ABSENT, "{what}: nothing to draw for");
                return 0;
            }
            let mut want = self.state.clone();
            decode_layers(&self.shape, &self.params, &self.steps, &self.row, &mut want);
            assert_eq!(rows[0], self.row, "{what}: the row stays");
            assert_eq!(depth.read_u32(gpu), [want.depth], "{what}: depth");
            let (sequence, position) = (self.row.sequence, self.row.position);
            let drawn = ActiveRow { row: 0, sequence, position, recursion: want.depth, ..ActiveRow::ABSENT };
            assert_eq!(listed[0], drawn, "{what}: what to draw for");
            assert_eq!(kv_lengths.read_u32(gpu), want.kv_lengths, "{what}: lengths");
            let took = |r: u32| u32::from(want.blocks > r);
            let tags = self.last_tag + 5 * self.steps.len() as u32 + 1;
            let are_few = tags >= FEW_TAGS_LEFT;
            let tags = if are_few { 0 } else { tags };
            assert_eq!(control.read_u32(gpu), [tags, 0, 0, 0, took(0), took(1), took(2)], "{what}: counts");
            assert_eq!(
                mail.read_u32(gpu).iter().all(|word| *word == 0),
                are_few,
                "{what}: mail is cleared with the tags"
            );
            // Eight layers of f32 sums, and keys and values whose last bit may turn.
            let is_half = self.shape.attention.kv_dtype == DType::F16;
            let tolerance = if is_half { Tolerance::F16 } else { Tolerance { absolute: 1e-4, relative: 1e-4 } };
            let got = &logits.read(gpu)[..VOCAB_SIZE as usize];
            parity::assert_close(&format!("{what} logits"), got, &want.logits, tolerance);
            let of_workgroup = |w: u32| -> Vec<usize> {
                let pairs = (w..VOCAB_SIZE.div_ceil(2)).step_by(num_workgroups as usize);
                pairs.flat_map(|pair| [2 * pair as usize, 2 * pair as usize + 1]).filter(|t| *t < got.len()).collect()
            };
            let parts: Vec<_> = (0..num_workgroups).map(of_workgroup).collect();
            let best = sample_parts(got, &sampling, &is_seen, position, &parts);
            let chances = scores(got, &sampling, &is_seen, position);
            for (w, (got, want)) in partials.read_u32(gpu).as_chunks::<4>().0.iter().zip(&best).enumerate() {
                assert_eq!(got[..2], want[..2], "{what}: most likely of workgroup {w}");
                // The logarithm of a device is off by some units in the last place.
                let as_good = got[3] == want[3] || chances[got[3] as usize] >= chances[want[3] as usize] - 1e-4;
                assert!(
                    as_good && parts[w].contains(&(got[3] as usize)),
                    "{what}: drawn of workgroup {w}: {got:?}, {want:?}"
                );
            }
            for (name, cache, want) in [("keys", &caches[0], &want.keys), ("values", &caches[1], &want.values)] {
                let got: Vec<f32> = if is_half {
                    let halves: Vec<half::f16> = gpu.read(cache).expect("the device answers");
                    halves.iter().map(|h| h.to_f32()).collect()
                } else {
                    gpu.read(cache).expect("the device answers")
                };
                // But for slots that hold nothing.
                let at: Vec<usize> = (0..want.len()).filter(|i| !want[*i].is_nan()).collect();
                let [got, want] = [&got, want].map(|list| at.iter().map(|i| list[*i]).collect::<Vec<f32>>());
                parity::assert_close(&format!("{what} {name}"), &got, &want, tolerance);
            }
            want.blocks
        }
    }

    /// Workgroups to test with: one where the shape lets it do all the work, and as many as run at a time, or some of them.
    fn grids(gpu: &Gpu, shape: &LayersShape) -> Vec<u32> {
        let most = GridExchange::most_workgroups(gpu, gpu.caps().max_workgroup_size.min(512), 24 << 10);
        // Registers may leave room for half as many.
        let most = (most.expect("the device answers") / 2).clamp(1, shape.hidden_size / 2);
        let mut grids = vec![1, most.min(3), most];
        grids.retain(|num_workgroups| DecodeLayers::new(gpu.caps(), *shape, 1, *num_workgroups).is_ok());
        grids.dedup();
        grids
    }

    fn on_fit_profiles(mut test: impl FnMut(&Gpu, &str)) {
        parity::on_every_profile(|gpu, profile| {
            if gpu.caps().coherent_storage && gpu.caps().lanes().uses_subgroups() {
                test(gpu, profile);
            }
        });
    }

    const SIZES: [[u32; 5]; 3] = [[64, 96, 6, 2, 16], [72, 200, 3, 3, 24], [160, 440, 5, 1, 64]];

    #[test]
    fn matches_oracle() {
        on_fit_profiles(|gpu, profile| {
            let mut rng = Rng::new("decode_layers");
            let expert = |gate, scripted| LayerRouting::Expert { gate, scripted };
            let token = |gate, bias| LayerRouting::Token { gate, bias, num_recursions: NUM_RECURSIONS as u32 };
            let routings = [
                LayerRouting::Fixed,
                expert(ExpertGate::Sigmoid, false),
                expert(ExpertGate::Tanh, true),
                expert(ExpertGate::None, false),
                token(TokenGate::Softmax, false),
                token(TokenGate::Sigmoid, true),
            ];
            // Of layers and head: those of models, then others.
            let dtypes = [
                [DType::F16, DType::F16],
                [DType::F32, DType::F32],
                [DType::Q4, DType::Q8],
                [DType::BF16, DType::BF16],
                [DType::Q8, DType::Q8],
                [DType::F32, DType::BF16],
                [DType::Q4, DType::Q4],
                [DType::F16, DType::Q8],
                [DType::BF16, DType::F32],
                [DType::Q8, DType::F16],
            ];
            // Every type and every routing; a driver takes seconds to compile each.
            let cases = (0..if profile == "checked" { 3 } else { 10 }).map(|i| (dtypes[i], routings[i % 6], i));
            for (dtypes, routing, i) in cases {
                let kv_dtype = if i % 2 == 0 { DType::F16 } else { DType::F32 };
                let shape = shape(SIZES[i % 3], dtypes, kv_dtype, routing);
                let (position, lengths) =
                    [(300, [300, 200, 33]), (0, [0, 0, 0]), (40, [40, 31, 2]), (1, [1, 0, 0])][i % 4];
                let mut case = Case::new(gpu, &mut rng, shape, position, lengths);
                case.params.additive = (i / 2 % 2) as u32;
                for num_workgroups in grids(gpu, &shape) {
                    let what = format!("{profile} {shape:?} position {position} x{num_workgroups}");
                    let blocks = case.check(gpu, &what, num_workgroups, false);
                    println!("{what}: {blocks} blocks");
                }
            }
        });
    }

    #[test]
    fn exits_at_every_depth() {
        on_fit_profiles(|gpu, profile| {
            let mut rng = Rng::new("decode_layers depth");
            let routing = LayerRouting::Expert { gate: ExpertGate::Sigmoid, scripted: true };
            let shape = shape(SIZES[0], [DType::F32; 2], DType::F32, routing);
            let grid = *grids(gpu, &shape).last().expect("one workgroup does");
            for keep in [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]] {
                let mut case = Case::new(gpu, &mut rng, shape, 50, [50, 40, 3]);
                case.state.bias_or_keep = keep.to_vec();
                let depth = keep.iter().take_while(|keep| **keep > 0.0).count() as u32;
                assert_eq!(case.check(gpu, &format!("{profile} {keep:?}"), grid, false), depth, "{profile} {keep:?}");
            }
            // Capacity 1 takes every row, whatever the script says.
            let mut case = Case::new(gpu, &mut rng, shape, 50, [50, 40, 3]);
            case.state.bias_or_keep = vec![0.0; 3];
            case.steps[1].flags |= ALWAYS;
            assert_eq!(case.check(gpu, "always", grid, false), 1);
        });
    }

    #[test]
    fn tags_are_counted_anew() {
        on_fit_profiles(|gpu, profile| {
            let mut rng = Rng::new("decode_layers tags");
            let shape = shape(SIZES[0], [DType::F32; 2], DType::F32, LayerRouting::Fixed);
            let mut case = Case::new(gpu, &mut rng, shape, 50, [50, 40, 3]);
            let grid = *grids(gpu, &shape).last().expect("one workgroup does");
            for below in [1000, 10, 0] {
                case.last_tag = FEW_TAGS_LEFT - below;
                case.check(gpu, &format!("{profile} {below} tags"), grid, false);
            }
        });
    }

    #[test]
    fn a_wait_in_vain_leaves_the_row_as_it_was() {
        on_fit_profiles(|gpu, profile| {
            let mut rng = Rng::new("decode_layers failure");
            let shape = shape(SIZES[0], [DType::F16; 2], DType::F16, LayerRouting::Fixed);
            let case = Case::new(gpu, &mut rng, shape, 50, [50, 40, 3]);
            case.check(gpu, profile, 32, true);
        });
    }

    #[test]
    fn says_why_it_cannot() {
        let caps = parity::gpu().caps().clone();
        let shape = shape([64, 8192, 4, 4, 16], [DType::F32; 2], DType::F32, LayerRouting::Fixed);
        let message = |caps: &DeviceCaps, shape, workgroups| {
            DecodeLayers::new(caps, shape, 8, workgroups).expect_err("must be refused").to_string()
        };
        let without = DeviceCaps { coherent_storage: false, ..caps.clone() };
        assert!(message(&without, shape, 4).contains("coherent storage and subgroups"));
        assert!(message(&caps, shape, 1).contains("pairs of outputs of a workgroup"));
        assert!(message(&caps, shape, 0).contains("workgroups"));
    }
}
