//! `outbox.preview()`: the XADD of one event, made by the encoder that also sends it.

use crate::server::datum::utf8_of;
use crate::server::encoding::words_to_server;
use crate::server::error::{expect_arguments, no_memory, raise};
use crate::tables::row::EventTexts;
use crate::tables::sql::{argument, query, query_named, text_array};
use crate::tables::{backends, rights, ticks};
use crate::worker::backend::entries::Entries;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_sys};
use relay::event::{ConfigError, NoEntry};
use relay::resp::write::words;
use std::borrow::Cow;

crate::sql_function!(preview, pg_finfo_preview);

/// `outbox.preview(event_id)`, strict
fn preview(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    expect_arguments(fcinfo, 1);
    // SAFETY: called by Postgres, with an id.
    unsafe { shown_command(fcinfo, |arguments| Sought::of(arguments[0].value)) }
}

crate::sql_function!(preview_of_backend, pg_finfo_preview_of_backend);

/// `outbox.preview(event_id, backend, stream)`
fn preview_of_backend(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    expect_arguments(fcinfo, 3);
    // SAFETY: called by Postgres, with an id and two texts.
    unsafe {
        shown_command(fcinfo, |arguments| {
            let text = |index: usize| (!arguments[index].isnull).then(|| utf8_of(arguments[index].value).into_owned());
            Sought {
                backend: text(1),
                stream: text(2),
                ..Sought::of(arguments[0].value)
            }
        })
    }
}

/// The row of an event that is asked for.
struct Sought {
    event_id: [u8; 16],
    backend: Option<String>,
    stream: Option<String>,
}

impl Sought {
    /// # Safety
    /// A uuid.
    unsafe fn of(event_id: pg_sys::Datum) -> Self {
        Self {
            // SAFETY: a uuid points to 16 bytes.
            event_id: unsafe { *event_id.cast_mut_ptr::<[u8; 16]>() },
            backend: None,
            stream: None,
        }
    }
}

/// The words of the command; NULL without an id.
///
/// # Safety
/// Called by Postgres, with arguments that `sought` reads; the first is an id.
unsafe fn shown_command(
    fcinfo: pg_sys::FunctionCallInfo,
    sought: impl FnOnce(&[pg_sys::NullableDatum]) -> Sought,
) -> pg_sys::Datum {
    // SAFETY: the caller's promise.
    unsafe {
        let arguments = (*fcinfo).args.as_slice((*fcinfo).nargs as usize);
        let sought = (!arguments[0].isnull).then(|| sought(arguments));
        let command = sought.and_then(|sought| rights::of_owner(|| command(&sought)));
        (*fcinfo).isnull = command.is_none();
        command.map_or(pg_sys::Datum::from(0), |command| {
            let texts = words(&command)
                .into_iter()
                .map(|word| Cow::Owned(words_to_server(&shown(word)).into_owned()));
            text_array(texts)
        })
    }
}

/// A word as text. Bytes that are not UTF-8 are shown as Postgres shows a bytea.
fn shown(word: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(word) {
        Ok(text) if !word.contains(&0) => text.into(),
        _ => word
            .iter()
            .fold("\\x".to_owned(), |text, byte| format!("{text}{byte:02x}"))
            .into(),
    }
}

/// The command that appends this row of an event with its present values and options; `None`: the row does not exist.
fn command(sought: &Sought) -> Option<Vec<u8>> {
    let text = |text: &Option<String>| argument(text.as_deref().unwrap_or_default());
    let parameters = [
        ("event_id", pgrx::Uuid::from_bytes(sought.event_id).into()),
        ("backend", text(&sought.backend)),
        ("any_backend", sought.backend.is_none().into()),
        // A backend's rows are distinguished by their streams.
        ("all", sought.stream.is_some().into()),
    ];
    let found = query_named(EVENT, parameters, |row| {
        let text = |column| row.text(column).map(Cow::Owned);
        let number: i32 = row.value("backend_number").unwrap_or_default();
        let name = row.text("backend").unwrap_or_default();
        let Some(options) = backends::options(number, &name) else {
            refuse_backend(&name);
        };
        let mut entries = Entries::of(Some(&options), 0);
        entries.tell_lsn(ticks::here);
        let texts = EventTexts {
            event_type: text("event_type"),
            source: text("source"),
            subject: text("subject"),
            data: text("data"),
            stream: text("stream"),
            data_schema: text("data_schema"),
            publisher_config: text("publisher_config"),
        };
        let event = texts.event(sought.event_id, row.value("created_at_us").unwrap_or_default());
        let (stream, mut command) = (entries.stream_of(&event), Vec::new());
        if sought.stream.as_ref().is_some_and(|sought| **sought != *stream) {
            return None;
        }
        match entries.encode(&mut command, &stream, true, &event) {
            Ok(()) => Some(command),
            Err(NoEntry::Config(ConfigError::NoMemory(_))) => no_memory(),
            Err(error) => refuse_event(&error.to_string()),
        }
    });
    if let (Some(name), true) = (&sought.backend, found.is_empty()) {
        // A name that is unknown is an ERROR.
        query("select outbox.expect_backend_name($1)", &[argument(name)], |_| ());
    }
    found.into_iter().flatten().next()
}

/// Finds the event in whichever table it is. If it goes to several streams, this is its first row, or the first of a
/// backend. A backend is known by its present name; a deleted one by the name that it had.
const EVENT: &str = "select e.backend_number, e.backend, e.event_type, e.source, e.subject, e.data::text, e.stream, e.data_schema,
        e.publisher_config::text, (extract(epoch from e.created_at) * 1000000)::bigint as created_at_us
    from (
        select backend_number, backend, event_type, source, subject, data, stream, data_schema, publisher_config, created_at, seq, branch, 1 as place
        from outbox.events where event_id = $event_id
        union all
        select backend_number, backend, event_type, source, subject, data, stream, data_schema, publisher_config, created_at, seq, branch, 2
        from outbox.scheduled_events where event_id = $event_id
        union all
        select backend_number, backend, event_type, source, subject, data, stream, data_schema, publisher_config, created_at, seq, branch, 3
        from outbox.failed_events where event_id = $event_id
    ) e left join outbox.backends b on b.number = e.backend_number
    where $any_backend or coalesce(b.name, e.backend) = $backend
    order by e.place, e.branch, e.seq desc limit case when not $all then 1 end";

fn refuse_backend(name: &str) -> ! {
    raise(
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
            format!("backend \"{name}\" does not exist"),
            "",
        )
        .set_detail("It was deleted, so the event will not be sent.")
        .set_hint("Insert a backend of this name into outbox.backends, and call outbox.retry_failed()."),
    )
}

fn refuse_event(error: &str) -> ! {
    raise(
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            "the event cannot be sent",
            "",
        )
        .set_detail(format!("{error}."))
        .set_hint("It will fail when its turn comes, and is then kept in outbox.failed_events."),
    )
}
