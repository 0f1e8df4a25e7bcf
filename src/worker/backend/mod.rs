//! One backend within the worker, or one of its lanes.
//!
//! - [`duty`] why it is there: to send, to find lanes, to fail events; [`connection`] where its Redis is, and the
//!   sender
//! - [`settings`] from its row to its destination; [`changes`] of them; [`copy`] when it must not connect
//! - [`hearing`] what its sender reports; [`guarded`] what it does because of its guard; [`lanes`] of a cluster
//! - [`entries`] from events to entries, and [`preview`] of one; [`books`] what is not saved yet, and [`saving`] it
//! - [`heads`] where the waiting events of its refused streams begin
//! - [`metered`] what was counted for `outbox.metrics`, and [`metering`] it
//! - [`surveying`] the consumer groups of its streams; [`surveyed`] what is saved of the results
//! - [`restored`] the state of restored events, [`comparing`] them; [`logged`] what was logged, and [`logging`]
//! - [`take_over`] what it knows of an administrator's orders, [`taking_over`] on these

pub(crate) mod books;
mod changes;
mod comparing;
pub(crate) mod connection;
mod copy;
pub(crate) mod duty;
mod entries;
mod guarded;
pub(crate) mod heads;
mod hearing;
pub(crate) mod lanes;
mod logged;
mod logging;
mod metered;
mod metering;
mod preview;
mod restored;
pub(crate) mod saving;
mod settings;
mod surveyed;
mod surveying;
mod take_over;
pub(crate) mod taking_over;

pub(crate) use settings::{Home, destination_to_test};

use crate::server::guc;
use crate::tables::backends::BackendRow;
use crate::tables::cursors::Standing;
use crate::tables::numbers;
use crate::tables::options::Options;
use crate::tables::{backends, cursors, refused, ticks};
use crate::worker::backend::books::Books;
use crate::worker::backend::connection::Connection;
use crate::worker::backend::duty::Duty;
use crate::worker::backend::entries::Entries;
use crate::worker::backend::heads::Heads;
use crate::worker::backend::logged::Logged;
use crate::worker::backend::metered::Metered;
use crate::worker::backend::restored::Restored;
use crate::worker::backend::surveyed::LastSurvey;
use crate::worker::backend::take_over::TakingOver;
use relay::delivery::batch::{BuiltBatch, OpenBatch};
use relay::delivery::refusal::Streams;
use relay::delivery::{Cursor, Delivery, Guarantee};
use relay::event::{Event, NoEntry};
use relay::fault::{self, Mutation, Point};
use relay::guard;
use relay::reading::range::Position;
use relay::reading::role::Role;
use relay::recovery::Recovery;
use relay::redis::hash_slot::hash_slot_of;
use relay::sender::orders::{Batch, Order};
use relay::time::Now;
use std::rc::Rc;
use std::time::Duration;

/// Lanes of one backend. The number is limited because each lane has a thread, a connection and buffers.
pub(crate) const MOST_LANES: usize = 64;
/// How many bytes may be in flight for one lane. It is less than for a backend, because there may be many lanes.
const LANE_WINDOW_BYTES: usize = 512 * 1024;
/// How many unused buffers are kept for a backend, and for a lane.
const KEPT_BUFFERS: usize = 8;
const KEPT_BUFFERS_OF_LANE: usize = 1;

/// The key of a backend or of one of its lanes.
pub(crate) type Whose = (i32, Option<u16>);

pub(crate) struct Backend {
    pub number: i32,
    pub duty: Duty,
    pub delivery: Delivery,
    /// How far recovery of its connection has come.
    pub recovery: Recovery,
    pub books: Books,
    pub turn: Turn,
    pub retention: RetentionClock,
    /// Where its reader stands before a row of its own, which it does not pass as long as it does not send.
    pub before_own: Option<Position>,
    /// It reads nothing before this time, because it met a row that it cannot deliver yet.
    pub rests_until: Now,
    restored: Restored,
    taking_over: TakingOver,
    logged: Logged,
    entries: Entries,
    pub metered: Metered,
    pub heads: Heads,
    last_survey: LastSurvey,
}

