//! Every specialisation of every kernel in the languages of the backends, without a GPU: SPIR-V (checked by
//! spirv-val), HLSL and MSL; where it multiplies cooperative matrices SPIR-V, and of 8x8 MSL. What runs on Vulkan must not
//! break DX12 and Metal unseen.

mod common;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write as _};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Declared, bindings, distinct, parse, uses_matrices, uses_subgroups};
use mor_kernels::variants::{Variant, WEBGPU_STORAGE_BUFFERS};
use naga::back::{hlsl, msl, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::ModuleInfo;
use naga::{AddressSpace, Module};

/// Buffers that Metal binds to a stage.
const METAL_BUFFERS: u8 = 31;

/// What naga writes, validators refuse and drivers take as it is meant: a rule, and one of the words that its message has besides. The
/// types of workgroup memory and of functions' variables have strides and offsets (<https://github.com/gfx-rs/wgpu/issues/7696>), largest
/// coordinates of textures, in checked shaders, the other sign (<https://github.com/gfx-rs/wgpu/issues/4581>), and barriers of a
/// subgroup name its memory, which Vulkan has none of. To be removed with the first wgpu that contains their fixes.
const KNOWN_ISSUES: [(&str, &[&str]); 3] = [
    ("VUID-StandaloneSpirv-None-10684", &["_Workgroup_", "_Function_"]),
    ("OpConstantComposite Constituent", &["%int_1"]),
    ("VUID-StandaloneSpirv-MemorySemantics-10870", &["ControlBarrier"]),
];

/// What validators of before SPV_KHR_cooperative_matrix (SPIRV-Tools 2023.4) say of its capability, at their first line.
const UNKNOWN_MATRICES: &str = "Invalid capability operand: 6022";

/// What the translations and spirv-val found.
#[derive(Default)]
struct Counts {
    modules: AtomicUsize,
    validated: AtomicUsize,
    known_issues: AtomicUsize,
    unknown_matrices: AtomicUsize,
}

/// The translations of one variant: shaders are compiled with run-time checks and, by default, without.
#[derive(Clone, Copy)]
struct Profile {
    checked: bool,
    spirv: (u8, u8),
    vulkan: &'static str,
    msl: (u8, u8),
}

/// The oldest languages with all checks, the newest with none, as wgpu pairs SPIR-V with Vulkan.
const PROFILES: [Profile; 2] = [
    Profile { checked: true, spirv: (1, 3), vulkan: "vulkan1.1", msl: (2, 3) },
    Profile { checked: false, spirv: (1, 6), vulkan: "vulkan1.3", msl: (3, 0) },
];

impl Profile {
    fn policies(self) -> BoundsCheckPolicies {
        let policy = if self.checked { BoundsCheckPolicy::Restrict } else { BoundsCheckPolicy::Unchecked };
        BoundsCheckPolicies { index: policy, buffer: policy, image_load: policy, binding_array: policy }
    }
}

#[test]
fn every_variant_translates() {
    let validate = match std::env::var("MOR_TEST_SPIRV_VAL").as_deref() {
        Ok("skip") => false,
        _ => {
            spirv_val_exists();
            true
        }
    };
    let variants = distinct();
    let (counts, next) = (Counts::default(), AtomicUsize::new(0));
    let failures: Vec<String> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..std::thread::available_parallelism().map_or(1, usize::from))
            .map(|_| {
                scope.spawn(|| {
                    let mut failures = Vec::new();
                    while let Some(variant) = variants.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let result = translate(variant, validate, &counts);
                        failures.extend(result.err().map(|error| format!("{}: {error}", variant.description)));
                    }
                    failures
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker panicked")).collect()
    });
    let mut per_kernel = BTreeMap::<_, usize>::new();
    for variant in variants {
        *per_kernel.entry(variant.kernel).or_default() += 1;
    }
    let count = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    println!("{} variants to SPIR-V, HLSL and MSL: {per_kernel:?}", variants.len());
    println!(
        "{} SPIR-V modules, {} passed spirv-val, {} more but for known issues, {} with matrices it is too old for{}",
        count(&counts.modules),
        count(&counts.validated),
        count(&counts.known_issues),
        count(&counts.unknown_matrices),
        if validate { "" } else { " (skipped by MOR_TEST_SPIRV_VAL)" },
    );
    assert!(failures.is_empty(), "{} failures, the first:\n{}", failures.len(), failures[0]);
}

/// Barriers of a SPIR-V module that order memory for the whole device.
fn device_barriers(words: &[u32]) -> usize {
    const HEADER_WORDS: usize = 5;
    const OP_CONSTANT: u32 = 43;
    const OP_CONTROL_BARRIER: u32 = 224;
    const SCOPE_DEVICE: u32 = 1;
    let mut instructions = Vec::new();
    let mut rest = &words[HEADER_WORDS..];
    while let Some(first) = rest.first() {
        let (instruction, others) = rest.split_at((first >> 16) as usize);
        instructions.push((first & 0xffff, &instruction[1..]));
        rest = others;
    }
    let devices: Vec<u32> = instructions
        .iter()
        .filter(|(opcode, operands)| *opcode == OP_CONSTANT && operands[2..] == [SCOPE_DEVICE])
        .map(|(_, operands)| operands[1])
        .collect();
    // Of the operands, the second is the scope of memory.
    instructions.iter().filter(|(op, operands)| *op == OP_CONTROL_BARRIER && devices.contains(&operands[1])).count()
}

fn is_known(error: &str) -> bool {
    KNOWN_ISSUES.iter().any(|(rule, words)| error.contains(rule) && words.iter().any(|word| error.contains(word)))
}

fn translate(variant: &Variant, validate: bool, counts: &Counts) -> Result<(), String> {
    let (module, info) = parse(variant);
    for profile in PROFILES {
        let words = to_spirv(&module, &info, profile)?;
        counts.modules.fetch_add(1, Ordering::Relaxed);
        // One before workgroups count themselves in, and one before the last of them reads what others left.
        if variant.flags.contains(&"PARTED") && device_barriers(&words) < 2 {
            return Err("storageBarrier is no barrier of the device, which sums of parts rest on".to_owned());
        }
        if validate {
            match spirv_val(&words, profile.vulkan) {
                Ok(()) => counts.validated.fetch_add(1, Ordering::Relaxed),
                // The validator stops at its first error: what follows stays unseen there.
                Err(error) if is_known(&error) => counts.known_issues.fetch_add(1, Ordering::Relaxed),
                Err(error) if error.contains(UNKNOWN_MATRICES) && uses_matrices(variant) => {
                    counts.unknown_matrices.fetch_add(1, Ordering::Relaxed)
                }
                Err(error) => return Err(format!("spirv-val --target-env {}: {error}", profile.vulkan)),
            };
        }
        // naga writes no HLSL of matrices, and of 16x16 no usable MSL: DX12 reports none, and Metal those of 8x8 alone.
        if !uses_matrices(variant) {
            check_hlsl(variant, &module, &info, profile)?;
        }
        if !uses_matrices(variant) || variant.flags.contains(&"EDGE_8") {
            check_msl(variant, &module, &info, profile)?;
        }
    }
    Ok(())
}

fn to_spirv(module: &Module, info: &ModuleInfo, profile: Profile) -> Result<Vec<u32>, String> {
    let options = spv::Options {
        lang_version: profile.spirv,
        flags: spv::WriterFlags::DEBUG,
        bounds_check_policies: profile.policies(),
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        force_loop_bounding: profile.checked,
        ..spv::Options::default()
    };
    spv::write_vec(module, info, &options, None).map_err(|error| format!("SPIR-V: {error}"))
}

/// # Panics
/// If there is no spirv-val: a test that skips itself is not counted.
fn spirv_val_exists() {
    let found = Command::new("spirv-val").arg("--version").stdout(Stdio::null()).status();
    if let Err(error) = found {
        let reason =
            if error.kind() == ErrorKind::NotFound { "is not installed".to_owned() } else { error.to_string() };
        panic!("spirv-val {reason}; install the package spirv-tools, or set MOR_TEST_SPIRV_VAL=skip");
    }
}

fn spirv_val(words: &[u32], environment: &str) -> Result<(), String> {
    let mut tool = Command::new("spirv-val")
        .args(["--target-env", environment, "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut input = tool.stdin.take().expect("it is piped");
    input.write_all(&bytes).map_err(|error| error.to_string())?;
    drop(input);
    let output = tool.wait_with_output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

fn check_hlsl(variant: &Variant, module: &Module, info: &ModuleInfo, profile: Profile) -> Result<(), String> {
    let subgroups = uses_subgroups(variant);
    let options = hlsl::Options {
        // Wave operations came with 6.0; what does without them must stay within reach of the old compiler.
        shader_model: if subgroups { hlsl::ShaderModel::V6_0 } else { hlsl::ShaderModel::V5_1 },
        zero_initialize_workgroup_memory: false,
        restrict_indexing: profile.checked,
        force_loop_bounding: profile.checked,
        ..hlsl::Options::default()
    };
    let mut text = String::new();
    let reflection = hlsl::Writer::new(&mut text, &options, &hlsl::PipelineOptions::default())
        .write(module, info, None)
        .map_err(|error| format!("HLSL: {error}"))?;
    entry_point("HLSL", &reflection.entry_point_names)?;
    if !subgroups && text.contains("Wave") {
        return Err("HLSL: wave operations without the SUBGROUP flag".to_owned());
    }
    if is_coherent(variant) != text.contains("globallycoherent ") {
        return Err("HLSL: what is coherent in WGSL, and nothing else".to_owned());
    }
    // 16-bit types and 64-bit integers need later shader models than these.
    for word in text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
        if ["float16_t", "half", "int16_t", "uint16_t", "int64_t", "uint64_t", "double"].contains(&word) {
            return Err(format!("HLSL: type {word}"));
        }
    }
    Ok(())
}

fn check_msl(variant: &Variant, module: &Module, info: &ModuleInfo, profile: Profile) -> Result<(), String> {
    // As wgpu assigns them: the buffers in order, then the sizes of the unsized arrays; textures count by themselves.
    let mut resources = msl::BindingMap::default();
    let mut slot: msl::Slot = 0;
    for (binding, _, declared) in bindings(module) {
        let target = if declared == Declared::Texture {
            msl::BindTarget { texture: Some(0), ..msl::BindTarget::default() }
        } else {
            slot += 1;
            let mutable = declared == Declared::Write;
            msl::BindTarget { buffer: Some(slot - 1), mutable, ..msl::BindTarget::default() }
        };
        resources.insert(naga::ResourceBinding { group: 0, binding }, target);
    }
    let resources = msl::EntryPointResources { resources, immediates_buffer: None, sizes_buffer: Some(slot) };
    let options = msl::Options {
        lang_version: profile.msl,
        per_entry_point_map: [("main".to_owned(), resources)].into(),
        fake_missing_bindings: false,
        bounds_check_policies: profile.policies(),
        zero_initialize_workgroup_memory: false,
        force_loop_bounding: profile.checked,
        ..msl::Options::default()
    };
    let (text, translation) = msl::write_string(module, info, &options, &msl::PipelineOptions::default())
        .map_err(|error| format!("MSL: {error}"))?;
    entry_point("MSL", &translation.entry_point_names)?;
    // Metal's functions take pointers to what matrices are made of.
    if uses_matrices(variant)
        && (!text.contains("NagaCooperativeLoad(&tiles.inner[") || !text.contains(", &results.inner["))
    {
        return Err("MSL: matrices come from and go to arrays of scalars".to_owned());
    }
    if is_coherent(variant) != text.contains("coherent device") {
        return Err("MSL: what is coherent in WGSL, and nothing else".to_owned());
    }
    for slot in text.split("[[buffer(").skip(1) {
        let slot: u8 =
            slot.split(')').next().and_then(|digits| digits.parse().ok()).ok_or("MSL: a slot is no number")?;
        if slot >= METAL_BUFFERS {
            return Err(format!("MSL: buffer {slot} of {METAL_BUFFERS}"));
        }
    }
    Ok(())
}

/// Whether workgroups of a dispatch see in some buffer what others write.
fn is_coherent(variant: &Variant) -> bool {
    variant.wgsl.contains("@coherent")
}

fn entry_point<E: std::fmt::Display>(language: &str, names: &[Result<String, E>]) -> Result<(), String> {
    match names {
        [Ok(_)] => Ok(()),
        [Err(error)] => Err(format!("{language}: {error}")),
        _ => Err(format!("{language}: {} entry points", names.len())),
    }
}

#[test]
fn every_variant_keeps_the_limits() {
    for variant in distinct() {
        let what = &variant.description;
        let (module, info) = parse(variant);
        let [entry] = &module.entry_points[..] else { panic!("{what}: one entry point") };
        assert_eq!(entry.name, "main", "{what}");

        let uses = info.get_entry_point(0);
        let (mut declared, mut rounded) = (0, 0);
        for (handle, variable) in module.global_variables.iter() {
            let name = variable.name.as_deref().unwrap_or_default();
            assert!(!uses[handle].is_empty(), "{what}: {name} is declared and not used");
            if variable.space == AddressSpace::WorkGroup {
                let bytes = module.types[variable.ty].inner.size(module.to_ctx());
                declared += bytes;
                // As WebGPU and Metal count.
                rounded += bytes.next_multiple_of(16);
            }
        }
        let claimed = variant.workgroup_storage_bytes;
        assert_eq!(claimed, declared, "{what}: workgroup_storage_bytes");
        let limit = variant.caps.max_workgroup_storage_bytes;
        assert!(rounded <= limit, "{what}: {rounded} bytes of workgroup memory, {limit} exist");

        let threads: u32 = entry.workgroup_size.iter().product();
        assert!(threads <= variant.caps.max_workgroup_size, "{what}: {threads} threads");
        if variant.has_webgpu_limits() {
            let is_storage = |declared: Declared| matches!(declared, Declared::Read | Declared::Write);
            let storage = bindings(&module).iter().filter(|(.., declared)| is_storage(*declared)).count();
            assert!(storage <= WEBGPU_STORAGE_BUFFERS as usize, "{what}: {storage} storage buffers");
        }
    }
}
