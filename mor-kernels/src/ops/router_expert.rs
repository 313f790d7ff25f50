//! Scores every active row for its next recursion, and gates it; norms it as well for that recursion's first layer.

use super::attention_decode::describe;
use crate::caps::DeviceCaps;
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::RowSet;
use crate::shader::Definitions;
use crate::tensor::{DType, Tensor};

/// What turns a router's logit into the weight of the block's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExpertGate {
    /// `alpha * sigmoid(logit)`.
    Sigmoid,
    /// `alpha * tanh(logit)`.
    Tanh,
    /// The logit itself; alpha is not used.
    None,
}

/// `logits[r] = input_scale * dot(x[r], weight[q])` and its gate, for the active rows `r`; `q` is the recursion after the
/// one that the row's list entry names, the first in lists outside the shared block. With a norm, the rows `normed[r]` as well that
/// [`RmsNorm`](super::RmsNorm) would make of them, in f16 and not compact: who goes on is not yet known.
///
/// # Source
/// Bae et al. 2025, arXiv 2507.10524: expert-choice routing; Zhang and Sennrich 2019, arXiv 1910.07467: the norm.
#[derive(Clone, Copy, Debug)]
pub struct RouterExpert {
    /// Elements of an input row, a multiple of 8.
    pub in_features: u32,
    /// Threads of a workgroup: a power of two.
    pub workgroup_size: u32,
    /// The gate's function.
    pub gate: ExpertGate,
    /// Type of the weight: f32, f16 or bf16.
    pub weight_dtype: DType,
    /// Whether `x` is a stream read at each entry's row; else it is compact, in the order of the list.
    pub x_by_row: bool,
    /// Writes no gates: for the auxiliary router, which only decides.
    pub logit_only: bool,
    /// Writes what a script decides in place of logits, for measurements: 1 for a token that takes the recursion, else -1.
    /// Gates are the router's all the same, and so is the cost.
    pub scripted: bool,
    /// Norms the rows.
    pub norms: bool,
}

/// Sizes and constants of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct RouterExpertParams {
    /// Multiplies the dot product: 1 / temperature of a linear router.
    pub input_scale: f32,
    /// Multiplies sigmoid or tanh.
    pub alpha: f32,
    /// Recursions R; rows that have taken all are left alone.
    pub num_recursions: u32,
    /// Seed of the script, low half; 0 without one.
    pub seed_low: u32,
    /// High half.
    pub seed_high: u32,
    /// Added to the mean square of a row that is normed.
    pub eps: f32,
}

/// The norm of the rows that are scored.
#[derive(Clone, Copy, Debug)]
pub struct RouterNorm<'a> {
    /// `[K]` f32.
    pub weight: &'a Tensor,
    /// `[T, K]` f16, written at the active rows that have a recursion left to take.
    pub y: &'a Tensor,
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct RouterExpertBindings<'a> {
    /// The rows to score, n of them.
    pub rows: &'a RowSet,
    /// `[T, K]` f32, or `[n, K]` without `x_by_row`.
    pub x: &'a Tensor,
    /// `[R, K]` of the specialisation's type.
    pub weight: &'a Tensor,
    /// `[T]` f32, written at the active rows.
    pub logits: &'a Tensor,
    /// `[T]` f32, written at the active rows; `None` exactly with `logit_only`.
    pub gates: Option<&'a Tensor>,
    /// `[R]` f32: the script's share of all tokens that takes each recursion; `None` exactly without `scripted`.
    pub shares: Option<&'a Tensor>,
    /// `None` exactly without `norms`.
    pub norm: Option<RouterNorm<'a>>,
}

