//! Where weights come from: safetensors files, bytes in memory, or a seeded generator.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fmt, fs,
    ops::Range,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use half::{bf16, f16};
use memmap2::Mmap;
use mor_kernels::{quantize, tensor::DType};
use safetensors::{SafeTensorError, SafeTensors};
use serde_json::{Map, Value};

use crate::{Balancing, KvStrategy, LayerLayout, Mode, ModelError, MorConfig, Precision, Quantization, RouterType};

/// Element type of a stored weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    BF16,
    /// Rows of 8-bit integers, packed by [`mor_kernels::quantize`].
    Q8,
    /// Rows of 4-bit integers, packed by [`mor_kernels::quantize`].
    Q4,
}

impl Dtype {
    /// Size of a row of `len` elements in bytes.
    pub const fn row_bytes(self, len: usize) -> usize {
        self.on_device().row_bytes(len)
    }

    /// The same type on a device.
    pub const fn on_device(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::Q8 => DType::Q8,
            Self::Q4 => DType::Q4,
        }
    }

    fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::F32 => Some(Self::F32),
            safetensors::Dtype::F16 => Some(Self::F16),
            safetensors::Dtype::BF16 => Some(Self::BF16),
            _ => None,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        })
    }
}

/// One of the nine tensors of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerTensor {
    /// Query projection `[H * D, C]`.
    QProj,
    /// Key projection `[G * D, C]`.
    KProj,
    /// Value projection `[G * D, C]`.
    VProj,
    /// Output projection `[C, H * D]`.
    OProj,
    /// MLP gate `[I, C]`.
    GateProj,
    /// MLP up `[I, C]`.
    UpProj,
    /// MLP down `[C, I]`.
    DownProj,
    /// Norm before attention `[C]`.
    InputLayernorm,
    /// Norm before the MLP `[C]`.
    PostAttentionLayernorm,
}

impl LayerTensor {
    /// All nine, in the order of the checkpoint documentation.
    pub const ALL: [Self; 9] = [
        Self::QProj,
        Self::KProj,
        Self::VProj,
        Self::OProj,
        Self::GateProj,
        Self::UpProj,
        Self::DownProj,
        Self::InputLayernorm,
        Self::PostAttentionLayernorm,
    ];

    /// Name after the layer's prefix.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::QProj => "self_attn.q_proj.weight",
            Self::KProj => "self_attn.k_proj.weight",
            Self::VProj => "self_attn.v_proj.weight",
            Self::OProj => "self_attn.o_proj.weight",
            Self::GateProj => "mlp.gate_proj.weight",
            Self::UpProj => "mlp.up_proj.weight",
            Self::DownProj => "mlp.down_proj.weight",
            Self::InputLayernorm => "input_layernorm.weight",
            Self::PostAttentionLayernorm => "post_attention_layernorm.weight",
        }
    }

    /// The type a model quantised as `quantization` stores the tensor in, `None` for that of its file.
    fn quantized_dtype(self, quantization: Quantization, config: &MorConfig) -> Option<Dtype> {
        match self {
            Self::InputLayernorm | Self::PostAttentionLayernorm => None,
            // Devices pad heads to whole units of 8, which would shift the groups.
            Self::OProj if !config.head_dim.is_multiple_of(8) => None,
            _ => Some(match quantization {
                Quantization::Q8 => Dtype::Q8,
                Quantization::Q4 => Dtype::Q4,
            }),
        }
    }

    /// Shape, `[out, in]` for projections.
    pub fn shape(self, config: &MorConfig) -> Vec<usize> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        match self {
            Self::QProj => vec![config.q_dim(), hidden],
            Self::KProj | Self::VProj => vec![config.kv_dim(), hidden],
            Self::OProj => vec![hidden, config.q_dim()],
            Self::GateProj | Self::UpProj => vec![inner, hidden],
            Self::DownProj => vec![hidden, inner],
            Self::InputLayernorm | Self::PostAttentionLayernorm => vec![hidden],
        }
    }
}

/// What a tensor is, independent of its name in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TensorName {
    /// Token embeddings `[V, C]`.
    EmbedTokens,
    /// A tensor of an effective layer.
    Layer {
        /// Effective layer.
        layer: usize,
        /// Which of the nine.
        tensor: LayerTensor,
    },
    /// A router matrix; token choice has recursion 0 only.
    Router {
        /// Recursion.
        recursion: u32,
        /// 0, or 1 for the second matrix of an MLP router.
        index: usize,
    },
    /// A matrix of the auxiliary router.
    AuxRouter {
        /// Recursion.
        recursion: u32,
        /// 0, or 1 for the second matrix of an MLP router.
        index: usize,
    },
    /// Bias `[R]` of loss-free balancing.
    RouterBias,
    /// Final norm `[C]`.
    Norm,
    /// Output head `[V, C]`.
    LmHead,
}

impl TensorName {
    /// As [`LayerTensor::quantized_dtype`].
    fn quantized_dtype(self, quantization: Quantization, config: &MorConfig) -> Option<Dtype> {
        match self {
            Self::Layer { tensor, .. } => tensor.quantized_dtype(quantization, config),
            Self::EmbedTokens | Self::LmHead => Some(Dtype::Q8),
            Self::Router { .. } | Self::AuxRouter { .. } | Self::RouterBias | Self::Norm => None,
        }
    }
}

/// A distinct tensor of a [`Checkpoint`]. Tied names give equal ids, so a loader keyed by id uploads each tensor once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId(u32);

impl TensorId {
    /// Position in `0..checkpoint.num_tensors()`.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// The tensors of one effective layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerTensors {
    /// Query projection `[H * D, C]`.
    pub q_proj: TensorId,
    /// Key projection `[G * D, C]`.
    pub k_proj: TensorId,
    /// Value projection `[G * D, C]`.
    pub v_proj: TensorId,
    /// Output projection `[C, H * D]`.
    pub o_proj: TensorId,
    /// MLP gate `[I, C]`.
    pub gate_proj: TensorId,
    /// MLP up `[I, C]`.
    pub up_proj: TensorId,
    /// MLP down `[C, I]`.
    pub down_proj: TensorId,
    /// Norm before attention `[C]`.
    pub input_layernorm: TensorId,
    /// Norm before the MLP `[C]`.
    pub post_attention_layernorm: TensorId,
}

/// The tensors of one router.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RouterTensors {
    /// One matrix `[outputs, C]`, or two: `[2 C, C]` and `[outputs, 2 C]`.
    pub router: Vec<TensorId>,
    /// The same for the auxiliary router, where there is one.
    pub aux: Option<Vec<TensorId>>,
    /// Bias `[R]` added to the score, not to the gate (loss-free balancing).
    pub bias: Option<TensorId>,
}

