//! What a recovery reads and writes outside of itself. The extension implements it on its tables, the simulation on a
//! model of them.

use crate::delivery::refusal::Record;
use crate::delivery::{Cursor, Delivery};
use crate::event::wanted::{Purpose, Wanted};
use crate::failure::Failure;
use crate::guard::claim::{Claimant, Why};
use crate::guard::{Guard, Owner};
use crate::reading::range::{Key, Position, Table};
use crate::reading::snapshot::Tick;
use crate::sender::orders::Order;
use std::sync::Arc;
use std::time::Duration;

/// An event that may already be in its stream.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub seq: i64,
    /// Whether it was refused before, and waits in the table of refused events.
    pub waits: bool,
    pub wanted: Wanted,
}

/// What is logged for the administrator.
pub enum Notice<'a> {
    /// Redis has lost what it had acknowledged after this guard.
    Heals(&'a Guard),
    /// The guard is missing, and all retained events are sent again.
    Replays,
    /// Events were looked for: `found` of them are in their streams, `missing` are not.
    Compared {
        why: Why,
        guard: Option<&'a Guard>,
        found: usize,
        missing: usize,
    },
}

/// One backend's persistent state, and what else a recovery needs from the worker.
pub trait Books {
    /// The reason why a transaction failed.
    type Error;
    /// The tables, as one transaction sees them.
    type Rows<'a>: Rows
    where
        Self: 'a;

    fn delivery(&mut self) -> &mut Delivery;
    /// What is known about this server, to judge the guard.
    fn claimant(&mut self, guard: Option<&Guard>) -> Result<Claimant<'_>, Self::Error>;
    /// How this server describes itself in the guard.
    fn owner(&self) -> Owner;
    /// A new token for a claim.
    fn token(&mut self) -> String;
    /// The total of events that Redis has accepted.
    fn total(&self) -> i64;
    /// The newest tick, even if its events may not be sent yet.
    fn newest_tick(&mut self) -> Arc<Tick>;
    /// The position up to which events have been purged.
    fn oldest(&mut self) -> Result<Position, Self::Error>;
    /// The guard, with the bounds of its positions checked against this server's table.
    fn vouched(&mut self, guard: Guard) -> Result<Guard, Self::Error>;
    /// Runs `f` in one transaction. Runs it a second time, row by row, if a row could not be read.
    fn in_tables<R>(&mut self, f: impl FnMut(&mut Self::Rows<'_>) -> R) -> Result<R, Self::Error>;

    /// Begins a new epoch. `claimed`: the epoch of the guard that is being claimed; 0 if no guard is known.
    fn begin_epoch(&mut self, claimed: u64);
    /// Queues a record for the next save.
    fn record(&mut self, record: Record);
    /// Saves the queued records, the counters and the cursor.
    fn save(&mut self) -> Result<(), Self::Error>;
    /// Makes it durable. Returns the position up to which the WAL is flushed.
    fn flush(&mut self) -> u64;
    /// Events that waited and were accepted after batch `since` wait again. This is durable on return.
    fn wait_again(&mut self, since: u64) -> Result<(), Self::Error>;
    /// Adopts a position that the guard had reached and this server had not. `total`: events accepted up to it.
    fn adopt(&mut self, cursor: Cursor, total: i64);
    /// Moves the backend back to `cursor`. Rows up to number `reread_to` may be written down as refused or failed.
    fn read_again(&mut self, cursor: Cursor, reread_to: i64);
    fn count_healing(&mut self);
    fn tell(&mut self, notice: Notice<'_>);

    /// Whether a dump was restored whose events were not compared yet.
    fn is_restored(&self) -> bool;
    /// All events that this tick sees are about to be compared with the streams.
    fn compares_to(&mut self, tick: &Arc<Tick>);
    /// The comparison is done.
    fn has_compared(&mut self) -> Result<(), Self::Error>;
    /// Notes that a take-over, if one was asked for, is done.
    fn has_taken_over(&mut self) -> Result<(), Self::Error>;

    fn order(&mut self, order: Order);
    /// This field of the guard cannot be ours: the backend becomes misconfigured, and the connection is closed.
    fn disbelieve(&mut self, field: &str);
    /// Another server owns the guard, or it is missing: closes the connection until `retry_after` has passed.
    fn hold_off(&mut self, failure: Failure, retry_after: Duration);
    /// Closes the connection. The next one begins a new recovery.
    fn let_go(&mut self);
    /// The backend is up: events may be sent.
    fn come_up(&mut self) -> Result<(), Self::Error>;

    /// How many waiting events are looked for at a time. All of them are looked for, in steps.
    fn waiting_at_once(&self) -> usize {
        100_000
    }
    /// How many events after the own position are compared at most.
    fn most_compared(&self) -> usize {
        100_000
    }
}

/// The tables, as one transaction sees them.
pub trait Rows {
    type Table: Table;

    /// Opens the table of events.
    fn open(&mut self) -> Self::Table;
    fn close(&mut self, table: Self::Table);
    /// How to look for the event at the scan's current row. `own_stream`: where it stands if its row names no stream;
    /// `None`: in the backend's own, as it is now. `None`: it belongs to another backend, or its stream cannot be read.
    fn wanted(&self, scan: &<Self::Table as Table>::Scan, purpose: Purpose, own_stream: Option<&str>)
    -> Option<Wanted>;

    /// Whether the event at the scan's row was in its stream before and is being appended again (`outbox.replay()`).
    fn is_replay(&self, _scan: &<Self::Table as Table>::Scan) -> bool {
        false
    }

    /// The row of the event with this id, and when it was published, if this backend has it and no other backend does.
    fn published(&mut self, event_id: [u8; 16]) -> Option<(Key, i64)>;

    /// The numbers of refused events above `after`, in order, at most `limit`. They include those of other lanes.
    fn waiting(&mut self, after: i64, limit: usize) -> Vec<i64>;
    /// Which of these events still wait.
    fn still_waiting(&mut self, seqs: &[i64]) -> Vec<i64>;
    /// The highest number among this backend's events that were refused, have failed, or were accepted out of turn.
    fn highest_written_down(&mut self) -> i64;
    /// Whether this event is one of those.
    fn is_written_down(&mut self, seq: i64, wanted: &Wanted) -> bool;
}
