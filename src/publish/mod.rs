//! Publishing: an event becomes a row of `outbox.events` in the caller's transaction. Nothing here depends on the worker.
//!
//! `publish_event` inserts through the table's access method, not the executor, where nobody else has a say (see `insertion.rs`): it
//! needs no rights on the table, and no plan.
//! A plain INSERT comes by the trigger `complete_event`. Both check the same things and draw the same numbers, the transaction id
//! *before* the sequence number: the reader's bounds rely on it (see `relay::reading::snapshot::Tick`).

mod error;
mod repeated_id;
mod request;
mod trigger;

use crate::publish::error::PublishError;
use crate::publish::repeated_id::refuse_repeated_id;
use crate::publish::request::{Request, check, decoded};
use crate::server::datum::bytes_of;
use crate::server::datum::text_datum;
use crate::server::encoding::{has_utf8_form, to_server};
use crate::server::error::expect_arguments;
use crate::server::report;
use crate::server::txn;
use crate::server::uuid;
use crate::tables::catalog::{self, Relations};
use crate::tables::insertion::{Insertion, NewRow};
use crate::tables::missing::{self};
use crate::tables::numbers::draw_numbers;
use crate::tables::row::attribute;
use crate::tables::trusted::RowKey;
use pgrx::pg_sys;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;

// SAFETY: the declaration of tuplestore.h.
unsafe extern "C-unwind" {
    /// Without pgrx's guard: it is called where other people's ERRORs may pass.
    fn tuplestore_putvalues(
        state: *mut pg_sys::Tuplestorestate,
        descriptor: pg_sys::TupleDesc,
        values: *const pg_sys::Datum,
        nulls: *const bool,
    );
}

/// Checks an event, and makes a row of it. Returns nothing that needs to be dropped: from here on, other people's code may run.
fn prepared(request: &Request<'_>, relations: &Relations) -> NewRow {
    // SAFETY: each raises the standard ERROR when the transaction may not write.
    unsafe {
        pg_sys::PreventCommandIfReadOnly(c"outbox.publish_event()".as_ptr());
        pg_sys::PreventCommandDuringRecovery(c"outbox.publish_event()".as_ptr());
        pg_sys::PreventCommandIfParallelMode(c"outbox.publish_event()".as_ptr());
    }
    let checked = check(request).unwrap_or_else(|e| e.raise());
    // SAFETY: reads the clock.
    let now = unsafe { pg_sys::GetCurrentTimestamp() };
    let scheduled_at = request.scheduled_at.filter(|at| *at > now);
    if scheduled_at.is_some() && relations.scheduled == pg_sys::InvalidOid {
        missing::table(c"scheduled_events");
    }
    let event_id = request.event_id.unwrap_or_else(|| uuid::new_v7(now));
    if request.event_id.is_some() {
        refuse_repeated_id(relations, &event_id, scheduled_at.is_some());
    }
    let (xid, seq) = draw_numbers(relations);

    let mut values = [pg_sys::Datum::from(0); attribute::SCHEDULED_AT];
    let mut nulls = [true; attribute::SCHEDULED_AT];
    let mut set = |attribute: usize, datum: pg_sys::Datum| {
        values[attribute - 1] = datum;
        nulls[attribute - 1] = false;
    };
    set(attribute::SEQ, pg_sys::Datum::from(seq));
    set(attribute::XID, pg_sys::Datum::from(xid));
    set(attribute::CREATED_AT, pg_sys::Datum::from(now));
    set(attribute::EVENT_ID, uuid_datum(&event_id));
    set(attribute::BACKEND_NUMBER, pg_sys::Datum::from(checked.backend_number));
    set(attribute::BACKEND, text_datum(&to_server(&checked.backend)));
    let texts = [
        (attribute::EVENT_TYPE, &request.event_type),
        (attribute::SOURCE, &request.source),
        (attribute::DATA, &request.data),
        (attribute::SUBJECT, &request.subject),
        (attribute::STREAM, &request.stream),
        (attribute::DATA_SCHEMA, &request.data_schema),
        (attribute::PUBLISHER_CONFIG, &request.publisher_config),
    ];
    for (attribute, text) in texts {
        if let Some(text) = text {
            set(attribute, text_datum(text));
        }
    }
    if let Some(n) = request.max_retries {
        set(attribute::MAX_RETRIES, pg_sys::Datum::from(n));
    }
    match scheduled_at {
        Some(at) => {
            set(attribute::SCHEDULED_AT, pg_sys::Datum::from(at));
            txn::scheduled();
        }
        None => txn::published(),
    }
    NewRow {
        is_scheduled: scheduled_at.is_some(),
        values,
        nulls,
        key: RowKey {
            xid,
            seq,
            backend_number: checked.backend_number,
            event_id,
        },
    }
}

