//! `slots_compact`: 1, 128 and 1024 slots of which all enter, and all run the block at recursions of their own.

use criterion::Criterion;
use mor_bench::{record, time_from};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{DepthRule, SlotKv, SlotPhase, SlotRecursion, SlotsCompact, SlotsCompactBindings};
use mor_kernels::oracle::slots_compact::{Phase, Rule, Slots, slots_compact};
use mor_kernels::parity::{self, Output, Rng};
use mor_kernels::rows::{ActiveRow, PAGE_SIZE, ROW_ACTIVE, Row, RowSet};
use mor_kernels::tensor::Tensor;

const NUM_RECURSIONS: usize = 3;
const NUM_GROUPS: usize = 1 + NUM_RECURSIONS;
const MAX_POSITIONS: usize = 512;

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let mut rng = Rng::new("bench slots_compact");
    let recursion =
        |r: u32| SlotRecursion { write_group: 1 + r, read_group: 1 + r, always: u32::from(r == 0), reserved: 0 };
    let recursions: Vec<_> = (0..NUM_RECURSIONS as u32).map(recursion).collect();
    let table = Tensor::zeros_uniform(gpu, "recursions", 16 * NUM_RECURSIONS as u64).expect("a small buffer fits");
    gpu.write(&table, 0, bytemuck::cast_slice(&recursions));
    for num_slots in [1, 128, 1024] {
        let max_pages = MAX_POSITIONS / PAGE_SIZE as usize;
        let flags = ROW_ACTIVE;
        let slots = Slots {
            rows: (0..num_slots).map(|s| Row { token: 1, position: 100, sequence: s as u32, flags }).collect(),
            next_rows: Vec::new(),
            state: (0..num_slots).map(|_| [rng.below(NUM_RECURSIONS) as u32; 2]).collect(),
            lengths: (0..num_slots * NUM_GROUPS).map(|_| rng.below(100) as u32).collect(),
            kv_slots: Vec::new(),
            pages: (0..(num_slots * NUM_GROUPS * max_pages) as u32).rev().collect(),
            decision: vec![1.0; num_slots],
            target_depth: Vec::new(),
        };
        let mut want_slots = slots.clone();
        let phase = Phase::Block(Rule::Expert { threshold: 0.0, keep_all: false });
        let sizes = (NUM_GROUPS, max_pages, MAX_POSITIONS);
        let want = slots_compact(&mut want_slots, phase, num_slots, &recursions, sizes, false);

        let rows = Output::from_words(gpu, bytemuck::cast_slice(&slots.rows));
        let state = Output::from_words(gpu, slots.state.as_flattened());
        let lengths = Output::from_words(gpu, &slots.lengths);
        let (pages, decision) = (parity::upload_u32(gpu, &slots.pages), parity::upload(gpu, &slots.decision));
        let active = RowSet::new(gpu, "active", num_slots).expect("a small buffer fits");
        let id = num_slots.to_string();
        let plan = record(gpu, &id, |plan| {
            let kv = SlotKv {
                num_groups: NUM_GROUPS as u32,
                lengths: &lengths.tensor,
                pages: &pages,
                max_pages: max_pages as u32,
                slots: None,
            };
            let bindings = SlotsCompactBindings {
                rows: &rows.tensor,
                state: &state.tensor,
                grids: &plan.grid_table(),
                recursions: &table,
                active: &active,
                phase: SlotPhase::Block(DepthRule::Expert { decision: &decision, threshold: 0.0, keep_all: false }),
                kv: Some(kv),
                num_recursions: NUM_RECURSIONS as u32,
                max_positions: MAX_POSITIONS as u32,
            };
            SlotsCompact::record(plan, &bindings)
        });
        let Some(plan) = plan else { continue };
        gpu.run(&plan).expect("the device answers");
        let got: Vec<ActiveRow> = gpu.read(&active.active).expect("the device answers");
        assert_eq!(got[..want.len()], want, "{id}");
        assert_eq!(state.read_u32(gpu), want_slots.state.as_flattened(), "{id}: state");

        // After R runs every slot is through, and the state starts anew.
        let bytes = (num_slots * (size_of::<Row>() + 16 + size_of::<ActiveRow>())) as u64;
        let reset = || gpu.write(&state.tensor, 0, bytemuck::cast_slice(&slots.state));
        time_from(criterion, gpu, "slots_compact", &id, bytes, &plan, &reset);
    }
}
