//! Functions with which an administrator acts on events.

use crate::server::report;
use crate::server::trigger_call::{When, expect_trigger};
use crate::server::txn;
use crate::tables::{catalog, replays, rights};
use pgrx::datum::TimestampWithTimeZone;
use pgrx::{pg_extern, pg_sys};

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
