//! Reads the guard, claims it, and reads our token back.

use crate::failure::{self, Failure, Trouble};
use crate::fault::{self, Mutation, Point};
use crate::guard::{BATCH_START, Guard, Mark, Progress, append_claim, append_progress};
use crate::resp::read::Reply;
use crate::resp::write::append_command;
use crate::sender::conversation::Conversation;
use crate::sender::conversation::replies::{guard_of, touched, well};
use crate::sender::conversation::state::{ConversationState, Expect, Next};
use crate::sender::orders::{Claim, Report};
use redis::Value;

impl Conversation {
    pub(super) fn claim(&mut self, claim: Claim) -> ConversationState {
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
                own_stream: "",
            };
            append_progress(&mut self.out, &self.key, &progress);
            self.expected.push_back(Expect::Claiming);
        }
        append_command(&mut self.out, &[b"EXEC"]);
        self.expected.push_back(Expect::ClaimExec);
        ConversationState::Claiming { token: claim.token }
    }

    /// Processes the reply to the EXEC of a claim.
    pub(super) fn claimed(&mut self, value: &Value) -> Result<(), Failure> {
        match value {
            Value::Array(replies) => replies.iter().try_for_each(well)?,
            Value::Nil => return Err(touched()),
            Value::ServerError(error) => return Err(failure::aborted(error)),
            other => return Err(failure::unexpected(other)),
        }
        match self.replicas {
            Some(replicas) => self.wait(replicas, None),
            None => self.rearm(),
        }
        Ok(())
    }

    /// Reads whose token the guard has, from now on under WATCH.
    pub(super) fn rearm(&mut self) {
        if !fault::is_mutated(Mutation::NoWatch) {
            append_command(&mut self.out, &[b"WATCH", &self.key]);
            self.expected.push_back(Expect::Watch);
        }
        append_command(&mut self.out, &[b"HMGET", &self.key, b"token"]);
        self.expected.push_back(Expect::Token);
    }

    /// Processes the guard's token, which was read under WATCH.
    pub(super) fn token(&mut self, value: &Value, reports: &mut Vec<Report>) -> Result<(), Failure> {
        let is_ours = match value {
            Value::Array(tokens) => match tokens.as_slice() {
                [Value::BulkString(token)] => self.state.token().is_some_and(|ours| ours.as_bytes() == token),
                _ => false,
            },
            other => return Err(failure::unexpected(other)),
        };
        if !is_ours && !fault::is_mutated(Mutation::NoWatch) {
            return Err(touched());
        }
        self.state = match std::mem::take(&mut self.state) {
            ConversationState::Claiming { token } => {
                fault::reach(Point::AfterClaim);
                reports.push(Report::Claimed);
                ConversationState::Armed { token }
            }
            ConversationState::Rearming { token, next } => match next {
                Next::Nothing => ConversationState::Armed { token },
                Next::Batch(batch) => self.execute(token, batch),
                Next::Search(search) => self.search(token, search),
                Next::Survey(survey) => self.survey(token, survey, reports),
            },
            // Something was refused meanwhile.
            state => state,
        };
        Ok(())
    }

    pub(super) fn guard(&self, reply: Reply<'_>) -> Result<Option<Guard>, Failure> {
        guard_of(reply).map_err(|failure| self.at_key(failure))
    }

    /// If a failure says that the key does not hold a guard, names the key. Any other failure is returned unchanged.
    pub(super) fn at_key(&self, failure: Failure) -> Failure {
        match failure.message.starts_with("WRONGTYPE") || failure.message.starts_with("the guard") {
            true => self.no_guard(&failure.message),
            false => failure,
        }
    }

    pub(super) fn no_guard(&self, what: &str) -> Failure {
        Failure::of(
            Trouble::NoGuard,
            format!("{what}: {}", String::from_utf8_lossy(&self.key)),
        )
    }
}
