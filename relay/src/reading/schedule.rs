//! Who reads next, and which readers share a scan.
//!
//! A reader reads when there may be rows for it and it can take them. One scan costs the same for one reader as for
//! many, so readers that have the same goal are kept together: one that is ahead waits for those behind it. It waits
//! only as long as its own sender has enough to do, so a slow or hung reader holds up nobody.
//!
//! All functions are pure. The worker tells what it knows of its readers, by their indexes, and reads as it is told.

use crate::reading::range::Position;
use crate::reading::role::Role;
use crate::reading::snapshot::{FIRST_NORMAL_XID, Tick};
use std::sync::Arc;

/// Rows that one scan may meet, for each reader that it serves, before the senders are looked at again.
pub const SCAN_STEPS: usize = 2_000;
/// One scan serves readers that are no further apart than this: half of a scan, so that those that are ahead have the
/// other half.
const NEAR_SEQS: i64 = SCAN_STEPS as i64 / 2;
/// A reader that is further behind is not waited for.
const WAITED_FOR_SEQS: i64 = 100_000;

/// Where a reader stands, and where it goes.
#[derive(Clone, Copy)]
pub struct Way<'a> {
    pub position: &'a Position,
    pub goal: &'a Arc<Tick>,
    pub role: Role,
}

impl Way<'_> {
    /// Whether there may be rows on it. Before the first tick there is nowhere to go, and certainly not back.
    pub fn leads_on(&self) -> bool {
        let is_ticked = self.goal.next_xid > FIRST_NORMAL_XID;
        self.position.under_way.is_some() || (is_ticked && !Arc::ptr_eq(&self.position.from, self.goal))
    }

    fn turn(&self) -> Turn {
        match self.goal.high_seq - self.position.place() <= NEAR_SEQS {
            true => Turn::Short,
            false if self.role != Role::Strays => Turn::Long,
            false => Turn::LooksAtAll,
        }
    }
}

/// Which scans come first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Turn {
    /// A reader with a short way does not wait for one with a long way,
    Short,
    Long,
    /// nor anybody for the one that has to look at each row.
    LooksAtAll,
}

/// How much a sender has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Supply {
    /// It could run dry: its reader waits for nobody.
    Low,
    /// It has enough to do, and there is ample room for more.
    Enough,
    /// There is so little room that a scan would not be worth it.
    Full,
}

/// What is known of a reader that has a way to go.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    pub index: usize,
    pub way: Way<'a>,
    /// Rows can be read for it now: it is enabled, it has room, and reading for it has not failed a moment ago.
    pub is_ready: bool,
    /// It is connected and well. If it cannot take rows now, it soon can: others may wait for it.
    pub is_well: bool,
    /// Of its sender, if its role has one.
    pub supply: Supply,
}

impl Reader<'_> {
    /// Whether a scan is worth it: it takes rows, and not just a few of them.
    fn takes(&self) -> bool {
        self.is_ready && (self.way.role != Role::Redis || self.supply != Supply::Full)
    }

    /// Whether it lets those behind it come up.
    fn can_wait(&self) -> bool {
        match self.way.role {
            Role::Redis => self.supply != Supply::Low,
            // The first event of a hash slot that has no lane is not to wait behind a slow lane.
            Role::Finder => false,
            Role::Deleted | Role::Strays => true,
        }
    }

    fn goal(&self) -> usize {
        Arc::as_ptr(self.way.goal).addr()
    }
}

/// Goal, place and whether it takes rows, of a reader that others wait for.
type Awaited = (usize, i64, bool);

/// Who reads now.
pub struct Schedule<'a> {
    /// In the order of their indexes.
    readers: Vec<Reader<'a>>,
    /// In order. Empty if nobody can wait.
    awaited: Vec<Awaited>,
}

impl<'a> Schedule<'a> {
    /// `readers`: those that have a way to go, in the order of their indexes. Costs no more than to sort them.
    pub fn of(readers: impl Iterator<Item = Reader<'a>>) -> Self {
        let readers: Vec<Reader<'a>> = readers.filter(|reader| reader.way.leads_on()).collect();
        let mut awaited = Vec::new();
        if readers.iter().any(|reader| reader.takes() && reader.can_wait()) {
            let well = readers.iter().filter(|reader| reader.is_well);
            awaited.extend(well.map(|r| (r.goal(), r.way.position.place(), r.takes())));
            awaited.sort_unstable();
        }
        Self { readers, awaited }
    }

