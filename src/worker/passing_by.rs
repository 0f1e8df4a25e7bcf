//! Backends that do not send, because they are paused, or because their Redis is down or full: their readers pass the
//! rows of other backends, up to the first row of their own. Otherwise such a backend's cursor would stay where it was.
//! All views would look at everything that others have published since, and so would the backend when it comes up.
//!
//! That is done after a poll, with the tick that is there, in pieces with rests between them. So an idle worker does
//! nothing here, and one that has work does little. The position moves as that of an idle backend does, which has no
//! batch for rows of others either: a cursor may be ahead of its guard as long as the guard's number is the known one.
//! So it does not matter who owns the guard.

use crate::server::process::{self, Aborted};
use crate::tables::care;
use crate::tables::catalog;
use crate::worker::backend::Backend;
use crate::worker::pass;
use crate::worker::state::{Generation, Worker};
use crate::worker::task::Task;
use relay::reading::range::Position;
use relay::reading::role::Role;
use relay::reading::schedule::Group;
use relay::time::Now;
use std::time::{Duration, Instant};

/// How many steps one piece takes, each past up to 16 rows: about half a millisecond.
const PIECE_STEPS: usize = 500;
/// After a piece, the next one waits this many times as long as it took, and at least so long.
const REST: u32 = 4;
const LEAST_REST: Duration = Duration::from_millis(5);

impl Worker {
    /// Takes one step, if there is something to pass. Returns when to come back.
    pub(super) fn pass_by(&mut self, now: Now) -> Option<Duration> {
        // Rows that the tick sees may be for backends that are still to be loaded.
        if !self.passed.is_due || !matches!(self.generation, Generation::Loaded(_)) {
            return None;
        }
        if now < self.passed.rests_until {
            return Some(self.passed.rests_until - now);
        }
        let may = |index: &usize| self.backends[*index].may_pass_by(now) && self.way(*index).leads_on();
        let mut waiting: Vec<usize> = (0..self.backends.len()).filter(may).collect();
        let Some(group) = Group::take(&mut waiting, |index| self.way(index)) else {
            self.passed.is_due = false;
            // There is nothing left that could fail.
            self.patience.succeeded(Task::PassBy);
            return None;
        };
        let start = Instant::now();
        let passed = self.attempt(Task::PassBy, now, |w| w.pass_group(&group, now));
        let rest = (start.elapsed() * REST).max(LEAST_REST);
        self.passed.rests_until = now + rest;
        passed.map(|()| rest)
    }

    fn pass_group(&mut self, group: &Group, now: Now) -> Result<(), Aborted> {
        process::show_activity("passing events of other backends");
        let (backends, slot) = (&mut self.backends, self.slot);
        let is_wanted = || slot.has_work();
        let pass = || catalog::is_served().then(|| pass::pass_by(backends, group, PIECE_STEPS, &is_wanted));
        let passed = care::transaction(pass)?;
        let Some(passed) = passed else {
            self.generation = Generation::Stale;
            return Ok(());
        };
        for reader in passed {
            self.backends[reader.index].passed_by(reader.end, reader.is_stopped, now);
        }
        Ok(())
    }
}

impl Backend {
    /// Whether its reader can move on although it does not send.
    fn may_pass_by(&self, now: Now) -> bool {
        let has_reader = matches!(self.role(), Role::Redis | Role::Finder);
        // A finder that is at work reads by itself, or has found a row.
        let is_at_rest = match self.role() {
            Role::Finder => !self.is_enabled() || self.is_withheld(),
            _ => !self.is_ready(now),
        };
        // Events of a dump are looked for in the streams before all else.
        let has_restores = self.row().is_none_or(|row| !row.restores.is_empty());
        has_reader
            && is_at_rest
            && !has_restores
            && self.books.records.is_empty()
            && self.delivery.may_pass_by()
            && !self.stands_before_own()
    }

    /// Whether its reader waits before a row of its own until it sends again.
    pub(super) fn stands_before_own(&self) -> bool {
        let own = self.before_own.as_ref();
        own.is_some_and(|own| own.same_place(self.delivery.position()))
    }

    /// Its reader has come to `position`, and perhaps to a row of its own.
    fn passed_by(&mut self, position: Position, is_stopped: bool, now: Now) {
        self.before_own = is_stopped.then(|| position.clone());
        // Within a range, the bound by which an idle server stays idle does not tell that rows were passed.
        if position.under_way.is_some() && position.place() > self.delivery.position().place() {
            self.books.fall_behind(now);
        }
        self.advanced(position, now);
    }
}
