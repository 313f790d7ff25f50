//! [`Runner`]: feeds rows to a model and reads what comes back. The only place that submits work.

use std::collections::BTreeMap;
use std::sync::Arc;

use mor_kernels::Result;
use mor_kernels::ops::{
    AttentionDecode, CrossEntropy, CrossEntropyBindings, CrossEntropyParams, GpuSampling, TopkSequence,
};
use mor_kernels::plan::{Plan, PlanBuilder};
use mor_kernels::rows::{NONE, ROW_ACTIVE, ROW_INDEX_UNIT, ROW_SAMPLE, Row};
use mor_kernels::submit::{Readback, Submission};
use mor_kernels::tensor::{DType, Tensor};
use mor_model::{LogitRows, Mode, MorModel, Phase, Routing, SampleTensors, StepTensors};

use crate::kv_pool::KvPool;

/// Tokens of one sequence to feed in a step.
#[derive(Clone, Copy, Debug)]
pub struct Feed<'a> {
    /// Index of the sequence.
    pub sequence: usize,
    /// Position of the first token.
    pub position: usize,
    /// The tokens, at least one.
    pub tokens: &'a [u32],
    /// Whether to draw the token after the last one.
    pub sample: bool,
}

/// What the device recorded at a position: the depth of the token fed there and the token drawn after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Token drawn from this position's logits; meaningless where none was drawn.
    pub next_token: u32,
    /// Recursions the token at this position took.
    pub depth: u32,
}

/// [`Outcome`]s of consecutive positions on their way to the host.
#[derive(Debug)]
pub struct Outcomes(Readback);

impl Outcomes {
    /// Whether [`Outcomes::wait`] would return at once.
    ///
    /// # Errors
    /// [`KernelError::Device`](mor_kernels::KernelError::Device).
    pub fn is_ready(&self) -> Result<bool> {
        self.0.is_ready()
    }

    /// Waits for them.
    ///
    /// # Errors
    /// [`KernelError::Device`](mor_kernels::KernelError::Device).
    pub fn wait(self) -> Result<Vec<Outcome>> {
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&self.0.wait()?);
        Ok(words.chunks_exact(2).map(|pair| Outcome { next_token: pair[0], depth: pair[1] }).collect())
    }
}

#[derive(Debug)]
struct Step {
    tensors: StepTensors,
    plan: Arc<Plan>,
}

/// Runs steps of a model over a fixed number of sequences.
#[derive(Debug)]
pub struct Runner {
    kv: KvPool,
    sample: SampleTensors,
    /// By number of key splits.
    decode: BTreeMap<u32, Step>,
    prefill: Option<Step>,
    prefill_capacity: usize,
    key_splits: Option<u32>,
}

impl Runner {
    /// Allocates caches for `num_sequences` sequences of up to `max_positions` tokens, fed at most
    /// `prefill_capacity` rows at a time.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`](mor_kernels::KernelError::OutOfMemory).
    pub fn new(model: &MorModel, num_sequences: usize, max_positions: usize, prefill_capacity: usize) -> Result<Self> {
        let gpu = model.gpu();
        let kv = KvPool::new(model, num_sequences, max_positions)?;
        let max_positions = kv.tensors.max_positions;
        let seen_words = model.config().vocab_size.div_ceil(32);
        let words = |label, shape: &[usize]| Tensor::zeros(gpu, label, DType::U32, shape);
        let sample = SampleTensors {
            sampling: words("sampling", &[num_sequences, size_of::<GpuSampling>() / 4])?,
            seen: words("seen", &[num_sequences, seen_words])?,
            next_rows: Tensor::from_slice(
                gpu,
                "next_rows",
                DType::U32,
                &[num_sequences, 4],
                &vec![Row::ABSENT; num_sequences],
            )?,
            results: words("results", &[num_sequences, max_positions, 2])?,
        };
        Ok(Self { kv, sample, decode: BTreeMap::new(), prefill: None, prefill_capacity, key_splits: None })
    }

