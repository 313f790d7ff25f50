//! What a command line leaves open: from the environment, then from a config file, then what the program has.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command, CommandFactory, FromArgMatches, Id};
use etcetera::BaseStrategy;
use toml::de::{DeTable, DeValue};

use crate::args::Args;
use crate::failure::{bad_input, usage_sentence};
use crate::input::read_text;

/// Options that have a variable in the environment: that of `--model` is `MOR_MODEL`.
const IN_ENVIRONMENT: [&str; 8] =
    ["model", "device", "devices", "dtype", "kv", "persistent", "quantize", "quantize-kv"];

/// Names another config file.
const CONFIG_VARIABLE: &str = "MOR_CONFIG";

/// For the help of every command.
const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failure of the device or of the program, 2 bad input, 130 interrupted.";

/// For that of the program, which says more than that of its commands.
const FILES: &str = "\
Options that are not given are taken from the environment (MOR_MODEL for --model), then from the config file
$XDG_CONFIG_HOME/mor/config.toml or that which MOR_CONFIG names: its keys are options without the dashes,
tables are for one command ([eval], [bench.throughput]).
NO_COLOR turns colours off, RUST_LOG=mor_runtime=debug shows what happens inside.";

/// The value of an option with its origin, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Setting {
    values: Vec<String>,
    origin: String,
}

/// What an option is where it is not given.
#[derive(Clone, Debug)]
struct Fallback {
    id: Id,
    /// Of which one option must be there, as this one then is.
    groups: Vec<Id>,
    values: Vec<String>,
}

/// The command line with all that belongs to it.
pub(crate) fn command() -> Command {
    described(Args::command()).after_help(format!("{EXIT_CODES}\n\n{FILES}"))
}

/// Names variables and exit codes.
fn described(command: Command) -> Command {
    let with_variable = |arg: Arg| match (variable(&arg), arg.get_help()) {
        (Some(name), Some(help)) => {
            let help = format!("{help} [env: {name}]");
            arg.help(help)
        }
        _ => arg,
    };
    command.mut_args(with_variable).after_help(EXIT_CODES).mut_subcommands(described)
}

/// Reads the command line of the process.
///
/// # Errors
/// A [`clap::Error`] for what clap refuses, which may be a request for help, or bad input for a default that cannot be used.
pub(crate) fn parse() -> anyhow::Result<Args> {
    // An empty variable is an unset one.
    let variable = |name: &str| {
        let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
        Some(value.into_string().map_err(|_| bad_input!("{name} is not UTF-8 text; convert it to UTF-8 first")))
    };
    let file = || match variable(CONFIG_VARIABLE).transpose()? {
        Some(path) => ConfigFile::read(Path::new(&path)).map(Some),
        None => default_path().filter(|path| path.exists()).map(|path| ConfigFile::read(&path)).transpose(),
    };
    let matches = matches(std::env::args_os().collect(), &variable, &file)?;
    Ok(Args::from_arg_matches(&matches)?)
}

fn default_path() -> Option<PathBuf> {
    Some(etcetera::choose_base_strategy().ok()?.config_dir().join("mor").join("config.toml"))
}

fn matches(
    arguments: Vec<OsString>,
    variable_value: &dyn Fn(&str) -> Option<anyhow::Result<String>>,
    file: &dyn Fn() -> anyhow::Result<Option<ConfigFile>>,
) -> anyhow::Result<ArgMatches> {
    let command = command();
    // The first look is at what is given; what is required may come from elsewhere.
    let given = match relaxed(command.clone()).try_get_matches_from(&arguments) {
        Ok(given) => given,
        // In the words of the command as it is.
        Err(error) => return Err(command.try_get_matches_from(arguments).err().unwrap_or(error).into()),
    };
    // Groups know their options once they are built.
    let mut built = command.clone();
    built.build();
    let (mut leaf, mut of_leaf, mut path) = (&built, &given, Vec::new());
    while let Some((name, inner)) = of_leaf.subcommand() {
        let Some(next) = leaf.find_subcommand(name) else { break };
        (leaf, of_leaf) = (next, inner);
        path.push(name);
    }
    let file = file()?;
    let mut defaults = Vec::new();
    for arg in leaf.get_arguments() {
        let Some(key) = key(arg) else { continue };
        if is_given(of_leaf, arg) || is_displaced(leaf, arg, of_leaf) {
            continue;
        }
        let of_environment = match variable(arg) {
            Some(name) => {
                let value = variable_value(&name).transpose()?;
                let value = value.map(|value| if is_flag(arg) { flag_value(&name, &value) } else { Ok(value) });
                value.transpose()?.map(|value| Setting { values: vec![value], origin: name })
            }
            None => None,
        };
        let of_file = || file.as_ref().and_then(|file| file.setting(&path, key)).cloned();
        if let Some(setting) = of_environment.or_else(of_file) {
            check(leaf, arg, &setting)?;
            let is_in = |group: &&ArgGroup| group.get_args().any(|id| id == arg.get_id());
            let groups = leaf.get_groups().filter(is_in).map(|group| group.get_id().clone()).collect();
            defaults.push(Fallback { id: arg.get_id().clone(), groups, values: setting.values });
        }
    }
    let path: Vec<String> = path.iter().map(|&name| name.to_owned()).collect();
    Ok(with_defaults(command, &path, &defaults).try_get_matches_from(arguments)?)
}

