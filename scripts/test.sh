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

# The test programs two at a time: on a software rasteriser each leaves cores idle between its dispatches. As under
# `cargo test`, each runs in the folder of its package; what it prints comes as a whole when it ends.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
run cargo test --workspace --locked --no-run --message-format json-render-diagnostics >"$work/artifacts"
sed -n 's|.*"manifest_path":"\([^"]*\)/Cargo.toml".*"profile":{[^}]*"test":true}.*"executable":"\([^"]*\)".*|\1\n\2|p' \
    "$work/artifacts" >"$work/programs"
run_program() {
    local start=$SECONDS status=0 name=${2##*/}
    (cd "$1" && "$2") >"$work/$name" 2>&1 || status=$?
    printf '\n==> %ds %s %s\n%s\n' $((SECONDS - start)) "${1##*/}" "${name%-*}" "$(<"$work/$name")"
    return $status
}
export work
export -f run_program
run xargs -d '\n' -n 2 -P 2 bash -c 'run_program "$@"' run_program <"$work/programs"
run cargo test --workspace --locked --doc
