//! A Postgres server and its worker, which does what the extension's does.

use crate::env::{Env, Mutant, tell};
use crate::model::connection::Connection;
use crate::model::database::{Database, Row};
use crate::model::redis::{event_id, stream_name};
use crate::tables::Tables;
use relay::delivery::batch::OpenBatch;
use relay::delivery::flight::{BatchedEvent, Contents};
use relay::delivery::refusal::{Record, Retry};
use relay::delivery::{Cursor, Delivery, Guarantee};
use relay::event::text::hyphenated;
use relay::guard::{BATCH_START, Mark, Progress, append_progress};
use relay::reading::range::Position;
use relay::reading::snapshot::Tick;
use relay::recovery::Recovery;
use relay::sender::orders::{Batch, Order, Report};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

pub const STREAMS: u8 = 4;

/// What a crash brings back.
#[derive(Clone)]
pub struct Image {
    pub database: Database,
    pub tables: Tables,
    pub wal: u64,
}

pub struct Site {
    pub place: String,
    /// Its timeline, if it was promoted; 0: it was not.
    pub promoted_to: u32,
    /// It was started beside the original.
    pub is_copy: bool,
    pub database: Database,
    pub tables: Tables,
    /// Position of the WAL, and up to where it is surely on disk.
    pub wal: u64,
    pub flushed: u64,
    /// How it was at the last flush or later.
    pub image: Option<Box<Image>>,
    pub delivery: Delivery,
    pub connection: Option<Connection>,
    pub recovery: Recovery,
    /// Somebody has asked for it.
    pub take_over: bool,
    /// The newest tick of this life of the worker.
    pub latest: Option<Arc<Tick>>,
    /// What it sees is being looked for in the streams.
    pub comparing_to: Option<Arc<Tick>>,
    /// Not yet written down, in order.
    pub pending: Vec<Record>,
    beat: u64,
}

impl Site {
    pub fn new(env: &mut Env, place: &str) -> Self {
        let tables = Tables {
            refused: BTreeMap::new(),
            failed: BTreeMap::new(),
            cursor: Cursor {
                position: Position::beginning(),
                number: 0,
            },
            epoch: 0,
            restores: Vec::new(),
            last_restore: 0,
            incarnations: Vec::new(),
        };
        let image = Image {
            database: Database::new(&mut env.rng, STREAMS),
            tables,
            wal: 1,
        };
        Self::of(env, place, image)
    }

    /// A server that finds this on its disk.
    pub fn of(env: &mut Env, place: &str, image: Image) -> Self {
        let Image {
            mut database,
            mut tables,
            wal,
        } = image;
        database.crash();
        env.incarnations += 1;
        tables.incarnations.push((format!("run-{}", env.incarnations), wal));
        Self {
            place: place.to_owned(),
            promoted_to: 0,
            is_copy: false,
            delivery: delivery(env, &tables),
            database,
            tables,
            wal: wal + 1,
            flushed: wal + 1,
            image: None,
            connection: None,
            recovery: Recovery::default(),
            take_over: false,
            latest: None,
            comparing_to: None,
            pending: Vec::new(),
            beat: 0,
        }
    }

    pub fn image(&self) -> Image {
        Image {
            database: self.database.clone(),
            tables: self.tables.clone(),
            wal: self.wal,
        }
    }

    // --- durability

    /// What has happened so far is on disk.
    pub fn flush(&mut self, env: &mut Env) {
        self.flushed = self.wal;
        let may_crash = env.likely(env.faults.server_crashes);
        self.image = may_crash.then(|| Box::new(self.image()));
        if env.faults.promotions > 0.0 && !self.is_copy && env.likely(0.1) {
            env.standby = Some(Box::new(self.image()));
        }
    }

    /// The server dies and comes back with what was on disk.
    pub fn crash_server(&mut self, env: &mut Env) {
        self.drop_connection(env);
        let now = self.image();
        let image = match self.image.take() {
            Some(image) if env.rng.bool() => *image,
            _ => now,
        };
        env.seen.lost_commits += u32::from(image.wal < self.wal);
        env.seen.server_crashes += 1;
        tell!(env, "the server crashes, and is back at {} of {}", image.wal, self.wal);
        let (place, promoted_to) = (std::mem::take(&mut self.place), self.promoted_to);
        *self = Self::of(env, &place, image);
        self.promoted_to = promoted_to;
    }

