//! Reads the rows that committed between two ticks, once each, in publishing order. The cost depends only on the new
//! rows.
//!
//! This is the method of PgQ (two snapshots instead of a status column) without its ticker. A row belongs to the range
//! from tick C to tick S if S sees its transaction and C does not. Such rows are of two kinds:
//! * *new*: sequence numbers above `C.low_seq`; found in one pass over the sequence;
//! * *late*: sequence numbers up to `C.low_seq`, published by a transaction that was still running at C; found by
//!   transaction id, one probe for each that was running at C and has ended by S.
//!
//! All late rows come before all new ones, so that one number, the last sequence number read, is the reader's place
//! within a range of any size.

use crate::fault::{self, Mutation};
use crate::reading::snapshot::{ParseSnapshotError, Tick};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The place of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    pub xid: u64,
    pub seq: i64,
}

/// One step of a scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A row.
    Row(Key),
    /// Rows up to this number were met that are not wanted: they are of other backends, or not of the range. They cost
    /// time too.
    Passed(i64),
}

impl Step {
    /// How far the scan has come.
    pub fn seq(self) -> i64 {
        match self {
            Self::Row(key) => key.seq,
            Self::Passed(seq) => seq,
        }
    }

    pub fn row(self) -> Option<Key> {
        match self {
            Self::Row(key) => Some(key),
            Self::Passed(_) => None,
        }
    }
}

/// An open scan, in ascending order of `seq`.
pub trait Scan {
    /// Moves on; `None` at the end, and then for ever.
    fn advance(&mut self) -> Option<Step>;
}

/// The table of events as the reader needs it: committed rows only.
pub trait Table {
    type Scan: Scan;
    /// Rows with `after < seq <= upto`.
    fn by_seq(&mut self, after: i64, upto: i64) -> Self::Scan;
    /// Rows of one transaction with `after < seq <= upto`.
    fn by_xid(&mut self, xid: u64, after: i64, upto: i64) -> Self::Scan;
    /// The lowest transaction id in `[from, before)` that has a row.
    fn first_xid(&mut self, from: u64, before: u64) -> Option<u64>;
}

/// The position of a reader: it has everything that `from` sees and, when it is on its way to `to`, the rows of that
/// range up to `last_seq`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    pub from: Arc<Tick>,
    pub under_way: Option<UnderWay>,
}

/// The way from one tick to the next, in progress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnderWay {
    pub to: Arc<Tick>,
    pub last_seq: i64,
}

impl Position {
    /// The position that has everything up to `tick` and nothing after it.
    pub fn at(tick: Arc<Tick>) -> Self {
        Self {
            from: tick,
            under_way: None,
        }
    }

    /// Before any transaction.
    pub fn beginning() -> Self {
        Self::at(Arc::new(Tick::beginning()))
    }

    /// On the way to `to`, having read the rows up to `last_seq`.
    pub fn towards(from: Arc<Tick>, to: Arc<Tick>, last_seq: i64) -> Self {
        Self {
            from,
            under_way: Some(UnderWay { to, last_seq }),
        }
    }

    /// The ticks that it contains.
    pub fn ticks(&self) -> impl Iterator<Item = &Arc<Tick>> {
        [&self.from].into_iter().chain(self.under_way.as_ref().map(|u| &u.to))
    }

    /// The same position, with other bounds in its ticks.
    pub fn with_ticks(&self, mut f: impl FnMut(&Arc<Tick>) -> Arc<Tick>) -> Self {
        let from = f(&self.from);
        match &self.under_way {
            None => Self::at(from),
            Some(UnderWay { to, last_seq }) => Self::towards(from, f(to), *last_seq),
        }
    }

    /// Whether a row has been read.
    pub fn covers(&self, key: Key) -> bool {
        self.from.snapshot.sees(key.xid)
            || self
                .under_way
                .as_ref()
                .is_some_and(|u| u.to.snapshot.sees(key.xid) && key.seq <= u.last_seq)
    }

    /// Whether it covers everything that `other` covers. (A position on its way is judged by where its way began.)
    pub fn includes(&self, other: &Self) -> bool {
        self.from.snapshot.includes(&other.newest().snapshot)
    }

    /// Whether such a position is possible.
    pub fn is_possible(&self) -> bool {
        let can_be = |u: &UnderWay| u.to.is_possible() && (0..i64::MAX).contains(&u.last_seq);
        self.from.is_possible() && self.under_way.as_ref().is_none_or(can_be)
    }

    /// The newest tick that it contains.
    pub fn newest(&self) -> &Arc<Tick> {
        self.under_way.as_ref().map_or(&self.from, |u| &u.to)
    }

