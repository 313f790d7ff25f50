//! How a session behaves over time: generations after one another, dropped ones, limits, stops, seeds, prompts of
//! several chunks. On the trained expert-choice model and, where layers are counted, on random ones, in f32.

use std::path::{Path, PathBuf};

use mor_kernels::timing::DispatchTime;
use mor_kernels::{KernelError, parity};
use mor_model::{Dtype, MorConfig};
use mor_runtime::{
    BatchOptions, Batching, Event, FinishReason, GenerateRequest, GpuOptions, ModelSource, Precision, Routing,
    RuntimeError, SamplingParams, ScriptedRouter, Session, SessionOptions, Summary,
};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tinystories-mor-expert-5m")
}

fn session() -> Session {
    session_of(ModelSource::Folder(folder()))
}

fn session_of(source: ModelSource) -> Session {
    let gpu = GpuOptions { device: parity::device(), ..GpuOptions::default() };
    let options = SessionOptions { gpu, precision: Some(Precision::F32), ..SessionOptions::default() };
    Session::load(source, options).expect("the model loads")
}

fn request(session: &Session, prompt: &str, max_new_tokens: usize) -> GenerateRequest {
    let tokens = session.tokenizer().expect("there is a tokenizer").encode(prompt).expect("it is text");
    GenerateRequest { max_new_tokens, sampling: SamplingParams::greedy(), ..GenerateRequest::new(tokens) }
}

/// Runs a generation to its end and checks that its events agree with its summary.
fn run(session: &mut Session, request: &GenerateRequest) -> Summary {
    let (mut tokens, mut text, mut depths) = (Vec::new(), String::new(), Vec::new());
    let mut end = None;
    for event in session.generate(request).expect("the request is sound") {
        assert!(end.is_none(), "an event after the end");
        match event.expect("the device works") {
            Event::Prompt { depths: prompt } => depths.extend(prompt),
            Event::Token { token, text: piece, depth } => {
                tokens.push(token);
                text.push_str(&piece);
                depths.extend(depth);
            }
            Event::Finished(summary) => end = Some(summary),
            _ => {}
        }
    }
    let summary = end.expect("a generation ends");
    assert_eq!(summary.tokens, tokens);
    assert_eq!(summary.text.as_deref(), Some(&*text));
    assert_eq!(summary.depths, depths);
    let fed = summary.prompt_tokens.len() + tokens.len().saturating_sub(1);
    assert_eq!(depths.len(), fed, "every token but the last is fed");
    summary
}

/// What does not depend on the clock.
fn result(summary: &Summary) -> (FinishReason, &[u32], &[u32], Option<&str>, &[usize]) {
    let text = summary.text.as_deref();
    (summary.finish_reason, &summary.tokens, &summary.depths, text, &summary.kv_entries)
}

const FIRST: &str = "Once upon a time, there was a little";
const SECOND: &str = "Tom had a red ball. He";

/// A tick begins with the tokens that leave, a step ends with them; every part takes time, and sessions run on after it.
#[test]
fn decoding_is_measured_by_parts() {
    let mut session = session();
    let request = request(&session, FIRST, 8);
    let before = run(&mut session, &request);
    for (batching, parts) in
        [(Batching::Lockstep, ["prelude", "block", "coda"]), (Batching::Depthwise, ["coda", "prelude", "block"])]
    {
        let batch = BatchOptions { batching: Some(batching), max_sequences: 3, ..BatchOptions::default() };
        session = session.with_batch(batch).expect("the sizes are sound");
        session.prepare_decode(20).expect("the caches fit");
        let profile = match session.profile_decode(3, 16) {
            Err(RuntimeError::Kernel(KernelError::Limit { .. })) => {
                eprintln!("skipped: no timestamps");
                return;
            }
            profile => profile.expect("the device works"),
        };
        assert_eq!(profile.parts.iter().map(|(name, _)| *name).collect::<Vec<_>>(), parts);
        assert!(profile.parts.iter().all(|(_, micros)| *micros > 0.0) && profile.device_micros > 0.0, "{profile:?}");
        let busy =
            |part: &str| profile.dispatches.iter().find(|time| time.dispatch.part == part && time.occupied > 0.0);
        assert!(parts.iter().all(|part| busy(part).is_some()), "{profile:?}");
        assert!(profile.dispatches.iter().any(|time| time.dispatch.weight_bytes > 0), "{profile:?}");
    }
    // A chunk and a part of one, over and over at the same place; then more prompts than kernels of few rows draw for.
    for (num_sequences, context) in [(1, 600), (3, 7), (9, 3)] {
        let profile = session.profile_prefill(num_sequences, context).expect("the device works");
        assert_eq!(profile.parts.iter().map(|(name, _)| *name).collect::<Vec<_>>(), mor_model::PARTS);
        assert!(profile.dispatches.iter().all(|time| time.micros >= 0.0), "{profile:?}");
        // The last layer attends for the rows that are drawn for alone, and stores keys and values of all.
        let in_coda = profile.dispatches.iter().filter(|time| time.dispatch.part == "coda");
        let occupied =
            |kernel: &str| in_coda.clone().filter(|time| time.dispatch.kernel == kernel && time.occupied > 0.0).count();
        assert_eq!(occupied("attention_decode"), 1, "{profile:?}");
        assert_eq!(occupied("attention_prefill"), 0, "{profile:?}");
        // q, o, gate and up, down and the head of nine rows, too.
        assert_eq!(occupied("linear"), if num_sequences <= 8 { 1 } else { 6 }, "{profile:?}");
    }
    session = session.with_batch(BatchOptions::default()).expect("the sizes are sound");
    assert_eq!(result(&run(&mut session, &request)), result(&before));
}

