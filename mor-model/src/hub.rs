//! Models from the Hugging Face Hub, kept in the cache that all its programs share.
//!
//! The environment is honoured as those do: `HF_ENDPOINT`, `HF_TOKEN` (else the token of a login), `HF_HOME`,
//! `HF_HUB_CACHE`, `HF_HUB_OFFLINE`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use crate::ModelError;

/// Times that an interrupted download goes on where it stopped, before it is given up.
const MAX_RETRIES: usize = 3;
const DEFAULT_REVISION: &str = "main";
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// A model on the Hub, written `owner/name` or `owner/name@revision`.
///
/// ```
/// use mor_model::hub::HubModel;
///
/// let model: HubModel = "HuggingFaceTB/SmolLM-135M@main".parse()?;
/// assert_eq!(model.to_string(), "hf:HuggingFaceTB/SmolLM-135M@main");
/// assert!("../SmolLM".parse::<HubModel>().is_err());
/// # Ok::<(), mor_model::ModelError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubModel {
    id: String,
    /// Branch, tag or commit, where one is named.
    revision: Option<String>,
}

impl FromStr for HubModel {
    type Err = ModelError;

    fn from_str(text: &str) -> Result<Self, ModelError> {
        let (id, revision) = match text.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (text, None),
        };
        // Names become parts of paths.
        let is_name = |name: &str| {
            name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) && !name.trim_matches('.').is_empty()
        };
        let is_id = id.split('/').count() == 2 && id.split('/').all(is_name);
        if !is_id || !revision.is_none_or(|revision| revision.split('/').all(is_name)) {
            let problem = "names no model of the Hugging Face Hub, expected hf:owner/name or hf:owner/name@revision";
            return Err(ModelError::Hub { model: format!("hf:{text}"), problem: problem.to_owned() });
        }
        Ok(Self { id: id.to_owned(), revision: revision.map(str::to_owned) })
    }
}

impl fmt::Display for HubModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf:{}", self.id)?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))
    }
}

/// How far the download of a file is.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct HubProgress<'a> {
    /// File.
    pub file: &'a str,
    /// Bytes that are here, those of an earlier attempt among them.
    pub received_bytes: u64,
    /// Bytes of the file.
    pub total_bytes: u64,
}

