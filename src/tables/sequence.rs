//! The sequence that numbers events: its page, its parameters, and setting it forward.

use crate::server::error::raise;
use crate::tables::rights;
use pgrx::PgSqlErrorCode;
use pgrx::pg_sys;
use pgrx::pg_sys::panic::ErrorReport;
use std::cell::Cell;
use std::ffi::CStr;

// SAFETY: the declaration of sequence.h.
unsafe extern "C-unwind" {
    /// Draws the next number of a sequence (commands/sequence.h; not in pgrx's bindings). Must be called within a
    /// guard.
    pub(crate) fn nextval_internal(relid: pg_sys::Oid, check_permissions: bool) -> i64;
}

/// Draws the next number. Within a transaction that may write.
pub(crate) fn next(sequence: pg_sys::Oid) -> i64 {
    // SAFETY: within a transaction; an ERROR becomes a Rust panic.
    unsafe { pg_sys::ffi::pg_guard_ffi_boundary(|| nextval_internal(sequence, false)) }
}

/// Sets it so that the next number is above `number`, with its owner's rights, because publishers may not set it.
pub(crate) fn set(sequence: pg_sys::Oid, number: i64) {
    let arguments = [Some(pg_sys::Datum::from(sequence)), Some(pg_sys::Datum::from(number))];
    rights::as_owner_of(sequence, || {
        // SAFETY: setval(regclass, bigint), of this type.
        unsafe { pgrx::direct_function_call_as_datum(pg_sys::setval_oid, &arguments) }
    });
}

/// The last number that was drawn (0 before the first).
pub(crate) fn last(sequence: pg_sys::Oid) -> i64 {
    // SAFETY: raises an ERROR if it no longer exists.
    let relation = unsafe { pg_sys::relation_open(sequence, LOCK) };
    let (number, _) = page_of(relation);
    // SAFETY: opened above.
    unsafe { pg_sys::relation_close(relation, LOCK) };
    number
}

/// The last number that was drawn, and the end of its page's last WAL record. When the WAL is flushed up to there, no
/// drawn number can be drawn again after a crash. `None`: another session has locked the sequence exclusively, and
/// delivery must not wait for that.
pub(crate) fn last_record(sequence: pg_sys::Oid) -> Option<(i64, u64)> {
    // SAFETY: tries to take a lock within a transaction; raises an ERROR if the sequence no longer exists.
    let relation = unsafe {
        if !pg_sys::ConditionalLockRelationOid(sequence, LOCK) {
            return None;
        }
        pg_sys::relation_open(sequence, pg_sys::NoLock as pg_sys::LOCKMODE)
    };
    let page = page_of(relation);
    // SAFETY: locked and opened above.
    unsafe { pg_sys::relation_close(relation, LOCK) };
    Some(page)
}

/// A sentence that says so if the sequence has reached its end.
pub(crate) fn end_reached(sequence: pg_sys::Oid) -> Option<String> {
    let maximum = maximum(sequence);
    let is_reached = last_record(sequence).is_some_and(|(last, _)| last >= maximum);
    is_reached.then(|| format!("Its MAXVALUE is {maximum}, and that number was given."))
}

const LOCK: pg_sys::LOCKMODE = pg_sys::AccessShareLock as pg_sys::LOCKMODE;

/// The last number, and the end of the page's last record. (Postgres's own functions for this are too slow.)
fn page_of(relation: pg_sys::Relation) -> (i64, u64) {
    /// The size of a page's header (bufpage.h), and the bits of an item's offset in the item pointer that follows it
    /// (itemid.h).
    const HEADER: usize = 24;
    const OFFSET_BITS: u32 = 0x7FFF;
    // SAFETY: an open sequence always has a page with one item, a row of `FormData_pg_sequence_data` (sequence.h):
    // number, count, whether the number was drawn. The page is pinned and locked while it is read.
    unsafe {
        let buffer = pg_sys::ReadBuffer(relation, 0);
        pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_SHARE as i32);
        let page = pg_sys::BufferGetPage(buffer).cast::<u8>();
        let offset = page.add(HEADER).cast::<u32>().read() & OFFSET_BITS;
        let row = page.add(offset as usize);
        let values = row.add(usize::from((*row.cast::<pg_sys::HeapTupleHeaderData>()).t_hoff));
        let number = values.cast::<i64>().read();
        let is_drawn = values.add(16).read() != 0;
        let lsn = pg_sys::BufferGetLSNAtomic(buffer);
        pg_sys::UnlockReleaseBuffer(buffer);
        (if is_drawn { number } else { 0 }, lsn)
    }
}

