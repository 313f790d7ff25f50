//! Reads a `config.json` and refuses what contradicts itself or is not implemented.

use std::{fmt, path::Path};

use mor_kernels::quantize::GROUP;
use serde_json::{Map, Value};

use super::{
    Balancing, Gating, KvStrategy, Lora, Mode, MorConfig, QUANT_METHOD, Quantization, RouterFunc, RouterType, Sampling,
    SharingStrategy,
};
use crate::fields::{Fields, list};
use crate::{LayerTensor, ModelError};

/// Largest accepted width (`hidden_size`, `intermediate_size`, `q_dim`): keeps every element count far from overflow.
const MAX_WIDTH: usize = 1 << 20;
/// Largest accepted vocabulary.
const MAX_VOCAB: usize = 1 << 24;
/// Largest accepted effective depth.
const MAX_LAYERS: usize = 4096;
/// Largest accepted rank of adapters.
const MAX_RANK: usize = 4096;
/// The kernels load rows in groups of eight elements (16 bytes of half precision).
const WIDTH_MULTIPLE: usize = 8;

/// Fields of the `mor` object.
const MOR_FIELDS: &[&str] = &[
    "mode",
    "sharing",
    "num_recursion",
    "num_recursions",
    "kv",
    "lora",
    "recursion_encoding",
    "router_type",
    "router_func",
    "alpha",
    "temp",
    "gating",
    "capacity",
    "sampling",
    "sampling_coeff",
    "cap_warmup_step",
    "balancing",
    "balancing_coeff",
    "bal_warmup_step",
    "bias_update_rate",
    "z_loss",
    "z_coeff",
    "untrained_router",
];
/// Fields of the `mor.lora` object.
const LORA_FIELDS: &[&str] = &["rank", "alpha", "targets"];

