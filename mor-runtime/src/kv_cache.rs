//! The K/V buffers and tables of a fixed number of slots.

use mor_kernels::Result;
use mor_kernels::rows::PAGE_SIZE;
use mor_kernels::tensor::{DType, Tensor};
use mor_kernels::writes::Writes;
use mor_model::{KvStrategy, KvTensors, MorModel, recursion_group};

/// Most entries of a page table that are written for nothing, so that what is on either side goes in one write.
const MOST_ENTRIES_BETWEEN: usize = 512;

/// Groups whose entries lie in the same buffers and draw their pages from one space of numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageClass {
    /// The groups, ascending.
    pub groups: Vec<usize>,
    /// The K/V buffers, ascending.
    pub buffers: Vec<usize>,
    /// Bytes of one page over all its buffers.
    pub page_bytes: u64,
}

impl PageClass {
    /// Bytes of one page in one of its buffers, of keys or of values.
    pub fn buffer_page_bytes(&self) -> u64 {
        self.page_bytes / (2 * self.buffers.len() as u64)
    }
}

/// The page classes of a model: its unshared layers, and the recursions that its tokens may take.
pub fn page_classes(model: &MorModel) -> Vec<PageClass> {
    let layout = model.kv_layout();
    let row_bytes = model.kv_dtype().row_bytes(model.kv_dim());
    let mut classes: Vec<PageClass> = Vec::new();
    for buffer in 0..layout.num_buffers() {
        let layers = layout.layers().iter().filter(|layer| layer.buffer == buffer);
        let mut groups: Vec<_> = layers.filter_map(|layer| layer.write_group).collect();
        groups.retain(|group| *group < recursion_group(model.max_depth() as u32));
        groups.sort_unstable();
        groups.dedup();
        // A group has all its layers tied alike, so classes are the same or have nothing in common.
        let page_bytes = 2 * u64::from(PAGE_SIZE) * row_bytes as u64;
        match classes.iter_mut().find(|class| class.groups == groups) {
            Some(class) => {
                class.buffers.push(buffer);
                class.page_bytes += page_bytes;
            }
            None => classes.push(PageClass { groups, buffers: vec![buffer], page_bytes }),
        }
    }
    classes
}

/// Pages that let every slot hold `max_positions` tokens in every group, per class.
pub fn pages_for_all(model: &MorModel, num_slots: usize, max_positions: usize) -> Vec<usize> {
    let pages = max_positions.div_ceil(PAGE_SIZE as usize);
    page_classes(model).iter().map(|class| class.groups.len() * num_slots * pages).collect()
}

/// Bytes of so many pages, per class.
pub fn kv_bytes(model: &MorModel, pages_in_class: &[usize]) -> u64 {
    page_classes(model).iter().zip(pages_in_class).map(|(class, pages)| class.page_bytes * *pages as u64).sum()
}

/// K/V buffers, page tables and lengths of a fixed number of slots.
#[derive(Debug)]
pub(crate) struct KvCache {
    pub(crate) tensors: KvTensors,
    pub(crate) num_slots: usize,
    /// One page of one buffer, on its way.
    pub(crate) scratch: Tensor,
    classes: Vec<PageClass>,
    num_groups: usize,
    max_pages: usize,
}

impl KvCache {
    /// Allocates buffers of `pages_in_class` pages and empty tables.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`](mor_kernels::KernelError::OutOfMemory).
    pub(crate) fn new(
        model: &MorModel,
        num_slots: usize,
        max_positions: usize,
        pages_in_class: &[usize],
    ) -> Result<Self> {
        let (gpu, config, layout) = (model.gpu(), model.config(), model.kv_layout());
        let num_groups = layout.num_groups();
        let max_positions = max_positions.next_multiple_of(PAGE_SIZE as usize);
        let max_pages = max_positions / PAGE_SIZE as usize;
        let classes = page_classes(model);
        let slots_in = |buffer: usize| {
            let class = classes.iter().position(|class| class.buffers.contains(&buffer));
            class.map_or(0, |class| pages_in_class[class]) * PAGE_SIZE as usize
        };
        let slots: Vec<usize> = (0..layout.num_buffers()).map(slots_in).collect();
        let (buffers, whole) = kv_buffers(model, &slots)?;
        let words = |label, shape: &[usize]| Tensor::zeros(gpu, label, DType::U32, shape);
        let slots = (config.kv == KvStrategy::Hybrid)
            .then(|| words("kv_slots", &[num_slots, num_groups, max_positions]))
            .transpose()?;
        let tensors = KvTensors {
            buffers,
            whole,
            lengths: words("kv_lengths", &[num_slots, num_groups])?,
            pages: words("kv_pages", &[num_slots, num_groups, max_pages])?,
            slots,
            rope: rope_table(model, max_positions)?,
            max_positions,
        };
        let scratch = Tensor::zeros(gpu, "page", model.kv_dtype(), &[PAGE_SIZE as usize, model.kv_dim()])?;
        Ok(Self { tensors, num_slots, scratch, classes, num_groups, max_pages })
    }

