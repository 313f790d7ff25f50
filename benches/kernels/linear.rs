//! `linear`: the projections of every shape at 512 rows (prefill), those of one shape at every number of rows that decode
//! batches have, large ones, then tiles the device might prefer; f16 weights, and q8 and q4 where ids say so; throughput counts FLOP.
//! Ids end with `half` where activations are rounded to f16, with `parts` where workgroups multiply parts of the inputs besides.

use criterion::Criterion;
use mor_bench::{SHAPES, Shape, is_wanted, record, time_flop};
use mor_kernels::epilogue::{Epilogue, EpilogueKind, LinearParams};
use mor_kernels::gpu::Gpu;
use mor_kernels::ops::{Linear, LinearBindings, LinearTile, PartSums, Prologue};
use mor_kernels::oracle::linear::{halves, linear};
use mor_kernels::parity::{self, Rng, Tolerance};
use mor_kernels::plan::Grid;
use mor_kernels::tensor::{DType, Tensor};

/// Bytes of weights that a timed plan walks through: more than the caches of large GPUs, as a model's layers are.
const WEIGHT_POOL_BYTES: usize = 160 << 20;

pub(crate) fn bench(criterion: &mut Criterion, gpu: &Gpu) {
    let tile = |n, o, half_products| LinearTile::for_shape(gpu.caps(), [n, o], half_products);
    let half_products = gpu.caps().cooperative_matrices.is_some();
    for shape in SHAPES {
        for (name, o, k) in projections(shape) {
            let id = format!("{}/{name}/512", shape.name);
            // A software rasteriser takes seconds for each of the larger ones.
            let is_small = shape.name == "tinystories-5m";
            for (id, dtype) in formats(&id).into_iter().take(if gpu.caps().is_cpu && !is_small { 1 } else { 3 }) {
                product(criterion, gpu, &id, [512, o, k], dtype, &[tile(512, o, false)]);
                if half_products {
                    product(criterion, gpu, &format!("{id}/half"), [512, o, k], dtype, &[tile(512, o, true)]);
                }
                if let Some(tile) = LinearTile::in_parts(gpu.caps(), [512, o], 512, k) {
                    product(criterion, gpu, &format!("{id}/parts"), [512, o, k], dtype, &[tile]);
                }
            }
        }
    }
    // A software rasteriser is slow at these sizes and tiles, and uses none of them.
    if gpu.caps().is_cpu {
        return;
    }
    for shape in SHAPES.iter().filter(|shape| shape.name == "360m") {
        let head = ("head", shape.vocab_size, shape.hidden_size);
        for (name, o, k) in projections(shape).into_iter().chain([head]) {
            for n in [8, 16, 32, 64, 128, 256] {
                for (id, dtype) in formats(&format!("360m/{name}/{n}")) {
                    product(criterion, gpu, &id, [n, o, k], dtype, &[tile(n, o, false)]);
                    if half_products {
                        product(criterion, gpu, &format!("{id}/half"), [n, o, k], dtype, &[tile(n, o, true)]);
                    }
                }
            }
        }
    }
    for [n, o, k] in [[4096, 4096, 4096], [2048, 8192, 2048]] {
        let half = if half_products { "/half" } else { "" };
        product(criterion, gpu, &format!("{n}x{o}x{k}{half}"), [n, o, k], DType::F16, &[tile(n, o, half_products)]);
    }
    for (name, o, k) in [("down", 960, 2560), ("gate_up", 5120, 960)] {
        for n in [16, 64, 128, 512] {
            product(
                criterion,
                gpu,
                &format!("tiles/360m/{name}/{n}"),
                [n, o, k],
                DType::F16,
                &LinearTile::candidates(gpu.caps()),
            );
        }
    }
}

/// The types that are timed, with their ids.
fn formats(id: &str) -> [(String, DType); 3] {
    [(id.to_owned(), DType::F16), (format!("{id}/q8"), DType::Q8), (format!("{id}/q4"), DType::Q4)]
}

