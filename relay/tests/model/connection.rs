//! A sender of exactly_once with its connection to the model of Redis: commands and replies arrive one by one.

use super::redis::{GUARD, Redis, Words, append_reply, parse};
use redis::Value;
use relay::failure::Failure;
use relay::redis::replicas::Replicas;
use relay::resp::read::Inbox;
use relay::sender::conversation::Conversation;
use relay::sender::orders::{Order, Report};
use std::collections::VecDeque;

pub(crate) struct Connection {
    client: u64,
    conversation: Conversation,
    orders: VecDeque<Order>,
    reports: VecDeque<Report>,
    /// Written, not executed.
    written: VecDeque<Words>,
    /// Not read.
    replies: VecDeque<Value>,
    heard: Vec<Report>,
    ended: bool,
}

/// Bytes that a closed connection had written: they may still arrive.
pub(crate) struct Leftover {
    client: u64,
    written: VecDeque<Words>,
}

impl Connection {
    pub(crate) fn open(redis: &mut Redis, client: u64, replicas: Option<Replicas>, ousting: Option<&str>) -> Self {
        redis.connect(client);
        let mut connection = Self {
            client,
            conversation: Conversation::new(GUARD, replicas, ousting),
            orders: VecDeque::new(),
            reports: VecDeque::new(),
            written: VecDeque::new(),
            replies: VecDeque::new(),
            heard: Vec::new(),
            ended: false,
        };
        connection.write();
        connection
    }

    /// A sender that has ended accepts nothing more; its last report is on the way.
    pub(crate) fn order(&mut self, order: Order) {
        if !self.ended {
            self.orders.push_back(order);
        }
    }

    pub(crate) fn report(&mut self) -> Option<Report> {
        self.reports.pop_front()
    }

    /// Accepts orders, and writes the commands.
    pub(crate) fn write(&mut self) -> bool {
        if self.ended {
            return false;
        }
        while self.conversation.wants_order()
            && let Some(order) = self.orders.pop_front()
        {
            self.conversation.order(order);
        }
        let output = self.conversation.output();
        let says = !output.is_empty();
        if says {
            self.written.extend(parse(output));
            output.clear();
        }
        says
    }

    /// The next command arrives.
    pub(crate) fn execute(&mut self, redis: &mut Redis) -> bool {
        if self.ended || !redis.knows(self.client) {
            return false;
        }
        let Some(words) = self.written.pop_front() else {
            return false;
        };
        self.replies.push_back(redis.execute(self.client, words));
        true
    }

    /// The next reply is read.
    pub(crate) fn read(&mut self) -> bool {
        if self.ended || !self.conversation.awaits_reply() {
            return false;
        }
        let Some(value) = self.replies.pop_front() else {
            return false;
        };
        let mut bytes = Vec::new();
        append_reply(&mut bytes, &value);
        let mut inbox = Inbox::default();
        inbox.receive(&bytes);
        // As a whole or in pieces; within limits, as an honest server does.
        let mut outcome = Ok(());
        while outcome.is_ok() {
            let taken = inbox.take(&self.conversation.bounds()).expect("a reply within bounds");
            let Some(taken) = taken else { break };
            outcome = self.conversation.reply(inbox.reply(taken), &mut self.heard);
        }
        self.reports.extend(self.heard.drain(..));
        if let Err(failure) = outcome {
            self.lose(failure);
        } else {
            assert!(inbox.rest().is_empty() && inbox.is_between_replies(), "{value:?}");
            self.write();
        }
        true
    }

    /// The connection ends; replies that were on their way are lost.
    pub(crate) fn lose(&mut self, failure: Failure) {
        if !std::mem::replace(&mut self.ended, true) {
            self.reports.push_back(Report::Lost {
                failure,
                accepted: 0,
                refused: Vec::new(),
            });
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    pub(crate) fn client(&self) -> u64 {
        self.client
    }

    /// The first `kept` of the written commands may arrive some time.
    pub(crate) fn into_leftover(mut self, kept: impl FnOnce(usize) -> usize) -> Leftover {
        self.written.truncate(kept(self.written.len()));
        Leftover {
            client: self.client,
            written: self.written,
        }
    }
}

impl Leftover {
    /// False: nothing more arrives.
    pub(crate) fn execute(&mut self, redis: &mut Redis) -> bool {
        if !redis.knows(self.client) {
            return false;
        }
        let words = self.written.pop_front();
        words.map(|words| redis.execute(self.client, words)).is_some()
    }
}
