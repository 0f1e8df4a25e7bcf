//! How a session waits for the worker.

use pgrx::pg_sys;

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
