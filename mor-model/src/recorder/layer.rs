//! One transformer layer over a set of rows: attention and MLP, each with its norm and its residual.

use mor_kernels::Result;
use mor_kernels::epilogue::{Epilogue, LinearParams};
use mor_kernels::kv_blocks::BLOCK;
use mor_kernels::ops::{
    AttentionDecode, AttentionDecodeBindings, AttentionDecodeParams, AttentionPrefill, AttentionPrefillBindings,
    AttentionPrefillParams, AttentionShape, KvPack, KvPackBindings, KvPackParams,
};
use mor_kernels::plan::PlanBuilder;
use mor_kernels::rows::{KvTable, RowSet};
use mor_kernels::tensor::Tensor;

use super::Recorder;
use super::linear::Input;
use crate::device_weights::{LayerWeights, Precision, Projection};
use crate::step_tensors::HalfTensors;
use crate::{Gating, KvStrategy};

/// What a layer reads.
#[derive(Clone, Copy)]
pub(super) struct LayerInput<'a> {
    pub(super) stream: &'a Tensor,
    pub(super) normed: Normed,
}

/// What others have done of a norm, for rows whose products read halves.
#[derive(Clone, Copy)]
pub(super) enum Normed {
    No,
    /// The product before has left so many parts of the squares of each row of its list: see [`Epilogue::Scaled`].
    Begun {
        num_parts: u32,
    },
    /// Routers have made all that may be listed, each at its place in the stream: see
    /// [`RouterNorm`](mor_kernels::ops::RouterNorm).
    ByRow,
}

impl<'a> From<&'a Tensor> for LayerInput<'a> {
    fn from(stream: &'a Tensor) -> Self {
        Self { stream, normed: Normed::No }
    }
}

/// Where a layer's output goes.
pub(super) enum LayerEnd<'a> {
    Stream(&'a Tensor),
    /// The layer `next` reads the same rows of it.
    Between {
        out: &'a Tensor,
        next: usize,
    },
    Streams(&'a Tensor, &'a Tensor),
    /// The end of a block; expert choice has gates per set of rows.
    Block {
        gates: usize,
    },
}

