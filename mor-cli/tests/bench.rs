//! `mor bench`, `mor bench compare` and `mor profile` on a small model: every form can be read, every column is there.
//! `MOR_TEST_GPU=skip` leaves out what needs a device.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

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
    command.env_remove("RUST_LOG").env("MOR_CACHE_DIR", "").env("XDG_RUNTIME_DIR", std::env::temp_dir()).args(args);
    command
}

fn stdout(args: &[&str]) -> String {
    let output = command(args).output().expect("the program starts");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Checks that `args` are refused in one sentence that contains all of `words`.
fn refused(args: &[&str], words: &[&str]) {
    let Output { status, stdout, stderr } = command(args).output().expect("the program starts");
    let message = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(2), "{args:?}: {message}");
    assert!(stdout.is_empty(), "{args:?} printed something");
    assert!(message.starts_with("error: ") && message.lines().count() == 1, "{args:?}: {message}");
    assert!(words.iter().all(|word| message.contains(word)), "{args:?}: {words:?} are not all in: {message}");
}

/// A model of 97 tokens and a context of 128 or so.
fn golden(name: &str) -> String {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../mor-model/tests/fixtures/golden").join(name);
    folder.display().to_string()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// A measurement of a small model: lists of prompts and new tokens, and what else is wanted.
fn bench(name: &str, (prompts, new): (&str, &str), rest: &[&str]) -> String {
    let model = golden(name);
    let common = ["--model", &model, "-p", prompts, "-n", new, "-r", "2", "--dtype", "f32"];
    stdout(&[&["bench"], &common[..], rest].concat())
}

/// The numbers that a column must have, the rest being free.
fn check_rows(rows: &[Value]) {
    for row in rows {
        let number = |name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{name} is no number in {row}"));
        let text = |name: &str| row[name].as_str().unwrap_or_else(|| panic!("{name} is no text in {row}"));
        for name in ["build", "gpu_library", "device", "backend", "dtype", "lanes", "model", "model_mode", "depths"] {
            assert!(!text(name).is_empty(), "{name} is empty in {row}");
        }
        let positive = [
            "parameters",
            "weight_bytes",
            "batch",
            "tokens_per_s",
            "tokens_per_s_median",
            "mean_depth",
            "dispatches_per_token",
            "load_ms",
            "compile_ms",
            "longest_submit_ms",
            "check_tokens",
        ];
        assert!(positive.iter().all(|name| number(name) > 0.0), "{row}");
        assert!(number("effective_parameters") >= number("parameters"), "{row}");
        assert_eq!(row["tokens_per_s_samples"].as_array().unwrap().len(), 2);
        assert_eq!((&row["check_same_depths"], &row["check_same_argmax"]), (&json!(true), &json!(true)), "{row}");
        assert!(number("check_logit_difference") < 1e-4, "{row}");
        assert_eq!(row["first_token_ms"].is_null(), row["prompt_tokens"] == 0, "{row}");
        // Only a device that writes no timestamps has no peaks.
        assert_eq!(row["read_gb_per_s"].is_null(), row["copy_gb_per_s"].is_null(), "{row}");
        if !row["read_gb_per_s"].is_null() && row["batch"] == 1 {
            assert_eq!(row["share"].is_null(), row["prompt_tokens"] != 0 && row["new_tokens"] != 0, "{row}");
        }
    }
}

#[test]
fn every_form_can_be_read() {
    if !gpu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let plot = folder.path().join("plot.svg");
    let rest = ["-b", "1,2", "--depth", "0,16", "-o", "json", "--plot", text(&plot)];
    let rows: Vec<Value> = serde_json::from_str(&bench("expert_middle_cycle_r3", ("8", "4"), &rest)).unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["test"].as_str().unwrap()).collect();
    let of_batch = ["pp8", "tg4", "tg4 @ d16", "pp8+tg4"];
    assert_eq!(names, [of_batch, of_batch].concat());
    check_rows(&rows);
    let plot = fs::read_to_string(plot).unwrap();
    let plot = roxmltree::Document::parse(&plot).unwrap();
    assert_eq!(plot.root_element().tag_name().name(), "svg");
    let shown = |name: &str| plot.descendants().any(|node| node.text() == Some(name));
    assert!(shown("tg4 @ d16 x 2") && shown("pp8"));

    let lines = bench("vanilla_gqa", ("8", "4"), &["-o", "jsonl"]);
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    check_rows(&lines);

    let csv = bench("vanilla_gqa", ("0", "4"), &["-o", "csv"]);
    let records: Vec<Vec<String>> = csv.lines().map(fields).collect();
    assert_eq!(records.len(), 2, "{csv}");
    assert_eq!(records[0].len(), records[1].len(), "{csv}");
    // serde_json sorts the names of an object that it reads.
    let mut columns = records[0].clone();
    columns.sort();
    assert_eq!(columns, lines[0].as_object().unwrap().keys().cloned().collect::<Vec<_>>());

    let sql = bench("vanilla_gqa", ("8", "0"), &["-o", "sql"]);
    assert!(sql.starts_with("CREATE TABLE IF NOT EXISTS mor_bench (\n") && sql.trim_end().ends_with(");"), "{sql}");
    assert!(sql.contains("INSERT INTO mor_bench (build, ") && sql.contains(", 'pp8', "), "{sql}");

    let table = bench("token_middle_cycle_r3", ("8,16", "4"), &["--no-check"]);
    assert!(table.contains("not compared with the CPU"), "{table}");
    let rows: Vec<_> = table.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(rows.len(), 2 + 5, "{table}");
    assert!(rows.iter().all(|row| row.matches('|').count() == rows[0].matches('|').count()), "{table}");
}

