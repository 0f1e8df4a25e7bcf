//! A backend, or a lane of one: its delivery, and its connection to Redis.

use crate::env::{Env, Mutant, tell};
use crate::model::connection::Connection;
use crate::model::database::Row;
use crate::model::redis::{event_id, stream_name};
use crate::site::Site;
use crate::tables::{Saved, Tables};
use relay::delivery::batch::OpenBatch;
use relay::delivery::flight::{BatchedEvent, Contents};
use relay::delivery::refusal::{Record, Retry};
use relay::delivery::{Delivery, Guarantee};
use relay::event::text::hyphenated;
use relay::guard::{BATCH_START, Mark, Progress, append_progress};
use relay::reading::role::Role;
use relay::reading::snapshot::Tick;
use relay::recovery::Recovery;
use relay::sender::orders::{Batch, Order, Report};
use std::rc::Rc;
use std::sync::Arc;

/// Hash slots of the cluster; each has its own master.
pub(crate) const HASH_SLOTS: usize = 3;

/// The hash slot of a stream.
pub(crate) fn hash_slot(stream: u8) -> u16 {
    u16::from(stream) % HASH_SLOTS as u16
}

pub(crate) struct Lane {
    /// The hash slot that it serves; `None`: the backend itself, or its finder.
    pub(crate) slot: Option<u16>,
    pub(crate) role: Role,
    /// Whether it was created in this life of the worker.
    pub(crate) is_new: bool,
    pub(crate) delivery: Delivery,
    pub(crate) connection: Option<Connection>,
    pub(crate) recovery: Recovery,
    /// Whether an attempt was requested.
    pub(crate) take_over: bool,
    /// Whether the events that it sees are being looked for in the streams.
    pub(crate) comparing_to: Option<Arc<Tick>>,
    /// Restores whose events were all looked for, in its streams.
    pub(crate) compared: Vec<u64>,
    /// None of these transactions has a higher id.
    pub(crate) last_compared: u64,
    /// Results that are not saved yet, in order.
    pub(crate) pending: Vec<Record>,
    beat: u64,
}

impl Lane {
    /// Everything that is in the tables.
    pub(crate) fn load_all(env: &Env, tables: &Tables) -> Vec<Self> {
        let saved = tables.saved.iter();
        saved
            .map(|(slot, saved)| Self::new(env, tables, *slot, saved))
            .collect()
    }

    pub(crate) fn new(env: &Env, tables: &Tables, slot: Option<u16>, saved: &Saved) -> Self {
        let role = match env.is_cluster && slot.is_none() {
            true => Role::Finder,
            false => Role::Redis,
        };
        let streams = tables.streams(|stream| serves(slot, stream));
        let mut delivery = Delivery::new(Guarantee::ExactlyOnce, saved.cursor.clone(), streams, env.backoff);
        delivery.set_reread_to(tables.highest_written_down());
        Self {
            slot,
            role,
            is_new: false,
            delivery,
            connection: None,
            recovery: Recovery::default(),
            take_over: false,
            comparing_to: None,
            compared: Vec::new(),
            last_compared: 0,
            pending: Vec::new(),
            beat: 0,
        }
    }

    /// Whether the events of a stream are its own.
    pub(crate) fn serves(&self, stream: u8) -> bool {
        serves(self.slot, stream)
    }

    /// The Redis that it is connected to.
    pub(crate) fn master(&self) -> usize {
        self.slot.map_or(0, usize::from)
    }
}

/// Whether the events of a stream are those of a lane.
pub(crate) fn serves(slot: Option<u16>, stream: u8) -> bool {
    slot.is_none_or(|slot| slot == hash_slot(stream))
}

impl Site {
    pub(crate) fn tend(&mut self, env: &mut Env, at: usize) -> bool {
        let lane = &self.lanes[at];
        if lane.role == Role::Finder || !lane.delivery.wants_connection(env.now) {
            return false;
        }
        assert!(self.lanes[at].connection.is_none(), "a second connection");
        self.lanes[at].delivery.connecting();
        env.clients += 1;
        let master = self.lanes[at].master();
        let ousting = self.lanes[at].take_over.then(|| format!("ousting-{}", env.clients));
        let opened = Connection::open(&mut env.redis[master], env.clients, env.replicas, ousting.as_deref());
        self.lanes[at].connection = Some(opened);
        true
    }

