// cross_entropy: negative log-likelihood of a label under each active row's logits.
// Math      nll[r] = log(sum_v exp(logits[i, v])) - logits[i, labels[r]], r = active_rows[i].row
// Why       one pass over the logits: every thread keeps a running maximum and a sum scaled by it
// Shapes    active_rows [n]; logits [n, S] f32 of which V count; labels [T] u32; nll [T] f32; row-major
// Bindings  0 params uniform; 1 active_rows read; 2 logits read; 3 labels read; 4 nll write
// Grid      (1, n, 1) workgroups; one per active row; WORKGROUP_SIZE threads stride over V
// Spec      WORKGROUP_SIZE power of two: 8 * WORKGROUP_SIZE bytes of workgroup memory
// Limits    V >= 1; a label of NONE, or any other that is no token, writes 0; rows that are not active are left alone
// Numerics  f32; no exponent above 0, so nothing overflows; tree sum
// Source    Milakov and Gimelshein 2018 (arXiv 1805.02867), online normaliser
#import shared/rows

struct Params {
    vocab_size: u32,
    logits_stride: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> active_rows: array<ActiveRow>;
@group(0) @binding(2) var<storage, read> logits: array<f32>;
@group(0) @binding(3) var<storage, read> labels: array<u32>;
@group(0) @binding(4) var<storage, read_write> nll: array<f32>;

// Per thread: the maximum of its logits and the sum of exp(logit - maximum).
var<workgroup> partials: array<vec2<f32>, WORKGROUP_SIZE>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let i = workgroup.y;
    let row = active_rows[i].row;
    let start = i * params.logits_stride;
    // The most negative f32: WGSL has no infinite literal.
    var maximum = -3.4028234e38f;
    var sum = 0.0;
    for (var v = thread; v < params.vocab_size; v += WORKGROUP_SIZE) {
        let logit = logits[start + v];
        if logit > maximum {
            sum *= exp(maximum - logit);
            maximum = logit;
        }
        sum += exp(logit - maximum);
    }
    partials[thread] = vec2<f32>(maximum, sum);
    workgroupBarrier();
    for (var half = WORKGROUP_SIZE / 2u; half > 0u; half = half / 2u) {
        if thread < half {
            let a = partials[thread];
            let b = partials[thread + half];
            let m = max(a.x, b.x);
            partials[thread] = vec2<f32>(m, a.y * exp(a.x - m) + b.y * exp(b.x - m));
        }
        workgroupBarrier();
    }
    if thread == 0u {
        let label = labels[row];
        var loss = 0.0;
        if label < params.vocab_size {
            let total = partials[0];
            // The difference first: it is exact where the label has the largest logit, however large that is.
            loss = (total.x - logits[start + label]) + log(total.y);
        }
        nll[row] = loss;
    }
}
