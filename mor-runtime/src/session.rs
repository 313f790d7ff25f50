//! [`Session`]: a loaded model that generates, evaluates and scores.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mor_kernels::Gpu;
use mor_kernels::gpu::{AdapterSummary, GpuOptions};
use mor_kernels::ops::GpuSampling;
use mor_kernels::rows::{NONE, ROW_ACTIVE, ROW_SAMPLE, Row};
use mor_kernels::submit::Submission;
use mor_kernels::timing;
use mor_model::{Checkpoint, Dtype, KvStrategy, Mode, MorConfig, MorModel, Precision, Quantization, Routing};

use crate::error::{Result, RuntimeError};
use crate::kv_cache::{kv_bytes, pages_for_all};
use crate::runner::{Capture, Captured, Evaluator, Feed, Outcome, Pending, Reply, Runner, RunnerOptions, Work};
use crate::sampling::{FinishReason, GenerateRequest};
use crate::text::{TextStream, Tokenizer};

/// Where a model comes from.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub enum ModelSource {
    /// A folder in Hugging Face layout: `config.json`, safetensors, and `tokenizer.json` if text is wanted.
    Folder(PathBuf),
    /// Files already in memory.
    Bytes {
        /// `config.json`.
        config_json: Cow<'static, str>,
        /// `model.safetensors`.
        weights: Cow<'static, [u8]>,
        /// `tokenizer.json`.
        tokenizer_json: Option<Cow<'static, [u8]>>,
        /// What to call them in messages.
        origin: String,
    },
    /// Random weights of a configuration, for benchmarks.
    Random {
        /// The configuration.
        config: MorConfig,
        /// Seed of the weights.
        seed: u64,
        /// Type of the weights.
        dtype: Dtype,
    },
}

/// Bytes uploaded so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes on the device.
    pub uploaded_bytes: u64,
    /// Bytes of all distinct tensors.
    pub total_bytes: u64,
}

/// How to load a model.
#[derive(Default)]
pub struct SessionOptions {
    /// Device and shader options.
    pub gpu: GpuOptions,
    /// How numbers are stored; `None` is f16 on GPUs and f32 on software adapters.
    pub precision: Option<Precision>,
    /// Replaces the configuration's K/V strategy.
    pub kv: Option<KvStrategy>,
    /// Quantises the matrices first.
    pub quantize: Option<Quantization>,
    /// Called while weights are uploaded.
    pub on_load: Option<Box<dyn FnMut(LoadProgress)>>,
}

/// What a generation tells while it runs.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The prompt has been read.
    Prompt {
        /// Recursions each of its tokens took.
        depths: Vec<u32>,
    },
    /// A new token.
    Token {
        /// Its id.
        token: u32,
        /// What it adds to the text; empty while a character or a possible stop text is incomplete, or without a
        /// tokenizer.
        text: String,
        /// Recursions it took; `None` for the last token, which is never fed.
        depth: Option<u32>,
    },
    /// The end.
    Finished(Summary),
}

/// A finished generation.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The prompt as fed.
    pub prompt_tokens: Vec<u32>,
    /// The new tokens; an end-of-text token that ended it is the last.
    pub tokens: Vec<u32>,
    /// Recursions of every token fed, prompt first: one less than prompt and new tokens together.
    pub depths: Vec<u32>,
    /// The new text, with a tokenizer.
    pub text: Option<String>,
    /// K/V entries per effective layer.
    pub kv_entries: Vec<usize>,
    /// Mean of `depths`.
    pub mean_depth: f64,
    /// Prompt tokens read a second.
    pub prefill_tokens_per_s: f64,
    /// New tokens a second after the first; 0 if there was none.
    pub decode_tokens_per_s: f64,
}

/// A full-sequence forward pass of several sequences.
#[derive(Clone, Debug, PartialEq)]
pub struct ForwardOutput {
    /// One entry a sequence.
    pub sequences: Vec<SequenceOutput>,
}

