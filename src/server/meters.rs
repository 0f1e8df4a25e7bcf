//! What is counted of each backend, in shared memory: so that it outlives the worker, and nothing is written for it. A
//! *meter* is the counters of one backend of one database.
//!
//! There are [`METERS`] of them for the whole server. The backends that get none are sent to as well as the others, and
//! what `outbox.cursors` counts is known of them too. A backend that is deleted gives its meter back; a new one of the
//! same name has another number, and begins at zero.

use crate::server::clock;
use crate::server::unguarded;
use pgrx::pg_sys;
use relay::time::latency::{BUCKETS, Latencies};
use std::mem::size_of;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

/// Less than a megabyte.
const METERS: usize = 2_048;
/// Latencies are also counted by such spans, so that the latest can be told.
const SPAN_MS: u64 = 60_000;
/// A look at what is pending is compared with one that is at least and at most so old.
const LEAST_TREND_MS: u64 = 1_000;
const MOST_TREND_MS: u64 = 300_000;
/// Looks that are closer than this are not kept.
const BETWEEN_LOOKS_MS: u64 = 10_000;

/// The counters of one backend. Only its worker counts, but for [`Meter::purged`].
#[repr(C)]
pub(crate) struct Meter {
    /// The database's OID, and the backend's number; 0: the meter is free.
    whose: AtomicU64,
    /// Tells the extension from another that was created in the same database.
    installation: AtomicU64,
    pub accepted: AtomicU64,
    pub failed: AtomicU64,
    pub refused: AtomicU64,
    pub retried: AtomicU64,
    pub healed: AtomicU64,
    pub bytes: AtomicU64,
    pub batches: AtomicU64,
    pub reconnects: AtomicU64,
    pub purged: AtomicU64,
    latency_counts: [AtomicU64; BUCKETS],
    latency_sum_us: AtomicU64,
    recent: [Span; 2],
    /// The latest look at what is pending, and one before it.
    looks: [Look; 2],
}

/// How many events were pending when somebody looked.
#[repr(C)]
struct Look {
    /// 0: it was never looked at.
    at_ms: AtomicU64,
    pending: AtomicU64,
}

/// The latencies of one span of time.
#[repr(C)]
struct Span {
    /// Counted from the start of the clock.
    number: AtomicU64,
    counts: [AtomicU32; BUCKETS],
}

static METERS_BLOCK: AtomicPtr<Meter> = AtomicPtr::new(ptr::null_mut());

/// How much shared memory they need.
pub(super) fn size() -> usize {
    count() * size_of::<Meter>()
}

fn count() -> usize {
    match relay::fault::is_mutated(relay::fault::Mutation::FewDatabaseSlots) {
        true => 3,
        false => METERS,
    }
}

/// Finds or makes them. Called under the lock of those who make shared memory.
///
/// # Safety
/// By Postgres's startup hook alone.
pub(super) unsafe fn attach() {
    // SAFETY: as the caller promises. Zeroes are the free state of every meter.
    unsafe {
        let mut found = false;
        let block = unguarded::ShmemInitStruct(c"outbox_relay meters".as_ptr(), size(), &mut found);
        if !found {
            ptr::write_bytes(block.cast::<u8>(), 0, size());
        }
        METERS_BLOCK.store(block.cast(), Ordering::Release);
    }
}

fn all() -> &'static [Meter] {
    let first = METERS_BLOCK.load(Ordering::Acquire);
    if first.is_null() {
        return &[];
    }
    // SAFETY: so many lie there for as long as the server runs; all their fields are atomics.
    unsafe { std::slice::from_raw_parts(first, count()) }
}

fn key(database: pg_sys::Oid, number: i32) -> u64 {
    u64::from(database.to_u32()) << 32 | u64::from(number as u32)
}

/// The meter of a backend, if it has one.
pub(crate) fn find(database: pg_sys::Oid, number: i32) -> Option<&'static Meter> {
    let key = key(database, number);
    all().iter().find(|meter| meter.whose.load(Ordering::Acquire) == key)
}

/// The same, given to it if need be. `so_far`: what is known of events that were accepted and that have failed. For the
/// database's worker alone.
pub(crate) fn claim(
    database: pg_sys::Oid,
    number: i32,
    installation: u64,
    so_far: impl FnOnce() -> (u64, u64),
) -> Option<&'static Meter> {
    let known = find(database, number);
    if let Some(meter) = known.filter(|m| m.installation.load(Ordering::Acquire) == installation) {
        return Some(meter);
    }
    let (accepted, failed) = so_far();
    let key = key(database, number);
    let takes = |meter: &&Meter| {
        let taken = meter
            .whose
            .compare_exchange(0, key, Ordering::AcqRel, Ordering::Relaxed);
        taken.is_ok()
    };
    let meter = known.or_else(|| all().iter().find(takes))?;
    meter.reset();
    meter.accepted.store(accepted, Ordering::Relaxed);
    meter.failed.store(failed, Ordering::Relaxed);
    meter.installation.store(installation, Ordering::Release);
    Some(meter)
}

