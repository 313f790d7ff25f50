//! CPU reference of `sample_token`: sorts, and sums in f64.

use super::router_topk::descending;
use crate::ops::{GpuSampling, MIN_TEMPERATURE};

/// The token drawn from `logits` `[V]` at `position`, where the tokens `seen` occurred before.
///
/// # Source
/// As [`SampleToken`](crate::ops::SampleToken).
pub fn sample_token(logits: &[f32], sampling: &GpuSampling, seen: &[u32], position: u32) -> u32 {
    let scores = scores(logits, sampling, seen, position);
    let mut best = 0;
    for (token, score) in scores.iter().enumerate() {
        if *score > scores[best] || scores[best].is_nan() && !score.is_nan() {
            best = token;
        }
    }
    best as u32
}

/// What is maximised, per token: the logit after the penalty if greedy (NaN stays), else with noise and divided by the
/// temperature, and minus infinity for tokens that are not kept.
pub fn scores(logits: &[f32], sampling: &GpuSampling, seen: &[u32], position: u32) -> Vec<f64> {
    let is_greedy = sampling.temperature < MIN_TEMPERATURE;
    if is_greedy || logits.iter().all(|logit| logit.is_nan()) {
        return penalised(logits, sampling, seen).into_iter().map(f64::from).collect();
    }
    let noise = |token: usize| {
        let [bits, ..] = pcg4d([sampling.seed_low, sampling.seed_high, position, token as u32]);
        let u = (f64::from(bits) + 0.5) / 4_294_967_296.0;
        -(-(-u).ln_1p()).ln()
    };
    let kept = is_kept(logits, sampling, seen);
    let score = |(token, log_ratio): (usize, Option<f64>)| log_ratio.map_or(f64::NEG_INFINITY, |l| l + noise(token));
    kept.into_iter().enumerate().map(score).collect()
}

/// `log(p / p_max)` of every token that may be drawn, `None` of the others. Not greedy, and some logit is a number.
pub fn is_kept(logits: &[f32], sampling: &GpuSampling, seen: &[u32]) -> Vec<Option<f64>> {
    let logits = penalised(logits, sampling, seen);
    let mut order: Vec<usize> = (0..logits.len()).filter(|token| !logits[*token].is_nan()).collect();
    order.sort_by(|a, b| descending(logits[*a], logits[*b]));
    let top = f64::from(logits[order[0]]);
    let log_ratio = |token: usize| (f64::from(logits[token]) - top) / f64::from(sampling.temperature);

    // `end` is raised over all tokens that tie with the last one kept.
    let with_ties = |order: &[usize], mut end: usize| {
        while end < order.len() && logits[order[end]] == logits[order[end - 1]] {
            end += 1;
        }
        end
    };
    if sampling.top_k > 0 && (sampling.top_k as usize) < order.len() {
        order.truncate(with_ties(&order, sampling.top_k as usize));
    }
    if sampling.top_p < 1.0 {
        let total: f64 = order.iter().map(|token| log_ratio(*token).exp()).sum();
        let mut mass = 0.0;
        let mut end = 0;
        while end < order.len() && (end == 0 || mass < f64::from(sampling.top_p) * total) {
            mass += log_ratio(order[end]).exp();
            end += 1;
        }
        order.truncate(with_ties(&order, end));
    }
    let mut kept = vec![None; logits.len()];
    for token in order {
        if log_ratio(token) == 0.0 || log_ratio(token).exp() >= f64::from(sampling.min_p) {
            kept[token] = Some(log_ratio(token));
        }
    }
    kept
}

/// Logits after the penalty, infinities as the largest finite numbers.
fn penalised(logits: &[f32], sampling: &GpuSampling, seen: &[u32]) -> Vec<f32> {
    let p = sampling.repetition_penalty;
    let mut logits = logits.to_vec();
    let seen: std::collections::BTreeSet<u32> = seen.iter().copied().collect();
    for token in seen {
        let logit = &mut logits[token as usize];
        *logit = if *logit > 0.0 { *logit / p } else { *logit * p };
    }
    logits.into_iter().map(|logit| logit.clamp(-f32::MAX, f32::MAX)).collect()
}

/// Four hashes of four counters.
///
/// # Source
/// Jarzynski and Olano 2020, "Hash Functions for GPU Rendering", JCGT 9.3.
pub(super) fn pcg4d(counters: [u32; 4]) -> [u32; 4] {
    let mix = |v: [u32; 4]| {
        let [mut x, mut y, mut z, mut w] = v;
        x = x.wrapping_add(y.wrapping_mul(w));
        y = y.wrapping_add(z.wrapping_mul(x));
        z = z.wrapping_add(x.wrapping_mul(y));
        w = w.wrapping_add(y.wrapping_mul(z));
        [x, y, z, w]
    };
    let v = counters.map(|c| c.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    mix(mix(v).map(|c| c ^ (c >> 16)))
}
