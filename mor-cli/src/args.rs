//! The command line. Names and outputs are fixed: scripts rely on them.

use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Parser, Subcommand, ValueEnum};
use mor_runtime::{
    BatchOptions, DeviceSelector, KvStrategy, Precision, Quantization, Routing, SamplingParams, SessionOptions,
};

use crate::bench::BenchArgs;
use crate::chat::ChatArgs;
use crate::convert::ConvertArgs;
use crate::depth::DepthArgs;
use crate::generate::random_seed;
use crate::help::{CompletionsArgs, ManArgs};
use crate::model::Model;
use crate::profile::ProfileArgs;
use crate::sweep::Sweep;
use crate::trace::TraceArgs;

/// Run Mixture-of-Recursions language models on any GPU.
#[derive(Debug, Parser)]
#[command(name = "mor", version, max_term_width = 100)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Continue a prompt
    Generate(GenerateArgs),
    /// Talk with a model
    Chat(ChatArgs),
    /// Answer a file of requests, many at a time
    Batch(BatchArgs),
    /// Run full sequences and write everything they compute
    Forward(ForwardArgs),
    /// Measure the likelihood of a text
    Eval(EvalArgs),
    /// Continue a prompt and show how each token was routed
    Trace(TraceArgs),
    /// Show a model's layers, parameters and memory
    Inspect(InspectArgs),
    /// Write a model with its matrices as small integers
    Quantize(QuantizeArgs),
    /// Make a model folder of another checkpoint
    Convert(ConvertArgs),
    /// List the adapters of this machine
    Devices(DevicesArgs),
    /// Measure how fast models read prompts and generate, and compare measurements
    Bench(BenchArgs),
    /// Show which kernels take how much of a step's time
    Profile(ProfileArgs),
    /// Print what makes a shell complete the command line
    Completions(CompletionsArgs),
    /// Write manual pages, one a command
    Man(ManArgs),
}

#[derive(Debug, clap::Args)]
#[command(group = ArgGroup::new("input").multiple(false))]
pub(crate) struct GenerateArgs {
    /// Text to continue; `-` reads standard input; without any prompt, starts from the end-of-text token
    #[arg(group = "input")]
    pub(crate) prompt: Option<String>,
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// Read the prompt from a UTF-8 file; one newline at its end is dropped
    #[arg(long, value_name = "FILE", group = "input")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// Prompt as token ids, for example 1,2,3; needs no tokenizer
    #[arg(long, value_name = "IDS", group = "input", value_parser = token_list, allow_hyphen_values = true)]
    pub(crate) prompt_tokens: Option<TokenList>,
    /// Most tokens to generate [default: 128, or what the context leaves]
    #[arg(long, value_name = "N", value_parser = at_least_one, allow_negative_numbers = true)]
    pub(crate) max_new_tokens: Option<usize>,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// End before this text; may be given several times
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// Go on after the end-of-text token
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) depth: DepthArgs,
    /// Which recursions store keys and values [default: as the model's config says]
    #[arg(long, value_enum)]
    pub(crate) kv: Option<KvArg>,
    /// Compute each sequence to the same bits whatever runs beside it; slower
    #[arg(long)]
    pub(crate) batch_invariant: bool,
    /// Mark each token with its depth: by colour in a terminal, else as token(depth)
    #[arg(long)]
    pub(crate) show_depth: bool,
    /// Print one JSON object instead of streaming text
    #[arg(long)]
    pub(crate) json: bool,
    /// Random weights of the shape in a config.json; only with --prompt-tokens or no prompt
    #[arg(long, value_name = "CONFIG", help_heading = "Benchmarks", conflicts_with = "model")]
    pub(crate) random_weights: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct SamplingArgs {
    /// Divides the logits; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.8, allow_negative_numbers = true)]
    temperature: f32,
    /// Keep the K most likely tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 0, allow_negative_numbers = true)]
    top_k: u32,
    /// Keep the most likely tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,
    /// Keep tokens at least this fraction as likely as the most likely one
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    min_p: f32,
    /// Make tokens that already occurred less likely; 1 is off
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    repeat_penalty: f32,
    /// Same seed, same text on the same device [default: random; the summary names it]
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    seed: Option<u64>,
}

