// attention_prefill: attention of many rows, tile by tile of rows and keys.
// Math      out[i, h] = sum_k softmax_k(scale * q[i, h] . key_k[g]) * value_k[g], k = 0..kv_len of row i, g = h / GROUP_SIZE
// Why       BLOCK_Q rows share every key they read; scores never leave the workgroup. COOPERATIVE: matrix units multiply,
//           16 rows a subgroup. Nobody can scale rows of a matrix in their registers, so weights refer to the highest score
//           of a row's first keys; should a later one be too far above it, all keys are gone through again. Small tiles let
//           a processor have 16 subgroups at a time; the longest rows take as long as their tiles one after the other, so
//           KEY_SLICES parts of a workgroup take turns at them
// Shapes    active_rows [n], whose last entry holds n; q [n, H, D] f32; keys, values [slots, G, D] f32, f16 or blocks; kv_table u32;
//           out [n, H, D] f32, or f16 (OUT_F16); row-major, D a multiple of 8
// Bindings  0 params uniform; 1 active_rows read; 2 q read; 3 keys read; 4 values read; 5 kv_table read; 6 out write
// Grid      (H, ceil(n / BLOCK_Q), 1) workgroups; a thread has 4 rows, and of each tile 4 keys, then every
//           COLUMNS-th unit of 8 elements; COOPERATIVE: SUBGROUP_WIDTH / 16 lanes of a slice have a row, at most 4
// Spec      COLUMNS power of two; BLOCK_Q rows and BLOCK_K = 4 * COLUMNS keys a tile; WORKGROUP_SIZE = BLOCK_Q / 4 * COLUMNS;
//           CHUNK_UNITS units of a head are staged at a time, NUM_CHUNKS times (ONE_CHUNK: once);
//           NUM_ATTENTION_HEADS = H, NUM_KEY_VALUE_HEADS = G, GROUP_SIZE = H / G, HEAD_UNITS = D / 8; KV_F16 or KV_BLOCKS; KV_SLOTS:
//           kv_table lists keys, not pages; SUBGROUP: COLUMNS lanes exchange by subgroup operations; COOPERATIVE, with either:
//           BLOCK_K 16, FRAGMENTS_D * 16 = D, WORKGROUP_SIZE = KEY_SLICES * BLOCK_Q / 16 * SUBGROUP_WIDTH,
//           SLICED if KEY_SLICES > 1; OUT_F16, of COOPERATIVE: for a `linear` that multiplies halves; workgroup memory: see
//           workgroup_storage_bytes of the wrapper
// Limits    D <= 256, COOPERATIVE: a multiple of 16; rows with one kv_table lie together and ascend in kv_len;
//           BLOCK_Q < ROW_PADDING
// Numerics  f32 throughout; running maximum per row. COOPERATIVE: scaled queries and weights are rounded to f16, exact
//           products, sums in f32 in the matrix unit's order, of each slice and then of all; a weight is at most 2^LAG,
//           and those of keys 2^(25 - BELOW) times lighter than a row's heaviest first key count in the sum of weights alone
// Source    Dao 2023, FlashAttention-2 (arXiv 2307.08691)
#if COOPERATIVE
enable f16;
enable wgpu_cooperative_matrix;
#endif
#import shared/rows
#import shared/kv

