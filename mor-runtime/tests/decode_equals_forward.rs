//! Cached decoding of ragged batches equals the full causal forward pass, and both equal the CPU oracle, for every
//! combination of mode, sharing, K/V strategy and router that a configuration allows.

mod common;

use common::batch::{Tally, check_at_depths, check_case};
use common::{TinyModel, VOCAB, llama_config, runner_options};
use mor_kernels::gpu::{Gpu, GpuOptions};
use mor_kernels::ops::GpuSampling;
use mor_kernels::parity::{self, Rng};
use mor_model::golden::GoldenTensors;
use mor_model::{DepthControl, Dtype, Precision, Routing};
use mor_runtime::Session;
use mor_runtime::runner::{Feed, Runner, Work};
use serde_json::{Value, json};

/// Runs all cases of a mode. Sizes, element types and key splits take turns, since they multiply with nothing here.
fn check_all(configs: impl IntoIterator<Item = Value>) {
    let mut tally = Tally::default();
    let heads = [(2, 2), (4, 2), (3, 1)];
    for (i, mor) in configs.into_iter().enumerate() {
        let recursions = mor["num_recursion"].as_u64().unwrap_or(1) as usize;
        let middle = mor["sharing"].as_str().is_some_and(|sharing| sharing.starts_with("middle"));
        let block = 1 + (i / 2) % 2;
        let (num_heads, kv_heads) = heads[i % 3];
        let num_layers = recursions * block + if middle { 2 } else { 0 };
        let mut config = llama_config(num_layers, num_heads, kv_heads);
        config["tie_word_embeddings"] = json!(i % 5 != 0);
        config["mor"] = mor;
        let dtype = [Dtype::F32, Dtype::BF16, Dtype::F16][(i / 3) % 3];
        check_case(parity::gpu(), &config, dtype, [1, 2, 4][(i / 7) % 3], &mut tally);
    }
    tally.print();
}

/// Every way to take one value from each list.
fn product(lists: &[(&str, &[Value])]) -> Vec<Value> {
    let mut all = vec![json!({})];
    for (name, values) in lists {
        let extended = |mor: &Value| -> Vec<Value> {
            let with = |value: &Value| {
                let mut mor = mor.clone();
                mor[*name] = value.clone();
                mor
            };
            values.iter().map(with).collect()
        };
        all = all.iter().flat_map(extended).collect();
    }
    all
}

fn strings(names: &[&str]) -> Vec<Value> {
    names.iter().map(|name| json!(name)).collect()
}

#[test]
fn vanilla_and_fixed_depth() {
    let vanilla = std::iter::repeat_n(json!({ "mode": "vanilla" }), 9);
    let recursive = product(&[
        ("mode", &strings(&["recursive"])),
        ("sharing", &strings(&["cycle", "sequence", "middle_cycle", "middle_sequence"])),
        ("kv", &strings(&["recursion_wise", "sharing"])),
        ("num_recursion", &[json!(2), json!(3), json!(4)]),
    ]);
    check_all(vanilla.chain(recursive));
}

#[test]
fn expert_choice() {
    let configs = product(&[
        ("mode", &strings(&["expert"])),
        ("sharing", &strings(&["cycle", "middle_cycle"])),
        ("kv", &strings(&["recursion_wise", "sharing", "hybrid"])),
        ("router_type", &strings(&["linear", "mlp", "wide_mlp"])),
        ("router_func", &[json!("sigmoid"), json!("tanh"), json!(null)]),
        ("gating", &strings(&["weighted", "additive"])),
        ("sampling", &[json!("aux_loss"), json!("aux_router")]),
        ("capacity", &[json!(null), json!(0.9)]),
    ]);
    check_all(configs.into_iter().enumerate().map(|(i, mut mor)| {
        let recursions = 2 + i / 2 % 3;
        mor["num_recursion"] = json!(recursions);
        // The default keeps every token at the first step; the other value drops some already there.
        if let Some(first) = mor["capacity"].as_f64() {
            mor["capacity"] = json!((0..recursions).map(|r| first - 0.2 * r as f64).collect::<Vec<_>>());
        }
        mor["alpha"] = json!([0.1, 1.0][i / 3 % 2]);
        mor["temp"] = json!([1.0, 0.5, 2.0][i / 5 % 3]);
        if i % 11 == 0 && mor["sampling"] == "aux_loss" {
            mor["sampling"] = json!(null);
        }
        mor
    }));
}

