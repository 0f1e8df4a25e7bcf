//! Cuts rows into batches: one scan over a range serves all readers that share it. Each row becomes an entry in its
//! reader's batch or a record to be written down, or is skipped. The extension and the simulations use this code.

use crate::delivery::batch::{BATCH_BYTES, BuiltBatch, OpenBatch};
use crate::delivery::flight::{BatchedEvent, Contents, Window};
use crate::delivery::refusal::Record;
use crate::delivery::{Delivery, RowFate};
use crate::reading::range::{Key, Position, RangeScan, Scan, Step, Table};
use crate::reading::role::Role;
use crate::reading::schedule::{Group, SCAN_STEPS, Supply};
use crate::reading::snapshot::Tick;
use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;
use std::sync::Arc;

/// A scan gets longer with each reader that it serves, up to this many readers.
const SCAN_READERS: usize = 4;

/// The row at which a scan stands. The methods read only what is needed of it.
pub trait Source {
    type Scan: Scan;
    type Offer<'a>: Offer
    where
        Self: 'a;

    /// The number of its backend.
    fn number(&self, scan: &Self::Scan) -> i32;
    /// Whether its backend was deleted. If not, the worker may not have loaded the backend yet.
    fn is_deleted(&mut self, scan: &Self::Scan) -> bool;
    /// The hash slot of its stream. `reader`: the index of any reader of its backend.
    fn hash_slot(&mut self, scan: &Self::Scan, reader: usize) -> u16;
    /// Why it cannot be read; `None` if it can.
    fn unreadable(&mut self, scan: &Self::Scan) -> Option<String>;
    /// Whether it may get another number soon, because it was inserted without the table's trigger: its backend waits.
    fn awaits_sweep(&mut self, _scan: &Self::Scan, _key: Key) -> bool {
        false
    }
    /// Calls `f` with the event of the row, for one reader.
    fn with_event<R>(&mut self, scan: &Self::Scan, reader: usize, f: impl FnOnce(Self::Offer<'_>) -> R) -> R;
}

/// The event of a row, offered to its backend.
pub trait Offer {
    fn delivery(&self) -> &Delivery;
    fn stream(&self) -> &Rc<str>;
    fn hash_slot(&self) -> u16;
    /// Whether it was refused, failed, or accepted out of turn.
    fn is_written_down(&self) -> bool;
    /// A buffer for a batch, begun as the backend needs it.
    fn buffer(&mut self) -> Vec<u8>;
    /// Appends it to a batch.
    fn encode(self, batch: &mut OpenBatch) -> Result<BatchedEvent, NotEncoded>;
}

/// Why an event could not be appended to a batch.
#[derive(Debug)]
pub enum NotEncoded {
    /// It will never be possible, for this reason.
    Impossible(String),
    /// There is no memory for it now.
    NoMemory,
}

/// How much one pass does.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A batch is full with this many events or bytes.
    pub batch_events: usize,
    pub batch_bytes: usize,
    /// How many rows it may meet for each reader.
    pub steps: usize,
    /// If others wait for it, it ends after this many rows.
    pub least_steps: usize,
    /// How many rows it may write down as waiting or failed for each reader, which takes a millisecond or two. After
    /// that, other readers get their turn.
    pub records: usize,
}

impl Limits {
    pub fn of(batch_events: usize) -> Self {
        Self {
            batch_events,
            batch_bytes: BATCH_BYTES,
            steps: SCAN_STEPS,
            least_steps: 256,
            records: 250,
        }
    }
}

/// What a pass collects for one reader.
pub struct Collector {
    /// Its index among the backends.
    pub index: usize,
    number: i32,
    lane: Option<u16>,
    role: Role,
    /// Where it stood: it has what `from` sees, and rows up to `after`.
    from: Arc<Tick>,
    after: i64,
    room: Window,
    pub built: Vec<BuiltBatch>,
    open: Option<OpenBatch>,
    /// What has to be written down.
    pub records: Vec<Record>,
    /// Rows that must not be sent when they are read again: accepted earlier beyond a gap, or parked now.
    pub skipped: Vec<i64>,
    /// How far it has come.
    pub end: Position,
    /// Whether it met a row that it has no room for.
    pub is_stopped: bool,
    /// That row may get another number soon.
    pub awaits_sweep: bool,
    /// The hash slot of that row, if the slot has no lane.
    pub found: Option<u16>,
    /// The stream of that row, if it is full.
    pub full: Option<Rc<str>>,
    /// Whether there was no memory for that row.
    pub lacks_memory: bool,
    /// Numbers of entries for streams that have limits.
    placed: HashMap<Rc<str>, i64>,
    /// Whether it only passes rows of others.
    passes_by: bool,
}

impl Collector {
    pub fn new(index: usize, number: i32, lane: Option<u16>, role: Role, delivery: &Delivery) -> Self {
        Self {
            index,
            number,
            lane,
            role,
            from: delivery.position().from.clone(),
            after: delivery.position().last_seq(),
            room: delivery.room().unwrap_or_default(),
            built: Vec::new(),
            open: None,
            records: Vec::new(),
            skipped: Vec::new(),
            end: delivery.position().clone(),
            is_stopped: false,
            awaits_sweep: false,
            found: None,
            full: None,
            lacks_memory: false,
            placed: HashMap::new(),
            passes_by: false,
        }
    }

