//! How a model is loaded and its sequences run.

use std::borrow::Cow;
use std::path::PathBuf;

use mor_kernels::gpu::GpuOptions;
use mor_model::{Batching, Checkpoint, DepthControl, Dtype, KvStrategy, MorConfig, Precision, Quantization};

use crate::error::{Result, RuntimeError};
use crate::text::Tokenizer;

/// Where a model comes from.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub enum ModelSource {
    /// A folder in Hugging Face layout: `config.json`, safetensors, and `tokenizer.json` if text is wanted.
    Folder(PathBuf),
    /// Files already in memory.
    Bytes {
        /// `config.json`.
        config_json: Cow<'static, str>,
        /// `model.safetensors`.
        weights: Cow<'static, [u8]>,
        /// `tokenizer.json`.
        tokenizer_json: Option<Cow<'static, [u8]>>,
        /// What to call them in messages.
        origin: String,
    },
    /// Random weights of a configuration, for benchmarks.
    Random {
        /// The configuration.
        config: MorConfig,
        /// Seed of the weights.
        seed: u64,
        /// Type of the weights.
        dtype: Dtype,
    },
}

/// Bytes uploaded so far.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes on the device.
    pub uploaded_bytes: u64,
    /// Bytes of all distinct tensors.
    pub total_bytes: u64,
}

/// How to load a model.
#[derive(Default)]
pub struct SessionOptions {
    /// Device and shader options.
    pub gpu: GpuOptions,
    /// How numbers are stored; `None` is f16 on GPUs and f32 on software adapters.
    pub precision: Option<Precision>,
    /// Replaces the configuration's K/V strategy.
    pub kv: Option<KvStrategy>,
    /// How far tokens go, other than their routers alone would have it.
    pub depth: DepthControl,
    /// How many sequences run at a time, and in how much memory.
    pub batch: BatchOptions,
    /// Quantises the matrices first.
    pub quantize: Option<Quantization>,
    /// Keeps keys and values in 8 bits, half the memory of f16; see [`MorModel::with_packed_kv`](mor_model::MorModel::with_packed_kv).
    pub quantize_kv: bool,
    /// Called while weights are uploaded.
    pub on_load: Option<Box<dyn FnMut(LoadProgress)>>,
}

/// How a session runs several sequences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// Sequences that decode at a time, each in a slot; more wait.
    pub max_sequences: usize,
    /// Bytes of K/V memory. `None`: what all slots need at their longest, but no more than half of what the weights leave
    /// of the adapter's memory.
    pub kv_bytes: Option<u64>,
    /// Tokens of the longest sequence. `None`: the model's context; with one slot, what its sequence needs.
    pub max_context: Option<usize>,
    /// Sequences that begin alike share what the beginning has computed, also after the first of them has ended.
    pub share_prefixes: bool,
    /// How tokens go through the recursions; `None` is depth-wise where the model allows it.
    pub batching: Option<Batching>,
    /// Most rows of a prefill step; no more than 512 where other sequences decode meanwhile or the device is no discrete GPU (128 if it
    /// is no software rasteriser either), and fewer where so many would take long or much of the memory.
    pub prefill_rows: usize,
    /// Computes a sequence to the same bits whatever runs beside it; see
    /// [`RunnerOptions::batch_invariant`](crate::runner::RunnerOptions::batch_invariant).
    pub batch_invariant: bool,
    /// With one sequence at a time, runs all layers of a decode step in one dispatch, or several steps; see
    /// [`RunnerOptions::persistent`](crate::runner::RunnerOptions::persistent).
    pub persistent: bool,
}

impl Default for BatchOptions {
    /// One sequence at a time, shared beginnings, and up to 8192 rows of prefill, or as many as the environment variable
    /// `MOR_PREFILL_CHUNK` says; what is no number counts as 0, which is refused.
    fn default() -> Self {
        let prefill_rows = std::env::var("MOR_PREFILL_CHUNK").map_or(8192, |rows| rows.trim().parse().unwrap_or(0));
        Self {
            max_sequences: 1,
            kv_bytes: None,
            max_context: None,
            share_prefixes: true,
            batching: None,
            prefill_rows,
            batch_invariant: false,
            persistent: false,
        }
    }
}

impl BatchOptions {
    pub(super) fn validate(&self) -> Result<()> {
        let least = |name, value: usize, least: usize, expected| {
            let error = RuntimeError::Parameter { name, found: value.to_string(), expected };
            if value < least { Err(error) } else { Ok(()) }
        };
        // What stands there, where it is no number.
        let chunk = std::env::var("MOR_PREFILL_CHUNK").ok().filter(|rows| rows.trim().parse::<usize>().is_err());
        if let (0, Some(found)) = (self.prefill_rows, chunk) {
            return Err(RuntimeError::Parameter { name: "prefill_rows", found, expected: "16 or more" });
        }
        least("max_sequences", self.max_sequences, 1, "1 or more")?;
        least("max_context", self.max_context.unwrap_or(1), 1, "1 or more")?;
        least("prefill_rows", self.prefill_rows, 16, "16 or more")
    }
}

/// Opens a model and makes of its weights what options ask for.
pub(super) fn prepare(
    source: ModelSource,
    kv: Option<KvStrategy>,
    depth: DepthControl,
    quantization: Option<Quantization>,
) -> Result<(Checkpoint, Option<Tokenizer>)> {
    let (mut checkpoint, tokenizer) = open(source)?;
    if let Some(kv) = kv {
        checkpoint = checkpoint.with_kv(kv)?;
    }
    depth.validate(checkpoint.config())?;
    if let Some(quantization) = quantization {
        checkpoint = checkpoint.quantize(quantization)?;
    }
    Ok((checkpoint, tokenizer))
}

fn open(source: ModelSource) -> Result<(Checkpoint, Option<Tokenizer>)> {
    match source {
        ModelSource::Folder(folder) => {
            let checkpoint = Checkpoint::open(&folder)?;
            let path = folder.join("tokenizer.json");
            let vocab_size = checkpoint.config().vocab_size;
            let tokenizer = path.exists().then(|| Tokenizer::from_file(&path, vocab_size)).transpose()?;
            Ok((checkpoint, tokenizer))
        }
        ModelSource::Bytes { config_json, weights, tokenizer_json, origin } => {
            let checkpoint = Checkpoint::from_bytes(&config_json, weights, &origin)?;
            let vocab_size = checkpoint.config().vocab_size;
            let tokenizer =
                tokenizer_json.map(|bytes| Tokenizer::from_bytes(&bytes, &origin, vocab_size)).transpose()?;
            Ok((checkpoint, tokenizer))
        }
        ModelSource::Random { config, seed, dtype } => Ok((Checkpoint::random(config, seed, dtype), None)),
    }
}
