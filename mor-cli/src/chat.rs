//! `mor chat`: a conversation, whose K/V entries stay where they are between the turns.

use std::fs::File;
use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use etcetera::BaseStrategy;
use mor_model::ModelError;
use mor_runtime::chat::{Conversation, Message, Role};
use mor_runtime::{
    BatchOptions, DepthControl, Event, GenerateRequest, RuntimeError, SamplingParams, Session, SessionOptions, Summary,
    Tokenizer,
};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde::Serialize;

use crate::args::{KvArg, LoadArgs, ModelArg, SamplingArgs, at_least_one};
use crate::depth::DepthArgs;
use crate::failure::{BAD_INPUT, INTERRUPTED, bad_input, sentence};
use crate::generate::{Output, SMALL_HIDDEN_SIZE, Show, count, decode_rate, place};
use crate::model::spare_threads_of_llvmpipe;
use crate::{interrupt, note, print, style};

/// Longest conversation where `--context` is not given: K/V memory for all that some models can take would be a waste.
const DEFAULT_CONTEXT: usize = 8192;

const HELP: &str = "\
/help             this list
/reset            start a new conversation
/set              show how tokens are drawn
/set NAME=VALUE   change it: temperature, top-k, top-p, min-p, repeat-penalty, seed, max-new-tokens
/depth            colour tokens by depth, or no longer; show the depths of the last answer
/depth N          take tokens through at most N recursions from the next answer on
/save FILE        write the conversation as JSON
/quit             leave, as Ctrl-D and two times Ctrl-C do
Ctrl-C ends an answer. A line that begins with two slashes is said with one.";

#[derive(Debug, clap::Args)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    model: ModelArg,
    /// What the conversation is about, said before everything else
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of the longest conversation [default: what the model's context holds, but no more than 8192]
    #[arg(long, value_name = "N", value_parser = at_least_one, allow_negative_numbers = true)]
    context: Option<usize>,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", value_parser = at_least_one, default_value = "512", allow_negative_numbers = true)]
    max_new_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// End an answer before this text; may be given several times
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    stop: Vec<String>,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    depth: DepthArgs,
    /// Which recursions store keys and values [default: as the model's config says]
    #[arg(long, value_enum)]
    kv: Option<KvArg>,
    /// Mark each token with its depth: by colour in a terminal, else as token(depth)
    #[arg(long)]
    show_depth: bool,
    /// Print one JSON object an answer, each on a line, instead of streaming text
    #[arg(long)]
    json: bool,
}

/// What `--json` prints for an answer.
#[derive(Debug, Serialize)]
struct Report<'a> {
    text: &'a str,
    tokens: &'a [u32],
    /// One per token of the answer that was fed: all but the last.
    depths: &'a [u32],
    finish_reason: &'static str,
    mean_depth: f64,
    /// The whole conversation before the answer.
    prompt_tokens: usize,
    /// Of these, those whose K/V entries were there from earlier turns.
    reused_tokens: usize,
    seed: u64,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
}

pub(crate) fn run(args: &ChatArgs) -> anyhow::Result<ExitCode> {
    // Everything that can be refused is refused before anything large is read or a device is opened.
    let sampling = args.sampling.params();
    sampling.validate()?;
    if args.stop.iter().any(String::is_empty) {
        return Err(bad_input!("--stop is an empty text, expected at least one character"));
    }
    let model = args.model.named(None)?;
    let config = model.config()?;
    if let Some(kv) = args.kv {
        config.with_kv(kv.strategy())?;
    }
    let depth = args.depth.control(&config)?;
    if !model.has_tokenizer() {
        return Err(bad_input!("{} has no tokenizer.json, and a conversation is text", model.name()));
    }
    let limit = config.max_position_embeddings;
    if let Some(found) = args.context.filter(|context| *context > limit) {
        let (what, advice) = ("the conversation that --context asks for", "lower it");
        return Err(RuntimeError::TooLong { what, found, limit, advice }.into());
    }
    let conversation = Conversation::new(model.chat_template()?, args.system.clone())?;
    if config.hidden_size <= SMALL_HIDDEN_SIZE {
        spare_threads_of_llvmpipe();
    }

    let context = args.context.unwrap_or(limit.min(DEFAULT_CONTEXT));
    let options = SessionOptions {
        kv: args.kv.map(|kv| kv.strategy()),
        depth,
        batch: BatchOptions { max_context: Some(context), ..args.load.batch() },
        ..args.load.options()
    };
    let mut session = model.load(args.load.selector(), options)?;
    // Memory for the whole conversation, so that none of it is ever read again.
    session.prepare_decode(context)?;
    let Some(tokenizer) = session.tokenizer().cloned() else { return Err(RuntimeError::NoTokenizer.into()) };
    let turn_end = conversation.template().and_then(|template| tokenizer.token_id(template.eos_token()?));

    note(&format!("{}, {}; /help lists commands", model.name(), place(&session)));
    if conversation.template().is_none() {
        note("it has no chat template, so it continues what you write, line after line");
    }
    interrupt::watch()?;
    let chat = Chat {
        session,
        tokenizer,
        conversation,
        turn_end,
        context,
        sampling,
        max_new_tokens: args.max_new_tokens,
        stop: args.stop.clone(),
        show_depth: args.show_depth,
        json: args.json,
        last_depths: Vec::new(),
    };
    chat.run()
}

