//! Mixture-of-Recursions language models as data: what a model is, before anything runs it.
//!
//! A Mixture-of-Recursions model applies one shared block of transformer layers several times, and decides per token
//! how often. This crate reads such a model and answers the questions an engine has about it:
//!
//! - [`MorConfig`]: the configuration, validated as a whole;
//! - [`LayerLayout`]: which effective layers are tied, which recursion they belong to, what their tensors are called;
//! - [`Checkpoint`]: the weights, checked and memory-mapped, with tied tensors found by content;
//! - [`KvLayout`]: where each layer keeps keys and values, and whose it attends to;
//! - [`convert`]: model folders made of runs of the official training code and of Llama checkpoints.
//!
//! # Features
//! - `oracle` (off): `oracle`, the whole model in plain Rust on the CPU, and `golden`, a reader of recorded reference results;
//!   faster implementations are tested against both.
//! - `hub` (off): `hub`, which fetches models from the Hugging Face Hub.
//!
//! # Example
//! ```
//! use mor_model::{Checkpoint, Dtype, KvLayout, MorConfig};
//!
//! let config = MorConfig::from_json_str(
//!     r#"{
//!         "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 8,
//!         "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
//!         "mor": { "mode": "token", "sharing": "middle_cycle", "num_recursion": 3, "kv": "sharing" }
//!     }"#,
//!     "example",
//! )?;
//! let checkpoint = Checkpoint::random(config, 0, Dtype::BF16);
//! let counts = checkpoint.parameter_counts();
//! assert!(counts.unique() < counts.effective());
//!
//! let kv = KvLayout::new(checkpoint.config(), checkpoint.layout());
//! assert_eq!(kv.bytes_per_token(&[], 2).ratio(), 0.5, "four of eight layers store keys and values");
//! # Ok::<(), mor_model::ModelError>(())
//! ```

mod config;
pub mod convert;
mod depth;
mod device_weights;
mod error;
mod fields;
mod folder;
#[cfg(feature = "oracle")]
pub mod golden;
#[cfg(feature = "hub")]
pub mod hub;
mod kv_layout;
mod layers;
mod lora;
mod model;
#[cfg(feature = "oracle")]
pub mod oracle;
mod recorder;
mod sharing;
mod step_tensors;
mod weights;

pub use config::{
    Balancing, Gating, KvStrategy, Lora, Mode, MorConfig, Quantization, RouterFunc, RouterType, Sampling,
    SharingStrategy,
};
pub use depth::DepthControl;
pub use device_weights::{DeviceWeights, Matrix, Precision, Shard};
pub use error::ModelError;
pub use folder::NewFolder;
pub use kv_layout::{GroupTokens, KvBytes, KvLayout, LayerKv, UNSHARED_GROUP, recursion_group};
pub use layers::LayersTensors;
pub use lora::{LoraFactors, lora_factors};
pub use model::{Batching, MorModel, ScriptedRouter};
pub use recorder::{LogitRows, MAX_FEW_ROWS, PARTS, Phase, Routing};
pub use sharing::{EffectiveLayer, LayerLayout};
pub use step_tensors::{KvTensors, SampleTensors, StepTensors};
pub use weights::{
    Checkpoint, Dtype, LayerTensor, LayerTensors, LoraTensors, ParameterCounts, RouterTensors, TensorId, TensorName,
    TensorView, WriteOptions, Written,
};
