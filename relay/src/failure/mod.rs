//! What an error means for the delivery: from what Redis, the socket or the resolver reports to a [`Failure`].
//! `trouble.rs` decides who is to blame and what helps. [`memory`] is there when there is none.

pub mod memory;
pub mod server_text;
mod trouble;

pub use trouble::{Class, MORE_MEMORY, Trouble};

use crate::failure::server_text::shown;
use redis::{ServerError, Value};
use std::error::Error;
use std::fmt;
use std::io;

/// An error as text that can be shown: cut to length, on one line, without payloads or passwords.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub class: Class,
    pub message: String,
    pub trouble: Trouble,
}

impl Failure {
    pub fn new(class: Class, message: impl AsRef<str>) -> Self {
        Self {
            class,
            message: shown(message.as_ref()),
            trouble: Trouble::Other,
        }
    }

    pub fn of(trouble: Trouble, message: impl AsRef<str>) -> Self {
        Self {
            class: trouble.class(),
            message: shown(message.as_ref()),
            trouble,
        }
    }

    pub fn backend(message: impl AsRef<str>) -> Self {
        Self::new(Class::Backend, message)
    }

    pub fn configuration(message: impl AsRef<str>) -> Self {
        Self::new(Class::Configuration, message)
    }

    /// The same failure within a cluster, where another node can be looked up.
    #[must_use]
    pub fn of_cluster(self) -> Self {
        match self.trouble {
            Trouble::Moved | Trouble::Ask => Self::of(Trouble::SlotMoves, self.message),
            _ => self,
        }
    }

    /// The same failure for a command that is not an event: the backend is to blame.
    #[must_use]
    pub fn not_of_an_event(mut self) -> Self {
        if self.class == Class::Event {
            self.class = Class::Configuration;
        }
        self
    }

    /// What an administrator can do about it, if that is known.
    pub fn hint(&self) -> Option<&'static str> {
        self.trouble.judged().1
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// An error reply to one command.
pub fn reply(error: &ServerError) -> Failure {
    of_reply(error.code(), error.details().unwrap_or_default())
}

fn of_reply(code: &str, details: &str) -> Failure {
    // Some servers repeat the arguments, which are the user's data.
    let details = details.split(", with args beginning with").next().unwrap_or_default();
    Failure::of(Trouble::of_reply(code, details), format!("{code} {details}"))
}

/// What an administrator can do about an error, given the stored text of an error reply, if that is known.
pub fn hint_of(words: &str) -> Option<&'static str> {
    let (code, details) = words.split_once(' ')?;
    let is_code = code.bytes().all(|byte| byte.is_ascii_uppercase());
    let trouble = match code {
        "TLS" | "TLS:" => Trouble::Tls,
        _ if is_code => Trouble::of_reply(code, details),
        _ => return None,
    };
    trouble.judged().1
}

/// The failure for an unexpected reply.
pub(crate) fn unexpected(value: &Value) -> Failure {
    match value {
        Value::ServerError(error) => reply(error).not_of_an_event(),
        _ => not_redis(),
    }
}

/// The failure for a refused EXEC. Its reason follows "EXECABORT Transaction discarded because of: ", if the server
/// gives one.
pub fn aborted(error: &ServerError) -> Failure {
    let details = error.details().unwrap_or_default();
    let reason = details
        .split_once("because of: ")
        .map(|(_, reason)| reason.trim_start_matches('-'));
    let mut failure = match reason.and_then(|r| r.split_once(' ')) {
        Some((code, details)) => of_reply(code, details),
        None => reply(error),
    };
    // It does not name an entry.
    if failure.class == Class::Event {
        failure.class = Class::Backend;
    }
    failure
}

/// The failure for bytes that are not a Redis reply, or not a reply to the command that was sent.
pub fn not_redis() -> Failure {
    Failure::of(Trouble::NotRedis, "unexpected reply: the server is not Redis")
}

/// The failure for an error while connecting, writing or reading: it concerns the whole connection.
pub fn io(error: &io::Error) -> Failure {
    use io::ErrorKind::*;
    if let Some(lookup) = error.get_ref().and_then(|inner| inner.downcast_ref::<Lookup>()) {
        return lookup.failure();
    }
    let trouble = match error.kind() {
        ConnectionRefused => Trouble::Refused,
        ConnectionReset | ConnectionAborted | BrokenPipe | NotConnected | UnexpectedEof | WriteZero => Trouble::Closed,
        // A socket with a timeout reports the second one.
        TimedOut | WouldBlock => Trouble::TimedOut,
        HostUnreachable | NetworkUnreachable | NetworkDown | AddrNotAvailable => Trouble::Unreachable,
        NotFound => Trouble::NoSocketFile,
        PermissionDenied => Trouble::Forbidden,
        _ => Trouble::Other,
    };
    let message = match error.kind() {
        UnexpectedEof => "the server closed the connection".to_owned(),
        TimedOut | WouldBlock => "timed out".to_owned(),
        _ => error.to_string(),
    };
    Failure::of(trouble, message)
}

