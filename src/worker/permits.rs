//! Limits the number of senders. A sender needs file descriptors: for its connection, and for files that it opens for a
//! moment (a connection to a name server, a file of certificates). Postgres closes some of its own files when
//! descriptors run out, and must be told how many are used by others.

use pgrx::pg_sys;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

/// Descriptors for each sender: its connection, and one that it opens for a moment.
const DESCRIPTORS: usize = 2;
/// Descriptors that the process needs besides senders and files of Postgres: for waiting and for being woken.
const SPARE: usize = 8;

/// The permits for senders that a worker has.
pub(crate) struct SenderPermits {
    most: usize,
    /// The number of threads that have not ended. A thread may need a while to end after it was told to.
    live: Arc<AtomicUsize>,
    /// How many descriptors were reported to Postgres.
    told: usize,
}

/// The permit of one sender. It is returned when the thread has ended.
pub(crate) struct SenderPermit {
    live: Arc<AtomicUsize>,
    thread: Arc<()>,
}

/// Tells whether a sender's thread has ended.
#[derive(Default)]
pub(crate) struct ThreadSign(Weak<()>);

impl ThreadSign {
    pub(crate) fn has_ended(&self) -> bool {
        self.0.strong_count() == 0
    }
}

impl SenderPermit {
    pub(crate) fn sign(&self) -> ThreadSign {
        ThreadSign(Arc::downgrade(&self.thread))
    }
}

impl Drop for SenderPermit {
    fn drop(&mut self) {
        self.live.fetch_sub(1, Ordering::AcqRel);
    }
}

impl SenderPermits {
    pub(crate) fn new() -> Self {
        // SAFETY: a plain read of a value that the postmaster has computed from its settings and limits.
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

    /// Takes a permit for a sender that is started now; one must be free.
    pub(crate) fn take(&mut self) -> SenderPermit {
        self.live.fetch_add(1, Ordering::AcqRel);
        self.tell();
        SenderPermit {
            live: self.live.clone(),
            thread: Arc::default(),
        }
    }

    /// Reports to Postgres how many descriptors others use.
    pub(crate) fn tell(&mut self) {
        let in_use = self.live.load(Ordering::Acquire) * DESCRIPTORS;
        // SAFETY: counts descriptors; the first call may close files of Postgres that are not in use.
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
