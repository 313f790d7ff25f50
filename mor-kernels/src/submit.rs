//! [`Submission`]: plans, copies and readbacks handed to the device together; [`Readback`]: bytes on their way
//! to the host.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, PoisonError};

use crate::error::{KernelError, Result};
use crate::gpu::Gpu;
use crate::plan::{Ahead, Plan};
use crate::tensor::Tensor;

/// Work being recorded for one submit.
#[derive(Debug)]
pub struct Submission<'g> {
    gpu: &'g Gpu,
    encoder: wgpu::CommandEncoder,
    is_empty: bool,
}

impl<'g> Submission<'g> {
    /// An empty submission.
    pub fn new(gpu: &'g Gpu) -> Self {
        let descriptor = wgpu::CommandEncoderDescriptor { label: Some("mor") };
        Self { gpu, encoder: gpu.catch(|device, _| device.create_command_encoder(&descriptor)), is_empty: true }
    }

    /// Appends all steps of `plan`.
    pub fn plan(&mut self, plan: &Plan) -> &mut Self {
        self.steps(plan, 0..plan.num_steps())
    }

    fn steps(&mut self, plan: &Plan, steps: Range<usize>) -> &mut Self {
        self.is_empty &= steps.is_empty();
        self.gpu.catch(|_, _| plan.encode(&mut self.encoder, steps));
        self
    }

    /// Appends all steps of `plan`, and hands what there is to the device piece by piece, all but the last piece: a device that
    /// idles begins with the first steps while the others are still being recorded, sooner if [`Plan::record_ahead`] has recorded
    /// these.
    pub fn plan_at_once(&mut self, plan: &Plan) -> &mut Self {
        let Ahead { pieces, num_steps } = plan.take_ahead();
        if num_steps > 0 && !self.is_empty {
            self.hand_over();
        }
        for piece in pieces {
            self.gpu.catch(|_, queue| queue.submit([piece]));
        }
        let mut piece = plan.piece(num_steps);
        while piece.end < plan.num_steps() {
            let next = plan.piece(piece.end);
            self.steps(plan, piece).hand_over();
            piece = next;
        }
        self.steps(plan, piece)
    }

    /// Hands what there is to the device and goes on with nothing.
    pub fn hand_over(&mut self) {
        let next = Self::new(self.gpu);
        std::mem::replace(self, next).submit();
    }

    /// Appends a copy between tensors, in bytes.
    pub fn copy(&mut self, from: &Tensor, from_offset: u64, to: &Tensor, to_offset: u64, bytes: u64) -> &mut Self {
        self.is_empty = false;
        let encoder = &mut self.encoder;
        let (from_offset, to_offset) = (from.offset + from_offset, to.offset + to_offset);
        self.gpu.catch(|_, _| encoder.copy_buffer_to_buffer(&from.buffer, from_offset, &to.buffer, to_offset, bytes));
        self
    }

    /// Appends a read of `bytes` bytes of `tensor` from `offset` on (both multiples of 4); the data arrives
    /// after the submit.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] if the staging buffer cannot be had.
    pub fn read(&mut self, tensor: &Tensor, offset: u64, bytes: u64) -> Result<Readback> {
        let staging = self.gpu.take_staging(bytes)?;
        self.is_empty = false;
        let state = Arc::new(AtomicU8::new(PENDING));
        let arrived = Arc::clone(&state);
        self.gpu.catch(|_, _| {
            self.encoder.copy_buffer_to_buffer(&tensor.buffer, tensor.offset + offset, &staging, 0, bytes);
            self.encoder.map_buffer_on_submit(&staging, wgpu::MapMode::Read, .., move |result| {
                arrived.store(if result.is_ok() { MAPPED } else { FAILED }, Ordering::Release);
            });
        });
        Ok(Readback { gpu: self.gpu.clone(), staging, state, bytes: bytes as usize })
    }

    /// Hands the work to the device and returns at once.
    pub fn submit(self) {
        self.gpu.catch(|_, queue| queue.submit([self.encoder.finish()]));
    }
}

/// States of a buffer that is to be mapped.
pub(crate) const PENDING: u8 = 0;
pub(crate) const MAPPED: u8 = 1;
pub(crate) const FAILED: u8 = 2;

/// Bytes that arrive from the device some time after a submit.
#[derive(Debug)]
pub struct Readback {
    gpu: Gpu,
    staging: wgpu::Buffer,
    state: Arc<AtomicU8>,
    bytes: usize,
}

