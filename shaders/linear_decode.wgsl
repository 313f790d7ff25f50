// linear_decode: y = x W^T for few rows, with RMSNorm or the attention merge before it and an epilogue after it.
// Math      y[i, o] = sum_k f(x)[i, k] * w[o, k]; f: identity, RMSNorm of row r = active_rows[i].row, or the merge of
//           attention partials; then shared/epilogue.wgsl
// Why       the weights are the traffic: a block of them is always on its way to registers, the first before the activation is
//           staged, from addresses that wait for no other load; each is read once for ROWS rows, and every fusion saves a
//           dependent dispatch. DIGITS: codes meet an activation in integers, four products an instruction. A software
//           rasteriser reads a buffer lane by lane but texels whole, and a barrier costs it more than a product: there
//           (TEXELS) w is a storage texture (a sampled one pays for levels), LANES lanes hold the activation and share each
//           pair of outputs in turn, nothing is staged
// Shapes    active_rows [n]; w [O, K] units of 8, or quantised rows; x compact [n, K], stream [T, K] (X_BY_ROW) or
//           partials [n, H, S, hd] (MERGE); norm_weight [K]; stats [n, H, S] (max, sum); outputs as the epilogue says
// Bindings  0 params uniform; 1 active_rows read; 2 w read [!TEXELS]; 2 w_texels texture [TEXELS]; 3 x read;
//           4 out write; 5 norm_weight read [NORM]; 5 stats read [MERGE];
//           6 residual read [RESIDUAL, BLOCK_END]; 6 rope read [QKV];
//           7 copy write [RESIDUAL_COPY]; 7 gates read [BLOCK_END]; 7 k_cache write [QKV];
//           8 running write [RUNNING]; 8 v_cache write [QKV]; 9 encoding read [ENCODED]
// Grid      (ceil(O / (2 * GROUPS * PAIRS * ROUNDS)), ceil(n / ROWS), 1) workgroups; GROUPS lane groups of LANES lanes,
//           each owns PAIRS pairs of outputs, ROUNDS times over
// Spec      NUM_OUTPUTS of this call; IN_FEATURES multiple of 8; UNIT elements fetched at once, 8 or, WIDE, of a
//           quantised row 16 bytes of codes; CHUNK units staged or held at a time, in whole blocks; ROWS, PAIRS, LANES,
//           GROUPS; BLOCK units of an output that a lane has on their way; ROUNDS, more than one only where CHUNK is a
//           whole row; TEXELS: w in rows of TEXEL_ROW texels, GROUPS = 1, PAIRS a multiple of LANES, STEPS = CHUNK /
//           LANES; PARTS = UNIT / 8; NORM, or MERGE of SPLITS partials of heads of HEAD_DIM, or neither; X_BY_ROW;
//           SINGLE: streams have one row; SUBGROUP: lanes exchange by subgroup operations, SHUFFLES: by shuffles,
//           BUILT_IN: and are added by built-in sums, LANES being the subgroup size; WEIGHT_F16 or WEIGHT_BF16 or
//           neither, or QUANTISED: WEIGHT_Q8 or WEIGHT_Q4 in groups of GROUP; DIGITS, of WIDE; STORE, GELU,
//           RESIDUAL (RESIDUAL_COPY), SWIGLU, QKV, BLOCK_END (RUNNING): the epilogue; KV_F16: QKV into
//           f16 caches, KV_STAGED: or rows; DELTA, of SWIGLU and QKV: added to y; ENCODED, of RESIDUAL and the block ends: multiplied with
//           what the layer adds up to
// Limits    16 * ROWS * (2 * CHUNK * PARTS + CHUNK * PARTS / 4 + 1) bytes of workgroup memory, with DIGITS
//           24 * ROWS * CHUNK * PARTS, with NORM 4 * ROWS * GROUPS * LANES more, without SUBGROUP 4 * GROUPS * LANES more;
//           with TEXELS the last alone
// Numerics  f32; lane-strided partial sums, then a tree over lanes; codes are summed before they are scaled. DIGITS: the
//           activation is off by less than 2^-15 of the greatest of eight, whose products with codes are exact
// Source    Llama projections (arXiv 2302.13971); MoR block end (arXiv 2507.10524)
#import shared/rows
#import shared/weights
#import shared/quantized_units
#import shared/digits
#if SHUFFLES
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

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> active_rows: array<ActiveRow>;
#if TEXELS
@group(0) @binding(2) var w_texels: texture_storage_2d<rgba32uint, read>;
#elif QUANTISED
@group(0) @binding(2) var<storage, read> w: array<vec4<u32>>;
#else
@group(0) @binding(2) var<storage, read> w: array<WeightUnit>;
#else
@group(0) @binding(2) var<storage, read> w: array<WeightUnit>;
#endif
@group(0) @binding(3) var<storage, read> x: array<vec4<f32>>;
#if NORM
@group(0) @binding(5) var<storage, read> norm_weight: array<vec4<f32>>;
#endif
#if MERGE
@group(0) @binding(5) var<storage, read> stats: array<vec2<f32>>;
#endif
alias Inner = f32;
#import shared/epilogue

