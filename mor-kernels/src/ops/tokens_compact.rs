//! Decides which rows are active at some point of a step, lists them and sizes the grids of what follows.

use crate::caps::DeviceCaps;
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::{NONE, RowSet};
use crate::shader::Definitions;
use crate::tensor::Tensor;

/// Which rows are kept, with the tensors that decide.
#[derive(Clone, Copy, Debug)]
pub enum Selection<'a> {
    /// All rows of the step; their depths start at 0, or at 1 where there is a `first` recursion.
    Begin {
        /// The first recursion, if it takes all rows: its list is made along.
        first: Option<FirstRecursion<'a>>,
    },
    /// Expert choice: rows selected at every recursion before this one and whose decision value is >= the threshold.
    Expert {
        /// `[T]` f32: router logits, or the sign that `router_topk` writes.
        decision: &'a Tensor,
        /// What the decision value is compared with: 0, or less to select more rows.
        threshold: f32,
        /// Every row that came this far is selected (capacity >= 1).
        always: bool,
        /// List all rows, selected or not: the first recursion of the K/V sharing strategies.
        keep_all: bool,
    },
    /// Token choice: rows whose depth is above this recursion.
    Token,
    /// Fixed depth: all rows.
    Fixed,
    /// Rows to be sampled; their entries carry the depth as recursion.
    Sample,
    /// Rows to be sampled that take this recursion, each the last of its sequence: they attend to all that this has stored.
    Ends,
}

/// A first recursion that takes all rows of a step.
#[derive(Clone, Copy, Debug)]
pub struct FirstRecursion<'a> {
    /// Its list, written.
    pub active: &'a RowSet,
    /// Group its rows are stored in and attend to.
    pub group: u32,
}

/// The K/V groups that the listed rows write and read, with the tensors that describe them.
#[derive(Clone, Copy, Debug)]
pub struct KvGroups<'a> {
    /// Group the rows are stored in, if they are.
    pub write: Option<u32>,
    /// Group whose entries they attend to.
    pub read: u32,
    /// Number of groups.
    pub num_groups: u32,
    /// `[sequences, num_groups]` u32: entries stored so far; updated.
    pub lengths: &'a Tensor,
    /// `[sequences, num_groups, max_pages]` u32: physical page of each logical one.
    pub pages: &'a Tensor,
    /// Pages a table has room for.
    pub max_pages: u32,
    /// Hybrid caches only.
    pub hybrid: Option<Hybrid<'a>>,
}

/// The slot table of the hybrid strategy: each position's entry, fresh or shared.
#[derive(Clone, Copy, Debug)]
pub struct Hybrid<'a> {
    /// `[sequences, num_groups, max_positions]` u32: physical slot of each position.
    pub slots: &'a Tensor,
    /// At the first recursion: the first group whose table starts as a copy of the first recursion's.
    pub first_group: Option<u32>,
}

/// Lists the active rows in position order with their K/V slots.
///
/// # Source
/// MoR, arXiv 2507.10524; the inference rule is `logit >= 0` where capacity is below 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TokensCompact {
    pub(crate) mode: &'static str,
    pub(crate) kv: bool,
    pub(crate) kv_slots: bool,
    pub(crate) first: bool,
    pub(crate) workgroup_size: u32,
    /// Rows of a thread at a time, at most [`MOST_EACH`].
    pub(crate) rows_each: u32,
}

/// Sizes of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct TokensCompactParams {
    num_rows: u32,
    recursion: u32,
    always: u32,
    keep_all: u32,
    num_groups: u32,
    write_group: u32,
    read_group: u32,
    max_pages: u32,
    max_positions: u32,
    first_hybrid_group: u32,
    threshold: f32,
    first_group: u32,
}

/// Tensors and sizes of a call.
#[derive(Clone, Copy, Debug)]
pub struct TokensCompactBindings<'a> {
    /// `[T]` of [`Row`](crate::rows::Row); those without a token are [`Row::ABSENT`](crate::rows::Row::ABSENT).
    pub rows: &'a Tensor,
    /// `[T]` u32: recursions each row has taken; updated.
    pub depth: &'a Tensor,
    /// The plan's [`PlanBuilder::grid_table`].
    pub grids: &'a Tensor,
    /// The list, written.
    pub active: &'a RowSet,
    /// Which rows.
    pub selection: Selection<'a>,
    /// Recursion index, 0-based, where the selection has one.
    pub recursion: u32,
    /// K/V bookkeeping, where the rows of one of the lists attend.
    pub kv: Option<KvGroups<'a>>,
    /// Longest sequence the tables hold.
    pub max_positions: u32,
}

