//! One backend within the worker: its settings, its delivery, its sender, and what is not saved yet (`books.rs`).

pub mod books;
mod copy;
mod guarded;
mod lanes;
mod logging;
mod settings;

use crate::server::random;
pub use settings::Home;

use crate::server::guc;
use crate::server::process::{self, REPEAT_LOG_AFTER};
use crate::tables::backends::BackendRow;
use crate::tables::cursors::Standing;
use crate::tables::numbers;
use crate::tables::options::{Known, Unusable};
use crate::tables::{cursors, refused};
use crate::worker::permits::{SenderPermit, SenderPermits};
use relay::delivery::flight::{BatchedEvent, Contents};
use relay::delivery::refusal::{Record, Streams};
use relay::delivery::{Cursor, Delivery, Guarantee, State};
use relay::event::broadcaster::{Encoder, Target};
use relay::event::{ConfigError, Event};
use relay::failure::{Failure, Trouble};
use relay::fault::{self, Point};
use relay::guard;
use relay::reading::range::Position;
use relay::reading::role::Role;
use relay::reading::snapshot::Tick;
use relay::recovery::Recovery;
use relay::redis::destination::{Address, Destination, Protocol, Route};
use relay::redis::hash_slot::hash_slot_of;
use relay::sender::Handle;
use relay::sender::orders::{Batch, Order, Report};
use relay::time::Now;
use std::collections::HashSet;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Lanes of one backend: each has a thread, a connection and buffers.
pub const MOST_LANES: usize = 64;
/// Larger batches miss the CPU's cache.
pub const BATCH_BYTES: usize = 256 * 1024;
/// A buffer that has grown beyond this for one large event is not kept.
const KEPT_BUFFER_BYTES: usize = 2 * BATCH_BYTES;
/// Bytes that may be on their way for a lane: of those there are many.
const LANE_WINDOW_BYTES: usize = 512 * 1024;
/// Of a batch's entries for one stream, the first of so many has MAXLEN: Redis trims by nodes of a hundred entries anyway.
const TRIM_EVERY: usize = 16;
/// How often it is looked what is to be logged, without news.
const LOG_LOOK: Duration = Duration::from_millis(250);
/// Names of streams that are kept, so that not each entry needs its own.
const KNOWN_STREAMS: usize = 1_000;

/// A batch that is being filled.
#[derive(Default)]
pub struct OpenBatch {
    pub bytes: Vec<u8>,
    pub entries: Vec<BatchedEvent>,
    /// Its streams, a few of them, each with its entries since one that trims it.
    untrimmed: Vec<(Rc<str>, usize)>,
}

impl OpenBatch {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            ..Self::default()
        }
    }

    /// Whether the next entry of a stream is to trim it.
    fn trims(&mut self, stream: &Rc<str>) -> bool {
        let known = self.untrimmed.iter_mut().find(|(name, _)| Rc::ptr_eq(name, stream));
        if let Some((_, entries)) = known {
            *entries = (*entries + 1) % TRIM_EVERY;
            return *entries == 0;
        }
        if self.untrimmed.len() < TRIM_EVERY {
            self.untrimmed.push((stream.clone(), 0));
        }
        true
    }

    pub fn is_full(&self) -> bool {
        self.entries.len() >= guc::BATCH_SIZE.get() as usize || self.bytes.len() >= BATCH_BYTES
    }
}

/// A batch that was built but not handed over yet: that waits for the end of the reading transaction.
pub struct BuiltBatch {
    pub batch: OpenBatch,
    pub contents: Contents,
}

/// A backend, or one of its lanes.
pub type Whose = (i32, Option<u16>);

/// Whether a sender was told to say to those who watch the guard that its owner leaves, and has said so.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Release {
    None,
    Ordered,
    Done,
}

