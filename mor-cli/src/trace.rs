//! `mor trace`: continues a prompt and shows how each token was routed.
//!
//! Router values and probabilities come from one full pass over the finished text, which routes as decoding does; the
//! depths of both are compared.

use std::path::PathBuf;

use clap::Args;
use mor_model::{Mode, MorConfig, Quantization};
use mor_runtime::{DepthControl, Event, Routing, SequenceOutput, Summary};
use serde::Serialize;

use crate::args::GenerateArgs;
use crate::failure::bad_input;
use crate::generate::{Prepared, pieces, prepare};
use crate::model::storage;
use crate::output::{check_target, write_atomically};
use crate::{note, print, print_json, style};

/// The page, with a place for the data.
const PAGE: &str = include_str!("trace.html");
const PLACE: &str = "TRACE_DATA";

/// How a token's kind is decided, for those who read the numbers.
const KINDS: &str = "punctuation has neither letters nor digits; of the others, tokens with ids in the first eighth of the \
                     vocabulary are frequent, because byte-pair vocabularies are numbered by frequency, and the rest rare";

#[derive(Debug, Args)]
pub(crate) struct TraceArgs {
    #[command(flatten)]
    generate: GenerateArgs,
    /// Write a page that shows it in a browser and needs nothing else
    #[arg(long, value_name = "HTML")]
    html: Option<PathBuf>,
}

/// What `--json` prints and the page holds.
#[derive(Debug, Serialize)]
struct Trace<'a> {
    model: String,
    mode: &'static str,
    num_recursions: usize,
    max_depth: Option<usize>,
    router_bias: f32,
    tokens: Vec<TokenTrace>,
    /// Tokens by depth, from 0 to R.
    depths: Vec<usize>,
    mean_depth: f64,
    kinds: [KindTrace; 3],
    kinds_rule: &'static str,
    /// Positions whose depth in the full pass is not that of decoding: their decisions are closer than rounding.
    differing: Vec<usize>,
    finish_reason: &'static str,
    seed: u64,
    dtype: &'static str,
    quantization: Option<&'static str>,
    device: &'a str,
    backend: &'a str,
}

#[derive(Debug, PartialEq, Serialize)]
struct TokenTrace {
    token: u32,
    /// What it adds to the text; empty for special tokens and incomplete characters.
    text: String,
    is_prompt: bool,
    kind: Kind,
    depth: u32,
    /// Of the token, given those before it, at temperature 1; the first has none.
    probability: Option<f64>,
    router: Vec<RouterStep>,
}

/// What a router said. Expert choice: at each recursion that the token came as far as; token choice: of each depth, at once.
#[derive(Debug, PartialEq, Serialize)]
struct RouterStep {
    /// The one that decides: the auxiliary router's, where there is one.
    logit: f32,
    /// What the model multiplies the block's result by, were it taken.
    gate: f32,
    /// Whether the token took the recursion.
    taken: bool,
    /// Expert choice: every token that comes this far takes it (capacity 1).
    always: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Frequent,
    Rare,
    Punctuation,
}

#[derive(Debug, PartialEq, Serialize)]
struct KindTrace {
    kind: Kind,
    tokens: usize,
    /// `None` without tokens.
    mean_depth: Option<f64>,
    /// By depth, from 0 to R.
    depths: Vec<usize>,
}

pub(crate) fn run(args: &TraceArgs) -> anyhow::Result<()> {
    args.html.iter().try_for_each(|path| check_target("--html", path))?;
    let model = args.generate.model.named(args.generate.random_weights.as_deref())?;
    let mode = match model.config()?.mode {
        Mode::Expert => "expert",
        Mode::Token => "token",
        Mode::Vanilla | Mode::Recursive => {
            let what = "has no routers, expected a model of expert or token choice";
            return Err(bad_input!("{}: the model {what}", model.name()));
        }
    };
    let Prepared { model, config, mut session, request } = prepare(&args.generate)?;
    let mut summary = None;
    for event in session.generate(&request)? {
        if let Event::Finished(finished) = event? {
            summary = Some(finished);
        }
    }
    let summary: Summary = summary.ok_or_else(|| anyhow::anyhow!("the sequence ended without a summary"))?;
    let fed = [&summary.prompt_tokens[..], &summary.tokens].concat();
    let output = session.forward(std::slice::from_ref(&fed), Routing::Causal)?;
    let output = output.sequences.into_iter().next().unwrap_or_default();
    let differs = |(position, depth): (usize, &u32)| (output.depth[position] != *depth).then_some(position);
    let differing: Vec<usize> = summary.depths.iter().enumerate().filter_map(differs).collect();
    if !differing.is_empty() {
        note(&format!(
            "warning: {} tokens took another depth while decoding: their routers' decisions are closer than rounding; \
             --dtype f32 rounds less",
            differing.len()
        ));
    }

    let control = session.model().depth_control();
    let texts = pieces(session.tokenizer(), &fed);
    let tokens = token_traces(&config, control, &fed, summary.prompt_tokens.len(), texts, &output);
    let by_depth = |tokens: &mut dyn Iterator<Item = &TokenTrace>| {
        let mut counts = vec![0; config.num_recursions + 1];
        tokens.for_each(|token| counts[token.depth as usize] += 1);
        counts
    };
    let depths = by_depth(&mut tokens.iter());
    let kinds = [Kind::Frequent, Kind::Rare, Kind::Punctuation].map(|kind| {
        let depths = by_depth(&mut tokens.iter().filter(|token| token.kind == kind));
        KindTrace { kind, tokens: depths.iter().sum(), mean_depth: mean(&depths), depths }
    });
    let trace = Trace {
        model: model.name(),
        mode,
        num_recursions: config.num_recursions,
        max_depth: control.max_depth,
        router_bias: control.router_bias,
        tokens,
        mean_depth: mean(&depths).unwrap_or_default(),
        depths,
        kinds,
        kinds_rule: KINDS,
        differing,
        finish_reason: summary.finish_reason.as_str(),
        seed: request.sampling.seed,
        dtype: session.precision().as_str(),
        quantization: session.config().quantization.map(Quantization::as_str),
        device: &session.device().name,
        backend: &session.device().backend,
    };
    if let Some(path) = &args.html {
        let page = page(&trace)?;
        write_atomically(path, |partial| std::fs::write(partial, page))?;
    }
    if args.generate.json {
        return print_json(&trace);
    }
    print(&shown(&trace, style::stdout_has_colour()))?;
    note(&format!(
        "mean depth {:.2}, seed {}, {} on \"{}\" ({})",
        trace.mean_depth,
        trace.seed,
        storage(&session),
        trace.device,
        trace.backend
    ));
    Ok(())
}

