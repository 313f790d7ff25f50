// attention_decode: attention of few rows, the keys of each row divided over workgroups.
// Math      for row i, query head h = (kv head g, j) and split s over the keys k of the split: l_k = scale * q[i, h] . key_k[g];
//           m = max l_k; partial_stats[i, h, s] = (m, sum exp(l_k - m)); partial_out[i, h, s] = sum exp(l_k - m) * value_k[g];
//           with one split instead out[i, h] = partial_out / sum, and there are no statistics
// Why       one row is too little work for a large device unless its keys are divided; all query heads of a
//           key-value head go together, so that K and V are read once; memory is busy only while every thread has loads on
//           their way, so the next keys and values are fetched before the present ones are all computed with
// Shapes    active_rows [n]; q [n, H, D] f32; keys, values [slots, G, D] f32, f16 or blocks; kv_table u32;
//           partial_out [n, H, NUM_SPLITS, D] f32; partial_stats [n, H, NUM_SPLITS, 2] f32; row-major, D a multiple of 8
// Bindings  0 params uniform; 1 active_rows read; 2 q read; 3 keys read; 4 values read; 5 kv_table read; 6 partial_out write;
//           7 partial_stats write [SPLIT]
// Grid      (G * HEAD_BLOCKS, n, NUM_SPLITS) workgroups; split s has the keys [s, s + 1) * chunk,
//           chunk = ceil(kv_len / NUM_SPLITS) rounded up to whole pages
// Spec      WORKGROUP_SIZE power of two; LANES threads share a key, 8 elements each; WIDTH threads, with SUBGROUP part of a
//           subgroup, leave one partial result; HEADS <= 4 query heads of the GROUP_SIZE that share a kv head, in
//           HEAD_BLOCKS workgroups; KEYS that a thread fetches at a time: WIDTH / LANES * KEYS divides PAGE_SIZE;
//           NUM_ATTENTION_HEADS = H, NUM_KEY_VALUE_HEADS = G, HEAD_UNITS = D / 8; SPLIT: NUM_SPLITS > 1; KV_F16 or KV_BLOCKS; KV_SLOTS:
//           kv_table lists keys, not pages; SUBGROUP: WIDTH lanes exchange by subgroup operations; ALONE: with SUBGROUP,
//           LANES = WORKGROUP_SIZE, so nothing is merged; workgroup memory (WORKGROUP_SIZE / WIDTH) * HEADS * (4 * D + 8)
//           bytes, none with ALONE
// Limits    D <= 256; a split without keys writes (-3.4028234e38, 0) and zeros
// Numerics  f32 throughout; running maximum per thread group, merged once at the end
// Source    Dao et al. 2023, Flash-Decoding; Milakov and Gimelshein 2018 (arXiv 1805.02867)
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
@group(0) @binding(6) var<storage, read_write> partial_out: array<vec4<f32>>;
#if SPLIT
@group(0) @binding(7) var<storage, read_write> partial_stats: array<vec2<f32>>;
#endif

const LOWEST: f32 = -3.4028234e38;
const HEAD_QUADS: u32 = 2u * HEAD_UNITS;
const PARTS: u32 = WORKGROUP_SIZE / WIDTH;
const SLICES: u32 = WIDTH / LANES;
const LANES_LOG2: u32 = firstTrailingBit(LANES);
const WIDTH_LOG2: u32 = firstTrailingBit(WIDTH);

#if !ALONE
// Partial sums as [PARTS, HEADS, HEAD_QUADS]; without subgroups first the scores of a tile, one vec4 a key
// (it fits: 2 * HEAD_UNITS > LANES).
var<workgroup> part_out: array<vec4<f32>, PARTS * HEADS * HEAD_QUADS>;
// (max, sum) as [PARTS, HEADS].
var<workgroup> part_stats: array<vec2<f32>, PARTS * HEADS>;
#endif

fn unit_dot(a: mat2x4<f32>, b: mat2x4<f32>) -> f32 {
    return dot(a[0], b[0]) + dot(a[1], b[1]);
}

#if SUBGROUP
// Sum over the lanes that share a key.
fn key_sum(value: f32) -> f32 {
#if ALONE
    // A software rasteriser shuffles lane by lane but broadcasts in one instruction.
    var sum = 0.0;
#repeat giver LANES
    sum += subgroupBroadcast(value, giver);
#endrepeat
#else
    var sum = value;
    for (var step = 0u; step < LANES_LOG2; step++) {
        sum += subgroupShuffleXor(sum, 1u << step);
    }
#endif
    return sum;
}
#endif

#if SUBGROUP
// Keys of a tile.
const TILE: u32 = SLICES * KEYS;

