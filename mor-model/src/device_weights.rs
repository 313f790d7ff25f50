//! [`DeviceWeights`]: a checkpoint's tensors on the device, fused and interleaved for the kernels.
//!
//! What the loader does to a tensor, and why:
//!
//! * q, k and v of a layer become one matrix, so that one dispatch reads the normalised input once. Rows of q and k are
//!   interleaved inside each head, (0, D/2, 1, D/2 + 1, ...): the two halves of a rotary pair are adjacent columns, and
//!   scores do not change because q and k are permuted alike.
//! * gate and up become one matrix of alternating rows, so that SwiGLU happens where both meet.
//! * Input sizes and heads are padded to a multiple of 8 and output sizes to an even number, with zeros.
//! * A matrix larger than one storage binding is split by rows into shards.
//! * Tied tensors are uploaded once.
//! * Matrices of a kind lie in one buffer, layer after layer, where one binding holds them: a kernel that runs more than a layer
//!   binds them all.
//! * The adapters of fused projections are one adapter: their first factors are stacked, and each row of the second has
//!   zeros for the others' ranks. Rows lie as those of the projection, so results need no order of their own.
//! * Quantised rows stay as they are stored: their groups lie along the inputs, which none of this moves.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::time::Instant;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use mor_kernels::tensor::{DType, Tensor};
use mor_kernels::upload::{Destination, Upload};
use mor_kernels::{Gpu, Result};

use crate::weights::decode_row;
use crate::{Checkpoint, Dtype, KvStrategy, LayerTensor, LayerTensors, LoraTensors, TensorId};

/// How numbers are stored on the device; sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Weights in the type of the file (16-bit types are exact in f32), K/V in f32.
    F32,
    /// f32 weights narrowed to f16, other types as in the file, K/V in f16.
    F16,
}

impl Precision {
    /// `f32` or `f16`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::F16 => "f16",
        }
    }

    /// Element type of K/V caches, but of those that are [packed](crate::MorModel::with_packed_kv).
    pub const fn kv_dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::F16 => DType::F16,
        }
    }

    /// The type a tensor stored as `dtype` has on the device.
    pub const fn weight_dtype(self, dtype: Dtype) -> DType {
        match (self, dtype) {
            (Precision::F32, Dtype::F32) => DType::F32,
            (Precision::F16, Dtype::F32) | (_, Dtype::F16) => DType::F16,
            (_, Dtype::BF16 | Dtype::Q8 | Dtype::Q4) => dtype.on_device(),
        }
    }
}

/// Consecutive rows of a [`Matrix`] in one tensor.
#[derive(Clone, Debug)]
pub struct Shard {
    /// `[num_rows, in_features]`.
    pub tensor: Tensor,
    /// Row of the matrix where the shard starts; a multiple of 4.
    pub first_row: usize,
    /// Rows of the shard; even.
    pub num_rows: usize,
}

/// A weight matrix `[num_rows, in_features]` on the device, padded.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Its parts, in row order.
    pub shards: Vec<Shard>,
    /// Rows, padded to an even number.
    pub num_rows: usize,
    /// Elements of a row, padded to a multiple of 8.
    pub in_features: usize,
    /// Element type.
    pub dtype: DType,
    /// Its place in the stack of the matrices of its kind, where there is one; see [`LayerStacks`].
    pub(crate) place: Option<u32>,
}

/// The matrices of all layers by kind, one after the other, and all norms: what a kernel binds that runs more than a layer.
#[derive(Clone, Debug)]
pub(crate) struct LayerStacks {
    /// `[matrices, q and kv columns, C]`.
    pub(crate) qkv_proj: Tensor,
    /// `[matrices, C, q columns]`.
    pub(crate) o_proj: Tensor,
    /// `[matrices, 2 I, C]`.
    pub(crate) gate_up_proj: Tensor,
    /// `[matrices, C, I]`.
    pub(crate) down_proj: Tensor,
    /// `[2 * layers + 1, C]` f32: two of each layer, and the head's.
    pub(crate) norms: Tensor,
}

/// The matrices of a low-rank adapter, whose product with the same input is added to a projection's.
#[derive(Clone, Debug)]
pub(crate) struct Adapter {
    /// `[ranks, in_features]`, the ranks of the fused projections one after the other, each padded to a multiple of 8.
    pub(crate) a: Matrix,
    /// `[num_rows, ranks]`, rows as those of the projection.
    pub(crate) b: Matrix,
}

