//! Values as Postgres passes them: texts and times.

use crate::server::encoding::utf8;
use pgrx::{pg_sys, varlena};
use std::borrow::Cow;

/// Microseconds from 1970, the epoch of Unix, to 2000, that of Postgres.
pub(crate) const EPOCH_SHIFT_US: i64 = 946_684_800_000_000;

pub(crate) fn text_datum(text: &[u8]) -> pg_sys::Datum {
    // SAFETY: copies the bytes into a varlena of the current memory context; json has the same form as text.
    unsafe {
        pg_sys::Datum::from(pg_sys::cstring_to_text_with_len(
            text.as_ptr().cast(),
            text.len() as i32,
        ))
    }
}

/// A varlena's bytes, expanded if need be.
///
/// # Safety
/// The datum is a valid varlena; the slice lives as long as its row or the current memory context.
pub(crate) unsafe fn bytes_of<'a>(datum: pg_sys::Datum) -> &'a [u8] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut value: *mut pg_sys::varlena = datum.cast_mut_ptr();
        // Asked here, since each call into Postgres costs more than most values' bytes.
        let is_plain = match varlena::varatt_is_1b(value) {
            true => !varlena::varatt_is_1b_e(value),
            false => varlena::varatt_is_4b_u(value),
        };
        if !is_plain {
            value = pg_sys::pg_detoast_datum_packed(value);
        }
        varlena::varlena_to_byte_slice(value)
    }
}

/// A varlena's text in UTF-8, whatever the database's encoding. An ERROR when it has no such form.
///
/// # Safety
/// As [`bytes_of`].
pub(crate) unsafe fn utf8_of<'a>(datum: pg_sys::Datum) -> Cow<'a, str> {
    // SAFETY: the caller's promise; Postgres keeps only valid text in its encoding.
    unsafe { utf8(bytes_of(datum)) }
}
