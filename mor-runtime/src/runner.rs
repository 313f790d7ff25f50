//! [`Runner`]: feeds rows to a model, decodes, and reads what comes back.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use mor_kernels::Result;
use mor_kernels::ops::{AttentionDecode, GpuSampling, SampleToken};
use mor_kernels::plan::{Plan, PlanBuilder};
use mor_kernels::rows::{ActiveRow, NONE, ROW_ACTIVE, ROW_FAILED, ROW_INDEX_UNIT, ROW_SAMPLE, Row};
use mor_kernels::submit::{Readback, Submission};
use mor_kernels::tensor::{DType, Tensor};
use mor_kernels::writes::Writes;
use mor_model::{
    Batching, LayersTensors, LogitRows, MAX_FEW_ROWS, MorModel, PARTS, Phase, Precision, Routing, SampleTensors,
    StepTensors,
};

use crate::kv_cache::KvCache;
pub use crate::scheduler::{Outcome, PageCopy};

/// Tokens of one sequence to feed in a prefill step.
#[derive(Clone, Copy, Debug)]
pub struct Feed<'a> {
    /// Slot of the sequence.
    pub sequence: usize,
    /// Position of the first token.
    pub position: usize,
    /// The tokens, at least one.
    pub tokens: &'a [u32],
    /// Whether to draw the token after the last one.
    pub sample: bool,
}

/// What one submit does, in this order.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work<'a> {
    /// Pages to copy.
    pub copies: &'a [PageCopy],
    /// Rows of a prefill step, sequences ascending, one feed each; none without feeds.
    pub feeds: &'a [Feed<'a>],
    /// Decode steps or ticks after it; at most [`Runner::MAX_TICKS`].
    pub ticks: usize,
    /// Slots that may be occupied: the first ones. 0 stands for all.
    pub num_slots: usize,
    /// No sequence is longer in these ticks.
    pub max_context: usize,
}

/// The results of a submit on their way to the host.
#[derive(Debug)]
pub struct Pending {
    /// What will be recorded for the next time while the device is busy.
    prefill: Option<Arc<Plan>>,
    depths: Option<Readback>,
    next_rows: Readback,
    results: Readback,
    num_dispatches: usize,
    rows_written: u64,
}

/// The results of a submit.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Recursions that each fed row took, in feed order.
    pub depths: Vec<u32>,
    next_rows: Vec<Row>,
    /// `[slots, RESULTS]` of (next token, depth), a ring by position.
    results: Vec<[u32; 2]>,
    rows_written: u64,
}

impl Pending {
    /// Dispatches of the submit, those with an empty grid included.
    pub fn num_dispatches(&self) -> usize {
        self.num_dispatches
    }

    /// Whether [`Pending::wait`] would return at once.
    ///
    /// # Errors
    /// [`KernelError::Device`](mor_kernels::KernelError::Device).
    pub fn is_ready(&self) -> Result<bool> {
        self.results.is_ready()
    }

    /// Waits for them.
    ///
    /// # Errors
    /// [`KernelError::Device`](mor_kernels::KernelError::Device).
    pub fn wait(self) -> Result<Reply> {
        let gpu = self.results.gpu();
        // A software rasteriser computes where this would record.
        if let Some(plan) = self.prefill.as_ref().filter(|_| !gpu.caps().is_cpu) {
            while !self.is_ready()? && plan.record_ahead(gpu) {}
        }
        let depths = self.depths.map(Readback::wait).transpose()?.unwrap_or_default();
        Ok(Reply {
            depths: bytemuck::pod_collect_to_vec(&depths),
            next_rows: bytemuck::pod_collect_to_vec(&self.next_rows.wait()?),
            results: bytemuck::pod_collect_to_vec(&self.results.wait()?),
            rows_written: self.rows_written,
        })
    }
}

impl Reply {
    /// What was drawn for the sequence in `slot` from position `from` on, ascending. The caller must know which
    /// positions are new to it; no more than [`Runner::MAX_TICKS`] can be.
    pub fn drawn(&self, slot: usize, from: usize) -> impl Iterator<Item = Outcome> + '_ {
        // The token after the last one drawn has the next row's position.
        let end = self.next_rows.get(slot).map_or(0, |row| row.position as usize);
        (from..end).map(move |position| {
            let ring = SampleToken::RESULTS as usize;
            let [next_token, depth] = self.results[slot * ring + position % ring];
            Outcome { position, depth, next_token }
        })
    }
}