fn uuid_datum(id: &[u8; 16]) -> pg_sys::Datum {
    // SAFETY: memory of the current context, as large as it must be.
    unsafe {
        let copy = pg_sys::palloc(id.len()).cast::<[u8; 16]>();
        *copy = *id;
        pg_sys::Datum::from(copy)
    }
}

/// The tables that events go into, opened when the first comes.
#[derive(Clone, Copy, Default)]
struct Tables {
    events: Option<Insertion>,
    scheduled: Option<Insertion>,
}

impl Tables {
    /// # Safety
    /// As [`Insertion::insert`].
    unsafe fn insert(&mut self, relations: &Relations, row: &NewRow) -> bool {
        let table = match row.is_scheduled {
            true => &mut self.scheduled,
            false => &mut self.events,
        };
        // SAFETY: the caller's promise.
        unsafe {
            let opened = match *table {
                Some(opened) => opened,
                None => Insertion::open(relations, row.is_scheduled),
            };
            *table = Some(opened);
            opened.insert(row)
        }
    }

    /// # Safety
    /// As [`Insertion::close`].
    unsafe fn close(self) {
        for table in [self.events, self.scheduled].into_iter().flatten() {
            // SAFETY: the caller's promise.
            unsafe { table.close() };
        }
    }
}

crate::sql_function!(publish_event, pg_finfo_publish_event);

/// `outbox.publish_event(...)`
// No pg_guard: ERRORs of other people's triggers pass through; nothing here needs to be dropped.
#[unsafe(no_mangle)]
extern "C-unwind" fn publish_event(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let (row, relations) = report::guard(|| {
        expect_arguments(fcinfo, 11);
        (prepared(&request_of_call(fcinfo), &relations()), relations())
    });
    // SAFETY: within a call by Postgres, as said above; the id lies in the memory of the call.
    unsafe {
        let mut tables = Tables::default();
        let inserted = tables.insert(&relations, &row);
        tables.close();
        // A trigger of somebody may leave a row out, as in an INSERT that inserts none.
        (*fcinfo).isnull = !inserted;
        if inserted {
            row.values[attribute::EVENT_ID - 1]
        } else {
            pg_sys::Datum::from(0)
        }
    }
}

fn relations() -> Relations {
    catalog::expect_relations()
}

fn request_of_call<'a>(fcinfo: pg_sys::FunctionCallInfo) -> Request<'a> {
    // SAFETY: Postgres calls with the eleven arguments of the SQL declaration, of which there are so many.
    let arguments = unsafe { (*fcinfo).args.as_slice(11) };
    let get = |index: usize| (!arguments[index].isnull).then_some(arguments[index].value);
    // SAFETY: arguments 0, 1, 3, 4, 8, 9 are text, 2 and 7 jsonb, 10 uuid.
    let (text, json) = unsafe {
        (
            |index: usize| get(index).map(|d| Cow::Borrowed(bytes_of(d))),
            |index: usize| get(index).map(|d| Cow::Borrowed(rendered_jsonb(d))),
        )
    };
    Request {
        event_type: text(0),
        source: text(1),
        data: json(2),
        subject: text(3),
        backend: text(4),
        scheduled_at: get(5).map(|d| d.value() as i64),
        max_retries: get(6).map(|d| d.value() as i32),
        publisher_config: json(7),
        stream: text(8),
        data_schema: text(9),
        // SAFETY: a uuid datum points to 16 bytes.
        event_id: get(10).map(|d| unsafe { *d.cast_mut_ptr::<[u8; 16]>() }),
    }
}

/// The text of a jsonb, as `::text` shows it.
///
/// # Safety
/// The datum is a jsonb; the slice lives as long as the current memory context.
unsafe fn rendered_jsonb<'a>(datum: pg_sys::Datum) -> &'a [u8] {
    // SAFETY: the caller's promise; the result is zero-terminated and a JSON text holds no zero byte.
    unsafe {
        let jsonb = pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast::<pg_sys::Jsonb>();
        let length = pgrx::varlena::varsize(jsonb.cast());
        let text = pg_sys::JsonbToCString(std::ptr::null_mut(), &raw mut (*jsonb).root, length as i32);
        std::ffi::CStr::from_ptr(text).to_bytes()
    }
}

/// One object of `publish_events`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Item<'a> {
    #[serde(borrow, default)]
    event_type: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    source: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
    #[serde(borrow, default)]
    subject: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    backend: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    scheduled_at: Option<Cow<'a, str>>,
    #[serde(default)]
    max_retries: Option<i32>,
    #[serde(borrow, default)]
    publisher_config: Option<&'a RawValue>,
    #[serde(borrow, default)]
    stream: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    data_schema: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    event_id: Option<Cow<'a, str>>,
}

crate::sql_function!(publish_events, pg_finfo_publish_events);

