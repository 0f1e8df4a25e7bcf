//! A Postgres server with its tables and its worker, which does what the extension's does.

use crate::model::connection::Connection;
use crate::model::database::Database;
use crate::model::redis::{event_id, stream_name};
use crate::recovery::Stage;
use crate::world::{Env, Mutant, tell};
use relay::claim::Watch;
use relay::delivery::{Cursor, Delivery, Entry, Mode, RowFate};
use relay::encode::hyphenated;
use relay::guard::{BATCH_START, Progress, append_progress};
use relay::reader::{Position, RangeScan, Step};
use relay::refusal::{Record, Streams};
use relay::sender::{Batch, Order, Report};
use relay::snapshot::Tick;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

pub const STREAMS: u8 = 4;

#[derive(Clone, Copy, Debug)]
pub struct Refused {
    pub attempts: u32,
    /// The batch in which it was accepted at last; `None`: it waits.
    pub accepted_in: Option<u64>,
}

#[derive(Clone)]
pub struct Tables {
    /// By stream and seq.
    pub refused: BTreeMap<(u8, i64), Refused>,
    pub failed: BTreeMap<i64, u32>,
    pub cursor: Cursor,
    /// Of the server, and where the one before it ended.
    pub incarnations: Vec<(String, u64)>,
}

impl Tables {
    pub fn is_written_down(&self, stream: u8, seq: i64) -> bool {
        self.refused.contains_key(&(stream, seq)) || self.failed.contains_key(&seq)
    }

    pub fn waiting(&self) -> impl Iterator<Item = (u8, i64, u32)> {
        let waiting = self.refused.iter().filter(|(_, refused)| refused.accepted_in.is_none());
        waiting.map(|((stream, seq), refused)| (*stream, *seq, refused.attempts))
    }

    fn waiting_in(&self, stream: u8) -> impl Iterator<Item = i64> {
        self.waiting()
            .filter(move |(of, ..)| *of == stream)
            .map(|(_, seq, _)| seq)
    }

    pub fn streams(&self) -> Streams {
        let mut heads = BTreeMap::new();
        for (stream, _, attempts) in self.waiting() {
            heads.entry(stream_name(stream)).or_insert(attempts);
        }
        Streams::waiting(heads)
    }

    pub fn highest_written_down(&self) -> i64 {
        let refused = self.refused.keys().map(|(_, seq)| seq);
        refused.chain(self.failed.keys()).copied().max().unwrap_or(0)
    }

    pub fn fail(&mut self, stream: u8, seq: i64, attempts: u32) {
        self.refused.remove(&(stream, seq));
        self.failed.entry(seq).or_insert(attempts);
    }

    pub fn park(&mut self, stream: u8, seq: i64, attempts: u32) {
        let new = Refused {
            attempts,
            accepted_in: None,
        };
        let known = self.refused.entry((stream, seq)).or_insert(new);
        known.attempts = known.attempts.max(attempts);
    }

    /// Redis has lost what came after batch `number`.
    pub fn heal(&mut self, number: u64) -> bool {
        let mut lost = false;
        for refused in self.refused.values_mut() {
            if refused.accepted_in.is_some_and(|batch| batch > number) {
                refused.accepted_in = None;
                lost = true;
            }
        }
        lost
    }
}

/// What a crash brings back.
#[derive(Clone)]
pub struct Image {
    pub database: Database,
    pub tables: Tables,
    pub wal: u64,
}

pub struct Site {
    pub place: String,
    pub database: Database,
    pub tables: Tables,
    /// Position of the WAL, and up to where it is surely on disk.
    pub wal: u64,
    pub flushed: u64,
    /// How it was at the last flush or later.
    pub image: Option<Box<Image>>,
    pub delivery: Delivery,
    pub connection: Option<Connection>,
    pub stage: Stage,
    pub watch: Watch,
    /// The newest tick of this life of the worker.
    pub latest: Option<Arc<Tick>>,
    /// Not yet written down, in order.
    pub pending: Vec<Record>,
    beat: u64,
}

