//! Asks Redis about consumer groups: some streams at once, in rounds of several commands. Replies are passed in, in
//! pieces. See [`crate::consumers`].
//!
//! First, for each stream: the trimming that is due, its length, its groups and, if wanted, its last id. Then, for each
//! group: its pending entries and, if wanted, its consumers.

mod tables;

use crate::consumers::group::{Group, GroupName, MOST_GROUPS_AT_ONCE, Surveyed};
use crate::consumers::readership::Question;
use crate::consumers::trim::{Silent, Trim};
use crate::failure::{self, Class, Failure, Trouble};
use crate::fault::{self, Mutation};
use crate::resp::bounds::Bounds;
use crate::resp::read::{Piece, Reply};
use crate::resp::write::{append_array_header, append_bulk, append_command};
use crate::sender::survey::tables::{Consumers, Groups, Pending, counted};
use redis::Value;
use std::collections::VecDeque;
use std::time::Duration;

/// How many commands a round has.
const ROUND: usize = 64;

/// Trims a stream, unless a group that counts has not acknowledged entries that would be removed. The script checks and
/// trims in one step, because a group may have been created or set back since the last survey, or a silent one may have
/// begun to read again.
const SCRIPT: &str = "local function parts(id)
    local ms, seq = string.match(id, '^(%d+)-(%d+)$')
    return ms, seq
end
local function less(a, b)
    if #a ~= #b then return #a < #b end
    return a < b
end
local function before(a, b)
    local ams, aseq = parts(a)
    local bms, bseq = parts(b)
    if ams ~= bms then return less(ams, bms) end
    return less(aseq, bseq)
end
local left_out = {}
for i = 3, #ARGV, 3 do left_out[ARGV[i]] = {ARGV[i + 1], ARGV[i + 2]} end
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
if groups.err then
    if string.find(groups.err, 'no such key', 1, true) then return -1 end
    return groups
end
local count = 0
for _, group in ipairs(groups) do
    local field = {}
    for i = 1, #group, 2 do field[group[i]] = group[i + 1] end
    local known = left_out[field['name']]
    if known then
        if field['last-delivered-id'] ~= known[1] or tostring(field['pending']) ~= known[2] then return -1 end
    else
        count = count + 1
        if ARGV[1] ~= 'MINID' or before(field['last-delivered-id'], ARGV[2]) then return -1 end
        if field['pending'] > 0 then
            local pending = redis.pcall('XPENDING', KEYS[1], field['name'])
            if pending.err then return pending end
            if pending[2] and before(pending[2], ARGV[2]) then return -1 end
        end
    end
end
if #groups == 0 or (count == 0 and ARGV[1] == 'MINID') then return -1 end
return redis.pcall('XTRIM', KEYS[1], ARGV[1], ARGV[2])";

/// The last id of a stream. XINFO STREAM would send two entries of any size with it.
const LAST: &str = "local info = redis.pcall('XINFO', 'STREAM', KEYS[1])
if info.err then return info end
for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then return redis.status_reply(info[i + 1]) end
end
return redis.status_reply('0-0')";

/// What is asked besides what the view shows.
#[derive(Clone, Copy, Default)]
pub struct Besides {
    /// The last id of each stream.
    pub last: bool,
    /// How long consumers have been silent.
    pub idle: bool,
}

/// A survey in progress.
pub struct Survey {
    pub number: u64,
    questions: Vec<Question>,
    besides: Besides,
    found: Vec<Surveyed>,
    /// The groups of all streams so far.
    groups: usize,
    /// The streams, by index, for whose groups there was no room any more.
    left_out: Vec<usize>,
    /// What is to be asked next,
    next: VecDeque<Ask>,
    /// and what was asked.
    asked: VecDeque<Ask>,
    /// The reply that is being received.
    reading: Option<Reading>,
}

/// About a stream, by its index; about one of its groups, by its index.
#[derive(Clone, Copy)]
enum Ask {
    Trim(usize),
    Length(usize),
    Groups(usize),
    Last(usize),
    Pending(usize, usize),
    Consumers(usize, usize),
}

enum Reading {
    Groups(Groups),
    Pending(Pending),
    Consumers(Consumers),
}

impl Survey {
    pub fn new(number: u64, questions: Vec<Question>, besides: Besides) -> Self {
        let mut next = VecDeque::new();
        for (index, question) in questions.iter().enumerate() {
            if question.trim.is_some() {
                next.push_back(Ask::Trim(index));
            }
            next.extend([Ask::Length(index), Ask::Groups(index)]);
            next.extend(besides.last.then_some(Ask::Last(index)));
        }
        Self {
            number,
            found: questions.iter().map(|q| Surveyed::of(q.stream.clone())).collect(),
            questions,
            besides,
            groups: 0,
            left_out: Vec::new(),
            next,
            asked: VecDeque::new(),
            reading: None,
        }
    }

