//! The delivery of one backend: a state machine without I/O. The worker feeds it rows and reports with the time and a
//! random number, and does what it asks: connect, send a batch, write down what was refused, save the cursor.
//!
//! ```text
//!            retry_at reached        Connected, or claimed
//!   Down ──────────────────────▶ Connecting ─────────▶ Up ──▶ batches in flight, oldest first
//!    ▲                               │                  │ ▲
//!    └───────── Lost ◀───────────────┴──────────────────┤ │ what was refused is written down
//!               read := acked; what was in flight       ▼ │
//!               is read again                          Stopped (exactly_once: something was refused; read := acked)
//! ```
//! The table is the retry buffer: nothing that is unsure is kept here but its position.
//!
//! With at_least_once batches are plain commands, several on their way at once: a reply that blames the backend, or a lost
//! connection, leaves those behind it in doubt. With exactly_once a batch is appended whole or not at all and the guard
//! says which was the last, by its number; so what is in flight is never in doubt for longer than it takes to ask.

pub mod backoff;
pub mod flight;
mod guarded;
pub mod refusal;
mod reread;
mod waiting;

use crate::delivery::backoff::Backoff;
use crate::delivery::flight::BatchedEvent;
use crate::delivery::flight::Window;
use crate::delivery::flight::{Contents, Flight, WINDOW_BYTES, streams_of};
use crate::delivery::flight::{Refusal, WINDOW_BATCHES, is_backends};
use crate::delivery::refusal::{Record, Retry, Streams};
use crate::delivery::reread::Reread;
use crate::failure::{Class, Failure};
use crate::reading::range::Position;
use crate::reading::schedule::Supply;
use crate::time::Now;
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;
use std::time::Duration;

/// How a backend's batches are appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guarantee {
    AtLeastOnce,
    ExactlyOnce,
}

/// Configuration errors wait this many times longer than outages: somebody has to mend something first.
const CONFIGURATION_PATIENCE: u32 = 5;

/// A backend whose node may change looks for the new one this often at least,
const LOOK_UP_WAIT: Duration = Duration::from_secs(1);
/// for so many failures in a row: a failover takes seconds. Then it is an outage like any other.
const HASTY_FAILURES: u32 = 100;

/// Attempts that somebody asks for are at least so far apart.
const ASKED_PAUSE: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ConnectionState {
    Down {
        retry_at: Now,
    },
    Connecting,
    Up,
    /// A reply blamed the backend: collect the replies that are still to come, then go down.
    Draining {
        retry_at: Now,
    },
    /// Something was refused: that must be written down before another batch is sent.
    Stopped,
}

/// What a user sees as `state` in `outbox.backend_status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Idle,
    Sending,
    Backoff,
    Misconfigured,
    Fenced,
    Copy,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Sending => "sending",
            Self::Backoff => "backoff",
            Self::Misconfigured => "misconfigured",
            Self::Fenced => "fenced",
            Self::Copy => "copy",
        }
    }
}

/// See the module's text.
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
    /// So many may be.
    window_bytes: usize,
    connection: ConnectionState,
    /// Failures of the backend in a row.
    failures: u32,
    /// When it is next tried, or was, because somebody had asked.
    asked_at: Option<Now>,
    /// When it would be tried if nobody had.
    unasked: Option<Now>,
    /// Why it is down; `None` after the next success.
    trouble: Option<Failure>,
    /// Rows after `acked` that are not to be sent if they are read again: accepted all the same (the backend refused one
    /// between), or written down. They are forgotten once `acked` has passed them.
    ahead: BTreeSet<i64>,
    /// Those of them that were read since the last batch: before the piece at hand, and in it.
    aside: Vec<i64>,
    piece: Vec<i64>,
    /// Those of `ahead` that were found in their streams. Nobody has written that down, so whoever claims next must look again.
    found: BTreeSet<i64>,
    streams: Streams,
    backoff: Backoff,
    /// Another node may take the place of one that is gone.
    follows: bool,
    published: u64,
    /// Rows up to this number may have been written down in an earlier life, or before Redis lost something.
    reread_to: i64,
    /// Rows are read again that may belong before events that wait.
    reread: Option<Reread>,
    /// A stream is to be tried again, which waits for what is in flight.
    makes_way: bool,
    /// Batches that were sent, or begun with, and of which nobody has heard: where a guard that says more than is known must stand. `None`: others of
    /// our name may have sent some, too (exactly_once).
    in_doubt: Option<Vec<(u64, Position)>>,
}

