//! `y = x W^T` for few rows, with RMSNorm or the attention merge before it and an epilogue after it.

use crate::caps::DeviceCaps;
use crate::epilogue::{Epilogue, EpilogueKind, LinearParams, define_weight};
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::RowSet;
use crate::shader::Definitions;
use crate::tensor::{DType, TEXEL_ROW, Tensor};

/// What happens to the input before the product, with the tensors it takes.
#[derive(Clone, Copy, Debug)]
pub enum Prologue<'a> {
    /// The compact input `[n, K]` f32 as it is; [`Linear`](super::Linear) takes f16 too, where it multiplies halves.
    Compact {
        /// The input.
        x: &'a Tensor,
    },
    /// The active rows of a stream `[T, K]` f32 as they are.
    Stream {
        /// The input.
        x: &'a Tensor,
    },
    /// RMSNorm of rows that [`Epilogue::Scaled`] has multiplied with the norm's weight; of [`Linear`](super::Linear) alone.
    Scaled {
        /// `[n, K]` f16, a sixteenth of these products.
        x: &'a Tensor,
        /// `[num_parts, n]` f32, n padded by [`ROW_PADDING`](crate::rows::ROW_PADDING).
        squares: &'a Tensor,
        /// Parts of the squares of a row.
        num_parts: u32,
    },
    /// RMSNorm of the active rows of a stream.
    Norm {
        /// `[T, K]` f32.
        x: &'a Tensor,
        /// `[K]` f32.
        weight: &'a Tensor,
    },
    /// The merge of `attention_decode`'s partial results.
    Merge {
        /// `[n, H, num_splits, head_dim]` f32.
        partial: &'a Tensor,
        /// `[n, H, num_splits]` of (max, sum).
        stats: &'a Tensor,
        /// Parts the keys were split into.
        num_splits: u32,
        /// Elements of a head, a multiple of 4.
        head_dim: u32,
    },
}

/// Which [`Prologue`] the kernel is specialised for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PrologueKind {
    /// [`Prologue::Compact`].
    Compact,
    /// [`Prologue::Compact`] of f16.
    CompactF16,
    /// [`Prologue::Stream`].
    Stream,
    /// [`Prologue::Stream`] of f16.
    StreamF16,
    /// [`Prologue::Scaled`].
    Scaled {
        /// Parts of the squares of a row.
        num_parts: u32,
    },
    /// [`Prologue::Norm`].
    Norm,
    /// [`Prologue::Merge`].
    Merge {
        /// Parts the keys were split into.
        num_splits: u32,
        /// Elements of a head, a multiple of 4.
        head_dim: u32,
    },
}

impl PrologueKind {
    /// Whether the kernel reads x in f16; of [`Linear`](super::Linear) alone, where [`LinearTile::multiplies_halves`].
    ///
    /// [`LinearTile::multiplies_halves`]: super::LinearTile::multiplies_halves
    pub fn reads_halves(self) -> bool {
        matches!(self, PrologueKind::CompactF16 | PrologueKind::StreamF16 | PrologueKind::Scaled { .. })
    }
}

impl<'a> Prologue<'a> {
    /// What to specialise the kernel for.
    pub fn kind(&self) -> PrologueKind {
        match *self {
            Prologue::Compact { x } if x.dtype() == DType::F16 => PrologueKind::CompactF16,
            Prologue::Compact { .. } => PrologueKind::Compact,
            Prologue::Stream { x } if x.dtype() == DType::F16 => PrologueKind::StreamF16,
            Prologue::Stream { .. } => PrologueKind::Stream,
            Prologue::Scaled { num_parts, .. } => PrologueKind::Scaled { num_parts },
            Prologue::Norm { .. } => PrologueKind::Norm,
            Prologue::Merge { num_splits, head_dim, .. } => PrologueKind::Merge { num_splits, head_dim },
        }
    }

    /// The tensors at their binding indices, 3 and 5.
    pub(super) fn bindings(&self) -> Vec<Binding<'a>> {
        match *self {
            Prologue::Compact { x } | Prologue::Stream { x } => vec![Binding::read(3, x)],
            Prologue::Scaled { x, squares, .. } => vec![Binding::read(3, x), Binding::read(5, squares)],
            Prologue::Norm { x, weight } => vec![Binding::read(3, x), Binding::read(5, weight)],
            Prologue::Merge { partial, stats, .. } => vec![Binding::read(3, partial), Binding::read(5, stats)],
        }
    }
}

