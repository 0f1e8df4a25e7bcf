//! Snapshots and ticks: what a reader of committed rows had seen at one time.

use std::fmt;
use std::str::FromStr;
use thiserror::Error;

/// The first transaction id that a cluster gives to a transaction (0 to 2 are reserved).
pub const FIRST_NORMAL_XID: u64 = 3;

/// Which transactions had committed or aborted at one time, with 64-bit ids. Meaning and text form
/// (`xmin:xmax:xip,...`) are those of Postgres's `pg_snapshot`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    xmin: u64,
    xmax: u64,
    /// Sorted; all are in `[xmin, xmax)`.
    in_progress: Box<[u64]>,
}

#[derive(Debug, Error, PartialEq, Eq)]
#[error("not a snapshot: {0:?}")]
pub struct ParseSnapshotError(String);

impl ParseSnapshotError {
    /// The text may come from a server and have any length.
    pub(crate) fn of(text: &str) -> Self {
        Self(text.chars().take(100).collect())
    }
}

impl Snapshot {
    pub fn new(xmin: u64, xmax: u64, mut in_progress: Vec<u64>) -> Self {
        in_progress.sort_unstable();
        in_progress.dedup();
        Self {
            xmin,
            xmax,
            in_progress: in_progress.into_boxed_slice(),
        }
    }

    /// The snapshot before any transaction.
    pub fn beginning() -> Self {
        Self::new(FIRST_NORMAL_XID, FIRST_NORMAL_XID, Vec::new())
    }

    /// Whether transaction `xid` had ended when the snapshot was taken. (An aborted one counts as seen; its rows are
    /// never visible anyway.)
    pub fn sees(&self, xid: u64) -> bool {
        xid < self.xmin || (xid < self.xmax && self.in_progress.binary_search(&xid).is_err())
    }

    /// Whether it sees everything that `other` sees.
    pub fn includes(&self, other: &Self) -> bool {
        self.xmin >= other.xmin && self.xmax >= other.xmax && self.in_progress.iter().all(|xid| !other.sees(*xid))
    }

    /// The transactions that ended after `earlier` was taken, in order of their ids; `None`: there are more than
    /// `most`, or it is not earlier.
    pub fn ended_since(&self, earlier: &Self, most: usize) -> Option<Vec<u64>> {
        let given = self.xmax.checked_sub(earlier.xmax)?;
        if given + earlier.in_progress.len() as u64 > most as u64 {
            return None;
        }
        let candidates = earlier.in_progress.iter().copied().chain(earlier.xmax..self.xmax);
        Some(candidates.filter(|xid| self.sees(*xid)).collect())
    }

    /// Every transaction with a lower id had ended.
    pub fn xmin(&self) -> u64 {
        self.xmin
    }

    /// No transaction with this id or a higher one had ended.
    pub fn xmax(&self) -> u64 {
        self.xmax
    }

    /// The top-level transactions below `xmax` that were still running.
    pub fn in_progress(&self) -> &[u64] {
        &self.in_progress
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.xmin, self.xmax)?;
        for (i, xid) in self.in_progress.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            write!(f, "{xid}")?;
        }
        Ok(())
    }
}

impl FromStr for Snapshot {
    type Err = ParseSnapshotError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseSnapshotError::of(text);
        let mut parts = text.splitn(3, ':');
        let mut bound = || parts.next().and_then(|p| p.parse::<u64>().ok());
        let (xmin, xmax) = (bound().ok_or_else(bad)?, bound().ok_or_else(bad)?);
        let list = parts.next().ok_or_else(bad)?;
        if xmin > xmax {
            return Err(bad());
        }
        let mut in_progress = Vec::new();
        // Ascending, as it is written. Otherwise a short text could stand for many ids.
        let mut lowest = xmin;
        for xid in list.split(',').filter(|x| !x.is_empty()) {
            let xid = xid.parse::<u64>().map_err(|_| bad())?;
            if xid < lowest || xid >= xmax {
                return Err(bad());
            }
            lowest = xid + 1;
            in_progress.push(xid);
        }
        Ok(Self::new(xmin, xmax, in_progress))
    }
}

/// A recorded snapshot, with bounds that make reading up to it and from it cheap.
///
/// A publisher draws its transaction id first and its sequence number second. So if the four values are read in the
/// order `low_seq`, `next_xid`, `snapshot`, `high_seq`, then:
/// * a transaction with `xid >= next_xid` has only numbers above `low_seq`;
/// * a row that `snapshot` sees has a number of at most `high_seq`.
///
/// The two numbers are not those of the sequence, which anybody may set back, but the highest that an event has got
/// (see [`crate::reading::numbers`]).
///
/// Note that `snapshot.xmax()` is the latest *ended* transaction + 1: those in `[xmax, next_xid)` were running too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tick {
    pub snapshot: Snapshot,
    pub next_xid: u64,
    pub low_seq: i64,
    pub high_seq: i64,
}

