//! An idle connection. Its sender leaves it here while it sleeps, so that the worker's main thread can refresh the
//! guard. So an idle relay wakes only one thread, with one timer, and does not wait for an answer.
//!
//! That thread writes what it can without waiting. It accepts the answer to the previous refresh only if it is the
//! usual one, byte for byte. In all other cases (another answer, none, an error) the sender takes over: it can wait,
//! and it knows which texts must not be shown.

use crate::failure::Failure;
use crate::redis::connection::RedisConnection;
use crate::sender::conversation::Conversation;
use crate::sender::orders::Order;
use std::sync::{Arc, Mutex, PoisonError};

/// A connection and, with exactly_once, the conversation on it.
pub(crate) struct Line {
    connection: RedisConnection,
    conversation: Option<Conversation>,
    /// The usual answer to the last refresh that was written.
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

    /// The conversation (exactly_once).
    pub(crate) fn conversation(&mut self) -> Option<(&mut RedisConnection, &mut Conversation)> {
        let conversation = self.conversation.as_mut()?;
        Some((&mut self.connection, conversation))
    }

    /// Whether nothing has to be sent or received before an order comes.
    pub(crate) fn is_idle(&mut self) -> bool {
        self.conversation
            .as_mut()
            .is_some_and(|c| c.wants_order() && !c.awaits_reply() && c.output().is_empty())
    }

    /// Processes what was answered while it was idle, so that a batch need not wait for it.
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
            // Nothing is reported for a refresh.
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
    /// Keeps the line here while `wait` waits, and takes it back.
    pub(crate) fn keep<R>(&self, line: Box<Line>, wait: impl FnOnce() -> R) -> Result<(Box<Line>, R), Failure> {
        let place = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *place() = Some(line);
        let waited = wait();
        let line = place().take();
        line.map(|line| (line, waited))
            .ok_or_else(|| Failure::backend("the connection was taken away while it was idle"))
    }

    /// Whether the worker has dropped its [`Handle`](crate::sender::Handle), which holds the other reference.
    pub(crate) fn is_let_go(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    /// Refreshes the guard, or checks that the connection exists, without waiting. True: there is no sign of a problem,
    /// or the sender is at work and its batches show as much. False: the sender has to do it.
    pub(crate) fn beat(&self, beat: u64) -> bool {
        let Ok(mut idle) = self.0.try_lock() else {
            return true;
        };
        idle.as_mut().is_none_or(|line| line.beat(beat).unwrap_or(false))
    }
}