/// Lanes of the widest [`Lanes`](crate::caps::Lanes).
const WIDEST_LANES: u32 = 32;
/// Workgroup memory for several rows, of which a GPU should hold several workgroups: WebGPU's default limit.
const MANY_ROWS_BYTES: u32 = 16 * 1024;
/// For one row, where the device has as much: 8,192 inputs staged at once.
const ONE_ROW_BYTES: u32 = 40 * 1024;
/// Workgroups that a large GPU should have at least before they are made larger. These and the next were measured on an H200.
const ENOUGH_WORKGROUPS: u32 = 128;
/// Workgroups that it should have before they take several rounds, where to make digits is what each begins with.
const ENOUGH_FOR_DIGITS: u32 = 384;

/// `y = f(x) W^T`, weights read once for [`LinearDecode::rows`] rows.
///
/// # Source
/// Llama projections, arXiv 2302.13971; MoR block end, arXiv 2507.10524.
#[derive(Clone, Copy, Debug)]
pub struct LinearDecode {
    /// Rows of the weight that are computed; even.
    pub num_outputs: u32,
    /// Elements of a row of the weight; a multiple of 8.
    pub in_features: u32,
    /// Element type of the weight.
    pub weight_dtype: DType,
    /// Input side.
    pub prologue: PrologueKind,
    /// Output side.
    pub epilogue: EpilogueKind,
    /// Active rows one workgroup handles.
    pub rows: u32,
    /// Elements of a weight that a lane fetches at once: 8, or 16 bytes of codes unless too few inputs are staged for as
    /// many lanes.
    pub unit: u32,
    /// Lanes that share an output, no more than a row has units.
    pub lanes: u32,
    /// Pairs of outputs one lane group owns.
    pub pairs: u32,
    /// Groups of lanes of a workgroup.
    pub groups: u32,
    /// Units of each output that a lane has on their way.
    pub block: u32,
    /// How often a lane group takes the next pairs of outputs; more than once only where all inputs are staged at once.
    pub rounds: u32,
    /// Most bytes of workgroup memory for staged inputs and reductions.
    pub staging_bytes: u32,
    /// Whether the streams have one row, so that it need not be looked up.
    pub single_row: bool,
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct LinearDecodeBindings<'a> {
    /// The rows to compute, n of them.
    pub rows: &'a RowSet,
    /// `[O, K]`, K padded to a multiple of 8, O even; made by [`Tensor::into_weight`].
    pub weight: &'a Tensor,
    /// Input.
    pub prologue: Prologue<'a>,
    /// Output.
    pub epilogue: Epilogue<'a>,
}

impl LinearDecode {
    /// The variant for up to `max_rows` rows at once on a device with `caps`.
    pub fn new(
        caps: &DeviceCaps,
        [num_outputs, in_features]: [u32; 2],
        weight_dtype: DType,
        prologue: PrologueKind,
        epilogue: EpilogueKind,
        max_rows: u32,
    ) -> Self {
        let rows = max_rows.next_power_of_two().clamp(1, 8);
        let mut kernel = Self {
            num_outputs,
            in_features,
            weight_dtype,
            prologue,
            epilogue,
            rows,
            unit: 8,
            lanes: 1,
            pairs: 1,
            groups: 1,
            block: 1,
            rounds: 1,
            staging_bytes: MANY_ROWS_BYTES,
            single_row: false,
        };
        let width = caps.lanes().width();
        let wide = match weight_dtype {
            DType::Q8 => 16,
            DType::Q4 => 32,
            _ => 8,
        };
        if caps.is_cpu {
            // A software rasteriser pays for every load of every lane: many outputs share one of the activation.
            return Self { unit: wide, lanes: width, pairs: 32, ..kernel };
        }
        let (mut threads, mut least_threads) = (256, 128);
        if rows == 1 {
            least_threads = 256;
            kernel.staging_bytes = ONE_ROW_BYTES.min(caps.max_workgroup_storage_bytes);
            // So many that each stages a vector or two.
            threads = (in_features / 4).next_power_of_two().clamp(256, 1024).min(caps.max_workgroup_size);
        }
        kernel.groups = threads;
        if wide / 8 * WIDEST_LANES <= kernel.fitting(caps) {
            kernel.unit = wide;
        }
        // Two sums are taken at a time, by two lanes.
        kernel.lanes = width.min(in_features.div_ceil(kernel.unit).next_power_of_two().max(2));
        let is_enough = |workgroup_outputs| num_outputs.div_ceil(workgroup_outputs) >= ENOUGH_WORKGROUPS;
        let step = kernel.lanes * kernel.unit / 8;
        kernel.groups = threads / kernel.lanes;
        // Fewer threads leave more memory to inputs too: sums of squares of several rows take what a step of theirs needs.
        while threads > least_threads && !(is_enough(2 * kernel.groups) && step <= kernel.fitting(caps)) {
            threads /= 2;
            kernel.groups = threads / kernel.lanes;
        }
        let mut most_ahead = 2;
        if rows > 1 {
            // Each value of the activation that is read is multiplied with twice as many weights, which are as many on their way.
            (kernel.pairs, most_ahead) = if is_enough(4 * kernel.groups) { (2, 1) } else { (1, 2) };
        }
        kernel.block = in_features.div_ceil(8 * step).min(most_ahead).min(kernel.fitting(caps) / step);
        if kernel.multiplies_digits(caps) && in_features.div_ceil(8) <= kernel.chunk(caps) {
            kernel.rounds = (kernel.workgroups_x() / ENOUGH_FOR_DIGITS).clamp(1, 8);
        }
        kernel
    }