/// What an option is called outside the command line; `None` for what has no default from there.
fn key(arg: &Arg) -> Option<&str> {
    match arg.get_action() {
        ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version => None,
        // The model of a command that takes no other is no option, and yet means the same.
        _ if arg.is_positional() => (arg.get_id() == "model" && !arg.is_required_set()).then_some("model"),
        _ => arg.get_long(),
    }
}

fn variable(arg: &Arg) -> Option<String> {
    let key = key(arg).filter(|key| IN_ENVIRONMENT.contains(key))?;
    Some(format!("MOR_{}", key.to_uppercase().replace('-', "_")))
}

fn is_flag(arg: &Arg) -> bool {
    !arg.get_action().takes_values()
}

/// What a variable says of a flag, in clap's words.
fn flag_value(variable: &str, value: &str) -> anyhow::Result<String> {
    match value {
        "1" | "true" => Ok(true.to_string()),
        "0" | "false" => Ok(false.to_string()),
        _ => Err(bad_input!("{variable}: invalid value '{value}' for a flag; expected 1 or true, 0 or false")),
    }
}

fn is_given(given: &ArgMatches, arg: &Arg) -> bool {
    given.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine)
}

/// Whether what is given rules the option out.
fn is_displaced(command: &Command, arg: &Arg, given: &ArgMatches) -> bool {
    let conflict = |one: &Arg, other: &Arg| {
        command.get_arg_conflicts_with(one).iter().any(|conflicting| conflicting.get_id() == other.get_id())
    };
    let share_a_choice = |one: &Arg, other: &Arg| {
        command.get_groups().any(|group| {
            let is_in = |arg: &Arg| group.get_args().any(|id| id == arg.get_id());
            !group.clone().is_multiple() && is_in(one) && is_in(other)
        })
    };
    command
        .get_arguments()
        .filter(|other| is_given(given, other))
        .any(|other| conflict(arg, other) || conflict(other, arg) || share_a_choice(arg, other))
}

/// The command without anything that must be there.
fn relaxed(command: Command) -> Command {
    let groups: Vec<_> = command.get_groups().map(|group| group.get_id().clone()).collect();
    let command = groups.into_iter().fold(command, |command, id| command.mut_group(id, |group| group.required(false)));
    command.mut_args(|arg| arg.required(false)).mut_subcommands(relaxed)
}

/// Has the command at `path` take what it was not given from `defaults`.
fn with_defaults(command: Command, path: &[String], defaults: &[Fallback]) -> Command {
    if let [first, rest @ ..] = path {
        return command.mut_subcommand(first, |command| with_defaults(command, rest, defaults));
    }
    defaults.iter().fold(command, |command, Fallback { id, groups, values }| {
        let command = groups.iter().fold(command, |command, id| command.mut_group(id, |group| group.required(false)));
        command.mut_arg(id, |arg| arg.required(false).default_values(values.clone()))
    })
}

/// Has the command itself look at a value, so that the message can name where it comes from.
fn check(command: &Command, arg: &Arg, setting: &Setting) -> anyhow::Result<()> {
    if is_flag(arg) {
        return Ok(());
    }
    let argument = |value: &String| match arg.get_long() {
        Some(long) => format!("--{long}={value}"),
        None => value.clone(),
    };
    let arguments = [command.get_name().to_owned()].into_iter().chain(setting.values.iter().map(argument));
    let checked = relaxed(command.clone()).try_get_matches_from(arguments);
    checked.map(drop).map_err(|error| bad_input!("{}: {}", setting.origin, usage_sentence(&error)))
}

/// The settings of a config file.
#[derive(Debug)]
struct ConfigFile {
    /// With the command that they are for, empty for all that have such an option.
    settings: Vec<(Vec<String>, String, Setting)>,
}

impl ConfigFile {
    fn read(path: &Path) -> anyhow::Result<Self> {
        Self::parse(&read_text(path)?, &path.display().to_string())
    }

