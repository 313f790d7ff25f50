//! Ragged batches of tiny models: cached decoding and full passes against the CPU oracle.
//!
//! A seed counts only if no decision (router threshold, depth, greedy token) is closer than [`MARGIN`], so that routing
//! and tokens can be demanded exactly. `MOR_TEST_SEED` shifts the seeds.

use mor_kernels::gpu::Gpu;
use mor_kernels::ops::GpuSampling;
use mor_kernels::parity::Rng;
use mor_model::golden::GoldenTensors;
use mor_model::oracle::{Oracle, OracleOutput};
use mor_model::{Batching, Checkpoint, DepthControl, Dtype, KvStrategy, Mode, MorConfig, MorModel, Precision, Routing};
use mor_runtime::runner::{Feed, Runner, RunnerOptions};
use mor_runtime::{SequenceOutput, Session};
use serde_json::Value;

use super::tape::Tape;
use super::{TinyModel, runner_options};

/// Least distance of a decision: far above the rounding of f32, which is about 1e-6 here.
const MARGIN: f32 = 1e-3;
/// Prompts of the ragged batch.
pub(crate) const PROMPTS: [usize; 3] = [13, 1, 6];
/// New tokens of each sequence; the second one is taken out before the others end.
const NEW_TOKENS: [usize; 3] = [9, 7, 10];

/// What happened over all cases, to be sure that they were not all alike.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) cases: usize,
    pub(crate) rejected_seeds: usize,
    /// Tokens by depth.
    pub(crate) depth_counts: [usize; 9],
    pub(crate) largest: f32,
}

impl Tally {
    pub(crate) fn print(&self) {
        println!(
            "{} cases, {} seeds with unclear decisions, tokens by depth {:?}, largest difference {:.2e}",
            self.cases, self.rejected_seeds, self.depth_counts, self.largest
        );
    }
}

/// Sequences and what the oracle says of them: tokens are the prompt and its greedy continuation.
pub(crate) struct Reference {
    pub(crate) tokens: [Vec<u32>; 3],
    pub(crate) outputs: [OracleOutput; 3],
}

fn argmax(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap_or(0)
}

/// Distance between the two largest values.
fn lead(values: &[f32]) -> f32 {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    sorted[0] - sorted[1]
}

/// Least distance of any routing decision in `out`; `bias` is that of loss-free balancing.
fn routing_margin(config: &MorConfig, depth: DepthControl, bias: &[f32], out: &OracleOutput) -> f32 {
    let mut least = f32::INFINITY;
    let max_depth = depth.max_depth.unwrap_or(config.num_recursions);
    match config.mode {
        Mode::Expert => {
            let decisive = if out.aux_logits.is_empty() { &out.router_logits } else { &out.aux_logits };
            for (r, logits) in decisive.iter().enumerate().take(max_depth).filter(|(r, _)| config.capacity[*r] < 1.0) {
                let active = |t: usize| r == 0 || out.selected[r - 1][t];
                let distances = (0..logits.len()).filter(|t| active(*t)).map(|t| (logits[t] + depth.router_bias).abs());
                least = distances.fold(least, f32::min);
            }
        }
        Mode::Token => {
            for gates in out.router_weights[0].chunks(config.num_recursions) {
                let score = |(i, gate): (usize, &f32)| {
                    gate + bias.get(i).copied().unwrap_or(0.0) + i as f32 * depth.router_bias
                };
                let scores: Vec<f32> = gates.iter().enumerate().take(max_depth).map(score).collect();
                least = if max_depth > 1 { least.min(lead(&scores)) } else { least };
            }
        }
        Mode::Vanilla | Mode::Recursive => {}
    }
    least
}

/// The oracle's greedy continuation of random prompts; `None` if a decision is too close.
fn reference(
    config: &MorConfig,
    depth: DepthControl,
    bias: &[f32],
    oracle: &Oracle,
    rng: &mut Rng,
) -> Option<Reference> {
    let vocab_size = config.vocab_size;
    let mut tokens = PROMPTS.map(|len| (0..len).map(|_| rng.below(vocab_size) as u32).collect::<Vec<_>>());
    for (tokens, num_new) in tokens.iter_mut().zip(NEW_TOKENS) {
        let mut cache = oracle.new_cache();
        let mut logits = oracle.feed(&mut cache, tokens, Routing::Causal).expect("ids are in range").logits;
        for _ in 0..num_new {
            let last = &logits[logits.len() - vocab_size..];
            if lead(last) < MARGIN {
                return None;
            }
            tokens.push(argmax(last) as u32);
            let token = [tokens[tokens.len() - 1]];
            logits = oracle.feed(&mut cache, &token, Routing::Causal).expect("ids are in range").logits;
        }
    }
    // The last token is never fed.
    tokens.iter_mut().for_each(|tokens| tokens.truncate(tokens.len() - 1));
    let outputs = tokens.each_ref().map(|tokens| oracle.forward(tokens, Routing::Causal).expect("ids are in range"));
    let clear = outputs.iter().all(|out| routing_margin(config, depth, bias, out) >= MARGIN);
    clear.then_some(Reference { tokens, outputs })
}

