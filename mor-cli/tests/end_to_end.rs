//! The program on a device, against recorded results of the reference. `MOR_TEST_GPU=skip` leaves these out.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use mor_model::Mode;
use mor_model::golden::{GoldenCase, GoldenTensors, fixtures_dir};
use serde_json::Value;

const MODELS: [&str; 2] = ["tinystories-mor-expert-5m", "tinystories-mor-token-5m"];
const PROMPT: &str = "Once upon a time, there was a little";

/// Whether to run tests that need a device; says so where not.
fn gpu() -> bool {
    let skip = std::env::var_os("MOR_TEST_GPU").is_some_and(|value| value == "skip");
    if skip {
        eprintln!("skipped: MOR_TEST_GPU=skip");
    }
    !skip
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mor"));
    command.env_remove("RUST_LOG").env("MOR_CACHE_DIR", "").args(args);
    // Without it Mesa adds lines of its own to standard error.
    command.env("XDG_RUNTIME_DIR", std::env::temp_dir()).env("XDG_CONFIG_HOME", "/nonexistent");
    command
}

fn run(args: &[&str]) -> Output {
    let output = command(args).output().expect("the program starts");
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {message}");
    output
}

fn stdout(args: &[&str]) -> String {
    String::from_utf8(run(args).stdout).unwrap()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&stdout(args)).unwrap()
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn model(name: &str) -> PathBuf {
    root().join("models").join(name)
}

fn golden_json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(model(name).join("golden.json")).unwrap()).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

#[test]
fn trained_models_continue_as_the_reference() {
    if !gpu() {
        return;
    }
    for name in MODELS {
        for expected in golden_json(name)["greedy"].as_array().unwrap() {
            let new = expected["generated_ids"].as_array().unwrap().len().to_string();
            let prompt = expected["prompt"].as_str().unwrap();
            let folder = model(name);
            let options = ["--model", text(&folder), "--temperature", "0", "--dtype", "f32", "--json"];
            let found = json(&[&["generate", prompt, "--max-new-tokens", &new], &options[..]].concat());
            assert_eq!(found["prompt_tokens"], expected["prompt_ids"], "{name}: {prompt}");
            assert_eq!(found["tokens"], expected["generated_ids"], "{name}: {prompt}");
            assert_eq!(found["depths"], expected["depths"], "{name}: {prompt}");
            assert_eq!(found["text"], expected["text"], "{name}: {prompt}");
            assert_eq!(found["kv_entries"], expected["cache_entries_per_layer"], "{name}: {prompt}");
            let ends = expected["generated_ids"].as_array().unwrap().last() == Some(&Value::from(0));
            assert_eq!(found["finish_reason"], if ends { "eos" } else { "length" }, "{name}: {prompt}");
            assert!(found["timings"]["decode_tokens_per_s"].as_f64().unwrap() > 0.0);
        }
    }
}

#[test]
fn trained_models_score_as_the_reference() {
    if !gpu() {
        return;
    }
    let documents = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/valid-40.txt");
    for name in MODELS {
        let expected = &golden_json(name)["nll"];
        let folder = model(name);
        let found = json(&["eval", "--model", text(&folder), "--text", text(&documents), "--json"]);
        assert_eq!(found["predicted_tokens"], expected["predicted_tokens"], "{name}");
        assert_eq!(found["documents"], expected["documents"], "{name}");
        for (field, tolerance) in [("mean_nll_nats", 1e-4), ("perplexity", 1e-3), ("mean_depth", 2e-5)] {
            let (found, expected) = (found[field].as_f64().unwrap(), expected[field].as_f64().unwrap());
            assert!((found - expected).abs() <= tolerance, "{name}: {field} is {found}, expected {expected}");
        }
    }
}