const UNITS: u32 = (IN_FEATURES + UNIT - 1u) / UNIT;
const THREADS: u32 = LANES * GROUPS;
#if !TEXELS
const OUTPUTS: u32 = 2u * PAIRS;
// Units of a row with those of its last block that are not there, whose inputs are zero.
const WHOLE_BLOCKS: u32 = (UNITS + BLOCK * LANES - 1u) / (BLOCK * LANES) * (BLOCK * LANES);
#if DIGITS
// As [ROWS, PARTS, CHUNK]: neighbouring lanes read neighbouring vectors. Of each eight its digits, its step and its sum.
var<workgroup> staged: array<vec4<u32>, ROWS * PARTS * CHUNK>;
var<workgroup> staged_steps: array<vec2<f32>, ROWS * PARTS * CHUNK>;
#else
// One vec4 of padding after every 8 spreads the lanes' strided reads over the banks.
const ROW_STRIDE: u32 = CHUNK * PARTS * 2u + CHUNK * PARTS / 4u + 1u;

var<workgroup> staged: array<vec4<f32>, ROWS * ROW_STRIDE>;
#endif
#if NORM
var<workgroup> squares: array<f32, ROWS * THREADS>;
#endif
#endif
#if !SUBGROUP
var<workgroup> lane_scratch: array<f32, THREADS>;
#endif

#if TEXELS
fn texel(at: u32) -> vec4<u32> {
    return textureLoad(w_texels, vec2<u32>(at % TEXEL_ROW, at / TEXEL_ROW));
}

#else
#if DIGITS
// Stages elements 8e..8e+7 of this chunk for row m.
fn stage_eight(m: u32, e: u32, low: vec4<f32>, high: vec4<f32>) {
#if WEIGHT_Q4
    let digits = digits_of(vec4<f32>(low.xz, high.xz), vec4<f32>(low.yw, high.yw));
#else
    let digits = digits_of(low, high);
#endif
    let to = (m * PARTS + e % PARTS) * CHUNK + e / PARTS;
    staged[to] = digits.words;
    staged_steps[to] = vec2<f32>(digits.step, digits.sum);
}
#else
fn padded(c: u32) -> u32 {
    return c + (c >> 3u);
}
#endif
#endif

#if QUANTISED
fn weight_word(at: u32) -> u32 {
#if TEXELS
    return texel(at / 4u)[at % 4u];
#else
    return w[at / 4u][at % 4u];
#endif
}

#if WIDE
struct LoadedUnit {
    codes: vec4<u32>,
    parameters: u32,
}

fn fetch(row: u32, unit: u32) -> LoadedUnit {
    let start = row * row_quads(IN_FEATURES);
    let parameters = weight_word(start * 4u + parameters_at(unit * UNIT / GROUP, IN_FEATURES));
#if TEXELS
    return LoadedUnit(texel(start + unit), parameters);
#else
    return LoadedUnit(w[start + unit], parameters);
#endif
}

// Elements 8 * part and the 7 after it, unscaled.
fn codes_of(loaded: LoadedUnit, part: u32) -> mat2x4<f32> {
#if WEIGHT_Q8
    return code_values(vec2<u32>(loaded.codes[2u * part], loaded.codes[2u * part + 1u]));
#else
    return code_values(loaded.codes[part]);
#endif
}
#if DIGITS

// The codes of elements 8 * part and the 7 after it, as their digits are.
fn part_words(codes: vec4<u32>, part: u32) -> vec2<u32> {
#if WEIGHT_Q8
    return vec2<u32>(codes[2u * part], codes[2u * part + 1u]);
#else
    return q4_words(codes[part]);
#endif
}
#endif
#else
alias LoadedUnit = QuantisedUnit;

