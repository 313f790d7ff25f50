//! Steps of a [`Runner`] one by one, and everything they report.

use mor_model::MorModel;
use mor_runtime::runner::{Feed, Outcome, Runner, Work};

/// A drawn token's logits: slot, position of the row they belong to, values.
pub(crate) type Drawn = (usize, usize, Vec<f32>);

/// What the steps of a runner reported, by slot.
pub(crate) struct Tape {
    /// Lengths of the prompts.
    prompts: Vec<usize>,
    /// Recursions of the prompt's tokens.
    prompt_depths: Vec<Vec<u32>>,
    outcomes: Vec<Vec<Outcome>>,
}

impl Tape {
    pub(crate) fn new(prompts: &[usize]) -> Self {
        let num_slots = prompts.len();
        let (prompt_depths, outcomes) = (vec![Vec::new(); num_slots], vec![Vec::new(); num_slots]);
        Self { prompts: prompts.to_vec(), prompt_depths, outcomes }
    }

    /// Runs a prefill step over `feeds`, or without any one decode step or tick; returns what was drawn.
    pub(crate) fn step(&mut self, runner: &mut Runner, model: &MorModel, feeds: &[Feed<'_>]) -> Vec<Drawn> {
        let ticks = usize::from(feeds.is_empty());
        let work = Work { feeds, ticks, max_context: runner.max_positions(), ..Work::default() };
        let reply = runner.submit(model, &work).expect("runs").wait().expect("reads");
        let mut depths = &reply.depths[..];
        for feed in feeds {
            let (own, rest) = depths.split_at(feed.tokens.len());
            self.prompt_depths[feed.sequence].extend_from_slice(own);
            depths = rest;
        }
        let mut drawn = Vec::new();
        for (slot, outcomes) in self.outcomes.iter_mut().enumerate() {
            let new: Vec<_> = reply.drawn(slot, self.prompts[slot] - 1 + outcomes.len()).collect();
            assert!(new.len() <= 1, "slot {slot}: a step draws one token at most");
            drawn.extend(new.iter().map(|outcome| (slot, outcome.position)));
            outcomes.extend(new);
        }
        let logits = runner.logits(model, ticks > 0).expect("reads");
        let slots = |slots: &mut dyn Iterator<Item = usize>| slots.collect::<Vec<_>>();
        let (found, expected) = (slots(&mut logits.iter().map(|l| l.0)), slots(&mut drawn.iter().map(|d| d.0)));
        assert_eq!(found, expected, "slots with logits, and with a drawn token");
        drawn.into_iter().zip(logits).map(|((slot, position), (_, logits))| (slot, position, logits)).collect()
    }

    /// Recursions of all tokens fed.
    pub(crate) fn depths(&self, slot: usize) -> Vec<u32> {
        let (prompt, outcomes) = (&self.prompt_depths[slot], &self.outcomes[slot]);
        assert_eq!(
            prompt[prompt.len() - 1],
            outcomes[0].depth,
            "slot {slot}: the prompt's last row, which was drawn from"
        );
        prompt.iter().copied().chain(outcomes[1..].iter().map(|outcome| outcome.depth)).collect()
    }

    /// All drawn tokens.
    pub(crate) fn tokens(&self, slot: usize) -> Vec<u32> {
        self.outcomes[slot].iter().map(|outcome| outcome.next_token).collect()
    }
}