/// Sizes of a [`Runner`].
#[derive(Clone, Debug)]
pub struct RunnerOptions {
    /// Sequences at a time.
    pub num_slots: usize,
    /// Tokens of the longest sequence.
    pub max_positions: usize,
    /// Most rows of a prefill step.
    pub prefill_rows: usize,
    /// How decode batches run; `None` is what suits the model.
    pub batching: Option<Batching>,
    /// K/V pages per class of [`page_classes`](crate::kv_cache::page_classes); tables are then written by
    /// [`Runner::write_pages`]. `None`: each slot owns the pages of its longest sequence.
    pub pages_in_class: Option<Vec<usize>>,
    /// Computes a token to the same bits whatever it shares its steps with: logits, routing, keys and values depend
    /// neither on other sequences nor on slots, chunks, or whether it came through prefill, decode steps or ticks. Costs
    /// prefill its tiles of keys and a last layer of few rows, and few sequences their kernels of few rows and the splitting of keys. Without it, such
    /// circumstances change the order of sums, and results by rounding: see [`Runner::rounding`].
    pub batch_invariant: bool,
    /// Runs all layers of the decode steps of a single slot in one dispatch, whose workgroups wait for each other, and all steps of a
    /// submit where the most likely token is drawn or one of all ([`GpuSampling::is_plain`]), where model and
    /// device allow it ([`LayersTensors`]); decode is in lockstep then. Should a workgroup ever wait in vain, steps go on layer by
    /// layer.
    pub persistent: bool,
}

/// Runs steps of a model over a fixed number of slots.
#[derive(Debug)]
pub struct Runner {
    kv: KvCache,
    sample: SampleTensors,
    batching: Batching,
    decode_tensors: StepTensors,
    /// What a wait in vain took out of use; it has counted rows.
    given_up: Option<LayersTensors>,
    /// By number of slots, of key splits, and of steps that draw their tokens themselves, 0 for others.
    decode: BTreeMap<(usize, u32, usize), Arc<Plan>>,
    /// Whether persistent steps can draw the tokens of the sequence in the only slot themselves.
    draws_plainly: bool,
    prefill_tensors: Option<StepTensors>,
    /// By number of rows and of prompts that end.
    prefill: BTreeMap<(usize, usize), Arc<Plan>>,
    prefill_rows: usize,
    key_splits: Option<u32>,
    batch_invariant: bool,
    /// Times that the host has put a row in place of a drawn one; what was submitted before knows nothing of the last.
    rows_written: u64,
    /// For the next submit.
    writes: Writes,
}

impl Runner {
    /// Most ticks of one submit: what the ring of results holds.
    pub const MAX_TICKS: usize = SampleToken::RESULTS as usize - 1;

    /// Rows that prefill plans are made for, besides the most: the tiles that suit one suit the rows down to the one before. Sizes
    /// beside these were measured to win a few percent or lose them, and each compiles tiles of its own
    /// (`benches/runs/2026-11-29-nvidia-h200/prefill-sizes-tiles-by-rows.txt`).
    const PREFILL_SIZES: [usize; 14] = [32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1536, 2048, 4096];

    /// How far a logit may lie from what it is in another batch, relative to the largest of its row, unless the runner is
    /// batch-invariant.
    ///
    /// In f32 only the order of sums differs: 5.8e-7 at most in the tiny models of the tests on an H100, a few units of
    /// rounding. In f16 many rows that share a dispatch are multiplied as halves where the device has cooperative matrices,
    /// and few rows are not; and a difference may turn the last bit of a stored key or value. A unit of either is 4.9e-4:
    /// 1.8e-3 at most in the same models, so the bound is ten units. A token with a smaller lead, or routed by a smaller
    /// distance, may become another, and what follows it differs freely.
    pub const fn rounding(precision: Precision) -> f32 {
        match precision {
            Precision::F32 => 1e-5,
            Precision::F16 => 5e-3,
        }
    }

