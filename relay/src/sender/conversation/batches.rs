//! Batches: queued in Redis while the previous one is executed, then executed, replicated, or refused.

use crate::delivery::flight::Refusal;
use crate::failure::{self, Class, Failure, Trouble};
use crate::fault::{self, Mutation, Point};
use crate::guard::{BATCH_START, append_beat};
use crate::redis::replicas::Replicas;
use crate::resp::read::Reply;
use crate::resp::write::append_command;
use crate::sender::conversation::Conversation;
use crate::sender::conversation::replies::{refusals, touched};
use crate::sender::conversation::state::{ConversationState, Expect, Kind, Next, WrittenBatch};
use crate::sender::orders::{Batch, Report};
use redis::{ServerError, Value};

impl Conversation {
    /// The batch that refreshes the guard.
    pub(super) fn beat(&self, beat: u64, released: bool) -> (Batch, Kind) {
        let mut bytes = BATCH_START.to_vec();
        append_beat(&mut bytes, &self.key, beat, released);
        let kind = if released { Kind::Release } else { Kind::Beat };
        (Batch { bytes, commands: 0 }, kind)
    }

    /// Writes a batch's commands; EXEC only if it may be sent now.
    pub(super) fn queue(&mut self, state: ConversationState, batch: Batch, kind: Kind) -> ConversationState {
        match state {
            ConversationState::Armed { token } => {
                let batch = self.written(batch, kind);
                self.append_exec();
                ConversationState::Executing {
                    token,
                    batch,
                    next: Next::Nothing,
                }
            }
            ConversationState::Executing {
                token,
                batch: executing,
                next: Next::Nothing,
            } => ConversationState::Executing {
                token,
                batch: executing,
                next: self.queued(batch, kind),
            },
            ConversationState::Rearming {
                token,
                next: Next::Nothing,
            } => ConversationState::Rearming {
                token,
                next: self.queued(batch, kind),
            },
            state => state,
        }
    }

    fn queued(&mut self, batch: Batch, kind: Kind) -> Next {
        let batch = self.written(batch, kind);
        if fault::is_mutated(Mutation::TwoExecs) {
            self.append_exec();
        }
        Next::Batch(batch)
    }

    fn written(&mut self, batch: Batch, kind: Kind) -> WrittenBatch {
        self.out.extend_from_slice(&batch.bytes);
        let commands = batch.commands + 2;
        self.expected.push_back(Expect::Queued { next: 0, commands });
        WrittenBatch {
            batch,
            kind,
            unqueued: Vec::new(),
        }
    }

    /// Executes a queued batch: the token was read, and is ours.
    pub(super) fn execute(&mut self, token: String, batch: WrittenBatch) -> ConversationState {
        if !fault::is_mutated(Mutation::TwoExecs) {
            self.append_exec();
        }
        ConversationState::Executing {
            token,
            batch,
            next: Next::Nothing,
        }
    }

    /// Appends EXEC, and after it what the next EXEC needs.
    fn append_exec(&mut self) {
        append_command(&mut self.out, &[b"EXEC"]);
        self.expected.push_back(Expect::Exec);
        match self.replicas {
            Some(replicas) => self.wait(replicas, None),
            None => self.rearm(),
        }
    }

    pub(super) fn wait(&mut self, replicas: Replicas, reported: Option<String>) {
        replicas.append_wait(&mut self.out);
        self.expected.push_back(Expect::Replicas { reported });
    }

    /// Command `index` of the batch that is being executed was not queued; number 0 is MULTI.
    pub(super) fn not_queued(&mut self, value: &Value, index: usize, reports: &mut Vec<Report>) -> Result<(), Failure> {
        // Replies to a batch's commands come after the answer that allowed its execution. Otherwise it was discarded.
        let (ConversationState::Executing { batch, .. }, Value::ServerError(error)) = (&mut self.state, value) else {
            return Ok(());
        };
        let failure = failure::reply(error);
        let Some(entry) = index.checked_sub(1).filter(|entry| *entry < batch.batch.commands) else {
            // MULTI or the guard's HSET has failed: without them nothing can be appended.
            return Err(failure.not_of_an_event());
        };
        let is_last_word = failure.trouble == Trouble::TooLarge;
        batch.unqueued.push((entry, failure));
        if is_last_word {
            self.cut_off(reports);
        }
        Ok(())
    }

