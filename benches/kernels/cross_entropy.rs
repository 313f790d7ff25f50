//! `cross_entropy`: 64 rows of the SmolLM vocabulary.

use criterion::Criterion;
use mor_bench::{SHAPES, record, time};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{CrossEntropy, CrossEntropyBindings, CrossEntropyParams};
use mor_kernels::oracle::cross_entropy::cross_entropy;
use mor_kernels::parity::{self, Rng, Tolerance};
use mor_kernels::plan::Grid;

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    const NUM_ROWS: usize = 64;
    let mut rng = Rng::new("bench cross_entropy");
    let shape = SHAPES.iter().find(|shape| shape.name == "360m").expect("it is in the table");
    let v = shape.vocab_size as usize;
    let active = parity::some_rows(&mut rng, NUM_ROWS, NUM_ROWS);
    let logits = rng.normals(NUM_ROWS * v);
    let labels: Vec<u32> = (0..NUM_ROWS).map(|_| rng.below(v) as u32).collect();
    let nll = parity::Output::new(gpu, NUM_ROWS);
    let bindings = CrossEntropyBindings {
        rows: &parity::row_set(gpu, &active),
        logits: &parity::upload(gpu, &logits),
        labels: &parity::upload_u32(gpu, &labels),
        nll: &nll.tensor,
    };
    let params = CrossEntropyParams { vocab_size: shape.vocab_size, logits_stride: shape.vocab_size };
    let id = format!("{}/{NUM_ROWS}", shape.name);
    let grid = Grid::Fixed([1, NUM_ROWS as u32, 1]);
    let Some(plan) = record(gpu, &id, |plan| plan.dispatch(&CrossEntropy::default(), &bindings, &params, grid)) else {
        return;
    };
    gpu.run(&plan).expect("the device answers");
    let mut want = vec![0.0; NUM_ROWS];
    cross_entropy(&active, &logits, v, v, &labels, &mut want);
    parity::assert_close(&id, &nll.read(gpu), &want, Tolerance::F32);
    time(criterion, gpu, "cross_entropy", &id, (4 * NUM_ROWS * v) as u64, &plan);
}
