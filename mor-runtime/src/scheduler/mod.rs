//! [`Scheduler`]: which sequence runs in which slot, when, with which K/V pages. It knows no device: it plans
//! [`Step`]s ahead of their results from what it can know, and is told the results in order.
//!
//! A sequence waits, is admitted to a slot with the pages of its prompt, reads all of the prompt but its last token in
//! chunks, and enters the decode batch with that one; where nobody decodes yet, the last chunk has that one too, and its step
//! draws the first token. From then on the device feeds itself, and the host knows bounds: a tick draws at most one token a
//! slot, so pages are taken for as many tokens as ticks are under way, and given back where tokens turn out to leave
//! recursions early. When pages run out, beginnings that nobody uses go first, then the youngest sequence: it gives up its
//! slot and reads its tokens again later. Sequences are admitted in the order of their arrival and the oldest is never
//! displaced, so each one ends. Plans depend on the order of arrivals and on results, not on the clock.

use std::collections::BTreeMap;

use mor_kernels::rows::PAGE_SIZE;
use mor_model::KvLayout;

use crate::page_pool::PagePool;
use crate::prefix_cache::{BlockId, Prefix, PrefixCache};

/// Number of a sequence, in the order of arrival.
pub(crate) type SequenceId = u64;

/// Most rows of a prefill step while other sequences decode: a long prompt must not hold them up.
pub(crate) const ROWS_BESIDE_DECODING: usize = 512;

/// Most sequences whose first tokens a prefill step draws. It computes the logits of each with a matrix-vector product; for
/// many, the ticks' product of all is the cheaper one.
const MOST_FIRST_DRAWS: usize = 8;

/// What a scheduler needs to know of the model and the device's memory.
#[derive(Clone, Debug)]
pub(crate) struct SchedulerOptions {
    pub(crate) layout: KvLayout,
    /// Class of each K/V group's pages; `None` for a group without entries.
    pub(crate) class_of_group: Vec<Option<usize>>,
    pub(crate) pages_in_class: Vec<usize>,
    pub(crate) num_slots: usize,
    /// Most rows of a prefill step.
    pub(crate) prefill_rows: usize,
    /// Ticks of a step.
    pub(crate) ticks: usize,
    /// Most ticks that a token takes.
    pub(crate) ticks_of_token: usize,
    /// Keep beginnings of sequences for others.
    pub(crate) share_prefixes: bool,
    /// Number of the first sequence.
    pub(crate) first_id: SequenceId,
}

/// A sequence is put into a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    pub(crate) slot: usize,
    pub(crate) id: SequenceId,
    /// Entries that each K/V group holds already.
    pub(crate) entries: Vec<u32>,
    /// Recursions of the tokens that they belong to.
    pub(crate) depths: Vec<u32>,
}

/// A K/V page to be copied, in all buffers of its class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    /// Class of both pages.
    pub class: usize,
    /// Page that is read.
    pub from: u32,
    /// Page that is written.
    pub to: u32,
}

/// Entries of a slot's page table for a group, from the `first` on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PageWrite {
    pub(crate) slot: usize,
    pub(crate) group: usize,
    pub(crate) first: usize,
    pub(crate) pages: Vec<u32>,
}

/// Tokens of a sequence that a prefill step reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) slot: usize,
    pub(crate) id: SequenceId,
    pub(crate) position: usize,
    pub(crate) len: usize,
    /// Whether the token after them is drawn: they are the last of the sequence.
    pub(crate) draws: bool,
}

/// A token that a slot's decoding starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) slot: usize,
    pub(crate) position: usize,
    pub(crate) token: u32,
}

/// What to do next, in the order of the fields.
#[derive(Clone, Debug, Default)]
pub(crate) struct Step {
    /// Slots whose sequence ends here, whatever the device thinks.
    pub(crate) stops: Vec<usize>,
    pub(crate) starts: Vec<Start>,
    pub(crate) page_writes: Vec<PageWrite>,
    pub(crate) copies: Vec<PageCopy>,
    pub(crate) entries: Vec<Entry>,
    /// Rows of a prefill step, slots ascending.
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) ticks: usize,
    /// Slots that may be occupied: the first ones.
    pub(crate) num_slots: usize,
    /// No sequence is longer in these ticks.
    pub(crate) max_context: usize,
    /// Slots that decode, with the sequence and the number of its admission.
    decoding: Vec<(usize, SequenceId, u64)>,
    /// Admissions of the sequences of `chunks`.
    reading: Vec<u64>,
}

/// A token that the device drew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Position of the token that was fed.
    pub position: usize,
    /// Recursions it took.
    pub depth: u32,
    /// Token drawn after it.
    pub next_token: u32,
}

/// What a step has brought for a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) id: SequenceId,
    /// Position of the first of `depths`.
    pub(crate) position: usize,
    /// Recursions of tokens that were read, but for one that a token was drawn after.
    pub(crate) depths: Vec<u32>,
    /// Tokens drawn, ascending.
    pub(crate) outcomes: Vec<Outcome>,
    /// Whether a prefill step drew the first of them.
    pub(crate) drew_reading: bool,
}

