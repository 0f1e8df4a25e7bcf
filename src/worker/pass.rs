//! One scan over a range for all backends that stand at one place: rows become entries of batches, or are written down.

use crate::server::guc;
use crate::tables::care;
use crate::tables::catalog::{self, Relations};
use crate::tables::events::EventsTable;
use crate::tables::row::{Row, attribute};
use crate::tables::{backends, refused};
use crate::worker::backend::{BATCH_BYTES, Backend, BuiltBatch, OpenBatch};
use pgrx::pg_sys;
use relay::delivery::RowFate;
use relay::delivery::flight::{BatchedEvent, Contents, Window};
use relay::delivery::refusal::{MOST_ATTEMPTS, Record, Retry};
use relay::fault::{self, Point};
use relay::reading::range::{Key, Position, RangeScan, Scan, Step, Table};
use relay::reading::role::Role;
use relay::reading::schedule::{Group, SCAN_STEPS, Supply};
use relay::reading::snapshot::Tick;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

/// Of the backends that one scan serves, so many count at most for how long it is.
const SCAN_BACKENDS: usize = 4;
/// Rows that one pass may write down as waiting or failed, for each backend: a millisecond or two. The others' events are looked at in
/// between.
const WRITTEN_DOWN: usize = 250;
/// A pass that others wait for ends after so many rows.
const LEAST_STEPS: usize = 256;

/// Reads on for a group of `backends`, and not for long if `is_wanted` for others. Needs a transaction; what comes back is to be handed over
/// once that has ended well.
pub fn read(backends: &mut [Backend], group: &Group, is_wanted: &dyn Fn() -> bool) -> Vec<Reader> {
    let relations = catalog::expect_relations();
    let mut table = EventsTable::open(&relations);
    let numbers: Vec<i32> = group.members.iter().map(|index| backends[*index].number).collect();
    // Number 0 reads rows of all that nobody knows.
    if !numbers.contains(&0) {
        table.want_only(numbers);
    }
    let mut pass = Pass {
        from: group.from.clone(),
        to: group.to.clone(),
        seq: group.last_seq,
        known: backends.iter().map(|b| b.number).collect(),
        lanes: lanes(backends),
        readers: group
            .members
            .iter()
            .map(|index| Reader::new(*index, &backends[*index]))
            .collect(),
        backends,
    };
    pass.run(&mut table, is_wanted);
    let mut readers = pass.readers;
    table.close();
    for reader in &mut readers {
        reader.write_down(&backends[reader.index]);
    }
    readers
}

/// Reads and encodes the event number `seq`, unless that is large work, for nothing. Needs a transaction.
pub fn rehearse(backend: &mut Backend, relations: &Relations, seq: i64) {
    let mut table = EventsTable::open(relations);
    let mut batch = OpenBatch::new(backend.buffer());
    let mut scan = table.by_seq(seq - 1, seq);
    if scan.advance().is_some() && !scan.row().is_large() {
        scan.row().with_event(|event| {
            let stream = backend.stream_of(event);
            let _ = backend.encode(&mut batch, &stream, event);
        });
        fault::reach(Point::AtRehearsal);
    }
    drop(scan);
    table.close();
    backend.keep(batch.bytes);
}

/// What a pass collects for one backend.
pub struct Reader {
    pub index: usize,
    number: i32,
    /// Where it stood: what `from` sees and rows up to `after` are others'.
    from: Arc<Tick>,
    after: i64,
    lane: Option<u16>,
    batches_left: usize,
    bytes_left: usize,
    pub built: Vec<BuiltBatch>,
    open: Option<OpenBatch>,
    records: Vec<Record>,
    /// Something was written down, which must be durable before a batch says that it lies behind.
    pub wrote: bool,
    /// Rows that are not to be sent if they are read once more: accepted before, beyond a gap, or parked now.
    pub skipped: Vec<i64>,
    /// How many events failed.
    pub failed: u64,
    /// How far it came.
    pub end: Position,
    /// It met a row for which it has no room.
    pub stopped: bool,
    /// That row's hash slot has no lane.
    pub found: Option<u16>,
}

impl Reader {
    fn new(index: usize, backend: &Backend) -> Self {
        let room = backend.delivery.room();
        Self {
            index,
            number: backend.number,
            from: backend.delivery.position().from.clone(),
            after: backend.delivery.position().last_seq(),
            lane: backend.lane(),
            found: None,
            batches_left: room.map_or(0, |r| r.batches),
            bytes_left: room.map_or(0, |r| r.bytes),
            built: Vec::new(),
            open: None,
            records: Vec::new(),
            wrote: false,
            skipped: Vec::new(),
            failed: 0,
            end: backend.delivery.position().clone(),
            stopped: false,
        }
    }