/// A stored tensor.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    /// Name in the checkpoint; of a tied group, the first.
    pub name: &'a str,
    /// Element type of `data`.
    pub dtype: Dtype,
    /// Shape, row-major.
    pub shape: &'a [usize],
    /// Little-endian elements or packed rows, without any alignment promise.
    pub data: Cow<'a, [u8]>,
}

impl TensorView<'_> {
    /// Number of elements.
    pub fn num_elems(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A tensor as safetensors stores it.
struct StoredView<'a> {
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    data: Cow<'a, [u8]>,
}

impl<'a> From<TensorView<'a>> for StoredView<'a> {
    fn from(view: TensorView<'a>) -> Self {
        let mut shape = view.shape.to_vec();
        let dtype = match view.dtype {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::BF16 => safetensors::Dtype::BF16,
            Dtype::Q8 | Dtype::Q4 => {
                shape[1] = view.dtype.row_bytes(shape[1]);
                safetensors::Dtype::U8
            }
        };
        Self { dtype, shape, data: view.data }
    }
}

impl safetensors::View for StoredView<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// Parameter counts of a checkpoint; see [`Checkpoint::parameter_counts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterCounts {
    /// Distinct parameters outside embedding and head: layers, norms and routers.
    pub unique_non_embedding: u64,
    /// Distinct parameters of embedding and head; a tied head counts nothing.
    pub unique_embedding: u64,
    /// As `unique_non_embedding` for the unrolled model, every effective layer counted.
    pub effective_non_embedding: u64,
    /// Bytes of all distinct tensors as stored.
    pub unique_bytes: u64,
}

impl ParameterCounts {
    /// All distinct parameters.
    pub const fn unique(self) -> u64 {
        self.unique_non_embedding + self.unique_embedding
    }

    /// All parameters of the unrolled model.
    pub const fn effective(self) -> u64 {
        self.effective_non_embedding + self.unique_embedding
    }
}

/// A model's configuration and weights, checked as a whole when opened and read on demand.
///
/// Files are memory-mapped: nothing is copied until a tensor is asked for. A file must not be changed while a
/// checkpoint made from it exists.
///
/// ```
/// use mor_model::{Checkpoint, Dtype, MorConfig};
///
/// let config = MorConfig::from_json_str(
///     r#"{
///         "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 8,
///         "num_attention_heads": 4, "rms_norm_eps": 1e-5,
///         "mor": { "mode": "expert", "sharing": "middle_cycle", "num_recursion": 3 }
///     }"#,
///     "example",
/// )?;
/// let checkpoint = Checkpoint::random(config, 7, Dtype::BF16);
/// assert_eq!(checkpoint.layer(2), checkpoint.layer(4), "tied layers give equal ids");
/// assert_eq!(checkpoint.view(checkpoint.layer(2).q_proj).shape, [64, 64]);
/// # Ok::<(), mor_model::ModelError>(())
/// ```
pub struct Checkpoint {
    config: MorConfig,
    layout: LayerLayout,
    tensors: Vec<Tensor>,
    ids: HashMap<TensorName, TensorId>,
    layers: Vec<LayerTensors>,
    source: Source,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("config", &self.config)
            .field("num_tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}

/// A distinct tensor.
struct Tensor {
    name: String,
    shape: Vec<usize>,
    dtype: Dtype,
    place: Place,
}

/// Where the elements of a tensor are.
enum Place {
    /// Bytes of a weight file.
    File { file: usize, bytes: Range<usize> },
    /// Bytes made from another tensor.
    Memory(Vec<u8>),
    /// Normal values, read cyclically from the pool.
    Pool { first_elem: usize },
    /// One value throughout.
    Constant(f32),
}

enum Source {
    Files(Vec<WeightFile>),
    Random(Pool),
}

/// One safetensors file or buffer.
struct WeightFile {
    /// Name for messages.
    name: String,
    bytes: Bytes,
}

enum Bytes {
    Mapped(Mmap),
    Memory(Cow<'static, [u8]>),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Memory(bytes) => bytes,
        }
    }
}

/// A tensor the configuration asks for.
struct Expected {
    key: TensorName,
    name: String,
    shape: Vec<usize>,
}

/// The one table of tensor names: everything a complete checkpoint of this model holds, owners before their copies.
fn expected_tensors(config: &MorConfig, layout: &LayerLayout) -> Vec<Expected> {
    let hidden = config.hidden_size;
    let mut table = Vec::new();
    let mut push = |key, name: String, shape: Vec<usize>| table.push(Expected { key, name, shape });

    push(TensorName::EmbedTokens, "model.embed_tokens.weight".to_owned(), vec![config.vocab_size, hidden]);
    for layer in 0..layout.num_layers() {
        for tensor in LayerTensor::ALL {
            let name = format!("{}.{}", layout.prefix(layer), tensor.suffix());
            push(TensorName::Layer { layer, tensor }, name, tensor.shape(config));
        }
    }

    let outputs = config.router_outputs();
    let matrices: &[(&str, [usize; 2])] = match config.router_type {
        RouterType::Linear => &[("router.weight", [outputs, hidden])],
        RouterType::Mlp | RouterType::WideMlp => {
            &[("router.0.weight", [2 * hidden, hidden]), ("router.2.weight", [outputs, 2 * hidden])]
        }
    };
    for recursion in 0..num_routers(config) {
        let prefix = layout.router_prefix(recursion);
        for (index, (name, shape)) in matrices.iter().enumerate() {
            push(TensorName::Router { recursion, index }, format!("{prefix}.mor_router.{name}"), shape.to_vec());
            if config.has_aux_router() {
                push(TensorName::AuxRouter { recursion, index }, format!("{prefix}.mlp_router.{name}"), shape.to_vec());
            }
        }
    }
    if config.mode == Mode::Token && config.balancing == Balancing::LossFree {
        push(TensorName::RouterBias, format!("{}.router_bias", layout.router_prefix(0)), vec![outputs]);
    }

    push(TensorName::Norm, "model.norm.weight".to_owned(), vec![hidden]);
    push(TensorName::LmHead, "lm_head.weight".to_owned(), vec![config.vocab_size, hidden]);
    table
}

fn num_routers(config: &MorConfig) -> u32 {
    match config.mode {
        Mode::Expert => config.num_recursions as u32,
        Mode::Token => 1,
        Mode::Vanilla | Mode::Recursive => 0,
    }
}

/// Buffers older Llama exports contain although they are derived from the configuration.
fn is_derived_buffer(name: &str) -> bool {
    ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"].iter().any(|end| name.ends_with(end))
}

impl Checkpoint {
    /// Opens a model directory: `config.json` and `model.safetensors`, or the shards of `model.safetensors.index.json`.
    ///
    /// Reads every weight once, to find damage before it turns into nonsense. Tied copies that are bit-identical become
    /// one tensor, and so does an `lm_head` equal to the embedding; copies that differ stay separate.
    ///
    /// # Errors
    ///
    /// Those of [`MorConfig::from_json_file`]; [`ModelError::Io`] and [`ModelError::NoWeights`] for absent files; the
    /// shard variants for a bad index; [`ModelError::SafetensorsHeader`] and [`ModelError::FileLength`] for damaged
    /// files; [`ModelError::UnknownTensor`], [`ModelError::MissingTensor`], [`ModelError::TiedGroupIncomplete`],
    /// [`ModelError::TensorShape`], [`ModelError::TensorDtype`] and [`ModelError::NonFinite`] for the tensors.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, ModelError> {
        let dir = dir.as_ref();
        let config = MorConfig::from_json_file(dir.join("config.json"))?;
        let files = open_files(dir)?;
        Self::from_files(config, files, &dir.display().to_string())
    }

