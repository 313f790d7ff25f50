//! Parity of `linear`.

use super::tiles::{COOPERATIVE_TILES, SMALL_TILES, cooperative_tile};
use super::*;
use crate::Gpu;
use crate::oracle::linear::{epilogue, gather, halves, linear, norm_factors};
use crate::parity::{self, EpilogueCase, Output, Rng, Tolerance};

const DTYPES: [DType; 5] = [DType::F32, DType::F16, DType::BF16, DType::Q8, DType::Q4];

/// A tile of which threads load unequal numbers of vectors of x and units of w.
const UNEVEN: LinearTile =
    LinearTile::Staged { tile_m: 24, tile_n: 20, tile_k: 16, thread_m: 4, thread_n: 2, split_k: 2, ahead: 2 };

/// All tiles that [`LinearTile::for_shape`] may choose anywhere, as far as the device can run them, and [`UNEVEN`].
fn tiles(gpu: &Gpu) -> Vec<LinearTile> {
    if gpu.caps().cooperative_matrices.is_none() {
        println!("\"{}\" has no cooperative matrices: their tiles are not run", gpu.summary().name);
    }
    let on_cpu = LinearTile::for_shape(&DeviceCaps { is_cpu: true, ..gpu.caps().clone() }, [64, 64], false);
    let mut tiles = vec![on_cpu, UNEVEN];
    tiles.extend(LinearTile::candidates(gpu.caps()));
    tiles.retain(|tile| tile.fits(gpu.caps()));
    tiles
}

/// `tile` as wide as columns in multiples of `unit` allow.
fn for_columns(mut tile: LinearTile, unit: usize) -> LinearTile {
    if let LinearTile::Cooperative { lane_columns, .. } = &mut tile {
        *lane_columns = if unit.is_multiple_of(4) { *lane_columns } else { 2 };
    }
    tile
}

fn dispatch(gpu: &Gpu, kernel: Linear, bindings: &LinearBindings<'_>, params: &LinearParams, num_active: usize) {
    let [tile_m, tile_n] = kernel.tile.size();
    let rows_of_tiles = (num_active as u32).div_ceil(tile_m);
    let grid = Grid::Fixed([params.num_outputs.div_ceil(tile_n), rows_of_tiles, kernel.tile.parts()]);
    parity::run(gpu, |plan| {
        kernel.check(gpu.caps(), bindings, params)?;
        plan.dispatch(&kernel, bindings, params, grid)
    });
}

/// `tile` with `parts` of the inputs, where the device can compute them.
fn in_parts(gpu: &Gpu, mut tile: LinearTile, num_parts: u32) -> Option<LinearTile> {
    if let LinearTile::Cooperative { parts, .. } = &mut tile {
        *parts = num_parts;
    }
    (tile.parts() == num_parts && tile.fits(gpu.caps())).then_some(tile)
}

/// Tensors for [`PartSums`] of any tile of the tests.
fn room_for_parts(gpu: &Gpu) -> [Tensor; 2] {
    let sums = Tensor::zeros(gpu, "part_sums", DType::F32, &[1 << 20]).expect("it fits");
    [sums, Tensor::zeros(gpu, "arrivals", DType::U32, &[64]).expect("it fits")]
}

/// The kernel of a product with so many outputs and inputs that ends in `scale * y`, and what it is called with.
fn stored(
    tile: LinearTile,
    weight_dtype: DType,
    prologue: &Prologue<'_>,
    [num_outputs, in_features]: [usize; 2],
    scale: f32,
) -> (Linear, LinearParams) {
    let [num_outputs, in_features] = [num_outputs, in_features].map(|count| count as u32);
    let kernel = Linear { in_features, weight_dtype, prologue: prologue.kind(), epilogue: EpilogueKind::Store, tile };
    let out_stride = num_outputs;
    (kernel, LinearParams { num_outputs, out_stride, in_features, eps: 1e-5, scale, ..Default::default() })
}

/// The product of `x` and `w` as `tile` rounds them.
fn product(tile: LinearTile, x: &[f32], w: &[f32], in_features: usize) -> Vec<f32> {
    match tile {
        LinearTile::Cooperative { .. } => linear(&halves(x), &halves(w), in_features),
        _ => linear(x, w, in_features),
    }
}