/// What a forward pass computes for one sequence of S tokens; row-major. Router values of tokens that were not
/// active at a recursion are undefined.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SequenceOutput {
    /// `[S, V]`.
    pub logits: Vec<f32>,
    /// `[S, C]`, after the final norm.
    pub hidden: Vec<f32>,
    /// `[S]`: recursions taken.
    pub depth: Vec<u32>,
    /// Per recursion `[S]`: computed at it.
    pub selected: Vec<Vec<bool>>,
    /// Expert choice: per recursion `[S]`; token choice: one `[S, R]`.
    pub router_logits: Vec<Vec<f32>>,
    /// As `router_logits`: the gates.
    pub router_weights: Vec<Vec<f32>>,
    /// Per recursion `[S]`, with an auxiliary router.
    pub aux_logits: Vec<Vec<f32>>,
    /// Per recursion `[S, C]`: the residual stream after it. Token choice: the final value of tokens that have ended,
    /// the running one of the others.
    pub block_out: Vec<Vec<f32>>,
}

/// The likelihood of a document.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// Negative log-likelihood in nats of tokens 1, 2, ...
    pub nll: Vec<f32>,
    /// Recursions of every token.
    pub depth: Vec<u32>,
}

/// Where the time of a decode step goes; see [`Session::profile_decode`].
#[derive(Clone, Debug, PartialEq)]
pub struct DecodeProfile {
    /// Device time of a step among others like it.
    pub device_micros: f64,
    /// Host time to record and submit a step.
    pub host_micros: f64,
    /// Kernel name and device time of every dispatch, each in a pass of its own; more than `device_micros` in all.
    pub dispatches: Vec<(&'static str, f64)>,
}

/// A loaded model on a device.
#[derive(Debug)]
pub struct Session {
    model: MorModel,
    tokenizer: Option<Tokenizer>,
    runner: Option<Runner>,
    evaluator: Option<Evaluator>,
    chunk: Chunk,
    load_ms: f64,
}

impl Session {
    /// Opens a device and loads a model onto it.
    ///
    /// # Errors
    /// [`RuntimeError::Model`] for a checkpoint that cannot be used, [`RuntimeError::Kernel`] without a usable
    /// device, [`RuntimeError::DoesNotFit`] if the device's memory is too small, and the tokenizer variants.
    pub fn load(source: ModelSource, mut options: SessionOptions) -> Result<Self> {
        let start = Instant::now();
        let (checkpoint, tokenizer) = open(source)?;
        let checkpoint = match options.kv {
            Some(kv) => checkpoint.with_kv(kv)?,
            None => checkpoint,
        };
        let checkpoint = match options.quantize {
            Some(quantization) => checkpoint.quantize(quantization)?,
            None => checkpoint,
        };
        let gpu = Gpu::open(&options.gpu)?;
        let precision = options.precision.unwrap_or(if gpu.caps().is_cpu { Precision::F32 } else { Precision::F16 });
        let total_bytes = checkpoint.device_bytes(precision, None);
        check_memory(&gpu, checkpoint.config(), total_bytes, (0, 0))?;
        let mut progress = |uploaded_bytes| {
            if let Some(on_load) = &mut options.on_load {
                on_load(LoadProgress { uploaded_bytes, total_bytes });
            }
        };
        let model = MorModel::load(&gpu, &checkpoint, precision, &mut progress)?;
        let load_ms = start.elapsed().as_secs_f64() * 1e3;
        Ok(Self { tokenizer, load_ms, ..Self::around(model) })
    }

    /// Loads a checkpoint onto a device that is open already; without a tokenizer.
    ///
    /// # Errors
    /// [`RuntimeError::Kernel`] if the device refuses a buffer.
    pub fn on_gpu(gpu: Gpu, checkpoint: &Checkpoint, precision: Precision) -> Result<Self> {
        Ok(Self::around(MorModel::load(&gpu, checkpoint, precision, &mut |_| {})?))
    }

    fn around(model: MorModel) -> Self {
        let chunk = Chunk::new(model.gpu());
        Self { model, tokenizer: None, runner: None, evaluator: None, chunk, load_ms: 0.0 }
    }

    /// The model's configuration.
    pub fn config(&self) -> &MorConfig {
        self.model.config()
    }

    /// The model on the device, for those who drive a [`Runner`] themselves.
    pub fn model(&self) -> &MorModel {
        &self.model
    }

    /// The tokenizer, where the model has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The adapter in use.
    pub fn device(&self) -> &AdapterSummary {
        self.model.gpu().summary()
    }

    /// How numbers are stored.
    pub fn precision(&self) -> Precision {
        self.model.precision()
    }

    /// Milliseconds that loading took, from opening the files to the last upload.
    pub fn load_ms(&self) -> f64 {
        self.load_ms
    }

