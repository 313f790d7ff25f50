//! `mor eval`: how likely a model finds a text.

use std::ops::Range;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use mor_model::{MorConfig, Quantization};
use mor_runtime::{DepthControl, Routing, Score, Session, SessionOptions, Tokenizer};
use serde::Serialize;

use crate::args::{EvalArgs, KvArg};
use crate::failure::bad_input;
use crate::input::read_text;
use crate::model::storage;
use crate::output::{check_target, write_atomically};
use crate::plot::lines;
use crate::sweep::{self, Point};
use crate::{print, print_json};

/// What stands on the line between two documents.
const SEPARATOR: &str = "<|endoftext|>";

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    model: String,
    documents: usize,
    predicted_tokens: usize,
    #[serde(flatten)]
    results: Results,
    routing: &'static str,
    dtype: &'static str,
    quantization: Option<&'static str>,
    device: &'a str,
    backend: &'a str,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Results {
    One(Quality),
    Sweep { points: Vec<Point> },
}

/// A text scored at one setting.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Quality {
    pub(crate) mean_nll_nats: f64,
    pub(crate) perplexity: f64,
    pub(crate) mean_depth: f64,
    pub(crate) tokens_per_s: f64,
    pub(crate) max_depth: Option<usize>,
    pub(crate) router_bias: f32,
}

pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    let model = args.model.named(None)?;
    let config = model.config()?;
    if !model.has_tokenizer() {
        return Err(bad_input!("{}: there is no tokenizer.json, so text cannot be encoded", model.name()));
    }
    let first = first_token(&config, &model.name())?;
    let origin = args.text.display().to_string();
    let text = read_text(&args.text)?;
    let documents = chosen(split_documents(&text), args.documents.clone(), &origin)?;
    let kv = args.kv.map(KvArg::strategy);
    if let Some(kv) = kv {
        config.with_kv(kv)?;
    }
    let depth = args.depth.control(&config)?;
    let settings = swept(args, depth, &config)?;
    args.plot.iter().try_for_each(|path| check_target("--plot", path))?;

    let options = SessionOptions {
        precision: args.dtype.precision(),
        quantize: args.quantize.quantization(),
        quantize_kv: args.quantize.quantize_kv,
        kv,
        depth,
        ..SessionOptions::default()
    };
    let mut session = model.load(args.device.selector(), options)?;
    let tokenizer = session
        .tokenizer()
        .ok_or_else(|| bad_input!("{}: there is no tokenizer.json, so text cannot be encoded", model.name()))?;
    let encoded = documents
        .iter()
        .map(|text| document_tokens(tokenizer, text, first, config.max_position_embeddings))
        .collect::<Result<Vec<_>, _>>()?;
    let predicted_tokens: usize = encoded.iter().map(|tokens| tokens.len() - 1).sum();
    if predicted_tokens == 0 {
        return Err(bad_input!("{origin}: the chosen documents are empty, so there is nothing to predict"));
    }

    // indicatif draws nothing where standard error is no terminal.
    let style = ProgressStyle::with_template("{bar:30} {pos} of {len} tokens, {per_sec}, {eta} left");
    let bar = ProgressBar::new((predicted_tokens * settings.len().max(1)) as u64);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let routing = args.routing.routing();
    let results = if settings.is_empty() {
        Results::One(score(&mut session, &encoded, routing, &bar)?)
    } else {
        let mut points = Vec::with_capacity(settings.len());
        let longest = encoded.iter().max_by_key(|tokens| tokens.len()).map_or(&[][..], Vec::as_slice);
        for (sweep, control) in settings {
            session.set_depth_control(control)?;
            // Settings are compared by their speed, so nothing is compiled while it is taken.
            session.score(longest, routing)?;
            points.push(Point { sweep, quality: score(&mut session, &encoded, routing, &bar)? });
        }
        Results::Sweep { points }
    };
    bar.finish_and_clear();

    let report = Report {
        model: model.name(),
        documents: documents.len(),
        predicted_tokens,
        results,
        routing: args.routing.name(),
        dtype: session.precision().as_str(),
        quantization: session.config().quantization.map(Quantization::as_str),
        device: &session.device().name,
        backend: &session.device().backend,
    };
    if let (Some(path), Results::Sweep { points }) = (&args.plot, &report.results) {
        let svg = lines::svg(&report.model, &sweep::charts(points));
        write_atomically(path, |partial| std::fs::write(partial, svg))?;
    }
    if args.json {
        return print_json(&report);
    }
    let mut lines = vec![
        format!("model             {}", report.model),
        format!("documents         {}", report.documents),
        format!("predicted_tokens  {}", report.predicted_tokens),
    ];
    if let Results::One(Quality { mean_nll_nats, perplexity, mean_depth, tokens_per_s, .. }) = &report.results {
        lines.extend([
            format!("mean_nll_nats     {mean_nll_nats:.6}"),
            format!("perplexity        {perplexity:.5}"),
            format!("mean_depth        {mean_depth:.5}"),
            format!("tokens/s          {tokens_per_s:.1}"),
        ]);
    }
    lines.extend([
        format!("routing           {}", report.routing),
        format!("device            {} on \"{}\" ({})", storage(&session), report.device, report.backend),
    ]);
    if let Results::Sweep { points } = &report.results {
        lines.extend([String::new(), sweep::table(points).trim_end().to_owned()]);
    }
    Ok(print(&format!("{}\n", lines.join("\n")))?)
}

