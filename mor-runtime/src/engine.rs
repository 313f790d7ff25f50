//! [`Engine`]: runs what a [`Scheduler`] plans on a [`Runner`] and turns results into events.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use mor_kernels::gpu::AdapterKind;
use mor_kernels::ops::GpuSampling;
use mor_kernels::rows::{PAGE_SIZE, ROW_ACTIVE, ROW_SAMPLE, Row};
use mor_model::{Batching, KvStrategy, MorConfig, MorModel, Precision};

use crate::error::Result;
use crate::event::{Event, SequenceHandle, Summary};
use crate::kv_cache::{PageClass, kv_bytes, page_classes};
use crate::runner::{Feed, Pending, Runner, RunnerOptions, Work};
use crate::sampling::{FinishReason, GenerateRequest};
use crate::scheduler::{
    Chunk, LEAST_ROWS, Progress, ROWS_BESIDE_DECODING, Scheduler, SchedulerOptions, SequenceId, Start, Step,
};
use crate::text::{TextStream, Tokenizer};

/// Sizes and habits of an [`Engine`].
#[derive(Clone, Debug)]
pub(crate) struct EngineOptions {
    pub(crate) num_slots: usize,
    pub(crate) max_positions: usize,
    pub(crate) pages_in_class: Vec<usize>,
    pub(crate) prefill_rows: usize,
    pub(crate) batching: Option<Batching>,
    pub(crate) share_prefixes: bool,
    pub(crate) batch_invariant: bool,
    pub(crate) persistent: bool,
    /// Number of the first sequence.
    pub(crate) first_id: SequenceId,
}

/// What sequences have used and done since the caches were made.
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Statistics {
    /// Sequences in slots.
    pub running: usize,
    /// Sequences that wait for a slot or for K/V pages.
    pub waiting: usize,
    /// Sequences that have ended.
    pub finished: u64,
    /// Slots.
    pub num_slots: usize,
    /// Prompt tokens of sequences that have started.
    pub prompt_tokens: u64,
    /// Tokens whose K/V entries were taken over from another sequence that began alike.
    pub reused_tokens: u64,
    /// New tokens.
    pub new_tokens: u64,
    /// Decoded tokens by the number of recursions they took.
    pub tokens_by_depth: Vec<u64>,
    /// Submits.
    pub submits: u64,
    /// Dispatches of the submits whose results are known, those with an empty grid included.
    pub dispatches: u64,
    /// The longest that one of these submits took on the device, as the host saw it.
    pub longest_submit: Duration,
    /// Decode steps, or ticks of depth-wise batching.
    pub ticks: u64,
    /// Ticks that slots spent on tokens, as far as their results are known.
    pub busy_slot_ticks: u64,
    /// Times that a sequence gave up its slot because K/V pages ran out.
    pub preemptions: u64,
    /// Time in which there was work.
    pub elapsed: Duration,
    /// The part of it that planning and bookkeeping took on the host.
    pub scheduling: Duration,
    /// K/V memory now.
    pub kv: KvUse,
}

/// Bytes of K/V memory.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvUse {
    /// All pages.
    pub total_bytes: u64,
    /// Pages that running sequences or kept beginnings hold, each once.
    pub held_bytes: u64,
    /// Of these, pages that only kept beginnings hold; they make room when it is needed.
    pub kept_bytes: u64,
    /// Pages in the tables of running sequences; a page that two share counts twice.
    pub reserved_bytes: u64,
    /// Entries of running sequences whose results are known.
    pub used_bytes: u64,
}

impl KvUse {
    /// Reserved and not used: ends of pages, and room for the ticks under way.
    pub fn wasted_bytes(&self) -> u64 {
        self.reserved_bytes - self.used_bytes
    }
}

impl Statistics {
    /// Part of all slots' ticks that were spent on tokens.
    pub fn occupancy(&self) -> f64 {
        self.busy_slot_ticks as f64 / (self.ticks * self.num_slots as u64).max(1) as f64
    }