    /// Dispatches of a decode step at `context` positions, those with an empty grid included.
    ///
    /// # Errors
    /// [`RuntimeError::Kernel`] if the device refuses the caches.
    pub fn decode_dispatches(&mut self, context: usize) -> Result<usize> {
        self.reserve(context)?;
        let runner = self.runner.as_mut().expect("reserved above");
        Ok(runner.decode_plan(&self.model, 1, context)?.num_dispatches())
    }

    /// Where the time of a decode step goes, at about half of `context` positions.
    ///
    /// # Errors
    /// [`RuntimeError::Kernel`] if the device writes no timestamps.
    pub fn profile_decode(&mut self, context: usize) -> Result<DecodeProfile> {
        const REPETITIONS: u32 = 32;
        self.reserve(context.max(2 * REPETITIONS as usize + 8))?;
        let runner = self.runner.as_mut().expect("reserved above");
        let gpu = self.model.gpu();
        let row = Row { token: 1, position: context as u32 / 2, sequence: 0, flags: ROW_ACTIVE | ROW_SAMPLE };
        let plan = &*runner.decode_plan(&self.model, 1, context)?;
        // Once to warm up: a clock that has fallen takes long to rise.
        let mut device_micros = f64::INFINITY;
        for _ in 0..4 {
            runner.set_next_row(&self.model, row);
            device_micros = device_micros.min(timing::device_micros(gpu, plan, REPETITIONS)?);
        }
        runner.set_next_row(&self.model, row);
        let start = Instant::now();
        for _ in 0..REPETITIONS {
            let mut submission = Submission::new(gpu);
            submission.plan(plan);
            submission.submit();
        }
        let host_micros = start.elapsed().as_secs_f64() * 1e6 / f64::from(REPETITIONS);
        gpu.wait_idle()?;
        runner.set_next_row(&self.model, row);
        let dispatches = timing::profile(gpu, plan, 10)?;
        runner.stop(&self.model, 0);
        Ok(DecodeProfile { device_micros, host_micros, dispatches })
    }

    /// Continues a prompt. The prompt has been read when this returns; the iterator yields the events.
    ///
    /// # Errors
    /// [`RuntimeError::Parameter`], [`RuntimeError::TokenOutOfRange`], [`RuntimeError::TooLong`],
    /// [`RuntimeError::EmptyPrompt`] for a request that cannot be served; [`RuntimeError::Kernel`] if the device
    /// fails.
    pub fn generate(&mut self, request: &GenerateRequest) -> Result<Generation<'_>> {
        let config = self.model.config();
        request.sampling.validate()?;
        if !request.stop.is_empty() && self.tokenizer.is_none() {
            return Err(RuntimeError::NoTokenizer);
        }
        if request.stop.iter().any(String::is_empty) {
            let (name, expected) = ("stop", "a text of at least one character");
            return Err(RuntimeError::Parameter { name, found: "an empty text".to_owned(), expected });
        }
        let prompt = match (&request.prompt[..], config.eos_token_ids()) {
            ([], [eos, ..]) => vec![*eos],
            ([], []) => return Err(RuntimeError::EmptyPrompt),
            (prompt, _) => prompt.to_vec(),
        };
        check_tokens("prompt", &prompt, config.vocab_size)?;
        let limit = config.max_position_embeddings;
        let too_long = |what, found, advice| Err(RuntimeError::TooLong { what, found, limit, advice });
        if prompt.len() > limit {
            return too_long("the prompt", prompt.len(), "shorten it");
        }
        let context = prompt.len() + request.max_new_tokens;
        if context > limit {
            return too_long("the prompt with its new tokens", context, "lower --max-new-tokens or shorten the prompt");
        }

        let sampling = gpu_sampling(request, context, config.eos_token_ids());
        self.reserve(context)?;
        let runner = self.runner.as_mut().expect("reserved above");
        let config = self.model.config();
        runner.start(&self.model, 0, &sampling, prompt.iter().copied(), None);
        runner.prepare(&self.model, 1, context)?;
        self.model.gpu().wait_idle()?;

