//! [`PipelineCache`]: what the driver has compiled, in a file, so that the next program need not compile it again.

use std::path::Path;

use crate::kept_file::{KeptFile, checksum};

/// The driver's compiled kernels; written to its file when the device is given up.
#[derive(Debug)]
pub(crate) struct PipelineCache {
    cache: wgpu::PipelineCache,
    file: KeptFile,
    /// Of the file's data as it was read; 0 for none.
    checksum: u64,
}

impl PipelineCache {
    /// The cache of an adapter and driver in `folder`, empty if there is none yet or it is damaged. `None` where the backend
    /// has no such thing. The device must have the feature `PIPELINE_CACHE`.
    pub(crate) fn open(device: &wgpu::Device, info: &wgpu::AdapterInfo, folder: &Path) -> Option<Self> {
        let adapter = wgpu::util::pipeline_cache_key(info)?;
        let of = format!("{} {} {}", info.driver, info.driver_info, env!("CARGO_PKG_VERSION"));
        let file = KeptFile::new(folder, &adapter, &of, "bin");
        let data = file.read("kernels are compiled anew");
        let data = data.as_deref();
        let descriptor = wgpu::PipelineCacheDescriptor { label: Some("mor"), data, fallback: true };
        // SAFETY: the data is what `get_data` returned: its checksum was written beside it, by `save` alone. What another
        // version of wgpu or driver has written is told by wgpu's header and the driver's, which both check.
        let cache = unsafe { device.create_pipeline_cache(&descriptor) };
        Some(Self { cache, file, checksum: data.map_or(0, checksum) })
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
        self.file.write(&data)
    }
}

impl Drop for PipelineCache {
    fn drop(&mut self) {
        // Without the file the next program only starts more slowly.
        if let Err(error) = self.save() {
            tracing::warn!("{}: {error}, so the next start compiles kernels anew", self.file.path().display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use crate::gpu::{Gpu, GpuOptions};
    use crate::kept_file::{pack, unpack};
    use crate::ops::{RmsNorm, RmsNormBindings, RmsNormParams};
    use crate::parity;
    use crate::plan::{Grid, PlanBuilder};

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
            let params = RmsNormParams { eps: 0.0 };
            plan.dispatch(&RmsNorm::new(gpu.caps(), 4), &bindings, &params, Grid::Fixed([1, 1, 1])).unwrap();
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