    /// New tokens a second.
    pub fn tokens_per_s(&self) -> f64 {
        self.new_tokens as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// Mean depth of the decoded tokens.
    pub fn mean_depth(&self) -> f64 {
        let total: u64 = self.tokens_by_depth.iter().enumerate().map(|(depth, tokens)| depth as u64 * tokens).sum();
        total as f64 / self.tokens_by_depth.iter().sum::<u64>().max(1) as f64
    }
}

/// A sequence that has not ended, as its user sees it.
#[derive(Debug)]
struct Live {
    events: Sender<Event>,
    sampling: GpuSampling,
    max_new_tokens: usize,
    eos: Vec<u32>,
    text: Option<TextStream>,
    has_text: bool,
    full_text: String,
    /// The last token and its text, until its depth is known.
    held: Option<(u32, String)>,
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    depths: Vec<u32>,
    prompt_is_told: bool,
    reused_tokens: usize,
    preemptions: usize,
    started: Option<Instant>,
    first_token: Option<Instant>,
    /// Tokens that came with the first one.
    first_tokens: usize,
}

#[derive(Debug)]
struct Flight {
    step: Step,
    pending: Pending,
    /// When it had been handed to the device, all its kernels compiled.
    submitted: Instant,
}

/// Sequences of one model on one device.
#[derive(Debug)]
pub(crate) struct Engine {
    runner: Runner,
    scheduler: Scheduler,
    classes: Vec<PageClass>,
    live: BTreeMap<SequenceId, Live>,
    in_flight: VecDeque<Flight>,
    cancels: (Sender<u64>, Receiver<u64>),
    statistics: Statistics,
    /// When the last results arrived, or the first work was submitted after a pause.
    last_results: Option<Instant>,
}

/// Most rows of a prefill step that `model`'s device is given at first, beside caches of so many bytes.
pub(crate) fn most_prefill_rows(model: &MorModel, kv_bytes: u64, batch_invariant: bool) -> usize {
    let (summary, caps) = (model.gpu().summary(), model.gpu().caps());
    if summary.kind != AdapterKind::Discrete {
        // More rows need more memory and fill no smaller device better.
        return ROWS_BESIDE_DECODING;
    }
    let taken = model.weights().num_bytes() + kv_bytes;
    let left = summary.memory_bytes.map_or(u64::MAX, |memory| memory.saturating_sub(taken));
    let [of_row, _] = model.step_bytes_of_row();
    let fits = rows_that_fit(left, model.step_bytes_of_all(), of_row).min(model.most_step_rows() as u64);
    let has_matrices = model.precision() == Precision::F16 && caps.cooperative_matrices.is_some() && !batch_invariant;
    rows_of_discrete(model.config(), has_matrices, fits)
}

/// Rows of `of_row` bytes each, beside `of_all` bytes however many they are, in a quarter of the `left` bytes, since there are other
/// tensors.
fn rows_that_fit(left: u64, of_all: u64, of_row: u64) -> u64 {
    (left / 4).saturating_sub(of_all) / of_row
}

/// [`most_prefill_rows`] of a discrete GPU whose memory has room for so many: a power of two, as the sizes that plans are made for.
fn rows_of_discrete(config: &MorConfig, has_matrices: bool, fits: u64) -> usize {
    /// Multiplications of a step, with and without cooperative matrices. The first are 2048 rows of a model of 1.7 billion
    /// parameters, of which 24 layers take 28 ms on an H200 (`benches/runs/2026-11-29-nvidia-h200/prefill-small-tiles.txt`), and
    /// routed ones may have 26; on slower devices the step is halved a few times, and no first one may take seconds.
    const MOST_PRODUCTS: (u64, u64) = (3_600_000_000_000, 900_000_000_000);
    let products = (config.num_hidden_layers * config.layer_products()) as u64;
    let most = if has_matrices { MOST_PRODUCTS.0 } else { MOST_PRODUCTS.1 };
    1 << (most / products).min(fits).max(ROWS_BESIDE_DECODING as u64).ilog2()
}

impl Engine {
    /// Submits ahead of the host's knowledge, so that the device never waits for it.
    const SUBMITS_IN_FLIGHT: usize = 3;
    /// Decode steps or ticks of one submit: about two tokens each. More would cost the host less, and let it know later
    /// that a slot is free, which nobody waits for where there is one; a device of unknown speed begins with two all the same.
    /// Persistent steps can be one dispatch, which takes long to begin and to end.
    const STEPS_PER_SUBMIT: usize = 2;
    const STEPS_PER_SUBMIT_ALONE: usize = 4;
    const STEPS_PER_SUBMIT_PERSISTENT: usize = 8;
    const TICKS_PER_SUBMIT: usize = 4;
    /// A submit should take less than this, far below any watchdog.
    const BUDGET: Duration = Duration::from_millis(100);

