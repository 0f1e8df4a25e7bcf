//! After a commit: waking the worker, once, and asking the launcher.
//!
//! The callback runs after the rows became visible. An ERROR in it would be a PANIC of the server, so it only touches
//! atomics and sets latches.

use crate::shmem::{self, SlotState};
use once_cell::unsync::OnceCell;
use pgrx::pg_sys;
use std::cell::Cell;

/// What the transaction did that somebody must hear of.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct News {
    events: bool,
    scheduled: bool,
    backends: bool,
    /// The extension was created or dropped, or a database was created.
    extension: bool,
    databases: bool,
}

thread_local! {
    static NEWS: Cell<News> = const { Cell::new(News { events: false, scheduled: false, backends: false, extension: false, databases: false }) };
    static REGISTERED: OnceCell<()> = const { OnceCell::new() };
}

fn note(change: impl FnOnce(&mut News)) {
    REGISTERED.with(|r| {
        r.get_or_init(|| {
            // SAFETY: registers a callback of this library for the life of the process. This allocates, hence here and
            // not in the callback.
            unsafe { pg_sys::RegisterXactCallback(Some(on_transaction_end), std::ptr::null_mut()) };
        });
    });
    let mut news = NEWS.get();
    change(&mut news);
    NEWS.set(news);
}

/// The transaction inserted events.
pub fn published() {
    if !NEWS.get().events {
        note(|n| n.events = true);
        if let Some(slot) = shmem::slot_of(database()) {
            slot.announce_publishing();
        }
    }
}

/// The transaction inserted scheduled events.
pub fn scheduled() {
    note(|n| n.scheduled = true);
}

/// The transaction changed backends or their passwords.
pub fn backends_changed() {
    note(|n| n.backends = true);
}

/// The transaction created, updated or dropped the extension.
pub fn extension_changed() {
    note(|n| n.extension = true);
}

/// The transaction made a database, perhaps with the extension in it.
pub fn databases_changed() {
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
            let news = NEWS.take();
            if news != News::default() {
                tell(news);
            }
        }
        // A prepared transaction's commit is told by the utility hook.
        XACT_EVENT_ABORT | XACT_EVENT_PREPARE | XACT_EVENT_PARALLEL_ABORT | XACT_EVENT_PARALLEL_COMMIT => {
            NEWS.set(News::default())
        }
        _ => {}
    }
}

/// The session's database.
fn database() -> pg_sys::Oid {
    // SAFETY: a plain read of the process's own variable.
    unsafe { pg_sys::MyDatabaseId }
}

fn tell(news: News) {
    if news.extension
        && let Some(slot) = shmem::claim_slot(database())
    {
        if slot.pid() == 0 {
            slot.set_state(SlotState::Wanted);
        }
        slot.nudge();
        shmem::wake_launcher();
    }
    if news.databases {
        shmem::request_rescan();
    }
    if let Some(slot) = shmem::slot_of(database()) {
        if news.scheduled {
            slot.announce_schedule();
        }
        if news.events {
            slot.announce_work();
        }
        if news.backends {
            slot.nudge();
        }
    }
}

/// A prepared transaction was committed: whether it published is not known here.
pub fn prepared_committed() {
    tell(News {
        events: true,
        scheduled: true,
        backends: true,
        ..News::default()
    });
}
