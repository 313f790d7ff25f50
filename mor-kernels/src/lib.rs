//! Hand-written WGSL compute kernels for Mixture-of-Recursions models, seen from Rust: the only crate of the engine
//! that names wgpu.
//!
//! A **kernel** is one WGSL entry point. Four files share its stem: the shader `<stem>.wgsl` (package `mor-shaders`),
//! the typed wrapper [`ops`]`::<stem>`, the CPU reference `oracle::<stem>`, and the bench. The wrapper is a small value:
//! its fields are what the shader is specialised for ([`Kernel`](kernel::Kernel)), its `Bindings` name the tensors, its
//! `Params` mirror the shader's uniform. Recording it appends one dispatch to a [`Plan`](plan::Plan).
//!
//! - [`gpu`]: [`Gpu`], an opened device, and how one is found and chosen; [`caps`]: what it offers.
//! - [`tensor`]: [`Tensor`](tensor::Tensor), a labelled typed buffer without operators.
//! - [`rows`]: lists of active rows, and where their keys and values live. Kernels run over such a list and read
//!   streams through it; its length stays on the device and sizes the grids of what follows.
//! - [`plan`]: dispatches recorded once and encoded every step, without branches or arguments.
//! - [`submit`]: plans handed to the device together, and bytes read back some time later; [`upload`]: many tensors filled;
//!   [`writes`]: small writes handed over together.
//! - [`epilogue`]: what becomes of a linear kernel's results, shared by [`ops::Linear`] and [`ops::LinearDecode`].
//! - [`quantize`]: weights as small integers in groups, packed as the linear kernels read them.
//! - [`timing`]: device time by timestamp queries; [`peaks`]: what a device reaches at best.
//!
//! A program that has a device of its own shares it through [`Gpu::from_wgpu`], and runs kernels of its own by giving
//! [`Kernel`](kernel::Kernel) a source.
//!
//! # Features
//! - `oracle` (off): `oracle`, the CPU references; `parity`, the harness that compares kernels with them; `variants`, every
//!   specialisation. For tests and benches; it changes no result.
//!
//! # Example
//!
//! ```
//! use mor_kernels::gpu::{Gpu, GpuOptions};
//! use mor_kernels::ops::{RmsNorm, RmsNormBindings, RmsNormParams};
//! use mor_kernels::plan::{Grid, PlanBuilder};
//! use mor_kernels::rows::{ActiveRow, RowSet};
//! use mor_kernels::tensor::{DType, Tensor};
//!
//! let gpu = Gpu::open(&GpuOptions::default())?;
//! // A stream of three rows of four elements; rows 0 and 2 are active.
//! let stream = [[2_f32; 4], [0.0; 4], [-3.0; 4]];
//! let x = Tensor::from_slice(&gpu, "x", DType::F32, &[3, 4], &stream)?;
//! let weight = Tensor::from_slice(&gpu, "weight", DType::F32, &[4], &[1_f32; 4])?;
//! let rows = RowSet::from_rows(&gpu, "active", &[0, 2].map(|row| ActiveRow { row, ..ActiveRow::ABSENT }))?;
//! let y = Tensor::zeros(&gpu, "y", DType::F32, &[2, 4])?;
//!
//! let mut plan = PlanBuilder::new(&gpu)?;
//! let bindings = RmsNormBindings { rows: &rows, x: &x, weight: &weight, y: &y };
//! let params = RmsNormParams { eps: 0.0 };
//! plan.dispatch(&RmsNorm::new(gpu.caps(), 4), &bindings, &params, Grid::Fixed([1, 2, 1]))?;
//! gpu.run(&plan.finish()?)?;
//!
//! let expected = [1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0];
//! let found: Vec<f32> = gpu.read(&y)?;
//! assert!(found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-6));
//! # Ok::<(), mor_kernels::KernelError>(())
//! ```

pub mod caps;
pub mod epilogue;
pub mod error;
pub mod gpu;
mod kept_file;
pub mod kernel;
pub mod kv_blocks;
pub mod ops;
#[cfg(feature = "oracle")]
pub mod oracle;
#[cfg(feature = "oracle")]
pub mod parity;
pub mod peaks;
mod pipeline_cache;
pub mod plan;
pub mod quantize;
pub mod rows;
pub mod shader;
pub mod submit;
pub mod tensor;
pub mod timing;
mod tuning;
pub mod upload;
#[cfg(feature = "oracle")]
pub mod variants;
pub mod writes;

pub use error::{KernelError, Result};
pub use gpu::Gpu;
/// The version of wgpu whose devices [`Gpu::from_wgpu`] takes.
pub use wgpu;

/// The library through which devices are driven, with its version: for reports.
pub const GPU_LIBRARY: &str = "wgpu 30.0.1";
