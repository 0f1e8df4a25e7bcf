//! Raising ERRORs. Messages are in Postgres's style: primary line in lower case without a full stop; detail and hint
//! are sentences.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgLogLevel, PgSqlErrorCode, pg_sys};

/// Keeps pgrx from adding a Rust backtrace to the DETAIL that a user sees, wherever RUST_BACKTRACE is set. Called once,
/// from `_PG_init`.
pub(crate) fn hide_backtraces() {
    const SWITCH: &str = "RUST_LIB_BACKTRACE";
    let before = std::env::var_os(SWITCH);
    // SAFETY: this process has one thread while it loads a library. The first capture decides for all; the variable is
    // put back for other libraries.
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

/// An ERROR unless a function is called with so many arguments: somebody else's declaration of it may say otherwise.
pub(crate) fn expect_arguments(fcinfo: pg_sys::FunctionCallInfo, count: usize) {
    // SAFETY: Postgres calls with a valid structure.
    let given = unsafe { (*fcinfo).nargs } as usize;
    if given != count {
        internal(format!(
            "a function of outbox_relay was called with {given} arguments instead of {count}"
        ));
    }
}

/// The arguments of a function that is declared strict. `None` if one is NULL all the same, because somebody else has
/// declared it: then its result is NULL, too.
pub(crate) fn strict_arguments<const COUNT: usize>(fcinfo: pg_sys::FunctionCallInfo) -> Option<[pg_sys::Datum; COUNT]> {
    expect_arguments(fcinfo, COUNT);
    // SAFETY: Postgres calls with a valid structure, which has so many arguments.
    unsafe {
        let arguments = (*fcinfo).args.as_slice(COUNT);
        (*fcinfo).isnull = arguments.iter().any(|argument| argument.isnull);
        (!(*fcinfo).isnull).then(|| std::array::from_fn(|index| arguments[index].value))
    }
}

/// An internal error: something of ours is not as it must be.
pub(crate) fn internal(message: impl Into<String>) -> ! {
    raise(ErrorReport::new(
        PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
        message.into(),
        "",
    ))
}
