//! Every golden case on the device, in f32: full forward passes (causal and top-k), and greedy decoding of ragged
//! batches, with exact routing and stated tolerances. `MOR_TEST_DEVICE` chooses the adapter.

mod common;

use std::collections::BTreeMap;
use std::ops::Range;

use common::runner_options;
use common::tape::Tape;
use mor_kernels::ops::GpuSampling;
use mor_kernels::{Gpu, parity};
use mor_model::golden::{GoldenCase, GoldenTensors};
use mor_model::oracle::Oracle;
use mor_model::{
    Batching, Checkpoint, DepthControl, Dtype, KvStrategy, Mode, MorConfig, MorModel, Precision, RouterType, Routing,
};
use mor_runtime::runner::{Feed, Runner, RunnerOptions};
use mor_runtime::{SequenceOutput, Session};

fn gpu() -> &'static Gpu {
    parity::gpu()
}

fn cases() -> Vec<GoldenCase> {
    let cases = GoldenCase::load_all().expect("the fixtures are readable");
    // The golden ones, and those of relaxed models.
    assert_eq!(cases.len(), 23 + 6);
    cases
}

/// Largest difference seen, by kind of tensor.
#[derive(Default)]
struct Largest(BTreeMap<&'static str, f32>);

impl Largest {
    /// Compares rows `(index found, index expected)` of `width` elements.
    fn check(
        &mut self,
        kind: &'static str,
        what: &str,
        (found, expected): (&[f32], &[f32]),
        width: usize,
        rows: impl Iterator<Item = (usize, usize)>,
    ) {
        for (f, e) in rows {
            let found = &found[f * width..][..width];
            let expected = &expected[e * width..][..width];
            for (column, (found, expected)) in found.iter().zip(expected).enumerate() {
                let close = GoldenTensors::close(*found, *expected);
                assert!(close, "{what}: row {f} column {column} is {found}, expected {expected}");
                let largest = self.0.entry(kind).or_default();
                *largest = largest.max((found - expected).abs());
            }
        }
    }

    fn print(&self, what: &str) {
        for (kind, difference) in &self.0 {
            println!("{what}: largest difference of {kind}: {difference:.2e} on {}", gpu().summary().name);
        }
    }
}

fn check_forward(case: &GoldenCase, tag: &str, index: usize, out: &SequenceOutput, largest: &mut Largest) {
    let config = case.checkpoint.config();
    let expected = &case.expected;
    let (len, padded) = (case.sequences[index].len(), case.padded_len);
    let what = |name: &str| format!("{} {tag}.{name} sequence {index}", case.name);
    let all = || (0..len).map(|t| (t, index * padded + t));
    let ints = |name: String| expected.ids(&name).expect("present")[index * padded..][..len].to_vec();
    assert_eq!(out.depth, ints(format!("{tag}.depth")), "{}", what("depth"));
    let logits = expected.f32(&format!("{tag}.logits")).expect("present");
    largest.check("logits", &what("logits"), (&out.logits, logits), config.vocab_size, all());
    if let Ok(hidden) = expected.f32(&format!("{tag}.hidden")) {
        largest.check("hidden", &what("hidden"), (&out.hidden, hidden), config.hidden_size, all());
    }
    let mut active = vec![true; len];
    for (r, selected) in out.selected.iter().enumerate() {
        let found: Vec<u32> = selected.iter().map(|s| u32::from(*s)).collect();
        assert_eq!(found, ints(format!("{tag}.selected.{r}")), "{}", what("selected"));
        for (kind, found) in [
            ("router_logits", &out.router_logits),
            ("router_weights", &out.router_weights),
            ("aux_logits", &out.aux_logits),
        ] {
            let name = format!("{tag}.{kind}.{r}");
            let Ok(want) = expected.f32(&name) else { continue };
            let rows = all().filter(|(t, _)| active[*t]);
            largest.check("router values", &what(&name), (&found[r], want), config.router_outputs(), rows);
        }
        if let Ok(block_out) = expected.f32(&format!("{tag}.block_out.{r}")) {
            // A token-choice row that ended earlier repeats the input of its last block in the golden file, not its
            // result, so only rows that ran at this recursion are compared.
            let rows = all().filter(|(t, _)| config.mode == Mode::Expert || selected[*t]);
            largest.check("block_out", &what("block_out"), (&out.block_out[r], block_out), config.hidden_size, rows);
        }
        active.clone_from(selected);
    }
}

#[test]
fn forward_matches_every_case() {
    check_forwards(gpu(), cases()).print("forward");
}

fn check_forwards(gpu: &Gpu, cases: Vec<GoldenCase>) -> Largest {
    let mut largest = Largest::default();
    for case in cases {
        let mut session = Session::on_gpu(gpu.clone(), &case.checkpoint, Precision::F32).expect("loads");
        let causal = session.forward(&case.sequences, Routing::Causal).expect("runs");
        for (index, out) in causal.sequences.iter().enumerate() {
            check_forward(&case, "causal", index, out, &mut largest);
        }
        if case.checkpoint.config().mode == Mode::Expert {
            let topk = session.forward(&case.sequences, Routing::TopK).expect("runs");
            for (index, out) in topk.sequences.iter().enumerate() {
                check_forward(&case, "topk", index, out, &mut largest);
            }
        }
    }
    largest
}

#[test]
fn decoding_matches_every_case() {
    check_decodes(gpu(), cases()).print("decode");
}

/// A case of each kind also with run-time checks in the shaders, and without subgroups within WebGPU's limits.
#[test]
fn some_cases_match_on_every_profile() {
    let names = [
        "vanilla_mha_untied",
        "recursive_sequence_r3_share",
        "expert_middle_cycle_r3_hybrid",
        "expert_cycle_r3_share_mlp_tanh",
        "token_middle_cycle_r3",
        "recursive_cycle_r2_share_both",
        "expert_middle_cycle_r2_hybrid_both",
        "token_middle_cycle_r3_share_both",
    ];
    parity::on_every_profile(|gpu, name| {
        let chosen = || cases().into_iter().filter(|case| names.contains(&case.name.as_str())).collect::<Vec<_>>();
        assert_eq!(chosen().len(), names.len());
        check_forwards(gpu, chosen()).print(&format!("{name}: forward"));
        check_decodes(gpu, chosen()).print(&format!("{name}: decode"));
    });
}

/// Both prompts of a case decode together, as a ragged batch, in lockstep and, where the model can, depth-wise; then each alone,
/// a step in one dispatch, where the model can. Each must equal its golden trace, which was made alone.
fn check_decodes(gpu: &Gpu, cases: Vec<GoldenCase>) -> Largest {
    let mut largest = Largest::default();
    for case in cases {
        let model = MorModel::load(gpu, &case.checkpoint, Precision::F32, &mut |_| {}).expect("loads");
        let all = 0..case.prompts.len();
        check_decode(&case, &model, How::Batch(Batching::Lockstep), all.clone(), &mut largest);
        if model.batching() == Batching::Depthwise {
            check_decode(&case, &model, How::Batch(Batching::Depthwise), all.clone(), &mut largest);
        }
        let config = model.config();
        // The linear routers; K/V of each recursion's own.
        let is_linear = !config.is_routed() || config.router_type == RouterType::Linear && !config.has_aux_router();
        let is_relaxed = config.lora.is_some() || config.recursion_encoding;
        let is_plain =
            config.kv == KvStrategy::RecursionWise && is_linear && !is_relaxed && !case.name.contains("sequence");
        if is_plain && gpu.caps().coherent_storage && gpu.caps().lanes().uses_subgroups() {
            for i in all {
                check_decode(&case, &model, How::Persistent, i..i + 1, &mut largest);
            }
        }
    }
    largest
}

/// How steps run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Batch(Batching),
    /// [`RunnerOptions::persistent`].
    Persistent,
}