        let start = Instant::now();
        let (depths, first) = prefill(&self.model, runner, &mut self.chunk, &prompt, request.max_new_tokens > 0)?;
        let prefill_time = start.elapsed();
        let text = self.tokenizer.as_ref().map(|tokenizer| TextStream::new(tokenizer, &request.stop));
        let mut generation = Generation {
            model: &self.model,
            runner,
            events: VecDeque::from([Event::Prompt { depths: depths.clone() }]),
            in_flight: VecDeque::new(),
            context,
            max_new_tokens: request.max_new_tokens,
            eos: if request.ignore_eos { Vec::new() } else { config.eos_token_ids().to_vec() },
            has_text: text.is_some(),
            text,
            full_text: String::new(),
            held: None,
            prompt,
            tokens: Vec::new(),
            depths,
            prefill_time,
            decode_start: Instant::now(),
            finished: false,
        };
        match first {
            Some(outcome) => generation.take_token(outcome.next_token)?,
            None => generation.finish(FinishReason::Length)?,
        }
        Ok(generation)
    }

    /// Runs full sequences and returns everything they compute.
    ///
    /// # Errors
    /// [`RuntimeError::TokenOutOfRange`], [`RuntimeError::TooLong`]; [`RuntimeError::TopK`] for top-k routing of a
    /// sequence whose logits do not fit one buffer; [`RuntimeError::Kernel`] if the device fails.
    pub fn forward(&mut self, sequences: &[Vec<u32>], routing: Routing) -> Result<ForwardOutput> {
        let config = self.model.config().clone();
        let mut outputs: Vec<_> = sequences.iter().map(|_| SequenceOutput::default()).collect();
        let widths = (config.is_routed(), config.num_recursions);
        for output in &mut outputs {
            let recursions = if widths.0 { widths.1 } else { 0 };
            output.selected = vec![Vec::new(); recursions];
            output.block_out = vec![Vec::new(); recursions];
        }
        self.evaluate(sequences, routing, Capture::All, &mut |sequence, captured| {
            let output = &mut outputs[sequence];
            append(&mut output.router_logits, captured.router_logits);
            append(&mut output.router_weights, captured.router_weights);
            append(&mut output.aux_logits, captured.aux_logits);
            output.logits.extend(captured.logits);
            output.hidden.extend(captured.hidden);
            for (r, (hidden, running)) in captured.streams.into_iter().enumerate() {
                output.selected[r].extend(captured.depth.iter().map(|depth| *depth > r as u32));
                for (row, depth) in captured.depth.iter().enumerate() {
                    let goes_on = config.mode == Mode::Token && *depth > r as u32 + 1;
                    let stream = if goes_on { &running } else { &hidden };
                    let width = config.hidden_size;
                    output.block_out[r].extend_from_slice(&stream[row * width..(row + 1) * width]);
                }
            }
            output.depth.extend(captured.depth);
        })?;
        Ok(ForwardOutput { sequences: outputs })
    }

    /// Scores a document: the likelihood of each token after the first, given those before it.
    ///
    /// # Errors
    /// As [`Session::forward`].
    pub fn score(&mut self, document: &[u32], routing: Routing) -> Result<Score> {
        let mut score = Score { nll: Vec::new(), depth: Vec::new() };
        self.evaluate(std::slice::from_ref(&document.to_vec()), routing, Capture::Nll, &mut |_, captured| {
            score.nll.extend(captured.nll);
            score.depth.extend(captured.depth);
        })?;
        // The last token has no successor to predict.
        score.nll.pop();
        Ok(score)
    }