/// A batch that waits for the end of the transaction it was read in.
struct Built {
    seqs: Vec<i64>,
    end: Position,
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
            delivery: delivery(env, &tables),
            database,
            tables,
            wal: wal + 1,
            flushed: wal + 1,
            image: None,
            connection: None,
            stage: Stage::None,
            watch: Watch::default(),
            latest: None,
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
        let place = std::mem::take(&mut self.place);
        *self = Self::of(env, &place, image);
    }

    /// The worker dies and comes back.
    pub fn crash_worker(&mut self, env: &mut Env) {
        tell!(env, "the worker crashes");
        env.seen.crashes += 1;
        self.drop_connection(env);
        self.delivery = delivery(env, &self.tables);
        (self.stage, self.watch) = (Stage::None, Watch::default());
        self.latest = None;
        self.pending.clear();
    }

    /// Writes down what was refused, and how far it has come.
    pub fn save(&mut self, env: &mut Env) {
        for record in std::mem::take(&mut self.pending) {
            self.record(env, record, self.delivery.number());
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

    pub fn record(&mut self, env: &mut Env, record: Record, number: u64) {
        tell!(env, "  {record:?} ({number})");
        let tables = &mut self.tables;
        let stream = |seq| self.database.row(seq).stream;
        match record {
            Record::Park { seq, attempts, .. } => {
                env.seen.parked += 1;
                tables.park(stream(seq), seq, attempts);
            }
            Record::Fail { seq, attempts, .. } => {
                env.seen.failed += 1;
                tables.fail(stream(seq), seq, attempts);
            }
            Record::Accepted { seq } => {
                env.seen.accepted_after_waiting += 1;
                if let Some(refused) = tables.refused.get_mut(&(stream(seq), seq)) {
                    refused.accepted_in = Some(number);
                }
            }
            Record::RefusedAgain { seq, attempts, .. } => {
                if let Some(refused) = tables.refused.get_mut(&(stream(seq), seq)) {
                    refused.attempts = attempts;
                }
            }
            Record::FailStream { seq, attempts, .. } => {
                env.seen.failed += 1;
                let stream = stream(seq);
                tables.fail(stream, seq, attempts);
                for seq in tables.waiting_in(stream).collect::<Vec<_>>() {
                    tables.fail(stream, seq, 1);
                }
            }
        }
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
        self.connection = Some(Connection::open(&mut env.redis, env.clients, env.replicas));
        true
    }

    pub fn drop_connection(&mut self, env: &mut Env) {
        self.stage = Stage::None;
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
                self.decide(env, *guard);
                Vec::new()
            }
            Report::Claimed => {
                self.begin(env);
                Vec::new()
            }
            Report::Seen(found) => {
                self.seen(env, found);
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
                self.delivery.lost(failure, accepted, refused, env.now, random)
            }
            Report::Released => Vec::new(),
            Report::Connected => unreachable!("no sender of exactly_once says that"),
        };
        self.pending.extend(records);
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
        self.latest = Some(Arc::new(tick));
    }

    /// Tries the streams again that are due.
    pub fn retry(&mut self, env: &mut Env) -> bool {
        if !self.pending.is_empty() {
            return false;
        }
        let mut did = false;
        while let Some((stream, limit)) = self.delivery.stream_to_retry(env.now, env.batch_size) {
            did = true;
            let number = stream.as_bytes().last().expect("a name") - b'0';
            let mut seqs: Vec<i64> = self.tables.waiting_in(number).take(limit + 1).collect();
            let all = seqs.len() <= limit;
            seqs.truncate(limit);
            if seqs.is_empty() {
                self.delivery.stream_cleared(&stream);
                continue;
            }
            env.seen.retries += 1;
            let entries = self.entries(env, &seqs);
            self.send(env, &seqs, None);
            self.delivery.sent_again(entries, 100, all);
        }
        did
    }

    fn entries(&self, env: &Env, seqs: &[i64]) -> Vec<Entry> {
        let entry = |seq: &i64| Entry {
            seq: *seq,
            stream: Rc::from(stream_name(self.database.row(*seq).stream)),
            max_attempts: 1 + *seq as u32 % env.max_attempts,
        };
        seqs.iter().map(entry).collect()
    }

    fn send(&mut self, env: &mut Env, seqs: &[i64], end: Option<&Position>) {
        let mut bytes = BATCH_START.to_vec();
        for seq in seqs {
            let row = self.database.row(*seq);
            append(
                &mut bytes,
                &[
                    b"XADD",
                    stream_name(row.stream).as_bytes(),
                    b"*",
                    b"event_id",
                    &hyphenated(&event_id(row.uid)),
                ],
            );
        }
        let mark = self.delivery.mark(end);
        let again = match (end, env.mutant) {
            (Some(_), _) | (None, Mutant::ForgetsAgain) => &[],
            (None, _) => seqs,
        };
        let previous = match env.mutant {
            Mutant::WrongPrevious => mark.position,
            _ => mark.previous,
        };
        let progress = Progress {
            number: mark.number,
            position: mark.position,
            previous,
            again,
            compares: mark.compares,
            wal: self.flushed,
            total: 0,
        };
        tell!(env, "send {} {seqs:?} {}, after {previous}", mark.number, mark.position);
        append_progress(&mut bytes, crate::model::redis::GUARD.as_bytes(), &progress);
        self.order(Order::Batch(Batch {
            bytes,
            commands: seqs.len(),
        }));
    }

    /// Reads up to `limit` rows on, as far as there is room; false: there is nothing to read.
    pub fn read(&mut self, env: &mut Env, limit: usize) -> bool {
        let Some(mut room) = self.delivery.room() else {
            return false;
        };
        if !self.pending.is_empty() && env.mutant != Mutant::ResumesUnsaved {
            self.save(env);
        }
        let start = self.delivery.position().clone();
        let from = start.from.clone();
        let (to, last_seq) = match &start.under_way {
            Some(under_way) => (under_way.to.clone(), under_way.last_seq),
            None => match &self.latest {
                Some(tick) if !Arc::ptr_eq(tick, &from) => (tick.clone(), 0),
                _ => return false,
            },
        };
        let towards = |seq| Position::towards(from.clone(), to.clone(), seq);
        let mut scan = RangeScan::open(&mut self.database.view(), &from, &to, last_seq);
        let (mut built, mut parked, mut skipped): (Vec<Built>, Vec<_>, Vec<i64>) = Default::default();
        let mut batch: Vec<i64> = Vec::new();
        let mut reached = start.clone();
        for _ in 0..limit {
            let key = match scan.step() {
                None => {
                    reached = Position::at(to.clone());
                    break;
                }
                Some(Step::Passed(key)) => key,
                Some(Step::Row(key)) => {
                    let stream = self.database.row(key.seq).stream;
                    let looks = env.mutant != Mutant::ReadsBlindly && self.delivery.may_be_written_down(key.seq);
                    if looks && self.tables.is_written_down(stream, key.seq) {
                        env.seen.written_down += 1;
                        skipped.push(key.seq);
                    } else {
                        match self.delivery.on_row(key.seq, &stream_name(stream)) {
                            RowFate::Skip => {
                                env.seen.skipped += 1;
                                skipped.push(key.seq);
                            }
                            RowFate::Park => parked.push((stream, key.seq)),
                            RowFate::Send => {
                                if batch.len() >= env.batch_size {
                                    let seqs = std::mem::take(&mut batch);
                                    let end = towards(*seqs.last().expect("full"));
                                    built.push(Built { seqs, end });
                                }
                                if batch.is_empty() {
                                    if room.batches == 0 {
                                        break;
                                    }
                                    room.batches -= 1;
                                }
                                batch.push(key.seq);
                            }
                        }
                    }
                    key
                }
            };
            reached = towards(key.seq);
        }
        if !batch.is_empty() {
            built.push(Built {
                seqs: batch,
                end: reached.clone(),
            });
        }
        if env.likely(env.faults.aborts) {
            tell!(env, "abort");
            return false;
        }
        if !parked.is_empty() {
            env.seen.parked += parked.len() as u32;
            tell!(env, "park {parked:?}");
            parked
                .iter()
                .for_each(|(stream, seq)| self.tables.park(*stream, *seq, 0));
            self.wal += 1;
            if env.mutant != Mutant::ParksUnflushed {
                self.flush(env);
            }
        }
        let parked = parked.iter().map(|(_, seq)| seq);
        skipped.iter().chain(parked).for_each(|seq| self.delivery.skipped(*seq));
        for Built { seqs, end } in built {
            let entries = self.entries(env, &seqs);
            self.send(env, &seqs, Some(&end));
            self.delivery.sent(entries, end, 100 * seqs.len());
        }
        self.delivery.advanced(reached);
        true
    }

    /// A large piece; true: it came further.
    pub fn read_on(&mut self, env: &mut Env) -> bool {
        let before = self.delivery.position().clone();
        self.read(env, 1_000) && !self.delivery.position().same_place(&before)
    }

    /// Some part of the way of some event.
    pub fn go_on(&mut self, env: &mut Env) -> bool {
        match env.rng.u8(..16) {
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
    let mut delivery = Delivery::new(Mode::ExactlyOnce, tables.cursor.clone(), tables.streams(), env.backoff);
    delivery.set_reread_to(tables.highest_written_down());
    delivery
}

fn append(out: &mut Vec<u8>, words: &[&[u8]]) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}
