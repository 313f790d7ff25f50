//! `embed_tokens`: 512 rows (prefill) of the 360M shape, bf16.

use criterion::Criterion;
use mor_bench::{SHAPES, record, time};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{EmbedTokens, EmbedTokensBindings, EmbedTokensParams};
use mor_kernels::oracle::embed_tokens::embed_tokens;
use mor_kernels::parity::{self, Rng, Tolerance};
use mor_kernels::plan::Grid;
use mor_kernels::rows::Row;
use mor_kernels::tensor::{DType, Tensor};

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    const NUM_ROWS: usize = 512;
    let mut rng = Rng::new("bench embed_tokens");
    let shape = SHAPES.iter().find(|shape| shape.name == "360m").expect("it is in the table");
    // A part of the vocabulary: the cost is that of the rows read.
    let (c, num_tokens) = (shape.hidden_size as usize, 4096);
    let active = parity::some_rows(&mut rng, NUM_ROWS, NUM_ROWS);
    let rows: Vec<Row> = (0..NUM_ROWS).map(|_| Row { token: rng.below(num_tokens) as u32, ..Row::default() }).collect();
    // bf16 values of one binade, by their bits.
    let bits: Vec<u16> = (0..num_tokens * c).map(|_| 0x3f80 | rng.below(128) as u16).collect();
    let values: Vec<f32> = bits.iter().map(|bits| f32::from_bits(u32::from(*bits) << 16)).collect();
    let x = parity::Output::new(gpu, NUM_ROWS * c);
    let bindings = EmbedTokensBindings {
        rows: &parity::row_set(gpu, &active),
        tokens: &Tensor::from_slice(gpu, "rows", DType::U32, &[NUM_ROWS, 4], &rows).expect("it fits"),
        weight: &Tensor::from_slice(gpu, "weight", DType::BF16, &[num_tokens, c], &bits).expect("it fits"),
        x: &x.tensor,
    };
    let params = EmbedTokensParams { hidden_size: shape.hidden_size, first_token: 0, num_tokens: num_tokens as u32 };
    let id = format!("{}/{NUM_ROWS}", shape.name);
    let grid = Grid::Fixed([1, NUM_ROWS as u32, 1]);
    let kernel = EmbedTokens::new(DType::BF16);
    let Some(plan) = record(gpu, &id, |plan| plan.dispatch(&kernel, &bindings, &params, grid)) else {
        return;
    };
    gpu.run(&plan).expect("the device answers");
    let mut want = vec![0.0; NUM_ROWS * c];
    embed_tokens(&rows, &active, &values, c, 0, &mut want);
    parity::assert_close(&id, &x.read(gpu), &want, Tolerance::EXACT);
    time(criterion, gpu, "embed_tokens", &id, (6 * NUM_ROWS * c) as u64, &plan);
}
