//! A backend's lines in the log: one on each change of its state, and on the same trouble each minute; never one an event.

use crate::server::guc::LogLevel;
use crate::server::process::REPEAT_LOG_AFTER;
use crate::server::process::log;
use crate::worker::backend::Backend;
use relay::delivery::State;
use relay::failure::{Class, Trouble};
use relay::redis::destination::Route;
use relay::time::Now;
use std::cell::RefCell;
use std::time::Duration;

/// Most different troubles in one state that are logged within that time.
const LOGGED_TROUBLES: usize = 8;

thread_local! {
    /// What lanes have said lately: all that lose the same node have the same to say.
    static SAID: RefCell<Vec<(i32, String, Now)>> = const { RefCell::new(Vec::new()) };
}

/// As a sentence begins.
fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(chars).collect()
}

impl Backend {
    /// A line on each change of state, and on the same trouble each minute; never one an event.
    pub(super) fn log_change(&mut self, now: Now) {
        if !self.is_enabled() {
            return;
        }
        let state = match self.delivery.state() {
            State::Sending => State::Idle,
            state => state,
        };
        let trouble = self.delivery.trouble();
        let message = trouble.map_or_else(String::new, |f| format!("{}: {}", self.place(), f.message));
        if self.logged_state == Some(state) {
            // Troubles that take turns are repeats, too.
            self.logged.retain(|(_, at)| now < *at + REPEAT_LOG_AFTER);
            let repeated = self.logged.len() >= LOGGED_TROUBLES || self.logged.iter().any(|(m, _)| *m == message);
            if state == State::Idle || repeated {
                return;
            }
        }
        // One line for all is said by the worker, not one at each turn of each.
        if trouble.is_some_and(|f| f.trouble == Trouble::NoDescriptor) || (self.takes_turns && trouble.is_none()) {
            return;
        }
        let (place, name) = (self.place(), self.name().to_owned());
        match self.delivery.trouble() {
            Some(failure) => {
                let (level, what) = match failure.class {
                    Class::Copy => (LogLevel::Warning, "sends nothing"),
                    _ if self.is_finder() => (LogLevel::Error, "cannot send all its events"),
                    Class::Configuration => (LogLevel::Error, "cannot be reached"),
                    Class::Fenced => (LogLevel::Error, "is fenced"),
                    Class::Watching => (LogLevel::Info, "is about to be taken over"),
                    Class::Backend | Class::Event => (LogLevel::Warning, "cannot be reached"),
                };
                let stop = if failure.message.ends_with(['.', '?', '!']) {
                    ""
                } else {
                    "."
                };
                let what = format!("backend \"{name}\" {what}");
                let detail = match self.is_finder() {
                    _ if failure.trouble == Trouble::UnusableOption => {
                        format!("Its row of outbox.backends cannot be used: {}{stop}", failure.message)
                    }
                    _ if self.is_withheld() => format!("{}{stop}", sentence(&failure.message)),
                    true => format!("{}{stop}", failure.message),
                    false => format!("Redis at {place}: {}{stop}", failure.message),
                };
                let hint = failure.hint().unwrap_or("Events wait until it works again.");
                if !self.was_said(&detail, REPEAT_LOG_AFTER, now) {
                    log(level, &what, Some(&detail), Some(hint));
                }
            }
            // Not while it is only on its way up for the first time.
            None if self.delivery.has_room() && self.is_insecure() => {
                log(
                    LogLevel::Warning,
                    &format!("backend \"{name}\" is connected to Redis at {place}, or to whoever answers there"),
                    Some("With tls_insecure, the server's certificate is not verified."),
                    Some(
                        "Set tls_insecure to false, and tls_ca_file if the certificate is of an authority of your own.",
                    ),
                );
            }
            None if self.delivery.has_room() => {
                let message = format!("backend \"{name}\" is connected to Redis at {place}");
                if !self.was_said(&message, REPEAT_LOG_AFTER, now) {
                    log(LogLevel::Info, &message, None, None);
                }
            }
            None => return,
        }
        if self.logged_state.replace(state) != Some(state) {
            self.logged.clear();
        }
        self.logged.push((message, now));
    }

    /// Where its trouble is, or it is connected.
    fn place(&self) -> String {
        let address = match self.delivery.trouble() {
            Some(_) => &self.failed_at,
            None => &self.address,
        };
        match (address, &self.destination) {
            (Some(address), _) => address.to_string(),
            (None, Ok(destination)) if destination.route == Route::Direct => destination.address.to_string(),
            (None, Ok(destination)) => destination.route.to_string(),
            (None, Err(_)) => String::new(),
        }
    }

    fn is_insecure(&self) -> bool {
        let tls = self.destination.as_ref().ok().and_then(|d| d.tls.as_ref());
        tls.is_some_and(|tls| tls.insecure)
    }

    /// Whether a lane has said the same within `span`.
    fn was_said(&self, text: &str, span: Duration, now: Now) -> bool {
        const REMEMBERED: usize = 100;
        if self.lane.is_none() {
            return false;
        }
        SAID.with_borrow_mut(|said| {
            said.retain(|(_, _, at)| now < *at + span);
            let known = said
                .iter()
                .any(|(number, known, _)| *number == self.number && known == text);
            if !known && said.len() < REMEMBERED {
                said.push((self.number, text.to_owned(), now));
            }
            known
        })
    }
}