#[test]
fn token_choice() {
    let configs = product(&[
        ("mode", &strings(&["token"])),
        ("sharing", &strings(&["cycle", "middle_cycle"])),
        ("kv", &strings(&["recursion_wise", "sharing"])),
        ("router_type", &strings(&["linear", "mlp", "wide_mlp"])),
        ("router_func", &strings(&["softmax", "sigmoid"])),
        ("gating", &strings(&["weighted", "additive"])),
        ("balancing", &[json!("loss"), json!("loss_free")]),
        ("num_recursion", &[json!(2), json!(3), json!(4)]),
    ]);
    check_all(configs.into_iter().enumerate().map(|(i, mut mor)| {
        mor["alpha"] = json!([1.0, 0.3][i / 3 % 2]);
        mor["temp"] = json!([1.0, 0.5, 2.0][i / 5 % 3]);
        if i % 11 == 0 && mor["balancing"] == "loss" {
            mor["balancing"] = json!(null);
        }
        mor
    }));
}

/// Fewer recursions, other thresholds, and both, for every kind of router that decides and of K/V strategy.
#[test]
fn controlled_depths() {
    let expert = product(&[
        ("mode", &strings(&["expert"])),
        ("sharing", &strings(&["cycle", "middle_cycle"])),
        ("kv", &strings(&["recursion_wise", "sharing", "hybrid"])),
        ("router_type", &strings(&["linear", "mlp"])),
        ("sampling", &[json!("aux_loss"), json!("aux_router")]),
        ("capacity", &[json!([0.9, 0.7, 0.5]), json!([1.0, 0.7, 0.5])]),
        ("num_recursion", &[json!(3)]),
    ]);
    let token = product(&[
        ("mode", &strings(&["token"])),
        ("sharing", &strings(&["cycle", "middle_cycle"])),
        ("kv", &strings(&["recursion_wise", "sharing"])),
        ("router_type", &strings(&["linear", "mlp"])),
        ("balancing", &[json!("loss"), json!("loss_free")]),
        ("num_recursion", &[json!(3)]),
    ]);
    let controls = [
        (Some(1), 0.0),
        (Some(2), 0.0),
        (None, 0.15),
        (None, -0.15),
        (Some(2), 0.15),
        (Some(2), -0.15),
        (Some(1), 2.0),
        (None, 2.0),
    ];
    let mut tally = Tally::default();
    for (i, mor) in expert.into_iter().chain(token).enumerate() {
        for (max_depth, router_bias) in [controls[i % 8], controls[(i + 3) % 8]] {
            let config = sample_config(mor.clone(), (4, 2));
            let depth = DepthControl { max_depth, router_bias };
            let name = format!("{config} {depth:?}");
            check_at_depths(parity::gpu(), &name, [1, 2, 4][i % 3], depth, &mut tally, |rng| {
                TinyModel::random(config.clone(), rng).checkpoint(Dtype::F32).expect("the tiny model is complete")
            });
        }
    }
    tally.print();
}

/// One configuration of each kind of routing and K/V strategy.
fn sample() -> Vec<Value> {
    let expert = |sharing: &str, kv: &str, rest: Value| {
        let mut mor = json!({ "mode": "expert", "sharing": sharing, "kv": kv, "num_recursion": 3 });
        rest.as_object().expect("an object").iter().for_each(|(name, value)| mor[name] = value.clone());
        mor
    };
    let capacity = json!([0.9, 0.7, 0.5]);
    vec![
        json!({ "mode": "vanilla" }),
        json!({ "mode": "recursive", "sharing": "middle_sequence", "kv": "sharing", "num_recursion": 2 }),
        expert("middle_cycle", "recursion_wise", json!({ "alpha": 1.0, "router_type": "mlp" })),
        expert("cycle", "sharing", json!({ "router_func": "tanh", "capacity": capacity })),
        expert("middle_cycle", "hybrid", json!({ "sampling": "aux_router", "capacity": capacity })),
        json!({ "mode": "token", "sharing": "middle_cycle", "num_recursion": 3, "router_type": "mlp" }),
        json!({ "mode": "token", "sharing": "cycle", "kv": "sharing", "num_recursion": 2,
            "router_func": "sigmoid", "balancing": "loss_free" }),
    ]
}

