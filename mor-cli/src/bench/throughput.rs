//! `mor bench throughput`: the protocol of Mixture-of-Recursions (arXiv 2507.10524, figure 4a): no prompt, normally
//! distributed lengths, many more requests than slots, a fixed number of slots.

use std::collections::HashMap;
use std::fmt::Write;

use mor_model::{Checkpoint, Dtype, Mode, MorConfig, PARTS, SharingStrategy};
use mor_runtime::{
    BatchOptions, Batching, Event, FinishReason, GenerateRequest, KvStrategy, ModelSource, SamplingParams,
    ScriptedRouter, SequenceHandle, Session, SessionOptions, Statistics, StepProfile, Summary,
};
use serde::Serialize;
use serde_json::{Value, json};

use super::is_without_timestamps;
use crate::args::{DepthsArg, FormatArg, ModeArg, SlotsArg, ThroughputArgs};
use crate::failure::bad_input;
use crate::input::read_text;
use crate::model::{self, Model};
use crate::{note, print, print_json};

/// What `--slots max` is at most.
const MOST_SLOTS: usize = 1024;
const REQUESTS_PER_SLOT: usize = 4;
const TEMPERATURE: f32 = 1.0;
/// New tokens of a sequence before anything is measured, so that the clock has risen.
const WARM_UP_TOKENS: usize = 64;
/// Statistics walk all page tables, so they are not read at every step.
const STEPS_PER_SAMPLE: usize = 8;

/// What `--output json` prints.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    device: String,
    precision: &'static str,
    protocol: Protocol,
    runs: Vec<Run>,
}

#[derive(Debug, Serialize)]
struct Protocol {
    prompt_tokens: usize,
    mean_new: f64,
    std_new: f64,
    /// Lengths beyond these are drawn to the nearer of them.
    least_new: usize,
    most_new: usize,
    temperature: f32,
    seed: u64,
    /// `model` or `capacities`.
    depths: &'static str,
    /// Every request begins alike, so sharing would measure something else.
    share_prefixes: bool,
}

/// A mode at a number of slots.
#[derive(Debug, Serialize)]
struct Run {
    mode: &'static str,
    slots: usize,
    requests: usize,
    /// From the first request to the last answer.
    whole: Span,
    /// The part of it in which all slots were taken and requests waited; none if that was short.
    steady: Option<Span>,
    mean_depth: f64,
    /// New tokens by the number of recursions that the token before took.
    tokens_by_depth: Vec<u64>,
    preemptions: u64,
    kv: KvBytes,
    time: Option<TickTime>,
    bounds: Option<Bounds>,
}

/// A span of a run.
#[derive(Debug, Serialize)]
struct Span {
    seconds: f64,
    tokens: u64,
    tokens_per_s: f64,
    /// Tokens per second relative to those of vanilla at as many slots.
    to_vanilla: Option<f64>,
    ticks: u64,
    micros_per_tick: f64,
    /// Part of all slots' ticks that were spent on tokens.
    occupancy: f64,
    /// Part of the time that planning and bookkeeping took on the host.
    scheduling: f64,
}

#[derive(Debug, Serialize)]
struct KvBytes {
    /// Entries of tokens, at most.
    peak_used: u64,
    /// Pages in the tables of sequences, at most.
    peak_reserved: u64,
    /// Mean of what was used of the reserved.
    used_of_reserved: f64,
    per_token: f64,
    /// Bytes of a token relative to vanilla.
    to_vanilla: f64,
    /// The same of the layers between first and last.
    shared_layers_to_vanilla: f64,
}

/// Microseconds of a tick in which every slot has a token, halfway through the sequences.
#[derive(Debug, Serialize)]
struct TickTime {
    /// Of a tick among others in one submit.
    device: f64,
    /// Of embedding and first layer.
    prelude: f64,
    /// Of the layers between, with routers.
    block: f64,
    /// Of last layer, head and draw.
    coda: f64,
    /// What a tick took in the steady span, or the whole, beyond `device`.
    gap: f64,
}

