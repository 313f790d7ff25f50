//! Chooses the depth of every active row, once, at the input of the shared part.

use super::router_expert::{check_router, with_weight_dtype};
use crate::caps::DeviceCaps;
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::RowSet;
use crate::shader::Definitions;
use crate::tensor::{DType, Tensor};

/// Most recursions a token router chooses among: each has a sum per thread in workgroup memory.
const MAX_RECURSIONS: u32 = 256;

/// Sums that workgroup memory holds: 16 KiB, what every device offers.
const MAX_SUMS: u32 = 4096;

/// What turns a row's logits into its vector of gates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenGate {
    /// `alpha * softmax(logits)`.
    Softmax,
    /// `alpha * sigmoid(logit)`, each on its own.
    Sigmoid,
}

/// `depth[r] = argmax(gate(weight x[r]) + bias) + 1` for the active rows `r`, among the depths allowed, with the gate
/// chosen. Gates are without bias.
///
/// # Source
/// Bae et al. 2025, arXiv 2507.10524: token-choice routing. Bias: Wang et al. 2024, arXiv 2408.15664.
#[derive(Clone, Copy, Debug)]
pub struct RouterToken {
    /// Threads of a workgroup: a power of two.
    pub workgroup_size: u32,
    /// Recursions to choose among, 2 to 256.
    pub num_recursions: u32,
    /// The gates' function.
    pub gate: TokenGate,
    /// Type of the weight: f32, f16 or bf16.
    pub weight_dtype: DType,
    /// Whether `x` is a stream read at each entry's row; else it is compact, in the order of the list.
    pub x_by_row: bool,
    /// Adds a bias to the gates for the choice alone (loss-free balancing).
    pub bias: bool,
}

/// Sizes and constants of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct RouterTokenParams {
    /// Elements of an input row, a multiple of 8.
    pub in_features: u32,
    /// Multiplies the dot products: 1 / temperature of a linear router.
    pub input_scale: f32,
    /// Multiplies softmax or sigmoid.
    pub alpha: f32,
    /// Deepest choice, 1 to R.
    pub max_depth: u32,
    /// Added to the gate of each depth as often as there are shallower ones, for the choice alone.
    pub depth_bias: f32,
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct RouterTokenBindings<'a> {
    /// The rows to route, n of them.
    pub rows: &'a RowSet,
    /// `[T, K]` f32, or `[n, K]` without `x_by_row`.
    pub x: &'a Tensor,
    /// `[R, K]` of the specialisation's type.
    pub weight: &'a Tensor,
    /// `[T, R]` f32, written at the active rows.
    pub logits: &'a Tensor,
    /// `[T, R]` f32, written at the active rows; without bias.
    pub gates: &'a Tensor,
    /// `[T]` u32, written at the active rows: recursions the row takes, 1 to the deepest choice.
    pub depth: &'a Tensor,
    /// `[T]` f32, written at the active rows: the gate of the recursion chosen, without bias.
    pub token_weight: &'a Tensor,
    /// `[R]` f32; `Some` exactly with `bias`.
    pub bias: Option<&'a Tensor>,
}

impl RouterToken {
    /// A softmax router over `num_recursions` recursions with an f32 weight and no bias, reading a stream.
    pub fn new(num_recursions: u32) -> Self {
        Self {
            workgroup_size: 64.min(1 << (MAX_SUMS / num_recursions.clamp(1, MAX_RECURSIONS)).ilog2()),
            num_recursions,
            gate: TokenGate::Softmax,
            weight_dtype: DType::F32,
            x_by_row: true,
            bias: false,
        }
    }

    /// Refuses more depths than the kernel scores.
    ///
    /// # Errors
    /// [`KernelError::Limit`].
    pub fn check_recursions(num_recursions: u32) -> Result<()> {
        if num_recursions <= MAX_RECURSIONS {
            return Ok(());
        }
        Err(KernelError::Limit {
            kernel: Self::NAME,
            what: "recursions",
            found: u64::from(num_recursions),
            limit: u64::from(MAX_RECURSIONS),
            why: "one workgroup scores at once".to_owned(),
            advice: "use fewer recursions",
        })
    }

    /// Records the kernel over all active rows.
    ///
    /// # Errors
    /// [`KernelError::Limit`] for more than 256 recursions; [`KernelError::Shape`] if `in_features` is no multiple of 8,
    /// if `max_depth` is not 1 to R, if the weight or the bias has another size or type than the specialisation says; else as
    /// [`PlanBuilder::dispatch`].
    pub fn record(&self, plan: &mut PlanBuilder<'_>, b: RouterTokenBindings<'_>, p: RouterTokenParams) -> Result<()> {
        Self::check_recursions(self.num_recursions)?;
        check_router(Self::NAME, b.weight, self.weight_dtype, self.num_recursions, p.in_features)?;
        if !(1..=self.num_recursions).contains(&p.max_depth) {
            return Err(KernelError::Shape {
                kernel: Self::NAME,
                what: "max_depth",
                found: p.max_depth.to_string(),
                expected: format!("1 to {}", self.num_recursions),
            });
        }
        let expected = if self.bias { self.num_recursions as usize } else { 0 };
        let found = b.bias.map_or(0, Tensor::num_elems);
        if found != expected {
            return Err(KernelError::Shape {
                kernel: Self::NAME,
                what: "bias",
                found: format!("{found} elements"),
                expected: format!("{expected} with bias = {}", self.bias),
            });
        }
        plan.dispatch(self, &b, &p, Grid::rows(b.rows, 1, 1))
    }
}

