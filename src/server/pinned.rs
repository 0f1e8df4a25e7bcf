//! Settings that a database or a role may have, and that must not change what the launcher and the workers do.
//!
//! Left alone: what only says how much is logged or how much memory a query may use; what counts for sessions with a
//! client alone (`client_encoding`, `idle_session_timeout`, `session_preload_libraries`, login event triggers); and
//! where files are put, since a worker makes none.

use crate::server::process;
use pgrx::pg_sys;
use std::ffi::CStr;

/// None of them needs a transaction.
const PINNED: &[(&CStr, &CStr)] = &[
    // Rights, and what names resolve to.
    (c"role", c"none"),
    (c"search_path", c"pg_catalog"),
    (c"row_security", c"on"),
    // Triggers of others do not run here, nor rules: see rights.rs. Ours are enabled always.
    (c"session_replication_role", c"replica"),
    // Timeouts. A task that waited for a lock in vain is tried again; the worker's other tasks do not wait for it.
    (c"lock_timeout", c"25ms"),
    // Shorter than a session's default: in a deadlock, DROP EXTENSION is to win, and the worker tries again.
    (c"deadlock_timeout", c"100ms"),
    (c"statement_timeout", c"0"),
    (c"idle_in_transaction_session_timeout", c"0"),
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    (c"transaction_timeout", c"0"),
    // Its transactions.
    (c"default_transaction_isolation", c"read committed"),
    (c"default_transaction_read_only", c"off"),
    (c"default_transaction_deferrable", c"off"),
    // A cursor that is lost in a crash only repeats; what it covers was flushed before it was sent.
    (c"synchronous_commit", c"off"),
    // What our statements mean, and how values become texts and back.
    (c"standard_conforming_strings", c"on"),
    (c"transform_null_equals", c"off"),
    (c"array_nulls", c"on"),
    (c"DateStyle", c"ISO, MDY"),
    (c"IntervalStyle", c"postgres"),
    (c"TimeZone", c"UTC"),
    (c"bytea_output", c"hex"),
    (c"extra_float_digits", c"1"),
    // How they are executed: they are small, need no other process, and have their indexes.
    (c"jit", c"off"),
    (c"max_parallel_workers_per_gather", c"0"),
    (c"enable_indexscan", c"on"),
    (c"enable_bitmapscan", c"on"),
    (c"enable_nestloop", c"on"),
    (c"enable_sort", c"on"),
];

/// Once, when the process is connected.
pub(crate) fn pin_settings() {
    // `session_authorization` cannot be set outside of a transaction, so the session's user is set directly.
    // SAFETY: the process was authenticated as this superuser, and goes back to it.
    unsafe { pg_sys::SetSessionAuthorization(pg_sys::Oid::from(pg_sys::BOOTSTRAP_SUPERUSERID), true) };
    for (name, value) in PINNED {
        process::set_option(name, value);
    }
}
