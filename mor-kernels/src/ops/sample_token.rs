//! Draws the next token of every sampled row from its logits.

use super::router_topk::RADIX_SELECT_BYTES;
use super::sample_partial::{BEST_BYTES, SamplePartial};
use crate::caps::DeviceCaps;
use crate::error::{KernelError, Result};
use crate::kernel::{Binding, Kernel};
use crate::plan::{Grid, PlanBuilder};
use crate::rows::{NONE, RowSet};
use crate::shader::Definitions;
use crate::tensor::Tensor;

/// Temperatures below this are greedy: dividing by them would overflow.
pub const MIN_TEMPERATURE: f32 = 1e-5;
/// Largest vocabulary: the exact sums of a selection hold this many terms.
const MAX_VOCAB_SIZE: u32 = 1 << 18;
/// Tokens that a selection may keep in workgroup memory; more are read from the logits again.
const MAX_LISTED: u32 = 3072;

/// Draws a token for every sampled row, marks it as seen and writes the sequence's next row.
///
/// Equal seeds give equal tokens on one device, whatever else is in the batch.
///
/// # Source
/// Penalty: Keskar et al. 2019, arXiv 1909.05858. Top-p: Holtzman et al. 2020, arXiv 1904.09751. Min-p: Nguyen et
/// al. 2024, arXiv 2407.01082. Hash: Jarzynski and Olano 2020, JCGT 9.3 (pcg4d).
#[derive(Clone, Copy, Debug)]
pub struct SampleToken {
    /// Threads of a workgroup: 16 to 1024.
    pub workgroup_size: u32,
}

/// How tokens of one sequence are drawn. Mirrors `struct Sampling` of the shader.
///
/// The order is: repetition penalty, temperature, top-k, top-p, min-p, draw.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct GpuSampling {
    /// Divides the logits; below [`MIN_TEMPERATURE`], the most likely token is taken.
    pub temperature: f32,
    /// Keeps the most likely tokens, this many and ties with the last; 0 is off.
    pub top_k: u32,
    /// Keeps the fewest tokens with this much probability, and ties with the last; 1 is off.
    pub top_p: f32,
    /// Keeps tokens with this part of the largest probability; 0 is off.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occurred; positive, 1 is off.
    pub repetition_penalty: f32,
    /// Low half of the seed.
    pub seed_low: u32,
    /// High half of the seed.
    pub seed_high: u32,
    /// Tokens at which the sequence ends, those of the prompt counted.
    pub limit: u32,
    /// End-of-text tokens that end the sequence; [`NONE`] where unused.
    pub eos: [u32; 4],
}

impl GpuSampling {
    /// Whether the most likely token is drawn, or one of all tokens, whichever they are and whatever came before.
    pub fn is_plain(&self) -> bool {
        let keeps_all = self.top_k == 0 && self.top_p >= 1.0 && self.min_p <= 0.0;
        self.repetition_penalty == 1.0 && (self.temperature < MIN_TEMPERATURE || keeps_all)
    }
}

impl Default for GpuSampling {
    /// Greedy, without penalty or end.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed_low: 0,
            seed_high: 0,
            limit: u32::MAX,
            eos: [NONE; 4],
        }
    }
}

/// Sizes of a call. Mirrors `struct Params` of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SampleTokenParams {
    /// Tokens, at most 2^18.
    pub vocab_size: u32,
    /// Elements between rows of the logits, `vocab_size` at least.
    pub logits_stride: u32,
    /// Words of a sequence's seen bits: `ceil(vocab_size / 32)`.
    pub seen_words: u32,
    /// Parts of the vocabulary: [`SamplePartial::num_parts`], or the workgroups of [`DecodeLayers`](super::DecodeLayers).
    pub num_parts: u32,
}

