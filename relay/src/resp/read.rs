//! Reads replies as they arrive. The end of a reply, and the content of common replies, are read in place; the crate
//! `redis` parses the others. No reply may be larger than its command allows ([`Bounds`]): the sizes in headers are
//! counted before memory is allocated.
//!
//! Source: RESP, version 2 (Redis serialization protocol specification).

use crate::failure::{self, Failure, Trouble, memory};
use crate::resp::bounds::{Bounds, KEPT_STRING, MAX_LINE};
use redis::Value;
use std::ops::Range;

/// The size of a buffer at first: most connections get only short replies, and there may be many.
const FIRST_SIZE: usize = 4 * 1024;
/// A buffer that has grown beyond this for a large reply is given back.
const USUAL_SIZE: usize = 64 * 1024;

/// One complete reply as it arrived, or a piece of one (see [`Bounds::in_pieces`]).
#[derive(Clone, Copy)]
pub struct Reply<'a>(&'a [u8]);

impl<'a> Reply<'a> {
    /// `bytes`: one complete reply, as [`Inbox::take`] finds it.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn bytes(self) -> &'a [u8] {
        self.0
    }

    /// Whether it reports that a command was queued for EXEC.
    pub fn is_queued(self) -> bool {
        self.0 == b"+QUEUED\r\n"
    }

    /// Whether it is a string, such as an entry id.
    pub fn is_bulk(self) -> bool {
        self.0.first() == Some(&b'$') && !self.is_nil()
    }

    pub fn is_nil(self) -> bool {
        matches!(self.0, b"$-1\r\n" | b"*-1\r\n")
    }

    /// Whether it is an array of `strings` strings followed by one number.
    pub fn is_strings_and_number(self, strings: usize) -> bool {
        let mut rest = self.0;
        let Ok(Some((Token::Array(items), used))) = token(rest, usize::MAX) else {
            return false;
        };
        if items != strings as u64 + 1 {
            return false;
        }
        rest = &rest[used..];
        for _ in 0..strings {
            match token(rest, usize::MAX) {
                Ok(Some((Token::Bulk(_), used))) => rest = &rest[used..],
                _ => return false,
            }
        }
        rest.first() == Some(&b':')
    }

    /// The items of an array, each as a reply; `None`: it is not an array.
    pub fn items(self) -> Option<ReplyItems<'a>> {
        match token(self.0, usize::MAX) {
            Ok(Some((Token::Array(items), length))) => Some(ReplyItems {
                rest: &self.0[length..],
                left: items,
            }),
            _ => None,
        }
    }

    /// The content of a string.
    pub fn string(self) -> Option<&'a [u8]> {
        match self.pieces().next() {
            Some(Piece::String { text: Some(text), .. }) => Some(text),
            _ => None,
        }
    }

    /// The value of a number.
    pub fn number(self) -> Option<i64> {
        let digits = self.0.strip_prefix(b":")?.strip_suffix(b"\r\n")?;
        std::str::from_utf8(digits).ok()?.parse().ok()
    }

    /// Its parts, in order.
    pub fn pieces(self) -> Pieces<'a> {
        Pieces(self.0)
    }

    /// Passes its pieces to `take`, one by one, until `take` returns that the reply is complete. Returns whether it is.
    pub fn feed(self, mut take: impl FnMut(Piece<'a>) -> Result<bool, Failure>) -> Result<bool, Failure> {
        for piece in self.pieces() {
            if take(piece)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The parsed reply.
    pub fn value(self) -> Result<Value, Failure> {
        redis::parse_redis_value(self.0).map_err(|_| failure::not_redis())
    }
}

/// See [`Reply::items`].
pub struct ReplyItems<'a> {
    rest: &'a [u8],
    left: u64,
}

impl<'a> Iterator for ReplyItems<'a> {
    type Item = Reply<'a>;

    fn next(&mut self) -> Option<Reply<'a>> {
        self.left = self.left.checked_sub(1)?;
        let length = Scan::default().look(self.rest, &Bounds::ANY).ok()??;
        let (item, rest) = self.rest.split_at(length);
        self.rest = rest;
        Some(Reply(item))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
        (left, Some(left))
    }
}

