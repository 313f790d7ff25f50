// decode_layers: decode steps of one row, each from a token to the next one, in one dispatch whose workgroups wait for each other.
// Math      hidden = embed_tokens[token]; a layer of steps[s], x its input stream: m = x + o(attention(qkv(norm(x))));
//           y = m + down(swiglu(gate_up(norm(m)))); y into its output stream, or hidden += gate * y at a block's end.
//           Before a block: EXPERT gates l = input_scale * dot(hidden, router[r]) and ends at l < threshold; TOKEN
//           chooses the depth at the first. logits = lm_head(norm(hidden)); partials as of sample_partial, of the tokens
//           whose logits are a workgroup's; of these sample_token draws, or, with params.num_tokens > 0, every workgroup
//           does, and goes on with the next row until it has drawn so many or the sequence ends
// Why       a layer is five phases of some microseconds; as dispatches each costs as much again to begin and to end.
//           Here the weights of the next phase are on their way while the last one's results are waited for, and an
//           early exit skips what is left. A dispatch takes 32 to 56 us to begin and to end: hence several tokens
// Shapes    active_rows [1], the row to draw for; steps [num_steps]; qkv_proj, o_proj, gate_up_proj, down_proj
//           [matrices, O, K], embed_tokens, lm_head [V, C] units of 16 bytes, or quantised rows; norms [N, C]; rope
//           [positions, D / 2, 2]; pages [sequences, groups, max_pages]; kv_lengths [sequences, groups]; rows [1]; depth
//           [1]; keys, values [slots of all caches, G, D] f32 or f16; logits [V], V up to the next even number; control
//           [4 + R]; sampling [S]; seen [S, seen_words]; partials [NUM_WORKGROUPS, 4]; router [R, C]; bias [R]; shares [R];
//           mail [hidden C; running C; layer C; middle C; q; k; v; attention H S D; statistics H S 2; mlp; partials
//           NUM_WORKGROUPS 4] of (bits, tag); results [sequences, RESULTS, 2], a ring by position of (token, depth)
// Bindings  0 params uniform; 1 steps uniform; 2 active_rows write; 3 qkv_proj read; 4 o_proj read; 5 gate_up_proj read;
//           6 down_proj read; 7 norms read; 8 rope read; 9 pages read; 10 kv_lengths write; 11 rows write; 12 depth
//           write; 13 keys write; 14 values write; 15 logits write; 16 mail write; 17 control write; 18 embed_tokens
//           read; 19 lm_head read; 20 sampling read; 21 seen read; 22 partials write; 23 router read [ROUTED]; 24 bias read
//           [BIAS]; 24 shares read [SCRIPTED]; 25 results write
// Grid      (NUM_WORKGROUPS, 1, 1), all of which must run at a time
// Spec      WORKGROUP_SIZE threads in teams of LANES; NUM_WORKGROUPS; MAX_STEPS of the table; MAX_GROUPS; HIDDEN_SIZE,
//           MLP_DIM, NUM_ATTENTION_HEADS, NUM_KEY_VALUE_HEADS, HEAD_DIM multiples of 8. Of the type of a layer's
//           matrices: LAYER_F16, LAYER_BF16, LAYER_QUANTISED (LAYER_Q8 or LAYER_Q4) or neither, LAYER_QUAD_ELEMS
//           elements of a unit, LAYER_UNIT_CODES eights of codes if it is quantised, LAYER_PREFETCH of the units on
//           their way before the activation is there; of the type of embed_tokens and lm_head alike HEAD_F16,
//           HEAD_BF16, HEAD_QUANTISED, HEAD_Q8, HEAD_Q4, HEAD_QUAD_ELEMS, HEAD_UNIT_CODES, HEAD_PREFETCH; groups of
//           GROUP. Of each of the four products: outputs QKV_ROWS, O_ROWS, GATE_UP_ROWS, DOWN_ROWS; units a row
//           QKV_QUADS, O_QUADS, GATE_UP_QUADS, DOWN_QUADS, and from row to row QKV_STRIDE, O_STRIDE, GATE_UP_STRIDE,
//           DOWN_STRIDE; teams a pair of outputs QKV_SPLIT, O_SPLIT, GATE_UP_SPLIT, DOWN_SPLIT; units a lane QKV_STEPS,
//           O_STEPS, GATE_UP_STEPS, DOWN_STEPS; pairs a team QKV_ROUNDS, O_ROUNDS, GATE_UP_ROUNDS, DOWN_ROUNDS, and of
//           them QKV_ABREAST, O_ABREAST, GATE_UP_ABREAST, DOWN_ABREAST at a time, for which QKV_TURN, O_TURN,
//           GATE_UP_TURN, DOWN_TURN units each are on their way; of the head HEAD_ROWS, HEAD_QUADS, HEAD_STRIDE,
//           HEAD_SPLIT = 1, HEAD_STEPS, HEAD_ROUNDS, HEAD_ABREAST, HEAD_TURN. KEY_LANES lanes a key, KEYS fetched at a time;
//           BATCH parts of attention that a thread waits for at a time; ALONE_KEYS up to which a workgroup has a head for
//           itself, SPLIT_KEYS of each of several, MAX_SPLITS of them at most; STAGED and NUM_TEAM_SUMS sizes of workgroup
//           memory; OWN_PAIRS pairs of columns of each of STREAMS streams, 3 with ROUTED, are a workgroup's own at most.
//           A thread stages OWN elements next to each other: 8 with DIGITS, which is if a type is quantised, or 1;
//           STREAM_TURNS times of a stream, and of other activations BATCH_TURNS times before it waits anew; STAGED_MERGED
//           where parts of attention are merged for it. MIN_TEMPERATURE: greedy below; SUBGROUP; ROUTED, by EXPERT (SIGMOID,
//           TANH or neither; SCRIPTED) or TOKEN (SOFTMAX or neither; BIAS), ROUTERS at a time; KV_F16; ROUTER_F16,
//           ROUTER_BF16 or neither; RESULTS
// Limits    needs subgroups and coherent storage; num_tokens > 0 where no top-k, top-p, min-p or penalty is asked for;
//           NUM_WORKGROUPS <= C / 2, MLP_DIM, so that each has a part in what all wait for; 16 * STAGED
//           + 8 * NUM_TEAM_SUMS + 8 * STREAMS * OWN_PAIRS + 4 * TEAMS + 12 * MAX_GROUPS + 48 bytes of workgroup memory,
//           with ROUTED 8 + 4 * ROUTERS * TEAMS more, with SCRIPTED 4 * MAX_GROUPS. A value that is polled
//           params.poll_limit times in vain ends the step: control[2] = 1, flags of its row = ROW_FAILED, K/V lengths as
//           before it
// Numerics  f32; partial sums by lanes, then teams; softmax with the maximum of all keys of a split. Quantised: the
//           activation is off by less than 2^-15 of the greatest of eight, whose products with codes are exact. partials:
//           as sample_partial, but of other parts, from which a draw may differ by rounding
// Source    MoR (arXiv 2507.10524); persistent threads: Gupta, Stuart and Owens 2012 (doi 10.1109/InPar.2012.6339596)
#import shared/rows
#import shared/gate
#import shared/mailbox
#import shared/lanes
#import shared/digits
#import shared/order_key
#import shared/pcg4d
#import shared/sampling
#import shared/best
#if SCRIPTED
#import shared/scripted_draw
#endif

