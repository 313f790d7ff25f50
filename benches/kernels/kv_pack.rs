//! `kv_pack`: 1 row (decode) and 512 rows (prefill) of every shape.

use criterion::Criterion;
use mor_bench::{SHAPES, record, time};
use mor_kernels::gpu::Gpu;
use mor_kernels::kv_blocks::BLOCK;
use mor_kernels::ops::{KvPack, KvPackBindings, KvPackParams};
use mor_kernels::oracle::kv_pack::kv_pack;
use mor_kernels::parity::{self, Rng};
use mor_kernels::plan::Grid;
use mor_kernels::tensor::{DType, Tensor};

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let mut rng = Rng::new("bench kv_pack");
    for shape in SHAPES {
        for num_rows in [1, 512] {
            let kv_dim = (shape.num_key_value_heads * shape.head_dim) as usize;
            let mut active = parity::some_rows(&mut rng, num_rows, num_rows);
            active.iter_mut().enumerate().for_each(|(i, entry)| entry.kv_slot = i as u32);
            let halves: Vec<_> = rng.normals(num_rows * kv_dim).into_iter().map(half::f16::from_f32).collect();
            let tensor = |dtype| Tensor::zeros(gpu, "kv", dtype, &[num_rows, kv_dim]).expect("it fits");
            let k = Tensor::from_slice(gpu, "kv", DType::F16, &[num_rows, kv_dim], &halves).expect("it fits");
            let (k_cache, v_cache) = (tensor(DType::Block8), tensor(DType::Block8));
            let rows = parity::row_set(gpu, &active);
            let bindings = KvPackBindings { rows: &rows, k: &k, v: &k, k_cache: &k_cache, v_cache: &v_cache };
            let params = KvPackParams { num_units: (kv_dim / BLOCK) as u32 };
            let kernel = KvPack::default();
            let id = format!("{}/{num_rows}", shape.name);
            let grid = Grid::Fixed([kernel.columns(params), num_rows as u32, 1]);
            let Some(plan) = record(gpu, &id, |plan| plan.dispatch(&kernel, &bindings, &params, grid)) else {
                continue;
            };
            gpu.run(&plan).expect("the device answers");
            let floats: Vec<f32> = halves.iter().map(|v| v.to_f32()).collect();
            let mut want = vec![0; num_rows * kv_dim / BLOCK];
            kv_pack(&active, &floats, kv_dim, &mut want);
            let got: Vec<u64> = gpu.read(&k_cache).expect("the device answers");
            assert_eq!(got, want, "{id}");
            time(criterion, gpu, "kv_pack", &id, (2 * 3 * num_rows * kv_dim) as u64, &plan);
        }
    }
}
