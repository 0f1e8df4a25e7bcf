//! The counters behind `outbox.metrics` and `outbox.top`.

use crate::server::meters::{self, Meter};
use crate::server::shmem;
use pgrx::iter::TableIterator;
use pgrx::{name, pg_extern, pg_sys};
use relay::time::latency::BOUNDS_US;
use std::sync::atomic::{AtomicU64, Ordering};

/// `outbox.launcher_pid()`
#[pg_extern(sql = false)]
fn launcher_pid() -> Option<i32> {
    shmem::launcher_pid()
}

/// `outbox.meters()`: a row for each backend of this database that has a meter.
#[allow(clippy::type_complexity)] // The columns of a table.
#[pg_extern(sql = false)]
fn meters() -> TableIterator<
    'static,
    (
        name!(backend_number, i32),
        name!(published, i64),
        name!(failed, i64),
        name!(refused, i64),
        name!(retried, i64),
        name!(healed, i64),
        name!(bytes, i64),
        name!(batches, i64),
        name!(reconnects, i64),
        name!(purged, i64),
        name!(latency_bounds, Vec<String>),
        name!(latency_counts, Vec<i64>),
        name!(latency_sum, f64),
        name!(recent_p50, Option<f64>),
        name!(recent_p99, Option<f64>),
    ),
> {
    // SAFETY: a plain read of the process's own variable.
    let database = unsafe { pg_sys::MyDatabaseId };
    let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as i64;
    let row = |(meter, number): (&Meter, i32)| {
        let (all, recent) = (meter.latencies(), meter.recent_latencies());
        (
            number,
            value(&meter.accepted),
            value(&meter.failed),
            value(&meter.refused),
            value(&meter.retried),
            value(&meter.healed),
            value(&meter.bytes),
            value(&meter.batches),
            value(&meter.reconnects),
            value(&meter.purged),
            bounds(),
            cumulative(&all.counts),
            all.sum_us as f64 / 1e6,
            recent.quantile(0.5),
            recent.quantile(0.99),
        )
    };
    TableIterator::new(meters::of(database).map(row).collect::<Vec<_>>())
}

/// `outbox.lag_trend(backend_number, pending)`
#[pg_extern(sql = false)]
fn lag_trend(
    backend_number: i32,
    pending: i64,
) -> TableIterator<'static, (name!(growth, Option<i64>), name!(seconds, Option<f64>))> {
    // SAFETY: a plain read of the process's own variable.
    let meter = meters::find(unsafe { pg_sys::MyDatabaseId }, backend_number);
    TableIterator::once(meter.and_then(|m| m.note_pending(pending.max(0) as u64)).unzip())
}

/// The upper bounds of the buckets, in seconds: Prometheus names a bucket by its bound.
fn bounds() -> Vec<String> {
    let of_buckets = BOUNDS_US.iter().map(|us| (*us as f64 / 1e6).to_string());
    of_buckets.chain(["+Inf".to_owned()]).collect()
}

/// Cumulative counts, as Prometheus wants them: how many values are at or below each bound.
fn cumulative(counts: &[u64]) -> Vec<i64> {
    let mut sum = 0;
    let add = |count: &u64| {
        sum += *count as i64;
        sum
    };
    counts.iter().map(add).collect()
}
