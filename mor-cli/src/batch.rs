//! `mor batch`: answers a file of requests, many at a time, on one or more devices.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use mor_runtime::{
    BatchOptions, Event, Fleet, GenerateRequest, Report, RuntimeError, SamplingParams, SessionOptions, Statistics,
    Summary, Tokenizer,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::BatchArgs;
use crate::failure::{BAD_INPUT, INTERRUPTED as INTERRUPTED_CODE, bad_input, sentence};
use crate::{note, print_json};

/// Without `max_new_tokens`, as `mor generate`.
const DEFAULT_NEW_TOKENS: usize = 128;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// One line of the input.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    id: Option<Value>,
    prompt: Option<String>,
    prompt_tokens: Option<Vec<u32>>,
    max_new_tokens: Option<usize>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repeat_penalty: Option<f32>,
    seed: Option<u64>,
    #[serde(default)]
    stop: Stop,
    #[serde(default)]
    ignore_eos: bool,
}

/// One text or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Several(Vec<String>),
}

impl Default for Stop {
    fn default() -> Self {
        Stop::Several(Vec::new())
    }
}

/// One line of the output.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    id: &'a Value,
    text: Option<&'a str>,
    tokens: &'a [u32],
    /// One per token fed: the prompt's, then all new tokens but the last.
    depths: &'a [u32],
    finish_reason: &'static str,
    mean_depth: f64,
    seed: u64,
    usage: Usage,
}

#[derive(Debug, Serialize)]
struct Usage {
    prompt_tokens: usize,
    new_tokens: usize,
    /// Prompt tokens that were not read, because another request had begun alike.
    reused_tokens: usize,
}

/// A request under way.
#[derive(Debug)]
struct Asked {
    line: usize,
    id: Value,
    seed: u64,
}

pub(crate) fn run(args: &BatchArgs) -> anyhow::Result<ExitCode> {
    // At once: it may be a pipe.
    let input = std::fs::read(&args.input)
        .map_err(|error| bad_input!("{}: {error}; expected a file of JSON Lines", args.input.display()))?;
    let total = input.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()).count();
    let mut input = &input[..];
    check_output(args)?;

    let model = args.model.named(args.random_weights.as_deref())?;
    let kv = args.kv.map(|kv| kv.strategy());
    let config = model.config()?;
    if let Some(kv) = kv {
        config.with_kv(kv)?;
    }
    let depth = args.depth.control(&config)?;
    let batch = BatchOptions {
        max_sequences: args.concurrency,
        kv_bytes: args.kv_memory.map(|mib| (mib as u64) << 20),
        batch_invariant: args.batch_invariant,
        ..BatchOptions::default()
    };
    let mut sessions = Vec::new();
    for device in args.selectors() {
        let options = SessionOptions {
            precision: args.dtype.precision(),
            quantize: args.quantize.quantization(),
            quantize_kv: args.quantize.quantize_kv,
            kv,
            depth,
            batch: batch.clone(),
            ..SessionOptions::default()
        };
        sessions.push(model.load(device, options)?);
    }
    let tokenizer = sessions[0].tokenizer().cloned();
    let context = sessions[0].config().max_position_embeddings;
    let most_under_way = 4 * args.concurrency * sessions.len();
    // Nothing is made or replaced before it is clear that there can be answers.
    let (mut output, answered) = open_output(args)?;
    let mut fleet = Fleet::new(sessions);

    // From here on Ctrl-C ends the batch after the answers that are there; a second one ends the program.
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED_CODE.into());
        }
    })?;

    let bar = progress_bar(total as u64);
    let mut lines = Lines { number: 0, used: HashMap::new(), answered };
    let mut asked: HashMap<u64, Asked> = HashMap::new();
    let mut tally = Tally { start: Instant::now(), answers: 0, skipped: 0, bad: 0 };
    let mut at_end = false;
    loop {
        while !at_end && fleet.num_unfinished() < most_under_way {
            match lines.next(&mut input, tokenizer.as_ref(), context)? {
                Next::End => at_end = true,
                Next::Skipped => {
                    tally.skipped += 1;
                    bar.inc(1);
                }
                Next::Bad(message) => {
                    tally.bad += 1;
                    bar.inc(1);
                    bar.suspend(|| note(&format!("{}: {message}", args.input.display())));
                }
                Next::Request(id, request) => {
                    let seed = request.sampling.seed;
                    asked.insert(fleet.submit(request), Asked { line: lines.number, id, seed });
                }
            }
        }
        if INTERRUPTED.load(Ordering::Relaxed) {
            break;
        }
        let Some(report) = fleet.next_report() else { break };
        let (number, report) = report?;
        match report {
            Report::Event(Event::Finished(summary)) => {
                let of = asked.remove(&number).ok_or_else(|| anyhow::anyhow!("request {number} ended twice"))?;
                write_answer(&mut output, &of, &summary)
                    .map_err(|error| anyhow::anyhow!("{}: {error}; go on with --resume", args.output.display()))?;
                tally.answers += 1;
                bar.inc(1);
                bar.set_message(tally.done(&fleet.statistics()).rates());
            }
            Report::Refused(error) => {
                let of = asked.remove(&number).ok_or_else(|| anyhow::anyhow!("request {number} ended twice"))?;
                tally.bad += 1;
                bar.inc(1);
                let message = sentence(&error.into());
                bar.suspend(|| note(&format!("{}: line {}: {message}", args.input.display(), of.line)));
            }
            _ => {}
        }
    }
    output.sync_data().or_else(ignore_unsupported)?;
    bar.finish_and_clear();
    let done = tally.done(&fleet.statistics());
    note(&done.line());
    if args.json {
        print_json(&done)?;
    }
    Ok(match () {
        () if done.interrupted => ExitCode::from(INTERRUPTED_CODE),
        () if done.refused > 0 => ExitCode::from(BAD_INPUT),
        () => ExitCode::SUCCESS,
    })
}

