//! Looks for events at the ends of their streams, by event id and timestamp: after a batch whose replies were not read,
//! and after a change of owner. It sends one command at a time; replies are passed in, in pieces.

mod pieces;

use crate::event::wanted::{EventName, Purpose, Sighting, Wanted};
use crate::failure::{self, Class, Failure};
use crate::resp::bounds::Bounds;
use crate::resp::read::{Piece, Reply};
use crate::resp::write::append_command;
use crate::sender::tails::pieces::{Info, Page};
use redis::Value;
use std::collections::hash_map;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// How many entries back a stream is searched.
const DEPTH: usize = 100_000;
/// How many bytes a page of entries should have. The first page has one entry, because entries may be large.
const PAGE_BYTES: usize = 256 * 1024;
const FIRST_PAGE: usize = 1;
/// How many bytes are read in total. Beyond that, only the first page of each further stream is read.
const MOST_BYTES: u64 = 16 << 30;
const MOST_OF_A_PAGE: usize = 200;

/// A search through several streams.
pub struct Search {
    tails: Vec<Tail>,
    /// The index of the tail that is being searched.
    at: usize,
    found: Vec<Sighting>,
    /// How many bytes were looked through.
    bytes: u64,
    /// The reply that is being received.
    reading: Option<Reading>,
}

enum Reading {
    Page(Page),
    Info(Info),
}

struct Tail {
    stream: Arc<str>,
    /// The indexes of events that were not found yet. Events that were retried share a name: each entry counts for one
    /// of them, in order.
    wanted: HashMap<EventName, VecDeque<(usize, Purpose)>>,
    /// The newest entry: its id, its event, and the index of that if it was wanted.
    newest: Option<(Vec<u8>, EventName, Option<usize>)>,
    /// The oldest entry id that was looked at.
    oldest: Option<Vec<u8>>,
    page: usize,
    looked: usize,
    /// It has entries that were not looked at.
    is_too_long: bool,
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
                    is_too_long: false,
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
            found: vec![Sighting::Missing; wanted.len()],
            bytes: 0,
            reading: None,
        }
    }

    /// Whether there is nothing more to ask.
    pub(crate) fn has_ended(&self) -> bool {
        self.at >= self.tails.len()
    }

    /// Appends the next command. False: the search has ended.
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

    /// The bounds of the reply to the last command.
    pub fn bounds(&self) -> Bounds {
        match self.tails.get(self.at) {
            Some(tail) if tail.asks_for_info => Bounds::INFO,
            _ => Bounds::ENTRIES,
        }
    }

    /// Processes the reply to the last command, or some pieces of it. Returns whether the reply is complete. An error
    /// is one of the backend.
    pub fn reply(&mut self, reply: Reply<'_>) -> Result<bool, Failure> {
        reply.feed(|piece| self.piece(piece))
    }

    fn piece(&mut self, piece: Piece<'_>) -> Result<bool, Failure> {
        let Some(tail) = self.tails.get_mut(self.at) else {
            return Ok(true);
        };
        match (&mut self.reading, piece) {
            (None, Piece::Line(line)) => return self.line(Reply::new(line).value()?).map(|()| true),
            (None, Piece::Array(items)) if tail.asks_for_info => {
                self.reading = (items > 0).then(|| Reading::Info(Info::of(items)));
                if items == 0 {
                    self.end_of_info(&Info::default());
                }
            }
            (None, Piece::Array(entries)) if entries <= MOST_OF_A_PAGE as u64 => {
                self.reading = (entries > 0).then(|| Reading::Page(Page::of(entries)));
                if entries == 0 {
                    self.end_of_page(&Page::of(0));
                }
            }
            (None, _) => return Err(unexpected(tail)),
            (Some(Reading::Page(page)), piece) => {
                if let Some(entry) = page.take(piece)? {
                    tail.entry(entry, &mut self.found);
                }
                if page.is_whole()
                    && let Some(Reading::Page(page)) = self.reading.take()
                {
                    self.end_of_page(&page);
                }
            }
            (Some(Reading::Info(info)), piece) => {
                info.take(piece);
                if info.is_whole()
                    && let Some(Reading::Info(info)) = self.reading.take()
                {
                    self.end_of_info(&info);
                }
            }
        }
        Ok(self.reading.is_none())
    }

    /// Processes a reply that is not an array.
    fn line(&mut self, value: Value) -> Result<(), Failure> {
        match (value, self.tails.get(self.at)) {
            (Value::ServerError(error), _) => {
                is_no_stream(&error)?;
                self.at += 1;
            }
            (_, Some(tail)) => return Err(unexpected(tail)),
            (_, None) => {}
        }
        Ok(())
    }

    fn end_of_info(&mut self, info: &Info) {
        let Some(tail) = self.tails.get_mut(self.at) else {
            return;
        };
        if info.is_thinned() || tail.is_too_long {
            let last = tail.newest.take().filter(|(id, ..)| info.is_last_added(id));
            let unseen = tail.wanted.drain().flat_map(|(_, events)| events);
            for (index, _) in unseen.filter(|(_, purpose)| *purpose == Purpose::Settle) {
                self.found[index] = match last {
                    // The events of a batch are in order, so this one was not added.
                    Some((.., Some(last))) if last < index => Sighting::Missing,
                    Some((_, last, None)) => Sighting::NotBehind(last),
                    Some(_) | None => Sighting::There,
                };
            }
        }
        self.at += 1;
    }

    fn end_of_page(&mut self, page: &Page) {
        let Some(tail) = self.tails.get_mut(self.at) else {
            return;
        };
        self.bytes = self.bytes.saturating_add(page.bytes);
        let is_enough = tail.looked + page.entries >= DEPTH || self.bytes >= MOST_BYTES;
        tail.is_too_long = is_enough && page.entries >= tail.page;
        let is_last = page.entries < tail.page || is_enough;
        tail.looked += page.entries;
        tail.page = (PAGE_BYTES * page.entries / (page.bytes as usize).max(1)).clamp(1, MOST_OF_A_PAGE);
        let mut left = tail.wanted.values().flatten();
        if is_last && left.any(|(_, purpose)| *purpose == Purpose::Settle) {
            tail.asks_for_info = true;
        } else if is_last || tail.wanted.is_empty() {
            self.at += 1;
        }
    }

    /// What was found of each wanted event.
    pub fn into_found(self) -> Vec<Sighting> {
        self.found
    }
}

