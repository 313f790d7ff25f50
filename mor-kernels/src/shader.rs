//! The shader front end: `#import`, `#if` and constants turn a source into one specialised WGSL module.
//!
//! * `#import shared/rows` inserts `shaders/shared/rows.wgsl`, once, however often it is named.
//! * `#if NAME`, `#if !NAME`, `#elif NAME`, `#else`, `#endif` keep or drop lines by flag; they nest.
//! * `#repeat i COUNT` to `#endrepeat` is written COUNT times, a constant, in blocks with `const i`; they nest. What must
//!   be unrolled is, whatever the driver's compiler thinks of it.
//! * `#for P in A B` to `#endfor` is written once for each name, with `$P` replaced by it, within words and directives too; they
//!   nest. `#for P T in A:X B:Y` replaces several. Functions that are called from one place are inlined, whatever the driver's
//!   compiler thinks of their size.
//! * `#block NAME P` to `#endblock` is left out there and written wherever `#use NAME VALUE` stands further down, with `$P` replaced
//!   by VALUE: lines that stand at several places of a function and must not depend on what a compiler inlines.
//! * `enable NAME;` moves to the top, where WGSL wants it.
//! * Every constant of the specialisation becomes a `const` at the top, so a number that Rust and WGSL
//!   both need is written in Rust only.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// Flags and constants of one specialisation of a shader. Part of the pipeline cache's key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Definitions {
    flags: BTreeSet<&'static str>,
    constants: BTreeMap<&'static str, Constant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Constant {
    U32(u32),
    F32 { bits: u32 },
}

impl Definitions {
    /// No flags, no constants.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `#if name` true when `on`.
    #[must_use]
    pub fn flag(mut self, name: &'static str, on: bool) -> Self {
        if on {
            self.flags.insert(name);
        }
        self
    }

    /// Adds `const name: u32 = value;`.
    #[must_use]
    pub fn u32(mut self, name: &'static str, value: u32) -> Self {
        self.constants.insert(name, Constant::U32(value));
        self
    }

    /// Adds `const name: f32 = value;`; `value` must be finite.
    #[must_use]
    pub fn f32(mut self, name: &'static str, value: f32) -> Self {
        self.constants.insert(name, Constant::F32 { bits: value.to_bits() });
        self
    }

    /// Names of the flags that are set.
    pub fn flags(&self) -> impl Iterator<Item = &'static str> {
        self.flags.iter().copied()
    }

    /// Names of the constants.
    pub fn constants(&self) -> impl Iterator<Item = &'static str> {
        self.constants.keys().copied()
    }
}

/// Specialises the shader `name`: `source`, or the file of `mor-shaders` with that name.
///
/// # Errors
/// Where and how the directives are malformed, or what is missing.
pub(crate) fn specialise(name: &str, source: Option<&str>, definitions: &Definitions) -> Result<String, String> {
    let mut constants = String::new();
    for (name, value) in &definitions.constants {
        match value {
            Constant::U32(value) => writeln!(constants, "const {name}: u32 = {value}u;"),
            Constant::F32 { bits } => writeln!(constants, "const {name}: f32 = {:?}f;", f32::from_bits(*bits)),
        }
        .expect("writing to a String cannot fail");
    }
    let (mut enables, mut body) = (String::new(), String::new());
    expand(name, source, definitions, &mut BTreeSet::new(), &mut enables, &mut body)?;
    let mut out = enables + &constants;
    repeat(name, &body.lines().collect::<Vec<_>>(), definitions, &mut out)?;
    Ok(out)
}

/// How many of `lines`, the first of which begins a block `word`, are before the one that ends it.
fn block_len<'a>(lines: impl Iterator<Item = &'a str>, word: &str) -> Option<usize> {
    let (begins, ends) = (format!("#{word} "), format!("#end{word}"));
    let mut depth = 0;
    lines.into_iter().position(|line| {
        depth += i32::from(line.trim_start().starts_with(&begins)) - i32::from(line.trim() == ends);
        depth == 0
    })
}

/// A line of a source and its number there, from 1 on.
type NumberedLine<'a> = (usize, Cow<'a, str>);

/// Appends `lines` of the shader `name` to `out`, those of `#for` as often as they ask for.
fn write_for_each<'a>(name: &str, lines: &[NumberedLine<'a>], out: &mut Vec<NumberedLine<'a>>) -> Result<(), String> {
    let mut rest = lines;
    while let [(number, line), after @ ..] = rest {
        let directive = line.trim();
        let at = || format!("{name}.wgsl:{number}: {directive}");
        if directive == "#endfor" {
            return Err(format!("{} without #for", at()));
        }
        let Some(header) = directive.strip_prefix("#for ") else {
            out.push((*number, line.clone()));
            rest = after;
            continue;
        };
        let len = block_len(rest.iter().map(|(_, line)| &**line), "for");
        let len = len.ok_or_else(|| format!("{} without #endfor", at()))?;
        let (placeholders, names) = header.split_once(" in ").ok_or_else(|| format!("{} has no names", at()))?;
        let placeholders: Vec<_> = placeholders.split_whitespace().map(|name| format!("${name}")).collect();
        for names in names.split_whitespace() {
            let each: Vec<_> = names.split(':').collect();
            if each.len() != placeholders.len() {
                return Err(format!("{}: {names} is not {} names", at(), placeholders.len()));
            }
            let replaced = |(number, line): &NumberedLine<'a>| {
                let names = placeholders.iter().zip(&each);
                let line = names.fold(line.clone(), |line, (placeholder, name)| {
                    if line.contains(placeholder) { line.replace(placeholder, name).into() } else { line }
                });
                (*number, line)
            };
            write_for_each(name, &rest[1..len].iter().map(replaced).collect::<Vec<_>>(), out)?;
        }
        rest = &rest[len + 1..];
    }
    Ok(())
}

