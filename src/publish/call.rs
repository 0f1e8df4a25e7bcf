//! `outbox.publish_event`, in three signatures. The documented one has the types of its argument list. The others
//! accept what drivers send instead, such as `json` or `text` for JSON, a text for max_retries or a number for subject.
//! Those arguments are of the types `outbox.any_value`, `outbox.any_number` and `outbox.any_subject`, which are parsed
//! from their text, or `outbox.any_time`. If a call fits several, Postgres chooses the documented one. `outbox.refusal`
//! tells beforehand whether an event would be refused, and `outbox.template_stream` tells where it would go.

use crate::publish::appending::{Tables, prepared};
use crate::publish::binary::data_or_bytes;
use crate::publish::destinations::{check, with_backend};
use crate::publish::error::PublishError;
use crate::publish::json;
use crate::publish::lent_rights::expect_own_right;
use crate::publish::request::{Request, attempts, event_id};
use crate::server::datum::{bytes_of, text_datum};
use crate::server::encoding::{to_server, words_to_server};
use crate::server::error::expect_arguments;
use crate::server::report;
use crate::tables::catalog;
use crate::tables::row::attribute;
use pgrx::pg_sys;
use relay::event::binary::is_marked;
use std::borrow::Cow;

/// Of all signatures.
const ARGUMENTS: usize = 12;
/// Of `outbox.refusal`, which lacks only the bytes.
const REFUSAL_ARGUMENTS: usize = 11;

crate::function_info!(pg_finfo_publish_event);

/// `outbox.publish_event(...)`
// No pg_guard: ERRORs of other people's triggers pass through; nothing here needs to be dropped.
#[unsafe(no_mangle)]
extern "C-unwind" fn publish_event(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: within a call by Postgres, with the arguments of the SQL declaration.
    unsafe { publish(fcinfo, request_of_call) }
}

crate::function_info!(pg_finfo_publish_event_of_any_types);

/// `outbox.publish_event(...)` with arguments of type `outbox.any_value`
// No pg_guard, for the same reason as publish_event.
#[unsafe(no_mangle)]
extern "C-unwind" fn publish_event_of_any_types(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: as publish_event.
    unsafe { publish(fcinfo, request_of_any_call) }
}

crate::sql_function!(refusal, pg_finfo_refusal);

/// `outbox.refusal(...)`: why the documented `publish_event` would refuse these arguments. It does not look for a
/// repeated id.
fn refusal(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    expect_arguments(fcinfo, REFUSAL_ARGUMENTS);
    // SAFETY: called by Postgres, with the arguments of the SQL declaration, and this many.
    let refused = unsafe {
        let request = request_of_call((*fcinfo).args.as_slice(REFUSAL_ARGUMENTS));
        check(&request.without_empty()).err()
    };
    // SAFETY: called by Postgres.
    unsafe { (*fcinfo).isnull = refused.is_none() };
    refused.map_or(pg_sys::Datum::from(0), |error| {
        text_datum(&words_to_server(&error.in_one_line()))
    })
}

crate::sql_function!(template_stream, pg_finfo_template_stream);

/// `outbox.template_stream(event_type, source, subject, backend)`
fn template_stream(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    expect_arguments(fcinfo, 4);
    // SAFETY: called by Postgres, with four texts.
    let stream = unsafe {
        let arguments = (*fcinfo).args.as_slice(4);
        let text = |index: usize| given(arguments, index).map(|d| Cow::Borrowed(bytes_of(d)));
        let request = Request {
            event_type: text(0),
            source: text(1),
            subject: text(2),
            backend: text(3),
            ..Request::default()
        };
        check(&with_backend(request.without_empty()))
            .unwrap_or_else(|error| error.raise())
            .first
            .stream
    };
    // SAFETY: called by Postgres.
    unsafe { (*fcinfo).isnull = stream.is_none() };
    stream.map_or(pg_sys::Datum::from(0), |stream| text_datum(&to_server(&stream)))
}

type Arguments = [pg_sys::NullableDatum];

