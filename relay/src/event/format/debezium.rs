//! Format `debezium`: the fields `key` and `value` that Debezium Server's Redis sink writes in its extended message
//! format, as JSON without schemas. `value` is the envelope of a change: `before`, `after`, `source`, `op`, `ts_ms`.

use crate::event::format::cloud_event::append_json_string;
use crate::event::format::stamped::{Data, Stamped, name_between};
use crate::event::wanted::EventName;
use crate::resp::write::append_bulk;

pub(super) const FIELDS: [&str; 2] = ["key", "value"];

/// The `op` of a change, from the last word of the event's type: `orders.update` is an update. All other events are
/// creations.
fn operation(event_type: &str) -> u8 {
    match event_type.rsplit('.').next() {
        Some("update") => b'u',
        Some("delete") => b'd',
        Some("truncate") => b't',
        _ => b'c',
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
    let op = operation(event.event_type);
    // Binary payloads are written as base64, which is Debezium's default (binary.handling.mode).
    let [open, data, close] = match stamped.data() {
        Some(Data::Json(data)) => ["", data, ""],
        Some(Data::Base64(base64)) => ["\"", base64, "\""],
        None => ["", "null", ""],
    };
    // A deleted row has no state afterwards.
    let (before, after) = match op {
        b'd' => ([open, data, close], ["", "null", ""]),
        _ => (["", "null", ""], [open, data, close]),
    };
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
        (r#","op":"#, &[b'"', op, b'"']),
        (r#","ts_ms":"#, milliseconds),
    ] {
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(value);
    }
    out.push(b'}');
}