fn fetch(row: u32, unit: u32) -> LoadedUnit {
    return load_unit(row * row_quads(IN_FEATURES), unit, IN_FEATURES);
}

fn codes_of(loaded: LoadedUnit, part: u32) -> mat2x4<f32> {
    return code_values(loaded.codes);
}
#endif
#endif

#if TEXELS
#if QUANTISED
fn weights_of(loaded: LoadedUnit, unit: u32, part: u32) -> mat2x4<f32> {
    return scaled(codes_of(loaded, part), unpack_parameters(loaded.parameters, unit * UNIT / GROUP));
}
#else
alias LoadedUnit = mat2x4<f32>;

fn fetch(row: u32, unit: u32) -> LoadedUnit {
#if WEIGHT_F16
    return unpack_weights(texel(row * UNITS + unit));
#elif WEIGHT_BF16
    return unpack_weights(texel(row * UNITS + unit));
#else
    let at = 2u * (row * UNITS + unit);
    return mat2x4<f32>(bitcast<vec4<f32>>(texel(at)), bitcast<vec4<f32>>(texel(at + 1u)));
#endif
}

fn weights_of(loaded: LoadedUnit, unit: u32, part: u32) -> mat2x4<f32> {
    return loaded;
}
#endif
#else
#if !QUANTISED
alias LoadedUnit = WeightUnit;

fn fetch(row: u32, unit: u32) -> LoadedUnit {
    return w[row * UNITS + unit];
}

#endif
// Adds what unit `base + unit` of the rows, as loaded, gives with the staged inputs.
fn add_unit(
    base: u32,
    unit: u32,
    loaded: ptr<function, array<LoadedUnit, OUTPUTS>>,
    sums: ptr<function, array<f32, ROWS * OUTPUTS>>,
) {
#if DIGITS
    for (var m = 0u; m < ROWS; m++) {
        var products: array<f32, OUTPUTS>;
        for (var o = 0u; o < OUTPUTS; o++) {
            products[o] = 0.0;
        }
        var inputs = 0.0;
#repeat part PARTS
        let at = (m * PARTS + part) * CHUNK + unit;
        let words = staged[at];
        let step = staged_steps[at];
        inputs += step.y;
        for (var o = 0u; o < OUTPUTS; o++) {
            products[o] += step.x * digit_product(part_words((*loaded)[o].codes, part), words);
        }
#endrepeat
        for (var o = 0u; o < OUTPUTS; o++) {
            let parameters = unpack_parameters((*loaded)[o].parameters, (base + unit) * UNIT / GROUP);
            (*sums)[m * OUTPUTS + o] += parameters.x * products[o];
#if WEIGHT_Q4
            (*sums)[m * OUTPUTS + o] += parameters.y * inputs;
#endif
        }
    }
#elif QUANTISED
    var products: array<f32, ROWS * OUTPUTS>;
    for (var s = 0u; s < ROWS * OUTPUTS; s++) {
        products[s] = 0.0;
    }
#if WEIGHT_Q4
    var inputs: array<f32, ROWS>;
    for (var m = 0u; m < ROWS; m++) {
        inputs[m] = 0.0;
    }
#endif
#repeat part PARTS
    var weights: array<mat2x4<f32>, OUTPUTS>;
    for (var o = 0u; o < OUTPUTS; o++) {
        weights[o] = codes_of((*loaded)[o], part);
    }
    let c = 2u * (PARTS * unit + part);
    for (var m = 0u; m < ROWS; m++) {
        let x0 = staged[m * ROW_STRIDE + padded(c)];
        let x1 = staged[m * ROW_STRIDE + padded(c + 1u)];
#if WEIGHT_Q4
        inputs[m] += dot(x0 + x1, vec4<f32>(1.0));
#endif
        for (var o = 0u; o < OUTPUTS; o++) {
            products[m * OUTPUTS + o] += dot(weights[o][0], x0) + dot(weights[o][1], x1);
        }
    }
#endrepeat
    for (var o = 0u; o < OUTPUTS; o++) {
        let parameters = unpack_parameters((*loaded)[o].parameters, (base + unit) * UNIT / GROUP);
        for (var m = 0u; m < ROWS; m++) {
            (*sums)[m * OUTPUTS + o] += parameters.x * products[m * OUTPUTS + o];
#if WEIGHT_Q4
            (*sums)[m * OUTPUTS + o] += parameters.y * inputs[m];
#endif
        }
    }
#else
    for (var m = 0u; m < ROWS; m++) {
        let x0 = staged[m * ROW_STRIDE + padded(2u * unit)];
        let x1 = staged[m * ROW_STRIDE + padded(2u * unit + 1u)];
        for (var o = 0u; o < OUTPUTS; o++) {
            let weights = unpack_weights((*loaded)[o]);
            (*sums)[m * OUTPUTS + o] += dot(weights[0], x0) + dot(weights[1], x1);
        }
    }
#endif
}
#endif

