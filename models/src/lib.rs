//! The files of `tinystories-mor-expert-5m`, a trained Mixture-of-Recursions model of 4.7 million parameters, so that they
//! travel inside published packages. The README has its card and credits, `ATTRIBUTION-ccby.txt` the credits that must stay
//! beside the weights. There are no features.
//!
//! ```
//! assert!(mor_models::CONFIG.contains("num_recursion"));
//! // A safetensors file begins with the length of its header, a JSON object.
//! assert_eq!(mor_models::WEIGHTS[8], b'{');
//! ```

/// What the model is called.
pub const NAME: &str = "tinystories-mor-expert-5m";
// Statics, so that a program has the bytes once.

/// Its `config.json`.
pub static CONFIG: &str = include_str!("../tinystories-mor-expert-5m/config.json");
/// Its `model.safetensors`, bf16.
pub static WEIGHTS: &[u8] = include_bytes!("../tinystories-mor-expert-5m/model.safetensors");
/// Its `tokenizer.json`.
pub static TOKENIZER: &[u8] = include_bytes!("../tinystories-mor-expert-5m/tokenizer.json");
