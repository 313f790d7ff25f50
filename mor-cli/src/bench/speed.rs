//! `mor bench` without a subcommand: tokens a second of prompts, of generation, and of both, one row a test.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use mor_kernels::Gpu;
use mor_kernels::caps::{DeviceCaps, Lanes};
use mor_kernels::peaks::Peaks;
use mor_model::oracle::Oracle;
use mor_model::{Checkpoint, MorConfig};
use mor_runtime::{
    BatchOptions, Batching, DeviceSelector, Event, GenerateRequest, Precision, Routing, RuntimeError, SamplingParams,
    Session, Summary,
};

use super::report::{self, Format, Row};
use super::{ModelArgs, is_without_timestamps};
use crate::args::{LoadArgs, at_least_one};
use crate::depth::DepthMode;
use crate::failure::{bad_input, sentence};
use crate::model::{Model, quantization};
use crate::output::check_target;
use crate::{note, print};

/// On a GPU a test runs for so long before it is timed, so that the clock has risen.
const WARM_UP: Duration = Duration::from_secs(3);
/// Tokens that the first results of a sequence may bring, one by its prompt and four by a submit of steps. A generation is timed from
/// there on.
const FIRST_TOKENS: usize = 5;
/// Prompt and new tokens of the comparison with the CPU.
const CHECKED_PROMPT: usize = 8;
const CHECKED_NEW: usize = 4;
/// A model with more parameters keeps the CPU busy for longer than people wait without a word.
const LARGE: u64 = 100_000_000;

#[derive(Debug, clap::Args)]
pub(crate) struct SpeedArgs {
    #[command(flatten)]
    models: ModelArgs,
    /// Tokens of the prompts to read, up to the first token after them; 0 leaves these tests out
    #[arg(short = 'p', long = "prompt", value_name = "N,...", value_delimiter = ',', default_value = "512")]
    prompts: Vec<usize>,
    /// Tokens to generate; 0 leaves these tests out
    #[arg(short = 'n', long = "new", value_name = "N,...", value_delimiter = ',', default_value = "128")]
    new: Vec<usize>,
    /// Tokens in the context before those that are generated alone
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,
    /// Sequences at a time
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', value_parser = at_least_one, default_value = "1")]
    batch: Vec<usize>,
    /// Timed runs of a test; what runs before them is not counted [default: 5, or 2 on software rasterisers]
    #[arg(short, long, value_name = "N", value_parser = at_least_one)]
    repetitions: Option<usize>,
    #[command(flatten)]
    load: LoadArgs,
    /// Run on every adapter of the machine, one after the other
    #[arg(long)]
    all_devices: bool,
    /// Recursions that a token takes: as its routers say, by draws as many as the capacities say, or all
    #[arg(long, value_enum, default_value_t = DepthMode::Routed)]
    mode: DepthMode,
    /// Leave the comparison with the CPU out, which takes long for large models
    #[arg(long)]
    no_check: bool,
    /// Markdown for people, or all columns as CSV, JSON, JSON Lines or SQL
    #[arg(short, long, value_enum, default_value_t = Format::Md)]
    output: Format,
    /// Draw the rows as bars
    #[arg(long, value_name = "SVG")]
    plot: Option<PathBuf>,
}

/// What one row measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Test {
    /// Tokens to read, timed.
    prompt: usize,
    /// Tokens to generate, timed.
    new: usize,
    /// Tokens read before, not timed.
    context: usize,
}

impl Test {
    fn name(self) -> String {
        match self {
            Test { prompt, new: 0, .. } => format!("pp{prompt}"),
            Test { prompt: 0, new, context: 0 } => format!("tg{new}"),
            Test { prompt: 0, new, context } => format!("tg{new} @ d{context}"),
            Test { prompt, new, .. } => format!("pp{prompt}+tg{new}"),
        }
    }

    /// Whether it times nothing but the generation.
    fn is_generation(self) -> bool {
        self.prompt == 0
    }

    /// Tokens of the prompt that is submitted; a generation begins with one at least.
    fn prompt_tokens(self) -> usize {
        (self.prompt + self.context).max(1)
    }

    /// Tokens that the request asks for. That a prompt has been read shows by a first token.
    fn new_tokens(self) -> usize {
        if self.is_generation() { self.new + FIRST_TOKENS } else { self.new.max(1) }
    }

    /// Positions of a sequence.
    fn positions(self) -> usize {
        self.prompt_tokens().saturating_add(self.new_tokens())
    }
}