/// Tensors of a call, S sequences.
#[derive(Clone, Copy, Debug)]
pub struct SampleTokenBindings<'a> {
    /// The rows to sample, n of them, at most one of a sequence; the entry's recursion is its depth.
    pub rows: &'a RowSet,
    /// `[n, logits_stride]` f32, in the order of the list.
    pub logits: &'a Tensor,
    /// `[S]` of [`GpuSampling`].
    pub sampling: &'a Tensor,
    /// `[n, num_parts, 4]` u32: what [`SamplePartial`] or [`DecodeLayers`](super::DecodeLayers) left of the same
    /// logits.
    pub partials: &'a Tensor,
    /// `[S, seen_words]` u32: a bit for every token of the sequence so far, updated.
    pub seen: &'a Tensor,
    /// `[S]` of [`Row`](crate::rows::Row), written: the token at its position, with flags 0 if the sequence ends.
    pub next_rows: &'a Tensor,
    /// `[S, RESULTS, 2]` u32, see [`SampleToken::RESULTS`]: at `position % RESULTS`, the token drawn after `position` and
    /// the depth of the token there.
    pub results: &'a Tensor,
}

impl SampleToken {
    /// Draws of a sequence that stay readable: a ring by position.
    pub const RESULTS: u32 = 16;

    /// The kernel in the workgroup size that suits the device: where tokens are cut off, one workgroup reads a whole
    /// vocabulary, so on a GPU it is as large as it may be; a software rasteriser pays for every thread at every barrier.
    pub fn new(caps: &DeviceCaps) -> Self {
        Self { workgroup_size: if caps.is_cpu { 32 } else { caps.max_workgroup_size.min(1024) } }
    }

    /// Records the kernel over all rows of the list.
    ///
    /// # Errors
    /// [`KernelError::Limit`] for more than 2^18 tokens; [`KernelError::Shape`] if `logits_stride`, `seen_words` or
    /// `partials` do not fit the vocabulary; else as [`PlanBuilder::dispatch`].
    pub fn record(&self, plan: &mut PlanBuilder<'_>, b: SampleTokenBindings<'_>, p: SampleTokenParams) -> Result<()> {
        check_sizes(Self::NAME, p.vocab_size, p.logits_stride, p.seen_words)?;
        let num_rows = b.logits.num_elems() / p.logits_stride as usize;
        SamplePartial::check_partials(Self::NAME, b.partials, num_rows, p.num_parts)?;
        plan.dispatch(self, &b, &p, Grid::rows(b.rows, 1, 1))
    }
}

/// Refuses sizes of a call that do not fit each other; `kernel` is who asks.
pub(super) fn check_sizes(kernel: &'static str, vocab_size: u32, logits_stride: u32, seen_words: u32) -> Result<()> {
    if vocab_size > MAX_VOCAB_SIZE {
        return Err(KernelError::Limit {
            kernel,
            what: "vocab_size",
            found: u64::from(vocab_size),
            limit: u64::from(MAX_VOCAB_SIZE),
            why: "exact sums can hold".to_owned(),
            advice: "this vocabulary is not supported",
        });
    }
    let refuse =
        |what, found: u32, expected| Err(KernelError::Shape { kernel, what, found: found.to_string(), expected });
    if vocab_size == 0 {
        return refuse("vocab_size", vocab_size, "one token at least".to_owned());
    }
    if logits_stride < vocab_size {
        return refuse("logits_stride", logits_stride, format!("{vocab_size} at least"));
    }
    if seen_words != vocab_size.div_ceil(32) {
        return refuse("seen_words", seen_words, format!("{}", vocab_size.div_ceil(32)));
    }
    Ok(())
}

impl Kernel for SampleToken {
    const NAME: &'static str = "sample_token";
    type Params = SampleTokenParams;
    type Bindings<'a> = SampleTokenBindings<'a>;

