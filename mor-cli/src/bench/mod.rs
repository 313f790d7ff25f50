//! `mor bench`: measurements of whole models. Without a subcommand each test stands alone, as in llama.cpp's `llama-bench`:
//! reading prompts, generating, both.

mod compare;
mod report;
mod speed;
mod throughput;

use std::path::PathBuf;

use clap::Subcommand;
use mor_kernels::KernelError;
use mor_runtime::RuntimeError;

use crate::args::ThroughputArgs;
use crate::model::Model;

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) command: Option<BenchCommand>,
    #[command(flatten)]
    pub(crate) speed: speed::SpeedArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Tokens a second of many sequences, against models of the same depth without recursions
    Throughput(ThroughputArgs),
    /// One table and one plot of several measurements
    Compare(compare::CompareArgs),
}

/// What is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelArgs {
    /// Model folder in Hugging Face layout, or hf:owner/name[@revision]; may be given several times [default: the embedded
    /// tinystories-mor-expert-5m]
    #[arg(long, value_name = "DIR")]
    model: Vec<PathBuf>,
    /// config.json of a model that gets random weights; may be given several times
    #[arg(long, value_name = "CONFIG")]
    config: Vec<PathBuf>,
    /// Says that the weights of --config are random; they always are
    #[arg(long, requires = "config")]
    random_weights: bool,
}

impl ModelArgs {
    /// All that were named, or the embedded one.
    pub(crate) fn models(&self) -> anyhow::Result<Vec<Model>> {
        let folders = self.model.iter().map(|folder| Model::named(Some(folder)));
        let shapes = self.config.iter().map(|config| Ok(Model::Random(config.clone())));
        let models: Vec<_> = folders.chain(shapes).collect::<anyhow::Result<_>>()?;
        Ok(if models.is_empty() { vec![Model::Embedded] } else { models })
    }
}

pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    match &args.command {
        None => speed::run(&args.speed),
        Some(BenchCommand::Throughput(args)) => throughput::run(args),
        Some(BenchCommand::Compare(args)) => compare::run(args),
    }
}

/// Whether something could not be measured because the device writes no timestamps.
pub(crate) fn is_without_timestamps(error: &RuntimeError) -> bool {
    matches!(error, RuntimeError::Kernel(KernelError::Limit { kernel: "timing", .. }))
}
