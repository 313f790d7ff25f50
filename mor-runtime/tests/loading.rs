//! Checkpoints in every form they come in compute the same.

mod common;

use std::fs;

use common::batch::{Tally, check_model};
use common::{TinyModel, llama_config};
use mor_kernels::parity::{self, Rng};
use mor_model::golden::{GoldenCase, GoldenTensors, fixtures_dir};
use mor_model::{Checkpoint, Dtype, LayerLayout, LayerTensor, Precision, Routing};
use mor_runtime::{GenerateRequest, GpuOptions, ModelSource, RuntimeError, SamplingParams, Session, SessionOptions};
use serde_json::{Value, json};

fn expert_config() -> Value {
    let mut config = llama_config(8, 4, 2);
    config["mor"] = json!({ "mode": "expert", "sharing": "middle_cycle", "num_recursion": 3, "alpha": 1.0 });
    config
}

fn logits(checkpoint: &Checkpoint, precision: Precision) -> Vec<f32> {
    let mut session = Session::on_gpu(parity::gpu().clone(), checkpoint, precision).expect("the tiny model fits");
    let tokens = vec![(0..20).map(|i| i * 7 % 61).collect()];
    session.forward(&tokens, Routing::Causal).expect("runs").sequences.remove(0).logits
}

#[test]
fn folders_load_as_one_file_or_in_shards() {
    let tiny = TinyModel::random(expert_config(), &mut Rng::new("shards"));
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let expected = logits(&tiny.checkpoint(dtype).expect("complete"), Precision::F32);
        for num_shards in [1, 2, 5] {
            let folder = tempfile::tempdir().expect("a temporary folder");
            tiny.write(folder.path(), dtype, num_shards);
            let gpu = GpuOptions { device: parity::device(), ..GpuOptions::default() };
            let options = SessionOptions { gpu, precision: Some(Precision::F32), ..SessionOptions::default() };
            let source = ModelSource::Folder(folder.path().to_owned());
            let mut session = Session::load(source, options).expect("the folder is complete");
            let tokens = vec![(0..20).map(|i| i * 7 % 61).collect()];
            let found = session.forward(&tokens, Routing::Causal).expect("runs").sequences.remove(0).logits;
            assert!(found == expected, "{dtype} in {num_shards} shards");

            // There is no tokenizer: ids work, text does not.
            let request = GenerateRequest { max_new_tokens: 3, ..GenerateRequest::new(vec![1, 2]) };
            let events = session.generate(&request).expect("the request is sound").count();
            assert_eq!(events, 5, "prompt, three tokens, end");
            let stop = GenerateRequest { stop: vec!["a".to_owned()], ..request };
            assert!(matches!(session.generate(&stop).map(drop), Err(RuntimeError::NoTokenizer)));
        }
    }
}

/// Tensors of one fused matrix in different types: the device stores what holds them all.
#[test]
fn element_types_may_differ_from_tensor_to_tensor() {
    let dtype = |name: &str| match name {
        name if name.contains("norm") => Dtype::F32,
        name if name.contains("q_proj") || name.contains("up_proj") => Dtype::F16,
        name if name.contains("v_proj") || name.contains("router") => Dtype::F32,
        _ => Dtype::BF16,
    };
    let mut tally = Tally::default();
    check_model(parity::gpu(), "mixed types", 1, &mut tally, |rng| {
        let tiny = TinyModel::random(expert_config(), rng);
        let bytes = tiny.bytes_of(dtype, |_| true);
        Checkpoint::from_bytes(&tiny.config.to_string(), bytes, "mixed types").expect("complete")
    });
    tally.print();
}

