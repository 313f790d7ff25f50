//! Weight files: mapped, and read as far as their headers.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;
use safetensors::{SafeTensorError, SafeTensors};
use serde_json::{Map, Value};

use super::names::Expected;
use super::{Dtype, Place, Tensor, torch};
use crate::ModelError;

/// One safetensors file or buffer.
pub(super) struct WeightFile {
    /// Name for messages.
    pub(super) name: String,
    pub(super) bytes: Bytes,
}

pub(super) enum Bytes {
    Mapped(Mmap),
    Memory(Cow<'static, [u8]>),
}

impl Bytes {
    pub(super) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Memory(bytes) => bytes,
        }
    }
}

/// Weight files of a model and the tensors in them.
pub(crate) struct WeightFiles {
    pub(super) files: Vec<WeightFile>,
    pub(super) stored: HashMap<String, Stored>,
}

impl WeightFiles {
    /// Opens the safetensors files of a directory.
    pub(super) fn open(dir: &Path) -> Result<Self, ModelError> {
        let single = dir.join("model.safetensors");
        if single.is_file() {
            return Self::from_safetensors(map_file(&single)?);
        }
        let index = dir.join("model.safetensors.index.json");
        if !index.is_file() {
            return Err(ModelError::NoWeights { dir: dir.to_owned() });
        }
        Self::open_shards(dir, &index, Self::from_safetensors)
    }

    /// As `open`; without safetensors files, those that `torch.save` wrote.
    pub(crate) fn open_any(dir: &Path) -> Result<Self, ModelError> {
        let (pickled, index) = (dir.join("pytorch_model.bin"), dir.join("pytorch_model.bin.index.json"));
        match Self::open(dir) {
            Err(ModelError::NoWeights { .. }) if pickled.is_file() => torch::read(map_file(&pickled)?),
            Err(ModelError::NoWeights { .. }) if index.is_file() => Self::open_shards(dir, &index, torch::read),
            opened => opened,
        }
    }

    /// Opens the shards that an index names, each of which must hold what the index places there.
    fn open_shards(
        dir: &Path,
        index: &Path,
        read: fn(WeightFile) -> Result<Self, ModelError>,
    ) -> Result<Self, ModelError> {
        let mut all = Self { files: Vec::new(), stored: HashMap::new() };
        for (shard, names) in read_index(index)? {
            let path = dir.join(shard);
            let read = read(map_file(&path)?)?;
            if let Some(name) = names.into_iter().find(|name| !read.stored.contains_key(name)) {
                return Err(ModelError::ShardTensorMissing { file: path.display().to_string(), name });
            }
            all.add(read)?;
        }
        Ok(all)
    }

    pub(super) fn from_safetensors(file: WeightFile) -> Result<Self, ModelError> {
        let stored = read_header(&file)?;
        Ok(Self { files: vec![file], stored })
    }

    /// Adds the tensors of other files.
    fn add(&mut self, other: Self) -> Result<(), ModelError> {
        let before = self.files.len();
        self.files.extend(other.files);
        // Sorted, so that the first duplicate reported does not depend on hashing.
        for (name, tensor) in other.stored.into_iter().collect::<BTreeMap<_, _>>() {
            let tensor = Stored { file: before + tensor.file, ..tensor };
            let second = tensor.file;
            if let Some(earlier) = self.stored.insert(name.clone(), tensor) {
                let [first, second] = [earlier.file, second].map(|file| self.files[file].name.clone());
                return Err(ModelError::DuplicateTensor { name, first, second });
            }
        }
        Ok(())
    }

    /// Names of the tensors, in no order.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.stored.keys().map(String::as_str)
    }
}

/// What the index of a sharded model places in which file; sorted, so that messages do not depend on its order.
fn read_index(index: &Path) -> Result<BTreeMap<String, Vec<String>>, ModelError> {
    let origin = index.display().to_string();
    let text = fs::read_to_string(index).map_err(|source| ModelError::Io { path: index.to_owned(), source })?;
    let root: Map<String, Value> =
        serde_json::from_str(&text).map_err(|source| ModelError::JsonSyntax { origin: origin.clone(), source })?;
    let Some(Value::Object(weight_map)) = root.get("weight_map") else {
        let found = root.get("weight_map").map_or("missing", json_kind).to_owned();
        return Err(ModelError::ShardIndex { file: origin, found });
    };
    let mut names_of_shard: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, shard) in weight_map {
        let plain = shard.as_str().filter(|shard| is_plain_file_name(shard));
        let Some(shard) = plain else {
            let shard = shard.as_str().map_or_else(|| shard.to_string(), str::to_owned);
            return Err(ModelError::ShardPath { file: origin, name: name.clone(), shard });
        };
        names_of_shard.entry(shard.to_owned()).or_default().push(name.clone());
    }
    Ok(names_of_shard)
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

/// A tensor found in a file.
pub(super) struct Stored {
    pub(super) file: usize,
    pub(super) dtype: safetensors::Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Range<usize>,
}

impl Stored {
    /// The tensor, if it is what is expected: of `packed` rows, or of floats.
    pub(super) fn check(
        self,
        files: &[WeightFile],
        expected: &Expected,
        packed: Option<Dtype>,
    ) -> Result<Tensor, ModelError> {
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

/// Finds the tensors of a safetensors file.
fn read_header(file: &WeightFile) -> Result<HashMap<String, Stored>, ModelError> {
    let bytes = file.bytes.as_slice();
    let (header_bytes, header) = SafeTensors::read_metadata(bytes).map_err(|source| match source {
        SafeTensorError::HeaderTooSmall
        | SafeTensorError::InvalidHeaderLength
        | SafeTensorError::MetadataIncompleteBuffer => ModelError::FileLength {
            file: file.name.clone(),
            found_bytes: bytes.len() as u64,
            expected_bytes: described_bytes(bytes),
        },
        source => ModelError::SafetensorsHeader { file: file.name.clone(), source },
    })?;
    let data_start = 8 + header_bytes;
    let stored = header.tensors().into_iter().map(|(name, info)| {
        let bytes = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
        (name, Stored { file: 0, dtype: info.dtype, shape: info.shape.clone(), bytes })
    });
    Ok(stored.collect())
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
