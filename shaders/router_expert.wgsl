// router_expert: score every active row for its next recursion, and gate it.
// Math      logits[r] = input_scale * dot(x[s], weight[q]), r = active_rows[i].row, s = r with X_BY_ROW, else i;
//           q = active_rows[i].recursion + 1, which is 0 in lists outside the shared block; rows with q = R are left alone;
//           gates[r] = alpha * sigmoid(logits[r]) with SIGMOID, alpha * tanh(logits[r]) with TANH, else logits[r]
// Why       selection needs the logit and the block's epilogue the gate, both per row of the stream; rows of one list
//           may stand at different recursions
// Shapes    active_rows [n]; x [T, K] f32 with X_BY_ROW, else [n, K] f32; weight [R, K] f32, f16 or bf16; logits [T] f32;
//           gates [T] f32; K a multiple of 8
// Bindings  0 params uniform; 1 active_rows read; 2 x read; 3 weight read; 4 logits write; 5 gates write [!LOGIT_ONLY]
// Grid      (1, n, 1) workgroups; one per active row; WORKGROUP_SIZE threads stride over K
// Spec      WORKGROUP_SIZE power of two; X_BY_ROW; LOGIT_ONLY; SIGMOID or TANH or neither; WEIGHT_F16 or WEIGHT_BF16
// Limits    none beyond the bindings
// Numerics  f32 throughout; tree sum; sigmoid and tanh saturate without overflow; NaN stays NaN
// Source    Bae et al. 2025 (arXiv 2507.10524), expert-choice routing
#import shared/rows
#import shared/reduce
#import shared/weights
#import shared/gate

struct Params {
    in_features: u32,
    input_scale: f32,
    alpha: f32,
    num_recursions: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> active_rows: array<ActiveRow>;
@group(0) @binding(2) var<storage, read> x: array<mat2x4<f32>>;
@group(0) @binding(3) var<storage, read> weight: array<WeightUnit>;
@group(0) @binding(4) var<storage, read_write> logits: array<f32>;
#if !LOGIT_ONLY
@group(0) @binding(5) var<storage, read_write> gates: array<f32>;
#endif

fn gate_of(logit: f32) -> f32 {
#if SIGMOID
    return params.alpha * sigmoid(logit);
#elif TANH
    // By exp(-2|v|), which cannot overflow; the built-in tanh may.
    let e = exp(-2.0 * abs(logit));
    let magnitude = (1.0 - e) / (1.0 + e);
    return params.alpha * select(-magnitude, magnitude, logit >= 0.0);
#else
    return logit;
#endif
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = active_rows[workgroup.y].row;
    // NONE + 1 is 0.
    let recursion = active_rows[workgroup.y].recursion + 1u;
    if row == NONE || recursion >= params.num_recursions {
        return;
    }
    let units = params.in_features / 8u;
#if X_BY_ROW
    let first = row * units;
#else
    let first = workgroup.y * units;
#endif
    var sum = 0.0;
    for (var c = thread; c < units; c += WORKGROUP_SIZE) {
        let v = x[first + c];
        let w = unpack_weights(weight[recursion * units + c]);
        sum += dot(v[0], w[0]) + dot(v[1], w[1]);
    }
    let logit = params.input_scale * workgroup_sum(sum, thread);
    if thread == 0u {
        logits[row] = logit;
#if !LOGIT_ONLY
        gates[row] = gate_of(logit);
#endif
    }
}
