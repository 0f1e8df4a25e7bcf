//! Raising ERRORs. Messages follow Postgres's style: the primary message in lower case without a full stop, DETAIL and
//! HINT as sentences.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgLogLevel, PgSqlErrorCode, pg_sys};

/// Keeps pgrx from adding a Rust backtrace to the DETAIL that a user sees when RUST_BACKTRACE is set. `_PG_init` calls
/// this once.
pub(crate) fn hide_backtraces() {
    const SWITCH: &str = "RUST_LIB_BACKTRACE";
    let before = std::env::var_os(SWITCH);
    // SAFETY: this process has one thread while it loads a library. The first capture decides for the whole process;
    // the variable is restored for other libraries.
    unsafe {
        std::env::set_var(SWITCH, "0");
        let _ = std::backtrace::Backtrace::capture();
        match before {
            Some(value) => std::env::set_var(SWITCH, value),
            None => std::env::remove_var(SWITCH),
        }
    }
}

/// Raises an ERROR; never returns.
pub(crate) fn raise(report: ErrorReport) -> ! {
    report.report(PgLogLevel::ERROR);
    unreachable!("an ERROR does not return")
}

/// Raises an ERROR unless the function is called with this many arguments. A user may have declared it otherwise.
pub(crate) fn expect_arguments(fcinfo: pg_sys::FunctionCallInfo, count: usize) {
    // SAFETY: Postgres calls with a valid structure.
    let given = unsafe { (*fcinfo).nargs } as usize;
    if given != count {
        internal(format!(
            "a function of outbox_relay was called with {given} arguments instead of {count}"
        ));
    }
}

/// The arguments of a function that is declared strict. `None` if one of them is NULL, because a user has declared the
/// function without STRICT: then its result is NULL, too.
pub(crate) fn strict_arguments<const COUNT: usize>(fcinfo: pg_sys::FunctionCallInfo) -> Option<[pg_sys::Datum; COUNT]> {
    expect_arguments(fcinfo, COUNT);
    // SAFETY: Postgres calls with a valid structure, which has this many arguments.
    unsafe {
        let arguments = (*fcinfo).args.as_slice(COUNT);
        (*fcinfo).isnull = arguments.iter().any(|argument| argument.isnull);
        (!(*fcinfo).isnull).then(|| std::array::from_fn(|index| arguments[index].value))
    }
}

/// Raises the ERROR that Postgres raises if it gets no memory.
pub(crate) fn no_memory() -> ! {
    let report = ErrorReport::new(PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY, "out of memory", "");
    raise(report.set_detail("There is not enough for an event."))
}

/// Raises an internal error: one of our own objects or assumptions is broken.
pub(crate) fn internal(message: impl Into<String>) -> ! {
    raise(ErrorReport::new(
        PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
        message.into(),
        "",
    ))
}
