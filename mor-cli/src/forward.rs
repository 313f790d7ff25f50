//! `mor forward`: runs full sequences and writes everything they compute, for comparison with other implementations.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use mor_model::{Mode, MorConfig};
use mor_runtime::{RuntimeError, SequenceOutput, SessionOptions};
use safetensors::{Dtype, SafeTensors, View};

use crate::args::{ForwardArgs, KvArg};
use crate::failure::bad_input;
use crate::model::{Model, storage};
use crate::note;
use crate::output::{check_target, write_atomically};

pub(crate) fn run(args: &ForwardArgs) -> anyhow::Result<()> {
    let model = Model::named(Some(&args.model))?;
    let config = model.config()?;
    let kv = args.kv.map(KvArg::strategy);
    if let Some(kv) = kv {
        config.with_kv(kv)?;
    }
    let batch = Batch::read(&args.tokens, &config)?;
    check_target("--out", &args.out)?;
    let depth = args.depth.control(&config)?;

    let options = SessionOptions {
        precision: args.dtype.precision(),
        quantize: args.quantize.quantization(),
        quantize_kv: args.quantize.quantize_kv,
        kv,
        depth,
        ..SessionOptions::default()
    };
    let mut session = model.load(args.device.selector(), options)?;
    let output = session.forward(&batch.sequences, args.routing.routing())?;
    let tensors = output_tensors(&output.sequences, batch.padded_len, &config);
    write_atomically(&args.out, |partial| safetensors::serialize_to_file(tensors, None, partial))?;
    note(&format!(
        "{} sequences, {} tokens, {} routing, {} on \"{}\" ({}); wrote {}",
        batch.sequences.len(),
        batch.sequences.iter().map(Vec::len).sum::<usize>(),
        args.routing.name(),
        storage(&session),
        session.device().name,
        session.device().backend,
        args.out.display()
    ));
    Ok(())
}

/// A ragged batch as read: sequences without their padding.
#[derive(Debug, PartialEq)]
struct Batch {
    sequences: Vec<Vec<u32>>,
    padded_len: usize,
}

impl Batch {
    fn read(path: &Path, config: &MorConfig) -> anyhow::Result<Self> {
        let bytes = fs::read(path).map_err(|error| bad_input!("cannot read {}: {error}", path.display()))?;
        Self::parse(&bytes, &path.display().to_string(), config)
    }

    fn parse(bytes: &[u8], origin: &str, config: &MorConfig) -> anyhow::Result<Self> {
        let file = SafeTensors::deserialize(bytes)
            .map_err(|error| bad_input!("{origin}: not a safetensors file with tokens and lengths: {error}"))?;
        let (tokens, shape) = integers(&file, "tokens", origin)?;
        let [num_sequences, padded_len] = shape[..] else {
            return Err(bad_input!("{origin}: tokens has shape {shape:?}, expected [sequences, length]"));
        };
        let (lengths, shape) = integers(&file, "lengths", origin)?;
        if shape != [num_sequences] {
            return Err(bad_input!("{origin}: lengths has shape {shape:?}, expected [{num_sequences}] as tokens has"));
        }
        if num_sequences == 0 {
            return Err(bad_input!("{origin}: tokens has no sequences, expected at least one"));
        }
        let limit = config.max_position_embeddings;
        let mut sequences = Vec::with_capacity(num_sequences);
        for (index, &length) in lengths.iter().enumerate() {
            let len = usize::try_from(length).ok().filter(|len| (1..=padded_len).contains(len)).ok_or_else(|| {
                bad_input!("{origin}: lengths[{index}] is {length}, expected 1 to {padded_len}, the width of tokens")
            })?;
            if len > limit {
                let (what, advice) = ("a sequence", "shorten it");
                return Err(RuntimeError::TooLong { what, found: len, limit, advice }.into());
            }
            let row = &tokens[index * padded_len..][..len];
            let vocab_size = config.vocab_size;
            let id = |(position, &token): (usize, &i64)| match u32::try_from(token) {
                Ok(id) if (id as usize) < vocab_size => Ok(id),
                _ => {
                    let at = format!("{origin}: tokens[{index}, {position}]");
                    Err(RuntimeError::TokenOutOfRange { at, token, vocab_size, last: vocab_size - 1 })
                }
            };
            sequences.push(row.iter().enumerate().map(id).collect::<Result<_, _>>()?);
        }
        Ok(Self { sequences, padded_len })
    }
}

