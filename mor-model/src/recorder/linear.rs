//! Products of rows with a weight: what they read, which kernel multiplies, and adapters as products of their own.

use std::ops::Range;

use mor_kernels::Result;
use mor_kernels::epilogue::{Epilogue, LinearParams};
use mor_kernels::ops::{
    Linear, LinearBindings, LinearDecode, LinearDecodeBindings, LinearTile, PartSums, Prologue, RmsNorm,
    RmsNormBindings, RmsNormParams,
};
use mor_kernels::plan::PlanBuilder;
use mor_kernels::rows::RowSet;
use mor_kernels::tensor::{DType, Tensor};

use super::Recorder;
use super::phase::{MAX_FEW_ROWS, Phase, Product};
use crate::Lora;
use crate::device_weights::{Adapter, LayerWeights, Matrix, Projection};
use crate::step_tensors::HalfTensors;

/// Results of a layer's largest product, of gate and up, up to which the products before and after a norm share it. Each is longer for
/// it, and with more tiles both lose more than a dispatch between them takes. Prompts of 360M win 9 % (63 tokens), 5 (511), 2 (895) and
/// lose 2 (1,535), 135M wins 5 % (1,535), 1.7B wins 1 % (255) and loses 1 (383), where they share it whatever their size
/// (`benches/runs/2026-11-29-nvidia-h200/shared-norms.txt`).
const MOST_SHARED_NORM_RESULTS: usize = 5_000_000;