fn assert_close(what: &str, found: &[f32], expected: &[f32], largest: &mut f32) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(GoldenTensors::close(*found, *expected), "{what}: element {i} is {found}, expected {expected}");
        *largest = largest.max((found - expected).abs());
    }
}

/// Everything of a forward pass that is defined, against the oracle.
fn check_forward(what: &str, config: &MorConfig, found: &SequenceOutput, want: &OracleOutput, largest: &mut f32) {
    assert_eq!(found.depth, want.depth, "{what}: depths");
    assert_close(&format!("{what}: logits"), &found.logits, &want.logits, largest);
    assert_close(&format!("{what}: hidden"), &found.hidden, &want.hidden, largest);
    assert_eq!(found.selected, want.selected, "{what}: selected");
    let num_tokens = want.depth.len();
    for r in 0..want.selected.len() {
        let width = config.hidden_size;
        for t in 0..num_tokens {
            // Rows of token choice that ended earlier are compared where they ended.
            if config.mode == Mode::Expert || want.selected[r][t] {
                let row = t * width..(t + 1) * width;
                let what = format!("{what}: block_out.{r} of token {t}");
                assert_close(&what, &found.block_out[r][row.clone()], &want.block_out[r][row], largest);
            }
        }
    }
    let routers = [
        ("router_logits", &found.router_logits, &want.router_logits),
        ("router_weights", &found.router_weights, &want.router_weights),
        ("aux_logits", &found.aux_logits, &want.aux_logits),
    ];
    for (name, found, expected) in routers {
        assert_eq!(found.len(), expected.len(), "{what}: {name}");
        for (r, (found, expected)) in found.iter().zip(expected).enumerate() {
            let width = config.router_outputs();
            // Tokens that have left have no router values.
            for t in (0..num_tokens).filter(|t| r == 0 || want.selected[r - 1][*t]) {
                let row = t * width..(t + 1) * width;
                let what = format!("{what}: {name}.{r} of token {t}");
                assert_close(&what, &found[row.clone()], &expected[row], largest);
            }
        }
    }
}

/// Feeds the batch in uneven chunks and decodes it greedily; every number against the oracle's full pass.
fn check_decode(
    what: &str,
    model: &MorModel,
    (batching, num_splits): (Batching, u32),
    reference: &Reference,
    largest: &mut f32,
) {
    let (config, layout) = (model.config(), model.kv_layout());
    let what = format!("{what} {batching:?}");
    let options = RunnerOptions { batching: Some(batching), ..runner_options(3, 64, 10) };
    let mut runner = Runner::new(model, &options).expect("fits");
    runner.set_key_splits(Some(num_splits));
    for (sequence, len) in PROMPTS.into_iter().enumerate() {
        let tokens = &reference.tokens[sequence];
        // The device stops once the token after the last has been drawn.
        let sampling = GpuSampling { limit: tokens.len() as u32 + 1, ..GpuSampling::default() };
        runner.start(sequence, &sampling, tokens[..len].iter().copied(), None);
    }
    let mut tape = Tape::new(&PROMPTS);
    let mut step = |runner: &mut Runner, feeds: &[Feed<'_>]| {
        let drawn = tape.step(runner, model, feeds);
        for (sequence, position, found) in &drawn {
            let expected = &reference.outputs[*sequence].logits[position * config.vocab_size..][..config.vocab_size];
            assert_close(&format!("{what}: decode {sequence} position {position}"), found, expected, largest);
        }
        drawn.len()
    };
    // Sequences 1 and 2 begin to decode while the prompt of sequence 0 is still being read.
    let feeds: [&[(usize, usize, usize)]; 3] =
        [&[(0, 0, 5), (2, 0, 2)], &[(0, 5, 10), (1, 0, 1), (2, 2, 6)], &[(0, 10, 13)]];
    for (index, feeds) in feeds.into_iter().enumerate() {
        let feeds: Vec<_> = feeds
            .iter()
            .map(|&(sequence, position, end)| Feed {
                sequence,
                position,
                tokens: &reference.tokens[sequence][position..end],
                sample: end == PROMPTS[sequence],
            })
            .collect();
        let drawn = step(&mut runner, &feeds);
        assert_eq!(drawn, feeds.iter().filter(|feed| feed.sample).count(), "{what}: prompts that ended");
        if index == 1 {
            step(&mut runner, &[]);
        }
    }
    // A token takes as many ticks as recursions at most, and one at least; each sequence has a bounded number left.
    let most = reference.tokens.iter().map(Vec::len).max().unwrap_or(0) * config.num_recursions.max(1) + 2;
    for _ in 0..most {
        step(&mut runner, &[]);
    }

    let mut rows_by_recursion = vec![0; config.num_recursions];
    for (sequence, tokens) in reference.tokens.iter().enumerate() {
        let what = format!("{what}: decode {sequence}");
        let depths = tape.depths(sequence);
        assert_eq!(depths, reference.outputs[sequence].depth, "{what}: depths");
        let drawn = tape.tokens(sequence);
        assert_eq!(drawn[..drawn.len() - 1], tokens[PROMPTS[sequence]..], "{what}: tokens");

        // K/V entries are the selected tokens, and bytes follow from them.
        let entries = runner.kv_entries(model, sequence).expect("reads");
        assert_eq!(entries, layout.entries_per_layer(&depths), "{what}: K/V entries");
        let count = |r: usize| depths.iter().filter(|depth| **depth > r as u32).count();
        for (layer, entries) in entries.iter().enumerate() {
            let expected = match (model.layout().recursion(layer), config.kv) {
                (None, _) => tokens.len(),
                (Some(0), KvStrategy::Sharing | KvStrategy::Hybrid) => tokens.len(),
                (Some(_), KvStrategy::Sharing) => 0,
                (Some(r), _) => count(r as usize),
            };
            assert_eq!(*entries, expected, "{what}: K/V entries of layer {layer}");
        }
        let fractions: Vec<f64> = (0..config.num_recursions).map(|r| count(r) as f64 / tokens.len() as f64).collect();
        let bytes = layout.bytes_per_token(&fractions, 4).model * tokens.len() as f64;
        let expected = (entries.iter().sum::<usize>() * 2 * config.kv_dim() * 4) as f64;
        assert!((bytes - expected).abs() <= 1e-6 * expected, "{what}: {bytes} bytes of K/V, expected {expected}");

        for (r, rows) in rows_by_recursion.iter_mut().enumerate() {
            let runs_all = r == 0 && config.mode == Mode::Expert && config.kv != KvStrategy::RecursionWise;
            *rows += if runs_all { tokens.len() } else { count(r) } as u64;
        }
    }
    let processed = runner.rows_processed(model).expect("reads");
    match (config.mode, batching) {
        (Mode::Vanilla, _) => {}
        (_, Batching::Lockstep) => assert_eq!(processed, rows_by_recursion, "{what}: rows processed"),
        (_, Batching::Depthwise) => {
            let (found, expected): (u64, u64) = (processed.iter().sum(), rows_by_recursion.iter().sum());
            assert_eq!(found, expected, "{what}: rows processed");
        }
    }
}

