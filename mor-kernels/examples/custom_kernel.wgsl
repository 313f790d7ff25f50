// axpy: add a multiple of one tensor to another.
// Bindings  0 params uniform; 1 x read; 2 y write

struct Params {
    len: u32,
    a: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(global_invocation_id) id: vec3u) {
    if id.x < params.len {
        y[id.x] += params.a * x[id.x];
    }
}
