//! Writes the embedding of every active row's token into a stream.

use crate::caps::DeviceCaps;
use crate::epilogue::define_weight;
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::RowSet;
use crate::shader::Definitions;
use crate::tensor::{DType, Tensor};

/// `x[r] = f32(weight[token[r] - first_token])` for the active rows `r` whose token lies in the range of
/// this shard; other rows are left alone.
#[derive(Clone, Copy, Debug)]
pub struct EmbedTokens {
    /// Element type of the embedding: f32, f16, bf16 or quantised.
    pub weight: DType,
    /// Threads of a workgroup.
    pub workgroup_size: u32,
}

/// Sizes of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct EmbedTokensParams {
    /// Elements of a row, a multiple of 8.
    pub hidden_size: u32,
    /// Token of the shard's first row.
    pub first_token: u32,
    /// Rows of the shard.
    pub num_tokens: u32,
}

/// Tensors of a call.
#[derive(Clone, Copy, Debug)]
pub struct EmbedTokensBindings<'a> {
    /// The rows to embed, n of them.
    pub rows: &'a RowSet,
    /// `[T]` of [`Row`](crate::rows::Row): where the tokens stand.
    pub tokens: &'a Tensor,
    /// `[num_tokens, C]`, a shard of the embedding.
    pub weight: &'a Tensor,
    /// `[T, C]` f32, written at the active rows.
    pub x: &'a Tensor,
}

impl EmbedTokens {
    /// The kernel for embeddings of type `weight`.
    pub fn new(weight: DType) -> Self {
        Self { weight, workgroup_size: 64 }
    }

    /// Records the kernel over all active rows, for one shard of the embedding.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the hidden size is no multiple of 8 or the shard is too small or of another type;
    /// else as [`PlanBuilder::dispatch`].
    pub fn record(&self, plan: &mut PlanBuilder<'_>, b: EmbedTokensBindings<'_>, p: EmbedTokensParams) -> Result<()> {
        self.check(b, p)?;
        plan.dispatch(self, &b, &p, Grid::rows(b.rows, 1, 1))
    }

    fn check(&self, b: EmbedTokensBindings<'_>, p: EmbedTokensParams) -> Result<()> {
        let shape =
            |what, found, expected| Err(KernelError::Shape { kernel: <Self as Kernel>::NAME, what, found, expected });
        if !p.hidden_size.is_multiple_of(8) {
            return shape("hidden_size", p.hidden_size.to_string(), "a multiple of 8".to_owned());
        }
        let (found, expected) = (b.weight.num_elems(), p.num_tokens as usize * p.hidden_size as usize);
        if found < expected || b.weight.dtype() != self.weight {
            let found = format!("{found} elements of {:?}", b.weight.dtype());
            return shape("weight", found, format!("at least {expected} of {:?}", self.weight));
        }
        Ok(())
    }
}

impl Kernel for EmbedTokens {
    const NAME: &'static str = "embed_tokens";
    type Params = EmbedTokensParams;
    type Bindings<'a> = EmbedTokensBindings<'a>;

    fn definitions(&self, _: &DeviceCaps) -> Definitions {
        define_weight(Definitions::new().u32("WORKGROUP_SIZE", self.workgroup_size), self.weight)
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        vec![
            Binding::read(1, b.tokens),
            Binding::read(2, &b.rows.active),
            Binding::read(3, b.weight),
            Binding::write(4, b.x),
        ]
    }