    /// Opens a model held in memory, for example embedded in the program.
    ///
    /// `origin` names it in messages.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::open`], apart from those about files and shards.
    pub fn from_bytes(
        config_json: &str,
        safetensors: impl Into<Cow<'static, [u8]>>,
        origin: &str,
    ) -> Result<Self, ModelError> {
        let config = MorConfig::from_json_str(config_json, origin)?;
        let file = WeightFile { name: origin.to_owned(), bytes: Bytes::Memory(safetensors.into()) };
        Self::from_files(config, vec![file], origin)
    }

    /// Makes a model with random weights: normal with standard deviation 0.02, norms 1, biases 0.
    ///
    /// The same configuration, seed and type give the same weights everywhere. Values come from one pool of a few
    /// million that tensors read at different offsets, so even a large model takes little memory and time.
    pub fn random(config: MorConfig, seed: u64, dtype: Dtype) -> Self {
        let layout = LayerLayout::new(&config);
        let pool = Pool::new(seed, dtype);
        let mut tensors: Vec<Tensor> = Vec::new();
        let mut ids = HashMap::new();
        for expected in expected_tensors(&config, &layout) {
            if let Some(owner) = tied_to(&expected.key, &layout, config.tie_word_embeddings) {
                ids.insert(expected.key, ids[&owner]);
                continue;
            }
            let place = match expected.key {
                TensorName::RouterBias => Place::Constant(0.0),
                _ if expected.shape.len() == 1 => Place::Constant(1.0),
                _ => Place::Pool { first_elem: pool.offset(seed, tensors.len()) },
            };
            ids.insert(expected.key, TensorId(tensors.len() as u32));
            tensors.push(Tensor { name: expected.name, shape: expected.shape, dtype, place });
        }
        Self::assemble(config, layout, tensors, ids, Source::Random(pool))
    }

    /// Checks the tensors of `files` against the table of expected ones and resolves ties.
    fn from_files(config: MorConfig, files: Vec<WeightFile>, origin: &str) -> Result<Self, ModelError> {
        let layout = LayerLayout::new(&config);
        let mut stored = read_headers(&files)?;
        let table = expected_tensors(&config, &layout);
        // Shapes first: a wrong configuration is better explained by them than by what is missing.
        let mut found = Vec::with_capacity(table.len());
        for expected in table {
            let packed = config.quantization.and_then(|format| expected.key.quantized_dtype(format, &config));
            let tensor = stored.remove(&expected.name).map(|s| s.check(&files, &expected, packed)).transpose()?;
            found.push((expected, tensor));
        }
        let leftover = stored.iter().filter(|(name, _)| !is_derived_buffer(name)).min_by_key(|(name, _)| name.as_str());
        if let Some((name, tensor)) = leftover {
            return Err(ModelError::UnknownTensor {
                file: files[tensor.file].name.clone(),
                name: name.clone(),
                mode: config.mode,
                sharing: config.sharing,
            });
        }
        let (tensors, ids) = resolve_ties(&config, &layout, &files, origin, found)?;
        check_finite(&files, &tensors)?;
        tracing::debug!(origin, distinct = tensors.len(), names = ids.len(), "opened checkpoint");
        Ok(Self::assemble(config, layout, tensors, ids, Source::Files(files)))
    }

    fn assemble(
        config: MorConfig,
        layout: LayerLayout,
        tensors: Vec<Tensor>,
        ids: HashMap<TensorName, TensorId>,
        source: Source,
    ) -> Self {
        let layers = (0..layout.num_layers())
            .map(|layer| {
                let id = |tensor| ids[&TensorName::Layer { layer, tensor }];
                LayerTensors {
                    q_proj: id(LayerTensor::QProj),
                    k_proj: id(LayerTensor::KProj),
                    v_proj: id(LayerTensor::VProj),
                    o_proj: id(LayerTensor::OProj),
                    gate_proj: id(LayerTensor::GateProj),
                    up_proj: id(LayerTensor::UpProj),
                    down_proj: id(LayerTensor::DownProj),
                    input_layernorm: id(LayerTensor::InputLayernorm),
                    post_attention_layernorm: id(LayerTensor::PostAttentionLayernorm),
                }
            })
            .collect();
        Self { config, layout, tensors, ids, layers, source }
    }

    /// The same weights under another key-value strategy.
    ///
    /// # Errors
    ///
    /// [`ModelError::ConfigConflict`] when the mode has no such strategy.
    pub fn with_kv(mut self, kv: KvStrategy) -> Result<Self, ModelError> {
        self.config = self.config.with_kv(kv)?;
        Ok(self)
    }

    /// The same model with quantised matrices, in memory; all cores work on it.
    ///
    /// # Errors
    ///
    /// [`ModelError::AlreadyQuantized`]; [`ModelError::NotQuantizable`] for a weight above the largest f16.
    pub fn quantize(self, quantization: Quantization) -> Result<Self, ModelError> {
        if let Some(found) = self.config.quantization {
            return Err(ModelError::AlreadyQuantized { found });
        }
        let packed = self
            .packed_dtypes(Some(quantization))
            .zip(self.tensor_ids())
            .map(|(dtype, id)| dtype.map(|dtype| Ok((dtype, self.pack(id, dtype)?))).transpose())
            .collect::<Result<Vec<_>, ModelError>>()?;
        let Self { mut config, layout, mut tensors, ids, source, .. } = self;
        for (tensor, packed) in tensors.iter_mut().zip(packed) {
            if let Some((dtype, bytes)) = packed {
                (tensor.dtype, tensor.place) = (dtype, Place::Memory(bytes));
            }
        }
        config.quantization = Some(quantization);
        Ok(Self::assemble(config, layout, tensors, ids, source))
    }

