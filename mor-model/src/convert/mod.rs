//! Model folders made of other checkpoints, and the way back.
//!
//! Three kinds of folders are read: runs of the official training code (weights under every name and a YAML file), plain
//! Llama checkpoints, and the folders of this crate. [`convert`] writes a folder of this crate, or one of the official
//! layout. A Llama checkpoint can become the start of a recursive model on the way.

mod official;
mod start;

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

pub use start::{Init, Start};

use crate::config::names;
use crate::weights::{WeightFiles, WriteOptions, expected_names};
use crate::{Checkpoint, Dtype, ModelError, MorConfig, NewFolder};

names! {
    /// How a folder names its tensors and says what it is.
    Layout {
        /// This crate's: `config.json` with a `mor` object, tied tensors once.
        Mor = "mor",
        /// The official training code's: a YAML file, tensors under every name.
        Official = "official",
    }
}

/// What [`convert`] makes of a folder.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvertOptions {
    /// YAML file of an official run; `None` takes the one in the folder, if there is exactly one.
    pub run_config: Option<PathBuf>,
    /// Makes a vanilla checkpoint the start of a recursive one.
    pub start: Option<Start>,
    /// F32, F16 or BF16 for all tensors; `None` for the type each has.
    pub dtype: Option<Dtype>,
    /// Most bytes of tensors a file.
    pub max_shard_bytes: u64,
    /// Layout to write.
    pub layout: Layout,
}

impl Default for ConvertOptions {
    /// This crate's layout, types as they are, shards of up to 5 GB.
    fn default() -> Self {
        Self { run_config: None, start: None, dtype: None, max_shard_bytes: 5_000_000_000, layout: Layout::Mor }
    }
}

/// What [`convert`] has read and written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ConvertReport {
    /// Kind of the folder read: `official`, `llama` or `mor`.
    pub source: &'static str,
    /// Mode of the model written.
    pub mode: &'static str,
    /// Its sharing.
    pub sharing: &'static str,
    /// Its recursions.
    pub num_recursions: usize,
    /// Whether its routers are new, so that it must be trained before depths mean anything.
    pub untrained_router: bool,
    /// Weight files written.
    pub files: Vec<String>,
    /// Tensors in them.
    pub num_tensors: usize,
    /// Bytes of these tensors.
    pub num_bytes: u64,
    /// Other files copied: tokenizer, description, credits.
    pub copied: Vec<String>,
    /// Tensors read that equal the first of their tied group.
    pub tied: Vec<TiedTensor>,
    /// Tensors read that a tie would drop, but whose values differ, so that they are kept.
    pub kept_separate: Vec<TiedTensor>,
    /// Tensors read that are no weights.
    pub ignored: Vec<String>,
    /// Of a start, the layers each block layer was made of.
    pub sources: Vec<LayerSource>,
}

/// A tensor and the one that it is tied to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TiedTensor {
    /// Name in the files read.
    pub name: String,
    /// Name of the first tensor of the group.
    pub first: String,
}

/// What a layer of a start was made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayerSource {
    /// Effective layer, the first of its tied group.
    pub layer: usize,
    /// Layers of the vanilla model; several are averaged.
    pub sources: Vec<usize>,
}

/// A folder that has been read.
struct Source {
    kind: &'static str,
    checkpoint: Checkpoint,
    /// `config.json` as it stands, empty where there is none.
    base: Map<String, Value>,
    /// Tensors in the files.
    names: HashSet<String>,
}