pub struct Backend {
    pub number: i32,
    /// The hash slot of a cluster that it is for.
    pub lane: Option<u16>,
    pub role: Role,
    pub row: Option<BackendRow>,
    /// Unless its row holds something that cannot be used.
    destination: Known<Destination>,
    pub stream: Rc<str>,
    max_len: i64,
    pub delivery: Delivery,
    sender: Option<Handle>,
    /// There is no permit for one.
    waits_for_turn: bool,
    /// It has one only for a while, and since when.
    pub takes_turns: bool,
    pub turn_began: Now,
    /// The node that was found last.
    address: Option<Address>,
    /// That which its trouble was with.
    failed_at: Option<Address>,
    /// How far its connection has come on its way to being the owner's.
    pub recovery: Recovery,
    /// Goes up with each refresh of the guard.
    beat: u64,
    /// Of the present sender.
    release: Release,
    /// To be written down before the cursor is saved.
    pub records: Vec<Record>,
    /// A pass has written something down, which must be durable before a batch says that it lies behind.
    pub is_unflushed: bool,
    standing: Standing,
    /// `delivery.published()` that `standing` includes already.
    counted: u64,
    /// Since when the cursor on disk is behind what was delivered, and behind what was read.
    dirty_since: Option<Now>,
    /// When something was acknowledged last.
    moved_at: Now,
    stale_since: Option<Now>,
    saved_at: Now,
    saved_published: i64,
    /// What a save has written, until its transaction has committed.
    pending_save: Option<(Standing, u64)>,
    /// When it is said that it is still on its way up.
    slow_at: Option<Now>,
    /// It met a row that it cannot judge yet.
    pub rests_until: Now,
    /// Restores whose events a lane has compared.
    compared: Vec<i64>,
    /// More events of a dump have come meanwhile: nothing is read beyond `compared_to` until they are compared, too.
    holds: bool,
    /// The tick up to which the streams are being looked through, and that up to which they were.
    comparing_to: Option<Arc<Tick>>,
    compared_to: Option<Arc<Tick>>,
    /// Events of a dump are compared again not before this.
    compares_at: Now,
    /// High end of the saved cursor, and so of what a restart would read again.
    saved_high_seq: i64,
    /// How often it refreshes the guard, as it has told or will tell.
    interval: Duration,
    pub tick_recorded_at: Option<Now>,
    pub tick_due: bool,
    logged_state: Option<State>,
    /// When it is looked again what is to be logged, without news.
    log_at: Now,
    /// Troubles that were logged in this state within a minute.
    logged: Vec<(String, Now)>,
    buffers: Vec<Vec<u8>>,
    /// Streams that events have named lately.
    named_streams: HashSet<Rc<str>>,
    encoder: Encoder,
}

impl Backend {
    /// Names it among all.
    pub fn whose(&self) -> Whose {
        (self.number, self.lane)
    }

    /// A backend at its saved cursor, or at the beginning of time.
    pub fn load(number: i32, lane: Option<u16>, role: Role, row: Option<BackendRow>, home: &Home) -> Self {
        let (mut cursor, standing) = cursors::cursor(number, lane).unwrap_or_else(|| {
            let position = Position::beginning();
            (Cursor { position, number: 0 }, Standing::default())
        });
        let vouched = numbers::vouched(&cursor.position);
        let is_saved = vouched.ticks().eq(cursor.position.ticks());
        cursor.position = vouched;
        let mut backend = Self::standing_at(number, lane, role, row, home, cursor, standing);
        if !is_saved {
            // The views go by what is saved.
            backend.dirty_since = Some(Now::ZERO);
        }
        backend
    }

