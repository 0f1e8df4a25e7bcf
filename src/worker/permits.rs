//! How many senders there may be: each is a thread, a connection, and what it opens for a moment meanwhile (a name server's, a file of
//! certificates). Postgres closes files that it has open when it needs descriptors for others, and has to be told of those that are not its own.

use pgrx::pg_sys;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Descriptors of a sender: its connection, and one that it opens for a moment.
const DESCRIPTORS: usize = 2;
/// Descriptors that the process needs beside senders and files of Postgres: to wait, to be woken.
const SPARE: usize = 8;

/// The room that a worker has for senders.
pub struct SenderPermits {
    most: usize,
    /// Of threads that have not ended; one that was let go may need a while.
    live: Arc<AtomicUsize>,
    /// So many descriptors Postgres has been told of.
    told: usize,
}

/// A sender's place. It is free when the thread has ended.
pub struct SenderPermit(Arc<AtomicUsize>);

impl Drop for SenderPermit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl SenderPermits {
    pub fn new() -> Self {
        // SAFETY: a plain read of what the postmaster has found out by its settings and limits.
        let descriptors = unsafe { pg_sys::max_safe_fds }.max(0) as usize;
        // A third stays for Postgres: tables and indexes.
        Self {
            most: ((descriptors * 2 / 3).saturating_sub(SPARE) / DESCRIPTORS).max(1),
            live: Arc::default(),
            told: 0,
        }
    }

    pub fn most(&self) -> usize {
        self.most
    }

    pub fn free(&self) -> usize {
        self.most.saturating_sub(self.live.load(Ordering::Acquire))
    }

    /// For a sender that is started now; there must be room.
    pub fn take(&mut self) -> SenderPermit {
        self.live.fetch_add(1, Ordering::AcqRel);
        self.tell();
        SenderPermit(self.live.clone())
    }

    /// Tells Postgres how many descriptors are not its own.
    pub fn tell(&mut self) {
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
