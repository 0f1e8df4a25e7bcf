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
        if !is_plain(value) {
            value = pg_sys::pg_detoast_datum_packed(value);
        }
        varlena::varlena_to_byte_slice(value)
    }
}

/// Whether a varlena is neither compressed nor stored apart. Asked here, since each call into Postgres costs more than
/// most values' bytes.
///
/// # Safety
/// A valid varlena.
unsafe fn is_plain(value: *const pg_sys::varlena) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        match varlena::varatt_is_1b(value) {
            true => !varlena::varatt_is_1b_e(value),
            false => varlena::varatt_is_4b_u(value),
        }
    }
}

/// A varlena's text in UTF-8, whatever the database's encoding: the datum's own bytes where that is possible, otherwise
/// a copy. An ERROR when it has no such form.
///
/// # Safety
/// The datum is a valid varlena, and stays so as long as the text is used.
pub(crate) unsafe fn utf8_of<'a>(datum: pg_sys::Datum) -> Cow<'a, str> {
    // SAFETY: the caller's promise; Postgres keeps only valid text in its encoding. What was expanded lies in the
    // current memory context: it is copied and freed.
    unsafe {
        let value: *mut pg_sys::varlena = datum.cast_mut_ptr();
        if is_plain(value) {
            return utf8(varlena::varlena_to_byte_slice(value));
        }
        let expanded = pg_sys::pg_detoast_datum_packed(value);
        let text = utf8(varlena::varlena_to_byte_slice(expanded)).into_owned();
        pg_sys::pfree(expanded.cast());
        Cow::Owned(text)
    }
}
