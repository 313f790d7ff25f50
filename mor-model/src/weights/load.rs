//! From files to a checkpoint: every tensor found, ties resolved, values checked.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::dtype::{decode_row, first_non_finite};
use super::files::{Bytes, WeightFile, WeightFiles};
use super::names::{Expected, LayerTensor, TensorName, expected_tensors, is_derived_buffer, tied_to};
use super::{Checkpoint, Place, Source, Tensor, TensorId};
use crate::{LayerLayout, ModelError, MorConfig};

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
        Self::from_files(config, WeightFiles::open(dir)?, &dir.display().to_string())
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
        Self::from_files(config, WeightFiles::from_safetensors(file)?, origin)
    }

    /// Checks the tensors of `files` against the table of expected ones and resolves ties.
    pub(crate) fn from_files(config: MorConfig, files: WeightFiles, origin: &str) -> Result<Self, ModelError> {
        let WeightFiles { files, mut stored } = files;
        let layout = LayerLayout::new(&config);
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
    let num_threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(16);
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