/// How much faster than vanilla layers alone can make it at this mean depth.
#[derive(Debug, Serialize)]
struct Bounds {
    /// Where a layer's time follows its rows.
    by_rows: f64,
    /// Where a layer takes as long whatever its rows.
    by_passes: f64,
}

pub(crate) fn run(args: &ThroughputArgs) -> anyhow::Result<()> {
    let model = match (&args.config, &args.model) {
        (Some(config), _) => Model::Random(config.clone()),
        (None, folder) => Model::named(folder.as_deref())?,
    };
    let config = model.config()?;
    if config.mode != Mode::Expert || config.sharing != SharingStrategy::MiddleCycle {
        let found = format!("mode {} with sharing {}", config.mode, config.sharing);
        return Err(bad_input!("{}: {found}, expected mode expert with sharing middle_cycle", model.name()));
    }
    let depths = args.depths.unwrap_or(if args.model.is_some() { DepthsArg::Model } else { DepthsArg::Capacities });
    let modes = modes(args)?;
    let num_requests = |slots: usize| args.requests.unwrap_or(REQUESTS_PER_SLOT * slots);
    let check_requests = |slots: usize| match num_requests(slots) {
        requests if requests > slots => Ok(()),
        requests => {
            Err(bad_input!("--requests is {requests}, expected more than the {slots} slots, so that some wait"))
        }
    };
    let counts = args.slots.iter().map(|slots| match slots {
        SlotsArg::Count(slots) => check_requests(*slots).map(|()| *slots),
        SlotsArg::Max => Ok(MOST_SLOTS),
    });
    let most_slots = counts.collect::<anyhow::Result<Vec<_>>>()?.into_iter().max().unwrap_or(1);
    let most_new = config.max_position_embeddings - 1;
    if most_new == 0 {
        return Err(bad_input!("{}: max_position_embeddings is 1, expected 2 or more", model.name()));
    }
    let lengths = lengths(args, num_requests(most_slots), most_new);
    // The prompt is one token.
    let context = 1 + lengths.iter().max().copied().unwrap_or(1);

    let mut sessions = load_all(args, &model, &config, &modes, depths)?;
    let device = sessions.values().next().map(|session| session.device().name.clone()).unwrap_or_default();
    let precision = sessions.values().next().map_or("", |session| session.precision().as_str());
    let mut runs = Vec::new();
    for slots in &args.slots {
        let slots = match slots {
            SlotsArg::Count(slots) => *slots,
            SlotsArg::Max => most_that_fit(&sessions, context)?,
        };
        check_requests(slots)?;
        let requests = requests(args, &config, &lengths[..num_requests(slots)]);
        for mode in &modes {
            let key = mode.mode();
            let session = sessions.remove(&key).ok_or_else(|| anyhow::anyhow!("{} is not loaded", mode.name()))?;
            let batching = mode.batching();
            // Memory for all slots at their longest, so that nothing is computed twice.
            let (max_context, kv_bytes) = (Some(context), Some(u64::MAX));
            let batch = BatchOptions {
                max_sequences: slots,
                max_context,
                kv_bytes,
                share_prefixes: false,
                batching,
                ..BatchOptions::default()
            };
            let mut session = session.with_batch(batch)?;
            let run = measure(&mut session, *mode, &requests)?;
            note(&format!("{}, {slots} slots: {:.0} tokens/s", run.mode, run.whole.tokens_per_s));
            runs.push(run);
            // Its caches make room for the next.
            sessions.insert(key, session.with_batch(BatchOptions::default())?);
        }
    }
    compare(&mut runs);
    let report = Report {
        model: model.name(),
        device,
        precision,
        protocol: Protocol {
            prompt_tokens: 1,
            mean_new: args.mean_new,
            std_new: args.std_new,
            least_new: 1,
            most_new,
            temperature: TEMPERATURE,
            seed: args.seed,
            depths: depths.name(),
            share_prefixes: false,
        },
        runs,
    };
    match args.output {
        FormatArg::Json => print_json(&report),
        FormatArg::Md => Ok(print(&report.to_markdown()?)?),
    }
}

