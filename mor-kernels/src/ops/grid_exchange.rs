//! Passes values between all workgroups of a grid, round after round: whether a device can, and what it costs.

use crate::caps::DeviceCaps;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::shader::Definitions;
use crate::tensor::{DType, Tensor};

/// A trial of what kernels like [`DecodeLayers`](super::DecodeLayers) are made of, whose workgroups wait for each other: all must
/// run at a time, and each must see what the others write to coherent storage, 8 bytes at once. No query tells whether they do.
///
/// # Source
/// Gupta, Stuart and Owens 2012, doi 10.1109/InPar.2012.6339596: persistent threads. Sorensen et al. 2016, doi
/// 10.1145/2983990.2984032: finding out how many workgroups run at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GridExchange {
    /// Threads of a workgroup: a power of two.
    pub workgroup_size: u32,
    /// Bytes of workgroup memory that each takes at least, as a kernel that is tried for does.
    pub reserved_bytes: u32,
}

/// Constants of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct GridExchangeParams {
    /// Workgroups of the grid.
    pub num_workgroups: u32,
    /// Rounds.
    pub num_rounds: u32,
    /// Polls after which a value is given up.
    pub poll_limit: u32,
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct GridExchangeBindings<'a> {
    /// `[num_workgroups]` f32: each one's last value.
    pub out: &'a Tensor,
    /// `[2, num_workgroups, 2]` u32, zeros before the first call.
    pub mail: &'a Tensor,
    /// `[3]` u32, zeros before the first call; then the last tag that is taken, 0, and 1 if a value did not come.
    pub control: &'a Tensor,
}

impl GridExchange {
    /// Polls that no wait for a running workgroup needs: some tenths of a second on a GPU, where a poll takes about a
    /// microsecond.
    pub const POLL_LIMIT: u32 = 1 << 18;

    /// Records the trial.
    ///
    /// # Errors
    /// As [`PlanBuilder::dispatch`].
    pub fn record(&self, plan: &mut PlanBuilder<'_>, b: GridExchangeBindings<'_>, p: GridExchangeParams) -> Result<()> {
        plan.dispatch(self, &b, &p, Grid::Fixed([p.num_workgroups, 1, 1]))
    }

    /// Whether the device passes the trial with so many workgroups: all values come, and they are right. Waits.
    ///
    /// # Errors
    /// [`KernelError`](crate::KernelError) of a device that fails otherwise.
    pub fn passes(&self, gpu: &Gpu, grid: u32) -> Result<bool> {
        let num_workgroups = grid as usize;
        let out = Tensor::zeros(gpu, "grid_exchange.out", DType::F32, &[num_workgroups])?;
        let mail = Tensor::zeros(gpu, "grid_exchange.mail", DType::U32, &[2, num_workgroups, 2])?;
        let control = Tensor::zeros(gpu, "grid_exchange.control", DType::U32, &[3])?;
        // Many, since a stale value is a matter of luck; a grid that does not fit costs time-outs, so they are short.
        let params = GridExchangeParams { num_workgroups: grid, num_rounds: 200, poll_limit: Self::POLL_LIMIT >> 6 };
        let mut plan = PlanBuilder::new(gpu)?;
        self.record(&mut plan, GridExchangeBindings { out: &out, mail: &mail, control: &control }, params)?;
        gpu.run(&plan.finish()?)?;
        let control: Vec<u32> = gpu.read(&control)?;
        let values: Vec<f32> = gpu.read(&out)?;
        let same = values.iter().zip(expected(grid, params.num_rounds)).all(|(a, b)| *a == b as f32);
        Ok(control[2] == 0 && same)
    }

    /// The most workgroups that pass the trial, at least 1 on a device with coherent storage.
    ///
    /// # Errors
    /// As [`GridExchange::passes`].
    pub fn most_workgroups(gpu: &Gpu, workgroup_size: u32, reserved_bytes: u32) -> Result<u32> {
        if gpu.caps().is_cpu {
            // Workgroups take turns, and llvmpipe ends loops after 65,535 iterations.
            return Ok(1);
        }
        let passes = |num_workgroups| Self { workgroup_size, reserved_bytes }.passes(gpu, num_workgroups);
        let (mut fits, mut step) = (0, 1);
        while fits + step <= MOST_WORKGROUPS && passes(fits + step)? {
            fits += step;
            step *= 2;
        }
        while step > 0 {
            if fits + step <= MOST_WORKGROUPS && passes(fits + step)? {
                fits += step;
            }
            step /= 2;
        }
        Ok(fits)
    }