/// K/V pages and entries, by class of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageUse {
    /// Pages in all.
    pub(crate) total: usize,
    /// Pages that sequences or kept beginnings hold.
    pub(crate) held: usize,
    /// Pages that only kept beginnings hold.
    pub(crate) kept: usize,
    /// Entries of running sequences, those in shared pages once a sequence.
    pub(crate) entries: usize,
    /// Pages of running sequences, shared ones once a sequence.
    pub(crate) pages: usize,
}

/// A sequence that has not ended.
#[derive(Debug)]
struct Sequence {
    /// Prompt and drawn tokens.
    tokens: Vec<u32>,
    /// Tokens at which it ends.
    limit: usize,
}

/// A sequence in a slot.
#[derive(Debug)]
struct Running {
    id: SequenceId,
    sequence: Sequence,
    /// Number of its admission: results of an earlier stay are not its own.
    admission: u64,
    /// Recursions of the tokens with entries in its pages, as far as they are known.
    depths: Vec<u32>,
    /// Tokens that prefill steps read, those of a shared beginning included.
    to_read: usize,
    /// Of these, the ones that planned steps have read.
    read: usize,
    /// Whether it has entered the decode batch.
    decodes: bool,
    /// Ticks planned for it whose results have not arrived.
    ticks_ahead: usize,
    /// Whether a prefill step is under way that draws a token for it.
    draw_ahead: bool,
    /// Entries of the tokens with known depths, per group.
    entries: Vec<usize>,
    /// Per group, in the order of entries.
    pages: Vec<Vec<u32>>,
    /// The last block of it that the prefix cache keeps.
    kept: Option<BlockId>,
}

/// Plans steps and keeps track of sequences, slots and pages.
#[derive(Debug)]
pub(crate) struct Scheduler {
    options: SchedulerOptions,
    waiting: BTreeMap<SequenceId, Sequence>,
    slots: Vec<Option<Running>>,
    /// Slots of the sequences that have one.
    slot_of: BTreeMap<SequenceId, usize>,
    pool: PagePool,
    prefixes: Option<PrefixCache>,
    next_id: SequenceId,
    num_admissions: u64,
    num_preemptions: u64,
    num_reused: u64,
    /// Slots to be stopped on the device by the next step.
    stops: Vec<usize>,
    /// The oldest waiting sequence found no pages, and none has been given back since.
    is_short: bool,
}

impl Scheduler {
    pub(crate) fn new(options: SchedulerOptions) -> Self {
        Self {
            waiting: BTreeMap::new(),
            slots: (0..options.num_slots).map(|_| None).collect(),
            slot_of: BTreeMap::new(),
            pool: PagePool::new(&options.pages_in_class),
            prefixes: options
                .share_prefixes
                .then(|| PrefixCache::new(options.layout.clone(), options.class_of_group.clone())),
            next_id: options.first_id,
            num_admissions: 0,
            num_preemptions: 0,
            num_reused: 0,
            stops: Vec::new(),
            is_short: false,
            options,
        }
    }

    /// The class that has too few pages for a sequence of `limit` tokens even if it runs alone: (class, pages needed,
    /// pages there are).
    pub(crate) fn never_fits(&self, limit: usize) -> Option<(usize, usize, usize)> {
        (0..self.options.pages_in_class.len()).find_map(|class| {
            let groups = self.options.class_of_group.iter().filter(|of| **of == Some(class)).count();
            let (needed, there) = (groups * pages_for(limit), self.pool.num_pages(class));
            (needed > there).then_some((class, needed, there))
        })
    }

    /// Takes a sequence in: its first tokens, at least one, and the number of tokens at which it ends.
    pub(crate) fn submit(&mut self, tokens: Vec<u32>, limit: usize) -> SequenceId {
        debug_assert!(!tokens.is_empty() && limit >= tokens.len() && self.never_fits(limit).is_none());
        let id = self.next_id;
        self.next_id += 1;
        self.waiting.insert(id, Sequence { tokens, limit });
        id
    }

    /// Forgets a sequence; its pages are free for what is planned from now on. `on_device`: it still runs there.
    pub(crate) fn finish(&mut self, id: SequenceId, on_device: bool) {
        if self.waiting.remove(&id).is_none()
            && let Some(slot) = self.slot_of.get(&id)
        {
            self.vacate(*slot, on_device);
        }
    }

    /// Prompt and drawn tokens of a sequence.
    pub(crate) fn tokens(&self, id: SequenceId) -> &[u32] {
        let running = || self.running(id).map(|running| &running.sequence);
        self.waiting.get(&id).or_else(running).map_or(&[], |sequence| &sequence.tokens)
    }

    /// The number of the next sequence.
    pub(crate) fn next_id(&self) -> SequenceId {
        self.next_id
    }

    /// Pages of a running sequence, per group.
    pub(crate) fn pages(&self, id: SequenceId) -> &[Vec<u32>] {
        self.running(id).map_or(&[], |running| &running.pages)
    }

    fn running(&self, id: SequenceId) -> Option<&Running> {
        self.slot_of.get(&id).and_then(|slot| self.slots[*slot].as_ref())
    }

