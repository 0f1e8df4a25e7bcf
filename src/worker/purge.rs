//! Retention: deletes events some time after they were sent, failed events some time after they failed, and entries of
//! the inbox some time after they were made, in small steps.
//!
//! Rows have no time of sending. Instead, each backend records ticks: everything that this snapshot sees is delivered
//! by now. Rows that are seen by a tick older than the retention may be deleted. Purging reads in the same way as
//! delivery does, from the tick up to which was purged to the newest tick that is old enough (`tables/purge_piece.rs`).

use crate::server::guc;
use crate::server::process::{self, Aborted};
use crate::tables::catalog;
use crate::tables::purge_piece::{purge_sent, sent_retention_us};
use crate::tables::retention::{self, AgedPiece, RecordedTicks};
use crate::worker::backend::Backend;
use pgrx::guc::GucSetting;
use relay::reading::snapshot::Tick;
use relay::time::Now;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How many rows one transaction of the worker deletes at most.
const PIECE_ROWS: usize = 1_000;
/// How many failed events or entries of the inbox are deleted at once.
const AGED_ROWS: i64 = 100;
/// How often they are deleted while events come.
const AGED_EVERY: Duration = Duration::from_millis(5);
/// The usual share, some 30,000 rows a second. Nobody waits for purging, but events compete with it for the worker, a
/// processor and the disk.
const USUAL: Share = Share {
    rest: 4,
    time: Duration::from_micros(500),
    every: Duration::from_millis(5),
    time_then: Duration::from_micros(250),
};
/// If purging has been behind for this long,
const BEHIND_AFTER: Duration = Duration::from_secs(600);
/// it takes this share, because the next rows are due already.
const BEHIND: Share = Share {
    rest: 1,
    time: Duration::from_micros(500),
    every: Duration::from_micros(1_500),
    time_then: Duration::from_micros(500),
};
/// How many times within the retention ticks are recorded and something is purged.
const TICKS_PER_RETENTION: i64 = 100;
/// Failed events and entries of the inbox are looked for at most this often.
const LEAST_AGED_INTERVAL: Duration = Duration::from_secs(60);

/// How much of the worker's time purging takes.
struct Share {
    /// After each transaction, purging rests this many times as long as it took.
    rest: u32,
    /// How long one transaction deletes.
    time: Duration,
    /// Purging waits for a moment in which no event is about to be committed. Then the event's commit flushes what was
    /// written here, and no tick has to. If no such moment comes, one transaction is still made this often.
    every: Duration,
    /// How long such a transaction deletes, even if an event has come.
    time_then: Duration,
}

/// The purging of rows that have a time of their own, from which their retention counts.
#[derive(Default)]
struct Aged {
    next_look_at: Now,
    /// While there are more pieces: where the next begins, see `retention::purge_aged`.
    from_us: Option<i64>,
}

impl Aged {
    /// Takes one step, if there is something to do. Returns when to come back, if that is sooner than otherwise.
    /// `is_wanted`: whether there is other work, because events go first.
    fn step(
        &mut self,
        now: Now,
        retention: &GucSetting<i32>,
        delete: fn(i64, i64, i64) -> AgedPiece,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<Option<Duration>, Aborted> {
        let Some(retention_us) = guc::retention_us(retention) else {
            return Ok(None);
        };
        if now >= self.next_look_at {
            process::show_activity("deleting what is older than its retention");
            let start = Instant::now();
            let from_us = self.from_us.take().unwrap_or(i64::MIN);
            let piece = process::transaction(|| delete(retention_us, AGED_ROWS, from_us))?;
            let took = start.elapsed();
            let more = piece.deleted >= AGED_ROWS as u64;
            self.from_us = piece.last_us.filter(|_| more);
            let pause = tick_interval(retention_us).max(LEAST_AGED_INTERVAL);
            self.next_look_at = now
                + match more {
                    true if is_wanted() => AGED_EVERY.max(took * USUAL.rest),
                    true => took * USUAL.rest,
                    false => pause,
                };
        }
        Ok(Some(self.next_look_at - now))
    }
}

/// The worker's purging.
#[derive(Default)]
pub(super) struct Purge {
    next_look_at: Now,
    failed: Aged,
    inbox: Aged,
    /// There are ticks that will be old enough later, so the worker looks again without being woken.
    ticks_wait: bool,
    /// Which backend is being purged, by its index (deleted ones follow the others), and after which row.
    under_way: Option<(usize, i64)>,
    /// Deleted backends whose events are not purged yet.
    forgotten: Vec<i32>,
    /// The number of the backend that is being purged.
    backend: i32,
    began_at: Now,
    stepped_at: Now,
    rests_until: Now,
}

impl Purge {
    /// The settings have changed, so something may be due now.
    pub(super) fn look_now(&mut self) {
        self.next_look_at = Now::ZERO;
        (self.failed, self.inbox) = (Aged::default(), Aged::default());
    }

