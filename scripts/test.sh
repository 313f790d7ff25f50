#!/usr/bin/env bash
# Sets up and runs every check: formatting, clippy, documentation, all tests and doc tests, each benchmark once.
#
# Tests run on the best adapter of the machine; MOR_TEST_DEVICE=llvmpipe (a part of a name) chooses another.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh tests
. scripts/env.sh

say() { printf '\n==> [%dm%02ds] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*" >&2; }
run() {
    say "$*"
    "$@"
}

run cargo fmt --all --check
run cargo clippy --workspace --all-targets --locked -- -D warnings
# The program without what is optional, and the libraries with little else.
run cargo clippy --package mor-cli --no-default-features --locked -- -D warnings
run env RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

# Builds what `cargo test` runs, and lists FOLDER|PROGRAM for each, the folder being its package's.
build() {
    local manifest='"manifest_path":"\([^"]*\)/Cargo.toml"' tests='"profile":{[^}]*"test":true}'
    local program='"executable":"\([^"]*\)"'
    run cargo test --workspace --locked --no-run --message-format json-render-diagnostics "$@" |
        sed -n "s,.*$manifest.*$tests.*$program.*,\1|\2,p"
}
# Prints what the program printed when it has ended, as a whole.
run_program() {
    local folder=${1%|*} program=${1##*|} status=0 start=$SECONDS
    local name=${program##*/}
    (cd "$folder" && "$program") >"$logs/$name" 2>&1 || status=$?
    printf '\n==> %s %s, %ds\n%s\n' "${folder##*/}" "${name%-*}" $((SECONDS - start)) "$(<"$logs/$name")"
    return $status
}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export logs
export -f run_program

# --bench by name: the workspace's features and artefacts stay those of the tests.
programs=$(build --bench kernels && build)
# By folder: the longest, of kernels, are not the last.
programs=$(sort <<<"$programs")
[ -n "$programs" ] || { say "cargo named no test programs"; exit 1; }
# Two at a time: on a software rasteriser each leaves cores idle, as where it compiles a kernel or has one test left.
say "$(wc -l <<<"$programs") test programs, benches among them"
tr '\n' '\0' <<<"$programs" | xargs -0 -n 1 -P 2 bash -c 'run_program "$1"' run_program
run cargo test --workspace --locked --doc
