//! [`Session`]: a loaded model that generates, evaluates and scores.

mod options;
mod profile;

use std::thread;
use std::time::Instant;

use mor_kernels::Gpu;
use mor_kernels::gpu::{AdapterSummary, GpuOptions};
use mor_kernels::ops::GpuSampling;
use mor_kernels::plan::Dispatch;
use mor_kernels::rows::NONE;
use mor_model::{Batching, Checkpoint, DepthControl, Mode, MorConfig, MorModel, Precision, Routing, ScriptedRouter};

use crate::engine::{Engine, EngineOptions, Statistics};
use crate::error::{Result, RuntimeError};
use crate::evaluator::{Capture, Captured, Evaluator};
use crate::event::{Event, SequenceHandle};
use crate::kv_cache::{PageClass, kv_bytes, page_classes, pages_for_all};
use crate::runner::Feed;
use crate::sampling::{GenerateRequest, SamplingParams};
use crate::scheduler::ROWS_BESIDE_DECODING;
use crate::text::Tokenizer;
use options::prepare;

pub use options::{BatchOptions, LoadProgress, ModelSource, SessionOptions};
pub use profile::StepProfile;

/// A full-sequence forward pass of several sequences.
#[non_exhaustive]
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

/// A loaded model on a device.
#[derive(Debug)]
pub struct Session {
    model: MorModel,
    tokenizer: Option<Tokenizer>,
    batch: BatchOptions,
    engine: Option<Engine>,
    /// Number of the next sequence of the next engine.
    next_id: u64,
    evaluator: Option<Evaluator>,
    load_ms: f64,
}

impl Session {
    /// Opens a device and loads a model onto it.
    ///
    /// # Errors
    /// [`RuntimeError::Model`] for a checkpoint that cannot be used, [`RuntimeError::Kernel`] without a usable
    /// device, [`RuntimeError::DoesNotFit`] if the device's memory is too small, and the tokenizer variants.
    pub fn load(source: ModelSource, options: SessionOptions) -> Result<Self> {
        Self::load_with(Gpu::open, source, options)
    }

    /// Loads a model onto a device that is open already, for example that of a program which renders
    /// ([`Gpu::from_wgpu`]). [`SessionOptions::gpu`] does not matter.
    ///
    /// # Errors
    /// As [`Session::load`].
    pub fn load_on(gpu: Gpu, source: ModelSource, options: SessionOptions) -> Result<Self> {
        Self::load_with(|_| Ok(gpu), source, options)
    }

