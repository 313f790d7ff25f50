//! `mor completions` and `mor man`: the command line as shells and `man` want it described.

use std::path::PathBuf;

use clap_complete::Shell;

use crate::failure::bad_input;
use crate::{note, print, settings};

#[derive(Debug, clap::Args)]
pub(crate) struct CompletionsArgs {
    /// Shell to print it for; its own manual says where it goes
    #[arg(value_name = "SHELL", value_enum)]
    shell: Shell,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ManArgs {
    /// Folder to write them to; made if there is none
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

pub(crate) fn completions(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut settings::command(), "mor", &mut script);
    Ok(print(&String::from_utf8_lossy(&script))?)
}

pub(crate) fn man(args: &ManArgs) -> anyhow::Result<()> {
    let written =
        std::fs::create_dir_all(&args.dir).and_then(|()| clap_mangen::generate_to(settings::command(), &args.dir));
    written.map_err(|error| bad_input!("cannot write to {}: {error}", args.dir.display()))?;
    note(&format!("wrote mor.1 and a page a command; man -l {} shows the first", args.dir.join("mor.1").display()));
    Ok(())
}