struct Params {
    scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> active_rows: array<ActiveRow>;
@group(0) @binding(2) var<storage, read> q: array<mat2x4<f32>>;
@group(0) @binding(3) var<storage, read> keys: array<KvUnit>;
@group(0) @binding(4) var<storage, read> values: array<KvUnit>;
@group(0) @binding(5) var<storage, read> kv_table: array<u32>;
#if OUT_F16
@group(0) @binding(6) var<storage, read_write> out: array<vec4<f16>>;
#elif COOPERATIVE
@group(0) @binding(6) var<storage, read_write> out: array<vec4<f32>>;
#else
@group(0) @binding(6) var<storage, read_write> out: array<mat2x4<f32>>;
#endif

const LOWEST: f32 = -3.4028234e38;

#if COOPERATIVE
// Lanes that share a row.
const ROW_LANES: u32 = SUBGROUP_WIDTH / 16u;
const ROW_LANES_LOG2: u32 = firstTrailingBit(ROW_LANES);
// Quads of a row of a fragment that a lane has.
const QUADS: u32 = 4u / ROW_LANES;
// Of tiles of keys and values, and of fragments: 16 or 32 bytes of padding a row spread the rows that lanes read at once over
// all banks.
const KV_STRIDE: u32 = 2u * HEAD_UNITS + 2u;
const STRIDE: u32 = 4u + 2u;
const KV_UNITS: u32 = BLOCK_K * HEAD_UNITS;
// Subgroups and threads of a slice.
const SLICE_SUBGROUPS: u32 = BLOCK_Q / 16u;
const SLICE: u32 = SLICE_SUBGROUPS * SUBGROUP_WIDTH;
const KV_STEPS: u32 = (KV_UNITS + SLICE - 1u) / SLICE;
// Keys that all slices go through at a time.
const TURN_KEYS: u32 = KEY_SLICES * BLOCK_K;
// Units of a fragment of queries that a lane stages.
const QUERY_STEPS: u32 = (32u + SUBGROUP_WIDTH - 1u) / SUBGROUP_WIDTH;
// Scores are powers of 2. The first keys have weights of at most 2^-BELOW, later ones up to 2^LAG, which halves hold as
// precisely: they may be 2^(BELOW + LAG) times as heavy.
const BELOW: f32 = 6.0;
const LAG: f32 = 15.0;
const LOG2_E: f32 = 1.442695;

const K_TILE: u32 = max(BLOCK_K * KV_STRIDE, BLOCK_Q * STRIDE);
const V_TILE: u32 = BLOCK_K * KV_STRIDE;

// Of each slice the keys and, when all have read those, a fragment of weights of each subgroup; before, of its queries.
var<workgroup> k_tile: array<vec4<f16>, KEY_SLICES * K_TILE>;
var<workgroup> v_tile: array<vec4<f16>, KEY_SLICES * V_TILE>;
// A fragment of each subgroup: of scores, of results on their way.
var<workgroup> s_tile: array<vec4<f32>, KEY_SLICES * BLOCK_Q * STRIDE>;

struct Ahead {
    keys: array<KvUnit, KV_STEPS>,
    values: array<KvUnit, KV_STEPS>,
}

// Unit of a tile that is thread `thread`'s of a slice.
fn own_unit(thread: u32, step: u32) -> u32 {
    return min(thread + step * SLICE, KV_UNITS - 1u);
}

// Slots of those of the tile at `tile`; keys past the end repeat the last one and get no weight.
fn tile_slots(table: u32, tile: u32, run_len: u32, thread: u32) -> array<u32, KV_STEPS> {
    var slots: array<u32, KV_STEPS>;
    for (var step = 0u; step < KV_STEPS; step++) {
        slots[step] = kv_slot(table, min(tile + own_unit(thread, step) / HEAD_UNITS, run_len - 1u));
    }
    return slots;
}

// What lies there.
fn load_tile(slots: array<u32, KV_STEPS>, kv_head: u32, thread: u32) -> Ahead {
    var from_slots = slots;
    var ahead: Ahead;
    for (var step = 0u; step < KV_STEPS; step++) {
        let at = (from_slots[step] * NUM_KEY_VALUE_HEADS + kv_head) * HEAD_UNITS + own_unit(thread, step) % HEAD_UNITS;
        ahead.keys[step] = keys[at];
        ahead.values[step] = values[at];
    }
    return ahead;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let head = workgroup.x;
    let kv_head = head / GROUP_SIZE;
    // The last rows have the most keys: they begin first, and short ones fill the gaps at the end.
    let num_active = active_rows[arrayLength(&active_rows) - 1u].row;
    let num_blocks = (num_active + BLOCK_Q - 1u) / BLOCK_Q;
    if workgroup.y >= num_blocks {
        return;
    }
    let first_row = (num_blocks - 1u - workgroup.y) * BLOCK_Q;
    let num_rows = min(BLOCK_Q, num_active - first_row);
#if SLICED
    let slice = subgroup / SLICE_SUBGROUPS;
#else
    let slice = 0u;
#endif
    let in_slice = subgroup % SLICE_SUBGROUPS * SUBGROUP_WIDTH + lane;
    let k_from = slice * K_TILE;
    let v_from = slice * V_TILE;
    let first_own = subgroup % SLICE_SUBGROUPS * 16u;
    let own_row = first_own + lane / ROW_LANES;
    let own_lane = lane % ROW_LANES;
    let s_from = (slice * BLOCK_Q + first_own) * STRIDE;
    let s_own = (slice * BLOCK_Q + own_row) * STRIDE;
    let p_from = k_from + first_own * STRIDE;
    let p_own = k_from + own_row * STRIDE;

    // Rows that are the last of their sequences, a bit each. Entries past the end name the first table, which a row before them
    // may have, too.
    var ends = vec2<u32>();
    for (var i = 0u; i < BLOCK_Q; i += SUBGROUP_WIDTH) {
        let row = first_row + i + lane;
        let is_end = subgroupBallot(active_rows[row].kv_table != active_rows[row + 1u].kv_table).xy;
        if SUBGROUP_WIDTH > 32u {
            ends = is_end;
        } else {
            ends[i / 32u] |= is_end.x << (i % 32u);
        }
    }
    var loaded: array<mat2x4<f32>, FRAGMENTS_D * QUERY_STEPS>;
    for (var i = 0u; i < FRAGMENTS_D * QUERY_STEPS; i++) {
        let unit = lane + i % QUERY_STEPS * SUBGROUP_WIDTH;
        let row = first_own + unit / 2u;
        if unit < 32u && row < num_rows {
            let at = ((first_row + row) * NUM_ATTENTION_HEADS + head) * HEAD_UNITS;
            loaded[i] = q[at + i / QUERY_STEPS * 2u + unit % 2u];
        }
    }
    var queries: array<coop_mat16x16<f16, A>, FRAGMENTS_D>;
    var sums: array<coop_mat16x16<f32, C>, FRAGMENTS_D>;
#repeat d FRAGMENTS_D
    for (var step = 0u; step < QUERY_STEPS; step++) {
        let unit = lane + step * SUBGROUP_WIDTH;
        if unit < 32u {
            let to = p_from + unit / 2u * STRIDE + unit % 2u * 2u;
            // Scores are powers of 2.
            let query = loaded[d * QUERY_STEPS + step] * (params.scale * LOG2_E);
            k_tile[to] = vec4<f16>(query[0]);
            k_tile[to + 1u] = vec4<f16>(query[1]);
        }
    }
    subgroupBarrier();
    queries[d] = coopLoadT<coop_mat16x16<f16, A>>(&k_tile[p_from], STRIDE);
    subgroupBarrier();
#endrepeat
    workgroupBarrier();
    // What the weights of the own row refer to, their sum over the lane's keys, and the highest score of these.
    var reference = LOWEST;
    var mass = 0.0;
    var highest = LOWEST;

    // A second time if the first keys have misled a row.
    for (var turn = 0u; turn < 2u; turn++) {
        mass = 0.0;
        highest = LOWEST;
#repeat d FRAGMENTS_D
        sums[d] = coop_mat16x16<f32, C>();
#endrepeat
        // Rows of one sequence after the other: each run has its own keys, and no weight for the other rows.
        var ends_left = ends;
        for (var run = 0u; run < num_rows;) {
            let table = active_rows[first_row + run].kv_table;
            var run_end = num_rows;
            if ends_left.x != 0u {
                run_end = firstTrailingBit(ends_left.x) + 1u;
                ends_left.x &= ends_left.x - 1u;
            } else if ends_left.y != 0u {
                run_end = firstTrailingBit(ends_left.y) + 33u;
                ends_left.y &= ends_left.y - 1u;
            }
            let run_len = active_rows[first_row + run_end - 1u].kv_len;
            var limit = 0u;
            if own_row >= run && own_row < run_end {
                limit = active_rows[first_row + own_row].kv_len;
            }
            run = run_end;

            var ahead = load_tile(tile_slots(table, slice * BLOCK_K, run_len, in_slice), kv_head, in_slice);
            // Nobody waits for the slots of the next tile: they are there before it is loaded.
            var slots = tile_slots(table, slice * BLOCK_K + TURN_KEYS, run_len, in_slice);
            for (var first_tile = 0u; first_tile < run_len; first_tile += TURN_KEYS) {
                // Past the end for some slices, whose keys then have no weight.
                let tile = first_tile + slice * BLOCK_K;
                for (var step = 0u; step < KV_STEPS; step++) {
                    let i = in_slice + step * SLICE;
                    if KV_UNITS % SLICE == 0u || i < KV_UNITS {
                        let to = i / HEAD_UNITS * KV_STRIDE + 2u * (i % HEAD_UNITS);
                        let key = unpack_kv(ahead.keys[step]);
                        k_tile[k_from + to] = vec4<f16>(key[0]);
                        k_tile[k_from + to + 1u] = vec4<f16>(key[1]);
                        let value = unpack_kv(ahead.values[step]);
                        v_tile[v_from + to] = vec4<f16>(value[0]);
                        v_tile[v_from + to + 1u] = vec4<f16>(value[1]);
                    }
                }
                workgroupBarrier();
                if first_tile + TURN_KEYS < run_len {
                    ahead = load_tile(slots, kv_head, in_slice);
                    slots = tile_slots(table, tile + 2u * TURN_KEYS, run_len, in_slice);
                }

                var products = coop_mat16x16<f32, C>();
#repeat d FRAGMENTS_D
                let start = k_from + d * 4u;
                let b = coopLoad<coop_mat16x16<f16, B>>(&k_tile[start], KV_STRIDE);
                products = coopMultiplyAdd(queries[d], b, products);
#endrepeat
                coopStoreT(products, &s_tile[s_from], STRIDE);
                // Weights take the place of the keys.
                workgroupBarrier();
                var scores: array<vec4<f32>, QUADS>;
                // Keys of the own row from the lane's first on. Its others lie distances on that compilers know.
                let left = i32(limit) - i32(tile + 4u * own_lane);
                for (var i = 0u; i < QUADS; i++) {
                    let key = vec4<i32>(i32(4u * i * ROW_LANES)) + vec4<i32>(0, 1, 2, 3);
                    scores[i] = select(vec4<f32>(LOWEST), s_tile[s_own + i * ROW_LANES + own_lane], key < vec4<i32>(left));
                    let pair = max(scores[i].xy, scores[i].zw);
                    highest = max(highest, max(pair.x, pair.y));
                }
                if first_tile == 0u {
                    for (var step = 0u; step < ROW_LANES_LOG2; step++) {
                        highest = max(highest, subgroupShuffleXor(highest, 1u << step));
                    }
                    // Rows of other runs keep theirs.
                    reference = select(reference, max(reference, highest + BELOW), limit > 0u);
                }
                // Keys past the limit have the score LOWEST, whose power is 0 even for a row that has no key so far.
                let least = max(reference, 0.5 * LOWEST);
                for (var i = 0u; i < QUADS; i++) {
                    let p = exp2(scores[i] - vec4<f32>(least));
                    mass += dot(p, vec4<f32>(1.0));
                    k_tile[p_own + i * ROW_LANES + own_lane] = vec4<f16>(p);
                }
                subgroupBarrier();

                let a = coopLoadT<coop_mat16x16<f16, A>>(&k_tile[p_from], STRIDE);
#repeat d FRAGMENTS_D
                let start = v_from + d * 4u;
                let b = coopLoadT<coop_mat16x16<f16, B>>(&v_tile[start], KV_STRIDE);
                sums[d] = coopMultiplyAdd(a, b, sums[d]);
#endrepeat
                // The next step overwrites the tiles.
                workgroupBarrier();
            }
        }

        for (var step = 0u; step < ROW_LANES_LOG2; step++) {
            highest = max(highest, subgroupShuffleXor(highest, 1u << step));
        }
        let is_misled = highest > reference + LAG;
        let any_misled = subgroupAny(is_misled);
        if lane == 0u {
            s_tile[s_from].x = f32(any_misled);
        }
        workgroupBarrier();
        var num_misled = 0.0;
        for (var i = 0u; i < KEY_SLICES * SLICE_SUBGROUPS; i++) {
            num_misled += s_tile[i * 16u * STRIDE].x;
        }
        workgroupBarrier();
        if num_misled == 0.0 {
            break;
        }
        // Other rows get the same weights again, whoever shares their workgroup.
        reference = select(reference, highest, is_misled);
    }

    for (var step = 0u; step < ROW_LANES_LOG2; step++) {
        mass += subgroupShuffleXor(mass, 1u << step);
    }
#if SLICED
    // All slices' sums refer to the highest reference of their row then.
    if own_lane == 0u {
        s_tile[s_own] = vec4<f32>(reference, mass, 0.0, 0.0);
    }
    workgroupBarrier();
    highest = LOWEST;
    for (var s = 0u; s < KEY_SLICES; s++) {
        highest = max(highest, s_tile[(s * BLOCK_Q + own_row) * STRIDE].x);
    }
    var factors: array<f32, KEY_SLICES>;
    mass = 0.0;
    for (var s = 0u; s < KEY_SLICES; s++) {
        let stats = s_tile[(s * BLOCK_Q + own_row) * STRIDE];
        factors[s] = exp2(stats.x - highest);
        mass += factors[s] * stats.y;
    }
    workgroupBarrier();
#else
    let factors = array<f32, 1>(1.0);
#endif
    let inverse = 1.0 / max(mass, 1e-30);
#repeat part FRAGMENTS_D
    coopStoreT(sums[part], &s_tile[s_from], STRIDE);
#if SLICED
    workgroupBarrier();
#else
    subgroupBarrier();
#endif
    if own_row < num_rows {
        let first = ((first_row + own_row) * NUM_ATTENTION_HEADS + head) * 2u * HEAD_UNITS + part * 4u;
        // A slice's quads.
        for (var i = 0u; i < (QUADS + KEY_SLICES - 1u) / KEY_SLICES; i++) {
            let quad = (i * KEY_SLICES + slice) * ROW_LANES + own_lane;
            if quad < 4u {
                var all = vec4<f32>();
                for (var s = 0u; s < KEY_SLICES; s++) {
                    all += s_tile[(s * BLOCK_Q + own_row) * STRIDE + quad] * factors[s];
                }
#if OUT_F16
                out[first + quad] = vec4<f16>(all * inverse);
#else
                out[first + quad] = all * inverse;
#endif
            }
        }
    }
#if SLICED
    workgroupBarrier();
#else
    subgroupBarrier();
#endif
#endrepeat
}
#else
// End of the run of rows of one sequence that begins at `run`.
fn end_of_run(first_row: u32, num_rows: u32, run: u32) -> u32 {
    let table = active_rows[first_row + run].kv_table;
    if active_rows[first_row + num_rows - 1u].kv_table == table {
        return num_rows;
    }
    var end = run + 1u;
    while active_rows[first_row + end].kv_table == table {
        end += 1u;
    }
    return end;
}

const COLUMNS_LOG2: u32 = firstTrailingBit(COLUMNS);
const THREAD_UNITS: u32 = (HEAD_UNITS + COLUMNS - 1u) / COLUMNS;
const STRIDE: u32 = 2u * CHUNK_UNITS;
// An odd stride in vec4s: neighbouring threads read neighbouring keys from different banks.
const K_STRIDE: u32 = 2u * CHUNK_UNITS + 1u;
const K_UNITS: u32 = BLOCK_K * CHUNK_UNITS;
const K_STEPS: u32 = (K_UNITS + WORKGROUP_SIZE - 1u) / WORKGROUP_SIZE;

var<workgroup> q_tile: array<vec4<f32>, BLOCK_Q * STRIDE>;
var<workgroup> k_tile: array<vec4<f32>, BLOCK_K * K_STRIDE>;
// Weights as [BLOCK_Q, COLUMNS]: component j of column c belongs to key c + j * COLUMNS of the tile.
var<workgroup> p_tile: array<vec4<f32>, BLOCK_Q * COLUMNS>;
// Slots of this tile's keys and of the next one's, which a fast thread stages while a slow one reads.
var<workgroup> slots: array<u32, 2u * BLOCK_K>;
#if !SUBGROUP
var<workgroup> exchange: array<vec4<f32>, WORKGROUP_SIZE>;
#endif

// Maximum over the COLUMNS threads that share rows. Call in uniform flow, with a barrier between calls.
fn columns_max(value: vec4<f32>, thread: u32) -> vec4<f32> {
    var all = value;
#if SUBGROUP
    for (var step = 0u; step < COLUMNS_LOG2; step++) {
        all = max(all, subgroupShuffleXor(all, 1u << step));
    }
#else
    exchange[thread] = value;
    workgroupBarrier();
    let first = thread / COLUMNS * COLUMNS;
    for (var c = 0u; c < COLUMNS; c++) {
        all = max(all, exchange[first + c]);
    }
#endif
    return all;
}

// Sum over the COLUMNS threads that share rows. Call as columns_max.
fn columns_sum(value: vec4<f32>, thread: u32) -> vec4<f32> {
#if SUBGROUP
    var all = value;
    for (var step = 0u; step < COLUMNS_LOG2; step++) {
        all += subgroupShuffleXor(all, 1u << step);
    }
#else
    exchange[thread] = value;
    workgroupBarrier();
    let first = thread / COLUMNS * COLUMNS;
    var all = vec4<f32>(0.0);
    for (var c = 0u; c < COLUMNS; c++) {
        all += exchange[first + c];
    }
#endif
    return all;
}

fn no_unit() -> mat2x4<f32> {
    return mat2x4<f32>(vec4<f32>(0.0), vec4<f32>(0.0));
}

// Stages units of the queries of BLOCK_Q rows, scaled; rows past the end are zero.
fn stage_queries(first_row: u32, num_rows: u32, head: u32, first_unit: u32, thread: u32) {
    for (var i = thread; i < BLOCK_Q * CHUNK_UNITS; i += WORKGROUP_SIZE) {
        let row = i / CHUNK_UNITS;
        let unit = first_unit + i % CHUNK_UNITS;
        var query = no_unit();
        if row < num_rows && unit < HEAD_UNITS {
            query = q[((first_row + row) * NUM_ATTENTION_HEADS + head) * HEAD_UNITS + unit] * params.scale;
        }
        let at = row * STRIDE + 2u * (i % CHUNK_UNITS);
        q_tile[at] = query[0];
        q_tile[at + 1u] = query[1];
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
#if SUBGROUP
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
#else
    @builtin(local_invocation_index) thread: u32,
#endif
) {
#if SUBGROUP
    let thread = subgroup * subgroup_size + subgroup_lane;
#endif
    let head = workgroup.x;
    let kv_head = head / GROUP_SIZE;
    // The last rows have the most keys: they begin first, and short ones fill the gaps at the end.
    let num_active = active_rows[arrayLength(&active_rows) - 1u].row;
    let num_blocks = (num_active + BLOCK_Q - 1u) / BLOCK_Q;
    if workgroup.y >= num_blocks {
        return;
    }
    let first_row = (num_blocks - 1u - workgroup.y) * BLOCK_Q;
    let num_rows = min(BLOCK_Q, num_active - first_row);
    let column = thread % COLUMNS;
    let thread_row = thread / COLUMNS * 4u;

    var sums = vec4<f32>(0.0);
    var highest = vec4<f32>(LOWEST);
    var acc: array<mat2x4<f32>, 4u * THREAD_UNITS>;
    for (var i = 0u; i < 4u * THREAD_UNITS; i++) {
        acc[i] = no_unit();
    }
#if ONE_CHUNK
    stage_queries(first_row, num_rows, head, 0u, thread);
#endif
    var parity = 0u;
    // Rows of one sequence after the other: each run has its own keys, and no weight for the other rows.
    for (var run = 0u; run < num_rows;) {
        let table = active_rows[first_row + run].kv_table;
        let run_end = end_of_run(first_row, num_rows, run);
        let run_len = active_rows[first_row + run_end - 1u].kv_len;
        var limits = vec4<u32>(0u);
        for (var r = 0u; r < 4u; r++) {
            if thread_row + r >= run && thread_row + r < run_end {
                limits[r] = active_rows[first_row + thread_row + r].kv_len;
            }
        }
        run = run_end;

        for (var tile = 0u; tile < run_len; tile += BLOCK_K) {
            let tile_slots = parity * BLOCK_K;
            parity = 1u - parity;
            var scores: array<vec4<f32>, 4>;
            for (var r = 0u; r < 4u; r++) {
                scores[r] = vec4<f32>(0.0);
            }
            for (var chunk = 0u; chunk < NUM_CHUNKS; chunk++) {
#if !ONE_CHUNK
                if chunk > 0u {
                    workgroupBarrier();
                }
                stage_queries(first_row, num_rows, head, chunk * CHUNK_UNITS, thread);
#endif
                // A constant number of steps, so that the compiler has all their loads in flight.
                for (var step = 0u; step < K_STEPS; step++) {
                    let i = thread + step * WORKGROUP_SIZE;
                    let key = i / CHUNK_UNITS;
                    let in_chunk = i % CHUNK_UNITS;
                    let unit = chunk * CHUNK_UNITS + in_chunk;
                    if K_UNITS % WORKGROUP_SIZE == 0u || i < K_UNITS {
                        // Keys past the end repeat the last one and get no weight.
                        let slot = kv_slot(table, min(tile + key, run_len - 1u));
                        if unit == 0u {
                            slots[tile_slots + key] = slot;
                        }
                        var staged = no_unit();
                        if unit < HEAD_UNITS {
                            staged = unpack_kv(keys[(slot * NUM_KEY_VALUE_HEADS + kv_head) * HEAD_UNITS + unit]);
                        }
                        k_tile[key * K_STRIDE + 2u * in_chunk] = staged[0];
                        k_tile[key * K_STRIDE + 2u * in_chunk + 1u] = staged[1];
                    }
                }
                workgroupBarrier();
                for (var u = 0u; u < 2u * CHUNK_UNITS; u++) {
                    let k0 = k_tile[column * K_STRIDE + u];
                    let k1 = k_tile[(column + COLUMNS) * K_STRIDE + u];
                    let k2 = k_tile[(column + 2u * COLUMNS) * K_STRIDE + u];
                    let k3 = k_tile[(column + 3u * COLUMNS) * K_STRIDE + u];
                    for (var r = 0u; r < 4u; r++) {
                        let query = q_tile[(thread_row + r) * STRIDE + u];
                        scores[r] += vec4<f32>(dot(query, k0), dot(query, k1), dot(query, k2), dot(query, k3));
                    }
                }
            }

            let key = vec4<u32>(tile + column) + vec4<u32>(0u, 1u, 2u, 3u) * COLUMNS;
            var own_highest = highest;
            for (var r = 0u; r < 4u; r++) {
                scores[r] = select(vec4<f32>(LOWEST), scores[r], key < vec4<u32>(limits[r]));
                let pair = max(scores[r].xy, scores[r].zw);
                own_highest[r] = max(own_highest[r], max(pair.x, pair.y));
            }
            let tile_highest = columns_max(own_highest, thread);
            let keep = exp(highest - tile_highest);
            highest = tile_highest;
            sums *= keep;
            for (var r = 0u; r < 4u; r++) {
                // A row without any key so far has the maximum LOWEST, so the mask decides, not the exponential.
                let weights = exp(scores[r] - vec4<f32>(highest[r]));
                let p = select(vec4<f32>(0.0), weights, key < vec4<u32>(limits[r]));
                sums[r] += dot(p, vec4<f32>(1.0));
                p_tile[(thread_row + r) * COLUMNS + column] = p;
                for (var t = 0u; t < THREAD_UNITS; t++) {
                    acc[r * THREAD_UNITS + t] = acc[r * THREAD_UNITS + t] * keep[r];
                }
            }
            workgroupBarrier();

            for (var c = 0u; c < COLUMNS; c++) {
                let p = mat4x4<f32>(
                    p_tile[thread_row * COLUMNS + c],
                    p_tile[(thread_row + 1u) * COLUMNS + c],
                    p_tile[(thread_row + 2u) * COLUMNS + c],
                    p_tile[(thread_row + 3u) * COLUMNS + c],
                );
                for (var j = 0u; j < 4u; j++) {
                    let slot = slots[tile_slots + c + j * COLUMNS];
                    let at = (slot * NUM_KEY_VALUE_HEADS + kv_head) * HEAD_UNITS;
                    for (var t = 0u; t < THREAD_UNITS; t++) {
                        let value = unpack_kv(values[at + min(column + t * COLUMNS, HEAD_UNITS - 1u)]);
                        for (var r = 0u; r < 4u; r++) {
                            acc[r * THREAD_UNITS + t] = acc[r * THREAD_UNITS + t] + value * p[r][j];
                        }
                    }
                }
            }
        }
    }

    let total = columns_sum(sums, thread);
    for (var r = 0u; r < 4u; r++) {
        let row = thread_row + r;
        if row < num_rows {
            let inverse = 1.0 / max(total[r], 1e-30);
            for (var t = 0u; t < THREAD_UNITS; t++) {
                let unit = column + t * COLUMNS;
                if unit < HEAD_UNITS {
                    out[((first_row + row) * NUM_ATTENTION_HEADS + head) * HEAD_UNITS + unit] =
                        acc[r * THREAD_UNITS + t] * inverse;
                }
            }
        }
    }
}
#endif
