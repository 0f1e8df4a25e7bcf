//! Errors of our C functions and log lines, with their texts converted to the database's encoding.
//!
//! pgrx passes texts on in UTF-8, which a database in another encoding would show wrongly or refuse.

use crate::server::encoding::words_to_server;
use crate::server::untouched::{self, Failed};
use crate::server::{out_of_memory, reserve};
use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgSqlErrorCode, PgTryBuilder, pg_sys};
use std::any::Any;
use std::ffi::{CStr, CString, c_char, c_int};
use std::panic::AssertUnwindSafe;

// SAFETY: the declarations of elog.h.
unsafe extern "C-unwind" {
    fn errstart(level: c_int, domain: *const c_char) -> bool;
    fn errcode(code: c_int) -> c_int;
    fn errmsg_internal(format: *const c_char, ...) -> c_int;
    fn errdetail_internal(format: *const c_char, ...) -> c_int;
    fn errhint(format: *const c_char, ...) -> c_int;
    fn err_generic_string(field: c_int, text: *const c_char) -> c_int;
    fn errfinish(file: *const c_char, line: c_int, function: *const c_char);
}

/// Runs the body of one of our functions. An ERROR of Postgres leaves it as it was raised, and a panic leaves it as an
/// ERROR.
///
/// # Safety
/// No frame up to Postgres's own holds anything that needs dropping: the ERROR jumps over them.
pub(crate) unsafe fn guard<R>(body: impl FnOnce() -> R) -> R {
    if !reserve::take() {
        out_of_memory::refuse();
    }
    match untouched::attempt(body) {
        Ok(result) => result,
        // SAFETY: the caller's promise.
        Err(Failed::OfPostgres) => unsafe { untouched::raise_again() },
        Err(Failed::Panic(payload)) => throw(payload),
    }
}

#[cold]
fn throw(payload: Box<dyn Any + Send>) -> ! {
    let report = PgTryBuilder::new(AssertUnwindSafe(move || -> ErrorText {
        std::panic::resume_unwind(payload)
    }))
    .catch_others(ErrorText::of)
    .execute();
    // SAFETY: an ERROR does not return; the texts are copied, and dropped before it leaves.
    unsafe {
        report.begin(pg_sys::PGERROR as c_int);
        errfinish(std::ptr::null(), 0, std::ptr::null());
    }
    unreachable!("an ERROR does not return")
}

/// Reports something at a level below ERROR.
pub(crate) fn say(level: c_int, code: PgSqlErrorCode, message: &str, detail: Option<&str>, hint: Option<&str>) {
    let report = ErrorText {
        code,
        message: in_server(message),
        detail: detail.map(in_server),
        hint: hint.map(in_server),
    };
    // SAFETY: calls only Postgres; a pending cancellation becomes an ERROR here.
    unsafe {
        pg_sys::ffi::pg_guard_ffi_boundary(|| {
            if report.start(level) {
                errfinish(std::ptr::null(), 0, std::ptr::null());
            }
        });
    }
}

/// The constraint that an ERROR names.
pub(crate) struct Constraint<'a> {
    pub schema: &'a CStr,
    pub table: &'a CStr,
    pub name: &'a CStr,
}

/// Raises an ERROR that names a constraint, as Postgres's own errors do.
pub(crate) fn raise_for_constraint(
    code: PgSqlErrorCode,
    message: &str,
    detail: &str,
    hint: &str,
    constraint: &Constraint<'_>,
) -> ! {
    let report = ErrorText {
        code,
        message: in_server(message),
        detail: Some(in_server(detail)),
        hint: Some(in_server(hint)),
    };
    // SAFETY: calls only Postgres, which copies the texts; the ERROR becomes a panic here.
    unsafe {
        pg_sys::ffi::pg_guard_ffi_boundary(|| {
            report.start(pg_sys::PGERROR as c_int);
            err_generic_string(pg_sys::PG_DIAG_SCHEMA_NAME as c_int, constraint.schema.as_ptr());
            err_generic_string(pg_sys::PG_DIAG_TABLE_NAME as c_int, constraint.table.as_ptr());
            err_generic_string(pg_sys::PG_DIAG_CONSTRAINT_NAME as c_int, constraint.name.as_ptr());
            errfinish(std::ptr::null(), 0, std::ptr::null());
        });
    }
    unreachable!("an ERROR does not return")
}

/// The texts of an error, in the database's encoding.
struct ErrorText {
    code: PgSqlErrorCode,
    message: CString,
    detail: Option<CString>,
    hint: Option<CString>,
}

impl ErrorText {
    fn of(error: CaughtError) -> Self {
        let (CaughtError::PostgresError(report)
        | CaughtError::ErrorReport(report)
        | CaughtError::RustPanic { ereport: report, .. }) = &error;
        Self {
            code: report.sql_error_code(),
            message: in_server(report.message()),
            detail: report.detail().map(in_server),
            hint: report.hint().map(in_server),
        }
    }

    /// # Safety
    /// `errfinish` follows.
    unsafe fn begin(self, level: c_int) {
        // SAFETY: the caller's promise.
        unsafe { self.start(level) };
    }

    /// Starts the report. False: neither the log nor the client wants it.
    ///
    /// # Safety
    /// `errfinish` follows if this is true.
    unsafe fn start(&self, level: c_int) -> bool {
        const TEXT: &CStr = c"%s";
        // SAFETY: zero-terminated texts, which are copied.
        unsafe {
            if !errstart(level, std::ptr::null()) {
                return false;
            }
            errcode(self.code as c_int);
            errmsg_internal(TEXT.as_ptr(), self.message.as_ptr());
            if let Some(detail) = &self.detail {
                errdetail_internal(TEXT.as_ptr(), detail.as_ptr());
            }
            if let Some(hint) = &self.hint {
                errhint(TEXT.as_ptr(), hint.as_ptr());
            }
        }
        true
    }
}

fn in_server(text: &str) -> CString {
    let mut bytes = words_to_server(text).into_owned();
    bytes.retain(|byte| *byte != 0);
    CString::new(bytes).unwrap_or_default()
}
