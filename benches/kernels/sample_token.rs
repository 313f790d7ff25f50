//! `sample_token`: one row, greedy and the usual ways to draw, of small and SmolLM vocabularies.

use criterion::Criterion;
use mor_bench::{record, time};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{GpuSampling, SampleToken, SampleTokenBindings, SampleTokenParams};
use mor_kernels::oracle::sample_token::sample_token;
use mor_kernels::parity::{self, Output, Rng};
use mor_kernels::plan::Grid;

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let mut rng = Rng::new("bench sample_token");
    let greedy = GpuSampling::default();
    let plain = GpuSampling { temperature: 0.8, ..greedy };
    let cases = [
        ("greedy", greedy),
        ("plain", plain),
        ("top-k", GpuSampling { top_k: 40, ..plain }),
        ("top-p", GpuSampling { top_p: 0.95, ..plain }),
        ("top-k-p", GpuSampling { top_k: 40, top_p: 0.95, ..plain }),
        ("top-k-p-penalty", GpuSampling { top_k: 40, top_p: 0.95, repetition_penalty: 1.1, ..plain }),
    ];
    for vocab_size in [4096_u32, 49152] {
        // As spread as a trained model's logits: some tokens stand out.
        let logits: Vec<f32> = rng.normals(vocab_size as usize).iter().map(|logit| 3.0 * logit).collect();
        for (name, sampling) in cases {
            let active = parity::some_rows(&mut rng, 1, 1);
            let seen_words = vocab_size.div_ceil(32);
            let results = Output::new(gpu, 2);
            let bindings = SampleTokenBindings {
                rows: &parity::row_set(gpu, &active),
                logits: &parity::upload(gpu, &logits),
                sampling: &parity::upload_u32(gpu, bytemuck::cast_slice(&[sampling])),
                seen: &parity::upload_u32(gpu, &vec![0; seen_words as usize]),
                next_rows: &Output::new(gpu, 4).tensor,
                results: &results.tensor,
            };
            let params = SampleTokenParams { vocab_size, logits_stride: vocab_size, seen_words };
            let id = format!("{name}/{vocab_size}");
            let grid = Grid::Fixed([1, 1, 1]);
            let kernel = SampleToken::new(gpu.caps());
            let Some(plan) = record(gpu, &id, |plan| plan.dispatch(&kernel, &bindings, &params, grid)) else {
                continue;
            };
            gpu.run(&plan).expect("the device answers");
            assert_eq!(results.read_u32(gpu)[0], sample_token(&logits, &sampling, &[], 0), "{id}");
            time(criterion, gpu, "sample_token", &id, 4 * u64::from(vocab_size), &plan);
        }
    }
}
