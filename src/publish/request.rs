//! What a publisher asks for, and the checks that do not depend on the destination, for all ways to publish.

use crate::publish::error::PublishError;
use crate::publish::json;
use crate::publish::trace;
use crate::server::encoding::{has_utf8_form, utf8};
use crate::server::{error, guc};
use pgrx::pg_sys;
use relay::delivery::refusal::MOST_ATTEMPTS;
use relay::event::{ConfigError, further_fields};
use std::borrow::Cow;
use std::ffi::CString;

/// Characters allowed in event_type and source, as in django-broadcaster's model.
const NAME_LIMIT: usize = 255;
/// How many characters of an invalid number an error shows.
const SHOWN: usize = 40;
/// Characters allowed in subject, stream and data_schema.
const TEXT_LIMIT: usize = 1_024;

/// What a publisher asks for; texts in the database's encoding.
#[derive(Default)]
pub(super) struct Request<'a> {
    pub event_type: Option<Cow<'a, [u8]>>,
    pub source: Option<Cow<'a, [u8]>>,
    pub data: Option<Cow<'a, [u8]>>,
    pub subject: Option<Cow<'a, [u8]>>,
    pub backend: Option<Cow<'a, [u8]>>,
    pub scheduled_at: Option<i64>,
    pub max_retries: Option<i32>,
    pub publisher_config: Option<Cow<'a, [u8]>>,
    pub stream: Option<Cow<'a, [u8]>>,
    pub data_schema: Option<Cow<'a, [u8]>>,
    pub event_id: Option<[u8; 16]>,
    /// When another outbox took the event in; `None`: now.
    pub created_at: Option<i64>,
    /// See [`Addressed`].
    pub keeps_stream: bool,
}

/// What decides the stream of an event; texts in the database's encoding.
pub(super) struct Addressed<'a> {
    pub event_type: Option<&'a [u8]>,
    pub source: Option<&'a [u8]>,
    pub subject: Option<&'a [u8]>,
    /// The stream that the publisher or a route has named.
    pub stream: Option<&'a [u8]>,
    /// It was published before: if it names no stream, it belongs to its backend's own stream, even if that has changed
    /// since.
    pub keeps_stream: bool,
}

impl Request<'_> {
    /// Treats what ORMs send for an absent value as absent: an empty text where text is optional, and JSON null for
    /// further fields.
    pub(super) fn without_empty(mut self) -> Self {
        for text in [
            &mut self.subject,
            &mut self.backend,
            &mut self.stream,
            &mut self.data_schema,
        ] {
            if text.as_deref().is_some_and(<[u8]>::is_empty) {
                *text = None;
            }
        }
        if self.publisher_config.as_deref().is_some_and(json::is_null) {
            self.publisher_config = None;
        }
        self
    }

    /// With the trace context of the session.
    pub(super) fn traced(mut self) -> Self {
        self.publisher_config = trace::traced(self.publisher_config.take());
        self
    }

    /// The values that decide its stream.
    pub(super) fn addressed(&self) -> Addressed<'_> {
        Addressed {
            event_type: self.event_type.as_deref(),
            source: self.source.as_deref(),
            subject: self.subject.as_deref(),
            stream: self.stream.as_deref(),
            keeps_stream: self.keeps_stream,
        }
    }

    fn texts(&self) -> [(&'static str, Option<&[u8]>); 7] {
        [
            ("event_type", self.event_type.as_deref()),
            ("source", self.source.as_deref()),
            ("data", self.data.as_deref()),
            ("subject", self.subject.as_deref()),
            ("publisher_config", self.publisher_config.as_deref()),
            ("stream", self.stream.as_deref()),
            ("data_schema", self.data_schema.as_deref()),
        ]
    }
}

/// The refusals that do not depend on the destination: see [`crate::publish::destinations::check`].
pub(super) fn check_itself(request: &Request<'_>) -> Result<(), PublishError> {
    check_name("event_type", request.event_type.as_deref())?;
    check_name("source", request.source.as_deref())?;
    check_length("subject", request.subject.as_deref(), TEXT_LIMIT)?;
    check_length("data_schema", request.data_schema.as_deref(), TEXT_LIMIT)?;
    if request.stream.as_deref().is_some_and(<[u8]>::is_empty) {
        return Err(PublishError::EmptyStream);
    }
    check_length("stream", request.stream.as_deref(), TEXT_LIMIT)?;
    check_length("backend", request.backend.as_deref(), TEXT_LIMIT)?;
    match request.max_retries {
        Some(n) if n < 0 => return Err(PublishError::NegativeRetries(n.to_string())),
        Some(n) if n > MOST_ATTEMPTS => return Err(PublishError::ManyRetries(n.to_string())),
        _ => {}
    }
    if request.scheduled_at == Some(i64::MAX) {
        return Err(PublishError::EndlessSchedule);
    }
    check_size_and_encoding(request)
}

