//! Manners of a background process: signals, waiting, and transactions that can fail without ending the process.

use crate::guc::{self, LogLevel};
use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgSqlErrorCode, PgTryBuilder, pg_sys};
use std::ffi::{CStr, CString};
use std::panic::AssertUnwindSafe;
use std::time::Duration;

/// An ERROR that was caught at the edge of a transaction.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Aborted {
    pub message: String,
    pub code: PgSqlErrorCode,
}

unsafe extern "C-unwind" {
    // Postgres's own handlers. Declared here without pgrx's guard: a handler may run at any instruction, where the guard's
    // bookkeeping must not.
    fn die(signal: std::ffi::c_int);
    fn SignalHandlerForConfigReload(signal: std::ffi::c_int);
}

/// Installs the handlers of a background worker that works with a database, and lets signals come.
pub fn take_signals() {
    // SAFETY: the standard handlers, installed before signals are unblocked. `die` interrupts waits for locks too, which
    // a handler that only sets a flag does not.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        use pg_sys::pqsignal;
        #[cfg(feature = "pg18")]
        use pg_sys::pqsignal_be as pqsignal;
        pqsignal(libc::SIGTERM, Some(die));
        pqsignal(libc::SIGHUP, Some(SignalHandlerForConfigReload));
        pg_sys::BackgroundWorkerUnblockSignals();
    }
}

/// Whether the process was told to end.
pub fn is_told_to_end() -> bool {
    // SAFETY: a plain read of the process's own flag.
    unsafe { pg_sys::ProcDiePending != 0 }
}

/// Handles what came in: barriers, cancelled queries, memory-context logging; ends the process if it was told to.
pub fn handle_interrupts() {
    pg_sys::check_for_interrupts!();
}

/// Reads postgresql.conf again after a SIGHUP; true if it did.
pub fn reload_if_told() -> bool {
    // SAFETY: between transactions, as Postgres's own main loops do.
    unsafe {
        if pg_sys::ConfigReloadPending == 0 {
            return false;
        }
        pg_sys::ConfigReloadPending = 0;
        pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
    }
    true
}

/// Runs `f` with interrupts held: for the last words of a process that was told to end.
pub fn holding_interrupts<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: the counter is this process's own; it is put back, and by an ERROR reset.
    unsafe { pg_sys::InterruptHoldoffCount += 1 };
    let result = f();
    // SAFETY: as above.
    unsafe { pg_sys::InterruptHoldoffCount = pg_sys::InterruptHoldoffCount.saturating_sub(1) };
    result
}

/// Waits for the latch, a readable socket, or the time; the death of the postmaster ends the process.
pub fn wait(socket: Option<i32>, timeout: Option<Duration>) {
    let mut events = pg_sys::WL_LATCH_SET | pg_sys::WL_EXIT_ON_PM_DEATH;
    if socket.is_some() {
        events |= pg_sys::WL_SOCKET_READABLE;
    }
    let mut timeout_ms = -1;
    if let Some(timeout) = timeout {
        events |= pg_sys::WL_TIMEOUT;
        // Rounded up, or the last millisecond would be spent awake.
        timeout_ms = timeout.as_micros().div_ceil(1_000).min(i32::MAX as u128) as i64;
    }
    // SAFETY: the process's own latch; a socket that is open for the process's life.
    unsafe {
        pg_sys::WaitLatchOrSocket(
            pg_sys::MyLatch,
            events as i32,
            socket.unwrap_or(-1),
            timeout_ms,
            pg_sys::PG_WAIT_EXTENSION,
        );
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
}

/// Lets a session wait a moment without taking its latch from it.
pub fn wait_briefly(time: Duration) {
    // SAFETY: sleeps; a signal ends it sooner.
    unsafe { pg_sys::pg_usleep(time.as_micros() as i64) };
}

/// Runs `f` in a transaction of its own, with a snapshot for SPI. An ERROR or panic in it aborts the transaction and comes back
/// as a value: the process goes on.
pub fn transaction<R>(f: impl FnOnce() -> R) -> Result<R, Aborted> {
    let outcome = PgTryBuilder::new(AssertUnwindSafe(|| {
        // SAFETY: between transactions; what is started here is committed here or aborted below.
        unsafe {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
            pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        }
        let result = f();
        // SAFETY: the snapshot pushed above is the active one again.
        unsafe {
            pg_sys::PopActiveSnapshot();
            pg_sys::CommitTransactionCommand();
        }
        Ok(result)
    }))
    .catch_others(|error| Err(aborted(&error)))
    .execute();
    if outcome.is_err() {
        // SAFETY: leaves the failed transaction whatever state it is in.
        unsafe { pg_sys::AbortCurrentTransaction() };
    }
    outcome
}

fn aborted(error: &CaughtError) -> Aborted {
    match error {
        CaughtError::PostgresError(report)
        | CaughtError::ErrorReport(report)
        | CaughtError::RustPanic { ereport: report, .. } => Aborted {
            message: report.message().to_owned(),
            code: report.sql_error_code(),
        },
    }
}

/// Hands the counts of what was read and written to the statistics, as sessions do when they get idle: autovacuum of our
/// tables goes by them. At most once a second; between transactions.
pub fn report_statistics() {
    // SAFETY: outside of a transaction; sends what has gathered, if anything, without waiting for locks.
    unsafe { pg_sys::pgstat_report_stat(false) };
}

/// What pg_stat_activity shows: busy with something, or idle.
pub fn show_activity(what: Option<&str>) {
    let state = match what {
        Some(_) => pg_sys::BackendState::STATE_RUNNING,
        None => pg_sys::BackendState::STATE_IDLE,
    };
    let text = what.and_then(|w| CString::new(w).ok());
    // SAFETY: a zero-terminated text, which is copied.
    unsafe { pg_sys::pgstat_report_activity(state, text.as_ref().map_or(std::ptr::null(), |t| t.as_ptr())) };
}

/// Sets a session setting, whatever the database or role says.
pub fn set_option(name: &CStr, value: &CStr) {
    // SAFETY: constant names and values of existing settings.
    unsafe {
        pg_sys::SetConfigOption(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_OVERRIDE,
        );
    }
}

/// Logs a message, if `outbox_relay.log_level` lets it.
pub fn log(level: LogLevel, message: &str, detail: Option<&str>, hint: Option<&str>) {
    if level < guc::LOG_LEVEL.get() {
        return;
    }
    let (pg_level, code) = match level {
        LogLevel::Debug | LogLevel::Info => (pgrx::PgLogLevel::LOG, PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION),
        LogLevel::Warning | LogLevel::Error => (pgrx::PgLogLevel::WARNING, PgSqlErrorCode::ERRCODE_WARNING),
    };
    let mut report = pgrx::pg_sys::panic::ErrorReport::new(code, message.to_owned(), "");
    if let Some(detail) = detail {
        report = report.set_detail(detail);
    }
    if let Some(hint) = hint {
        report = report.set_hint(hint);
    }
    report.report(pg_level);
}
