//! `mor devices`: the adapters of this machine and how they would be used.

use mor_kernels::Gpu;
use mor_kernels::caps::Lanes;
use mor_runtime::{AdapterKind, AdapterSummary};
use serde::Serialize;

use crate::args::DevicesArgs;
use crate::inspect::bytes_text;
use crate::{note, print, print_json};

/// What `--json` prints for an adapter.
#[derive(Debug, Serialize)]
struct Report {
    index: usize,
    name: String,
    kind: &'static str,
    backend: String,
    driver: String,
    /// Of the largest device-local heap, where the backend tells.
    memory_bytes: Option<u64>,
    profile: Profile,
    features: Features,
    limits: Limits,
}

/// How it would be used if nothing else is asked for.
#[derive(Debug, Serialize)]
struct Profile {
    dtype: &'static str,
    /// How lanes exchange values: `subgroup` or `workgroup`.
    lanes: &'static str,
    lane_width: u32,
}

#[derive(Debug, Serialize)]
struct Features {
    subgroup_sizes: Option<[u32; 2]>,
    shader_f16: bool,
    /// Rows, columns and depth of those that kernels multiply.
    cooperative_matrices: Option<[u32; 3]>,
    coherent_storage: bool,
    timestamps: bool,
}

#[derive(Debug, Serialize)]
struct Limits {
    max_buffer_bytes: u64,
    max_storage_binding_bytes: u64,
    max_workgroup_storage_bytes: u32,
    max_workgroup_size: u32,
    max_workgroups: u32,
    max_storage_buffers: u32,
}

pub(crate) fn run(args: &DevicesArgs) -> anyhow::Result<()> {
    let reports: Vec<Report> = Gpu::adapters().into_iter().map(Report::from).collect();
    if reports.is_empty() {
        // An empty list is a true answer, so this is no error.
        note(
            "warning: no adapter found; install a Vulkan, Metal or DX12 driver (a software one is enough: package \
             mesa-vulkan-drivers on Debian)",
        );
    }
    if args.json {
        return print_json(&reports);
    }
    let text: String = reports.iter().map(Report::to_text).collect::<Vec<_>>().join("\n");
    Ok(print(&text)?)
}

impl From<AdapterSummary> for Report {
    fn from(adapter: AdapterSummary) -> Self {
        let caps = &adapter.caps;
        let lanes = caps.lanes();
        Self {
            index: adapter.index,
            kind: adapter.kind.name(),
            profile: Profile {
                dtype: if adapter.kind == AdapterKind::Cpu { "f32" } else { "f16" },
                lanes: match lanes {
                    Lanes::Subgroup { .. } => "subgroup",
                    Lanes::Workgroup { .. } => "workgroup",
                },
                lane_width: lanes.width(),
            },
            features: Features {
                subgroup_sizes: caps.subgroup_sizes.map(|(min, max)| [min, max]),
                shader_f16: caps.shader_f16,
                cooperative_matrices: caps.cooperative_matrices.map(|edge| [edge; 3]),
                coherent_storage: caps.coherent_storage,
                timestamps: caps.timestamps,
            },
            limits: Limits {
                max_buffer_bytes: caps.max_buffer_bytes,
                max_storage_binding_bytes: caps.max_storage_binding_bytes,
                max_workgroup_storage_bytes: caps.max_workgroup_storage_bytes,
                max_workgroup_size: caps.max_workgroup_size,
                max_workgroups: caps.max_workgroups,
                max_storage_buffers: caps.max_storage_buffers,
            },
            memory_bytes: adapter.memory_bytes,
            name: adapter.name,
            backend: adapter.backend,
            driver: adapter.driver,
        }
    }
}

impl Report {
    fn to_text(&self) -> String {
        let Self { features, limits, profile, .. } = self;
        let yes_no = |on| if on { "yes" } else { "no" };
        let memory = self.memory_bytes.map_or("unknown".to_owned(), bytes_text);
        let subgroups = match features.subgroup_sizes {
            None => "none".to_owned(),
            Some([min, max]) if min == max => format!("of {min}"),
            Some([min, max]) => format!("of {min} to {max}"),
        };
        let matrices = features
            .cooperative_matrices
            .map_or("none".to_owned(), |size| format!("of {}", size.map(|n| n.to_string()).join("x")));
        let lanes = match profile.lanes {
            "subgroup" => "subgroup operations",
            _ => "workgroup memory",
        };
        [
            format!("{}  {} ({}, {})", self.index, self.name, self.kind, self.backend),
            format!("   driver    {}", self.driver),
            format!("   memory    {memory}"),
            format!("   profile   {} storage, {lanes} over {} lanes", profile.dtype, profile.lane_width),
            format!(
                "   features  subgroups {subgroups}, f16 arithmetic {}, cooperative matrices {matrices}, coherent storage {}, \
                 timestamps {}",
                yes_no(features.shader_f16),
                yes_no(features.coherent_storage),
                yes_no(features.timestamps)
            ),
            format!(
                "   limits    buffer {}, binding {}, workgroup memory {}, workgroup {}, workgroups {}, storage buffers {}",
                bytes_text(limits.max_buffer_bytes),
                bytes_text(limits.max_storage_binding_bytes),
                bytes_text(limits.max_workgroup_storage_bytes.into()),
                limits.max_workgroup_size,
                limits.max_workgroups,
                limits.max_storage_buffers
            ),
            String::new(),
        ]
        .join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mor_kernels::caps::DeviceCaps;

    #[test]
    fn an_adapter_is_described() {
        let caps = DeviceCaps {
            subgroup_sizes: Some((8, 32)),
            shader_f16: false,
            cooperative_matrices: None,
            packed_dots: false,
            coherent_storage: false,
            timestamps: true,
            max_storage_binding_bytes: 128 << 20,
            max_buffer_bytes: 1 << 30,
            max_workgroup_storage_bytes: 16 << 10,
            max_workgroup_size: 256,
            max_workgroups: 65535,
            max_storage_buffers: 8,
            uniform_alignment: 256,
            storage_alignment: 256,
            is_cpu: false,
        };
        let report = Report::from(AdapterSummary {
            index: 1,
            name: "Example".to_owned(),
            kind: AdapterKind::Integrated,
            backend: "vulkan".to_owned(),
            driver: "Mesa 25".to_owned(),
            caps,
            memory_bytes: None,
        });
        let text = report.to_text();
        assert!(text.starts_with("1  Example (integrated, vulkan)\n"), "{text}");
        assert!(text.contains("f16 storage, subgroup operations over 8 lanes"), "{text}");
        assert!(text.contains("subgroups of 8 to 32"), "{text}");
        assert!(text.contains("memory    unknown"), "{text}");
        assert!(text.contains("buffer 1.0 GiB, binding 128.0 MiB"), "{text}");
    }
}
