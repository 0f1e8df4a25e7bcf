//! Converts between the database's encoding and UTF-8. All our own text is UTF-8.

use crate::server::error::raise;
use once_cell::unsync::OnceCell;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, PgTryBuilder, pg_sys};
use std::borrow::Cow;
use std::ffi::CStr;
use std::panic::AssertUnwindSafe;
use std::str::Utf8Error;

/// Text is converted in pieces of this many bytes where the result is not needed.
const PIECE_BYTES: usize = 8_192;
/// The most bytes that one byte of any encoding can become (MAX_CONVERSION_GROWTH in mb/pg_wchar.h).
const GROWTH: usize = 4;
/// The most bytes of one character in a server's encoding (MAX_UNICODE_EQUIVALENT_STRING in mb/pg_wchar.h).
const LONGEST_CHARACTER: usize = 16;

/// The database's encoding, which never changes.
fn encoding() -> u32 {
    thread_local! {
        static ENCODING: OnceCell<u32> = const { OnceCell::new() };
    }
    // SAFETY: reads a variable of the process.
    let read = || unsafe { (pg_sys::MyDatabaseId, pg_sys::GetDatabaseEncoding() as u32) };
    // A process without a database, or one that has not yet connected to it, does not know its encoding.
    match read() {
        (pg_sys::InvalidOid, encoding) => encoding,
        (_, encoding) => ENCODING.with(|known| *known.get_or_init(|| encoding)),
    }
}

/// Why a text has no UTF-8 form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NoUtf8Form {
    /// These bytes are not UTF-8, and the database (SQL_ASCII) does not say what encoding they are in.
    Invalid(Vec<u8>),
    /// This character of the database's encoding has no equivalent in Unicode.
    Unknown(Vec<u8>),
}

impl NoUtf8Form {
    /// The bytes of `text` that are not UTF-8, of which there are some.
    fn invalid(text: &[u8], error: Utf8Error) -> Self {
        let rest = &text[error.valid_up_to()..];
        Self::Invalid(rest[..rest.len().min(error.error_len().unwrap_or(4))].to_vec())
    }

    pub(crate) fn code(&self) -> PgSqlErrorCode {
        match self {
            Self::Invalid(_) => PgSqlErrorCode::ERRCODE_CHARACTER_NOT_IN_REPERTOIRE,
            Self::Unknown(_) => PgSqlErrorCode::ERRCODE_UNTRANSLATABLE_CHARACTER,
        }
    }

    pub(crate) fn detail(&self) -> String {
        let shown = |bytes: &[u8]| {
            let bytes: Vec<String> = bytes.iter().map(|byte| format!("0x{byte:02x}")).collect();
            bytes.join(" ")
        };
        match self {
            Self::Invalid(bytes) => format!(
                "Its bytes {} are not valid UTF-8, and a database in SQL_ASCII does not know their encoding.",
                shown(bytes)
            ),
            Self::Unknown(bytes) => format!(
                "Its character with the byte sequence {} in encoding \"{}\" has no equivalent in UTF-8.",
                shown(bytes),
                encoding_name()
            ),
        }
    }
}

fn encoding_name() -> String {
    // SAFETY: a constant, zero-terminated text.
    unsafe {
        CStr::from_ptr(pg_sys::GetDatabaseEncodingName())
            .to_string_lossy()
            .into_owned()
    }
}

/// Whether a text in the database's encoding has a UTF-8 form. This costs nothing in a UTF-8 database, and little for
/// ASCII.
pub(crate) fn has_utf8_form(text: &[u8]) -> Result<(), NoUtf8Form> {
    match encoding() {
        pg_sys::pg_enc::PG_UTF8 => Ok(()),
        _ if text.is_ascii() => Ok(()),
        pg_sys::pg_enc::PG_SQL_ASCII => match std::str::from_utf8(text) {
            Ok(_) => Ok(()),
            Err(error) => Err(NoUtf8Form::invalid(text, error)),
        },
        encoding => converts_to_utf8(text, encoding),
    }
}

fn converts_to_utf8(text: &[u8], encoding: u32) -> Result<(), NoUtf8Form> {
    let (from, to) = (encoding as i32, pg_sys::pg_enc::PG_UTF8 as i32);
    // SAFETY: a catalog look-up in a transaction; the buffer has room for the longest result of a piece and its
    // terminator.
    unsafe {
        let conversion = pg_sys::FindDefaultConversionProc(from, to);
        let room = PIECE_BYTES * GROWTH + 1;
        let buffer = pg_sys::palloc(room).cast::<u8>();
        let mut rest = text;
        while !rest.is_empty() {
            let piece = rest.len().min(PIECE_BYTES) as i32;
            let done = match conversion {
                pg_sys::InvalidOid => 0,
                _ => pg_sys::pg_do_encoding_conversion_buf(
                    conversion,
                    from,
                    to,
                    rest.as_ptr().cast_mut(),
                    piece,
                    buffer,
                    room as i32,
                    true,
                ),
            };
            if done <= 0 {
                break;
            }
            rest = &rest[done as usize..];
        }
        pg_sys::pfree(buffer.cast());
        if rest.is_empty() {
            return Ok(());
        }
        let length = pg_sys::pg_mblen(rest.as_ptr().cast()).max(1) as usize;
        Err(NoUtf8Form::Unknown(rest[..length.min(rest.len())].to_vec()))
    }
}

