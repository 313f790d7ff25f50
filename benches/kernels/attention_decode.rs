//! `attention_decode`: 1 row of every shape over short, usual and long contexts, f16 cache.

use criterion::Criterion;
use mor_bench::{SHAPES, is_wanted, record, time_read};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{AttentionDecode, AttentionDecodeBindings, AttentionDecodeParams, AttentionShape};
use mor_kernels::oracle::attention_decode::{AttentionInputs, merge_partials};
use mor_kernels::oracle::attention_prefill::attention_prefill;
use mor_kernels::parity::{self, Rng, Tolerance};
use mor_kernels::plan::Grid;
use mor_kernels::rows::KvTable;
use mor_kernels::tensor::DType;

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let mut rng = Rng::new("bench attention_decode");
    for sizes in SHAPES {
        let shape = AttentionShape {
            num_attention_heads: sizes.num_attention_heads,
            num_key_value_heads: sizes.num_key_value_heads,
            head_dim: sizes.head_dim,
            kv_dtype: DType::F16,
            kv_table: KvTable::Pages,
        };
        for kv_len in [256, 2048, 32768] {
            let id = format!("{}/{kv_len}", sizes.name);
            if !is_wanted(&format!("attention_decode/{id}")) {
                continue;
            }
            let cache_elems = kv_len * (shape.num_key_value_heads * shape.head_dim) as usize;
            if gpu.caps().is_cpu && cache_elems > 1 << 21 {
                eprintln!("{id} skipped: too slow to prepare and run on a CPU");
                continue;
            }
            let num_splits = AttentionDecode::suggest_splits(&shape, 1, kv_len as u32, gpu.caps());
            let kernel = AttentionDecode::new(shape, num_splits, gpu.caps());
            let inputs = AttentionInputs::random(&mut rng, &shape, &[(1, kv_len)], 1.0);
            let tensors = inputs.upload(gpu, &shape);
            let num_partials = (shape.num_attention_heads * num_splits) as usize;
            let partial_out = parity::Output::new(gpu, num_partials * shape.head_dim as usize);
            let partial_stats = parity::Output::new(gpu, num_partials * 2);
            let bindings = AttentionDecodeBindings {
                rows: &tensors.rows,
                q: &tensors.q,
                keys: &tensors.keys,
                values: &tensors.values,
                kv_table: &tensors.table,
                partial_out: &partial_out.tensor,
                partial_stats: (num_splits > 1).then_some(&partial_stats.tensor),
            };
            let params = AttentionDecodeParams { scale: shape.scale() };
            let grid = Grid::Fixed(kernel.grid(1));
            let Some(plan) = record(gpu, &id, |plan| plan.dispatch(&kernel, &bindings, &params, grid)) else {
                continue;
            };
            gpu.run(&plan).expect("the device answers");
            let mut got = partial_out.read(gpu);
            if num_splits > 1 {
                got = merge_partials(&shape, num_splits, &got, &partial_stats.read(gpu));
            }
            parity::assert_close(&id, &got, &attention_prefill(&shape, &inputs, shape.scale()), Tolerance::F32);
            time_read(criterion, gpu, "attention_decode", &id, (2 * 2 * cache_elems) as u64, &plan, &|| {});
        }
    }
}
