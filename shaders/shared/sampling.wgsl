// How a token's chance follows from its logit, and the noise that draws.
// The importer imports shared/order_key and shared/pcg4d and binds `logits: array<f32>`, `seen: array<u32>` and `params` with
// vocab_size, logits_stride and seen_words.

// Mirrors GpuSampling in ops/sample_token.rs.
struct Sampling {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    seed_low: u32,
    seed_high: u32,
    limit: u32,
    eos: vec4<u32>,
}

// Where a row's logits come from and how they are scaled; the same for all threads.
struct Source {
    first_logit: u32,
    first_seen: u32,
    penalty: f32,
    inverse_temperature: f32,
    // Of the most likely token among those compared.
    best_key: u32,
    best_logit: f32,
}

fn is_greedy(s: Sampling) -> bool {
    return s.temperature < MIN_TEMPERATURE;
}

// Whether tokens are cut off by rank or mass, which a part of the vocabulary cannot tell.
fn has_threshold(s: Sampling) -> bool {
    return (s.top_k > 0u && s.top_k < params.vocab_size) || s.top_p < 1.0;
}

// The row i of `sequence`, not yet compared with anything.
fn source_of(s: Sampling, i: u32, sequence: u32) -> Source {
    return Source(i * params.logits_stride, sequence * params.seen_words, s.repetition_penalty, 1.0, 0u, 0.0);
}

// As `source`, relative to the token with `best_key`. Not greedy.
fn relative_to(source: Source, s: Sampling, best_key: u32) -> Source {
    var relative = source;
    relative.inverse_temperature = 1.0 / s.temperature;
    relative.best_key = best_key;
    relative.best_logit = value_of_key(best_key);
    return relative;
}

// Order key of a token's logit after the penalty.
fn token_key(source: Source, token: u32) -> u32 {
    var logit = logits[source.first_logit + token];
    if source.penalty != 1.0 && ((seen[source.first_seen + token / 32u] >> (token % 32u)) & 1u) == 1u {
        logit = select(logit * source.penalty, logit / source.penalty, logit > 0.0);
    }
    return order_key(logit);
}

// log(p / p_max)
fn log_ratio(source: Source, key: u32) -> f32 {
    return (value_of_key(key) - source.best_logit) * source.inverse_temperature;
}

// A sample of the Gumbel distribution: -log(-log(1 - u)), u = (bits + 1/2) / 2^32 strictly between 0 and 1. Winners
// have a small u, where -log(1 - u) from the built-in would have no digit left; a series serves there.
fn gumbel(bits: u32) -> f32 {
    let u = (f32(bits) + 0.5) * 2.3283064365386963e-10;
    let series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * 0.25)));
    let exact = -log((f32(~bits) + 0.5) * 2.3283064365386963e-10);
    return -log(select(exact, series, u < 0.0625));
}

// What the drawn token has most of, as an order key.
fn token_score(source: Source, s: Sampling, position: u32, token: u32, key: u32) -> u32 {
    let bits = pcg4d(vec4<u32>(s.seed_low, s.seed_high, position, token)).x;
    return order_key(log_ratio(source, key) + gumbel(bits));
}
