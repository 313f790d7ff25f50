//! [`SamplingParams`] and what else a request to generate holds.

use crate::error::{Result, RuntimeError};

/// How the next token is drawn, in this order: repetition penalty, temperature, top-k, top-p, min-p, draw.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens with at least this mass; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the most likely; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that already occurred; 1 is off.
    pub repetition_penalty: f32,
    /// Seed of the counter-based generator: same seed, same text on the same device.
    pub seed: u64,
}

impl Default for SamplingParams {
    /// Temperature 0.8, nothing filtered, seed 0.
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl SamplingParams {
    /// The most likely token every time.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks every field's range.
    ///
    /// # Errors
    /// [`RuntimeError::Parameter`] names the first field out of range.
    pub fn validate(&self) -> Result<()> {
        let check = |name, value: f32, ok: bool, expected| {
            if ok { Ok(()) } else { Err(RuntimeError::Parameter { name, found: value.to_string(), expected }) }
        };
        let t = self.temperature;
        check("temperature", t, t.is_finite() && t >= 0.0, "a finite number, 0 or more")?;
        check("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "a number above 0 and up to 1")?;
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "a number from 0 to 1")?;
        let p = self.repetition_penalty;
        check("repetition_penalty", p, p.is_finite() && p > 0.0, "a finite number above 0")
    }
}

/// A request to continue a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateRequest {
    /// Token ids to start from; empty starts from the end-of-text token.
    pub prompt: Vec<u32>,
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Texts that end the generation where one appears; it is not part of the output. Needs a tokenizer.
    pub stop: Vec<String>,
    /// Tokens that end the generation as the model's own end-of-text tokens do.
    pub stop_tokens: Vec<u32>,
    /// Go on after the model's end-of-text tokens.
    pub ignore_eos: bool,
}

impl GenerateRequest {
    /// 128 new tokens with default sampling.
    pub fn new(prompt: Vec<u32>) -> Self {
        Self {
            prompt,
            max_new_tokens: 128,
            sampling: SamplingParams::default(),
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            ignore_eos: false,
        }
    }
}

/// Why a sequence ended.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// `max_new_tokens` were generated.
    Length,
    /// A stop text appeared.
    Stop,
    /// An end-of-text token was drawn.
    Eos,
    /// The sequence was cancelled.
    Cancelled,
}

impl FinishReason {
    /// `length`, `stop`, `eos` or `cancelled`.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Length => "length",
            FinishReason::Stop => "stop",
            FinishReason::Eos => "eos",
            FinishReason::Cancelled => "cancelled",
        }
    }
}
