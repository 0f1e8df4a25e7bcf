//! The delivery against models of Postgres and Redis, over random schedules with outages, refusals and crashes.

mod model;

use model::{Database, Rng, caught, for_each_seed, likely, out_of_memory, wrong_type};
use relay::backoff::Backoff;
use relay::classify::{Class, Failure};
use relay::delivery::{Cursor, Delivery, Entry, Mode, Now, Room, RowFate};
use relay::reader::{Position, RangeScan, Step};
use relay::refusal::{Record, Streams};
use relay::sender::{PIPELINED_BATCHES, Refusal, Report, WINDOW_BATCHES, is_backends};
use relay::snapshot::Tick;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::ops::AddAssign;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// As in the module `delivery`.
const WINDOW_BYTES: usize = 2 * 1024 * 1024;
const BATCH_BYTES: usize = 256 * 1024;
const STREAMS: u8 = 5;

fn name(stream: u8) -> Rc<str> {
    Rc::from(format!("stream-{stream}"))
}

// ---------------------------------------------------------------------------------------------------------------------
// Redis and the way to it

#[derive(Default)]
struct Redis {
    streams: BTreeMap<Rc<str>, Vec<i64>>,
    held: HashSet<i64>,
    /// Hold another type for now.
    sick: BTreeSet<Rc<str>>,
    /// A whole-backend trouble, for now.
    trouble: Option<Failure>,
    /// Refuses at random, command by command.
    fickle: f64,
    /// Every stream of which it refused an event for what it is.
    refused: HashSet<Rc<str>>,
    /// Every stream of which it refused anything.
    disturbed: HashSet<Rc<str>>,
}

#[derive(Clone)]
struct Command {
    seq: i64,
    stream: Rc<str>,
}

impl Redis {
    fn execute(&mut self, command: &Command, rng: &mut Rng) -> Option<Failure> {
        let refusal = if let Some(failure) = &self.trouble {
            Some(failure.clone())
        } else if self.sick.contains(&command.stream) {
            Some(wrong_type())
        } else if likely(rng, self.fickle) {
            Some(if rng.bool() { out_of_memory() } else { wrong_type() })
        } else {
            None
        };
        match &refusal {
            Some(failure) => {
                self.disturbed.insert(command.stream.clone());
                if failure.class == Class::Event {
                    self.refused.insert(command.stream.clone());
                }
            }
            None => {
                let stream = self.streams.entry(command.stream.clone()).or_default();
                stream.push(command.seq);
                self.held.insert(command.seq);
            }
        }
        refusal
    }
}

struct Sent {
    commands: Vec<Command>,
    replies: Vec<Option<Failure>>,
    read: usize,
}

impl Sent {
    fn refused(&self) -> Vec<Refusal> {
        let read = self.replies.iter().take(self.read).enumerate();
        read.filter_map(|(index, reply)| Some((index, reply.clone()?)))
            .collect()
    }
}

/// A sender with its connection, as `relay::sender` runs it.
#[derive(Default)]
struct Connection {
    up: bool,
    batches: VecDeque<Sent>,
    reports: VecDeque<Report>,
    ended: bool,
}

impl Connection {
    /// What was written and has not been executed.
    fn unexecuted(&self) -> impl Iterator<Item = &Command> {
        let written = self.batches.iter().take(PIPELINED_BATCHES);
        written.flat_map(|sent| &sent.commands[sent.replies.len()..])
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The worker and its tables

/// A worker that is wrong in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    None,
    /// Saves what was read as the cursor, not what was acknowledged.
    SavesRead,
    /// Saves the cursor before it has recorded what was refused.
    SavesBeforeRecords,
    /// Does not write down what was refused.
    ForgetsRefused,
    /// Does not copy the rows that must wait behind others.
    ForgetsParked,
    /// Copies them before it has recorded that the first was refused.
    ParksBeforeRecords,
}

/// What happens in a schedule.
#[derive(Clone, Copy, Debug)]
struct Faults {
    sick: f64,
    trouble: f64,
    losses: f64,
    crashes: f64,
    settings: f64,
    /// Of the transactions that read.
    aborts: f64,
    /// Nothing heals before what is on its way has been refused too: then no order is lost.
    tidy: bool,
}

impl Faults {
    const NONE: Self = Self {
        sick: 0.0,
        trouble: 0.0,
        losses: 0.0,
        crashes: 0.0,
        settings: 0.0,
        aborts: 0.0,
        tidy: false,
    };

