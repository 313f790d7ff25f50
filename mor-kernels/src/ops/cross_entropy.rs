//! Negative log-likelihood of a label under each active row's logits.

use crate::caps::DeviceCaps;
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::RowSet;
use crate::shader::Definitions;
use crate::tensor::Tensor;

/// `nll[r] = logsumexp(logits[i, 0..V]) - logits[i, labels[r]]` for the active rows `r`, the i-th of which has
/// the logits `i`. Rows without a label get 0.
///
/// # Source
/// Milakov and Gimelshein 2018, arXiv 1805.02867 (the online normaliser).
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy {
    /// Threads of a workgroup: a power of two.
    pub workgroup_size: u32,
}

/// Sizes of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct CrossEntropyParams {
    /// Logits of a row that count, at least 1.
    pub vocab_size: u32,
    /// Elements from one row of logits to the next.
    pub logits_stride: u32,
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropyBindings<'a> {
    /// The rows that have logits, n of them.
    pub rows: &'a RowSet,
    /// `[n, logits_stride]` f32, compact.
    pub logits: &'a Tensor,
    /// `[T]` u32; [`NONE`](crate::rows::NONE) where a row has no label.
    pub labels: &'a Tensor,
    /// `[T]` f32, written at the active rows.
    pub nll: &'a Tensor,
}

impl Default for CrossEntropy {
    fn default() -> Self {
        Self { workgroup_size: 256 }
    }
}

impl CrossEntropy {
    /// Records the kernel over all active rows.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if there is no vocabulary or its logits do not fit their stride; else as
    /// [`PlanBuilder::dispatch`].
    pub fn record(&self, plan: &mut PlanBuilder<'_>, b: CrossEntropyBindings<'_>, p: CrossEntropyParams) -> Result<()> {
        check(p)?;
        plan.dispatch(self, &b, &p, Grid::rows(b.rows, 1, 1))
    }
}

fn check(p: CrossEntropyParams) -> Result<()> {
    if (1..=p.logits_stride).contains(&p.vocab_size) {
        return Ok(());
    }
    Err(KernelError::Shape {
        kernel: CrossEntropy::NAME,
        what: "vocab_size",
        found: p.vocab_size.to_string(),
        expected: format!("1 to {} (logits_stride)", p.logits_stride),
    })
}

impl Kernel for CrossEntropy {
    const NAME: &'static str = "cross_entropy";
    type Params = CrossEntropyParams;
    type Bindings<'a> = CrossEntropyBindings<'a>;

    fn definitions(&self, _: &DeviceCaps) -> Definitions {
        Definitions::new().u32("WORKGROUP_SIZE", self.workgroup_size)
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        vec![
            Binding::read(1, &b.rows.active),
            Binding::read(2, b.logits),
            Binding::read(3, b.labels),
            Binding::write(4, b.nll),
        ]
    }

