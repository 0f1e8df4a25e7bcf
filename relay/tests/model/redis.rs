//! A model of a Redis server with what exactly_once uses: streams, one guard, transactions.

use redis::Value;
use relay::event::text::{hyphenated, rfc3339};
use std::collections::{BTreeMap, BTreeSet};

pub(crate) const GUARD: &str = "guard";

pub(crate) type Words = Vec<Vec<u8>>;

/// The commands in these bytes.
pub(crate) fn parse(mut bytes: &[u8]) -> Vec<Words> {
    fn header(bytes: &mut &[u8], kind: u8) -> usize {
        assert_eq!(bytes[0], kind, "not a command");
        let end = bytes.iter().position(|b| *b == b'\r').expect("a whole line");
        let number = bytes[1..end]
            .iter()
            .fold(0, |sum, digit| sum * 10 + usize::from(digit - b'0'));
        *bytes = &bytes[end + 2..];
        number
    }
    let mut commands = Vec::new();
    while !bytes.is_empty() {
        let count = header(&mut bytes, b'*');
        let word = |_| {
            let length = header(&mut bytes, b'$');
            let word = bytes[..length].to_vec();
            bytes = &bytes[length + 2..];
            word
        };
        commands.push((0..count).map(word).collect());
    }
    commands
}

/// The name of an event in its stream; the number belongs to no other event.
pub(crate) fn event_id(uid: u64) -> [u8; 16] {
    u128::from(uid).to_be_bytes()
}

/// When it was published.
pub(crate) fn created_at_us(uid: u64) -> i64 {
    uid as i64
}

fn uid(event_id: &[u8]) -> u64 {
    let hex = event_id.iter().filter(|byte| **byte != b'-');
    hex.fold(0, |sum, digit| {
        let digit = (*digit as char).to_digit(16).expect("a hexadecimal digit");
        sum << 4 | u64::from(digit)
    })
}

pub(crate) fn stream_name(stream: u8) -> String {
    format!("stream-{stream}")
}

fn stream(key: &[u8]) -> u8 {
    key.last().expect("a name") - b'0'
}

/// The value of a key.
#[derive(Clone, Default)]
pub(crate) struct Data {
    /// The events, by their uids; an entry's id is its place.
    pub streams: BTreeMap<u8, Vec<u64>>,
    /// How many entries of a stream were trimmed: they are no longer visible.
    trimmed: BTreeMap<u8, usize>,
    guard: Option<BTreeMap<String, String>>,
}

impl Data {
    pub(crate) fn has_guard(&self) -> bool {
        self.guard.is_some()
    }

    /// Whether the next claim must compare.
    pub(crate) fn compares(&self) -> bool {
        // Perhaps only a token is left.
        let compares = self.guard.as_ref().and_then(|guard| guard.get("compares"));
        compares.is_some_and(|compares| compares == "1")
    }

    /// The guard's number.
    pub(crate) fn number(&self) -> Option<u64> {
        self.guard.as_ref()?.get("number")?.parse().ok()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Keys that hold another type: noticed when a command is executed.
    WrongType,
    /// Keys that the user may not touch: noticed when a command is queued.
    Forbidden,
}

#[derive(Default)]
struct Client {
    /// The guard as it was when it was watched.
    watched: Option<u64>,
    queue: Option<Vec<Words>>,
    broken: bool,
}

#[derive(Default)]
pub(crate) struct Redis {
    pub data: Data,
    clients: BTreeMap<u64, Client>,
    /// How often the guard was touched.
    touches: u64,
    /// The client whose claim was the last.
    owner: Option<u64>,
    pub troubled: BTreeMap<u8, Trouble>,
    pub out_of_memory: bool,
    /// It has not received the written bytes.
    pub replicas_lag: bool,
    /// Streams of which an event was refused because of its content.
    pub refused: BTreeSet<u8>,
    /// All events that were ever appended.
    pub appended: BTreeSet<u64>,
    /// Batches that were not executed, because the guard was touched or because of their content.
    pub nils: u32,
    pub aborts: u32,
    /// Somebody except the owner appended.
    pub violation: Option<String>,
}

impl Redis {
    pub(crate) fn connect(&mut self, client: u64) {
        self.clients.insert(client, Client::default());
    }

    /// Whether the commands of a client are still processed.
    pub(crate) fn knows(&self, client: u64) -> bool {
        self.clients.contains_key(&client)
    }