impl SpeedArgs {
    fn tests(&self) -> Vec<Test> {
        let positive = |list: &[usize]| list.iter().copied().filter(|&tokens| tokens > 0).collect::<Vec<_>>();
        let (prompts, new) = (positive(&self.prompts), positive(&self.new));
        let mut tests: Vec<Test> = prompts.iter().map(|&prompt| Test { prompt, new: 0, context: 0 }).collect();
        for &context in &self.depth {
            tests.extend(new.iter().map(|&new| Test { prompt: 0, new, context }));
        }
        for &prompt in &prompts {
            tests.extend(new.iter().map(|&new| Test { prompt, new, context: 0 }));
        }
        tests
    }

    /// Refuses what cannot be run, before anything large is read.
    fn check(&self, model: &Model, config: &MorConfig, tests: &[Test]) -> anyhow::Result<()> {
        let limit = config.max_position_embeddings;
        if let Some(test) = tests.iter().find(|test| test.positions() > limit) {
            let (name, found) = (test.name(), test.positions());
            let advice = "lower -p, -n or --depth";
            return Err(bad_input!(
                "{}: {name} takes {found} positions, expected {limit} at most; {advice}",
                model.name()
            ));
        }
        self.mode.check(model, config)
    }
}

pub(crate) fn run(args: &SpeedArgs) -> anyhow::Result<()> {
    let tests = args.tests();
    if tests.is_empty() {
        return Err(bad_input!("-p and -n are 0, expected tokens to read or to generate"));
    }
    args.plot.iter().try_for_each(|path| check_target("--plot", path))?;
    let models = args.models.models()?;
    for model in &models {
        args.check(model, &model.config()?, &tests)?;
    }
    let devices: Vec<_> = if args.all_devices {
        Gpu::adapters().iter().map(|adapter| DeviceSelector::Index(adapter.index)).collect()
    } else {
        vec![args.load.selector()]
    };
    let mut rows = Vec::new();
    let mut failure = None;
    for device in devices {
        for model in &models {
            match measure(args, model, device.clone(), &tests) {
                Ok(found) => {
                    if args.output == Format::Md {
                        print(&report::markdown(&found))?;
                    }
                    rows.extend(found);
                }
                // One device of several may be too small, or broken.
                Err(error) if args.all_devices => {
                    note(&format!("warning: {}: {}", model.name(), sentence(&error)));
                    failure = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
    }
    if rows.is_empty() {
        return Err(failure.unwrap_or_else(|| bad_input!("no adapter found; install a Vulkan, Metal or DX12 driver")));
    }
    if let Some(path) = &args.plot {
        report::write_plot(path, "mor bench", &report::by_series(&rows))?;
    }
    if args.output == Format::Md { Ok(()) } else { Ok(print(&report::text(&rows, args.output)?)?) }
}

/// All rows of a model on a device.
fn measure(args: &SpeedArgs, model: &Model, device: DeviceSelector, tests: &[Test]) -> anyhow::Result<Vec<Row>> {
    let mut session = model.load(device, args.load.options())?;
    let gpu = session.model().gpu().clone();
    let peaks = match Peaks::measure(&gpu, session.precision() == Precision::F16).map_err(RuntimeError::from) {
        Ok(peaks) => Some(peaks),
        Err(error) if is_without_timestamps(&error) => {
            note(&format!("warning: no shares of the device's peaks: {error}"));
            None
        }
        Err(error) => return Err(error.into()),
    };
    let compiled_before = gpu.compile_time();
    let mut checkpoint = model.checkpoint()?;
    let mut row = describe(&session, &checkpoint, model, peaks);
    row.depths = args.mode.name().to_owned();
    row.repetitions = args.repetitions.unwrap_or(if gpu.caps().is_cpu { 2 } else { 5 });
    if !args.no_check {
        if let Some(quantization) = args.load.quantization() {
            checkpoint = checkpoint.quantize(quantization)?;
        }
        let check = Check::of(&mut session, &checkpoint)?;
        row.check_tokens = Some(check.tokens);
        row.check_same_depths = Some(check.same_depths);
        row.check_same_argmax = Some(check.same_argmax);
        row.check_logit_difference = Some(check.logit_difference);
    }
    drop(checkpoint);
    session = args.mode.applied(session)?;

    let mut rows = Vec::new();
    let positions = tests.iter().map(|test| test.positions()).max().unwrap_or(1);
    for &batch in &args.batch {
        let options = BatchOptions {
            max_sequences: batch,
            max_context: Some(positions),
            // Memory for all sequences at their longest, and every prompt is read.
            kv_bytes: Some(u64::MAX),
            share_prefixes: false,
            ..args.load.batch()
        };
        session = session.with_batch(options)?;
        session.prepare_decode(positions)?;
        for &test in tests {
            let samples = samples(&mut session, test, batch, row.repetitions)?;
            let mut row = Row { test: test.name(), batch, ..row.clone() };
            if session.is_persistent() {
                row.features += ", persistent decode";
            }
            row.prompt_tokens = test.prompt;
            row.new_tokens = test.new;
            row.context_tokens = test.context;
            row.take(&samples);
            row.compile_ms = (gpu.compile_time() - compiled_before).as_secs_f64() * 1e3;
            if let Some(peaks) = peaks {
                row.share = share(&mut session, test, batch, (&row, &samples), peaks)?;
            }
            note(&format!("{}, {batch} at a time: {:.1} tokens/s", row.test, row.tokens_per_s));
            rows.push(row);
        }
    }
    Ok(rows)
}

/// What all rows of a session have in common.
fn describe(session: &Session, checkpoint: &Checkpoint, model: &Model, peaks: Option<Peaks>) -> Row {
    let (device, config) = (session.device(), session.config());
    let counts = checkpoint.parameter_counts();
    Row {
        build: build(),
        gpu_library: mor_kernels::GPU_LIBRARY.to_owned(),
        device: device.name.clone(),
        driver: device.driver.clone(),
        backend: device.backend.clone(),
        features: features(&device.caps),
        dtype: session.precision().as_str().to_owned(),
        quantization: quantization(session),
        lanes: lanes(&device.caps),
        copy_gb_per_s: peaks.map(|peaks| peaks.copy_bytes_per_s / 1e9),
        read_gb_per_s: peaks.map(|peaks| peaks.read_bytes_per_s / 1e9),
        matrix_tflop_per_s: peaks.map(|peaks| peaks.matrix_flop_per_s / 1e12),
        model: model.name(),
        model_mode: config.mode.as_str().to_owned(),
        parameters: counts.unique(),
        effective_parameters: counts.effective(),
        weight_bytes: session.model().weights().num_bytes(),
        load_ms: session.load_ms(),
        ..Row::default()
    }
}

/// Version and, where the build was told, commit of this program.
fn build() -> String {
    match option_env!("MOR_COMMIT").filter(|commit| !commit.is_empty()) {
        Some(commit) => format!("mor {} ({commit})", env!("CARGO_PKG_VERSION")),
        None => format!("mor {}", env!("CARGO_PKG_VERSION")),
    }
}

/// How lanes exchange values in the kernels.
fn lanes(caps: &DeviceCaps) -> String {
    match caps.lanes() {
        Lanes::Subgroup { width } => format!("subgroups of {width}"),
        Lanes::Workgroup { width } => format!("workgroup memory, {width} lanes"),
    }
}

/// What is used of what the adapter offers.
fn features(caps: &DeviceCaps) -> String {
    let all = [
        ("subgroups", caps.subgroup_sizes.is_some()),
        ("cooperative matrices", caps.cooperative_matrices.is_some()),
        ("timestamps", caps.timestamps),
    ];
    all.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

/// One timed run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) tokens_per_s: f64,
    /// Mean over the sequences, from the start; that of the untimed context where there is one.
    pub(super) first_token: Duration,
    /// Of the tokens that were timed.
    pub(super) mean_depth: f64,
    /// The part of these that took the last recursion.
    pub(super) full_depth: f64,
    pub(super) dispatches_per_token: f64,
    pub(super) longest_submit: Duration,
}

/// Runs a test until the clock has risen, then `repetitions` times.
fn samples(session: &mut Session, test: Test, batch: usize, repetitions: usize) -> anyhow::Result<Vec<Sample>> {
    let request = GenerateRequest {
        max_new_tokens: test.new_tokens(),
        sampling: SamplingParams::greedy(),
        ignore_eos: true,
        ..GenerateRequest::new(session.measured_prompt(test.prompt_tokens()))
    };
    let is_cpu = session.model().gpu().caps().is_cpu;
    let start = Instant::now();
    loop {
        once(session, test, batch, &request)?;
        if is_cpu || start.elapsed() >= WARM_UP {
            break;
        }
    }
    (0..repetitions).map(|_| once(session, test, batch, &request)).collect()
}

fn once(session: &mut Session, test: Test, batch: usize, request: &GenerateRequest) -> anyhow::Result<Sample> {
    session.reset_statistics();
    let start = Instant::now();
    let handles = (0..batch).map(|_| session.submit(request)).collect::<Result<Vec<_>, _>>()?;
    let (mut num_begun, mut first_tokens) = (0, Duration::ZERO);
    let mut answers: Vec<Summary> = Vec::new();
    // What was counted when the first sequence ended: from then on the batch is smaller.
    let mut generated = None;
    loop {
        let goes_on = session.step()?;
        let begun_before = num_begun;
        for event in handles.iter().flat_map(|handle| std::iter::from_fn(|| handle.try_next())) {
            match event {
                Event::Prompt { .. } => {
                    num_begun += 1;
                    first_tokens += start.elapsed();
                }
                Event::Finished(summary) => answers.push(summary),
                _ => {}
            }
        }
        if test.is_generation() && num_begun == batch {
            if begun_before < batch {
                session.reset_statistics();
            } else if generated.is_none() && !answers.is_empty() {
                generated = Some(session.statistics());
            }
        }
        if !goes_on {
            break;
        }
    }
    let whole = session.statistics();
    let statistics = generated.unwrap_or(whole);
    let tokens =
        if test.is_generation() { statistics.new_tokens as f64 } else { (batch * (test.prompt + test.new)) as f64 };
    let depths = answers.iter().flat_map(|answer| answer.depths.iter().skip(test.context).take(test.prompt + test.new));
    let last = session.model().max_depth() as u32;
    let (sum, count, full) = depths.fold((0.0, 0.0, 0.0), |(sum, count, full), depth| {
        (sum + f64::from(*depth), count + 1.0, full + f64::from(u8::from(*depth >= last)))
    });
    Ok(Sample {
        tokens_per_s: tokens / statistics.elapsed.as_secs_f64().max(1e-9),
        first_token: first_tokens / batch as u32,
        mean_depth: sum / f64::max(count, 1.0),
        full_depth: full / f64::max(count, 1.0),
        dispatches_per_token: statistics.dispatches as f64 / tokens.max(1.0),
        longest_submit: statistics.longest_submit,
    })
}

/// Part of a peak that a row reaches: of the read bandwidth by the weights that a generation reads, of the matrix rate by the
/// projections of a prompt. Keys, values and attention are left out. `None` for rows that are both, and for batches whose
/// tokens share weights in a way that is not known.
fn share(
    session: &mut Session,
    test: Test,
    batch: usize,
    (row, samples): (&Row, &[Sample]),
    peaks: Peaks,
) -> anyhow::Result<Option<f64>> {
    let (config, layout) = (session.config().clone(), session.model().layout().clone());
    let recursions = config.num_recursions as f64;
    if !test.is_generation() {
        if test.new > 0 {
            return Ok(None);
        }
        let shared = layout.num_layers() - layout.unshared_layers().len();
        let layers = layout.unshared_layers().len() as f64 + shared as f64 * row.mean_depth / recursions;
        let mut products = layers * config.layer_products() as f64;
        // Of the last layer a prompt's tokens need keys and values.
        let reach_last = match layout.recursion(config.num_hidden_layers - 1) {
            None => 1.0,
            Some(_) => samples.iter().map(|sample| sample.full_depth).sum::<f64>() / samples.len() as f64,
        };
        products -= reach_last * (config.layer_products() - 2 * config.hidden_size * config.kv_dim()) as f64;
        return Ok(Some(2.0 * products * row.tokens_per_s / peaks.matrix_flop_per_s));
    }
    let batching = session.model().batching();
    // Passes through the block that a token waits for.
    let passes = match batching {
        Batching::Lockstep if batch == 1 => row.mean_depth / recursions,
        Batching::Lockstep if row.mean_depth == recursions => 1.0,
        Batching::Depthwise if batch == 1 => row.mean_depth,
        _ => return Ok(None),
    };
    let bytes: f64 = session
        .decode_dispatches(batch, test.positions())?
        .iter()
        .map(|dispatch| dispatch.weight_bytes as f64 * if dispatch.part == "block" { passes } else { 1.0 })
        .sum();
    Ok(Some(bytes * row.tokens_per_s / batch as f64 / peaks.read_bytes_per_s))
}

/// A short generation, token by token beside the CPU's.
#[derive(Clone, Copy, Debug)]
struct Check {
    /// Tokens fed before one took another number of recursions than on the CPU, where logits cannot be compared any more.
    tokens: usize,
    same_depths: bool,
    /// Whether both have the same most likely token after every token, and those that were generated are these.
    same_argmax: bool,
    /// Largest difference of a logit, of the largest logit.
    logit_difference: f64,
}

impl Check {
    fn of(session: &mut Session, checkpoint: &Checkpoint) -> anyhow::Result<Self> {
        if checkpoint.parameter_counts().effective() > LARGE {
            note("comparing a few tokens with the CPU, which takes a while (--no-check leaves it out)");
        }
        let config = session.config().clone();
        let num_prompt = CHECKED_PROMPT.min(config.max_position_embeddings - 1).max(1);
        let request = GenerateRequest {
            max_new_tokens: CHECKED_NEW.min(config.max_position_embeddings - num_prompt),
            sampling: SamplingParams::greedy(),
            ignore_eos: true,
            ..GenerateRequest::new(session.measured_prompt(num_prompt))
        };
        let mut generated = Vec::new();
        for event in session.generate(&request)? {
            if let Event::Finished(summary) = event? {
                generated = summary.tokens;
            }
        }
        // The last token is never fed.
        let fed: Vec<u32> = request
            .prompt
            .iter()
            .chain(&generated)
            .copied()
            .take(num_prompt + generated.len().saturating_sub(1))
            .collect();
        let forward = session.forward(std::slice::from_ref(&fed), Routing::Causal)?;
        let found = forward.sequences.first().ok_or_else(|| anyhow::anyhow!("a forward pass without results"))?;
        let expected = Oracle::new(checkpoint).forward(&fed, Routing::Causal)?;
        let depths = found.depth.iter().zip(&expected.depth);
        let tokens = depths.take_while(|(found, expected)| found == expected).count();
        let rows =
            |logits: &[f32]| logits.chunks(config.vocab_size).take(tokens).map(<[f32]>::to_vec).collect::<Vec<_>>();
        let (found, expected) = (rows(&found.logits), rows(&expected.logits));
        let largest = expected.iter().flatten().fold(0.0_f32, |largest, logit| largest.max(logit.abs()));
        let differences = found.iter().flatten().zip(expected.iter().flatten()).map(|(a, b)| (a - b).abs());
        let best: Vec<u32> = expected.iter().map(|row| argmax(row)).collect();
        let drawn = best.iter().skip(num_prompt - 1).zip(&generated);
        Ok(Self {
            tokens,
            same_depths: tokens == fed.len(),
            same_argmax: found.iter().map(|row| argmax(row)).eq(best.iter().copied())
                && drawn.clone().all(|(a, b)| a == b),
            logit_difference: f64::from(differences.fold(0.0, f32::max) / largest.max(f32::MIN_POSITIVE)),
        })
    }
}

/// Index of the first of the largest.
fn argmax(logits: &[f32]) -> u32 {
    let larger = |best: usize, (index, logit): (usize, &f32)| if *logit > logits[best] { index } else { best };
    logits.iter().enumerate().fold(0, larger) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(prompt: usize, new: usize, context: usize) -> Test {
        Test { prompt, new, context }
    }

    #[test]
    fn tests_are_named_as_in_llama_bench() {
        let names = [test(512, 0, 0), test(0, 128, 0), test(0, 128, 4096), test(512, 128, 0)].map(Test::name);
        assert_eq!(names, ["pp512", "tg128", "tg128 @ d4096", "pp512+tg128"]);
    }

    #[test]
    fn requests_have_what_is_timed() {
        let sizes = |test: Test| (test.prompt_tokens(), test.new_tokens());
        assert_eq!(sizes(test(512, 0, 0)), (512, 1));
        assert_eq!(sizes(test(512, 128, 0)), (512, 128));
        assert_eq!(sizes(test(0, 128, 0)), (1, 128 + FIRST_TOKENS));
        assert_eq!(sizes(test(0, 128, 64)), (64, 128 + FIRST_TOKENS));
    }

    #[test]
    fn the_first_of_the_largest_is_found() {
        assert_eq!(argmax(&[0.5, 2.0, -1.0, 2.0]), 1);
        assert_eq!(argmax(&[f32::NEG_INFINITY; 3]), 0);
    }
}