    /// Sequences that have not ended: (in slots, waiting).
    pub(crate) fn num_sequences(&self) -> (usize, usize) {
        (self.slot_of.len(), self.waiting.len())
    }

    /// Times that a sequence gave up its slot because pages ran out.
    pub(crate) fn num_preemptions(&self) -> u64 {
        self.num_preemptions
    }

    /// Tokens whose entries were taken over from another sequence.
    pub(crate) fn num_reused(&self) -> u64 {
        self.num_reused
    }

    /// Changes the most rows of a prefill step.
    pub(crate) fn set_prefill_rows(&mut self, prefill_rows: usize) {
        self.options.prefill_rows = prefill_rows;
    }

    /// Most rows of a prefill step.
    pub(crate) fn prefill_rows(&self) -> usize {
        self.options.prefill_rows
    }

    /// Changes the ticks of a step.
    pub(crate) fn set_ticks(&mut self, ticks: usize) {
        self.options.ticks = ticks;
    }

    /// Ticks of a step.
    pub(crate) fn ticks(&self) -> usize {
        self.options.ticks
    }

    /// How full the pages of a class are.
    pub(crate) fn page_use(&self, class: usize) -> PageUse {
        let total = self.pool.num_pages(class);
        let mut found = PageUse { total, held: total - self.pool.num_free(class), ..PageUse::default() };
        let mut held: Vec<u32> = Vec::new();
        for running in self.slots.iter().flatten() {
            for (group, of) in self.options.class_of_group.iter().enumerate() {
                if *of == Some(class) {
                    found.entries += running.entries[group];
                    held.extend(&running.pages[group]);
                }
            }
        }
        found.pages = held.len();
        held.sort_unstable();
        held.dedup();
        found.kept = found.held - held.len();
        found
    }

    /// What to do next; `None` if that depends on results that have not arrived, or there is nothing to do.
    pub(crate) fn plan(&mut self) -> Option<Step> {
        let mut step = Step { stops: std::mem::take(&mut self.stops), ..Step::default() };
        self.grow(&mut step);
        self.admit(&mut step);
        self.read(&mut step);
        self.decode(&mut step);
        if step.ticks == 0 && step.chunks.is_empty() {
            // Stops wait for a step that does something; a slot that is started again needs none.
            self.stops = step.stops;
            debug_assert!(step.starts.is_empty() && step.copies.is_empty(), "whoever starts reads or decodes");
            return None;
        }
        let started: Vec<usize> = step.starts.iter().map(|start| start.slot).collect();
        step.stops.retain(|slot| !started.contains(slot));
        step.num_slots = self.slots.iter().rposition(Option::is_some).map_or(1, |last| last + 1);
        Some(step)
    }

    /// Takes in what a planned step has brought: recursions of the rows of its chunks, in their order, and the tokens
    /// drawn in a slot from a position on. Steps complete in the order of their plans.
    pub(crate) fn complete(
        &mut self,
        step: &Step,
        depths: &[u32],
        drawn: &dyn Fn(usize, usize) -> Vec<Outcome>,
    ) -> Vec<Progress> {
        let mut progress: Vec<Progress> = Vec::new();
        let layout = &self.options.layout;
        let mut of_slot = vec![None; self.slots.len()];
        let mut rest = depths;
        for (chunk, admission) in step.chunks.iter().zip(&step.reading) {
            let (own, others) = rest.split_at(chunk.len);
            rest = others;
            let Some(running) = staying(&mut self.slots, chunk.slot, *admission) else { continue };
            running.count(layout, own);
            of_slot[chunk.slot] = Some(progress.len());
            let (mut depths, mut outcomes) = (own.to_vec(), Vec::new());
            if chunk.draws {
                depths.pop();
                running.draw_ahead = false;
                outcomes = drawn(chunk.slot, chunk.position + depths.len());
                running.sequence.tokens.extend(outcomes.iter().map(|outcome| outcome.next_token));
            }
            let (id, position) = (chunk.id, chunk.position);
            progress.push(Progress { id, position, depths, outcomes, drew_reading: chunk.draws });
        }
        for (slot, id, admission) in &step.decoding {
            let Some(running) = staying(&mut self.slots, *slot, *admission) else { continue };
            running.ticks_ahead -= step.ticks;
            let outcomes = drawn(*slot, running.depths.len());
            for outcome in &outcomes {
                running.count(layout, &[outcome.depth]);
                running.sequence.tokens.push(outcome.next_token);
            }
            match of_slot[*slot] {
                Some(index) => progress[index].outcomes = outcomes,
                None if outcomes.is_empty() => {}
                None => {
                    of_slot[*slot] = Some(progress.len());
                    let (position, depths) = (0, Vec::new());
                    progress.push(Progress { id: *id, position, depths, outcomes, drew_reading: false });
                }
            }
        }
        for (slot, index) in of_slot.into_iter().enumerate() {
            if let Some(index) = index {
                self.settle(slot, !progress[index].depths.is_empty());
            }
        }
        progress.sort_unstable_by_key(|progress| progress.id);
        progress
    }

