//! What the tensors of a model are called, which shape they have, and which are tied.

use super::{Checkpoint, Dtype};
use crate::{Balancing, LayerLayout, Mode, MorConfig, Quantization, RouterType};

/// One of the nine tensors of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerTensor {
    /// Query projection `[H * D, C]`.
    QProj,
    /// Key projection `[G * D, C]`.
    KProj,
    /// Value projection `[G * D, C]`.
    VProj,
    /// Output projection `[C, H * D]`.
    OProj,
    /// MLP gate `[I, C]`.
    GateProj,
    /// MLP up `[I, C]`.
    UpProj,
    /// MLP down `[C, I]`.
    DownProj,
    /// Norm before attention `[C]`.
    InputLayernorm,
    /// Norm before the MLP `[C]`.
    PostAttentionLayernorm,
}

impl LayerTensor {
    /// All nine, in the order of the checkpoint documentation.
    pub const ALL: [Self; 9] = [
        Self::QProj,
        Self::KProj,
        Self::VProj,
        Self::OProj,
        Self::GateProj,
        Self::UpProj,
        Self::DownProj,
        Self::InputLayernorm,
        Self::PostAttentionLayernorm,
    ];

    /// The matrices among them, which can have adapters.
    pub const PROJECTIONS: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// Its own name, `q_proj` say.
    pub const fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
            Self::InputLayernorm => "input_layernorm",
            Self::PostAttentionLayernorm => "post_attention_layernorm",
        }
    }

    /// Name after the layer's prefix.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::QProj => "self_attn.q_proj.weight",
            Self::KProj => "self_attn.k_proj.weight",
            Self::VProj => "self_attn.v_proj.weight",
            Self::OProj => "self_attn.o_proj.weight",
            Self::GateProj => "mlp.gate_proj.weight",
            Self::UpProj => "mlp.up_proj.weight",
            Self::DownProj => "mlp.down_proj.weight",
            Self::InputLayernorm => "input_layernorm.weight",
            Self::PostAttentionLayernorm => "post_attention_layernorm.weight",
        }
    }

    /// The type a model quantised as `quantization` stores the tensor in, `None` for that of its file.
    fn quantized_dtype(self, quantization: Quantization, config: &MorConfig) -> Option<Dtype> {
        match self {
            Self::InputLayernorm | Self::PostAttentionLayernorm => None,
            // Devices pad heads to whole units of 8, which would shift the groups.
            Self::OProj if !config.head_dim.is_multiple_of(8) => None,
            _ => Some(match quantization {
                Quantization::Q8 => Dtype::Q8,
                Quantization::Q4 => Dtype::Q4,
            }),
        }
    }

    /// Shape, `[out, in]` for projections.
    pub fn shape(self, config: &MorConfig) -> Vec<usize> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        match self {
            Self::QProj => vec![config.q_dim(), hidden],
            Self::KProj | Self::VProj => vec![config.kv_dim(), hidden],
            Self::OProj => vec![hidden, config.q_dim()],
            Self::GateProj | Self::UpProj => vec![inner, hidden],
            Self::DownProj => vec![hidden, inner],
            Self::InputLayernorm | Self::PostAttentionLayernorm => vec![hidden],
        }
    }
}

/// What a tensor is, independent of its name in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TensorName {
    /// Token embeddings `[V, C]`.
    EmbedTokens,
    /// A tensor of an effective layer.
    Layer {
        /// Effective layer.
        layer: usize,
        /// Which of the nine.
        tensor: LayerTensor,
    },
    /// First factor of an adapter `[rank, in]`.
    LoraA {
        /// Effective layer.
        layer: usize,
        /// The projection it adapts.
        tensor: LayerTensor,
    },
    /// Second factor of an adapter `[out, rank]`.
    LoraB {
        /// Effective layer.
        layer: usize,
        /// The projection it adapts.
        tensor: LayerTensor,
    },
    /// What the output of a recursion's last layer is multiplied by `[C]`.
    RecursionEncoding {
        /// Effective layer.
        layer: usize,
    },
    /// A router matrix; token choice has recursion 0 only.
    Router {
        /// Recursion.
        recursion: u32,
        /// 0, or 1 for the second matrix of an MLP router.
        index: usize,
    },
    /// A matrix of the auxiliary router.
    AuxRouter {
        /// Recursion.
        recursion: u32,
        /// 0, or 1 for the second matrix of an MLP router.
        index: usize,
    },
    /// Bias `[R]` of loss-free balancing.
    RouterBias,
    /// Final norm `[C]`.
    Norm,
    /// Output head `[V, C]`.
    LmHead,
}

impl TensorName {
    /// As [`LayerTensor::quantized_dtype`].
    pub(super) fn quantized_dtype(self, quantization: Quantization, config: &MorConfig) -> Option<Dtype> {
        match self {
            Self::Layer { tensor, .. } => tensor.quantized_dtype(quantization, config),
            Self::EmbedTokens | Self::LmHead => Some(Dtype::Q8),
            Self::LoraA { .. } | Self::LoraB { .. } | Self::RecursionEncoding { .. } => None,
            Self::Router { .. } | Self::AuxRouter { .. } | Self::RouterBias | Self::Norm => None,
        }
    }
}