    /// After an entry that is too large for it, the server reads no more from this connection: nothing of the batch is
    /// appended.
    fn cut_off(&mut self, reports: &mut Vec<Report>) {
        self.state = match std::mem::take(&mut self.state) {
            ConversationState::Executing { token, batch, next } => {
                let state = self.stop(token, next);
                if batch.unqueued.iter().all(|(_, failure)| failure.class == Class::Event) {
                    reports.push(aborted(batch));
                }
                state
            }
            state => state,
        };
    }

    /// Processes the reply to a batch's EXEC.
    pub(super) fn executed(&mut self, reply: Reply<'_>, reports: &mut Vec<Report>) -> Result<(), Failure> {
        fault::reach(Point::AfterExec);
        let ConversationState::Executing { token, batch, next } = std::mem::take(&mut self.state) else {
            return Err(Failure::backend("a reply to no EXEC"));
        };
        let commands = batch.batch.commands;
        let mut refused = Vec::new();
        match reply.items() {
            _ if reply.is_strings_and_number(commands) => {}
            Some(replies) if replies.len() == commands + 1 => refused = refusals(replies)?,
            Some(_) => return Err(Failure::backend("unexpected reply to EXEC")),
            None if reply.is_nil() => return Err(touched()),
            None => match reply.value()? {
                Value::ServerError(error) => {
                    is_for_its_events(&batch, &error)?;
                    self.state = self.stop(token, next);
                    reports.push(aborted(batch));
                    return Ok(());
                }
                _ => return Err(Failure::backend("unexpected reply to EXEC")),
            },
        }
        self.state = match self.replicas {
            Some(_) => ConversationState::Replicating { token, batch, refused },
            None => self.done(token, batch, refused, next, reports),
        };
        Ok(())
    }

    /// The batch counts as appended.
    fn done(
        &mut self,
        token: String,
        batch: WrittenBatch,
        refused: Vec<Refusal>,
        next: Next,
        reports: &mut Vec<Report>,
    ) -> ConversationState {
        let state = match refused.is_empty() {
            true => ConversationState::Rearming { token, next },
            false => self.stop(token, next),
        };
        match batch.kind {
            Kind::Beat => {}
            Kind::Release => reports.push(Report::Released),
            Kind::Batch => reports.push(Report::Done {
                refused,
                buffer: batch.batch.bytes,
            }),
        }
        state
    }

    /// Nothing more is appended until the worker has written down what was refused.
    fn stop(&mut self, token: String, next: Next) -> ConversationState {
        if let Next::Batch(_) = next {
            append_command(&mut self.out, &[b"DISCARD"]);
            self.expected.push_back(Expect::Discard);
        }
        ConversationState::Stopped { token }
    }

    /// Processes the reply to WAIT; `reported`: what was reported about too few replicas before.
    pub(super) fn replicated(
        &mut self,
        value: &Value,
        reported: Option<String>,
        reports: &mut Vec<Report>,
    ) -> Result<(), Failure> {
        let Some(replicas) = self.replicas else {
            return Ok(());
        };
        if let Err(failure) = replicas.judge(value)? {
            let message = Some(failure.message.clone());
            if message != reported {
                reports.push(Report::Behind(failure));
            }
            self.wait(replicas, message);
            return Ok(());
        }
        self.state = match std::mem::take(&mut self.state) {
            ConversationState::Replicating { token, batch, refused } => {
                self.done(token, batch, refused, Next::Nothing, reports)
            }
            // This was a claim.
            state => state,
        };
        if !matches!(self.state, ConversationState::Stopped { .. }) {
            self.rearm();
        }
        Ok(())
    }
}

/// Whether Redis has refused to execute a batch because of its events. The error is one of the backend.
fn is_for_its_events(batch: &WrittenBatch, error: &ServerError) -> Result<(), Failure> {
    let of_backend = batch.unqueued.iter().find(|(_, failure)| failure.class != Class::Event);
    match of_backend {
        Some((_, failure)) => Err(failure.clone()),
        None if batch.unqueued.is_empty() => Err(failure::aborted(error)),
        None => Ok(()),
    }
}

/// Nothing of the batch was appended, because of these events.
fn aborted(batch: WrittenBatch) -> Report {
    Report::Aborted {
        refused: batch.unqueued,
        buffer: batch.batch.bytes,
    }
}
