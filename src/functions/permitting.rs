//! Views of ours in sessions that may read none.

use crate::server::process;
use crate::server::report;
use pgrx::{pg_extern, pg_sys};
use std::ffi::CStr;

/// What a session may not read.
const RESTRICTION: &CStr = c"restrict_nonsystem_relation_kind";

/// `outbox.permit_views()`: until the function ends that calls it
#[pg_extern(sql = false)]
fn permit_views() {
    // SAFETY: this frame has nothing to be dropped, nor has pgrx's, which calls it.
    unsafe { report::guard(permit_now) };
}

/// The same, for a function of ours that the function calls which has a SET clause.
pub(super) fn permit_now() {
    // SAFETY: within a transaction; the value is read before it can change, and the setting exists if it has one.
    unsafe {
        // Minor releases of before August 2024 do not have it.
        let value = pg_sys::GetConfigOption(RESTRICTION.as_ptr(), true, false);
        if !value.is_null() && *value != 0 {
            let action = process::until_the_caller_ends();
            process::set_for_now(RESTRICTION, c"", pg_sys::GucContext::PGC_USERSET, action);
        }
    }
}