    /// The worker dies and comes back.
    pub fn crash_worker(&mut self, env: &mut Env) {
        tell!(env, "the worker crashes");
        env.seen.crashes += 1;
        self.drop_connection(env);
        self.delivery = delivery(env, &self.tables);
        self.recovery = Recovery::default();
        self.latest = None;
        self.pending.clear();
    }

    /// Writes down what was refused, and how far it has come.
    pub fn save(&mut self, env: &mut Env) {
        for record in std::mem::take(&mut self.pending) {
            self.record(env, record);
        }
        let position = match env.mutant {
            Mutant::SavesAhead => self.delivery.position(),
            _ => self.delivery.acked(),
        };
        self.tables.cursor = Cursor {
            position: position.clone(),
            number: self.delivery.number(),
        };
        self.wal += 1;
    }

    fn record(&mut self, env: &mut Env, record: Record) {
        tell!(env, "  {record:?}");
        match &record {
            Record::Park { .. } => env.seen.parked += 1,
            Record::Fail { .. } => env.seen.failed += 1,
            Record::Accepted { .. } => env.seen.accepted_after_waiting += 1,
            Record::RefusedAgain { .. } => {}
        }
        let stream = self.database.row(seq_of(&record)).stream;
        self.tables.record(stream, record, self.delivery.accepted_in());
        self.wal += 1;
    }

    // --- the worker

    pub fn tend(&mut self, env: &mut Env) -> bool {
        if !self.delivery.wants_connection(env.now) {
            return false;
        }
        assert!(self.connection.is_none(), "a second connection");
        self.delivery.connecting();
        env.clients += 1;
        let ousting = self.take_over.then(|| format!("ousting-{}", env.clients));
        let opened = Connection::open(&mut env.redis, env.clients, env.replicas, ousting.as_deref());
        self.connection = Some(opened);
        true
    }

    pub fn drop_connection(&mut self, env: &mut Env) {
        self.recovery.reset();
        if let Some(connection) = self.connection.take() {
            let rng = &mut env.rng;
            env.leftovers
                .push(connection.into_leftover(|written| rng.usize(..=written)));
        }
    }

    pub fn order(&mut self, order: Order) {
        if let Some(connection) = &mut self.connection {
            connection.order(order);
        }
    }

    pub fn take_report(&mut self, env: &mut Env) -> bool {
        let Some(report) = self.connection.as_mut().and_then(Connection::report) else {
            return false;
        };
        let random = env.rng.f64();
        let records = match report {
            Report::Guard(guard) => {
                tell!(
                    env,
                    "guard {:?}",
                    guard
                        .as_ref()
                        .as_ref()
                        .map(|g| (g.number, g.position.to_string(), &g.again, g.compares))
                );
                self.recovery.read(*guard);
                Vec::new()
            }
            Report::Claimed => {
                self.recovery.claimed();
                Vec::new()
            }
            Report::Seen(found) => {
                self.recovery.seen(found);
                Vec::new()
            }
            Report::Done { refused, .. } => {
                tell!(env, "done {}, refused {refused:?}", self.delivery.number() + 1);
                self.delivery.replied(refused, env.now, random)
            }
            Report::Aborted { refused, .. } => {
                tell!(env, "aborted {refused:?}");
                env.seen.aborted += 1;
                self.delivery.aborted(refused, env.now, random)
            }
            Report::Behind(failure) => {
                self.delivery.waits_for_replicas(failure);
                Vec::new()
            }
            Report::Lost {
                failure,
                accepted,
                refused,
            } => {
                tell!(env, "lost: {failure}");
                self.drop_connection(env);
                self.recovery.interrupt();
                self.delivery.lost(failure, accepted, refused, env.now, random)
            }
            Report::Released => Vec::new(),
            Report::Found(_) | Report::Connected => unreachable!("no conversation says that"),
        };
        self.pending.extend(records);
        self.recover(env);
        true
    }

