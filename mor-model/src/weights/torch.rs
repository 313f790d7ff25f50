//! `pytorch_model.bin`: a zip archive of a pickle and of the storages that it refers to.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;

use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use super::files::{Bytes, Stored, WeightFile, WeightFiles};
use super::pickle::{self, TensorRef};
use crate::ModelError;

/// Largest pickle: that of a state dict has some 200 bytes a tensor.
const MAX_PICKLE_BYTES: usize = 16 << 20;

/// Finds the tensors of a file that `torch.save` wrote.
///
/// Elements stay where they are in the mapped file; those of a tensor that is not contiguous there are gathered.
///
/// # Errors
///
/// [`ModelError::TorchFile`].
pub(super) fn read(file: WeightFile) -> Result<WeightFiles, ModelError> {
    let refuse = |problem: String| ModelError::TorchFile { file: file.name.clone(), problem };
    let bytes = file.bytes.as_slice();
    let records = records(bytes).map_err(refuse)?;
    let (pickle_name, pickle) = records
        .iter()
        .find(|(name, _)| name.split_once('/').is_some_and(|(_, name)| name == "data.pkl"))
        .ok_or_else(|| refuse("the archive has no data.pkl, expected what torch.save writes".to_owned()))?;
    if pickle.len() > MAX_PICKLE_BYTES {
        let problem = format!("its pickle has {} bytes, expected at most {MAX_PICKLE_BYTES}", pickle.len());
        return Err(refuse(problem));
    }
    let folder = pickle_name.trim_end_matches("data.pkl");
    if let Some(order) = records.get(&format!("{folder}byteorder")).map(|range| &bytes[range.clone()])
        && order != b"little"
    {
        let order = String::from_utf8_lossy(order);
        return Err(refuse(format!("its byte order is {order}, expected little; save it again on another machine")));
    }

    let mut gathered = Vec::new();
    let mut stored: HashMap<String, Stored> = HashMap::new();
    for (name, tensor) in pickle::read_state_dict(&bytes[pickle.clone()]).map_err(refuse)? {
        let storage = records
            .get(&format!("{folder}data/{}", tensor.storage.key))
            .ok_or_else(|| refuse(format!("the archive has no storage {}, that of {name}", tensor.storage.key)))?;
        let elems = locate(&tensor, &bytes[storage.clone()]).map_err(|problem| refuse(format!("{name} {problem}")))?;
        let (file, bytes) = match elems {
            Elems::Range(range) => (0, storage.start + range.start..storage.start + range.end),
            Elems::Gathered(bytes) => {
                let range = 0..bytes.len();
                gathered.push(bytes);
                (gathered.len(), range)
            }
        };
        let view = Stored { file, dtype: tensor.storage.dtype, shape: tensor.shape, bytes };
        if stored.insert(name.clone(), view).is_some() {
            return Err(refuse(format!("the state dict has {name} twice")));
        }
    }
    let name = file.name.clone();
    let gathered =
        gathered.into_iter().map(|bytes| WeightFile { name: name.clone(), bytes: Bytes::Memory(Cow::Owned(bytes)) });
    let files = std::iter::once(file).chain(gathered).collect();
    Ok(WeightFiles { files, stored })
}

/// Where the records of the archive lie in the file.
///
/// All are stored as they are: so nothing is unpacked, and no small file becomes a large one in memory.
fn records(bytes: &[u8]) -> Result<HashMap<String, Range<usize>>, String> {
    if !bytes.starts_with(b"PK") {
        return Err(if bytes.starts_with(b"\x80") {
            "is in the format that torch.save had before 1.6, expected a zip archive; load it with torch and save it again"
        } else {
            "is no zip archive, expected what torch.save writes"
        }
        .to_owned());
    }
    let damaged = |error: ZipError| format!("is no whole zip archive ({error}); copy or download it again");
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(damaged)?;
    let mut records = HashMap::with_capacity(archive.len());
    for index in 0..archive.len() {
        let record = archive.by_index_raw(index).map_err(damaged)?;
        let name = record.name().map_err(damaged)?.into_owned();
        if record.compression() != CompressionMethod::Stored || record.encrypted() {
            return Err(format!("record {name} is compressed or encrypted, which torch.save never does"));
        }
        let range = record.data_start().and_then(|start| {
            let start = usize::try_from(start).ok()?;
            let end = start.checked_add(usize::try_from(record.compressed_size()).ok()?)?;
            (end <= bytes.len()).then_some(start..end)
        });
        let range = range.ok_or_else(|| format!("record {name} passes the end of the file; download it again"))?;
        if records.insert(name.clone(), range).is_some() {
            return Err(format!("the archive has record {name} twice"));
        }
    }
    Ok(records)
}