/// A conversation under way.
struct Chat {
    session: Session,
    tokenizer: Tokenizer,
    conversation: Conversation,
    /// Ends an answer, beside the tokens that end a text of the model.
    turn_end: Option<u32>,
    context: usize,
    sampling: SamplingParams,
    max_new_tokens: usize,
    stop: Vec<String>,
    show_depth: bool,
    json: bool,
    last_depths: Vec<u32>,
}

/// What follows a line.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    GoOn,
    Leave,
}

impl Chat {
    fn run(mut self) -> anyhow::Result<ExitCode> {
        let mut lines = Lines::open();
        // A script shall learn that not all of its lines were taken.
        let mut code = ExitCode::SUCCESS;
        loop {
            let line = match lines.next()? {
                Line::Text(line) => line,
                Line::End => return Ok(code),
                Line::Interrupted => return Ok(ExitCode::from(INTERRUPTED)),
            };
            match self.take(&line) {
                Ok(Next::GoOn) => {}
                Ok(Next::Leave) => return Ok(code),
                // The conversation goes on after what it can go on after.
                Err(error) if is_of_the_line(&error) => {
                    note(&format!("error: {}", sentence(&error).trim_start_matches("--")));
                    if !lines.is_terminal() {
                        code = ExitCode::from(BAD_INPUT);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn take(&mut self, line: &str) -> anyhow::Result<Next> {
        let Some(command) = line.strip_prefix('/').filter(|rest| !rest.starts_with('/')) else {
            let text = line.strip_prefix('/').unwrap_or(line);
            if !text.trim().is_empty() {
                self.answer(text)?;
            }
            return Ok(Next::GoOn);
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        match (name, rest.trim()) {
            ("help", "") => note(HELP),
            ("reset", "") => self.reset(),
            ("set", "") => note(&self.settings()),
            ("set", assignment) => self.set(assignment)?,
            ("depth", "") => self.toggle_depth(),
            ("depth", depth) => self.limit_depth(depth)?,
            ("save", "") => return Err(bad_input!("/save names no file, expected /save FILE")),
            ("save", path) => self.save(Path::new(path))?,
            ("quit", "") => return Ok(Next::Leave),
            _ => return Err(bad_input!("/{command} is no command; /help lists them")),
        }
        Ok(Next::GoOn)
    }

    fn answer(&mut self, text: &str) -> anyhow::Result<()> {
        let prompt = self.conversation.ask(&self.tokenizer, text)?;
        let left = self.context.saturating_sub(prompt.len());
        if left == 0 {
            self.conversation.retract();
            return Err(bad_input!(
                "the conversation has {} and its context holds {}, so there is no room for an answer; /reset starts a new one",
                count(prompt.len()),
                self.context
            ));
        }
        let request = GenerateRequest {
            max_new_tokens: self.max_new_tokens.min(left),
            sampling: self.sampling.clone(),
            stop: self.stop.clone(),
            stop_tokens: self.turn_end.into_iter().collect(),
            ..GenerateRequest::new(prompt)
        };
        let show = Show::new(self.json, self.show_depth);
        let mut output = Output::new(show, Vec::new(), true, self.session.config().num_recursions);
        interrupt::clear();
        let summary = stream(&mut self.session, &request, &mut output)?;
        output.end()?;
        interrupt::clear();

        // A token that ends the answer is of the template, which writes it again.
        let ends = summary.finish_reason == mor_runtime::FinishReason::Eos;
        let tokens = &summary.tokens[..summary.tokens.len() - usize::from(ends)];
        self.conversation.answer(tokens, summary.text.as_deref().unwrap_or_default());
        self.last_depths = summary.depths.get(summary.prompt_tokens.len()..).unwrap_or_default().to_vec();
        self.report(&summary)?;
        if summary.prompt_tokens.len() + summary.tokens.len() >= self.context {
            note("the context is full; /reset starts a new conversation");
        }
        Ok(())
    }

    fn report(&self, summary: &Summary) -> anyhow::Result<()> {
        let mean_depth = mean(&self.last_depths);
        let new = summary.prompt_tokens.len() - summary.reused_tokens;
        note(&format!(
            "{} ({}), read {new} of {}, {}, mean depth {mean_depth:.2}, seed {}",
            count(summary.tokens.len()),
            summary.finish_reason.as_str(),
            count(summary.prompt_tokens.len()),
            decode_rate(summary),
            self.sampling.seed,
        ));
        if self.show_depth {
            note(&self.legend());
        }
        if !self.json {
            return Ok(());
        }
        let report = Report {
            text: summary.text.as_deref().unwrap_or_default(),
            tokens: &summary.tokens,
            depths: &self.last_depths,
            finish_reason: summary.finish_reason.as_str(),
            mean_depth,
            prompt_tokens: summary.prompt_tokens.len(),
            reused_tokens: summary.reused_tokens,
            seed: self.sampling.seed,
            prefill_tokens_per_s: summary.prefill_tokens_per_s,
            decode_tokens_per_s: summary.decode_tokens_per_s,
        };
        Ok(print(&format!("{}\n", serde_json::to_string(&report)?))?)
    }

    fn legend(&self) -> String {
        style::legend(&self.last_depths, self.session.config().num_recursions, style::stderr_has_colour())
    }

    fn reset(&mut self) {
        self.conversation.reset();
        self.last_depths.clear();
        note("a new conversation");
    }

    fn toggle_depth(&mut self) {
        self.show_depth = !self.show_depth;
        note(if self.show_depth { "depths are shown" } else { "depths are no longer shown" });
        if !self.last_depths.is_empty() {
            note(&format!("last answer: {}, mean depth {:.2}", self.legend(), mean(&self.last_depths)));
        }
    }

    fn limit_depth(&mut self, depth: &str) -> anyhow::Result<()> {
        let num_recursions = self.session.config().num_recursions;
        let parsed = depth.parse();
        let depth = parsed.map_err(|_| bad_input!("/depth {depth} is no depth, expected 1 to {num_recursions}"))?;
        self.session
            .set_depth_control(DepthControl { max_depth: Some(depth), ..self.session.model().depth_control() })?;
        // As at the start, but empty: what was read stood for other depths.
        self.session.prepare_decode(self.context)?;
        let has_answers = self.conversation.messages().iter().any(|message| message.role == Role::Assistant);
        let again = if has_answers { "; the next answer reads the conversation again" } else { "" };
        note(&format!("tokens take at most {depth} of {num_recursions} recursions{again}"));
        Ok(())
    }

    fn settings(&self) -> String {
        let SamplingParams { temperature, top_k, top_p, min_p, repetition_penalty, seed } = &self.sampling;
        format!(
            "temperature={temperature} top-k={top_k} top-p={top_p} min-p={min_p} repeat-penalty={repetition_penalty} \
             seed={seed} max-new-tokens={}",
            self.max_new_tokens
        )
    }

    /// Takes `name=value`, with the names of the options.
    fn set(&mut self, assignment: &str) -> anyhow::Result<()> {
        let Some((name, value)) = assignment.split_once('=').map(|(name, value)| (name.trim(), value.trim())) else {
            return Err(bad_input!(
                "/set {assignment} is no assignment, expected NAME=VALUE, for example temperature=0.7"
            ));
        };
        let mut sampling = self.sampling.clone();
        match name {
            "temperature" => sampling.temperature = number(name, value)?,
            "top-k" => sampling.top_k = number(name, value)?,
            "top-p" => sampling.top_p = number(name, value)?,
            "min-p" => sampling.min_p = number(name, value)?,
            "repeat-penalty" => sampling.repetition_penalty = number(name, value)?,
            "seed" => sampling.seed = number(name, value)?,
            "max-new-tokens" => {
                self.max_new_tokens =
                    at_least_one(value).map_err(|expected| bad_input!("{name} is {value}, {expected}"))?;
            }
            _ => return Err(bad_input!("there is no {name} to set; /help lists what there is")),
        }
        sampling.validate()?;
        self.sampling = sampling;
        note(&self.settings());
        Ok(())
    }

    fn save(&self, path: &Path) -> anyhow::Result<()> {
        let messages: &[Message] = self.conversation.messages();
        let text = serde_json::to_string_pretty(messages)? + "\n";
        // What is there may be another conversation.
        let written = File::create_new(path).and_then(|mut file| file.write_all(text.as_bytes()));
        written.map_err(|error| bad_input!("cannot write {}: {error}", path.display()))?;
        let turns = messages.iter().filter(|message| message.role == Role::Assistant).count();
        note(&format!("{}: {turns} answer{}", path.display(), if turns == 1 { "" } else { "s" }));
        Ok(())
    }
}

/// Whether an error is that of a line and not of the model or the device.
fn is_of_the_line(error: &anyhow::Error) -> bool {
    error.is::<crate::failure::BadInput>()
        || matches!(
            error.downcast_ref(),
            Some(
                RuntimeError::Parameter { .. }
                    | RuntimeError::Conversation { .. }
                    | RuntimeError::Tokenizer { .. }
                    | RuntimeError::Model(ModelError::DepthControl { .. })
            )
        )
}

fn number<T: std::str::FromStr>(name: &str, value: &str) -> anyhow::Result<T> {
    value.parse().map_err(|_| bad_input!("{name} is {value}, expected a number as --{name} takes it"))
}

fn mean(depths: &[u32]) -> f64 {
    depths.iter().map(|&depth| f64::from(depth)).sum::<f64>() / depths.len().max(1) as f64
}

/// Runs an answer and shows its events; Ctrl-C ends it, also while the prompt is read.
fn stream(session: &mut Session, request: &GenerateRequest, output: &mut Output) -> anyhow::Result<Summary> {
    let handle = session.submit(request)?;
    loop {
        session.step()?;
        if interrupt::requested() {
            handle.cancel();
        }
        while let Some(event) = handle.try_next() {
            match event {
                Event::Token { token, text, depth } => output.token(token, &text, depth)?,
                Event::Finished(summary) => return Ok(summary),
                _ => {}
            }
        }
    }
}

/// Where lines come from.
enum Lines {
    /// A terminal, with the file of earlier lines.
    Editor(Box<DefaultEditor>, Option<PathBuf>),
    /// Anything else.
    Input,
}

enum Line {
    Text(String),
    End,
    Interrupted,
}

impl Lines {
    fn open() -> Self {
        if !std::io::stdin().is_terminal() {
            return Lines::Input;
        }
        // A terminal that cannot be edited on is still one that can be read from.
        let Ok(mut editor) = DefaultEditor::new() else { return Lines::Input };
        let path = history_path();
        if let Some(path) = &path {
            // There is none at first.
            let _ = editor.load_history(path);
        }
        Lines::Editor(Box::new(editor), path)
    }

    fn is_terminal(&self) -> bool {
        matches!(self, Lines::Editor(..))
    }

    fn next(&mut self) -> anyhow::Result<Line> {
        let Lines::Editor(editor, path) = self else {
            let mut line = String::new();
            let read = std::io::stdin().lock().read_line(&mut line);
            return match read.map_err(|error| bad_input!("cannot read from standard input: {error}"))? {
                0 => Ok(Line::End),
                _ => Ok(Line::Text(line.trim_end_matches(['\n', '\r']).to_owned())),
            };
        };
        let mut was_interrupted = false;
        loop {
            match editor.readline("> ") {
                Ok(line) => {
                    let _ = editor.add_history_entry(line.as_str());
                    if let Some(path) = path {
                        // Without a place to keep it, a history lasts as long as the conversation.
                        let _ = editor.append_history(path);
                    }
                    return Ok(Line::Text(line));
                }
                Err(ReadlineError::Eof) => return Ok(Line::End),
                Err(ReadlineError::Interrupted) if was_interrupted => return Ok(Line::Interrupted),
                Err(ReadlineError::Interrupted) => {
                    was_interrupted = true;
                    note("Ctrl-C again leaves");
                }
                Err(error) => return Err(bad_input!("cannot read from the terminal: {error}")),
            }
        }
    }
}

/// The file of earlier lines, in a folder that is there.
fn history_path() -> Option<PathBuf> {
    let strategy = etcetera::choose_base_strategy().ok()?;
    let folder = strategy.state_dir().unwrap_or_else(|| strategy.data_dir()).join("mor");
    std::fs::create_dir_all(&folder).ok()?;
    Some(folder.join("chat_history"))
}
