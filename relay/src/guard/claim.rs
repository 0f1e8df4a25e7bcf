//! Whether a guard may be claimed, and from where its new owner goes on: decisions alone.
//!
//! A running owner keeps its guard. An owner that is silent, or has left, is followed by its heirs alone:
//!
//! - A server that was the owner before, in the same place, claims at once: it was restarted.
//! - Heirs are the same data directory after a reboot, a streaming standby that was promoted since, and the server that
//!   pg_upgrade has made of the owner's. They first watch whether the owner still refreshes the guard, unless the guard
//!   says that the owner has left.
//! - Any other server with the owner's history (a base backup, a snapshot, a recovery to a target) is a copy. To a
//!   copy, silence proves nothing: it waits for `outbox.take_over()`, as does a server that does not know the owner.
//!   (With `outbox_relay.take_over = any`, all servers that know the owner are heirs.)
//!
//! pg_upgrade of a copy cannot be told from pg_upgrade of the owner.

use crate::failure::{Failure, Trouble};
use crate::guard::epoch::epoch_of;
use crate::guard::place::{self, Likeness};
use crate::guard::watch::Watch;
use crate::guard::{Guard, Reach};
use crate::time::Now;
use std::time::Duration;

/// `on_missing_guard`: Redis lost everything, the guard too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnMissing {
    /// Go on with what has not been sent.
    Continue,
    /// Wait for `outbox.take_over()`.
    Halt,
    /// Send again all that is retained.
    Replay,
}

/// What we know of the incarnation that a guard names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incarnation {
    /// This run of this server.
    Current,
    /// An earlier one of our history, which ended at this position of the WAL and before transaction `next_xid`.
    Earlier { ended: u64, next_xid: u64 },
    /// One that this server does not know.
    Unknown,
}

/// The server that judges a guard.
pub struct Claimant<'a> {
    /// Of the guard's incarnation.
    pub incarnation: Incarnation,
    pub system: &'a str,
    pub place: &'a str,
    /// The timeline that this data directory was promoted to, as a standby that had streamed; 0: it never was.
    pub promoted_to: u32,
    /// Every server that knows the owner may follow it.
    pub anybody: bool,
    /// This database is a copy of the one that relayed, and no administrator has told it to go on.
    pub copy: bool,
    /// The backend is paused: it keeps a guard of its own, and claims no other.
    pub paused: bool,
    /// The last batch that is known to be appended; 0: it has never been the owner.
    pub number: u64,
    pub reach: Reach,
    pub on_missing: OnMissing,
    /// An administrator has asked for it.
    pub take_over: bool,
    /// Events of a dump have come.
    pub restored: bool,
    /// The latest transaction that has brought such events, if they were looked for; 0: there is none.
    pub last_restore: u64,
}

/// Where the new owner begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Where it stood.
    Own,
    /// At the guard's position: batches were appended whose replies it has not read.
    Adopt,
    /// At the guard's position: Redis has lost batches that it had acknowledged. `heard`: the replies to the guard's
    /// last batch were read. Otherwise it begins at the previous position, and leaves out those events of that batch
    /// that are in the streams. `restored`: events of a dump have come since; then all events are looked for.
    Heal { heard: bool, restored: bool },
    /// Where it stood (unfinished: at the guard's previous position), leaving out events that stand in the
    /// streams already.
    Compare(Why),
    /// At the beginning of what is retained.
    Replay,
}

/// Why event ids are to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// There is no guard.
    Missing,
    /// The guard's position lies beyond our history.
    OtherHistory,
    /// An earlier comparison did not come to its end.
    Unfinished,
    /// Events of a dump have come, of which some may have been sent since it was taken.
    Restored,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Claim(Start),
    /// The guard says that it is of our history, but this field of it cannot be.
    Disbelieve(&'static str),
    /// Look again after this long; zero: as after any failure.
    Wait {
        failure: Failure,
        retry_after: Duration,
    },
}

/// How this server is related to the guard's owner.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kinship {
    /// It is the owner.
    Owner,
    /// May follow, once the owner is gone.
    Heir,
    Stranger,
}

fn kinship(guard: &Guard, us: &Claimant<'_>) -> Kinship {
    let likeness = place::compare(&guard.place, us.place);
    match us.incarnation {
        Incarnation::Current => Kinship::Owner,
        Incarnation::Earlier { .. } if likeness == Likeness::Same => Kinship::Owner,
        Incarnation::Earlier { .. } if us.copy => Kinship::Stranger,
        Incarnation::Earlier { .. } if likeness == Likeness::Rebooted => Kinship::Heir,
        Incarnation::Earlier { .. } if us.paused => Kinship::Stranger,
        Incarnation::Earlier { .. } if us.promoted_to > guard.timeline || us.anybody => Kinship::Heir,
        // A base backup keeps the system identifier; pg_upgrade makes a new one.
        Incarnation::Earlier { .. } if guard.system != us.system => Kinship::Heir,
        Incarnation::Earlier { .. } | Incarnation::Unknown => Kinship::Stranger,
    }
}

