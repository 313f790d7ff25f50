//! How deep tokens go, other than their routers alone would have it.

use clap::Args;
use mor_model::MorConfig;
use mor_runtime::DepthControl;

#[derive(Debug, Args)]
pub(crate) struct DepthArgs {
    /// Most recursions a token takes [default: all of the model]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) max_depth: Option<usize>,
    /// Added to the router's logit before its threshold, so that above 0 more tokens go on; token choice adds it to the
    /// score of depth 2, twice to that of depth 3, and so on
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    pub(crate) router_bias: f32,
}

impl DepthArgs {
    /// What was asked for, if the model can follow it.
    pub(crate) fn control(&self, config: &MorConfig) -> anyhow::Result<DepthControl> {
        let control = DepthControl { max_depth: self.max_depth, router_bias: self.router_bias };
        control.validate(config)?;
        Ok(control)
    }
}
