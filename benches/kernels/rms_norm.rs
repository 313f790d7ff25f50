//! `rms_norm`: 1 row (decode) and 512 rows (prefill) of every shape.

use criterion::Criterion;
use mor_bench::{SHAPES, record, time};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{RmsNorm, RmsNormBindings, RmsNormParams};
use mor_kernels::oracle::rms_norm::rms_norm;
use mor_kernels::parity::{self, Rng, Tolerance};
use mor_kernels::plan::Grid;

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let mut rng = Rng::new("bench rms_norm");
    for shape in SHAPES {
        for num_rows in [1, 512] {
            let c = shape.hidden_size as usize;
            let active = parity::some_rows(&mut rng, num_rows, num_rows);
            let (x, weight) = (rng.normals(num_rows * c), rng.normals(c));
            let y = parity::Output::new(gpu, num_rows * c);
            let bindings = RmsNormBindings {
                rows: &parity::row_set(gpu, &active),
                x: &parity::upload(gpu, &x),
                weight: &parity::upload(gpu, &weight),
                y: &y.tensor,
            };
            let params = RmsNormParams { eps: 1e-5 };
            let kernel = RmsNorm::new(gpu.caps(), shape.hidden_size);
            let id = format!("{}/{num_rows}", shape.name);
            let grid = Grid::Fixed([1, num_rows as u32, 1]);
            let Some(plan) = record(gpu, &id, |plan| plan.dispatch(&kernel, &bindings, &params, grid)) else {
                continue;
            };
            gpu.run(&plan).expect("the device answers");
            parity::assert_close(&id, &y.read(gpu), &rms_norm(&active, &x, &weight, 1e-5), Tolerance::F32);
            time(criterion, gpu, "rms_norm", &id, (8 * num_rows * c) as u64, &plan);
        }
    }
}
