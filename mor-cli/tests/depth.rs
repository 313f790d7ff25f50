//! Depths that people ask for, and depths that people look at. What computes needs a device; `MOR_TEST_GPU=skip` leaves it
//! out.

mod common;

use std::fs;

use common::{accepted, command, golden, gpu, run, text};
use serde_json::Value;

const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/valid-40.txt");
const TOKEN_MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tinystories-mor-token-5m");

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&accepted(args)).unwrap()
}

/// Checks that `args` are refused with a sentence that contains all of `words`.
fn refused(args: &[&str], words: &[&str]) {
    let output = run(command(args), "");
    let message = common::stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
    assert!(output.stdout.is_empty(), "{args:?} printed something");
    let error = message.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    for word in words {
        assert!(error.contains(word), "{args:?}: {word:?} is not in: {message}");
    }
}

fn numbers(values: &Value, field: &str) -> Vec<f64> {
    values.as_array().unwrap().iter().map(|value| value[field].as_f64().unwrap()).collect()
}

fn ascends(values: &[f64]) -> bool {
    values.windows(2).all(|pair| pair[0] < pair[1])
}

#[test]
fn depths_that_no_token_can_take() {
    let (vanilla, recursive) = (golden("vanilla_gqa"), golden("recursive_cycle_r3"));
    let (vanilla, recursive) = (text(&vanilla), text(&recursive));
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    for command in [
        &["generate"][..],
        &["chat"],
        &["trace"],
        &["eval", "--text", TEXT],
        &["batch", "--input", TEXT, "--output", text(&out)],
        &["eval", "--text", TEXT, "--sweep", "router-bias=-1..1"],
    ] {
        for (option, value, message) in [
            ("--max-depth", "0", "--max-depth is 0, expected 1 to 3, the recursions of the model"),
            ("--max-depth", "4", "--max-depth is 4, expected 1 to 3"),
            ("--max-depth", "-1", "-1"),
            ("--max-depth", "deep", "deep"),
        ] {
            refused(&[command, &[option, value]].concat(), &[message]);
        }
    }
    refused(&["generate", "--router-bias", "nan"], &["--router-bias is NaN, expected a finite number"]);
    refused(&["generate", "--router-bias", "more"], &["more", "--router-bias"]);
    let fixed = "expected none: all tokens of a vanilla model take the same layers";
    refused(&["generate", "--model", vanilla, "--max-depth", "1"], &["--max-depth is 1", fixed]);
    refused(&["generate", "--model", recursive, "--router-bias", "-1"], &["--router-bias is -1", "recursive model"]);
    refused(&["trace", "--model", vanilla, "--prompt-tokens", "1"], &["vanilla_gqa: the model has no routers"]);
    refused(&["trace", "a", "--html", text(folder.path())], &["--html", "is a folder"]);
    assert!(!out.exists());
}

#[test]
fn sweeps_that_are_none() {
    let refused = |rest: &[&str], words: &[&str]| refused(&[&["eval", "--text", TEXT], rest].concat(), words);
    refused(&["--sweep", "depth=1..3"], &["depth=1..3", "expected max-depth=A..B", "router-bias=A..B[:STEP]"]);
    refused(&["--sweep", "max-depth=3..1"], &["3 is above the end of the range"]);
    refused(&["--sweep", "router-bias=0..1:0"], &["the step is 0"]);
    refused(&["--sweep", "router-bias=0..1:1e-9"], &["at most 100 points"]);
    refused(&["--sweep", "max-depth=1..4"], &["--max-depth is 4, expected 1 to 3"]);
    refused(&["--sweep", "max-depth=0..R"], &["--max-depth is 0, expected 1 to 3"]);
    refused(&["--sweep", "max-depth=1..2", "--sweep", "max-depth=2..3"], &["--sweep max-depth is given twice"]);
    refused(&["--sweep", "max-depth=1..2", "--max-depth", "2"], &["--max-depth is given beside --sweep max-depth"]);
    refused(&["--plot", "out.svg"], &["--sweep"]);
    refused(&["--sweep", "max-depth=1..2", "--plot", "no/such/out.svg"], &["--plot", "its folder does not exist"]);
}

