//! How many senders there may be. A sender needs file descriptors: for its connection, and for what it opens for a
//! moment (a connection to a name server, a file of certificates). Postgres closes some of its own files when
//! descriptors run out, and has to be told how many are not its own.

use pgrx::pg_sys;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Descriptors of a sender: its connection, and one that it opens for a moment.
const DESCRIPTORS: usize = 2;
/// Descriptors that the process needs beside senders and files of Postgres: to wait, to be woken.
const SPARE: usize = 8;

/// The permits for senders that a worker has.
pub(crate) struct SenderPermits {
    most: usize,
    /// Threads that have not ended. One that was let go may need a while to end.
    live: Arc<AtomicUsize>,
    /// How many descriptors Postgres has been told of.
    told: usize,
}

/// The permit of one sender. It is returned when the thread has ended.
pub(crate) struct SenderPermit(Arc<AtomicUsize>);

impl Drop for SenderPermit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl SenderPermits {
    pub(crate) fn new() -> Self {
        // SAFETY: a plain read of what the postmaster has found out by its settings and limits.
        let descriptors = unsafe { pg_sys::max_safe_fds }.max(0) as usize;
        // A third is left to Postgres for tables and indexes.
        Self {
            most: ((descriptors * 2 / 3).saturating_sub(SPARE) / DESCRIPTORS).max(1),
            live: Arc::default(),
            told: 0,
        }
    }

    pub(crate) fn most(&self) -> usize {
        self.most
    }

    pub(crate) fn free(&self) -> usize {
        self.most.saturating_sub(self.live.load(Ordering::Acquire))
    }

    /// A permit for a sender that is started now; one must be free.
    pub(crate) fn take(&mut self) -> SenderPermit {
        self.live.fetch_add(1, Ordering::AcqRel);
        self.tell();
        SenderPermit(self.live.clone())
    }

    /// Tells Postgres how many descriptors are not its own.
    pub(crate) fn tell(&mut self) {
        let in_use = self.live.load(Ordering::Acquire) * DESCRIPTORS;
        // SAFETY: counts; the first may close files of Postgres that are not in use.
        unsafe {
            while self.told < in_use {
                pg_sys::ReserveExternalFD();
                self.told += 1;
            }
            while self.told > in_use {
                pg_sys::ReleaseExternalFD();
                self.told -= 1;
            }
        }
    }
}
