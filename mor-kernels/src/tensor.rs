//! [`Tensor`]: a labelled, typed GPU buffer. It has no operators and no laziness.

use crate::gpu::Gpu;
use crate::{Result, kv_blocks, quantize};

/// Element type of a tensor's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision, two in a `u32`.
    F16,
    /// bfloat16, two in a `u32`.
    BF16,
    /// 8-bit integers in groups with a scale: a row as [`quantize`] packs it.
    Q8,
    /// 4-bit integers in groups with a scale and an offset: a row as [`quantize`] packs it.
    Q4,
    /// 8-bit blocks of keys or values that share a scale, as [`kv_blocks`] packs them.
    Block8,
    /// 32-bit unsigned integers (also structs of them).
    U32,
}

impl DType {
    /// Whether rows are packed as [`quantize`] says.
    pub const fn is_quantized(self) -> bool {
        matches!(self, DType::Q8 | DType::Q4)
    }

    /// Bytes of a row of `len` elements.
    pub const fn row_bytes(self, len: usize) -> usize {
        match self {
            DType::F32 | DType::U32 => 4 * len,
            DType::F16 | DType::BF16 => 2 * len,
            DType::Block8 => len.next_multiple_of(kv_blocks::BLOCK),
            DType::Q8 => quantize::Q8.row_bytes(len),
            DType::Q4 => quantize::Q4.row_bytes(len),
        }
    }
}

/// Texels of 16 bytes in a row of a weight's texture: WebGPU's default limit for its sides.
pub const TEXEL_ROW: u32 = 8192;

/// A labelled buffer on the device with a shape and an element type; row-major.
///
/// Cloning shares the buffer. wgpu orders dispatches by whole buffers, so tensors that should not
/// wait for each other live in separate buffers: there is no arena of activations. Weights, which nobody writes, may be
/// parts of a stack.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub(crate) buffer: wgpu::Buffer,
    /// Where it starts in the buffer, and how much of it is its own, in bytes.
    pub(crate) offset: u64,
    num_bytes: u64,
    pub(crate) texels: Option<wgpu::TextureView>,
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
        let bytes = data_bytes(dtype, shape) as u64;
        // Storage bindings come in whole vec4s, and a buffer may not be empty.
        let bytes = bytes.next_multiple_of(32).max(32);
        let usage = U::STORAGE | U::COPY_DST | U::COPY_SRC | U::INDIRECT;
        let buffer = gpu.create_buffer(label, bytes, usage)?;
        Ok(Self::from_parts(buffer, bytes, label, dtype, shape))
    }

    pub(crate) fn from_parts(buffer: wgpu::Buffer, num_bytes: u64, label: &str, dtype: DType, shape: &[usize]) -> Self {
        Self { buffer, offset: 0, num_bytes, texels: None, label: label.to_owned(), shape: shape.to_vec(), dtype }
    }

    /// The elements from number `first` on as a tensor of `shape`, in the same buffer; `None` where devices cannot bind it: at an
    /// offset or of a size that is no multiple of [`DeviceCaps::storage_alignment`](crate::caps::DeviceCaps::storage_alignment), or
    /// in a texture.
    ///
    /// # Panics
    /// If the tensor has not so many elements, or a row would be cut.
    pub fn part(&self, gpu: &Gpu, label: &str, first: usize, shape: &[usize]) -> Option<Self> {
        let len = *self.shape.last().expect("a tensor has a shape");
        let elems: usize = shape.iter().product();
        assert!(first.is_multiple_of(len) && elems.is_multiple_of(len), "{label}: rows of {len} are not cut");
        assert!(first + elems <= self.num_elems(), "{label}: a part of {:?}", self.shape);
        let offset = self.offset + (first / len * self.dtype.row_bytes(len)) as u64;
        let num_bytes = (elems / len * self.dtype.row_bytes(len)) as u64;
        let alignment = u64::from(gpu.caps().storage_alignment.max(32));
        let can_bind = self.texels.is_none()
            && offset.is_multiple_of(alignment)
            && num_bytes.is_multiple_of(alignment)
            && num_bytes > 0;
        let buffer = self.buffer.clone();
        let part = Self {
            buffer,
            offset,
            num_bytes,
            texels: None,
            label: label.to_owned(),
            shape: shape.to_vec(),
            dtype: self.dtype,
        };
        can_bind.then_some(part)
    }

    /// Whether the other tensor begins at the same place of the same buffer.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.buffer == other.buffer && self.offset == other.offset
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
        assert_eq!(bytes.len(), tensor.data_bytes(), "{label}: data does not fill {shape:?}");
        gpu.write(&tensor, 0, bytes);
        Ok(tensor)
    }

    /// The tensor as a weight of [`LinearDecode`](crate::ops::LinearDecode), once all data is written: a software
    /// rasteriser, which reads textures several times as fast as buffers, gets a copy in a texture.
    ///
    /// # Errors
    /// [`KernelError::Device`](crate::KernelError::Device) if the texture is refused.
    pub fn into_weight(self, gpu: &Gpu) -> Result<Self> {
        let weight = self.with_texels(gpu)?;
        weight.copy_to_texels(gpu);
        gpu.check()?;
        Ok(weight)
    }

    /// As [`Tensor::into_weight`] for a tensor whose data an [`Upload`](crate::upload::Upload) brings, which then copies it to the
    /// texture as well.
    ///
    /// # Errors
    /// As [`Tensor::into_weight`].
    pub fn with_texels(mut self, gpu: &Gpu) -> Result<Self> {
        if !gpu.caps().is_cpu {
            return Ok(self);
        }
        let num_texels = self.num_texels();
        let size = wgpu::Extent3d {
            width: TEXEL_ROW.min(num_texels),
            height: num_texels.div_ceil(TEXEL_ROW),
            depth_or_array_layers: 1,
        };
        let texture = gpu.catch(|device, _| {
            device.create_texture(&wgpu::TextureDescriptor {
                label: Some(&self.label),
                size,
                mip_level_count: 1,
                sample_count: 1,
                dimension: wgpu::TextureDimension::D2,
                format: wgpu::TextureFormat::Rgba32Uint,
                usage: wgpu::TextureUsages::STORAGE_BINDING | wgpu::TextureUsages::COPY_DST,
                view_formats: &[],
            })
        });
        gpu.check()?;
        self.texels = Some(texture.create_view(&wgpu::TextureViewDescriptor::default()));
        Ok(self)
    }

    /// Copies the data to the texture, if there is one.
    pub(crate) fn copy_to_texels(&self, gpu: &Gpu) {
        let Some(texels) = &self.texels else { return };
        let num_texels = self.num_texels();
        gpu.catch(|device, queue| {
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            // Whole rows, then the part of a row that remains.
            let (rows, rest) = (num_texels / TEXEL_ROW, num_texels % TEXEL_ROW);
            for (y, width, height) in [(0, TEXEL_ROW, rows), (rows, rest, 1)] {
                if width > 0 && height > 0 {
                    let layout = wgpu::TexelCopyBufferLayout {
                        offset: self.offset + u64::from(y * TEXEL_ROW) * 16,
                        bytes_per_row: Some(TEXEL_ROW * 16),
                        rows_per_image: None,
                    };
                    encoder.copy_buffer_to_texture(
                        wgpu::TexelCopyBufferInfo { buffer: &self.buffer, layout },
                        wgpu::TexelCopyTextureInfo {
                            texture: texels.texture(),
                            mip_level: 0,
                            origin: wgpu::Origin3d { x: 0, y, z: 0 },
                            aspect: wgpu::TextureAspect::All,
                        },
                        wgpu::Extent3d { width, height, depth_or_array_layers: 1 },
                    );
                }
            }
            queue.submit([encoder.finish()]);
        });
    }

    /// Texels of 16 bytes that hold all of it.
    fn num_texels(&self) -> u32 {
        (self.num_bytes() / 16) as u32
    }

    /// Its rows, the last of its sizes being a row's elements, and the bytes of each.
    pub(crate) fn rows(&self) -> (usize, usize) {
        rows(self.dtype, &self.shape)
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

    /// Bytes of the elements, row after row.
    pub fn data_bytes(&self) -> usize {
        data_bytes(self.dtype, &self.shape)
    }

    /// Bytes allocated, padding included.
    pub fn num_bytes(&self) -> u64 {
        self.num_bytes
    }
}