    /// Whether it has met a row of its own.
    pub fn has_found(&self) -> bool {
        self.stopped || self.open.is_some() || !self.built.is_empty() || !self.skipped.is_empty() || self.wrote
    }

    /// Whether another row may be added.
    fn has_room(&self) -> bool {
        self.open.is_some() || (self.batches_left > 0 && self.bytes_left > 0)
    }

    /// Whether it can wait for others: it has enough to do, or nothing to send.
    fn can_wait(&self, backend: &Backend) -> bool {
        let room = Window {
            batches: self.batches_left,
            bytes: self.bytes_left,
        };
        !backend.reads_for_redis() || room.supply() != Supply::Low
    }

    fn close_batch(&mut self, end: Position) {
        if let Some(batch) = self.open.take() {
            self.bytes_left = self.bytes_left.saturating_sub(batch.bytes.len());
            self.built.push(BuiltBatch {
                batch,
                contents: Contents::Rows { end },
            });
        }
    }

    /// Within the pass's transaction.
    fn write_down(&mut self, backend: &Backend) {
        if !self.records.is_empty() {
            self.wrote = true;
            self.failed = refused::record(backend.number, &std::mem::take(&mut self.records), None);
        }
    }
}

/// One scan over a range for several readers.
struct Pass<'a> {
    from: Arc<Tick>,
    to: Arc<Tick>,
    /// The row that was met last.
    seq: i64,
    /// Numbers of all backends; rows of any other are the strays' reader's.
    known: Vec<i32>,
    /// Lanes of all backends, by backend and hash slot; empty as long as none is a cluster's.
    lanes: BTreeSet<(i32, Option<u16>)>,
    backends: &'a mut [Backend],
    readers: Vec<Reader>,
}

