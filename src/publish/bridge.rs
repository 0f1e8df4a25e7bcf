//! Bridges: a row that an application inserts into another product's outbox table becomes an event of ours, in the same
//! transaction.
//!
//! The trigger's arguments say, in pairs, which column has what. So one function serves django-broadcaster's table,
//! Debezium's and others. It runs with the rights of whoever inserts the row and needs none of them: EXECUTE on this
//! function decides who may create such a trigger. Therefore it reads only values of Postgres's built-in types, whose
//! functions no user has written.

use crate::publish::appending::{Tables, prepared};
use crate::publish::json;
use crate::publish::request::{Request, event_id};
use crate::server::datum::bytes_of;
use crate::server::error::raise;
use crate::server::report;
use crate::server::trigger_call::{When, expect_trigger};
use crate::tables::catalog;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_sys};
use relay::delivery::refusal::MOST_ATTEMPTS;
use std::borrow::Cow;
use std::ffi::CStr;

crate::function_info!(pg_finfo_publish_row);

/// Trigger for each row that is inserted into another product's outbox table. As a BEFORE trigger it leaves the row out
/// of that table, so that logical decoding does not see it as an event too.
// No pg_guard, for the same reason as publish_event.
#[unsafe(no_mangle)]
extern "C-unwind" fn publish_row(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let prepare = || {
        // SAFETY: called by Postgres; a trigger of this kind has a row.
        let request = unsafe { request_of(expect_trigger(fcinfo, "publish_row", When::InsertOfRow, &[])) };
        let relations = catalog::expect_relations();
        (prepared(&request.without_empty().traced(), &relations), relations)
    };
    // SAFETY: called by Postgres; no frame up to Postgres's holds anything that needs dropping.
    unsafe {
        let (rows, relations) = report::guard(prepare);
        let mut tables = Tables::default();
        tables.insert(&relations, &rows);
        tables.close();
        (*fcinfo).isnull = false;
    }
    // A null tuple leaves the row out. The result of an AFTER trigger is ignored.
    pg_sys::Datum::from(0)
}

/// The request that a row makes.
///
/// # Safety
/// A trigger of a row. The request lies in the memory of the row and of the call.
unsafe fn request_of(trigger: &pg_sys::TriggerData) -> Request<'_> {
    let mut request = Request::default();
    let mut prefix: Option<&[u8]> = None;
    // SAFETY: a trigger has this many arguments, each a zero-terminated text.
    let arguments = unsafe {
        let definition = &*trigger.tg_trigger;
        (0..definition.tgnargs as usize).map(|index| CStr::from_ptr(*definition.tgargs.add(index)))
    };
    let arguments: Vec<&CStr> = arguments.collect();
    for pair in arguments.chunks_exact(2) {
        // SAFETY: the caller's promise.
        let value = unsafe { Value::of(trigger, pair[1]) };
        match pair[0].to_bytes() {
            b"event_type" => request.event_type = value.text(),
            b"source" => request.source = value.text(),
            b"subject" => request.subject = value.text(),
            b"backend" => request.backend = value.text(),
            b"stream" => request.stream = value.text(),
            b"stream_prefix" => prefix = value.literal,
            b"data_schema" => request.data_schema = value.text(),
            b"data" => request.data = value.json(),
            b"publisher_config" => request.publisher_config = value.json(),
            b"event_id" => request.event_id = value.id(),
            b"max_retries" => request.max_retries = value.number(),
            b"scheduled_at" => request.scheduled_at = value.time(),
            b"created_at" => request.created_at = value.time().filter(|at| *at != i64::MIN && *at != i64::MAX),
            _ => refuse(trigger, pair[0], "is not a part of an event"),
        }
    }
    // A longer one is refused, and not copied before.
    const LONG: usize = 64 * 1_024;
    if let (Some(prefix), Some(stream)) = (prefix, request.stream.as_ref().filter(|stream| stream.len() < LONG)) {
        request.stream = Some(Cow::Owned([prefix, stream].concat()));
    }
    // The other clock's present may lie in our future. Such an event is not scheduled.
    if request.scheduled_at <= request.created_at {
        request.scheduled_at = None;
    }
    request
}

/// What a pair of arguments names: a column's value, or a literal text after `=`.
struct Value<'a> {
    trigger: &'a pg_sys::TriggerData,
    name: &'a CStr,
    literal: Option<&'a [u8]>,
    /// The column's type, below all domains.
    base_type: pg_sys::Oid,
    datum: Option<pg_sys::Datum>,
}

