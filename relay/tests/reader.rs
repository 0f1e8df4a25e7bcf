//! The reader against a model of Postgres, over random schedules: it loses nothing, repeats nothing and keeps the
//! order.

mod model;

use model::{Database, Numbering, READINGS, Reading, Rng, Rows, View, caught, for_each_seed, likely};
use relay::reading::range::{Key, Position, RangeScan, Scan, Step, Table};
use relay::reading::snapshot::Tick;
use std::cell::Cell;
use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

/// What an oracle can find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Lost,
    Repeated,
    Phantom,
    Order { first: i64 },
    NotAscending,
    CoversUnread,
    ReadUncovered,
    CoversOpen,
}

#[derive(Debug)]
struct Violation {
    wrong: Wrong,
    seq: i64,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: the row with seq {}", self.wrong, self.seq)
    }
}

fn violated<T>(wrong: Wrong, seq: i64) -> Result<T, Violation> {
    Err(Violation { wrong, seq })
}

/// A fault that is put into the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    None,
    /// `WHERE seq > last ORDER BY seq`.
    SeqOnly,
    /// Takes the snapshot's xmax for the next transaction id.
    XmaxForNextXid,
    /// Reads the numbers of a tick in another order.
    Readings([Reading; 4]),
}

struct Reader {
    mutant: Mutant,
    position: Position,
    /// Taken and not yet reached.
    ticks: VecDeque<Arc<Tick>>,
    scan: Option<RangeScan<Rows>>,
    read: Vec<i64>,
    has_read: HashSet<i64>,
    /// The last row of the range under way.
    last_in_range: i64,
    /// State of a mutant.
    last_seq: i64,
}

impl Reader {
    fn new(mutant: Mutant) -> Self {
        Self {
            mutant,
            position: Position::beginning(),
            ticks: VecDeque::new(),
            scan: None,
            read: Vec::new(),
            has_read: HashSet::new(),
            last_in_range: 0,
            last_seq: 0,
        }
    }

    fn take_tick(&mut self, database: &mut Database, rng: &mut Rng) {
        let order = match self.mutant {
            Mutant::Readings(order) => order,
            _ => READINGS,
        };
        let mut tick = database.tick_in_order(rng, order);
        if self.mutant == Mutant::XmaxForNextXid {
            tick.next_xid = tick.snapshot.xmax();
        }
        self.ticks.push_back(Arc::new(tick));
    }

    fn take_row(&mut self, database: &Database, key: Key) -> Result<(), Violation> {
        if !self.has_read.insert(key.seq) {
            return violated(Wrong::Repeated, key.seq);
        }
        if !database.is_committed(key.seq) {
            return violated(Wrong::Phantom, key.seq);
        }
        self.read.push(key.seq);
        Ok(())
    }

    /// Reads up to `limit` further steps; false: there is nowhere to go.
    fn read_piece(&mut self, database: &mut Database, rng: &mut Rng, limit: usize) -> Result<bool, Violation> {
        if self.mutant == Mutant::SeqOnly {
            return self.read_by_seq(database, limit);
        }
        let (to, last_seq) = match (&self.position.under_way, self.ticks.front()) {
            (Some(under_way), _) => (under_way.to.clone(), under_way.last_seq),
            (None, Some(tick)) => (tick.clone(), 0),
            (None, None) => return Ok(false),
        };
        let from = self.position.from.clone();
        if last_seq == 0 {
            self.last_in_range = 0;
        }
        let mut scan = match self.scan.take() {
            Some(scan) if rng.bool() => scan,
            _ => RangeScan::open(&mut database.view(), &from, &to, last_seq),
        };
        for _ in 0..limit {
            if rng.u8(..) < 20 {
                database.step(rng);
            }
            let last = match scan.step() {
                None => {
                    self.position = Position::at(to.clone());
                    if self.ticks.front().is_some_and(|tick| Arc::ptr_eq(tick, &to)) {
                        self.ticks.pop_front();
                    }
                    return Ok(true);
                }
                Some(Step::Passed(seq)) => seq,
                Some(Step::Row(key)) => {
                    if self.position.covers(key) {
                        return violated(Wrong::CoversUnread, key.seq);
                    }
                    if key.seq <= self.last_in_range {
                        return violated(Wrong::NotAscending, key.seq);
                    }
                    self.last_in_range = key.seq;
                    self.take_row(database, key)?;
                    key.seq
                }
            };
            self.position = Position::towards(from.clone(), to.clone(), last);
        }
        // Not yet under way, it may still choose another tick.
        self.scan = self.position.under_way.is_some().then_some(scan);
        Ok(true)
    }

