//! Where a test may break the worker: points at which it dies or waits, and mutations of the code that the tests must
//! notice. In builds without the feature `faults` there is nothing of it.
//!
//! Both are told by files in the working directory, which is the server's data directory: `outbox_relay.crash_at` holds
//! the name of a point, at which the process kills itself (or, with `hold` behind the name, waits until the file is
//! gone); `outbox_relay.mutation`, read once, the name of a mutation. A thread that was told by [`mutate`] looks at no
//! file.

use std::str::FromStr;

/// An enum whose variants have names, by which files and command lines tell of them.
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
    /// A point on the worker's way; the last one on that of a session that publishes.
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
    }
}

named! {
    /// A way in which the code is wrong; the last three only have less room, or less
    /// patience, so that tests meet their limits.
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
        if words.next() == Some("hold") {
            // Tells whoever waits for it.
            let _ = fs::write("outbox_relay.held", point.name());
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

    pub(super) fn is_mutated(mutation: Mutation) -> bool {
        if let Some(of_thread) = OF_THREAD.get() {
            return of_thread == Some(mutation);
        }
        let told = MUTATION.get_or_init(|| {
            let text = fs::read_to_string(MUTATION_FILE).unwrap_or_default();
            let name = Some(text.trim()).filter(|name| !name.is_empty())?;
            // A name that means nothing would make a test pass for nothing.
            Some(name.parse().unwrap_or_else(|error| panic!("{MUTATION_FILE}: {error}")))
        });
        *told == Some(mutation)
    }
}

/// The process has come to this point.
#[cfg(feature = "faults")]
pub fn reach(point: Point) {
    armed::reach(point);
}

/// Whether the code is to be wrong in this way.
#[cfg(feature = "faults")]
pub fn is_mutated(mutation: Mutation) -> bool {
    armed::is_mutated(mutation)
}

/// What this thread does is wrong in this way from now on, and in no other; `None`: in none.
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