/// `outbox.publish_events(jsonb)`, strict
// No pg_guard: as publish_event.
#[unsafe(no_mangle)]
extern "C-unwind" fn publish_events(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let (relations, items) = report::guard(|| {
        expect_arguments(fcinfo, 1);
        (relations(), items_of_call(fcinfo))
    });
    let mut tables = Tables::default();
    // SAFETY: within a call by Postgres; the set of results was made by guard's body, and so was the list of items.
    unsafe {
        let results = (*fcinfo).resultinfo.cast::<pg_sys::ReturnSetInfo>();
        for index in 0..items.count {
            let row = report::guard(|| prepared_item(&items, index, &relations));
            let inserted = tables.insert(&relations, &row);
            let (value, is_null) = (row.values[attribute::EVENT_ID - 1], !inserted);
            tuplestore_putvalues((*results).setResult, (*results).setDesc, &value, &is_null);
        }
        tables.close();
        (*fcinfo).isnull = true;
    }
    pg_sys::Datum::from(0)
}

/// The elements of an array, as texts in the memory of the call.
#[derive(Clone, Copy)]
struct Items {
    first: *mut (*const u8, usize),
    count: usize,
}

/// The elements of the argument, and a place for the results.
fn items_of_call(fcinfo: pg_sys::FunctionCallInfo) -> Items {
    // SAFETY: one argument of type jsonb, by the SQL declaration, which is strict; a strictness that somebody else's has not is asked for.
    unsafe {
        let argument = &(*fcinfo).args.as_slice(1)[0];
        if argument.isnull {
            PublishError::NotAnArray.raise();
        }
        #[cfg(feature = "pg15")]
        pg_sys::SetSingleFuncCall(fcinfo, pg_sys::MAT_SRF_USE_EXPECTED_DESC);
        #[cfg(not(feature = "pg15"))]
        pg_sys::InitMaterializedSRF(fcinfo, pg_sys::MAT_SRF_USE_EXPECTED_DESC);
        let rendered = rendered_jsonb(argument.value);
        if let Err(text) = has_utf8_form(rendered) {
            PublishError::Foreign { field: "events", text }.raise();
        }
        let text: &str = match decoded(rendered) {
            Cow::Borrowed(text) => text,
            // No conversion gives one of ours, which would have to outlive this.
            Cow::Owned(text) => text.leak(),
        };
        let items: Vec<&RawValue> = serde_json::from_str(text).unwrap_or_else(|_| PublishError::NotAnArray.raise());
        let size = size_of::<(*const u8, usize)>() * items.len().max(1);
        let first = pg_sys::MemoryContextAllocHuge(pg_sys::CurrentMemoryContext, size).cast::<(*const u8, usize)>();
        for (index, item) in items.iter().enumerate() {
            *first.add(index) = (item.get().as_ptr(), item.get().len());
        }
        Items {
            first,
            count: items.len(),
        }
    }
}

fn prepared_item(items: &Items, index: usize, relations: &Relations) -> NewRow {
    // SAFETY: an element of the list, which is UTF-8 as all of the text.
    let text = unsafe {
        let (start, length) = *items.first.add(index);
        std::str::from_utf8_unchecked(std::slice::from_raw_parts(start, length))
    };
    let item: Item<'_> = serde_json::from_str(text).unwrap_or_else(|e| {
        let message = e.to_string();
        let message = message.split(" at line").next().unwrap_or_default().to_owned();
        PublishError::BadItem { index, message }.raise()
    });
    prepared(&request_of(&item, index), relations)
}

fn request_of<'a>(item: &'a Item<'a>, index: usize) -> Request<'a> {
    let bytes = |text: &'a Option<Cow<'a, str>>| text.as_deref().map(to_server);
    let raw = |value: Option<&'a RawValue>| value.map(|v| to_server(v.get()));
    Request {
        event_type: bytes(&item.event_type),
        source: bytes(&item.source),
        data: raw(item.data),
        subject: bytes(&item.subject),
        backend: bytes(&item.backend),
        scheduled_at: item.scheduled_at.as_deref().map(parse_timestamp),
        max_retries: item.max_retries,
        publisher_config: raw(item.publisher_config),
        stream: bytes(&item.stream),
        data_schema: bytes(&item.data_schema),
        event_id: item.event_id.as_deref().map(|text| {
            uuid::parse(text).unwrap_or_else(|| {
                PublishError::BadItem {
                    index,
                    message: "event_id is not a UUID".into(),
                }
                .raise()
            })
        }),
    }
}

/// A time as `timestamptz` takes it, with its errors.
fn parse_timestamp(text: &str) -> i64 {
    let text = std::ffi::CString::new(text).unwrap_or_default();
    let arguments = [
        Some(pg_sys::Datum::from(text.as_ptr())),
        Some(pg_sys::Datum::from(pg_sys::TIMESTAMPTZOID)),
        Some(pg_sys::Datum::from(-1i32)),
    ];
    // SAFETY: the input function's three arguments: text, type, no precision.
    let datum = unsafe { pgrx::direct_function_call_as_datum(pg_sys::timestamptz_in, &arguments) };
    datum.map_or(0, |d| d.value() as i64)
}
