//! Replies as they come in: where one ends is seen in place, what the usual ones say too. All others are parsed by `redis`.
//!
//! Source: RESP, version 2 (Redis serialization protocol specification).

use crate::classify::{self, Failure, Trouble};
use redis::Value;
use std::ops::Range;

/// The longest reply: a page of a stream's tail, if its entries are as large as they may be.
const MAX_REPLY: usize = 256 << 20;
/// The longest line of a reply.
const MAX_LINE: usize = 64 * 1024;
/// How deep arrays may lie within each other.
const MAX_DEPTH: usize = 8;
/// What a buffer that has grown for a large reply goes back to.
const USUAL_SIZE: usize = 64 * 1024;

/// One whole reply, as it came.
#[derive(Clone, Copy)]
pub struct Reply<'a>(&'a [u8]);

impl<'a> Reply<'a> {
    /// `bytes`: one whole reply, as [`Inbox::take`] finds it.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether it says that a command waits for EXEC.
    pub fn is_queued(self) -> bool {
        self.0 == b"+QUEUED\r\n"
    }

    /// Whether it is the id of an entry, or whatever else is a string.
    pub fn is_bulk(self) -> bool {
        self.0.first() == Some(&b'$') && !self.is_nil()
    }

    pub fn is_nil(self) -> bool {
        matches!(self.0, b"$-1\r\n" | b"*-1\r\n")
    }

    /// Whether it is an array of `strings` strings and one number behind them.
    pub fn is_strings_and_number(self, strings: usize) -> bool {
        let mut rest = self.0;
        let Ok(Some((Token::Array(items), used))) = token(rest) else {
            return false;
        };
        if items != strings as u64 + 1 {
            return false;
        }
        rest = &rest[used..];
        for _ in 0..strings {
            match token(rest) {
                Ok(Some((Token::Bulk, used))) => rest = &rest[used..],
                _ => return false,
            }
        }
        rest.first() == Some(&b':')
    }

    /// Taken apart.
    pub fn value(self) -> Result<Value, Failure> {
        redis::parse_redis_value(self.0).map_err(|_| classify::not_redis())
    }
}

/// Bytes that were received and not taken yet.
#[derive(Default)]
pub struct Inbox {
    buffer: Vec<u8>,
    /// What was received and not taken lies between.
    start: usize,
    end: usize,
    progress: Progress,
}

/// How far the next reply has been looked at.
#[derive(Default)]
struct Progress {
    /// From the reply's start.
    at: usize,
    /// What is missing of each array that is open, outermost first.
    open: Vec<u64>,
}

impl Inbox {
    /// Takes the next reply, if it is there as a whole, for [`Self::reply`]. An error: what comes in is not the protocol.
    pub fn take(&mut self) -> Result<Option<Range<usize>>, Failure> {
        let received = &self.buffer[self.start..self.end];
        let Some(length) = self.progress.look(received)? else {
            return Ok(None);
        };
        let taken = self.start..self.start + length;
        self.start = taken.end;
        self.progress.at = 0;
        Ok(Some(taken))
    }

    /// What was taken, until there is asked for room.
    pub fn reply(&self, taken: Range<usize>) -> Reply<'_> {
        Reply(&self.buffer[taken])
    }

    /// What was received and not taken.
    pub fn rest(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Where to receive more; [`Self::received`] is to be told how much it was.
    pub fn room(&mut self) -> Result<&mut [u8], Failure> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if self.buffer.len() > USUAL_SIZE {
                self.buffer = Vec::new();
            }
        }
        if self.end == self.buffer.len() {
            if self.start > 0 {
                self.buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            } else {
                if self.buffer.len() >= MAX_REPLY {
                    return Err(Failure::of(Trouble::TooLongReply, "a reply that does not end"));
                }
                let more = self.buffer.len().max(USUAL_SIZE);
                self.buffer
                    .try_reserve_exact(more)
                    .map_err(|_| Failure::backend("no memory for a reply"))?;
                self.buffer.resize(self.buffer.len() + more, 0);
            }
        }
        Ok(&mut self.buffer[self.end..])
    }

    pub fn received(&mut self, bytes: usize) {
        self.end += bytes;
    }
}

impl Progress {
    /// The length of the first reply of `received`.
    fn look(&mut self, received: &[u8]) -> Result<Option<usize>, Failure> {
        loop {
            let Some((token, length)) = token(&received[self.at..])? else {
                return Ok(None);
            };
            self.at += length;
            match token {
                Token::Array(items) if items > 0 => {
                    if self.open.len() == MAX_DEPTH {
                        return Err(garbage());
                    }
                    self.open.push(items);
                    continue;
                }
                Token::Array(_) | Token::Bulk | Token::Line => {}
            }
            while let Some(missing) = self.open.last_mut() {
                *missing -= 1;
                if *missing > 0 {
                    break;
                }
                self.open.pop();
            }
            if self.open.is_empty() {
                return Ok(Some(self.at));
            }
        }
    }
}

enum Token {
    /// The header of an array of so many items.
    Array(u64),
    /// A string, whole.
    Bulk,
    /// A status, an error, a number, or nil.
    Line,
}

/// The first token and its length; `None`: it is not there as a whole.
fn token(bytes: &[u8]) -> Result<Option<(Token, usize)>, Failure> {
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
                    let whole = length + size as usize + 2;
                    (bytes.len() >= whole).then_some((Token::Bulk, whole))
                }
            });
        }
        _ => return Err(garbage()),
    }
    let line = &bytes[..bytes.len().min(MAX_LINE)];
    match line.iter().position(|b| *b == b'\n') {
        Some(end) => Ok(Some((Token::Line, end + 1))),
        None if line.len() == MAX_LINE => Err(garbage()),
        None => Ok(None),
    }
}

