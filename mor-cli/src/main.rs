//! `mor`: run Mixture-of-Recursions language models from the command line.
//!
//! Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 a failure of the device or
//! of this program, 2 bad input (one sentence says what, where, what was expected and what to do), 130 interrupted.

mod args;
mod batch;
mod bench;
mod convert;
mod devices;
mod embedded;
mod eval;
mod failure;
mod forward;
mod generate;
mod input;
mod inspect;
mod model;
mod quantize;
mod style;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::args::{Args, BenchCommand, Command};

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();

    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return failure::report_usage(&error),
    };
    let result = match args.command {
        Command::Generate(args) => generate::run(&args),
        Command::Batch(args) => batch::run(&args),
        Command::Forward(args) => forward::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Eval(args) => eval::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Inspect(args) => inspect::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Quantize(args) => quantize::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Convert(args) => convert::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Devices(args) => devices::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Bench(BenchCommand::Throughput(args)) => bench::throughput(&args).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| failure::report(&error))
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
