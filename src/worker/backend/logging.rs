//! A backend's log lines: one on each change of its state, and one each minute while the same failure lasts. No line is
//! ever logged for each event.

use crate::server::guc::LogLevel;
use crate::server::process::log;
use crate::server::process::repeat_log_after;
use crate::worker::backend::Backend;
use crate::worker::backend::connection::Connection;
use crate::worker::backend::logged::LOGGED_LINES;
use relay::delivery::State;
use relay::failure::{Class, Failure, Trouble};
use relay::time::Now;
use std::cell::RefCell;
use std::time::Duration;

thread_local! {
    /// What lanes have logged recently. All lanes that lose the same node would log the same.
    static SAID: RefCell<Vec<(i32, String, Now)>> = const { RefCell::new(Vec::new()) };
}

impl Backend {
    /// Logs what has changed, and each minute what is still wrong.
    pub(super) fn log_change(&mut self, now: Now) {
        if !self.is_enabled() {
            return;
        }
        let state = match self.delivery.state() {
            State::Sending => State::Idle,
            state => state,
        };
        let failure = self.delivery.trouble();
        let trouble = failure.map_or_else(String::new, |f| format!("{}: {}", self.place(), f.message));
        if self.logged.is_known(state, &trouble, now) {
            return;
        }
        let is_said = match self.delivery.trouble() {
            // The worker logs that in one line for all backends.
            Some(failure) if failure.trouble == Trouble::NoDescriptor => false,
            Some(failure) => self.say_failure(failure, now),
            // A backend that takes turns does not log each connection.
            None if self.turn.is_taken => false,
            None => self.say_connected(now),
        };
        if is_said {
            self.logged.note(state, trouble, now);
            self.count_line(now);
        }
    }

    /// Whether another line about it may be logged. If so, it counts as logged.
    pub(crate) fn takes_line(&mut self, now: Now) -> bool {
        let has_room = self.logged.has_room(now);
        if has_room {
            self.count_line(now);
        }
        has_room
    }

    fn count_line(&mut self, now: Now) {
        if !self.logged.count(now) {
            return;
        }
        let message = format!("backend \"{}\" changes too often to log each change", self.name());
        if !self.was_said_within(&message, repeat_log_after(), LOGGED_LINES + 1, now) {
            log(
                LogLevel::Warning,
                &message,
                Some("Its changes are logged again in a minute."),
                Some("See outbox.backend_status and outbox.health()."),
            );
        }
    }

    fn say_failure(&self, failure: &Failure, now: Now) -> bool {
        let (level, what) = match failure.class {
            Class::Copy => (LogLevel::Warning, "sends nothing"),
            _ if self.is_finder() => (LogLevel::Error, "cannot send all its events"),
            Class::Configuration => (LogLevel::Error, "cannot be reached"),
            Class::Fenced => (LogLevel::Error, "is fenced"),
            Class::Full => (LogLevel::Warning, "waits for consumers"),
            Class::Watching => (LogLevel::Info, "is about to be taken over"),
            Class::Backend | Class::Event => (LogLevel::Warning, "cannot be reached"),
        };
        let what = match failure.trouble {
            Trouble::UnusableOption => "sends nothing",
            _ => what,
        };
        let text = &failure.message;
        let detail = match failure.trouble {
            Trouble::UnusableOption => format!("Its row of outbox.backends cannot be used: {text}"),
            _ if self.is_withheld() => sentence(text),
            _ if self.is_finder() => text.clone(),
            _ => format!("Redis at {}: {text}", self.place()),
        };
        let stop = if text.ends_with(['.', '?', '!']) { "" } else { "." };
        let detail = format!("{detail}{stop}");
        let hint = failure.hint().unwrap_or("Events wait until it works again.");
        if !self.was_said(&detail, repeat_log_after(), now) {
            let message = format!("backend \"{}\" {what}", self.name());
            log(level, &message, Some(&detail), Some(hint));
        }
        true
    }

    fn say_connected(&self, now: Now) -> bool {
        // It may still be connecting for the first time.
        if !self.delivery.has_room() {
            return false;
        }
        let message = format!("backend \"{}\" is connected to Redis at {}", self.name(), self.place());
        if self.duty.connection().is_some_and(Connection::is_insecure) {
            log(
                LogLevel::Warning,
                &format!("{message}, or to another server that answers there"),
                Some("With tls_insecure, the server's certificate is not verified."),
                Some("Set tls_insecure to false, and tls_ca_file if the certificate is of an authority of your own."),
            );
        } else if !self.was_said(&message, repeat_log_after(), now) {
            log(LogLevel::Info, &message, None, None);
        }
        true
    }

    /// Where its failure came from, or where it is connected.
    fn place(&self) -> String {
        let connection = self.duty.connection();
        let place = connection.map(|connection| match self.delivery.trouble() {
            Some(_) => connection.failed_place(),
            None => connection.place(),
        });
        place.unwrap_or_default()
    }

    /// Whether another lane has logged the same within `span`, or all lanes have logged much.
    fn was_said(&self, text: &str, span: Duration, now: Now) -> bool {
        self.was_said_within(text, span, LOGGED_LINES, now)
    }

    /// The same; `most`: how many lines all lanes together may log.
    fn was_said_within(&self, text: &str, span: Duration, most: usize, now: Now) -> bool {
        const REMEMBERED: usize = 1_000;
        if self.lane().is_none() {
            return false;
        }
        SAID.with_borrow_mut(|said| {
            said.retain(|(_, _, at)| now < *at + span);
            let of_backend = || said.iter().filter(|(number, ..)| *number == self.number);
            let is_known = of_backend().any(|(_, known, _)| known == text) || of_backend().count() >= most;
            if !is_known && said.len() < REMEMBERED {
                said.push((self.number, text.to_owned(), now));
            }
            is_known
        })
    }
}

/// The text with a capital first letter.
fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(chars).collect()
}
