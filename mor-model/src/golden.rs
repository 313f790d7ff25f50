//! Recorded results of a PyTorch reference, for tests of this crate and its dependents.
//!
//! A case is a folder: `config.json` and `model.safetensors` (the model), `tokens.safetensors` (inputs),
//! `expected.safetensors` (results) and `case.json` (layer layout). No decision in a case is closer than 0.01, so
//! routing and tokens can be demanded exactly; [`GoldenTensors::close`] has the tolerance for everything else.
//!
//! Beside the golden ones there are cases of relaxed models, with adapters and recursion encodings, in the same form;
//! the script in their folder computed their results in PyTorch, in float64, and compared them with float32.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::{Checkpoint, ModelError};

/// Absolute and relative tolerance for f32 results.
pub const TOLERANCE: f32 = 1e-4;

/// Folder with the golden cases of this repository.
pub fn fixtures_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden")
}

/// Folders of all cases, each kind sorted by name: the golden ones and, beside them, those of relaxed models.
///
/// # Errors
///
/// [`ModelError::Io`] when the fixtures are absent, as in a published package.
pub fn case_dirs() -> Result<Vec<PathBuf>, ModelError> {
    let mut dirs = Vec::new();
    for folder in [fixtures_dir(), fixtures_dir().with_file_name("relaxed")] {
        let io = |source| ModelError::Io { path: folder.clone(), source };
        let first = dirs.len();
        for entry in fs::read_dir(&folder).map_err(io)? {
            let path = entry.map_err(io)?.path();
            if path.join("case.json").is_file() {
                dirs.push(path);
            }
        }
        dirs[first..].sort();
    }
    Ok(dirs)
}

/// One golden case.
#[derive(Debug)]
pub struct GoldenCase {
    /// Folder name.
    pub name: String,
    /// Folder.
    pub dir: PathBuf,
    /// The model.
    pub checkpoint: Checkpoint,
    /// Sequences of the ragged batch, without padding.
    pub sequences: Vec<Vec<u32>>,
    /// Length padded rows of the expected tensors have.
    pub padded_len: usize,
    /// Prompts for decoding.
    pub prompts: Vec<Vec<u32>>,
    /// Results.
    pub expected: GoldenTensors,
    /// Layer layout.
    pub layout: GoldenLayout,
}

/// Content of `case.json`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct GoldenLayout {
    /// First tied layer of each effective layer.
    pub layer_owner: Vec<usize>,
    /// Recursion of each effective layer.
    pub layer_recursion: Vec<Option<u32>>,
    /// Name prefix of each effective layer.
    pub layer_prefix: Vec<String>,
    /// Whether the file holds a copy of a tied tensor under every name.
    pub tied_names_written: bool,
}

/// Named tensors of one file.
#[derive(Clone, Debug)]
pub struct GoldenTensors {
    file: String,
    tensors: BTreeMap<String, GoldenTensor>,
}

#[derive(Clone, Debug)]
struct GoldenTensor {
    shape: Vec<usize>,
    values: GoldenValues,
}

#[derive(Clone, Debug)]
enum GoldenValues {
    F32(Vec<f32>),
    /// I32 and U8 alike.
    Int(Vec<i32>),
}

impl GoldenCase {
    /// Reads a case.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::open`], and [`ModelError::GoldenTensor`] when a file lacks what every case has.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self, ModelError> {
        let dir = dir.as_ref();
        let tokens = GoldenTensors::load(&dir.join("tokens.safetensors"))?;
        let padded_len = tokens.shape("tokens")?[1];
        let sequences = tokens
            .ids("tokens")?
            .chunks(padded_len)
            .zip(tokens.ids("lengths")?)
            .map(|(row, len)| row[..len as usize].to_vec())
            .collect();
        let prompts = (0..)
            .map(|i| format!("prompt.{i}"))
            .take_while(|name| tokens.contains(name))
            .map(|name| tokens.ids(&name))
            .collect::<Result<_, _>>()?;
        let layout = dir.join("case.json");
        let text = fs::read(&layout).map_err(|source| ModelError::Io { path: layout.clone(), source })?;
        Ok(Self {
            name: dir.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            dir: dir.to_owned(),
            checkpoint: Checkpoint::open(dir)?,
            sequences,
            padded_len,
            prompts,
            expected: GoldenTensors::load(&dir.join("expected.safetensors"))?,
            layout: serde_json::from_slice(&text)
                .map_err(|source| ModelError::JsonSyntax { origin: layout.display().to_string(), source })?,
        })
    }

    /// Reads all cases of this repository.
    ///
    /// # Errors
    ///
    /// As [`case_dirs`] and [`GoldenCase::load`].
    pub fn load_all() -> Result<Vec<Self>, ModelError> {
        case_dirs()?.into_iter().map(Self::load).collect()
    }
}

