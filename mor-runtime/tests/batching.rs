//! Sequences that share a session: each is what it is alone, whatever arrives, leaves, is cancelled, displaced or shares
//! its beginning; K/V bytes are what the strategies promise. `MOR_TEST_DEVICE` chooses the adapter.

mod common;

use std::path::Path;

use common::{TinyModel, llama_config};
use mor_kernels::parity::{self, Rng};
use mor_kernels::rows::PAGE_SIZE;
use mor_model::golden::GoldenCase;
use mor_model::{DepthControl, Dtype, MorModel, Precision, Routing, ScriptedRouter};
use mor_runtime::kv_cache::{kv_bytes, pages_for_all};
use mor_runtime::runner::Runner;
use mor_runtime::{
    BatchOptions, Event, FinishReason, Fleet, GenerateRequest, GpuOptions, KvStrategy, ModelSource, Report,
    SamplingParams, SequenceHandle, Session, SessionOptions, Summary,
};
use serde_json::json;

/// A request, and after how many new tokens it is cancelled.
struct Asked {
    request: GenerateRequest,
    cancelled_after: Option<usize>,
}

/// Requests of which many begin alike; half of them draw at random if `draws`.
fn requests(rng: &mut Rng, count: usize, vocab_size: usize, longest: usize, draws: bool) -> Vec<Asked> {
    let token = |rng: &mut Rng| 1 + rng.below(vocab_size - 1) as u32;
    let common: Vec<u32> = (0..longest / 2).map(|_| token(rng)).collect();
    let request = |index: usize| {
        let mut prompt = common[..[0, longest / 8, longest / 3, longest / 2][rng.below(4)]].to_vec();
        prompt.extend((0..1 + rng.below(longest / 8)).map(|_| token(rng)));
        let sampling = match draws && index.is_multiple_of(2) {
            true => SamplingParams { temperature: 1.0, seed: index as u64, ..SamplingParams::default() },
            false => SamplingParams::greedy(),
        };
        let max_new_tokens = rng.below(longest / 4);
        let request = GenerateRequest { max_new_tokens, sampling, ignore_eos: true, ..GenerateRequest::new(prompt) };
        Asked { request, cancelled_after: (rng.below(5) == 0).then(|| 1 + rng.below(6)) }
    };
    (0..count).map(request).collect()
}

/// Runs all requests in one session, which take turns arriving; the summaries in their order.
fn run_batch(session: &mut Session, asked: &[Asked], rng: &mut Rng) -> Vec<Summary> {
    let mut handles: Vec<(SequenceHandle, usize)> = Vec::new();
    let mut summaries: Vec<Option<Summary>> = vec![None; asked.len()];
    loop {
        let remains = session.step().expect("the device works");
        for (index, (handle, num_tokens)) in handles.iter_mut().enumerate() {
            while let Some(event) = handle.try_next() {
                match event {
                    Event::Token { .. } => *num_tokens += 1,
                    Event::Finished(summary) => {
                        assert!(summaries[index].replace(summary).is_none(), "request {index} ends once");
                    }
                    _ => {}
                }
                if asked[index].cancelled_after.is_some_and(|after| *num_tokens >= after) {
                    handle.cancel();
                }
            }
        }
        if handles.len() < asked.len() && (handles.len() < 3 || rng.below(3) == 0) {
            let request = &asked[handles.len()].request;
            handles.push((session.submit(request).expect("the request is sound"), 0));
        } else if !remains && handles.len() == asked.len() {
            break;
        }
    }
    summaries.into_iter().map(|summary| summary.expect("every request is answered")).collect()
}

fn run_alone(session: &mut Session, request: &GenerateRequest) -> Summary {
    let last = session.generate(request).expect("the request is sound").last().expect("it ends");
    match last.expect("the device works") {
        Event::Finished(summary) => summary,
        event => panic!("the last event is {event:?}"),
    }
}

/// What happened over all cases, to be sure that they were not all alike.
#[derive(Default)]
struct Tally {
    sequences: usize,
    cancelled: usize,
    preemptions: u64,
    reused: u64,
    differing: usize,
}

