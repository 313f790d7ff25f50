//! Model and routing configuration: a Llama `config.json` with an additional `mor` object.

use std::{fmt, path::Path};

use mor_kernels::quantize::GROUP;
use serde::{Serialize, Serializer, ser::SerializeMap};
use serde_json::{Map, Value};

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

/// Declares a closed set of names: the enum, its JSON spelling, `Display` and `ALL`.
macro_rules! names {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vmeta])* $variant,)+ }

        impl $name {
            /// Every value, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Name in configuration files.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}
pub(crate) use names;

names! {
    /// How tokens use the shared block.
    Mode {
        /// An ordinary transformer: no shared layers.
        Vanilla = "vanilla",
        /// Every token takes all recursions.
        Recursive = "recursive",
        /// Expert choice: each recursion selects its tokens.
        Expert = "expert",
        /// Token choice: each token selects its depth once.
        Token = "token",
    }
}

names! {
    /// Which effective layers hold the same tensors.
    SharingStrategy {
        /// No layer is shared.
        None = "none",
        /// The whole stack repeats: 0 1 0 1 0 1.
        Cycle = "cycle",
        /// Each layer repeats in place: 0 0 0 1 1 1.
        Sequence = "sequence",
        /// As `cycle` between an unshared first and last layer.
        MiddleCycle = "middle_cycle",
        /// As `sequence` between an unshared first and last layer.
        MiddleSequence = "middle_sequence",
    }
}

impl SharingStrategy {
    /// Whether the first and last layer are unshared.
    pub const fn is_middle(self) -> bool {
        matches!(self, Self::MiddleCycle | Self::MiddleSequence)
    }

    /// Whether one recursion is a contiguous run of layers, which is what routing needs.
    pub const fn is_cycle(self) -> bool {
        matches!(self, Self::Cycle | Self::MiddleCycle)
    }
}

names! {
    /// Which recursions store keys and values, and whose they attend to.
    KvStrategy {
        /// Each recursion stores and reads its own.
        RecursionWise = "recursion_wise",
        /// The first recursion stores for all tokens; later ones read that.
        Sharing = "sharing",
        /// As `sharing`, but later recursions overlay their own entries.
        Hybrid = "hybrid",
    }
}

names! {
    /// Router network.
    RouterType {
        /// One matrix.
        Linear = "linear",
        /// Two matrices with an exact GELU between them, twice as wide as the hidden size inside.
        Mlp = "mlp",
        /// The same network as `mlp`; the name is kept because checkpoints use it.
        WideMlp = "wide_mlp",
    }
}

names! {
    /// Function from router logit to gate.
    RouterFunc {
        /// Logistic function.
        Sigmoid = "sigmoid",
        /// Hyperbolic tangent (expert choice).
        Tanh = "tanh",
        /// Softmax over the depths (token choice).
        Softmax = "softmax",
        /// Identity, without `alpha` (expert choice); JSON `null`.
        None = "null",
    }
}

names! {
    /// How a block's output enters the residual stream.
    Gating {
        /// Multiplied by the gate.
        Weighted = "weighted",
        /// Added as it is.
        Additive = "additive",
    }
}

names! {
    /// What trained the inference decision of expert choice.
    Sampling {
        /// The router's own logit decides.
        AuxLoss = "aux_loss",
        /// A second router (`mlp_router`) decides; the gate still comes from the first.
        AuxRouter = "aux_router",
        /// Nothing did; JSON `null`.
        None = "null",
    }
}

names! {
    /// How token choice was balanced in training.
    Balancing {
        /// By a loss term.
        Loss = "loss",
        /// By a bias that enters the choice but not the gate.
        LossFree = "loss_free",
        /// Not at all; JSON `null`.
        None = "null",
    }
}

names! {
    /// How the matrices of a model are stored as small integers; see [`mor_kernels::quantize`].
    ///
    /// Projections take this form. Embedding and head are q8 in both, since 4 bits cost more there than anywhere else;
    /// norms, routers and biases keep their type.
    Quantization {
        /// 8-bit integers, groups of 32 with a scale.
        Q8 = "q8",
        /// 4-bit integers, groups of 32 with a scale and an offset.
        Q4 = "q4",
    }
}

impl Quantization {
    /// The value of `quantization_config` in the `config.json` of a checkpoint in this form.
    pub fn to_json(self) -> Value {
        serde_json::json!({ "quant_method": QUANT_METHOD, "format": self.as_str(), "group_size": GROUP })
    }
}

/// `quant_method` of the configuration of a quantised model.
const QUANT_METHOD: &str = "mor";

/// Adapters of the shared layers' projections: `y = W x + alpha / rank * B (A x)`, where layers tied in W have an A
/// `[rank, in]` and a B `[out, rank]` each.
///
/// # Source
///
/// LoRA (arXiv 2106.09685); relaxed recursive transformers (arXiv 2410.20672).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Lora {
    /// Rank of every `B A`.
    pub rank: usize,
    /// Numerator of the factor.
    pub alpha: f64,
    /// The projections that have an adapter, in the order of [`LayerTensor::PROJECTIONS`].
    pub targets: Vec<LayerTensor>,
}

