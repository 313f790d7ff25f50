//! [`DepthControl`]: more or less compute a token than the routers ask for.

use crate::{Mode, ModelError, MorConfig};

/// How far a routed model's tokens go, other than their routers alone would have it: less compute a token, or more, at some
/// cost in quality. The default changes nothing.
///
/// Gates stay those of the routers, so a token computes at each recursion what it would have computed there.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DepthControl {
    /// Most recursions a token takes, from 1 to the model's R; `None` is R. Also limits top-k routing.
    pub max_depth: Option<usize>,
    /// Above 0 tokens go deeper, below 0 they stay shallower; finite.
    ///
    /// Expert choice: added to the logit that decides, so a token takes a recursion of a capacity below 1 if
    /// `logit + router_bias >= 0`; at a capacity of 1 nothing is decided. Token choice: `r * router_bias` is added to the
    /// score of depth r + 1, so each depth gains as much on the one before it. Scores lie between 0 and the model's alpha,
    /// logits do not. Top-k routing, which ranks, refuses it.
    pub router_bias: f32,
}

impl DepthControl {
    /// Refuses what the model cannot follow.
    ///
    /// # Errors
    /// [`ModelError::DepthControl`] for anything but the default if tokens have no depths of their own; for a `max_depth`
    /// that is not 1 to R, or a `router_bias` that is not finite.
    pub fn validate(&self, config: &MorConfig) -> Result<(), ModelError> {
        let refuse = |name, found, expected| Err(ModelError::DepthControl { name, found, expected });
        let num_recursions = config.num_recursions;
        let allowed = |depth: &usize| config.is_routed() && (1..=num_recursions).contains(depth);
        if let Some(max_depth) = self.max_depth.filter(|depth| !allowed(depth)) {
            let expected = match config.is_routed() {
                true => format!("1 to {num_recursions}, the recursions of the model"),
                false => fixed_depth(config),
            };
            return refuse("max_depth", max_depth.to_string(), expected);
        }
        if !self.router_bias.is_finite() {
            return refuse("router_bias", self.router_bias.to_string(), "a finite number".to_owned());
        }
        if self.router_bias != 0.0 && !config.is_routed() {
            return refuse("router_bias", self.router_bias.to_string(), fixed_depth(config));
        }
        Ok(())
    }

    /// Recursions that a token of the model takes at most.
    pub(crate) fn max_depth(&self, config: &MorConfig) -> usize {
        self.max_depth.unwrap_or(config.num_recursions)
    }

    /// What expert choice compares its logits with. A comparison is exact where a sum would be rounded.
    pub(crate) fn threshold(&self) -> f32 {
        0.0 - self.router_bias
    }
}

fn fixed_depth(config: &MorConfig) -> String {
    let mode = if config.mode == Mode::Vanilla { "vanilla" } else { "recursive" };
    format!("none: all tokens of a {mode} model take the same layers")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(mor: &str) -> MorConfig {
        let json = format!(
            r#"{{ "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 5,
                  "num_attention_heads": 4, "rms_norm_eps": 1e-5, "mor": {{ {mor} }} }}"#
        );
        MorConfig::from_json_str(&json, "test").unwrap()
    }

    #[test]
    fn only_routed_models_have_depths_to_control() {
        let routed = config(r#""mode": "expert", "sharing": "middle_cycle", "num_recursion": 3"#);
        let message = |max_depth, router_bias, config: &MorConfig| {
            DepthControl { max_depth, router_bias }.validate(config).err().map(|error| error.to_string())
        };
        for max_depth in [None, Some(1), Some(3)] {
            assert_eq!(message(max_depth, -0.5, &routed), None);
        }
        for found in [0, 4] {
            let expected = format!("max_depth is {found}, expected 1 to 3, the recursions of the model");
            assert_eq!(message(Some(found), 0.0, &routed), Some(expected));
        }
        for found in [f32::NAN, f32::INFINITY] {
            assert!(message(None, found, &routed).is_some_and(|text| text.ends_with("expected a finite number")));
        }
        let vanilla = config(r#""mode": "vanilla""#);
        assert_eq!(message(None, 0.0, &vanilla), None);
        let expected = "expected none: all tokens of a vanilla model take the same layers";
        assert_eq!(message(Some(1), 0.0, &vanilla), Some(format!("max_depth is 1, {expected}")));
        assert_eq!(message(None, 1.5, &vanilla), Some(format!("router_bias is 1.5, {expected}")));
    }
}