/// A matrix of a layer, with the adapter of the layer if it has one.
#[derive(Clone, Debug)]
pub(crate) struct Projection {
    pub(crate) weight: Matrix,
    pub(crate) adapter: Option<Adapter>,
}

/// The weights of an effective layer; tied layers share their matrices, never their adapters.
#[derive(Clone, Debug)]
pub(crate) struct LayerWeights {
    pub(crate) input_layernorm: Tensor,
    pub(crate) qkv_proj: Projection,
    pub(crate) o_proj: Projection,
    pub(crate) post_attention_layernorm: Tensor,
    pub(crate) gate_up_proj: Projection,
    pub(crate) down_proj: Projection,
    /// What the output is multiplied by, if by anything.
    pub(crate) encoding: Option<Tensor>,
}

impl Shard {
    /// Its rows from row `first` of the matrix on; `None` if it has no such row, or devices cannot bind them.
    pub(crate) fn rows_from(&self, gpu: &Gpu, first: u32) -> Option<Tensor> {
        let skipped = (first as usize).checked_sub(self.first_row).filter(|skipped| *skipped < self.num_rows)?;
        if skipped == 0 {
            return Some(self.tensor.clone());
        }
        let in_features = self.tensor.shape()[1];
        self.tensor.part(gpu, self.tensor.label(), skipped * in_features, &[self.num_rows - skipped, in_features])
    }
}

impl Matrix {
    /// Whether devices can bind its rows from `row` on.
    fn begins_at(&self, gpu: &Gpu, row: u32) -> bool {
        self.shards.iter().any(|shard| shard.rows_from(gpu, row).is_some())
    }
}

impl Projection {
    /// Whether the product with its rows from `row` on can be computed alone.
    pub(crate) fn begins_at(&self, gpu: &Gpu, row: u32) -> bool {
        self.weight.begins_at(gpu, row) && self.adapter.as_ref().is_none_or(|adapter| adapter.b.begins_at(gpu, row))
    }
}

impl LayerWeights {
    /// All its matrices.
    pub(crate) fn projections(&self) -> [&Projection; 4] {
        [&self.qkv_proj, &self.o_proj, &self.gate_up_proj, &self.down_proj]
    }
}

/// The routers of all recursions (expert choice), or the only one (token choice).
#[derive(Clone, Debug)]
pub(crate) struct RouterWeights {
    /// First matrix of the MLP types, one a router; empty for linear ones.
    pub(crate) hidden: Vec<Matrix>,
    /// The rows that give the logits, router after router: `[R, K]`.
    pub(crate) output: Tensor,
}

/// What decides about recursions.
#[derive(Clone, Debug)]
pub(crate) struct Routers {
    pub(crate) router: RouterWeights,
    pub(crate) aux: Option<RouterWeights>,
    pub(crate) bias: Option<Tensor>,
}

/// All weights of a model on the device.
#[derive(Clone, Debug)]
pub struct DeviceWeights {
    pub(crate) embed_tokens: Matrix,
    pub(crate) lm_head: Matrix,
    pub(crate) norm: Tensor,
    /// Per effective layer; tied layers share their tensors.
    pub(crate) layers: Vec<LayerWeights>,
    /// Where matrices of a kind have one type and fit one binding.
    pub(crate) stacks: Option<LayerStacks>,
    pub(crate) routers: Option<Routers>,
    pub(crate) num_bytes: u64,
}

