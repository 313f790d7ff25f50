// Where a linear kernel's results go. One of the flags STORE, GELU, RESIDUAL, SWIGLU, QKV, BLOCK_END is set, RESIDUAL_COPY only
// beside RESIDUAL, RUNNING only beside BLOCK_END, DELTA only beside SWIGLU or QKV, ENCODED only beside RESIDUAL or BLOCK_END;
// results arrive as adjacent columns, two or (QUADS) four, because the loader interleaves weight rows so that the two halves of
// a RoPE pair, and gate and up, stand side by side. QUADS: all columns of Params, and heads, are multiples of 4.
//
// STORE             out[i, o] = scale * v                                        compact [n, out_stride]
// GELU              out[i, o] = gelu(scale * v), the exact (erf) form            compact
// RESIDUAL          out[r, o] = residual[r, o] + v                               streams [T, out_stride]
// RESIDUAL_COPY     as RESIDUAL, and into copy[r, o] too                         streams
// SWIGLU            out[i, o/2] = silu(v[o]) * v[o + 1], o even                  compact [n, out_stride] of Inner
// QKV               o < q_dim: q rotated into out, compact; then kv_dim columns of k, rotated, and kv_dim of v, into
//                   the caches at the row's slot, if it has one; KV_STAGED: at row i in place of the slot, compact
// BLOCK_END         rows with END_GATED: out[r] += gate[r] * (residual[r] + v)
// RUNNING           others: running[r] = residual[r] + v
// DELTA             v + delta[i, o] in place of v: an adapter's product with the same rows, compact, of all columns, which
//                   lies in `out` from delta_start on, since WebGPU's default limits have no binding left beside QKV
// ENCODED           encoding[o] * (residual + v) in place of residual + v: a recursion's encoding of its block's output
//
// The including kernel declares `params` with the fields of LinearParams (mor-kernels/src/epilogue.rs), and Inner, the type
// of activations inside the MLP.

#if QUADS
// Adjacent columns of a row, and their number.
alias Columns = vec4<f32>;
const WIDTH: u32 = 4u;
alias InnerColumns = vec2<Inner>;
// Columns in f16.
alias HalfColumns = vec2<u32>;
fn pack_halves(v: Columns) -> HalfColumns {
    return vec2<u32>(pack2x16float(v.xy), pack2x16float(v.zw));
}
#else
alias Columns = vec2<f32>;
const WIDTH: u32 = 2u;
alias InnerColumns = Inner;
alias HalfColumns = u32;
fn pack_halves(v: Columns) -> HalfColumns {
    return pack2x16float(v);
}
#endif

#if SWIGLU
@group(0) @binding(4) var<storage, read_write> out: array<InnerColumns>;
#else
@group(0) @binding(4) var<storage, read_write> out: array<Columns>;
#endif
#if RESIDUAL
@group(0) @binding(6) var<storage, read> residual: array<Columns>;
#endif
#if RESIDUAL_COPY
@group(0) @binding(7) var<storage, read_write> copy: array<Columns>;
#endif
#if BLOCK_END
@group(0) @binding(6) var<storage, read> residual: array<Columns>;
@group(0) @binding(7) var<storage, read> gates: array<f32>;
#endif
#if RUNNING
@group(0) @binding(8) var<storage, read_write> running: array<Columns>;
#endif
#if ENCODED
@group(0) @binding(9) var<storage, read> encoding: array<Columns>;
#endif
#if QKV
@group(0) @binding(6) var<storage, read> rope: array<Columns>;
#if KV_F16
alias KvColumns = HalfColumns;
fn pack_kv(v: Columns) -> KvColumns {
    return pack_halves(v);
}
#else
alias KvColumns = Columns;
fn pack_kv(v: Columns) -> KvColumns {
    return v;
}
#endif
@group(0) @binding(7) var<storage, read_write> k_cache: array<KvColumns>;
@group(0) @binding(8) var<storage, read_write> v_cache: array<KvColumns>;

// Turns pairs of columns by angles of which cosine and sine are given.
fn rotate(v: Columns, angle: Columns) -> Columns {
#if QUADS
    let turned = v.yxwz * vec4<f32>(-1.0, 1.0, -1.0, 1.0);
    return v * angle.xxzz + turned * angle.yyww;
#else
    return v * angle.xx + vec2<f32>(-v.y, v.x) * angle.yy;
#endif
}
#endif

#if GELU
// Abramowitz and Stegun 7.1.26: |error| <= 1.5e-7.
fn erf(x: Columns) -> Columns {
    let a = abs(x);
    let t = 1.0 / (1.0 + 0.3275911 * a);
    let p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
    return sign(x) * (1.0 - p * exp(-a * a));
}
#endif

// What the epilogue reads, fetched apart so that a kernel can have it on its way while it multiplies.
struct Operands {
    // RESIDUAL, BLOCK_END: the residual; QKV: cosines and sines.
    beside: Columns,
    // BLOCK_END: the stream that the gated result is added to, and the gate.
    hidden: Columns,
    gate: f32,
    // DELTA: what is added to the product.
    delta: Columns,
    // ENCODED: what the layer's output is multiplied by.
    encoding: Columns,
}

