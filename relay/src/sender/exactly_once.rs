//! A connection with exactly_once: sends the output of [`Conversation`], and passes it the replies.

use crate::failure::{Failure, Trouble};
use crate::fault::{self, Point};
use crate::redis::connection::RedisConnection;
use crate::redis::replicas::WAIT_PAUSE;
use crate::sender::conversation::Conversation;
use crate::sender::idle::{Idle, Line};
use crate::sender::next_order::next_order;
use crate::sender::orders::Order;
use crate::sender::reporter::Reporter;
use crossbeam_channel::{Receiver, TryRecvError};
use std::thread;

/// Sends and receives for a conversation until the connection ends or the worker has dropped this sender.
pub(super) fn converse(
    mut line: Box<Line>,
    orders: &Receiver<Order>,
    reporter: &Reporter,
    idle: &Idle,
) -> Result<(), Failure> {
    let mut reports = Vec::new();
    loop {
        let mut next = None;
        if line.is_idle() {
            let (back, order) = idle.keep(line, || next_order(orders))?;
            (line, next) = (back, Some(order));
            line.take_in_answers()?;
        }
        let Some((connection, conversation)) = line.conversation() else {
            return Ok(());
        };
        while next.is_some() || conversation.wants_order() {
            match next.take().unwrap_or_else(|| orders.try_recv()) {
                Ok(order) => {
                    conversation.make_room(&order)?;
                    conversation.order(order);
                }
                Err(TryRecvError::Empty) => break,
                // The worker has dropped it, but the guard must still show to others that its owner leaves.
                Err(TryRecvError::Disconnected) if conversation.is_releasing() => break,
                // The next claim finds out what became of batches in flight.
                Err(TryRecvError::Disconnected) => return Ok(()),
            }
        }
        if conversation.waits_again() {
            // Replicas may be away for days, and during that time no order is taken that could show this.
            if idle.is_let_go() {
                return Ok(());
            }
            thread::sleep(WAIT_PAUSE);
        }
        if !conversation.output().is_empty() {
            if let Err(failure) = connection.send(conversation.output()) {
                return Err(last_words(connection, conversation, reporter, failure));
            }
            conversation.output().clear();
            if conversation.is_busy() {
                fault::reach(Point::AfterWrite);
            }
        }
        if conversation.awaits_reply() {
            let bounds = conversation.bounds();
            let outcome = match connection.receive(&bounds) {
                Ok(reply) => conversation.reply(reply, &mut reports),
                Err(failure) => Err(conversation.unreadable(failure)),
            };
            for report in reports.drain(..) {
                if !reporter.report_before(report, orders.len()) {
                    return Ok(());
                }
            }
            outcome?;
        }
    }
}

/// Reads what the server sent before it closed the connection during a write, for example that an entry is too large.
fn last_words(
    connection: &mut RedisConnection,
    conversation: &mut Conversation,
    reporter: &Reporter,
    failure: Failure,
) -> Failure {
    let mut reports = Vec::new();
    while failure.trouble == Trouble::Closed && conversation.awaits_reply() {
        let Ok(reply) = connection.receive(&conversation.bounds()) else {
            break;
        };
        let outcome = conversation.reply(reply, &mut reports);
        reports.drain(..).all(|report| reporter.report(report));
        if let Err(said) = outcome {
            return said;
        }
    }
    failure
}
