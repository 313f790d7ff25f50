// router_topk: per sequence, select the k alive rows with the largest gates.
// Math      A = {r in the sequence: depth[r] = recursion}; decision[r] = 1 for the k first of A by (gate down, row up),
//           -1 for all other rows of the sequence
// Why       reproduces full-sequence evaluation; a mask over rows keeps them in position order, as attention needs
// Shapes    sequences [B, 4] u32 (first row, number of rows, k, 0); gates [T] f32; depth [T] u32; decision [T] f32
// Bindings  0 params uniform; 1 sequences read; 2 gates read; 3 depth read; 4 decision write
// Grid      (1, B, 1) workgroups; one per sequence; WORKGROUP_SIZE threads stride over its rows
// Spec      WORKGROUP_SIZE 16..=256
// Limits    2^24 rows a sequence; fewer than k alive rows are all selected; k = 0 selects none
// Numerics  ties: lower row first; NaN never before a number; exact: radix selection over the bits of the gates
// Source    Bae et al. 2025 (arXiv 2507.10524), expert-choice routing
#import shared/order_key
#import shared/radix_select

struct Params {
    recursion: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> sequences: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> gates: array<f32>;
@group(0) @binding(3) var<storage, read> depth: array<u32>;
@group(0) @binding(4) var<storage, read_write> decision: array<f32>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let sequence = sequences[workgroup.y];
    let first = sequence.x;
    let end = sequence.x + sequence.y;
    let wanted = weight_carried(vec2<u32>(0u, max(sequence.z, 1u)));

    // The k-th largest key, 8 bits a pass; `above` counts the rows with larger keys.
    var above = vec2<u32>(0u);
    var key = 0u;
    for (var pass_index = 0u; pass_index < 4u; pass_index++) {
        let shift = 24u - 8u * pass_index;
        bins_clear(thread);
        for (var row = first + thread; row < end; row += WORKGROUP_SIZE) {
            let row_key = order_key(gates[row]);
            // Two shifts: a shift by 32 would be undefined.
            if depth[row] == params.recursion && ((row_key >> shift) >> 8u) == key {
                bins_add((row_key >> shift) & 255u, 1u);
            }
        }
        bins_sum(thread);
        let found = bins_find(above, wanted, thread);
        above = found.yz;
        key = (key << 8u) | found.x;
    }

    // Among rows with exactly that key the lowest are taken: the same selection over the distance to the end.
    var nearest = 0u;
    for (var pass_index = 0u; pass_index < 3u; pass_index++) {
        let shift = 16u - 8u * pass_index;
        // Uniform: short sequences have short distances.
        if (sequence.y >> shift) == 0u {
            continue;
        }
        bins_clear(thread);
        for (var row = first + thread; row < end; row += WORKGROUP_SIZE) {
            let distance = end - row;
            let tied = depth[row] == params.recursion && order_key(gates[row]) == key;
            if tied && ((distance >> shift) >> 8u) == nearest {
                bins_add((distance >> shift) & 255u, 1u);
            }
        }
        bins_sum(thread);
        let found = bins_find(above, wanted, thread);
        above = found.yz;
        nearest = (nearest << 8u) | found.x;
    }

    for (var row = first + thread; row < end; row += WORKGROUP_SIZE) {
        let row_key = order_key(gates[row]);
        let is_kept = row_key > key || (row_key == key && end - row >= nearest);
        let is_selected = sequence.z > 0u && depth[row] == params.recursion && is_kept;
        decision[row] = select(-1.0, 1.0, is_selected);
    }
}
