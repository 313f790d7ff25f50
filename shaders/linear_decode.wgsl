// linear_decode: y = x W^T for few rows, with RMSNorm or the attention merge before it and an epilogue after it.
// Math      y[i, o] = sum_k f(x)[i, k] * w[o, k]; f: identity, RMSNorm of row r = active_rows[i].row, or the merge of
//           attention partials; then shared/epilogue.wgsl
// Why       the weights are the traffic: they are fetched to registers before the activation is staged, each is
//           read once for ROWS rows, and every fusion saves a dependent dispatch
// Shapes    active_rows [n]; w [O, K] units of 8; x compact [n, K], stream [T, K] (X_BY_ROW) or partials [n, H, S, hd]
//           (MERGE); norm_weight [K]; stats [n, H, S] (max, sum); outputs as the epilogue says
// Bindings  0 params uniform; 1 active_rows read; 2 w read; 3 x read; 4 out write; 5 norm_weight read [NORM];
//           5 stats read [MERGE]; 6 residual read [RESIDUAL, BLOCK_END_EXPERT, BLOCK_END_TOKEN]; 6 rope read [QKV];
//           7 copy write [RESIDUAL_COPY]; 7 gates read [BLOCK_END_EXPERT, BLOCK_END_TOKEN]; 7 k_cache write [QKV];
//           8 running write [BLOCK_END_TOKEN]; 8 v_cache write [QKV]
// Grid      (ceil(O / (2 * GROUPS * PAIRS)), ceil(n / ROWS), 1) workgroups; GROUPS lane groups of LANES lanes,
//           each owns PAIRS pairs of outputs
// Spec      IN_FEATURES multiple of 8; CHUNK units of 8 staged at a time; ROWS, PAIRS, LANES, GROUPS; PREFETCH
//           steps of weights in flight before the activation is ready, or, with the flag STREAM, STREAM steps of the
//           activation held while weights stream by; LOG2_LANES; NORM, or MERGE of SPLITS partials, or neither;
//           X_BY_ROW; SUBGROUP: lanes exchange by subgroup operations, SUBGROUP_EXACT: LANES is the subgroup size;
//           WEIGHT_F16 or WEIGHT_BF16 or neither; STORE, GELU, RESIDUAL (RESIDUAL_COPY), SWIGLU, QKV,
//           BLOCK_END_EXPERT or BLOCK_END_TOKEN: the epilogue; KV_F16: QKV into f16 caches
// Limits    16 * ROWS * (2 * CHUNK + CHUNK / 4 + 1) bytes of workgroup memory, with NORM 4 * ROWS * GROUPS * LANES
//           more, without SUBGROUP 4 * GROUPS * LANES more
// Numerics  f32; lane-strided partial sums, then a tree over lanes
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
#if NORM
@group(0) @binding(5) var<storage, read> norm_weight: array<vec4<f32>>;
#endif
#if MERGE
@group(0) @binding(5) var<storage, read> stats: array<vec2<f32>>;
#endif
#import shared/epilogue

const UNITS: u32 = IN_FEATURES / 8u;
const THREADS: u32 = LANES * GROUPS;
const OUTPUTS: u32 = 2u * PAIRS;
// One vec4 of padding after every 8 spreads the lanes' strided reads over the banks.
const ROW_STRIDE: u32 = CHUNK * 2u + CHUNK / 4u + 1u;

var<workgroup> staged: array<vec4<f32>, ROWS * ROW_STRIDE>;
#if NORM
var<workgroup> squares: array<f32, ROWS * THREADS>;
#endif
#if !SUBGROUP
var<workgroup> lane_scratch: array<f32, THREADS>;
#endif

fn padded(c: u32) -> u32 {
    return c + (c >> 3u);
}

#if SUBGROUP
fn lane_sum(value: f32, thread: u32, lane: u32) -> f32 {
#if SUBGROUP_EXACT
    return subgroupAdd(value);
#else
    // Counted steps, not a halving variable: compilers unroll only the former.
    var sum = value;
    for (var step = 0u; step < LOG2_LANES; step++) {
        sum += subgroupShuffleXor(sum, 1u << step);
    }
    return sum;
#endif
}
#else
fn lane_sum(value: f32, thread: u32, lane: u32) -> f32 {
    lane_scratch[thread] = value;
    workgroupBarrier();
    for (var step = LANES / 2u; step > 0u; step = step / 2u) {
        if lane < step {
            lane_scratch[thread] += lane_scratch[thread + step];
        }
        workgroupBarrier();
    }
    let sum = lane_scratch[thread - lane];
    workgroupBarrier();
    return sum;
}
#endif

