//! Tiny models with random weights large enough that routing matters, written as a checkpoint would be.
#![allow(dead_code, reason = "every test file uses a part of it")]

pub(crate) mod batch;
pub(crate) mod tape;

use std::collections::BTreeMap;
use std::path::Path;

use mor_kernels::parity::Rng;
use mor_model::{
    Balancing, Checkpoint, Dtype, LayerLayout, LayerTensor, Mode, ModelError, MorConfig, RouterFunc, RouterType,
};
use mor_runtime::runner::RunnerOptions;
use serde_json::{Map, Value, json};

/// Vocabulary of the tiny models: odd, so that rows of logits are padded.
pub(crate) const VOCAB: usize = 61;

/// A runner's options with nothing special about them: `num_slots` sequences of up to `max_positions` tokens, and prefill steps of up to
/// `prefill_rows` rows.
pub(crate) fn runner_options(num_slots: usize, max_positions: usize, prefill_rows: usize) -> RunnerOptions {
    let (batching, pages_in_class, batch_invariant, persistent) = (None, None, false, false);
    RunnerOptions { num_slots, max_positions, prefill_rows, batching, pages_in_class, batch_invariant, persistent }
}

/// Shape and values of one tensor.
pub(crate) type Values = (Vec<usize>, Vec<f32>);

/// A model as a checkpoint file would hold it.
pub(crate) struct TinyModel {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, Values>,
}

impl TinyModel {
    /// Random weights for `config`: projections keep the scale of their input, so logits and router logits are of the
    /// order of one. Tied tensors are written once, under their owner's name.
    pub(crate) fn random(config: Value, rng: &mut Rng) -> Self {
        let mut model = Self { config, tensors: BTreeMap::new() };
        let parsed = model.parsed();
        let layout = LayerLayout::new(&parsed);
        let hidden = parsed.hidden_size;
        model.normal(rng, "model.embed_tokens.weight", &[parsed.vocab_size, hidden], 1.0);
        if !parsed.tie_word_embeddings {
            model.normal(rng, "lm_head.weight", &[parsed.vocab_size, hidden], 1.0);
        }
        model.norm(rng, "model.norm.weight", hidden);
        for layer in (0..layout.num_layers()).filter(|layer| layout.owner(*layer) == *layer) {
            for tensor in LayerTensor::ALL {
                let name = format!("{}.{}", layout.prefix(layer), tensor.suffix());
                match tensor.shape(&parsed)[..] {
                    [width] => model.norm(rng, &name, width),
                    ref shape => model.normal(rng, &name, shape, 1.0 / (shape[1] as f32).sqrt()),
                }
            }
        }
        let (routers, outputs) = match parsed.mode {
            Mode::Expert => (parsed.num_recursions as u32, 1),
            Mode::Token => (1, parsed.num_recursions),
            Mode::Vanilla | Mode::Recursive => (0, 0),
        };
        // Where the logit itself is the gate, a large one would let the residual stream grow with every step.
        let router_scale = if parsed.router_func == RouterFunc::None { 0.25 } else { 1.0 };
        for r in 0..routers {
            let prefix = layout.router_prefix(r);
            let networks: &[&str] =
                if parsed.has_aux_router() { &["mor_router", "mlp_router"] } else { &["mor_router"] };
            for network in networks {
                let mut matrix = |name: &str, shape: [usize; 2]| {
                    let scale = if shape[0] == outputs { router_scale } else { 1.0 } / (shape[1] as f32).sqrt();
                    model.normal(rng, &format!("{prefix}.{network}.{name}"), &shape, scale);
                };
                if parsed.router_type == RouterType::Linear {
                    matrix("router.weight", [outputs, hidden]);
                } else {
                    matrix("router.0.weight", [2 * hidden, hidden]);
                    matrix("router.2.weight", [outputs, 2 * hidden]);
                }
            }
        }
        if parsed.mode == Mode::Token && parsed.balancing == Balancing::LossFree {
            model.normal(rng, &format!("{}.router_bias", layout.router_prefix(0)), &[outputs], 0.1);
        }
        model
    }

