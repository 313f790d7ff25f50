//! `y = x W^T` for many rows, with an epilogue after it.

use crate::caps::DeviceCaps;
use crate::epilogue::{Epilogue, EpilogueKind, LinearParams, define_weight};
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::{ROW_PADDING, RowSet};
use crate::shader::Definitions;
use crate::tensor::{DType, Tensor};

/// `y = x W^T`, weights and activations each read once for a tile of the output.
///
/// # Source
/// Llama projections, arXiv 2302.13971; MoR block end, arXiv 2507.10524.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// Element type of the weight.
    pub weight_dtype: DType,
    /// Whether x is a stream `[T, K]` read at the active rows; else it is compact, `[n, K]`.
    pub x_by_row: bool,
    /// Output side.
    pub epilogue: EpilogueKind,
    /// How the product is computed.
    pub tile: LinearTile,
}

/// How [`Linear`] divides the product among workgroups and threads. All variants bind the same tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinearTile {
    /// Tiles of x and w go through workgroup memory; f32 multiply-add in registers.
    Staged {
        /// Rows of a workgroup, at most [`ROW_PADDING`].
        tile_m: u32,
        /// Columns of a workgroup.
        tile_n: u32,
        /// Inputs staged at a time; a multiple of 8.
        tile_k: u32,
        /// Rows of a thread.
        thread_m: u32,
        /// Columns of a thread; even.
        thread_n: u32,
    },
    /// Every thread reads for itself: for software rasterisers, whose lanes share the loads of x.
    Direct {
        /// Rows of a workgroup and of each thread, at most [`ROW_PADDING`].
        tile_m: u32,
        /// Columns of a workgroup.
        tile_n: u32,
        /// Columns of a thread; even.
        thread_n: u32,
    },
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct LinearBindings<'a> {
    /// The rows to compute, n of them.
    pub rows: &'a RowSet,
    /// `[O, K]`, K padded to a multiple of 8, O even.
    pub weight: &'a Tensor,
    /// `[n, K]` f32, or `[T, K]` with [`Linear::x_by_row`].
    pub x: &'a Tensor,
    /// Output.
    pub epilogue: Epilogue<'a>,
}

impl LinearTile {
    /// The tile for up to `max_rows` rows and `num_outputs` columns on a device with `caps`.
    pub fn for_shape(caps: &DeviceCaps, max_rows: u32, num_outputs: u32) -> Self {
        let _ = num_outputs;
        if caps.is_cpu {
            return LinearTile::Direct { tile_m: 8, tile_n: 64, thread_n: 2 };
        }
        match max_rows {
            0..=16 => LinearTile::Staged { tile_m: 16, tile_n: 64, tile_k: 32, thread_m: 4, thread_n: 4 },
            17..=32 => LinearTile::Staged { tile_m: 32, tile_n: 64, tile_k: 16, thread_m: 4, thread_n: 4 },
            _ => LinearTile::Staged { tile_m: 64, tile_n: 64, tile_k: 16, thread_m: 8, thread_n: 4 },
        }
    }

    /// Rows and columns of a workgroup.
    pub fn size(self) -> [u32; 2] {
        match self {
            LinearTile::Staged { tile_m, tile_n, .. } | LinearTile::Direct { tile_m, tile_n, .. } => [tile_m, tile_n],
        }
    }

    /// Rows and columns of a thread.
    fn thread(self) -> [u32; 2] {
        match self {
            LinearTile::Staged { thread_m, thread_n, .. } => [thread_m, thread_n],
            LinearTile::Direct { tile_m, thread_n, .. } => [tile_m, thread_n],
        }
    }

    /// Whether the shader's divisions come out whole.
    fn is_valid(self, caps: &DeviceCaps) -> bool {
        let ([tile_m, tile_n], [thread_m, thread_n]) = (self.size(), self.thread());
        let threads = (tile_m / thread_m) * (tile_n / thread_n);
        let divides = tile_m.is_multiple_of(thread_m) && tile_n.is_multiple_of(thread_n) && thread_n.is_multiple_of(2);
        let staged = match self {
            LinearTile::Direct { .. } => true,
            LinearTile::Staged { tile_k, .. } => {
                tile_k.is_multiple_of(8)
                    && (tile_m * tile_k / 4).is_multiple_of(threads)
                    && (tile_n * tile_k / 8).is_multiple_of(threads)
            }
        };
        divides && staged && tile_m <= ROW_PADDING && (1..=caps.max_workgroup_size).contains(&threads)
    }
}

impl Linear {
    /// The variant for up to `max_rows` rows and `num_outputs` columns at once on a device with `caps`.
    pub fn for_shape(
        caps: &DeviceCaps,
        max_rows: u32,
        num_outputs: u32,
        weight_dtype: DType,
        x_by_row: bool,
        epilogue: EpilogueKind,
    ) -> Self {
        Self { weight_dtype, x_by_row, epilogue, tile: LinearTile::for_shape(caps, max_rows, num_outputs) }
    }