    /// Allocates caches and streams.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`](mor_kernels::KernelError::OutOfMemory).
    pub(crate) fn new(model: &MorModel, options: EngineOptions) -> Result<Self> {
        let classes = page_classes(model);
        let layout = model.kv_layout().clone();
        let class_of_group =
            (0..layout.num_groups()).map(|group| classes.iter().position(|class| class.groups.contains(&group)));
        let class_of_group = class_of_group.collect();
        let room = (options.num_slots * options.max_positions).max(LEAST_ROWS);
        let most = most_prefill_rows(model, kv_bytes(model, &options.pages_in_class), options.batch_invariant);
        let prefill_rows = options.prefill_rows.min(most).min(room);
        let runner = Runner::new(
            model,
            &RunnerOptions {
                num_slots: options.num_slots,
                max_positions: options.max_positions,
                prefill_rows,
                batching: options.batching,
                pages_in_class: Some(options.pages_in_class.clone()),
                batch_invariant: options.batch_invariant,
                persistent: options.persistent,
            },
        )?;
        // A device of unknown speed starts with short submits.
        let starts_slow = !matches!(model.gpu().summary().kind, AdapterKind::Discrete | AdapterKind::Cpu);
        let config = model.config();
        let (ticks, ticks_of_token) = match runner.batching() {
            Batching::Lockstep if runner.is_persistent() && !starts_slow => (Self::STEPS_PER_SUBMIT_PERSISTENT, 1),
            Batching::Lockstep if options.num_slots == 1 && !starts_slow => (Self::STEPS_PER_SUBMIT_ALONE, 1),
            Batching::Lockstep => (Self::STEPS_PER_SUBMIT, 1),
            Batching::Depthwise => (Self::TICKS_PER_SUBMIT, model.max_depth()),
        };
        let scheduler = Scheduler::new(SchedulerOptions {
            layout,
            class_of_group,
            pages_in_class: options.pages_in_class,
            num_slots: options.num_slots,
            prefill_rows: if starts_slow { prefill_rows.min(128) } else { prefill_rows },
            ticks,
            ticks_of_token,
            share_prefixes: options.share_prefixes,
            first_id: options.first_id,
        });
        let statistics = Statistics {
            num_slots: options.num_slots,
            tokens_by_depth: vec![0; config.num_recursions + 1],
            ..Statistics::default()
        };
        Ok(Self {
            runner,
            scheduler,
            classes,
            live: BTreeMap::new(),
            in_flight: VecDeque::new(),
            cancels: channel(),
            statistics,
            last_results: None,
        })
    }

    /// The runner, for measurements while no sequence runs.
    pub(crate) fn runner_mut(&mut self) -> &mut Runner {
        &mut self.runner
    }

    /// Most rows of a prefill step now.
    pub(crate) fn prefill_rows(&self) -> usize {
        self.scheduler.prefill_rows()
    }

    /// As [`Runner::is_persistent`].
    pub(crate) fn is_persistent(&self) -> bool {
        self.runner.is_persistent()
    }

    /// As [`Runner::give_up_persistent`].
    pub(crate) fn give_up_persistent(&self, model: &MorModel) {
        self.runner.give_up_persistent(model);
    }

    /// Longest sequence.
    pub(crate) fn max_positions(&self) -> usize {
        self.runner.max_positions()
    }

    /// Whether every sequence has ended.
    pub(crate) fn is_idle(&self) -> bool {
        self.live.is_empty()
    }

    /// Number of the next sequence.
    pub(crate) fn next_id(&self) -> SequenceId {
        self.scheduler.next_id()
    }

    /// Bytes that a sequence of `limit` tokens needs and all there are, if it can never run: of the K/V pages that do not
    /// suffice.
    pub(crate) fn never_fits(&self, limit: usize) -> Option<(u64, u64)> {
        let (class, needed, there) = self.scheduler.never_fits(limit)?;
        let bytes = |pages: usize| pages as u64 * self.classes[class].page_bytes;
        Some((bytes(needed), bytes(there)))
    }

