//! How a session waits for the worker.

use crate::functions::permitting::permit_now;
use crate::server::report;
use crate::tables::rights;
use crate::tables::sql::query_value;
use pgrx::{pg_extern, pg_sys};
use std::time::{Duration, Instant};

/// Waits for this long, or until the session's latch is set. Raises an ERROR if the statement is cancelled.
pub(super) fn rest(ms: i64) {
    let events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
    // SAFETY: waits for the process's own latch, as pg_sleep() does.
    unsafe {
        pg_sys::WaitLatch(pg_sys::MyLatch, events as i32, ms, pg_sys::PG_WAIT_EXTENSION);
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    pgrx::check_for_interrupts!();
}

/// `outbox.rest(seconds)`
#[pg_extern(sql = false)]
fn rest_for(seconds: f64) {
    let wait = || {
        let limit = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX);
        let began = Instant::now();
        while let Some(left) = limit.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) {
            rest(left.as_micros().div_ceil(1_000).min(1_000) as i64);
        }
    };
    // SAFETY: this frame has nothing to be dropped, nor has pgrx's, which calls it.
    unsafe { report::guard(wait) }
}

/// `outbox.wait_for(seen, seconds)`: for what this snapshot sees.
#[pg_extern(sql = false)]
fn wait_for(seen: &str, seconds: f64) -> bool {
    let is_done = || query_value("select not outbox.waits_since($1::pg_snapshot)", &[seen.into()]) == Some(true);
    // SAFETY: this frame has nothing to be dropped, nor has pgrx's, which calls it.
    unsafe { report::guard(|| wait_until(is_done, seconds)) }
}

/// `outbox.wait_for_event(event_id, seconds)`: for an event that the current user may know of. In a function that runs
/// with its owner's rights, that is not whoever has called it.
#[pg_extern(sql = false)]
fn wait_for_event(event_id: pgrx::Uuid, seconds: f64) -> bool {
    let wait = || {
        // SAFETY: a plain read.
        let caller = unsafe { pg_sys::GetUserId() };
        permit_now();
        let look = || query_value("select outbox.is_sent($1, $2)", &[event_id.into(), caller.into()]) == Some(true);
        wait_until(|| rights::of_owner(look), seconds)
    };
    // SAFETY: this frame has nothing to be dropped, nor has pgrx's, which calls it.
    unsafe { report::guard(wait) }
}

/// Looks again and again whether something is done, for so long at most.
fn wait_until(is_done: impl Fn() -> bool, seconds: f64) -> bool {
    let limit = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX);
    let began = Instant::now();
    loop {
        let asked = Instant::now();
        // Each look has a snapshot of its own. The transaction's would be the same for ever in REPEATABLE READ.
        if is_done() {
            return true;
        }
        let (looked, waited) = (asked.elapsed(), began.elapsed());
        let Some(left) = limit.checked_sub(waited).filter(|left| !left.is_zero()) else {
            return false;
        };
        let pause = between_looks(looked, waited).min(left);
        rest(pause.as_micros().div_ceil(1_000) as i64);
    }
}

/// How long to rest between two looks: many may wait, and looking takes longer the more there is to be sent.
fn between_looks(looked: Duration, waited: Duration) -> Duration {
    let (shortest, longest) = (Duration::from_millis(20), Duration::from_millis(250));
    shortest.max(3 * looked).max(longest.min(waited / 10))
}
