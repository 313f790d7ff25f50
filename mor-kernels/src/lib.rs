//! draft
pub mod caps;
pub mod epilogue;
pub mod error;
pub mod gpu;
pub mod kernel;
pub mod plan;
pub mod rows;
pub mod shader;
pub mod submit;
pub mod tensor;
pub mod timing;

pub use error::{KernelError, Result};
pub use gpu::Gpu;
pub mod ops;
#[cfg(feature = "oracle")]
pub mod oracle;
#[cfg(feature = "oracle")]
pub mod parity;
#[cfg(feature = "oracle")]
pub mod variants;
