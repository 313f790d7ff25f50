//! What the program says and prints, word by word: help, refusals, and the shape of all JSON. A change shows as a difference
//! to `tests/snapshots/`; `INSTA_UPDATE=always cargo test -p mor-cli --test snapshots` takes it over.

mod common;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use common::{accepted, command, gpu, root, run, stderr, stdout};
use serde_json::Value;

/// Compares with the file of that name.
fn check(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

#[test]
fn help_of_every_command() {
    let mut waiting = vec![Vec::new()];
    while let Some(path) = waiting.pop() {
        let args: Vec<&str> = path.iter().map(String::as_str).chain(["--help"]).collect();
        let help = accepted(&args);
        check(&["help"].into_iter().chain(path.iter().map(String::as_str)).collect::<Vec<_>>().join("_"), &help);
        // Its commands are listed in a paragraph, a name at the beginning of each line.
        let Some((_, rest)) = help.split_once("\nCommands:\n") else { continue };
        let names = rest.lines().take_while(|line| !line.is_empty()).filter(|line| !line.starts_with("   "));
        for name in names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help") {
            waiting.push([&path[..], &[name.to_owned()]].concat());
        }
    }
}

#[test]
fn refusals() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    let golden = common::golden("vanilla_gqa");
    for name in ["config.json", "model.safetensors"] {
        write(&format!("model/{name}"), &fs::read(golden.join(name)).unwrap());
    }
    write("damaged/config.json", &fs::read(golden.join("config.json")).unwrap());
    write("damaged/model.safetensors", &fs::read(golden.join("model.safetensors")).unwrap()[..2000]);
    write("bare/config.json", &fs::read(golden.join("config.json")).unwrap());
    write("strange/config.json", br#"{ "model_type": "qwen2" }"#);
    write("broken/config.json", b"{");
    write("latin.txt", b"caf\xe9");
    write("empty.txt", b"");
    write("config.toml", b"\n[generate]\ntemprature = 0\n");
    fs::create_dir(folder.path().join("taken")).unwrap();

    let mut text = String::new();
    let mut refuse = |variables: &[(&str, &str)], line: &str| {
        let args: Vec<&str> = line.split_whitespace().collect();
        let mut command = command(&args);
        command.current_dir(folder.path()).envs(variables.iter().copied());
        let output = run(command, "");
        for (name, value) in variables {
            write!(text, "{name}={value} ").unwrap();
        }
        writeln!(text, "mor {line}\n{}: {}", output.status.code().unwrap(), stderr(&output)).unwrap();
        assert_eq!(stdout(&output), "");
    };
    for line in [
        "generat",
        "generate --top-q 1",
        "generate --dtype f8",
        "generate --temperature hot",
        "generate --temperature -1",
        "generate --top-p 0",
        "generate --max-new-tokens 0",
        "generate --max-new-tokens 5000",
        "generate --prompt-tokens 1,x",
        "generate --prompt-tokens 1,4096",
        "generate --prompt-file nowhere.txt",
        "generate --prompt-file latin.txt",
        "generate --prompt-file empty.txt",
        "generate Once --model nowhere",
        "generate Once --model empty.txt",
        "generate Once --model taken",
        "generate Once --model broken",
        "generate Once --model strange",
        "generate --prompt-tokens 1 --model bare",
        "generate --prompt-tokens 1 --model damaged",
        "generate Once --model model",
        "generate --kv hybrid --model model",
        "chat --model model",
        "chat --context 100000",
        "eval",
        "eval --text nowhere.txt",
        "eval --text empty.txt",
        "eval --text config.toml --documents 3..2",
        "eval --text config.toml --documents 0..9",
        "eval --text config.toml --sweep depth=1..3",
        "generate --max-depth 4",
        "generate --prompt-tokens 1 --router-bias 1 --model model",
        "trace --prompt-tokens 1 --model model",
        "forward --model model",
        "forward --model model --tokens nowhere --out out",
        "batch --input nowhere --output out",
        "inspect nowhere",
        "quantize model taken --to q8",
        "quantize model out --to q5",
        "completions csh",
    ] {
        refuse(&[], line);
    }
    refuse(&[("MOR_CONFIG", "config.toml")], "devices");
    refuse(&[("MOR_CONFIG", "nowhere.toml")], "devices");
    refuse(&[("MOR_DTYPE", "f8")], "generate Once");
    check("refusals", &text);
}