#[test]
fn a_plain_llama_folder_is_a_vanilla_model() {
    for name in ["vanilla_gqa", "vanilla_mha_untied"] {
        let case = GoldenCase::load(fixtures_dir().join(name)).expect("the fixture is readable");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let text = fs::read_to_string(case.dir.join("config.json")).expect("the fixture has one");
        let mut config: Value = serde_json::from_str(&text).expect("it is JSON");
        let fields = config.as_object_mut().expect("an object");
        fields.remove("mor");
        fields.insert("model_type".to_owned(), json!("llama"));
        fields.insert("architectures".to_owned(), json!(["LlamaForCausalLM"]));
        fs::write(folder.path().join("config.json"), config.to_string()).expect("writable");
        fs::copy(case.dir.join("model.safetensors"), folder.path().join("model.safetensors")).expect("writable");
        let checkpoint = Checkpoint::open(folder.path()).expect("a Llama folder opens");
        let mut session = Session::on_gpu(parity::gpu().clone(), &checkpoint, Precision::F32).expect("fits");
        let forward = session.forward(&case.sequences, Routing::Causal).expect("runs");
        let expected = case.expected.f32("causal.logits").expect("present");
        let vocab_size = checkpoint.config().vocab_size;
        for (i, found) in forward.sequences.iter().enumerate() {
            let expected = &expected[i * case.padded_len * vocab_size..][..found.logits.len()];
            assert!(found.logits.iter().zip(expected).all(|(f, e)| GoldenTensors::close(*f, *e)), "{name} {i}");
            assert!(found.depth.iter().all(|depth| *depth == 1), "{name} {i}");
        }
        let greedy = GenerateRequest {
            max_new_tokens: 32,
            sampling: SamplingParams::greedy(),
            ignore_eos: true,
            ..GenerateRequest::new(case.prompts[0].clone())
        };
        let last = session.generate(&greedy).expect("the request is sound").last().expect("it ends").expect("it runs");
        let mor_runtime::Event::Finished(summary) = last else { panic!("{last:?} is not the end") };
        assert_eq!(summary.tokens, case.expected.ids("decode.0.tokens").expect("present"), "{name}");
    }
}

/// Some early checkpoints hold attention that is not tied across recursions, though the rest of the block is.
#[test]
fn untied_attention_stays_untied() {
    let untied = |rng: &mut Rng| {
        let mut tiny = TinyModel::random(expert_config(), rng);
        let layout = LayerLayout::new(&tiny.parsed());
        for layer in (0..layout.num_layers()).filter(|layer| layout.owner(*layer) != *layer) {
            for tensor in LayerTensor::ALL {
                let name = |layer| format!("{}.{}", layout.prefix(layer), tensor.suffix());
                let (shape, mut values) = tiny.tensors[&name(layout.owner(layer))].clone();
                if tensor.suffix().starts_with("self_attn") {
                    values.iter_mut().for_each(|value| *value += 0.5 * rng.normal() / (shape[1] as f32).sqrt());
                }
                tiny.tensors.insert(name(layer), (shape, values));
            }
        }
        tiny
    };
    let tiny = untied(&mut Rng::new("untied attention"));
    let checkpoint = tiny.checkpoint(Dtype::F32).expect("complete");
    let (first, second) = (checkpoint.layer(1), checkpoint.layer(3));
    assert_ne!(first.q_proj, second.q_proj);
    assert_eq!(first.up_proj, second.up_proj);
    let tied = TinyModel::random(expert_config(), &mut Rng::new("untied attention"));
    let tied = tied.checkpoint(Dtype::F32).expect("complete");
    assert_ne!(logits(&checkpoint, Precision::F32), logits(&tied, Precision::F32));

    let mut tally = Tally::default();
    for kv in ["recursion_wise", "sharing", "hybrid"] {
        check_model(parity::gpu(), &format!("untied attention {kv}"), 1, &mut tally, |rng| {
            let mut tiny = untied(rng);
            tiny.config["mor"]["kv"] = json!(kv);
            tiny.checkpoint(Dtype::F32).expect("complete")
        });
    }
    tally.print();
}

/// Some recursive checkpoints have a head of their own although their configuration ties it.
#[test]
fn a_differing_head_wins_over_the_configuration() {
    let mut config = llama_config(6, 4, 2);
    config["mor"] = json!({ "mode": "recursive", "sharing": "cycle", "num_recursion": 3 });
    let mut tally = Tally::default();
    check_model(parity::gpu(), "untied head", 1, &mut tally, |rng| {
        let mut tiny = TinyModel::random(config.clone(), rng);
        let (shape, _) = tiny.tensors["model.embed_tokens.weight"].clone();
        let values = rng.normals(shape.iter().product());
        tiny.tensors.insert("lm_head.weight".to_owned(), (shape, values));
        let checkpoint = tiny.checkpoint(Dtype::BF16).expect("complete");
        assert!(checkpoint.config().tie_word_embeddings);
        assert_ne!(checkpoint.lm_head(), checkpoint.embed_tokens());
        checkpoint
    });
    tally.print();
}
