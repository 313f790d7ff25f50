//! Checkpoints as files.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::dtype::{decode_row, encode};
use super::names::{Expected, TensorName, expected_tensors, tied_to};
use super::{Checkpoint, Dtype, TensorId};
use crate::ModelError;

/// How [`Checkpoint::write`] stores the weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteOptions {
    /// F32, F16 or BF16 for all tensors, `None` for the type each has.
    pub dtype: Option<Dtype>,
    /// Most bytes of tensors a file, but for a tensor that is larger itself.
    pub max_shard_bytes: u64,
    /// Whether a tied tensor is written under every name, as the official training code does, or once.
    pub all_names: bool,
}

impl Default for WriteOptions {
    /// The type each tensor has, one file, tied tensors once.
    fn default() -> Self {
        Self { dtype: None, max_shard_bytes: u64::MAX, all_names: false }
    }
}

/// What [`Checkpoint::write`] has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Names of the weight files, the index of shards not among them.
    pub files: Vec<String>,
    /// Tensors in them.
    pub num_tensors: usize,
    /// Bytes of these tensors.
    pub num_bytes: u64,
}

impl Checkpoint {
    /// Writes all tensors to a safetensors file, tied ones once.
    ///
    /// A quantised matrix `[O, K]` is a tensor U8 `[O, B]` of the same name, a packed row of [`mor_kernels::quantize`] in
    /// each of its rows, and the configuration has a `quantization_config` ([`Quantization::to_json`]).
    ///
    /// [`Quantization::to_json`]: crate::Quantization::to_json
    ///
    /// # Errors
    ///
    /// [`ModelError::Write`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), ModelError> {
        serialize(self.stored_views(&WriteOptions::default()), path.as_ref())
    }

    /// Writes all tensors into a folder: `model.safetensors`, or, where that would exceed
    /// [`WriteOptions::max_shard_bytes`], shards and `model.safetensors.index.json`.
    ///
    /// Tensors are converted one at a time, so that a large model takes little memory.
    ///
    /// # Errors
    ///
    /// [`ModelError::QuantizedSource`] where quantised matrices would need another type; [`ModelError::NotRepresentable`]
    /// for a weight that the type does not have; [`ModelError::Write`] and [`ModelError::WriteFile`].
    pub fn write(&self, dir: impl AsRef<Path>, options: &WriteOptions) -> Result<Written, ModelError> {
        let dir = dir.as_ref();
        if let Some(dtype) = options.dtype {
            if let Some(found) = self.config.quantization {
                return Err(ModelError::QuantizedSource { found });
            }
            self.check_representable(dtype)?;
        }
        let views = self.stored_views(options);
        let (num_tensors, num_bytes) = (views.len(), views.iter().map(|(_, view)| view.num_bytes() as u64).sum());
        let shards = into_shards(views, options.max_shard_bytes);
        let num_shards = shards.len();
        let mut files = Vec::with_capacity(num_shards);
        let mut weight_map = Map::new();
        for (index, views) in shards.into_iter().enumerate() {
            let file = match num_shards {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{num_shards:05}.safetensors", index + 1),
            };
            weight_map.extend(views.iter().map(|(name, _)| (name.clone(), Value::from(file.as_str()))));
            serialize(views, &dir.join(&file))?;
            files.push(file);
        }
        if num_shards > 1 {
            let path = dir.join("model.safetensors.index.json");
            let index = json!({ "metadata": { "total_size": num_bytes }, "weight_map": weight_map });
            fs::write(&path, format!("{index:#}\n")).map_err(|source| ModelError::WriteFile { path, source })?;
        }
        Ok(Written { files, num_tensors, num_bytes })
    }

    /// What is written, in the order of the table of names.
    fn stored_views(&self, options: &WriteOptions) -> Vec<(String, StoredView<'_>)> {
        let owner = |key: &TensorName| tied_to(key, &self.layout, self.config.tie_word_embeddings);
        let is_copy = |key: &TensorName| owner(key).is_some_and(|owner| self.ids[&owner] == self.ids[key]);
        // Where one copy of a tied tensor differs, the others must say that they do not.
        let differing: HashSet<TensorName> = self.ids.keys().filter(|key| !is_copy(key)).filter_map(owner).collect();
        let says_so = |key: &TensorName| owner(key).is_some_and(|owner| differing.contains(&owner));
        expected_tensors(&self.config, &self.layout)
            .into_iter()
            .filter(|Expected { key, .. }| options.all_names || !is_copy(key) || says_so(key))
            .map(|expected| (expected.name, StoredView::new(self, self.ids[&expected.key], options.dtype)))
            .collect()
    }

    /// Refuses a type in which a weight would be infinite.
    fn check_representable(&self, dtype: Dtype) -> Result<(), ModelError> {
        let is_narrower = |id: &TensorId| self.dtype(*id) != dtype && dtype != Dtype::F32;
        for id in self.tensor_ids().filter(is_narrower) {
            let view = self.view(id);
            let mut values = vec![0.0; view.shape.last().copied().unwrap_or(1)];
            let len = values.len();
            for (row, bytes) in view.data.chunks(view.dtype.row_bytes(len)).enumerate() {
                decode_row(view.dtype, bytes, &mut values);
                let is_lost = |value: &f32| {
                    let mut stored = [0.0];
                    let (bytes, len) = encode(*value, dtype);
                    decode_row(dtype, &bytes[..len], &mut stored);
                    !stored[0].is_finite()
                };
                if let Some(at) = values.iter().position(is_lost) {
                    let (name, index) = (view.name.to_owned(), row * len + at);
                    return Err(ModelError::NotRepresentable { name, index, value: values[at], dtype });
                }
            }
        }
        Ok(())
    }
}

