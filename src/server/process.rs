//! Functions for a background process: signals, waiting, and transactions that can fail without ending the process.

use crate::server::guc::{self, LogLevel};
use crate::server::unguarded::NamedLock;
use crate::server::{report, reserve};
use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgSqlErrorCode, PgTryBuilder, pg_sys};
use relay::failure::MORE_MEMORY;
use relay::failure::server_text::cleaned;
use relay::fault::{self, Mutation};
use relay::time::log_pace::{A_SECOND, BURST, LogPace};
use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString};
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

/// A problem that persists is logged again after this long.
pub(crate) fn repeat_log_after() -> Duration {
    match fault::is_mutated(Mutation::ShortMinutes) {
        true => Duration::from_secs(1),
        false => Duration::from_secs(60),
    }
}

#[cfg(not(feature = "pg18"))]
use pg_sys::pqsignal;
#[cfg(feature = "pg18")]
use pg_sys::pqsignal_be as pqsignal;

/// An ERROR that was caught at the edge of a transaction.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Aborted {
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
    pub code: PgSqlErrorCode,
}

// SAFETY: the declarations of miscadmin.h, interrupt.h and tcopprot.h.
unsafe extern "C-unwind" {
    // Postgres's own handlers. Declared here without pgrx's guard: a handler may run at any instruction, where the
    // guard's bookkeeping must not.
    fn die(signal: std::ffi::c_int);
    fn SignalHandlerForConfigReload(signal: std::ffi::c_int);
    fn SignalHandlerForShutdownRequest(signal: std::ffi::c_int);
    fn StatementCancelHandler(signal: std::ffi::c_int);
}

impl Aborted {
    /// An abort that happened before anything was tried.
    pub(crate) fn because(message: &str) -> Self {
        Self {
            message: message.to_owned(),
            detail: None,
            hint: None,
            code: PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE,
        }
    }

    /// The process lacks memory for what was to be done.
    pub(crate) fn out_of_memory() -> Self {
        Self {
            message: "out of memory".to_owned(),
            detail: Some("The process cannot get more memory.".to_owned()),
            hint: Some(format!("Events wait. {}", MORE_MEMORY)),
            code: PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY,
        }
    }

    pub(crate) fn lacks_memory(&self) -> bool {
        self.code == PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY
    }
}

/// Installs the signal handlers of a background worker with a database connection, and unblocks signals.
pub(crate) fn take_signals() {
    // SAFETY: the standard handlers, installed before signals are unblocked. `die` interrupts waits for locks too,
    // which a handler that only sets a flag does not.
    unsafe {
        pqsignal(libc::SIGTERM, Some(die));
        pqsignal(libc::SIGHUP, Some(SignalHandlerForConfigReload));
        pg_sys::BackgroundWorkerUnblockSignals();
    }
}

/// From now on SIGTERM does not end the process at once. It cancels the current transaction, whatever that waits for,
/// and [`is_told_to_end`] returns true.
pub(crate) fn end_with_last_words() {
    // No pg_guard: it consists of Postgres's own handlers, which have none.
    // SAFETY: only installed as a signal handler.
    unsafe extern "C-unwind" fn end_soon(signal: std::ffi::c_int) {
        // SAFETY: a plain read of a flag; the handlers only set flags and the latch.
        unsafe {
            // The postmaster signals a child twice, directly and as a process group. The second signal must not cancel
            // the final save.
            if pg_sys::ShutdownRequestPending == 0 {
                SignalHandlerForShutdownRequest(signal);
                StatementCancelHandler(signal);
            }
        }
    }
    // SAFETY: a handler that may run at any time.
    unsafe { pqsignal(libc::SIGTERM, Some(end_soon)) };
}

/// Makes the statements that need a database to themselves (DROP, RENAME and SET TABLESPACE of a database, CREATE
/// DATABASE ... TEMPLATE) tell this process to end when it is in their way.
///
/// When all their checks are done, these statements count the other processes in the database, for up to five seconds.
/// Meanwhile they send SIGTERM to autovacuum's workers there, which they recognise by a flag in shared memory, and to
/// nobody else (`CountOtherDBBackends`). Our worker has the same duty to leave, so it sets the same flag. New
/// connections to the database wait until the statement has ended; so does the worker that the launcher then starts,
/// whether or not the statement has succeeded.
///
/// The flag has two more effects (Postgres 15 to 18). A session that waits for one of our locks longer than its
/// deadlock_timeout cancels our transaction. And CREATE INDEX CONCURRENTLY does not wait for our snapshots. That is
/// harmless: our snapshots need only rows that nobody else deletes.
pub(crate) fn give_way_to_database_statements() {
    // SAFETY: the process's own entry, changed under the lock that guards it, as vacuum does. The end of a transaction
    // does not reset this flag.
    unsafe {
        let lock = NamedLock::ProcArray.get();
        pg_sys::LWLockAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE);
        let process = pg_sys::MyProc;
        (*process).statusFlags |= pg_sys::PROC_IS_AUTOVACUUM as u8;
        *(*pg_sys::ProcGlobal).statusFlags.add((*process).pgxactoff as usize) = (*process).statusFlags;
        pg_sys::LWLockRelease(lock);
    }
}

