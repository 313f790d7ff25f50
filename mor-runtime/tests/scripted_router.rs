//! Models routed by a script: every token takes the recursions that were drawn for it, in prefill, decode steps and ticks.

mod common;

use std::collections::BTreeSet;

use common::tape::Tape;
use common::{TinyModel, llama_config, runner_options};
use mor_kernels::ops::{GpuSampling, RouterExpertParams};
use mor_kernels::oracle::router_expert::script;
use mor_kernels::parity::{self, Rng};
use mor_kernels::rows::{ActiveRow, NONE};
use mor_model::{Batching, Dtype, MorModel, Precision, ScriptedRouter};
use mor_runtime::runner::{Feed, Runner, RunnerOptions};
use serde_json::{Value, json};

const SEED: u64 = 0x1234_5678_9abc_def0;
/// Prompt and new tokens of each slot.
const LENGTHS: [(usize, usize); 4] = [(20, 12), (1, 30), (7, 1), (30, 9)];

fn model(mor: Value) -> MorModel {
    let mut config = llama_config(5, 4, 2);
    config["mor"] = mor;
    let checkpoint = TinyModel::random(config, &mut Rng::new("scripted")).checkpoint(Dtype::F32);
    let checkpoint = checkpoint.expect("the tiny model is complete");
    MorModel::load(parity::gpu(), &checkpoint, Precision::F32, &mut |_| {}).expect("the tiny model fits")
}

fn expert(rest: Value) -> Value {
    let mut mor = rest;
    (mor["mode"], mor["sharing"], mor["num_recursion"]) = (json!("expert"), json!("middle_cycle"), json!(3));
    mor
}

/// Recursions that the script draws for a token.
fn depth(shares: &[f64], slot: usize, position: usize) -> u32 {
    let params = RouterExpertParams {
        num_recursions: shares.len() as u32,
        seed_low: SEED as u32,
        seed_high: (SEED >> 32) as u32,
        ..Default::default()
    };
    let shares: Vec<f32> = shares.iter().map(|share| *share as f32).collect();
    let takes_it = |r: &u32| {
        let entry = ActiveRow {
            row: 0,
            sequence: slot as u32,
            position: position as u32,
            recursion: r.checked_sub(1).unwrap_or(NONE),
            ..ActiveRow::ABSENT
        };
        let mut logit = [0.0];
        script(&params, &[entry], &shares, &mut logit);
        logit[0] > 0.0
    };
    (0..shares.len() as u32).take_while(takes_it).count() as u32
}

fn check(mor: Value, shares: Option<Vec<f64>>) {
    let model = model(mor.clone());
    let script = match shares {
        Some(shares) => ScriptedRouter { seed: SEED, shares },
        None => ScriptedRouter::by_capacity(model.config(), SEED),
    };
    let model = model.with_scripted_router(&script).expect("fits the model");
    for batching in [Batching::Lockstep, Batching::Depthwise] {
        let options = RunnerOptions { batching: Some(batching), ..runner_options(LENGTHS.len(), 64, 64) };
        let mut runner = Runner::new(&model, &options).expect("fits");
        let prompts: Vec<Vec<u32>> = LENGTHS.iter().map(|(prompt, _)| (1..).take(*prompt).collect()).collect();
        for (slot, (prompt, num_new)) in LENGTHS.into_iter().enumerate() {
            let sampling = GpuSampling { limit: (prompt + num_new) as u32, ..GpuSampling::default() };
            runner.start(slot, &sampling, [], None);
        }
        let feeds: Vec<_> = prompts
            .iter()
            .enumerate()
            .map(|(sequence, tokens)| Feed { sequence, position: 0, tokens, sample: true })
            .collect();
        let mut tape = Tape::new(&LENGTHS.map(|(prompt, _)| prompt));
        tape.step(&mut runner, &model, &feeds);
        for _ in 0..30 * 3 {
            tape.step(&mut runner, &model, &[]);
        }
        for (slot, (prompt, num_new)) in LENGTHS.into_iter().enumerate() {
            let expected: Vec<_> =
                (0..prompt + num_new - 1).map(|position| depth(&script.shares, slot, position)).collect();
            assert_eq!(tape.depths(slot), expected, "{mor} {batching:?} slot {slot}");
        }
    }
}

#[test]
fn tokens_take_what_was_drawn() {
    check(expert(json!({})), None);
    check(expert(json!({ "kv": "sharing", "router_type": "mlp" })), None);
    check(expert(json!({ "kv": "hybrid", "sampling": "aux_router", "capacity": [0.9, 0.6, 0.3] })), None);
    // Whatever the capacity, which is 1 for the first recursion.
    check(expert(json!({})), Some(vec![0.5, 0.7, 0.0]));
}

/// A share of `capacity[r]` of the first tokens of every sequence takes recursion r, but for a few, and sequences begin differently.
#[test]
fn depths_are_distributed_as_the_capacities_give_them() {
    let config = model(expert(json!({ "capacity": [0.9, 0.6, 0.3] }))).config().clone();
    let script = ScriptedRouter::by_capacity(&config, SEED);
    let mut beginnings = BTreeSet::new();
    for slot in 0..16 {
        let depths: Vec<u32> = (0..1000).map(|position| depth(&script.shares, slot, position)).collect();
        for (r, capacity) in config.capacity.iter().enumerate() {
            let mut count = 0.0;
            for (position, depth) in depths.iter().enumerate() {
                count += f64::from(u8::from(*depth > r as u32));
                let expected = capacity * (position + 1) as f64;
                assert!(
                    (count - expected).abs() < 4.0,
                    "slot {slot}: {count} of the first tokens, expected {expected}"
                );
            }
        }
        beginnings.insert(depths[..20].to_vec());
    }
    assert!(beginnings.len() > 12, "{} beginnings of 16 sequences", beginnings.len());
}

#[test]
fn refuses_what_cannot_follow() {
    let message = |mor: Value, shares: &[f64]| {
        let script = ScriptedRouter { seed: 0, shares: shares.to_vec() };
        model(mor).with_scripted_router(&script).expect_err("must be refused").to_string()
    };
    let token = json!({ "mode": "token", "sharing": "middle_cycle", "num_recursion": 3 });
    assert_eq!(message(token, &[1.0; 3]), "router_expert: mode has Token, expected Expert, to follow a script");
    for shares in [&[1.0, 0.5][..], &[1.0, 0.5, 1.5], &[1.0, f64::NAN, 0.5]] {
        let expected = format!("router_expert: shares has {shares:?}, expected 3 shares from 0 to 1, one a recursion");
        assert_eq!(message(expert(json!({})), shares), expected);
    }
}