    /// The reader of a backend that does not send: it passes rows of others, and stops before the first of its own,
    /// whatever would become of that row.
    pub fn passing_by(self) -> Self {
        Self {
            passes_by: true,
            ..self
        }
    }

    pub fn passes_by(&self) -> bool {
        self.passes_by
    }

    /// Whether it has met a row of its own.
    pub fn has_found(&self) -> bool {
        let has_written = !self.skipped.is_empty() || !self.records.is_empty();
        self.is_stopped || self.open.is_some() || !self.built.is_empty() || has_written
    }

    /// Whether another row may be added.
    #[inline]
    fn has_room(&self) -> bool {
        self.room.events > 0 && (self.open.is_some() || (self.room.batches > 0 && self.room.bytes > 0))
    }

    /// Whether it can wait for others: its sender has enough to do, or there is no sender.
    fn can_wait(&self) -> bool {
        !self.passes_by && (self.role != Role::Redis || self.room.supply() != Supply::Low)
    }

    fn close_batch(&mut self, end: Position) {
        if let Some(batch) = self.open.take() {
            self.room.bytes = self.room.bytes.saturating_sub(batch.bytes.len());
            let contents = Contents::Rows { end };
            self.built.push(BuiltBatch { batch, contents });
        }
    }

    fn fail(&mut self, seq: i64, error: &str) {
        let (attempts, error) = (0, error.into());
        self.records.push(Record::Fail { seq, attempts, error });
    }

    fn park(&mut self, seq: i64) {
        self.records.push(Record::Park {
            seq,
            attempts: 0,
            error: "waits behind an event of its stream that Redis refused".into(),
        });
        self.skipped.push(seq);
    }
}

/// All backends, including those that take no part in the pass.
pub struct Backends {
    /// The numbers, in order. Rows with any other number belong to the reader of strays.
    numbers: Vec<i32>,
    /// Each backend that has lanes, and the lanes.
    lanes: BTreeSet<(i32, Option<u16>)>,
}

impl Backends {
    /// `all`: number, lane and role of each reader.
    pub fn of(all: impl Iterator<Item = (i32, Option<u16>, Role)> + Clone) -> Self {
        let mut numbers: Vec<i32> = all.clone().map(|(number, ..)| number).collect();
        // They are usually in order already.
        numbers.sort_unstable();
        let with_lanes = all.filter(|(_, lane, role)| *role == Role::Finder || lane.is_some());
        Self {
            numbers,
            lanes: with_lanes.flat_map(|(n, lane, _)| [(n, None), (n, lane)]).collect(),
        }
    }

    /// The number whose readers read rows of `number`. Number 0 stands for the reader of strays.
    #[inline]
    fn known(&self, number: i32) -> i32 {
        match self.numbers.binary_search(&number) {
            Ok(_) => number,
            Err(_) => 0,
        }
    }
}

/// One scan over a range for several readers.
pub struct Pass {
    from: Arc<Tick>,
    to: Arc<Tick>,
    /// The number of the last row.
    seq: i64,
    backends: Backends,
    limits: Limits,
    readers: Vec<Collector>,
}

impl Pass {
    pub fn new(group: &Group, readers: Vec<Collector>, backends: Backends, limits: Limits) -> Self {
        Self {
            from: group.from.clone(),
            to: group.to.clone(),
            seq: group.last_seq,
            backends,
            limits,
            readers,
        }
    }