/// Memory for one sequence and a half, so that pages run out.
fn small_batch(session: &Session, max_sequences: usize, context: usize, batch_invariant: bool) -> BatchOptions {
    let one = kv_bytes(session.model(), &pages_for_all(session.model(), 1, context));
    BatchOptions {
        max_sequences,
        kv_bytes: Some(one * 3 / 2),
        max_context: Some(context),
        batch_invariant,
        ..BatchOptions::default()
    }
}

/// Compares a batch with each of its sequences alone.
fn check(what: &str, session: Session, context: usize, count: usize, invariant: bool, tally: &mut Tally) {
    let mut rng = Rng::new(what);
    let config = session.config();
    let asked = requests(&mut rng, count, config.vocab_size, context, invariant);
    let small = small_batch(&session, 4, context, invariant);
    let mut session = session.with_batch(small).expect("sizes of something");
    let together = run_batch(&mut session, &asked, &mut rng);
    let statistics = session.statistics();
    assert_eq!((statistics.running, statistics.waiting), (0, 0), "{what}");
    assert_eq!(statistics.kv.held_bytes, statistics.kv.kept_bytes, "{what}: only kept beginnings hold pages");
    (tally.preemptions, tally.reused) =
        (tally.preemptions + statistics.preemptions, tally.reused + statistics.reused_tokens);

    let alone = BatchOptions { batch_invariant: invariant, share_prefixes: false, ..BatchOptions::default() };
    let mut session = session.with_batch(alone).expect("sizes of something");
    for (index, (asked, found)) in asked.iter().zip(&together).enumerate() {
        let what = format!("{what}, request {index}");
        let expected = run_alone(&mut session, &asked.request);
        tally.sequences += 1;
        let is_cancelled = found.finish_reason == FinishReason::Cancelled;
        tally.cancelled += usize::from(is_cancelled);
        assert_eq!(is_cancelled, is_cancelled && asked.cancelled_after.is_some(), "{what}");
        let (tokens, depths) = (found.tokens.len(), found.depths.len());
        if !is_cancelled {
            assert_eq!(
                (found.finish_reason, tokens, depths),
                (FinishReason::Length, expected.tokens.len(), expected.depths.len()),
                "{what}"
            );
        }
        if found.tokens[..] == expected.tokens[..tokens] && found.depths[..] == expected.depths[..depths] {
            if !is_cancelled {
                assert_eq!(found.kv_entries, expected.kv_entries, "{what}");
            }
            continue;
        }
        assert!(!invariant, "{what}: {found:?}, alone {expected:?}");
        tally.differing += 1;
        assert_close_decision(&what, &mut session, found, &expected);
    }
}

/// Two courses may part at a token whose decision is closer than rounding.
fn assert_close_decision(what: &str, session: &mut Session, found: &Summary, expected: &Summary) {
    let prompt = &expected.prompt_tokens;
    let all = |summary: &Summary| [&prompt[..], &summary.tokens].concat();
    let (found_tokens, expected_tokens) = (all(found), all(expected));
    let known = found.depths.len().min(expected.depths.len());
    let parts = |position: &usize| {
        found.depths[*position] != expected.depths[*position]
            || found_tokens[position + 1..].first() != expected_tokens[position + 1..].first()
    };
    let position = (0..known).find(parts).expect("they part at a token that was fed");
    let pass = session.forward(&[expected_tokens[..=position].to_vec()], Routing::Causal).expect("runs");
    let pass = &pass.sequences[0];
    let bound = 2.0 * Runner::rounding(session.precision());
    let lead = |values: &[f32]| {
        let mut sorted = values.to_vec();
        sorted.sort_by(f32::total_cmp);
        let scale = sorted.iter().fold(0.0_f32, |scale, value| scale.max(value.abs()));
        (sorted[sorted.len() - 1] - sorted[sorted.len() - 2]) / scale
    };
    let distance = if found.depths[position] == expected.depths[position] {
        let vocab_size = session.config().vocab_size;
        lead(&pass.logits[position * vocab_size..][..vocab_size])
    } else {
        let decisions = if pass.aux_logits.is_empty() { &pass.router_logits } else { &pass.aux_logits };
        let recursions = session.config().num_recursions;
        let of = |values: &Vec<f32>| match values.len() / (position + 1) {
            1 => values[position].abs() / values.iter().fold(0.0_f32, |scale, value| scale.max(value.abs())),
            _ => lead(&values[position * recursions..][..recursions]),
        };
        decisions.iter().map(of).fold(f32::INFINITY, f32::min)
    };
    assert!(distance <= bound, "{what}: parts at position {position}, where the decision is clear by {distance:.2e}");
}

