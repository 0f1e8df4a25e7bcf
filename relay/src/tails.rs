//! Looking for events in the tails of their streams, by event id and timestamp: after a batch whose replies nobody read, and after a
//! change of owner. One command at a time; replies are fed in.

use crate::classify::{self, Class, Failure};
use crate::encode::{append_command, hyphenated, rfc3339};
use redis::Value;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// How far back a stream is searched, in entries.
const DEPTH: usize = 100_000;
/// What a page of entries should take, in bytes; the first has one entry, since it may be large, and so may be those behind a page of
/// small ones.
const PAGE_BYTES: usize = 256 * 1024;
const FIRST_PAGE: usize = 1;
const MOST_OF_A_PAGE: usize = 200;

/// An event that is looked for.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub stream: Arc<str>,
    pub event_id: [u8; 16],
    /// An event that was published under an id that has been used before is another one.
    pub created_at_us: i64,
    pub purpose: Purpose,
}

/// An entry's fields by which an event is known.
type Name = ([u8; 36], [u8; 32]);

impl Wanted {
    fn name(&self) -> Name {
        (hyphenated(&self.event_id), rfc3339(self.created_at_us))
    }
}

/// What an event that is not found means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The batch was appended: what is missing was refused, unless its stream has since been trimmed or thinned out.
    Settle,
    /// It may never have been sent: it is not there.
    Compare,
}

/// A search through several streams.
pub struct Search {
    tails: Vec<Tail>,
    /// Those before it are done.
    at: usize,
    found: Vec<bool>,
}

struct Tail {
    stream: Arc<str>,
    /// Indexes of those not found yet. Events that were retried share a name: each entry counts for one, the first first.
    wanted: HashMap<Name, VecDeque<(usize, Purpose)>>,
    /// The newest entry: its id, and when its event was published.
    newest: Option<(Vec<u8>, [u8; 32])>,
    /// The oldest entry id that was looked at.
    oldest: Option<Vec<u8>>,
    page: usize,
    looked: usize,
    asks_for_info: bool,
}

impl Search {
    pub fn new(wanted: &[Wanted]) -> Self {
        let mut tails: Vec<Tail> = Vec::new();
        let mut of_stream: HashMap<&str, usize> = HashMap::new();
        for (index, event) in wanted.iter().enumerate() {
            let stream = &event.stream;
            let tail = *of_stream.entry(stream).or_insert_with(|| {
                tails.push(Tail {
                    stream: stream.clone(),
                    wanted: HashMap::new(),
                    newest: None,
                    oldest: None,
                    page: FIRST_PAGE,
                    looked: 0,
                    asks_for_info: false,
                });
                tails.len() - 1
            });
            tails[tail]
                .wanted
                .entry(event.name())
                .or_default()
                .push_back((index, event.purpose));
        }
        Self {
            tails,
            at: 0,
            found: vec![false; wanted.len()],
        }
    }

    /// Appends the next command; false: the search has ended.
    pub fn ask(&self, out: &mut Vec<u8>) -> bool {
        let Some(tail) = self.tails.get(self.at) else {
            return false;
        };
        let stream = tail.stream.as_bytes();
        if tail.asks_for_info {
            append_command(out, &[b"XINFO", b"STREAM", stream]);
        } else {
            let end = match &tail.oldest {
                Some(id) => [b"(", id.as_slice()].concat(),
                None => b"+".to_vec(),
            };
            let count = tail.page.to_string();
            append_command(out, &[b"XREVRANGE", stream, &end, b"-", b"COUNT", count.as_bytes()]);
        }
        true
    }

