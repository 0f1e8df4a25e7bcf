//! Functions with which an administrator acts on events.

use crate::server::error::internal;
use crate::server::guc;
use crate::server::meters;
use crate::server::report;
use crate::server::trigger_call::{When, expect_trigger};
use crate::server::txn;
use crate::tables::purge_piece::{purge_sent, sent_retention_us};
use crate::tables::{catalog, replays, rights};
use pgrx::datum::{Interval, TimestampWithTimeZone};
use pgrx::iter::TableIterator;
use pgrx::{name, pg_extern, pg_sys};
use std::sync::atomic::Ordering;

/// `outbox.replay_events(backend_number, since, until, event_type)`
#[pg_extern(sql = false)]
fn replay_events(
    backend_number: i32,
    since: TimestampWithTimeZone,
    until: TimestampWithTimeZone,
    event_type: Option<String>,
) -> i64 {
    let replay = move || replays::replay(backend_number, since, until, event_type.as_deref());
    // SAFETY: this frame, which has given its text away, has nothing to be dropped, nor has pgrx's, which calls it.
    unsafe { report::guard(move || rights::of_owner(replay)) }
}

crate::sql_function!(rescheduled, pg_finfo_rescheduled);

/// `outbox.rescheduled()`, after a statement that has updated `scheduled_events`
fn rescheduled(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let table = catalog::expect_relations().scheduled;
    // SAFETY: called by Postgres. An AFTER trigger's result is ignored.
    unsafe {
        expect_trigger(fcinfo, "rescheduled", When::AfterStatement, &[table]);
        (*fcinfo).isnull = false;
    }
    txn::scheduled();
    pg_sys::Datum::from(0)
}

/// `outbox.purge_piece(backend_number, after_seq, row_count)`
#[pg_extern(sql = false)]
fn purge_piece(
    backend_number: i32,
    after_seq: i64,
    row_count: i32,
) -> TableIterator<'static, (name!(deleted, i64), name!(last_seq, Option<i64>))> {
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
    TableIterator::once((deleted as i64, last))
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