    /// Gives back the pages that a sequence will not need, now that more of its depths are known; what it `has_read` is kept
    /// for others.
    fn settle(&mut self, slot: usize, has_read: bool) {
        let Some(running) = &mut self.slots[slot] else { return };
        for (group, class) in self.options.class_of_group.iter().enumerate() {
            let Some(class) = *class else { continue };
            let needed = pages_for(running.bound(group, self.options.ticks));
            while running.pages[group].len() > needed {
                self.pool.release(class, running.pages[group].pop().expect("it has more than needed"));
                self.is_short = false;
            }
        }
        if let Some(prefixes) = &mut self.prefixes
            && has_read
        {
            let tokens = &running.sequence.tokens;
            running.kept = prefixes.insert(running.kept, tokens, &running.depths, &running.pages, &mut self.pool);
        }
    }

    /// Takes a sequence out of its slot.
    fn vacate(&mut self, slot: usize, on_device: bool) -> Option<Running> {
        let running = self.slots[slot].take()?;
        self.slot_of.remove(&running.id);
        if let Some(prefixes) = &mut self.prefixes {
            let tokens = &running.sequence.tokens;
            prefixes.insert(running.kept, tokens, &running.depths, &running.pages, &mut self.pool);
        }
        self.release(&running.pages);
        self.is_short = false;
        if on_device {
            self.stops.push(slot);
        }
        Some(running)
    }

    /// Gives pages back, listed per group.
    fn release(&mut self, pages: &[Vec<u32>]) {
        for (pages, class) in pages.iter().zip(&self.options.class_of_group) {
            if let Some(class) = *class {
                pages.iter().for_each(|page| self.pool.release(class, *page));
            }
        }
    }

    /// Takes `count` pages of a class, at the cost of kept beginnings; all or none.
    fn take_pages(&mut self, class: usize, count: usize) -> Option<Vec<u32>> {
        while self.pool.num_free(class) < count {
            if !self.prefixes.as_mut().is_some_and(|prefixes| prefixes.evict(&mut self.pool)) {
                return None;
            }
        }
        Some((0..count).map(|_| self.pool.allocate(class).expect("counted")).collect())
    }

    /// Puts waiting sequences into free slots, the oldest first, as long as there are pages for their prompts.
    fn admit(&mut self, step: &mut Step) {
        while !self.is_short
            && let Some((id, sequence)) = self.waiting.pop_first()
        {
            let Some(slot) = self.slots.iter().position(Option::is_none) else {
                self.waiting.insert(id, sequence);
                return;
            };
            // The first try may fail for the page of a beginning that it holds to copy; then that has been given up.
            let started = self.start(id, sequence, slot, step);
            if let Err(sequence) = started.or_else(|sequence| self.start(id, sequence, slot, step)) {
                // Younger ones that might fit wait too, or a large one would never have its turn.
                self.waiting.insert(id, sequence);
                self.is_short = true;
            }
        }
    }

    /// Puts a sequence into a slot, or returns it if there are too few pages.
    fn start(&mut self, id: SequenceId, sequence: Sequence, slot: usize, step: &mut Step) -> Result<(), Sequence> {
        let num_tokens = sequence.tokens.len();
        // The last token is decoded, to draw the one after it; where none is wanted it is read.
        let to_read = if sequence.limit == num_tokens { num_tokens } else { num_tokens - 1 };
        let num_groups = self.options.class_of_group.len();
        let prefix = match &mut self.prefixes {
            Some(prefixes) => prefixes.find(&sequence.tokens, num_tokens - 1, &mut self.pool),
            None => Prefix::none(num_groups),
        };
        let mut running = Running {
            id,
            sequence,
            admission: self.num_admissions,
            depths: Vec::new(),
            to_read,
            read: prefix.depths.len(),
            decodes: false,
            ticks_ahead: 0,
            draw_ahead: false,
            entries: vec![0; num_groups],
            pages: prefix.full,
            kept: prefix.end,
        };
        running.count(&self.options.layout, &prefix.depths);
        let shared: Vec<usize> = running.pages.iter().map(Vec::len).collect();
        let mut fits = true;
        for (group, shared) in shared.iter().enumerate() {
            let Some(class) = self.options.class_of_group[group] else { continue };
            let needed = pages_for(running.bound(group, self.options.ticks)) - shared;
            match self.take_pages(class, needed) {
                Some(pages) => running.pages[group].extend(pages),
                None => {
                    fits = false;
                    break;
                }
            }
        }
        // The page to copy was held lest it be given up for one of those just taken.
        for (group, from) in prefix.partial.iter().enumerate() {
            let (Some(class), Some(from)) = (self.options.class_of_group[group], *from) else { continue };
            if fits {
                step.copies.push(PageCopy { class, from, to: running.pages[group][shared[group]] });
            }
            self.pool.release(class, from);
        }
        if !fits {
            self.release(&running.pages);
            return Err(running.sequence);
        }
        for (group, pages) in running.pages.iter().enumerate().filter(|(_, pages)| !pages.is_empty()) {
            step.page_writes.push(PageWrite { slot, group, first: 0, pages: pages.clone() });
        }
        let entries = running.entries.iter().map(|entries| *entries as u32).collect();
        step.starts.push(Start { slot, id, entries, depths: prefix.depths });
        self.num_reused += running.read as u64;
        self.num_admissions += 1;
        self.slot_of.insert(id, slot);
        self.slots[slot] = Some(running);
        Ok(())
    }