/// Of the last layer of all a prompt's other rows need keys and values alone, whether a recursion repeats that layer or not.
#[test]
fn the_last_layer_attends_for_the_ends_of_prompts() {
    for sharing in ["cycle", "sequence", "middle_cycle", "middle_sequence"] {
        let mor = format!(r#"{{"mode": "recursive", "sharing": "{sharing}", "num_recursion": 2}}"#);
        let config = format!(
            r#"{{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 2,
                "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 0.00001,
                "rope_theta": 10000.0, "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": 0, "mor": {mor}}}"#
        );
        let config = MorConfig::from_json_str(&config, sharing).expect("sound");
        let mut session = session_of(ModelSource::Random { config, seed: 3, dtype: Dtype::F32 });
        let batch = BatchOptions { max_sequences: 9, ..BatchOptions::default() };
        session = session.with_batch(batch).expect("the sizes are sound");
        session.prepare_decode(20).expect("the caches fit");
        for num_sequences in [2, 9] {
            let profile = match session.profile_prefill(num_sequences, 5) {
                Err(RuntimeError::Kernel(KernelError::Limit { .. })) => {
                    eprintln!("skipped: no timestamps");
                    return;
                }
                profile => profile.expect("the device works"),
            };
            let occupied = |time: &&DispatchTime| time.dispatch.kernel.starts_with("attention_") && time.occupied > 0.0;
            let found = profile.dispatches.iter().filter(occupied).count();
            assert_eq!(found, 6, "{sharing}, {num_sequences} prompts: {profile:?}");
        }
    }
}

#[test]
fn a_scripted_session_takes_the_drawn_depths() {
    let script = ScriptedRouter { seed: 7, shares: vec![1.0, 1.0, 0.0] };
    let mut session = session().with_scripted_router(&script).expect("fits the model");
    let request = request(&session, FIRST, 8);
    assert!(run(&mut session, &request).depths.iter().all(|depth| *depth == 2));
}

#[test]
fn a_generation_leaves_nothing_behind() {
    let mut fresh = session();
    let (first, second) = (request(&fresh, FIRST, 24), request(&fresh, SECOND, 24));
    let alone_first = run(&mut fresh, &first);
    let mut other = session();
    let alone_second = run(&mut other, &second);
    assert_ne!(alone_first.tokens, alone_second.tokens);

    // One after the other, longer ones between, which rebuild the caches.
    assert_eq!(result(&run(&mut fresh, &second)), result(&alone_second));
    run(&mut fresh, &GenerateRequest { max_new_tokens: 100, ..first.clone() });
    assert_eq!(result(&run(&mut fresh, &first)), result(&alone_first));

    // Dropped at once, after a few events, and while steps are in flight.
    for taken in [0, 1, 2, 7] {
        let mut generation = fresh.generate(&first).expect("the request is sound");
        for _ in 0..taken {
            generation.next().expect("there is more").expect("the device works");
        }
        drop(generation);
        assert_eq!(result(&run(&mut fresh, &second)), result(&alone_second), "after {taken} events");
    }
    // Full passes and scores use caches of their own.
    fresh.forward(&[vec![1, 2, 3]], Routing::TopK).expect("runs");
    let mut generation = fresh.generate(&first).expect("the request is sound");
    generation.next();
    drop(generation);
    fresh.score(&first.prompt, Routing::Causal).expect("runs");
    assert_eq!(result(&run(&mut fresh, &first)), result(&alone_first));
}