    /// Longest sequence.
    pub fn max_positions(&self) -> usize {
        self.kv.tensors.max_positions
    }

    /// Most rows of a [`Runner::feed`].
    pub fn prefill_capacity(&self) -> usize {
        self.prefill_capacity
    }

    /// Splits the keys of every decode step into this many parts (a power of two up to [`AttentionDecode::MAX_SPLITS`]) whatever the context's
    /// length; `None` lets the length decide. The result does not depend on it: for tests and measurements.
    pub fn set_key_splits(&mut self, key_splits: Option<u32>) {
        self.key_splits = key_splits.map(|splits| splits.next_power_of_two().clamp(1, AttentionDecode::MAX_SPLITS));
    }

    /// Parts the keys of a decode step are split into.
    fn num_splits(&self, model: &MorModel, max_context: usize) -> u32 {
        let suggested = || {
            let num_rows = self.kv.num_sequences as u32;
            AttentionDecode::suggest_splits(&model.attention_shape(), num_rows, max_context as u32, model.gpu().caps())
        };
        self.key_splits.unwrap_or_else(suggested)
    }

    /// Forgets a sequence and sets how its tokens are drawn; `seen` are the tokens that count as occurred.
    pub fn start(&self, model: &MorModel, sequence: usize, sampling: &GpuSampling, seen: &[u32]) {
        let gpu = model.gpu();
        self.kv.clear(gpu, sequence);
        let bytes = bytemuck::bytes_of(sampling);
        gpu.write(&self.sample.sampling, (sequence * bytes.len()) as u64, bytes);
        let mut bits = vec![0_u32; self.sample.seen.shape()[1]];
        for token in seen {
            bits[*token as usize / 32] |= 1 << (token % 32);
        }
        let bytes: &[u8] = bytemuck::cast_slice(&bits);
        gpu.write(&self.sample.seen, (sequence * bytes.len()) as u64, bytes);
        self.stop(model, sequence);
    }

    /// Puts a row in place of the one the last step drew.
    pub(crate) fn set_next_row(&self, model: &MorModel, row: Row) {
        let offset = row.sequence as usize * size_of::<Row>();
        model.gpu().write(&self.sample.next_rows, offset as u64, bytemuck::bytes_of(&row));
    }

    /// Takes a sequence out of the decode steps submitted from now on.
    pub fn stop(&self, model: &MorModel, sequence: usize) {
        let offset = sequence * size_of::<Row>();
        model.gpu().write(&self.sample.next_rows, offset as u64, bytemuck::bytes_of(&Row::ABSENT));
    }