    fn workgroup_storage_bytes(&self, _: &DeviceCaps) -> u32 {
        8 * self.workgroup_size
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::Gpu;
    use crate::oracle::cross_entropy::cross_entropy;
    use crate::parity::{self, Output, Rng, Tolerance};
    use crate::rows::{ActiveRow, NONE};

    fn run(gpu: &Gpu, active: &[ActiveRow], logits: &[f32], labels: &[u32], params: CrossEntropyParams, nll: &Output) {
        let bindings = CrossEntropyBindings {
            rows: &parity::row_set(gpu, active),
            logits: &parity::upload(gpu, logits),
            labels: &parity::upload_u32(gpu, labels),
            nll: &nll.tensor,
        };
        let grid = Grid::Fixed([1, active.len() as u32, 1]);
        parity::run(gpu, |plan| {
            check(params)?;
            plan.dispatch(&CrossEntropy::default(), &bindings, &params, grid)
        });
    }

    #[test]
    fn matches_oracle() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("cross_entropy");
            for vocab_size in [1, 7, 33, 255, 256, 257, 4096] {
                for num_active in [0, 1, 7, 33] {
                    let (num_rows, stride) = (num_active + 3, vocab_size + 5);
                    let active = parity::some_rows(&mut rng, num_rows, num_active);
                    let mut logits: Vec<f32> = (0..num_active * stride).map(|_| 4.0 * rng.normal()).collect();
                    for row in logits.chunks_mut(stride) {
                        // What lies past the vocabulary must not count.
                        row[vocab_size..].fill(1e30);
                    }
                    let mut labels: Vec<u32> = (0..num_rows).map(|_| rng.below(vocab_size) as u32).collect();
                    for (entry, label) in active.iter().zip([0, vocab_size as u32 - 1, NONE, vocab_size as u32]) {
                        labels[entry.row as usize] = label;
                    }
                    let nll = Output::new(gpu, num_rows);
                    let mut want = nll.read(gpu);
                    cross_entropy(&active, &logits, stride, vocab_size, &labels, &mut want);
                    let params = CrossEntropyParams { vocab_size: vocab_size as u32, logits_stride: stride as u32 };
                    run(gpu, &active, &logits, &labels, params, &nll);
                    let what = format!("cross_entropy {profile} V={vocab_size} n={num_active}");
                    parity::assert_close(&what, &nll.read(gpu), &want, Tolerance::F32);
                }
            }
        });
    }

    #[test]
    fn survives_extreme_logits() {
        const VOCAB_SIZE: usize = 300;
        let mut rng = Rng::new("cross_entropy extremes");
        let mut rows: Vec<(Vec<f32>, u32)> = Vec::new();
        // Ties everywhere: the loss is log V, whatever the level.
        for level in [0.0, 3e38, -3e38, f32::MAX, f32::MIN, 1e4] {
            rows.push((vec![level; VOCAB_SIZE], 5));
        }
        // One logit over all others, as the label and not.
        let mut peak = vec![-3e38; VOCAB_SIZE];
        peak[299] = 1e38;
        rows.push((peak.clone(), 299));
        rows.push((peak, 0));
        // Ascending logits move the maximum at every step.
        let ascending: Vec<f32> = (0..VOCAB_SIZE).map(|v| 100.0 * v as f32).collect();
        rows.push((ascending.clone(), 298));
        rows.push((ascending.into_iter().rev().collect(), 0));
        // Tokens ruled out by an infinitely low logit.
        let mut masked = rng.normals(VOCAB_SIZE);
        masked[..256].fill(f32::NEG_INFINITY);
        rows.push((masked, 256));

        let active: Vec<ActiveRow> = (0..rows.len() as u32).map(|row| ActiveRow { row, ..ActiveRow::ABSENT }).collect();
        let logits: Vec<f32> = rows.iter().flat_map(|(logits, _)| logits.iter().copied()).collect();
        let labels: Vec<u32> = rows.iter().map(|(_, label)| *label).collect();
        let mut want = vec![0.0; rows.len()];
        cross_entropy(&active, &logits, VOCAB_SIZE, VOCAB_SIZE, &labels, &mut want);
        parity::on_every_profile(|gpu, profile| {
            let nll = Output::new(gpu, rows.len());
            let params = CrossEntropyParams { vocab_size: VOCAB_SIZE as u32, logits_stride: VOCAB_SIZE as u32 };
            run(gpu, &active, &logits, &labels, params, &nll);
            let what = format!("cross_entropy {profile} extremes");
            parity::assert_close(&what, &nll.read(gpu), &want, Tolerance::F32);
        });
    }

    #[test]
    fn refuses_a_stride_below_the_vocabulary() {
        let error = check(CrossEntropyParams { vocab_size: 9, logits_stride: 8 }).expect_err("9 logits in 8 places");
        assert_eq!(error.to_string(), "cross_entropy: vocab_size has 9, expected 1 to 8 (logits_stride)");
        assert!(check(CrossEntropyParams { vocab_size: 0, logits_stride: 8 }).is_err());
    }
}
