//! [`Peaks`]: what a device reaches at best, for shares in reports.

use std::time::{Duration, Instant};

use crate::epilogue::{Epilogue, EpilogueKind, LinearParams};
use crate::error::Result;
use crate::gpu::{AdapterKind, Gpu};
use crate::ops::{
    EmbedTokens, EmbedTokensBindings, EmbedTokensParams, Linear, LinearBindings, LinearTile, Prologue, ReadWords,
    ReadWordsBindings, ReadWordsParams,
};
use crate::plan::{Grid, Plan, PlanBuilder};
use crate::rows::{ActiveRow, ROW_ACTIVE, Row, RowSet};
use crate::tensor::{DType, Tensor};
use crate::timing;

/// Rates that a device reached in large, simple tasks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    /// Bytes a second that [`EmbedTokens`] moves where it copies f32 rows, read and written bytes both counted. The tensors are
    /// larger than the caches of GPUs. (Copies between buffers are several times slower on some of them.)
    pub copy_bytes_per_s: f64,
    /// Bytes a second that [`ReadWords`] reads of a tensor as large as both of the copy: for kernels that read weights once.
    pub read_bytes_per_s: f64,
    /// Floating-point operations a second of [`Linear`] with f16 weights in a square product large enough to fill the device; a
    /// multiplication and an addition are two.
    pub matrix_flop_per_s: f64,
}

impl Peaks {
    /// Least time over which a rate is measured, after as long a warm-up.
    const SPAN: Duration = Duration::from_millis(60);

    /// Measures them. `half_products` allows activations to be rounded to f16 where the device has cooperative matrices, as
    /// models of that precision do.
    ///
    /// # Errors
    /// As [`timing::device_micros`]; [`KernelError::OutOfMemory`](crate::KernelError::OutOfMemory).
    pub fn measure(gpu: &Gpu, half_products: bool) -> Result<Self> {
        Ok(Self {
            copy_bytes_per_s: Self::copy_bytes_per_s(gpu)?,
            read_bytes_per_s: Self::read_bytes_per_s(gpu)?,
            matrix_flop_per_s: Self::matrix_flop_per_s(gpu, half_products)?,
        })
    }

    /// [`Peaks::copy_bytes_per_s`] alone.
    ///
    /// # Errors
    /// As [`Peaks::measure`].
    pub fn copy_bytes_per_s(gpu: &Gpu) -> Result<f64> {
        const HIDDEN_SIZE: u32 = 4096;
        let num_rows = ((Self::bytes(gpu, 1) / 4) as u32 / HIDDEN_SIZE).min(gpu.caps().max_workgroups);
        let tensor = |label| Tensor::zeros(gpu, label, DType::F32, &[num_rows as usize, HIDDEN_SIZE as usize]);
        let (weight, x) = (tensor("copied")?, tensor("copy")?);
        let tokens: Vec<_> = (0..num_rows).map(|token| Row { token, flags: ROW_ACTIVE, ..Row::ABSENT }).collect();
        let words: &[u32] = bytemuck::cast_slice(&tokens);
        let tokens = Tensor::from_slice(gpu, "tokens", DType::U32, &[words.len()], words)?;
        let active: Vec<_> = (0..num_rows).map(|row| ActiveRow { row, ..ActiveRow::ABSENT }).collect();
        let rows = RowSet::from_rows(gpu, "rows", &active)?;
        let bindings = EmbedTokensBindings { rows: &rows, tokens: &tokens, weight: &weight, x: &x };
        let params = EmbedTokensParams { hidden_size: HIDDEN_SIZE, first_token: 0, num_tokens: num_rows };
        let mut plan = PlanBuilder::new(gpu)?;
        plan.dispatch(&EmbedTokens::new(DType::F32), &bindings, &params, Grid::Fixed([1, num_rows, 1]))?;
        let moved = 2.0 * 4.0 * f64::from(num_rows) * f64::from(HIDDEN_SIZE);
        Ok(moved / Self::seconds(gpu, &plan.finish()?)?)
    }

    /// [`Peaks::read_bytes_per_s`] alone.
    ///
    /// # Errors
    /// As [`Peaks::measure`].
    pub fn read_bytes_per_s(gpu: &Gpu) -> Result<f64> {
        Self::read_bytes_per_s_of(gpu, Self::bytes(gpu, 2))
    }

    /// As [`Peaks::read_bytes_per_s`], of a dispatch that reads `bytes`, or as many as a binding holds: less, since it takes time to
    /// begin and to end.
    ///
    /// # Errors
    /// As [`Peaks::measure`].
    pub fn read_bytes_per_s_of(gpu: &Gpu, bytes: u64) -> Result<f64> {
        let num_quads = (bytes.min(Self::most_bytes(gpu)) / 16) as u32;
        let num_workgroups = if gpu.caps().is_cpu { 64 } else { 2048 };
        let x = Tensor::zeros(gpu, "read", DType::U32, &[num_quads as usize, 4])?.into_weight(gpu)?;
        let out = Tensor::zeros(gpu, "sums", DType::U32, &[num_workgroups as usize])?;
        let bindings = ReadWordsBindings { x: &x, out: &out };
        let mut plan = PlanBuilder::new(gpu)?;
        ReadWords::new(gpu.caps()).record(&mut plan, bindings, ReadWordsParams { num_quads, num_workgroups })?;
        Ok(16.0 * f64::from(num_quads) / Self::seconds(gpu, &plan.finish()?)?)
    }

