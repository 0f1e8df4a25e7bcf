//! Rows of our tables, taken apart without SQL: an event as it is sent, and scans of `outbox.events` for the reader.

use crate::catalog::Relations;
use crate::encoding::{has_utf8_form, utf8};
use crate::missing::Index;
use pgrx::{pg_sys, varlena};
use relay::event::Event;
use relay::reader::{Key, Scan, Table};
use relay::slot::slot_of;
use std::borrow::Cow;
use std::rc::Rc;

/// Microseconds from 1970, the epoch of Unix, to 2000, that of Postgres.
pub const EPOCH_SHIFT_US: i64 = 946_684_800_000_000;

/// Attribute numbers of `outbox.events`, in the order of the SQL script; the first ones of `scheduled_events` and
/// `failed_events` too.
pub mod attribute {
    pub const SEQ: usize = 1;
    pub const XID: usize = 2;
    pub const CREATED_AT: usize = 3;
    pub const EVENT_ID: usize = 4;
    pub const BACKEND_NUMBER: usize = 5;
    pub const EVENT_TYPE: usize = 6;
    pub const SOURCE: usize = 7;
    pub const BACKEND: usize = 8;
    pub const DATA: usize = 9;
    pub const SUBJECT: usize = 10;
    pub const STREAM: usize = 11;
    pub const DATA_SCHEMA: usize = 12;
    pub const PUBLISHER_CONFIG: usize = 13;
    pub const MAX_RETRIES: usize = 14;
    pub const COUNT: usize = 14;
    /// Of `scheduled_events` alone.
    pub const SCHEDULED_AT: usize = 15;
}

/// Most columns that any of our tables has, with room for those that users add.
const MAX_COLUMNS: usize = 64;

/// The values of one row, as long as the row's buffer is pinned.
pub struct Row {
    values: [pg_sys::Datum; MAX_COLUMNS],
    nulls: [bool; MAX_COLUMNS],
}

impl Row {
    fn empty() -> Self {
        Self {
            values: [pg_sys::Datum::from(0); MAX_COLUMNS],
            nulls: [true; MAX_COLUMNS],
        }
    }

    /// Takes a heap tuple apart.
    ///
    /// # Safety
    /// `tuple` is a valid tuple of `descriptor`'s table, and stays so for as long as the row is used.
    pub unsafe fn of(tuple: pg_sys::HeapTuple, descriptor: pg_sys::TupleDesc) -> Self {
        let mut row = Self::empty();
        // SAFETY: the caller's promise; the arrays have room for all columns.
        unsafe {
            Self::expect_room(descriptor);
            pg_sys::heap_deform_tuple(tuple, descriptor, row.values.as_mut_ptr(), row.nulls.as_mut_ptr());
        }
        row
    }

    /// An ERROR if somebody has widened a table beyond what a row holds.
    ///
    /// # Safety
    /// A valid descriptor.
    unsafe fn expect_room(descriptor: pg_sys::TupleDesc) {
        // SAFETY: the caller's promise.
        if unsafe { (*descriptor).natts } as usize > MAX_COLUMNS {
            crate::error::internal("a table of outbox_relay has too many columns");
        }
    }

    /// The value of an attribute (from 1), unless it is null.
    pub fn get(&self, attribute: usize) -> Option<pg_sys::Datum> {
        (!self.nulls[attribute - 1]).then(|| self.values[attribute - 1])
    }

    pub fn i64(&self, attribute: usize) -> Option<i64> {
        self.get(attribute).map(|d| d.value() as i64)
    }

    pub fn i32(&self, attribute: usize) -> Option<i32> {
        self.get(attribute).map(|d| d.value() as i32)
    }

    pub fn uuid(&self, attribute: usize) -> Option<[u8; 16]> {
        // SAFETY: a uuid datum points to 16 bytes.
        self.get(attribute).map(|d| unsafe { *d.cast_mut_ptr::<[u8; 16]>() })
    }

    pub fn key(&self) -> Key {
        Key {
            xid: self.get(attribute::XID).map_or(0, |d| d.value() as u64),
            seq: self.i64(attribute::SEQ).unwrap_or_default(),
        }
    }

    /// When it was published, in microseconds since 1970.
    pub fn created_at_us(&self) -> i64 {
        self.i64(attribute::CREATED_AT)
            .unwrap_or_default()
            .saturating_add(EPOCH_SHIFT_US)
    }