    /// The indexes of those who read now.
    pub fn reading(&self) -> impl Iterator<Item = usize> {
        let reading = self.readers.iter().filter(|reader| self.is_next(reader));
        reading.map(|reader| reader.index)
    }

    /// Whether this one reads now.
    pub fn reads(&self, index: usize) -> bool {
        let found = self.readers.binary_search_by_key(&index, |reader| reader.index);
        found.is_ok_and(|found| self.is_next(&self.readers[found]))
    }

    fn is_next(&self, reader: &Reader<'_>) -> bool {
        reader.takes() && !(reader.can_wait() && self.is_held(reader))
    }

    /// Whether somebody with the same goal is behind it and not too far, or stands where it stands and cannot take rows
    /// yet.
    fn is_held(&self, reader: &Reader<'_>) -> bool {
        let (goal, place) = (reader.goal(), reader.way.position.place());
        let first = (goal, place.saturating_sub(WAITED_FOR_SEQS), false);
        let lowest = self.awaited.partition_point(|awaited| *awaited < first);
        let is_behind = |(of, at, takes): &Awaited| *of == goal && (*at < place || (*at == place && !takes));
        self.awaited.get(lowest).is_some_and(is_behind)
    }
}

/// Whether a reader would take rows that a new tick sees.
#[derive(Clone, Copy)]
pub struct Wish {
    /// Of its backend.
    pub number: i32,
    pub role: Role,
    pub is_lane: bool,
    pub wants_tick: bool,
}

/// Whether a new tick is of use to anybody. A finder asks for one only as long as its backend has no lane.
pub fn is_tick_of_use(wishes: impl Iterator<Item = Wish> + Clone) -> bool {
    let has_lanes = |number: i32| wishes.clone().any(|w| w.number == number && w.is_lane);
    let counts = |wish: &Wish| match wish.role {
        Role::Redis => true,
        Role::Finder => !has_lanes(wish.number),
        Role::Deleted | Role::Strays => false,
    };
    wishes.clone().any(|wish| wish.wants_tick && counts(&wish))
}

/// Readers that one scan serves: they have the same goal, and stand near each other.
#[derive(Debug)]
pub struct Group {
    /// Their indexes.
    pub members: Vec<usize>,
    /// The range of the scan. Each member has all that `from` sees,
    pub from: Arc<Tick>,
    pub to: Arc<Tick>,
    /// and all rows of the range up to this number.
    pub last_seq: i64,
}

