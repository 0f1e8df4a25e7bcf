//! Input function of type `outbox.role_name`: a role by its name, or no role.

use crate::server::datum::text_datum;
use crate::server::encoding::{has_utf8_form, utf8};
use crate::server::error::expect_arguments;
use crate::server::report;
use pgrx::{PgLogLevel, PgSqlErrorCode, pg_sys};
use std::ffi::CStr;

crate::sql_function!(role_name_in, pg_finfo_role_name_in);

/// `outbox.role_name_in(cstring)`, strict
fn role_name_in(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // Postgres passes three arguments to each input function: the text, the type and its modifier.
    // SAFETY: within a call by Postgres.
    if unsafe { (*fcinfo).nargs } != 3 {
        expect_arguments(fcinfo, 1);
    }
    // SAFETY: one argument of type cstring. It is not null, unless somebody has declared the function otherwise.
    unsafe {
        let argument = &(*fcinfo).args.as_slice(1)[0];
        (*fcinfo).isnull = argument.isnull;
        if argument.isnull {
            return pg_sys::Datum::from(0);
        }
        role(CStr::from_ptr(argument.value.cast_mut_ptr())).unwrap_or(pg_sys::Datum::from(0))
    }
}

/// A role that was dropped is shown as its number. Elsewhere that number may belong to another role.
fn role(name: &CStr) -> Option<pg_sys::Datum> {
    let bytes = name.to_bytes();
    if bytes == b"-" {
        return None;
    }
    let is_number = bytes.iter().all(u8::is_ascii_digit);
    let arguments = [Some(text_datum(bytes))];
    let found = match is_number {
        true => None,
        // SAFETY: the function takes one text, and these are its arguments.
        false => unsafe { pgrx::direct_function_call_as_datum(pg_sys::to_regrole, &arguments) },
    };
    if found.is_none() {
        // SAFETY: the line above has checked that the text can be converted.
        let shown = has_utf8_form(bytes).ok().map(|()| unsafe { utf8(bytes) });
        report::say(
            PgLogLevel::WARNING as i32,
            PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
            &format!("role {} does not exist", shown.unwrap_or_default()),
            Some("It had limits as a publisher."),
            Some(
                "If the role is created later, grant it the right to publish, with its limits, by outbox.grant_publisher().",
            ),
        );
    }
    found
}