impl Lora {
    /// What `B (A x)` is multiplied by.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }
}

/// A validated model configuration.
///
/// Every value that reaches this type satisfies the rules listed at [`MorConfig::from_json_str`], so the rest of the
/// crate computes with it without checking again. Fields are public for reading; to change one, edit the JSON and
/// parse it again, or use [`MorConfig::with_kv`].
///
/// ```
/// use mor_model::{KvStrategy, Mode, MorConfig};
///
/// let config = MorConfig::from_json_str(
///     r#"{
///         "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 8,
///         "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
///         "mor": { "mode": "expert", "sharing": "middle_cycle", "num_recursion": 3 }
///     }"#,
///     "example",
/// )?;
/// assert_eq!(config.mode, Mode::Expert);
/// assert_eq!(config.capacity, [1.0, 2.0 / 3.0, 1.0 / 3.0]);
/// assert_eq!(config.with_kv(KvStrategy::Sharing)?.kv, KvStrategy::Sharing);
/// # Ok::<(), mor_model::ModelError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct MorConfig {
    /// Vocabulary size V.
    pub vocab_size: usize,
    /// Width of the residual stream C; a multiple of 8.
    pub hidden_size: usize,
    /// Width of the MLP, any positive number.
    pub intermediate_size: usize,
    /// Effective (unrolled) depth.
    pub num_hidden_layers: usize,
    /// Query heads H.
    pub num_attention_heads: usize,
    /// Key-value heads G; divides H.
    pub num_key_value_heads: usize,
    /// Head size D; even.
    pub head_dim: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Longest sequence the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Whether `lm_head` is the embedding. A differing `lm_head` in the file wins over this field.
    pub tie_word_embeddings: bool,
    /// Start token, when the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation; see [`MorConfig::eos_token_ids`].
    pub eos_token_id: Vec<u32>,
    /// How the checkpoint's matrices are quantised, if they are.
    pub quantization: Option<Quantization>,
    /// How tokens use the shared block.
    pub mode: Mode,
    /// Which layers are shared.
    pub sharing: SharingStrategy,
    /// Recursions R; 1 for vanilla.
    pub num_recursions: usize,
    /// Key-value strategy.
    pub kv: KvStrategy,
    /// Adapters of the shared layers, if they have any.
    pub lora: Option<Lora>,
    /// Whether the output of each recursion's block is multiplied, element by element, by a vector of the recursion.
    pub recursion_encoding: bool,
    /// Router network.
    pub router_type: RouterType,
    /// Logit to gate.
    pub router_func: RouterFunc,
    /// Gate scale.
    pub alpha: f64,
    /// Divisor of the router's input.
    pub temp: f64,
    /// How a block's output is added.
    pub gating: Gating,
    /// Expert choice: fraction of the tokens that recursion r keeps, R entries, non-increasing.
    pub capacity: Vec<f64>,
    /// Expert choice: what decides at inference.
    pub sampling: Sampling,
    /// Training: weight of the sampling loss.
    pub sampling_coeff: f64,
    /// Training: steps of capacity warm-up.
    pub cap_warmup_step: u64,
    /// Token choice: how it was balanced.
    pub balancing: Balancing,
    /// Training: weight of the balancing loss.
    pub balancing_coeff: f64,
    /// Training: steps before balancing.
    pub bal_warmup_step: u64,
    /// Training: step of the loss-free bias.
    pub bias_update_rate: f64,
    /// Training: whether the router z-loss was on.
    pub z_loss: bool,
    /// Training: its weight.
    pub z_coeff: f64,
    /// Whether the routers still have the values they started from, so that depths mean nothing yet.
    pub untrained_router: bool,
}

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
    fn check_combinations(&self, origin: &str) -> Result<(), ModelError> {
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

    /// The same model with another key-value strategy.
    ///
    /// # Errors
    ///
    /// [`ModelError::ConfigConflict`] when the mode has no such strategy.
    pub fn with_kv(&self, kv: KvStrategy) -> Result<Self, ModelError> {
        let config = Self { kv, ..self.clone() };
        config.check_combinations("key-value override")?;
        Ok(config)
    }

    /// Width of the query projection, H * D.
    pub const fn q_dim(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of the key and of the value projection, G * D.
    pub const fn kv_dim(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Multiplications that the projections of a layer take for a row.
    pub const fn layer_products(&self) -> usize {
        self.hidden_size * (2 * (self.q_dim() + self.kv_dim()) + 3 * self.intermediate_size)
    }

    /// Tokens that end a generation; empty when the model has none.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_id
    }

    /// Whether depth is decided per token.
    pub const fn is_routed(&self) -> bool {
        matches!(self.mode, Mode::Expert | Mode::Token)
    }

    /// Whether a second router decides at inference (expert choice with `sampling = aux_router`).
    pub fn has_aux_router(&self) -> bool {
        self.mode == Mode::Expert && self.sampling == Sampling::AuxRouter
    }

    /// Number of logits a router has per token: 1 for expert choice, R for token choice, 0 without router.
    pub const fn router_outputs(&self) -> usize {
        match self.mode {
            Mode::Expert => 1,
            Mode::Token => self.num_recursions,
            Mode::Vanilla | Mode::Recursive => 0,
        }
    }

    /// Writes the configuration as a `config.json` that [`MorConfig::from_json_str`] reads back unchanged.
    pub fn to_json(&self) -> String {
        // Serialising strings and finite numbers into memory cannot fail.
        serde_json::to_string_pretty(self).unwrap_or_default()
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

impl Serialize for MorConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let name = |text: &str| {
            if text == "null" { Value::Null } else { Value::from(text) }
        };
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("model_type", "mor")?;
        map.serialize_entry("hidden_act", "silu")?;
        map.serialize_entry("vocab_size", &self.vocab_size)?;
        map.serialize_entry("hidden_size", &self.hidden_size)?;
        map.serialize_entry("intermediate_size", &self.intermediate_size)?;
        map.serialize_entry("num_hidden_layers", &self.num_hidden_layers)?;
        map.serialize_entry("num_attention_heads", &self.num_attention_heads)?;
        map.serialize_entry("num_key_value_heads", &self.num_key_value_heads)?;
        map.serialize_entry("head_dim", &self.head_dim)?;
        map.serialize_entry("rms_norm_eps", &self.rms_norm_eps)?;
        map.serialize_entry("rope_theta", &self.rope_theta)?;
        map.serialize_entry("max_position_embeddings", &self.max_position_embeddings)?;
        map.serialize_entry("tie_word_embeddings", &self.tie_word_embeddings)?;
        map.serialize_entry("bos_token_id", &self.bos_token_id)?;
        map.serialize_entry("eos_token_id", &self.eos_token_id)?;
        if let Some(quantization) = self.quantization {
            map.serialize_entry("quantization_config", &quantization.to_json())?;
        }
        let mut mor = serde_json::json!({
            "mode": self.mode.as_str(),
            "sharing": self.sharing.as_str(),
            "num_recursion": self.num_recursions,
            "kv": self.kv.as_str(),
            "router_type": self.router_type.as_str(),
            "router_func": name(self.router_func.as_str()),
            "alpha": self.alpha,
            "temp": self.temp,
            "gating": self.gating.as_str(),
            "capacity": self.capacity,
            "sampling": name(self.sampling.as_str()),
            "sampling_coeff": self.sampling_coeff,
            "cap_warmup_step": self.cap_warmup_step,
            "balancing": name(self.balancing.as_str()),
            "balancing_coeff": self.balancing_coeff,
            "bal_warmup_step": self.bal_warmup_step,
            "bias_update_rate": self.bias_update_rate,
            "z_loss": self.z_loss,
            "z_coeff": self.z_coeff,
        });
        if let Some(lora) = &self.lora {
            let targets: Vec<_> = lora.targets.iter().map(|target| target.name()).collect();
            mor["lora"] = serde_json::json!({ "rank": lora.rank, "alpha": lora.alpha, "targets": targets });
        }
        if self.recursion_encoding {
            mor["recursion_encoding"] = Value::Bool(true);
        }
        if self.untrained_router {
            mor["untrained_router"] = Value::Bool(true);
        }
        map.serialize_entry("mor", &mor)?;
        map.end()
    }
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
