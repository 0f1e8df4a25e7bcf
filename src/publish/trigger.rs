//! Plain INSERT and COPY into `outbox.events` and `outbox.scheduled_events`: the trigger makes the checks of
//! `publish_event` and fills in our columns.

use crate::publish::appending::publisher;
use crate::publish::destinations::{Destination, Destinations, check, with_backend};
use crate::publish::doubts;
use crate::publish::error::PublishError;
use crate::publish::fan_out;
use crate::publish::json;
use crate::publish::repeated_id::{self, Sought};
use crate::publish::request::Request;
use crate::server::datum::bytes_of;
use crate::server::datum::text_datum;
use crate::server::encoding::{has_utf8_form, to_server, utf8};
use crate::server::guc;
use crate::server::report;
use crate::server::trigger_call::When;
use crate::server::trigger_call::expect_trigger;
use crate::server::txn;
use crate::server::uuid;
use crate::tables::applied;
use crate::tables::catalog;
use crate::tables::insertion;
use crate::tables::numbers::draw_numbers;
use crate::tables::restores;
use crate::tables::row::{Row, attribute};
use crate::tables::trusted::RowKey;
use crate::tables::trusted::inserted;
use crate::tables::trusted::{is_moving, subtransaction};
use pgrx::{pg_extern, pg_sys};
use relay::reading::range::Key;
use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

thread_local! {
    /// Rows that `complete_event` has filled in and `confirm_event` has not seen yet.
    static COMPLETED: RefCell<Vec<RowKey>> = const { RefCell::new(Vec::new()) };
    /// The lowest and the highest number that `draw_seq` has drawn in the transaction with this id.
    static DRAWN: Cell<(u64, i64, i64)> = const { Cell::new((0, 0, 0)) };
    /// The backends for which the transaction with this id has noted a restore, with the subtransaction that noted it.
    static RESTORED: RefCell<(u64, BTreeSet<(u32, i32)>)> = const { RefCell::new((0, BTreeSet::new())) };
}

crate::sql_function!(complete_event, pg_finfo_complete_event);

/// Trigger of `outbox.events` and `outbox.scheduled_events`, before each row.
// No pg_guard: our own guard converts our errors to the database's encoding.
#[unsafe(no_mangle)]
extern "C-unwind" fn complete_event(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: within a trigger; nothing here needs to be dropped.
    unsafe { fan_out::insert_pending() };
    report::guard(|| {
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
            if (table == EventTable::Scheduled && applied::is_worker()) || applied::puts_back() {
                (*fcinfo).isnull = false;
                return pg_sys::Datum::from(trigger.tg_trigtuple);
            }
            (*fcinfo).isnull = false;
            // A null tuple leaves the row out.
            pg_sys::Datum::from(completed(table, trigger.tg_trigtuple, trigger.tg_relation))
        }
    })
}

crate::sql_function!(confirm_event, pg_finfo_confirm_event);

/// Trigger of `outbox.events`, before each row and after all other triggers. What `complete_event` has filled in must
/// be unchanged, and what others have changed since must still be a valid event.
// No pg_guard, for the same reason as complete_event.
#[unsafe(no_mangle)]
extern "C-unwind" fn confirm_event(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    report::guard(|| {
        let relations = catalog::expect_relations();
        // SAFETY: as above.
        unsafe {
            let trigger = expect_trigger(fcinfo, "confirm_event", When::BeforeInsertOfRow, &[relations.events]);
            let triggers = (*trigger.tg_relation).trigdesc;
            let is_new = !applied::puts_back();
            if is_new && insertion::has_other_triggers(triggers, &relations.triggers) {
                let row = Row::of(trigger.tg_trigtuple, (*trigger.tg_relation).rd_att);
                confirm(&row);
            } else {
                COMPLETED.with_borrow_mut(Vec::clear);
            }
            (*fcinfo).isnull = false;
            pg_sys::Datum::from(trigger.tg_trigtuple)
        }
    })
}

/// Most rows that wait to be confirmed: one for each statement within a statement, and rows that a trigger has left
/// out.
const MOST_COMPLETED: usize = 64;

fn note_completed(key: RowKey) {
    COMPLETED.with_borrow_mut(|completed| {
        if completed.len() >= MOST_COMPLETED {
            completed.remove(0);
        }
        completed.push(key);
    });
}

