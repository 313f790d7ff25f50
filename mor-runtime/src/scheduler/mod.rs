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

mod sequence;
mod step;
#[cfg(test)]
mod test_device;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use mor_kernels::rows::PAGE_SIZE;
use mor_model::KvLayout;

use self::sequence::{Running, Sequence};
pub(crate) use self::step::{Chunk, Progress, Start, Step};
use self::step::{Entry, PageWrite};
pub use self::step::{Outcome, PageCopy};
use crate::page_pool::PagePool;
use crate::prefix_cache::{Prefix, PrefixCache};

/// Number of a sequence, in the order of arrival.
pub(crate) type SequenceId = u64;

/// Most rows of a prefill step while other sequences decode: a long prompt must not hold them up.
pub(crate) const ROWS_BESIDE_DECODING: usize = 512;

/// Least rows of a prefill step that [`Scheduler::learn`] comes down to.
pub(crate) const LEAST_ROWS: usize = 16;

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
    /// Whether the last step that only decoded, and the last that read, took too long.
    was_late: [bool; 2],
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
            was_late: [false; 2],
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

    /// Learns whether the device took too long for a step. Two of a kind in a row halve what later ones may do, and nothing
    /// doubles it again, so that on a device that is fast enough steps follow from the order of arrivals: one alone may be late
    /// by what a driver does once. Returns whether it changed something.
    pub(crate) fn learn(&mut self, step: &Step, is_late: bool) -> bool {
        let reads = !step.chunks.is_empty();
        let was_late = std::mem::replace(&mut self.was_late[usize::from(reads)], is_late);
        let rows: usize = step.chunks.iter().map(|chunk| chunk.len).sum();
        let (done, most, least) = if reads {
            (rows, &mut self.options.prefill_rows, LEAST_ROWS)
        } else {
            (step.ticks, &mut self.options.ticks, 1)
        };
        // What was planned before the last change has nothing to say about it.
        let changes = is_late && was_late && done <= *most && *most > least;
        if changes {
            *most = (*most / 2).max(least);
        }
        changes
    }

    /// Most rows of a prefill step.
    pub(crate) fn prefill_rows(&self) -> usize {
        self.options.prefill_rows
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
        let mut chunks: Vec<_> = reading.into_iter().zip(rows).filter(|(_, rows)| *rows > 0).collect();
        chunks.sort_unstable();
        for (slot, mut len) in chunks {
            let running = self.slots[slot].as_mut().expect("it runs");
            let wants_token = running.to_read < running.sequence.tokens.len();
            let draws = all_begin && left > 0 && wants_token && running.read + len == running.to_read;
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

/// The sequence in a slot, if it is there since the admission of that number.
fn staying(slots: &mut [Option<Running>], slot: usize, admission: u64) -> Option<&mut Running> {
    slots[slot].as_mut().filter(|running| running.admission == admission)
}

fn pages_for(entries: usize) -> usize {
    entries.div_ceil(PAGE_SIZE as usize)
}
