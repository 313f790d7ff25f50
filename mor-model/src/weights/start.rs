//! Recursive models made of the layers of a vanilla one.

use std::collections::HashMap;

use super::dtype::encode;
use super::names::{TensorName, expected_tensors, tied_to};
use super::random::SplitMix64;
use super::{Checkpoint, Dtype, Place, Tensor, TensorId};
use crate::{LayerLayout, MorConfig};

impl Checkpoint {
    /// A model of another configuration whose layer `l`, for every owner of a tied group, is the mean of the layers
    /// `sources[l]` of this one. Routers are normal with this standard deviation, their biases zero.
    pub(crate) fn recombine(self, config: MorConfig, sources: &[Vec<usize>], router_std: f64, seed: u64) -> Self {
        let layout = LayerLayout::new(&config);
        let router_dtype = self.dtype(self.embed_tokens());
        let mut state = SplitMix64::new(seed);
        let mut tensors: Vec<Tensor> = Vec::new();
        let mut ids: HashMap<TensorName, TensorId> = HashMap::new();
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
                        _ => (dtype, Place::Memory(self.mean(sources[layer].iter().map(|&l| id(l)), dtype))),
                    }
                }
                TensorName::EmbedTokens | TensorName::Norm | TensorName::LmHead => {
                    let tensor = &self.tensors[self.ids[&key].index()];
                    (tensor.dtype, tensor.place.clone())
                }
                TensorName::Router { .. } | TensorName::AuxRouter { .. } => {
                    let num_elems = expected.shape.iter().product();
                    let mut bytes = Vec::with_capacity(num_elems * router_dtype.row_bytes(1));
                    for _ in 0..num_elems {
                        let value = router_std as f32 * state.next_normal();
                        let (elem, len) = encode(value, router_dtype);
                        bytes.extend_from_slice(&elem[..len]);
                    }
                    (router_dtype, Place::Memory(bytes))
                }
                TensorName::RouterBias => (router_dtype, Place::Constant(0.0)),
            };
            ids.insert(key, TensorId(tensors.len() as u32));
            tensors.push(Tensor { name: expected.name, shape: expected.shape, dtype, place });
        }
        Self::assemble(config, layout, tensors, ids, self.source)
    }

    /// The mean of tensors of one shape, summed in f32 and rounded once.
    fn mean(&self, ids: impl ExactSizeIterator<Item = TensorId>, dtype: Dtype) -> Vec<u8> {
        let scale = 1.0 / ids.len() as f32;
        let sum = ids.map(|id| self.to_f32(id)).reduce(|mut sum, values| {
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
            sum
        });
        let mut bytes = Vec::new();
        for value in sum.unwrap_or_default() {
            let (elem, len) = encode(value * scale, dtype);
            bytes.extend_from_slice(&elem[..len]);
        }
        bytes
    }
}