fn golden_sessions() -> impl Iterator<Item = (String, Session)> {
    GoldenCase::load_all().expect("the fixtures are readable").into_iter().map(|case| {
        let session = Session::on_gpu(parity::gpu().clone(), &case.checkpoint, Precision::F32).expect("it fits");
        (case.name, session)
    })
}

#[test]
fn any_batch_is_each_sequence_alone_to_the_bit() {
    let mut tally = Tally::default();
    for (name, session) in golden_sessions() {
        check(&format!("{name} invariant"), session, 96, 10, true, &mut tally);
    }
    assert!(tally.cancelled > 5 && tally.preemptions > 10 && tally.reused > 200 && tally.differing == 0);
    println!(
        "{} sequences, {} cancelled, {} displaced, {} tokens reused",
        tally.sequences, tally.cancelled, tally.preemptions, tally.reused
    );
}

#[test]
fn by_default_sequences_part_at_close_decisions_alone() {
    let mut tally = Tally::default();
    for (name, session) in golden_sessions() {
        check(&format!("{name} default"), session, 96, 10, false, &mut tally);
    }
    println!("{} of {} sequences part from what they are alone", tally.differing, tally.sequences);
    assert!(tally.preemptions > 10 && tally.reused > 200);
}

/// Also at other depths than the routers', where later recursions' caches take no pages.
#[test]
fn controlled_depths_are_the_same_in_any_batch() {
    let mut tally = Tally::default();
    for (name, session) in golden_sessions().filter(|(_, session)| session.config().is_routed()) {
        let before = kv_bytes(session.model(), &pages_for_all(session.model(), 1, 96));
        let shares = session.config().kv == KvStrategy::Sharing;
        let depth = DepthControl { max_depth: Some(session.config().num_recursions - 1), router_bias: 0.3 };
        let session = session.with_depth_control(depth).expect("a routed model can follow it");
        let after = kv_bytes(session.model(), &pages_for_all(session.model(), 1, 96));
        assert!(if shares { after == before } else { after < before }, "{name}: {after} of {before} bytes of K/V");
        check(&format!("{name} at other depths"), session, 96, 8, true, &mut tally);
    }
    assert!(tally.preemptions > 5 && tally.reused > 100 && tally.differing == 0);
}

fn trained(name: &str) -> Session {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").join(name);
    let gpu = GpuOptions { device: parity::device(), ..GpuOptions::default() };
    let options = SessionOptions { gpu, precision: Some(Precision::F32), ..SessionOptions::default() };
    Session::load(ModelSource::Folder(folder), options).expect("the model loads")
}

#[test]
fn trained_models_are_themselves_in_batches() {
    for name in ["tinystories-mor-expert-5m", "tinystories-mor-token-5m"] {
        for invariant in [false, true] {
            let mut tally = Tally::default();
            check(&format!("{name} {invariant}"), trained(name), 128, 8, invariant, &mut tally);
            println!("{name}: {} of {} sequences part", tally.differing, tally.sequences);
        }
    }
}