/// Converts text in the database's encoding to UTF-8. Raises an ERROR if it has no such form.
///
/// # Safety
/// Valid text in the database's encoding.
pub(crate) unsafe fn utf8(bytes: &[u8]) -> Cow<'_, str> {
    // SAFETY: the caller's promise; if the result is not the text itself, it is a string of Postgres's memory, which is
    // copied and freed.
    unsafe {
        let text = utf8_in_context(bytes);
        if text.as_ptr() == bytes.as_ptr() {
            return Cow::Borrowed(text);
        }
        let copied = text.to_owned();
        pg_sys::pfree(text.as_ptr().cast_mut().cast());
        Cow::Owned(copied)
    }
}

/// As [`utf8`], without a copy by Rust, which would end the process if there is no memory for a large one. The result
/// is the text itself, or lies in the current memory context.
///
/// # Safety
/// Valid text in the database's encoding. The result is not used once that context is reset.
pub(crate) unsafe fn utf8_in_context(bytes: &[u8]) -> &str {
    // SAFETY: the caller's promise; a conversion's result is a zero-terminated string of the current memory context.
    unsafe {
        match encoding() {
            pg_sys::pg_enc::PG_UTF8 => std::str::from_utf8_unchecked(bytes),
            pg_sys::pg_enc::PG_SQL_ASCII => expect_utf8(bytes),
            _ => {
                let (text, length) = (bytes.as_ptr().cast(), bytes.len() as i32);
                let converted = pg_sys::pg_server_to_any(text, length, pg_sys::pg_enc::PG_UTF8 as i32);
                match converted.cast_const() == text {
                    true => expect_utf8(bytes),
                    false => expect_utf8(CStr::from_ptr(converted).to_bytes()),
                }
            }
        }
    }
}

/// Bytes that must be UTF-8. Publishing refuses all others.
fn expect_utf8(bytes: &[u8]) -> &str {
    match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let why = NoUtf8Form::invalid(bytes, error);
            raise(
                ErrorReport::new(why.code(), "invalid byte sequence for encoding \"UTF8\"", "")
                    .set_detail(why.detail()),
            )
        }
    }
}

/// Converts text to the database's encoding. Raises an ERROR if that lacks a character.
pub(crate) fn to_server(text: &str) -> Cow<'_, [u8]> {
    // SAFETY: returns the text itself, or a zero-terminated string of the current memory context, which is copied and
    // freed.
    unsafe {
        let given = text.as_ptr().cast();
        let converted = pg_sys::pg_any_to_server(given, text.len() as i32, pg_sys::pg_enc::PG_UTF8 as i32);
        if converted.cast_const() == given {
            return Cow::Borrowed(text.as_bytes());
        }
        let copied = CStr::from_ptr(converted).to_bytes().to_vec();
        pg_sys::pfree(converted.cast());
        Cow::Owned(copied)
    }
}

/// As [`to_server`], for messages, and also outside of a transaction: a character that the database's encoding lacks
/// becomes a question mark.
pub(crate) fn words_to_server(text: &str) -> Cow<'_, [u8]> {
    if text.is_ascii() || matches!(encoding(), pg_sys::pg_enc::PG_UTF8 | pg_sys::pg_enc::PG_SQL_ASCII) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut converted = Vec::with_capacity(text.len());
    for character in text.chars() {
        match character.is_ascii() {
            true => converted.push(character as u8),
            false => converted.extend(character_to_server(character).unwrap_or_else(|| b"?".to_vec())),
        }
    }
    Cow::Owned(converted)
}

fn character_to_server(character: char) -> Option<Vec<u8>> {
    PgTryBuilder::new(AssertUnwindSafe(|| {
        let mut buffer = [0u8; LONGEST_CHARACTER + 1];
        // SAFETY: writes a zero-terminated character; raises an ERROR if there is none. The conversion was looked up
        // when the process started.
        unsafe { pg_sys::pg_unicode_to_server(character as pg_sys::pg_wchar, buffer.as_mut_ptr()) };
        CStr::from_bytes_until_nul(&buffer)
            .ok()
            .map(|text| text.to_bytes().to_vec())
    }))
    .catch_others(|_| None)
    .execute()
}