#[test]
fn every_cooperative_tile_suits_some_shape() {
    let mut unused: Vec<_> = COOPERATIVE_TILES.iter().map(|&(tile, _)| cooperative_tile(16, tile, 4)).collect();
    unused.extend(SMALL_TILES.iter().map(|&(tile, _)| cooperative_tile(8, tile, 2)));
    // Devices with less memory, with wider subgroups, and with memory for no such tile get one all the same.
    for (edge, width, kib, max_threads) in [
        (16, 32, 48, 1024),
        (16, 32, 32, 1024),
        (16, 64, 64, 1024),
        (16, 32, 32, 256),
        (16, 32, 16, 256),
        (8, 32, 32, 1024),
        (8, 8, 32, 1024),
        (8, 32, 16, 256),
    ] {
        let caps = DeviceCaps {
            is_cpu: false,
            cooperative_matrices: Some(edge),
            subgroup_sizes: Some((width, width)),
            max_workgroup_size: max_threads,
            max_workgroup_storage_bytes: kib << 10,
            ..parity::gpu().caps().clone()
        };
        for num_rows in (edge..=2048).step_by(edge as usize) {
            for num_outputs in [34, 576, 960, 1600, 2048, 3072, 5120, 6144, 16384] {
                let tile = LinearTile::for_shape(&caps, [num_rows, num_outputs], true);
                assert!(tile.size()[0] <= num_rows, "{tile:?} for {num_rows} rows");
                assert!(tile.fits(&caps), "{tile:?} on {caps:?}");
                assert!(edge == 16 || tile.multiplies_halves(), "{tile:?} on {caps:?}");
                assert!(tile.num_norm_parts(num_outputs).is_none_or(|parts| parts <= num_outputs / 16 + 8), "{tile:?}");
                unused.retain(|other| *other != tile);
            }
        }
    }
    assert!(unused.is_empty(), "never chosen: {unused:?}");
}

#[test]
fn products_match_oracle() {
    parity::on_every_profile_and_with_matrices(|gpu, profile| {
        // Of quantised rows, K that fill their last group and K that do not.
        let shapes = [
            (DType::F32, 0, 34, 8),
            (DType::F16, 1, 2, 8),
            (DType::BF16, 7, 34, 56),
            (DType::F32, 33, 96, 64),
            (DType::F16, 63, 130, 56),
            (DType::BF16, 64, 512, 64),
            (DType::F32, 65, 130, 256),
            (DType::F16, 130, 96, 264),
            (DType::F16, 300, 292, 72),
            (DType::BF16, 33, 34, 4096),
            (DType::Q8, 7, 34, 56),
            (DType::Q8, 65, 130, 256),
            (DType::Q4, 33, 34, 264),
            (DType::Q4, 64, 96, 1024),
        ];
        let test = |case: usize| {
            let (dtype, num_active, num_outputs, in_features) = shapes[case];
            let mut rng = Rng::new(&format!("linear {case}"));
            let (weight, w) = parity::upload_weight(gpu, &mut rng, num_outputs, in_features, dtype);
            let num_rows = num_active + 2;
            let active = parity::some_rows(&mut rng, num_rows, num_active);
            let rows = parity::row_set(gpu, &active);
            let x = rng.normals(num_rows * in_features);
            let compact = gather(&active, &x, in_features);
            let norm_weight = rng.normals(in_features);
            let (scaled, factors) = norm_factors(&compact, &norm_weight, 1e-5);
            let (x, compact_x) = (parity::upload(gpu, &x), parity::upload(gpu, &compact));
            let norm_weight = parity::upload(gpu, &norm_weight);
            for (t, tile) in tiles(gpu).into_iter().enumerate() {
                // Every tile meets every case unchecked, and then some of them: compilers take seconds for each.
                if profile != "unchecked" && !(case + t / 3).is_multiple_of(3) {
                    continue;
                }
                let tile = for_columns(tile, num_outputs);
                let prologue = match (case + t) % 3 {
                    0 => Prologue::Compact { x: &compact_x },
                    1 if tile.fuses_norm() => Prologue::Norm { x: &x, weight: &norm_weight },
                    _ => Prologue::Stream { x: &x },
                };
                let want: Vec<f32> = if let Prologue::Norm { .. } = prologue {
                    let rows = product(tile, &scaled, &w, in_features);
                    rows.chunks(num_outputs).zip(&factors).flat_map(|(y, f)| y.iter().map(move |v| v * f)).collect()
                } else {
                    product(tile, &compact, &w, in_features)
                };
                let want: Vec<f32> = want.iter().map(|v| v * 0.5).collect();
                let out = Output::new(gpu, num_active * num_outputs);
                let epilogue = Epilogue::Store { out: &out.tensor };
                let (kernel, params) = stored(tile, dtype, &prologue, [num_outputs, in_features], 0.5);
                let bindings = LinearBindings { rows: &rows, weight: &weight, prologue, epilogue, parts: None };
                dispatch(gpu, kernel, &bindings, &params, num_active);
                let what = format!(
                    "linear {profile} {tile:?} {dtype:?} {:?} n={num_active} O={num_outputs} K={in_features}",
                    prologue.kind()
                );
                parity::assert_close(&what, &out.read(gpu), &want, Tolerance::F32);
            }
        };
        // Drivers take long to compile some hundred kernels.
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(shapes.len());
        std::thread::scope(|scope| {
            for thread in 0..threads {
                scope.spawn(move || (thread..shapes.len()).step_by(threads).for_each(test));
            }
        });
    });
}