    fn definitions(&self, caps: &DeviceCaps) -> Definitions {
        Definitions::new()
            .u32("WORKGROUP_SIZE", self.workgroup_size)
            .u32("MAX_LISTED", MAX_LISTED)
            .u32("RESULTS", Self::RESULTS)
            .f32("MIN_TEMPERATURE", MIN_TEMPERATURE)
            .flag("SUBGROUP", caps.lanes().uses_subgroups())
    }

    fn bindings<'a>(&self, b: &Self::Bindings<'a>) -> Vec<Binding<'a>> {
        vec![
            Binding::read(1, &b.rows.active),
            Binding::read(2, b.logits),
            Binding::read(3, b.sampling),
            Binding::read(4, b.partials),
            Binding::write(5, b.seen),
            Binding::write(6, b.next_rows),
            Binding::write(7, b.results),
        ]
    }

    fn workgroup_storage_bytes(&self, _: &DeviceCaps) -> u32 {
        RADIX_SELECT_BYTES + BEST_BYTES + 4 * MAX_LISTED + 4 * 2
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::gpu::Gpu;
    use crate::ops::{SamplePartialBindings, SamplePartialParams};
    use crate::oracle::sample_token::{is_kept, sample_token, scores};
    use crate::parity::{self, Output, Rng};
    use crate::rows::{ActiveRow, ROW_ACTIVE, ROW_SAMPLE, Row};

    /// One sequence and the row that is sampled of it.
    #[derive(Clone, Debug)]
    struct Sampled {
        logits: Vec<f32>,
        sampling: GpuSampling,
        seen: Vec<u32>,
        position: u32,
    }

    impl Sampled {
        fn new(logits: &[f32], sampling: GpuSampling) -> Self {
            Self { logits: logits.to_vec(), sampling, seen: Vec::new(), position: 3 }
        }
    }

    const RESULTS: usize = SampleToken::RESULTS as usize;

    /// Draws one token for every row in one dispatch, after checking everything else the kernel writes.
    fn draw(gpu: &Gpu, rows: &[Sampled]) -> Vec<u32> {
        let vocab_size = rows.first().map_or(1, |row| row.logits.len());
        let seen_words = vocab_size.div_ceil(32);
        let stride = vocab_size + 3;
        // Sequences in the opposite order of rows, with one idle sequence at either end.
        let num_sequences = rows.len() + 2;
        let sequence = |i: usize| rows.len() - i;
        let mut logits = vec![f32::MAX; rows.len() * stride];
        let mut sampling = vec![GpuSampling::default(); num_sequences];
        let mut seen = vec![0_u32; num_sequences * seen_words];
        let mut active = Vec::new();
        for (i, row) in rows.iter().enumerate() {
            logits[i * stride..][..vocab_size].copy_from_slice(&row.logits);
            sampling[sequence(i)] = row.sampling;
            for token in &row.seen {
                seen[sequence(i) * seen_words + *token as usize / 32] |= 1 << (token % 32);
            }
            let (row, sequence, position) = (2 * i as u32, sequence(i) as u32, row.position);
            active.push(ActiveRow { row, sequence, position, recursion: 1 + i as u32 % 3, ..ActiveRow::ABSENT });
        }
        let seen_output = Output::new(gpu, seen.len());
        gpu.write(&seen_output.tensor, 0, bytemuck::cast_slice(&seen));
        let next_rows = Output::new(gpu, 4 * num_sequences);
        let results = Output::new(gpu, 2 * RESULTS * num_sequences);
        let (mut want_next, mut want_results) = (next_rows.read_u32(gpu), results.read_u32(gpu));
        let num_parts = SamplePartial::num_parts(vocab_size as u32);
        let partials = Output::new(gpu, 4 * num_parts as usize * rows.len());
        let bindings = SampleTokenBindings {
            rows: &parity::row_set(gpu, &active),
            logits: &parity::upload(gpu, &logits),
            sampling: &parity::upload_u32(gpu, bytemuck::cast_slice(&sampling)),
            partials: &partials.tensor,
            seen: &seen_output.tensor,
            next_rows: &next_rows.tensor,
            results: &results.tensor,
        };
        let SampleTokenBindings { rows: set, logits, sampling, partials, seen: seen_bits, .. } = bindings;
        let before = SamplePartialBindings { rows: set, logits, sampling, seen: seen_bits, partials };
        let (vocab_size, logits_stride, seen_words) = (vocab_size as u32, stride as u32, seen_words as u32);
        // More workgroups than rows: the padding entries end them.
        let grid = |x| Grid::Fixed([x, rows.len() as u32 + 2, 1]);
        parity::run(gpu, |plan| {
            let params = SamplePartialParams { vocab_size, logits_stride, seen_words };
            plan.dispatch(&SamplePartial::new(gpu.caps()), &before, &params, grid(num_parts))?;
            let params = SampleTokenParams { vocab_size, logits_stride, seen_words, num_parts };
            plan.dispatch(&SampleToken::new(gpu.caps()), &bindings, &params, grid(1))
        });
        let (vocab_size, seen_words) = (vocab_size as usize, seen_words as usize);

        let got = results.read_u32(gpu);
        let mut tokens = Vec::new();
        for (i, row) in rows.iter().enumerate() {
            let at = 2 * (sequence(i) * RESULTS + row.position as usize % RESULTS);
            let token = got[at];
            assert!((token as usize) < vocab_size, "row {i}: token {token} of {vocab_size}");
            want_results[at..][..2].copy_from_slice(&[token, 1 + i as u32 % 3]);
            seen[sequence(i) * seen_words + token as usize / 32] |= 1 << (token % 32);
            let ends = row.sampling.eos.contains(&token) || row.position + 2 >= row.sampling.limit;
            let flags = if ends { 0 } else { ROW_ACTIVE | ROW_SAMPLE };
            let next = Row { token, position: row.position + 1, sequence: sequence(i) as u32, flags };
            want_next[4 * sequence(i)..][..4].copy_from_slice(bytemuck::cast_slice(&[next]));
            tokens.push(token);
        }
        assert_eq!(got, want_results, "results beside the drawn tokens");
        assert_eq!(seen_output.read_u32(gpu), seen, "seen");
        assert_eq!(next_rows.read_u32(gpu), want_next, "next rows");
        tokens
    }

    /// The kernel's tokens must be the oracle's, or as good: the logarithm of a device is off by some units in the last
    /// place, and a race as close as that has two winners.
    fn check(gpu: &Gpu, what: &str, rows: &[Sampled]) -> Vec<u32> {
        let tokens = draw(gpu, rows);
        for (i, (row, token)) in rows.iter().zip(&tokens).enumerate() {
            let want = sample_token(&row.logits, &row.sampling, &row.seen, row.position);
            if *token != want {
                let scores = scores(&row.logits, &row.sampling, &row.seen, row.position);
                let (got, best) = (scores[*token as usize], scores[want as usize]);
                let is_draw = row.sampling.temperature >= MIN_TEMPERATURE;
                assert!(
                    is_draw && got >= best - 1e-4,
                    "{what}: row {i} {:?} drew {token} ({got}), the oracle {want} ({best})",
                    row.sampling
                );
            }
        }
        tokens
    }

    fn seeded(sampling: GpuSampling, seed: usize) -> GpuSampling {
        GpuSampling { seed_low: seed as u32, seed_high: 0x1234_5678 ^ (seed as u32 >> 3), ..sampling }
    }

    const VOCABS: [usize; 9] = [1, 7, 33, 97, 255, 256, 257, 4096, 49152];

    #[test]
    fn is_plain_where_nothing_is_cut_off() {
        let greedy = GpuSampling::default();
        let random = GpuSampling { temperature: 0.8, ..greedy };
        let cut = GpuSampling { top_k: 5, top_p: 0.9, min_p: 0.1, ..greedy };
        assert!(greedy.is_plain() && random.is_plain() && cut.is_plain());
        for sampling in [
            GpuSampling { top_k: 5, ..random },
            GpuSampling { top_p: 0.9, ..random },
            GpuSampling { min_p: 0.1, ..random },
            GpuSampling { repetition_penalty: 1.1, ..random },
            GpuSampling { repetition_penalty: 1.1, ..greedy },
        ] {
            assert!(!sampling.is_plain(), "{sampling:?}");
        }
    }

    #[test]
    fn greedy_is_exact() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("sample_token greedy");
            assert!(draw(gpu, &[]).is_empty());
            for vocab_size in VOCABS {
                let normals = rng.normals(vocab_size);
                let coarse: Vec<f32> = normals.iter().map(|logit| logit.round()).collect();
                let equal = vec![-2.5; vocab_size];
                let zeros: Vec<f32> = (0..vocab_size).map(|token| if token % 2 == 0 { -0.0 } else { 0.0 }).collect();
                let nan = vec![f32::NAN; vocab_size];
                let mut nan_but_last = nan.clone();
                nan_but_last[vocab_size - 1] = f32::MIN;
                let mut huge = normals.clone();
                huge[vocab_size / 2] = f32::MAX;
                huge[0] = f32::NEG_INFINITY;
                let tiny: Vec<f32> = (0..vocab_size as u32).map(|token| -f32::from_bits(1 + (token * 7) % 5)).collect();
                let mut rows: Vec<_> = [&normals, &coarse, &equal, &zeros, &nan, &nan_but_last, &huge, &tiny]
                    .map(|logits| Sampled::new(logits, GpuSampling::default()))
                    .into();
                // By a power of two, which every device divides by exactly.
                let penalised = GpuSampling { repetition_penalty: 2.0, ..GpuSampling::default() };
                let best = sample_token(&normals, &GpuSampling::default(), &[], 0);
                rows.push(Sampled { seen: vec![best], ..Sampled::new(&normals, penalised) });
                let all = (0..vocab_size as u32).collect();
                rows.push(Sampled { seen: all, ..Sampled::new(&coarse, penalised) });
                let tokens = check(gpu, &format!("{profile} V={vocab_size}"), &rows);
                assert_eq!(tokens[2..6], [0, 0, 0, vocab_size as u32 - 1]);
            }
        });
    }

    #[test]
    fn draws_match_oracle() {
        let plain = GpuSampling { temperature: 1.0, ..GpuSampling::default() };
        let cases = [
            plain,
            GpuSampling { temperature: 0.8, top_k: 40, top_p: 0.95, ..plain },
            GpuSampling { temperature: 1.3, top_k: 1, ..plain },
            GpuSampling { top_k: 5, repetition_penalty: 1.2, ..plain },
            GpuSampling { top_p: 0.9, ..plain },
            GpuSampling { top_p: 0.0, ..plain },
            GpuSampling { min_p: 0.05, ..plain },
            GpuSampling { min_p: 7.0, ..plain },
            GpuSampling { top_k: 300, top_p: 0.5, min_p: 0.3, ..plain },
            GpuSampling { temperature: 1e-4, ..plain },
            GpuSampling { temperature: 100.0, top_p: 0.99, ..plain },
            // Cutting inside a flat distribution: more tokens than a list holds.
            GpuSampling { temperature: 1e4, top_k: 20_000, ..plain },
        ];
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("sample_token draws");
            for vocab_size in VOCABS {
                let logits: Vec<f32> = rng.normals(vocab_size).iter().map(|logit| 3.0 * logit).collect();
                let coarse: Vec<f32> = logits.iter().map(|logit| logit.round()).collect();
                let mut wild = logits.clone();
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
                    for (logits, position) in [(&logits, 0), (&coarse, 5), (&wild, 8)] {
                        let seen = (0..vocab_size as u32).filter(|token| token % 3 == 0).collect();
                        rows.push(Sampled { seen, position, ..Sampled::new(logits, seeded(*sampling, seed)) });
                    }
                }
                check(gpu, &format!("{profile} V={vocab_size}"), &rows);
            }
        });
    }

    #[test]
    fn largest_vocabulary() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("sample_token largest");
            let logits: Vec<f32> = (0..1 << 18).map(|_| 4.0 * rng.unit()).collect();
            let equal = vec![1.0; 1 << 18];
            let sampling = GpuSampling { temperature: 0.7, top_p: 0.9, ..GpuSampling::default() };
            // A distribution of 2^18 equal weights sums to 2^44, the most the bins must hold.
            let rows = [&logits, &equal].map(|logits| Sampled::new(logits, seeded(sampling, 1)));
            check(gpu, profile, &rows);
        });
    }

    /// Draws with many seeds: only kept tokens appear, as often as their probability says.
    #[test]
    fn frequencies_fit_the_distribution() {
        let plain = GpuSampling { temperature: 0.7, ..GpuSampling::default() };
        let cases = [
            plain,
            GpuSampling { top_k: 5, ..plain },
            GpuSampling { top_p: 0.8, ..plain },
            GpuSampling { min_p: 0.1, ..plain },
            GpuSampling { top_k: 9, top_p: 0.9, repetition_penalty: 1.5, ..plain },
        ];
        let num_draws = 4096;
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("sample_token frequencies");
            let logits = rng.normals(33);
            for sampling in cases {
                let seen: Vec<u32> = vec![1, 4, 30];
                let rows: Vec<_> = (0..num_draws)
                    .map(|seed| Sampled {
                        seen: seen.clone(),
                        position: seed as u32 % 4,
                        ..Sampled::new(&logits, seeded(sampling, seed))
                    })
                    .collect();
                let mut counts = [0_u32; 33];
                for token in draw(gpu, &rows) {
                    counts[token as usize] += 1;
                }
                let kept = is_kept(&logits, &sampling, &seen);
                let weight: Vec<f64> = kept.iter().map(|kept| kept.map_or(0.0, f64::exp)).collect();
                let total: f64 = weight.iter().sum();
                // Chi-square over tokens expected five times at least, the rest in one class.
                let (mut chi_square, mut classes) = (0.0, 0);
                let mut rest = (0.0, 0.0);
                let mut add = |expected: f64, count: f64| {
                    chi_square += (count - expected).powi(2) / expected;
                    classes += 1;
                };
                for (token, count) in counts.iter().enumerate() {
                    let expected = weight[token] / total * f64::from(num_draws as u32);
                    if expected == 0.0 {
                        assert_eq!(*count, 0, "{profile} {sampling:?}: token {token} is not kept");
                    } else if expected < 5.0 {
                        rest = (rest.0 + expected, rest.1 + f64::from(*count));
                    } else {
                        add(expected, f64::from(*count));
                    }
                }
                if rest.0 >= 5.0 {
                    add(rest.0, rest.1);
                }
                // Mean and standard deviation of chi-square by its degrees of freedom; seeds are fixed.
                let freedom = f64::from(classes - 1);
                let limit = freedom + 4.0 * (2.0 * freedom).sqrt();
                assert!(chi_square < limit, "{profile} {sampling:?}: chi-square {chi_square} of {freedom}");
            }
        });
    }

    /// Successive positions, seeds and tokens must be unrelated: a plain counter in any input gives even draws.
    #[test]
    fn draws_are_even_in_every_counter() {
        parity::on_every_profile(|gpu, profile| {
            let sampling = GpuSampling { temperature: 1.0, ..GpuSampling::default() };
            let logits = [0.0; 8];
            for axis in ["seed_low", "seed_high", "both"] {
                let mut pairs = [0_u32; 64];
                let rows: Vec<_> = (0..4096_u32)
                    .map(|i| {
                        let (seed_low, seed_high) = match axis {
                            "seed_low" => (i / 2, 0),
                            "seed_high" => (0, i / 2),
                            _ => (i / 2, i / 2),
                        };
                        let sampling = GpuSampling { seed_low, seed_high, ..sampling };
                        Sampled { position: i % 2, ..Sampled::new(&logits, sampling) }
                    })
                    .collect();
                for pair in draw(gpu, &rows).chunks_exact(2) {
                    pairs[(8 * pair[0] + pair[1]) as usize] += 1;
                }
                let chi_square: f64 = pairs.iter().map(|count| (f64::from(*count) - 32.0).powi(2) / 32.0).sum();
                assert!(chi_square < 63.0 + 4.0 * 126.0_f64.sqrt(), "{profile} {axis}: chi-square {chi_square}");
            }
        });
    }

    #[test]
    fn seeds_reproduce_in_any_batch() {
        parity::on_every_profile(|gpu, profile| {
            let mut rng = Rng::new("sample_token seeds");
            let logits = rng.normals(4096);
            let sampling = GpuSampling { temperature: 1.0, top_p: 0.9, ..GpuSampling::default() };
            let rows: Vec<_> = (0..16).map(|seed| Sampled::new(&logits, seeded(sampling, seed))).collect();
            let together = draw(gpu, &rows);
            let alone: Vec<u32> = rows.iter().map(|row| draw(gpu, std::slice::from_ref(row))[0]).collect();
            assert_eq!(together, alone, "{profile}");
            let distinct: std::collections::BTreeSet<_> = together.iter().collect();
            assert!(distinct.len() > 8, "{profile}: 16 seeds drew {together:?}");
        });
    }

    #[test]
    fn sequences_end() {
        parity::on_every_profile(|gpu, profile| {
            let mut logits = vec![0.0; 97];
            logits[42] = 1.0;
            let with = |eos: [u32; 4], limit: u32, position: u32| Sampled {
                position,
                ..Sampled::new(&logits, GpuSampling { eos, limit, ..GpuSampling::default() })
            };
            // What the flags must be, `draw` knows; token 42 is drawn by all.
            let rows = [
                with([NONE; 4], u32::MAX, 0),
                with([42, NONE, NONE, NONE], u32::MAX, 0),
                with([7, NONE, 8, 42], 30, 1),
                with([41, 43, NONE, NONE], 31, 28),
                with([NONE; 4], 31, 29),
                with([42; 4], 31, 29),
                with([NONE; 4], 1, 40),
            ];
            assert_eq!(draw(gpu, &rows), [42; 7], "{profile}");
        });
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let gpu = parity::gpu();
        let mut plan = PlanBuilder::new(gpu).expect("a small buffer fits");
        let vocab_size = 5 * SamplePartial::PART_SIZE;
        let [t, u] = [0; 2].map(|_| parity::upload(gpu, &[0.0; 16]));
        let rows = parity::row_set(gpu, &[]);
        let logits = &parity::upload(gpu, &vec![0.0; vocab_size as usize]);
        let (sampling, partials, seen) = (&t, &t, &u);
        let b = SampleTokenBindings { rows: &rows, logits, sampling, partials, seen, next_rows: &u, results: &u };
        let mut message = |vocab_size, logits_stride, seen_words| {
            let p = SampleTokenParams {
                vocab_size,
                logits_stride,
                seen_words,
                num_parts: SamplePartial::num_parts(vocab_size),
            };
            SampleToken::new(gpu.caps()).record(&mut plan, b, p).expect_err("must be refused").to_string()
        };
        assert!(message((1 << 18) + 1, 1 << 19, 1 << 14).contains("vocab_size = 262145 exceeds 262144"));
        assert!(message(0, 1, 0).contains("vocab_size has 0"));
        assert!(message(33, 32, 2).contains("logits_stride has 32"));
        assert!(message(33, 33, 1).contains("seen_words has 1"));
        assert!(message(vocab_size, vocab_size, vocab_size / 32).contains("partials has F32 [16]"));
    }
}
