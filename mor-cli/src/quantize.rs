//! `mor quantize`: a model folder with its matrices as small integers.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use mor_model::{Checkpoint, Quantization};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::args::QuantizeArgs;
use crate::failure::bad_input;
use crate::input::read_text;
use crate::inspect::bytes_text;
use crate::model::Model;
use crate::{print, print_json};

/// Beginnings of the names of files that belong to a model whatever its weights: tokenizer, defaults of generation,
/// description and credits.
const COMPANIONS: [&str; 11] = [
    "tokenizer",
    "chat_template",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "generation_config",
    "README",
    "LICENSE",
    "NOTICE",
    "ATTRIBUTION",
];

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    out: String,
    quantization: &'static str,
    /// Bytes of the weights.
    bytes: u64,
    bytes_before: u64,
}

pub(crate) fn run(args: &QuantizeArgs) -> anyhow::Result<()> {
    let folder = &args.model;
    Model::named(Some(folder))?;
    check_target(&args.out)?;
    let quantization = args.to.quantization();
    let checkpoint = Checkpoint::open(folder)?;
    let before = checkpoint.parameter_counts().unique_bytes;
    let checkpoint = checkpoint.quantize(quantization)?;

    let partial = Partial::create(&args.out)?;
    let write = |name: &str, text: String| {
        let path = partial.0.join(name);
        fs::write(&path, text).map_err(|error| bad_input!("cannot write {}: {error}", path.display()))
    };
    write("config.json", quantized_config(&folder.join("config.json"), quantization)?)?;
    checkpoint.save(partial.0.join("model.safetensors"))?;
    for name in companions(folder)? {
        let path = folder.join(&name);
        fs::copy(&path, partial.0.join(name)).map_err(|error| bad_input!("cannot copy {}: {error}", path.display()))?;
    }
    partial.publish(&args.out)?;
    let after = checkpoint.parameter_counts().unique_bytes;
    if args.json {
        let out = args.out.display().to_string();
        let quantization = quantization.as_str();
        return print_json(&Report { out, quantization, bytes: after, bytes_before: before });
    }
    let (before, after) = (bytes_text(before), bytes_text(after));
    Ok(print(&format!("{}: {quantization}, {after} of weights, {before} before\n", args.out.display()))?)
}

/// Refuses a place that cannot be written to before any work is done for it.
fn check_target(out: &Path) -> anyhow::Result<()> {
    if out.symlink_metadata().is_ok() {
        return Err(bad_input!("{}: exists, expected the name of a new folder", out.display()));
    }
    if out.file_name().is_none() {
        return Err(bad_input!("{}: names no folder, expected the name of a new one", out.display()));
    }
    let parent = parent_of(out);
    if !parent.is_dir() {
        return Err(bad_input!("{}: there is no folder {} to write it in", out.display(), parent.display()));
    }
    Ok(())
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The configuration as it is, with what says how the weights are stored.
fn quantized_config(path: &Path, quantization: Quantization) -> anyhow::Result<String> {
    let mut config: Map<String, Value> = serde_json::from_str(&read_text(path)?)?;
    config.insert("quantization_config".to_owned(), quantization.to_json());
    Ok(serde_json::to_string_pretty(&config)? + "\n")
}

/// Names of the files that go along.
fn companions(folder: &Path) -> anyhow::Result<Vec<OsString>> {
    let unreadable = |error| bad_input!("cannot read {}: {error}", folder.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let name = entry.file_name();
        let goes_along = COMPANIONS.iter().any(|start| name.to_string_lossy().starts_with(start));
        if goes_along && entry.path().is_file() {
            names.push(name);
        }
    }
    Ok(names)
}

/// A folder beside its final place, removed unless it gets there: nobody ever sees a part of a model.
struct Partial(PathBuf);

impl Partial {
    fn create(out: &Path) -> anyhow::Result<Self> {
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        // The process number keeps two writers apart.
        let path = parent_of(out).join(format!(".{name}.{}.partial", std::process::id()));
        fs::create_dir(&path).map_err(|error| bad_input!("cannot write {}: {error}", path.display()))?;
        Ok(Self(path))
    }

    fn publish(self, out: &Path) -> anyhow::Result<()> {
        // Some systems would replace an empty folder that has come into being meanwhile.
        check_target(out)?;
        fs::rename(&self.0, out).map_err(|error| bad_input!("cannot write {}: {error}", out.display()))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Gone already where it was published.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_model_leaves_no_trace() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let partial = Partial::create(&out).unwrap();
        fs::write(partial.0.join("config.json"), "{}").unwrap();
        drop(partial);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

        let partial = Partial::create(&out).unwrap();
        fs::create_dir(&out).unwrap();
        assert!(partial.publish(&out).unwrap_err().to_string().contains("exists"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn tokenizers_and_credits_go_along() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "tokenizer.json", "ATTRIBUTION.txt", "model.safetensors", "golden.json"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let mut names = companions(folder.path()).unwrap();
        names.sort();
        assert_eq!(names, ["ATTRIBUTION.txt", "tokenizer.json"]);
    }
}