#[test]
fn epilogues_match_oracle() {
    parity::on_every_profile_and_with_matrices(|gpu, profile| {
        let mut rng = Rng::new("linear epilogues");
        let tiles = tiles(gpu);
        for (kind_index, kind) in EpilogueKind::ALL.into_iter().enumerate() {
            for (num_active, unit) in [(6, 2), (65, 4)] {
                let in_features = 72;
                let (dtype, by_row) = (DTYPES[kind_index % DTYPES.len()], kind_index % 2 == 0);
                // One of the tiles without matrix units, and one with.
                let is_cooperative = |tile: &LinearTile| matches!(tile, LinearTile::Cooperative { .. });
                let (cooperative, others): (Vec<_>, Vec<_>) = tiles.iter().copied().partition(is_cooperative);
                for tiles in [others, cooperative] {
                    let Some(tile) = tiles.get((kind_index + num_active) % tiles.len().max(1)).copied() else {
                        continue;
                    };
                    let tile = for_columns(tile, unit);
                    let case = EpilogueCase::new(gpu, &mut rng, kind, num_active + 3, num_active);
                    let x = rng.normals((num_active + 3) * in_features);
                    let compact = gather(&case.active, &x, in_features);
                    // What is rounded to f16 in any case may be so before.
                    let is_half = tile.multiplies_halves() && kind_index % 4 < 2;
                    let upload = |x: &[f32]| {
                        if !is_half {
                            return parity::upload(gpu, x);
                        }
                        let halves: Vec<_> = x.iter().map(|v| half::f16::from_f32(*v)).collect();
                        Tensor::from_slice(gpu, "x", DType::F16, &[x.len()], &halves).expect("a test's buffer fits")
                    };
                    let (x, compact_x) = (upload(&x), upload(&compact));
                    let prologue =
                        if by_row { Prologue::Stream { x: &x } } else { Prologue::Compact { x: &compact_x } };
                    let kernel = Linear {
                        in_features: in_features as u32,
                        weight_dtype: dtype,
                        prologue: prologue.kind(),
                        epilogue: kind,
                        tile,
                    };
                    let mut state = case.initial.clone();
                    // Sharded weights: the second half of the columns is a dispatch of its own.
                    for (first_output, num_outputs) in case.shards(unit) {
                        let (weight, w) = parity::upload_weight(gpu, &mut rng, num_outputs, in_features, dtype);
                        let params = LinearParams {
                            num_outputs: num_outputs as u32,
                            first_output: first_output as u32,
                            in_features: in_features as u32,
                            ..case.params
                        };
                        let epilogue_tensors = case.epilogue();
                        let bindings = LinearBindings {
                            rows: &case.rows,
                            weight: &weight,
                            prologue,
                            epilogue: epilogue_tensors,
                            parts: None,
                        };
                        dispatch(gpu, kernel, &bindings, &params, num_active);
                        let y = product(tile, &compact, &w, in_features);
                        epilogue(kind, &case.active, &y, &params, &mut state);
                    }
                    case.assert_matches(gpu, &format!("linear {profile} {kind:?} {tile:?} n={num_active}"), &state);
                }
            }
        }
    });
}