impl<'a> Value<'a> {
    /// # Safety
    /// A trigger of a row.
    unsafe fn of(trigger: &'a pg_sys::TriggerData, name: &'a CStr) -> Self {
        let mut value = Value {
            trigger,
            name,
            literal: name.to_bytes().strip_prefix(b"="),
            base_type: pg_sys::InvalidOid,
            datum: None,
        };
        if value.literal.is_some() {
            return value;
        }
        // SAFETY: the caller's promise: the tuple is of the relation's descriptor.
        unsafe {
            let descriptor = (*trigger.tg_relation).rd_att;
            let number = pg_sys::SPI_fnumber(descriptor, name.as_ptr());
            if number <= 0 {
                refuse(trigger, name, "is not there");
            }
            value.base_type = pg_sys::getBaseType(pg_sys::SPI_gettypeid(descriptor, number));
            let mut is_null = false;
            let datum = pg_sys::SPI_getbinval(trigger.tg_trigtuple, descriptor, number, &mut is_null);
            value.datum = (!is_null).then_some(datum);
        }
        value
    }

    fn is_text(&self) -> bool {
        [pg_sys::TEXTOID, pg_sys::VARCHAROID, pg_sys::BPCHAROID].contains(&self.base_type)
    }

    fn refuse(&self) -> ! {
        refuse(self.trigger, self.name, "has a type that is not expected there")
    }

    fn text(&self) -> Option<Cow<'a, [u8]>> {
        if let Some(literal) = self.literal {
            return Some(Cow::Borrowed(literal));
        }
        let plain = [
            pg_sys::UUIDOID,
            pg_sys::INT2OID,
            pg_sys::INT4OID,
            pg_sys::INT8OID,
            pg_sys::NUMERICOID,
        ];
        match self.datum? {
            // SAFETY: a text of the row.
            datum if self.is_text() => Some(Cow::Borrowed(unsafe { bytes_of(datum) })),
            datum if plain.contains(&self.base_type) => Some(Cow::Borrowed(shown(datum, self.base_type))),
            _ => self.refuse(),
        }
    }

    /// JSON null counts as absent.
    fn json(&self) -> Option<Cow<'a, [u8]>> {
        // SAFETY: values of these types; json has the same form as text.
        let text = unsafe {
            match self.datum? {
                datum if self.base_type == pg_sys::JSONBOID => json::rendered(datum),
                datum if self.base_type == pg_sys::JSONOID || self.is_text() => {
                    json::rendered(json::parsed(bytes_of(datum)))
                }
                _ => self.refuse(),
            }
        };
        (!json::is_null(text)).then_some(Cow::Borrowed(text))
    }

    fn id(&self) -> Option<[u8; 16]> {
        match self.datum? {
            // SAFETY: a uuid points to 16 bytes.
            datum if self.base_type == pg_sys::UUIDOID => Some(unsafe { *datum.cast_mut_ptr::<[u8; 16]>() }),
            // SAFETY: a text of the row.
            datum if self.is_text() => Some(event_id(unsafe { bytes_of(datum) })),
            _ => self.refuse(),
        }
    }

    /// Clamped to what an event may have.
    fn number(&self) -> Option<i32> {
        let number = match (self.datum?.value() as i64, self.base_type) {
            (value, pg_sys::INT2OID) => i64::from(value as i16),
            (value, pg_sys::INT4OID) => i64::from(value as i32),
            (value, pg_sys::INT8OID) => value,
            _ => self.refuse(),
        };
        Some(number.clamp(1, i64::from(MOST_ATTEMPTS)) as i32)
    }

    fn time(&self) -> Option<i64> {
        match (self.datum?.value() as i64, self.base_type) {
            (time, pg_sys::TIMESTAMPTZOID) => Some(time),
            _ => self.refuse(),
        }
    }
}

/// The output text of a value of a built-in type.
fn shown<'a>(datum: pg_sys::Datum, of_type: pg_sys::Oid) -> &'a [u8] {
    let (mut output, mut is_varlena) = (pg_sys::InvalidOid, false);
    // SAFETY: a value of this type; the text lives as long as the current memory context.
    unsafe {
        pg_sys::getTypeOutputInfo(of_type, &mut output, &mut is_varlena);
        CStr::from_ptr(pg_sys::OidOutputFunctionCall(output, datum)).to_bytes()
    }
}

/// Raises the ERROR that the table no longer fits its bridge.
fn refuse(trigger: &pg_sys::TriggerData, column: &CStr, what: &str) -> ! {
    // SAFETY: the name of an open relation.
    let table = unsafe { CStr::from_ptr((*(*trigger.tg_relation).rd_rel).relname.data.as_ptr()) };
    raise(
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!(
                "rows of \"{}\" can no longer become events: column \"{}\" {what}",
                table.to_string_lossy(),
                column.to_string_lossy()
            ),
            "",
        )
        .set_detail("A bridge of outbox_relay reads this table. The table was changed after the bridge was made.")
        .set_hint("Run outbox.end_bridge(), and make the bridge again with the columns that the table has now."),
    )
}