impl RouterExpert {
    /// The kernel for rows of `in_features` elements and weights in f32, with a sigmoid gate and no more than that, in the workgroup
    /// size that suits the device: a software rasteriser pays for every thread at every barrier.
    pub fn new(caps: &DeviceCaps, in_features: u32) -> Self {
        let most = if caps.is_cpu { 64 } else { caps.max_workgroup_size.min(256) };
        Self {
            in_features,
            workgroup_size: (in_features / 8).next_power_of_two().clamp(64, most.max(64)),
            gate: ExpertGate::Sigmoid,
            weight_dtype: DType::F32,
            x_by_row: true,
            logit_only: false,
            scripted: false,
            norms: false,
        }
    }

    fn shuffles(caps: &DeviceCaps) -> bool {
        caps.lanes().uses_subgroups() && !caps.is_cpu
    }

    /// Records the kernel over all active rows.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if `in_features` is no multiple of 8, if the weight, `shares` or the norm has another size or type, or
    /// if `gates` and `logit_only` contradict each other; else as [`PlanBuilder::dispatch`].
    pub fn record(&self, plan: &mut PlanBuilder<'_>, b: RouterExpertBindings<'_>, p: RouterExpertParams) -> Result<()> {
        check_router(Self::NAME, b.weight, self.weight_dtype, p.num_recursions, self.in_features)?;
        if b.gates.is_some() == self.logit_only {
            return Err(KernelError::Shape {
                kernel: Self::NAME,
                what: "gates",
                found: if self.logit_only { "a tensor" } else { "no tensor" }.to_owned(),
                expected: format!("the contrary with logit_only = {}", self.logit_only),
            });
        }
        let shares = b.shares.map(|shares| (shares.dtype(), shares.num_elems()));
        if shares != self.scripted.then_some((DType::F32, p.num_recursions as usize)) {
            return Err(KernelError::Shape {
                kernel: Self::NAME,
                what: "shares",
                found: b.shares.map_or_else(|| "no tensor".to_owned(), describe),
                expected: if self.scripted { format!("F32 [{}]", p.num_recursions) } else { "none".to_owned() },
            });
        }
        let k = self.in_features as usize;
        let is_whole = |norm: &RouterNorm<'_>| {
            norm.weight.num_elems() == k && norm.y.dtype() == DType::F16 && norm.y.num_elems() >= b.rows.capacity * k
        };
        if b.norm.as_ref().map(is_whole) != self.norms.then_some(true) {
            let shape = |norm: RouterNorm<'_>| format!("{} and {}", describe(norm.weight), describe(norm.y));
            return Err(KernelError::Shape {
                kernel: Self::NAME,
                what: "norm",
                found: b.norm.map_or_else(|| "no tensors".to_owned(), shape),
                expected: if self.norms { format!("F32 [{k}] and F16 [rows, {k}]") } else { "none".to_owned() },
            });
        }
        plan.dispatch(self, &b, &p, Grid::rows(b.rows, 1, 1))
    }
}

/// What the routers ask of their weight.
pub(super) fn check_router(
    kernel: &'static str,
    weight: &Tensor,
    dtype: DType,
    out_features: u32,
    in_features: u32,
) -> Result<()> {
    let refuse = |what, found, expected| Err(KernelError::Shape { kernel, what, found, expected });
    if in_features == 0 || !in_features.is_multiple_of(8) {
        return refuse("in_features", in_features.to_string(), "a multiple of 8".to_owned());
    }
    let elems = out_features as usize * in_features as usize;
    if weight.num_elems() != elems || weight.dtype() != dtype || dtype == DType::U32 {
        let found = format!("{:?} of {:?}", weight.shape(), weight.dtype());
        return refuse("weight", found, format!("{out_features} x {in_features} elements of {dtype:?}"));
    }
    Ok(())
}

/// Sets the flags of `shared/weights.wgsl`.
pub(super) fn with_weight_dtype(definitions: Definitions, dtype: DType) -> Definitions {
    definitions.flag("WEIGHT_F16", dtype == DType::F16).flag("WEIGHT_BF16", dtype == DType::BF16)
}

impl Kernel for RouterExpert {
    const NAME: &'static str = "router_expert";
    type Params = RouterExpertParams;
    type Bindings<'a> = RouterExpertBindings<'a>;