impl Readback {
    /// The device that they come from.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Whether [`Readback::wait`] would return at once.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn is_ready(&self) -> Result<bool> {
        self.gpu.poll(false)?;
        Ok(self.state.load(Ordering::Acquire) != PENDING)
    }

    /// Waits for the bytes. On a GPU it spins between polls, because a blocking wait costs about 20 us more there. A
    /// software rasteriser computes on the very cores that would spin, so there it yields from the start: whoever has
    /// work goes first, and a core that stays awake takes over each dispatch sooner than one that slept.
    ///
    /// # Errors
    /// [`KernelError::Device`] if the device failed meanwhile.
    pub fn wait(self) -> Result<Vec<u8>> {
        let mut spins = 0u32;
        while !self.is_ready()? {
            spins += 1;
            if spins < 64 && !self.gpu.caps().is_cpu {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        self.gpu.check()?;
        let failed = |reason: String| KernelError::Device { adapter: self.gpu.summary().name.clone(), reason };
        if self.state.load(Ordering::Acquire) == FAILED {
            return Err(failed("results could not be read back: the device is lost or was destroyed".to_owned()));
        }
        let view = self.staging.get_mapped_range(..).map_err(|error| failed(error.to_string()))?;
        let data = view[..self.bytes].to_vec();
        drop(view);
        self.gpu.catch(|_, _| self.staging.unmap());
        self.gpu.return_staging(self.staging);
        Ok(data)
    }
}

/// Bytes of the largest staging buffer that is kept for the next readback, and how many are kept: those of the steps
/// under way. Making one anew takes about as long as recording a few dispatches.
const KEPT_STAGING_BYTES: u64 = 1 << 20;
const KEPT_STAGING_BUFFERS: usize = 32;

impl Gpu {
    /// A staging buffer of at least `bytes` bytes.
    fn take_staging(&self, bytes: u64) -> Result<wgpu::Buffer> {
        use wgpu::BufferUsages as U;
        // Few sizes, so that the next readback finds one that fits.
        let size = if bytes <= KEPT_STAGING_BYTES { bytes.next_power_of_two().max(256) } else { bytes };
        let mut kept = self.inner.staging.lock().unwrap_or_else(PoisonError::into_inner);
        match kept.iter().position(|buffer| buffer.size() == size) {
            Some(index) => Ok(kept.swap_remove(index)),
            None => self.create_buffer("readback", size, U::MAP_READ | U::COPY_DST),
        }
    }

    fn return_staging(&self, buffer: wgpu::Buffer) {
        let mut kept = self.inner.staging.lock().unwrap_or_else(PoisonError::into_inner);
        if buffer.size() <= KEPT_STAGING_BYTES && kept.len() < KEPT_STAGING_BUFFERS {
            kept.push(buffer);
        }
    }

    /// Reads a whole tensor's elements and waits for them: for tests and one-off reads, never in a hot path.
    ///
    /// # Errors
    /// [`KernelError::Device`], [`KernelError::OutOfMemory`].
    ///
    /// # Panics
    /// If `T` does not divide the tensor's bytes.
    pub fn read<T: bytemuck::Pod>(&self, tensor: &Tensor) -> Result<Vec<T>> {
        let bytes = tensor.data_bytes() as u64;
        let mut submission = Submission::new(self);
        let readback = submission.read(tensor, 0, bytes.next_multiple_of(4))?;
        submission.submit();
        let data = readback.wait()?;
        Ok(bytemuck::pod_collect_to_vec(&data[..bytes as usize]))
    }

    /// Runs `plan` once and waits for it: for tests and benches.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn run(&self, plan: &Plan) -> Result<()> {
        let mut submission = Submission::new(self);
        submission.plan(plan);
        submission.submit();
        self.wait_idle()
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::parity;
    use crate::plan::PlanBuilder;
    use crate::tensor::DType;

    /// A plan of more pieces than are recorded ahead, each step of which needs the one before.
    #[test]
    fn what_is_recorded_ahead_runs_once_and_in_order() {
        const STEPS: usize = 100;
        let gpu = parity::gpu();
        let first: Vec<u32> = (0..=STEPS as u32).collect();
        let chain = Tensor::from_slice(gpu, "chain", DType::U32, &[STEPS + 1], &first).expect("fits");
        let spare = Tensor::zeros(gpu, "spare", DType::U32, &[1]).expect("fits");
        let mut plan = PlanBuilder::new(gpu).expect("fits");
        for step in 0..STEPS as u64 {
            plan.copy(&chain, 4 * step, &spare, 0, 4);
            plan.copy(&spare, 0, &chain, 4 * step + 4, 4);
        }
        let plan = plan.finish().expect("it is sound");
        for pieces in [0, 1, usize::MAX] {
            for _ in 0..2 {
                gpu.write(&chain, 0, bytemuck::cast_slice(&first));
                let recorded = (0..pieces).take_while(|_| plan.record_ahead(gpu)).count();
                assert_eq!(recorded, pieces.min(2));
                let mut submission = Submission::new(gpu);
                // What comes before the plan runs before it.
                submission.copy(&chain, 4 * 7, &spare, 0, 4).copy(&spare, 0, &chain, 0, 4);
                submission.plan_at_once(&plan);
                let found = submission.read(&chain, 0, 4 * (STEPS as u64 + 1)).expect("fits");
                submission.submit();
                let found: Vec<u32> = bytemuck::pod_collect_to_vec(&found.wait().expect("the device works"));
                assert_eq!(found, [7; STEPS + 1], "{pieces} pieces");
            }
        }
    }
}
