//! A sequence in a batch is what it is alone: to the same bits with `batch_invariant`, within [`Runner::rounding`]
//! without. For every mode, sharing and K/V strategy, in lockstep and depth-wise.

mod common;

use std::collections::BTreeMap;

use common::batch::{PROMPTS, Tally, clear_case};
use common::{TinyModel, llama_config, runner_options};
use mor_kernels::ops::GpuSampling;
use mor_kernels::rows::{ROW_ACTIVE, ROW_SAMPLE, Row};
use mor_kernels::{Gpu, parity};
use mor_model::{Batching, DepthControl, Dtype, MorModel, Precision};
use mor_runtime::runner::{Feed, Runner, RunnerOptions, Work};
use serde_json::{Value, json};

/// One configuration of every mode, sharing and K/V strategy.
fn configs() -> Vec<Value> {
    let mut configs = vec![json!({ "mode": "vanilla" })];
    let mut add = |mode: &str, sharings: &[&str], strategies: &[&str], rest: &[Value]| {
        for sharing in sharings {
            for kv in strategies {
                let mut mor = rest[configs.len() % rest.len()].clone();
                (mor["mode"], mor["sharing"], mor["kv"]) = (json!(mode), json!(sharing), json!(kv));
                mor["num_recursion"] = json!(3);
                configs.push(mor);
            }
        }
    };
    let all_sharings = ["cycle", "sequence", "middle_cycle", "middle_sequence"];
    add("recursive", &all_sharings, &["recursion_wise", "sharing"], &[json!({})]);
    let capacity = json!([0.9, 0.7, 0.5]);
    let routers = [
        json!({ "alpha": 1.0 }),
        json!({ "router_type": "mlp", "capacity": capacity }),
        json!({ "router_func": "tanh", "sampling": "aux_router", "capacity": capacity }),
    ];
    add("expert", &["cycle", "middle_cycle"], &["recursion_wise", "sharing", "hybrid"], &routers);
    let routers = [json!({}), json!({ "router_type": "mlp", "balancing": "loss_free" })];
    add("token", &["cycle", "middle_cycle"], &["recursion_wise", "sharing"], &routers);
    configs
        .into_iter()
        .map(|mor| {
            let middle = mor["sharing"].as_str().is_some_and(|sharing| sharing.starts_with("middle"));
            let mut config = llama_config(if middle { 8 } else { 6 }, 4, 2);
            config["mor"] = mor;
            config
        })
        .collect()
}

/// A sequence in a batch and how its prompt is fed.
#[derive(Clone)]
struct Member<'a> {
    slot: usize,
    prompt: &'a [u32],
    /// Tokens to draw.
    num_new: usize,
    /// Rounds before it starts.
    arrives: usize,
    /// Prompt tokens of a prefill step.
    chunk: usize,
    /// Prompt tokens that prefill takes, at least one; decode steps or ticks take the others, one by one.
    prefilled: usize,
}

/// What was computed for a sequence, by position.
#[derive(Default)]
struct Computed {
    depths: BTreeMap<usize, u32>,
    tokens: BTreeMap<usize, u32>,
    logits: BTreeMap<usize, Vec<f32>>,
}

fn runner(model: &MorModel, num_slots: usize, batching: Batching, batch_invariant: bool) -> Runner {
    let options = RunnerOptions { batching: Some(batching), batch_invariant, ..runner_options(num_slots, 64, 24) };
    Runner::new(model, &options).expect("fits")
}

/// Entries of a slot in every K/V group.
fn kv_lengths(runner: &mut Runner, model: &MorModel, slot: usize) -> Vec<u32> {
    let layout = model.kv_layout();
    let mut lengths = vec![0; layout.num_groups()];
    let entries = runner.kv_entries(model, slot).expect("reads");
    for (layer, entries) in layout.layers().iter().zip(entries) {
        if let Some(group) = layer.write_group {
            lengths[group] = entries as u32;
        }
    }
    lengths
}

