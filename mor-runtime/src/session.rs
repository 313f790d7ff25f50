//! [`Session`]: a model on a device.
#![expect(clippy::unimplemented, reason = "signatures only")]

use std::borrow::Cow;
use std::marker::PhantomData;
use std::path::PathBuf;

use mor_kernels::gpu::{AdapterSummary, GpuOptions};
use mor_model::{Dtype, KvStrategy, MorConfig, Precision, Routing};

use crate::error::Result;
use crate::sampling::{FinishReason, GenerateRequest};
use crate::text::Tokenizer;

/// Where a model comes from.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub enum ModelSource {
    /// A folder in Hugging Face layout.
    Folder(PathBuf),
    /// A model in memory.
    Bytes {
        /// Content of `config.json`.
        config_json: Cow<'static, str>,
        /// Content of `model.safetensors`.
        weights: Cow<'static, [u8]>,
        /// Content of `tokenizer.json`.
        tokenizer_json: Option<Cow<'static, [u8]>>,
        /// Name for messages.
        origin: String,
    },
    /// Random weights, for benchmarks.
    Random {
        /// Shape.
        config: MorConfig,
        /// Seed.
        seed: u64,
        /// Type of the weights.
        dtype: Dtype,
    },
}

/// Called while weights are uploaded.
pub type OnLoad = Box<dyn FnMut(LoadProgress)>;

/// How to load a model.
#[derive(Default)]
pub struct SessionOptions {
    /// Device.
    pub gpu: GpuOptions,
    /// How numbers are stored; `None` is f16 on GPUs and f32 on software adapters.
    pub precision: Option<Precision>,
    /// Another K/V strategy than the configuration's.
    pub kv: Option<KvStrategy>,
    /// Progress of the upload.
    pub on_load: Option<OnLoad>,
}

/// Progress of the upload.
#[derive(Clone, Copy, Debug)]
pub struct LoadProgress {
    /// Bytes so far.
    pub uploaded_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// A model on a device.
#[derive(Debug)]
pub struct Session {}

/// A generation under way.
#[derive(Debug)]
pub struct Generation<'s>(PhantomData<&'s mut Session>);

impl Iterator for Generation<'_> {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        unimplemented!()
    }
}

#[expect(missing_docs, reason = "signatures only")]
impl Session {
    pub fn load(_source: ModelSource, _options: SessionOptions) -> Result<Self> {
        unimplemented!()
    }
    pub fn config(&self) -> &MorConfig {
        unimplemented!()
    }
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        unimplemented!()
    }
    pub fn device(&self) -> &AdapterSummary {
        unimplemented!()
    }
    pub fn precision(&self) -> Precision {
        unimplemented!()
    }
    pub fn load_ms(&self) -> f64 {
        unimplemented!()
    }
    pub fn generate(&mut self, _request: &GenerateRequest) -> Result<Generation<'_>> {
        unimplemented!()
    }
    pub fn forward(&mut self, _sequences: &[Vec<u32>], _routing: Routing) -> Result<ForwardOutput> {
        unimplemented!()
    }
    pub fn score(&mut self, _document: &[u32], _routing: Routing) -> Result<Score> {
        unimplemented!()
    }
}

/// What happens during a generation.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub enum Event {
    /// After prefill: depths of the prompt's tokens.
    Prompt {
        /// One per token.
        depths: Vec<u32>,
    },
    /// A new token.
    Token {
        /// Id.
        token: u32,
        /// What it adds to the output.
        text: String,
        /// `None` for the last one, which is never fed.
        depth: Option<u32>,
    },
    /// The end.
    Finished(Summary),
}

/// What a generation did.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "signatures only")]
pub struct Summary {
    pub finish_reason: FinishReason,
    pub prompt_tokens: Vec<u32>,
    pub tokens: Vec<u32>,
    pub depths: Vec<u32>,
    pub text: Option<String>,
    pub kv_entries: Vec<usize>,
    pub mean_depth: f64,
    pub prefill_tokens_per_s: f64,
    pub decode_tokens_per_s: f64,
}

/// What a forward pass computed.
#[derive(Clone, Debug)]
pub struct ForwardOutput {
    /// One per sequence.
    pub sequences: Vec<SequenceOutput>,
}

/// What a forward pass computed for one sequence.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "signatures only")]
pub struct SequenceOutput {
    pub logits: Vec<f32>,
    pub hidden: Vec<f32>,
    pub depth: Vec<u32>,
    pub selected: Vec<Vec<bool>>,
    pub router_logits: Vec<Vec<f32>>,
    pub router_weights: Vec<Vec<f32>>,
    pub aux_logits: Vec<Vec<f32>>,
    pub block_out: Vec<Vec<f32>>,
}

/// How likely a document is.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "signatures only")]
pub struct Score {
    pub nll: Vec<f32>,
    pub depth: Vec<u32>,
}