fn confirm(row: &Row) {
    let key = key_of(row);
    let is_completed = COMPLETED.with_borrow_mut(|completed| {
        let place = completed.iter().rposition(|known| *known == key);
        completed.truncate(place.unwrap_or(completed.len()));
        place.is_some()
    });
    if !is_completed {
        PublishError::Changed.raise();
    }
    if is_moving() {
        return;
    }
    let request = Request {
        keeps_stream: true,
        ..request_of(row)
    };
    match check(&request) {
        // The backend's name may come from a dump, or somebody has changed it. The number decides.
        Ok(_) | Err(PublishError::UnknownBackend(_)) => {}
        Err(PublishError::NoUtf8Form { .. }) if is_copy() => {}
        Err(e) => e.raise(),
    }
}

fn key_of(row: &Row) -> RowKey {
    let key = row.key();
    RowKey {
        xid: key.xid,
        seq: key.seq,
        backend_number: row.backend_number(),
        event_id: row.uuid(attribute::EVENT_ID).unwrap_or_default(),
    }
}

/// The request that a row makes.
fn request_of(row: &Row) -> Request<'_> {
    // SAFETY: the attributes are of varlena types.
    let text = |attribute: usize| row.get(attribute).map(|d| unsafe { Cow::Borrowed(bytes_of(d)) });
    Request {
        event_type: text(attribute::EVENT_TYPE),
        source: text(attribute::SOURCE),
        data: text(attribute::DATA),
        subject: text(attribute::SUBJECT),
        backend: text(attribute::BACKEND),
        scheduled_at: None,
        max_retries: row.i32(attribute::MAX_RETRIES),
        publisher_config: text(attribute::PUBLISHER_CONFIG),
        stream: text(attribute::STREAM),
        data_schema: text(attribute::DATA_SCHEMA),
        event_id: row.uuid(attribute::EVENT_ID),
        created_at: None,
        keeps_stream: false,
    }
}