    /// Records the kernel over all active rows.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the call has another size than the kernel or tensors in f16, and as
    /// [`PlanBuilder::dispatch`].
    pub fn record(&self, plan: &mut PlanBuilder<'_>, b: &LinearDecodeBindings<'_>, p: &LinearParams) -> Result<()> {
        let (found, expected) = ([p.num_outputs, p.in_features], [self.num_outputs, self.in_features]);
        if found != expected {
            let (found, expected) = (format!("{found:?}"), format!("{expected:?}"));
            return Err(KernelError::Shape { kernel: Self::NAME, what: "outputs and inputs", found, expected });
        }
        let (prologue, epilogue) = (b.prologue.kind(), b.epilogue.kind());
        if prologue.reads_halves() || matches!(epilogue, EpilogueKind::SwiGluF16 | EpilogueKind::Scaled) {
            let (found, expected) = (format!("{prologue:?} and {epilogue:?}"), "f32".to_owned());
            return Err(KernelError::Shape { kernel: Self::NAME, what: "activations", found, expected });
        }
        plan.dispatch(self, b, p, Grid::rows(b.rows, self.workgroups_x(), self.rows))
    }

    /// Whether codes are multiplied with digits of the activation (`shared/digits.wgsl`). To make those of several rows in every
    /// workgroup takes longer than it saves.
    pub fn multiplies_digits(&self, caps: &DeviceCaps) -> bool {
        self.rows == 1 && self.unit > 8 && caps.packed_dots && !caps.is_cpu
    }

    fn workgroups_x(&self) -> u32 {
        self.num_outputs.div_ceil(2 * self.groups * self.pairs * self.rounds)
    }

    /// Workgroup memory of the reductions, in bytes.
    fn reduction_bytes(&self, caps: &DeviceCaps) -> u32 {
        let threads = self.lanes * self.groups;
        let squares = if self.prologue == PrologueKind::Norm && !caps.is_cpu { 4 * self.rows * threads } else { 0 };
        let scratch = if caps.lanes().uses_subgroups() { 0 } else { 4 * threads };
        squares + scratch
    }

    /// Groups of 8 inputs in f32 that [`LinearDecode::staging_bytes`] hold beside the reductions.
    fn fitting(&self, caps: &DeviceCaps) -> u32 {
        // 36 bytes for each group's 32, and one vec4 a row: the padding against bank conflicts.
        (self.staging_bytes - self.reduction_bytes(caps) - 16 * self.rows) / (36 * self.rows)
    }

