//! CPU reference of `decode_layers`: embedding, the layers one after the other, head, sums in f64.

use crate::ops::{
    ALWAYS, BLOCK_BEGIN, BLOCK_END, DecodeLayersParams, ExpertGate, LayerRouting, LayerStep, LayersShape,
    RouterExpertParams, TokenGate,
};
use crate::oracle::router_expert::script;
use crate::rows::{ActiveRow, NONE, PAGE_SIZE, Row};
use crate::tensor::DType;

/// What the kernel reads and writes, as f32 of the values that it sees.
#[derive(Clone, Debug)]
pub struct LayersState {
    /// `[matrices, q and kv columns, C]`; the halves of a rotary pair adjacent.
    pub qkv_proj: Vec<f32>,
    /// `[matrices, C, q columns]`.
    pub o_proj: Vec<f32>,
    /// `[matrices, 2 mlp_dim, C]`; gate and up alternate.
    pub gate_up_proj: Vec<f32>,
    /// `[matrices, C, mlp_dim]`.
    pub down_proj: Vec<f32>,
    /// `[V, C]`.
    pub embed_tokens: Vec<f32>,
    /// `[V, C]`.
    pub lm_head: Vec<f32>,
    /// `[2 * layers + 1, C]`.
    pub norms: Vec<f32>,
    /// `[positions, D / 2]` of (cos, sin).
    pub rope: Vec<[f32; 2]>,
    /// `[sequences, num_groups, max_pages]`.
    pub pages: Vec<u32>,
    /// `[sequences, num_groups]`; updated.
    pub kv_lengths: Vec<u32>,
    /// `[slots, kv columns]`; updated.
    pub keys: Vec<f32>,
    /// `[slots, kv columns]`; updated.
    pub values: Vec<f32>,
    /// `[R, C]`.
    pub router: Vec<f32>,
    /// Token choice's bias `[R]`, or the script's shares `[R]`.
    pub bias_or_shares: Vec<f32>,
    /// Recursions taken; updated.
    pub depth: u32,
    /// Blocks run; written.
    pub blocks: u32,
    /// `[V]`; written.
    pub logits: Vec<f32>,
}

fn product(w: &[f32], place: u32, rows: usize, x: &[f64]) -> Vec<f64> {
    let matrix = &w[place as usize * rows * x.len()..][..rows * x.len()];
    matrix.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()).collect()
}

fn normed(x: &[f64], weight: &[f32], eps: f32) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let factor = (mean + f64::from(eps)).sqrt().recip();
    x.iter().zip(weight).map(|(x, w)| x * factor * f64::from(*w)).collect()
}

fn sigmoid(v: f64) -> f64 {
    1.0 / (1.0 + (-v).exp())
}

