//! Random weights, the same for a seed on every platform.

use std::collections::HashMap;
use std::ops::Range;

use super::dtype::encode;
use super::names::{TensorName, expected_tensors, tied_to};
use super::{Checkpoint, Dtype, Place, Source, Tensor, TensorId};
use crate::{LayerLayout, MorConfig};

impl Checkpoint {
    /// Makes a model with random weights: normal with standard deviation 0.02, norms 1, biases 0.
    ///
    /// The same configuration, seed and type give the same weights everywhere. Values come from one pool of a few
    /// million that tensors read at different offsets, so even a large model takes little memory and time.
    pub fn random(config: MorConfig, seed: u64, dtype: Dtype) -> Self {
        let layout = LayerLayout::new(&config);
        let pool = Pool::new(seed, dtype);
        let mut tensors: Vec<Tensor> = Vec::new();
        let mut ids = HashMap::new();
        for expected in expected_tensors(&config, &layout) {
            if let Some(owner) = tied_to(&expected.key, &layout, config.tie_word_embeddings) {
                ids.insert(expected.key, ids[&owner]);
                continue;
            }
            let place = match expected.key {
                TensorName::RouterBias => Place::Constant(0.0),
                _ if expected.shape.len() == 1 => Place::Constant(1.0),
                _ => Place::Pool { first_elem: pool.offset(seed, tensors.len()) },
            };
            ids.insert(expected.key, TensorId(tensors.len() as u32));
            tensors.push(Tensor { name: expected.name, shape: expected.shape, dtype, place });
        }
        Self::assemble(config, layout, tensors, ids, Source::Random(pool))
    }
}

/// A cyclic store of normal values with standard deviation 0.02, in the model's element type.
pub(super) struct Pool {
    bytes: Vec<u8>,
    pub(super) elem_bytes: usize,
}

impl Pool {
    /// A prime, so that no matrix width divides it and rows of a matrix do not repeat.
    const NUM_ELEMS: usize = 4_194_301;

    fn new(seed: u64, dtype: Dtype) -> Self {
        let elem_bytes = dtype.row_bytes(1);
        let mut bytes = Vec::with_capacity(Self::NUM_ELEMS * elem_bytes);
        let mut state = SplitMix64::new(seed);
        for _ in 0..Self::NUM_ELEMS {
            let (elem, len) = encode(0.02 * state.next_normal(), dtype);
            bytes.extend_from_slice(&elem[..len]);
        }
        Self { bytes, elem_bytes }
    }

    /// Where tensor number `tensor` starts.
    fn offset(&self, seed: u64, tensor: usize) -> usize {
        let mut state = SplitMix64::new(seed ^ (tensor as u64 + 1).wrapping_mul(0xd1b5_4a32_d192_ed03));
        (state.next() % Self::NUM_ELEMS as u64) as usize
    }

    /// The bytes `range` of what begins at an element, where they do not pass the end of the pool.
    pub(super) fn contiguous(&self, first_elem: usize, range: &Range<usize>) -> Option<&[u8]> {
        let start = (first_elem * self.elem_bytes + range.start) % self.bytes.len();
        self.bytes.get(start..start + range.len())
    }

    pub(super) fn read(&self, first_elem: usize, mut out: &mut [u8]) {
        let mut start = first_elem % Self::NUM_ELEMS * self.elem_bytes;
        while !out.is_empty() {
            let len = out.len().min(self.bytes.len() - start);
            let (head, tail) = out.split_at_mut(len);
            head.copy_from_slice(&self.bytes[start..start + len]);
            (out, start) = (tail, 0);
        }
    }
}

/// The splitmix64 generator.
pub(super) struct SplitMix64(u64);

impl SplitMix64 {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A nearly normal value: the sum of twelve uniform ones has variance 1. Integer sums, unlike logarithms and
    /// cosines, are the same on every platform.
    pub(super) fn next_normal(&mut self) -> f32 {
        let mut sum = 0;
        for _ in 0..3 {
            let bits = self.next();
            sum += (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum::<u64>();
        }
        // The mean of one 16-bit value is 32767.5.
        ((sum as f64 - 12.0 * 32767.5) / 65536.0) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(mor: &str) -> MorConfig {
        let text = format!(
            r#"{{ "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 8,
                "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "mor": {mor} }}"#
        );
        MorConfig::from_json_str(&text, "test").unwrap()
    }

    #[test]
    fn random_models_are_deterministic_and_normal() {
        let expert = r#"{ "mode": "expert", "sharing": "middle_cycle", "num_recursion": 3,
            "router_type": "mlp", "sampling": "aux_router" }"#;
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let [a, b, other] = [7, 7, 8].map(|seed| Checkpoint::random(config(expert), seed, dtype));
            let embed = a.to_f32(a.embed_tokens());
            assert_eq!(embed, b.to_f32(b.embed_tokens()));
            assert_ne!(embed, other.to_f32(other.embed_tokens()));
            assert_ne!(a.view(a.layer(0).q_proj).data, a.view(a.layer(1).q_proj).data);
            assert!(a.to_f32(a.norm()).iter().all(|&w| w == 1.0));

            let n = embed.len() as f64;
            let mean = embed.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            let variance = embed.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n - mean * mean;
            assert!(mean.abs() < 1e-3 && (variance.sqrt() - 0.02).abs() < 1e-3, "{mean} {variance}");

            let router = a.router(2).unwrap();
            assert_eq!(router.router.iter().map(|&id| a.shape(id)).collect::<Vec<_>>(), [[128, 64], [1, 128]]);
            assert_eq!(router.aux.unwrap().len(), 2);
            assert_eq!((router.bias, a.router(3)), (None, None));
        }
    }

    #[test]
    fn random_loss_free_models_have_a_zero_bias() {
        let token = r#"{ "mode": "token", "sharing": "cycle", "num_recursion": 4, "balancing": "loss_free" }"#;
        let checkpoint = Checkpoint::random(config(token), 0, Dtype::BF16);
        let router = checkpoint.router(0).unwrap();
        assert_eq!(checkpoint.to_f32(router.bias.unwrap()), [0.0; 4]);
        assert_eq!(checkpoint.shape(router.router[0]), [4, 64]);
        assert_eq!(checkpoint.router(1), None);
    }

    #[test]
    fn pieces_of_a_tensor_join_to_the_whole() {
        let vanilla = MorConfig::from_json_str(
            r#"{ "vocab_size": 70000, "hidden_size": 128, "intermediate_size": 80, "num_hidden_layers": 1,
                "num_attention_heads": 4, "rms_norm_eps": 1e-5 }"#,
            "test",
        )
        .unwrap();
        let checkpoint = Checkpoint::random(vanilla, 3, Dtype::BF16);
        let id = checkpoint.embed_tokens();
        let whole = checkpoint.view(id);
        // Larger than the pool, so that reading wraps at least twice.
        assert!(whole.num_elems() > 2 * Pool::NUM_ELEMS);
        let mut joined = Vec::new();
        while joined.len() < whole.data.len() {
            let mut piece = vec![0; 3_000_002.min(whole.data.len() - joined.len())];
            checkpoint.read_bytes(id, joined.len(), &mut piece);
            joined.extend(piece);
        }
        assert!(joined == *whole.data);
    }
}