    /// Bytes of a tensor that no cache holds, `times` as large as one of a copy, where the device has such.
    fn bytes(gpu: &Gpu, times: u64) -> u64 {
        Self::most_bytes(gpu).min(times * if gpu.caps().is_cpu { 64 << 20 } else { 256 << 20 })
    }

    /// Bytes that one binding holds.
    fn most_bytes(gpu: &Gpu) -> u64 {
        gpu.caps().max_buffer_bytes.min(gpu.caps().max_storage_binding_bytes)
    }

    /// [`Peaks::matrix_flop_per_s`] alone.
    ///
    /// # Errors
    /// As [`Peaks::measure`].
    pub fn matrix_flop_per_s(gpu: &Gpu, half_products: bool) -> Result<f64> {
        let n = match gpu.summary().kind {
            AdapterKind::Discrete => 4096,
            AdapterKind::Integrated | AdapterKind::Virtual | AdapterKind::Other => 2048,
            AdapterKind::Cpu => 512,
        };
        let len = n as usize * n as usize;
        // Numbers as a model's: zeros would let the clock rise higher.
        let number = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 8) % 2048) as f32 / 1024.0 - 1.0;
        let numbers: Vec<f32> = (0..len).map(number).collect();
        let halves: Vec<half::f16> = numbers.iter().copied().map(half::f16::from_f32).collect();
        let tile = LinearTile::for_shape(gpu.caps(), [n, n], half_products);
        let x = match tile.multiplies_halves() {
            true => Tensor::from_slice(gpu, "x", DType::F16, &[len], &halves)?,
            false => Tensor::from_slice(gpu, "x", DType::F32, &[len], &numbers)?,
        };
        let weight = Tensor::from_slice(gpu, "weight", DType::F16, &[n as usize, n as usize], &halves)?;
        let out = Tensor::zeros(gpu, "y", DType::F32, &[len])?;
        let active: Vec<_> = (0..n).map(|row| ActiveRow { row, ..ActiveRow::ABSENT }).collect();
        let rows = RowSet::from_rows(gpu, "rows", &active)?;

        let (prologue, epilogue) = (Prologue::Compact { x: &x }, Epilogue::Store { out: &out });
        let (weight_dtype, kind) = (DType::F16, EpilogueKind::Store);
        let kernel = Linear { in_features: n, weight_dtype, prologue: prologue.kind(), epilogue: kind, tile };
        let params = LinearParams { num_outputs: n, out_stride: n, in_features: n, scale: 1.0, ..Default::default() };
        let [tile_m, tile_n] = tile.size();
        let mut plan = PlanBuilder::new(gpu)?;
        let bindings = LinearBindings { rows: &rows, weight: &weight, prologue, epilogue, parts: None };
        plan.dispatch(&kernel, &bindings, &params, Grid::Fixed([n.div_ceil(tile_n), n.div_ceil(tile_m), 1]))?;
        Ok(2.0 * f64::from(n).powi(3) / Self::seconds(gpu, &plan.finish()?)?)
    }

    /// The shortest of some runs, when the clock has risen.
    fn seconds(gpu: &Gpu, plan: &Plan) -> Result<f64> {
        let start = Instant::now();
        let mut micros = timing::device_micros(gpu, plan, 1)?;
        while start.elapsed() < Self::SPAN {
            micros = micros.min(timing::device_micros(gpu, plan, 1)?);
        }
        let repetitions = (Self::SPAN.as_micros() as f64 / 3.0 / micros.max(1.0)).clamp(1.0, 1000.0) as u32;
        for _ in 0..3 {
            micros = micros.min(timing::device_micros(gpu, plan, repetitions)?);
        }
        Ok(micros / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parity;

    #[test]
    fn rates_are_those_of_a_computer() {
        let gpu = parity::gpu();
        if !gpu.caps().timestamps {
            eprintln!("skipped: no timestamps");
            return;
        }
        let peaks = Peaks::measure(gpu, gpu.caps().cooperative_matrices.is_some()).unwrap();
        // From an old laptop to a card of the next decade.
        assert!((1e8..1e14).contains(&peaks.copy_bytes_per_s), "{peaks:?}");
        assert!((1e8..1e14).contains(&peaks.read_bytes_per_s), "{peaks:?}");
        assert!((1e7..1e16).contains(&peaks.matrix_flop_per_s), "{peaks:?}");
    }
}
