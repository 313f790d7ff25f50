//! `read_words`: what reading alone costs, of a tensor that caches hold and of one that they do not.

use criterion::Criterion;
use mor_bench::{record, time_read};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{ReadWords, ReadWordsBindings, ReadWordsParams};
use mor_kernels::oracle::read_words::read_words;
use mor_kernels::parity::{self, Rng};

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let mut rng = Rng::new("bench read_words");
    let kernel = ReadWords::new(gpu.caps());
    for (id, bytes) in [("1MiB", 1u32 << 20), ("64MiB", 64 << 20)] {
        let (num_quads, num_workgroups) = (bytes / 16, if gpu.caps().is_cpu { 64 } else { 2048 });
        let words: Vec<u32> = (0..4 * num_quads).map(|_| rng.next_u64() as u32).collect();
        let x = parity::upload_u32(gpu, &words).into_weight(gpu).expect("the texture fits");
        let out = parity::Output::new(gpu, num_workgroups as usize);
        let bindings = ReadWordsBindings { x: &x, out: &out.tensor };
        let params = ReadWordsParams { num_quads, num_workgroups };
        let Some(plan) = record(gpu, id, |plan| kernel.record(plan, bindings, params)) else { continue };
        gpu.run(&plan).expect("the device answers");
        let want = read_words(&words, num_workgroups as usize, kernel.quads_in_turn(gpu.caps(), params) as usize);
        assert_eq!(out.read_u32(gpu), want, "{id}");
        time_read(criterion, gpu, "read_words", id, bytes.into(), &plan, &|| {});
    }
}