/// Checks that an event is not too large and can be sent: its texts must have a UTF-8 form.
fn check_size_and_encoding(request: &Request<'_>) -> Result<(), PublishError> {
    let texts = request.texts();
    check_size(size_of(&texts))?;
    for (field, text) in texts.into_iter().chain([("backend", request.backend.as_deref())]) {
        if let Some(text) = text {
            has_utf8_form(text).map_err(|why| PublishError::NoUtf8Form { field, why })?;
        }
    }
    Ok(())
}

/// Checks that the further fields are flat and that none is a field of the backend's format.
pub(super) fn check_config(request: &Request<'_>, own_fields: &[&str]) -> Result<(), PublishError> {
    let Some(config) = request.publisher_config.as_deref() else {
        return Ok(());
    };
    let fields = match further_fields(&decoded(config), own_fields) {
        Err(ConfigError::NoMemory(_)) => error::no_memory(),
        fields => fields?,
    };
    // The size counts numbers with all their digits, as jsonb stores them.
    let sent: usize = fields.iter().map(|(key, value)| key.len() + value.len()).sum();
    check_size(size_of(&request.texts()) + sent.saturating_sub(config.len()))
}

fn size_of(texts: &[(&'static str, Option<&[u8]>)]) -> usize {
    texts.iter().filter_map(|(_, text)| *text).map(<[u8]>::len).sum()
}

fn check_size(size: usize) -> Result<(), PublishError> {
    let limit = guc::MAX_EVENT_SIZE_KB.get() as usize * 1_024;
    match size > limit {
        true => Err(PublishError::TooLarge { size, limit }),
        false => Ok(()),
    }
}

/// The beginning of a text of which more is neither valid nor worth a copy.
fn shortened(text: &[u8]) -> &[u8] {
    const ENOUGH: usize = 200;
    // SAFETY: valid text in the database's encoding, or bytes of which some are cut.
    let length = unsafe { pg_sys::pg_mbcliplen(text.as_ptr().cast(), text.len() as i32, ENOUGH as i32) };
    &text[..(length.max(0) as usize).min(text.len())]
}

/// A number of attempts from its text.
pub(super) fn attempts(text: &[u8]) -> Result<i32, PublishError> {
    let shown = || String::from_utf8_lossy(shortened(text)).chars().take(SHOWN).collect();
    let number = std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.trim().parse::<f64>().ok());
    match number {
        Some(n) if !n.is_finite() || n.fract() != 0.0 => Err(PublishError::BadRetries(shown())),
        Some(n) if n < 0.0 => Err(PublishError::NegativeRetries(shown())),
        Some(n) if n > f64::from(MOST_ATTEMPTS) => Err(PublishError::ManyRetries(shown())),
        Some(n) => Ok(n as i32),
        None => Err(PublishError::BadRetries(shown())),
    }
}

/// An id from its text. Raises the errors of type uuid.
pub(super) fn event_id(text: &[u8]) -> [u8; 16] {
    let text = CString::new(shortened(text)).unwrap_or_default();
    let arguments = [Some(pg_sys::Datum::from(text.as_ptr()))];
    // SAFETY: the input function's argument; its result points to 16 bytes.
    unsafe {
        let id = pgrx::direct_function_call_as_datum(pg_sys::uuid_in, &arguments);
        id.map_or([0; 16], |id| *id.cast_mut_ptr::<[u8; 16]>())
    }
}

/// A time from its text. Raises the errors of type timestamptz. Without a zone it is in the session's TimeZone.
pub(super) fn time(text: &[u8]) -> i64 {
    let text = CString::new(shortened(text)).unwrap_or_default();
    let arguments = [
        Some(pg_sys::Datum::from(text.as_ptr())),
        Some(pg_sys::Datum::from(pg_sys::TIMESTAMPTZOID)),
        Some(pg_sys::Datum::from(-1i32)),
    ];
    // SAFETY: the input function's three arguments: text, type, no precision.
    let time = unsafe { pgrx::direct_function_call_as_datum(pg_sys::timestamptz_in, &arguments) };
    time.map_or(0, |time| time.value() as i64)
}

/// A request's text in UTF-8.
pub(super) fn decoded(text: &[u8]) -> Cow<'_, str> {
    // SAFETY: the texts of a request are valid in the database's encoding.
    unsafe { utf8(text) }
}

fn check_name(field: &'static str, text: Option<&[u8]>) -> Result<(), PublishError> {
    match text {
        None | Some([]) => Err(PublishError::Missing(field)),
        text => check_length(field, text, NAME_LIMIT),
    }
}

fn check_length(field: &'static str, text: Option<&[u8]>, limit: usize) -> Result<(), PublishError> {
    // A character has at least one byte, so a short enough text need not be counted.
    let Some(text) = text.filter(|t| t.len() > limit) else {
        return Ok(());
    };
    // SAFETY: valid text in the database's encoding.
    let length = unsafe { pg_sys::pg_mbstrlen_with_len(text.as_ptr().cast(), text.len() as i32) } as usize;
    if length > limit {
        Err(PublishError::TooLong { field, length, limit })
    } else {
        Ok(())
    }
}