struct Params {
    num_steps: u32,
    trial_rounds: u32,
    poll_limit: u32,
    num_groups: u32,
    max_pages: u32,
    unshared_group: u32,
    additive: u32,
    max_depth: u32,
    num_recursions: u32,
    vocab_size: u32,
    logits_stride: u32,
    seen_words: u32,
    coda: u32,
    base_depth: u32,
    final_norm: u32,
    seed_low: u32,
    seed_high: u32,
    eps: f32,
    attention_scale: f32,
    input_scale: f32,
    alpha: f32,
    threshold: f32,
    depth_bias: f32,
    num_tokens: u32,
}

// A layer. Mirrors LayerStep of mor-kernels/src/ops/decode_layers.rs.
struct LayerStep {
    // Places in the four stacks of matrices, and of the norms.
    qkv_proj: u32,
    o_proj: u32,
    gate_up_proj: u32,
    down_proj: u32,
    norms: u32,
    // First slot of its caches.
    first_slot: u32,
    // Streams: 0 hidden, 1 running, 2 layer; the first alone without ROUTED. The output is not looked at where a block ends.
    input: u32,
    output: u32,
    // Recursion that it belongs to, or NONE.
    recursion: u32,
    // BLOCK_BEGIN, BLOCK_END, ALWAYS.
    flags: u32,
    // K/V group of its caches.
    group: u32,
    reserved: u32,
}