/// `FormData_pg_sequence` (catalog/pg_sequence.h, Postgres 15 to 18).
#[repr(C)]
struct Form {
    relation: pg_sys::Oid,
    type_: pg_sys::Oid,
    start: i64,
    increment: i64,
    maximum: i64,
    minimum: i64,
    cache: i64,
    cycles: bool,
}

thread_local! {
    /// The sequence whose parameters were found correct and have not changed since.
    static CHECKED: Cell<pg_sys::Oid> = const { Cell::new(pg_sys::InvalidOid) };
    static IS_REGISTERED: Cell<bool> = const { Cell::new(false) };
}

// No pg_guard: nothing in it can fail.
// SAFETY: only Postgres calls this, in this process; it touches only a variable of this thread.
unsafe extern "C-unwind" fn on_invalidation(_arg: pg_sys::Datum, _cache: i32, _hash: u32) {
    CHECKED.set(pg_sys::InvalidOid);
}

/// Raises an ERROR unless the sequence gives ascending numbers, one by one. Costs nothing unless a sequence was
/// changed. The caller has drawn from it in this transaction. So the sequence is locked against changes, and all
/// earlier changes are known.
pub(crate) fn expect_ascending(sequence: pg_sys::Oid) {
    if CHECKED.get() == sequence {
        return;
    }
    if let Some(trouble) = trouble(sequence) {
        refuse(trouble);
    }
    CHECKED.set(sequence);
}

/// What is wrong with its parameters, as a sentence. Within a transaction.
pub(crate) fn trouble(sequence: pg_sys::Oid) -> Option<String> {
    if !IS_REGISTERED.replace(true) {
        let cache = pg_sys::SysCacheIdentifier::SEQRELID as i32;
        // SAFETY: registers a callback of this library for the life of the process.
        unsafe { pg_sys::CacheRegisterSyscacheCallback(cache, Some(on_invalidation), pg_sys::Datum::from(0)) };
    }
    with_form(sequence, |form| {
        if form.type_ != pg_sys::INT8OID {
            // SAFETY: a catalog look-up; a zero-terminated text.
            let name = unsafe { CStr::from_ptr(pg_sys::format_type_be(form.type_)).to_string_lossy() };
            return Some(format!("It is of type {name} instead of bigint."));
        }
        match form {
            Form { increment, .. } if *increment != 1 => Some(format!("It has INCREMENT {increment} instead of 1.")),
            Form { cache, .. } if *cache != 1 => {
                Some(format!("It has CACHE {cache}: sessions would draw numbers in advance."))
            }
            Form { cycles: true, .. } => Some("It has CYCLE: numbers would be given again.".to_owned()),
            _ => None,
        }
    })
    .flatten()
}

/// The highest number that the sequence may give.
pub(crate) fn maximum(sequence: pg_sys::Oid) -> i64 {
    with_form(sequence, |form| form.maximum).unwrap_or(i64::MAX)
}

/// `None`: the sequence no longer exists.
fn with_form<R>(sequence: pg_sys::Oid, f: impl FnOnce(&Form) -> R) -> Option<R> {
    // SAFETY: a look-up within a transaction; the tuple is released after it is read. Its columns are never null.
    unsafe {
        let cache = pg_sys::SysCacheIdentifier::SEQRELID as i32;
        let tuple = pg_sys::SearchSysCache1(cache, pg_sys::Datum::from(sequence));
        if tuple.is_null() {
            return None;
        }
        let form = pg_sys::GETSTRUCT(tuple).cast::<Form>();
        debug_assert_eq!((*form).relation, sequence);
        let result = f(&*form);
        pg_sys::ReleaseSysCache(tuple);
        Some(result)
    }
}

/// The HINT that restores the required parameters.
pub(crate) const MEND: &str =
    "Run ALTER SEQUENCE outbox.events_seq_seq AS bigint INCREMENT 1 NO MAXVALUE CACHE 1 NO CYCLE.";

/// The message for all problems of the sequence.
pub(crate) const MESSAGE: &str = "sequence outbox.events_seq_seq cannot number events";

/// Raises the ERROR for an event that cannot get a number. `trouble`: the reason, as a sentence.
pub(crate) fn refuse(trouble: String) -> ! {
    let code = PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
    raise(ErrorReport::new(code, MESSAGE, "").set_detail(trouble).set_hint(MEND))
}