    /// Loads a model onto the device that `open_gpu` gives.
    fn load_with(
        open_gpu: impl FnOnce(&GpuOptions) -> mor_kernels::Result<Gpu> + Send,
        source: ModelSource,
        mut options: SessionOptions,
    ) -> Result<Self> {
        let start = Instant::now();
        options.batch.validate()?;
        let (kv, depth, quantization) = (options.kv, options.depth, options.quantize);
        // A driver takes about as long to open a device as it takes to read and check all weights.
        let (gpu, checkpoint) = thread::scope(|scope| {
            let gpu = scope.spawn(|| {
                let gpu = open_gpu(&options.gpu);
                tracing::debug!(time = ?start.elapsed(), "opened the device");
                gpu
            });
            let checkpoint = prepare(source, kv, depth, quantization);
            tracing::debug!(time = ?start.elapsed(), "prepared weights");
            (gpu.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), checkpoint)
        });
        // What is wrong with the model is said first: it is the same on every machine.
        let (checkpoint, tokenizer) = checkpoint?;
        let gpu = gpu?;
        let precision = options.precision.unwrap_or(if gpu.caps().is_cpu { Precision::F32 } else { Precision::F16 });
        let total_bytes = checkpoint.device_bytes(precision, None);
        check_memory(&gpu, checkpoint.config(), total_bytes, (0, 0))?;
        let mut progress = |uploaded_bytes| {
            if let Some(on_load) = &mut options.on_load {
                on_load(LoadProgress { uploaded_bytes, total_bytes });
            }
        };
        let model = MorModel::load(&gpu, &checkpoint, precision, &mut progress)?.with_depth_control(options.depth)?;
        let model = if options.quantize_kv { model.with_packed_kv() } else { model };
        let load_ms = start.elapsed().as_secs_f64() * 1e3;
        let adapter = &gpu.summary().name;
        tracing::info!(adapter, precision = precision.as_str(), bytes = total_bytes, load_ms, "loaded the model");
        Ok(Self { tokenizer, load_ms, batch: options.batch, ..Self::from_model(model) })
    }

    /// Loads a checkpoint onto a device that is open already; without a tokenizer.
    ///
    /// # Errors
    /// [`RuntimeError::Kernel`] if the device refuses a buffer.
    pub fn on_gpu(gpu: Gpu, checkpoint: &Checkpoint, precision: Precision) -> Result<Self> {
        Ok(Self::from_model(MorModel::load(&gpu, checkpoint, precision, &mut |_| {})?))
    }

    /// A session of a model that is on a device already; without a tokenizer.
    pub fn from_model(model: MorModel) -> Self {
        let (tokenizer, engine, evaluator, batch) = (None, None, None, BatchOptions::default());
        Self { model, tokenizer, batch, engine, next_id: 0, evaluator, load_ms: 0.0 }
    }

    /// The session with other sizes of batches.
    ///
    /// # Errors
    /// [`RuntimeError::Parameter`] for sizes of nothing.
    pub fn with_batch(mut self, batch: BatchOptions) -> Result<Self> {
        batch.validate()?;
        self.forget_engine();
        self.batch = batch;
        Ok(self)
    }

    /// The session with other depths, as [`Session::set_depth_control`] makes it.
    ///
    /// # Errors
    /// [`RuntimeError::Model`] as [`DepthControl::validate`].
    pub fn with_depth_control(mut self, depth: DepthControl) -> Result<Self> {
        self.set_depth_control(depth)?;
        Ok(self)
    }

    /// Changes the depths of what is computed from now on; the weights stay where they are. Caches and kept beginnings are
    /// given up, for they hold what tokens computed at the depths they had, and so are sequences under way.
    ///
    /// # Errors
    /// [`RuntimeError::Model`] as [`DepthControl::validate`]; nothing is changed or given up then.
    pub fn set_depth_control(&mut self, depth: DepthControl) -> Result<()> {
        self.model.set_depth_control(depth)?;
        self.forget_engine();
        self.evaluator = None;
        Ok(())
    }

    /// The session with depths that are drawn from a script, for measurements.
    ///
    /// # Errors
    /// [`RuntimeError::Kernel`] as [`MorModel::with_scripted_router`].
    pub fn with_scripted_router(mut self, script: &ScriptedRouter) -> Result<Self> {
        self.forget_engine();
        self.evaluator = None;
        self.model = self.model.with_scripted_router(script)?;
        Ok(self)
    }

    /// Gives caches and plans up; sequences under way are lost.
    fn forget_engine(&mut self) {
        if let Some(engine) = self.engine.take() {
            self.next_id = engine.next_id();
        }
    }

    /// The model's configuration.
    pub fn config(&self) -> &MorConfig {
        self.model.config()
    }

    /// The model on the device, for those who drive a [`Runner`](crate::runner::Runner) themselves.
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

    /// Milliseconds that loading took, from opening files and device to the last upload.
    pub fn load_ms(&self) -> f64 {
        self.load_ms
    }

    /// Whether the engine that is there now runs all layers of a decode step in one dispatch; see [`BatchOptions::persistent`].
    pub fn is_persistent(&self) -> bool {
        self.engine.as_ref().is_some_and(Engine::is_persistent)
    }

    /// Has the next step of the engine that is there now end as if a workgroup had waited in vain, for tests.
    #[doc(hidden)]
    pub fn give_up_persistent(&self) {
        if let Some(engine) = &self.engine {
            engine.give_up_persistent(&self.model);
        }
    }

    /// The dispatches of a decode step or tick of `num_sequences` sequences at `context` positions.
    ///
    /// # Errors
    /// [`RuntimeError::Kernel`] if the device refuses the caches; as [`Session::submit`] while sequences run.
    ///
    /// # Panics
    /// For more than [`Session::max_sequences`].
    pub fn decode_dispatches(&mut self, num_sequences: usize, context: usize) -> Result<Vec<Dispatch>> {
        self.reserve(context)?;
        let runner = self.engine.as_mut().expect("reserved above").runner_mut();
        Ok(runner.decode_plan(&self.model, num_sequences, context)?.dispatches().collect())
    }

    /// Records the plans of all decode steps of up to [`Session::max_sequences`] sequences and `context` positions, so that
    /// nothing compiles while sequences run.
    ///
    /// # Errors
    /// As [`Session::decode_dispatches`].
    pub fn prepare_decode(&mut self, context: usize) -> Result<()> {
        self.reserve(context)?;
        let most = self.batch.max_sequences;
        let runner = self.engine.as_mut().expect("reserved above").runner_mut();
        let fewer = std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|n| *n < most);
        for num_slots in fewer.chain([most]) {
            runner.prepare(&self.model, 0, num_slots, 1..context)?;
        }
        self.model.gpu().wait_idle()?;
        Ok(())
    }

    /// How many sequences of `context` tokens can run at a time: their K/V entries and activations must fit what `others`
    /// bytes and the weights leave of the adapter's memory, and each buffer a binding. `None` if the backend does not tell
    /// how much memory there is.
    pub fn sequences_that_fit(&self, context: usize, others: u64) -> Option<usize> {
        let (model, gpu) = (&self.model, self.model.gpu());
        let taken = others + model.weights().num_bytes() + model.step_bytes_of_all();
        // A tenth is for the driver and other programs.
        let left = (gpu.summary().memory_bytes?.saturating_sub(taken)) / 10 * 9;
        let pages = pages_for_all(model, 1, context);
        let of_memory = left / (kv_bytes(model, &pages) + model.step_bytes_of_row().iter().sum::<u64>());
        let bytes = |(class, pages): (&PageClass, &usize)| class.buffer_page_bytes() * *pages as u64;
        let largest = page_classes(model).iter().zip(&pages).map(bytes).max();
        let of_binding = gpu.caps().max_storage_binding_bytes / largest.unwrap_or(1).max(1);
        Some(of_memory.min(of_binding) as usize)
    }

    /// Takes a sequence in. It runs while [`Session::step`] is called, beside others.
    ///
    /// ```no_run
    /// # use mor_runtime::{BatchOptions, Event, GenerateRequest, ModelSource, Session, SessionOptions};
    /// let batch = BatchOptions { max_sequences: 8, ..BatchOptions::default() };
    /// let options = SessionOptions { batch, ..SessionOptions::default() };
    /// let mut session = Session::load(ModelSource::Folder("path/to/model".into()), options)?;
    /// let prompts = [vec![1, 2, 3], vec![4, 5]];
    /// let handles: Vec<_> =
    ///     prompts.map(|prompt| session.submit(&GenerateRequest::new(prompt))).into_iter().collect::<Result<_, _>>()?;
    /// while session.step()? {
    ///     for handle in &handles {
    ///         while let Some(event) = handle.try_next() {
    ///             println!("{}: {event:?}", handle.id());
    ///         }
    ///     }
    /// }
    /// # Ok::<(), mor_runtime::RuntimeError>(())
    /// ```
    ///
    /// # Errors
    /// [`RuntimeError::Parameter`], [`RuntimeError::TokenOutOfRange`], [`RuntimeError::TooLong`],
    /// [`RuntimeError::EmptyPrompt`], [`RuntimeError::NeverFits`] for a request that cannot be served, [`RuntimeError::Busy`]
    /// for one that cannot be while others run;
    /// [`RuntimeError::Kernel`] if the device refuses the caches.
    pub fn submit(&mut self, request: &GenerateRequest) -> Result<SequenceHandle> {
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
        let limit = self.max_context();
        let too_long = |what, found, advice| Err(RuntimeError::TooLong { what, found, limit, advice });
        if prompt.len() > limit {
            return too_long("the prompt", prompt.len(), "shorten it");
        }
        let context = prompt.len().saturating_add(request.max_new_tokens);
        if context > limit {
            return too_long("the prompt with its new tokens", context, "lower --max-new-tokens or shorten the prompt");
        }
        let of_model = if request.ignore_eos { &[] } else { config.eos_token_ids() };
        let eos = [of_model, &request.stop_tokens].concat();
        let sampling = gpu_sampling(&request.sampling, context, &eos);
        self.reserve(context)?;
        let engine = self.engine.as_mut().expect("reserved above");
        Ok(engine.submit(request, prompt, sampling, eos, self.tokenizer.as_ref()))
    }

    /// Submits work ahead of its results and takes in what has come: events go to the handles. `false` if no sequence is
    /// left.
    ///
    /// # Errors
    /// [`RuntimeError::Kernel`] if the device fails; all sequences are lost then.
    pub fn step(&mut self) -> Result<bool> {
        let Some(engine) = &mut self.engine else { return Ok(false) };
        let result = engine.step(&self.model);
        if result.is_err() {
            // Nobody knows what the device has done; the handles see that nothing more comes.
            self.forget_engine();
        }
        result
    }

    /// Sequences that decode at a time.
    pub fn max_sequences(&self) -> usize {
        self.batch.max_sequences
    }

    /// What sequences have used and done since the caches were made, or since
    /// [`Session::reset_statistics`].
    pub fn statistics(&self) -> Statistics {
        self.engine.as_ref().map(Engine::statistics).unwrap_or_default()
    }

    /// Counts from zero again.
    pub fn reset_statistics(&mut self) {
        if let Some(engine) = &mut self.engine {
            engine.reset_statistics();
        }
    }

    /// Continues a prompt: [`Session::submit`] and [`Session::step`] in one. The iterator yields the sequence's events;
    /// other sequences of the session run on beside it.
    ///
    /// # Errors
    /// As [`Session::submit`].
    pub fn generate(&mut self, request: &GenerateRequest) -> Result<Generation<'_>> {
        let handle = self.submit(request)?;
        let engine = self.engine.as_mut().expect("a sequence was submitted");
        let prompt = request.prompt.len().max(1);
        let rows = (prompt - usize::from(request.max_new_tokens > 0)).min(engine.prefill_rows());
        // What the first token takes compiles before the clock starts; plans for longer contexts follow when they are needed.
        engine.runner_mut().prepare(&self.model, rows, 1, prompt..prompt + request.max_new_tokens.min(1))?;
        self.model.gpu().wait_idle()?;
        Ok(Generation { session: self, handle, finished: false })
    }

    /// Runs full sequences and returns everything they compute.
    ///
    /// # Errors
    /// [`RuntimeError::TokenOutOfRange`], [`RuntimeError::TooLong`]; [`RuntimeError::TopK`] for top-k routing of a
    /// sequence whose logits do not fit one buffer, or with a router bias; [`RuntimeError::Kernel`] if the device fails.
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
        if routing == Routing::TopK && self.model.depth_control().router_bias != 0.0 {
            return Err(RuntimeError::TopK { reason: "ranks its tokens, which a router bias does not change" });
        }
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

    /// Tokens of the longest sequence that this session takes.
    fn max_context(&self) -> usize {
        let limit = self.model.config().max_position_embeddings;
        self.batch.max_context.map_or(limit, |max_context| max_context.min(limit))
    }

    /// Makes sure that the engine has room for a sequence of `context` positions.
    fn reserve(&mut self, context: usize) -> Result<()> {
        if let Some(engine) = &self.engine {
            let never_fits = engine.never_fits(context);
            if engine.max_positions() >= context && never_fits.is_none() {
                return Ok(());
            }
            if engine.max_positions() >= context
                && let Some((needed, available)) = never_fits
            {
                return Err(RuntimeError::NeverFits { context, needed, available });
            }
            if !engine.is_idle() {
                return Err(RuntimeError::Busy { context, positions: engine.max_positions() });
            }
            self.forget_engine();
        }
        if self.batch.batching == Some(Batching::Depthwise) && self.model.batching() != Batching::Depthwise {
            let (name, found) = ("batching", "Depthwise".to_owned());
            let expected = "Lockstep for a model whose recursions do not share their weights";
            return Err(RuntimeError::Parameter { name, found, expected });
        }
        let (config, num_slots) = (self.model.config(), self.batch.max_sequences);
        let longest = self.max_context();
        let positions = if num_slots == 1 { context.next_power_of_two().min(longest) } else { longest };
        let gpu = self.model.gpu();
        let weights = self.model.weights().num_bytes();
        let one = kv_bytes(&self.model, &pages_for_all(&self.model, 1, positions));
        let all = one * num_slots as u64;
        let bytes = self.batch.kv_bytes.unwrap_or_else(|| {
            let left = gpu.summary().memory_bytes.map(|memory| memory.saturating_sub(weights) / 2);
            all.min(left.unwrap_or(all)).max(one)
        });
        check_memory(gpu, config, weights, (bytes.min(all), positions))?;
        let pages = pages_for_all(&self.model, num_slots, positions);
        // All classes alike: what their groups hold depends on the tokens.
        let share = (bytes as f64 / all as f64).min(1.0);
        let binding_bytes = gpu.caps().max_storage_binding_bytes;
        let most = |class: &PageClass| (binding_bytes / class.buffer_page_bytes()) as usize;
        let of_class =
            |(pages, class): (&usize, &PageClass)| ((*pages as f64 * share) as usize).min(most(class)).max(1);
        let pages: Vec<usize> = pages.iter().zip(&page_classes(&self.model)).map(of_class).collect();
        let engine = Engine::new(
            &self.model,
            EngineOptions {
                num_slots,
                max_positions: positions,
                pages_in_class: pages,
                prefill_rows: self.batch.prefill_rows,
                batching: self.batch.batching,
                share_prefixes: self.batch.share_prefixes,
                batch_invariant: self.batch.batch_invariant,
                persistent: self.batch.persistent,
                first_id: self.next_id,
            },
        )?;
        let never_fits = engine.never_fits(context);
        self.engine = Some(engine);
        match never_fits {
            Some((needed, available)) => Err(RuntimeError::NeverFits { context, needed, available }),
            None => Ok(()),
        }
    }
}

