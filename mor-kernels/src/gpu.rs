//! [`Gpu`]: one opened device, and how one is found and chosen, or taken over from a program that has one.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::caps::DeviceCaps;
use crate::error::{KernelError, Result};
use crate::kernel::{CompiledKernel, PipelineKey};
use crate::pipeline_cache::PipelineCache;
use crate::tensor::{TEXEL_ROW, Tensor};
use crate::tuning::Tuning;

/// What kind of hardware an adapter is, best first.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AdapterKind {
    /// A card of its own.
    Discrete,
    /// A part of the processor.
    Integrated,
    /// A GPU seen through a virtual machine.
    Virtual,
    /// Unknown to wgpu.
    Other,
    /// A software rasteriser on the CPU.
    Cpu,
}

impl AdapterKind {
    /// Lower-case name, for tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            AdapterKind::Discrete => "discrete",
            AdapterKind::Integrated => "integrated",
            AdapterKind::Virtual => "virtual",
            AdapterKind::Other => "other",
            AdapterKind::Cpu => "cpu",
        }
    }
}

/// One adapter of this machine, as listed; `index` is what `--device` takes.
#[derive(Clone, Debug)]
pub struct AdapterSummary {
    /// Place in the ranked list; 0 for the device of [`Gpu::from_wgpu`].
    pub index: usize,
    /// Name the driver gives.
    pub name: String,
    /// Hardware kind.
    pub kind: AdapterKind,
    /// `vulkan`, `metal`, `dx12`.
    pub backend: String,
    /// Driver name and version.
    pub driver: String,
    /// What a device opened on it offers.
    pub caps: DeviceCaps,
    /// Bytes of the largest device-local heap, where the backend tells.
    pub memory_bytes: Option<u64>,
}

/// Bytes that buffers are multiples of. wgpu's allocator puts small ones behind each other in one block of memory, where its driver's
/// alignment may be a few bytes; so each begins where lines of caches and bursts of memory do. One dispatch a step reads weights 3 to
/// 4 % faster (`benches/runs/2026-11-30-nvidia-h200/aligned-buffers.txt`).
const BUFFER_UNIT: u64 = 256;

/// Which adapter to open.
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DeviceSelector {
    /// The best by [`AdapterKind`].
    #[default]
    Best,
    /// The entry of [`Gpu::adapters`] with this index.
    Index(usize),
    /// The first whose name contains this, ignoring case.
    Name(String),
}

/// How to open a device.
#[derive(Clone, Debug)]
pub struct GpuOptions {
    /// Which adapter.
    pub device: DeviceSelector,
    /// Compile shaders with run-time bounds checks. Default: the environment variable `MOR_CHECKED=1`.
    pub checked: bool,
    /// Use subgroup operations where the adapter has them.
    pub subgroups: bool,
    /// Use cooperative matrices where the adapter has them, and `subgroups`.
    pub cooperative_matrices: bool,
    /// Clamp every limit to WebGPU's defaults, as a browser would.
    pub webgpu_limits: bool,
    /// Take a software rasteriser for a GPU, so that it runs the variants of kernels that are for those: for tests.
    pub software_as_gpu: bool,
    /// Clamp storage bindings to this many bytes, so that even small weights are split: for tests.
    pub max_binding_bytes: Option<u64>,
    /// Folder in which compiled kernels are kept between runs, where the backend can (Vulkan), and what trials have found out
    /// ([`Gpu::tuned`]), a file of each per adapter and driver. Made when it is needed; files that cannot be used are replaced. Default: none.
    pub pipeline_cache: Option<PathBuf>,
}

impl Default for GpuOptions {
    fn default() -> Self {
        let on = |name| std::env::var_os(name).is_some_and(|value| value == "1");
        Self {
            device: DeviceSelector::Best,
            checked: on("MOR_CHECKED"),
            subgroups: !on("MOR_NO_SUBGROUPS"),
            cooperative_matrices: !on("MOR_NO_COOPERATIVE_MATRICES"),
            webgpu_limits: on("MOR_WEBGPU_LIMITS"),
            software_as_gpu: false,
            max_binding_bytes: None,
            pipeline_cache: None,
        }
    }
}

/// An opened device. Clones share it.
#[derive(Clone, Debug)]
pub struct Gpu {
    pub(crate) inner: Arc<GpuInner>,
}