/// What stands between `#block` and `#endblock`.
struct Block<'a> {
    name: String,
    placeholder: String,
    lines: Vec<NumberedLine<'a>>,
}

/// `lines` of the shader `name` with those of each `#block` where it is used.
fn write_blocks<'a>(name: &str, lines: Vec<NumberedLine<'a>>) -> Result<Vec<NumberedLine<'a>>, String> {
    let mut blocks: Vec<Block<'_>> = Vec::new();
    let mut open: Option<Block<'_>> = None;
    let mut out = Vec::new();
    for (number, line) in lines {
        let directive = line.trim();
        let at = || format!("{name}.wgsl:{number}: {directive}");
        if let Some(header) = directive.strip_prefix("#block ") {
            let (block, parameter) = header.split_once(' ').ok_or_else(|| format!("{} has no parameter", at()))?;
            if let Some(outer) = open {
                return Err(format!("{} inside #block {}", at(), outer.name));
            }
            open = Some(Block { name: block.to_owned(), placeholder: format!("${parameter}"), lines: Vec::new() });
        } else if directive == "#endblock" {
            blocks.push(open.take().ok_or_else(|| format!("{} without #block", at()))?);
        } else if let Some(block) = &mut open {
            block.lines.push((number, line));
        } else if let Some(used) = directive.strip_prefix("#use ") {
            let (used, value) = used.split_once(' ').ok_or_else(|| format!("{} has no value", at()))?;
            let block = blocks.iter().find(|block| block.name == used);
            let block = block.ok_or_else(|| format!("{} names no #block above", at()))?;
            out.extend(
                block.lines.iter().map(|(number, line)| (*number, line.replace(&block.placeholder, value).into())),
            );
        } else {
            out.push((number, line));
        }
    }
    match open {
        None => Ok(out),
        Some(block) => Err(format!("{name}.wgsl: #block {} without #endblock", block.name)),
    }
}

/// Copies `lines` of the shader `name` to `out`, those of `#repeat` as often as they ask for.
fn repeat(name: &str, lines: &[&str], definitions: &Definitions, out: &mut String) -> Result<(), String> {
    let mut rest = lines;
    while let [line, after @ ..] = rest {
        let directive = line.trim();
        if directive == "#endrepeat" {
            return Err(format!("{name}: {directive} without #repeat"));
        }
        let Some(header) = directive.strip_prefix("#repeat ") else {
            out.push_str(line);
            out.push('\n');
            rest = after;
            continue;
        };
        let len = block_len(rest.iter().copied(), "repeat");
        let len = len.ok_or_else(|| format!("{name}: {directive} without #endrepeat"))?;
        let (index, count) = header.split_once(' ').ok_or_else(|| format!("{name}: #repeat {header} has no count"))?;
        let Some(&Constant::U32(count)) = definitions.constants.get(count.trim()) else {
            return Err(format!("{name}: #repeat {header} counts to no constant of the specialisation"));
        };
        for i in 0..count {
            writeln!(out, "{{\nconst {index}: u32 = {i}u;").expect("writing to a String cannot fail");
            repeat(name, &rest[1..len], definitions, out)?;
            out.push_str("}\n");
        }
        rest = &rest[len + 1..];
    }
    Ok(())
}

