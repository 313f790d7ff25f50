//! CPU reference of `sample_partial`.

use super::sample_token::scores;
use crate::ops::{GpuSampling, MIN_TEMPERATURE};
use crate::rows::NONE;

/// Per part of `part_size` tokens of `logits` `[V]`: order key and token of the most likely one and of the one drawn at
/// `position`, where the tokens `seen` occurred before.
///
/// # Source
/// As [`SamplePartial`](crate::ops::SamplePartial).
pub fn sample_partial(
    logits: &[f32],
    sampling: &GpuSampling,
    seen: &[u32],
    position: u32,
    part_size: usize,
) -> Vec<[u32; 4]> {
    let tokens: Vec<usize> = (0..logits.len()).collect();
    let parts: Vec<_> = tokens.chunks(part_size).map(<[usize]>::to_vec).collect();
    sample_parts(logits, sampling, seen, position, &parts)
}

/// The same of any `parts`, lists of ascending tokens.
pub fn sample_parts(
    logits: &[f32],
    sampling: &GpuSampling,
    seen: &[u32],
    position: u32,
    parts: &[Vec<usize>],
) -> Vec<[u32; 4]> {
    let penalised = scores(logits, &GpuSampling { temperature: 0.0, ..*sampling }, seen, position);
    // Parts do not know what min-p keeps.
    let drawn = scores(logits, &GpuSampling { min_p: 0.0, ..*sampling }, seen, position);
    let cuts_off = (1..logits.len()).contains(&(sampling.top_k as usize)) || sampling.top_p < 1.0;
    let draws = sampling.temperature >= MIN_TEMPERATURE && !cuts_off;
    let with_key = |token: Option<usize>| match token {
        Some(token) => [order_key(penalised[token] as f32), token as u32],
        None => [0, NONE],
    };
    let part = |part: &Vec<usize>| {
        let tokens = || part.iter().copied().filter(|token| !penalised[*token].is_nan());
        // The first of equals.
        let best =
            |scores: &[f64]| tokens().reduce(|best, token| if scores[token] > scores[best] { token } else { best });
        let ([key, token], [drawn_key, drawn]) = (with_key(best(&penalised)), with_key(best(&drawn).filter(|_| draws)));
        [key, token, drawn_key, drawn]
    };
    parts.iter().map(part).collect()
}

/// A number's key: keys are in the order of the numbers. -0 equals +0.
pub fn order_key(value: f32) -> u32 {
    let magnitude = value.abs().to_bits();
    if value < 0.0 { 0x7fff_ffff - magnitude } else { 0x8000_0000 + magnitude }
}