    /// Groups of 8 inputs staged at a time: all of them if they fit, in whole blocks.
    ///
    /// A software rasteriser holds them in private memory instead, which costs it loads but no limit; unrolled over
    /// more steps the code would be large.
    fn chunk(&self, caps: &DeviceCaps) -> u32 {
        let groups = self.in_features.div_ceil(8);
        if caps.is_cpu {
            let step = self.lanes * self.unit / 8;
            return groups.div_ceil(step).min(((24 / self.rows).max(4) * 8 / self.unit).max(1)) * step;
        }
        let block = self.block * self.lanes * self.unit / 8;
        groups.next_multiple_of(block).min(self.fitting(caps) / block * block)
    }
}

impl Kernel for LinearDecode {
    const NAME: &'static str = "linear_decode";
    type Params = LinearParams;
    type Bindings<'a> = LinearDecodeBindings<'a>;

    fn definitions(&self, caps: &DeviceCaps) -> Definitions {
        let (lanes, parts) = (self.lanes, self.unit / 8);
        let chunk = self.chunk(caps) / parts;
        let steps = chunk.div_ceil(lanes);
        let (splits, head_dim) = match self.prologue {
            PrologueKind::Merge { num_splits, head_dim } => (num_splits, head_dim),
            _ => (1, 4),
        };
        let definitions = Definitions::new()
            .u32("NUM_OUTPUTS", self.num_outputs)
            .u32("IN_FEATURES", self.in_features)
            .u32("UNIT", 8 * parts)
            .flag("WIDE", parts > 1)
            .u32("PARTS", parts)
            .u32("CHUNK", chunk)
            .u32("ROWS", self.rows)
            .u32("PAIRS", self.pairs)
            .u32("GROUPS", self.groups)
            .u32("LANES", lanes)
            .u32("BLOCK", self.block)
            .u32("ROUNDS", self.rounds)
            .u32("STEPS", steps)
            .u32("TEXEL_ROW", TEXEL_ROW)
            .flag("TEXELS", caps.is_cpu)
            .flag("DIGITS", self.multiplies_digits(caps))
            .flag("SINGLE", self.single_row)
            .u32("SPLITS", splits)
            .u32("HEAD_DIM", head_dim)
            .flag("SUBGROUP", caps.lanes().uses_subgroups())
            .flag("SHUFFLES", caps.lanes().uses_subgroups() && !caps.is_cpu)
            // Measured on an H200, in parts of what reading takes: 49152x960 63 % for 55 in q4 with digits of before, 92 for 94 in f16.
            .flag("BUILT_IN", self.multiplies_digits(caps) && caps.subgroup_sizes == Some((lanes, lanes)))
            .flag("NORM", self.prologue == PrologueKind::Norm)
            .flag("MERGE", matches!(self.prologue, PrologueKind::Merge { .. }))
            .flag("X_BY_ROW", matches!(self.prologue, PrologueKind::Stream | PrologueKind::Norm));
        self.epilogue.define(define_weight(definitions, self.weight_dtype))
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        let mut bindings = vec![Binding::read(1, &b.rows.active), Binding::texels(2, b.weight)];
        bindings.extend(b.prologue.bindings());
        bindings.extend(b.epilogue.bindings());
        bindings
    }

