//! Device time of plans by timestamp queries.

use crate::error::{KernelError, Result};
use crate::gpu::Gpu;
use crate::plan::Plan;

/// Runs `plan` `repetitions` times in one submit and returns the device microseconds of one repetition.
///
/// # Errors
/// [`KernelError::Limit`] if the device writes no timestamps, [`KernelError::Device`] if it fails.
pub fn device_micros(gpu: &Gpu, plan: &Plan, repetitions: u32) -> Result<f64> {
    use wgpu::BufferUsages as U;
    if !gpu.caps().timestamps {
        return Err(KernelError::Limit {
            kernel: "timing",
            what: "timestamp queries",
            found: 2,
            limit: 0,
            why: format!("\"{}\" offers", gpu.summary().name),
            advice: "measure wall time instead",
        });
    }
    let device = &gpu.inner.device;
    let queries = device.create_query_set(&wgpu::QuerySetDescriptor {
        label: Some("timing"),
        ty: wgpu::QueryType::Timestamp,
        count: 2,
    });
    let resolved = gpu.create_buffer("timestamps", 16, U::QUERY_RESOLVE | U::COPY_SRC)?;
    let staging = gpu.create_buffer("timestamps", 16, U::MAP_READ | U::COPY_DST)?;
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("timing") });
    encoder.write_timestamp(&queries, 0);
    for _ in 0..repetitions {
        plan.encode(&mut encoder);
    }
    encoder.write_timestamp(&queries, 1);
    encoder.resolve_query_set(&queries, 0..2, &resolved, 0);
    encoder.copy_buffer_to_buffer(&resolved, 0, &staging, 0, 16);
    gpu.inner.queue.submit([encoder.finish()]);
    staging.map_async(wgpu::MapMode::Read, .., |_| {});
    gpu.wait_idle()?;
    let failed = |reason: String| KernelError::Device { adapter: gpu.summary().name.clone(), reason };
    let view = staging.get_mapped_range(..).map_err(|error| failed(error.to_string()))?;
    let stamps: Vec<u64> = bytemuck::pod_collect_to_vec(&view[..]);
    let nanos = stamps[1].wrapping_sub(stamps[0]) as f64 * f64::from(gpu.inner.queue.get_timestamp_period());
    Ok(nanos / 1e3 / f64::from(repetitions.max(1)))
}
