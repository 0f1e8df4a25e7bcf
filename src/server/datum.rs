//! Values as Postgres passes them: texts and times.

use crate::server::encoding::utf8;
use pgrx::{pg_sys, varlena};
use std::borrow::Cow;

/// Microseconds between the epoch of Unix (1970) and that of Postgres (2000).
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

/// Whether a varlena is neither compressed nor stored out of line. This is checked here because a call into Postgres
/// costs more than reading most values.
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

/// A varlena's text in UTF-8, whatever the database's encoding: the datum's own bytes where possible, otherwise a copy.
/// Raises an ERROR if the text has no UTF-8 form.
///
/// # Safety
/// The datum is a valid varlena, and stays so as long as the text is used.
pub(crate) unsafe fn utf8_of<'a>(datum: pg_sys::Datum) -> Cow<'a, str> {
    // SAFETY: the caller's promise; Postgres stores only valid text in its encoding. An expanded value lies in the
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