/// Marks an error of the resolver, which has no error kind of its own.
pub fn lookup(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), Lookup(error))
}

#[derive(Debug)]
struct Lookup(io::Error);

impl Lookup {
    fn failure(&self) -> Failure {
        // If the message is not in English, it counts as a name that does not exist, and attempts are less frequent.
        let text = self.0.to_string();
        let trouble = match text.contains("Temporary failure") {
            true => Trouble::Unresolved,
            false => Trouble::NoSuchHost,
        };
        Failure::of(trouble, text)
    }
}

impl fmt::Display for Lookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for Lookup {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_reply_blames_the_event_only() {
        assert_eq!(of_reply("SOMETHING", "new").class, Class::Event);
        let elsewhere = of_reply("SOMETHING", "new").not_of_an_event();
        assert_eq!(
            (elsewhere.class, elsewhere.message.as_str()),
            (Class::Configuration, "SOMETHING new")
        );
    }

    #[test]
    fn arguments_that_a_server_repeats_are_not_shown() {
        let failure = of_reply(
            "ERR",
            "unknown command 'XADD', with args beginning with: 'events' 'secret'",
        );
        assert_eq!(failure.message, "ERR unknown command 'XADD'");
    }

    fn exec_said(line: &str) -> Failure {
        match redis::parse_redis_value(format!("-{line}\r\n").as_bytes()) {
            Ok(redis::Value::ServerError(error)) => aborted(&error),
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn the_reason_of_an_aborted_transaction_decides() {
        for (line, class, message) in [
            (
                "EXECABORT Transaction discarded because of: OOM command not allowed when used memory > 'maxmemory'.",
                Class::Backend,
                "OOM command not allowed when used memory > 'maxmemory'.",
            ),
            (
                "EXECABORT Transaction discarded because of: -READONLY You can't write against a read only replica.",
                Class::Backend,
                "READONLY You can't write against a read only replica.",
            ),
            (
                "EXECABORT Transaction discarded because of: NOAUTH Authentication required.",
                Class::Configuration,
                "NOAUTH Authentication required.",
            ),
            (
                "CROSSSLOT Keys in request don't hash to the same slot",
                Class::Configuration,
                "CROSSSLOT Keys in request don't hash to the same slot",
            ),
            // It is not known which event it was, so none fails.
            (
                "EXECABORT Transaction discarded because of previous errors.",
                Class::Backend,
                "EXECABORT Transaction discarded because of previous errors.",
            ),
            ("SOMETHING new", Class::Backend, "SOMETHING new"),
        ] {
            let failure = exec_said(line);
            assert_eq!((failure.class, failure.message.as_str()), (class, message), "{line}");
        }
    }

    #[test]
    fn errors_of_sockets_and_of_the_resolver() {
        use io::ErrorKind;
        for (error, trouble, class) in [
            (
                io::Error::from(ErrorKind::ConnectionRefused),
                Trouble::Refused,
                Class::Backend,
            ),
            (ErrorKind::UnexpectedEof.into(), Trouble::Closed, Class::Backend),
            (ErrorKind::ConnectionReset.into(), Trouble::Closed, Class::Backend),
            (ErrorKind::WouldBlock.into(), Trouble::TimedOut, Class::Backend),
            (ErrorKind::NotFound.into(), Trouble::NoSocketFile, Class::Backend),
            (
                ErrorKind::PermissionDenied.into(),
                Trouble::Forbidden,
                Class::Configuration,
            ),
            (io::Error::other("whatever else"), Trouble::Other, Class::Backend),
            (
                lookup(io::Error::other(
                    "failed to lookup address information: Name or service not known",
                )),
                Trouble::NoSuchHost,
                Class::Configuration,
            ),
            (
                lookup(io::Error::other(
                    "failed to lookup address information: Temporary failure in name resolution",
                )),
                Trouble::Unresolved,
                Class::Backend,
            ),
        ] {
            let failure = io(&error);
            assert_eq!((failure.trouble, failure.class), (trouble, class), "{error:?}");
            assert!(!failure.message.is_empty());
        }
    }
}
