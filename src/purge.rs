//! Retention: deleting published events some time after they were sent, and failed ones after they failed, in small pieces.
//!
//! There is no sent-at on a row. Instead each backend records ticks, "all that this snapshot sees is delivered now"; what is visible
//! in a tick older than the retention may go. Purging is reading with another position: from the tick up to which has
//! been purged to the newest that is old enough.

use crate::backend::Backend;
use crate::catalog;
use crate::guc;
use crate::outbox;
use crate::process::{self, Aborted};
use crate::report;
use crate::rows::EventsTable;
use pgrx::pg_extern;
use relay::delivery::Now;
use relay::reader::{RangeScan, Step};
use relay::snapshot::Tick;
use std::sync::Arc;
use std::time::Duration;

/// Rows that the worker deletes in one transaction: a millisecond or two, so that the events' latency does not notice.
const PIECE_ROWS: usize = 250;
/// Rows that one piece may meet.
const PIECE_STEPS: usize = 5_000;
/// Ticks are recorded, and it is looked whether something can be purged, this many times within the retention.
const TICKS_PER_RETENTION: i64 = 100;
/// Failed events are few: they are looked for at most this often.
const LEAST_FAILED_INTERVAL: Duration = Duration::from_secs(60);

/// The worker's purging.
#[derive(Default)]
pub struct Purge {
    next_look_at: Now,
    next_failed_look_at: Now,
    /// Ticks are kept whose time will come: it is looked again without being woken.
    ticks_wait: bool,
    /// Which backend is being purged, and after which row.
    under_way: Option<(usize, i64)>,
}

impl Purge {
    /// The settings changed: something may be due now.
    pub fn look_now(&mut self) {
        (self.next_look_at, self.next_failed_look_at) = (Now::ZERO, Now::ZERO);
    }

    /// One piece, if there is something to do and time for it. Returns when to come back, if sooner than otherwise.
    pub fn step(&mut self, now: Now, backends: &mut [Backend], at_leisure: bool) -> Result<Option<Duration>, Aborted> {
        let failed = self.step_failed(now)?;
        let published = match retention() {
            Some(retention_us) => self.step_published(now, backends, at_leisure, retention_us)?,
            None => None,
        };
        Ok([failed, published].into_iter().flatten().min())
    }

    fn step_failed(&mut self, now: Now) -> Result<Option<Duration>, Aborted> {
        let Some(retention_us) = guc::retention_us(&guc::FAILED_RETENTION_MIN) else {
            return Ok(None);
        };
        if now >= self.next_failed_look_at {
            let deleted = process::transaction(|| outbox::purge_failed(retention_us, PIECE_ROWS as i64))?;
            let more = deleted >= PIECE_ROWS as u64;
            let pause = tick_interval(retention_us).max(LEAST_FAILED_INTERVAL);
            self.next_failed_look_at = if more { now } else { now + pause };
        }
        Ok(Some(self.next_failed_look_at - now))
    }

