//! Moves scheduled events to `outbox.events` when they are due.
//!
//! An event that cannot be moved now is *set aside*: somebody has locked its row, or has an open transaction that
//! published an event with the same `event_id`. The worker looks at it again later, and moves the others.

use crate::server::clock;
use crate::server::guc;
use crate::server::process::{self, Aborted};
use crate::tables::care;
use crate::tables::catalog;
use crate::tables::events;
use crate::tables::scheduled::{self, Moved};
use crate::worker::due::EventId;
use crate::worker::due::Scheduled;
use crate::worker::loading::says_trouble_of_sequence;
use crate::worker::state::Worker;
use crate::worker::task::{Task, is_lock};
use relay::time::Now;
use std::time::{Duration, Instant};

/// How many due events are examined at once to find those that cannot be moved.
const LOOK_COUNT: i64 = 1_000;
/// How many events are moved at once, each in a subtransaction, if one of them cannot be moved.
const MOVE_COUNT_WITH_CARE: i64 = 50;

impl Worker {
    /// When there is something to move, as far as is known.
    pub(super) fn scheduled_at(&self) -> Option<Now> {
        let due = [self.scheduled.next_due, self.scheduled.patience.next_retry_at()];
        let due = due.into_iter().flatten().min()?;
        let due = due.max(self.scheduled.pieces.rests_until());
        Some(self.patience.retry_at(Task::Move).map_or(due, |at| at.max(due)))
    }

    pub(super) fn move_scheduled(&mut self, now: Now) {
        if self.slot.take_schedule() || self.scheduled.next_due_us.is_some_and(|due| due <= clock::wall_us()) {
            self.scheduled.is_known = false;
        }
        let beside_others = self.is_beside_others();
        if !self.scheduled.pieces.may_begin(beside_others, now) {
            return;
        }
        let is_due = self.scheduled_at().is_some_and(|due| due <= now);
        if (self.scheduled.is_known && !is_due) || !self.patience.allows(Task::Move, now) {
            return;
        }
        process::show_activity("moving scheduled events that are due");
        self.look_at_set_aside(now);
        match self.move_due(now) {
            Ok(()) => self.patience.succeeded(Task::Move),
            Err(error) => {
                self.scheduled.is_known = false;
                // A lock on one of them must not delay the others.
                let count = match is_lock(&error) {
                    true => self.set_contested_aside(now).unwrap_or(0),
                    false => 0,
                };
                if count == 0 {
                    self.failed(Task::Move, &error, now);
                }
            }
        }
    }

    fn move_due(&mut self, now: Now) -> Result<(), Aborted> {
        let aside: Vec<EventId> = self.scheduled.aside.iter().copied().collect();
        let (count, start, began_at) = (self.scheduled.portion.count(), Instant::now(), self.now());
        let (from_us, mut looked) = (self.scheduled.search.begins(now), Duration::ZERO);
        let moved = process::transaction(|| {
            let (due, now_us) = scheduled::next_due(from_us, &aside);
            looked = start.elapsed();
            if due.is_some_and(|at| at <= now_us) && says_trouble_of_sequence() {
                let poll_us = guc::millis(&guc::POLL_INTERVAL_MS).as_micros() as i64;
                return (Moved::default(), Some(poll_us));
            }
            match due {
                // The move gets a transaction id: no tick may be taken in this transaction.
                Some(at) if at <= now_us => (scheduled::move_due(at, now_us, count as i64, &aside), Some(0)),
                other => (Moved::default(), other.map(|at| at - now_us)),
            }
        });
        self.scheduled.search.took(looked, now);
        // What cannot be moved must not hold up the others.
        let (moved, due_us) = match moved {
            Err(error) if care::is_of_a_new_row(error.code) => process::transaction(|| {
                let moved = care::carefully(|| scheduled::move_due_one_by_one(MOVE_COUNT_WITH_CARE, &aside));
                (moved, Some(0))
            }),
            moved => moved,
        }?;
        let Moved { count: moved, last_us } = moved;
        if moved == 0 && due_us == Some(0) {
            // All events that are due are locked.
            self.set_contested_aside(now)?;
        }
        if moved > 0 {
            self.scheduled.pieces.begins(began_at);
            self.scheduled.portion.took(moved as usize, start.elapsed());
            process::debug(|| format!("moved {moved} scheduled events that are due"));
        }
        self.scheduled.search.moved(last_us);
        self.work |= moved > 0;
        self.scheduled.is_known = true;
        let due = due_us.map(|us| now + Duration::from_micros(us.max(0) as u64));
        self.scheduled.next_due_us = due_us.filter(|us| *us > 0).map(|us| clock::wall_us() + us);
        self.scheduled.next_due = due.into_iter().chain(self.scheduled.search.looks_at()).min();
        Ok(())
    }

    /// Releases events that were set aside, are due to be looked at again and are no longer contested.
    fn look_at_set_aside(&mut self, now: Now) {
        let Scheduled { aside, patience, .. } = &self.scheduled;
        let due: Vec<EventId> = aside.iter().copied().filter(|id| patience.allows(*id, now)).collect();
        if due.is_empty() {
            return;
        }
        let contested = process::transaction(|| contested(&due)).unwrap_or_else(|_| due.clone());
        for event_id in due {
            match contested.contains(&event_id) {
                true => self.scheduled.set_aside(event_id, now),
                false => {
                    self.scheduled.aside.remove(&event_id);
                    self.scheduled.patience.succeeded(event_id);
                }
            }
        }
    }

    /// Sets aside those of the due events that cannot be moved now; returns how many.
    fn set_contested_aside(&mut self, now: Now) -> Result<usize, Aborted> {
        let aside: Vec<EventId> = self.scheduled.aside.iter().copied().collect();
        let found = process::transaction(|| contested(&scheduled::due_now(LOOK_COUNT, &aside)))?;
        for event_id in &found {
            self.scheduled.set_aside(*event_id, now);
        }
        Ok(found.len())
    }
}

/// Which of these events another session is about to publish or delete. Waits for nobody.
fn contested(event_ids: &[EventId]) -> Vec<EventId> {
    let relations = catalog::expect_relations();
    let free = scheduled::lockable(event_ids);
    let is_contested = |id: &EventId| !free.contains(id) || events::is_contested(&relations, id);
    event_ids.iter().copied().filter(is_contested).collect()
}
