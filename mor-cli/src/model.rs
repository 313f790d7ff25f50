//! Which model a command runs, and how it is loaded.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use etcetera::BaseStrategy;
use indicatif::{ProgressBar, ProgressStyle};
use mor_kernels::tensor::DType;
use mor_model::{Checkpoint, Dtype, MorConfig, Quantization};
use mor_runtime::chat::ChatTemplate;
use mor_runtime::{
    AdapterKind, AdapterSummary, DeviceSelector, GpuOptions, LoadProgress, ModelSource, Session, SessionOptions,
};

use crate::failure::bad_input;
use crate::{embedded, note};

/// A load shorter than this shows no progress bar.
const QUIET: Duration = Duration::from_millis(400);

/// The model a command line names.
#[derive(Debug)]
pub(crate) enum Model {
    Embedded,
    Folder {
        /// As it was named.
        name: String,
        path: PathBuf,
    },
    /// Random weights of the shape in this file.
    Random(PathBuf),
}

impl Model {
    /// The folder, a model of the Hub, or the embedded model where none is named.
    pub(crate) fn named(folder: Option<&Path>) -> anyhow::Result<Self> {
        Ok(match folder {
            None => Model::Embedded,
            Some(folder) => Model::Folder { name: folder.display().to_string(), path: resolve(folder)? },
        })
    }

    /// What reports call it.
    pub(crate) fn name(&self) -> String {
        match self {
            Model::Embedded => embedded::NAME.to_owned(),
            Model::Folder { name, .. } => name.clone(),
            Model::Random(config) => format!("random weights of {}", config.display()),
        }
    }

    /// The configuration alone, so that a request is checked before anything large is read.
    pub(crate) fn config(&self) -> anyhow::Result<MorConfig> {
        Ok(match self {
            Model::Embedded => MorConfig::from_json_str(embedded::CONFIG, embedded::NAME)?,
            Model::Folder { path, .. } => MorConfig::from_json_file(path.join("config.json"))?,
            Model::Random(config) => MorConfig::from_json_file(config)?,
        })
    }

    /// Whether it comes with a tokenizer; whether that is usable shows when it is loaded.
    pub(crate) fn has_tokenizer(&self) -> bool {
        match self {
            Model::Embedded => true,
            Model::Folder { path, .. } => path.join("tokenizer.json").exists(),
            Model::Random(_) => false,
        }
    }

    /// How it wants conversations to be written, where it says so.
    pub(crate) fn chat_template(&self) -> anyhow::Result<Option<ChatTemplate>> {
        Ok(match self {
            Model::Folder { path, .. } => ChatTemplate::from_folder(path)?,
            Model::Embedded | Model::Random(_) => None,
        })
    }

    /// Configuration and weights without a device.
    pub(crate) fn checkpoint(&self) -> anyhow::Result<Checkpoint> {
        Ok(match self {
            Model::Embedded => Checkpoint::from_bytes(embedded::CONFIG, embedded::WEIGHTS, embedded::NAME)?,
            Model::Folder { path, .. } => Checkpoint::open(path)?,
            Model::Random(_) => Checkpoint::random(self.config()?, 0, Dtype::F16),
        })
    }

    fn source(&self) -> anyhow::Result<ModelSource> {
        Ok(match self {
            Model::Embedded => embedded::source(),
            Model::Folder { path, .. } => ModelSource::Folder(path.clone()),
            Model::Random(_) => ModelSource::Random { config: self.config()?, seed: 0, dtype: Dtype::F16 },
        })
    }

    /// Loads it onto a device.
    pub(crate) fn load(&self, device: DeviceSelector, options: SessionOptions) -> anyhow::Result<Session> {
        load(self.source()?, device, options)
    }
}

/// The model folder that people name: one of this machine, or hf:owner/name[@revision], which is fetched.
pub(crate) fn resolve(named: &Path) -> anyhow::Result<PathBuf> {
    if let Some(model) = named.to_str().and_then(|text| text.strip_prefix("hf:")) {
        return fetch(model);
    }
    if !named.is_dir() {
        let what = if named.exists() { "is not a folder" } else { "does not exist" };
        let expected = "a model folder with config.json, model.safetensors and tokenizer.json";
        return Err(bad_input!("{}: {what}, expected {expected}, or hf:owner/name", named.display()));
    }
    Ok(named.to_owned())
}

