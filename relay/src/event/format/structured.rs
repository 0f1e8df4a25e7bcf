//! Format `structured`: the CloudEvent as one JSON object in one field, as in CloudEvents' structured mode.

use crate::event::format::cloud_event::{append_json_string, append_rest};
use crate::event::format::stamped::{Stamped, name_between};
use crate::event::wanted::EventName;
use crate::resp::write::append_bulk;

pub(super) const FIELDS: [&str; 1] = ["cloud_event"];

/// The object begins with id and time, because a search through a stream reads only the beginning of an entry.
const BEFORE_ID: &[u8] = br#"{"specversion": "1.0", "id": ""#;
const BEFORE_TIME: &[u8] = br#"", "time": ""#;

pub(super) fn name_in(start: &[u8]) -> Option<EventName> {
    name_between(start, BEFORE_ID, BEFORE_TIME)
}

pub(super) fn append(out: &mut Vec<u8>, scratch: &mut Vec<u8>, stamped: &Stamped<'_>) {
    scratch.extend_from_slice(BEFORE_ID);
    scratch.extend_from_slice(&stamped.event_id);
    scratch.extend_from_slice(BEFORE_TIME);
    scratch.extend_from_slice(&stamped.timestamp);
    scratch.extend_from_slice(br#"", "type": "#);
    append_json_string(scratch, stamped.event.event_type);
    scratch.extend_from_slice(br#", "source": "#);
    append_json_string(scratch, stamped.event.source);
    // This is an extension attribute. It follows id and time, as everything else does.
    if let Some(lsn) = stamped.lsn {
        scratch.extend_from_slice(br#", "lsn": ""#);
        scratch.extend_from_slice(lsn.text.as_bytes());
        scratch.push(b'"');
    }
    append_rest(scratch, stamped);
    out.extend_from_slice(b"$11\r\ncloud_event\r\n");
    append_bulk(out, scratch);
}