    /// A text in UTF-8. Allocates in the current memory context when the value was compressed or stored apart.
    pub fn text(&self, attribute: usize) -> Option<Cow<'_, str>> {
        // SAFETY: the attribute is of a varlena type in the database's encoding.
        self.get(attribute).map(|d| unsafe { utf8_of(d) })
    }

    /// Whether its data are too large to be stored in the row itself.
    pub fn is_large(&self) -> bool {
        // SAFETY: a datum of a varlena type.
        self.get(attribute::DATA)
            .is_some_and(|d| unsafe { varlena::varatt_is_1b_e(d.cast_mut_ptr()) })
    }

    pub fn backend_number(&self) -> i32 {
        self.i32(attribute::BACKEND_NUMBER).unwrap_or_default()
    }

    /// The hash slot of its stream; one that names none is in its backend's. Allocates as [`Self::text`].
    pub fn slot(&self, own_stream: &str) -> u16 {
        // SAFETY: the attribute is of type text.
        let named = self
            .get(attribute::STREAM)
            .map(|d| unsafe { slot_of_text(bytes_of(d)) });
        named.unwrap_or_else(|| slot_of(own_stream.as_bytes()))
    }

    /// Calls `f` with the row as an event.
    pub fn with_event<R>(&self, f: impl FnOnce(&Event<'_>) -> R) -> R {
        let (event_type, source) = (self.text(attribute::EVENT_TYPE), self.text(attribute::SOURCE));
        let (subject, data) = (self.text(attribute::SUBJECT), self.text(attribute::DATA));
        let (stream, data_schema) = (self.text(attribute::STREAM), self.text(attribute::DATA_SCHEMA));
        let publisher_config = self.text(attribute::PUBLISHER_CONFIG);
        f(&Event {
            event_id: self.uuid(attribute::EVENT_ID).unwrap_or_default(),
            created_at_us: self.created_at_us(),
            event_type: event_type.as_deref().unwrap_or_default(),
            source: source.as_deref().unwrap_or_default(),
            subject: subject.as_deref(),
            data: data.as_deref(),
            data_schema: data_schema.as_deref(),
            publisher_config: publisher_config.as_deref(),
            stream: stream.as_deref(),
        })
    }
}

/// A varlena's bytes, expanded if need be.
///
/// # Safety
/// The datum is a valid varlena; the slice lives as long as its row or the current memory context.
pub unsafe fn bytes_of<'a>(datum: pg_sys::Datum) -> &'a [u8] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut value: *mut pg_sys::varlena = datum.cast_mut_ptr();
        // Asked here, since each call into Postgres costs more than most values' bytes.
        let is_plain = match varlena::varatt_is_1b(value) {
            true => !varlena::varatt_is_1b_e(value),
            false => varlena::varatt_is_4b_u(value),
        };
        if !is_plain {
            value = pg_sys::pg_detoast_datum_packed(value);
        }
        varlena::varlena_to_byte_slice(value)
    }
}

/// The hash slot of a stream's name in the database's encoding. One that has no UTF-8 form is nobody's stream, and has a slot all the
/// same: a view, or a dump, is not to end over it.
pub fn slot_of_text(name: &[u8]) -> u16 {
    match has_utf8_form(name) {
        // SAFETY: text of a row, in the database's encoding.
        Ok(()) => slot_of(unsafe { utf8(name) }.as_bytes()),
        Err(_) => slot_of(name),
    }
}

/// A varlena's text in UTF-8, whatever the database's encoding. An ERROR when it has no such form.
///
/// # Safety
/// As [`bytes_of`].
pub unsafe fn utf8_of<'a>(datum: pg_sys::Datum) -> Cow<'a, str> {
    // SAFETY: the caller's promise; Postgres keeps only valid text in its encoding.
    unsafe { utf8(bytes_of(datum)) }
}

/// Some named columns of a table that is read whole.
pub struct Columns {
    descriptor: pg_sys::TupleDesc,
    attributes: Vec<usize>,
}

/// The values of some named columns.
pub struct NamedRow<'a> {
    columns: &'a Columns,
    row: Row,
}

