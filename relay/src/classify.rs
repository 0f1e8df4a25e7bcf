//! What an error means for the delivery: one exhaustive match, in one place.

use redis::{ErrorKind, RedisError, ServerError};
use std::fmt;

/// Who is to blame, and so what happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Redis or the way to it: wait with backoff, for ever; nothing fails.
    Backend,
    /// Somebody must mend a setting: the same, slower, saying what to mend.
    Configuration,
    /// This event (or its stream) is refused for what it is; others may go on.
    Event,
    /// Another server owns the guard.
    Fenced,
    /// Another server owned the guard, and may live.
    Watching,
}

/// An error in words that can be shown: cut, on one line, without payloads or passwords.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub class: Class,
    pub message: String,
}

impl Failure {
    pub fn new(class: Class, message: impl AsRef<str>) -> Self {
        Self {
            class,
            message: shown(message.as_ref()),
        }
    }

    pub fn backend(message: impl AsRef<str>) -> Self {
        Self::new(Class::Backend, message)
    }

    /// The same trouble with what is not an event: it is the backend's.
    #[must_use]
    pub fn not_of_an_event(mut self) -> Self {
        if self.class == Class::Event {
            self.class = Class::Configuration;
        }
        self
    }

    pub fn configuration(message: impl AsRef<str>) -> Self {
        Self::new(Class::Configuration, message)
    }

    /// What an administrator can do about it, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        if self.class == Class::Fenced {
            return Some("If that server must not go on, stop it and run outbox.take_over() here.");
        }
        if self.message.starts_with("its guard is missing") {
            return Some("Run outbox.take_over() to go on without it.");
        }
        if self.message.contains("outbox_relay:guard:") {
            return Some(
                "Something else has written to that key of Redis: delete it, and what on_missing_guard says is done.",
            );
        }
        let code = self.message.split_whitespace().next().unwrap_or_default();
        Some(match code {
            "NOAUTH" => "Set a password with outbox.set_backend_password(), or password_file.",
            "WRONGPASS" => "Check the backend's username and password.",
            "NOPERM" => {
                "Allow the backend's Redis user XADD on its streams, and for exactly_once what the README lists on keys outbox_relay:*."
            }
            "ERR" if self.message.contains("unknown command") => {
                "exactly_once needs transactions (WATCH, MULTI, EXEC): let the server or proxy have them, or set delivery to at_least_once."
            }
            "OOM" => "Raise Redis's maxmemory, or lower the streams' max_len.",
            "MISCONF" => "Redis cannot save to disk; see its log.",
            "READONLY" => "The backend's host is a replica; point it to the primary.",
            _ => return None,
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// An error reply to one XADD.
pub fn reply(error: &ServerError) -> Failure {
    let details = error.details().unwrap_or_default();
    // Some servers repeat the arguments, which are the user's.
    let details = details.split(", with args beginning with").next().unwrap_or_default();
    Failure::new(
        reply_class(error.code(), details),
        format!("{} {details}", error.code()),
    )
}

/// An EXEC that Redis refused: the reason behind "EXECABORT Transaction discarded because of: ", where it is given.
pub fn aborted(error: &ServerError) -> Failure {
    let details = error.details().unwrap_or_default();
    let reason = details
        .split_once("because of: ")
        .map(|(_, reason)| reason.trim_start_matches('-'));
    let failure = match reason.and_then(|r| r.split_once(' ')) {
        Some((code, details)) => Failure::new(reply_class(code, details), format!("{code} {details}")),
        None => reply(error),
    };
    match failure.class {
        Class::Event => Failure::backend(failure.message),
        _ => failure,
    }
}

fn reply_class(code: &str, details: &str) -> Class {
    match code {
        "LOADING" | "READONLY" | "OOM" | "MISCONF" | "BUSY" | "MASTERDOWN" | "NOREPLICAS" | "CLUSTERDOWN"
        | "TRYAGAIN" | "MOVED" | "ASK" | "UNKILLABLE" => Class::Backend,
        "NOAUTH" | "WRONGPASS" => Class::Configuration,
        // A key that this user may not touch is that stream's trouble alone; a command is the whole backend's.
        "NOPERM" if names_a_key(details) => Class::Event,
        "NOPERM" => Class::Configuration,
        "ERR" if details.contains("max number of clients") => Class::Backend,
        "ERR" if details.starts_with("unknown command") => Class::Configuration,
        // WRONGTYPE, CROSSSLOT, "ERR string exceeds maximum allowed size", "ERR The stream has exhausted the last
        // possible ID": and whatever is not known is never a success, and never the end of the others.
        _ => Class::Event,
    }
}

fn names_a_key(details: &str) -> bool {
    details.contains("access one of the keys") || details.contains("access a key")
}

/// An error of connecting, writing or reading: of the connection as a whole.
pub fn connection(error: &RedisError) -> Failure {
    let class = match error.kind() {
        ErrorKind::AuthenticationFailed | ErrorKind::InvalidClientConfig => Class::Configuration,
        ErrorKind::Server(_) | ErrorKind::Extension => match error.code() {
            Some(code) => match reply_class(code, error.detail().unwrap_or_default()) {
                Class::Event => Class::Configuration,
                class => class,
            },
            None => Class::Configuration,
        },
        ErrorKind::Io => io_class(error),
        _ => Class::Backend,
    };
    let message = match error.kind() {
        ErrorKind::AuthenticationFailed => "WRONGPASS the server refused the username or password".to_owned(),
        _ if error.is_timeout() => "timed out".to_owned(),
        _ => error.to_string(),
    };
    Failure::new(class, message)
}

fn io_class(error: &RedisError) -> Class {
    let text = error.to_string();
    // The resolver's errors have no kind of their own.
    if text.contains("failed to lookup address") || text.contains("No such file or directory") {
        Class::Configuration
    } else {
        Class::Backend
    }
}

/// Text of a server on one line: control characters become spaces, at most 200 characters.
fn shown(text: &str) -> String {
    const LIMIT: usize = 200;
    let mut out: String = text
        .trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(LIMIT)
        .collect();
    if text.trim().chars().nth(LIMIT).is_some() {
        out.push_str("...");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies() {
        use Class::*;
        for (code, details, class) in [
            ("LOADING", "Redis is loading the dataset in memory", Backend),
            ("OOM", "command not allowed when used memory > 'maxmemory'.", Backend),
            ("READONLY", "You can't write against a read only replica.", Backend),
            ("ERR", "max number of clients reached", Backend),
            ("NOAUTH", "Authentication required.", Configuration),
            (
                "NOPERM",
                "this user has no permissions to run the 'xadd' command",
                Configuration,
            ),
            (
                "NOPERM",
                "this user has no permissions to access one of the keys used as arguments",
                Event,
            ),
            ("NOPERM", "No permissions to access a key", Event),
            (
                "WRONGTYPE",
                "Operation against a key holding the wrong kind of value",
                Event,
            ),
            (
                "ERR",
                "The stream has exhausted the last possible ID, unable to add more items",
                Event,
            ),
            ("SOMETHING", "new", Event),
        ] {
            assert_eq!(reply_class(code, details), class, "{code} {details}");
        }
    }

    #[test]
    fn server_text_is_cut_and_cleaned() {
        let failure = Failure::backend(format!("a\r\nb\0{}", "x".repeat(500)));
        assert!(failure.message.starts_with("a  b xxx") && failure.message.ends_with("..."));
        assert_eq!(failure.message.chars().count(), 203);
    }
}