/// Runs a batch to its end: rounds of a prefill step, for those who have prompt left, and a decode step or tick.
fn run(runner: &mut Runner, model: &MorModel, members: &[Member<'_>]) -> Vec<Computed> {
    let sampling = |limit: usize| GpuSampling { limit: limit as u32, ..GpuSampling::default() };
    let mut computed: Vec<Computed> = members.iter().map(|_| Computed::default()).collect();
    let mut fed = vec![0; members.len()];
    for member in members {
        runner.start(member.slot, &sampling(member.prompt.len() + member.num_new), [], None);
    }
    for round in 0.. {
        assert!(round < 400, "every round moves somebody on");
        let mut feeds = Vec::new();
        for (member, fed) in members.iter().zip(&mut fed) {
            if round >= member.arrives && *fed < member.prefilled {
                let end = (*fed + member.chunk).min(member.prefilled);
                let tokens = &member.prompt[*fed..end];
                let sample = end == member.prompt.len();
                feeds.push(Feed { sequence: member.slot, position: *fed, tokens, sample });
                *fed = end;
            }
        }
        feeds.sort_by_key(|feed| feed.sequence);
        if !feeds.is_empty() {
            submit(runner, model, &feeds, members, &mut computed);
        }
        for ((member, fed), computed) in members.iter().zip(&mut fed).zip(&computed) {
            // The next prompt token goes in where the last one has come out; what was drawn after it is not fed.
            let is_out = *fed == member.prefilled || computed.tokens.contains_key(&fed.wrapping_sub(1));
            if (member.prefilled..member.prompt.len()).contains(fed) && is_out {
                let is_last = *fed + 1 == member.prompt.len();
                let limit = if is_last { member.prompt.len() + member.num_new } else { 0 };
                let lengths = kv_lengths(runner, model, member.slot);
                runner.start(member.slot, &sampling(limit), [], Some(&lengths));
                let (token, position, sequence) = (member.prompt[*fed], *fed as u32, member.slot as u32);
                runner.set_next_row(Row { token, position, sequence, flags: ROW_ACTIVE | ROW_SAMPLE });
                *fed += 1;
            }
        }
        submit(runner, model, &[], members, &mut computed);
        let ends = |(member, computed): (&Member<'_>, &Computed)| {
            computed.tokens.contains_key(&(member.prompt.len() + member.num_new - 2))
        };
        if members.iter().zip(&computed).all(ends) {
            break;
        }
    }
    computed
}

fn submit(
    runner: &mut Runner,
    model: &MorModel,
    feeds: &[Feed<'_>],
    members: &[Member<'_>],
    computed: &mut [Computed],
) {
    let ticks = usize::from(feeds.is_empty());
    let work = Work { feeds, ticks, max_context: runner.max_positions(), ..Work::default() };
    let reply = runner.submit(model, &work).expect("runs").wait().expect("reads");
    let logits: BTreeMap<_, _> = runner.logits(model, ticks > 0).expect("reads").into_iter().collect();
    let mut first_row = 0;
    for feed in feeds {
        let of = members.iter().position(|member| member.slot == feed.sequence).expect("a member's");
        let depths = &reply.depths[first_row..][..feed.tokens.len()];
        computed[of].depths.extend((feed.position..).zip(depths.iter().copied()));
        first_row += feed.tokens.len();
    }
    for (member, computed) in members.iter().zip(computed) {
        let next = computed.tokens.keys().last().map_or(member.prefilled.min(member.prompt.len() - 1), |last| last + 1);
        for outcome in reply.drawn(member.slot, next) {
            computed.depths.insert(outcome.position, outcome.depth);
            computed.tokens.insert(outcome.position, outcome.next_token);
            computed.logits.insert(outcome.position, logits[&member.slot].clone());
        }
    }
}

/// Calls `compare` for every sequence of every batch, with what was computed for it alone and there; it returns the
/// largest difference.
fn compare_batches(
    gpu: &Gpu,
    precision: Precision,
    batch_invariant: bool,
    compare: &dyn Fn(&str, &Computed, &Computed) -> f32,
) {
    let mut tally = Tally::default();
    for (i, config) in configs().into_iter().enumerate() {
        let dtype = [Dtype::F32, Dtype::BF16, Dtype::F16][i % 3];
        let (checkpoint, reference) = clear_case(&config.to_string(), DepthControl::default(), &mut tally, |rng| {
            TinyModel::random(config.clone(), rng).checkpoint(dtype).expect("the tiny model is complete")
        });
        let model = MorModel::load(gpu, &checkpoint, precision, &mut |_| {}).expect("the tiny model fits");
        let member = |sequence: usize| {
            let tokens = &reference.tokens[sequence];
            let num_prompt = PROMPTS[sequence];
            Member {
                slot: 0,
                prompt: &tokens[..num_prompt],
                num_new: tokens.len() + 1 - num_prompt,
                arrives: 0,
                chunk: num_prompt,
                prefilled: num_prompt,
            }
        };
        let batchings = [Batching::Lockstep, Batching::Depthwise];
        let batchings = &batchings[..if model.batching() == Batching::Depthwise { 2 } else { 1 }];
        let mut one = runner(&model, 1, model.batching(), batch_invariant);
        let alone: Vec<_> = (0..3).flat_map(|sequence| run(&mut one, &model, &[member(sequence)])).collect();
        for (alone, tokens) in alone.iter().zip(&reference.tokens) {
            if precision == Precision::F32 {
                let drawn: Vec<_> = alone.tokens.values().copied().collect();
                assert!(tokens.ends_with(&drawn[..drawn.len() - 1]), "{config}: tokens of the oracle");
            }
        }
        // (sequence, slot, arrives, chunk, prefilled): few rows, all alike; more than few; prompts row by row.
        let few = [(0, 1, 0, 13, 13), (1, 0, 0, 1, 1), (2, 2, 0, 6, 6)];
        let ragged = [
            (0, 7, 0, 5, 13),
            (1, 2, 1, 1, 1),
            (2, 10, 0, 2, 6),
            (0, 0, 3, 3, 13),
            (2, 5, 6, 4, 6),
            (1, 11, 8, 1, 1),
            (0, 3, 9, 7, 13),
        ];
        let by_rows = [(0, 2, 0, 4, 4), (2, 0, 1, 1, 1), (0, 1, 2, 2, 2), (1, 4, 3, 1, 1), (0, 3, 0, 13, 13)];
        for (num_slots, batch) in [(3, &few[..]), (12, &ragged), (5, &by_rows)] {
            let members: Vec<_> = batch
                .iter()
                .map(|&(sequence, slot, arrives, chunk, prefilled)| Member {
                    slot,
                    arrives,
                    chunk,
                    prefilled,
                    ..member(sequence)
                })
                .collect();
            for batching in batchings {
                let mut runner = runner(&model, num_slots, *batching, batch_invariant);
                let found = run(&mut runner, &model, &members);
                for (&(sequence, slot, ..), found) in batch.iter().zip(&found) {
                    let what =
                        format!("{config} {dtype} {batching:?} {num_slots} slots: sequence {sequence} in {slot}");
                    tally.largest = tally.largest.max(compare(&what, &alone[sequence], found));
                }
            }
        }
    }
    tally.print();
}

/// Depths and tokens, where both runs report them.
fn assert_same_course(what: &str, alone: &Computed, found: &Computed) {
    for (position, depth) in &found.depths {
        assert_eq!(alone.depths.get(position), Some(depth), "{what}: depth at position {position}");
    }
    for (position, token) in &alone.tokens {
        assert_eq!(found.tokens.get(position), Some(token), "{what}: token after position {position}");
    }
}

#[test]
fn batches_are_invariant_to_the_bit() {
    let mut precisions = [Precision::F32, Precision::F16].into_iter().cycle();
    parity::on_every_profile(|gpu, profile| {
        let precision = precisions.next().expect("endless");
        compare_batches(gpu, precision, true, &|what, alone, found| {
            let what = format!("{profile} {precision:?} {what}");
            assert_same_course(&what, alone, found);
            for (position, logits) in &alone.logits {
                let bits = |logits: &[f32]| logits.iter().map(|logit| logit.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&found.logits[position]), bits(logits), "{what}: logits at position {position}");
            }
            0.0
        });
    });
}

#[test]
fn batches_differ_by_rounding_alone_by_default() {
    for precision in [Precision::F32, Precision::F16] {
        compare_batches(parity::gpu(), precision, false, &|what, alone, found| {
            assert_same_course(what, alone, found);
            let mut largest = 0.0_f32;
            for (position, logits) in &alone.logits {
                let scale = logits.iter().fold(0.0_f32, |scale, logit| scale.max(logit.abs()));
                for (alone, found) in logits.iter().zip(&found.logits[position]) {
                    let difference = (alone - found).abs() / scale;
                    let bound = Runner::rounding(precision);
                    assert!(difference <= bound, "{what}: logits at position {position} differ by {difference:.2e}");
                    largest = largest.max(difference);
                }
            }
            largest
        });
    }
}
