//! The model inside the program, so that `mor generate` works without any download.

use std::borrow::Cow;

use mor_runtime::ModelSource;

/// What messages and reports call it.
pub(crate) const NAME: &str = "tinystories-mor-expert-5m (embedded)";

pub(crate) const CONFIG: &str = include_str!("../../models/tinystories-mor-expert-5m/config.json");
pub(crate) const WEIGHTS: &[u8] = include_bytes!("../../models/tinystories-mor-expert-5m/model.safetensors");
pub(crate) const TOKENIZER: &[u8] = include_bytes!("../../models/tinystories-mor-expert-5m/tokenizer.json");

pub(crate) fn source() -> ModelSource {
    ModelSource::Bytes {
        config_json: Cow::Borrowed(CONFIG),
        weights: Cow::Borrowed(WEIGHTS),
        tokenizer_json: Some(Cow::Borrowed(TOKENIZER)),
        origin: NAME.to_owned(),
    }
}
