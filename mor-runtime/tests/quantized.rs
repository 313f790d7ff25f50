//! Quantised models on the device: the results of the same rounded weights on the CPU, and the quality that is left.

mod common;

use std::path::{Path, PathBuf};

use common::{TinyModel, llama_config};
use mor_kernels::Gpu;
use mor_kernels::parity::{self, Rng};
use mor_model::golden::{GoldenCase, GoldenTensors};
use mor_model::oracle::Oracle;
use mor_model::{Checkpoint, Dtype, Precision, Quantization, Routing};
use mor_runtime::kv_cache::page_classes;
use mor_runtime::{
    BatchOptions, Event, GenerateRequest, GpuOptions, KvStrategy, ModelSource, SamplingParams, Session, SessionOptions,
};
use serde_json::json;

/// Largest perplexity, relative to that of the weights as trained.
const LARGEST_PERPLEXITY: [(Quantization, f64); 2] = [(Quantization::Q8, 1.005), (Quantization::Q4, 1.05)];
const MODELS: [&str; 2] = ["tinystories-mor-expert-5m", "tinystories-mor-token-5m"];

/// What the weights of the largest tiny model are split into.
const BINDING_BYTES: u64 = 24 << 10;

/// Tiny models whose rows do not fill their last group: 40 and 44 inputs, heads of 8; one with padded heads, whose output
/// projection stays as it is; one with matrices of several [`BINDING_BYTES`].
fn tiny_models() -> Vec<Checkpoint> {
    let kinds = [
        (8, json!({ "mode": "vanilla" })),
        (12, json!({ "mode": "recursive", "sharing": "middle_cycle", "num_recursion": 3 })),
        (8, json!({ "mode": "expert", "sharing": "middle_cycle", "num_recursion": 3 })),
        (8, json!({ "mode": "token", "sharing": "middle_cycle", "num_recursion": 3, "kv": "sharing" })),
    ];
    let mut checkpoints = Vec::new();
    for (head_dim, mor) in kinds {
        let mut config = llama_config(8, 4, 2);
        if mor["mode"] == "expert" {
            (config["vocab_size"], config["intermediate_size"]) = (json!(1021), json!(300));
        }
        (config["hidden_size"], config["head_dim"], config["mor"]) = (json!(40), json!(head_dim), mor);
        let mut rng = Rng::new(&config.to_string());
        checkpoints.push(TinyModel::random(config, &mut rng).checkpoint(Dtype::F32).expect("complete"));
    }
    // Adapters and encodings stay as they are.
    let relaxed = GoldenCase::load_all().expect("readable").into_iter().filter(|case| case.name.ends_with("_both"));
    checkpoints.extend(relaxed.map(|case| case.checkpoint));
    checkpoints
}

fn forward(gpu: &Gpu, checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<f32> {
    let mut session = Session::on_gpu(gpu.clone(), checkpoint, Precision::F32).expect("fits");
    let mut output = session.forward(&[tokens.to_vec()], Routing::Causal).expect("runs");
    output.sequences.remove(0).logits
}

/// Prefill kernels, decode kernels, and weights split over many bindings.
#[test]
fn quantised_models_match_the_oracle() {
    let small =
        GpuOptions { device: parity::device(), max_binding_bytes: Some(BINDING_BYTES), ..GpuOptions::default() };
    let small = Gpu::open(&small).expect("the device opens again");
    for checkpoint in tiny_models() {
        for format in Quantization::ALL {
            let what = format!("{} {format}", checkpoint.config().mode);
            let checkpoint = copy(&checkpoint).quantize(*format).expect("the weights are small");
            let most = (checkpoint.config().vocab_size as u32 - 1).min(60);
            let tokens: Vec<u32> = (0..24).map(|i| 1 + i * 17 % most).collect();
            let expected = Oracle::new(&checkpoint).forward(&tokens, Routing::Causal).expect("ids are in range").logits;
            let is_split = checkpoint.shape(checkpoint.embed_tokens())[0] > 1000;
            for gpu in if is_split { vec![parity::gpu(), &small] } else { vec![parity::gpu()] } {
                let found = forward(gpu, &checkpoint, &tokens);
                assert_eq!(found.len(), expected.len(), "{what}");
                for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    assert!(GoldenTensors::close(*found, *expected), "{what}: logit {index}: {found}, {expected}");
                }
            }
            // Greedy decoding draws what prefill of the same tokens would.
            let mut session = Session::on_gpu(parity::gpu().clone(), &checkpoint, Precision::F32).expect("fits");
            let request = GenerateRequest {
                max_new_tokens: 12,
                sampling: SamplingParams::greedy(),
                ignore_eos: true,
                ..GenerateRequest::new(tokens.clone())
            };
            let Event::Finished(summary) =
                session.generate(&request).expect("sound").last().expect("it ends").expect("it runs")
            else {
                panic!("{what}: the last event is the end");
            };
            let all = [&tokens[..], &summary.tokens].concat();
            let logits = Oracle::new(&checkpoint).forward(&all, Routing::Causal).expect("ids are in range").logits;
            let vocab_size = checkpoint.config().vocab_size;
            for (i, token) in summary.tokens.iter().enumerate() {
                let row = &logits[(tokens.len() + i - 1) * vocab_size..][..vocab_size];
                let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                assert!(best - row[*token as usize] < 1e-3, "{what}: token {i}");
            }
        }
    }
}

