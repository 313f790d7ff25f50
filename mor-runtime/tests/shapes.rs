//! Shapes far from the usual: each either computes what the oracle does or is refused with a reason, never a panic.

mod common;

use common::batch::{Tally, check_model};
use common::{TinyModel, llama_config};
use mor_kernels::{KernelError, parity};
use mor_model::{Checkpoint, Dtype, MorConfig, Precision, Routing};
use mor_runtime::{GenerateRequest, RuntimeError, Session};
use serde_json::{Value, json};

fn config(edits: &[(&str, Value)]) -> Value {
    let mut config = llama_config(4, 2, 1);
    for (field, value) in edits {
        config[*field] = value.clone();
    }
    config
}

fn check(name: &str, config: &Value, tally: &mut Tally) {
    check_model(parity::gpu(), name, 1, tally, |rng| {
        TinyModel::random(config.clone(), rng).checkpoint(Dtype::F32).expect("the tiny model is complete")
    });
}

#[test]
fn widths_and_heads() {
    let mut tally = Tally::default();
    let cases: &[(&str, &[(&str, Value)])] = &[
        ("smallest", &[("hidden_size", json!(8)), ("num_attention_heads", json!(1))]),
        ("narrow mlp", &[("intermediate_size", json!(1))]),
        ("odd mlp", &[("intermediate_size", json!(67))]),
        ("large heads", &[("head_dim", json!(128))]),
        ("larger heads", &[("head_dim", json!(256))]),
        ("uneven heads", &[("head_dim", json!(24))]),
        ("smallest heads", &[("head_dim", json!(2))]),
        ("padded heads", &[("head_dim", json!(6)), ("num_key_value_heads", json!(2))]),
        ("more padded heads", &[("head_dim", json!(18)), ("num_attention_heads", json!(6))]),
        ("wide groups", &[("num_attention_heads", json!(8))]),
        ("wider groups", &[("num_attention_heads", json!(16))]),
        ("more groups", &[("num_attention_heads", json!(9)), ("num_key_value_heads", json!(3))]),
        ("few tokens", &[("vocab_size", json!(3))]),
        ("uneven width", &[("hidden_size", json!(40)), ("vocab_size", json!(517))]),
        ("wide", &[("hidden_size", json!(520)), ("intermediate_size", json!(1032))]),
        ("one layer", &[("num_hidden_layers", json!(1))]),
        ("fast rotation", &[("rope_theta", json!(2.0))]),
        ("slow rotation", &[("rope_theta", json!(1e7))]),
    ];
    for (name, edits) in cases {
        check(name, &config(edits), &mut tally);
    }
    tally.print();
}

#[test]
fn many_recursions() {
    let mut tally = Tally::default();
    for recursions in [5, 8] {
        for mor in [
            json!({ "mode": "recursive", "sharing": "cycle" }),
            json!({ "mode": "expert", "sharing": "cycle" }),
            json!({ "mode": "expert", "sharing": "cycle", "kv": "hybrid" }),
            json!({ "mode": "token", "sharing": "cycle" }),
        ] {
            let mut mor = mor;
            mor["num_recursion"] = json!(recursions);
            let config = config(&[("num_hidden_layers", json!(recursions)), ("mor", mor)]);
            check(&format!("{recursions} recursions: {}", config["mor"]), &config, &mut tally);
        }
    }
    tally.print();
}

/// Beyond what the kernels were made for: works, or says which limit stands in the way.
#[test]
fn extreme_shapes_never_panic() {
    let token = |recursions: usize, kind: &str| {
        let mor = json!({ "mode": "token", "sharing": "cycle", "num_recursion": recursions, "router_type": kind });
        vec![("num_hidden_layers", json!(recursions)), ("mor", mor)]
    };
    let cases: Vec<(&str, Vec<(&str, Value)>)> = vec![
        ("head_dim 512", vec![("head_dim", json!(512))]),
        ("head_dim 2048", vec![("head_dim", json!(2048))]),
        ("64 heads on one", vec![("num_attention_heads", json!(64))]),
        ("256 heads on one", vec![("num_attention_heads", json!(256))]),
        ("hidden_size 16384", vec![("hidden_size", json!(16384))]),
        ("intermediate_size 65536", vec![("intermediate_size", json!(65536))]),
        ("one token", vec![("vocab_size", json!(1))]),
        ("vocabulary of 300000", vec![("vocab_size", json!(300_000))]),
        ("16 recursions", token(16, "linear")),
        ("256 recursions", token(256, "linear")),
        ("33 recursions", token(33, "mlp")),
        ("100 recursions", token(100, "linear")),
    ];
    for (name, edits) in cases {
        let config = MorConfig::from_json_str(&config(&edits).to_string(), name).expect("the config is valid");
        let checkpoint = Checkpoint::random(config, 0, Dtype::BF16);
        let outcome = Session::on_gpu(parity::gpu().clone(), &checkpoint, Precision::F32).and_then(|mut session| {
            let forward = session.forward(&[vec![0; 9]], Routing::Causal)?;
            assert!(forward.sequences[0].logits.iter().all(|logit| logit.is_finite()), "{name}");
            let request = GenerateRequest { max_new_tokens: 3, ignore_eos: true, ..GenerateRequest::new(vec![0]) };
            session.generate(&request)?.try_for_each(|event| event.map(drop))
        });
        match outcome {
            Ok(()) => println!("{name}: runs"),
            Err(error) => {
                println!("{name}: {error}");
                let limit =
                    matches!(&error, RuntimeError::Kernel(KernelError::Limit { .. } | KernelError::OutOfMemory { .. }));
                assert!(limit, "{name}: {error:?}");
            }
        }
        parity::gpu().check().expect("the device raised no error");
    }
}
