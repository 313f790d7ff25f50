//! What sequences tell while they run: [`Event`], [`Summary`], [`SequenceHandle`].

use std::sync::mpsc::{Receiver, Sender};

use crate::sampling::FinishReason;

/// What a sequence tells while it runs.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The prompt has been read.
    Prompt {
        /// Recursions each of its tokens took.
        depths: Vec<u32>,
    },
    /// A new token.
    Token {
        /// Its id.
        token: u32,
        /// What it adds to the text; empty while a character or a possible stop text is incomplete, or without a
        /// tokenizer.
        text: String,
        /// Recursions it took; `None` for the last token, which is never fed.
        depth: Option<u32>,
    },
    /// The end.
    Finished(Summary),
}

/// A finished sequence.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The prompt as fed.
    pub prompt_tokens: Vec<u32>,
    /// The new tokens; an end-of-text token that ended it is the last.
    pub tokens: Vec<u32>,
    /// Recursions of every token fed, prompt first: one less than prompt and new tokens together. A cancelled sequence
    /// may know fewer.
    pub depths: Vec<u32>,
    /// The new text, with a tokenizer.
    pub text: Option<String>,
    /// K/V entries per effective layer.
    pub kv_entries: Vec<usize>,
    /// Mean of `depths`.
    pub mean_depth: f64,
    /// Prompt tokens that were not read, because another sequence had begun alike.
    pub reused_tokens: usize,
    /// Times it gave up its slot because K/V pages ran out.
    pub preemptions: usize,
    /// Prompt tokens read a second, until the first token was drawn.
    pub prefill_tokens_per_s: f64,
    /// New tokens a second after those that the first results brought, up to five; 0 if there were no more.
    pub decode_tokens_per_s: f64,
}

/// A submitted sequence: its events, and the means to end it. Dropping the handle ends it too.
///
/// Events arrive while [`Session::step`](crate::Session::step) is called, from whichever thread; the handle may be in
/// another.
#[derive(Debug)]
pub struct SequenceHandle {
    pub(crate) id: u64,
    pub(crate) events: Receiver<Event>,
    pub(crate) cancels: Sender<u64>,
}

impl SequenceHandle {
    /// Number of the sequence in its session, in the order of arrival.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The next event, if it has arrived.
    pub fn try_next(&self) -> Option<Event> {
        self.events.try_recv().ok()
    }

    /// Waits for the next event while another thread steps the session; `None` after [`Event::Finished`], or if the
    /// session has gone.
    pub fn wait_next(&self) -> Option<Event> {
        self.events.recv().ok()
    }

    /// Ends the sequence with the next step; its last event says [`FinishReason::Cancelled`].
    pub fn cancel(&self) {
        // A session that has gone runs nothing.
        let _ = self.cancels.send(self.id);
    }
}

impl Drop for SequenceHandle {
    fn drop(&mut self) {
        self.cancel();
    }
}