// Sums over a group's lanes, of one value and of two, for every lane.
#if SHUFFLES
fn group_sum(value: f32, thread: u32, lane: u32) -> f32 {
    return lane_sum(value);
}

fn group_sums(values: vec2<f32>, thread: u32, lane: u32) -> vec2<f32> {
#if BUILT_IN
    return vec2<f32>(subgroupAdd(values.x), subgroupAdd(values.y));
#else
    let sum = lane_sums(values, lane);
    let other = subgroupShuffleXor(sum, 1u);
    return select(vec2<f32>(sum, other), vec2<f32>(other, sum), lane % 2u == 1u);
#endif
}
#else
fn group_sum(value: f32, thread: u32, lane: u32) -> f32 {
#if SUBGROUP
    // A software rasteriser adds and shuffles lane by lane but broadcasts in one instruction.
    var sum = 0.0;
#repeat giver LANES
    sum += subgroupBroadcast(value, giver);
#endrepeat
    return sum;
#else
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
#endif
}

fn group_sums(values: vec2<f32>, thread: u32, lane: u32) -> vec2<f32> {
    return vec2<f32>(group_sum(values.x, thread, lane), group_sum(values.y, thread, lane));
}
#endif

#if !TEXELS
// Rows of w past the end are read as the last one and never stored.
fn weight_row(row: u32) -> u32 {
    return select(min(row, NUM_OUTPUTS - 1u), row, NUM_OUTPUTS % (OUTPUTS * GROUPS * ROUNDS) == 0u);
}

// The first of the outputs that a lane group computes in `round`.
fn first_output(workgroup: u32, round: u32, group: u32) -> u32 {
    return ((workgroup * ROUNDS + round) * GROUPS + group) * OUTPUTS;
}

#endif
fn list_entry(i: u32) -> ActiveRow {
    var entry = active_rows[i];
#if SINGLE
    // Streams of one row have no other, and a list without it dispatches nothing: x need not wait for the list.
    entry.row = 0u;
#endif
    return entry;
}

#if !TEXELS
// What the epilogue reads for outputs `o` and `o + 1` of this call, if they are to be stored.
fn operands_of(i: u32, o: u32) -> Operands {
    let entry = list_entry(i);
    var read: Operands;
    if entry.row != NONE && o < NUM_OUTPUTS {
        read = operands(i, entry, params.first_output + o);
    }
    return read;
}