    fn random(rng: &mut Rng) -> Self {
        let mut some = |often: f64| if rng.bool() { rng.f64() * often } else { 0.0 };
        Self {
            sick: some(0.1),
            trouble: some(0.06),
            losses: some(0.04),
            crashes: some(0.02),
            settings: some(0.02),
            aborts: some(0.2),
            tidy: some(1.0) > 0.0,
        }
    }
}

struct Tables {
    /// By stream and seq, with the attempts.
    refused: BTreeMap<(Rc<str>, i64), u32>,
    failed: BTreeMap<i64, u32>,
    cursor: Position,
}

impl Tables {
    fn streams(&self) -> Streams {
        let mut heads = BTreeMap::new();
        for ((stream, _), attempts) in &self.refused {
            heads.entry(stream.to_string()).or_insert(*attempts);
        }
        Streams::waiting(heads)
    }

    fn waiting(&self, stream: &Rc<str>, limit: usize) -> Vec<i64> {
        let rows = self.refused.range((stream.clone(), 0)..);
        let rows = rows.take_while(|((of, _), _)| of == stream);
        rows.map(|((_, seq), _)| *seq).take(limit).collect()
    }
}

/// How often what is rare happened, so that no test passes for want of it.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    parked: u32,
    skipped: u32,
    failed: u32,
    failed_streams: u32,
    accepted_after_waiting: u32,
    lost_in_mid_batch: u32,
    crashes: u32,
    full_windows: u32,
    late: u32,
}

impl AddAssign for Seen {
    fn add_assign(&mut self, other: Self) {
        self.parked += other.parked;
        self.skipped += other.skipped;
        self.failed += other.failed;
        self.failed_streams += other.failed_streams;
        self.accepted_after_waiting += other.accepted_after_waiting;
        self.lost_in_mid_batch += other.lost_in_mid_batch;
        self.crashes += other.crashes;
        self.full_windows += other.full_windows;
        self.late += other.late;
    }
}

/// A batch that waits for the end of the transaction it was read in.
#[derive(Default)]
struct Built {
    seqs: Vec<i64>,
    bytes: usize,
    end: Option<Position>,
}

impl Built {
    fn last(&self) -> i64 {
        self.seqs.last().copied().unwrap_or(0)
    }

    fn close(&mut self, end: Position, room: &mut Room) -> Option<Self> {
        if self.seqs.is_empty() {
            return None;
        }
        room.batches -= 1;
        room.bytes = room.bytes.saturating_sub(self.bytes);
        self.end = Some(end);
        Some(std::mem::take(self))
    }
}

struct World {
    rng: Rng,
    mutant: Mutant,
    faults: Faults,
    /// Of an event: up to this.
    max_attempts: u32,
    batch_size: usize,
    backoff: Backoff,
    now: Now,
    database: Database,
    tables: Tables,
    redis: Redis,
    connection: Option<Connection>,
    /// What old connections had written, still to be executed.
    leftovers: Vec<VecDeque<Command>>,
    delivery: Delivery,
    /// Of this life of the worker.
    ticks: Vec<Arc<Tick>>,
    /// Not yet written down, in order.
    pending: Vec<Record>,
    /// The batches that the sender has not reported.
    in_flight: VecDeque<(Vec<i64>, usize)>,
    /// How often a row may have been executed without the worker's knowing.
    doubts: HashMap<i64, u32>,
    /// Streams that had events in flight behind a refused one when all was in doubt: they may have overtaken it.
    shaken: HashSet<Rc<str>>,
    accepted: u64,
    seen: Seen,
    tells: bool,
}

/// Tells what happens, when one schedule is replayed.
macro_rules! tell {
    ($world:expr, $($text:tt)*) => {
        if $world.tells {
            eprintln!($($text)*);
        }
    };
}

impl World {
    fn new(seed: u64, mutant: Mutant) -> Self {
        let mut rng = Rng::with_seed(seed);
        let faults = Faults::random(&mut rng);
        let delay = [10, 1_000, 100_000][rng.usize(..3)];
        let backoff = Backoff {
            exponential: rng.bool(),
            delay: Duration::from_millis(delay),
            max_delay: Duration::from_millis(delay * 20),
        };
        let fickle = if faults.tidy {
            0.0
        } else {
            [0.0, 0.05, 0.3][rng.usize(..3)]
        };
        Self {
            mutant,
            faults,
            max_attempts: rng.u32(1..5),
            batch_size: rng.usize(1..12),
            backoff,
            now: Now::ZERO,
            database: Database::new(&mut rng, STREAMS),
            tables: Tables {
                refused: BTreeMap::new(),
                failed: BTreeMap::new(),
                cursor: Position::beginning(),
            },
            redis: Redis {
                fickle,
                ..Redis::default()
            },
            connection: None,
            leftovers: Vec::new(),
            delivery: Delivery::new(
                Mode::AtLeastOnce,
                Cursor {
                    position: Position::beginning(),
                    number: 0,
                },
                Streams::default(),
                backoff,
            ),
            ticks: Vec::new(),
            pending: Vec::new(),
            in_flight: VecDeque::new(),
            doubts: HashMap::new(),
            shaken: HashSet::new(),
            accepted: 0,
            seen: Seen::default(),
            tells: std::env::var_os("SEED").is_some(),
            rng,
        }
    }

