//! Reads rows of our tables without SQL: an event as it is sent, and scans of `outbox.events` for the reader.

use crate::tables::catalog;
use crate::tables::catalog::Relations;
use crate::tables::missing::Index;
use crate::tables::row::Row;
use crate::tables::row::attribute;
use pgrx::pg_sys;
use relay::reading::range::{Scan, Step, Table};
use std::rc::Rc;

/// Functions that are called for each row, without a guard around each call.
mod hot {
    use pgrx::pg_sys;

    // SAFETY: the declarations of access/genam.h and access/htup_details.h; called within a guard, since they may raise
    // an ERROR.
    unsafe extern "C-unwind" {
        pub(super) fn systable_getnext_ordered(
            scan: pg_sys::SysScanDesc,
            direction: pg_sys::ScanDirection::Type,
        ) -> pg_sys::HeapTuple;
        pub(super) fn index_getnext_tid(
            scan: pg_sys::IndexScanDesc,
            direction: pg_sys::ScanDirection::Type,
        ) -> pg_sys::ItemPointer;
        pub(super) fn index_fetch_heap(scan: pg_sys::IndexScanDesc, tuple_slot: *mut pg_sys::TupleTableSlot) -> bool;
        pub(super) fn ExecFetchSlotHeapTuple(
            tuple_slot: *mut pg_sys::TupleTableSlot,
            materialize: bool,
            should_free: *mut bool,
        ) -> pg_sys::HeapTuple;
        pub(super) fn heap_deform_tuple(
            tuple: pg_sys::HeapTuple,
            descriptor: pg_sys::TupleDesc,
            values: *mut pg_sys::Datum,
            nulls: *mut bool,
        );
    }
}

