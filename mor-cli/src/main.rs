//! `mor`: run Mixture-of-Recursions language models from the command line.
//!
//! Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 a failure of the device or
//! of this program, 2 bad input (one sentence says what, where, what was expected and what to do), 130 interrupted.

// The documentation of arguments is their help, where brackets are no links.
#![allow(rustdoc::broken_intra_doc_links)]

mod args;
mod batch;
mod bench;
mod chat;
mod convert;
mod depth;
mod devices;
mod embedded;
mod eval;
mod failure;
mod forward;
mod generate;
mod help;
mod input;
mod inspect;
mod interrupt;
mod model;
mod output;
mod plot;
mod profile;
mod quantize;
mod settings;
mod style;
mod sweep;
mod trace;

use std::io::Write;
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

use crate::args::Command;

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    log.with_ansi(style::stderr_has_colour()).init();

    run().unwrap_or_else(|error| failure::report(&error))
}

fn run() -> anyhow::Result<ExitCode> {
    match settings::parse()?.command {
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Batch(args) => batch::run(&args),
        Command::Forward(args) => forward::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Eval(args) => eval::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Trace(args) => trace::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Inspect(args) => inspect::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Quantize(args) => quantize::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Convert(args) => convert::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Devices(args) => devices::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Profile(args) => profile::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Completions(args) => help::completions(&args).map(|()| ExitCode::SUCCESS),
        Command::Man(args) => help::man(&args).map(|()| ExitCode::SUCCESS),
    }
}

/// Writes to standard output at once.
fn print(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Writes a line to standard error. It carries no results, so that it cannot be written is no failure.
fn note(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Writes a value as JSON, one object on several lines.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    Ok(print(&format!("{}\n", serde_json::to_string_pretty(value)?))?)
}
