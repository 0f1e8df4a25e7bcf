//! A model of Postgres with what the reader needs: transactions with their ids, the sequence, snapshots, the table of
//! events.

use super::Rng;
use super::transaction::{Level, Status, Transaction};
use super::view::View;
use relay::reading::range::Key;
use relay::reading::snapshot::{FIRST_NORMAL_XID, Snapshot, Tick};
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    LowSeq,
    NextXid,
    Snapshot,
    HighSeq,
}

/// The order that [`Tick`] prescribes.
pub(crate) const READINGS: [Reading; 4] = [Reading::LowSeq, Reading::NextXid, Reading::Snapshot, Reading::HighSeq];

/// What makes the numbers ascend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Numbering {
    /// Publishers use the numbers from the sequence.
    Sequence,
    /// Publishers only use numbers above the highest one at the time when they got their transaction ids; and set the
    /// sequence forward.
    Ascending,
}

#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub xid: u64,
    pub stream: u8,
    /// No other row has it, not even one that gets the same number after a crash, or in a copy.
    pub uid: u64,
    transaction: usize,
    /// When its number was drawn; if the sequence was set, when its publisher looked up the highest number.
    drawn: u64,
    rolled_back: bool,
    purged: bool,
}

#[derive(Clone)]
pub(crate) struct Database {
    next_xid: u64,
    latest_completed: u64,
    /// The sequence, which anybody may set.
    last_seq: i64,
    /// The highest number in use, and the number above which all are that were drawn since it is known.
    highest: i64,
    began: i64,
    was_set: bool,
    pub numbering: Numbering,
    /// Ticks only use the sequence.
    pub ticks_by_sequence: bool,
    clock: u64,
    streams: u8,
    transactions: Vec<Transaction>,
    open: Vec<usize>,
    rows: BTreeMap<i64, Row>,
    view: Option<View>,
    /// Nothing happens any more.
    finished: bool,
    /// Drawn so far, in all copies.
    uids: Rc<Cell<u64>>,
}

impl Database {
    pub(crate) fn new(rng: &mut Rng, streams: u8) -> Self {
        let next_xid = FIRST_NORMAL_XID + rng.u64(0..3) * 700;
        Self {
            next_xid,
            latest_completed: next_xid - 1,
            last_seq: 0,
            highest: 0,
            began: 0,
            was_set: false,
            numbering: Numbering::Ascending,
            ticks_by_sequence: false,
            clock: 0,
            streams,
            transactions: Vec::new(),
            open: Vec::new(),
            rows: BTreeMap::new(),
            view: None,
            finished: false,
            uids: Rc::default(),
        }
    }

    /// One step of one session.
    pub(crate) fn step(&mut self, rng: &mut Rng) {
        if self.finished {
            return;
        }
        self.clock += 1;
        if self.open.is_empty() || (self.open.len() < 8 && rng.u8(..) < 40) {
            return self.begin(rng);
        }
        let index = self.open[rng.usize(..self.open.len())];
        let transaction = &self.transactions[index];
        if transaction.publishing {
            return self.draw(index, rng);
        }
        if transaction.status == Status::Prepared {
            // A server saves it some time.
            if rng.u8(..) < 25 {
                let commits = rng.bool();
                self.end(index, commits);
            }
            return;
        }
        if transaction.plans == 0 {
            return match rng.u8(..100) {
                0..70 => self.end(index, true),
                70..90 => self.end(index, false),
                _ => self.prepare(index),
            };
        }
        let publishes = transaction.publishes;
        self.transactions[index].plans -= 1;
        match rng.u8(..100) {
            0..12 => self.transactions[index].levels.push(Level::default()),
            12..20 => self.leave_savepoint(index, true),
            20..30 => self.leave_savepoint(index, false),
            // A write of its own to another table: within a savepoint it takes its own id.
            30..40 => self.assign_xids(index),
            _ if publishes => {
                self.assign_top_xid(index);
                self.transactions[index].publishing = true;
                self.look(index);
                // Mostly the two are close together.
                if rng.u8(..) < 180 {
                    self.draw(index, rng);
                }
            }
            _ => self.assign_xids(index),
        }
    }

