//! Binary payloads, from `data_bytes` of `publish_event` and `data_base64` of `publish_events` to the form that a row
//! stores.

use crate::publish::error::PublishError;
use crate::server::datum::{bytes_of, text_datum};
use crate::server::error::strict_arguments;
use crate::server::guc;
use pgrx::pg_sys;
use relay::event::binary;
use std::borrow::Cow;

crate::sql_function!(binary_data, pg_finfo_binary_data);

/// `outbox.binary_data(bytea)`, strict. It is there for plain INSERTs.
fn binary_data(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let Some([bytes]) = strict_arguments(fcinfo) else {
        return pg_sys::Datum::from(0);
    };
    // SAFETY: an argument of type bytea, by the SQL declaration.
    text_datum(of_bytes(unsafe { bytes_of(bytes) }).as_bytes())
}

/// The payload of an event that may carry JSON or bytes.
pub(super) fn data_or_bytes<'a>(data: Option<Cow<'a, [u8]>>, bytes: Option<&[u8]>) -> Option<Cow<'a, [u8]>> {
    let Some(bytes) = bytes else {
        return data;
    };
    if data.is_some() {
        PublishError::TwoPayloads("data_bytes").raise();
    }
    Some(Cow::Owned(of_bytes(bytes).into_bytes()))
}

/// Encodes the bytes, unless the event would be too large: then no memory is allocated for it.
fn of_bytes(bytes: &[u8]) -> String {
    let limit = guc::MAX_EVENT_SIZE_KB.get() as usize * 1_024;
    let size = bytes.len().div_ceil(3).saturating_mul(4);
    if size > limit {
        PublishError::TooLarge { size, limit }.raise();
    }
    binary::of_bytes(bytes)
}
