//! Tokens become streams and streams tokens: embedding, head and draw.

use mor_kernels::Result;
use mor_kernels::epilogue::{Epilogue, LinearParams};
use mor_kernels::ops::{
    EmbedTokens, EmbedTokensBindings, EmbedTokensParams, SamplePartial, SamplePartialBindings, SamplePartialParams,
    SampleToken, SampleTokenBindings, SampleTokenParams,
};
use mor_kernels::plan::PlanBuilder;
use mor_kernels::rows::RowSet;
use mor_kernels::tensor::Tensor;

use super::Recorder;
use super::linear::Input;

impl Recorder<'_> {
    /// The rows' tokens, as the stream `x`.
    pub(super) fn record_embedding(&self, plan: &mut PlanBuilder<'_>, x: &Tensor) -> Result<()> {
        let matrix = &self.model.weights().embed_tokens;
        for shard in &matrix.shards {
            let bindings =
                EmbedTokensBindings { rows: &self.step.all, tokens: &self.step.rows, weight: &shard.tensor, x };
            let params = EmbedTokensParams {
                hidden_size: self.config().hidden_size as u32,
                first_token: shard.first_row as u32,
                num_tokens: shard.num_rows as u32,
            };
            EmbedTokens::new(matrix.dtype).record(plan, bindings, params)?;
        }
        Ok(())
    }

    /// Logits of `rows` of a stream.
    pub(super) fn record_head(&self, plan: &mut PlanBuilder<'_>, stream: &Tensor, rows: &RowSet) -> Result<()> {
        let (config, weights) = (self.config(), self.model.weights());
        let params = LinearParams {
            out_stride: self.model.logits_stride() as u32,
            eps: config.rms_norm_eps as f32,
            scale: 1.0,
            ..Default::default()
        };
        let head = (&weights.lm_head, 0..weights.lm_head.num_rows as u32);
        let input = Input::Norm { x: stream, weight: &weights.norm };
        self.record_linear(plan, rows, input, head, Epilogue::Store { out: &self.step.logits }, params)
    }

    /// Draws the tokens that follow `rows`.
    pub(super) fn record_draw(&self, plan: &mut PlanBuilder<'_>, rows: &RowSet) -> Result<()> {
        let (step, sample) = (self.step, self.sample);
        let (logits, partials) = (&step.logits, &step.partials);
        let (sampling, seen) = (&sample.sampling, &sample.seen);
        let vocab_size = self.config().vocab_size as u32;
        let logits_stride = self.model.logits_stride() as u32;
        let seen_words = seen.shape()[1] as u32;
        let bindings = SamplePartialBindings { rows, logits, sampling, seen, partials };
        let params = SamplePartialParams { vocab_size, logits_stride, seen_words };
        SamplePartial::new(plan.gpu().caps()).record(plan, bindings, params)?;
        self.record_token(plan, rows, partials)
    }

    /// The same from what parts of the vocabulary, `partials` `[rows, parts, 4]`, would draw.
    pub(super) fn record_token(&self, plan: &mut PlanBuilder<'_>, rows: &RowSet, partials: &Tensor) -> Result<()> {
        let (logits, sample) = (&self.step.logits, self.sample);
        let (sampling, seen) = (&sample.sampling, &sample.seen);
        let vocab_size = self.config().vocab_size as u32;
        let logits_stride = self.model.logits_stride() as u32;
        let seen_words = seen.shape()[1] as u32;
        let num_parts = partials.shape()[partials.shape().len() - 2] as u32;
        let (next_rows, results) = (&sample.next_rows, &sample.results);
        let bindings = SampleTokenBindings { rows, logits, sampling, partials, seen, next_rows, results };
        let params = SampleTokenParams { vocab_size, logits_stride, seen_words, num_parts };
        SampleToken::new(plan.gpu().caps()).record(plan, bindings, params)
    }
}