    fn workgroup_storage_bytes(&self, _: &DeviceCaps) -> u32 {
        0
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::Gpu;
    use crate::oracle::embed_tokens::embed_tokens;
    use crate::parity::{self, Output, Rng, Tolerance};
    use crate::quantize;
    use crate::rows::{ActiveRow, Row};

    /// A tensor of `values` in `dtype` and what they are after rounding to it.
    fn embedding(gpu: &Gpu, dtype: DType, shape: [usize; 2], values: &[f32]) -> (Tensor, Vec<f32>) {
        let halves = |bits: Vec<u16>| Tensor::from_slice(gpu, "weight", dtype, &shape, &bits).expect("it fits");
        match dtype {
            DType::F16 => (
                halves(values.iter().map(|v| f16::from_f32(*v).to_bits()).collect()),
                values.iter().map(|v| f16::from_f32(*v).to_f32()).collect(),
            ),
            DType::BF16 => (
                halves(values.iter().map(|v| bf16::from_f32(*v).to_bits()).collect()),
                values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect(),
            ),
            DType::Q8 | DType::Q4 => {
                let row_bytes = dtype.row_bytes(shape[1]);
                let (mut rows, mut seen) = (vec![0; shape[0] * row_bytes], vec![0.0; values.len()]);
                let packed = rows.chunks_mut(row_bytes).zip(seen.chunks_mut(shape[1]));
                for (values, (row, seen)) in values.chunks(shape[1]).zip(packed) {
                    quantize::quantize_row(dtype, values, row).expect("a test's values are small");
                    quantize::dequantize_row(dtype, row, seen);
                }
                (Tensor::from_slice(gpu, "weight", dtype, &shape, &rows).expect("it fits"), seen)
            }
            _ => (Tensor::from_slice(gpu, "weight", dtype, &shape, values).expect("it fits"), values.to_vec()),
        }
    }

    #[test]
    fn matches_oracle_over_shards() {
        const VOCAB_SIZE: usize = 50;
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("embed_tokens");
            for dtype in [DType::F32, DType::F16, DType::BF16, DType::Q8, DType::Q4] {
                for hidden_size in [8, 56, 512, 520, 4096] {
                    for num_active in [0, 1, 7, 33] {
                        let num_rows = num_active + 3;
                        let active = parity::some_rows(&mut rng, num_rows, num_active);
                        let mut rows: Vec<Row> = (0..num_rows)
                            .map(|_| Row { token: rng.below(VOCAB_SIZE) as u32, ..Row::default() })
                            .collect();
                        // The ends of the shards, and tokens that no shard has.
                        for (entry, token) in active.iter().zip([49, 0, 16, 17, 18, 50, u32::MAX]) {
                            rows[entry.row as usize].token = token;
                        }
                        let tokens =
                            Tensor::from_slice(gpu, "rows", DType::U32, &[num_rows, 4], &rows).expect("it fits");
                        let values = rng.normals(VOCAB_SIZE * hidden_size);
                        let x = Output::new(gpu, num_rows * hidden_size);
                        let mut want = x.read(gpu);

                        let set = parity::row_set(gpu, &active);
                        let kernel = EmbedTokens::new(dtype);
                        for shard in [0..17, 17..18, 18..VOCAB_SIZE] {
                            let part = &values[shard.start * hidden_size..shard.end * hidden_size];
                            let (weight, rounded) = embedding(gpu, dtype, [shard.len(), hidden_size], part);
                            embed_tokens(&rows, &active, &rounded, hidden_size, shard.start, &mut want);
                            let bindings =
                                EmbedTokensBindings { rows: &set, tokens: &tokens, weight: &weight, x: &x.tensor };
                            let params = EmbedTokensParams {
                                hidden_size: hidden_size as u32,
                                first_token: shard.start as u32,
                                num_tokens: shard.len() as u32,
                            };
                            let grid = Grid::Fixed([1, num_active as u32, 1]);
                            parity::run(gpu, |plan| {
                                kernel.check(bindings, params)?;
                                plan.dispatch(&kernel, &bindings, &params, grid)
                            });
                        }
                        let what = format!("embed_tokens {profile} {dtype:?} C={hidden_size} n={num_active}");
                        parity::assert_close(&what, &x.read(gpu), &want, Tolerance::EXACT);
                    }
                }
            }
        });
    }

    #[test]
    fn keeps_subnormal_and_extreme_halves() {
        let values = [6e-8_f32, -6.1e-5, 65504.0, -65504.0, 0.0, -0.0, 1.0, f32::INFINITY];
        parity::on_every_profile(|gpu, profile| {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let (weight, want) = embedding(gpu, dtype, [1, 8], &values);
                let x = Output::new(gpu, 8);
                let bindings = EmbedTokensBindings {
                    rows: &parity::row_set(gpu, &[ActiveRow { row: 0, ..ActiveRow::ABSENT }]),
                    tokens: &Tensor::from_slice(gpu, "rows", DType::U32, &[1, 4], &[Row::default()]).expect("it fits"),
                    weight: &weight,
                    x: &x.tensor,
                };
                let params = EmbedTokensParams { hidden_size: 8, first_token: 0, num_tokens: 1 };
                let kernel = EmbedTokens::new(dtype);
                parity::run(gpu, |plan| plan.dispatch(&kernel, &bindings, &params, Grid::Fixed([1, 1, 1])));
                let what = format!("embed_tokens {profile} {dtype:?} extremes");
                parity::assert_close(&what, &x.read(gpu), &want, Tolerance::EXACT);
            }
        });
    }

    #[test]
    fn refuses_wrong_shapes() {
        let gpu = parity::gpu();
        let weight = Tensor::zeros(gpu, "weight", DType::F16, &[5, 16]).expect("it fits");
        let set = parity::row_set(gpu, &[]);
        let bindings = EmbedTokensBindings { rows: &set, tokens: &weight, weight: &weight, x: &weight };
        let message = |dtype, hidden_size, num_tokens| {
            let params = EmbedTokensParams { hidden_size, first_token: 0, num_tokens };
            EmbedTokens::new(dtype).check(bindings, params).map_err(|error| error.to_string())
        };
        assert_eq!(message(DType::F16, 16, 5), Ok(()));
        assert_eq!(
            message(DType::F16, 12, 5),
            Err("embed_tokens: hidden_size has 12, expected a multiple of 8".to_owned())
        );
        assert_eq!(
            message(DType::BF16, 16, 4),
            Err("embed_tokens: weight has 80 elements of F16, expected at least 64 of BF16".to_owned())
        );
    }
}
