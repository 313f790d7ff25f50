//! Model folders in the making.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::ModelError;

/// Beginnings of the names of files that belong to a model whatever its weights: tokenizer, chat template, defaults of
/// generation, description and credits.
const COMPANIONS: [&str; 11] = [
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
    "generation_config",
    "README",
    "LICENSE",
    "NOTICE",
    "ATTRIBUTION",
];

/// A folder beside its final place, removed unless it gets there: nobody ever sees a part of a model.
///
/// ```
/// use mor_model::NewFolder;
///
/// let parent = std::env::temp_dir();
/// let out = parent.join(format!("mor-example-{}", std::process::id()));
/// let folder = NewFolder::create(&out)?;
/// folder.write("config.json", "{}")?;
/// assert!(!out.exists());
/// folder.publish()?;
/// assert!(out.join("config.json").is_file());
/// # std::fs::remove_dir_all(out).unwrap();
/// # Ok::<(), mor_model::ModelError>(())
/// ```
#[derive(Debug)]
pub struct NewFolder {
    partial: PathBuf,
    out: PathBuf,
}

impl NewFolder {
    /// Refuses a place that cannot be written to, before any work is done for it.
    ///
    /// # Errors
    ///
    /// [`ModelError::NewFolder`] when `out` exists, names no folder, or lies in none.
    pub fn check(out: &Path) -> Result<(), ModelError> {
        let refuse = |problem: String| Err(ModelError::NewFolder { path: out.to_owned(), problem });
        if out.symlink_metadata().is_ok() {
            return refuse("exists, expected the name of a new folder".to_owned());
        }
        if out.file_name().is_none() {
            return refuse("names no folder, expected the name of a new one".to_owned());
        }
        let parent = parent_of(out);
        if !parent.is_dir() {
            return refuse(format!("there is no folder {} to write it in", parent.display()));
        }
        Ok(())
    }

    /// Begins a folder that is to become `out`.
    ///
    /// # Errors
    ///
    /// As [`NewFolder::check`]; [`ModelError::WriteFile`].
    pub fn create(out: &Path) -> Result<Self, ModelError> {
        Self::check(out)?;
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        // The process number keeps two writers apart.
        let partial = parent_of(out).join(format!(".{name}.{}.partial", std::process::id()));
        fs::create_dir(&partial).map_err(write_error(&partial))?;
        Ok(Self { partial, out: out.to_owned() })
    }

    /// Where it is meanwhile.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Writes a text file into it.
    ///
    /// # Errors
    ///
    /// [`ModelError::WriteFile`].
    pub fn write(&self, name: &str, text: &str) -> Result<(), ModelError> {
        let path = self.partial.join(name);
        fs::write(&path, text).map_err(write_error(&path))
    }

    /// Copies the files of another model folder that belong to a model whatever its weights, and returns their names:
    /// tokenizer, chat template, defaults of generation, description and credits.
    ///
    /// # Errors
    ///
    /// [`ModelError::Io`]; [`ModelError::WriteFile`].
    pub fn copy_companions(&self, from: &Path) -> Result<Vec<String>, ModelError> {
        let unreadable = |source| ModelError::Io { path: from.to_owned(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(from).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if COMPANIONS.iter().any(|start| name.starts_with(start)) && entry.path().is_file() {
                let path = self.partial.join(&name);
                fs::copy(entry.path(), &path).map_err(write_error(&path))?;
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Moves it to its final place.
    ///
    /// # Errors
    ///
    /// As [`NewFolder::check`], for something has come into being there; [`ModelError::WriteFile`].
    pub fn publish(self) -> Result<(), ModelError> {
        // Some systems would replace an empty folder that has come into being meanwhile.
        Self::check(&self.out)?;
        fs::rename(&self.partial, &self.out).map_err(write_error(&self.out))
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        // Gone already where it was published.
        let _ = fs::remove_dir_all(&self.partial);
    }
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn write_error(path: &Path) -> impl FnOnce(io::Error) -> ModelError {
    let path = path.to_owned();
    |source| ModelError::WriteFile { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_model_leaves_no_trace() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let partial = NewFolder::create(&out).unwrap();
        partial.write("config.json", "{}").unwrap();
        drop(partial);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

        let partial = NewFolder::create(&out).unwrap();
        fs::create_dir(&out).unwrap();
        assert!(partial.publish().unwrap_err().to_string().contains("exists"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn tokenizers_and_credits_go_along() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "tokenizer.json", "ATTRIBUTION.txt", "model.safetensors", "golden.json"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let partial = NewFolder::create(&folder.path().join("out")).unwrap();
        assert_eq!(partial.copy_companions(folder.path()).unwrap(), ["ATTRIBUTION.txt", "tokenizer.json"]);
    }
}