/// The fields of a CSV record.
fn fields(record: &str) -> Vec<String> {
    let (mut fields, mut is_quoted) = (vec![String::new()], false);
    for c in record.chars() {
        match c {
            '"' => is_quoted = !is_quoted,
            ',' if !is_quoted => fields.push(String::new()),
            c => fields.last_mut().unwrap().push(c),
        }
    }
    fields
}

#[test]
fn every_token_can_take_all_recursions() {
    if !gpu() {
        return;
    }
    let rest = ["--mode", "full-depth", "-o", "json", "--no-check"];
    let rows: Vec<Value> = serde_json::from_str(&bench("expert_middle_cycle_r3", ("8", "4"), &rest)).unwrap();
    assert!(rows.iter().all(|row| row["mean_depth"] == 3.0 && row["depths"] == "full-depth"), "{rows:?}");
    let model = golden("token_middle_cycle_r3");
    for mode in ["full-depth", "by-capacity"] {
        refused(&["bench", "--model", &model, "-p", "8", "-n", "4", "--mode", mode], &["token choice", mode]);
    }
}

#[test]
fn measurements_are_compared() {
    let row = |device: &str, test: &str, rate: f64| {
        json!({
            "build": "mor", "gpu_library": "g", "device": device, "driver": "d", "backend": "vulkan", "features": "",
            "dtype": "f16", "quantization": "q8", "lanes": "l", "copy_gb_per_s": null, "read_gb_per_s": null,
            "matrix_tflop_per_s": null,
            "model": "m", "model_mode": "expert", "depths": "routed", "parameters": 1, "effective_parameters": 1,
            "weight_bytes": 1, "test": test, "prompt_tokens": 8, "new_tokens": 0, "context_tokens": 0, "batch": 1,
            "repetitions": 1, "tokens_per_s": rate, "tokens_per_s_sd": 0.5, "tokens_per_s_median": rate,
            "tokens_per_s_samples": [rate], "first_token_ms": 1.0, "mean_depth": 2.0, "share": null,
            "dispatches_per_token": 1.0, "load_ms": 1.0, "compile_ms": 1.0, "longest_submit_ms": 1.0,
            "check_tokens": null, "check_same_depths": null, "check_same_argmax": null, "check_logit_difference": null,
        })
    };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("a.json"), json!([row("A", "pp8", 100.0), row("A", "tg4", 10.0)]).to_string()).unwrap();
    fs::write(path("b.jsonl"), format!("{}\n", row("B", "tg4", 25.0))).unwrap();
    let (a, b, plot) = (path("a.json"), path("b.jsonl"), path("plot.svg"));
    let table = stdout(&["bench", "compare", text(&a), text(&b), "--plot", text(&plot)]);
    let rows: Vec<_> = table.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(rows[0], "| test | m, f16/q8, A | m, f16/q8, B |");
    assert_eq!(rows[2..], ["| pp8 | 100.0 ± 0.5 | - |", "| tg4 | 10.0 ± 0.5 | 25.0 ± 0.5 (2.50) |"]);
    roxmltree::Document::parse(&fs::read_to_string(plot).unwrap()).unwrap();

    fs::write(path("not.json"), "{\"build\": 1}").unwrap();
    fs::write(path("none.json"), "[]").unwrap();
    refused(&["bench", "compare"], &["JSON"]);
    refused(&["bench", "compare", text(&path("nowhere.json"))], &["nowhere.json", "cannot read"]);
    refused(&["bench", "compare", text(&path("not.json"))], &["not.json", "mor bench -o json"]);
    refused(&["bench", "compare", text(&path("none.json"))], &["none.json", "holds no measurement"]);
    let nowhere = path("no/plot.svg");
    let Output { status, stderr, .. } =
        command(&["bench", "compare", text(&a), "--plot", text(&nowhere)]).output().expect("the program starts");
    assert_eq!(status.code(), Some(2), "{}", String::from_utf8_lossy(&stderr));
}

