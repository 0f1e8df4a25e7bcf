//! The guard: a small hash beside the streams that records which server appends and how far it has come. A batch is one
//! transaction together with the guard's new position. So the guard always describes what the streams hold, whatever
//! happened to the connection.
//!
//! Fields: `token` (random, names a claim), `incarnation` (one run of one Postgres server), `system` (its identifier),
//! `timeline`, `place` (where it runs), `interval_ms` (how often it refreshes the guard), `beat` (incremented with each
//! refresh), `released` (1: the owner has left), `number` (of the last batch), `position` (of the reader after that
//! batch), `previous` (before it), `again` (the seqs of a batch of events that had been refused), `compares` (1: events
//! behind `previous` may already be in the streams, which is found out by comparing event ids), `wal` (the position up
//! to which the WAL was flushed for the batch), `total` (events so far), `own_stream` (the stream of those events of
//! the batch that name none). A claim that starts anew counts as an empty batch.

pub mod claim;
pub mod epoch;
pub mod place;
pub mod watch;

use crate::guard::epoch::{MOST_EPOCHS, epoch_of};
use crate::reading::range::Position;
use crate::resp::write::{append_array_header, append_bulk, append_command};
use std::time::Duration;
use thiserror::Error;

/// The shortest poll interval; a server that waits for the owner looks at least this often.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);
/// The longest poll interval.
const LONGEST_INTERVAL: Duration = Duration::from_secs(3_600);
/// The most events of any batch.
const MOST_AGAIN: usize = 10_000;
/// The most characters of tokens, incarnations and system identifiers.
const LONGEST_NAME: usize = 128;
/// The most characters of a place: a host name and a path.
const LONGEST_PLACE: usize = 4_096;

/// Sent before the first command of a batch.
pub const BATCH_START: &[u8] = b"*1\r\n$5\r\nMULTI\r\n";

/// A guard as it is in Redis.
#[derive(Clone, Debug)]
pub struct Guard {
    pub token: String,
    pub incarnation: String,
    pub system: String,
    pub timeline: u32,
    pub place: String,
    pub interval: Duration,
    pub beat: u64,
    pub released: bool,
    pub number: u64,
    pub position: Position,
    pub previous: Position,
    pub again: Vec<i64>,
    /// Events behind `previous` may already be in the streams: the owner had found events there, and had not passed all
    /// of them.
    pub compares: bool,
    pub wal: u64,
    pub total: i64,
    /// Where the events of the last batch stand that name no stream. `None`: in the backend's own, as it is.
    pub own_stream: Option<String>,
}

#[derive(Debug, Error)]
#[error("the guard has no readable {0}")]
pub struct ParseGuardError(&'static str);

/// The server that claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub incarnation: String,
    pub system: String,
    pub timeline: u32,
    pub place: String,
    pub interval: Duration,
}

/// The position that a batch writes to the guard.
#[derive(Clone, Copy)]
pub struct Mark<'a> {
    pub number: u64,
    pub position: &'a Position,
    pub previous: &'a Position,
    /// Events behind `previous` were found in their streams, and it may not have passed all of them.
    pub compares: bool,
}

/// What a batch writes to the guard.
pub struct Progress<'a> {
    pub mark: Mark<'a>,
    pub again: &'a [i64],
    pub wal: u64,
    pub total: i64,
    /// Empty if there are no events.
    pub own_stream: &'a str,
}