/// The turn of a backend that shares permits with others, because there are fewer permits than backends.
#[derive(Default)]
pub(crate) struct Turn {
    /// Whether it takes turns, and so has a sender only for a while.
    pub is_taken: bool,
    /// When its last turn began.
    pub began_at: Now,
}

/// How long a turn lasts at most while others wait, whether the backend sends all the time or is still connecting. Its
/// sender waits for nothing longer than that, because only then does it notice that its turn is over.
pub(crate) fn longest_turn() -> Duration {
    match fault::is_mutated(Mutation::ShortMinutes) {
        true => Duration::from_secs(1),
        false => Duration::from_secs(30),
    }
}

/// When a tick has to be recorded for retention.
pub(crate) struct RetentionClock {
    /// When that was last done.
    pub recorded_at: Option<Now>,
    /// Whether more was delivered since.
    pub is_due: bool,
}

impl Backend {
    /// Its key among all backends and lanes of the worker.
    pub(crate) fn whose(&self) -> Whose {
        (self.number, self.lane())
    }

    /// Loads a backend at its saved cursor, or at the beginning of time. A backend that was deleted and forgotten and
    /// exists again starts where the strays are: what lies behind them was sent or has failed.
    pub(crate) fn load(number: i32, duty: Duty, written_down: i64) -> Self {
        let beginning = || Cursor {
            position: Position::beginning(),
            number: 0,
        };
        let (mut cursor, standing) =
            cursors::cursor(number, duty.lane()).unwrap_or_else(|| (beginning(), Standing::default()));
        if number > 0 && cursor.position.newest().is_beginning() && backends::is_forgotten(number) {
            cursor = cursors::cursor(0, None).map_or_else(beginning, |(strays, _)| strays);
        }
        let vouched = numbers::vouched(&cursor.position);
        let is_saved = vouched.ticks().eq(cursor.position.ticks());
        cursor.position = vouched;
        let mut backend = Self::standing_at(cursor, standing, number, duty, written_down);
        if !is_saved {
            // The views show only what is saved.
            backend.books.change(Now::ZERO);
        }
        backend
    }

    fn standing_at(cursor: Cursor, standing: Standing, number: i32, duty: Duty, written_down: i64) -> Self {
        let lane = duty.lane();
        let kept_buffers = if lane.is_some() {
            KEPT_BUFFERS_OF_LANE
        } else {
            KEPT_BUFFERS
        };
        let entries = Entries::of(duty.options(), kept_buffers);
        let streams = match duty {
            Duty::Send(_) => refused_streams(number, lane, &entries.stream),
            Duty::Find(_) | Duty::Fail { .. } | Duty::Strays => Streams::default(),
        };
        let saved_high_seq = cursor.position.from.high_seq;
        // Without a known guarantee it sends nothing, so this value does not matter.
        let guarantee = duty.options().and_then(|options| options.delivery.clone().ok());
        let guarantee = guarantee.unwrap_or(Guarantee::ExactlyOnce);
        let mut delivery = Delivery::new(guarantee, cursor, streams, guc::backoff());
        delivery.set_reread_to(written_down);
        delivery.set_follows(duty.connection().is_some_and(Connection::is_looked_up));
        if lane.is_some() {
            delivery.set_window_bytes(LANE_WINDOW_BYTES);
        }
        Self {
            number,
            duty,
            delivery,
            recovery: Recovery::default(),
            books: Books::of(standing, saved_high_seq),
            turn: Turn::default(),
            retention: RetentionClock {
                recorded_at: None,
                is_due: true,
            },
            before_own: None,
            rests_until: Now::ZERO,
            restored: Restored::default(),
            taking_over: TakingOver::of(number, lane),
            logged: Logged::default(),
            entries,
            metered: Metered::default(),
            heads: Heads::default(),
            last_survey: LastSurvey::default(),
        }
    }

