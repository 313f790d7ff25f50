//! What the tests without a GPU share: specialisations seen through naga.

use std::collections::HashSet;
use std::sync::LazyLock;

use mor_kernels::variants::{self, Variant};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, StorageAccess};

/// One variant of every text: the first that has it, those with WebGPU's limits before the others.
pub(crate) fn distinct() -> &'static [Variant] {
    static DISTINCT: LazyLock<Vec<Variant>> = LazyLock::new(|| {
        let mut variants = variants::all();
        variants.sort_by_key(|variant| !variant.has_webgpu_limits());
        let mut seen = HashSet::new();
        variants.retain(|variant| seen.insert(variant.wgsl.clone()));
        variants
    });
    &DISTINCT
}

/// Parses and validates; subgroup operations pass only where the specialisation asks for them.
pub(crate) fn parse(variant: &Variant) -> (Module, ModuleInfo) {
    let fail = |error: String| -> ! { panic!("{}: {error}\n{}", variant.description, variant.wgsl) };
    let module = naga::front::wgsl::parse_str(&variant.wgsl)
        .unwrap_or_else(|error| fail(error.emit_to_string_with_path(&variant.wgsl, variant.kernel)));
    // Packed half floats (unpack2x16float) are part of WebGPU; f16 types are not, and stay refused but for matrices.
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    capabilities.set(Capabilities::SUBGROUP, uses_subgroups(variant));
    capabilities.set(Capabilities::MEMORY_DECORATION_COHERENT, variant.caps.coherent_storage);
    let matrices = Capabilities::COOPERATIVE_MATRIX | Capabilities::SHADER_FLOAT16 | Capabilities::SUBGROUP_BARRIER;
    capabilities.set(matrices, uses_matrices(variant));
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .validate(&module)
        .unwrap_or_else(|error| fail(error.emit_to_string_with_path(&variant.wgsl, variant.kernel)));
    (module, info)
}

/// Whether the specialisation uses subgroup operations or builtins.
pub(crate) fn uses_subgroups(variant: &Variant) -> bool {
    let asks = |flag: &&str| matches!(*flag, "SUBGROUP" | "BROADCAST" | "COOPERATIVE");
    variant.flags.iter().any(asks)
}

/// Whether the specialisation multiplies cooperative matrices, which Vulkan offers and, of 8x8, Metal.
pub(crate) fn uses_matrices(variant: &Variant) -> bool {
    variant.flags.contains(&"COOPERATIVE")
}

/// How the shader declares a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Declared {
    Uniform,
    Read,
    Write,
    Texture,
}

/// Every binding as (index, name, access), ascending.
pub(crate) fn bindings(module: &Module) -> Vec<(u32, String, Declared)> {
    let mut bindings = Vec::new();
    for (_, variable) in module.global_variables.iter() {
        let Some(binding) = variable.binding else { continue };
        assert_eq!(binding.group, 0, "all bindings are in group 0");
        let declared = match variable.space {
            AddressSpace::Uniform => Declared::Uniform,
            AddressSpace::Storage { access } if access == StorageAccess::LOAD => Declared::Read,
            AddressSpace::Storage { .. } => Declared::Write,
            AddressSpace::Handle => Declared::Texture,
            other => panic!("binding {} in {other:?}", binding.binding),
        };
        bindings.push((binding.binding, variable.name.clone().expect("bindings have names"), declared));
    }
    bindings.sort_by_key(|(index, ..)| *index);
    bindings
}