    fn likely(&mut self, probability: f64) -> bool {
        likely(&mut self.rng, probability)
    }

    // --- the worker

    fn tend_connection(&mut self) {
        if self.delivery.is_drained() {
            self.delivery.drained();
            self.connection = None;
        }
        if self.delivery.wants_connection(self.now) {
            assert!(self.connection.is_none() && self.in_flight.is_empty());
            self.delivery.connecting();
            self.connection = Some(Connection::default());
        }
    }

    fn take_report(&mut self) -> bool {
        let Some(report) = self.connection.as_mut().and_then(|c| c.reports.pop_front()) else {
            return false;
        };
        let random = self.rng.f64();
        tell!(
            self,
            "report {}",
            match &report {
                Report::Connected => "connected".to_owned(),
                Report::Done { refused, .. } => format!("done {:?}, refused {refused:?}", self.in_flight[0].0),
                Report::Lost { accepted, refused, .. } => format!("lost after {accepted}, refused {refused:?}"),
                _ => "of exactly_once".to_owned(),
            }
        );
        let records = match report {
            Report::Connected => {
                self.delivery.connected();
                Vec::new()
            }
            Report::Done { refused, .. } => {
                if refused.iter().any(is_backends) {
                    self.shake();
                }
                let (seqs, _) = self.in_flight.pop_front().expect("a batch that was sent");
                self.accepted += (seqs.len() - refused.len()) as u64;
                self.delivery.replied(refused, self.now, random)
            }
            Report::Lost {
                failure,
                accepted,
                refused,
            } => {
                self.seen.lost_in_mid_batch += u32::from(accepted > 0);
                self.accepted += (accepted - refused.len()) as u64;
                self.doubt(accepted);
                self.connection = None;
                self.delivery.lost(failure, accepted, refused, self.now, random)
            }
            _ => unreachable!("no sender of at_least_once says that"),
        };
        self.note(records);
        true
    }

    fn note(&mut self, records: Vec<Record>) {
        for record in records {
            tell!(self, "  {record:?}");
            match &record {
                Record::Park { .. } => self.seen.parked += 1,
                Record::Fail { .. } => self.seen.failed += 1,
                Record::FailStream { .. } => self.seen.failed_streams += 1,
                Record::Accepted { .. } => self.seen.accepted_after_waiting += 1,
                Record::RefusedAgain { .. } => {}
            }
            let forgotten = self.mutant == Mutant::ForgetsRefused && matches!(record, Record::Park { .. });
            if !forgotten {
                self.pending.push(record);
            }
        }
    }

    /// All in flight but the first `known` of the oldest batch is in doubt.
    fn doubt(&mut self, known: usize) {
        self.shake();
        let in_flight = self.in_flight.drain(..).flat_map(|(seqs, _)| seqs);
        for seq in in_flight.skip(known) {
            *self.doubts.entry(seq).or_default() += 1;
        }
    }

    fn shake(&mut self) {
        let in_flight = self.in_flight.iter().flat_map(|(seqs, _)| seqs);
        let streams = in_flight.map(|seq| name(self.database.row(*seq).stream));
        let blocked = streams.filter(|stream| self.delivery.streams().is_blocked(stream));
        self.shaken.extend(blocked);
    }

    fn write_down(&mut self) {
        for record in std::mem::take(&mut self.pending) {
            match record {
                Record::Park { seq, attempts, .. } => self.park(seq, attempts),
                Record::Fail { seq, attempts, .. } => self.fail(seq, attempts),
                Record::Accepted { seq } => drop(self.tables.refused.remove(&self.key(seq))),
                Record::RefusedAgain { seq, attempts, .. } => {
                    let key = self.key(seq);
                    if let Some(now) = self.tables.refused.get_mut(&key) {
                        *now = attempts;
                    }
                }
                Record::FailStream {
                    stream, seq, attempts, ..
                } => {
                    let key = self.key(seq);
                    let known = self.tables.refused.contains_key(&key) || self.tables.failed.contains_key(&seq);
                    assert!(known && key.0 == stream, "{key:?} did not wait");
                    self.fail(seq, attempts);
                    for seq in self.tables.waiting(&stream, usize::MAX) {
                        self.fail(seq, 1);
                    }
                }
            }
        }
        for (stream, seq) in self.tables.refused.keys() {
            let on_its_way = self.in_flight.iter().any(|(seqs, _)| seqs.contains(seq));
            assert!(
                on_its_way || self.delivery.streams().is_blocked(stream),
                "{seq} waits for ever"
            );
        }
    }