    /// The hash slot of a lane, in a cluster.
    pub(crate) fn lane(&self) -> Option<u16> {
        self.duty.lane()
    }

    pub(crate) fn role(&self) -> Role {
        self.duty.role()
    }

    pub(crate) fn row(&self) -> Option<&BackendRow> {
        self.duty.row()
    }

    pub(crate) fn options(&self) -> Option<&Options> {
        self.duty.options()
    }

    /// How many events it may send in a second; `None`: any number.
    pub(crate) fn max_rate(&self) -> Option<u32> {
        self.options()
            .and_then(|options| options.max_rate.as_ref().ok().copied().flatten())
    }

    /// The stream of events whose rows name none.
    pub(crate) fn stream(&self) -> &Rc<str> {
        &self.entries.stream
    }

    /// Whether its events store their streams because `stream_name` is a template.
    pub(crate) fn has_template(&self) -> bool {
        self.options().is_some_and(settings::has_template)
    }

    /// A stream that events have named recently.
    pub(crate) fn named_stream(&self) -> Option<Rc<str>> {
        self.entries.named_stream_of_late()
    }

    pub(crate) fn name(&self) -> &str {
        self.row().map_or("(deleted)", |row| &row.name)
    }

    pub(crate) fn is_enabled(&self) -> bool {
        self.row().is_none_or(|row| row.enabled)
    }

    /// Whether it must be connected. With exactly_once, a paused backend is connected too, because the guard must show
    /// that its owner is alive.
    pub(crate) fn connects(&self) -> bool {
        self.reads_for_redis() && !self.is_withheld() && (self.is_enabled() || self.is_exactly_once())
    }

    /// When it has something to do even without a report of the sender.
    pub(crate) fn due_at(&self) -> Option<Now> {
        let connection = self
            .duty
            .connection()
            .filter(|c| self.connects() && !c.waits_for_turn())?;
        match self.is_enabled() {
            true => {
                let slow_at = connection.slow_at().into_iter().chain(self.survey_slow_at());
                self.delivery.due_at().into_iter().chain(slow_at).min()
            }
            false => self.delivery.connects_at(),
        }
    }

    pub(crate) fn reads_for_redis(&self) -> bool {
        matches!(self.duty, Duty::Send(_))
    }

    /// Whether it is up and without a failure, so that others may wait for it to catch up with them.
    pub(crate) fn is_keeping_up(&self) -> bool {
        self.reads_for_redis()
            && self.is_enabled()
            && self.delivery.is_up()
            && self.delivery.trouble().is_none()
            && self.books.records.is_empty()
            && !self.waits_to_compare()
    }

    /// For the reader of a deleted backend that may go: no transaction with this id or a higher one had begun when the
    /// worker learned of the deletion.
    pub(crate) fn deleted_before(&self) -> Option<u64> {
        match self.duty {
            Duty::Fail { next_xid, .. } => next_xid,
            Duty::Send(_) | Duty::Find(_) | Duty::Strays => None,
        }
    }

    /// Its cursor is needed as long as this worker runs.
    pub(crate) fn stays(&mut self) {
        if let Duty::Fail { next_xid, .. } = &mut self.duty {
            *next_xid = None;
        }
    }

    /// Whether rows can be read for it now.
    pub(crate) fn is_ready(&self, now: Now) -> bool {
        // Refused events must be written down first.
        let can_send = || self.delivery.has_room() && self.books.records.is_empty();
        self.is_enabled() && !self.is_withheld() && now >= self.rests_until && (!self.reads_for_redis() || can_send())
    }

    /// Whether it has batches in flight.
    pub(crate) fn is_sending(&self) -> bool {
        self.has_sender() && !self.delivery.is_idle()
    }

    pub(crate) fn has_sender(&self) -> bool {
        self.duty.connection().is_some_and(Connection::has_sender)
    }

