//! `mor chat` on the embedded model, which has no chat template, and on one with a template. `MOR_TEST_GPU=skip` leaves
//! out what needs a device.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::process::{Output, Stdio};

use common::{command, golden, gpu, root, run, stderr, stdout, text};
use serde_json::{Value, json};

/// Tokens of which K/V entries are kept together: a beginning is reused up to a multiple of it.
const BLOCK: u64 = 32;

/// Answers to the lines of `input`, as objects.
fn chat(args: &[&str], input: &str) -> (Output, Vec<Value>) {
    let output = run(command(&[&["chat", "--json", "--dtype", "f32"], args].concat()), input);
    let answers = stdout(&output).lines().map(|line| serde_json::from_str(line).expect("an object a line")).collect();
    (output, answers)
}

/// A copy of the embedded model with files beside it.
fn with_files(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let path = root().join("models/tinystories-mor-expert-5m").join(name);
        fs::copy(path, folder.path().join(name)).unwrap();
    }
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

#[test]
fn a_turn_reads_what_is_new() {
    if !gpu() {
        return;
    }
    let options = ["--temperature", "0", "--max-new-tokens", "90"];
    let (output, answers) = chat(&options, "Once upon a time, there was a little\nThe next day\n\nThen\n");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(answers.len(), 3, "an empty line says nothing");
    let number = |answer: &Value, name: &str| answer[name].as_u64().unwrap();
    assert_eq!(number(&answers[0], "reused_tokens"), 0);
    let mut said = "Once upon a time, there was a little".to_owned();
    for (turn, line) in answers.windows(2).zip(["The next day", "Then"]) {
        let ends = turn[0]["finish_reason"] == "eos";
        let answer = turn[0]["tokens"].as_array().unwrap().len() as u64 - u64::from(ends);
        let before = number(&turn[0], "prompt_tokens") + answer;
        let (prompt, reused) = (number(&turn[1], "prompt_tokens"), number(&turn[1], "reused_tokens"));
        // A newline and the words.
        assert!(prompt > before && prompt - before <= 8, "{before}, {prompt}");
        // The last token of an answer was never fed.
        assert_eq!(reused, (before - 1) / BLOCK * BLOCK, "{before}, {prompt}");
        assert!(
            stderr(&output).contains(&format!("read {} of {prompt} tokens", prompt - reused)),
            "{}",
            stderr(&output)
        );

        // The answer is that to the whole text.
        said = format!("{said}{}\n{line}", turn[0]["text"].as_str().unwrap());
        let whole = ["generate", &said, "--json", "--dtype", "f32", "--temperature", "0", "--max-new-tokens", "90"];
        let whole: Value = serde_json::from_str(&common::accepted(&whole)).unwrap();
        assert_eq!(whole["prompt_tokens"].as_array().unwrap().len() as u64, prompt);
        assert_eq!(whole["text"], turn[1]["text"]);
        let depths = whole["depths"].as_array().unwrap()[prompt as usize..].to_vec();
        assert_eq!(Value::from(depths), turn[1]["depths"]);
    }
    // Said once.
    assert_eq!(stderr(&output).matches("no chat template").count(), 1);
}

#[test]
fn templates_write_the_turns() {
    if !gpu() {
        return;
    }
    // Answers end with the token that the template puts after them.
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n{% endfor %}assistant:";
    let config = json!({ "eos_token": ".", "chat_template": template }).to_string();
    let folder = with_files(&[("tokenizer_config.json", &config)]);
    let saved = folder.path().join("saved.json");
    let input = format!("Tell a story\nGo on\n/save {}\n", text(&saved));
    let options = ["--model", text(folder.path()), "--system", "Be kind", "--temperature", "0"];
    let (output, answers) = chat(&options, &input);
    let message = stderr(&output);
    assert!(output.status.success() && !message.contains("no chat template"), "{message}");
    for answer in &answers {
        let text = answer["text"].as_str().unwrap();
        assert!(answer["finish_reason"] == "eos" && !text.contains('.'), "{answer}");
    }
    let messages: Value = serde_json::from_str(&fs::read_to_string(&saved).unwrap()).unwrap();
    let said = |role: &str, content: &Value| json!({ "role": role, "content": content });
    let expected = [
        said("system", &"Be kind".into()),
        said("user", &"Tell a story".into()),
        said("assistant", &answers[0]["text"]),
        said("user", &"Go on".into()),
        said("assistant", &answers[1]["text"]),
    ];
    assert_eq!(messages, Value::from(expected.to_vec()));
    // What the template trims was drawn otherwise: the beginning is known all the same, and nothing is read wrongly.
    let whole = format!(
        "system: Be kind.\nuser: Tell a story.\nassistant: {}.\nuser: Go on.\nassistant:",
        answers[0]["text"].as_str().unwrap().trim()
    );
    let whole = ["generate", &whole, "--json", "--dtype", "f32", "--temperature", "0", "--stop", "."];
    let whole: Value = serde_json::from_str(&common::accepted(&whole)).unwrap();
    assert_eq!(whole["text"], answers[1]["text"]);

    let (output, _) = chat(&options, &format!("/save {}\n", text(&saved)));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("error: cannot write"), "{}", stderr(&output));
}