    /// One step for failed events, see [`Aged::step`].
    pub(super) fn step_failed(&mut self, now: Now, is_wanted: &dyn Fn() -> bool) -> Result<Option<Duration>, Aborted> {
        let retention = &guc::FAILED_RETENTION_MIN;
        self.failed.step(now, retention, retention::purge_failed, is_wanted)
    }

    /// One step for the inbox, see [`Aged::step`].
    pub(super) fn step_inbox(&mut self, now: Now, is_wanted: &dyn Fn() -> bool) -> Result<Option<Duration>, Aborted> {
        let retention = &guc::INBOX_RETENTION_MIN;
        self.inbox.step(now, retention, retention::purge_inbox, is_wanted)
    }

    /// A lock delays one backend: look at it again at this time, whatever the interval is.
    pub(super) fn look_at(&mut self, at: Now) {
        self.next_look_at = self.next_look_at.min(at);
    }

    /// The number of the backend that was last looked at.
    pub(super) fn backend(&self) -> i32 {
        self.backend
    }

    /// Records what has been delivered by now, if that is due.
    pub(super) fn record_ticks(&mut self, now: Now, backends: &mut [Backend]) -> Result<(), Aborted> {
        let Some(retention_us) = sent_retention_us() else {
            return Ok(());
        };
        let interval = tick_interval(retention_us);
        let is_clock_due = |b: &Backend| b.retention.recorded_at.is_none_or(|at| now >= at + interval);
        let is_due = |b: &Backend| b.retention.is_due && is_clock_due(b);
        // There may be thousands of backends, most of which have never delivered anything.
        let has_come_on = |b: &&Backend| is_due(b) && b.delivery.acked().from.high_seq > 0;
        let numbers: BTreeSet<i32> = backends.iter().filter(has_come_on).map(|b| b.number).collect();
        // In a cluster, what all lanes have delivered.
        let due: Vec<(i32, Arc<Tick>)> = backends
            .iter()
            .filter(|b| b.lane().is_none() && numbers.contains(&b.number))
            .map(|b| (b.number, delivered(backends, b)))
            .filter(|(_, tick)| tick.high_seq > 0)
            .collect();
        if !due.is_empty() {
            process::transaction(|| {
                let recorded = RecordedTicks::by_the_clock();
                due.iter().for_each(|(number, tick)| recorded.record(*number, tick));
                catalog::expect_served();
            })?;
            let is_recorded = |b: &Backend| due.iter().any(|(number, _)| *number == b.number);
            for backend in backends.iter_mut().filter(|b| is_recorded(b)) {
                // What is in flight will be acknowledged later, and that asks for the next tick.
                let goes_on = backend.delivery.acked().under_way.is_some() && !backend.stands_before_own();
                (backend.retention.recorded_at, backend.retention.is_due) = (Some(now), goes_on);
            }
            self.ticks_wait = true;
        }
        Ok(())
    }

