//! Records this run of the server as an incarnation, in shared memory.

use crate::server::shmem::{self, Began};
use crate::server::uuid;
use pgrx::pg_sys;

/// Records this run of the server. The launcher calls this when it starts, which is right after recovery.
pub(super) fn begin_incarnation() {
    // SAFETY: reads positions of the WAL.
    let started_at = unsafe {
        match pg_sys::GetXLogReplayRecPtr(std::ptr::null_mut()) {
            // Nothing was replayed: the server had been shut down cleanly.
            0 => pg_sys::GetXLogInsertRecPtr(),
            replayed => replayed,
        }
    };
    // SAFETY: reads the counter under its lock, and the clock.
    let (first_xid, now) = unsafe { (pg_sys::ReadNextFullTransactionId().value, pg_sys::GetCurrentTimestamp()) };
    shmem::name_incarnation(uuid::new_v7(now), Began { started_at, first_xid });
}
