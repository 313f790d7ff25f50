// linear: y = x W^T for many rows, with an epilogue after it.
// Math      y[i, o] = sum_k x[i, k] * w[o, k] (x[r, k], r = active_rows[i].row, with X_BY_ROW); then
//           shared/epilogue.wgsl
// Why       every value fetched is used THREAD_M or THREAD_N times. STAGED: a workgroup shares tiles of x and w in
//           workgroup memory, the next tiles in flight while these are multiplied. Otherwise, for software
//           rasterisers, where a load costs a loop over the lanes: no barrier, and with BROADCAST each lane loads
//           one row of x for all
// Shapes    active_rows [n]; x compact [n, K] or stream [T, K] (X_BY_ROW) f32; w [O, K] units of 8; outputs as the
//           epilogue says; row-major
// Bindings  0 params uniform; 1 active_rows read; 2 w read; 3 x read; 4 out write;
//           6 residual read [RESIDUAL, BLOCK_END_EXPERT, BLOCK_END_TOKEN]; 6 rope read [QKV];
//           7 copy write [RESIDUAL_COPY]; 7 gates read [BLOCK_END_EXPERT, BLOCK_END_TOKEN]; 7 k_cache write [QKV];
//           8 running write [BLOCK_END_TOKEN]; 8 v_cache write [QKV]
// Grid      (ceil(O / TILE_N), ceil(n / TILE_M), 1) workgroups; one per tile of the output; each of its
//           (TILE_M / THREAD_M) * (TILE_N / THREAD_N) threads owns THREAD_M rows of THREAD_N columns
// Spec      TILE_M <= ROW_PADDING, TILE_N, THREAD_M, THREAD_N even; X_BY_ROW; STAGED: TILE_K multiple of 8, tiles of x
//           and w whole numbers of vec4s and units for every thread; otherwise THREAD_M = TILE_M; BROADCAST: TILE_M
//           and all subgroups 8; WEIGHT_F16 or WEIGHT_BF16 or neither; STORE, GELU, RESIDUAL (RESIDUAL_COPY),
//           SWIGLU, QKV, BLOCK_END_EXPERT or BLOCK_END_TOKEN: the epilogue; KV_F16: QKV into f16 caches
// Limits    STAGED: 16 * (TILE_M + TILE_N) * (TILE_K / 4 + 1) bytes of workgroup memory
// Numerics  f32; sums in ascending k
// Source    Llama projections (arXiv 2302.13971); MoR block end (arXiv 2507.10524)
#import shared/rows
#import shared/weights

struct Params {
    num_outputs: u32,
    first_output: u32,
    out_stride: u32,
    q_dim: u32,
    kv_dim: u32,
    head_dim: u32,
    additive: u32,
    eps: f32,
    scale: f32,
    in_features: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> active_rows: array<ActiveRow>;
@group(0) @binding(2) var<storage, read> w: array<WeightUnit>;
@group(0) @binding(3) var<storage, read> x: array<vec4<f32>>;
#import shared/epilogue

const THREADS_M: u32 = TILE_M / THREAD_M;
const THREADS_N: u32 = TILE_N / THREAD_N;
const THREADS: u32 = THREADS_M * THREADS_N;
const SUMS: u32 = THREAD_M * THREAD_N;

fn multiply_add(a: vec4<f32>, b: vec4<f32>, sum: f32) -> f32 {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, sum))));
}

// Row of x that list entry i reads; entries past the end read what the tile's first entry does, and are not stored.
fn source_row(first: u32, i: u32) -> u32 {
    let row = active_rows[i].row;
#if X_BY_ROW
    return select(active_rows[first].row, row, row != NONE);
#else
    return select(first, i, row != NONE);
#endif
}

#if STAGED
// One vec4 of padding a row: an odd stride spreads the rows that lanes read at once over all banks.
const STRIDE: u32 = TILE_K / 4u + 1u;
const X_LOADS: u32 = TILE_M * TILE_K / 4u / THREADS;
const W_LOADS: u32 = TILE_N * TILE_K / 8u / THREADS;

