//! Every kind of bad model gives its own error, in one sentence that names the place; nothing panics.

#![cfg(feature = "oracle")]

use std::{collections::BTreeMap, fs, path::Path};

use mor_model::{Checkpoint, KvStrategy, LayerLayout, LayerTensor, ModelError, MorConfig, TensorName, golden};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A model directory in pieces that tests can edit.
struct Draft {
    config: Value,
    /// Element type, shape and bytes per name.
    tensors: BTreeMap<String, (String, Vec<usize>, Vec<u8>)>,
}

impl Draft {
    fn of(case: &str) -> Self {
        let dir = golden::fixtures_dir().join(case);
        let bytes = fs::read(dir.join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes)
            .unwrap()
            .iter()
            .map(|(name, view)| {
                let entry = (view.dtype().to_string(), view.shape().to_vec(), view.data().to_vec());
                (name.to_owned(), entry)
            })
            .collect();
        let config = serde_json::from_str(&fs::read_to_string(dir.join("config.json")).unwrap());
        Self { config: config.unwrap(), tensors }
    }

    /// As `of`, with a copy of every tied tensor under every name.
    fn with_copies(case: &str) -> Self {
        let mut draft = Self::of(case);
        let config = MorConfig::from_json_str(&draft.config.to_string(), case).unwrap();
        let layout = LayerLayout::new(&config);
        for (layer, tensor) in (0..layout.num_layers()).flat_map(|l| LayerTensor::ALL.map(|t| (l, t))) {
            let name = |layer| format!("{}.{}", layout.prefix(layer), tensor.suffix());
            let owner = draft.tensors[&name(layout.owner(layer))].clone();
            draft.tensors.insert(name(layer), owner);
        }
        draft
    }

    /// Writes config and tensors; a helper and not the library, so that it can write nonsense.
    fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), self.config.to_string()).unwrap();
        fs::write(dir.path().join("model.safetensors"), serialize(&self.tensors)).unwrap();
        dir
    }

    fn open(&self) -> Result<Checkpoint, ModelError> {
        Checkpoint::open(self.write().path())
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Vec<usize>, Vec<u8>) {
        self.tensors.get_mut(name).unwrap()
    }
}

fn serialize(tensors: &BTreeMap<String, (String, Vec<usize>, Vec<u8>)>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        let info = json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, data.len()] });
        header.insert(name.clone(), info);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    file
}

