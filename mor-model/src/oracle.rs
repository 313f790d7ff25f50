//! The whole model on the CPU, written for reading: the reference that faster implementations are compared with.
//!
//! One sequence at a time, rows in f32, sums in f64. Only rows a recursion selected are computed. A full forward and a
//! cached decode are the same code: [`Oracle::feed`] takes the next tokens of a sequence, whether all of them or one.
//!
//! # Source
//!
//! Mixture-of-Recursions (arXiv 2507.10524); Llama block after "LLaMA" (arXiv 2302.13971).

mod maths;

use std::collections::HashMap;

use self::maths::{add, argmax, dot, gelu, mask, sigmoid, silu, spread, top_k};
use crate::{
    Checkpoint, DepthControl, Gating, KvLayout, KvStrategy, LayerTensor, LoraTensors, Mode, ModelError, MorConfig,
    RouterFunc, Routing, TensorId,
};

/// A model ready to run on the CPU: every distinct tensor in f32.
///
/// ```
/// use mor_model::{Checkpoint, Dtype, MorConfig, Routing, oracle::Oracle};
///
/// let config = MorConfig::from_json_str(
///     r#"{
///         "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 5,
///         "num_attention_heads": 4, "rms_norm_eps": 1e-5,
///         "mor": { "mode": "expert", "sharing": "middle_cycle", "num_recursion": 3 }
///     }"#,
///     "example",
/// )?;
/// let oracle = Oracle::new(&Checkpoint::random(config, 0, Dtype::F32));
/// let whole = oracle.forward(&[5, 7, 11], Routing::Causal)?;
/// let mut cache = oracle.new_cache();
/// for (t, token) in [5, 7, 11].into_iter().enumerate() {
///     assert_eq!(oracle.feed(&mut cache, &[token], Routing::Causal)?.depth[0], whole.depth[t]);
/// }
/// # Ok::<(), mor_model::ModelError>(())
/// ```
#[derive(Debug)]
pub struct Oracle {
    config: MorConfig,
    depth: DepthControl,
    kv: KvLayout,
    /// Distinct tensors, by id.
    tensors: Vec<Vec<f32>>,
    embed_tokens: TensorId,
    norm: TensorId,
    lm_head: TensorId,
    layers: Vec<crate::LayerTensors>,
    loras: HashMap<(usize, LayerTensor), LoraTensors>,
    /// What the output of each effective layer is multiplied by, if by anything.
    encodings: Vec<Option<TensorId>>,
    routers: Vec<crate::RouterTensors>,
    /// Effective layers of each recursion.
    blocks: Vec<Vec<usize>>,
    /// Rotary frequencies `[D / 2]`.
    inv_freq: Vec<f32>,
}

/// What a forward pass over n tokens shows. Rows are in position order, matrices row-major.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OracleOutput {
    /// `[n, V]`.
    pub logits: Vec<f32>,
    /// Rows after the final norm `[n, C]`.
    pub hidden: Vec<f32>,
    /// Recursions each token took.
    pub depth: Vec<u32>,
    /// Per recursion, whether a token was computed; empty without routing.
    pub selected: Vec<Vec<bool>>,
    /// Expert choice: per recursion `[n]`, zero where the token had left. Token choice: one entry `[n, R]`.
    pub router_logits: Vec<Vec<f32>>,
    /// Gates, in the shape of `router_logits`.
    pub router_weights: Vec<Vec<f32>>,
    /// Logits of the auxiliary router per recursion `[n]`; empty without one.
    pub aux_logits: Vec<Vec<f32>>,
    /// Residual stream after each recursion `[n, C]`. Token choice: running rows, or the result once a token is done.
    pub block_out: Vec<Vec<f32>>,
}

/// A greedy continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct OracleGeneration {
    /// New tokens.
    pub tokens: Vec<u32>,
    /// Logits each new token was taken from `[tokens, V]`.
    pub logits: Vec<f32>,
    /// Depth of every token fed, the prompt first; the last new token is not fed.
    pub depth: Vec<u32>,
    /// Keys and values stored per effective layer.
    pub cache_entries: Vec<usize>,
}

/// Keys and values of one sequence.
#[derive(Clone, Debug)]
pub struct OracleCache {
    num_tokens: usize,
    layers: Vec<LayerCache>,
}

