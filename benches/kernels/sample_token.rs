//! `sample_token`: one row, greedy and the usual ways to draw, of small and SmolLM vocabularies; what `sample_partial` left
//! lies ready.

use criterion::Criterion;
use mor_bench::{record, time};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{
    GpuSampling, SamplePartial, SamplePartialBindings, SamplePartialParams, SampleToken, SampleTokenBindings,
    SampleTokenParams,
};
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
            let (logits_stride, seen_words) = (vocab_size, vocab_size.div_ceil(32));
            let num_parts = SamplePartial::num_parts(vocab_size);
            let results = Output::new(gpu, 2);
            let bindings = SampleTokenBindings {
                rows: &parity::row_set(gpu, &active),
                logits: &parity::upload(gpu, &logits),
                sampling: &parity::upload_u32(gpu, bytemuck::cast_slice(&[sampling])),
                partials: &Output::new(gpu, 4 * num_parts as usize).tensor,
                seen: &parity::upload_u32(gpu, &vec![0; seen_words as usize]),
                next_rows: &Output::new(gpu, 4).tensor,
                results: &results.tensor,
            };
            let SampleTokenBindings { rows, logits: row, sampling: how, partials, seen, .. } = bindings;
            let before = SamplePartialBindings { rows, logits: row, sampling: how, seen, partials };
            parity::run(gpu, |plan| {
                let params = SamplePartialParams { vocab_size, logits_stride, seen_words };
                plan.dispatch(&SamplePartial::new(gpu.caps()), &before, &params, Grid::Fixed([num_parts, 1, 1]))
            });
            let params = SampleTokenParams { vocab_size, logits_stride, seen_words, num_parts };
            let id = format!("{name}/{vocab_size}");
            let grid = Grid::Fixed([1, 1, 1]);
            let kernel = SampleToken::new(gpu.caps());
            let Some(plan) = record(gpu, &id, |plan| plan.dispatch(&kernel, &bindings, &params, grid)) else {
                continue;
            };
            gpu.run(&plan).expect("the device answers");
            assert_eq!(results.read_u32(gpu)[0], sample_token(&logits, &sampling, &[], 0), "{id}");
            let cuts_off = sampling.top_k > 0 || sampling.top_p < 1.0;
            let bytes = if cuts_off { 4 * u64::from(vocab_size) } else { 16 * u64::from(num_parts) };
            time(criterion, gpu, "sample_token", &id, bytes, &plan);
        }
    }
}
