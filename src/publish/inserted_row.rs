//! A row that a statement inserts, as the triggers see it.

use crate::publish::request::Request;
use crate::server::datum::bytes_of;
use crate::tables::row::{Row, attribute};
use crate::tables::trusted::RowKey;
use pgrx::pg_sys;
use std::borrow::Cow;

/// The values of a row that nobody may change.
pub(super) fn row_key(row: &Row) -> RowKey {
    let key = row.key();
    RowKey {
        xid: key.xid,
        seq: key.seq,
        backend_number: row.backend_number(),
        event_id: row.uuid(attribute::EVENT_ID).unwrap_or_default(),
    }
}

/// The request that a row makes.
pub(super) fn request_of(row: &Row) -> Request<'_> {
    // SAFETY: the attributes are of varlena types.
    let text = |attribute: usize| row.get(attribute).map(|d| unsafe { Cow::Borrowed(bytes_of(d)) });
    Request {
        event_type: text(attribute::EVENT_TYPE),
        source: text(attribute::SOURCE),
        data: text(attribute::DATA),
        subject: text(attribute::SUBJECT),
        backend: text(attribute::BACKEND),
        scheduled_at: None,
        max_retries: row.i32(attribute::MAX_RETRIES),
        publisher_config: text(attribute::PUBLISHER_CONFIG),
        stream: text(attribute::STREAM),
        data_schema: text(attribute::DATA_SCHEMA),
        event_id: row.uuid(attribute::EVENT_ID),
        created_at: None,
        keeps_stream: false,
    }
}

/// Whether the session runs a COPY, as a restore does.
pub(super) fn is_copy() -> bool {
    // SAFETY: the active portal of the session, if any, while it runs.
    unsafe {
        let portal = pg_sys::ActivePortal;
        !portal.is_null() && (*portal).commandTag == pg_sys::CommandTag::CMDTAG_COPY
    }
}