/// A model that says otherwise computes as the reference does with the strategy that is asked for.
#[test]
fn forward_takes_another_kv_strategy() {
    if !gpu() {
        return;
    }
    let case = GoldenCase::load(fixtures_dir().join("expert_middle_cycle_r3_share")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (config, weights) = (folder.path().join("config.json"), folder.path().join("model.safetensors"));
    let text_of_case = std::fs::read_to_string(case.dir.join("config.json")).unwrap();
    assert!(text_of_case.contains("\"sharing\",") && !text_of_case.contains("recursion_wise"));
    std::fs::write(config, text_of_case.replace("\"sharing\",", "\"recursion_wise\",")).unwrap();
    std::fs::copy(case.dir.join("model.safetensors"), weights).unwrap();
    let (tokens, out) = (case.dir.join("tokens.safetensors"), folder.path().join("out.safetensors"));
    let files = ["--model", text(folder.path()), "--tokens", text(&tokens), "--out", text(&out)];
    run(&[&["forward", "--kv", "sharing"], &files[..]].concat());
    check_tensor(&case, &GoldenTensors::load(&out).unwrap(), "causal.logits", "logits");
}

#[test]
fn forward_writes_what_the_reference_computed() {
    if !gpu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let cases = [
        ("expert_middle_cycle_r2_auxrouter", "causal"),
        ("expert_middle_cycle_r3_capacity_below_one", "causal"),
        ("expert_middle_cycle_r3", "topk"),
        ("token_middle_cycle_r3", "causal"),
        ("recursive_middle_sequence_r2", "causal"),
        ("vanilla_gqa", "causal"),
    ];
    for (name, routing) in cases {
        let case = GoldenCase::load(fixtures_dir().join(name)).unwrap();
        let tokens = case.dir.join("tokens.safetensors");
        let files = ["--model", text(&case.dir), "--tokens", text(&tokens), "--out", text(&out)];
        run(&[&["forward", "--routing", routing], &files[..]].concat());
        let found = GoldenTensors::load(&out).unwrap();
        for full_name in case.expected.names() {
            let Some(tensor) = full_name.strip_prefix(&format!("{routing}.")) else { continue };
            check_tensor(&case, &found, full_name, tensor);
        }
        // Padding is zero.
        let depth = found.int("depth").unwrap();
        for (row, sequence) in case.sequences.iter().enumerate() {
            let row = &depth[row * case.padded_len..][..case.padded_len];
            assert!(row[sequence.len()..].iter().all(|&depth| depth == 0), "{name}");
        }
    }
}

/// Compares a tensor where its values are defined: on tokens; for routers on those still active; for the streams of
/// token choice on those that ran, since the reference shows the input of its last block for one that has ended.
fn check_tensor(case: &GoldenCase, found: &GoldenTensors, full_name: &str, tensor: &str) {
    let at = |what: &str| format!("{}: {full_name}: {what}", case.name);
    let shape = case.expected.shape(full_name).unwrap();
    assert_eq!(found.shape(tensor).unwrap(), shape, "{}", at("shape"));
    let width: usize = shape[2..].iter().product();
    let (kind, recursion) = tensor.split_once('.').unwrap_or((tensor, "0"));
    let recursion: usize = recursion.parse().unwrap();
    let prefix = full_name.strip_suffix(tensor).unwrap();
    let decided_by = match kind {
        "router_logits" | "router_weights" | "aux_logits" => recursion.checked_sub(1),
        "block_out" if case.checkpoint.config().mode == Mode::Token => Some(recursion),
        _ => None,
    };
    let active = decided_by.map(|r| case.expected.int(&format!("{prefix}selected.{r}")).unwrap());
    for (row, sequence) in case.sequences.iter().enumerate() {
        for position in 0..sequence.len() {
            let token = row * case.padded_len + position;
            if active.is_some_and(|active| active[token] == 0) {
                continue;
            }
            for elem in token * width..(token + 1) * width {
                let what = at(&format!("sequence {row}, position {position}"));
                if matches!(kind, "depth" | "selected") {
                    let (found, expected) = (found.int(tensor).unwrap(), case.expected.int(full_name).unwrap());
                    assert_eq!(found[elem], expected[elem], "{what}");
                } else {
                    let (found, expected) =
                        (found.f32(tensor).unwrap()[elem], case.expected.f32(full_name).unwrap()[elem]);
                    assert!(GoldenTensors::close(found, expected), "{what}: {found}, expected {expected}");
                }
            }
        }
    }
}

#[test]
fn text_streams_without_the_prompt() {
    if !gpu() {
        return;
    }
    let options = ["--temperature", "0", "--max-new-tokens", "8"];
    let expected = golden_json(MODELS[0])["greedy"][0]["text"].as_str().unwrap().to_owned();
    let output = run(&[&["generate", PROMPT], &options[..]].concat());
    let shown = String::from_utf8(output.stdout).unwrap();
    let shown = shown.strip_suffix('\n').unwrap();
    assert!(shown.len() > 8 && expected.starts_with(shown), "{shown:?}");
    let summary = String::from_utf8(output.stderr).unwrap();
    assert!(summary.contains("8 tokens (length), prefill "), "{summary}");
    assert!(summary.contains("mean depth "), "{summary}");

    // The same prompt by other ways.
    let mut child = command(&[&["generate", "-"], &options[..]].concat())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(format!("{PROMPT}\n").as_bytes()).unwrap();
    assert_eq!(String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap(), format!("{shown}\n"));
    let ids = "505,478,259,425,12,412,290,259,413";
    assert_eq!(stdout(&[&["generate", "--prompt-tokens", ids], &options[..]].concat()), format!("{shown}\n"));
}

#[test]
fn depths_are_marked_where_there_are_no_colours() {
    if !gpu() {
        return;
    }
    let args = ["generate", PROMPT, "--temperature", "0", "--max-new-tokens", "3", "--show-depth"];
    let output = run(&args);
    let shown = String::from_utf8(output.stdout).unwrap();
    let depths = golden_json(MODELS[0])["greedy"][0]["depths"].clone();
    assert!(shown.starts_with(&format!("Once({}) upon({})", depths[0], depths[1])), "{shown:?}");
    assert!(!shown.contains('\x1b'));
    let legend = String::from_utf8(output.stderr).unwrap();
    assert!(legend.contains("depth 1 ("), "{legend}");
}

#[test]
fn generations_end_and_repeat_as_asked() {
    if !gpu() {
        return;
    }
    let found = json(&["generate", PROMPT, "--temperature", "0", "--stop", "play outside", "--json"]);
    assert_eq!(found["finish_reason"], "stop");
    let text = found["text"].as_str().unwrap();
    assert!(text.ends_with("loved to "), "{text:?}");

    let args = ["generate", PROMPT, "--seed", "7", "--max-new-tokens", "24", "--json"];
    let (first, second) = (json(&args), json(&args));
    assert_eq!(first["tokens"], second["tokens"]);
    assert_eq!(first["seed"], 7);

    // An empty prompt starts from the end-of-text token.
    let found = json(&["generate", "", "--max-new-tokens", "4", "--json"]);
    assert_eq!(found["prompt_tokens"], serde_json::json!([0]));
    assert_eq!(found["depths"].as_array().unwrap().len(), found["tokens"].as_array().unwrap().len());
}

#[test]
fn long_prompts_do_not_depend_on_the_chunk() {
    if !gpu() {
        return;
    }
    let ids: Vec<String> = (0..300).map(|i| (1 + i * 37 % 4095).to_string()).collect();
    let ids = ids.join(",");
    let args = ["generate", "--prompt-tokens", &ids, "--temperature", "0", "--dtype", "f32", "--ignore-eos"];
    let args = [&args[..], &["--max-new-tokens", "8", "--json"]].concat();
    let whole = json(&args);
    for chunk in ["16", "100"] {
        let output = command(&args).env("MOR_PREFILL_CHUNK", chunk).output().unwrap();
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        for field in ["tokens", "depths", "text", "kv_entries"] {
            assert_eq!(found[field], whole[field], "{field} in chunks of {chunk}");
        }
    }
    for chunk in ["0", "many"] {
        let output = command(&args).env("MOR_PREFILL_CHUNK", chunk).output().unwrap();
        let found = String::from_utf8(output.stderr).unwrap();
        let expected = format!("error: MOR_PREFILL_CHUNK is {chunk}, expected 16 or more");
        assert!(found.contains(&expected), "{found}");
    }
}

#[test]
fn models_without_a_tokenizer_give_ids() {
    if !gpu() {
        return;
    }
    let folder = fixtures_dir().join("token_middle_cycle_r3");
    let args = ["generate", "--model", text(&folder), "--prompt-tokens", "1,2,3", "--temperature", "0"];
    let args = [&args[..], &["--max-new-tokens", "4", "--ignore-eos"]].concat();
    let found = json(&[&args[..], &["--json"]].concat());
    assert_eq!(found["text"], Value::Null);
    let ids: Vec<String> = found["tokens"].as_array().unwrap().iter().map(Value::to_string).collect();
    assert_eq!(stdout(&args).split_whitespace().collect::<Vec<_>>(), ids);
}

/// Every run of a report answers all requests with all their tokens, and its numbers agree.
fn check_runs(report: &Value, num_tokens: u64, modes: &[&str]) {
    let runs = report["runs"].as_array().unwrap();
    assert_eq!(runs.iter().map(|run| run["mode"].as_str().unwrap()).collect::<Vec<_>>(), modes);
    for run in runs {
        let of = |path: &str| run.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path} of {run}"));
        let by_depth: Vec<u64> = serde_json::from_value(run["tokens_by_depth"].clone()).unwrap();
        assert_eq!(run["whole"]["tokens"], num_tokens, "{run}");
        assert_eq!(by_depth.iter().sum::<u64>(), num_tokens, "{run}");
        let passes: u64 = by_depth.iter().zip(0..).map(|(tokens, depth)| tokens * depth).sum();
        assert!((of("/mean_depth") - passes as f64 / num_tokens as f64).abs() < 1e-9, "{run}");
        let rate = of("/whole/tokens") / of("/whole/seconds");
        assert!((of("/whole/tokens_per_s") / rate - 1.0).abs() < 1e-6, "{run}");
        assert!((0.0..=1.0).contains(&of("/whole/occupancy")) && of("/whole/occupancy") > 0.3, "{run}");
        assert!((0.0..=1.0).contains(&of("/whole/scheduling")), "{run}");
        assert!(of("/kv/peak_used") > 0.0 && of("/kv/peak_used") <= of("/kv/peak_reserved"), "{run}");
        assert_eq!(run["preemptions"], 0, "{run}");
        if !run["time"].is_null() {
            assert!(
                ["device", "prelude", "block", "coda"].iter().all(|part| of(&format!("/time/{part}")) > 0.0),
                "{run}"
            );
        }
    }
}