#[test]
fn generations_are_as_long_as_asked() {
    let mut session = session();
    let whole = request(&session, FIRST, 12);
    let tokens = run(&mut session, &whole).tokens;
    for max_new_tokens in [1, 2, 3, 11] {
        let summary = run(&mut session, &GenerateRequest { max_new_tokens, ..whole.clone() });
        assert_eq!(summary.tokens, tokens[..max_new_tokens]);
        assert_eq!(summary.finish_reason, FinishReason::Length);
        let fed = whole.prompt.len() + max_new_tokens - 1;
        assert_eq!(summary.kv_entries[0], fed);
    }
    // No new tokens: the prompt is read, nothing is drawn.
    let summary = run(&mut session, &GenerateRequest { max_new_tokens: 0, ..whole.clone() });
    assert!(summary.tokens.is_empty());
    assert_eq!(summary.depths.len(), whole.prompt.len());
}

#[test]
fn generations_stop_at_texts_and_end_tokens() {
    let mut session = session();
    let whole = request(&session, FIRST, 48);
    let full = run(&mut session, &whole);
    let text = full.text.as_deref().expect("there is a tokenizer");
    // A text over several tokens, one within a token, and the very first characters.
    for stop in ["She loved to play", "ved", &text[..2]] {
        let cut = text.find(stop).expect("the text has it");
        let summary = run(&mut session, &GenerateRequest { stop: vec![stop.to_owned()], ..whole.clone() });
        assert_eq!(summary.finish_reason, FinishReason::Stop, "{stop}");
        assert_eq!(summary.text.as_deref(), Some(&text[..cut]), "{stop}");
        assert!(full.tokens.starts_with(&summary.tokens) && summary.tokens.len() < full.tokens.len(), "{stop}");
    }
    let never = vec!["xyzzy".to_owned(), "She flew".to_owned()];
    assert_eq!(result(&run(&mut session, &GenerateRequest { stop: never, ..whole.clone() })), result(&full));
    let stop = vec!["a".to_owned(), String::new()];
    let error = session.generate(&GenerateRequest { stop, ..whole.clone() }).map(drop);
    assert!(matches!(error, Err(RuntimeError::Parameter { name: "stop", .. })), "{error:?}");

    // A story that the model has told to its end: its next token is the end, as the first or as a later one.
    let tokenizer = session.tokenizer().expect("there is a tokenizer");
    let eos = tokenizer.token_id("<|endoftext|>").expect("it has one");
    let mut story = GenerateRequest { max_new_tokens: 400, ..whole };
    let told = run(&mut session, &story);
    assert_eq!((told.finish_reason, told.tokens.last()), (FinishReason::Eos, Some(&eos)));
    assert!(!told.text.as_deref().expect("text").contains("endoftext"));
    story.prompt.extend(&told.tokens[..told.tokens.len() - 1]);
    let end = run(&mut session, &story);
    assert_eq!((end.finish_reason, &end.tokens[..]), (FinishReason::Eos, &[eos][..]));
    assert_eq!(end.text.as_deref(), Some(""));
    let on = run(&mut session, &GenerateRequest { ignore_eos: true, max_new_tokens: 8, ..story });
    assert_eq!((on.finish_reason, on.tokens.len(), on.tokens[0]), (FinishReason::Length, 8, eos));
}

#[test]
fn an_empty_prompt_starts_from_the_end_of_text() {
    let mut session = session();
    let empty = GenerateRequest { max_new_tokens: 6, ..request(&session, "", 6) };
    let explicit = GenerateRequest { prompt: vec![0], ..empty.clone() };
    let found = run(&mut session, &empty);
    assert_eq!(found.prompt_tokens, [0]);
    assert_eq!(result(&found), result(&run(&mut session, &explicit)));
}

#[test]
fn seeds_decide_what_is_drawn() {
    let mut session = session();
    let greedy = request(&session, FIRST, 24);
    let most_likely = run(&mut session, &greedy).tokens;
    let mut drawn = |sampling: SamplingParams| {
        let sampling = SamplingParams { temperature: 1.0, ..sampling };
        run(&mut session, &GenerateRequest { sampling, ignore_eos: true, ..greedy.clone() }).tokens
    };
    let base = SamplingParams::default;
    let first = drawn(SamplingParams { seed: 1, ..base() });
    assert_eq!(first, drawn(SamplingParams { seed: 1, ..base() }));
    assert_ne!(first, drawn(SamplingParams { seed: 2, ..base() }));
    assert_ne!(first, drawn(SamplingParams { seed: 1 << 32 | 1, ..base() }), "the upper half counts too");
    // Filters that leave one token are greedy whatever the seed.
    assert_eq!(drawn(SamplingParams { top_k: 1, seed: 3, ..base() }), most_likely);
    assert_eq!(drawn(SamplingParams { top_p: f32::MIN_POSITIVE, seed: 4, ..base() }), most_likely);
    assert_eq!(drawn(SamplingParams { min_p: 1.0, seed: 5, ..base() }), most_likely);
    // Filters that leave all change nothing.
    assert_eq!(drawn(SamplingParams { top_k: u32::MAX, seed: 1, ..base() }), first);
    assert_eq!(drawn(SamplingParams { top_k: 4096, top_p: 1.0, min_p: 0.0, seed: 1, ..base() }), first);
}

