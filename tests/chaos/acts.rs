//! What people do to a Postgres server in ordinary weeks. None of it may lose, repeat or reorder an event. Drawn from
//! the seed, like all faults.

use std::time::Duration;

use kit::{Dice, Mode};

/// What a DBA does. The site is healthy again after each act.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Act {
    // --- while everything else goes on, one at a time (dba_acts.rs)
    /// Builds a second index beside the index, drops the old one, and renames the new one.
    SwapIndex(Index),
    Reindex(Index),
    /// Drops the index, and creates it again after this time.
    WithoutIndex(Index, Duration),
    /// pg_repack, where it is installed.
    Repack,
    VacuumFull,
    Cluster,
    /// A trigger that logs what is inserted, as tools that rewrite a table under load create it.
    LogTrigger(Duration),
    Truncate(Identity),
    /// Changes it, and changes it back after this time.
    Sequence(Change, Ending, Duration),
    LockTables(Tables, LockMode, Duration),
    LockRows(Rows, Duration),

    // --- acts that last until the next one begins or their time is over
    PauseAll(Duration),

    // --- exclusive acts: nothing else happens at the same time (copies.rs)
    Stop(Mode, Duration),
    /// CREATE DATABASE ... TEMPLATE; then events are published in the copy.
    CopyDatabase(CopyLife, Duration),
    /// A second server with all the data of this one, which runs beside it for this time.
    CloneServer(Original, Duration),
}

/// Indexes of `outbox.events`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Index {
    PrimaryKey,
    EventId,
    Xid,
}

/// Of TRUNCATE.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Identity {
    Restart,
    Continue,
}

/// Of the sequence of `outbox.events`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Change {
    SetOne,
    SetHalf,
    SetAhead,
    /// Sets it ahead, and after this time back to where no number was drawn yet.
    AheadAndBack,
    Restart,
    Cache,
    Increment,
    Decrement,
    Cycle,
    MaxValue,
    Type,
    NoOwner,
}

/// How the transaction of a change ends. A setval is never rolled back.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ending {
    Commit,
    Rollback,
}

/// Of the extension.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tables {
    /// The table with this number in the order of names.
    One(u64),
    All,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum LockMode {
    Share,
    ShareRowExclusive,
    AccessExclusive,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Rows {
    Cursors,
    FailedEvents,
    Backends,
    /// An open DELETE of the older half of all events.
    OldEvents,
    All,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum CopyLife {
    /// The copy is told nothing, so it sends nothing.
    Silent,
    /// The copy's backends get streams of their own and are taken over: it sends what was published in it.
    TakenOver,
}

/// What the original does while the clone lives.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Original {
    Runs,
    Paused,
    /// The original comes back while the clone lives, or when the clone is gone.
    Stopped(Mode, Return),
    /// The clone is a copy of its directory.
    StoppedBefore(Return),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Return {
    BesideTheClone,
    AfterTheClone,
}

pub(crate) const KINDS: &[&str] = &[
    "index", "repack", "truncate", "sequence", "locks", "pause", "stop", "copy", "clone",
];

impl Act {
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Act::SwapIndex(..) | Act::Reindex(..) | Act::WithoutIndex(..) => "index",
            Act::Repack | Act::VacuumFull | Act::Cluster | Act::LogTrigger(..) => "repack",
            Act::Truncate(..) => "truncate",
            Act::Sequence(..) => "sequence",
            Act::LockTables(..) | Act::LockRows(..) => "locks",
            Act::PauseAll(..) => "pause",
            Act::Stop(..) => "stop",
            Act::CopyDatabase(..) => "copy",
            Act::CloneServer(..) => "clone",
        }
    }
}

/// One of these kinds, each as likely as the others.
pub(crate) fn draw(dice: &mut Dice, kinds: &[&str]) -> Act {
    match *dice.pick(kinds) {
        "index" => {
            let index = *dice.pick(&[Index::PrimaryKey, Index::EventId, Index::Xid]);
            match dice.below(4) {
                0 => Act::WithoutIndex(index, dice.millis(100, 1_500)),
                1 => Act::Reindex(index),
                _ => Act::SwapIndex(index),
            }
        }
        "repack" => match dice.below(5) {
            0 => Act::VacuumFull,
            1 => Act::Cluster,
            2 => Act::LogTrigger(dice.millis(300, 2_000)),
            _ => Act::Repack,
        },
        "truncate" => Act::Truncate(if dice.one_in(4) {
            Identity::Continue
        } else {
            Identity::Restart
        }),
        "sequence" => sequence(dice),
        "locks" => locks(dice),
        "pause" => Act::PauseAll(dice.millis(300, 3_000)),
        "stop" => Act::Stop(mode(dice), dice.millis(0, 3_000)),
        "copy" => {
            let life = if dice.one_in(3) {
                CopyLife::TakenOver
            } else {
                CopyLife::Silent
            };
            Act::CopyDatabase(life, dice.millis(200, 1_500))
        }
        _ => clone(dice),
    }
}

fn mode(dice: &mut Dice) -> Mode {
    *dice.pick(&[Mode::Smart, Mode::Fast, Mode::Immediate])
}

fn sequence(dice: &mut Dice) -> Act {
    use Change::*;
    let change = *dice.pick(&[
        SetOne,
        SetHalf,
        SetAhead,
        AheadAndBack,
        AheadAndBack,
        Restart,
        Cache,
        Increment,
        Decrement,
        Cycle,
        MaxValue,
        Type,
        NoOwner,
    ]);
    let ending = if dice.one_in(4) {
        Ending::Rollback
    } else {
        Ending::Commit
    };
    Act::Sequence(change, ending, dice.millis(100, 1_500))
}

fn locks(dice: &mut Dice) -> Act {
    let time = dice.millis(500, 3_000);
    if dice.one_in(3) {
        let rows = [
            Rows::Cursors,
            Rows::FailedEvents,
            Rows::Backends,
            Rows::OldEvents,
            Rows::All,
        ];
        return Act::LockRows(*dice.pick(&rows), time);
    }
    let tables = if dice.one_in(5) {
        Tables::All
    } else {
        Tables::One(dice.below(1_000))
    };
    let modes = [
        LockMode::Share,
        LockMode::ShareRowExclusive,
        LockMode::AccessExclusive,
        LockMode::AccessExclusive,
    ];
    Act::LockTables(tables, *dice.pick(&modes), time)
}

fn clone(dice: &mut Dice) -> Act {
    let back = *dice.pick(&[Return::BesideTheClone, Return::AfterTheClone]);
    let original = match dice.below(4) {
        0 => Original::Runs,
        1 => Original::Paused,
        // A smart stop waits for the publishers, which would go on.
        2 => Original::Stopped(*dice.pick(&[Mode::Fast, Mode::Immediate]), back),
        _ => Original::StoppedBefore(back),
    };
    Act::CloneServer(original, dice.millis(700, 3_000))
}
