//! Reads the answer to CLUSTER SLOTS, piece by piece: a cluster whose hash slots were moved often has thousands of
//! ranges, and each lane asks.
//!
//! Source: CLUSTER SLOTS (redis.io/docs/latest/commands/cluster-slots).

use crate::failure::{Failure, Trouble};
use crate::redis::answers::host_in;
use crate::redis::destination::Address;
use crate::resp::place::Place;
use crate::resp::read::{Piece, Reply};

/// Hash slots that one master serves.
#[derive(Debug)]
pub struct Range {
    pub hash_slots: std::ops::RangeInclusive<u16>,
    /// An error: what the server reports is not an address.
    pub master: Result<Address, Failure>,
}

/// An answer that is being read: ranges, each `[first, last, [host, port, ...] of the master, ...]`. An empty host
/// means the node that was asked.
pub struct Ranges<'a> {
    asked: &'a Address,
    /// `None`: nothing was read so far.
    place: Option<Place>,
    is_over: bool,
    range: Parts,
}

/// What was read of a range.
#[derive(Default)]
struct Parts {
    first: Option<u16>,
    last: Option<u16>,
    host: Option<Result<String, Failure>>,
    port: Option<u16>,
}

impl<'a> Ranges<'a> {
    /// The answer of this node.
    pub fn of(asked: &'a Address) -> Self {
        Self {
            asked,
            place: None,
            is_over: false,
            range: Parts::default(),
        }
    }

    /// Whether the answer was read completely.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Takes the next piece of the answer. Returns the range that ends with it.
    pub fn take(&mut self, piece: Piece<'_>) -> Result<Option<Range>, Failure> {
        let Some(place) = &mut self.place else {
            let Piece::Array(items) = piece else {
                return Err(no_cluster());
            };
            self.is_over = items == 0;
            self.place = Some(Place::of(items));
            return Ok(None);
        };
        let is_within = place.depth() > 1;
        let (of_range, of_node) = (place.index(2), place.index(3));
        match (place.depth(), of_range, piece) {
            (1, _, Piece::Array(3..)) => self.range = Parts::default(),
            (2, 0, piece) => self.range.first = number(piece),
            (2, 1, piece) => self.range.last = number(piece),
            (2, 2, Piece::Array(_)) | (2, 3.., _) => {}
            (1 | 2, ..) => return Err(no_cluster()),
            (3, 2, piece) if of_node == 0 => self.range.host = host(piece, self.asked),
            (3, 2, piece) if of_node == 1 => self.range.port = number(piece),
            // Others of the master's node, and replicas.
            _ => {}
        }
        self.is_over = place.pass(piece);
        match is_within && place.depth() <= 1 {
            true => std::mem::take(&mut self.range).whole().map(Some).ok_or_else(no_cluster),
            false => Ok(None),
        }
    }
}

impl Parts {
    fn whole(self) -> Option<Range> {
        let (host, port) = (self.host?, self.port?);
        Some(Range {
            hash_slots: self.first?..=self.last?,
            master: host.map(|host| Address::Tcp { host, port }),
        })
    }
}

fn number(piece: Piece<'_>) -> Option<u16> {
    match piece {
        Piece::Line(line) => u16::try_from(Reply::new(line).number()?).ok(),
        Piece::Array(_) | Piece::String { .. } => None,
    }
}

/// The host of a node, or why it is none; `None`: this is not the place of a host.
fn host(piece: Piece<'_>, asked: &Address) -> Option<Result<String, Failure>> {
    let (told, size) = match piece {
        Piece::String { size, text, start } => (text.unwrap_or(start), size),
        Piece::Line(line) if Reply::new(line).is_nil() => (b"".as_slice(), 0),
        Piece::Line(_) | Piece::Array(_) => return None,
    };
    Some(match (told, asked) {
        (b"" | b"?", Address::Tcp { host, .. }) => Ok(host.clone()),
        _ => host_in(told, size),
    })
}

