//! Cached decoding of ragged batches equals the full causal forward pass, and both equal the CPU oracle, for every
//! combination of mode, sharing, K/V strategy and router that a configuration allows.
//!
//! Models are tiny and random. A seed counts only if no decision (router threshold, depth, greedy token) is closer
//! than [`MARGIN`], so that routing and tokens can be demanded exactly. `MOR_TEST_SEED` shifts the seeds.

mod common;

use common::{TinyModel, llama_config};
use mor_kernels::gpu::{Gpu, GpuOptions};
use mor_kernels::ops::GpuSampling;
use mor_kernels::parity::{self, Rng};
use mor_model::golden::GoldenTensors;
use mor_model::oracle::{Oracle, OracleOutput};
use mor_model::{Dtype, KvStrategy, Mode, MorConfig, MorModel, Precision, Routing};
use mor_runtime::runner::{Feed, Runner};
use mor_runtime::{SequenceOutput, Session};
use serde_json::{Value, json};

/// Least distance of a decision: far above the rounding of f32, which is about 1e-6 here.
const MARGIN: f32 = 1e-3;
/// Prompts of the ragged batch.
const PROMPTS: [usize; 3] = [13, 1, 6];
/// New tokens of each sequence; the second one is taken out before the others end.
const NEW_TOKENS: [usize; 3] = [9, 7, 10];

/// What happened over all cases, to be sure that they were not all alike.
#[derive(Default)]
struct Tally {
    cases: usize,
    rejected_seeds: usize,
    depth_counts: [usize; 5],
    largest: f32,
}

/// Sequences and what the oracle says of them: tokens are the prompt and its greedy continuation.
struct Reference {
    tokens: [Vec<u32>; 3],
    outputs: [OracleOutput; 3],
}

fn argmax(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap_or(0)
}

/// Distance between the two largest values.
fn lead(values: &[f32]) -> f32 {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    sorted[0] - sorted[1]
}

/// Least distance of any routing decision in `out`.
fn routing_margin(config: &MorConfig, bias: &[f32], out: &OracleOutput) -> f32 {
    let mut least = f32::INFINITY;
    match config.mode {
        Mode::Expert => {
            let decisive = if out.aux_logits.is_empty() { &out.router_logits } else { &out.aux_logits };
            for (r, logits) in decisive.iter().enumerate().filter(|(r, _)| config.capacity[*r] < 1.0) {
                let active = |t: usize| r == 0 || out.selected[r - 1][t];
                let distances = (0..logits.len()).filter(|t| active(*t)).map(|t| logits[t].abs());
                least = distances.fold(least, f32::min);
            }
        }
        Mode::Token => {
            for gates in out.router_weights[0].chunks(config.num_recursions) {
                let scores: Vec<f32> =
                    gates.iter().enumerate().map(|(i, g)| g + bias.get(i).copied().unwrap_or(0.0)).collect();
                least = least.min(lead(&scores));
            }
        }
        Mode::Vanilla | Mode::Recursive => {}
    }
    least
}

/// The oracle's greedy continuation of random prompts; `None` if a decision is too close.
fn reference(config: &MorConfig, bias: &[f32], oracle: &Oracle, rng: &mut Rng) -> Option<Reference> {
    let vocab_size = config.vocab_size;
    let mut tokens = PROMPTS.map(|len| (0..len).map(|_| rng.below(vocab_size) as u32).collect::<Vec<_>>());
    for (tokens, num_new) in tokens.iter_mut().zip(NEW_TOKENS) {
        let mut cache = oracle.new_cache();
        let mut logits = oracle.feed(&mut cache, tokens, Routing::Causal).expect("ids are in range").logits;
        for _ in 0..num_new {
            let last = &logits[logits.len() - vocab_size..];
            if lead(last) < MARGIN {
                return None;
            }
            tokens.push(argmax(last) as u32);
            let token = [tokens[tokens.len() - 1]];
            logits = oracle.feed(&mut cache, &token, Routing::Causal).expect("ids are in range").logits;
        }
    }
    // The last token is never fed.
    tokens.iter_mut().for_each(|tokens| drop(tokens.pop()));
    let outputs = tokens.each_ref().map(|tokens| oracle.forward(tokens, Routing::Causal).expect("ids are in range"));
    let clear = outputs.iter().all(|out| routing_margin(config, bias, out) >= MARGIN);
    clear.then_some(Reference { tokens, outputs })
}

fn assert_close(what: &str, found: &[f32], expected: &[f32], largest: &mut f32) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(GoldenTensors::close(*found, *expected), "{what}: element {i} is {found}, expected {expected}");
        *largest = largest.max((found - expected).abs());
    }
}

