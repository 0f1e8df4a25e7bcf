//! Plain INSERT and COPY into `outbox.events` and `outbox.scheduled_events`: the trigger makes the checks of
//! `publish_event` and fills in our columns.

use crate::publish::appending::publisher;
use crate::publish::confirming::{confirm_published, note_completed};
use crate::publish::destinations::{Destination, Destinations, with_backend};
use crate::publish::doubts;
use crate::publish::drawn;
use crate::publish::fan_out;
use crate::publish::inserted_row::request_of;
use crate::publish::json;
use crate::publish::repeated_id::{self, Sought};
use crate::publish::request::Request;
use crate::publish::restoring::{RESTORED_OVERDUE, check_restorable, note_restore};
use crate::server::datum::text_datum;
use crate::server::encoding::to_server;
use crate::server::guc;
use crate::server::report;
use crate::server::trigger_call::{When, expect_trigger};
use crate::server::txn;
use crate::server::uuid;
use crate::tables::applied;
use crate::tables::catalog;
use crate::tables::numbers::draw_numbers;
use crate::tables::row::{Row, attribute};
use crate::tables::trusted::{RowKey, inserted, is_moving};
use pgrx::pg_sys;
use relay::reading::range::Key;

crate::function_info!(pg_finfo_complete_event);

/// Trigger of `outbox.events` and `outbox.scheduled_events`, before each row.
// No pg_guard: our own guard converts our errors to the database's encoding.
#[unsafe(no_mangle)]
extern "C-unwind" fn complete_event(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let complete = || {
        let relations = catalog::expect_relations();
        // SAFETY: called by Postgres; a trigger of this kind has a row.
        unsafe {
            let tables = [relations.events, relations.scheduled];
            let trigger = expect_trigger(fcinfo, "complete_event", When::BeforeInsertOfRow, &tables);
            let table = match (*trigger.tg_relation).rd_id == relations.scheduled {
                true => EventTable::Scheduled,
                false => EventTable::Events,
            };
            // A subscription's row is held unchanged, and a row that is put back was checked before.
            if (table == EventTable::Scheduled && applied::is_applied_here()) || applied::puts_back() {
                (*fcinfo).isnull = false;
                return pg_sys::Datum::from(trigger.tg_trigtuple);
            }
            (*fcinfo).isnull = false;
            // A null tuple leaves the row out.
            pg_sys::Datum::from(completed(table, trigger.tg_trigtuple, trigger.tg_relation))
        }
    };
    // SAFETY: within a trigger; this frame, which Postgres calls, has nothing to be dropped.
    unsafe {
        fan_out::insert_pending();
        report::guard(complete)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum EventTable {
    Events,
    Scheduled,
}

/// How a row has come to be inserted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// A publisher inserts it.
    Publisher,
    /// A function of ours publishes it again, and has drawn its numbers.
    Again,
    /// A dump brings it, with numbers of its own.
    Dump,
    /// It is moved, and is as it was checked when it was published.
    Moved,
}

impl Origin {
    fn of(row: &Row, has_numbers: bool) -> Self {
        match row.get(attribute::XID) {
            _ if is_moving() => Self::Moved,
            None => Self::Publisher,
            Some(_) if has_numbers => Self::Again,
            Some(_) => Self::Dump,
        }
    }

    fn was_published(self) -> bool {
        self != Self::Publisher
    }
}

/// What the trigger changes in a row.
struct Changes {
    count: usize,
    columns: [i32; Self::MOST],
    values: [pg_sys::Datum; Self::MOST],
    nulls: [bool; Self::MOST],
}

impl Changes {
    /// Our columns, and the texts that may be empty.
    const MOST: usize = 13;

    fn none() -> Self {
        Self {
            count: 0,
            columns: [0; Self::MOST],
            values: [pg_sys::Datum::from(0); Self::MOST],
            nulls: [false; Self::MOST],
        }
    }

    fn set(&mut self, attribute: usize, value: impl Into<Option<pg_sys::Datum>>) {
        let value = value.into();
        self.columns[self.count] = attribute as i32;
        self.nulls[self.count] = value.is_none();
        self.values[self.count] = value.unwrap_or(pg_sys::Datum::from(0));
        self.count += 1;
    }

    /// # Safety
    /// A tuple and its descriptor; the values are of their columns' types. The new tuple lives in the current memory
    /// context.
    unsafe fn made(&mut self, tuple: pg_sys::HeapTuple, descriptor: pg_sys::TupleDesc) -> pg_sys::HeapTuple {
        // SAFETY: the caller's promise; the arrays are as long as `count`.
        unsafe {
            pg_sys::heap_modify_tuple_by_cols(
                tuple,
                descriptor,
                self.count as i32,
                self.columns.as_mut_ptr(),
                self.values.as_mut_ptr(),
                self.nulls.as_mut_ptr(),
            )
        }
    }
}

/// The row with what the trigger fills in. Null: the row is left out.
///
/// # Safety
/// A row of that table, whose relation is open.
unsafe fn completed(table: EventTable, tuple: pg_sys::HeapTuple, relation: pg_sys::Relation) -> pg_sys::HeapTuple {
    // SAFETY: the caller's promise.
    let (row, descriptor) = unsafe { (Row::of(tuple, (*relation).rd_att), (*relation).rd_att) };
    if let Some(key) = inserted(&row) {
        confirm_published(key, &row);
        return tuple;
    }
    let relations = catalog::expect_relations();
    let mut changes = Changes::none();
    // SAFETY: reads the clock.
    let now = unsafe { pg_sys::GetCurrentTimestamp() };
    let mut event_id = row.uuid(attribute::EVENT_ID).unwrap_or_else(|| uuid::new_v7(now));
    let has_numbers = drawn::has_numbers(&row);
    let origin = Origin::of(&row, has_numbers);
    let (mut backend_number, mut further) = (row.backend_number(), Vec::new());
    if origin != Origin::Moved {
        let published = expect_published(&row, table, origin, &mut changes);
        // SAFETY: the caller's promise.
        let way = || repeated_id::way_of_statement(unsafe { (*relation).rd_id });
        let sought = match origin.was_published() {
            true => Sought::Row(&event_id, row.branch()),
            false => Sought::Event(&event_id),
        };
        let names_id = row.get(attribute::EVENT_ID).is_some();
        if names_id && !repeated_id::is_new(&relations, sought, table == EventTable::Scheduled, way()) {
            return std::ptr::null_mut();
        }
        (backend_number, further) = (published.first.backend_number, published.further);
        correct(&row, now, origin, &mut changes);
        changes.set(attribute::EVENT_ID, pg_sys::Datum::from(event_id.as_mut_ptr()));
        if !has_numbers {
            changes.set(attribute::PUBLISHED_BY, pg_sys::Datum::from(publisher()));
        }
    }
    let Key { mut xid, mut seq } = row.key();
    if !has_numbers {
        (xid, seq) = draw_numbers(&relations);
        let is_overdue = || row.i64(attribute::SCHEDULED_AT).is_some_and(|at| at <= now);
        match (origin, table) {
            (Origin::Dump, EventTable::Events) => note_restore(backend_number, xid),
            (Origin::Dump, EventTable::Scheduled) if is_overdue() => xid = RESTORED_OVERDUE,
            _ => {}
        }
        changes.set(attribute::XID, pg_sys::Datum::from(xid));
        changes.set(attribute::SEQ, pg_sys::Datum::from(seq));
    }
    let key = RowKey {
        xid,
        seq,
        backend_number,
        event_id,
    };
    if !further.is_empty() {
        // SAFETY: the caller's promise.
        unsafe { fan_out::expect_trigger_on(relation) };
        note_further(table, key, &row, further);
    }
    match table {
        EventTable::Events => {
            note_completed(key);
            txn::published();
        }
        EventTable::Scheduled => txn::scheduled(),
    }
    // SAFETY: the caller's promise; the values are of the columns' types.
    unsafe { changes.made(tuple, descriptor) }
}

/// Corrects values that a row must not have: a missing or infinite time, and a branch other than that of its event's
/// first row. A row that was published before may have another branch.
fn correct(row: &Row, now: i64, origin: Origin, changes: &mut Changes) {
    let created_at = row.i64(attribute::CREATED_AT);
    if created_at.is_none_or(|at| at == i64::MIN || at == i64::MAX) {
        changes.set(attribute::CREATED_AT, pg_sys::Datum::from(now));
    }
    if !origin.was_published() && row.branch() != 0 || row.get(attribute::BRANCH).is_none() {
        changes.set(attribute::BRANCH, pg_sys::Datum::from(0i16));
    }
}

/// Notes the further rows of an event and draws their numbers.
fn note_further(table: EventTable, key: RowKey, row: &Row, further: Vec<Destination>) {
    let relations = catalog::expect_relations();
    let numbered = further.into_iter().map(|to| (draw_numbers(&relations).1, to));
    let request = request_of(row).without_empty();
    fan_out::note(
        table == EventTable::Scheduled,
        key,
        request.stream.as_deref(),
        numbered.collect(),
    );
}

/// Checks what the publisher has given, and fills in where the event goes. A row that was published before was checked
/// then and has its backend.
fn expect_published(row: &Row, table: EventTable, origin: Origin, changes: &mut Changes) -> Destinations {
    let (given, again) = (request_of(row), origin.was_published());
    if !again {
        for json in [&given.data, &given.publisher_config].into_iter().flatten() {
            json::expect_jsonb(json);
        }
    }
    let had = optional(&given);
    let request = Request {
        scheduled_at: match table {
            EventTable::Scheduled => row.i64(attribute::SCHEDULED_AT),
            EventTable::Events => None,
        },
        // Rows from a dump and rows that are published again have a backend's number. Imported rows have none.
        keeps_stream: again && row.i32(attribute::BACKEND_NUMBER).is_some(),
        ..given.without_empty()
    };
    let request = match again {
        // Routes do not apply to it.
        true => with_backend(request),
        false => traced(request, changes),
    };
    let destinations = check_restorable(&request, row, origin == Origin::Dump);
    let checked = &destinations.first;
    if !again {
        doubts::say(&request);
    }
    for ((attribute, had), (_, has)) in had.into_iter().zip(optional(&request)) {
        let is_given = attribute == attribute::STREAM && checked.stream.is_some();
        if had && !has && !is_given {
            changes.set(attribute, None);
        }
    }
    if let Some(stream) = &checked.stream {
        changes.set(attribute::STREAM, text_datum(&to_server(stream)));
    }
    changes.set(attribute::BACKEND_NUMBER, pg_sys::Datum::from(checked.backend_number));
    changes.set(attribute::BACKEND, text_datum(&to_server(&checked.backend)));
    destinations
}

/// The request with the session's trace context.
fn traced<'a>(request: Request<'a>, changes: &mut Changes) -> Request<'a> {
    if !guc::is_traced() {
        return request;
    }
    let request = request.traced();
    let config = request.publisher_config.as_deref().map(text_datum);
    config
        .into_iter()
        .for_each(|config| changes.set(attribute::PUBLISHER_CONFIG, config));
    request
}

/// Which of the optional columns are given.
fn optional(request: &Request<'_>) -> [(usize, bool); 4] {
    [
        (attribute::SUBJECT, request.subject.is_some()),
        (attribute::STREAM, request.stream.is_some()),
        (attribute::DATA_SCHEMA, request.data_schema.is_some()),
        (attribute::PUBLISHER_CONFIG, request.publisher_config.is_some()),
    ]
}
