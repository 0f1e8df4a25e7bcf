//! JSON from publishers. Whatever type it was passed as, what jsonb would refuse is refused.

use crate::publish::error::PublishError;
use crate::server::guc;
use pgrx::pg_sys;
use std::ffi::CStr;

/// A longer run of digits may be too large for Postgres's numeric.
const MOST_DIGITS: usize = 1_000;

/// The text of a jsonb, as `::text` shows it.
///
/// # Safety
/// The datum is a jsonb; the slice lives as long as the current memory context.
pub(super) unsafe fn rendered<'a>(datum: pg_sys::Datum) -> &'a [u8] {
    // SAFETY: the caller's promise; the result is zero-terminated and a JSON text holds no zero byte.
    unsafe {
        let jsonb = pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast::<pg_sys::Jsonb>();
        let length = pgrx::varlena::varsize(jsonb.cast());
        let text = pg_sys::JsonbToCString(std::ptr::null_mut(), &raw mut (*jsonb).root, length as i32);
        CStr::from_ptr(text).to_bytes()
    }
}

/// Raises an ERROR for a text that is much too large for an event, whatever is in it, before it is copied: where Rust
/// gets no memory, it ends the process, and that all sessions. Escapes may take six bytes for one.
pub(super) fn expect_parsable(text: &[u8]) {
    let limit = guc::MAX_EVENT_SIZE_KB.get() as usize * 1_024;
    if text.len() > 8 * limit + 1_024 * 1_024 {
        let size = text.len();
        PublishError::TooLarge { size, limit }.raise();
    }
}

/// A JSON text as jsonb, in the current memory context. Raises the errors of jsonb. The text must be valid in the
/// database's encoding.
pub(super) fn parsed(text: &[u8]) -> pg_sys::Datum {
    expect_parsable(text);
    // SAFETY: a copy with a zero at its end, the input function's argument.
    let jsonb = unsafe {
        let text = pg_sys::pnstrdup(text.as_ptr().cast(), text.len());
        pgrx::direct_function_call_as_datum(pg_sys::jsonb_in, &[Some(pg_sys::Datum::from(text))])
    };
    jsonb.unwrap_or(pg_sys::Datum::from(0))
}

/// Raises the ERROR of jsonb if a value of type json is not valid as jsonb: json accepts escapes that encode no text,
/// and numbers of any size.
pub(super) fn expect_jsonb(text: &[u8]) {
    if may_be_none(text) {
        parsed(text);
    }
}

fn may_be_none(text: &[u8]) -> bool {
    let mut digits = 0;
    for (index, byte) in text.iter().enumerate() {
        match byte {
            b'0'..=b'9' => digits += 1,
            b'e' | b'E' if digits > 0 => return true,
            b'\\' if text.get(index + 1) == Some(&b'u') => return true,
            _ => digits = 0,
        }
        if digits > MOST_DIGITS {
            return true;
        }
    }
    false
}

/// Whether the text is JSON null.
pub(super) fn is_null(text: &[u8]) -> bool {
    text.trim_ascii() == b"null"
}
