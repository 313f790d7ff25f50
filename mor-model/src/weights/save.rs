//! Checkpoints as files.

use std::borrow::Cow;
use std::path::Path;

use super::names::{TensorName, expected_tensors, tied_to};
use super::{Checkpoint, Dtype, TensorView};
use crate::ModelError;

impl Checkpoint {
    /// Writes all tensors to a safetensors file, tied ones once.
    ///
    /// A quantised matrix `[O, K]` is a tensor U8 `[O, B]` of the same name, a packed row of [`mor_kernels::quantize`] in
    /// each of its rows, and the configuration has a `quantization_config` ([`Quantization::to_json`]).
    ///
    /// # Errors
    ///
    /// [`ModelError::Write`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), ModelError> {
        let owner = |key: &TensorName| tied_to(key, &self.layout, self.config.tie_word_embeddings);
        let is_copy = |key: &TensorName| owner(key).is_some_and(|owner| self.ids[&owner] == self.ids[key]);
        // Where one copy of a tied tensor differs, the others must say that they do not.
        let differ = self.ids.keys().any(|key| owner(key).is_some() && !is_copy(key));
        let written = expected_tensors(&self.config, &self.layout)
            .into_iter()
            .filter(|expected| differ || !is_copy(&expected.key))
            .map(|expected| (expected.name, StoredView::from(self.view(self.ids[&expected.key]))));
        let path = path.as_ref();
        safetensors::serialize_to_file(written, None, path)
            .map_err(|source| ModelError::Write { path: path.to_owned(), source })
    }
}

/// A tensor as safetensors stores it.
struct StoredView<'a> {
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    data: Cow<'a, [u8]>,
}

impl<'a> From<TensorView<'a>> for StoredView<'a> {
    fn from(view: TensorView<'a>) -> Self {
        let mut shape = view.shape.to_vec();
        let dtype = match view.dtype {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::BF16 => safetensors::Dtype::BF16,
            Dtype::Q8 | Dtype::Q4 => {
                shape[1] = view.dtype.row_bytes(shape[1]);
                safetensors::Dtype::U8
            }
        };
        Self { dtype, shape, data: view.data }
    }
}

impl safetensors::View for StoredView<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}