    /// Runs all rows of `sequences` through an evaluator, in steps of as many rows as fit, and hands over what was
    /// captured, in order.
    fn evaluate(
        &mut self,
        sequences: &[Vec<u32>],
        routing: Routing,
        capture: Capture,
        take: &mut dyn FnMut(usize, Captured),
    ) -> Result<()> {
        let config = self.model.config();
        let limit = config.max_position_embeddings;
        for (index, sequence) in sequences.iter().enumerate() {
            check_tokens(&format!("sequence {index}"), sequence, config.vocab_size)?;
            if sequence.len() > limit {
                let (what, found, advice) = ("a sequence", sequence.len(), "shorten it");
                return Err(RuntimeError::TooLong { what, found, limit, advice });
            }
        }
        let longest = sequences.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let total: usize = sequences.iter().map(Vec::len).sum();
        let caps = self.model.gpu().caps();
        let binding_rows = caps.max_storage_binding_bytes / (4 * self.model.logits_stride() as u64);
        let routing = if config.mode == Mode::Expert { routing } else { Routing::Causal };
        // Top-k routing ranks whole sequences, so one goes through at a time and in one step.
        let (capacity, num_sequences) = match routing {
            Routing::Causal => (total.min(512), sequences.len()),
            Routing::TopK => (longest, 1),
        };
        let capacity = capacity.min(binding_rows as usize).max(1);
        if routing == Routing::TopK && capacity < longest {
            return Err(RuntimeError::TopK { reason: "the logits of this one do not fit one buffer of the device" });
        }
        let key = (routing, capture);
        let fits = |e: &&Evaluator| e.key == key && e.fits(num_sequences, longest, capacity);
        if self.evaluator.as_ref().filter(fits).is_none() {
            self.evaluator = None;
            // Room for longer ones, so that documents of growing length do not rebuild it each time.
            let positions = longest.next_power_of_two().clamp(64, limit.max(64));
            let capacity = capacity.next_power_of_two().min(binding_rows as usize);
            self.evaluator = Some(Evaluator::new(&self.model, num_sequences, positions, capacity, key)?);
        }
        let evaluator = self.evaluator.as_ref().expect("made above");
        evaluator.clear(&self.model);
        let mut run = |feeds: &[Feed<'_>], names: &[usize]| -> Result<()> {
            let label = |feed: &Feed<'_>, name: usize| {
                let next = feed.position + 1;
                let sequence = &sequences[name];
                (next..next + feed.tokens.len()).map(move |at| sequence.get(at).copied().unwrap_or(NONE))
            };
            let labels: Vec<u32> = feeds.iter().zip(names).flat_map(|(feed, name)| label(feed, *name)).collect();
            for (captured, name) in evaluator.run(&self.model, feeds, &labels)?.into_iter().zip(names) {
                take(*name, captured);
            }
            Ok(())
        };
        let (mut feeds, mut names, mut room) = (Vec::new(), Vec::new(), capacity);
        for (name, tokens) in sequences.iter().enumerate() {
            let sequence = if routing == Routing::TopK { 0 } else { name };
            let mut position = 0;
            while position < tokens.len() {
                let end = tokens.len().min(position + room);
                feeds.push(Feed { sequence, position, tokens: &tokens[position..end], sample: false });
                names.push(name);
                room -= end - position;
                position = end;
                if room == 0 || routing == Routing::TopK {
                    run(&feeds, &names)?;
                    (feeds, names, room) = (Vec::new(), Vec::new(), capacity);
                }
            }
            if routing == Routing::TopK {
                evaluator.clear(&self.model);
            }
        }
        if feeds.is_empty() { Ok(()) } else { run(&feeds, &names) }
    }

    /// Makes sure that the runner has room for `context` positions.
    fn reserve(&mut self, context: usize) -> Result<()> {
        if self.runner.as_ref().is_none_or(|runner| runner.max_positions() < context) {
            self.runner = None;
            let config = self.model.config();
            let positions = context.next_power_of_two().min(config.max_position_embeddings).max(context);
            let weights = self.model.weights().num_bytes();
            let kv = kv_bytes(&self.model, &pages_for_all(&self.model, 1, positions));
            check_memory(self.model.gpu(), config, weights, (kv, positions))?;
            let options = RunnerOptions {
                num_slots: 1,
                max_positions: positions,
                prefill_rows: self.chunk.most,
                batching: None,
                pages_in_class: None,
            };
            self.runner = Some(Runner::new(&self.model, &options)?);
        }
        Ok(())
    }
}

fn append(to: &mut Vec<Vec<f32>>, from: Vec<Vec<f32>>) {
    to.resize(from.len(), Vec::new());
    to.iter_mut().zip(from).for_each(|(to, from)| to.extend(from));
}

fn open(source: ModelSource) -> Result<(Checkpoint, Option<Tokenizer>)> {
    match source {
        ModelSource::Folder(folder) => {
            let checkpoint = Checkpoint::open(&folder)?;
            let path = folder.join("tokenizer.json");
            let vocab_size = checkpoint.config().vocab_size;
            let tokenizer = path.exists().then(|| Tokenizer::from_file(&path, vocab_size)).transpose()?;
            Ok((checkpoint, tokenizer))
        }
        ModelSource::Bytes { config_json, weights, tokenizer_json, origin } => {
            let checkpoint = Checkpoint::from_bytes(&config_json, weights, &origin)?;
            let vocab_size = checkpoint.config().vocab_size;
            let tokenizer =
                tokenizer_json.map(|bytes| Tokenizer::from_bytes(&bytes, &origin, vocab_size)).transpose()?;
            Ok((checkpoint, tokenizer))
        }
        ModelSource::Random { config, seed, dtype } => Ok((Checkpoint::random(config, seed, dtype), None)),
    }
}

