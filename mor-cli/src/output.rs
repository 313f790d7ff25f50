//! Files that people ask for.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::failure::bad_input;

/// Refuses a place that cannot be written to before any work is done for it; `option` names it.
pub(crate) fn check_target(option: &str, path: &Path) -> anyhow::Result<()> {
    if path.is_dir() || path.file_name().is_none() {
        return Err(bad_input!("{option} {}: is a folder, expected the name of a file to write", path.display()));
    }
    let folder = folder_of(path);
    if !folder.is_dir() {
        return Err(bad_input!("{option} {}: its folder does not exist; create it first", path.display()));
    }
    Ok(())
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Has `write` write beside the target and renames, so that the target is never half-written.
pub(crate) fn write_atomically<E: std::fmt::Display>(
    path: &Path,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> anyhow::Result<()> {
    let partial = Partial::beside(path);
    write(&partial.path).map_err(|error| bad_input!("cannot write {}: {error}", path.display()))?;
    fs::rename(&partial.path, path).with_context(|| format!("cannot rename to {}", path.display()))
}

/// A file that is removed unless it was renamed.
#[derive(Debug)]
struct Partial {
    path: PathBuf,
}

impl Partial {
    fn beside(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // The process number keeps two writers apart.
        Self { path: folder_of(path).join(format!(".{name}.{}.partial", std::process::id())) }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After the rename there is nothing left to remove.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_half_written_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.txt");
        check_target("--out", &path).unwrap();
        drop(Partial::beside(&path));
        fs::write(Partial::beside(&path).path.clone(), b"half").unwrap();
        let failing = |partial: &Path| fs::write(partial, b"half").and(Err(std::io::Error::other("the disk is full")));
        let message = write_atomically(&path, failing).unwrap_err().to_string();
        assert!(message.ends_with("out.txt: the disk is full"), "{message}");
        write_atomically(&path, |partial| fs::write(partial, b"whole")).unwrap();
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["out.txt"]);
        assert!(check_target("--out", folder.path()).is_err());
        assert!(check_target("--out", &folder.path().join("no/out")).is_err());
    }
}