    pub(crate) fn drop_connection(&mut self, env: &mut Env, at: usize) {
        self.lanes[at].recovery.reset();
        if let Some(connection) = self.lanes[at].connection.take() {
            let rng = &mut env.rng;
            let leftover = connection.into_leftover(|written| rng.usize(..=written));
            env.leftovers.push((self.lanes[at].master(), leftover));
        }
    }

    pub(crate) fn order(&mut self, at: usize, order: Order) {
        if let Some(connection) = &mut self.lanes[at].connection {
            connection.order(order);
        }
    }

    pub(crate) fn take_report(&mut self, env: &mut Env, at: usize) -> bool {
        let Some(report) = self.lanes[at].connection.as_mut().and_then(Connection::report) else {
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
                self.lanes[at].recovery.read(*guard);
                Vec::new()
            }
            Report::Claimed => {
                self.lanes[at].recovery.claimed();
                Vec::new()
            }
            Report::Seen(found) => {
                self.lanes[at].recovery.seen(found);
                Vec::new()
            }
            Report::Done { refused, .. } => {
                tell!(
                    env,
                    "done {}, refused {refused:?}",
                    self.lanes[at].delivery.number() + 1
                );
                self.lanes[at].delivery.replied(refused, env.now, random)
            }
            Report::Aborted { refused, .. } => {
                tell!(env, "aborted {refused:?}");
                env.seen.aborted += 1;
                self.lanes[at].delivery.aborted(refused, env.now, random)
            }
            Report::Behind(failure) => {
                self.lanes[at].delivery.waits_for_replicas(failure);
                Vec::new()
            }
            Report::Lost {
                failure,
                accepted,
                refused,
            } => {
                tell!(env, "lost: {failure}");
                self.drop_connection(env, at);
                self.lanes[at].recovery.interrupt();
                self.lanes[at]
                    .delivery
                    .lost(failure, accepted, refused, env.now, random)
            }
            Report::Released => Vec::new(),
            Report::Found(_) | Report::Connected | Report::Surveyed(..) => unreachable!("no conversation says that"),
        };
        self.lanes[at].pending.extend(records);
        self.recover(env, at);
        true
    }

    /// Lets the sender continue when the refusals are saved.
    pub(crate) fn resume(&mut self, env: &mut Env, at: usize) -> bool {
        if !self.lanes[at].delivery.is_stopped() {
            return false;
        }
        env.seen.stops += 1;
        if env.mutant != Mutant::ResumesUnsaved {
            self.save(env, at);
        }
        if env.mutant != Mutant::ResumesUnflushed {
            self.flush(env);
        }
        self.order(at, Order::Resume);
        self.lanes[at].delivery.resume();
        true
    }

    pub(crate) fn refresh(&mut self, at: usize) {
        if self.lanes[at].delivery.has_room() && self.lanes[at].delivery.is_idle() {
            self.lanes[at].beat += 1;
            let (beat, released) = (self.lanes[at].beat, false);
            self.order(at, Order::Beat { beat, released });
        }
    }

    /// Starts again with another connection.
    pub(crate) fn let_go(&mut self, env: &mut Env, at: usize) {
        self.drop_connection(env, at);
        self.lanes[at].delivery.abandon();
    }

    /// Retries the streams that are due.
    pub(crate) fn retry(&mut self, env: &mut Env, at: usize) -> bool {
        if !self.lanes[at].pending.is_empty() {
            return false;
        }
        let mut did = self.fail_waiting(env, at);
        loop {
            let heads = env.rng.usize(1..4);
            let due = self.lanes[at].delivery.streams_to_retry(env.now, heads, env.batch_size);
            if due.is_empty() {
                return did;
            }
            did = true;
            let (mut batch, mut all) = (Vec::new(), Vec::new());
            for Retry { stream, count } in due {
                if !batch.is_empty() && env.likely(0.1) {
                    self.lanes[at].delivery.stream_put_back(&stream);
                    continue;
                }
                let waiting = self.tables.waiting_in(number_of(&stream));
                let mut seqs: Vec<i64> = waiting.take(count + 1).collect();
                match seqs.len() {
                    0 => self.lanes[at].delivery.stream_cleared(&stream),
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
            self.send(env, at, batch, Contents::Waiting { all });
        }
    }

    /// Fails some of the waiting events in streams whose head has failed.
    fn fail_waiting(&mut self, env: &mut Env, at: usize) -> bool {
        let failing = self.lanes[at].delivery.streams_to_fail(2);
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
            through
                .iter()
                .for_each(|stream| self.lanes[at].delivery.stream_failed(stream));
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

    pub(crate) fn send(&mut self, env: &mut Env, at: usize, batch: OpenBatch, contents: Contents) {
        let OpenBatch { mut bytes, entries, .. } = batch;
        let seqs: Vec<i64> = entries.iter().map(|entry| entry.seq).collect();
        let end = match &contents {
            Contents::Rows { end } => Some(end),
            Contents::Waiting { .. } => None,
        };
        let mark = self.lanes[at].delivery.mark(end);
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
            own_stream: "",
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
        self.order(at, Order::Batch(Batch { bytes, commands }));
        self.lanes[at].delivery.sent(entries, contents, size);
    }

    /// Whether nothing is left to do, as far as the worker knows.
    pub(crate) fn rest(&mut self, at: usize) -> bool {
        let position = self.lanes[at].delivery.position();
        let is_latest = |latest| Arc::ptr_eq(&position.from, latest) && position.under_way.is_none();
        if self.lanes[at].delivery.has_room() && self.latest.as_ref().is_some_and(is_latest) {
            self.lanes[at].delivery.rest(true);
        }
        false
    }

    /// Some part of the way of some event.
    pub(crate) fn go_on(&mut self, env: &mut Env, at: usize) -> bool {
        match env.rng.u8(..19) {
            0 => self.tend(env, at),
            1 => self.retry(env, at),
            2 => {
                let limit = env.rng.usize(..30);
                self.read(env, limit)
            }
            3 => self.resume(env, at),
            4..6 => self.take_report(env, at),
            6..11 => self.execute(env, at),
            11..15 => self.read_reply(at),
            15 => self.rest(at),
            16 => self.finish_lanes(env),
            17 => self.pass_by(env),
            _ => self.write(at),
        }
    }

    // --- the connection to Redis

    pub(crate) fn execute(&mut self, env: &mut Env, at: usize) -> bool {
        let lane = &mut self.lanes[at];
        let master = lane.master();
        lane.connection
            .as_mut()
            .is_some_and(|c| c.execute(&mut env.redis[master]))
    }

    pub(crate) fn read_reply(&mut self, at: usize) -> bool {
        self.lanes[at].connection.as_mut().is_some_and(Connection::read)
    }

    pub(crate) fn write(&mut self, at: usize) -> bool {
        self.lanes[at].connection.as_mut().is_some_and(Connection::write)
    }
}

/// What is known of an event on its way.
pub(crate) fn entry(max_attempts: u32, seq: i64, row: &Row) -> BatchedEvent {
    BatchedEvent {
        seq,
        stream: Rc::from(stream_name(row.stream)),
        max_attempts: 1 + seq as u32 % max_attempts,
        committed_after_us: 0,
    }
}

/// The command that appends an event.
pub(crate) fn append_event(out: &mut Vec<u8>, row: &Row) {
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

pub(crate) fn seq_of(record: &Record) -> i64 {
    match record {
        Record::Park { seq, .. }
        | Record::Fail { seq, .. }
        | Record::Accepted { seq }
        | Record::RefusedAgain { seq, .. } => *seq,
    }
}