/// Asserts a message that is one line, names the given things and ends without a full stop.
#[track_caller]
fn assert_message(error: &ModelError, parts: &[&str]) {
    let text = error.to_string();
    assert!(!text.contains('\n') && !text.ends_with('.'), "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

macro_rules! assert_error {
    ($result:expr, $variant:pat, $($part:expr),* $(,)?) => {{
        let error = $result.unwrap_err();
        assert!(matches!(error, $variant), "{error:?}");
        assert_message(&error, &[$($part),*]);
    }};
}

const EXPERT: &str = "expert_middle_cycle_r3_mha";
const Q_PROJ: &str = "model.layers.1.block.0.self_attn.q_proj.weight";
const Q_PROJ_COPY: &str = "model.layers.2.block.0.self_attn.q_proj.weight";

#[test]
fn files_that_are_absent() {
    let dir = tempfile::tempdir().unwrap();
    assert_error!(Checkpoint::open(dir.path()), ModelError::Io { .. }, "config.json");
    fs::write(dir.path().join("config.json"), Draft::of(EXPERT).config.to_string()).unwrap();
    assert_error!(Checkpoint::open(dir.path()), ModelError::NoWeights { .. }, "model.safetensors", "convert");
}

#[test]
fn files_that_are_damaged() {
    let draft = Draft::of(EXPERT);
    let dir = draft.write();
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let open = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        Checkpoint::open(dir.path())
    };
    let (len, cut) = (whole.len().to_string(), (whole.len() - 1).to_string());
    assert_error!(open(&whole[..whole.len() - 1]), ModelError::FileLength { .. }, &len, &cut, "again");
    assert_error!(open(&whole[..100]), ModelError::FileLength { .. }, "100 bytes");
    assert_error!(open(&whole[..3]), ModelError::FileLength { .. }, "3 bytes");
    assert_error!(open(&[]), ModelError::FileLength { .. }, "0 bytes");
    assert_error!(open(&[whole.as_slice(), &[0]].concat()), ModelError::FileLength { .. }, &len);
    let mut garbled = whole.clone();
    garbled[8] = b'x';
    assert_error!(open(&garbled), ModelError::SafetensorsHeader { .. }, "header", "damaged");
    garbled[7] = 0xff;
    assert_error!(open(&garbled), ModelError::SafetensorsHeader { .. }, "header");
}

#[test]
fn tensors_that_do_not_fit() {
    let mut draft = Draft::of(EXPERT);
    draft.tensor(Q_PROJ).1 = vec![32, 128];
    assert_error!(draft.open(), ModelError::TensorShape { .. }, Q_PROJ, "[32, 128]", "[64, 64]");

    let mut draft = Draft::of(EXPERT);
    draft.tensor(Q_PROJ).0 = "I16".to_owned();
    assert_error!(draft.open(), ModelError::TensorDtype { .. }, Q_PROJ, "I16", "BF16");

    let mut draft = Draft::of(EXPERT);
    let entry = draft.tensor(Q_PROJ).clone();
    draft.tensors.insert("model.layers.9.extra.weight".to_owned(), entry);
    assert_error!(draft.open(), ModelError::UnknownTensor { .. }, "model.layers.9.extra", "expert", "middle_cycle");

    let mut draft = Draft::of(EXPERT);
    draft.tensors.remove("model.norm.weight");
    assert_error!(draft.open(), ModelError::MissingTensor { .. }, "model.norm.weight", "[64]");

    let mut draft = Draft::of(EXPERT);
    draft.tensors.remove("model.layers.2.mor_router.router.weight");
    assert_error!(draft.open(), ModelError::MissingTensor { .. }, "model.layers.2.mor_router", "[1, 64]");
}

#[test]
fn derived_buffers_are_tolerated() {
    let mut draft = Draft::of(EXPERT);
    let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
    draft.tensors.insert(name.to_owned(), ("F32".to_owned(), vec![8], vec![0; 32]));
    draft.open().unwrap();
}

#[test]
fn weights_that_are_not_finite() {
    let patterns: [(&str, &[u8], &str); 6] = [
        ("BF16", &0x7fc0u16.to_le_bytes(), "NaN"),
        ("BF16", &0xff80u16.to_le_bytes(), "-inf"),
        ("F16", &0x7c01u16.to_le_bytes(), "NaN"),
        ("F16", &0x7c00u16.to_le_bytes(), "inf"),
        ("F32", &f32::NAN.to_le_bytes(), "NaN"),
        ("F32", &f32::NEG_INFINITY.to_le_bytes(), "-inf"),
    ];
    for (dtype, pattern, shown) in patterns {
        for index in [0, 63, 64 * 64 - 1] {
            let mut draft = Draft::of(EXPERT);
            let mut bytes = vec![0; 64 * 64 * pattern.len()];
            bytes[index * pattern.len()..][..pattern.len()].copy_from_slice(pattern);
            *draft.tensor(Q_PROJ) = (dtype.to_owned(), vec![64, 64], bytes);
            let place = format!("{shown} at element {index},");
            assert_error!(draft.open(), ModelError::NonFinite { .. }, Q_PROJ, &place);
        }
    }
}

#[test]
fn tied_groups_that_are_cut() {
    let mut draft = Draft::with_copies(EXPERT);
    draft.tensors.remove(Q_PROJ);
    assert_error!(draft.open(), ModelError::TiedGroupIncomplete { differs: false, .. }, Q_PROJ, Q_PROJ_COPY);

    // An absent copy is fine while the others agree, and ambiguous once one differs.
    let mut draft = Draft::with_copies(EXPERT);
    let last = "model.layers.3.block.0.self_attn.q_proj.weight";
    draft.tensors.remove(last);
    draft.open().unwrap();
    draft.tensor(Q_PROJ_COPY).2[0] ^= 1;
    assert_error!(draft.open(), ModelError::TiedGroupIncomplete { differs: true, .. }, last, Q_PROJ_COPY);
}

#[test]
fn adapters_and_encodings_that_do_not_fit() {
    const RELAXED: &str = "../relaxed/expert_middle_cycle_r3_both";
    const PROJ: &str = "model.layers.2.block.0.self_attn.q_proj";
    const ENCODING: &str = "model.layers.2.block.1.recursion_encoding";
    let opened = |edit: &dyn Fn(&mut Draft)| {
        let mut draft = Draft::of(RELAXED);
        edit(&mut draft);
        draft.open()
    };
    opened(&|_| {}).unwrap();
    for factor in ["lora_A", "lora_B"] {
        let name = format!("{PROJ}.{factor}.default.weight");
        let missing = opened(&|draft| drop(draft.tensors.remove(&name)));
        assert_error!(missing, ModelError::MissingTensor { .. }, &name, "24");
    }
    let missing = opened(&|draft| drop(draft.tensors.remove(ENCODING)));
    assert_error!(missing, ModelError::MissingTensor { .. }, ENCODING, "[24]");
    let other_rank = opened(&|draft| draft.config["mor"]["lora"]["rank"] = json!(6));
    assert_error!(other_rank, ModelError::TensorShape { .. }, "lora_A.default.weight", "[4, 24]", "[6, 24]");
    let transposed = opened(&|draft| draft.tensor(&format!("{PROJ}.lora_A.default.weight")).1.reverse());
    assert_error!(transposed, ModelError::TensorShape { .. }, PROJ, "[24, 4]", "[4, 24]");

    // Of the first layer, which is not shared, and of a projection that is no target.
    for module in ["model.layers.0.self_attn.q_proj", "model.layers.2.block.0.self_attn.k_proj"] {
        let name = format!("{module}.lora_A.default.weight");
        let nowhere = opened(&|draft| {
            let factor = draft.tensors[&format!("{PROJ}.lora_A.default.weight")].clone();
            draft.tensors.insert(name.clone(), factor);
        });
        assert_error!(nowhere, ModelError::UnknownTensor { .. }, &name, "mor.lora");
    }
    let unasked = opened(&|draft| draft.config["mor"]["lora"] = Value::Null);
    assert_error!(unasked, ModelError::UnknownTensor { .. }, "base_layer.weight", "mor.lora");
    let unasked = opened(&|draft| draft.config["mor"]["recursion_encoding"] = json!(false));
    assert_error!(unasked, ModelError::UnknownTensor { .. }, "block.1.block.", "mor.recursion_encoding");

    let recursive = |lora: Value| {
        let mor = json!({ "mode": "recursive", "sharing": "cycle", "num_recursion": 2, "lora": lora });
        config_with(&[("num_hidden_layers", json!(4)), ("mor", mor)])
    };
    let lora = recursive(json!({ "rank": 16 })).unwrap().lora.unwrap();
    assert_eq!((lora.scale(), lora.targets), (2.0, vec![LayerTensor::QProj, LayerTensor::VProj]));
    assert_error!(recursive(json!({})), ModelError::ConfigMissing { .. }, "mor.lora.rank");
    assert_error!(recursive(json!({ "rank": 0 })), ModelError::ConfigValue { .. }, "mor.lora.rank", "0");
    assert_error!(recursive(json!({ "rank": 4, "alpha": -1 })), ModelError::ConfigValue { .. }, "mor.lora.alpha", "-1");
    assert_error!(
        recursive(json!({ "rank": 4, "r": 4 })),
        ModelError::ConfigUnknownField { .. },
        "mor.lora.r",
        "alpha"
    );
    assert_error!(recursive(json!(16)), ModelError::ConfigValue { .. }, "mor.lora", "object");
    for targets in [json!("q_proj"), json!([]), json!(["q_proj", "q_proj"]), json!(["embed_tokens"]), json!([1])] {
        let found = recursive(json!({ "rank": 4, "targets": targets }));
        assert_error!(found, ModelError::ConfigValue { .. }, "mor.lora.targets", "down_proj");
    }
    let vanilla = |mor: Value| config_with(&[("mor", mor)]);
    let found = vanilla(json!({ "mode": "vanilla", "lora": { "rank": 4 } }));
    assert_error!(found, ModelError::ConfigConflict { .. }, "mor.lora.rank", "vanilla");
    let found = vanilla(json!({ "mode": "vanilla", "recursion_encoding": true }));
    assert_error!(found, ModelError::ConfigConflict { .. }, "mor.recursion_encoding", "vanilla");
}

#[test]
fn copies_that_differ_stay_separate() {
    let mut draft = Draft::with_copies(EXPERT);
    draft.tensor(Q_PROJ_COPY).2[0] ^= 1;
    let checkpoint = draft.open().unwrap();
    let (first, second, third) = (checkpoint.layer(1), checkpoint.layer(2), checkpoint.layer(3));
    assert_ne!(first.q_proj, second.q_proj);
    assert_eq!(first.k_proj, second.k_proj);
    assert_eq!(first, third);
    let name = TensorName::Layer { layer: 2, tensor: LayerTensor::QProj };
    assert_eq!(checkpoint.tensor(name).unwrap().name, Q_PROJ_COPY);
    assert_eq!(checkpoint.tensor(name).unwrap().data, draft.tensors[Q_PROJ_COPY].2);
}

#[test]
fn output_head_follows_the_file_before_the_configuration() {
    const HEAD: &str = "lm_head.weight";
    let head = |edit: fn(&mut Draft)| {
        let mut draft = Draft::of(EXPERT);
        let embedding = draft.tensors["model.embed_tokens.weight"].clone();
        draft.tensors.insert(HEAD.to_owned(), embedding);
        edit(&mut draft);
        draft.open().map(|checkpoint| checkpoint.lm_head() == checkpoint.embed_tokens())
    };
    assert!(head(|_| {}).unwrap());
    assert!(head(|draft| drop(draft.tensors.remove(HEAD))).unwrap());
    assert!(!head(|draft| draft.tensor(HEAD).2[0] ^= 1).unwrap());
    assert!(head(|draft| draft.config["tie_word_embeddings"] = json!(false)).unwrap());
    let untied = head(|draft| {
        draft.config["tie_word_embeddings"] = json!(false);
        draft.tensors.remove(HEAD);
    });
    assert_error!(untied, ModelError::MissingTensor { .. }, HEAD);
}

/// Writes a draft as two shards and lets the caller edit the index.
fn write_shards(draft: &Draft, edit: impl FnOnce(&Path, &mut Value)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), draft.config.to_string()).unwrap();
    let mut index = json!({ "metadata": {}, "weight_map": {} });
    let mut shards = [BTreeMap::new(), BTreeMap::new()];
    for (i, (name, tensor)) in draft.tensors.iter().enumerate() {
        shards[i % 2].insert(name.clone(), tensor.clone());
        index["weight_map"][name] = json!(format!("shard-{}.safetensors", i % 2));
    }
    for (i, shard) in shards.iter().enumerate() {
        fs::write(dir.path().join(format!("shard-{i}.safetensors")), serialize(shard)).unwrap();
    }
    edit(dir.path(), &mut index);
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    dir
}

