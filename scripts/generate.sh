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
cargo build "${package[@]}"
exec cargo run --quiet "${package[@]}" -- generate "$@"