    /// Takes a sequence in: a request that was checked, and how the device draws its tokens.
    pub(crate) fn submit(
        &mut self,
        request: &GenerateRequest,
        prompt: Vec<u32>,
        sampling: GpuSampling,
        eos: Vec<u32>,
        tokenizer: Option<&Tokenizer>,
    ) -> SequenceHandle {
        let limit = prompt.len() + request.max_new_tokens;
        let id = self.scheduler.submit(prompt.clone(), limit);
        let (sender, events) = channel();
        let text = tokenizer.map(|tokenizer| TextStream::new(tokenizer, &request.stop));
        self.live.insert(
            id,
            Live {
                events: sender,
                sampling,
                max_new_tokens: request.max_new_tokens,
                eos,
                has_text: text.is_some(),
                text,
                full_text: String::new(),
                held: None,
                prompt,
                tokens: Vec::new(),
                depths: Vec::new(),
                prompt_is_told: false,
                reused_tokens: 0,
                preemptions: 0,
                started: None,
                first_token: None,
                first_tokens: 0,
            },
        );
        SequenceHandle { id, events, cancels: self.cancels.0.clone() }
    }

    /// Submits ahead and takes in the results of one submit; `false` if nothing is left to do.
    ///
    /// # Errors
    /// [`RuntimeError::Kernel`](crate::RuntimeError::Kernel) if the device fails.
    pub(crate) fn step(&mut self, model: &MorModel) -> Result<bool> {
        while let Ok(id) = self.cancels.1.try_recv() {
            self.finish(model, id, FinishReason::Cancelled);
        }
        while self.in_flight.len() < Self::SUBMITS_IN_FLIGHT {
            let start = Instant::now();
            let step = self.scheduler.plan();
            self.statistics.scheduling += start.elapsed();
            let Some(step) = step else { break };
            self.last_results.get_or_insert(start);
            self.submit_step(model, step)?;
        }
        if let Some(Flight { step, pending, submitted }) = self.in_flight.pop_front() {
            let num_dispatches = pending.num_dispatches() as u64;
            let reply = pending.wait()?;
            self.runner.recover(&reply);
            let now = Instant::now();
            let drawn = |slot, from| reply.drawn(slot, from).collect();
            let progress = self.scheduler.complete(&step, &reply.depths, &drawn);
            self.statistics.scheduling += now.elapsed();
            for progress in progress {
                self.take(model, progress, now);
            }
            let last_results = self.last_results.unwrap_or(submitted);
            self.statistics.elapsed += now - last_results;
            self.last_results = (!self.in_flight.is_empty()).then_some(now);
            // The device began when it had the step and was done with the one before.
            let time = now - last_results.max(submitted);
            self.statistics.longest_submit = self.statistics.longest_submit.max(time);
            self.statistics.dispatches += num_dispatches;
            self.adapt(model, &step, time);
        }
        Ok(!self.live.is_empty())
    }

    fn submit_step(&mut self, model: &MorModel, step: Step) -> Result<()> {
        for slot in &step.stops {
            self.runner.stop(*slot);
        }
        for start in &step.starts {
            self.start(model, start);
        }
        for write in &step.page_writes {
            self.runner.write_pages(write.slot, write.group, write.first, &write.pages);
        }
        for entry in &step.entries {
            let (position, sequence) = (entry.position as u32, entry.slot as u32);
            let row = Row { token: entry.token, position, sequence, flags: ROW_ACTIVE | ROW_SAMPLE };
            self.runner.set_next_row(row);
        }
        let feed = |chunk: &Chunk| Feed {
            sequence: chunk.slot,
            position: chunk.position,
            tokens: &self.scheduler.tokens(chunk.id)[chunk.position..chunk.position + chunk.len],
            sample: chunk.draws,
        };
        let feeds: Vec<_> = step.chunks.iter().map(feed).collect();
        let work = Work {
            copies: &step.copies,
            feeds: &feeds,
            ticks: step.ticks,
            num_slots: step.num_slots,
            max_context: step.max_context,
        };
        tracing::trace!(ticks = work.ticks, slots = work.num_slots, chunks = feeds.len(), "submits a step");
        let pending = self.runner.submit(model, &work)?;
        self.statistics.submits += 1;
        self.statistics.ticks += step.ticks as u64;
        self.in_flight.push_back(Flight { step, pending, submitted: Instant::now() });
        Ok(())
    }

    fn start(&mut self, model: &MorModel, start: &Start) {
        let Some(live) = self.live.get_mut(&start.id) else { return };
        let tokens = self.scheduler.tokens(start.id);
        self.runner.start(start.slot, &live.sampling, tokens.iter().copied(), Some(&start.entries));
        if model.config().kv == KvStrategy::Hybrid && !start.depths.is_empty() {
            self.write_hybrid_table(model, start);
        }
        let live = self.live.get_mut(&start.id).expect("found above");
        if live.started.is_none() {
            live.started = Some(Instant::now());
            live.reused_tokens = start.depths.len();
            self.statistics.prompt_tokens += live.prompt.len() as u64;
            tracing::debug!(
                id = start.id,
                prompt = live.prompt.len(),
                reused = live.reused_tokens,
                "a sequence starts"
            );
        } else {
            live.preemptions += 1;
            tracing::debug!(id = start.id, "a sequence that had given up its slot goes on");
        }
        // What another sequence has computed is known at once.
        let known = live.depths.len().min(start.depths.len());
        live.depths.extend_from_slice(&start.depths[known..]);
    }

