//! [`Tensor`]: a labelled, typed GPU buffer. It has no operators and no laziness.

use crate::Result;
use crate::gpu::Gpu;

/// Element type of a tensor's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision, two in a `u32`.
    F16,
    /// bfloat16, two in a `u32`.
    BF16,
    /// 32-bit unsigned integers (also structs of them).
    U32,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }
}

/// A labelled buffer on the device with a shape and an element type; row-major.
///
/// Cloning shares the buffer. wgpu orders dispatches by whole buffers, so tensors that should not
/// wait for each other live in separate buffers: there is no arena of activations.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub(crate) buffer: wgpu::Buffer,
    label: String,
    shape: Vec<usize>,
    dtype: DType,
}

impl Tensor {
    /// Allocates a tensor of zeros.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`](crate::KernelError::OutOfMemory) if the device refuses.
    pub fn zeros(gpu: &Gpu, label: &str, dtype: DType, shape: &[usize]) -> Result<Self> {
        use wgpu::BufferUsages as U;
        let bytes = (shape.iter().product::<usize>() * dtype.bytes()) as u64;
        // Storage bindings come in whole vec4s, and a buffer may not be empty.
        let bytes = bytes.next_multiple_of(32).max(32);
        let usage = U::STORAGE | U::COPY_DST | U::COPY_SRC | U::INDIRECT;
        let buffer = gpu.create_buffer(label, bytes, usage)?;
        Ok(Self::from_parts(buffer, label, dtype, shape))
    }

    pub(crate) fn from_parts(buffer: wgpu::Buffer, label: &str, dtype: DType, shape: &[usize]) -> Self {
        Self { buffer, label: label.to_owned(), shape: shape.to_vec(), dtype }
    }

    /// Allocates a tensor and fills it from host data.
    ///
    /// # Errors
    /// As [`Tensor::zeros`].
    ///
    /// # Panics
    /// If `data` has not exactly the bytes of `shape`.
    pub fn from_slice<T: bytemuck::NoUninit>(
        gpu: &Gpu,
        label: &str,
        dtype: DType,
        shape: &[usize],
        data: &[T],
    ) -> Result<Self> {
        let tensor = Self::zeros(gpu, label, dtype, shape)?;
        let bytes: &[u8] = bytemuck::cast_slice(data);
        assert_eq!(bytes.len(), tensor.num_elems() * dtype.bytes(), "{label}: data does not fill {shape:?}");
        gpu.write(&tensor, 0, bytes);
        Ok(tensor)
    }

    /// The same buffer seen with another element type.
    #[must_use]
    pub fn with_dtype(mut self, dtype: DType) -> Self {
        self.dtype = dtype;
        self
    }

    /// What the tensor holds, for messages and profilers.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn num_elems(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes allocated, padding included.
    pub fn num_bytes(&self) -> u64 {
        self.buffer.size()
    }
}
