//! A sampler of one's own: takes the logits of each step to the host and chooses the next token there, here the most likely
//! one that repeats no three tokens in a row.
//!
//! The price is a wait for the device at every token, which `Session::generate` avoids by drawing on the device.
//!
//! `cargo run --release -p mor-runtime --example custom_sampler -- models/tinystories-mor-expert-5m "Once upon a time"`

use std::error::Error;

use mor_kernels::ops::GpuSampling;
use mor_kernels::rows::{ROW_ACTIVE, ROW_SAMPLE, Row};
use mor_runtime::runner::{Feed, Runner, RunnerOptions, Work};
use mor_runtime::{Batching, ModelSource, Session, SessionOptions};

const NEW_TOKENS: usize = 40;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(folder), Some(prompt)) = (args.next(), args.next()) else {
        return Err("expected a model folder and a prompt".into());
    };
    let session = Session::load(ModelSource::Folder(folder.into()), SessionOptions::default())?;
    let tokenizer = session.tokenizer().ok_or("the model has no tokenizer.json")?;
    let mut tokens = tokenizer.encode(&prompt)?;
    let model = session.model();
    let options = RunnerOptions {
        num_slots: 1,
        max_positions: tokens.len() + NEW_TOKENS,
        prefill_rows: tokens.len(),
        // One step is one token; depth-wise, a tick is one recursion.
        batching: Some(Batching::Lockstep),
        pages_in_class: None,
        batch_invariant: false,
        persistent: false,
    };
    let mut runner = Runner::new(model, &options)?;
    // The device draws too, and its choice is overwritten; so how it draws does not matter.
    runner.start(0, &GpuSampling::default(), [], None);
    let feed = Feed { sequence: 0, position: 0, tokens: &tokens, sample: true };
    runner.submit(model, &Work { feeds: &[feed], ..Work::default() })?.wait()?;
    let mut logits = runner.logits(model, false)?;
    for _ in 0..NEW_TOKENS {
        let token = choose(&logits[0].1, &tokens);
        if model.config().eos_token_ids().contains(&token) {
            break;
        }
        let position = tokens.len() as u32;
        tokens.push(token);
        runner.set_next_row(Row { token, position, sequence: 0, flags: ROW_ACTIVE | ROW_SAMPLE });
        runner.submit(model, &Work { ticks: 1, max_context: tokens.len(), ..Work::default() })?.wait()?;
        logits = runner.logits(model, true)?;
    }
    println!("{}", tokenizer.decode(&tokens));
    Ok(())
}

/// The most likely token that makes no three tokens which occurred already.
fn choose(logits: &[f32], tokens: &[u32]) -> u32 {
    let repeats = |token: u32| {
        let Some((&last, before)) = tokens.split_last() else { return false };
        let Some(&second) = before.last() else { return false };
        tokens.windows(3).any(|three| three == [second, last, token])
    };
    let allowed = (0..).zip(logits).filter(|(token, _)| !repeats(*token));
    allowed.max_by(|(_, a), (_, b)| a.total_cmp(b)).map_or(0, |(token, _)| token)
}
