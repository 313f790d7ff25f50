//! [`KeptFile`]: a file that one run leaves to the next, behind a checksum.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes of the checksum at the beginning of a file.
const CHECKSUM_BYTES: usize = size_of::<u64>();

/// A file that is read and replaced as a whole.
#[derive(Debug)]
pub(crate) struct KeptFile {
    path: PathBuf,
}

impl KeptFile {
    /// The file called `name` in `folder`, whether it exists or not. Files `of` other devices, drivers and versions of ours have
    /// other names, and stay as they are.
    pub(crate) fn new(folder: &Path, name: &str, of: &str, extension: &str) -> Self {
        Self { path: folder.join(format!("{name}_{:016x}.{extension}", checksum(of.as_bytes()))) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What was written; `None` if there is nothing, or it is damaged, which means that `lost`.
    pub(crate) fn read(&self, lost: &str) -> Option<Vec<u8>> {
        let file = fs::read(&self.path).ok()?;
        let data = unpack(&file).map(<[u8]>::to_vec);
        if data.is_none() {
            tracing::warn!("{}: damaged, so {lost}", self.path.display());
        }
        data
    }

    /// Replaces the file as a whole; its folder is made if need be.
    pub(crate) fn write(&self, data: &[u8]) -> std::io::Result<()> {
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder)?;
        }
        // Programs that end at the same time write files of their own; the last one stays.
        let temporary = self.path.with_extension(format!("{}.tmp", std::process::id()));
        let result = fs::write(&temporary, pack(data)).and_then(|()| fs::rename(&temporary, &self.path));
        if result.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        result
    }
}

/// FNV-1a: finds accidents, not attacks.
pub(crate) fn checksum(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

pub(crate) fn pack(data: &[u8]) -> Vec<u8> {
    [&checksum(data).to_le_bytes(), data].concat()
}

/// The data of a file that is as it was written.
pub(crate) fn unpack(file: &[u8]) -> Option<&[u8]> {
    let (sum, data) = file.split_first_chunk::<CHECKSUM_BYTES>()?;
    (u64::from_le_bytes(*sum) == checksum(data)).then_some(data)
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
