//! The WGSL sources of the engine, embedded so that they travel inside the published package.
//!
//! One file is one kernel; files in folders are imported and never run alone: those of `shared/` by several kernels, those of a
//! folder with a kernel's name by that one. The text here is unspecialised: `mor-kernels` resolves `#import` and `#if` and adds
//! the constants. The README has the header that each file begins with, the directives, and the rules. There are no features.
//!
//! ```
//! let source = mor_shaders::source("rms_norm").expect("there is such a kernel");
//! assert!(source.starts_with("// rms_norm: "));
//! assert!(mor_shaders::kernel_names().any(|name| name == "rms_norm"));
//! ```

macro_rules! shaders {
    ($($path:literal),* $(,)?) => {
        /// Every source as `(path without extension, WGSL text)`, sorted by path.
        pub const SHADERS: &[(&str, &str)] =
            &[$(($path, include_str!(concat!("../", $path, ".wgsl")))),*];
    };
}

shaders![
    "attention_decode",
    "attention_prefill",
    "cross_entropy",
    "decode_layers",
    "decode_layers/attention",
    "decode_layers/dispatch",
    "decode_layers/draw",
    "decode_layers/mail",
    "decode_layers/products",
    "decode_layers/routing",
    "embed_tokens",
    "grid_exchange",
    "kv_pack",
    "linear",
    "linear/leave_part",
    "linear/places",
    "linear/tiles",
    "linear/units",
    "linear_decode",
    "read_words",
    "rms_norm",
    "router_expert",
    "router_token",
    "router_topk",
    "sample_partial",
    "sample_token",
    "shared/best",
    "shared/digits",
    "shared/epilogue",
    "shared/expert_gate",
    "shared/gate",
    "shared/kv",
    "shared/lanes",
    "shared/mailbox",
    "shared/order_key",
    "shared/pcg4d",
    "shared/q4",
    "shared/q8",
    "shared/quantized_units",
    "shared/radix_select",
    "shared/reduce",
    "shared/rows",
    "shared/sampling",
    "shared/scan",
    "shared/scripted_draw",
    "shared/weights",
    "slots_compact",
    "tokens_compact",
];

/// The source at `path` (for example `"rms_norm"` or `"shared/rows"`), or `None`.
pub fn source(path: &str) -> Option<&'static str> {
    SHADERS.binary_search_by_key(&path, |(name, _)| name).ok().map(|at| SHADERS[at].1)
}

/// Names of all kernels: the sources that are not parts.
pub fn kernel_names() -> impl Iterator<Item = &'static str> {
    SHADERS.iter().map(|(name, _)| *name).filter(|name| !name.contains('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_sorted_and_found() {
        assert!(SHADERS.is_sorted_by_key(|(name, _)| name));
        for (name, text) in SHADERS {
            assert_eq!(source(name), Some(*text));
        }
        assert_eq!(source("no_such_kernel"), None);
    }

    #[test]
    fn every_file_is_listed() {
        fn add(folder: &std::path::Path, prefix: &str, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(folder).expect("the folder is readable") {
                let path = entry.expect("the folder is readable").path();
                let stem = path.file_stem().expect("a file has a name").to_string_lossy().into_owned();
                if path.is_dir() {
                    add(&path, &format!("{prefix}{stem}/"), found);
                } else if path.extension().is_some_and(|extension| extension == "wgsl") {
                    found.push(format!("{prefix}{stem}"));
                }
            }
        }
        let mut found = Vec::new();
        add(std::path::Path::new(env!("CARGO_MANIFEST_DIR")), "", &mut found);
        found.sort();
        let listed: Vec<_> = SHADERS.iter().map(|(name, _)| *name).collect();
        assert_eq!(found, listed, "files of shaders/, then the list in lib.rs");
    }
}