impl HubModel {
    /// Fetches what is not in the cache yet, and returns the folder of the model there.
    ///
    /// Taken are `config.json`, tokenizer files and `model.safetensors` or its shards; where there are none of these,
    /// `pytorch_model.bin` or its shards, and YAML files. Interrupted downloads go on where they stopped, also in a later
    /// call. When the Hub cannot be reached, a model that the cache has whole is used as it is there.
    ///
    /// # Errors
    ///
    /// [`ModelError::Hub`].
    pub fn fetch(&self, mut on_progress: impl FnMut(HubProgress<'_>)) -> Result<PathBuf, ModelError> {
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        let endpoint = endpoint.trim_end_matches('/');
        let cache = self.cache()?;
        let cached = cache.repo(self.repo(self.revision.as_deref().unwrap_or(DEFAULT_REVISION)));
        let offline = |cause: &str| {
            let folder = cached_folder(&cached, &cache, self);
            folder.ok_or_else(|| {
                self.error(format!(
                    "cannot be fetched from {endpoint} ({cause}) and is not complete in the cache {}; connect to the network, \
                     or name a local folder",
                    cache.path().display()
                ))
            })
        };
        if variable("HF_HUB_OFFLINE").is_some_and(|value| value != "0") {
            return offline("HF_HUB_OFFLINE is set");
        }

        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(endpoint.to_owned())
            .with_token(variable("HF_TOKEN").or_else(|| cache.token()))
            .with_user_agent("mor", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| self.error(format!("cannot be fetched: {}", one_line(&error))))?;
        let info = match api.repo(self.repo(self.revision.as_deref().unwrap_or(DEFAULT_REVISION))).info() {
            Ok(info) => info,
            Err(error) => {
                return match status(&error) {
                    Some(status) if status < 500 => Err(self.refused(endpoint, status)),
                    _ => offline(&one_line(&error)),
                };
            }
        };
        // All files are of one commit, whatever happens to the branch meanwhile.
        let (repo, at_commit) = (api.repo(self.repo(&info.sha)), cache.repo(self.repo(&info.sha)));
        let names: Vec<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        let folder = at_commit.pointer_path(&info.sha);
        for name in wanted(&names) {
            if !folder.join(name).is_file() {
                self.download(&repo, &at_commit, endpoint, name, &mut on_progress)?;
            }
        }
        // What the branch is at, for when the Hub cannot be asked.
        cached
            .create_ref(&info.sha)
            .map_err(|error| self.error(format!("cannot be kept in {}: {error}", cache.path().display())))?;
        Ok(folder)
    }

    fn download(
        &self,
        repo: &ApiRepo,
        cached: &CacheRepo,
        endpoint: &str,
        name: &str,
        on_progress: &mut impl FnMut(HubProgress<'_>),
    ) -> Result<(), ModelError> {
        let mut attempt = 0;
        loop {
            let mut counter = Counter { file: name, received: 0, total: 0, on_progress: &mut *on_progress };
            let result = repo.download_with_progress(name, &mut counter);
            let (received, total) = (counter.received, counter.total);
            let error = match result {
                Ok(_) if received == total => return Ok(()),
                Ok(path) => {
                    // Not what was announced: it must not stay in the cache.
                    let _ = path.canonicalize().and_then(std::fs::remove_file);
                    let _ = std::fs::remove_file(path);
                    format!("{received} bytes came, {total} were announced")
                }
                Err(error) => match status(&error) {
                    // A range that begins at the end: all had come before, but for the last step.
                    Some(416) if attempt == 0 => {
                        let _ = remove_parts(cached);
                        one_line(&error)
                    }
                    Some(status) if status < 500 => return Err(self.refused(endpoint, status)),
                    _ => one_line(&error),
                },
            };
            if attempt == MAX_RETRIES {
                return Err(self.error(format!(
                    "{name} did not come whole from {endpoint} ({error}); the next attempt goes on from there"
                )));
            }
            attempt += 1;
            tracing::debug!(name, attempt, error, "download is tried again");
        }
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.clone(), RepoType::Model, revision.to_owned())
    }

    fn cache(&self) -> Result<Cache, ModelError> {
        match (variable("HF_HUB_CACHE"), variable("HF_HOME")) {
            (Some(cache), _) => Ok(Cache::new(cache.into())),
            (None, Some(home)) => Ok(Cache::new(PathBuf::from(home).join("hub"))),
            (None, None) if std::env::home_dir().is_some() => Ok(Cache::default()),
            (None, None) => Err(self.error("there is no home directory for the cache; set HF_HOME".to_owned())),
        }
    }

    fn refused(&self, endpoint: &str, status: u16) -> ModelError {
        let problem = match status {
            401 | 403 => "needs a permission that HF_TOKEN, or the login, does not give",
            404 => "is not there, or not for everyone: check the name and the revision, or set HF_TOKEN",
            _ => "was refused",
        };
        self.error(format!("{problem} ({endpoint} answers {status})"))
    }

    fn error(&self, problem: String) -> ModelError {
        ModelError::Hub { model: self.to_string(), problem }
    }
}

/// An environment variable; an empty one counts as unset.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.trim().is_empty())
}

/// Beginning and end of the names of weight files, those that are loaded as they are first.
const FORMS: [(&str, &str); 2] = [("model", ".safetensors"), ("pytorch_model", ".bin")];

/// The index of the shards of a weight file.
fn index_of(weights: &str) -> String {
    format!("{weights}.index.json")
}

/// The files of a model among those of a repository.
fn wanted<'a>(names: &[&'a str]) -> Vec<&'a str> {
    // A name from the network must be that of a file in the folder.
    let is_plain = |name: &str| !name.contains(['/', '\\', ':']) && !name.starts_with('.');
    let is_description = |name: &str| {
        let starts = ["tokenizer", "special_tokens_map", "added_tokens", "chat_template", "vocab.", "merges."];
        name == "config.json" || name == "generation_config.json" || starts.iter().any(|start| name.starts_with(start))
    };
    let has = |name: &str| names.contains(&name);
    let form = FORMS.into_iter().find(|(stem, end)| {
        let whole = format!("{stem}{end}");
        has(&whole) || has(&index_of(&whole))
    });
    let is_weight = |name: &str| {
        form.is_some_and(|(stem, end)| {
            let whole = format!("{stem}{end}");
            let is_shard = || name.starts_with(&format!("{stem}-")) && name.ends_with(end);
            if has(&whole) { name == whole } else { name == index_of(&whole) || is_shard() }
        })
    };
    // What a run was started with matters to a conversion alone.
    let is_run = |name: &str| form != Some(FORMS[0]) && (name.ends_with(".yaml") || name.ends_with(".yml"));
    let is_wanted = |name: &&str| is_plain(name) && (is_description(name) || is_weight(name) || is_run(name));
    names.iter().copied().filter(is_wanted).collect()
}