    pub(crate) fn steps(&mut self, rng: &mut Rng, limit: usize) {
        for _ in 0..rng.usize(..=limit) {
            self.step(rng);
        }
    }

    /// Ends every transaction; no other one begins.
    pub(crate) fn finish(&mut self, rng: &mut Rng) {
        while let Some(&index) = self.open.last() {
            self.clock += 1;
            let commits = rng.u8(..) < 200;
            self.end(index, commits);
        }
        self.finished = true;
    }

    /// The server dies and comes back: running transactions are lost, prepared ones are not.
    pub(crate) fn crash(&mut self) {
        for index in self.open.clone() {
            if self.transactions[index].status == Status::Running {
                self.transactions[index].publishing = false;
                self.end(index, false);
            }
        }
        self.view = None;
    }

    fn begin(&mut self, rng: &mut Rng) {
        let plans = match rng.u8(..100) {
            0..70 => rng.u32(1..5),
            70..85 => rng.u32(10..40),
            85..95 => 10_000,
            // A bulk of rows at once, and the transaction continues.
            _ => rng.u32(1..3),
        };
        let bulk = plans < 3 && rng.u8(..) < 12;
        let first = rng.u8(..self.streams);
        let mut streams = vec![first];
        if rng.u8(..) < 60 {
            streams.push(rng.u8(..self.streams));
        }
        self.open.push(self.transactions.len());
        self.transactions.push(Transaction {
            plans,
            publishes: rng.u8(..) < 220,
            streams,
            ..Transaction::new()
        });
        if bulk {
            let index = self.transactions.len() - 1;
            self.assign_top_xid(index);
            for _ in 0..rng.usize(20..60) {
                self.look(index);
                self.draw(index, rng);
            }
        }
    }

    fn assign_top_xid(&mut self, index: usize) {
        let transaction = &mut self.transactions[index];
        if transaction.xid.is_none() {
            transaction.xid = Some(self.next_xid);
            transaction.levels[0].own = Some(self.next_xid);
            transaction.levels[0].xids.push(self.next_xid);
            self.next_xid += 1;
        }
    }

    /// Parents first, as Postgres does.
    fn assign_xids(&mut self, index: usize) {
        self.assign_top_xid(index);
        for level in &mut self.transactions[index].levels[1..] {
            if level.own.is_none() {
                level.own = Some(self.next_xid);
                level.xids.push(self.next_xid);
                self.next_xid += 1;
            }
        }
    }

    /// Looks up the number above which the next one must be.
    fn look(&mut self, index: usize) {
        let transaction = &mut self.transactions[index];
        (transaction.before, transaction.looked) = (self.highest, self.clock);
    }

    /// Draws the number of an event and inserts it.
    fn draw(&mut self, index: usize, rng: &mut Rng) {
        self.last_seq += 1;
        if self.numbering == Numbering::Ascending && self.last_seq <= self.transactions[index].before {
            self.last_seq = self.highest + 1;
        }
        if self.rows.contains_key(&self.last_seq) {
            // The key of the table refuses it.
            self.transactions[index].publishing = false;
            return self.end(index, false);
        }
        self.highest = self.highest.max(self.last_seq);
        self.assign_xids(index);
        let transaction = &mut self.transactions[index];
        transaction.publishing = false;
        self.uids.set(self.uids.get() + 1);
        let row = Row {
            xid: transaction.xid.expect("assigned above"),
            stream: transaction.streams[rng.usize(..transaction.streams.len())],
            uid: self.uids.get(),
            transaction: index,
            drawn: match self.was_set {
                true => transaction.looked,
                false => self.clock,
            },
            rolled_back: false,
            purged: false,
        };
        let level = transaction.levels.last_mut().expect("the transaction itself");
        level.rows.push(self.last_seq);
        self.rows.insert(self.last_seq, row);
    }

    fn leave_savepoint(&mut self, index: usize, releases: bool) {
        let transaction = &mut self.transactions[index];
        if transaction.levels.len() == 1 {
            return;
        }
        let level = transaction.levels.pop().expect("checked above");
        if releases {
            let parent = transaction.levels.last_mut().expect("checked above");
            parent.xids.extend(level.xids);
            parent.rows.extend(level.rows);
        } else {
            for seq in level.rows {
                self.rows.get_mut(&seq).expect("inserted").rolled_back = true;
            }
            // A subtransaction that aborts is completed at once, its transaction continues.
            self.completed(&level.xids);
        }
    }