/// The number of a `$` or `*` line (`None`: nil), and the line's length; `None`: it is not there as a whole.
fn header(bytes: &[u8]) -> Result<Option<(Option<u64>, usize)>, Failure> {
    const MAX_DIGITS: usize = 10;
    let mut number = 0u64;
    for (index, byte) in bytes.iter().enumerate().skip(1) {
        match byte {
            b'0'..=b'9' if index <= MAX_DIGITS => number = number * 10 + u64::from(byte - b'0'),
            b'\r' if index > 1 => {
                return match bytes.get(index + 1) {
                    None => Ok(None),
                    Some(b'\n') if number <= MAX_REPLY as u64 => Ok(Some((Some(number), index + 2))),
                    Some(_) => Err(garbage()),
                };
            }
            b'-' if index == 1 => {
                return match bytes.get(2..5) {
                    None => Ok(None),
                    Some(b"1\r\n") => Ok(Some((None, 5))),
                    Some(_) => Err(garbage()),
                };
            }
            _ => return Err(garbage()),
        }
    }
    Ok(None)
}

fn garbage() -> Failure {
    classify::not_redis()
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPLIES: &[&[u8]] = &[
        b"+OK\r\n",
        b"+QUEUED\r\n",
        b"-ERR no such thing\r\n",
        b":-12\r\n",
        b"$-1\r\n",
        b"*-1\r\n",
        b"*0\r\n",
        b"$0\r\n\r\n",
        b"$4\r\n\r\n+O\r\n",
        b"*3\r\n$3\r\n1-0\r\n$3\r\n1-1\r\n:6\r\n",
        b"*2\r\n*2\r\n$3\r\n1-0\r\n*0\r\n*2\r\n$3\r\n2-0\r\n*2\r\n$1\r\na\r\n$1\r\nb\r\n",
    ];

    fn taken(inbox: &mut Inbox, found: &mut Vec<Vec<u8>>) {
        while let Some(reply) = inbox.take().unwrap() {
            found.push(inbox.reply(reply).0.to_vec());
        }
    }

    #[test]
    fn replies_are_found_however_they_arrive() {
        let all = REPLIES.concat();
        for pieces in 1..=all.len() {
            let (mut inbox, mut found) = (Inbox::default(), Vec::new());
            for piece in all.chunks(pieces) {
                let mut piece = piece;
                while !piece.is_empty() {
                    let room = inbox.room().unwrap();
                    let length = piece.len().min(room.len());
                    room[..length].copy_from_slice(&piece[..length]);
                    inbox.received(length);
                    piece = &piece[length..];
                }
                taken(&mut inbox, &mut found);
            }
            assert_eq!(found, REPLIES, "in pieces of {pieces}");
        }
    }

    #[test]
    fn a_reply_may_be_larger_than_the_buffer() {
        let large = [b"$300000\r\n".as_slice(), &vec![b'x'; 300_000], b"\r\n"].concat();
        let (mut inbox, mut found) = (Inbox::default(), Vec::new());
        for reply in [&large, REPLIES[0], &large] {
            let mut piece: &[u8] = reply;
            while !piece.is_empty() {
                let room = inbox.room().unwrap();
                let length = piece.len().min(room.len()).min(1_000);
                room[..length].copy_from_slice(&piece[..length]);
                inbox.received(length);
                piece = &piece[length..];
                taken(&mut inbox, &mut found);
            }
        }
        assert_eq!(found, [large.as_slice(), REPLIES[0], &large]);
    }

    #[test]
    fn what_is_not_the_protocol_is_said_to_be() {
        for bytes in [
            b"HTTP/1.1 400 Bad Request\r\n".as_slice(),
            b"$x\r\n",
            b"$-2\r\n",
            b"$\r\n",
            b"$12345678901\r\n",
            b"$9999999999\r\n",
            b"*1\rx",
            b"%1\r\n",
            &b"*1\r\n".repeat(9),
            &b"+".repeat(MAX_LINE + 1),
        ] {
            let mut inbox = Inbox::default();
            let mut piece = bytes;
            while !piece.is_empty() {
                let room = inbox.room().unwrap();
                let length = piece.len().min(room.len());
                room[..length].copy_from_slice(&piece[..length]);
                inbox.received(length);
                piece = &piece[length..];
            }
            assert!(inbox.take().is_err(), "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn the_usual_replies_are_known_in_place() {
        assert!(Reply(b"+QUEUED\r\n").is_queued() && !Reply(b"+OK\r\n").is_queued());
        assert!(Reply(b"$3\r\n1-0\r\n").is_bulk() && !Reply(b"$-1\r\n").is_bulk() && !Reply(b":1\r\n").is_bulk());
        let executed = Reply(REPLIES[9]);
        assert!(executed.is_strings_and_number(2));
        assert!(!executed.is_strings_and_number(1) && !executed.is_strings_and_number(3));
        assert!(Reply(b"*1\r\n:0\r\n").is_strings_and_number(0));
        for refused in [
            b"*3\r\n$3\r\n1-0\r\n-ERR no\r\n:6\r\n".as_slice(),
            b"*2\r\n$-1\r\n:6\r\n",
            b"*2\r\n:6\r\n$3\r\n1-0\r\n",
            b"*-1\r\n",
        ] {
            assert!(!Reply(refused).is_strings_and_number(1) && !Reply(refused).is_strings_and_number(2));
        }
    }
}
