//! The conversation on one connection of a backend with `exactly_once`, without the connection itself: orders and
//! replies go in, bytes and reports come out.
//!
//! ```text
//! WATCH, HGETALL guard ──▶ report Guard ──(order Claim)──▶ MULTI, HSET, EXEC ──▶ WATCH, HMGET token ──▶ report Claimed
//!     ┌────────────────────────────────────────────────────────────────────────────────────────┐
//!     ▼                                                                                        │
//! armed: the token was read under WATCH, and is ours ──(a batch is queued)──▶ EXEC, WATCH, HMGET ┴▶ report Done
//! ```
//! If another server claims the guard between HMGET and EXEC, EXEC returns nil and nothing is written. So an EXEC is
//! sent only when armed; meanwhile, the commands of the next batch are queued in Redis. After a batch with refused
//! events, nothing is sent until the worker has written that down (order Resume).
//!
//! - [`state`] the states, and the expected replies; [`replies`] what replies mean
//! - [`claim`] reads and claims the guard; [`batches`]; [`search`] looks for events in their streams; [`surveying`]
//!   asks about their consumer groups

mod batches;
mod claim;
mod replies;
mod search;
mod state;
mod surveying;

use crate::failure::{Failure, Trouble, memory};
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

/// One connection's conversation. It has ended when [`Self::reply`] returns an error.
pub struct Conversation {
    /// The guard's key.
    key: Vec<u8>,
    replicas: Option<Replicas>,
    state: ConversationState,
    /// What the expected replies answer.
    expected: VecDeque<Expect>,
    out: Vec<u8>,
}

impl Conversation {
    /// Begins by reading the guard at `key`. `ousting`: first gives it this token. Otherwise a busy owner would change
    /// the guard during every claim. With the new token, the owner has to read the guard again before it appends
    /// anything more.
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

    /// Bytes to be written. The caller empties it.
    pub fn output(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    pub fn awaits_reply(&self) -> bool {
        !self.expected.is_empty()
    }

    /// The bounds of the next reply.
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

    /// Whether the same WAIT is about to be sent again, which is not urgent.
    pub fn waits_again(&self) -> bool {
        let is_repeated = matches!(self.expected.back(), Some(Expect::Replicas { reported: Some(_) }));
        is_repeated && !self.out.is_empty()
    }

    /// The failure if the next reply could not be received.
    pub fn unreadable(&self, failure: Failure) -> Failure {
        match self.expected.front() {
            Some(Expect::Guard) if failure.trouble == Trouble::TooLongReply => self.no_guard("the guard is too large"),
            _ => failure,
        }
    }

    /// Whether a batch is written but not finished.
    pub fn is_busy(&self) -> bool {
        self.state.batches().next().is_some()
    }

    /// Whether the guard's release was ordered and is not confirmed.
    pub fn is_releasing(&self) -> bool {
        self.state.batches().any(|batch| batch.kind == Kind::Release)
    }

    /// Whether it can take an order now.
    pub fn wants_order(&self) -> bool {
        match &self.state {
            ConversationState::Unclaimed | ConversationState::Stopped { .. } => self.expected.is_empty(),
            ConversationState::Armed { .. } => true,
            ConversationState::Executing { next, .. } | ConversationState::Rearming { next, .. } => {
                // While it waits for replicas, nothing may be queued behind, because a further WAIT would be queued
                // too.
                self.replicas.is_none() && matches!(next, Next::Nothing)
            }
            ConversationState::Claiming { .. }
            | ConversationState::Searching { .. }
            | ConversationState::Surveying { .. }
            | ConversationState::Replicating { .. } => false,
        }
    }

    /// Makes room for the commands of an order.
    pub fn make_room(&mut self, order: &Order) -> Result<(), Failure> {
        /// For EXEC, and what follows it.
        const END: usize = 1_024;
        let Order::Batch(batch) = order else {
            return Ok(());
        };
        memory::reserve(&mut self.out, batch.bytes.len() + END).map_err(|none| none.failure("a batch"))
    }

    /// Takes an order of the worker, if it can take one.
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
            // A batch in flight shows as much as a refresh.
            (state @ ConversationState::Executing { .. }, Order::Beat { released: false, .. }) => state,
            (state, Order::Beat { beat, released }) => {
                let (batch, kind) = self.beat(beat, released);
                self.queue(state, batch, kind)
            }
            // The worker does not know yet that it is stopped, and will read those rows again.
            (state, _) => state,
        };
    }

    /// The usual replies to a refresh; `None`: no refresh may be written now, or not all at once.
    pub fn usual_answer_to_beat(&self) -> Option<Vec<u8>> {
        let ConversationState::Armed { token } = &self.state else {
            return None;
        };
        if self.awaits_reply() || self.replicas.is_some() {
            return None;
        }
        // Replies to MULTI, HSET of existing fields, EXEC; WATCH, HMGET.
        let answer = format!(
            "+OK\r\n+QUEUED\r\n*1\r\n:0\r\n+OK\r\n*1\r\n${}\r\n{token}\r\n",
            token.len()
        );
        Some(answer.into_bytes())
    }

    /// Processes the next reply, and appends what there is to report. An error ends the connection.
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
