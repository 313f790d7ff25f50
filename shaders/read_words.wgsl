// read_words: add up all words of a tensor.
// Math      out[g] = sum of the words of all x[q] that workgroup g reads, mod 2^32
// Why       the peak of kernels that read weights once and write little: what reading alone costs
// Shapes    x [4 num_quads] u32; out [num_workgroups] u32
// Bindings  0 params uniform; 1 x read [!TEXELS]; 1 x_texels texture [TEXELS]; 2 out write
// Grid      (num_workgroups, 1, 1) workgroups; all their threads read quads that lie side by side, then the next ones; TEXELS:
//           those of a workgroup, whose processor reads ahead
// Spec      WORKGROUP_SIZE power of two; LOADS quads that a thread has on their way; TEXELS: x in rows of TEXEL_ROW texels, as
//           linear_decode reads weights on software rasterisers
// Limits    4 * WORKGROUP_SIZE bytes of workgroup memory
// Numerics  integers, exact in any order
// Source    none; a sum
struct Params {
    num_quads: u32,
    num_workgroups: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
#if TEXELS
@group(0) @binding(1) var x_texels: texture_storage_2d<rgba32uint, read>;
#else
@group(0) @binding(1) var<storage, read> x: array<vec4<u32>>;
#endif
@group(0) @binding(2) var<storage, read_write> out: array<u32>;

var<workgroup> sums: array<u32, WORKGROUP_SIZE>;

fn quad(at: u32) -> vec4<u32> {
#if TEXELS
    return textureLoad(x_texels, vec2<u32>(at % TEXEL_ROW, at / TEXEL_ROW));
#else
    return x[at];
#endif
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
#if TEXELS
    let stride = WORKGROUP_SIZE;
    let share = (params.num_quads + params.num_workgroups - 1u) / params.num_workgroups;
    let first = workgroup.x * share;
    let end = min(first + share, params.num_quads);
#else
    let stride = params.num_workgroups * WORKGROUP_SIZE;
    let first = workgroup.x * WORKGROUP_SIZE;
    let end = params.num_quads;
#endif
    var sum = vec4<u32>();
    var at = first + thread;
    for (; at + (LOADS - 1u) * stride < end; at += LOADS * stride) {
#repeat i LOADS
        sum += quad(at + i * stride);
#endrepeat
    }
    for (; at < end; at += stride) {
        sum += quad(at);
    }
    sums[thread] = sum.x + sum.y + sum.z + sum.w;
    workgroupBarrier();
    for (var half = WORKGROUP_SIZE / 2u; half > 0u; half = half / 2u) {
        if thread < half {
            sums[thread] += sums[thread + half];
        }
        workgroupBarrier();
    }
    if thread == 0u {
        out[workgroup.x] = sums[0];
    }
}
