#!/usr/bin/env bash
# Makes sure that everything mor needs is installed; idempotent, and installs only what is missing.
#
#   scripts/setup.sh         Rust, a linker, a Vulkan driver: what building and running take
#   scripts/setup.sh tests   and rustfmt, clippy, spirv-val: what the tests take besides
#
# A machine without any Vulkan driver gets Mesa's software one (package mesa-vulkan-drivers), through apt-get and root
# or sudo. Where that cannot be done, says what to install and ends with exit code 1. A GPU's own driver is never
# installed or touched.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf 'setup: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 1
}

# install_packages WHY PACKAGE...
install_packages() {
    local why=$1
    shift
    local as=()
    if ! command -v apt-get >/dev/null; then
        fail "$why; install what your distribution calls: $*"
    fi
    if [ "$(id -u)" != 0 ]; then
        if ! command -v sudo >/dev/null; then
            fail "$why; as root, run: apt-get install $*"
        elif [ -t 0 ]; then
            as=(sudo)
        elif sudo -n true 2>/dev/null; then
            as=(sudo -n)
        else
            fail "$why; run: sudo apt-get install $*"
        fi
    fi
    say "$why; installing: $*"
    # A list that cannot be refreshed may still know the packages.
    "${as[@]}" apt-get update -qq >&2 || say "apt-get update failed; trying with the package lists as they are"
    "${as[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2 </dev/null ||
        fail "apt-get could not install: $*"
}

has_vulkan_loader() {
    PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1' ||
        compgen -G '/usr/lib*/libvulkan.so.1' >/dev/null || compgen -G '/usr/local/lib/libvulkan.so.1' >/dev/null
}

# A Vulkan driver announces itself by a JSON file where the loader looks.
has_vulkan_driver() {
    local files=${VK_DRIVER_FILES:-${VK_ICD_FILENAMES:-}} file dir
    if [ -n "$files" ]; then
        local IFS=:
        for file in $files; do
            [ -e "$file" ] && return 0
        done
        fail "VK_DRIVER_FILES or VK_ICD_FILENAMES names no existing file: $files"
    fi
    for dir in /usr/share /usr/local/share /etc "${XDG_DATA_HOME:-${HOME:-}/.local/share}"; do
        compgen -G "$dir/vulkan/icd.d/*.json" >/dev/null && return 0
    done
    return 1
}

if ! command -v cargo >/dev/null && [ -x "${CARGO_HOME:-${HOME:-}/.cargo}/bin/cargo" ]; then
    export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
fi
wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
command -v cargo >/dev/null || fail "no cargo; install Rust $wanted or newer: https://rustup.rs"
found=$(cargo --version | sed 's/^cargo \([0-9.]*\).*/\1/')
[ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1)" = "$wanted" ] ||
    fail "cargo is $found; install Rust $wanted or newer (with rustup: rustup update stable)"

if [ "$(uname -s)" = Linux ]; then
    command -v cc >/dev/null || install_packages "no C linker" gcc libc6-dev
    if ! has_vulkan_driver; then
        install_packages "no Vulkan driver" mesa-vulkan-drivers libvulkan1
    elif ! has_vulkan_loader; then
        install_packages "no Vulkan loader (libvulkan.so.1)" libvulkan1
    fi
fi

if [ "${1:-}" = tests ]; then
    for component in fmt:rustfmt clippy:clippy; do
        if ! cargo "${component%:*}" --version >/dev/null 2>&1; then
            command -v rustup >/dev/null || fail "no ${component#*:}; install it beside cargo"
            rustup component add "${component#*:}" >&2
        fi
    done
    if ! command -v spirv-val >/dev/null; then
        [ "$(uname -s)" = Linux ] || fail "no spirv-val; install SPIRV-Tools (Homebrew: brew install spirv-tools)"
        install_packages "no spirv-val" spirv-tools
    fi
fi
