//! Lists the slots of a depth-wise batch that leave, enter or run the shared block in this tick.

use crate::caps::DeviceCaps;
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::RowSet;
use crate::shader::Definitions;
use crate::tensor::Tensor;

/// How many recursions a token takes, with the tensor that says so.
#[derive(Clone, Copy, Debug)]
pub enum DepthRule<'a> {
    /// Expert choice: one more as long as its decision value is >= the threshold.
    Expert {
        /// `[S]` f32: the logits of each slot's next recursion.
        decision: &'a Tensor,
        /// What the decision value is compared with: 0, or less to take more recursions.
        threshold: f32,
        /// Every token runs the first recursion, selected or not: the K/V sharing strategies.
        keep_all: bool,
    },
    /// Token choice: as many as were chosen before the first.
    Token {
        /// `[S]` u32.
        target_depth: &'a Tensor,
    },
    /// All of them.
    Fixed,
}

/// Which slots are listed, and what becomes of them.
#[derive(Clone, Copy, Debug)]
pub enum SlotPhase<'a> {
    /// Those whose token has taken its last recursion; the slot becomes free. Entries carry the depth as recursion.
    Exit(DepthRule<'a>),
    /// Free slots with a next row, which moves in.
    Enter {
        /// `[S]` of [`Row`](crate::rows::Row); flags of rows that moved in become 0.
        next_rows: &'a Tensor,
    },
    /// Those whose token takes a recursion now, each at its own.
    Block(DepthRule<'a>),
    /// Of the last [`SlotPhase::Block`], those at this recursion.
    At(u32),
}

/// A recursion of the shared block. Mirrors an entry of `recursions` in the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SlotRecursion {
    /// K/V group that its rows are stored in, or [`NONE`](crate::rows::NONE).
    pub write_group: u32,
    /// K/V group they attend to.
    pub read_group: u32,
    /// 1: expert choice selects every token that comes this far (capacity 1).
    pub always: u32,
    /// Unused; uniform arrays have a stride of 16 bytes.
    pub reserved: u32,
}

/// K/V bookkeeping of the slots.
#[derive(Clone, Copy, Debug)]
pub struct SlotKv<'a> {
    /// Number of groups; the unshared layers' is group 0.
    pub num_groups: u32,
    /// `[S, num_groups]` u32: entries stored; updated.
    pub lengths: &'a Tensor,
    /// `[S, num_groups, max_pages]` u32: physical page of each logical one.
    pub pages: &'a Tensor,
    /// Pages a table has room for.
    pub max_pages: u32,
    /// Hybrid caches only, within the block: `[S, num_groups, max_positions]` u32, the physical slot of each position.
    pub slots: Option<&'a Tensor>,
}

/// Moves the tokens of a depth-wise batch on: a row of its streams is a slot, and a slot holds one token at a time.
///
/// A tick records [`SlotPhase::Exit`], the layers behind the block and the draw, [`SlotPhase::Enter`], the layers before
/// the block, [`SlotPhase::Block`] and the block.
///
/// # Source
/// MoR, arXiv 2507.10524: continuous depth-wise batching.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SlotsCompact {
    pub(crate) phase: &'static str,
    pub(crate) rule: Option<&'static str>,
    pub(crate) kv: bool,
    pub(crate) kv_slots: bool,
    pub(crate) num_recursions: u32,
    pub(crate) workgroup_size: u32,
}

/// Sizes of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SlotsCompactParams {
    num_slots: u32,
    recursion: u32,
    keep_all: u32,
    num_groups: u32,
    max_pages: u32,
    max_positions: u32,
    threshold: f32,
}

/// Tensors and sizes of a call.
#[derive(Clone, Copy, Debug)]
pub struct SlotsCompactBindings<'a> {
    /// `[S]` of [`Row`](crate::rows::Row): the tokens under way; updated.
    pub rows: &'a Tensor,
    /// `[S]` of (passes through the block, recursions that counted) u32; updated.
    pub state: &'a Tensor,
    /// The plan's [`PlanBuilder::grid_table`].
    pub grids: &'a Tensor,
    /// Uniform of [`SlotRecursion`], at least `num_recursions` of them; bound where rows of the block attend and for expert choice.
    pub recursions: &'a Tensor,
    /// The list, written; its capacity is the number of slots looked at, the first of S.
    pub active: &'a RowSet,
    /// Which slots.
    pub phase: SlotPhase<'a>,
    /// K/V bookkeeping, where the listed rows attend.
    pub kv: Option<SlotKv<'a>>,
    /// Recursions that a token takes at most: those of the model, or fewer.
    pub num_recursions: u32,
    /// Longest sequence the tables hold.
    pub max_positions: u32,
}