/// For a reply that is completely there.
impl ExactSizeIterator for ReplyItems<'_> {}

/// A part of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// This many items follow.
    Array(u64),
    /// `text`: `None` if it was too long to be kept. `start`: its first bytes, at most [`KEPT_STRING`] of a long
    /// string.
    String {
        size: u64,
        text: Option<&'a [u8]>,
        start: &'a [u8],
    },
    /// A status, an error, a number, or nil: the whole line.
    Line(&'a [u8]),
}

/// See [`Reply::pieces`].
pub struct Pieces<'a>(&'a [u8]);

impl<'a> Iterator for Pieces<'a> {
    type Item = Piece<'a>;

    fn next(&mut self) -> Option<Piece<'a>> {
        let bytes = std::mem::take(&mut self.0);
        let (token, length) = match token(bytes, usize::MAX) {
            Ok(Some(found)) => found,
            // The end, or a header without content.
            _ => match header(bytes) {
                Ok(Some((Some(size), length))) => {
                    return Some(Piece::String {
                        size,
                        text: None,
                        start: &bytes[length..],
                    });
                }
                _ => return None,
            },
        };
        let (piece, rest) = bytes.split_at(length);
        self.0 = rest;
        Some(match token {
            Token::Array(items) => Piece::Array(items),
            Token::Bulk(size) => {
                let text = &piece[length - 2 - size..length - 2];
                Piece::String {
                    size: size as u64,
                    text: Some(text),
                    start: text,
                }
            }
            Token::Line => Piece::Line(piece),
        })
    }
}

/// Bytes that were received and not yet taken.
#[derive(Default)]
pub struct Inbox {
    buffer: Vec<u8>,
    /// The bytes that were received and not yet taken lie in between.
    start: usize,
    end: usize,
    progress: Scan,
    /// How many bytes of a long string are still to come and need not be kept.
    unkept: u64,
}

/// How far the next reply has been examined.
#[derive(Default)]
struct Scan {
    /// Where the rest of the reply starts.
    at: usize,
    /// How many items are missing in each open array, outermost first.
    open: Vec<u64>,
    /// The items of all arrays so far.
    items: u64,
    /// The bytes of earlier pieces.
    bytes: u64,
}

impl Inbox {
    /// Takes the next reply (or the next piece of it), if it has arrived completely, for [`Self::reply`]. An error: the
    /// bytes are not the protocol, or more than was asked for.
    pub fn take(&mut self, bounds: &Bounds) -> Result<Option<Range<usize>>, Failure> {
        self.pass_unkept();
        if self.unkept > 0 {
            return Ok(None);
        }
        let received = &self.buffer[self.start..self.end];
        let found = match bounds.in_pieces {
            false => self.progress.look(received, bounds)?.map(|length| (length, 0)),
            true => self.progress.look_at_piece(received, bounds)?,
        };
        let Some((length, unkept)) = found else {
            return Ok(None);
        };
        let taken = self.start..self.start + length;
        (self.start, self.unkept) = (taken.end, unkept);
        self.progress.at = 0;
        if self.progress.open.is_empty() {
            (self.progress.items, self.progress.bytes) = (0, 0);
        }
        Ok(Some(taken))
    }

