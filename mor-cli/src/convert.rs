//! `mor convert`: a model folder of another checkpoint, or the way back.

use std::path::PathBuf;

use clap::ValueEnum;
use mor_model::convert::{ConvertOptions, ConvertReport, Init, Layout, Start, TiedTensor, convert};
use mor_model::{Dtype, Mode, SharingStrategy};

use crate::args::at_least_one;
use crate::failure::bad_input;
use crate::inspect::bytes_text;
use crate::model::resolve;
use crate::{note, print, print_json};

/// Names that a report for people lists before it says how many more there are.
const LISTED: usize = 4;

#[derive(Debug, clap::Args)]
pub(crate) struct ConvertArgs {
    /// A run of the official training code (safetensors or pytorch_model.bin, and its YAML file), a Llama checkpoint, or
    /// a folder of this program; or hf:owner/name[@revision]
    #[arg(value_name = "SRC")]
    src: PathBuf,
    /// Folder to write; must not exist
    #[arg(value_name = "OUT")]
    out: PathBuf,
    /// YAML file that an official run was started with [default: the one in SRC]
    #[arg(long, value_name = "YAML")]
    config: Option<PathBuf>,
    /// F32, F16 or BF16 for all tensors [default: as they are]
    #[arg(long, value_enum)]
    dtype: Option<StoredArg>,
    /// Most bytes of a weight file
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = file_size)]
    max_shard_size: u64,
    /// What OUT is: a folder of this program, or one of the official layout with a YAML file
    #[arg(long, value_enum, default_value_t = LayoutArg::Mor)]
    to: LayoutArg,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Which layers of a vanilla model to tie; none leaves it as it is
    #[arg(long, value_enum, help_heading = "Recursive start")]
    sharing: Option<SharingArg>,
    /// How often the shared block is applied, 2 or more
    #[arg(long, value_name = "R", requires = "sharing", help_heading = "Recursive start")]
    num_recursions: Option<usize>,
    /// Which layers the tied ones start from
    #[arg(long, value_enum, requires = "sharing", default_value_t = InitArg::Stepwise, help_heading = "Recursive start")]
    init: InitArg,
    /// Fixed depth, or routers, which are new and must be trained [default: expert; recursive with a sequence]
    #[arg(long, value_enum, requires = "sharing", help_heading = "Recursive start")]
    mode: Option<ModelModeArg>,
    /// Adapters of this rank that give each tied layer back what tying takes from it, as far as they can [default: none]
    #[arg(long, value_name = "RANK", requires = "sharing", value_parser = at_least_one, help_heading = "Recursive start")]
    lora_rank: Option<usize>,
    /// Seed of the routers
    #[arg(long, value_name = "S", default_value_t = 0, requires = "sharing", help_heading = "Recursive start")]
    seed: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum StoredArg {
    F32,
    F16,
    Bf16,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LayoutArg {
    Mor,
    Official,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
enum SharingArg {
    None,
    Cycle,
    Sequence,
    MiddleCycle,
    MiddleSequence,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum InitArg {
    Stepwise,
    Lower,
    Upper,
    Average,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ModelModeArg {
    Recursive,
    Expert,
    Token,
}

pub(crate) fn run(args: &ConvertArgs) -> anyhow::Result<()> {
    let options = args.options()?;
    let report = convert(&resolve(&args.src)?, &args.out, &options)?;
    match args.json {
        true => print_json(&report)?,
        false => print(&to_text(args, &report))?,
    }
    if report.untrained_router {
        note("note: the routers are new; train the model before its depths and its text mean anything");
    }
    Ok(())
}

impl ConvertArgs {
    fn options(&self) -> anyhow::Result<ConvertOptions> {
        let sharing = self.sharing.map(|sharing| match sharing {
            SharingArg::None => SharingStrategy::None,
            SharingArg::Cycle => SharingStrategy::Cycle,
            SharingArg::Sequence => SharingStrategy::Sequence,
            SharingArg::MiddleCycle => SharingStrategy::MiddleCycle,
            SharingArg::MiddleSequence => SharingStrategy::MiddleSequence,
        });
        let start = match (sharing, self.num_recursions) {
            (None, _) => None,
            (Some(sharing), None) if sharing != SharingStrategy::None => {
                return Err(bad_input!(
                    "--sharing is {sharing} without --num-recursions, expected a number of 2 or more"
                ));
            }
            (Some(sharing), num_recursions) => Some(Start {
                sharing,
                num_recursions: num_recursions.unwrap_or(1),
                mode: self.mode.map(|mode| match mode {
                    ModelModeArg::Recursive => Mode::Recursive,
                    ModelModeArg::Expert => Mode::Expert,
                    ModelModeArg::Token => Mode::Token,
                }),
                init: match self.init {
                    InitArg::Stepwise => Init::Stepwise,
                    InitArg::Lower => Init::Lower,
                    InitArg::Upper => Init::Upper,
                    InitArg::Average => Init::Average,
                },
                lora_rank: self.lora_rank,
                seed: self.seed,
            }),
        };
        Ok(ConvertOptions {
            run_config: self.config.clone(),
            start,
            dtype: self.dtype.map(|dtype| match dtype {
                StoredArg::F32 => Dtype::F32,
                StoredArg::F16 => Dtype::F16,
                StoredArg::Bf16 => Dtype::BF16,
            }),
            max_shard_bytes: self.max_shard_size,
            layout: match self.to {
                LayoutArg::Mor => Layout::Mor,
                LayoutArg::Official => Layout::Official,
            },
        })
    }
}

fn to_text(args: &ConvertArgs, report: &ConvertReport) -> String {
    let recursions = match report.num_recursions {
        1 => String::new(),
        n => format!(", {n} recursions, sharing {}", report.sharing),
    };
    let mut lines = vec![
        format!("read           {} ({})", args.src.display(), report.source),
        format!("model          {}{recursions}", report.mode),
        format!(
            "written        {}: {} tensors, {} in {}",
            args.out.display(),
            report.num_tensors,
            bytes_text(report.num_bytes),
            match &report.files[..] {
                [file] => file.clone(),
                files => format!("{} files", files.len()),
            }
        ),
    ];
    let names = |tensors: &[TiedTensor]| tensors.iter().map(|tensor| tensor.name.clone()).collect::<Vec<_>>();
    for (what, names) in [
        ("copied", &report.copied),
        ("tied", &names(&report.tied)),
        ("kept separate", &names(&report.kept_separate)),
        ("ignored", &report.ignored),
    ] {
        if !names.is_empty() {
            lines.push(format!("{what:<15}{}", list(names)));
        }
    }
    lines.extend(report.sources.iter().map(|layer| {
        let sources: Vec<_> = layer.sources.iter().map(usize::to_string).collect();
        format!("layer {:<9}from {}", layer.layer, sources.join(", "))
    }));
    lines.join("\n") + "\n"
}

fn list(names: &[String]) -> String {
    match names.len() {
        count if count > LISTED => format!("{count}: {}, ...", names[..LISTED].join(", ")),
        _ => names.join(", "),
    }
}

/// A number of bytes, or one with a unit.
fn file_size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 9] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("B", 1),
    ];
    let unit = UNITS.iter().find_map(|(name, bytes)| Some((text.strip_suffix(name)?, *bytes)));
    let (number, bytes) = unit.unwrap_or((text, 1));
    let size = number.trim().parse::<u64>().ok().and_then(|number| number.checked_mul(bytes));
    size.filter(|&size| size > 0).ok_or_else(|| "expected a size, for example 5GB or 500MiB".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(file_size("5GB"), Ok(5_000_000_000));
        assert_eq!(file_size("2 MiB"), Ok(2 << 20));
        assert_eq!(file_size("7"), Ok(7));
        for text in ["", "GB", "0", "-1", "5gb", "1.5GB", "99999999999TB"] {
            assert!(file_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn long_lists_are_cut() {
        let names: Vec<String> = (0..6).map(|i| i.to_string()).collect();
        assert_eq!(list(&names[..2]), "0, 1");
        assert_eq!(list(&names), "6: 0, 1, 2, 3, ...");
    }
}