impl SamplingArgs {
    pub(crate) fn params(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repeat_penalty,
            seed: self.seed.unwrap_or_else(random_seed),
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct BatchArgs {
    /// JSON Lines: a request object per line with `prompt` or `prompt_tokens`, and any of `id`, `max_new_tokens`,
    /// `temperature`, `top_k`, `top_p`, `min_p`, `repeat_penalty`, `seed`, `stop`, `ignore_eos`
    #[arg(long, value_name = "FILE")]
    pub(crate) input: PathBuf,
    /// JSON Lines to write, an answer per line in the order of completion
    #[arg(long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Go on with an output that an earlier run has begun: requests whose ids it holds are skipped
    #[arg(long, conflicts_with = "force")]
    pub(crate) resume: bool,
    /// Replace an output that exists
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// Sequences that decode at a time on each device
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_one, allow_negative_numbers = true)]
    pub(crate) concurrency: usize,
    /// Adapters that share the work, by index or name [default: the best one]
    #[arg(long, value_name = "IDX|NAME,...", value_delimiter = ',')]
    pub(crate) devices: Vec<String>,
    /// Compute each sequence to the same bits whatever runs beside it; slower
    #[arg(long)]
    pub(crate) batch_invariant: bool,
    /// K/V memory of each device in MiB [default: what all sequences can need, up to half of what is free]
    #[arg(long, value_name = "MIB", value_parser = at_least_one, allow_negative_numbers = true)]
    pub(crate) kv_memory: Option<usize>,
    /// How numbers are stored; auto is f16 on GPUs and f32 on software rasterisers
    #[arg(long, value_enum, default_value_t = DtypeArg::Auto)]
    pub(crate) dtype: DtypeArg,
    #[command(flatten)]
    pub(crate) quantize: QuantizeArg,
    #[command(flatten)]
    pub(crate) depth: DepthArgs,
    /// Which recursions store keys and values [default: as the model's config says]
    #[arg(long, value_enum)]
    pub(crate) kv: Option<KvArg>,
    /// Print one JSON object of what was done
    #[arg(long)]
    pub(crate) json: bool,
    /// Random weights of the shape in a config.json; requests then give `prompt_tokens` or no prompt
    #[arg(long, value_name = "CONFIG", help_heading = "Benchmarks", conflicts_with = "model")]
    pub(crate) random_weights: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ForwardArgs {
    /// Model folder in Hugging Face layout, or hf:owner/name[@revision]
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Safetensors file with `tokens` (N, S) and `lengths` (N), both integers
    #[arg(long, value_name = "IN")]
    pub(crate) tokens: PathBuf,
    /// Safetensors file to write
    #[arg(long, value_name = "OUT")]
    pub(crate) out: PathBuf,
    /// How expert choice selects tokens: one by one, or the best of the whole sequence
    #[arg(long, value_enum, default_value_t = RoutingArg::Causal)]
    pub(crate) routing: RoutingArg,
    /// How numbers are stored
    #[arg(long, value_enum, default_value_t = DtypeArg::F32)]
    pub(crate) dtype: DtypeArg,
    #[command(flatten)]
    pub(crate) quantize: QuantizeArg,
    #[command(flatten)]
    pub(crate) depth: DepthArgs,
    /// Which recursions store keys and values [default: as the model's config says]
    #[arg(long, value_enum)]
    pub(crate) kv: Option<KvArg>,
    #[command(flatten)]
    pub(crate) device: DeviceArg,
}

#[derive(Debug, clap::Args)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    pub(crate) model: ModelArg,
    /// UTF-8 file of documents separated by lines <|endoftext|>
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,
    /// Documents to score, zero-based, the last one excluded [default: all]
    #[arg(long, value_name = "A..B", value_parser = document_range)]
    pub(crate) documents: Option<Range<usize>>,
    /// How expert choice selects tokens: one by one, or the best of the whole sequence
    #[arg(long, value_enum, default_value_t = RoutingArg::Causal)]
    pub(crate) routing: RoutingArg,
    /// How numbers are stored
    #[arg(long, value_enum, default_value_t = DtypeArg::F32)]
    pub(crate) dtype: DtypeArg,
    #[command(flatten)]
    pub(crate) quantize: QuantizeArg,
    #[command(flatten)]
    pub(crate) depth: DepthArgs,
    /// Which recursions store keys and values [default: as the model's config says]
    #[arg(long, value_enum)]
    pub(crate) kv: Option<KvArg>,
    /// Score once for each value of --max-depth or --router-bias, both ends included: max-depth=A..B, where B may be R, the
    /// recursions of the model, or router-bias=A..B[:STEP]; may be given several times
    #[arg(long, value_name = "NAME=A..B[:STEP]", value_parser = Sweep::parse)]
    pub(crate) sweep: Vec<Sweep>,
    /// Draw the sweeps: perplexity against mean depth and against tokens/s
    #[arg(long, value_name = "SVG", requires = "sweep")]
    pub(crate) plot: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) device: DeviceArg,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct InspectArgs {
    /// Model folder in Hugging Face layout, or hf:owner/name[@revision] [default: the embedded tinystories-mor-expert-5m]
    #[arg(value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct QuantizeArgs {
    /// Model folder in Hugging Face layout, or hf:owner/name[@revision]
    #[arg(value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Folder to write; must not exist
    #[arg(value_name = "OUT")]
    pub(crate) out: PathBuf,
    /// 8 bits a weight, or 4
    #[arg(long, value_enum)]
    pub(crate) to: QuantizationArg,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DevicesArgs {
    /// Print one JSON array
    #[arg(long)]
    pub(crate) json: bool,
}

/// The protocol of the paper: no prompt, lengths from a normal distribution, many more requests than slots.
#[derive(Debug, clap::Args)]
#[command(group = ArgGroup::new("what").required(true))]
pub(crate) struct ThroughputArgs {
    /// config.json of an expert-choice middle_cycle model; it and the models it is compared with get random weights
    #[arg(long, value_name = "CONFIG", group = "what")]
    pub(crate) config: Option<PathBuf>,
    /// Folder of such a model, or hf:owner/name[@revision], which is compared with itself: modes mor-lockstep and mor-depthwise
    #[arg(long, value_name = "DIR", group = "what")]
    pub(crate) model: Option<PathBuf>,
    /// What to run [default: all there are]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) modes: Vec<ModeArg>,
    /// Sequences that decode at a time; max is the most that fit the memory in every mode, up to 1024
    #[arg(long, value_name = "N|max", value_delimiter = ',', value_parser = slots, default_value = "32,128,max")]
    pub(crate) slots: Vec<SlotsArg>,
    /// Sequences, all there from the start; more than slots [default: 4 a slot]
    #[arg(long, value_name = "N", value_parser = up_to_a_million, allow_negative_numbers = true)]
    pub(crate) requests: Option<usize>,
    /// Mean of the new tokens of a sequence, which are normally distributed within 1 and what the context leaves
    #[arg(long, value_name = "N", default_value_t = 256.0, value_parser = not_negative, allow_negative_numbers = true)]
    pub(crate) mean_new: f64,
    /// Their standard deviation
    #[arg(long, value_name = "N", default_value_t = 64.0, value_parser = not_negative, allow_negative_numbers = true)]
    pub(crate) std_new: f64,
    /// Seed of weights, lengths, depths and tokens
    #[arg(long, value_name = "S", default_value_t = 0, allow_negative_numbers = true)]
    pub(crate) seed: u64,
    /// Recursions that a token takes: as its routers say, or drawn so that recursion r takes the share of all tokens that
    /// the config's capacity gives it [default: model with --model, capacities with --config]
    #[arg(long, value_enum)]
    pub(crate) depths: Option<DepthsArg>,
    /// How numbers are stored; auto is f16 on GPUs and f32 on software rasterisers
    #[arg(long, value_enum, default_value_t = DtypeArg::Auto)]
    pub(crate) dtype: DtypeArg,
    #[command(flatten)]
    pub(crate) device: DeviceArg,
    /// Markdown tables, or one JSON object
    #[arg(short, long, value_enum, default_value_t = FormatArg::Md)]
    pub(crate) output: FormatArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModeArg {
    /// All weights distinct, the same depth
    Vanilla,
    /// Every token takes all recursions
    Recursive,
    /// Routed; a step takes every token through all its recursions and lasts as long as the deepest
    MorLockstep,
    /// Routed; a tick takes every token through one recursion
    MorDepthwise,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotsArg {
    Count(usize),
    Max,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DepthsArg {
    Model,
    Capacities,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatArg {
    Md,
    Json,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ModelArg {
    /// Model folder in Hugging Face layout, or hf:owner/name[@revision] [default: the embedded tinystories-mor-expert-5m]
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
}

impl ModelArg {
    /// The model that was named: random weights of a shape, a folder, or the embedded one.
    pub(crate) fn named(&self, random_weights: Option<&Path>) -> anyhow::Result<Model> {
        match random_weights {
            Some(config) => Ok(Model::Random(config.to_owned())),
            None => Model::named(self.model.as_deref()),
        }
    }
}

/// Where a model runs, and in which numbers.
#[derive(Debug, clap::Args)]
pub(crate) struct LoadArgs {
    #[command(flatten)]
    device: DeviceArg,
    /// How numbers are stored; auto is f16 on GPUs and f32 on software rasterisers
    #[arg(long, value_enum, default_value_t = DtypeArg::Auto)]
    dtype: DtypeArg,
    #[command(flatten)]
    quantize: QuantizeArg,
    /// Decode one sequence in a dispatch for several tokens, if the model and the device allow it; faster
    #[arg(long)]
    persistent: bool,
}

impl LoadArgs {
    /// What else there is to choose is the default.
    pub(crate) fn batch(&self) -> BatchOptions {
        BatchOptions { persistent: self.persistent, ..BatchOptions::default() }
    }

    pub(crate) fn selector(&self) -> DeviceSelector {
        self.device.selector()
    }

    pub(crate) fn quantization(&self) -> Option<Quantization> {
        self.quantize.quantization()
    }

    /// What else there is to choose is the default.
    pub(crate) fn options(&self) -> SessionOptions {
        SessionOptions {
            precision: self.dtype.precision(),
            quantize: self.quantization(),
            quantize_kv: self.quantize.quantize_kv,
            batch: self.batch(),
            ..SessionOptions::default()
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct DeviceArg {
    /// Adapter by its index in `mor devices` or a part of its name [default: the best]
    #[arg(long, value_name = "IDX|NAME")]
    pub(crate) device: Option<String>,
}

impl DeviceArg {
    pub(crate) fn selector(&self) -> DeviceSelector {
        self.device.as_deref().filter(|text| !text.trim().is_empty()).map_or(DeviceSelector::Best, device_selector)
    }
}

impl BatchArgs {
    pub(crate) fn selectors(&self) -> Vec<DeviceSelector> {
        let named = self.devices.iter().filter(|text| !text.trim().is_empty());
        let selectors: Vec<_> = named.map(|text| device_selector(text)).collect();
        if selectors.is_empty() { vec![DeviceSelector::Best] } else { selectors }
    }
}

fn device_selector(text: &str) -> DeviceSelector {
    match text.trim().parse() {
        Ok(index) => DeviceSelector::Index(index),
        Err(_) => DeviceSelector::Name(text.trim().to_owned()),
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum DtypeArg {
    Auto,
    F32,
    F16,
}

impl DtypeArg {
    pub(crate) fn precision(self) -> Option<Precision> {
        match self {
            DtypeArg::Auto => None,
            DtypeArg::F32 => Some(Precision::F32),
            DtypeArg::F16 => Some(Precision::F16),
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct QuantizeArg {
    /// Round the matrices to 8 or 4 bits a weight while loading
    #[arg(long, value_name = "FORMAT", value_enum)]
    quantize: Option<QuantizationArg>,
    /// Keep keys and values in 8 bits: half the memory of f16
    #[arg(long)]
    pub(crate) quantize_kv: bool,
}

impl QuantizeArg {
    pub(crate) fn quantization(&self) -> Option<Quantization> {
        self.quantize.map(QuantizationArg::quantization)
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum QuantizationArg {
    Q8,
    Q4,
}

impl QuantizationArg {
    pub(crate) fn quantization(self) -> Quantization {
        match self {
            QuantizationArg::Q8 => Quantization::Q8,
            QuantizationArg::Q4 => Quantization::Q4,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum KvArg {
    RecursionWise,
    Sharing,
    Hybrid,
}

impl KvArg {
    pub(crate) fn strategy(self) -> KvStrategy {
        match self {
            KvArg::RecursionWise => KvStrategy::RecursionWise,
            KvArg::Sharing => KvStrategy::Sharing,
            KvArg::Hybrid => KvStrategy::Hybrid,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "lower")]
pub(crate) enum RoutingArg {
    Causal,
    TopK,
}

impl RoutingArg {
    pub(crate) fn routing(self) -> Routing {
        match self {
            RoutingArg::Causal => Routing::Causal,
            RoutingArg::TopK => Routing::TopK,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            RoutingArg::Causal => "causal",
            RoutingArg::TopK => "topk",
        }
    }
}

/// Token ids as written; whether the model has them is checked later, with a message that names the vocabulary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TokenList(pub(crate) Vec<i64>);

fn token_list(text: &str) -> Result<TokenList, String> {
    if text.trim().is_empty() {
        return Ok(TokenList(Vec::new()));
    }
    let id = |part: &str| {
        let part = part.trim();
        part.parse().map_err(|_| format!("'{part}' is not a token id, expected numbers separated by commas"))
    };
    text.split(',').map(id).collect::<Result<_, _>>().map(TokenList)
}

pub(crate) fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&count| count > 0).ok_or_else(|| "expected a whole number, 1 or more".to_owned())
}

/// What is listed before anything is known of the device.
fn up_to_a_million(text: &str) -> Result<usize, String> {
    let count = at_least_one(text).ok().filter(|count| *count <= 1_000_000);
    count.ok_or_else(|| "expected a whole number from 1 to 1000000".to_owned())
}

fn not_negative(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| "expected a number, 0 or more".to_owned())
}

fn slots(text: &str) -> Result<SlotsArg, String> {
    match text {
        "max" => Ok(SlotsArg::Max),
        text => up_to_a_million(text).map(SlotsArg::Count).map_err(|expected| format!("{expected}, or max")),
    }
}

fn document_range(text: &str) -> Result<Range<usize>, String> {
    let parse = || {
        let (first, end) = text.split_once("..")?;
        let range = first.trim().parse().ok()?..end.trim().parse().ok()?;
        (!range.is_empty()).then_some(range)
    };
    parse().ok_or_else(|| "expected A..B with A below B, for example 0..40".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn lists_and_ranges_are_read() {
        assert_eq!(token_list("1, 2,-3"), Ok(TokenList(vec![1, 2, -3])));
        assert_eq!(token_list(""), Ok(TokenList(Vec::new())));
        assert!(token_list("1,,2").is_err());
        assert_eq!(document_range("0..40"), Ok(0..40));
        for text in ["40", "4..4", "5..4", "a..b", "0..=4", "-1..4"] {
            assert!(document_range(text).is_err(), "{text}");
        }
        assert_eq!(at_least_one("1"), Ok(1));
        assert!(at_least_one("0").is_err() && at_least_one("-1").is_err() && at_least_one("x").is_err());
    }

    #[test]
    fn devices_are_chosen_by_index_or_name() {
        let selector = |text: &str| DeviceArg { device: Some(text.to_owned()) }.selector();
        assert_eq!(selector("1"), DeviceSelector::Index(1));
        assert_eq!(selector("llvm"), DeviceSelector::Name("llvm".to_owned()));
        assert_eq!(selector(""), DeviceSelector::Best);
        assert_eq!(DeviceArg { device: None }.selector(), DeviceSelector::Best);
    }
}
