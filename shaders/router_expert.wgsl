// router_expert: score every active row for its next recursion, and gate it; with NORMED, norm it for that recursion's first layer.
// Math      logits[r] = input_scale * dot(x[s], weight[q]), r = active_rows[i].row, s = r with X_BY_ROW, else i;
//           q = active_rows[i].recursion + 1, which is 0 in lists outside the shared block; rows with q = R are left alone;
//           gates[r] = alpha * sigmoid(logits[r]) with SIGMOID, alpha * tanh(logits[r]) with TANH, else logits[r];
//           normed[r] = norm_weight * x[s] / sqrt(mean(x[s]^2) + eps);
//           SCRIPTED, once gated: logits[r] = 1 if u < shares[q], else -1; u = frac(v + position * (sqrt(5) - 1) / 2), v
//           uniform in [0, 1) by sequence: of n tokens in a row shares[q] * n take q, but for a few
// Why       selection needs the logit and the block's epilogue the gate, both per row of the stream; rows of one list
//           may stand at different recursions. NORMED: who goes on is not yet known, but what all are scored by is read once,
//           and no dispatch stands between their list and the block. SCRIPTED: models of random weights, whose routers mean
//           nothing, are measured at depths of a given distribution
// Shapes    active_rows [n]; x [T, K] f32 with X_BY_ROW, else [n, K] f32; weight [R, K] f32, f16 or bf16; logits [T] f32;
//           gates [T] f32; shares [R] f32; norm_weight [K] f32; normed [T, K] f16; K a multiple of 8
// Bindings  0 params uniform; 1 active_rows read; 2 x read; 3 weight read; 4 logits write; 5 gates write [!LOGIT_ONLY];
//           6 shares read [SCRIPTED]; 7 norm_weight read [NORMED]; 8 normed write [NORMED]
// Grid      (1, n, 1) workgroups; one per active row; WORKGROUP_SIZE threads stride over K
// Spec      WORKGROUP_SIZE power of two, UNITS = K / 8, HELD = ceil(UNITS / WORKGROUP_SIZE); X_BY_ROW; LOGIT_ONLY; SCRIPTED; NORMED;
//           SIGMOID or TANH or neither; WEIGHT_F16 or WEIGHT_BF16; SUBGROUP: LANES lanes of a subgroup exchange by shuffles
// Limits    4 * WORKGROUP_SIZE bytes of workgroup memory, with SUBGROUP 8 * WORKGROUP_SIZE / LANES
// Numerics  f32 throughout; tree sums, the same with NORMED and without; normed is rounded to f16 in the end; sigmoid and tanh saturate
//           without overflow; NaN stays NaN. u has 24 bits, exact in f32
// Source    Bae et al. 2025 (arXiv 2507.10524), expert-choice routing; RMSNorm: Zhang and Sennrich 2019 (arXiv 1910.07467); pcg4d:
//           Jarzynski and Olano 2020 (JCGT 9.3); even draws: Weyl 1916 (doi 10.1007/BF01475864)
#import shared/rows
#if SUBGROUP
#import shared/lanes
#else
#import shared/reduce
#endif
#import shared/weights
#import shared/expert_gate
#if SCRIPTED
#import shared/pcg4d
#import shared/scripted_draw
#endif

struct Params {
    input_scale: f32,
    alpha: f32,
    num_recursions: u32,
    seed_low: u32,
    seed_high: u32,
    eps: f32,
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

#if NORMED
@group(0) @binding(7) var<storage, read> norm_weight: array<mat2x4<f32>>;
@group(0) @binding(8) var<storage, read_write> normed: array<vec4<u32>>;

fn pack(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
    return vec4<u32>(
        pack2x16float(low.xy),
        pack2x16float(low.zw),
        pack2x16float(high.xy),
        pack2x16float(high.zw),
    );
}
#endif

#if SUBGROUP
var<workgroup> team_sums: array<vec2<f32>, WORKGROUP_SIZE / LANES>;
#endif

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
    let entry = active_rows[workgroup.y];
    // NONE + 1 is 0.
    let recursion = entry.recursion + 1u;
    if entry.row == NONE || recursion >= params.num_recursions {
        return;
    }
#if X_BY_ROW
    let first = entry.row * UNITS;
#else
    let first = workgroup.y * UNITS;
#endif
    var held: array<mat2x4<f32>, HELD>;
    var weights: array<WeightUnit, HELD>;
    for (var h = 0u; h < HELD; h++) {
        let c = min(h * WORKGROUP_SIZE + thread, UNITS - 1u);
        held[h] = x[first + c];
        weights[h] = weight[recursion * UNITS + c];
    }
    // Products with the router, and squares.
    var sums = vec2<f32>();
    for (var h = 0u; h < HELD; h++) {
        if h * WORKGROUP_SIZE + thread < UNITS {
            let v = held[h];
            let w = unpack_weights(weights[h]);
            sums.x += dot(v[0], w[0]) + dot(v[1], w[1]);
#if NORMED
            sums.y += dot(v[0], v[0]) + dot(v[1], v[1]);
#endif
        }
    }
#if SUBGROUP
    sums.x = lane_sum(sums.x);
#if NORMED
    sums.y = lane_sum(sums.y);
#endif
    if thread % LANES == 0u {
        team_sums[thread / LANES] = sums;
    }
    workgroupBarrier();
    sums = vec2<f32>();
    for (var t = 0u; t < WORKGROUP_SIZE / LANES; t++) {
        sums += team_sums[t];
    }
#else
    sums.x = workgroup_sum(sums.x, thread);
#if NORMED
    sums.y = workgroup_sum(sums.y, thread);
#endif
#endif
#if NORMED
    let scale = inverseSqrt(sums.y / f32(8u * UNITS) + params.eps);
    for (var h = 0u; h < HELD; h++) {
        let c = h * WORKGROUP_SIZE + thread;
        if c < UNITS {
            let w = norm_weight[c];
            normed[entry.row * UNITS + c] = pack(held[h][0] * scale * w[0], held[h][1] * scale * w[1]);
        }
    }
#endif
    if thread == 0u {
        let logit = params.input_scale * sums.x;
#if SCRIPTED
        logits[entry.row] = script(entry, recursion);
#else
        logits[entry.row] = logit;
#endif
#if !LOGIT_ONLY
        gates[entry.row] = gate_of(logit);
#endif
    }
}