    /// Submits one step over the rows of `feeds` (sequences ascending, one feed each) and returns at once.
    ///
    /// # Errors
    /// As [`PlanBuilder::dispatch`] the first time.
    ///
    /// # Panics
    /// If there are more rows than [`Runner::prefill_capacity`].
    pub fn feed(&mut self, model: &MorModel, feeds: &[Feed<'_>]) -> Result<()> {
        self.prepare_prefill(model)?;
        let step = self.prefill.as_ref().expect("recorded above");
        write_rows(model, &step.tensors, feeds);
        submit(model, &step.plan);
        Ok(())
    }

    /// Submits one decode step: every sequence with a drawn token feeds it and draws the next. `max_context` bounds
    /// the sequences' lengths.
    ///
    /// # Errors
    /// As [`PlanBuilder::dispatch`] the first time.
    pub fn decode(&mut self, model: &MorModel, max_context: usize) -> Result<()> {
        let num_splits = self.prepare_decode(model, max_context)?;
        submit(model, &self.decode[&num_splits].plan);
        Ok(())
    }

    /// Submits `num_steps` decode steps together with the read of a sequence's outcomes at `positions`.
    ///
    /// # Errors
    /// As [`Runner::decode`].
    pub fn decode_and_read(
        &mut self,
        model: &MorModel,
        num_steps: usize,
        sequence: usize,
        positions: std::ops::Range<usize>,
    ) -> Result<Outcomes> {
        let num_splits = self.prepare_decode(model, positions.end)?;
        let mut submission = Submission::new(model.gpu());
        for _ in 0..num_steps {
            submission.plan(&self.decode[&num_splits].plan);
        }
        let outcomes = self.read_outcomes(&mut submission, sequence, positions)?;
        submission.submit();
        Ok(outcomes)
    }

    /// Submits a read of a sequence's outcomes at `positions`.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`](mor_kernels::KernelError::OutOfMemory).
    pub fn outcomes(&self, model: &MorModel, sequence: usize, positions: std::ops::Range<usize>) -> Result<Outcomes> {
        let mut submission = Submission::new(model.gpu());
        let outcomes = self.read_outcomes(&mut submission, sequence, positions)?;
        submission.submit();
        Ok(outcomes)
    }

    fn read_outcomes(
        &self,
        submission: &mut Submission<'_>,
        sequence: usize,
        positions: std::ops::Range<usize>,
    ) -> Result<Outcomes> {
        let first = sequence * self.max_positions() + positions.start;
        Ok(Outcomes(submission.read(&self.sample.results, 8 * first as u64, 8 * positions.len() as u64)?))
    }

    /// K/V entries a sequence holds, per effective layer, as the device counted them; waits.
    ///
    /// # Errors
    /// [`KernelError::Device`](mor_kernels::KernelError::Device).
    pub fn kv_entries(&self, model: &MorModel, sequence: usize) -> Result<Vec<usize>> {
        self.kv.entries(model, sequence)
    }

    /// Logits of the rows sampled by the last step, in sequence order, `[n, V]`; waits.
    ///
    /// # Errors
    /// [`KernelError::Device`](mor_kernels::KernelError::Device).
    pub fn logits(&self, model: &MorModel, last_was_decode: bool, max_context: usize) -> Result<Vec<Vec<f32>>> {
        let step = if last_was_decode {
            &self.decode[&self.num_splits(model, max_context)]
        } else {
            self.prefill.as_ref().expect("a step was fed")
        };
        let count = model.gpu().read::<u32>(&step.tensors.sampled.dispatch)?[0] as usize;
        let logits: Vec<f32> = model.gpu().read(&step.tensors.logits)?;
        let rows = logits.chunks(model.logits_stride()).take(count);
        Ok(rows.map(|row| row[..model.config().vocab_size].to_vec()).collect())
    }

    /// Rows each recursion's block has processed in decode and prefill steps since the runner was made; waits.
    ///
    /// # Errors
    /// [`KernelError::Device`](mor_kernels::KernelError::Device).
    pub fn rows_processed(&self, model: &MorModel) -> Result<Vec<u64>> {
        let mut rows = vec![0; model.config().num_recursions];
        for step in self.decode.values().chain(&self.prefill) {
            for (rows, set) in rows.iter_mut().zip(&step.tensors.recursions) {
                *rows += u64::from(model.gpu().read::<u32>(&set.dispatch)?[1]);
            }
        }
        Ok(rows)
    }

    /// The plan of a decode step at up to `max_context` positions.
    ///
    /// # Errors
    /// As [`Runner::decode`].
    pub fn decode_plan(&mut self, model: &MorModel, max_context: usize) -> Result<Arc<Plan>> {
        let num_splits = self.prepare_decode(model, max_context)?;
        Ok(Arc::clone(&self.decode[&num_splits].plan))
    }

    /// Records the plans of prefill and of decode up to `max_context` positions, so that no later call compiles.
    ///
    /// # Errors
    /// As [`PlanBuilder::dispatch`].
    pub fn prepare(&mut self, model: &MorModel, max_context: usize) -> Result<()> {
        self.prepare_prefill(model)?;
        let mut context = 1;
        while context < max_context {
            self.prepare_decode(model, context)?;
            context *= 2;
        }
        self.prepare_decode(model, max_context)?;
        Ok(())
    }

    fn prepare_prefill(&mut self, model: &MorModel) -> Result<()> {
        if self.prefill.is_none() {
            let tensors = model.step_tensors(self.prefill_capacity, self.kv.num_sequences, Phase::Prefill)?;
            let how = (Phase::Prefill, Routing::Causal, LogitRows::Sampled);
            self.prefill = Some(self.record(model, tensors, how)?);
        }
        Ok(())
    }

    /// Records the decode plan for `max_context` positions if it is not there; returns its number of key splits.
    fn prepare_decode(&mut self, model: &MorModel, max_context: usize) -> Result<u32> {
        let num_splits = self.num_splits(model, max_context);
        if !self.decode.contains_key(&num_splits) {
            let phase = Phase::Decode { num_splits };
            let mut tensors = model.step_tensors(self.kv.num_sequences, self.kv.num_sequences, phase)?;
            // The drawn tokens are the next step's rows; no copy stands between.
            tensors.rows = self.sample.next_rows.clone();
            let step = self.record(model, tensors, (phase, Routing::Causal, LogitRows::Sampled))?;
            self.decode.insert(num_splits, step);
        }
        Ok(num_splits)
    }

    fn record(&self, model: &MorModel, tensors: StepTensors, how: (Phase, Routing, LogitRows)) -> Result<Step> {
        let mut plan = PlanBuilder::new(model.gpu())?;
        model.record_step(&mut plan, &tensors, &self.kv.tensors, &self.sample, how, &mut |_, _| {})?;
        Ok(Step { plan: Arc::new(plan.finish()?), tensors })
    }
}

fn submit(model: &MorModel, plan: &Plan) {
    let mut submission = Submission::new(model.gpu());
    submission.plan(plan);
    submission.submit();
}

fn write_rows(model: &MorModel, tensors: &StepTensors, feeds: &[Feed<'_>]) {
    let mut rows = Vec::with_capacity(tensors.capacity);
    for feed in feeds {
        let last = feed.tokens.len() - 1;
        rows.extend(feed.tokens.iter().enumerate().map(|(i, token)| Row {
            token: *token,
            position: (feed.position + i) as u32,
            sequence: feed.sequence as u32,
            flags: ROW_ACTIVE | (ROW_INDEX_UNIT * i as u32) | if feed.sample && i == last { ROW_SAMPLE } else { 0 },
        }));
    }
    assert!(rows.len() <= tensors.capacity, "{} rows fed to a step of {}", rows.len(), tensors.capacity);
    rows.resize(tensors.capacity, Row::ABSENT);
    model.gpu().write(&tensors.rows, 0, bytemuck::cast_slice(&rows));
}

/// What an [`Evaluator`] brings back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capture {
    /// Everything: logits, hidden states, routing, block outputs.
    All,
    /// Depths and the negative log-likelihood of each row's label.
    Nll,
}

/// One evaluated row range of a sequence; see [`crate::SequenceOutput`] for the fields.
#[derive(Debug, Default)]
pub(crate) struct Captured {
    pub(crate) depth: Vec<u32>,
    pub(crate) nll: Vec<f32>,
    pub(crate) logits: Vec<f32>,
    pub(crate) hidden: Vec<f32>,
    pub(crate) router_logits: Vec<Vec<f32>>,
    pub(crate) router_weights: Vec<Vec<f32>>,
    pub(crate) aux_logits: Vec<Vec<f32>>,
    /// Per recursion, the main stream and for token choice the running one after it.
    pub(crate) streams: Vec<(Vec<f32>, Vec<f32>)>,
}

/// Runs full sequences and captures what they compute at every row.
#[derive(Debug)]
pub(crate) struct Evaluator {
    kv: KvPool,
    step: Step,
    pub(crate) key: (Routing, Capture),
    labels: Tensor,
    nll: Tensor,
    captured: Vec<(Tensor, Tensor)>,
}

impl Evaluator {
    /// For `num_sequences` sequences of up to `max_positions` tokens, `capacity` rows at a time.
    pub(crate) fn new(
        model: &MorModel,
        num_sequences: usize,
        max_positions: usize,
        capacity: usize,
        (routing, capture): (Routing, Capture),
    ) -> Result<Self> {
        let gpu = model.gpu();
        let config = model.config();
        let kv = KvPool::new(model, num_sequences, max_positions)?;
        let tensors = model.step_tensors(capacity, capacity, Phase::Prefill)?;
        let words = |label, shape: &[usize]| Tensor::zeros(gpu, label, DType::U32, shape);
        let sample = SampleTensors {
            sampling: words("sampling", &[1])?,
            seen: words("seen", &[1, 1])?,
            next_rows: words("next_rows", &[1, 4])?,
            results: words("results", &[1, 2])?,
        };
        let labels = words("labels", &[capacity])?;
        let nll = Tensor::zeros(gpu, "nll", DType::F32, &[capacity])?;
        let stream_rows = if capture == Capture::All && config.is_routed() { capacity } else { 0 };
        let stream = |label: &str| Tensor::zeros(gpu, label, DType::F32, &[stream_rows, config.hidden_size]);
        let captured = (0..config.num_recursions)
            .map(|r| Ok((stream(&format!("hidden.{r}"))?, stream(&format!("running.{r}"))?)))
            .collect::<Result<Vec<_>>>()?;

        let mut plan = PlanBuilder::new(gpu)?;
        let bytes = (4 * stream_rows * config.hidden_size) as u64;
        let mut copy_streams = |plan: &mut PlanBuilder<'_>, r: usize| {
            if bytes > 0 {
                plan.copy(&tensors.hidden, 0, &captured[r].0, 0, bytes);
                if config.mode == Mode::Token {
                    plan.copy(&tensors.running, 0, &captured[r].1, 0, bytes);
                }
            }
        };
        let how = (Phase::Prefill, routing, LogitRows::All);
        model.record_step(&mut plan, &tensors, &kv.tensors, &sample, how, &mut copy_streams)?;
        if capture == Capture::Nll {
            let bindings =
                CrossEntropyBindings { rows: &tensors.all, logits: &tensors.logits, labels: &labels, nll: &nll };
            let params = CrossEntropyParams {
                vocab_size: config.vocab_size as u32,
                logits_stride: model.logits_stride() as u32,
            };
            CrossEntropy::default().record(&mut plan, bindings, params)?;
        }
        let step = Step { plan: Arc::new(plan.finish()?), tensors };
        Ok(Self { kv, step, key: (routing, capture), labels, nll, captured })
    }

