//! outbox_relay: a transactional outbox inside Postgres. This crate is the Postgres edge; the logic is in the `relay`
//! crate.
//!
//! A folder uses only those below it (`scripts/lint-structure`):
//!
//! ```text
//! worker      reads, hands to senders, keeps the books: one process a database
//! launcher    a worker for each database with the extension
//! functions   what SQL calls
//! publish     from arguments to a row
//! tables      all that touches our tables
//! server      manners of a Postgres process
//! ```

// The limit is in clippy.toml. A function that is a table may be longer, and says so.
#![warn(clippy::too_many_lines)]

#[cfg(not(panic = "unwind"))]
compile_error!("outbox_relay must be built with panic=unwind: a panic must become an ERROR, not the end of the server");

/// Makes a function of its module one that SQL can call: `fn name(fcinfo) -> Datum`. It uses the call interface of
/// Postgres directly, because its arguments must not be copied, and has no pg_guard: our own guard lets ERRORs of other
/// people's code pass whole, and converts ours to the database's encoding.
macro_rules! sql_function {
    ($name:ident, $info:ident) => {
        crate::function_info!($info);
        const _: () = {
            #[unsafe(no_mangle)]
            extern "C-unwind" fn $name(fcinfo: pgrx::pg_sys::FunctionCallInfo) -> pgrx::pg_sys::Datum {
                // SAFETY: this frame, which Postgres calls, has nothing to be dropped.
                unsafe { crate::server::report::guard(|| self::$name(fcinfo)) }
            }
        };
    };
}
pub(crate) use sql_function;

/// The same for a function that is declared in full where it stands, with a guard for each part of it.
macro_rules! function_info {
    ($info:ident) => {
        #[unsafe(no_mangle)]
        extern "C" fn $info() -> &'static pgrx::pg_sys::Pg_finfo_record {
            const V1: pgrx::pg_sys::Pg_finfo_record = pgrx::pg_sys::Pg_finfo_record { api_version: 1 };
            &V1
        }
    };
}
pub(crate) use function_info;

mod functions;
mod launcher;
mod publish;
mod server;
mod tables;
mod worker;

use crate::publish::{lent_rights, on_conflict, planning, refused_rights, returning};
use crate::server::hooks::{self, ServerHooks, StatementHooks};
use crate::server::{error, guc, object_access, ruled_plans, shmem, silence, standby, txn};
use pgrx::{pg_guard, pg_sys};

/// From Postgres 18 on, `pg_get_loaded_modules()` shows the name and version of the library that a session has loaded.
const LIBRARY_VERSION: &std::ffi::CStr =
    match std::ffi::CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => panic!("the version holds a NUL"),
    };
pgrx::pg_module_magic!(name = c"outbox_relay", version = LIBRARY_VERSION);

const STATEMENT_HOOKS: StatementHooks = StatementHooks {
    analysed: &[
        returning::permit_statement,
        refused_rights::expect_rights_of_copy,
        ruled_plans::note_statement,
    ],
    planning: &[refused_rights::expect_rights, on_conflict::complete_statement],
    planned: &[planning::catch_up, ruled_plans::note],
    beginning: &[lent_rights::lends_no_more],
};

const SERVER_HOOKS: ServerHooks = ServerHooks {
    shmem_request: shmem::request,
    shmem_startup: shmem::attach,
    object_access: object_access::notice,
};

/// Called when the library is loaded: by the postmaster through shared_preload_libraries, or by a session that
/// publishes without that. Such a session can publish, but its events are only queued.
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    // SAFETY: plain reads of the process's own variables.
    let (preloading, upgrading) = unsafe {
        (
            pg_sys::process_shared_preload_libraries_in_progress,
            pg_sys::IsBinaryUpgrade,
        )
    };
    error::hide_backtraces();
    guc::define();
    silence::define();
    if !upgrading {
        hooks::install_for_statements(STATEMENT_HOOKS);
        if !preloading {
            ruled_plans::suspect_earlier_plans();
        }
    }
    if preloading && !upgrading {
        hooks::install_for_server(SERVER_HOOKS);
        txn::install();
        launcher::register();
        if standby::install() {
            launcher::register_standby_watch();
        }
    }
}
