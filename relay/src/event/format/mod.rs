//! From an event to the bytes of its XADD in RESP, appended to a buffer that is reused. Each format has a file, which
//! describes the fields of an entry. They are followed by the backend's static fields, those of `publisher_config`, and
//! the position in the WAL if the backend includes it.
//!
//! Source: RESP (Redis serialization protocol specification).

mod broadcaster;
mod cloud_event;
mod cloudevents;
mod debezium;
mod lsn;
mod stamped;
mod structured;

use crate::event::clock::Clock;
use crate::event::format::lsn::Lsn;
use crate::event::format::stamped::Stamped;
use crate::event::text::hyphenated;
use crate::event::trace::{TRACEPARENT, TRACESTATE};
use crate::event::wanted::EventName;
use crate::event::{ConfigError, Event, further_fields};
use crate::failure::memory::{self, NoMemory};
use crate::resp::write::{append_array_header, append_bulk};

/// The layout of an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    #[default]
    Broadcaster,
    CloudEvents,
    Structured,
    Debezium,
}

impl Format {
    /// The names in `outbox.backends.format`.
    pub const WORDS: [(&'static str, Self); 4] = [
        ("broadcaster", Self::Broadcaster),
        ("cloudevents", Self::CloudEvents),
        ("structured", Self::Structured),
        ("debezium", Self::Debezium),
    ];

    pub fn named(word: &str) -> Option<Self> {
        Self::WORDS
            .into_iter()
            .find(|(name, _)| *name == word)
            .map(|(_, format)| format)
    }

    /// The fields that the format itself writes. No other field may have such a name. `includes_lsn`: entries carry a
    /// position in the WAL. Where that is inside of JSON, it is not a field.
    pub fn own_fields(self, includes_lsn: bool) -> &'static [&'static str] {
        let all: &[&str] = match self {
            Self::Broadcaster => &broadcaster::FIELDS,
            Self::CloudEvents => &cloudevents::FIELDS,
            Self::Structured => &structured::FIELDS,
            Self::Debezium => &debezium::FIELDS,
        };
        let left_out = usize::from(!includes_lsn && self.lsn_field().is_some());
        &all[..all.len() - left_out]
    }

    /// The field for a position in the WAL, if it is a field.
    fn lsn_field(self) -> Option<&'static str> {
        match self {
            Self::Broadcaster => Some(broadcaster::LSN),
            Self::CloudEvents => Some(cloudevents::LSN),
            Self::Structured | Self::Debezium => None,
        }
    }
}

/// The event's id and time, from the beginning of a JSON text in an entry of a format that has no fields for them.
pub(crate) fn name_in_json(start: &[u8]) -> Option<EventName> {
    structured::name_in(start).or_else(|| debezium::name_in(start))
}

/// Where an entry goes: the stream's name and its approximate length (0: unlimited).
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    pub stream: &'a str,
    pub max_len: i64,
}

/// Room for the fixed parts of an entry and the lengths of the others, and for what is appended to a batch at its end.
const SURROUNDINGS: usize = 4 * 1024;
/// The room that is needed for a further field in addition to its name and value.
const OF_FIELD: usize = 32;
/// An escaped byte of a text in JSON takes up to this many bytes.
const ESCAPED: usize = 6;

/// Writes the entries of a backend.
#[derive(Default)]
pub struct Encoder {
    format: Format,
    /// Further fields of each entry.
    static_fields: Vec<(String, String)>,
    /// `None`: entries carry no position.
    lsn: Option<Lsn>,
    /// A buffer that is reused.
    scratch: Vec<u8>,
    clock: Clock,
}

impl Encoder {
    /// `static_fields`: further fields of each entry. A field of the same name in an event's `publisher_config`
    /// overrides them.
    pub fn new(format: Format, static_fields: Vec<(String, String)>) -> Self {
        Self {
            format,
            static_fields,
            ..Self::default()
        }
    }

    /// As [`Self::new`], with entries that carry a position in the WAL.
    pub fn with_lsn(mut self) -> Self {
        self.lsn = Some(Lsn::default());
        self
    }

    /// Frees the buffer that is reused.
    pub fn drop_scratch(&mut self) {
        self.scratch = Vec::new();
    }

