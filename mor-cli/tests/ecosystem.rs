//! The program among others: config file, environment, logs, completions, manual pages.

mod common;

use std::fs;
use std::process::Output;

use common::{accepted, command, golden, gpu, run, stderr, stdout, text};
use serde_json::Value;

/// A run beside a config file and variables.
fn configured(file: &str, variables: &[(&str, &str)], args: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    fs::write(&path, file).unwrap();
    let mut command = command(args);
    command.env("MOR_CONFIG", &path).envs(variables.iter().copied());
    run(command, "")
}

/// Checks that a run is refused in one sentence with `words`.
fn refused(output: &Output, words: &[&str]) {
    let message = stderr(output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.starts_with("error: ") && message.lines().count() == 1, "{message}");
    assert!(words.iter().all(|word| message.contains(word)), "{words:?}: {message}");
}

#[test]
fn what_is_not_given_is_looked_for_nearby() {
    let model = |output: &Output| {
        let inspected: Value = serde_json::from_str(stdout(output)).unwrap_or_else(|_| panic!("{}", stderr(output)));
        inspected["model"].as_str().unwrap().to_owned()
    };
    let (vanilla, expert, token) =
        (golden("vanilla_gqa"), golden("expert_middle_cycle_r3"), golden("token_cycle_r3_lossfree_sigmoid"));
    let file = format!("[inspect]\nmodel = {:?}\njson = true\n", text(&vanilla));
    assert_eq!(model(&configured(&file, &[], &["inspect"])), text(&vanilla));
    let variables = [("MOR_MODEL", text(&expert))];
    assert_eq!(model(&configured(&file, &variables, &["inspect"])), text(&expert));
    assert_eq!(model(&configured(&file, &variables, &["inspect", text(&token)])), text(&token));
    // An empty variable is an unset one.
    assert_eq!(model(&configured(&file, &[("MOR_MODEL", "")], &["inspect"])), text(&vanilla));

    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("mor")).unwrap();
    fs::write(folder.path().join("mor/config.toml"), file).unwrap();
    let mut inspect = command(&["inspect"]);
    inspect.env("XDG_CONFIG_HOME", folder.path());
    assert_eq!(model(&run(inspect, "")), text(&vanilla));
}

#[test]
fn mistakes_in_settings_have_a_place() {
    refused(&configured("\nmodle = 'a'", &[], &["devices"]), &["config.toml:2: 'modle' is no option"]);
    refused(
        &configured("[generate]\ntop-k = true", &[], &["devices"]),
        &["config.toml:2: 'top-k' has a value of type boo"],
    );
    refused(&configured("dtype = 'f8'", &[], &["generate"]), &["config.toml:1: invalid value 'f8'", "auto, f32, f16"]);
    refused(&configured("dtype", &[], &["generate"]), &["config.toml:1: not TOML"]);
    refused(&configured("", &[("MOR_QUANTIZE", "q5")], &["generate"]), &["MOR_QUANTIZE: invalid value 'q5'"]);
    refused(&configured("temperature = -1", &[], &["generate"]), &["--temperature is -1"]);
    let mut command = command(&["devices"]);
    command.env("MOR_CONFIG", "/nonexistent/config.toml");
    refused(&run(command, ""), &["cannot read /nonexistent/config.toml"]);
    // Help is there all the same.
    assert!(configured("nonsense", &[], &["eval", "--help"]).status.success());
}

#[test]
fn settings_reach_the_model() {
    if !gpu() {
        return;
    }
    let file = "temperature = 0\nmax-new-tokens = 3\n[generate]\njson = true\nstop = ['never', 'ever']\n";
    let output = configured(file, &[("MOR_QUANTIZE", "q8"), ("MOR_DTYPE", "f32")], &["generate", "Once upon a time"]);
    let report: Value = serde_json::from_str(stdout(&output)).unwrap_or_else(|_| panic!("{}", stderr(&output)));
    assert_eq!(report["tokens"].as_array().unwrap().len(), 3);
    assert_eq!((&report["quantization"], &report["dtype"]), (&"q8".into(), &"f32".into()));
    let absent = configured("device = 'voodoo'", &[], &["generate", "Once"]);
    refused(&absent, &["no GPU adapter is named like \"voodoo\""]);
}

#[test]
fn logs_tell_what_happens() {
    if !gpu() {
        return;
    }
    let mut generate = command(&["generate", "Once", "--max-new-tokens", "2"]);
    generate.env("RUST_LOG", "mor_runtime=debug,mor_kernels=debug,mor_model=debug");
    let output = run(generate, "");
    let log = stderr(&output);
    for event in
        ["opened checkpoint", "loaded the model", "compiled", "recorded the plan of a decode step", "a sequence starts"]
    {
        assert!(log.contains(event), "{event:?} is not in: {log}");
    }
    assert!(!log.contains('\x1b'), "{log:?}");
    assert!(!stdout(&output).contains("DEBUG"));
    // Nothing is drawn where nobody looks.
    let quiet = run(command(&["generate", "Once", "--max-new-tokens", "2", "--show-depth"]), "");
    assert!(!stderr(&quiet).contains(['\r', '\x1b']) && !stdout(&quiet).contains('\x1b'), "{}", stderr(&quiet));
}

#[test]
fn shells_complete_commands() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = accepted(&["completions", shell]);
        assert!(script.contains("throughput") && script.contains("max-new-tokens"), "{shell}");
    }
    refused(&run(command(&["completions", "csh"]), ""), &["csh", "bash"]);
}

#[test]
fn every_command_has_a_manual_page() {
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("man1");
    assert_eq!(accepted(&["man", text(&pages)]), "");
    for name in ["mor", "mor-generate", "mor-chat", "mor-bench-throughput"] {
        let page = fs::read_to_string(pages.join(name).with_extension("1")).expect(name);
        assert!(page.contains(".TH ") && page.contains("Exit codes: 0 done"), "{name}");
    }
    let page = fs::read_to_string(pages.join("mor-generate.1")).unwrap();
    assert!(page.contains("MOR_MODEL") && page.contains("max\\-new\\-tokens"), "{page}");
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    refused(&run(command(&["man", text(&file)]), ""), &["cannot write to", "file"]);
}

#[test]
fn quantised_folders_are_reported_as_json() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let report = accepted(&["quantize", text(&golden("vanilla_gqa")), text(&out), "--to", "q8", "--json"]);
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!((&report["out"], &report["quantization"]), (&text(&out).into(), &"q8".into()));
    assert!(report["bytes"].as_u64() < report["bytes_before"].as_u64());
    assert!(out.join("model.safetensors").exists());
}