    fn step_published(
        &mut self,
        now: Now,
        backends: &mut [Backend],
        at_leisure: bool,
        retention_us: i64,
    ) -> Result<Option<Duration>, Aborted> {
        let interval = tick_interval(retention_us);
        let is_clock_due = |b: &Backend| b.tick_recorded_at.is_none_or(|at| now >= at + interval);
        let is_due = |b: &Backend| b.tick_due && is_clock_due(b);
        // What all its lanes have delivered, where it has some.
        let due: Vec<(i32, Arc<Tick>)> = backends
            .iter()
            .filter(|b| b.lane.is_none())
            .filter(|b| backends.iter().any(|lane| lane.number == b.number && is_due(lane)))
            .map(|b| (b.number, delivered(backends, b)))
            .filter(|(_, tick)| tick.high_seq > 0)
            .collect();
        if !due.is_empty() {
            process::transaction(|| due.iter().for_each(|(number, tick)| outbox::record_tick(*number, tick)))?;
            let is_recorded = |b: &Backend| due.iter().any(|(number, _)| *number == b.number);
            for backend in backends.iter_mut().filter(|b| is_recorded(b)) {
                // What is in flight is acknowledged later, and asks again.
                (backend.tick_recorded_at, backend.tick_due) =
                    (Some(now), backend.delivery.acked().under_way.is_some());
            }
            self.ticks_wait = true;
        }
        if self.under_way.is_none() {
            if now < self.next_look_at {
                return Ok(self.next_look(now, backends, interval));
            }
            self.next_look_at = now + interval;
            self.under_way = (!backends.is_empty()).then_some((0, 0));
        }
        while let Some((index, after)) = self.under_way {
            let Some(backend) = backends.get(index) else {
                self.under_way = None;
                self.ticks_wait = process::transaction(outbox::ticks_wait)?;
                break;
            };
            if backend.lane.is_some() {
                // Its finder does it for all.
                self.under_way = Some((index + 1, 0));
                continue;
            }
            let number = backend.number;
            let (deleted, last) = process::transaction(|| piece(number, after, retention_us, PIECE_ROWS))?;
            self.under_way = Some(last.map_or((index + 1, 0), |seq| (index, seq)));
            if deleted > 0 || last.is_some() {
                // Events go first; without any, it goes on at once.
                let pause = if at_leisure {
                    Duration::ZERO
                } else {
                    Duration::from_millis(5)
                };
                return Ok(Some(pause));
            }
        }
        Ok(self.next_look(now, backends, interval))
    }

    /// An idle server on which nothing is left to purge stays idle.
    fn next_look(&self, now: Now, backends: &[Backend], interval: Duration) -> Option<Duration> {
        let look = self.ticks_wait.then(|| self.next_look_at.saturating_sub(now));
        let tick = backends.iter().any(|b| b.tick_due).then_some(interval);
        look.into_iter().chain(tick).min()
    }
}

/// All that this tick sees is delivered by a backend, and by all its lanes.
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

fn retention() -> Option<i64> {
    guc::retention_us(&guc::PUBLISHED_RETENTION_MIN).filter(|_| guc::CLEANUP_PUBLISHED.get())
}

fn tick_interval(retention_us: i64) -> Duration {
    Duration::from_micros((retention_us / TICKS_PER_RETENTION) as u64)
        .clamp(Duration::from_secs(1), Duration::from_secs(3_600))
}

/// Deletes up to `count` rows of a backend after `after`. Returns how many, and after which row to go on; `None`: all done.
fn piece(number: i32, after: i64, retention_us: i64, count: usize) -> (u64, Option<i64>) {
    let Some((from, to)) = outbox::purgeable(number, retention_us) else {
        return (0, None);
    };
    // Number 0 stands for the events of backends that nobody knows.
    let known = if number == 0 {
        outbox::known_numbers()
    } else {
        Vec::new()
    };
    let is_its = |row_number: i32| row_number == number || (number == 0 && !known.contains(&row_number));
    let relations = catalog::expect_relations();
    let mut table = EventsTable::open(&relations);
    let mut scan = RangeScan::open(&mut table, &from, &to, after);
    let mut found = Vec::new();
    let mut last = None;
    for _ in 0..PIECE_STEPS {
        match scan.step() {
            None => {
                last = None;
                break;
            }
            Some(Step::Passed(key)) => last = Some(key.seq),
            Some(Step::Row(key)) => {
                last = Some(key.seq);
                if is_its(scan.current().row().backend_number()) {
                    found.push(key.seq);
                }
            }
        }
        if found.len() >= count {
            break;
        }
    }
    drop(scan);
    table.close();
    let deleted = outbox::delete_events(&found);
    if last.is_none() {
        outbox::purged(number, &to);
    }
    (deleted, last)
}

/// `outbox.purge_piece(backend_number, after_seq, row_count)`
#[pg_extern(sql = false)]
fn purge_piece(
    backend_number: i32,
    after_seq: i64,
    row_count: i32,
) -> pgrx::iter::TableIterator<'static, (pgrx::name!(deleted, i64), pgrx::name!(last_seq, Option<i64>))> {
    let delete = || match retention() {
        Some(retention_us) => piece(backend_number, after_seq, retention_us, row_count.max(1) as usize),
        None => (0, None),
    };
    let (deleted, last) = report::guard(delete);
    pgrx::iter::TableIterator::once((deleted as i64, last))
}