/// Whether an open transaction has inserted or deleted an event with this id. Does not wait. Needs the index.
pub(crate) fn is_contested(relations: &Relations, event_id: &[u8; 16]) -> bool {
    // SAFETY: an index look-up by an equality key of the column's type. For each row that it shows, a dirty snapshot
    // tells which transaction is about to insert or delete it. The snapshot is used only here.
    unsafe {
        let (events, relations) = catalog::open_table(relations.events, LOCK);
        let mut dirty: pg_sys::SnapshotData = std::mem::zeroed();
        dirty.snapshot_type = pg_sys::SnapshotType::SNAPSHOT_DIRTY;
        let mut entry: pg_sys::ScanKeyData = std::mem::zeroed();
        pg_sys::ScanKeyInit(
            &mut entry,
            attribute::EVENT_ID as i16,
            pg_sys::BTEqualStrategyNumber as u16,
            pg_sys::Oid::from(pg_sys::F_UUID_EQ),
            pg_sys::Datum::from(event_id.as_ptr()),
        );
        let key = relations.events_id_key;
        if key == pg_sys::InvalidOid {
            Index::EventId.refuse();
        }
        let scan = pg_sys::systable_beginscan(events, key, true, &mut dirty, 1, &mut entry);
        let mut is_contested = false;
        while !is_contested && !pg_sys::systable_getnext(scan).is_null() {
            is_contested = dirty.xmin != pg_sys::InvalidTransactionId || dirty.xmax != pg_sys::InvalidTransactionId;
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(events, LOCK);
        is_contested
    }
}

/// `outbox.events`, open for the reader within one transaction.
pub(crate) struct EventsTable {
    events: pg_sys::Relation,
    seq_key: pg_sys::Relation,
    xid_key: pg_sys::Relation,
    snapshot: pg_sys::Snapshot,
    /// Numbers of the backends whose rows are read; `None`: all.
    wanted: Option<Rc<[i32]>>,
    /// Whether the index by number, and that by transaction, says whose a row is.
    seq_key_tells: bool,
    xid_key_tells: bool,
}

const LOCK: pg_sys::LOCKMODE = pg_sys::AccessShareLock as pg_sys::LOCKMODE;

impl EventsTable {
    /// Opens the table and registers a new snapshot. Both are released at the end of the transaction at the latest.
    pub(crate) fn open(relations: &Relations) -> Self {
        let (events, relations) = catalog::open_table(relations.events, LOCK);
        for (index, name) in [
            (relations.events_seq_key, Index::Seq),
            (relations.events_xid_key, Index::Xid),
        ] {
            if index == pg_sys::InvalidOid {
                name.refuse();
            }
        }
        // SAFETY: opens relations by OID within a transaction; raises an ERROR if one no longer exists.
        unsafe {
            Self {
                events,
                seq_key: pg_sys::index_open(relations.events_seq_key, LOCK),
                xid_key: pg_sys::index_open(relations.events_xid_key, LOCK),
                snapshot: pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot()),
                wanted: None,
                seq_key_tells: false,
                xid_key_tells: false,
            }
        }
    }

    /// From now on, scans pass by rows of other backends, as far as their index tells whose they are.
    pub(crate) fn want_only(&mut self, numbers: Vec<i32>) {
        // SAFETY: an open index; the first columns of it, of which there are so many.
        let tells = |key: pg_sys::Relation, place: usize| unsafe {
            let index = (*key).rd_index;
            let columns = std::slice::from_raw_parts((*index).indkey.values.as_ptr(), (*index).indnatts as usize);
            columns.get(place) == Some(&(attribute::BACKEND_NUMBER as i16))
        };
        (self.seq_key_tells, self.xid_key_tells) = (tells(self.seq_key, 1), tells(self.xid_key, 2));
        self.wanted = Some(numbers.into());
    }

    /// Whether the table and all its indexes can be opened without waiting. The locks are kept until the end of the
    /// transaction.
    pub(crate) fn is_open_to_all(relations: &Relations) -> bool {
        let needed = [
            relations.events,
            relations.events_seq_key,
            relations.events_xid_key,
            relations.sequence,
        ];
        // SAFETY: tries to take a lock within a transaction.
        let can_lock = |relation| unsafe { pg_sys::ConditionalLockRelationOid(relation, LOCK) };
        needed
            .iter()
            .all(|relation| *relation != pg_sys::InvalidOid && can_lock(*relation))
    }

    pub(crate) fn close(self) {
        // SAFETY: closes what open() has opened; scans were dropped before, and nothing borrows from it any more.
        unsafe {
            pg_sys::UnregisterSnapshot(self.snapshot);
            pg_sys::index_close(self.xid_key, LOCK);
            pg_sys::index_close(self.seq_key, LOCK);
            pg_sys::table_close(self.events, LOCK);
        }
    }

    /// The lowest number, up to `upto`, that transactions from `xid` on have inserted, whether or not they committed.
    pub(crate) fn lowest_since(&self, xid: u64, upto: i64) -> Option<i64> {
        let keys = [
            xid_key(pg_sys::BTGreaterEqualStrategyNumber, pg_sys::F_XID8GE, xid),
            seq_up_to(upto),
        ];
        // SAFETY: a static snapshot.
        let mut scan = self.scan_as(&raw mut pg_sys::SnapshotAnyData, self.xid_key, &keys);
        std::iter::from_fn(|| scan.advance()).map(Step::seq).min()
    }

    fn scan(&self, index: pg_sys::Relation, keys: &[ScanKey]) -> EventsScan {
        self.scan_as(self.snapshot, index, keys)
    }

    fn scan_as(&self, snapshot: pg_sys::Snapshot, index: pg_sys::Relation, keys: &[ScanKey]) -> EventsScan {
        // SAFETY: the keys are on columns of the index, with comparison functions of their types; the scan copies them.
        unsafe {
            let mut entries: [pg_sys::ScanKeyData; 3] = std::array::from_fn(|_| std::mem::zeroed());
            for (entry, key) in entries.iter_mut().zip(keys) {
                pg_sys::ScanKeyInit(
                    entry,
                    key.attribute as i16,
                    key.strategy as u16,
                    pg_sys::Oid::from(key.function),
                    key.argument,
                );
            }
            let scan = pg_sys::systable_beginscan_ordered(
                self.events,
                index,
                snapshot,
                keys.len() as i32,
                entries.as_mut_ptr(),
            );
            let descriptor = (*self.events).rd_att;
            Row::expect_room(descriptor);
            EventsScan {
                scan,
                row: Box::new(Row::empty()),
                descriptor,
                wanted: None,
                is_at_end: false,
            }
        }
    }
}