/// A random model of `mor`, whose tokens take depths as the default capacities give them.
fn scripted(mor: serde_json::Value, seed: u64) -> Session {
    let mut config = llama_config(8, 4, 2);
    config["mor"] = mor;
    let model = TinyModel::random(config, &mut Rng::new("scripted"));
    let checkpoint = model.checkpoint(Dtype::F32).expect("it is sound");
    let model = MorModel::load(parity::gpu(), &checkpoint, Precision::F32, &mut |_| {}).expect("it fits");
    let script = ScriptedRouter::by_capacity(model.config(), seed);
    Session::from_model(model.with_scripted_router(&script).expect("it is an expert model"))
}

#[test]
fn kv_memory_is_what_the_strategies_promise() {
    for (kv, recursions) in [("recursion_wise", 2), ("recursion_wise", 4), ("sharing", 2), ("sharing", 4)] {
        let what = format!("{kv}, {recursions} recursions");
        let session =
            scripted(json!({ "mode": "expert", "sharing": "cycle", "kv": kv, "num_recursion": recursions }), 5);
        let batch = BatchOptions { max_sequences: 12, share_prefixes: false, ..BatchOptions::default() };
        let mut session = session.with_batch(batch).expect("sizes of something");
        let request = GenerateRequest { max_new_tokens: 200, ..GenerateRequest::new(vec![1]) };
        let handles: Vec<_> = (0..12)
            .map(|seed| {
                let sampling = SamplingParams { seed, ..SamplingParams::default() };
                session.submit(&GenerateRequest { sampling, ..request.clone() }).expect("the request is sound")
            })
            .collect();
        let groups = if kv == "sharing" { 1 } else { recursions };
        let page_bytes = kv_bytes(session.model(), &pages_for_all(session.model(), 1, 1)) / groups;
        let (mut largest, mut wasted) = (0, 0);
        while session.step().expect("the device works") {
            let statistics = session.statistics();
            largest = largest.max(statistics.kv.used_bytes);
            // The end of a page, and room for what is under way, which may begin another.
            let most = statistics.running as u64 * groups * 2 * page_bytes;
            assert!(statistics.kv.wasted_bytes() <= most, "{what}: {:?}", statistics.kv);
            assert!(statistics.kv.reserved_bytes <= statistics.kv.total_bytes, "{what}");
            wasted = wasted.max(statistics.kv.wasted_bytes());
        }
        let statistics = session.statistics();
        assert_eq!(statistics.kv.held_bytes, 0, "{what}: every page returns");
        let summary = |handle: &SequenceHandle| {
            std::iter::from_fn(|| handle.try_next()).find_map(|event| match event {
                Event::Finished(summary) => Some(summary),
                _ => None,
            })
        };
        let summaries: Vec<_> = handles.iter().map(|handle| summary(handle).expect("it has ended")).collect();
        let entries: usize = summaries.iter().flat_map(|summary| &summary.kv_entries).sum();
        let tokens: usize = summaries.iter().map(|summary| summary.depths.len()).sum();
        let ratio = entries as f64 / (tokens * session.config().num_hidden_layers) as f64;
        let r = recursions as f64;
        let promised = if kv == "sharing" { 1.0 / r } else { (r + 1.0) / (2.0 * r) };
        println!("{what}: {ratio:.4} of the full-depth cache, promised {promised:.4}; at most {wasted} bytes wasted");
        // Depths are drawn; 2,400 of them.
        let tolerance = if kv == "sharing" { 1e-9 } else { 0.03 };
        assert!((ratio - promised).abs() <= tolerance, "{what}: {ratio}");
        let entry_bytes =
            page_bytes / u64::from(PAGE_SIZE) / (session.config().num_hidden_layers / recursions as usize) as u64;
        let at_end = entries as u64 * entry_bytes;
        assert!(largest <= at_end && largest * 10 >= at_end * 8, "{what}: {largest} bytes at once, {at_end} in all");
    }
}

