//! Looks for events at the ends of their streams, on the connection that has claimed the guard.

use crate::failure::Failure;
use crate::resp::read::Reply;
use crate::sender::conversation::Conversation;
use crate::sender::conversation::state::{ConversationState, Expect};
use crate::sender::orders::Report;
use crate::sender::tails::Search;

impl Conversation {
    /// Sends the first or the next command of a search.
    pub(super) fn search(&mut self, token: String, search: Box<Search>) -> ConversationState {
        match search.ask(&mut self.out) {
            true => {
                self.expected.push_back(Expect::Search);
                ConversationState::Searching { token, search }
            }
            false => ConversationState::Armed { token },
        }
    }

    /// Processes a reply to the search, or some pieces of one.
    pub(super) fn found(&mut self, reply: Reply<'_>, reports: &mut Vec<Report>) -> Result<(), Failure> {
        let ConversationState::Searching { search, .. } = &mut self.state else {
            return Ok(());
        };
        if !search.reply(reply)? {
            self.expected.push_front(Expect::Search);
            return Ok(());
        }
        self.state = match std::mem::take(&mut self.state) {
            ConversationState::Searching { token, search } if search.has_ended() => {
                reports.push(Report::Seen(search.into_found()));
                ConversationState::Armed { token }
            }
            ConversationState::Searching { token, search } => self.search(token, search),
            state => state,
        };
        Ok(())
    }
}
