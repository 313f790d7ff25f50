// linear: y = x W^T for many rows, with RMSNorm before it and an epilogue after it.
// Math      y[i, o] = sum_k f(x)[i, k] * w[o, k]; f: identity, or RMSNorm of row r = active_rows[i].row; then
//           shared/epilogue.wgsl. A norm between two products may be both's: the first, of rows out[r], leaves next_x[i] =
//           next_weight / 16 * out[r] and next_squares[p, i], what the squares of part p of the row add up to; the second
//           divides y[i] by the root mean square
// Why       every value fetched is used many times. STAGED: a workgroup shares tiles of x and w in workgroup memory,
//           the next tiles in flight while these are multiplied, and SPLIT_K parts of it multiply a slice of K each,
//           which fills a GPU whose output has few tiles; COOPERATIVE: matrix units multiply; PARTED: where tiles are fewer
//           than processors and inputs many, workgroups multiply a part of the inputs each, and whoever comes last adds up.
//           Otherwise, for software rasterisers, where a load costs a loop over the lanes: no barrier, and with BROADCAST each
//           lane loads one row of x for all
// Shapes    active_rows [n]; x compact [n, K] or stream [T, K] (X_BY_ROW) f32, compact f16 (X_F16); K a multiple of 8; w [O, K]
//           units of 8 or quantised rows; norm_weight [K] f32; next_x [n, O] f16; next_squares, x_squares [parts, n] f32,
//           parts part_stride apart; part_sums [tiles, K_PARTS, TILE_M * TILE_N] f32 in an order of its own; arrivals [tiles],
//           0 before and after; outputs as the epilogue says; row-major
// Bindings  0 params uniform; 1 active_rows read; 2 w read; 3 x read; 4 out write; 5 norm_weight read [NORM];
//           5 x_squares read [SCALED]; 6 residual read [RESIDUAL, BLOCK_END]; 6 rope read [QKV];
//           7 copy write [RESIDUAL_COPY]; 7 gates read [BLOCK_END]; 7 k_cache write [QKV];
//           8 running write [RUNNING]; 8 v_cache write [QKV]; 9 encoding read [ENCODED];
//           10 next_weight read [NEXT_NORM]; 11 next_x write [NEXT_NORM]; 12 next_squares write [NEXT_NORM];
//           13 part_sums write [PARTED]; 14 arrivals write [PARTED]
// Grid      (ceil(O / TILE_N), ceil(n / TILE_M), 1), PARTED: K_PARTS along z; one workgroup per tile of the output and part.
//           A slice's threads own THREAD_M rows of THREAD_N columns each; COOPERATIVE: its subgroups own FRAGMENTS_M *
//           FRAGMENTS_N fragments of EDGE x EDGE each
// Spec      IN_FEATURES = K, or ANY_K: one kernel for products that differ in nothing but K; TILE_M <= ROW_PADDING, TILE_N, THREAD_M,
//           THREAD_N even; X_BY_ROW; STAGED: TILE_K multiple of 8, WHOLE_TILES if that divides K, AHEAD tiles on their way,
//           ONE_AHEAD if that is 1, WRITTEN_OUT if compilers may write the loop over them out, SPLIT_K slices of TILE_K in whole
//           vec4s, if there are several THREAD_M * THREAD_N a multiple of 4 and a slice's sums no more than the memory of the tiles;
//           COOPERATIVE, of STAGED: EDGE 16, or 8 (EDGE_8), FRAGMENTS_M rows of FRAGMENTS_N fragments of each subgroup, STEPS *
//           EDGE = TILE_K / SPLIT_K, SUBGROUP_WIDTH the size of all subgroups, QUADS if that is at most EDGE * EDGE / 4 and the
//           epilogue allows, SLICED if SPLIT_K > 1, ROWS_EARLY if a thread has registers for its rows' entries while it multiplies, X_F16 and
//           OUT_F16 as x's producer and out's readers have it; NORM, of STAGED: TILE_K / 4 divides the number of threads;
//           otherwise THREAD_M = TILE_M, SPLIT_K = 1; BROADCAST: TILE_M and all subgroups 8; WEIGHT_F16 or WEIGHT_BF16 or
//           neither, or QUANTISED: WEIGHT_Q8 or WEIGHT_Q4 in groups of GROUP; WIDE_LOADS: COOPERATIVE and WEIGHT_Q8; STORE, GELU, RESIDUAL (RESIDUAL_COPY),
//           SWIGLU, QKV, BLOCK_END (RUNNING): the epilogue; KV_F16: QKV into f16 caches, KV_STAGED: or rows; SCALED, of
//           COOPERATIVE and X_F16: another kernel has begun the norm, and left squares in PARTS parts; NEXT_NORM, of
//           COOPERATIVE: RESIDUAL begins the next one, LANES = EDGE / columns of a lane; PARTED, of COOPERATIVE without NORM
//           and EDGE_8: K_PARTS parts, no more than ceil(K / TILE_K), coherent storage; DELTA, of SWIGLU and QKV: added to
//           y; ENCODED, of RESIDUAL and the block ends: multiplied with what the layer adds up to
// Limits    workgroup memory in bytes, STAGED: 16 * (TILE_M + TILE_N) * (TILE_K / 4 + 1), with NORM
//           4 * TILE_M * (TILE_K / 4 + 2) more; COOPERATIVE: 8 * (TILE_M + TILE_N) * (TILE_K / 4 + 2) and
//           1024 a subgroup, with NORM at least 4 * TILE_M * (TILE_K / 4 + 1), and 4 * TILE_M more, with PARTED 16;
//           EDGE_8: 256 a subgroup, with NORM both, with SCALED 4 * TILE_M more
// Numerics  f32; sums in ascending k, slices and then parts added in ascending order, whoever adds them. NORM, SCALED: the
//           product of x * norm_weight is divided by the root mean square. COOPERATIVE: x, or x * norm_weight / 16, and w are
//           rounded to f16, infinite above 65504; exact products, sums in f32 in the matrix unit's order
// Source    Llama projections (arXiv 2302.13971); MoR block end (arXiv 2507.10524)
#if COOPERATIVE
enable f16;
enable wgpu_cooperative_matrix;
#endif
#import shared/rows
#import shared/weights
#import shared/quantized_units
#if NEXT_NORM
#import shared/lanes
#endif

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
    delta_start: u32,
    part_stride: u32,
}

