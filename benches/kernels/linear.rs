//! `linear`: 512 rows (prefill) of the projections of every shape, f16 weights; throughput counts FLOP.

use criterion::Criterion;
use mor_bench::{SHAPES, record, time_flop};
use mor_kernels::epilogue::{Epilogue, EpilogueKind, LinearParams};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{Linear, LinearBindings};
use mor_kernels::oracle::linear::linear;
use mor_kernels::parity::{self, Rng, Tolerance};
use mor_kernels::plan::Grid;
use mor_kernels::tensor::{DType, Tensor};

pub fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    const NUM_ROWS: usize = 512;
    let mut rng = Rng::new("bench linear");
    let active = parity::some_rows(&mut rng, NUM_ROWS, NUM_ROWS);
    let rows = parity::row_set(gpu, &active);
    for shape in SHAPES {
        let (c, mlp) = (shape.hidden_size, shape.intermediate_size);
        let q_dim = shape.num_attention_heads * shape.head_dim;
        let qkv = q_dim + 2 * shape.num_key_value_heads * shape.head_dim;
        for (name, k, o) in [("qkv", c, qkv), ("o", q_dim, c), ("gate_up", c, 2 * mlp), ("down", mlp, c)] {
            let id = format!("{}/{name}/{NUM_ROWS}", shape.name);
            let (k_len, o_len) = (k as usize, o as usize);
            let (weight, w) = parity::upload_weight(gpu, &mut rng, o_len, k_len, DType::F16);
            let x = rng.normals(NUM_ROWS * k_len);
            let (input, y) = (parity::upload(gpu, &x), parity::Output::new(gpu, NUM_ROWS * o_len));
            let kernel = Linear::for_shape(gpu.caps(), NUM_ROWS as u32, o, DType::F16, false, EpilogueKind::Store);
            let epilogue = Epilogue::Store { out: &y.tensor };
            let bindings = LinearBindings { rows: &rows, weight: &weight, x: &input, epilogue };
            let params =
                LinearParams { num_outputs: o, out_stride: o, in_features: k, scale: 1.0, ..Default::default() };
            let [tile_m, tile_n] = kernel.tile.size();
            let grid = Grid::Fixed([o.div_ceil(tile_n), (NUM_ROWS as u32).div_ceil(tile_m), 1]);
            let Some(plan) = record(gpu, &id, |plan| plan.dispatch(&kernel, &bindings, &params, grid)) else {
                continue;
            };
            gpu.run(&plan).expect("the device answers");
            // Rows of the first, a middle and the last tile: the whole product would take the CPU minutes.
            let got = y.read(gpu);
            for row in [0, 1, 200, NUM_ROWS - 1] {
                let want = linear(&x[row * k_len..][..k_len], &w, k_len);
                parity::assert_close(&id, &got[row * o_len..][..o_len], &want, Tolerance::F32);
            }
            time_flop(criterion, gpu, "linear", &id, 2 * u64::from(k) * u64::from(o) * NUM_ROWS as u64, &plan);
        }
    }
}