#[derive(Debug)]
pub(crate) struct GpuInner {
    /// Called through [`Gpu::catch`], so that no error escapes.
    device: wgpu::Device,
    queue: wgpu::Queue,
    pub(crate) summary: AdapterSummary,
    pub(crate) checked: bool,
    pub(crate) kernels: Mutex<HashMap<PipelineKey, Arc<CompiledKernel>>>,
    pub(crate) pipeline_cache: Option<PipelineCache>,
    pub(crate) tuning: Option<Tuning>,
    /// Time in which kernels were compiled.
    pub(crate) compile_nanos: AtomicU64,
    /// Staging buffers that no readback uses, for the next ones.
    pub(crate) staging: Mutex<Vec<wgpu::Buffer>>,
    fault: Arc<Mutex<Option<Fault>>>,
}

/// An error that the device has raised.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) out_of_memory: bool,
    pub(crate) reason: String,
}

impl Gpu {
    /// Opens the adapter that `options` choose.
    ///
    /// # Errors
    /// [`KernelError::NoAdapter`] if none fits, [`KernelError::OpenDevice`] if it refuses, [`KernelError::UnfitDevice`] if it
    /// has less than kernels need.
    pub fn open(options: &GpuOptions) -> Result<Self> {
        let adapters = ranked_adapters();
        let summaries = summaries(&adapters, options);
        let chosen = match &options.device {
            DeviceSelector::Best => (!adapters.is_empty()).then_some(0),
            DeviceSelector::Index(index) => (*index < adapters.len()).then_some(*index),
            DeviceSelector::Name(name) => {
                let name = name.to_lowercase();
                summaries.iter().position(|summary| summary.name.to_lowercase().contains(&name))
            }
        };
        let Some(chosen) = chosen else {
            let found: Vec<_> = summaries.iter().map(|s| format!("{} \"{}\"", s.index, s.name)).collect();
            return Err(KernelError::NoAdapter {
                wanted: match &options.device {
                    DeviceSelector::Best => "answers on this machine".to_owned(),
                    DeviceSelector::Index(index) => format!("has index {index}"),
                    DeviceSelector::Name(name) => format!("is named like \"{name}\""),
                },
                found: if found.is_empty() { "none".to_owned() } else { found.join(", ") },
            });
        };
        Self::from_adapter(&adapters[chosen], chosen, options)
    }

    /// Opens a device of our own.
    fn from_adapter(adapter: &wgpu::Adapter, index: usize, options: &GpuOptions) -> Result<Self> {
        let (device, queue) = pollster::block_on(adapter.request_device(&Self::device_descriptor(adapter, options)))
            .map_err(|error| KernelError::OpenDevice { adapter: adapter.get_info().name, reason: error.to_string() })?;
        let mut gpu = Self::from_wgpu(adapter, device, queue, options)?;
        let inner = Arc::get_mut(&mut gpu.inner).expect("nobody shares it yet");
        inner.summary.index = index;
        let sink = Arc::clone(&inner.fault);
        inner.device.set_device_lost_callback(move |reason, message| {
            if reason != wgpu::DeviceLostReason::Destroyed {
                let mut slot = sink.lock().expect("no panic happens while the fault is held");
                slot.get_or_insert(Fault { out_of_memory: false, reason: format!("device lost: {message}") });
            }
        });
        Ok(gpu)
    }

