//! outbox_relay: a transactional outbox inside Postgres. This crate is the Postgres edge; the logic is in the `relay` crate.
//!
//! ```text
//! request, publish, trigger ─ an event is checked, becomes a row   txn ─ after the commit: wake the worker
//! insertion ─ a row of ours is an INSERT to everybody else
//! launcher ─ a worker for each database with the extension        worker ─ reads, hands to senders, keeps the books
//! numbers, sequence ─ numbers that ascend, whatever is done to the sequence
//! ticker, rows ─ snapshots and rows, without SQL                  pass ─ one scan for many backends; backend ─ one of them
//! tables ─ all SQL on our tables; rights ─ in whose name          purge ─ retention
//! care ─ a row that cannot be read fails alone
//! ownership ─ who this server is to the guards                    recovery ─ from a guard that was read to a backend that is up
//! foreign ─ triggers that were switched off, rows that came meanwhile; applied ─ logical replication
//! copies ─ databases made of others                            standby ─ whether this one was promoted
//! catalog ─ what a session knows of our tables and backends       status ─ what the views ask
//! guc, shmem, process, uuid ─ settings, shared memory, manners of a process, event ids
//! error, report, encoding ─ refusals in words; how they get to Postgres; UTF-8 and the database's encoding
//! object_access ─ extension and databases come and go             untouched, unguarded ─ ERRORs of others pass as they are
//! ```

#[cfg(not(panic = "unwind"))]
compile_error!("outbox_relay must be built with panic=unwind: a panic must become an ERROR, not the end of the server");

/// Declares a function written against the call interface of Postgres itself, for those whose arguments must not be copied.
macro_rules! sql_function {
    ($name:ident, $info:ident) => {
        #[unsafe(no_mangle)]
        extern "C" fn $info() -> &'static pgrx::pg_sys::Pg_finfo_record {
            const V1: pgrx::pg_sys::Pg_finfo_record = pgrx::pg_sys::Pg_finfo_record { api_version: 1 };
            &V1
        }
    };
}
pub(crate) use sql_function;

mod applied;
mod backend;
mod care;
mod catalog;
mod copies;
mod encoding;
mod error;
mod foreign;
mod guc;
mod insertion;
mod launcher;
mod missing;
mod numbers;
mod object_access;
mod ownership;
mod pass;
mod pinned;
mod process;
mod publish;
mod purge;
mod recovery;
mod report;
mod request;
mod rights;
mod rows;
mod secret_key;
mod senders;
mod sequence;
mod shmem;
mod standby;
mod status;
mod tables;
mod ticker;
mod trigger;
mod txn;
mod unguarded;
mod untouched;
mod uuid;
mod worker;

use pgrx::{pg_guard, pg_sys};

pgrx::pg_module_magic!();

/// Called when the library is loaded: by the postmaster from shared_preload_libraries, or by a session that publishes without
/// that, which works, and only queues.
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
    if preloading && !upgrading {
        shmem::install();
        txn::install();
        object_access::install();
        launcher::register();
        standby::install();
    }
}
