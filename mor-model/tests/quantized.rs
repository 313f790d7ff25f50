//! Quantised checkpoints: made in memory or read from a folder they are the same, and near what they were made from.

#![cfg(feature = "oracle")]

use std::fs;
use std::path::Path;

use mor_model::golden::GoldenCase;
use mor_model::{Checkpoint, Dtype, LayerTensor, ModelError, MorConfig, Quantization, TensorName};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Field of the configuration.
const CONFIG: &str = "quantization_config";
const CASE: &str = "expert_middle_cycle_r3";
const Q_PROJ: TensorName = TensorName::Layer { layer: 0, tensor: LayerTensor::QProj };

fn golden(name: &str) -> Checkpoint {
    GoldenCase::load(mor_model::golden::fixtures_dir().join(name)).expect("the fixture is readable").checkpoint
}

/// A folder as `mor quantize` writes it.
fn written(checkpoint: &Checkpoint) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), checkpoint.config().to_json()).unwrap();
    checkpoint.save(folder.path().join("model.safetensors")).unwrap();
    folder
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn files_and_memory_hold_the_same() {
    for case in GoldenCase::load_all().expect("the fixtures are readable") {
        let original = case.checkpoint;
        for format in Quantization::ALL {
            let again = GoldenCase::load(&case.dir).expect("the fixture is readable").checkpoint;
            let quantized = again.quantize(*format).unwrap();
            assert_eq!(quantized.config().quantization, Some(*format), "{}", case.name);
            let opened = Checkpoint::open(written(&quantized).path()).unwrap();
            assert_eq!(opened.config(), quantized.config(), "{}", case.name);
            assert_eq!(opened.num_tensors(), original.num_tensors(), "{}", case.name);
            for id in original.tensor_ids() {
                let (memory, file, plain) = (quantized.view(id), opened.view(id), original.view(id));
                assert_eq!((memory.name, memory.dtype, memory.shape), (file.name, file.dtype, file.shape));
                assert_eq!(memory.data, file.data, "{} {}", case.name, memory.name);
                assert_eq!(memory.shape, plain.shape, "{} {}", case.name, memory.name);
                if memory.dtype == plain.dtype {
                    assert_eq!(memory.data, plain.data, "{} {}", case.name, memory.name);
                } else {
                    let (found, expected) = (quantized.to_f32(id), original.to_f32(id));
                    let steps = if memory.dtype == Dtype::Q8 { 127.0 } else { 4.0 };
                    let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
                    let difference = found.iter().zip(&expected).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max);
                    assert!(difference <= largest / steps, "{} {}: {difference}", case.name, memory.name);
                }
            }
        }
    }
}

#[test]
fn matrices_alone_are_quantised() {
    let dtypes = |format| {
        let checkpoint = golden(CASE).quantize(format).unwrap();
        let layer = |tensor| TensorName::Layer { layer: 0, tensor };
        let down = checkpoint.tensor(layer(LayerTensor::DownProj)).unwrap().dtype;
        let embed = checkpoint.tensor(TensorName::EmbedTokens).unwrap().dtype;
        for name in [TensorName::Norm, layer(LayerTensor::InputLayernorm)] {
            assert_eq!(checkpoint.tensor(name).unwrap().dtype, golden(CASE).tensor(name).unwrap().dtype);
        }
        let router = TensorName::Router { recursion: 0, index: 0 };
        assert_eq!(checkpoint.tensor(router).unwrap().dtype, golden(CASE).tensor(router).unwrap().dtype);
        (down, embed)
    };
    assert_eq!(dtypes(Quantization::Q8), (Dtype::Q8, Dtype::Q8));
    assert_eq!(dtypes(Quantization::Q4), (Dtype::Q4, Dtype::Q8));
}

