//! `mor generate`: continues a prompt and streams what comes.

use std::hash::{BuildHasher, Hasher};
use std::io::{IsTerminal, Read};
use std::process::ExitCode;
use std::time::Instant;

use mor_model::{MorConfig, Quantization};
use mor_runtime::{
    BatchOptions, Event, GenerateRequest, RuntimeError, Session, SessionOptions, Summary, TextStream, Tokenizer,
};
use serde::Serialize;

use crate::args::GenerateArgs;
use crate::failure::{INTERRUPTED, bad_input};
use crate::input::{read_text, utf8};
use crate::model::{Model, spare_threads_of_llvmpipe, storage};
use crate::{interrupt, note, print, print_json, style};

/// Where `--max-new-tokens` is not given, unless the context ends before.
const DEFAULT_NEW_TOKENS: usize = 128;

/// Models up to this are decoded faster by one thread of a software rasteriser than by several.
pub(crate) const SMALL_HIDDEN_SIZE: usize = 512;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    model: String,
    prompt_tokens: &'a [u32],
    tokens: &'a [u32],
    /// One per token fed: the prompt's, then all new tokens but the last.
    depths: &'a [u32],
    text: Option<&'a str>,
    finish_reason: &'static str,
    /// Per effective layer.
    kv_entries: &'a [usize],
    mean_depth: f64,
    seed: u64,
    timings: Timings,
    dtype: &'static str,
    quantization: Option<&'static str>,
    device: &'a str,
    backend: &'a str,
}

#[derive(Debug, Serialize)]
struct Timings {
    load_ms: f64,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
}

/// The prompt as given.
#[derive(Debug, PartialEq, Eq)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

impl Prompt {
    /// Whether reading it is a small part of the work: a text has about four bytes a token.
    fn is_short(&self) -> bool {
        match self {
            Prompt::Text(text) => text.len() <= 256,
            Prompt::Tokens(tokens) => tokens.len() <= 64,
        }
    }
}

/// A request that was checked, and the session that can serve it.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) model: Model,
    pub(crate) config: MorConfig,
    pub(crate) session: Session,
    pub(crate) request: GenerateRequest,
}

/// Checks the arguments and loads the model.
pub(crate) fn prepare(args: &GenerateArgs) -> anyhow::Result<Prepared> {
    // Everything that can be refused is refused before anything large is read or a device is opened.
    let sampling = args.sampling.params();
    sampling.validate()?;
    if args.stop.iter().any(String::is_empty) {
        return Err(bad_input!("--stop is an empty text, expected at least one character"));
    }
    let model = args.model.named(args.random_weights.as_deref())?;
    let config = model.config()?;
    if let Some(kv) = args.kv {
        config.with_kv(kv.strategy())?;
    }
    let depth = args.depth.control(&config)?;
    let prompt = read_prompt(args, config.vocab_size)?;
    check_request(&prompt, args, &model, &config)?;
    if config.hidden_size <= SMALL_HIDDEN_SIZE && prompt.is_short() {
        spare_threads_of_llvmpipe();
    }

    let kv = args.kv.map(|kv| kv.strategy());
    let batch = BatchOptions { batch_invariant: args.batch_invariant, ..args.load.batch() };
    let options = SessionOptions { kv, depth, batch, ..args.load.options() };
    let session = model.load(args.load.selector(), options)?;
    let tokens = match (prompt, session.tokenizer()) {
        (Prompt::Tokens(tokens), _) => tokens,
        (Prompt::Text(text), _) if text.is_empty() => Vec::new(),
        (Prompt::Text(text), Some(tokenizer)) => tokenizer.encode(&text)?,
        (Prompt::Text(_), None) => return Err(RuntimeError::NoTokenizer.into()),
    };
    let left = config.max_position_embeddings.saturating_sub(tokens.len().max(1));
    let request = GenerateRequest {
        max_new_tokens: args.max_new_tokens.unwrap_or(DEFAULT_NEW_TOKENS.min(left)),
        sampling,
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        ..GenerateRequest::new(tokens)
    };
    Ok(Prepared { model, config, session, request })
}

