//! `router_token`: 1 row (decode) and 512 rows (prefill) of every shape, 3 recursions.

use criterion::Criterion;
use mor_bench::{SHAPES, record, time};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{RouterToken, RouterTokenBindings, RouterTokenParams};
use mor_kernels::oracle::router_token::{TokenChoices, router_token};
use mor_kernels::parity::{self, Output, Rng, Tolerance};
use mor_kernels::plan::Grid;

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let mut rng = Rng::new("bench router_token");
    let kernel = RouterToken::new(3);
    for shape in SHAPES {
        for num_rows in [1, 512] {
            let c = shape.hidden_size as usize;
            let active = parity::some_rows(&mut rng, num_rows, num_rows);
            let x = rng.normals(num_rows * c);
            let weight: Vec<f32> = rng.normals(3 * c).iter().map(|w| w / (c as f32).sqrt()).collect();
            let [logits, gates] = [0; 2].map(|_| Output::new(gpu, 3 * num_rows));
            let [depth, token_weight] = [0; 2].map(|_| Output::new(gpu, num_rows));
            let bindings = RouterTokenBindings {
                rows: &parity::row_set(gpu, &active),
                x: &parity::upload(gpu, &x),
                weight: &parity::upload(gpu, &weight),
                logits: &logits.tensor,
                gates: &gates.tensor,
                depth: &depth.tensor,
                token_weight: &token_weight.tensor,
                bias: None,
            };
            let params = RouterTokenParams {
                in_features: shape.hidden_size,
                input_scale: 1.0,
                alpha: 1.0,
                max_depth: 3,
                depth_bias: 0.0,
            };
            let id = format!("{}/{num_rows}", shape.name);
            let grid = Grid::Fixed([1, num_rows as u32, 1]);
            let Some(plan) = record(gpu, &id, |plan| plan.dispatch(&kernel, &bindings, &params, grid)) else {
                continue;
            };
            gpu.run(&plan).expect("the device answers");
            let mut want = TokenChoices {
                logits: vec![0.0; 3 * num_rows],
                gates: vec![0.0; 3 * num_rows],
                depth: vec![0; num_rows],
                token_weight: vec![0.0; num_rows],
            };
            router_token(&kernel, &params, &active, &x, &weight, &[], &mut want);
            parity::assert_close(&id, &gates.read(gpu), &want.gates, Tolerance::F32);
            parity::assert_close(&id, &token_weight.read(gpu), &want.token_weight, Tolerance::F32);
            time(criterion, gpu, "router_token", &id, (4 * (num_rows + 3) * c) as u64, &plan);
        }
    }
}
