//! Which readers read next, and which of them share a scan.
//!
//! A reader reads when there may be rows for it and it can take them. One scan costs the same for one reader as for
//! many, so readers with the same goal are kept together: one that is ahead waits for those behind it. It waits only
//! while its own sender has enough to do, so a slow or hung reader delays nobody.
//!
//! All functions are pure. The worker passes what it knows about its readers, by their indexes, and reads accordingly.

use crate::reading::range::Position;
use crate::reading::role::Role;
use crate::reading::snapshot::{FIRST_NORMAL_XID, Tick};
use std::sync::Arc;

/// How many rows one scan may meet for each reader that it serves, before the senders are looked at again.
pub const SCAN_STEPS: usize = 2_000;
/// One scan serves readers that are no further apart than this: half of a scan, so that the readers that are ahead use
/// the other half.
const NEAR_SEQS: i64 = SCAN_STEPS as i64 / 2;
/// Nobody waits for a reader that is further behind than this.
const WAITED_FOR_SEQS: i64 = 100_000;

/// Where a reader stands, and where it goes.
#[derive(Clone, Copy)]
pub struct Way<'a> {
    pub position: &'a Position,
    pub goal: &'a Arc<Tick>,
    pub role: Role,
}

impl Way<'_> {
    /// Whether there may be rows ahead. Before the first tick there is nowhere to go.
    pub fn leads_on(&self) -> bool {
        let is_ticked = self.goal.next_xid > FIRST_NORMAL_XID;
        self.position.under_way.is_some() || (is_ticked && !Arc::ptr_eq(&self.position.from, self.goal))
    }

    fn priority(&self) -> Priority {
        match self.goal.high_seq - self.position.place() <= NEAR_SEQS {
            true => Priority::Short,
            false if self.role != Role::Strays => Priority::Long,
            false => Priority::LooksAtAll,
        }
    }
}

/// Which scans come first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Priority {
    /// A reader with a short way does not wait for one with a long way,
    Short,
    Long,
    /// and nobody waits for the reader that has to look at each row.
    LooksAtAll,
}

/// How much work a sender has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Supply {
    /// It could run out of work, so its reader does not wait for other readers.
    Low,
    /// It has enough work, and there is ample room for more.
    Enough,
    /// There is so little room that a scan would not be worthwhile.
    Full,
}

/// What is known about a reader that has somewhere to go.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    pub index: usize,
    pub way: Way<'a>,
    /// Rows can be read for it now: it is enabled, it has room, and reading for it has not just failed.
    pub is_ready: bool,
    /// It is connected and healthy. If it cannot take rows now, it soon can, so others may wait for it.
    pub is_well: bool,
    /// The supply of its sender, if its role has one.
    pub supply: Supply,
}

impl Reader<'_> {
    /// Whether a scan is worthwhile: it takes rows, and not only a few.
    fn takes(&self) -> bool {
        self.is_ready && (self.way.role != Role::Redis || self.supply != Supply::Full)
    }

    /// Whether it can wait for those behind it.
    fn can_wait(&self) -> bool {
        match self.way.role {
            Role::Redis => self.supply != Supply::Low,
            // The first event of a hash slot without a lane must not wait behind a slow lane.
            Role::Finder => false,
            Role::Deleted | Role::Strays => true,
        }
    }

    fn goal(&self) -> usize {
        Arc::as_ptr(self.way.goal).addr()
    }
}

/// A reader that others wait for. Ordered by goal and place.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct WaitedFor {
    goal: usize,
    place: i64,
    takes: bool,
}

/// Which readers read now, and which wait.
pub struct Schedule<'a> {
    /// In the order of their indexes.
    readers: Vec<Reader<'a>>,
    /// In order. Empty if no reader can wait.
    waited_for: Vec<WaitedFor>,
}

impl<'a> Schedule<'a> {
    /// `readers`: those that have somewhere to go, in the order of their indexes. This costs no more than sorting them.
    pub fn of(readers: impl Iterator<Item = Reader<'a>>) -> Self {
        let readers: Vec<Reader<'a>> = readers.filter(|reader| reader.way.leads_on()).collect();
        let mut waited_for = Vec::new();
        if readers.iter().any(|reader| reader.takes() && reader.can_wait()) {
            let well = readers.iter().filter(|reader| reader.is_well);
            waited_for.extend(well.map(|r| WaitedFor {
                goal: r.goal(),
                place: r.way.position.place(),
                takes: r.takes(),
            }));
            waited_for.sort_unstable();
        }
        Self { readers, waited_for }
    }

    /// The indexes of the readers that read now.
    pub fn reading(&self) -> impl Iterator<Item = usize> {
        let reading = self.readers.iter().filter(|reader| self.is_next(reader));
        reading.map(|reader| reader.index)
    }