/// The settings of all sweeps, with the names of the options swept.
fn swept(
    args: &EvalArgs,
    depth: DepthControl,
    config: &MorConfig,
) -> anyhow::Result<Vec<(&'static str, DepthControl)>> {
    let mut settings = Vec::new();
    for sweep in &args.sweep {
        let name = sweep.name();
        if args.sweep.iter().filter(|other| other.name() == name).count() > 1 {
            return Err(bad_input!("--sweep {name} is given twice, expected each option once"));
        }
        if (name == "max-depth" && depth.max_depth.is_some()) || (name == "router-bias" && depth.router_bias != 0.0) {
            return Err(bad_input!("--{name} is given beside --sweep {name}, which sets it; leave one of them out"));
        }
        let controls = sweep.controls(depth, config);
        controls.iter().try_for_each(|control| control.validate(config))?;
        settings.extend(controls.into_iter().map(|control| (name, control)));
    }
    Ok(settings)
}

/// Scores all documents.
fn score(session: &mut Session, encoded: &[Vec<u32>], routing: Routing, bar: &ProgressBar) -> anyhow::Result<Quality> {
    let mut totals = Totals::default();
    let start = Instant::now();
    for tokens in encoded.iter().filter(|tokens| tokens.len() > 1) {
        totals.add(&session.score(tokens, routing)?);
        bar.inc(tokens.len() as u64 - 1);
    }
    let secs = start.elapsed().as_secs_f64();
    let DepthControl { max_depth, router_bias } = session.model().depth_control();
    Ok(Quality {
        mean_nll_nats: totals.mean_nll(),
        perplexity: totals.mean_nll().exp(),
        mean_depth: totals.mean_depth(),
        tokens_per_s: totals.num_predicted as f64 / secs.max(1e-9),
        max_depth,
        router_bias,
    })
}

/// The token every document starts with: the one that ended the document before it in training.
fn first_token(config: &MorConfig, name: &str) -> anyhow::Result<u32> {
    let first = config.eos_token_ids().first().copied().or(config.bos_token_id);
    first.ok_or_else(|| bad_input!("{name}: config.json names no eos_token_id, which every document starts with"))
}

/// Documents are separated by lines that hold [`SEPARATOR`]; the newline before one is not part of a document.
fn split_documents<'t>(text: &'t str) -> Vec<&'t str> {
    let start = |part: &'t str| part.strip_prefix("\r\n").or_else(|| part.strip_prefix('\n')).unwrap_or(part);
    let end = |part: &'t str| part.strip_suffix("\r\n").or_else(|| part.strip_suffix('\n')).unwrap_or(part);
    let parts = text.split(SEPARATOR).enumerate();
    // Only a separator's own newline is dropped, so the first part keeps its beginning.
    let mut documents: Vec<&str> = parts.map(|(index, part)| end(if index > 0 { start(part) } else { part })).collect();
    // After the last separator there is no document.
    if documents.last().is_some_and(|last| last.is_empty()) {
        documents.pop();
    }
    documents
}