fn expand(
    name: &str,
    source: Option<&str>,
    definitions: &Definitions,
    imported: &mut BTreeSet<String>,
    enables: &mut String,
    body: &mut String,
) -> Result<(), String> {
    let text = source.or_else(|| mor_shaders::source(name)).ok_or_else(|| format!("no shader source named {name}"))?;
    // One entry per open #if: (this branch is kept, some branch of this #if was kept already).
    let mut open: Vec<(bool, bool)> = Vec::new();
    let holds = |condition: &str| match condition.trim().strip_prefix('!') {
        Some(flag) => !definitions.flags.contains(flag.trim()),
        None => definitions.flags.contains(condition.trim()),
    };
    let numbered: Vec<_> = text.lines().enumerate().map(|(index, line)| (index + 1, line.into())).collect();
    let mut lines = Vec::new();
    write_for_each(name, &numbered, &mut lines)?;
    for (number, line) in write_blocks(name, lines)? {
        let at = || format!("{name}.wgsl:{number}");
        let directive = line.trim_start();
        let kept = open.iter().all(|(kept, _)| *kept);
        if let Some(condition) = directive.strip_prefix("#if ") {
            let keep = holds(condition);
            open.push((keep, keep));
        } else if let Some(condition) = directive.strip_prefix("#elif ") {
            let (kept, done) = open.last_mut().ok_or_else(|| format!("{}: #elif without #if", at()))?;
            *kept = !*done && holds(condition);
            *done |= *kept;
        } else if directive.starts_with("#else") {
            let (kept, done) = open.last_mut().ok_or_else(|| format!("{}: #else without #if", at()))?;
            *kept = !*done;
            *done = true;
        } else if directive.starts_with("#endif") {
            open.pop().ok_or_else(|| format!("{}: #endif without #if", at()))?;
        } else if !kept {
            continue;
        } else if let Some(path) = directive.strip_prefix("#import ") {
            if imported.insert(path.trim().to_owned()) {
                expand(path.trim(), None, definitions, imported, enables, body)?;
            }
        } else {
            let is_repeated = ["#repeat ", "#endrepeat"].iter().any(|word| directive.starts_with(word));
            if directive.starts_with('#') && !is_repeated {
                return Err(format!("{}: unknown directive {directive}", at()));
            }
            // Comments and blank lines are for readers of the source, not for drivers.
            let code = line.split("//").next().unwrap_or_default().trim_end();
            if !code.is_empty() {
                let out = if code.starts_with("enable ") { &mut *enables } else { &mut *body };
                out.push_str(code);
                out.push('\n');
            }
        }
    }
    if open.is_empty() { Ok(()) } else { Err(format!("{name}.wgsl: #if without #endif")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_directives_are_named() {
        let definitions = Definitions::new().u32("N", 2).flag("ON", true);
        let specialised = |source| specialise("mine", Some(source), &definitions);
        let source = "#if ON\n#repeat i N\na[i]();\n#endrepeat\n#else\nb();\n#endif";
        let expected = "const N: u32 = 2u;\n{\nconst i: u32 = 0u;\na[i]();\n}\n{\nconst i: u32 = 1u;\na[i]();\n}\n";
        assert_eq!(specialised(source).as_deref(), Ok(expected));
        let source = "#for P in QKV O\n#repeat i N\nread_$P(i, $P_ROWS);\n#endrepeat\n#endfor";
        let blocks = ["QKV", "O"].map(|p| {
            let call = format!("read_{p}(i, {p}_ROWS);");
            format!("{{\nconst i: u32 = 0u;\n{call}\n}}\n{{\nconst i: u32 = 1u;\n{call}\n}}\n")
        });
        assert_eq!(specialised(source), Ok(format!("const N: u32 = 2u;\n{}", blocks.concat())));
        let source = "#for P T in QKV:ON HEAD:OFF\n#if $T\n$P();\n#else\nno_$P();\n#endif\n#endfor";
        assert_eq!(specialised(source).as_deref(), Ok("const N: u32 = 2u;\nQKV();\nno_HEAD();\n"));
        let source = "#block ADD I\nsum += a[$I];\n#if OFF\nb($I);\n#endif\n#endblock\n#use ADD 0u\n#use ADD i + 1u";
        assert_eq!(specialised(source).as_deref(), Ok("const N: u32 = 2u;\nsum += a[0u];\nsum += a[i + 1u];\n"));
        for (source, message) in [
            ("#if ON", "mine.wgsl: #if without #endif"),
            ("\n#endif", "mine.wgsl:2: #endif without #if"),
            ("#else", "mine.wgsl:1: #else without #if"),
            ("#elif ON", "mine.wgsl:1: #elif without #if"),
            ("#define X", "mine.wgsl:1: unknown directive #define X"),
            ("#import shared/none", "no shader source named shared/none"),
            ("#repeat i N", "mine: #repeat i N without #endrepeat"),
            ("#endrepeat", "mine: #endrepeat without #repeat"),
            ("#for P in A", "mine.wgsl:1: #for P in A without #endfor"),
            ("#endfor", "mine.wgsl:1: #endfor without #for"),
            ("#for P\n#endfor", "mine.wgsl:1: #for P has no names"),
            ("#for P T in A:B C\n#endfor", "mine.wgsl:1: #for P T in A:B C: C is not 2 names"),
            ("#for P in A\n\n#define $P\n#endfor", "mine.wgsl:3: unknown directive #define A"),
            ("#block A", "mine.wgsl:1: #block A has no parameter"),
            ("#block A P\n", "mine.wgsl: #block A without #endblock"),
            ("#block A P\n#block B P", "mine.wgsl:2: #block B P inside #block A"),
            ("#endblock", "mine.wgsl:1: #endblock without #block"),
            ("#use A", "mine.wgsl:1: #use A has no value"),
            ("#use A 1u", "mine.wgsl:1: #use A 1u names no #block above"),
            ("#block A P\n\n#define $P\n#endblock\n#use A X", "mine.wgsl:3: unknown directive #define X"),
            ("#repeat i\n#endrepeat", "mine: #repeat i has no count"),
            ("#repeat i M\n#endrepeat", "mine: #repeat i M counts to no constant of the specialisation"),
        ] {
            assert_eq!(specialised(source), Err(message.to_owned()), "{source}");
        }
    }
}
