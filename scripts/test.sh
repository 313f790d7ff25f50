#!/usr/bin/env bash
# Sets up and runs every check: formatting, clippy, documentation, all tests and doc tests, each benchmark once.
#
# Tests run on the best adapter of the machine; MOR_TEST_DEVICE=llvmpipe (a part of a name) chooses another.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh tests
. scripts/env.sh

run() {
    printf '\n==> [%dm%02ds] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"
    "$@"
}

run cargo fmt --all --check
run cargo clippy --workspace --all-targets --locked -- -D warnings
# The program without what is optional, and the libraries with little else.
run cargo clippy --package mor-cli --no-default-features --locked -- -D warnings
# --bench by name: the workspace's features and artefacts stay those of the tests below.
run cargo test --workspace --locked --bench kernels
run env RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
run cargo test --workspace --locked