/// Stored entries of one effective layer, in position order.
#[derive(Clone, Debug, Default)]
struct LayerCache {
    positions: Vec<usize>,
    /// Rotated keys `[entries, G * D]`.
    keys: Vec<f32>,
    /// Values `[entries, G * D]`.
    values: Vec<f32>,
}

impl OracleCache {
    /// Tokens fed so far.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Entries stored per effective layer.
    pub fn entries_per_layer(&self) -> Vec<usize> {
        self.layers.iter().map(|layer| layer.positions.len()).collect()
    }
}

impl Oracle {
    /// Converts all weights of `checkpoint` to f32.
    pub fn new(checkpoint: &Checkpoint) -> Self {
        let config = checkpoint.config().clone();
        let layout = checkpoint.layout();
        let half = config.head_dim / 2;
        Self {
            kv: KvLayout::new(&config, layout),
            tensors: checkpoint.tensor_ids().map(|id| checkpoint.to_f32(id)).collect(),
            embed_tokens: checkpoint.embed_tokens(),
            norm: checkpoint.norm(),
            lm_head: checkpoint.lm_head(),
            layers: (0..layout.num_layers()).map(|l| checkpoint.layer(l)).collect(),
            loras: (0..layout.num_layers())
                .flat_map(|l| LayerTensor::PROJECTIONS.map(|tensor| (l, tensor)))
                .filter_map(|(l, tensor)| Some(((l, tensor), checkpoint.lora(l, tensor)?)))
                .collect(),
            encodings: (0..layout.num_layers()).map(|l| checkpoint.recursion_encoding(l)).collect(),
            routers: (0..).map_while(|r| checkpoint.router(r)).collect(),
            blocks: (0..config.num_recursions as u32).map(|r| layout.block_layers(r)).collect(),
            inv_freq: (0..half)
                .map(|i| {
                    let exponent = (2 * i) as f32 / config.head_dim as f32;
                    1.0 / (config.rope_theta as f32).powf(exponent)
                })
                .collect(),
            config,
            depth: DepthControl::default(),
        }
    }

    /// The model with other depths.
    ///
    /// # Errors
    ///
    /// As [`DepthControl::validate`].
    pub fn with_depth_control(mut self, depth: DepthControl) -> Result<Self, ModelError> {
        depth.validate(&self.config)?;
        self.depth = depth;
        Ok(self)
    }

    /// Configuration.
    pub fn config(&self) -> &MorConfig {
        &self.config
    }

    /// An empty cache.
    pub fn new_cache(&self) -> OracleCache {
        OracleCache { num_tokens: 0, layers: vec![LayerCache::default(); self.layers.len()] }
    }

    /// Runs a whole sequence.
    ///
    /// # Errors
    ///
    /// As [`Oracle::feed`].
    pub fn forward(&self, tokens: &[u32], routing: Routing) -> Result<OracleOutput, ModelError> {
        self.feed(&mut self.new_cache(), tokens, routing)
    }

    /// Continues the sequence in `cache` with `tokens`, at the positions after those already fed.
    ///
    /// No tokens is a request like any other and gives an empty output.
    ///
    /// # Errors
    ///
    /// [`ModelError::TokenOutOfRange`], and [`ModelError::TopKNeedsWholeSequence`] when `cache` is not empty under
    /// [`Routing::TopK`] of an expert-choice model. `cache` is then unchanged.
    pub fn feed(&self, cache: &mut OracleCache, tokens: &[u32], routing: Routing) -> Result<OracleOutput, ModelError> {
        let first = cache.num_tokens;
        if routing == Routing::TopK && self.config.mode == Mode::Expert && first > 0 {
            return Err(ModelError::TopKNeedsWholeSequence { cached: first });
        }
        let mut rows = Rows::new(self.config.hidden_size);
        for (i, &token) in tokens.iter().enumerate() {
            let (position, vocab_size) = (first + i, self.config.vocab_size);
            if token as usize >= vocab_size {
                return Err(ModelError::TokenOutOfRange { token, position, vocab_size });
            }
            let start = token as usize * rows.width;
            rows.push(position, &self.weight(self.embed_tokens)[start..start + rows.width]);
        }

        let mut out = OracleOutput::default();
        match self.config.mode {
            Mode::Vanilla | Mode::Recursive => {
                for layer in 0..self.layers.len() {
                    self.layer(layer, &mut rows, cache);
                }
                out.depth = vec![self.config.num_recursions as u32; tokens.len()];
            }
            Mode::Expert | Mode::Token => {
                let middle = self.config.sharing.is_middle();
                if middle {
                    self.layer(0, &mut rows, cache);
                }
                if self.config.mode == Mode::Expert {
                    self.expert_choice(&mut rows, cache, routing, &mut out);
                } else {
                    self.token_choice(&mut rows, cache, &mut out);
                }
                if middle {
                    self.layer(self.layers.len() - 1, &mut rows, cache);
                }
            }
        }
        cache.num_tokens += tokens.len();
        out.hidden = self.rms_norm(&rows.data, self.norm);
        out.logits = self.linear(&out.hidden, self.lm_head, self.config.hidden_size);
        Ok(out)
    }