/// A row of `publish_event` that other triggers may have changed: it must still be a valid event.
fn confirm_published(key: RowKey, row: &Row) {
    if key_of(row) != key {
        PublishError::Changed.raise();
    }
    let request = Request {
        keeps_stream: true,
        ..request_of(row)
    };
    check(&request).map_or_else(|e| e.raise(), |_| note_completed(key));
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum EventTable {
    Events,
    Scheduled,
}

/// The transaction id of a scheduled event that was overdue when a dump brought it: recovery looks for it before it is
/// sent.
const RESTORED_OVERDUE: u64 = 0;

/// `outbox.draw_seq()`
#[pg_extern(sql = false)]
fn draw_seq() -> i64 {
    let (xid, seq) = draw_numbers(&catalog::expect_relations());
    let (of, lowest, highest) = DRAWN.get();
    DRAWN.set(match of == xid {
        true => (xid, lowest.min(seq), highest.max(seq)),
        false => (xid, seq, seq),
    });
    txn::published();
    seq
}

/// Whether this transaction has drawn the row's numbers for it.
fn has_numbers(row: &Row) -> bool {
    let (xid, lowest, highest) = DRAWN.get();
    let key = row.key();
    // SAFETY: a plain read. A transaction that has drawn numbers has an id.
    let current = unsafe { pg_sys::GetTopFullTransactionIdIfAny().value };
    xid != 0 && key.xid == xid && xid == current && (lowest..=highest).contains(&key.seq)
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
    let mut backend_number = row.backend_number();
    let mut restored_for = None;
    let mut further = Vec::new();
    let has_numbers = row.get(attribute::XID).is_some() && has_numbers(&row);
    let is_scheduled = table == EventTable::Scheduled;
    if !is_moving() {
        // SAFETY: the caller's promise.
        let oid = unsafe { (*relation).rd_id };
        let is_restored = row.get(attribute::XID).is_some() && !has_numbers;
        let again = is_restored || has_numbers;
        let published = expect_published(&row, is_scheduled, again, &mut changes);
        let sought = match again {
            true => Sought::Row(&event_id, row.branch()),
            false => Sought::Event(&event_id),
        };
        if row.get(attribute::EVENT_ID).is_some()
            && !repeated_id::is_new(&relations, sought, is_scheduled, repeated_id::way_of_statement(oid))
        {
            return std::ptr::null_mut();
        }
        restored_for = is_restored.then_some(published.first.backend_number);
        backend_number = published.first.backend_number;
        further = published.further;
        correct(&row, now, again, &mut changes);
        changes.set(attribute::EVENT_ID, pg_sys::Datum::from(event_id.as_mut_ptr()));
        if !has_numbers {
            changes.set(attribute::PUBLISHED_BY, pg_sys::Datum::from(publisher()));
        }
    }
    let Key { mut xid, mut seq } = row.key();
    if !has_numbers {
        (xid, seq) = draw_numbers(&relations);
        let due_at = row.i64(attribute::SCHEDULED_AT).filter(|_| is_scheduled);
        match restored_for {
            Some(number) if !is_scheduled => note_restore(number, xid),
            Some(_) if due_at.is_some_and(|at| at <= now) => xid = RESTORED_OVERDUE,
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
        note_further(is_scheduled, key, &row, further);
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
fn correct(row: &Row, now: i64, again: bool, changes: &mut Changes) {
    let created_at = row.i64(attribute::CREATED_AT);
    if created_at.is_none_or(|at| at == i64::MIN || at == i64::MAX) {
        changes.set(attribute::CREATED_AT, pg_sys::Datum::from(now));
    }
    if !again && row.branch() != 0 || row.get(attribute::BRANCH).is_none() {
        changes.set(attribute::BRANCH, pg_sys::Datum::from(0i16));
    }
}

/// Notes the further rows of an event and draws their numbers.
fn note_further(is_scheduled: bool, key: RowKey, row: &Row, further: Vec<Destination>) {
    let relations = catalog::expect_relations();
    let numbered = further.into_iter().map(|to| (draw_numbers(&relations).1, to));
    let request = request_of(row).without_empty();
    fan_out::note(is_scheduled, key, request.stream.as_deref(), numbered.collect());
}

/// Checks what the publisher has given, and fills in where the event goes. A row that was published before (`again`)
/// was checked then and has its backend.
fn expect_published(row: &Row, is_scheduled: bool, again: bool, changes: &mut Changes) -> Destinations {
    let given = request_of(row);
    if !again {
        for json in [&given.data, &given.publisher_config].into_iter().flatten() {
            json::expect_jsonb(json);
        }
    }
    let had = optional(&given);
    let request = Request {
        scheduled_at: row.i64(attribute::SCHEDULED_AT).filter(|_| is_scheduled),
        // Rows from a dump and rows that are published again have a backend's number. Imported rows have none.
        keeps_stream: again && row.i32(attribute::BACKEND_NUMBER).is_some(),
        ..given.without_empty()
    };
    let request = match again {
        // Routes do not apply to it.
        true => with_backend(request),
        false => traced(request, changes),
    };
    let destinations = check_restorable(&request, row);
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

/// Notes that some of a dump's events may have been sent since it was taken, so that the worker looks for them first.
/// This is noted once in a transaction, and again in each subtransaction, because an earlier one may be rolled back
/// alone.
fn note_restore(number: i32, xid: u64) {
    let key = (subtransaction(), number);
    let is_noted = RESTORED.with_borrow_mut(|(of, noted)| {
        if *of != xid {
            (*of, *noted) = (xid, BTreeSet::new());
        }
        noted.contains(&key)
    });
    if !is_noted {
        restores::note_restore(number, xid);
        RESTORED.with_borrow_mut(|(_, noted)| noted.insert(key));
    }
}

/// As [`check`], but for rows from a dump. They carry a backend's number, and may come before the backend itself or
/// under a name that it no longer has. Only COPY can give a number, and then the number decides.
fn check_restorable(request: &Request<'_>, row: &Row) -> Destinations {
    let number = row.i32(attribute::BACKEND_NUMBER);
    match (check(request), number) {
        (Ok(checked), None) => checked,
        (Ok(checked), Some(number)) if checked.first.backend_number == number => checked,
        // An event that cannot be sent was accepted by an earlier version. It must fail when its turn comes, and must
        // not stop the restore of all others.
        (Ok(_) | Err(PublishError::UnknownBackend(_) | PublishError::NoUtf8Form { .. }), Some(number)) if is_copy() => {
            // SAFETY: a text of the row, if it is there.
            let name = row.get(attribute::BACKEND).map(|d| unsafe { bytes_of(d) });
            let name = name.filter(|name| has_utf8_form(name).is_ok());
            // SAFETY: a text of the row.
            let backend = name.map(|name| unsafe { utf8(name) }.into_owned());
            Destinations {
                first: Destination {
                    backend: backend.unwrap_or_default(),
                    backend_number: number,
                    stream: None,
                },
                further: Vec::new(),
            }
        }
        (Ok(checked), Some(_)) => checked,
        (Err(e), _) => e.raise(),
    }
}

/// Whether the session runs a COPY, as a restore does.
fn is_copy() -> bool {
    // SAFETY: the active portal of the session, if any, while it runs.
    unsafe {
        let portal = pg_sys::ActivePortal;
        !portal.is_null() && (*portal).commandTag == pg_sys::CommandTag::CMDTAG_COPY
    }
}
