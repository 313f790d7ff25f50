//! [`Kernel`]: one WGSL entry point as seen from Rust, and the cache of its compiled forms.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Instant;

use crate::caps::DeviceCaps;
use crate::error::{KernelError, Result};
use crate::gpu::Gpu;
use crate::pipeline_cache::PipelineCache;
use crate::rows;
use crate::shader::{self, Definitions};
use crate::tensor::Tensor;

/// How a kernel touches a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// `var<storage, read>`.
    Read,
    /// `var<storage, read_write>`.
    ReadWrite,
    /// `var<uniform>`.
    Uniform,
    /// `texture_storage_2d<rgba32uint, read>`: a weight on a software rasteriser.
    Texels,
}

impl Access {
    /// Whether the binding is a storage buffer.
    pub(crate) fn is_storage(self) -> bool {
        matches!(self, Access::Read | Access::ReadWrite)
    }
}

/// A tensor at a binding index of group 0.
#[derive(Clone, Copy, Debug)]
pub struct Binding<'a> {
    pub(crate) index: u32,
    pub(crate) access: Access,
    pub(crate) tensor: &'a Tensor,
    /// Whether a dispatch reads the whole tensor as its weight, for profiles.
    pub(crate) is_weight: bool,
}

impl<'a> Binding<'a> {
    /// Bound read-only. Weights must be: `read_write` costs a third of the bandwidth.
    pub fn read(index: u32, tensor: &'a Tensor) -> Self {
        Self { index, access: Access::Read, tensor, is_weight: false }
    }

    /// Bound for reading and writing.
    pub fn write(index: u32, tensor: &'a Tensor) -> Self {
        Self { index, access: Access::ReadWrite, tensor, is_weight: false }
    }

    /// A weight in its buffer, read as a whole.
    pub fn weight(index: u32, tensor: &'a Tensor) -> Self {
        Self { is_weight: true, ..Self::read(index, tensor) }
    }

    /// A weight that [`Tensor::into_weight`] made, read as a whole: its texture where it has one.
    pub fn texels(index: u32, tensor: &'a Tensor) -> Self {
        let access = if tensor.texels.is_some() { Access::Texels } else { Access::Read };
        Self { access, ..Self::weight(index, tensor) }
    }

    /// Bound as a uniform.
    pub fn uniform(index: u32, tensor: &'a Tensor) -> Self {
        Self { index, access: Access::Uniform, tensor, is_weight: false }
    }
}

/// One WGSL entry point, specialised: the value holds what the shader's constants and flags come from.
///
/// The same stem names the shader file, the wrapper in `ops/`, the CPU reference in `oracle/` and the bench. A program's own
/// kernels implement it too, with a [`Kernel::SOURCE`]; `examples/custom_kernel.rs` is one.
pub trait Kernel {
    /// File stem, profiler label and bench id, for example `"rms_norm"`.
    const NAME: &'static str;
    /// The WGSL of a kernel that `mor-shaders` does not have, in the same language: directives of `shaders/README.md`, imports
    /// from `shared/`, an entry point `main`. It is compiled with run-time bounds checks whatever the device's options are, for
    /// nobody has promised that it stays within its bindings.
    const SOURCE: Option<&'static str> = None;
    /// The uniform at binding 0. Mirrors `struct Params` of the shader; `tests/house.rs` compares the sizes.
    type Params: bytemuck::Pod;
    /// The tensors by name; no positional buffers.
    type Bindings<'a>;

    /// Flags and constants of this specialisation on a device with `caps`.
    fn definitions(&self, caps: &DeviceCaps) -> Definitions;

    /// The tensors at their binding indices.
    fn bindings<'a>(&self, bindings: &Self::Bindings<'a>) -> Vec<Binding<'a>>;

    /// Workgroup memory this specialisation declares, in bytes. Checked here because wgpu does not.
    fn workgroup_storage_bytes(&self, caps: &DeviceCaps) -> u32;
}