    /// Starts again with the data that it had saved: every connection ends.
    pub(crate) fn restart(&mut self, data: Data) {
        self.data = data;
        self.clients.clear();
        self.owner = None;
    }

    pub(crate) fn flush(&mut self) {
        self.data = Data::default();
        self.touch();
        self.owner = None;
    }

    /// Whether an event stands in its stream.
    pub(crate) fn holds(&self, uid: u64) -> bool {
        self.data.streams.values().flatten().any(|other| *other == uid)
    }

    /// Somebody trims a stream to its last `length` entries.
    pub(crate) fn trim(&mut self, stream: u8, length: usize) {
        let entries = self.data.streams.get(&stream).map_or(0, Vec::len);
        let trimmed = self.data.trimmed.entry(stream).or_default();
        *trimmed = (*trimmed).max(entries.saturating_sub(length));
    }

    pub(crate) fn delete_guard(&mut self) {
        self.data.guard = None;
        self.touch();
        self.owner = None;
    }

    fn touch(&mut self) {
        self.touches += 1;
    }

    fn client(&mut self, client: u64) -> &mut Client {
        self.clients.get_mut(&client).expect("a client that it knows")
    }

    pub(crate) fn execute(&mut self, id: u64, words: Words) -> Value {
        let command = words[0].as_slice();
        match command {
            b"EXEC" => return self.exec(id),
            b"DISCARD" => {
                let client = self.client(id);
                (client.queue, client.watched, client.broken) = (None, None, false);
                return Value::Okay;
            }
            b"MULTI" => {
                self.client(id).queue = Some(Vec::new());
                return Value::Okay;
            }
            b"WATCH" => {
                let touches = self.touches;
                let client = self.client(id);
                if client.queue.is_some() {
                    return error("ERR WATCH inside MULTI is not allowed");
                }
                client.watched.get_or_insert(touches);
                return Value::Okay;
            }
            _ => {}
        }
        let refusal = self.refuses(&words);
        let client = self.client(id);
        if let Some(queue) = &mut client.queue {
            return match refusal {
                Some(refusal) => {
                    client.broken = true;
                    refusal
                }
                None => {
                    queue.push(words);
                    Value::SimpleString("QUEUED".to_owned())
                }
            };
        }
        if refusal.is_none() && is_token(&words) {
            // A later appender has not read the guard again.
            self.owner = None;
        }
        refusal.unwrap_or_else(|| self.run(id, &words))
    }

    /// Before it is executed, or even queued.
    fn refuses(&mut self, words: &Words) -> Option<Value> {
        let writes = matches!(words[0].as_slice(), b"XADD" | b"HSET");
        if writes && self.out_of_memory {
            return Some(error("OOM command not allowed when used memory > 'maxmemory'."));
        }
        let key = match words[0].as_slice() {
            b"XADD" | b"XREVRANGE" => &words[1],
            b"XINFO" => &words[2],
            _ => return None,
        };
        (self.troubled.get(&stream(key)) == Some(&Trouble::Forbidden)).then(|| {
            if writes {
                self.refused.insert(stream(key));
            }
            error("NOPERM No permissions to access a key")
        })
    }

    fn exec(&mut self, id: u64) -> Value {
        let touches = self.touches;
        let client = self.client(id);
        let Some(queue) = client.queue.take() else {
            return error("ERR EXEC without MULTI");
        };
        let untouched = client.watched.take().is_none_or(|watched| watched == touches);
        if std::mem::take(&mut client.broken) {
            self.aborts += 1;
            return error("EXECABORT Transaction discarded because of previous errors.");
        }
        if !untouched {
            self.nils += 1;
            return Value::Nil;
        }
        if queue.iter().any(is_token) {
            self.owner = Some(id);
        } else if self.owner != Some(id) {
            self.violation = Some("a batch was appended behind a newer claim".to_owned());
        }
        Value::Array(queue.iter().map(|words| self.run(id, words)).collect())
    }

