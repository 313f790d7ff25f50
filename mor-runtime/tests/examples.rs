//! Every example of this crate runs once, on the trained models. `cargo test` builds examples before tests; to run this file
//! alone, build them first: `cargo build --workspace --examples`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tinystories-mor-expert-5m")
}

/// What an example prints.
fn run(name: &str, args: &[&str]) -> String {
    let test = std::env::current_exe().expect("a test has a path");
    let target = test.parent().and_then(Path::parent).expect("tests lie in target/PROFILE/deps");
    let program = target.join("examples").join(name).with_extension(std::env::consts::EXE_EXTENSION);
    let output = Command::new(&program).arg(folder()).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}; build the examples first", program.display()));
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("examples print text")
}

const EXAMPLES: [&str; 7] =
    ["batch", "choose_adapter", "custom_sampler", "embeddings", "generate", "shared_device", "stream"];

#[test]
fn every_example_is_run() {
    let sources = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")).expect("there are examples");
    let stem = |path: PathBuf| path.file_stem().expect("a file has a stem").to_string_lossy().into_owned();
    let found: BTreeSet<String> = sources.map(|entry| stem(entry.expect("readable").path())).collect();
    assert!(found.iter().eq(EXAMPLES.iter()), "{found:?}");
}

#[test]
fn generate_continues_a_prompt() {
    assert!(run("generate", &["Once upon a time"]).contains(" tokens/s"));
}

#[test]
fn stream_ends_with_a_sentence() {
    let text = run("stream", &["Once upon a time"]);
    let (sentence, end) = text.trim_end().rsplit_once('\n').expect("a text and its end");
    assert!(sentence.ends_with(['.', '!', '?']), "{text}");
    assert!(end.starts_with("cancelled: "), "{text}");
}

#[test]
fn batch_answers_every_prompt() {
    let text = run("batch", &["Once upon a time", "Tom had a red ball. He", "The dog"]);
    let lines: BTreeSet<&str> = text.lines().filter(|line| line.chars().nth(1) == Some(':')).collect();
    let beginnings = ["0: Once upon a time", "1: Tom had a red ball. He", "2: The dog"];
    assert!(beginnings.iter().all(|start| lines.iter().any(|line| line.starts_with(start))), "{text}");
}

#[test]
fn embeddings_know_likeness() {
    let text = run("embeddings", &["The cat sat on the mat.", "The dog sat on the mat.", "It rained all night long."]);
    let first = text.lines().next().expect("a line a sentence");
    let cosines: Vec<f32> = first.split_whitespace().take(3).map(|word| word.parse().expect("a number")).collect();
    assert!((cosines[0] - 1.0).abs() < 2e-3, "{text}");
    assert!(cosines[1] > cosines[2], "{text}");
}

#[test]
fn custom_sampler_repeats_nothing() {
    let text = run("custom_sampler", &["Once upon a time"]);
    assert!(text.starts_with("Once upon a time"), "{text}");
    let words: Vec<&str> = text.split_whitespace().collect();
    assert!(words.len() > 15, "{text}");
    let threes: BTreeSet<&[&str]> = words.windows(3).collect();
    assert_eq!(threes.len(), words.len() - 2, "three words return: {text}");
}

#[test]
fn choose_adapter_loads_onto_one() {
    let text = run("choose_adapter", &[]);
    let name = text.lines().last().and_then(|line| line.strip_prefix("loaded onto ")).expect("the last line says so");
    assert!(text.lines().any(|line| line.starts_with(|c: char| c.is_ascii_digit()) && line.contains(name)), "{text}");
}

#[test]
fn shared_device_draws_meanwhile() {
    let text = run("shared_device", &["Once upon a time"]);
    let frames = text.lines().last().and_then(|line| line.strip_suffix(" frames drawn meanwhile"));
    assert!(frames.is_some_and(|frames| frames.parse::<u32>().is_ok_and(|frames| frames > 1)), "{text}");
}
