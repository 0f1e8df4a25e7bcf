//! Counts a backend's work for `outbox.metrics`: once for each batch, in its meter. All lanes of a backend share one
//! meter.

use crate::server::clock;
use crate::server::meters::{self, Meter};
use crate::tables::cursors;
use crate::worker::backend::{Backend, Home};
use pgrx::pg_sys;
use relay::delivery::flight::{Refusal, is_backends};
use relay::time::latency::Latencies;
use std::sync::atomic::{AtomicU64, Ordering};

impl Backend {
    /// Finds or assigns its meter. A new one continues from the backend's saved totals. Within a transaction. False: no
    /// meter is free.
    pub(crate) fn find_meter(&mut self, home: &Home) -> bool {
        if self.row().is_none() || self.metered.meter.is_some() {
            return true;
        }
        // SAFETY: a plain read of the process's own variable.
        let database = unsafe { pg_sys::MyDatabaseId };
        let so_far = || cursors::totals(self.number);
        self.metered.meter = meters::claim(database, self.number, home.installation_hash(), so_far);
        self.metered.accepted = self.delivery.accepted();
        self.metered.failed = self.books.standing.failed_total;
        self.metered.meter.is_some()
    }

    /// The backend was deleted, so its meter is no longer its own.
    pub(super) fn leave_meter(&mut self) {
        self.metered.meter = None;
    }

    /// A lane uses the meter of its finder. What a former lane had saved is counted there.
    pub(super) fn share_meter(&mut self, finder: &Self) {
        self.metered.meter = finder.metered.meter;
        self.metered.failed = self.books.standing.failed_total;
    }

    fn count(&self, counter: fn(&Meter) -> &AtomicU64, count: usize) {
        if let Some(meter) = self.metered.meter.filter(|_| count > 0) {
            counter(meter).fetch_add(count as u64, Ordering::Relaxed);
        }
    }

    /// Counts the oldest batch, for which all replies have come.
    pub(super) fn count_batch(&self, refused: &[Refusal]) {
        if let Some(batch) = self.delivery.oldest() {
            self.count(|meter| &meter.batches, 1);
            self.count(|meter| &meter.bytes, batch.bytes);
            self.count_answers(batch.entries.len(), refused);
        }
    }

    /// Counts the oldest batch, for which this many replies have come.
    pub(super) fn count_answers(&self, known: usize, refused: &[Refusal]) {
        let (Some(meter), Some(batch)) = (self.metered.meter, self.delivery.oldest()) else {
            return;
        };
        let (now_us, mut latencies) = (clock::wall_us(), Latencies::default());
        let mut refusals = refused.iter().peekable();
        for (index, entry) in batch.entries.iter().enumerate().take(known) {
            if refusals.next_if(|refusal| refusal.0 == index).is_none() {
                latencies.add((now_us - entry.committed_after_us).max(0) as u64);
            }
        }
        meter.add_latencies(&latencies);
        self.count_refused(refused);
        if batch.again {
            self.count(|meter| &meter.retried, known.min(batch.entries.len()));
        }
    }

    /// Counts the oldest batch, of which nothing was accepted.
    pub(super) fn count_aborted(&self, refused: &[Refusal]) {
        self.count_refused(refused);
        let retried = self.delivery.oldest().filter(|batch| batch.again);
        self.count(|meter| &meter.retried, retried.map_or(0, |batch| batch.entries.len()));
    }

    fn count_refused(&self, refused: &[Refusal]) {
        let of_events = refused.iter().filter(|refusal| !is_backends(refusal)).count();
        self.count(|meter| &meter.refused, of_events);
    }

    /// Counts a new connection.
    pub(super) fn count_connection(&mut self) {
        if std::mem::replace(&mut self.metered.has_connected, true) {
            self.count(|meter| &meter.reconnects, 1);
        }
    }

    /// Counts events that Redis has lost.
    pub(crate) fn count_healed(&self, count: i64) {
        self.count(|meter| &meter.healed, count.max(0) as usize);
    }

    pub(crate) fn count_purged(&self, count: u64) {
        self.count(|meter| &meter.purged, count as usize);
    }

    /// Counts what was accepted and what has failed since the last time.
    pub(super) fn count_progress(&mut self) {
        let (accepted, failed) = (self.delivery.accepted(), self.books.standing.failed_total);
        let of = &mut self.metered;
        let before = (
            std::mem::replace(&mut of.accepted, accepted),
            std::mem::replace(&mut of.failed, failed),
        );
        self.count(|meter| &meter.accepted, accepted.saturating_sub(before.0) as usize);
        self.count(|meter| &meter.failed, failed.saturating_sub(before.1).max(0) as usize);
    }
}
