//! Which effective layer stores keys and values where, and whose it attends to.

use crate::{KvStrategy, LayerLayout, Mode, MorConfig};

/// The group of the unshared layers. It keeps its index even when a strategy leaves it empty.
pub const UNSHARED_GROUP: usize = 0;

/// Where each effective layer keeps its keys and values.
///
/// Entries are organised in groups. [`UNSHARED_GROUP`] belongs to the layers outside the shared part, group `1 + r`
/// to recursion `r`. All layers of a group hold the same tokens of a sequence, so a (sequence, group) pair needs one
/// length and one page table. All recursions of a tied layer use one buffer pair; pages tell them apart.
///
/// ```
/// use mor_model::{KvLayout, LayerLayout, MorConfig};
///
/// let config = MorConfig::from_json_str(
///     r#"{
///         "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 5,
///         "num_attention_heads": 4, "rms_norm_eps": 1e-5,
///         "mor": { "mode": "expert", "sharing": "middle_cycle", "num_recursion": 3 }
///     }"#,
///     "example",
/// )?;
/// let kv = KvLayout::new(&config, &LayerLayout::new(&config));
/// assert_eq!(kv.num_groups(), 4);
/// // Three tokens of depth 3, 1 and 2: the later a recursion, the fewer entries it holds.
/// assert_eq!(kv.entries_per_layer(&[3, 1, 2]), [3, 3, 2, 1, 3]);
/// # Ok::<(), mor_model::ModelError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvLayout {
    layers: Vec<LayerKv>,
    num_groups: usize,
    num_buffers: usize,
    groups: Vec<GroupTokens>,
    /// Elements of one key and one value row of one layer together, 2 * G * D.
    elems_per_entry: usize,
}

/// Keys and values of one effective layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerKv {
    /// Index of the K/V buffer pair, one per tied group of layers.
    pub buffer: usize,
    /// Group the layer appends to; `None` when it computes no keys and values.
    pub write_group: Option<usize>,
    /// Group the layer attends to.
    pub read_group: usize,
    /// Group that stands in at positions absent from `read_group` (hybrid, after the first recursion).
    pub fallback_group: Option<usize>,
}

/// Which tokens a group holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupTokens {
    /// Every token of the sequence.
    All,
    /// Tokens whose depth exceeds this recursion index.
    DeeperThan(u32),
    /// None; no layer writes the group.
    Empty,
}

/// Bytes of keys and values one token takes, averaged over tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvBytes {
    /// This model and strategy.
    pub model: f64,
    /// A vanilla model of the same effective depth.
    pub vanilla: f64,
}

impl KvBytes {
    /// Memory relative to the vanilla model.
    pub fn ratio(self) -> f64 {
        self.model / self.vanilla
    }
}

impl KvLayout {
    /// Lays out the caches of a model.
    pub fn new(config: &MorConfig, layout: &LayerLayout) -> Self {
        let num_layers = layout.num_layers();
        // Buffers are numbered by first use, which is the owner's.
        let mut buffer_of_owner = vec![None; num_layers];
        let mut num_buffers = 0;
        let layers = (0..num_layers)
            .map(|l| {
                let buffer = *buffer_of_owner[layout.owner(l)].get_or_insert_with(|| {
                    num_buffers += 1;
                    num_buffers - 1
                });
                let (write_group, read_group, fallback_group) = match (layout.recursion(l), config.kv) {
                    (None, _) => (Some(UNSHARED_GROUP), UNSHARED_GROUP, None),
                    (Some(r), KvStrategy::RecursionWise) => (Some(recursion_group(r)), recursion_group(r), None),
                    (Some(0), _) => (Some(recursion_group(0)), recursion_group(0), None),
                    (Some(_), KvStrategy::Sharing) => (None, recursion_group(0), None),
                    (Some(r), KvStrategy::Hybrid) => {
                        (Some(recursion_group(r)), recursion_group(r), Some(recursion_group(0)))
                    }
                };
                LayerKv { buffer, write_group, read_group, fallback_group }
            })
            .collect::<Vec<_>>();

        let num_groups = match config.mode {
            Mode::Vanilla => 1,
            _ => 1 + config.num_recursions,
        };
        let groups = (0..num_groups)
            .map(|group| {
                if !layers.iter().any(|layer| layer.write_group == Some(group)) {
                    return GroupTokens::Empty;
                }
                match group.checked_sub(1) {
                    None => GroupTokens::All,
                    // Sharing and hybrid run the first recursion for every token, to have its keys and values.
                    Some(0) if config.kv != KvStrategy::RecursionWise => GroupTokens::All,
                    Some(_) if !config.is_routed() => GroupTokens::All,
                    Some(r) => GroupTokens::DeeperThan(r as u32),
                }
            })
            .collect();
        Self { layers, num_groups, num_buffers, groups, elems_per_entry: 2 * config.kv_dim() }
    }

