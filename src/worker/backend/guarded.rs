//! What a backend does because of its guard (exactly_once).

use crate::server::process::{self, Aborted};
use crate::tables::backends::BackendRow;
use crate::tables::catalog;
use crate::tables::numbers;
use crate::tables::restores;
use crate::worker::backend::Release;
use crate::worker::backend::{Backend, refused_streams};
use pgrx::pg_sys;
use relay::delivery::flight::{BatchedEvent, Contents};
use relay::delivery::{Cursor, Guarantee};
use relay::failure::Failure;
use relay::guard::claim::OnMissing;
use relay::guard::epoch::epoch_of;
use relay::guard::{self, Progress, Reach};
use relay::reading::snapshot::Tick;
use relay::redis::destination::Protocol;
use relay::sender::orders::Order;
use relay::time::Now;
use std::sync::Arc;
use std::time::Duration;

/// From one comparison with what a dump has brought to the next.
const COMPARE_PAUSE: Duration = Duration::from_millis(250);

impl Backend {
    /// Whether something is to be done about its guard.
    pub fn has_claim_step(&self) -> bool {
        self.recovery.is_due() || (self.is_told_to_take_over() && self.delivery.is_up())
    }

    /// A paused backend is taken over when it goes on.
    pub fn is_told_to_take_over(&self) -> bool {
        self.row.as_ref().is_some_and(|row| row.take_over && row.enabled)
    }

    /// What is to be done if Redis has lost everything. A backend without an answer does not claim.
    pub fn on_missing_guard(&self) -> OnMissing {
        let row = self.row.as_ref();
        row.and_then(|row| row.options.on_missing_guard.clone().ok())
            .unwrap_or(OnMissing::Halt)
    }

    pub fn is_exactly_once(&self) -> bool {
        self.reads_for_redis() && self.delivery.guarantee() == Guarantee::ExactlyOnce
    }

    /// Gives the sender an order; one that has ended has said so already.
    pub fn order(&self, order: Order) {
        if let Some(sender) = &self.sender {
            let _ = sender.order(order);
        }
    }

    /// Somebody else owns the guard, or there should be one: lets go, for a while.
    pub fn hold_off(&mut self, failure: Failure, retry_after: Duration, now: Now) {
        self.sender = None;
        self.recovery.reset();
        self.failed_at = self.address.clone();
        self.delivery.hold_off(failure, retry_after, now, fastrand::f64());
        if self.is_enabled() {
            self.dirty_since.get_or_insert(now);
        }
        self.log_change(now);
    }

    /// The guard is ours, and what it says is taken in.
    pub fn up(&mut self, now: Now) {
        self.recovery.reset();
        self.delivery.connected();
        self.log_change(now);
    }

    /// All is well again: those who look at the status should see it.
    pub fn note_recovery(&mut self, now: Now) {
        self.dirty_since.get_or_insert(now);
        self.log_change(now);
    }

    /// The guard speaks of batches that nobody has heard of; `total`: events up to them.
    pub fn adopt(&mut self, cursor: Cursor, total: i64, now: Now) {
        let known = self.delivery.published();
        let base = self.total() - known as i64;
        self.delivery.adopt(cursor, known.max((total - base).max(0) as u64));
        self.dirty_since.get_or_insert(now);
        (self.moved_at, self.tick_due) = (now, true);
    }

    /// A claim is about to be made, behind one in the name of epoch `claimed` at least. To be saved durably before it is.
    pub fn begin_epoch(&mut self, claimed: u64, now: Now) {
        // What was saved of it may have been lost.
        let claimed = claimed.max(epoch_of(self.delivery.number()));
        let known = self.standing.epoch.max(claimed as i64);
        self.standing.epoch = known.saturating_add(1);
        self.delivery.begin_epoch(self.standing.epoch as u64);
        self.dirty_since.get_or_insert(now);
    }

    pub fn count_healing(&mut self) {
        self.standing.healings += 1;
    }

    /// Goes back to `cursor`.
    pub fn read_again(&mut self, cursor: Cursor, reread_to: i64, now: Now) {
        self.delivery.heal(cursor, reread_to);
        self.dirty_since.get_or_insert(now);
        (self.tick_recorded_at, self.tick_due) = (None, true);
    }

    /// Whether events of a dump have come that were not looked for in the streams yet. A paused backend has time.
    pub fn is_restored(&self) -> bool {
        self.row
            .as_ref()
            .is_some_and(|row| row.enabled && !row.restores.is_empty())
    }

    /// The row as it is to be taken over now. To compare what a dump has brought, the connection is let go, and a restore may commit row by
    /// row: what comes while some are compared, or a moment later, or while something is on its way, waits for the next time. The backend
    /// goes on meanwhile, up to the tick that it has compared with: see [`Self::goal`].
    pub fn due_row(&mut self, row: BackendRow, now: Now) -> BackendRow {
        let mut row = self.without_done(row);
        if !self.is_exactly_once() || self.lane.is_some() {
            self.holds = false;
            return row;
        }
        let known = self.row.as_ref().map_or(&[][..], |row| &row.restores);
        let is_new = row.restores.iter().any(|restore| !known.contains(restore));
        self.holds = is_new && (!known.is_empty() || now < self.compares_at || self.is_sending());
        if self.holds {
            row.restores = known.to_vec();
        } else if is_new {
            self.compares_at = now + COMPARE_PAUSE;
        }
        row
    }

    /// When its row is to be looked at again because of restores that wait.
    pub fn load_at(&self) -> Option<Now> {
        let waits = match self.is_exactly_once() {
            true => self.holds && !self.is_sending() && self.row.as_ref().is_none_or(|row| row.restores.is_empty()),
            false => self.reads_for_redis() && self.is_restored(),
        };
        waits.then_some(self.compares_at)
    }