/// Everything of a forward pass that is defined, against the oracle.
fn check_forward(what: &str, config: &MorConfig, found: &SequenceOutput, want: &OracleOutput, largest: &mut f32) {
    assert_eq!(found.depth, want.depth, "{what}: depths");
    assert_close(&format!("{what}: logits"), &found.logits, &want.logits, largest);
    assert_close(&format!("{what}: hidden"), &found.hidden, &want.hidden, largest);
    assert_eq!(found.selected, want.selected, "{what}: selected");
    let num_tokens = want.depth.len();
    for r in 0..want.selected.len() {
        let width = config.hidden_size;
        for t in 0..num_tokens {
            // Rows of token choice that ended earlier are compared where they ended.
            if config.mode == Mode::Expert || want.selected[r][t] {
                let row = t * width..(t + 1) * width;
                let what = format!("{what}: block_out.{r} of token {t}");
                assert_close(&what, &found.block_out[r][row.clone()], &want.block_out[r][row], largest);
            }
        }
    }
    let routers = [
        ("router_logits", &found.router_logits, &want.router_logits),
        ("router_weights", &found.router_weights, &want.router_weights),
        ("aux_logits", &found.aux_logits, &want.aux_logits),
    ];
    for (name, found, expected) in routers {
        assert_eq!(found.len(), expected.len(), "{what}: {name}");
        for (r, (found, expected)) in found.iter().zip(expected).enumerate() {
            let width = config.router_outputs();
            // Tokens that have left have no router values.
            for t in (0..num_tokens).filter(|t| r == 0 || want.selected[r - 1][*t]) {
                let row = t * width..(t + 1) * width;
                let what = format!("{what}: {name}.{r} of token {t}");
                assert_close(&what, &found[row.clone()], &expected[row], largest);
            }
        }
    }
}

/// Feeds the batch in uneven chunks and decodes it greedily; every number against the oracle's full pass.
fn check_decode(what: &str, model: &MorModel, num_splits: u32, reference: &Reference, largest: &mut f32) {
    let (config, layout) = (model.config(), model.kv_layout());
    let mut runner = Runner::new(model, 3, 64, 10).expect("fits");
    runner.set_key_splits(Some(num_splits));
    for (sequence, len) in PROMPTS.into_iter().enumerate() {
        let prompt = &reference.tokens[sequence][..len];
        runner.start(model, sequence, &GpuSampling { ignore_eos: 1, ..GpuSampling::default() }, prompt);
    }
    // Tokens of each sequence whose successor has been drawn.
    let mut lengths = [0; 3];
    let mut check_logits = |runner: &Runner, was_decode: bool, drawn: &[usize], lengths: &[usize; 3]| {
        let found = runner.logits(model, was_decode, 64).expect("reads");
        assert_eq!(found.len(), drawn.len(), "{what}: rows of logits");
        for (found, sequence) in found.iter().zip(drawn) {
            let position = lengths[*sequence] - 1;
            let expected = &reference.outputs[*sequence].logits[position * config.vocab_size..][..config.vocab_size];
            assert_close(&format!("{what}: decode {sequence} position {position}"), found, expected, largest);
        }
    };
    // Sequences 1 and 2 begin to decode while the prompt of sequence 0 is still being read.
    let feeds: [&[(usize, usize, usize)]; 3] =
        [&[(0, 0, 5), (2, 0, 2)], &[(0, 5, 10), (1, 0, 1), (2, 2, 6)], &[(0, 10, 13)]];
    for (step, feeds) in feeds.into_iter().enumerate() {
        let feeds: Vec<_> = feeds
            .iter()
            .map(|&(sequence, position, end)| Feed {
                sequence,
                position,
                tokens: &reference.tokens[sequence][position..end],
                sample: end == PROMPTS[sequence],
            })
            .collect();
        runner.feed(model, &feeds).expect("runs");
        let drawn: Vec<usize> = feeds.iter().filter(|feed| feed.sample).map(|feed| feed.sequence).collect();
        drawn.iter().for_each(|&sequence| lengths[sequence] = PROMPTS[sequence]);
        check_logits(&runner, false, &drawn, &lengths);
        if step == 1 {
            runner.decode(model, 64).expect("runs");
            [1, 2].into_iter().for_each(|sequence| lengths[sequence] += 1);
            check_logits(&runner, true, &[1, 2], &lengths);
        }
    }
    loop {
        let mut running = Vec::new();
        for sequence in 0..3 {
            if lengths[sequence] == reference.tokens[sequence].len() {
                runner.stop(model, sequence);
            } else {
                running.push(sequence);
                lengths[sequence] += 1;
            }
        }
        if running.is_empty() {
            break;
        }
        runner.decode(model, 64).expect("runs");
        check_logits(&runner, true, &running, &lengths);
    }

    let mut rows_by_recursion = vec![0; config.num_recursions];
    for (sequence, tokens) in reference.tokens.iter().enumerate() {
        let what = format!("{what}: decode {sequence}");
        let outcomes = runner.outcomes(model, sequence, 0..tokens.len()).expect("reads").wait().expect("reads");
        let depths: Vec<u32> = outcomes.iter().map(|outcome| outcome.depth).collect();
        assert_eq!(depths, reference.outputs[sequence].depth, "{what}: depths");
        let prompt = PROMPTS[sequence];
        let drawn: Vec<u32> = outcomes[prompt - 1..tokens.len() - 1].iter().map(|o| o.next_token).collect();
        assert_eq!(drawn, tokens[prompt..], "{what}: tokens");

        // K/V entries are the selected tokens, and bytes follow from them.
        let entries = runner.kv_entries(model, sequence).expect("reads");
        assert_eq!(entries, layout.entries_per_layer(&depths), "{what}: K/V entries");
        let count = |r: usize| depths.iter().filter(|depth| **depth > r as u32).count();
        for (layer, entries) in entries.iter().enumerate() {
            let expected = match (model.layout().recursion(layer), config.kv) {
                (None, _) => tokens.len(),
                (Some(0), KvStrategy::Sharing | KvStrategy::Hybrid) => tokens.len(),
                (Some(_), KvStrategy::Sharing) => 0,
                (Some(r), _) => count(r as usize),
            };
            assert_eq!(*entries, expected, "{what}: K/V entries of layer {layer}");
        }
        let fractions: Vec<f64> = (0..config.num_recursions).map(|r| count(r) as f64 / tokens.len() as f64).collect();
        let bytes = layout.bytes_per_token(&fractions, 4).model * tokens.len() as f64;
        let expected = (entries.iter().sum::<usize>() * 2 * config.kv_dim() * 4) as f64;
        assert!((bytes - expected).abs() <= 1e-6 * expected, "{what}: {bytes} bytes of K/V, expected {expected}");

        for (r, rows) in rows_by_recursion.iter_mut().enumerate() {
            let runs_all = r == 0 && config.mode == Mode::Expert && config.kv != KvStrategy::RecursionWise;
            *rows += if runs_all { tokens.len() } else { count(r) } as u64;
        }
    }
    if config.mode != Mode::Vanilla {
        assert_eq!(runner.rows_processed(model).expect("reads"), rows_by_recursion, "{what}: rows processed");
    }
}