impl Columns {
    /// # Safety
    /// `relation` is open, and stays so.
    pub unsafe fn of(relation: pg_sys::Relation, names: &[&str]) -> Self {
        // SAFETY: an open relation has a descriptor; attribute names are zero-terminated.
        unsafe {
            let descriptor = (*relation).rd_att;
            let attributes = names
                .iter()
                .map(|name| {
                    let name = std::ffi::CString::new(*name).unwrap_or_default();
                    pg_sys::get_attnum((*relation).rd_id, name.as_ptr()) as usize
                })
                .collect();
            Self { descriptor, attributes }
        }
    }

    /// By attribute number.
    ///
    /// # Safety
    /// `relation` is open, and stays so.
    pub unsafe fn at(relation: pg_sys::Relation, attributes: Vec<usize>) -> Self {
        // SAFETY: an open relation has a descriptor.
        Self {
            descriptor: unsafe { (*relation).rd_att },
            attributes,
        }
    }

    /// # Safety
    /// As [`Row::of`].
    pub unsafe fn take_apart(&self, tuple: pg_sys::HeapTuple) -> NamedRow<'_> {
        // SAFETY: the caller's promise.
        let row = unsafe { Row::of(tuple, self.descriptor) };
        NamedRow { columns: self, row }
    }
}

impl NamedRow<'_> {
    /// The `index`-th of the named columns.
    pub fn datum(&self, index: usize) -> Option<pg_sys::Datum> {
        self.row.get(self.columns.attributes[index])
    }

    pub fn text(&self, index: usize) -> Option<String> {
        self.row.text(self.columns.attributes[index]).map(Cow::into_owned)
    }

    pub fn i32(&self, index: usize) -> Option<i32> {
        self.row.i32(self.columns.attributes[index])
    }
}

/// The elements of a `text[]`, in UTF-8; nulls are left out.
///
/// # Safety
/// The datum is a valid `text[]`.
pub unsafe fn texts_of_array(datum: pg_sys::Datum) -> Vec<String> {
    // SAFETY: the caller's promise; text is of variable length and int-aligned.
    unsafe {
        let array = pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast();
        let (mut values, mut nulls, mut count) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
        pg_sys::deconstruct_array(
            array,
            pg_sys::TEXTOID,
            -1,
            false,
            pg_sys::TYPALIGN_INT as _,
            &mut values,
            &mut nulls,
            &mut count,
        );
        (0..count as usize)
            .filter(|i| !*nulls.add(*i))
            .map(|i| utf8_of(*values.add(i)).into_owned())
            .collect()
    }
}

/// What is called for each row, without a guard for each call.
mod hot {
    use pgrx::pg_sys;

    // SAFETY: the declarations of access/genam.h and access/htup_details.h; called within a guard, since they may raise an ERROR.
    unsafe extern "C-unwind" {
        pub fn systable_getnext_ordered(
            scan: pg_sys::SysScanDesc,
            direction: pg_sys::ScanDirection::Type,
        ) -> pg_sys::HeapTuple;
        pub fn index_getnext_tid(
            scan: pg_sys::IndexScanDesc,
            direction: pg_sys::ScanDirection::Type,
        ) -> pg_sys::ItemPointer;
        pub fn index_fetch_heap(scan: pg_sys::IndexScanDesc, slot: *mut pg_sys::TupleTableSlot) -> bool;
        pub fn ExecFetchSlotHeapTuple(
            slot: *mut pg_sys::TupleTableSlot,
            materialize: bool,
            should_free: *mut bool,
        ) -> pg_sys::HeapTuple;
        pub fn heap_deform_tuple(
            tuple: pg_sys::HeapTuple,
            descriptor: pg_sys::TupleDesc,
            values: *mut pg_sys::Datum,
            nulls: *mut bool,
        );
    }
}

