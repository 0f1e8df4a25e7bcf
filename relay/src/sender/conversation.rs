//! What is said on one connection of a backend with `exactly_once`, without the connection: orders and replies go in, bytes and
//! reports come out.
//!
//! ```text
//! WATCH, HGETALL guard ──▶ report Guard ──(order Claim)──▶ MULTI, HSET, EXEC ──▶ WATCH, HMGET token ──▶ report Claimed
//!     ┌────────────────────────────────────────────────────────────────────────────────────────┐
//!     ▼                                                                                        │
//! armed: the token was read under WATCH, and is ours ──(a batch is queued)──▶ EXEC, WATCH, HMGET ┴▶ report Done
//! ```
//! A claim by somebody else between HMGET and EXEC makes EXEC answer nil; nothing is written then. So an EXEC is sent only when
//! armed, and the commands of the next batch are queued in Redis meanwhile. After a batch of which something was refused,
//! nothing is sent until the worker has written that down (order Resume).

use crate::delivery::flight::Refusal;
use crate::failure::{self, Class, Failure, Trouble};
use crate::fault::{self, Mutation, Point};
use crate::guard::{BATCH_START, Guard, Mark, Progress, append_beat, append_claim, append_progress, append_token};
use crate::redis::replicas::Replicas;
use crate::resp::bounds::Bounds;
use crate::resp::read::{Reply, ReplyItems};
use crate::resp::write::append_command;
use crate::sender::orders::Claim;
use crate::sender::orders::{Batch, Order, Report};
use crate::sender::tails::Search;
use redis::Value;
use std::collections::VecDeque;

/// What the next replies answer.
enum Expect {
    Ousting,
    Watch,
    Guard,
    /// A reply that matters only if it is an error: of MULTI, of a command that is queued for a claim.
    Claiming,
    ClaimExec,
    Token,
    /// Of a batch's commands being queued: MULTI, then the entries, then HSET.
    Queued {
        batch: u64,
        next: usize,
        commands: usize,
    },
    Exec,
    Replicas,
    Discard,
    Search,
}

/// A batch whose commands were written.
struct Written {
    /// Tells it from the others of this connection.
    id: u64,
    batch: Batch,
    /// Errors of commands that were not even queued.
    unqueued: Vec<Refusal>,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Batch,
    Beat,
    Release,
}

enum Phase {
    /// The guard is read, or a claim waited for.
    Claiming,
    Claimed,
    /// Something was refused: waits for [`Order::Resume`].
    Stopped,
}

/// One connection's conversation. Once [`Self::reply`] returns an error it has ended.
pub struct Conversation {
    key: Vec<u8>,
    replicas: Option<Replicas>,
    token: Option<String>,
    /// The token has been read back.
    was_claimed: bool,
    phase: Phase,
    expected: VecDeque<Expect>,
    armed: bool,
    /// Its commands are queued in Redis, EXEC is not sent.
    queued: Option<Written>,
    /// Batches written so far.
    written: u64,
    /// Its EXEC is sent; one at a time.
    executing: VecDeque<Written>,
    /// Executed; waits for replicas.
    executed: Option<(Written, Vec<Refusal>)>,
    search: Option<Search>,
    /// What was told of too few replicas.
    told_of_replicas: Option<String>,
    out: Vec<u8>,
}

impl Conversation {
    /// Begins with reading the guard at `key`. `ousting`: gives it this token first. An owner who appends without a pause would touch the
    /// guard under every claim; now it has to read it again, before it appends anything more.
    pub fn new(key: &str, replicas: Option<Replicas>, ousting: Option<&str>) -> Self {
        let key = key.as_bytes().to_vec();
        let mut out = Vec::new();
        let mut expected = VecDeque::new();
        if let Some(token) = ousting {
            append_token(&mut out, &key, token);
            expected.push_back(Expect::Ousting);
        }
        append_command(&mut out, &[b"WATCH", &key]);
        expected.extend([Expect::Watch, Expect::Guard]);
        append_command(&mut out, &[b"HGETALL", &key]);
        Self {
            key,
            replicas,
            token: None,
            was_claimed: false,
            phase: Phase::Claiming,
            expected,
            armed: false,
            queued: None,
            written: 0,
            executing: VecDeque::new(),
            executed: None,
            search: None,
            told_of_replicas: None,
            out,
        }
    }