/// Judges the guard that was read at `now`.
pub fn judge(guard: Option<&Guard>, us: &Claimant<'_>, watch: &mut Watch, now: Now) -> Decision {
    let Some(guard) = guard else {
        return judge_missing(us, watch, now);
    };
    let kinship = kinship(guard, us);
    if kinship == Kinship::Owner || us.take_over || (guard.released && kinship == Kinship::Heir) {
        return claim(guard, us, watch);
    }
    let rest = watch.look(guard, now);
    if kinship == Kinship::Stranger {
        return Decision::Wait {
            failure: fenced(guard),
            retry_after: guard.interval,
        };
    }
    if rest.is_zero() {
        return claim(guard, us, watch);
    }
    let failure = match watch.has_moved() {
        true => fenced(guard),
        false => Failure::backend(format!(
            "watching whether the guard's owner is still running: {}",
            guard.place
        )),
    };
    Decision::Wait {
        failure,
        retry_after: guard.interval.min(rest),
    }
}

fn claim(guard: &Guard, us: &Claimant<'_>, watch: &mut Watch) -> Decision {
    *watch = Watch::default();
    let is_current = us.incarnation == Incarnation::Current;
    match (start(guard, us), guard.beyond(&us.reach, is_current)) {
        // Nothing that the guard says is relied on.
        (start @ Start::Compare(Why::OtherHistory), _) => Decision::Claim(start),
        (_, Some(field)) => Decision::Disbelieve(field),
        (start, None) => Decision::Claim(start),
    }
}

fn judge_missing(us: &Claimant<'_>, watch: &mut Watch, now: Now) -> Decision {
    let waits = |trouble, text: &str, retry_after| Decision::Wait {
        failure: Failure::of(trouble, text),
        retry_after,
    };
    if us.copy && !us.take_over {
        let text = "its guard is missing, and this server is a copy of the one that relayed";
        return waits(Trouble::Copied, text, Duration::ZERO);
    }
    if us.paused {
        return waits(Trouble::GuardMissing, "its guard is missing", Duration::ZERO);
    }
    if let Some((interval, rest)) = watch.misses(now).filter(|_| !us.take_over) {
        return Decision::Wait {
            failure: Failure {
                trouble: Trouble::GuardMissing,
                ..Failure::backend("its guard is missing, and it waits for the server that owned the guard")
            },
            retry_after: interval.min(rest),
        };
    }
    *watch = Watch::default();
    missing(us)
}

fn missing(us: &Claimant<'_>) -> Decision {
    match us.on_missing {
        _ if us.number == 0 => Decision::Claim(own(us)),
        OnMissing::Halt if !us.take_over => Decision::Wait {
            failure: Failure::of(
                Trouble::GuardMissing,
                "its guard is missing: Redis has lost its data, or is another Redis",
            ),
            retry_after: Duration::ZERO,
        },
        OnMissing::Replay => Decision::Claim(Start::Replay),
        OnMissing::Continue | OnMissing::Halt => Decision::Claim(Start::Compare(Why::Missing)),
    }
}

fn own(us: &Claimant<'_>) -> Start {
    match us.restored {
        true => Start::Compare(Why::Restored),
        false => Start::Own,
    }
}

fn fenced(guard: &Guard) -> Failure {
    Failure::of(
        Trouble::Fenced,
        format!(
            "its guard belongs to the server at {} (system {}, timeline {})",
            guard.place, guard.system, guard.timeline
        ),
    )
}

fn start(guard: &Guard, us: &Claimant<'_>) -> Start {
    let is_ours = match us.incarnation {
        Incarnation::Current => true,
        // WAL positions of another system mean nothing here (pg_upgrade has made a new one), so equal batch numbers
        // must be enough.
        Incarnation::Earlier { .. } if guard.system != us.system => guard.number == us.number,
        // Where the server has lost its WAL (pg_resetwal), the WAL goes on further ahead, and ids of transactions are
        // used again.
        Incarnation::Earlier { ended, next_xid } => {
            guard.wal <= ended && guard.position.newest().snapshot.xmax() <= next_xid
        }
        Incarnation::Unknown => false,
    };
    if !is_ours {
        return Start::Compare(Why::OtherHistory);
    }
    if guard.compares {
        return Start::Compare(Why::Unfinished);
    }
    // What a dump has brought since may be the same events as those that the guard has passed, with new numbers.
    let restored = us.last_restore > 0 && !guard.position.from.snapshot.sees(us.last_restore);
    match guard.number.cmp(&us.number) {
        std::cmp::Ordering::Equal if restored => Start::Compare(Why::Restored),
        std::cmp::Ordering::Equal => own(us),
        std::cmp::Ordering::Greater if restored => Start::Compare(Why::Unfinished),
        // Whoever went back has a number above all guards before: this one was written on top of what we know.
        std::cmp::Ordering::Greater => Start::Adopt,
        // A guard of an earlier epoch may be one that Redis had lost and came back with, after the loss was healed.
        std::cmp::Ordering::Less => Start::Heal {
            heard: epoch_of(guard.number) == epoch_of(us.number),
            restored,
        },
    }
}

#[cfg(test)]
mod tests;