#[test]
fn stop_texts_are_said_by_nobody() {
    if !gpu() {
        return;
    }
    let (output, answers) = chat(&["--temperature", "0", "--stop", "."], "Once upon a time\n. Then\n");
    assert!(output.status.success(), "{}", stderr(&output));
    let first = answers[0]["text"].as_str().unwrap();
    assert!(answers[0]["finish_reason"] == "stop" && !first.contains('.'), "{first}");
    // The model had drawn the full stop; what it reads next is the text that was shown.
    let whole = format!("Once upon a time{first}\n. Then");
    let whole = ["generate", &whole, "--json", "--dtype", "f32", "--temperature", "0", "--stop", "."];
    let whole: Value = serde_json::from_str(&common::accepted(&whole)).unwrap();
    assert_eq!(whole["text"], answers[1]["text"]);
}

#[test]
fn commands_change_the_conversation() {
    if !gpu() {
        return;
    }
    let input = "/help\n/set\n/set temperature=0\n/set top-k = 5\n/set max-new-tokens=3\nOnce upon\n/depth\n/reset\nOnce upon\n\
                 //slash\n/quit\nnever said\n";
    let (output, answers) = chat(&["--seed", "7"], input);
    let message = stderr(&output);
    assert!(output.status.success(), "{message}");
    assert!(message.contains("/reset            start a new conversation"), "{message}");
    assert!(message.contains("temperature=0.8 top-k=0 top-p=1 min-p=0 repeat-penalty=1 seed=7 max-new-tokens=512"));
    assert!(message.contains("temperature=0 top-k=5 top-p=1 min-p=0 repeat-penalty=1 seed=7 max-new-tokens=3"));
    assert!(message.contains("depths are shown\nlast answer: depth 1 ("), "{message}");
    assert_eq!(answers.len(), 3);
    assert_eq!(answers[0]["tokens"].as_array().unwrap().len(), 3);
    // The same beginning, the same answer.
    let told = |answer: &Value| (answer["text"].clone(), answer["prompt_tokens"].clone());
    assert_eq!(told(&answers[0]), told(&answers[1]));

    let output = run(command(&["chat", "--max-new-tokens", "4", "--temperature", "0", "--show-depth"]), "Once upon\n");
    assert!(stdout(&output).contains(")") && stdout(&output).ends_with('\n'), "{}", stdout(&output));
}

/// Fewer recursions from the next answer on, and all of them again: each answer is that of a program which was started so,
/// and the conversation was read again for it.
#[test]
fn depths_can_be_limited_between_turns() {
    if !gpu() {
        return;
    }
    let first = "Once upon a time, there was a little girl who had a big red ball and a small dog that liked to run";
    let options = ["--temperature", "0", "--max-new-tokens", "20"];
    let (output, answers) = chat(&options, &format!("{first}\n/depth 1\nThe next day\nThen\n/depth 3\nAt last\n"));
    let message = stderr(&output);
    assert!(output.status.success(), "{message}");
    assert!(message.contains("tokens take at most 1 of 3 recursions; the next answer reads the conversation again"));
    let number = |answer: &Value, name: &str| answer[name].as_u64().unwrap();
    assert_eq!([0, 1, 3].map(|turn| number(&answers[turn], "reused_tokens")), [0; 3]);
    assert!(number(&answers[2], "reused_tokens") >= BLOCK, "nothing has changed between the second and the third");
    let mut said = String::new();
    for (turn, (line, depth)) in
        [(first, "3"), ("The next day", "1"), ("Then", "1"), ("At last", "3")].iter().enumerate()
    {
        said += if turn == 0 { "" } else { "\n" };
        said += line;
        let whole = [&["generate", &said, "--json", "--dtype", "f32", "--max-depth", depth], &options[..]].concat();
        let whole: Value = serde_json::from_str(&common::accepted(&whole)).unwrap();
        assert_eq!(
            (&whole["tokens"], &whole["text"]),
            (&answers[turn]["tokens"], &answers[turn]["text"]),
            "turn {turn}"
        );
        let deepest = answers[turn]["depths"].as_array().unwrap().iter().filter_map(Value::as_u64).max();
        assert!(deepest <= depth.parse().ok(), "turn {turn}: {deepest:?}");
        said += answers[turn]["text"].as_str().unwrap();
    }
    let (output, answers) = chat(&[&options[..], &["--max-depth", "1"]].concat(), "Once upon a time\n");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(answers[0]["mean_depth"], 1.0);
}