    fn key(&self, seq: i64) -> (Rc<str>, i64) {
        (name(self.database.row(seq).stream), seq)
    }

    fn park(&mut self, seq: i64, attempts: u32) {
        let key = self.key(seq);
        let known = self.tables.refused.entry(key).or_default();
        *known = attempts.max(*known);
    }

    fn fail(&mut self, seq: i64, attempts: u32) {
        self.tables.refused.remove(&self.key(seq));
        self.tables.failed.entry(seq).or_insert(attempts);
    }

    fn save_cursor(&mut self) {
        let cursor = match self.mutant {
            Mutant::SavesRead => self.delivery.position().clone(),
            _ => self.delivery.acked().clone(),
        };
        if self.mutant != Mutant::SavesBeforeRecords {
            self.write_down();
        }
        tell!(self, "save {:?}", cursor.under_way.as_ref().map(|u| u.last_seq));
        self.tables.cursor = cursor;
    }

    /// Tries the streams again that are due.
    fn retry(&mut self) -> bool {
        self.write_down();
        let mut did = false;
        while let Some((stream, limit)) = self.delivery.stream_to_retry(self.now, self.batch_size) {
            did = true;
            let mut seqs = self.tables.waiting(&stream, limit + 1);
            let all = seqs.len() <= limit;
            seqs.truncate(limit);
            if seqs.is_empty() {
                self.delivery.stream_cleared(&stream);
                continue;
            }
            let bytes = seqs.iter().map(|seq| bytes(*seq)).sum();
            let entries = self.entries(&seqs);
            self.send(&seqs, bytes);
            self.delivery.sent_again(entries, bytes, all);
        }
        // Whoever waits until then must not find that nothing is to be done.
        let due = self.delivery.due_at();
        let wakes_for_nothing = due.is_some_and(|at| at <= self.now) && !self.delivery.wants_connection(self.now);
        assert!(!wakes_for_nothing, "due at {due:?}, yet there is nothing to do");
        did
    }

    fn entries(&self, seqs: &[i64]) -> Vec<Entry> {
        let entry = |seq: &i64| Entry {
            seq: *seq,
            stream: name(self.database.row(*seq).stream),
            max_attempts: 1 + *seq as u32 % self.max_attempts,
        };
        seqs.iter().map(entry).collect()
    }

    fn send(&mut self, seqs: &[i64], bytes: usize) {
        assert!(self.delivery.has_room());
        let in_flight: usize = self.in_flight.iter().map(|(_, bytes)| bytes).sum();
        assert!(self.in_flight.len() < WINDOW_BATCHES, "too many batches in flight");
        assert!(
            in_flight < WINDOW_BYTES || self.in_flight.is_empty(),
            "too many bytes in flight"
        );
        tell!(self, "send {seqs:?}");
        self.in_flight.push_back((seqs.to_vec(), bytes));
        let commands = seqs.iter().map(|seq| Command {
            seq: *seq,
            stream: name(self.database.row(*seq).stream),
        });
        let sent = Sent {
            commands: commands.collect(),
            replies: Vec::new(),
            read: 0,
        };
        // A sender that has ended takes nothing more; its last report is on the way.
        if let Some(connection) = self.connection.as_mut().filter(|c| !c.ended) {
            connection.batches.push_back(sent);
        }
    }

    fn take_tick(&mut self) {
        let tick = self.database.tick(&mut self.rng);
        self.ticks.push(Arc::new(tick));
    }