    /// Per distinct tensor, the type in which a model quantised so has it packed.
    fn packed_dtypes(&self, quantization: Option<Quantization>) -> impl Iterator<Item = Option<Dtype>> + use<> {
        let mut dtypes = vec![None; self.tensors.len()];
        for (name, id) in &self.ids {
            dtypes[id.index()] = quantization.and_then(|format| name.quantized_dtype(format, &self.config));
        }
        dtypes.into_iter()
    }

    /// The rows of a matrix, packed.
    fn pack(&self, id: TensorId, dtype: Dtype) -> Result<Vec<u8>, ModelError> {
        let [num_rows, len] = [self.shape(id)[0], self.shape(id)[1]];
        let row_bytes = dtype.row_bytes(len);
        let mut packed = vec![0; num_rows * row_bytes];
        let num_threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let rows_per_part = num_rows.div_ceil(num_threads).max(64);
        let pack_part = |part: usize, rows: &mut [u8]| {
            let mut values = vec![0.0; len];
            for (row, bytes) in (part * rows_per_part..).zip(rows.chunks_mut(row_bytes)) {
                self.read_row(id, row, &mut values);
                quantize::quantize_row(dtype.on_device(), &values, bytes).map_err(|value| {
                    let at = values.iter().position(|v| *v == value).unwrap_or(0);
                    ModelError::NotQuantizable { name: self.name(id).to_owned(), index: row * len + at, value }
                })?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let parts = packed.chunks_mut(rows_per_part * row_bytes).enumerate();
            let workers: Vec<_> = parts.map(|(part, rows)| scope.spawn(move || pack_part(part, rows))).collect();
            // A worker can only panic by a defect of this crate, which must not be swallowed.
            workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
        })?;
        Ok(packed)
    }

    /// Writes all tensors to a safetensors file, tied ones once.
    ///
    /// A quantised matrix `[O, K]` is a tensor U8 `[O, B]` of the same name, a packed row of [`mor_kernels::quantize`] in
    /// each of its rows, and the configuration has a `quantization_config` ([`Quantization::to_json`]).
    ///
    /// # Errors
    ///
    /// [`ModelError::Write`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), ModelError> {
        let owner = |key: &TensorName| tied_to(key, &self.layout, self.config.tie_word_embeddings);
        let is_copy = |key: &TensorName| owner(key).is_some_and(|owner| self.ids[&owner] == self.ids[key]);
        // Where one copy of a tied tensor differs, the others must say that they do not.
        let differ = self.ids.keys().any(|key| owner(key).is_some() && !is_copy(key));
        let written = expected_tensors(&self.config, &self.layout)
            .into_iter()
            .filter(|expected| differ || !is_copy(&expected.key))
            .map(|expected| (expected.name, StoredView::from(self.view(self.ids[&expected.key]))));
        let path = path.as_ref();
        safetensors::serialize_to_file(written, None, path)
            .map_err(|source| ModelError::Write { path: path.to_owned(), source })
    }

    /// Bytes of the weights on a device, padding aside; `quantization` is what they would be quantised to first, if they
    /// are not.
    pub fn device_bytes(&self, precision: Precision, quantization: Option<Quantization>) -> u64 {
        let bytes = |(tensor, packed): (&Tensor, Option<Dtype>)| {
            let dtype = precision.weight_dtype(packed.unwrap_or(tensor.dtype));
            (tensor.num_elems() / tensor.row_len() * dtype.row_bytes(tensor.row_len())) as u64
        };
        self.tensors.iter().zip(self.packed_dtypes(quantization)).map(bytes).sum()
    }

    /// Configuration.
    pub fn config(&self) -> &MorConfig {
        &self.config
    }

    /// Layer layout of the configuration.
    pub fn layout(&self) -> &LayerLayout {
        &self.layout
    }

    /// Number of distinct tensors; ids index them.
    pub fn num_tensors(&self) -> usize {
        self.tensors.len()
    }

    /// Ids of all distinct tensors.
    pub fn tensor_ids(&self) -> impl ExactSizeIterator<Item = TensorId> + use<> {
        (0..self.tensors.len() as u32).map(TensorId)
    }

    /// Id of a tensor, `None` when this model has none of that kind.
    pub fn id(&self, name: TensorName) -> Option<TensorId> {
        self.ids.get(&name).copied()
    }

    /// A tensor by what it is, `None` when this model has none of that kind.
    pub fn tensor(&self, name: TensorName) -> Option<TensorView<'_>> {
        self.id(name).map(|id| self.view(id))
    }

    /// Token embeddings `[V, C]`.
    pub fn embed_tokens(&self) -> TensorId {
        self.ids[&TensorName::EmbedTokens]
    }

    /// Final norm `[C]`.
    pub fn norm(&self) -> TensorId {
        self.ids[&TensorName::Norm]
    }

    /// Output head `[V, C]`; equal to [`Checkpoint::embed_tokens`] when tied.
    pub fn lm_head(&self) -> TensorId {
        self.ids[&TensorName::LmHead]
    }

    /// Tensors of an effective layer.
    ///
    /// # Panics
    ///
    /// When the model has no such layer.
    pub fn layer(&self, layer: usize) -> LayerTensors {
        self.layers[layer]
    }

    /// Router of a recursion, `None` when the model routes nothing or has no such recursion. Token choice has one
    /// router, that of recursion 0.
    pub fn router(&self, recursion: u32) -> Option<RouterTensors> {
        let matrices = |name: fn(u32, usize) -> TensorName| {
            let list: Vec<TensorId> = (0..2).map_while(|index| self.id(name(recursion, index))).collect();
            (!list.is_empty()).then_some(list)
        };
        Some(RouterTensors {
            router: matrices(|recursion, index| TensorName::Router { recursion, index })?,
            aux: matrices(|recursion, index| TensorName::AuxRouter { recursion, index }),
            bias: self.id(TensorName::RouterBias),
        })
    }

    /// Name of a tensor in the checkpoint; of a tied group, the first.
    ///
    /// # Panics
    ///
    /// When `id` comes from another checkpoint with more tensors, as for the other methods that take an id.
    pub fn name(&self, id: TensorId) -> &str {
        &self.tensors[id.index()].name
    }

    /// Shape of a tensor, row-major.
    pub fn shape(&self, id: TensorId) -> &[usize] {
        &self.tensors[id.index()].shape
    }

    /// Element type of a tensor.
    pub fn dtype(&self, id: TensorId) -> Dtype {
        self.tensors[id.index()].dtype
    }

    /// A tensor's elements as stored: borrowed from a file, generated for a random model.
    pub fn view(&self, id: TensorId) -> TensorView<'_> {
        let tensor = &self.tensors[id.index()];
        let data = match (&tensor.place, &self.source) {
            (Place::File { file, bytes }, Source::Files(files)) => {
                Cow::Borrowed(&files[*file].bytes.as_slice()[bytes.clone()])
            }
            (Place::Memory(bytes), _) => Cow::Borrowed(&bytes[..]),
            _ => {
                let mut data = vec![0; tensor.num_bytes()];
                self.read_bytes(id, 0, &mut data);
                Cow::Owned(data)
            }
        };
        TensorView { name: &tensor.name, dtype: tensor.dtype, shape: &tensor.shape, data }
    }

    /// Copies the bytes from `first_byte` on into `out`, so that a large tensor can be uploaded in pieces.
    ///
    /// # Panics
    ///
    /// When the range passes the end of the tensor, or begins or ends inside an element.
    pub fn read_bytes(&self, id: TensorId, first_byte: usize, out: &mut [u8]) {
        let tensor = &self.tensors[id.index()];
        assert!(
            first_byte <= tensor.num_bytes() && out.len() <= tensor.num_bytes() - first_byte,
            "{}: {} bytes from {first_byte} pass the end of shape {:?}",
            tensor.name,
            out.len(),
            tensor.shape
        );
        match (&tensor.place, &self.source) {
            (Place::File { file, bytes }, Source::Files(files)) => {
                let start = bytes.start + first_byte;
                out.copy_from_slice(&files[*file].bytes.as_slice()[start..start + out.len()]);
            }
            (Place::Memory(bytes), _) => out.copy_from_slice(&bytes[first_byte..first_byte + out.len()]),
            (Place::Pool { first_elem }, Source::Random(pool)) => {
                assert!(
                    first_byte.is_multiple_of(pool.elem_bytes) && out.len().is_multiple_of(pool.elem_bytes),
                    "{}: {} bytes from {first_byte} are no whole number of elements",
                    tensor.name,
                    out.len()
                );
                pool.read(first_elem + first_byte / pool.elem_bytes, out);
            }
            (Place::Constant(value), _) => {
                let (bytes, len) = encode(*value, tensor.dtype);
                out.chunks_exact_mut(len).for_each(|elem| elem.copy_from_slice(&bytes[..len]));
            }
            // Places are made together with their source.
            (Place::File { .. }, Source::Random(_)) | (Place::Pool { .. }, Source::Files(_)) => {
                unreachable!()
            }
        }
    }

    /// Row `row` of a matrix converted to f32, for `values` of its length.
    fn read_row(&self, id: TensorId, row: usize, values: &mut [f32]) {
        let dtype = self.dtype(id);
        let mut bytes = vec![0; dtype.row_bytes(values.len())];
        self.read_bytes(id, row * bytes.len(), &mut bytes);
        decode_row(dtype, &bytes, values);
    }

    /// A tensor converted to f32, row-major.
    pub fn to_f32(&self, id: TensorId) -> Vec<f32> {
        let view = self.view(id);
        let len = view.shape.last().copied().unwrap_or(1);
        let mut values = vec![0.0; view.num_elems()];
        for (row, values) in view.data.chunks(view.dtype.row_bytes(len)).zip(values.chunks_mut(len)) {
            decode_row(view.dtype, row, values);
        }
        values
    }

    /// Counts parameters of the distinct tensors and of the unrolled model.
    pub fn parameter_counts(&self) -> ParameterCounts {
        let elems = |id: TensorId| self.tensors[id.index()].num_elems() as u64;
        let embedding = [self.embed_tokens(), self.lm_head()];
        let unique =
            |is_embedding: bool| self.tensor_ids().filter(|id| embedding.contains(id) == is_embedding).map(elems).sum();
        let effective_non_embedding = self
            .ids
            .iter()
            .filter(|(name, _)| !matches!(name, TensorName::EmbedTokens | TensorName::LmHead))
            .map(|(_, &id)| elems(id))
            .sum();
        ParameterCounts {
            unique_non_embedding: unique(false),
            unique_embedding: unique(true),
            effective_non_embedding,
            unique_bytes: self.tensors.iter().map(|tensor| tensor.num_bytes() as u64).sum(),
        }
    }
}

