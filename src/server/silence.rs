//! Keeps the triggers of others from firing until a function ends.
//!
//! Postgres does so while `session_replication_role` is `replica`, but it forgets all plans of the session whenever
//! that setting changes, and PL/pgSQL keeps what it made of the old plans until the transaction ends: 570 kB for each
//! call of `outbox.erase()`. So the variable behind that setting is changed directly. Plans depend on it only where a
//! table has rules: [`ruled_plans`] knows whether there are such plans.
//!
//! A setting of our own says how long: Postgres restores it when the function ends, and calls [`assign`]. At the same
//! nest level `session_replication_role` is saved, and restored after ours: on 15 because of the settings' names, in
//! whose order Postgres goes, later because it goes from the setting that was saved last to the first. So if nobody has
//! changed the role meanwhile, it is what Postgres would restore, which leaves the plans alone. If somebody has,
//! [`assign`] leaves it as it is, and Postgres restores it or, after a SET without LOCAL, keeps it.

use crate::server::process::{self, set_for_now};
use crate::server::ruled_plans;
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

/// From now until the calling function ends, which must have a SET clause. Without one, until the transaction ends.
pub(crate) fn begin() {
    if is_silent() {
        return;
    }
    let same = match role() == pg_sys::SESSION_REPLICATION_ROLE_LOCAL as c_int {
        true => c"local",
        false => c"origin",
    };
    let action = process::until_the_caller_ends();
    // SAFETY: within a transaction; the settings exist, and take these values.
    unsafe {
        set_for_now(c"session_replication_role", same, pg_sys::GucContext::PGC_SUSET, action);
        set_for_now(NAME, c"on", pg_sys::GucContext::PGC_INTERNAL, action);
    }
}

fn role() -> c_int {
    // SAFETY: a plain read of the process's own variable.
    unsafe { pg_sys::SessionReplicationRole }
}

extern "C-unwind" fn assign(is_silent: bool, _extra: *mut c_void) {
    let new = if is_silent {
        // One silence within another begins with a change only if a trigger in between has changed the role. Then
        // Postgres restores that role when the inner one ends, without calling this function.
        ROLE_BEFORE.set(ROLE_BEFORE.get().or(Some(role())));
        pg_sys::SESSION_REPLICATION_ROLE_REPLICA as c_int
    } else {
        match ROLE_BEFORE.take() {
            Some(before) if self::is_silent() => before,
            _ => return,
        }
    };
    ruled_plans::forget();
    // SAFETY: a plain write of the process's own variable.
    unsafe { pg_sys::SessionReplicationRole = new };
}