/// Identifies a compiled kernel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PipelineKey {
    name: &'static str,
    /// [`Kernel::SOURCE`].
    source: Option<&'static str>,
    definitions: Definitions,
    accesses: Vec<(u32, Access)>,
}

/// A kernel whose bindings are laid out; [`compile`] adds the pipeline.
#[derive(Debug)]
pub(crate) struct CompiledKernel {
    key: PipelineKey,
    pub(crate) layout: wgpu::BindGroupLayout,
    pipeline: OnceLock<wgpu::ComputePipeline>,
}

impl CompiledKernel {
    /// The pipeline.
    ///
    /// # Panics
    /// Before [`compile`].
    pub(crate) fn pipeline(&self) -> &wgpu::ComputePipeline {
        self.pipeline.get().expect("plans are compiled when they are finished")
    }
}

/// The specialised WGSL of `kernel` on a device with `caps`, as the driver receives it.
///
/// # Errors
/// What is wrong with the source's directives.
pub fn wgsl<K: Kernel>(kernel: &K, caps: &DeviceCaps) -> Result<String, String> {
    shader::specialise(K::NAME, K::SOURCE, &with_row_constants(kernel.definitions(caps)))
}

fn with_row_constants(definitions: Definitions) -> Definitions {
    definitions
        .u32("NONE", rows::NONE)
        .u32("PAGE_SIZE", rows::PAGE_SIZE)
        .u32("ROW_PADDING", rows::ROW_PADDING)
        .u32("ROW_ACTIVE", rows::ROW_ACTIVE)
        .u32("ROW_SAMPLE", rows::ROW_SAMPLE)
        .u32("ROW_FAILED", rows::ROW_FAILED)
        .u32("ROW_INDEX_UNIT", rows::ROW_INDEX_UNIT)
        .u32("END_NOTHING", rows::END_NOTHING)
        .u32("END_GATED", rows::END_GATED)
        .u32("END_PASS", rows::END_PASS)
        .u32("MAX_GRIDS", rows::MAX_GRIDS as u32)
}

