//! Format `broadcaster`: field for field what django-broadcaster 0.1.1 writes (`backends.py`, `models.py`).

use crate::event::format::cloud_event::append_cloud_event;
use crate::event::format::stamped::Stamped;
use crate::resp::write::append_bulk;

pub(super) const LSN: &str = "lsn";
/// The last field is only in entries that carry a position in the WAL.
pub(super) const FIELDS: [&str; 6] = ["event_id", "event_type", "source", "timestamp", "cloud_event", LSN];

/// Appends the fields. Most bytes are the same in each entry: they are written in as few pieces as possible.
pub(super) fn append(out: &mut Vec<u8>, scratch: &mut Vec<u8>, stamped: &Stamped<'_>) {
    append_cloud_event(scratch, stamped);
    out.extend_from_slice(b"$8\r\nevent_id\r\n$36\r\n");
    out.extend_from_slice(&stamped.event_id);
    out.extend_from_slice(b"\r\n$10\r\nevent_type\r\n");
    append_bulk(out, stamped.event.event_type.as_bytes());
    out.extend_from_slice(b"$6\r\nsource\r\n");
    append_bulk(out, stamped.event.source.as_bytes());
    out.extend_from_slice(b"$9\r\ntimestamp\r\n$32\r\n");
    out.extend_from_slice(&stamped.timestamp);
    out.extend_from_slice(b"\r\n$11\r\ncloud_event\r\n");
    append_bulk(out, scratch);
}