    /// As [`KvCache::new`], with pages for all slots at their longest and tables that name them.
    ///
    /// # Errors
    /// As [`KvCache::new`].
    pub(crate) fn for_all(model: &MorModel, num_slots: usize, max_positions: usize) -> Result<Self> {
        let cache = Self::new(model, num_slots, max_positions, &pages_for_all(model, num_slots, max_positions))?;
        let mut writes = Writes::default();
        for class in &cache.classes {
            for (place, group) in class.groups.iter().enumerate() {
                for slot in 0..num_slots {
                    let first = ((place * num_slots + slot) * cache.max_pages) as u32;
                    let pages: Vec<u32> = (first..first + cache.max_pages as u32).collect();
                    cache.write_pages(&mut writes, slot, *group, 0, &pages);
                }
            }
        }
        writes.flush(model.gpu());
        Ok(cache)
    }

    /// Writes entries of a page table, from the `first` on.
    pub(crate) fn write_pages(&self, writes: &mut Writes, slot: usize, group: usize, first: usize, pages: &[u32]) {
        let at = (slot * self.num_groups + group) * self.max_pages + first;
        writes.push(&self.tensors.pages, 4 * at as u64, bytemuck::cast_slice(pages));
        // Nobody reads entries past the last page: as long as there are few, the next group's adjoin.
        let rest = self.max_pages - first - pages.len();
        if rest <= MOST_ENTRIES_BETWEEN {
            writes.push(&self.tensors.pages, 4 * (at + pages.len()) as u64, &[0; 4 * MOST_ENTRIES_BETWEEN][..4 * rest]);
        }
    }

    /// Writes a slot's physical K/V slots of a group, position by position: hybrid caches only.
    pub(crate) fn write_kv_slots(&self, writes: &mut Writes, slot: usize, group: usize, kv_slots: &[u32]) {
        let table = self.tensors.slots.as_ref().expect("hybrid caches have a slot table");
        let at = (slot * self.num_groups + group) * self.tensors.max_positions;
        writes.push(table, 4 * at as u64, bytemuck::cast_slice(kv_slots));
    }

    /// Sets the number of entries a slot has in each group.
    pub(crate) fn set_lengths(&self, writes: &mut Writes, slot: usize, lengths: &[u32]) {
        assert_eq!(lengths.len(), self.num_groups, "one length a group");
        writes.push(&self.tensors.lengths, (4 * slot * self.num_groups) as u64, bytemuck::cast_slice(lengths));
    }

    /// Forgets a slot's entries.
    pub(crate) fn clear(&self, writes: &mut Writes, slot: usize) {
        self.set_lengths(writes, slot, &vec![0; self.num_groups]);
    }

    /// The buffers that pages of a class lie in, with the bytes of a page in one of them.
    pub(crate) fn class_buffers(&self, class: usize) -> impl Iterator<Item = (&Tensor, u64)> {
        let class = &self.classes[class];
        let bytes = class.buffer_page_bytes();
        let both = class.buffers.iter().flat_map(|buffer| {
            let (k, v) = &self.tensors.buffers[*buffer];
            [k, v]
        });
        both.map(move |tensor| (tensor, bytes))
    }

    /// Entries stored per effective layer of a slot, as the device counted them.
    ///
    /// # Errors
    /// [`KernelError::Device`](mor_kernels::KernelError::Device).
    pub(crate) fn entries(&self, model: &MorModel, slot: usize) -> Result<Vec<usize>> {
        let lengths: Vec<u32> = model.gpu().read(&self.tensors.lengths)?;
        let of = |group: usize| lengths[slot * self.num_groups + group] as usize;
        Ok(model.kv_layout().layers().iter().map(|layer| layer.write_group.map_or(0, of)).collect())
    }
}

/// Keys and values of as many slots as each buffer has, in one buffer each where one binding holds all, and then that one.
#[expect(clippy::type_complexity, reason = "the fields of KvTensors")]
fn kv_buffers(
    model: &MorModel,
    slots: &[usize],
) -> Result<(Vec<(Tensor, Tensor)>, Option<(Tensor, Tensor, Vec<u32>)>)> {
    let (gpu, dtype, width) = (model.gpu(), model.kv_dtype(), model.kv_dim());
    let total: usize = slots.iter().sum();
    let caps = gpu.caps();
    if (total * dtype.row_bytes(width)) as u64 <= caps.max_storage_binding_bytes.min(caps.max_buffer_bytes) {
        let cache = |name: &str| Tensor::zeros(gpu, name, dtype, &[total, width]);
        let (keys, values) = (cache("k")?, cache("v")?);
        let mut first = 0;
        let parts: Option<Vec<_>> = (0..slots.len())
            .map(|buffer| {
                let part = |whole: &Tensor, name: &str| {
                    whole.part(gpu, &format!("{name}.{buffer}"), first * width, &[slots[buffer], width])
                };
                let parts = Some((part(&keys, "k")?, part(&values, "v")?));
                first += slots[buffer];
                parts
            })
            .collect();
        if let Some(parts) = parts {
            let firsts = slots.iter().scan(0, |next, slots| Some(std::mem::replace(next, *next + *slots as u32)));
            return Ok((parts, Some((keys, values, firsts.collect()))));
        }
    }
    let cache =
        |name: &str, buffer: usize| Tensor::zeros(gpu, &format!("{name}.{buffer}"), dtype, &[slots[buffer], width]);
    let buffers = (0..slots.len()).map(|buffer| Ok((cache("k", buffer)?, cache("v", buffer)?)));
    Ok((buffers.collect::<Result<_>>()?, None))
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