fn no_cluster() -> Failure {
    Failure::of(
        Trouble::NodeRefuses,
        "unexpected reply: the server is not a node of a cluster",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resp::bounds::Bounds;
    use crate::resp::read::Inbox;

    /// The ranges of an answer that arrives in parts of `size` bytes.
    fn ranges_in_parts(answer: &[u8], size: usize) -> Result<Vec<Range>, Failure> {
        let asked = Address::of_node("here:7").unwrap();
        let (mut ranges, mut inbox, mut found) = (Ranges::of(&asked), Inbox::default(), Vec::new());
        for part in answer.chunks(size) {
            inbox.receive(part);
            while let Some(taken) = inbox.take(&Bounds::SLOTS)? {
                for piece in inbox.reply(taken).pieces() {
                    found.extend(ranges.take(piece)?);
                }
            }
        }
        assert!(ranges.is_over());
        Ok(found)
    }

    fn ranges(answer: &str) -> Result<Vec<Range>, Failure> {
        ranges_in_parts(answer.as_bytes(), usize::MAX)
    }

    fn range(first: i64, last: i64, host: &str, port: i64) -> String {
        let replica = "*2\r\n$8\r\n10.0.0.9\r\n:1\r\n";
        format!(
            "*4\r\n:{first}\r\n:{last}\r\n*4\r\n{host}\r\n:{port}\r\n$2\r\nid\r\n*1\r\n*2\r\n$1\r\na\r\n$1\r\nb\r\n{replica}"
        )
    }

    #[test]
    fn ranges_have_masters_whose_host_may_be_the_one_asked() {
        let answer = [
            "*3\r\n".to_owned(),
            range(0, 5, "$8\r\n10.0.0.1", 1),
            range(6, 6, "$-1", 2),
            range(7, 16_383, "$1\r\n?", 3),
        ]
        .concat();
        let expected = [(5, "10.0.0.1:1"), (6, "here:2"), (16_383, "here:3")].map(|(end, m)| (end, m.to_owned()));
        for size in [1, 7, usize::MAX] {
            let found = ranges_in_parts(answer.as_bytes(), size).unwrap();
            let found: Vec<_> = found
                .iter()
                .map(|r| (*r.hash_slots.end(), r.master.as_ref().unwrap().to_string()))
                .collect();
            assert_eq!(found, expected, "{size}");
        }
        assert!(ranges("*0\r\n").unwrap().is_empty());
    }

    #[test]
    fn an_answer_of_another_form_is_not_of_a_cluster() {
        for nonsense in [
            "$-1\r\n".to_owned(),
            "*1\r\n:1\r\n".to_owned(),
            "*1\r\n*0\r\n".to_owned(),
            "*1\r\n*1\r\n:1\r\n".to_owned(),
            "*1\r\n*3\r\n:1\r\n:1\r\n:1\r\n".to_owned(),
            "*1\r\n*3\r\n:1\r\n:1\r\n*0\r\n".to_owned(),
            "*1\r\n*3\r\n:1\r\n:1\r\n*1\r\n$1\r\na\r\n".to_owned(),
            "*1\r\n*3\r\n:1\r\n*1\r\n:1\r\n*2\r\n$1\r\na\r\n:1\r\n".to_owned(),
            format!("*1\r\n{}", range(-1, 5, "$1\r\na", 1)),
            format!("*1\r\n{}", range(0, 5, "$1\r\na", 70_000)),
            format!("*1\r\n{}", range(0, 5, ":1", 1)),
        ] {
            assert!(ranges(&nonsense).is_err(), "{nonsense:?}");
        }
    }

    #[test]
    fn an_invalid_host_is_not_an_address() {
        let [longest, long, longer] = [253, 254, 5_000].map(|length| "a".repeat(length));
        for (host, is_one) in [
            ("", true),
            (&longest, true),
            ("a b", false),
            ("a\r\nb", false),
            ("a\0", false),
            (&long, false),
            (&longer, false),
        ] {
            let answer = format!("*1\r\n*3\r\n:0\r\n:5\r\n*2\r\n${}\r\n{host}\r\n:1\r\n", host.len());
            let found = ranges(&answer).unwrap();
            assert_eq!(found[0].master.is_ok(), is_one, "{host:?}");
            if let Err(failure) = &found[0].master {
                let size = format!("({} bytes)", host.len());
                assert!(failure.message.contains(&size), "{failure}");
            }
        }
    }

    /// Each hash slot alone, with a master and four replicas that have names.
    #[test]
    fn a_cluster_in_pieces_is_understood() {
        let node = format!(
            "*4\r\n$8\r\n10.0.0.1\r\n:6379\r\n$40\r\n{}\r\n*2\r\n$8\r\nhostname\r\n$20\r\n{}\r\n",
            "0".repeat(40),
            "n".repeat(20)
        );
        let ranges_of = |slot: u32| format!("*7\r\n:{slot}\r\n:{slot}\r\n{}", node.repeat(5));
        let all: Vec<String> = (0..16_384).map(ranges_of).collect();
        let answer = format!("*16384\r\n{}", all.concat());
        let found = ranges_in_parts(answer.as_bytes(), 10_000).unwrap();
        assert_eq!(found.len(), 16_384, "of {} bytes", answer.len());
    }
}
