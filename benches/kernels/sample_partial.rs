//! `sample_partial`: one row and a batch, greedy and drawn, of small and SmolLM vocabularies.

use criterion::Criterion;
use mor_bench::{record, time};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{GpuSampling, SamplePartial, SamplePartialBindings, SamplePartialParams};
use mor_kernels::oracle::sample_partial::sample_partial;
use mor_kernels::parity::{self, Output, Rng};
use mor_kernels::plan::Grid;
use mor_kernels::rows::ActiveRow;

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let mut rng = Rng::new("bench sample_partial");
    let greedy = GpuSampling::default();
    let plain = GpuSampling { temperature: 0.8, ..greedy };
    let cases = [
        ("greedy", greedy),
        ("plain", plain),
        ("penalty", GpuSampling { repetition_penalty: 1.1, ..plain }),
        ("top-p", GpuSampling { top_p: 0.95, ..plain }),
    ];
    for vocab_size in [4096_u32, 49152] {
        // As spread as a trained model's logits: some tokens stand out.
        let logits: Vec<f32> = rng.normals(vocab_size as usize).iter().map(|logit| 3.0 * logit).collect();
        for (name, sampling) in cases {
            for num_rows in [1, 32] {
                let row = |i| ActiveRow { row: i, sequence: i, ..ActiveRow::ABSENT };
                let active: Vec<_> = (0..num_rows).map(row).collect();
                let seen_words = vocab_size.div_ceil(32);
                let num_parts = SamplePartial::num_parts(vocab_size);
                let partials = Output::new(gpu, (4 * num_rows * num_parts) as usize);
                let bindings = SamplePartialBindings {
                    rows: &parity::row_set(gpu, &active),
                    logits: &parity::upload(gpu, &logits.repeat(num_rows as usize)),
                    sampling: &parity::upload_u32(gpu, bytemuck::cast_slice(&vec![sampling; num_rows as usize])),
                    seen: &parity::upload_u32(gpu, &vec![0; (num_rows * seen_words) as usize]),
                    partials: &partials.tensor,
                };
                let params = SamplePartialParams { vocab_size, logits_stride: vocab_size, seen_words };
                let id = format!("{name}/{vocab_size}/{num_rows}");
                let grid = Grid::Fixed([num_parts, num_rows, 1]);
                let kernel = SamplePartial::new(gpu.caps());
                let Some(plan) = record(gpu, &id, |plan| plan.dispatch(&kernel, &bindings, &params, grid)) else {
                    continue;
                };
                gpu.run(&plan).expect("the device answers");
                let want = sample_partial(&logits, &sampling, &[], 0, SamplePartial::PART_SIZE as usize);
                assert_eq!(partials.read_u32(gpu), want.repeat(num_rows as usize).as_flattened(), "{id}");
                time(criterion, gpu, "sample_partial", &id, 4 * u64::from(num_rows * vocab_size), &plan);
            }
        }
    }
}