fn token_traces(
    config: &MorConfig,
    control: DepthControl,
    tokens: &[u32],
    prompt_len: usize,
    texts: Vec<String>,
    output: &SequenceOutput,
) -> Vec<TokenTrace> {
    let max_depth = control.max_depth.unwrap_or(config.num_recursions);
    let router = |t: usize| -> Vec<RouterStep> {
        let depth = output.depth[t] as usize;
        if config.mode == Mode::Token {
            let place = |r: usize| t * config.num_recursions + r;
            let step = |r: usize| RouterStep {
                logit: output.router_logits[0][place(r)],
                gate: output.router_weights[0][place(r)],
                taken: r < depth,
                always: false,
            };
            return (0..config.num_recursions).map(step).collect();
        }
        let step = |r: usize| RouterStep {
            logit: output.aux_logits.get(r).unwrap_or(&output.router_logits[r])[t],
            gate: output.router_weights[r][t],
            taken: r < depth,
            always: config.capacity[r] >= 1.0,
        };
        // The last one is the one that sent it away, if any did.
        (0..max_depth.min(depth + 1)).map(step).collect()
    };
    let row = |t: usize| &output.logits[t * config.vocab_size..][..config.vocab_size];
    let trace = |(t, (token, text)): (usize, (&u32, String))| TokenTrace {
        token: *token,
        kind: kind(*token, &text, config.vocab_size),
        text,
        is_prompt: t < prompt_len,
        depth: output.depth[t],
        probability: t.checked_sub(1).map(|before| probability(row(before), *token)),
        router: router(t),
    };
    tokens.iter().zip(texts).enumerate().map(trace).collect()
}

/// See [`KINDS`].
fn kind(token: u32, text: &str, vocab_size: usize) -> Kind {
    if !text.is_empty() && !text.contains(char::is_alphanumeric) {
        return Kind::Punctuation;
    }
    if (token as usize) < vocab_size / 8 { Kind::Frequent } else { Kind::Rare }
}

/// Softmax of the logits, at one token.
fn probability(logits: &[f32], token: u32) -> f64 {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mass = |logit: f32| f64::from(logit - top).exp();
    mass(logits[token as usize]) / logits.iter().map(|logit| mass(*logit)).sum::<f64>()
}

/// Mean depth of so many tokens by depth.
fn mean(depths: &[usize]) -> Option<f64> {
    let tokens: usize = depths.iter().sum();
    let total: usize = depths.iter().enumerate().map(|(depth, tokens)| depth * tokens).sum();
    (tokens > 0).then(|| total as f64 / tokens as f64)
}

