//! [`DeviceCaps`]: what a device offers, read once and asked by kernels when they specialise.

/// How lanes exchange values inside a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lanes {
    /// Subgroup operations over `width` lanes; `width` divides every subgroup size the device may use.
    Subgroup {
        /// Lanes that reduce together: a power of two, 4 to 32.
        width: u32,
    },
    /// Workgroup memory and barriers.
    Workgroup {
        /// Lanes that reduce together: a power of two.
        width: u32,
    },
}

impl Lanes {
    /// Lanes that reduce together.
    pub fn width(self) -> u32 {
        match self {
            Lanes::Subgroup { width } | Lanes::Workgroup { width } => width,
        }
    }

    /// Whether subgroup operations are used.
    pub fn uses_subgroups(self) -> bool {
        matches!(self, Lanes::Subgroup { .. })
    }
}

/// Limits and features that kernels depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceCaps {
    /// Smallest and largest subgroup size, where subgroup operations are enabled.
    pub subgroup_sizes: Option<(u32, u32)>,
    /// Whether the adapter computes in `f16`; reported only: but for cooperative matrices, kernels read half floats
    /// packed in `u32`.
    pub shader_f16: bool,
    /// Rows, columns and depth of the matrices of f16 that subgroups, all of one size, multiply into sums in f32, where they do: 16, or
    /// Metal's 8.
    pub cooperative_matrices: Option<u32>,
    /// Whether `dot4I8Packed` is an instruction, not a dozen.
    pub packed_dots: bool,
    /// Whether storage can be declared coherent, so that workgroups of one dispatch see what others write.
    pub coherent_storage: bool,
    /// Whether timestamps can be written around passes.
    pub timestamps: bool,
    /// Largest storage binding, bytes.
    pub max_storage_binding_bytes: u64,
    /// Largest buffer, bytes.
    pub max_buffer_bytes: u64,
    /// Workgroup memory of one workgroup, bytes. wgpu does not check it; we do.
    pub max_workgroup_storage_bytes: u32,
    /// Invocations of one workgroup.
    pub max_workgroup_size: u32,
    /// Workgroups in one dimension of a dispatch.
    pub max_workgroups: u32,
    /// Storage buffers one stage can bind.
    pub max_storage_buffers: u32,
    /// Alignment of uniform binding offsets, bytes.
    pub uniform_alignment: u32,
    /// Alignment of storage binding offsets, bytes.
    pub storage_alignment: u32,
    /// Whether the adapter is a software rasteriser, where barriers and threads are dear.
    pub is_cpu: bool,
}

impl DeviceCaps {
    /// How reductions over lanes are done here.
    pub fn lanes(&self) -> Lanes {
        match self.subgroup_sizes {
            Some((min, _)) if min >= 4 => Lanes::Subgroup { width: min.min(32) },
            _ if self.is_cpu => Lanes::Workgroup { width: 8 },
            _ => Lanes::Workgroup { width: 16 },
        }
    }
}
