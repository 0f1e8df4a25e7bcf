//! Counters for each backend, in shared memory, so that they outlive the worker and cost no writes. A *meter* is the
//! counters of one backend of one database.
//!
//! There are [`METERS`] of them for the whole server. Events of a backend without a meter are sent as usual, and the
//! totals in `outbox.cursors` exist for it too. A deleted backend returns its meter; a new backend of the same name has
//! another number and begins at zero.

use crate::server::clock;
use crate::server::unguarded;
use pgrx::pg_sys;
use relay::time::latency::{BUCKETS, Latencies};
use std::mem::size_of;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

/// Together they take less than a megabyte.
const METERS: usize = 2_048;
/// Latencies are also counted for each span of this length, so that recent latencies can be reported.
const SPAN_MS: u64 = 60_000;
/// The number of pending events is compared with an earlier number that is at least and at most this old.
const LEAST_TREND_MS: u64 = 1_000;
const MOST_TREND_MS: u64 = 300_000;
/// Numbers that were noted within a shorter time are not kept.
const BETWEEN_LOOKS_MS: u64 = 10_000;

/// The counters of one backend. Only the worker changes them, except [`Meter::purged`].
#[repr(C)]
pub(crate) struct Meter {
    /// The database's OID and the backend's number. 0: the meter is free.
    whose: AtomicU64,
    /// Distinguishes the extension from one that was created earlier in the same database.
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
    /// The latest number of pending events, and an earlier one.
    looks: [PendingLook; 2],
}

/// How many events were pending at one time.
#[repr(C)]
struct PendingLook {
    /// 0: never noted.
    at_ms: AtomicU64,
    pending: AtomicU64,
}

/// The latencies of one span.
#[repr(C)]
struct Span {
    /// Which span this is, counted from the start of the clock.
    number: AtomicU64,
    counts: [AtomicU32; BUCKETS],
}

static METERS_BLOCK: AtomicPtr<Meter> = AtomicPtr::new(ptr::null_mut());

/// How much shared memory the meters need.
pub(super) fn size() -> usize {
    count() * size_of::<Meter>()
}

fn count() -> usize {
    match relay::fault::is_mutated(relay::fault::Mutation::FewDatabaseSlots) {
        true => 3,
        false => METERS,
    }
}

/// Finds or creates the meters. Called under the lock for creating shared memory.
///
/// # Safety
/// As [`super::shmem::attach`].
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
    // SAFETY: this many lie there for as long as the server runs; all their fields are atomics.
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

/// As [`find`], and assigns a meter if the backend has none. `so_far`: the known totals of accepted and of failed
/// events. Only the database's worker may call this.
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

/// Returns all meters of a database except those of the backends for which `kept` is true.
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

    /// Notes how many events are pending. Returns by how many the number has grown since an earlier one, and how many
    /// seconds ago that was.
    pub(crate) fn note_pending(&self, pending: u64) -> Option<(i64, f64)> {
        let now_ms = clock::since_boot_ms();
        let [latest, before] = &self.looks;
        let ago_ms = |look: &PendingLook| now_ms.saturating_sub(look.at_ms.load(Ordering::Relaxed));
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

    /// The latencies of the last one to two minutes, without their sum.
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

impl PendingLook {
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