/// Ends this process right after Postgres's own exit callbacks, whatever the reason for its end. `exit()` would go on
/// to run the exit handlers and destructors of all libraries in the process (resolver, allocator, other extensions)
/// while sender threads still use them, and a crash there would restart the whole server. The process does not wait for
/// its senders: one may be stuck in a system call, and the next worker has to find out anyway what became of their
/// batches. This must be called first, because the callback that is registered first runs last.
pub(crate) fn end_without_exit_handlers() {
    // No pg_guard: it calls nothing of Postgres.
    // SAFETY: only Postgres calls this, when everything else is done.
    unsafe extern "C-unwind" fn end(code: i32, _argument: pg_sys::Datum) {
        // SAFETY: ends the process with its threads.
        unsafe { libc::_exit(code) };
    }
    // SAFETY: registers a function of this library for the life of the process.
    unsafe { pg_sys::on_proc_exit(Some(end), pg_sys::Datum::from(0)) };
}

/// Whether the process was told to end.
pub(crate) fn is_told_to_end() -> bool {
    // SAFETY: plain reads of the process's own flags.
    unsafe { pg_sys::ProcDiePending != 0 || pg_sys::ShutdownRequestPending != 0 }
}

/// Handles pending interrupts: barriers, memory-context logging, and the end of the process. Between transactions there
/// is nothing to cancel.
pub(crate) fn handle_interrupts() {
    reserve::end_if_a_thread_gets_none();
    PgTryBuilder::new(|| {
        pg_sys::check_for_interrupts!();
    })
    .catch_others(|_| ())
    .execute();
}

