//! Consumer groups: which Redis servers are asked about them in a round, and what is saved of the answers.

use crate::server::process::{self, Aborted};
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
        for index in 0..self.backends.len() {
            if self.backends[index].watch(interest) {
                self.attempt(Task::KnowStreams, now, |w| w.know_streams(index));
            }
            let backend = &mut self.backends[index];
            if backend.survey_at(interest).is_some_and(|at| at <= now) {
                backend.ask_consumers(interest, wal, now);
            }
        }
    }

    /// Remembers the streams of a backend that were watched before. Until then, it is watched to which streams events
    /// are sent.
    fn know_streams(&mut self, index: usize) -> Result<(), Aborted> {
        let (number, lane) = self.backends[index].whose();
        let known = process::transaction(|| {
            consumers::forget_deleted();
            consumers::known_streams(number, lane, MOST_REMEMBERED)
        })?;
        self.backends[index].watch_streams(known);
        Ok(())
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