    fn standing_at(
        number: i32,
        lane: Option<u16>,
        role: Role,
        row: Option<BackendRow>,
        home: &Home,
        cursor: Cursor,
        standing: Standing,
    ) -> Self {
        let (destination, stream, max_len) = settings(row.as_ref(), home, lane);
        let streams = match role {
            Role::Redis => refused_streams(number, lane, &stream),
            Role::Finder | Role::Deleted | Role::Strays => Streams::default(),
        };
        let saved_high_seq = cursor.position.from.high_seq;
        let mut delivery = Delivery::new(
            guarantee_of(row.as_ref()).unwrap_or(Guarantee::ExactlyOnce),
            cursor,
            streams,
            guc::backoff(),
        );
        delivery.set_reread_to(refused::highest_written_down(number));
        delivery.set_follows(is_looked_up(&destination));
        if lane.is_some() {
            delivery.set_window_bytes(LANE_WINDOW_BYTES);
        }
        Self {
            number,
            lane,
            compared: Vec::new(),
            holds: false,
            comparing_to: None,
            compared_to: None,
            compares_at: Now::ZERO,
            role,
            row,
            destination,
            stream,
            max_len,
            sender: None,
            waits_for_turn: false,
            takes_turns: false,
            turn_began: Now::ZERO,
            address: None,
            failed_at: None,
            recovery: Recovery::default(),
            beat: 0,
            release: Release::None,
            records: Vec::new(),
            is_unflushed: false,
            saved_published: standing.accepted_total,
            standing,
            counted: 0,
            dirty_since: None,
            moved_at: Now::ZERO,
            stale_since: None,
            saved_at: Now::ZERO,
            pending_save: None,
            slow_at: None,
            rests_until: Now::ZERO,
            saved_high_seq,
            interval: guc::millis(&guc::POLL_INTERVAL_MS),
            tick_recorded_at: None,
            tick_due: true,
            logged_state: None,
            log_at: Now::ZERO,
            logged: Vec::new(),
            buffers: Vec::new(),
            named_streams: HashSet::new(),
            encoder: Encoder::default(),
            delivery,
        }
    }

    pub fn name(&self) -> &str {
        self.row.as_ref().map_or("(deleted)", |r| &r.name)
    }

    pub fn is_enabled(&self) -> bool {
        self.row.as_ref().is_none_or(|r| r.enabled)
    }

    /// Whether it is to be connected: with exactly_once also a paused one, whose owner is alive.
    pub fn connects(&self) -> bool {
        self.reads_for_redis() && !self.is_withheld() && (self.is_enabled() || self.is_exactly_once())
    }

    /// When something is to be done without any report.
    pub fn due_at(&self) -> Option<Now> {
        match self.is_enabled() {
            _ if !self.connects() || self.waits_for_turn => None,
            true => self.delivery.due_at().into_iter().chain(self.slow_at).min(),
            false => self.delivery.connects_at(),
        }
    }

    pub fn reads_for_redis(&self) -> bool {
        matches!(self.role, Role::Redis)
    }

    /// Whether it is up and well, so that others may wait for it to come to where they are.
    pub fn is_keeping_up(&self) -> bool {
        self.reads_for_redis()
            && self.is_enabled()
            && self.delivery.is_up()
            && self.delivery.trouble().is_none()
            && self.records.is_empty()
            && !self.is_held()
    }

    /// Whether rows can be read for it now.
    pub fn is_ready(&self, now: Now) -> bool {
        // What was refused must be written down first.
        let can_send = || self.delivery.has_room() && self.records.is_empty();
        self.is_enabled() && !self.is_withheld() && now >= self.rests_until && (!self.reads_for_redis() || can_send())
    }

    /// Whether a sender is busy.
    pub fn is_sending(&self) -> bool {
        self.sender.is_some() && !self.delivery.is_idle()
    }

    /// Whether the sender goes on with these settings: it goes to the same place, and what is on its way to the same stream.
    pub fn keeps_sender(&self, row: &BackendRow, home: &Home) -> bool {
        let (destination, stream, _) = settings(Some(row), home, self.lane);
        let stays = destination == self.destination && stream == self.stream;
        // Those who watch the guard must know how often it is refreshed: a new claim says so.
        let beats = !self.is_exactly_once() || self.interval == guc::millis(&guc::POLL_INTERVAL_MS);
        // What a dump has brought is looked for by a new claim.
        let is_new = |r: &i64| !self.compared.contains(r);
        let claims = self.is_exactly_once() && row.enabled && row.restores.iter().any(is_new);
        // A paused backend's owner keeps its guard. What is on its way would still be sent.
        let is_enabled = match (row.enabled, self.is_enabled()) {
            (true, true) => true,
            _ => self.is_exactly_once() && self.delivery.is_idle(),
        };
        is_enabled && stays && beats && !claims
    }

