//! An event with its id and time as text.

use crate::event::Event;
use crate::event::binary;
use crate::event::format::lsn::Lsn;
use crate::event::wanted::EventName;

pub(super) struct Stamped<'a> {
    pub event: &'a Event<'a>,
    pub event_id: [u8; 36],
    /// RFC 3339, in UTC, with microseconds.
    pub timestamp: [u8; 32],
    /// `traceparent` and `tracestate`, if it has them.
    pub trace: [Option<&'a str>; 2],
    /// Set if the backend's entries carry a position.
    pub lsn: Option<&'a Lsn>,
}

/// A payload.
#[derive(Clone, Copy)]
pub(super) enum Data<'a> {
    Json(&'a str),
    /// Base64 of a binary payload.
    Base64(&'a str),
}

impl Data<'_> {
    /// The media type of the content.
    pub(super) fn media_type(self) -> &'static str {
        match self {
            Self::Json(_) => "application/json",
            Self::Base64(_) => "application/octet-stream",
        }
    }
}

impl<'a> Stamped<'a> {
    pub(super) fn subject(&self) -> Option<&'a str> {
        self.event.subject.filter(|subject| !subject.is_empty())
    }

    pub(super) fn data_schema(&self) -> Option<&'a str> {
        self.event.data_schema.filter(|schema| !schema.is_empty())
    }

    /// JSON null counts as no data.
    pub(super) fn data(&self) -> Option<Data<'a>> {
        let data = self.event.data.filter(|data| data.trim_ascii() != "null")?;
        Some(binary::base64_of(data).map_or(Data::Json(data), Data::Base64))
    }
}

/// An event's id and time at the beginning of a JSON text that consists of `before`, the id, `between`, the time.
pub(super) fn name_between(start: &[u8], before: &[u8], between: &[u8]) -> Option<EventName> {
    let (event_id, rest) = start.strip_prefix(before)?.split_first_chunk()?;
    let time = rest.strip_prefix(between)?.first_chunk()?;
    Some((*event_id, *time))
}
