//! Consumer groups: which Redis servers are asked about them in a round, and what is saved of the answers.

use crate::server::process;
use crate::tables::catalog;
use crate::tables::consumers;
use crate::worker::state::Worker;
use crate::worker::task::Task;
use relay::time::Now;

/// How many streams are remembered from before a restart.
const MOST_REMEMBERED: usize = 20_000;

impl Worker {
    /// Asks about consumer groups where that is due.
    pub(super) fn ask_consumers(&mut self, now: Now) {
        self.interest = self.slot.interest();
        let (interest, wal) = (self.interest, self.flushed);
        for backend in &mut self.backends {
            if backend.watch(interest) {
                let (number, lane) = backend.whose();
                let known = process::transaction(|| {
                    consumers::forget_deleted();
                    consumers::known_streams(number, lane, MOST_REMEMBERED)
                });
                // If this fails, streams are watched from the next event on.
                backend.watch_streams(known.unwrap_or_default());
            }
            if backend.survey_at(interest).is_some_and(|at| at <= now) {
                backend.ask_consumers(interest, wal, now);
            }
        }
    }

    /// Saves what Redis has answered.
    pub(super) fn save_consumers(&mut self, now: Now) {
        let interest = self.interest;
        if self
            .backends
            .iter()
            .all(|b| b.unsaved_consumers(interest, now).is_none())
        {
            return;
        }
        let saved = self.attempt(Task::SaveConsumers, now, |worker| {
            process::transaction(|| {
                for backend in &worker.backends {
                    if let Some(found) = backend.unsaved_consumers(interest, now) {
                        consumers::save(backend.number, backend.lane(), found);
                    }
                }
                catalog::expect_served();
            })
        });
        if saved.is_some() {
            for backend in &mut self.backends {
                backend.saved_consumers(now);
            }
        }
    }
}