    /// Takes the pages that decoding sequences may need in the ticks of this step, the oldest first. Where there are
    /// none, the youngest sequence is displaced.
    fn grow(&mut self, step: &mut Step) {
        let mut order: Vec<usize> = self.slot_of.values().copied().collect();
        let mut next = 0;
        while next < order.len() {
            if self.grow_one(order[next], step) {
                next += 1;
            } else {
                self.preempt(order.pop().expect("one of them wants pages"), step);
            }
        }
    }

    fn grow_one(&mut self, slot: usize, step: &mut Step) -> bool {
        for group in 0..self.options.class_of_group.len() {
            let Some(class) = self.options.class_of_group[group] else { continue };
            let running = self.slots[slot].as_ref().expect("it runs");
            if !running.decodes {
                // Its pages were taken when it was admitted.
                return true;
            }
            let needed = pages_for(running.bound(group, self.options.ticks));
            let first = running.pages[group].len();
            if needed <= first {
                continue;
            }
            let Some(pages) = self.take_pages(class, needed - first) else { return false };
            self.slots[slot].as_mut().expect("it runs").pages[group].extend(&pages);
            step.page_writes.push(PageWrite { slot, group, first, pages });
        }
        true
    }

    /// Displaces a sequence: it waits again, with all its tokens as its prompt.
    fn preempt(&mut self, slot: usize, step: &mut Step) {
        let running = self.vacate(slot, true).expect("it runs");
        step.stops.append(&mut self.stops);
        self.waiting.insert(running.id, running.sequence);
        self.num_preemptions += 1;
        // Its pages are for those who run.
        self.is_short = true;
    }

    /// Shares the rows of a prefill step among the sequences that read: equal parts, what is left to the oldest.
    fn read(&mut self, step: &mut Step) {
        let remaining = |running: &Running| running.to_read - running.read;
        let reads = |slot: &usize| self.slots[*slot].as_ref().map_or(0, remaining) > 0;
        let reading: Vec<usize> = self.slot_of.values().copied().filter(reads).collect();
        if reading.is_empty() {
            return;
        }
        let decodes = self.slots.iter().flatten().any(|running| running.decodes);
        let mut left = self.options.prefill_rows.min(if decodes { ROWS_BESIDE_DECODING } else { usize::MAX });
        let part = (left / reading.len()).max(PAGE_SIZE as usize);
        let mut rows = vec![0; reading.len()];
        for most in [part, usize::MAX] {
            for (rows, slot) in rows.iter_mut().zip(&reading) {
                let remaining = self.slots[*slot].as_ref().map_or(0, remaining);
                let more = (remaining - *rows).min(most).min(left);
                *rows += more;
                left -= more;
            }
        }
        // Those who only decode are not among the readers.
        let all_begin = self.slots.iter().flatten().all(|running| running.read < running.to_read);
        let may_draw = all_begin && reading.len() <= MOST_FIRST_DRAWS;
        let mut chunks: Vec<_> = reading.into_iter().zip(rows).filter(|(_, rows)| *rows > 0).collect();
        chunks.sort_unstable();
        for (slot, mut len) in chunks {
            let running = self.slots[slot].as_mut().expect("it runs");
            let wants_token = running.to_read < running.sequence.tokens.len();
            let draws = may_draw && left > 0 && wants_token && running.read + len == running.to_read;
            if draws {
                left -= 1;
                len += 1;
                running.to_read += 1;
                (running.decodes, running.draw_ahead) = (true, true);
            }
            step.chunks.push(Chunk { slot, id: running.id, position: running.read, len, draws });
            step.reading.push(running.admission);
            running.read += len;
        }
    }

    /// Lets sequences that have read their prompts decode.
    fn decode(&mut self, step: &mut Step) {
        // The first tokens that a prefill step draws arrive with its results: nothing is to come between.
        if step.chunks.iter().any(|chunk| chunk.draws) {
            return;
        }
        // Whose prompts were just read wait for their first tokens, and nobody else for more.
        let all_begin = self.slots.iter().flatten().all(|running| !running.decodes);
        let ticks = if all_begin && self.options.ticks_of_token == 1 { 1 } else { self.options.ticks };
        let mut any = false;
        for (slot, running) in self.slots.iter_mut().enumerate() {
            let Some(running) = running else { continue };
            let sequence = &running.sequence;
            if running.read < running.to_read || running.to_read == sequence.limit {
                continue;
            }
            if !running.decodes {
                running.decodes = true;
                let position = running.to_read;
                step.entries.push(Entry { slot, position, token: sequence.tokens[position] });
            }
            // A token is drawn in the tick after its last recursion.
            let surely_drawn =
                usize::from(running.draw_ahead) + running.ticks_ahead.saturating_sub(1) / self.options.ticks_of_token;
            any |= sequence.tokens.len() + surely_drawn < sequence.limit;
            step.decoding.push((slot, running.id, running.admission));
            let context = running.depths.len().max(running.read) + running.ticks_ahead + ticks + 1;
            step.max_context = step.max_context.max(context.min(sequence.limit));
        }
        if !any {
            step.decoding.clear();
            return;
        }
        step.ticks = ticks;
        for (slot, ..) in &step.decoding {
            self.slots[*slot].as_mut().expect("it runs").ticks_ahead += ticks;
        }
    }
}

