//! Functions of Postgres without pgrx's guard around them. An ERROR in one of them reaches the client as Postgres made
//! it. It jumps over the frames in between, so these must not own anything that needs dropping.
//!
//! pgrx's guard is for our own code: it turns an ERROR into a panic that carries a copy of it. The copy lacks
//! constraint, column, position, context and any SQLSTATE that pgrx does not know.

use pgrx::pg_sys;
use std::ffi::{c_char, c_int};
use std::time::Duration;

// SAFETY: the declarations of Postgres's headers (storage/lwlock.h, shmem.h, ipc.h, procarray.h, miscadmin.h, elog.h,
// commands/extension.h, catalog/namespace.h, utils/lsyscache.h, access/twophase.h).
#[allow(clashing_extern_declarations)]
unsafe extern "C-unwind" {
    pub(crate) fn LWLockAcquire(lock: *mut pg_sys::LWLock, mode: pg_sys::LWLockMode::Type) -> bool;
    pub(crate) fn LWLockRelease(lock: *mut pg_sys::LWLock);
    pub(crate) fn RequestAddinShmemSpace(size: pg_sys::Size);
    pub(crate) fn ShmemInitStruct(name: *const c_char, size: pg_sys::Size, found: *mut bool) -> *mut std::ffi::c_void;
    pub(crate) fn BackendPidGetProc(pid: c_int) -> *mut pg_sys::PGPROC;
    pub(crate) fn CopyErrorData() -> *mut pg_sys::ErrorData;
    pub(crate) fn FreeErrorData(error: *mut pg_sys::ErrorData);
    /// The SQLSTATE of the error that is being reported.
    pub(crate) fn geterrcode() -> c_int;
    /// Does not return if the level is ERROR.
    pub(crate) fn ThrowErrorData(error: *mut pg_sys::ErrorData);
    pub(crate) fn get_extension_name(extension: pg_sys::Oid) -> *mut c_char;
    pub(crate) fn get_namespace_oid(name: *const c_char, missing_ok: bool) -> pg_sys::Oid;
    pub(crate) fn get_relname_relid(name: *const c_char, schema: pg_sys::Oid) -> pg_sys::Oid;
    pub(crate) static max_prepared_xacts: c_int;
    fn ProcessInterrupts();
}

/// Indexes in the array of named locks (lwlocknames.h, the same in Postgres 15 to 18).
#[derive(Clone, Copy)]
#[repr(usize)]
pub(crate) enum NamedLock {
    ProcArray = 4,
    AddinShmemInit = 21,
}

impl NamedLock {
    /// # Safety
    /// In a process that is attached to shared memory.
    pub(crate) unsafe fn get(self) -> *mut pg_sys::LWLock {
        // SAFETY: the array lives as long as shared memory, and is longer than these.
        unsafe { &raw mut (*pg_sys::MainLWLockArray.add(self as usize)).lock }
    }
}

/// CHECK_FOR_INTERRUPTS(): the statement may be cancelled here.
///
/// # Safety
/// No frame up to Postgres's own holds anything that needs dropping.
pub(crate) unsafe fn check_for_interrupts() {
    // SAFETY: the caller's promise.
    unsafe {
        if pg_sys::InterruptPending != 0 {
            ProcessInterrupts();
        }
    }
}

/// Sleeps for a moment; a signal ends it sooner.
pub(crate) fn sleep(time: Duration) {
    // SAFETY: only sleeps.
    unsafe { libc::usleep(time.as_micros() as u32) };
}
