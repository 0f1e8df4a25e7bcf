//! The orders of a worker to its sender, and the sender's reports, as plain values.

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
    /// The number of commands, and so of replies.
    pub commands: usize,
}

/// An order of the worker. With at_least_once there are only batches, rousing, beats and surveys.
pub enum Order {
    /// With exactly_once it begins with MULTI and ends with the guard's HSET; `commands` counts only the entries.
    Batch(Batch),
    /// Claims the guard that was reported.
    Claim(Box<Claim>),
    /// Look for events at the ends of their streams; at least one event.
    Look(Vec<Wanted>),
    /// Asks about consumer groups.
    Survey(Box<Survey>),
    /// A batch is about to come.
    Rouse,
    /// What was refused is written down: continue.
    Resume,
    /// Refresh the guard, which also checks that the connection exists; `released`: for the last time.
    Beat { beat: u64, released: bool },
}

/// A report of a sender. Reports come in order.
pub enum Report {
    /// The node that it is about to connect to.
    Found(Address),
    /// It has logged in, and batches may be sent (at_least_once).
    Connected,
    /// It has logged in and has read this guard; a claim is expected.
    Guard(Box<Option<Guard>>),
    /// The guard is claimed.
    Claimed,
    /// For each event of [`Order::Look`], what was found.
    Seen(Vec<Sighting>),
    /// The result of the survey with this number.
    Surveyed(u64, Vec<Surveyed>),
    /// All replies of the oldest batch have come; the commands that were refused, by index. The buffer is returned.
    /// With exactly_once, if any were refused, it waits for [`Order::Resume`] and drops the batches that come before
    /// that.
    Done { refused: Vec<Refusal>, buffer: Vec<u8> },
    /// Nothing of the oldest batch was appended, because these commands of it were refused. It waits for
    /// [`Order::Resume`].
    Aborted { refused: Vec<Refusal>, buffer: Vec<u8> },
    /// The oldest batch is appended but not replicated yet; it continues to wait.
    Behind(Failure),
    /// The guard shows that its owner has left.
    Released,
    /// The connection has ended. `accepted`: how many replies of the oldest batch were read before that; `refused`:
    /// those of them that were errors. Everything else that was sent is in doubt.
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
    /// The new position in the guard; `None` leaves it unchanged.
    pub start: Option<Beginning>,
}

/// Where a new guard begins: as if an empty batch had been appended.
pub struct Beginning {
    pub number: u64,
    pub position: Position,
    /// Whether events behind it may already be in the streams.
    pub compares: bool,
    pub wal: u64,
    pub total: i64,
}