/// # Safety
/// Within a call by Postgres, with arguments that `request_of` reads. No frame up to Postgres's holds anything that
/// needs dropping.
unsafe fn publish(
    fcinfo: pg_sys::FunctionCallInfo,
    request_of: for<'a> unsafe fn(&'a Arguments) -> Request<'a>,
) -> pg_sys::Datum {
    let prepare = || {
        expect_arguments(fcinfo, ARGUMENTS);
        // SAFETY: the caller's promise; there are this many arguments.
        let request = unsafe { request_of((*fcinfo).args.as_slice(ARGUMENTS)) };
        let relations = catalog::expect_relations();
        let rows = prepared(&request.without_empty().traced(), &relations);
        expect_own_right();
        (rows, relations)
    };
    // SAFETY: the caller's promise; the id lies in the memory of the call.
    unsafe {
        let (rows, relations) = report::guard(prepare);
        let mut tables = Tables::default();
        let inserted = tables.insert(&relations, &rows);
        tables.close();
        // A user's trigger may leave the row out, as for an INSERT that then inserts nothing.
        (*fcinfo).isnull = !inserted;
        if inserted {
            rows.first.values[attribute::EVENT_ID - 1]
        } else {
            pg_sys::Datum::from(0)
        }
    }
}

fn given(arguments: &Arguments, index: usize) -> Option<pg_sys::Datum> {
    arguments.get(index).filter(|a| !a.isnull).map(|a| a.value)
}

/// # Safety
/// Arguments of the documented signature. The request lies in their memory and in that of the call.
unsafe fn request_of_call(arguments: &Arguments) -> Request<'_> {
    let get = |index: usize| given(arguments, index);
    // SAFETY: the caller's promise: arguments 2 and 7 are jsonb, 10 is a uuid, which points to 16 bytes, 11 is a bytea.
    unsafe {
        let data = get(2).map(|d| Cow::Borrowed(json::rendered(d)));
        Request {
            data: data_or_bytes(data, get(11).map(|d| bytes_of(d))),
            max_retries: get(6).map(|d| d.value() as i32),
            publisher_config: get(7).map(|d| Cow::Borrowed(json::rendered(d))),
            event_id: get(10).map(|d| *d.cast_mut_ptr::<[u8; 16]>()),
            ..request_of_texts(arguments)
        }
    }
}

/// # Safety
/// As [`request_of_call`], of the other signatures.
unsafe fn request_of_any_call(arguments: &Arguments) -> Request<'_> {
    let get = |index: usize| given(arguments, index);
    // SAFETY: the caller's promise: arguments 2, 7 and 10 are any_value and 6 is any_number, which have the form of
    // text, 11 is a bytea.
    unsafe {
        let written = |index: usize| get(index).map(|d| text_of(bytes_of(d)));
        let json = |text: &[u8]| Cow::Borrowed(json::rendered(json::parsed(text)));
        // The result of binary_data() is stored unchanged.
        let data = written(2).map(|text| match is_marked(text) {
            true => Cow::Borrowed(text),
            false => json(text),
        });
        Request {
            data: data_or_bytes(data, get(11).map(|d| bytes_of(d))),
            max_retries: written(6).map(|text| attempts(text).unwrap_or_else(|e| e.raise())),
            publisher_config: written(7).map(json),
            event_id: written(10).map(event_id),
            ..request_of_texts(arguments)
        }
    }
}

/// The part that all signatures share.
///
/// # Safety
/// Arguments 0, 1, 3, 4, 8, 9 have the form of text, 5 that of timestamptz.
unsafe fn request_of_texts(arguments: &Arguments) -> Request<'_> {
    let get = |index: usize| given(arguments, index);
    // SAFETY: the caller's promise.
    let text = |index: usize| get(index).map(|d| Cow::Borrowed(unsafe { bytes_of(d) }));
    Request {
        event_type: text(0),
        source: text(1),
        subject: text(3),
        backend: text(4),
        scheduled_at: get(5).map(|d| d.value() as i64),
        stream: text(8),
        data_schema: text(9),
        ..Request::default()
    }
}

/// The bytes as text. They are verified, because a bytea that was passed as an any_value can hold anything.
fn text_of(bytes: &[u8]) -> &[u8] {
    // SAFETY: reads the bytes.
    match unsafe { pg_sys::pg_verifymbstr(bytes.as_ptr().cast(), bytes.len() as i32, true) } {
        true => bytes,
        false => PublishError::NotText.raise(),
    }
}
