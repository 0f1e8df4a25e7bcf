//! Restored events of a dump may have been sent since the dump was taken. With exactly_once, the worker looks for them
//! in the streams before it sends them.
//!
//! Each comparison needs a new connection, and a restore may commit row by row. So events that come during a
//! comparison, shortly after one, or while batches are in flight, wait for the next comparison. Meanwhile the backend
//! goes on, up to the tick that was compared.

use crate::server::process::{self, Aborted};
use crate::tables::backends::BackendRow;
use crate::tables::restores;
use crate::worker::backend::Backend;
use relay::reading::snapshot::Tick;
use relay::time::Now;
use std::sync::Arc;
use std::time::Duration;

/// The minimum time between two comparisons.
const COMPARE_PAUSE: Duration = Duration::from_millis(250);

impl Backend {
    /// Whether there are restored events that were not compared yet. A paused backend compares them later.
    pub(crate) fn is_restored(&self) -> bool {
        self.row().is_some_and(|row| row.enabled && !row.restores.is_empty())
    }

    /// The row to apply now: without restores that wait for the next comparison.
    pub(crate) fn due_row(&mut self, row: BackendRow, now: Now) -> BackendRow {
        let mut row = self.without_done(row);
        if !self.is_exactly_once() || self.lane().is_some() {
            self.restored.waits = false;
            return row;
        }
        let known = self.row().map_or(&[][..], |row| &row.restores);
        let is_new = row.restores.iter().any(|restore| !known.contains(restore));
        let waits = is_new && (!known.is_empty() || now < self.restored.compares_at || self.is_sending());
        if waits {
            row.restores = known.to_vec();
        } else if is_new {
            self.restored.compares_at = now + COMPARE_PAUSE;
        }
        self.restored.waits = waits;
        row
    }

    /// When its row has to be loaded again because restores wait.
    pub(crate) fn load_at(&self) -> Option<Now> {
        let waits = match self.is_exactly_once() {
            true => self.restored.waits && !self.is_sending() && self.row().is_none_or(|row| row.restores.is_empty()),
            false => self.reads_for_redis() && self.is_restored(),
        };
        waits.then_some(self.restored.compares_at)
    }

    /// Whether there are restored events that it must not read yet, because they were not compared.
    pub(crate) fn waits_to_compare(&self) -> bool {
        self.restored.waits && self.is_exactly_once()
    }

    /// Whether it can use a newer tick. While restored events wait, it can do so only when the next comparison is due.
    pub(crate) fn wants_tick(&self, now: Now) -> bool {
        self.is_ready(now) && (!self.waits_to_compare() || self.load_at().is_some_and(|at| at <= now))
    }

    /// The tick up to which it reads. `latest`: the newest tick whose events may be sent. While restored events wait,
    /// it reads only up to the tick that was compared.
    pub(crate) fn goal<'a>(&'a self, latest: &'a Arc<Tick>) -> &'a Arc<Tick> {
        let position = self.delivery.position();
        if !self.waits_to_compare() || position.under_way.is_some() {
            return position.to(latest);
        }
        let here = &position.from;
        let compared = self.restored.compared_to.as_ref().unwrap_or(here);
        let goal = match latest.snapshot.includes(&compared.snapshot) {
            true => compared,
            false => latest,
        };
        match here.snapshot.includes(&goal.snapshot) {
            true => here,
            false => goal,
        }
    }

    /// The highest id of the transactions whose restored events were compared; 0: there is none. A lane may know more
    /// than the tables.
    pub(crate) fn last_restore(&self) -> u64 {
        let saved = self.row().map_or(0, |row| row.last_restore);
        saved.max(self.restored.last_compared)
    }

    /// Notes that events up to `tick` are about to be compared.
    pub(crate) fn compares_to(&mut self, tick: &Arc<Tick>) {
        self.restored.comparing_to = Some(tick.clone());
    }

    /// Notes that they were compared. They are sent before the next comparison. The worker must look for further
    /// restores before it reads anything.
    pub(crate) fn has_compared(&mut self, now: Now) {
        self.restored.compared_to = self.restored.comparing_to.take();
        self.restored.waits = true;
        self.restored.compares_at = now + COMPARE_PAUSE;
    }

    /// Whether it is time to look for restores (at_least_once).
    pub(crate) fn may_compare(&mut self, now: Now) -> bool {
        let may = now >= self.restored.compares_at;
        if may {
            self.restored.compares_at = now + COMPARE_PAUSE;
        }
        may
    }

    /// Forgets the restores: their events were compared, or never will be.
    pub(crate) fn forget_restores(&mut self) -> Result<(), Aborted> {
        let is_lane = self.lane().is_some();
        if let Some(row) = self.duty.row_mut().filter(|row| !row.restores.is_empty()) {
            if is_lane {
                // The finder and the other lanes still have to pass these events. Until then the tables do not record
                // that they were compared.
                self.restored.compared.append(&mut row.restores);
                if let Some(tick) = &self.restored.comparing_to {
                    self.restored.last_compared = tick.snapshot.xmax() - 1;
                }
                return Ok(());
            }
            let latest = process::transaction(|| restores::note_looked_for(&row.restores))?;
            row.last_restore = row.last_restore.max(latest);
            row.restores.clear();
        }
        Ok(())
    }

    /// The row without what this lane has done before other lanes: restores that it has compared, and a take-over.
    /// Loading returns them again.
    pub(super) fn without_done(&self, mut row: BackendRow) -> BackendRow {
        if self.lane().is_some() {
            row.take_over = self.order_to_carry_out(row.take_over);
            row.restores.retain(|restore| !self.restored.compared.contains(restore));
        }
        row
    }
}
