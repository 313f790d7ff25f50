//! What people get for input that cannot be used: one sentence and exit code 2. Nothing here computes on a device.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mor"));
    command.env_remove("MOR_DEVICE").env_remove("RUST_LOG").env("MOR_CACHE_DIR", "").args(args);
    // Without it Mesa adds lines of its own to standard error.
    command.env("XDG_RUNTIME_DIR", std::env::temp_dir()).env("XDG_CONFIG_HOME", "/nonexistent");
    command
}

fn mor(args: &[&str]) -> Output {
    command(args).output().expect("the program starts")
}

/// Checks that `args` are refused in one sentence that contains all of `words`.
fn refused(args: &[&str], words: &[&str]) {
    check_refusal(&mor(args), args, words);
}

fn check_refusal(output: &Output, args: &[&str], words: &[&str]) {
    let message = std::str::from_utf8(&output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
    assert!(output.stdout.is_empty(), "{args:?} printed something");
    assert!(message.starts_with("error: ") && message.ends_with('\n'), "{args:?}: {message}");
    assert_eq!(message.lines().count(), 1, "{args:?}: {message}");
    for word in words {
        assert!(message.contains(word), "{args:?}: {word:?} is not in: {message}");
    }
}

/// As [`refused`], by a program with one more environment variable.
fn refused_with((name, value): (&str, &str), args: &[&str], words: &[&str]) {
    check_refusal(&command(args).env(name, value).output().expect("the program starts"), args, words);
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
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/valid-40.txt");
    for command in [&["generate"][..], &["eval", "--text", fixture]] {
        refused(&[command, &["--kv", "hybrid", "--model", &token]].concat(), &["hybrid", "expert choice"]);
    }
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

/// A copy of a golden case that tests may damage, with the bytes of its weights.
struct Copied {
    folder: tempfile::TempDir,
    header: serde_json::Map<String, Value>,
    data: Vec<u8>,
}

impl Copied {
    fn of(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::copy(golden(name).join("config.json"), folder.path().join("config.json")).unwrap();
        let file = fs::read(golden(name).join("model.safetensors")).unwrap();
        let (length, rest) = file.split_at(8);
        let (header, data) = rest.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
        Self { folder, header: serde_json::from_slice(header).unwrap(), data: data.to_vec() }
    }

    fn edit_config(&self, edit: impl FnOnce(&mut Value)) {
        let path = self.folder.path().join("config.json");
        let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        edit(&mut config);
        fs::write(path, config.to_string()).unwrap();
    }

    fn write_weights(&self) {
        let header = serde_json::to_vec(&self.header).unwrap();
        let length = (header.len() as u64).to_le_bytes();
        fs::write(self.folder.path().join("model.safetensors"), [&length, &header[..], &self.data].concat()).unwrap();
    }

    /// Every command that opens a model refuses this one alike.
    fn refused(&self, words: &[&str]) {
        let folder = text(self.folder.path());
        let tokens = golden("vanilla_gqa").join("tokens.safetensors");
        let out = self.folder.path().join("out.safetensors");
        refused(&["inspect", folder], words);
        refused(&["generate", "--model", folder, "--prompt-tokens", "1"], words);
        refused(&["generate", "--model", folder, "--prompt-tokens", "1", "--json"], words);
        refused(&["forward", "--model", folder, "--tokens", text(&tokens), "--out", text(&out)], words);
        let names: Vec<_> = fs::read_dir(self.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(names.iter().all(|name| !name.to_string_lossy().contains("out")), "{names:?}");
    }
}

const Q_PROJ: &str = "model.layers.0.self_attn.q_proj.weight";

#[test]
fn tensors_that_do_not_fit_the_configuration() {
    let mut model = Copied::of("vanilla_gqa");
    model.header[Q_PROJ]["shape"] = json!([32, 128]);
    model.write_weights();
    model.refused(&[Q_PROJ, "[32, 128]", "expected [64, 64]"]);

    let mut model = Copied::of("vanilla_gqa");
    // An integer of the same size, so that nothing else is wrong.
    let integer = if model.header[Q_PROJ]["dtype"] == "F32" { "I32" } else { "I16" };
    model.header[Q_PROJ]["dtype"] = json!(integer);
    model.write_weights();
    model.refused(&[Q_PROJ, &format!("element type {integer}, expected F32, F16 or BF16")]);

    let mut model = Copied::of("vanilla_gqa");
    let tensor = model.header.remove(Q_PROJ).unwrap();
    model.header.insert("model.layers.0.self_attn.query.weight".to_owned(), tensor.clone());
    model.write_weights();
    model.refused(&["tensor model.layers.0.self_attn.query.weight has no place in a vanilla model"]);

    // Its bytes stay as those of a buffer that is tolerated.
    model.header.remove("model.layers.0.self_attn.query.weight");
    model.header.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), tensor);
    model.write_weights();
    model.refused(&[&format!("tensor {Q_PROJ} [64, 64] is missing")]);
}

#[test]
fn weights_that_are_no_numbers_are_named() {
    for (pattern, shown) in [(0x7fc0_0000_u32, "NaN"), (0xff80_0000, "-inf")] {
        let mut model = Copied::of("vanilla_gqa");
        let start = model.header[Q_PROJ]["data_offsets"][0].as_u64().unwrap() as usize;
        let bytes = pattern.to_le_bytes();
        // The upper half alone is the same number in bfloat16.
        let bytes = if model.header[Q_PROJ]["dtype"] == "BF16" { &bytes[2..] } else { &bytes[..] };
        model.data[start + 3 * bytes.len()..][..bytes.len()].copy_from_slice(bytes);
        model.write_weights();
        model.refused(&["model.safetensors", Q_PROJ, &format!("{shown} at element 3")]);
    }
}

#[test]
fn configurations_that_contradict_themselves() {
    let case = "expert_middle_cycle_r3";
    let check = |edit: &dyn Fn(&mut Value), words: &[&str]| {
        let model = Copied::of(case);
        model.write_weights();
        model.edit_config(edit);
        model.refused(words);
    };
    check(&|c| c["num_hidden_layers"] = json!(9), &["num_hidden_layers = 9", "multiple of mor.num_recursion = 3"]);
    check(&|c| c["mor"]["mode"] = json!("experts"), &["mor.mode is \"experts\"", "expected", "token"]);
    check(&|c| c["mor"]["sharing"] = json!("middle"), &["mor.sharing is \"middle\"", "middle_cycle"]);
    check(&|c| c["mor"]["kv"] = json!("none"), &["mor.kv is \"none\"", "recursion_wise"]);
    check(&|c| c["mor"]["router_func"] = json!("softmax"), &["mor.router_func", "contradicts mor.mode = expert"]);
    check(&|c| c["mor"]["capacity"] = json!([1.0, 0.5]), &["mor.capacity is [1.0,0.5]"]);
    check(&|c| c["mor"]["depth"] = json!(3), &["mor.depth is not a known field"]);
    check(&|c| c["num_key_value_heads"] = json!(3), &["num_key_value_heads = 3 contradicts num_attention_heads"]);
    check(&|c| c["model_type"] = json!("qwen2"), &["model_type is \"qwen2\"", "llama or mor"]);
    check(&|c| c["vocab_size"] = json!("many"), &["vocab_size is \"many\""]);
    check(&|c| drop(c.as_object_mut().unwrap().remove("hidden_size")), &["hidden_size is missing"]);
    // A configuration that is fine by itself, but not that of these weights.
    check(&|c| c["intermediate_size"] = json!(88), &["gate_proj.weight has shape", "expected [88, 64]"]);
    check(&|c| c["mor"]["router_type"] = json!("mlp"), &["router"]);
}

#[test]
fn tokenizers_of_another_model() {
    let model = Copied::of("vanilla_gqa");
    model.write_weights();
    let path = model.folder.path().join("tokenizer.json");
    fs::copy(root().join("models/tinystories-mor-expert-5m/tokenizer.json"), &path).unwrap();
    let folder = text(model.folder.path());
    let words = ["tokenizer.json: the tokenizer has 4096 entries, but the model embeds 97"];
    refused(&["generate", "Once", "--model", folder], &words);
    refused(&["generate", "--prompt-tokens", "1", "--model", folder], &words);
    fs::write(&path, "{}").unwrap();
    refused(&["generate", "Once", "--model", folder], &["tokenizer.json: not a usable tokenizer"]);
    fs::write(&path, b"\xff\xfe").unwrap();
    refused(&["generate", "Once", "--model", folder], &["tokenizer.json: not a usable tokenizer"]);
}

#[test]
fn machines_without_an_adapter() {
    // The Vulkan loader then finds no driver, whatever the machine has.
    let none = ("VK_DRIVER_FILES", "/nonexistent");
    if accepted_with(none, &["devices", "--json"]).trim() != "[]" {
        eprintln!("skipped: there are adapters that are not Vulkan's");
        return;
    }
    let words = ["no GPU adapter answers on this machine", "found: none", "install"];
    refused_with(none, &["generate", "Once"], &words);
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/valid-40.txt");
    refused_with(none, &["eval", "--text", fixture], &words);
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let tokens = golden("vanilla_gqa").join("tokens.safetensors");
    let model = golden("vanilla_gqa");
    let files = ["--model", text(&model), "--tokens", text(&tokens), "--out", text(&out)];
    refused_with(none, &[&["forward"], &files[..]].concat(), &words);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is written");
    assert_eq!(accepted_with(none, &["devices"]), "", "the table of nothing");
}

fn accepted_with((name, value): (&str, &str), args: &[&str]) -> String {
    let output = command(args).env(name, value).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn adapters_that_do_not_exist() {
    if std::env::var_os("MOR_TEST_GPU").is_some_and(|value| value == "skip") {
        eprintln!("skipped: MOR_TEST_GPU=skip");
        return;
    }
    refused(&["generate", "Once", "--device", "99"], &["no GPU adapter has index 99; found: 0 "]);
    refused(&["generate", "Once", "--device", "voodoo"], &["no GPU adapter is named like \"voodoo\"; found: 0 "]);
}

/// Refused by its sizes before anything is uploaded, hence at once.
#[test]
fn models_larger_than_the_adapter() {
    if std::env::var_os("MOR_TEST_GPU").is_some_and(|value| value == "skip") {
        eprintln!("skipped: MOR_TEST_GPU=skip");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let config = json!({
        "model_type": "llama", "vocab_size": 128000, "hidden_size": 16384, "intermediate_size": 53248,
        "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false, "eos_token_id": 0,
    });
    fs::write(&path, config.to_string()).unwrap();
    let start = std::time::Instant::now();
    let words = ["the model needs 81", " bytes on \"", "for weights", "use "];
    refused(&["generate", "--random-weights", text(&path), "--dtype", "f16"], &words);
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
    // Shapes that the kernels do not run are refused as early.
    let config = json!({
        "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 1, "head_dim": 512, "rms_norm_eps": 1e-5, "eos_token_id": 0,
    });
    fs::write(&path, config.to_string()).unwrap();
    refused(&["generate", "--random-weights", text(&path)], &["attention: head_dim = 512 exceeds 256"]);
}

#[test]
fn benchmarks_that_cannot_be_run() {
    let config = |name: &str| root().join("benches/configs").join(name).display().to_string();
    let (vanilla, routed) = (config("360m-vanilla.json"), config("360m-mor-r3.json"));
    let throughput = |args: &[&str], words: &[&str]| refused(&[&["bench", "throughput"], args].concat(), words);
    throughput(&[], &["--config", "--model"]);
    throughput(&["--config", &routed, "--model", &model("tinystories-mor-expert-5m")], &["cannot be used with"]);
    let words =
        ["360m-vanilla.json", "mode vanilla with sharing none", "expected mode expert with sharing middle_cycle"];
    throughput(&["--config", &vanilla], &words);
    throughput(&["--model", &model("tinystories-mor-token-5m")], &["mode token with sharing middle_cycle"]);
    throughput(&["--config", "no-such.json"], &["no-such.json"]);
    throughput(&["--config", &routed, "--modes", "vanilla,deepest"], &["deepest", "--modes"]);
    throughput(&["--model", &model("tinystories-mor-expert-5m"), "--modes", "vanilla"], &["--modes has vanilla"]);
    throughput(&["--config", &routed, "--slots", "32,0"], &["'0'", "--slots", "from 1 to 1000000, or max"]);
    throughput(&["--config", &routed, "--slots", "32", "--requests", "32"], &["--requests is 32", "the 32 slots"]);
    throughput(&["--config", &routed, "--slots", &usize::MAX.to_string()], &["--slots"]);
    throughput(&["--config", &routed, "--mean-new", "nan"], &["'nan'", "--mean-new", "0 or more"]);
    throughput(&["--config", &routed, "--output", "xml"], &["xml", "--output"]);
    refused(&["bench", "thruput"], &["thruput", "did you mean 'throughput'?"]);
}

#[test]
fn prompts_that_are_no_text_or_too_long() {
    // Standard input is held to the same as a file.
    let pipe = |bytes: &[u8]| {
        use std::io::Write;
        let mut child = command(&["generate", "-"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // A program that has already refused may have closed the pipe.
        let _ = child.stdin.take().unwrap().write_all(bytes);
        child.wait_with_output().unwrap()
    };
    check_refusal(&pipe(b"Once \xf0\x9f"), &["generate", "-"], &["standard input: not UTF-8 text at byte 5"]);
    let most = usize::MAX.to_string();
    refused(&["generate", "Once", "--max-new-tokens", &most], &["tokens, but the model's context holds 1024"]);
    refused(&["generate", "Once", "--max-new-tokens", "99999999999999999999999"], &["--max-new-tokens"]);
}

/// Names in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn quantised_folders_are_whole_or_absent() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let source = golden("expert_middle_cycle_r3");
    let args =
        |source: &Path, out: &Path, to: &str| ["quantize", text(source), text(out), "--to", to].map(str::to_owned);
    let refused = |args: &[String], words: &[&str]| {
        refused(&args.iter().map(String::as_str).collect::<Vec<_>>(), words);
        assert_eq!(names(folder.path()), [""; 0], "{args:?}");
    };
    refused(&args(&source, &out, "q8")[..3], &["--to"]);
    refused(&args(&source, &out, "q5"), &["'q5'", "q8, q4"]);
    refused(&args(&folder.path().join("nowhere"), &out, "q8"), &["nowhere: does not exist"]);
    refused(&args(&source, &folder.path().join("no/out"), "q8"), &["there is no folder", "no to write it in"]);
    let mut model = Copied::of("vanilla_gqa");
    model.data.truncate(1000);
    model.write_weights();
    refused(&args(model.folder.path(), &out, "q8"), &["model.safetensors: holds"]);

    let run = |args: [String; 5]| mor(&args.iter().map(String::as_str).collect::<Vec<_>>());
    for to in ["q8", "q4"] {
        let out = folder.path().join(to);
        let output = run(args(&source, &out, to));
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{message}");
        let report = String::from_utf8(output.stdout).unwrap();
        assert!(report.contains(&format!("{to}: {to}, ")) && report.ends_with(" before\n"), "{report}");
        assert_eq!(names(&out), ["config.json", "model.safetensors"]);
        let inspected: Value =
            serde_json::from_slice(&mor(&["inspect", text(&out), "--json"]).stdout).expect("it can be inspected");
        assert_eq!(inspected["quantization"], to);
        assert_eq!(inspected["weights"].as_array().unwrap().len(), 2);

        let again = folder.path().join("again");
        let refused = |args: &[&str], words: &[&str]| check_refusal(&mor(args), args, words);
        refused(&["quantize", text(&out), text(&again), "--to", "q4"], &["quantised as", to, "already"]);
        refused(&["quantize", text(&source), text(&out), "--to", to], &["exists, expected the name of a new folder"]);
        let prompt = ["generate", "--model", text(&out), "--prompt-tokens", "1", "--quantize", "q8"];
        refused(&prompt, &["quantised as", to, "already"]);
    }
    assert_eq!(names(folder.path()), ["q4", "q8"]);
}