    /// What a device on `adapter` is to be opened with, for programs that share theirs: the features that kernels use and the
    /// adapter has, and the adapter's own limits rather than WebGPU's defaults. Add what the program needs itself.
    ///
    /// Cooperative matrices are an experimental feature of wgpu, which the descriptor enables where `options` ask for them and
    /// the adapter has them.
    pub fn device_descriptor(adapter: &wgpu::Adapter, options: &GpuOptions) -> wgpu::DeviceDescriptor<'static> {
        let (required_features, required_limits) = wanted(adapter, options);
        let experimental_features = if required_features.contains(COOPERATIVE) {
            // SAFETY: the one experimental feature is cooperative matrices. The kernels that use them are run with every such
            // tile by their parity tests, and choose them only where `DeviceCaps::cooperative_matrices` holds.
            unsafe { wgpu::ExperimentalFeatures::enabled() }
        } else {
            wgpu::ExperimentalFeatures::disabled()
        };
        wgpu::DeviceDescriptor {
            label: Some("mor"),
            required_features,
            required_limits,
            experimental_features,
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..Default::default()
        }
    }

    /// Kernels on a device that a program has opened itself, to share it: `adapter` is the one it was opened on, at best with
    /// [`Gpu::device_descriptor`]. Of `options` the choice of an adapter does not matter, and features that the device lacks are
    /// not used.
    ///
    /// Nothing is taken from the program. Errors of work done here are caught in error scopes, a stack per thread, around
    /// each call of wgpu, and returned as [`KernelError`]s; the device's one handler of uncaptured errors and its one
    /// device-lost callback stay the program's. A lost device shows as [`KernelError::Device`] when results are awaited.
    /// Submits go to the same queue, in the order in which they are made; while results are awaited here the device is polled,
    /// which runs callbacks of the program that are due.
    ///
    /// Indirect grids are written by kernels that clamp them, so an instance without
    /// `wgpu::InstanceFlags::VALIDATION_INDIRECT_CALL` saves the dispatch that wgpu adds to each of them to check that.
    ///
    /// ```
    /// use mor_kernels::gpu::{Gpu, GpuOptions};
    /// use mor_kernels::wgpu;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    /// let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    /// let options = GpuOptions::default();
    /// let descriptor = Gpu::device_descriptor(&adapter, &options);
    /// let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))?;
    /// let gpu = Gpu::from_wgpu(&adapter, device.clone(), queue.clone(), &options)?;
    /// assert_eq!(gpu.summary().name, adapter.get_info().name);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`KernelError::UnfitDevice`] if the device was created with less than kernels need.
    pub fn from_wgpu(
        adapter: &wgpu::Adapter,
        device: wgpu::Device,
        queue: wgpu::Queue,
        options: &GpuOptions,
    ) -> Result<Self> {
        let (features, limits) = wanted(adapter, options);
        let (features, offered) = (features & device.features(), device.limits());
        let mut summary = summarise(0, adapter, features, &limits.or_worse_values_from(&offered));
        let missing = missing(adapter, &offered, summary.caps.is_cpu);
        summary.caps.is_cpu &= !options.software_as_gpu;
        if !missing.is_empty() {
            return Err(KernelError::UnfitDevice { adapter: summary.name, missing: missing.join(", ") });
        }
        let mut gpu = Self {
            inner: Arc::new(GpuInner {
                device,
                queue,
                summary,
                checked: options.checked,
                kernels: Mutex::new(HashMap::new()),
                pipeline_cache: None,
                tuning: options.pipeline_cache.as_ref().map(|folder| Tuning::open(&adapter.get_info(), folder)),
                compile_nanos: AtomicU64::new(0),
                staging: Mutex::new(Vec::new()),
                fault: Arc::new(Mutex::new(None)),
            }),
        };
        if let Some(folder) = &options.pipeline_cache
            && features.contains(wgpu::Features::PIPELINE_CACHE)
        {
            let cache = gpu.catch(|device, _| PipelineCache::open(device, &adapter.get_info(), folder));
            Arc::get_mut(&mut gpu.inner).expect("nobody shares it yet").pipeline_cache = cache;
        }
        Ok(gpu)
    }

    /// Runs `work`, which calls wgpu, and keeps the first error that it raises for [`Gpu::check`].
    pub(crate) fn catch<T>(&self, work: impl FnOnce(&wgpu::Device, &wgpu::Queue) -> T) -> T {
        let (result, fault) = self.scoped(work);
        if let Some(fault) = fault {
            // The first error is the cause, later ones are its echoes.
            self.inner.fault.lock().expect("no panic happens while the fault is held").get_or_insert(fault);
        }
        result
    }

    /// Runs `work`, which calls wgpu, and returns with its result the first error that it raises. Error scopes leave alone
    /// whatever else the program does with the device, on this thread and on others.
    pub(crate) fn scoped<T>(&self, work: impl FnOnce(&wgpu::Device, &wgpu::Queue) -> T) -> (T, Option<Fault>) {
        use wgpu::ErrorFilter as F;
        let inner = &*self.inner;
        // Variables, so that a panic ends them in this order too.
        let internal = inner.device.push_error_scope(F::Internal);
        let memory = inner.device.push_error_scope(F::OutOfMemory);
        let validation = inner.device.push_error_scope(F::Validation);
        let result = work(&inner.device, &inner.queue);
        // Every scope is ended, the last one first.
        let errors = [validation, memory, internal].map(|scope| pollster::block_on(scope.pop()));
        let fault = errors.into_iter().flatten().next().map(|error| Fault {
            out_of_memory: matches!(error, wgpu::Error::OutOfMemory { .. }),
            reason: error.to_string(),
        });
        (result, fault)
    }

    /// Every adapter of this machine, best first: discrete, integrated, virtual, CPU.
    pub fn adapters() -> Vec<AdapterSummary> {
        summaries(&ranked_adapters(), &GpuOptions::default())
    }

    /// The adapter this device was opened on.
    pub fn summary(&self) -> &AdapterSummary {
        &self.inner.summary
    }

    /// Limits and features of the opened device.
    pub fn caps(&self) -> &DeviceCaps {
        &self.inner.summary.caps
    }

    /// Whether shaders carry run-time bounds checks.
    pub fn is_checked(&self) -> bool {
        self.inner.checked
    }

    /// Time that compiling kernels has taken so far.
    pub fn compile_time(&self) -> Duration {
        Duration::from_nanos(self.inner.compile_nanos.load(Ordering::Relaxed))
    }

    /// Writes `bytes` at `offset` bytes into `tensor`, before any work submitted later.
    pub fn write(&self, tensor: &Tensor, offset: u64, bytes: &[u8]) {
        self.catch(|_, queue| queue.write_buffer(&tensor.buffer, tensor.offset + offset, bytes));
    }

    /// Reports the first error the device has raised since the last call.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn check(&self) -> Result<()> {
        match self.take_fault() {
            None => Ok(()),
            Some(fault) => Err(KernelError::Device { adapter: self.summary().name.clone(), reason: fault.reason }),
        }
    }

    /// Waits until all submitted work is done.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn wait_idle(&self) -> Result<()> {
        self.poll(true)?;
        self.check()
    }

    /// Lets finished readbacks complete; blocks for all submitted work when `wait`.
    ///
    /// # Errors
    /// [`KernelError::Device`] if the device is lost.
    pub(crate) fn poll(&self, wait: bool) -> Result<()> {
        self.poll_as(if wait { wgpu::PollType::wait_indefinitely() } else { wgpu::PollType::Poll })
    }

    /// Waits for a submit and all before it, and calls who waits for them; of no submit, calls who waits for what is done.
    ///
    /// # Errors
    /// As [`Gpu::poll`].
    pub(crate) fn wait_for(&self, submission: Option<wgpu::SubmissionIndex>) -> Result<()> {
        self.poll_as(match submission {
            Some(index) => wgpu::PollType::Wait { submission_index: Some(index), timeout: None },
            None => wgpu::PollType::Poll,
        })
    }

    fn poll_as(&self, kind: wgpu::PollType) -> Result<()> {
        match self.inner.device.poll(kind) {
            Ok(_) => Ok(()),
            Err(error) => {
                self.check()?;
                Err(KernelError::Device { adapter: self.summary().name.clone(), reason: error.to_string() })
            }
        }
    }

    /// A buffer of `size` bytes, and up to [`BUFFER_UNIT`] more.
    pub(crate) fn create_buffer(&self, label: &str, size: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        let size = size.next_multiple_of(BUFFER_UNIT).min(self.caps().max_storage_binding_bytes.max(size));
        self.create(&wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false })
    }

    /// As [`Gpu::create_buffer`]; the buffer is mapped and full of zeros, which this thread writes.
    pub(crate) fn create_mapped_buffer(
        &self,
        label: &str,
        size: u64,
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer> {
        self.create(&wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: true })
    }

    fn create(&self, descriptor: &wgpu::BufferDescriptor<'_>) -> Result<wgpu::Buffer> {
        let &wgpu::BufferDescriptor { label, size, usage, .. } = descriptor;
        let limit = self.caps().max_buffer_bytes.min(if usage.contains(wgpu::BufferUsages::STORAGE) {
            self.caps().max_storage_binding_bytes
        } else {
            u64::MAX
        });
        let adapter = || self.summary().name.clone();
        let refuse = |reason: String| {
            let label = label.unwrap_or_default().to_owned();
            KernelError::OutOfMemory { adapter: adapter(), label, bytes: size, reason }
        };
        if size > limit {
            return Err(refuse(format!("one buffer may have {limit} bytes")));
        }
        // Not kept for whoever checks next, which may be another thread.
        match self.scoped(|device, _| device.create_buffer(descriptor)) {
            (buffer, None) => Ok(buffer),
            (_, Some(fault)) if fault.out_of_memory => Err(refuse(fault.reason)),
            (_, Some(fault)) => Err(KernelError::Device { adapter: adapter(), reason: fault.reason }),
        }
    }

    fn take_fault(&self) -> Option<Fault> {
        self.inner.fault.lock().expect("no panic happens while the fault is held").take()
    }
}