/// A tensor the configuration asks for.
pub(super) struct Expected {
    pub(super) key: TensorName,
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
}

/// The one table of tensor names: everything a complete checkpoint of this model holds, owners before their copies.
pub(super) fn expected_tensors(config: &MorConfig, layout: &LayerLayout) -> Vec<Expected> {
    let hidden = config.hidden_size;
    let mut table = Vec::new();
    let mut push = |key, name: String, shape: Vec<usize>| table.push(Expected { key, name, shape });

    push(TensorName::EmbedTokens, "model.embed_tokens.weight".to_owned(), vec![config.vocab_size, hidden]);
    for layer in 0..layout.num_layers() {
        let lora = config.lora.as_ref().filter(|_| layout.recursion(layer).is_some());
        for tensor in LayerTensor::ALL {
            let (name, shape) = (format!("{}.{}", layout.prefix(layer), tensor.suffix()), tensor.shape(config));
            let Some(lora) = lora.filter(|lora| lora.targets.contains(&tensor)) else {
                push(TensorName::Layer { layer, tensor }, name, shape);
                continue;
            };
            // A module of its own holds the factors and, as `base_layer`, the projection.
            let module = name.trim_end_matches("weight");
            push(TensorName::Layer { layer, tensor }, format!("{module}base_layer.weight"), shape.clone());
            let (a, b) = (format!("{module}lora_A.default.weight"), format!("{module}lora_B.default.weight"));
            push(TensorName::LoraA { layer, tensor }, a, vec![lora.rank, shape[1]]);
            push(TensorName::LoraB { layer, tensor }, b, vec![shape[0], lora.rank]);
        }
        if let Some(name) = layout.encoding_name(layer) {
            push(TensorName::RecursionEncoding { layer }, name, vec![hidden]);
        }
    }

    let outputs = config.router_outputs();
    let matrices: &[(&str, [usize; 2])] = match config.router_type {
        RouterType::Linear => &[("router.weight", [outputs, hidden])],
        RouterType::Mlp | RouterType::WideMlp => {
            &[("router.0.weight", [2 * hidden, hidden]), ("router.2.weight", [outputs, 2 * hidden])]
        }
    };
    for recursion in 0..num_routers(config) {
        let prefix = layout.router_prefix(recursion);
        for (index, (name, shape)) in matrices.iter().enumerate() {
            push(TensorName::Router { recursion, index }, format!("{prefix}.mor_router.{name}"), shape.to_vec());
            if config.has_aux_router() {
                push(TensorName::AuxRouter { recursion, index }, format!("{prefix}.mlp_router.{name}"), shape.to_vec());
            }
        }
    }
    if config.mode == Mode::Token && config.balancing == Balancing::LossFree {
        push(TensorName::RouterBias, format!("{}.router_bias", layout.router_prefix(0)), vec![outputs]);
    }

    push(TensorName::Norm, "model.norm.weight".to_owned(), vec![hidden]);
    push(TensorName::LmHead, "lm_head.weight".to_owned(), vec![config.vocab_size, hidden]);
    table
}

/// A name that a complete file of a checkpoint has.
pub(crate) struct ExpectedName {
    pub(crate) name: String,
    /// The first tensor of its tied group, and whether this one is the same.
    pub(crate) first: Option<(String, bool)>,
}

/// All names of a complete file of this checkpoint.
pub(crate) fn expected_names(checkpoint: &Checkpoint) -> Vec<ExpectedName> {
    let (config, layout) = (checkpoint.config(), checkpoint.layout());
    let describe = |expected: Expected| {
        let is_tied_head = expected.key == TensorName::LmHead && checkpoint.lm_head() == checkpoint.embed_tokens();
        let owner = tied_to(&expected.key, layout, config.tie_word_embeddings)
            .or(is_tied_head.then_some(TensorName::EmbedTokens))
            .and_then(|owner| checkpoint.id(owner));
        let first = owner.map(|id| (checkpoint.name(id).to_owned(), checkpoint.id(expected.key) == Some(id)));
        ExpectedName { name: expected.name, first }
    };
    expected_tensors(config, layout).into_iter().map(describe).collect()
}

fn num_routers(config: &MorConfig) -> u32 {
    match config.mode {
        Mode::Expert => config.num_recursions as u32,
        Mode::Token => 1,
        Mode::Vanilla | Mode::Recursive => 0,
    }
}

/// The name whose tensor `key` holds when it is tied and not written itself.
pub(super) fn tied_to(key: &TensorName, layout: &LayerLayout, tie_word_embeddings: bool) -> Option<TensorName> {
    match *key {
        TensorName::Layer { layer, tensor } if layout.owner(layer) != layer => {
            Some(TensorName::Layer { layer: layout.owner(layer), tensor })
        }
        TensorName::LmHead if tie_word_embeddings => Some(TensorName::EmbedTokens),
        _ => None,
    }
}

/// Buffers older Llama exports contain although they are derived from the configuration.
pub(super) fn is_derived_buffer(name: &str) -> bool {
    ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"].iter().any(|end| name.ends_with(end))
}
