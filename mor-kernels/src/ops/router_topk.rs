//! Selects, per sequence, the k alive rows with the largest gates.

use crate::caps::DeviceCaps;
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::shader::Definitions;
use crate::tensor::Tensor;

/// Workgroup memory of `shared/radix_select.wgsl`, bytes.
pub(super) const RADIX_SELECT_BYTES: u32 = 2 * 4 * 256 + 8 * 16 + 16;

/// `decision[r] = 1` for the k rows of a sequence with `depth[r] == recursion` and the largest gates, ties to the
/// lower row; `-1` for its other rows.
///
/// Looks at whole sequences, so it reproduces training and full-sequence evaluation; generation decides by threshold.
///
/// # Source
/// Bae et al. 2025, arXiv 2507.10524: expert-choice routing.
#[derive(Clone, Copy, Debug)]
pub struct RouterTopk {
    /// Threads of a workgroup: 16 to 256.
    pub workgroup_size: u32,
}

/// Constants of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct RouterTopkParams {
    /// Rows whose depth is this are alive: they were selected at every recursion before.
    pub recursion: u32,
}

/// The rows of one sequence and how many of them to select.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct TopkSequence {
    /// First row.
    pub first_row: u32,
    /// Number of rows, at most 2^24.
    pub num_rows: u32,
    /// Rows to select; all alive rows if they are fewer.
    pub k: u32,
    /// Unused; keeps the size at 16 bytes.
    pub reserved: u32,
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct RouterTopkBindings<'a> {
    /// `[B, 4]` u32: [`TopkSequence`]s whose rows do not overlap.
    pub sequences: &'a Tensor,
    /// `[T]` f32.
    pub gates: &'a Tensor,
    /// `[T]` u32.
    pub depth: &'a Tensor,
    /// `[T]` f32, written at the rows of the sequences.
    pub decision: &'a Tensor,
}

impl Default for RouterTopk {
    fn default() -> Self {
        Self { workgroup_size: 256 }
    }
}

impl RouterTopk {
    /// Records the kernel over all sequences.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if `sequences` is not `[B, 4]`; else as [`PlanBuilder::dispatch`].
    pub fn record(&self, plan: &mut PlanBuilder<'_>, b: RouterTopkBindings<'_>, p: RouterTopkParams) -> Result<()> {
        let &[num_sequences, 4] = b.sequences.shape() else {
            return Err(KernelError::Shape {
                kernel: Self::NAME,
                what: "sequences",
                found: format!("{:?}", b.sequences.shape()),
                expected: "[number of sequences, 4]".to_owned(),
            });
        };
        plan.dispatch(self, &b, &p, Grid::Fixed([1, num_sequences as u32, 1]))
    }
}

impl Kernel for RouterTopk {
    const NAME: &'static str = "router_topk";
    type Params = RouterTopkParams;
    type Bindings<'a> = RouterTopkBindings<'a>;

    fn definitions(&self, _: &DeviceCaps) -> Definitions {
        Definitions::new().u32("WORKGROUP_SIZE", self.workgroup_size)
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        vec![
            Binding::read(1, b.sequences),
            Binding::read(2, b.gates),
            Binding::read(3, b.depth),
            Binding::write(4, b.decision),
        ]
    }

    fn workgroup_storage_bytes(&self, _: &DeviceCaps) -> u32 {
        RADIX_SELECT_BYTES
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::gpu::Gpu;
    use crate::oracle::router_topk::router_topk;
    use crate::parity::{self, Output, Rng};
    use crate::tensor::DType;

    fn check(gpu: &Gpu, what: &str, sequences: &[TopkSequence], gates: &[f32], depth: &[u32], recursion: u32) {
        let decision = Output::new(gpu, gates.len());
        let mut want = decision.read_u32(gpu);
        for (row, selected) in router_topk(sequences, gates, depth, recursion) {
            want[row] = (if selected { 1.0_f32 } else { -1.0 }).to_bits();
        }
        let bindings = RouterTopkBindings {
            sequences: &Tensor::from_slice(gpu, "sequences", DType::U32, &[sequences.len(), 4], sequences)
                .expect("a small buffer fits"),
            gates: &parity::upload(gpu, gates),
            depth: &parity::upload_u32(gpu, depth),
            decision: &decision.tensor,
        };
        parity::run(gpu, |plan| RouterTopk::default().record(plan, bindings, RouterTopkParams { recursion }));
        assert_eq!(decision.read_u32(gpu), want, "{what}");
    }

    /// Sequences of `lengths` with gaps between them, and the number of rows in all.
    fn sequences(lengths: &[usize], k: impl Fn(usize) -> usize) -> (Vec<TopkSequence>, usize) {
        let mut first_row = 1;
        let mut sequences = Vec::new();
        for &num_rows in lengths {
            let k = k(num_rows) as u32;
            sequences.push(TopkSequence { first_row, num_rows: num_rows as u32, k, reserved: 0 });
            first_row += num_rows as u32 + 2;
        }
        (sequences, first_row as usize)
    }

    #[test]
    fn matches_oracle() {
        let lengths = [0, 1, 7, 33, 255, 256, 257, 1000, 4096];
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("router_topk");
            for (what, k) in [
                ("none", (|_| 0) as fn(usize) -> usize),
                ("one", |_| 1),
                ("a third", |n| (n / 3).max(1)),
                ("all", |n| n),
                ("more than all", |n| n + 5),
            ] {
                let (sequences, num_rows) = sequences(&lengths, k);
                let normals = rng.normals(num_rows);
                // Few distinct values: the border is a tie, as with one token repeated.
                let coarse: Vec<f32> = normals.iter().map(|gate| (2.0 * gate).round() / 2.0).collect();
                let equal = vec![0.25; num_rows];
                let depth: Vec<u32> = (0..num_rows).map(|_| rng.below(3) as u32).collect();
                for (name, gates) in [("normal", &normals), ("coarse", &coarse), ("equal", &equal)] {
                    check(gpu, &format!("{profile} {what} {name}"), &sequences, gates, &depth, 1);
                }
                check(gpu, &format!("{profile} {what} at first"), &sequences, &coarse, &vec![0; num_rows], 0);
            }
        });
    }

    #[test]
    fn orders_special_values() {
        parity::on_every_profile(|gpu, profile| {
            let specials =
                [f32::NAN, f32::NEG_INFINITY, -1e30, -0.0, 0.0, 1e-40, -1e-40, 1.0, f32::INFINITY, f32::MAX, -f32::NAN];
            let gates: Vec<f32> = specials.iter().chain(&specials).copied().collect();
            let depth = vec![0; gates.len()];
            for k in 0..=gates.len() {
                let sequence = TopkSequence { num_rows: gates.len() as u32, k: k as u32, ..TopkSequence::default() };
                check(gpu, &format!("{profile} k={k}"), &[sequence], &gates, &depth, 0);
            }
        });
    }

    #[test]
    fn refuses_unshaped_sequences() {
        let gpu = parity::gpu();
        let mut plan = PlanBuilder::new(gpu).expect("a small buffer fits");
        let tensor = parity::upload(gpu, &[0.0; 4]);
        let b = RouterTopkBindings { sequences: &tensor, gates: &tensor, depth: &tensor, decision: &tensor };
        let error = RouterTopk::default().record(&mut plan, b, RouterTopkParams { recursion: 0 });
        assert!(error.expect_err("must be refused").to_string().contains("sequences has [4]"));
    }
}
