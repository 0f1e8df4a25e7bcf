//! What is said on one connection of a backend with `exactly_once`, without the connection: orders and replies go in,
//! bytes and reports come out.
//!
//! ```text
//! WATCH, HGETALL guard ──▶ report Guard ──(order Claim)──▶ MULTI, HSET, EXEC ──▶ WATCH, HMGET token ──▶ report Claimed
//!     ┌────────────────────────────────────────────────────────────────────────────────────────┐
//!     ▼                                                                                        │
//! armed: the token was read under WATCH, and is ours ──(a batch is queued)──▶ EXEC, WATCH, HMGET ┴▶ report Done
//! ```
//! If somebody else claims the guard between HMGET and EXEC, EXEC answers nil and nothing is written. So an EXEC is
//! sent only when armed; the commands of the next batch are queued in Redis meanwhile. After a batch of which something
//! was refused, nothing is sent until the worker has written that down (order Resume).
//!
//! - [`state`] the states, and what replies are expected; [`replies`] what they mean
//! - [`claim`] reading and claiming the guard; [`batches`]; [`search`] for events in their streams; [`surveying`] their
//!   consumer groups

mod batches;
mod claim;
mod replies;
mod search;
mod state;
mod surveying;

use crate::failure::{Failure, Trouble};
use crate::guard::append_token;
use crate::redis::replicas::Replicas;
use crate::resp::bounds::Bounds;
use crate::resp::read::Reply;
use crate::resp::write::append_command;
use crate::sender::conversation::replies::well;
use crate::sender::conversation::state::{ConversationState, Expect, Kind, Next};
use crate::sender::orders::{Order, Report};
use crate::sender::tails::Search;
use std::collections::VecDeque;

/// One connection's conversation. Once [`Self::reply`] returns an error it has ended.
pub struct Conversation {
    /// The guard's.
    key: Vec<u8>,
    replicas: Option<Replicas>,
    state: ConversationState,
    /// What the replies that are still to come answer.
    expected: VecDeque<Expect>,
    out: Vec<u8>,
}

