//! Decides whether a guard may be claimed and where its new owner starts. Makes only decisions.
//!
//! A running owner keeps its guard. An owner that is silent or has left is followed only by its heirs:
//!
//! - A server that was the owner before, in the same place, claims at once: it was restarted.
//! - Heirs are the same data directory after a reboot, a streaming standby that was promoted since, and the server that
//!   pg_upgrade has made from the owner. They first watch whether the owner still refreshes the guard, unless the guard
//!   says that the owner has left.
//! - Any other server with the owner's history (a base backup, a snapshot, a recovery to a target) is a copy. A copy
//!   cannot conclude anything from silence: it waits for `outbox.take_over()`, as does a server that does not know the
//!   owner. (With `outbox_relay.take_over = any`, all servers that know the owner are heirs.)
//!
//! A server that pg_upgrade has made from a copy cannot be distinguished from one made from the owner.

use crate::failure::{Failure, Trouble};
use crate::guard::epoch::epoch_of;
use crate::guard::place::{self, Likeness};
use crate::guard::watch::Watch;
use crate::guard::{Guard, Reach};
use crate::time::Now;
use std::time::Duration;

/// `on_missing_guard`: what to do when Redis has lost everything, including the guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnMissing {
    /// Continue with events that were not sent yet.
    Continue,
    /// Wait for `outbox.take_over()`.
    Halt,
    /// Send all retained events again.
    Replay,
}

/// What this server knows about the incarnation that a guard names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incarnation {
    /// The present run of this server.
    Current,
    /// An earlier run in this server's history. It ended at this position in the WAL and before transaction `next_xid`.
    Earlier { ended: u64, next_xid: u64 },
    /// A run that this server does not know.
    Unknown,
}

/// The server that judges a guard.
pub struct Claimant<'a> {
    /// What is known about the guard's incarnation.
    pub incarnation: Incarnation,
    pub system: &'a str,
    pub place: &'a str,
    /// The timeline that this data directory was promoted to after streaming as a standby; 0: it never was.
    pub promoted_to: u32,
    /// Whether every server that knows the owner may follow it.
    pub anybody: bool,
    /// Whether this database is a copy and no administrator has allowed it to continue.
    pub copy: bool,
    /// Whether the backend is paused: then it keeps a guard that it owns, and claims no other.
    pub paused: bool,
    /// The last batch that is known to be appended; 0: this server was never the owner.
    pub number: u64,
    pub reach: Reach,
    pub on_missing: OnMissing,
    /// Whether an administrator has requested it.
    pub take_over: bool,
    /// Whether events from a dump have come that were not compared yet.
    pub restored: bool,
    /// The latest transaction that brought such events and was compared; 0: there is none.
    pub last_restore: u64,
}

/// Where the new owner starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At its own position.
    Own,
    /// At the guard's position: batches were appended whose replies this server has not read.
    Adopt,
    /// At the guard's position: Redis has lost batches that it had acknowledged. `heard`: the replies to the guard's
    /// last batch were read. If not, it starts at the previous position and omits those events of that batch that are
    /// in the streams. `restored`: events from a dump have come since; then all events are looked for.
    Heal { heard: bool, restored: bool },
    /// Where it stood (unfinished: at the guard's previous position), leaving out events that stand in the
    /// streams already.
    Compare(Why),
    /// At the oldest retained event.
    Replay,
}

/// Why events must be compared with the streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// There is no guard.
    Missing,
    /// The guard's position lies beyond this server's history.
    OtherHistory,
    /// An earlier comparison was not finished.
    Unfinished,
    /// Events of a dump have come, of which some may have been sent since it was taken.
    Restored,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Claim(Start),
    /// The guard claims to belong to our history, but this field has an impossible value.
    Disbelieve(&'static str),
    /// Look again after this time; zero: as after any failure.
    Wait {
        failure: Failure,
        retry_after: Duration,
    },
}

/// The relation of this server to the guard's owner.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kinship {
    /// It is the owner.
    Owner,
    /// It may follow the owner when that is gone.
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
        // pg_upgrade generates a new identifier. So does pg_createsubscriber, whose servers know that they are copies.
        Incarnation::Earlier { .. } if guard.system != us.system => Kinship::Heir,
        Incarnation::Earlier { .. } | Incarnation::Unknown => Kinship::Stranger,
    }
}

/// Judges the guard that was read at time `now`.
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
        // In this case nothing in the guard is relied on.
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
        // must be sufficient.
        Incarnation::Earlier { .. } if guard.system != us.system => guard.number == us.number,
        // If the server has lost its WAL (pg_resetwal), the WAL continues further ahead, and transaction ids are used
        // again.
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
    // Events that a dump has brought since may be the same events that the guard has passed, under new numbers.
    let restored = us.last_restore > 0 && !guard.position.from.snapshot.sees(us.last_restore);
    match guard.number.cmp(&us.number) {
        std::cmp::Ordering::Equal if restored => Start::Compare(Why::Restored),
        std::cmp::Ordering::Equal => own(us),
        std::cmp::Ordering::Greater if restored => Start::Compare(Why::Unfinished),
        // Whoever went back has a number above all guards before: this one was written on top of what we know.
        std::cmp::Ordering::Greater => Start::Adopt,
        // A guard of an earlier epoch may be one that Redis had lost, and has come back with after the loss was healed.
        std::cmp::Ordering::Less => Start::Heal {
            heard: epoch_of(guard.number) == epoch_of(us.number),
            restored,
        },
    }
}

#[cfg(test)]
mod tests;