fn ranked_adapters() -> Vec<wgpu::Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    // Our indirect counts come from our own kernel, clamped there; wgpu's validation would add a dispatch to
    // each of them and triple its cost.
    descriptor.flags = wgpu::InstanceFlags::empty();
    let instance = wgpu::Instance::new(descriptor);
    let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    // Stable: adapters of one kind keep the driver's order.
    adapters.sort_by_key(|adapter| kind(&adapter.get_info()));
    adapters
}

fn kind(info: &wgpu::AdapterInfo) -> AdapterKind {
    match info.device_type {
        wgpu::DeviceType::DiscreteGpu => AdapterKind::Discrete,
        wgpu::DeviceType::IntegratedGpu => AdapterKind::Integrated,
        wgpu::DeviceType::VirtualGpu => AdapterKind::Virtual,
        wgpu::DeviceType::Other => AdapterKind::Other,
        wgpu::DeviceType::Cpu => AdapterKind::Cpu,
    }
}

/// What a kernel with cooperative matrices needs beside subgroups.
const COOPERATIVE: wgpu::Features = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
    .union(wgpu::Features::SHADER_F16)
    .union(wgpu::Features::SUBGROUP_BARRIER);

/// Rows, columns and depth of cooperative matrices that kernels have variants for, best first.
const MATRIX_EDGES: [u32; 2] = [16, 8];

