// Where a linear kernel's results go. One of the flags STORE, GELU, RESIDUAL, SWIGLU, QKV, BLOCK_END_EXPERT,
// BLOCK_END_TOKEN is set, RESIDUAL_COPY only beside RESIDUAL, DELTA only beside SWIGLU or QKV, ENCODED only beside RESIDUAL
// or a block end; results arrive as adjacent pairs of columns because the loader interleaves weight rows so that the two
// halves of a RoPE pair, and gate and up, stand side by side.
//
// STORE             out[i, o] = scale * v                                        compact [n, out_stride]
// GELU              out[i, o] = gelu(scale * v), the exact (erf) form            compact
// RESIDUAL          out[r, o] = residual[r, o] + v                               streams [T, out_stride]
// RESIDUAL_COPY     as RESIDUAL, and into copy[r, o] too                         streams
// SWIGLU            out[i, o/2] = silu(v.x) * v.y                                compact [n, out_stride] of Inner
// QKV               o < q_dim: q rotated into out, compact; then kv_dim columns of k, rotated, and kv_dim of v, into
//                   the caches at the row's slot, if it has one
// BLOCK_END_EXPERT  rows with END_GATED: out[r] += gate[r] * (residual[r] + v)
// BLOCK_END_TOKEN   rows with END_GATED: the same; others: running[r] = residual[r] + v
// DELTA             v + delta[i, o] in place of v: an adapter's product with the same rows, compact, of all columns, which
//                   lies in `out` from delta_start on, since WebGPU's default limits have no binding left beside QKV
// ENCODED           encoding[o] * (residual + v) in place of residual + v: a recursion's encoding of its block's output
//
// The including kernel declares `params` with the fields of LinearParams (mor-kernels/src/epilogue.rs), and Inner, the type
// of activations inside the MLP.

#if SWIGLU
@group(0) @binding(4) var<storage, read_write> out: array<Inner>;
#else
@group(0) @binding(4) var<storage, read_write> out: array<vec2<f32>>;
#endif
#if RESIDUAL
@group(0) @binding(6) var<storage, read> residual: array<vec2<f32>>;
#endif
#if RESIDUAL_COPY
@group(0) @binding(7) var<storage, read_write> copy: array<vec2<f32>>;
#endif
#if BLOCK_END_EXPERT
@group(0) @binding(6) var<storage, read> residual: array<vec2<f32>>;
@group(0) @binding(7) var<storage, read> gates: array<f32>;
#endif
#if BLOCK_END_TOKEN
@group(0) @binding(6) var<storage, read> residual: array<vec2<f32>>;
@group(0) @binding(7) var<storage, read> gates: array<f32>;
@group(0) @binding(8) var<storage, read_write> running: array<vec2<f32>>;
#endif
#if ENCODED
@group(0) @binding(9) var<storage, read> encoding: array<vec2<f32>>;
#endif
#if QKV
@group(0) @binding(6) var<storage, read> rope: array<vec2<f32>>;
#if KV_F16
alias KvPair = u32;
fn pack_kv(v: vec2<f32>) -> KvPair {
    return pack2x16float(v);
}
#else
alias KvPair = vec2<f32>;
fn pack_kv(v: vec2<f32>) -> KvPair {
    return v;
}
#endif
@group(0) @binding(7) var<storage, read_write> k_cache: array<KvPair>;
@group(0) @binding(8) var<storage, read_write> v_cache: array<KvPair>;
#endif

#if GELU
// Abramowitz and Stegun 7.1.26: |error| <= 1.5e-7.
fn erf(x: f32) -> f32 {
    let a = abs(x);
    let t = 1.0 / (1.0 + 0.3275911 * a);
    let p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
    return sign(x) * (1.0 - p * exp(-a * a));
}
#endif

// What the epilogue reads, fetched apart so that a kernel can have it on its way while it multiplies.
struct Operands {
    // RESIDUAL, BLOCK_END_EXPERT, BLOCK_END_TOKEN: the residual; QKV: cosine and sine.
    pair: vec2<f32>,
    // BLOCK_END_EXPERT, BLOCK_END_TOKEN: the stream that the gated result is added to, and the gate.
    hidden: vec2<f32>,
    gate: f32,
    // DELTA: what is added to the product.
    delta: vec2<f32>,
    // ENCODED: what the layer's output is multiplied by.
    encoding: vec2<f32>,
}