    /// Takes over changed settings.
    pub fn reconfigure(&mut self, row: BackendRow, home: &Home, now: Now) {
        let was_copy = self.is_copy();
        let is_other = self.row.as_ref() != Some(&row);
        if !self.keeps_sender(&row, home) {
            self.let_go();
            self.delivery.forget_trouble();
            self.logged_state = None;
        }
        if row.enabled != self.is_enabled() {
            // While it was paused, nobody heard of it.
            self.delivery.forget_trouble();
            self.logged_state = None;
        }
        self.interval = guc::millis(&guc::POLL_INTERVAL_MS);
        let (destination, stream, max_len) = settings(Some(&row), home, self.lane);
        if stream != self.stream {
            self.delivery
                .set_streams(refused_streams(self.number, self.lane, &stream));
        }
        if self.becomes_finder(&row) {
            self.role = Role::Finder;
            self.delivery.set_streams(Streams::default());
        }
        let is_other = is_other || destination != self.destination || stream != self.stream;
        let row = self.without_done(row);
        if let Some(guarantee) = guarantee_of(Some(&row)) {
            self.delivery.set_guarantee(guarantee);
        }
        self.delivery.set_follows(is_looked_up(&destination));
        (self.destination, self.stream, self.max_len) = (destination, stream, max_len);
        self.row = Some(row);
        if was_copy && !self.is_copy() {
            self.delivery.forget_trouble();
            self.logged_state = None;
        }
        self.delivery.set_backoff(guc::backoff(), now);
        match is_other {
            true => self.delivery.retry_now(),
            // Settings were read again, that is all: something outside of them may have been mended.
            false => self.delivery.retry_asked(now),
        }
        self.dirty_since.get_or_insert(self.saved_at);
    }

    /// The backend's row is gone.
    pub fn delete(&mut self) {
        self.let_go();
        self.role = Role::Deleted;
        self.row = None;
        self.holds = false;
        self.delivery.set_streams(Streams::default());
    }

    /// Begins anew with another connection.
    pub fn let_go(&mut self) {
        self.recovery.reset();
        self.address = None;
        if self.sender.take().is_some() {
            self.delivery.abandon();
        }
    }

    /// Whether it is time to start a sender.
    pub fn wants_sender(&self, now: Now) -> bool {
        self.connects() && self.sender.is_none() && self.delivery.wants_connection(now)
    }

    pub fn has_sender(&self) -> bool {
        self.sender.is_some()
    }

    /// There is no permit for its sender.
    pub fn wait_for_turn(&mut self, now: Now) {
        self.waits_for_turn = true;
        // What went wrong in its last turn says more.
        if self.delivery.trouble().is_none() {
            let failure = Failure::of(
                Trouble::NoDescriptor,
                "it waits for its turn to connect: there are more backends than file descriptors",
            );
            self.delivery.waits_for_room(failure);
            self.dirty_since.get_or_insert(now);
        }
    }

    /// Starts a sender; there is a permit for it.
    pub fn connect(&mut self, now: Now, waker: &Arc<UnixStream>, permits: &mut SenderPermits) {
        (self.waits_for_turn, self.turn_began) = (false, now);
        let Ok(mut destination) = self.destination.clone() else {
            return;
        };
        let longest = 2 * (destination.connect_timeout + destination.socket_timeout);
        if let Protocol::ExactlyOnce { ousting, .. } = &mut destination.protocol {
            *ousting = self
                .row
                .as_ref()
                .filter(|row| row.take_over && row.enabled)
                .map(|_| random::token());
        }
        match spawn_sender(destination, waker.clone(), permits.take()) {
            Ok(handle) => {
                self.sender = Some(handle);
                self.release = Release::None;
                self.delivery.connecting();
                self.slow_at = Some(now + longest);
            }
            Err(error) => {
                let failure = Failure::backend(format!("could not start a sender: {error}"));
                self.lost(failure, 0, Vec::new(), now);
            }
        }
    }

