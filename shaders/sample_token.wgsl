// sample_token: draw the next token of every sampled row from its logits, and prepare the sequence's next row.
// Math      l = logits[i], by the repetition penalty of seen tokens; greedy: argmax(l); else, with z = l / temperature,
//           keep the top-k, of those the top-p, of those the min-p tokens, and draw argmax(z + gumbel) among them
// Why       the token goes to the next step without leaving the device
// Shapes    active_rows [n]; logits [n, logits_stride] f32; sampling [S]; seen [S, seen_words] u32, a bit a token;
//           next_rows [S]; results [S, RESULTS, 2] u32 of (token, depth), a ring by position; S sequences
// Bindings  0 params uniform; 1 active_rows read; 2 logits read; 3 sampling read; 4 seen write; 5 next_rows write; 6 results write
// Grid      (1, n, 1) workgroups; one per sampled row; WORKGROUP_SIZE threads stride over the vocabulary
// Spec      WORKGROUP_SIZE 16..=1024; MAX_LISTED: 4 * MAX_LISTED bytes of workgroup memory; MIN_TEMPERATURE: greedy below; RESULTS;
//           SUBGROUP
// Limits    vocab_size <= 2^18; one row a sequence; penalty and temperature not NaN
// Numerics  penalty: l > 0 ? l / p : l * p. Order: penalty, temperature, top-k, top-p, min-p, draw. top-k keeps
//           l >= the k-th largest; top-p the fewest tokens whose mass, renormalised after top-k, is >= top_p; both keep
//           all ties at the border; min-p keeps p >= min_p * p_max; the most likely token always stays. Thresholds come
//           from radix selection over the bits of l, masses are integers (unit 2^-26 of p_max): no sum depends on an
//           order. Ties: lowest token; NaN never before a number, token 0 if all are NaN; infinities as +-3.4e38.
//           The draw depends on seed, position and token alone, so neither on the batch nor on the place in it.
// Source    penalty: Keskar et al. 2019 (arXiv 1909.05858); top-p: Holtzman et al. 2020 (arXiv 1904.09751); min-p: Nguyen
//           et al. 2024 (arXiv 2407.01082); Gumbel-max: Gumbel 1954; pcg4d: Jarzynski and Olano 2020 (JCGT 9.3)
#import shared/rows
#import shared/order_key
#import shared/pcg4d
#import shared/radix_select

struct Params {
    vocab_size: u32,
    logits_stride: u32,
    seen_words: u32,
}

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

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> active_rows: array<ActiveRow>;
@group(0) @binding(2) var<storage, read> logits: array<f32>;
@group(0) @binding(3) var<storage, read> sampling: array<Sampling>;
@group(0) @binding(4) var<storage, read_write> seen: array<u32>;
@group(0) @binding(5) var<storage, read_write> next_rows: array<Row>;
@group(0) @binding(6) var<storage, read_write> results: array<vec2<u32>>;

// Where a row's logits come from and how they are scaled; the same for all threads.
struct Source {
    first_logit: u32,
    first_seen: u32,
    penalty: f32,
    inverse_temperature: f32,
    best_key: u32,
    best_logit: f32,
}

// The tokens in question: those of `listed` when num_listed is not NONE, else the vocabulary; of these, the ones with
// a key of at least `threshold`.
struct Candidates {
    threshold: u32,
    num_listed: u32,
}

var<workgroup> listed: array<u32, MAX_LISTED>;
var<workgroup> num_appended: atomic<u32>;
var<workgroup> best_key: atomic<u32>;
var<workgroup> best_token: atomic<u32>;
var<workgroup> broadcast: vec2<u32>;

// Order key of a token's logit after the penalty.
fn token_key(source: Source, token: u32) -> u32 {
    var logit = logits[source.first_logit + token];
    if source.penalty != 1.0 && ((seen[source.first_seen + token / 32u] >> (token % 32u)) & 1u) == 1u {
        logit = select(logit * source.penalty, logit / source.penalty, logit > 0.0);
    }
    return order_key(logit);
}

fn num_candidates(candidates: Candidates) -> u32 {
    return select(candidates.num_listed, params.vocab_size, candidates.num_listed == NONE);
}

fn candidate(candidates: Candidates, i: u32) -> u32 {
    if candidates.num_listed == NONE {
        return i;
    }
    return listed[i];
}