    fn definitions(&self, caps: &DeviceCaps) -> Definitions {
        let units = self.in_features / 8;
        let definitions = Definitions::new()
            .u32("WORKGROUP_SIZE", self.workgroup_size)
            .u32("UNITS", units)
            .u32("HELD", units.div_ceil(self.workgroup_size))
            .flag("SUBGROUP", Self::shuffles(caps))
            .flag("X_BY_ROW", self.x_by_row)
            .flag("LOGIT_ONLY", self.logit_only)
            .flag("SCRIPTED", self.scripted)
            .flag("SIGMOID", self.gate == ExpertGate::Sigmoid)
            .flag("TANH", self.gate == ExpertGate::Tanh)
            .flag("NORMED", self.norms);
        let definitions =
            if Self::shuffles(caps) { definitions.u32("LANES", caps.lanes().width()) } else { definitions };
        with_weight_dtype(definitions, self.weight_dtype)
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        let mut bindings = vec![
            Binding::read(1, &b.rows.active),
            Binding::read(2, b.x),
            Binding::read(3, b.weight),
            Binding::write(4, b.logits),
        ];
        bindings.extend(b.gates.map(|gates| Binding::write(5, gates)));
        bindings.extend(b.shares.map(|shares| Binding::read(6, shares)));
        bindings.extend(b.norm.iter().flat_map(|norm| [Binding::read(7, norm.weight), Binding::write(8, norm.y)]));
        bindings
    }

    fn workgroup_storage_bytes(&self, caps: &DeviceCaps) -> u32 {
        if Self::shuffles(caps) { 8 * self.workgroup_size / caps.lanes().width() } else { 4 * self.workgroup_size }
    }
}

#[cfg(all(test, feature = "oracle"))]
pub(super) mod tests {
    use super::*;
    use crate::gpu::Gpu;
    use crate::oracle::rms_norm::rms_norm;
    use crate::oracle::router_expert::{router_expert, script};
    use crate::parity::{self, Output, Rng, Tolerance};
    use crate::rows::NONE;

    /// `values` as a tensor of `dtype`, and as the device reads them back.
    pub(crate) fn weights(gpu: &Gpu, dtype: DType, values: &[f32]) -> (Tensor, Vec<f32>) {
        let shape = [values.len()];
        let (tensor, rounded) = match dtype {
            DType::F16 => {
                let halves: Vec<_> = values.iter().map(|v| half::f16::from_f32(*v)).collect();
                let rounded = halves.iter().map(|h| h.to_f32()).collect();
                (Tensor::from_slice(gpu, "weight", dtype, &shape, &halves), rounded)
            }
            DType::BF16 => {
                let halves: Vec<_> = values.iter().map(|v| half::bf16::from_f32(*v)).collect();
                let rounded = halves.iter().map(|h| h.to_f32()).collect();
                (Tensor::from_slice(gpu, "weight", dtype, &shape, &halves), rounded)
            }
            _ => (Tensor::from_slice(gpu, "weight", dtype, &shape, values), values.to_vec()),
        };
        (tensor.expect("a test's buffer fits"), rounded)
    }

