//! The program as tests start it: without what the machine's user has set.

#![allow(dead_code, reason = "every test file uses a part of it")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Whether to run tests that need a device; says so where not.
pub(crate) fn gpu() -> bool {
    let skip = std::env::var_os("MOR_TEST_GPU").is_some_and(|value| value == "skip");
    if skip {
        eprintln!("skipped: MOR_TEST_GPU=skip");
    }
    !skip
}

/// The program, with the adapter that the environment may choose and nothing else of it.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mor"));
    clean(&mut command).args(args);
    command
}

/// Takes out of the environment what changes outputs.
pub(crate) fn clean(command: &mut Command) -> &mut Command {
    for name in ["CONFIG", "MODEL", "DEVICES", "DTYPE", "KV", "QUANTIZE"] {
        command.env_remove(format!("MOR_{name}"));
    }
    for folder in ["CONFIG", "STATE"] {
        command.env(format!("XDG_{folder}_HOME"), concat!(env!("CARGO_TARGET_TMPDIR"), "/nobody"));
    }
    // Without it Mesa adds lines of its own to standard error.
    command.env_remove("RUST_LOG").env("XDG_RUNTIME_DIR", std::env::temp_dir())
}

/// Runs it to its end on a standard input.
pub(crate) fn run(mut command: Command, input: &str) -> Output {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().expect("the program starts");
    // A program that has already refused may have closed the pipe.
    let _ = child.stdin.take().expect("it is piped").write_all(input.as_bytes());
    child.wait_with_output().expect("it ends")
}

pub(crate) fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("results are UTF-8")
}

pub(crate) fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).expect("messages are UTF-8")
}

/// The standard output of a run that went well.
pub(crate) fn accepted(args: &[&str]) -> String {
    let output = run(command(args), "");
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output).to_owned()
}

pub(crate) fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// A model without a tokenizer: 97 tokens.
pub(crate) fn golden(name: &str) -> PathBuf {
    root().join("mor-model/tests/fixtures/golden").join(name)
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}
