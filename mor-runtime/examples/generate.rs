//! The smallest complete program: loads a model folder and continues a prompt.
//!
//! `cargo run --release -p mor-runtime --example generate -- models/tinystories-mor-expert-5m "Once upon a time"`

use std::error::Error;
use std::io::Write;

use mor_runtime::{Event, GenerateRequest, ModelSource, Session, SessionOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(folder), Some(prompt)) = (args.next(), args.next()) else {
        return Err("expected a model folder and a prompt".into());
    };
    let mut session = Session::load(ModelSource::Folder(folder.into()), SessionOptions::default())?;
    let tokens = session.tokenizer().ok_or("the model has no tokenizer.json")?.encode(&prompt)?;
    for event in session.generate(&GenerateRequest::new(tokens))? {
        match event? {
            Event::Token { text, .. } => {
                print!("{text}");
                std::io::stdout().flush()?;
            }
            Event::Finished(summary) => println!("\n{:.1} tokens/s", summary.decode_tokens_per_s),
            _ => {}
        }
    }
    Ok(())
}