/// The elements of a tensor.
enum Elems {
    /// These bytes of its storage.
    Range(Range<usize>),
    /// Copied from all over its storage.
    Gathered(Vec<u8>),
}

fn locate(tensor: &TensorRef, storage: &[u8]) -> Result<Elems, String> {
    let TensorRef { storage: description, offset, shape, strides } = tensor;
    let elem_bytes = description.dtype.bitsize() / 8;
    if description.len.checked_mul(elem_bytes) != Some(storage.len()) {
        let (found, len, dtype) = (storage.len(), description.len, description.dtype);
        return Err(format!("is in a storage of {found} bytes, expected {len} elements of {dtype}"));
    }
    if shape.len() != strides.len() {
        return Err(format!("has shape {shape:?} and strides {strides:?}, expected as many of each"));
    }
    let outside = || {
        let len = description.len;
        format!("has shape {shape:?} and strides {strides:?} from {offset}, which passes its storage of {len} elements")
    };
    let num_elems = shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size)).ok_or_else(outside)?;
    if num_elems == 0 {
        return Ok(Elems::Range(0..0));
    }
    let last = shape
        .iter()
        .zip(strides)
        .try_fold(*offset, |last, (&size, &stride)| last.checked_add((size - 1).checked_mul(stride)?))
        .ok_or_else(outside)?;
    // More elements than the storage has would be one element seen many times.
    if last >= description.len || num_elems > description.len {
        return Err(outside());
    }
    let mut dense = 1;
    let is_contiguous = shape.iter().zip(strides).rev().all(|(&size, &stride)| {
        let fits = size == 1 || stride == dense;
        dense *= size;
        fits
    });
    if is_contiguous {
        return Ok(Elems::Range(offset * elem_bytes..(offset + num_elems) * elem_bytes));
    }
    let mut bytes = Vec::with_capacity(num_elems * elem_bytes);
    let mut index = vec![0; shape.len()];
    let mut at = *offset;
    for _ in 0..num_elems {
        bytes.extend_from_slice(&storage[at * elem_bytes..][..elem_bytes]);
        // The next index: the last dimension that is not at its end goes on, those after it begin again.
        for dim in (0..shape.len()).rev() {
            index[dim] += 1;
            at += strides[dim];
            if index[dim] < shape[dim] {
                break;
            }
            at -= strides[dim] * shape[dim];
            index[dim] = 0;
        }
    }
    Ok(Elems::Gathered(bytes))
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use safetensors::Dtype;

    use super::super::pickle::StorageRef;
    use super::*;

    fn elems(offset: usize, shape: &[usize], strides: &[usize]) -> Result<Vec<u8>, String> {
        let storage: Vec<u8> = (0..12).collect();
        let description = Rc::new(StorageRef { key: "0".into(), dtype: Dtype::U8, len: storage.len() });
        let tensor = TensorRef { storage: description, offset, shape: shape.to_vec(), strides: strides.to_vec() };
        Ok(match locate(&tensor, &storage)? {
            Elems::Range(range) => storage[range].to_vec(),
            Elems::Gathered(bytes) => bytes,
        })
    }

    #[test]
    fn strides_are_followed() {
        assert_eq!(elems(0, &[3, 4], &[4, 1]).unwrap(), (0..12).collect::<Vec<_>>());
        assert_eq!(elems(4, &[2, 4], &[4, 1]).unwrap(), (4..12).collect::<Vec<_>>());
        // Transposed, every second, and a dimension of one element whose stride is of no account.
        assert_eq!(elems(0, &[4, 3], &[1, 4]).unwrap(), [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]);
        assert_eq!(elems(1, &[3], &[2]).unwrap(), [1, 3, 5]);
        assert_eq!(elems(2, &[1, 3], &[99, 1]).unwrap(), [2, 3, 4]);
        assert_eq!(elems(5, &[], &[]).unwrap(), [5]);
        assert!(elems(0, &[0, 4], &[4, 1]).unwrap().is_empty());
    }

    #[test]
    fn views_beyond_their_storage_are_refused() {
        for (offset, shape, strides) in [
            (1, vec![3, 4], vec![4, 1]),
            (0, vec![13], vec![0]),
            (0, vec![2], vec![usize::MAX]),
            (0, vec![usize::MAX, 2], vec![1, 1]),
            (usize::MAX, vec![1], vec![1]),
        ] {
            assert!(elems(offset, &shape, &strides).unwrap_err().contains("passes its storage"), "{shape:?}");
        }
        assert!(elems(0, &[2], &[1, 1]).unwrap_err().contains("as many of each"));
    }
}
