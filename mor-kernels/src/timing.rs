//! Device time of plans by timestamp queries.

use crate::error::{KernelError, Result};
use crate::gpu::Gpu;
use crate::plan::{Dispatch, Plan};
use crate::tensor::{DType, Tensor};

/// Entries of the largest query set.
const MAX_QUERIES: u32 = 4096;

/// Runs `plan` `repetitions` times in one submit and returns the device microseconds of one repetition.
///
/// # Errors
/// [`KernelError::Limit`] if the device writes no timestamps, [`KernelError::Device`] if it fails.
pub fn device_micros(gpu: &Gpu, plan: &Plan, repetitions: u32) -> Result<f64> {
    let stamps = stamps(gpu, 2, |encoder, queries| {
        encoder.write_timestamp(queries, 0);
        for _ in 0..repetitions {
            plan.encode(encoder, 0..plan.num_steps());
        }
        encoder.write_timestamp(queries, 1);
    })?;
    Ok((stamps[1] - stamps[0]) / f64::from(repetitions.max(1)))
}

/// Runs `plan` `repetitions` times in one submit and returns name and device microseconds of each of its parts in one
/// repetition, in order. Parts are passes of their own here, so the sum may be a little more than the plan takes as a whole.
///
/// # Errors
/// As [`device_micros`].
pub fn parts(gpu: &Gpu, plan: &Plan, repetitions: u32) -> Result<Vec<(&'static str, f64)>> {
    let mut parts: Vec<_> = plan.parts().map(|name| (name, 0.0)).collect();
    let stamps_of_run = parts.len() as u32 + 1;
    let repetitions = repetitions.clamp(1, MAX_QUERIES / stamps_of_run);
    let stamps = stamps(gpu, repetitions * stamps_of_run, |encoder, queries| {
        (0..repetitions).for_each(|run| plan.encode_parts(encoder, queries, run * stamps_of_run));
    })?;
    for run in stamps.chunks_exact(stamps_of_run as usize) {
        for ((_, micros), ends) in parts.iter_mut().zip(run.windows(2)) {
            *micros += (ends[1] - ends[0]) / f64::from(repetitions);
        }
    }
    Ok(parts)
}

/// Submits what `record` encodes and returns its `count` timestamps in microseconds from the first.
fn stamps(gpu: &Gpu, count: u32, record: impl FnOnce(&mut wgpu::CommandEncoder, &wgpu::QuerySet)) -> Result<Vec<f64>> {
    use wgpu::BufferUsages as U;
    if !gpu.caps().timestamps {
        return Err(KernelError::Limit {
            kernel: "timing",
            what: "timestamp queries",
            found: u64::from(count),
            limit: 0,
            why: format!("\"{}\" offers", gpu.summary().name),
            advice: "measure wall time instead",
        });
    }
    let descriptor = wgpu::QuerySetDescriptor { label: Some("timing"), ty: wgpu::QueryType::Timestamp, count };
    let queries = gpu.catch(|device, _| device.create_query_set(&descriptor));
    let bytes = 8 * u64::from(count);
    let resolved = gpu.create_buffer("timestamps", bytes, U::QUERY_RESOLVE | U::COPY_SRC)?;
    let staging = gpu.create_buffer("timestamps", bytes, U::MAP_READ | U::COPY_DST)?;
    let nanos_per_tick = gpu.catch(|device, queue| {
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("timing") });
        record(&mut encoder, &queries);
        encoder.resolve_query_set(&queries, 0..count, &resolved, 0);
        encoder.copy_buffer_to_buffer(&resolved, 0, &staging, 0, bytes);
        queue.submit([encoder.finish()]);
        staging.map_async(wgpu::MapMode::Read, .., |_| {});
        f64::from(queue.get_timestamp_period())
    });
    gpu.wait_idle()?;
    let failed = |reason: String| KernelError::Device { adapter: gpu.summary().name.clone(), reason };
    let view = staging.get_mapped_range(..).map_err(|error| failed(error.to_string()))?;
    let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&view[..bytes as usize]);
    Ok(ticks.iter().map(|tick| tick.wrapping_sub(ticks[0]) as f64 * nanos_per_tick / 1e3).collect())
}

/// A dispatch and its time, as [`profile`] measured it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DispatchTime {
    /// The dispatch.
    pub dispatch: Dispatch,
    /// Mean device time, microseconds.
    pub micros: f64,
    /// Part of the repetitions in which it had workgroups at all, 0 to 1.
    pub occupied: f64,
}

/// Device time of every dispatch of `plan`, in order: the mean of `repetitions` runs, since rows, and with them the work, may
/// differ between runs. Each dispatch gets a pass of its own between two timestamps, so the sum is more than the plan takes
/// as a whole.
///
/// # Errors
/// As [`device_micros`].
pub fn profile(gpu: &Gpu, plan: &Plan, repetitions: u32) -> Result<Vec<DispatchTime>> {
    let time = |dispatch| DispatchTime { dispatch, micros: 0.0, occupied: 0.0 };
    let mut times: Vec<_> = plan.dispatches().map(time).collect();
    let repetitions = repetitions.max(1);
    let most = MAX_QUERIES as usize / 2;
    // Grids known to the host stay as they are here: not empty.
    let all = vec![1_u32; 3 * times.len().min(most)];
    let grids = Tensor::from_slice(gpu, "grids", DType::U32, &[all.len()], &all)?;
    for _ in 0..repetitions {
        for (piece, times) in times.chunks_mut(most).enumerate() {
            let first = piece * most;
            gpu.write(&grids, 0, bytemuck::cast_slice(&all));
            let stamps = stamps(gpu, 2 * times.len() as u32, |encoder, queries| {
                plan.encode_timed(encoder, queries, &grids.buffer, first..first + times.len());
            })?;
            let grids: Vec<u32> = gpu.read(&grids)?;
            for ((time, pair), grid) in times.iter_mut().zip(stamps.chunks_exact(2)).zip(grids.chunks_exact(3)) {
                time.micros += (pair[1] - pair[0]) / f64::from(repetitions);
                time.occupied += f64::from(u8::from(!grid.contains(&0))) / f64::from(repetitions);
            }
        }
    }
    Ok(times)
}
