//! [`Step`]: what a scheduler wants done next, and [`Progress`]: what that has brought.

use super::SequenceId;

/// A sequence is put into a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    pub(crate) slot: usize,
    pub(crate) id: SequenceId,
    /// Entries that each K/V group holds already.
    pub(crate) entries: Vec<u32>,
    /// Recursions of the tokens that they belong to.
    pub(crate) depths: Vec<u32>,
}

/// A K/V page to be copied, in all buffers of its class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    /// Class of both pages.
    pub class: usize,
    /// Page that is read.
    pub from: u32,
    /// Page that is written.
    pub to: u32,
}

/// Entries of a slot's page table for a group, from the `first` on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PageWrite {
    pub(crate) slot: usize,
    pub(crate) group: usize,
    pub(crate) first: usize,
    pub(crate) pages: Vec<u32>,
}

/// Tokens of a sequence that a prefill step reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) slot: usize,
    pub(crate) id: SequenceId,
    pub(crate) position: usize,
    pub(crate) len: usize,
    /// Whether the token after them is drawn: they are the last of the sequence.
    pub(crate) draws: bool,
}

/// A token that a slot's decoding starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) slot: usize,
    pub(crate) position: usize,
    pub(crate) token: u32,
}

/// What to do next, in the order of the fields.
#[derive(Clone, Debug, Default)]
pub(crate) struct Step {
    /// Slots whose sequence ends here, whatever the device thinks.
    pub(crate) stops: Vec<usize>,
    pub(crate) starts: Vec<Start>,
    pub(crate) page_writes: Vec<PageWrite>,
    pub(crate) copies: Vec<PageCopy>,
    pub(crate) entries: Vec<Entry>,
    /// Rows of a prefill step, slots ascending.
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) ticks: usize,
    /// Slots that may be occupied: the first ones.
    pub(crate) num_slots: usize,
    /// No sequence is longer in these ticks.
    pub(crate) max_context: usize,
    /// Slots that decode, with the sequence and the number of its admission.
    pub(super) decoding: Vec<(usize, SequenceId, u64)>,
    /// Admissions of the sequences of `chunks`.
    pub(super) reading: Vec<u64>,
}

/// A token that the device drew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Position of the token that was fed.
    pub position: usize,
    /// Recursions it took.
    pub depth: u32,
    /// Token drawn after it.
    pub next_token: u32,
}

/// What a step has brought for a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) id: SequenceId,
    /// Position of the first of `depths`.
    pub(crate) position: usize,
    /// Recursions of tokens that were read, but for one that a token was drawn after.
    pub(crate) depths: Vec<u32>,
    /// Tokens drawn, ascending.
    pub(crate) outcomes: Vec<Outcome>,
    /// Whether a prefill step drew the first of them.
    pub(crate) drew_reading: bool,
}
