//! The f16 profile: f32 weights narrowed to f16, 16-bit weights as they are, K/V in f16, sums in f32.
//!
//! Rounding to f16 is 2^-11 = 4.9e-4 relative. Through a few layers it grows to about 1e-3 of the largest element of a
//! row, which is what the bounds here are stated in: normalised streams pass an error on relative to the whole row, so
//! an element that happens to be near zero has no bound of its own.

mod common;

use std::path::{Path, PathBuf};

use common::{TinyModel, llama_config, runner_options};
use mor_kernels::ops::GpuSampling;
use mor_kernels::parity::{self, Rng};
use mor_model::golden::GoldenCase;
use mor_model::oracle::Oracle;
use mor_model::{Dtype, Mode, Precision, Routing};
use mor_runtime::runner::{Feed, Runner, Work};
use mor_runtime::{Event, GenerateRequest, GpuOptions, ModelSource, SamplingParams, Session, SessionOptions, Summary};
use serde_json::{Value, json};

/// Bound of an element's difference, relative to the largest element of its row, when only K/V are rounded.
const KV_BOUND: f32 = 5e-3;
/// The same when weights are rounded too.
const WEIGHT_BOUND: f32 = 1e-2;
/// Decisions that differ are closer than this to their threshold.
const ROUTING_MARGIN: f32 = 2e-2;
/// Bound of the mean NLL's difference, in nats.
const NLL_BOUND: f64 = 5e-4;

/// Largest difference of a row's elements relative to its largest element, over rows of `width`.
fn relative(found: &[f32], expected: &[f32], width: usize) -> f32 {
    let rows = found.chunks(width).zip(expected.chunks(width));
    rows.map(|(found, expected)| {
        let scale = expected.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
        let difference = found.iter().zip(expected).map(|(f, e)| (f - e).abs());
        difference.fold(0.0_f32, |max, d| if d.is_nan() { f32::INFINITY } else { max.max(d) }) / scale
    })
    .fold(0.0, f32::max)
}

/// No decision of a golden case is closer than 0.01, so routing is equal; their weights are exact in f16 or nearly so.
#[test]
fn golden_cases_route_alike_and_stay_close() {
    let mut largest = [0.0_f32; 2];
    for case in GoldenCase::load_all().expect("the fixtures are readable") {
        let config = case.checkpoint.config().clone();
        let mut session =
            Session::on_gpu(parity::gpu().clone(), &case.checkpoint, Precision::F16).expect("the case fits");
        let forward = session.forward(&case.sequences, Routing::Causal).expect("runs");
        for (i, out) in forward.sequences.iter().enumerate() {
            let first = i * case.padded_len;
            let len = out.depth.len();
            let depth = case.expected.ids("causal.depth").expect("present");
            assert_eq!(out.depth, depth[first..first + len], "{} sequence {i}", case.name);
            let kinds =
                [("causal.logits", &out.logits, config.vocab_size), ("causal.hidden", &out.hidden, config.hidden_size)];
            for (slot, (name, found, width)) in kinds.into_iter().enumerate() {
                let expected = &case.expected.f32(name).expect("present")[first * width..(first + len) * width];
                let difference = relative(found, expected, width);
                assert!(difference < KV_BOUND, "{} {name} sequence {i}: {difference}", case.name);
                largest[slot] = largest[slot].max(difference);
            }
        }
        // Greedy tokens too: the best token of a case leads by at least 0.01.
        let prompt = case.prompts[0].clone();
        let tokens = case.expected.ids("decode.0.tokens").expect("present");
        let request = GenerateRequest {
            max_new_tokens: tokens.len(),
            sampling: SamplingParams::greedy(),
            ignore_eos: true,
            ..GenerateRequest::new(prompt)
        };
        let summary = finish(&mut session, &request);
        assert_eq!(summary.tokens, tokens, "{} tokens", case.name);
        assert_eq!(summary.depths, case.expected.ids("decode.0.depth").expect("present"), "{} depths", case.name);
    }
    println!("largest relative difference: logits {:.2e}, hidden {:.2e}", largest[0], largest[1]);
}