impl Guard {
    /// Parses the reply of HGETALL; `None`: there is no guard, or only the token that [`append_token`] sets.
    pub fn parse(fields: &[(&[u8], &[u8])]) -> Result<Option<Self>, ParseGuardError> {
        if fields.iter().all(|(field, _)| *field == b"token") {
            return Ok(None);
        }
        let text = |name: &'static str| {
            let found = fields.iter().find(|(field, _)| *field == name.as_bytes());
            let text = found.and_then(|(_, value)| std::str::from_utf8(value).ok());
            text.ok_or(ParseGuardError(name))
        };
        let name = |name: &'static str| {
            let is_name = |text: &&str| text.len() <= LONGEST_NAME && text.bytes().all(|b| b.is_ascii_graphic());
            Some(text(name)?).filter(is_name).ok_or(ParseGuardError(name))
        };
        let position = |name: &'static str| text(name)?.parse().map_err(|_| ParseGuardError(name));
        fn number<N: std::str::FromStr>(name: &'static str, value: &str) -> Result<N, ParseGuardError> {
            value.parse().map_err(|_| ParseGuardError(name))
        }
        let again = text("again")?.split(',').filter(|seq| !seq.is_empty());
        let interval_ms = number("interval_ms", text("interval_ms")?)?;
        let guard = Self {
            token: name("token")?.to_owned(),
            incarnation: name("incarnation")?.to_owned(),
            system: name("system")?.to_owned(),
            timeline: number("timeline", text("timeline")?)?,
            place: text("place")?.to_owned(),
            interval: Duration::from_millis(interval_ms),
            beat: number("beat", text("beat")?)?,
            released: text("released")? == "1",
            number: number("number", text("number")?)?,
            position: position("position")?,
            previous: position("previous")?,
            again: again
                .take(MOST_AGAIN + 1)
                .map(|seq| number("again", seq))
                .collect::<Result<_, _>>()?,
            compares: text("compares")? == "1",
            wal: number("wal", text("wal")?)?,
            total: number("total", text("total")?)?,
            own_stream: Some(text("own_stream")?.to_owned()).filter(|name| !name.is_empty()),
        };
        guard
            .absurdity()
            .map_or(Ok(Some(guard)), |name| Err(ParseGuardError(name)))
    }

    /// Names a field that no relay writes like this and that no server could use.
    fn absurdity(&self) -> Option<&'static str> {
        let most = i64::MAX as u64;
        [
            (self.place.len() > LONGEST_PLACE, "place"),
            (
                !(SHORTEST_INTERVAL..=LONGEST_INTERVAL).contains(&self.interval),
                "interval_ms",
            ),
            (self.beat > most, "beat"),
            (self.number > most, "number"),
            (self.wal > most, "wal"),
            (!(0..i64::MAX / 2).contains(&self.total), "total"),
            (!self.position.is_possible(), "position"),
            (!self.previous.is_possible(), "previous"),
            (
                self.again.len() > MOST_AGAIN || self.again.iter().any(|seq| *seq <= 0),
                "again",
            ),
        ]
        .into_iter()
        .find_map(|(is_absurd, name)| is_absurd.then_some(name))
    }
}

/// How far this server itself has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// No transaction has this id or a higher one yet.
    pub next_xid: u64,
    /// The highest number that an event has got.
    pub highest_seq: i64,
    /// The end of the WAL.
    pub wal: u64,
    /// How many times the guard was claimed; 0: not known.
    pub epoch: u64,
    /// The total of accepted events, as far as it is known.
    pub total: i64,
}

impl Guard {
    /// Names a field whose value is higher than is possible for a guard of our own history: somebody else has written
    /// it. Believing it would skip future events, or use up the batch numbers. `is_current`: the guard belongs to this
    /// run of the server. (Numbers of an earlier run may have been lost with it.)
    pub fn beyond(&self, reach: &Reach, is_current: bool) -> Option<&'static str> {
        let is_beyond = |position: &Position| {
            let mut ticks = position.ticks();
            position.last_seq() > reach.highest_seq
                || ticks.any(|tick| {
                    tick.snapshot.xmax().max(tick.next_xid) > reach.next_xid || tick.high_seq > reach.highest_seq
                })
        };
        /// A server that does not know how much it has sent, because the backend is new or its cursor was deleted, may
        /// have sent each event this many times, after losses.
        const TIMES: i64 = 1_000;
        let (epochs, total) = match reach.epoch {
            0 => (MOST_EPOCHS, reach.highest_seq.saturating_mul(TIMES)),
            // Each event whose reply was not read has a number of its own.
            epoch => (epoch, reach.total.max(0).saturating_add(reach.highest_seq)),
        };
        [
            (is_current && is_beyond(&self.position), "position"),
            (is_current && is_beyond(&self.previous), "previous"),
            (is_current && self.wal > reach.wal, "wal"),
            (epoch_of(self.number) > epochs, "number"),
            (self.total > total, "total"),
            (
                is_current && self.again.iter().any(|seq| *seq > reach.highest_seq),
                "again",
            ),
        ]
        .into_iter()
        .find_map(|(is_beyond, name)| is_beyond.then_some(name))
    }
}

/// Appends an HSET of only a token: nobody owns the guard until it is claimed.
pub fn append_token(out: &mut Vec<u8>, key: &[u8], token: &str) {
    append_command(out, &[b"HSET", key, b"token", token.as_bytes()]);
}

