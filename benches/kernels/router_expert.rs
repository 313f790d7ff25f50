//! `router_expert`: 1 row (decode) and 512 rows (prefill) of every shape, the latter normed as well.

use criterion::Criterion;
use mor_bench::{SHAPES, record, time};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{RouterExpert, RouterExpertBindings, RouterExpertParams, RouterNorm};
use mor_kernels::oracle::rms_norm::rms_norm;
use mor_kernels::oracle::router_expert::router_expert;
use mor_kernels::parity::{self, Output, Rng, Tolerance};
use mor_kernels::plan::Grid;
use mor_kernels::tensor::{DType, Tensor};

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let mut rng = Rng::new("bench router_expert");
    for shape in SHAPES {
        for (num_rows, norms) in [(1, false), (512, false), (512, true)] {
            let c = shape.hidden_size as usize;
            let kernel = RouterExpert { norms, ..RouterExpert::new(gpu.caps(), shape.hidden_size) };
            let active = parity::some_rows(&mut rng, num_rows, num_rows);
            let x = rng.normals(num_rows * c);
            let weight: Vec<f32> = rng.normals(c).iter().map(|w| w / (c as f32).sqrt()).collect();
            let norm_weight = rng.normals(c);
            let (logits, gates) = (Output::new(gpu, num_rows), Output::new(gpu, num_rows));
            let y = Tensor::zeros(gpu, "y", DType::F16, &[num_rows, c]).expect("it fits");
            let norm = RouterNorm { weight: &parity::upload(gpu, &norm_weight), y: &y };
            let bindings = RouterExpertBindings {
                rows: &parity::row_set(gpu, &active),
                x: &parity::upload(gpu, &x),
                weight: &parity::upload(gpu, &weight),
                logits: &logits.tensor,
                gates: Some(&gates.tensor),
                shares: None,
                norm: norms.then_some(norm),
            };
            let params =
                RouterExpertParams { input_scale: 1.0, alpha: 0.1, num_recursions: 1, eps: 1e-5, ..Default::default() };
            let id = format!("{}/{num_rows}{}", shape.name, if norms { "/normed" } else { "" });
            let grid = Grid::Fixed([1, num_rows as u32, 1]);
            let Some(plan) = record(gpu, &id, |plan| plan.dispatch(&kernel, &bindings, &params, grid)) else {
                continue;
            };
            gpu.run(&plan).expect("the device answers");
            let (mut want_logits, mut want) = (vec![0.0; num_rows], vec![0.0; num_rows]);
            router_expert(&kernel, &params, &active, &x, &weight, &mut want_logits, Some(&mut want));
            parity::assert_close(&id, &logits.read(gpu), &want_logits, Tolerance::F32);
            parity::assert_close(&id, &gates.read(gpu), &want, Tolerance::F32);
            if norms {
                let halves: Vec<half::f16> = gpu.read(&y).expect("the device answers");
                let halves: Vec<f32> = halves.into_iter().map(f32::from).collect();
                let want = rms_norm(&active, &x, &norm_weight, params.eps);
                let listed = active.iter().flat_map(|entry| &halves[entry.row as usize * c..][..c]);
                parity::assert_close(&id, &listed.copied().collect::<Vec<_>>(), &want, Tolerance::F16);
            }
            let bytes = 4 * (num_rows + 1) * c + usize::from(norms) * (2 * num_rows + 4) * c;
            time(criterion, gpu, "router_expert", &id, bytes as u64, &plan);
        }
    }
}