    /// Whether it has room for these sizes.
    pub(crate) fn fits(&self, num_sequences: usize, max_positions: usize, capacity: usize) -> bool {
        self.kv.num_sequences >= num_sequences
            && self.kv.tensors.max_positions >= max_positions
            && self.step.tensors.capacity >= capacity
    }

    /// Forgets all sequences.
    pub(crate) fn clear(&self, model: &MorModel) {
        (0..self.kv.num_sequences).for_each(|sequence| self.kv.clear(model.gpu(), sequence));
    }

    /// Runs one step and waits for its results: per feed, what was captured of its rows. `labels` has one entry a
    /// row, in feed order, for [`Capture::Nll`].
    pub(crate) fn run(&self, model: &MorModel, feeds: &[Feed<'_>], labels: &[u32]) -> Result<Vec<Captured>> {
        let (gpu, config, tensors) = (model.gpu(), model.config(), &self.step.tensors);
        write_rows(model, tensors, feeds);
        let (routing, capture) = self.key;
        if capture == Capture::Nll {
            let mut padded = labels.to_vec();
            padded.resize(tensors.capacity, NONE);
            gpu.write(&self.labels, 0, bytemuck::cast_slice(&padded));
        }
        if routing == Routing::TopK {
            // Top-k routing ranks a whole sequence, so there is one a step.
            let num_rows = feeds[0].tokens.len();
            for (capacity, tensor) in config.capacity.iter().zip(&tensors.topk_sequences) {
                let k = ((capacity * num_rows as f64) as u32).max(1);
                let range = TopkSequence { first_row: 0, num_rows: num_rows as u32, k, reserved: 0 };
                gpu.write(tensor, 0, bytemuck::bytes_of(&range));
            }
        }
        let num_rows: usize = feeds.iter().map(|feed| feed.tokens.len()).sum();
        let mut submission = Submission::new(gpu);
        submission.plan(&self.step.plan);
        let mut reads = Vec::new();
        let mut read = |tensor: &Tensor, per_row: usize| -> Result<usize> {
            reads.push(submission.read(tensor, 0, (4 * num_rows * per_row) as u64)?);
            Ok(reads.len() - 1)
        };
        let depth = read(&tensors.depth, 1)?;
        let per_row = |tensor: &Tensor| tensor.num_elems() / tensors.capacity;
        let mut floats = Vec::new();
        if capture == Capture::Nll {
            floats.push(read(&self.nll, 1)?);
        } else {
            floats.push(read(&tensors.logits, model.logits_stride())?);
            floats.push(read(&tensors.normed, config.hidden_size)?);
            for list in [&tensors.router_logits, &tensors.router_weights, &tensors.aux_logits] {
                for tensor in list {
                    floats.push(read(tensor, per_row(tensor))?);
                }
            }
            if config.is_routed() {
                for (hidden, running) in &self.captured {
                    floats.push(read(hidden, config.hidden_size)?);
                    floats.push(read(running, if config.mode == Mode::Token { config.hidden_size } else { 0 })?);
                }
            }
        }
        submission.submit();
        let data = reads.into_iter().map(Readback::wait).collect::<Result<Vec<_>>>()?;
        let depth: Vec<u32> = bytemuck::pod_collect_to_vec(&data[depth][..4 * num_rows]);
        let mut floats = floats.into_iter().map(|index| bytemuck::pod_collect_to_vec::<u8, f32>(&data[index]));
        let mut next = || floats.next().expect("every read above has its taker below");

        let mut captured: Vec<Captured> = feeds.iter().map(|_| Captured::default()).collect();
        let mut first = 0;
        let ranges: Vec<_> = feeds
            .iter()
            .map(|feed| {
                first += feed.tokens.len();
                first - feed.tokens.len()..first
            })
            .collect();
        let each = |captured: &mut Vec<Captured>, values: &[f32], put: &dyn Fn(&mut Captured, Vec<f32>)| {
            let width = values.len() / num_rows;
            for (captured, range) in captured.iter_mut().zip(&ranges) {
                put(captured, values[range.start * width..range.end * width].to_vec());
            }
        };
        for (captured, range) in captured.iter_mut().zip(&ranges) {
            captured.depth = depth[range.clone()].to_vec();
        }
        if capture == Capture::Nll {
            each(&mut captured, &next(), &|captured, values| captured.nll = values);
            return Ok(captured);
        }
        let (stride, vocab_size) = (model.logits_stride(), config.vocab_size);
        each(&mut captured, &next(), &|captured, values| {
            captured.logits = values.chunks(stride).flat_map(|row| &row[..vocab_size]).copied().collect();
        });
        each(&mut captured, &next(), &|captured, values| captured.hidden = values);
        for _ in &tensors.router_logits {
            each(&mut captured, &next(), &|captured, values| captured.router_logits.push(values));
        }
        for _ in &tensors.router_weights {
            each(&mut captured, &next(), &|captured, values| captured.router_weights.push(values));
        }
        for _ in &tensors.aux_logits {
            each(&mut captured, &next(), &|captured, values| captured.aux_logits.push(values));
        }
        if config.is_routed() {
            for _ in &self.captured {
                let hidden = next();
                let running = next();
                each(&mut captured, &hidden, &|captured, values| captured.streams.push((values, Vec::new())));
                each(&mut captured, &running, &|captured, values| {
                    captured.streams.last_mut().expect("pushed above").1 = values;
                });
            }
        }
        Ok(captured)
    }
}