    /// Takes the file apart. Its names are all checked, its values where they are used.
    fn parse(text: &str, origin: &str) -> anyhow::Result<Self> {
        let table = DeTable::parse(text).map_err(|error| {
            let line = line_of(text, error.span().map_or(0, |span| span.start));
            bad_input!("{origin}:{line}: not TOML: {}", error.message())
        })?;
        let mut file = Self { settings: Vec::new() };
        file.take(table.get_ref(), &command(), &[], text, origin)?;
        Ok(file)
    }

    fn take(
        &mut self,
        table: &DeTable<'_>,
        command: &Command,
        path: &[String],
        text: &str,
        origin: &str,
    ) -> anyhow::Result<()> {
        let of = [&["mor".to_owned()], path].concat().join(" ");
        for (key, value) in table {
            let origin_of_key = format!("{origin}:{}", line_of(text, key.span().start));
            let key = key.get_ref().as_ref();
            if let DeValue::Table(inner) = value.get_ref() {
                let Some(command) = command.find_subcommand(key) else {
                    return Err(bad_input!("{origin_of_key}: '{key}' is no command; {of} --help lists them"));
                };
                let path = [path, &[key.to_owned()]].concat();
                self.take(inner, command, &path, text, origin)?;
                continue;
            }
            let Some(arg) = option(command, key) else {
                let advice = match path {
                    [] => "mor <command> --help lists them".to_owned(),
                    _ => format!("{of} --help lists them"),
                };
                return Err(bad_input!(
                    "{origin_of_key}: '{key}' is no option, expected one without its dashes; {advice}"
                ));
            };
            let is_flag = is_flag(arg);
            let scalar = |value: &toml::Spanned<DeValue<'_>>| match value.get_ref() {
                DeValue::String(text) => Some(text.to_string()),
                DeValue::Integer(_) | DeValue::Float(_) => Some(text[value.span()].replace('_', "")),
                _ => None,
            };
            let values = match value.get_ref() {
                DeValue::Boolean(flag) => is_flag.then(|| vec![flag.to_string()]),
                _ if is_flag => None,
                DeValue::Array(values) => values.iter().map(scalar).collect(),
                _ => scalar(value).map(|value| vec![value]),
            };
            let Some(values) = values else {
                let found = value.get_ref().type_str();
                let expected = if is_flag { "true or false" } else { "a text or a number, or a list of them" };
                return Err(bad_input!("{origin_of_key}: '{key}' has a value of type {found}, expected {expected}"));
            };
            self.settings.push((path.to_vec(), key.to_owned(), Setting { values, origin: origin_of_key }));
        }
        Ok(())
    }

    /// What the file says of an option: best in the table of its command.
    fn setting(&self, path: &[&str], key: &str) -> Option<&Setting> {
        let of = |path: &[&str]| self.settings.iter().find(|(of, name, _)| of == path && name == key);
        let (.., setting) = (0..=path.len()).rev().find_map(|depth| of(&path[..depth]))?;
        Some(setting)
    }
}

/// The option of a command, or of one below it.
fn option<'c>(command: &'c Command, name: &str) -> Option<&'c Arg> {
    let own = command.get_arguments().find(|arg| key(arg) == Some(name));
    own.or_else(|| command.get_subcommands().find_map(|command| option(command, name)))
}