    fn read_by_seq(&mut self, database: &mut Database, limit: usize) -> Result<bool, Violation> {
        let view = database.view();
        let new = view.keys.iter().filter(|key| key.seq > self.last_seq);
        let keys: Vec<Key> = new.take(limit).copied().collect();
        for key in &keys {
            self.last_seq = key.seq;
            self.take_row(database, *key)?;
        }
        Ok(!keys.is_empty())
    }

    /// Checks that exactly the rows before the position were read.
    fn check_position(&self, database: &Database) -> Result<(), Violation> {
        if self.mutant == Mutant::SeqOnly {
            return Ok(());
        }
        for key in database.rows() {
            let covers = self.position.covers(key);
            match self.has_read.contains(&key.seq) {
                true if !covers => return violated(Wrong::ReadUncovered, key.seq),
                false if covers && database.is_open(key.seq) => return violated(Wrong::CoversOpen, key.seq),
                false if covers && database.is_committed(key.seq) => return violated(Wrong::CoversUnread, key.seq),
                _ => {}
            }
        }
        Ok(())
    }

    /// All transactions end, and the reader reads to the end: all committed rows have been read.
    fn finish(&mut self, database: &mut Database, rng: &mut Rng) -> Result<(), Violation> {
        database.finish(rng);
        self.take_tick(database, rng);
        while self.read_piece(database, rng, 50)? {
            self.check_position(database)?;
        }
        let mut committed = database.rows().filter(|key| database.is_committed(key.seq));
        match committed.find(|key| !self.has_read.contains(&key.seq)) {
            Some(lost) => violated(Wrong::Lost, lost.seq),
            None => Ok(()),
        }
    }
}

fn schedule(seed: u64, mutant: Mutant) -> Result<(), Violation> {
    let rng = &mut Rng::with_seed(seed);
    let mut database = Database::new(rng, 4);
    let mut reader = Reader::new(mutant);
    let steps = rng.usize(10..150);
    let piece = [3, 20, 100][rng.usize(..3)];
    let (reads, purges) = (rng.f64() * 0.5, rng.f64() * 0.02);
    for _ in 0..steps {
        database.steps(rng, 3);
        if likely(rng, 0.3) {
            reader.take_tick(&mut database, rng);
        }
        // A long backlog: fewer and fewer ticks are kept.
        if reader.ticks.len() > 1 && likely(rng, 0.1) {
            let index = rng.usize(..reader.ticks.len());
            let under_way = reader.position.under_way.as_ref();
            if !under_way.is_some_and(|u| Arc::ptr_eq(&u.to, &reader.ticks[index])) {
                reader.ticks.remove(index);
            }
        }
        if likely(rng, reads) {
            let limit = rng.usize(..=piece);
            reader.read_piece(&mut database, rng, limit)?;
            reader.check_position(&database)?;
        }
        if likely(rng, purges) && mutant == Mutant::None {
            database.purge(|key| reader.position.covers(key));
        }
    }
    reader.finish(&mut database, rng)?;
    if let Some((first, seq)) = database.out_of_order(reader.read.iter().copied()) {
        return violated(Wrong::Order { first }, seq);
    }
    Ok(())
}

/// How numbers that do not ascend are handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Care {
    All,
    /// Publishers trust the sequence, and so do ticks.
    None,
    /// Ticks do.
    PublishersAlone,
    /// Rows that were numbered elsewhere are not looked for when a position is loaded.
    NotAtLoad,
    /// Numbers that were lost in a crash are not skipped.
    NotForLost,
}