/// Inputs and outputs in f16 are what those in f32 are when rounded, to the bit.
#[test]
fn halves_are_rounded_floats() {
    parity::on_every_profile_and_with_matrices(|gpu, profile| {
        let mut rng = Rng::new("linear halves");
        let (in_features, num_rows) = (136, 150);
        let active = parity::some_rows(&mut rng, num_rows, num_rows);
        let rows = parity::row_set(gpu, &active);
        let x = rng.normals(num_rows * in_features);
        let rounded: Vec<half::f16> = x.iter().map(|v| half::f16::from_f32(*v)).collect();
        let x = parity::upload(gpu, &x);
        let rounded = Tensor::from_slice(gpu, "x", DType::F16, &[num_rows, in_features], &rounded).expect("it fits");
        let half_tiles = tiles(gpu).into_iter().filter(|tile| tile.multiplies_halves());
        for (tile, num_outputs) in half_tiles.flat_map(|tile| [130, 132].map(|num_outputs| (tile, num_outputs))) {
            let tile = for_columns(tile, num_outputs);
            let (weight, _) = parity::upload_weight(gpu, &mut rng, num_outputs, in_features, DType::F16);
            let shape = [num_rows, num_outputs / 2];
            let run = |x, dtype| {
                let out = Tensor::zeros(gpu, "out", dtype, &shape).expect("it fits");
                let (prologue, epilogue) = (Prologue::Compact { x }, Epilogue::SwiGlu { out: &out, delta: false });
                let (prologue_kind, epilogue_kind) = (prologue.kind(), epilogue.kind());
                let (in_features, weight_dtype) = (in_features as u32, DType::F16);
                let kernel =
                    Linear { in_features, weight_dtype, prologue: prologue_kind, epilogue: epilogue_kind, tile };
                let (num_outputs, out_stride) = (num_outputs as u32, num_outputs as u32 / 2);
                let params = LinearParams { num_outputs, out_stride, in_features, ..Default::default() };
                let bindings = LinearBindings { rows: &rows, weight: &weight, prologue, epilogue, parts: None };
                dispatch(gpu, kernel, &bindings, &params, num_rows);
                out
            };
            let floats: Vec<f32> = gpu.read(&run(&x, DType::F32)).expect("the device answers");
            let want: Vec<half::f16> = floats.into_iter().map(half::f16::from_f32).collect();
            for x in [&x, &rounded] {
                let halves: Vec<half::f16> = gpu.read(&run(x, DType::F16)).expect("the device answers");
                assert_eq!(halves, want, "linear {profile} {tile:?} {:?}", x.dtype());
            }
        }
    });
}