impl Running {
    /// Takes in the depths of the next tokens.
    fn count(&mut self, layout: &KvLayout, depths: &[u32]) {
        for (group, entries) in self.entries.iter_mut().enumerate() {
            *entries += depths.iter().filter(|depth| layout.group_holds(group, **depth)).count();
        }
        self.depths.extend_from_slice(depths);
    }

    /// No more entries than these can lie in a group once `ticks` more ticks are planned.
    fn bound(&self, group: usize, ticks: usize) -> usize {
        // Tokens of the prompt whose depths are not known; one token may be under way where the results end.
        let ahead = self.to_read.saturating_sub(self.depths.len()) + 1 + self.ticks_ahead + ticks;
        (self.entries[group] + ahead).min(self.sequence.limit)
    }
}

/// The sequence in a slot, if it is there since the admission of that number.
fn staying(slots: &mut [Option<Running>], slot: usize, admission: u64) -> Option<&mut Running> {
    slots[slot].as_mut().filter(|running| running.admission == admission)
}

fn pages_for(entries: usize) -> usize {
    entries.div_ceil(PAGE_SIZE as usize)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use mor_kernels::parity::Rng;
    use mor_model::{LayerLayout, MorConfig};

    use super::*;

    const PAGE: usize = PAGE_SIZE as usize;
    const RECURSIONS: usize = 3;
    const GROUPS: usize = 1 + RECURSIONS;

    fn options(kv: &str, num_slots: usize, pages: usize) -> SchedulerOptions {
        let text = format!(
            r#"{{ "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 5,
                "num_attention_heads": 4, "rms_norm_eps": 1e-5,
                "mor": {{ "mode": "expert", "sharing": "middle_cycle", "num_recursion": 3, "kv": "{kv}" }} }}"#
        );
        let config = MorConfig::from_json_str(&text, "test").expect("the configuration is valid");
        let layout = KvLayout::new(&config, &LayerLayout::new(&config));
        let has_entries = |group| layout.group_holds(group, RECURSIONS as u32);
        let class_of_group = (0..GROUPS).map(|group| has_entries(group).then_some(usize::from(group > 0))).collect();
        SchedulerOptions {
            layout,
            class_of_group,
            pages_in_class: vec![pages, RECURSIONS * pages],
            num_slots,
            prefill_rows: 64,
            ticks: 2,
            ticks_of_token: RECURSIONS,
            share_prefixes: true,
            first_id: 0,
        }
    }

    /// What stands for everything a token computes: it depends on the tokens up to it alone.
    fn digest(tokens: &[u32]) -> u64 {
        tokens.iter().fold(7, |hash: u64, token| {
            let mixed = (hash ^ u64::from(*token)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed ^ (mixed >> 29)
        })
    }

    fn depth(tokens: &[u32]) -> u32 {
        (digest(tokens) >> 7) as u32 % 4
    }

    fn next_token(tokens: &[u32]) -> u32 {
        (digest(tokens) >> 17) as u32 % 5
    }

    /// A device: it runs steps as the kernels do and checks every entry that a token could attend to.
    struct Device {
        layout: KvLayout,
        class_of_group: Vec<Option<usize>>,
        /// Per class, the digests of the entries' tokens.
        memory: Vec<Vec<u64>>,
        slots: Vec<Slot>,
    }

    #[derive(Clone, Default)]
    struct Slot {
        limit: usize,
        tokens: Vec<u32>,
        lengths: [usize; GROUPS],
        pages: [Vec<u32>; GROUPS],
        /// The token in it has taken so many ticks; `None`: no token.
        passes: Option<u32>,
        /// Whether the last token of `tokens` waits to move in.
        has_next: bool,
        drawn: Vec<Outcome>,
    }

    impl Slot {
        fn draw(&mut self) {
            let next_token = next_token(&self.tokens);
            let position = self.tokens.len() - 1;
            self.drawn.push(Outcome { position, depth: depth(&self.tokens), next_token });
            if next_token != 0 && position + 2 < self.limit {
                self.tokens.push(next_token);
                self.has_next = true;
            }
        }
    }

    impl Device {
        fn store(&mut self, slot: usize, group: usize) {
            let (layout, state) = (&self.layout, &mut self.slots[slot]);
            let Some(class) = self.class_of_group[group] else { return };
            let at = state.lengths[group];
            state.lengths[group] += 1;
            let place = state.pages[group][at / PAGE] as usize * PAGE + at % PAGE;
            self.memory[class][place] = digest(&state.tokens);
            // Every entry of the group is that of the right token.
            let holders = (1..=state.tokens.len()).filter(|n| layout.group_holds(group, depth(&state.tokens[..*n])));
            for (index, n) in holders.enumerate() {
                let place = state.pages[group][index / PAGE] as usize * PAGE + index % PAGE;
                assert_eq!(self.memory[class][place], digest(&state.tokens[..n]), "slot {slot}, group {group}");
            }
        }

        fn run(&mut self, step: &Step, scheduler: &Scheduler, limits: &[usize]) -> (Vec<u32>, Vec<Vec<Outcome>>) {
            for slot in &step.stops {
                self.slots[*slot] = Slot::default();
            }
            for start in &step.starts {
                let slot = &mut self.slots[start.slot];
                *slot = Slot { limit: limits[start.id as usize], ..Slot::default() };
                slot.tokens = scheduler.tokens(start.id)[..start.depths.len()].to_vec();
                slot.lengths.iter_mut().zip(&start.entries).for_each(|(length, entries)| *length = *entries as usize);
            }
            for write in &step.page_writes {
                let pages = &mut self.slots[write.slot].pages[write.group];
                pages.truncate(write.first);
                assert_eq!(pages.len(), write.first);
                pages.extend(&write.pages);
            }
            for copy in &step.copies {
                let (from, to) = (copy.from as usize * PAGE, copy.to as usize * PAGE);
                self.memory[copy.class].copy_within(from..from + PAGE, to);
            }
            let mut depths = Vec::new();
            for chunk in &step.chunks {
                assert_eq!(self.slots[chunk.slot].tokens.len(), chunk.position);
                for token in &scheduler.tokens(chunk.id)[chunk.position..chunk.position + chunk.len] {
                    self.slots[chunk.slot].tokens.push(*token);
                    let depth = depth(&self.slots[chunk.slot].tokens);
                    depths.push(depth);
                    for group in 0..GROUPS {
                        if self.layout.group_holds(group, depth) {
                            self.store(chunk.slot, group);
                        }
                    }
                }
                if chunk.draws {
                    self.slots[chunk.slot].draw();
                }
            }
            for entry in &step.entries {
                let slot = &mut self.slots[entry.slot];
                assert_eq!(slot.tokens.len(), entry.position);
                slot.tokens.push(entry.token);
                slot.has_next = true;
            }
            let mut drawn = vec![Vec::new(); self.slots.len()];
            for _ in 0..step.ticks {
                for slot in 0..step.num_slots {
                    self.tick(slot);
                }
            }
            for (drawn, slot) in drawn.iter_mut().zip(&mut self.slots) {
                *drawn = std::mem::take(&mut slot.drawn);
            }
            (depths, drawn)
        }

        fn tick(&mut self, at: usize) {
            let slot = &mut self.slots[at];
            if let Some(passes) = slot.passes
                && passes >= depth(&slot.tokens)
            {
                slot.passes = None;
                slot.draw();
            }
            let slot = &mut self.slots[at];
            let enters = slot.passes.is_none() && std::mem::take(&mut slot.has_next);
            if enters {
                slot.passes = Some(0);
                self.store(at, 0);
            }
            let slot = &mut self.slots[at];
            if let Some(passes) = slot.passes {
                let depth = depth(&slot.tokens);
                let group = 1 + passes as usize;
                let runs = passes < depth || (passes == 0 && self.layout.group_holds(1, 0));
                if runs {
                    slot.passes = Some(passes + 1);
                    if self.layout.group_holds(group, depth) {
                        self.store(at, group);
                    }
                }
            }
        }
    }

    /// Runs `requests` of (tokens, limit, cancelled after so many new tokens) with several steps under way; returns the
    /// tokens of each and the order in which they ended.
    fn run(
        scheduler: &mut Scheduler,
        requests: &[(Vec<u32>, usize, Option<usize>)],
        rng: &mut Rng,
    ) -> (Vec<Vec<u32>>, Vec<u64>) {
        let limits: Vec<usize> = requests.iter().map(|request| request.1).collect();
        let mut device = Device {
            layout: scheduler.options.layout.clone(),
            class_of_group: scheduler.options.class_of_group.clone(),
            memory: scheduler.options.pages_in_class.iter().map(|pages| vec![0; pages * PAGE]).collect(),
            slots: vec![Slot::default(); scheduler.options.num_slots],
        };
        let mut results: Vec<Vec<u32>> = requests.iter().map(|request| request.0.clone()).collect();
        let (mut ended, mut in_flight, mut submitted) = (Vec::new(), VecDeque::new(), 0);
        while ended.len() < requests.len() {
            while submitted < requests.len() && (submitted < 4 || rng.below(3) == 0) {
                let (tokens, limit, _) = &requests[submitted];
                assert_eq!(scheduler.submit(tokens.clone(), *limit), submitted as u64);
                submitted += 1;
            }
            while in_flight.len() < 4 {
                let Some(step) = scheduler.plan() else { break };
                // The device runs later than the plan, but in order: its results are those of now.
                let results = device.run(&step, scheduler, &limits);
                in_flight.push_back((step, results));
            }
            let Some((step, (depths, drawn))) = in_flight.pop_front() else {
                assert!(submitted < requests.len(), "nothing to do, but {} of {} ended", ended.len(), requests.len());
                continue;
            };
            let take = |slot: usize, from: usize| {
                let new: Vec<_> = drawn[slot].iter().filter(|outcome| outcome.position >= from).copied().collect();
                assert_eq!(new.len(), drawn[slot].len());
                new
            };
            for progress in scheduler.complete(&step, &depths, &take) {
                let (prompt, limit, cancel) = &requests[progress.id as usize];
                let tokens = &mut results[progress.id as usize];
                let mut end = progress.depths.len() + progress.position == *limit;
                let mut on_device = false;
                for outcome in progress.outcomes {
                    assert_eq!(outcome.position + 1, tokens.len());
                    tokens.push(outcome.next_token);
                    end |= outcome.next_token == 0 || tokens.len() == *limit;
                    if !end && *cancel == Some(tokens.len() - prompt.len()) {
                        (end, on_device) = (true, true);
                    }
                    if end {
                        break;
                    }
                }
                if end {
                    scheduler.finish(progress.id, on_device);
                    ended.push(progress.id);
                }
            }
        }
        (results, ended)
    }

    fn alone((prompt, limit, cancel): &(Vec<u32>, usize, Option<usize>)) -> Vec<u32> {
        let mut tokens = prompt.clone();
        while tokens.len() < *limit {
            tokens.push(next_token(&tokens));
            if tokens.last() == Some(&0) || *cancel == Some(tokens.len() - prompt.len()) {
                break;
            }
        }
        tokens
    }

    fn requests(rng: &mut Rng, count: usize, longest: usize) -> Vec<(Vec<u32>, usize, Option<usize>)> {
        let request = |_| {
            // Few tokens, so that many begin alike.
            let common = rng.below(longest / 2);
            let own = 1 + rng.below(longest / 4);
            let tokens: Vec<u32> = (0..common as u32).map(|i| 1 + i % 3).chain((0..own).map(|_| 1)).collect();
            let limit = (tokens.len() + rng.below(longest / 4)).min(longest);
            let cancel = (rng.below(5) == 0).then(|| 1 + rng.below(8));
            (tokens, limit, cancel)
        };
        (0..count).map(request).collect()
    }

    #[test]
    fn any_batch_is_each_sequence_alone() {
        for (i, kv) in ["recursion_wise", "sharing", "hybrid"].into_iter().cycle().take(24).enumerate() {
            let mut rng = Rng::new(&format!("scheduler {i}"));
            let (slots, pages) = (1 + rng.below(6), 5 + rng.below(12));
            let mut scheduler = Scheduler::new(options(kv, slots, pages));
            let requests = requests(&mut rng, 40, 150);
            let (results, ended) = run(&mut scheduler, &requests, &mut rng);
            for (result, request) in results.iter().zip(&requests) {
                assert_eq!(*result, alone(request), "{kv}, {slots} slots, {pages} pages");
            }
            let mut sorted = ended.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..40).collect::<Vec<_>>(), "each ends once");
            // Every page returns once the kept beginnings are given up.
            let prefixes = scheduler.prefixes.as_mut().expect("they are kept");
            while prefixes.evict(&mut scheduler.pool) {}
            for class in 0..2 {
                assert_eq!(scheduler.pool.num_free(class), scheduler.pool.num_pages(class), "{kv}, class {class}");
            }
        }
    }

    #[test]
    fn memory_for_few_displaces_the_youngest_and_loses_nothing() {
        let mut rng = Rng::new("preemption");
        let mut scheduler = Scheduler::new(SchedulerOptions {
            // Sequences that grow from nothing to five pages in a pool of eight.
            share_prefixes: false,
            ..options("recursion_wise", 4, 8)
        });
        let requests: Vec<_> = (0..12).map(|i| (vec![1 + i % 4, i], 150, None)).collect();
        let long: Vec<_> = requests.iter().filter(|request| alone(request).len() > 40).collect();
        let (results, _) = run(&mut scheduler, &requests, &mut rng);
        for (result, request) in results.iter().zip(&requests) {
            assert_eq!(*result, alone(request));
        }
        println!("{} long sequences, {} preemptions", long.len(), scheduler.num_preemptions());
    }

    #[test]
    fn a_common_beginning_is_read_once() {
        let mut rng = Rng::new("prefix");
        let mut scheduler = Scheduler::new(options("recursion_wise", 2, 40));
        let prompt: Vec<u32> = (0..100).map(|i| 1 + i % 4).collect();
        let requests: Vec<_> = (0..5).map(|_| (prompt.clone(), 101, None)).collect();
        run(&mut scheduler, &requests, &mut rng);
        // Two start before anything is known, then three blocks of 32 of each prompt are there.
        assert_eq!(scheduler.num_reused(), 3 * 96);
    }

    #[test]
    fn the_order_of_arrivals_decides_everything() {
        let plans = || {
            let mut rng = Rng::new("order");
            let mut scheduler = Scheduler::new(options("hybrid", 3, 9));
            let requests = requests(&mut rng, 20, 120);
            run(&mut scheduler, &requests, &mut rng).1
        };
        assert_eq!(plans(), plans());
    }

    #[test]
    fn what_never_fits_is_known() {
        let scheduler = Scheduler::new(options("recursion_wise", 1, 4));
        assert_eq!(scheduler.never_fits(128), None);
        assert_eq!(scheduler.never_fits(129), Some((0, 5, 4)));
    }
}