/// The line of a byte, counted from one.
fn line_of(text: &str, at: usize) -> usize {
    1 + text.as_bytes()[..at.min(text.len())].iter().filter(|byte| **byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Command as Chosen;

    /// What `mor` makes of arguments beside a config file and variables.
    fn parse(arguments: &[&str], file: &str, variables: &[(&str, &str)]) -> Result<Chosen, String> {
        let arguments = ["mor"].iter().chain(arguments).map(OsString::from).collect();
        let variable = |name: &str| Some(Ok(variables.iter().find(|(of, _)| *of == name)?.1.to_owned()));
        let file = || ConfigFile::parse(file, "config.toml").map(Some);
        let matches =
            matches(arguments, &variable, &file).map_err(|error| match error.downcast_ref::<clap::Error>() {
                Some(error) => usage_sentence(error),
                None => error.to_string(),
            })?;
        Ok(Args::from_arg_matches(&matches).expect("it was parsed").command)
    }

    fn generate(arguments: &[&str], file: &str, variables: &[(&str, &str)]) -> String {
        match parse(&[&["generate"], arguments].concat(), file, variables) {
            Ok(Chosen::Generate(args)) => {
                let model = args.model.model.map(|model| model.display().to_string());
                format!("{:?} {:?} {}", model, args.max_new_tokens, args.json)
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => error,
        }
    }

    #[test]
    fn nearer_settings_win() {
        let file = "model = 'a'\nmax-new-tokens = 1_0\n[generate]\nmax-new-tokens = 20\njson = true\n";
        assert_eq!(generate(&[], file, &[]), "Some(\"a\") Some(20) true");
        assert_eq!(generate(&[], file, &[("MOR_MODEL", "b")]), "Some(\"b\") Some(20) true");
        let given = ["--model", "c", "--max-new-tokens", "30"];
        assert_eq!(generate(&given, file, &[("MOR_MODEL", "b")]), "Some(\"c\") Some(30) true");
        assert_eq!(generate(&[], "json = false", &[]), "None None false");
    }

    #[test]
    fn flags_have_variables_too() {
        let persistent = |file: &str, variables: &[(&str, &str)]| match parse(&["generate"], file, variables) {
            Ok(Chosen::Generate(args)) => args.load.batch().persistent.to_string(),
            Ok(other) => panic!("{other:?}"),
            Err(error) => error,
        };
        assert_eq!(persistent("", &[]), "false");
        assert_eq!(persistent("persistent = true", &[]), "true");
        assert_eq!(persistent("persistent = true", &[("MOR_PERSISTENT", "0")]), "false");
        assert_eq!(persistent("", &[("MOR_PERSISTENT", "1")]), "true");
        let refusal = persistent("", &[("MOR_PERSISTENT", "yes")]);
        assert!(refusal.starts_with("MOR_PERSISTENT: invalid value 'yes' for a flag; expected 1"), "{refusal}");
    }

    #[test]
    fn what_is_given_rules_defaults_out() {
        let file = "model = 'a'";
        assert_eq!(generate(&["--random-weights", "config.json"], file, &[]), "None None false");
        let Ok(Chosen::Bench(bench)) = parse(&["bench", "throughput"], file, &[]) else { panic!("it is a model") };
        assert!(format!("{bench:?}").contains("config: None, model: Some(\"a\")"), "{bench:?}");
        let Ok(Chosen::Bench(bench)) = parse(&["bench", "throughput", "--config", "c"], file, &[]) else { panic!() };
        assert!(format!("{bench:?}").contains("config: Some(\"c\"), model: None"), "{bench:?}");
        assert!(parse(&["bench", "throughput"], "", &[]).unwrap_err().contains("--config <CONFIG>"));
    }

    #[test]
    fn required_options_and_places_may_come_from_elsewhere() {
        let Ok(Chosen::Forward(args)) = parse(&["forward"], "[forward]\nmodel = 'a'\ntokens = 'b'\nout = 'c'", &[])
        else {
            panic!("all is there")
        };
        assert_eq!((args.model, args.out), ("a".into(), "c".into()));
        let Ok(Chosen::Inspect(args)) = parse(&["inspect"], "", &[("MOR_MODEL", "a")]) else { panic!() };
        assert_eq!(args.model, Some("a".into()));
        let Ok(Chosen::Batch(args)) = parse(&["batch", "--input", "a", "--output", "b"], "devices = [0, 'llvm']", &[])
        else {
            panic!()
        };
        assert_eq!(args.devices, ["0", "llvm"]);
    }

    #[test]
    fn mistakes_are_located() {
        let refused = |file: &str, expected: &str| {
            let found = generate(&[], file, &[]);
            assert!(found.starts_with(expected), "{found}");
        };
        refused(
            "\n\nmodle = 'a'",
            "config.toml:3: 'modle' is no option, expected one without its dashes; mor <command> --help",
        );
        refused(
            "[eval]\nseed = 1",
            "config.toml:2: 'seed' is no option, expected one without its dashes; mor eval --help",
        );
        refused("[evil]\n", "config.toml:1: 'evil' is no command; mor --help lists them");
        refused("json = 1", "config.toml:1: 'json' has a value of type integer, expected true or false");
        refused("model = true", "config.toml:1: 'model' has a value of type boolean, expected a text or a number");
        refused("dtype = 'f8'", "config.toml:1: invalid value 'f8' for '--dtype <DTYPE>'");
        refused("seed = [1, 2]", "config.toml:1: the argument '--seed <S>' cannot be used multiple times");
        refused("a = ", "config.toml:1: not TOML: ");
        let found = generate(&[], "", &[("MOR_DTYPE", "f8")]);
        assert!(found.starts_with("MOR_DTYPE: invalid value 'f8' for '--dtype <DTYPE>'"), "{found}");
        // Values are looked at where they are used.
        assert_eq!(generate(&[], "[eval]\ndtype = 'f8'", &[]), "None None false");
    }
}
