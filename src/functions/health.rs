//! What `outbox.health()` asks of the library, in addition to the views.

use crate::functions::status::{self, HANGS_AFTER_MS};
use crate::functions::waiting::rest;
use crate::server::encoding::words_to_server;
use crate::server::error::expect_arguments;
use crate::server::shmem;
use crate::tables::sql::text_array;
use pgrx::{pg_extern, pg_sys};
use std::borrow::Cow;

/// How often to look whether the worker has given a sign of life.
const LOOK_MS: i64 = 2;

/// `outbox.worker_silence()`: for how many seconds this database's worker has given no sign of life since it was asked
/// for one. NULL: it has given one, or there is no worker. A healthy worker answers within a millisecond or so.
#[pg_extern(sql = false)]
fn worker_silence() -> Option<f64> {
    let slot = shmem::database_slot_here()?;
    let has_worker = || matches!(status::worker_here(), (_, "running" | "hanging"));
    if !has_worker() {
        return None;
    }
    slot.call();
    loop {
        match slot.unanswered_ms() {
            0 => return None,
            _ if !has_worker() => return None,
            silent_ms if silent_ms >= HANGS_AFTER_MS => return Some(silent_ms as f64 / 1e3),
            _ => rest(LOOK_MS),
        }
    }
}

crate::sql_function!(worker_trouble, pg_finfo_worker_trouble);

/// `outbox.worker_trouble()`
fn worker_trouble(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    expect_arguments(fcinfo, 0);
    let trouble = shmem::database_slot_here().and_then(|slot| slot.trouble());
    // SAFETY: called by Postgres.
    unsafe { (*fcinfo).isnull = trouble.is_none() };
    let Some(trouble) = trouble else {
        return pg_sys::Datum::from(0);
    };
    let lines = trouble.split('\n');
    text_array(lines.map(|line| Cow::Owned(words_to_server(line).into_owned())))
}

/// `outbox.error_hint(error)`: what helps against an error with which Redis has refused an event. NULL: that is not
/// known.
#[pg_extern(sql = false)]
fn error_hint(error: &str) -> Option<&'static str> {
    relay::failure::hint_of(error)
}