/// Whether a transaction that has not ended has published an event with this id, or deleted one. Waits for nobody. Needs the index.
pub fn is_contested(relations: &Relations, event_id: &[u8; 16]) -> bool {
    // SAFETY: an index look-up by an equality key of the column's type. A dirty snapshot says of each row that it shows who is about to
    // insert or delete it; it is nobody's but ours.
    unsafe {
        let events = pg_sys::table_open(relations.events, LOCK);
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
pub struct EventsTable {
    events: pg_sys::Relation,
    seq_key: pg_sys::Relation,
    xid_key: pg_sys::Relation,
    snapshot: pg_sys::Snapshot,
    /// Numbers of the backends whose rows are looked at; `None`: all.
    wanted: Option<Rc<[i32]>>,
}

const LOCK: pg_sys::LOCKMODE = pg_sys::AccessShareLock as pg_sys::LOCKMODE;

impl EventsTable {
    /// Opens the table and registers a new snapshot. All is given back at the end of the transaction at the latest.
    pub fn open(relations: &Relations) -> Self {
        for (index, name) in [
            (relations.events_seq_key, Index::Seq),
            (relations.events_xid_key, Index::Xid),
        ] {
            if index == pg_sys::InvalidOid {
                name.refuse();
            }
        }
        // SAFETY: opens relations by OID within a transaction; an ERROR if one has gone.
        unsafe {
            Self {
                events: pg_sys::table_open(relations.events, LOCK),
                seq_key: pg_sys::index_open(relations.events_seq_key, LOCK),
                xid_key: pg_sys::index_open(relations.events_xid_key, LOCK),
                snapshot: pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot()),
                wanted: None,
            }
        }
    }

    /// From now on, scans by number pass by rows of other backends, as far as the index tells whose they are.
    pub fn want_only(&mut self, numbers: Vec<i32>) {
        // SAFETY: an open index; the first columns of it, of which there are so many.
        let is_told = unsafe {
            let index = (*self.seq_key).rd_index;
            let columns = std::slice::from_raw_parts((*index).indkey.values.as_ptr(), (*index).indnatts as usize);
            columns.get(1) == Some(&(attribute::BACKEND_NUMBER as i16))
        };
        self.wanted = is_told.then(|| numbers.into());
    }

    /// Whether opening it now would wait for nobody, and lacks nothing. The locks are kept until the end of the transaction.
    pub fn is_open_to_all(relations: &Relations) -> bool {
        let needed = [
            relations.events,
            relations.events_seq_key,
            relations.events_xid_key,
            relations.sequence,
        ];
        // SAFETY: takes a lock within a transaction, or does not.
        let can_lock = |relation| unsafe { pg_sys::ConditionalLockRelationOid(relation, LOCK) };
        needed
            .iter()
            .all(|relation| *relation != pg_sys::InvalidOid && can_lock(*relation))
    }

    pub fn close(self) {
        // SAFETY: closes what open() opened; scans were dropped before, they borrow nothing beyond.
        unsafe {
            pg_sys::UnregisterSnapshot(self.snapshot);
            pg_sys::index_close(self.xid_key, LOCK);
            pg_sys::index_close(self.seq_key, LOCK);
            pg_sys::table_close(self.events, LOCK);
        }
    }

    /// The lowest number, up to `upto`, of the transactions from `xid` on, whatever became of them.
    pub fn lowest_since(&self, xid: u64, upto: i64) -> Option<i64> {
        let keys = [
            xid_key(pg_sys::BTGreaterEqualStrategyNumber, pg_sys::F_XID8GE, xid),
            seq_up_to(upto),
        ];
        // SAFETY: a snapshot that lives for ever.
        let mut scan = self.scan_as(&raw mut pg_sys::SnapshotAnyData, self.xid_key, &keys);
        std::iter::from_fn(|| scan.advance()).map(|key| key.seq).min()
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
            Some(wanted) => scan.wanting(wanted.clone()),
            None => scan,
        }
    }

    fn by_xid(&mut self, xid: u64, after: i64, upto: i64) -> EventsScan {
        let equal = xid_key(pg_sys::BTEqualStrategyNumber, pg_sys::F_XID8EQ, xid);
        self.scan(self.xid_key, &[equal, seq_above(after), seq_up_to(upto)])
    }

    fn first_xid(&mut self, from: u64, before: u64) -> Option<u64> {
        if from >= before {
            return None;
        }
        let low = xid_key(pg_sys::BTGreaterEqualStrategyNumber, pg_sys::F_XID8GE, from);
        let high = xid_key(pg_sys::BTLessStrategyNumber, pg_sys::F_XID8LT, before);
        self.scan(self.xid_key, &[low, high]).advance().map(|key| key.xid)
    }
}