/// A position from before the last crash, as it is loaded.
fn vouched(database: &Database, position: &Position, care: Care) -> Position {
    position.with_ticks(|tick| {
        let lowest = database
            .lowest_since(tick.next_xid, tick.low_seq)
            .map_or(i64::MAX, |seq| seq - 1);
        let bound = match care {
            Care::NotAtLoad => database.began(),
            Care::NotForLost => lowest,
            _ => lowest.min(database.began()),
        };
        Arc::new(tick.lowered_to(bound))
    })
}

/// The sequence is set repeatedly; the server dies, with numbers that only a guard records; meanwhile other code
/// numbers events.
fn misused(seed: u64, care: Care) -> Result<(), Violation> {
    let rng = &mut Rng::with_seed(seed);
    let mut database = Database::new(rng, 4);
    if care == Care::None {
        database.numbering = Numbering::Sequence;
    }
    database.ticks_by_sequence = matches!(care, Care::None | Care::PublishersAlone);
    let mut reader = Reader::new(Mutant::None);
    let mut in_order = true;
    for _ in 0..rng.usize(20..150) {
        database.steps(rng, 4);
        match rng.u8(..100) {
            0..25 => reader.take_tick(&mut database, rng),
            25..55 => {
                let limit = rng.usize(..=20);
                reader.read_piece(&mut database, rng, limit)?;
                reader.check_position(&database)?;
            }
            55..65 => database.set_sequence(rng),
            65..68 if care != Care::None => {
                let position = reader.position.clone();
                let newest = position.ticks().map(|tick| tick.low_seq.max(tick.high_seq)).max();
                // Only the guard records the newest numbers, and the sequence has lost them.
                let is_saved = rng.bool();
                if !is_saved {
                    database.set_sequence(rng);
                }
                database.crash_and_find(newest.filter(|_| is_saved).unwrap_or(0));
                (reader.scan, reader.ticks) = (None, VecDeque::new());
                if rng.bool() {
                    // Nobody reads, and another version of the library numbers events.
                    database.numbering = Numbering::Sequence;
                    for _ in 0..rng.usize(..40) {
                        database.step(rng);
                        if likely(rng, 0.1) {
                            database.set_sequence(rng);
                        }
                    }
                    database.numbering = Numbering::Ascending;
                    database.crash_and_find(newest.filter(|_| is_saved).unwrap_or(0));
                    in_order = false;
                }
                database.steps(rng, 20);
                reader.position = vouched(&database, &position, care);
            }
            _ => {}
        }
    }
    reader.finish(&mut database, rng)?;
    if in_order && let Some((first, seq)) = database.out_of_order(reader.read.iter().copied()) {
        return violated(Wrong::Order { first }, seq);
    }
    Ok(())
}

#[test]
fn loses_repeats_and_reorders_nothing_whatever_is_done_to_the_sequence() {
    for_each_seed(5_000, |seed| misused(seed, Care::All).map_err(|v| v.to_string()));
}

#[test]
fn the_oracle_catches_numbers_that_are_trusted() {
    for care in [Care::None, Care::PublishersAlone, Care::NotAtLoad, Care::NotForLost] {
        let violation = caught(2_000, |seed| misused(seed, care));
        assert!(
            matches!(
                violation.wrong,
                Wrong::Lost | Wrong::CoversUnread | Wrong::ReadUncovered | Wrong::CoversOpen
            ),
            "{care:?}: {violation}"
        );
    }
}

#[test]
fn loses_repeats_and_reorders_nothing() {
    for_each_seed(3_000, |seed| schedule(seed, Mutant::None).map_err(|v| v.to_string()));
}

#[test]
fn the_oracle_catches_a_reader_by_seq_alone() {
    let violation = caught(100, |seed| schedule(seed, Mutant::SeqOnly));
    assert_eq!(violation.wrong, Wrong::Lost);
}

#[test]
fn the_oracle_catches_xmax_taken_for_the_next_xid() {
    let violation = caught(300, |seed| schedule(seed, Mutant::XmaxForNextXid));
    assert!(
        matches!(violation.wrong, Wrong::Lost | Wrong::CoversUnread),
        "{violation}"
    );
}