/// Checkpoints are not cloned lightly, so there is no other way.
fn copy(checkpoint: &Checkpoint) -> Checkpoint {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    checkpoint.save(file.path()).expect("it is written");
    let bytes = std::fs::read(file.path()).expect("it was written");
    Checkpoint::from_bytes(&checkpoint.config().to_json(), bytes, "copy").expect("complete")
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").join(name)
}

fn load(source: &Path, quantize: Option<Quantization>) -> Session {
    let options = SessionOptions { precision: Some(Precision::F32), quantize, ..SessionOptions::default() };
    load_with(source, options)
}

fn load_with(source: &Path, options: SessionOptions) -> Session {
    let gpu = GpuOptions { device: parity::device(), ..GpuOptions::default() };
    Session::load(ModelSource::Folder(source.to_owned()), SessionOptions { gpu, ..options }).expect("the model loads")
}

/// Perplexity of the first documents, and their losses.
fn perplexity(session: &mut Session, num_documents: usize) -> (f64, Vec<f32>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../mor-cli/tests/fixtures/valid-40.txt");
    let text = std::fs::read_to_string(path).expect("the fixture is there");
    let mut losses = Vec::new();
    for document in text.split("<|endoftext|>").take(num_documents) {
        let mut tokens = vec![0];
        tokens.extend(session.tokenizer().expect("there is one").encode(document.trim()).expect("it is text"));
        losses.extend(session.score(&tokens, Routing::Causal).expect("runs").nll);
    }
    let total: f64 = losses.iter().map(|loss| f64::from(*loss)).sum();
    ((total / losses.len() as f64).exp(), losses)
}

#[test]
fn trained_models_keep_their_quality() {
    for name in MODELS {
        let (plain, _) = perplexity(&mut load(&folder(name), None), 10);
        for (format, largest) in LARGEST_PERPLEXITY {
            let (found, losses) = perplexity(&mut load(&folder(name), Some(format)), 10);
            println!("{name}: perplexity {found:.4} in {format}, {plain:.4} as trained, {:.4} of it", found / plain);
            assert!(found <= largest * plain, "{name} {format}: {found}, as trained {plain}");

            // A folder written in this form gives the very same.
            let written = tempfile::tempdir().expect("a temporary folder");
            let checkpoint = Checkpoint::open(folder(name)).expect("complete").quantize(format).expect("small weights");
            checkpoint.save(written.path().join("model.safetensors")).expect("it is written");
            std::fs::write(written.path().join("config.json"), checkpoint.config().to_json()).expect("it is written");
            std::fs::copy(folder(name).join("tokenizer.json"), written.path().join("tokenizer.json")).expect("copied");
            let (_, again) = perplexity(&mut load(written.path(), None), 1);
            assert_eq!(losses[..again.len()], again, "{name} {format}");
        }
    }
}

