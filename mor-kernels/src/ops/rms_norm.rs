//! Normalises the active rows of a stream into a dense batch.

use crate::caps::DeviceCaps;
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::RowSet;
use crate::shader::Definitions;
use crate::tensor::{DType, Tensor};

/// `y[i] = weight * x[r] / sqrt(mean(x[r]^2) + eps)` for the active rows `r`.
///
/// # Source
/// Zhang and Sennrich 2019, arXiv 1910.07467.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm {
    /// Elements of a row, a multiple of 4.
    pub hidden_size: u32,
    /// Threads of a workgroup: a power of two.
    pub workgroup_size: u32,
    /// Whether y is f16.
    pub half_output: bool,
}

/// Constants of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct RmsNormParams {
    /// Added to the mean square.
    pub eps: f32,
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct RmsNormBindings<'a> {
    /// The rows to normalise, n of them.
    pub rows: &'a RowSet,
    /// `[T, C]` f32.
    pub x: &'a Tensor,
    /// `[C]` f32.
    pub weight: &'a Tensor,
    /// `[n, C]` f32 or f16, written.
    pub y: &'a Tensor,
}

impl RmsNorm {
    /// The kernel for rows of `hidden_size` elements, in the workgroup size that suits the device: a software rasteriser pays for
    /// every thread at every barrier.
    pub fn new(caps: &DeviceCaps, hidden_size: u32) -> Self {
        let most = if caps.is_cpu { 64 } else { caps.max_workgroup_size.min(256) };
        let workgroup_size = (hidden_size / 4).next_power_of_two().clamp(64, most.max(64));
        Self { hidden_size, workgroup_size, half_output: false }
    }

    fn shuffles(caps: &DeviceCaps) -> bool {
        caps.lanes().uses_subgroups() && !caps.is_cpu
    }

    /// Records the kernel over all active rows.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if y is not what the kernel writes; as [`PlanBuilder::dispatch`].
    pub fn record(&self, plan: &mut PlanBuilder<'_>, b: RmsNormBindings<'_>, p: RmsNormParams) -> Result<()> {
        let expected = if self.half_output { DType::F16 } else { DType::F32 };
        if b.y.dtype() != expected {
            let (found, expected) = (format!("{:?}", b.y.dtype()), format!("{expected:?}"));
            return Err(KernelError::Shape { kernel: Self::NAME, what: "y", found, expected });
        }
        plan.dispatch(self, &b, &p, Grid::rows(b.rows, 1, 1))
    }
}

impl Kernel for RmsNorm {
    const NAME: &'static str = "rms_norm";
    type Params = RmsNormParams;
    type Bindings<'a> = RmsNormBindings<'a>;

    fn definitions(&self, caps: &DeviceCaps) -> Definitions {
        let units = self.hidden_size / 4;
        let definitions = Definitions::new()
            .u32("WORKGROUP_SIZE", self.workgroup_size)
            .u32("UNITS", units)
            .u32("HELD", units.div_ceil(self.workgroup_size))
            .flag("SUBGROUP", Self::shuffles(caps))
            .flag("OUT_F16", self.half_output);
        if Self::shuffles(caps) { definitions.u32("LANES", caps.lanes().width()) } else { definitions }
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        vec![
            Binding::read(1, &b.rows.active),
            Binding::read(2, b.x),
            Binding::read(3, b.weight),
            Binding::write(4, b.y),
        ]
    }

    fn workgroup_storage_bytes(&self, caps: &DeviceCaps) -> u32 {
        if Self::shuffles(caps) { 4 * self.workgroup_size / caps.lanes().width() } else { 4 * self.workgroup_size }
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::oracle::rms_norm::rms_norm;
    use crate::parity::{self, Rng, Tolerance};

    #[test]
    fn matches_oracle() {
        parity::on_every_profile_and_as_gpu(|gpu, profile| {
            let mut rng = Rng::new("rms_norm");
            for hidden_size in [4, 64, 260, 960, 2048] {
                for num_active in [0, 1, 7, 33, 63, 64, 65] {
                    let num_rows = num_active + 3;
                    // Every other row from the second on: active rows are not where they lie in the batch.
                    let active = parity::some_rows(&mut rng, num_rows, num_active);
                    let mut x = rng.normals(num_rows * hidden_size);
                    // Extreme values: a row of zeros and one of large numbers.
                    x[..hidden_size].fill(0.0);
                    x[hidden_size..2 * hidden_size].fill(1e15);
                    let weight = rng.normals(hidden_size);
                    let want = rms_norm(&active, &x, &weight, 1e-5);

                    let y = parity::Output::new(gpu, num_active * hidden_size);
                    let kernel = RmsNorm::new(gpu.caps(), hidden_size as u32);
                    let bindings = RmsNormBindings {
                        rows: &parity::row_set(gpu, &active),
                        x: &parity::upload(gpu, &x),
                        weight: &parity::upload(gpu, &weight),
                        y: &y.tensor,
                    };
                    let params = RmsNormParams { eps: 1e-5 };
                    parity::run(gpu, |plan| {
                        plan.dispatch(&kernel, &bindings, &params, Grid::Fixed([1, num_active as u32, 1]))
                    });
                    let what = format!("rms_norm {profile} C={hidden_size} n={num_active}");
                    parity::assert_close(&what, &y.read(gpu), &want, Tolerance::F32);

                    let halves =
                        Tensor::zeros(gpu, "y", DType::F16, &[num_active.max(1), hidden_size]).expect("it fits");
                    let kernel = RmsNorm { half_output: true, ..kernel };
                    let bindings = RmsNormBindings { y: &halves, ..bindings };
                    parity::run(gpu, |plan| {
                        plan.dispatch(&kernel, &bindings, &params, Grid::Fixed([1, num_active as u32, 1]))
                    });
                    let halves: Vec<half::f16> = gpu.read(&halves).expect("the device answers");
                    let halves: Vec<f32> = halves.into_iter().map(f32::from).take(want.len()).collect();
                    let want: Vec<f32> = want.iter().map(|v| f32::from(half::f16::from_f32(*v))).collect();
                    parity::assert_close(&format!("{what} halves"), &halves, &want, Tolerance::F16);
                }
            }
        });
    }
}