/// What is saved of a delivery, and given to the next.
#[derive(Clone, Debug)]
pub struct Cursor {
    pub position: Position,
    /// The last batch that is known to be appended; 0: none.
    pub number: u64,
}

impl Delivery {
    /// Starts down, to connect at once, at a saved cursor and with the streams that have refused events waiting.
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
            read: cursor.clone(),
            acked: cursor,
            flights: VecDeque::new(),
            in_flight_bytes: 0,
            window_bytes: WINDOW_BYTES,
            connection: ConnectionState::Down { retry_at: Now::ZERO },
            failures: 0,
            asked_at: None,
            unasked: None,
            trouble: None,
            ahead: BTreeSet::new(),
            aside: Vec::new(),
            piece: Vec::new(),
            found: BTreeSet::new(),
            streams,
            backoff,
            follows: false,
            published: 0,
        }
    }

    /// Shorter waits count for what waits already.
    pub fn set_backoff(&mut self, backoff: Backoff, now: Now) {
        self.backoff = backoff;
        self.streams.hasten(|attempts| now + backoff.wait(attempts, 1.0));
    }

    /// One of many has less on its way.
    pub fn set_window_bytes(&mut self, bytes: usize) {
        self.window_bytes = bytes;
    }

    /// Whether another node may take the place of one that is gone: then it is not waited for long.
    pub fn set_follows(&mut self, follows: bool) {
        self.follows = follows;
    }

    /// It is due, but there is no room for its connection.
    pub fn waits_for_room(&mut self, failure: Failure) {
        self.trouble = Some(failure);
    }

    /// Somebody has asked for an attempt: there is one, but not more than one each second, and if it fails the wait goes on as if nobody had.
    pub fn retry_asked(&mut self, now: Now) {
        let ConnectionState::Down { retry_at } = &mut self.connection else {
            return;
        };
        let at = self.asked_at.map_or(now, |last| now.max(last + ASKED_PAUSE));
        if at < *retry_at {
            self.unasked = self.unasked.or(Some(*retry_at));
            (self.asked_at, *retry_at) = (Some(at), at);
        }
    }

    /// The settings changed: forget the wait.
    pub fn retry_now(&mut self) {
        self.unasked = None;
        if let ConnectionState::Down { retry_at } = &mut self.connection {
            *retry_at = Now::ZERO;
        }
    }

    /// Whether a sender is to be started now.
    pub fn wants_connection(&self, now: Now) -> bool {
        matches!(self.connection, ConnectionState::Down { retry_at } if retry_at <= now)
    }

    /// When that will be, if it is down.
    pub fn connects_at(&self) -> Option<Now> {
        match self.connection {
            ConnectionState::Down { retry_at } => Some(retry_at),
            ConnectionState::Connecting
            | ConnectionState::Up
            | ConnectionState::Draining { .. }
            | ConnectionState::Stopped => None,
        }
    }

    pub fn connecting(&mut self) {
        self.connection = ConnectionState::Connecting;
    }

    /// It should be up by now, but its sender has not failed either: somebody answers, slowly or much. False: that is not so.
    pub fn takes_long(&mut self, failure: Failure) -> bool {
        let is_so = self.connection == ConnectionState::Connecting;
        if is_so {
            self.trouble.get_or_insert(failure);
        }
        is_so
    }

    /// Logged in, and with exactly_once: the guard is ours, and what it says was taken in.
    pub fn connected(&mut self) {
        self.unasked = None;
        self.connection = ConnectionState::Up;
    }

    pub fn is_up(&self) -> bool {
        matches!(self.connection, ConnectionState::Up | ConnectionState::Stopped)
    }

    pub fn guarantee(&self) -> Guarantee {
        self.guarantee
    }

    /// For the next connection.
    pub fn set_guarantee(&mut self, guarantee: Guarantee) {
        self.guarantee = guarantee;
    }

    /// All up to here is settled.
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

    /// How many batches, and of how many bytes, may be handed to the sender; `None`: not one. A batch may be begun while any
    /// bytes are left, so that a single large event always fits.
    pub fn room(&self) -> Option<Window> {
        if self.makes_way || self.retries_alone() {
            return None;
        }
        let room = self.window();
        (self.connection == ConnectionState::Up && room.batches > 0 && room.bytes > 0).then_some(room)
    }

    /// How much its sender has to do: whether its reader can wait for others, and whether reading is worth it.
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
            batches: WINDOW_BATCHES.saturating_sub(self.flights.len()),
            bytes: self.window_bytes.saturating_sub(self.in_flight_bytes),
        }
    }

    pub fn is_idle(&self) -> bool {
        self.flights.is_empty()
    }

    pub fn position(&self) -> &Position {
        &self.read
    }

    /// Where the cursor may be saved, once all that [`Self::replied`] told to record is recorded.
    pub fn acked(&self) -> &Position {
        &self.acked
    }

    /// Accepted since the start.
    pub fn published(&self) -> u64 {
        self.published
    }

    pub fn trouble(&self) -> Option<&Failure> {
        self.trouble.as_ref()
    }

    pub fn state(&self) -> State {
        match (&self.trouble, self.flights.is_empty()) {
            (Some(failure), _) if failure.class == Class::Configuration => State::Misconfigured,
            (Some(failure), _) if failure.class == Class::Fenced => State::Fenced,
            (Some(failure), _) if failure.class == Class::Copy => State::Copy,
            (Some(_), _) => State::Backoff,
            (None, false) => State::Sending,
            (None, true) => State::Idle,
        }
    }

    /// When something is due without any report: the next attempt of the backend or of a stream.
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

    pub fn streams(&self) -> &Streams {
        &self.streams
    }

    /// Settings of the backend changed what its streams are called, or failed events were taken away.
    pub fn set_streams(&mut self, mut streams: Streams) {
        streams.go_on_from(&self.streams);
        self.streams = streams;
        self.mark_retries();
    }

    /// What is being tried again is not tried once more at the same time.
    fn mark_retries(&mut self) {
        for stream in self.flights.iter().flat_map(Flight::retried) {
            self.streams.retrying(&stream);
        }
    }

    /// Streams whose waiting events are to be tried again now in one batch, and how many of each: of those whose head is not accepted yet,
    /// that alone, and as many streams as `heads` says; `followers` of the others. Empty: none. What is not sent is to be told to
    /// [`Self::stream_cleared`] or [`Self::stream_put_back`].
    pub fn streams_to_retry(&mut self, now: Now, heads: usize, followers: usize) -> Vec<Retry> {
        if self.connection == ConnectionState::Up
            && !self
                .flights
                .iter()
                .any(|f| matches!(f.contents, Contents::Waiting { .. }))
        {
            self.streams.retried(now);
        }
        if self.is_rereading() {
            return Vec::new();
        }
        if self.guarantee == Guarantee::ExactlyOnce && !self.flights.is_empty() {
            self.makes_way = self.streams.next_retry_at().is_some_and(|at| at <= now);
            return Vec::new();
        }
        self.makes_way = false;
        if !self.has_room() {
            return Vec::new();
        }
        self.streams.due(now, heads, followers)
    }

    /// There was no room for events of this stream: they are tried again with the next.
    pub fn stream_put_back(&mut self, stream: &Rc<str>) {
        self.streams.rests(stream);
    }

    /// Streams whose head has failed, at most `count`, with the reason: all that waits in them is to fail, once all records are written
    /// down, and then [`Self::stream_failed`] is to be told.
    pub fn streams_to_fail(&self, count: usize) -> Vec<(Rc<str>, Rc<str>)> {
        self.streams.to_fail(count)
    }

    /// All that waited in this stream has failed, durably: what comes has one attempt.
    pub fn stream_failed(&mut self, stream: &Rc<str>) {
        self.streams.failed(stream);
    }

    /// No event of this stream waits any more.
    pub fn stream_cleared(&mut self, stream: &Rc<str>) {
        self.streams.cleared(stream);
    }

    /// The waiting events of a stream could not be read: they are tried again later.
    pub fn retry_failed(&mut self) {
        self.streams.abandon();
        self.mark_retries();
    }

    /// A row was read and skipped, or parked and written down, as [`Self::on_row`] said. To be told before [`Self::advanced`].
    pub fn skipped(&mut self, seq: i64) {
        self.ahead.insert(seq);
        self.piece.push(seq);
    }

    /// What to do with a row that was read.
    pub fn on_row(&self, seq: i64, stream: &str) -> RowFate {
        if self.ahead.contains(&seq) {
            RowFate::Skip
        } else if self.streams.is_blocked(stream) {
            RowFate::Park
        } else {
            RowFate::Send
        }
    }

    /// The reader has come to `position`, and every row before it was handed over by [`Self::sent`], parked or skipped.
    pub fn advanced(&mut self, position: Position) {
        self.read = position;
        self.aside.append(&mut self.piece);
        self.settle();
    }

    /// A batch went to the sender. Streams of which no other event waits are not blocked any more: what is read of them from now on goes
    /// behind the batch.
    pub fn sent(&mut self, entries: Vec<BatchedEvent>, contents: Contents, bytes: usize) {
        let aside = match &contents {
            Contents::Rows { .. } => std::mem::take(&mut self.aside),
            Contents::Waiting { all } => {
                all.iter().for_each(|stream| self.streams.released(stream));
                Vec::new()
            }
        };
        self.in_flight_bytes += bytes;
        self.flights.push_back(Flight {
            entries,
            contents,
            bytes,
            aside,
        });
    }

    /// All replies of the oldest batch are there. Returns what must be recorded before the cursor is saved.
    pub fn replied(&mut self, refused: Vec<Refusal>, now: Now, random: f64) -> Vec<Record> {
        let Some(flight) = self.flights.pop_front() else {
            return Vec::new();
        };
        self.in_flight_bytes -= flight.bytes;
        if self.guarantee == Guarantee::ExactlyOnce {
            return self.appended(flight, refused, now, random);
        }
        let count = flight.entries.len();
        let blamed = refused.iter().find(|r| is_backends(r)).map(|r| r.1.clone());
        let records = self.land(flight, count, refused, now, random);
        match blamed {
            Some(failure) if self.connection == ConnectionState::Up => {
                let retry_at = self.failed(failure, now, random);
                self.connection = ConnectionState::Draining { retry_at };
            }
            None if self.connection == ConnectionState::Up => {
                self.failures = 0;
                self.trouble = None;
            }
            // Replies that were still to come after the first that blamed the backend.
            Some(_) | None => {}
        }
        self.settle();
        records
    }

    /// Whether the sender is to be let go: its last reply blamed the backend and no more are to come.
    pub fn is_drained(&self) -> bool {
        matches!(self.connection, ConnectionState::Draining { .. }) && self.flights.is_empty()
    }

    /// Goes down after [`Self::is_drained`].
    pub fn drained(&mut self) {
        if let ConnectionState::Draining { retry_at } = self.connection {
            self.go_down(retry_at);
        }
    }

    /// The connection ended, after `accepted` replies of the oldest batch, of which some `refused`.
    pub fn lost(
        &mut self,
        failure: Failure,
        accepted: usize,
        refused: Vec<Refusal>,
        now: Now,
        random: f64,
    ) -> Vec<Record> {
        self.doubt_flights();
        let records = match self.flights.pop_front() {
            Some(flight) => self.land(flight, accepted, refused, now, random),
            None => Vec::new(),
        };
        // A connection that had worked may just have been closed for idling: look again at once, but only once.
        let fresh = self.failures == 0 && self.connection == ConnectionState::Up && failure.class == Class::Backend;
        let retry_at = self.failed(failure, now, random);
        if fresh {
            self.trouble = None;
        }
        self.go_down(if fresh { now } else { retry_at });
        records
    }

    /// Nothing is left to read or in flight, and it is connected: all is well. True if that is news. `is_all_read`: nor are there rows that
    /// may not be read yet, of which something may be known.
    pub fn rest(&mut self, is_all_read: bool) -> bool {
        let is_calm = self.streams.next_retry_at().is_none() && self.streams.to_fail(1).is_empty();
        let rests = self.connection == ConnectionState::Up && self.flights.is_empty() && is_calm;
        if rests {
            self.failures = 0;
        }
        if rests && is_all_read {
            self.ahead.clear();
            self.found.clear();
            (self.reread_to, self.reread) = (0, None);
        }
        rests && self.trouble.take().is_some()
    }

    /// The worker lets the sender go (settings changed, backend disabled): what is in flight is in doubt.
    pub fn abandon(&mut self) {
        self.doubt_flights();
        self.go_down(Now::ZERO);
    }

    /// The backend stands for another server now: what was wrong with the former one says nothing.
    pub fn forget_trouble(&mut self) {
        self.trouble = None;
        self.failures = 0;
        self.unasked = None;
    }

    fn failed(&mut self, failure: Failure, now: Now, random: f64) -> Now {
        if let Some(unasked) = self.unasked.take().filter(|at| *at > now) {
            self.trouble = Some(failure);
            return unasked;
        }
        self.failures = self.failures.saturating_add(1);
        let patience = if failure.class == Class::Configuration {
            CONFIGURATION_PATIENCE
        } else {
            1
        };
        let mut wait = self.backoff.wait(self.failures, random) * patience;
        if self.follows && failure.class == Class::Backend && self.failures <= HASTY_FAILURES {
            wait = wait.min(LOOK_UP_WAIT);
        }
        self.trouble = Some(failure);
        now + wait.min(self.backoff.max_delay.max(self.backoff.delay))
    }

    fn go_down(&mut self, retry_at: Now) {
        self.rewind();
        self.connection = ConnectionState::Down { retry_at };
    }

    /// Reads on from what was acknowledged; what is in flight, if anything, is none of ours any more.
    fn rewind(&mut self) {
        for flight in self.flights.drain(..) {
            for stream in flight.retried() {
                self.streams.waits_again(&stream);
            }
        }
        self.aside.clear();
        self.piece.clear();
        self.in_flight_bytes = 0;
        self.read = self.acked.clone();
        self.streams.abandon();
        self.makes_way = false;
    }

    /// Takes the first `known` results of a flight: moves the cursor over what is settled, remembers what was accepted beyond
    /// a gap, and says what to record.
    fn land(&mut self, flight: Flight, known: usize, refused: Vec<Refusal>, now: Now, random: f64) -> Vec<Record> {
        let whole = known == flight.entries.len() && !refused.iter().any(is_backends);
        let mut records = Vec::new();
        let mut refused = refused.into_iter().peekable();
        let (again, ends_range) = match &flight.contents {
            Contents::Rows { end } => (false, end.under_way.is_none()),
            Contents::Waiting { .. } => (true, false),
        };
        // Set at the first entry that is not settled; the cursor cannot pass it. No position stands for a part of a batch
        // that ends with its range.
        let mut gap = matches!(self.connection, ConnectionState::Draining { .. }) || (!whole && ends_range);
        let mut settled: Option<i64> = None;
        for (index, entry) in flight.entries.iter().enumerate().take(known) {
            match refused.next_if(|r| r.0 == index) {
                None => {
                    self.published += 1;
                    records.extend(self.streams.accepted(entry, again));
                }
                Some((_, failure)) if failure.class != Class::Event => {
                    gap = true;
                    continue;
                }
                Some((_, failure)) => records.push(self.refused(entry, again, &failure, now, random)),
            }
            if !gap {
                settled = Some(entry.seq);
            } else if !again {
                self.ahead.insert(entry.seq);
            }
        }
        match flight.contents {
            Contents::Waiting { .. } => {
                for stream in streams_of(&flight.entries) {
                    self.streams.end_retry(&stream);
                    if !whole {
                        self.streams.waits_again(&stream);
                    }
                }
            }
            Contents::Rows { end } if whole && !gap => {
                self.ack(end);
                for seq in &flight.aside {
                    self.ahead.remove(seq);
                    self.found.remove(seq);
                }
            }
            Contents::Rows { end } => {
                if let (Some(seq), Some(under_way)) = (settled, end.under_way) {
                    self.ack(Position::towards(end.from, under_way.to, seq));
                }
            }
        }
        records
    }

    fn refused(&mut self, entry: &BatchedEvent, again: bool, failure: &Failure, now: Now, random: f64) -> Record {
        let backoff = &self.backoff;
        let wait = |attempt| backoff.wait(attempt, random);
        self.streams.refused(entry, again, failure, now, wait)
    }

    /// With nothing in flight, all that was read is settled.
    fn settle(&mut self) {
        let rows_in_flight = self.flights.iter().any(|f| matches!(f.contents, Contents::Rows { .. }));
        if !rows_in_flight && !matches!(self.connection, ConnectionState::Draining { .. }) {
            self.ack(self.read.clone());
            for seq in self.aside.drain(..) {
                self.ahead.remove(&seq);
                self.found.remove(&seq);
            }
        }
    }
}

/// What becomes of a row that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFate {
    Send,
    /// Its stream has refused events waiting: it waits behind them.
    Park,
    /// It is in the stream already.
    Skip,
}