/// Largest perplexity with keys and values in 8 bits, relative to that without.
const LARGEST_KV_PERPLEXITY: f64 = 1.005;
/// How far below the likeliest token's logit one may be that decode has drawn as such.
const DRAWN_MARGIN: f32 = 0.1;

#[test]
fn keys_and_values_in_8_bits_keep_the_quality() {
    for (name, precision) in MODELS.into_iter().zip([Precision::F32, Precision::F16]) {
        let load = |quantize_kv| {
            load_with(
                &folder(name),
                SessionOptions { precision: Some(precision), quantize_kv, ..SessionOptions::default() },
            )
        };
        let (mut plain, mut packed) = (load(false), load(true));
        let bytes = |session: &Session| page_classes(session.model()).iter().map(|class| class.page_bytes).sum::<u64>();
        let width = if precision == Precision::F32 { 4 } else { 2 };
        assert_eq!(bytes(&packed) * width, bytes(&plain), "{name}");

        let ((expected, _), (found, _)) = (perplexity(&mut plain, 10), perplexity(&mut packed, 10));
        println!("{name}: perplexity {found:.4} with packed K/V, {expected:.4} without, {:.5} of it", found / expected);
        assert!(found <= LARGEST_KV_PERPLEXITY * expected, "{name}: {found}, without {expected}");

        // What is decoded token by token is likeliest where the whole text is read at once, too.
        let request = story(&packed, "Once upon a time there was");
        let drawn = tokens(packed.generate(&request).expect("it fits").map(|event| event.expect("runs")));
        assert_eq!(drawn.len(), request.max_new_tokens, "{name}");
        let text = [&request.prompt[..], &drawn].concat();
        let logits = packed.forward(&[text], Routing::Causal).expect("runs").sequences.remove(0).logits;
        let vocab_size = packed.config().vocab_size;
        for (row, token) in logits.chunks(vocab_size).skip(request.prompt.len() - 1).zip(&drawn) {
            let largest = row.iter().fold(f32::NEG_INFINITY, |largest, logit| largest.max(*logit));
            let logit = row[*token as usize];
            assert!(
                logit >= largest - DRAWN_MARGIN,
                "{name}: {token} was drawn with {logit}, the largest is {largest}"
            );
        }
    }
}

/// Sequences that begin alike and share pages of blocks, with each strategy of who stores keys and values.
#[test]
fn packed_keys_and_values_are_the_same_in_any_batch() {
    let beginning = "Once upon a time, in a house at the edge of a small village, there lived an old man who had a";
    let texts = ["cat", "dog", "boat"].map(|end| format!("{beginning} {beginning} {end}"));
    for strategy in [KvStrategy::RecursionWise, KvStrategy::Sharing, KvStrategy::Hybrid] {
        let load = || {
            let batch = BatchOptions { max_sequences: 3, batch_invariant: true, ..BatchOptions::default() };
            let (precision, kv) = (Some(Precision::F32), Some(strategy));
            let options = SessionOptions { precision, kv, quantize_kv: true, batch, ..SessionOptions::default() };
            load_with(&folder(MODELS[0]), options)
        };
        let (mut together, mut alone) = (load(), load());
        let requests = texts.each_ref().map(|text| story(&alone, text));
        let handles = requests.each_ref().map(|request| together.submit(request).expect("it fits"));
        while together.step().expect("runs") {}
        for (request, handle) in requests.iter().zip(handles) {
            let expected = tokens(alone.generate(request).expect("it fits").map(|event| event.expect("runs")));
            assert_eq!(tokens(std::iter::from_fn(|| handle.try_next())), expected, "{strategy:?}");
        }
    }
}

/// 32 greedy tokens after a text.
fn story(session: &Session, text: &str) -> GenerateRequest {
    let prompt = session.tokenizer().expect("there is one").encode(text).expect("it is text");
    GenerateRequest {
        max_new_tokens: 32,
        sampling: SamplingParams::greedy(),
        ignore_eos: true,
        ..GenerateRequest::new(prompt)
    }
}

fn tokens(events: impl Iterator<Item = Event>) -> Vec<u32> {
    events.filter_map(|event| if let Event::Token { token, .. } = event { Some(token) } else { None }).collect()
}