#[test]
fn lines_that_cannot_be_taken_stop_nothing() {
    if !gpu() {
        return;
    }
    let long = "word ".repeat(80);
    let input = format!(
        "/set temperature=-1\n/set top-k=many\n/set colour=red\n/set top-p\n/dance\n/save\n/set min-p=2\n/depth 4\n\
         /depth deep\n{long}\nOnce\n"
    );
    let (output, answers) = chat(&["--context", "64", "--max-new-tokens", "100"], &input);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    for words in [
        "error: temperature is -1, expected a finite number, 0 or more",
        "error: top-k is many, expected a number",
        "error: there is no colour to set; /help",
        "error: /set top-p is no assignment",
        "error: /dance is no command; /help",
        "error: /save names no file",
        "error: min-p is 2, expected a number from 0 to 1",
        "error: max-depth is 4, expected 1 to 3, the recursions of the model",
        "error: /depth deep is no depth, expected 1 to 3",
        "its context holds 64, so there is no room for an answer; /reset starts a new one",
    ] {
        assert!(message.contains(words), "{words:?} is not in: {message}");
    }
    assert_eq!(answers.len(), 1);
    let tokens =
        answers[0]["prompt_tokens"].as_u64().unwrap() as usize + answers[0]["tokens"].as_array().unwrap().len();
    assert!(tokens <= 64 && (tokens < 64 || message.contains("the context is full; /reset")), "{message}");
}

#[test]
fn conversations_that_cannot_begin() {
    let refused = |args: &[&str], words: &str| {
        let output = run(command(&[&["chat"], args].concat()), "");
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.starts_with("error: ") && message.lines().count() == 1 && message.contains(words), "{message}");
    };
    refused(&["--model", text(&golden("vanilla_gqa"))], "no tokenizer.json, and a conversation is text");
    refused(&["--context", "1025"], "the conversation that --context asks for has 1025 tokens");
    refused(&["--top-p", "0"], "--top-p is 0");
    refused(&["--stop", ""], "--stop is an empty text");
    let broken = with_files(&[("chat_template.jinja", "{% for %}")]);
    refused(&["--model", text(broken.path())], "chat_template.jinja: not a usable chat template: syntax error");
    let strict = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}";
    let strict = with_files(&[("chat_template.jinja", strict)]);
    let args = ["--model", text(strict.path()), "--system", "Be kind"];
    refused(&args, "refuses the conversation: System role not supported");
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_the_answer_and_not_the_program() {
    if !gpu() {
        return;
    }
    let mut child = command(&["chat", "--seed", "1", "--temperature", "1.2", "--max-new-tokens", "1000"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    writeln!(input, "Once upon a time").unwrap();
    let mut first = [0; 1];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    interrupt(&child);
    // The rest of what was said, then the program waits.
    let mut byte = [0; 1];
    while byte != *b"\n" {
        child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
    }
    writeln!(input, "/set max-new-tokens=2\nThen").unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{message}");
    let reasons: Vec<_> = message.lines().filter(|line| line.contains("tokens/s")).collect();
    assert!(reasons.len() == 2 && reasons[0].contains("(cancelled), read "), "{message}");
    assert!(reasons[1].starts_with("2 tokens (length), read "), "{message}");
}

#[cfg(unix)]
fn interrupt(child: &std::process::Child) {
    let sent = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

#[test]
fn nothing_is_left_behind() {
    if !gpu() {
        return;
    }
    // A history is for those who type.
    let folder = tempfile::tempdir().unwrap();
    let mut chat = command(&["chat", "--max-new-tokens", "1"]);
    chat.env("XDG_STATE_HOME", folder.path());
    assert!(run(chat, "Once\n").status.success());
    assert!(!folder.path().join("mor").exists());
}
