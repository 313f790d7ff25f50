//! `mor quantize`: a model folder with its matrices as small integers.

use std::path::Path;

use mor_model::{Checkpoint, NewFolder, Quantization};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::args::QuantizeArgs;
use crate::input::read_text;
use crate::inspect::bytes_text;
use crate::model::resolve;
use crate::{print, print_json};

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
    let folder = resolve(&args.model)?;
    NewFolder::check(&args.out)?;
    let quantization = args.to.quantization();
    let checkpoint = Checkpoint::open(&folder)?;
    let before = checkpoint.parameter_counts().unique_bytes;
    let checkpoint = checkpoint.quantize(quantization)?;

    let out = NewFolder::create(&args.out)?;
    out.write("config.json", &quantized_config(&folder.join("config.json"), quantization)?)?;
    checkpoint.save(out.path().join("model.safetensors"))?;
    out.copy_companions(&folder)?;
    out.publish()?;
    let after = checkpoint.parameter_counts().unique_bytes;
    if args.json {
        let out = args.out.display().to_string();
        let quantization = quantization.as_str();
        return print_json(&Report { out, quantization, bytes: after, bytes_before: before });
    }
    let (before, after) = (bytes_text(before), bytes_text(after));
    Ok(print(&format!("{}: {quantization}, {after} of weights, {before} before\n", args.out.display()))?)
}

/// The configuration as it is, with what says how the weights are stored.
fn quantized_config(path: &Path, quantization: Quantization) -> anyhow::Result<String> {
    let mut config: Map<String, Value> = serde_json::from_str(&read_text(path)?)?;
    config.insert("quantization_config".to_owned(), quantization.to_json());
    Ok(serde_json::to_string_pretty(&config)? + "\n")
}