/// Refuses what does not fit the adapter; `kv` are the bytes of the caches for so many positions.
fn check_memory(gpu: &Gpu, config: &MorConfig, weights: u64, (kv, positions): (u64, usize)) -> Result<()> {
    let Some(available) = gpu.summary().memory_bytes else { return Ok(()) };
    // Streams, queries and MLP rows of a full prefill chunk, and one row of logits.
    let row = 6 * config.hidden_size + 2 * config.q_dim() + config.intermediate_size;
    let activations = 4 * (512 * row + config.vocab_size) as u64;
    let needed = weights + kv + activations;
    if needed <= available {
        return Ok(());
    }
    let adapter = gpu.summary().name.clone();
    Err(RuntimeError::DoesNotFit { adapter, needed, available, weights, kv, positions, activations })
}

fn check_tokens(what: &str, tokens: &[u32], vocab_size: usize) -> Result<()> {
    match tokens.iter().position(|token| *token as usize >= vocab_size) {
        None => Ok(()),
        Some(index) => Err(RuntimeError::TokenOutOfRange {
            at: format!("{what}[{index}]"),
            token: tokens[index].into(),
            vocab_size,
            last: vocab_size - 1,
        }),
    }
}

fn gpu_sampling(request: &GenerateRequest, limit: usize, eos_token_ids: &[u32]) -> GpuSampling {
    let sampling = &request.sampling;
    let mut eos = [NONE; 4];
    // More end tokens than the device watches are still seen by the host, some steps later.
    let watched = if request.ignore_eos { &[] } else { eos_token_ids };
    eos.iter_mut().zip(watched).for_each(|(slot, token)| *slot = *token);
    GpuSampling {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        seed_low: sampling.seed as u32,
        seed_high: (sampling.seed >> 32) as u32,
        limit: limit as u32,
        eos,
    }
}

/// Rows of a prefill step, adapted so that a submit stays far below any watchdog.
#[derive(Debug)]
struct Chunk {
    rows: usize,
    most: usize,
}

impl Chunk {
    const LEAST: usize = 16;
    /// A submit should take less than this.
    const BUDGET: Duration = Duration::from_millis(100);

    fn new(gpu: &Gpu) -> Self {
        let asked = std::env::var("MOR_PREFILL_CHUNK").ok().and_then(|text| text.parse::<usize>().ok());
        let most = asked.unwrap_or(512).clamp(Self::LEAST, 4096);
        // A software rasteriser has no watchdog; other adapters start small until measured.
        let rows = if gpu.caps().is_cpu { most } else { most.min(128) };
        Self { rows, most }
    }

    fn adapt(&mut self, gpu: &Gpu, rows: usize, time: Duration) {
        if gpu.caps().is_cpu || rows < self.rows {
            return;
        }
        if time > Self::BUDGET {
            self.rows = (self.rows / 2).max(Self::LEAST);
        } else if time * 4 < Self::BUDGET {
            self.rows = (self.rows * 2).min(self.most);
        }
    }
}

/// Feeds a prompt to slot 0 in chunks; returns the depths of its tokens and what was drawn after the last.
fn prefill(
    model: &MorModel,
    runner: &mut Runner,
    chunk: &mut Chunk,
    prompt: &[u32],
    sample: bool,
) -> Result<(Vec<u32>, Option<Outcome>)> {
    let mut depths = Vec::with_capacity(prompt.len());
    let mut first = None;
    while depths.len() < prompt.len() {
        let start = Instant::now();
        let position = depths.len();
        let end = prompt.len().min(position + chunk.rows);
        let sample = sample && end == prompt.len();
        let feeds = [Feed { sequence: 0, position, tokens: &prompt[position..end], sample }];
        let reply = runner.submit(model, &Work { feeds: &feeds, ..Work::default() })?.wait()?;
        first = reply.drawn(0, prompt.len() - 1).next();
        depths.extend(reply.depths);
        chunk.adapt(model.gpu(), end - position, start.elapsed());
    }
    Ok((depths, first))
}

