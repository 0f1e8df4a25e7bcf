//! Connects [`relay::delivery::cut`] with the tables: the rows that a scan finds, and the refused events that wait.

use crate::server::{error, guc};
use crate::tables::care;
use crate::tables::catalog::{self, Relations};
use crate::tables::events::{EventsScan, EventsTable};
use crate::tables::row::{Row, attribute};
use crate::tables::{backends, refused};
use crate::worker::backend::Backend;
use crate::worker::mended::Sweep;
use pgrx::pg_sys;
use relay::delivery::Delivery;
use relay::delivery::batch::{BATCH_BYTES, BuiltBatch, OpenBatch};
use relay::delivery::cut::{Backends, Collector, Limits, NotEncoded, Offer, Pass, Source};
use relay::delivery::flight::{BatchedEvent, Contents};
use relay::delivery::refusal::{MOST_ATTEMPTS, Record, Retry};
use relay::event::{ConfigError, Event, NoEntry};
use relay::fault::{self, Point};
use relay::reading::foreign::Written;
use relay::reading::range::{Key, Scan, Table};
use relay::reading::schedule::Group;
use std::rc::Rc;

/// The result of a pass for one of its readers.
pub(super) struct Outcome {
    pub reader: Collector,
    /// Whether it has found a row for this reader.
    pub has_found: bool,
    /// Whether something was written down, which must be durable before a later batch is sent.
    pub wrote: bool,
    /// How many events failed.
    pub failed: u64,
}

/// Reads on for a group of `backends`, but not for long if `is_wanted` says that others have work. Needs a transaction.
/// The result may be handed over when that has ended well.
pub(super) fn read(
    backends: &mut [Backend],
    group: &Group,
    sweep: Option<&Sweep>,
    is_wanted: &dyn Fn() -> bool,
) -> Vec<Outcome> {
    let readers = collectors(backends, group).collect();
    let limits = Limits::of(guc::BATCH_SIZE.get() as usize);
    let readers = run(backends, group, sweep, readers, limits, is_wanted);
    readers
        .into_iter()
        .map(|reader| written_down(reader, backends))
        .collect()
}

/// Passes rows of others, `steps` at most, for a group of backends that do not send. Otherwise as [`read`].
pub(super) fn pass_by(
    backends: &mut [Backend],
    group: &Group,
    steps: usize,
    is_wanted: &dyn Fn() -> bool,
) -> Vec<Collector> {
    let readers = collectors(backends, group).map(Collector::passing_by).collect();
    let limits = Limits { steps, ..Limits::of(1) };
    run(backends, group, None, readers, limits, is_wanted)
}

fn collectors(backends: &[Backend], group: &Group) -> impl Iterator<Item = Collector> {
    group.members.iter().map(|index| {
        let b = &backends[*index];
        Collector::new(*index, b.number, b.lane(), b.role(), &b.delivery)
    })
}

fn run(
    backends: &mut [Backend],
    group: &Group,
    sweep: Option<&Sweep>,
    readers: Vec<Collector>,
    limits: Limits,
    is_wanted: &dyn Fn() -> bool,
) -> Vec<Collector> {
    let relations = catalog::expect_relations();
    fault::reach(Point::BeforeReadLock);
    let mut table = EventsTable::open(&relations);
    let numbers: Vec<i32> = group.members.iter().map(|index| backends[*index].number).collect();
    // Number 0 stands for the rows of all numbers that no backend has.
    if !numbers.contains(&0) {
        table.want_only(numbers);
    }
    let all = Backends::of(backends.iter().map(|b| (b.number, b.lane(), b.role())));
    let pass = Pass::new(group, readers, all, limits);
    let mut rows = ScannedRows {
        backends,
        sweep,
        memory: RowMemory::new(),
    };
    let readers = pass.run(&mut table, &mut rows, is_wanted);
    table.close();
    readers
}

