//! The example of this crate runs. `cargo test` builds examples before tests; to run this file alone, build it first:
//! `cargo build --workspace --examples`.

use std::path::Path;
use std::process::Command;

#[test]
fn custom_kernel_computes() {
    let test = std::env::current_exe().expect("a test has a path");
    let target = test.parent().and_then(Path::parent).expect("tests lie in target/PROFILE/deps");
    let program = target.join("examples/custom_kernel").with_extension(std::env::consts::EXE_EXTENSION);
    let output = Command::new(&program).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}; build the examples first", program.display()));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.starts_with("axpy") && text.contains("y[999] = 999"), "{text}");
}
