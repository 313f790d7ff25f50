//! [`KernelError`]: everything that can go wrong between a kernel's Rust side and the device.

/// Result of a fallible kernel or device operation.
pub type Result<T, E = KernelError> = std::result::Result<T, E>;

/// An error of the device layer. Messages say where, what was found, what was expected and what to do.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No adapter answers, or none fits the request.
    #[error(
        "no GPU adapter {wanted}; found: {found}; install a Vulkan, Metal or DX12 driver (a software one is enough: package mesa-vulkan-drivers on Debian), or choose another with --device"
    )]
    NoAdapter {
        /// What was asked for.
        wanted: String,
        /// The adapters that exist.
        found: String,
    },
    /// The adapter refused to open a device.
    #[error("cannot open a device on \"{adapter}\": {reason}")]
    OpenDevice {
        /// Adapter name.
        adapter: String,
        /// The driver's own words.
        reason: String,
    },
    /// A device was created with less than kernels need.
    #[error(
        "the device on \"{adapter}\" lacks what kernels need: {missing}; create it with Gpu::device_descriptor, or choose another adapter"
    )]
    UnfitDevice {
        /// Adapter name.
        adapter: String,
        /// Limits and capabilities, by their names in wgpu.
        missing: String,
    },
    /// A buffer does not fit the device.
    #[error(
        "out of GPU memory on \"{adapter}\": \"{label}\" needs {bytes} bytes; {reason}; use a smaller model, a shorter context or another --device"
    )]
    OutOfMemory {
        /// Adapter name.
        adapter: String,
        /// What was to be allocated.
        label: String,
        /// Bytes asked for.
        bytes: u64,
        /// What stands in the way.
        reason: String,
    },
    /// A size is over a limit of the device or of the kernel.
    #[error("{kernel}: {what} = {found} exceeds {limit}, the most that {why}; {advice}")]
    Limit {
        /// Kernel name.
        kernel: &'static str,
        /// The offending quantity.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The largest accepted value.
        limit: u64,
        /// Where the limit comes from.
        why: String,
        /// What to do about it.
        advice: &'static str,
    },
    /// A tensor or parameter does not have the shape the kernel needs.
    #[error("{kernel}: {what} has {found}, expected {expected}")]
    Shape {
        /// Kernel name.
        kernel: &'static str,
        /// The tensor or parameter.
        what: &'static str,
        /// What it has.
        found: String,
        /// What it should have.
        expected: String,
    },
    /// A shader did not compile: a bug of ours or of a driver.
    #[error("shader {kernel} was rejected on \"{adapter}\": {reason}")]
    Shader {
        /// Kernel name.
        kernel: String,
        /// Adapter name.
        adapter: String,
        /// The compiler's words against the specialised source.
        reason: String,
    },
    /// The device reported an error after work was handed to it.
    #[error(
        "the GPU \"{adapter}\" failed: {reason}; if it was reset by a watchdog, lower the prefill chunk (MOR_PREFILL_CHUNK) and try again"
    )]
    Device {
        /// Adapter name.
        adapter: String,
        /// The driver's own words.
        reason: String,
    },
}
