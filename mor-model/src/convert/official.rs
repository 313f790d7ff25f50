//! Runs of the official training code: what their YAML file says, as a configuration, and the way back.
//!
//! # Source
//!
//! `github.com/raymin0223/mixture_of_recursions`: what its models read of a run (`model/mor_model/`).

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{fields_of, read_text};
use crate::fields::Fields;
use crate::{KvStrategy, Mode, ModelError, MorConfig, RouterFunc, RouterType, SharingStrategy};

/// Shapes that `model_name_or_path` stands for where a run has no config.json: hidden size, MLP size, layers, heads,
/// K/V heads.
const SHAPES: [(&str, [usize; 5]); 3] = [
    ("SmolLM-135M", [576, 1536, 30, 9, 3]),
    ("SmolLM-360M", [960, 2560, 32, 15, 5]),
    ("SmolLM-1.7B", [2048, 8192, 24, 32, 32]),
];

/// Methods of relaxation that are converted.
const RELAXATIONS: [&str; 2] = [LORA, RECURSION_ENCODING];
const LORA: &str = "lora";
const RECURSION_ENCODING: &str = "recursion_encoding";

/// The YAML file of a folder; `None` where there is none and a config.json says what the folder is.
pub(super) fn find_run_config(dir: &Path) -> Result<Option<PathBuf>, ModelError> {
    let unreadable = |source| ModelError::Io { path: dir.to_owned(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|end| end == "yaml" || end == "yml") && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    let refuse = |problem| Err(ModelError::Convert { origin: dir.display().to_string(), problem });
    match &found[..] {
        [] if dir.join("config.json").is_file() => Ok(None),
        [] => refuse(
            "has neither a config.json nor a YAML file; an official run needs the YAML file that it was started with"
                .to_owned(),
        ),
        [one] => Ok(Some(one.clone())),
        several => {
            let names: Vec<_> =
                several.iter().filter_map(|path| path.file_name()).map(|n| n.to_string_lossy()).collect();
            refuse(format!("has {}; choose the one that the run was started with", names.join(" and ")))
        }
    }
}

/// Reads the YAML file of a run, over the `config.json` of its folder.
pub(super) fn read_config(path: &Path, base: &Map<String, Value>) -> Result<MorConfig, ModelError> {
    let origin = path.display().to_string();
    let run: Map<String, Value> = serde_saphyr::from_str(&read_text(path)?).map_err(|error| {
        // The first line says where and what, the others show the text around.
        let message = error.to_string();
        let problem = message.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        ModelError::YamlSyntax { origin: origin.clone(), problem }
    })?;
    let run = Fields { origin: &origin, prefix: "", map: &run };
    let mut config = llama_fields(&run, base)?;
    let routing = routing_fields(&run, &mut config)?;
    config.insert("model_type".to_owned(), Value::from("mor"));
    config.insert("mor".to_owned(), Value::Object(routing));
    MorConfig::from_json_str(&Value::Object(config).to_string(), &origin)
}

/// The shape: config.json, or that of a known model, changed as the YAML file says.
fn llama_fields(run: &Fields<'_>, base: &Map<String, Value>) -> Result<Map<String, Value>, ModelError> {
    let mut config = base.clone();
    if config.is_empty() {
        let known = SHAPES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        let name = run.get("model_name_or_path").and_then(Value::as_str).and_then(|name| name.rsplit('/').next());
        let Some((_, [hidden, inner, layers, heads, kv_heads])) = SHAPES.iter().find(|(shape, _)| Some(*shape) == name)
        else {
            let expected = format!("one of {known}; for another, put its config.json beside the weights");
            return Err(match run.get("model_name_or_path") {
                Some(_) => run.value("model_name_or_path", expected),
                None => run.missing("model_name_or_path", &expected),
            });
        };
        let fields = json!({
            "vocab_size": 49152, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "max_position_embeddings": 2048, "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": 0,
        });
        config.extend(fields.as_object().cloned().unwrap_or_default());
    }
    if let Some(changes) = run.object("model_config")? {
        config.extend(changes.clone());
        let changes = Fields { prefix: "model_config.", map: changes, ..*run };
        // The official code derives it from these two.
        let is_derived = changes.get("head_dim").is_none();
        if is_derived && changes.get("hidden_size").is_some() && changes.get("num_attention_heads").is_some() {
            let (hidden, heads) =
                (changes.size("hidden_size", usize::MAX)?, changes.size("num_attention_heads", usize::MAX)?);
            config.insert("head_dim".to_owned(), Value::from(hidden / heads));
        }
    }
    if run.get("max_length").is_some() && !run.flag("use_pretrained_weights", false)? {
        config.insert("max_position_embeddings".to_owned(), Value::from(run.size("max_length", u32::MAX as usize)?));
    }
    Ok(config)
}

/// The `mor` object; a run that only cuts the depth of a vanilla model changes the number of layers in `config`.
fn routing_fields(run: &Fields<'_>, config: &mut Map<String, Value>) -> Result<Map<String, Value>, ModelError> {
    let none = Map::new();
    let section = |prefix: &'static str, name: &str| {
        let map = run.object(name)?;
        let fields = Fields { prefix, map: map.unwrap_or(&none), ..*run };
        Ok::<_, ModelError>((fields, fields.flag("enable", false)?))
    };
    let (recursive, is_recursive) = section("recursive.", "recursive")?;
    let (mor, is_routed) = section("mor.", "mor")?;
    let (kv, shares_kv) = section("kv_sharing.", "kv_sharing")?;
    let (relaxation, is_relaxed) = section("relaxation.", "relaxation")?;
    let mut fields = Map::new();
    if !is_recursive && !is_routed {
        fields.insert("mode".to_owned(), Value::from(Mode::Vanilla.as_str()));
        return Ok(fields);
    }
    let num_recursions = recursive.size("num_recursion", u32::MAX as usize)?;
    if num_recursions == 1 && !is_routed {
        let depth = recursive.size("base_depth", u32::MAX as usize)?;
        config.insert("num_hidden_layers".to_owned(), Value::from(depth));
        fields.insert("mode".to_owned(), Value::from(Mode::Vanilla.as_str()));
        return Ok(fields);
    }
    let sharing = recursive.required_name("sharing", SharingStrategy::ALL, SharingStrategy::as_str)?;
    let kv = match (shares_kv, shares_kv && kv.flag("update_cache", false)?) {
        (false, _) => KvStrategy::RecursionWise,
        (true, false) => KvStrategy::Sharing,
        (true, true) => KvStrategy::Hybrid,
    };
    let mode = if is_routed {
        mor.required_name("type", &[Mode::Expert, Mode::Token], Mode::as_str)?
    } else {
        Mode::Recursive
    };
    if is_relaxed {
        fields = relaxation_fields(&relaxation)?;
    }
    let mut set = |name: &str, value: Value| drop(fields.insert(name.to_owned(), value));
    set("mode", Value::from(mode.as_str()));
    set("sharing", Value::from(sharing.as_str()));
    set("num_recursion", Value::from(num_recursions));
    set("kv", Value::from(kv.as_str()));
    if !is_routed {
        return Ok(fields);
    }

    if mor.flag("rand_router", false)? {
        return Err(mor.value("rand_router", "false; a model that routes at random is not converted"));
    }
    let router = mor.required_name("router_type", RouterType::ALL, RouterType::as_str)?;
    set("router_type", Value::from(router.as_str()));
    set("temp", Value::from(mor.positive("temp", None)?));
    set("z_loss", Value::from(mor.flag("z_loss", false)?));
    set("z_coeff", Value::from(mor.coefficient("z_coeff", 1e-5)?));
    if mode == Mode::Expert {
        let expert = mor.object("expert")?.ok_or_else(|| mor.missing("expert", "the settings of expert choice"))?;
        let expert = Fields { prefix: "mor.expert.", map: expert, ..*run };
        // Absent and null differ in what they say, not in what the official code makes of them.
        let func = required_or_null(&expert, "router_func", "sigmoid, tanh or null")?;
        let alpha =
            if func.is_null() { expert.positive("alpha", Some(1.0))? } else { expert.positive("alpha", None)? };
        let warmup = match expert.get("cap_warmup_step") {
            Some(_) => expert.steps("cap_warmup_step")?,
            None => run.steps("num_warmup_steps")?.saturating_mul(run.steps("gradient_accumulation_steps")?),
        };
        set("router_func", func);
        set("alpha", Value::from(alpha));
        set("sampling", required_or_null(&expert, "sampling", "aux_loss, aux_router or null")?);
        set("sampling_coeff", Value::from(expert.coefficient("coeff", 0.001)?));
        set("cap_warmup_step", Value::from(warmup));
        set("gating", expert.get("gating").cloned().unwrap_or_else(|| Value::from("weighted")));
        if let Some(capacity) = capacity(&mor)? {
            set("capacity", capacity);
        }
    } else {
        let token = mor.object("token")?.ok_or_else(|| mor.missing("token", "the settings of token choice"))?;
        let token = Fields { prefix: "mor.token.", map: token, ..*run };
        // What is no sigmoid is a softmax to the official code.
        let func = token.get("router_func").cloned().unwrap_or_else(|| Value::from("softmax"));
        let default_alpha = if func == RouterFunc::Sigmoid.as_str() { 0.1 } else { 1.0 };
        set("router_func", func);
        set("alpha", Value::from(token.positive("alpha", Some(default_alpha))?));
        set("balancing", required_or_null(&token, "balancing", "loss, loss_free or null")?);
        set("balancing_coeff", Value::from(token.coefficient("coeff", 0.1)?));
        set("bal_warmup_step", Value::from(token.steps("bal_warmup_step")?));
        set("bias_update_rate", Value::from(token.coefficient("u", 0.001)?));
        set("gating", token.get("gating").cloned().unwrap_or_else(|| Value::from("weighted")));
    }
    Ok(fields)
}