impl SlotsCompact {
    /// Records the kernel.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if there are fewer slots than the list has room for; else as [`PlanBuilder::dispatch`].
    pub fn record(plan: &mut PlanBuilder<'_>, b: &SlotsCompactBindings<'_>) -> Result<()> {
        let (slots, found) = (b.active.capacity, b.rows.num_elems() / 4);
        if slots > found {
            return Err(KernelError::Shape {
                kernel: Self::NAME,
                what: "rows",
                found: format!("{found} slots"),
                expected: format!("{slots}, the capacity of the list"),
            });
        }
        let (kernel, params) = Self::specialise(b);
        plan.dispatch(&kernel, b, &params, Grid::Fixed([1, 1, 1]))
    }

    fn specialise(b: &SlotsCompactBindings<'_>) -> (Self, SlotsCompactParams) {
        let num_slots = b.active.capacity as u32;
        let (phase, rule, recursion) = match b.phase {
            SlotPhase::Exit(rule) => ("EXIT", Some(rule), 0),
            SlotPhase::Enter { .. } => ("ENTER", None, 0),
            SlotPhase::Block(rule) => ("BLOCK", Some(rule), 0),
            SlotPhase::At(recursion) => ("AT", None, recursion),
        };
        let kernel = Self {
            phase,
            rule: rule.and_then(|rule| match rule {
                DepthRule::Expert { .. } => Some("EXPERT"),
                DepthRule::Token { .. } => Some("TOKEN"),
                DepthRule::Fixed => None,
            }),
            kv: b.kv.is_some(),
            kv_slots: phase == "BLOCK" && b.kv.is_some_and(|kv| kv.slots.is_some()),
            num_recursions: b.num_recursions,
            workgroup_size: num_slots.next_power_of_two().clamp(32, 256),
        };
        let threshold = match rule {
            Some(DepthRule::Expert { threshold, .. }) => threshold,
            _ => 0.0,
        };
        let params = SlotsCompactParams {
            num_slots,
            recursion,
            keep_all: matches!(rule, Some(DepthRule::Expert { keep_all: true, .. })).into(),
            num_groups: b.kv.map_or(0, |kv| kv.num_groups),
            max_pages: b.kv.map_or(0, |kv| kv.max_pages),
            max_positions: b.max_positions,
            threshold,
        };
        (kernel, params)
    }

    fn is_in_block(&self) -> bool {
        matches!(self.phase, "BLOCK" | "AT")
    }

    fn reads_recursions(&self) -> bool {
        (self.is_in_block() && self.kv) || self.rule == Some("EXPERT")
    }

    fn counts_kv(&self) -> bool {
        self.kv && self.phase != "EXIT"
    }
}

impl Kernel for SlotsCompact {
    const NAME: &'static str = "slots_compact";
    type Params = SlotsCompactParams;
    type Bindings<'a> = SlotsCompactBindings<'a>;

    fn definitions(&self, _: &DeviceCaps) -> Definitions {
        let definitions = Definitions::new()
            .u32("WORKGROUP_SIZE", self.workgroup_size)
            .u32("NUM_RECURSIONS", self.num_recursions)
            .flag(self.phase, true)
            .flag("DECIDES", matches!(self.phase, "EXIT" | "BLOCK"))
            .flag("IN_BLOCK", self.is_in_block())
            .flag("RECURSIONS", self.reads_recursions())
            .flag("KV", self.kv)
            .flag("KV_LENGTHS", self.counts_kv())
            .flag("KV_SLOTS", self.kv_slots);
        self.rule.into_iter().fold(definitions, |definitions, rule| definitions.flag(rule, true))
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        let mut bindings = vec![
            Binding::uniform(1, b.grids),
            Binding::write(3, b.rows),
            Binding::write(4, b.state),
            Binding::write(5, &b.active.active),
            Binding::write(6, &b.active.dispatch),
        ];
        if self.reads_recursions() {
            bindings.push(Binding::uniform(2, b.recursions));
        }
        match b.phase {
            SlotPhase::Exit(rule) | SlotPhase::Block(rule) => match rule {
                DepthRule::Expert { decision, .. } => bindings.push(Binding::read(7, decision)),
                DepthRule::Token { target_depth } => bindings.push(Binding::read(7, target_depth)),
                DepthRule::Fixed => {}
            },
            SlotPhase::Enter { next_rows } => bindings.push(Binding::write(7, next_rows)),
            SlotPhase::At(_) => {}
        }
        if let Some(kv) = b.kv {
            bindings.push(Binding::read(8, kv.pages));
            if self.counts_kv() {
                bindings.push(Binding::write(9, kv.lengths));
            }
            bindings.extend(kv.slots.filter(|_| self.kv_slots).map(|slots| Binding::write(10, slots)));
        }
        bindings
    }

