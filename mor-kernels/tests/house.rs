//! The structure of the kernels, without a GPU: four files a kernel, headers that say what reflection finds, mirrors
//! that match, and who may name what.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use common::{Declared, bindings, distinct, parse, uses_matrices};
use naga::{Module, ScalarKind, TypeInner};

/// Fields of a kernel file's header, in order, after the line with the kernel's name.
const HEADER_FIELDS: [&str; 9] = ["Math", "Why", "Shapes", "Bindings", "Grid", "Spec", "Limits", "Numerics", "Source"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Stems of the files with `extension` in `folder`, without those named in `except`.
fn stems(folder: &str, extension: &str, except: &[&str]) -> BTreeSet<String> {
    let entries = fs::read_dir(root().join(folder)).unwrap_or_else(|error| panic!("{folder}: {error}"));
    entries
        .map(|entry| entry.expect("the folder is readable").path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .map(|path| path.file_stem().expect("a file has a stem").to_string_lossy().into_owned())
        .filter(|stem| !except.contains(&stem.as_str()))
        .collect()
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
}

/// `text` without its line comments.
fn code(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_kernel_has_its_four_files() {
    let kernels: BTreeSet<String> = mor_shaders::kernel_names().map(str::to_owned).collect();
    assert_eq!(stems("shaders", "wgsl", &[]), kernels, "shaders/");
    assert_eq!(stems("mor-kernels/src/ops", "rs", &["mod"]), kernels, "mor-kernels/src/ops/");
    assert_eq!(stems("mor-kernels/src/oracle", "rs", &["mod"]), kernels, "mor-kernels/src/oracle/");
    assert_eq!(stems("benches/kernels", "rs", &["main"]), kernels, "benches/kernels/");
    let (ops, oracle) = (read("mor-kernels/src/ops/mod.rs"), read("mor-kernels/src/oracle/mod.rs"));
    let benches = read("benches/kernels/main.rs");
    for kernel in &kernels {
        assert!(ops.contains(&format!("pub mod {kernel};")), "ops/mod.rs lacks {kernel}");
        assert!(oracle.contains(&format!("pub mod {kernel};")), "oracle/mod.rs lacks {kernel}");
        assert!(benches.contains(&format!("mod {kernel};")), "benches/kernels/main.rs lacks mod {kernel}");
        let entry = format!("(\"{kernel}\", {kernel}::bench)");
        assert!(benches.contains(&entry), "benches/kernels/main.rs does not run {kernel}");
        let wrapper = read(&format!("mor-kernels/src/ops/{kernel}.rs"));
        assert!(wrapper.contains(&format!("const NAME: &'static str = \"{kernel}\";")), "ops/{kernel}.rs: NAME");
    }
}

#[test]
fn the_registry_reaches_every_kernel_and_branch() {
    let mut seen: BTreeMap<&str, Vec<BTreeSet<&str>>> = BTreeMap::new();
    for variant in distinct() {
        seen.entry(variant.kernel).or_default().push(variant.flags.iter().copied().collect());
    }
    assert!(seen.keys().copied().eq(mor_shaders::kernel_names()), "{:?}", seen.keys());
    for (kernel, specialisations) in seen {
        for flag in branch_flags(kernel) {
            let set = specialisations.iter().filter(|flags| flags.contains(&*flag)).count();
            // Its sums are pairs; an import has four columns for `linear`.
            let is_never = kernel == "linear_decode" && flag == "QUADS";
            assert!(set > 0 || is_never, "{kernel}: no variant sets {flag}");
            // It needs subgroups, which an import does without elsewhere.
            let is_always = kernel == "decode_layers" && flag == "SUBGROUP";
            assert!(set < specialisations.len() || is_always, "{kernel}: every variant sets {flag}");
        }
    }
}

/// Flags that the directives of `name` and of its imports ask for.
fn branch_flags(name: &str) -> BTreeSet<String> {
    let mut flags = BTreeSet::new();
    // Placeholders of each #for that is open, and what they are replaced by.
    let mut open: Vec<Vec<(String, Vec<&str>)>> = Vec::new();
    for line in mor_shaders::source(name).expect("a kernel or an import").lines().map(str::trim) {
        if let Some((placeholders, names)) = line.strip_prefix("#for ").and_then(|rest| rest.split_once(" in ")) {
            let names = |i| names.split_whitespace().filter_map(|name| name.split(':').nth(i)).collect();
            let placeholders = placeholders.split_whitespace().enumerate();
            open.push(placeholders.map(|(i, placeholder)| (format!("${placeholder}"), names(i))).collect());
        } else if line == "#endfor" {
            open.pop();
        } else if let Some(condition) = line.strip_prefix("#if ").or_else(|| line.strip_prefix("#elif ")) {
            let flag = condition.trim().trim_start_matches('!');
            match open.iter().flatten().find(|(placeholder, _)| flag.contains(placeholder)) {
                Some((placeholder, names)) => flags.extend(names.iter().map(|name| flag.replace(placeholder, name))),
                None => _ = flags.insert(flag.to_owned()),
            }
        } else if let Some(import) = line.strip_prefix("#import ") {
            flags.extend(branch_flags(import.trim()));
        }
    }
    flags
}

/// The header of a kernel file: its first line without the name, and its fields.
fn header(kernel: &str) -> (String, Vec<(String, String)>) {
    let source = mor_shaders::source(kernel).expect("a kernel has a source");
    let mut lines = source.lines().map_while(|line| line.strip_prefix("//"));
    let first = lines.next().unwrap_or_default();
    let title = first.strip_prefix(&format!(" {kernel}: "));
    let title = title.unwrap_or_else(|| panic!("{kernel}.wgsl begins with \"// {kernel}: \", not \"//{first}\""));
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in lines {
        // A field's name is padded to ten columns; its text continues below its beginning.
        if let Some(text) = line.strip_prefix("           ") {
            let (_, field) = fields.last_mut().unwrap_or_else(|| panic!("{kernel}: \"//{line}\" continues no field"));
            field.push(' ');
            field.push_str(text.trim());
        } else {
            let (name, text) = line.split_at_checked(11).unwrap_or((line, ""));
            fields.push((name.trim().to_owned(), text.trim().to_owned()));
        }
    }
    (title.to_owned(), fields)
}

fn field(kernel: &str, name: &str) -> String {
    let (_, fields) = header(kernel);
    fields.into_iter().find(|(field, _)| field == name).unwrap_or_else(|| panic!("{kernel}: no field {name}")).1
}

#[test]
fn headers_have_all_fields_in_order() {
    for kernel in mor_shaders::kernel_names() {
        let (title, fields) = header(kernel);
        assert!(title.chars().next().is_some_and(char::is_lowercase) && title.ends_with('.'), "{kernel}: {title}");
        let names: Vec<_> = fields.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, HEADER_FIELDS, "{kernel}");
        for (name, text) in fields {
            assert!(!text.is_empty(), "{kernel}: {name} is empty");
        }
    }
}

/// One entry of a Bindings field: `INDEX NAME ACCESS` and, where the binding exists only in some specialisations,
/// `[FLAG]`, `[!FLAG]` or `[FLAG, FLAG]` for any of several.
#[derive(Debug)]
struct HeaderBinding {
    index: u32,
    name: String,
    declared: Declared,
    conditions: Vec<String>,
}

fn header_bindings(kernel: &str) -> Vec<HeaderBinding> {
    let text = field(kernel, "Bindings");
    let parse = |entry: &str| {
        let (entry, conditions) = match entry.split_once('[') {
            None => (entry, Vec::new()),
            Some((entry, rest)) => {
                let inside = rest.trim().strip_suffix(']')?;
                (entry, inside.split(',').map(|flag| flag.trim().to_owned()).collect())
            }
        };
        let &[index, name, access] = entry.split_whitespace().collect::<Vec<_>>().as_slice() else { return None };
        let declared = match access {
            "uniform" => Declared::Uniform,
            "read" => Declared::Read,
            "write" => Declared::Write,
            "texture" => Declared::Texture,
            _ => return None,
        };
        Some(HeaderBinding { index: index.parse().ok()?, name: name.to_owned(), declared, conditions })
    };
    let bindings: Vec<_> = text
        .split(';')
        .map(|entry| parse(entry.trim()).unwrap_or_else(|| panic!("{kernel}: cannot read binding \"{entry}\"")))
        .collect();
    assert!(bindings.is_sorted_by_key(|binding| binding.index), "{kernel}: bindings ascend");
    bindings
}

#[test]
fn headers_tell_bindings_and_specialisations() {
    let mut listed: BTreeMap<&str, Vec<HeaderBinding>> = BTreeMap::new();
    let mut spec: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for kernel in mor_shaders::kernel_names() {
        listed.insert(kernel, header_bindings(kernel));
        spec.insert(kernel, words(&field(kernel, "Spec")).map(str::to_owned).collect());
    }
    // Per kernel, which entries of the header exist in every specialisation.
    let mut always: BTreeMap<&str, Vec<bool>> =
        listed.iter().map(|(kernel, bindings)| (*kernel, vec![true; bindings.len()])).collect();
    for variant in distinct() {
        let (module, _) = parse(variant);
        let holds = |condition: &String| match condition.strip_prefix('!') {
            Some(flag) => !variant.flags.contains(&flag),
            None => variant.flags.contains(&condition.as_str()),
        };
        let mut want = Vec::new();
        for (binding, always) in
            listed[variant.kernel].iter().zip(always.get_mut(variant.kernel).expect("every kernel is listed"))
        {
            if binding.conditions.is_empty() || binding.conditions.iter().any(holds) {
                want.push((binding.index, binding.name.clone(), binding.declared));
            } else {
                *always = false;
            }
        }
        assert_eq!(bindings(&module), want, "{}: shader, then header", variant.description);
        for name in variant.flags.iter().chain(&variant.constants) {
            assert!(spec[variant.kernel].contains(*name), "{}: the header's Spec lacks {name}", variant.kernel);
        }
    }
    for (kernel, bindings) in &listed {
        for (binding, always) in bindings.iter().zip(&always[kernel]) {
            assert!(!always || binding.conditions.is_empty(), "{kernel}: {binding:?} exists in every variant");
        }
    }
}

/// Fields of a struct as 4-byte words: (offset, name, whether it is a float). Elements of vectors and arrays are
/// words of their own, numbered.
type Words = Vec<(u32, String, bool)>;

fn push_words(words: &mut Words, offset: u32, name: &str, count: u32, is_float: bool) {
    for i in 0..count {
        let name = if count == 1 { name.to_owned() } else { format!("{name}{i}") };
        words.push((offset + 4 * i, name, is_float));
    }
}

/// Words and size of a struct of the shader.
fn shader_struct(module: &Module, name: &str) -> Option<(Words, u32)> {
    let (_, ty) = module.types.iter().find(|(_, ty)| ty.name.as_deref() == Some(name))?;
    let TypeInner::Struct { members, span } = &ty.inner else { panic!("{name} is a struct") };
    let mut words = Words::new();
    for member in members {
        let (count, scalar) = match module.types[member.ty].inner {
            TypeInner::Scalar(scalar) => (1, scalar),
            TypeInner::Vector { size, scalar } => (size as u32, scalar),
            ref other => panic!("{name}: a member is {other:?}"),
        };
        assert_eq!(scalar.width, 4, "{name}");
        let member_name = member.name.as_deref().expect("members have names");
        push_words(&mut words, member.offset, member_name, count, scalar.kind == ScalarKind::Float);
    }
    Some((words, *span))
}

/// Words of a `repr(C)` struct of `u32`, `f32` and arrays of them, read from the text of `path`.
fn rust_struct(path: &str, name: &str) -> Words {
    let text = read(path);
    let start = text.find(&format!("pub struct {name} {{")).unwrap_or_else(|| panic!("{path}: no struct {name}"));
    let attributes = text[..start].trim_end().rsplit("\n\n").next().unwrap_or_default();
    assert!(attributes.contains("#[repr(C)]"), "{path}: {name} is repr(C)");
    let body = &text[start..start + text[start..].find("\n}").expect("the struct ends")];
    let mut words = Words::new();
    for line in code(body).lines().skip(1).map(str::trim).filter(|line| !line.is_empty()) {
        let field = line.strip_prefix("pub ").unwrap_or(line).trim_end_matches(',');
        let (field, ty) = field.split_once(": ").unwrap_or_else(|| panic!("{name}: {line}"));
        let (ty, count) = match ty.strip_prefix('[').and_then(|ty| ty.strip_suffix(']')) {
            None => (ty, 1),
            Some(array) => {
                let (ty, count) = array.split_once("; ").expect("an array has a length");
                (ty, count.parse().expect("a literal length"))
            }
        };
        assert!(["u32", "f32"].contains(&ty), "{name}: {line}");
        let offset = 4 * words.len() as u32;
        push_words(&mut words, offset, field, count, ty == "f32");
    }
    words
}

#[test]
fn parameters_mirror_their_shaders() {
    let mut mirrored = BTreeSet::new();
    for variant in distinct() {
        if !mirrored.insert(variant.kernel) {
            continue;
        }
        let wrapper = format!("mor-kernels/src/ops/{}.rs", variant.kernel);
        let text = read(&wrapper);
        let name = text.split("type Params = ").nth(1).and_then(|rest| rest.split(';').next()).expect("Params");
        let path = if name == "LinearParams" { "mor-kernels/src/epilogue.rs" } else { &wrapper };
        let (module, _) = parse(variant);
        let (words, span) = shader_struct(&module, "Params").expect("every kernel has parameters");
        assert_eq!(words, rust_struct(path, name), "{}: shader, then {name}", variant.kernel);
        // Bound in whole units of 16 bytes.
        assert_eq!(span.next_multiple_of(16) as usize, variant.params_bytes.next_multiple_of(16), "{}", variant.kernel);
        assert_eq!(4 * words.len(), variant.params_bytes, "{}", variant.kernel);
    }
}

#[test]
fn structs_of_tensors_mirror_their_shaders() {
    for (kernel, name, path, mirror, bytes) in [
        ("tokens_compact", "Row", "rows.rs", "Row", size_of::<mor_kernels::rows::Row>()),
        ("tokens_compact", "ActiveRow", "rows.rs", "ActiveRow", size_of::<mor_kernels::rows::ActiveRow>()),
        ("sample_token", "Sampling", "ops/sample_token.rs", "GpuSampling", size_of::<mor_kernels::ops::GpuSampling>()),
        ("decode_layers", "LayerStep", "ops/decode_layers.rs", "LayerStep", size_of::<mor_kernels::ops::LayerStep>()),
    ] {
        let variant = distinct().iter().find(|variant| variant.kernel == kernel).expect("the kernel exists");
        let (module, _) = parse(variant);
        let (words, span) = shader_struct(&module, name).expect("the kernel has the struct");
        assert_eq!(words, rust_struct(&format!("mor-kernels/src/{path}"), mirror), "shader, then {mirror}");
        assert_eq!(span as usize, bytes, "{mirror}");
    }
}

/// Files below `folder` with `extension`, build outputs left out.
fn files(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.expect("the folder is readable").path();
        if path.is_dir() && !path.ends_with("target") {
            files(&path, extension, found);
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
}

/// Folders of the workspace's crates.
fn members() -> Vec<String> {
    let manifest = read("Cargo.toml");
    let members = manifest.split("members = [").nth(1).and_then(|rest| rest.split(']').next()).expect("members");
    members.split(',').map(|member| member.trim().trim_matches('"').to_owned()).collect()
}

/// A package holds what lies in its crate's folder, and says what it is.
#[test]
fn packages_are_complete() {
    for member in members() {
        let manifest = read(&format!("{member}/Cargo.toml"));
        if manifest.contains("publish = false") {
            continue;
        }
        for key in
            ["description = ", "license.workspace", "repository.workspace", "readme = ", "keywords = ", "categories = "]
        {
            assert!(manifest.contains(&format!("\n{key}")), "{member}/Cargo.toml lacks {key}");
        }
        // docs.rs builds with default features unless it is told otherwise.
        let is_documented = manifest.contains("[package.metadata.docs.rs]");
        let is_library = root().join(&member).join("src/lib.rs").exists();
        assert!(
            is_documented || !is_library || !manifest.contains("[features]"),
            "{member}/Cargo.toml: docs.rs settings"
        );
        let crate_root = root().join(&member);
        let mut sources = Vec::new();
        files(&crate_root, "rs", &mut sources);
        for path in sources {
            let text = fs::read_to_string(&path).expect("a source is readable");
            let folder = path.parent().expect("a file has a folder");
            for included in included(&text) {
                let depth = folder.strip_prefix(&crate_root).expect("below the crate").components().count();
                let ups = Path::new(included).components().filter(|part| part.as_os_str() == "..").count();
                assert!(ups <= depth, "{}: {included} lies outside the package", path.display());
            }
        }
    }
}

/// Paths that a source names at compile time: the first text after `include_str!`, `include_bytes!`, `include!` or
/// `#[path`.
fn included(text: &str) -> Vec<&str> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let keys = ["include_str!(", "include_bytes!(", "include!(", "#[path = "];
    let path = |line, key| str::split_once(line, key).and_then(|(_, rest): (&str, &str)| rest.split('"').nth(1));
    code.flat_map(|line| keys.iter().filter_map(move |key| path(line, key))).collect()
}

/// Messages that the documentation quotes are those of the sources; `...` stands for what differs.
#[test]
fn quoted_messages_exist() {
    let mut sources = Vec::new();
    for member in members() {
        files(&root().join(member).join("src"), "rs", &mut sources);
    }
    let mut lines = String::new();
    for path in sources {
        // Literals that are broken into lines, made whole.
        let text = fs::read_to_string(&path).expect("a source is readable");
        let mut pieces = text.split("\\\n");
        lines.push_str(pieces.next().unwrap_or_default());
        pieces.for_each(|piece| lines.push_str(piece.trim_start()));
    }
    let exists = |message: &str| {
        lines.lines().any(|line| {
            let mut rest = Some(line);
            for piece in message.split("...").map(str::trim) {
                rest = rest.and_then(|rest| rest.split_once(piece)).map(|(_, rest)| rest);
            }
            rest.is_some()
        })
    };
    let text = read("docs/troubleshooting.md");
    let blocks = text.split("```text\n").skip(1).map(|rest| rest.split("```").next().unwrap_or_default());
    let messages: Vec<&str> = blocks.flat_map(str::lines).collect();
    assert!(messages.len() > 5, "{messages:?}");
    for message in messages {
        assert!(exists(message), "docs/troubleshooting.md: no source prints: {message}");
    }
}

/// Programs that share a device of their own, and so speak of what `mor-kernels` exports again.
const SHARES_A_DEVICE: [&str; 2] = ["mor-runtime/examples/shared_device.rs", "mor-runtime/tests/shared_device.rs"];

#[test]
fn only_mor_kernels_names_wgpu() {
    let members = members();
    assert!(members.iter().any(|member| member == "mor-kernels") && members.len() > 1, "{members:?}");
    for member in members.into_iter().filter(|member| member != "mor-kernels") {
        let manifest = read(&format!("{member}/Cargo.toml"));
        let mut lines =
            manifest.lines().filter(|line| !line.starts_with("keywords") && !line.starts_with("description"));
        assert!(!lines.any(|line| words(line).any(|word| word == "wgpu")), "{member}/Cargo.toml names wgpu");
        let mut sources = Vec::new();
        files(&root().join(&member), "rs", &mut sources);
        assert!(!sources.is_empty(), "{member} has sources");
        sources.retain(|path| !SHARES_A_DEVICE.iter().any(|shares| path.ends_with(shares)));
        for path in sources {
            let text = fs::read_to_string(&path).expect("a source is readable");
            assert!(!words(&code(&text)).any(|word| word == "wgpu"), "{} names wgpu", path.display());
        }
    }
}

/// `enable` and f16 types exist in the variants with cooperative matrices only.
#[test]
fn no_shader_needs_an_extension() {
    let half_types = ["f16", "vec2h", "vec3h", "vec4h"];
    for variant in distinct().iter().filter(|variant| !uses_matrices(variant)) {
        for word in words(&variant.wgsl) {
            assert!(!["enable", "requires"].contains(&word), "{}: {word}", variant.description);
            let is_half_matrix = word.starts_with("mat") && word.ends_with('h') && word.len() == 7;
            assert!(!half_types.contains(&word) && !is_half_matrix, "{}: {word}", variant.description);
        }
        let (module, _) = parse(variant);
        for (_, ty) in module.types.iter() {
            let scalar = ty.inner.scalar();
            assert!(scalar.is_none_or(|scalar| scalar.width <= 4 && scalar.width != 2), "{}", variant.description);
        }
    }
}

#[test]
fn the_reported_gpu_library_is_the_locked_one() {
    let (name, version) = mor_kernels::GPU_LIBRARY.split_once(' ').expect("a name and a version");
    let locked = format!("name = \"{name}\"\nversion = \"{version}\"\n");
    assert!(read("Cargo.lock").contains(&locked), "{locked}");
}