/// What a line of the input is.
enum Next {
    Request(Value, GenerateRequest),
    /// Answered by an earlier run.
    Skipped,
    Bad(String),
    End,
}

/// Reads requests line by line.
struct Lines {
    /// Number of the last line read, from 1 on.
    number: usize,
    /// Lines by the id they used.
    used: HashMap<String, usize>,
    answered: HashSet<String>,
}

impl Lines {
    fn next(
        &mut self,
        input: &mut impl BufRead,
        tokenizer: Option<&Tokenizer>,
        context: usize,
    ) -> anyhow::Result<Next> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            self.number += 1;
            if input.read_until(b'\n', &mut bytes)? == 0 {
                return Ok(Next::End);
            }
            if !bytes.trim_ascii().is_empty() {
                break;
            }
        }
        let line = self.number;
        let bad = |what: String| Next::Bad(format!("line {line}: {what}"));
        let Ok(text) = std::str::from_utf8(&bytes) else {
            return Ok(bad("not UTF-8, expected a JSON object".to_owned()));
        };
        let request: Line = match serde_json::from_str(text.trim_end()) {
            Ok(request) => request,
            Err(error) => {
                // It counts lines of its own, of which there is one.
                let problem = error.to_string().replace(" at line 1 column ", " at column ");
                return Ok(bad(format!("not a request: {problem}; expected a JSON object with a prompt")));
            }
        };
        // Without an id of its own, a request is known by its line.
        let id = request.id.clone().filter(|id| !id.is_null()).unwrap_or_else(|| Value::from(line));
        if !(id.is_string() || id.is_number()) {
            return Ok(bad(format!("id is {id}, expected a text or a number")));
        }
        let key = id.to_string();
        if let Some(other) = self.used.insert(key.clone(), line) {
            return Ok(bad(format!("id {id} was used by line {other} already, expected ids that differ")));
        }
        if self.answered.contains(&key) {
            return Ok(Next::Skipped);
        }
        Ok(match request.into_request(line, tokenizer, context) {
            Ok(request) => Next::Request(id, request),
            Err(error) => bad(sentence(&error)),
        })
    }
}

impl Line {
    fn into_request(
        self,
        line: usize,
        tokenizer: Option<&Tokenizer>,
        context: usize,
    ) -> anyhow::Result<GenerateRequest> {
        let tokens = match (self.prompt, self.prompt_tokens) {
            (Some(_), Some(_)) => return Err(bad_input!("both prompt and prompt_tokens, expected one of them")),
            (None, Some(tokens)) => tokens,
            (None, None) => Vec::new(),
            (Some(text), None) if text.is_empty() => Vec::new(),
            (Some(text), None) => tokenizer.ok_or(RuntimeError::NoTokenizer)?.encode(&text)?,
        };
        let defaults = SamplingParams::default();
        let sampling = SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repeat_penalty.unwrap_or(defaults.repetition_penalty),
            // Equal prompts shall not get equal answers, and a resumed run the same ones as a whole run.
            seed: self.seed.unwrap_or(line as u64),
        };
        sampling.validate()?;
        let left = context.saturating_sub(tokens.len().max(1));
        Ok(GenerateRequest {
            max_new_tokens: self.max_new_tokens.unwrap_or(DEFAULT_NEW_TOKENS.min(left)),
            sampling,
            stop: match self.stop {
                Stop::One(text) => vec![text],
                Stop::Several(texts) => texts,
            },
            ignore_eos: self.ignore_eos,
            ..GenerateRequest::new(tokens)
        })
    }
}

/// Refuses an output that would be lost or cannot be written.
fn check_output(args: &BatchArgs) -> anyhow::Result<()> {
    let path = &args.output;
    let canonical = |path: &Path| std::fs::canonicalize(path).ok();
    if canonical(path).is_some_and(|output| Some(output) == canonical(&args.input)) {
        return Err(bad_input!("{}: is the input too, expected another file for the answers", path.display()));
    }
    if path.exists() {
        if args.resume {
            return resume(path).map(drop);
        }
        if !args.force {
            let advice = "give --resume to go on with it, --force to replace it, or another name";
            return Err(bad_input!("{}: exists already; {advice}", path.display()));
        }
    } else if path.parent().is_some_and(|folder| !folder.as_os_str().is_empty() && !folder.is_dir()) {
        return Err(bad_input!("{}: there is no such folder; expected a file that can be written", path.display()));
    }
    Ok(())
}

