//! What is known of triggers that were switched off, and how far the look at rows that came meanwhile has come.

use crate::tables::foreign::{BrokenTrigger, Look};
use relay::reading::foreign::Judge;
use relay::reading::snapshot::Tick;
use relay::time::Now;
use std::sync::Arc;

#[derive(Default)]
pub(super) struct Mending {
    /// Our tables may have been touched since it was looked.
    pub(super) is_look_due: bool,
    pub(super) look_at: Now,
    /// The trigger of `outbox.events`, when it was looked at last.
    pub(super) seen: Option<String>,
    pub(super) broken: Vec<BrokenTrigger>,
    pub(super) mend_at: Now,
    /// The newest tick at which the trigger was as the last check had left it.
    pub(super) clean: Option<Arc<Tick>>,
    /// This worker has looked before: its backends' positions may be from after those rows.
    pub(super) has_looked: bool,
    /// Somebody has touched it: a sweep is to begin.
    pub(super) touched: Option<Look>,
    pub(super) sweep: Option<Sweep>,
    pub(super) sweep_at: Now,
    /// Publications with tables that must not travel, and backends of which another server's events are held, as was
    /// said.
    pub(super) published: Vec<String>,
    pub(super) held: Vec<String>,
    /// What was said last of what cannot be mended.
    pub(super) said: Option<(String, Now)>,
}

/// A pass over the table under way.
pub(super) struct Sweep {
    /// While rows are looked at.
    pub(super) judge: Option<Judge>,
    pub(super) after: i64,
    pub(super) upto: i64,
    /// Then: those that are not ours.
    pub(super) foreign: Vec<i64>,
    pub(super) moved: u64,
    /// Trigger and tick at its beginning.
    pub(super) triggers: Option<String>,
    pub(super) tick: Tick,
}

impl Mending {
    /// Something of our tables has changed. If it is the trigger, rows may have come with it: they are not to be read
    /// before they were looked at.
    pub(super) fn look_again(&mut self, triggers: Option<&str>) {
        self.is_look_due = true;
        if self.seen.as_deref() != triggers {
            (self.look_at, self.sweep_at) = (Now::ZERO, Now::ZERO);
        }
    }

    /// A tick was taken, and nothing of our tables had changed.
    pub(super) fn is_clean_at(&mut self, tick: &Arc<Tick>) {
        if !self.has_work() {
            self.clean = Some(tick.clone());
        }
    }

    pub(super) fn has_work(&self) -> bool {
        self.due_at().is_some()
    }

    /// When it has something to do.
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
