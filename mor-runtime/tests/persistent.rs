//! Decode steps that run all layers in one dispatch, in sessions: what they draw, how a session goes on after one in which a
//! workgroup waited in vain, and when they are not used.

mod common;

use std::fs;

use common::{TinyModel, llama_config};
use mor_kernels::Gpu;
use mor_kernels::gpu::GpuOptions;
use mor_kernels::parity::{self, Rng};
use mor_model::{Checkpoint, Dtype, MorModel, Precision, Quantization};
use mor_runtime::{
    BatchOptions, Event, FinishReason, GenerateRequest, SamplingParams, SequenceHandle, Session, Summary,
};
use serde_json::{Value, json};

/// Five layers of one shape, or a block of them R times.
fn tiny(mor: &Value) -> TinyModel {
    let mut config = llama_config(5, 4, 2);
    if !mor.is_null() {
        config["mor"] = mor.clone();
    }
    TinyModel::random(config, &mut Rng::new("persistent"))
}

fn open(checkpoint: &Checkpoint, batch: BatchOptions) -> Session {
    let model = MorModel::load(parity::gpu(), checkpoint, Precision::F32, &mut |_| {}).expect("the tiny model fits");
    Session::from_model(model).with_batch(batch).expect("the sizes are sound")
}

fn session(mor: &Value, persistent: bool) -> Session {
    let checkpoint = tiny(mor).checkpoint(Dtype::F32).expect("the tiny model is complete");
    open(&checkpoint, BatchOptions { persistent, ..BatchOptions::default() })
}

fn request(prompt: &[u32], max_new_tokens: usize) -> GenerateRequest {
    let sampling = SamplingParams::greedy();
    GenerateRequest { max_new_tokens, sampling, ignore_eos: true, ..GenerateRequest::new(prompt.to_vec()) }
}

/// Steps until nothing is left to do; the step before which a persistent one is to fail is number `fails`.
fn finish(session: &mut Session, fails: Option<usize>) {
    for step in 0..200 {
        if fails == Some(step) {
            session.give_up_persistent();
        }
        if !session.step().expect("the device works") {
            return;
        }
    }
    panic!("the sequence does not end");
}

fn summary(handle: &SequenceHandle) -> Summary {
    while let Some(event) = handle.try_next() {
        if let Event::Finished(summary) = event {
            return summary;
        }
    }
    panic!("the sequence has ended");
}

fn generate(session: &mut Session, request: &GenerateRequest, fails: Option<usize>) -> Summary {
    let handle = session.submit(request).expect("the request is sound");
    finish(session, fails);
    summary(&handle)
}

fn is_possible() -> bool {
    let caps = parity::gpu().caps();
    let is_possible = caps.coherent_storage && caps.lanes().uses_subgroups();
    if !is_possible {
        eprintln!("skipped: the device has no coherent storage or no subgroups");
    }
    is_possible
}

const PROMPT: [u32; 7] = [5, 17, 3, 42, 8, 8, 60];
const OTHER: [u32; 4] = [9, 33, 2, 11];

fn models() -> [Value; 3] {
    let routed = |mode: &str| json!({ "mode": mode, "sharing": "middle_cycle", "num_recursion": 3 });
    [Value::Null, routed("expert"), routed("token")]
}

#[test]
fn a_wait_in_vain_costs_no_token() {
    if !is_possible() {
        return;
    }
    for mor in models() {
        let want = generate(&mut session(&mor, false), &request(&PROMPT, 72), None);
        assert_eq!(want.tokens.len(), 72);
        // Never; with the prompt; when the first results are in; amid steps; in the last ones.
        for fails in [None, Some(0), Some(1), Some(2), Some(4)] {
            let mut session = session(&mor, true);
            session.prepare_decode(80).expect("the caches fit");
            assert!(session.is_persistent(), "{mor}");
            let found = generate(&mut session, &request(&PROMPT, 72), fails);
            assert_eq!(session.is_persistent(), fails.is_none(), "{mor} {fails:?}");
            assert_eq!((&found.tokens, &found.depths), (&want.tokens, &want.depths), "{mor} {fails:?}");
            assert_eq!(found.kv_entries, want.kv_entries, "{mor} {fails:?}");
        }
    }
}