const BLOCK_BEGIN: u32 = 1u;
const BLOCK_END: u32 = 2u;
const ALWAYS: u32 = 4u;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<uniform> steps: array<LayerStep, MAX_STEPS>;
@group(0) @binding(2) var<storage, read_write> active_rows: array<ActiveRow>;
@group(0) @binding(3) var<storage, read> qkv_proj: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> o_proj: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> gate_up_proj: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> down_proj: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read> norms: array<NormUnit>;
@group(0) @binding(8) var<storage, read> rope: array<vec2<f32>>;
@group(0) @binding(9) var<storage, read> pages: array<u32>;
@group(0) @binding(10) var<storage, read_write> kv_lengths: array<u32>;
@group(0) @binding(11) var<storage, read_write> rows: array<Row>;
@group(0) @binding(12) var<storage, read_write> depth: array<u32>;
@group(0) @binding(13) var<storage, read_write> keys: array<vec4<u32>>;
@group(0) @binding(14) var<storage, read_write> values: array<vec4<u32>>;
@group(0) @binding(15) var<storage, read_write> logits: array<f32>;
// What one workgroup writes and another reads must not be read from a cache of its own.
@group(0) @binding(16) @coherent var<storage, read_write> mail: array<vec2<u32>>;
// The last tag that is taken, workgroups that have left, whether one has waited in vain, unused; rows that took each recursion.
@group(0) @binding(17) var<storage, read_write> control: array<atomic<u32>>;
@group(0) @binding(18) var<storage, read> embed_tokens: array<vec4<u32>>;
@group(0) @binding(19) var<storage, read> lm_head: array<vec4<u32>>;
@group(0) @binding(20) var<storage, read> sampling: array<Sampling>;
@group(0) @binding(21) var<storage, read> seen: array<u32>;
@group(0) @binding(22) var<storage, read_write> partials: array<vec4<u32>>;
@group(0) @binding(25) var<storage, read_write> results: array<vec2<u32>>;
#if ROUTED
@group(0) @binding(23) var<storage, read> router: array<RouterUnit>;
#endif
#if BIAS
@group(0) @binding(24) var<storage, read> bias: array<f32>;
#endif
#if SCRIPTED
@group(0) @binding(24) var<storage, read> shares: array<f32>;
#endif

// The products: those of a layer, QKV, O, GATE_UP and DOWN, of the type LAYER, and that of the HEAD, of a type of its own. Type
// and shape of the head are those of the table EMBED too.
const EMBED_ROWS: u32 = HEAD_ROWS;
const EMBED_QUADS: u32 = HEAD_QUADS;
const EMBED_STRIDE: u32 = HEAD_STRIDE;

const LOWEST: f32 = -3.4028234e38;
const TEAMS: u32 = WORKGROUP_SIZE / LANES;
const HEAD_UNITS: u32 = HEAD_DIM / 8u;
const Q_DIM: u32 = NUM_ATTENTION_HEADS * HEAD_DIM;
const KV_DIM: u32 = NUM_KEY_VALUE_HEADS * HEAD_DIM;
const SLICES: u32 = WORKGROUP_SIZE / KEY_LANES;
const KEY_LANES_LOG2: u32 = firstTrailingBit(KEY_LANES);

// A tag from which on they are counted anew.
const FEW_TAGS_LEFT: u32 = 0x80000000u;

// Places in `mail`.
const RUNNING: u32 = HIDDEN_SIZE;
const LAYER: u32 = 2u * HIDDEN_SIZE;
const MIDDLE: u32 = 3u * HIDDEN_SIZE;
const QUERY: u32 = 4u * HIDDEN_SIZE;
const NEW_KEY: u32 = QUERY + Q_DIM;
const NEW_VALUE: u32 = NEW_KEY + KV_DIM;
const ATTENTION: u32 = NEW_VALUE + KV_DIM;
const STATISTICS: u32 = ATTENTION + MAX_SPLITS * Q_DIM;
const MLP: u32 = STATISTICS + 2u * MAX_SPLITS * NUM_ATTENTION_HEADS;
const PARTIALS: u32 = MLP + MLP_DIM;
const MAIL: u32 = PARTIALS + 4u * NUM_WORKGROUPS;

