//! Settings that a database or a role may have, but that must not change what the launcher and the workers do.
//!
//! Not pinned: settings that only affect how much is logged or how much memory a query may use; settings that matter
//! only to sessions with a client (`client_encoding`, `idle_session_timeout`, `session_preload_libraries`, login event
//! triggers); and locations of files, since a worker creates none.

use crate::server::process;
use pgrx::pg_sys;
use std::ffi::CStr;

/// Setting these needs no transaction.
const PINNED: &[(&CStr, &CStr)] = &[
    // Rights, and how names are resolved.
    (c"role", c"none"),
    (c"search_path", c"pg_catalog"),
    (c"row_security", c"on"),
    // Other triggers and rules do not run in a worker: see rights.rs. Ours are always enabled.
    (c"session_replication_role", c"replica"),
    // Every ERROR would end the process.
    (c"exit_on_error", c"off"),
    // Timeouts. A task that cannot get a lock in time is tried again later; the worker's other tasks do not wait for
    // it.
    (c"lock_timeout", c"25ms"),
    // Shorter than a session's default: in a deadlock the worker gives up and tries again, and DROP EXTENSION wins.
    (c"deadlock_timeout", c"100ms"),
    (c"statement_timeout", c"0"),
    (c"idle_in_transaction_session_timeout", c"0"),
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    (c"transaction_timeout", c"0"),
    // Properties of its transactions.
    (c"default_transaction_isolation", c"read committed"),
    (c"default_transaction_read_only", c"off"),
    (c"default_transaction_deferrable", c"off"),
    // A cursor that is lost in a crash only causes repeated work; what it covers was flushed before it was sent.
    (c"synchronous_commit", c"off"),
    // How our statements are parsed, and how values are converted to and from text.
    (c"standard_conforming_strings", c"on"),
    (c"transform_null_equals", c"off"),
    (c"array_nulls", c"on"),
    (c"DateStyle", c"ISO, MDY"),
    (c"IntervalStyle", c"postgres"),
    (c"TimeZone", c"UTC"),
    (c"bytea_output", c"hex"),
    (c"extra_float_digits", c"1"),
    // How our statements are executed: they are small, need no other process, and have their indexes.
    (c"jit", c"off"),
    (c"max_parallel_workers_per_gather", c"0"),
    (c"enable_indexscan", c"on"),
    (c"enable_bitmapscan", c"on"),
    (c"enable_nestloop", c"on"),
    (c"enable_sort", c"on"),
];

/// Called once, when the process is connected.
pub(crate) fn pin_settings() {
    // `session_authorization` cannot be set outside of a transaction, so the session's user is set directly.
    // SAFETY: the process was authenticated as this superuser, and returns to it.
    unsafe { pg_sys::SetSessionAuthorization(pg_sys::Oid::from(pg_sys::BOOTSTRAP_SUPERUSERID), true) };
    for (name, value) in PINNED {
        process::set_option(name, value);
    }
}