impl Kernel for RouterToken {
    const NAME: &'static str = "router_token";
    type Params = RouterTokenParams;
    type Bindings<'a> = RouterTokenBindings<'a>;

    fn definitions(&self, _: &DeviceCaps) -> Definitions {
        let definitions = Definitions::new()
            .u32("WORKGROUP_SIZE", self.workgroup_size)
            .u32("NUM_RECURSIONS", self.num_recursions)
            .flag("X_BY_ROW", self.x_by_row)
            .flag("SOFTMAX", self.gate == TokenGate::Softmax)
            .flag("BIAS", self.bias);
        with_weight_dtype(definitions, self.weight_dtype)
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        let mut bindings = vec![
            Binding::read(1, &b.rows.active),
            Binding::read(2, b.x),
            Binding::read(3, b.weight),
            Binding::write(4, b.logits),
            Binding::write(5, b.gates),
            Binding::write(6, b.depth),
            Binding::write(7, b.token_weight),
        ];
        bindings.extend(b.bias.map(|bias| Binding::read(8, bias)));
        bindings
    }

    fn workgroup_storage_bytes(&self, _: &DeviceCaps) -> u32 {
        4 * self.num_recursions * self.workgroup_size
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::super::router_expert::tests::weights;
    use super::*;
    use crate::oracle::router_token::{TokenChoices, router_token};
    use crate::parity::{self, Output, Rng, Tolerance};
    use crate::rows::ActiveRow;

    struct Case<'a> {
        what: &'a str,
        kernel: RouterToken,
        params: RouterTokenParams,
        active: &'a [ActiveRow],
        num_rows: usize,
        x: &'a [f32],
        weight: &'a [f32],
        bias: &'a [f32],
    }

    /// Runs the kernel and compares all its outputs with the oracle's, which it returns.
    fn check(gpu: &crate::Gpu, case: &Case<'_>) -> TokenChoices {
        let Case { what, kernel, params, active, num_rows, x, weight, bias } = *case;
        let r = kernel.num_recursions as usize;
        let (weight, values) = weights(gpu, kernel.weight_dtype, weight);
        let [logits, gates] = [0; 2].map(|_| Output::new(gpu, num_rows * r));
        let [depth, token_weight] = [0; 2].map(|_| Output::new(gpu, num_rows));
        // Rows that are not active keep what they held.
        let mut want = TokenChoices {
            logits: logits.read(gpu),
            gates: gates.read(gpu),
            depth: depth.read_u32(gpu),
            token_weight: token_weight.read(gpu),
        };
        router_token(&kernel, &params, active, x, &values, bias, &mut want);
        let bias = parity::upload(gpu, bias);
        let bindings = RouterTokenBindings {
            rows: &parity::row_set(gpu, active),
            x: &parity::upload(gpu, x),
            weight: &weight,
            logits: &logits.tensor,
            gates: &gates.tensor,
            depth: &depth.tensor,
            token_weight: &token_weight.tensor,
            bias: kernel.bias.then_some(&bias),
        };
        // More workgroups than rows: the padding entries end them.
        let grid = Grid::Fixed([1, active.len() as u32 + 2, 1]);
        parity::run(gpu, |plan| plan.dispatch(&kernel, &bindings, &params, grid));
        parity::assert_close(&format!("logits {what}"), &logits.read(gpu), &want.logits, Tolerance::F32);
        parity::assert_close(&format!("gates {what}"), &gates.read(gpu), &want.gates, Tolerance::F32);
        assert_eq!(depth.read_u32(gpu), want.depth, "depth {what}");
        parity::assert_close(&format!("weight {what}"), &token_weight.read(gpu), &want.token_weight, Tolerance::F32);
        want
    }

