//! Ends a worker's process. There is always a logged reason.

use crate::server::database_slot::{DatabaseSlot, SlotState};
use crate::server::guc::LogLevel;
use crate::server::process::log_in_any_case;
use pgrx::pg_sys;

/// Ends the process. Logs the reason, unless the worker was never at work here. The exit code is 0, so that Postgres
/// logs nothing; the launcher decides whether a worker is started again.
pub(super) fn leave_process(slot: &DatabaseSlot, state: SlotState, database: &str, reason: &str) -> ! {
    if slot.state() != SlotState::Starting {
        log_in_any_case(
            LogLevel::Info,
            &format!("outbox_relay worker leaves database \"{database}\": {reason}"),
            None,
            None,
        );
    }
    slot.set_state(state);
    // SAFETY: runs Postgres's exit callbacks and ends the process, see `process::end_without_exit_handlers`; no Rust
    // frame needs to be unwound.
    unsafe { pg_sys::proc_exit(0) };
    // The bindings of some versions do not declare that it never returns.
    #[allow(unreachable_code)]
    std::process::abort()
}