    /// Continues `prompt` with the most likely token, one cached step at a time.
    ///
    /// # Errors
    ///
    /// [`ModelError::EmptyTokens`] for an empty prompt, else as [`Oracle::feed`].
    pub fn generate(&self, prompt: &[u32], num_new: usize) -> Result<OracleGeneration, ModelError> {
        let mut cache = self.new_cache();
        let mut output =
            OracleGeneration { tokens: Vec::new(), logits: Vec::new(), depth: Vec::new(), cache_entries: Vec::new() };
        let mut logits = None;
        for &token in prompt {
            let step = self.feed(&mut cache, &[token], Routing::Causal)?;
            output.depth.extend(step.depth);
            logits = Some(step.logits);
        }
        let mut logits = logits.ok_or(ModelError::EmptyTokens { what: "the prompt" })?;
        while output.tokens.len() < num_new {
            let token = argmax(&logits) as u32;
            output.tokens.push(token);
            output.logits.append(&mut logits);
            if output.tokens.len() < num_new {
                let step = self.feed(&mut cache, &[token], Routing::Causal)?;
                output.depth.extend(step.depth);
                logits = step.logits;
            }
        }
        output.cache_entries = cache.entries_per_layer();
        Ok(output)
    }

    /// Each recursion selects among the survivors of the one before; `rows` is the residual stream.
    fn expert_choice(&self, rows: &mut Rows, cache: &mut OracleCache, routing: Routing, out: &mut OracleOutput) {
        let num_rows = rows.len();
        out.depth = vec![0; num_rows];
        let mut active: Vec<usize> = (0..num_rows).collect();
        for (r, router) in self.routers.iter().enumerate() {
            if r >= self.depth.max_depth(&self.config) {
                active.clear();
            }
            let logits = self.router(&router.router, &rows.gather(&active), self.config.temp);
            let gates: Vec<f32> = logits.iter().map(|&logit| self.expert_gate(logit)).collect();
            let aux = router.aux.as_ref().map(|aux| self.router(aux, &rows.gather(&active), 1.0));
            let decisive = aux.as_ref().unwrap_or(&logits);

            let capacity = self.config.capacity[r];
            // Indices into `active`, ascending.
            let chosen: Vec<usize> = match routing {
                Routing::TopK => {
                    // The capacity refers to the whole sequence, not to the survivors.
                    let k = ((capacity * num_rows as f64) as usize).max(1);
                    top_k(&gates, k)
                }
                Routing::Causal => {
                    (0..active.len()).filter(|&i| capacity >= 1.0 || decisive[i] >= self.depth.threshold()).collect()
                }
            };
            let selected: Vec<usize> = chosen.iter().map(|&i| active[i]).collect();

            // With shared keys and values the first block runs for everyone, to store them.
            let runs_all = r == 0 && self.config.kv != KvStrategy::RecursionWise;
            let running = if runs_all { &active } else { &selected };
            let mut y = rows.gather(running);
            self.block(r, &mut y, cache);

            for (n, (&i, &row)) in chosen.iter().zip(&selected).enumerate() {
                let y_row = y.row(if runs_all { i } else { n });
                let gate = self.residual_gate(gates[i]);
                rows.row_mut(row).iter_mut().zip(y_row).for_each(|(h, y)| *h += gate * y);
                out.depth[row] += 1;
            }

            out.router_logits.push(spread(&logits, &active, num_rows));
            out.router_weights.push(spread(&gates, &active, num_rows));
            out.aux_logits.extend(aux.map(|aux| spread(&aux, &active, num_rows)));
            out.selected.push(mask(&selected, num_rows));
            out.block_out.push(rows.data.clone());
            active = selected;
        }
    }