/// Products of many inputs and few rows, of 1.7B, are computed in parts; those of few inputs, and of rows that fill a GPU, are not.
#[test]
fn long_products_of_few_rows_are_in_parts() {
    let caps = DeviceCaps {
        is_cpu: false,
        cooperative_matrices: Some(16),
        coherent_storage: true,
        subgroup_sizes: Some((32, 32)),
        max_workgroup_size: 1024,
        max_workgroup_storage_bytes: 48 << 10,
        ..parity::gpu().caps().clone()
    };
    let parts = |caps: &DeviceCaps, num_rows, num_outputs, in_features| {
        let tile = LinearTile::in_parts(caps, [num_rows, num_outputs], num_rows, in_features);
        tile.map_or(1, LinearTile::parts)
    };
    for (num_rows, num_outputs, in_features, expected) in [
        (170, 2048, 8192, 4),
        (256, 2048, 8192, 4),
        (341, 2048, 8192, 2),
        (512, 2048, 8192, 2),
        (1024, 2048, 8192, 1),
        (341, 2048, 2048, 2),
        (170, 2048, 2048, 1),
        (170, 6144, 2048, 1),
        (512, 6144, 2048, 1),
        (512, 16384, 2048, 1),
        (512, 960, 2560, 1),
        (512, 960, 960, 1),
    ] {
        let what = format!("{num_rows} rows, {num_outputs} outputs, {in_features} inputs");
        assert_eq!(parts(&caps, num_rows, num_outputs, in_features), expected, "{what}");
    }
    let incoherent = DeviceCaps { coherent_storage: false, ..caps.clone() };
    assert_eq!(parts(&incoherent, 341, 2048, 8192), 1);
    let metal = DeviceCaps { cooperative_matrices: Some(8), ..caps };
    assert_eq!(parts(&metal, 341, 2048, 8192), 1);
}

/// Workgroups that multiply a part of the inputs each, whose numbers of tiles differ: the sums are those of all inputs, the same to
/// the bit whoever comes last, and nothing is left over for the next dispatch.
#[test]
fn parts_match_oracle() {
    parity::on_every_profile_and_with_matrices(|gpu, profile| {
        let mut rng = Rng::new("linear parts");
        let [sums, arrivals] = room_for_parts(gpu);
        let tiles: Vec<_> = tiles(gpu).into_iter().filter(|tile| tile.multiplies_halves()).collect();
        for (t, tile) in tiles.into_iter().enumerate() {
            let num_parts = 2 + t as u32 % 3;
            let Some(tile) = in_parts(gpu, tile, num_parts) else {
                println!("linear {profile} {tile:?}: no parts on this device");
                continue;
            };
            let in_features = (num_parts * tile.tile_k() + 8) as usize;
            let (num_active, num_outputs) = (tile.size()[0] as usize + 3, 132);
            let dtype = DTYPES[1 + t % 4];
            let num_rows = num_active + 2;
            let active = parity::some_rows(&mut rng, num_rows, num_active);
            let rows = parity::row_set(gpu, &active);
            let x = rng.normals(num_rows * in_features);
            let compact = gather(&active, &x, in_features);
            let x = parity::upload(gpu, &x);
            let (weight, w) = parity::upload_weight(gpu, &mut rng, num_outputs, in_features, dtype);
            let prologue = Prologue::Stream { x: &x };
            let (kernel, params) = stored(tile, dtype, &prologue, [num_outputs, in_features], 1.0);
            let run = || {
                let out = Output::new(gpu, num_active * num_outputs);
                let epilogue = Epilogue::Store { out: &out.tensor };
                let parts = Some(PartSums { sums: &sums, arrivals: &arrivals });
                let bindings = LinearBindings { rows: &rows, weight: &weight, prologue, epilogue, parts };
                dispatch(gpu, kernel, &bindings, &params, num_active);
                out.read(gpu)
            };
            let what = format!("linear {profile} {tile:?} {dtype:?} n={num_active} K={in_features}");
            let first = run();
            parity::assert_close(&what, &first, &product(tile, &compact, &w, in_features), Tolerance::F32);
            for _ in 0..5 {
                assert!(run().iter().zip(&first).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}: another run");
            }
            let left: Vec<u32> = gpu.read(&arrivals).expect("the device answers");
            assert!(left.iter().all(|count| *count == 0), "{what}: {left:?}");
        }
    });
}