#[test]
fn shards_open_like_one_file() {
    let draft = Draft::of(EXPERT);
    let whole = draft.open().unwrap();
    let sharded = Checkpoint::open(write_shards(&draft, |_, _| {}).path()).unwrap();
    for id in whole.tensor_ids() {
        assert_eq!(whole.name(id), sharded.name(id));
        assert_eq!(whole.view(id).data, sharded.view(id).data);
    }
}

#[test]
fn shards_that_are_wrong() {
    let draft = Draft::of(EXPERT);
    let open = |edit: &dyn Fn(&Path, &mut Value)| Checkpoint::open(write_shards(&draft, edit).path());

    assert_error!(open(&|_, index| index["weight_map"] = json!([1])), ModelError::ShardIndex { .. }, "a list");
    assert_error!(open(&|_, index| *index = json!({})), ModelError::ShardIndex { .. }, "missing");
    assert_error!(
        open(&|_, index| index["weight_map"][Q_PROJ] = json!("../elsewhere.safetensors")),
        ModelError::ShardPath { .. },
        Q_PROJ,
        "../elsewhere"
    );
    assert_error!(open(&|_, index| index["weight_map"][Q_PROJ] = json!(7)), ModelError::ShardPath { .. }, Q_PROJ);
    assert_error!(
        open(&|_, index| index["weight_map"]["promised.weight"] = json!("shard-0.safetensors")),
        ModelError::ShardTensorMissing { .. },
        "promised.weight",
        "shard-0"
    );
    assert_error!(
        open(&|dir, _| fs::remove_file(dir.join("shard-1.safetensors")).unwrap()),
        ModelError::Io { .. },
        "shard-1"
    );
    let duplicate = |dir: &Path, _: &mut Value| {
        // Both shards hold everything.
        for i in 0..2 {
            let path = dir.join(format!("shard-{i}.safetensors"));
            fs::write(path, serialize(&draft.tensors)).unwrap();
        }
    };
    assert_error!(open(&duplicate), ModelError::DuplicateTensor { .. }, "shard-0", "shard-1");
}