#if BLOCK_END
// What results of a row are multiplied by, and the stream at columns from o on that they are added to; `entry` is not one past the end.
fn row_gate(entry: ActiveRow) -> f32 {
    return gates[entry.row];
}

fn row_stream(entry: ActiveRow, o: u32) -> Columns {
    return out[(entry.row * params.out_stride + o) / WIDTH];
}
#endif

// Operands of a row but for its gate and stream: `i` place in the row list, `entry` = active_rows[i], not one past its end; `o` first
// column, of the whole output. QKV without DELTA: any entry and column.
fn column_operands(i: u32, entry: ActiveRow, o: u32) -> Operands {
    var read = Operands();
#if RESIDUAL
    read.beside = residual[(entry.row * params.out_stride + o) / WIDTH];
#endif
#if BLOCK_END
    read.beside = residual[(entry.row * params.out_stride + o) / WIDTH];
#endif
#if QKV
    // Column of the head: that of a remainder without the dozens of instructions that one takes of a divisor that no compiler
    // knows; far below 2^20 columns, the half keeps the quotient's error from any whole number.
    let in_head = o - u32((f32(o) + 0.5) / f32(params.head_dim)) * params.head_dim;
    // Of v too, which does not need it: loads have no branch to wait for.
    read.beside = rope[(entry.position * params.head_dim + in_head) / WIDTH];
#if DELTA
    read.delta = out[(params.delta_start + i * (params.q_dim + 2u * params.kv_dim) + o) / WIDTH];
#endif
#endif
#if SWIGLU
#if DELTA
    // A product has twice as many columns as an output, which are as many in all.
    let at = (params.delta_start + 2u * i * params.out_stride + o) / (WIDTH / 2u);
#if QUADS
    read.delta = vec4<f32>(vec2<f32>(out[at]), vec2<f32>(out[at + 1u]));
#else
    read.delta = vec2<f32>(f32(out[at]), f32(out[at + 1u]));
#endif
#endif
#endif
#if ENCODED
    read.encoding = encoding[o / WIDTH];
#endif
    return read;
}

// All operands of an entry that is not past the end.
fn operands(i: u32, entry: ActiveRow, o: u32) -> Operands {
    var read = column_operands(i, entry, o);
#if BLOCK_END
    read.hidden = row_stream(entry, o);
    read.gate = row_gate(entry);
#endif
    return read;
}

// What a layer adds up to.
fn layer_output(v: Columns, read: Operands) -> Columns {
#if ENCODED
    return read.encoding * (read.beside + v);
#else
    return read.beside + v;
#endif
}

// `i` place in the row list, `entry` = active_rows[i], `o` first column, of the whole output, `product` its columns,
// `read` = operands(i, entry, o).
fn epilogue(i: u32, entry: ActiveRow, o: u32, product: Columns, read: Operands) {
#if DELTA
    let v = product + read.delta;
#else
    let v = product;
#endif
#if STORE
    out[(i * params.out_stride + o) / WIDTH] = v * params.scale;
#endif
#if GELU
    let x = v * params.scale;
    out[(i * params.out_stride + o) / WIDTH] = 0.5 * x * (1.0 + erf(x * 0.70710678));
#endif
#if RESIDUAL
    let at = (entry.row * params.out_stride + o) / WIDTH;
    out[at] = layer_output(v, read);
#if RESIDUAL_COPY
    copy[at] = layer_output(v, read);
#endif
#endif
#if SWIGLU
    // exp overflows to infinity for very negative gates, and the quotient is then the correct 0.
#if QUADS
    out[(i * params.out_stride + o / 2u) / 2u] = InnerColumns(v.xz / (1.0 + exp(-v.xz)) * v.yw);
#else
    out[i * params.out_stride + o / 2u] = Inner(v.x / (1.0 + exp(-v.x)) * v.y);
#endif
#endif
#if BLOCK_END
    let at = (entry.row * params.out_stride + o) / WIDTH;
    let y = layer_output(v, read);
    if entry.end == END_GATED {
        out[at] = read.hidden + select(read.gate, 1.0, params.additive != 0u) * y;
    }
#if RUNNING
    if entry.end != END_GATED {
        running[at] = y;
    }
#endif
#endif
#if QKV
    let is_value = o >= params.q_dim + params.kv_dim;
    let turned = select(rotate(v, read.beside), v, is_value);
    if o < params.q_dim {
        out[(i * params.q_dim + o) / WIDTH] = turned;
    } else if entry.kv_slot != NONE {
#if KV_STAGED
        let at = (i * params.kv_dim + o - params.q_dim) / WIDTH;
#else
        let at = (entry.kv_slot * params.kv_dim + o - params.q_dim) / WIDTH;
#endif
        let packed = pack_kv(turned);
        if is_value {
            v_cache[at - params.kv_dim / WIDTH] = packed;
        } else {
            k_cache[at] = packed;
        }
    }
#endif
}