    /// Allocates caches and streams.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`](mor_kernels::KernelError::OutOfMemory).
    pub fn new(model: &MorModel, options: &RunnerOptions) -> Result<Self> {
        let gpu = model.gpu();
        let num_slots = options.num_slots;
        let kv = match &options.pages_in_class {
            Some(pages) => KvCache::new(model, num_slots, options.max_positions, pages)?,
            None => KvCache::for_all(model, num_slots, options.max_positions)?,
        };
        let seen_words = model.config().vocab_size.div_ceil(32);
        let words = |label, shape: &[usize]| Tensor::zeros(gpu, label, DType::U32, shape);
        let sample = SampleTensors {
            sampling: words("sampling", &[num_slots, size_of::<GpuSampling>() / 4])?,
            seen: words("seen", &[num_slots, seen_words])?,
            next_rows: Tensor::from_slice(
                gpu,
                "next_rows",
                DType::U32,
                &[num_slots, 4],
                &vec![Row::ABSENT; num_slots],
            )?,
            results: words("results", &[num_slots, SampleToken::RESULTS as usize, 2])?,
        };
        let batching = options.batching.unwrap_or(model.batching());
        let decode_tensors = |batching| -> Result<StepTensors> {
            let mut tensors = model.step_tensors(num_slots, num_slots, Some(batching))?;
            if batching == Batching::Lockstep {
                // The drawn tokens are the next step's rows; no copy stands between.
                tensors.rows = sample.next_rows.clone();
            }
            Ok(tensors)
        };
        let mut persistent = None;
        if options.persistent && num_slots == 1 && !options.batch_invariant {
            let mut tensors = decode_tensors(Batching::Lockstep)?;
            tensors.layers = LayersTensors::new(model, &tensors, &kv.tensors, &sample)?;
            persistent = Some(tensors).filter(|tensors| tensors.layers.is_some());
        }
        let (batching, decode_tensors) = match persistent {
            Some(tensors) => (Batching::Lockstep, tensors),
            None => (batching, decode_tensors(batching)?),
        };
        Ok(Self {
            kv,
            sample,
            batching,
            decode_tensors,
            given_up: None,
            decode: BTreeMap::new(),
            draws_plainly: false,
            prefill_tensors: None,
            prefill: BTreeMap::new(),
            prefill_rows: options.prefill_rows,
            key_splits: None,
            batch_invariant: options.batch_invariant,
            rows_written: 0,
            writes: Writes::default(),
        })
    }

    /// Longest sequence.
    pub fn max_positions(&self) -> usize {
        self.kv.tensors.max_positions
    }

    /// Sequences at a time.
    pub fn num_slots(&self) -> usize {
        self.kv.num_slots
    }

    /// Most rows of a prefill step.
    pub fn prefill_rows(&self) -> usize {
        self.prefill_rows
    }

    /// How decode batches run.
    pub fn batching(&self) -> Batching {
        self.batching
    }

    /// Whether decode steps run all layers in one dispatch.
    pub fn is_persistent(&self) -> bool {
        self.decode_tensors.layers.is_some()
    }

    /// Where `reply` says that a workgroup waited in vain: goes on layer by layer with the token whose step that was. What is in
    /// flight does nothing until then.
    pub fn recover(&mut self, reply: &Reply) {
        let Some(row) = reply.next_rows.iter().find(|row| row.flags == ROW_FAILED) else { return };
        if let Some(layers) = self.decode_tensors.layers.take() {
            self.given_up = Some(layers);
            tracing::warn!("workgroups did not run at a time; decode goes on layer by layer");
            self.decode.clear();
        }
        // A row that was replaced since has been fed again, or its sequence has ended.
        if reply.rows_written == self.rows_written {
            self.set_next_row(Row { flags: ROW_ACTIVE | ROW_SAMPLE, ..*row });
        }
    }

    /// Has the next persistent step end as if a workgroup had waited in vain, for tests of [`Runner::recover`].
    #[doc(hidden)]
    pub fn give_up_persistent(&self, model: &MorModel) {
        if let Some(layers) = &self.decode_tensors.layers {
            layers.give_up(model);
        }
    }

