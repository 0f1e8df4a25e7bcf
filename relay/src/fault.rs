//! Where a test may break the worker: points at which it dies or waits, and mutations of the code that the tests must
//! notice. Builds without the feature `faults` contain none of this.
//!
//! Files in the working directory, which is the server's data directory, select both. `outbox_relay.crash_at` holds the
//! name of a point, at which the process kills itself. If `hold` follows the name, it waits until the file is removed;
//! if `starve` does, the thread that comes there gets no memory from then on. `outbox_relay.mutation`, which is read
//! once, holds the name of a mutation. A thread that has called [`mutate`] does not read the file.

use std::str::FromStr;

/// Declares an enum whose variants have names, which are used in files and on command lines.
macro_rules! named {
    ($(#[$meta:meta])* $enum:ident { $($variant:ident: $name:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $enum {
            $($variant,)*
        }

        impl $enum {
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }

        impl FromStr for $enum {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($name => Ok(Self::$variant),)*
                    _ => Err(format!("there is no {} \"{text}\"", stringify!($enum))),
                }
            }
        }
    };
}

named! {
    /// A point in the worker's code; the last two are in a session that publishes.
    Point {
        BeforeTick: "before_tick",
        BeforeSnapshot: "before_snapshot",
        AfterFlush: "after_flush",
        AtRehearsal: "at_rehearsal",
        AfterRead: "after_read",
        BeforeClaim: "before_claim",
        AfterClaim: "after_claim",
        AfterWrite: "after_write",
        AfterExec: "after_exec",
        BeforeSave: "before_save",
        BeforeRefusedSaved: "before_refused_saved",
        AfterSave: "after_save",
        BeforeReadLock: "before_read_lock",
        BeforeIdLock: "before_id_lock",
        AtCommit: "at_commit",
    }
}

named! {
    /// A deliberate fault in the code. The last three only reduce room or patience, so that tests reach the limits.
    Mutation {
        SkipFlush: "skip_flush",
        FlushBeforeSnapshot: "flush_before_snapshot",
        SaveBeforeAck: "save_before_ack",
        SeqAfterLast: "seq_after_last",
        TwoExecs: "two_execs",
        NoWatch: "no_watch",
        IgnoreErrorReply: "ignore_error_reply",
        IgnoreGuard: "ignore_guard",
        KeepOldNumber: "keep_old_number",
        FewDatabaseSlots: "few_database_slots",
        CompareByTwo: "compare_by_two",
        ShortMinutes: "short_minutes",
        TrimUnread: "trim_unread",
        TrimLastBatch: "trim_last_batch",
    }
}

#[cfg(feature = "faults")]
mod armed {
    use super::{Mutation, Point};
    use rustix::process::{Signal, getpid, kill_process};
    use std::cell::Cell;
    use std::fs;
    use std::sync::OnceLock;
    use std::thread;
    use std::time::Duration;

    const CRASH_FILE: &str = "outbox_relay.crash_at";
    const MUTATION_FILE: &str = "outbox_relay.mutation";
    static MUTATION: OnceLock<Option<Mutation>> = OnceLock::new();

    thread_local! {
        static OF_THREAD: Cell<Option<Option<Mutation>>> = const { Cell::new(None) };
        static IS_STARVED: Cell<bool> = const { Cell::new(false) };
    }

    pub(super) fn mutate(mutation: Option<Mutation>) {
        OF_THREAD.set(Some(mutation));
    }

    pub(super) fn reach(point: Point) {
        if OF_THREAD.get().is_some() {
            return;
        }
        let said = || fs::read_to_string(CRASH_FILE).unwrap_or_default();
        let text = said();
        let mut words = text.split_whitespace();
        if words.next() != Some(point.name()) {
            return;
        }
        let what = words.next();
        if what == Some("hold") {
            // Notifies the test that waits for this.
            let _ = fs::write("outbox_relay.held", point.name());
            while said() == text {
                thread::sleep(Duration::from_millis(2));
            }
            let _ = fs::remove_file("outbox_relay.held");
            return;
        }
        let _ = fs::remove_file(CRASH_FILE);
        match what == Some("starve") {
            true => IS_STARVED.set(true),
            false => die(),
        }
    }

    pub(super) fn is_starved() -> bool {
        IS_STARVED.get()
    }

    /// Ends the process as if it had been killed: no more of its code runs.
    fn die() -> ! {
        let killed = kill_process(getpid(), Signal::KILL);
        panic!("a crash point could not kill its own process: {killed:?}");
    }

    pub(super) fn is_mutated(mutation: Mutation) -> bool {
        if let Some(of_thread) = OF_THREAD.get() {
            return of_thread == Some(mutation);
        }
        let told = MUTATION.get_or_init(|| {
            let text = fs::read_to_string(MUTATION_FILE).unwrap_or_default();
            let name = Some(text.trim()).filter(|name| !name.is_empty())?;
            // An unknown name must not let a test pass without its mutation.
            Some(name.parse().unwrap_or_else(|error| panic!("{MUTATION_FILE}: {error}")))
        });
        *told == Some(mutation)
    }
}

/// Called when the process has reached this point.
#[cfg(feature = "faults")]
pub fn reach(point: Point) {
    armed::reach(point);
}

/// Whether this thread is to get no memory.
#[cfg(feature = "faults")]
pub fn is_starved() -> bool {
    armed::is_starved()
}

/// Whether this mutation is active.
#[cfg(feature = "faults")]
pub fn is_mutated(mutation: Mutation) -> bool {
    armed::is_mutated(mutation)
}

/// Sets the only mutation of this thread; `None`: none.
#[cfg(feature = "faults")]
pub fn mutate(mutation: Option<Mutation>) {
    armed::mutate(mutation);
}

#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn reach(_point: Point) {}

#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn is_mutated(_mutation: Mutation) -> bool {
    false
}

#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn is_starved() -> bool {
    false
}