    /// Reads on, but not for long if `is_wanted` says that others wait. The result may be handed over when the
    /// transaction has ended well.
    pub fn run<S, T>(mut self, table: &mut T, source: &mut S, is_wanted: &dyn Fn() -> bool) -> Vec<Collector>
    where
        S: Source,
        T: Table<Scan = S::Scan>,
    {
        let mut scan = RangeScan::open(table, &self.from, &self.to, self.seq);
        let mut is_at_end = false;
        let sending = self
            .readers
            .iter()
            .filter(|r| r.role == Role::Redis && !r.passes_by)
            .count();
        for step in 1..=self.limits.steps * sending.clamp(1, SCAN_READERS) {
            // A reader that meets only rows of others must get past them first, if it sends.
            let may_end = step % self.limits.least_steps == 0;
            let may_rest = |r: &Collector| r.passes_by || r.has_found();
            if may_end && self.readers.iter().any(may_rest) && is_wanted() {
                break;
            }
            match scan.step() {
                None => {
                    is_at_end = true;
                    break;
                }
                Some(Step::Passed(seq)) => self.seq = seq,
                Some(Step::Row(key)) => {
                    let has_stopped = match source.awaits_sweep(scan.current(), key) {
                        true => self.stop_all_of(source.number(scan.current()), key),
                        false => {
                            let refused_by = self.refused_by(source, scan.current(), key);
                            refused_by.map(|reader| self.stop(reader)).is_some()
                        }
                    };
                    if has_stopped && self.can_all_wait() {
                        break;
                    }
                    self.seq = key.seq;
                }
            }
        }
        drop(scan);
        self.end(is_at_end);
        self.readers
    }

    /// Gives a row to its reader. Returns the reader if it has no room for the row.
    #[inline]
    fn refused_by<S: Source>(&mut self, source: &mut S, scan: &S::Scan, key: Key) -> Option<usize> {
        let number = self.backends.known(source.number(scan));
        if let Some(error) = source.unreadable(scan) {
            return self.fail_unreadable(number, key, &error);
        }
        let reader = self.reader_of(source, scan, number, key)?;
        (!self.take(source, scan, reader, key.seq)).then_some(reader)
    }

    /// A reader has no room for the current row: it stays before that row.
    fn stop(&mut self, reader: usize) {
        let here = self.here(&self.readers[reader]);
        let reader = &mut self.readers[reader];
        reader.close_batch(here.clone());
        (reader.end, reader.is_stopped) = (here, true);
    }

    /// All readers of a backend stay before a row. False: there are none that have still to read it.
    #[cold]
    fn stop_all_of(&mut self, number: i32, key: Key) -> bool {
        let number = self.backends.known(number);
        let mut has_stopped = false;
        for index in 0..self.readers.len() {
            let reader = &self.readers[index];
            if reader.number == number && !reader.is_stopped && self.is_before(reader, key) {
                self.stop(index);
                self.readers[index].awaits_sweep = true;
                has_stopped = true;
            }
        }
        has_stopped
    }

    fn here(&self, reader: &Collector) -> Position {
        Position::towards(reader.from.clone(), self.to.clone(), self.seq)
    }

    /// Whether the others can wait where one reader has stopped, so that they stay in step and one scan continues to
    /// serve all. They do not wait for a reader that has no room because its Redis is slow: it is not part of the next
    /// pass.
    fn can_all_wait(&self) -> bool {
        self.readers.iter().all(|r| r.is_stopped || r.can_wait())
    }

    fn end(&mut self, is_at_end: bool) {
        for index in 0..self.readers.len() {
            // The scan has not reached the readers that stand further on.
            let reader = &self.readers[index];
            if !reader.is_stopped && (is_at_end || reader.after <= self.seq) {
                let end = match is_at_end {
                    true => Position::at(self.to.clone()),
                    false => self.here(reader),
                };
                let reader = &mut self.readers[index];
                reader.close_batch(end.clone());
                reader.end = end;
            }
        }
    }

    /// Whether a row lies before a reader.
    #[inline]
    fn is_before(&self, reader: &Collector, key: Key) -> bool {
        reader.after < key.seq && (Arc::ptr_eq(&reader.from, &self.from) || !reader.from.snapshot.sees(key.xid))
    }

    /// The reader of a row: it belongs to the row's backend, takes part, stands before the row, and has not stopped.
    fn reader_of<S: Source>(&self, source: &mut S, scan: &S::Scan, number: i32, key: Key) -> Option<usize> {
        let lane = match self.backends.lanes.contains(&(number, None)) {
            true => Some(self.lane_of(source, scan, number)?),
            false => None,
        };
        let is_its = |r: &Collector| r.number == number && lane.is_none_or(|lane| r.lane == lane) && !r.is_stopped;
        let reader = self.readers.iter().position(is_its)?;
        self.is_before(&self.readers[reader], key).then_some(reader)
    }