#[cfg(feature = "hub")]
fn fetch(model: &str) -> anyhow::Result<PathBuf> {
    let model: mor_model::hub::HubModel = model.parse()?;
    let mut bar: Option<ProgressBar> = None;
    let folder = model.fetch(|progress| {
        let bar = bar.get_or_insert_with(|| progress_bar("fetching {msg} {bar:30} {bytes} of {total_bytes}", 0));
        bar.set_message(progress.file.to_owned());
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.received_bytes);
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(folder?)
}

#[cfg(not(feature = "hub"))]
fn fetch(model: &str) -> anyhow::Result<PathBuf> {
    Err(bad_input!("hf:{model}: this program was built without the feature hub, expected a model folder"))
}

/// Loads a model onto a device, with a progress bar where that takes a while.
pub(crate) fn load(source: ModelSource, device: DeviceSelector, options: SessionOptions) -> anyhow::Result<Session> {
    let was_chosen = device != DeviceSelector::Best;
    let gpu = GpuOptions { device, pipeline_cache: cache_folder(), ..options.gpu };
    let options = SessionOptions { gpu, on_load: Some(Box::new(load_progress())), ..options };
    let session = Session::load(source, options)?;
    warn_of_software(session.device(), was_chosen);
    if session.config().untrained_router {
        note("note: the routers of this model are untrained; its depths and its text mean nothing yet");
    }
    Ok(session)
}

/// Folder for what can be made again: `MOR_CACHE_DIR`, an empty one for none, or the program's own where the system keeps
/// such things.
fn cache_folder() -> Option<PathBuf> {
    match std::env::var_os("MOR_CACHE_DIR") {
        Some(folder) => (!folder.is_empty()).then(|| folder.into()),
        None => Some(etcetera::choose_base_strategy().ok()?.cache_dir().join("mor")),
    }
}

/// How a session stores numbers, for people.
pub(crate) fn storage(session: &Session) -> String {
    let quantization = session.config().quantization;
    let matrices = quantization.map_or(String::new(), |format| format!(" with {format} matrices"));
    let caches = if session.model().kv_dtype() == DType::Block8 { ", K/V in 8 bits" } else { "" };
    format!("{}{matrices}{caches}", session.precision().as_str())
}

/// What of a session is quantised, for tables: `q8`, `q8 kv8`; empty for nothing.
pub(crate) fn quantization(session: &Session) -> String {
    let matrices = session.config().quantization.map(Quantization::as_str);
    let caches = (session.model().kv_dtype() == DType::Block8).then_some("kv8");
    matrices.into_iter().chain(caches).collect::<Vec<_>>().join(" ")
}

/// A bar on standard error. indicatif draws nothing where that is no terminal.
fn progress_bar(template: &str, length: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length).with_style(style)
}

/// A callback that draws the upload.
fn load_progress() -> impl FnMut(LoadProgress) {
    let start = Instant::now();
    let mut bar: Option<ProgressBar> = None;
    move |progress| {
        let done = progress.uploaded_bytes >= progress.total_bytes;
        if bar.is_none() && !done && start.elapsed() > QUIET {
            bar = Some(progress_bar("loading {bar:30} {bytes} of {total_bytes}", progress.total_bytes));
        }
        if let Some(bar) = &bar {
            bar.set_position(progress.uploaded_bytes);
            if done {
                bar.finish_and_clear();
            }
        }
    }
}

/// Has llvmpipe, should it be what runs the model, compute on one thread: it wakes the others for every dispatch, which takes
/// longer than they save where a dispatch computes little. For the beginning of the program; other drivers do not look.
pub(crate) fn spare_threads_of_llvmpipe() {
    const VARIABLE: &str = "LP_NUM_THREADS";
    if std::env::var_os(VARIABLE).is_none() {
        // SAFETY: no thread has been started that could read the environment meanwhile.
        unsafe { std::env::set_var(VARIABLE, "0") };
    }
}

/// A software rasteriser computes the same, so it is used; but nobody should take its speed for a GPU's.
fn warn_of_software(adapter: &AdapterSummary, was_chosen: bool) {
    if adapter.kind != AdapterKind::Cpu {
        return;
    }
    let name = &adapter.name;
    if was_chosen {
        note(&format!("warning: running on the software rasteriser \"{name}\" (slow)"));
    } else {
        note(&format!(
            "warning: no GPU driver found; running on the software rasteriser \"{name}\" (slow); install the Vulkan \
             driver of your GPU (mesa-vulkan-drivers for AMD and Intel, NVIDIA's own for NVIDIA)"
        ));
    }
}