    #[test]
    fn matches_oracle() {
        parity::on_every_profile_and_as_gpu(|gpu, profile| {
            let mut rng = Rng::new("router_expert");
            for in_features in [8, 64, 264, 512, 520, 960, 4096] {
                for num_active in [0, 1, 7, 33] {
                    for (gate, weight_dtype, x_by_row) in [
                        (ExpertGate::Sigmoid, DType::F32, true),
                        (ExpertGate::Tanh, DType::F16, false),
                        (ExpertGate::None, DType::BF16, true),
                    ] {
                        let kernel = RouterExpert::new(gpu.caps(), in_features as u32);
                        let kernel = RouterExpert { gate, weight_dtype, x_by_row, ..kernel };
                        let num_rows = num_active + 3;
                        let mut active = parity::some_rows(&mut rng, num_rows, num_active);
                        // Before the first recursion, between recursions, and after the last.
                        active.iter_mut().for_each(|entry| entry.recursion = [NONE, 0, 1, 2][rng.below(4)]);
                        let x = rng.normals(num_rows * in_features);
                        // Logits of about one: gates of all sizes, and sums without cancellation in all digits.
                        let values: Vec<f32> =
                            rng.normals(3 * in_features).iter().map(|v| v / (in_features as f32).sqrt()).collect();
                        let (weight, values) = weights(gpu, weight_dtype, &values);
                        let logits = Output::new(gpu, num_rows);
                        let gates = Output::new(gpu, num_rows);
                        // Rows that are not active keep what they held.
                        let (mut want_logits, mut want_gates) = (logits.read(gpu), gates.read(gpu));
                        let params = RouterExpertParams {
                            input_scale: 0.7,
                            alpha: 0.1,
                            num_recursions: 3,
                            ..Default::default()
                        };
                        router_expert(&kernel, &params, &active, &x, &values, &mut want_logits, Some(&mut want_gates));
                        let bindings = RouterExpertBindings {
                            rows: &parity::row_set(gpu, &active),
                            x: &parity::upload(gpu, &x),
                            weight: &weight,
                            logits: &logits.tensor,
                            gates: Some(&gates.tensor),
                            shares: None,
                            norm: None,
                        };
                        parity::run(gpu, |plan| {
                            plan.dispatch(&kernel, &bindings, &params, Grid::Fixed([1, num_active as u32, 1]))
                        });
                        let what = format!("{profile} K={in_features} n={num_active} {gate:?}");
                        parity::assert_close(
                            &format!("logits {what}"),
                            &logits.read(gpu),
                            &want_logits,
                            Tolerance::F32,
                        );
                        parity::assert_close(&format!("gates {what}"), &gates.read(gpu), &want_gates, Tolerance::F32);
                    }
                }
            }
        });
    }

