// kv_pack: keys and values of rows, rotated and in f16, into caches of 8 bits an element.
// Math      of each 8 elements of a head: scale = the least of its type that is no less than max|v| / 63; code = v / scale, rounded to
//           the nearest, ties away from 0; rows without a slot leave none
// Why       a scale takes eight elements, of which a lane of the product before has two or four
// Shapes    active_rows [n]; k, v [n, D] f16; k_cache, v_cache [slots, D] in blocks (mor-kernels/src/kv_blocks.rs); D = 8 * num_units
// Bindings  0 params uniform; 1 active_rows read; 2 k read; 3 v read; 4 k_cache write; 5 v_cache write
// Grid      (ceil(2 * num_units / WORKGROUP_SIZE), n, 1) workgroups; a thread has a block
// Spec      WORKGROUP_SIZE
// Limits    finite v
// Numerics  exact but for the rounding
// Source    block formats: Rouhani et al. 2023, Microscaling Data Formats (arXiv 2310.10537)
#import shared/rows

struct Params {
    num_units: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> active_rows: array<ActiveRow>;
@group(0) @binding(2) var<storage, read> k: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> v: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> k_cache: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read_write> v_cache: array<vec2<u32>>;

fn pack_block(unit: vec4<u32>) -> vec2<u32> {
    var values: array<f32, 8>;
    var largest = 0.0;
    for (var i = 0u; i < 8u; i++) {
        let pair = unpack2x16float(unit[i / 2u]);
        values[i] = pair[i % 2u];
        largest = max(largest, abs(values[i]));
    }
    let scale_bits = ((pack2x16float(vec2<f32>(largest / 63.0, 0.0)) & 0xffffu) + 0x7fu) >> 7u;
    let scale = unpack2x16float(scale_bits << 7u).x;
    let inverse = select(0.0, 1.0 / scale, scale > 0.0);
    var block = vec2<u32>((scale_bits & 15u) << 28u, (scale_bits >> 4u) << 28u);
    for (var i = 0u; i < 8u; i++) {
        let size = abs(values[i]);
        // One too low at most; what decides between it and the next one is exact.
        let low = floor(size * inverse);
        let is_next = scale > 0.0 && 2.0 * size >= (2.0 * low + 1.0) * scale;
        let code = min(low + select(0.0, 1.0, is_next), 63.0);
        let signed = bitcast<u32>(i32(select(code, -code, values[i] < 0.0)));
        block[i / 4u] |= (signed & 0x7fu) << (7u * (i % 4u));
    }
    return block;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = workgroup.y;
    let entry = active_rows[i];
    let unit = workgroup.x * WORKGROUP_SIZE + thread;
    if entry.row == NONE || entry.kv_slot == NONE || unit >= 2u * params.num_units {
        return;
    }
    let in_row = unit % params.num_units;
    let source = i * params.num_units + in_row;
    let to = entry.kv_slot * params.num_units + in_row;
    if unit < params.num_units {
        k_cache[to] = pack_block(k[source]);
    } else {
        v_cache[to] = pack_block(v[source]);
    }
}