impl MorConfig {
    /// Reads and validates a `config.json`.
    ///
    /// # Errors
    ///
    /// [`ModelError::Io`] when the file cannot be read, else as [`MorConfig::from_json_str`].
    pub fn from_json_file(path: impl AsRef<Path>) -> Result<Self, ModelError> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
        Self::from_json_str(&text, &path.display().to_string())
    }

    /// Parses and validates the text of a `config.json`; `origin` names it in messages.
    ///
    /// Without a `mor` object a Llama configuration is a vanilla model. Unknown Llama fields are ignored, since
    /// published files carry many; unknown `mor` fields are refused.
    ///
    /// # Errors
    ///
    /// [`ModelError::JsonSyntax`], [`ModelError::ConfigMissing`], [`ModelError::ConfigValue`],
    /// [`ModelError::ConfigUnknownField`], [`ModelError::ConfigConflict`] or [`ModelError::LayersNotDivisible`].
    pub fn from_json_str(text: &str, origin: &str) -> Result<Self, ModelError> {
        let map: Map<String, Value> = serde_json::from_str(text)
            .map_err(|source| ModelError::JsonSyntax { origin: origin.to_owned(), source })?;
        let top = Fields { origin, prefix: "", map: &map };
        let mor = top.object("mor")?;
        let model_type = map.get("model_type");
        match model_type.and_then(Value::as_str) {
            Some("llama") => {}
            None if model_type.is_none_or(Value::is_null) => {}
            Some("mor") if mor.is_some() => {}
            Some("mor") => {
                return Err(top.missing("mor", "an object with the routing setup when model_type is mor"));
            }
            _ => return Err(top.value("model_type", "llama or mor")),
        }
        top.refuse_unimplemented()?;
        let no_fields = Map::new();
        let config =
            Self::from_fields(&top, Fields { origin, prefix: "mor.", map: mor.unwrap_or(&no_fields) }, mor.is_some())?;
        config.check_combinations(origin)?;
        Ok(config)
    }

    /// Reads every field and checks each one alone.
    fn from_fields(top: &Fields<'_>, mor: Fields<'_>, has_mor: bool) -> Result<Self, ModelError> {
        mor.refuse_unknown(MOR_FIELDS)?;

        let vocab_size = top.size("vocab_size", MAX_VOCAB)?;
        let hidden_size = top.size("hidden_size", MAX_WIDTH)?;
        let num_attention_heads = top.size("num_attention_heads", MAX_WIDTH)?;
        let head_dim = match top.get("head_dim") {
            Some(_) => top.size("head_dim", MAX_WIDTH)?,
            None if hidden_size % num_attention_heads == 0 => hidden_size / num_attention_heads,
            None => {
                return Err(conflict(
                    top.origin,
                    ("num_attention_heads", &num_attention_heads),
                    ("hidden_size", &hidden_size),
                    "without head_dim the number of heads must divide the hidden size; set head_dim",
                ));
            }
        };
        let vector_loads = "which the kernels' vector loads need";
        for (field, width, multiple, reason) in [
            ("hidden_size", hidden_size, WIDTH_MULTIPLE, vector_loads),
            ("head_dim", head_dim, 2, "because rotary positions turn pairs"),
        ] {
            if width % multiple != 0 {
                return Err(ModelError::ConfigValue {
                    origin: top.origin.to_owned(),
                    field: field.to_owned(),
                    found: width.to_string(),
                    expected: format!("a multiple of {multiple}, {reason}"),
                });
            }
        }

        let num_recursions = match (mor.get("num_recursion"), mor.get("num_recursions")) {
            (Some(a), Some(b)) if a != b => {
                return Err(conflict(
                    mor.origin,
                    ("mor.num_recursion", a),
                    ("mor.num_recursions", b),
                    "they are two spellings of one field; keep one",
                ));
            }
            (Some(_), _) => mor.size("num_recursion", MAX_LAYERS)?,
            (None, Some(_)) => mor.size("num_recursions", MAX_LAYERS)?,
            (None, None) => 1,
        };
        let mode = if has_mor { mor.required_name("mode", Mode::ALL, Mode::as_str)? } else { Mode::Vanilla };
        let (default_func, default_alpha) = match mode {
            Mode::Token => (RouterFunc::Softmax, 1.0),
            _ => (RouterFunc::Sigmoid, 0.1),
        };
        let capacity = match mor.get("capacity") {
            Some(value) => mor.capacity(value, num_recursions)?,
            None => default_capacity(num_recursions),
        };

        Ok(Self {
            vocab_size,
            hidden_size,
            intermediate_size: top.size("intermediate_size", MAX_WIDTH)?,
            num_hidden_layers: top.size("num_hidden_layers", MAX_LAYERS)?,
            num_attention_heads,
            num_key_value_heads: match top.get("num_key_value_heads") {
                Some(_) => top.size("num_key_value_heads", MAX_WIDTH)?,
                None => num_attention_heads,
            },
            head_dim,
            rms_norm_eps: top.positive("rms_norm_eps", None)?,
            rope_theta: top.rope_theta()?,
            max_position_embeddings: match top.get("max_position_embeddings") {
                Some(_) => top.size("max_position_embeddings", u32::MAX as usize)?,
                None => 2048,
            },
            tie_word_embeddings: top.flag("tie_word_embeddings", true)?,
            bos_token_id: top.token_ids("bos_token_id", vocab_size)?.first().copied(),
            eos_token_id: top.token_ids("eos_token_id", vocab_size)?,
            quantization: top.quantization()?,
            mode,
            sharing: mor.name("sharing", SharingStrategy::ALL, SharingStrategy::as_str, SharingStrategy::None)?,
            num_recursions,
            kv: mor.name("kv", KvStrategy::ALL, KvStrategy::as_str, KvStrategy::RecursionWise)?,
            lora: mor.lora()?,
            recursion_encoding: mor.flag("recursion_encoding", false)?,
            router_type: mor.name("router_type", RouterType::ALL, RouterType::as_str, RouterType::Linear)?,
            router_func: mor.nullable("router_func", RouterFunc::ALL, RouterFunc::as_str, default_func)?,
            alpha: mor.positive("alpha", Some(default_alpha))?,
            temp: mor.positive("temp", Some(1.0))?,
            gating: mor.name("gating", Gating::ALL, Gating::as_str, Gating::Weighted)?,
            capacity,
            sampling: mor.nullable("sampling", Sampling::ALL, Sampling::as_str, Sampling::AuxLoss)?,
            sampling_coeff: mor.coefficient("sampling_coeff", 0.001)?,
            cap_warmup_step: mor.steps("cap_warmup_step")?,
            balancing: mor.nullable("balancing", Balancing::ALL, Balancing::as_str, Balancing::Loss)?,
            balancing_coeff: mor.coefficient("balancing_coeff", 0.1)?,
            bal_warmup_step: mor.steps("bal_warmup_step")?,
            bias_update_rate: mor.coefficient("bias_update_rate", 0.001)?,
            z_loss: mor.flag("z_loss", false)?,
            z_coeff: mor.coefficient("z_coeff", 1e-5)?,
            untrained_router: mor.flag("untrained_router", false)?,
        })
    }

    /// Checks the fields against each other.
    pub(super) fn check_combinations(&self, origin: &str) -> Result<(), ModelError> {
        let conflict = |field, other, rule| Err(conflict(origin, field, other, rule));
        let mode: Setting<'_> = ("mor.mode", &self.mode);
        let sharing: Setting<'_> = ("mor.sharing", &self.sharing);
        let func: Setting<'_> = ("mor.router_func", &self.router_func);
        let kv: Setting<'_> = ("mor.kv", &self.kv);
        let recursions: Setting<'_> = ("mor.num_recursion", &self.num_recursions);

        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return conflict(
                ("num_key_value_heads", &self.num_key_value_heads),
                ("num_attention_heads", &self.num_attention_heads),
                "every key-value head must serve the same number of query heads",
            );
        }
        // Both factors are at most MAX_WIDTH, so the product cannot overflow.
        if self.q_dim() > MAX_WIDTH {
            return conflict(
                ("num_attention_heads", &self.num_attention_heads),
                ("head_dim", &self.head_dim),
                "their product must not exceed 1048576",
            );
        }

        if self.mode == Mode::Vanilla {
            if self.sharing != SharingStrategy::None {
                return conflict(sharing, mode, "a vanilla model shares no layers; use none, or another mode");
            }
            if self.num_recursions != 1 {
                return conflict(recursions, mode, "a vanilla model has one recursion");
            }
            if self.kv != KvStrategy::RecursionWise {
                return conflict(kv, mode, "there is no other recursion to share with; use recursion_wise");
            }
            let relaxes_nothing = "only shared layers can differ between recursions";
            if let Some(lora) = &self.lora {
                return conflict(("mor.lora.rank", &lora.rank), mode, relaxes_nothing);
            }
            if self.recursion_encoding {
                return conflict(("mor.recursion_encoding", &true), mode, relaxes_nothing);
            }
        } else {
            if self.sharing == SharingStrategy::None {
                return conflict(sharing, mode, "only a vanilla model shares no layers");
            }
            if self.num_recursions < 2 {
                return conflict(recursions, mode, "only a vanilla model has fewer than two recursions");
            }
            let unshared = if self.sharing.is_middle() { 2 } else { 0 };
            let shared = self.num_hidden_layers.saturating_sub(unshared);
            if shared == 0 || !shared.is_multiple_of(self.num_recursions) {
                return Err(ModelError::LayersNotDivisible {
                    origin: origin.to_owned(),
                    num_hidden_layers: self.num_hidden_layers,
                    shared,
                    sharing: self.sharing,
                    num_recursions: self.num_recursions,
                });
            }
        }

        if self.is_routed() && !self.sharing.is_cycle() {
            return conflict(sharing, mode, "routing needs a block that is contiguous; use cycle or middle_cycle");
        }
        if self.kv == KvStrategy::Hybrid && self.mode != Mode::Expert {
            return conflict(kv, mode, "hybrid is defined for expert choice; use recursion_wise or sharing");
        }
        match (self.mode, self.router_func) {
            (Mode::Expert, RouterFunc::Softmax) => {
                conflict(func, mode, "expert choice has one logit per token; use sigmoid, tanh or null")
            }
            (Mode::Token, RouterFunc::Tanh | RouterFunc::None) => {
                conflict(func, mode, "token choice gates are probabilities; use softmax or sigmoid")
            }
            _ => Ok(()),
        }
    }
}

