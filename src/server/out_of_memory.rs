//! Errors that need no memory but what Postgres keeps for errors.

use pgrx::{PgSqlErrorCode, pg_sys};
use std::ffi::{CStr, c_char, c_int};
use std::ptr;

// SAFETY: the declarations of elog.h. Without pgrx's guard, which needs memory.
unsafe extern "C-unwind" {
    fn errstart(level: c_int, domain: *const c_char) -> bool;
    fn errcode(code: c_int) -> c_int;
    fn errmsg_internal(format: *const c_char, ...) -> c_int;
    fn errdetail_internal(format: *const c_char, ...) -> c_int;
    fn errfinish(file: *const c_char, line: c_int, function: *const c_char);
}

/// Raises an ERROR, which jumps over the frames up to Postgres's own: they must not own anything that needs dropping.
#[cold]
pub(crate) fn refuse() -> ! {
    let detail = c"The process cannot get the memory that outbox_relay keeps back for errors.";
    // SAFETY: an ERROR does not return.
    unsafe { raise(pg_sys::PGERROR as c_int, detail, 0) }
}

/// Ends this process in order, and no other: Rust itself would abort it, and then Postgres ends all sessions. `size`:
/// what could not be had.
#[cold]
pub(crate) fn end_process(size: usize) -> ! {
    // SAFETY: FATAL does not return, and unwinds nothing. The callbacks that add context to errors need memory.
    unsafe {
        pg_sys::error_context_stack = ptr::null_mut();
        raise(
            pg_sys::FATAL as c_int,
            c"Failed on request of size %zu in outbox_relay.",
            size,
        )
    }
}

/// # Safety
/// In the main thread, at a level that does not return.
unsafe fn raise(level: c_int, detail: &CStr, size: usize) -> ! {
    // SAFETY: constant texts, which are copied.
    unsafe {
        errstart(level, ptr::null());
        errcode(PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY as c_int);
        errmsg_internal(c"out of memory".as_ptr());
        errdetail_internal(detail.as_ptr(), size);
        errfinish(ptr::null(), 0, ptr::null());
    }
    unreachable!("such an error does not return")
}
