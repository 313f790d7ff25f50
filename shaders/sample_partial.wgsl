// sample_partial: the most likely token of every part of the vocabulary, and the one a draw from that part would take.
// Math      l = logits[i], by the repetition penalty of seen tokens; of the tokens of part p: best = argmax(l); drawn =
//           argmax(l / temperature + gumbel)
// Why       one workgroup alone waits for a whole vocabulary; many share it, and the winner of their winners is the row's
// Shapes    active_rows [n]; logits [n, logits_stride] f32; sampling [S]; seen [S, seen_words] u32, a bit a token;
//           partials [n, P, 4] u32 of (best key, best token, drawn key, drawn token), P = ceil(vocab_size / PART_SIZE);
//           S sequences
// Bindings  0 params uniform; 1 active_rows read; 2 logits read; 3 sampling read; 4 seen read; 5 partials write
// Grid      (P, n, 1) workgroups; workgroup (p, i) has the tokens [p, p + 1) * PART_SIZE of row i
// Spec      WORKGROUP_SIZE divides PART_SIZE; PART_SIZE; MIN_TEMPERATURE: greedy below; SUBGROUP
// Limits    penalty and temperature not NaN; workgroup memory 16 bytes
// Numerics  keys are order keys of l: NaN 0, infinities as +-3.4e38. best: ties to the lowest token; a part of NaN alone
//           is (0, NONE, 0, NONE). drawn: the noise is added to (l - l of best) / temperature, ties to the lowest token,
//           never NaN; (0, NONE) for greedy rows, and for those with top-k or top-p, whose tokens are not known yet.
//           Parts are the same for every batch, so the draw depends on seed, position and token alone.
// Source    Gumbel-max: Gumbel 1954; else as sample_token
#import shared/rows
#import shared/order_key
#import shared/pcg4d
#import shared/sampling
#import shared/best

struct Params {
    vocab_size: u32,
    logits_stride: u32,
    seen_words: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> active_rows: array<ActiveRow>;
@group(0) @binding(2) var<storage, read> logits: array<f32>;
@group(0) @binding(3) var<storage, read> sampling: array<Sampling>;
@group(0) @binding(4) var<storage, read> seen: array<u32>;
@group(0) @binding(5) var<storage, read_write> partials: array<vec4<u32>>;

const TOKENS: u32 = PART_SIZE / WORKGROUP_SIZE;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) num_workgroups: vec3<u32>,
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
    let source = source_of(s, workgroup.y, entry.sequence);
    let first = workgroup.x * PART_SIZE + thread;
    // Fetched together: a thread waits for memory once. Beyond the vocabulary as NaN.
    var keys: array<u32, TOKENS>;
    for (var i = 0u; i < TOKENS; i++) {
        keys[i] = 0u;
        if first + i * WORKGROUP_SIZE < params.vocab_size {
            keys[i] = token_key(source, first + i * WORKGROUP_SIZE);
        }
    }
    var best = vec2<u32>(0u, NONE);
    for (var i = 0u; i < TOKENS; i++) {
        // A thread's tokens ascend, so the first of equals stays.
        if keys[i] > best.x {
            best = vec2<u32>(keys[i], first + i * WORKGROUP_SIZE);
        }
    }
    best = workgroup_best(best, thread, lane);

    var drawn = vec2<u32>(0u, NONE);
    if !is_greedy(s) && !has_threshold(s) && best.x != 0u {
        let relative = relative_to(source, s, best.x);
        for (var i = 0u; i < TOKENS; i++) {
            if keys[i] != 0u {
                let token = first + i * WORKGROUP_SIZE;
                let score = token_score(relative, s, entry.position, token, keys[i]);
                if score > drawn.x {
                    drawn = vec2<u32>(score, token);
                }
            }
        }
        drawn = workgroup_best(drawn, thread, lane);
        // The score is relative to this part; the row's winner is found from the key.
        drawn.x = token_key(source, drawn.y);
    }
    if thread == 0u {
        partials[workgroup.y * num_workgroups.x + workgroup.x] = vec4<u32>(best, drawn);
    }
}