#if KV_F16
// vec4s of 8 elements of a head.
const KV_QUADS: u32 = 1u;
struct KvUnit {
    packed: vec4<u32>,
}
#else
const KV_QUADS: u32 = 2u;
struct KvUnit {
    low: vec4<u32>,
    high: vec4<u32>,
}
#endif

#for T in LAYER HEAD
#if $T_Q8
#import shared/q8
const $T_PARAMETERS: u32 = Q8_PARAMETERS;
#elif $T_Q4
#import shared/q4
const $T_PARAMETERS: u32 = Q4_PARAMETERS;
#endif
// What is fetched of a row at a time.
struct Unit_$T {
    codes: vec4<u32>,
#if $T_QUANTISED
    // The u32 with those of the codes' group.
    parameters: u32,
#endif
}
#endfor

// The OWN elements of a norm's weight that a thread stages next to each other: one load, since eight keep units busy that others
// wait for.
#if DIGITS
alias NormUnit = mat2x4<f32>;
#else
alias NormUnit = f32;
#endif

#if ROUTED
#if ROUTER_F16
alias RouterUnit = u32;
fn router_weight(at: u32) -> f32 {
    return unpack2x16float(router[at / 2u])[at % 2u];
}
#elif ROUTER_BF16
alias RouterUnit = u32;
fn router_weight(at: u32) -> f32 {
    return bitcast<f32>(router[at / 2u] >> (at % 2u * 16u) << 16u);
}
#else
alias RouterUnit = f32;
fn router_weight(at: u32) -> f32 {
    return router[at];
}
#endif
#endif

// The activation of a product, as [vec4s of a unit, units]: neighbouring lanes read neighbouring vec4s. In attention query, own key
// and own value, and behind them partial sums as [TEAMS, HEAD_DIM / 4].
var<workgroup> staged: array<vec4<f32>, STAGED>;
var<workgroup> team_sums: array<vec2<f32>, NUM_TEAM_SUMS>;
var<workgroup> team_values: array<f32, TEAMS>;
// Of each stream the workgroup's own pairs of columns, each for the thread that finishes it: few threads do, and each has registers
// for other things.
var<workgroup> own_streams: array<vec2<f32>, STREAMS * OWN_PAIRS>;
#if ROUTED
// Parts of the routers' products, as [ROUTERS, TEAMS].
var<workgroup> team_routers: array<f32, ROUTERS * TEAMS>;
var<workgroup> routed: vec2<f32>;
#if SCRIPTED
// 1 where the script has the row take a recursion, else -1.
var<workgroup> script: array<f32, MAX_GROUPS>;
#endif
var<private> router_sums: array<f32, ROUTERS>;
#endif

var<private> own_workgroup: u32;
var<private> thread: u32;
// Of the dispatch, and of what is posted next.
var<private> first_tag: u32;
var<private> tag: u32;
var<private> team: u32;
var<private> lane: u32;
// What all threads know alike is in workgroup memory, because registers are few: they hold the weights on their way.
struct KvPlace {
    slot: u32,
    len: u32,
    table: u32,
}
// Of the row in the caches of each group.
var<workgroup> kv_places: array<KvPlace, MAX_GROUPS>;
var<private> kv_group: u32;
// The row of the step.
var<workgroup> own_row: Row;
// Recursions that its depth counts, and blocks that it ran; steps that are complete.
var<workgroup> taken: u32;
var<workgroup> blocks: u32;
var<workgroup> num_complete: u32;

#import decode_layers/products

#import decode_layers/mail

#import decode_layers/attention

#import decode_layers/routing

// Where the row's keys and values of a group are, behind those of `slot` others.
fn kv_place(group: u32, slot: u32) -> KvPlace {
    let first_page = (own_row.sequence * params.num_groups + group) * params.max_pages;
    return KvPlace(pages[first_page + slot / PAGE_SIZE] * PAGE_SIZE + slot % PAGE_SIZE, slot + 1u, first_page);
}

