//! Checkpoints whose matrices are small integers.

use mor_kernels::quantize;

use super::dtype::decode_row;
use super::{Checkpoint, Dtype, Place, Tensor, TensorId};
use crate::{ModelError, Precision, Quantization};

impl Checkpoint {
    /// The same model with quantised matrices, in memory; all cores work on it.
    ///
    /// # Errors
    ///
    /// [`ModelError::AlreadyQuantized`]; [`ModelError::NotQuantizable`] for a weight above the largest f16.
    pub fn quantize(self, quantization: Quantization) -> Result<Self, ModelError> {
        if let Some(found) = self.config.quantization {
            return Err(ModelError::AlreadyQuantized { found });
        }
        let packed = self
            .packed_dtypes(Some(quantization))
            .zip(self.tensor_ids())
            .map(|(dtype, id)| dtype.map(|dtype| Ok((dtype, self.pack(id, dtype)?))).transpose())
            .collect::<Result<Vec<_>, ModelError>>()?;
        let Self { mut config, layout, mut tensors, ids, source, .. } = self;
        for (tensor, packed) in tensors.iter_mut().zip(packed) {
            if let Some((dtype, bytes)) = packed {
                (tensor.dtype, tensor.place) = (dtype, Place::Memory(bytes));
            }
        }
        config.quantization = Some(quantization);
        Ok(Self::assemble(config, layout, tensors, ids, source))
    }

    /// Per distinct tensor, the type in which a model quantised so has it packed.
    fn packed_dtypes(&self, quantization: Option<Quantization>) -> impl Iterator<Item = Option<Dtype>> + use<> {
        let mut dtypes = vec![None; self.tensors.len()];
        for (name, id) in &self.ids {
            dtypes[id.index()] = quantization.and_then(|format| name.quantized_dtype(format, &self.config));
        }
        dtypes.into_iter()
    }

    /// The rows of a matrix, packed.
    fn pack(&self, id: TensorId, dtype: Dtype) -> Result<Vec<u8>, ModelError> {
        let [num_rows, len] = [self.shape(id)[0], self.shape(id)[1]];
        let row_bytes = dtype.row_bytes(len);
        let mut packed = vec![0; num_rows * row_bytes];
        let num_threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let rows_per_part = num_rows.div_ceil(num_threads).max(64);
        let pack_part = |part: usize, rows: &mut [u8]| {
            let mut values = vec![0.0; len];
            for (row, bytes) in (part * rows_per_part..).zip(rows.chunks_mut(row_bytes)) {
                self.read_row(id, row, &mut values);
                quantize::quantize_row(dtype.on_device(), &values, bytes).map_err(|value| {
                    let at = values.iter().position(|v| *v == value).unwrap_or(0);
                    ModelError::NotQuantizable { name: self.name(id).to_owned(), index: row * len + at, value }
                })?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let parts = packed.chunks_mut(rows_per_part * row_bytes).enumerate();
            let workers: Vec<_> = parts.map(|(part, rows)| scope.spawn(move || pack_part(part, rows))).collect();
            // A worker can only panic by a defect of this crate, which must not be swallowed.
            workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
        })?;
        Ok(packed)
    }

    /// Row `row` of a matrix converted to f32, for `values` of its length.
    fn read_row(&self, id: TensorId, row: usize, values: &mut [f32]) {
        let dtype = self.dtype(id);
        let mut bytes = vec![0; dtype.row_bytes(values.len())];
        self.read_bytes(id, row * bytes.len(), &mut bytes);
        decode_row(dtype, &bytes, values);
    }

    /// Bytes of the weights on a device, padding aside; `quantization` is what they would be quantised to first, if they
    /// are not.
    pub fn device_bytes(&self, precision: Precision, quantization: Option<Quantization>) -> u64 {
        let bytes = |(tensor, packed): (&Tensor, Option<Dtype>)| {
            let dtype = precision.weight_dtype(packed.unwrap_or(tensor.dtype));
            (tensor.num_elems() / tensor.row_len() * dtype.row_bytes(tensor.row_len())) as u64
        };
        self.tensors.iter().zip(self.packed_dtypes(quantization)).map(bytes).sum()
    }
}
