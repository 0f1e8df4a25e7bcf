//! Waiting for something that happens soon, without fixed delays.

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// How long the kit waits by default: far longer than anything takes, on a busy machine too.
pub const LIMIT: Duration = Duration::from_secs(20);

const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Polls until `probe` returns a value; panics after `limit`, naming what it waited for.
#[track_caller]
pub fn eventually<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = probe() {
            return value;
        }
        if Instant::now() >= deadline {
            panic!("waited {limit:?} for {what}");
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Polls until `holds`, for [`LIMIT`].
#[track_caller]
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    eventually(what, LIMIT, || holds().then_some(()));
}

/// Polls until `probe` returns `expected`, for [`LIMIT`]; panics with the last value.
#[track_caller]
pub fn wait_eq<T: PartialEq + Debug>(what: &str, expected: T, mut probe: impl FnMut() -> T) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let last = probe();
        if last == expected {
            return;
        }
        if Instant::now() >= deadline {
            panic!("waited {LIMIT:?} for {what} to be {expected:?}; it is {last:?}");
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Polls for this time, and panics as soon as the condition does not hold: for things that must not happen.
#[track_caller]
pub fn holds_for(span: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + span;
    while Instant::now() < end {
        assert!(holds(), "not true for {span:?}: {what}");
        std::thread::sleep(POLL_INTERVAL);
    }
}