struct ScanKey {
    attribute: usize,
    strategy: u32,
    function: u32,
    argument: pg_sys::Datum,
}

fn seq_above(seq: i64) -> ScanKey {
    ScanKey {
        attribute: attribute::SEQ,
        strategy: pg_sys::BTGreaterStrategyNumber,
        function: pg_sys::F_INT8GT,
        argument: pg_sys::Datum::from(seq),
    }
}

fn seq_up_to(seq: i64) -> ScanKey {
    ScanKey {
        attribute: attribute::SEQ,
        strategy: pg_sys::BTLessEqualStrategyNumber,
        function: pg_sys::F_INT8LE,
        argument: pg_sys::Datum::from(seq),
    }
}

fn xid_key(strategy: u32, function: u32, xid: u64) -> ScanKey {
    ScanKey {
        attribute: attribute::XID,
        strategy,
        function,
        argument: pg_sys::Datum::from(xid),
    }
}

impl Table for EventsTable {
    type Scan = EventsScan;

    fn by_seq(&mut self, after: i64, upto: i64) -> EventsScan {
        let scan = self.scan(self.seq_key, &[seq_above(after), seq_up_to(upto)]);
        match &self.wanted {
            Some(wanted) if self.seq_key_tells => scan.wanting(wanted.clone(), 0),
            _ => scan,
        }
    }

    fn by_xid(&mut self, xid: u64, after: i64, upto: i64) -> EventsScan {
        let equal = xid_key(pg_sys::BTEqualStrategyNumber, pg_sys::F_XID8EQ, xid);
        let scan = self.scan(self.xid_key, &[equal, seq_above(after), seq_up_to(upto)]);
        match &self.wanted {
            // Behind the transaction's id.
            Some(wanted) if self.xid_key_tells => scan.wanting(wanted.clone(), size_of::<u64>()),
            _ => scan,
        }
    }

    fn first_xid(&mut self, from: u64, before: u64) -> Option<u64> {
        if from >= before {
            return None;
        }
        let low = xid_key(pg_sys::BTGreaterEqualStrategyNumber, pg_sys::F_XID8GE, from);
        let high = xid_key(pg_sys::BTLessStrategyNumber, pg_sys::F_XID8LT, before);
        let first = self.scan(self.xid_key, &[low, high]).advance();
        first.and_then(Step::row).map(|key| key.xid)
    }
}

/// A scan of `outbox.events` in index order.
pub(crate) struct EventsScan {
    scan: pg_sys::SysScanDesc,
    row: Box<Row>,
    descriptor: pg_sys::TupleDesc,
    /// Rows of other backends are passed by; the index says whose each is.
    wanted: Option<Wanted>,
    /// It has come to its end. (Asked once more, Postgres would begin anew.)
    is_at_end: bool,
}

/// Which rows are wanted of a scan, by what its index says.
struct Wanted {
    numbers: Rc<[i32]>,
    /// Where the row's number stands in an entry; the backend's is behind it.
    seq_at: usize,
}

/// What a scan has come to.
enum Met {
    End,
    Row(pg_sys::HeapTuple),
    /// Rows of other backends, up to this number.
    Others(i64),
}

/// The most rows of other backends that are skipped in one step.
const OTHERS_AT_ONCE: usize = 16;

impl EventsScan {
    /// The current row; its texts are valid until the scan moves on.
    pub(crate) fn row(&self) -> &Row {
        &self.row
    }

    /// The index has, behind the row's number at `seq_at`, that of the backend.
    fn wanting(mut self, numbers: Rc<[i32]>, seq_at: usize) -> Self {
        // SAFETY: the scan was just opened. It is told to give the index's entries as well, which must be known before
        // it begins; the keys stay as they are.
        unsafe {
            let scan = (*self.scan).iscan;
            (*scan).xs_want_itup = true;
            let (keys, orders) = ((*scan).numberOfKeys, (*scan).numberOfOrderBys);
            pg_sys::index_rescan(scan, std::ptr::null_mut(), keys, std::ptr::null_mut(), orders);
        }
        self.wanted = Some(Wanted { numbers, seq_at });
        self
    }

