//! Model and routing configuration: a Llama `config.json` with an additional `mor` object.

mod reading;

use mor_kernels::quantize::GROUP;
use serde::{Serialize, Serializer, ser::SerializeMap};
use serde_json::Value;

use crate::{LayerTensor, ModelError};

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

impl MorConfig {
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
