//! Recursive starts: which layers of a vanilla model become which layers of the shared block.

use serde_json::{Map, Value};

use super::{LayerSource, fields_of};
use crate::config::names;
use crate::fields::Fields;
use crate::{Checkpoint, LayerLayout, LayerTensor, Mode, ModelError, MorConfig, SharingStrategy};

names! {
    /// Which layers of the vanilla model the shared layers start from.
    Init {
        /// Layers at equal steps from the first shared one to the last.
        Stepwise = "stepwise",
        /// The first ones.
        Lower = "lower",
        /// The last ones.
        Upper = "upper",
        /// The mean of all layers that a shared layer stands for.
        Average = "average",
    }
}

/// How a vanilla checkpoint becomes the start of a recursive one, to be trained further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Which layers are tied; `None` leaves the model as it is.
    pub sharing: SharingStrategy,
    /// Recursions R.
    pub num_recursions: usize,
    /// Recursive, expert or token; `None` is expert choice where the sharing allows routing, else recursive.
    pub mode: Option<Mode>,
    /// Which layers the tied ones start from.
    pub init: Init,
    /// Rank of adapters that give back to each layer of the block what tying takes from it, as far as they can; `None`
    /// leaves them out.
    pub lora_rank: Option<usize>,
    /// Seed of the routers, which are normal with the standard deviation `initializer_range` of the configuration.
    pub seed: u64,
}

/// Standard deviation of new weights where a configuration names none, as transformers has it.
const DEFAULT_RANGE: f64 = 0.02;

impl Start {
    /// Makes the start and says what its layers were made of; `base` is the model's `config.json` and `origin` its folder.
    pub(super) fn apply(
        &self,
        checkpoint: Checkpoint,
        base: &Map<String, Value>,
        origin: &str,
    ) -> Result<(Checkpoint, Vec<LayerSource>), ModelError> {
        let found = checkpoint.config();
        if found.mode != Mode::Vanilla {
            let problem = format!(
                "is of mode {} with {} sharing, expected a vanilla model; only that can become a recursive start",
                found.mode, found.sharing
            );
            return Err(ModelError::Convert { origin: origin.to_owned(), problem });
        }
        if self.sharing == SharingStrategy::None && self.mode.is_none_or(|mode| mode == Mode::Vanilla) {
            return Ok((checkpoint, Vec::new()));
        }
        let config = self.config(found, origin)?;
        let layout = LayerLayout::new(&config);
        let sources = sources(&layout, config.sharing, self.init);
        let report = (0..layout.num_layers())
            .filter(|&layer| layout.owner(layer) == layer)
            .map(|layer| LayerSource { layer, sources: sources[layer].clone() })
            .collect();
        let router_std = Fields { origin, prefix: "", map: base }.positive("initializer_range", Some(DEFAULT_RANGE))?;
        Ok((checkpoint.recombine(config, &sources, router_std, self.seed), report))
    }

    fn config(&self, vanilla: &MorConfig, origin: &str) -> Result<MorConfig, ModelError> {
        let default = if self.sharing.is_cycle() { Mode::Expert } else { Mode::Recursive };
        let mode = self.mode.unwrap_or(default);
        let mut mor = serde_json::json!({
            "mode": mode.as_str(), "sharing": self.sharing.as_str(), "num_recursion": self.num_recursions,
        });
        if matches!(mode, Mode::Expert | Mode::Token) {
            mor["untrained_router"] = Value::Bool(true);
        }
        if let Some(rank) = self.lora_rank {
            let targets = LayerTensor::PROJECTIONS.map(LayerTensor::name);
            // With alpha as the rank the product counts as it is.
            mor["lora"] = serde_json::json!({ "rank": rank, "alpha": rank, "targets": targets });
        }
        let mut fields = fields_of(vanilla);
        fields.insert("mor".to_owned(), mor);
        MorConfig::from_json_str(&Value::Object(fields).to_string(), origin)
    }
}