    /// Each token chooses its depth once, from the input of the shared part.
    fn token_choice(&self, rows: &mut Rows, cache: &mut OracleCache, out: &mut OracleOutput) {
        let num_rows = rows.len();
        let num_recursions = self.config.num_recursions;
        let router = &self.routers[0];
        let logits = self.router(&router.router, rows, self.config.temp);
        let gates: Vec<f32> = logits.chunks(num_recursions).flat_map(|logits| self.token_gates(logits)).collect();
        let bias = router.bias.map(|id| self.weight(id));
        let score =
            |(r, gate): (usize, &f32)| gate + bias.map_or(0.0, |bias| bias[r]) + r as f32 * self.depth.router_bias;
        let choose = |gates: &[f32]| {
            let scores: Vec<f32> = gates.iter().enumerate().map(score).collect();
            argmax(&scores[..self.depth.max_depth(&self.config)])
        };
        let last: Vec<usize> = gates.chunks(num_recursions).map(choose).collect();

        // `current` runs through the block; `rows` keeps the input, which the result is added to.
        let mut current = rows.clone();
        for r in 0..num_recursions {
            let selected: Vec<usize> = (0..num_rows).filter(|&row| last[row] >= r).collect();
            let mut y = current.gather(&selected);
            self.block(r, &mut y, cache);
            for (i, &row) in selected.iter().enumerate() {
                let target = current.row_mut(row);
                if last[row] == r {
                    let gate = self.residual_gate(gates[row * num_recursions + r]);
                    let terms = rows.row(row).iter().zip(y.row(i));
                    target.iter_mut().zip(terms).for_each(|(t, (h, y))| *t = h + gate * y);
                } else {
                    target.copy_from_slice(y.row(i));
                }
            }
            out.selected.push(mask(&selected, num_rows));
            out.block_out.push(current.data.clone());
        }
        *rows = current;
        out.depth = last.iter().map(|&d| d as u32 + 1).collect();
        out.router_logits.push(logits);
        out.router_weights.push(gates);
    }

    fn block(&self, r: usize, rows: &mut Rows, cache: &mut OracleCache) {
        for &layer in &self.blocks[r] {
            self.layer(layer, rows, cache);
        }
    }

    /// One Llama layer over `rows`, which keep their own positions.
    fn layer(&self, layer: usize, rows: &mut Rows, cache: &mut OracleCache) {
        let w = self.layers[layer];
        let kv = self.kv.layer(layer);

        let project = |x: &[f32], tensor| self.project(layer, tensor, x);
        let h = self.rms_norm(&rows.data, w.input_layernorm);
        let mut q = project(&h, LayerTensor::QProj);
        self.rope(&mut q, &rows.positions);
        if kv.write_group.is_some() {
            let mut k = project(&h, LayerTensor::KProj);
            self.rope(&mut k, &rows.positions);
            let store = &mut cache.layers[layer];
            store.positions.extend(&rows.positions);
            store.keys.extend(k);
            store.values.extend(project(&h, LayerTensor::VProj));
        }
        let attended = self.attention(&q, &rows.positions, &self.entries(layer, cache));
        add(&mut rows.data, &project(&attended, LayerTensor::OProj));

        let h = self.rms_norm(&rows.data, w.post_attention_layernorm);
        let mut inner = project(&h, LayerTensor::GateProj);
        let up = project(&h, LayerTensor::UpProj);
        inner.iter_mut().zip(up).for_each(|(g, up)| *g = silu(*g) * up);
        add(&mut rows.data, &project(&inner, LayerTensor::DownProj));

        if let Some(encoding) = self.encodings[layer] {
            rows.data.iter_mut().zip(self.weight(encoding).iter().cycle()).for_each(|(x, e)| *x *= e);
        }
    }