impl DeviceWeights {
    /// Uploads a checkpoint. `progress` is told the bytes uploaded so far.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`](mor_kernels::KernelError::OutOfMemory) if the device refuses a buffer.
    pub fn upload(
        gpu: &Gpu,
        checkpoint: &Checkpoint,
        precision: Precision,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self> {
        let start = Instant::now();
        let mut loader = Loader::new(gpu, checkpoint, precision);
        let config = checkpoint.config();
        let (hidden_size, intermediate_size) = (config.hidden_size, config.intermediate_size);
        let natural = |id: TensorId, num_rows: usize| (0..num_rows).map(move |row| Some((id, row))).collect();
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for l in 0..config.num_hidden_layers {
            let ids = checkpoint.layer(l);
            let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
            let qkv = qkv_rows(config.head_dim, (ids.q_proj, heads), (ids.k_proj, kv_heads), ids.v_proj);
            // Under K/V sharing, later recursions multiply by the rows of q alone.
            let q_rows = if config.kv == KvStrategy::Sharing { heads * device_head_dim(config.head_dim) } else { 0 };
            let heads_columns = Columns::grouped(heads, config.head_dim);
            let padded = intermediate_size.next_multiple_of(8);
            let gate_up = (0..padded)
                .flat_map(|row| {
                    let real = row < intermediate_size;
                    [real.then_some((ids.gate_proj, row)), real.then_some((ids.up_proj, row))]
                })
                .collect();
            let (o_rows, down_rows) = (natural(ids.o_proj, hidden_size), natural(ids.down_proj, hidden_size));
            layers.push(LayerWeights {
                input_layernorm: loader.vector(ids.input_layernorm)?,
                qkv_proj: loader.projection((l, "qkv_proj"), qkv, Columns::plain(hidden_size), q_rows)?,
                o_proj: loader.projection((l, "o_proj"), o_rows, heads_columns, 0)?,
                post_attention_layernorm: loader.vector(ids.post_attention_layernorm)?,
                gate_up_proj: loader.projection((l, "gate_up_proj"), gate_up, Columns::plain(hidden_size), 0)?,
                down_proj: loader.projection((l, "down_proj"), down_rows, Columns::plain(intermediate_size), 0)?,
                encoding: checkpoint.recursion_encoding(l).map(|id| loader.vector(id)).transpose()?,
            });
        }
        let (vocab, width) = (config.vocab_size, Columns::plain(hidden_size));
        let embed_tokens = loader.matrix("embed_tokens", natural(checkpoint.embed_tokens(), vocab), width)?;
        let lm_head = loader.matrix("lm_head", natural(checkpoint.lm_head(), vocab), width)?;
        let norm = loader.vector(checkpoint.norm())?;
        let tensors: Vec<_> = (0..config.num_recursions as u32).map_while(|r| checkpoint.router(r)).collect();
        let routers = match &tensors[..] {
            [] => None,
            [first, ..] => {
                let main: Vec<_> = tensors.iter().map(|tensors| &tensors.router[..]).collect();
                let aux: Vec<_> = tensors.iter().filter_map(|tensors| tensors.aux.as_deref()).collect();
                Some(Routers {
                    router: loader.routers(&main)?,
                    aux: (!aux.is_empty()).then(|| loader.routers(&aux)).transpose()?,
                    bias: first.bias.map(|bias| loader.vector(bias)).transpose()?,
                })
            }
        };
        let stacks = loader.layer_stacks(&layers)?;
        // All tensors are there: what does not fit is known before anything is converted.
        let (num_bytes, allocated) = (loader.num_bytes, start.elapsed());
        loader.upload.run(progress)?;
        gpu.wait_idle()?;
        tracing::debug!(bytes = num_bytes, ?allocated, uploaded = ?start.elapsed() - allocated, "uploaded weights");
        Ok(Self { embed_tokens, lm_head, norm, layers, stacks, routers, num_bytes })
    }

    /// Bytes uploaded.
    pub fn num_bytes(&self) -> u64 {
        self.num_bytes
    }
}

/// Size of a head on the device: padded so that kernels read whole units.
pub(crate) fn device_head_dim(head_dim: usize) -> usize {
    head_dim.next_multiple_of(8)
}

/// Rows of the fused projection: q and k interleaved inside each head, then v, every head padded.
fn qkv_rows(
    head_dim: usize,
    (q, num_heads): (TensorId, usize),
    (k, num_kv_heads): (TensorId, usize),
    v: TensorId,
) -> Vec<Option<(TensorId, usize)>> {
    let rows = |id: TensorId, num_heads: usize, interleaved: bool| {
        (0..num_heads * device_head_dim(head_dim)).map(move |row| {
            let (head, within) = (row / device_head_dim(head_dim), row % device_head_dim(head_dim));
            let within = if interleaved { within / 2 + within % 2 * (head_dim / 2) } else { within };
            // Of an interleaved row, both halves are absent or neither.
            let real = row % device_head_dim(head_dim) < head_dim;
            real.then_some((id, head * head_dim + within))
        })
    };
    rows(q, num_heads, true).chain(rows(k, num_kv_heads, true)).chain(rows(v, num_kv_heads, false)).collect()
}

/// How the elements of a stored row lie in a row on the device: groups, each padded with zeros.
#[derive(Clone, Copy)]
struct Columns {
    /// Zeros before the first group.
    before: usize,
    num_groups: usize,
    group_len: usize,
    padded_len: usize,
    /// Zeros after the last group.
    after: usize,
}

impl Columns {
    /// Groups of `group_len`, each padded to whole units.
    fn grouped(num_groups: usize, group_len: usize) -> Self {
        Self { before: 0, num_groups, group_len, padded_len: group_len.next_multiple_of(8), after: 0 }
    }