impl Pass<'_> {
    fn here(&self, reader: &Reader) -> Position {
        Position::towards(reader.from.clone(), self.to.clone(), self.seq)
    }

    fn run(&mut self, table: &mut EventsTable, is_wanted: &dyn Fn() -> bool) {
        let rows = RowMemory::new();
        let mut scan = RangeScan::open(table, &self.from, &self.to, self.seq);
        let mut at_end = false;
        let sending = self
            .readers
            .iter()
            .filter(|r| self.backends[r.index].reads_for_redis())
            .count();
        for step in 1..=SCAN_STEPS * sending.clamp(1, SCAN_BACKENDS) {
            // Who passes by rows of others alone has to come through first.
            if step % LEAST_STEPS == 0 && self.readers.iter().any(Reader::has_found) && is_wanted() {
                break;
            }
            let key = match scan.step() {
                None => {
                    at_end = true;
                    break;
                }
                Some(Step::Passed(key)) => key,
                Some(Step::Row(key)) => {
                    let row = scan.current().row();
                    if let Some(error) = rows.within(|| care::unreadable(row)) {
                        self.fail_unreadable(row, key, error);
                    } else if let Some(reader) = self.reader_of(row, key, &rows)
                        && !rows.within(|| self.take(reader, row))
                    {
                        self.stop(reader);
                        if self.can_all_wait() {
                            break;
                        }
                    }
                    key
                }
            };
            self.seq = key.seq;
        }
        drop(scan);
        for index in 0..self.readers.len() {
            // Who stands further on has not been reached.
            let reader = &self.readers[index];
            if !reader.stopped && (at_end || reader.after <= self.seq) {
                let end = match at_end {
                    true => Position::at(self.to.clone()),
                    false => self.here(reader),
                };
                let reader = &mut self.readers[index];
                reader.close_batch(end.clone());
                reader.end = end;
            }
        }
    }

    /// Who takes a row of a backend, if it takes part, stands before it and has not stopped.
    fn reader_of(&self, row: &Row, key: Key, rows: &RowMemory) -> Option<usize> {
        let number = row.backend_number();
        let number = if self.known.contains(&number) { number } else { 0 };
        let reader = match self.lanes.contains(&(number, None)) {
            true => self.lane_of(number, row, rows)?,
            false => self.readers.iter().position(|r| r.number == number && !r.stopped)?,
        };
        let Reader { from, after, .. } = &self.readers[reader];
        let is_new = *after < key.seq && (Arc::ptr_eq(from, &self.from) || !from.snapshot.sees(key.xid));
        is_new.then_some(reader)
    }

    /// Whoever reads for the row's backend writes it down: of which lane it is may not be known.
    fn fail_unreadable(&mut self, row: &Row, key: Key, error: String) {
        let number = row.backend_number();
        let number = if self.known.contains(&number) { number } else { 0 };
        let (seq, of_pass) = (key.seq, self.from.clone());
        let is_its = |r: &&mut Reader| {
            let is_new = r.after < seq && (Arc::ptr_eq(&r.from, &of_pass) || !r.from.snapshot.sees(key.xid));
            r.number == number && !r.stopped && is_new
        };
        if let Some(reader) = self.readers.iter_mut().find(is_its) {
            let attempts = 0;
            let error = error.into();
            reader.records.push(Record::Fail { seq, attempts, error });
        }
    }

    /// Whether the others can wait where one has stopped: so they stay in step, and one scan goes on serving all. Not for one that has no
    /// room because its Redis is slow: it is not of the next pass.
    fn can_all_wait(&self) -> bool {
        self.readers
            .iter()
            .all(|r| r.stopped || r.can_wait(&self.backends[r.index]))
    }

    /// The same in a cluster: the lane of the row's hash slot, or who finds those that have none.
    fn lane_of(&self, number: i32, row: &Row, rows: &RowMemory) -> Option<usize> {
        let mut of_number = self.readers.iter().filter(|r| r.number == number);
        let backend = &self.backends[of_number.next()?.index];
        let hash_slot = rows.within(|| row.hash_slot(backend.stream()));
        let lane = Some(hash_slot).filter(|slot| self.lanes.contains(&(number, Some(*slot))));
        let is_its = |r: &Reader| r.number == number && r.lane == lane && !r.stopped;
        self.readers.iter().position(is_its)
    }

    /// A reader has no room for the row that was just met: it stays before it.
    fn stop(&mut self, reader: usize) {
        let here = self.here(&self.readers[reader]);
        let reader = &mut self.readers[reader];
        reader.close_batch(here.clone());
        (reader.end, reader.stopped) = (here, true);
    }

    /// Gives a row to a reader; false: it has no room.
    fn take(&mut self, reader: usize, row: &Row) -> bool {
        let seq = row.key().seq;
        let to = &self.to;
        let reader = &mut self.readers[reader];
        if reader.records.len() >= WRITTEN_DOWN {
            return false;
        }
        let backend = &mut self.backends[reader.index];
        match backend.role() {
            Role::Deleted => {
                reader.records.push(Record::Fail {
                    seq,
                    attempts: 0,
                    error: "its backend was deleted".into(),
                });
                return true;
            }
            Role::Strays => {
                // A backend that is not loaded yet (made by the transaction that published: we may see its rows before we
                // hear of it), or a number that was never given (a restore in another order): it may be on its way.
                if !backends::is_deleted(row.backend_number()) {
                    return false;
                }
                reader.records.push(Record::Fail {
                    seq,
                    attempts: 0,
                    error: "its backend was deleted".into(),
                });
                return true;
            }
            Role::Finder => {
                reader.found = Some(row.with_event(|event| backend.hash_slot_of(event)));
                return false;
            }
            Role::Redis => {}
        }
        row.with_event(|event| {
            let stream = backend.stream_of(event);
            if backend.delivery.may_be_written_down(seq) && refused::is_written_down(seq, event.event_id) {
                reader.skipped.push(seq);
                return true;
            }
            match backend.delivery.on_row(seq, &stream) {
                RowFate::Skip => {
                    reader.skipped.push(seq);
                    return true;
                }
                RowFate::Park => {
                    let error = "waits behind an event of its stream that Redis refused".into();
                    reader.records.push(Record::Park {
                        seq,
                        attempts: 0,
                        error,
                    });
                    reader.skipped.push(seq);
                    return true;
                }
                RowFate::Send => {}
            }
            if !reader.has_room() {
                return false;
            }
            let batch = reader.open.get_or_insert_with(|| {
                reader.batches_left -= 1;
                OpenBatch::new(backend.buffer())
            });
            match backend.encode(batch, &stream, event) {
                Ok(()) => batch.entries.push(entry(row, stream)),
                Err(error) => reader.records.push(Record::Fail {
                    seq,
                    attempts: 0,
                    error: error.to_string().into(),
                }),
            }
            if batch.is_full() {
                reader.close_batch(Position::towards(reader.from.clone(), to.clone(), seq));
            }
            true
        })
    }
}

/// Of each backend that has lanes: itself, and they.
fn lanes(backends: &[Backend]) -> BTreeSet<(i32, Option<u16>)> {
    let with_lanes = backends.iter().filter(|b| b.is_finder() || b.lane().is_some());
    with_lanes
        .flat_map(|b| [(b.number, None), (b.number, b.lane())])
        .collect()
}

/// What became of streams that were to be tried again.
#[derive(Default)]
pub struct Retried {
    /// A batch of their next events; `None`: there are none.
    pub batch: Option<BuiltBatch>,
    /// Streams of which no event waits any more.
    pub cleared: Vec<Rc<str>>,
    /// Those for which there was no room.
    pub put_back: Vec<Rc<str>>,
}