    /// Reads up to `limit` rows on, as far as there is room; false: there is nothing to read.
    fn read(&mut self, limit: usize) -> bool {
        if !self.delivery.has_room() {
            self.seen.full_windows += u32::from(!self.in_flight.is_empty());
            return false;
        }
        if self.mutant != Mutant::ParksBeforeRecords {
            self.write_down();
        }
        let start = self.delivery.position().clone();
        let from = start.from.clone();
        let (to, last_seq) = match &start.under_way {
            Some(under_way) => (under_way.to.clone(), under_way.last_seq),
            None => {
                let reached = self.ticks.iter().position(|tick| Arc::ptr_eq(tick, &from));
                match self.ticks.get(reached.map_or(0, |index| index + 1)) {
                    Some(tick) => (tick.clone(), 0),
                    None => return false,
                }
            }
        };
        let towards = |seq| Position::towards(from.clone(), to.clone(), seq);
        let mut scan = RangeScan::open(&mut self.database.view(), &from, &to, last_seq);
        // What the transaction comes to; nothing of it happens if it aborts.
        let (mut built, mut parked, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
        let mut batch = Built::default();
        let mut room = self.delivery.room().expect("checked above");
        let mut reached = start.clone();
        for _ in 0..limit {
            let key = match scan.step() {
                None => {
                    reached = Position::at(to.clone());
                    break;
                }
                Some(Step::Passed(key)) => key,
                Some(Step::Row(key)) => {
                    let stream = name(self.database.row(key.seq).stream);
                    self.seen.late += u32::from(key.seq <= from.low_seq);
                    match self.delivery.on_row(key.seq, &stream) {
                        RowFate::Skip => {
                            self.seen.skipped += 1;
                            skipped.push(key.seq);
                        }
                        RowFate::Park => {
                            self.seen.parked += 1;
                            parked.push(key.seq);
                        }
                        RowFate::Send => {
                            let size = bytes(key.seq);
                            if batch.seqs.len() >= self.batch_size || batch.bytes + size > BATCH_BYTES {
                                let full = batch.close(towards(batch.last()), &mut room);
                                built.extend(full);
                            }
                            if batch.seqs.is_empty() && (room.batches == 0 || room.bytes == 0) {
                                break;
                            }
                            batch.seqs.push(key.seq);
                            batch.bytes += size;
                        }
                    }
                    key
                }
            };
            reached = towards(key.seq);
        }
        built.extend(batch.close(reached.clone(), &mut room));
        if self.likely(self.faults.aborts) {
            tell!(self, "abort");
            return false;
        }
        if self.mutant != Mutant::ForgetsParked {
            parked.iter().for_each(|seq| self.park(*seq, 0));
        }
        tell!(self, "park {parked:?}, skip {skipped:?}");
        skipped
            .iter()
            .chain(&parked)
            .for_each(|seq| self.delivery.skipped(*seq));
        for Built { seqs, bytes, end } in built {
            let end = end.expect("closed");
            self.send(&seqs, bytes);
            let entries = self.entries(&seqs);
            self.delivery.sent(entries, end, bytes);
        }
        self.delivery.advanced(reached);
        true
    }

    /// A new life, from what was saved.
    fn crash(&mut self) {
        tell!(self, "crash");
        self.seen.crashes += 1;
        self.shake();
        self.pending.clear();
        self.in_flight.clear();
        for key in self.database.rows() {
            if !self.tables.cursor.covers(key) || self.tables.refused.contains_key(&self.key(key.seq)) {
                *self.doubts.entry(key.seq).or_default() += 1;
            }
        }
        self.drop_connection();
        self.ticks.clear();
        let streams = self.tables.streams();
        self.delivery = Delivery::new(
            Mode::AtLeastOnce,
            Cursor {
                position: self.tables.cursor.clone(),
                number: 0,
            },
            streams,
            self.backoff,
        );
        self.accepted = 0;
    }

    /// The settings changed.
    fn change_settings(&mut self) {
        if self.rng.bool() {
            tell!(self, "abandon");
            self.doubt(0);
            self.delivery.abandon();
            self.drop_connection();
        }
        if self.rng.bool() {
            self.write_down();
            self.delivery.set_streams(self.tables.streams());
        }
        self.delivery.retry_now();
    }

    // --- the sender and Redis

    fn execute(&mut self) -> bool {
        let old_first = self.rng.bool();
        (old_first && self.execute_old()) || self.execute_new() || self.execute_old()
    }

    fn execute_old(&mut self) -> bool {
        self.leftovers.retain(|written| !written.is_empty());
        if self.leftovers.is_empty() {
            return false;
        }
        let index = self.rng.usize(..self.leftovers.len());
        if let Some(command) = self.leftovers[index].pop_front() {
            self.redis.execute(&command, &mut self.rng);
        }
        true
    }

    fn execute_new(&mut self) -> bool {
        let Some(connection) = self.connection.as_mut().filter(|c| c.up && !c.ended) else {
            return false;
        };
        let mut written = connection.batches.iter_mut().take(PIPELINED_BATCHES);
        let Some(sent) = written.find(|sent| sent.replies.len() < sent.commands.len()) else {
            return false;
        };
        let reply = self.redis.execute(&sent.commands[sent.replies.len()], &mut self.rng);
        sent.replies.push(reply);
        true
    }

    fn read_reply(&mut self) -> bool {
        let Some(connection) = self.connection.as_mut().filter(|c| !c.ended) else {
            return false;
        };
        let Some(sent) = connection.batches.front_mut().filter(|s| s.read < s.replies.len()) else {
            return false;
        };
        sent.read += 1;
        if sent.read == sent.commands.len() {
            let refused = sent.refused();
            connection.batches.pop_front();
            connection.reports.push_back(Report::Done {
                refused,
                buffer: Vec::new(),
            });
        }
        true
    }

    fn connect(&mut self, succeeds: bool) -> bool {
        let Some(connection) = self.connection.as_mut().filter(|c| !c.up && !c.ended) else {
            return false;
        };
        if succeeds {
            connection.up = true;
            connection.reports.push_back(Report::Connected);
        } else {
            connection.ended = true;
            connection.reports.push_back(Report::Lost {
                failure: match self.rng.bool() {
                    true => Failure::backend("connection refused"),
                    false => Failure::configuration("NOAUTH Authentication required."),
                },
                accepted: 0,
                refused: Vec::new(),
            });
        }
        true
    }

    fn lose_connection(&mut self) {
        let Some(connection) = self.connection.as_mut().filter(|c| c.up && !c.ended) else {
            return;
        };
        let (accepted, refused) = connection
            .batches
            .front()
            .map_or((0, Vec::new()), |s| (s.read, s.refused()));
        connection.reports.push_back(Report::Lost {
            failure: Failure::backend("connection reset by peer"),
            accepted,
            refused,
        });
        self.leave_over();
        if let Some(connection) = &mut self.connection {
            connection.ended = true;
            connection.batches.clear();
        }
    }

    /// What was written may be executed later, or some of it.
    fn leave_over(&mut self) {
        if let Some(connection) = &self.connection {
            let mut written: VecDeque<Command> = connection.unexecuted().cloned().collect();
            written.truncate(self.rng.usize(..=written.len()));
            self.leftovers.push(written);
        }
    }

    fn drop_connection(&mut self) {
        self.leave_over();
        self.connection = None;
    }

    fn change_health(&mut self) {
        if self.likely(self.faults.trouble) {
            self.redis.trouble = match self.redis.trouble {
                Some(_) if self.faults.tidy && self.on_their_way().next().is_some() => return,
                Some(_) => None,
                None => Some(out_of_memory()),
            };
        }
        if self.likely(self.faults.sick) {
            let stream = name(self.rng.u8(..STREAMS));
            if self.redis.sick.contains(&stream) {
                let disturbs = self.on_their_way().any(|other| other == stream);
                if !(self.faults.tidy && disturbs) {
                    self.redis.sick.remove(&stream);
                }
            } else {
                self.redis.sick.insert(stream);
            }
        }
    }

    /// The streams of all that the worker has no news of yet, or that is still to be executed.
    fn on_their_way(&self) -> impl Iterator<Item = Rc<str>> {
        let in_flight = self.in_flight.iter().flat_map(|(seqs, _)| seqs);
        let in_flight = in_flight.map(|seq| name(self.database.row(*seq).stream));
        let leftovers = self.leftovers.iter().flatten().map(|command| command.stream.clone());
        in_flight.chain(leftovers)
    }

    // --- the schedule

    fn random_step(&mut self) -> Result<(), String> {
        match self.rng.u8(..100) {
            0..15 => self.database.steps(&mut self.rng, 6),
            15..20 => self.take_tick(),
            20..35 => {
                let limit = self.rng.usize(..40);
                self.read(limit);
            }
            35..40 => drop(self.retry()),
            40..60 => {
                for _ in 0..self.rng.usize(..30) {
                    self.execute();
                }
            }
            60..75 => {
                for _ in 0..self.rng.usize(..30) {
                    self.read_reply();
                }
            }
            75..85 => drop(self.take_report()),
            85..90 => {
                self.tend_connection();
                let succeeds = !self.likely(self.faults.losses * 5.0);
                self.connect(succeeds);
            }
            90..93 => {
                self.save_cursor();
                self.check_cursor()?;
            }
            93..96 => self.write_down(),
            _ => self.now += self.backoff.delay.mul_f64(self.rng.f64() * 2.0),
        }
        self.change_health();
        if self.likely(self.faults.losses) {
            self.lose_connection();
        }
        if self.likely(self.faults.crashes) {
            self.crash();
        }
        if self.likely(self.faults.settings) {
            self.change_settings();
        }
        Ok(())
    }

    /// Goes on without faults until nothing is left to do at this time; how far the clock may go is the caller's.
    fn run_dry(&mut self) -> Result<(), String> {
        for _ in 0..100_000 {
            self.tend_connection();
            let did = [
                self.connect(true),
                self.take_report(),
                self.retry(),
                self.read_on(),
                self.execute(),
                self.read_reply(),
            ];
            if !did.contains(&true) {
                return Ok(());
            }
        }
        Err("does not come to an end".to_owned())
    }

    /// Reads a large piece; true: there was something.
    fn read_on(&mut self) -> bool {
        self.faults.aborts = 0.0;
        let before = self.delivery.position().clone();
        self.read(1_000) && !self.delivery.position().same_place(&before)
    }

    fn finish(&mut self) -> Result<(), String> {
        self.database.finish(&mut self.rng);
        self.take_tick();
        if self.faults.tidy {
            self.run_dry()?;
        }
        self.redis.trouble = None;
        self.redis.fickle = 0.0;
        // The backend comes up; some streams are still refused, and their time does not come: the others go on.
        for _ in 0..4 {
            self.delivery.retry_now();
            self.run_dry()?;
        }
        let end = self.delivery.position().clone();
        self.write_down();
        for key in self.database.rows().filter(|key| self.database.is_committed(key.seq)) {
            if !end.covers(key) {
                return Err(format!("{} was not read, yet only some streams are refused", key.seq));
            }
            let waits = self.tables.refused.contains_key(&self.key(key.seq));
            if !waits && !self.redis.held.contains(&key.seq) && !self.tables.failed.contains_key(&key.seq) {
                return Err(format!("{} was read and is nowhere", key.seq));
            }
        }
        // Now some are mended, or all; each of the others has its attempts.
        let mends_all = self.rng.bool();
        self.redis.sick.retain(|_| !mends_all);
        for _ in 0..10_000 {
            self.run_dry()?;
            if self.tables.refused.is_empty() {
                return Ok(());
            }
            match self.delivery.due_at() {
                Some(due) => self.now = self.now.max(due),
                None => return Err("events wait, and nothing is due".to_owned()),
            }
        }
        Err("events wait for ever".to_owned())
    }

    // --- the oracle

    /// Whatever the saved cursor has passed is in its stream, or written down.
    fn check_cursor(&self) -> Result<(), String> {
        for key in self.database.rows() {
            if !self.tables.cursor.covers(key) || !self.database.is_committed(key.seq) {
                continue;
            }
            let written = self.tables.failed.contains_key(&key.seq)
                || self.tables.refused.contains_key(&self.key(key.seq))
                || self.redis.held.contains(&key.seq);
            if !written {
                return Err(format!("the saved cursor passed {}, which is nowhere", key.seq));
            }
        }
        Ok(())
    }

    fn check_end(&mut self) -> Result<(), String> {
        self.save_cursor();
        self.check_cursor()?;
        if !self.delivery.is_idle() || !self.pending.is_empty() {
            return Err("not idle".to_owned());
        }
        if self.delivery.published() != self.accepted {
            return Err(format!(
                "published {} of {} accepted",
                self.delivery.published(),
                self.accepted
            ));
        }
        for key in self.database.rows() {
            let seq = key.seq;
            let stream = name(self.database.row(seq).stream);
            let entries = self.redis.streams.get(&stream).map_or(&[][..], Vec::as_slice);
            let count = entries.iter().filter(|entry| **entry == seq).count();
            let failed = self.tables.failed.contains_key(&seq);
            let doubts = self.doubts.get(&seq).copied().unwrap_or(0);
            if !self.database.is_committed(seq) {
                if count > 0 || failed {
                    return Err(format!("{seq} never committed"));
                }
                continue;
            }
            if !self.tables.cursor.covers(key) {
                return Err(format!("the cursor does not cover {seq}"));
            }
            if count == 0 && !failed {
                return Err(format!("{seq} is lost"));
            }
            if count > 1 + doubts as usize {
                return Err(format!("{seq} is {count} times in its stream, in doubt {doubts} times"));
            }
            if failed && !self.redis.refused.contains(&stream) {
                return Err(format!("{seq} has failed, yet none of {stream} was refused"));
            }
            if failed && count > 0 && doubts == 0 {
                return Err(format!("{seq} has failed and is in its stream"));
            }
        }
        for (stream, entries) in &self.redis.streams {
            if self.shaken.contains(stream) || (!self.faults.tidy && self.redis.disturbed.contains(stream)) {
                continue;
            }
            let mut met = HashSet::new();
            let first = entries.iter().copied().filter(|seq| met.insert(*seq));
            // A crash forgets that an event has failed.
            let first = first.filter(|seq| !self.tables.failed.contains_key(seq));
            if let Some((before, after)) = self.database.out_of_order(first) {
                return Err(format!("{after} comes after {before} in {stream}"));
            }
        }
        Ok(())
    }
}

/// What an event takes on its way: mostly little, some much, and more than a window.
fn bytes(seq: i64) -> usize {
    match seq % 97 {
        13 | 57 => 700 * 1024,
        31 => 3 * 1024 * 1024,
        n => 200 + n as usize,
    }
}

fn schedule(seed: u64, mutant: Mutant) -> Result<Seen, String> {
    run_world(World::new(seed, mutant))
}

fn run_world(mut world: World) -> Result<Seen, String> {
    run(&mut world).map_err(|e| format!("{e}\n{:?}", world.faults))?;
    Ok(world.seen)
}

fn run(world: &mut World) -> Result<(), String> {
    for _ in 0..world.rng.usize(20..600) {
        world.random_step()?;
    }
    world.check_cursor()?;
    world.finish()?;
    world.check_end()
}

#[test]
fn loses_and_repeats_nothing() {
    let all = RefCell::new(Seen::default());
    for_each_seed(2_000, |seed| {
        *all.borrow_mut() += schedule(seed, Mutant::None)?;
        Ok(())
    });
    let seen = *all.borrow();
    let counts = [
        seen.parked,
        seen.skipped,
        seen.failed,
        seen.failed_streams,
        seen.accepted_after_waiting,
        seen.lost_in_mid_batch,
        seen.crashes,
        seen.full_windows,
        seen.late,
    ];
    let enough = counts.iter().all(|count| *count > 0) || std::env::var_os("SEED").is_some();
    assert!(enough, "too tame: {seen:?}");
}

/// The first thing that the oracle says about a worker that is wrong.
fn said_of(mutant: Mutant) -> String {
    caught(300, |seed| schedule(seed, mutant).map(drop))
}

#[test]
fn the_oracle_catches_a_cursor_ahead_of_what_was_acknowledged() {
    let said = said_of(Mutant::SavesRead);
    assert!(said.contains("which is nowhere"), "{said}");
}

#[test]
fn the_oracle_catches_a_cursor_ahead_of_the_records() {
    let said = said_of(Mutant::SavesBeforeRecords);
    assert!(said.contains("which is nowhere"), "{said}");
}

#[test]
fn the_oracle_catches_refused_events_that_are_not_written_down() {
    let said = said_of(Mutant::ForgetsRefused);
    assert!(said.contains("which is nowhere"), "{said}");
}

#[test]
fn the_oracle_catches_waiting_events_that_are_not_written_down() {
    let said = said_of(Mutant::ForgetsParked);
    assert!(said.contains("is nowhere"), "{said}");
}

#[test]
fn the_oracle_catches_waiting_events_that_are_written_down_before_the_first() {
    let said = caught(2_000, |seed| {
        let mut world = World::new(seed, Mutant::ParksBeforeRecords);
        world.faults = Faults {
            sick: 0.2,
            crashes: 0.03,
            tidy: true,
            ..Faults::NONE
        };
        run_world(world).map(drop)
    });
    assert!(said.contains("comes after"), "{said}");
}

#[test]
fn an_outage_alone_fails_nothing() {
    for_each_seed(300, |seed| {
        let mut world = World::new(seed, Mutant::None);
        world.faults = Faults {
            trouble: 0.1,
            losses: 0.05,
            ..Faults::NONE
        };
        world.redis.fickle = 0.0;
        world.max_attempts = 1;
        let seen = run_world(world)?;
        let untouched = seen.parked == 0 && seen.failed == 0 && seen.failed_streams == 0;
        untouched.then_some(()).ok_or(format!("{seen:?}"))
    });
}

/// Nothing is ever in doubt, so nothing may be repeated, whatever Redis refuses.
#[test]
fn refusals_alone_repeat_nothing() {
    for_each_seed(300, |seed| {
        let mut world = World::new(seed, Mutant::None);
        world.faults = Faults {
            sick: 0.02,
            trouble: 0.1,
            aborts: 0.1,
            ..Faults::NONE
        };
        world.redis.fickle = 0.3;
        run_world(world).map(drop)
    });
}
