//! Decides which stream of its backend an event goes into, and whether that is allowed.
//!
//! First the publisher or a route chooses the backend, and perhaps the stream. Without a stream, the event goes to the
//! backend's own stream, or to the one that its template gives ([`from_template`], which serves any template). Then the
//! backend's `allowed_streams` and the publisher's limits are checked, against the name that the entry's stream will
//! have.

use crate::publish::error::PublishError;
use crate::publish::request::{Addressed, decoded};
use crate::tables::known_backends::KnownBackend;
use crate::tables::publisher_limits::{self, Beyond};
use crate::tables::stream_names::{self, Unnamed};
use relay::event::stream_name::{NAME_LIMIT, Template, Values};
use std::borrow::Cow;

/// The stream that the row stores although the event names none: the one that the backend's template gives. `None`: the
/// row stores the event's own stream, or none.
pub(super) fn placed(
    event: &Addressed<'_>,
    backend: &str,
    known: &KnownBackend,
) -> Result<Option<String>, PublishError> {
    let given = match event.stream.is_none() && !event.keeps_stream {
        true => of_template(event, backend, known)?,
        false => None,
    };
    let named = given
        .as_deref()
        .map(Cow::Borrowed)
        .or_else(|| event.stream.map(decoded));
    expect_allowed(backend, known, named)?;
    Ok(given)
}

/// Returns an error unless the event may go there. `named`: the stream that its row stores.
pub(super) fn expect_allowed(
    backend: &str,
    known: &KnownBackend,
    named: Option<Cow<'_, str>>,
) -> Result<(), PublishError> {
    if let Some(stream) = named.as_ref().filter(|stream| !known.allows(stream)) {
        return Err(PublishError::StreamNotAllowed {
            backend: backend.to_owned(),
            stream: stream.to_string(),
        });
    }
    let Some(limits) = publisher_limits::of_user() else {
        return Ok(());
    };
    let stream = named.unwrap_or_else(|| known.own_stream());
    limits.check(backend, &stream).map_err(|beyond| match beyond {
        Beyond::Backend(allowed) => PublishError::BackendBeyondLimit {
            backend: backend.to_owned(),
            allowed,
        },
        Beyond::Stream(allowed) => PublishError::StreamBeyondLimit {
            backend: backend.to_owned(),
            stream: stream.to_string(),
            allowed,
        },
    })
}

/// The stream that the backend's template gives, if it has one.
pub(super) fn of_template(
    event: &Addressed<'_>,
    backend: &str,
    known: &KnownBackend,
) -> Result<Option<String>, PublishError> {
    match known.unnamed() {
        Unnamed::Own => Ok(None),
        Unnamed::Template(template) => from_template(&template, event, backend).map(Some),
        Unnamed::Unusable(fault) => Err(PublishError::UnusableStreamName {
            backend: backend.to_owned(),
            fault,
        }),
    }
}

/// The stream that a template gives the event. `backend` is for the text of an error.
pub(super) fn from_template(template: &Template, event: &Addressed<'_>, backend: &str) -> Result<String, PublishError> {
    let event_type = event.event_type.map(decoded);
    let source = event.source.map(decoded);
    let subject = event.subject.map(decoded);
    let database = stream_names::database();
    let values = Values {
        event_type: event_type.as_deref().unwrap_or_default(),
        source: source.as_deref().unwrap_or_default(),
        subject: subject.as_deref(),
        database: &database,
    };
    let name = template
        .resolve(&values)
        .map_err(|lacking| PublishError::LacksPartOfStream {
            backend: backend.to_owned(),
            field: lacking.0,
        })?;
    // A character has at least one byte, so a short enough text need not be counted.
    let length = if name.len() > NAME_LIMIT {
        name.chars().count()
    } else {
        0
    };
    if length > NAME_LIMIT {
        return Err(PublishError::LongStream {
            backend: backend.to_owned(),
            length,
        });
    }
    Ok(name)
}
