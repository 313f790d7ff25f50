//! `linear`: 512 rows (prefill) of the projections of every shape, f16 weights, then tiles the device might prefer
//! on one of them; throughput counts FLOP.

use criterion::Criterion;
use mor_bench::{SHAPES, record, time_flop};
use mor_kernels::epilogue::{Epilogue, EpilogueKind, LinearParams};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{Linear, LinearBindings, LinearTile};
use mor_kernels::oracle::linear::linear;
use mor_kernels::parity::{self, Rng, Tolerance};
use mor_kernels::plan::Grid;
use mor_kernels::tensor::DType;

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    for shape in SHAPES {
        let (c, mlp) = (shape.hidden_size, shape.intermediate_size);
        let q_dim = shape.num_attention_heads * shape.head_dim;
        let qkv = q_dim + 2 * shape.num_key_value_heads * shape.head_dim;
        for (name, k, o) in [("qkv", c, qkv), ("o", q_dim, c), ("gate_up", c, 2 * mlp), ("down", mlp, c)] {
            let tile = LinearTile::for_shape(gpu.caps(), 512, o);
            product(criterion, gpu, &format!("{}/{name}/512", shape.name), [512, o, k], &[tile]);
        }
    }
    product(criterion, gpu, "tiles/360m/down/16", [16, 960, 2560], &candidates());
    product(criterion, gpu, "tiles/360m/down/64", [64, 960, 2560], &candidates());
    // A software rasteriser is slow at these tiles and does not use them.
    if !gpu.caps().is_cpu {
        product(criterion, gpu, "tiles/360m/down/512", [512, 960, 2560], &candidates());
        product(criterion, gpu, "tiles/360m/gate_up/512", [512, 5120, 960], &candidates());
    }
}

fn candidates() -> Vec<LinearTile> {
    let staged = |[tile_m, tile_n, tile_k, thread_m, thread_n]: [u32; 5]| LinearTile::Staged {
        tile_m,
        tile_n,
        tile_k,
        thread_m,
        thread_n,
    };
    [
        [128, 128, 8, 8, 16],
        [128, 64, 16, 8, 8],
        [64, 128, 16, 8, 8],
        [64, 64, 16, 8, 8],
        [64, 64, 16, 8, 4],
        [64, 32, 16, 8, 4],
        [64, 32, 32, 4, 4],
        [32, 64, 16, 4, 4],
        [32, 32, 32, 4, 4],
        [32, 32, 32, 4, 2],
        [16, 64, 32, 4, 4],
        [16, 32, 64, 4, 2],
    ]
    .map(staged)
    .to_vec()
}

/// Checks and times `y [n, o] = x [n, k] w^T` with each of `tiles`.
fn product(criterion: &mut Criterion, gpu: &Gpu, what: &str, [n, o, k]: [u32; 3], tiles: &[LinearTile]) {
    let mut rng = Rng::new(what);
    let (n_len, o_len, k_len) = (n as usize, o as usize, k as usize);
    let rows = parity::row_set(gpu, &parity::some_rows(&mut rng, n_len, n_len));
    let (weight, w) = parity::upload_weight(gpu, &mut rng, o_len, k_len, DType::F16);
    let x = rng.normals(n_len * k_len);
    let input = parity::upload(gpu, &x);
    // Rows of the first, a middle and the last tile: the whole product would take the CPU minutes.
    let checked = [0, n_len / 2 + 1, n_len - 1];
    let want = checked.map(|row| linear(&x[row * k_len..][..k_len], &w, k_len));
    for tile in tiles {
        let id = match (tiles.len(), *tile) {
            (1, _) => what.to_owned(),
            (_, LinearTile::Staged { tile_m, tile_n, tile_k, thread_m, thread_n }) => {
                format!("{what}/{tile_m}x{tile_n}x{tile_k} {thread_m}x{thread_n}")
            }
            (_, tile) => format!("{what}/{tile:?}"),
        };
        let y = parity::Output::new(gpu, n_len * o_len);
        let kernel = Linear { weight_dtype: DType::F16, x_by_row: false, epilogue: EpilogueKind::Store, tile: *tile };
        let epilogue = Epilogue::Store { out: &y.tensor };
        let bindings = LinearBindings { rows: &rows, weight: &weight, x: &input, epilogue };
        let params = LinearParams { num_outputs: o, out_stride: o, in_features: k, scale: 1.0, ..Default::default() };
        let [tile_m, tile_n] = tile.size();
        let grid = Grid::Fixed([o.div_ceil(tile_n), n.div_ceil(tile_m), 1]);
        let Some(plan) = record(gpu, &id, |plan| plan.dispatch(&kernel, &bindings, &params, grid)) else { continue };
        gpu.run(&plan).expect("the device answers");
        let got = y.read(gpu);
        for (row, want) in checked.into_iter().zip(&want) {
            parity::assert_close(&id, &got[row * o_len..][..o_len], want, Tolerance::F32);
        }
        time_flop(criterion, gpu, "linear", &id, 2 * u64::from(k) * u64::from(o) * u64::from(n), &plan);
    }
}
