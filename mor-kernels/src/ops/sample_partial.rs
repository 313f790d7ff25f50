//! Finds the most likely token of every part of the vocabulary, and draws one from each.

use super::attention_decode::describe;
use super::sample_token::{MIN_TEMPERATURE, check_sizes};
use crate::caps::DeviceCaps;
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::RowSet;
use crate::shader::Definitions;
use crate::tensor::Tensor;

/// Workgroup memory of `shared/best`.
pub(super) const BEST_BYTES: u32 = 4 * 2 + 8;

/// What [`SampleToken`](super::SampleToken) needs to know of every part of the vocabulary, each found by a workgroup of its
/// own.
///
/// # Source
/// As [`SampleToken`](super::SampleToken).
#[derive(Clone, Copy, Debug)]
pub struct SamplePartial {
    /// Threads of a workgroup: divides [`SamplePartial::PART_SIZE`].
    pub workgroup_size: u32,
}

/// Sizes of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SamplePartialParams {
    /// Tokens, at most 2^18.
    pub vocab_size: u32,
    /// Elements between rows of the logits, `vocab_size` at least.
    pub logits_stride: u32,
    /// Words of a sequence's seen bits: `ceil(vocab_size / 32)`.
    pub seen_words: u32,
}

/// Tensors of a call, S sequences.
#[derive(Clone, Copy, Debug)]
pub struct SamplePartialBindings<'a> {
    /// The rows to sample, n of them.
    pub rows: &'a RowSet,
    /// `[n, logits_stride]` f32, in the order of the list.
    pub logits: &'a Tensor,
    /// `[S]` of [`GpuSampling`](super::GpuSampling).
    pub sampling: &'a Tensor,
    /// `[S, seen_words]` u32: a bit for every token of the sequence so far.
    pub seen: &'a Tensor,
    /// `[n, num_parts, 4]` u32, written: order key and token of the most likely token of the part and of the one drawn from
    /// it, (0, [`NONE`](crate::rows::NONE)) where there is none.
    pub partials: &'a Tensor,
}

impl SamplePartial {
    /// Tokens of a part: the same for every batch and device, for draws compare within parts first, and rounding is
    /// relative to the part.
    pub const PART_SIZE: u32 = 2048;

    /// The kernel in the workgroup size that suits the device: a software rasteriser pays for every thread at every barrier.
    pub fn new(caps: &DeviceCaps) -> Self {
        Self { workgroup_size: if caps.is_cpu { 32 } else { 256 } }
    }

    /// Parts of a vocabulary.
    pub fn num_parts(vocab_size: u32) -> u32 {
        vocab_size.div_ceil(Self::PART_SIZE)
    }

    /// Records the kernel over all rows of the list.
    ///
    /// # Errors
    /// As [`SampleToken::record`](super::SampleToken::record).
    pub fn record(
        &self,
        plan: &mut PlanBuilder<'_>,
        b: SamplePartialBindings<'_>,
        p: SamplePartialParams,
    ) -> Result<()> {
        check_sizes(Self::NAME, p.vocab_size, p.logits_stride, p.seen_words)?;
        let num_rows = b.logits.num_elems() / p.logits_stride as usize;
        Self::check_partials(Self::NAME, b.partials, num_rows, Self::num_parts(p.vocab_size))?;
        plan.dispatch(self, &b, &p, Grid::rows(b.rows, Self::num_parts(p.vocab_size), 1))
    }

    /// Refuses partials without room for `num_rows` rows; `kernel` is who asks.
    pub(super) fn check_partials(
        kernel: &'static str,
        partials: &Tensor,
        num_rows: usize,
        num_parts: u32,
    ) -> Result<()> {
        if partials.num_elems() >= 4 * num_parts as usize * num_rows {
            return Ok(());
        }
        let expected = format!("at least [{num_rows}, {num_parts}, 4] elements");
        Err(KernelError::Shape { kernel, what: "partials", found: describe(partials), expected })
    }
}

impl Kernel for SamplePartial {
    const NAME: &'static str = "sample_partial";
    type Params = SamplePartialParams;
    type Bindings<'a> = SamplePartialBindings<'a>;

    fn definitions(&self, caps: &DeviceCaps) -> Definitions {
        Definitions::new()
            .u32("WORKGROUP_SIZE", self.workgroup_size)
            .u32("PART_SIZE", Self::PART_SIZE)
            .f32("MIN_TEMPERATURE", MIN_TEMPERATURE)
            .flag("SUBGROUP", caps.lanes().uses_subgroups())
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        vec![
            Binding::read(1, &b.rows.active),
            Binding::read(2, b.logits),
            Binding::read(3, b.sampling),
            Binding::read(4, b.seen),
            Binding::write(5, b.partials),
        ]
    }