impl Tensor {
    /// Elements of a row: of a vector all.
    fn row_len(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    fn num_elems(&self) -> usize {
        self.shape.iter().product()
    }

    fn num_bytes(&self) -> usize {
        self.num_elems() / self.row_len() * self.dtype.row_bytes(self.row_len())
    }

    /// Its bytes in `files`; empty for a generated tensor.
    fn file_bytes<'a>(&self, files: &'a [WeightFile]) -> &'a [u8] {
        match &self.place {
            Place::File { file, bytes } => &files[*file].bytes.as_slice()[bytes.clone()],
            Place::Memory(_) | Place::Pool { .. } | Place::Constant(_) => &[],
        }
    }
}

/// The name whose tensor `key` holds when it is tied and not written itself.
fn tied_to(key: &TensorName, layout: &LayerLayout, tie_word_embeddings: bool) -> Option<TensorName> {
    match *key {
        TensorName::Layer { layer, tensor } if layout.owner(layer) != layer => {
            Some(TensorName::Layer { layer: layout.owner(layer), tensor })
        }
        TensorName::LmHead if tie_word_embeddings => Some(TensorName::EmbedTokens),
        _ => None,
    }
}

fn open_files(dir: &Path) -> Result<Vec<WeightFile>, ModelError> {
    let single = dir.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![map_file(&single)?]);
    }
    let index = dir.join("model.safetensors.index.json");
    if !index.is_file() {
        return Err(ModelError::NoWeights { dir: dir.to_owned() });
    }
    open_shards(dir, &index)
}

fn open_shards(dir: &Path, index: &Path) -> Result<Vec<WeightFile>, ModelError> {
    let origin = index.display().to_string();
    let text = fs::read_to_string(index).map_err(|source| ModelError::Io { path: index.to_owned(), source })?;
    let root: Map<String, Value> =
        serde_json::from_str(&text).map_err(|source| ModelError::JsonSyntax { origin: origin.clone(), source })?;
    let Some(Value::Object(weight_map)) = root.get("weight_map") else {
        let found = root.get("weight_map").map_or("missing", json_kind).to_owned();
        return Err(ModelError::ShardIndex { file: origin, found });
    };
    // Sorted, so that messages do not depend on the order of the index.
    let mut names_of_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, shard) in weight_map {
        let plain = shard.as_str().filter(|shard| is_plain_file_name(shard));
        let Some(shard) = plain else {
            let shard = shard.as_str().map_or_else(|| shard.to_string(), str::to_owned);
            return Err(ModelError::ShardPath { file: origin, name: name.clone(), shard });
        };
        names_of_shard.entry(shard).or_default().push(name);
    }
    names_of_shard
        .into_iter()
        .map(|(shard, names)| {
            let file = map_file(&dir.join(shard))?;
            let (_, header) = read_header(&file)?;
            match names.into_iter().find(|name| header.info(name).is_none()) {
                Some(name) => Err(ModelError::ShardTensorMissing { file: file.name, name: name.to_owned() }),
                None => Ok(file),
            }
        })
        .collect()
}

