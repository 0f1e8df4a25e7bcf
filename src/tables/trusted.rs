//! Rows that we insert ourselves, and that the table's trigger need not check again.

use crate::server::scoped;
use crate::tables::row::{Row, attribute};
use pgrx::pg_sys;
use std::cell::Cell;

thread_local! {
    /// Whether rows are being moved that were checked when they were scheduled.
    static MOVING: Cell<bool> = const { Cell::new(false) };
    /// See [`inserting`].
    static INSERTING: Cell<Inserting> = const { Cell::new(None) };
}

/// The values of a row that nobody may change, because the relay relies on them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowKey {
    pub xid: u64,
    pub seq: i64,
    pub backend_number: i32,
    pub event_id: [u8; 16],
}

/// The checked and numbered values of a new row.
#[derive(Clone, Copy)]
pub(crate) struct NewRow {
    pub is_scheduled: bool,
    pub values: [pg_sys::Datum; attribute::SCHEDULED_AT],
    pub nulls: [bool; attribute::SCHEDULED_AT],
    pub key: RowKey,
}

impl NewRow {
    pub(crate) fn set(&mut self, attribute: usize, value: Option<pg_sys::Datum>) {
        self.nulls[attribute - 1] = value.is_none();
        self.values[attribute - 1] = value.unwrap_or(pg_sys::Datum::from(0));
    }
}

/// Runs `f` while the trigger sets only the numbers of rows and takes all else unchanged: they were checked when they
/// were scheduled.
pub(crate) fn moving<R>(f: impl FnOnce() -> R) -> R {
    scoped::with(&MOVING, true, f)
}

/// A row that a statement is inserting, and the subtransaction that does it.
pub(crate) type Inserting = Option<(RowKey, u32)>;

/// Notes the row that `publish_event` will insert by a statement: it is checked and numbered already. Returns what a
/// statement further out was inserting before.
pub(crate) fn inserting(row: RowKey) -> Inserting {
    INSERTING.replace(Some((row, subtransaction())))
}

/// Called when that row has been inserted.
pub(crate) fn inserting_again(before: Inserting) {
    INSERTING.set(before);
}

/// The key of the row that is being inserted in this way, if `row` is that row. It is recognised by its number or its
/// id, because a trigger may have changed the other. What an ERROR has left behind belongs to a subtransaction that has
/// ended.
pub(crate) fn inserted(row: &Row) -> Option<RowKey> {
    let (key, within) = INSERTING.get()?;
    let is_its = row.i64(attribute::SEQ) == Some(key.seq) || row.uuid(attribute::EVENT_ID) == Some(key.event_id);
    // SAFETY: a plain read.
    let is_now = within == subtransaction() && key.xid == unsafe { pg_sys::GetTopFullTransactionIdIfAny().value };
    (is_its && is_now).then_some(key)
}

/// The current subtransaction.
pub(crate) fn subtransaction() -> u32 {
    // SAFETY: a plain read.
    unsafe { pg_sys::GetCurrentSubTransactionId() }
}

/// Whether rows are being moved that were checked when they were scheduled.
pub(crate) fn is_moving() -> bool {
    MOVING.get()
}
