//! CPU reference of `attention_decode`, and the inputs that tests and benches of attention share.

use crate::gpu::Gpu;
use crate::kv_blocks::{BLOCK, pack_block, unpack_block};
use crate::ops::AttentionShape;
use crate::parity::{self, Rng};
use crate::rows::{ActiveRow, KvTable, PAGE_SIZE, RowSet};
use crate::tensor::{DType, Tensor};

/// What an attention kernel reads. Keys and values are f32 here, rounded to the type of the cache.
#[derive(Clone, Debug)]
pub struct AttentionInputs {
    /// The query rows.
    pub active: Vec<ActiveRow>,
    /// `[n, H, D]`.
    pub q: Vec<f32>,
    /// `[slots, G, D]`.
    pub keys: Vec<f32>,
    /// `[slots, G, D]`.
    pub values: Vec<f32>,
    /// Pages or slots.
    pub table: Vec<u32>,
}

/// [`AttentionInputs`] on a device.
#[derive(Clone, Debug)]
pub struct AttentionTensors {
    /// The query rows.
    pub rows: RowSet,
    /// `[n, H, D]` f32.
    pub q: Tensor,
    /// `[slots, G, D]` in the type of the cache.
    pub keys: Tensor,
    /// `[slots, G, D]` in the type of the cache.
    pub values: Tensor,
    /// Pages or slots, u32.
    pub table: Tensor,
}

impl AttentionInputs {
    /// Sequences of `(rows, keys of the last row)`, the keys of each ending with its rows; pages or slots lie in
    /// random order, and slots that belong to no key hold NaN. Scores have the standard deviation `spread`.
    pub fn random(rng: &mut Rng, shape: &AttentionShape, sequences: &[(usize, usize)], spread: f32) -> Self {
        let page_size = PAGE_SIZE as usize;
        let slot_elems = (shape.num_key_value_heads * shape.head_dim) as usize;
        // One page more than needed, and entries of the table before the first one in use, or none: entries past the end of a list
        // name the first.
        let num_pages = 1 + sequences.iter().map(|(_, len)| len.div_ceil(page_size)).sum::<usize>();
        let mut units: Vec<u32> = match shape.kv_table {
            KvTable::Pages => (0..num_pages as u32).collect(),
            KvTable::Slots => (0..(num_pages * page_size) as u32).collect(),
        };
        for i in (1..units.len()).rev() {
            units.swap(i, rng.below(i + 1));
        }
        let mut table = vec![u32::MAX; 3 * rng.below(2)];
        let mut active = Vec::new();
        let mut cache = [vec![f32::NAN; num_pages * page_size * slot_elems], Vec::new()];
        cache[1] = cache[0].clone();
        for (sequence, &(num_rows, kv_len)) in sequences.iter().enumerate() {
            let start = table.len() as u32;
            let num_units = if shape.kv_table == KvTable::Pages { kv_len.div_ceil(page_size) } else { kv_len };
            table.extend(units.drain(..num_units));
            for key in 0..kv_len {
                let slot = slot_of(shape.kv_table, &table, start, key);
                for cache in &mut cache {
                    let row = &mut cache[slot * slot_elems..][..slot_elems];
                    row.fill_with(|| rng.normal());
                    round_to(shape.kv_dtype, row);
                }
            }
            for row in 0..num_rows {
                let position = (kv_len - num_rows + row) as u32;
                active.push(ActiveRow {
                    row: active.len() as u32,
                    sequence: sequence as u32,
                    position,
                    kv_len: position + 1,
                    kv_table: start,
                    ..ActiveRow::ABSENT
                });
            }
        }
        let mut q = rng.normals(active.len() * (shape.num_attention_heads * shape.head_dim) as usize);
        q.iter_mut().for_each(|value| *value *= spread);
        let [keys, values] = cache;
        Self { active, q, keys, values, table }
    }

    /// Uploads everything.
    ///
    /// # Panics
    /// If the device refuses the memory.
    pub fn upload(&self, gpu: &Gpu, shape: &AttentionShape) -> AttentionTensors {
        let cache = |values: &[f32]| match shape.kv_dtype {
            DType::Block8 => {
                let blocks: Vec<u64> = values
                    .chunks_exact(BLOCK)
                    .map(|block| pack_block(block.try_into().expect("whole blocks")))
                    .collect();
                Tensor::from_slice(gpu, "cache", DType::Block8, &[values.len()], &blocks).expect("a test's buffer fits")
            }
            DType::F16 => {
                let halves: Vec<half::f16> = values.iter().map(|value| half::f16::from_f32(*value)).collect();
                Tensor::from_slice(gpu, "cache", DType::F16, &[halves.len()], &halves).expect("a test's buffer fits")
            }
            _ => parity::upload(gpu, values),
        };
        AttentionTensors {
            rows: parity::row_set(gpu, &self.active),
            q: parity::upload(gpu, &self.q),
            keys: cache(&self.keys),
            values: cache(&self.values),
            table: parity::upload_u32(gpu, &self.table),
        }
    }