// Elements `column` and `column + 1` of a token's embedding.
fn embedded(token: u32, column: u32) -> vec2<f32> {
    let unit = fetch_EMBED(0u, token, column / HEAD_QUAD_ELEMS);
    let within = column % HEAD_QUAD_ELEMS;
#if HEAD_F16
    return unpack2x16float(unit.codes[within / 2u]);
#elif HEAD_BF16
    let word = unit.codes[within / 2u];
    return bitcast<vec2<f32>>(vec2<u32>(word << 16u, word & 0xffff0000u));
#elif HEAD_QUANTISED
    let eight = within / 8u;
#if HEAD_Q8
    let codes = q8_values(vec2<u32>(unit.codes[2u * eight], unit.codes[2u * eight + 1u]));
    let parameters = vec2<f32>(q8_scale(unit.parameters, column / GROUP), 0.0);
#else
    let codes = q4_values(unit.codes[eight]);
    let parameters = q4_scale_offset(unit.parameters);
#endif
    let four = codes[within / 4u % 2u];
    return vec2<f32>(four[within % 4u], four[within % 4u + 1u]) * parameters.x + parameters.y;
#else
    return bitcast<vec2<f32>>(vec2<u32>(unit.codes[within], unit.codes[within + 1u]));
#endif
}

#import decode_layers/draw