    /// What was taken, valid until room is requested.
    pub fn reply(&self, taken: Range<usize>) -> Reply<'_> {
        Reply(&self.buffer[taken])
    }

    /// Whether the last taken bytes were a whole reply, or the last piece of one.
    pub fn is_between_replies(&self) -> bool {
        self.progress.open.is_empty() && self.unkept == 0
    }

    /// What was received and not yet taken.
    pub fn rest(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// How many bytes of memory it uses.
    pub fn size(&self) -> usize {
        self.buffer.capacity()
    }

    fn pass_unkept(&mut self) {
        let there = self.unkept.min((self.end - self.start) as u64);
        self.start += there as usize;
        self.unkept -= there;
    }

    /// Where to receive more; [`Self::received`] must then be told how much it was. Call this when [`Self::take`] has
    /// found nothing, so that the buffer grows only for replies within the bounds.
    pub fn room(&mut self) -> Result<&mut [u8], Failure> {
        let was_filled = self.end == self.buffer.len();
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if self.buffer.len() > USUAL_SIZE {
                self.buffer = Vec::new();
            }
        } else if was_filled && self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        // There is probably more than the last read could take.
        let is_short = was_filled && self.buffer.len() < USUAL_SIZE;
        if is_short || self.end == self.buffer.len() {
            let more = self.buffer.len().max(FIRST_SIZE);
            memory::reserve_exact(&mut self.buffer, more).map_err(|none| none.failure("a reply"))?;
            self.buffer.resize(self.buffer.len() + more, 0);
        }
        Ok(&mut self.buffer[self.end..])
    }

    pub fn received(&mut self, bytes: usize) {
        self.end += bytes;
    }

    /// Receives these bytes, which the caller already has.
    pub fn receive(&mut self, mut bytes: &[u8]) {
        while let (false, Ok(room)) = (bytes.is_empty(), self.room()) {
            let length = bytes.len().min(room.len());
            room[..length].copy_from_slice(&bytes[..length]);
            self.received(length);
            bytes = &bytes[length..];
        }
    }
}

impl Scan {
    /// The length of the first reply in `received`.
    fn look(&mut self, received: &[u8], bounds: &Bounds) -> Result<Option<usize>, Failure> {
        loop {
            let room = bounds.bytes.saturating_sub(self.at);
            let Some((token, length)) = token(&received[self.at..], room).map_err(|wrong| wrong.failure(bounds))?
            else {
                return match received.len() > bounds.bytes {
                    true => Err(too_long(bounds)),
                    false => Ok(None),
                };
            };
            self.at += length;
            if self.at > bounds.bytes {
                return Err(too_long(bounds));
            }
            if self.ends_with(&token, bounds)? {
                return Ok(Some(self.at));
            }
        }
    }

    /// The length of the first piece in `received`, and how many bytes after it are not kept.
    fn look_at_piece(&mut self, received: &[u8], bounds: &Bounds) -> Result<Option<(usize, u64)>, Failure> {
        let unkept = match received.first() {
            Some(b'$') => header(received).map_err(|wrong| wrong.failure(bounds))?,
            _ => None,
        };
        if let Some((Some(size), length)) = unkept
            && size > KEPT_STRING as u64
        {
            let kept = length + KEPT_STRING;
            if received.len() < kept {
                return Ok(None);
            }
            self.counts(length as u64 + size + 2, bounds)?;
            self.ends_with(&Token::Bulk(0), bounds)?;
            return Ok(Some((kept, size + 2 - KEPT_STRING as u64)));
        }
        let Some((token, length)) = token(received, usize::MAX).map_err(|wrong| wrong.failure(bounds))? else {
            return Ok(None);
        };
        self.counts(length as u64, bounds)?;
        self.ends_with(&token, bounds)?;
        Ok(Some((length, 0)))
    }

    /// Counts the bytes of a piece.
    fn counts(&mut self, bytes: u64, bounds: &Bounds) -> Result<(), Failure> {
        self.bytes = self.bytes.saturating_add(bytes);
        match self.bytes > bounds.bytes as u64 {
            true => Err(too_long(bounds)),
            false => Ok(()),
        }
    }

