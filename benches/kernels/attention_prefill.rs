//! `attention_prefill`: 512 and 2048 rows of one sequence of every shape, f16 cache; throughput counts the FLOP of
//! scores and sums. Ids end with `half` where queries and weights may be rounded to f16.

use criterion::Criterion;
use mor_bench::{SHAPES, record, time_flop};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{AttentionPrefill, AttentionPrefillBindings, AttentionPrefillParams, AttentionShape};
use mor_kernels::oracle::attention_decode::AttentionInputs;
use mor_kernels::oracle::attention_prefill::{attention_prefill, half_queries};
use mor_kernels::parity::{self, Rng, Tolerance};
use mor_kernels::plan::Grid;
use mor_kernels::rows::KvTable;
use mor_kernels::tensor::DType;

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let mut rng = Rng::new("bench attention_prefill");
    for sizes in SHAPES {
        let shape = AttentionShape {
            num_attention_heads: sizes.num_attention_heads,
            num_key_value_heads: sizes.num_key_value_heads,
            head_dim: sizes.head_dim,
            kv_dtype: DType::F16,
            kv_table: KvTable::Pages,
        };
        for num_rows in [512, 2048] {
            let id = format!("{}/{num_rows}", sizes.name);
            if gpu.caps().is_cpu && num_rows > 512 {
                eprintln!("{id} skipped: too slow to check on a CPU");
                continue;
            }
            let mut inputs = AttentionInputs::random(&mut rng, &shape, &[(num_rows, num_rows)], 1.0);
            inputs.q = half_queries(&inputs.q, shape.scale());
            attention(
                criterion,
                gpu,
                &id,
                AttentionPrefill::new(shape, num_rows as u32, false),
                &inputs,
                Tolerance::F32,
            );
            let kernel = AttentionPrefill::new(shape, num_rows as u32, true);
            if kernel.can_write_halves(gpu.caps()) {
                attention(criterion, gpu, &format!("{id}/half"), kernel, &inputs, Tolerance::F16);
            }
        }
    }
}

fn attention(
    criterion: &mut Criterion,
    gpu: &Gpu,
    id: &str,
    kernel: AttentionPrefill,
    inputs: &AttentionInputs,
    tolerance: Tolerance,
) {
    let (shape, num_rows) = (kernel.shape, inputs.active.len());
    let tensors = inputs.upload(gpu, &shape);
    let row_elems = (shape.num_attention_heads * shape.head_dim) as usize;
    let out = parity::Output::new(gpu, num_rows * row_elems);
    let bindings = AttentionPrefillBindings {
        rows: &tensors.rows,
        q: &tensors.q,
        keys: &tensors.keys,
        values: &tensors.values,
        kv_table: &tensors.table,
        out: &out.tensor,
    };
    let params = AttentionPrefillParams { scale: shape.scale() };
    let grid = Grid::Fixed(kernel.grid(num_rows as u32, gpu.caps()));
    let Some(plan) = record(gpu, id, |plan| plan.dispatch(&kernel, &bindings, &params, grid)) else {
        return;
    };
    gpu.run(&plan).expect("the device answers");
    parity::assert_close(id, &out.read(gpu), &attention_prefill(&shape, inputs, shape.scale()), tolerance);
    // A row sees itself and all before it.
    let flop = 2 * row_elems * num_rows * (num_rows + 1);
    time_flop(criterion, gpu, "attention_prefill", id, flop as u64, &plan, 1);
}