/// What gives tied layers weights of their own, as keys of the `mor` object.
fn relaxation_fields(relaxation: &Fields<'_>) -> Result<Map<String, Value>, ModelError> {
    let relaxed = match relaxation.required_name("method", &RELAXATIONS, |method| method)? {
        RECURSION_ENCODING => json!({ "recursion_encoding": true }),
        _ => {
            let lora =
                relaxation.object("lora")?.ok_or_else(|| relaxation.missing("lora", "the settings of adapters"))?;
            let lora = Fields { prefix: "relaxation.lora.", map: lora, ..*relaxation };
            if lora.get("rank_pattern").is_some() {
                return Err(lora.value("rank_pattern", "null; adapters of several ranks are not converted"));
            }
            let rank = lora.size("r", u32::MAX as usize)?;
            // A pattern is the factor itself.
            let alpha = match lora.get("alpha_pattern") {
                Some(_) => lora.positive("alpha_pattern", None)? * rank as f64,
                None => lora.positive("alpha", None)?,
            };
            let targets =
                lora.get("target_modules").ok_or_else(|| lora.missing("target_modules", "a list of names"))?;
            json!({ "lora": { "rank": rank, "alpha": alpha, "targets": targets } })
        }
    };
    Ok(relaxed.as_object().cloned().unwrap_or_default())
}