impl<'a> Recorder<'a> {
    /// Layer `layer` over `rows` of the stream `input`; those that store keys and values are `stores`. Returns what it leaves of the
    /// next layer's norm.
    pub(super) fn record_layer(
        &self,
        plan: &mut PlanBuilder<'_>,
        layer: usize,
        [rows, stores]: [&RowSet; 2],
        LayerInput { stream: input, normed }: LayerInput<'_>,
        end: LayerEnd<'_>,
    ) -> Result<Normed> {
        let (config, step) = (self.config(), self.step);
        let weights: &'a LayerWeights = &self.model.weights().layers[layer];
        let place = self.model.kv_layout().layer(layer);
        let (k_cache, v_cache) = &self.kv.buffers[place.buffer];
        let (q_dim, kv_dim) = (self.model.q_dim() as u32, self.model.kv_dim() as u32);
        let base = LinearParams {
            out_stride: config.hidden_size as u32,
            q_dim,
            kv_dim,
            head_dim: self.model.head_dim() as u32,
            additive: u32::from(config.gating == Gating::Additive),
            eps: config.rms_norm_eps as f32,
            scale: 1.0,
            part_stride: self.step.halves.as_ref().map_or(0, |halves| halves.squares.shape()[1] as u32),
            ..Default::default()
        };

        // Layers that read another recursion's cache have no use for k and v.
        let all_columns = q_dim + 2 * kv_dim;
        let stores_kv = place.write_group.is_some();
        let stores_apart = stores_kv && !std::ptr::eq(rows, stores);
        let norm = |rows, x, weight, normed| match (self.halves(rows), normed) {
            (Some(HalfTensors { normed, squares, .. }), Normed::Begun { num_parts }) => {
                Input::Scaled { x: normed, squares, num_parts }
            }
            (Some(HalfTensors { normed, .. }), Normed::ByRow) => Input::Stream { x: normed },
            _ => Input::Norm { x, weight },
        };
        let first_normed = |rows: &RowSet| match normed {
            Normed::Begun { .. } if !std::ptr::eq(rows, stores) => Normed::No,
            _ => normed,
        };
        let first_norm = |rows| norm(rows, input, &weights.input_layernorm, first_normed(rows));
        let (k, v) = step.kv_staged.as_ref().map_or((k_cache, v_cache), |(k, v)| (k, v));
        let staged = step.kv_staged.is_some();
        let qkv = Epilogue::Qkv { rope: &self.kv.rope, q: &step.q, k_cache: k, v_cache: v, delta: false, staged };
        let behind_q = LinearParams { delta_start: step.q.shape()[0] as u32 * q_dim, ..base };
        if stores_apart {
            // Queries too, which those of `rows` replace, where a device cannot bind the rest of the weight.
            let first = if weights.qkv_proj.begins_at(plan.gpu(), q_dim) { q_dim } else { 0 };
            let kv_columns = (&weights.qkv_proj, first..all_columns);
            self.record_projection(plan, stores, first_norm(stores), kv_columns, qkv, behind_q)?;
        }
        let qkv_columns = if stores_kv && !stores_apart { 0..all_columns } else { 0..q_dim };
        self.record_projection(plan, rows, first_norm(rows), (&weights.qkv_proj, qkv_columns), qkv, behind_q)?;
        if staged && stores_kv {
            let bindings = KvPackBindings { rows: stores, k, v, k_cache, v_cache };
            KvPack::default().record(plan, bindings, KvPackParams { num_units: kv_dim / BLOCK as u32 })?;
        }

        let is_shared = self.model.layout().recursion(layer).is_some();
        let kv_table = if is_shared && config.kv == KvStrategy::Hybrid { KvTable::Slots } else { KvTable::Pages };
        let attended = self.record_attention(plan, rows, (k_cache, v_cache), kv_table)?;

        let all = |projection: &'a Projection| (projection, 0..projection.weight.num_rows as u32);
        // The end of a product whose rows a norm with `next_weight` reads.
        let between = |product: (&Projection, Input<'_>), residual, out, next_weight: &'a Tensor| match (
            self.halves(rows),
            self.num_norm_parts(rows, weights, product),
        ) {
            (Some(HalfTensors { normed: next_x, squares: next_squares, .. }), Some(num_parts)) => {
                let epilogue = Epilogue::Scaled { residual, out, next_weight, next_x, next_squares };
                (epilogue, Normed::Begun { num_parts })
            }
            _ => (Epilogue::Residual { residual, out, copy: None }, Normed::No),
        };
        let (o, middle_normed) =
            between((&weights.o_proj, attended), input, &step.middle, &weights.post_attention_layernorm);
        self.record_projection(plan, rows, attended, all(&weights.o_proj), o, base)?;

        let mlp_dim = self.model.mlp_dim() as u32;
        let mlp = self.halves(rows).map_or(&step.mlp, |halves| &halves.mlp);
        let swiglu = Epilogue::SwiGlu { out: mlp, delta: false };
        let behind_mlp =
            LinearParams { out_stride: mlp_dim, delta_start: step.mlp.shape()[0] as u32 * mlp_dim, ..base };
        let second_norm = norm(rows, &step.middle, &weights.post_attention_layernorm, middle_normed);
        self.record_projection(plan, rows, second_norm, all(&weights.gate_up_proj), swiglu, behind_mlp)?;

        let (residual, encoding) = (&step.middle, weights.encoding.as_ref());
        let activated = Input::Compact { x: mlp };
        let mut next_normed = Normed::No;
        let down = match end {
            LayerEnd::Between { out, next } if encoding.is_none() => {
                let next_weight = &self.model.weights().layers[next].input_layernorm;
                let (down, normed) = between((&weights.down_proj, activated), residual, out, next_weight);
                next_normed = normed;
                down
            }
            LayerEnd::Stream(out) | LayerEnd::Between { out, .. } => match encoding {
                Some(encoding) => Epilogue::Encoded { residual, out, encoding },
                None => Epilogue::Residual { residual, out, copy: None },
            },
            // Only the first layer, which no recursion encodes, ends in two streams.
            LayerEnd::Streams(out, copy) => Epilogue::Residual { residual, out, copy: Some(copy) },
            LayerEnd::Block { gates } => match &step.token_weight {
                Some(gates) => {
                    let (hidden, running) = (&step.hidden, &step.running);
                    Epilogue::BlockEndToken { residual, hidden, gates, running, encoding }
                }
                None => {
                    let gates = &step.router_weights[gates];
                    Epilogue::BlockEndExpert { residual, hidden: &step.hidden, gates, encoding }
                }
            },
        };
        self.record_projection(plan, rows, activated, all(&weights.down_proj), down, base)?;
        Ok(next_normed)
    }

    /// Records attention of the queries in `step.q`; returns what `o_proj` reads.
    fn record_attention(
        &self,
        plan: &mut PlanBuilder<'_>,
        rows: &RowSet,
        (keys, values): (&Tensor, &Tensor),
        table: KvTable,
    ) -> Result<Input<'a>> {
        let (config, step) = (self.config(), self.step);
        let shape = AttentionShape { kv_table: table, ..self.model.attention_shape() };
        // Of the real head: padding adds nothing to a score.
        let scale = (config.head_dim as f64).sqrt().recip() as f32;
        let kv_table = match table {
            KvTable::Pages => &self.kv.pages,
            KvTable::Slots => self.kv.slots.as_ref().expect("hybrid caches have a slot table"),
        };
        let q = &step.q;
        match self.phase.key_splits(self.is_sampled(rows)) {
            Some(num_splits) => {
                let stats = (num_splits > 1).then_some(&step.attention_stats);
                let bindings = AttentionDecodeBindings {
                    rows: &rows.limited_to(self.most_rows(rows)),
                    q,
                    keys,
                    values,
                    kv_table,
                    partial_out: &step.attention,
                    partial_stats: stats,
                };
                AttentionDecode::new(shape, num_splits, plan.gpu().caps()).record(
                    plan,
                    bindings,
                    AttentionDecodeParams { scale },
                )?;
                Ok(match stats {
                    Some(stats) => {
                        Input::Merge { partial: &step.attention, stats, num_splits, head_dim: shape.head_dim }
                    }
                    None => Input::Compact { x: &step.attention },
                })
            }
            None => {
                let half_output = self.halves(rows).and_then(|halves| halves.attention.as_ref());
                let out = half_output.unwrap_or(&step.attention);
                let bindings = AttentionPrefillBindings { rows, q, keys, values, kv_table, out };
                let kernel = AttentionPrefill::new(
                    shape,
                    self.expected_rows(rows) as u32,
                    self.model.precision() == Precision::F16,
                );
                AttentionPrefill { half_output: half_output.is_some(), ..kernel }.record(
                    plan,
                    bindings,
                    AttentionPrefillParams { scale },
                )?;
                Ok(Input::Compact { x: out })
            }
        }
    }
}