/// A field and its value.
type Setting<'a> = (&'static str, &'a dyn fmt::Display);

fn conflict(origin: &str, field: Setting<'_>, other: Setting<'_>, rule: &'static str) -> ModelError {
    ModelError::ConfigConflict {
        origin: origin.to_owned(),
        field: field.0,
        found: field.1.to_string(),
        other: other.0,
        other_found: other.1.to_string(),
        rule,
    }
}

/// Default capacities (R - r) / R of expert choice.
fn default_capacity(num_recursions: usize) -> Vec<f64> {
    (0..num_recursions).map(|r| (num_recursions - r) as f64 / num_recursions as f64).collect()
}

impl Fields<'_> {
    /// `null`, one id, or a list of ids.
    fn token_ids(&self, name: &str, vocab_size: usize) -> Result<Vec<u32>, ModelError> {
        let id = |value: &Value| value.as_u64().filter(|&id| id < vocab_size as u64).map(|id| id as u32);
        match self.get(name) {
            None => Some(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(value) => id(value).map(|id| vec![id]),
        }
        .ok_or_else(|| self.value(name, format!("null, a token id below vocab_size = {vocab_size}, or a list of them")))
    }

    fn capacity(&self, value: &Value, num_recursions: usize) -> Result<Vec<f64>, ModelError> {
        let list: Option<Vec<f64>> =
            value.as_array().and_then(|values| values.iter().map(Value::as_f64).collect::<Option<_>>());
        list.filter(|list| {
            list.len() == num_recursions
                && list.iter().all(|&c| c > 0.0 && c <= 1.0)
                && list.windows(2).all(|pair| pair[0] >= pair[1])
        })
        .ok_or_else(|| {
            self.value(
                "capacity",
                format!("{num_recursions} numbers (one per recursion) above 0 and up to 1, none above the one before"),
            )
        })
    }

    /// Adapters; rank is required, the others default to what the official training code uses.
    fn lora(&self) -> Result<Option<Lora>, ModelError> {
        let Some(map) = self.object("lora")? else { return Ok(None) };
        let fields = Fields { prefix: "mor.lora.", map, ..*self };
        fields.refuse_unknown(LORA_FIELDS)?;
        let rank = fields.size("rank", MAX_RANK)?;
        let alpha = fields.positive("alpha", Some(2.0 * rank as f64))?;
        let Some(value) = fields.get("targets") else {
            return Ok(Some(Lora { rank, alpha, targets: vec![LayerTensor::QProj, LayerTensor::VProj] }));
        };
        let all = LayerTensor::PROJECTIONS;
        let names = value.as_array().map_or(&[][..], Vec::as_slice);
        let is_target = |target: &LayerTensor| names.iter().any(|name| name.as_str() == Some(target.name()));
        let targets: Vec<_> = all.into_iter().filter(is_target).collect();
        // As many as were named: none is unknown or named twice.
        if targets.is_empty() || targets.len() != names.len() {
            return Err(fields.value("targets", format!("a list of {}, each once", list(&all, LayerTensor::name))));
        }
        Ok(Some(Lora { rank, alpha, targets }))
    }

    /// Base of the rotary frequencies, from `rope_theta` or the newer `rope_parameters` object.
    fn rope_theta(&self) -> Result<f64, ModelError> {
        if self.get("rope_theta").is_none()
            && let Some(map) = self.object("rope_parameters")?
        {
            return Fields { origin: self.origin, prefix: "rope_parameters.", map }
                .positive("rope_theta", Some(10000.0));
        }
        self.positive("rope_theta", Some(10000.0))
    }

    /// Refuses Llama options whose presence would silently change the result.
    fn refuse_unimplemented(&self) -> Result<(), ModelError> {
        if self.get("hidden_act").is_some_and(|act| act != "silu") {
            return Err(self.value("hidden_act", "silu, the only activation of this model family"));
        }
        for name in ["attention_bias", "mlp_bias"] {
            if self.flag(name, false)? {
                return Err(self.value(name, "false; projections have no bias"));
            }
        }
        if self.flag("rope_interleaved", false)? {
            return Err(self.value("rope_interleaved", "false; rotary pairs are (i, i + head_dim / 2)"));
        }
        for name in ["rope_scaling", "rope_parameters"] {
            let kind = self.object(name)?.map(|map| map.get("rope_type").or_else(|| map.get("type")));
            if kind.is_some_and(|kind| kind.is_none_or(|kind| kind != "default")) {
                return Err(self.value(name, "null or rope_type default; scaled rotary embeddings are not implemented"));
            }
        }
        if self.get("partial_rotary_factor").is_some_and(|factor| factor.as_f64() != Some(1.0)) {
            return Err(self.value("partial_rotary_factor", "1.0; every element of a head is rotated"));
        }
        if self.get("sliding_window").is_some() {
            return Err(self.value("sliding_window", "null; not implemented"));
        }
        Ok(())
    }

    /// `quantization_config`, as Hugging Face calls it; of its many methods there is one here.
    fn quantization(&self) -> Result<Option<Quantization>, ModelError> {
        let Some(map) = self.object("quantization_config")? else { return Ok(None) };
        let fields = Fields { prefix: "quantization_config.", map, ..*self };
        let expected = "mor, what `mor quantize` writes; other quantised formats are not supported";
        match fields.get("quant_method") {
            None => return Err(self.value("quantization_config", format!("one with quant_method {expected}"))),
            Some(method) if method != QUANT_METHOD => return Err(fields.value("quant_method", expected)),
            Some(_) => {}
        }
        if fields.get("group_size").is_some_and(|size| size.as_u64() != Some(GROUP as u64)) {
            return Err(fields.value("group_size", GROUP.to_string()));
        }
        fields.required_name("format", Quantization::ALL, Quantization::as_str).map(Some)
    }
}
