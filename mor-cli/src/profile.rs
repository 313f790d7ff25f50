//! `mor profile`: time by kernel of a decode step or prefill step, from timestamps on the device.

use std::fmt::Write;
use std::path::PathBuf;

use clap::ValueEnum;
use mor_runtime::{BatchOptions, Session, SessionOptions, StepProfile};
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::{LoadArgs, ModelArg, at_least_one};
use crate::depth::DepthMode;
use crate::failure::bad_input;
use crate::model::{Model, quantization, storage};
use crate::output::{check_target, write_atomically};
use crate::{print, print_json};

#[derive(Debug, clap::Args)]
pub(crate) struct ProfileArgs {
    #[command(flatten)]
    model: ModelArg,
    /// config.json of a model that gets random weights
    #[arg(long, value_name = "CONFIG", conflicts_with = "model")]
    config: Option<PathBuf>,
    /// A step that draws a token of each sequence, or one that reads a part of each prompt
    #[arg(long, value_enum, default_value_t = Phase::Decode)]
    phase: Phase,
    /// Tokens of a sequence: decode steps lie about halfway, a prefill step reads the last of them
    #[arg(long, value_name = "N", value_parser = at_least_one, default_value_t = 512)]
    context: usize,
    /// Sequences at a time
    #[arg(short, long, value_name = "N", value_parser = at_least_one, default_value_t = 1)]
    batch: usize,
    #[command(flatten)]
    load: LoadArgs,
    /// Recursions that a token takes: as its routers say, by draws as many as the capacities say, or all
    #[arg(long, value_enum, default_value_t = DepthMode::Routed)]
    mode: DepthMode,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Write the step as a trace that Perfetto and Chrome show
    #[arg(long, value_name = "JSON")]
    trace: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Phase {
    Decode,
    Prefill,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Phase::Decode => "decode",
            Phase::Prefill => "prefill",
        }
    }
}

/// What `--json` prints. Times are in microseconds of the device.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    device: String,
    driver: String,
    dtype: &'static str,
    quantization: Option<String>,
    phase: &'static str,
    context: usize,
    /// Of each sequence in the step: the last ones of a prompt that is read in several.
    step_tokens: usize,
    batch: usize,
    /// `routed`, `by-capacity` or `full-depth`.
    depths: &'static str,
    /// A step among others like it, as it runs.
    step_us: f64,
    /// Recording and submitting it on the host.
    host_us: f64,
    /// All dispatches, each measured alone; more than `step_us`.
    dispatches_us: f64,
    parts: Vec<Part>,
    kernels: Vec<KernelTime>,
}

/// A part of a step among others like it.
#[derive(Debug, Serialize)]
struct Part {
    name: &'static str,
    us: f64,
}

/// All dispatches of a kernel in one step.
#[derive(Debug, Serialize)]
struct KernelTime {
    kernel: &'static str,
    calls: usize,
    /// Mean calls whose grid is not empty.
    occupied_calls: f64,
    us: f64,
    /// Of `dispatches_us`.
    share: f64,
    /// Weights read a second, of kernels with weights.
    weights_gb_per_s: Option<f64>,
}

pub(crate) fn run(args: &ProfileArgs) -> anyhow::Result<()> {
    args.trace.iter().try_for_each(|path| check_target("--trace", path))?;
    let model = args.model.named(args.config.as_deref())?;
    let batch = BatchOptions { max_sequences: args.batch, ..args.load.batch() };
    let config = model.config()?;
    args.mode.check(&model, &config)?;
    let limit = config.max_position_embeddings;
    if args.context > limit {
        return Err(bad_input!("--context is {}, expected {limit} at most: the model's context", args.context));
    }
    // No rows at all are refused with the other options, by the name of where they come from.
    if args.phase == Phase::Prefill && (1..args.batch).contains(&batch.prefill_rows) {
        return Err(bad_input!(
            "--batch is {}, expected {} at most: the rows of a step",
            args.batch,
            batch.prefill_rows
        ));
    }
    let session = model.load(args.load.selector(), SessionOptions { batch, ..args.load.options() })?;
    let mut session = args.mode.applied(session)?;
    let profile = match args.phase {
        Phase::Decode => session.profile_decode(args.batch, args.context)?,
        Phase::Prefill => session.profile_prefill(args.batch, args.context)?,
    };
    if let Some(path) = &args.trace {
        write_atomically(path, |partial| std::fs::write(partial, trace(&profile).to_string()))?;
    }
    let report = Report::new(args, &model, &session, &profile);
    if args.json { print_json(&report) } else { Ok(print(&report.to_text(&storage(&session)))?) }
}