/// Parses the expert case's configuration after setting one field, given as a path with dots; `null` stays `null`.
fn config_with(edits: &[(&str, Value)]) -> Result<MorConfig, ModelError> {
    let mut config = Draft::of("expert_middle_cycle_r3").config;
    for (path, value) in edits {
        match path.split_once('.') {
            Some((object, field)) => config[object][field] = value.clone(),
            None => config[*path] = value.clone(),
        }
    }
    MorConfig::from_json_str(&config.to_string(), "edited config")
}

#[test]
fn configurations_that_are_no_json() {
    for text in ["", "{", "[1]", "{\"hidden_size\": NaN}", "{\"rms_norm_eps\": 1e999}"] {
        let parsed = MorConfig::from_json_str(text, "broken config");
        assert_error!(parsed, ModelError::JsonSyntax { .. }, "broken config");
    }
}

#[test]
fn fields_that_are_absent() {
    let fields = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"];
    for field in fields.into_iter().chain(["rms_norm_eps", "mor", "mor.mode"]) {
        let mut config = Draft::of(EXPERT).config;
        match field.split_once('.') {
            Some((object, field)) => config[object].as_object_mut().unwrap().remove(field),
            None => config.as_object_mut().unwrap().remove(field),
        };
        let parsed = MorConfig::from_json_str(&config.to_string(), "cut config");
        assert_error!(parsed, ModelError::ConfigMissing { .. }, "cut config", field, "expected");
    }
}

