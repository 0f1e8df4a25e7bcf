//! `stream_name` of backends: the trigger that refuses an invalid template and keeps the previous own stream of the
//! backend, and the hash that templates use, for applications that look for a stream.

use crate::server::datum::{bytes_of, text_datum};
use crate::server::encoding::{to_server, utf8_in_context};
use crate::server::error::{raise, strict_arguments};
use crate::server::guc;
use crate::server::trigger_call::{When, expect_trigger, new_and_old};
use crate::tables::rights;
use crate::tables::sql::query_value;
use crate::tables::stream_names::DEFAULT_STREAM;
use crate::tables::whole_table::{Columns, NamedRow};
use crate::tables::{catalog, stream_names};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_sys};
use relay::event::stream_name::{Fault, MOST_PARTS, StreamName, part_of};
use std::ffi::CString;
use std::num::NonZeroU32;

crate::sql_function!(check_stream_name, pg_finfo_check_stream_name);

/// `outbox.check_stream_name()`, trigger of `outbox.backends`, before each row is inserted or updated
fn check_stream_name(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let backends = catalog::expect_relations().backends;
    // SAFETY: called by Postgres; a trigger of this kind has a row, and an update the new one too.
    unsafe {
        let trigger = expect_trigger(fcinfo, "check_stream_name", When::BeforeRow, &[backends]);
        (*fcinfo).isnull = false;
        let columns = Columns::of(trigger.tg_relation, &COLUMNS);
        let (new, old) = new_and_old(trigger);
        let old = old.map(|old| columns.take_apart(old));
        let row = columns.take_apart(new);
        row.expect_short();
        let streams = streams_of(&row, old.as_ref());
        pg_sys::Datum::from(with(trigger.tg_relation, new, &row, &streams))
    }
}

const COLUMNS: [&str; 4] = ["name", "mode", "stream_name", "own_stream"];

/// `stream_name` and `own_stream` of a row that is written.
type Streams = [(&'static str, Option<String>); 2];

fn streams_of(row: &NamedRow<'_>, old: Option<&NamedRow<'_>>) -> Streams {
    let mut stream_name = row.text("stream_name");
    if stream_name.is_none() && row.text("mode").as_deref() == Some("cluster") {
        // A later change of the setting must not move the backend's events to another hash slot.
        let setting = guc::text(&guc::REDIS_STREAM_NAME);
        stream_name = Some(setting)
            .filter(|name| !name.is_empty())
            .or_else(|| Some(DEFAULT_STREAM.to_owned()));
    }
    let parsed = stream_name.as_deref().map(StreamName::parse).transpose();
    let parsed = parsed.unwrap_or_else(|fault| refuse(&row.text("name").unwrap_or_default(), &fault));
    let own_stream = parsed.map(|parsed| match parsed {
        StreamName::Plain(name) => name,
        // Events that were published before stay in their stream.
        StreamName::Template(_) => given(row, old)
            .or_else(|| old?.text("own_stream"))
            .unwrap_or_else(common_stream),
    });
    [("stream_name", stream_name), ("own_stream", own_stream)]
}

/// An `own_stream` that a dump or a user has given.
fn given(row: &NamedRow<'_>, old: Option<&NamedRow<'_>>) -> Option<String> {
    let given = row.text("own_stream");
    let is_old = old.is_some_and(|old| old.text("own_stream") == given);
    given.filter(|_| !is_old)
}

/// The stream of backends that have none of their own.
fn common_stream() -> String {
    let noted = || rights::of_owner(|| query_value::<String>("select outbox.common_stream()", &[]));
    let common = stream_names::plain_setting().or_else(noted);
    common.unwrap_or_else(|| DEFAULT_STREAM.to_owned())
}

fn refuse(backend: &str, fault: &Fault) -> ! {
    raise(
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_CHECK_VIOLATION,
            format!("stream_name of backend \"{backend}\" {fault}"),
            "",
        )
        .set_detail(fault.detail())
        .set_hint(fault.hint()),
    )
}

/// The tuple with these columns changed, as far as their values differ.
///
/// # Safety
/// The tuple belongs to an open relation, and `row` is the same row.
unsafe fn with(
    relation: pg_sys::Relation,
    tuple: pg_sys::HeapTuple,
    row: &NamedRow<'_>,
    streams: &Streams,
) -> pg_sys::HeapTuple {
    let (mut numbers, mut values, mut nulls) = (Vec::new(), Vec::new(), Vec::new());
    for (column, text) in streams.iter().filter(|(column, text)| row.text(column) != *text) {
        let name = CString::new(*column).unwrap_or_default();
        // SAFETY: the caller's promise.
        numbers.push(unsafe { pg_sys::SPI_fnumber((*relation).rd_att, name.as_ptr()) });
        nulls.push(text.is_none());
        values.push(
            text.as_deref()
                .map_or(pg_sys::Datum::from(0), |text| text_datum(&to_server(text))),
        );
    }
    if numbers.is_empty() {
        return tuple;
    }
    // SAFETY: the caller's promise; three lists of the same length, with values of type text.
    unsafe {
        pg_sys::heap_modify_tuple_by_cols(
            tuple,
            (*relation).rd_att,
            numbers.len() as i32,
            numbers.as_mut_ptr(),
            values.as_mut_ptr(),
            nulls.as_mut_ptr(),
        )
    }
}

crate::sql_function!(stream_part, pg_finfo_stream_part);

/// `outbox.stream_part(value, parts)`, strict
fn stream_part(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let Some([value, parts]) = strict_arguments(fcinfo) else {
        return pg_sys::Datum::from(0);
    };
    let parts = u32::try_from(parts.value() as i32).ok().and_then(NonZeroU32::new);
    let Some(parts) = parts.filter(|parts| parts.get() <= MOST_PARTS) else {
        raise(
            ErrorReport::new(
                PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
                "the number of parts is out of range",
                "",
            )
            .set_detail(format!("It must be between 1 and {MOST_PARTS}."))
            .set_hint("Pass the number of the placeholder, such as 16 for {subject|16}."),
        );
    };
    // SAFETY: the first argument is of type text.
    let value = unsafe { utf8_in_context(bytes_of(value)) };
    pg_sys::Datum::from(part_of(value, parts) as i32)
}
