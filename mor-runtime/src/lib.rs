//! draft
mod error;
mod kv_pool;
pub mod runner;
mod sampling;
mod session;
mod text;

pub use error::{Result, RuntimeError};
pub use mor_kernels::gpu::{AdapterKind, AdapterSummary, DeviceSelector, GpuOptions};
pub use mor_model::{KvStrategy, Precision, Routing};
pub use sampling::{FinishReason, GenerateRequest, SamplingParams};
pub use session::{
    DecodeProfile, Event, ForwardOutput, Generation, LoadProgress, ModelSource, Score, SequenceOutput, Session,
    SessionOptions, Summary,
};
pub use text::{Piece, TextStream, Tokenizer};