// Where the units of the tile's keys `slice`, `SLICES + slice`, .. are; keys past the end are the last one.
fn units_of(table: u32, tile: u32, slice: u32, end: u32, kv_head: u32, unit: u32) -> array<u32, KEYS> {
    var at: array<u32, KEYS>;
#if !KV_SLOTS
    // A tile lies in one page.
    let first = kv_table[table + tile / PAGE_SIZE] * PAGE_SIZE;
#endif
#repeat i KEYS
    let key = min(tile + i * SLICES + slice, end - 1u);
#if KV_SLOTS
    let slot = kv_slot(table, key);
#else
    let slot = first + key % PAGE_SIZE;
#endif
    at[i] = (slot * NUM_KEY_VALUE_HEADS + kv_head) * HEAD_UNITS + unit;
#endrepeat
    return at;
}
#endif

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
#if SUBGROUP
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
#endif
) {
#if SUBGROUP
    let thread = subgroup * subgroup_size + subgroup_lane;
#else
    let thread = local;
#endif
    let lane = thread % LANES;
    let part = thread / WIDTH;
    // Lanes past the head repeat its last unit and are not counted.
    let unit = min(lane, HEAD_UNITS - 1u);

    let row = workgroup.y;
    let table = active_rows[row].kv_table;
    let kv_len = active_rows[row].kv_len;
    let kv_head = workgroup.x / HEAD_BLOCKS;
    let head_in_group = workgroup.x % HEAD_BLOCKS * HEADS;
    let num_heads = min(HEADS, GROUP_SIZE - head_in_group);
    let head = row * NUM_ATTENTION_HEADS + kv_head * GROUP_SIZE + head_in_group;
    let chunk = (kv_len + NUM_SPLITS * PAGE_SIZE - 1u) / (NUM_SPLITS * PAGE_SIZE) * PAGE_SIZE;
    let start = min(workgroup.z * chunk, kv_len);
    let end = min(start + chunk, kv_len);

    // Of this thread's unit over the keys of its slice, for every head.
    var highest = vec4<f32>(LOWEST);
    var sum = vec4<f32>(0.0);
    var out: array<mat2x4<f32>, HEADS>;
    for (var h = 0u; h < HEADS; h++) {
        out[h] = mat2x4<f32>(vec4<f32>(0.0), vec4<f32>(0.0));
    }

#if SUBGROUP
    // WIDTH lanes go through tiles of their own, without a barrier before the merge. The next keys are on their way during
    // the softmax, the next values during the next scores.
    let slice = thread % WIDTH / LANES;
    let counted = select(0.0, params.scale, lane < HEAD_UNITS);
    var query: array<mat2x4<f32>, HEADS>;
    for (var h = 0u; h < HEADS; h++) {
        query[h] = q[(head + min(h, num_heads - 1u)) * HEAD_UNITS + unit] * counted;
    }
    var at: array<u32, KEYS>;
    var key_ahead: array<KvUnit, KEYS>;
    var value_ahead: array<KvUnit, KEYS>;
    if start + part * TILE < end {
        at = units_of(table, start + part * TILE, slice, end, kv_head, unit);
#repeat i KEYS
        key_ahead[i] = keys[at[i]];
#endrepeat
#repeat i KEYS
        value_ahead[i] = values[at[i]];
#endrepeat
    }
    for (var base = start; base < end; base += PARTS * TILE) {
        let tile = base + part * TILE;
        let next = tile + PARTS * TILE;
        var scores: array<vec4<f32>, KEYS>;
        // Keys past the end are the last one, which the maximum may count twice.
        var tile_highest = highest;
#repeat i KEYS
        let key_unit = unpack_kv(key_ahead[i]);
        var score = vec4<f32>(0.0);
        for (var h = 0u; h < HEADS; h++) {
            score[h] = key_sum(unit_dot(query[h], key_unit));
        }
        scores[i] = score;
        tile_highest = max(tile_highest, score);
#endrepeat
        tile_highest = select(highest, tile_highest, tile < end);
        // At most one turn, as below, which compilers cannot know: they leave the loads here instead of moving them to
        // where their results are used.
        for (var coming = next; coming < end; coming += end) {
            at = units_of(table, coming, slice, end, kv_head, unit);
#repeat i KEYS
            key_ahead[i] = keys[at[i]];
#endrepeat
        }
        let keep = exp(highest - tile_highest);
        highest = tile_highest;
        sum *= keep;
        for (var h = 0u; h < HEADS; h++) {
            out[h] = out[h] * keep[h];
        }
#repeat i KEYS
        let value = unpack_kv(value_ahead[i]);
        let p = select(vec4<f32>(0.0), exp(scores[i] - highest), tile + i * SLICES + slice < end);
        sum += p;
        for (var h = 0u; h < HEADS; h++) {
            out[h] = out[h] + value * p[h];
        }
#endrepeat
        for (var coming = next; coming < end; coming += end) {
#repeat i KEYS
            value_ahead[i] = values[at[i]];
#endrepeat
        }
    }
#if !ALONE
    // The slices of WIDTH lanes become one.
    var width_highest = highest;
    for (var step = LANES_LOG2; step < WIDTH_LOG2; step++) {
        width_highest = max(width_highest, subgroupShuffleXor(width_highest, 1u << step));
    }
    let keep = exp(highest - width_highest);
    highest = width_highest;
    sum *= keep;
    for (var h = 0u; h < HEADS; h++) {
        out[h] = out[h] * keep[h];
    }
    for (var step = LANES_LOG2; step < WIDTH_LOG2; step++) {
        sum += subgroupShuffleXor(sum, 1u << step);
        for (var h = 0u; h < HEADS; h++) {
            out[h] = mat2x4<f32>(
                out[h][0] + subgroupShuffleXor(out[h][0], 1u << step),
                out[h][1] + subgroupShuffleXor(out[h][1], 1u << step),
            );
        }
    }
#endif
#else
    // A tile of one key a thread: each thread scores its key for all heads, then each slice gathers the values of its share.
    for (var tile = start; tile < end; tile += WORKGROUP_SIZE) {
        let num_keys = min(WORKGROUP_SIZE, end - tile);
        if thread < num_keys {
            let at = (kv_slot(table, tile + thread) * NUM_KEY_VALUE_HEADS + kv_head) * HEAD_UNITS;
            var score = vec4<f32>(0.0);
            for (var u = 0u; u < HEAD_UNITS; u++) {
                let key_unit = unpack_kv(keys[at + u]);
                for (var h = 0u; h < HEADS; h++) {
                    score[h] += unit_dot(q[(head + min(h, num_heads - 1u)) * HEAD_UNITS + u], key_unit);
                }
            }
            part_out[thread] = score * params.scale;
        }
        workgroupBarrier();
        var tile_highest = highest;
        for (var i = part; i < num_keys; i += PARTS) {
            tile_highest = max(tile_highest, part_out[i]);
        }
        let keep = exp(highest - tile_highest);
        highest = tile_highest;
        sum *= keep;
        for (var h = 0u; h < HEADS; h++) {
            out[h] = out[h] * keep[h];
        }
        for (var i = part; i < num_keys; i += PARTS) {
            let at = (kv_slot(table, tile + i) * NUM_KEY_VALUE_HEADS + kv_head) * HEAD_UNITS + unit;
            let value = unpack_kv(values[at]);
            let p = exp(part_out[i] - highest);
            sum += p;
            for (var h = 0u; h < HEADS; h++) {
                out[h] = out[h] + value * p[h];
            }
        }
        workgroupBarrier();
    }
#endif

#if ALONE
    if lane < HEAD_UNITS {
        for (var h = 0u; h < num_heads; h++) {
#if SPLIT
            let at = (head + h) * NUM_SPLITS + workgroup.z;
            let result = out[h];
            if lane == 0u {
                partial_stats[at] = vec2<f32>(highest[h], sum[h]);
            }
#else
            let at = head + h;
            let result = out[h] * (1.0 / max(sum[h], 1e-30));
#endif
            partial_out[at * HEAD_QUADS + 2u * lane] = result[0];
            partial_out[at * HEAD_QUADS + 2u * lane + 1u] = result[1];
        }
    }
#else
    if thread % WIDTH < HEAD_UNITS {
        for (var h = 0u; h < HEADS; h++) {
            let at = (part * HEADS + h) * HEAD_QUADS + 2u * lane;
            part_out[at] = out[h][0];
            part_out[at + 1u] = out[h][1];
            if lane == 0u {
                part_stats[part * HEADS + h] = vec2<f32>(highest[h], sum[h]);
            }
        }
    }
    workgroupBarrier();
    for (var i = local; i < num_heads * HEAD_QUADS; i += WORKGROUP_SIZE) {
        let h = i / HEAD_QUADS;
        let quad = i % HEAD_QUADS;
        var all_highest = LOWEST;
        for (var p = 0u; p < PARTS; p++) {
            all_highest = max(all_highest, part_stats[p * HEADS + h].x);
        }
        var all_sum = 0.0;
        var all_out = vec4<f32>(0.0);
        for (var p = 0u; p < PARTS; p++) {
            let stats = part_stats[p * HEADS + h];
            let weight = exp(stats.x - all_highest);
            all_sum += weight * stats.y;
            all_out += weight * part_out[(p * HEADS + h) * HEAD_QUADS + quad];
        }
#if SPLIT
        let at = (head + h) * NUM_SPLITS + workgroup.z;
        partial_out[at * HEAD_QUADS + quad] = all_out;
        if quad == 0u {
            partial_stats[at] = vec2<f32>(all_highest, all_sum);
        }
#else
        partial_out[(head + h) * HEAD_QUADS + quad] = all_out / max(all_sum, 1e-30);
#endif
    }
#endif
}