    /// Records the kernel over all active rows.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the tile is none, the weight does not have its shape or type, or the epilogue is
    /// not the one specialised for; else as [`PlanBuilder::dispatch`].
    pub fn record(&self, plan: &mut PlanBuilder<'_>, b: &LinearBindings<'_>, p: &LinearParams) -> Result<()> {
        self.check(plan.gpu().caps(), b, p)?;
        let [tile_m, tile_n] = self.tile.size();
        plan.dispatch(self, b, p, Grid::rows(b.rows, p.num_outputs.div_ceil(tile_n), tile_m))
    }

    fn check(&self, caps: &DeviceCaps, b: &LinearBindings<'_>, p: &LinearParams) -> Result<()> {
        let unfit = |what, found, expected: &str| {
            Err(KernelError::Shape { kernel: Self::NAME, what, found, expected: expected.to_owned() })
        };
        if !self.tile.is_valid(caps) {
            return unfit("tile", format!("{:?}", self.tile), "whole numbers of loads and columns for every thread");
        }
        if !p.in_features.is_multiple_of(8) || p.in_features == 0 {
            return unfit("in_features", p.in_features.to_string(), "a multiple of 8");
        }
        if !p.num_outputs.is_multiple_of(2) || p.num_outputs == 0 || !p.first_output.is_multiple_of(2) {
            let found = format!("{} from {}", p.num_outputs, p.first_output);
            return unfit("num_outputs", found, "an even number from an even column");
        }
        let (found, expected) = (b.weight.num_elems(), p.num_outputs as usize * p.in_features as usize);
        // More rows are fine: layers that share K/V read only the q rows of the fused projection.
        if found < expected || b.weight.dtype() != self.weight_dtype {
            let found = format!("{found} elements of {:?}", b.weight.dtype());
            return unfit("weight", found, &format!("at least {expected} of {:?}", self.weight_dtype));
        }
        if b.epilogue.kind() != self.epilogue {
            return unfit("epilogue", format!("{:?}", b.epilogue.kind()), &format!("{:?}", self.epilogue));
        }
        Ok(())
    }
}

impl Kernel for Linear {
    const NAME: &'static str = "linear";
    type Params = LinearParams;
    type Bindings<'a> = LinearBindings<'a>;

    fn definitions(&self, _: &DeviceCaps) -> Definitions {
        let ([tile_m, tile_n], [thread_m, thread_n]) = (self.tile.size(), self.tile.thread());
        let mut definitions = Definitions::new()
            .u32("TILE_M", tile_m)
            .u32("TILE_N", tile_n)
            .u32("THREAD_M", thread_m)
            .u32("THREAD_N", thread_n)
            .flag("X_BY_ROW", self.x_by_row);
        if let LinearTile::Staged { tile_k, .. } = self.tile {
            definitions = definitions.u32("TILE_K", tile_k).flag("STAGED", true);
        }
        self.epilogue.define(define_weight(definitions, self.weight_dtype))
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        let mut bindings = vec![Binding::read(1, &b.rows.active), Binding::read(2, b.weight), Binding::read(3, b.x)];
        bindings.extend(b.epilogue.bindings());
        bindings
    }