impl ModeArg {
    const ALL: [Self; 4] = [Self::Vanilla, Self::Recursive, Self::MorLockstep, Self::MorDepthwise];

    fn name(self) -> &'static str {
        match self {
            ModeArg::Vanilla => "vanilla",
            ModeArg::Recursive => "recursive",
            ModeArg::MorLockstep => "mor-lockstep",
            ModeArg::MorDepthwise => "mor-depthwise",
        }
    }

    fn mode(self) -> Mode {
        match self {
            ModeArg::Vanilla => Mode::Vanilla,
            ModeArg::Recursive => Mode::Recursive,
            ModeArg::MorLockstep | ModeArg::MorDepthwise => Mode::Expert,
        }
    }

    /// `None`: as it suits the model.
    fn batching(self) -> Option<Batching> {
        match self {
            ModeArg::Vanilla | ModeArg::Recursive => None,
            ModeArg::MorLockstep => Some(Batching::Lockstep),
            ModeArg::MorDepthwise => Some(Batching::Depthwise),
        }
    }
}

impl DepthsArg {
    fn name(self) -> &'static str {
        match self {
            DepthsArg::Model => "model",
            DepthsArg::Capacities => "capacities",
        }
    }
}

/// The modes to run, those of the model alone where its weights are given.
fn modes(args: &ThroughputArgs) -> anyhow::Result<Vec<ModeArg>> {
    let is_there = |mode: &ModeArg| args.model.is_none() || mode.mode() == Mode::Expert;
    if args.modes.is_empty() {
        return Ok(ModeArg::ALL.into_iter().filter(is_there).collect());
    }
    match args.modes.iter().find(|mode| !is_there(mode)) {
        None => Ok(args.modes.clone()),
        Some(mode) => {
            let expected = "expected mor-lockstep or mor-depthwise with --model; give --config for shapes";
            Err(bad_input!("--modes has {}, {expected}", mode.name()))
        }
    }
}