    /// Splits the keys of every decode step recorded from now on, and of the rows that end prompts, into this many parts (a power
    /// of two up to [`AttentionDecode::MAX_SPLITS`]) whatever the context's length; `None` lets the length decide. More than
    /// [`MAX_FEW_ROWS`] decoding slots or ends of prompts split nothing, nor does a batch-invariant runner. The result does not depend on it: for tests
    /// and measurements.
    pub fn set_key_splits(&mut self, key_splits: Option<u32>) {
        self.key_splits = key_splits.map(|splits| splits.next_power_of_two().clamp(1, AttentionDecode::MAX_SPLITS));
    }

    /// Forgets the sequence in a slot and prepares it for another: how its tokens are drawn, which tokens count as
    /// occurred, and the entries it has in each K/V group (none without lengths).
    pub fn start(
        &mut self,
        slot: usize,
        sampling: &GpuSampling,
        seen: impl IntoIterator<Item = u32>,
        kv_lengths: Option<&[u32]>,
    ) {
        let writes = &mut self.writes;
        match kv_lengths {
            Some(lengths) => self.kv.set_lengths(writes, slot, lengths),
            None => self.kv.clear(writes, slot),
        }
        self.draws_plainly = sampling.is_plain();
        let bytes = bytemuck::bytes_of(sampling);
        writes.push(&self.sample.sampling, (slot * bytes.len()) as u64, bytes);
        let mut bits = vec![0_u32; self.sample.seen.shape()[1]];
        for token in seen {
            bits[token as usize / 32] |= 1 << (token % 32);
        }
        let bytes: &[u8] = bytemuck::cast_slice(&bits);
        writes.push(&self.sample.seen, (slot * bytes.len()) as u64, bytes);
        self.stop(slot);
    }

    /// Puts a row in place of the one drawn last.
    pub fn set_next_row(&mut self, row: Row) {
        self.rows_written += 1;
        let offset = row.sequence as usize * size_of::<Row>();
        self.writes.push(&self.sample.next_rows, offset as u64, bytemuck::bytes_of(&row));
    }

    /// Takes the sequence in a slot out of what is submitted from now on.
    pub fn stop(&mut self, slot: usize) {
        self.set_next_row(Row { sequence: slot as u32, ..Row::ABSENT });
        self.decode_tensors.clear(&mut self.writes, slot);
    }

    /// Writes entries of a slot's page table for a group, from the `first` on.
    pub fn write_pages(&mut self, slot: usize, group: usize, first: usize, pages: &[u32]) {
        self.kv.write_pages(&mut self.writes, slot, group, first, pages);
    }

    /// Writes what a slot's keys of a group are, position by position from the first on, in hybrid caches: physical
    /// K/V slots.
    pub fn write_kv_slots(&mut self, slot: usize, group: usize, kv_slots: &[u32]) {
        self.kv.write_kv_slots(&mut self.writes, slot, group, kv_slots);
    }

