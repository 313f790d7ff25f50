// embed_tokens: write the embedding of every active row's token into a stream.
// Math      x[r] = f32(weight[rows[r].token - first_token]), r = active_rows[i].row
// Why       an embedding larger than one binding is split by token range; each dispatch writes the rows of its range
// Shapes    rows [T]; active_rows [n]; weight [num_tokens, C] f32, f16 or bf16; x [T, C] f32; row-major, C a multiple of 8
// Bindings  0 params uniform; 1 rows read; 2 active_rows read; 3 weight read; 4 x write
// Grid      (1, n, 1) workgroups; one per active row; WORKGROUP_SIZE threads stride over C
// Spec      WORKGROUP_SIZE; WEIGHT_F16, WEIGHT_BF16
// Limits    rows whose token lies outside first_token .. first_token + num_tokens are left alone
// Numerics  exact: every half float is a float
// Source    none; a table look-up
#import shared/rows
#import shared/weights

struct Params {
    hidden_size: u32,
    first_token: u32,
    num_tokens: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> rows: array<Row>;
@group(0) @binding(2) var<storage, read> active_rows: array<ActiveRow>;
@group(0) @binding(3) var<storage, read> weight: array<WeightUnit>;
@group(0) @binding(4) var<storage, read_write> x: array<mat2x4<f32>>;

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
        x[row * units + c] = unpack_weights(weight[token * units + c]);
    }
}
