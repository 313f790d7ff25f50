// router_token: choose the depth of every active row, once, at the input of the shared part.
// Math      l = input_scale * weight x[s]; g = alpha * softmax(l) with SOFTMAX, else alpha * sigmoid(l);
//           d = argmax of g[i] + bias[i] + i * depth_bias over i < max_depth; logits[r] = l; gates[r] = g; depth[r] = d + 1; token_weight[r] = g[d];
//           r = active_rows[i].row, s = r with X_BY_ROW, else i
// Why       R is 2 to 4, too narrow for a matrix product, and the choice needs the whole row of gates at once
// Shapes    active_rows [n]; x [T, K] f32 with X_BY_ROW, else [n, K] f32; weight [R, K] f32, f16 or bf16;
//           logits [T, R] f32; gates [T, R] f32; depth [T] u32; token_weight [T] f32; bias [R] f32; K a multiple of 8
// Bindings  0 params uniform; 1 active_rows read; 2 x read; 3 weight read; 4 logits write; 5 gates write;
//           6 depth write; 7 token_weight write; 8 bias read [BIAS]
// Grid      (1, n, 1) workgroups; one per active row; WORKGROUP_SIZE threads stride over K, one finishes
// Spec      WORKGROUP_SIZE power of two; NUM_RECURSIONS 2..=256; X_BY_ROW; SOFTMAX; BIAS; WEIGHT_F16 or WEIGHT_BF16
// Limits    4 * NUM_RECURSIONS * WORKGROUP_SIZE bytes of workgroup memory
// Numerics  f32 throughout; tree sums; ties: lowest index; NaN never chosen before a number, index 0 if all are NaN
// Source    Bae et al. 2025 (arXiv 2507.10524), token-choice routing; bias: Wang et al. 2024 (arXiv 2408.15664)
#import shared/rows
#import shared/weights
#import shared/gate

struct Params {
    in_features: u32,
    input_scale: f32,
    alpha: f32,
    max_depth: u32,
    depth_bias: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> active_rows: array<ActiveRow>;
@group(0) @binding(2) var<storage, read> x: array<mat2x4<f32>>;
@group(0) @binding(3) var<storage, read> weight: array<WeightUnit>;
@group(0) @binding(4) var<storage, read_write> logits: array<f32>;
@group(0) @binding(5) var<storage, read_write> gates: array<f32>;
@group(0) @binding(6) var<storage, read_write> depth: array<u32>;
@group(0) @binding(7) var<storage, read_write> token_weight: array<f32>;
#if BIAS
@group(0) @binding(8) var<storage, read> bias: array<f32>;
#endif

// [NUM_RECURSIONS, WORKGROUP_SIZE]
var<workgroup> partial: array<f32, NUM_RECURSIONS * WORKGROUP_SIZE>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = active_rows[workgroup.y].row;
    if row == NONE {
        return;
    }
    let units = params.in_features / 8u;
#if X_BY_ROW
    let first = row * units;
#else
    let first = workgroup.y * units;
#endif
    var sums: array<f32, NUM_RECURSIONS>;
    for (var r = 0u; r < NUM_RECURSIONS; r++) {
        sums[r] = 0.0;
    }
    for (var c = thread; c < units; c += WORKGROUP_SIZE) {
        let v = x[first + c];
        for (var r = 0u; r < NUM_RECURSIONS; r++) {
            let w = unpack_weights(weight[r * units + c]);
            sums[r] += dot(v[0], w[0]) + dot(v[1], w[1]);
        }
    }
    for (var r = 0u; r < NUM_RECURSIONS; r++) {
        partial[r * WORKGROUP_SIZE + thread] = sums[r];
    }
    workgroupBarrier();
    // All sums go down one tree together, so barriers do not multiply with R.
    for (var half = WORKGROUP_SIZE / 2u; half > 0u; half = half / 2u) {
        for (var j = thread; j < NUM_RECURSIONS * half; j += WORKGROUP_SIZE) {
            let at = j / half * WORKGROUP_SIZE + j % half;
            partial[at] += partial[at + half];
        }
        workgroupBarrier();
    }
    if thread == 0u {
        finish(row);
    }
}

fn finish(row: u32) {
    var gate: array<f32, NUM_RECURSIONS>;
#if SOFTMAX
    var top = -3.4028234e38;
    for (var r = 0u; r < NUM_RECURSIONS; r++) {
        top = max(top, params.input_scale * partial[r * WORKGROUP_SIZE]);
    }
    var total = 0.0;
#endif
    for (var r = 0u; r < NUM_RECURSIONS; r++) {
        let logit = params.input_scale * partial[r * WORKGROUP_SIZE];
        logits[row * NUM_RECURSIONS + r] = logit;
#if SOFTMAX
        gate[r] = exp(logit - top);
        total += gate[r];
#else
        gate[r] = sigmoid(logit);
#endif
    }
    var best = -3.4028234e38;
    var chosen = 0u;
    for (var r = 0u; r < NUM_RECURSIONS; r++) {
#if SOFTMAX
        gate[r] = gate[r] / total;
#endif
        gate[r] = params.alpha * gate[r];
        gates[row * NUM_RECURSIONS + r] = gate[r];
        var score = gate[r];
#if BIAS
        score += bias[r];
#endif
        score += f32(r) * params.depth_bias;
        if r < params.max_depth && score > best {
            best = score;
            chosen = r;
        }
    }
    depth[row] = chosen + 1u;
    token_weight[row] = gate[chosen];
}
