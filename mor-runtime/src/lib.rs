//! Runs Mixture-of-Recursions language models: loading, generation, full forward passes and likelihoods.
//!
//! [`Session`] is the front door. It opens a device, loads a model folder in Hugging Face layout and continues prompts;
//! [`Session::generate`] is an iterator of [`Event`]s. The device draws each token and feeds it to the next step itself,
//! the host runs some steps ahead and learns tokens and depths as they arrive.
//!
//! # Features
//! - `chat` (off): the module of that name writes conversations as a model's chat template wants them.
//!
//! # Example
//! ```
//! use mor_model::{Dtype, MorConfig};
//! use mor_runtime::{Event, GenerateRequest, ModelSource, SamplingParams, Session, SessionOptions};
//!
//! // Random weights stand in for a model; with files it is `ModelSource::Folder("path/to/model".into())`.
//! let config = MorConfig::from_json_str(
//!     r#"{
//!         "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 5,
//!         "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
//!         "mor": { "mode": "expert", "sharing": "middle_cycle", "num_recursion": 3 }
//!     }"#,
//!     "example",
//! )?;
//! let source = ModelSource::Random { config, seed: 0, dtype: Dtype::BF16 };
//! let mut session = Session::load(source, SessionOptions::default())?;
//!
//! let request = GenerateRequest {
//!     max_new_tokens: 8,
//!     sampling: SamplingParams::greedy(),
//!     ..GenerateRequest::new(vec![5, 23, 42])
//! };
//! for event in session.generate(&request)? {
//!     match event? {
//!         Event::Token { token, depth, .. } => println!("token {token}, depth {depth:?}"),
//!         Event::Finished(summary) => {
//!             assert_eq!(summary.tokens.len(), 8);
//!             // One depth for every token fed: all but the last.
//!             assert_eq!(summary.depths.len(), 3 + 8 - 1);
//!         }
//!         _ => {}
//!     }
//! }
//! # Ok::<(), mor_runtime::RuntimeError>(())
//! ```
//!
//! A model with a `tokenizer.json` speaks text: [`Session::tokenizer`] encodes the prompt, and [`Event::Token`] carries
//! what each token adds to the text. `examples/` has complete programs: `generate` is the smallest; `stream` cancels, `batch`
//! runs several prompts at a time, `embeddings` takes hidden states, `custom_sampler` draws tokens itself, `choose_adapter` and
//! `shared_device` say where all of it runs.
//!
//! [`runner`] is the layer below, for programs that drive batches of sequences themselves. [`Session::load_on`] takes a device
//! that a program has opened itself.
//!
//! Options are built from their defaults, `SessionOptions { .., ..SessionOptions::default() }`: fields will be added.

#[cfg(feature = "chat")]
pub mod chat;
mod engine;
mod error;
mod evaluator;
mod event;
mod fleet;
pub mod kv_cache;
mod page_pool;
mod prefix_cache;
pub mod runner;
mod sampling;
mod scheduler;
mod session;
mod text;

pub use engine::{KvUse, Statistics};
pub use error::{Result, RuntimeError};
pub use event::{Event, SequenceHandle, Summary};
pub use fleet::{Fleet, Report};
pub use mor_kernels::Gpu;
pub use mor_kernels::gpu::{AdapterKind, AdapterSummary, DeviceSelector, GpuOptions};
pub use mor_model::{Batching, DepthControl, KvStrategy, Precision, Quantization, Routing, ScriptedRouter};
pub use sampling::{FinishReason, GenerateRequest, SamplingParams};
pub use session::{
    BatchOptions, ForwardOutput, Generation, LoadProgress, ModelSource, Score, SequenceOutput, Session, SessionOptions,
    StepProfile,
};
pub use text::{Piece, TextStream, Tokenizer};
