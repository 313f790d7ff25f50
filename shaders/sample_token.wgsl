// sample_token: draw the next token of every sampled row from its logits, and prepare the sequence's next row.
// Math      l = logits[i], by the repetition penalty of seen tokens; greedy: argmax(l); else, with z = l / temperature,
//           keep the top-k, of those the top-p, of those the min-p tokens, and draw argmax(z + gumbel) among them
// Why       the token goes to the next step without leaving the device; without top-k and top-p the parts that
//           sample_partial left decide, so that the vocabulary is read by many workgroups, and not again
// Shapes    active_rows [n]; logits [n, logits_stride] f32; sampling [S]; partials [n, P, 4] u32 as sample_partial writes
//           them, or decode_layers, P = num_parts; seen [S, seen_words] u32, a bit a token; next_rows [S];
//           results [S, RESULTS, 2] u32 of (token, depth), a ring by position; S sequences
// Bindings  0 params uniform; 1 active_rows read; 2 logits read; 3 sampling read; 4 partials read; 5 seen write;
//           6 next_rows write; 7 results write
// Grid      (1, n, 1) workgroups; one per sampled row; WORKGROUP_SIZE threads stride over the parts, and over the
//           vocabulary where tokens are cut off
// Spec      WORKGROUP_SIZE 16..=1024; MAX_LISTED: 4 * MAX_LISTED bytes of workgroup memory; MIN_TEMPERATURE: greedy below;
//           RESULTS; SUBGROUP
// Limits    vocab_size <= 2^18; one row a sequence; penalty and temperature not NaN
// Numerics  penalty: l > 0 ? l / p : l * p. Order: penalty, temperature, top-k, top-p, min-p, draw. top-k keeps
//           l >= the k-th largest; top-p the fewest tokens whose mass, renormalised after top-k, is >= top_p; both keep
//           all ties at the border; min-p keeps p >= min_p * p_max; the most likely token always stays. Thresholds come
//           from radix selection over the bits of l, masses are integers (unit 2^-26 of p_max): no sum depends on an
//           order. Ties: lowest token; NaN never before a number, token 0 if all are NaN; infinities as +-3.4e38.
//           The noise depends on seed, position and token alone, so the draw neither on the batch nor on the place in it.
//           It is added to (l - l_max) / temperature. Without top-k and top-p the parts' winners alone are scored, each
//           having won relative to its part: this differs from scoring all by rounding alone.
// Source    penalty: Keskar et al. 2019 (arXiv 1909.05858); top-p: Holtzman et al. 2020 (arXiv 1904.09751); min-p: Nguyen
//           et al. 2024 (arXiv 2407.01082); Gumbel-max: Gumbel 1954; pcg4d: Jarzynski and Olano 2020 (JCGT 9.3)
#import shared/rows
#import shared/order_key
#import shared/pcg4d
#import shared/sampling
#import shared/best
#import shared/radix_select

struct Params {
    vocab_size: u32,
    logits_stride: u32,
    seen_words: u32,
    num_parts: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> active_rows: array<ActiveRow>;
@group(0) @binding(2) var<storage, read> logits: array<f32>;
@group(0) @binding(3) var<storage, read> sampling: array<Sampling>;
@group(0) @binding(4) var<storage, read> partials: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read_write> seen: array<u32>;
@group(0) @binding(6) var<storage, read_write> next_rows: array<Row>;
@group(0) @binding(7) var<storage, read_write> results: array<vec2<u32>>;

// The tokens in question: those of `listed` when num_listed is not NONE, else the vocabulary; of these, the ones with
// a key of at least `threshold`.
struct Candidates {
    threshold: u32,
    num_listed: u32,
}

var<workgroup> listed: array<u32, MAX_LISTED>;
var<workgroup> num_appended: atomic<u32>;
var<workgroup> broadcast: u32;

fn num_candidates(candidates: Candidates) -> u32 {
    return select(candidates.num_listed, params.vocab_size, candidates.num_listed == NONE);
}

fn candidate(candidates: Candidates, i: u32) -> u32 {
    if candidates.num_listed == NONE {
        return i;
    }
    return listed[i];
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
        broadcast = atomicLoad(&num_appended);
    }
    let appended = workgroupUniformLoad(&broadcast);
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

// Whether min-p keeps a token.
fn is_likely(source: Source, s: Sampling, key: u32) -> bool {
    return !(s.min_p > 0.0 && key != source.best_key && exp(log_ratio(source, key)) < s.min_p);
}

// The most likely token of row i, with its key.
fn most_likely(i: u32, thread: u32, lane: u32) -> vec2<u32> {
    var best = vec2<u32>(0u, NONE);
    for (var part = thread; part < params.num_parts; part += WORKGROUP_SIZE) {
        let partial = partials[i * params.num_parts + part];
        if partial.x > best.x || (partial.x == best.x && partial.y < best.y) {
            best = partial.xy;
        }
    }
    return workgroup_best(best, thread, lane);
}

// The winner of the tokens drawn from the parts of row i: the draw among all tokens.
fn draw_of_parts(source: Source, i: u32, s: Sampling, position: u32, thread: u32, lane: u32) -> u32 {
    var best = vec2<u32>(0u, NONE);
    for (var part = thread; part < params.num_parts; part += WORKGROUP_SIZE) {
        let drawn = partials[i * params.num_parts + part].zw;
        if drawn.x != 0u {
            let score = token_score(source, s, position, drawn.y, drawn.x);
            if score > best.x || (score == best.x && drawn.y < best.y) {
                best = vec2<u32>(score, drawn.y);
            }
        }
    }
    return workgroup_best(best, thread, lane).y;
}

fn draw(source: Source, candidates: Candidates, s: Sampling, position: u32, thread: u32, lane: u32) -> u32 {
    var best = vec2<u32>(0u, NONE);
    for (var i = thread; i < num_candidates(candidates); i += WORKGROUP_SIZE) {
        let token = candidate(candidates, i);
        let key = token_key(source, token);
        if key < candidates.threshold || !is_likely(source, s, key) {
            continue;
        }
        let score = token_score(source, s, position, token, key);
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
    let best = most_likely(workgroup.y, thread, lane);
    // A row of NaN alone has no key above 0.
    var token = select(best.y, 0u, best.x == 0u);
    if !is_greedy(s) && best.x != 0u {
        let source = relative_to(source_of(s, workgroup.y, entry.sequence), s, best.x);
        // Key 0 is NaN.
        var candidates = Candidates(1u, NONE);
        var is_drawn = false;
        if has_threshold(s) {
            if s.top_k > 0u && s.top_k < params.vocab_size {
                candidates = keep_top(source, candidates, s.top_k, 0.0, thread);
            }
            if s.top_p < 1.0 {
                candidates = keep_top(source, candidates, 0u, s.top_p, thread);
            }
        } else {
            token = draw_of_parts(source, workgroup.y, s, entry.position, thread, lane);
            // The winner among all tokens is the winner among those that min-p keeps, if it keeps it.
            is_drawn = is_likely(source, s, token_key(source, token));
        }
        if !is_drawn {
            token = draw(source, candidates, s, entry.position, thread, lane);
        }
    }
    if thread == 0u {
        finish(entry, s, token);
    }
}