#[test]
fn a_sweep_shows_quality_against_depth() {
    if !gpu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let plot = folder.path().join("sweep.svg");
    let eval = ["eval", "--text", TEXT, "--documents", "1..3"];
    let both = ["--sweep", "max-depth=1..R", "--sweep", "router-bias=-4..4:4", "--plot", text(&plot), "--json"];
    let found = json(&[&eval[..], &both].concat());
    let points = found["points"].as_array().unwrap();
    let names: Vec<&str> = points.iter().map(|point| point["sweep"].as_str().unwrap()).collect();
    assert_eq!(names, [["max-depth"; 3], ["router-bias"; 3]].concat());
    assert_eq!(numbers(&points[..3].into(), "max_depth"), [1.0, 2.0, 3.0]);
    assert_eq!(numbers(&points[3..].into(), "router_bias"), [-4.0, 0.0, 4.0]);
    let depths = numbers(&found["points"], "mean_depth");
    assert_eq!(depths[0], 1.0);
    assert!(ascends(&depths[..3]) && ascends(&depths[3..]), "{depths:?}");
    let nll = numbers(&found["points"], "mean_nll_nats");
    assert!(nll[0] > nll[1] && nll[1] > nll[2], "more depth is better: {nll:?}");
    assert!(numbers(&found["points"], "tokens_per_s").iter().all(|rate| *rate > 0.0));

    // All recursions and no bias is what there is without a sweep.
    let plain = json(&[&eval[..], &["--json"]].concat());
    for field in ["mean_nll_nats", "perplexity", "mean_depth"] {
        assert_eq!(found["points"][2][field], plain[field], "{field}");
        assert_eq!(found["points"][4][field], plain[field], "{field}");
    }
    let limited = json(&[&eval[..], &["--json", "--max-depth", "2"]].concat());
    assert_eq!((&limited["mean_nll_nats"], &limited["max_depth"]), (&points[1]["mean_nll_nats"], &2.into()));

    let svg = fs::read_to_string(&plot).unwrap();
    assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"));
    assert_eq!(svg.matches("<circle ").count(), 2 * points.len());
    let table = accepted(&[&eval[..], &["--sweep", "max-depth=1..1"]].concat());
    assert!(table.lines().last().is_some_and(|line| line.starts_with("max-depth        1")), "{table}");
}

#[test]
fn depths_follow_the_controls() {
    if !gpu() {
        return;
    }
    let depths = |model: &[&str], control: &[&str]| {
        let common = ["generate", "Once upon a time", "--max-new-tokens", "40", "--temperature", "0", "--json"];
        let found = json(&[&common[..], model, control].concat());
        let depths: Vec<u64> = found["depths"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap()).collect();
        (depths, found["mean_depth"].as_f64().unwrap(), found["kv_entries"].clone())
    };
    for model in [&[][..], &["--model", TOKEN_MODEL]] {
        let (all, mean, _) = depths(model, &[]);
        assert!(all.contains(&3));
        let (one, mean_of_one, entries) = depths(model, &["--max-depth", "1"]);
        assert!(one.iter().all(|depth| *depth == 1) && mean_of_one == 1.0, "{one:?}");
        // Nothing is stored for the recursions that no token may take.
        let stored = entries.as_array().unwrap().iter().filter(|entries| **entries != 0).count();
        assert!(stored < entries.as_array().unwrap().len(), "{entries}");
        assert!(depths(model, &["--max-depth", "2"]).0.iter().all(|depth| *depth <= 2));
        let (_, deeper, _) = depths(model, &["--router-bias", "30"]);
        let (_, shallower, _) = depths(model, &["--router-bias", "-30"]);
        assert_eq!((deeper, shallower), (3.0, 1.0), "of {mean}");
    }
}

