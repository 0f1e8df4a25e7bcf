//! Decides when the worker purges, and how long it waits after a failure for each backend. What is deleted: `purge.rs`.

use crate::worker::purge;
use crate::worker::state::Worker;
use crate::worker::task::Task;
use relay::time::Now;
use std::time::Duration;

impl Worker {
    /// `more`: there are events to read, which go first.
    pub(super) fn purge(&mut self, now: Now, more: bool) -> Option<Duration> {
        let slot = self.slot;
        let is_wanted = || more || slot.has_work() || slot.is_publishing();
        let failed = self.attempt(Task::PurgeFailed, now, |w| w.purge.step_failed(now, &is_wanted));
        let inbox = self.attempt(Task::PurgeInbox, now, |w| w.purge.step_inbox(now, &is_wanted));
        self.attempt(Task::RecordTicks, now, |w| w.purge.record_ticks(now, &mut w.backends));
        let sent = self.purge_sent(now, &is_wanted);
        [failed, inbox, sent].into_iter().flatten().flatten().min()
    }

    /// Each backend has its own patience, because success for one tells nothing about a lock that delays another.
    fn purge_sent(&mut self, now: Now, is_wanted: &dyn Fn() -> bool) -> Option<Option<Duration>> {
        let (purge, backends) = (&mut self.purge, &self.backends);
        // A task that no longer exists would only wake the worker for nothing.
        self.patience.retain(|task| match task {
            Task::PurgeSent((number, _)) => purge::is_on() && backends.iter().any(|b| b.number == number),
            _ => true,
        });
        let patience = &self.patience;
        let mut succeeded = Vec::new();
        let outcome = purge.step_sent(
            now,
            backends,
            is_wanted,
            &|number| patience.allows(Task::PurgeSent((number, None)), now),
            &mut |number| succeeded.push(number),
        );
        for number in succeeded {
            self.patience.succeeded(Task::PurgeSent((number, None)));
        }
        match outcome {
            Ok(due) => Some(due),
            Err(error) => {
                let task = Task::PurgeSent((self.purge.backend(), None));
                self.failed(task, &error, now);
                if let Some(at) = self.patience.retry_at(task) {
                    self.purge.look_at(at);
                }
                // The next step goes on with the next backend.
                Some(Some(Duration::ZERO))
            }
        }
    }
}