pub(crate) fn run(args: &GenerateArgs) -> anyhow::Result<ExitCode> {
    let Prepared { model, config, mut session, request } = prepare(args)?;
    let seed = request.sampling.seed;
    let show = Show::new(args.json, args.show_depth);
    // The prompt is shown before the new text for people, not for programs.
    let shows_prompt = args.show_depth || (show == Show::Plain && std::io::stdout().is_terminal());
    let prompt = if shows_prompt { pieces(session.tokenizer(), &request.prompt) } else { Vec::new() };
    let mut output = Output::new(show, prompt, session.tokenizer().is_some(), config.num_recursions);

    interrupt::watch()?;

    let mut progress = Progress::new();
    let summary = stream(&mut session, &request, &mut output, &mut progress)?;
    output.end()?;

    let (depths, line) = match &summary {
        Some(summary) => (&summary.depths, finished_line(summary, seed, &session)),
        None => (&progress.depths, progress.interrupted_line(seed, &session)),
    };
    if args.show_depth {
        note(&style::legend(depths, config.num_recursions, style::stderr_has_colour()));
    }
    note(&line);
    let Some(summary) = summary else {
        return Ok(ExitCode::from(INTERRUPTED));
    };
    if args.json {
        print_json(&Report {
            model: model.name(),
            prompt_tokens: &summary.prompt_tokens,
            tokens: &summary.tokens,
            depths: &summary.depths,
            text: summary.text.as_deref(),
            finish_reason: summary.finish_reason.as_str(),
            kv_entries: &summary.kv_entries,
            mean_depth: summary.mean_depth,
            seed,
            timings: Timings {
                load_ms: session.load_ms(),
                prefill_tokens_per_s: summary.prefill_tokens_per_s,
                decode_tokens_per_s: summary.decode_tokens_per_s,
            },
            dtype: session.precision().as_str(),
            quantization: session.config().quantization.map(Quantization::as_str),
            device: &session.device().name,
            backend: &session.device().backend,
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs the generation and shows its events; `None` when it was interrupted.
fn stream(
    session: &mut Session,
    request: &GenerateRequest,
    output: &mut Output,
    progress: &mut Progress,
) -> anyhow::Result<Option<Summary>> {
    output.start()?;
    for event in session.generate(request)? {
        if interrupt::requested() {
            return Ok(None);
        }
        match event? {
            Event::Prompt { depths } => {
                output.prompt(&depths)?;
                progress.prompt(depths);
            }
            Event::Token { token, text, depth } => {
                output.token(token, &text, depth)?;
                progress.token(depth);
            }
            Event::Finished(summary) => return Ok(Some(summary)),
            _ => {}
        }
    }
    Ok(None)
}

/// What is known of a generation before it ends, for the summary of an interrupted one.
#[derive(Debug)]
struct Progress {
    start: Instant,
    depths: Vec<u32>,
    num_tokens: usize,
}

impl Progress {
    fn new() -> Self {
        Self { start: Instant::now(), depths: Vec::new(), num_tokens: 0 }
    }

    fn prompt(&mut self, depths: Vec<u32>) {
        self.depths = depths;
        self.start = Instant::now();
    }

    fn token(&mut self, depth: Option<u32>) {
        self.num_tokens += 1;
        self.depths.extend(depth);
    }

    fn interrupted_line(&self, seed: u64, session: &Session) -> String {
        let rate = self.num_tokens as f64 / self.start.elapsed().as_secs_f64().max(1e-9);
        let total: f64 = self.depths.iter().map(|&depth| f64::from(depth)).sum();
        let mean_depth = total / self.depths.len().max(1) as f64;
        let tokens = count(self.num_tokens);
        format!(
            "{tokens} (interrupted), decode {rate:.1} tokens/s, mean depth {mean_depth:.2}, seed {seed}, {}",
            place(session)
        )
    }
}

fn finished_line(summary: &Summary, seed: u64, session: &Session) -> String {
    format!(
        "{} ({}), prefill {:.1} tokens/s ({}), {}, mean depth {:.2}, seed {seed}, {}",
        count(summary.tokens.len()),
        summary.finish_reason.as_str(),
        summary.prefill_tokens_per_s,
        count(summary.prompt_tokens.len()),
        decode_rate(summary),
        summary.mean_depth,
        place(session)
    )
}

pub(crate) fn decode_rate(summary: &Summary) -> String {
    match summary.decode_tokens_per_s {
        0.0 => "decode too short to be timed".to_owned(),
        rate => format!("decode {rate:.1} tokens/s"),
    }
}

pub(crate) fn count(tokens: usize) -> String {
    format!("{tokens} token{}", if tokens == 1 { "" } else { "s" })
}

pub(crate) fn place(session: &Session) -> String {
    let device = session.device();
    format!("{} on \"{}\" ({})", storage(session), device.name, device.backend)
}

/// Few digits, so that it is easily typed again.
pub(crate) fn random_seed() -> u64 {
    // The standard library's only source of randomness: the keys of its hash maps.
    std::hash::RandomState::new().build_hasher().finish() >> 32
}

fn read_prompt(args: &GenerateArgs, vocab_size: usize) -> anyhow::Result<Prompt> {
    if let Some(tokens) = &args.prompt_tokens {
        let check = |(index, &token): (usize, &i64)| match u32::try_from(token) {
            Ok(id) if (id as usize) < vocab_size => Ok(id),
            _ => {
                let at = format!("--prompt-tokens[{index}]");
                Err(RuntimeError::TokenOutOfRange { at, token, vocab_size, last: vocab_size - 1 })
            }
        };
        return Ok(Prompt::Tokens(tokens.0.iter().enumerate().map(check).collect::<Result<_, _>>()?));
    }
    if let Some(path) = &args.prompt_file {
        let text = without_last_newline(read_text(path)?);
        if text.is_empty() {
            return Err(bad_input!(
                "{}: the prompt file is empty; to start from the end-of-text token, leave the prompt out",
                path.display()
            ));
        }
        return Ok(Prompt::Text(text));
    }
    match args.prompt.as_deref() {
        Some("-") => {
            let mut bytes = Vec::new();
            std::io::stdin()
                .read_to_end(&mut bytes)
                .map_err(|error| bad_input!("cannot read the prompt from standard input: {error}"))?;
            Ok(Prompt::Text(without_last_newline(utf8(bytes, "standard input")?)))
        }
        text => Ok(Prompt::Text(text.unwrap_or_default().to_owned())),
    }
}

/// The newline that editors and `echo` put at the end would be a token of its own.
fn without_last_newline(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    text
}

/// What can be said about a request without the weights.
fn check_request(prompt: &Prompt, args: &GenerateArgs, model: &Model, config: &MorConfig) -> anyhow::Result<()> {
    let has_text = matches!(prompt, Prompt::Text(text) if !text.is_empty());
    if has_text && !model.has_tokenizer() {
        return Err(RuntimeError::NoTokenizer.into());
    }
    if !args.stop.is_empty() && !model.has_tokenizer() {
        return Err(bad_input!("--stop needs a tokenizer, but {} has no tokenizer.json", model.name()));
    }
    // A text has at least one token; how many, its tokenizer tells later.
    let at_least = match prompt {
        Prompt::Tokens(tokens) => tokens.len().max(1),
        Prompt::Text(_) => 1,
    };
    let limit = config.max_position_embeddings;
    if at_least > limit {
        let (what, advice) = ("the prompt", "shorten it");
        return Err(RuntimeError::TooLong { what, found: at_least, limit, advice }.into());
    }
    let found = at_least.saturating_add(args.max_new_tokens.unwrap_or(0));
    if found > limit {
        let (what, advice) = ("the prompt with its new tokens", "lower --max-new-tokens or shorten the prompt");
        return Err(RuntimeError::TooLong { what, found, limit, advice }.into());
    }
    Ok(())
}

/// How tokens appear on standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Show {
    /// Not at all: `--json` prints at the end.
    Nothing,
    /// As text.
    Plain,
    /// As text in the colour of its depth.
    Coloured,
    /// As text(depth).
    Marked,
}

impl Show {
    pub(crate) fn new(json: bool, show_depth: bool) -> Self {
        match (json, show_depth) {
            (true, _) => Show::Nothing,
            (false, false) => Show::Plain,
            (false, true) if style::stdout_has_colour() => Show::Coloured,
            (false, true) => Show::Marked,
        }
    }
}

/// Standard output during a generation.
#[derive(Debug)]
pub(crate) struct Output {
    show: Show,
    /// Pieces of the prompt, shown before the new text.
    prompt: Vec<String>,
    has_text: bool,
    num_recursions: usize,
    has_colour: bool,
    ends_line: bool,
}

impl Output {
    pub(crate) fn new(show: Show, prompt: Vec<String>, has_text: bool, num_recursions: usize) -> Self {
        Self { show, prompt, has_text, num_recursions, has_colour: style::stdout_has_colour(), ends_line: true }
    }

    /// Before prefill: a prompt that needs no depths is shown while it is read.
    fn start(&mut self) -> std::io::Result<()> {
        if self.show != Show::Plain || self.prompt.is_empty() {
            return Ok(());
        }
        let text = self.prompt.concat();
        self.write(&if self.has_colour { format!("{}{text}{}", style::DIM, style::RESET) } else { text })
    }

    fn prompt(&mut self, depths: &[u32]) -> std::io::Result<()> {
        let pieces = std::mem::take(&mut self.prompt);
        match self.show {
            Show::Nothing | Show::Plain => Ok(()),
            Show::Coloured | Show::Marked => {
                let text: String = pieces
                    .iter()
                    .zip(depths)
                    .map(|(piece, &depth)| self.with_depth(piece, Some(depth), true))
                    .collect();
                self.write(&text)
            }
        }
    }

    pub(crate) fn token(&mut self, token: u32, text: &str, depth: Option<u32>) -> std::io::Result<()> {
        let text = if self.has_text { text.to_owned() } else { format!("{token} ") };
        match self.show {
            Show::Nothing => Ok(()),
            Show::Plain => self.write(&text),
            Show::Coloured | Show::Marked => self.write(&self.with_depth(&text, depth, false)),
        }
    }

    /// A text with its depth. Tokens without text of their own, such as the first bytes of a character, show nothing.
    fn with_depth(&self, text: &str, depth: Option<u32>, is_prompt: bool) -> String {
        match depth {
            // The last token is never fed, so it has no depth.
            None => text.to_owned(),
            Some(_) if text.is_empty() => String::new(),
            Some(depth) if self.show == Show::Marked => style::marked(text, depth),
            Some(depth) => {
                let dim = if is_prompt { style::DIM } else { "" };
                format!("{dim}{}", style::coloured(text, depth, self.num_recursions))
            }
        }
    }

    /// Leaves the terminal at the beginning of a line; colours end with each token.
    pub(crate) fn end(&mut self) -> std::io::Result<()> {
        if self.ends_line { Ok(()) } else { self.write("\n") }
    }

    fn write(&mut self, text: &str) -> std::io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let shown = text.strip_suffix(style::RESET).unwrap_or(text);
        self.ends_line = shown.ends_with('\n');
        print(text)
    }
}

/// The text of each token; their ids without a tokenizer.
pub(crate) fn pieces(tokenizer: Option<&Tokenizer>, tokens: &[u32]) -> Vec<String> {
    let Some(tokenizer) = tokenizer else {
        return tokens.iter().map(|token| format!("{token} ")).collect();
    };
    let mut stream = TextStream::new(tokenizer, &[]);
    let mut pieces: Vec<String> = tokens.iter().map(|&token| stream.push(token).text).collect();
    if let Some(last) = pieces.last_mut() {
        last.push_str(&stream.finish());
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::embedded;

    #[test]
    fn one_newline_at_the_end_of_a_prompt_is_dropped() {
        for (text, kept) in [("a b\n", "a b"), ("a b\r\n", "a b"), ("a b\n\n", "a b\n"), ("a b", "a b"), ("\n", "")] {
            assert_eq!(without_last_newline(text.to_owned()), kept);
        }
    }

    #[test]
    fn prompts_are_shown_token_by_token() {
        let tokenizer = Tokenizer::from_bytes(embedded::TOKENIZER, "test", 4096).unwrap();
        let tokens = tokenizer.encode("Once upon 日").unwrap();
        let shown = pieces(Some(&tokenizer), &tokens);
        assert_eq!(shown.len(), tokens.len());
        assert_eq!(shown.concat(), "Once upon 日");
        assert_eq!(pieces(None, &[7, 8]), ["7 ", "8 "]);
    }

    #[test]
    fn depths_are_shown_as_asked() {
        let output = |show| Output {
            show,
            prompt: Vec::new(),
            has_text: true,
            num_recursions: 3,
            has_colour: true,
            ends_line: true,
        };
        assert_eq!(output(Show::Marked).with_depth(" a\n", Some(2), true), " a(2)\n");
        assert_eq!(output(Show::Marked).with_depth("", Some(2), false), "");
        assert_eq!(output(Show::Coloured).with_depth("a", None, false), "a");
        let shown = output(Show::Coloured).with_depth("a", Some(1), false);
        assert!(shown.starts_with("\x1b[38;5;") && shown.ends_with("ma\x1b[0m"), "{shown:?}");
    }

    #[test]
    fn random_seeds_differ() {
        assert_ne!(random_seed(), random_seed());
    }
}