/// The folder of a model in the cache, if it is whole there.
fn cached_folder(at_revision: &CacheRepo, cache: &Cache, model: &HubModel) -> Option<PathBuf> {
    let config = at_revision.get("config.json").or_else(|| {
        // A commit needs no reference.
        let commit = model.revision.as_deref()?;
        let path = cache.repo(model.repo(commit)).pointer_path(commit).join("config.json");
        path.is_file().then_some(path)
    })?;
    let folder = config.parent()?;
    let is_there = |name: &str| folder.join(name).is_file();
    let has_shards = |index: &str| {
        let index = std::fs::read(folder.join(index)).ok();
        let index = index.and_then(|index| serde_json::from_slice::<serde_json::Value>(&index).ok());
        let shards = index.as_ref().and_then(|index| index["weight_map"].as_object());
        shards.is_some_and(|map| map.values().all(|shard| shard.as_str().is_some_and(is_there)))
    };
    let is_whole = FORMS.iter().any(|(stem, end)| {
        let whole = format!("{stem}{end}");
        is_there(&whole) || has_shards(&index_of(&whole))
    });
    is_whole.then(|| folder.to_owned())
}

/// Removes the beginnings of files that were not received to their end.
fn remove_parts(cached: &CacheRepo) -> std::io::Result<()> {
    let Some(blobs) = cached.blob_path("x").parent().map(PathBuf::from) else { return Ok(()) };
    for entry in std::fs::read_dir(blobs)? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "part") {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Status of an answer that is a refusal.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        _ => None,
    }
}

fn one_line(error: &ApiError) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Counts the bytes of a file as they come.
struct Counter<'a, F> {
    file: &'a str,
    received: u64,
    total: u64,
    on_progress: F,
}

impl<F: FnMut(HubProgress<'_>)> hf_hub::api::Progress for &mut Counter<'_, F> {
    fn init(&mut self, size: usize, _: &str) {
        (self.received, self.total) = (0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.received += size as u64;
        let (file, received_bytes, total_bytes) = (self.file, self.received, self.total);
        (self.on_progress)(HubProgress { file, received_bytes, total_bytes });
    }

    fn finish(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_none_are_refused() {
        for text in
            ["", "owner", "owner/", "/name", "a/b/c", "../name", "owner/..", "o/n@", "o/n@../x", "o/n@a b", "o n/x"]
        {
            let error = text.parse::<HubModel>().unwrap_err().to_string();
            assert!(error.contains(&format!("hf:{text}: ")) && error.contains("hf:owner/name"), "{error}");
        }
        assert!("o/n@refs/pr/1".parse::<HubModel>().is_ok());
    }

    #[test]
    fn a_model_is_its_description_and_one_form_of_its_weights() {
        let common = ["README.md", "config.json", "tokenizer.json", "../config.json", "onnx/model.onnx"];
        let of = |weights: &[&'static str]| wanted(&[&common, weights].concat())[2..].to_vec();
        assert_eq!(of(&["model.safetensors", "pytorch_model.bin", "run.yaml"]), ["model.safetensors"]);
        let shards = ["model.safetensors.index.json", "model-00001-of-00001.safetensors"];
        assert_eq!(of(&[&shards[..], &["pytorch_model.bin"]].concat()), shards);
        assert_eq!(of(&["pytorch_model.bin", "run.yaml", "optimizer.bin"]), ["pytorch_model.bin", "run.yaml"]);
        let shards = ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "run.yml"];
        assert_eq!(of(&[&shards[..], &["training_args.bin"]].concat()), shards);
        assert!(of(&["training_args.bin"]).is_empty());
    }
}