    /// Per effective layer.
    pub fn layers(&self) -> &[LayerKv] {
        &self.layers
    }

    /// Keys and values of effective layer `layer`.
    ///
    /// # Panics
    ///
    /// When the model has no such layer.
    pub fn layer(&self, layer: usize) -> LayerKv {
        self.layers[layer]
    }

    /// Number of groups: 1 for a vanilla model, else 1 + R.
    pub fn num_groups(&self) -> usize {
        self.num_groups
    }

    /// Number of K/V buffer pairs, one per distinct owner layer.
    pub fn num_buffers(&self) -> usize {
        self.num_buffers
    }

    /// Which tokens `group` holds.
    ///
    /// # Panics
    ///
    /// When the model has no such group.
    pub fn group_tokens(&self, group: usize) -> GroupTokens {
        self.groups[group]
    }

    /// Whether a token of this depth has an entry in `group`.
    ///
    /// # Panics
    ///
    /// When the model has no such group.
    pub fn group_holds(&self, group: usize, depth: u32) -> bool {
        match self.groups[group] {
            GroupTokens::All => true,
            GroupTokens::DeeperThan(r) => depth > r,
            GroupTokens::Empty => false,
        }
    }

    /// Entries each effective layer holds after tokens of these depths were fed, whatever their order.
    pub fn entries_per_layer(&self, depths: &[u32]) -> Vec<usize> {
        let per_group: Vec<usize> = (0..self.num_groups)
            .map(|group| depths.iter().filter(|&&depth| self.group_holds(group, depth)).count())
            .collect();
        self.layers.iter().map(|layer| layer.write_group.map_or(0, |group| per_group[group])).collect()
    }

    /// Mean bytes per token when recursion `r` keeps the fraction `fractions[r]` of the tokens.
    ///
    /// Expert choice keeps about its `capacity`; for other models, or after a run, pass the measured fractions. A
    /// missing fraction counts as 1. `elem_bytes` is the size of a cached element (2 for half precision).
    ///
    /// # Source
    ///
    /// Mixture-of-Recursions (arXiv 2507.10524), table 2: for the shared part (R + 1) / 2R recursion-wise and 1 / R
    /// shared.
    pub fn bytes_per_token(&self, fractions: &[f64], elem_bytes: usize) -> KvBytes {
        let entry_bytes = (self.elems_per_entry * elem_bytes) as f64;
        let entries: f64 = self
            .layers
            .iter()
            .filter_map(|layer| layer.write_group)
            .map(|group| match self.groups[group] {
                GroupTokens::All => 1.0,
                GroupTokens::DeeperThan(r) => fractions.get(r as usize).copied().unwrap_or(1.0),
                GroupTokens::Empty => 0.0,
            })
            .sum();
        KvBytes { model: entries * entry_bytes, vanilla: self.layers.len() as f64 * entry_bytes }
    }
}

