//! [`Tuning`]: what trials have found out about a device, in a file, so that the next program need not search again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::gpu::Gpu;
use crate::kept_file::KeptFile;

/// Numbers by name, as lines of a name, a space and the number.
#[derive(Debug)]
pub(crate) struct Tuning {
    file: KeptFile,
    values: Mutex<BTreeMap<String, u32>>,
}

impl Tuning {
    /// What is known of an adapter and driver in `folder`: nothing if there is no file yet, or it is damaged.
    pub(crate) fn open(info: &wgpu::AdapterInfo, folder: &Path) -> Self {
        let of = format!(
            "{} {} {} {} {} {} {}",
            info.backend,
            info.vendor,
            info.device,
            info.name,
            info.driver,
            info.driver_info,
            env!("CARGO_PKG_VERSION")
        );
        let file = KeptFile::new(folder, "tuning", &of, "txt");
        let values = Mutex::new(read(&file));
        Self { file, values }
    }
}

/// The lines of a file that are of the form; what somebody else wrote there is none of ours.
fn read(file: &KeptFile) -> BTreeMap<String, u32> {
    let data = file.read("trials are run anew").unwrap_or_default();
    let line = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    String::from_utf8_lossy(&data).lines().filter_map(line).collect()
}

impl Gpu {
    /// What [`Gpu::remember`] was told under `name`, by this program or one before it on this adapter, with this driver and version:
    /// `None` unless [`GpuOptions::pipeline_cache`](crate::gpu::GpuOptions::pipeline_cache) names a folder. Whoever asks must
    /// still be right if it is wrong.
    pub fn tuned(&self, name: &str) -> Option<u32> {
        let values = self.inner.tuning.as_ref()?.values.lock().unwrap_or_else(PoisonError::into_inner);
        values.get(name).copied()
    }

    /// Keeps what a trial has found out under `name`, a line of text, for [`Gpu::tuned`].
    pub fn remember(&self, name: &str, value: u32) {
        let Some(Tuning { file, values }) = &self.inner.tuning else { return };
        let mut values = values.lock().unwrap_or_else(PoisonError::into_inner);
        if values.insert(name.to_owned(), value) == Some(value) {
            return;
        }
        // Programs that run at the same time find out other things.
        let mut all = read(file);
        all.extend(values.iter().map(|(name, value)| (name.clone(), *value)));
        let text: String = all.iter().map(|(name, value)| format!("{name} {value}\n")).collect();
        // Without the file the next program only searches again.
        if let Err(error) = file.write(text.as_bytes()) {
            tracing::warn!("{}: {error}, so the next start runs trials anew", file.path().display());
        }
        *values = all;
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use std::fs;

    use super::*;
    use crate::gpu::GpuOptions;
    use crate::kept_file::{pack, unpack};
    use crate::parity;

    #[test]
    fn values_outlive_the_device() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("made/when/needed");
        let options = |pipeline_cache| GpuOptions { device: parity::device(), pipeline_cache, ..GpuOptions::default() };
        let open = || Gpu::open(&options(Some(folder.clone()))).unwrap();
        let files = || {
            let paths = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
            paths.filter(|path| path.extension().is_some_and(|extension| extension == "txt")).collect::<Vec<_>>()
        };

        let (first, second) = (open(), open());
        assert_eq!(first.tuned("workgroups of a kernel"), None);
        first.remember("workgroups of a kernel", 132);
        first.remember("others", 1);
        // Neither loses what the other has found out, and each knows its own.
        second.remember("others", 2);
        assert_eq!((second.tuned("workgroups of a kernel"), second.tuned("others")), (Some(132), Some(2)));
        assert_eq!(first.tuned("others"), Some(1));
        let third = open();
        assert_eq!((third.tuned("workgroups of a kernel"), third.tuned("others")), (Some(132), Some(2)));
        assert_eq!(third.tuned("workgroups"), None);

        // Neither damage nor what somebody else wrote there does any harm, and both are replaced.
        let [path] = &files()[..] else { panic!("{:?}", files()) };
        let written = fs::read(path).unwrap();
        let damaged = [&written[..written.len() - 1], b"0"].concat();
        let foreign =
            [pack(b"others -1\nothers\n\n 4 5 x\nothers 99999999999\n"), pack(&[0xff, 0x20]), b"others 3\n".to_vec()];
        for bytes in foreign.into_iter().chain([damaged, Vec::new()]) {
            fs::write(path, bytes).unwrap();
            let gpu = open();
            assert_eq!(gpu.tuned("others"), None);
            gpu.remember("others", 7);
            assert_eq!(open().tuned("others"), Some(7));
            assert!(unpack(&fs::read(path).unwrap()).is_some());
            assert_eq!(files(), std::slice::from_ref(path));
        }
    }

    #[test]
    fn nothing_is_kept_without_a_folder() {
        let gpu = parity::gpu();
        gpu.remember("others", 1);
        assert_eq!(gpu.tuned("others"), None);
    }
}
