//! The further rows of an event that a plain INSERT or COPY publishes, if routes send it to several streams.
//!
//! `complete_event` makes the first of these rows and draws the numbers of all, so that the events keep the order of
//! the statement in each stream. A trigger or ON CONFLICT may still leave the first row out. The others are therefore
//! inserted only when the first is there: when the statement's next row comes, or at its end.

use crate::publish::appending::{Branches, Prepared, Tables};
use crate::publish::destinations::Destination;
use crate::publish::repeated_id::id_index;
use crate::server::error::raise;
use crate::server::report;
use crate::server::trigger_call::{When, depth, expect_trigger};
use crate::tables::catalog::{self, Relations};
use crate::tables::missing::Index;
use crate::tables::row::{Row, attribute};
use crate::tables::trusted::{NewRow, RowKey};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_sys};
use std::cell::RefCell;

thread_local! {
    /// The events whose first row may not be there yet: at most one for each statement that is running, and those of
    /// statements that failed.
    static PENDING: RefCell<Vec<Pending>> = const { RefCell::new(Vec::new()) };
}

struct Pending {
    /// How many triggers deep the event's statement runs. A statement within another's trigger is deeper.
    depth: i32,
    is_scheduled: bool,
    key: RowKey,
    /// The stream that the event names.
    named: Option<Vec<u8>>,
    further: Vec<(i64, Destination)>,
}

/// Notes the further rows of an event whose first row is about to be inserted.
pub(super) fn note(is_scheduled: bool, key: RowKey, named: Option<&[u8]>, further: Vec<(i64, Destination)>) {
    let pending = Pending {
        depth: depth(),
        is_scheduled,
        key,
        named: named.map(<[u8]>::to_vec),
        further,
    };
    PENDING.with_borrow_mut(|all| all.push(pending));
}

/// Raises an ERROR if the trigger that inserts the further rows is missing: they would be lost.
///
/// # Safety
/// An open relation.
pub(super) unsafe fn expect_trigger_on(relation: pg_sys::Relation) {
    let function = catalog::expect_relations().fan_out();
    // SAFETY: the caller's promise; the array is as long as it says.
    let is_there = unsafe {
        (*relation).trigdesc.as_ref().is_some_and(|all| {
            let triggers = std::slice::from_raw_parts(all.triggers, all.numtriggers as usize);
            let fires = |enabled: std::ffi::c_char| {
                [pg_sys::TRIGGER_FIRES_ALWAYS, pg_sys::TRIGGER_FIRES_ON_ORIGIN].contains(&(enabled as u8))
            };
            triggers
                .iter()
                .any(|trigger| trigger.tgfoid == function && fires(trigger.tgenabled))
        })
    };
    if !is_there {
        raise(
            ErrorReport::new(
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                "the trigger fan_out is missing or disabled",
                "",
            )
            .set_detail("It inserts the further rows of an event that routes send to several streams.")
            .set_hint("The worker repairs it. If it cannot, the server's log has the reason."),
        );
    }
}

/// Inserts the further rows of events whose first row was inserted earlier, by the statement whose trigger calls this.
///
/// # Safety
/// Within a trigger; no frame up to Postgres's holds anything that needs to be dropped.
pub(super) unsafe fn insert_pending() {
    if PENDING.with_borrow(Vec::is_empty) {
        return;
    }
    // SAFETY: the caller's promise.
    unsafe {
        while let Some((relations, rows)) = report::guard(next) {
            let mut tables = Tables::default();
            tables.insert_further(&relations, &rows);
            tables.close();
        }
    }
}

/// The next event whose first row is there. An event is dropped from the list if its first row was left out or was
/// rolled back with a subtransaction.
fn next() -> Option<(Relations, Prepared)> {
    let depth = depth();
    loop {
        let is_due = PENDING.with_borrow(|all| all.last().is_some_and(|last| last.depth >= depth));
        let pending = PENDING.with_borrow_mut(|all| all.pop_if(|_| is_due))?;
        // SAFETY: a plain read.
        let xid = unsafe { pg_sys::GetTopFullTransactionIdIfAny().value };
        if pending.key.xid != xid {
            continue;
        }
        let relations = catalog::expect_relations();
        if let Some(first) = first_row(&relations, &pending) {
            let destinations = pending.further.iter().map(|(seq, to)| (*seq, to));
            let further = Branches::of(destinations, pending.named.as_deref());
            return Some((relations, Prepared { first, further }));
        }
    }
}

/// The first row as it was inserted, copied into the current memory context.
fn first_row(relations: &Relations, pending: &Pending) -> Option<NewRow> {
    let (table, index) = match pending.is_scheduled {
        true => (relations.scheduled, Index::ScheduledEventId),
        false => (relations.events, Index::EventId),
    };
    let mut found = None;
    // SAFETY: an index look-up by an equality key of the column's type. The snapshot is a constant, which also sees
    // rows that the present command has inserted.
    unsafe {
        let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
        let (relation, relations) = catalog::open_table(table, lock);
        let mut id: pg_sys::ScanKeyData = std::mem::zeroed();
        pg_sys::ScanKeyInit(
            &mut id,
            attribute::EVENT_ID as i16,
            pg_sys::BTEqualStrategyNumber as u16,
            pg_sys::Oid::from(pg_sys::F_UUID_EQ),
            pg_sys::Datum::from(pending.key.event_id.as_ptr()),
        );
        let snapshot = &raw mut pg_sys::SnapshotSelfData;
        let scan = pg_sys::systable_beginscan(relation, id_index(&relations, index), true, snapshot, 1, &mut id);
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let descriptor = (*relation).rd_att;
            if Row::of(tuple, descriptor).i64(attribute::SEQ) == Some(pending.key.seq) {
                let row = Row::of(pg_sys::heap_copytuple(tuple), descriptor);
                found = Some(new_row(&row, pending));
                break;
            }
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(relation, lock);
    }
    found
}

fn new_row(row: &Row, pending: &Pending) -> NewRow {
    let mut new = NewRow {
        is_scheduled: pending.is_scheduled,
        values: [pg_sys::Datum::from(0); attribute::SCHEDULED_AT],
        nulls: [true; attribute::SCHEDULED_AT],
        key: pending.key,
    };
    let columns = match pending.is_scheduled {
        true => attribute::SCHEDULED_AT,
        false => attribute::COUNT,
    };
    for column in 1..=columns {
        new.set(column, row.get(column));
    }
    new
}

crate::function_info!(pg_finfo_fan_out);

/// Trigger of `outbox.events` and `outbox.scheduled_events`, after a statement that has inserted rows.
// No pg_guard: as publish_event.
#[unsafe(no_mangle)]
extern "C-unwind" fn fan_out(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    if PENDING.with_borrow(Vec::is_empty) {
        // SAFETY: called by Postgres.
        unsafe { (*fcinfo).isnull = false };
        return pg_sys::Datum::from(0);
    }
    let expect = || {
        let relations = catalog::expect_relations();
        // SAFETY: called by Postgres.
        unsafe {
            let tables = [relations.events, relations.scheduled];
            expect_trigger(fcinfo, "fan_out", When::AfterStatement, &tables);
            (*fcinfo).isnull = false;
        }
    };
    // SAFETY: within a trigger; this frame, which Postgres calls, has nothing to be dropped.
    unsafe {
        report::guard(expect);
        insert_pending();
    }
    // An AFTER trigger's result is ignored.
    pg_sys::Datum::from(0)
}
