//! The state of mending: triggers that were switched off, and the progress of checking rows that came meanwhile.

use crate::tables::foreign::{BrokenTrigger, TriggerLook};
use relay::reading::foreign::{Judge, Written};
use relay::reading::pace::{Pieces, Portion};
use relay::reading::snapshot::Tick;
use relay::time::Now;
use std::sync::Arc;

#[derive(Default)]
pub(super) struct Mending {
    /// Whether our tables may have been changed since the last check.
    pub(super) is_look_due: bool,
    pub(super) look_at: Now,
    /// The state of `outbox.events`'s trigger at the last check.
    pub(super) seen: Option<String>,
    pub(super) broken: Vec<BrokenTrigger>,
    pub(super) mend_at: Now,
    /// The newest tick at which the trigger was as the last check had left it.
    pub(super) clean: Option<Arc<Tick>>,
    /// Whether this worker has checked before: its backends' positions may be from after those rows.
    pub(super) has_looked: bool,
    /// The trigger was changed, so a sweep has to begin.
    pub(super) touched: Option<TriggerLook>,
    pub(super) sweep: Option<Sweep>,
    pub(super) pieces: Pieces,
    pub(super) sweep_at: Now,
    /// What was last logged: publications with tables that must not be replicated, and backends for which another
    /// server's events are held.
    pub(super) published: Vec<String>,
    pub(super) held: Vec<String>,
    /// What was last logged about a trigger that cannot be mended.
    pub(super) said: Option<(String, Now)>,
}

/// A pass over the table, in progress.
pub(super) struct Sweep {
    /// First, rows are examined.
    pub(super) judge: Option<Judge>,
    pub(super) after: i64,
    pub(super) upto: i64,
    /// Then the rows that are foreign are published anew.
    pub(super) foreign: Vec<i64>,
    pub(super) moved: u64,
    /// How many rows one step publishes anew.
    pub(super) portion: Portion,
    /// The trigger and the tick at its beginning.
    pub(super) triggers: Option<String>,
    pub(super) tick: Tick,
}

impl Sweep {
    /// Whether a row may get another number. If it were read before, it could overtake rows that have already got
    /// theirs. `next_xid` was read after it.
    pub(super) fn may_move(&self, row: &Written, next_xid: u64) -> bool {
        match &self.judge {
            Some(judge) => row.seq <= self.upto && judge.suspects(row, next_xid),
            None => self.foreign.binary_search(&row.seq).is_ok(),
        }
    }
}

impl Mending {
    /// Called when our tables have changed. If the trigger was changed, rows may have come meanwhile: they must not be
    /// read before they were examined.
    pub(super) fn look_again(&mut self, triggers: Option<&str>) {
        self.is_look_due = true;
        if self.seen.as_deref() != triggers {
            (self.look_at, self.sweep_at) = (Now::ZERO, Now::ZERO);
        }
    }

    /// Called when a tick was taken and our tables had not changed.
    pub(super) fn is_clean_at(&mut self, tick: &Arc<Tick>) {
        if !self.has_work() {
            self.clean = Some(tick.clone());
        }
    }

    pub(super) fn has_work(&self) -> bool {
        self.due_at().is_some()
    }

    /// When mending has something to do.
    pub(super) fn due_at(&self) -> Option<Now> {
        let look_at = self.is_look_due.then(|| self.look_at.max(self.sweep_at));
        let sweeps = self.touched.is_some() || self.sweep.is_some();
        let mend_at = (!self.broken.is_empty()).then_some(self.mend_at);
        [sweeps.then_some(self.sweep_at), look_at, mend_at]
            .into_iter()
            .flatten()
            .min()
    }
}