    fn workgroup_storage_bytes(&self, _: &DeviceCaps) -> u32 {
        4 * self.workgroup_size
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::oracle::slots_compact::{Phase, Rule, Slots, slots_compact};
    use crate::parity::{self, Output, Rng};
    use crate::rows::{ActiveRow, NONE, PAGE_SIZE, ROW_ACTIVE, ROW_PADDING, ROW_SAMPLE, Row};

    const NUM_GROUPS: usize = 4;
    const NUM_RECURSIONS: usize = 3;

    fn check(gpu: &crate::Gpu, rng: &mut Rng, num_slots: usize, case: usize) {
        let max_positions = 320;
        let max_pages = max_positions / PAGE_SIZE as usize;
        let row = |rng: &mut Rng, slot: usize| Row {
            token: rng.below(97) as u32,
            position: rng.below(200) as u32,
            sequence: slot as u32,
            flags: if rng.below(3) > 0 { ROW_ACTIVE | ROW_SAMPLE } else { 0 },
        };
        // One slot more than is looked at: it must stay as it is.
        let capacity = num_slots + 1;
        let mut pages: Vec<u32> = (0..(capacity * NUM_GROUPS * max_pages) as u32).collect();
        (1..pages.len()).rev().for_each(|i| pages.swap(i, rng.below(i + 1)));
        // Sharing strategies store the first recursion only; hybrid and recursion-wise every one.
        let shares = case % 2 == 1;
        let recursions: Vec<SlotRecursion> = (0..NUM_RECURSIONS as u32)
            .map(|r| SlotRecursion {
                write_group: if shares && r > 0 { NONE } else { 1 + r },
                read_group: if shares { 1 } else { 1 + r },
                always: u32::from(r == 1),
                reserved: 0,
            })
            .collect();
        let hybrid = case == 8;
        let threshold = if matches!(case, 0 | 8) { -0.7 } else { 0.0 };
        let mut decision = rng.normals(capacity);
        decision[0] = threshold;
        decision[num_slots / 2] = f32::NAN;
        let slots = Slots {
            rows: (0..capacity).map(|slot| row(rng, slot)).collect(),
            next_rows: (0..capacity).map(|slot| row(rng, slot)).collect(),
            state: (0..capacity)
                .map(|_| {
                    let passes = rng.below(NUM_RECURSIONS + 1) as u32;
                    [passes, passes.saturating_sub(u32::from(rng.below(4) == 0))]
                })
                .collect(),
            lengths: (0..capacity * NUM_GROUPS).map(|_| 1 + rng.below(200) as u32).collect(),
            kv_slots: vec![7; capacity * NUM_GROUPS * max_positions],
            pages,
            decision,
            target_depth: (0..capacity).map(|_| 1 + rng.below(NUM_RECURSIONS) as u32).collect(),
        };
        let upload = |words: &[u32]| Output::from_words(gpu, words);
        let rows = upload(bytemuck::cast_slice(&slots.rows));
        let next_rows = upload(bytemuck::cast_slice(&slots.next_rows));
        let state = upload(slots.state.as_flattened());
        let (lengths, kv_slots) = (upload(&slots.lengths), upload(&slots.kv_slots));
        let (decision, target_depth) =
            (parity::upload(gpu, &slots.decision), parity::upload_u32(gpu, &slots.target_depth));
        let table = Tensor::zeros_uniform(gpu, "recursions", 16 * NUM_RECURSIONS as u64).expect("fits");
        gpu.write(&table, 0, bytemuck::cast_slice(&recursions));
        let keep_all = matches!(case, 4 | 5);
        let expert =
            (Rule::Expert { threshold, keep_all }, DepthRule::Expert { decision: &decision, threshold, keep_all });
        let token = (Rule::Token, DepthRule::Token { target_depth: &target_depth });
        let (phase, want_phase) = match case {
            0 => (SlotPhase::Exit(expert.1), Phase::Exit(expert.0)),
            1 => (SlotPhase::Exit(token.1), Phase::Exit(token.0)),
            2 => (SlotPhase::Exit(DepthRule::Fixed), Phase::Exit(Rule::Fixed)),
            3 => (SlotPhase::Enter { next_rows: &next_rows.tensor }, Phase::Enter),
            4 | 5 | 8 => (SlotPhase::Block(expert.1), Phase::Block(expert.0)),
            6 => (SlotPhase::Block(token.1), Phase::Block(token.0)),
            7 => (SlotPhase::Block(DepthRule::Fixed), Phase::Block(Rule::Fixed)),
            _ => (SlotPhase::At(0), Phase::At(0)),
        };
        let mut want_slots = slots.clone();
        let sizes = (NUM_GROUPS, max_pages, max_positions);
        let mut want = slots_compact(&mut want_slots, want_phase, num_slots, &recursions, sizes, hybrid);
        let num_listed = want.len() as u32;
        want.resize(want.len() + ROW_PADDING as usize, ActiveRow::ABSENT);

        let active = RowSet::new(gpu, "active", capacity).expect("fits").limited_to(num_slots);
        let grid = [17, 8, 3, 0];
        let pages = parity::upload_u32(gpu, &slots.pages);
        parity::run(gpu, |plan| {
            let bindings = SlotsCompactBindings {
                rows: &rows.tensor,
                state: &state.tensor,
                grids: &plan.grid_table(),
                recursions: &table,
                active: &active,
                phase,
                kv: Some(SlotKv {
                    num_groups: NUM_GROUPS as u32,
                    lengths: &lengths.tensor,
                    pages: &pages,
                    max_pages: max_pages as u32,
                    slots: hybrid.then_some(&kv_slots.tensor),
                }),
                num_recursions: NUM_RECURSIONS as u32,
                max_positions: max_positions as u32,
            };
            SlotsCompact::record(plan, &bindings)?;
            plan.intern_grid(grid)
        });
        let what = format!("case {case} S={num_slots}");
        let got: Vec<ActiveRow> = gpu.read(&active.active).expect("the device answers");
        assert_eq!(got[..want.len()], want, "{what}");
        assert_eq!(got[got.len() - 1].row, num_listed, "{what}");
        assert_eq!(rows.read_u32(gpu), bytemuck::cast_slice::<_, u32>(&want_slots.rows), "{what} rows");
        assert_eq!(next_rows.read_u32(gpu), bytemuck::cast_slice::<_, u32>(&want_slots.next_rows), "{what} next rows");
        assert_eq!(state.read_u32(gpu), want_slots.state.as_flattened(), "{what} state");
        assert_eq!(lengths.read_u32(gpu), want_slots.lengths, "{what} lengths");
        assert_eq!(kv_slots.read_u32(gpu), want_slots.kv_slots, "{what} kv slots");
        let dispatch: Vec<u32> = gpu.read(&active.dispatch).expect("the device answers");
        let workgroups = if num_listed == 0 { [0, 0, 0] } else { [17, num_listed.div_ceil(8), 3] };
        assert_eq!((dispatch[0], &dispatch[4..7]), (num_listed, &workgroups[..]), "{what}");
    }

    #[test]
    fn matches_oracle() {
        parity::on_every_profile(|gpu, _| {
            let mut rng = Rng::new("slots_compact");
            for num_slots in [1, 7, 33, 255, 256, 257, 1024] {
                for case in 0..10 {
                    check(gpu, &mut rng, num_slots, case);
                }
            }
        });
    }

    #[test]
    fn refuses_more_slots_than_there_are() {
        let gpu = parity::gpu();
        let words = parity::upload_u32(gpu, &[0; 16]);
        let active = RowSet::new(gpu, "active", 5).expect("fits");
        let mut plan = PlanBuilder::new(gpu).expect("fits");
        let bindings = SlotsCompactBindings {
            rows: &words,
            state: &words,
            grids: &plan.grid_table(),
            recursions: &words,
            active: &active,
            phase: SlotPhase::At(0),
            kv: None,
            num_recursions: 1,
            max_positions: 1,
        };
        let message = SlotsCompact::record(&mut plan, &bindings).expect_err("must be refused").to_string();
        assert!(message.contains("4 slots") && message.contains("5, the capacity"), "{message}");
    }
}