#import linear/units

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> active_rows: array<ActiveRow>;
@group(0) @binding(2) var<storage, read> w: array<StoredUnit>;
#if X_F16
alias XUnit = vec4<u32>;
// Elements of a unit of x.
const X_UNIT: u32 = 8u;
#else
alias XUnit = vec4<f32>;
const X_UNIT: u32 = 4u;
#endif
@group(0) @binding(3) var<storage, read> x: array<XUnit>;
#if NORM
@group(0) @binding(5) var<storage, read> norm_weight: array<vec4<f32>>;
#endif
#if OUT_F16
alias Inner = f16;
#else
alias Inner = f32;
#endif
#import shared/epilogue
#if SCALED
// Sums of squares of the rows of x, in PARTS parts.
@group(0) @binding(5) var<storage, read> x_squares: array<f32>;
#endif
#if PARTED
// Sums of each tile's parts, and how many of these have come.
@group(0) @binding(13) @coherent var<storage, read_write> part_sums: array<Columns>;
@group(0) @binding(14) var<storage, read_write> arrivals: array<atomic<u32>>;
#endif
#if NEXT_NORM
@group(0) @binding(10) var<storage, read> next_weight: array<Columns>;
@group(0) @binding(11) var<storage, read_write> next_x: array<HalfColumns>;
@group(0) @binding(12) var<storage, read_write> next_squares: array<f32>;
#endif

// What rows are multiplied with beside a norm's weight, until they are divided by their root mean square: as halves, which end at 65504,
// they would become infinite at a sixteenth of the size. A power of two, so that nothing else is rounded otherwise.
#if COOPERATIVE
const HEADROOM: f32 = 0.0625;
#else
const HEADROOM: f32 = 1.0;
#endif

// K.
fn in_features() -> u32 {
#if ANY_K
    return params.in_features;
#else
    return IN_FEATURES;
#endif
}

