//! Conversions: official runs and Llama checkpoints become model folders that compute the same, and what is broken or
//! hostile is refused in a sentence.

#![cfg(feature = "oracle")]

use std::fs;
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};

use mor_model::convert::{ConvertOptions, ConvertReport, Init, LayerSource, Layout, Start, convert};
use mor_model::golden::{GoldenCase, GoldenTensors};
use mor_model::oracle::Oracle;
use mor_model::{
    Checkpoint, Dtype, LayerTensor, Mode, ModelError, MorConfig, Quantization, Routing, SharingStrategy, TensorName,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use zip::write::SimpleFileOptions;

/// The golden case that `fixtures/official` holds as `pytorch_model.bin` and YAML file.
const CASE: &str = "expert_middle_cycle_r2";

fn case_dir(name: &str) -> PathBuf {
    mor_model::golden::fixtures_dir().join(name)
}

fn official_dir() -> PathBuf {
    case_dir("../official")
}

/// Converts into a fresh folder.
fn converted(src: &Path, options: &ConvertOptions) -> (TempDir, PathBuf, ConvertReport) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let report = convert(src, &out, options).unwrap();
    (dir, out, report)
}

/// The words of a refusal, after which nothing is there.
#[track_caller]
fn refused(src: &Path, options: &ConvertOptions, words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let error = convert(src, &dir.path().join("out"), options).unwrap_err().to_string();
    assert!(!error.contains('\n') && !error.ends_with('.'), "{error}");
    for word in words {
        assert!(error.contains(word), "{word:?} is not in: {error}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "something was left");
}

fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<f32> {
    Oracle::new(checkpoint).forward(tokens, Routing::Causal).unwrap().logits
}

fn to_official() -> ConvertOptions {
    ConvertOptions { layout: Layout::Official, ..ConvertOptions::default() }
}

/// Every golden case there and back: the same configuration, and logits to the last bit.
#[test]
fn official_layouts_round_trip() {
    for case in GoldenCase::load_all().unwrap() {
        let config = case.checkpoint.config();
        if config.lora.is_some() && config.recursion_encoding {
            refused(&case.dir, &to_official(), &["adapters and recursion encodings"]);
            continue;
        }
        let (_official, official, there) = converted(&case.dir, &to_official());
        assert_eq!(there.source, "mor", "{}", case.name);
        let layout = case.checkpoint.layout();
        let copies = (0..layout.num_layers()).filter(|&layer| layout.owner(layer) != layer).count();
        // The YAML file alone says what the model is: the folder's config.json is a Llama's.
        let shape = fs::read_to_string(official.join("config.json")).unwrap();
        assert!(!shape.contains("\"mor\"") && official.join("out.yaml").is_file());

        let (_back, back, report) = converted(&official, &ConvertOptions::default());
        assert_eq!(report.source, "official", "{}", case.name);
        let head = usize::from(case.checkpoint.lm_head() == case.checkpoint.embed_tokens());
        assert_eq!(report.tied.len(), copies * LayerTensor::ALL.len() + head, "{}", case.name);
        assert_eq!((report.kept_separate.len(), report.ignored.len()), (0, 0));
        assert_eq!(report.num_tensors + report.tied.len(), there.num_tensors);
        let opened = Checkpoint::open(&back).unwrap();
        assert_eq!(opened.config(), case.checkpoint.config(), "{}", case.name);
        assert_eq!(opened.num_tensors(), case.checkpoint.num_tensors(), "{}", case.name);
        for tokens in &case.sequences[..1] {
            assert_eq!(logits(&opened, tokens), logits(&case.checkpoint, tokens), "{}", case.name);
        }
    }
}

#[test]
fn pickled_runs_become_the_model_that_was_trained() {
    let case = GoldenCase::load(case_dir(CASE)).unwrap();
    let (_dir, out, report) = converted(&official_dir(), &ConvertOptions::default());
    assert_eq!((report.source, report.mode, report.num_recursions), ("official", "expert", 2));
    let opened = Checkpoint::open(&out).unwrap();
    assert_eq!(opened.config(), case.checkpoint.config());
    for id in opened.tensor_ids() {
        let (found, expected) = (opened.view(id), case.checkpoint.view(id));
        assert_eq!((found.name, found.dtype, found.shape), (expected.name, expected.dtype, expected.shape));
        assert_eq!(found.data, expected.data, "{}", found.name);
    }
    for tokens in &case.sequences {
        assert_eq!(logits(&opened, tokens), logits(&case.checkpoint, tokens));
    }
}

/// Three runs of the official code, as PyTorch has written them, one of them in one file: see `make_runs.py` there.
#[test]
fn runs_of_the_official_code_compute_what_they_did_there() {
    // The released code unties the attention of expert choice, in all recursions but the first, and the head of what has
    // no routers, whatever the configuration says.
    for (name, mode, kept) in
        [("run-expert", "expert", 2 * 4), ("run-lora", "recursive", 1), ("run-encoding-token", "token", 0)]
    {
        let run = official_dir().join(name);
        let (_dir, out, report) = converted(&run, &ConvertOptions::default());
        assert_eq!((report.source, report.mode, report.kept_separate.len()), ("official", mode, kept));
        let opened = Checkpoint::open(&out).unwrap();
        // All others are written once.
        assert_eq!(report.num_tensors, opened.num_tensors(), "{name}");
        let expected = GoldenTensors::load(&run.join("expected.safetensors")).unwrap();
        let tokens = expected.ids("tokens").unwrap();
        // There expert choice ranks the tokens of whole sequences in evaluation, too.
        let found = Oracle::new(&opened).forward(&tokens, Routing::TopK).unwrap().logits;
        for (at, (found, expected)) in found.iter().zip(expected.f32("logits").unwrap()).enumerate() {
            assert!(GoldenTensors::close(*found, *expected), "{name}: logit {at} is {found}, expected {expected}");
        }
    }
}

/// A copy of files of the official fixture, which tests can damage.
fn copy_of(run: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(official_dir().join(run)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    dir
}

fn official_copy() -> TempDir {
    copy_of("")
}

#[test]
fn pickled_shards_that_are_wrong_are_refused() {
    const FIRST: &str = "pytorch_model-00001-of-00002.bin";
    const SECOND: &str = "pytorch_model-00002-of-00002.bin";
    let check = |damage: &dyn Fn(&Path, &mut Value), words: &[&str]| {
        let dir = copy_of("run-expert");
        let path = dir.path().join("pytorch_model.bin.index.json");
        let mut index = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        damage(dir.path(), &mut index);
        fs::write(path, index.to_string()).unwrap();
        refused(dir.path(), &ConvertOptions::default(), words);
    };
    let name = "model.layers.0.self_attn.q_proj.weight";
    check(&|dir, _| fs::remove_file(dir.join(SECOND)).unwrap(), &["cannot read", SECOND]);
    let stale = |dir: &Path, _: &mut Value| {
        fs::copy(dir.join(FIRST), dir.join(SECOND)).unwrap();
    };
    check(&stale, &[SECOND, "is missing, although the shard index"]);
    check(&|_, index| index["weight_map"][name] = json!(SECOND), &[SECOND, name, "is missing, although"]);
    check(&|_, index| index["weight_map"][name] = json!("../x.bin"), &["index.json", name, "a plain file name"]);
    check(&|_, index| index["weight_map"] = json!(7), &["index.json: weight_map is a number"]);
    let twice = |dir: &Path, index: &mut Value| {
        fs::copy(dir.join(FIRST), dir.join("again.bin")).unwrap();
        index["weight_map"][name] = json!("again.bin");
    };
    check(&twice, &["is in both", "again.bin", FIRST, "remove the stale shard"]);
    let hostile = |dir: &Path, _: &mut Value| {
        fs::copy(official_dir().join("malicious.bin"), dir.join(SECOND)).unwrap();
    };
    check(&hostile, &[SECOND, "asks for posix.system", "nothing was executed"]);
    // One file goes before shards.
    let dir = copy_of("run-expert");
    fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    refused(dir.path(), &ConvertOptions::default(), &["pytorch_model.bin: is no zip archive"]);
}

#[test]
fn relaxations_that_are_not_known_are_refused() {
    let text = fs::read_to_string(official_dir().join("run-lora/run.yaml")).unwrap();
    let check = |from: &str, to: &str, words: &[&str]| {
        assert!(text.contains(from), "{from}");
        let dir = copy_of("run-lora");
        fs::write(dir.path().join("run.yaml"), text.replacen(from, to, 1)).unwrap();
        refused(dir.path(), &ConvertOptions::default(), words);
    };
    check("method: lora", "method: dora", &["relaxation.method is \"dora\", expected one of lora, recursion_encoding"]);
    check("rank_pattern: null", "rank_pattern: { ffn: 2 }", &["relaxation.lora.rank_pattern is", "null"]);
    check("r: 4", "r: many", &["relaxation.lora.r is \"many\""]);
    check("r: 4", "r: 8", &["lora_A.default.weight has shape [4, 32], expected [8, 32]"]);
    check("\"q_proj\", ", "\"query\", ", &["mor.lora.targets is [\"query\",\"v_proj\"]"]);
    check("alpha_pattern: 2.0", "alpha_pattern: 0.0", &["relaxation.lora.alpha_pattern is 0"]);
}

#[test]
fn pickles_that_call_are_refused_and_nothing_runs() {
    let dir = official_copy();
    fs::copy(official_dir().join("malicious.bin"), dir.path().join("pytorch_model.bin")).unwrap();
    let words = ["pytorch_model.bin: ", "asks for posix.system", "nothing was executed"];
    refused(dir.path(), &ConvertOptions::default(), &words);
    // What the file would have run is `touch executed-by-pickle`.
    assert!(!Path::new("executed-by-pickle").exists() && !dir.path().join("executed-by-pickle").exists());
}

/// The archive of the fixture, written again with each record as `edit` leaves it.
fn repacked(dir: &Path, options: SimpleFileOptions, edit: impl Fn(&str, &mut Vec<u8>)) {
    let path = dir.join("pytorch_model.bin");
    let mut archive = zip::ZipArchive::new(Cursor::new(fs::read(&path).unwrap())).unwrap();
    let mut writer = zip::ZipWriter::new(fs::File::create(&path).unwrap());
    for index in 0..archive.len() {
        let mut record = archive.by_index(index).unwrap();
        let name = record.name().unwrap().into_owned();
        let mut bytes = Vec::new();
        record.read_to_end(&mut bytes).unwrap();
        edit(&name, &mut bytes);
        if !bytes.is_empty() {
            writer.start_file(name, options).unwrap();
            writer.write_all(&bytes).unwrap();
        }
    }
    writer.finish().unwrap();
}

#[test]
fn damaged_archives_are_refused() {
    let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let check = |damage: &dyn Fn(&Path), words: &[&str]| {
        let dir = official_copy();
        damage(dir.path());
        refused(dir.path(), &ConvertOptions::default(), &[&["pytorch_model.bin: "], words].concat());
    };
    let rewrite = |edit: fn(Vec<u8>) -> Vec<u8>| {
        move |dir: &Path| {
            let path = dir.join("pytorch_model.bin");
            let bytes = edit(fs::read(&path).unwrap());
            fs::write(path, bytes).unwrap();
        }
    };
    check(&rewrite(|bytes| bytes[..bytes.len() / 2].to_vec()), &["no whole zip archive", "again"]);
    check(&rewrite(|bytes| bytes[..bytes.len() - 1].to_vec()), &["no whole zip archive"]);
    check(&rewrite(|_| b"garbage".to_vec()), &["no zip archive", "torch.save"]);
    check(&rewrite(|_| Vec::new()), &["no zip archive"]);
    check(&rewrite(|_| b"PK\x03\x04garbage".to_vec()), &["no whole zip archive"]);
    // As torch.save wrote before 1.6: a pickle of a magic number comes first.
    check(&rewrite(|_| b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec()), &["before 1.6", "save it again"]);

    let repack = |edit: fn(&str, &mut Vec<u8>)| move |dir: &Path| repacked(dir, stored, edit);
    check(
        &repack(|name, bytes| {
            if name.ends_with("/data.pkl") {
                bytes.truncate(1000)
            }
        }),
        &["cut off"],
    );
    check(
        &repack(|name, bytes| {
            if name.ends_with("/data.pkl") {
                bytes.clear()
            }
        }),
        &["no data.pkl"],
    );
    check(
        &repack(|name, bytes| {
            if name.ends_with("/byteorder") {
                *bytes = b"big".to_vec()
            }
        }),
        &["byte order is big"],
    );
    check(
        &repack(|name, bytes| {
            if name.ends_with("/data/3") {
                bytes.clear()
            }
        }),
        &["no storage 3"],
    );
    check(
        &repack(|name, bytes| {
            if name.ends_with("/data/3") {
                bytes.truncate(bytes.len() - 1);
            }
        }),
        &["is in a storage of", "expected"],
    );
    // What would have to be unpacked could be a bomb: the method of the first record in the directory.
    let compress = |mut bytes: Vec<u8>| {
        let record = bytes.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
        bytes[record + 10] = 8;
        bytes
    };
    check(&rewrite(compress), &["is compressed or encrypted"]);
    let whole = official_copy();
    repacked(whole.path(), stored, |_, _| {});
    converted(whole.path(), &ConvertOptions::default());
}

#[test]
fn runs_whose_yaml_lacks_something_are_refused() {
    let text = fs::read_to_string(official_dir().join("run.yaml")).unwrap();
    let change = |from: &str, to: &str, words: &[&str]| {
        assert!(text.contains(from), "{from}");
        let dir = official_copy();
        fs::write(dir.path().join("run.yaml"), text.replacen(from, to, 1)).unwrap();
        refused(dir.path(), &ConvertOptions::default(), words);
    };
    let check = |from: &str, to: &str, words: &[&str]| change(from, to, &[&["run.yaml: "], words].concat());
    check("  num_recursion: 2\n", "", &["recursive.num_recursion is missing"]);
    check("  sharing: middle_cycle\n", "", &["recursive.sharing is missing", "middle_cycle"]);
    check("  type: expert\n", "", &["mor.type is missing", "expert, token"]);
    check("type: expert", "type: experts", &["mor.type is \"experts\""]);
    check("    router_func: sigmoid\n", "", &["mor.expert.router_func is missing"]);
    check("    alpha: 0.1\n", "", &["mor.expert.alpha is missing"]);
    check("    sampling: aux_loss\n", "", &["mor.expert.sampling is missing"]);
    check("  router_type: linear\n", "", &["mor.router_type is missing"]);
    check("  temp: 1.0\n", "", &["mor.temp is missing"]);
    check("temp: 1.0", "temp: warm", &["mor.temp is \"warm\""]);
    check("\"1.0,0.5\"", "\"1.0,half\"", &["mor.capacity is \"1.0,half\""]);
    check("\"1.0,0.5\"", "\"0.5,1.0\"", &["mor.capacity is [0.5,1.0]"]);
    check("rand_router: false", "rand_router: true", &["mor.rand_router is true"]);
    check("relaxation:\n  enable: false", "relaxation:\n  enable: true", &["relaxation.method is missing"]);
    check("SmolLM-135M", "Elsewhere-7B", &["Elsewhere-7B", "SmolLM-360M", "config.json"]);
    check("model_name_or_path: HuggingFaceTB/SmolLM-135M\n", "", &["model_name_or_path is missing"]);
    check("num_recursion: 2", "num_recursion: 3", &["mor.capacity is [1.0,0.5], expected 3 numbers"]);
    check("num_hidden_layers: 4", "num_hidden_layers: 5", &["num_hidden_layers = 5", "never dropped"]);
    check("name: mor", "name: [mor", &["not a YAML mapping: line 6 column 10: "]);
    // A YAML file that is fine, but not that of these weights.
    for (from, to, words) in [
        (
            "intermediate_size: 80",
            "intermediate_size: 88",
            ["gate_proj.weight has shape [80, 64]", "expected [88, 64]"],
        ),
        (
            "sharing: middle_cycle",
            "sharing: cycle",
            ["model.layers.0.input_layernorm.weight has no place", "cycle sharing"],
        ),
    ] {
        change(from, to, &words);
    }

    // None, several, and one that is named.
    let dir = official_copy();
    fs::rename(dir.path().join("run.yaml"), dir.path().join("run.txt")).unwrap();
    refused(dir.path(), &ConvertOptions::default(), &["neither a config.json nor a YAML file"]);
    fs::copy(dir.path().join("run.txt"), dir.path().join("a.yaml")).unwrap();
    fs::copy(dir.path().join("run.txt"), dir.path().join("b.yml")).unwrap();
    refused(dir.path(), &ConvertOptions::default(), &["a.yaml and b.yml", "choose"]);
    let named = ConvertOptions { run_config: Some(dir.path().join("a.yaml")), ..ConvertOptions::default() };
    assert_eq!(converted(dir.path(), &named).2.source, "official");
    refused(&case_dir(CASE), &named, &["config.json: has a mor object", "a.yaml"]);
}

/// Writes a folder with this config.json and the weights of a checkpoint.
fn folder(config: &Value, checkpoint: &Checkpoint) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    checkpoint.save(dir.path().join("model.safetensors")).unwrap();
    dir
}

/// A golden vanilla model as Llama checkpoints are: no `mor` object.
fn llama(name: &str) -> (TempDir, GoldenCase) {
    let case = GoldenCase::load(case_dir(name)).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(case.dir.join("config.json")).unwrap()).unwrap();
    config["model_type"] = json!("llama");
    config["architectures"] = json!(["LlamaForCausalLM"]);
    config.as_object_mut().unwrap().remove("mor");
    let dir = folder(&config, &case.checkpoint);
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    (dir, case)
}

fn start(sharing: SharingStrategy, num_recursions: usize, init: Init) -> Start {
    Start { sharing, num_recursions, mode: None, init, lora_rank: None, seed: 7 }
}

fn options(start: Start) -> ConvertOptions {
    ConvertOptions { start: Some(start), ..ConvertOptions::default() }
}

#[test]
fn sharing_none_leaves_a_llama_as_it_is() {
    for name in ["vanilla_gqa", "vanilla_mha_untied"] {
        let (dir, case) = llama(name);
        let none = options(Start { num_recursions: 1, ..start(SharingStrategy::None, 1, Init::Stepwise) });
        let (_dir, out, report) = converted(dir.path(), &none);
        assert_eq!(
            (report.source, report.mode, &report.copied[..]),
            ("llama", "vanilla", &["tokenizer.json".to_owned()][..])
        );
        // It is a Llama for others, too.
        let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
        assert_eq!((&config["model_type"], config.get("mor")), (&json!("llama"), None));
        let opened = Checkpoint::open(&out).unwrap();
        for (sequence, tokens) in case.sequences.iter().enumerate() {
            let found = logits(&opened, tokens);
            assert_eq!(found, logits(&case.checkpoint, tokens));
            let expected = case.expected.f32("causal.logits").unwrap();
            let at = sequence * case.padded_len * opened.config().vocab_size;
            let close = |(f, e): (&f32, &f32)| mor_model::golden::GoldenTensors::close(*f, *e);
            assert!(found.iter().zip(&expected[at..]).all(close), "{name}");
        }
    }
}

/// A vanilla model of eight layers with random weights, each layer another.
fn eight_layers() -> (TempDir, Checkpoint) {
    let config = json!({
        "model_type": "llama", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "initializer_range": 0.04,
    });
    let checkpoint = Checkpoint::random(MorConfig::from_json_str(&config.to_string(), "test").unwrap(), 3, Dtype::BF16);
    (folder(&config, &checkpoint), checkpoint)
}

#[test]
fn starts_take_the_layers_that_the_rule_names() {
    use SharingStrategy::{Cycle, MiddleCycle, MiddleSequence, Sequence};
    let (dir, vanilla) = eight_layers();
    let cases: [(SharingStrategy, usize, Init, &[&[usize]]); 7] = [
        (MiddleCycle, 3, Init::Stepwise, &[&[0], &[1], &[6], &[7]]),
        (MiddleCycle, 2, Init::Stepwise, &[&[0], &[1], &[4], &[6], &[7]]),
        (MiddleCycle, 3, Init::Lower, &[&[0], &[1], &[2], &[7]]),
        (MiddleCycle, 3, Init::Upper, &[&[0], &[5], &[6], &[7]]),
        (MiddleCycle, 3, Init::Average, &[&[0], &[1, 3, 5], &[2, 4, 6], &[7]]),
        (Sequence, 4, Init::Average, &[&[0, 1, 2, 3], &[4, 5, 6, 7]]),
        (Cycle, 4, Init::Upper, &[&[6], &[7]]),
    ];
    for (sharing, num_recursions, init, expected) in cases {
        let (_dir, out, report) = converted(dir.path(), &options(start(sharing, num_recursions, init)));
        let sources: Vec<&[usize]> = report.sources.iter().map(|layer| &layer.sources[..]).collect();
        assert_eq!(sources, expected, "{sharing} {init}");
        let opened = Checkpoint::open(&out).unwrap();
        assert_eq!(opened.config().is_routed(), sharing.is_cycle(), "the default mode");
        assert_eq!(opened.lm_head(), opened.embed_tokens());
        for LayerSource { layer, sources } in report.sources {
            for tensor in LayerTensor::ALL {
                let values = |checkpoint: &Checkpoint, layer| {
                    checkpoint.to_f32(checkpoint.id(TensorName::Layer { layer, tensor }).unwrap())
                };
                let found = values(&opened, layer);
                let parts: Vec<_> = sources.iter().map(|&source| values(&vanilla, source)).collect();
                for (i, &found) in found.iter().enumerate() {
                    let mean = parts.iter().map(|part| part[i]).sum::<f32>() / parts.len() as f32;
                    // One rounding to bf16.
                    assert!(
                        (found - mean).abs() <= mean.abs() / 256.0,
                        "{sharing} {init} layer {layer}: {found} {mean}"
                    );
                }
            }
        }
    }
    refused(dir.path(), &options(start(MiddleSequence, 4, Init::Lower)), &["num_hidden_layers = 8", "6 shared layers"]);
}

#[test]
fn routers_of_a_start_are_new_and_marked() {
    let (dir, _) = eight_layers();
    for mode in [Mode::Expert, Mode::Token] {
        let routed = |seed| {
            let start = Start { mode: Some(mode), seed, ..start(SharingStrategy::MiddleCycle, 3, Init::Stepwise) };
            let (_dir, out, report) = converted(dir.path(), &options(start));
            assert!(report.untrained_router);
            let opened = Checkpoint::open(out).unwrap();
            assert!(opened.config().untrained_router && opened.config().mode == mode);
            let id = opened.router(0).unwrap().router[0];
            opened.to_f32(id)
        };
        let (first, again, other) = (routed(1), routed(1), routed(2));
        assert!(first == again && first != other);
        let deviation = (first.iter().map(|x| x * x).sum::<f32>() / first.len() as f32).sqrt();
        assert!((deviation - 0.04).abs() < 0.012, "{deviation}");
    }
    let recursive = Start { mode: Some(Mode::Recursive), ..start(SharingStrategy::MiddleCycle, 3, Init::Stepwise) };
    let (_dir, out, report) = converted(dir.path(), &options(recursive));
    assert!(!report.untrained_router && !fs::read_to_string(out.join("config.json")).unwrap().contains("untrained"));
}

/// Adapters of full rank are the whole difference to the layer that was tied away.
#[test]
fn adapters_give_back_what_tying_takes() {
    let (dir, vanilla) = eight_layers();
    let recursive = Start { mode: Some(Mode::Recursive), ..start(SharingStrategy::MiddleCycle, 3, Init::Average) };
    let (_dir, out, _) = converted(dir.path(), &options(Start { lora_rank: Some(64), ..recursive }));
    let opened = Checkpoint::open(out).unwrap();
    assert_eq!(opened.config().lora.as_ref().map(|lora| (lora.rank, lora.scale())), Some((64, 1.0)));
    for layer in [1, 4, 6] {
        let adapter = opened.lora(layer, LayerTensor::QProj).unwrap();
        let (a, b) = (opened.to_f32(adapter.a), opened.to_f32(adapter.b));
        let shared = opened.to_f32(opened.layer(layer).q_proj);
        let original = vanilla.to_f32(vanilla.layer(layer).q_proj);
        for (at, (shared, original)) in shared.iter().zip(&original).enumerate() {
            let product: f32 = (0..64).map(|k| b[at / 64 * 64 + k] * a[k * 64 + at % 64]).sum();
            assert!((shared + product - original).abs() < 2e-3, "layer {layer}, element {at}");
        }
    }
}

#[test]
fn starts_that_cannot_be_are_refused() {
    use SharingStrategy::{MiddleCycle, None, Sequence};
    let (dir, _) = eight_layers();
    refused(
        &case_dir(CASE),
        &options(start(MiddleCycle, 2, Init::Lower)),
        &["is of mode expert", "expected a vanilla model"],
    );
    refused(dir.path(), &options(start(MiddleCycle, 1, Init::Lower)), &["num_recursion", "two recursions"]);
    refused(dir.path(), &options(start(MiddleCycle, 4, Init::Lower)), &["multiple of mor.num_recursion = 4"]);
    let routed = |sharing| options(Start { mode: Some(Mode::Expert), ..start(sharing, 2, Init::Lower) });
    refused(dir.path(), &routed(Sequence), &["sharing = sequence", "contiguous"]);
    refused(dir.path(), &routed(None), &["only a vanilla model shares no layers"]);
    let config: Value = serde_json::from_slice(&fs::read(dir.path().join("config.json")).unwrap()).unwrap();
    for (field, value) in
        [("attention_bias", json!(true)), ("rope_scaling", json!({ "type": "linear", "factor": 2.0 }))]
    {
        let mut config = config.clone();
        config[field] = value;
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        refused(dir.path(), &options(start(MiddleCycle, 2, Init::Lower)), &[field]);
    }
}

#[test]
fn types_and_shards_are_as_asked() {
    let case = GoldenCase::load(case_dir(CASE)).unwrap();
    for (dtype, name) in [(Dtype::F32, "float32"), (Dtype::F16, "float16"), (Dtype::BF16, "bfloat16")] {
        let options = ConvertOptions { dtype: Some(dtype), max_shard_bytes: 50_000, ..ConvertOptions::default() };
        let (_dir, out, report) = converted(&case.dir, &options);
        assert!(report.files.len() > 1 && report.files[0].starts_with("model-00001-of-"), "{:?}", report.files);
        assert!(!out.join("model.safetensors").exists());
        let index: Value =
            serde_json::from_slice(&fs::read(out.join("model.safetensors.index.json")).unwrap()).unwrap();
        assert_eq!(index["metadata"]["total_size"], report.num_bytes);
        let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["torch_dtype"], name);
        for file in &report.files {
            // The header comes on top, and a tensor alone may be larger.
            let bytes = fs::read(out.join(file)).unwrap();
            let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let tensors = index["weight_map"].as_object().unwrap().values().filter(|shard| *shard == file).count();
            assert!(bytes.len() - header <= 50_000 || tensors == 1, "{file}");
        }
        let opened = Checkpoint::open(&out).unwrap();
        assert_eq!(opened.config(), case.checkpoint.config());
        for id in opened.tensor_ids() {
            assert_eq!(opened.dtype(id), dtype);
            // The weights of the golden cases are bf16 numbers, small enough for f16 to have nearly all of them.
            let (found, expected) = (opened.to_f32(id), case.checkpoint.to_f32(id));
            let close = |(f, e): (&f32, &f32)| (f - e).abs() <= if dtype == Dtype::F16 { 1e-4 } else { 0.0 };
            assert!(found.iter().zip(&expected).all(close), "{}", opened.name(id));
        }
    }
}

