//! What an error becomes: one sentence on standard error and an exit code.

use std::fmt;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use mor_kernels::KernelError;
use mor_model::ModelError;
use mor_runtime::RuntimeError;

use crate::{note, print};

/// Input from outside that cannot be used; the text is the whole sentence.
#[derive(Debug)]
pub(crate) struct BadInput(pub(crate) String);

impl fmt::Display for BadInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadInput {}

/// Makes a [`BadInput`] error from a format string.
macro_rules! bad_input {
    ($($arg:tt)*) => { anyhow::Error::new($crate::failure::BadInput(format!($($arg)*))) };
}
pub(crate) use bad_input;

const FAILURE: u8 = 1;
pub(crate) const BAD_INPUT: u8 = 2;
/// As a shell reports a program that SIGINT ended.
pub(crate) const INTERRUPTED: u8 = 130;

/// Reports an error that ended a command.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    if is_broken_pipe(error) {
        // The reader has seen enough, for example `| head`.
        return ExitCode::SUCCESS;
    }
    if let Some(error) = error.downcast_ref::<clap::Error>() {
        return report_usage(error);
    }
    note(&format!("error: {}", one_line(&sentence(error))));
    ExitCode::from(exit_code(error))
}

/// Reports what clap found in the arguments, which may also be a request for help.
fn report_usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A reader that has gone wants no help.
            let _ = print(&error.render().to_string());
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            note(error.render().to_string().trim_end());
            ExitCode::from(BAD_INPUT)
        }
        _ => {
            note(&format!("error: {}", usage_sentence(error)));
            ExitCode::from(BAD_INPUT)
        }
    }
}

/// clap's paragraphs as one sentence: its first, without the usage, plus its suggestion if it has one.
pub(crate) fn usage_sentence(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let mut sentence = one_line(text.split("\n\n").next().unwrap_or(text));
    let suggested = [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand, ContextKind::SuggestedValue];
    if let Some(name) = suggested.into_iter().find_map(|kind| match error.get(kind)? {
        ContextValue::String(name) => Some(name.clone()),
        // clap sorts them by their likeness, the best last.
        ContextValue::Strings(names) => names.last().cloned(),
        _ => None,
    }) {
        sentence.push_str(&format!("; did you mean '{name}'?"));
    } else {
        sentence.push_str("; --help lists what is accepted");
    }
    sentence
}

fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<BadInput>() || error.is::<ModelError>() {
        return BAD_INPUT;
    }
    let kernel = match error.downcast_ref::<RuntimeError>() {
        Some(RuntimeError::Kernel(error)) => Some(error),
        Some(_) => return BAD_INPUT,
        None => error.downcast_ref::<KernelError>(),
    };
    match kernel {
        // What was asked for does not exist or does not fit; everything else is the device's fault or ours.
        Some(KernelError::NoAdapter { .. } | KernelError::OutOfMemory { .. } | KernelError::Limit { .. }) => BAD_INPUT,
        _ => FAILURE,
    }
}

/// The library speaks of parameters; here they are options.
pub(crate) fn sentence(error: &anyhow::Error) -> String {
    match error.downcast_ref::<RuntimeError>() {
        Some(RuntimeError::Parameter { name, found, expected }) => {
            let option = match *name {
                "repetition_penalty" => "--repeat-penalty".to_owned(),
                "prefill_rows" => "MOR_PREFILL_CHUNK".to_owned(),
                name => format!("--{}", name.replace('_', "-")),
            };
            format!("{option} is {found}, expected {expected}")
        }
        Some(RuntimeError::Model(error)) => model_sentence(error),
        _ => error.downcast_ref().map_or_else(|| error.to_string(), model_sentence),
    }
}

fn model_sentence(error: &ModelError) -> String {
    match error {
        ModelError::DepthControl { name, found, expected } => {
            format!("--{} is {found}, expected {expected}", name.replace('_', "-"))
        }
        _ => error.to_string(),
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_input_and_failures_have_their_own_codes() {
        assert_eq!(exit_code(&bad_input!("x")), 2);
        assert_eq!(exit_code(&RuntimeError::NoTokenizer.into()), 2);
        let none = KernelError::NoAdapter { wanted: "answers".to_owned(), found: "none".to_owned() };
        assert_eq!(exit_code(&RuntimeError::from(none).into()), 2);
        let lost = KernelError::Device { adapter: "a".to_owned(), reason: "lost".to_owned() };
        assert_eq!(exit_code(&RuntimeError::from(lost).into()), 1);
        assert_eq!(exit_code(&anyhow::anyhow!("x")), 1);
    }

    #[test]
    fn parameters_are_named_as_options() {
        let error = RuntimeError::Parameter { name: "repetition_penalty", found: "0".to_owned(), expected: "more" };
        assert_eq!(sentence(&error.into()), "--repeat-penalty is 0, expected more");
        let error = RuntimeError::Parameter { name: "prefill_rows", found: "4".to_owned(), expected: "more" };
        assert_eq!(sentence(&error.into()), "MOR_PREFILL_CHUNK is 4, expected more");
        let error = || {
            let (name, found, expected) = ("max_depth", "9".to_owned(), "1 to 3".to_owned());
            ModelError::DepthControl { name, found, expected }
        };
        for error in [error().into(), RuntimeError::from(error()).into()] {
            assert_eq!(sentence(&error), "--max-depth is 9, expected 1 to 3");
        }
    }
}
