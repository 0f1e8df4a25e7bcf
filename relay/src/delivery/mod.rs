//! The delivery of one backend: a state machine without I/O. The worker feeds it rows and reports, with the time and a
//! random number, and does what it asks: connect, send a batch, write down refused events, save the cursor.
//!
//! ```text
//!            retry_at reached        Connected, or claimed
//!   Down ──────────────────────▶ Connecting ─────────▶ Up ──▶ batches in flight, oldest first
//!    ▲                               │                  │ ▲
//!    └───────── Lost ◀───────────────┴──────────────────┤ │ what was refused is written down
//!               read := acked; what was in flight       ▼ │
//!               is read again                          Stopped (exactly_once: something was refused; read := acked)
//! ```
//! The table is the retry buffer: of anything in doubt, only the position is kept here.
//!
//! With at_least_once, batches are plain commands, several in flight at once: a reply that blames the backend, or a
//! lost connection, leaves the later ones in doubt. With exactly_once, a batch is appended completely or not at all,
//! and the guard names the last one by its number. So the next connection can always find out what became of the
//! batches in flight.
//!
//! - [`cut`] from the rows of a scan to batches; [`batch`] batches that are being built
//! - [`state`] the state of the connection; [`connection`] how it is opened, and what happens when it ends;
//!   [`attempts`] when it is tried again; [`backoff`]
//! - [`flight`] batches in flight; [`landing`] evaluates their replies; [`guarded`] the same with a guard
//! - [`refusal`] streams with refused events, [`waiting`] which of them is tried next, [`retries`] the interface to
//!   both; [`reread`] rows that are read again, [`ahead`] those of them that are not sent again
//! - [`former`] lanes of a cluster that are given up
//! - [`max_rate`] how many events a backend may send, [`pace`] and [`allowance`] what that means for its delivery

mod ahead;
mod allowance;
mod attempts;
pub mod backoff;
pub mod batch;
mod connection;
pub mod cut;
pub mod flight;
pub mod former;
mod guarded;
mod landing;
pub mod max_rate;
mod pace;
pub mod refusal;
mod reread;
mod retries;
mod state;
mod waiting;

use crate::consumers::readership::Readership;
use crate::delivery::ahead::Ahead;
use crate::delivery::allowance::Allowance;
use crate::delivery::attempts::Attempts;
use crate::delivery::backoff::Backoff;
use crate::delivery::flight::{Answered, BatchedEvent, Contents, Flight, WINDOW_BATCHES, WINDOW_BYTES, Window};
use crate::delivery::refusal::Streams;
use crate::delivery::reread::Reread;
use crate::delivery::state::ConnectionState;
pub use crate::delivery::state::State;
use crate::failure::{Class, Failure};
use crate::reading::range::Position;
use crate::reading::schedule::Supply;
use crate::time::Now;
use std::collections::VecDeque;
use std::rc::Rc;

/// How a backend's batches are appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guarantee {
    AtLeastOnce,
    ExactlyOnce,
}

/// The delivery of one backend; see the module's documentation.
pub struct Delivery {
    guarantee: Guarantee,
    /// The last batch that is known to be appended (exactly_once).
    number: u64,
    /// Batches of this connection have numbers above this.
    floor: u64,
    /// The next row is read from here.
    read: Position,
    /// Everything up to here was acknowledged (or written down as refused).
    acked: Position,
    flights: VecDeque<Flight>,
    in_flight_bytes: usize,
    /// The most bytes that may be in flight.
    window_bytes: usize,
    /// The same while memory is short: at first a single event, and twice as much after each batch.
    scarce_bytes: usize,
    /// The most batches that may be in flight. With exactly_once, a refusal stops all batches behind it, which are then
    /// read and sent again. So there is one batch after a refusal, and twice as many after each batch without one.
    window_batches: usize,
    connection: ConnectionState,
    attempts: Attempts,
    /// Why it is down; `None` after the next success.
    trouble: Option<Failure>,
    ahead: Ahead,
    streams: Streams,
    accepted: u64,
    /// Rows up to this number may have been written down by an earlier worker, or before Redis lost data.
    reread_to: i64,
    /// Rows that are being read again and may belong before events that wait.
    reread: Option<Reread>,
    /// Whether a stream is to be tried again as soon as nothing is in flight.
    makes_way: bool,
    /// What it may send now because of `max_rate`.
    allowance: Allowance,
    /// Batches that were sent at least in part and whose replies were never read. A guard that is ahead of what is
    /// known must name one of them. `None`: an earlier worker may have sent others (exactly_once).
    in_doubt: Option<Vec<(u64, Position)>>,
    /// The consumer groups of its streams, if a view or a setting needs them.
    readership: Option<Box<Readership>>,
}

/// What is saved of a delivery and given to the next one.
#[derive(Clone, Debug)]
pub struct Cursor {
    pub position: Position,
    /// The last batch that is known to be appended; 0: none.
    pub number: u64,
}