/// New tokens of every request: the same ones, from the first on, whatever their number.
fn lengths(args: &ThroughputArgs, count: usize, most: usize) -> Vec<usize> {
    let mut state = args.seed;
    let length = |_| {
        // Box and Muller: two uniform draws, the first of them not 0.
        let (u, v) = (1.0 - uniform(&mut state), uniform(&mut state));
        let normal = (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos();
        (args.mean_new + args.std_new * normal).round().clamp(1.0, most as f64) as usize
    };
    (0..count).map(length).collect()
}

/// A draw from [0, 1), by SplitMix64.
fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

fn requests(args: &ThroughputArgs, config: &MorConfig, lengths: &[usize]) -> Vec<GenerateRequest> {
    let prompt = if config.eos_token_ids().is_empty() { vec![0] } else { Vec::new() };
    let request = |(index, length): (u64, &usize)| GenerateRequest {
        max_new_tokens: *length,
        sampling: SamplingParams {
            temperature: TEMPERATURE,
            seed: args.seed.wrapping_add(index),
            ..SamplingParams::default()
        },
        ignore_eos: true,
        ..GenerateRequest::new(prompt.clone())
    };
    (0..).zip(lengths).map(request).collect()
}

/// Loads what the modes need, each model once and all of them on one device.
fn load_all(
    args: &ThroughputArgs,
    model: &Model,
    config: &MorConfig,
    modes: &[ModeArg],
    depths: DepthsArg,
) -> anyhow::Result<HashMap<Mode, Session>> {
    let options = || SessionOptions { precision: args.dtype.precision(), ..SessionOptions::default() };
    let mut sessions: HashMap<Mode, Session> = HashMap::new();
    for mode in modes.iter().map(|mode| mode.mode()) {
        if sessions.contains_key(&mode) {
            continue;
        }
        let mut session = match &args.config {
            None => model.load(args.device.selector(), options())?,
            Some(path) => {
                let (config, seed, dtype) =
                    (shape(&read_text(path)?, &model.name(), config, mode)?, args.seed, Dtype::F16);
                match sessions.values().next() {
                    None => {
                        model::load(ModelSource::Random { config, seed, dtype }, args.device.selector(), options())?
                    }
                    Some(first) => {
                        let gpu = first.model().gpu().clone();
                        Session::on_gpu(gpu, &Checkpoint::random(config, seed, dtype), first.precision())?
                    }
                }
            }
        };
        if mode == Mode::Expert && depths == DepthsArg::Capacities {
            session = session.with_scripted_router(&ScriptedRouter::by_capacity(config, args.seed))?;
        }
        sessions.insert(mode, session);
    }
    Ok(sessions)
}

/// The shape in `text` in another mode, with as many layers.
fn shape(text: &str, origin: &str, config: &MorConfig, mode: Mode) -> anyhow::Result<MorConfig> {
    let mut fields: Value = serde_json::from_str(text)?;
    match mode {
        Mode::Vanilla => (fields["model_type"], fields["mor"]) = (json!("llama"), Value::Null),
        Mode::Recursive => {
            // Where every token takes every recursion, hybrid is no other strategy.
            let kv = if config.kv == KvStrategy::Hybrid { KvStrategy::RecursionWise } else { config.kv };
            fields["mor"] = json!({
                "mode": mode.as_str(),
                "sharing": config.sharing.as_str(),
                "num_recursion": config.num_recursions,
                "kv": kv.as_str(),
            });
        }
        Mode::Expert | Mode::Token => {}
    }
    Ok(MorConfig::from_json_str(&fields.to_string(), origin)?)
}

/// The largest number of slots that all modes have room for.
fn most_that_fit(sessions: &HashMap<Mode, Session>, context: usize) -> anyhow::Result<usize> {
    let weights = |session: &Session| session.model().weights().num_bytes();
    let all: u64 = sessions.values().map(weights).sum();
    let fits = sessions.values().filter_map(|session| session.sequences_that_fit(context, all - weights(session)));
    match fits.min().unwrap_or(MOST_SLOTS).min(MOST_SLOTS) {
        0 => Err(bad_input!("no sequence of {context} tokens fits the adapter's memory, expected a smaller model")),
        slots => Ok(slots),
    }
}

/// Serves all requests in a session that was made for so many slots.
fn measure(session: &mut Session, mode: ModeArg, requests: &[GenerateRequest]) -> anyhow::Result<Run> {
    let slots = session.max_sequences();
    let squares: usize = requests.iter().map(|request| request.max_new_tokens * request.max_new_tokens).sum();
    let total: usize = requests.iter().map(|request| request.max_new_tokens).sum();
    session.prepare_decode(1 + requests.iter().map(|request| request.max_new_tokens).max().unwrap_or(1))?;
    let warm_up = |request: &GenerateRequest| GenerateRequest {
        max_new_tokens: request.max_new_tokens.min(WARM_UP_TOKENS),
        ..request.clone()
    };
    serve(session, &requests.iter().take(slots).map(warm_up).collect::<Vec<_>>())?;
    session.reset_statistics();
    let (samples, answers) = serve(session, requests)?;
    let end = samples.last().cloned().unwrap_or_default();

    let whole = Span::between(&Statistics::default(), &end, slots);
    let first = samples.iter().find(|sample| sample.running == slots && sample.new_tokens > 0);
    let last = samples.iter().rfind(|sample| sample.waiting > 0);
    let steady = first.zip(last).filter(|(first, last)| last.ticks > first.ticks);
    let steady = steady.map(|(first, last)| Span::between(first, last, slots));

    // A token of a steady batch is as likely at any place of any sequence.
    let profile = profile(session, slots, squares / total)?;
    let wall = steady.as_ref().unwrap_or(&whole).micros_per_tick;
    let config = session.config();
    Ok(Run {
        mode: mode.name(),
        slots,
        requests: requests.len(),
        whole,
        steady,
        mean_depth: end.mean_depth(),
        preemptions: end.preemptions,
        kv: KvBytes::new(session, &samples, &answers),
        time: profile.map(|profile| TickTime::new(&profile, wall)),
        bounds: (config.mode == Mode::Expert).then(|| Bounds::new(config, mode, end.mean_depth())),
        tokens_by_depth: end.tokens_by_depth,
    })
}

/// Runs requests to their ends: statistics on the way, and the answers.
fn serve(session: &mut Session, requests: &[GenerateRequest]) -> anyhow::Result<(Vec<Statistics>, Vec<Summary>)> {
    let handles = requests.iter().map(|request| session.submit(request)).collect::<Result<Vec<_>, _>>()?;
    let mut samples = Vec::new();
    for step in 0.. {
        let goes_on = session.step()?;
        if !goes_on || step % STEPS_PER_SAMPLE == 0 {
            samples.push(session.statistics());
        }
        if !goes_on {
            break;
        }
    }
    let answer = |(handle, request): (&SequenceHandle, &GenerateRequest)| {
        let events = std::iter::from_fn(|| handle.try_next());
        let summary = events.filter_map(|event| match event {
            Event::Finished(summary) => Some(summary),
            _ => None,
        });
        match summary.last() {
            Some(summary)
                if summary.finish_reason == FinishReason::Length && summary.tokens.len() == request.max_new_tokens =>
            {
                Ok(summary)
            }
            found => {
                let found = found.map(|summary| (summary.finish_reason.as_str(), summary.tokens.len()));
                let wanted = request.max_new_tokens;
                Err(anyhow::anyhow!("sequence {} ended with {found:?}, expected {wanted} tokens", handle.id()))
            }
        }
    };
    let answers = handles.iter().zip(requests).map(answer).collect::<anyhow::Result<_>>()?;
    Ok((samples, answers))
}

/// Times of the ticks; none where the device writes no timestamps.
fn profile(session: &mut Session, slots: usize, context: usize) -> anyhow::Result<Option<StepProfile>> {
    match session.profile_decode(slots, context) {
        Ok(profile) => Ok(Some(profile)),
        Err(error) if is_without_timestamps(&error) => {
            note(&format!("warning: no times of parts: {error}"));
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Fills in the ratios to vanilla, where it ran with as many slots.
fn compare(runs: &mut [Run]) {
    let rate = |span: &Span| span.tokens_per_s;
    let vanilla: HashMap<usize, (f64, Option<f64>)> = runs
        .iter()
        .filter(|run| run.mode == ModeArg::Vanilla.name())
        .map(|run| (run.slots, (rate(&run.whole), run.steady.as_ref().map(rate))))
        .collect();
    for run in runs {
        let Some((whole, steady)) = vanilla.get(&run.slots) else { continue };
        run.whole.to_vanilla = Some(run.whole.tokens_per_s / whole);
        if let (Some(span), Some(steady)) = (&mut run.steady, steady) {
            span.to_vanilla = Some(span.tokens_per_s / steady);
        }
    }
}

impl Span {
    fn between(first: &Statistics, last: &Statistics, slots: usize) -> Self {
        let seconds = (last.elapsed - first.elapsed).as_secs_f64();
        let (tokens, ticks) = (last.new_tokens - first.new_tokens, last.ticks - first.ticks);
        let busy = last.busy_slot_ticks - first.busy_slot_ticks;
        Self {
            seconds,
            tokens,
            tokens_per_s: tokens as f64 / seconds.max(1e-9),
            to_vanilla: None,
            ticks,
            micros_per_tick: seconds * 1e6 / ticks.max(1) as f64,
            occupancy: busy as f64 / (ticks * slots as u64).max(1) as f64,
            scheduling: (last.scheduling - first.scheduling).as_secs_f64() / seconds.max(1e-9),
        }
    }
}

impl KvBytes {
    fn new(session: &Session, samples: &[Statistics], answers: &[Summary]) -> Self {
        let model = session.model();
        let num_layers = session.config().num_hidden_layers;
        let mut entries = vec![0; num_layers];
        for answer in answers {
            entries.iter_mut().zip(&answer.kv_entries).for_each(|(sum, entries)| *sum += entries);
        }
        let tokens = answers.iter().map(|answer| answer.depths.len()).sum::<usize>().max(1) as f64;
        let total = |layers: &[usize]| layers.iter().sum::<usize>() as f64;
        let per_layer = |layers: &[usize]| total(layers) / (layers.len() as f64 * tokens);
        let entry_bytes = 2 * model.kv_dtype().row_bytes(model.kv_dim());
        let used = samples.iter().map(|sample| sample.kv.used_bytes);
        let reserved = samples.iter().map(|sample| sample.kv.reserved_bytes);
        Self {
            peak_used: used.clone().max().unwrap_or(0),
            peak_reserved: reserved.clone().max().unwrap_or(0),
            used_of_reserved: used.sum::<u64>() as f64 / reserved.sum::<u64>().max(1) as f64,
            per_token: total(&entries) * entry_bytes as f64 / tokens,
            to_vanilla: per_layer(&entries),
            shared_layers_to_vanilla: per_layer(&entries[1..num_layers - 1]),
        }
    }
}

impl TickTime {
    fn new(profile: &StepProfile, wall: f64) -> Self {
        let of = |part| profile.parts.iter().filter(|(name, _)| *name == part).map(|(_, micros)| micros).sum();
        let [prelude, block, coda] = PARTS.map(of);
        Self { device: profile.device_micros, prelude, block, coda, gap: wall - profile.device_micros }
    }
}

impl Bounds {
    fn new(config: &MorConfig, mode: ModeArg, mean_depth: f64) -> Self {
        let layers = config.num_hidden_layers as f64;
        let block = (layers - 2.0) / config.num_recursions as f64;
        let passes = match mode {
            // A tick runs the first, the last and the block's layers, and a token takes a tick a recursion.
            ModeArg::MorDepthwise => (2.0 + block) * mean_depth,
            _ => layers,
        };
        Self { by_rows: layers / (2.0 + block * mean_depth), by_passes: layers / passes }
    }
}

impl Report {
    fn to_markdown(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        let Protocol { mean_new, std_new, least_new, most_new, seed, depths, .. } = &self.protocol;
        writeln!(text, "{}, {}, {}", self.model, self.device, self.precision)?;
        writeln!(
            text,
            "No prompt; new tokens normal ({mean_new}, {std_new}) within {least_new} and {most_new}; temperature \
             {TEMPERATURE}; seed {seed}; depths by {depths}; prefixes not shared. Steady: all slots taken, requests wait.\n"
        )?;
        writeln!(
            text,
            "| mode | slots | requests | tokens | tokens/s | to vanilla | steady tokens/s | to vanilla | occupancy | \
             steady occupancy | mean depth | tokens by depth | bound by rows | by passes |"
        )?;
        writeln!(text, "| --- |{}", " ---: |".repeat(13))?;
        let optional = |value: Option<f64>, digits: usize| match value {
            Some(value) => format!("{value:.digits$}"),
            None => "-".to_owned(),
        };
        for run in &self.runs {
            let steady = run.steady.as_ref();
            let by_depth: Vec<_> = run.tokens_by_depth.iter().map(u64::to_string).collect();
            let bounds = run.bounds.as_ref();
            let cells = [
                run.mode.to_owned(),
                run.slots.to_string(),
                run.requests.to_string(),
                run.whole.tokens.to_string(),
                format!("{:.0}", run.whole.tokens_per_s),
                optional(run.whole.to_vanilla, 2),
                optional(steady.map(|span| span.tokens_per_s), 0),
                optional(steady.and_then(|span| span.to_vanilla), 2),
                format!("{:.3}", run.whole.occupancy),
                optional(steady.map(|span| span.occupancy), 3),
                format!("{:.3}", run.mean_depth),
                by_depth.join(" "),
                optional(bounds.map(|bounds| bounds.by_rows), 2),
                optional(bounds.map(|bounds| bounds.by_passes), 2),
            ];
            writeln!(text, "| {} |", cells.join(" | "))?;
        }
        writeln!(
            text,
            "\n| mode | slots | ticks | us/tick | device | prelude | block | coda | gap | scheduler | K/V MB used | \
             reserved | used of reserved | bytes/token | to vanilla | shared layers to vanilla | preemptions |"
        )?;
        writeln!(text, "| --- |{}", " ---: |".repeat(16))?;
        for run in &self.runs {
            let span = run.steady.as_ref().unwrap_or(&run.whole);
            let micros = |of: fn(&TickTime) -> f64| optional(run.time.as_ref().map(of), 1);
            let cells = [
                run.mode.to_owned(),
                run.slots.to_string(),
                run.whole.ticks.to_string(),
                format!("{:.1}", span.micros_per_tick),
                micros(|time| time.device),
                micros(|time| time.prelude),
                micros(|time| time.block),
                micros(|time| time.coda),
                micros(|time| time.gap),
                format!("{:.2} %", 100.0 * span.scheduling),
                format!("{:.1}", run.kv.peak_used as f64 / 1e6),
                format!("{:.1}", run.kv.peak_reserved as f64 / 1e6),
                format!("{:.3}", run.kv.used_of_reserved),
                format!("{:.0}", run.kv.per_token),
                format!("{:.3}", run.kv.to_vanilla),
                format!("{:.3}", run.kv.shared_layers_to_vanilla),
                run.preemptions.to_string(),
            ];
            writeln!(text, "| {} |", cells.join(" | "))?;
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{BenchArgs, BenchCommand};

    fn args(text: &[&str]) -> ThroughputArgs {
        use clap::Parser;
        let all = [&["mor", "bench", "throughput", "--config", "c.json"], text].concat();
        match crate::args::Args::parse_from(all).command {
            crate::args::Command::Bench(BenchArgs { command: Some(BenchCommand::Throughput(args)), .. }) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn lengths_are_distributed_as_asked() {
        let all = lengths(&args(&[]), 4096, 2047);
        let mean = all.iter().sum::<usize>() as f64 / 4096.0;
        let variance = all.iter().map(|length| (*length as f64 - mean).powi(2)).sum::<f64>() / 4096.0;
        // Four standard errors of the mean, and of the deviation.
        assert!((mean - 256.0).abs() < 4.0 && (variance.sqrt() - 64.0).abs() < 3.0, "{mean} {variance}");
        assert_eq!(lengths(&args(&[]), 100, 2047), all[..100]);
        assert_ne!(lengths(&args(&["--seed", "1"]), 100, 2047), all[..100]);
        let clamped = lengths(&args(&["--mean-new", "4", "--std-new", "10"]), 200, 7);
        assert_eq!((clamped.iter().min(), clamped.iter().max()), (Some(&1), Some(&7)));
    }

    #[test]
    fn shapes_keep_their_depth() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/configs/360m-mor-r3.json");
        let text = std::fs::read_to_string(path).unwrap();
        let config = MorConfig::from_json_str(&text, "r3").unwrap();
        for mode in [Mode::Vanilla, Mode::Recursive, Mode::Expert] {
            let found = shape(&text, "r3", &config, mode).unwrap();
            assert_eq!((found.mode, found.num_hidden_layers), (mode, config.num_hidden_layers));
        }
        let bounds = Bounds::new(&config, ModeArg::MorDepthwise, 2.0);
        assert_eq!((bounds.by_rows, bounds.by_passes), (32.0 / 22.0, 32.0 / 24.0));
    }
}