#[test]
fn numbers_that_a_type_does_not_have_are_named() {
    let (dir, case) = llama("vanilla_gqa");
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let data_start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..data_start]).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let at = data_start + header[name]["data_offsets"][0].as_u64().unwrap() as usize;
    let large = 1e6_f32.to_le_bytes();
    let large = if header[name]["dtype"] == "F32" { &large[..] } else { &large[2..] };
    bytes[at..at + large.len()].copy_from_slice(large);
    fs::write(&path, bytes).unwrap();
    let f16 = ConvertOptions { dtype: Some(Dtype::F16), ..ConvertOptions::default() };
    refused(dir.path(), &f16, &[name, "at element 0", "F16 does not have"]);

    let quantized = case.checkpoint.quantize(Quantization::Q8).unwrap();
    let config = serde_json::from_str(&quantized.config().to_json()).unwrap();
    let dir = folder(&config, &quantized);
    refused(dir.path(), &f16, &["quantised as q8", "convert the one it was made from"]);
    refused(dir.path(), &to_official(), &["quantised as q8"]);
    // Cut into other files it stays what it is.
    let shards = ConvertOptions { max_shard_bytes: 20_000, ..ConvertOptions::default() };
    let (_dir, out, _) = converted(dir.path(), &shards);
    assert_eq!(Checkpoint::open(out).unwrap().config(), quantized.config());
}