/// Lays the bindings of `kernel` out, or finds it done.
pub(crate) fn prepare<K: Kernel>(gpu: &Gpu, kernel: &K, bindings: &[Binding<'_>]) -> Result<Arc<CompiledKernel>> {
    let caps = gpu.caps();
    let storage = kernel.workgroup_storage_bytes(caps);
    if storage > caps.max_workgroup_storage_bytes {
        return Err(KernelError::Limit {
            kernel: K::NAME,
            what: "workgroup memory in bytes",
            found: u64::from(storage),
            limit: u64::from(caps.max_workgroup_storage_bytes),
            why: format!("\"{}\" offers", gpu.summary().name),
            advice: "this shape needs a smaller specialisation",
        });
    }
    let num_storage = bindings.iter().filter(|binding| binding.access.is_storage()).count();
    if num_storage > caps.max_storage_buffers as usize {
        return Err(KernelError::Limit {
            kernel: K::NAME,
            what: "storage bindings",
            found: num_storage as u64,
            limit: u64::from(caps.max_storage_buffers),
            why: format!("\"{}\" offers", gpu.summary().name),
            advice: "this device cannot run the kernel",
        });
    }
    let key = PipelineKey {
        name: K::NAME,
        source: K::SOURCE,
        definitions: with_row_constants(kernel.definitions(caps)),
        accesses: bindings.iter().map(|binding| (binding.index, binding.access)).collect(),
    };
    let mut kernels = gpu.inner.kernels.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = kernels.get(&key) {
        return Ok(Arc::clone(known));
    }
    let mut entries = vec![layout_entry(0, Access::Uniform)];
    entries.extend(key.accesses.iter().map(|&(index, access)| layout_entry(index, access)));
    let descriptor = wgpu::BindGroupLayoutDescriptor { label: Some(K::NAME), entries: &entries };
    let layout = gpu.catch(|device, _| device.create_bind_group_layout(&descriptor));
    let prepared = Arc::new(CompiledKernel { key: key.clone(), layout, pipeline: OnceLock::new() });
    kernels.insert(key, Arc::clone(&prepared));
    Ok(prepared)
}

/// Compiles those of `kernels` that are not, on as many threads as the machine has: a plan has some dozens of kernels, and
/// drivers take from milliseconds to seconds for each.
pub(crate) fn compile<'k>(gpu: &Gpu, kernels: impl Iterator<Item = &'k Arc<CompiledKernel>>) -> Result<()> {
    let mut missing: Vec<&Arc<CompiledKernel>> = Vec::new();
    for kernel in kernels.filter(|kernel| kernel.pipeline.get().is_none()) {
        if !missing.iter().any(|known| Arc::ptr_eq(known, kernel)) {
            missing.push(kernel);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let start = Instant::now();
    let num_threads = thread::available_parallelism().map_or(1, NonZero::get).min(missing.len());
    let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
    let work = || {
        while let Some(kernel) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
            match build(gpu, kernel) {
                Ok(pipeline) => drop(kernel.pipeline.set(pipeline)),
                Err(error) => {
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            }
        }
    };
    thread::scope(|scope| {
        (1..num_threads).for_each(|_| drop(scope.spawn(work)));
        work();
    });
    tracing::debug!(kernels = missing.len(), time = ?start.elapsed(), "compiled");
    let nanos = start.elapsed().as_nanos() as u64;
    gpu.inner.compile_nanos.fetch_add(nanos, Ordering::Relaxed);
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

fn build(gpu: &Gpu, kernel: &CompiledKernel) -> Result<wgpu::ComputePipeline> {
    let PipelineKey { name, source, definitions, .. } = &kernel.key;
    let rejected =
        |reason| KernelError::Shader { kernel: (*name).to_owned(), adapter: gpu.summary().name.clone(), reason };
    let is_ours = source.is_none();
    let source = shader::specialise(name, *source, definitions).map_err(rejected)?;
    let label = format!("mor.{name}");
    let descriptor =
        wgpu::ShaderModuleDescriptor { label: Some(&label), source: wgpu::ShaderSource::Wgsl(source.as_str().into()) };
    // Scopes belong to the thread, so each error is known for that of its kernel.
    let (pipeline, fault) = gpu.scoped(|device, _| {
        let module = if gpu.is_checked() || !is_ours {
            device.create_shader_module(descriptor)
        } else {
            // SAFETY: every kernel of ours is run in its checked form over awkward sizes by the parity tests, with
            // sentinels around its outputs.
            unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        };
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(&label),
            bind_group_layouts: &[Some(&kernel.layout)],
            immediate_size: 0,
        });
        device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&label),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &[],
                // Kernels of ours write workgroup memory before they read it.
                zero_initialize_workgroup_memory: !is_ours,
            },
            cache: gpu.inner.pipeline_cache.as_ref().map(PipelineCache::handle),
        })
    });
    match fault {
        None => Ok(pipeline),
        Some(fault) => Err(rejected(format!("{}\n{source}", fault.reason))),
    }
}

fn layout_entry(index: u32, access: Access) -> wgpu::BindGroupLayoutEntry {
    let buffer = |ty| wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None };
    wgpu::BindGroupLayoutEntry {
        binding: index,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: match access {
            Access::Read => buffer(wgpu::BufferBindingType::Storage { read_only: true }),
            Access::ReadWrite => buffer(wgpu::BufferBindingType::Storage { read_only: false }),
            Access::Uniform => buffer(wgpu::BufferBindingType::Uniform),
            Access::Texels => wgpu::BindingType::StorageTexture {
                access: wgpu::StorageTextureAccess::ReadOnly,
                format: wgpu::TextureFormat::Rgba32Uint,
                view_dimension: wgpu::TextureViewDimension::D2,
            },
        },
        count: None,
    }
}
