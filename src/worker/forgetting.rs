//! Deleted backends. Each keeps its reader and its cursors until the transactions have ended that were open at the
//! deletion, because they may still commit events for it. Then both are removed. The reader of strays fails events that
//! come even later: from a session that still knew the backend, or from a dump.

use crate::server::clock;
use crate::server::process::{self, Aborted};
use crate::tables::{backends, catalog};
use crate::worker::backend::Backend;
use crate::worker::state::Worker;
use crate::worker::task::Task;
use relay::reading::deleted;
use relay::reading::role::Role;
use relay::time::Now;
use std::collections::BTreeSet;

impl Worker {
    /// Forgets deleted backends that no longer need a reader of their own.
    pub(super) fn forget_deleted(&mut self, now: Now) {
        // Usually there are none.
        if self.backends.iter().all(|b| b.role() != Role::Deleted) {
            return;
        }
        let numbers = self.forgettable();
        if !numbers.is_empty() {
            self.attempt(Task::Forget, now, |w| w.forget(&numbers, now));
        }
    }

    /// Deleted backends of which all readers, including those of lanes, stand where the strays' reader is.
    fn forgettable(&self) -> BTreeSet<i32> {
        let is_written_down = |b: &&Backend| b.books.records.is_empty();
        let strays = self.backends.iter().find(|b| b.role() == Role::Strays);
        let Some(strays) = strays.filter(is_written_down) else {
            return BTreeSet::new();
        };
        let (mut numbers, mut needed) = (BTreeSet::new(), BTreeSet::new());
        for backend in self.backends.iter().filter(|b| b.number > 0) {
            let position = backend.delivery.position();
            let may_go = |next_xid| deleted::may_go(position, strays.delivery.position(), next_xid);
            match backend.deleted_before().filter(|_| backend.books.records.is_empty()) {
                Some(next_xid) if may_go(next_xid) => numbers.insert(backend.number),
                _ => needed.insert(backend.number),
            };
        }
        numbers.difference(&needed).copied().collect()
    }

    fn forget(&mut self, numbers: &BTreeSet<i32>, now: Now) -> Result<(), Aborted> {
        let Some(strays) = self.backends.iter_mut().find(|b| b.role() == Role::Strays) else {
            return Ok(());
        };
        let wall_us = clock::wall_us();
        let kept = process::transaction(|| {
            let all: Vec<i32> = numbers.iter().copied().collect();
            let kept = backends::kept_for_others(&all);
            let gone: Vec<i32> = all.into_iter().filter(|number| !kept.contains(number)).collect();
            if !gone.is_empty() {
                // None of their events is left behind this cursor.
                strays.save(now, wall_us);
                backends::forget(&gone, &strays.delivery.acked().from);
                catalog::expect_served();
            }
            kept
        })?;
        strays.saved(now);
        let is_gone = |number: i32| numbers.contains(&number) && !kept.contains(&number);
        let before = self.backends.len();
        self.backends.retain(|b| !is_gone(b.number));
        // The task no longer exists, so its patience would only wake the worker for nothing.
        self.patience
            .retain(|task| task.whose().is_none_or(|(number, _)| !is_gone(number)));
        let kept = self.backends.iter_mut().filter(|b| kept.contains(&b.number));
        kept.for_each(Backend::stays);
        let count = before - self.backends.len();
        process::debug(|| format!("{count} cursors of deleted backends are no longer needed"));
        Ok(())
    }
}
