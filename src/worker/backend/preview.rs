//! `outbox.preview(event_id)`: the XADD of one event, by the encoder that sends it.

use crate::server::encoding::words_to_server;
use crate::server::error::{expect_arguments, raise};
use crate::server::report;
use crate::tables::row::EventTexts;
use crate::tables::sql::{query, text_array};
use crate::tables::{backends, rights, ticks};
use crate::worker::backend::entries::Entries;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_sys};
use relay::resp::write::words;
use std::borrow::Cow;

crate::sql_function!(preview, pg_finfo_preview);

/// `outbox.preview(event_id)`, strict
// No pg_guard: as the other functions that are declared by hand.
#[unsafe(no_mangle)]
extern "C-unwind" fn preview(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    report::guard(|| {
        expect_arguments(fcinfo, 1);
        // SAFETY: one argument of type uuid, which points to 16 bytes, and is not null unless somebody has declared the
        // function otherwise.
        unsafe {
            let argument = &(*fcinfo).args.as_slice(1)[0];
            let id = (!argument.isnull).then(|| *argument.value.cast_mut_ptr::<[u8; 16]>());
            let command = id.and_then(|id| rights::of_owner(|| command(id)));
            (*fcinfo).isnull = command.is_none();
            command.map_or(pg_sys::Datum::from(0), |command| {
                let texts = words(&command)
                    .into_iter()
                    .map(|word| Cow::Owned(words_to_server(&shown(word)).into_owned()));
                text_array(texts)
            })
        }
    })
}

/// A word as text; bytes that are none as Postgres shows them.
fn shown(word: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(word) {
        Ok(text) if !word.contains(&0) => text.into(),
        _ => word
            .iter()
            .fold("\\x".to_owned(), |text, byte| format!("{text}{byte:02x}"))
            .into(),
    }
}

/// The command that appends this event as it and its backend are now; `None`: there is none.
fn command(id: [u8; 16]) -> Option<Vec<u8>> {
    let found = query(EVENT, &[pgrx::Uuid::from_bytes(id).into()], |row| {
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
        let event = texts.event(id, row.value("created_at_us").unwrap_or_default());
        let (stream, mut command) = (entries.stream_of(&event), Vec::new());
        match entries.encode(&mut command, &stream, true, &event) {
            Ok(()) => command,
            Err(error) => refuse_event(&error.to_string()),
        }
    });
    found.into_iter().next()
}

/// Wherever it is. Of an event that goes to several streams, its first row.
const EVENT: &str = "select e.backend_number, e.backend, e.event_type, e.source, e.subject, e.data::text, e.stream, e.data_schema,
        e.publisher_config::text, (extract(epoch from e.created_at) * 1000000)::bigint as created_at_us
    from (
        select backend_number, backend, event_type, source, subject, data, stream, data_schema, publisher_config, created_at, seq, branch, 1 as place
        from outbox.events where event_id = $1
        union all
        select backend_number, backend, event_type, source, subject, data, stream, data_schema, publisher_config, created_at, seq, branch, 2
        from outbox.scheduled_events where event_id = $1
        union all
        select backend_number, backend, event_type, source, subject, data, stream, data_schema, publisher_config, created_at, seq, branch, 3
        from outbox.failed_events where event_id = $1
    ) e
    order by e.place, e.branch, e.seq desc limit 1";

fn refuse_backend(name: &str) -> ! {
    raise(
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
            format!("backend \"{name}\" does not exist"),
            "",
        )
        .set_detail("It was deleted, so the event is sent nowhere.")
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
        .set_hint("It fails when its turn comes, and is kept in outbox.failed_events."),
    )
}