#[test]
fn measurements_that_cannot_be_made() {
    let model = golden("vanilla_gqa");
    let bench = |rest: &[&str], words: &[&str]| refused(&[&["bench", "--model", &model], rest].concat(), words);
    bench(&["-p", "0", "-n", "0"], &["-p and -n are 0"]);
    bench(&["-p", "100000"], &["pp100000 takes 100001 positions", "at most", "lower -p"]);
    bench(&["-n", "8", "-p", "0", "--depth", "100000"], &["tg8 @ d100000"]);
    bench(&["-b", "0"], &["'0'", "--batch", "1 or more"]);
    bench(&["-r", "x"], &["'x'", "--repetitions"]);
    bench(&["-o", "xml"], &["xml", "--output", "help"]);
    bench(&["--random-weights"], &["--config"]);
    // Before anything is measured.
    bench(&["--plot", "nowhere/x.svg"], &["--plot nowhere/x.svg", "folder does not exist"]);
    refused(&["profile", "--trace", "nowhere/x.json"], &["--trace nowhere/x.json", "folder does not exist"]);
    refused(&["bench", "--model", "nowhere"], &["nowhere: does not exist"]);
    refused(&["bench", "--config", "nowhere.json"], &["nowhere.json"]);
    refused(&["profile", "--model", &model, "--context", "100000"], &["--context is 100000", "at most"]);
    refused(
        &["profile", "--model", &model, "--context", "9", "--phase", "prefill", "-b", "8193"],
        &["--batch is 8193", "8192"],
    );
    refused(&["profile", "--phase", "both"], &["both", "--phase"]);
    let mut no_number = command(&["profile", "--model", &model, "--context", "9", "--phase", "prefill"]);
    let output = no_number.env("MOR_PREFILL_CHUNK", "many").output().expect("the program starts");
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(message, "error: MOR_PREFILL_CHUNK is many, expected 16 or more\n");
}

#[test]
fn steps_are_profiled() {
    if !gpu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.json");
    let model = golden("expert_middle_cycle_r3");
    for (phase, batch, kernel) in [("decode", "2", "attention_decode"), ("prefill", "1", "attention_prefill")] {
        let options = ["--phase", phase, "-b", batch, "--context", "40", "--json", "--trace", text(&trace)];
        let args = [&["profile", "--model", &model, "--mode", "by-capacity"], &options[..]].concat();
        let output = command(&args).output().expect("the program starts");
        let message = String::from_utf8_lossy(&output.stderr);
        if message.contains("timestamp queries") {
            eprintln!("skipped: {message}");
            return;
        }
        assert!(output.status.success(), "{message}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let kernels = report["kernels"].as_array().unwrap();
        assert!(kernels.iter().any(|found| found["kernel"] == kernel), "{report}");
        let share: f64 = kernels.iter().map(|kernel| kernel["share"].as_f64().unwrap()).sum();
        assert_eq!(report["depths"], "by-capacity");
        assert_eq!(report["step_tokens"], if phase == "decode" { 1 } else { 40 });
        assert!((share - 1.0).abs() < 1e-6 && report["step_us"].as_f64().unwrap() > 0.0, "{report}");
        assert!(kernels.iter().any(|kernel| kernel["weights_gb_per_s"].is_f64()), "{report}");

        let trace: Value = serde_json::from_str(&fs::read_to_string(&trace).unwrap()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let of_track = |track: u32| events.iter().filter(move |event| event["ph"] == "X" && event["tid"] == track);
        let calls: u64 = kernels.iter().map(|kernel| kernel["calls"].as_u64().unwrap()).sum();
        assert_eq!((of_track(1).count(), of_track(2).count() as u64), (3, calls));
        // Each begins where the one before it ends.
        let mut end = 0.0;
        for event in of_track(2) {
            assert!((event["ts"].as_f64().unwrap() - end).abs() < 1e-3, "{event}");
            end += event["dur"].as_f64().unwrap();
        }
    }
    let table = stdout(&["profile", "--model", &model, "--context", "16"]);
    assert!(table.contains("| linear_decode | ") && table.contains(" us (coda "), "{table}");
    let mut in_steps = command(&["profile", "--model", &model, "--context", "40", "--phase", "prefill"]);
    let output = in_steps.env("MOR_PREFILL_CHUNK", "32").output().expect("the program starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains(": prefill of the last 32 of 40 tokens, 1 at a time"), "{table}");
}

#[test]
fn compiled_kernels_are_kept_where_they_are_wanted() {
    if !gpu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    let model = golden("vanilla_gqa");
    let args = ["generate", "--model", &model, "--prompt-tokens", "1,2", "--max-new-tokens", "2", "--temperature", "0"];
    let generate = || {
        let output = command(&args).env("MOR_CACHE_DIR", &cache).output().expect("the program starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let tokens = generate();
    let Ok(files) = fs::read_dir(&cache) else {
        eprintln!("skipped: the backend keeps no kernels");
        return;
    };
    let files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    assert_eq!(generate(), tokens);
    fs::write(&files[0], b"damaged").unwrap();
    assert_eq!(generate(), tokens);
    assert!(fs::read(&files[0]).unwrap().len() > 7, "it is made anew");
    // A folder that cannot be made stops nothing.
    fs::remove_dir_all(&cache).unwrap();
    fs::write(&cache, b"a file").unwrap();
    assert_eq!(generate(), tokens);
}
