//! draft
pub mod error;
pub mod sampling;
pub use error::{Result, RuntimeError};
