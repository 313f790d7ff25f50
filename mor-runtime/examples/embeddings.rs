//! Sentences as vectors: the mean of a sentence's final hidden states, and the cosine between each pair.
//!
//! `cargo run --release -p mor-runtime --example embeddings -- models/tinystories-mor-expert-5m "A cat sat." "A dog sat." "It rained."`

use std::error::Error;

use mor_runtime::{ModelSource, Routing, Session, SessionOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("expected a model folder and sentences")?;
    let sentences: Vec<String> = args.collect();
    let mut session = Session::load(ModelSource::Folder(folder.into()), SessionOptions::default())?;
    let tokenizer = session.tokenizer().ok_or("the model has no tokenizer.json")?;
    let tokens = sentences.iter().map(|sentence| tokenizer.encode(sentence)).collect::<Result<Vec<_>, _>>()?;
    let width = session.config().hidden_size;
    // Causal routing decides each token by what stands before it, as generation does.
    let output = session.forward(&tokens, Routing::Causal)?;
    let vectors: Vec<_> = output.sequences.iter().map(|sequence| unit_mean(&sequence.hidden, width)).collect();
    for (sentence, a) in sentences.iter().zip(&vectors) {
        let cosines: Vec<String> = vectors.iter().map(|b| format!("{:6.3}", dot(a, b))).collect();
        println!("{}  {sentence}", cosines.join(" "));
    }
    Ok(())
}

/// The mean of `rows`, each of `width` numbers, scaled to length 1: products of such vectors are cosines.
fn unit_mean(rows: &[f32], width: usize) -> Vec<f32> {
    let mut sum = vec![0.0; width];
    for row in rows.chunks_exact(width) {
        sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
    }
    let length = dot(&sum, &sum).sqrt().max(f32::MIN_POSITIVE);
    sum.iter().map(|value| value / length).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