/// Of the prompts `chosen`.
fn check_decode(case: &GoldenCase, model: &MorModel, how: How, chosen: Range<usize>, largest: &mut Largest) {
    let config = model.config();
    let (num_slots, prompts) = (chosen.len(), &case.prompts[chosen.clone()]);
    let options = RunnerOptions {
        batching: if let How::Batch(batching) = how { Some(batching) } else { None },
        persistent: how == How::Persistent,
        ..runner_options(num_slots, 128, 32)
    };
    let mut runner = Runner::new(model, &options).expect("fits");
    assert_eq!(runner.is_persistent(), how == How::Persistent, "{}", case.name);
    let first = chosen.start;
    let ids = |i: usize, name: &str| case.expected.ids(&format!("decode.{}.{name}", first + i)).expect("present");
    let num_steps = ids(0, "tokens").len();
    for (slot, prompt) in prompts.iter().enumerate() {
        let sampling = GpuSampling { limit: (prompt.len() + num_steps) as u32, ..GpuSampling::default() };
        runner.start(slot, &sampling, prompt.iter().copied(), None);
    }
    let mut tape = Tape::new(&prompts.iter().map(Vec::len).collect::<Vec<_>>());
    let mut step = |runner: &mut Runner, feeds: &[Feed<'_>]| {
        for (i, position, logits) in tape.step(runner, model, feeds) {
            let want = case.expected.f32(&format!("decode.{}.logits", first + i)).expect("present");
            let recorded = want.len() / config.vocab_size;
            let step = position + 1 - prompts[i].len();
            if let Some(row) = (step + recorded).checked_sub(num_steps) {
                let what = format!("{} {how:?} decode.{} step {step}", case.name, first + i);
                largest.check("decode logits", &what, (&logits, want), config.vocab_size, [(0, row)].into_iter());
            }
        }
    };
    // Prompts are fed in two uneven chunks.
    for last in [false, true] {
        let feed = |(sequence, prompt): (usize, &'_ Vec<u32>)| {
            let split = prompt.len() / 3 + 1;
            let (position, end) = if last { (split, prompt.len()) } else { (0, split) };
            (sequence, position, prompt[position..end].to_vec())
        };
        let chunks: Vec<_> = prompts.iter().enumerate().map(feed).collect();
        let feed = |(sequence, position, tokens)| Feed { sequence, position, tokens, sample: last };
        let feeds: Vec<_> =
            chunks.iter().map(|(sequence, position, tokens)| feed((*sequence, *position, tokens))).collect();
        step(&mut runner, &feeds);
    }
    // A token takes as many ticks as recursions at most.
    for _ in 0..num_steps * config.num_recursions.max(1) {
        step(&mut runner, &[]);
    }
    let mut rows_by_recursion = vec![0; config.num_recursions];
    for (i, prompt) in prompts.iter().enumerate() {
        let what = format!("{} {how:?} decode.{}", case.name, first + i);
        assert_eq!(tape.tokens(i), ids(i, "tokens"), "{what} tokens");
        let depths = tape.depths(i);
        assert_eq!(depths.len(), prompt.len() + num_steps - 1, "{what} tokens fed");
        assert_eq!(depths, ids(i, "depth"), "{what} depth");
        let entries = runner.kv_entries(model, i).expect("reads");
        assert_eq!(entries.iter().map(|n| *n as u32).collect::<Vec<_>>(), ids(i, "cache_entries"), "{what} K/V");
        assert_eq!(entries, model.kv_layout().entries_per_layer(&depths), "{what} K/V layout");
        for (r, rows) in rows_by_recursion.iter_mut().enumerate() {
            *rows += depths.iter().filter(|depth| **depth > r as u32).count() as u64;
        }
    }
    // Work follows the depths: each recursion ran the rows that took it and no others. The strategies that share
    // the first recursion's K/V run it for every token.
    if config.is_routed() {
        if config.kv != KvStrategy::RecursionWise {
            rows_by_recursion[0] = prompts.iter().map(|p| (p.len() + num_steps - 1) as u64).sum();
        }
        let mut processed = runner.rows_processed(model).expect("reads");
        if how == How::Batch(Batching::Depthwise) {
            // Ticks count the rows of all recursions together.
            processed = vec![processed.iter().sum()];
            rows_by_recursion = vec![rows_by_recursion.iter().sum()];
        }
        assert_eq!(processed, rows_by_recursion, "{} {how:?} rows", case.name);
    }
}