/// The step of `row`.
pub fn decode_layers(
    shape: &LayersShape,
    p: &DecodeLayersParams,
    steps: &[LayerStep],
    row: &Row,
    state: &mut LayersState,
) {
    let (c, mlp_dim) = (shape.hidden_size as usize, shape.mlp_dim as usize);
    let heads = shape.attention;
    let head_dim = heads.head_dim as usize;
    let (q_dim, kv_dim) =
        (heads.num_attention_heads as usize * head_dim, heads.num_key_value_heads as usize * head_dim);
    let rounded = |v: f64| if heads.kv_dtype == DType::F16 { half::f16::from_f64(v).to_f32() } else { v as f32 };
    let logit = |state: &LayersState, hidden: &[f64], r: usize| {
        let weights = &state.router[r * c..][..c];
        f64::from(p.input_scale) * weights.iter().zip(hidden).map(|(w, x)| f64::from(*w) * x).sum::<f64>()
    };
    let embedding = &state.embed_tokens[row.token as usize * c..][..c];
    let embedding = embedding.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
    let mut streams = [embedding, vec![f64::NAN; c], vec![f64::NAN; c]];
    let (mut selected, mut gate, mut target_depth) = (false, 0.0, 0);
    let mut taken = 0;
    let mut added = Vec::new();
    let mut s = 0;
    while s < steps.len() {
        let step = &steps[s];
        let group = (row.sequence * p.num_groups + step.group) as usize;
        let slot = state.kv_lengths[group];
        let kv_table = group as u32 * p.max_pages;
        let kv_slot = state.pages[(kv_table + slot / PAGE_SIZE) as usize] * PAGE_SIZE + slot % PAGE_SIZE;
        let kv_len = slot + 1;
        if step.flags & BLOCK_BEGIN != 0 {
            let r = step.recursion as usize;
            let runs = match shape.routing {
                LayerRouting::Fixed => {
                    taken += 1;
                    true
                }
                LayerRouting::Expert { gate: function, scripted } => {
                    let value = logit(state, &streams[0], r);
                    gate = match function {
                        ExpertGate::Sigmoid => f64::from(p.alpha) * sigmoid(value),
                        ExpertGate::Tanh => f64::from(p.alpha) * value.tanh(),
                        ExpertGate::None => value,
                    };
                    let mut decision = [value as f32];
                    if scripted {
                        let before = ActiveRow {
                            row: 0,
                            sequence: row.sequence,
                            position: row.position,
                            recursion: step.recursion.wrapping_sub(1),
                            ..ActiveRow::ABSENT
                        };
                        let params = RouterExpertParams {
                            num_recursions: p.num_recursions,
                            seed_low: p.seed_low,
                            seed_high: p.seed_high,
                            ..Default::default()
                        };
                        script(&params, &[before], &state.bias_or_shares, &mut decision);
                    }
                    selected = step.flags & ALWAYS != 0 || decision[0] >= p.threshold;
                    taken += u32::from(selected);
                    selected
                }
                LayerRouting::Token { gate: function, bias, num_recursions } => {
                    if r == 0 {
                        let logits: Vec<f64> =
                            (0..num_recursions as usize).map(|r| logit(state, &streams[0], r)).collect();
                        let top = logits.iter().copied().fold(f64::MIN, f64::max);
                        let total: f64 = logits.iter().map(|l| (l - top).exp()).sum();
                        let gates: Vec<f64> = logits
                            .iter()
                            .map(|l| match function {
                                TokenGate::Softmax => f64::from(p.alpha) * (l - top).exp() / total,
                                TokenGate::Sigmoid => f64::from(p.alpha) * sigmoid(*l),
                            })
                            .collect();
                        let score = |r: usize| {
                            let bias = if bias { f64::from(state.bias_or_shares[r]) } else { 0.0 };
                            gates[r] + bias + r as f64 * f64::from(p.depth_bias)
                        };
                        let best =
                            (1..p.max_depth as usize).fold(0, |best, r| if score(r) > score(best) { r } else { best });
                        (target_depth, gate) = (best as u32 + 1, gates[best]);
                        taken = target_depth;
                    }
                    selected = target_depth == step.recursion + 1;
                    target_depth > step.recursion
                }
            };
            if !runs {
                s = p.coda as usize;
                continue;
            }
            state.blocks += 1;
            added.push(group);
        }
        let x = streams[step.input as usize].clone();
        let norm = |which: usize| &state.norms[(2 * step.norms as usize + which) * c..][..c];
        let mut qkv = product(&state.qkv_proj, step.qkv_proj, q_dim + 2 * kv_dim, &normed(&x, norm(0), p.eps));
        for pair in 0..(q_dim + kv_dim) / 2 {
            let [cos, sin] = state.rope[row.position as usize * head_dim / 2 + 2 * pair % head_dim / 2].map(f64::from);
            let (a, b) = (qkv[2 * pair], qkv[2 * pair + 1]);
            (qkv[2 * pair], qkv[2 * pair + 1]) = (a * cos - b * sin, b * cos + a * sin);
        }
        let at = (step.first_slot + kv_slot) as usize * kv_dim;
        for i in 0..kv_dim {
            state.keys[at + i] = rounded(qkv[q_dim + i]);
            state.values[at + i] = rounded(qkv[q_dim + kv_dim + i]);
        }
        let slot_of = |key: u32| {
            let page = state.pages[(kv_table + key / PAGE_SIZE) as usize];
            (step.first_slot + page * PAGE_SIZE + key % PAGE_SIZE) as usize
        };
        let mut attended = vec![0.0; q_dim];
        let sharing = (heads.num_attention_heads / heads.num_key_value_heads) as usize;
        for head in 0..heads.num_attention_heads as usize {
            let q = &qkv[head * head_dim..][..head_dim];
            let at = |key: u32| slot_of(key) * kv_dim + head / sharing * head_dim;
            let scores: Vec<f64> = (0..kv_len)
                .map(|key| {
                    let k = &state.keys[at(key)..][..head_dim];
                    f64::from(p.attention_scale) * q.iter().zip(k).map(|(q, k)| q * f64::from(*k)).sum::<f64>()
                })
                .collect();
            let highest = scores.iter().copied().fold(f64::MIN, f64::max);
            let mass: f64 = scores.iter().map(|score| (score - highest).exp()).sum();
            for (key, score) in (0..kv_len).zip(&scores) {
                let share = (score - highest).exp() / mass;
                for i in 0..head_dim {
                    attended[head * head_dim + i] += share * f64::from(state.values[at(key) + i]);
                }
            }
        }
        let add = |a: &[f64], b: Vec<f64>| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<f64>>();
        let middle = add(&x, product(&state.o_proj, step.o_proj, c, &attended));
        let gate_up = product(&state.gate_up_proj, step.gate_up_proj, 2 * mlp_dim, &normed(&middle, norm(1), p.eps));
        let mlp: Vec<f64> = gate_up.chunks(2).map(|pair| pair[0] * sigmoid(pair[0]) * pair[1]).collect();
        let y = add(&middle, product(&state.down_proj, step.down_proj, c, &mlp));
        if shape.routing == LayerRouting::Fixed || step.flags & BLOCK_END == 0 {
            streams[step.output as usize] = y;
        } else if selected {
            let factor = if p.additive != 0 { 1.0 } else { gate };
            streams[0] = add(&streams[0], y.into_iter().map(|y| factor * y).collect());
        } else if matches!(shape.routing, LayerRouting::Token { .. }) {
            streams[1] = y;
        }
        s += 1;
    }
    for group in added {
        state.kv_lengths[group] += 1;
    }
    if p.unshared_group != NONE {
        state.kv_lengths[(row.sequence * p.num_groups + p.unshared_group) as usize] += 1;
    }
    state.depth = p.base_depth + taken;
    let norm = &state.norms[p.final_norm as usize * c..][..c];
    let logits = product(&state.lm_head, 0, shape.vocab_size as usize, &normed(&streams[0], norm, p.eps));
    state.logits = logits.into_iter().map(|v| v as f32).collect();
}
