//! A [`Sequence`], and what is known of one that is [`Running`] in a slot: the tokens read and drawn, the pages it holds and
//! how many it may need.

use mor_model::KvLayout;

use super::SequenceId;
use crate::prefix_cache::BlockId;

/// A sequence that has not ended.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Prompt and drawn tokens.
    pub(super) tokens: Vec<u32>,
    /// Tokens at which it ends.
    pub(super) limit: usize,
}

/// A sequence in a slot.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) id: SequenceId,
    pub(super) sequence: Sequence,
    /// Number of its admission: results of an earlier stay are not its own.
    pub(super) admission: u64,
    /// Recursions of the tokens with entries in its pages, as far as they are known.
    pub(super) depths: Vec<u32>,
    /// Tokens that prefill steps read, those of a shared beginning included.
    pub(super) to_read: usize,
    /// Of these, the ones that planned steps have read.
    pub(super) read: usize,
    /// Whether it has entered the decode batch.
    pub(super) decodes: bool,
    /// Ticks planned for it whose results have not arrived.
    pub(super) ticks_ahead: usize,
    /// Whether a prefill step is under way that draws a token for it.
    pub(super) draw_ahead: bool,
    /// Entries of the tokens with known depths, per group.
    pub(super) entries: Vec<usize>,
    /// Per group, in the order of entries.
    pub(super) pages: Vec<Vec<u32>>,
    /// The last block of it that the prefix cache keeps.
    pub(super) kept: Option<BlockId>,
}

impl Running {
    /// Takes in the depths of the next tokens.
    pub(super) fn count(&mut self, layout: &KvLayout, depths: &[u32]) {
        for (group, entries) in self.entries.iter_mut().enumerate() {
            *entries += depths.iter().filter(|depth| layout.group_holds(group, **depth)).count();
        }
        self.depths.extend_from_slice(depths);
    }

    /// No more entries than these can lie in a group once `ticks` more ticks are planned.
    pub(super) fn bound(&self, group: usize, ticks: usize) -> usize {
        // Tokens of the prompt whose depths are not known; one token may be under way where the results end.
        let ahead = self.to_read.saturating_sub(self.depths.len()) + 1 + self.ticks_ahead + ticks;
        (self.entries[group] + ahead).min(self.sequence.limit)
    }
}