    fn workgroup_storage_bytes(&self, _: &DeviceCaps) -> u32 {
        match self.tile {
            LinearTile::Staged { tile_m, tile_n, tile_k, .. } => 16 * (tile_m + tile_n) * (tile_k / 4 + 1),
            LinearTile::Direct { .. } => 0,
        }
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::Gpu;
    use crate::oracle::linear::{epilogue, gather, linear};
    use crate::parity::{self, EpilogueCase, Output, Rng, Tolerance};

    const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

    /// All tiles that [`LinearTile::for_shape`] may choose anywhere.
    fn tiles(gpu: &Gpu) -> Vec<LinearTile> {
        let mut tiles = Vec::new();
        for is_cpu in [true, false] {
            let caps = DeviceCaps { is_cpu, ..gpu.caps().clone() };
            for max_rows in [1, 16, 32, 64, 512, 4096] {
                for num_outputs in [128, 960, 4096, 49152] {
                    let tile = LinearTile::for_shape(&caps, max_rows, num_outputs);
                    assert!(tile.is_valid(&caps), "{tile:?}");
                    if !tiles.contains(&tile) {
                        tiles.push(tile);
                    }
                }
            }
        }
        tiles
    }

    fn dispatch(gpu: &Gpu, kernel: Linear, bindings: &LinearBindings<'_>, params: &LinearParams, num_active: usize) {
        let [tile_m, tile_n] = kernel.tile.size();
        let grid = Grid::Fixed([params.num_outputs.div_ceil(tile_n), (num_active as u32).div_ceil(tile_m), 1]);
        parity::run(gpu, |plan| {
            kernel.check(gpu.caps(), bindings, params)?;
            plan.dispatch(&kernel, bindings, params, grid)
        });
    }

    #[test]
    fn products_match_oracle() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("linear");
            let shapes = [
                (0, 34, 8),
                (1, 2, 8),
                (7, 34, 56),
                (33, 96, 64),
                (63, 130, 56),
                (64, 512, 64),
                (65, 130, 256),
                (130, 96, 264),
                (33, 34, 4096),
            ];
            for (case, (num_active, num_outputs, in_features)) in shapes.into_iter().enumerate() {
                let dtype = DTYPES[case % 3];
                let x_by_row = case % 2 == 1;
                let (weight, w) = parity::upload_weight(gpu, &mut rng, num_outputs, in_features, dtype);
                let num_rows = num_active + 2;
                let active = parity::some_rows(&mut rng, num_rows, num_active);
                let rows = parity::row_set(gpu, &active);
                let x = rng.normals(num_rows * in_features);
                let compact = gather(&active, &x, in_features);
                let input = parity::upload(gpu, if x_by_row { &x } else { &compact });
                let want: Vec<f32> = linear(&compact, &w, in_features).iter().map(|v| v * 0.5).collect();
                for tile in tiles(gpu) {
                    let out = Output::new(gpu, num_active * num_outputs);
                    let epilogue = Epilogue::Store { out: &out.tensor };
                    let kernel = Linear { weight_dtype: dtype, x_by_row, epilogue: EpilogueKind::Store, tile };
                    let params = LinearParams {
                        num_outputs: num_outputs as u32,
                        out_stride: num_outputs as u32,
                        in_features: in_features as u32,
                        scale: 0.5,
                        ..Default::default()
                    };
                    let bindings = LinearBindings { rows: &rows, weight: &weight, x: &input, epilogue };
                    dispatch(gpu, kernel, &bindings, &params, num_active);
                    let what = format!(
                        "linear {profile} {tile:?} {dtype:?} by row {x_by_row} n={num_active} O={num_outputs} K={in_features}"
                    );
                    parity::assert_close(&what, &out.read(gpu), &want, Tolerance::F32);
                }
            }
        });
    }

    #[test]
    fn epilogues_match_oracle() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("linear epilogues");
            let tiles = tiles(gpu);
            for (case, kind) in EpilogueKind::ALL.into_iter().enumerate() {
                for num_active in [6, 65] {
                    let in_features = 72;
                    let (dtype, x_by_row) = (DTYPES[case % 3], case % 2 == 0);
                    let tile = tiles[(case + num_active) % tiles.len()];
                    let kernel = Linear { weight_dtype: dtype, x_by_row, epilogue: kind, tile };
                    let case = EpilogueCase::new(gpu, &mut rng, kind, num_active + 3, num_active);
                    let x = rng.normals((num_active + 3) * in_features);
                    let compact = gather(&case.active, &x, in_features);
                    let input = parity::upload(gpu, if x_by_row { &x } else { &compact });
                    let mut state = case.initial.clone();
                    // Sharded weights: the second half of the columns is a dispatch of its own.
                    for (first_output, num_outputs) in case.shards() {
                        let (weight, w) = parity::upload_weight(gpu, &mut rng, num_outputs, in_features, dtype);
                        let params = LinearParams {
                            num_outputs: num_outputs as u32,
                            first_output: first_output as u32,
                            in_features: in_features as u32,
                            ..case.params
                        };
                        let bindings =
                            LinearBindings { rows: &case.rows, weight: &weight, x: &input, epilogue: case.epilogue() };
                        dispatch(gpu, kernel, &bindings, &params, num_active);
                        let y = linear(&compact, &w, in_features);
                        epilogue(kind, &case.active, &y, &params, &mut state);
                    }
                    case.assert_matches(gpu, &format!("linear {profile} {kind:?} {tile:?} n={num_active}"), &state);
                }
            }
        });
    }

    #[test]
    fn refuses_wrong_shapes() {
        let gpu = parity::gpu();
        let weight = Tensor::zeros(gpu, "weight", DType::F16, &[6, 16]).expect("it fits");
        let rows = parity::row_set(gpu, &[]);
        let kernel = Linear::for_shape(gpu.caps(), 64, 6, DType::F16, false, EpilogueKind::Store);
        let bindings =
            LinearBindings { rows: &rows, weight: &weight, x: &weight, epilogue: Epilogue::Store { out: &weight } };
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
        assert_eq!(message(kernel, 4, 16), Err("linear: weight has 96 elements of F16, expected 64 of F16".to_owned()));
        let gelu = Linear { epilogue: EpilogueKind::Gelu, ..kernel };
        assert_eq!(message(gelu, 6, 16), Err("linear: epilogue has Store, expected Gelu".to_owned()));
        let odd = Linear { tile: LinearTile::Direct { tile_m: 4, tile_n: 8, thread_n: 1 }, ..kernel };
        assert!(message(odd, 6, 16).is_err());
    }
}