    /// In a cluster, the lane of the row's hash slot. An inner `None`: the slot has no lane, and the finder must see
    /// the row.
    fn lane_of<S: Source>(&self, source: &mut S, scan: &S::Scan, number: i32) -> Option<Option<u16>> {
        let of_backend = self.readers.iter().find(|r| r.number == number)?;
        let slot = Some(source.hash_slot(scan, of_backend.index));
        Some(slot.filter(|slot| self.backends.lanes.contains(&(number, Some(*slot)))))
    }

    /// Any reader of the row's backend writes it down, because its lane may not be known. Returns the reader if it must
    /// not.
    fn fail_unreadable(&mut self, number: i32, key: Key, error: &str) -> Option<usize> {
        let is_its = |r: &Collector| r.number == number && !r.is_stopped && self.is_before(r, key);
        let reader = self.readers.iter().position(is_its)?;
        if self.readers[reader].passes_by {
            return Some(reader);
        }
        self.readers[reader].fail(key.seq, error);
        None
    }

    /// Gives a row to a reader. False: the reader has no room.
    fn take<S: Source>(&mut self, source: &mut S, scan: &S::Scan, reader: usize, seq: i64) -> bool {
        let (limits, to) = (&self.limits, &self.to);
        let reader = &mut self.readers[reader];
        if reader.passes_by || reader.records.len() >= limits.records {
            return false;
        }
        match reader.role {
            // The backend is not loaded yet (the transaction that published the row also created it, and the row can be
            // visible before the worker hears of the backend), or its number was never assigned (a restore in another
            // order). The backend may still come.
            Role::Strays if !source.is_deleted(scan) => false,
            Role::Strays | Role::Deleted => {
                reader.fail(seq, "its backend was deleted");
                true
            }
            Role::Finder => {
                reader.found = Some(source.with_event(scan, reader.index, |event| event.hash_slot()));
                false
            }
            Role::Redis => source.with_event(scan, reader.index, |event| reader.add(event, seq, to, limits)),
        }
    }
}

impl Collector {
    /// Adds an event to its batch, or parks it. False: there is no room.
    #[inline]
    fn add(&mut self, mut event: impl Offer, seq: i64, to: &Arc<Tick>, limits: &Limits) -> bool {
        if event.delivery().may_be_written_down(seq) && event.is_written_down() {
            self.skipped.push(seq);
            return true;
        }
        match event.delivery().on_row(seq, event.stream()) {
            RowFate::Skip => {
                self.skipped.push(seq);
                return true;
            }
            RowFate::Park => {
                self.park(seq);
                return true;
            }
            RowFate::Send => {}
        }
        if !self.has_room() {
            return false;
        }
        if event.delivery().limits().is_some() && !self.place(&event) {
            return false;
        }
        let batch = self.open.get_or_insert_with(|| {
            self.room.batches -= 1;
            OpenBatch::new(event.buffer())
        });
        let encoded = event.encode(batch).map(|entry| batch.entries.push(entry));
        self.room.events -= usize::from(encoded.is_ok());
        let is_full = batch.is_full(limits.batch_events, limits.batch_bytes.min(self.room.whole_bytes));
        match encoded {
            Ok(()) => {}
            Err(NotEncoded::Impossible(error)) => self.fail(seq, &error),
            Err(NotEncoded::NoMemory) => return self.goes_without(),
        }
        if is_full {
            self.close_batch(Position::towards(self.from.clone(), to.clone(), seq));
        }
        true
    }

    /// There is no memory for an event: what is built is sent, and the event is read again. Returns that there is no
    /// room.
    #[cold]
    fn goes_without(&mut self) -> bool {
        self.lacks_memory = true;
        if self.open.as_ref().is_some_and(|batch| batch.entries.is_empty()) {
            self.open = None;
            self.room.batches += 1;
        }
        false
    }

    /// Takes a place in the event's stream. False: the stream has no place left.
    #[cold]
    fn place(&mut self, event: &impl Offer) -> bool {
        let stream = event.stream();
        let placed = self.placed.entry(stream.clone()).or_default();
        let room = event.delivery().limits().map_or(i64::MAX, |limits| limits.room(stream));
        if *placed >= room {
            self.full = Some(stream.clone());
            return false;
        }
        *placed += 1;
        true
    }
}
