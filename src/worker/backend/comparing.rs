//! Restored events of a dump may have been sent since the dump was taken. With exactly_once they are looked for in the
//! streams before they are sent.
//!
//! Each comparison needs a new connection, and a restore may commit row by row. So events that come during a
//! comparison, shortly after one, or while something is on its way, wait for the next comparison. The backend goes on
//! meanwhile, up to the tick that it has compared with.

use crate::server::process::{self, Aborted};
use crate::tables::backends::BackendRow;
use crate::tables::restores;
use crate::worker::backend::Backend;
use relay::reading::snapshot::Tick;
use relay::time::Now;
use std::sync::Arc;
use std::time::Duration;

/// From one comparison with what a dump has brought to the next.
const COMPARE_PAUSE: Duration = Duration::from_millis(250);

impl Backend {
    /// Whether there are restored events that were not looked for in the streams yet. A paused backend looks for them
    /// later.
    pub(crate) fn is_restored(&self) -> bool {
        self.row().is_some_and(|row| row.enabled && !row.restores.is_empty())
    }

    /// The row to be applied now: without restores that wait for the next comparison.
    pub(crate) fn due_row(&mut self, row: BackendRow, now: Now) -> BackendRow {
        let mut row = self.without_compared(row);
        if !self.is_exactly_once() || self.lane().is_some() {
            self.restored.holds = false;
            return row;
        }
        let known = self.row().map_or(&[][..], |row| &row.restores);
        let is_new = row.restores.iter().any(|restore| !known.contains(restore));
        let holds = is_new && (!known.is_empty() || now < self.restored.compares_at || self.is_sending());
        if holds {
            row.restores = known.to_vec();
        } else if is_new {
            self.restored.compares_at = now + COMPARE_PAUSE;
        }
        self.restored.holds = holds;
        row
    }

    /// When its row has to be loaded again because restores wait.
    pub(crate) fn load_at(&self) -> Option<Now> {
        let waits = match self.is_exactly_once() {
            true => self.restored.holds && !self.is_sending() && self.row().is_none_or(|row| row.restores.is_empty()),
            false => self.reads_for_redis() && self.is_restored(),
        };
        waits.then_some(self.restored.compares_at)
    }

    /// Whether there are restored events that it must not read yet, because they were not compared.
    pub(crate) fn is_held(&self) -> bool {
        self.restored.holds && self.is_exactly_once()
    }

    /// Whether a newer tick is of use to it. While it is held, only once it is time to compare.
    pub(crate) fn wants_tick(&self, now: Now) -> bool {
        self.is_ready(now) && (!self.is_held() || self.load_at().is_some_and(|at| at <= now))
    }

    /// The tick up to which it reads. `latest`: the newest tick that may be sent. While it is held, it reads only up to
    /// the tick that it has compared with.
    pub(crate) fn goal<'a>(&'a self, latest: &'a Arc<Tick>) -> &'a Arc<Tick> {
        let position = self.delivery.position();
        if !self.is_held() || position.under_way.is_some() {
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

    /// No transaction with a higher id has restored events that were looked for; 0: none has. A lane may know more than
    /// the tables.
    pub(crate) fn last_restore(&self) -> u64 {
        let saved = self.row().map_or(0, |row| row.last_restore);
        saved.max(self.restored.last_compared)
    }

    /// Events up to `tick` are going to be looked for in the streams.
    pub(crate) fn compares_to(&mut self, tick: &Arc<Tick>) {
        self.restored.comparing_to = Some(tick.clone());
    }

    /// All of them were looked for. They are sent before the next comparison. The worker has to look for further
    /// restores before it reads anything.
    pub(crate) fn has_compared(&mut self, now: Now) {
        self.restored.compared_to = self.restored.comparing_to.take();
        self.restored.holds = true;
        self.restored.compares_at = now + COMPARE_PAUSE;
    }

    /// Whether it is time to look after restores (at_least_once).
    pub(crate) fn may_compare(&mut self, now: Now) -> bool {
        let may = now >= self.restored.compares_at;
        if may {
            self.restored.compares_at = now + COMPARE_PAUSE;
        }
        may
    }

    /// Forgets the restores: their events were looked for, or never will be.
    pub(crate) fn forget_restores(&mut self) -> Result<(), Aborted> {
        let is_lane = self.lane().is_some();
        if let Some(row) = self.duty.row_mut().filter(|row| !row.restores.is_empty()) {
            if is_lane {
                // The finder and the other lanes still have to pass them. Until then the tables do not say that they
                // were compared.
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

    /// The row without restores that this lane has compared, of which loading tells once more.
    pub(super) fn without_compared(&self, mut row: BackendRow) -> BackendRow {
        if self.lane().is_some() {
            row.restores.retain(|restore| !self.restored.compared.contains(restore));
        }
        row
    }
}
