//! Routers: scores of the rows that may go on, top-k ranks of whole sequences, depths of token choice.

use mor_kernels::Result;
use mor_kernels::epilogue::{Epilogue, LinearParams};
use mor_kernels::ops::{
    ExpertGate, RouterExpert, RouterExpertBindings, RouterExpertParams, RouterNorm, RouterToken, RouterTokenBindings,
    RouterTokenParams, RouterTopk, RouterTopkBindings, RouterTopkParams, TokenGate,
};
use mor_kernels::plan::PlanBuilder;
use mor_kernels::rows::RowSet;
use mor_kernels::tensor::Tensor;

use super::linear::Input;
use super::{Recorder, Routing};
use crate::RouterFunc;
use crate::device_weights::{Matrix, RouterWeights};

/// What a router's last matrix multiplies.
struct RouterInput<'a> {
    x: &'a Tensor,
    by_row: bool,
    scale: f32,
}

impl<'a> Recorder<'a> {
    /// The input of a router's last matrix: the stream itself, or the hidden layer of the MLP types.
    fn record_router_hidden(
        &self,
        plan: &mut PlanBuilder<'_>,
        rows: &RowSet,
        hidden: Option<&Matrix>,
        input_scale: f32,
    ) -> Result<RouterInput<'a>> {
        let step = self.step;
        let (Some(hidden), Some(out)) = (hidden, &step.router_hidden) else {
            return Ok(RouterInput { x: &step.hidden, by_row: true, scale: input_scale });
        };
        let params = LinearParams { out_stride: out.shape()[1] as u32, scale: input_scale, ..LinearParams::default() };
        let x = Input::Stream { x: &step.hidden };
        self.record_linear(plan, rows, x, (hidden, 0..hidden.num_rows as u32), Epilogue::Gelu { out }, params)?;
        Ok(RouterInput { x: out, by_row: false, scale: 1.0 })
    }

    /// Whether the routers of a prompt's `rows` norm them as well, for the block that they may go on to: those of linear routers,
    /// which read all of a row, where the block multiplies halves.
    pub(super) fn routers_norm(&self, rows: &RowSet) -> bool {
        let routers = self.model.weights().routers.as_ref().expect("expert choice has routers");
        routers.router.hidden.is_empty() && self.halves(rows).is_some()
    }

    /// Scores `rows` for recursion `r`, their next; linear routers, for each row's own. Results go to the tensors at
    /// index `to`. With the weight of a norm, rows that `routers_norm` become [`HalfTensors::normed`](super::HalfTensors), by row.
    pub(super) fn record_expert_router(
        &self,
        plan: &mut PlanBuilder<'_>,
        r: usize,
        rows: &RowSet,
        to: usize,
        norm_weight: Option<&Tensor>,
    ) -> Result<()> {
        let (config, step) = (self.config(), self.step);
        let routers = self.model.weights().routers.as_ref().expect("expert choice has routers");
        let norm = norm_weight.zip(self.halves(rows)).map(|(weight, halves)| RouterNorm { weight, y: &halves.normed });
        let gate = match config.router_func {
            RouterFunc::Sigmoid => ExpertGate::Sigmoid,
            RouterFunc::Tanh => ExpertGate::Tanh,
            _ => ExpertGate::None,
        };
        let mut score = |router: &RouterWeights, temp: f64, logits: &Tensor, gates: Option<&Tensor>| {
            let input = self.record_router_hidden(plan, rows, router.hidden.get(r), (1.0 / temp) as f32)?;
            // The auxiliary router decides where there is one.
            let script = self.model.script().filter(|_| gates.is_none() || routers.aux.is_none());
            let norm = norm.filter(|_| gates.is_some());
            let num_recursions = config.num_recursions as u32;
            let in_features = router.output.num_elems() as u32 / num_recursions;
            let kernel = RouterExpert {
                gate,
                weight_dtype: router.output.dtype(),
                x_by_row: input.by_row,
                logit_only: gates.is_none(),
                scripted: script.is_some(),
                norms: norm.is_some(),
                ..RouterExpert::new(plan.gpu().caps(), in_features)
            };
            let shares = script.map(|(_, shares)| shares);
            let bindings =
                RouterExpertBindings { rows, x: input.x, weight: &router.output, logits, gates, shares, norm };
            let seed = script.map_or(0, |(seed, _)| seed);
            let params = RouterExpertParams {
                input_scale: input.scale,
                alpha: config.alpha as f32,
                num_recursions,
                seed_low: seed as u32,
                seed_high: (seed >> 32) as u32,
                eps: config.rms_norm_eps as f32,
            };
            kernel.record(plan, bindings, params)
        };
        score(&routers.router, config.temp, &step.router_logits[to], Some(&step.router_weights[to]))?;
        if let Some(aux) = &routers.aux {
            // The auxiliary router sees the stream without the temperature.
            score(aux, 1.0, &step.aux_logits[to], None)?;
        }
        Ok(())
    }

    /// Ranks whole sequences for recursion `r`, under top-k routing.
    pub(super) fn record_topk(&self, plan: &mut PlanBuilder<'_>, r: usize) -> Result<()> {
        let step = self.step;
        if self.routing == Routing::TopK {
            let bindings = RouterTopkBindings {
                sequences: &step.topk_sequences[r],
                gates: &step.router_weights[r],
                depth: &step.depth,
                decision: &step.topk_decision,
            };
            RouterTopk::default().record(plan, bindings, RouterTopkParams { recursion: r as u32 })?;
        }
        Ok(())
    }

    /// Decides the depths of all rows.
    pub(super) fn record_token_router(&self, plan: &mut PlanBuilder<'_>) -> Result<()> {
        let (config, step) = (self.config(), self.step);
        let routers = self.model.weights().routers.as_ref().expect("token choice has a router");
        let rows = &step.all;
        let input = self.record_router_hidden(plan, rows, routers.router.hidden.first(), (1.0 / config.temp) as f32)?;
        let weight = &routers.router.output;
        let kernel = RouterToken {
            gate: if config.router_func == RouterFunc::Sigmoid { TokenGate::Sigmoid } else { TokenGate::Softmax },
            weight_dtype: weight.dtype(),
            x_by_row: input.by_row,
            bias: routers.bias.is_some(),
            ..RouterToken::new(config.num_recursions as u32)
        };
        let bindings = RouterTokenBindings {
            rows,
            x: input.x,
            weight,
            logits: &step.router_logits[0],
            gates: &step.router_weights[0],
            depth: &step.depth,
            token_weight: step.token_weight.as_ref().expect("token choice has a chosen gate"),
            bias: routers.bias.as_ref(),
        };
        let in_features = (weight.num_elems() / config.num_recursions) as u32;
        let params = RouterTokenParams {
            in_features,
            input_scale: input.scale,
            alpha: config.alpha as f32,
            max_depth: self.model.max_depth() as u32,
            depth_bias: self.model.depth_control().router_bias,
        };
        kernel.record(plan, bindings, params)
    }
}
