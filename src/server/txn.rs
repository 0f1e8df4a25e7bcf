//! After a commit: wakes the worker once, and tells the launcher.
//!
//! The callback runs when the rows are already visible. An ERROR in it would be a PANIC of the server, so it only
//! touches atomics and sets latches.

use crate::server::shmem;
use crate::server::unguarded;
use pgrx::pg_sys;
use relay::fault::{self, Point};
use std::cell::Cell;
use std::ffi::CStr;

/// What the transaction did that other processes must be told.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct News {
    events: bool,
    scheduled: bool,
    backends: bool,
    /// The extension was created.
    extension: bool,
    /// A database was created, changed or dropped.
    databases: bool,
}

thread_local! {
    static NEWS: Cell<News> = const { Cell::new(News { events: false, scheduled: false, backends: false, extension: false, databases: false }) };
}

/// The postmaster calls this once, so that all its children have the callback. Without preloading there is no process
/// to tell.
pub(crate) fn install() {
    // SAFETY: registers a callback of this library for the life of the process.
    unsafe { pg_sys::RegisterXactCallback(Some(on_transaction_end), std::ptr::null_mut()) };
}

fn note(change: impl FnOnce(&mut News)) {
    if !shmem::is_attached() {
        return;
    }
    let mut news = NEWS.get();
    change(&mut news);
    NEWS.set(news);
}

/// Notes that the transaction inserted events.
pub(crate) fn published() {
    if !NEWS.get().events {
        note(|n| n.events = true);
        if let Some(slot) = shmem::database_slot_here() {
            slot.announce_publishing();
        }
    }
}

/// Notes that the transaction inserted or changed scheduled events.
pub(crate) fn scheduled() {
    note(|n| n.scheduled = true);
}

/// Notes that the transaction has woken the worker, whatever else it does.
pub(crate) fn woken() {
    note(|n| (n.events, n.scheduled) = (true, true));
}

/// Notes that the transaction changed backends or their passwords.
pub(crate) fn backends_changed() {
    note(|n| n.backends = true);
}

/// Notes that the transaction created the extension: a worker has to be started.
pub(crate) fn extension_created() {
    note(|n| n.extension = true);
}

/// Notes that the transaction updated or dropped the extension: its worker has to check.
pub(crate) fn extension_changed() {
    note(|n| n.backends = true);
}

/// Notes that the transaction created, changed or dropped a database.
pub(crate) fn databases_changed() {
    note(|n| n.databases = true);
}

// No pg_guard: it calls nothing of Postgres except SetLatch, and it must not unwind.
// SAFETY: only Postgres calls this, in this process, when a transaction ends.
unsafe extern "C-unwind" fn on_transaction_end(event: pg_sys::XactEvent::Type, _arg: *mut std::ffi::c_void) {
    use pg_sys::XactEvent::{
        XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PARALLEL_ABORT, XACT_EVENT_PARALLEL_COMMIT, XACT_EVENT_PREPARE,
    };
    match event {
        XACT_EVENT_COMMIT => {
            let mut news = NEWS.take();
            if is_commit_prepared() {
                // What the prepared transaction did is not known here. Backends are loaded again only if it may have
                // changed them.
                (news.events, news.scheduled) = (true, true);
                news.backends |= shmem::are_backends_prepared();
                news.extension |= shmem::is_extension_prepared();
            }
            if news != News::default() {
                tell(news);
            }
            if news.events {
                // Others see the transaction, and its invalidations are not sent yet.
                fault::reach(Point::AtCommit);
            }
        }
        XACT_EVENT_PREPARE => {
            let news = NEWS.take();
            if news.extension {
                shmem::note_extension_prepared();
            }
            if news.backends || news.extension {
                shmem::note_backends_prepared();
            }
        }
        XACT_EVENT_ABORT | XACT_EVENT_PARALLEL_ABORT | XACT_EVENT_PARALLEL_COMMIT => NEWS.set(News::default()),
        _ => {}
    }
}

/// Whether the transaction that ends belongs to a COMMIT PREPARED. That is always the only statement of its message, so
/// its text tells. If another statement is mistaken for it, the worker is only woken for nothing.
fn is_commit_prepared() -> bool {
    // SAFETY: plain reads of the process's own variables. The text is set while a session executes a statement.
    let text = unsafe {
        let is_session = pg_sys::MyBackendType == pg_sys::BackendType::B_BACKEND;
        if unguarded::max_prepared_xacts == 0 || !is_session || pg_sys::debug_query_string.is_null() {
            return false;
        }
        CStr::from_ptr(pg_sys::debug_query_string)
    };
    relay::statement::is_commit_prepared(text.to_bytes())
}

fn tell(news: News) {
    // SAFETY: a plain read of the process's own variable.
    let database = unsafe { pg_sys::MyDatabaseId };
    if news.extension {
        shmem::announce(database);
    }
    if news.databases {
        shmem::request_rescan();
    }
    if let Some(slot) = shmem::database_slot_here() {
        // Changes of backends come first: events are sent with the current settings, and after restores have been
        // noted.
        if news.backends || news.extension {
            slot.nudge();
        }
        if news.scheduled || news.backends {
            slot.announce_schedule();
        }
        if news.events {
            slot.announce_work();
        }
    }
}
