//! Format `debezium`: the fields `key` and `value` that Debezium Server's Redis sink writes in its extended message
//! format, as JSON without schemas. `value` is the envelope of a change: `before`, `after`, `source`, `op`, `ts_ms`.

use crate::event::format::cloud_event::append_json_string;
use crate::event::format::stamped::{Data, Stamped, name_between};
use crate::event::wanted::EventName;
use crate::resp::write::append_bulk;
use serde::Deserialize;
use serde_json::value::RawValue;

pub(super) const FIELDS: [&str; 2] = ["key", "value"];

/// The last word of an event's type says what has happened to a row: `orders.update` is an update.
#[derive(Clone, Copy)]
enum Change {
    Insert,
    Update,
    Delete,
    Truncate,
    /// Another word: the event is no change of a row. It counts as a creation.
    Other,
}

impl Change {
    fn of(event_type: &str) -> Self {
        match event_type.rsplit('.').next() {
            Some("insert") => Self::Insert,
            Some("update") => Self::Update,
            Some("delete") => Self::Delete,
            Some("truncate") => Self::Truncate,
            _ => Self::Other,
        }
    }

    fn op(self) -> u8 {
        match self {
            Self::Insert | Self::Other => b'c',
            Self::Update => b'u',
            Self::Delete => b'd',
            Self::Truncate => b't',
        }
    }
}

/// A row before and after a change, as JSON texts: the payload `both` of an attached table.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Both<'a> {
    #[serde(borrow)]
    old: &'a RawValue,
    #[serde(borrow)]
    new: &'a RawValue,
}

impl<'a> Both<'a> {
    /// `None`: the payload is something else.
    fn of(data: &'a str) -> Option<Self> {
        // An array of two would do, too.
        let object = data.trim_ascii_start().starts_with('{').then_some(data)?;
        serde_json::from_str(object).ok()
    }
}

/// The values of `before` and `after`, each in three parts.
type States<'a> = [[&'a str; 3]; 2];

const NOTHING: [&str; 3] = ["", "null", ""];

fn states<'a>(change: Change, data: Option<Data<'a>>) -> States<'a> {
    // Binary payloads are written as base64, which is Debezium's default (binary.handling.mode).
    let data = match data {
        Some(Data::Json(data)) => {
            let is_of_row = matches!(change, Change::Insert | Change::Update | Change::Delete);
            if let Some(both) = is_of_row.then(|| Both::of(data)).flatten() {
                return [["", both.old.get(), ""], ["", both.new.get(), ""]];
            }
            ["", data, ""]
        }
        Some(Data::Base64(base64)) => ["\"", base64, "\""],
        None => NOTHING,
    };
    match change {
        // A deleted row has no state afterwards.
        Change::Delete => [data, NOTHING],
        _ => [NOTHING, data],
    }
}

/// The envelope begins with id and time, because a search through a stream reads only the beginning of an entry.
const BEFORE_ID: &[u8] = br#"{"source":{"event_id":""#;
const BEFORE_TIME: &[u8] = br#"","time":""#;

pub(super) fn name_in(start: &[u8]) -> Option<EventName> {
    name_between(start, BEFORE_ID, BEFORE_TIME)
}

/// The key is the subject, or the event's id if it has none.
pub(super) fn append(out: &mut Vec<u8>, scratch: &mut Vec<u8>, stamped: &Stamped<'_>) {
    match stamped.subject() {
        Some(subject) => append_json_string(scratch, subject),
        None => {
            scratch.push(b'"');
            scratch.extend_from_slice(&stamped.event_id);
            scratch.push(b'"');
        }
    }
    out.extend_from_slice(b"$3\r\nkey\r\n");
    append_bulk(out, scratch);
    scratch.clear();
    append_envelope(scratch, stamped);
    out.extend_from_slice(b"$5\r\nvalue\r\n");
    append_bulk(out, scratch);
}

fn append_envelope(out: &mut Vec<u8>, stamped: &Stamped<'_>) {
    let event = stamped.event;
    let change = Change::of(event.event_type);
    let [before, after] = states(change, stamped.data());
    let mut milliseconds = itoa::Buffer::new();
    let milliseconds = milliseconds.format(event.created_at_us.div_euclid(1_000)).as_bytes();
    out.extend_from_slice(BEFORE_ID);
    out.extend_from_slice(&stamped.event_id);
    out.extend_from_slice(BEFORE_TIME);
    out.extend_from_slice(&stamped.timestamp);
    out.extend_from_slice(
        concat!(
            r#"","version":""#,
            env!("CARGO_PKG_VERSION"),
            r#"","connector":"outbox_relay","name":"#
        )
        .as_bytes(),
    );
    append_json_string(out, event.source);
    out.extend_from_slice(br#","event_type":"#);
    append_json_string(out, event.event_type);
    // As a number, as in Debezium's connector for Postgres.
    if let Some(lsn) = stamped.lsn {
        out.extend_from_slice(br#","lsn":"#);
        out.extend_from_slice(itoa::Buffer::new().format(lsn.position).as_bytes());
    }
    for (name, value) in [
        (r#","ts_ms":"#, milliseconds),
        (r#"},"before":"#, before[0].as_bytes()),
        (before[1], before[2].as_bytes()),
        (r#","after":"#, after[0].as_bytes()),
        (after[1], after[2].as_bytes()),
        (r#","op":"#, &[b'"', change.op(), b'"']),
        (r#","ts_ms":"#, milliseconds),
    ] {
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(value);
    }
    out.push(b'}');
}
