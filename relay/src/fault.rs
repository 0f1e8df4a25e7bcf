//! Where a test may break the worker: points at which it dies or waits, and mutations of the code that the tests must notice.
//! In builds without the feature `faults` there is nothing of it.
//!
//! Both are told by files in the working directory, which is the server's data directory: `outbox_relay.crash_at` holds the name
//! of a point, at which the process kills itself (or, with `hold` behind the name, waits until the file is gone);
//! `outbox_relay.mutation`, read once, the name of a mutation. A thread that was told by [`mutate`] looks at no file.

#[cfg(feature = "faults")]
mod armed {
    use rustix::process::{Signal, getpid, kill_process};
    use std::cell::Cell;
    use std::fs;
    use std::sync::OnceLock;
    use std::thread;
    use std::time::Duration;

    const CRASH_FILE: &str = "outbox_relay.crash_at";
    const MUTATION_FILE: &str = "outbox_relay.mutation";
    static MUTATION: OnceLock<String> = OnceLock::new();

    thread_local! {
        static OF_THREAD: Cell<Option<Option<&'static str>>> = const { Cell::new(None) };
    }

    pub fn mutate(mutation: Option<&'static str>) {
        OF_THREAD.set(Some(mutation));
    }

    pub fn reach(point: &str) {
        if OF_THREAD.get().is_some() {
            return;
        }
        let said = || fs::read_to_string(CRASH_FILE).unwrap_or_default();
        let text = said();
        let mut words = text.split_whitespace();
        if words.next() != Some(point) {
            return;
        }
        if words.next() == Some("hold") {
            // Tells whoever waits for it.
            let _ = fs::write("outbox_relay.held", point);
            while said() == text {
                thread::sleep(Duration::from_millis(2));
            }
            let _ = fs::remove_file("outbox_relay.held");
            return;
        }
        let _ = fs::remove_file(CRASH_FILE);
        die();
    }

    /// As if somebody had killed it: nothing of the process runs any more.
    fn die() -> ! {
        let killed = kill_process(getpid(), Signal::KILL);
        panic!("a crash point could not kill its own process: {killed:?}");
    }

    pub fn is_mutated(mutation: &str) -> bool {
        if let Some(of_thread) = OF_THREAD.get() {
            return of_thread == Some(mutation);
        }
        let read = || fs::read_to_string(MUTATION_FILE).unwrap_or_default().trim().to_owned();
        MUTATION.get_or_init(read) == mutation
    }
}

/// The process has come to this point.
#[cfg(feature = "faults")]
pub fn reach(point: &str) {
    armed::reach(point);
}

/// Whether the code is to be wrong in this way.
#[cfg(feature = "faults")]
pub fn is_mutated(mutation: &str) -> bool {
    armed::is_mutated(mutation)
}

/// What this thread does is wrong in this way from now on, and in no other; `None`: in none.
#[cfg(feature = "faults")]
pub fn mutate(mutation: Option<&'static str>) {
    armed::mutate(mutation);
}

#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn reach(_point: &str) {}

#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn is_mutated(_mutation: &str) -> bool {
    false
}
