//! Keeps the triggers of others from firing until a function ends.
//!
//! Postgres does so while `session_replication_role` is `replica`, but it forgets all plans of the session whenever that
//! setting changes, and PL/pgSQL keeps what it made of the old plans until the transaction ends: 570 kB for each call of
//! `outbox.erase()`. So the variable behind that setting is changed directly. Plans depend on it only where a table has
//! rules, and statements of ours are planned in silence, too.
//!
//! A setting of our own says how long: Postgres restores it when the function ends, and calls [`assign`].
//! `session_replication_role` is saved before it, and so restored after it. Whatever happens in between, a plain restore
//! by Postgres comes last.

use crate::server::process::set_for_level;
use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting};
use pgrx::pg_sys;
use std::cell::Cell;
use std::ffi::{CStr, c_int, c_void};

const NAME: &CStr = c"outbox_relay.is_silent";
static IS_SILENT: GucSetting<bool> = GucSetting::<bool>::new(false);

thread_local! {
    /// The role of the session outside of the silence.
    static ROLE_BEFORE: Cell<Option<c_int>> = const { Cell::new(None) };
}

/// Called once from `_PG_init`.
pub(crate) fn define() {
    // SAFETY: the hook cannot fail.
    unsafe {
        GucRegistry::define_bool_guc_with_hooks(
            NAME,
            c"Whether triggers of others are kept from firing. Set by functions of this extension, until they end.",
            c"",
            &IS_SILENT,
            GucContext::Internal,
            GucFlags::NO_SHOW_ALL | GucFlags::DISALLOW_IN_FILE,
            None,
            Some(assign),
            None,
        );
    }
}

/// Whether only those triggers fire that are enabled as REPLICA or ALWAYS.
pub(crate) fn is_silent() -> bool {
    role() == pg_sys::SESSION_REPLICATION_ROLE_REPLICA as c_int
}

/// From now until the innermost nest level of settings ends: that of the calling function if it has a SET clause.
pub(crate) fn begin() {
    if is_silent() {
        return;
    }
    let same = match role() == pg_sys::SESSION_REPLICATION_ROLE_LOCAL as c_int {
        true => c"local",
        false => c"origin",
    };
    // SAFETY: within a transaction; the settings exist, and take these values.
    unsafe {
        set_for_level(c"session_replication_role", same, pg_sys::GucContext::PGC_SUSET);
        set_for_level(NAME, c"on", pg_sys::GucContext::PGC_INTERNAL);
    }
}

fn role() -> c_int {
    // SAFETY: a plain read of the process's own variable.
    unsafe { pg_sys::SessionReplicationRole }
}

extern "C-unwind" fn assign(is_silent: bool, _extra: *mut c_void) {
    let new = match (is_silent, ROLE_BEFORE.get()) {
        (true, None) => {
            ROLE_BEFORE.set(Some(role()));
            pg_sys::SESSION_REPLICATION_ROLE_REPLICA as c_int
        }
        (false, Some(before)) => {
            ROLE_BEFORE.set(None);
            before
        }
        _ => return,
    };
    // SAFETY: a plain write of the process's own variable.
    unsafe { pg_sys::SessionReplicationRole = new };
}