// Units of a row of w.
fn num_units() -> u32 {
    return in_features() / 8u;
}

#if COOPERATIVE
#if EDGE_8
alias MatrixA = coop_mat8x8<f16, A>;
alias MatrixB = coop_mat8x8<f16, B>;
alias Sums = coop_mat8x8<f32, C>;
#else
alias MatrixA = coop_mat16x16<f16, A>;
alias MatrixB = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;
#endif
const SUBGROUPS_M: u32 = TILE_M / (FRAGMENTS_M * EDGE);
const SUBGROUPS_N: u32 = TILE_N / (FRAGMENTS_N * EDGE);
// Subgroups of a slice.
const SLICE: u32 = SUBGROUPS_M * SUBGROUPS_N;
const THREADS: u32 = SLICE * SPLIT_K * SUBGROUP_WIDTH;
// Rows whose squares a thread adds up.
const THREAD_ROWS: u32 = (TILE_M + THREADS - 1u) / THREADS;
#else
const THREADS_M: u32 = TILE_M / THREAD_M;
const THREADS_N: u32 = TILE_N / THREAD_N;
// Threads of a slice.
const SLICE: u32 = THREADS_M * THREADS_N;
const THREADS: u32 = SLICE * SPLIT_K;
const SUMS: u32 = THREAD_M * THREAD_N;

fn multiply_add(a: vec4<f32>, b: vec4<f32>, sum: f32) -> f32 {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, sum))));
}
#endif

#if STAGED
// Past the end of a row x is zero and w any weight.
fn load_x(start: u32, c: u32) -> XUnit {
#if WHOLE_TILES
    return x[start + c];
#else
    var value = XUnit();
    if c < in_features() / X_UNIT {
        value = x[start + c];
    }
    return value;
#endif
}

// Unit of a row of weights that is loaded in place of `unit`.
fn inside(unit: u32) -> u32 {
#if WHOLE_TILES
    return unit;
#else
    return min(unit, num_units() - 1u);
#endif
}

fn load_w(start: u32, unit: u32) -> LoadUnit {
    return fetch(start, inside(unit));
}
#if NORM

fn load_norm_weight(c: u32) -> vec4<f32> {
    return norm_weight[2u * inside(c / 2u) + c % 2u];
}
#endif
#endif

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
#import linear/tiles
#else
// Adds 8 inputs of row m, `low` then `high`, times the weights `b`.
fn add_row(m: u32, low: vec4<f32>, high: vec4<f32>, b: ptr<function, array<mat2x4<f32>, THREAD_N>>, sums: ptr<function, array<f32, SUMS>>) {
    for (var j = 0u; j < THREAD_N; j++) {
        let sum = multiply_add(low, (*b)[j][0], (*sums)[m * THREAD_N + j]);
        (*sums)[m * THREAD_N + j] = multiply_add(high, (*b)[j][1], sum);
    }
}
#endif
#if COOPERATIVE
#import linear/places
#endif

// Loads the tiles from $UNIT on into registers of set a; the last ones in place of those past the end.
#block LOAD UNIT
    let next = min($UNIT, last);
    for (var l = 0u; l < X_LOADS; l++) {
        let c = next * (8u / X_UNIT) + (thread + l * THREADS) % X_COLUMNS;
        x_ahead[a * X_LOADS + l] = load_x(x_from[l], c);
    }
    for (var l = 0u; l < W_LOADS; l++) {
        w_ahead[a * W_LOADS + l] = load_w(w_from[l], next + (thread + l * THREADS) % TILE_RUNS * RUN);
    }
#if NORM
    norm_ahead[a] = load_norm_weight(next * 2u + column);
#endif
#endblock

// Stages those of set $SET, of the tiles at `staged`.
#block STAGE SET
    for (var l = 0u; l < X_LOADS; l++) {
        let at = thread + l * THREADS;
        if TILE_M * X_COLUMNS % THREADS == 0u || at < TILE_M * X_COLUMNS {
            let value = x_ahead[($SET) * X_LOADS + l];
#if NORM
            square[l] += select(0.0, dot(value, value), staged < units);
            stage_x(tile_row(at, X_COLUMNS), column, value * (HEADROOM * norm_ahead[$SET]));
#else
            stage_x(tile_row(at, X_COLUMNS), at % X_COLUMNS, value);
#endif
        }
    }
    for (var l = 0u; l < W_LOADS; l++) {
        let at = thread + l * THREADS;
        if TILE_N * TILE_RUNS % THREADS == 0u || at < TILE_N * TILE_RUNS {
            stage_w(tile_row(at, TILE_RUNS), at % TILE_RUNS, w_ahead[($SET) * W_LOADS + l]);
        }
    }
