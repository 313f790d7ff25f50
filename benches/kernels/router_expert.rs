//! `router_expert`: 1 row (decode) and 512 rows (prefill) of every shape.

use criterion::Criterion;
use mor_bench::{SHAPES, record, time};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{RouterExpert, RouterExpertBindings, RouterExpertParams};
use mor_kernels::oracle::router_expert::router_expert;
use mor_kernels::parity::{self, Output, Rng, Tolerance};
use mor_kernels::plan::Grid;

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let mut rng = Rng::new("bench router_expert");
    let kernel = RouterExpert::default();
    for shape in SHAPES {
        for num_rows in [1, 512] {
            let c = shape.hidden_size as usize;
            let active = parity::some_rows(&mut rng, num_rows, num_rows);
            let x = rng.normals(num_rows * c);
            let weight: Vec<f32> = rng.normals(c).iter().map(|w| w / (c as f32).sqrt()).collect();
            let (logits, gates) = (Output::new(gpu, num_rows), Output::new(gpu, num_rows));
            let bindings = RouterExpertBindings {
                rows: &parity::row_set(gpu, &active),
                x: &parity::upload(gpu, &x),
                weight: &parity::upload(gpu, &weight),
                logits: &logits.tensor,
                gates: Some(&gates.tensor),
                shares: None,
            };
            let params = RouterExpertParams {
                in_features: shape.hidden_size,
                input_scale: 1.0,
                alpha: 0.1,
                num_recursions: 1,
                ..Default::default()
            };
            let id = format!("{}/{num_rows}", shape.name);
            let grid = Grid::Fixed([1, num_rows as u32, 1]);
            let Some(plan) = record(gpu, &id, |plan| plan.dispatch(&kernel, &bindings, &params, grid)) else {
                continue;
            };
            gpu.run(&plan).expect("the device answers");
            let (mut want_logits, mut want) = (vec![0.0; num_rows], vec![0.0; num_rows]);
            router_expert(&kernel, &params, &active, &x, &weight, &mut want_logits, Some(&mut want));
            parity::assert_close(&id, &logits.read(gpu), &want_logits, Tolerance::F32);
            parity::assert_close(&id, &gates.read(gpu), &want, Tolerance::F32);
            time(criterion, gpu, "router_expert", &id, (4 * (num_rows + 1) * c) as u64, &plan);
        }
    }
}
