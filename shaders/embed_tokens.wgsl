// embed_tokens: write the embedding of every active row's token into a stream.
// Math      x[r] = f32(weight[rows[r].token - first_token]), r = active_rows[i].row
// Why       an embedding larger than one binding is split by token range; each dispatch writes the rows of its range
// Shapes    rows [T]; active_rows [n]; weight [num_tokens, C] f32, f16, bf16 or quantised; x [T, C] f32; row-major, C a
//           multiple of 8
// Bindings  0 params uniform; 1 rows read; 2 active_rows read; 3 weight read; 4 x write
// Grid      (1, n, 1) workgroups; one per active row; WORKGROUP_SIZE threads stride over C
// Spec      WORKGROUP_SIZE; WEIGHT_F16, WEIGHT_BF16 or neither, or QUANTISED: WEIGHT_Q8 or WEIGHT_Q4 in groups of GROUP
// Limits    rows whose token lies outside first_token .. first_token + num_tokens are left alone
// Numerics  exact: every half float is a float; quantised rows in f32
// Source    none; a table look-up
#import shared/rows
#import shared/weights
#import shared/quantized_units

struct Params {
    hidden_size: u32,
    first_token: u32,
    num_tokens: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> rows: array<Row>;
@group(0) @binding(2) var<storage, read> active_rows: array<ActiveRow>;
#if QUANTISED
@group(0) @binding(3) var<storage, read> weight: array<u32>;
#else
@group(0) @binding(3) var<storage, read> weight: array<WeightUnit>;
#endif
@group(0) @binding(4) var<storage, read_write> x: array<mat2x4<f32>>;

#if QUANTISED
fn weight_word(at: u32) -> u32 {
    return weight[at];
}
#endif

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = active_rows[workgroup.y].row;
    // Tokens below the range wrap around to large numbers, so one comparison checks both ends.
    let token = rows[row].token - params.first_token;
    if token >= params.num_tokens {
        return;
    }
    let units = params.hidden_size / 8u;
    for (var c = thread; c < units; c += WORKGROUP_SIZE) {
#if QUANTISED
        x[row * units + c] = dequantise(load_unit(token * row_quads(params.hidden_size), c, params.hidden_size));
#else
        x[row * units + c] = unpack_weights(weight[token * units + c]);
#endif
    }
}
