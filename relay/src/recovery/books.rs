//! What a recovery asks of the outside, and all that it writes down: the extension's books are tables, the simulation's
//! a model of them.

use crate::delivery::refusal::Record;
use crate::delivery::{Cursor, Delivery};
use crate::event::wanted::{Purpose, Wanted};
use crate::failure::Failure;
use crate::guard::claim::{Claimant, Why};
use crate::guard::{Guard, Owner};
use crate::reading::range::{Position, Table};
use crate::reading::snapshot::Tick;
use crate::sender::orders::Order;
use std::sync::Arc;
use std::time::Duration;

/// An event that may stand in its stream already.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub seq: i64,
    /// It had been refused, and waits.
    pub waits: bool,
    pub wanted: Wanted,
}

/// What an administrator is to be told.
pub enum Notice<'a> {
    /// Redis has lost what it had acknowledged after this guard.
    Heals(&'a Guard),
    /// The guard is missing, and all that is retained is sent again.
    Replays,
    /// Events were looked for: so many stand in their streams, so many do not.
    Compared {
        why: Why,
        guard: Option<&'a Guard>,
        found: usize,
        missing: usize,
    },
}

/// A backend's books, and the rest that a recovery needs of its worker.
pub trait Books {
    /// Why something could not be read or written.
    type Error;
    /// The tables within one transaction.
    type Rows<'a>: Rows
    where
        Self: 'a;

    fn delivery(&mut self) -> &mut Delivery;
    /// Who judges this guard.
    fn claimant(&mut self, guard: Option<&Guard>) -> Result<Claimant<'_>, Self::Error>;
    /// What the guard is to say of its owner.
    fn owner(&self) -> Owner;
    /// A name for a claim that nobody has used.
    fn token(&mut self) -> String;
    /// Events that were accepted in all.
    fn total(&self) -> i64;
    /// The newest tick, also one whose events may not be sent yet.
    fn newest_tick(&mut self) -> Arc<Tick>;
    /// Up to where events have been purged.
    fn oldest(&mut self) -> Result<Position, Self::Error>;
    /// The guard, with bounds of its positions that hold in this run of the server.
    fn vouched(&mut self, guard: Guard) -> Result<Guard, Self::Error>;
    /// Runs `f` in one transaction; once more if a row could not be read.
    fn in_tables<R>(&mut self, f: impl FnMut(&mut Self::Rows<'_>) -> R) -> Result<R, Self::Error>;

    /// Counts this claim, which comes after one in the name of epoch `claimed`; 0: after none that is known of.
    fn begin_epoch(&mut self, claimed: u64);
    /// To be written down with the next save.
    fn record(&mut self, record: Record);
    /// Writes down records, counters and cursor.
    fn save(&mut self) -> Result<(), Self::Error>;
    /// Makes durable what was written. Returns up to where the WAL is flushed.
    fn flush(&mut self) -> u64;
    /// Waiting events that were accepted after batch `since` wait again, durably.
    fn wait_again(&mut self, since: u64) -> Result<(), Self::Error>;
    /// The guard speaks of batches that nobody has heard of; `total`: events up to them.
    fn adopt(&mut self, cursor: Cursor, total: i64);
    /// The backend goes back to `cursor`; rows up to `reread_to` may be written down.
    fn read_again(&mut self, cursor: Cursor, reread_to: i64);
    fn count_healing(&mut self);
    fn tell(&mut self, notice: Notice<'_>);

    /// Whether events of a dump have come that were not looked for yet.
    fn is_restored(&self) -> bool;
    /// What this tick sees is going to be looked for.
    fn compares_to(&mut self, tick: &Arc<Tick>);
    /// All of it was.
    fn has_compared(&mut self) -> Result<(), Self::Error>;
    /// A take-over that somebody has asked for is done.
    fn has_taken_over(&mut self) -> Result<(), Self::Error>;

    fn order(&mut self, order: Order);
    /// Somebody else has written this field of the guard: lets go.
    fn disbelieve(&mut self, field: &str);
    /// Somebody else owns the guard, or there should be one: lets go, for a while.
    fn hold_off(&mut self, failure: Failure, retry_after: Duration);
    /// Begins anew with another connection.
    fn let_go(&mut self);
    /// The guard is ours, and all that it says was taken in.
    fn come_up(&mut self) -> Result<(), Self::Error>;

    /// Waiting events that are looked for at a time: all are, piece by piece.
    fn waiting_at_once(&self) -> usize {
        100_000
    }
    /// Events behind the own position that are looked for at most.
    fn most_compared(&self) -> usize {
        100_000
    }
}

/// The tables, as seen by one transaction.
pub trait Rows {
    type Table: Table;

    /// Opens the table of events.
    fn open(&mut self) -> Self::Table;
    fn close(&mut self, table: Self::Table);
    /// How the event that a scan stands on is looked for; `None`: it is not this backend's, or its stream cannot be
    /// read.
    fn wanted(&self, scan: &<Self::Table as Table>::Scan, purpose: Purpose) -> Option<Wanted>;

    /// Events that wait as refused and have a number above `after`, in order, so many at most. Also those of other
    /// lanes.
    fn waiting(&mut self, after: i64, limit: usize) -> Vec<i64>;
    /// Those of these that still wait.
    fn still_waiting(&mut self, seqs: &[i64]) -> Vec<i64>;
    /// No event of the backend that was refused, failed, or accepted out of turn has a higher number.
    fn highest_written_down(&mut self) -> i64;
    /// Whether this event is one of them.
    fn is_written_down(&mut self, seq: i64, wanted: &Wanted) -> bool;
}