    /// Whether the reply ends with this token.
    fn ends_with(&mut self, token: &Token, bounds: &Bounds) -> Result<bool, Failure> {
        if let Token::Array(items @ 1..) = token {
            self.items = self.items.saturating_add(*items);
            // Each item has at least three bytes.
            let announced = items.saturating_mul(3).saturating_add(self.at as u64);
            if self.open.len() >= bounds.depth {
                return Err(garbage());
            }
            if self.items > bounds.items as u64 || announced > bounds.bytes as u64 {
                return Err(too_long(bounds));
            }
            self.open.push(*items);
            return Ok(false);
        }
        while let Some(missing) = self.open.last_mut() {
            *missing -= 1;
            if *missing > 0 {
                break;
            }
            self.open.pop();
        }
        Ok(self.open.is_empty())
    }
}

enum Token {
    /// The header of an array with this many items.
    Array(u64),
    /// A complete string of this many bytes.
    Bulk(usize),
    /// A status, an error, a number, or nil.
    Line,
}

/// Why bytes are not acceptable.
enum Wrong {
    NotTheProtocol,
    /// More is announced than the bounds allow.
    TooLong,
}

impl Wrong {
    fn failure(self, bounds: &Bounds) -> Failure {
        match self {
            Self::NotTheProtocol => garbage(),
            Self::TooLong => too_long(bounds),
        }
    }
}

/// The first token and its length; `None`: it has not arrived completely. It may have `most` bytes.
fn token(bytes: &[u8], most: usize) -> Result<Option<(Token, usize)>, Wrong> {
    let Some(&kind) = bytes.first() else {
        return Ok(None);
    };
    match kind {
        b'+' | b'-' | b':' => {}
        b'$' | b'*' => {
            let Some((number, length)) = header(bytes)? else {
                return Ok(None);
            };
            return Ok(match (kind, number) {
                (_, None) => Some((Token::Line, length)),
                (b'*', Some(items)) => Some((Token::Array(items), length)),
                (_, Some(size)) => {
                    let whole = usize::try_from(size).unwrap_or(usize::MAX).saturating_add(length + 2);
                    if whole > most {
                        return Err(Wrong::TooLong);
                    }
                    (bytes.len() >= whole).then_some((Token::Bulk(whole - length - 2), whole))
                }
            });
        }
        _ => return Err(Wrong::NotTheProtocol),
    }
    let line = &bytes[..bytes.len().min(MAX_LINE)];
    match line.iter().position(|b| *b == b'\n') {
        Some(end) => Ok(Some((Token::Line, end + 1))),
        None if line.len() == MAX_LINE => Err(Wrong::NotTheProtocol),
        None => Ok(None),
    }
}

/// The number in a `$` or `*` line (an inner `None`: nil), and the line's length; `None`: it has not arrived
/// completely.
fn header(bytes: &[u8]) -> Result<Option<(Option<u64>, usize)>, Wrong> {
    const MAX_DIGITS: usize = 10;
    let mut number = 0u64;
    for (index, byte) in bytes.iter().enumerate().skip(1) {
        match byte {
            b'0'..=b'9' if index <= MAX_DIGITS => number = number * 10 + u64::from(byte - b'0'),
            b'0'..=b'9' => return Err(Wrong::TooLong),
            b'\r' if index > 1 => {
                return match bytes.get(index + 1) {
                    None => Ok(None),
                    Some(b'\n') => Ok(Some((Some(number), index + 2))),
                    Some(_) => Err(Wrong::NotTheProtocol),
                };
            }
            b'-' if index == 1 => {
                return match bytes.get(2..5) {
                    None => Ok(None),
                    Some(b"1\r\n") => Ok(Some((None, 5))),
                    Some(_) => Err(Wrong::NotTheProtocol),
                };
            }
            _ => return Err(Wrong::NotTheProtocol),
        }
    }
    Ok(None)
}

fn too_long(bounds: &Bounds) -> Failure {
    let what = format!("the reply to {} is longer than any reply of Redis", bounds.to);
    Failure::of(Trouble::TooLongReply, what)
}

fn garbage() -> Failure {
    failure::not_redis()
}

#[cfg(test)]
mod tests;