/// For a terminal: the text by depth, then a line a token, then depths by kind.
fn shown(trace: &Trace<'_>, colour: bool) -> String {
    let name = |token: &TokenTrace| {
        if token.text.is_empty() { format!("#{}", token.token) } else { token.text.clone() }
    };
    let text = |token: &TokenTrace| match colour {
        true => style::coloured(&name(token), token.depth, trace.num_recursions),
        false => style::marked(&name(token), token.depth),
    };
    let mut out: String = trace.tokens.iter().map(text).collect();
    let steps = (1..=trace.num_recursions).map(|r| format!("{:>15}", format!("logit, gate {r}")));
    out += &format!("\n\n{:>5} {:<18} {:>5} {:>7}{}\n", "", "token", "depth", "p", steps.collect::<String>());
    for (position, token) in trace.tokens.iter().enumerate() {
        let quoted: String = format!("{:?}", name(token)).chars().take(18).collect();
        let depth = format!("{:>5}", token.depth);
        let depth = if colour { style::coloured(&depth, token.depth, trace.num_recursions) } else { depth };
        let probability = token.probability.map_or("-".to_owned(), |p| format!("{p:.4}"));
        let step = |step: &RouterStep| format!("{:>8.3} {:>6.3}", step.logit, step.gate);
        let steps: String = token.router.iter().map(step).collect();
        out += &format!("{position:>5} {quoted:<18} {depth} {probability:>7}{steps}\n");
    }
    let counts = |depths: &[usize]| depths.iter().map(|count| format!("{count:>7}")).collect::<String>();
    let heads: String = (0..=trace.num_recursions).map(|depth| format!("{:>7}", format!("d = {depth}"))).collect();
    out += &format!("\n{:<12} {:>6} {:>10}{heads}\n", "kind", "tokens", "mean depth");
    for kind in &trace.kinds {
        let name = format!("{:?}", kind.kind).to_lowercase();
        let mean = kind.mean_depth.map_or("-".to_owned(), |mean| format!("{mean:.3}"));
        out += &format!("{name:<12} {:>6} {mean:>10}{}\n", kind.tokens, counts(&kind.depths));
    }
    let (all, tokens) = (counts(&trace.depths), trace.tokens.len());
    out + &format!("{:<12} {tokens:>6} {:>10.3}{all}\n", "all", trace.mean_depth)
}

/// The page with its data. JSON in a script element ends at the first `</`, so `<` is written as an escape.
fn page(trace: &Trace<'_>) -> anyhow::Result<String> {
    let data = serde_json::to_string(trace)?.replace('<', "\\u003c");
    Ok(PAGE.replacen(PLACE, &data, 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::embedded;

    fn config() -> MorConfig {
        MorConfig::from_json_str(embedded::CONFIG, "test").unwrap()
    }

    #[test]
    fn kinds_are_told_by_text_and_id() {
        for (token, text, expected) in [
            (11, ",", Kind::Punctuation),
            (4000, "...\n", Kind::Punctuation),
            (300, " the", Kind::Frequent),
            (511, " a1", Kind::Frequent),
            (512, " bird", Kind::Rare),
            (0, "", Kind::Frequent),
        ] {
            assert_eq!(kind(token, text, 4096), expected, "{text:?}");
        }
    }

    #[test]
    fn probabilities_are_a_softmax() {
        let logits = [1000.0, 1000.0 + 3.0_f32.ln(), f32::NEG_INFINITY];
        assert!((probability(&logits, 0) - 0.25).abs() < 1e-4);
        assert!((probability(&logits, 1) - 0.75).abs() < 1e-4);
        assert_eq!(probability(&logits, 2), 0.0);
    }

    #[test]
    fn routers_are_shown_as_far_as_the_token_came() {
        let config = config();
        let output = SequenceOutput {
            logits: vec![0.0; 3 * config.vocab_size],
            depth: vec![1, 3, 2],
            router_logits: vec![vec![-1.0; 3], vec![-2.0, 2.0, 3.0], vec![9.0, 4.0, -5.0]],
            router_weights: vec![vec![0.1; 3]; 3],
            ..SequenceOutput::default()
        };
        let texts = || vec!["a".to_owned(), " b".to_owned(), ".".to_owned()];
        let traces = token_traces(&config, DepthControl::default(), &[70, 600, 17], 2, texts(), &output);
        let steps = |t: usize| traces[t].router.iter().map(|step| (step.logit, step.taken, step.always)).collect();
        let (first, second, third): (Vec<_>, Vec<_>, Vec<_>) = (steps(0), steps(1), steps(2));
        assert_eq!(first, [(-1.0, true, true), (-2.0, false, false)]);
        assert_eq!(second, [(-1.0, true, true), (2.0, true, false), (4.0, true, false)]);
        assert_eq!(third, [(-1.0, true, true), (3.0, true, false), (-5.0, false, false)]);
        assert_eq!(traces[0].probability, None);
        assert!((traces[1].probability.unwrap() - 1.0 / 4096.0).abs() < 1e-9);
        assert_eq!(traces.iter().map(|trace| trace.is_prompt).collect::<Vec<_>>(), [true, true, false]);
        let limited = DepthControl { max_depth: Some(1), ..DepthControl::default() };
        let output = SequenceOutput { depth: vec![1; 3], ..output };
        assert!(token_traces(&config, limited, &[1, 2, 3], 2, texts(), &output).iter().all(|t| t.router.len() == 1));
    }

    #[test]
    fn the_page_has_one_place_for_data_and_needs_no_network() {
        assert_eq!(PAGE.matches(PLACE).count(), 1);
        for word in ["http:", "https:", "src=", "@import", "url("] {
            assert!(!PAGE.contains(word), "{word}");
        }
    }
}