impl Tail {
    fn entry(&mut self, entry: pieces::Entry, found: &mut [Sighting]) {
        let pieces::Entry { id, name } = entry;
        let mut of = None;
        if let Some(name) = name
            && let hash_map::Entry::Occupied(mut events) = self.wanted.entry(name)
        {
            if let Some((index, purpose)) = events.get_mut().pop_front() {
                found[index] = Sighting::There;
                of = (purpose == Purpose::Settle).then_some(index);
            }
            if events.get().is_empty() {
                events.remove();
            }
        }
        if self.oldest.is_none() {
            self.newest = name.map(|name| (id.clone(), name, of));
        }
        self.oldest = Some(id);
    }
}

/// A missing stream, a key of another type or one that this user may not access has none of the events. Any other error
/// tells nothing about them.
fn is_no_stream(error: &redis::ServerError) -> Result<(), Failure> {
    let failure = failure::reply(error);
    let missing = match error.code() {
        "WRONGTYPE" => true,
        // Otherwise one publisher could keep the whole backend from coming up.
        "NOPERM" => failure.class == Class::Event,
        _ => error.details().is_some_and(|d| d.contains("no such key")),
    };
    missing.then_some(()).ok_or_else(|| failure.not_of_an_event())
}

fn unexpected(tail: &Tail) -> Failure {
    let command = if tail.asks_for_info { "XINFO" } else { "XREVRANGE" };
    Failure::backend(format!("unexpected reply to {command}"))
}
