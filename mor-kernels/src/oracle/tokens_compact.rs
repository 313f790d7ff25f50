//! CPU reference of `tokens_compact`.

use crate::rows::{ActiveRow, END_GATED, END_NOTHING, END_PASS, NONE, PAGE_SIZE, ROW_ACTIVE, ROW_SAMPLE, Row};

/// Which rows are kept.
#[derive(Clone, Copy, Debug)]
pub enum Mode<'a> {
    /// All.
    Begin,
    /// Decision values, threshold, `always`, `keep_all`.
    Expert(&'a [f32], f32, bool, bool),
    /// Depth above the recursion.
    Token,
    /// All.
    Fixed,
    /// Those flagged for sampling.
    Sample,
    /// Those of them with a depth above the recursion.
    Ends,
}

/// The state that the kernel reads and updates.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// `[T]`.
    pub depth: Vec<u32>,
    /// `[sequences, groups]`.
    pub lengths: Vec<u32>,
    /// `[sequences, groups, max_pages]`.
    pub pages: Vec<u32>,
    /// `[sequences, groups, max_positions]`.
    pub slots: Vec<u32>,
}

/// Sizes and groups of a call.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Recursion index.
    pub recursion: u32,
    /// Groups, 0 for no K/V.
    pub num_groups: usize,
    /// Group written.
    pub write: Option<usize>,
    /// Group read.
    pub read: usize,
    /// Pages of a table.
    pub max_pages: usize,
    /// Positions of a table.
    pub max_positions: usize,
    /// Whether slots are listed one by one, and from which group on they start as copies.
    pub hybrid: Option<Option<usize>>,
}

/// Lists the kept rows and updates `state`.
pub fn tokens_compact(rows: &[Row], mode: Mode<'_>, sizes: Sizes, state: &mut State) -> Vec<ActiveRow> {
    let Sizes { num_groups, max_pages, max_positions, .. } = sizes;
    let physical = |state: &State, sequence: u32, group: usize, slot: u32| {
        let table = (sequence as usize * num_groups + group) * max_pages;
        state.pages[table + (slot / PAGE_SIZE) as usize] * PAGE_SIZE + slot % PAGE_SIZE
    };
    if matches!(mode, Mode::Begin) {
        state.depth.fill(0);
    }
    let mut active = Vec::new();
    for (r, row) in rows.iter().enumerate().filter(|(_, row)| row.flags & ROW_ACTIVE != 0) {
        let (mut listed, mut depth, mut end) = (true, state.depth[r], END_NOTHING);
        let mut recursion = sizes.recursion;
        match mode {
            Mode::Begin => recursion = NONE,
            Mode::Expert(decision, threshold, always, keep_all) => {
                let selected = depth == sizes.recursion && (always || decision[r] >= threshold);
                depth = if selected { sizes.recursion + 1 } else { depth };
                listed = selected || keep_all;
                end = if selected { END_GATED } else { END_NOTHING };
            }
            Mode::Token => {
                listed = depth > sizes.recursion;
                end = if depth == sizes.recursion + 1 { END_GATED } else { END_PASS };
            }
            Mode::Fixed => depth = sizes.recursion + 1,
            Mode::Sample => {
                listed = row.flags & ROW_SAMPLE != 0;
                recursion = depth;
            }
            Mode::Ends => {
                listed = row.flags & ROW_SAMPLE != 0 && depth > sizes.recursion;
                end = END_GATED;
            }
        }
        state.depth[r] = depth;
        let sequence = row.sequence as usize;
        if let (Some(Some(first)), Some(write)) = (sizes.hybrid, sizes.write) {
            for group in first..num_groups {
                state.slots[(sequence * num_groups + group) * max_positions + row.position as usize] =
                    physical(state, row.sequence, write, row.position);
            }
        }
        if !listed {
            continue;
        }
        let mut entry = ActiveRow {
            row: r as u32,
            sequence: row.sequence,
            position: row.position,
            recursion,
            end,
            ..ActiveRow::ABSENT
        };
        if num_groups > 0 {
            entry.kv_len = row.position + 1;
            entry.kv_table = ((sequence * num_groups + sizes.read) * max_pages) as u32;
            if matches!(mode, Mode::Ends) {
                if sizes.hybrid.is_some() {
                    entry.kv_table = ((sequence * num_groups + sizes.read) * max_positions) as u32;
                } else {
                    entry.kv_len = state.lengths[sequence * num_groups + sizes.read];
                }
            }
            if let Some(write) = sizes.write {
                let slot = state.lengths[sequence * num_groups + write];
                state.lengths[sequence * num_groups + write] += 1;
                entry.kv_slot = physical(state, row.sequence, write, slot);
                if write == sizes.read {
                    entry.kv_len = slot + 1;
                }
                if sizes.hybrid.is_some() {
                    let table = (sequence * num_groups + write) * max_positions;
                    state.slots[table + row.position as usize] = entry.kv_slot;
                    entry.kv_table = table as u32;
                    entry.kv_len = row.position + 1;
                }
            }
        }
        active.push(entry);
    }
    debug_assert!(active.iter().all(|entry| entry.row != NONE));
    active
}