    /// Takes in what the sender has to report.
    pub fn hear(&mut self, now: Now) {
        // There may be thousands: without news, it is not looked in each round what is to be logged.
        let mut has_news = now >= self.log_at;
        while let Some(report) = self.sender.as_ref().and_then(Handle::report) {
            has_news = true;
            match report {
                Report::Found(address) => self.found(address, now),
                Report::Connected => self.delivery.connected(),
                Report::Guard(guard) => self.recovery.read(*guard),
                Report::Claimed => self.recovery.claimed(),
                Report::Seen(found) => self.recovery.seen(found),
                Report::Done { refused, buffer } => {
                    self.keep(buffer);
                    let records = self.delivery.replied(refused, now, fastrand::f64());
                    self.take_in(records, now);
                }
                Report::Aborted { refused, buffer } => {
                    self.keep(buffer);
                    let records = self.delivery.aborted(refused, now, fastrand::f64());
                    self.take_in(records, now);
                }
                Report::Behind(failure) => {
                    self.failed_at = self.address.clone();
                    self.delivery.waits_for_replicas(failure);
                    self.dirty_since.get_or_insert(now);
                }
                Report::Released => self.release = Release::Done,
                Report::Lost {
                    failure,
                    accepted,
                    refused,
                } => self.lost(failure, accepted, refused, now),
            }
        }
        if self.delivery.is_drained() {
            self.sender = None;
            self.delivery.drained();
        }
        if self.delivery.has_used_up_numbers() {
            self.let_go();
        }
        if self.slow_at.is_some_and(|at| at <= now) {
            let failure = Failure::of(
                Trouble::TimedOut,
                "it answers, but has not come to be ready in twice its timeouts",
            );
            let is_slow = self.sender.is_some() && self.delivery.takes_long(failure);
            self.slow_at = is_slow.then(|| now + REPEAT_LOG_AFTER);
            if is_slow {
                has_news = true;
                self.dirty_since.get_or_insert(now);
            }
        }
        if has_news {
            self.log_at = now + LOG_LOOK;
            self.log_change(now);
        }
    }

    /// A node is about to be connected to.
    fn found(&mut self, address: Address, now: Now) {
        process::debug(|| format!("connecting to Redis at {address} for backend \"{}\"", self.name()));
        let shown = Some(address.to_string());
        if self.standing.address != shown {
            self.standing.address = shown;
            self.dirty_since.get_or_insert(now);
        }
        if self.address.as_ref() != Some(&address) {
            self.address = Some(address);
            // What it was in trouble with was another's.
            if self.delivery.trouble().is_none() {
                self.logged_state = None;
            }
        }
    }

    /// When something was acknowledged last.
    pub fn moved_at(&self) -> Now {
        self.moved_at
    }

    /// A batch is about to come.
    pub fn rouse(&self) {
        if let Some(sender) = self.sender.as_ref().filter(|_| self.delivery.has_room()) {
            sender.rouse();
        }
    }

    fn take_in(&mut self, records: Vec<Record>, now: Now) {
        self.records.extend(records);
        self.dirty_since.get_or_insert(now);
        self.moved_at = now;
        self.tick_due = true;
    }

    fn lost(&mut self, failure: Failure, accepted: usize, refused: Vec<relay::delivery::flight::Refusal>, now: Now) {
        self.sender = None;
        self.failed_at = self.address.clone();
        self.recovery.interrupt();
        let records = self.delivery.lost(failure, accepted, refused, now, fastrand::f64());
        // Of a paused one, nobody is told.
        if self.is_enabled() || !records.is_empty() {
            self.dirty_since.get_or_insert(now);
        }
        self.records.extend(records);
    }

    /// Hands over what was built in a transaction that has ended well. `wal`: up to where it is flushed.
    pub fn send(&mut self, batches: Vec<BuiltBatch>, wal: u64) {
        fault::reach(Point::AfterRead);
        for BuiltBatch { batch, contents } in batches {
            let Some(sender) = &self.sender else {
                return;
            };
            let OpenBatch { mut bytes, entries, .. } = batch;
            if let Some(guard) = self.guard_key() {
                self.append_mark(&mut bytes, guard.as_bytes(), &entries, &contents, wal);
            }
            let size = bytes.len();
            // There was room; a sender that has ended in between will say so, and all is read again.
            let _ = sender.order(Order::Batch(Batch {
                bytes,
                commands: entries.len(),
            }));
            self.delivery.sent(entries, contents, size);
        }
    }

