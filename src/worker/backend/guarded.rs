//! The part of a backend that depends on its guard (exactly_once).

use crate::server::clock;
use crate::server::process::{self, Aborted, repeat_log_after};
use crate::tables::catalog;
use crate::tables::numbers;
use crate::worker::backend::connection::Connection;
use crate::worker::backend::{Backend, refused_streams};
use pgrx::pg_sys;
use relay::delivery::flight::{BatchedEvent, Contents};
use relay::delivery::{Cursor, Guarantee};
use relay::failure::Failure;
use relay::guard::claim::OnMissing;
use relay::guard::epoch::epoch_of;
use relay::guard::{self, Progress, Reach};
use relay::sender::orders::Order;
use relay::time::Now;
use std::time::Duration;

impl Backend {
    /// Whether recovery has a step to take.
    pub(crate) fn has_claim_step(&self) -> bool {
        self.recovery.is_due() || (self.is_told_to_take_over() && self.delivery.is_up())
    }

    /// What to do if Redis has lost everything. (A backend whose row has no usable value never connects.)
    pub(crate) fn on_missing_guard(&self) -> OnMissing {
        let known = self.options().and_then(|options| options.on_missing_guard.clone().ok());
        known.unwrap_or(OnMissing::Halt)
    }

    pub(crate) fn is_exactly_once(&self) -> bool {
        self.reads_for_redis() && self.delivery.guarantee() == Guarantee::ExactlyOnce
    }

    /// Gives the sender an order. A sender that has ended has reported that already.
    pub(crate) fn order(&self, order: Order) {
        if let Some(connection) = self.duty.connection() {
            connection.order(order);
        }
    }

    /// Lets the sender end, and does not connect for a while, because the guard or the settings do not allow it.
    pub(crate) fn hold_off(&mut self, failure: Failure, retry_after: Duration, now: Now) {
        self.drop_sender();
        self.recovery.reset();
        self.note_failing_node();
        self.delivery.hold_off(failure, retry_after, now, fastrand::f64());
        if self.is_enabled() {
            self.books.change(now);
        }
        self.log_change(now);
    }

    /// Called when this server owns the guard and everything that it says was processed.
    pub(crate) fn up(&mut self, now: Now) {
        self.recovery.reset();
        self.delivery.connected();
        self.count_connection();
        self.log_change(now);
    }

    /// Notes that a failure has ended, so that the views show it.
    pub(crate) fn note_recovery(&mut self, now: Now) {
        self.books.change(now);
        self.log_change(now);
    }

    /// Adopts batches that the guard names but whose replies were not read. `total`: the events up to and including
    /// them.
    pub(crate) fn adopt(&mut self, cursor: Cursor, total: i64, now: Now) {
        let known = self.delivery.accepted();
        let base = self.total() - known as i64;
        self.delivery.adopt(cursor, known.max((total - base).max(0) as u64));
        self.books.move_on(now);
        self.retention.is_due = true;
    }

    /// Begins an epoch above `claimed`, the highest that the guard names, for a claim. It must be saved durably before
    /// the claim is made.
    pub(crate) fn begin_epoch(&mut self, claimed: u64, now: Now) {
        // A crash may have lost the saved epoch.
        let claimed = claimed.max(epoch_of(self.delivery.number()));
        let known = self.books.standing.epoch.max(claimed as i64);
        self.books.standing.epoch = known.saturating_add(1);
        self.delivery.begin_epoch(self.books.standing.epoch as u64);
        self.books.change(now);
    }

    pub(crate) fn count_healing(&mut self) {
        self.books.standing.healings += 1;
    }

    /// Shows in the views that Redis has lost something. Returns whether it is to be logged.
    pub(crate) fn note_loss(&mut self, error: &str, hint: &str, now: Now) -> bool {
        let standing = &mut self.books.standing;
        standing.last_error = Some(error.to_owned());
        standing.last_hint = Some(hint.to_owned());
        standing.last_error_us = Some(clock::wall_us());
        self.books.change(now);
        self.logged.is_new_loss(error, repeat_log_after(), now)
    }

    /// Goes back to `cursor`.
    pub(crate) fn read_again(&mut self, cursor: Cursor, reread_to: i64, now: Now) {
        self.delivery.heal(cursor, reread_to);
        self.books.change(now);
        (self.retention.recorded_at, self.retention.is_due) = (None, true);
    }

    /// Reads again which streams have waiting events.
    pub(crate) fn reload_streams(&mut self) -> Result<(), Aborted> {
        let waiting = process::transaction(|| refused_streams(self.number, self.lane(), self.stream()))?;
        self.delivery.set_streams(waiting);
        Ok(())
    }

    /// The limit of what our own guard can say: this server has written nothing beyond it. Within a transaction.
    pub(crate) fn reach(&self) -> Reach {
        // SAFETY: reads a counter under its lock, and a position.
        let (next_xid, wal) = unsafe { (pg_sys::ReadNextFullTransactionId().value, pg_sys::GetXLogInsertRecPtr()) };
        Reach {
            next_xid,
            highest_seq: numbers::highest(&catalog::expect_relations()),
            wal,
            epoch: self.books.standing.epoch.max(0) as u64,
            total: self.total(),
        }
    }

    /// The key of its guard (exactly_once).
    pub(crate) fn guard_key(&self) -> Option<&str> {
        self.duty.connection().and_then(Connection::guard_key)
    }

    /// The total of accepted events.
    pub(crate) fn total(&self) -> i64 {
        self.books.total(self.delivery.accepted())
    }

    /// Checks an idle connection. With exactly_once, that also refreshes the guard, which shows others that its owner
    /// is alive, as a batch does.
    pub(crate) fn refresh(&mut self) {
        let is_idle = self.delivery.is_up() && self.delivery.is_idle();
        if let Some(connection) = self.duty.connection_mut().filter(|_| is_idle) {
            connection.refresh();
        }
    }

    /// Marks in the guard that its owner leaves, if this server is the owner.
    pub(crate) fn release_guard(&mut self) {
        let owns = self.delivery.is_up() && self.delivery.is_idle();
        let releases = self.is_exactly_once() && (owns || self.recovery.has_claimed());
        if let Some(connection) = self.duty.connection_mut().filter(|_| releases) {
            connection.release();
        }
    }

    /// Whether the reply to that is still expected.
    pub(crate) fn is_releasing(&self) -> bool {
        self.duty.connection().is_some_and(Connection::is_releasing)
    }

    /// Lets the sender go on, because refused events are now durable.
    pub(crate) fn resume(&mut self) {
        if self.delivery.is_stopped() {
            // The sender has dropped a survey that was ordered before.
            if let Some(readership) = self.delivery.readership_mut() {
                readership.interrupt();
            }
            self.delivery.resume();
            self.order(Order::Resume);
        }
    }

    /// Appends the guard's new values to a batch.
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
            own_stream: self.stream(),
        };
        guard::append_progress(bytes, key, &progress);
    }
}