/// Weights that f16 does not hold exactly. Up to the first decision closer than [`ROUTING_MARGIN`] everything agrees.
#[test]
fn narrowed_weights_stay_close() {
    let kinds = [
        json!({ "mode": "vanilla" }),
        json!({ "mode": "recursive", "sharing": "middle_cycle", "num_recursion": 3 }),
        json!({ "mode": "expert", "sharing": "middle_cycle", "num_recursion": 3 }),
        json!({ "mode": "expert", "sharing": "middle_cycle", "num_recursion": 2, "kv": "hybrid", "router_type": "mlp" }),
        json!({ "mode": "token", "sharing": "middle_cycle", "num_recursion": 3, "kv": "sharing" }),
    ];
    let (mut largest, mut compared, mut clear) = (0.0_f32, 0, 0);
    for mor in kinds {
        let mut config = llama_config(8, 4, 2);
        config["mor"] = mor;
        for seed in 0..6 {
            let mut rng = Rng::new(&format!("{config} {seed}"));
            let checkpoint = TinyModel::random(config.clone(), &mut rng).checkpoint(Dtype::F32).expect("complete");
            let parsed = checkpoint.config().clone();
            let tokens: Vec<u32> = (0..24).map(|_| rng.below(parsed.vocab_size) as u32).collect();
            let want = Oracle::new(&checkpoint).forward(&tokens, Routing::Causal).expect("ids are in range");
            let mut session = Session::on_gpu(parity::gpu().clone(), &checkpoint, Precision::F16).expect("fits");
            let found = session.forward(std::slice::from_ref(&tokens), Routing::Causal).expect("runs");
            let found = &found.sequences[0];
            let is_clear = |t: usize| match parsed.mode {
                Mode::Expert => want.router_logits.iter().enumerate().all(|(r, logits)| {
                    let active = r == 0 || want.selected[r - 1][t];
                    !active || parsed.capacity[r] >= 1.0 || logits[t].abs() >= ROUTING_MARGIN
                }),
                Mode::Token => {
                    let mut gates =
                        want.router_weights[0][t * parsed.num_recursions..][..parsed.num_recursions].to_vec();
                    gates.sort_by(|a, b| b.total_cmp(a));
                    gates[0] - gates[1] >= ROUTING_MARGIN
                }
                Mode::Vanilla | Mode::Recursive => true,
            };
            // A decision that flips changes what later tokens attend to.
            let end = (0..tokens.len()).find(|t| !is_clear(*t)).unwrap_or(tokens.len());
            assert_eq!(found.depth[..end], want.depth[..end], "{config} {seed}");
            let width = parsed.vocab_size;
            let difference = relative(&found.logits[..end * width], &want.logits[..end * width], width);
            assert!(difference < WEIGHT_BOUND, "{config} {seed}: {difference}");
            largest = largest.max(difference);
            compared += tokens.len();
            clear += end;
        }
    }
    println!("{clear} of {compared} tokens before an unclear decision, largest relative difference {largest:.2e}");
    assert!(2 * clear > compared, "only {clear} of {compared} tokens could be compared");
}