    pub fn includes_lsn(&self) -> bool {
        self.lsn.is_some()
    }

    /// Sets the position that entries carry from now on, if they carry one: a standby that has replayed the WAL up to
    /// there shows what the events' transactions have written.
    pub fn tell_lsn(&mut self, position: u64) {
        if let Some(lsn) = &mut self.lsn {
            lsn.move_to(position);
        }
    }

    /// Appends one XADD command. On an error nothing is appended.
    pub fn append_xadd(&mut self, out: &mut Vec<u8>, target: Target<'_>, event: &Event<'_>) -> Result<(), ConfigError> {
        let config = event.publisher_config;
        let further = match config {
            Some(config) => further_fields(config, self.format.own_fields(self.lsn.is_some()))?,
            None => Vec::new(),
        };
        let is_given = |name: &str| further.iter().any(|(given, _)| given == name);
        let fixed = || self.static_fields.iter().filter(|(name, _)| !is_given(name));
        let trace = [TRACEPARENT, TRACESTATE].map(|name| {
            let field = further.iter().find(|(given, _)| given == name);
            field.map(|(_, value)| value.as_str())
        });
        let stamped = Stamped {
            event,
            trace,
            lsn: self.lsn.as_ref(),
            event_id: hyphenated(&event.event_id),
            timestamp: self.clock.rfc3339(event.created_at_us),
        };
        let own = match self.format {
            Format::CloudEvents => cloudevents::count(&stamped),
            format => format.own_fields(false).len(),
        };
        let lsn = stamped.lsn.and_then(|lsn| Some((self.format.lsn_field()?, lsn)));
        let trims = target.max_len > 0;
        let fields = own + fixed().count() + further.len() + usize::from(lsn.is_some());

        let words = fixed()
            .chain(&further)
            .map(|(name, value)| name.len() + value.len() + OF_FIELD);
        self.scratch.clear();
        make_room(
            out,
            &mut self.scratch,
            &stamped,
            target.stream.len() + words.sum::<usize>(),
        )?;
        append_array_header(out, 3 + if trims { 3 } else { 0 } + 2 * fields);
        out.extend_from_slice(b"$4\r\nXADD\r\n");
        append_bulk(out, target.stream.as_bytes());
        if trims {
            out.extend_from_slice(b"$6\r\nMAXLEN\r\n$1\r\n~\r\n");
            append_bulk(out, itoa::Buffer::new().format(target.max_len).as_bytes());
        }
        out.extend_from_slice(b"$1\r\n*\r\n");
        match self.format {
            Format::Broadcaster => broadcaster::append(out, &mut self.scratch, &stamped),
            Format::CloudEvents => cloudevents::append(out, &stamped),
            Format::Structured => structured::append(out, &mut self.scratch, &stamped),
            Format::Debezium => debezium::append(out, &mut self.scratch, &stamped),
        }
        for (key, value) in fixed().chain(&further) {
            let name = match self.format {
                Format::CloudEvents => cloudevents::name_of(key),
                _ => key,
            };
            append_bulk(out, name.as_bytes());
            append_bulk(out, value.as_bytes());
        }
        if let Some((name, lsn)) = lsn {
            append_bulk(out, name.as_bytes());
            append_bulk(out, lsn.text.as_bytes());
        }
        Ok(())
    }
}

/// Makes room for an entry, so that nothing has to grow while it is written. `others`: the bytes of what is not in the
/// event itself.
#[inline]
fn make_room(out: &mut Vec<u8>, scratch: &mut Vec<u8>, stamped: &Stamped<'_>, others: usize) -> Result<(), NoMemory> {
    let event = stamped.event;
    let texts = [event.subject, event.data_schema].into_iter().chain(stamped.trace);
    let texts = event.event_type.len() + event.source.len() + texts.flatten().map(str::len).sum::<usize>();
    // Some are in the entry twice, once as a field and once in the JSON object.
    let json = ESCAPED * texts + event.data.map_or(0, str::len) + SURROUNDINGS;
    let room = memory::reserve(scratch, json).and_then(|()| memory::reserve(out, json + texts + others));
    if room.is_err() {
        *scratch = Vec::new();
    }
    room
}

#[cfg(test)]
mod tests;
