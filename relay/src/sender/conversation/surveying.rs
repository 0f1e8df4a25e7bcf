//! Asks about consumer groups, between two batches.

use crate::failure::Failure;
use crate::resp::read::Reply;
use crate::sender::conversation::Conversation;
use crate::sender::conversation::state::{ConversationState, Expect};
use crate::sender::orders::Report;
use crate::sender::survey::Survey;

impl Conversation {
    /// Sends the commands of a survey's next round. If there are none, it has ended.
    pub(super) fn survey(
        &mut self,
        token: String,
        mut survey: Box<Survey>,
        reports: &mut Vec<Report>,
    ) -> ConversationState {
        let commands = survey.ask(&mut self.out);
        if commands == 0 {
            reports.push(Report::Surveyed(survey.number, survey.into_found()));
            return ConversationState::Armed { token };
        }
        self.expected.extend((0..commands).map(|_| Expect::Survey));
        ConversationState::Surveying { token, survey }
    }

    /// Processes a reply to the survey, or some pieces of one.
    pub(super) fn surveyed(&mut self, reply: Reply<'_>, reports: &mut Vec<Report>) -> Result<(), Failure> {
        let ConversationState::Surveying { survey, .. } = &mut self.state else {
            return Ok(());
        };
        if !survey.reply(reply)? {
            self.expected.push_front(Expect::Survey);
        }
        if self.awaits_reply() {
            return Ok(());
        }
        self.state = match std::mem::take(&mut self.state) {
            ConversationState::Surveying { token, survey } => self.survey(token, survey, reports),
            state => state,
        };
        Ok(())
    }
}