impl Report {
    fn new(args: &ProfileArgs, model: &Model, session: &Session, profile: &StepProfile) -> Self {
        let total: f64 = profile.dispatches.iter().map(|time| time.micros).sum();
        let mut kernels: Vec<KernelTime> = Vec::new();
        let mut weight_bytes: Vec<f64> = Vec::new();
        for time in &profile.dispatches {
            let name = time.dispatch.kernel;
            let index = kernels.iter().position(|known| known.kernel == name).unwrap_or_else(|| {
                let (calls, occupied_calls, us, share, weights_gb_per_s) = (0, 0.0, 0.0, 0.0, None);
                kernels.push(KernelTime { kernel: name, calls, occupied_calls, us, share, weights_gb_per_s });
                weight_bytes.push(0.0);
                kernels.len() - 1
            });
            let kernel = &mut kernels[index];
            kernel.calls += 1;
            kernel.occupied_calls += time.occupied;
            kernel.us += time.micros;
            weight_bytes[index] += time.dispatch.weight_bytes as f64 * time.occupied;
        }
        for (kernel, bytes) in kernels.iter_mut().zip(weight_bytes) {
            kernel.share = kernel.us / total.max(f64::MIN_POSITIVE);
            kernel.weights_gb_per_s = (bytes > 0.0 && kernel.us > 0.0).then(|| bytes / kernel.us / 1e3);
        }
        kernels.sort_by(|a, b| b.us.total_cmp(&a.us));
        Self {
            model: model.name(),
            device: session.device().name.clone(),
            driver: session.device().driver.clone(),
            dtype: session.precision().as_str(),
            quantization: Some(quantization(session)).filter(|text| !text.is_empty()),
            phase: args.phase.name(),
            context: args.context,
            step_tokens: profile.num_tokens,
            batch: args.batch,
            depths: args.mode.name(),
            step_us: profile.device_micros,
            host_us: profile.host_micros,
            dispatches_us: total,
            parts: profile.parts.iter().map(|&(name, us)| Part { name, us }).collect(),
            kernels,
        }
    }

    fn to_text(&self, storage: &str) -> String {
        let in_steps = self.phase == Phase::Prefill.name() && self.step_tokens < self.context;
        let tokens = if in_steps { format!("the last {} of ", self.step_tokens) } else { String::new() };
        let mut text = format!(
            "{}, {storage}, on \"{}\" ({}): {} of {tokens}{} tokens, {} at a time, depths {}\n",
            self.model, self.device, self.driver, self.phase, self.context, self.batch, self.depths
        );
        let parts: Vec<_> = self.parts.iter().map(|part| format!("{} {:.1}", part.name, part.us)).collect();
        let _ = writeln!(
            text,
            "step {:.1} us ({}), host {:.1} us, dispatches one by one {:.1} us\n",
            self.step_us,
            parts.join(", "),
            self.host_us,
            self.dispatches_us
        );
        let _ = writeln!(text, "| kernel | calls | with rows | us | share | weights GB/s |");
        let _ = writeln!(text, "| --- | ---: | ---: | ---: | ---: | ---: |");
        for kernel in &self.kernels {
            let rate = kernel.weights_gb_per_s.map_or("-".to_owned(), |rate| format!("{rate:.1}"));
            let _ = writeln!(
                text,
                "| {} | {} | {:.1} | {:.1} | {:.1} % | {rate} |",
                kernel.kernel,
                kernel.calls,
                kernel.occupied_calls,
                kernel.us,
                100.0 * kernel.share
            );
        }
        text
    }
}

/// The step in Chrome's trace format: parts, and below them the dispatches end to end, as long as each takes alone.
fn trace(profile: &StepProfile) -> Value {
    let event = |name: &str, track: u32, start: f64, micros: f64, args: Value| json!({ "name": name, "ph": "X", "pid": 1, "tid": track, "ts": start, "dur": micros, "args": args });
    let name = |track: u32, name: &str| json!({ "name": "thread_name", "ph": "M", "pid": 1, "tid": track, "args": { "name": name } });
    let mut events = vec![name(1, "parts"), name(2, "dispatches")];
    let mut start = 0.0;
    for of_part in profile.dispatches.chunk_by(|a, b| a.dispatch.part == b.dispatch.part) {
        let micros: f64 = of_part.iter().map(|time| time.micros).sum();
        events.push(event(of_part[0].dispatch.part, 1, start, micros, json!({ "dispatches": of_part.len() })));
        for time in of_part {
            let args = json!({ "weight_bytes": time.dispatch.weight_bytes, "occupied": time.occupied });
            events.push(event(time.dispatch.kernel, 2, start, time.micros, args));
            start += time.micros;
        }
    }
    json!({ "displayTimeUnit": "ns", "traceEvents": events })
}