#[test]
fn places_that_are_taken_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let taken = dir.path().join("taken");
    fs::write(&taken, "precious").unwrap();
    let error = convert(&case_dir(CASE), &taken, &ConvertOptions::default()).unwrap_err();
    assert!(matches!(&error, ModelError::NewFolder { .. }), "{error:?}");
    assert!(error.to_string().contains("exists, expected the name of a new folder"), "{error}");
    assert_eq!(fs::read_to_string(taken).unwrap(), "precious");
    let error = convert(&dir.path().join("absent"), &dir.path().join("out"), &ConvertOptions::default()).unwrap_err();
    assert!(matches!(&error, ModelError::Io { .. }), "{error:?}");
}

#[test]
fn tied_tensors_that_differ_are_reported_and_kept() {
    let case = GoldenCase::load(case_dir(CASE)).unwrap();
    let (_dir, official, _) = converted(&case.dir, &to_official());
    let path = official.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let data_start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..data_start]).unwrap();
    let (first, copy) =
        ("model.layers.1.block.0.self_attn.q_proj.weight", "model.layers.2.block.0.self_attn.q_proj.weight");
    let at = data_start + header[copy]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();
    let (_dir, out, report) = converted(&official, &ConvertOptions::default());
    let [kept] = &report.kept_separate[..] else { panic!("{:?}", report.kept_separate) };
    assert_eq!((kept.name.as_str(), kept.first.as_str()), (copy, first));
    let opened = Checkpoint::open(out).unwrap();
    assert_ne!(opened.layer(1).q_proj, opened.layer(2).q_proj);
    assert_eq!(opened.layer(1).k_proj, opened.layer(2).k_proj);
}