/// A norm that one product begins and the next one ends: rows times its weight to the bit, all parts of their squares, and what
/// another tile makes of both.
#[test]
fn norms_between_products_match_oracle() {
    parity::on_every_profile_and_with_matrices(|gpu, profile| {
        let mut rng = Rng::new("linear norms");
        let (in_features, width) = (136, 136);
        let [sums, arrivals] = room_for_parts(gpu);
        let half_tiles: Vec<_> = tiles(gpu).into_iter().filter(|tile| tile.multiplies_halves()).collect();
        let case = |rng: &mut Rng, num_active: usize, [first, second]: [LinearTile; 2]| {
            let num_rows = num_active + 3;
            let active = parity::some_rows(rng, num_rows, num_active);
            let rows = parity::row_set(gpu, &active);
            let halves_of = |values: &[f32]| values.iter().map(|v| half::f16::from_f32(*v)).collect::<Vec<_>>();
            let f16s = |label, shape: [usize; 2]| Tensor::zeros(gpu, label, DType::F16, &shape).expect("it fits");

            let x = halves_of(&rng.normals(num_active.max(1) * in_features));
            let x = Tensor::from_slice(gpu, "x", DType::F16, &[num_active.max(1), in_features], &x).expect("it fits");
            let (weight, w) = parity::upload_weight(gpu, rng, width, in_features, DType::F16);
            let mut residual = rng.normals(num_rows * width);
            // Beyond what f16 holds.
            residual.iter_mut().take(2 * width).for_each(|v| *v *= 1e5);
            let next_weight = rng.normals(width);
            let num_parts = first.num_norm_parts(width as u32).expect("it multiplies halves");
            let part_stride = num_active + ROW_PADDING as usize;
            let next_squares = Output::new(gpu, part_stride * num_parts as usize);
            let (out, next_x) = (Output::new(gpu, num_rows * width), f16s("next_x", [num_active.max(1), width]));
            let epilogue = Epilogue::Scaled {
                residual: &parity::upload(gpu, &residual),
                out: &out.tensor,
                next_weight: &parity::upload(gpu, &next_weight),
                next_x: &next_x,
                next_squares: &next_squares.tensor,
            };
            let run = |tile, prologue: Prologue<'_>, epilogue: Epilogue<'_>, weight, in_features: usize| {
                let kernel = Linear {
                    in_features: in_features as u32,
                    weight_dtype: DType::F16,
                    prologue: prologue.kind(),
                    epilogue: epilogue.kind(),
                    tile,
                };
                let params = LinearParams {
                    num_outputs: width as u32,
                    out_stride: width as u32,
                    in_features: in_features as u32,
                    eps: 1e-5,
                    scale: 1.0,
                    part_stride: part_stride as u32,
                    ..Default::default()
                };
                let parts = Some(PartSums { sums: &sums, arrivals: &arrivals });
                let bindings = LinearBindings { rows: &rows, weight, prologue, epilogue, parts };
                dispatch(gpu, kernel, &bindings, &params, num_active);
            };
            run(first, Prologue::Compact { x: &x }, epilogue, &weight, in_features);

            let what = format!("linear {profile} {first:?} n={num_active}");
            let x: Vec<half::f16> = gpu.read(&x).expect("the device answers");
            let x: Vec<f32> = x.into_iter().map(f32::from).collect();
            let y = linear(&x[..num_active * in_features], &halves(&w), in_features);
            let got = out.read(gpu);
            let got = gather(&active, &got, width);
            let want = gather(&active, &residual, width);
            let want: Vec<f32> = want.iter().zip(&y).map(|(residual, y)| residual + y).collect();
            parity::assert_close(&format!("{what} out"), &got, &want, Tolerance::F32);
            let (scaled, factors) = norm_factors(&got, &next_weight, 1e-5);
            let seen: Vec<half::f16> = gpu.read(&next_x).expect("the device answers");
            let sixteenths: Vec<f32> = scaled.iter().map(|v| v / 16.0).collect();
            assert_eq!(seen[..num_active * width], halves_of(&sixteenths), "{what} next_x");
            let squares = next_squares.read(gpu);
            let sums = |i| squares.chunks(part_stride).map(|part| part[i]).sum();
            let sums: Vec<f32> = (0..num_active).map(sums).collect();
            let want: Vec<f32> = got.chunks(width).map(|row| row.iter().map(|v| v * v).sum()).collect();
            parity::assert_close(&format!("{what} next_squares"), &sums, &want, Tolerance::F32);

            let (weight, w) = parity::upload_weight(gpu, rng, width, width, DType::F16);
            let out = Output::new(gpu, num_active * width);
            let prologue = Prologue::Scaled { x: &next_x, squares: &next_squares.tensor, num_parts };
            run(second, prologue, Epilogue::Store { out: &out.tensor }, &weight, width);
            let y: Vec<f32> = linear(&halves(&sixteenths), &halves(&w), width).iter().map(|v| 16.0 * v).collect();
            let want: Vec<f32> =
                y.chunks(width).zip(&factors).flat_map(|(y, f)| y.iter().map(move |v| v * f)).collect();
            parity::assert_close(&format!("{what} then {second:?}"), &out.read(gpu), &want, Tolerance::F32);
        };
        for (t, first) in half_tiles.iter().enumerate() {
            let second = half_tiles[(t + half_tiles.len() / 2) % half_tiles.len()];
            for (num_active, unit) in [(0, 4), (7, 2), (65, 4), (150, 4)] {
                case(&mut rng, num_active, [*first, second].map(|tile| for_columns(tile, unit)));
            }
            if let Some(tile) = in_parts(gpu, *first, 2).filter(|tile| tile.tile_k() <= 64) {
                case(&mut rng, 65, [tile, tile]);
            }
        }
    });
}