/// Reads postgresql.conf again after a SIGHUP. Returns whether it did.
pub(crate) fn reload_if_told() -> bool {
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

/// Clears the order to end, so that the process can save its state first. A timeout can still interrupt the saving;
/// otherwise a lock could delay the server's shutdown.
pub(crate) fn accept_end() {
    // SAFETY: the process's own flags, which its signal handlers set.
    unsafe { (pg_sys::ProcDiePending, pg_sys::QueryCancelPending) = (0, 0) };
}

thread_local! {
    /// The wait set, created once: later there may be no file descriptor left for another one.
    static WAITED_FOR: Cell<*mut pg_sys::WaitEventSet> = const { Cell::new(std::ptr::null_mut()) };
    /// The wait event that pg_stat_activity shows while the process waits.
    static WAIT_EVENT: Cell<u32> = const { Cell::new(pg_sys::PG_WAIT_EXTENSION) };
}

/// A wait event of this name. Before Postgres 17, or if other extensions have used up all, it is `Extension`.
#[cfg(any(feature = "pg15", feature = "pg16"))]
fn wait_event(_name: &'static CStr) -> u32 {
    pg_sys::PG_WAIT_EXTENSION
}

#[cfg(not(any(feature = "pg15", feature = "pg16")))]
fn wait_event(name: &'static CStr) -> u32 {
    PgTryBuilder::new(|| {
        // SAFETY: in a process with shared memory; Postgres copies the name.
        unsafe { pg_sys::WaitEventExtensionNew(name.as_ptr()) }
    })
    .catch_others(|_| {
        // SAFETY: there is no transaction whose abort would release it, and the only lock held is the one on the names.
        unsafe { pg_sys::LWLockReleaseAll() };
        pg_sys::PG_WAIT_EXTENSION
    })
    .execute()
}

/// Prepares to wait for the latch and for a socket that stays open as long as the process, with the wait event `name`.
/// Called once.
pub(crate) fn prepare_to_wait(name: &'static CStr, socket: Option<i32>) {
    WAIT_EVENT.set(wait_event(name));
    let no_socket = pg_sys::PGINVALID_SOCKET;
    // SAFETY: once, in a process with a latch; the set lives as long as the process.
    unsafe {
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        let set = pg_sys::CreateWaitEventSet(pg_sys::TopMemoryContext, 3);
        #[cfg(not(any(feature = "pg15", feature = "pg16")))]
        let set = pg_sys::CreateWaitEventSet(std::ptr::null_mut(), 3);
        let add = |event: u32, socket: i32, latch: *mut pg_sys::Latch| {
            pg_sys::AddWaitEventToSet(set, event, socket, latch, std::ptr::null_mut());
        };
        add(pg_sys::WL_LATCH_SET, no_socket, pg_sys::MyLatch);
        add(pg_sys::WL_EXIT_ON_PM_DEATH, no_socket, std::ptr::null_mut());
        if let Some(socket) = socket {
            add(pg_sys::WL_SOCKET_READABLE, socket, std::ptr::null_mut());
        }
        WAITED_FOR.set(set);
    }
}

/// Waits for the latch, the socket or the timeout. The death of the postmaster ends the process.
pub(crate) fn wait(timeout: Option<Duration>) {
    // Rounded up, because a timeout of 0 would make the loop spin during the last millisecond.
    let timeout_ms = timeout.map_or(-1, |t| t.as_micros().div_ceil(1_000).min(i32::MAX as u128) as i64);
    // SAFETY: the process's own set and latch.
    unsafe {
        let mut event: pg_sys::WaitEvent = std::mem::zeroed();
        pg_sys::WaitEventSetWait(WAITED_FOR.get(), timeout_ms, &mut event, 1, WAIT_EVENT.get());
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
}

/// Sleeps for a moment without resetting the process's latch.
pub(crate) fn wait_briefly(time: Duration) {
    // SAFETY: sleeps; a signal ends it sooner.
    unsafe { pg_sys::pg_usleep(time.as_micros() as i64) };
}

/// Runs `f` in a transaction of its own, with a snapshot for SPI. An ERROR or panic in it aborts the transaction and is
/// returned as a value: the process goes on.
pub(crate) fn transaction<R>(f: impl FnOnce() -> R) -> Result<R, Aborted> {
    let whole = || {
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
    };
    if !reserve::take() {
        return Err(Aborted::out_of_memory());
    }
    let outcome = PgTryBuilder::new(AssertUnwindSafe(|| reserve::watching(whole)))
        .catch_others(|error| Err(aborted(&error)))
        .execute();
    if outcome.is_err() {
        // SAFETY: ends the failed transaction whatever state it is in.
        unsafe { pg_sys::AbortCurrentTransaction() };
    }
    outcome
}

/// Runs `f` in a subtransaction of the current transaction. An ERROR or panic in it aborts only the subtransaction, and
/// is returned as a value.
pub(crate) fn attempt<R>(f: impl FnOnce() -> R) -> Result<R, Aborted> {
    // SAFETY: within a transaction; memory context and resource owner are restored, whatever happened in `f`.
    unsafe {
        let (owner, context) = (pg_sys::CurrentResourceOwner, pg_sys::CurrentMemoryContext);
        pg_sys::BeginInternalSubTransaction(std::ptr::null());
        pg_sys::CurrentMemoryContext = context;
        let outcome = PgTryBuilder::new(AssertUnwindSafe(|| {
            let result = f();
            pg_sys::ReleaseCurrentSubTransaction();
            Ok(result)
        }))
        .catch_others(|error| Err(aborted(&error)))
        .execute();
        if outcome.is_err() {
            pg_sys::RollbackAndReleaseCurrentSubTransaction();
        }
        (pg_sys::CurrentResourceOwner, pg_sys::CurrentMemoryContext) = (owner, context);
        outcome
    }
}

fn aborted(error: &CaughtError) -> Aborted {
    match error {
        CaughtError::PostgresError(report)
        | CaughtError::ErrorReport(report)
        | CaughtError::RustPanic { ereport: report, .. } => Aborted {
            message: report.message().to_owned(),
            detail: report.detail().map(str::to_owned),
            hint: report.hint().map(str::to_owned),
            code: report.sql_error_code(),
        },
    }
}

/// Reports the counts of read and written rows to the statistics, as sessions do when they become idle: autovacuum of
/// our tables relies on them. At most once a second; between transactions.
pub(crate) fn report_statistics() {
    // SAFETY: outside of a transaction; sends the counts, if any, without waiting for locks.
    unsafe { pg_sys::pgstat_report_stat(false) };
}

thread_local! {
    /// Whether pg_stat_activity shows an activity.
    static IS_SHOWN_BUSY: Cell<bool> = const { Cell::new(false) };
}

/// Sets what pg_stat_activity shows until [`show_idle`].
pub(crate) fn show_activity(what: &str) {
    if let Ok(text) = CString::new(what) {
        IS_SHOWN_BUSY.set(true);
        // SAFETY: a zero-terminated text, which is copied.
        unsafe { pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, text.as_ptr()) };
    }
}

/// Shows in pg_stat_activity that the process is idle.
pub(crate) fn show_idle() {
    if IS_SHOWN_BUSY.replace(false) {
        // SAFETY: an empty text is allowed.
        unsafe { pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_IDLE, c"".as_ptr()) };
    }
}