/// Those that the kernel draws itself, several tokens a dispatch, and those that need more than that.
#[test]
fn every_sampling_draws_the_same() {
    if !is_possible() {
        return;
    }
    let random = SamplingParams { temperature: 0.9, seed: 3, ..SamplingParams::greedy() };
    let samplings = [
        random.clone(),
        SamplingParams { top_k: 5, ..random.clone() },
        SamplingParams { min_p: 0.1, ..random.clone() },
        SamplingParams { repetition_penalty: 1.5, ..SamplingParams::greedy() },
    ];
    for mor in models() {
        let [mut persistent, mut other] = [true, false].map(|persistent| session(&mor, persistent));
        for sampling in &samplings {
            let request = GenerateRequest { sampling: sampling.clone(), ..request(&PROMPT, 30) };
            let [found, want] = [&mut persistent, &mut other].map(|session| generate(session, &request, None));
            assert_eq!((&found.tokens, &found.depths), (&want.tokens, &want.depths), "{mor} {sampling:?}");
            assert_eq!(found.kv_entries, want.kv_entries, "{mor} {sampling:?}");
        }
        assert!(persistent.is_persistent(), "{mor}");
        // An end among the tokens of a dispatch.
        let all = generate(&mut other, &request(&PROMPT, 30), None).tokens;
        let stop = GenerateRequest { stop_tokens: vec![all[12]], ..request(&PROMPT, 30) };
        let [found, want] = [&mut persistent, &mut other].map(|session| generate(session, &stop, None));
        assert_eq!((found.tokens, found.finish_reason), (want.tokens, want.finish_reason), "{mor}");
    }
}

/// Of q4 the layers have one type, embedding and head another.
#[test]
fn quantised_models_draw_the_same() {
    if !is_possible() {
        return;
    }
    for mor in models() {
        for format in Quantization::ALL {
            let checkpoint = tiny(&mor).checkpoint(Dtype::F32).expect("the tiny model is complete");
            let checkpoint = checkpoint.quantize(*format).expect("the weights are small");
            let run = |persistent| {
                let mut session = open(&checkpoint, BatchOptions { persistent, ..BatchOptions::default() });
                let found = generate(&mut session, &request(&PROMPT, 24), None);
                assert_eq!(session.is_persistent(), persistent, "{mor} {format}");
                (found.tokens, found.depths, found.kv_entries)
            };
            assert_eq!(run(true), run(false), "{mor} {format}");
        }
    }
}

/// What has failed is no longer of interest, or is another sequence's: its row must not come back.
#[test]
fn a_wait_in_vain_revives_no_sequence() {
    if !is_possible() {
        return;
    }
    for mor in models() {
        let want = generate(&mut session(&mor, false), &request(&OTHER, 12), None);
        for steps in 1..4 {
            let mut session = session(&mor, true);
            let first = session.submit(&request(&PROMPT, 40)).expect("the request is sound");
            for _ in 0..3 {
                session.step().expect("the device works");
            }
            session.give_up_persistent();
            for _ in 0..steps {
                session.step().expect("the device works");
            }
            first.cancel();
            let found = generate(&mut session, &request(&OTHER, 12), None);
            assert_eq!(summary(&first).finish_reason, FinishReason::Cancelled);
            assert_eq!((&found.tokens, &found.depths), (&want.tokens, &want.depths), "{mor} after {steps}");
            assert!(!session.is_persistent());
        }
    }
}