/// The output to append to, and the ids that it holds.
fn open_output(args: &BatchArgs) -> anyhow::Result<(File, HashSet<String>)> {
    let path = &args.output;
    if args.resume && path.exists() {
        return resume(path);
    }
    let mut options = OpenOptions::new();
    options.write(true);
    // Meanwhile another program may have made it.
    let options = if args.force { options.create(true).truncate(true) } else { options.create_new(true) };
    let file = options
        .open(path)
        .map_err(|error| bad_input!("{}: {error}; expected a file that can be written", path.display()))?;
    Ok((file, HashSet::new()))
}

/// Reads the answers of an earlier run; a line that was cut off is taken away.
fn resume(path: &Path) -> anyhow::Result<(File, HashSet<String>)> {
    let refuse = |error: std::io::Error| bad_input!("{}: {error}; expected a file that can be written", path.display());
    let mut file = OpenOptions::new().read(true).write(true).open(path).map_err(refuse)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(refuse)?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    let mut answered = HashSet::new();
    for (index, line) in bytes[..whole].split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty()) {
        let id = serde_json::from_slice::<Value>(line).ok().and_then(|answer| answer.get("id").cloned());
        let Some(id) = id else {
            return Err(bad_input!(
                "{}: line {}: not an answer of this program; expected a JSON object with an id; give another --output",
                path.display(),
                index + 1
            ));
        };
        answered.insert(id.to_string());
    }
    file.set_len(whole as u64).map_err(refuse)?;
    file.seek(SeekFrom::End(0)).map_err(refuse)?;
    Ok((file, answered))
}

/// Writes an answer with one call, so that a program that is killed leaves whole lines and at most one that is cut off.
fn write_answer(output: &mut File, asked: &Asked, summary: &Summary) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(&Answer {
        id: &asked.id,
        text: summary.text.as_deref(),
        tokens: &summary.tokens,
        depths: &summary.depths,
        finish_reason: summary.finish_reason.as_str(),
        mean_depth: summary.mean_depth,
        seed: asked.seed,
        usage: Usage {
            prompt_tokens: summary.prompt_tokens.len(),
            new_tokens: summary.tokens.len(),
            reused_tokens: summary.reused_tokens,
        },
    })?;
    line.push(b'\n');
    Ok(output.write_all(&line)?)
}

/// Devices and pipes have nothing to sync.
fn ignore_unsupported(error: std::io::Error) -> std::io::Result<()> {
    if error.raw_os_error() == Some(22) || error.kind() == std::io::ErrorKind::Unsupported {
        Ok(())
    } else {
        Err(error)
    }
}

fn progress_bar(total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos} of {len} {msg}");
    ProgressBar::new(total).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// What has been done, for people.
struct Tally {
    start: Instant,
    answers: usize,
    skipped: usize,
    bad: usize,
}

/// What has been done so far; what `--json` prints at the end.
#[derive(Debug, Serialize)]
struct Done {
    answered: usize,
    /// By an earlier run.
    answered_before: usize,
    refused: usize,
    interrupted: bool,
    seconds: f64,
    new_tokens: u64,
    tokens_per_s: f64,
    mean_depth: f64,
    /// Part of the slots' time that was spent on tokens.
    occupancy: f64,
}

impl Tally {
    fn done(&self, statistics: &[Statistics]) -> Done {
        let new_tokens: u64 = statistics.iter().map(|statistics| statistics.new_tokens).sum();
        let weighted = |statistics: &Statistics| statistics.mean_depth() * statistics.new_tokens as f64;
        let seconds = self.start.elapsed().as_secs_f64();
        Done {
            answered: self.answers,
            answered_before: self.skipped,
            refused: self.bad,
            interrupted: INTERRUPTED.load(Ordering::Relaxed),
            seconds,
            new_tokens,
            tokens_per_s: new_tokens as f64 / seconds.max(1e-9),
            mean_depth: statistics.iter().map(weighted).sum::<f64>() / new_tokens.max(1) as f64,
            occupancy: statistics.iter().map(Statistics::occupancy).sum::<f64>() / statistics.len() as f64,
        }
    }
}

impl Done {
    fn rates(&self) -> String {
        format!(
            "{:.0} tokens/s, mean depth {:.2}, occupancy {:.0} %",
            self.tokens_per_s,
            self.mean_depth,
            100.0 * self.occupancy
        )
    }

    fn line(&self) -> String {
        let mut line = format!("{} answered, {}", self.answered, self.rates());
        if self.answered_before > 0 {
            line.push_str(&format!(", {} answered before", self.answered_before));
        }
        if self.refused > 0 {
            line.push_str(&format!(", {} refused", self.refused));
        }
        line
    }
}