    /// Submits `work` and returns at once.
    ///
    /// # Errors
    /// As [`PlanBuilder::dispatch`] the first time.
    ///
    /// # Panics
    /// If there are more rows than [`Runner::prefill_rows`] or more ticks than [`Runner::MAX_TICKS`].
    pub fn submit(&mut self, model: &MorModel, work: &Work<'_>) -> Result<Pending> {
        assert!(work.ticks <= Self::MAX_TICKS, "{} ticks in one submit", work.ticks);
        self.writes.flush(model.gpu());
        let num_slots = if work.num_slots == 0 { self.num_slots() } else { work.num_slots };
        let fed: usize = work.feeds.iter().map(|feed| feed.tokens.len()).sum();
        let num_ends = work.feeds.iter().filter(|feed| feed.sample).count();
        let prefill = (fed > 0).then(|| self.prefill_plan(model, fed, num_ends)).transpose()?;
        if let Some((_, tensors)) = &prefill {
            write_rows(model, tensors, work.feeds);
        }
        let (steps_of_plan, plans) = self.ticks_of_plan(work.ticks);
        let context = work.max_context;
        let decode =
            (work.ticks > 0).then(|| self.plan_of_ticks(model, num_slots, context, steps_of_plan)).transpose()?;
        let mut submission = Submission::new(model.gpu());
        for copy in work.copies {
            for (tensor, bytes) in self.kv.class_buffers(copy.class) {
                let [from, to] = [copy.from, copy.to].map(|page| u64::from(page) * bytes);
                // A buffer cannot be copied to itself.
                submission.copy(tensor, from, &self.kv.scratch, 0, bytes).copy(&self.kv.scratch, 0, tensor, to, bytes);
            }
        }
        let mut depths = None;
        if let Some((plan, tensors)) = &prefill {
            submission.plan_at_once(plan);
            depths = Some(submission.read(&tensors.depth, 0, 4 * fed as u64)?);
            if work.ticks > 0 {
                // The device is not to wait for these to be recorded.
                submission.hand_over();
            }
        }
        for _ in 0..plans {
            submission.plan(decode.as_ref().expect("recorded above"));
        }
        let next_rows = submission.read(&self.sample.next_rows, 0, (num_slots * size_of::<Row>()) as u64)?;
        let bytes = num_slots * SampleToken::RESULTS as usize * 8;
        let results = submission.read(&self.sample.results, 0, bytes as u64)?;
        submission.submit();
        let of_plan = decode.map_or(0, |plan| plan.num_dispatches());
        let prefill = prefill.map(|(plan, _)| plan);
        let num_dispatches = plans * of_plan + prefill.as_ref().map_or(0, |plan| plan.num_dispatches());
        Ok(Pending { prefill, depths, next_rows, results, num_dispatches, rows_written: self.rows_written })
    }

    /// K/V entries the sequence in a slot holds, per effective layer, as the device counted them; waits.
    ///
    /// # Errors
    /// [`KernelError::Device`](mor_kernels::KernelError::Device).
    pub fn kv_entries(&mut self, model: &MorModel, slot: usize) -> Result<Vec<usize>> {
        self.writes.flush(model.gpu());
        self.kv.entries(model, slot)
    }

    /// Logits of the rows sampled by the last prefill step, or decode step or tick, with their slots, `[n, V]`; waits.
    ///
    /// # Errors
    /// [`KernelError::Device`](mor_kernels::KernelError::Device).
    pub fn logits(&self, model: &MorModel, last_was_decode: bool) -> Result<Vec<(usize, Vec<f32>)>> {
        let tensors = self.prefill_tensors.as_ref().filter(|_| !last_was_decode).unwrap_or(&self.decode_tensors);
        let rows: Vec<ActiveRow> = model.gpu().read(&tensors.sampled.active)?;
        let logits: Vec<f32> = model.gpu().read(&tensors.logits)?;
        let logits = logits.chunks(model.logits_stride()).map(|row| row[..model.config().vocab_size].to_vec());
        let listed = rows.iter().take_while(|row| row.row != NONE).map(|row| row.sequence as usize);
        Ok(listed.zip(logits).collect())
    }

    /// Rows each recursion's block has processed in decode and prefill steps since the runner was made; one number for
    /// all recursions of depth-wise ticks, at the first. Waits.
    ///
    /// # Errors
    /// [`KernelError::Device`](mor_kernels::KernelError::Device).
    pub fn rows_processed(&self, model: &MorModel) -> Result<Vec<u64>> {
        let mut rows = vec![0; model.config().num_recursions];
        for tensors in [Some(&self.decode_tensors), self.prefill_tensors.as_ref()].into_iter().flatten() {
            for (rows, set) in rows.iter_mut().zip(&tensors.recursions) {
                *rows += u64::from(model.gpu().read::<u32>(&set.dispatch)?[0]);
            }
        }
        if let Some(layers) = self.decode_tensors.layers.as_ref().or(self.given_up.as_ref()) {
            rows.iter_mut().zip(layers.rows_processed(model)?).for_each(|(rows, more)| *rows += more);
        }
        Ok(rows)
    }

    /// The plan of a decode step or tick over the first `num_slots` slots, at up to `max_context` positions.
    ///
    /// # Errors
    /// As [`PlanBuilder::dispatch`] and [`PlanBuilder::finish`] the first time.
    pub fn decode_plan(&mut self, model: &MorModel, num_slots: usize, max_context: usize) -> Result<Arc<Plan>> {
        self.plan_of_ticks(model, num_slots, max_context, self.ticks_of_plan(1).0)
    }