/// Heads and MLPs whose sizes are no multiple of 8 are padded on the device; an odd vocabulary pads the head.
#[test]
fn padded_shapes_match_the_oracle() {
    for (head_dim, intermediate_size, vocab_size) in [(20, 83, 97), (6, 4, 31), (10, 172, 50)] {
        let config = format!(
            r#"{{ "model_type": "llama", "vocab_size": {vocab_size}, "hidden_size": 96,
                "intermediate_size": {intermediate_size}, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": {head_dim}, "rms_norm_eps": 1e-5,
                "max_position_embeddings": 64 }}"#
        );
        let config = MorConfig::from_json_str(&config, "padded").expect("the config is valid");
        let checkpoint = Checkpoint::random(config, 7, Dtype::F32);
        let tokens: Vec<u32> = (0..23).map(|i| i * 5 % vocab_size).collect();
        let want = Oracle::new(&checkpoint).forward(&tokens, Routing::Causal).expect("runs");
        let mut session = Session::on_gpu(gpu().clone(), &checkpoint, Precision::F32).expect("loads");
        let found = session.forward(std::slice::from_ref(&tokens), Routing::Causal).expect("runs");
        let what = format!("head_dim {head_dim}");
        let (found, width) = (&found.sequences[0].logits, vocab_size as usize);
        Largest::default().check("logits", &what, (found, &want.logits), width, (0..tokens.len()).map(|t| (t, t)));
    }
}