    /// Names the entry of every position that was taken over: a recursion's own where the token took it, else the
    /// first recursion's.
    fn write_hybrid_table(&mut self, model: &MorModel, start: &Start) {
        let (layout, page_size) = (model.kv_layout(), PAGE_SIZE as usize);
        let pages = self.scheduler.pages(start.id);
        let slot_of =
            |group: usize, index: usize| pages[group][index / page_size] * PAGE_SIZE + (index % page_size) as u32;
        for group in 1..layout.num_groups() {
            let mut index = 0;
            let place = |(position, depth): (usize, &u32)| {
                if !layout.group_holds(group, *depth) {
                    return slot_of(1, position);
                }
                index += 1;
                slot_of(group, index - 1)
            };
            let kv_slots: Vec<u32> = start.depths.iter().enumerate().map(place).collect();
            self.runner.write_kv_slots(start.slot, group, &kv_slots);
        }
    }

    /// Takes in what a step has brought for a sequence.
    fn take(&mut self, model: &MorModel, progress: Progress, now: Instant) {
        let Some(live) = self.live.get_mut(&progress.id) else { return };
        // A displaced sequence computes again what is known already.
        let known = live.depths.len().saturating_sub(progress.position).min(progress.depths.len());
        live.depths.extend_from_slice(&progress.depths[known..]);
        let limit = live.prompt.len() + live.max_new_tokens;
        let mut end = (live.max_new_tokens == 0 && live.depths.len() == limit).then_some(FinishReason::Length);
        if end.is_some() {
            live.tell_prompt();
        }
        let is_first = live.first_token.is_none();
        for (i, outcome) in progress.outcomes.into_iter().enumerate() {
            let passes = match self.runner.batching() {
                _ if i == 0 && progress.drew_reading => 0,
                Batching::Lockstep => 1,
                Batching::Depthwise => outcome.depth.max(1),
            };
            self.statistics.busy_slot_ticks += u64::from(passes);
            self.statistics.tokens_by_depth[outcome.depth as usize] += 1;
            self.statistics.new_tokens += 1;
            live.first_token.get_or_insert(now);
            live.first_tokens += usize::from(is_first);
            live.depths.push(outcome.depth);
            live.tell_prompt();
            if let Some((token, text)) = live.held.take() {
                live.tell(Event::Token { token, text, depth: Some(outcome.depth) });
            }
            end = live.take_token(outcome.next_token);
            if end.is_some() {
                break;
            }
        }
        if let Some(reason) = end {
            self.finish(model, progress.id, reason);
        }
    }

    fn finish(&mut self, model: &MorModel, id: SequenceId, reason: FinishReason) {
        let Some(mut live) = self.live.remove(&id) else { return };
        // The device ends a sequence by itself at its length and at the first few end-of-text tokens.
        let on_device = match reason {
            FinishReason::Length => false,
            FinishReason::Eos => !live.sampling.eos.contains(live.tokens.last().expect("it ended with a token")),
            FinishReason::Stop | FinishReason::Cancelled => true,
        };
        let start = Instant::now();
        self.scheduler.finish(id, on_device);
        self.statistics.scheduling += start.elapsed();
        self.statistics.finished += 1;
        if let Some((token, text)) = live.held.take() {
            live.tell(Event::Token { token, text, depth: None });
        }
        let now = Instant::now();
        let per_s = |count: usize, from: Option<Instant>, to: Instant| {
            from.map_or(0.0, |from| count as f64 / (to - from).as_secs_f64().max(1e-9))
        };
        let total: f64 = live.depths.iter().map(|depth| f64::from(*depth)).sum();
        let read = live.prompt.len() - live.reused_tokens;
        let summary = Summary {
            finish_reason: reason,
            kv_entries: model.kv_layout().entries_per_layer(&live.depths),
            mean_depth: total / live.depths.len().max(1) as f64,
            reused_tokens: live.reused_tokens,
            preemptions: live.preemptions,
            prefill_tokens_per_s: per_s(read, live.started, live.first_token.unwrap_or(now)),
            decode_tokens_per_s: per_s(live.tokens.len().saturating_sub(live.first_tokens), live.first_token, now),
            text: live.has_text.then_some(live.full_text),
            prompt_tokens: live.prompt,
            tokens: live.tokens,
            depths: live.depths,
        };
        // Whoever has dropped the handle is not interested.
        let _ = live.events.send(Event::Finished(summary));
    }