/// An integer tensor and its shape.
fn integers(file: &SafeTensors<'_>, name: &str, origin: &str) -> anyhow::Result<(Vec<i64>, Vec<usize>)> {
    let Ok(tensor) = file.tensor(name) else {
        return Err(bad_input!("{origin}: tensor {name} is missing, expected tokens [N, S] and lengths [N]"));
    };
    let data = tensor.data();
    let values = match tensor.dtype() {
        Dtype::I32 => data.as_chunks().0.iter().map(|bytes| i64::from(i32::from_le_bytes(*bytes))).collect(),
        Dtype::I64 => data.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect(),
        other => return Err(bad_input!("{origin}: tensor {name} has element type {other:?}, expected I32 or I64")),
    };
    Ok((values, tensor.shape().to_vec()))
}

/// A tensor to write.
#[derive(Debug)]
struct Output {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl View for Output {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// Puts rows of unequal length under each other, `width` elements a token, with zeros on padding.
fn padded<'a, const BYTES: usize>(
    dtype: Dtype,
    width: usize,
    padded_len: usize,
    rows: impl ExactSizeIterator<Item = Box<dyn Iterator<Item = [u8; BYTES]> + 'a>>,
) -> Output {
    let row_bytes = padded_len * width * BYTES;
    let mut shape = vec![rows.len(), padded_len];
    if width > 1 {
        shape.push(width);
    }
    let mut data = vec![0; rows.len() * row_bytes];
    for (row, elems) in rows.enumerate() {
        let (out, _) = data[row * row_bytes..][..row_bytes].as_chunks_mut::<BYTES>();
        out.iter_mut().zip(elems).for_each(|(out, elem)| *out = elem);
    }
    Output { dtype, shape, data }
}

/// All results under the names of the reference's files.
fn output_tensors(sequences: &[SequenceOutput], padded_len: usize, config: &MorConfig) -> Vec<(String, Output)> {
    let floats = |width: usize, values: &dyn Fn(&SequenceOutput) -> &[f32]| {
        let rows = sequences.iter().map(|sequence| -> Box<dyn Iterator<Item = [u8; 4]>> {
            Box::new(values(sequence).iter().map(|value| value.to_le_bytes()))
        });
        padded(Dtype::F32, width, padded_len, rows)
    };
    let depth = sequences.iter().map(|sequence| -> Box<dyn Iterator<Item = [u8; 4]>> {
        Box::new(sequence.depth.iter().map(|&depth| (depth as i32).to_le_bytes()))
    });
    let mut tensors = vec![
        ("logits".to_owned(), floats(config.vocab_size, &|s| &s.logits)),
        ("hidden".to_owned(), floats(config.hidden_size, &|s| &s.hidden)),
        ("depth".to_owned(), padded(Dtype::I32, 1, padded_len, depth)),
    ];
    // Every sequence has as many entries as the first: the model decides how many.
    let Some(first) = sequences.first() else {
        return tensors;
    };
    for r in 0..first.selected.len() {
        let rows = sequences.iter().map(|sequence| -> Box<dyn Iterator<Item = [u8; 1]>> {
            Box::new(sequence.selected[r].iter().map(|&selected| [u8::from(selected)]))
        });
        tensors.push((format!("selected.{r}"), padded(Dtype::U8, 1, padded_len, rows)));
    }
    // Token choice decides once, with one value for each depth.
    let router_width = if config.mode == Mode::Token { config.num_recursions } else { 1 };
    for r in 0..first.router_logits.len() {
        tensors.push((format!("router_logits.{r}"), floats(router_width, &|s| &s.router_logits[r])));
    }
    for r in 0..first.router_weights.len() {
        tensors.push((format!("router_weights.{r}"), floats(router_width, &|s| &s.router_weights[r])));
    }
    for r in 0..first.aux_logits.len() {
        tensors.push((format!("aux_logits.{r}"), floats(1, &|s| &s.aux_logits[r])));
    }
    for r in 0..first.block_out.len() {
        tensors.push((format!("block_out.{r}"), floats(config.hidden_size, &|s| &s.block_out[r])));
    }
    tensors
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::embedded;

    fn config() -> MorConfig {
        MorConfig::from_json_str(embedded::CONFIG, "test").unwrap()
    }

    fn file(tokens: &[i32], shape: [usize; 2], lengths: &[i64]) -> Vec<u8> {
        let output = |dtype, shape: &[usize], data| Output { dtype, shape: shape.to_vec(), data };
        let tokens = output(Dtype::I32, &shape, tokens.iter().flat_map(|t| t.to_le_bytes()).collect());
        let lengths = output(Dtype::I64, &[lengths.len()], lengths.iter().flat_map(|l| l.to_le_bytes()).collect());
        safetensors::serialize([("tokens", tokens), ("lengths", lengths)], None).unwrap()
    }

    fn refused(bytes: &[u8]) -> String {
        Batch::parse(bytes, "in", &config()).unwrap_err().to_string()
    }

    #[test]
    fn padding_is_dropped() {
        let batch = Batch::parse(&file(&[1, 2, 3, 4, 0, 0], [2, 3], &[3, 1]), "in", &config()).unwrap();
        assert_eq!(batch, Batch { sequences: vec![vec![1, 2, 3], vec![4]], padded_len: 3 });
        // What stands on padding does not matter.
        assert!(Batch::parse(&file(&[1, -1], [1, 2], &[1]), "in", &config()).is_ok());
    }

    #[test]
    fn bad_batches_are_refused_with_their_place() {
        assert!(refused(b"nonsense").starts_with("in: not a safetensors file"));
        assert_eq!(refused(&file(&[1], [1, 1], &[2])), "in: lengths[0] is 2, expected 1 to 1, the width of tokens");
        assert_eq!(refused(&file(&[1], [1, 1], &[0])), "in: lengths[0] is 0, expected 1 to 1, the width of tokens");
        assert!(refused(&file(&[1], [1, 1], &[1, 1])).contains("lengths has shape [2], expected [1]"));
        assert!(refused(&file(&[4096], [1, 1], &[1])).contains("in: tokens[0, 0]: token id 4096 is out of range"));
        assert!(refused(&file(&[-1], [1, 1], &[1])).contains("token id -1 is out of range"));
        assert!(refused(&file(&[0; 1025], [1, 1025], &[1025])).contains("the model's context holds 1024"));
        let floats = Output { dtype: Dtype::F32, shape: vec![1, 1], data: vec![0; 4] };
        let bytes = safetensors::serialize([("tokens", floats)], None).unwrap();
        assert_eq!(refused(&bytes), "in: tensor tokens has element type F32, expected I32 or I64");
        let bytes = safetensors::serialize(Vec::<(String, Output)>::new(), None).unwrap();
        assert!(refused(&bytes).contains("tensor tokens is missing"));
    }

    #[test]
    fn outputs_are_padded_with_zeros() {
        let sequence = |len: usize| SequenceOutput {
            logits: vec![1.0; len * 4096],
            hidden: vec![2.0; len * 256],
            depth: vec![3; len],
            selected: vec![vec![true; len]; 3],
            router_logits: vec![vec![4.0; len]; 3],
            router_weights: vec![vec![5.0; len]; 3],
            aux_logits: Vec::new(),
            block_out: vec![vec![6.0; len * 256]; 3],
        };
        let tensors = output_tensors(&[sequence(1), sequence(2)], 2, &config());
        let get = |name: &str| &tensors.iter().find(|(other, _)| other == name).unwrap().1;
        assert_eq!(tensors.len(), 3 + 4 * 3);
        assert_eq!(get("logits").shape, [2, 2, 4096]);
        assert_eq!(get("block_out.2").shape, [2, 2, 256]);
        assert_eq!(get("router_logits.1").shape, [2, 2]);
        assert_eq!(get("selected.0").data, [1, 0, 1, 1]);
        let depth: Vec<u8> = [3, 0, 3, 3].into_iter().flat_map(i32::to_le_bytes).collect();
        assert_eq!(get("depth").data, depth);
    }
}