    fn completed(&mut self, xids: &[u64]) {
        let latest = xids.iter().copied().max().unwrap_or(0);
        self.latest_completed = self.latest_completed.max(latest);
    }

    fn prepare(&mut self, index: usize) {
        while self.transactions[index].levels.len() > 1 {
            self.leave_savepoint(index, true);
        }
        self.transactions[index].status = Status::Prepared;
    }

    fn end(&mut self, index: usize, commits: bool) {
        while self.transactions[index].levels.len() > 1 {
            self.leave_savepoint(index, true);
        }
        let transaction = &mut self.transactions[index];
        transaction.status = if commits { Status::Committed } else { Status::Aborted };
        transaction.ended = self.clock;
        let xids = std::mem::take(&mut transaction.levels[0].xids);
        self.completed(&xids);
        self.open.retain(|open| *open != index);
        self.view = None;
    }

    /// A transaction that has published these rows and continues.
    pub(crate) fn begin_publishing(&mut self, streams: &[u8]) -> usize {
        let index = self.transactions.len();
        self.open.push(index);
        self.transactions.push(Transaction::new());
        self.assign_top_xid(index);
        for stream in streams {
            self.clock += 1;
            self.transactions[index].streams = vec![*stream];
            self.look(index);
            self.draw(index, &mut Rng::with_seed(0));
        }
        index
    }

    pub(crate) fn commit(&mut self, transaction: usize) {
        self.clock += 1;
        self.end(transaction, true);
    }

    /// A transaction that publishes these rows and commits.
    pub(crate) fn publish(&mut self, streams: &[u8]) {
        let transaction = self.begin_publishing(streams);
        self.commit(transaction);
    }

    /// The rows of a dump are restored, in one transaction: the same events with new numbers. The existing rows had
    /// been deleted.
    pub(crate) fn restore(&mut self, seqs: &[i64]) -> u64 {
        let transaction = self.begin_publishing(&[]);
        for seq in seqs {
            self.clock += 1;
            let old = self.rows.get_mut(seq).expect("it was dumped");
            let (stream, uid) = (old.stream, old.uid);
            old.purged = true;
            self.transactions[transaction].streams = vec![stream];
            self.look(transaction);
            self.draw(transaction, &mut Rng::with_seed(0));
            let new = self.rows.get_mut(&self.last_seq).expect("just drawn");
            new.uid = uid;
        }
        let xid = self.transactions[transaction].xid.expect("assigned at its beginning");
        self.commit(transaction);
        xid
    }