/// Within the pass's transaction.
fn written_down(mut reader: Collector, backends: &mut [Backend]) -> Outcome {
    let (has_found, records) = (reader.has_found(), std::mem::take(&mut reader.records));
    let wrote = !records.is_empty();
    let failed = match wrote {
        true => {
            let backend = &mut backends[reader.index];
            backend.heads.heed(&records);
            refused::record(backend.number, &records, None)
        }
        false => 0,
    };
    Outcome {
        reader,
        has_found,
        wrote,
        failed,
    }
}

/// The rows of a pass, for the backends that it reads for.
struct ScannedRows<'a> {
    backends: &'a mut [Backend],
    sweep: Option<&'a Sweep>,
    memory: RowMemory,
}

impl Source for ScannedRows<'_> {
    type Scan = EventsScan;
    type Offer<'a>
        = RowOffer<'a>
    where
        Self: 'a;

    fn number(&self, scan: &EventsScan) -> i32 {
        scan.row().backend_number()
    }

    fn is_deleted(&mut self, scan: &EventsScan) -> bool {
        self.memory.within(|| backends::is_deleted(scan.row().backend_number()))
    }

    fn hash_slot(&mut self, scan: &EventsScan, reader: usize) -> u16 {
        self.memory
            .within(|| scan.row().hash_slot(self.backends[reader].stream()))
    }

    fn unreadable(&mut self, scan: &EventsScan) -> Option<String> {
        self.memory.within(|| care::unreadable(scan.row()))
    }

    fn awaits_sweep(&mut self, scan: &EventsScan, key: Key) -> bool {
        self.sweep.is_some_and(|sweep| {
            let row = Written {
                seq: key.seq,
                xid: key.xid,
                xmin: scan.row().written_by(),
            };
            // SAFETY: reads the counter under its lock; the row was read before.
            sweep.may_move(&row, unsafe { pg_sys::ReadNextFullTransactionId().value })
        })
    }

    fn with_event<R>(&mut self, scan: &EventsScan, reader: usize, f: impl FnOnce(RowOffer<'_>) -> R) -> R {
        let (row, backend) = (scan.row(), &mut self.backends[reader]);
        self.memory.within(|| {
            row.with_event(|event| {
                let stream = backend.stream_of(event);
                f(RowOffer {
                    backend,
                    row,
                    event,
                    stream,
                })
            })
        })
    }
}

/// A row as an event, offered to one reader.
struct RowOffer<'a> {
    backend: &'a mut Backend,
    row: &'a Row,
    event: &'a Event<'a>,
    stream: Rc<str>,
}

impl Offer for RowOffer<'_> {
    fn delivery(&self) -> &Delivery {
        &self.backend.delivery
    }

    fn stream(&self) -> &Rc<str> {
        &self.stream
    }

    fn hash_slot(&self) -> u16 {
        self.backend.hash_slot_of(self.event)
    }

    fn is_written_down(&self) -> bool {
        refused::is_written_down(self.row.key().seq, self.event.event_id)
    }

    fn buffer(&mut self) -> Vec<u8> {
        self.backend.buffer()
    }

    fn encode(self, batch: &mut OpenBatch) -> Result<BatchedEvent, NotEncoded> {
        match self.backend.encode(batch, &self.stream, self.event) {
            Ok(()) => Ok(batched(
                self.row,
                self.event,
                self.stream,
                self.backend.metered.committed_after_us,
            )),
            Err(NoEntry::Config(ConfigError::NoMemory(_))) => Err(NotEncoded::NoMemory),
            Err(error) => Err(NotEncoded::Impossible(error.to_string())),
        }
    }
}