/// What a trial has found is where the next device begins; whatever is kept, the trial of the kernel itself decides.
#[test]
fn trials_are_remembered() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let options = GpuOptions {
        device: parity::device(),
        pipeline_cache: Some(folder.path().to_owned()),
        ..GpuOptions::default()
    };
    let checkpoint = tiny(&Value::Null).checkpoint(Dtype::F32).expect("the tiny model is complete");
    let batch = BatchOptions { persistent: true, ..BatchOptions::default() };
    let run = || {
        let gpu = Gpu::open(&options).expect("the device opens twice");
        let model = MorModel::load(&gpu, &checkpoint, Precision::F32, &mut |_| {}).expect("the tiny model fits");
        let mut session = Session::from_model(model).with_batch(batch.clone()).expect("the sizes are sound");
        let tokens = generate(&mut session, &request(&PROMPT, 8), None).tokens;
        assert!(session.is_persistent());
        (gpu, tokens)
    };
    let kept = || {
        let files = fs::read_dir(folder.path()).expect("it is a folder").map(|entry| entry.expect("readable").path());
        let [file] = &files.filter(|path| path.extension() == Some("txt".as_ref())).collect::<Vec<_>>()[..] else {
            panic!("one file of trials")
        };
        // The checksum comes first.
        let text = fs::read(file).expect("readable")[8..].to_vec();
        let text = String::from_utf8(text).expect("it is text");
        let (name, value) = text.trim_end().rsplit_once(' ').expect("a name and a number");
        (name.to_owned(), value.parse::<u32>().expect("a number"))
    };
    let (gpu, tokens) = run();
    let (name, found) = kept();
    assert!(found > 0 && name.starts_with("DecodeLayers"), "{name}: {found}");
    assert_eq!(run().1, tokens);
    assert_eq!(kept(), (name.clone(), found));
    for wrong in [0, 2 * found] {
        gpu.remember(&name, wrong);
        assert_eq!(run().1, tokens, "{wrong}");
    }
}

/// Where models or sessions need what the kernel has not, `persistent` changes nothing.
#[test]
fn others_decode_layer_by_layer() {
    let refused = |what: &str, checkpoint: &Checkpoint, batch: BatchOptions| {
        let want = generate(
            &mut open(checkpoint, BatchOptions { persistent: false, ..batch.clone() }),
            &request(&PROMPT, 8),
            None,
        );
        let mut session = open(checkpoint, BatchOptions { persistent: true, ..batch });
        let found = generate(&mut session, &request(&PROMPT, 8), None);
        assert!(!session.is_persistent(), "{what}");
        assert_eq!((found.tokens, found.depths), (want.tokens, want.depths), "{what}");
    };
    let one = BatchOptions::default;
    let expert = |rest: Value| {
        let mut mor = rest;
        (mor["mode"], mor["sharing"], mor["num_recursion"]) = (json!("expert"), json!("middle_cycle"), json!(3));
        mor
    };
    for rest in [
        json!({ "kv": "sharing" }),
        json!({ "kv": "hybrid" }),
        json!({ "router_type": "mlp" }),
        json!({ "sampling": "aux_router" }),
    ] {
        let checkpoint = tiny(&expert(rest.clone())).checkpoint(Dtype::F32).expect("the tiny model is complete");
        refused(&rest.to_string(), &checkpoint, one());
    }
    let plain = tiny(&Value::Null);
    let checkpoint = plain.checkpoint(Dtype::F32).expect("the tiny model is complete");
    refused("two sequences", &checkpoint, BatchOptions { max_sequences: 2, ..one() });
    refused("batch-invariant", &checkpoint, BatchOptions { batch_invariant: true, ..one() });
    let dtype = |name: &str| if name.contains("layers.2.") { Dtype::BF16 } else { Dtype::F32 };
    let mixed = Checkpoint::from_bytes(&plain.config.to_string(), plain.bytes_of(dtype, |_| true), "mixed types");
    refused("layers of different types", &mixed.expect("the tiny model is complete"), one());
}