/// Data of a page, as its script reads it.
fn embedded(page: &str) -> Value {
    let start = "<script type=\"application/json\" id=\"data\">";
    let data = page.split_once(start).expect("there is data").1.split_once("</script>").expect("it ends").0;
    serde_json::from_str(data).expect("it is JSON")
}

#[test]
fn a_trace_shows_what_generate_did() {
    if !gpu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("trace.html");
    // A prompt that a page must escape.
    let prompt = "Tom said: \"</script><b>1 & 2</b>\" and";
    let token_model = ["--model", TOKEN_MODEL];
    for (model, control) in [
        (&[][..], &[][..]),
        (&[], &["--max-depth", "2", "--router-bias", "0.5"]),
        (&token_model, &[]),
        (&token_model, &["--router-bias", "0.1"]),
    ] {
        let common =
            [&[prompt, "--max-new-tokens", "24", "--seed", "5", "--dtype", "f32", "--json"], model, control].concat();
        let generated = json(&[&["generate"], &common[..]].concat());
        let traced = json(&[&["trace", "--html", text(&page)], &common[..]].concat());
        let tokens = traced["tokens"].as_array().unwrap();
        let all = |field: &str| tokens.iter().map(|token| token[field].clone()).collect::<Vec<_>>();
        let (prompt_tokens, new) =
            (generated["prompt_tokens"].as_array().unwrap(), generated["tokens"].as_array().unwrap());
        assert_eq!(all("token"), [&prompt_tokens[..], new].concat());
        assert_eq!(traced["differing"], Value::Array(Vec::new()));
        // Generation does not feed its last token, so it knows no depth of it.
        assert_eq!(all("depth")[..tokens.len() - 1], generated["depths"].as_array().unwrap()[..], "{control:?}");
        let written: String = all("text").iter().map(|text| text.as_str().unwrap().to_owned()).collect();
        assert_eq!(written, format!("{prompt}{}", generated["text"].as_str().unwrap()));
        assert_eq!(all("is_prompt").iter().filter(|prompt| **prompt == true).count(), prompt_tokens.len());

        for (position, token) in tokens.iter().enumerate() {
            let depth = token["depth"].as_u64().unwrap() as usize;
            let router = token["router"].as_array().unwrap();
            assert_eq!(router.iter().filter(|step| step["taken"] == true).count(), depth, "{token}");
            assert!(router.iter().all(|step| step["logit"].is_f64() && step["gate"].is_f64()), "{token}");
            let probability = &token["probability"];
            let is_one = probability.as_f64().is_some_and(|p| 0.0 < p && p <= 1.0);
            assert!(if position == 0 { probability.is_null() } else { is_one }, "{token}");
        }
        let count = |values: &Value| values.as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum::<u64>();
        assert_eq!(count(&traced["depths"]), tokens.len() as u64);
        let kinds = traced["kinds"].as_array().unwrap();
        assert_eq!(kinds.iter().map(|kind| kind["tokens"].as_u64().unwrap()).sum::<u64>(), tokens.len() as u64);
        assert!(kinds.iter().all(|kind| count(&kind["depths"]) == kind["tokens"].as_u64().unwrap()));

        let page = fs::read_to_string(&page).unwrap();
        assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
        assert_eq!(page.matches("</script>").count(), 2, "the text ends no script");
        assert_eq!(embedded(&page), traced);
    }
}

#[test]
fn a_trace_reads_as_text() {
    if !gpu() {
        return;
    }
    let shown = accepted(&["trace", "Once upon a time", "--max-new-tokens", "3", "--temperature", "0"]);
    assert!(shown.starts_with("Once(1) upon(3) a(3) time(1),(3) there(2) was("), "{shown}");
    let lines: Vec<&str> = shown.lines().collect();
    assert!(lines.iter().any(|line| line.contains("\" upon\"") && line.contains("     3  0.")), "{shown}");
    assert!(lines.iter().any(|line| line.starts_with("punctuation")), "{shown}");
    assert!(!shown.contains('\u{1b}'), "colours are for terminals");
}
