//! CPU reference of `slots_compact`.

use crate::ops::SlotRecursion;
use crate::rows::{ActiveRow, END_GATED, END_NOTHING, END_PASS, NONE, PAGE_SIZE, ROW_ACTIVE, Row};

/// How many recursions a token takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// As long as the decision value is >= `threshold`; with `keep_all` every token runs the first recursion.
    Expert {
        /// See above.
        threshold: f32,
        /// See above.
        keep_all: bool,
    },
    /// The chosen number.
    Token,
    /// All.
    Fixed,
}

/// Which slots are listed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Phase {
    /// Those that are through.
    Exit(Rule),
    /// Free ones with a next row.
    Enter,
    /// Those that take a recursion.
    Block(Rule),
    /// Of these, the ones at a recursion.
    At(u32),
}

/// All state of the slots, as the kernel's tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Slots {
    /// `[S]`.
    pub rows: Vec<Row>,
    /// `[S]`.
    pub next_rows: Vec<Row>,
    /// `[S]` of (passes, recursions that counted).
    pub state: Vec<[u32; 2]>,
    /// `[S, groups]`.
    pub lengths: Vec<u32>,
    /// `[S, groups, max_positions]`.
    pub kv_slots: Vec<u32>,
    /// `[S, groups, max_pages]`.
    pub pages: Vec<u32>,
    /// `[S]`.
    pub decision: Vec<f32>,
    /// `[S]`.
    pub target_depth: Vec<u32>,
}

/// Lists the slots of `phase` among the first `num_slots` and moves them on.
pub fn slots_compact(
    slots: &mut Slots,
    phase: Phase,
    num_slots: usize,
    recursions: &[SlotRecursion],
    (num_groups, max_pages, max_positions): (usize, usize, usize),
    hybrid: bool,
) -> Vec<ActiveRow> {
    let physical = |slots: &Slots, slot: usize, group: u32, index: u32| {
        let table = (slot * num_groups + group as usize) * max_pages;
        slots.pages[table + (index / PAGE_SIZE) as usize] * PAGE_SIZE + index % PAGE_SIZE
    };
    let goes_on = |slots: &Slots, slot: usize, rule: Rule| {
        let [passes, counted] = slots.state[slot];
        let Some(recursion) = recursions.get(passes as usize) else { return false };
        match rule {
            Rule::Expert { threshold, .. } => {
                counted == passes && (recursion.always != 0 || slots.decision[slot] >= threshold)
            }
            Rule::Token => slots.target_depth[slot] > passes,
            Rule::Fixed => true,
        }
    };
    let mut active = Vec::new();
    for slot in 0..num_slots {
        let is_running = slots.rows[slot].flags & ROW_ACTIVE != 0;
        let [passes, counted] = slots.state[slot];
        let listed = match phase {
            Phase::Exit(rule) => is_running && !goes_on(slots, slot, rule),
            Phase::Enter => !is_running && slots.next_rows[slot].flags & ROW_ACTIVE != 0,
            Phase::Block(rule) => {
                let keeps_all = matches!(rule, Rule::Expert { keep_all: true, .. });
                is_running && (goes_on(slots, slot, rule) || (keeps_all && passes == 0))
            }
            Phase::At(recursion) => is_running && passes == recursion + 1,
        };
        if !listed {
            continue;
        }
        if phase == Phase::Enter {
            slots.rows[slot] = slots.next_rows[slot];
            slots.next_rows[slot].flags = 0;
            slots.state[slot] = [0, 0];
        }
        let position = slots.rows[slot].position;
        let mut entry = ActiveRow { row: slot as u32, sequence: slot as u32, position, ..ActiveRow::ABSENT };
        entry.kv_len = position + 1;
        match phase {
            Phase::Exit(_) | Phase::Enter => {
                entry.kv_slot = physical(slots, slot, 0, position);
                entry.kv_table = (slot * num_groups * max_pages) as u32;
                if let Phase::Exit(rule) = phase {
                    entry.recursion = if matches!(rule, Rule::Expert { .. }) { counted } else { passes };
                    slots.rows[slot].flags = 0;
                } else {
                    slots.lengths[slot * num_groups] = position + 1;
                }
            }
            Phase::Block(_) | Phase::At(_) => {
                let r = if let Phase::At(recursion) = phase { recursion } else { passes };
                let SlotRecursion { write_group, read_group, .. } = recursions[r as usize];
                entry.recursion = r;
                entry.kv_table = ((slot * num_groups + read_group as usize) * max_pages) as u32;
                if let Phase::Block(rule) = phase {
                    let selected = goes_on(slots, slot, rule);
                    entry.end = match rule {
                        Rule::Expert { .. } if selected => END_GATED,
                        Rule::Token if slots.target_depth[slot] == passes + 1 => END_GATED,
                        Rule::Token => END_PASS,
                        _ => END_NOTHING,
                    };
                    slots.state[slot] = [passes + 1, counted + u32::from(selected)];
                }
                if write_group != NONE {
                    let length = &mut slots.lengths[slot * num_groups + write_group as usize];
                    *length += u32::from(matches!(phase, Phase::Block(_)));
                    let index = *length - 1;
                    entry.kv_slot = physical(slots, slot, write_group, index);
                    if write_group == read_group {
                        entry.kv_len = index + 1;
                    }
                    if hybrid && matches!(phase, Phase::Block(_)) {
                        let table = |group: usize| (slot * num_groups + group) * max_positions;
                        entry.kv_len = position + 1;
                        entry.kv_table = table(write_group as usize) as u32;
                        let last = if passes == 0 { num_groups - 1 } else { write_group as usize };
                        for group in write_group as usize..=last {
                            slots.kv_slots[table(group) + position as usize] = entry.kv_slot;
                        }
                    }
                }
            }
        }
        active.push(entry);
    }
    active
}
