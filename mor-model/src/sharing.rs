//! Which effective layers hold the same tensors, and what they are called in a checkpoint.

use crate::{Mode, MorConfig, SharingStrategy};

/// The map from effective layers to tied groups, recursions and checkpoint names.
///
/// Layers are counted in the unrolled model, 0 to `num_hidden_layers`. For `middle_cycle` with eight layers and three
/// recursions the owners are 0, 1 2 1 2 1 2, 7.
///
/// # Source
///
/// Mixture-of-Recursions (arXiv 2507.10524), parameter-sharing strategies.
///
/// ```
/// use mor_model::{LayerLayout, MorConfig};
///
/// let config = MorConfig::from_json_str(
///     r#"{
///         "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 8,
///         "num_attention_heads": 4, "rms_norm_eps": 1e-5,
///         "mor": { "mode": "expert", "sharing": "middle_cycle", "num_recursion": 3 }
///     }"#,
///     "example",
/// )?;
/// let layout = LayerLayout::new(&config);
/// assert_eq!(layout.block_layers(1), [3, 4]);
/// assert_eq!(layout.owner(4), 2);
/// assert_eq!(layout.prefix(4), "model.layers.2.block.1");
/// # Ok::<(), mor_model::ModelError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerLayout {
    layers: Vec<EffectiveLayer>,
    base_depth: usize,
    num_recursions: usize,
    mode: Mode,
    sharing: SharingStrategy,
}

/// One layer of the unrolled model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EffectiveLayer {
    /// First effective layer that holds the same tensors; the layer itself when it is that one.
    pub owner: usize,
    /// Recursion the layer belongs to, `None` outside the shared part.
    pub recursion: Option<u32>,
    /// Prefix of its tensor names, without the final dot.
    pub prefix: String,
    /// Whether its output is multiplied by the encoding of its recursion: the last layer of a block may be, and of the
    /// sequence strategies every shared layer.
    pub is_encoded: bool,
}

impl LayerLayout {
    /// Lays out the layers of a validated configuration.
    pub fn new(config: &MorConfig) -> Self {
        let middle = config.sharing.is_middle();
        let num_layers = config.num_hidden_layers;
        let num_recursions = config.num_recursions;
        let first_shared = usize::from(middle);
        let base_depth = (num_layers - 2 * first_shared) / num_recursions;
        let layers = (0..num_layers)
            .map(|l| {
                let unshared = config.sharing == SharingStrategy::None || (middle && (l == 0 || l == num_layers - 1));
                if unshared {
                    let prefix = unshared_prefix(config, l);
                    return EffectiveLayer { owner: l, recursion: None, prefix, is_encoded: false };
                }
                let m = l - first_shared;
                let (r, owner) = if config.sharing.is_cycle() {
                    (m / base_depth, m % base_depth)
                } else {
                    (m % num_recursions, m / num_recursions * num_recursions)
                };
                let ends_block = !config.sharing.is_cycle() || m % base_depth == base_depth - 1;
                let is_encoded = config.recursion_encoding && ends_block;
                let prefix = shared_prefix(config, l, r, m % base_depth);
                EffectiveLayer {
                    owner: first_shared + owner,
                    recursion: Some(r as u32),
                    // A module of its own holds the encoding and, as `block`, the layer.
                    prefix: if is_encoded { format!("{prefix}.block") } else { prefix },
                    is_encoded,
                }
            })
            .collect();
        Self { layers, base_depth, num_recursions, mode: config.mode, sharing: config.sharing }
    }

    /// Effective depth.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Recursions R; 1 for a vanilla model.
    pub fn num_recursions(&self) -> usize {
        self.num_recursions
    }

    /// Layers per recursion; the whole depth for a vanilla model.
    pub fn base_depth(&self) -> usize {
        self.base_depth
    }

    /// All effective layers in order.
    pub fn layers(&self) -> &[EffectiveLayer] {
        &self.layers
    }

    /// First layer tied to `layer`.
    ///
    /// # Panics
    ///
    /// When `layer` is not below [`LayerLayout::num_layers`], as for the other per-layer methods.
    pub fn owner(&self, layer: usize) -> usize {
        self.layers[layer].owner
    }

    /// Recursion of `layer`, `None` outside the shared part.
    pub fn recursion(&self, layer: usize) -> Option<u32> {
        self.layers[layer].recursion
    }

    /// Prefix of the tensor names of `layer`.
    pub fn prefix(&self, layer: usize) -> &str {
        &self.layers[layer].prefix
    }

    /// Name of the encoding that multiplies the output of `layer`, if one does.
    pub fn encoding_name(&self, layer: usize) -> Option<String> {
        let prefix = self.layers[layer].is_encoded.then(|| self.prefix(layer).strip_suffix(".block"))??;
        Some(format!("{prefix}.recursion_encoding"))
    }

    /// Effective layers of recursion `recursion` in running order; empty for a vanilla model.
    ///
    /// Contiguous for the cycle strategies, with a stride of R for the sequence strategies.
    pub fn block_layers(&self, recursion: u32) -> Vec<usize> {
        (0..self.num_layers()).filter(|&l| self.recursion(l) == Some(recursion)).collect()
    }

    /// Layers outside the shared part: all of a vanilla model, first and last of the middle strategies, else none.
    pub fn unshared_layers(&self) -> Vec<usize> {
        (0..self.num_layers()).filter(|&l| self.recursion(l).is_none()).collect()
    }

    /// Whether all recursions run one contiguous block, so that rows at different depths can share a pass.
    pub fn has_contiguous_block(&self) -> bool {
        self.sharing.is_cycle()
    }

    /// Prefix of the router tensors of `recursion`, without the final dot; token choice has one router for all.
    pub fn router_prefix(&self, recursion: u32) -> String {
        let middle = self.sharing.is_middle();
        match (self.mode, middle) {
            (Mode::Token, true) => "model.layers.1".to_owned(),
            (Mode::Token, false) => "model.layers".to_owned(),
            _ => format!("model.layers.{}", recursion as usize + usize::from(middle)),
        }
    }
}

fn unshared_prefix(config: &MorConfig, layer: usize) -> String {
    // Routed checkpoints count modules, not layers: the last layer follows one module per recursion, or one in all.
    let index = match config.mode {
        _ if layer == 0 => 0,
        Mode::Expert => config.num_recursions + 1,
        Mode::Token => 2,
        Mode::Vanilla | Mode::Recursive => layer,
    };
    format!("model.layers.{index}")
}

fn shared_prefix(config: &MorConfig, layer: usize, r: usize, j: usize) -> String {
    match (config.mode, config.sharing.is_middle()) {
        (Mode::Expert, middle) => format!("model.layers.{}.block.{j}", r + usize::from(middle)),
        (Mode::Token, true) => format!("model.layers.1.block_list.{r}.{j}"),
        (Mode::Token, false) => format!("model.layers.block_list.{r}.{j}"),
        (Mode::Vanilla | Mode::Recursive, _) => format!("model.layers.{layer}"),
    }
}