/// Group of recursion `recursion`.
pub const fn recursion_group(recursion: u32) -> usize {
    1 + recursion as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(num_layers: usize, mor: &str) -> (MorConfig, KvLayout) {
        let text = format!(
            r#"{{ "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": {num_layers},
                "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "mor": {mor} }}"#
        );
        let config = MorConfig::from_json_str(&text, "test").unwrap();
        let kv = KvLayout::new(&config, &LayerLayout::new(&config));
        (config, kv)
    }

    /// (buffer, write group, read group, fallback group) per layer.
    fn table(kv: &KvLayout) -> Vec<(usize, Option<usize>, usize, Option<usize>)> {
        kv.layers().iter().map(|l| (l.buffer, l.write_group, l.read_group, l.fallback_group)).collect()
    }

    const EXPERT: &str = r#"{ "mode": "expert", "sharing": "middle_cycle", "num_recursion": 2, "kv": "KV" }"#;

    #[test]
    fn vanilla_has_one_group() {
        let (_, kv) = layout(2, r#"{ "mode": "vanilla" }"#);
        assert_eq!(table(&kv), [(0, Some(0), 0, None), (1, Some(0), 0, None)]);
        assert_eq!((kv.num_groups(), kv.num_buffers()), (1, 2));
        assert_eq!(kv.entries_per_layer(&[1, 1, 1]), [3, 3]);
        assert_eq!(kv.entries_per_layer(&[]), [0, 0]);
    }

    #[test]
    fn recursion_wise_separates_recursions() {
        let (_, kv) = layout(6, &EXPERT.replace("KV", "recursion_wise"));
        let block = [(1, Some(1), 1, None), (2, Some(1), 1, None), (1, Some(2), 2, None), (2, Some(2), 2, None)];
        assert_eq!(table(&kv)[1..5], block);
        assert_eq!((kv.num_groups(), kv.num_buffers()), (3, 4));
        assert_eq!(kv.entries_per_layer(&[0, 1, 2]), [3, 2, 2, 1, 1, 3]);
    }

    #[test]
    fn sharing_stores_the_first_recursion_for_every_token() {
        let (_, kv) = layout(6, &EXPERT.replace("KV", "sharing"));
        let block = [(1, Some(1), 1, None), (2, Some(1), 1, None), (1, None, 1, None), (2, None, 1, None)];
        assert_eq!(table(&kv)[1..5], block);
        assert_eq!(kv.group_tokens(2), GroupTokens::Empty);
        assert_eq!(kv.entries_per_layer(&[0, 1, 2]), [3, 3, 3, 0, 0, 3]);
    }

    #[test]
    fn hybrid_overlays_its_own_entries() {
        let (_, kv) = layout(6, &EXPERT.replace("KV", "hybrid"));
        assert_eq!(table(&kv)[3..5], [(1, Some(2), 2, Some(1)), (2, Some(2), 2, Some(1))]);
        assert_eq!(kv.entries_per_layer(&[0, 1, 2]), [3, 3, 3, 1, 1, 3]);
    }

    #[test]
    fn sequence_sharing_reads_the_neighbour() {
        let (_, kv) =
            layout(4, r#"{ "mode": "recursive", "sharing": "sequence", "num_recursion": 2, "kv": "sharing" }"#);
        assert_eq!(table(&kv), [(0, Some(1), 1, None), (0, None, 1, None), (1, Some(1), 1, None), (1, None, 1, None)]);
        assert_eq!(kv.group_tokens(UNSHARED_GROUP), GroupTokens::Empty);
        assert_eq!(kv.entries_per_layer(&[2, 2]), [2, 0, 2, 0]);
    }

    #[test]
    fn bytes_follow_the_published_ratios() {
        for r in 2..=4 {
            let mor = r#"{ "mode": "expert", "sharing": "cycle", "num_recursion": R, "kv": "KV" }"#
                .replace('R', &r.to_string());
            let (config, own) = layout(12, &mor.replace("KV", "recursion_wise"));
            let (_, shared) = layout(12, &mor.replace("KV", "sharing"));
            let own = own.bytes_per_token(&config.capacity, 2);
            let shared = shared.bytes_per_token(&config.capacity, 2);
            assert_eq!(own.vanilla, (12 * 2 * config.kv_dim() * 2) as f64);
            assert!((own.ratio() - (r + 1) as f64 / (2 * r) as f64).abs() < 1e-12);
            assert!((shared.ratio() - 1.0 / r as f64).abs() < 1e-12);
        }
    }
}