    pub(crate) fn parsed(&self) -> MorConfig {
        MorConfig::from_json_str(&self.config.to_string(), "tiny model").expect("the config is valid")
    }

    fn normal(&mut self, rng: &mut Rng, name: &str, shape: &[usize], scale: f32) {
        let values = rng.normals(shape.iter().product()).into_iter().map(|value| scale * value).collect();
        self.tensors.insert(name.to_owned(), (shape.to_vec(), values));
    }

    fn norm(&mut self, rng: &mut Rng, name: &str, width: usize) {
        let values = rng.normals(width).into_iter().map(|value| 1.0 + 0.1 * value).collect();
        self.tensors.insert(name.to_owned(), (vec![width], values));
    }

    /// The file, or a shard of it, with the elements of `dtype`.
    pub(crate) fn bytes(&self, dtype: Dtype, keep: impl Fn(&str) -> bool) -> Vec<u8> {
        self.bytes_of(|_| dtype, keep)
    }

    /// As [`TinyModel::bytes`], with an element type for each name.
    pub(crate) fn bytes_of(&self, dtype: impl Fn(&str) -> Dtype, keep: impl Fn(&str) -> bool) -> Vec<u8> {
        let (mut header, mut data) = (Map::new(), Vec::new());
        for (name, (shape, values)) in self.tensors.iter().filter(|(name, _)| keep(name)) {
            let (start, dtype) = (data.len(), dtype(name));
            for value in values {
                match dtype {
                    Dtype::F32 => data.extend(value.to_le_bytes()),
                    Dtype::F16 => data.extend(half::f16::from_f32(*value).to_le_bytes()),
                    Dtype::BF16 => data.extend(half::bf16::from_f32(*value).to_le_bytes()),
                    Dtype::Q8 | Dtype::Q4 => unreachable!("checkpoints are quantised after they are opened"),
                }
            }
            let info = json!({ "dtype": dtype.to_string(), "shape": shape, "data_offsets": [start, data.len()] });
            header.insert(name.clone(), info);
        }
        let header = Value::Object(header).to_string();
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
    }

    pub(crate) fn checkpoint(&self, dtype: Dtype) -> Result<Checkpoint, ModelError> {
        Checkpoint::from_bytes(&self.config.to_string(), self.bytes(dtype, |_| true), "tiny model")
    }

    /// Writes a folder as Hugging Face tools do; with several shards if asked.
    pub(crate) fn write(&self, folder: &Path, dtype: Dtype, num_shards: usize) {
        let write =
            |name: &str, bytes: &[u8]| std::fs::write(folder.join(name), bytes).expect("the folder is writable");
        write("config.json", self.config.to_string().as_bytes());
        if num_shards == 1 {
            write("model.safetensors", &self.bytes(dtype, |_| true));
            return;
        }
        let shard = |name: &str| self.tensors.keys().position(|other| other == name).unwrap_or(0) % num_shards;
        let file = |index: usize| format!("model-{:05}-of-{num_shards:05}.safetensors", index + 1);
        for index in 0..num_shards {
            write(&file(index), &self.bytes(dtype, |name| shard(name) == index));
        }
        let map: BTreeMap<&str, String> = self.tensors.keys().map(|name| (name.as_str(), file(shard(name)))).collect();
        let index = json!({ "metadata": { "total_size": 0 }, "weight_map": map });
        write("model.safetensors.index.json", index.to_string().as_bytes());
    }
}

/// A Llama configuration without a `mor` object, of `num_layers` layers.
pub(crate) fn llama_config(num_layers: usize, heads: usize, kv_heads: usize) -> Value {
    json!({
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": num_layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 256, "tie_word_embeddings": true,
        "bos_token_id": 0, "eos_token_id": 0,
    })
}
