//! Into which stream of its backend an event goes, and whether it may.
//!
//! The order is: which backend, and perhaps which stream (the publisher says it, or a route); without a stream, the
//! backend's own, or what its template makes of the event ([`from_template`], which serves any template); then the
//! backend's `allowed_streams`, and the publisher's limits. These see the name that the entry will have.

use crate::publish::error::PublishError;
use crate::server::encoding::utf8;
use crate::tables::known_backends::KnownBackend;
use crate::tables::publisher_limits::{self, Beyond};
use crate::tables::stream_names::{self, Unnamed};
use relay::event::stream_name::{NAME_LIMIT, Template, Values};
use std::borrow::Cow;

/// What decides the stream of an event; texts in the database's encoding.
pub(super) struct Addressed<'a> {
    pub event_type: Option<&'a [u8]>,
    pub source: Option<&'a [u8]>,
    pub subject: Option<&'a [u8]>,
    /// That the publisher, or a route, has named.
    pub stream: Option<&'a [u8]>,
    /// It was published before: if it names no stream, it is in its backend's own, whatever has become of that since.
    pub keeps_stream: bool,
}

/// The stream that the event's row names though the event does not: what the backend's template has given. `None`: it
/// names the event's own stream, or none at all.
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

/// An error unless the event may go there. `named`: the stream that its row names.
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

/// What the backend's template gives, if it has one.
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

/// The stream that a template gives the event. `backend`: for the words of an error.
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
    // No character is shorter than a byte.
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

fn decoded(text: &[u8]) -> Cow<'_, str> {
    // SAFETY: the texts of an event are valid in the database's encoding.
    unsafe { utf8(text) }
}
