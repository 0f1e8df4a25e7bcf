//! Tests whether a backend can be used: a separate login, which changes nothing in Redis and reports the step at which
//! it ends.

use crate::failure::{self, Class, Failure, Trouble};
use crate::redis::connection::RedisConnection;
use crate::redis::destination::{Address, Destination, Protocol};
use crate::redis::step::{self, Step};
use crate::redis::topology;
use crate::resp::bounds::Bounds;
use crossbeam_channel::{Receiver, TryRecvError, bounded};
use redis::Value;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// The result of a test.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The time that one PING took.
    pub latency: Option<Duration>,
    /// For example redis, and its version and role, as the server reports them.
    pub server: Option<String>,
    pub version: Option<String>,
    pub role: Option<String>,
    /// The node that was connected to, or that was tried last.
    pub address: Option<String>,
    /// The step at which the test ended, and why.
    pub error: Option<String>,
}

/// A test that is running.
pub struct Probe(Receiver<Found>);

impl Probe {
    /// The result, when there is one.
    pub fn found(&self) -> Option<Found> {
        match self.0.try_recv() {
            Ok(found) => Some(found),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Found {
                error: Some("the test ended unexpectedly".to_owned()),
                ..Found::default()
            }),
        }
    }
}

/// Runs [`probe`] in a thread of its own, which writes a byte to `waker` when it ends, and drops `permit`. The caller
/// must block all signals of its process around this call.
pub fn spawn(
    destination: Destination,
    stream: Option<String>,
    waker: Arc<UnixStream>,
    permit: impl Send + 'static,
) -> io::Result<Probe> {
    let (told, found) = bounded(1);
    thread::Builder::new()
        .name("backend test".to_owned())
        .stack_size(512 * 1024)
        .spawn(move || {
            let _permit = permit;
            let _ = told.send(probe(&destination, stream.as_deref()));
            let _ = (&*waker).write(&[0]);
        })?;
    Ok(Probe(found))
}

/// Connects, logs in, and asks for each right that sending needs. `stream`: a stream that it sends to, if one is known.
/// Takes at most the timeouts of all steps.
pub fn probe(destination: &Destination, stream: Option<&str>) -> Found {
    let mut found = Found::default();
    step::at(Step::FindNode);
    if let Err(failure) = look(destination, stream, &mut found) {
        found.error = Some(format!("{}: {}", step::current(), failure.message));
    }
    found
}

fn look(destination: &Destination, stream: Option<&str>, found: &mut Found) -> Result<(), Failure> {
    let address = &mut found.address;
    let mut note = |node: &Address| *address = Some(node.to_string());
    let mut connection = topology::open(destination, &mut note)?;
    step::at(Step::Ping);
    let start = Instant::now();
    let pong = topology::ask(&mut connection, &[b"PING"], &Bounds::line("PING"));
    found.latency = Some(start.elapsed());
    tolerated(pong)?;
    step::at(Step::Role);
    // A server or proxy that does not know HELLO reports none of these.
    if let Some(Value::Array(items)) = tolerated(topology::ask(&mut connection, &[b"HELLO", b"2"], &Bounds::HELLO))? {
        /// The answer must have room for what is wrong. (Redis's longest version has some twenty characters.)
        const SHOWN: usize = 60;
        let short = |text: &[u8]| {
            let text = failure::server_text::shown(&String::from_utf8_lossy(text));
            text.chars().take(SHOWN).collect::<String>()
        };
        let said = |name: &str| {
            let is_it = |pair: &&[Value]| matches!(&pair[0], Value::BulkString(key) if key == name.as_bytes());
            match items.chunks_exact(2).find(is_it).map(|pair| &pair[1]) {
                Some(Value::BulkString(text)) => Some(short(text)),
                _ => None,
            }
        };
        (found.server, found.version, found.role) = (said("server"), said("version"), said("role"));
    }
    if found.role.as_deref().is_some_and(|role| role != "master") {
        return Err(Failure::of(Trouble::IsReplica, "READONLY it is a replica"));
    }
    if let Protocol::ExactlyOnce { guard, .. } = &destination.protocol {
        step::at(Step::Rights);
        may_use(&mut connection, guard, stream)?;
    }
    Ok(())
}

/// Rights are checked when a command is queued, even if it is then discarded.
fn may_use(connection: &mut RedisConnection, guard: &str, stream: Option<&str>) -> Result<(), Failure> {
    let (guard, known) = (guard.as_bytes(), stream.is_some());
    let stream = stream.unwrap_or_default().as_bytes();
    let named = |name: &str, failure: Failure| Failure::new(failure.class, format!("{name}: {}", failure.message));
    for (name, words) in [("WATCH", [b"WATCH", guard].as_slice()), ("MULTI", &[b"MULTI"])] {
        // If MULTI is refused, no command may follow, because it would be executed.
        topology::ask(connection, words, &Bounds::line("a command")).map_err(|failure| named(name, failure))?;
    }
    let queued: [(&str, &[&[u8]]); 6] = [
        ("HGETALL", &[b"HGETALL", guard]),
        ("HMGET", &[b"HMGET", guard, b"token"]),
        ("XREVRANGE", &[b"XREVRANGE", stream, b"+", b"-", b"COUNT", b"1"]),
        ("XINFO", &[b"XINFO", b"STREAM", stream]),
        ("HSET", &[b"HSET", guard, b"token", b"x"]),
        ("XADD", &[b"XADD", stream, b"*", b"f", b"v"]),
    ];
    let mut refused = None;
    for (name, words) in queued.into_iter().filter(|(_, words)| known || words[1] == guard) {
        match topology::ask(connection, words, &Bounds::line("a command")) {
            Ok(Value::SimpleString(word)) if word == "QUEUED" => {}
            Ok(_) => return Err(failure::not_redis()),
            Err(failure) if is_answer(&failure) => {
                refused.get_or_insert_with(|| named(name, failure));
            }
            Err(failure) => return Err(failure),
        }
    }
    for name in ["DISCARD", "UNWATCH"] {
        let words: [&[u8]; 1] = [name.as_bytes()];
        topology::ask(connection, &words, &Bounds::line("a command")).map_err(|failure| named(name, failure))?;
    }
    refused.map_or(Ok(()), Err)
}

/// Whether the failure is an answer of the server, so that the connection can continue.
fn is_answer(failure: &Failure) -> bool {
    !matches!(failure.trouble, Trouble::Closed | Trouble::TimedOut | Trouble::NotRedis)
}

/// Treats a missing right as no answer, because it does not prevent sending.
fn tolerated(answer: Result<Value, Failure>) -> Result<Option<Value>, Failure> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(failure) if failure.message.starts_with("NOPERM") || failure.message.starts_with("ERR unknown command") => {
            Ok(None)
        }
        Err(failure) if failure.class == Class::Event => Err(Failure::backend(failure.message)),
        Err(failure) => Err(failure),
    }
}
