//! Events that are accepted but are probably not what the application meant: a WARNING, once in a session.

use crate::publish::request::{Request, decoded};
use crate::server::report;
use pgrx::{PgLogLevel, PgSqlErrorCode};
use relay::event::doubts::{holds_json, is_uri_reference};
use std::cell::Cell;

thread_local! {
    static SAID: Cell<Said> = const { Cell::new(Said { encoded_twice: false, source: false }) };
}

#[derive(Clone, Copy)]
struct Said {
    encoded_twice: bool,
    source: bool,
}

/// Looks for such a doubt in an event that is published.
pub(super) fn say(request: &Request<'_>) {
    let said = SAID.get();
    if !said.encoded_twice
        && let Some(data) = request
            .data
            .as_deref()
            .filter(|data| data.trim_ascii_start().starts_with(b"\""))
        && holds_json(&decoded(data))
    {
        SAID.set(Said {
            encoded_twice: true,
            ..SAID.get()
        });
        warn(
            "data is a JSON string that holds JSON",
            "It was probably encoded twice, by the application and by its driver. Consumers get a string.",
            "Pass the object itself, or its text as text. This warning appears once in a session.",
        );
    }
    if !said.source
        && let Some(source) = request.source.as_deref().filter(|source| !is_uri_reference(source))
    {
        SAID.set(Said {
            source: true,
            ..SAID.get()
        });
        warn(
            &format!("source \"{}\" is not a URI reference", decoded(source)),
            "CloudEvents asks for one: strict consumers refuse the event.",
            "Use a name such as user-service, or a path such as /shop/orders. This warning appears once in a session.",
        );
    }
}

fn warn(message: &str, detail: &str, hint: &str) {
    let code = PgSqlErrorCode::ERRCODE_WARNING;
    report::say(PgLogLevel::WARNING as i32, code, message, Some(detail), Some(hint));
}