/// Sets a setting of this session that overrides those of the database and the role.
pub(crate) fn set_option(name: &CStr, value: &CStr) {
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

/// Changes a setting: with GUC_ACTION_SAVE until the innermost nest level of settings ends, with GUC_ACTION_LOCAL until
/// the transaction ends. Raises a Postgres ERROR if it cannot be changed.
///
/// # Safety
/// Within a transaction, with the name and a value of an existing setting.
pub(crate) unsafe fn set_for_now(
    name: &CStr,
    value: &CStr,
    context: pg_sys::GucContext::Type,
    action: pg_sys::GucAction::Type,
) {
    let source = pg_sys::GucSource::PGC_S_SESSION;
    // SAFETY: the caller's promise.
    unsafe { pg_sys::set_config_option(name.as_ptr(), value.as_ptr(), context, source, action, true, 0, false) };
}

/// How long a setting lasts that one of our functions changes for the function that called it: until that one ends, if
/// it has a SET clause; otherwise until the transaction or savepoint ends.
pub(crate) fn until_the_caller_ends() -> pg_sys::GucAction::Type {
    // SAFETY: within a transaction. A level that nothing was set in ends with nothing to restore.
    let is_at_the_transactions_level = unsafe {
        let next = pg_sys::NewGUCNestLevel();
        pg_sys::AtEOXact_GUC(true, next);
        next == pg_sys::GetCurrentTransactionNestLevel() + 1
    };
    // Postgres asserts that nothing is saved where it was SET before, as it may be where no function was called.
    match is_at_the_transactions_level {
        true => pg_sys::GucAction::GUC_ACTION_LOCAL,
        false => pg_sys::GucAction::GUC_ACTION_SAVE,
    }
}

/// Whether the whole server is being shut down, and not only this process. The postmaster writes this into its lock
/// file before it signals anybody.
pub(crate) fn is_server_stopping() -> bool {
    /// Counted from 0 (LOCK_FILE_LINE_PM_STATUS).
    const STATUS_LINE: usize = 7;
    let said = std::fs::read_to_string("postmaster.pid").unwrap_or_default();
    said.lines()
        .nth(STATUS_LINE)
        .is_some_and(|status| status.trim() == "stopping")
}

thread_local! {
    static LOG_PACE: RefCell<LogPace> = RefCell::default();
    /// When this process logged for the first time.
    static LOGS_SINCE: Instant = Instant::now();
}

/// Logs a message if `outbox_relay.log_level` includes it, and if this process has not logged very much just now.
pub(crate) fn log(level: LogLevel, message: &str, detail: Option<&str>, hint: Option<&str>) {
    if level < guc::LOG_LEVEL.get() {
        return;
    }
    // Who asks for each step gets each step.
    if guc::LOG_LEVEL.get() != LogLevel::Debug {
        let now = LOGS_SINCE.with(Instant::elapsed);
        let Some(left_out) = LOG_PACE.with_borrow_mut(|pace| pace.line(now)) else {
            return;
        };
        if left_out > 0 {
            say_left_out(left_out);
        }
    }
    log_in_any_case(level, message, detail, hint);
}

fn say_left_out(lines: u64) {
    log_in_any_case(
        LogLevel::Warning,
        &format!("outbox_relay left out {lines} log lines"),
        Some(&format!(
            "A process logs at most {BURST} lines at once, and then {A_SECOND} a second."
        )),
        Some("What is still wrong is logged again each minute. See outbox.health() and outbox.backend_status."),
    );
}

/// As [`log`], however much was logged before.
pub(crate) fn log_in_any_case(level: LogLevel, message: &str, detail: Option<&str>, hint: Option<&str>) {
    if level < guc::LOG_LEVEL.get() {
        return;
    }
    let (pg_level, code) = match level {
        LogLevel::Debug | LogLevel::Info => (pg_sys::LOG, PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION),
        LogLevel::Warning | LogLevel::Error => (pg_sys::WARNING, PgSqlErrorCode::ERRCODE_WARNING),
    };
    // It may contain names and hosts of backends, which a role chooses.
    let [detail, hint] = [detail, hint].map(|text| text.map(cleaned));
    report::say(
        pg_level as i32,
        code,
        &cleaned(message),
        detail.as_deref(),
        hint.as_deref(),
    );
}

/// Logs a step at `outbox_relay.log_level = debug`. At any other level the message is not even formatted.
pub(crate) fn debug(message: impl FnOnce() -> String) {
    if guc::LOG_LEVEL.get() == LogLevel::Debug {
        log(LogLevel::Debug, &message(), None, None);
    }
}
