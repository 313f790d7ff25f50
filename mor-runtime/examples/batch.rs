//! Several prompts at a time: they share each step of the device, and end in an order of their own.
//!
//! `cargo run --release -p mor-runtime --example batch -- models/tinystories-mor-expert-5m "Once" "Tom" "The dog"`

use std::error::Error;

use mor_runtime::{BatchOptions, Event, GenerateRequest, ModelSource, Session, SessionOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("expected a model folder and prompts")?;
    // Prompts beyond this number wait until a slot is free.
    let batch = BatchOptions { max_sequences: 8, ..BatchOptions::default() };
    let options = SessionOptions { batch, ..SessionOptions::default() };
    let mut session = Session::load(ModelSource::Folder(folder.into()), options)?;
    let mut handles = Vec::new();
    for prompt in args {
        let tokens = session.tokenizer().ok_or("the model has no tokenizer.json")?.encode(&prompt)?;
        let request = GenerateRequest { max_new_tokens: 40, ..GenerateRequest::new(tokens) };
        handles.push((prompt, session.submit(&request)?));
    }
    loop {
        let goes_on = session.step()?;
        for (prompt, handle) in &handles {
            while let Some(event) = handle.try_next() {
                if let Event::Finished(summary) = event {
                    println!("{}: {prompt}{}", handle.id(), summary.text.unwrap_or_default());
                }
            }
        }
        if !goes_on {
            return Ok(());
        }
    }
}