/// Writes its snapshot, `next_xid`, `low_seq` and `high_seq`, separated by slashes.
impl fmt::Display for Tick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            snapshot,
            next_xid,
            low_seq,
            high_seq,
        } = self;
        write!(f, "{snapshot}/{next_xid}/{low_seq}/{high_seq}")
    }
}

impl FromStr for Tick {
    type Err = ParseSnapshotError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseSnapshotError::of(text);
        let parts: Vec<&str> = text.split('/').take(5).collect();
        let [snapshot, next_xid, low_seq, high_seq] = parts.as_slice() else {
            return Err(bad());
        };
        Ok(Self {
            snapshot: snapshot.parse()?,
            next_xid: next_xid.parse().map_err(|_| bad())?,
            low_seq: low_seq.parse().map_err(|_| bad())?,
            high_seq: high_seq.parse().map_err(|_| bad())?,
        })
    }
}

impl Tick {
    /// The tick before any transaction.
    pub fn beginning() -> Self {
        Self {
            snapshot: Snapshot::beginning(),
            next_xid: FIRST_NORMAL_XID,
            low_seq: 0,
            high_seq: 0,
        }
    }

    /// Whether it is before any transaction.
    pub fn is_beginning(&self) -> bool {
        self.next_xid <= FIRST_NORMAL_XID
    }

    /// Whether such a tick is possible. The lower half of a 64-bit id is never zero. (The snapshot may be ahead of
    /// `next_xid`, because that is read first.)
    pub fn is_possible(&self) -> bool {
        let is_id = |xid: u64| xid as u32 != 0 && xid <= i64::MAX as u64;
        let Snapshot { xmin, xmax, .. } = self.snapshot;
        let are_numbers = 0 <= self.low_seq && self.low_seq <= self.high_seq && self.high_seq < i64::MAX;
        is_id(xmin) && is_id(xmax) && is_id(self.next_xid) && are_numbers
    }

    /// The tick for the case that later transactions certainly have only numbers above `seq`, but perhaps not above
    /// `low_seq`.
    pub fn lowered_to(&self, seq: i64) -> Self {
        Self {
            low_seq: self.low_seq.min(seq),
            ..self.clone()
        }
    }

    /// Whether it sees every transaction that had begun: as long as no other begins, a later tick sees nothing new.
    pub fn is_complete(&self) -> bool {
        self.snapshot.in_progress.is_empty() && self.snapshot.xmax == self.next_xid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_sees_ended_transactions() {
        let s: Snapshot = "10:20:10,14,15".parse().unwrap();
        for (xid, seen) in [(9, true), (10, false), (11, true), (14, false), (19, true), (20, false)] {
            assert_eq!(s.sees(xid), seen, "{xid}");
        }
    }

    #[test]
    fn a_snapshot_tells_which_transactions_ended_since_another() {
        let earlier: Snapshot = "10:20:10,14,15".parse().unwrap();
        let later: Snapshot = "14:24:14,22".parse().unwrap();
        assert_eq!(later.ended_since(&earlier, 7), Some(vec![10, 15, 20, 21, 23]));
        assert_eq!(later.ended_since(&earlier, 6), None);
        assert_eq!(later.ended_since(&later, 64), Some(vec![]));
        assert_eq!(earlier.ended_since(&later, 64), None);
    }

    #[test]
    fn a_tick_is_complete_when_nothing_was_running() {
        for (text, complete) in [
            ("20:20:/20/1/2", true),
            ("19:20:19/20/1/2", false),
            ("20:20:/21/1/2", false),
        ] {
            assert_eq!(text.parse::<Tick>().unwrap().is_complete(), complete, "{text}");
        }
    }

    #[test]
    fn the_text_form_is_that_of_postgres() {
        for text in ["10:20:10,14,15", "3:3:", "7:9:8"] {
            assert_eq!(text.parse::<Snapshot>().unwrap().to_string(), text);
        }
        for text in ["", "1:2", "2:1:", "1:5:9", "a:b:", "1:2:x", "1:9:3,3", "1:9:4,3"] {
            assert!(text.parse::<Snapshot>().is_err(), "{text:?}");
        }
    }
}
