#!/usr/bin/env bash
# Sets up, builds and continues a prompt; all arguments go to `mor generate`.
#
#   scripts/generate.sh "Once upon a time"
#   scripts/generate.sh "Once upon a time" --seed 7 --show-depth
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh"
. "$root/scripts/env.sh"

package=(--release --locked --manifest-path "$root/Cargo.toml" --package mor-cli)
# What `mor bench` says of its build.
MOR_COMMIT=$(git -C "$root" rev-parse --short HEAD 2>/dev/null || true)
export MOR_COMMIT
cargo build "${package[@]}"
exec cargo run --quiet "${package[@]}" -- generate "$@"
