//! Every command that the documentation shows is run: the lines of `sh` blocks, and those behind a `$` in `console` blocks.
//!
//! A block that cannot be run here says so behind its language, for readers of the source: "```sh not-run". Its commands
//! are those of [`NOT_RUN`], which has the reasons.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{clean, gpu, root, stderr, stdout};

/// Beginnings of commands that are shown and not run, with the reason.
const NOT_RUN: [(&str, &str); 6] = [
    ("./scripts/generate.sh", "sets a machine up; CI begins with the same set-up"),
    ("./scripts/test.sh", "is what CI runs, this test included"),
    ("cargo run --release", "builds everything for release, which takes minutes"),
    ("cargo install", "builds everything for release, which takes minutes, and changes the machine"),
    ("cargo test", "is what CI runs, this test included"),
    ("cargo bench", "takes minutes, and its numbers are of a machine that does nothing else"),
];

/// A command, and what is shown below it.
struct Shown {
    at: String,
    command: String,
    output: String,
    is_run: bool,
}

/// The commands of a text.
fn commands(origin: &str, text: &str) -> Vec<Shown> {
    let mut found: Vec<Shown> = Vec::new();
    let mut block: Option<(bool, bool)> = None;
    let mut goes_on = false;
    for (index, line) in text.lines().enumerate() {
        if let Some(info) = line.trim_start().strip_prefix("```") {
            let mut words = info.split_whitespace();
            block = match (block, words.next()) {
                (None, Some(language @ ("sh" | "console"))) => {
                    Some((language == "console", !words.any(|word| word == "not-run")))
                }
                // Of another language, or its end.
                _ => None,
            };
            goes_on = false;
            continue;
        }
        let Some((is_console, is_run)) = block else { continue };
        let command = if is_console && !goes_on { line.strip_prefix("$ ") } else { Some(line) };
        match (command, found.last_mut()) {
            (Some(command), Some(last)) if goes_on => {
                last.command.push('\n');
                last.command.push_str(command);
            }
            (Some(command), _) if !command.trim().is_empty() && !command.starts_with('#') => {
                let at = format!("{origin}:{}", index + 1);
                found.push(Shown { at, command: command.to_owned(), output: String::new(), is_run });
            }
            (None, Some(last)) => last.output += &format!("{line}\n"),
            _ => {}
        }
        goes_on = command.is_some_and(|command| command.ends_with('\\'));
    }
    found
}

/// README and `docs/`.
fn documents() -> Vec<PathBuf> {
    let mut paths = vec![root().join("README.md")];
    for entry in fs::read_dir(root().join("docs")).into_iter().flatten() {
        paths.push(entry.unwrap().path());
    }
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    paths.sort();
    paths
}

fn all() -> Vec<Shown> {
    let of = |path: PathBuf| {
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        commands(&name, &fs::read_to_string(&path).unwrap())
    };
    documents().into_iter().flat_map(of).collect()
}

#[test]
fn what_is_not_run_has_a_reason() {
    let all = all();
    for shown in &all {
        let reason = NOT_RUN.iter().find(|(beginning, _)| shown.command.starts_with(beginning));
        assert_eq!(
            shown.is_run,
            reason.is_none(),
            "{}: {}: its block is to say \"not-run\" if and only if NOT_RUN has the reason",
            shown.at,
            shown.command
        );
    }
    for (beginning, _) in NOT_RUN {
        assert!(all.iter().any(|shown| shown.command.starts_with(beginning)), "nothing shows {beginning}");
    }
}

/// A folder that looks like the repository and may be written to.
fn workplace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(root()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        if name != "target" && !name.to_string_lossy().starts_with('.') {
            link(&entry.path().canonicalize().unwrap(), &folder.path().join(name));
        }
    }
    fs::create_dir(folder.path().join(".bin")).unwrap();
    link(Path::new(env!("CARGO_BIN_EXE_mor")), &folder.path().join(".bin/mor"));
    folder
}

#[cfg(unix)]
fn link(original: &Path, link: &Path) {
    std::os::unix::fs::symlink(original, link).unwrap();
}

#[cfg(unix)]
#[test]
fn commands_that_are_shown_work() {
    if !gpu() {
        return;
    }
    let folder = workplace();
    let path = std::env::var("PATH").unwrap_or_default();
    for shown in all().iter().filter(|shown| shown.is_run) {
        // A file that is shown is there for the commands after it.
        if let Some(name) = shown.command.strip_prefix("cat ").filter(|name| !folder.path().join(name).exists()) {
            fs::write(folder.path().join(name), &shown.output).unwrap();
        }
        let mut bash = Command::new("bash");
        bash.args(["-e", "-o", "pipefail", "-c", &shown.command]).current_dir(folder.path());
        bash.env("PATH", format!("{}:{path}", folder.path().join(".bin").display()));
        clean(&mut bash);
        let output = common::run(bash, "");
        assert!(output.status.success(), "{}: {}\n{}", shown.at, shown.command, stderr(&output));
        // Text may differ from machine to machine, columns and keys may not.
        if shown.output.trim().is_empty() || shown.command.starts_with("cat ") {
            continue;
        }
        assert!(!stdout(&output).is_empty(), "{}: {}: prints nothing", shown.at, shown.command);
    }
}

#[test]
fn blocks_are_taken_apart() {
    let text = "```sh\n# what\nmor a \\\n  b   # why\n\nmor c\n```\ntext\n```console not-run\n$ cat x\n{}\n\n$ mor d\n```\n```rust\nmor e\n```\n";
    let found: Vec<_> =
        commands("x", text).into_iter().map(|shown| (shown.at, shown.command, shown.output, shown.is_run)).collect();
    let expected = [
        ("x:3", "mor a \\\n  b   # why", "", true),
        ("x:6", "mor c", "", true),
        ("x:10", "cat x", "{}\n\n", false),
        ("x:13", "mor d", "", false),
    ];
    assert_eq!(found, expected.map(|(at, command, output, is_run)| (at.into(), command.into(), output.into(), is_run)));
}