fn sample_config(mor: Value, (num_heads, kv_heads): (usize, usize)) -> Value {
    // Six shared layers: they divide by two and by three.
    let middle = mor["sharing"].as_str().is_some_and(|sharing| sharing.starts_with("middle"));
    let mut config = llama_config(if middle { 8 } else { 6 }, num_heads, kv_heads);
    config["mor"] = mor;
    config
}

/// The row that ends a prompt attends by itself in the last layer; into how many parts its keys are split, page by page, changes
/// no more than rounding.
#[test]
fn prompts_end_alike_however_keys_are_split() {
    let mut rng = Rng::new("prompts that end with split keys");
    let tokens: Vec<u32> = (0..150).map(|_| rng.below(VOCAB) as u32).collect();
    for mor in sample() {
        let what = mor.to_string();
        let model = TinyModel::random(sample_config(mor, (4, 2)), &mut rng);
        let checkpoint = model.checkpoint(Dtype::F32).expect("the tiny model is sound");
        let mut session =
            Session::on_gpu(parity::gpu().clone(), &checkpoint, Precision::F32).expect("the tiny model fits");
        let forward = session.forward(std::slice::from_ref(&tokens), Routing::Causal).expect("runs");
        let expected = &forward.sequences[0].logits[(tokens.len() - 1) * VOCAB..];
        for num_splits in [1, 2, 8] {
            let options = runner_options(1, tokens.len(), tokens.len());
            let mut runner = Runner::new(session.model(), &options).expect("fits");
            runner.set_key_splits(Some(num_splits));
            let sampling = GpuSampling { limit: tokens.len() as u32, ..GpuSampling::default() };
            runner.start(0, &sampling, [], None);
            let feeds = [Feed { sequence: 0, position: 0, tokens: &tokens, sample: true }];
            let work = Work { feeds: &feeds, ..Work::default() };
            runner.submit(session.model(), &work).expect("runs").wait().expect("reads");
            let logits = runner.logits(session.model(), false).expect("reads");
            let found = &logits.iter().find(|(slot, _)| *slot == 0).expect("the prompt has ended").1;
            for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                let close = GoldenTensors::close(*found, *expected);
                assert!(close, "{what}, {num_splits} splits: logit {i} is {found}, expected {expected}");
            }
        }
    }
}

/// Also with run-time checks in the shaders, without subgroups, and within WebGPU's default limits.
#[test]
fn every_device_profile() {
    let mut tally = Tally::default();
    let mut dtypes = [Dtype::BF16, Dtype::F16, Dtype::F32].into_iter().cycle();
    parity::on_every_profile(|gpu, name| {
        let start = std::time::Instant::now();
        let dtype = dtypes.next().expect("endless");
        for (i, mor) in sample().into_iter().enumerate() {
            check_case(gpu, &sample_config(mor, (4, 2)), dtype, [1, 4][i % 2], &mut tally);
        }
        println!("profile {name} as {dtype}: {:.1} s", start.elapsed().as_secs_f32());
    });
    tally.print();
}

/// Weights larger than one storage binding are split by rows, all of them at this size: embedding and head, fused
/// projections, MLP and routers.
#[test]
fn weights_larger_than_a_binding() {
    const BINDING_BYTES: u64 = 24 << 10;
    let gpu = Gpu::open(&GpuOptions {
        device: parity::device(),
        max_binding_bytes: Some(BINDING_BYTES),
        ..GpuOptions::default()
    })
    .expect("a device opens");
    assert_eq!(gpu.caps().max_storage_binding_bytes, BINDING_BYTES);
    let mut tally = Tally::default();
    for mor in sample() {
        let mut config = sample_config(mor, (12, 1));
        config["vocab_size"] = json!(1021);
        config["hidden_size"] = json!(96);
        config["intermediate_size"] = json!(200);
        let bytes = |rows: u64| rows * 96 * 4;
        assert!(bytes(1021) > 5 * BINDING_BYTES && bytes(96 + 16) > BINDING_BYTES && bytes(200) > BINDING_BYTES);
        check_case(&gpu, &config, Dtype::F32, 1, &mut tally);
    }
    gpu.check().expect("the device raised no error");
    tally.print();
}