fn append(to: &mut Vec<Vec<f32>>, from: Vec<Vec<f32>>) {
    to.resize(from.len(), Vec::new());
    to.iter_mut().zip(from).for_each(|(to, from)| to.extend(from));
}

/// Refuses what does not fit the adapter; `kv` are the bytes of the caches for so many positions.
fn check_memory(gpu: &Gpu, config: &MorConfig, weights: u64, (kv, positions): (u64, usize)) -> Result<()> {
    let Some(available) = gpu.summary().memory_bytes else { return Ok(()) };
    // Streams, queries and MLP rows of a small prefill step, and one row of logits.
    let row = 6 * config.hidden_size + 2 * config.q_dim() + config.intermediate_size;
    let activations = 4 * (ROWS_BESIDE_DECODING * row + config.vocab_size) as u64;
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

fn gpu_sampling(sampling: &SamplingParams, limit: usize, eos_token_ids: &[u32]) -> GpuSampling {
    let mut eos = [NONE; 4];
    // More end tokens than the device watches are still seen by the host, some steps later.
    eos.iter_mut().zip(eos_token_ids).for_each(|(slot, token)| *slot = *token);
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

/// A running generation: an iterator of its events, the last of which is [`Event::Finished`]. Dropping it ends it.
#[derive(Debug)]
pub struct Generation<'s> {
    session: &'s mut Session,
    handle: SequenceHandle,
    finished: bool,
}

impl Iterator for Generation<'_> {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.finished {
            if let Some(event) = self.handle.try_next() {
                self.finished = matches!(event, Event::Finished(_));
                return Some(Ok(event));
            }
            if let Err(error) = self.session.step() {
                self.finished = true;
                return Some(Err(error));
            }
        }
        None
    }
}