/// Cuts the tensors into runs that fit a file.
fn into_shards<'a>(views: Vec<(String, StoredView<'a>)>, max_bytes: u64) -> Vec<Vec<(String, StoredView<'a>)>> {
    let mut shards = vec![Vec::new()];
    let mut shard_bytes = 0_u64;
    for (name, view) in views {
        let bytes = view.num_bytes() as u64;
        if shard_bytes > 0 && shard_bytes.saturating_add(bytes) > max_bytes {
            shards.push(Vec::new());
            shard_bytes = 0;
        }
        shard_bytes += bytes;
        shards.last_mut().expect("there is a first shard").push((name, view));
    }
    shards
}

fn serialize(views: Vec<(String, StoredView<'_>)>, path: &Path) -> Result<(), ModelError> {
    // Readers of other programs look for it.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), path)
        .map_err(|source| ModelError::Write { path: path.to_owned(), source })
}

/// A tensor as safetensors stores it; converted when its bytes are asked for.
struct StoredView<'a> {
    checkpoint: &'a Checkpoint,
    id: TensorId,
    /// Of the elements, or U8 for packed rows.
    stored: safetensors::Dtype,
    shape: Vec<usize>,
    /// What to convert to.
    dtype: Option<Dtype>,
}

impl<'a> StoredView<'a> {
    fn new(checkpoint: &'a Checkpoint, id: TensorId, dtype: Option<Dtype>) -> Self {
        let mut shape = checkpoint.shape(id).to_vec();
        let own = checkpoint.dtype(id);
        let stored = match dtype.unwrap_or(own) {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::BF16 => safetensors::Dtype::BF16,
            packed @ (Dtype::Q8 | Dtype::Q4) => {
                shape[1] = packed.row_bytes(shape[1]);
                safetensors::Dtype::U8
            }
        };
        Self { checkpoint, id, stored, shape, dtype: dtype.filter(|dtype| *dtype != own) }
    }

    fn num_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.stored.bitsize() / 8
    }
}

impl safetensors::View for StoredView<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        self.stored
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let Some(dtype) = self.dtype else { return self.checkpoint.view(self.id).data };
        let values = self.checkpoint.to_f32(self.id);
        let mut bytes = Vec::with_capacity(values.len() * dtype.row_bytes(1));
        for value in values {
            let (elem, len) = encode(value, dtype);
            bytes.extend_from_slice(&elem[..len]);
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.num_bytes()
    }
}