/// Gives the meters of a database back, but for those of these backends.
pub(crate) fn keep_only(database: pg_sys::Oid, kept: impl Fn(i32) -> bool) {
    for (meter, number) in of(database) {
        if !kept(number) {
            meter.whose.store(0, Ordering::Release);
        }
    }
}

/// The meters of a database, with the numbers of their backends.
pub(crate) fn of(database: pg_sys::Oid) -> impl Iterator<Item = (&'static Meter, i32)> {
    all().iter().filter_map(move |meter| {
        let whose = meter.whose.load(Ordering::Acquire);
        (whose >> 32 == u64::from(database.to_u32()) && whose != 0).then_some((meter, whose as u32 as i32))
    })
}

impl Meter {
    fn reset(&self) {
        let single = [
            &self.accepted,
            &self.failed,
            &self.refused,
            &self.retried,
            &self.healed,
            &self.bytes,
            &self.batches,
            &self.reconnects,
            &self.purged,
            &self.latency_sum_us,
        ];
        let all = single.into_iter().chain(&self.latency_counts);
        all.for_each(|counter| counter.store(0, Ordering::Relaxed));
        self.recent.iter().for_each(|span| span.begin(0));
        self.looks.iter().for_each(|look| look.set(0, 0));
    }

    /// Adds the latencies of a batch.
    pub(crate) fn add_latencies(&self, latencies: &Latencies) {
        let number = clock::since_boot_ms() / SPAN_MS;
        let span = &self.recent[number as usize % self.recent.len()];
        if span.number.load(Ordering::Relaxed) != number {
            span.begin(number);
        }
        for (index, count) in latencies.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            self.latency_counts[index].fetch_add(*count, Ordering::Relaxed);
            span.counts[index].fetch_add(*count as u32, Ordering::Relaxed);
        }
        self.latency_sum_us.fetch_add(latencies.sum_us, Ordering::Relaxed);
    }

    /// Somebody has found so many events pending. Returns how many more that are than at an earlier look, and how many
    /// seconds ago that was.
    pub(crate) fn note_pending(&self, pending: u64) -> Option<(i64, f64)> {
        let now_ms = clock::since_boot_ms();
        let [latest, before] = &self.looks;
        let ago_ms = |look: &Look| now_ms.saturating_sub(look.at_ms.load(Ordering::Relaxed));
        let compared = [before, latest]
            .into_iter()
            .find(|look| (LEAST_TREND_MS..MOST_TREND_MS).contains(&ago_ms(look)))
            .map(|look| {
                let earlier = look.pending.load(Ordering::Relaxed);
                (pending as i64 - earlier as i64, ago_ms(look) as f64 / 1_000.0)
            });
        if ago_ms(latest) >= BETWEEN_LOOKS_MS {
            before.set(
                latest.at_ms.load(Ordering::Relaxed),
                latest.pending.load(Ordering::Relaxed),
            );
            latest.set(now_ms, pending);
        }
        compared
    }

    /// All latencies since the meter was claimed.
    pub(crate) fn latencies(&self) -> Latencies {
        Latencies {
            counts: std::array::from_fn(|index| self.latency_counts[index].load(Ordering::Relaxed)),
            sum_us: self.latency_sum_us.load(Ordering::Relaxed),
        }
    }

    /// Those of the last one to two minutes, without their sum.
    pub(crate) fn recent_latencies(&self) -> Latencies {
        let number = clock::since_boot_ms() / SPAN_MS;
        let is_recent = |span: &&Span| span.number.load(Ordering::Relaxed) + 1 >= number;
        let mut latencies = Latencies::default();
        for span in self.recent.iter().filter(is_recent) {
            let counts = span.counts.iter().map(|count| count.load(Ordering::Relaxed));
            for (sum, count) in latencies.counts.iter_mut().zip(counts) {
                *sum += u64::from(count);
            }
        }
        latencies
    }
}

impl Look {
    fn set(&self, at_ms: u64, pending: u64) {
        self.at_ms.store(at_ms, Ordering::Relaxed);
        self.pending.store(pending, Ordering::Relaxed);
    }
}

impl Span {
    fn begin(&self, number: u64) {
        self.counts.iter().for_each(|count| count.store(0, Ordering::Relaxed));
        self.number.store(number, Ordering::Relaxed);
    }
}