    /// Whether two readers stand at the same place.
    pub fn same_place(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.from, &other.from)
            && match (&self.under_way, &other.under_way) {
                (None, None) => true,
                (Some(a), Some(b)) => Arc::ptr_eq(&a.to, &b.to) && a.last_seq == b.last_seq,
                _ => false,
            }
    }

    /// The last row of its range that was read; 0 before the first.
    pub fn last_seq(&self) -> i64 {
        self.under_way.as_ref().map_or(0, |u| u.last_seq)
    }

    /// The tick that it reads to. A position that is not on its way goes to `latest`.
    pub fn to<'a>(&'a self, latest: &'a Arc<Tick>) -> &'a Arc<Tick> {
        self.under_way.as_ref().map_or(latest, |u| &u.to)
    }

    /// Whether there may still be late rows ahead.
    pub fn is_among_late(&self) -> bool {
        self.last_seq() < self.from.low_seq
    }

    /// The number that it has reached, apart from late rows. It measures how far apart readers of the same goal are.
    pub fn place(&self) -> i64 {
        self.last_seq().max(self.from.low_seq)
    }

    /// Uses the other's ticks where its own are equal, so that one scan serves both. Returns whether one scan does.
    pub fn share(&mut self, other: &Self) -> bool {
        let same = |ours: &mut Arc<Tick>, theirs: &Arc<Tick>| {
            let is_equal = !Arc::ptr_eq(ours, theirs) && *ours == *theirs;
            if is_equal {
                *ours = theirs.clone();
            }
            is_equal
        };
        let mut shares = same(&mut self.from, &other.from);
        if let (Some(ours), Some(theirs)) = (&mut self.under_way, &other.under_way) {
            shares |= same(&mut ours.to, &theirs.to);
        }
        shares
    }
}

/// Writes a tick, or `tick>tick@seq` on the way from one to the next.
impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.from)?;
        match &self.under_way {
            Some(UnderWay { to, last_seq }) => write!(f, ">{to}@{last_seq}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Position {
    type Err = ParseSnapshotError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some((from, rest)) = text.split_once('>') else {
            return Ok(Self::at(Arc::new(text.parse()?)));
        };
        let bad = || ParseSnapshotError::of(text);
        let (to, last_seq) = rest.split_once('@').ok_or_else(bad)?;
        let last_seq = last_seq.parse().map_err(|_| bad())?;
        Ok(Self::towards(Arc::new(from.parse()?), Arc::new(to.parse()?), last_seq))
    }
}

/// The rows from a position to its next tick, in publishing order.
pub struct RangeScan<S> {
    from: Arc<Tick>,
    to: Arc<Tick>,
    /// With the steps that they have come to.
    late: Vec<(Step, S)>,
    new: S,
    /// The index in `late` that the current row came from; `None`: it came from `new`.
    current: Option<usize>,
}

impl<S: Scan> RangeScan<S> {
    /// Opens the scan of what `to` sees and `from` does not see, after `last_seq` (0 at the start of the range).
    pub fn open<T: Table<Scan = S>>(table: &mut T, from: &Arc<Tick>, to: &Arc<Tick>, last_seq: i64) -> Self {
        let mut late = Vec::new();
        let by_seq_alone = fault::is_mutated(Mutation::SeqAfterLast);
        if last_seq < from.low_seq && !by_seq_alone {
            for xid in late_xids(table, from, to) {
                let mut scan = table.by_xid(xid, last_seq, from.low_seq);
                if let Some(step) = scan.advance() {
                    late.push((step, scan));
                }
            }
        }
        Self {
            from: from.clone(),
            to: to.clone(),
            late,
            new: match by_seq_alone {
                true => table.by_seq(last_seq.max(from.high_seq), to.high_seq),
                false => table.by_seq(last_seq.max(from.low_seq), to.high_seq),
            },
            current: None,
        }
    }

    /// The next row, or `None` at the end of the range.
    pub fn step(&mut self) -> Option<Step> {
        if let Some(index) = self.current.take() {
            match self.late[index].1.advance() {
                Some(step) => self.late[index].0 = step,
                None => drop(self.late.swap_remove(index)),
            }
        }
        let lowest = self.late.iter().enumerate().min_by_key(|(_, (step, _))| step.seq());
        if let Some((index, (step, _))) = lowest {
            self.current = Some(index);
            return Some(*step);
        }
        let is_of_range = |xid| self.to.snapshot.sees(xid) && !self.from.snapshot.sees(xid);
        Some(match self.new.advance()? {
            Step::Row(key) if !is_of_range(key.xid) => Step::Passed(key.seq),
            step => step,
        })
    }

    /// The scan that stands at the row of the last step.
    pub fn current(&self) -> &S {
        self.current.map_or(&self.new, |index| &self.late[index].1)
    }
}

/// Transactions that were running at `from` and have ended by `to`. Those below `from.snapshot.xmax()` are listed
/// there. Those from it up to `from.next_xid` are looked up in the index, from one that has rows to the next.
fn late_xids<T: Table>(table: &mut T, from: &Tick, to: &Tick) -> Vec<u64> {
    let ended = |xid: &u64| to.snapshot.sees(*xid);
    let mut xids: Vec<u64> = from.snapshot.in_progress().iter().copied().filter(ended).collect();
    let mut next = from.snapshot.xmax();
    while let Some(xid) = table.first_xid(next, from.next_xid.min(to.snapshot.xmax())) {
        if ended(&xid) {
            xids.push(xid);
        }
        next = xid + 1;
    }
    xids
}