/// Reads the model folder `src` and writes `out`, which must not exist; it appears whole or not at all.
///
/// Weights are read in place and written one at a time.
///
/// # Errors
///
/// Those of [`Checkpoint::open`]; [`ModelError::TorchFile`], [`ModelError::YamlSyntax`] and the configuration variants for
/// an official run; [`ModelError::Convert`] and [`ModelError::QuantizedSource`] for what cannot be converted so;
/// [`ModelError::NewFolder`], [`ModelError::NotRepresentable`], [`ModelError::Write`] and [`ModelError::WriteFile`].
pub fn convert(src: &Path, out: &Path, options: &ConvertOptions) -> Result<ConvertReport, ModelError> {
    NewFolder::check(out)?;
    let source = Source::open(src, options)?;
    if let Some(found) = source.checkpoint.config().quantization
        && (options.start.is_some() || options.layout == Layout::Official)
    {
        return Err(ModelError::QuantizedSource { found });
    }
    let (tied, kept_separate, ignored) = source.ties();
    let Source { kind, mut checkpoint, mut base, .. } = source;
    let mut sources = Vec::new();
    if let Some(start) = &options.start {
        (checkpoint, sources) = start.apply(checkpoint, &base, &src.display().to_string())?;
    }

    if let Some(dtype) = options.dtype {
        let name = match dtype {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
            Dtype::Q8 | Dtype::Q4 => {
                let problem = format!("a type of {dtype} was asked for, expected F32, F16 or BF16; quantise instead");
                return Err(ModelError::Convert { origin: src.display().to_string(), problem });
            }
        };
        base.insert("torch_dtype".to_owned(), Value::from(name));
        // The newer name of the same field.
        if let Some(dtype) = base.get_mut("dtype") {
            *dtype = Value::from(name);
        }
    }
    let is_official = options.layout == Layout::Official;
    let config = checkpoint.config();
    if is_official && config.lora.is_some() && config.recursion_encoding {
        let problem =
            "has adapters and recursion encodings, of which official runs have one; convert to this program's layout"
                .to_owned();
        return Err(ModelError::Convert { origin: src.display().to_string(), problem });
    }
    let folder = NewFolder::create(out)?;
    if is_official {
        folder.write("config.json", &to_text(official::llama_config(base, config)))?;
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        folder.write(&format!("{name}.yaml"), &official::run_config(config))?;
    } else {
        folder.write("config.json", &to_text(own_config(base, config)))?;
    }
    let write = WriteOptions { dtype: options.dtype, max_shard_bytes: options.max_shard_bytes, all_names: is_official };
    let written = checkpoint.write(folder.path(), &write)?;
    let copied = folder.copy_companions(src)?;
    folder.publish()?;
    Ok(ConvertReport {
        source: kind,
        mode: config.mode.as_str(),
        sharing: config.sharing.as_str(),
        num_recursions: config.num_recursions,
        untrained_router: config.untrained_router,
        files: written.files,
        num_tensors: written.num_tensors,
        num_bytes: written.num_bytes,
        copied,
        tied,
        kept_separate,
        ignored,
        sources,
    })
}

impl Source {
    fn open(src: &Path, options: &ConvertOptions) -> Result<Self, ModelError> {
        let config_path = src.join("config.json");
        let base = if config_path.is_file() { read_object(&config_path)? } else { Map::new() };
        let has_routing = base.get("mor").is_some_and(Value::is_object);
        let run_config = match &options.run_config {
            Some(path) if has_routing => {
                let problem = format!("has a mor object, which contradicts {}; leave one away", path.display());
                return Err(ModelError::Convert { origin: config_path.display().to_string(), problem });
            }
            Some(path) => Some(path.clone()),
            // A Llama checkpoint that becomes a start needs none, whatever lies beside it.
            None if has_routing || (options.start.is_some() && !base.is_empty()) => None,
            None => official::find_run_config(src)?,
        };
        let (kind, config) = match &run_config {
            Some(path) => ("official", official::read_config(path, &base)?),
            None => {
                let kind = if has_routing { "mor" } else { "llama" };
                (kind, MorConfig::from_json_file(&config_path)?)
            }
        };
        let files = WeightFiles::open_any(src)?;
        let names = files.names().map(str::to_owned).collect();
        let checkpoint = Checkpoint::from_files(config, files, &src.display().to_string())?;
        Ok(Self { kind, checkpoint, base, names })
    }

    /// What became of the tensors read: tied, kept although a tie would drop them, ignored.
    fn ties(&self) -> (Vec<TiedTensor>, Vec<TiedTensor>, Vec<String>) {
        let (mut tied, mut kept_separate) = (Vec::new(), Vec::new());
        let mut expected = HashSet::new();
        for tensor in expected_names(&self.checkpoint) {
            if let Some((first, is_same)) = tensor.first
                && self.names.contains(&tensor.name)
            {
                let list = if is_same { &mut tied } else { &mut kept_separate };
                list.push(TiedTensor { name: tensor.name.clone(), first });
            }
            expected.insert(tensor.name);
        }
        let mut ignored: Vec<String> = self.names.difference(&expected).cloned().collect();
        ignored.sort();
        (tied, kept_separate, ignored)
    }
}

/// The configuration of a folder of this crate: what was read, where that says it all, so that others who load a Llama
/// still do.
fn own_config(mut base: Map<String, Value>, config: &MorConfig) -> Map<String, Value> {
    let own = MorConfig::from_json_str(&Value::Object(base.clone()).to_string(), "config.json");
    if own.is_ok_and(|own| own == *config) {
        return base;
    }
    // It names a class that does not know the `mor` object.
    base.remove("architectures");
    base.extend(fields_of(config));
    base
}

/// Every field of a configuration.
fn fields_of(config: &MorConfig) -> Map<String, Value> {
    match serde_json::to_value(config) {
        Ok(Value::Object(fields)) => fields,
        // It serialises as an object, and into memory.
        _ => Map::new(),
    }
}

fn to_text(map: Map<String, Value>) -> String {
    format!("{:#}\n", Value::Object(map))
}

fn read_object(path: &Path) -> Result<Map<String, Value>, ModelError> {
    serde_json::from_str(&read_text(path)?)
        .map_err(|source| ModelError::JsonSyntax { origin: path.display().to_string(), source })
}

fn read_text(path: &Path) -> Result<String, ModelError> {
    fs::read_to_string(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })
}