    fn workgroup_storage_bytes(&self, caps: &DeviceCaps) -> u32 {
        if caps.is_cpu {
            return self.reduction_bytes(caps);
        }
        let chunk = self.chunk(caps);
        let staged = match self.multiplies_digits(caps) {
            // Two bytes an element, and of each eight step and sum.
            true => chunk * (16 + 8),
            false => 16 * (chunk * 2 + chunk / 4 + 1),
        };
        self.rows * staged + self.reduction_bytes(caps)
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::oracle::linear_decode::{gather, linear, rounded_to_digits};
    use crate::oracle::rms_norm::rms_norm;
    use crate::parity::{self, EpilogueCase, Rng, Tolerance};

    #[test]
    fn products_match_oracle() {
        parity::on_every_profile_and_as_gpu(|gpu, profile| {
            let mut rng = Rng::new("linear_decode");
            // Each case is three pipelines; the row counts go round so that every ROWS meets small and large K. Of
            // quantised rows, K that fill their last group and K that do not.
            let cases = [
                (DType::F32, 8, 2, 0, 1),
                (DType::F16, 56, 34, 7, 8),
                (DType::BF16, 64, 130, 1, 1),
                (DType::F32, 264, 66, 3, 4),
                (DType::F16, 960, 320, 1, 1),
                (DType::BF16, 2560, 32, 2, 2),
                (DType::F32, 8192, 6, 9, 8),
                // Outputs for many workgroups, whose threads are more then.
                (DType::F16, 256, 5120, 7, 8),
                (DType::Q8, 8, 6, 1, 1),
                (DType::Q8, 264, 66, 3, 4),
                (DType::Q8, 960, 130, 1, 1),
                (DType::Q8, 8192, 6, 9, 8),
                (DType::Q4, 56, 34, 7, 8),
                (DType::Q4, 256, 66, 2, 2),
                (DType::Q4, 2560, 34, 1, 1),
                (DType::Q4, 8200, 6, 5, 4),
            ];
            for (dtype, in_features, num_outputs, num_active, max_rows) in cases {
                {
                    let (weight, w) = parity::upload_weight(gpu, &mut rng, num_outputs, in_features, dtype);
                    let active = parity::some_rows(&mut rng, num_active + 2, num_active);
                    let x = rng.normals((num_active + 2) * in_features);
                    let norm_weight = rng.normals(in_features);
                    let compact = gather(&active, &x, in_features);
                    let (x_gpu, norm_gpu) = (parity::upload(gpu, &x), parity::upload(gpu, &norm_weight));
                    let compact_gpu = parity::upload(gpu, &compact);
                    let normed = rms_norm(&active, &x, &norm_weight, 1e-5);
                    let rows = parity::row_set(gpu, &active);
                    for (prologue, input) in [
                        (Prologue::Compact { x: &compact_gpu }, &compact),
                        (Prologue::Stream { x: &x_gpu }, &compact),
                        (Prologue::Norm { x: &x_gpu, weight: &norm_gpu }, &normed),
                    ] {
                        let out = parity::Output::new(gpu, num_active * num_outputs);
                        let epilogue = Epilogue::Store { out: &out.tensor };
                        let kernel = LinearDecode::new(
                            gpu.caps(),
                            [num_outputs, in_features].map(|size| size as u32),
                            dtype,
                            prologue.kind(),
                            epilogue.kind(),
                            max_rows,
                        );
                        let params = LinearParams {
                            num_outputs: num_outputs as u32,
                            out_stride: num_outputs as u32,
                            in_features: in_features as u32,
                            eps: 1e-5,
                            scale: 0.5,
                            ..Default::default()
                        };
                        let bindings = LinearDecodeBindings { rows: &rows, weight: &weight, prologue, epilogue };
                        let grid = Grid::Fixed([kernel.workgroups_x(), (num_active as u32).div_ceil(kernel.rows), 1]);
                        parity::run(gpu, |plan| plan.dispatch(&kernel, &bindings, &params, grid));
                        // The norm's factor is one for all of a row: digits of what it scales are as those of what it has scaled.
                        let digits = kernel.multiplies_digits(gpu.caps()).then(|| rounded_to_digits(input));
                        let input = digits.as_ref().unwrap_or(input);
                        let want: Vec<f32> = linear(input, &w, in_features).iter().map(|v| v * 0.5).collect();
                        let what = format!(
                            "linear_decode {profile} {:?} {dtype:?} K={in_features} O={num_outputs} n={num_active}",
                            prologue.kind()
                        );
                        parity::assert_close(&what, &out.read(gpu), &want, Tolerance::F32);
                    }
                }
            }
        });
    }

    #[test]
    fn merge_matches_oracle() {
        parity::on_every_profile_and_as_gpu(|gpu, _| {
            let mut rng = Rng::new("linear_decode merge");
            let (heads, head_dim, num_splits, num_outputs, num_active) = (3, 16, 5, 48, 2);
            let in_features = heads * head_dim;
            let partial = rng.normals(num_active * heads * num_splits * head_dim);
            // One split is empty, as attention_decode leaves it.
            let stats: Vec<f32> = (0..num_active * heads * num_splits)
                .flat_map(|s| {
                    if s % num_splits == 3 { [-3.402_823_4e38, 0.0] } else { [10.0 * rng.normal(), 1.0 + rng.unit()] }
                })
                .collect();
            let mut merged = Vec::new();
            for head in 0..num_active * heads {
                let stat = |s: usize| {
                    (f64::from(stats[2 * (head * num_splits + s)]), f64::from(stats[2 * (head * num_splits + s) + 1]))
                };
                let highest = (0..num_splits).map(|s| stat(s).0).fold(f64::MIN, f64::max);
                let mass: f64 = (0..num_splits).map(|s| (stat(s).0 - highest).exp() * stat(s).1).sum();
                for d in 0..head_dim {
                    let sum: f64 = (0..num_splits)
                        .map(|s| {
                            (stat(s).0 - highest).exp() * f64::from(partial[(head * num_splits + s) * head_dim + d])
                        })
                        .sum();
                    merged.push((sum / mass) as f32);
                }
            }
            let (weight, w) = parity::upload_weight(gpu, &mut rng, num_outputs, in_features, DType::F16);
            let active = parity::some_rows(&mut rng, num_active, num_active);
            let out = parity::Output::new(gpu, num_active * num_outputs);
            let (partial, stats) = (parity::upload(gpu, &partial), parity::upload(gpu, &stats));
            let [num_splits, head_dim] = [num_splits, head_dim].map(|size| size as u32);
            let prologue = Prologue::Merge { partial: &partial, stats: &stats, num_splits, head_dim };
            let epilogue = Epilogue::Store { out: &out.tensor };
            let kernel = LinearDecode::new(
                gpu.caps(),
                [num_outputs, in_features].map(|size| size as u32),
                DType::F16,
                prologue.kind(),
                epilogue.kind(),
                1,
            );
            let params = LinearParams {
                num_outputs: num_outputs as u32,
                out_stride: num_outputs as u32,
                in_features: in_features as u32,
                scale: 1.0,
                ..Default::default()
            };
            let rows = parity::row_set(gpu, &active);
            let bindings = LinearDecodeBindings { rows: &rows, weight: &weight, prologue, epilogue };
            let grid = Grid::Fixed([kernel.workgroups_x(), num_active as u32, 1]);
            parity::run(gpu, |plan| plan.dispatch(&kernel, &bindings, &params, grid));
            parity::assert_close(
                "linear_decode merge",
                &out.read(gpu),
                &linear(&merged, &w, in_features),
                Tolerance::F32,
            );
        });
    }

    #[test]
    fn epilogues_match_oracle() {
        parity::on_every_profile_and_as_gpu(|gpu, profile| {
            let mut rng = Rng::new("linear_decode epilogues");
            for kind in EpilogueKind::ALL {
                for (num_rows, num_active) in [(1, 1), (4, 1), (9, 6)] {
                    let in_features = 64;
                    // Sharded weights: the second half of the columns is a dispatch of its own.
                    let case = EpilogueCase::new(gpu, &mut rng, kind, num_rows, num_active);
                    let x = rng.normals(num_rows * in_features);
                    let x_gpu = parity::upload(gpu, &x);
                    let prologue = Prologue::Stream { x: &x_gpu };
                    let mut state = case.initial.clone();
                    for (first_output, num_outputs) in case.shards(2) {
                        let (weight, w) = parity::upload_weight(gpu, &mut rng, num_outputs, in_features, DType::BF16);
                        let kernel = LinearDecode::new(
                            gpu.caps(),
                            [num_outputs, in_features].map(|size| size as u32),
                            DType::BF16,
                            prologue.kind(),
                            kind,
                            num_active as u32,
                        );
                        let kernel = LinearDecode { single_row: num_rows == 1, ..kernel };
                        let params = LinearParams {
                            num_outputs: num_outputs as u32,
                            first_output: first_output as u32,
                            in_features: in_features as u32,
                            ..case.params
                        };
                        let bindings = LinearDecodeBindings {
                            rows: &case.rows,
                            weight: &weight,
                            prologue,
                            epilogue: case.epilogue(),
                        };
                        let grid = Grid::Fixed([kernel.workgroups_x(), (num_active as u32).div_ceil(kernel.rows), 1]);
                        parity::run(gpu, |plan| plan.dispatch(&kernel, &bindings, &params, grid));
                        let y = linear(&gather(&case.active, &x, in_features), &w, in_features);
                        crate::oracle::linear_decode::epilogue(kind, &case.active, &y, &params, &mut state);
                    }
                    case.assert_matches(
                        gpu,
                        &format!("linear_decode {profile} {kind:?} n={num_active} of {num_rows}"),
                        &state,
                    );
                }
            }
        });
    }
}