impl Conversation {
    /// Begins with reading the guard at `key`. `ousting`: gives it this token first. A busy owner would touch the guard
    /// under every claim; now it has to read the guard again before it appends anything more.
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
            state: ConversationState::Unclaimed,
            expected,
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
        match (self.expected.front(), &self.state) {
            (Some(Expect::Guard), _) => Bounds::guard(),
            (Some(Expect::Token), _) => Bounds::TOKEN,
            (Some(Expect::ClaimExec), _) => Bounds::CLAIM,
            (Some(Expect::Exec), ConversationState::Executing { batch, .. }) => Bounds::executed(batch.batch.commands),
            (Some(Expect::Exec), _) => Bounds::executed(0),
            (Some(Expect::Search), ConversationState::Searching { search, .. }) => search.bounds(),
            (Some(Expect::Search), _) => Bounds::INFO,
            (Some(Expect::Survey), ConversationState::Surveying { survey, .. }) => survey.bounds(),
            (Some(Expect::Survey), _) => Bounds::GROUPS,
            (Some(Expect::Ousting), _) => Bounds::line("HSET of the guard"),
            (Some(Expect::Watch), _) => Bounds::line("WATCH"),
            (Some(Expect::Claiming), _) => Bounds::line("a command of a claim"),
            (Some(Expect::Queued { .. }), _) => Bounds::line("a command of a batch"),
            (Some(Expect::Replicas { .. }), _) => Bounds::line("WAIT"),
            (Some(Expect::Discard), _) => Bounds::line("DISCARD"),
            (None, _) => Bounds::line("nothing"),
        }
    }

    /// Whether the same WAIT is about to be sent once more, which is not urgent.
    pub fn waits_again(&self) -> bool {
        let is_repeated = matches!(self.expected.back(), Some(Expect::Replicas { reported: Some(_) }));
        is_repeated && !self.out.is_empty()
    }

    /// What it means that the next reply could not be received.
    pub fn unreadable(&self, failure: Failure) -> Failure {
        match self.expected.front() {
            Some(Expect::Guard) if failure.trouble == Trouble::TooLongReply => self.no_guard("the guard is too large"),
            _ => failure,
        }
    }

    /// Whether a batch is written but not done with.
    pub fn is_busy(&self) -> bool {
        self.state.batches().next().is_some()
    }

    /// Whether the guard's release was ordered and is not confirmed.
    pub fn is_releasing(&self) -> bool {
        self.state.batches().any(|batch| batch.kind == Kind::Release)
    }

    /// Whether an order may be given now.
    pub fn wants_order(&self) -> bool {
        match &self.state {
            ConversationState::Unclaimed | ConversationState::Stopped { .. } => self.expected.is_empty(),
            ConversationState::Armed { .. } => true,
            ConversationState::Executing { next, .. } | ConversationState::Rearming { next, .. } => {
                // While it waits for replicas, nothing may be queued behind: a further WAIT would be queued too.
                self.replicas.is_none() && matches!(next, Next::Nothing)
            }
            ConversationState::Claiming { .. }
            | ConversationState::Searching { .. }
            | ConversationState::Surveying { .. }
            | ConversationState::Replicating { .. } => false,
        }
    }

    /// Takes an order of the worker, if it wants one.
    pub fn order(&mut self, order: Order) {
        if !self.wants_order() {
            return;
        }
        self.state = match (std::mem::take(&mut self.state), order) {
            (ConversationState::Unclaimed, Order::Claim(claim)) => self.claim(*claim),
            (ConversationState::Stopped { token }, Order::Resume) => {
                self.rearm();
                let next = Next::Nothing;
                ConversationState::Rearming { token, next }
            }
            (ConversationState::Armed { token }, Order::Look(wanted)) => {
                self.search(token, Box::new(Search::new(&wanted)))
            }
            (ConversationState::Executing { token, batch, .. }, Order::Look(wanted)) => {
                let next = Next::Search(Box::new(Search::new(&wanted)));
                ConversationState::Executing { token, batch, next }
            }
            (ConversationState::Rearming { token, .. }, Order::Look(wanted)) => {
                let next = Next::Search(Box::new(Search::new(&wanted)));
                ConversationState::Rearming { token, next }
            }
            (ConversationState::Armed { token }, Order::Survey(survey)) => self.survey(token, survey, &mut Vec::new()),
            (ConversationState::Executing { token, batch, .. }, Order::Survey(survey)) => {
                let next = Next::Survey(survey);
                ConversationState::Executing { token, batch, next }
            }
            (ConversationState::Rearming { token, .. }, Order::Survey(survey)) => {
                let next = Next::Survey(survey);
                ConversationState::Rearming { token, next }
            }
            (state, Order::Batch(batch)) => self.queue(state, batch, Kind::Batch),
            // A batch on its way says as much as a refresh.
            (state @ ConversationState::Executing { .. }, Order::Beat { released: false, .. }) => state,
            (state, Order::Beat { beat, released }) => {
                let (batch, kind) = self.beat(beat, released);
                self.queue(state, batch, kind)
            }
            // The worker has not heard yet that it is stopped: it will read those rows again.
            (state, _) => state,
        };
    }

    /// The replies to a refresh if all is as usual; `None`: none may be written now, or not all at once.
    pub fn usual_answer_to_beat(&self) -> Option<Vec<u8>> {
        let ConversationState::Armed { token } = &self.state else {
            return None;
        };
        if self.awaits_reply() || self.replicas.is_some() {
            return None;
        }
        // MULTI, HSET of fields that are there, EXEC; WATCH, HMGET.
        let answer = format!(
            "+OK\r\n+QUEUED\r\n*1\r\n:0\r\n+OK\r\n*1\r\n${}\r\n{token}\r\n",
            token.len()
        );
        Some(answer.into_bytes())
    }

    /// Takes in the next reply, and appends what there is to report. An error ends the connection.
    pub fn reply(&mut self, reply: Reply<'_>, reports: &mut Vec<Report>) -> Result<(), Failure> {
        match self.expected.pop_front() {
            None => return Err(Failure::backend("a reply to no command")),
            Some(Expect::Ousting) => well(&reply.value()?).map_err(|failure| self.at_key(failure))?,
            Some(Expect::Watch | Expect::Claiming) => well(&reply.value()?)?,
            Some(Expect::Guard) => reports.push(Report::Guard(Box::new(self.guard(reply)?))),
            Some(Expect::ClaimExec) => self.claimed(&reply.value()?)?,
            Some(Expect::Token) => self.token(&reply.value()?, reports)?,
            Some(Expect::Queued { next, commands }) => {
                if !reply.is_queued() {
                    self.not_queued(&reply.value()?, next, reports)?;
                }
                if next + 1 < commands {
                    let next = next + 1;
                    self.expected.push_front(Expect::Queued { next, commands });
                }
            }
            Some(Expect::Exec) => self.executed(reply, reports)?,
            Some(Expect::Replicas { reported }) => self.replicated(&reply.value()?, reported, reports)?,
            Some(Expect::Discard) => {}
            Some(Expect::Search) => self.found(reply, reports)?,
            Some(Expect::Survey) => self.surveyed(reply, reports)?,
        }
        Ok(())
    }
}
