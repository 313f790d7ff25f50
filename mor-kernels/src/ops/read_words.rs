//! Adds up all words of a tensor.

use crate::caps::DeviceCaps;
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::shader::Definitions;
use crate::tensor::{TEXEL_ROW, Tensor};

/// The sum of a tensor's words, in as many parts as there are workgroups: for [`Peaks`](crate::peaks::Peaks), what reading alone costs.
#[derive(Clone, Copy, Debug)]
pub struct ReadWords {
    /// Threads of a workgroup: a power of two.
    pub workgroup_size: u32,
    /// Loads of 16 bytes that a thread has on their way.
    pub loads: u32,
}

/// Sizes of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct ReadWordsParams {
    /// Units of 16 bytes.
    pub num_quads: u32,
    /// Workgroups.
    pub num_workgroups: u32,
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct ReadWordsBindings<'a> {
    /// `[4 num_quads]` words, a weight ([`Tensor::into_weight`]).
    pub x: &'a Tensor,
    /// `[num_workgroups]` u32, written.
    pub out: &'a Tensor,
}

impl ReadWords {
    /// The kernel for a device.
    pub fn new(caps: &DeviceCaps) -> Self {
        Self { workgroup_size: if caps.is_cpu { 64 } else { 256 }, loads: 4 }
    }

    /// Units of 16 bytes that a workgroup reads side by side before it goes on: on a software rasteriser, whose processor reads
    /// ahead, all that it reads.
    pub fn quads_in_turn(&self, caps: &DeviceCaps, p: ReadWordsParams) -> u32 {
        if caps.is_cpu { p.num_quads.div_ceil(p.num_workgroups).max(1) } else { self.workgroup_size }
    }

    /// Records the kernel.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if x has fewer words; as [`PlanBuilder::dispatch`].
    pub fn record(&self, plan: &mut PlanBuilder<'_>, b: ReadWordsBindings<'_>, p: ReadWordsParams) -> Result<()> {
        let expected = 16 * u64::from(p.num_quads);
        if b.x.num_bytes() < expected {
            let (found, expected) = (format!("{} bytes", b.x.num_bytes()), format!("{expected}"));
            return Err(KernelError::Shape { kernel: Self::NAME, what: "x", found, expected });
        }
        plan.dispatch(self, &b, &p, Grid::Fixed([p.num_workgroups, 1, 1]))
    }
}

impl Kernel for ReadWords {
    const NAME: &'static str = "read_words";
    type Params = ReadWordsParams;
    type Bindings<'a> = ReadWordsBindings<'a>;

    fn definitions(&self, caps: &DeviceCaps) -> Definitions {
        Definitions::new()
            .u32("WORKGROUP_SIZE", self.workgroup_size)
            .u32("LOADS", self.loads)
            .u32("TEXEL_ROW", TEXEL_ROW)
            .flag("TEXELS", caps.is_cpu)
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        vec![Binding::texels(1, b.x), Binding::write(2, b.out)]
    }

    fn workgroup_storage_bytes(&self, _: &DeviceCaps) -> u32 {
        4 * self.workgroup_size
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::oracle::read_words::read_words;
    use crate::parity::{self, Rng};

    #[test]
    fn matches_oracle() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("read_words");
            let kernel = ReadWords::new(gpu.caps());
            // Less than a workgroup's, some turns and a rest, more than a texture's row.
            for (num_quads, num_workgroups) in [(0, 2), (1, 1), (63, 3), (5000, 2), (9001, 5), (40_000, 7)] {
                let words: Vec<u32> = (0..4 * num_quads).map(|_| rng.next_u64() as u32).collect();
                let params = ReadWordsParams { num_quads, num_workgroups };
                let in_turn = kernel.quads_in_turn(gpu.caps(), params) as usize;
                let want = read_words(&words, num_workgroups as usize, in_turn);
                let x = parity::upload_u32(gpu, &words).into_weight(gpu).expect("a small texture fits");
                let out = parity::Output::new(gpu, num_workgroups as usize);
                let bindings = ReadWordsBindings { x: &x, out: &out.tensor };
                parity::run(gpu, |plan| kernel.record(plan, bindings, params));
                assert_eq!(out.read_u32(gpu), want, "{profile}: {num_quads} by {num_workgroups}");
            }
        });
    }
}