/// Rows times the weight of a norm that f16 does not hold are normed all the same.
#[test]
fn norms_of_large_rows_are_finite() {
    let gpu = parity::gpu();
    let mut rng = Rng::new("linear large rows");
    let (num_rows, num_outputs, in_features) = (18, 36, 136);
    let x: Vec<f32> = rng.normals(num_rows * in_features).iter().map(|v| v * 1e5).collect();
    let norm_weight = rng.normals(in_features);
    let (weight, w) = parity::upload_weight(gpu, &mut rng, num_outputs, in_features, DType::F16);
    let active = parity::some_rows(&mut rng, num_rows, num_rows);
    let rows = parity::row_set(gpu, &active);
    let (scaled, factors) = norm_factors(&gather(&active, &x, in_features), &norm_weight, 1e-5);
    let sixteenths: Vec<f32> = scaled.iter().map(|v| v / 16.0).collect();
    let (x, norm_weight) = (parity::upload(gpu, &x), parity::upload(gpu, &norm_weight));
    for tile in tiles(gpu).into_iter().filter(|tile| tile.fuses_norm()) {
        let tile = for_columns(tile, num_outputs);
        let out = Output::new(gpu, num_rows * num_outputs);
        let prologue = Prologue::Norm { x: &x, weight: &norm_weight };
        let (kernel, params) = stored(tile, DType::F16, &prologue, [num_outputs, in_features], 1.0);
        let epilogue = Epilogue::Store { out: &out.tensor };
        let bindings = LinearBindings { rows: &rows, weight: &weight, prologue, epilogue, parts: None };
        dispatch(gpu, kernel, &bindings, &params, num_rows);
        let y = product(tile, &sixteenths, &w, in_features);
        let factors = factors.iter().map(|factor| 16.0 * factor);
        let want: Vec<f32> =
            y.chunks(num_outputs).zip(factors).flat_map(|(y, f)| y.iter().map(move |v| v * f)).collect();
        parity::assert_close(&format!("linear {tile:?} of large rows"), &out.read(gpu), &want, Tolerance::F32);
    }
}