    /// The reader came to `position` without anything to send after the last batch.
    pub fn advanced(&mut self, position: Position, now: Now) {
        // A cursor that passed no event need not be saved: an idle server stays idle.
        if position.from.high_seq != self.saved_high_seq {
            self.stale_since.get_or_insert(now);
        }
        self.delivery.advanced(position);
    }

    /// Of rows that were read, these are not to be sent again.
    pub fn skipped(&mut self, seqs: &[i64], now: Now) {
        seqs.iter().for_each(|seq| self.delivery.skipped(*seq));
        // The views count them as pending until the cursor is saved.
        if !seqs.is_empty() {
            self.dirty_since.get_or_insert(now);
        }
    }

    /// Appends an event to a batch, in front of its entry. `stream`: as [`Self::stream_of`] says.
    pub fn encode(&mut self, batch: &mut OpenBatch, stream: &Rc<str>, event: &Event<'_>) -> Result<(), ConfigError> {
        let max_len = if batch.trims(stream) { self.max_len } else { 0 };
        self.encoder
            .append_xadd(&mut batch.bytes, Target { stream, max_len }, event)
    }

    /// The stream of an event.
    pub fn stream_of(&mut self, event: &Event<'_>) -> Rc<str> {
        match event.stream {
            Some(stream) if *stream != *self.stream => self.named_stream(stream),
            _ => self.stream.clone(),
        }
    }

    fn named_stream(&mut self, name: &str) -> Rc<str> {
        if let Some(stream) = self.named_streams.get(name) {
            return stream.clone();
        }
        if self.named_streams.len() >= KNOWN_STREAMS {
            self.named_streams.clear();
        }
        let stream: Rc<str> = Rc::from(name);
        self.named_streams.insert(stream.clone());
        stream
    }

    /// Working space for a batch, begun as its delivery wants.
    pub fn buffer(&mut self) -> Vec<u8> {
        let mut buffer = self.buffers.pop().unwrap_or_default();
        if self.is_exactly_once() {
            buffer.extend_from_slice(guard::BATCH_START);
        }
        buffer
    }

    pub fn keep(&mut self, mut buffer: Vec<u8>) {
        let kept = if self.lane.is_some() { 1 } else { 8 };
        if buffer.capacity() <= KEPT_BUFFER_BYTES && self.buffers.len() < kept {
            buffer.clear();
            self.buffers.push(buffer);
        }
    }

    pub fn failed(&mut self, count: u64) {
        self.standing.failed_total += count as i64;
    }
}

/// Where, to which stream, and how long that may become.
fn settings(row: Option<&BackendRow>, home: &Home, lane: Option<u16>) -> (Known<Destination>, Rc<str>, i64) {
    let destination = match row {
        Some(row) => settings::destination(row, home, lane),
        None => Err(Unusable::new("name", "is that of a deleted backend")),
    };
    (destination, settings::stream(row), settings::max_len(row))
}

fn guarantee_of(row: Option<&BackendRow>) -> Option<Guarantee> {
    row?.options.delivery.clone().ok()
}

/// Whether another node may take the place of the one that is connected to.
fn is_looked_up(destination: &Known<Destination>) -> bool {
    destination.as_ref().is_ok_and(|d| d.route != Route::Direct)
}

/// Of a backend or of one lane of it.
fn refused_streams(number: i32, lane: Option<u16>, own_stream: &str) -> Streams {
    let serves = |stream: &str| lane.is_none_or(|hash_slot| hash_slot_of(stream.as_bytes()) == hash_slot);
    let found = refused::refused_streams(number, own_stream).into_iter();
    Streams::waiting(found.filter(|(stream, _)| serves(stream)))
}

/// Starts a sender with all signals blocked in its thread: they are the main thread's.
fn spawn_sender(destination: Destination, waker: Arc<UnixStream>, permit: SenderPermit) -> std::io::Result<Handle> {
    // SAFETY: the mask is saved, and put back on all ways out: spawn returns its errors.
    unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let spawned = Handle::spawn(destination, waker, permit);
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        spawned
    }
}
