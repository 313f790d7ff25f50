// rms_norm: normalise the active rows of a stream into a dense batch.
// Math      y[i] = weight * x[r] / sqrt(mean(x[r]^2) + eps), r = active_rows[i].row
// Why       reads through the row list, so the batch that follows is dense and no gather is needed
// Shapes    active_rows [n]; x [T, C] f32; weight [C] f32; y [n, C] f32, or f16 (OUT_F16); row-major, C a multiple
//           of 4
// Bindings  0 params uniform; 1 active_rows read; 2 x read; 3 weight read; 4 y write
// Grid      (1, n, 1) workgroups; one per active row; WORKGROUP_SIZE threads stride over C
// Spec      WORKGROUP_SIZE power of two: 4 * WORKGROUP_SIZE bytes of workgroup memory; OUT_F16: for a `linear` that
//           multiplies halves
// Limits    none beyond the bindings
// Numerics  f32 throughout; tree sum
// Source    Zhang and Sennrich 2019 (arXiv 1910.07467), as Llama uses it
#import shared/rows
#import shared/reduce

struct Params {
    hidden_size: u32,
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

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = workgroup.y;
    let row = active_rows[i].row;
    let units = params.hidden_size / 4u;
    var sum = 0.0;
    for (var c = thread; c < units; c += WORKGROUP_SIZE) {
        let v = x[row * units + c];
        sum += dot(v, v);
    }
    let mean = workgroup_sum(sum, thread) / f32(params.hidden_size);
    let scale = inverseSqrt(mean + params.eps);
    for (var c = thread; c < units; c += WORKGROUP_SIZE) {
        y[i * units + c] = pack(x[row * units + c] * scale * weight[c]);
    }
}
