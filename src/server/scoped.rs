//! Gives a variable of the process another value during a call.

use pgrx::pg_sys;
use std::cell::Cell;
use std::ffi::c_void;
use std::thread::LocalKey;

/// Runs `f` while `variable` has this value. Afterwards the former value is restored, even if an ERROR ends `f`.
pub(crate) fn with<T: Copy + 'static, R>(variable: &'static LocalKey<Cell<T>>, value: T, f: impl FnOnce() -> R) -> R {
    struct PutBack<T: Copy + 'static>(&'static LocalKey<Cell<T>>, T);
    impl<T: Copy> Drop for PutBack<T> {
        fn drop(&mut self) {
            self.0.set(self.1);
        }
    }
    let _put_back = PutBack(variable, variable.replace(value));
    f()
}

/// Runs `f`. Postgres calls `callback` with `argument` for each report that is built meanwhile.
///
/// # Safety
/// The callback takes this argument. `f` does not unwind. An ERROR may jump over it: whoever catches that puts back its
/// own callbacks.
pub(crate) unsafe fn with_error_callback<R>(
    callback: unsafe extern "C-unwind" fn(*mut c_void),
    argument: *mut c_void,
    f: impl FnOnce() -> R,
) -> R {
    // SAFETY: the entry is removed from the stack again, here or by the code that catches an ERROR further out.
    unsafe {
        let mut entry = pg_sys::ErrorContextCallback {
            previous: pg_sys::error_context_stack,
            callback: Some(callback),
            arg: argument,
        };
        pg_sys::error_context_stack = &mut entry;
        let result = f();
        pg_sys::error_context_stack = entry.previous;
        result
    }
}