/// Of [`MATRIX_EDGES`] the first whose matrices of f16 subgroups of `adapter` multiply into f32. Where subgroups vary in size, how
/// many a workgroup has is unknown, and with it who multiplies what.
fn matrix_edge(adapter: &wgpu::Adapter) -> Option<u32> {
    let (smallest, largest) = subgroup_sizes(&adapter.get_info());
    if smallest != largest || !adapter.features().contains(COOPERATIVE | wgpu::Features::SUBGROUP) {
        return None;
    }
    let offered = adapter.cooperative_matrix_properties();
    MATRIX_EDGES.into_iter().find(|&edge| {
        offered.iter().any(|matrix| {
            [matrix.m_size, matrix.n_size, matrix.k_size] == [edge; 3]
                && matrix.ab_type == wgpu::CooperativeScalarType::F16
                && matrix.cr_type == wgpu::CooperativeScalarType::F32
        })
    })
}

/// Smallest and largest subgroup of an adapter. Metal does not tell, so wgpu says 4 to 64; Apple's own GPUs have 32, a number that
/// Apple's MLX rests on, too: <https://github.com/ml-explore/mlx/blob/main/mlx/backend/metal/matmul.cpp>.
fn subgroup_sizes(info: &wgpu::AdapterInfo) -> (u32, u32) {
    if info.backend == wgpu::Backend::Metal && info.name.starts_with("Apple") {
        return (32, 32);
    }
    (info.subgroup_min_size, info.subgroup_max_size)
}

/// The features and limits a device is opened with: the adapter's own limits, not WebGPU's defaults.
fn wanted(adapter: &wgpu::Adapter, options: &GpuOptions) -> (wgpu::Features, wgpu::Limits) {
    use wgpu::Features as F;
    let mut features = F::TIMESTAMP_QUERY | F::TIMESTAMP_QUERY_INSIDE_ENCODERS | F::MEMORY_DECORATION_COHERENT;
    if options.pipeline_cache.is_some() {
        features |= F::PIPELINE_CACHE;
    }
    if options.subgroups {
        features |= F::SUBGROUP;
        // A software rasteriser's matrices are loops over its lanes.
        let is_cpu = adapter.get_info().device_type == wgpu::DeviceType::Cpu && !options.software_as_gpu;
        if options.cooperative_matrices && !is_cpu && matrix_edge(adapter).is_some() {
            features |= COOPERATIVE;
        }
    }
    let mut limits = if options.webgpu_limits {
        wgpu::Limits::default().or_worse_values_from(&adapter.limits())
    } else {
        adapter.limits()
    };
    if let Some(bytes) = options.max_binding_bytes {
        limits.max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size.min(bytes);
    }
    (features & adapter.features(), limits)
}

