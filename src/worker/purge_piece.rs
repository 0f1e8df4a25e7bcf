//! Deletes a piece of a backend's sent events: those between the tick up to which was purged and the newest tick that
//! is older than the retention. The worker and `outbox.purge()` use it.

use crate::server::error::internal;
use crate::server::guc;
use crate::server::meters;
use crate::server::process;
use crate::server::report;
use crate::tables::catalog;
use crate::tables::events::EventsTable;
use crate::tables::{backends, refused, retention};
use pgrx::datum::Interval;
use pgrx::{pg_extern, pg_sys};
use relay::reading::range::RangeScan;
use relay::reading::snapshot::Tick;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// How many rows one statement deletes; it takes about a tenth of a millisecond. Between two statements the worker
/// checks whether an event has come.
const STEP_ROWS: usize = 32;
/// How many numbers one scan reads. Index entries of deleted rows count too, because a scan passes them without
/// interruption.
const WINDOW_SEQS: i64 = 2_000;

/// How long sent events are kept, in microseconds; `None`: for ever.
pub(super) fn sent_retention_us() -> Option<i64> {
    guc::retention_us(&guc::PUBLISHED_RETENTION_MIN).filter(|_| guc::CLEANUP_PUBLISHED.get())
}

/// Deletes up to `count` rows of a backend after `after`; fewer if `is_over`, which is asked after each statement.
/// Returns how many were deleted, and after which row to go on; `None`: all are done.
pub(super) fn purge_sent(
    number: i32,
    after: i64,
    retention_us: i64,
    count: usize,
    is_over: impl Fn() -> bool,
) -> (u64, Option<i64>) {
    let Some((from, to)) = retention::purgeable(number, retention_us) else {
        return (0, None);
    };
    // Number 0 stands for the events of backends that do not exist.
    let known = if number == 0 {
        backends::known_numbers()
    } else {
        Vec::new()
    };
    let is_its = |row_number: i32| row_number == number || (number == 0 && !known.contains(&row_number));
    let relations = catalog::expect_relations();
    let mut table = EventsTable::open(&relations);
    let (mut found, mut deleted, mut last) = (Vec::new(), Vec::new(), Some(after));
    retention::delete_events(|delete| {
        'windows: while let Some(after) = last {
            let upto = after.max(from.low_seq).saturating_add(WINDOW_SEQS);
            let window = Arc::new(Tick {
                high_seq: upto.min(to.high_seq),
                ..Tick::clone(&to)
            });
            pgrx::check_for_interrupts!();
            let mut scan = RangeScan::open(&mut table, &from, &window, after);
            while let Some(step) = scan.step() {
                last = Some(step.seq());
                if let Some(key) = step.row()
                    && is_its(scan.current().row().backend_number())
                {
                    found.push(key.seq);
                }
                if found.len() >= STEP_ROWS.min(count - deleted.len()) {
                    delete(&found);
                    deleted.append(&mut found);
                    if deleted.len() >= count || is_over() {
                        break 'windows;
                    }
                }
            }
            last = (upto < to.high_seq).then_some(upto);
            if is_over() {
                break;
            }
        }
        if !found.is_empty() {
            delete(&found);
            deleted.append(&mut found);
        }
    });
    table.close();
    if !deleted.is_empty() {
        // Refused events that were accepted later.
        refused::forget(&deleted);
    }
    if last.is_none() {
        retention::purged(number, &to);
    }
    if !deleted.is_empty() {
        process::debug(|| format!("purged {} sent events", deleted.len()));
    }
    (deleted.len() as u64, last)
}

/// `outbox.purge_piece(backend_number, after_seq, row_count)`
#[pg_extern(sql = false)]
fn purge_piece(
    backend_number: i32,
    after_seq: i64,
    row_count: i32,
) -> pgrx::iter::TableIterator<'static, (pgrx::name!(deleted, i64), pgrx::name!(last_seq, Option<i64>))> {
    let delete = || match sent_retention_us() {
        Some(retention_us) => {
            let count = row_count.max(1) as usize;
            purge_sent(backend_number, after_seq, retention_us, count, || false)
        }
        None => (0, None),
    };
    // SAFETY: this frame has nothing to be dropped, nor has pgrx's, which calls it.
    let (deleted, last) = unsafe { report::guard(delete) };
    // SAFETY: a plain read of the process's own variable.
    if let Some(meter) = meters::find(unsafe { pg_sys::MyDatabaseId }, backend_number) {
        meter.purged.fetch_add(deleted, Ordering::Relaxed);
    }
    pgrx::iter::TableIterator::once((deleted as i64, last))
}

/// `outbox.retention(setting)`, for a caller without a worker. Calling it loads the library, and so defines the
/// settings.
#[pg_extern(sql = false)]
fn retention_of(setting: &str) -> Option<Interval> {
    let read = || {
        let setting = match setting {
            "published_retention" => &guc::PUBLISHED_RETENTION_MIN,
            "failed_retention" => &guc::FAILED_RETENTION_MIN,
            "inbox_retention" => &guc::INBOX_RETENTION_MIN,
            _ => internal(format!("there is no setting outbox_relay.{setting}")),
        };
        guc::retention_us(setting).and_then(|us| Interval::new(0, 0, us).ok())
    };
    // SAFETY: this frame has nothing to be dropped, nor has pgrx's, which calls it.
    unsafe { report::guard(read) }
}