// Steps from the row on, each from the token to its logits; false if results do not come.
fn run_layers() -> bool {
    let pair = pair_number(thread);
#if ROUTED
    var layer_tag = 0u;
#endif
#if TOKEN
    var running_tag = 0u;
#endif
    var ahead: array<Unit_LAYER, 2u * LAYER_PREFETCH>;
    var ahead_norm: array<f32, STREAM_TURNS * OWN>;
    var ahead_keys: array<KvUnit, KEYS>;
    var ahead_values: array<KvUnit, KEYS>;
    var num_turns = max(params.num_tokens, 1u);
    for (var turn = 0u; turn < num_turns; turn++) {
        if thread == 0u {
            taken = 0u;
            blocks = 0u;
        }
        if has_pair_DOWN() {
            let embedding = embedded(own_row.token, 2u * pair);
            own_streams[thread] = embedding;
            post_stream(0u, 2u * pair, embedding);
        }
        // All at once, for each is loads that wait for each other.
        for (var group = thread; group < params.num_groups; group += WORKGROUP_SIZE) {
            if turn == 0u {
                kv_places[group] = kv_place(group, kv_lengths[own_row.sequence * params.num_groups + group]);
            } else {
                kv_places[group] = kv_place(group, kv_places[group].len - 1u);
            }
        }
#if SCRIPTED
        // As in router_expert.
        for (var r = thread; r < min(params.num_recursions, MAX_GROUPS); r += WORKGROUP_SIZE) {
            let draw = scripted_draw(params.seed_low, params.seed_high, own_row.sequence, own_row.position);
            script[r] = select(-1.0, 1.0, draw < shares[r]);
        }
#endif
        // Nobody waits for a thread of its own workgroup: it might not run meanwhile.
        workgroupBarrier();
        var hidden_tag = tag;
        // The step whose first norm is on its way.
        var sent_for = NONE;
        for (var s = 0u; s < params.num_steps; s++) {
            let begins = (steps[s].flags & BLOCK_BEGIN) != 0u;
#if TOKEN
            if begins && steps[s].recursion > 0u && workgroupUniformLoad(&routed).x <= f32(steps[s].recursion) {
                // The rest of the shared block is left out.
                s = params.coda - 1u;
                continue;
            }
#endif
            // At most one turn, here and below, which keeps compilers from moving loads to where their results are used.
            for (var coming = s; coming < params.num_steps; coming += params.num_steps) {
                prefetch_QKV(steps[coming].qkv_proj, &ahead);
            }
            // That of the first step, and that after an exit.
            for (var coming = s; coming != sent_for; coming = sent_for) {
                prefetch_norm(2u * steps[coming].norms * HIDDEN_SIZE, &ahead_norm);
            }
            kv_group = steps[s].group;
            prefetch_kv(steps[s].first_slot, &ahead_keys, &ahead_values);

            // Queries, keys and values.
            let column = 2u * pair;
            var angle = vec2<f32>();
            if has_pair_QKV() && column < Q_DIM + KV_DIM {
                angle = rope[own_row.position * (HEAD_DIM / 2u) + column % HEAD_DIM / 2u];
            }
            var input_tag = hidden_tag;
            var router_at = NONE;
#if ROUTED
            if steps[s].input == 2u {
                input_tag = layer_tag;
            }
#endif
#if EXPERT
            if begins {
                router_at = steps[s].recursion * HIDDEN_SIZE;
            }
#endif
#if TOKEN
            if steps[s].input == 1u {
                input_tag = running_tag;
            }
            if begins && steps[s].recursion == 0u {
                router_at = 0u;
            }
#endif
            if !stage_stream_QKV(steps[s].input * HIDDEN_SIZE, input_tag, &ahead_norm, router_at) {
                return false;
            }
            if begins {
                var passes = 1u;
#if EXPERT
                if route(steps[s].recursion).x < params.threshold && (steps[s].flags & ALWAYS) == 0u {
                    // The rest of the shared block is left out.
                    s = params.coda - 1u;
                    continue;
                }
#elif TOKEN
                if steps[s].recursion == 0u {
                    passes = u32(route().x);
                } else {
                    passes = 0u;
                }
#endif
                if thread == 0u {
                    taken += passes;
                    blocks += 1u;
                }
            }
            let qkv_factor = norm_factor();
            multiply_QKV(steps[s].qkv_proj, &ahead);
            for (var coming = s; coming < params.num_steps; coming += params.num_steps) {
                prefetch_norm((2u * steps[coming].norms + 1u) * HIDDEN_SIZE, &ahead_norm);
            }
            workgroupBarrier();
            tag += 1u;
            if has_pair_QKV() {
                let v = product_QKV(thread) * qkv_factor;
                let rotated = vec2<f32>(v.x * angle.x - v.y * angle.y, v.y * angle.x + v.x * angle.y);
                if column < Q_DIM {
                    post_pair(QUERY + column, rotated);
                } else if column < Q_DIM + KV_DIM {
                    post_pair(NEW_KEY + column - Q_DIM, rotated);
                    store_kv(true, steps[s].first_slot, column - Q_DIM, rotated);
                } else {
                    post_pair(NEW_VALUE + column - Q_DIM - KV_DIM, v);
                    store_kv(false, steps[s].first_slot, column - Q_DIM - KV_DIM, v);
                }
            }

            workgroupBarrier();
            for (var coming = s; coming < params.num_steps; coming += params.num_steps) {
                prefetch_O(steps[coming].o_proj, &ahead);
            }
            if !attend(steps[s].first_slot, &ahead_keys, &ahead_values) {
                return false;
            }
            tag += 1u;

            if !stage_attention() {
                return false;
            }
            multiply_O(steps[s].o_proj, &ahead);
            workgroupBarrier();
            tag += 1u;
            var own_middle = vec2<f32>();
            if has_pair_O() {
                own_middle = own_streams[steps[s].input * OWN_PAIRS + thread] + product_O(thread);
                post_stream(MIDDLE, column, own_middle);
            }

            workgroupBarrier();
            for (var coming = s; coming < params.num_steps; coming += params.num_steps) {
                prefetch_GATE_UP(steps[coming].gate_up_proj, &ahead);
            }
            if !stage_stream_GATE_UP(MIDDLE, tag, &ahead_norm, NONE) {
                return false;
            }
            let mlp_factor = norm_factor();
            multiply_GATE_UP(steps[s].gate_up_proj, &ahead);
            sent_for = s + 1u;
#if TOKEN
            // What is not yet the last recursion's goes on.
            let goes_on = routed.x != f32(steps[s].recursion + 1u);
            if (steps[s].flags & BLOCK_END) != 0u && !goes_on {
                sent_for = params.coda;
            }
#endif
            for (var coming = sent_for; coming < params.num_steps; coming += params.num_steps) {
                prefetch_norm(2u * steps[coming].norms * HIDDEN_SIZE, &ahead_norm);
            }
            workgroupBarrier();
            tag += 1u;
            if has_pair_GATE_UP() {
                let v = product_GATE_UP(thread) * mlp_factor;
                post(MLP + place(pair, MLP_DIM), v.x / (1.0 + exp(-v.x)) * v.y, tag);
            }

            workgroupBarrier();
            for (var coming = s; coming < params.num_steps; coming += params.num_steps) {
                prefetch_DOWN(steps[coming].down_proj, &ahead);
            }
            if !stage_mail_DOWN(MLP, MLP_DIM) {
                return false;
            }
            multiply_DOWN(steps[s].down_proj, &ahead);
            workgroupBarrier();
            tag += 1u;
            var y = vec2<f32>();
            if has_pair_DOWN() {
                y = own_middle + product_DOWN(thread);
            }
            var output = 0u;
#if ROUTED
            output = steps[s].output;
            if (steps[s].flags & BLOCK_END) != 0u {
                output = 0u;
#if TOKEN
                output = u32(goes_on);
#endif
                if output == 0u && has_pair_DOWN() {
                    y = own_streams[thread] + select(routed.y, 1.0, params.additive != 0u) * y;
                }
            }
            if output == 2u {
                layer_tag = tag;
            }
#endif
#if TOKEN
            if output == 1u {
                running_tag = tag;
            }
#endif
            if output == 0u {
                hidden_tag = tag;
            }
            if has_pair_DOWN() {
                own_streams[output * OWN_PAIRS + thread] = y;
                post_stream(output * HIDDEN_SIZE, column, y);
            }
            workgroupBarrier();
        }
        if (own_row.flags & ROW_SAMPLE) == 0u {
            complete_step();
            return true;
        }
        var ahead_head: array<Unit_HEAD, 2u * HEAD_PREFETCH>;
        prefetch_HEAD(0u, &ahead_head);
        prefetch_norm(params.final_norm * HIDDEN_SIZE, &ahead_norm);
        if !stage_stream_HEAD(0u, hidden_tag, &ahead_norm, NONE) {
            return false;
        }
        let factor = norm_factor();
        for (var round = 0u; round < HEAD_ROUNDS; round += HEAD_ABREAST) {
            let products = multiply_rounds_HEAD(0u, round, &ahead_head);
            for (var i = 0u; i < HEAD_ABREAST; i++) {
                let row = first_row_HEAD(round + i);
                if lane < 2u && row < HEAD_ROWS {
                    logits[row + lane] = products[i] * factor;
                }
            }
        }
        // Whoever sees the partials may read logits, keys and values too.
        storageBarrier();
        let sampled = sampling[own_row.sequence];
        let token = draw(sampled);
        if !all_is_there() {
            return false;
        }
        if params.num_tokens > 0u && thread == 0u {
            // All write the same: who leaves last says how far the sequence is, and any other may have given up before.
            let at = own_row.sequence * RESULTS + own_row.position % RESULTS;
            results[at] = vec2<u32>(token, params.base_depth + taken);
            // As in sample_token.
            let is_end = any(sampled.eos == vec4<u32>(token)) || own_row.position + 2u >= sampled.limit;
            let flags = select(ROW_ACTIVE | ROW_SAMPLE, 0u, is_end);
            own_row = Row(token, own_row.position + 1u, own_row.sequence, flags);
        }
        complete_step();
        // What others have stored by now is read from here on.
        storageBarrier();
        if workgroupUniformLoad(&own_row).flags == 0u {
            num_turns = turn;
        }
        tag += 1u;
    }
    return true;
}

#import decode_layers/dispatch

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) workgroup_id: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_width: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
    own_workgroup = workgroup_id.x;
    lane = subgroup_lane % LANES;
    team = subgroup * (subgroup_width / LANES) + subgroup_lane / LANES;
    thread = team * LANES + lane;
    // Places that nobody has written have tag 0.
    first_tag = atomicLoad(&control[0]) + 1u;
    tag = first_tag;
    if thread == 0u {
        has_failed = atomicLoad(&control[2]);
        own_row = rows[0];
        num_complete = 0u;
    }
    if all_is_there() {
        if params.trial_rounds > 0u {
            try_rounds();
        } else if (own_row.flags & ROW_ACTIVE) != 0u {
            run_layers();
        }
    }
    // Its threads have counted what is complete.
    workgroupBarrier();
    if thread == 0u && atomicAdd(&control[1], 1u) == NUM_WORKGROUPS - 1u {
        conclude();
    }
}