#[test]
fn the_oracle_catches_a_tick_read_in_another_order() {
    use Reading::*;
    for order in [
        [NextXid, LowSeq, Snapshot, HighSeq],
        [LowSeq, NextXid, HighSeq, Snapshot],
    ] {
        let violation = caught(2_000, |seed| schedule(seed, Mutant::Readings(order)));
        assert!(
            matches!(violation.wrong, Wrong::Lost | Wrong::CoversUnread),
            "{order:?}: {violation}"
        );
    }
}

/// A table that counts the rows that are read.
struct Counting {
    view: View,
    asked: Rc<Cell<usize>>,
}

struct CountingRows {
    rows: Rows,
    asked: Rc<Cell<usize>>,
}

impl Counting {
    fn rows(&self, rows: Rows) -> CountingRows {
        let asked = self.asked.clone();
        CountingRows { rows, asked }
    }
}

impl Table for Counting {
    type Scan = CountingRows;

    fn by_seq(&mut self, after: i64, upto: i64) -> CountingRows {
        let rows = self.view.by_seq(after, upto);
        self.rows(rows)
    }

    fn by_xid(&mut self, xid: u64, after: i64, upto: i64) -> CountingRows {
        let rows = self.view.by_xid(xid, after, upto);
        self.rows(rows)
    }

    fn first_xid(&mut self, from: u64, before: u64) -> Option<u64> {
        self.asked.update(|n| n + 1);
        self.view.first_xid(from, before)
    }
}

impl Scan for CountingRows {
    fn advance(&mut self) -> Option<Step> {
        self.asked.update(|n| n + 1);
        self.rows.advance()
    }
}

#[test]
fn reading_costs_the_new_rows_alone() {
    let rng = &mut Rng::with_seed(1);
    let mut database = Database::new(rng, 1);
    let long = database.begin_publishing(&[0, 0, 0]);
    for _ in 0..2_000 {
        database.publish(&[0; 10]);
    }
    let from = Arc::new(database.quiet_tick());
    database.commit(long);
    database.publish(&[0; 10]);
    let to = Arc::new(database.quiet_tick());

    let asked = Rc::new(Cell::new(0));
    let mut table = Counting {
        view: database.view(),
        asked: asked.clone(),
    };
    let mut scan = RangeScan::open(&mut table, &from, &to, 0);
    let steps: Vec<Step> = std::iter::from_fn(|| scan.step()).collect();
    assert_eq!(steps.len(), 13);
    assert!(steps.iter().all(|step| matches!(step, Step::Row(_))));
    assert!(asked.get() < 13 + 5, "asked {} times", asked.get());
}

#[test]
fn a_bulk_streams_in_pieces() {
    let rng = &mut Rng::with_seed(1);
    let mut database = Database::new(rng, 1);
    database.publish(&[0; 1_000]);
    let (from, to) = (Arc::new(Tick::beginning()), Arc::new(database.quiet_tick()));
    let mut position = Position::beginning();
    for piece in 0..10 {
        let last = position.under_way.as_ref().map_or(0, |u| u.last_seq);
        assert_eq!(last, piece * 100);
        let mut scan = RangeScan::open(&mut database.view(), &from, &to, last);
        let step = (0..100).map(|_| scan.step()).last().flatten();
        let Some(Step::Row(key)) = step else {
            panic!("{step:?}");
        };
        assert!(!position.covers(key));
        position = Position::towards(from.clone(), to.clone(), key.seq);
        assert!(position.covers(key));
    }
}

#[test]
fn positions_are_the_same_only_if_ticks_and_seq_agree() {
    let ticks: Vec<_> = (0..3).map(|_| Arc::new(Tick::beginning())).collect();
    let towards = |to: usize, seq| Position::towards(ticks[0].clone(), ticks[to].clone(), seq);
    let at = Position::at(ticks[0].clone());
    assert!(at.same_place(&at.clone()) && towards(1, 5).same_place(&towards(1, 5)));
    for other in [towards(1, 6), towards(2, 5), at, Position::at(ticks[1].clone())] {
        assert!(!towards(1, 5).same_place(&other));
        assert!(!other.same_place(&towards(1, 5)));
    }
}
