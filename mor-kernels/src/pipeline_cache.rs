//! [`PipelineCache`]: what the driver has compiled, in a file, so that the next program need not compile it again.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes of the checksum at the beginning of a file.
const CHECKSUM_BYTES: usize = size_of::<u64>();

/// The driver's compiled kernels; written to its file when the device is given up.
#[derive(Debug)]
pub(crate) struct PipelineCache {
    cache: wgpu::PipelineCache,
    path: PathBuf,
    /// Of the file as it was read; 0 for none.
    checksum: u64,
}

impl PipelineCache {
    /// The cache of an adapter and driver in `folder`, empty if there is none yet or it is damaged. `None` where the backend
    /// has no such thing. The device must have the feature `PIPELINE_CACHE`.
    pub(crate) fn open(device: &wgpu::Device, info: &wgpu::AdapterInfo, folder: &Path) -> Option<Self> {
        let adapter = wgpu::util::pipeline_cache_key(info)?;
        // Files of other drivers and versions of ours stay as they are.
        let of = format!("{} {} {}", info.driver, info.driver_info, env!("CARGO_PKG_VERSION"));
        let path = folder.join(format!("{adapter}_{:016x}.bin", checksum(of.as_bytes())));
        let file = fs::read(&path).ok();
        let data = file.as_deref().and_then(unpack);
        if file.is_some() && data.is_none() {
            tracing::warn!("{}: damaged, so kernels are compiled anew", path.display());
        }
        let descriptor = wgpu::PipelineCacheDescriptor { label: Some("mor"), data, fallback: true };
        // SAFETY: the data is what `get_data` returned: its checksum was written beside it, by `save` alone. What another
        // version of wgpu or driver has written is told by wgpu's header and the driver's, which both check.
        let cache = unsafe { device.create_pipeline_cache(&descriptor) };
        Some(Self { cache, path, checksum: data.map_or(0, checksum) })
    }

    /// What pipelines are created with.
    pub(crate) fn handle(&self) -> &wgpu::PipelineCache {
        &self.cache
    }

    /// Replaces the file as a whole, if there is anything new.
    fn save(&self) -> std::io::Result<()> {
        let Some(data) = self.cache.get_data() else { return Ok(()) };
        if checksum(&data) == self.checksum {
            return Ok(());
        }
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder)?;
        }
        // Programs that end at the same time write files of their own; the last one stays.
        let temporary = self.path.with_extension(format!("{}.tmp", std::process::id()));
        let result = fs::write(&temporary, pack(&data)).and_then(|()| fs::rename(&temporary, &self.path));
        if result.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        result
    }
}

impl Drop for PipelineCache {
    fn drop(&mut self) {
        // Without the file the next program only starts more slowly.
        if let Err(error) = self.save() {
            tracing::warn!("{}: {error}, so the next start compiles kernels anew", self.path.display());
        }
    }
}

/// FNV-1a: finds accidents, not attacks.
fn checksum(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn pack(data: &[u8]) -> Vec<u8> {
    [&checksum(data).to_le_bytes(), data].concat()
}

/// The data of a file that is as it was written.
fn unpack(file: &[u8]) -> Option<&[u8]> {
    let (sum, data) = file.split_first_chunk::<CHECKSUM_BYTES>()?;
    (u64::from_le_bytes(*sum) == checksum(data)).then_some(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Gpu, GpuOptions};
    use crate::ops::{RmsNorm, RmsNormBindings, RmsNormParams};
    use crate::parity;
    use crate::plan::{Grid, PlanBuilder};

    #[test]
    fn damage_is_found() {
        let file = pack(b"kernels");
        assert_eq!(unpack(&file), Some(&b"kernels"[..]));
        assert_eq!(unpack(&file[..file.len() - 1]), None);
        assert_eq!(unpack(&file[..3]), None);
        let mut file = file;
        file[10] ^= 1;
        assert_eq!(unpack(&file), None);
    }

    #[test]
    fn kernels_outlive_the_device() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("made/when/needed");
        let options =
            GpuOptions { device: parity::device(), pipeline_cache: Some(folder.clone()), ..GpuOptions::default() };
        let compile = || {
            let gpu = Gpu::open(&options).unwrap();
            let rows = parity::row_set(&gpu, &[]);
            let x = parity::upload(&gpu, &[0.0; 4]);
            let y = parity::Output::new(&gpu, 4);
            let mut plan = PlanBuilder::new(&gpu).unwrap();
            let bindings = RmsNormBindings { rows: &rows, x: &x, weight: &x, y: &y.tensor };
            let params = RmsNormParams { hidden_size: 4, eps: 0.0 };
            plan.dispatch(&RmsNorm::default(), &bindings, &params, Grid::Fixed([1, 1, 1])).unwrap();
            plan.finish().unwrap();
            gpu.inner.pipeline_cache.is_some()
        };
        if !compile() {
            eprintln!("skipped: the backend keeps no pipelines");
            return;
        }
        let files = || fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
        let [path] = &files()[..] else { panic!("{:?}", files()) };
        assert!(unpack(&fs::read(path).unwrap()).is_some());
        // Neither damage nor what somebody else wrote there does any harm, and both are replaced.
        for foreign in [b"kernels".to_vec(), pack(b"kernels"), Vec::new()] {
            fs::write(path, &foreign).unwrap();
            compile();
            assert_eq!(files(), std::slice::from_ref(path));
            assert_ne!(fs::read(path).unwrap(), foreign);
        }
    }
}