/// What a linear kernel reads.
#[derive(Clone, Copy)]
pub(super) enum Input<'a> {
    Compact { x: &'a Tensor },
    Stream { x: &'a Tensor },
    Norm { x: &'a Tensor, weight: &'a Tensor },
    Scaled { x: &'a Tensor, squares: &'a Tensor, num_parts: u32 },
    Merge { partial: &'a Tensor, stats: &'a Tensor, num_splits: u32, head_dim: u32 },
}

impl<'a> Recorder<'a> {
    /// Records a projection over the rows `columns` of its weight. An adapter's product goes first, to where the projection's
    /// adds it: into the output tensor behind the output, or into a spare stream that has the residual in it.
    pub(super) fn record_projection(
        &self,
        plan: &mut PlanBuilder<'_>,
        rows: &RowSet,
        input: Input<'_>,
        (projection, columns): (&Projection, Range<u32>),
        epilogue: Epilogue<'_>,
        params: LinearParams,
    ) -> Result<()> {
        let (weight, step) = (&projection.weight, self.step);
        let (Some(Adapter { a, b }), Some(adapted)) = (&projection.adapter, &step.adapted) else {
            return self.record_linear(plan, rows, input, (weight, columns), epilogue, params);
        };
        let input = match self.product(rows, columns.end - columns.start, weight, input) {
            // Both factors' norms are one.
            Product::ManyRows { .. } => self.record_norm(plan, rows, input, params.eps, &step.normed)?,
            Product::FewRows { .. } => input,
        };
        let ranks = a.num_rows as u32;
        let scale = self.config().lora.as_ref().map_or(1.0, Lora::scale) as f32;
        let to_ranks = LinearParams { out_stride: ranks, scale, ..params };
        self.record_linear(plan, rows, input, (a, 0..ranks), Epilogue::Store { out: adapted }, to_ranks)?;

        let spare = &step.normed;
        let into_spare = |residual| Epilogue::Residual { residual, out: spare, copy: None };
        let behind = LinearParams { first_output: params.delta_start, out_stride: b.num_rows as u32, ..params };
        let (delta, delta_params, epilogue) = match epilogue {
            Epilogue::Qkv { rope, q, k_cache, v_cache, staged, .. } => {
                (Epilogue::Store { out: q }, behind, Epilogue::Qkv { rope, q, k_cache, v_cache, delta: true, staged })
            }
            Epilogue::SwiGlu { out, .. } => (Epilogue::Store { out }, behind, Epilogue::SwiGlu { out, delta: true }),
            Epilogue::Residual { residual, out, copy } => {
                (into_spare(residual), params, Epilogue::Residual { residual: spare, out, copy })
            }
            Epilogue::Encoded { residual, out, encoding } => {
                (into_spare(residual), params, Epilogue::Encoded { residual: spare, out, encoding })
            }
            Epilogue::BlockEndExpert { residual, hidden, gates, encoding } => {
                let end = Epilogue::BlockEndExpert { residual: spare, hidden, gates, encoding };
                (into_spare(residual), params, end)
            }
            Epilogue::BlockEndToken { residual, hidden, gates, running, encoding } => {
                let end = Epilogue::BlockEndToken { residual: spare, hidden, gates, running, encoding };
                (into_spare(residual), params, end)
            }
            Epilogue::Store { .. } | Epilogue::Gelu { .. } | Epilogue::Scaled { .. } => {
                unreachable!("no projection with an adapter ends so")
            }
        };
        let ranks = Input::Compact { x: adapted };
        self.record_linear(plan, rows, ranks, (b, columns.clone()), delta, delta_params)?;
        self.record_linear(plan, rows, input, (weight, columns), epilogue, params)
    }

    /// The kernels for the product of `input` with `num_outputs` of the rows of `weight`.
    fn product(&self, rows: &RowSet, num_outputs: u32, weight: &Matrix, input: Input<'_>) -> Product {
        let num_rows = match self.phase {
            Phase::Prefill { .. } if self.is_sampled(rows) => self.expected_rows(rows),
            Phase::Prefill { .. } => self.expected_rows(rows).max(MAX_FEW_ROWS + 1),
            _ => self.step.capacity,
        };
        let outputs = [num_outputs, weight.num_rows as u32];
        let merges = matches!(input, Input::Merge { .. });
        let caps = self.model.gpu().caps();
        let product = self.phase.product(caps, self.model.precision(), num_rows, outputs, merges);
        let Product::ManyRows { norm_apart: true, .. } = product else { return product };
        let [num_rows, most_rows, in_features] =
            [num_rows, rows.capacity, weight.in_features].map(|count| count as u32);
        self.halves(rows)
            .and_then(|halves| halves.parts.as_ref())
            .and_then(|_| LinearTile::in_parts(caps, [num_rows, num_outputs], most_rows, in_features))
            .map_or(product, |tile| Product::ManyRows { tile, norm_apart: true })
    }

    pub(super) fn is_sampled(&self, rows: &RowSet) -> bool {
        std::ptr::eq(rows, &self.step.sampled)
    }

    /// How many `rows` may be at most.
    pub(super) fn most_rows(&self, rows: &RowSet) -> usize {
        if self.is_sampled(rows) { self.step.logits.shape()[0].min(self.step.capacity) } else { self.step.capacity }
    }

    /// How many of a prompt's rows `rows` are likely to be: all, the share that a recursion is trained to take, or those that end
    /// prompts.
    pub(super) fn expected_rows(&self, rows: &RowSet) -> usize {
        let step = self.step;
        if self.is_sampled(rows) {
            let Phase::Prefill { num_ends, .. } = self.phase else { return self.most_rows(rows) };
            return self.most_rows(rows).min(num_ends);
        }
        let recursion = step.recursions.iter().position(|set| std::ptr::eq(set, rows));
        let capacity = recursion.filter(|_| step.depthwise.is_none()).and_then(|r| self.config().capacity.get(r));
        capacity.map_or(step.capacity, |share| (share * step.capacity as f64).ceil() as usize)
    }

    /// The tensors in f16 between the kernels of prefill; those of few rows have none.
    pub(super) fn halves(&self, rows: &RowSet) -> Option<&'a HalfTensors> {
        let (caps, precision) = (self.model.gpu().caps(), self.model.precision());
        let is_few = self.is_sampled(rows) && self.phase.is_few(caps, precision, self.expected_rows(rows), false);
        self.step.halves.as_ref().filter(|_| self.phase.is_prefill() && !is_few)
    }

    /// Parts in which the product of `input`'s `rows` with a `layer`'s `projection` leaves sums of squares for the norm that comes next;
    /// `None` where it does not begin that norm.
    pub(super) fn num_norm_parts(
        &self,
        rows: &RowSet,
        layer: &LayerWeights,
        (projection, input): (&Projection, Input<'_>),
    ) -> Option<u32> {
        let weight = &projection.weight;
        let num_results = self.expected_rows(rows) * layer.gate_up_proj.weight.num_rows;
        if self.halves(rows).is_none() || weight.shards.len() > 1 || num_results > MOST_SHARED_NORM_RESULTS {
            return None;
        }
        let num_outputs = weight.num_rows as u32;
        match self.product(rows, num_outputs, weight, input) {
            Product::ManyRows { tile, .. } => tile.num_norm_parts(num_outputs),
            Product::FewRows { .. } => None,
        }
    }

    /// Normalises `input` into the dense batch `y`, if a norm is to come first.
    fn record_norm<'i>(
        &self,
        plan: &mut PlanBuilder<'_>,
        rows: &RowSet,
        input: Input<'i>,
        eps: f32,
        y: &'i Tensor,
    ) -> Result<Input<'i>> {
        let Input::Norm { x, weight } = input else { return Ok(input) };
        let kernel = RmsNorm::new(plan.gpu().caps(), weight.num_elems() as u32);
        let kernel = RmsNorm { half_output: y.dtype() == DType::F16, ..kernel };
        kernel.record(plan, RmsNormBindings { rows, x, weight, y }, RmsNormParams { eps })?;
        Ok(Input::Compact { x: y })
    }

    /// Records `input @ weight^T` over the rows `columns` of the weight, shard by shard; it must be possible to begin at the first,
    /// see [`Projection::begins_at`]. Output column 0 is `params.first_output`.
    pub(super) fn record_linear(
        &self,
        plan: &mut PlanBuilder<'_>,
        rows: &RowSet,
        input: Input<'_>,
        (weight, columns): (&Matrix, Range<u32>),
        epilogue: Epilogue<'_>,
        params: LinearParams,
    ) -> Result<()> {
        let in_features = weight.in_features as u32;
        let product = self.product(rows, columns.end - columns.start, weight, input);
        // The final hidden states, which the head reads, are a result in f32.
        let halves = self.halves(rows).filter(|_| !matches!(epilogue, Epilogue::Store { .. }));
        let normed = halves.map_or(&self.step.normed, |halves| &halves.normed);
        let x = match product {
            Product::ManyRows { norm_apart: true, .. } => self.record_norm(plan, rows, input, params.eps, normed)?,
            _ => input,
        };
        for shard in &weight.shards {
            let first_row = columns.start.max(shard.first_row as u32);
            let end = columns.end.min((shard.first_row + shard.num_rows) as u32);
            if first_row >= end {
                continue;
            }
            let num_outputs = end - first_row;
            let tensor = &shard.rows_from(plan.gpu(), first_row).expect("whoever cuts a weight asks before");
            let first_output = params.first_output + first_row;
            let params = LinearParams { num_outputs, first_output, in_features, ..params };
            let prologue = match x {
                Input::Compact { x } => Prologue::Compact { x },
                Input::Stream { x } => Prologue::Stream { x },
                Input::Norm { x, weight } => Prologue::Norm { x, weight },
                Input::Scaled { x, squares, num_parts } => Prologue::Scaled { x, squares, num_parts },
                Input::Merge { partial, stats, num_splits, head_dim } => {
                    Prologue::Merge { partial, stats, num_splits, head_dim }
                }
            };
            match product {
                Product::FewRows { max_rows } => {
                    let bindings = LinearDecodeBindings { rows, weight: tensor, prologue, epilogue };
                    let kinds = (prologue.kind(), epilogue.kind());
                    let size = [num_outputs, in_features];
                    let kernel = LinearDecode::new(plan.gpu().caps(), size, weight.dtype, kinds.0, kinds.1, max_rows);
                    LinearDecode { single_row: self.step.capacity == 1, ..kernel }.record(plan, &bindings, &params)?;
                }
                Product::ManyRows { tile, .. } => {
                    let parts = self.halves(rows).and_then(|halves| halves.parts.as_ref());
                    let parts = parts.map(|(sums, arrivals)| PartSums { sums, arrivals });
                    let bindings = LinearBindings { rows, weight: tensor, prologue, epilogue, parts };
                    let (prologue, epilogue) = (prologue.kind(), epilogue.kind());
                    Linear { in_features, weight_dtype: weight.dtype, prologue, epilogue, tile }
                        .record(plan, &bindings, &params)?;
                }
            }
        }
        Ok(())
    }
}