/// What batch invariance rests on: a row's results have the same bits wherever it stands and whatever is beside it.
#[test]
fn rows_do_not_depend_on_their_place() {
    parity::on_every_profile_and_with_matrices(|gpu, profile| {
        let mut rng = Rng::new("linear places");
        let (in_features, num_outputs, num_rows) = (136, 68, 150);
        let (weight, _) = parity::upload_weight(gpu, &mut rng, num_outputs, in_features, DType::F16);
        let norm_weight = parity::upload(gpu, &rng.normals(in_features));
        // All odd rows are alike.
        let alike = rng.normals(in_features);
        let mut x = rng.normals(num_rows * in_features);
        x.chunks_mut(in_features).skip(1).step_by(2).for_each(|row| row.copy_from_slice(&alike));
        let x = parity::upload(gpu, &x);
        for tile in tiles(gpu).into_iter().map(|tile| for_columns(tile, num_outputs)) {
            let fused = Prologue::Norm { x: &x, weight: &norm_weight };
            let prologue = if tile.fuses_norm() { fused } else { Prologue::Stream { x: &x } };
            let mut first: Option<Vec<u32>> = None;
            for active in [parity::some_rows(&mut rng, 3, 3), parity::some_rows(&mut rng, num_rows, num_rows)] {
                let out = Output::new(gpu, active.len() * num_outputs);
                let (kernel, params) = stored(tile, DType::F16, &prologue, [num_outputs, in_features], 1.0);
                let rows = parity::row_set(gpu, &active);
                let epilogue = Epilogue::Store { out: &out.tensor };
                let bindings = LinearBindings { rows: &rows, weight: &weight, prologue, epilogue, parts: None };
                dispatch(gpu, kernel, &bindings, &params, active.len());
                for (entry, y) in active.iter().zip(out.read(gpu).chunks(num_outputs)) {
                    if entry.row % 2 == 1 {
                        let bits: Vec<_> = y.iter().map(|value| value.to_bits()).collect();
                        let what = format!("linear {profile} {tile:?} row {} of {}", entry.row, active.len());
                        assert_eq!(&bits, first.get_or_insert_with(|| bits.clone()), "{what}");
                    }
                }
            }
        }
    });
}

#[test]
fn refuses_wrong_shapes() {
    let gpu = parity::gpu();
    let weight = Tensor::zeros(gpu, "weight", DType::F16, &[6, 16]).expect("it fits");
    let x = Tensor::zeros(gpu, "x", DType::F32, &[6, 16]).expect("it fits");
    let rows = parity::row_set(gpu, &[]);
    let kernel = Linear {
        in_features: 16,
        weight_dtype: DType::F16,
        prologue: PrologueKind::Compact,
        epilogue: EpilogueKind::Store,
        tile: LinearTile::for_shape(gpu.caps(), [64, 6], false),
    };
    let bindings = LinearBindings {
        rows: &rows,
        weight: &weight,
        prologue: Prologue::Compact { x: &x },
        epilogue: Epilogue::Store { out: &x },
        parts: None,
    };
    let message = |kernel: Linear, num_outputs, in_features| {
        let params = LinearParams { num_outputs, in_features, ..Default::default() };
        kernel.check(gpu.caps(), &bindings, &params).map_err(|error| error.to_string())
    };
    assert_eq!(message(kernel, 6, 16), Ok(()));
    assert_eq!(message(kernel, 6, 12), Err("linear: in_features has 12, expected a multiple of 8".to_owned()));
    assert_eq!(
        message(kernel, 5, 16),
        Err("linear: num_outputs has 5 from 0, expected an even number from an even column".to_owned())
    );
    let params = LinearParams { num_outputs: 6, in_features: 16, additive: 2, ..Default::default() };
    let refused = kernel.check(gpu.caps(), &bindings, &params).map_err(|error| error.to_string());
    assert_eq!(refused, Err("linear: additive has 2, expected 0 or 1".to_owned()));
    // A product with the first rows of a weight, q of q/k/v say.
    assert_eq!(message(kernel, 4, 16), Ok(()));
    assert_eq!(
        message(kernel, 8, 16),
        Err("linear: weight has 96 elements of F16, expected at least 128 of F16".to_owned())
    );
    let gelu = Linear { epilogue: EpilogueKind::Gelu, ..kernel };
    assert_eq!(message(gelu, 6, 16), Err("linear: epilogue has Store, expected Gelu".to_owned()));
    let odd = Linear { tile: LinearTile::Direct { tile_m: 4, tile_n: 8, thread_n: 1 }, ..kernel };
    assert!(message(odd, 6, 16).is_err());
    let halves = LinearBindings { prologue: Prologue::Compact { x: &weight }, ..bindings };
    let kernel_of_halves = Linear { prologue: PrologueKind::CompactF16, ..kernel };
    let params = LinearParams { num_outputs: 6, in_features: 16, ..Default::default() };
    let message = kernel_of_halves.check(gpu.caps(), &halves, &params).map_err(|error| error.to_string());
    assert_eq!(message, Err("linear: prologue has CompactF16, expected f32 for this tile".to_owned()));
}