    /// Appends the commands of the next round, and returns their number. 0: the survey has ended.
    pub fn ask(&mut self, out: &mut Vec<u8>) -> usize {
        let count = self.next.len().min(ROUND);
        for ask in self.next.drain(..count) {
            append(out, ask, &self.questions, &self.found);
            self.asked.push_back(ask);
        }
        count
    }

    /// The bounds of the next reply.
    pub fn bounds(&self) -> Bounds {
        match self.asked.front() {
            Some(Ask::Trim(_) | Ask::Last(_)) => Bounds::line("EVAL"),
            Some(Ask::Length(_)) => Bounds::line("XLEN"),
            Some(Ask::Groups(_)) => Bounds::GROUPS,
            Some(Ask::Pending(..)) => Bounds::PENDING,
            Some(Ask::Consumers(..)) => Bounds::CONSUMERS,
            None => Bounds::line("nothing"),
        }
    }

    /// Processes the next reply, or some pieces of it. Returns whether the reply is complete. An error is one of the
    /// backend.
    pub fn reply(&mut self, reply: Reply<'_>) -> Result<bool, Failure> {
        reply.feed(|piece| self.piece(piece))
    }

    fn piece(&mut self, piece: Piece<'_>) -> Result<bool, Failure> {
        let Some(ask) = self.asked.front().copied() else {
            return Err(Failure::backend("a reply to no command"));
        };
        let is_whole = match (&mut self.reading, piece) {
            (None, Piece::Line(line)) => {
                self.line(ask, Reply::new(line).value()?)?;
                true
            }
            (None, Piece::Array(items)) => {
                let reading = match ask {
                    Ask::Groups(_) => Reading::Groups(Groups::of(items)),
                    Ask::Pending(..) => Reading::Pending(Pending::of(items)),
                    Ask::Consumers(..) => Reading::Consumers(Consumers::of(items)),
                    Ask::Trim(_) | Ask::Length(_) | Ask::Last(_) => return Err(unexpected(ask)),
                };
                self.reading = Some(reading);
                items == 0
            }
            (None, Piece::String { .. }) => return Err(unexpected(ask)),
            (Some(Reading::Groups(groups)), piece) => groups.take(piece),
            (Some(Reading::Pending(pending)), piece) => pending.take(piece),
            (Some(Reading::Consumers(consumers)), piece) => consumers.take(piece),
        };
        if is_whole {
            self.asked.pop_front();
            if let Some(reading) = self.reading.take() {
                self.end(ask, reading);
            }
        }
        Ok(is_whole)
    }

    /// Processes a reply that is not an array.
    fn line(&mut self, ask: Ask, value: Value) -> Result<(), Failure> {
        match (ask, value) {
            (Ask::Trim(index), Value::Int(trimmed)) => self.found[index].is_trimmed = trimmed >= 0,
            (Ask::Trim(index), Value::ServerError(error)) => self.cannot_trim(index, failure::reply(&error))?,
            (Ask::Last(index), Value::SimpleString(id)) => self.found[index].last = id.parse().ok(),
            (Ask::Last(index), Value::ServerError(error)) => {
                if !is_missing(&error) {
                    self.cannot_trim(index, failure::reply(&error))?;
                }
            }
            (Ask::Length(index), Value::Int(length)) => self.found[index].length = counted(length),
            (Ask::Length(index) | Ask::Groups(index), Value::ServerError(error)) => {
                if !is_missing(&error) {
                    self.fails(index, failure::reply(&error))?;
                }
            }
            // The group no longer exists, or the stream was emptied.
            (Ask::Pending(index, _) | Ask::Consumers(index, _), Value::ServerError(error)) => {
                if error.code() != "NOGROUP" {
                    self.fails(index, failure::reply(&error))?;
                }
            }
            // Some servers write an empty array like this.
            (Ask::Groups(_) | Ask::Pending(..) | Ask::Consumers(..), Value::Nil) => {}
            _ => return Err(unexpected(ask)),
        }
        Ok(())
    }

    fn cannot_trim(&mut self, index: usize, failure: Failure) -> Result<(), Failure> {
        self.found[index].untrimmed = Some(match failure.trouble {
            Trouble::Moved | Trouble::Ask => return Err(failure),
            // An unknown error may concern all streams, so it is one of the backend.
            Trouble::UnknownReply => failure.not_of_an_event(),
            _ => failure,
        });
        Ok(())
    }