    /// Whether there are events of a dump that it may not read yet, since they are still to be compared.
    pub fn is_held(&self) -> bool {
        self.holds && self.is_exactly_once()
    }

    /// Whether it would take rows that another tick sees. One that is held would once those are to be compared.
    pub fn wants_tick(&self, now: Now) -> bool {
        self.is_ready(now) && (!self.is_held() || self.load_at().is_some_and(|at| at <= now))
    }

    /// Where it is going; `latest`: the newest tick that may be sent. One that is held goes no further than what it has compared with.
    pub fn goal<'a>(&'a self, latest: &'a Arc<Tick>) -> &'a Arc<Tick> {
        let position = self.delivery.position();
        if !self.is_held() || position.under_way.is_some() {
            return position.to(latest);
        }
        let here = &position.from;
        let compared = self.compared_to.as_ref().unwrap_or(here);
        let goal = match latest.snapshot.includes(&compared.snapshot) {
            true => compared,
            false => latest,
        };
        match here.snapshot.includes(&goal.snapshot) {
            true => here,
            false => goal,
        }
    }

    /// What `tick` sees is going to be looked for in the streams.
    pub fn compares_to(&mut self, tick: &Arc<Tick>) {
        self.comparing_to = Some(tick.clone());
    }

    /// All of that was looked for. It is sent before the next is compared; whether there is more is to be looked at before anything is read.
    pub fn has_compared(&mut self, now: Now) {
        self.compared_to = self.comparing_to.take();
        self.holds = true;
        self.compares_at = now + COMPARE_PAUSE;
    }

    /// Whether it is time to see to restores (at_least_once).
    pub fn may_compare(&mut self, now: Now) -> bool {
        let may = now >= self.compares_at;
        if may {
            self.compares_at = now + COMPARE_PAUSE;
        }
        may
    }

    /// They were looked for, or never will be.
    pub fn forget_restores(&mut self) -> Result<(), Aborted> {
        let is_lane = self.lane.is_some();
        if let Some(row) = self.row.as_mut().filter(|row| !row.restores.is_empty()) {
            if is_lane {
                // The others, and the finder, have to come past them too.
                self.compared.append(&mut row.restores);
                return Ok(());
            }
            let latest = process::transaction(|| restores::note_looked_for(&row.restores))?;
            row.last_restore = row.last_restore.max(latest);
            row.restores.clear();
        }
        Ok(())
    }

    /// What waits in the table may have changed.
    pub fn reload_streams(&mut self) -> Result<(), Aborted> {
        let waiting = process::transaction(|| refused_streams(self.number, self.lane, &self.stream))?;
        self.delivery.set_streams(waiting);
        Ok(())
    }

    /// What no guard of ours can be beyond. Within a transaction.
    pub fn reach(&self) -> Reach {
        // SAFETY: reads a counter under its lock, and a position.
        let (next_xid, wal) = unsafe { (pg_sys::ReadNextFullTransactionId().value, pg_sys::GetXLogInsertRecPtr()) };
        Reach {
            next_xid,
            highest_seq: numbers::highest(&catalog::expect_relations()),
            wal,
            epoch: self.standing.epoch.max(0) as u64,
            total: self.total(),
        }
    }

    /// The key of its guard (exactly_once).
    pub fn guard_key(&self) -> Option<&str> {
        match &self.destination.as_ref().ok()?.protocol {
            Protocol::ExactlyOnce { guard, .. } => Some(guard),
            Protocol::AtLeastOnce { .. } => None,
        }
    }

    /// Events accepted in all.
    pub fn total(&self) -> i64 {
        self.standing.accepted_total + (self.delivery.published() - self.counted) as i64
    }

    /// Has the connection looked at. With exactly_once that tells those who may watch the guard that its owner lives; a batch says as much.
    pub fn refresh(&mut self) {
        let is_idle = self.reads_for_redis() && self.delivery.is_up() && self.delivery.is_idle();
        if let Some(sender) = self.sender.as_ref().filter(|_| is_idle) {
            self.beat += 1;
            sender.beat(self.beat);
        }
    }

    /// Tells them that its owner leaves, as soon as it is the owner.
    pub fn release_guard(&mut self) {
        let owns = self.delivery.is_up() && self.delivery.is_idle();
        let claims = self.recovery.has_claimed();
        if self.is_exactly_once() && self.release == Release::None && (owns || claims) {
            self.beat += 1;
            let beat = self.beat;
            self.order(Order::Beat { beat, released: true });
            self.release = Release::Ordered;
        }
    }

    /// Whether the answer to that is on its way.
    pub fn is_releasing(&self) -> bool {
        self.sender.is_some() && self.release == Release::Ordered
    }

    /// What was refused is written down, durably: the sender may go on.
    pub fn resume(&mut self) {
        if self.delivery.is_stopped() {
            self.delivery.resume();
            self.order(Order::Resume);
        }
    }

    /// Ends a batch with what the guard is to say of it.
    pub(super) fn append_mark(
        &self,
        bytes: &mut Vec<u8>,
        key: &[u8],
        entries: &[BatchedEvent],
        contents: &Contents,
        wal: u64,
    ) {
        let (end, again) = match contents {
            Contents::Rows { end } => (Some(end), Vec::new()),
            Contents::Waiting { .. } => (None, entries.iter().map(|e| e.seq).collect()),
        };
        let progress = Progress {
            mark: self.delivery.mark(end),
            again: &again,
            wal,
            total: self.total() + (self.delivery.in_flight() + entries.len()) as i64,
        };
        guard::append_progress(bytes, key, &progress);
    }
}