#[test]
fn heads_that_devices_pad_keep_their_output_projection() {
    let config = |head_dim: usize| {
        let text = json!({
            "vocab_size": 10, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "head_dim": head_dim, "rms_norm_eps": 1e-5,
        });
        MorConfig::from_json_str(&text.to_string(), "test").unwrap()
    };
    for (head_dim, expected) in [(4, Dtype::BF16), (8, Dtype::Q4), (24, Dtype::Q4)] {
        let checkpoint = Checkpoint::random(config(head_dim), 0, Dtype::BF16).quantize(Quantization::Q4).unwrap();
        assert_eq!(checkpoint.dtype(checkpoint.layer(0).o_proj), expected, "{head_dim}");
        assert_eq!(checkpoint.dtype(checkpoint.layer(0).q_proj), Dtype::Q4, "{head_dim}");
        let opened = Checkpoint::open(written(&checkpoint).path()).unwrap();
        assert_eq!(opened.dtype(opened.layer(0).o_proj), expected, "{head_dim}");
    }
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let again = golden(CASE).quantize(Quantization::Q8).unwrap().quantize(Quantization::Q4).unwrap_err();
    assert!(matches!(again, ModelError::AlreadyQuantized { found: Quantization::Q8 }));
    assert!(again.to_string().contains("quantised as q8 already"), "{again}");

    // A weight beyond f16, in the file of an f32 or bf16 checkpoint.
    let folder = written(&golden("vanilla_gqa"));
    let path = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let data_start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..data_start]).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let at = data_start + header[name]["data_offsets"][0].as_u64().unwrap() as usize;
    let large = 1e6_f32.to_le_bytes();
    let large = if header[name]["dtype"] == "F32" { &large[..] } else { &large[2..] };
    bytes[at..at + large.len()].copy_from_slice(large);
    fs::write(&path, bytes).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap().quantize(Quantization::Q8).unwrap_err();
    assert!(matches!(error, ModelError::NotQuantizable { index: 0, .. }), "{error}");
    assert!(error.to_string().contains(name), "{error}");
}

#[test]
fn damaged_quantised_checkpoints_are_refused() {
    let quantized = golden(CASE).quantize(Quantization::Q4).unwrap();
    let check = |damage: &dyn Fn(&Path), words: &[&str]| {
        let folder = written(&quantized);
        damage(folder.path());
        let message = Checkpoint::open(folder.path()).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{word:?} is not in: {message}");
        }
    };
    let config = |edit: fn(&mut Value), words: &[&str]| check(&|folder| edit_config(folder, edit), words);
    config(|c| c[CONFIG]["quant_method"] = json!("gptq"), &["quant_method is \"gptq\"", "mor quantize"]);
    config(|c| c[CONFIG]["format"] = json!("q5"), &["format is \"q5\"", "q8, q4"]);
    config(|c| drop(c[CONFIG].as_object_mut().unwrap().remove("format")), &["format is missing"]);
    config(|c| c[CONFIG]["group_size"] = json!(64), &["group_size is 64, expected 32"]);
    config(|c| c[CONFIG] = json!("q8"), &["quantization_config is \"q8\", expected an object"]);
    // The file says other than the configuration.
    config(|c| c[CONFIG]["format"] = json!("q8"), &["has shape", "expected"]);
    config(|c| c[CONFIG] = json!(null), &["element type U8", "F32, F16 or BF16"]);
    check(&|folder| golden(CASE).save(folder.join("model.safetensors")).unwrap(), &["expected U8", "quantised"]);
    let truncate = |folder: &Path| {
        let path = folder.join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        fs::write(path, &bytes[..bytes.len() - 5]).unwrap();
    };
    check(&truncate, &["model.safetensors: holds"]);

    // A scale that is no number.
    let id = quantized.id(Q_PROJ).unwrap();
    let view = quantized.view(id);
    let (len, name) = (view.shape[1], view.name.to_owned());
    let row_bytes = view.data.len() / view.shape[0];
    let infinity = |folder: &Path| {
        let path = folder.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let data_start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..data_start]).unwrap();
        let start = data_start + header[&name]["data_offsets"][0].as_u64().unwrap() as usize;
        // The offset of the first group of row 2 follows the codes and the scale.
        let at = start + 2 * row_bytes + len.div_ceil(32) * 16 + 2;
        bytes[at..at + 2].copy_from_slice(&0x7c00_u16.to_le_bytes());
        fs::write(path, bytes).unwrap();
    };
    check(&infinity, &[&name, &format!("inf at element {}", 2 * len)]);
}