    #[test]
    fn saturates_and_stops_past_the_end() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("router_expert extremes");
            let scales = [0.0, 1e-30, 1e-3, 20.0, -20.0, 100.0, -100.0, 3e38, -3e38, f32::NAN];
            let active = parity::some_rows(&mut rng, scales.len(), scales.len());
            let x: Vec<f32> = scales.iter().flat_map(|scale| [*scale, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]).collect();
            let weight = [1.0_f32; 8];
            for gate in [ExpertGate::Sigmoid, ExpertGate::Tanh, ExpertGate::None] {
                let kernel = RouterExpert { gate, ..RouterExpert::new(gpu.caps(), 8) };
                let (logits, gates) = (Output::new(gpu, scales.len()), Output::new(gpu, scales.len()));
                let bindings = RouterExpertBindings {
                    rows: &parity::row_set(gpu, &active),
                    x: &parity::upload(gpu, &x),
                    weight: &parity::upload(gpu, &weight),
                    logits: &logits.tensor,
                    gates: Some(&gates.tensor),
                    shares: None,
                    norm: None,
                };
                let params =
                    RouterExpertParams { input_scale: 1.0, alpha: 1.0, num_recursions: 1, ..Default::default() };
                // More workgroups than rows: the padding entries end them.
                let grid = Grid::Fixed([1, scales.len() as u32 + 5, 1]);
                parity::run(gpu, |plan| plan.dispatch(&kernel, &bindings, &params, grid));
                let (mut want_logits, mut want) = (vec![0.0; scales.len()], vec![0.0; scales.len()]);
                router_expert(&kernel, &params, &active, &x, &weight, &mut want_logits, Some(&mut want));
                let got = gates.read(gpu);
                let last = scales.len() - 1;
                assert!(got[last].is_nan(), "{profile} {gate:?}: NaN gave {}", got[last]);
                parity::assert_close(&format!("{profile} {gate:?}"), &got[..last], &want[..last], Tolerance::F32);
            }
        });
    }

    #[test]
    fn writes_logits_alone_for_the_auxiliary_router() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("router_expert logit only");
            let active = parity::some_rows(&mut rng, 9, 7);
            let (x, weight) = (rng.normals(9 * 64), rng.normals(64));
            let kernel = RouterExpert { logit_only: true, ..RouterExpert::new(gpu.caps(), 64) };
            let params = RouterExpertParams { input_scale: 1.0, alpha: 1.0, num_recursions: 1, ..Default::default() };
            let logits = Output::new(gpu, 9);
            let mut want = logits.read(gpu);
            router_expert(&kernel, &params, &active, &x, &weight, &mut want, None);
            let bindings = RouterExpertBindings {
                rows: &parity::row_set(gpu, &active),
                x: &parity::upload(gpu, &x),
                weight: &parity::upload(gpu, &weight),
                logits: &logits.tensor,
                gates: None,
                shares: None,
                norm: None,
            };
            parity::run(gpu, |plan| plan.dispatch(&kernel, &bindings, &params, Grid::Fixed([1, 7, 1])));
            parity::assert_close(profile, &logits.read(gpu), &want, Tolerance::F32);
        });
    }

    #[test]
    fn norms_what_it_scores() {
        parity::on_every_profile_and_as_gpu(|gpu, profile| {
            let mut rng = Rng::new("router_expert norm");
            for in_features in [8, 264, 960, 4096] {
                for num_active in [0, 1, 33] {
                    let num_rows = num_active + 3;
                    let mut active = parity::some_rows(&mut rng, num_rows, num_active);
                    active.iter_mut().for_each(|entry| entry.recursion = [NONE, 0, 1, 2][rng.below(4)]);
                    let (x, weight) = (rng.normals(num_rows * in_features), rng.normals(3 * in_features));
                    let norm_weight = rng.normals(in_features);
                    let params = RouterExpertParams {
                        input_scale: 0.1,
                        alpha: 0.1,
                        num_recursions: 3,
                        eps: 1e-5,
                        ..Default::default()
                    };
                    let (logits, plain) = (Output::new(gpu, num_rows), Output::new(gpu, num_rows));
                    let y = Tensor::zeros(gpu, "y", DType::F16, &[num_rows, in_features]).expect("it fits");
                    let kernel = RouterExpert::new(gpu.caps(), in_features as u32);
                    let bindings = RouterExpertBindings {
                        rows: &parity::row_set(gpu, &active),
                        x: &parity::upload(gpu, &x),
                        weight: &parity::upload(gpu, &weight),
                        logits: &plain.tensor,
                        gates: None,
                        shares: None,
                        norm: None,
                    };
                    let decides = RouterExpert { logit_only: true, ..kernel };
                    let norms = RouterExpert { norms: true, ..decides };
                    let norm = Some(RouterNorm { weight: &parity::upload(gpu, &norm_weight), y: &y });
                    let with_norm = RouterExpertBindings { logits: &logits.tensor, norm, ..bindings };
                    let grid = || Grid::Fixed([1, num_active as u32, 1]);
                    parity::run(gpu, |plan| {
                        plan.dispatch(&decides, &bindings, &params, grid())?;
                        plan.dispatch(&norms, &with_norm, &params, grid())
                    });
                    let what = format!("{profile} K={in_features} n={num_active}");
                    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                    assert_eq!(bits(logits.read(gpu)), bits(plain.read(gpu)), "{what}: a norm changes no logit");
                    let mut want = vec![0.0; num_rows * in_features];
                    for entry in active.iter().filter(|entry| entry.recursion.wrapping_add(1) < 3) {
                        let row = rms_norm(&[*entry], &x, &norm_weight, params.eps);
                        want[entry.row as usize * in_features..][..in_features].copy_from_slice(&row);
                    }
                    let halves: Vec<half::f16> = gpu.read(&y).expect("the device answers");
                    let halves: Vec<f32> = halves.into_iter().map(f32::from).collect();
                    let want: Vec<f32> = want.iter().map(|v| f32::from(half::f16::from_f32(*v))).collect();
                    parity::assert_close(&what, &halves, &want, Tolerance::F16);
                }
            }
        });
    }

    #[test]
    fn follows_the_script() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("router_expert script");
            let shares = [1.0, 0.75, 0.0, 0.3];
            let mut active = parity::some_rows(&mut rng, 500, 400);
            for entry in &mut active {
                (entry.recursion, entry.sequence) = ([NONE, 0, 1, 2, 3][rng.below(5)], rng.below(40) as u32);
            }
            let (x, weight) = (rng.normals(500 * 64), rng.normals(4 * 64));
            let params = RouterExpertParams {
                input_scale: 1.0,
                alpha: 0.1,
                num_recursions: 4,
                seed_low: 5,
                seed_high: 7,
                eps: 0.0,
            };
            for logit_only in [false, true] {
                let kernel = RouterExpert { scripted: true, logit_only, ..RouterExpert::new(gpu.caps(), 64) };
                let (logits, gates) = (Output::new(gpu, 500), Output::new(gpu, 500));
                let (mut want_logits, mut want_gates) = (logits.read(gpu), gates.read(gpu));
                router_expert(&kernel, &params, &active, &x, &weight, &mut want_logits, Some(&mut want_gates));
                script(&params, &active, &shares, &mut want_logits);
                let bindings = RouterExpertBindings {
                    rows: &parity::row_set(gpu, &active),
                    x: &parity::upload(gpu, &x),
                    weight: &parity::upload(gpu, &weight),
                    logits: &logits.tensor,
                    gates: (!logit_only).then_some(&gates.tensor),
                    shares: Some(&parity::upload(gpu, &shares)),
                    norm: None,
                };
                parity::run(gpu, |plan| plan.dispatch(&kernel, &bindings, &params, Grid::Fixed([1, 400, 1])));
                let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                assert_eq!(bits(logits.read(gpu)), bits(want_logits), "{profile}: decisions");
                if !logit_only {
                    // Those of the router, not of the script.
                    parity::assert_close(profile, &gates.read(gpu), &want_gates, Tolerance::F32);
                }
            }
        });
    }

    #[test]
    fn refuses_contradictions() {
        let gpu = parity::gpu();
        let mut plan = PlanBuilder::new(gpu).expect("a small buffer fits");
        let tensor = parity::upload(gpu, &[0.0; 64]);
        let bindings = RouterExpertBindings {
            rows: &parity::row_set(gpu, &[]),
            x: &tensor,
            weight: &tensor,
            logits: &tensor,
            gates: None,
            shares: None,
            norm: None,
        };
        let params = RouterExpertParams { input_scale: 1.0, alpha: 1.0, num_recursions: 1, ..Default::default() };
        let kernel = RouterExpert::new(gpu.caps(), 64);
        let mut message = |kernel: RouterExpert, bindings| {
            kernel.record(&mut plan, bindings, params).expect_err("must be refused").to_string()
        };
        assert!(message(kernel, bindings).contains("gates has no tensor"));
        assert!(message(RouterExpert { in_features: 60, ..kernel }, bindings).contains("in_features has 60"));
        let decides = RouterExpert { logit_only: true, ..kernel };
        let scripted = RouterExpert { scripted: true, ..decides };
        assert!(message(scripted, bindings).contains("shares has no tensor, expected F32 [1]"));
        let half = RouterExpert { weight_dtype: DType::F16, ..kernel };
        assert!(message(half, bindings).contains("weight has [64] of F32"));
        let norms = RouterExpert { norms: true, ..decides };
        assert!(message(norms, bindings).contains("norm has no tensors, expected F32 [64] and F16 [rows, 64]"));
        let whole = RouterExpertBindings { norm: Some(RouterNorm { weight: &tensor, y: &tensor }), ..bindings };
        assert!(message(norms, whole).contains("norm has F32 [64] and F32 [64]"));
        assert!(message(decides, whole).contains("expected none"));
    }
}
