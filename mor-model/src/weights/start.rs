//! Recursive models made of the layers of a vanilla one.

use std::collections::HashMap;

use super::dtype::encode;
use super::names::{LayerTensor, TensorName, expected_tensors, tied_to};
use super::random::SplitMix64;
use super::{Checkpoint, Dtype, Place, Tensor, TensorId};
use crate::{LayerLayout, LoraFactors, MorConfig, lora_factors};

impl Checkpoint {
    /// A model of another configuration whose layer `l`, for every owner of a tied group, is the mean of the layers
    /// `sources[l]` of this one. Adapters make up for what that takes from a layer, as far as their rank allows. Routers are
    /// normal with this standard deviation, their biases zero.
    pub(crate) fn recombine(self, config: MorConfig, sources: &[Vec<usize>], router_std: f64, seed: u64) -> Self {
        let layout = LayerLayout::new(&config);
        let router_dtype = self.dtype(self.embed_tokens());
        let mut state = SplitMix64::new(seed);
        let mut tensors: Vec<Tensor> = Vec::new();
        let mut ids: HashMap<TensorName, TensorId> = HashMap::new();
        // Second factors, made with the first ones.
        let mut factors: HashMap<(usize, LayerTensor), Vec<f32>> = HashMap::new();
        for expected in expected_tensors(&config, &layout) {
            let key = expected.key;
            let tied = match key {
                // What the vanilla model has counts, not what its configuration says of it.
                TensorName::LmHead if self.lm_head() == self.embed_tokens() => Some(TensorName::EmbedTokens),
                TensorName::LmHead => None,
                _ => tied_to(&key, &layout, config.tie_word_embeddings),
            };
            if let Some(owner) = tied {
                ids.insert(key, ids[&owner]);
                continue;
            }
            let (dtype, place) = match key {
                TensorName::Layer { layer, tensor } => {
                    let id = |layer| self.ids[&TensorName::Layer { layer, tensor }];
                    let dtype = self.dtype(id(sources[layer][0]));
                    match sources[layer][..] {
                        [one] => (dtype, self.tensors[id(one).index()].place.clone()),
                        _ => (dtype, Place::Memory(encoded(&self.mean(sources[layer].iter().map(|&l| id(l))), dtype))),
                    }
                }
                TensorName::LoraA { layer, tensor } => {
                    let id = |layer| self.ids[&TensorName::Layer { layer, tensor }];
                    let dtype = self.dtype(id(layer));
                    let shared = self.mean(sources[layout.owner(layer)].iter().map(|&l| id(l)));
                    let (rank, num_inputs) = (expected.shape[0], expected.shape[1]);
                    let LoraFactors { a, b } = lora_factors(&self.to_f32(id(layer)), &shared, num_inputs, rank);
                    factors.insert((layer, tensor), b);
                    (dtype, Place::Memory(encoded(&a, dtype)))
                }
                TensorName::LoraB { layer, tensor } => {
                    let dtype = self.dtype(self.ids[&TensorName::Layer { layer, tensor }]);
                    let factor = factors.remove(&(layer, tensor)).expect("it was made with the first factor");
                    (dtype, Place::Memory(encoded(&factor, dtype)))
                }
                // The output of a layer is not scaled at first.
                TensorName::RecursionEncoding { .. } => (router_dtype, Place::Constant(1.0)),
                TensorName::EmbedTokens | TensorName::Norm | TensorName::LmHead => {
                    let tensor = &self.tensors[self.ids[&key].index()];
                    (tensor.dtype, tensor.place.clone())
                }
                TensorName::Router { .. } | TensorName::AuxRouter { .. } => {
                    let num_elems: usize = expected.shape.iter().product();
                    let values: Vec<f32> = (0..num_elems).map(|_| router_std as f32 * state.next_normal()).collect();
                    (router_dtype, Place::Memory(encoded(&values, router_dtype)))
                }
                TensorName::RouterBias => (router_dtype, Place::Constant(0.0)),
            };
            ids.insert(key, TensorId(tensors.len() as u32));
            tensors.push(Tensor { name: expected.name, shape: expected.shape, dtype, place });
        }
        Self::assemble(config, layout, tensors, ids, self.source)
    }

    /// The mean of tensors of one shape, summed in f32.
    fn mean(&self, ids: impl ExactSizeIterator<Item = TensorId>) -> Vec<f32> {
        let scale = 1.0 / ids.len() as f32;
        let sum = ids.map(|id| self.to_f32(id)).reduce(|mut sum, values| {
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
            sum
        });
        sum.unwrap_or_default().into_iter().map(|value| value * scale).collect()
    }
}

fn encoded(values: &[f32], dtype: Dtype) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.len() * dtype.row_bytes(1));
    for value in values {
        let (elem, len) = encode(*value, dtype);
        bytes.extend_from_slice(&elem[..len]);
    }
    bytes
}
