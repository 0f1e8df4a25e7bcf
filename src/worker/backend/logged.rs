//! What was logged about a backend, so that nothing is logged twice.

use crate::server::process::repeat_log_after;
use relay::delivery::State;
use relay::time::Now;
use std::time::Duration;

/// How many different failures in one state are logged within that time.
const LOGGED_TROUBLES: usize = 8;
/// How many lines about one backend are logged within that time, whatever they say: a server can make it change its
/// state with each connection, and must not hide what there is to log about others.
pub(super) const LOGGED_LINES: usize = 20;
/// How often a backend without news is checked for something to log.
const LOOK_PAUSE: Duration = Duration::from_millis(250);

/// What was logged about a backend.
#[derive(Default)]
pub(super) struct Logged {
    state: Option<State>,
    /// Failures in this state that were logged within the last minute.
    troubles: Vec<(String, Now)>,
    /// When the last lines about it were logged.
    lines: Vec<Now>,
    look_at: Now,
    /// What Redis had lost, when that was last logged.
    loss: Option<(String, Now)>,
}

impl Logged {
    /// Whether it is time to check a backend without news.
    pub(super) fn is_look_due(&self, now: Now) -> bool {
        now >= self.look_at
    }

    pub(super) fn looked(&mut self, now: Now) {
        self.look_at = now + LOOK_PAUSE;
    }

    /// Whether a loss was not logged within `span`. A Redis that evicts keys loses the guard again and again.
    pub(super) fn is_new_loss(&mut self, loss: &str, span: Duration, now: Now) -> bool {
        if matches!(&self.loss, Some((known, at)) if known == loss && now < *at + span) {
            return false;
        }
        self.loss = Some((loss.to_owned(), now));
        true
    }

    /// The next line is logged even if the state is the same.
    pub(super) fn forget_state(&mut self) {
        self.state = None;
    }

    /// Whether another line about it may be logged.
    pub(super) fn has_room(&mut self, now: Now) -> bool {
        self.lines.retain(|at| now < *at + repeat_log_after());
        self.lines.len() < LOGGED_LINES
    }

    /// Counts a line. Returns whether it was the last one for now.
    pub(super) fn count(&mut self, now: Now) -> bool {
        self.lines.push(now);
        self.lines.len() >= LOGGED_LINES
    }

    /// Whether there is nothing to log: nothing new, or too much. Failures that alternate count as repeated.
    pub(super) fn is_known(&mut self, state: State, trouble: &str, now: Now) -> bool {
        if !self.has_room(now) {
            return true;
        }
        if self.state != Some(state) {
            return false;
        }
        self.troubles.retain(|(_, at)| now < *at + repeat_log_after());
        let repeats = self.troubles.len() >= LOGGED_TROUBLES || self.troubles.iter().any(|(m, _)| m == trouble);
        state == State::Idle || repeats
    }

    pub(super) fn note(&mut self, state: State, trouble: String, now: Now) {
        if self.state.replace(state) != Some(state) {
            self.troubles.clear();
        }
        self.troubles.push((trouble, now));
    }
}