/// Appends the HSET that makes `owner` the owner.
pub fn append_claim(out: &mut Vec<u8>, key: &[u8], token: &str, owner: &Owner) {
    let timeline = owner.timeline.to_string();
    let interval_ms = owner.interval.as_millis().to_string();
    let mut words: Vec<&[u8]> = vec![b"HSET", key];
    for (field, value) in [
        ("token", token),
        ("incarnation", &owner.incarnation),
        ("system", &owner.system),
        ("timeline", &timeline),
        ("place", &owner.place),
        ("interval_ms", &interval_ms),
        ("beat", "0"),
        ("released", "0"),
    ] {
        words.extend([field.as_bytes(), value.as_bytes()]);
    }
    append_command(out, &words);
}

/// Appends the HSET at the end of a batch.
pub fn append_progress(out: &mut Vec<u8>, key: &[u8], progress: &Progress<'_>) {
    let mut number = itoa::Buffer::new();
    append_array_header(out, 2 + 2 * 8);
    append_bulk(out, b"HSET");
    append_bulk(out, key);
    append_bulk(out, b"number");
    append_bulk(out, number.format(progress.mark.number).as_bytes());
    append_bulk(out, b"position");
    append_bulk(out, progress.mark.position.to_string().as_bytes());
    append_bulk(out, b"previous");
    append_bulk(out, progress.mark.previous.to_string().as_bytes());
    append_bulk(out, b"again");
    let again: Vec<String> = progress.again.iter().map(i64::to_string).collect();
    append_bulk(out, again.join(",").as_bytes());
    append_bulk(out, b"compares");
    append_bulk(out, if progress.mark.compares { b"1" } else { b"0" });
    append_bulk(out, b"wal");
    append_bulk(out, number.format(progress.wal).as_bytes());
    append_bulk(out, b"total");
    append_bulk(out, number.format(progress.total).as_bytes());
    append_bulk(out, b"own_stream");
    append_bulk(out, progress.own_stream.as_bytes());
}

/// Appends the HSET of a refresh, which shows servers that watch that the owner is alive, or has left.
pub fn append_beat(out: &mut Vec<u8>, key: &[u8], beat: u64, released: bool) {
    let (beat, released) = (beat.to_string(), if released { "1" } else { "0" });
    append_command(
        out,
        &[b"HSET", key, b"beat", beat.as_bytes(), b"released", released.as_bytes()],
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    #[test]
    fn no_fields_mean_no_guard_and_missing_fields_an_error() {
        assert!(Guard::parse(&[]).unwrap().is_none());
        let half = [b"token".as_slice(), b"place"].map(|field| (field, b"t".as_slice()));
        assert!(Guard::parse(&half[..1]).unwrap().is_none(), "a token alone");
        assert!(Guard::parse(&half).is_err());
    }

    /// Whether a guard with this value in one field is readable.
    fn is_readable(name: &str, value: &str) -> bool {
        let mut fields: [(&str, &str); 16] = samples::GUARD;
        fields
            .iter_mut()
            .filter(|(field, _)| *field == name)
            .for_each(|(_, v)| *v = value);
        let fields = fields.map(|(field, value)| (field.as_bytes(), value.as_bytes()));
        Guard::parse(&fields).is_ok()
    }

    #[test]
    fn absurd_fields_are_not_believed() {
        assert!(is_readable("number", &i64::MAX.to_string()));
        // Transactions began and ended between the two readings of its tick.
        assert!(is_readable("position", "10:20:10,14/19/7/9"));
        for (name, value) in [
            ("number", "9223372036854775808"),
            ("number", "18446744073709551615"),
            ("interval_ms", "18446744073709551615"),
            ("interval_ms", "1"),
            ("wal", "18446744073709551615"),
            ("total", "9223372036854775807"),
            ("total", "-1"),
            // Such transaction ids cannot occur in a snapshot of Postgres.
            ("position", "0:20:/25/7/9"),
            ("position", "4294967296:4294967299:/4294967300/7/9"),
            (
                "previous",
                "10:20:10/25/7/9>30:18446744069414584320:/18446744073709551615/12/14@11",
            ),
        ] {
            assert!(!is_readable(name, value), "{name} {value}");
        }
    }

    #[test]
    fn positions_survive_their_text_form() {
        for text in ["3:3:/3/0/0", "10:20:10,14/25/7/9", "10:20:10/25/7/9>30:30:/31/12/14@11"] {
            assert_eq!(text.parse::<Position>().unwrap().to_string(), text);
        }
        for text in ["", "3:3:", "3:3:/3/0", "3:3:/3/0/0>3:3:/3/0/0", "3:3:/3/0/x"] {
            assert!(text.parse::<Position>().is_err(), "{text:?}");
        }
    }
}