/// Top-k routing selects up to the maximal depth what it ever does, and refuses a bias, which would change no rank.
#[test]
fn topk_routing_follows_a_maximal_depth() {
    for case in cases().iter().filter(|case| case.checkpoint.config().mode == Mode::Expert) {
        let max_depth = case.checkpoint.config().num_recursions - 1;
        let depth = DepthControl { max_depth: Some(max_depth), ..DepthControl::default() };
        let session = Session::on_gpu(gpu().clone(), &case.checkpoint, Precision::F32).expect("loads");
        let mut session = session.with_depth_control(depth).expect("there are so many recursions");
        let oracle = Oracle::new(&case.checkpoint).with_depth_control(depth).expect("there are so many recursions");
        let found = session.forward(&case.sequences, Routing::TopK).expect("runs");
        for (index, (tokens, found)) in case.sequences.iter().zip(&found.sequences).enumerate() {
            let want = oracle.forward(tokens, Routing::TopK).expect("runs");
            let ever = Oracle::new(&case.checkpoint).forward(tokens, Routing::TopK).expect("runs");
            let limited: Vec<u32> = ever.depth.iter().map(|depth| (*depth).min(max_depth as u32)).collect();
            assert_eq!((&found.depth, &want.depth), (&limited, &limited), "{} sequence {index}", case.name);
            for (found, want) in found.logits.iter().zip(&want.logits) {
                assert!(
                    GoldenTensors::close(*found, *want),
                    "{} sequence {index}: {found}, expected {want}",
                    case.name
                );
            }
        }
        let mut session = session
            .with_depth_control(DepthControl { router_bias: 0.5, ..DepthControl::default() })
            .expect("causal routing follows it");
        let error = session.forward(&case.sequences, Routing::TopK).expect_err("must be refused").to_string();
        assert!(error.contains("which a router bias does not change; use causal routing"), "{error}");
    }
}
