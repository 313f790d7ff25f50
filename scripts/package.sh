#!/usr/bin/env bash
# Packs every crate that is to be published and builds each from its package, the others' packages in place of a registry.
# Nothing is uploaded.
#
#   scripts/package.sh               what a release does before `cargo publish --workspace`
#   scripts/package.sh --no-verify   packs and lists, builds nothing
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh

fail() {
    printf 'package: %s\n' "$*" >&2
    exit 1
}

# What registries take.
most_bytes=$((10 * 1000 * 1000))

cargo package --workspace --exclude mor-bench --locked --allow-dirty "$@"

target=${CARGO_TARGET_DIR:-target}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
# has CRATE FILE...: the package is small enough and holds these, and a README for its front page.
has() {
    local package=$target/package/$1-$version.crate bytes files file
    bytes=$(wc -c <"$package")
    files=$(tar -tf "$package")
    printf '%9d bytes  %s\n' "$bytes" "$package"
    [ "$bytes" -le "$most_bytes" ] || fail "$package is larger than $most_bytes bytes"
    for file in README.md "${@:2}"; do
        grep -qxF "$1-$version/$file" <<<"$files" || fail "$package lacks $file"
    done
}
mapfile -t shaders < <(cd shaders && ls ./*.wgsl shared/*.wgsl | sed 's|^\./||')
has mor-shaders "${shaders[@]}"
has mor-models ATTRIBUTION-ccby.txt tinystories-mor-expert-5m/{config.json,model.safetensors,tokenizer.json}
has mor-kernels examples/custom_kernel.wgsl
has mor-model
has mor-runtime
has mor-cli