    /// Shortens submits where they take too long.
    fn adapt(&mut self, model: &MorModel, step: &Step, time: Duration) {
        if !model.gpu().caps().is_cpu && self.scheduler.learn(step, time > Self::BUDGET) {
            let (ticks, rows) = (self.scheduler.ticks(), self.scheduler.prefill_rows());
            tracing::debug!(?time, ticks, rows, "submits took too long; later ones are shorter");
        }
    }

    /// What has been done so far, and memory now.
    pub(crate) fn statistics(&self) -> Statistics {
        let (running, waiting) = self.scheduler.num_sequences();
        let mut kv = KvUse::default();
        for (class, PageClass { page_bytes, .. }) in self.classes.iter().enumerate() {
            let found = self.scheduler.page_use(class);
            kv.total_bytes += found.total as u64 * page_bytes;
            kv.held_bytes += found.held as u64 * page_bytes;
            kv.kept_bytes += found.kept as u64 * page_bytes;
            kv.reserved_bytes += found.pages as u64 * page_bytes;
            kv.used_bytes += found.entries as u64 * page_bytes / u64::from(PAGE_SIZE);
        }
        Statistics {
            running,
            waiting,
            reused_tokens: self.scheduler.num_reused(),
            preemptions: self.scheduler.num_preemptions(),
            kv,
            ..self.statistics.clone()
        }
    }

    /// Counts from zero again; sequences and memory stay.
    pub(crate) fn reset_statistics(&mut self) {
        let Statistics { num_slots, tokens_by_depth, .. } = &self.statistics;
        let tokens_by_depth = vec![0; tokens_by_depth.len()];
        self.statistics = Statistics { num_slots: *num_slots, tokens_by_depth, ..Statistics::default() };
    }
}

impl Live {
    /// Events go to the handle; without one, nobody is interested, and the sequence is being cancelled.
    fn tell(&self, event: Event) {
        let _ = self.events.send(event);
    }

    fn tell_prompt(&mut self) {
        if !std::mem::replace(&mut self.prompt_is_told, true) {
            self.tell(Event::Prompt { depths: self.depths[..self.prompt.len()].to_vec() });
        }
    }

    /// Takes a drawn token in and decides whether it is the last.
    fn take_token(&mut self, token: u32) -> Option<FinishReason> {
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
        finish_reason
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefill_steps_take_what_time_and_memory_allow() {
        let config = |name: &str| {
            let path = format!("{}/../benches/configs/{name}.json", env!("CARGO_MANIFEST_DIR"));
            MorConfig::from_json_file(path).expect("a config of the benchmarks")
        };
        assert_eq!(rows_of_discrete(&config("360m-vanilla"), true, 9000), 8192);
        assert_eq!(rows_of_discrete(&config("360m-mor-r3"), true, u64::MAX), 8192);
        assert_eq!(rows_of_discrete(&config("360m-vanilla"), false, u64::MAX), 2048);
        assert_eq!(rows_of_discrete(&config("1.7b-vanilla"), true, u64::MAX), 2048);
        assert_eq!(rows_of_discrete(&config("1.7b-vanilla"), false, u64::MAX), 512);
        let mut with_unshared_layers = config("1.7b-vanilla");
        with_unshared_layers.num_hidden_layers = 26;
        assert_eq!(rows_of_discrete(&with_unshared_layers, true, u64::MAX), 2048);
        assert_eq!(rows_of_discrete(&config("360m-vanilla"), true, 3000), 2048);
        assert_eq!(rows_of_discrete(&config("360m-vanilla"), true, 0), ROWS_BESIDE_DECODING);
        // What rows share is not counted for each of them: 32 MiB of part sums and 48 KiB a row in a quarter of 1 GiB.
        assert_eq!(rows_that_fit(1 << 30, 32 << 20, 48 << 10), 4778);
        assert_eq!(rows_that_fit(64 << 20, 32 << 20, 48 << 10), 0);
    }
}