    /// Bytes to be written; the caller empties it.
    pub fn output(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    pub fn awaits_reply(&self) -> bool {
        !self.expected.is_empty()
    }

    /// What the next reply may have.
    pub fn bounds(&self) -> Bounds {
        match self.expected.front() {
            Some(Expect::Guard) => Bounds::guard(),
            Some(Expect::Token) => Bounds::TOKEN,
            Some(Expect::ClaimExec) => Bounds::CLAIM,
            Some(Expect::Exec) => Bounds::executed(self.executing.front().map_or(0, |w| w.batch.commands)),
            Some(Expect::Search) => self.search.as_ref().map_or(Bounds::INFO, Search::bounds),
            Some(Expect::Ousting) => Bounds::line("HSET of the guard"),
            Some(Expect::Watch) => Bounds::line("WATCH"),
            Some(Expect::Claiming) => Bounds::line("a command of a claim"),
            Some(Expect::Queued { .. }) => Bounds::line("a command of a batch"),
            Some(Expect::Replicas) => Bounds::line("WAIT"),
            Some(Expect::Discard) => Bounds::line("DISCARD"),
            None => Bounds::line("nothing"),
        }
    }

    /// Whether the same WAIT is about to be said once more, which is no hurry.
    pub fn waits_again(&self) -> bool {
        self.told_of_replicas.is_some() && !self.out.is_empty()
    }

    /// What it means that the next reply could not be received.
    pub fn unreadable(&self, failure: Failure) -> Failure {
        match self.expected.front() {
            Some(Expect::Guard) if failure.trouble == Trouble::TooLongReply => {
                self.no_guard("the guard is larger than any")
            }
            _ => failure,
        }
    }

    /// Whether a batch is written but not done with.
    pub fn is_busy(&self) -> bool {
        self.queued.is_some() || !self.executing.is_empty() || self.executed.is_some()
    }

    /// Whether an order may be given now.
    pub fn wants_order(&self) -> bool {
        match self.phase {
            Phase::Claiming => self.expected.is_empty(),
            // While it waits for replicas, nothing may be queued behind: a further WAIT would be queued too.
            Phase::Claimed if self.replicas.is_some() => self.armed && !self.is_busy() && self.search.is_none(),
            Phase::Claimed => self.queued.is_none() && self.search.is_none(),
            Phase::Stopped => self.expected.is_empty(),
        }
    }

    /// Takes an order of the worker.
    pub fn order(&mut self, order: Order) {
        match (&self.phase, order) {
            (Phase::Claiming, Order::Claim(claim)) => self.claim(*claim),
            (Phase::Claimed, Order::Batch(batch)) => self.queue(batch, Kind::Batch),
            (Phase::Claimed, Order::Beat { beat, released }) => {
                // A batch on its way says as much.
                if released || !self.is_busy() {
                    self.beat(beat, released);
                }
            }
            (Phase::Claimed, Order::Look(wanted)) => {
                self.search = Some(Search::new(&wanted));
                self.ask();
            }
            (Phase::Stopped, Order::Resume) => {
                self.phase = Phase::Claimed;
                self.rearm();
            }
            // The worker has not heard yet that it is stopped: it will read those rows again.
            (_, _) => {}
        }
    }

    fn claim(&mut self, claim: Claim) {
        self.out.extend_from_slice(BATCH_START);
        append_claim(&mut self.out, &self.key, &claim.token, &claim.owner);
        self.expected.extend([Expect::Claiming, Expect::Claiming]);
        if let Some(start) = &claim.start {
            let progress = Progress {
                mark: Mark {
                    number: start.number,
                    position: &start.position,
                    previous: &start.position,
                    compares: start.compares,
                },
                again: &[],
                wal: start.wal,
                total: start.total,
            };
            append_progress(&mut self.out, &self.key, &progress);
            self.expected.push_back(Expect::Claiming);
        }
        append_command(&mut self.out, &[b"EXEC"]);
        self.expected.push_back(Expect::ClaimExec);
        self.token = Some(claim.token);
        self.phase = Phase::Claimed;
    }

    /// The replies to a refresh if all is as usual; `None`: none may be written now, or not at one go.
    pub fn usual_answer_to_beat(&self) -> Option<Vec<u8>> {
        let may = matches!(self.phase, Phase::Claimed) && self.armed && !self.is_busy() && !self.awaits_reply();
        let token = self.token.as_ref().filter(|_| may && self.replicas.is_none())?;
        // MULTI, HSET of fields that are there, EXEC; WATCH, HMGET.
        let answer = format!(
            "+OK\r\n+QUEUED\r\n*1\r\n:0\r\n+OK\r\n*1\r\n${}\r\n{token}\r\n",
            token.len()
        );
        Some(answer.into_bytes())
    }

    /// Whether the guard's release was ordered and is not confirmed.
    pub fn is_releasing(&self) -> bool {
        let executing = self.executing.iter().chain(&self.queued);
        executing
            .chain(self.executed.iter().map(|(written, _)| written))
            .any(|w| matches!(w.kind, Kind::Release))
    }

    fn beat(&mut self, beat: u64, released: bool) {
        let mut bytes = BATCH_START.to_vec();
        append_beat(&mut bytes, &self.key, beat, released);
        let kind = if released { Kind::Release } else { Kind::Beat };
        self.queue(Batch { bytes, commands: 0 }, kind);
    }

    fn queue(&mut self, batch: Batch, kind: Kind) {
        self.out.extend_from_slice(&batch.bytes);
        let commands = batch.commands + 2;
        self.written += 1;
        self.expected.push_back(Expect::Queued {
            batch: self.written,
            next: 0,
            commands,
        });
        self.queued = Some(Written {
            id: self.written,
            batch,
            unqueued: Vec::new(),
            kind,
        });
        self.execute();
    }

    /// Sends EXEC, if it may.
    fn execute(&mut self) {
        let is_free = self.armed && self.executing.is_empty() && self.executed.is_none();
        if self.queued.is_none() || !(is_free || fault::is_mutated(Mutation::TwoExecs)) {
            return;
        }
        self.armed = false;
        self.executing.extend(self.queued.take());
        append_command(&mut self.out, &[b"EXEC"]);
        self.expected.push_back(Expect::Exec);
        match self.replicas {
            Some(replicas) => self.wait(replicas),
            None => self.rearm(),
        }
    }

    fn wait(&mut self, replicas: Replicas) {
        replicas.append_wait(&mut self.out);
        self.expected.push_back(Expect::Replicas);
    }

    fn rearm(&mut self) {
        if !fault::is_mutated(Mutation::NoWatch) {
            append_command(&mut self.out, &[b"WATCH", &self.key]);
            self.expected.push_back(Expect::Watch);
        }
        append_command(&mut self.out, &[b"HMGET", &self.key, b"token"]);
        self.expected.push_back(Expect::Token);
    }

    fn ask(&mut self) {
        if self.search.as_ref().is_some_and(|search| search.ask(&mut self.out)) {
            self.expected.push_back(Expect::Search);
        }
    }

    /// Takes in the next reply, and appends what there is to report. An error ends the connection.
    pub fn reply(&mut self, reply: Reply<'_>, reports: &mut Vec<Report>) -> Result<(), Failure> {
        match self.expected.pop_front() {
            None => return Err(Failure::backend("a reply that nobody asked for")),
            Some(Expect::Ousting) => well(&reply.value()?).map_err(|failure| self.at_key(failure))?,
            Some(Expect::Watch | Expect::Claiming) => well(&reply.value()?)?,
            Some(Expect::Guard) => {
                let guard = guard(reply).map_err(|failure| self.at_key(failure))?;
                reports.push(Report::Guard(Box::new(guard)));
            }
            Some(Expect::ClaimExec) => match reply.value()? {
                Value::Array(replies) => {
                    replies.iter().try_for_each(well)?;
                    match self.replicas {
                        Some(replicas) => self.wait(replicas),
                        None => self.rearm(),
                    }
                }
                Value::Nil => return Err(touched()),
                Value::ServerError(error) => return Err(failure::aborted(&error)),
                other => return Err(failure::unexpected(&other)),
            },
            Some(Expect::Token) => self.token(&reply.value()?, reports)?,
            Some(Expect::Queued { batch, next, commands }) => {
                if !reply.is_queued() {
                    self.not_queued(batch, &reply.value()?, next, reports)?;
                }
                if next + 1 < commands {
                    let next = next + 1;
                    self.expected.push_front(Expect::Queued { batch, next, commands });
                }
            }
            Some(Expect::Exec) => self.executed(reply, reports)?,
            Some(Expect::Replicas) => self.replicated(&reply.value()?, reports)?,
            Some(Expect::Discard) => {}
            Some(Expect::Search) => {
                let is_whole = match &mut self.search {
                    Some(search) => search.reply(reply)?,
                    None => true,
                };
                if !is_whole {
                    self.expected.push_front(Expect::Search);
                    return Ok(());
                }
                self.ask();
                if !self.expected.iter().any(|e| matches!(e, Expect::Search))
                    && let Some(search) = self.search.take()
                {
                    reports.push(Report::Seen(search.into_found()));
                }
            }
        }
        Ok(())
    }

    /// Where a guard is that is none; any other failure is as it is.
    fn at_key(&self, failure: Failure) -> Failure {
        match failure.message.starts_with("WRONGTYPE") || failure.message.starts_with("the guard") {
            true => self.no_guard(&failure.message),
            false => failure,
        }
    }

    fn no_guard(&self, what: &str) -> Failure {
        Failure::of(
            Trouble::NoGuard,
            format!("{what}: {}", String::from_utf8_lossy(&self.key)),
        )
    }

    fn token(&mut self, value: &Value, reports: &mut Vec<Report>) -> Result<(), Failure> {
        let is_ours = match value {
            Value::Array(tokens) => match tokens.as_slice() {
                [Value::BulkString(token)] => self.token.as_ref().is_some_and(|ours| ours.as_bytes() == token),
                _ => false,
            },
            other => return Err(failure::unexpected(other)),
        };
        if !is_ours && !fault::is_mutated(Mutation::NoWatch) {
            return Err(touched());
        }
        if matches!(self.phase, Phase::Stopped) {
            return Ok(());
        }
        if !std::mem::replace(&mut self.armed, true) && self.is_first_arming() {
            fault::reach(Point::AfterClaim);
            reports.push(Report::Claimed);
        }
        self.execute();
        Ok(())
    }

    /// Whether no batch has been armed before: the claim has just been confirmed.
    fn is_first_arming(&mut self) -> bool {
        !std::mem::replace(&mut self.was_claimed, true)
    }

    /// One command of a batch was not queued (or is MULTI).
    fn not_queued(
        &mut self,
        batch: u64,
        value: &Value,
        index: usize,
        reports: &mut Vec<Report>,
    ) -> Result<(), Failure> {
        let mut on_their_way = self.queued.iter_mut().chain(&mut self.executing);
        let Some(written) = on_their_way.find(|written| written.id == batch) else {
            // It has been discarded.
            return Ok(());
        };
        if let Value::ServerError(error) = value {
            let failure = failure::reply(error);
            match index.checked_sub(1).filter(|entry| *entry < written.batch.commands) {
                Some(entry) => {
                    let is_last_word = failure.trouble == Trouble::TooLarge;
                    written.unqueued.push((entry, failure));
                    if is_last_word {
                        self.cut_off(batch, reports);
                    }
                }
                // MULTI or the guard's HSET: without them nothing can be appended.
                None => return Err(failure.not_of_an_event()),
            }
        }
        Ok(())
    }

    fn executed(&mut self, reply: Reply<'_>, reports: &mut Vec<Report>) -> Result<(), Failure> {
        fault::reach(Point::AfterExec);
        let Some(written) = self.executing.pop_front() else {
            return Err(Failure::backend("a reply to no EXEC"));
        };
        let commands = written.batch.commands;
        let mut refused = Vec::new();
        match reply.items() {
            _ if reply.is_strings_and_number(commands) => {}
            Some(replies) if replies.len() == commands + 1 => refused = refusals(replies)?,
            Some(_) => return Err(Failure::backend("unexpected reply to EXEC")),
            None if reply.is_nil() => return Err(touched()),
            None => match reply.value()? {
                Value::ServerError(error) => return self.aborted(written, &error, reports),
                _ => return Err(Failure::backend("unexpected reply to EXEC")),
            },
        }
        if self.replicas.is_some() {
            self.executed = Some((written, refused));
        } else {
            self.done(written, refused, reports);
        }
        Ok(())
    }

    fn done(&mut self, written: Written, refused: Vec<Refusal>, reports: &mut Vec<Report>) {
        match written.kind {
            Kind::Beat => {}
            Kind::Release => reports.push(Report::Released),
            Kind::Batch => {
                if !refused.is_empty() {
                    self.stop();
                }
                reports.push(Report::Done {
                    refused,
                    buffer: written.batch.bytes,
                });
            }
        }
    }

    /// Redis would not execute the batch: nothing of it was appended.
    fn aborted(
        &mut self,
        written: Written,
        error: &redis::ServerError,
        reports: &mut Vec<Report>,
    ) -> Result<(), Failure> {
        let blames_backend = written.unqueued.iter().find(|(_, f)| f.class != Class::Event);
        if let Some((_, failure)) = blames_backend {
            return Err(failure.clone());
        }
        if written.unqueued.is_empty() {
            return Err(failure::aborted(error));
        }
        self.stop();
        reports.push(Report::Aborted {
            refused: written.unqueued,
            buffer: written.batch.bytes,
        });
        Ok(())
    }

    /// The server takes no more of this connection after an entry that is too large for it: nothing of its batch is appended.
    fn cut_off(&mut self, batch: u64, reports: &mut Vec<Report>) {
        let is_queued = self.queued.as_ref().is_some_and(|written| written.id == batch);
        let cut = match is_queued {
            true => self.queued.take(),
            false => self.executing.pop_front(),
        };
        self.stop();
        let of_events = cut.filter(|written| written.unqueued.iter().all(|(_, f)| f.class == Class::Event));
        reports.extend(of_events.map(|written| Report::Aborted {
            refused: written.unqueued,
            buffer: written.batch.bytes,
        }));
    }

    /// Nothing more is appended until the worker has written down what was refused.
    fn stop(&mut self) {
        self.phase = Phase::Stopped;
        self.armed = false;
        if self.queued.take().is_some() {
            append_command(&mut self.out, &[b"DISCARD"]);
            self.expected.push_back(Expect::Discard);
        }
    }

    fn replicated(&mut self, value: &Value, reports: &mut Vec<Report>) -> Result<(), Failure> {
        let Some(replicas) = self.replicas else {
            return Ok(());
        };
        if let Err(failure) = replicas.judge(value)? {
            if self.told_of_replicas.as_ref() != Some(&failure.message) {
                self.told_of_replicas = Some(failure.message.clone());
                reports.push(Report::Behind(failure));
            }
            self.wait(replicas);
            return Ok(());
        }
        self.told_of_replicas = None;
        if let Some((written, refused)) = self.executed.take() {
            self.done(written, refused, reports);
        }
        if !matches!(self.phase, Phase::Stopped) {
            self.rearm();
        }
        Ok(())
    }
}

/// Of the replies to a batch's entries and to the guard's HSET behind them.
fn refusals(replies: ReplyItems<'_>) -> Result<Vec<Refusal>, Failure> {
    let commands = replies.len() - 1;
    let mut refused = Vec::new();
    for (index, reply) in replies.enumerate() {
        if index < commands && reply.is_bulk() {
            continue;
        }
        match reply.value()? {
            Value::ServerError(_) if fault::is_mutated(Mutation::IgnoreErrorReply) => {}
            Value::ServerError(error) if index < commands => {
                // Within a transaction that was executed nothing will come of trying the same again at once: it is this entry's.
                let mut failure = failure::reply(&error);
                failure.class = Class::Event;
                refused.push((index, failure));
            }
            Value::Int(_) if index == commands => {}
            other => return Err(failure::unexpected(&other)),
        }
    }
    Ok(refused)
}

fn guard(reply: Reply<'_>) -> Result<Option<Guard>, Failure> {
    let Some(mut items) = reply.items() else {
        return Err(failure::unexpected(&reply.value()?));
    };
    let mut fields = Vec::new();
    while let (Some(field), Some(value)) = (items.next(), items.next()) {
        match (field.string(), value.string()) {
            (Some(field), Some(value)) => fields.push((field, value)),
            _ => return Err(failure::not_redis()),
        }
    }
    Guard::parse(&fields).map_err(|e| Failure::of(Trouble::NoGuard, e.to_string()))
}

/// Somebody else has claimed, or the guard is gone: whoever connects again will see.
fn touched() -> Failure {
    Failure::backend("its guard was touched by somebody else")
}

fn well(value: &Value) -> Result<(), Failure> {
    match value {
        Value::Okay | Value::SimpleString(_) | Value::Int(_) => Ok(()),
        other => Err(failure::unexpected(other)),
    }
}