/// Per layer, the layers of the vanilla model that it is made of; empty for copies of an earlier one.
///
/// # Source
///
/// The initialisations of the official training code, in which `stepwise` rounds as Python does: halves to even.
fn sources(layout: &LayerLayout, sharing: SharingStrategy, init: Init) -> Vec<Vec<usize>> {
    let num_layers = layout.num_layers();
    let unshared = usize::from(sharing.is_middle());
    let (first, last) = (unshared, num_layers - 1 - unshared);
    let base_depth = layout.base_depth();
    // Position in the block of the next owner.
    let mut position = 0;
    (0..num_layers)
        .map(|layer| {
            if layout.owner(layer) != layer {
                return Vec::new();
            }
            if layout.recursion(layer).is_none() {
                return vec![layer];
            }
            let at = position;
            position += 1;
            match init {
                Init::Lower => vec![first + at],
                Init::Upper => vec![last + 1 - base_depth + at],
                Init::Stepwise if base_depth == 1 => vec![first],
                Init::Stepwise => {
                    let step = (last - first) as f64 / (base_depth - 1) as f64;
                    vec![(first as f64 + at as f64 * step).round_ties_even() as usize]
                }
                Init::Average => (0..num_layers).filter(|&l| layout.owner(l) == layer).collect(),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owners(num_layers: usize, sharing: SharingStrategy, num_recursions: usize, init: Init) -> Vec<Vec<usize>> {
        let vanilla = serde_json::json!({
            "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": num_layers,
            "num_attention_heads": 4, "rms_norm_eps": 1e-5,
        });
        let vanilla = MorConfig::from_json_str(&vanilla.to_string(), "test").unwrap();
        let start = Start { sharing, num_recursions, mode: Some(Mode::Recursive), init, lora_rank: None, seed: 0 };
        let layout = LayerLayout::new(&start.config(&vanilla, "test").unwrap());
        sources(&layout, sharing, init).into_iter().filter(|sources| !sources.is_empty()).collect()
    }

    /// As the comments of the official code and its formulas have it, by hand.
    #[test]
    fn layers_start_from_the_layers_that_the_rule_names() {
        use Init::{Average, Lower, Stepwise, Upper};
        use SharingStrategy::{Cycle, MiddleCycle, MiddleSequence, Sequence};
        let one = |layers: &[usize]| layers.iter().map(|&layer| vec![layer]).collect::<Vec<_>>();

        assert_eq!(owners(6, Cycle, 3, Stepwise), one(&[0, 5]));
        assert_eq!(owners(6, Cycle, 3, Lower), one(&[0, 1]));
        assert_eq!(owners(6, Cycle, 3, Upper), one(&[4, 5]));
        assert_eq!(owners(6, Cycle, 3, Average), [[0, 2, 4], [1, 3, 5]]);
        assert_eq!(owners(6, Sequence, 3, Stepwise), one(&[0, 5]));
        assert_eq!(owners(6, Sequence, 3, Average), [[0, 1, 2], [3, 4, 5]]);

        // The first and the last layer stay; 1, 3.5 and 6 round to 1, 4 and 6.
        assert_eq!(owners(8, MiddleCycle, 2, Stepwise), one(&[0, 1, 4, 6, 7]));
        assert_eq!(owners(8, MiddleCycle, 2, Lower), one(&[0, 1, 2, 3, 7]));
        assert_eq!(owners(8, MiddleCycle, 2, Upper), one(&[0, 4, 5, 6, 7]));
        assert_eq!(owners(8, MiddleCycle, 3, Average), [vec![0], vec![1, 3, 5], vec![2, 4, 6], vec![7]]);
        assert_eq!(owners(8, MiddleSequence, 3, Average), [vec![0], vec![1, 2, 3], vec![4, 5, 6], vec![7]]);
        assert_eq!(owners(8, MiddleSequence, 3, Upper), one(&[0, 5, 6, 7]));
        // A block of one layer.
        assert_eq!(owners(5, MiddleCycle, 3, Stepwise), one(&[0, 1, 4]));
        // 0, 2.5 and 5: a half goes to the even neighbour.
        assert_eq!(owners(6, Cycle, 2, Stepwise), one(&[0, 2, 5]));
    }
}
