//! Gives a variable of the process another value during a call.

use std::cell::Cell;
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