/// Checks one configuration with the first seed whose decisions are clear.
fn check_case(gpu: &Gpu, config: &Value, dtype: Dtype, num_splits: u32, tally: &mut Tally) {
    for attempt in 0..200 {
        let what = format!("{config} {dtype} splits {num_splits} attempt {attempt}");
        let mut rng = Rng::new(&what);
        let tiny = TinyModel::random(config.clone(), &mut rng);
        let checkpoint = tiny.checkpoint(dtype).expect("the tiny model is complete");
        let parsed = checkpoint.config().clone();
        let oracle = Oracle::new(&checkpoint);
        let bias = checkpoint.router(0).and_then(|router| router.bias).map(|id| checkpoint.to_f32(id));
        let Some(reference) = reference(&parsed, &bias.unwrap_or_default(), &oracle, &mut rng) else {
            tally.rejected_seeds += 1;
            continue;
        };
        tally.cases += 1;
        for depth in reference.outputs.iter().flat_map(|out| &out.depth) {
            tally.depth_counts[*depth as usize] += 1;
        }
        let mut session = Session::on_gpu(gpu.clone(), &checkpoint, Precision::F32).expect("the tiny model fits");
        let forward = session.forward(&reference.tokens, Routing::Causal).expect("runs");
        for (i, (found, want)) in forward.sequences.iter().zip(&reference.outputs).enumerate() {
            check_forward(&format!("{what}: forward {i}"), &parsed, found, want, &mut tally.largest);
        }
        check_decode(&what, session.model(), num_splits, &reference, &mut tally.largest);
        return;
    }
    panic!("{config}: no seed of 200 has clear decisions");
}

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
    println!(
        "{} cases, {} seeds with unclear decisions, tokens by depth {:?}, largest difference {:.2e}",
        tally.cases, tally.rejected_seeds, tally.depth_counts, tally.largest
    );
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
    println!("{} cases, largest difference {:.2e}", tally.cases, tally.largest);
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
    println!("{} cases, largest difference {:.2e}", tally.cases, tally.largest);
}