    fn workgroup_storage_bytes(&self, _: &DeviceCaps) -> u32 {
        BEST_BYTES
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::gpu::Gpu;
    use crate::ops::GpuSampling;
    use crate::oracle::sample_partial::{order_key, sample_partial};
    use crate::oracle::sample_token::scores;
    use crate::parity::{self, Output, Rng};
    use crate::rows::{ActiveRow, NONE};

    const PART_SIZE: usize = SamplePartial::PART_SIZE as usize;

    /// One sequence and the row that is sampled of it.
    #[derive(Clone, Debug)]
    struct Sampled {
        logits: Vec<f32>,
        sampling: GpuSampling,
        seen: Vec<u32>,
        position: u32,
    }

    /// `[n, P]` of what the kernel leaves.
    fn partials(gpu: &Gpu, kernel: SamplePartial, rows: &[Sampled]) -> Vec<[u32; 4]> {
        let vocab_size = rows.first().map_or(1, |row| row.logits.len());
        let (stride, seen_words) = (vocab_size + 3, vocab_size.div_ceil(32));
        // Sequences in the opposite order of rows, with one idle sequence at either end.
        let sequence = |i: usize| rows.len() - i;
        let mut logits = vec![f32::MAX; rows.len() * stride];
        let mut sampling = vec![GpuSampling::default(); rows.len() + 2];
        let mut seen = vec![0_u32; (rows.len() + 2) * seen_words];
        let mut active = Vec::new();
        for (i, row) in rows.iter().enumerate() {
            logits[i * stride..][..vocab_size].copy_from_slice(&row.logits);
            sampling[sequence(i)] = row.sampling;
            for token in &row.seen {
                seen[sequence(i) * seen_words + *token as usize / 32] |= 1 << (token % 32);
            }
            let (row, sequence, position) = (2 * i as u32, sequence(i) as u32, row.position);
            active.push(ActiveRow { row, sequence, position, ..ActiveRow::ABSENT });
        }
        let num_parts = SamplePartial::num_parts(vocab_size as u32);
        let out = Output::new(gpu, 4 * num_parts as usize * rows.len());
        let bindings = SamplePartialBindings {
            rows: &parity::row_set(gpu, &active),
            logits: &parity::upload(gpu, &logits),
            sampling: &parity::upload_u32(gpu, bytemuck::cast_slice(&sampling)),
            seen: &parity::upload_u32(gpu, &seen),
            partials: &out.tensor,
        };
        let (vocab_size, logits_stride, seen_words) = (vocab_size as u32, stride as u32, seen_words as u32);
        let params = SamplePartialParams { vocab_size, logits_stride, seen_words };
        // More workgroups than rows: the padding entries end them.
        let grid = Grid::Fixed([num_parts, rows.len() as u32 + 2, 1]);
        parity::run(gpu, |plan| plan.dispatch(&kernel, &bindings, &params, grid));
        out.read_u32(gpu).as_chunks().0.to_vec()
    }

    fn check(gpu: &Gpu, what: &str, rows: &[Sampled]) {
        let got = partials(gpu, SamplePartial::new(gpu.caps()), rows);
        let num_parts = got.len() / rows.len();
        for (i, row) in rows.iter().enumerate() {
            let want = sample_partial(&row.logits, &row.sampling, &row.seen, row.position, PART_SIZE);
            for (part, (got, want)) in got[i * num_parts..].iter().zip(&want).enumerate() {
                assert_eq!(got[..2], want[..2], "{what}: row {i}, part {part}, the most likely");
                if got[2..] == want[2..] {
                    continue;
                }
                // Another draw must be as good: the logarithm of a device is off by some units in the last place.
                let tokens = part * PART_SIZE..row.logits.len().min((part + 1) * PART_SIZE);
                let (token, wanted) = (got[3] as usize, want[3] as usize);
                assert!(tokens.contains(&token) && want[3] != NONE, "{what}: row {i}, part {part} drew {token}");
                let sampling = GpuSampling { min_p: 0.0, ..row.sampling };
                let all = scores(&row.logits, &sampling, &row.seen, row.position);
                assert!(
                    all[token] >= all[wanted] - 1e-4,
                    "{what}: row {i}, part {part} drew {token} ({}), the oracle {wanted} ({})",
                    all[token],
                    all[wanted]
                );
                assert!(row.seen.contains(&got[3]) || got[2] == order_key(row.logits[token]), "{what}: row {i}: key");
            }
        }
    }

    const VOCABS: [usize; 6] = [1, 33, PART_SIZE - 1, PART_SIZE, PART_SIZE + 1, 3 * PART_SIZE + 300];

    #[test]
    fn matches_oracle() {
        let greedy = GpuSampling::default();
        let plain = GpuSampling { temperature: 1.0, ..greedy };
        let cases = [
            greedy,
            plain,
            // By a power of two, which every device divides by exactly.
            GpuSampling { repetition_penalty: 2.0, ..greedy },
            GpuSampling { temperature: 0.8, repetition_penalty: 2.0, ..plain },
            GpuSampling { temperature: 1e-4, ..plain },
            GpuSampling { temperature: 1e4, min_p: 0.5, ..plain },
            GpuSampling { top_k: 3, ..plain },
            GpuSampling { top_k: u32::MAX, ..plain },
            GpuSampling { top_p: 0.9, ..plain },
        ];
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("sample_partial");
            assert!(partials(gpu, SamplePartial::new(gpu.caps()), &[]).is_empty());
            for vocab_size in VOCABS {
                let normals = rng.normals(vocab_size);
                let coarse: Vec<f32> = normals.iter().map(|logit| logit.round()).collect();
                let zeros: Vec<f32> = (0..vocab_size).map(|token| if token % 2 == 0 { -0.0 } else { 0.0 }).collect();
                let nan = vec![f32::NAN; vocab_size];
                let mut nan_but_last = nan.clone();
                nan_but_last[vocab_size - 1] = f32::MIN;
                let mut wild = normals.clone();
                for (token, logit) in wild.iter_mut().enumerate() {
                    match token % 5 {
                        0 => *logit = f32::NAN,
                        1 => *logit = f32::NEG_INFINITY,
                        2 => *logit *= 1e-39,
                        3 => *logit *= 1e30,
                        _ => {}
                    }
                }
                let mut rows = Vec::new();
                for (seed, sampling) in cases.iter().enumerate() {
                    for logits in [&normals, &coarse, &zeros, &nan, &nan_but_last, &wild] {
                        let seen = (0..vocab_size as u32).filter(|token| token % 3 == 0).collect();
                        let sampling = GpuSampling { seed_low: seed as u32, seed_high: 0x1234_5678, ..*sampling };
                        rows.push(Sampled { logits: logits.clone(), sampling, seen, position: 3 + seed as u32 });
                    }
                }
                check(gpu, &format!("{profile} V={vocab_size}"), &rows);
            }
        });
    }

    #[test]
    fn any_workgroup_finds_the_same() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("sample_partial workgroups");
            let logits = rng.normals(2 * PART_SIZE + 17);
            let sampling = GpuSampling { temperature: 0.9, ..GpuSampling::default() };
            let rows: Vec<_> = (0..16)
                .map(|seed| Sampled {
                    logits: logits.clone(),
                    sampling: GpuSampling { seed_low: seed, ..sampling },
                    seen: Vec::new(),
                    position: 0,
                })
                .collect();
            let want = partials(gpu, SamplePartial::new(gpu.caps()), &rows);
            for workgroup_size in [32, 64, 128, 256] {
                assert_eq!(partials(gpu, SamplePartial { workgroup_size }, &rows), want, "{profile} {workgroup_size}");
            }
        });
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let gpu = parity::gpu();
        let mut plan = PlanBuilder::new(gpu).expect("a small buffer fits");
        let vocab_size = 5 * SamplePartial::PART_SIZE;
        let (t, logits) = (parity::upload(gpu, &[0.0; 16]), parity::upload(gpu, &vec![0.0; 2 * vocab_size as usize]));
        let rows = parity::row_set(gpu, &[]);
        let b = SamplePartialBindings { rows: &rows, logits: &logits, sampling: &t, seen: &t, partials: &t };
        let mut message = |vocab_size, logits_stride, seen_words| {
            let p = SamplePartialParams { vocab_size, logits_stride, seen_words };
            SamplePartial::new(gpu.caps()).record(&mut plan, b, p).expect_err("must be refused").to_string()
        };
        assert!(message((1 << 18) + 1, 1 << 19, 1 << 14).contains("vocab_size = 262145 exceeds 262144"));
        assert!(message(33, 32, 2).contains("logits_stride has 32"));
        let expected = "partials has F32 [16], expected at least [2, 5, 4] elements";
        assert!(message(vocab_size, vocab_size, vocab_size / 32).contains(expected));
    }
}