impl Delivery {
    /// A delivery at a saved cursor, without a connection, which is to be opened at once. `streams` are those in which
    /// refused events wait.
    pub fn new(guarantee: Guarantee, cursor: Cursor, streams: Streams, backoff: Backoff) -> Self {
        let Cursor {
            position: cursor,
            number,
        } = cursor;
        Self {
            guarantee,
            number,
            floor: 0,
            reread_to: 0,
            reread: None,
            makes_way: false,
            in_doubt: None,
            allowance: Allowance::default(),
            readership: None,
            read: cursor.clone(),
            acked: cursor,
            flights: VecDeque::new(),
            in_flight_bytes: 0,
            window_bytes: WINDOW_BYTES,
            scarce_bytes: usize::MAX,
            window_batches: WINDOW_BATCHES,
            connection: ConnectionState::Down { retry_at: Now::ZERO },
            attempts: Attempts::new(backoff),
            trouble: None,
            ahead: Ahead::default(),
            streams,
            accepted: 0,
        }
    }

    /// A shorter backoff also shortens waits that have begun.
    pub fn set_backoff(&mut self, backoff: Backoff, now: Now) {
        self.attempts.backoff = backoff;
        self.streams.hasten(|attempts| now + backoff.wait(attempts, 1.0));
    }

    /// A lane has a smaller window than a backend without lanes.
    pub fn set_window_bytes(&mut self, bytes: usize) {
        self.window_bytes = bytes;
    }

    /// There was no memory for its next events. From now on, one is sent alone, and then more and more again.
    pub fn lacks_memory(&mut self) {
        self.scarce_bytes = 1;
    }

    /// The most bytes that may be in flight now. A batch may be begun while any are left, so this may be one event.
    pub fn most_bytes(&self) -> usize {
        self.window_bytes.min(self.scarce_bytes)
    }

    /// Whether another node may replace a lost one. Then the wait for a failed node is short.
    pub fn set_follows(&mut self, follows: bool) {
        self.attempts.follows = follows;
    }

    pub fn guarantee(&self) -> Guarantee {
        self.guarantee
    }

    /// Sets the guarantee for the next connection.
    pub fn set_guarantee(&mut self, guarantee: Guarantee) {
        self.guarantee = guarantee;
    }

    /// All rows up to this position were accepted or are written down.
    fn ack(&mut self, position: Position) {
        self.acked = position;
        if self.reread.as_ref().is_some_and(|reread| reread.is_done(&self.acked)) {
            self.reread = None;
        }
    }

    /// Whether another batch may be handed to the sender.
    pub fn has_room(&self) -> bool {
        self.room().is_some()
    }

    /// How many batches, and of how many bytes, may be handed to the sender; `None`: none. A batch may be begun while
    /// any bytes are left, so that a single large event always fits.
    pub fn room(&self) -> Option<Window> {
        let room = self.room_but_for_pace()?;
        (room.events > 0).then_some(room)
    }

    fn room_but_for_pace(&self) -> Option<Window> {
        if self.makes_way || self.retries_alone() || self.is_held_back() {
            return None;
        }
        let room = self.window();
        (self.connection == ConnectionState::Up && room.batches > 0 && room.bytes > 0).then_some(room)
    }

    /// How much work its sender has. It decides whether its reader can wait for others, and whether reading is
    /// worthwhile.
    pub fn supply(&self) -> Supply {
        match self.connection {
            ConnectionState::Up => self.window().supply(),
            ConnectionState::Down { .. }
            | ConnectionState::Connecting
            | ConnectionState::Draining { .. }
            | ConnectionState::Stopped => Supply::Low,
        }
    }

    fn window(&self) -> Window {
        Window {
            batches: self.window_batches.saturating_sub(self.flights.len()),
            whole_batches: self.window_batches,
            bytes: self.most_bytes().saturating_sub(self.in_flight_bytes),
            whole_bytes: self.most_bytes(),
            events: self.allowance.for_rows(),
        }
    }

    pub fn is_idle(&self) -> bool {
        self.flights.is_empty()
    }