    /// A stream cannot be asked about. A failure that concerns the server, or where a hash slot is, ends the
    /// connection.
    fn fails(&mut self, index: usize, failure: Failure) -> Result<(), Failure> {
        if failure.class == Class::Backend || matches!(failure.trouble, Trouble::Moved | Trouble::Ask) {
            return Err(failure);
        }
        self.found[index].failure.get_or_insert(failure);
        Ok(())
    }

    fn end(&mut self, ask: Ask, reading: Reading) {
        match (ask, reading) {
            (Ask::Groups(index), Reading::Groups(groups)) => {
                let found = &mut self.found[index];
                (found.groups, found.has_more_groups) = groups.into_groups();
                if self.groups + found.groups.len() > MOST_GROUPS_AT_ONCE {
                    found.groups = Vec::new();
                    self.left_out.push(index);
                    return;
                }
                self.groups += found.groups.len();
                for (nth, group) in found.groups.iter().enumerate() {
                    if matches!(group.name, GroupName::TooLong(_)) {
                        continue;
                    }
                    if group.pending > 0 {
                        self.next.push_back(Ask::Pending(index, nth));
                    }
                    if self.besides.idle && group.consumers > 0 {
                        self.next.push_back(Ask::Consumers(index, nth));
                    }
                }
            }
            (Ask::Pending(index, nth), Reading::Pending(pending)) => {
                let group = &mut self.found[index].groups[nth];
                (group.pending, group.oldest_pending) = pending.into_parts();
            }
            (Ask::Consumers(index, nth), Reading::Consumers(consumers)) => {
                self.found[index].groups[nth].idle = consumers.least_idle_ms().map(Duration::from_millis);
            }
            _ => {}
        }
    }

    /// The answers, without those about streams that were left out.
    pub fn into_found(self) -> Vec<Surveyed> {
        let is_whole = |index: &usize| !self.left_out.contains(index);
        let found = self.found.into_iter().enumerate();
        found
            .filter(|(index, _)| is_whole(index))
            .map(|(_, found)| found)
            .collect()
    }
}

fn is_missing(error: &redis::ServerError) -> bool {
    error.details().is_some_and(|details| details.contains("no such key"))
}

fn append(out: &mut Vec<u8>, ask: Ask, questions: &[Question], found: &[Surveyed]) {
    let stream = |index: usize| questions[index].stream.as_bytes();
    let name = |index: usize, nth: usize| -> &[u8] {
        match found[index].groups.get(nth).map(|group: &Group| &group.name) {
            Some(GroupName::Known(name)) => name,
            Some(GroupName::TooLong(_)) | None => b"",
        }
    };
    match ask {
        Ask::Trim(index) => match &questions[index].trim {
            Some(Trim::Before { id, left_out }) => {
                append_script(out, stream(index), b"MINID", &id.to_string(), left_out)
            }
            Some(Trim::To { length, left_out }) => {
                append_script(out, stream(index), b"MAXLEN", &length.to_string(), left_out);
            }
            None => {}
        },
        Ask::Length(index) => append_command(out, &[b"XLEN", stream(index)]),
        Ask::Groups(index) => append_command(out, &[b"XINFO", b"GROUPS", stream(index)]),
        Ask::Last(index) => append_command(out, &[b"EVAL", LAST.as_bytes(), b"1", stream(index)]),
        Ask::Pending(index, nth) => append_command(out, &[b"XPENDING", stream(index), name(index, nth)]),
        Ask::Consumers(index, nth) => append_command(out, &[b"XINFO", b"CONSUMERS", stream(index), name(index, nth)]),
    }
}

fn append_script(out: &mut Vec<u8>, stream: &[u8], how: &[u8], upto: &str, left_out: &[Silent]) {
    append_array_header(out, 6 + 3 * left_out.len());
    let script = match fault::is_mutated(Mutation::TrimUnread) {
        true => "return redis.pcall('XTRIM', KEYS[1], ARGV[1], ARGV[2])",
        false => SCRIPT,
    };
    for word in [b"EVAL", script.as_bytes(), b"1", stream, how, upto.as_bytes()] {
        append_bulk(out, word);
    }
    for group in left_out {
        append_bulk(out, &group.name);
        append_bulk(out, group.last_delivered.to_string().as_bytes());
        append_bulk(out, group.pending.to_string().as_bytes());
    }
}

fn unexpected(ask: Ask) -> Failure {
    let command = match ask {
        Ask::Trim(_) | Ask::Last(_) => "EVAL",
        Ask::Length(_) => "XLEN",
        Ask::Groups(_) => "XINFO GROUPS",
        Ask::Pending(..) => "XPENDING",
        Ask::Consumers(..) => "XINFO CONSUMERS",
    };
    Failure::backend(format!("unexpected reply to {command}"))
}

#[cfg(test)]
mod tests;
