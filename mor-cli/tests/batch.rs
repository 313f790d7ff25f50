//! `mor batch` on the embedded model: every request is answered once, also after a kill; bad lines and files are told.
//! `MOR_TEST_GPU=skip` leaves out what needs a device.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Whether to run tests that need a device; says so where not.
fn gpu() -> bool {
    let skip = std::env::var_os("MOR_TEST_GPU").is_some_and(|value| value == "skip");
    if skip {
        eprintln!("skipped: MOR_TEST_GPU=skip");
    }
    !skip
}

fn command(input: &Path, output: &Path, rest: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mor"));
    command.env_remove("RUST_LOG").env("XDG_RUNTIME_DIR", std::env::temp_dir()).env("XDG_CONFIG_HOME", "/nonexistent");
    command.env("MOR_CACHE_DIR", "");
    command.arg("batch").arg("--input").arg(input).arg("--output").arg(output).args(rest);
    command
}

fn run(input: &Path, output: &Path, rest: &[&str]) -> Output {
    command(input, output, rest).output().expect("the program starts")
}

fn message(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn write_lines(path: &Path, lines: &[Value]) {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(path, text).expect("the folder is writable");
}

/// Answers by id, as JSON text; no id comes twice.
fn answers(path: &Path) -> BTreeMap<String, Value> {
    let text = std::fs::read_to_string(path).expect("there is an output");
    assert!(text.is_empty() || text.ends_with('\n'), "whole lines");
    let mut answers = BTreeMap::new();
    for line in text.lines() {
        let answer: Value = serde_json::from_str(line).expect("JSON");
        assert!(answers.insert(answer["id"].to_string(), answer).is_none(), "an id came twice: {line}");
    }
    answers
}

fn requests(count: usize) -> Vec<Value> {
    let request = |i| match i % 4 {
        0 => {
            json!({ "id": format!("story {i}"), "prompt": "Once upon a time", "max_new_tokens": 5 + i % 7, "temperature": 0 })
        }
        1 => {
            json!({ "id": i, "prompt_tokens": [0, 5, i], "max_new_tokens": 8, "seed": i, "top_k": 20, "ignore_eos": true })
        }
        2 => json!({ "prompt": "Tom had a red ball. He", "max_new_tokens": 12, "stop": [".", "!"], "min_p": 0.1 }),
        _ => json!({ "prompt": "", "max_new_tokens": 4, "stop": "the", "repeat_penalty": 1.1, "top_p": 0.9 }),
    };
    (0..count).map(request).collect()
}

#[test]
fn every_request_is_answered_once_whatever_happens() {
    if !gpu() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (input, whole, cut) =
        (folder.path().join("in.jsonl"), folder.path().join("whole.jsonl"), folder.path().join("cut.jsonl"));
    write_lines(&input, &requests(24));
    let flags = ["--concurrency", "4", "--batch-invariant", "--dtype", "f32"];
    let output = run(&input, &whole, &flags);
    assert!(output.status.success(), "{}", message(&output));
    assert!(
        message(&output).contains("24 answered, ") && message(&output).contains("occupancy"),
        "{}",
        message(&output)
    );
    let expected = answers(&whole);
    assert_eq!(expected.len(), 24);
    let story = &expected["\"story 0\""];
    assert_eq!(story["text"], ", there was a little", "{story}");
    assert_eq!(story["usage"]["new_tokens"], 5);
    assert_eq!(story["depths"].as_array().map(Vec::len), Some(4 + 5 - 1));
    assert_eq!(expected["1"]["usage"]["prompt_tokens"], 3);
    assert!(expected.contains_key("3"), "the third line is known by its number");

    // Killed at any moment, with a line that was cut off, it goes on and ends with the same answers.
    let mut kills = 0;
    for wait in [700, 900, 1100] {
        let mut child = command(&input, &cut, &flags)
            .args(if cut.exists() { &["--resume"][..] } else { &[] })
            .stderr(Stdio::null())
            .spawn()
            .expect("the program starts");
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(wait) && child.try_wait().expect("it is there").is_none() {
            std::thread::sleep(Duration::from_millis(10));
        }
        kills += u32::from(child.try_wait().expect("it is there").is_none());
        let _ = child.kill();
        child.wait().expect("it ends");
    }
    println!("killed {kills} times");
    let mut text = std::fs::read(&cut).unwrap_or_default();
    text.extend_from_slice(b"{\"id\":\"story 0\",\"te");
    std::fs::write(&cut, text).expect("the folder is writable");
    let output = run(&input, &cut, &[&flags[..], &["--resume"]].concat());
    assert!(output.status.success(), "{}", message(&output));
    assert_eq!(answers(&cut), expected);
    // Nothing is left to do.
    let output = run(&input, &cut, &[&flags[..], &["--resume"]].concat());
    assert!(output.status.success() && message(&output).contains("24 answered before"), "{}", message(&output));
    assert_eq!(answers(&cut), expected);
}

#[test]
fn bad_lines_are_named_and_stop_nothing() {
    if !gpu() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
    let good = json!({ "id": "a", "prompt": "Once", "max_new_tokens": 2 });
    let lines = [
        good.to_string(),
        "{\"prompt\": \"Once\"".to_owned(),
        String::new(),
        json!({ "id": "a", "prompt": "Twice" }).to_string(),
        json!({ "prompt": "Once", "temprature": 1 }).to_string(),
        json!({ "prompt": "Once", "prompt_tokens": [1] }).to_string(),
        json!({ "prompt": "Once", "top_p": 2 }).to_string(),
        json!({ "prompt_tokens": [5000] }).to_string(),
        json!({ "prompt": "Once", "max_new_tokens": 5000 }).to_string(),
        json!({ "id": [1], "prompt": "Once" }).to_string(),
        json!({ "id": 77, "prompt": "Once", "max_new_tokens": 2 }).to_string(),
    ];
    let mut bytes = lines.join("\n").into_bytes();
    bytes.extend_from_slice(b"\n\xff\xfe\n");
    std::fs::write(&input, bytes).expect("the folder is writable");
    let result = run(&input, &output, &["--concurrency", "2"]);
    let message = message(&result);
    assert_eq!(result.status.code(), Some(2), "{message}");
    assert_eq!(answers(&output).keys().collect::<Vec<_>>(), ["\"a\"", "77"]);
    for expected in [
        "line 2: not a request: EOF while parsing an object at column 17; expected",
        "line 4: id \"a\" was used by line 1 already",
        "line 5: not a request: unknown field `temprature`",
        "line 6: both prompt and prompt_tokens",
        "line 7: --top-p is 2",
        "line 8: prompt[0]: token id 5000 is out of range",
        "line 9: the prompt with its new tokens has 50",
        "line 10: id is [1], expected a text or a number",
        "line 12: not UTF-8",
        "2 answered",
        "9 refused",
    ] {
        assert!(message.contains(expected), "{expected} in {message}");
    }
}

/// Ends with exit code 2 and one sentence that has `expected`, before a device is opened.
fn refused(input: &Path, output: &Path, rest: &[&str], expected: &str) {
    let result = run(input, output, rest);
    let message = message(&result);
    assert_eq!(result.status.code(), Some(2), "{message}");
    assert!(message.starts_with("error: ") && message.lines().count() == 1, "{message}");
    assert!(message.contains(expected), "{expected} in {message}");
}

#[test]
fn files_that_cannot_be_used_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
    refused(&input, &output, &[], "expected a file of JSON Lines");
    assert!(!output.exists(), "nothing is written");
    write_lines(&input, &requests(2));
    std::fs::write(&output, "something else\n").expect("the folder is writable");
    refused(&input, &output, &[], "exists already; give --resume to go on with it, --force to replace it");
    refused(&input, &output, &["--resume"], "line 1: not an answer of this program");
    refused(&input, &output, &["--resume", "--force"], "cannot be used with");
    assert_eq!(std::fs::read_to_string(&output).expect("it is there"), "something else\n");
    refused(&input, &folder.path().join("no/such/folder"), &[], "expected a file that can be written");
    refused(&input, &output, &["--force", "--model", "no-such-folder"], "does not exist");
    assert_eq!(std::fs::read_to_string(&output).expect("it is there"), "something else\n", "nothing is replaced");
    let fresh = folder.path().join("fresh.jsonl");
    refused(&input, &fresh, &["--model", "no-such-folder"], "does not exist");
    assert!(!fresh.exists(), "nothing is left behind");
    refused(&input, &input, &["--force"], "is the input too");
    assert!(!std::fs::read(&input).expect("it is there").is_empty());
    refused(&input, &output, &["--concurrency", "0"], "1 or more");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told() {
    if !gpu() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let input = folder.path().join("in.jsonl");
    write_lines(&input, &requests(2));
    let result = run(&input, Path::new("/dev/full"), &["--force"]);
    let message = message(&result);
    assert_eq!(result.status.code(), Some(1), "{message}");
    assert!(message.contains("error: /dev/full: No space left on device") && message.contains("--resume"), "{message}");
}