    /// One step for the sent events of a backend, if there is something to do and time for it. Returns when to come
    /// back, as above. `allows`: whether a backend may be purged now. `succeeded`: called for a backend that no lock
    /// delays.
    pub(super) fn step_sent(
        &mut self,
        now: Now,
        backends: &[Backend],
        is_wanted: &dyn Fn() -> bool,
        allows: &dyn Fn(i32) -> bool,
        succeeded: &mut dyn FnMut(i32),
    ) -> Result<Option<Duration>, Aborted> {
        let Some(retention_us) = sent_retention_us() else {
            return Ok(None);
        };
        let interval = tick_interval(retention_us);
        if self.under_way.is_none() {
            if now < self.next_look_at {
                return Ok(self.next_look(now, backends, interval));
            }
            self.next_look_at = now + interval;
            self.under_way = (!backends.is_empty()).then_some((0, 0));
            self.forgotten = process::transaction(|| RecordedTicks::by_the_clock().of_forgotten())?;
            self.began_at = now;
        }
        while let Some((index, after)) = self.under_way {
            let backend = backends.get(index);
            let forgotten = || self.forgotten.get(index - backends.len()).copied();
            let Some(number) = backend.map_or_else(forgotten, |b| Some(b.number)) else {
                self.under_way = None;
                self.ticks_wait = process::transaction(retention::ticks_wait)?;
                break;
            };
            // Backends come and go meanwhile, so another one may have this index now.
            let after = if number == self.backend { after } else { 0 };
            self.backend = number;
            if backend.is_some_and(|b| b.lane().is_some()) || !allows(number) {
                // The finder purges for all lanes.
                self.under_way = Some((index + 1, 0));
                continue;
            }
            let is_behind = now >= self.began_at + interval.max(BEHIND_AFTER);
            let share = if is_behind { &BEHIND } else { &USUAL };
            let is_forced = is_wanted();
            let begins_at = match is_forced {
                true => self.rests_until.max(self.stepped_at + share.every),
                false => self.rests_until,
            };
            if now < begins_at {
                return Ok(Some(begins_at - now));
            }
            self.stepped_at = now;
            let start = Instant::now();
            let is_over = || match is_forced {
                true => start.elapsed() >= share.time_then,
                false => start.elapsed() >= share.time || is_wanted(),
            };
            let name = backend.map_or("(deleted)", Backend::name);
            process::show_activity(&format!("deleting events of {name} after their retention"));
            // If this backend fails because of a lock, the next step goes on with the next one.
            self.under_way = Some((index + 1, 0));
            let (deleted, last) =
                process::transaction(|| purge_sent(number, after, retention_us, PIECE_ROWS, is_over))?;
            succeeded(number);
            if let Some(backend) = backend {
                backend.count_purged(deleted);
            }
            self.under_way = Some(last.map_or((index + 1, 0), |seq| (index, seq)));
            if deleted > 0 || last.is_some() {
                let took = start.elapsed();
                let rest = took * share.rest;
                self.rests_until = now + took + rest;
                return Ok(Some(rest));
            }
        }
        Ok(self.next_look(now, backends, interval))
    }

    /// When to look again. An idle server with nothing left to purge stays idle.
    fn next_look(&self, now: Now, backends: &[Backend], interval: Duration) -> Option<Duration> {
        let look = self.ticks_wait.then(|| self.next_look_at.saturating_sub(now));
        let tick = backends.iter().any(|b| b.retention.is_due).then_some(interval);
        look.into_iter().chain(tick).min()
    }
}

/// A tick of which a backend with all its lanes has delivered everything.
fn delivered(backends: &[Backend], backend: &Backend) -> Arc<Tick> {
    let lanes = backends.iter().filter(|b| b.number == backend.number);
    let mut lowest = backend.delivery.acked().from.clone();
    for tick in lanes.map(|b| &b.delivery.acked().from) {
        if !tick.snapshot.includes(&lowest.snapshot) {
            lowest = tick.clone();
        }
    }
    lowest
}

/// Whether sent events are deleted at all.
pub(super) fn is_on() -> bool {
    sent_retention_us().is_some()
}

fn tick_interval(retention_us: i64) -> Duration {
    Duration::from_micros((retention_us / TICKS_PER_RETENTION) as u64)
        .clamp(Duration::from_secs(1), Duration::from_secs(3_600))
}
