//! The row vocabulary shared by all kernels: which token a row holds and where its K/V live.
//!
//! Activations are streams of `T` flat rows. A [`RowSet`] lists the rows that are active at some point
//! (all of them, those selected at a recursion, those to be sampled) in position order; kernels run over
//! that list and read the streams through it, so their cost follows the number of active tokens and no
//! copy gathers or scatters anything.

use crate::Result;
use crate::gpu::Gpu;
use crate::tensor::{DType, Tensor};

/// Marks an absent row, slot, token or group.
pub const NONE: u32 = u32::MAX;
/// Tokens of one K/V page. A power of two; a page belongs to one (sequence, group).
pub const PAGE_SIZE: u32 = 32;
/// [`ActiveRow`]s with `row == NONE` after the last active one, so that a tile of rows may read past it.
pub const ROW_PADDING: u32 = 256;
/// Most entries of a plan's grid table.
pub const MAX_GRIDS: usize = 32;

/// [`Row::flags`]: the row takes part in this step.
pub const ROW_ACTIVE: u32 = 1;
/// [`Row::flags`]: logits are computed for the row and a token is drawn.
pub const ROW_SAMPLE: u32 = 2;
/// [`Row::flags`], alone: the row was to take part in a step that failed, and may be fed again as it is; see
/// [`DecodeLayers`](crate::ops::DecodeLayers).
pub const ROW_FAILED: u32 = 4;
/// [`Row::flags`]: from this bit on, the row's index among its sequence's rows of the step.
pub const ROW_INDEX_UNIT: u32 = 256;

/// [`ActiveRow::end`]: the row runs the block for its keys and values alone, its stream stays as it is.
pub const END_NOTHING: u32 = 0;
/// [`ActiveRow::end`]: the gated result of the block is added to the row's stream.
pub const END_GATED: u32 = 1;
/// [`ActiveRow::end`]: the result is the input of the row's next recursion (token choice).
pub const END_PASS: u32 = 2;

/// One token of a step, as the host or the sampler writes it. Mirrors `struct Row` in `shared/rows.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Row {
    /// Token id.
    pub token: u32,
    /// Position in its sequence, 0-based.
    pub position: u32,
    /// Index of the sequence.
    pub sequence: u32,
    /// [`ROW_ACTIVE`], [`ROW_SAMPLE`], and [`ROW_INDEX_UNIT`] times the row's index among its sequence's rows.
    pub flags: u32,
}

impl Row {
    /// A row that takes no part; rows of a step that hold no token must be this.
    pub const ABSENT: Self = Self { token: 0, position: 0, sequence: NONE, flags: 0 };
}

/// One entry of a [`RowSet`]. Mirrors `struct ActiveRow` in `shared/rows.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct ActiveRow {
    /// Row of the streams, or [`NONE`] past the end.
    pub row: u32,
    /// Index of the sequence.
    pub sequence: u32,
    /// Position in its sequence.
    pub position: u32,
    /// Physical K/V slot this row writes (`page * PAGE_SIZE + offset`), or [`NONE`].
    pub kv_slot: u32,
    /// Keys this row attends to, itself included.
    pub kv_len: u32,
    /// Where its keys are listed: first entry in the page table (or slot table, see [`KvTable`]).
    pub kv_table: u32,
    /// Recursion the row takes in this list, 0-based; [`NONE`] in lists outside the shared block. In a list of rows
    /// to sample: the recursions it took.
    pub recursion: u32,
    /// What the end of a block does with the row: [`END_NOTHING`], [`END_GATED`] or [`END_PASS`].
    pub end: u32,
}

impl ActiveRow {
    /// The padding entry.
    pub const ABSENT: Self = Self {
        row: NONE,
        sequence: 0,
        position: 0,
        kv_slot: NONE,
        kv_len: 0,
        kv_table: 0,
        recursion: NONE,
        end: END_NOTHING,
    };
}

/// How an attention kernel maps key index `i` of a row to a physical K/V slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvTable {
    /// `table[kv_table + i / PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE`.
    Pages,
    /// `table[kv_table + i]`: every key on its own (hybrid caches).
    Slots,
}

/// A list of active rows on the device with the grids its length asks for.
///
/// # Shapes
/// `active` is `[T + ROW_PADDING + 1]` of [`ActiveRow`], of which the last one's `row` is the number of active rows; `dispatch`
/// is `[rows listed so far, 0, 0, 0]` followed by one `(x, y, z)` per entry of the plan's grid table. Kernels over the rows do
/// not bind `dispatch`: a buffer that grids alone come from stays in one state, and the device waits for no change of it.
#[derive(Clone, Debug)]
pub struct RowSet {
    /// The list.
    pub active: Tensor,
    /// Rows listed so far, and indirect workgroup counts.
    pub dispatch: Tensor,
    /// Most rows the list can hold.
    pub capacity: usize,
    /// Whether grids are for `capacity` rows, whatever the list has; see [`RowSet::fixed`].
    pub is_fixed: bool,
}

impl RowSet {
    /// Allocates an empty set for up to `capacity` rows.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`](crate::KernelError::OutOfMemory).
    pub fn new(gpu: &Gpu, label: &str, capacity: usize) -> Result<Self> {
        let entries = capacity + ROW_PADDING as usize + 1;
        let words = size_of::<ActiveRow>() / 4;
        Ok(Self {
            active: Tensor::zeros(gpu, &format!("{label}.active"), DType::U32, &[entries, words])?,
            dispatch: Tensor::zeros(gpu, &format!("{label}.dispatch"), DType::U32, &[4 + 3 * MAX_GRIDS])?,
            capacity,
            is_fixed: false,
        })
    }

    /// The same set, used for at most `capacity` rows: grids of a plan for few rows follow from it.
    ///
    /// # Panics
    /// If there is no room for so many.
    #[must_use]
    pub fn limited_to(&self, capacity: usize) -> Self {
        assert!(capacity <= self.capacity, "a set of {} rows has no room for {capacity}", self.capacity);
        Self { capacity, ..self.clone() }
    }

    /// The same set, over which kernels have grids for all rows that it can hold: what follows a kernel that lists rows without
    /// sizing grids. Only kernels that look for [`NONE`] may run over it.
    #[must_use]
    pub fn fixed(&self) -> Self {
        Self { is_fixed: true, ..self.clone() }
    }

    /// Allocates a set holding `rows`, padded with [`ActiveRow::ABSENT`]: for tests and benches of kernels
    /// that read a set. Its `dispatch` is empty; use fixed grids with it.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`](crate::KernelError::OutOfMemory).
    pub fn from_rows(gpu: &Gpu, label: &str, rows: &[ActiveRow]) -> Result<Self> {
        let set = Self::new(gpu, label, rows.len())?;
        let mut padded = rows.to_vec();
        padded.resize(rows.len() + ROW_PADDING as usize, ActiveRow::ABSENT);
        padded.push(ActiveRow { row: rows.len() as u32, ..ActiveRow::ABSENT });
        gpu.write(&set.active, 0, bytemuck::cast_slice(&padded));
        Ok(set)
    }
}