    /// vec4s to reserve, beside what the kernel takes itself.
    fn reserved(&self) -> u32 {
        (self.reserved_bytes.saturating_sub(4 * self.workgroup_size + 4) / 16).max(1)
    }
}

/// More workgroups than any device runs at a time, and than values that add up to less than 2^24.
const MOST_WORKGROUPS: u32 = 4096;

/// The values after `num_rounds` rounds.
fn expected(num_workgroups: u32, num_rounds: u32) -> Vec<u32> {
    let mut values: Vec<u32> = (0..num_workgroups).map(|own| own % 1024).collect();
    for _ in 0..num_rounds {
        let total: u32 = values.iter().sum();
        values.iter_mut().zip(0..).for_each(|(value, own)| *value = (own + total) % 1024);
    }
    values
}

impl Kernel for GridExchange {
    const NAME: &'static str = "grid_exchange";
    type Params = GridExchangeParams;
    type Bindings<'a> = GridExchangeBindings<'a>;

    fn definitions(&self, _: &DeviceCaps) -> Definitions {
        Definitions::new().u32("WORKGROUP_SIZE", self.workgroup_size).u32("RESERVED", self.reserved())
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        vec![Binding::write(1, b.out), Binding::write(2, b.mail), Binding::write(3, b.control)]
    }

    fn workgroup_storage_bytes(&self, _: &DeviceCaps) -> u32 {
        16 * self.reserved() + 4 * self.workgroup_size + 4
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::oracle::grid_exchange::grid_exchange;
    use crate::parity;

    #[test]
    fn the_trial_expects_what_the_oracle_says() {
        for num_workgroups in [1, 2, 7, 132, 4096] {
            for num_rounds in [1, 2, 200] {
                let want = grid_exchange(num_workgroups, num_rounds);
                assert_eq!(expected(num_workgroups, num_rounds), want, "{num_workgroups} over {num_rounds}");
            }
        }
    }

    #[test]
    fn matches_oracle_or_gives_up() {
        parity::on_every_profile(|gpu, profile| {
            if !gpu.caps().coherent_storage {
                return;
            }
            let workgroup_size = gpu.caps().max_workgroup_size.min(1024);
            let most = GridExchange::most_workgroups(gpu, workgroup_size, 1024).expect("the device answers");
            println!("{profile}: {most} workgroups of {workgroup_size} at a time");
            assert!(most >= 1, "{profile}: one workgroup waits for nobody");
            // As many as run at a time, twice with the same tensors; many times as many, of which the first wait in vain.
            for (num_workgroups, num_rounds, poll_limit) in
                [(1, 5, 1), (most, 5, GridExchange::POLL_LIMIT), (20 * most + 50, 3, 1000)]
            {
                let kernel = GridExchange { workgroup_size, reserved_bytes: 1024 };
                let out = parity::Output::new(gpu, num_workgroups as usize);
                let mail = parity::Output::from_words(gpu, &vec![0; 4 * num_workgroups as usize]);
                let control = parity::Output::from_words(gpu, &[0; 3]);
                let params = GridExchangeParams { num_workgroups, num_rounds, poll_limit };
                let bindings = GridExchangeBindings { out: &out.tensor, mail: &mail.tensor, control: &control.tensor };
                let fits = num_workgroups <= most;
                for call in 1..=if fits { 2 } else { 1 } {
                    parity::run(gpu, |plan| kernel.record(plan, bindings, params));
                    let failed = u32::from(!fits);
                    assert_eq!(control.read_u32(gpu), [call * num_rounds, 0, failed], "{profile}: {num_workgroups}");
                    mail.read_u32(gpu);
                    let got: Vec<u32> = out.read(gpu).iter().map(|value| *value as u32).collect();
                    if fits {
                        assert_eq!(got, grid_exchange(num_workgroups, num_rounds), "{profile}: {num_workgroups}");
                    }
                }
            }
        });
    }
}
