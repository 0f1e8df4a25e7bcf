//! Lets ERRORs of Postgres and of other people's code pass through our functions, so that the client gets them
//! complete.
//!
//! Where we call Postgres, pgrx turns an ERROR into a panic, so that Rust's frames unwind. The panic carries only a
//! copy without constraint, column, position, context and most SQLSTATEs. So each entry into our code (`report::guard`)
//! keeps a complete copy of the error, made when it is raised, and raises that copy again when our frames have been
//! left.

use crate::server::{reserve, scoped, unguarded};
use pgrx::PgLogLevel;
use pgrx::pg_sys::{self, panic::CaughtError};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

thread_local! {
    /// The last ERROR that was raised below one of our entries. It is kept until the next one, because the code that
    /// raises it still reads it.
    static LAST: Cell<*mut pg_sys::ErrorData> = const { Cell::new(ptr::null_mut()) };
    /// Names of source files and functions, kept for ever. Those of errors that Rust raised would otherwise be freed
    /// too early. There are few different names.
    static PLACES: RefCell<HashSet<CString>> = RefCell::new(HashSet::new());
}

/// How one of our functions has failed.
pub(crate) enum Failed {
    /// By an ERROR of Postgres. Call [`raise_again`].
    OfPostgres,
    /// By a panic.
    Panic(Box<dyn Any + Send>),
}

/// Runs `f`, and keeps an ERROR of Postgres that ends it.
pub(crate) fn attempt<R>(f: impl FnOnce() -> R) -> Result<R, Failed> {
    let raised = Cell::new(false);
    let argument = (&raw const raised).cast_mut().cast();
    // SAFETY: the callback gets the cell that it expects; a panic is caught.
    let outcome = unsafe { scoped::with_error_callback(remember, argument, || catch_unwind(AssertUnwindSafe(f))) };
    outcome.map_err(|payload| match raised.get() && is_last(payload.downcast_ref()) {
        true => Failed::OfPostgres,
        false => Failed::Panic(payload),
    })
}

/// Raises the ERROR that ended an attempt again, for the code further out.
///
/// # Safety
/// No frame up to Postgres's own holds anything that needs dropping.
pub(crate) unsafe fn raise_again() -> ! {
    // SAFETY: the caller's promise.
    unsafe { unguarded::ThrowErrorData(LAST.get()) };
    unreachable!("an ERROR does not return")
}

/// Whether a panic carries the last ERROR itself, and not one of ours that followed from it.
fn is_last(caught: Option<&CaughtError>) -> bool {
    let (Some(CaughtError::PostgresError(report)), last) = (caught, LAST.get()) else {
        return false;
    };
    // SAFETY: null, or a copy that only we free.
    unsafe {
        !last.is_null()
            && !(*last).message.is_null()
            && CStr::from_ptr((*last).message).to_string_lossy() == report.message()
    }
}

/// Called while an error report is built, after all callbacks below us have added their context.
// No pg_guard: it must not unwind. What it calls can fail only for want of memory; Postgres then reports that instead.
// SAFETY: only Postgres calls this, with the cell that belongs to the entry.
unsafe extern "C-unwind" fn remember(raised: *mut c_void) {
    // SAFETY: the cell outlives the entry; the copy is the process's own.
    unsafe {
        reserve::give_up_if_needed();
        let before = pg_sys::CurrentMemoryContext;
        pg_sys::CurrentMemoryContext = pg_sys::TopMemoryContext;
        let error = unguarded::CopyErrorData();
        pg_sys::CurrentMemoryContext = before;
        if (*error).elevel < PgLogLevel::ERROR as i32 {
            unguarded::FreeErrorData(error);
            return;
        }
        (*error).filename = kept((*error).filename);
        (*error).funcname = kept((*error).funcname);
        (*raised.cast::<Cell<bool>>()).set(true);
        let earlier = LAST.replace(error);
        if !earlier.is_null() {
            unguarded::FreeErrorData(earlier);
        }
    }
}

/// A copy of the text that is never freed.
///
/// # Safety
/// A zero-terminated text, or null.
unsafe fn kept(text: *const c_char) -> *const c_char {
    if text.is_null() {
        return text;
    }
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(text) };
    PLACES.with_borrow_mut(|places| {
        if let Some(known) = places.get(text) {
            return known.as_ptr();
        }
        let copy = text.to_owned();
        let place = copy.as_ptr();
        // Its bytes do not move when it is moved into the set.
        places.insert(copy);
        place
    })
}