#endblock

// Has the loads of set $SET begin before this.
#block HOLD SET
    // This branch is never taken, which no compiler can know either: one that did would move the loads to where their
    // values are used, and the products would not hide how long they take. What it needs must not be what staging
    // computes of them, or that is computed at once; and without a loop it is a few instructions that are skipped one
    // by one. Either way all would wait for the loads here.
    if base == params.in_features {
        var all = vec4<u32>();
        for (var l = 0u; l < X_LOADS; l++) {
            all ^= bitcast<vec4<u32>>(x_ahead[$SET * X_LOADS + l]);
        }
        for (var l = 0u; l < W_LOADS; l++) {
            all ^= bits_of(w_ahead[$SET * W_LOADS + l]);
        }
#if NORM
        all ^= bitcast<vec4<u32>>(norm_ahead[$SET]);
#endif
        for (var i = 0u; i < params.in_features; i += params.num_outputs) {
#if EDGE_8
            tiles[i] = f16(f32(all.x ^ all.y ^ all.z ^ all.w));
#else
            tiles[i] = TileUnit(vec4<f32>(all));
#endif
        }
    }
#endblock

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
#if COOPERATIVE
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
#endif
#if BROADCAST
    @builtin(subgroup_invocation_id) lane: u32,
#endif
) {
    let units = num_units();
    let first_entry = workgroup.y * TILE_M;
    let first_column = workgroup.x * TILE_N;
    // Columns past the end are computed as the last one and not stored.
    let last_column = params.num_outputs - 1u;
#if COOPERATIVE
    let slice = subgroup / SLICE;
    let first_m = subgroup % SLICE / SUBGROUPS_N * FRAGMENTS_M * EDGE;
    let first_n = subgroup % SUBGROUPS_N * FRAGMENTS_N * EDGE;
    var sums: array<Sums, FRAGMENTS_M * FRAGMENTS_N>;
#repeat m FRAGMENTS_M
#repeat j FRAGMENTS_N
    sums[m * FRAGMENTS_N + j] = Sums();
#endrepeat
#endrepeat
#else
    let slice = thread / SLICE;
    let place = thread % SLICE;
    let thread_m = place / THREADS_N;
    let thread_n = place % THREADS_N;
    var sums: array<f32, SUMS>;
    for (var s = 0u; s < SUMS; s++) {
        sums[s] = 0.0;
    }
#endif

#if ROWS_EARLY
    var places = own_places(subgroup, lane);
    var entries = own_entries(first_entry, places);
#endif

#if STAGED
#if PARTED
    let num_tiles = (units + TILE_UNITS - 1u) / TILE_UNITS;
    let begin = workgroup.z * num_tiles / K_PARTS * TILE_UNITS;
    let end = min((workgroup.z + 1u) * num_tiles / K_PARTS * TILE_UNITS, units);
#else
    let begin = 0u;
    let end = units;
#endif
    // First unit of the last tiles.
    let last = (end - 1u) / TILE_UNITS * TILE_UNITS;
    var x_from: array<u32, X_LOADS>;
    for (var l = 0u; l < X_LOADS; l++) {
        let m = min(tile_row(thread + l * THREADS, X_COLUMNS), TILE_M - 1u);
        x_from[l] = source_row(first_entry, first_entry + m) * (in_features() / X_UNIT);
    }
    var w_from: array<u32, W_LOADS>;
    for (var l = 0u; l < W_LOADS; l++) {
        let n = tile_row(thread + l * THREADS, TILE_RUNS);
        w_from[l] = row_start(min(first_column + n, last_column));
    }
    var x_ahead: array<XUnit, AHEAD * X_LOADS>;
    var w_ahead: array<LoadUnit, AHEAD * W_LOADS>;
#if NORM
    // A thread loads one column of each tile of x.
    let column = thread % (TILE_K / 4u);
    var norm_ahead: array<vec4<f32>, AHEAD>;
    var square: array<f32, X_LOADS>;
    for (var l = 0u; l < X_LOADS; l++) {
        square[l] = 0.0;
    }
#endif
#if SCALED
    // First of all: behind the tiles they would hold up the tiles.
    var parts: array<f32, THREAD_ROWS * PARTS>;
    for (var r = 0u; r < THREAD_ROWS; r++) {
        for (var part = 0u; part < PARTS; part++) {
            parts[r * PARTS + part] = x_squares[part * params.part_stride + first_entry + min(thread + r * THREADS, TILE_M - 1u)];
        }
    }
#endif
#repeat a AHEAD
#use LOAD begin + a * TILE_UNITS
#endrepeat
#if SCALED
    // The factors of the tile's rows, for whoever stores them.
    for (var r = 0u; r < THREAD_ROWS; r++) {
        var sum = 0.0;
        for (var part = 0u; part < PARTS; part++) {
            sum += parts[r * PARTS + part];
        }
        let m = thread + r * THREADS;
        if m < TILE_M {
            scratch[m / WIDTH][m % WIDTH] = inverseSqrt(sum / f32(in_features()) + params.eps) / HEADROOM;
        }
    }
#endif
#if WRITTEN_OUT
    let turn = AHEAD * TILE_UNITS;
#else
    let staged = begin;
#use STAGE 0u
    workgroupBarrier();
    // Half of a flag is 0, which no compiler knows: they would write the loop out many times over, and instructions that ran
    // a layer ago take long to arrive.
    let turn = AHEAD * TILE_UNITS + (params.additive >> 1u);
#endif
    var base = begin;
    loop {
#repeat a AHEAD
#if WRITTEN_OUT
        let staged = base + a * TILE_UNITS;
#use STAGE a
        workgroupBarrier();
#endif
#use LOAD base + (a + AHEAD) * TILE_UNITS
#if WRITTEN_OUT
#use HOLD a
#endif
#if COOPERATIVE
#repeat step STEPS
        let c = (slice * STEPS + step) * EDGE_UNITS;
        var b: array<MatrixB, FRAGMENTS_N>;
#repeat j FRAGMENTS_N
        let start = W_TILE + (first_n + j * EDGE) * STRIDE + c;
        b[j] = coopLoad<MatrixB>(&tiles[start], STRIDE);
#endrepeat
#repeat m FRAGMENTS_M
        let start = (first_m + m * EDGE) * STRIDE + c;
        let a = coopLoadT<MatrixA>(&tiles[start], STRIDE);
#repeat j FRAGMENTS_N
        sums[m * FRAGMENTS_N + j] = coopMultiplyAdd(a, b[j], sums[m * FRAGMENTS_N + j]);
#endrepeat
#endrepeat
#endrepeat
#else
        for (var step = 0u; step < TILE_K / 4u / SPLIT_K; step++) {
            let c = slice * (TILE_K / 4u / SPLIT_K) + step;
            var b: array<vec4<f32>, THREAD_N>;
            for (var j = 0u; j < THREAD_N; j++) {
                let n = thread_n + j / 2u * THREADS_N + j % 2u * (TILE_N / 2u);
                b[j] = tiles[W_TILE + n * STRIDE + c];
            }
            for (var m = 0u; m < THREAD_M; m++) {
                let a = tiles[(thread_m + m * THREADS_M) * STRIDE + c];
                for (var j = 0u; j < THREAD_N; j++) {
                    sums[m * THREAD_N + j] = multiply_add(a, b[j], sums[m * THREAD_N + j]);
                }
            }
        }
#endif
#if !WRITTEN_OUT
#if ONE_AHEAD
        // Behind the barrier this set is staged, and compilers would have loaded it only there.
#use HOLD a
#endif
#endif
        // The next tiles overwrite these.
        workgroupBarrier();
#if !WRITTEN_OUT
        // What follows the last tiles is staged for nothing: a way out before would part the products from the loads that
        // run beside them.
        let staged = base + (a + 1u) * TILE_UNITS;
#use STAGE (a + 1u) % AHEAD
        workgroupBarrier();
#if !ONE_AHEAD
#use HOLD a
#endif
#endif
        if base + (a + 1u) * TILE_UNITS >= end {
            break;
        }
#endrepeat
        base += turn;
    }
#if NORM
    for (var l = 0u; l < X_LOADS; l++) {
        if TILE_M * X_COLUMNS % THREADS == 0u || thread + l * THREADS < TILE_M * X_COLUMNS {
            let at = tile_row(thread + l * THREADS, TILE_K / 4u) * SQUARES_STRIDE + column;
            scratch[at / WIDTH][at % WIDTH] = square[l];
        }
    }
    workgroupBarrier();
    for (var m = thread; m < TILE_M; m += THREADS) {
        var sum = 0.0;
        for (var c = 0u; c < TILE_K / 4u; c++) {
            let at = m * SQUARES_STRIDE + c;
            sum += scratch[at / WIDTH][at % WIDTH];
        }
        factors[m] = inverseSqrt(sum / f32(in_features()) + params.eps) / HEADROOM;
    }
    workgroupBarrier();
#endif
#else
    var w_from: array<u32, THREAD_N>;
    for (var j = 0u; j < THREAD_N; j++) {
        let n = first_column + 2u * (thread_n + j / 2u * THREADS_N) + j % 2u;
        w_from[j] = row_start(min(n, last_column));
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
            b[j] = unpack(fetch(w_from[j], unit));
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

#if COOPERATIVE
#if !ROWS_EARLY
    var places = own_places(subgroup, lane);
    var entries = own_entries(first_entry, places);
#endif
#if SCALED
    var own_factors: array<f32, FRAGMENTS_M * OWN>;
    for (var m = 0u; m < FRAGMENTS_M; m++) {
        for (var i = 0u; i < OWN; i++) {
            let row = place_row(places[i], m);
            own_factors[m * OWN + i] = scratch[row / WIDTH][row % WIDTH];
        }
    }
    // The results overwrite them.
    workgroupBarrier();
#endif
#if PARTED
#import linear/leave_part
#endif
#if NEXT_NORM
    var square: array<f32, OWN>;
#endif
#if BLOCK_END
    // Once for each row: what nobody has read since the block began is far away, and behind other loads further.
    var gates_of = own_gates(entries);
#endif
    var reads: array<Operands, OWN>;
    for (var i = 0u; i < OWN; i++) {
        let column = first_column + place_column(places[i], 0u);
        reads[i] = operands_inside(first_entry + place_row(places[i], 0u), entries[i], column);
    }
#repeat m FRAGMENTS_M
#if BLOCK_END
    var streams = own_streams(first_column, places, entries, m);
#endif
#if NEXT_NORM
    for (var i = 0u; i < OWN; i++) {
        square[i] = 0.0;
    }
#endif
#if PARTED
    var of_parts: array<Columns, FRAGMENTS_N * OWN>;
    for (var p = 0u; p < K_PARTS; p++) {
        var part: array<Columns, FRAGMENTS_N * OWN>;
        for (var f = 0u; f < FRAGMENTS_N * OWN; f++) {
            part[f] = part_sums[first_place + p * TILE_PLACES + part_place(m, f / OWN, f % OWN, lane_of_all)];
        }
        for (var f = 0u; f < FRAGMENTS_N * OWN; f++) {
            of_parts[f] += part[f];
        }
    }
#endif
#repeat j FRAGMENTS_N
#if !PARTED
#if EDGE_8
    coopStoreT(sums[m * FRAGMENTS_N + j], &results[subgroup * RESULT], EDGE);
#else
    coopStoreT(sums[m * FRAGMENTS_N + j], &scratch[subgroup * PLACES], ROW_COLUMNS);
#endif
#if SLICED
    workgroupBarrier();
#else
    subgroupBarrier();
#endif
#endif
    for (var i = 0u; i < OWN; i++) {
        let at = places[i];
        let tile_row = place_row(at, m);
        let column = first_column + place_column(at, j);
        let entry = entries[m * OWN + i];
#if BLOCK_END
        var read = reads[i];
        read.gate = gates_of[m * OWN + i];
        read.hidden = streams[j * OWN + i];
#else
        let read = reads[i];
#endif
        // What the next fragment needs is on its way meanwhile.
        if m + 1u < FRAGMENTS_M || j + 1u < FRAGMENTS_N {
            let next_m = min(m + (j + 1u) / FRAGMENTS_N, FRAGMENTS_M - 1u);
            let place = first_entry + place_row(at, next_m);
            let next_column = first_column + place_column(at, (j + 1u) % FRAGMENTS_N);
            reads[i] = operands_inside(place, entries[next_m * OWN + i], next_column);
        }
#if SLICED
        let is_own = subgroup * SUBGROUP_WIDTH + lane + i * THREADS < SLICE_PLACES;
#else
        let is_own = true;
#endif
        if is_own && entry.row != NONE && column < params.num_outputs {
#if PARTED
            var v = of_parts[j * OWN + i];
#else
            var v = Columns();
            for (var s = 0u; s < SPLIT_K; s++) {
#if EDGE_8
                v += result_columns(s * SLICE_PLACES + at);
#else
                v += scratch[s * SLICE_PLACES + at];
#endif
            }
#endif
#if NORM
            v *= factors[tile_row];
#endif
#if SCALED
            v *= own_factors[m * OWN + i];
#endif
            epilogue(first_entry + tile_row, entry, params.first_output + column, v, read);
#if NEXT_NORM
            let y = layer_output(v, read);
            next_x[((first_entry + tile_row) * params.out_stride + column) / WIDTH] = pack_halves(y * (HEADROOM * next_weight[column / WIDTH]));
            square[i] += dot(y, y);
#endif
        }
    }
#if !PARTED
    // The next fragment overwrites the results.
#if SLICED
    workgroupBarrier();
#else
    subgroupBarrier();
#endif
#endif
#endrepeat
#if NEXT_NORM
    for (var i = 0u; i < OWN; i++) {
        // Lanes next to each other have columns next to each other.
        let sum = lane_sum(square[i]);
        let at = places[i];
#if SLICED
        let is_own = subgroup * SUBGROUP_WIDTH + lane + i * THREADS < SLICE_PLACES;
#else
        let is_own = true;
#endif
        if is_own && at % ROW_COLUMNS == 0u && entries[m * OWN + i].row != NONE {
            let part = workgroup.x * SUBGROUPS_N + at / PLACES % SUBGROUPS_N;
            next_squares[part * params.part_stride + first_entry + place_row(at, m)] = sum;
        }
    }
#endif
#endrepeat
#else
#if STAGED
    // The first slice adds up the others' sums, which arrive through the memory of the tiles.
    for (var s = 1u; s < SPLIT_K; s++) {
        if slice == s {
            for (var v = 0u; v < SUMS / 4u; v++) {
                let first = v * 4u;
                tiles[v * SLICE + place] =
                    vec4<f32>(sums[first], sums[first + 1u], sums[first + 2u], sums[first + 3u]);
            }
        }
        workgroupBarrier();
        if slice == 0u {
            for (var v = 0u; v < SUMS / 4u; v++) {
                let other = tiles[v * SLICE + place];
                for (var i = 0u; i < 4u; i++) {
                    sums[v * 4u + i] += other[i];
                }
            }
        }
        workgroupBarrier();
    }
    if slice != 0u {
        return;
    }
#endif
    for (var m = 0u; m < THREAD_M; m++) {
        let tile_row = thread_m + m * THREADS_M;
        let i = first_entry + tile_row;
        let entry = active_rows[i];
        for (var j = 0u; j < THREAD_N; j += 2u) {
            let o = first_column + 2u * (thread_n + j / 2u * THREADS_N);
            if entry.row != NONE && o < params.num_outputs {
                var v = vec2<f32>(sums[m * THREAD_N + j], sums[m * THREAD_N + j + 1u]);
#if NORM
                v *= factors[tile_row];
#endif
                epilogue(i, entry, params.first_output + o, v, operands(i, entry, params.first_output + o));
            }
        }
    }
#endif
}