#[test]
fn what_cannot_run_is_refused_with_the_numbers() {
    let (_, session) = golden_sessions().next().expect("there are cases");
    let small = small_batch(&session, 2, 96, false);
    let kv_bytes = small.kv_bytes.map(|bytes| bytes / 3);
    let mut session = session.with_batch(BatchOptions { kv_bytes, ..small }).expect("sizes of something");
    let request = GenerateRequest { max_new_tokens: 90, ..GenerateRequest::new(vec![1, 2]) };
    let error = session.submit(&request).map(drop).expect_err("half a sequence fits").to_string();
    assert!(error.starts_with("a sequence of 92 tokens needs ") && error.contains("more K/V memory"), "{error}");
    let error = session.submit(&GenerateRequest { max_new_tokens: 95, ..request.clone() }).map(drop);
    assert!(error.expect_err("too long").to_string().contains("97 tokens"));
    // It is still of use.
    assert_eq!(run_alone(&mut session, &GenerateRequest { max_new_tokens: 20, ..request }).tokens.len(), 20);
    // Caches that are in use cannot be made anew for a longer sequence.
    let one = BatchOptions { max_context: Some(96), ..BatchOptions::default() };
    let mut session = session.with_batch(one).expect("sizes of something");
    let short = GenerateRequest { max_new_tokens: 8, ..GenerateRequest::new(vec![1]) };
    let handle = session.submit(&short).expect("the request is sound");
    let long = GenerateRequest { max_new_tokens: 80, ..short.clone() };
    let error = session.submit(&long).map(drop).expect_err("another runs").to_string();
    assert!(error.starts_with("a sequence of 81 tokens is longer than the 32"), "{error}");
    while session.step().expect("the device works") {}
    assert!(std::iter::from_fn(|| handle.try_next()).any(|event| matches!(event, Event::Finished(_))));
    assert_eq!(run_alone(&mut session, &long).tokens.len(), 80);
    let nothing = BatchOptions { max_sequences: 0, ..BatchOptions::default() };
    assert!(session.with_batch(nothing).expect_err("no slot").to_string().contains("max_sequences is 0"));
}

#[test]
fn a_fleet_answers_every_request_once() {
    let sessions = || {
        let batch = BatchOptions { max_sequences: 3, batch_invariant: true, ..BatchOptions::default() };
        let (_, session) = golden_sessions().nth(3).expect("there are cases");
        session.with_batch(batch).expect("sizes of something")
    };
    let mut rng = Rng::new("fleet");
    let mut alone = sessions();
    let mut asked = requests(&mut rng, 24, alone.config().vocab_size, 96, true);
    asked[5].request.prompt = vec![u32::MAX];
    asked[7].request.max_new_tokens = 60;
    let mut fleet = Fleet::new(vec![sessions(), sessions()]);
    for asked in &asked {
        fleet.submit(asked.request.clone());
    }
    fleet.cancel(7);
    let mut answers: Vec<Option<Summary>> = vec![None; asked.len()];
    let mut refused = Vec::new();
    while let Some(report) = fleet.next_report() {
        match report.expect("the devices work") {
            (id, Report::Event(Event::Finished(summary))) => {
                assert!(answers[id as usize].replace(summary).is_none(), "request {id} ends once");
            }
            (id, Report::Refused(error)) => refused.push((id, error.to_string())),
            _ => {}
        }
    }
    assert!(refused.len() == 1 && refused[0].0 == 5 && refused[0].1.contains("out of range"), "{refused:?}");
    assert_eq!(fleet.num_unfinished(), 0);
    for (index, answer) in answers.iter().enumerate().filter(|(index, _)| *index != 5) {
        let answer = answer.as_ref().expect("it is answered");
        let expected = run_alone(&mut alone, &asked[index].request);
        let len = answer.tokens.len();
        assert!(len == expected.tokens.len() || answer.finish_reason == FinishReason::Cancelled, "request {index}");
        assert_eq!(answer.tokens, expected.tokens[..len], "request {index}");
    }
    assert_eq!(answers[7].as_ref().map(|answer| answer.finish_reason), Some(FinishReason::Cancelled));
    let finished: u64 = fleet.statistics().iter().map(|statistics| statistics.finished).sum();
    assert_eq!(finished, 23);
}