// The activation's elements 4c..4c+3 for list entry i, before any scaling by the norm.
fn load_x(i: u32, entry: ActiveRow, c: u32) -> vec4<f32> {
#if MERGE
    let head = c * 4u / params.head_dim;
    let heads = IN_FEATURES / params.head_dim;
    let first = (i * heads + head) * SPLITS;
    let within = c - head * params.head_dim / 4u;
    var highest = -3.4028234e38;
    for (var s = 0u; s < SPLITS; s++) {
        highest = max(highest, stats[first + s].x);
    }
    var sum = vec4<f32>();
    var mass = 0.0;
    for (var s = 0u; s < SPLITS; s++) {
        let stat = stats[first + s];
        let share = exp(stat.x - highest);
        mass += share * stat.y;
        sum += share * x[(first + s) * (params.head_dim / 4u) + within];
    }
    return sum / mass;
#elif X_BY_ROW
    return x[entry.row * (IN_FEATURES / 4u) + c];
#else
    return x[i * (IN_FEATURES / 4u) + c];
#endif
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
#if SUBGROUP
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_width: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
#endif
) {
#if SUBGROUP
    let lane = subgroup_lane % LANES;
    let group = subgroup * (subgroup_width / LANES) + subgroup_lane / LANES;
#else
    let lane = index % LANES;
    let group = index / LANES;
#endif
    let thread = group * LANES + lane;
    let first_pair = (workgroup.x * GROUPS + group) * PAIRS;
    let first_entry = workgroup.y * ROWS;
    // Rows of w past the end are read as the last one and never stored.
    let last_row = params.num_outputs - 1u;

    var sums: array<f32, ROWS * OUTPUTS>;
    for (var s = 0u; s < ROWS * OUTPUTS; s++) {
        sums[s] = 0.0;
    }
#if NORM
    var square: array<f32, ROWS>;
    for (var m = 0u; m < ROWS; m++) {
        square[m] = 0.0;
    }
#endif

    for (var base = 0u; base < UNITS; base += CHUNK) {
        let units = min(CHUNK, UNITS - base);
#if !STREAM
        var ahead: array<WeightUnit, PREFETCH * OUTPUTS>;
        for (var p = 0u; p < PREFETCH; p++) {
            let unit = min(p * LANES + lane, units - 1u);
            for (var o = 0u; o < OUTPUTS; o++) {
                ahead[p * OUTPUTS + o] = w[min(first_pair * 2u + o, last_row) * UNITS + base + unit];
            }
        }
#endif
        for (var m = 0u; m < ROWS; m++) {
            let entry = active_rows[first_entry + m];
            for (var c = thread; c < units * 2u; c += THREADS) {
                var value = vec4<f32>();
                if entry.row != NONE {
                    value = load_x(first_entry + m, entry, base * 2u + c);
                }
#if NORM
                square[m] += dot(value, value);
                value *= norm_weight[base * 2u + c];
#endif
                staged[m * ROW_STRIDE + padded(c)] = value;
            }
        }
        workgroupBarrier();
#if STREAM
        // A software rasteriser waits for memory: the activation is held and each row of w read from end to end,
        // which its caches foresee.
        for (var first = 0u; first < units; first += STREAM * LANES) {
            var held: array<vec4<f32>, 2u * ROWS * STREAM>;
            for (var h = 0u; h < STREAM; h++) {
                let unit = first + h * LANES + lane;
                for (var m = 0u; m < ROWS; m++) {
                    let at = m * ROW_STRIDE + padded(2u * min(unit, units - 1u));
                    held[2u * (m * STREAM + h)] = select(vec4<f32>(), staged[at], unit < units);
                    held[2u * (m * STREAM + h) + 1u] = select(vec4<f32>(), staged[at + 1u], unit < units);
                }
            }
            for (var o = 0u; o < OUTPUTS; o++) {
                let start = min(first_pair * 2u + o, last_row) * UNITS + base;
                for (var h = 0u; h < STREAM; h++) {
                    let weights = unpack_weights(w[start + min(first + h * LANES + lane, units - 1u)]);
                    for (var m = 0u; m < ROWS; m++) {
                        let at = 2u * (m * STREAM + h);
                        sums[m * OUTPUTS + o] += dot(weights[0], held[at]) + dot(weights[1], held[at + 1u]);
                    }
                }
            }
        }
#else
        for (var p = 0u; p < PREFETCH; p++) {
            let unit = p * LANES + lane;
            if unit < units {
                for (var m = 0u; m < ROWS; m++) {
                    let x0 = staged[m * ROW_STRIDE + padded(2u * unit)];
                    let x1 = staged[m * ROW_STRIDE + padded(2u * unit + 1u)];
                    for (var o = 0u; o < OUTPUTS; o++) {
                        let weights = unpack_weights(ahead[p * OUTPUTS + o]);
                        sums[m * OUTPUTS + o] += dot(weights[0], x0) + dot(weights[1], x1);
                    }
                }
            }
        }
        for (var unit = PREFETCH * LANES + lane; unit < units; unit += LANES) {
            var weights: array<mat2x4<f32>, OUTPUTS>;
            for (var o = 0u; o < OUTPUTS; o++) {
                weights[o] = unpack_weights(w[min(first_pair * 2u + o, last_row) * UNITS + base + unit]);
            }
            for (var m = 0u; m < ROWS; m++) {
                let x0 = staged[m * ROW_STRIDE + padded(2u * unit)];
                let x1 = staged[m * ROW_STRIDE + padded(2u * unit + 1u)];
                for (var o = 0u; o < OUTPUTS; o++) {
                    sums[m * OUTPUTS + o] += dot(weights[o][0], x0) + dot(weights[o][1], x1);
                }
            }
        }
#endif
        // The next chunk overwrites the staged activation.
        workgroupBarrier();
    }

#if NORM
    for (var m = 0u; m < ROWS; m++) {
        squares[m * THREADS + thread] = square[m];
    }
    workgroupBarrier();
#endif
    for (var m = 0u; m < ROWS; m++) {
        var factor = 1.0;
#if NORM
        var total = 0.0;
        for (var t = lane; t < THREADS; t += LANES) {
            total += squares[m * THREADS + t];
        }
        factor = inverseSqrt(lane_sum(total, thread, lane) / f32(IN_FEATURES) + params.eps);
#endif
        let entry = active_rows[first_entry + m];
        for (var p = 0u; p < PAIRS; p++) {
            let a = lane_sum(sums[m * OUTPUTS + 2u * p], thread, lane);
            let b = lane_sum(sums[m * OUTPUTS + 2u * p + 1u], thread, lane);
            let o = 2u * (first_pair + p);
            if lane == 0u && entry.row != NONE && o < params.num_outputs {
                epilogue(first_entry + m, entry, params.first_output + o, vec2<f32>(a, b) * factor);
            }
        }
    }
}