    /// One group without padding.
    fn exact(len: usize) -> Self {
        Self { before: 0, num_groups: 1, group_len: len, padded_len: len, after: 0 }
    }

    /// One group.
    fn plain(in_features: usize) -> Self {
        Self::grouped(1, in_features)
    }

    /// A group of a row of `num_groups`, the others zeros.
    fn one_of(index: usize, num_groups: usize, group_len: usize) -> Self {
        let group = Self::plain(group_len);
        Self { before: index * group.padded_len, after: (num_groups - 1 - index) * group.padded_len, ..group }
    }

    fn in_features(self) -> usize {
        self.num_groups * self.group_len
    }

    fn padded(self) -> usize {
        self.before + self.num_groups * self.padded_len + self.after
    }
}

/// Where a row of a matrix comes from; `None` is a row of zeros.
type SourceRow = Option<(TensorId, usize)>;

/// What a tensor is filled with.
struct Content<'a> {
    checkpoint: &'a Checkpoint,
    rows: Vec<SourceRow>,
    /// How the rows of each stored tensor lie in those on the device.
    columns: Vec<(TensorId, Columns)>,
    dtype: DType,
    row_bytes: usize,
}

impl Content<'_> {
    /// Writes some of the rows.
    fn write(&self, rows: Range<usize>, out: &mut Destination<'_>) {
        let mut values = Vec::new();
        // Rows that follow one another where they are stored.
        let follows =
            |a: &SourceRow, b: &SourceRow| matches!((a, b), (Some((i, m)), Some((j, n))) if i == j && m + 1 == *n);
        for run in self.rows[rows].chunk_by(follows) {
            let Some((id, first)) = run[0] else {
                out.write_zeros(self.row_bytes);
                continue;
            };
            let stored = self.checkpoint.dtype(id);
            let columns = self.columns.iter().find(|(of, _)| *of == id).expect("every tensor has its columns").1;
            let stored_bytes = stored.row_bytes(columns.in_features());
            let bytes = self.checkpoint.bytes(id, first * stored_bytes..(first + run.len()) * stored_bytes);
            let same = stored.on_device() == self.dtype;
            if same && stored_bytes == self.row_bytes {
                out.write(&bytes);
                continue;
            }
            for row in bytes.chunks_exact(stored_bytes) {
                out.write_zeros(self.dtype.row_bytes(columns.before));
                for group in row.chunks_exact(stored.row_bytes(columns.group_len)) {
                    if same {
                        out.write(group);
                    } else {
                        values.resize(columns.group_len, 0.0);
                        decode_row(stored, group, &mut values);
                        write_as(self.dtype, &values, out);
                    }
                    out.write_zeros(self.dtype.row_bytes(columns.padded_len - columns.group_len));
                }
                out.write_zeros(self.dtype.row_bytes(columns.after));
            }
        }
    }
}

/// Writes values as `dtype`, which is not quantised.
fn write_as(dtype: DType, values: &[f32], out: &mut Destination<'_>) {
    match dtype {
        DType::F16 => write_halves([f16::ZERO; HALVES], values, out),
        DType::BF16 => write_halves([bf16::ZERO; HALVES], values, out),
        _ => out.write(bytemuck::cast_slice(values)),
    }
}

/// Halves that are converted before they are written.
const HALVES: usize = 1024;

