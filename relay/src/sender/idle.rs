//! An idle connection. Its sender leaves it here while it sleeps, so that the worker's own thread can refresh the
//! guard. An idle relay then wakes one thread, by one timer, and waits for no answer.
//!
//! That thread writes what fits at once, and takes in the answer to the refresh before only if it is the usual one,
//! byte for byte. All else (another answer, none, an error) is left to the sender, which has the time to wait and knows
//! which words must not be shown.

use crate::failure::Failure;
use crate::redis::connection::RedisConnection;
use crate::sender::conversation::Conversation;
use crate::sender::orders::Order;
use std::sync::{Arc, Mutex, PoisonError};

/// A connection and, with exactly_once, what was said on it.
pub(crate) struct Line {
    connection: RedisConnection,
    conversation: Option<Conversation>,
    /// The usual answer to the refresh that was written last.
    expected: Vec<u8>,
}

impl Line {
    pub(crate) fn of(connection: RedisConnection, conversation: Option<Conversation>) -> Box<Self> {
        Box::new(Self {
            connection,
            conversation,
            expected: Vec::new(),
        })
    }

    pub(crate) fn connection(&mut self) -> &mut RedisConnection {
        &mut self.connection
    }

    /// With exactly_once.
    pub(crate) fn conversation(&mut self) -> Option<(&mut RedisConnection, &mut Conversation)> {
        let conversation = self.conversation.as_mut()?;
        Some((&mut self.connection, conversation))
    }

    /// Whether there is nothing to be said or heard before an order comes.
    pub(crate) fn is_idle(&mut self) -> bool {
        self.conversation
            .as_mut()
            .is_some_and(|c| c.wants_order() && !c.awaits_reply() && c.output().is_empty())
    }

    /// Takes in what has been answered while it was idle, so that a batch need not wait for it.
    pub(crate) fn take_in_answers(&mut self) -> Result<(), Failure> {
        let Some(conversation) = &mut self.conversation else {
            return Ok(());
        };
        if conversation.awaits_reply() {
            self.connection.receive_at_once()?;
        }
        while conversation.awaits_reply()
            && let Some(reply) = self.connection.received(&conversation.bounds())?
        {
            // Nothing is reported of a refresh.
            conversation.reply(reply, &mut Vec::new())?;
        }
        Ok(())
    }

    /// See [`Idle::beat`].
    fn beat(&mut self, beat: u64) -> Result<bool, Failure> {
        let Some(conversation) = &mut self.conversation else {
            return self.connection.look().map(|()| true);
        };
        if conversation.awaits_reply() {
            self.connection.receive_at_once()?;
            if self.connection.inbox() != self.expected {
                return Ok(false);
            }
            self.take_in_answers()?;
        }
        let Some(conversation) = &mut self.conversation else {
            return Ok(false);
        };
        let Some(expected) = conversation.usual_answer_to_beat() else {
            return Ok(false);
        };
        self.expected = expected;
        conversation.order(Order::Beat { beat, released: false });
        let is_whole = self.connection.send_at_once(conversation.output())?;
        conversation.output().clear();
        Ok(is_whole)
    }
}

/// Where a sender leaves its line while it sleeps.
#[derive(Clone, Default)]
pub(crate) struct Idle(Arc<Mutex<Option<Box<Line>>>>);

impl Idle {
    /// Keeps the line here while `wait` waits, and gives it back.
    pub(crate) fn keep<R>(&self, line: Box<Line>, wait: impl FnOnce() -> R) -> Result<(Box<Line>, R), Failure> {
        let place = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *place() = Some(line);
        let waited = wait();
        let line = place().take();
        line.map(|line| (line, waited))
            .ok_or_else(|| Failure::backend("the connection was taken away while it was idle"))
    }

    /// Whether the worker has dropped its [`Handle`](crate::sender::Handle), which holds the other one.
    pub(crate) fn is_let_go(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    /// Refreshes the guard, or looks whether the connection is there, without waiting. True: all is well as far as is
    /// known, or the sender is at work, and its batches say as much. False: the sender is to do it.
    pub(crate) fn beat(&self, beat: u64) -> bool {
        let Ok(mut idle) = self.0.try_lock() else {
            return true;
        };
        idle.as_mut().is_none_or(|line| line.beat(beat).unwrap_or(false))
    }
}