/// A scan of `outbox.events` in index order.
pub struct EventsScan {
    scan: pg_sys::SysScanDesc,
    row: Box<Row>,
    descriptor: pg_sys::TupleDesc,
    /// Rows of other backends are passed by; the index says whose each is.
    wanted: Option<Rc<[i32]>>,
    /// It has come to its end. (Asked once more, Postgres would begin anew.)
    is_at_end: bool,
}

/// What a scan has come to.
enum Met {
    End,
    Row(pg_sys::HeapTuple),
    /// Others' rows, up to this number.
    Others(i64),
}

/// Rows of others that are passed by at once.
const OTHERS_AT_ONCE: usize = 16;

impl EventsScan {
    /// The current row; its texts live until the scan moves on.
    pub fn row(&self) -> &Row {
        &self.row
    }

    /// The index has, behind its key, the number of the backend.
    fn wanting(mut self, wanted: Rc<[i32]>) -> Self {
        // SAFETY: the scan was just opened. It is told to give the index's entries as well, which must be known before it begins; the keys
        // stay as they are.
        unsafe {
            let scan = (*self.scan).iscan;
            (*scan).xs_want_itup = true;
            let (keys, orders) = ((*scan).numberOfKeys, (*scan).numberOfOrderBys);
            pg_sys::index_rescan(scan, std::ptr::null_mut(), keys, std::ptr::null_mut(), orders);
        }
        self.wanted = Some(wanted);
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

    /// The next row of those that are wanted; of others, only the entries in the index are looked at.
    ///
    /// # Safety
    /// As [`Self::next`]; `wanted` is that of the scan, see [`Self::wanting`].
    unsafe fn next_wanted(scan: pg_sys::SysScanDesc, wanted: &[i32]) -> Met {
        /// Of an entry's header (itup.h): its size, and a bit of its second word.
        const HEADER: usize = 8;
        const HAS_NULLS: u16 = 0x8000;
        // SAFETY: a scan of an index on (seq, backend_number) that was told to give its entries: an int8, and an int4 behind it.
        unsafe {
            let (index_scan, slot) = ((*scan).iscan, (*scan).slot);
            for count in 1.. {
                if hot::index_getnext_tid(index_scan, pg_sys::ScanDirection::ForwardScanDirection).is_null() {
                    break;
                }
                let entry = (*index_scan).xs_itup;
                let values = entry.cast::<u8>().add(HEADER);
                let is_others =
                    (*entry).t_info & HAS_NULLS == 0 && !wanted.contains(&values.add(8).cast::<i32>().read());
                if is_others {
                    if count >= OTHERS_AT_ONCE {
                        return Met::Others(values.cast::<i64>().read());
                    }
                } else if hot::index_fetch_heap(index_scan, slot) {
                    let mut is_copy = false;
                    return Met::Row(hot::ExecFetchSlotHeapTuple(slot, false, &mut is_copy));
                }
            }
            Met::End
        }
    }
}

impl Scan for EventsScan {
    fn advance(&mut self) -> Option<Key> {
        if self.is_at_end {
            return None;
        }
        // SAFETY: an open scan; it keeps the current tuple's buffer pinned until the next call. One guard for all calls, since a guard
        // costs as much as a call.
        let met = unsafe {
            pg_sys::ffi::pg_guard_ffi_boundary(|| {
                let met = match &self.wanted {
                    None => Self::next(self.scan),
                    Some(wanted) => Self::next_wanted(self.scan, wanted),
                };
                if let Met::Row(tuple) = met {
                    let (values, nulls) = (self.row.values.as_mut_ptr(), self.row.nulls.as_mut_ptr());
                    hot::heap_deform_tuple(tuple, self.descriptor, values, nulls);
                }
                met
            })
        };
        match met {
            Met::End => {
                self.is_at_end = true;
                None
            }
            Met::Row(_) => Some(self.row.key()),
            // Of a transaction that every position has seen.
            Met::Others(seq) => Some(Key { xid: 0, seq }),
        }
    }
}

impl Drop for EventsScan {
    fn drop(&mut self) {
        // While an ERROR unwinds, the transaction's abort gives the scan's resources back, and calling into Postgres
        // could raise another one within the drop, which would abort the process.
        if !std::thread::panicking() {
            // SAFETY: the scan was opened by systable_beginscan_ordered and is closed once.
            unsafe { pg_sys::systable_endscan_ordered(self.scan) };
        }
    }
}