    /// Takes in the reply of the last command. An error is that of the backend.
    pub fn reply(&mut self, value: Value) -> Result<(), Failure> {
        let Some(tail) = self.tails.get_mut(self.at) else {
            return Ok(());
        };
        if tail.asks_for_info {
            match value {
                Value::ServerError(error) => is_no_stream(&error)?,
                info => {
                    if is_thinned(&info) {
                        let newest = tail.newest.take().filter(|(id, _)| is_last_added(&info, id));
                        // Nothing was added behind an older event's entry, so this one was not.
                        let is_behind = |time: &[u8; 32]| newest.as_ref().is_some_and(|(_, newest)| newest < time);
                        let unseen = tail.wanted.drain().filter(|((_, time), _)| !is_behind(time));
                        let unseen = unseen.flat_map(|(_, events)| events);
                        let appended = unseen.filter(|(_, purpose)| *purpose == Purpose::Settle);
                        appended.for_each(|(index, _)| self.found[index] = true);
                    }
                }
            }
            self.at += 1;
            return Ok(());
        }
        let entries = match value {
            Value::Array(entries) => entries,
            Value::ServerError(error) => {
                is_no_stream(&error)?;
                self.at += 1;
                return Ok(());
            }
            _ => return Err(Failure::backend("unexpected reply to XREVRANGE")),
        };
        let is_last = entries.len() < tail.page || tail.looked + entries.len() >= DEPTH;
        let mut bytes = 0;
        for entry in &entries {
            let Value::Array(parts) = entry else { continue };
            let [Value::BulkString(id), Value::Array(fields)] = parts.as_slice() else {
                continue;
            };
            let name = name(fields);
            if tail.oldest.is_none() {
                tail.newest = name.map(|(_, time)| (id.clone(), time));
            }
            tail.oldest = Some(id.clone());
            bytes += size(fields);
            if let Some(name) = name
                && let Entry::Occupied(mut events) = tail.wanted.entry(name)
            {
                if let Some((index, _)) = events.get_mut().pop_front() {
                    self.found[index] = true;
                }
                if events.get().is_empty() {
                    events.remove();
                }
            }
        }
        tail.looked += entries.len();
        tail.page = (PAGE_BYTES * entries.len() / bytes.max(1)).clamp(1, MOST_OF_A_PAGE);
        let mut left = tail.wanted.values().flatten();
        if is_last && left.any(|(_, purpose)| *purpose == Purpose::Settle) {
            tail.asks_for_info = true;
        } else if is_last || tail.wanted.is_empty() {
            self.at += 1;
        }
        Ok(())
    }

    /// Whether each wanted event was found.
    pub fn into_found(self) -> Vec<bool> {
        self.found
    }
}

/// A missing stream, a key of another type or one that we may not touch has none of the events; any other error says nothing about
/// them.
fn is_no_stream(error: &redis::ServerError) -> Result<(), Failure> {
    let failure = classify::reply(error);
    let missing = match error.code() {
        "WRONGTYPE" => true,
        // Else one publisher could keep all of the backend from coming up.
        "NOPERM" => failure.class == Class::Event,
        _ => error.details().is_some_and(|d| d.contains("no such key")),
    };
    missing.then_some(()).ok_or_else(|| failure.not_of_an_event())
}

fn name(fields: &[Value]) -> Option<Name> {
    let field = |wanted: &[u8]| {
        fields.chunks_exact(2).find_map(|pair| match pair {
            [Value::BulkString(name), Value::BulkString(value)] if name == wanted => Some(value.as_slice()),
            _ => None,
        })
    };
    Some((
        field(b"event_id")?.try_into().ok()?,
        field(b"timestamp")?.try_into().ok()?,
    ))
}

fn size(fields: &[Value]) -> usize {
    let bytes = |value: &Value| match value {
        Value::BulkString(bytes) => bytes.len(),
        _ => 0,
    };
    fields.iter().map(bytes).sum()
}

/// Whether entries of a stream have been removed since they were added. Servers before 7.0 do not count those that were added: there,
/// any stream that has ever had one may be.
fn is_thinned(info: &Value) -> bool {
    let field = |name| field_of(info, name);
    match (field(b"length"), field(b"entries-added"), field(b"last-generated-id")) {
        (Some(Value::Int(length)), Some(Value::Int(added)), _) => added > length,
        (_, _, Some(Value::BulkString(last))) => last != b"0-0",
        _ => true,
    }
}

/// Whether no entry was ever added behind this one.
fn is_last_added(info: &Value, id: &[u8]) -> bool {
    matches!(field_of(info, b"last-generated-id"), Some(Value::BulkString(last)) if last == id)
}

fn field_of<'a>(info: &'a Value, name: &[u8]) -> Option<&'a Value> {
    let Value::Array(items) = info else { return None };
    let is_it = |pair: &&[Value]| matches!(&pair[0], Value::BulkString(n) if n == name);
    items.chunks_exact(2).find(is_it).map(|pair| &pair[1])
}