fn is_plain_file_name(shard: &str) -> bool {
    // Both separators count on every system: a checkpoint must not behave differently elsewhere.
    !shard.is_empty() && shard != "." && shard != ".." && !shard.contains(['/', '\\', ':', '\0'])
}

fn json_kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn map_file(path: &Path) -> Result<WeightFile, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let file = fs::File::open(path).map_err(io)?;
    // An empty file cannot be mapped everywhere; the header check words that case better.
    let bytes = if file.metadata().map_err(io)?.len() == 0 {
        Bytes::Memory(Cow::Borrowed(&[]))
    } else {
        // SAFETY: the mapping is read-only and private to this crate. Changing the file meanwhile is excluded in the
        // documentation of `Checkpoint`, and no invariant rests on its bytes: offsets were checked against the length.
        Bytes::Mapped(unsafe { Mmap::map(&file) }.map_err(io)?)
    };
    Ok(WeightFile { name: path.display().to_string(), bytes })
}

/// Parses a header; the offset is where tensor data starts.
fn read_header(file: &WeightFile) -> Result<(usize, safetensors::tensor::Metadata), ModelError> {
    let bytes = file.bytes.as_slice();
    match SafeTensors::read_metadata(bytes) {
        Ok((header_bytes, metadata)) => Ok((8 + header_bytes, metadata)),
        Err(source) => {
            let length = ModelError::FileLength {
                file: file.name.clone(),
                found_bytes: bytes.len() as u64,
                expected_bytes: described_bytes(bytes),
            };
            match source {
                SafeTensorError::HeaderTooSmall
                | SafeTensorError::InvalidHeaderLength
                | SafeTensorError::MetadataIncompleteBuffer => Err(length),
                source => Err(ModelError::SafetensorsHeader { file: file.name.clone(), source }),
            }
        }
    }
}

/// Least file length the readable part of a header asks for.
fn described_bytes(bytes: &[u8]) -> u64 {
    let Some(prefix) = bytes.first_chunk::<8>() else {
        return 8;
    };
    let data_start = u64::from_le_bytes(*prefix).saturating_add(8);
    let header = usize::try_from(data_start).ok().and_then(|end| bytes.get(8..end));
    let tensors = header.and_then(|header| serde_json::from_slice::<Map<String, Value>>(header).ok());
    let data_end = tensors.iter().flat_map(Map::values).filter_map(|info| info["data_offsets"][1].as_u64()).max();
    data_start.saturating_add(data_end.unwrap_or(0))
}

/// A tensor found in a file.
struct Stored {
    file: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

fn read_headers(files: &[WeightFile]) -> Result<HashMap<String, Stored>, ModelError> {
    let mut stored: HashMap<String, Stored> = HashMap::new();
    for (index, file) in files.iter().enumerate() {
        let (data_start, header) = read_header(file)?;
        // In file order, so that the first duplicate reported does not depend on hashing.
        for name in header.offset_keys() {
            let Some(info) = header.info(&name) else {
                continue;
            };
            let bytes = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
            let tensor = Stored { file: index, dtype: info.dtype, shape: info.shape.clone(), bytes };
            if let Some(earlier) = stored.insert(name.clone(), tensor) {
                let first = files[earlier.file].name.clone();
                return Err(ModelError::DuplicateTensor { name, first, second: file.name.clone() });
            }
        }
    }
    Ok(stored)
}

impl Stored {
    /// The tensor, if it is what is expected: of `packed` rows, or of floats.
    fn check(self, files: &[WeightFile], expected: &Expected, packed: Option<Dtype>) -> Result<Tensor, ModelError> {
        let file = || files[self.file].name.clone();
        let (name, shape) = (expected.name.clone(), expected.shape.clone());
        let mut stored_shape = shape.clone();
        let dtype = match packed {
            None => Dtype::from_safetensors(self.dtype),
            Some(dtype) => {
                if let Some(len) = stored_shape.last_mut() {
                    *len = dtype.row_bytes(*len);
                }
                (self.dtype == safetensors::Dtype::U8).then_some(dtype)
            }
        };
        let Some(dtype) = dtype else {
            let expected = match packed {
                None => "F32, F16 or BF16, since config.json names no quantization_config of this program",
                Some(_) => "U8, since config.json says that matrices are quantised",
            };
            return Err(ModelError::TensorDtype { file: file(), name, found: self.dtype.to_string(), expected });
        };
        if self.shape != stored_shape {
            return Err(ModelError::TensorShape { file: file(), name, found: self.shape, expected: stored_shape });
        }
        Ok(Tensor { name, shape, dtype, place: Place::File { file: self.file, bytes: self.bytes } })
    }
}

/// Gives every expected name an id, making tied names that hold the same bits one tensor.
fn resolve_ties(
    config: &MorConfig,
    layout: &LayerLayout,
    files: &[WeightFile],
    origin: &str,
    found: Vec<(Expected, Option<Tensor>)>,
) -> Result<(Vec<Tensor>, HashMap<TensorName, TensorId>), ModelError> {
    let present: HashMap<TensorName, String> =
        found.iter().filter(|(_, tensor)| tensor.is_some()).map(|(e, _)| (e.key, e.name.clone())).collect();
    let mut absent: HashMap<TensorName, String> = HashMap::new();
    let mut tensors: Vec<Tensor> = Vec::new();
    let mut ids: HashMap<TensorName, TensorId> = HashMap::with_capacity(found.len());

    for (expected, tensor) in found {
        let tied = tied_to(&expected.key, layout, config.tie_word_embeddings);
        // A head that equals the embedding is one tensor even if the configuration does not tie them.
        let same_as = tied.or((expected.key == TensorName::LmHead).then_some(TensorName::EmbedTokens));
        let is_same = |tensor: &Tensor, id: TensorId| {
            let other = &tensors[id.index()];
            tensor.dtype == other.dtype && tensor.file_bytes(files) == other.file_bytes(files)
        };
        let id = match (tensor, same_as.map(|owner| ids[&owner])) {
            (Some(tensor), Some(id)) if is_same(&tensor, id) => id,
            (Some(tensor), _) => {
                tensors.push(tensor);
                TensorId((tensors.len() - 1) as u32)
            }
            (None, Some(id)) if tied.is_some() => {
                absent.insert(expected.key, expected.name);
                id
            }
            (None, _) => return Err(missing(expected, layout, &present, origin)),
        };
        ids.insert(expected.key, id);
    }
    refuse_ambiguous_groups(layout, &present, &absent, &ids, origin)?;
    Ok((tensors, ids))
}

/// Words an absent tensor, with the copy that shows its group was cut when there is one.
fn missing(
    expected: Expected,
    layout: &LayerLayout,
    present: &HashMap<TensorName, String>,
    origin: &str,
) -> ModelError {
    let copy = match expected.key {
        TensorName::Layer { layer, tensor } => (layer + 1..layout.num_layers())
            .filter(|&l| layout.owner(l) == layer)
            .find_map(|layer| present.get(&TensorName::Layer { layer, tensor })),
        _ => None,
    };
    match copy {
        Some(present) => ModelError::TiedGroupIncomplete {
            origin: origin.to_owned(),
            missing: expected.name,
            present: present.clone(),
            differs: false,
        },
        None => ModelError::MissingTensor { origin: origin.to_owned(), name: expected.name, expected: expected.shape },
    }
}

/// Refuses a group in which one copy is absent while another differs: whose values the absent one has is anyone's
/// guess.
fn refuse_ambiguous_groups(
    layout: &LayerLayout,
    present: &HashMap<TensorName, String>,
    absent: &HashMap<TensorName, String>,
    ids: &HashMap<TensorName, TensorId>,
    origin: &str,
) -> Result<(), ModelError> {
    for layer in 0..layout.num_layers() {
        for tensor in LayerTensor::ALL {
            let Some(missing) = absent.get(&TensorName::Layer { layer, tensor }) else {
                continue;
            };
            let owner = layout.owner(layer);
            let owner_id = ids[&TensorName::Layer { layer: owner, tensor }];
            let differing = (0..layout.num_layers())
                .filter(|&l| layout.owner(l) == owner)
                .map(|layer| TensorName::Layer { layer, tensor })
                .find(|key| ids[key] != owner_id)
                .and_then(|key| present.get(&key));
            if let Some(present) = differing {
                return Err(ModelError::TiedGroupIncomplete {
                    origin: origin.to_owned(),
                    missing: missing.clone(),
                    present: present.clone(),
                    differs: true,
                });
            }
        }
    }
    Ok(())
}

/// Scans every tensor for NaN and infinity, on all cores; the first in table order is reported.
fn check_finite(files: &[WeightFile], tensors: &[Tensor]) -> Result<(), ModelError> {
    let num_threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(8);
    let next = AtomicUsize::new(0);
    let scan = || {
        let mut worst: Option<(usize, usize)> = None;
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(tensor) = tensors.get(index) else {
                return worst;
            };
            if let Some(elem) = first_non_finite(tensor.file_bytes(files), tensor.dtype, tensor.row_len()) {
                worst = Some(worst.map_or((index, elem), |w| w.min((index, elem))));
            }
        }
    };
    let first = std::thread::scope(|scope| {
        let workers: Vec<_> = (1..num_threads).map(|_| scope.spawn(scan)).collect();
        let own = scan();
        // A worker can only panic by a defect of this crate, which must not be swallowed.
        let others =
            workers.into_iter().filter_map(|worker| worker.join().unwrap_or_else(|p| std::panic::resume_unwind(p)));
        others.chain(own).min()
    });
    match first {
        None => Ok(()),
        Some((index, elem)) => {
            let tensor = &tensors[index];
            let mut values = vec![0.0; tensor.row_len()];
            let row = tensor.file_bytes(files).chunks(tensor.dtype.row_bytes(values.len())).nth(elem / values.len());
            decode_row(tensor.dtype, row.unwrap_or_default(), &mut values);
            let value = values[elem % values.len()];
            let file = match tensor.place {
                Place::File { file, .. } => files[file].name.clone(),
                Place::Memory(_) | Place::Pool { .. } | Place::Constant(_) => String::new(),
            };
            Err(ModelError::NonFinite { file, name: tensor.name.clone(), index: elem, value })
        }
    }
}

