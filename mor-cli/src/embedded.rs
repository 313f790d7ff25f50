//! The model inside the program, so that `mor generate` works without any download.

use std::borrow::Cow;

pub(crate) use mor_models::{CONFIG, TOKENIZER, WEIGHTS};
use mor_runtime::ModelSource;

/// What messages and reports call it.
pub(crate) const NAME: &str = "tinystories-mor-expert-5m (embedded)";

pub(crate) fn source() -> ModelSource {
    ModelSource::Bytes {
        config_json: Cow::Borrowed(CONFIG),
        weights: Cow::Borrowed(WEIGHTS),
        tokenizer_json: Some(Cow::Borrowed(TOKENIZER)),
        origin: NAME.to_owned(),
    }
}