    /// When something was last acknowledged.
    pub(crate) fn moved_at(&self) -> Now {
        self.books.moved_at()
    }

    /// Wakes the sender, because a batch is about to come.
    pub(crate) fn rouse(&self) {
        if let Some(connection) = self.duty.connection().filter(|_| self.delivery.has_room()) {
            connection.rouse();
        }
    }

    /// Hands batches over that were built in a transaction that has ended well. `wal`: how far the WAL is flushed.
    pub(crate) fn send(&mut self, batches: Vec<BuiltBatch>, wal: u64) {
        fault::reach(Point::AfterRead);
        for BuiltBatch { batch, contents } in batches {
            let Some(connection) = self.duty.connection().filter(|c| c.has_sender()) else {
                return;
            };
            let OpenBatch { mut bytes, entries, .. } = batch;
            if let Some(guard) = connection.guard_key() {
                self.append_mark(&mut bytes, guard.as_bytes(), &entries, &contents, wal);
            }
            let size = bytes.len();
            // There was room. If the sender has just ended, it will report that, and all events are read again.
            connection.order(Order::Batch(Batch {
                bytes,
                commands: entries.len(),
            }));
            self.delivery.sent(entries, contents, size);
        }
    }

    /// The reader has come to `position` and has found nothing to send after the last batch.
    pub(crate) fn advanced(&mut self, position: Position, now: Now) {
        // A cursor that passed no event is not saved, so that an idle server stays idle.
        if position.from.high_seq != self.books.saved_high_seq() {
            self.books.fall_behind(now);
        }
        self.delivery.advanced(position);
    }

    /// These rows were read and must not be sent.
    pub(crate) fn skipped(&mut self, seqs: &[i64], now: Now) {
        seqs.iter().for_each(|seq| self.delivery.skipped(*seq));
        // The views count them as pending until the cursor is saved.
        if !seqs.is_empty() {
            self.books.change(now);
        }
    }

    /// Appends an event to a batch, ahead of its entry. `stream`: the result of [`Self::stream_of`].
    pub(crate) fn encode(&mut self, batch: &mut OpenBatch, stream: &Rc<str>, event: &Event<'_>) -> Result<(), NoEntry> {
        let trims = batch.trims(stream);
        self.entries.encode(&mut batch.bytes, stream, trims, event)
    }

    /// Sets the position in the WAL that its entries carry. The WAL is flushed up to `flushed` for all events that may
    /// follow.
    pub(crate) fn tell_lsn(&mut self, flushed: u64) {
        self.entries.tell_lsn(|| ticks::replayable(flushed));
    }

    /// The stream of an event.
    pub(crate) fn stream_of(&mut self, event: &Event<'_>) -> Rc<str> {
        self.entries.stream_of(event)
    }

    /// Returns a buffer for a batch, begun as its delivery needs it.
    pub(crate) fn buffer(&mut self) -> Vec<u8> {
        let mut buffer = self.entries.buffer();
        if self.is_exactly_once() {
            buffer.extend_from_slice(guard::BATCH_START);
        }
        buffer
    }

    /// There was no memory for its next events.
    pub(crate) fn lacks_memory(&mut self) {
        self.entries.drop_buffers();
        self.delivery.lacks_memory();
    }

    pub(crate) fn keep(&mut self, buffer: Vec<u8>) {
        self.entries.keep(buffer);
    }

    pub(crate) fn failed(&mut self, count: u64) {
        self.books.standing.failed_total += count as i64;
        self.count_progress();
    }
}

/// Streams with waiting events of a backend, or of one of its lanes.
fn refused_streams(number: i32, lane: Option<u16>, own_stream: &str) -> Streams {
    let serves = |stream: &str| lane.is_none_or(|hash_slot| hash_slot_of(stream.as_bytes()) == hash_slot);
    let found = refused::refused_streams(number, own_stream).into_iter();
    Streams::waiting(found.filter(|(stream, _)| serves(stream)))
}