fn write_halves<H: bytemuck::NoUninit>(mut halves: [H; HALVES], values: &[f32], out: &mut Destination<'_>)
where
    [H]: HalfFloatSliceExt,
{
    for values in values.chunks(HALVES) {
        let halves = &mut halves[..values.len()];
        halves.convert_from_f32_slice(values);
        out.write(bytemuck::cast_slice(halves));
    }
}

struct Loader<'a> {
    gpu: &'a Gpu,
    checkpoint: &'a Checkpoint,
    precision: Precision,
    upload: Upload<'a>,
    /// Bytes that the upload brings.
    num_bytes: u64,
    matrices: HashMap<(&'static str, Vec<TensorId>), Matrix>,
    /// By label: the stack of all layers' matrices, and how many are in it.
    stacks: HashMap<&'static str, (Tensor, u32)>,
    vectors: HashMap<TensorId, Tensor>,
}

impl<'a> Loader<'a> {
    fn new(gpu: &'a Gpu, checkpoint: &'a Checkpoint, precision: Precision) -> Self {
        let (matrices, stacks, vectors) = (HashMap::new(), HashMap::new(), HashMap::new());
        Self { gpu, checkpoint, precision, upload: Upload::new(gpu), num_bytes: 0, matrices, stacks, vectors }
    }

    /// Has `tensor` filled with `rows`, whose elements lie as `columns` of their tensor say.
    fn fill(&mut self, tensor: &Tensor, rows: Vec<SourceRow>, columns: &[(TensorId, Columns)]) {
        let (checkpoint, dtype, columns) = (self.checkpoint, tensor.dtype(), columns.to_vec());
        let row_bytes = dtype.row_bytes(tensor.shape()[tensor.shape().len() - 1]);
        let content = Content { checkpoint, rows, columns, dtype, row_bytes };
        self.num_bytes += tensor.data_bytes() as u64;
        self.upload.add(tensor.clone(), move |rows, out| content.write(rows, out));
    }

    /// Matrices of a kind that layers have, tied ones counted once; `None` for what is no matrix of a layer.
    fn num_matrices(&self, label: &str) -> Option<usize> {
        let ids = |layer: LayerTensors| match label {
            "qkv_proj" => Some(vec![layer.q_proj, layer.k_proj, layer.v_proj]),
            "o_proj" => Some(vec![layer.o_proj]),
            "gate_up_proj" => Some(vec![layer.gate_proj, layer.up_proj]),
            "down_proj" => Some(vec![layer.down_proj]),
            _ => None,
        };
        let layers = 0..self.checkpoint.config().num_hidden_layers;
        let distinct: Option<HashSet<_>> = layers.map(|layer| ids(self.checkpoint.layer(layer))).collect();
        distinct.map(|distinct| distinct.len())
    }

    /// The next place in the stack of `label`, for a matrix of `shape`; `None` where it has to be a tensor of its own.
    fn stacked(&mut self, label: &'static str, dtype: DType, shape: [usize; 2]) -> Result<Option<(Tensor, u32)>> {
        let Some(count) = self.num_matrices(label) else { return Ok(None) };
        if !self.stacks.contains_key(label) {
            let caps = self.gpu.caps();
            let bytes = (count * shape[0] * dtype.row_bytes(shape[1])) as u64;
            if bytes > caps.max_storage_binding_bytes.min(caps.max_buffer_bytes) {
                return Ok(None);
            }
            let stack = Tensor::zeros(self.gpu, label, dtype, &[count, shape[0], shape[1]])?;
            self.stacks.insert(label, (stack, 0));
        }
        let (stack, used) = self.stacks.get_mut(label).expect("inserted above");
        if stack.dtype() != dtype || stack.shape()[1..] != shape {
            return Ok(None);
        }
        let first = *used as usize * shape[0] * shape[1];
        let part = stack.part(self.gpu, label, first, &shape);
        *used += u32::from(part.is_some());
        Ok(part.map(|part| (part, *used - 1)))
    }

    /// The stacks, if every layer has its matrices in them, all of one type.
    fn layer_stacks(&mut self, layers: &[LayerWeights]) -> Result<Option<LayerStacks>> {
        let matrices = || layers.iter().flat_map(LayerWeights::projections);
        let dtype = layers[0].o_proj.weight.dtype;
        if matrices().any(|projection| projection.weight.place.is_none() || projection.weight.dtype != dtype) {
            return Ok(None);
        }
        let width = layers[0].input_layernorm.num_elems();
        let norms = Tensor::zeros(self.gpu, "norms", DType::F32, &[2 * layers.len() + 1, width])?;
        let of_layers = (0..layers.len()).flat_map(|l| {
            let ids = self.checkpoint.layer(l);
            [ids.input_layernorm, ids.post_attention_layernorm]
        });
        for (i, id) in of_layers.chain([self.checkpoint.norm()]).enumerate() {
            let values = self.checkpoint.to_f32(id);
            self.gpu.write(&norms, (4 * i * width) as u64, bytemuck::cast_slice(&values));
        }
        let stack = |label| self.stacks[label].0.clone();
        Ok(Some(LayerStacks {
            qkv_proj: stack("qkv_proj"),
            o_proj: stack("o_proj"),
            gate_up_proj: stack("gate_up_proj"),
            down_proj: stack("down_proj"),
            norms,
        }))
    }

    /// A tensor as f32: norms and biases.
    fn vector(&mut self, id: TensorId) -> Result<Tensor> {
        if let Some(tensor) = self.vectors.get(&id) {
            return Ok(tensor.clone());
        }
        let len = self.checkpoint.shape(id).iter().product();
        let tensor = Tensor::zeros(self.gpu, self.checkpoint.name(id), DType::F32, &[len])?;
        self.fill(&tensor, vec![Some((id, 0))], &[(id, Columns::exact(len))]);
        self.vectors.insert(id, tensor.clone());
        Ok(tensor)
    }

    /// Routers of one shape; each is its one or two matrices.
    fn routers(&mut self, routers: &[&[TensorId]]) -> Result<RouterWeights> {
        let mut hidden = Vec::new();
        for ids in routers {
            if let [first, _] = **ids {
                let [num_rows, in_features] = [self.checkpoint.shape(first)[0], self.checkpoint.shape(first)[1]];
                let rows = (0..num_rows).map(|row| Some((first, row))).collect();
                hidden.push(self.matrix("router_hidden", rows, Columns::plain(in_features))?);
            }
        }
        let outputs: Vec<_> = routers.iter().map(|ids| ids[ids.len() - 1]).collect();
        let (dtype, shape) = (self.common_dtype(&outputs), self.checkpoint.shape(outputs[0]).to_vec());
        // The router kernels read exactly [outputs, K], without the padding of matrices.
        let output = Tensor::zeros(self.gpu, "router", dtype, &[outputs.len() * shape[0], shape[1]])?;
        let columns: Vec<_> = outputs.iter().map(|id| (*id, Columns::exact(shape[1]))).collect();
        let rows = outputs.iter().flat_map(|id| (0..shape[0]).map(|row| Some((*id, row)))).collect();
        self.fill(&output, rows, &columns);
        Ok(RouterWeights { hidden, output })
    }

    /// The type in which tensors lie in one: theirs if they agree.
    fn common_dtype(&self, ids: &[TensorId]) -> DType {
        let mut dtypes: Vec<_> = ids.iter().map(|id| self.precision.weight_dtype(self.checkpoint.dtype(*id))).collect();
        dtypes.dedup();
        if let [dtype] = dtypes[..] { dtype } else { DType::F32 }
    }

    /// A projection of a layer, with its adapter; as [`Loader::matrix`], a new shard starts at row `split`, a multiple of 4.
    fn projection(
        &mut self,
        (layer, label): (usize, &'static str),
        rows: Vec<SourceRow>,
        columns: Columns,
        split: usize,
    ) -> Result<Projection> {
        let adapter = self.adapter(layer, &rows, columns, split)?;
        Ok(Projection { weight: self.matrix_in_parts(label, rows, &|_| columns, split)?, adapter })
    }

    /// The adapter of the projection that consists of `rows`, if `layer` has any for one of its tensors.
    fn adapter(&mut self, layer: usize, rows: &[SourceRow], columns: Columns, split: usize) -> Result<Option<Adapter>> {
        let (checkpoint, weights) = (self.checkpoint, self.checkpoint.layer(layer));
        let adapted = |tensor: &LayerTensor| {
            let id = weights.get(*tensor);
            Some((id, checkpoint.lora(layer, *tensor)?)).filter(|_| rows.iter().flatten().any(|(row, _)| *row == id))
        };
        let factors: Vec<(TensorId, LoraTensors)> = LayerTensor::PROJECTIONS.iter().filter_map(adapted).collect();
        let Some((_, first)) = factors.first() else { return Ok(None) };
        let rank = checkpoint.shape(first.a)[0];
        let padded_rank = Columns::plain(rank).padded();
        let a_rows = |(_, factor): &(TensorId, LoraTensors)| {
            let a = factor.a;
            (0..padded_rank).map(move |row| (row < rank).then_some((a, row)))
        };
        let a = self.matrix("lora_a", factors.iter().flat_map(a_rows).collect(), columns)?;
        let b_row = |row: &SourceRow| {
            let (id, row) = (*row)?;
            factors.iter().find(|(weight, _)| *weight == id).map(|(_, factor)| (factor.b, row))
        };
        let group_of = |id: TensorId| {
            let index = factors.iter().position(|(_, factor)| factor.b == id).unwrap_or(0);
            Columns::one_of(index, factors.len(), rank)
        };
        let b = self.matrix_in_parts("lora_b", rows.iter().map(b_row).collect(), &group_of, split)?;
        Ok(Some(Adapter { a, b }))
    }

    /// A matrix of the given source rows.
    fn matrix(&mut self, label: &'static str, rows: Vec<SourceRow>, columns: Columns) -> Result<Matrix> {
        self.matrix_in_parts(label, rows, &|_| columns, 0)
    }

    /// As [`Loader::matrix`], with the columns of each source; a new shard starts at row `split`, a multiple of 4.
    fn matrix_in_parts(
        &mut self,
        label: &'static str,
        mut rows: Vec<SourceRow>,
        columns: &dyn Fn(TensorId) -> Columns,
        split: usize,
    ) -> Result<Matrix> {
        let mut ids: Vec<TensorId> = Vec::new();
        for (id, _) in rows.iter().flatten() {
            if !ids.contains(id) {
                ids.push(*id);
            }
        }
        // A tied head is the embedding.
        let key = (if label == "lm_head" { "embed_tokens" } else { label }, ids.clone());
        if let Some(matrix) = self.matrices.get(&key) {
            return Ok(matrix.clone());
        }
        let dtype = self.common_dtype(&ids);
        rows.resize(rows.len().next_multiple_of(2), None);
        let columns: Vec<_> = ids.iter().map(|id| (*id, columns(*id))).collect();
        let padded = columns[0].1.padded();
        let row_bytes = dtype.row_bytes(padded);
        let caps = self.gpu.caps();
        let binding_bytes = caps.max_storage_binding_bytes.min(caps.max_buffer_bytes) as usize;
        // In fours, as many columns as a kernel may store at a time.
        let rows_per_shard = (binding_bytes / row_bytes / 4 * 4).max(4);
        let (mut shards, mut first_row) = (Vec::new(), 0);
        let (before, after) = rows.split_at(split);
        let stacked = if split == 0 { self.stacked(label, dtype, [rows.len(), padded])? } else { None };
        let place = stacked.as_ref().map(|(_, place)| *place);
        for part in before.chunks(rows_per_shard).chain(after.chunks(rows_per_shard)) {
            let tensor = match &stacked {
                Some((tensor, _)) => tensor.clone(),
                None => Tensor::zeros(self.gpu, label, dtype, &[part.len(), padded])?,
            };
            let tensor = tensor.with_texels(self.gpu)?;
            self.fill(&tensor, part.to_vec(), &columns);
            shards.push(Shard { tensor, first_row, num_rows: part.len() });
            first_row += part.len();
        }
        let matrix = Matrix { shards, num_rows: rows.len(), in_features: padded, dtype, place };
        self.matrices.insert(key, matrix.clone());
        Ok(matrix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MorConfig;

    #[test]
    fn rotary_pairs_become_adjacent() {
        let config = MorConfig::from_json_str(
            r#"{ "vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5 }"#,
            "test",
        )
        .expect("the config is valid");
        let checkpoint = Checkpoint::random(config, 0, Dtype::F32);
        let ids = checkpoint.layer(0);
        let rows = qkv_rows(8, (ids.q_proj, 2), (ids.k_proj, 1), ids.v_proj);
        let q: Vec<_> = rows[..16].iter().flatten().map(|(_, row)| *row).collect();
        assert_eq!(q, [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]);
        assert_eq!(rows[16], Some((ids.k_proj, 0)));
        let padded = qkv_rows(4, (ids.q_proj, 2), (ids.k_proj, 1), ids.v_proj);
        let q: Vec<_> = padded[..16].iter().map(|row| row.map(|(_, row)| row)).collect();
        let half = [Some(0), Some(2), Some(1), Some(3), None, None, None, None];
        assert_eq!((&q[..8], q[8], q[15]), (&half[..], Some(4), None));
        assert_eq!(rows[24..].iter().flatten().map(|(_, row)| *row).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
    }
}