#[test]
fn extreme_sampling_stays_within_the_vocabulary() {
    let mut session = session();
    let base = request(&session, FIRST, 12);
    let cases = [
        SamplingParams { temperature: f32::MAX, ..SamplingParams::default() },
        SamplingParams { temperature: f32::MIN_POSITIVE, ..SamplingParams::default() },
        SamplingParams { repetition_penalty: f32::MAX, ..SamplingParams::greedy() },
        SamplingParams { repetition_penalty: f32::MIN_POSITIVE, ..SamplingParams::default() },
        SamplingParams { top_k: 1, top_p: 1e-30, min_p: 1.0, ..SamplingParams::default() },
        SamplingParams { seed: u64::MAX, ..SamplingParams::default() },
    ];
    for sampling in cases {
        let what = format!("{sampling:?}");
        let summary = run(&mut session, &GenerateRequest { sampling, ignore_eos: true, ..base.clone() });
        assert_eq!(summary.tokens.len(), 12, "{what}");
        assert!(summary.tokens.iter().all(|token| *token < 4096), "{what}: {:?}", summary.tokens);
    }
    // So cold that only the most likely token is left.
    let cold = SamplingParams { temperature: 1e-6, seed: 9, ..SamplingParams::default() };
    let found = run(&mut session, &GenerateRequest { sampling: cold, ..base.clone() });
    assert_eq!(found.tokens, run(&mut session, &base).tokens);
    // A strong penalty lets no token come twice.
    let penalty = SamplingParams { repetition_penalty: 1e6, ..SamplingParams::greedy() };
    let found = run(&mut session, &GenerateRequest { sampling: penalty, ignore_eos: true, ..base.clone() });
    let mut seen = base.prompt.clone();
    for token in found.tokens {
        assert!(!seen.contains(&token), "{token} came again");
        seen.push(token);
    }
}

/// A prompt of more than one chunk: depths and the next token as in one full pass, which runs in chunks of its own.
#[test]
fn long_prompts_are_read_in_chunks() {
    let mut session = session();
    let text =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../mor-cli/tests/fixtures/valid-40.txt"));
    let text = text.expect("the fixture is there").replace("<|endoftext|>", "");
    let mut request = request(&session, &text, 8);
    for len in [511, 512, 513, 1016] {
        let len: usize = len;
        let whole = GenerateRequest { prompt: request.prompt[..len].to_vec(), ..request.clone() };
        let summary = run(&mut session, &whole);
        let mut tokens = whole.prompt.clone();
        tokens.extend(&summary.tokens[..summary.tokens.len() - 1]);
        let pass = session.forward(std::slice::from_ref(&tokens), Routing::Causal).expect("runs");
        let pass = &pass.sequences[0];
        assert_eq!(summary.depths, pass.depth, "{len}");
        for (i, token) in summary.tokens.iter().enumerate() {
            let row = &pass.logits[(len - 1 + i) * 4096..][..4096];
            let best = row.iter().copied().fold(f32::MIN, f32::max);
            assert!(best - row[*token as usize] < 1e-4, "{len}: token {i}");
        }
        let entries = session.model().kv_layout().entries_per_layer(&pass.depth);
        assert_eq!(summary.kv_entries, entries, "{len}");
    }

    // The context's end: exactly full is fine, one more is refused.
    request.prompt.truncate(1024);
    let full = GenerateRequest { max_new_tokens: 0, ..request.clone() };
    assert_eq!(run(&mut session, &full).depths.len(), 1024);
    let error = session.generate(&GenerateRequest { max_new_tokens: 1, ..request.clone() }).map(drop);
    assert!(matches!(error, Err(RuntimeError::TooLong { found: 1025, limit: 1024, .. })), "{error:?}");
    request.prompt.push(1);
    let error = session.generate(&request).map(drop);
    assert!(matches!(error, Err(RuntimeError::TooLong { what: "the prompt", found: 1025, .. })), "{error:?}");
    // A refused request leaves the session usable.
    request.prompt = vec![4096];
    let error = session.generate(&request).map(drop);
    assert!(matches!(error, Err(RuntimeError::TokenOutOfRange { token: 4096, .. })), "{error:?}");
    request.prompt = vec![0];
    assert_eq!(run(&mut session, &request).tokens.len(), 8);
}