    /// Lets the sender go on when what was refused is written down.
    pub fn resume(&mut self, env: &mut Env) -> bool {
        if !self.delivery.is_stopped() {
            return false;
        }
        env.seen.stops += 1;
        if env.mutant != Mutant::ResumesUnsaved {
            self.save(env);
        }
        if env.mutant != Mutant::ResumesUnflushed {
            self.flush(env);
        }
        self.order(Order::Resume);
        self.delivery.resume();
        true
    }

    pub fn refresh(&mut self) {
        if self.delivery.has_room() && self.delivery.is_idle() {
            self.beat += 1;
            let (beat, released) = (self.beat, false);
            self.order(Order::Beat { beat, released });
        }
    }

    pub fn take_tick(&mut self, env: &mut Env) {
        let tick = self.database.tick(&mut env.rng);
        self.wal += 1;
        if env.mutant != Mutant::SkipsFlush {
            self.flush(env);
        }
        let before = self.restores_seen();
        self.latest = Some(Arc::new(tick));
        if self.restores_seen() > before && self.connection.is_some() && env.mutant != Mutant::SendsRestored {
            tell!(env, "events of a dump have come");
            self.let_go(env);
        }
    }

    /// Restores that the newest tick sees, of which not all was looked for.
    pub fn restores_seen(&self) -> usize {
        let seen = |xid: &&u64| self.latest.as_ref().is_some_and(|tick| tick.snapshot.sees(**xid));
        self.tables.restores.iter().filter(seen).count()
    }

    /// Begins anew with another connection.
    pub fn let_go(&mut self, env: &mut Env) {
        self.drop_connection(env);
        self.delivery.abandon();
    }

    /// Tries the streams again that are due.
    pub fn retry(&mut self, env: &mut Env) -> bool {
        if !self.pending.is_empty() {
            return false;
        }
        let mut did = self.fail_waiting(env);
        loop {
            let due = self
                .delivery
                .streams_to_retry(env.now, env.rng.usize(1..4), env.batch_size);
            if due.is_empty() {
                return did;
            }
            did = true;
            let (mut batch, mut all) = (Vec::new(), Vec::new());
            for Retry { stream, count } in due {
                if !batch.is_empty() && env.likely(0.1) {
                    self.delivery.stream_put_back(&stream);
                    continue;
                }
                let waiting = self.tables.waiting_in(number_of(&stream));
                let mut seqs: Vec<i64> = waiting.take(count + 1).collect();
                match seqs.len() {
                    0 => self.delivery.stream_cleared(&stream),
                    found if found <= count => all.push(stream),
                    _ => seqs.truncate(count),
                }
                batch.append(&mut seqs);
            }
            if batch.is_empty() {
                continue;
            }
            env.seen.retries += 1;
            let batch = self.batch_of(env, &batch);
            self.send(env, batch, Contents::Waiting { all });
        }
    }

    /// Fails some of what waits in streams whose head has failed.
    fn fail_waiting(&mut self, env: &mut Env) -> bool {
        let failing = self.delivery.streams_to_fail(2);
        let mut through = Vec::new();
        for (stream, _) in &failing {
            let number = number_of(stream);
            let limit = env.rng.usize(1..5);
            let seqs: Vec<i64> = self.tables.waiting_in(number).take(limit).collect();
            tell!(env, "fails with its stream: {seqs:?}");
            for seq in &seqs {
                self.tables.fail(number, *seq, 1);
            }
            if seqs.len() < limit {
                through.push(stream);
            }
        }
        if !failing.is_empty() {
            self.wal += 1;
        }
        if !through.is_empty() {
            self.flush(env);
            through.iter().for_each(|stream| self.delivery.stream_failed(stream));
        }
        !failing.is_empty()
    }

    fn batch_of(&self, env: &Env, seqs: &[i64]) -> OpenBatch {
        let mut batch = OpenBatch::new(BATCH_START.to_vec());
        for seq in seqs {
            let row = self.database.row(*seq);
            append_event(&mut batch.bytes, row);
            batch.entries.push(entry(env.max_attempts, *seq, row));
        }
        batch
    }

