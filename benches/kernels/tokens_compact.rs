//! `tokens_compact`: 1, 512, 2048 and 8192 rows of one sequence under token choice, about two thirds of which go on and
//! get K/V slots.

use criterion::Criterion;
use mor_bench::{record, time_from};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{KvGroups, Selection, TokensCompact, TokensCompactBindings};
use mor_kernels::oracle::tokens_compact::{Mode, Sizes, State, tokens_compact};
use mor_kernels::parity::{self, Output, Rng};
use mor_kernels::rows::{ActiveRow, PAGE_SIZE, ROW_ACTIVE, ROW_INDEX_UNIT, Row, RowSet};
use mor_kernels::tensor::{DType, Tensor};

const NUM_GROUPS: usize = 3;
/// Runs before the stored lengths start anew; the page table has room for the entries of all.
const MAX_RUNS: usize = mor_bench::MAX_BATCH;

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let mut rng = Rng::new("bench tokens_compact");
    for num_rows in [1, 512, 2048, 8192] {
        let max_positions = num_rows * MAX_RUNS;
        let max_pages = max_positions.div_ceil(PAGE_SIZE as usize);
        let row = |i: usize| Row {
            token: 0,
            position: i as u32,
            sequence: 0,
            flags: ROW_ACTIVE | (ROW_INDEX_UNIT * i as u32),
        };
        let rows: Vec<Row> = (0..num_rows).map(row).collect();
        // The only row of the smallest case goes on.
        let depths = (0..num_rows).map(|i| if i == 0 { 3 } else { 1 + rng.below(3) as u32 });
        let state = State {
            depth: depths.collect(),
            lengths: vec![0; NUM_GROUPS],
            pages: (0..(NUM_GROUPS * max_pages) as u32).rev().collect(),
            ..State::default()
        };
        let sizes = Sizes {
            recursion: 1,
            num_groups: NUM_GROUPS,
            write: Some(1),
            read: 1,
            max_pages,
            max_positions,
            hybrid: None,
        };
        let mut want_state = state.clone();
        let want = tokens_compact(&rows, Mode::Token, sizes, &mut want_state);

        let rows_gpu = Tensor::from_slice(gpu, "rows", DType::U32, &[num_rows, 4], &rows).expect("a small buffer fits");
        let depth = Output::from_words(gpu, &state.depth);
        let lengths = Output::from_words(gpu, &state.lengths);
        let pages = parity::upload_u32(gpu, &state.pages);
        let active = RowSet::new(gpu, "active", num_rows).expect("a small buffer fits");
        let id = num_rows.to_string();
        let plan = record(gpu, &id, |plan| {
            let kv = KvGroups {
                write: sizes.write.map(|group| group as u32),
                read: sizes.read as u32,
                num_groups: NUM_GROUPS as u32,
                lengths: &lengths.tensor,
                pages: &pages,
                max_pages: max_pages as u32,
                hybrid: None,
            };
            let bindings = TokensCompactBindings {
                rows: &rows_gpu,
                depth: &depth.tensor,
                grids: &plan.grid_table(),
                active: &active,
                selection: Selection::Token,
                recursion: sizes.recursion,
                kv: Some(kv),
                max_positions: max_positions as u32,
            };
            TokensCompact::record(plan, &bindings)
        });
        let Some(plan) = plan else { continue };
        gpu.run(&plan).expect("the device answers");
        let got: Vec<ActiveRow> = gpu.read(&active.active).expect("the device answers");
        assert_eq!(got[..want.len()], want, "{id}");
        assert_eq!(got[want.len()], ActiveRow::ABSENT, "{id}: the end of the list");
        assert_eq!(lengths.read_u32(gpu), want_state.lengths, "{id}: stored lengths");

        // Rows and depths are read, the list is written.
        let bytes = (num_rows * (size_of::<Row>() + 4) + want.len() * size_of::<ActiveRow>()) as u64;
        let reset = || gpu.write(&lengths.tensor, 0, bytemuck::cast_slice(&state.lengths));
        time_from(criterion, gpu, "tokens_compact", &id, bytes, &plan, &reset);
    }
}
