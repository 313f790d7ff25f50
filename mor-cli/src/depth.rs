//! How deep tokens go, other than their routers alone would have it.

use clap::{Args, ValueEnum};
use mor_model::{Mode, MorConfig};
use mor_runtime::{DepthControl, ScriptedRouter, Session};

use crate::failure::bad_input;
use crate::model::Model;

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

/// Who decides how deep the tokens of a measurement go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DepthMode {
    Routed,
    // What routers with random weights say means nothing, but depths are what a routed model's speed depends on.
    ByCapacity,
    FullDepth,
}

impl DepthMode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            DepthMode::Routed => "routed",
            DepthMode::ByCapacity => "by-capacity",
            DepthMode::FullDepth => "full-depth",
        }
    }

    /// Refuses models whose depths cannot be decided so.
    pub(crate) fn check(self, model: &Model, config: &MorConfig) -> anyhow::Result<()> {
        if self != DepthMode::Routed && config.mode == Mode::Token {
            let found = "token choice fixes depths before the first recursion";
            return Err(bad_input!("--mode {}: {}: {found}, expected another mode", self.name(), model.name()));
        }
        Ok(())
    }

    /// `session` with routers that decide so: those of expert-choice models; the others' depths stay.
    pub(crate) fn applied(self, session: Session) -> anyhow::Result<Session> {
        let script = match self {
            _ if session.config().mode != Mode::Expert => return Ok(session),
            DepthMode::Routed => return Ok(session),
            DepthMode::ByCapacity => ScriptedRouter::by_capacity(session.config(), 0),
            DepthMode::FullDepth => ScriptedRouter::full_depth(session.config()),
        };
        Ok(session.with_scripted_router(&script)?)
    }
}