/// Where matrices multiply halves, the rows that end prompts have other kernels with one, a few, and many sequences at a time, and
/// with split keys.
#[test]
fn prompts_end_alike_whatever_there_is_room_for() {
    for mor in [json!({ "mode": "vanilla" }), json!({ "mode": "recursive", "sharing": "cycle", "num_recursion": 2 })] {
        let mut config = llama_config(8, 4, 2);
        config["mor"] = mor;
        let mut rng = Rng::new(&format!("{config} ends"));
        let checkpoint = TinyModel::random(config.clone(), &mut rng).checkpoint(Dtype::F16).expect("complete");
        let vocab_size = checkpoint.config().vocab_size;
        let lengths = [70, 1, 33, 2, 3, 1, 4, 1, 2, 1, 5];
        let prompts = lengths.map(|length| (0..length).map(|_| rng.below(vocab_size) as u32).collect::<Vec<_>>());
        let mut session = Session::on_gpu(parity::gpu().clone(), &checkpoint, Precision::F16).expect("fits");
        let forward = session.forward(&prompts, Routing::Causal).expect("runs");
        for (num_slots, num_splits) in [1, 3, 8, 20].into_iter().flat_map(|slots| [(slots, 1), (slots, 2)]) {
            let options = runner_options(num_slots, 70, 128);
            let mut runner = Runner::new(session.model(), &options).expect("fits");
            runner.set_key_splits(Some(num_splits));
            let sampling = GpuSampling { limit: 70, ..GpuSampling::default() };
            let prompts = &prompts[..num_slots.min(prompts.len())];
            (0..prompts.len()).for_each(|slot| runner.start(slot, &sampling, [], None));
            let feed = |(sequence, tokens)| Feed { sequence, position: 0, tokens, sample: true };
            let feeds: Vec<_> = prompts.iter().map(Vec::as_slice).enumerate().map(feed).collect();
            let work = Work { feeds: &feeds, ..Work::default() };
            runner.submit(session.model(), &work).expect("runs").wait().expect("reads");
            let logits = runner.logits(session.model(), false).expect("reads");
            assert_eq!(logits.len(), prompts.len(), "{config}, {num_slots} slots");
            for (slot, found) in logits {
                let expected = &forward.sequences[slot].logits[(lengths[slot] - 1) * vocab_size..];
                let difference = relative(&found, expected, vocab_size);
                let what = format!("{config}, {num_slots} slots, {num_splits} splits, prompt {slot}");
                assert!(difference < KV_BOUND, "{what}: {difference}");
            }
        }
    }
}

const MODELS: [&str; 2] = ["tinystories-mor-expert-5m", "tinystories-mor-token-5m"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").join(name)
}

fn load(name: &str, precision: Precision) -> Session {
    let gpu = GpuOptions { device: parity::device(), ..GpuOptions::default() };
    let options = SessionOptions { gpu, precision: Some(precision), ..SessionOptions::default() };
    Session::load(ModelSource::Folder(folder(name)), options).expect("the model loads")
}

fn finish(session: &mut Session, request: &GenerateRequest) -> Summary {
    match session.generate(request).expect("the request is sound").last().expect("it ends").expect("it runs") {
        Event::Finished(summary) => summary,
        other => panic!("{other:?} is not the end"),
    }
}

#[test]
fn trained_models_say_the_same() {
    for name in MODELS {
        let text = std::fs::read_to_string(folder(name).join("golden.json")).expect("the model has one");
        let golden: Value = serde_json::from_str(&text).expect("it is JSON");
        let ids = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).expect("a list of numbers") };
        let mut session = load(name, Precision::F16);
        for expected in golden["greedy"].as_array().expect("a list") {
            let tokens = ids(&expected["generated_ids"]);
            let request = GenerateRequest {
                max_new_tokens: tokens.len(),
                sampling: SamplingParams::greedy(),
                ..GenerateRequest::new(ids(&expected["prompt_ids"]))
            };
            let summary = finish(&mut session, &request);
            assert_eq!(summary.tokens, tokens, "{name}: {}", expected["prompt"]);
            assert_eq!(summary.depths, ids(&expected["depths"]), "{name}: {}", expected["prompt"]);
        }
    }
}

/// The first ten of the held-out documents: the f32 profile is checked on all of them elsewhere.
#[test]
fn trained_models_score_the_same() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../mor-cli/tests/fixtures/valid-40.txt");
    let text = std::fs::read_to_string(path).expect("the fixture is there");
    for name in MODELS {
        let mut means = [0.0, 0.0];
        let mut depths = [0, 0];
        for (slot, precision) in [Precision::F32, Precision::F16].into_iter().enumerate() {
            let mut session = load(name, precision);
            let (mut total, mut count) = (0.0, 0);
            for document in text.split("<|endoftext|>").take(10) {
                let mut tokens = vec![0];
                tokens.extend(session.tokenizer().expect("there is one").encode(document.trim()).expect("it is text"));
                let score = session.score(&tokens, Routing::Causal).expect("runs");
                total += score.nll.iter().map(|nll| f64::from(*nll)).sum::<f64>();
                count += score.nll.len();
                depths[slot] += score.depth.iter().sum::<u32>();
            }
            means[slot] = total / count as f64;
        }
        println!("{name}: mean NLL {:.6} in f32, {:.6} in f16; depths {depths:?}", means[0], means[1]);
        assert!((means[0] - means[1]).abs() < NLL_BOUND, "{name}: {means:?}");
    }
}
