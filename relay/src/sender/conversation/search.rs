//! Looking for events in the tails of their streams, on the connection that has claimed the guard.

use crate::failure::Failure;
use crate::resp::read::Reply;
use crate::sender::conversation::Conversation;
use crate::sender::conversation::state::{Expect, State};
use crate::sender::orders::Report;
use crate::sender::tails::Search;

impl Conversation {
    /// Sends the first command of a search, or the next.
    pub(super) fn search(&mut self, token: String, search: Box<Search>) -> State {
        match search.ask(&mut self.out) {
            true => {
                self.expected.push_back(Expect::Search);
                State::Searching { token, search }
            }
            false => State::Armed { token },
        }
    }

    /// A reply to the search, or some pieces of one.
    pub(super) fn found(&mut self, reply: Reply<'_>, reports: &mut Vec<Report>) -> Result<(), Failure> {
        let State::Searching { search, .. } = &mut self.state else {
            return Ok(());
        };
        if !search.reply(reply)? {
            self.expected.push_front(Expect::Search);
            return Ok(());
        }
        self.state = match std::mem::take(&mut self.state) {
            State::Searching { token, search } if search.has_ended() => {
                reports.push(Report::Seen(search.into_found()));
                State::Armed { token }
            }
            State::Searching { token, search } => self.search(token, search),
            state => state,
        };
        Ok(())
    }
}