/// Index of the first element that is NaN or infinite: whose exponent bits are all ones.
fn first_non_finite(bytes: &[u8], dtype: Dtype, row_len: usize) -> Option<usize> {
    match dtype {
        Dtype::F32 => first_with_bits(bytes.as_chunks::<4>().0, |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        Dtype::F16 => first_with_bits(bytes.as_chunks::<2>().0, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        Dtype::BF16 => first_with_bits(bytes.as_chunks::<2>().0, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        Dtype::Q8 | Dtype::Q4 => {
            let rows = bytes.chunks(dtype.row_bytes(row_len));
            let row = rows.clone().position(|row| !quantize::is_finite(dtype.on_device(), row, row_len))?;
            let mut values = vec![0.0; row_len];
            rows.skip(row).take(1).for_each(|bytes| decode_row(dtype, bytes, &mut values));
            values.iter().position(|value| !value.is_finite()).map(|at| row * row_len + at)
        }
    }
}

/// Converts the bytes of a row to f32.
fn decode_row(dtype: Dtype, bytes: &[u8], values: &mut [f32]) {
    let halves = bytes.as_chunks::<2>().0;
    match dtype {
        Dtype::F32 => values.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(v, b)| *v = f32::from_le_bytes(*b)),
        Dtype::F16 => values.iter_mut().zip(halves).for_each(|(v, b)| *v = f16::from_le_bytes(*b).to_f32()),
        Dtype::BF16 => values.iter_mut().zip(halves).for_each(|(v, b)| *v = bf16::from_le_bytes(*b).to_f32()),
        Dtype::Q8 | Dtype::Q4 => quantize::dequantize_row(dtype.on_device(), bytes, values),
    }
}

/// Finds an element in two stages: whole blocks without early exit, which compiles to vector code, then the hit alone.
fn first_with_bits<const N: usize>(elems: &[[u8; N]], is_bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
    const BLOCK: usize = 4096;
    elems.chunks(BLOCK).enumerate().find_map(|(block, elems)| {
        let any = elems.iter().fold(false, |any, &elem| any | is_bad(elem));
        any.then(|| elems.iter().position(|&elem| is_bad(elem)).map(|i| block * BLOCK + i)).flatten()
    })
}

/// A cyclic store of normal values with standard deviation 0.02, in the model's element type.
struct Pool {
    bytes: Vec<u8>,
    elem_bytes: usize,
}

impl Pool {
    /// A prime, so that no matrix width divides it and rows of a matrix do not repeat.
    const NUM_ELEMS: usize = 4_194_301;

    fn new(seed: u64, dtype: Dtype) -> Self {
        let elem_bytes = dtype.row_bytes(1);
        let mut bytes = Vec::with_capacity(Self::NUM_ELEMS * elem_bytes);
        let mut state = SplitMix64(seed);
        for _ in 0..Self::NUM_ELEMS {
            let (elem, len) = encode(0.02 * state.next_normal(), dtype);
            bytes.extend_from_slice(&elem[..len]);
        }
        Self { bytes, elem_bytes }
    }

    /// Where tensor number `tensor` starts.
    fn offset(&self, seed: u64, tensor: usize) -> usize {
        let mut state = SplitMix64(seed ^ (tensor as u64 + 1).wrapping_mul(0xd1b5_4a32_d192_ed03));
        (state.next() % Self::NUM_ELEMS as u64) as usize
    }

    fn read(&self, first_elem: usize, mut out: &mut [u8]) {
        let mut start = first_elem % Self::NUM_ELEMS * self.elem_bytes;
        while !out.is_empty() {
            let len = out.len().min(self.bytes.len() - start);
            let (head, tail) = out.split_at_mut(len);
            head.copy_from_slice(&self.bytes[start..start + len]);
            (out, start) = (tail, 0);
        }
    }
}

/// The splitmix64 generator.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A nearly normal value: the sum of twelve uniform ones has variance 1. Integer sums, unlike logarithms and
    /// cosines, are the same on every platform.
    fn next_normal(&mut self) -> f32 {
        let mut sum = 0;
        for _ in 0..3 {
            let bits = self.next();
            sum += (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum::<u64>();
        }
        // The mean of one 16-bit value is 32767.5.
        ((sum as f64 - 12.0 * 32767.5) / 65536.0) as f32
    }
}

/// Encodes one element; the second value is how many of the bytes count.
fn encode(value: f32, dtype: Dtype) -> ([u8; 4], usize) {
    match dtype {
        Dtype::F32 => (value.to_le_bytes(), 4),
        Dtype::F16 => {
            let [a, b] = f16::from_f32(value).to_le_bytes();
            ([a, b, 0, 0], 2)
        }
        Dtype::BF16 => {
            let [a, b] = bf16::from_f32(value).to_le_bytes();
            ([a, b, 0, 0], 2)
        }
        Dtype::Q8 | Dtype::Q4 => unreachable!("generated tensors have elements"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(mor: &str) -> MorConfig {
        let text = format!(
            r#"{{ "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 8,
                "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "mor": {mor} }}"#
        );
        MorConfig::from_json_str(&text, "test").unwrap()
    }

    #[test]
    fn random_models_are_deterministic_and_normal() {
        let expert = r#"{ "mode": "expert", "sharing": "middle_cycle", "num_recursion": 3,
            "router_type": "mlp", "sampling": "aux_router" }"#;
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let [a, b, other] = [7, 7, 8].map(|seed| Checkpoint::random(config(expert), seed, dtype));
            let embed = a.to_f32(a.embed_tokens());
            assert_eq!(embed, b.to_f32(b.embed_tokens()));
            assert_ne!(embed, other.to_f32(other.embed_tokens()));
            assert_ne!(a.view(a.layer(0).q_proj).data, a.view(a.layer(1).q_proj).data);
            assert!(a.to_f32(a.norm()).iter().all(|&w| w == 1.0));

            let n = embed.len() as f64;
            let mean = embed.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            let variance = embed.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n - mean * mean;
            assert!(mean.abs() < 1e-3 && (variance.sqrt() - 0.02).abs() < 1e-3, "{mean} {variance}");

            let router = a.router(2).unwrap();
            assert_eq!(router.router.iter().map(|&id| a.shape(id)).collect::<Vec<_>>(), [[128, 64], [1, 128]]);
            assert_eq!(router.aux.unwrap().len(), 2);
            assert_eq!((router.bias, a.router(3)), (None, None));
        }
    }

    #[test]
    fn random_loss_free_models_have_a_zero_bias() {
        let token = r#"{ "mode": "token", "sharing": "cycle", "num_recursion": 4, "balancing": "loss_free" }"#;
        let checkpoint = Checkpoint::random(config(token), 0, Dtype::BF16);
        let router = checkpoint.router(0).unwrap();
        assert_eq!(checkpoint.to_f32(router.bias.unwrap()), [0.0; 4]);
        assert_eq!(checkpoint.shape(router.router[0]), [4, 64]);
        assert_eq!(checkpoint.router(1), None);
    }

    #[test]
    fn pieces_of_a_tensor_join_to_the_whole() {
        let vanilla = MorConfig::from_json_str(
            r#"{ "vocab_size": 70000, "hidden_size": 128, "intermediate_size": 80, "num_hidden_layers": 1,
                "num_attention_heads": 4, "rms_norm_eps": 1e-5 }"#,
            "test",
        )
        .unwrap();
        let checkpoint = Checkpoint::random(vanilla, 3, Dtype::BF16);
        let id = checkpoint.embed_tokens();
        let whole = checkpoint.view(id);
        // Larger than the pool, so that reading wraps at least twice.
        assert!(whole.num_elems() > 2 * Pool::NUM_ELEMS);
        let mut joined = Vec::new();
        while joined.len() < whole.data.len() {
            let mut piece = vec![0; 3_000_002.min(whole.data.len() - joined.len())];
            checkpoint.read_bytes(id, joined.len(), &mut piece);
            joined.extend(piece);
        }
        assert!(joined == *whole.data);
    }

    #[test]
    fn counts_of_a_published_size() {
        let text = r#"{ "vocab_size": 49152, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
            "num_attention_heads": 15, "num_key_value_heads": 5, "rms_norm_eps": 1e-5,
            "mor": { "mode": "expert", "sharing": "middle_cycle", "num_recursion": 3 } }"#;
        let checkpoint = Checkpoint::random(MorConfig::from_json_str(text, "360M").unwrap(), 0, Dtype::BF16);
        let counts = checkpoint.parameter_counts();
        // 118M and 315M; besides layers there are the final norm and three linear routers.
        let (layer, rest) = (9_832_320, 4 * 960);
        assert_eq!(counts.unique_non_embedding, 12 * layer + rest);
        assert_eq!(counts.effective_non_embedding, 32 * layer + rest);
        assert_eq!(counts.unique_embedding, 49152 * 960);
        assert_eq!(counts.unique_bytes, 2 * counts.unique());
    }

    #[test]
    fn non_finite_values_are_found_past_a_block() {
        for at in [0, 1, 4095, 4096, 9999] {
            let mut values = vec![1.0f32; 10_000];
            values[at] = f32::INFINITY;
            let bytes: &[u8] = bytemuck::cast_slice(&values);
            assert_eq!(first_non_finite(bytes, Dtype::F32, 10_000), Some(at));
        }
        assert_eq!(first_non_finite(&[], Dtype::BF16, 1), None);
        let largest: Vec<u8> = [f16::MAX, f16::MIN].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(first_non_finite(&largest, Dtype::F16, 2), None);
    }
}
