// router_expert: score every active row for its next recursion, and gate it.
// Math      logits[r] = input_scale * dot(x[s], weight[q]), r = active_rows[i].row, s = r with X_BY_ROW, else i;
//           q = active_rows[i].recursion + 1, which is 0 in lists outside the shared block; rows with q = R are left alone;
//           gates[r] = alpha * sigmoid(logits[r]) with SIGMOID, alpha * tanh(logits[r]) with TANH, else logits[r];
//           SCRIPTED, once gated: logits[r] = 1 if u < shares[q], else -1; u = frac(v + position * (sqrt(5) - 1) / 2), v
//           uniform in [0, 1) by sequence: of n tokens in a row shares[q] * n take q, but for a few
// Why       selection needs the logit and the block's epilogue the gate, both per row of the stream; rows of one list
//           may stand at different recursions. SCRIPTED: models of random weights, whose routers mean nothing, are
//           measured at depths of a given distribution
// Shapes    active_rows [n]; x [T, K] f32 with X_BY_ROW, else [n, K] f32; weight [R, K] f32, f16 or bf16; logits [T] f32;
//           gates [T] f32; shares [R] f32; K a multiple of 8
// Bindings  0 params uniform; 1 active_rows read; 2 x read; 3 weight read; 4 logits write; 5 gates write [!LOGIT_ONLY];
//           6 shares read [SCRIPTED]
// Grid      (1, n, 1) workgroups; one per active row; WORKGROUP_SIZE threads stride over K
// Spec      WORKGROUP_SIZE power of two; X_BY_ROW; LOGIT_ONLY; SCRIPTED; SIGMOID or TANH or neither; WEIGHT_F16 or
//           WEIGHT_BF16
// Limits    none beyond the bindings
// Numerics  f32 throughout; tree sum; sigmoid and tanh saturate without overflow; NaN stays NaN. u has 24 bits, exact in f32
// Source    Bae et al. 2025 (arXiv 2507.10524), expert-choice routing; pcg4d: Jarzynski and Olano 2020 (JCGT
//           9.3); even draws: Weyl 1916 (doi 10.1007/BF01475864)
#import shared/rows
#import shared/reduce
#import shared/weights
#import shared/expert_gate
#if SCRIPTED
#import shared/pcg4d
#import shared/scripted_draw
#endif

struct Params {
    in_features: u32,
    input_scale: f32,
    alpha: f32,
    num_recursions: u32,
    seed_low: u32,
    seed_high: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> active_rows: array<ActiveRow>;
@group(0) @binding(2) var<storage, read> x: array<mat2x4<f32>>;
@group(0) @binding(3) var<storage, read> weight: array<WeightUnit>;
@group(0) @binding(4) var<storage, read_write> logits: array<f32>;
#if !LOGIT_ONLY
@group(0) @binding(5) var<storage, read_write> gates: array<f32>;
#endif

#if SCRIPTED
@group(0) @binding(6) var<storage, read> shares: array<f32>;

// What stands for the logit of a token that has reached the recursion.
fn script(entry: ActiveRow, recursion: u32) -> f32 {
    let draw = scripted_draw(params.seed_low, params.seed_high, entry.sequence, entry.position);
    return select(-1.0, 1.0, draw < shares[recursion]);
}
#endif

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
#if SCRIPTED
        logits[row] = script(active_rows[workgroup.y], recursion);
#else
        logits[row] = logit;
#endif
#if !LOGIT_ONLY
        gates[row] = gate_of(logit);
#endif
    }
}