/// Refusals of a device, without the machine's own adapters.
#[test]
fn refusals_of_a_device() {
    if !gpu() {
        return;
    }
    let mut text = String::new();
    for line in ["generate Once --device 99", "generate Once --device voodoo"] {
        let output = run(command(&line.split_whitespace().collect::<Vec<_>>()), "");
        let message = stderr(&output);
        let (before, after) = message.split_once("found: ").expect("it lists what there is");
        let after = after.rsplit_once("; ").map_or("\n", |(_, advice)| advice);
        writeln!(text, "mor {line}\n{}: {before}found: [adapters]; {after}", output.status.code().unwrap()).unwrap();
    }
    check("refusals_of_a_device", &text);
}

/// The type of everything in a value, by its path.
fn types(value: &Value, path: &str, found: &mut BTreeMap<String, &'static str>) {
    let name = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::String(_) => "string",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::Array(values) => {
            values.iter().for_each(|value| types(value, &format!("{path}[]"), found));
            if values.is_empty() { "empty array" } else { "array" }
        }
        Value::Object(entries) => {
            let dot = if path.is_empty() { "" } else { "." };
            entries.iter().for_each(|(key, value)| types(value, &format!("{path}{dot}{key}"), found));
            "object"
        }
    };
    let known = found.entry(path.to_owned()).or_insert(name);
    // What may be absent has the type that it has where it is there.
    if *known == "null" {
        *known = name;
    }
}

fn schema(text: &str) -> String {
    let mut found = BTreeMap::new();
    for value in serde_json::Deserializer::from_str(text).into_iter::<Value>() {
        types(&value.unwrap_or_else(|error| panic!("{error}: {text}")), "", &mut found);
    }
    let line = |(path, name): (String, &str)| format!("{}: {name}\n", if path.is_empty() { "." } else { &path });
    found.into_iter().map(line).collect()
}

#[test]
fn shapes_of_json() {
    let expert = common::golden("expert_middle_cycle_r3");
    check("json_inspect", &schema(&accepted(&["inspect", "--json"])));
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let quantize = ["quantize", common::text(&expert), common::text(&out), "--to", "q8", "--json"];
    check("json_quantize", &schema(&accepted(&quantize)));
    if !gpu() {
        return;
    }
    check(
        "json_generate",
        &schema(&accepted(&["generate", "Once", "--max-new-tokens", "4", "--quantize", "q8", "--json"])),
    );
    let fixture = root().join("mor-cli/tests/fixtures/valid-40.txt");
    let eval = ["eval", "--text", common::text(&fixture), "--documents", "0..1", "--quantize", "q8", "--json"];
    check("json_eval", &schema(&accepted(&eval)));
    let sweep = ["--sweep", "max-depth=1..1"];
    check("json_eval_sweep", &schema(&accepted(&[&eval[..], &sweep].concat())));
    let trace = ["trace", "Once", "--max-new-tokens", "4", "--dtype", "f32", "--quantize", "q8", "--json"];
    check("json_trace", &schema(&accepted(&trace)));
    let chat = run(command(&["chat", "--json", "--max-new-tokens", "4"]), "Once\n");
    check("json_chat", &schema(stdout(&chat)));
    let (answers, done) = answers(folder.path());
    check("json_batch", &schema(&answers));
    check("json_batch_done", &schema(&done));
    check("json_devices", &schema(&accepted(&["devices", "--json"])));
}

/// The answers to a file of requests, good and bad, and what is said of them.
fn answers(folder: &Path) -> (String, String) {
    let (input, output) = (folder.join("requests.jsonl"), folder.join("answers.jsonl"));
    fs::write(&input, "{\"id\": \"a\", \"prompt\": \"Once\", \"max_new_tokens\": 4}\n{\"prompt_tokens\": [99999]}\n")
        .unwrap();
    let files = ["--input", common::text(&input), "--output", common::text(&output)];
    let batch = run(command(&[&["batch", "--json"], &files[..]].concat()), "");
    assert_eq!(batch.status.code(), Some(2), "{}", stderr(&batch));
    (fs::read_to_string(output).unwrap(), stdout(&batch).to_owned())
}