/// Reads and encodes the event with number `seq`, and drops the result. Does nothing if that is much work. Needs a
/// transaction.
pub(super) fn rehearse(backend: &mut Backend, relations: &Relations, seq: i64) {
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

/// What became of streams that were due to be tried again.
#[derive(Default)]
pub(super) struct Retried {
    /// A batch of their next events; `None`: there are none.
    pub batch: Option<BuiltBatch>,
    /// Streams in which no event waits any more.
    pub cleared: Vec<Rc<str>>,
    /// Streams for which there was no room.
    pub put_back: Vec<Rc<str>>,
}

/// Builds the batch of the next events in refused streams.
pub(super) fn refused_batch(backend: &mut Backend, retries: &[Retry]) -> Retried {
    // One more says whether there are others.
    let wanted = |r: &Retry| refused::StreamSearch {
        stream: r.stream.clone(),
        count: r.count + 1,
        first: backend.heads.of(&r.stream),
    };
    let wanted: Vec<_> = retries.iter().map(wanted).collect();
    let waiting = refused::next_waiting(backend.number, backend.stream(), &wanted);
    let relations = catalog::expect_relations();
    let mut table = EventsTable::open(&relations);
    let mut batch = OpenBatch::new(backend.buffer());
    let (mut retried, mut all, mut gone) = (Retried::default(), Vec::new(), Vec::new());
    let most = BATCH_BYTES.min(backend.delivery.most_bytes());
    let mut is_full = false;
    for (Retry { stream, count }, mut seqs) in retries.iter().zip(waiting) {
        if is_full {
            retried.put_back.push(stream.clone());
            continue;
        }
        let mut is_whole = backend.heads.found(stream, &seqs, count + 1);
        seqs.truncate(*count);
        let before = batch.entries.len();
        for seq in seqs {
            if is_full {
                is_whole = false;
                break;
            }
            let mut scan = table.by_seq(seq - 1, seq);
            match scan.advance() {
                Some(_) if add_refused(backend, &mut batch, scan.row()) => is_full = batch.is_full(usize::MAX, most),
                Some(_) => (is_full, is_whole) = (true, false),
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

/// False: there is no memory for it beside the others.
fn add_refused(backend: &mut Backend, batch: &mut OpenBatch, row: &Row) -> bool {
    if let Some(error) = care::unreadable(row) {
        backend.failed(refused::fail(backend.number, &[row.key().seq], 0, &error));
        return true;
    }
    row.with_event(|event| {
        let stream = backend.stream_of(event);
        match backend.encode(batch, &stream, event) {
            // Only the time since it was published is still known.
            Ok(()) => batch.entries.push(batched(row, event, stream, 0)),
            Err(NoEntry::Config(ConfigError::NoMemory(_))) if batch.entries.is_empty() => error::no_memory(),
            Err(NoEntry::Config(ConfigError::NoMemory(_))) => return false,
            Err(error) => backend.failed(refused::fail(backend.number, &[row.key().seq], 0, &error.to_string())),
        }
        true
    })
}

/// Fails up to `count` events of these streams, whose heads have failed for these reasons. Also returns the streams in
/// which no event is left.
pub(super) fn fail_waiting(
    backend: &mut Backend,
    failing: &[(Rc<str>, Rc<str>)],
    count: usize,
) -> (Vec<Record>, Vec<Rc<str>>) {
    let each = (count / failing.len().max(1)).max(1);
    let wanted = |(stream, _): &(Rc<str>, Rc<str>)| refused::StreamSearch {
        stream: stream.clone(),
        count: each,
        first: backend.heads.of(stream),
    };
    let wanted: Vec<_> = failing.iter().map(wanted).collect();
    let waiting = refused::next_waiting(backend.number, backend.stream(), &wanted);
    let (mut records, mut through) = (Vec::new(), Vec::new());
    for ((stream, error), seqs) in failing.iter().zip(waiting) {
        if backend.heads.found(stream, &seqs, each) {
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

/// `committed_after_us`: all rows of the scan were committed after this time.
fn batched(row: &Row, event: &Event<'_>, stream: Rc<str>, committed_after_us: i64) -> BatchedEvent {
    let max_retries = row
        .i32(attribute::MAX_RETRIES)
        .unwrap_or_else(|| guc::MAX_RETRIES.get());
    BatchedEvent {
        seq: row.key().seq,
        stream,
        // The row may have been inserted without the trigger.
        max_attempts: max_retries.clamp(1, MOST_ATTEMPTS) as u32,
        committed_after_us: committed_after_us.max(event.created_at_us),
    }
}

/// Memory for values that have to be expanded, released after each row.
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
        // SAFETY: the context exists; an ERROR in `f` aborts the transaction, which resets the current context.
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