    pub fn send(&mut self, env: &mut Env, batch: OpenBatch, contents: Contents) {
        let OpenBatch { mut bytes, entries, .. } = batch;
        let seqs: Vec<i64> = entries.iter().map(|entry| entry.seq).collect();
        let end = match &contents {
            Contents::Rows { end } => Some(end),
            Contents::Waiting { .. } => None,
        };
        let mark = self.delivery.mark(end);
        let again = match (end, env.mutant) {
            (Some(_), _) | (None, Mutant::ForgetsAgain) => &[],
            (None, _) => seqs.as_slice(),
        };
        let mark = Mark {
            previous: match env.mutant {
                Mutant::WrongPrevious => mark.position,
                _ => mark.previous,
            },
            ..mark
        };
        let progress = Progress {
            mark,
            again,
            wal: match env.mutant {
                Mutant::TrustsAnyHistory => 0,
                _ => self.flushed,
            },
            total: 0,
        };
        tell!(
            env,
            "send {} {seqs:?} {}, after {}",
            mark.number,
            mark.position,
            mark.previous
        );
        append_progress(&mut bytes, crate::model::redis::GUARD.as_bytes(), &progress);
        let size = bytes.len();
        let commands = entries.len();
        self.order(Order::Batch(Batch { bytes, commands }));
        self.delivery.sent(entries, contents, size);
    }

    /// Nothing is left to do, as the worker notices.
    pub fn rest(&mut self) -> bool {
        let position = self.delivery.position();
        let is_latest = |latest| Arc::ptr_eq(&position.from, latest) && position.under_way.is_none();
        if self.delivery.has_room() && self.latest.as_ref().is_some_and(is_latest) {
            self.delivery.rest(true);
        }
        false
    }

    /// Some part of the way of some event.
    pub fn go_on(&mut self, env: &mut Env) -> bool {
        match env.rng.u8(..17) {
            0 => self.tend(env),
            1 => self.retry(env),
            2 => {
                let limit = env.rng.usize(..30);
                self.read(env, limit)
            }
            3 => self.resume(env),
            4..6 => self.take_report(env),
            6..11 => self.execute(env),
            11..15 => self.read_reply(),
            15 => self.rest(),
            _ => self.write(),
        }
    }

    // --- the way to Redis

    pub fn execute(&mut self, env: &mut Env) -> bool {
        self.connection.as_mut().is_some_and(|c| c.execute(&mut env.redis))
    }

    pub fn read_reply(&mut self) -> bool {
        self.connection.as_mut().is_some_and(Connection::read)
    }

    pub fn write(&mut self) -> bool {
        self.connection.as_mut().is_some_and(Connection::write)
    }
}

fn delivery(env: &Env, tables: &Tables) -> Delivery {
    let mut delivery = Delivery::new(
        Guarantee::ExactlyOnce,
        tables.cursor.clone(),
        tables.streams(),
        env.backoff,
    );
    delivery.set_reread_to(tables.highest_written_down());
    delivery
}

/// What is known of an event on its way.
pub fn entry(max_attempts: u32, seq: i64, row: &Row) -> BatchedEvent {
    BatchedEvent {
        seq,
        stream: Rc::from(stream_name(row.stream)),
        max_attempts: 1 + seq as u32 % max_attempts,
    }
}

/// The command that appends an event.
pub fn append_event(out: &mut Vec<u8>, row: &Row) {
    let (stream, id) = (stream_name(row.stream), hyphenated(&event_id(row.uid)));
    append(out, &[b"XADD", stream.as_bytes(), b"*", b"event_id", &id]);
}

fn append(out: &mut Vec<u8>, words: &[&[u8]]) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}

fn number_of(stream: &str) -> u8 {
    stream.as_bytes().last().expect("a name") - b'0'
}

fn seq_of(record: &Record) -> i64 {
    match record {
        Record::Park { seq, .. }
        | Record::Fail { seq, .. }
        | Record::Accepted { seq }
        | Record::RefusedAgain { seq, .. } => *seq,
    }
}