fn data_bytes(dtype: DType, shape: &[usize]) -> usize {
    let (num_rows, row_bytes) = rows(dtype, shape);
    num_rows * row_bytes
}

fn rows(dtype: DType, shape: &[usize]) -> (usize, usize) {
    let (len, rows) = shape.split_last().map_or((1, 1), |(len, rows)| (*len, rows.iter().product()));
    (rows, dtype.row_bytes(len))
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::parity;

    /// 8 rows of 256 bytes, at which every device can bind.
    fn rows() -> (&'static Gpu, Tensor) {
        let gpu = parity::gpu();
        let values: Vec<u32> = (0..512).collect();
        (gpu, Tensor::from_slice(gpu, "rows", DType::U32, &[8, 64], &values).expect("a small buffer fits"))
    }

    #[test]
    fn parts_share_the_buffer() {
        let (gpu, whole) = rows();
        let part = whole.part(gpu, "part", 128, &[2, 2, 64]).expect("rows are aligned");
        assert_eq!((part.shape(), part.num_elems(), part.num_bytes()), (&[2, 2, 64][..], 256, 1024));
        assert_eq!(gpu.read::<u32>(&part).expect("the device answers"), (128..384).collect::<Vec<_>>());
        gpu.write(&part, 4, bytemuck::cast_slice(&[7_u32]));
        let inner = part.part(gpu, "inner", 64, &[1, 64]).expect("rows are aligned");
        gpu.write(&inner, 0, bytemuck::cast_slice(&[8_u32]));
        let values: Vec<u32> = gpu.read(&whole).expect("the device answers");
        assert_eq!((values[128], values[129], values[192], values[193]), (128, 7, 8, 193));
    }

    #[test]
    fn parts_that_no_device_binds_are_none() {
        let gpu = parity::gpu();
        let whole = Tensor::zeros(gpu, "narrow", DType::U32, &[256, 2]).expect("a small buffer fits");
        assert!(whole.part(gpu, "offset", 2, &[64, 2]).is_none());
        assert!(whole.part(gpu, "size", 0, &[1, 2]).is_none());
        assert!(whole.part(gpu, "nothing", 0, &[0, 2]).is_none());
        assert!(whole.part(gpu, "all", 0, &[256, 2]).is_some());
    }

    #[test]
    #[should_panic(expected = "rows of 64 are not cut")]
    fn parts_cut_no_row() {
        let (gpu, whole) = rows();
        whole.part(gpu, "part", 32, &[1, 64]);
    }

    #[test]
    #[should_panic(expected = "past: a part of [8, 64]")]
    fn parts_end_where_the_tensor_does() {
        let (gpu, whole) = rows();
        whole.part(gpu, "past", 448, &[2, 64]);
    }
}