    /// As in `GetSnapshotData`: xmax is the latest *completed* id + 1.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let xmax = self.latest_completed + 1;
        let xids = self.open.iter().filter_map(|index| self.transactions[*index].xid);
        let running: Vec<u64> = xids.filter(|xid| *xid < xmax).collect();
        let xmin = running.iter().copied().min().unwrap_or(xmax);
        Snapshot::new(xmin, xmax, running)
    }

    fn bound(&self) -> i64 {
        match self.ticks_by_sequence {
            true => self.last_seq,
            false => self.highest,
        }
    }

    /// Somebody sets the sequence: mostly back, sometimes forward; or a session uses numbers that it had cached.
    pub(crate) fn set_sequence(&mut self, rng: &mut Rng) {
        self.was_set = true;
        self.last_seq = match rng.u8(..4) {
            0 => 0,
            1 => self.last_seq + rng.i64(0..30),
            _ => rng.i64(0..=self.last_seq),
        };
    }

    /// The server dies and comes back. The highest number is found in the durable data: rows, the sequence, and
    /// `saved`.
    pub(crate) fn crash_and_find(&mut self, saved: i64) {
        self.crash();
        let rows = self
            .rows
            .iter()
            .filter(|(_, row)| self.transactions[row.transaction].status != Status::Aborted);
        let kept = rows.map(|(seq, _)| *seq).max().unwrap_or(0);
        self.highest = kept.max(self.last_seq).max(saved);
        self.began = self.highest;
    }

    pub(crate) fn next_xid(&self) -> u64 {
        self.next_xid
    }

    /// Numbers drawn since the last crash are above it.
    pub(crate) fn began(&self) -> i64 {
        self.began
    }

    /// The lowest number up to `upto` of transactions from `xid` on, whether they committed or not.
    pub(crate) fn lowest_since(&self, xid: u64, upto: i64) -> Option<i64> {
        let later = self.rows.range(..=upto).filter(|(_, row)| row.xid >= xid);
        later.map(|(seq, _)| *seq).next()
    }

    /// The four readings in the given order, with steps of others in between.
    pub(crate) fn tick_in_order(&mut self, rng: &mut Rng, order: [Reading; 4]) -> Tick {
        let mut tick = Tick::beginning();
        for reading in order {
            match reading {
                Reading::LowSeq => tick.low_seq = self.bound(),
                Reading::NextXid => tick.next_xid = self.next_xid,
                Reading::Snapshot => tick.snapshot = self.snapshot(),
                Reading::HighSeq => tick.high_seq = self.bound(),
            }
            if rng.bool() {
                self.steps(rng, 4);
            }
        }
        // It is kept as text.
        let text = tick.snapshot.to_string();
        tick.snapshot = text.parse().expect("its own text");
        tick
    }

    pub(crate) fn tick(&mut self, rng: &mut Rng) -> Tick {
        self.tick_in_order(rng, READINGS)
    }

    /// No session does anything meanwhile.
    pub(crate) fn quiet_tick(&mut self) -> Tick {
        let finished = std::mem::replace(&mut self.finished, true);
        let tick = self.tick(&mut Rng::with_seed(0));
        self.finished = finished;
        tick
    }

    /// What a statement that begins now sees of the table.
    pub(crate) fn view(&mut self) -> View {
        let rows = &self.rows;
        let transactions = &self.transactions;
        let view = self.view.get_or_insert_with(|| View {
            keys: rows
                .iter()
                .filter(|(_, row)| transactions[row.transaction].status == Status::Committed)
                .filter(|(_, row)| !row.rolled_back && !row.purged)
                .map(|(seq, row)| Key {
                    xid: row.xid,
                    seq: *seq,
                })
                .collect(),
        });
        view.clone()
    }

    /// Deletes rows for good.
    pub(crate) fn purge(&mut self, purged: impl Fn(Key) -> bool) {
        for (seq, row) in &mut self.rows {
            row.purged |= purged(Key {
                xid: row.xid,
                seq: *seq,
            });
        }
        self.view = None;
    }

    pub(crate) fn row(&self, seq: i64) -> &Row {
        &self.rows[&seq]
    }

    pub(crate) fn rows(&self) -> impl Iterator<Item = Key> {
        self.rows.iter().map(|(seq, row)| Key {
            xid: row.xid,
            seq: *seq,
        })
    }

    /// Whether a row was deleted.
    pub(crate) fn is_purged(&self, seq: i64) -> bool {
        self.row(seq).purged
    }

    /// Whether a row is committed for good.
    pub(crate) fn is_committed(&self, seq: i64) -> bool {
        let row = self.row(seq);
        self.transactions[row.transaction].status == Status::Committed && !row.rolled_back
    }

    /// Whether a row might still be committed.
    pub(crate) fn is_open(&self, seq: i64) -> bool {
        let status = self.transactions[self.row(seq).transaction].status;
        matches!(status, Status::Running | Status::Prepared)
    }

    /// Two rows in the wrong order, if there are any: the rows of one transaction are in publishing order, and a row
    /// whose number was drawn after another transaction had committed comes after all rows of that transaction.
    pub(crate) fn out_of_order(&self, seqs: impl IntoIterator<Item = i64>) -> Option<(i64, i64)> {
        let mut last_of = HashMap::new();
        let mut latest: Option<(u64, i64)> = None;
        for seq in seqs {
            let row = self.row(seq);
            if let Some(before) = last_of.insert(row.transaction, seq)
                && before > seq
            {
                return Some((before, seq));
            }
            if let Some((drawn, before)) = latest
                && self.transactions[row.transaction].ended < drawn
            {
                return Some((before, seq));
            }
            latest = latest.max(Some((row.drawn, seq)));
        }
        None
    }
}