#endif
// The activation's elements 4c..4c+3 for list entry i, before any scaling by the norm.
fn load_x(i: u32, entry: ActiveRow, c: u32) -> vec4<f32> {
#if MERGE
    let head = c / (HEAD_DIM / 4u);
    let first = (i * (IN_FEATURES / HEAD_DIM) + head) * SPLITS;
    let within = c % (HEAD_DIM / 4u);
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
        sum += share * x[(first + s) * (HEAD_DIM / 4u) + within];
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
#if TEXELS
    let thread = lane;
    let first_entry = workgroup.y * ROWS;
    // Units past the end are held as zeros, rows of w past the end read as the last one and never stored.
    let last_row = NUM_OUTPUTS - 1u;

    // Indexed by the loop's own variable alone, which makes compilers unroll the loop and keep registers.
    var low: array<array<array<vec4<f32>, PARTS>, STEPS>, ROWS>;
    var high: array<array<array<vec4<f32>, PARTS>, STEPS>, ROWS>;
    var factor: array<f32, ROWS>;
    for (var m = 0u; m < ROWS; m++) {
        factor[m] = 1.0;
    }
#if NORM
    var square: array<f32, ROWS>;
    for (var m = 0u; m < ROWS; m++) {
        square[m] = 0.0;
    }
#endif
    for (var block = 0u; block < PAIRS; block += LANES) {
        // The lane's pair of this block of LANES pairs.
        let mine = 2u * (workgroup.x * PAIRS + block + lane);
        var sums: array<vec2<f32>, ROWS>;
        for (var m = 0u; m < ROWS; m++) {
            sums[m] = vec2<f32>();
        }
        for (var base = 0u; base < UNITS; base += CHUNK) {
            // Held for all blocks where one chunk is the whole row.
            if block == 0u || CHUNK < UNITS {
                for (var m = 0u; m < ROWS; m++) {
                    let entry = list_entry(first_entry + m);
                    for (var h = 0u; h < STEPS; h++) {
#repeat part PARTS
                        let c = 2u * (PARTS * (base + h * LANES + lane) + part);
                        var x0 = vec4<f32>();
                        var x1 = vec4<f32>();
                        if entry.row != NONE && c < IN_FEATURES / 4u {
                            x0 = load_x(first_entry + m, entry, c);
                            x1 = load_x(first_entry + m, entry, c + 1u);
#if NORM
                            if block == 0u {
                                square[m] += dot(x0, x0) + dot(x1, x1);
                            }
                            x0 *= norm_weight[c];
                            x1 *= norm_weight[c + 1u];
#endif
                        }
                        low[m][h][part] = x0;
                        high[m][h][part] = x1;
#endrepeat
                    }
                }
            }
            for (var pair = 0u; pair < LANES; pair++) {
                let output = 2u * (workgroup.x * PAIRS + block + pair);
                let row = min(output, last_row);
                let next_row = min(output + 1u, last_row);
                var partial: array<vec2<f32>, ROWS>;
                for (var m = 0u; m < ROWS; m++) {
                    partial[m] = vec2<f32>();
                }
                for (var h = 0u; h < STEPS; h++) {
                    let unit = min(base + h * LANES + lane, UNITS - 1u);
                    let loaded = fetch(row, unit);
                    let next_loaded = fetch(next_row, unit);
#repeat part PARTS
                    let a = weights_of(loaded, unit, part);
                    let b = weights_of(next_loaded, unit, part);
                    for (var m = 0u; m < ROWS; m++) {
                        partial[m] += vec2<f32>(
                            dot(a[0], low[m][h][part]) + dot(a[1], high[m][h][part]),
                            dot(b[0], low[m][h][part]) + dot(b[1], high[m][h][part]),
                        );
                    }
#endrepeat
                }
                for (var m = 0u; m < ROWS; m++) {
                    let sum = group_sums(partial[m], thread, lane);
                    sums[m] += select(vec2<f32>(), sum, pair == lane);
                }
            }
        }
#if NORM
        if block == 0u {
            for (var m = 0u; m < ROWS; m++) {
                factor[m] = inverseSqrt(group_sum(square[m], thread, lane) / f32(IN_FEATURES) + params.eps);
            }
        }
#endif
        for (var m = 0u; m < ROWS; m++) {
            let entry = list_entry(first_entry + m);
            if entry.row != NONE && mine < NUM_OUTPUTS {
                let o = params.first_output + mine;
                epilogue(first_entry + m, entry, o, sums[m] * factor[m], operands(first_entry + m, entry, o));
            }
        }
    }
#else
    let thread = group * LANES + lane;
    let first_entry = workgroup.y * ROWS;

    var ahead: array<LoadedUnit, BLOCK * OUTPUTS>;
    for (var p = 0u; p < BLOCK; p++) {
        let unit = min(p * LANES + lane, UNITS - 1u);
        for (var o = 0u; o < OUTPUTS; o++) {
            ahead[p * OUTPUTS + o] = fetch(weight_row(first_output(workgroup.x, 0u, group) + o), unit);
        }
    }
    var read: array<Operands, ROWS * PAIRS>;
    for (var m = 0u; m < ROWS; m++) {
        for (var p = 0u; p < PAIRS; p++) {
            read[m * PAIRS + p] = operands_of(first_entry + m, first_output(workgroup.x, 0u, group) + 2u * p);
        }
    }
    var factor: array<f32, ROWS>;
#if NORM
    var square: array<f32, ROWS>;
#endif
    for (var m = 0u; m < ROWS; m++) {
        factor[m] = 1.0;
#if NORM
        square[m] = 0.0;
#endif
    }
    var sums: array<f32, ROWS * OUTPUTS>;
    for (var s = 0u; s < ROWS * OUTPUTS; s++) {
        sums[s] = 0.0;
    }

    for (var base = 0u; base < UNITS; base += CHUNK) {
        if base > 0u {
            workgroupBarrier();
        }
        for (var m = 0u; m < ROWS; m++) {
            let entry = list_entry(first_entry + m);
#if DIGITS
            for (var e = thread; e < min(CHUNK, WHOLE_BLOCKS - base) * PARTS; e += THREADS) {
                let at = 2u * (base * PARTS + e);
                var low = vec4<f32>();
                var high = vec4<f32>();
                if entry.row != NONE && at < IN_FEATURES / 4u {
                    low = load_x(first_entry + m, entry, at);
                    high = load_x(first_entry + m, entry, at + 1u);
                }
#if NORM
                square[m] += dot(low, low) + dot(high, high);
                low *= norm_weight[min(at, IN_FEATURES / 4u - 2u)];
                high *= norm_weight[min(at, IN_FEATURES / 4u - 2u) + 1u];
#endif
                stage_eight(m, e, low, high);
            }
#else
            for (var c = thread; c < min(CHUNK, WHOLE_BLOCKS - base) * PARTS * 2u; c += THREADS) {
                let at = base * PARTS * 2u + c;
                var value = vec4<f32>();
                if entry.row != NONE && at < IN_FEATURES / 4u {
                    value = load_x(first_entry + m, entry, at);
                }
#if NORM
                square[m] += dot(value, value);
                value *= norm_weight[min(at, IN_FEATURES / 4u - 1u)];
#endif
                staged[m * ROW_STRIDE + padded(c)] = value;
            }
#endif
        }
#if NORM
        for (var m = 0u; m < ROWS; m++) {
            squares[m * THREADS + thread] = square[m];
        }
#endif
        workgroupBarrier();
#if NORM
        if base + CHUNK >= UNITS {
            for (var m = 0u; m < ROWS; m++) {
                var total = 0.0;
                for (var t = lane; t < THREADS; t += LANES) {
                    total += squares[m * THREADS + t];
                }
                factor[m] = inverseSqrt(group_sum(total, thread, lane) / f32(IN_FEATURES) + params.eps);
            }
        }
#endif
        // Several rounds only where one chunk is the whole row.
        for (var round = 0u; round < ROUNDS; round++) {
            for (var start = base; start < min(base + CHUNK, UNITS); start += BLOCK * LANES) {
                let is_last = start + BLOCK * LANES >= UNITS;
                let next_start = select(start + BLOCK * LANES, 0u, is_last);
                let next_round = select(round, round + 1u, is_last);
#repeat p BLOCK
                var loaded: array<LoadedUnit, OUTPUTS>;
                for (var o = 0u; o < OUTPUTS; o++) {
                    loaded[o] = ahead[p * OUTPUTS + o];
                }
                // At most one turn, which keeps compilers from moving the loads to where they are used.
                for (var coming = next_round; coming < ROUNDS; coming += ROUNDS) {
                    let unit = min(next_start + p * LANES + lane, UNITS - 1u);
                    for (var o = 0u; o < OUTPUTS; o++) {
                        ahead[p * OUTPUTS + o] = fetch(weight_row(first_output(workgroup.x, coming, group) + o), unit);
                    }
                }
                add_unit(base, start - base + p * LANES + lane, &loaded, &sums);
#endrepeat
            }
            if base + CHUNK >= UNITS {
                for (var m = 0u; m < ROWS; m++) {
                    let entry = list_entry(first_entry + m);
                    for (var p = 0u; p < PAIRS; p++) {
                        let sum = group_sums(
                            vec2<f32>(sums[m * OUTPUTS + 2u * p], sums[m * OUTPUTS + 2u * p + 1u]),
                            thread,
                            lane,
                        );
                        let o = first_output(workgroup.x, round, group) + 2u * p;
                        if lane == 0u && entry.row != NONE && o < NUM_OUTPUTS {
                            let y = sum * factor[m];
                            epilogue(first_entry + m, entry, params.first_output + o, y, read[m * PAIRS + p]);
                        }
                        sums[m * OUTPUTS + 2u * p] = 0.0;
                        sums[m * OUTPUTS + 2u * p + 1u] = 0.0;
                        if round + 1u < ROUNDS {
                            let next = first_output(workgroup.x, round + 1u, group) + 2u * p;
                            read[m * PAIRS + p] = operands_of(first_entry + m, next);
                        }
                    }
                }
            }
        }
    }
#endif
}