/// What stands between a device of these limits and the kernels. All run within WebGPU's default limits, so those are what is
/// needed of the limits that concern kernels; how large buffers may be decides only which models fit.
fn missing(adapter: &wgpu::Adapter, offered: &wgpu::Limits, is_cpu: bool) -> Vec<String> {
    let least = wgpu::Limits::default();
    let mut needed = wgpu::Limits {
        max_bind_groups: 1,
        max_storage_buffers_per_shader_stage: least.max_storage_buffers_per_shader_stage,
        max_uniform_buffer_binding_size: least.max_uniform_buffer_binding_size,
        max_compute_workgroup_storage_size: least.max_compute_workgroup_storage_size,
        max_compute_invocations_per_workgroup: least.max_compute_invocations_per_workgroup,
        max_compute_workgroup_size_x: least.max_compute_workgroup_size_x,
        max_compute_workgroups_per_dimension: least.max_compute_workgroups_per_dimension,
        ..offered.clone()
    };
    if is_cpu {
        // Weights are read from textures there.
        needed.max_texture_dimension_2d = TEXEL_ROW;
        needed.max_storage_textures_per_shader_stage = 1;
    }
    let mut missing = Vec::new();
    needed.check_limits_with_fail_fn(offered, false, |name, needed, found| {
        missing.push(format!("{name} of {needed} (it has {found})"));
    });
    let flags = wgpu::DownlevelFlags::COMPUTE_SHADERS | wgpu::DownlevelFlags::INDIRECT_EXECUTION;
    let absent = flags - adapter.get_downlevel_capabilities().flags;
    missing.extend(absent.iter_names().map(|(name, _)| name.to_owned()));
    missing
}

fn summaries(adapters: &[wgpu::Adapter], options: &GpuOptions) -> Vec<AdapterSummary> {
    let summarise = |(index, adapter)| {
        let (features, limits) = wanted(adapter, options);
        summarise(index, adapter, features, &limits)
    };
    adapters.iter().enumerate().map(summarise).collect()
}

/// What a device with `features` and `limits` on `adapter` offers.
fn summarise(index: usize, adapter: &wgpu::Adapter, features: wgpu::Features, limits: &wgpu::Limits) -> AdapterSummary {
    let info = adapter.get_info();
    let caps = DeviceCaps {
        subgroup_sizes: features.contains(wgpu::Features::SUBGROUP).then_some(subgroup_sizes(&info)),
        shader_f16: adapter.features().contains(wgpu::Features::SHADER_F16),
        cooperative_matrices: matrix_edge(adapter)
            .filter(|_| features.contains(COOPERATIVE | wgpu::Features::SUBGROUP)),
        packed_dots: matches!(info.backend, wgpu::Backend::Vulkan | wgpu::Backend::Dx12),
        coherent_storage: features.contains(wgpu::Features::MEMORY_DECORATION_COHERENT),
        timestamps: features
            .contains(wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS),
        max_storage_binding_bytes: limits.max_storage_buffer_binding_size,
        max_buffer_bytes: limits.max_buffer_size,
        max_workgroup_storage_bytes: limits.max_compute_workgroup_storage_size,
        max_workgroup_size: limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x),
        max_workgroups: limits.max_compute_workgroups_per_dimension,
        max_storage_buffers: limits.max_storage_buffers_per_shader_stage,
        uniform_alignment: limits.min_uniform_buffer_offset_alignment,
        storage_alignment: limits.min_storage_buffer_offset_alignment,
        is_cpu: info.device_type == wgpu::DeviceType::Cpu,
    };
    AdapterSummary {
        index,
        kind: kind(&info),
        backend: info.backend.to_string(),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        name: info.name,
        caps,
        memory_bytes: device_local_bytes(adapter),
    }
}

/// Size of the largest device-local heap. wgpu itself does not tell; Vulkan does.
fn device_local_bytes(adapter: &wgpu::Adapter) -> Option<u64> {
    #[cfg(not(target_vendor = "apple"))]
    {
        // SAFETY: the raw handles are used for one read-only query while the adapter is alive.
        unsafe {
            let vulkan = adapter.as_hal::<wgpu::hal::api::Vulkan>()?;
            let properties = vulkan
                .shared_instance()
                .raw_instance()
                .get_physical_device_memory_properties(vulkan.raw_physical_device());
            let heaps = &properties.memory_heaps[..properties.memory_heap_count as usize];
            // Bit 0 of a heap's flags is VK_MEMORY_HEAP_DEVICE_LOCAL_BIT.
            heaps.iter().filter(|heap| heap.flags.as_raw() & 1 != 0).map(|heap| heap.size).max()
        }
    }
    #[cfg(target_vendor = "apple")]
    {
        let _ = adapter;
        None
    }
}