// (largest key, lowest token that has it) over the workgroup. Uniform.
fn workgroup_best(best: vec2<u32>, thread: u32, lane: u32) -> vec2<u32> {
    if thread == 0u {
        atomicStore(&best_key, 0u);
        atomicStore(&best_token, NONE);
    }
    workgroupBarrier();
#if SUBGROUP
    let subgroup_key = subgroupMax(best.x);
    if lane == 0u {
        atomicMax(&best_key, subgroup_key);
    }
#else
    atomicMax(&best_key, best.x);
#endif
    workgroupBarrier();
    let key = atomicLoad(&best_key);
    if best.x == key {
        atomicMin(&best_token, best.y);
    }
    workgroupBarrier();
    if thread == 0u {
        broadcast = vec2<u32>(key, atomicLoad(&best_token));
    }
    return workgroupUniformLoad(&broadcast);
}

// Logits a thread fetches before it looks at them.
const AHEAD: u32 = 8u;

fn most_likely(source: Source, thread: u32, lane: u32) -> vec2<u32> {
    var best = vec2<u32>(0u, NONE);
    for (var first = thread; first < params.vocab_size; first += AHEAD * WORKGROUP_SIZE) {
        // Fetched together: one workgroup alone waits for memory, not for arithmetic.
        var keys: array<u32, AHEAD>;
        for (var i = 0u; i < AHEAD; i++) {
            keys[i] = 0u;
            if first + i * WORKGROUP_SIZE < params.vocab_size {
                keys[i] = token_key(source, first + i * WORKGROUP_SIZE);
            }
        }
        for (var i = 0u; i < AHEAD; i++) {
            // A thread's tokens ascend, so the first of equals stays.
            if keys[i] > best.x {
                best = vec2<u32>(keys[i], first + i * WORKGROUP_SIZE);
            }
        }
    }
    return workgroup_best(best, thread, lane);
}

// log(p / p_max)
fn log_ratio(source: Source, key: u32) -> f32 {
    return (value_of_key(key) - source.best_logit) * source.inverse_temperature;
}

// Weight of a token in a selection: 1 by count, p / p_max in units of 2^-26 by mass.
fn selection_weight(source: Source, key: u32, by_mass: bool) -> u32 {
    return select(1u, u32(exp(log_ratio(source, key)) * 67108864.0 + 0.5), by_mass);
}

// First digit of a selection: bins an eighth of a logit wide, the most likely tokens in bin 255. The leading bits of
// the key would put nearly all tokens into a few bins, where atomics queue. Scaling by a power of two is exact, so a
// key has one bin in every pass.
fn first_digit(source: Source, key: u32) -> u32 {
    return 255u - u32(min((source.best_logit - value_of_key(key)) * 8.0, 255.0));
}

// The part `fraction` < 1 of a weight, at least one unit.
fn weight_part(weight: vec2<u32>, fraction: f32) -> vec2<u32> {
    let unit = f32(1u << WEIGHT_LOW_BITS);
    let part = max(fraction, 0.0) * (f32(weight.x) + f32(weight.y) / unit);
    let whole = floor(part);
    let wanted = weight_carried(vec2<u32>(u32(whole), u32(ceil((part - whole) * unit))));
    return select(wanted, vec2<u32>(0u, 1u), all(wanted == vec2<u32>(0u)));
}

// Lists the candidates whose first digit is `digit` at least; they stay as they are if there are too many.
fn shortlist(source: Source, candidates: Candidates, digit: u32, thread: u32) -> Candidates {
    if thread == 0u {
        atomicStore(&num_appended, 0u);
    }
    workgroupBarrier();
    for (var token = thread; token < params.vocab_size; token += WORKGROUP_SIZE) {
        let key = token_key(source, token);
        if key >= candidates.threshold && first_digit(source, key) >= digit {
            // Looked at before it is raised: a list that cannot fit must not cost an atomic a token.
            if atomicLoad(&num_appended) <= MAX_LISTED {
                let at = atomicAdd(&num_appended, 1u);
                if at < MAX_LISTED {
                    listed[at] = token;
                }
            }
        }
    }
    workgroupBarrier();
    if thread == 0u {
        broadcast = vec2<u32>(atomicLoad(&num_appended), 0u);
    }
    let appended = workgroupUniformLoad(&broadcast).x;
    return Candidates(candidates.threshold, select(NONE, appended, appended <= MAX_LISTED));
}