    #[test]
    fn matches_oracle() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("router_token");
            for in_features in [8, 504, 520, 960, 4096] {
                for num_active in [0, 1, 7, 33] {
                    for (num_recursions, gate, weight_dtype, x_by_row, bias) in [
                        (2, TokenGate::Softmax, DType::F32, true, false),
                        (3, TokenGate::Sigmoid, DType::BF16, false, true),
                        (4, TokenGate::Softmax, DType::F16, true, true),
                        (16, TokenGate::Sigmoid, DType::F32, true, false),
                        (256, TokenGate::Softmax, DType::BF16, true, true),
                    ] {
                        let kernel =
                            RouterToken { gate, weight_dtype, x_by_row, bias, ..RouterToken::new(num_recursions) };
                        let r = num_recursions as usize;
                        let num_rows = num_active + 3;
                        let active = parity::some_rows(&mut rng, num_rows, num_active);
                        let x = rng.normals(num_rows * in_features);
                        // Logits of about one: the choice is not always the same.
                        let scale = 1.0 / (in_features as f32).sqrt();
                        let weight: Vec<f32> = rng.normals(r * in_features).iter().map(|v| scale * v).collect();
                        let bias: Vec<f32> = rng.normals(r).iter().map(|v| 0.1 * v).collect();
                        // All depths, and at 33 rows the shallower half.
                        let max_depth = if num_active == 33 { num_recursions.div_ceil(2) } else { num_recursions };
                        let params = RouterTokenParams {
                            in_features: in_features as u32,
                            input_scale: 0.7,
                            alpha: 0.9,
                            max_depth,
                            depth_bias: if x_by_row { 0.0 } else { 0.1 },
                        };
                        let what = format!("{profile} K={in_features} n={num_active} R={r}");
                        let what = what.as_str();
                        let (active, x) = (active.as_slice(), x.as_slice());
                        let (weight, bias) = (weight.as_slice(), bias.as_slice());
                        check(gpu, &Case { what, kernel, params, active, num_rows, x, weight, bias });
                    }
                }
            }
        });
    }

    #[test]
    fn ties_and_extremes() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("router_token ties");
            // Rows scale fixed logits: all equal, two equal maxima, large in both directions.
            let scales = [0.0, 1.0, 1e4, -1e4];
            let active = parity::some_rows(&mut rng, scales.len(), scales.len());
            let x: Vec<f32> = scales.iter().flat_map(|scale| [*scale, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]).collect();
            let weight: Vec<f32> = [-1.0, 2.0, 2.0, -3.0].iter().flat_map(|w| [*w; 8]).collect();
            for (gate, bias, max_depth, depth_bias, depths) in [
                (TokenGate::Softmax, [0.0; 4], 4, 0.0, [1, 2, 2, 4]),
                // Both sigmoids of row 3 are 1 to the last bit: the lower index wins, as an argmax of the gates says.
                (TokenGate::Sigmoid, [0.0; 4], 4, 0.0, [1, 2, 2, 1]),
                (TokenGate::Softmax, [0.0, 0.0, 0.0, 5.0], 4, 0.0, [4; 4]),
                // The best of the depths allowed, whatever lies beyond.
                (TokenGate::Softmax, [0.0, 0.0, 0.0, 5.0], 3, 0.0, [1, 2, 2, 1]),
                (TokenGate::Softmax, [0.0, 0.0, 0.0, 5.0], 1, 2.0, [1; 4]),
                // More than gates can differ by, towards either end; and a little, which settles ties.
                (TokenGate::Softmax, [0.0; 4], 4, 2.0, [4; 4]),
                (TokenGate::Softmax, [0.0; 4], 3, 2.0, [3; 4]),
                (TokenGate::Softmax, [0.0; 4], 4, -2.0, [1; 4]),
                (TokenGate::Softmax, [0.0; 4], 4, 0.01, [4, 3, 3, 4]),
            ] {
                let params = RouterTokenParams { in_features: 8, input_scale: 1.0, alpha: 1.0, max_depth, depth_bias };
                let kernel = RouterToken { gate, bias: true, ..RouterToken::new(4) };
                let case = Case {
                    what: profile,
                    kernel,
                    params,
                    active: &active,
                    num_rows: scales.len(),
                    x: &x,
                    weight: &weight,
                    bias: &bias,
                };
                assert_eq!(check(gpu, &case).depth, depths);
            }
        });
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let gpu = parity::gpu();
        let mut plan = PlanBuilder::new(gpu).expect("a small buffer fits");
        let tensor = parity::upload(gpu, &[0.0; 16]);
        let bindings = RouterTokenBindings {
            rows: &parity::row_set(gpu, &[]),
            x: &tensor,
            weight: &tensor,
            logits: &tensor,
            gates: &tensor,
            depth: &tensor,
            token_weight: &tensor,
            bias: None,
        };
        let mut message = |kernel: RouterToken, max_depth: u32| {
            let params = RouterTokenParams { in_features: 8, input_scale: 1.0, alpha: 1.0, max_depth, depth_bias: 0.0 };
            kernel.record(&mut plan, bindings, params).expect_err("must be refused").to_string()
        };
        assert!(message(RouterToken::new(257), 2).contains("recursions = 257 exceeds 256"));
        assert!(message(RouterToken::new(3), 2).contains("weight has [16]"));
        assert!(message(RouterToken { bias: true, ..RouterToken::new(2) }, 2).contains("bias has 0 elements"));
        assert!(message(RouterToken::new(2), 0).contains("max_depth has 0, expected 1 to 2"));
        assert!(message(RouterToken::new(2), 3).contains("max_depth has 3, expected 1 to 2"));
    }
}