#[test]
fn values_outside_their_domain() {
    let cases = [
        ("vocab_size", json!(0)),
        ("hidden_size", json!(-64)),
        ("hidden_size", json!(60)),
        ("head_dim", json!(15)),
        ("intermediate_size", json!("80")),
        ("num_hidden_layers", json!(0)),
        ("num_hidden_layers", json!(1e9 as u64)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(0)),
        ("rms_norm_eps", json!(0)),
        ("rms_norm_eps", json!(1e-300)),
        ("rope_theta", json!(-1)),
        ("rope_theta", json!(1e300)),
        ("max_position_embeddings", json!(0)),
        ("eos_token_id", json!(97)),
        ("eos_token_id", json!([0, "1"])),
        ("tie_word_embeddings", json!("yes")),
        ("model_type", json!("qwen2")),
        ("hidden_act", json!("gelu")),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("rope_scaling", json!({ "rope_type": "llama3", "factor": 8.0 })),
        ("quantization_config", json!({ "bits": 4 })),
        ("mor", json!("expert")),
        ("mor.mode", json!("experts")),
        ("mor.sharing", json!("middle")),
        ("mor.num_recursion", json!(0)),
        ("mor.num_recursion", json!(2.5)),
        ("mor.kv", json!(null)),
        ("mor.router_type", json!("conv")),
        ("mor.router_func", json!("relu")),
        ("mor.router_func", json!("null")),
        ("mor.alpha", json!(0)),
        ("mor.alpha", json!("0.1")),
        ("mor.temp", json!(-1.0)),
        ("mor.gating", json!("multiplied")),
        ("mor.capacity", json!([1.0, 0.5])),
        ("mor.capacity", json!([1.0, 0.5, 0.75])),
        ("mor.capacity", json!([1.5, 0.5, 0.25])),
        ("mor.capacity", json!([1.0, 0.5, 0.0])),
        ("mor.sampling", json!("loss")),
        ("mor.sampling_coeff", json!(-1)),
        ("mor.cap_warmup_step", json!(-1)),
        ("mor.balancing", json!(true)),
        ("mor.z_loss", json!(1)),
    ];
    for (field, value) in cases {
        let found = value.to_string();
        let parsed = config_with(&[(field, value)]);
        assert_error!(parsed, ModelError::ConfigValue { .. }, "edited config", field, &found, "expected");
    }
}

