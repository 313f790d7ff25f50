// rms_norm: normalise the active rows of a stream into a dense batch.
// Math      y[i] = weight * x[r] / sqrt(mean(x[r]^2) + eps), r = active_rows[i].row
// Why       reads through the row list, so the batch that follows is dense and no gather is needed
// Shapes    active_rows [n]; x [T, C] f32; weight [C] f32; y [n, C] f32, or f16 (OUT_F16); row-major, C a multiple
//           of 4
// Bindings  0 params uniform; 1 active_rows read; 2 x read; 3 weight read; 4 y write
// Grid      (1, n, 1) workgroups; one per active row; WORKGROUP_SIZE threads stride over C
// Spec      WORKGROUP_SIZE power of two, UNITS = C / 4, HELD = ceil(UNITS / WORKGROUP_SIZE); SUBGROUP: LANES lanes of a subgroup
//           exchange by shuffles; OUT_F16: for a `linear` that multiplies halves
// Limits    4 * WORKGROUP_SIZE bytes of workgroup memory, with SUBGROUP 4 * WORKGROUP_SIZE / LANES
// Numerics  f32 throughout; tree sum
// Source    Zhang and Sennrich 2019 (arXiv 1910.07467), as Llama uses it
#import shared/rows
#if SUBGROUP
#import shared/lanes
#else
#import shared/reduce
#endif

struct Params {
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> active_rows: array<ActiveRow>;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> weight: array<vec4<f32>>;
#if OUT_F16
@group(0) @binding(4) var<storage, read_write> y: array<vec2<u32>>;
fn pack(v: vec4<f32>) -> vec2<u32> {
    return vec2<u32>(pack2x16float(v.xy), pack2x16float(v.zw));
}
#else
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>;
fn pack(v: vec4<f32>) -> vec4<f32> {
    return v;
}
#endif

#if SUBGROUP
var<workgroup> team_sums: array<f32, WORKGROUP_SIZE / LANES>;
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
    let i = workgroup.y;
    let row = active_rows[i].row;
    var held: array<vec4<f32>, HELD>;
    for (var h = 0u; h < HELD; h++) {
        held[h] = x[row * UNITS + min(h * WORKGROUP_SIZE + thread, UNITS - 1u)];
    }
    var sum = 0.0;
    for (var h = 0u; h < HELD; h++) {
        sum += select(0.0, dot(held[h], held[h]), h * WORKGROUP_SIZE + thread < UNITS);
    }
#if SUBGROUP
    let team_sum = lane_sum(sum);
    if thread % LANES == 0u {
        team_sums[thread / LANES] = team_sum;
    }
    workgroupBarrier();
    var total = 0.0;
    for (var t = 0u; t < WORKGROUP_SIZE / LANES; t++) {
        total += team_sums[t];
    }
#else
    let total = workgroup_sum(sum, thread);
#endif
    let scale = inverseSqrt(total / f32(4u * UNITS) + params.eps);
    for (var h = 0u; h < HELD; h++) {
        let c = h * WORKGROUP_SIZE + thread;
        if c < UNITS {
            y[i * UNITS + c] = pack(held[h] * scale * weight[c]);
        }
    }
}
