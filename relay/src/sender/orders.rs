//! What the worker tells a sender, and what that reports: plain values.

use crate::consumers::group::Surveyed;
use crate::delivery::flight::Refusal;
use crate::event::wanted::{Sighting, Wanted};
use crate::failure::Failure;
use crate::guard::{Guard, Owner};
use crate::reading::range::Position;
use crate::redis::destination::Address;
use crate::sender::survey::Survey;

/// Commands for one write, ready as bytes.
pub struct Batch {
    pub bytes: Vec<u8>,
    /// How many commands, so how many replies.
    pub commands: usize,
}

/// What the worker tells a sender. With at_least_once: only batches, that one is about to come, beats and surveys.
pub enum Order {
    /// For exactly_once it begins with MULTI and ends with the guard's HSET; `commands` are the entries alone.
    Batch(Batch),
    /// Claims the guard that was reported.
    Claim(Box<Claim>),
    /// Looks for events in their streams' tails; at least one.
    Look(Vec<Wanted>),
    /// Asks about consumer groups.
    Survey(Box<Survey>),
    /// A batch is about to come.
    Rouse,
    /// What was refused is written down: goes on.
    Resume,
    /// Refreshes the guard, and so looks whether the connection is there; `released`: for the last time.
    Beat { beat: u64, released: bool },
}

/// What a sender reports, in order.
pub enum Report {
    /// This is the node that it is about to connect to.
    Found(Address),
    /// Logged in; batches are welcome (at_least_once).
    Connected,
    /// Logged in; this is the guard, and a claim is waited for.
    Guard(Box<Option<Guard>>),
    /// The guard is ours.
    Claimed,
    /// What was found of each event that was to be looked for.
    Seen(Vec<Sighting>),
    /// What a survey, by its number, has found.
    Surveyed(u64, Vec<Surveyed>),
    /// All replies of the oldest batch are there; the commands that were refused, by index. The buffer comes back. With
    /// exactly_once it waits for [`Order::Resume`] if any was refused, and drops the batches that come before that.
    Done { refused: Vec<Refusal>, buffer: Vec<u8> },
    /// Nothing of the oldest batch was appended, because these commands of it were refused. Waits for
    /// [`Order::Resume`].
    Aborted { refused: Vec<Refusal>, buffer: Vec<u8> },
    /// The oldest batch is appended, but not replicated yet; it goes on waiting.
    Behind(Failure),
    /// The guard says that its owner has left.
    Released,
    /// The connection is no more. `accepted`: replies of the oldest batch that were read before it ended, and `refused`
    /// those of them which were errors. All else that was sent is in doubt.
    Lost {
        failure: Failure,
        accepted: usize,
        refused: Vec<Refusal>,
    },
}

/// A claim of the guard.
pub struct Claim {
    pub token: String,
    pub owner: Owner,
    /// What the guard says from now on of what was appended; `None` leaves that.
    pub start: Option<Beginning>,
}

/// Where a new guard begins: as if an empty batch had been appended.
pub struct Beginning {
    pub number: u64,
    pub position: Position,
    /// Events behind it may stand in the streams already.
    pub compares: bool,
    pub wal: u64,
    pub total: i64,
}