    /// Whether this reader reads now.
    pub fn reads(&self, index: usize) -> bool {
        let found = self.readers.binary_search_by_key(&index, |reader| reader.index);
        found.is_ok_and(|found| self.is_next(&self.readers[found]))
    }

    fn is_next(&self, reader: &Reader<'_>) -> bool {
        reader.takes() && !(reader.can_wait() && self.is_held(reader))
    }

    /// Whether a reader with the same goal is a little behind it, or stands at the same place and cannot take rows yet.
    fn is_held(&self, reader: &Reader<'_>) -> bool {
        let (goal, place) = (reader.goal(), reader.way.position.place());
        let first = WaitedFor {
            goal,
            place: place.saturating_sub(WAITED_FOR_SEQS),
            takes: false,
        };
        let lowest = self.waited_for.partition_point(|other| *other < first);
        let is_behind =
            |other: &WaitedFor| other.goal == goal && (other.place < place || (other.place == place && !other.takes));
        self.waited_for.get(lowest).is_some_and(is_behind)
    }
}

/// Whether a reader would take rows that a new tick sees.
#[derive(Clone, Copy)]
pub struct Wish {
    /// The number of its backend.
    pub number: i32,
    pub role: Role,
    pub is_lane: bool,
    pub wants_tick: bool,
}

/// Whether any reader can use a new tick. A finder asks for one only while its backend has no lane.
pub fn is_tick_of_use(wishes: impl Iterator<Item = Wish> + Clone) -> bool {
    let has_lanes = |number: i32| wishes.clone().any(|w| w.number == number && w.is_lane);
    let counts = |wish: &Wish| match wish.role {
        Role::Redis => true,
        Role::Finder => !has_lanes(wish.number),
        Role::Deleted | Role::Strays => false,
    };
    wishes.clone().any(|wish| wish.wants_tick && counts(&wish))
}

/// Readers that one scan serves: they have the same goal and stand near each other.
#[derive(Debug)]
pub struct Group {
    /// The indexes of the readers.
    pub members: Vec<usize>,
    /// The range of the scan. Each member has everything that `from` sees,
    pub from: Arc<Tick>,
    pub to: Arc<Tick>,
    /// and all rows of the range up to this number.
    pub last_seq: i64,
}

impl Group {
    /// Takes the reader that is furthest behind out of `waiting`, together with those that the same scan can serve;
    /// `None`: no reader waits.
    ///
    /// Numbers ascend along a range, so a scan serves readers at different places and from different ticks: each takes
    /// the rows after its own place that its own tick does not see. Late rows are found through the tick, so readers of
    /// late rows must have the same tick.
    pub fn take<'a>(waiting: &mut Vec<usize>, way: impl Fn(usize) -> Way<'a>) -> Option<Self> {
        let priority = waiting.iter().map(|index| way(*index).priority()).min()?;
        let candidates = || {
            waiting
                .iter()
                .map(|index| way(*index))
                .filter(|way| way.priority() == priority)
        };
        let first = candidates().min_by_key(|way| (way.position.place(), way.position.last_seq()))?;
        let (base, to) = (first.position, first.goal);
        let is_among_late = base.is_among_late();
        // Among late rows all readers have reached the same place; there the last row decides.
        let is_near = |way: &Way<'_>| {
            let (theirs, first) = match is_among_late {
                true => (way.position.last_seq(), base.last_seq()),
                false => (way.position.place(), base.place()),
            };
            Arc::ptr_eq(way.goal, to) && theirs <= first + NEAR_SEQS
        };
        let from = match is_among_late {
            true => &base.from,
            false => {
                let is_passed = |p: &Position| !p.is_among_late() && p.from.low_seq <= base.last_seq();
                let near = candidates().filter(is_near).map(|way| way.position);
                let oldest = near.filter(|p| is_passed(p)).min_by_key(|p| p.from.next_xid);
                &oldest.unwrap_or(base).from
            }
        };
        let is_served = |way: &Way<'_>| {
            let p = way.position;
            let is_same = Arc::ptr_eq(&p.from, from);
            let can_join = !is_among_late && !p.is_among_late() && p.from.snapshot.includes(&from.snapshot);
            is_near(way) && (is_same || can_join)
        };
        let mut members = Vec::new();
        let (from, to, last_seq) = (from.clone(), to.clone(), base.last_seq());
        let mut others = Vec::with_capacity(waiting.len());
        for &index in waiting.iter() {
            let way = way(index);
            match way.priority() == priority && is_served(&way) {
                true => members.push(index),
                false => others.push(index),
            }
        }
        *waiting = others;
        Some(Self {
            members,
            from,
            to,
            last_seq,
        })
    }
}

#[cfg(test)]
mod tests;