    /// Maximum, sum and unnormalised weighted sum of values of row `i`, query head `head`, over `keys`.
    pub(crate) fn softmax_over(
        &self,
        shape: &AttentionShape,
        scale: f32,
        (i, head): (usize, usize),
        keys: std::ops::Range<usize>,
    ) -> (f64, f64, Vec<f64>) {
        let head_dim = shape.head_dim as usize;
        let kv_head = head / shape.group_size() as usize;
        let entry = &self.active[i];
        let query = &self.q[(i * shape.num_attention_heads as usize + head) * head_dim..][..head_dim];
        let head_of = |key: usize| {
            let slot = slot_of(shape.kv_table, &self.table, entry.kv_table, key);
            let start = (slot * shape.num_key_value_heads as usize + kv_head) * head_dim;
            start..start + head_dim
        };
        let scores: Vec<f64> = keys
            .clone()
            .map(|key| {
                let products = query.iter().zip(&self.keys[head_of(key)]);
                products.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * f64::from(scale)
            })
            .collect();
        let highest = scores.iter().copied().fold(f64::from(f32::MIN), f64::max);
        let mut sum = 0.0;
        let mut out = vec![0.0; head_dim];
        for (key, score) in keys.zip(scores) {
            let weight = (score - highest).exp();
            sum += weight;
            for (out, value) in out.iter_mut().zip(&self.values[head_of(key)]) {
                *out += weight * f64::from(*value);
            }
        }
        (highest, sum, out)
    }
}

/// Physical slot of a key.
fn slot_of(kind: KvTable, table: &[u32], start: u32, key: usize) -> usize {
    let (start, page_size) = (start as usize, PAGE_SIZE as usize);
    match kind {
        KvTable::Pages => table[start + key / page_size] as usize * page_size + key % page_size,
        KvTable::Slots => table[start + key] as usize,
    }
}

fn round_to(dtype: DType, values: &mut [f32]) {
    match dtype {
        DType::F16 => values.iter_mut().for_each(|value| *value = half::f16::from_f32(*value).to_f32()),
        DType::Block8 => {
            for block in values.chunks_exact_mut(BLOCK) {
                // Again, where rounding has made the largest smaller and with it the scale that it needs.
                for _ in 0..3 {
                    let packed = pack_block((&*block).try_into().expect("whole blocks"));
                    block.copy_from_slice(&unpack_block(packed));
                }
            }
        }
        _ => {}
    }
}

/// The partial results `([n, H, num_splits, D], [n, H, num_splits, 2])` of every split of the keys.
///
/// # Source
/// Dao et al. 2023, Flash-Decoding.
pub fn attention_decode(
    shape: &AttentionShape,
    inputs: &AttentionInputs,
    scale: f32,
    num_splits: u32,
) -> (Vec<f32>, Vec<f32>) {
    let (num_splits, page_size) = (num_splits as usize, PAGE_SIZE as usize);
    let (mut partial_out, mut partial_stats) = (Vec::new(), Vec::new());
    for (i, entry) in inputs.active.iter().enumerate() {
        let kv_len = entry.kv_len as usize;
        let chunk = kv_len.div_ceil(num_splits).next_multiple_of(page_size);
        for head in 0..shape.num_attention_heads as usize {
            for split in 0..num_splits {
                let keys = (split * chunk).min(kv_len)..((split + 1) * chunk).min(kv_len);
                let (highest, sum, out) = inputs.softmax_over(shape, scale, (i, head), keys);
                partial_out.extend(out.into_iter().map(|value| value as f32));
                partial_stats.extend([highest as f32, sum as f32]);
            }
        }
    }
    (partial_out, partial_stats)
}

/// Merges the partial results of `attention_decode` into `[n, H, D]`.
pub fn merge_partials(shape: &AttentionShape, num_splits: u32, partial_out: &[f32], partial_stats: &[f32]) -> Vec<f32> {
    let (head_dim, num_splits) = (shape.head_dim as usize, num_splits as usize);
    let mut merged = Vec::with_capacity(partial_out.len() / num_splits);
    for (out, stats) in partial_out.chunks(num_splits * head_dim).zip(partial_stats.chunks(num_splits * 2)) {
        let highest = stats.iter().step_by(2).copied().fold(f32::MIN, f32::max);
        let weights: Vec<f64> = stats.iter().step_by(2).map(|m| (f64::from(*m) - f64::from(highest)).exp()).collect();
        let sum: f64 = weights.iter().zip(stats.chunks(2)).map(|(w, stats)| w * f64::from(stats[1])).sum();
        merged.extend((0..head_dim).map(|d| {
            let total: f64 = weights.iter().zip(out.chunks(head_dim)).map(|(w, out)| w * f64::from(out[d])).sum();
            (total / sum) as f32
        }));
    }
    merged
}