fn chosen<'t>(documents: Vec<&'t str>, range: Option<Range<usize>>, origin: &str) -> anyhow::Result<Vec<&'t str>> {
    if documents.is_empty() {
        return Err(bad_input!("{origin}: there is no text, expected documents separated by lines {SEPARATOR}"));
    }
    let Some(range) = range else {
        return Ok(documents);
    };
    let found = documents.len();
    documents.get(range.clone()).map(<[_]>::to_vec).ok_or_else(|| {
        bad_input!(
            "--documents {}..{}: {origin} has {found} document{}, expected 0..{found} or less",
            range.start,
            range.end,
            if found == 1 { "" } else { "s" }
        )
    })
}

/// A document as it is scored: the start token and as much of the text as the context holds.
fn document_tokens(tokenizer: &Tokenizer, text: &str, first: u32, context: usize) -> anyhow::Result<Vec<u32>> {
    let mut tokens = vec![first];
    tokens.extend(tokenizer.encode(text)?);
    tokens.truncate(context);
    Ok(tokens)
}

/// Sums over documents, in double precision: there may be millions of terms.
#[derive(Debug, Default)]
struct Totals {
    nll: f64,
    num_predicted: usize,
    depth: u64,
    num_fed: usize,
}

impl Totals {
    fn add(&mut self, score: &Score) {
        self.nll += score.nll.iter().map(|&nll| f64::from(nll)).sum::<f64>();
        self.num_predicted += score.nll.len();
        self.depth += score.depth.iter().map(|&depth| u64::from(depth)).sum::<u64>();
        self.num_fed += score.depth.len();
    }

    fn mean_nll(&self) -> f64 {
        self.nll / self.num_predicted as f64
    }

    /// Over all tokens fed.
    fn mean_depth(&self) -> f64 {
        self.depth as f64 / self.num_fed as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::embedded;

    const VALID: &str = include_str!("../tests/fixtures/valid-40.txt");
    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tinystories-mor-expert-5m/golden.json");

    #[test]
    fn documents_end_before_the_newline_of_their_separator() {
        assert_eq!(split_documents("a\nb\n<|endoftext|>\nc\n<|endoftext|>\n"), ["a\nb", "c"]);
        assert_eq!(split_documents("a\r\n<|endoftext|>\r\nc\r\n"), ["a", "c"]);
        assert_eq!(split_documents("\na"), ["\na"], "only a separator's own newline is dropped");
        assert_eq!(split_documents("a\n<|endoftext|>\n\n<|endoftext|>\nb"), ["a", "", "b"]);
        assert_eq!(split_documents("a"), ["a"]);
        assert!(split_documents("").is_empty());
        assert_eq!(split_documents(VALID).len(), 40);
    }

    #[test]
    fn documents_are_chosen_by_number() {
        let documents = || vec!["a", "b", "c"];
        assert_eq!(chosen(documents(), Some(1..3), "f").unwrap(), ["b", "c"]);
        assert_eq!(chosen(documents(), None, "f").unwrap(), ["a", "b", "c"]);
        let message = chosen(documents(), Some(1..4), "f").unwrap_err().to_string();
        assert_eq!(message, "--documents 1..4: f has 3 documents, expected 0..3 or less");
        assert!(chosen(Vec::new(), None, "f").is_err());
    }

    #[test]
    fn tokens_are_counted_as_in_the_reference() {
        let tokenizer = Tokenizer::from_bytes(embedded::TOKENIZER, "test", 4096).unwrap();
        let tokens = |text: &str| document_tokens(&tokenizer, text, 0, 1024).unwrap();
        assert_eq!(tokens("Once upon a time"), [0, 505, 478, 259, 425]);
        assert_eq!(tokens(""), [0]);
        assert_eq!(tokens(&"a ".repeat(2000)).len(), 1024);
        let golden: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(GOLDEN).unwrap()).unwrap();
        let predicted: usize = split_documents(VALID).into_iter().map(|text| tokens(text).len() - 1).sum();
        assert_eq!(predicted as u64, golden["nll"]["predicted_tokens"]);
    }

    #[test]
    fn means_are_over_tokens() {
        let mut totals = Totals::default();
        totals.add(&Score { nll: vec![1.0, 2.0], depth: vec![1, 2, 3] });
        totals.add(&Score { nll: vec![6.0], depth: vec![3, 1] });
        assert_eq!((totals.mean_nll(), totals.mean_depth()), (3.0, 2.0));
    }
}