    /// How many of `ticks` a plan has that draws its tokens itself, 0 of others, and how often it is run for all.
    fn ticks_of_plan(&self, ticks: usize) -> (usize, usize) {
        if self.is_persistent() && self.draws_plainly { (ticks, usize::from(ticks > 0)) } else { (0, ticks) }
    }

    /// The same of `drawn` steps that draw their tokens themselves, or of one that does not, or a tick, for 0.
    fn plan_of_ticks(
        &mut self,
        model: &MorModel,
        num_slots: usize,
        max_context: usize,
        drawn: usize,
    ) -> Result<Arc<Plan>> {
        // Few sizes, so that few plans exist.
        let num_slots = num_slots.next_power_of_two().min(self.num_slots());
        let num_splits = match num_slots {
            ..=MAX_FEW_ROWS if !self.batch_invariant && !self.is_persistent() => {
                self.num_splits(model, num_slots, max_context).min(self.decode_tensors.max_key_splits(num_slots))
            }
            _ => 1,
        };
        if let Some(plan) = self.decode.get(&(num_slots, num_splits, drawn)) {
            return Ok(Arc::clone(plan));
        }
        let mut tensors = self.decode_tensors.limited_to(num_slots);
        tensors.layers = tensors.layers.map(|layers| layers.with_tokens(drawn));
        let mut plan = PlanBuilder::new(model.gpu())?;
        let phase = if self.batch_invariant { Phase::Invariant } else { Phase::Decode { num_splits } };
        match self.batching {
            Batching::Lockstep => {
                let how = (phase, Routing::Causal, LogitRows::Sampled);
                model.record_step(&mut plan, &tensors, &self.kv.tensors, &self.sample, how, &mut |_, _| {})?;
            }
            Batching::Depthwise => {
                model.record_tick(&mut plan, &tensors, &self.kv.tensors, &self.sample, phase)?;
            }
        }
        let plan = Arc::new(plan.finish()?);
        tracing::debug!(
            num_slots,
            num_splits,
            dispatches = plan.num_dispatches(),
            "recorded the plan of a decode step"
        );
        self.decode.insert((num_slots, num_splits, drawn), Arc::clone(&plan));
        Ok(plan)
    }

    /// Records the plans of prefill steps of `num_rows` rows and of decode from `contexts.start` to `contexts.end` positions, so
    /// that no later call compiles.
    ///
    /// # Errors
    /// As [`PlanBuilder::dispatch`] and [`PlanBuilder::finish`].
    pub fn prepare(
        &mut self,
        model: &MorModel,
        num_rows: usize,
        num_slots: usize,
        contexts: Range<usize>,
    ) -> Result<()> {
        if num_rows > 0 {
            self.prefill_plan(model, num_rows, 1)?;
        }
        let mut context = contexts.start.max(1);
        while context < contexts.end {
            self.decode_plan(model, num_slots, context)?;
            context *= 2;
        }
        self.decode_plan(model, num_slots, contexts.end)?;
        Ok(())
    }

