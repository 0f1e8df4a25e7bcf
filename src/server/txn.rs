//! After a commit: waking the worker, once, and asking the launcher.
//!
//! The callback runs after the rows became visible. An ERROR in it would be a PANIC of the server, so it only touches
//! atomics and sets latches.

use crate::server::shmem;
use crate::server::unguarded;
use pgrx::pg_sys;
use std::cell::Cell;
use std::ffi::CStr;

/// What the transaction did that other processes must hear of.
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

/// Called once, by the postmaster, so that all its children have the callback. Without preloading there is no process
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

/// The transaction inserted events.
pub(crate) fn published() {
    if !NEWS.get().events {
        note(|n| n.events = true);
        if let Some(slot) = shmem::database_slot_here() {
            slot.announce_publishing();
        }
    }
}

/// The transaction inserted or changed scheduled events.
pub(crate) fn scheduled() {
    note(|n| n.scheduled = true);
}

/// The transaction has woken the worker: what else it does counts, too.
pub(crate) fn woken() {
    note(|n| (n.events, n.scheduled) = (true, true));
}

/// The transaction changed backends or their passwords.
pub(crate) fn backends_changed() {
    note(|n| n.backends = true);
}

/// The transaction created the extension: a worker is to come.
pub(crate) fn extension_created() {
    note(|n| n.extension = true);
}

/// The transaction updated or dropped the extension: its worker is to look.
pub(crate) fn extension_changed() {
    note(|n| n.backends = true);
}

/// The transaction made, changed or dropped a database.
pub(crate) fn databases_changed() {
    note(|n| n.databases = true);
}

// No pg_guard: nothing in it calls back into Postgres but SetLatch, and it must not unwind.
// SAFETY: called by Postgres alone, in this process, when a transaction ends.
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

/// Whether the transaction that ends is that of a COMMIT PREPARED. It is always the only statement of its message, so
/// its text tells; taking another one for it wakes the worker for nothing.
fn is_commit_prepared() -> bool {
    // SAFETY: plain reads of the process's own variables. A session has a text there while it executes a statement.
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
        // Changes of backends first: events are sent by the settings of now, and with the note that they were restored.
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
