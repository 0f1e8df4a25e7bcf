//! Notices when our extension or a database is created, changed or dropped, whatever the statement (CASCADE, OWNED BY,
//! DROP SCHEMA).
//!
//! A hook on utility statements would run before the statement's rights are checked. The hook of object accesses
//! ([`super::hooks`]) runs after that.
//!
//! DROP DATABASE calls this hook before it looks for sessions that are in its way. RENAME, SET TABLESPACE and CREATE
//! DATABASE ... TEMPLATE do not: for those, see [`crate::server::process::give_way_to_database_statements`]. That would
//! also be enough for DROP, except for WITH (FORCE) by an owner who is not a superuser: such a role may not end a
//! superuser's process.

use crate::server::shmem;
use crate::server::txn;
use crate::server::unguarded;
use pgrx::pg_sys;
use std::ffi::CStr;
use std::time::{Duration, Instant};

/// How long a worker may take to leave; it usually needs milliseconds. Postgres itself waits this long for sessions.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Called when an object is created, altered or dropped.
///
/// # Safety
/// Within a transaction, in a frame that holds nothing.
pub(crate) unsafe fn notice(access: pg_sys::ObjectAccessType::Type, class: pg_sys::Oid, object: pg_sys::Oid) {
    use pg_sys::ObjectAccessType::{OAT_DROP, OAT_POST_ALTER, OAT_POST_CREATE};
    // SAFETY: the caller's promise.
    unsafe {
        match (class, access) {
            // CREATE EXTENSION announces itself in its script, because its row is not visible yet.
            (pg_sys::ExtensionRelationId, OAT_DROP | OAT_POST_ALTER) if is_ours(object) => txn::extension_changed(),
            (pg_sys::DatabaseRelationId, OAT_DROP) => {
                make_way(object);
                txn::databases_changed();
            }
            (pg_sys::DatabaseRelationId, OAT_POST_CREATE | OAT_POST_ALTER) => txn::databases_changed(),
            _ => {}
        }
    }
}

/// # Safety
/// Within a transaction, in a frame that holds nothing.
unsafe fn is_ours(extension: pg_sys::Oid) -> bool {
    // SAFETY: a catalog look-up; the name lives as long as the memory context.
    unsafe {
        let name = unguarded::get_extension_name(extension);
        !name.is_null() && CStr::from_ptr(name) == c"outbox_relay"
    }
}

/// Tells the worker of a database to end, and waits until it has. If the statement fails, the launcher starts another.
///
/// # Safety
/// Within a transaction that may drop the database and has locked it, in a frame that holds nothing.
unsafe fn make_way(database: pg_sys::Oid) {
    let Some(pid) = shmem::database_slot_of(database)
        .map(|slot| slot.pid())
        .filter(|pid| *pid != 0)
    else {
        return;
    };
    let deadline = Instant::now() + LEAVE_TIMEOUT;
    let mut told = false;
    // SAFETY: an entry of the process array is shared memory, also when its process has just gone.
    unsafe {
        loop {
            let process = unguarded::BackendPidGetProc(pid);
            if process.is_null() || (*process).databaseId != database || Instant::now() > deadline {
                return;
            }
            if !told {
                libc::kill(pid, libc::SIGTERM);
                told = true;
            }
            unguarded::check_for_interrupts();
            unguarded::sleep(Duration::from_millis(2));
        }
    }
}
