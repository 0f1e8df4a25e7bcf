//! What Redis reports about a stream and its consumer groups.

use crate::failure::Failure;
use crate::failure::server_text::shown;
use crate::fault::{self, Mutation};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// How many groups of a stream are examined.
pub const MOST_GROUPS: usize = 100;
/// How many groups of all streams are examined in one survey: each has a row that is written. The streams beyond that
/// are asked about next.
pub const MOST_GROUPS_AT_ONCE: usize = 2_000;

/// The id of an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct EntryId {
    /// By Redis's clock, in milliseconds since 1970.
    pub ms: u64,
    pub seq: u64,
}

impl EntryId {
    /// An id before all others.
    pub const FIRST: Self = Self { ms: 0, seq: 0 };
}

impl FromStr for EntryId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (ms, seq) = text.split_once('-').ok_or(())?;
        let number = |digits: &str| match digits.bytes().all(|b| b.is_ascii_digit()) {
            true => digits.parse().map_err(|_| ()),
            false => Err(()),
        };
        Ok(Self {
            ms: number(ms)?,
            seq: number(seq)?,
        })
    }
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.seq)
    }
}

/// The name of a group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum GroupName {
    Known(Vec<u8>),
    /// The name has this many bytes, and was not kept. Nothing can be asked about this group.
    TooLong(u64),
}

/// In a form that can be shown.
impl fmt::Display for GroupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(name) => f.write_str(&shown(&String::from_utf8_lossy(name))),
            Self::TooLong(bytes) => write!(f, "(a name of {bytes} bytes)"),
        }
    }
}

/// A consumer group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub name: GroupName,
    pub consumers: i64,
    /// Entries that were delivered and not acknowledged.
    pub pending: i64,
    /// Entries that were not delivered, as Redis counts them. Redis counts them only from 7.0 on, and not always.
    pub lag: Option<i64>,
    pub last_delivered: EntryId,
    /// The oldest of the pending entries.
    pub oldest_pending: Option<EntryId>,
    /// How long all consumers have been silent. `None`: there is no consumer, or Redis was not asked.
    pub idle: Option<Duration>,
}

impl Group {
    /// Everything before this entry is acknowledged. The entry itself may be acknowledged or not.
    pub fn acknowledged(&self) -> EntryId {
        match self.oldest_pending {
            _ if fault::is_mutated(Mutation::TrimUnread) => self.last_delivered,
            Some(oldest) => oldest.min(self.last_delivered),
            None if self.pending == 0 => self.last_delivered,
            // It is not known which entries are pending.
            None => EntryId::FIRST,
        }
    }

    /// How many entries of a stream of this length were not delivered, if that can be told.
    pub fn unread(&self, length: i64) -> Option<i64> {
        match self.lag {
            Some(lag) => Some(lag.max(0)),
            None if length == 0 => Some(0),
            None if self.last_delivered == EntryId::FIRST => Some(length),
            None => None,
        }
    }
}

/// The answers of a survey about one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Surveyed {
    pub stream: Arc<str>,
    pub length: i64,
    /// The highest id that an entry of it had when it was surveyed: entries that are added later have higher ones.
    /// `None`: Redis was not asked, or there is no such stream.
    pub last: Option<EntryId>,
    pub groups: Vec<Group>,
    /// Whether it has groups beyond [`MOST_GROUPS`].
    pub has_more_groups: bool,
    /// Why Redis could not be asked about it.
    pub failure: Option<Failure>,
    /// Whether it was trimmed as requested.
    pub is_trimmed: bool,
    /// Why it could not be trimmed.
    pub untrimmed: Option<Failure>,
}

impl Surveyed {
    pub fn of(stream: Arc<str>) -> Self {
        Self {
            stream,
            length: 0,
            last: None,
            groups: Vec::new(),
            has_more_groups: false,
            failure: None,
            is_trimmed: false,
            untrimmed: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_compare_as_numbers() {
        let id = |text: &str| text.parse::<EntryId>();
        assert!(id("9-1").unwrap() < id("10-0").unwrap());
        assert!(id("10-9").unwrap() < id("10-10").unwrap());
        assert_eq!(
            id("18446744073709551615-1").unwrap().to_string(),
            "18446744073709551615-1"
        );
        for text in [
            "",
            "1",
            "-",
            "1-",
            "-1",
            "+1-1",
            "1-+1",
            "1-1-1",
            "18446744073709551616-0",
        ] {
            assert!(id(text).is_err(), "{text:?}");
        }
    }
}