// Raises the threshold to the largest key such that the candidates at or above it weigh enough: `count` of them, or the
// part `mass` of their mass if `count` is 0.
fn keep_top(source: Source, before: Candidates, count: u32, mass: f32, thread: u32) -> Candidates {
    let by_mass = count == 0u;
    var candidates = before;
    bins_clear(thread);
    for (var i = thread; i < num_candidates(candidates); i += WORKGROUP_SIZE) {
        let key = token_key(source, candidate(candidates, i));
        if key >= candidates.threshold {
            bins_add(first_digit(source, key), selection_weight(source, key, by_mass));
        }
    }
    let total = bins_sum(thread);
    let wanted = select(weight_carried(vec2<u32>(0u, count)), weight_part(total, mass), by_mass);
    let first = bins_find(vec2<u32>(0u), wanted, thread);
    if candidates.num_listed == NONE {
        candidates = shortlist(source, candidates, first.x, thread);
    }
    // Within the bin found, the key itself, 8 bits a pass.
    var above = first.yz;
    var threshold = 0u;
    for (var pass_index = 0u; pass_index < 4u; pass_index++) {
        let shift = 24u - 8u * pass_index;
        bins_clear(thread);
        for (var i = thread; i < num_candidates(candidates); i += WORKGROUP_SIZE) {
            let key = token_key(source, candidate(candidates, i));
            // Two shifts: a shift by 32 would be undefined.
            let is_here = ((key >> shift) >> 8u) == threshold && key >= candidates.threshold;
            if is_here && first_digit(source, key) == first.x {
                bins_add((key >> shift) & 255u, selection_weight(source, key, by_mass));
            }
        }
        bins_sum(thread);
        let found = bins_find(above, wanted, thread);
        above = found.yz;
        threshold = (threshold << 8u) | found.x;
    }
    return Candidates(max(candidates.threshold, threshold), candidates.num_listed);
}

// A sample of the Gumbel distribution: -log(-log(1 - u)), u = (bits + 1/2) / 2^32 strictly between 0 and 1. Winners
// have a small u, where -log(1 - u) from the built-in would have no digit left; a series serves there.
fn gumbel(bits: u32) -> f32 {
    let u = (f32(bits) + 0.5) * 2.3283064365386963e-10;
    let series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * 0.25)));
    let exact = -log((f32(~bits) + 0.5) * 2.3283064365386963e-10);
    return -log(select(exact, series, u < 0.0625));
}

fn draw(source: Source, candidates: Candidates, s: Sampling, position: u32, thread: u32, lane: u32) -> u32 {
    var best = vec2<u32>(0u, NONE);
    for (var i = thread; i < num_candidates(candidates); i += WORKGROUP_SIZE) {
        let token = candidate(candidates, i);
        let key = token_key(source, token);
        if key < candidates.threshold {
            continue;
        }
        let log_p = log_ratio(source, key);
        if s.min_p > 0.0 && key != source.best_key && exp(log_p) < s.min_p {
            continue;
        }
        let bits = pcg4d(vec4<u32>(s.seed_low, s.seed_high, position, token)).x;
        let score = order_key(log_p + gumbel(bits));
        // A list is in no order.
        if score > best.x || (score == best.x && token < best.y) {
            best = vec2<u32>(score, token);
        }
    }
    return workgroup_best(best, thread, lane).y;
}

fn finish(entry: ActiveRow, s: Sampling, token: u32) {
    results[entry.sequence * RESULTS + entry.position % RESULTS] = vec2<u32>(token, entry.recursion);
    let word = entry.sequence * params.seen_words + token / 32u;
    seen[word] = seen[word] | (1u << (token % 32u));
    let is_end = any(s.eos == vec4<u32>(token));
    // The last token of a sequence is not fed.
    let is_full = entry.position + 2u >= s.limit;
    let flags = select(ROW_ACTIVE | ROW_SAMPLE, 0u, is_end || is_full);
    next_rows[entry.sequence] = Row(token, entry.position + 1u, entry.sequence, flags);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
#if SUBGROUP
    @builtin(subgroup_invocation_id) lane: u32,
#endif
) {
#if !SUBGROUP
    let lane = 0u;
#endif
    let entry = active_rows[workgroup.y];
    if entry.row == NONE {
        return;
    }
    let s = sampling[entry.sequence];
    var source = Source(
        workgroup.y * params.logits_stride,
        entry.sequence * params.seen_words,
        s.repetition_penalty,
        1.0,
        0u,
        0.0,
    );
    let best = most_likely(source, thread, lane);
    // A row of NaN alone has no key above 0.
    var token = select(best.y, 0u, best.x == 0u);
    if s.temperature >= MIN_TEMPERATURE && best.x != 0u {
        source.inverse_temperature = 1.0 / s.temperature;
        source.best_key = best.x;
        source.best_logit = value_of_key(best.x);
        // Key 0 is NaN.
        var candidates = Candidates(1u, NONE);
        if s.top_k > 0u && s.top_k < params.vocab_size {
            candidates = keep_top(source, candidates, s.top_k, 0.0, thread);
        }
        if s.top_p < 1.0 {
            candidates = keep_top(source, candidates, 0u, s.top_p, thread);
        }
        token = draw(source, candidates, s, entry.position, thread, lane);
    }
    if thread == 0u {
        finish(entry, s, token);
    }
}
