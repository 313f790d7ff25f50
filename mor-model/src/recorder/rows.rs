//! The rows of each part of a step or tick: which are active, and where their layers keep K/V.

use mor_kernels::Result;
use mor_kernels::ops::{
    Hybrid, KvGroups, Selection, SlotKv, SlotPhase, SlotsCompact, SlotsCompactBindings, TokensCompact,
    TokensCompactBindings,
};
use mor_kernels::plan::PlanBuilder;
use mor_kernels::rows::RowSet;

use super::Recorder;
use crate::{UNSHARED_GROUP, recursion_group};

impl Recorder<'_> {
    /// Moves the slots on and lists those of `phase`.
    pub(super) fn record_slots(
        &self,
        plan: &mut PlanBuilder<'_>,
        phase: SlotPhase<'_>,
        set: &RowSet,
        kv: bool,
    ) -> Result<()> {
        let depthwise = self.depthwise();
        let bindings = SlotsCompactBindings {
            rows: &self.step.rows,
            state: &depthwise.state,
            grids: &plan.grid_table(),
            recursions: &depthwise.recursions,
            active: set,
            phase,
            kv: kv.then(|| SlotKv {
                num_groups: self.model.kv_layout().num_groups() as u32,
                lengths: &self.kv.lengths,
                pages: &self.kv.pages,
                max_pages: self.kv.max_pages(),
                slots: self.kv.slots.as_ref(),
            }),
            num_recursions: self.model.max_depth() as u32,
            max_positions: self.kv.max_positions as u32,
        };
        SlotsCompact::record(plan, &bindings)
    }

    /// Lists the rows of `selection`; `group` is where the layers that run over them store K/V.
    pub(super) fn record_set(
        &self,
        plan: &mut PlanBuilder<'_>,
        selection: Selection<'_>,
        recursion: usize,
        set: &RowSet,
        group: Option<usize>,
    ) -> Result<()> {
        let kv_layout = self.model.kv_layout();
        let is_drawn = matches!(selection, Selection::Sample | Selection::Ends);
        // All layers over a set agree on their groups; any one of them tells.
        let layer = group.and_then(|group| {
            let of_group =
                |l: &usize| self.model.layout().recursion(*l).map_or(UNSHARED_GROUP, recursion_group) == group;
            (0..self.config().num_hidden_layers).find(of_group).map(|l| kv_layout.layer(l))
        });
        let makes_two = matches!(selection, Selection::Begin { first: Some(_) });
        let kv = (layer.is_some() || makes_two).then(|| {
            let hybrid = self.kv.slots.as_ref().and_then(|slots| {
                let first_group = (!is_drawn && group == Some(recursion_group(0))).then(|| recursion_group(0) as u32);
                (group != Some(UNSHARED_GROUP)).then_some(Hybrid { slots, first_group })
            });
            KvGroups {
                // Rows that are drawn for have stored theirs.
                write: layer.and_then(|layer| layer.write_group).filter(|_| !is_drawn).map(|group| group as u32),
                read: layer.map_or(0, |layer| layer.read_group as u32),
                num_groups: kv_layout.num_groups() as u32,
                lengths: &self.kv.lengths,
                pages: &self.kv.pages,
                max_pages: self.kv.max_pages(),
                hybrid,
            }
        });
        TokensCompact::record(
            plan,
            &TokensCompactBindings {
                rows: &self.step.rows,
                depth: &self.step.depth,
                grids: &plan.grid_table(),
                active: set,
                selection,
                recursion: recursion as u32,
                kv,
                max_positions: self.kv.max_positions as u32,
            },
        )
    }
}