    /// The batch whose replies come next.
    pub fn oldest(&self) -> Option<Answered<'_>> {
        self.flights.front().map(|flight| Answered {
            entries: &flight.entries,
            bytes: flight.bytes,
            again: matches!(flight.contents, Contents::Waiting { .. }),
        })
    }

    /// Whether it waits for consumers, or until it is known what they have read.
    fn is_held_back(&self) -> bool {
        self.readership
            .as_ref()
            .is_some_and(|readership| readership.holds_back())
    }

    /// Whether an empty batch may be sent, which moves the guard on. It needs no room in any stream.
    pub fn may_send_empty(&self) -> bool {
        self.connection == ConnectionState::Up && self.flights.is_empty() && !self.makes_way
    }

    /// Whether its reader may pass rows of other backends while it does not send. A batch in flight ends at a position
    /// that was read, and while it connects, recovery relies on where it stands.
    pub fn may_pass_by(&self) -> bool {
        let is_settled = matches!(self.connection, ConnectionState::Up | ConnectionState::Down { .. });
        is_settled && self.flights.is_empty()
    }

    /// The readership, if its streams have limits.
    #[inline]
    fn limits(&self) -> Option<&Readership> {
        self.readership.as_deref().filter(|readership| readership.has_limits())
    }

    pub fn readership(&self) -> Option<&Readership> {
        self.readership.as_deref()
    }

    pub fn readership_mut(&mut self) -> Option<&mut Readership> {
        self.readership.as_deref_mut()
    }

    /// Starts or stops watching its streams.
    pub fn set_readership(&mut self, readership: Option<Readership>) {
        self.readership = readership.map(Box::new);
    }

    pub fn position(&self) -> &Position {
        &self.read
    }

    /// The position that may be saved when all records of [`Self::replied`] are written down.
    pub fn acked(&self) -> &Position {
        &self.acked
    }

    /// The number of events accepted since the start.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    pub fn trouble(&self) -> Option<&Failure> {
        let of_consumers = || self.readership.as_ref().and_then(|readership| readership.trouble());
        self.trouble.as_ref().or_else(of_consumers)
    }

    pub fn state(&self) -> State {
        match (self.trouble(), self.flights.is_empty()) {
            (Some(failure), _) if failure.class == Class::Configuration => State::Misconfigured,
            (Some(failure), _) if failure.class == Class::Fenced => State::Fenced,
            (Some(failure), _) if failure.class == Class::Copy => State::Copy,
            (Some(failure), _) if failure.class == Class::Full => State::Full,
            (Some(_), _) => State::Backoff,
            (None, true) if !self.is_paced() => State::Idle,
            (None, _) => State::Sending,
        }
    }

    /// When something is due without a report: the next attempt of the backend or of a stream.
    pub fn due_at(&self) -> Option<Now> {
        match self.connection {
            ConnectionState::Down { retry_at } => Some(retry_at),
            ConnectionState::Up if self.has_room() && !self.is_rereading() => self.streams.next_retry_at(),
            // A report will come.
            ConnectionState::Up
            | ConnectionState::Connecting
            | ConnectionState::Draining { .. }
            | ConnectionState::Stopped => None,
        }
    }

    /// A row was skipped, or parked and written down, according to [`Self::on_row`]. Must be called before
    /// [`Self::advanced`].
    pub fn skipped(&mut self, seq: i64) {
        self.ahead.skip(seq);
    }

    /// What to do with a row that was read.
    pub fn on_row(&self, seq: i64, stream: &str) -> RowFate {
        if self.ahead.contains(seq) {
            RowFate::Skip
        } else if self.streams.is_blocked(stream) {
            RowFate::Park
        } else {
            RowFate::Send
        }
    }

    /// The reader has reached `position`. Every row before it was sent, parked or skipped.
    pub fn advanced(&mut self, position: Position) {
        self.read = position;
        self.ahead.end_piece();
        self.ack_what_was_read();
    }

    /// A batch went to the sender. Streams in which no other event waits are no longer blocked: rows for them that are
    /// read from now on go behind the batch.
    pub fn sent(&mut self, entries: Vec<BatchedEvent>, contents: Contents, bytes: usize) {
        let aside = match &contents {
            Contents::Rows { .. } => self.ahead.take_aside(),
            Contents::Waiting { all } => {
                all.iter().for_each(|stream| self.streams.released(stream));
                Vec::new()
            }
        };
        self.allowance.spend(entries.len());
        if let Some(readership) = &mut self.readership {
            for run in entries.chunk_by(|a, b| Rc::ptr_eq(&a.stream, &b.stream)) {
                readership.sent(&run[0].stream, run.len() as i64);
            }
        }
        self.in_flight_bytes += bytes;
        self.flights.push_back(Flight {
            entries,
            contents,
            bytes,
            aside,
        });
    }

    /// A survey was answered, so the connection works. Returns whether there was a failure before.
    pub fn has_answered(&mut self) -> bool {
        let works = self.connection == ConnectionState::Up && self.flights.is_empty();
        if works {
            self.attempts.succeeded();
        }
        works && self.trouble.take().is_some()
    }

    /// Called when nothing is left to read and nothing is in flight, so that there is no failure any more. Returns
    /// whether there was one before. `is_all_read`: there are no further rows that may not be read yet and may be
    /// written down.
    pub fn rest(&mut self, is_all_read: bool) -> bool {
        let is_calm = self.streams.next_retry_at().is_none() && self.streams.to_fail(1).is_empty();
        // Whoever waits for a survey has not shown yet that its connection works.
        let is_free = is_calm && !self.is_held_back();
        let rests = self.connection == ConnectionState::Up && self.flights.is_empty() && is_free;
        if rests {
            self.attempts.succeeded();
        }
        if rests && is_all_read {
            self.ahead.clear();
            (self.reread_to, self.reread) = (0, None);
        }
        rests && self.trouble.take().is_some()
    }
}

/// What to do with a row that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFate {
    Send,
    /// Park it: refused events wait in its stream, and it waits behind them.
    Park,
    /// Skip it: it is already in the stream.
    Skip,
}
