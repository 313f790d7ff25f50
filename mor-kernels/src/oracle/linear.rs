//! CPU reference of `linear`: the kernel differs from `linear_decode` in speed only, so they share it.

pub use super::linear_decode::{EpilogueState, epilogue, gather, linear};