#[test]
fn throughput_adds_up() {
    if !gpu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let config = serde_json::json!({
        "model_type": "mor", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
        "mor": { "mode": "expert", "sharing": "middle_cycle", "num_recursion": 3 },
    });
    std::fs::write(&path, config.to_string()).unwrap();
    let command = ["bench", "throughput", "--slots", "2", "--requests", "7", "--output", "json"];
    let report = json(&[&command[..], &["--config", text(&path), "--mean-new", "24", "--std-new", "0"]].concat());
    check_runs(&report, 7 * 24, &["vanilla", "recursive", "mor-lockstep", "mor-depthwise"]);
    assert_eq!(report["protocol"]["depths"], "capacities");
    let runs = report["runs"].as_array().unwrap();
    assert_eq!(runs[0]["tokens_by_depth"], serde_json::json!([0, 168]));
    assert_eq!(runs[1]["tokens_by_depth"], serde_json::json!([0, 0, 0, 168]));
    assert_eq!(runs[0]["whole"]["to_vanilla"], 1.0);
    for run in runs {
        let found = |field: &str| run["kv"][field].as_f64().unwrap();
        // A token stores an entry in the layers of every recursion it takes.
        let routed = run["mode"].as_str().unwrap().starts_with("mor");
        let shared = if routed { run["mean_depth"].as_f64().unwrap() / 3.0 } else { 1.0 };
        assert!((found("shared_layers_to_vanilla") - shared).abs() < 1e-9, "{run}");
        assert!((found("to_vanilla") - (2.0 + 6.0 * shared) / 8.0).abs() < 1e-9, "{run}");
        assert_eq!(run["bounds"].is_null(), !routed, "{run}");
        // Capacities 1, 2/3 and 1/3: each depth from 1 on is as likely, and five standard errors of 168 tokens are 0.32.
        let distance = run["mean_depth"].as_f64().unwrap() - 2.0;
        assert!(!routed || run["tokens_by_depth"][0] == 0 && distance.abs() < 0.32, "{run}");
    }
}