    /// The next row.
    ///
    /// # Safety
    /// An open scan that is not at its end; within a guard.
    unsafe fn next(scan: pg_sys::SysScanDesc) -> Met {
        // SAFETY: the caller's promise.
        let tuple = unsafe { hot::systable_getnext_ordered(scan, pg_sys::ScanDirection::ForwardScanDirection) };
        match tuple.is_null() {
            true => Met::End,
            false => Met::Row(tuple),
        }
    }

    /// The next row of the wanted backends. For others, only the entries in the index are read.
    ///
    /// # Safety
    /// As [`Self::next`]; `wanted` is that of the scan, see [`Self::wanting`].
    unsafe fn next_wanted(scan: pg_sys::SysScanDesc, wanted: &Wanted) -> Met {
        /// Of an entry's header (itup.h): its size, and a bit of its second word.
        const HEADER: usize = 8;
        const HAS_NULLS: u16 = 0x8000;
        // SAFETY: a scan of an index on (seq, backend_number) or (xid, seq, backend_number) that was told to give its
        // entries: at `seq_at` an int8, and an int4 behind it.
        unsafe {
            let (index_scan, tuple_slot) = ((*scan).iscan, (*scan).slot);
            for count in 1.. {
                if hot::index_getnext_tid(index_scan, pg_sys::ScanDirection::ForwardScanDirection).is_null() {
                    break;
                }
                let entry = (*index_scan).xs_itup;
                let values = entry.cast::<u8>().add(HEADER + wanted.seq_at);
                let is_others =
                    (*entry).t_info & HAS_NULLS == 0 && !wanted.numbers.contains(&values.add(8).cast::<i32>().read());
                if is_others {
                    if count >= OTHERS_AT_ONCE {
                        return Met::Others(values.cast::<i64>().read());
                    }
                } else if hot::index_fetch_heap(index_scan, tuple_slot) {
                    let mut is_copy = false;
                    return Met::Row(hot::ExecFetchSlotHeapTuple(tuple_slot, false, &mut is_copy));
                }
            }
            Met::End
        }
    }
}

impl Scan for EventsScan {
    fn advance(&mut self) -> Option<Step> {
        if self.is_at_end {
            return None;
        }
        // SAFETY: an open scan; it keeps the current tuple's buffer pinned until the next call. There is one guard for
        // all calls, because a guard costs as much as a call.
        let met = unsafe {
            pg_sys::ffi::pg_guard_ffi_boundary(|| {
                let met = match &self.wanted {
                    None => Self::next(self.scan),
                    Some(wanted) => Self::next_wanted(self.scan, wanted),
                };
                if let Met::Row(tuple) = met {
                    let (values, nulls) = (self.row.values.as_mut_ptr(), self.row.nulls.as_mut_ptr());
                    hot::heap_deform_tuple(tuple, self.descriptor, values, nulls);
                    self.row.written_by = (*(*tuple).t_data).t_choice.t_heap.t_xmin.into();
                }
                met
            })
        };
        match met {
            Met::End => {
                self.is_at_end = true;
                None
            }
            Met::Row(_) => Some(Step::Row(self.row.key())),
            Met::Others(seq) => Some(Step::Passed(seq)),
        }
    }
}

impl Drop for EventsScan {
    fn drop(&mut self) {
        // While an ERROR unwinds, the transaction's abort releases the scan's resources. Calling into Postgres could
        // raise another ERROR within the drop, which would abort the process.
        if !std::thread::panicking() {
            // SAFETY: the scan was opened by systable_beginscan_ordered and is closed once.
            unsafe { pg_sys::systable_endscan_ordered(self.scan) };
        }
    }
}

/// Whether the table of events and all that is needed to read it can be opened now. Needs a transaction.
pub(crate) fn can_read() -> bool {
    catalog::relations().is_some_and(|known| EventsTable::is_open_to_all(&known))
}