impl TokensCompact {
    /// Records the kernel over the first rows, as many as the list has room for.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if there are fewer rows than the list has room for, or another list has another size; else as
    /// [`PlanBuilder::dispatch`].
    ///
    /// # Panics
    /// If the first recursion's list is to be made without K/V groups, or for hybrid caches.
    pub fn record(plan: &mut PlanBuilder<'_>, b: &TokensCompactBindings<'_>) -> Result<()> {
        let (rows, found) = (b.active.capacity, b.rows.num_elems() / 4);
        if rows > found {
            return Err(KernelError::Shape {
                kernel: Self::NAME,
                what: "rows",
                found: found.to_string(),
                expected: format!("{rows}, the capacity of the list"),
            });
        }
        if let Selection::Begin { first: Some(FirstRecursion { active, .. }) } = b.selection {
            if active.capacity != rows {
                return Err(KernelError::Shape {
                    kernel: Self::NAME,
                    what: "list of the first recursion",
                    found: active.capacity.to_string(),
                    expected: format!("{rows}, as many rows as that of all"),
                });
            }
            assert!(b.kv.is_some_and(|kv| kv.hybrid.is_none()), "two lists have pages of two groups");
        }
        let (kernel, params) = Self::specialise(plan.gpu().caps(), b);
        plan.dispatch(&kernel, b, &params, Grid::Fixed([1, 1, 1]))
    }

    fn specialise(caps: &DeviceCaps, b: &TokensCompactBindings<'_>) -> (Self, TokensCompactParams) {
        let mode = match b.selection {
            Selection::Begin { .. } => "BEGIN",
            Selection::Expert { .. } => "EXPERT",
            Selection::Token => "TOKEN",
            Selection::Fixed => "FIXED",
            Selection::Sample => "SAMPLE",
            Selection::Ends => "ENDS",
        };
        let num_rows = b.active.capacity as u32;
        let hybrid = b.kv.and_then(|kv| kv.hybrid);
        let workgroup_size = num_rows.next_power_of_two().clamp(32, most_threads(caps));
        let rows_each = if caps.is_cpu { 1 } else { num_rows.div_ceil(workgroup_size).clamp(1, MOST_EACH) };
        let first = if let Selection::Begin { first } = b.selection { first } else { None };
        let (kv, kv_slots) = (b.kv.is_some(), hybrid.is_some());
        let kernel = Self { mode, kv, kv_slots, first: first.is_some(), workgroup_size, rows_each };
        let (threshold, always, keep_all) = match b.selection {
            Selection::Expert { threshold, always, keep_all, .. } => (threshold, always, keep_all),
            _ => (0.0, false, false),
        };
        let params = TokensCompactParams {
            num_rows,
            recursion: b.recursion,
            always: always.into(),
            keep_all: keep_all.into(),
            num_groups: b.kv.map_or(0, |kv| kv.num_groups),
            write_group: b.kv.and_then(|kv| kv.write).unwrap_or(NONE),
            read_group: b.kv.map_or(0, |kv| kv.read),
            max_pages: b.kv.map_or(0, |kv| kv.max_pages),
            max_positions: b.max_positions,
            first_hybrid_group: hybrid.and_then(|hybrid| hybrid.first_group).unwrap_or(NONE),
            threshold,
            first_group: first.map_or(NONE, |first| first.group),
        };
        (kernel, params)
    }
}

/// Most rows of a thread at a time: those of 4,096 go through the workgroup at once, and wait but once for what they read.
const MOST_EACH: u32 = 4;

/// The most threads of the workgroup, a power of two. Threads of a software rasteriser take turns as well, and a row each at a time.
fn most_threads(caps: &DeviceCaps) -> u32 {
    if caps.is_cpu { 256 } else { 1 << caps.max_workgroup_size.min(1024).ilog2() }
}

impl Kernel for TokensCompact {
    const NAME: &'static str = "tokens_compact";
    type Params = TokensCompactParams;
    type Bindings<'a> = TokensCompactBindings<'a>;

