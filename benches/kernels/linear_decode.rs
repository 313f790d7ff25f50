//! `linear_decode`: 1 and 4 rows (decode) of the projections of every shape and of a large square one, f16, bf16, q8 and q4
//! weights; throughput counts the bytes of the weights, which are the traffic.

use criterion::Criterion;
use mor_bench::{SHAPES, is_wanted, record, time_read};
use mor_kernels::epilogue::{Epilogue, EpilogueKind, LinearParams};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{LinearDecode, LinearDecodeBindings, Prologue};
use mor_kernels::oracle::linear_decode::{linear, rounded_to_digits};
use mor_kernels::oracle::rms_norm::rms_norm;
use mor_kernels::parity::{self, Output, Rng, Tolerance};
use mor_kernels::plan::Grid;
use mor_kernels::tensor::{DType, Tensor};

/// Rows of a weight that differ; they repeat after that. A prime, so that no misread row has the right values, and
/// few enough that the CPU makes and checks a head of a hundred million weights in seconds.
const DISTINCT_ROWS: usize = 251;

/// The types that are timed, with their ids.
const FORMATS: [(DType, &str); 4] = [(DType::F16, "f16"), (DType::BF16, "bf16"), (DType::Q8, "q8"), (DType::Q4, "q4")];

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    for shape in SHAPES {
        let (c, mlp) = (shape.hidden_size, shape.intermediate_size);
        let q_dim = shape.num_attention_heads * shape.head_dim;
        let qkv = q_dim + 2 * shape.num_key_value_heads * shape.head_dim;
        // (name, inputs, outputs, whether a norm stands before it).
        let projections = [
            ("qkv", c, qkv, true),
            ("o", q_dim, c, false),
            ("gate_up", c, 2 * mlp, true),
            ("down", mlp, c, false),
            ("lm_head", c, shape.vocab_size, true),
        ];
        for (name, k, o, normed) in projections {
            for (dtype, suffix) in FORMATS {
                product(criterion, gpu, &format!("{}/{name}/{suffix}", shape.name), [o, k], normed, dtype);
            }
        }
    }
    // Longer than a phase of any shape: how near the kernel comes to the device's bandwidth. A software rasteriser has none to show.
    for (dtype, suffix) in FORMATS.into_iter().filter(|_| !gpu.caps().is_cpu) {
        product(criterion, gpu, &format!("square/8192/{suffix}"), [8192, 8192], false, dtype);
    }
}

/// Checks and times `y [n, o] = norm(x [n, k]) w^T`, the norm only if `normed`.
fn product(criterion: &mut Criterion, gpu: &Gpu, what: &str, [o, k]: [u32; 2], normed: bool, dtype: DType) {
    if !is_wanted(&format!("linear_decode/{what}")) {
        return;
    }
    let bytes = u64::from(o) * dtype.row_bytes(k as usize) as u64;
    if bytes > gpu.caps().max_storage_binding_bytes {
        eprintln!("{what} skipped: {bytes} bytes of weights are more than one binding holds");
        return;
    }
    let (o_len, k_len) = (o as usize, k as usize);
    let mut rng = Rng::new(what);
    let distinct = DISTINCT_ROWS.min(o_len);
    let (rows_of_weight, w) = parity::upload_weight(gpu, &mut rng, distinct, k_len, dtype);
    let mut packed: Vec<u8> = gpu.read(&rows_of_weight).expect("the device answers");
    packed = packed.iter().copied().cycle().take(bytes as usize).collect();
    let weight = Tensor::from_slice(gpu, "weight", dtype, &[o_len, k_len], &packed).expect("it was asked for above");
    let weight = weight.into_weight(gpu).expect("a texture of as many bytes fits");
    let norm_weight = rng.normals(k_len);
    let norm_gpu = parity::upload(gpu, &norm_weight);

    for n in [1, 4] {
        let id = format!("{what}/{n}");
        let active = parity::some_rows(&mut rng, n, n);
        let rows = parity::row_set(gpu, &active);
        let x = rng.normals(n * k_len);
        let x_gpu = parity::upload(gpu, &x);
        let (prologue, input) = if normed {
            (Prologue::Norm { x: &x_gpu, weight: &norm_gpu }, rms_norm(&active, &x, &norm_weight, 1e-5))
        } else {
            (Prologue::Compact { x: &x_gpu }, x)
        };
        let y = Output::new(gpu, n * o_len);
        let epilogue = Epilogue::Store { out: &y.tensor };
        let kernel = LinearDecode::new(gpu.caps(), [o, k], dtype, prologue.kind(), EpilogueKind::Store, n as u32);
        let bindings = LinearDecodeBindings { rows: &rows, weight: &weight, prologue, epilogue };
        let params =
            LinearParams { num_outputs: o, out_stride: o, in_features: k, eps: 1e-5, scale: 1.0, ..Default::default() };
        // As decode of one sequence has it.
        let kernel = LinearDecode { single_row: n == 1, ..kernel };
        let columns = 2 * kernel.groups * kernel.pairs * kernel.rounds;
        let grid = Grid::Fixed([o.div_ceil(columns), (n as u32).div_ceil(kernel.rows), 1]);
        let Some(plan) = record(gpu, &id, |plan| plan.dispatch(&kernel, &bindings, &params, grid)) else { continue };
        gpu.run(&plan).expect("the device answers");
        let input = if kernel.multiplies_digits(gpu.caps()) { rounded_to_digits(&input) } else { input };
        let products = linear(&input, &w, k_len);
        let want: Vec<f32> =
            products.chunks(distinct).flat_map(|row| row.iter().copied().cycle().take(o_len)).collect();
        parity::assert_close(&id, &y.read(gpu), &want, Tolerance::F32);
        time_read(criterion, gpu, "linear_decode", &id, bytes, &plan, &|| {});
    }
}
