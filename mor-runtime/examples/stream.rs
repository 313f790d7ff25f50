//! Events as they come, and a generation that is cancelled: stops after the first whole sentence.
//!
//! `cargo run --release -p mor-runtime --example stream -- models/tinystories-mor-expert-5m "Once upon a time"`

use std::error::Error;
use std::io::Write;

use mor_runtime::{Event, GenerateRequest, ModelSource, SamplingParams, Session, SessionOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(folder), Some(prompt)) = (args.next(), args.next()) else {
        return Err("expected a model folder and a prompt".into());
    };
    let mut session = Session::load(ModelSource::Folder(folder.into()), SessionOptions::default())?;
    let prompt = session.tokenizer().ok_or("the model has no tokenizer.json")?.encode(&prompt)?;
    let request = GenerateRequest { sampling: SamplingParams::greedy(), ..GenerateRequest::new(prompt) };
    // `generate` would do for one sequence; a handle can also be cancelled, from any thread.
    let handle = session.submit(&request)?;
    let (mut depths, mut is_whole) = (Vec::new(), false);
    loop {
        // Hands work to the device and takes in what has come; it does not wait for the end.
        let goes_on = session.step()?;
        while let Some(event) = handle.try_next() {
            match event {
                Event::Prompt { depths } => println!("prompt: {} tokens read", depths.len()),
                // The device runs some steps ahead, so a few tokens follow the one that was enough.
                Event::Token { .. } if is_whole => {}
                Event::Token { text, depth, .. } => {
                    print!("{text}");
                    std::io::stdout().flush()?;
                    depths.extend(depth);
                    is_whole = text.contains(['.', '!', '?']);
                    if is_whole {
                        handle.cancel();
                    }
                }
                Event::Finished(summary) => println!("\n{}: depths {depths:?}", summary.finish_reason.as_str()),
                _ => {}
            }
        }
        if !goes_on {
            return Ok(());
        }
    }
}
