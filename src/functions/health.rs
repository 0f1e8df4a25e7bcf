//! What `outbox.health()` asks of the library beside the views.

use crate::functions::status::{self, HANGS_AFTER_MS};
use crate::functions::waiting::rest;
use crate::server::shmem;
use pgrx::pg_extern;

/// How often a sign of life is looked for.
const LOOK_MS: i64 = 2;

/// `outbox.worker_silence()`: for how many seconds this database's worker has given no sign of life, though it was asked
/// for one. NULL: it has given one, or there is no worker. A worker that is well answers within a millisecond or so.
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

/// `outbox.error_hint(error)`: what helps against an error of Redis, as a backend's `last_error` has it. NULL: that is
/// not known.
#[pg_extern(sql = false)]
fn error_hint(error: &str) -> Option<&'static str> {
    relay::failure::hint_of(error)
}