impl Group {
    /// Takes the reader that is furthest behind out of `waiting`, with those that one scan can serve as well; `None`:
    /// nobody waits.
    ///
    /// Numbers ascend along a range, so a scan serves readers that stand apart, and that set out from different ticks:
    /// each takes the rows behind its own place that its own tick does not see. Late rows are found by the tick, so for
    /// them it must be the same.
    pub fn take<'a>(waiting: &mut Vec<usize>, way: impl Fn(usize) -> Way<'a>) -> Option<Self> {
        let turn = waiting.iter().map(|index| way(*index).turn()).min()?;
        let candidates = || waiting.iter().map(|index| way(*index)).filter(|way| way.turn() == turn);
        let first = candidates().min_by_key(|way| (way.position.place(), way.position.last_seq()))?;
        let (base, to) = (first.position, first.goal);
        let is_among_late = base.is_among_late();
        // Among late rows all have come to the same place: there, what counts is the last row.
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
            match way.turn() == turn && is_served(&way) {
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
mod tests {
    use super::*;
    use crate::reading::snapshot::Snapshot;
    use fastrand::Rng;

    /// Numbers up to which the ticks see all; the first is the beginning of time.
    const SEQS: [i64; 4] = [0, 10_000, 300_000, 300_100];

    fn ticks() -> Vec<Arc<Tick>> {
        let tick = |(at, seq): (usize, &i64)| match at {
            0 => Tick::beginning(),
            _ => Tick {
                snapshot: Snapshot::new(10 * at as u64, 10 * at as u64, Vec::new()),
                next_xid: 10 * at as u64,
                low_seq: *seq,
                high_seq: *seq,
            },
        };
        SEQS.iter().enumerate().map(tick).map(Arc::new).collect()
    }

    /// A reader as a row of a table has it. Ticks are named by their places in [`SEQS`].
    #[derive(Clone, Copy, Debug)]
    struct Given {
        from: usize,
        /// The number that it has come to on its way; 0: it has not set out.
        at: i64,
        to: usize,
        role: Role,
        ready: bool,
        well: bool,
        supply: Supply,
    }

    /// Ready and well, with a sender that could run dry.
    const HUNGRY: Given = Given {
        from: 1,
        at: 0,
        to: 2,
        role: Role::Redis,
        ready: true,
        well: true,
        supply: Supply::Low,
    };
    const FED: Given = Given {
        supply: Supply::Enough,
        ..HUNGRY
    };
    const FULL: Given = Given {
        supply: Supply::Full,
        ..HUNGRY
    };
    const DOWN: Given = Given {
        ready: false,
        well: false,
        ..HUNGRY
    };
    const DELETED: Given = Given {
        role: Role::Deleted,
        well: false,
        ..HUNGRY
    };
    const STRAYS: Given = Given {
        role: Role::Strays,
        ..DELETED
    };
    const FINDER: Given = Given {
        role: Role::Finder,
        ..DELETED
    };

    fn at(at: i64, given: Given) -> Given {
        Given { at, ..given }
    }

    fn positions(given: &[Given], ticks: &[Arc<Tick>]) -> Vec<Position> {
        let position = |g: &Given| match g.at {
            0 => Position::at(ticks[g.from].clone()),
            at => Position::towards(ticks[g.from].clone(), ticks[g.to].clone(), at),
        };
        given.iter().map(position).collect()
    }

    fn way<'a>(given: &Given, position: &'a Position, ticks: &'a [Arc<Tick>]) -> Way<'a> {
        Way {
            position,
            goal: position.to(&ticks[given.to]),
            role: given.role,
        }
    }

    fn readers<'a>(given: &[Given], positions: &'a [Position], ticks: &'a [Arc<Tick>]) -> Vec<Reader<'a>> {
        let reader = |(index, given): (usize, &Given)| Reader {
            index,
            way: way(given, &positions[index], ticks),
            is_ready: given.ready,
            is_well: given.well,
            supply: given.supply,
        };
        given.iter().enumerate().map(reader).collect()
    }

    fn reading(given: &[Given]) -> Vec<usize> {
        let ticks = ticks();
        let positions = positions(given, &ticks);
        let schedule = Schedule::of(readers(given, &positions, &ticks).into_iter());
        let reading: Vec<usize> = schedule.reading().collect();
        let asked: Vec<usize> = (0..given.len()).filter(|index| schedule.reads(*index)).collect();
        assert_eq!(reading, asked);
        reading
    }

    /// All groups that are taken, one after the other.
    fn groups(given: &[Given]) -> Vec<(Vec<usize>, i64, i64)> {
        let ticks = ticks();
        let positions = positions(given, &ticks);
        let mut waiting: Vec<usize> = (0..given.len()).collect();
        let take = || {
            let group = Group::take(&mut waiting, |index| way(&given[index], &positions[index], &ticks))?;
            Some((group.members, group.from.high_seq, group.last_seq))
        };
        std::iter::from_fn(take).collect()
    }

    #[test]
    fn who_reads_now() {
        let nowhere = Given { from: 2, ..HUNGRY };
        let unticked = Given {
            from: 0,
            to: 0,
            ..HUNGRY
        };
        let not_ready = Given { ready: false, ..HUNGRY };
        let elsewhere = Given { to: 3, ..HUNGRY };
        for (what, given, expected) in [
            ("nobody", vec![], vec![]),
            ("a sender that could run dry", vec![HUNGRY], vec![0]),
            ("one that is not ready", vec![not_ready], vec![]),
            ("one that has come to the tick", vec![nowhere], vec![]),
            ("before the first tick", vec![unticked], vec![]),
            ("one with enough to do, alone", vec![FED], vec![0]),
            ("one with little room", vec![FULL], vec![]),
            ("two that stand together", vec![FED, FED], vec![0, 1]),
            ("one ahead lets the other come up", vec![at(12_000, FED), FED], vec![1]),
            (
                "and waits while that has little room",
                vec![at(12_000, FED), FULL],
                vec![],
            ),
            ("or is not ready for a moment", vec![at(12_000, FED), not_ready], vec![]),
            ("but not for one that is down", vec![at(12_000, FED), DOWN], vec![0]),
            (
                "nor for one that goes elsewhere",
                vec![at(12_000, FED), elsewhere],
                vec![0, 1],
            ),
            (
                "nor if its sender could run dry",
                vec![at(12_000, HUNGRY), HUNGRY],
                vec![0, 1],
            ),
            ("one far behind is waited for", vec![at(110_000, FED), HUNGRY], vec![1]),
            ("one further behind is not", vec![at(110_001, FED), HUNGRY], vec![0, 1]),
            (
                "beside one that cannot take rows yet",
                vec![at(12_000, FED), at(12_000, FULL)],
                vec![],
            ),
            (
                "one behind does not wait for one ahead",
                vec![FED, at(12_000, FULL)],
                vec![0],
            ),
            (
                "a deleted backend waits for those behind it",
                vec![at(12_000, DELETED), HUNGRY],
                vec![1],
            ),
            (
                "nobody waits for a deleted backend or for strays",
                vec![at(12_000, FED), DELETED, STRAYS],
                vec![0, 1, 2],
            ),
            (
                "a finder waits for no lane",
                vec![at(12_000, FINDER), HUNGRY, FULL],
                vec![0, 1],
            ),
            ("and nobody for a finder", vec![at(12_000, FED), FINDER], vec![0, 1]),
        ] {
            assert_eq!(reading(&given), expected, "{what}");
        }
    }

    #[test]
    fn who_shares_a_scan() {
        let beginner = Given { from: 0, ..HUNGRY };
        let short = Given {
            from: 2,
            to: 3,
            ..HUNGRY
        };
        let (late, later) = (at(500, HUNGRY), at(5_000, HUNGRY));
        for (what, given, expected) in [
            ("nobody", vec![], vec![]),
            (
                "those that stand together",
                vec![HUNGRY, FED],
                vec![(vec![0, 1], 10_000, 0)],
            ),
            (
                "those that stand near each other, from the hindmost",
                vec![at(12_000, HUNGRY), at(11_000, HUNGRY)],
                vec![(vec![0, 1], 10_000, 11_000)],
            ),
            (
                "not those that stand apart: the hindmost first",
                vec![at(12_001, HUNGRY), at(11_000, HUNGRY)],
                vec![(vec![1], 10_000, 11_000), (vec![0], 10_000, 12_001)],
            ),
            (
                "those that have set out from different ticks, by the older tick",
                vec![at(12_000, HUNGRY), at(11_500, beginner)],
                vec![(vec![0, 1], 0, 11_500)],
            ),
            (
                "not if the older one may have late rows before it",
                vec![at(9_900, beginner), HUNGRY],
                vec![(vec![0], 0, 9_900), (vec![1], 10_000, 0)],
            ),
            (
                "of those among late rows, the ones that are near",
                vec![late, later, at(700, HUNGRY)],
                vec![(vec![0, 2], 10_000, 500), (vec![1], 10_000, 5_000)],
            ),
            (
                "a short way comes before a long one",
                vec![HUNGRY, short],
                vec![(vec![1], 300_000, 0), (vec![0], 10_000, 0)],
            ),
            (
                "whoever looks at all rows has a scan of its own",
                vec![STRAYS, HUNGRY],
                vec![(vec![1], 10_000, 0), (vec![0], 10_000, 0)],
            ),
            (
                "except on a short way",
                vec![
                    Given {
                        role: Role::Strays,
                        ..short
                    },
                    short,
                ],
                vec![(vec![0, 1], 300_000, 0)],
            ),
        ] {
            assert_eq!(groups(&given), expected, "{what}");
        }
    }

    #[test]
    fn whether_a_tick_is_of_use() {
        let wish = |number, role, is_lane, wants_tick| Wish {
            number,
            role,
            is_lane,
            wants_tick,
        };
        let finder = wish(1, Role::Finder, false, true);
        for (what, wishes, expected) in [
            (
                "a backend that takes rows",
                vec![wish(1, Role::Redis, false, true)],
                true,
            ),
            ("one that does not", vec![wish(1, Role::Redis, false, false)], false),
            ("a finder without lanes", vec![finder], true),
            (
                "a finder whose lanes are down",
                vec![finder, wish(1, Role::Redis, true, false)],
                false,
            ),
            (
                "a finder beside another's lanes",
                vec![finder, wish(2, Role::Redis, true, false)],
                true,
            ),
            (
                "nobody's events",
                vec![wish(0, Role::Strays, false, true), wish(3, Role::Deleted, false, true)],
                false,
            ),
        ] {
            assert_eq!(is_tick_of_use(wishes.into_iter()), expected, "{what}");
        }
    }

    fn anybody(rng: &mut Rng) -> Given {
        let roles = [
            Role::Redis,
            Role::Redis,
            Role::Redis,
            Role::Finder,
            Role::Deleted,
            Role::Strays,
        ];
        let from = rng.usize(..3);
        let to = rng.usize(from..4);
        let at = [0, rng.i64(1..30), rng.i64(1..12_000), rng.i64(1..300_000)][rng.usize(..4)];
        Given {
            from,
            at: at.min(SEQS[to]),
            to,
            role: roles[rng.usize(..6)],
            ready: rng.u8(..) < 200,
            well: rng.u8(..) < 200,
            supply: [Supply::Low, Supply::Enough, Supply::Full][rng.usize(..3)],
        }
    }

    /// The same as [`Schedule`] says, each reader beside each other one.
    fn reading_by_definition(readers: &[Reader<'_>]) -> Vec<usize> {
        let leads_on = |r: &&Reader<'_>| r.way.leads_on();
        let holds = |other: &Reader<'_>, reader: &Reader<'_>| {
            let behind = reader.way.position.place() - other.way.position.place();
            other.index != reader.index
                && other.is_well
                && Arc::ptr_eq(other.way.goal, reader.way.goal)
                && ((1..=WAITED_FOR_SEQS).contains(&behind) || (behind == 0 && !other.takes()))
        };
        let is_held = |reader: &Reader<'_>| readers.iter().filter(leads_on).any(|other| holds(other, reader));
        let reads = |reader: &&Reader<'_>| reader.takes() && (!reader.can_wait() || !is_held(reader));
        readers.iter().filter(leads_on).filter(reads).map(|r| r.index).collect()
    }

    #[test]
    fn nobody_starves_and_no_sender_runs_dry() {
        let rng = &mut Rng::with_seed(1);
        let ticks = ticks();
        for round in 0..20_000 {
            let given: Vec<Given> = (0..rng.usize(1..9)).map(|_| anybody(rng)).collect();
            let positions = positions(&given, &ticks);
            let readers = readers(&given, &positions, &ticks);
            let reading = reading(&given);
            assert_eq!(reading, reading_by_definition(&readers), "round {round}: {given:?}");
            let on_their_way = || readers.iter().filter(|r| r.way.leads_on());
            for reader in on_their_way().filter(|r| r.is_ready && r.way.role == Role::Redis) {
                let is_urgent = reader.supply == Supply::Low;
                assert!(
                    !is_urgent || reading.contains(&reader.index),
                    "round {round}: {given:?}"
                );
            }
            // Whoever waits, waits for somebody who reads, or who is well and has more to do than it can take.
            let is_stuck = reading.is_empty() && on_their_way().any(Reader::takes);
            let moves = on_their_way().any(|r| r.is_well && !r.takes());
            assert!(!is_stuck || moves, "round {round}: {given:?}");
        }
    }

    #[test]
    fn each_reader_has_one_scan() {
        let rng = &mut Rng::with_seed(2);
        for round in 0..20_000 {
            let given: Vec<Given> = (0..rng.usize(1..9)).map(|_| anybody(rng)).collect();
            let taken = groups(&given);
            assert!(taken.iter().all(|(members, ..)| !members.is_empty()), "round {round}");
            let mut members: Vec<usize> = taken.into_iter().flat_map(|(members, ..)| members).collect();
            members.sort_unstable();
            assert!(members.into_iter().eq(0..given.len()), "round {round}: {given:?}");
        }
    }
}
