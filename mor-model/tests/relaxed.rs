//! Adapters that start from what sharing took away: against singular value decompositions, and in whole models.

#![cfg(feature = "oracle")]

use mor_model::golden::{GoldenTensors, fixtures_dir};
use mor_model::oracle::Oracle;
use mor_model::{Checkpoint, Dtype, LayerLayout, LayerTensor, LoraFactors, MorConfig, Routing, lora_factors};
use serde_json::{Map, Value, json};

/// `B A`, `[out, in]`.
fn product(factors: &LoraFactors, rank: usize, num_inputs: usize) -> Vec<f32> {
    let row = |b: &[f32]| {
        (0..num_inputs)
            .map(|i| b.iter().enumerate().map(|(k, b)| f64::from(*b) * f64::from(factors.a[k * num_inputs + i])).sum())
            .map(|sum: f64| sum as f32)
            .collect::<Vec<_>>()
    };
    factors.b.chunks(rank).flat_map(row).collect()
}

fn squares(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|value| f64::from(value).powi(2)).sum()
}

#[test]
fn factors_are_the_best_of_their_rank() {
    let svd = GoldenTensors::load(&fixtures_dir().with_file_name("relaxed").join("svd.safetensors")).unwrap();
    for case in [0, 1] {
        let tensor = |name: &str| svd.f32(&format!("{case}.{name}")).unwrap();
        let (original, shared) = (tensor("original"), tensor("shared"));
        let num_inputs = svd.shape(&format!("{case}.original")).unwrap()[1];
        for rank in [1, 4] {
            let factors = lora_factors(original, shared, num_inputs, rank);
            assert_eq!(factors, lora_factors(original, shared, num_inputs, rank));
            let expected = tensor(&format!("product.{rank}"));
            for (found, expected) in product(&factors, rank, num_inputs).iter().zip(expected) {
                assert!((found - expected).abs() < 1e-6, "case {case}, rank {rank}: {found}, expected {expected}");
            }
            // A is orthonormal, and the columns of B have the singular values as norms; beyond the rank, zero.
            for (k, value) in tensor(&format!("singular_values.{rank}")).iter().enumerate() {
                let norm = squares(factors.a[k * num_inputs..][..num_inputs].iter().copied());
                let found = squares(factors.b.iter().skip(k).step_by(rank).copied()).sqrt() as f32;
                assert!((norm - 1.0).abs() < 1e-5 || *value < 1e-5, "case {case}, rank {rank}: row {k} has {norm}");
                assert!((found - value).abs() < 1e-5, "case {case}, rank {rank}: value {k} is {found}, not {value}");
            }
        }
    }
}

/// A spectrum that falls slowly, over matrices larger than the subspace that is followed.
#[test]
fn large_differences_lose_no_more_than_they_must() {
    let (num_outputs, num_inputs, rank) = (96, 160, 8);
    let shared = vec![0.0; num_outputs * num_inputs];
    // Cosine bases are orthonormal, so that singular values are known: 1 / (1 + k / 16).
    let basis = |n: usize, k: usize, i: usize| {
        let share: f64 = if k == 0 { 1.0 } else { 2.0 };
        (share / n as f64).sqrt() * (std::f64::consts::PI * k as f64 * (i as f64 + 0.5) / n as f64).cos()
    };
    let value = |k: usize| 1.0 / (1.0 + k as f64 / 16.0);
    let element = |o: usize, i: usize| {
        (0..num_outputs).map(|k| value(k) * basis(num_outputs, k, o) * basis(num_inputs, k, i)).sum::<f64>() as f32
    };
    let delta: Vec<f32> =
        (0..num_outputs).flat_map(|o| (0..num_inputs).map(move |i| (o, i))).map(|(o, i)| element(o, i)).collect();
    let factors = lora_factors(&delta, &shared, num_inputs, rank);
    let left = squares(product(&factors, rank, num_inputs).iter().zip(&delta).map(|(found, delta)| found - delta));
    let least: f64 = (rank..num_outputs).map(|k| value(k).powi(2)).sum();
    assert!(left <= least * (1.0 + 1e-4), "{left} is left, of which {least} must be");
}

/// A checkpoint of f32 tensors.
fn checkpoint(config: &Value, tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Checkpoint {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, shape, values) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        header.insert(name.clone(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] }));
    }
    let header = Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    Checkpoint::from_bytes(&config.to_string(), file, "test").unwrap()
}

/// Adapters of full rank whose factor is 1 give back the layers that were averaged; those of rank 1 do not.
#[test]
fn full_rank_adapters_undo_sharing() {
    let mut config = json!({
        "vocab_size": 53, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
    });
    let random = Checkpoint::random(MorConfig::from_json_str(&config.to_string(), "vanilla").unwrap(), 3, Dtype::F32);
    // Large enough for every layer to matter.
    let values = |id| {
        let scale = if random.shape(id).len() == 2 { 15.0 } else { 1.0 };
        random.to_f32(id).into_iter().map(|value| scale * value).collect::<Vec<f32>>()
    };
    let written = |id| (random.name(id).to_owned(), random.shape(id).to_vec(), values(id));
    let vanilla = checkpoint(&config, &random.tensor_ids().map(written).collect::<Vec<_>>());
    let tokens: Vec<u32> = (0..20).map(|i| i * 7 % 53).collect();
    let logits = |checkpoint: &Checkpoint| Oracle::new(checkpoint).forward(&tokens, Routing::Causal).unwrap().logits;

    for rank in [16, 1] {
        config["mor"] = json!({
            "mode": "recursive", "sharing": "middle_cycle", "num_recursion": 2,
            "lora": { "rank": rank, "alpha": rank, "targets": LayerTensor::PROJECTIONS.map(LayerTensor::name) },
        });
        let layout = LayerLayout::new(&MorConfig::from_json_str(&config.to_string(), "relaxed").unwrap());
        let mut tensors = vec![written(random.embed_tokens()), written(random.norm())];
        for layer in 0..6 {
            let group: Vec<usize> = (0..6).filter(|other| layout.owner(*other) == layout.owner(layer)).collect();
            for tensor in LayerTensor::ALL {
                let of = |layer: usize| values(random.layer(layer).get(tensor));
                let shape = random.shape(random.layer(layer).get(tensor)).to_vec();
                let name = format!("{}.{}", layout.prefix(layer), tensor.suffix());
                if layout.recursion(layer).is_none() || shape.len() == 1 {
                    tensors.push((name, shape, of(layer)));
                    continue;
                }
                let module = name.trim_end_matches("weight");
                let shared: Vec<f32> =
                    of(group[0]).iter().zip(of(group[1])).map(|(a, b)| f32::midpoint(*a, b)).collect();
                let LoraFactors { a, b } = lora_factors(&of(layer), &shared, shape[1], rank);
                tensors.push((format!("{module}lora_A.default.weight"), vec![rank, shape[1]], a));
                tensors.push((format!("{module}lora_B.default.weight"), vec![shape[0], rank], b));
                tensors.push((format!("{module}base_layer.weight"), shape, shared));
            }
        }
        let relaxed = checkpoint(&config, &tensors);
        assert_eq!(relaxed.layer(1), relaxed.layer(3), "the shared weights are one");
        let (found, expected) = (logits(&relaxed), logits(&vanilla));
        let close = found.iter().zip(expected).all(|(found, expected)| GoldenTensors::close(*found, expected));
        assert_eq!(close, rank == 16, "rank {rank}");
    }
}