#[test]
fn unknown_routing_fields() {
    let parsed = config_with(&[("mor.capacities", json!([1.0]))]);
    assert_error!(parsed, ModelError::ConfigUnknownField { .. }, "mor.capacities", "capacity");
    config_with(&[("future_llama_field", json!(1))]).unwrap();
}

#[test]
fn settings_that_contradict() {
    let cases: &[&[(&str, Value)]] = &[
        &[("num_key_value_heads", json!(3))],
        &[("num_attention_heads", json!(5)), ("head_dim", json!(null))],
        &[("head_dim", json!(1 << 20))],
        &[("mor.mode", json!("vanilla"))],
        &[("mor.mode", json!("vanilla")), ("mor.sharing", json!("none"))],
        &[("mor.sharing", json!("none"))],
        &[("mor.sharing", json!("sequence")), ("num_hidden_layers", json!(6))],
        &[("mor.router_func", json!("softmax"))],
        &[("mor.mode", json!("token")), ("mor.router_func", json!("tanh"))],
        &[("mor.mode", json!("token")), ("mor.router_func", json!(null))],
        &[("mor.mode", json!("token")), ("mor.kv", json!("hybrid"))],
        &[("mor.mode", json!("recursive")), ("mor.kv", json!("hybrid"))],
        &[("mor.num_recursions", json!(2))],
        &[("mor.num_recursion", json!(1)), ("mor.capacity", json!(null))],
    ];
    for edits in cases {
        let parsed = config_with(edits);
        assert_error!(parsed, ModelError::ConfigConflict { .. }, "edited config", "contradicts");
    }
    let hybrid = config_with(&[("mor.mode", json!("token")), ("mor.router_func", json!("softmax"))])
        .unwrap()
        .with_kv(KvStrategy::Hybrid);
    assert_error!(hybrid, ModelError::ConfigConflict { .. }, "hybrid", "token");
}

#[test]
fn layers_that_do_not_divide() {
    for layers in [1, 2, 7, 9] {
        let parsed = config_with(&[("num_hidden_layers", json!(layers))]);
        let found = format!("num_hidden_layers = {layers} ");
        assert_error!(parsed, ModelError::LayersNotDivisible { .. }, &found, "num_recursion = 3");
    }
}

#[test]
fn oracle_requests_that_make_no_sense() {
    use mor_model::{Routing, oracle::Oracle};
    let oracle = Oracle::new(&Draft::of(EXPERT).open().unwrap());
    let error = oracle.forward(&[0, 97], Routing::Causal);
    assert_error!(error, ModelError::TokenOutOfRange { .. }, "token 97", "position 1", "97");
    assert_error!(oracle.generate(&[], 1), ModelError::EmptyTokens { .. }, "prompt");
    let mut cache = oracle.new_cache();
    oracle.feed(&mut cache, &[1], Routing::Causal).unwrap();
    let error = oracle.feed(&mut cache, &[1], Routing::TopK);
    assert_error!(error, ModelError::TopKNeedsWholeSequence { .. }, "1 tokens");
    assert!(oracle.forward(&[], Routing::TopK).unwrap().logits.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// A header with any few bytes changed opens or is refused, without a panic.
    #[test]
    fn damaged_headers_never_panic(
        edits in prop::collection::vec((0usize..6000, any::<u8>()), 1..4),
        keep in 0usize..200_000,
    ) {
        let dir = golden::fixtures_dir().join("token_cycle_r3_lossfree_sigmoid");
        let config = fs::read_to_string(dir.join("config.json")).unwrap();
        let mut bytes = fs::read(dir.join("model.safetensors")).unwrap();
        for (at, byte) in edits {
            bytes[at] = byte;
        }
        bytes.truncate(keep);
        let _ = Checkpoint::from_bytes(&config, bytes, "damaged");
    }

    /// A configuration with any small number anywhere parses or is refused, without a panic.
    #[test]
    fn odd_numbers_never_panic(field in 0usize..9, value in -2i64..2000) {
        let fields = [
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "mor.num_recursion", "mor.capacity",
        ];
        if let Ok(config) = config_with(&[(fields[field], json!(value))]) {
            let text = config.to_json();
            prop_assert_eq!(MorConfig::from_json_str(&text, "round trip").unwrap(), config);
        }
    }
}

/// Values that a field may wrongly have.
fn any_json() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0i64..100).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-2.0f64..2.0).prop_map(Value::from),
        prop::sample::select(vec!["expert", "token", "recursive", "vanilla", "cycle", "sequence", "none", "sharing"])
            .prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
        prop::collection::vec(-1.0f64..2.0, 0..5).prop_map(Value::from),
        Just(json!({ "a": [1] })),
    ]
}