/// A running generation: an iterator of its events, the last of which is [`Event::Finished`].
///
/// Decode steps are submitted ahead of the tokens that have arrived: a step's token feeds the next one on the device,
/// and the host learns it some steps later. Dropping the generation ends it.
#[derive(Debug)]
pub struct Generation<'s> {
    model: &'s MorModel,
    runner: &'s mut Runner,
    events: VecDeque<Event>,
    in_flight: VecDeque<Pending>,
    /// Tokens at which the sequence ends.
    context: usize,
    max_new_tokens: usize,
    eos: Vec<u32>,
    text: Option<TextStream<'s>>,
    has_text: bool,
    full_text: String,
    /// The last token and its text, until its depth is known.
    held: Option<(u32, String)>,
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    depths: Vec<u32>,
    prefill_time: Duration,
    decode_start: Instant,
    finished: bool,
}

impl Generation<'_> {
    /// Submits ahead of the host's knowledge, so that the device never waits for it.
    const SUBMITS_IN_FLIGHT: usize = 4;
    /// Decode steps of one submit once the first tokens are out; fewer submits cost the host less.
    const STEPS_PER_SUBMIT: usize = 2;

    fn step(&mut self) -> Result<()> {
        while self.in_flight.len() < Self::SUBMITS_IN_FLIGHT {
            let work = Work { ticks: Self::STEPS_PER_SUBMIT, max_context: self.context, ..Work::default() };
            self.in_flight.push_back(self.runner.submit(self.model, &work)?);
        }
        let reply: Reply = self.in_flight.pop_front().expect("submitted above").wait()?;
        for outcome in reply.drawn(0, self.depths.len()) {
            if self.finished {
                break;
            }
            self.depths.push(outcome.depth);
            if let Some((token, text)) = self.held.take() {
                self.events.push_back(Event::Token { token, text, depth: Some(outcome.depth) });
            }
            self.take_token(outcome.next_token)?;
        }
        Ok(())
    }

    /// Takes a drawn token in and decides whether it is the last.
    fn take_token(&mut self, token: u32) -> Result<()> {
        self.tokens.push(token);
        let is_eos = self.eos.contains(&token);
        let (mut text, mut stopped) = (String::new(), false);
        if let Some(stream) = &mut self.text
            && !is_eos
        {
            let piece = stream.push(token);
            (text, stopped) = (piece.text, piece.stopped);
        }
        let finish_reason = match () {
            () if is_eos => Some(FinishReason::Eos),
            () if stopped => Some(FinishReason::Stop),
            () if self.tokens.len() == self.max_new_tokens => Some(FinishReason::Length),
            () => None,
        };
        if finish_reason.is_some()
            && !stopped
            && let Some(stream) = self.text.take()
        {
            text.push_str(&stream.finish());
        }
        self.full_text.push_str(&text);
        self.held = Some((token, text));
        finish_reason.map_or(Ok(()), |reason| self.finish(reason))
    }

    fn finish(&mut self, finish_reason: FinishReason) -> Result<()> {
        let decode_time = self.decode_start.elapsed();
        self.finished = true;
        self.runner.stop(self.model, 0);
        if let Some((token, text)) = self.held.take() {
            self.events.push_back(Event::Token { token, text, depth: None });
        }
        let per_s = |count: usize, time: Duration| count as f64 / time.as_secs_f64().max(1e-9);
        let total: f64 = self.depths.iter().map(|depth| f64::from(*depth)).sum();
        self.events.push_back(Event::Finished(Summary {
            finish_reason,
            kv_entries: self.model.kv_layout().entries_per_layer(&self.depths),
            mean_depth: total / self.depths.len().max(1) as f64,
            prefill_tokens_per_s: per_s(self.prompt.len(), self.prefill_time),
            decode_tokens_per_s: per_s(self.tokens.len().saturating_sub(1), decode_time),
            text: self.has_text.then(|| std::mem::take(&mut self.full_text)),
            prompt_tokens: std::mem::take(&mut self.prompt),
            tokens: std::mem::take(&mut self.tokens),
            depths: std::mem::take(&mut self.depths),
        }));
        Ok(())
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(Ok(event));
            }
            if self.finished {
                return None;
            }
            if let Err(error) = self.step() {
                self.finished = true;
                return Some(Err(error));
            }
        }
    }
}

impl Drop for Generation<'_> {
    fn drop(&mut self) {
        // Steps in flight end with the sequence; the next start resets what they leave.
        self.runner.stop(self.model, 0);
    }
}