impl GoldenTensors {
    /// Reads a safetensors file of F32, I32 and U8 tensors.
    ///
    /// # Errors
    ///
    /// [`ModelError::Io`], [`ModelError::SafetensorsHeader`], or [`ModelError::GoldenTensor`] for another element type.
    pub fn load(path: &Path) -> Result<Self, ModelError> {
        let file = path.display().to_string();
        let bytes = fs::read(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
        let parsed = SafeTensors::deserialize(&bytes)
            .map_err(|source| ModelError::SafetensorsHeader { file: file.clone(), source })?;
        let mut tensors = BTreeMap::new();
        for (name, view) in parsed.iter() {
            let quads = view.data().as_chunks::<4>().0.iter();
            let values = match view.dtype() {
                Dtype::F32 => GoldenValues::F32(quads.map(|b| f32::from_le_bytes(*b)).collect()),
                Dtype::I32 => GoldenValues::Int(quads.map(|b| i32::from_le_bytes(*b)).collect()),
                Dtype::U8 => GoldenValues::Int(view.data().iter().map(|&b| i32::from(b)).collect()),
                _ => {
                    let (name, expected) = (name.to_owned(), "F32, I32 or U8");
                    return Err(ModelError::GoldenTensor { file, name, expected });
                }
            };
            tensors.insert(name.to_owned(), GoldenTensor { shape: view.shape().to_vec(), values });
        }
        Ok(Self { file, tensors })
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape of a tensor.
    ///
    /// # Errors
    ///
    /// [`ModelError::GoldenTensor`] when it is absent.
    pub fn shape(&self, name: &str) -> Result<&[usize], ModelError> {
        self.get(name, "present").map(|tensor| tensor.shape.as_slice())
    }

    /// Elements of a float tensor.
    ///
    /// # Errors
    ///
    /// [`ModelError::GoldenTensor`] when it is absent or not F32.
    pub fn f32(&self, name: &str) -> Result<&[f32], ModelError> {
        match &self.get(name, "F32")?.values {
            GoldenValues::F32(values) => Ok(values),
            GoldenValues::Int(_) => Err(self.error(name, "F32")),
        }
    }

    /// Elements of an integer tensor.
    ///
    /// # Errors
    ///
    /// [`ModelError::GoldenTensor`] when it is absent or not I32 or U8.
    pub fn int(&self, name: &str) -> Result<&[i32], ModelError> {
        match &self.get(name, "I32 or U8")?.values {
            GoldenValues::Int(values) => Ok(values),
            GoldenValues::F32(_) => Err(self.error(name, "I32 or U8")),
        }
    }

    /// Elements of an integer tensor that are token ids, depths or counts.
    ///
    /// # Errors
    ///
    /// As [`GoldenTensors::int`], also when an element is negative.
    pub fn ids(&self, name: &str) -> Result<Vec<u32>, ModelError> {
        let ids = self.int(name)?.iter().map(|&id| u32::try_from(id).ok()).collect::<Option<_>>();
        ids.ok_or_else(|| self.error(name, "non-negative"))
    }

    /// Whether `found` equals `expected` within [`TOLERANCE`], absolute plus relative.
    pub fn close(found: f32, expected: f32) -> bool {
        // Written so that NaN is never close.
        (found - expected).abs() <= TOLERANCE + TOLERANCE * expected.abs()
    }

    fn get(&self, name: &str, expected: &'static str) -> Result<&GoldenTensor, ModelError> {
        self.tensors.get(name).ok_or_else(|| self.error(name, expected))
    }

    fn error(&self, name: &str, expected: &'static str) -> ModelError {
        ModelError::GoldenTensor { file: self.file.clone(), name: name.to_owned(), expected }
    }
}
