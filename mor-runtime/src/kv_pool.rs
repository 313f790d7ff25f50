//! [`KvPool`]: the K/V caches of a fixed number of sequences.

use mor_kernels::rows::PAGE_SIZE;
use mor_kernels::tensor::{DType, Tensor};
use mor_kernels::{Gpu, Result};
use mor_model::{KvStrategy, KvTensors, MorModel};

/// Caches, page tables and lengths of `num_sequences` sequences of up to `max_positions` tokens.
///
/// Each (sequence, group) owns the pages of its longest case, so nothing is allocated while sequences grow.
#[derive(Debug)]
pub(crate) struct KvPool {
    pub(crate) tensors: KvTensors,
    pub(crate) num_sequences: usize,
    num_groups: usize,
}

/// Bytes of the K/V buffers for these sizes.
pub(crate) fn kv_bytes(model: &MorModel, num_sequences: usize, max_positions: usize) -> u64 {
    let row = model.kv_dim() * model.precision().kv_dtype().bytes();
    let pages: usize = (0..model.kv_layout().num_buffers()).map(|b| groups_of(model, b).len()).sum();
    let slots = pages * num_sequences * max_positions.next_multiple_of(PAGE_SIZE as usize);
    (2 * slots * row) as u64
}

/// The groups that store entries in buffer `buffer`, ascending.
fn groups_of(model: &MorModel, buffer: usize) -> Vec<usize> {
    let layers = model.kv_layout().layers().iter().filter(|layer| layer.buffer == buffer);
    let mut groups: Vec<_> = layers.filter_map(|layer| layer.write_group).collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

impl KvPool {
    /// Allocates the pool.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`](mor_kernels::KernelError::OutOfMemory).
    pub(crate) fn new(model: &MorModel, num_sequences: usize, max_positions: usize) -> Result<Self> {
        let (gpu, config, layout) = (model.gpu(), model.config(), model.kv_layout());
        let num_groups = layout.num_groups();
        let max_positions = max_positions.next_multiple_of(PAGE_SIZE as usize);
        let max_pages = max_positions / PAGE_SIZE as usize;

        let mut buffers = Vec::new();
        // Within a buffer, groups follow one another; a group has the same place in every buffer that stores it,
        // because all its layers are tied alike.
        let mut place = vec![0; num_groups];
        for buffer in 0..layout.num_buffers() {
            let groups = groups_of(model, buffer);
            for (index, group) in groups.iter().enumerate() {
                place[*group] = index;
            }
            let slots = groups.len() * num_sequences * max_positions;
            let cache = |name: &str| {
                let label = format!("{name}.{buffer}");
                Tensor::zeros(gpu, &label, model.precision().kv_dtype(), &[slots, model.kv_dim()])
            };
            buffers.push((cache("k")?, cache("v")?));
        }
        let page = |sequence: usize, group: usize, page: usize| {
            ((place[group] * num_sequences + sequence) * max_pages + page) as u32
        };
        let table: Vec<u32> = (0..num_sequences)
            .flat_map(|s| (0..num_groups).flat_map(move |g| (0..max_pages).map(move |p| (s, g, p))))
            .map(|(s, g, p)| page(s, g, p))
            .collect();
        let shape = [num_sequences, num_groups, max_pages];
        let slots = (config.kv == KvStrategy::Hybrid)
            .then(|| Tensor::zeros(gpu, "kv_slots", DType::U32, &[num_sequences, num_groups, max_positions]))
            .transpose()?;
        let tensors = KvTensors {
            buffers,
            lengths: Tensor::zeros(gpu, "kv_lengths", DType::U32, &[num_sequences, num_groups])?,
            pages: Tensor::from_slice(gpu, "kv_pages", DType::U32, &shape, &table)?,
            slots,
            rope: rope_table(model, max_positions)?,
            max_positions,
        };
        Ok(Self { tensors, num_sequences, num_groups })
    }

    /// Forgets a sequence's entries.
    pub(crate) fn clear(&self, gpu: &Gpu, sequence: usize) {
        let bytes = vec![0; 4 * self.num_groups];
        gpu.write(&self.tensors.lengths, (sequence * bytes.len()) as u64, &bytes);
    }

    /// Entries stored per effective layer of a sequence, as the device counted them.
    ///
    /// # Errors
    /// [`KernelError::Device`](mor_kernels::KernelError::Device).
    pub(crate) fn entries(&self, model: &MorModel, sequence: usize) -> Result<Vec<usize>> {
        let lengths: Vec<u32> = model.gpu().read(&self.tensors.lengths)?;
        let of = |group: usize| lengths[sequence * self.num_groups + group] as usize;
        Ok(model.kv_layout().layers().iter().map(|layer| layer.write_group.map_or(0, of)).collect())
    }
}

/// `(cos, sin)` of `position * theta^(-2i / head_dim)`, and of 0 for the padding of a head. On the host because WGSL
/// promises no accuracy for sin and cos of large arguments; inverse frequencies and angles are f32 as in the reference.
fn rope_table(model: &MorModel, max_positions: usize) -> Result<Tensor> {
    let config = model.config();
    let (theta, head_dim) = (config.rope_theta as f32, config.head_dim as f32);
    let inv_freq = |i: usize| 1.0 / theta.powf(2.0 * i as f32 / head_dim);
    let (half, padded_half) = (config.head_dim / 2, model.head_dim() / 2);
    let inv_freq: Vec<f32> = (0..padded_half).map(|i| if i < half { inv_freq(i) } else { 0.0 }).collect();
    let table: Vec<[f32; 2]> = (0..max_positions)
        .flat_map(|position| inv_freq.iter().map(move |inv_freq| f64::from(position as f32 * inv_freq)))
        .map(|angle| [angle.cos() as f32, angle.sin() as f32])
        .collect();
    Tensor::from_slice(model.gpu(), "rope", DType::F32, &[max_positions, padded_half, 2], &table)
}