#[test]
fn throughput_of_a_model_takes_its_own_depths() {
    if !gpu() {
        return;
    }
    let folder = fixtures_dir().join("expert_middle_cycle_r3");
    let command = ["bench", "throughput", "--slots", "2", "--requests", "5", "--mean-new", "9", "--std-new", "0"];
    let command = [&command[..], &["--model", text(&folder)]].concat();
    let report = json(&[&command[..], &["--output", "json"]].concat());
    check_runs(&report, 5 * 9, &["mor-lockstep", "mor-depthwise"]);
    assert_eq!(report["protocol"]["depths"], "model");
    assert_eq!(report["runs"][0]["whole"]["to_vanilla"], Value::Null);
    let table = stdout(&[&command[..], &["--modes", "mor-depthwise"]].concat());
    let rows: Vec<_> = table.lines().filter(|line| line.starts_with("| mor-depthwise | 2 |")).collect();
    assert_eq!(rows.len(), 2, "{table}");
    let columns = |line: &str| line.matches('|').count();
    let heads: Vec<_> = table.lines().filter(|line| line.starts_with("| mode |")).collect();
    assert!(heads.iter().zip(&rows).all(|(head, row)| columns(head) == columns(row)), "{table}");
}

#[test]
fn quantised_while_loading_or_before_is_the_same() {
    if !gpu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let options = ["--temperature", "0", "--max-new-tokens", "16", "--json"];
    for format in ["q8", "q4"] {
        let (source, out) = (model(MODELS[1]), folder.path().join(format));
        run(&["quantize", text(&source), text(&out), "--to", format]);
        let args = ["generate", PROMPT, "--model", text(&source), "--quantize", format];
        let loaded = json(&[&args[..], &options[..]].concat());
        let written = json(&[&["generate", PROMPT, "--model", text(&out)], &options[..]].concat());
        for field in ["tokens", "depths", "text", "quantization"] {
            assert_eq!(loaded[field], written[field], "{format}: {field}");
        }
        assert_eq!(loaded["quantization"], format);
    }
}

#[test]
fn prompts_beyond_the_context_are_refused() {
    if !gpu() {
        return;
    }
    let output = command(&["generate", &"one ".repeat(2000)]).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.lines().last().unwrap().starts_with("error: the prompt has "), "{message}");
}

/// A generation that would go on for long, after its first text has been read.
fn long_generation() -> (Child, Vec<u8>) {
    let args = ["generate", PROMPT, "--seed", "1", "--ignore-eos", "--max-new-tokens", "1000"];
    let mut child = command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = vec![0; 1];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    (child, first)
}

#[test]
fn a_reader_that_goes_ends_the_generation_quietly() {
    if !gpu() {
        return;
    }
    let (mut child, _) = long_generation();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{message}");
    assert!(!message.contains("error") && !message.contains("panicked"), "{message}");
}

#[cfg(unix)]
#[test]
fn an_interrupted_generation_still_has_its_summary() {
    if !gpu() {
        return;
    }
    let (child, _) = long_generation();
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let output = child.wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{message}");
    assert!(message.lines().last().unwrap().contains("(interrupted), decode "), "{message}");
    assert!(output.stdout.ends_with(b"\n"));
}