// `i` place in the row list, `entry` = active_rows[i], not one past its end; `o` even column of the whole output.
fn operands(i: u32, entry: ActiveRow, o: u32) -> Operands {
    var read = Operands();
#if RESIDUAL
    read.pair = residual[(entry.row * params.out_stride + o) / 2u];
#endif
#if BLOCK_END_EXPERT
    read.pair = residual[(entry.row * params.out_stride + o) / 2u];
    read.hidden = out[(entry.row * params.out_stride + o) / 2u];
    read.gate = gates[entry.row];
#endif
#if BLOCK_END_TOKEN
    read.pair = residual[(entry.row * params.out_stride + o) / 2u];
    read.hidden = out[(entry.row * params.out_stride + o) / 2u];
    read.gate = gates[entry.row];
#endif
#if QKV
    if o < params.q_dim + params.kv_dim {
        read.pair = rope[entry.position * (params.head_dim / 2u) + (o % params.head_dim) / 2u];
    }
#if DELTA
    read.delta = out[(params.delta_start + i * (params.q_dim + 2u * params.kv_dim) + o) / 2u];
#endif
#endif
#if SWIGLU
#if DELTA
    let at = params.delta_start + 2u * i * params.out_stride + o;
    read.delta = vec2<f32>(f32(out[at]), f32(out[at + 1u]));
#endif
#endif
#if ENCODED
    read.encoding = encoding[o / 2u];
#endif
    return read;
}

// What a layer adds up to.
fn layer_output(v: vec2<f32>, read: Operands) -> vec2<f32> {
#if ENCODED
    return read.encoding * (read.pair + v);
#else
    return read.pair + v;
#endif
}

// `i` place in the row list, `entry` = active_rows[i], `o` even column of the whole output, `product` columns o and o + 1,
// `read` = operands(i, entry, o).
fn epilogue(i: u32, entry: ActiveRow, o: u32, product: vec2<f32>, read: Operands) {
#if DELTA
    let v = product + read.delta;
#else
    let v = product;
#endif
#if STORE
    out[(i * params.out_stride + o) / 2u] = v * params.scale;
#endif
#if GELU
    let x = v * params.scale;
    out[(i * params.out_stride + o) / 2u] =
        0.5 * x * (1.0 + vec2<f32>(erf(x.x * 0.70710678), erf(x.y * 0.70710678)));
#endif
#if RESIDUAL
    let at = (entry.row * params.out_stride + o) / 2u;
    out[at] = layer_output(v, read);
#if RESIDUAL_COPY
    copy[at] = layer_output(v, read);
#endif
#endif
#if SWIGLU
    // exp overflows to infinity for very negative gates, and the quotient is then the correct 0.
    out[i * params.out_stride + o / 2u] = Inner(v.x / (1.0 + exp(-v.x)) * v.y);
#endif
#if BLOCK_END_EXPERT
    if entry.end == END_GATED {
        let at = (entry.row * params.out_stride + o) / 2u;
        out[at] = read.hidden + select(read.gate, 1.0, params.additive != 0u) * layer_output(v, read);
    }
#endif
#if BLOCK_END_TOKEN
    let at = (entry.row * params.out_stride + o) / 2u;
    let y = layer_output(v, read);
    if entry.end == END_GATED {
        out[at] = read.hidden + select(read.gate, 1.0, params.additive != 0u) * y;
    } else {
        running[at] = y;
    }
#endif
#if QKV
    if o < params.q_dim + params.kv_dim {
        let angle = read.pair;
        let rotated = vec2<f32>(v.x * angle.x - v.y * angle.y, v.y * angle.x + v.x * angle.y);
        if o < params.q_dim {
            out[(i * params.q_dim + o) / 2u] = rotated;
        } else if entry.kv_slot != NONE {
            k_cache[(entry.kv_slot * params.kv_dim + o - params.q_dim) / 2u] = pack_kv(rotated);
        }
    } else if entry.kv_slot != NONE {
        v_cache[(entry.kv_slot * params.kv_dim + o - params.q_dim - params.kv_dim) / 2u] = pack_kv(v);
    }
#endif
}
