//! The [`Device`] of the scheduler's tests, and the model that it runs: depths and next tokens of any tokens.

use mor_kernels::rows::PAGE_SIZE;
use mor_model::KvLayout;

use super::{Outcome, Scheduler, SchedulerOptions, Step};

const PAGE: usize = PAGE_SIZE as usize;
pub(super) const RECURSIONS: usize = 3;
pub(super) const GROUPS: usize = 1 + RECURSIONS;

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

pub(super) fn next_token(tokens: &[u32]) -> u32 {
    (digest(tokens) >> 17) as u32 % 5
}

/// A device: it runs steps as the kernels do and checks every entry that a token could attend to.
pub(super) struct Device {
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
    pub(super) fn new(options: &SchedulerOptions) -> Self {
        Self {
            layout: options.layout.clone(),
            class_of_group: options.class_of_group.clone(),
            memory: options.pages_in_class.iter().map(|pages| vec![0; pages * PAGE]).collect(),
            slots: vec![Slot::default(); options.num_slots],
        }
    }

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

    /// Runs `step` of `scheduler`, whose sequences end at `limits`; returns the depths of its chunks' rows, and what was drawn
    /// in each slot.
    pub(super) fn run(
        &mut self,
        step: &Step,
        scheduler: &Scheduler,
        limits: &[usize],
    ) -> (Vec<u32>, Vec<Vec<Outcome>>) {
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
