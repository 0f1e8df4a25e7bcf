//! What a publisher asks for, and all refusals: in one place for all ways to publish.

use crate::publish::error::PublishError;
use crate::server::encoding::{has_utf8_form, utf8};
use crate::server::guc;
use crate::tables::catalog;
use pgrx::pg_sys;
use relay::delivery::refusal::MOST_ATTEMPTS;
use relay::event::further_fields;
use std::borrow::Cow;

/// Characters of event_type and source, as in django-broadcaster's model.
const NAME_LIMIT: usize = 255;
/// Characters of subject, stream and data_schema.
const TEXT_LIMIT: usize = 1_024;

/// What a publisher asks for; texts in the database's encoding.
#[derive(Default)]
pub struct Request<'a> {
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
}

/// A backend that the request may use.
pub struct Checked {
    pub backend: String,
    pub backend_number: i32,
}

/// All refusals, in one place for all ways to publish.
pub fn check(request: &Request<'_>) -> Result<Checked, PublishError> {
    check_name("event_type", request.event_type.as_deref())?;
    check_name("source", request.source.as_deref())?;
    check_length("subject", request.subject.as_deref(), TEXT_LIMIT)?;
    check_length("data_schema", request.data_schema.as_deref(), TEXT_LIMIT)?;
    if let Some(stream) = request.stream.as_deref() {
        if stream.is_empty() {
            return Err(PublishError::EmptyStream);
        }
        check_length("stream", Some(stream), TEXT_LIMIT)?;
    }
    if let Some(n) = request.max_retries.filter(|n| *n < 0) {
        return Err(PublishError::NegativeRetries(n));
    }
    if let Some(n) = request.max_retries.filter(|n| *n > MOST_ATTEMPTS) {
        return Err(PublishError::ManyRetries(n));
    }
    if request.scheduled_at == Some(i64::MAX) {
        return Err(PublishError::EndlessSchedule);
    }
    let texts = [
        ("event_type", &request.event_type),
        ("source", &request.source),
        ("data", &request.data),
        ("subject", &request.subject),
        ("publisher_config", &request.publisher_config),
        ("stream", &request.stream),
        ("data_schema", &request.data_schema),
    ];
    let size: usize = texts
        .iter()
        .filter_map(|(_, text)| text.as_ref())
        .map(|t| t.len())
        .sum();
    let limit = guc::MAX_EVENT_SIZE_KB.get() as usize * 1_024;
    if size > limit {
        return Err(PublishError::TooLarge { size, limit });
    }
    for (field, text) in texts.into_iter().chain([("backend", &request.backend)]) {
        if let Some(text) = text {
            has_utf8_form(text).map_err(|text| PublishError::Foreign { field, text })?;
        }
    }
    if let Some(config) = request.publisher_config.as_deref() {
        let fields = further_fields(&decoded(config))?;
        // As jsonb, its numbers have all their digits.
        let sent: usize = fields.iter().map(|(key, value)| key.len() + value.len()).sum();
        let size = size + sent.saturating_sub(config.len());
        if size > limit {
            return Err(PublishError::TooLarge { size, limit });
        }
    }
    let backend = match request.backend.as_deref() {
        Some(name) => decoded(name).into_owned(),
        None => default_backend(),
    };
    let Some(known) = catalog::backend(&backend) else {
        return Err(PublishError::UnknownBackend(backend));
    };
    if let Some(stream) = request.stream.as_deref().map(decoded)
        && !known.allows(&stream)
    {
        return Err(PublishError::StreamNotAllowed {
            backend,
            stream: stream.into_owned(),
        });
    }
    Ok(Checked {
        backend,
        backend_number: known.number,
    })
}

/// The backend of a setting, whose bytes may be in the database's encoding (a session, a role or a database has it) or in that of
/// postgresql.conf, which is UTF-8 as a rule.
fn default_backend() -> String {
    let name = guc::DEFAULT_BACKEND.get().unwrap_or_default();
    let in_file = name.to_str().ok().map(str::to_owned);
    match in_file {
        Some(name) if name.is_ascii() => return name,
        _ => {}
    }
    let in_database = has_utf8_form(name.to_bytes())
        .ok()
        .map(|()| decoded(name.to_bytes()).into_owned());
    let is_there = |name: &&String| catalog::backend(name).is_some();
    let names = [in_database, in_file];
    let known = names.iter().flatten().find(is_there).or(names.iter().flatten().next());
    known.cloned().unwrap_or_default()
}

/// A request's text in UTF-8.
pub fn decoded(text: &[u8]) -> Cow<'_, str> {
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
    // No character is shorter than a byte.
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