var<workgroup> x_tile: array<vec4<f32>, TILE_M * STRIDE>;
// Even columns first, then odd ones, so that neighbouring lanes read neighbouring rows of the tile.
var<workgroup> w_tile: array<vec4<f32>, TILE_N * STRIDE>;
#endif

#if !STAGED
// Adds 8 inputs of row m, `low` then `high`, times the weights `b`.
fn add_row(m: u32, low: vec4<f32>, high: vec4<f32>, b: ptr<function, array<mat2x4<f32>, THREAD_N>>, sums: ptr<function, array<f32, SUMS>>) {
    for (var j = 0u; j < THREAD_N; j++) {
        let sum = multiply_add(low, (*b)[j][0], (*sums)[m * THREAD_N + j]);
        (*sums)[m * THREAD_N + j] = multiply_add(high, (*b)[j][1], sum);
    }
}
#endif

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
#if BROADCAST
    @builtin(subgroup_invocation_id) lane: u32,
#endif
) {
    let first_entry = workgroup.y * TILE_M;
    let first_column = workgroup.x * TILE_N;
    let thread_m = thread / THREADS_N;
    let thread_n = thread % THREADS_N;
    let units = params.in_features / 8u;
    // Columns past the end are computed as the last one and not stored.
    let last_column = params.num_outputs - 1u;

    var sums: array<f32, SUMS>;
    for (var s = 0u; s < SUMS; s++) {
        sums[s] = 0.0;
    }

#if STAGED
    var x_from: array<u32, X_LOADS>;
    for (var l = 0u; l < X_LOADS; l++) {
        let m = (thread + l * THREADS) / (TILE_K / 4u);
        x_from[l] = source_row(first_entry, first_entry + m) * units * 2u;
    }
    var w_from: array<u32, W_LOADS>;
    for (var l = 0u; l < W_LOADS; l++) {
        let n = (thread + l * THREADS) / (TILE_K / 8u);
        w_from[l] = min(first_column + n, last_column) * units;
    }
    var x_ahead: array<vec4<f32>, X_LOADS>;
    var w_ahead: array<WeightUnit, W_LOADS>;
    // Past the end of a row x is zero and w any weight.
    for (var l = 0u; l < X_LOADS; l++) {
        let c = (thread + l * THREADS) % (TILE_K / 4u);
        x_ahead[l] = vec4<f32>();
        if c < units * 2u {
            x_ahead[l] = x[x_from[l] + c];
        }
    }
    for (var l = 0u; l < W_LOADS; l++) {
        let c = (thread + l * THREADS) % (TILE_K / 8u);
        w_ahead[l] = w[w_from[l] + min(c, units - 1u)];
    }
    for (var base = 0u; base < units; base += TILE_K / 8u) {
        for (var l = 0u; l < X_LOADS; l++) {
            let at = thread + l * THREADS;
            x_tile[at / (TILE_K / 4u) * STRIDE + at % (TILE_K / 4u)] = x_ahead[l];
        }
        for (var l = 0u; l < W_LOADS; l++) {
            let at = thread + l * THREADS;
            let n = at / (TILE_K / 8u);
            let to = (n / 2u + n % 2u * (TILE_N / 2u)) * STRIDE + at % (TILE_K / 8u) * 2u;
            let weights = unpack_weights(w_ahead[l]);
            w_tile[to] = weights[0];
            w_tile[to + 1u] = weights[1];
        }
        workgroupBarrier();
        let next = base + TILE_K / 8u;
        if next < units {
            for (var l = 0u; l < X_LOADS; l++) {
                let c = next * 2u + (thread + l * THREADS) % (TILE_K / 4u);
                x_ahead[l] = vec4<f32>();
                if c < units * 2u {
                    x_ahead[l] = x[x_from[l] + c];
                }
            }
            for (var l = 0u; l < W_LOADS; l++) {
                let c = next + (thread + l * THREADS) % (TILE_K / 8u);
                w_ahead[l] = w[w_from[l] + min(c, units - 1u)];
            }
        }
        for (var c = 0u; c < TILE_K / 4u; c++) {
            var b: array<vec4<f32>, THREAD_N>;
            for (var j = 0u; j < THREAD_N; j++) {
                let n = thread_n + j / 2u * THREADS_N + j % 2u * (TILE_N / 2u);
                b[j] = w_tile[n * STRIDE + c];
            }
            for (var m = 0u; m < THREAD_M; m++) {
                let a = x_tile[(thread_m + m * THREADS_M) * STRIDE + c];
                for (var j = 0u; j < THREAD_N; j++) {
                    sums[m * THREAD_N + j] = multiply_add(a, b[j], sums[m * THREAD_N + j]);
                }
            }
        }
        // The next step overwrites the tiles.
        workgroupBarrier();
    }
#else
    var w_from: array<u32, THREAD_N>;
    for (var j = 0u; j < THREAD_N; j++) {
        let n = first_column + 2u * (thread_n + j / 2u * THREADS_N) + j % 2u;
        w_from[j] = min(n, last_column) * units;
    }
#if BROADCAST
    // Each lane loads one row of x for all lanes.
    let x_from = source_row(first_entry, first_entry + lane) * units * 2u;
#else
    var x_from: array<u32, THREAD_M>;
    for (var m = 0u; m < THREAD_M; m++) {
        x_from[m] = source_row(first_entry, first_entry + m) * units * 2u;
    }
#endif
    for (var unit = 0u; unit < units; unit++) {
        var b: array<mat2x4<f32>, THREAD_N>;
        for (var j = 0u; j < THREAD_N; j++) {
            b[j] = unpack_weights(w[w_from[j] + unit]);
        }
#if BROADCAST
        let low = x[x_from + 2u * unit];
        let high = x[x_from + 2u * unit + 1u];
        // The lane of a broadcast must be a literal.
        add_row(0u, subgroupBroadcast(low, 0u), subgroupBroadcast(high, 0u), &b, &sums);
        add_row(1u, subgroupBroadcast(low, 1u), subgroupBroadcast(high, 1u), &b, &sums);
        add_row(2u, subgroupBroadcast(low, 2u), subgroupBroadcast(high, 2u), &b, &sums);
        add_row(3u, subgroupBroadcast(low, 3u), subgroupBroadcast(high, 3u), &b, &sums);
        add_row(4u, subgroupBroadcast(low, 4u), subgroupBroadcast(high, 4u), &b, &sums);
        add_row(5u, subgroupBroadcast(low, 5u), subgroupBroadcast(high, 5u), &b, &sums);
        add_row(6u, subgroupBroadcast(low, 6u), subgroupBroadcast(high, 6u), &b, &sums);
        add_row(7u, subgroupBroadcast(low, 7u), subgroupBroadcast(high, 7u), &b, &sums);
#else
        for (var m = 0u; m < THREAD_M; m++) {
            add_row(m, x[x_from[m] + 2u * unit], x[x_from[m] + 2u * unit + 1u], &b, &sums);
        }
#endif
    }
#endif

    for (var m = 0u; m < THREAD_M; m++) {
        let i = first_entry + thread_m + m * THREADS_M;
        let entry = active_rows[i];
        for (var j = 0u; j < THREAD_N; j += 2u) {
            let o = first_column + 2u * (thread_n + j / 2u * THREADS_N);
            if entry.row != NONE && o < params.num_outputs {
                let v = vec2<f32>(sums[m * THREAD_N + j], sums[m * THREAD_N + j + 1u]);
                epilogue(i, entry, params.first_output + o, v);
            }
        }
    }
}