/// The model that `make` builds with the first seed whose decisions are clear, and what the oracle says of it.
pub(crate) fn clear_case(
    what: &str,
    depth: DepthControl,
    tally: &mut Tally,
    make: impl Fn(&mut Rng) -> Checkpoint,
) -> (Checkpoint, Reference) {
    for attempt in 0..200 {
        let mut rng = Rng::new(&format!("{what} attempt {attempt}"));
        let checkpoint = make(&mut rng);
        let oracle = Oracle::new(&checkpoint).with_depth_control(depth).expect("the model can follow it");
        let bias = checkpoint.router(0).and_then(|router| router.bias).map(|id| checkpoint.to_f32(id));
        let bias = bias.unwrap_or_default();
        let Some(reference) = reference(checkpoint.config(), depth, &bias, &oracle, &mut rng) else {
            tally.rejected_seeds += 1;
            continue;
        };
        tally.cases += 1;
        for depth in reference.outputs.iter().flat_map(|out| &out.depth) {
            tally.depth_counts[*depth as usize] += 1;
        }
        return (checkpoint, reference);
    }
    panic!("{what}: no seed of 200 has clear decisions");
}

/// Checks the model that `make` builds.
pub(crate) fn check_model(
    gpu: &Gpu,
    name: &str,
    num_splits: u32,
    tally: &mut Tally,
    make: impl Fn(&mut Rng) -> Checkpoint,
) {
    check_at_depths(gpu, name, num_splits, DepthControl::default(), tally, make);
}

/// Checks the model that `make` builds, with other depths than its routers alone would choose.
pub(crate) fn check_at_depths(
    gpu: &Gpu,
    name: &str,
    num_splits: u32,
    depth: DepthControl,
    tally: &mut Tally,
    make: impl Fn(&mut Rng) -> Checkpoint,
) {
    let what = format!("{name} splits {num_splits}");
    let (checkpoint, reference) = clear_case(&what, depth, tally, make);
    let session = Session::on_gpu(gpu.clone(), &checkpoint, Precision::F32).expect("the tiny model fits");
    let mut session = session.with_depth_control(depth).expect("the model can follow it");
    let forward = session.forward(&reference.tokens, Routing::Causal).expect("runs");
    for (i, (found, want)) in forward.sequences.iter().zip(&reference.outputs).enumerate() {
        check_forward(&format!("{what}: forward {i}"), checkpoint.config(), found, want, &mut tally.largest);
    }
    let model = session.model();
    check_decode(&what, model, (Batching::Lockstep, num_splits), &reference, &mut tally.largest);
    if model.batching() == Batching::Depthwise {
        check_decode(&what, model, (Batching::Depthwise, num_splits), &reference, &mut tally.largest);
    }
}

/// Checks a tiny random model of this configuration.
pub(crate) fn check_case(gpu: &Gpu, config: &Value, dtype: Dtype, num_splits: u32, tally: &mut Tally) {
    check_model(gpu, &format!("{config} {dtype}"), num_splits, tally, |rng| {
        TinyModel::random(config.clone(), rng).checkpoint(dtype).expect("the tiny model is complete")
    });
}
