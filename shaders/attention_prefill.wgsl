// attention_prefill: attention of many rows, tile by tile of rows and keys.
// Math      out[i, h] = sum_k softmax_k(scale * q[i, h] . key_k[g]) * value_k[g], k = 0..kv_len of row i, g = h / GROUP_SIZE
// Why       BLOCK_Q rows share every key they read; scores never leave the workgroup
// Shapes    active_rows [n]; q [n, H, D] f32; keys, values [slots, G, D] f32 or f16; kv_table u32; out [n, H, D] f32;
//           row-major, D a multiple of 8
// Bindings  0 params uniform; 1 active_rows read; 2 q read; 3 keys read; 4 values read; 5 kv_table read; 6 out write
// Grid      (H, ceil(n / BLOCK_Q), 1) workgroups; a thread has 4 rows, and of each tile 4 keys, then every
//           COLUMNS-th unit of 8 elements
// Spec      COLUMNS power of two; BLOCK_Q rows and 4 * COLUMNS keys a tile; WORKGROUP_SIZE = BLOCK_Q / 4 * COLUMNS;
//           CHUNK_UNITS units of a head are staged at a time, NUM_CHUNKS times (ONE_CHUNK: once);
//           NUM_ATTENTION_HEADS = H, NUM_KEY_VALUE_HEADS = G, GROUP_SIZE = H / G, HEAD_UNITS = D / 8; KV_F16; KV_SLOTS:
//           kv_table lists keys, not pages; SUBGROUP: COLUMNS lanes exchange by subgroup operations;
//           workgroup memory: see workgroup_storage_bytes of the wrapper
// Limits    D <= 256; rows with one kv_table lie together and ascend in kv_len; BLOCK_Q <= ROW_PADDING
// Numerics  f32 throughout; running maximum per row
// Source    Dao 2023, FlashAttention-2 (arXiv 2307.08691)
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
@group(0) @binding(6) var<storage, read_write> out: array<mat2x4<f32>>;

const LOWEST: f32 = -3.4028234e38;
const BLOCK_K: u32 = 4u * COLUMNS;
const COLUMNS_LOG2: u32 = firstTrailingBit(COLUMNS);
const THREAD_UNITS: u32 = (HEAD_UNITS + COLUMNS - 1u) / COLUMNS;
const Q_STRIDE: u32 = 2u * CHUNK_UNITS;
// An odd stride in vec4s: neighbouring threads read neighbouring keys from different banks.
const K_STRIDE: u32 = 2u * CHUNK_UNITS + 1u;
const K_UNITS: u32 = BLOCK_K * CHUNK_UNITS;
const K_STEPS: u32 = (K_UNITS + WORKGROUP_SIZE - 1u) / WORKGROUP_SIZE;

var<workgroup> q_tile: array<vec4<f32>, BLOCK_Q * Q_STRIDE>;
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
        let at = row * Q_STRIDE + 2u * (i % CHUNK_UNITS);
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
    let first_row = workgroup.y * BLOCK_Q;
    if active_rows[first_row].row == NONE {
        return;
    }
    var num_rows = BLOCK_Q;
    if active_rows[first_row + BLOCK_Q - 1u].row == NONE {
        num_rows = 1u;
        while active_rows[first_row + num_rows].row != NONE {
            num_rows += 1u;
        }
    }
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
        var run_end = num_rows;
        if active_rows[first_row + num_rows - 1u].kv_table != table {
            run_end = run + 1u;
            while active_rows[first_row + run_end].kv_table == table {
                run_end += 1u;
            }
        }
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
                        let query = q_tile[(thread_row + r) * Q_STRIDE + u];
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