/// What a program does with a configuration and weights before it opens a device.
fn use_model(config: &str, weights: &[u8]) {
    let Ok(parsed) = MorConfig::from_json_str(config, "edited") else { return };
    assert_eq!(MorConfig::from_json_str(&parsed.to_json(), "round trip").unwrap(), parsed);
    let kv = mor_model::KvLayout::new(&parsed, &LayerLayout::new(&parsed));
    let _ = kv.bytes_per_token(&parsed.capacity, 2);
    for strategy in KvStrategy::ALL {
        let _ = parsed.with_kv(*strategy);
    }
    if let Ok(checkpoint) = Checkpoint::from_bytes(config, weights.to_vec(), "edited") {
        let _ = checkpoint.parameter_counts();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// A few fields replaced by anything.
    #[test]
    fn odd_values_never_panic(
        case in prop::sample::select(vec!["expert_middle_cycle_r3", "token_cycle_r3_lossfree_sigmoid", "vanilla_gqa"]),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any_json()), 1..4),
    ) {
        let mut config = Draft::of(case).config;
        let weights = fs::read(golden::fixtures_dir().join(case).join("model.safetensors")).unwrap();
        for (index, value) in edits {
            let names: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
            let inner: Vec<String> = config["mor"].as_object().into_iter().flat_map(|mor| mor.keys().cloned()).collect();
            let at = index.index(names.len() + inner.len());
            match at.checked_sub(names.len()) {
                None => config[&names[at]] = value,
                Some(at) => config["mor"][&inner[at]] = value,
            }
        }
        use_model(&config.to_string(), &weights);
    }

    /// The text itself damaged: bytes replaced, its end cut off.
    #[test]
    fn damaged_configurations_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        keep in any::<prop::sample::Index>(),
        cut in any::<bool>(),
    ) {
        let dir = golden::fixtures_dir().join("expert_middle_cycle_r3");
        let mut bytes = fs::read(dir.join("config.json")).unwrap();
        for (index, byte) in edits {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        if cut {
            bytes.truncate(keep.index(bytes.len()));
        }
        let weights = fs::read(dir.join("model.safetensors")).unwrap();
        use_model(&String::from_utf8_lossy(&bytes), &weights);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Mapped files of any length: the weights, one of two shards, or the shard index.
    #[test]
    fn truncated_files_never_panic(which in 0usize..3, keep in any::<prop::sample::Index>()) {
        let draft = Draft::of("token_cycle_r3_lossfree_sigmoid");
        let dir = if which == 0 { draft.write() } else { write_shards(&draft, |_, _| {}) };
        let name = ["model.safetensors", "shard-1.safetensors", "model.safetensors.index.json"][which];
        let path = dir.path().join(name);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..keep.index(bytes.len())]).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err();
        assert_message(&error, &[]);
    }
}

#[test]
fn numbers_are_read_to_the_last_bit() {
    // The second one once came back one unit lower.
    for eps in [0.1 + 0.2, 1.059_110_973_723_599_7e19, 1.0 / 3.0, 1e-5, 2.0 / 3.0] {
        let config = config_with(&[("rms_norm_eps", json!(eps))]).unwrap();
        assert_eq!(config.rms_norm_eps.to_bits(), f64::to_bits(eps));
        assert_eq!(MorConfig::from_json_str(&config.to_json(), "round trip").unwrap(), config);
    }
}

#[test]
fn every_golden_configuration_round_trips() {
    for dir in golden::case_dirs().unwrap() {
        let config = MorConfig::from_json_file(dir.join("config.json")).unwrap();
        assert_eq!(MorConfig::from_json_str(&config.to_json(), "round trip").unwrap(), config);
    }
}