/// Name, outputs and inputs of the matrices of a layer.
fn projections(shape: &Shape) -> [(&'static str, u32, u32); 4] {
    let (c, mlp) = (shape.hidden_size, shape.intermediate_size);
    let q_dim = shape.num_attention_heads * shape.head_dim;
    let qkv = q_dim + 2 * shape.num_key_value_heads * shape.head_dim;
    [("qkv", qkv, c), ("o", c, q_dim), ("gate_up", 2 * mlp, c), ("down", c, mlp)]
}

/// Fields of a tile in few characters.
fn tile_id(tile: LinearTile) -> String {
    match tile {
        LinearTile::Staged { tile_m, tile_n, tile_k, thread_m, thread_n, split_k, ahead } => {
            format!("staged {tile_m}x{tile_n}x{tile_k} {thread_m}x{thread_n} split {split_k} ahead {ahead}")
        }
        LinearTile::Cooperative { tile_m, tile_n, tile_k, subgroups_m, subgroups_n, split_k, ahead, .. } => {
            format!("cooperative {tile_m}x{tile_n}x{tile_k} {subgroups_m}x{subgroups_n} split {split_k} ahead {ahead}")
        }
        LinearTile::Direct { tile_m, tile_n, thread_n } => format!("direct {tile_m}x{tile_n} {thread_n}"),
    }
}

/// Checks and times `y [n, o] = x [n, k] w^T` with each of `tiles`.
fn product(criterion: &mut Criterion, gpu: &Gpu, what: &str, [n, o, k]: [u32; 3], dtype: DType, tiles: &[LinearTile]) {
    if !is_wanted(&format!("linear/{what}")) {
        return;
    }
    let mut rng = Rng::new(what);
    let (n_len, o_len, k_len) = (n as usize, o as usize, k as usize);
    let rows = parity::row_set(gpu, &parity::some_rows(&mut rng, n_len, n_len));
    let (weight, w) = parity::upload_weight(gpu, &mut rng, o_len, k_len, dtype);
    let data: Vec<u8> = gpu.read(&weight).expect("the device answers");
    let count = if gpu.caps().is_cpu { 1 } else { WEIGHT_POOL_BYTES.div_ceil(data.len()).min(64) };
    let mut weights = vec![weight];
    while weights.len() < count {
        match Tensor::from_slice(gpu, "weight", dtype, &[o_len, k_len], &data) {
            Ok(weight) => weights.push(weight),
            Err(error) => return eprintln!("{what} skipped: {error}"),
        }
    }
    let x = rng.normals(n_len * k_len);
    let (floats, rounded) = (parity::upload(gpu, &x), x.iter().map(|v| half::f16::from_f32(*v)).collect::<Vec<_>>());
    let rounded = Tensor::from_slice(gpu, "x", DType::F16, &[n_len, k_len], &rounded).expect("it fits");
    let part_sums = tiles.iter().any(|tile| tile.parts() > 1).then(|| {
        let zeros = |label, dtype, len| Tensor::zeros(gpu, label, dtype, &[len]).expect("it fits");
        let sums = zeros("part_sums", DType::F32, LinearTile::MOST_PART_SUMS);
        (sums, zeros("arrivals", DType::U32, LinearTile::MOST_PARTED_TILES))
    });
    let parts = part_sums.as_ref().map(|(sums, arrivals)| PartSums { sums, arrivals });
    // Rows of the first, a middle and the last tile: the whole product would take the CPU minutes.
    let checked = [0, n_len / 2 + 1, n_len - 1];
    for tile in tiles {
        let id = if let [_] = tiles { what.to_owned() } else { format!("{what}/{}", tile_id(*tile)) };
        let y = parity::Output::new(gpu, n_len * o_len);
        // As the kernels of prefill hand them over.
        let prologue = Prologue::Compact { x: if tile.multiplies_halves() { &rounded } else { &floats } };
        let kernel = Linear {
            in_features: k,
            weight_dtype: dtype,
            prologue: prologue.kind(),
            epilogue: EpilogueKind::Store,
            tile: *tile,
        };
        let params = LinearParams { num_outputs: o, out_stride: o, in_features: k, scale: 1.0, ..Default::default() };
        let [tile_m, tile_n] = tile.size();
        let grid = Grid::Fixed([o.div_ceil(tile_n), n.div_ceil(tile_m), tile.parts()]);
        let dispatch_all = |plan: &mut mor_kernels::plan::PlanBuilder<'_>| {
            weights.iter().try_for_each(|weight| {
                let epilogue = Epilogue::Store { out: &y.tensor };
                let bindings = LinearBindings { rows: &rows, weight, prologue, epilogue, parts };
                plan.dispatch(&kernel, &bindings, &params, grid)
            })
        };
        let Some(plan) = record(gpu, &id, dispatch_all) else { continue };
        gpu.run(&plan).expect("the device answers");
        let got = y.read(gpu);
        for row in checked {
            let x = &x[row * k_len..][..k_len];
            let want = match tile {
                LinearTile::Cooperative { .. } => linear(&halves(x), &w, k_len),
                _ => linear(x, &w, k_len),
            };
            parity::assert_close(&id, &got[row * o_len..][..o_len], &want, Tolerance::F32);
        }
        let flop = 2 * u64::from(k) * u64::from(o) * u64::from(n);
        time_flop(criterion, gpu, "linear", &id, flop, &plan, weights.len());
    }
}
