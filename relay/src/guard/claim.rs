//! Whether a guard may be claimed, and from where its new owner goes on: decisions alone.
//!
//! A live owner is never robbed, and an owner who is silent, or has left, is followed by its heirs alone:
//!
//! - Who has been owner before, in the same place, claims at once: it was restarted.
//! - The same data directory after the machine was started again, a streaming standby that was promoted since, and a server that
//!   pg_upgrade has made of the owner's first watch whether the owner still refreshes the guard, unless that says that he has left.
//! - Everybody else who has the owner's history (a base backup, a snapshot, a recovery to a target) is a copy. Silence proves nothing to it:
//!   it waits for `outbox.take_over()`, as does whoever does not know the owner. (The setting outbox_relay.take_over makes heirs of all
//!   that know him.)
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
    /// Nobody we know.
    Unknown,
}

/// Who judges.
pub struct Claimant<'a> {
    /// Of the guard's incarnation.
    pub incarnation: Incarnation,
    pub system: &'a str,
    pub place: &'a str,
    /// The timeline that this data directory was promoted to, as a standby that had streamed; 0: it never was.
    pub promoted_to: u32,
    /// Whoever knows the owner may follow him.
    pub anybody: bool,
    /// This database is a copy of the one that relayed, and nobody has said that it is to go on.
    pub copy: bool,
    /// It sends nothing now: what is its own it keeps, and nothing else does it claim.
    pub paused: bool,
    /// The last batch that is known to be appended; 0: it has never been the owner.
    pub number: u64,
    pub reach: Reach,
    pub on_missing: OnMissing,
    /// Somebody asked for it.
    pub take_over: bool,
    /// Events of a dump have come.
    pub restored: bool,
    /// The latest transaction that has brought some which were looked for; 0: none has.
    pub last_restore: u64,
}

/// From where the new owner goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Where it stood.
    Own,
    /// At the guard's position: batches were appended that it has not heard of.
    Adopt,
    /// At the guard's position: Redis has lost batches that it had acknowledged. Unless its last batch was `heard` of for sure, at the
    /// previous position, leaving out those events of that batch that stand in the streams. If events of a dump have come since
    /// (`restored`), of all events.
    Heal { heard: bool, restored: bool },
    /// Where it stood (unfinished: at the guard's previous position), leaving out events that stand in the streams already.
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
    /// Whoever began to compare did not come to an end.
    Unfinished,
    /// Events of a dump have come, of which some may have been sent since it was taken.
    Restored,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Claim(Start),
    /// The guard says of itself that it is of our history, but this field of it can't be.
    Disbelieve(&'static str),
    /// Look again after this long; zero: as after any failure.
    Wait {
        failure: Failure,
        retry_after: Duration,
    },
}

/// What the judge is to the guard's owner.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kinship {
    /// The same.
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
        // A base backup keeps its identifier.
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
        // Nothing that it says is gone by.
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
        // WAL positions of another system mean nothing here (pg_upgrade has made a new one): equal numbers must do.
        Incarnation::Earlier { .. } if guard.system != us.system => guard.number == us.number,
        // Where the server has lost its WAL (pg_resetwal), the WAL goes on further ahead, and ids of transactions are used again.
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
        std::cmp::Ordering::Greater => Start::Adopt,
        // Of an earlier epoch may be what Redis comes back with after it has lost it, and after that was healed.
        std::cmp::Ordering::Less => Start::Heal {
            heard: epoch_of(guard.number) == epoch_of(us.number),
            restored,
        },
    }
}

#[cfg(test)]
mod tests;
