//! What people get for input that cannot be used: one sentence and exit code 2. Nothing here computes on a device.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn mor(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mor"));
    command.env_remove("MOR_DEVICE").env_remove("RUST_LOG").args(args);
    command.output().expect("the program starts")
}

/// Checks that `args` are refused in one sentence that contains all of `words`.
fn refused(args: &[&str], words: &[&str]) {
    let output = mor(args);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
    assert!(output.stdout.is_empty(), "{args:?} printed something");
    assert!(message.starts_with("error: ") && message.ends_with('\n'), "{args:?}: {message}");
    assert_eq!(message.lines().count(), 1, "{args:?}: {message}");
    for word in words {
        assert!(message.contains(word), "{args:?}: {word:?} is not in: {message}");
    }
}

fn accepted(args: &[&str]) -> String {
    let output = mor(args);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {message}");
    String::from_utf8(output.stdout).unwrap()
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn model(name: &str) -> String {
    root().join("models").join(name).display().to_string()
}

/// A model without a tokenizer: 97 tokens, context 128 or so.
fn golden(name: &str) -> PathBuf {
    root().join("mor-model/tests/fixtures/golden").join(name)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

#[test]
fn arguments_that_do_not_exist() {
    refused(&["generate", "--no-such-option"], &["--no-such-option"]);
    refused(&["generate", "--top-q", "1"], &["--top-q", "did you mean '--top-"]);
    refused(&["generat"], &["generat", "did you mean 'generate'?"]);
    refused(&["generate", "--dtype", "f8"], &["f8", "--dtype"]);
    refused(&["generate", "--kv", "none"], &["none", "--kv"]);
    refused(&["generate", "a", "b"], &["'b'"]);
    refused(&["forward"], &["--model", "--tokens", "--out"]);
    refused(&["eval"], &["--text"]);
    assert_eq!(mor(&[]).status.code(), Some(2));
}

#[test]
fn help_and_version_are_no_errors() {
    assert!(accepted(&["--help"]).contains("generate"));
    assert!(accepted(&["generate", "--help"]).contains("--show-depth"));
    assert!(accepted(&["--version"]).starts_with("mor "));
}

#[test]
fn sampling_parameters_out_of_range() {
    refused(&["generate", "--top-p", "0"], &["--top-p is 0", "above 0"]);
    refused(&["generate", "--top-p", "1.5"], &["--top-p is 1.5"]);
    refused(&["generate", "--temperature", "-1"], &["--temperature is -1"]);
    refused(&["generate", "--temperature", "nan"], &["--temperature is NaN"]);
    refused(&["generate", "--temperature", "hot"], &["hot", "--temperature"]);
    refused(&["generate", "--min-p", "2"], &["--min-p is 2"]);
    refused(&["generate", "--repeat-penalty", "0"], &["--repeat-penalty is 0"]);
    refused(&["generate", "--top-k", "-3"], &["-3", "--top-k"]);
    refused(&["generate", "--seed", "x"], &["x", "--seed"]);
    refused(&["generate", "--max-new-tokens", "0"], &["0", "--max-new-tokens"]);
    refused(&["generate", "--stop", ""], &["--stop is an empty text"]);
}

#[test]
fn generations_beyond_the_context() {
    refused(&["generate", "--max-new-tokens", "1024"], &["1025 tokens", "1024", "--max-new-tokens"]);
    let tokens = vec!["1"; 1025].join(",");
    refused(&["generate", "--prompt-tokens", &tokens], &["the prompt has 1025 tokens", "1024"]);
}

#[test]
fn prompt_tokens_that_are_none() {
    refused(&["generate", "--prompt-tokens", "1,4096"], &["--prompt-tokens[1]", "4096", "0..4095"]);
    refused(&["generate", "--prompt-tokens", "-1"], &["--prompt-tokens[0]", "-1"]);
    refused(&["generate", "--prompt-tokens", "1,x"], &["'x' is not a token id"]);
    refused(&["generate", "--prompt-tokens", "99999999999999999999"], &["is not a token id"]);
    refused(&["generate", "a", "--prompt-tokens", "1"], &["cannot be used with"]);
}

#[test]
fn prompt_files_that_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prompt.txt");
    refused(&["generate", "--prompt-file", text(&path)], &["cannot read", "prompt.txt"]);
    fs::write(&path, b"caf\xe9").unwrap();
    refused(&["generate", "--prompt-file", text(&path)], &["prompt.txt: not UTF-8 text at byte 3"]);
    fs::write(&path, b"\n").unwrap();
    refused(&["generate", "--prompt-file", text(&path)], &["prompt.txt: the prompt file is empty"]);
    refused(&["generate", "--prompt-file", text(folder.path())], &["cannot read"]);
    refused(&["generate", "a", "--prompt-file", text(&path)], &["cannot be used with"]);
}

#[test]
fn models_that_are_none() {
    refused(&["generate", "--model", "no/such/folder"], &["no/such/folder: does not exist", "config.json"]);
    refused(&["inspect", "no/such/folder"], &["no/such/folder: does not exist"]);
    refused(&["inspect", text(&root().join("Cargo.toml"))], &["is not a folder"]);
    let folder = tempfile::tempdir().unwrap();
    let name = text(folder.path());
    refused(&["generate", "--model", name], &["cannot read", "config.json"]);
    fs::write(folder.path().join("config.json"), "{").unwrap();
    refused(&["generate", "--model", name], &["config.json: not a JSON object"]);
    fs::write(folder.path().join("config.json"), r#"{ "vocab_size": 0 }"#).unwrap();
    refused(&["inspect", name], &["config.json: vocab_size is 0"]);
}

#[test]
fn weights_that_are_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let source = golden("vanilla_gqa");
    fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
    refused(&["inspect", text(folder.path())], &["neither model.safetensors nor model.safetensors.index.json"]);
    let weights = fs::read(source.join("model.safetensors")).unwrap();
    fs::write(folder.path().join("model.safetensors"), &weights[..weights.len() - 8]).unwrap();
    refused(&["inspect", text(folder.path())], &["model.safetensors: holds", "copy or download"]);
}

#[test]
fn text_without_a_tokenizer() {
    let folder = golden("vanilla_gqa");
    let folder = text(&folder);
    refused(&["generate", "Once", "--model", folder], &["no tokenizer.json", "--prompt-tokens"]);
    refused(&["generate", "--prompt-tokens", "1", "--stop", "a", "--model", folder], &["--stop needs a tokenizer"]);
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/valid-40.txt");
    refused(&["eval", "--text", fixture, "--model", folder], &["no tokenizer.json"]);
}

#[test]
fn options_that_contradict_the_model_or_each_other() {
    let token = model("tinystories-mor-token-5m");
    refused(&["generate", "--kv", "hybrid", "--model", &token], &["hybrid", "expert choice"]);
    let config = root().join("models/tinystories-mor-token-5m/config.json");
    refused(&["generate", "--random-weights", text(&config), "--model", &token], &["cannot be used with"]);
    refused(&["generate", "--random-weights", text(&config), "Once"], &["no tokenizer.json"]);
}

#[test]
fn batches_that_cannot_be_run() {
    let folder = tempfile::tempdir().unwrap();
    let model = golden("vanilla_gqa");
    let (model, out) = (text(&model), folder.path().join("out.safetensors"));
    let batch = folder.path().join("in.safetensors");
    let forward = |batch: &Path, out: &Path, words: &[&str]| {
        refused(&["forward", "--model", model, "--tokens", text(batch), "--out", text(out)], words);
    };
    forward(&batch, &out, &["cannot read", "in.safetensors"]);
    fs::write(&batch, "nonsense").unwrap();
    forward(&batch, &out, &["in.safetensors: not a safetensors file"]);
    let good = golden("vanilla_gqa").join("tokens.safetensors");
    forward(&good, &folder.path().join("no/out.safetensors"), &["its folder does not exist"]);
    forward(&good, folder.path(), &["is a folder"]);
    assert!(!out.exists());
}

#[test]
fn documents_that_are_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text.txt");
    let eval = |documents: &str, words: &[&str]| {
        refused(&["eval", "--text", text(&path), "--documents", documents], words);
    };
    eval("0..1", &["cannot read", "text.txt"]);
    fs::write(&path, "").unwrap();
    eval("0..1", &["text.txt: there is no text"]);
    fs::write(&path, "one\n<|endoftext|>\n").unwrap();
    eval("0..2", &["text.txt has 1 document,"]);
    eval("1..1", &["1..1", "A below B"]);
    eval("1", &["expected A..B"]);
    fs::write(&path, b"\xff").unwrap();
    eval("0..1", &["text.txt: not UTF-8 text at byte 0"]);
}

#[test]
fn models_are_described_without_a_device() {
    let table = accepted(&["inspect"]);
    assert!(table.contains("expert, 3 recursions, sharing middle_cycle"), "{table}");
    let json: serde_json::Value = serde_json::from_str(&accepted(&["inspect", "--json"])).unwrap();
    assert_eq!(json["layers"].as_array().unwrap().len(), 11);
    let json = accepted(&["inspect", "--json", text(&golden("recursive_sequence_r3_share"))]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["sharing"], "sequence");
    assert_eq!(json["kv"], "sharing");
}

#[test]
fn adapters_are_listed() {
    let json: serde_json::Value = serde_json::from_str(&accepted(&["devices", "--json"])).unwrap();
    for (index, adapter) in json.as_array().unwrap().iter().enumerate() {
        assert_eq!(adapter["index"], index);
    }
    accepted(&["devices"]);
}
