//! CPU reference of the linear kernels: the product in f64, then each epilogue.

use crate::epilogue::LinearParams;
use crate::rows::{ActiveRow, END_GATED, NONE};

/// The compact inputs of the active rows of a stream `[T, K]`.
pub fn gather(active: &[ActiveRow], x: &[f32], in_features: usize) -> Vec<f32> {
    active.iter().flat_map(|entry| &x[entry.row as usize * in_features..][..in_features]).copied().collect()
}

/// `y[i, o] = sum_k x[i, k] * w[o, k]` for compact `x` `[n, K]` and `w` `[O, K]`.
pub fn linear(x: &[f32], w: &[f32], in_features: usize) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32;
    x.chunks(in_features).flat_map(|row| w.chunks(in_features).map(move |weights| dot(row, weights))).collect()
}

/// `x`, a multiple of eight elements, as the digits of `shared/digits.wgsl` have it: eight at a time in whole steps, of which the
/// greatest is 32,600.
pub fn rounded_to_digits(x: &[f32]) -> Vec<f32> {
    const GREATEST: f32 = 32600.0;
    let rounded = |eight: &[f32]| {
        let greatest = eight.iter().fold(0.0f32, |greatest, v| greatest.max(v.abs()));
        let factor = if greatest > 1e-30 { GREATEST * (1.0 / greatest) } else { 0.0 };
        let step = greatest * (1.0 / GREATEST);
        eight.iter().map(|v| (v * factor).round_ties_even() * step).collect::<Vec<_>>()
    };
    x.chunks(8).flat_map(rounded).collect()
}

/// What an epilogue reads and updates besides the product; unused parts stay empty.
#[derive(Clone, Debug, Default)]
pub struct EpilogueState {
    /// The main output: compact or a stream. With a delta, behind it `[n, columns]` from `delta_start` on.
    pub out: Vec<f32>,
    /// Stream `[T, out_stride]`.
    pub residual: Vec<f32>,
    /// `[max_positions, head_dim / 2]` of (cos, sin).
    pub rope: Vec<[f32; 2]>,
    /// `[num_slots, kv_dim]`.
    pub k_cache: Vec<f32>,
    /// `[num_slots, kv_dim]`.
    pub v_cache: Vec<f32>,
    /// `[T]`.
    pub gates: Vec<f32>,
    /// Stream `[T, out_stride]`.
    pub running: Vec<f32>,
    /// `[out_stride]`.
    pub encoding: Vec<f32>,
}

/// Applies the epilogue `kind` to the products `y` `[n, num_outputs]`.
pub fn epilogue(
    kind: crate::epilogue::EpilogueKind,
    active: &[ActiveRow],
    y: &[f32],
    p: &LinearParams,
    state: &mut EpilogueState,
) {
    use crate::epilogue::EpilogueKind as E;
    let (stride, columns) = (p.out_stride as usize, p.num_outputs as usize);
    let (q_dim, kv_dim, head_dim) = (p.q_dim as usize, p.kv_dim as usize, p.head_dim as usize);
    for (i, entry) in active.iter().enumerate() {
        let row = entry.row as usize;
        for pair in 0..columns / 2 {
            let mut v = [f64::from(y[i * columns + 2 * pair]), f64::from(y[i * columns + 2 * pair + 1])];
            let o = p.first_output as usize + 2 * pair;
            if kind.has_delta() {
                let all_columns = if kind == E::SwiGluDelta { 2 * stride } else { q_dim + 2 * kv_dim };
                let delta = &state.out[p.delta_start as usize + i * all_columns + o..][..2];
                v = [v[0] + f64::from(delta[0]), v[1] + f64::from(delta[1])];
            }
            if matches!(kind, E::SwiGlu | E::SwiGluDelta) {
                state.out[i * stride + o / 2] = (v[0] / (1.0 + (-v[0]).exp()) * v[1]) as f32;
                continue;
            }
            if kind.is_qkv() {
                if o >= q_dim && entry.kv_slot == NONE {
                    continue;
                }
                let is_staged = matches!(kind, E::QkvStaged | E::QkvStagedDelta);
                let slot = if is_staged { i } else { entry.kv_slot as usize } * kv_dim;
                let (a, b) = if o < q_dim + kv_dim {
                    let [cos, sin] =
                        state.rope[entry.position as usize * head_dim / 2 + o % head_dim / 2].map(f64::from);
                    (v[0] * cos - v[1] * sin, v[1] * cos + v[0] * sin)
                } else {
                    (v[0], v[1])
                };
                let (tensor, at) = if o < q_dim {
                    (&mut state.out, i * q_dim + o)
                } else if o < q_dim + kv_dim {
                    (&mut state.k_cache, slot + o - q_dim)
                } else {
                    (&mut state.v_cache, slot + o - q_dim - kv_dim)
                };
                tensor[at] = a as f32;
                tensor[at + 1] = b as f32;
                continue;
            }
            for (side, v) in v.into_iter().enumerate() {
                let (compact, at) = (i * stride + o + side, row * stride + o + side);
                let gate = if p.additive != 0 { 1.0 } else { state.gates.get(row).copied().map_or(1.0, f64::from) };
                let scaled = v * f64::from(p.scale);
                // What the layer adds up to.
                let output = |state: &EpilogueState| {
                    let encoding = if kind.is_encoded() { f64::from(state.encoding[o + side]) } else { 1.0 };
                    encoding * (f64::from(state.residual[at]) + v)
                };
                match kind {
                    E::Store => state.out[compact] = scaled as f32,
                    E::Gelu => state.out[compact] = gelu(scaled) as f32,
                    E::Residual | E::Encoded => state.out[at] = output(state) as f32,
                    E::ResidualCopy => {
                        state.out[at] = output(state) as f32;
                        state.running[at] = state.out[at];
                    }
                    E::BlockEndExpert | E::BlockEndExpertEncoded if entry.end != END_GATED => {}
                    E::BlockEndToken | E::BlockEndTokenEncoded if entry.end != END_GATED => {
                        state.running[at] = output(state) as f32;
                    }
                    E::BlockEndExpert | E::BlockEndToken | E::BlockEndExpertEncoded | E::BlockEndTokenEncoded => {
                        state.out[at] = (f64::from(state.out[at]) + gate * output(state)) as f32;
                    }
                    _ => unreachable!("handled as pairs above"),
                }
            }
        }
    }
}

/// The exact GELU, `x * Phi(x)`, by numerical integration of the error function's series.
fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2))
}

fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    // Maclaurin series; 100 terms converge to f64 precision for |x| <= 5 up to cancellation below 1e-6.
    let (mut term, mut sum) = (x, x);
    for n in 1..100 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}
