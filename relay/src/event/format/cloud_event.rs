//! The CloudEvents 1.0 JSON object of an event. Source: CloudEvents 1.0 JSON format.

use crate::event::format::stamped::{Data, Stamped};
use crate::event::trace::{TRACEPARENT, TRACESTATE};

/// Appends the object with the spacing that both Python's `json.dumps` and Postgres's jsonb use, in the order of
/// django-broadcaster.
pub(super) fn append_cloud_event(out: &mut Vec<u8>, stamped: &Stamped<'_>) {
    let event = stamped.event;
    out.extend_from_slice(br#"{"specversion": "1.0", "type": "#);
    append_json_string(out, event.event_type);
    out.extend_from_slice(br#", "source": "#);
    append_json_string(out, event.source);
    out.extend_from_slice(br#", "id": ""#);
    out.extend_from_slice(&stamped.event_id);
    out.extend_from_slice(br#"", "time": ""#);
    out.extend_from_slice(&stamped.timestamp);
    out.push(b'"');
    append_rest(out, stamped);
}

/// Appends the attributes after the first four, and the end of the object. Optional attributes are omitted if empty,
/// those of a trace context (extension *distributed tracing*) if there is none, and `data` if it is JSON null.
pub(super) fn append_rest(out: &mut Vec<u8>, stamped: &Stamped<'_>) {
    if let Some(subject) = stamped.subject() {
        out.extend_from_slice(br#", "subject": "#);
        append_json_string(out, subject);
    }
    let data = stamped.data();
    out.extend_from_slice(br#", "datacontenttype": ""#);
    out.extend_from_slice(data.unwrap_or(Data::Json("")).media_type().as_bytes());
    out.push(b'"');
    if let Some(schema) = stamped.data_schema() {
        out.extend_from_slice(br#", "dataschema": "#);
        append_json_string(out, schema);
    }
    for (name, value) in [TRACEPARENT, TRACESTATE].into_iter().zip(stamped.trace) {
        if let Some(value) = value {
            out.extend_from_slice(b", ");
            append_json_string(out, name);
            out.extend_from_slice(b": ");
            append_json_string(out, value);
        }
    }
    match data {
        Some(Data::Json(data)) => {
            out.extend_from_slice(br#", "data": "#);
            out.extend_from_slice(data.as_bytes());
        }
        Some(Data::Base64(base64)) => {
            out.extend_from_slice(br#", "data_base64": ""#);
            out.extend_from_slice(base64.as_bytes());
            out.push(b'"');
        }
        None => {}
    }
    out.push(b'}');
}

pub(super) fn append_json_string(out: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(out, text).expect("writing a string to memory does not fail");
}
