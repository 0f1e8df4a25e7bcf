//! Format `cloudevents`: a field for each attribute, with the prefix `ce_` as in CloudEvents' Kafka binding (binary
//! mode), and the payload in `data`. CloudEvents has no binding for Redis.

use crate::event::binary::{decode, decoded_len};
use crate::event::format::stamped::{Data, Stamped};
use crate::event::trace::{TRACEPARENT, TRACESTATE};
use crate::resp::write::{append_bulk, append_bulk_header};

pub(super) const LSN: &str = "ce_lsn";
/// The last field is only in entries that carry a position in the WAL.
pub(super) const FIELDS: [&str; 12] = [
    "ce_specversion",
    "ce_id",
    "ce_type",
    "ce_source",
    "ce_time",
    "ce_subject",
    "ce_dataschema",
    "ce_traceparent",
    "ce_tracestate",
    "content-type",
    "data",
    LSN,
];

/// The name of a further field. A trace context is an attribute, and gets the prefix.
pub(super) fn name_of(field: &str) -> &str {
    match field {
        TRACEPARENT => "ce_traceparent",
        TRACESTATE => "ce_tracestate",
        other => other,
    }
}

/// How many fields an entry has.
pub(super) fn count(stamped: &Stamped<'_>) -> usize {
    let optional = [stamped.subject(), stamped.data_schema()].into_iter().flatten().count();
    5 + optional + if stamped.data().is_some() { 2 } else { 0 }
}

/// Optional attributes are omitted if empty; `data` and its type are omitted if it is JSON null.
pub(super) fn append(out: &mut Vec<u8>, stamped: &Stamped<'_>) {
    out.extend_from_slice(b"$14\r\nce_specversion\r\n$3\r\n1.0\r\n$5\r\nce_id\r\n$36\r\n");
    out.extend_from_slice(&stamped.event_id);
    out.extend_from_slice(b"\r\n$7\r\nce_type\r\n");
    append_bulk(out, stamped.event.event_type.as_bytes());
    out.extend_from_slice(b"$9\r\nce_source\r\n");
    append_bulk(out, stamped.event.source.as_bytes());
    out.extend_from_slice(b"$7\r\nce_time\r\n$32\r\n");
    out.extend_from_slice(&stamped.timestamp);
    out.extend_from_slice(b"\r\n");
    if let Some(subject) = stamped.subject() {
        out.extend_from_slice(b"$10\r\nce_subject\r\n");
        append_bulk(out, subject.as_bytes());
    }
    if let Some(schema) = stamped.data_schema() {
        out.extend_from_slice(b"$13\r\nce_dataschema\r\n");
        append_bulk(out, schema.as_bytes());
    }
    if let Some(data) = stamped.data() {
        out.extend_from_slice(b"$12\r\ncontent-type\r\n");
        append_bulk(out, data.media_type().as_bytes());
        out.extend_from_slice(b"$4\r\ndata\r\n");
        match data {
            Data::Json(data) => append_bulk(out, data.as_bytes()),
            // Unencoded: a field's value may contain any bytes.
            Data::Base64(base64) => {
                append_bulk_header(out, decoded_len(base64));
                decode(out, base64);
                out.extend_from_slice(b"\r\n");
            }
        }
    }
}
