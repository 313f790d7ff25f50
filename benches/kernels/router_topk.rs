//! `router_topk`: a third of one sequence of 512 and 2048 rows.

use criterion::Criterion;
use mor_bench::{record, time};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{RouterTopk, RouterTopkBindings, RouterTopkParams, TopkSequence};
use mor_kernels::oracle::router_topk::router_topk;
use mor_kernels::parity::{self, Output, Rng};
use mor_kernels::tensor::{DType, Tensor};

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let mut rng = Rng::new("bench router_topk");
    for num_rows in [512, 2048] {
        let sequence = TopkSequence { num_rows, k: num_rows / 3, ..TopkSequence::default() };
        let gates: Vec<f32> = (0..num_rows).map(|_| 0.1 * rng.unit()).collect();
        let depth = vec![1; num_rows as usize];
        let decision = Output::new(gpu, num_rows as usize);
        let bindings = RouterTopkBindings {
            sequences: &Tensor::from_slice(gpu, "sequences", DType::U32, &[1, 4], &[sequence])
                .expect("a small buffer fits"),
            gates: &parity::upload(gpu, &gates),
            depth: &parity::upload_u32(gpu, &depth),
            decision: &decision.tensor,
        };
        let params = RouterTopkParams { recursion: 1 };
        let id = num_rows.to_string();
        let Some(plan) = record(gpu, &id, |plan| RouterTopk::default().record(plan, bindings, params)) else {
            continue;
        };
        gpu.run(&plan).expect("the device answers");
        let got = decision.read(gpu);
        for (row, selected) in router_topk(&[sequence], &gates, &depth, 1) {
            assert_eq!(got[row], if selected { 1.0 } else { -1.0 }, "{id}: row {row}");
        }
        time(criterion, gpu, "router_topk", &id, 12 * u64::from(num_rows), &plan);
    }
}