/// The batch for the next events of refused streams.
pub fn refused_batch(backend: &mut Backend, retries: &[Retry]) -> Retried {
    // One more says whether there are others.
    let wanted: Vec<_> = retries.iter().map(|r| (&*r.stream, r.count + 1)).collect();
    let waiting = refused::next_waiting(backend.number, backend.stream(), &wanted);
    let relations = catalog::expect_relations();
    let mut table = EventsTable::open(&relations);
    let mut batch = OpenBatch::new(backend.buffer());
    let (mut retried, mut all, mut gone) = (Retried::default(), Vec::new(), Vec::new());
    for (Retry { stream, count }, mut seqs) in retries.iter().zip(waiting) {
        if batch.bytes.len() >= BATCH_BYTES {
            retried.put_back.push(stream.clone());
            continue;
        }
        let mut is_whole = seqs.len() <= *count;
        seqs.truncate(*count);
        let before = batch.entries.len();
        for seq in seqs {
            if batch.bytes.len() >= BATCH_BYTES {
                is_whole = false;
                break;
            }
            let mut scan = table.by_seq(seq - 1, seq);
            match scan.advance() {
                Some(_) => add_refused(backend, &mut batch, scan.row()),
                None => gone.push(seq),
            }
        }
        match (batch.entries.len() > before, is_whole) {
            (true, true) => all.push(stream.clone()),
            (true, false) => {}
            (false, true) => retried.cleared.push(stream.clone()),
            (false, false) => retried.put_back.push(stream.clone()),
        }
    }
    table.close();
    if !gone.is_empty() {
        refused::forget(&gone);
    }
    if batch.entries.is_empty() {
        backend.keep(batch.bytes);
    } else {
        retried.batch = Some(BuiltBatch {
            batch,
            contents: Contents::Waiting { all },
        });
    }
    retried
}

fn add_refused(backend: &mut Backend, batch: &mut OpenBatch, row: &Row) {
    if let Some(error) = care::unreadable(row) {
        backend.failed(refused::fail(backend.number, &[row.key().seq], 0, &error));
        return;
    }
    row.with_event(|event| {
        let stream = backend.stream_of(event);
        match backend.encode(batch, &stream, event) {
            Ok(()) => batch.entries.push(entry(row, stream)),
            Err(error) => backend.failed(refused::fail(backend.number, &[row.key().seq], 0, &error.to_string())),
        }
    });
}

/// Up to `count` events of these streams, whose heads have failed for these reasons: they fail, too. Also the streams of which no other
/// is left.
pub fn fail_waiting(backend: &Backend, failing: &[(Rc<str>, Rc<str>)], count: usize) -> (Vec<Record>, Vec<Rc<str>>) {
    let each = (count / failing.len().max(1)).max(1);
    let wanted: Vec<_> = failing.iter().map(|(stream, _)| (&**stream, each)).collect();
    let waiting = refused::next_waiting(backend.number, backend.stream(), &wanted);
    let (mut records, mut through) = (Vec::new(), Vec::new());
    for ((stream, error), seqs) in failing.iter().zip(waiting) {
        if seqs.len() < each {
            through.push(stream.clone());
        }
        records.extend(seqs.into_iter().map(|seq| Record::Fail {
            seq,
            attempts: 1,
            error: error.clone(),
        }));
    }
    (records, through)
}

fn entry(row: &Row, stream: Rc<str>) -> BatchedEvent {
    let max_retries = row
        .i32(attribute::MAX_RETRIES)
        .unwrap_or_else(|| guc::MAX_RETRIES.get());
    BatchedEvent {
        seq: row.key().seq,
        stream,
        // A row may have come past the trigger.
        max_attempts: max_retries.clamp(1, MOST_ATTEMPTS) as u32,
    }
}

/// Memory for values that had to be expanded, given back after each row.
struct RowMemory {
    context: pg_sys::MemoryContext,
}

impl RowMemory {
    fn new() -> Self {
        // SAFETY: a child of the transaction's context, which frees it at the latest.
        let context = unsafe {
            pg_sys::AllocSetContextCreateInternal(
                pg_sys::CurrentMemoryContext,
                c"outbox_relay row".as_ptr(),
                0,
                pg_sys::ALLOCSET_DEFAULT_INITSIZE as usize,
                pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
            )
        };
        Self { context }
    }

    fn within<R>(&self, f: impl FnOnce() -> R) -> R {
        // SAFETY: the context is alive; an ERROR in `f` aborts the transaction, which resets the current context.
        unsafe {
            let before = pg_sys::CurrentMemoryContext;
            pg_sys::CurrentMemoryContext = self.context;
            let result = f();
            pg_sys::CurrentMemoryContext = before;
            if !(*self.context).isReset {
                pg_sys::MemoryContextReset(self.context);
            }
            result
        }
    }
}
