//! Where weights come from: safetensors files, bytes in memory, or a seeded generator.

mod dtype;
mod files;
mod load;
mod names;
mod pickle;
mod quantized;
mod random;
mod save;
mod start;
mod torch;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

pub use dtype::Dtype;
pub use names::{LayerTensor, TensorName};
pub use save::{WriteOptions, Written};

pub(crate) use self::dtype::decode_row;
use self::dtype::encode;
use self::files::WeightFile;
pub(crate) use self::files::WeightFiles;
pub(crate) use self::names::expected_names;
use self::random::Pool;
use crate::{KvStrategy, LayerLayout, ModelError, MorConfig};

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

impl LayerTensors {
    /// One of them.
    pub const fn get(self, tensor: LayerTensor) -> TensorId {
        match tensor {
            LayerTensor::QProj => self.q_proj,
            LayerTensor::KProj => self.k_proj,
            LayerTensor::VProj => self.v_proj,
            LayerTensor::OProj => self.o_proj,
            LayerTensor::GateProj => self.gate_proj,
            LayerTensor::UpProj => self.up_proj,
            LayerTensor::DownProj => self.down_proj,
            LayerTensor::InputLayernorm => self.input_layernorm,
            LayerTensor::PostAttentionLayernorm => self.post_attention_layernorm,
        }
    }
}

/// The factors of one projection's adapter; see [`Lora`](crate::Lora).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LoraTensors {
    /// `[rank, in]`.
    pub a: TensorId,
    /// `[out, rank]`.
    pub b: TensorId,
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

/// Parameter counts of a checkpoint; see [`Checkpoint::parameter_counts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterCounts {
    /// Distinct parameters outside embedding and head: layers, norms and routers.
    pub unique_non_embedding: u64,
    /// Distinct parameters of embedding and head; a tied head counts nothing.
    pub unique_embedding: u64,
    /// As `unique_non_embedding` for the unrolled model, every effective layer counted.
    pub effective_non_embedding: u64,
    /// Of these, the parameters of adapters and recursion encodings, which no two layers share.
    pub relaxation: u64,
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
#[derive(Clone)]
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

impl Checkpoint {
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

    /// Adapter of a projection of an effective layer, `None` when it has none.
    pub fn lora(&self, layer: usize, tensor: LayerTensor) -> Option<LoraTensors> {
        let a = self.id(TensorName::LoraA { layer, tensor })?;
        Some(LoraTensors { a, b: self.id(TensorName::LoraB { layer, tensor })? })
    }

    /// What the output of an effective layer is multiplied by `[C]`, `None` when by nothing.
    pub fn recursion_encoding(&self, layer: usize) -> Option<TensorId> {
        self.id(TensorName::RecursionEncoding { layer })
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
        let data = self.bytes(id, 0..tensor.num_bytes());
        TensorView { name: &tensor.name, dtype: tensor.dtype, shape: &tensor.shape, data }
    }

    /// Bytes of a tensor as stored: borrowed from a file, or from the pool of a random model where they lie in one piece.
    ///
    /// # Panics
    ///
    /// As [`Checkpoint::read_bytes`].
    pub(crate) fn bytes(&self, id: TensorId, range: Range<usize>) -> Cow<'_, [u8]> {
        match (&self.tensors[id.index()].place, &self.source) {
            (Place::File { file, bytes }, Source::Files(files)) => {
                Cow::Borrowed(&files[*file].bytes.as_slice()[bytes.clone()][range])
            }
            (Place::Memory(bytes), _) => Cow::Borrowed(&bytes[range]),
            (Place::Pool { first_elem }, Source::Random(pool))
                if let Some(bytes) = pool.contiguous(*first_elem, &range) =>
            {
                Cow::Borrowed(bytes)
            }
            _ => {
                let mut data = vec![0; range.len()];
                self.read_bytes(id, range.start, &mut data);
                Cow::Owned(data)
            }
        }
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
        let effective = |counts: fn(&TensorName) -> bool| {
            self.ids.iter().filter(|(name, _)| counts(name)).map(|(_, &id)| elems(id)).sum()
        };
        ParameterCounts {
            unique_non_embedding: unique(false),
            unique_embedding: unique(true),
            effective_non_embedding: effective(|name| !matches!(name, TensorName::EmbedTokens | TensorName::LmHead)),
            relaxation: effective(|name| {
                use TensorName::{LoraA, LoraB, RecursionEncoding};
                matches!(name, LoraA { .. } | LoraB { .. } | RecursionEncoding { .. })
            }),
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