    /// A plan of the prefill step that feeds `feeds`, for measurements: it can be run again and again, since it begins by
    /// putting the lengths of K/V lists back to what they are now.
    ///
    /// # Errors
    /// As [`PlanBuilder::dispatch`] and [`PlanBuilder::finish`].
    ///
    /// # Panics
    /// If there are more rows than [`Runner::prefill_rows`].
    pub fn repeatable_prefill(&mut self, model: &MorModel, feeds: &[Feed<'_>]) -> Result<Plan> {
        let gpu = model.gpu();
        self.writes.flush(gpu);
        let tensors = self.prefill_tensors(model, feeds.iter().map(|feed| feed.tokens.len()).sum())?;
        write_rows(model, &tensors, feeds);
        let lengths = &self.kv.tensors.lengths;
        let now: Vec<u32> = gpu.read(lengths)?;
        let now = Tensor::from_slice(gpu, "kv_lengths.now", DType::U32, &[now.len()], &now)?;
        let mut plan = PlanBuilder::new(gpu)?;
        plan.part(PARTS[0]);
        plan.copy(&now, 0, lengths, 0, now.num_bytes());
        let num_ends = feeds.iter().filter(|feed| feed.sample).count();
        self.record_prefill(model, &tensors, self.most_ends(&tensors, num_ends), &mut plan)?;
        plan.finish()
    }

    /// Parts for each of `num_rows` rows of up to `num_keys` keys.
    fn num_splits(&self, model: &MorModel, num_rows: usize, num_keys: usize) -> u32 {
        let (shape, caps) = (model.attention_shape(), model.gpu().caps());
        let suggested = || AttentionDecode::suggest_splits(&shape, num_rows as u32, num_keys as u32, caps);
        self.key_splits.unwrap_or_else(suggested)
    }

    /// The plan of a prefill step of `num_rows` rows, of which `num_ends` end prompts, and the tensors it works in.
    fn prefill_plan(&mut self, model: &MorModel, num_rows: usize, num_ends: usize) -> Result<(Arc<Plan>, StepTensors)> {
        let tensors = self.prefill_tensors(model, num_rows)?;
        let num_ends = self.most_ends(&tensors, num_ends);
        if let Some(plan) = self.prefill.get(&(tensors.capacity, num_ends)) {
            return Ok((Arc::clone(plan), tensors));
        }
        let mut plan = PlanBuilder::new(model.gpu())?;
        self.record_prefill(model, &tensors, num_ends, &mut plan)?;
        let plan = Arc::new(plan.finish()?);
        let dispatches = plan.num_dispatches();
        tracing::debug!(rows = tensors.capacity, num_ends, dispatches, "recorded the plan of a prefill step");
        self.prefill.insert((tensors.capacity, num_ends), Arc::clone(&plan));
        Ok((plan, tensors))
    }

    /// How many prompts a plan expects to end where `num_ends` do: few numbers, so that few plans exist.
    fn most_ends(&self, tensors: &StepTensors, num_ends: usize) -> usize {
        // The kernels of batch-invariant plans do not depend on it.
        let num_ends = if self.batch_invariant { 1 } else { num_ends };
        num_ends.next_power_of_two().max(MAX_FEW_ROWS).min(self.num_slots()).min(tensors.capacity)
    }

    /// The tensors of a prefill step of `num_rows` rows.
    fn prefill_tensors(&mut self, model: &MorModel, num_rows: usize) -> Result<StepTensors> {
        assert!(num_rows <= self.prefill_rows, "{num_rows} rows in a prefill step of {}", self.prefill_rows);
        if self.prefill_tensors.is_none() {
            self.prefill_tensors = Some(model.step_tensors(self.prefill_rows, self.num_slots(), None)?);
        }
        // Few sizes, so that few plans exist; each with the kernels that suit it.
        let size = Self::PREFILL_SIZES.into_iter().find(|size| num_rows <= *size);
        let size = size.unwrap_or(self.prefill_rows).min(self.prefill_rows);
        Ok(self.prefill_tensors.as_ref().expect("made above").limited_to(size))
    }

    fn record_prefill(
        &self,
        model: &MorModel,
        tensors: &StepTensors,
        num_ends: usize,
        plan: &mut PlanBuilder<'_>,
    ) -> Result<()> {
        let num_splits = match num_ends {
            // They may have about as many keys as there are rows.
            ..=MAX_FEW_ROWS => {
                let most = self.num_slots().min(tensors.capacity);
                self.num_splits(model, num_ends, tensors.capacity).min(tensors.max_key_splits(most))
            }
            _ => 1,
        };
        let phase = if self.batch_invariant { Phase::Invariant } else { Phase::Prefill { num_splits, num_ends } };
        let how = (phase, Routing::Causal, LogitRows::Sampled);
        model.record_step(plan, tensors, &self.kv.tensors, &self.sample, how, &mut |_, _| {})
    }
}

/// Puts the rows of `feeds` into the tensors of a step.
pub(crate) fn write_rows(model: &MorModel, tensors: &StepTensors, feeds: &[Feed<'_>]) {
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