fn required_or_null(fields: &Fields<'_>, name: &str, expected: &str) -> Result<Value, ModelError> {
    fields.map.get(name).cloned().ok_or_else(|| fields.missing(name, expected))
}

/// Numbers separated by commas, a number alone, or a list of them.
fn capacity(mor: &Fields<'_>) -> Result<Option<Value>, ModelError> {
    match mor.get("capacity") {
        None => Ok(None),
        Some(Value::String(text)) => text
            .split(',')
            .map(|part| part.trim().parse::<f64>().ok().map(Value::from))
            .collect::<Option<Vec<_>>>()
            .map(|list| Some(Value::Array(list)))
            .ok_or_else(|| mor.value("capacity", "numbers separated by commas, or null")),
        Some(value) => Ok(Some(value.clone())),
    }
}

/// The `config.json` beside an official run: the shape alone.
pub(super) fn llama_config(mut base: Map<String, Value>, config: &MorConfig) -> Map<String, Value> {
    base.extend(fields_of(config));
    base.remove("mor");
    base.insert("model_type".to_owned(), Value::from("llama"));
    base.insert("architectures".to_owned(), json!(["LlamaForCausalLM"]));
    base
}

/// The YAML file of a run of this model: what the official code needs to rebuild it. How to train it is not in there.
pub(super) fn run_config(config: &MorConfig) -> String {
    let nullable = |name: &str| if name == "null" { Value::Null } else { Value::from(name) };
    let is_recursive = config.mode != Mode::Vanilla;
    let mut run = json!({
        // Its name for the classes of Llamas.
        "model": "smollm",
        "max_length": config.max_position_embeddings,
        "use_pretrained_weights": false,
        "model_config": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "tie_word_embeddings": config.tie_word_embeddings,
        },
        "recursive": { "enable": is_recursive },
        "kv_sharing": { "enable": config.kv != KvStrategy::RecursionWise },
        "relaxation": { "enable": false },
        "mor": { "enable": config.is_routed() },
    });
    if config.head_dim * config.num_attention_heads != config.hidden_size {
        // Else the official code derives it, and this one too.
        run["model_config"]["head_dim"] = Value::from(config.head_dim);
    }
    if let Some(lora) = &config.lora {
        let targets: Vec<_> = lora.targets.iter().map(|target| target.name()).collect();
        let lora = json!({ "r": lora.rank, "alpha": lora.alpha, "dropout": 0.0, "target_modules": targets });
        run["relaxation"] = json!({ "enable": true, "method": LORA, "lora": lora });
    } else if config.recursion_encoding {
        run["relaxation"] = json!({ "enable": true, "method": RECURSION_ENCODING });
    }
    if is_recursive {
        let (sharing, num_recursions) = (config.sharing.as_str(), config.num_recursions);
        run["recursive"] = json!({
            "enable": true, "num_recursion": num_recursions, "sharing": sharing, "ln_share": true,
            "initialization": "random",
        });
        run["kv_sharing"] = json!({
            "enable": config.kv != KvStrategy::RecursionWise, "num_recursion": num_recursions, "sharing": sharing,
            "update_cache": config.kv == KvStrategy::Hybrid,
        });
    }
    if config.is_routed() {
        let capacity: Vec<String> = config.capacity.iter().map(f64::to_string).collect();
        run["mor"] = json!({
            "enable": true,
            "type": config.mode.as_str(),
            "capacity": capacity.join(","),
            "router_type": config.router_type.as_str(),
            "temp": config.temp,
            "rand_router": false,
            "z_loss": config.z_loss,
            "z_coeff": config.z_coeff,
        });
    }
    match config.mode {
        Mode::Expert => {
            run["mor"]["expert"] = json!({
                "router_func": nullable(config.router_func.as_str()),
                "alpha": config.alpha,
                "sampling": nullable(config.sampling.as_str()),
                "coeff": config.sampling_coeff,
                "cap_warmup_step": config.cap_warmup_step,
                "gating": config.gating.as_str(),
            });
        }
        Mode::Token => {
            run["mor"]["token"] = json!({
                "router_func": config.router_func.as_str(),
                "alpha": config.alpha,
                "balancing": nullable(config.balancing.as_str()),
                "coeff": config.balancing_coeff,
                "bal_warmup_step": config.bal_warmup_step,
                "u": config.bias_update_rate,
                "gating": config.gating.as_str(),
            });
        }
        Mode::Vanilla | Mode::Recursive => {}
    }
    // Names, numbers and lists of them always have a YAML form.
    serde_saphyr::to_string(&run).unwrap_or_default()
}