    fn run(&mut self, _id: u64, words: &Words) -> Value {
        let sick = |redis: &Self, key: &[u8]| redis.troubled.contains_key(&stream(key));
        let wrong_type = || error("WRONGTYPE Operation against a key holding the wrong kind of value");
        match words[0].as_slice() {
            b"HGETALL" => {
                let fields = self.data.guard.iter().flatten();
                Value::Array(fields.flat_map(|(field, value)| [bulk(field), bulk(value)]).collect())
            }
            b"HMGET" => {
                let fields = words[2..].iter().map(|field| String::from_utf8_lossy(field));
                let value = |field: &str| self.data.guard.as_ref().and_then(|guard| guard.get(field));
                Value::Array(fields.map(|f| value(&f).map_or(Value::Nil, |v| bulk(v))).collect())
            }
            b"HSET" => {
                let guard = self.data.guard.get_or_insert_default();
                for pair in words[2..].chunks_exact(2) {
                    let [field, value] = [0, 1].map(|i| String::from_utf8_lossy(&pair[i]).into_owned());
                    guard.insert(field, value);
                }
                self.touch();
                Value::Int(0)
            }
            b"XADD" => {
                if sick(self, &words[1]) {
                    self.refused.insert(stream(&words[1]));
                    return wrong_type();
                }
                self.appended.insert(uid(&words[4]));
                let entries = self.data.streams.entry(stream(&words[1])).or_default();
                assert_eq!(
                    (words[2].as_slice(), words[3].as_slice()),
                    (&b"*"[..], &b"event_id"[..])
                );
                entries.push(uid(&words[4]));
                bulk(&format!("{}-0", entries.len()))
            }
            b"XREVRANGE" if sick(self, &words[1]) => wrong_type(),
            b"XREVRANGE" => {
                let entries = self.data.streams.get(&stream(&words[1])).map_or(&[][..], Vec::as_slice);
                let first = self.data.trimmed.get(&stream(&words[1])).copied().unwrap_or(0);
                let end = std::str::from_utf8(&words[2]).expect("an id");
                let before = match end.strip_prefix('(').and_then(|id| id.strip_suffix("-0")) {
                    Some(id) => (id.parse::<usize>().expect("an id") - 1).min(entries.len()),
                    None => entries.len(),
                };
                let count: usize = std::str::from_utf8(&words[5])
                    .expect("digits")
                    .parse()
                    .expect("a number");
                let entry = |at: usize| {
                    let id = hyphenated(&event_id(entries[at]));
                    let time = rfc3339(created_at_us(entries[at]));
                    let fields: [&[u8]; 4] = [b"event_id", &id, b"timestamp", &time];
                    let fields = fields.map(|field| Value::BulkString(field.to_vec()));
                    Value::Array(vec![bulk(&format!("{}-0", at + 1)), Value::Array(fields.to_vec())])
                };
                Value::Array((first..before).rev().take(count).map(entry).collect())
            }
            b"XINFO" if sick(self, &words[2]) => wrong_type(),
            b"XINFO" => match self.data.streams.get(&stream(&words[2])) {
                None => error("ERR no such key"),
                Some(entries) => {
                    let trimmed = self.data.trimmed.get(&stream(&words[2])).copied().unwrap_or(0);
                    let [length, added] = [entries.len() - trimmed, entries.len()].map(|n| Value::Int(n as i64));
                    Value::Array(vec![bulk("length"), length, bulk("entries-added"), added])
                }
            },
            b"WAIT" => Value::Int(i64::from(!self.replicas_lag)),
            other => panic!("unknown command {}", String::from_utf8_lossy(other)),
        }
    }
}

/// Whether a command gives the guard a new token.
fn is_token(words: &Words) -> bool {
    words[0] == b"HSET" && words[2] == b"token"
}

fn bulk(text: &str) -> Value {
    Value::BulkString(text.as_bytes().to_vec())
}

fn error(text: &str) -> Value {
    redis::parse_redis_value(format!("-{text}\r\n").as_bytes()).expect("an error reply")
}

/// A reply as it is sent.
pub(crate) fn append_reply(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Okay => out.extend(b"+OK\r\n"),
        Value::SimpleString(text) => out.extend(format!("+{text}\r\n").bytes()),
        Value::Int(number) => out.extend(format!(":{number}\r\n").bytes()),
        Value::Nil => out.extend(b"$-1\r\n"),
        Value::BulkString(bytes) => {
            out.extend(format!("${}\r\n", bytes.len()).bytes());
            out.extend(bytes);
            out.extend(b"\r\n");
        }
        Value::Array(items) => {
            out.extend(format!("*{}\r\n", items.len()).bytes());
            items.iter().for_each(|item| append_reply(out, item));
        }
        Value::ServerError(error) => {
            out.extend(format!("-{} {}\r\n", error.code(), error.details().unwrap_or_default()).bytes());
        }
        other => panic!("the model sends no {other:?}"),
    }
}
