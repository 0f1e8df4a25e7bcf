//! A row that cannot be read, converted or encoded fails alone.
//!
//! Rows are normally read without a subtransaction for each. If an ERROR may be the fault of one row (text that has no
//! UTF-8 form, a damaged value), the transaction is repeated *with care*: each row is first tried in a subtransaction,
//! and a row that cannot be read is written down as failed, with the reason. So a bad row costs one more transaction
//! and delays no other row.

use crate::server::error::raise;
use crate::server::guc::LogLevel;
use crate::server::process::{self, Aborted, log};
use crate::server::scoped;
use crate::tables::row::Row;
use pgrx::PgSqlErrorCode;
use pgrx::pg_sys::panic::ErrorReport;
use std::cell::Cell;
use std::time::{Duration, Instant};

thread_local! {
    static CAREFUL: Cell<bool> = const { Cell::new(false) };
    static SAID_AT: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Log lines about unreadable rows are at least this far apart.
const SAY_AFTER: Duration = Duration::from_secs(60);

/// As [`process::transaction`]; repeated with care if a row may have been the cause.
pub(crate) fn transaction<R>(mut f: impl FnMut() -> R) -> Result<R, Aborted> {
    match process::transaction(&mut f) {
        Err(error) if is_of_a_row(error.code) => process::transaction(|| carefully(&mut f)),
        outcome => outcome,
    }
}

/// Runs `f` with care.
pub(crate) fn carefully<R>(f: impl FnOnce() -> R) -> R {
    scoped::with(&CAREFUL, true, f)
}

/// Whether each row is to be tried in a subtransaction.
pub(crate) fn is_careful() -> bool {
    CAREFUL.get()
}

/// Why a row cannot be read. `None` if it can, or without care.
pub(crate) fn unreadable(row: &Row) -> Option<String> {
    if !is_careful() {
        return None;
    }
    tried(|| row.with_event(|_| ())).err()
}

/// Runs `f`, which reads a row, in a subtransaction. Returns the message of an ERROR that may be the row's fault. Any
/// other ERROR is raised.
pub(crate) fn tried<R>(f: impl FnOnce() -> R) -> Result<R, String> {
    process::attempt(f).map_err(|error| words_of(error, is_of_a_row))
}

/// As [`tried`], for `f` that inserts a row.
pub(crate) fn tried_new<R>(f: impl FnOnce() -> R) -> Result<R, String> {
    process::attempt(f).map_err(|error| words_of(error, is_of_a_new_row))
}

fn words_of(error: Aborted, is_its: fn(PgSqlErrorCode) -> bool) -> String {
    if !is_its(error.code) {
        raise(ErrorReport::new(error.code, error.message, ""));
    }
    say(&error.message);
    error.message
}

/// Whether an ERROR may be the fault of one row, rather than of locks, memory, files or a cancellation.
pub(crate) fn is_of_a_row(code: PgSqlErrorCode) -> bool {
    use PgSqlErrorCode::*;
    // This is in the same class, but no row's fault: the sequence gives no more numbers.
    if code == ERRCODE_SEQUENCE_GENERATOR_LIMIT_EXCEEDED {
        return false;
    }
    is_of(
        code,
        &[
            ERRCODE_DATA_EXCEPTION,
            ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            ERRCODE_INTERNAL_ERROR,
        ],
    )
}

/// As [`is_of_a_row`], for a row that is being inserted: its constraints and triggers may also refuse it.
pub(crate) fn is_of_a_new_row(code: PgSqlErrorCode) -> bool {
    use PgSqlErrorCode::*;
    let others = [
        ERRCODE_INTEGRITY_CONSTRAINT_VIOLATION,
        ERRCODE_TRIGGERED_DATA_CHANGE_VIOLATION,
        ERRCODE_WITH_CHECK_OPTION_VIOLATION,
        ERRCODE_PLPGSQL_ERROR,
    ];
    is_of_a_row(code) || is_of(code, &others)
}

fn is_of(code: PgSqlErrorCode, classes: &[PgSqlErrorCode]) -> bool {
    /// The lower bits of a SQLSTATE are its class (ERRCODE_TO_CATEGORY in elog.h).
    const CLASS: i32 = (1 << 12) - 1;
    classes.iter().any(|of| *of as i32 & CLASS == code as i32 & CLASS)
}

fn say(error: &str) {
    if SAID_AT.get().is_some_and(|at| at.elapsed() < SAY_AFTER) {
        return;
    }
    SAID_AT.set(Some(Instant::now()));
    log(
        LogLevel::Warning,
        "an event cannot be processed",
        Some(&format!("{error}. Only this event fails; the others are sent.")),
        Some(
            "See last_error in outbox.failed_events. If storage is damaged, its row in outbox.events is kept until its retention ends.",
        ),
    );
}

/// Which parts of an event are copied: as many as can be read.
#[derive(Clone, Copy)]
pub(crate) struct Kept {
    pub texts: bool,
    pub payload: bool,
}

pub(crate) const ALL: Kept = Kept {
    texts: true,
    payload: true,
};

/// From all parts to almost none.
const LESS_AND_LESS: [Kept; 3] = [
    ALL,
    Kept {
        texts: true,
        payload: false,
    },
    Kept {
        texts: false,
        payload: false,
    },
];

/// Runs `copy`, which copies one event, with as many of its parts as can be read.
pub(crate) fn as_much_as_can_be_read(mut copy: impl FnMut(Kept) -> u64) -> u64 {
    if !is_careful() {
        return copy(ALL);
    }
    LESS_AND_LESS
        .into_iter()
        .find_map(|kept| tried(|| copy(kept)).ok())
        .unwrap_or(0)
}