    fn definitions(&self, _: &DeviceCaps) -> Definitions {
        Definitions::new()
            .u32("WORKGROUP_SIZE", self.workgroup_size)
            .u32("EACH", self.rows_each)
            .flag(self.mode, true)
            .flag("KV", self.kv)
            .flag("KV_SLOTS", self.kv_slots)
            .flag("FIRST", self.first)
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        let mut bindings = vec![
            Binding::uniform(1, b.grids),
            Binding::read(2, b.rows),
            Binding::write(3, b.depth),
            Binding::write(4, &b.active.active),
            Binding::write(5, &b.active.dispatch),
        ];
        if let Some(kv) = b.kv {
            bindings.extend([Binding::write(6, kv.lengths), Binding::read(7, kv.pages)]);
            bindings.extend(kv.hybrid.map(|hybrid| Binding::write(9, hybrid.slots)));
        }
        match b.selection {
            Selection::Expert { decision, .. } => bindings.push(Binding::read(8, decision)),
            Selection::Begin { first: Some(FirstRecursion { active, .. }) } => {
                bindings.extend([Binding::write(10, &active.active), Binding::write(11, &active.dispatch)]);
            }
            _ => {}
        }
        bindings
    }

    fn workgroup_storage_bytes(&self, _: &DeviceCaps) -> u32 {
        4 * if self.kv { 2 * self.workgroup_size + 1 } else { self.workgroup_size }
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::oracle::tokens_compact::{Mode, Sizes, State, tokens_compact};
    use crate::parity::{self, Rng};
    use crate::rows::{ActiveRow, PAGE_SIZE, ROW_ACTIVE, ROW_INDEX_UNIT, ROW_PADDING, ROW_SAMPLE, Row};
    use crate::tensor::DType;

    const NUM_GROUPS: usize = 4;

    /// A ragged step: sequences of random lengths that continue at random positions, then absent rows.
    fn step(rng: &mut Rng, num_rows: usize, num_sequences: usize, max_positions: usize) -> Vec<Row> {
        let mut rows = Vec::new();
        for sequence in 0..num_sequences {
            let left = num_rows - rows.len();
            let len = if sequence + 1 == num_sequences { left } else { rng.below(left + 1) };
            let start = rng.below(max_positions - num_rows);
            // One sequence may have ended: its rows take no part.
            let active = if num_sequences > 1 && rng.below(4) == 0 { 0 } else { ROW_ACTIVE };
            rows.extend((0..len).map(|i| Row {
                token: 0,
                position: (start + i) as u32,
                sequence: sequence as u32,
                flags: active | if i + 1 == len { ROW_SAMPLE } else { 0 } | (ROW_INDEX_UNIT * i as u32),
            }));
        }
        let absent = rng.below(3).min(rows.len());
        let keep = rows.len() - absent;
        rows[keep..].fill(Row::ABSENT);
        rows
    }

    fn check(gpu: &crate::Gpu, rng: &mut Rng, num_rows: usize, num_sequences: usize, case: usize) {
        let max_positions = num_rows + 200;
        let max_pages = max_positions.div_ceil(PAGE_SIZE as usize);
        let rows = step(rng, num_rows, num_sequences, max_positions);
        let mut pages: Vec<u32> = (0..(num_sequences * NUM_GROUPS * max_pages) as u32).collect();
        for i in (1..pages.len()).rev() {
            pages.swap(i, rng.below(i + 1));
        }
        let threshold = if case == 6 { -0.7 } else { 0.0 };
        let mut decision = rng.normals(num_rows);
        // On the threshold, and not a number.
        decision[0] = threshold;
        decision[num_rows / 2] = f32::NAN;
        let state = State {
            depth: (0..num_rows).map(|_| rng.below(4) as u32).collect(),
            lengths: (0..num_sequences * NUM_GROUPS).map(|_| rng.below(100) as u32).collect(),
            pages,
            slots: vec![7; num_sequences * NUM_GROUPS * max_positions],
        };
        let decision_gpu = parity::upload(gpu, &decision);
        let first = RowSet::new(gpu, "first", num_rows).expect("fits");
        let (mode, selection) = match case {
            0 => (Mode::Begin, Selection::Begin { first: None }),
            13 | 14 => {
                let first = FirstRecursion { active: &first, group: 3 };
                (Mode::Begin, Selection::Begin { first: Some(first) })
            }
            1 => (Mode::Token, Selection::Token),
            2 => (Mode::Fixed, Selection::Fixed),
            3 | 10 => (Mode::Sample, Selection::Sample),
            11 | 12 => (Mode::Ends, Selection::Ends),
            _ => {
                let (always, keep_all) = (case == 5, case == 6 || case == 8);
                let selection = Selection::Expert { decision: &decision_gpu, threshold, always, keep_all };
                (Mode::Expert(&decision, threshold, always, keep_all), selection)
            }
        };
        let reads_only = matches!(case, 7 | 10..=12 | 14);
        let write = if reads_only { None } else { Some(2) };
        let hybrid = match case {
            8 => Some(Some(3)),
            9 | 12 => Some(None),
            _ => None,
        };
        let has_kv = case != 3;
        let sizes = Sizes {
            recursion: 1,
            num_groups: if has_kv { NUM_GROUPS } else { 0 },
            write,
            read: if reads_only { 1 } else { 2 },
            max_pages,
            max_positions,
            hybrid,
        };
        let mut want_state = state.clone();
        let mut want = tokens_compact(&rows, mode, sizes, &mut want_state);
        let num_listed = want.len() as u32;
        want.resize(want.len() + ROW_PADDING as usize, ActiveRow::ABSENT);
        let with_first = matches!(case, 13 | 14);
        let want_first = with_first.then(|| {
            let sizes = Sizes { recursion: 0, write: Some(3), read: 3, ..sizes };
            let mut want =
                tokens_compact(&rows, Mode::Expert(&decision, threshold, true, false), sizes, &mut want_state);
            want.resize(want.len() + ROW_PADDING as usize, ActiveRow::ABSENT);
            want
        });

        let depth = parity::Output::from_words(gpu, &state.depth);
        let lengths = parity::Output::from_words(gpu, &state.lengths);
        let slots = parity::Output::from_words(gpu, &state.slots);
        let pages = parity::upload_u32(gpu, &state.pages);
        let rows_gpu = Tensor::from_slice(gpu, "rows", DType::U32, &[num_rows, 4], &rows).expect("fits");
        let active = RowSet::new(gpu, "active", num_rows).expect("fits");
        let kv = KvGroups {
            write: sizes.write.map(|g| g as u32),
            read: sizes.read as u32,
            num_groups: NUM_GROUPS as u32,
            lengths: &lengths.tensor,
            pages: &pages,
            max_pages: max_pages as u32,
            hybrid: hybrid.map(|first| Hybrid { slots: &slots.tensor, first_group: first.map(|g| g as u32) }),
        };
        // A grid that later kernels would ask for.
        let grid = [17, 8, 3, 0];
        parity::run(gpu, |plan| {
            let bindings = TokensCompactBindings {
                rows: &rows_gpu,
                depth: &depth.tensor,
                grids: &plan.grid_table(),
                active: &active,
                selection,
                recursion: 1,
                kv: has_kv.then_some(kv),
                max_positions: max_positions as u32,
            };
            TokensCompact::record(plan, &bindings)?;
            plan.intern_grid(grid)
        });
        let what = format!("case {case} T={num_rows} N={num_sequences}");
        let workgroups = if num_listed == 0 { [0, 0, 0] } else { [17, num_listed.div_ceil(8), 3] };
        for (set, want) in [(&active, Some(want)), (&first, want_first)] {
            let Some(want) = want else { continue };
            let got: Vec<ActiveRow> = gpu.read(&set.active).expect("the device answers");
            assert_eq!(got[..want.len()], want, "{what}");
            assert_eq!(got[got.len() - 1].row, num_listed, "{what}");
            let dispatch: Vec<u32> = gpu.read(&set.dispatch).expect("the device answers");
            assert_eq!((dispatch[0], &dispatch[4..7]), (num_listed, &workgroups[..]), "{what}");
        }
        assert_eq!(depth.read_u32(gpu), want_state.depth, "{what} depth");
        assert_eq!(lengths.read_u32(gpu), want_state.lengths, "{what} lengths");
        assert_eq!(slots.read_u32(gpu), want_state.slots, "{what} slots");
    }

    #[test]
    fn matches_oracle() {
        parity::on_every_profile_and_as_gpu(|gpu, _| {
            let mut rng = Rng::new("tokens_compact");
            for (num_rows, num_sequences) in
                [(1, 1), (7, 3), (33, 2), (255, 1), (256, 5), (257, 2), (1030, 3), (2050, 4), (8192, 40)]
            {
                for case in 0..15 {
                    check(gpu, &mut rng, num_rows, num_sequences, case);
                }
            }
        });
    }
}
