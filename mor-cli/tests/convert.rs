//! `mor convert`: what it prints, and that what it refuses is one sentence, exit code 2 and no trace.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../mor-model/tests/fixtures")
}

fn mor(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mor"));
    command
        .env("XDG_RUNTIME_DIR", std::env::temp_dir())
        .current_dir(dir)
        .args(args)
        .output()
        .expect("the program starts")
}

fn accepted(dir: &Path, args: &[&str]) -> String {
    let output = mor(dir, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Refused in one sentence, and nothing is there that was not before.
#[track_caller]
fn refused(dir: &Path, args: &[&str], words: &[&str]) {
    let names = || {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    let output = mor(dir, args);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
    assert!(message.starts_with("error: ") && message.lines().count() == 1, "{args:?}: {message}");
    for word in words {
        assert!(message.contains(word), "{args:?}: {word:?} is not in: {message}");
    }
    assert_eq!(names(), before, "{args:?}");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

#[test]
fn runs_are_converted_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let official = fixtures().join("official");
    let report = accepted(dir.path(), &["convert", text(&official), "ours"]);
    for words in
        ["(official)\n", "model          expert, 2 recursions, sharing middle_cycle\n", "ours: ", "tied           "]
    {
        assert!(report.contains(words), "{words:?} is not in: {report}");
    }
    let args = ["convert", "ours", "shards", "--dtype", "bf16", "--max-shard-size", "50KB", "--json"];
    let report: Value = serde_json::from_str(&accepted(dir.path(), &args)).unwrap();
    assert_eq!((&report["source"], &report["mode"]), (&json!("mor"), &json!("expert")));
    assert!(report["files"].as_array().unwrap().len() > 1 && report["tied"].as_array().unwrap().is_empty());

    // The whole way round: official, ours, official, ours, and the model is the golden one.
    accepted(dir.path(), &["convert", "ours", "back", "--to", "official"]);
    assert!(dir.path().join("back/back.yaml").is_file());
    accepted(dir.path(), &["convert", "back", "again"]);
    for name in ["config.json", "model.safetensors"] {
        let read = |folder: &str| fs::read(dir.path().join(folder).join(name)).unwrap();
        if name == "model.safetensors" {
            assert_eq!(read("ours"), read("again"));
        }
        assert!(!read("again").is_empty());
    }
    let layers = |model: &str| {
        let inspected: Value = serde_json::from_str(&accepted(dir.path(), &["inspect", model, "--json"])).unwrap();
        (inspected["layers"].clone(), inspected["parameters"].clone(), inspected["capacity"].clone())
    };
    assert_eq!(layers("again"), layers(text(&fixtures().join("golden/expert_middle_cycle_r2"))));
}

#[test]
fn starts_are_marked_wherever_they_are_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 128, "tie_word_embeddings": true,
    });
    let golden = fixtures().join("golden/vanilla_gqa");
    fs::create_dir(dir.path().join("llama")).unwrap();
    fs::write(dir.path().join("llama/config.json"), config.to_string()).unwrap();
    fs::copy(golden.join("model.safetensors"), dir.path().join("llama/model.safetensors")).unwrap();
    let args = ["convert", "llama", "start", "--sharing", "cycle", "--num-recursions", "3", "--init", "upper"];
    let output = mor(dir.path(), &args);
    let (report, message) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success() && message.contains("note: the routers are new"), "{message}");
    assert!(report.contains("(llama)") && report.contains("layer 0        from 2\n"), "{report}");
    assert!(accepted(dir.path(), &["inspect", "start"]).contains("untrained"));
    let inspected: Value = serde_json::from_str(&accepted(dir.path(), &["inspect", "start", "--json"])).unwrap();
    assert_eq!((&inspected["untrained_router"], &inspected["mode"]), (&json!(true), &json!("expert")));

    accepted(dir.path(), &["convert", "llama", "same", "--sharing", "none"]);
    let same: Value = serde_json::from_slice(&fs::read(dir.path().join("same/config.json")).unwrap()).unwrap();
    assert_eq!(same, config);

    let convert =
        |args: &[&str], words: &[&str]| refused(dir.path(), &[&["convert", "llama", "out"], args].concat(), words);
    convert(&["--sharing", "cycle"], &["--sharing is cycle without --num-recursions"]);
    convert(&["--num-recursions", "3"], &["--sharing"]);
    convert(&["--sharing", "circle"], &["'circle'", "middle_cycle"]);
    convert(&["--sharing", "middle_cycle", "--num-recursions", "3"], &["num_hidden_layers = 3"]);
    convert(&["--dtype", "q8"], &["'q8'", "bf16"]);
    convert(&["--max-shard-size", "5 potatoes"], &["5 potatoes", "5GB"]);
    convert(&["--to", "gguf"], &["'gguf'", "official"]);
    convert(&["--config", "absent.yaml"], &["cannot read absent.yaml"]);
    refused(dir.path(), &["convert", "llama", "start"], &["start: exists, expected the name of a new folder"]);
    refused(dir.path(), &["convert", "llama", "no/out"], &["there is no folder no to write it in"]);
    refused(dir.path(), &["convert", "absent", "out"], &["absent: does not exist"]);
}

/// A pickle that runs a command when Python loads it.
#[test]
fn hostile_pickles_run_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let official = fixtures().join("official");
    fs::create_dir(dir.path().join("run")).unwrap();
    fs::copy(official.join("malicious.bin"), dir.path().join("run/pytorch_model.bin")).unwrap();
    fs::copy(official.join("run.yaml"), dir.path().join("run/run.yaml")).unwrap();
    let words = ["pytorch_model.bin: the pickle asks for posix.system", "nothing was executed"];
    refused(dir.path(), &["convert", "run", "out"], &words);
    assert!(!dir.path().join("executed-by-pickle").exists());
    // Other commands want a folder of this program and say how to get one.
    refused(dir.path(), &["inspect", "run"], &["cannot read run/config.json"]);
}