    /// A projection of a layer, with its adapter if it has one: x `[n, in]` -> `[n, out]`.
    fn project(&self, layer: usize, tensor: LayerTensor, x: &[f32]) -> Vec<f32> {
        let num_in = tensor.shape(&self.config)[1];
        let mut y = self.linear(x, self.layers[layer].get(tensor), num_in);
        if let (Some(factors), Some(lora)) = (self.loras.get(&(layer, tensor)), &self.config.lora) {
            let scale = lora.scale() as f32;
            let delta = self.linear(&self.linear(x, factors.a, num_in), factors.b, lora.rank);
            y.iter_mut().zip(delta).for_each(|(y, delta)| *y += scale * delta);
        }
        y
    }

    /// The entries `layer` may attend to, in position order: its group's, else the fallback's.
    fn entries<'a>(&self, layer: usize, cache: &'a OracleCache) -> Vec<Entry<'a>> {
        let kv = self.kv.layer(layer);
        let width = self.config.kv_dim();
        let shared = &cache.layers[self.first_layer_like(layer)];
        match (kv.write_group, kv.fallback_group) {
            (None, _) => shared.entries(width).collect(),
            (Some(_), None) => cache.layers[layer].entries(width).collect(),
            (Some(_), Some(_)) => {
                let mut own = cache.layers[layer].entries(width).peekable();
                shared
                    .entries(width)
                    .map(|entry| own.next_if(|own| own.position == entry.position).unwrap_or(entry))
                    .collect()
            }
        }
    }

    /// The layer of the first recursion at the same place in the block, which shares its buffer.
    fn first_layer_like(&self, layer: usize) -> usize {
        let buffer = self.kv.layer(layer).buffer;
        self.kv.layers().iter().position(|other| other.buffer == buffer).unwrap_or(layer)
    }

    /// Causal attention by position: q `[rows, H * D]` -> `[rows, H * D]`.
    fn attention(&self, q: &[f32], positions: &[usize], entries: &[Entry<'_>]) -> Vec<f32> {
        let head_dim = self.config.head_dim;
        let heads_per_kv = self.config.num_attention_heads / self.config.num_key_value_heads;
        let scale = 1.0 / (head_dim as f64).sqrt();
        let mut out = Vec::with_capacity(q.len());
        for (q, &position) in q.chunks(self.config.q_dim()).zip(positions) {
            // Entries ascend, so the visible ones are a prefix.
            let visible = &entries[..entries.partition_point(|entry| entry.position <= position)];
            for (head, q) in q.chunks(head_dim).enumerate() {
                let start = head / heads_per_kv * head_dim;
                let scores: Vec<f64> =
                    visible.iter().map(|entry| scale * dot(q, &entry.key[start..start + head_dim])).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
                let total: f64 = weights.iter().sum();
                let mut sum = vec![0.0f64; head_dim];
                for (weight, entry) in weights.iter().zip(visible) {
                    let value = &entry.value[start..start + head_dim];
                    sum.iter_mut().zip(value).for_each(|(sum, &v)| *sum += weight * f64::from(v));
                }
                out.extend(sum.iter().map(|sum| (sum / total) as f32));
            }
        }
        out
    }

    /// Rotates each head of `rows` `[n, heads * D]` by its position; pairs are (i, i + D / 2).
    fn rope(&self, rows: &mut [f32], positions: &[usize]) {
        if positions.is_empty() {
            return;
        }
        let half = self.config.head_dim / 2;
        let width = rows.len() / positions.len();
        for (row, &position) in rows.chunks_mut(width).zip(positions) {
            for head in row.chunks_mut(2 * half) {
                let (a, b) = head.split_at_mut(half);
                for ((a, b), &inv_freq) in a.iter_mut().zip(b).zip(&self.inv_freq) {
                    // The angle is rounded to f32 by definition; its sine and cosine are exact from there.
                    let (sin, cos) = f64::from(position as f32 * inv_freq).sin_cos();
                    let (sin, cos) = (sin as f32, cos as f32);
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }

    fn rms_norm(&self, rows: &[f32], weight: TensorId) -> Vec<f32> {
        let mut out = Vec::with_capacity(rows.len());
        for row in rows.chunks(self.config.hidden_size) {
            let mean = dot(row, row) / row.len() as f64;
            let scale = 1.0 / (mean + self.config.rms_norm_eps).sqrt();
            let weight = self.weight(weight);
            out.extend(row.iter().zip(weight).map(|(&x, &w)| (f64::from(x) * scale) as f32 * w));
        }
        out
    }

    /// x `[n, in]` times the transpose of weight `[out, in]` -> `[n, out]`.
    fn linear(&self, x: &[f32], weight: TensorId, num_in: usize) -> Vec<f32> {
        let weight = self.weight(weight);
        let num_out = weight.len() / num_in;
        let num_rows = x.len() / num_in;
        let mut y = vec![0.0; num_rows * num_out];
        // Weight rows outside: each is read once, and the rows of x stay in cache.
        for (o, w) in weight.chunks(num_in).enumerate() {
            for (i, x) in x.chunks(num_in).enumerate() {
                y[i * num_out + o] = dot(x, w) as f32;
            }
        }
        y
    }

    /// Router logits `[rows, outputs]` of `rows` divided by `temp`.
    fn router(&self, matrices: &[TensorId], rows: &Rows, temp: f64) -> Vec<f32> {
        let hidden = self.config.hidden_size;
        let x: Vec<f32> = rows.data.iter().map(|&x| x / temp as f32).collect();
        match *matrices {
            [first, second] => {
                let mut inner = self.linear(&x, first, hidden);
                inner.iter_mut().for_each(|x| *x = gelu(*x));
                self.linear(&inner, second, 2 * hidden)
            }
            [only] => self.linear(&x, only, hidden),
            _ => unreachable!("a router has one or two matrices"),
        }
    }

    fn expert_gate(&self, logit: f32) -> f32 {
        let x = f64::from(logit);
        let gate = match self.config.router_func {
            RouterFunc::Sigmoid => self.config.alpha * sigmoid(x),
            RouterFunc::Tanh => self.config.alpha * x.tanh(),
            // The configuration refuses softmax for expert choice.
            RouterFunc::None | RouterFunc::Softmax => x,
        };
        gate as f32
    }

    fn token_gates(&self, logits: &[f32]) -> Vec<f32> {
        let logits = logits.iter().map(|&x| f64::from(x));
        let gates: Vec<f64> = if self.config.router_func == RouterFunc::Softmax {
            let max = logits.clone().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = logits.clone().map(|x| (x - max).exp()).sum();
            logits.map(|x| (x - max).exp() / total).collect()
        } else {
            logits.map(sigmoid).collect()
        };
        gates.into_iter().map(|gate| (self.config.alpha * gate) as f32).collect()
    }

    /// What a block's output is multiplied by when it joins the residual stream.
    fn residual_gate(&self, gate: f32) -> f32 {
        match self.config.gating {
            Gating::Weighted => gate,
            Gating::Additive => 1.0,
        }
    }

    fn weight(&self, id: TensorId) -> &[f32] {
        &self.tensors[id.index()]
    }
}

/// Rows of the residual stream with their positions, ascending.
#[derive(Clone, Debug)]
struct Rows {
    width: usize,
    positions: Vec<usize>,
    data: Vec<f32>,
}

impl Rows {
    fn new(width: usize) -> Self {
        Self { width, positions: Vec::new(), data: Vec::new() }
    }

    fn len(&self) -> usize {
        self.positions.len()
    }

    fn push(&mut self, position: usize, row: &[f32]) {
        self.positions.push(position);
        self.data.extend_from_slice(row);
    }

    fn row(&self, index: usize) -> &[f32] {
        &self.data[index * self.width..][..self.width]
    }

    fn row_mut(&mut self, index: usize) -> &mut [f32] {
        &mut self.data[index * self.width..][..self.width]
    }

    fn gather(&self, indices: &[usize]) -> Self {
        let mut rows = Self::new(self.width);
        for &index in indices {
            rows.push(self.positions[index], self.row(index));
        }
        rows
    }
}

/// One stored key and value row.
#[derive(Clone, Copy)]
struct Entry<'a> {
    position: usize,
    key: &'a [f32],
    value: &'a [f32],
}

impl LayerCache {
    fn entries(&self, width: usize) -> impl Iterator<Item = Entry<'_>> {
        let rows = self.keys.chunks(width).zip(self.values.chunks(width));
        self.positions.iter().zip(rows).map(|(&position, (key, value))| Entry { position, key, value })
    }
}
