//! What a worker keeps from round to round.

use crate::server::database_slot::DatabaseSlot;
use crate::server::process;
use crate::server::questions::Heard;
use crate::tables::identity::Identity;
use crate::worker::backend::{Backend, Home};
use crate::worker::due::Scheduled;
use crate::worker::found::Found;
use crate::worker::mended::Mending;
use crate::worker::passed::Passed;
use crate::worker::permits::{SenderPermits, ThreadSign};
use crate::worker::purge::Purge;
use crate::worker::rates::Rates;
use crate::worker::task::Task;
use crate::worker::tested::BackendTest;
use crate::worker::troubles::Troubles;
use crate::worker::turns::Turns;
use relay::consumers::readership::Interest;
use relay::reading::commits::Commits;
use relay::reading::pace::{Pace, Pieces};
use relay::reading::snapshot::Tick;
use relay::time::Now;
use relay::time::patience::Patience;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the worker waits for replies to batches in flight when a backend's settings have changed. The other
/// backends wait meanwhile.
pub(super) const REPLIES_AT_CHANGE: Duration = Duration::from_millis(200);

/// A tick that synchronous standbys have not flushed yet.
pub(super) struct AwaitedTick {
    pub(super) tick: Tick,
    pub(super) wal: u64,
    pub(super) look_at: Now,
    pub(super) pause: Duration,
}

/// Which state of the catalog was last loaded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Generation {
    /// No valid state: everything has to be loaded, whatever the catalog's counter says.
    Stale,
    /// The state with this number (see `catalog::generation`).
    Loaded(u64),
}

/// The result of loading.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Loaded {
    /// The library and the extension have different versions: nothing is served.
    Idle,
    /// Nothing has changed.
    Same,
    Changed,
}

pub(super) struct Worker {
    pub(super) slot: &'static DatabaseSlot,
    pub(super) started: Instant,
    pub(super) home: Home,
    /// Set when the extension was found.
    pub(super) identity: Option<Identity>,
    pub(super) backends: Vec<Backend>,
    /// The newest tick whose events may be sent.
    pub(super) latest: Arc<Tick>,
    /// A newer tick, which synchronous standbys do not have yet.
    pub(super) awaited: Option<AwaitedTick>,
    /// When the commits that no tick has seen yet began.
    pub(super) commits: Commits,
    /// How far the WAL was flushed for `latest`.
    pub(super) flushed: u64,
    /// The generation that `backends` were loaded from.
    pub(super) generation: Generation,
    /// Something may have been committed that no tick has seen.
    pub(super) work: bool,
    /// The poll interval has passed: take a tick even if no backend is up.
    pub(super) polled: bool,
    pub(super) polled_at: Now,
    pub(super) scheduled: Scheduled,
    /// Streams, by the index of their backend, in which no event waits any more when the failed ones are written down.
    pub(super) failed_streams: Vec<(usize, Vec<Rc<str>>)>,
    /// Threads of lanes that were given up, by the number of their backend.
    pub(super) leaving: Vec<(i32, ThreadSign)>,
    /// What finders have found in this round.
    pub(super) found: Vec<Found>,
    pub(super) settings_changed: bool,
    /// Whether the present stream of the settings is recorded.
    pub(super) is_stream_noted: bool,
    /// Somebody has changed a backend, and the change is not loaded yet.
    pub(super) nudged: bool,
    /// When backends were last loaded because of `outbox.wake()`.
    pub(super) asked_at: Option<Now>,
    /// Since when loading has failed.
    pub(super) stale_since: Option<Now>,
    /// A tick was taken in this round.
    pub(super) ticked: bool,
    pub(super) patience: Patience<Task>,
    pub(super) troubles: Troubles,
    /// After an ERROR, nothing is tried before this.
    pub(super) pause_until: Now,
    pub(super) pace: Pace,
    /// When the worker last heard of a session's commit.
    pub(super) published_at: Option<Now>,
    /// Failing many events: those of deleted backends, and those behind a failed head of their stream.
    pub(super) failing: Pieces,
    /// Failing rests until then, because others publish.
    pub(super) fails_at: Option<Now>,
    pub(super) logged_error: Option<(String, Now)>,
    /// All senders write to this socket to wake the worker.
    pub(super) waker: Arc<UnixStream>,
    pub(super) woken: UnixStream,
    pub(super) permits: SenderPermits,
    /// Tests of backends that are asked for and have not begun.
    pub(super) questions: Vec<Heard>,
    /// Tests of backends that are running.
    pub(super) tests: Vec<BackendTest>,
    /// The token buckets of backends with a pace.
    pub(super) rates: Rates,
    pub(super) turns: Turns,
    pub(super) purge: Purge,
    pub(super) passed: Passed,
    pub(super) mending: Mending,
    /// When it was last logged that versions do not match.
    pub(super) mismatch_said: Option<Now>,
    /// Who wants to know about consumer groups.
    pub(super) interest: Interest,
}

impl Worker {
    pub(super) fn new(slot: &'static DatabaseSlot) -> Self {
        let pair = UnixStream::pair().and_then(|(a, b)| {
            a.set_nonblocking(true)?;
            b.set_nonblocking(true)?;
            Ok((a, b))
        });
        let (waker, woken) =
            pair.unwrap_or_else(|e| crate::server::error::internal(format!("could not create a socket pair: {e}")));
        process::prepare_to_wait(c"OutboxRelayWorker", Some(woken.as_raw_fd()));
        Self {
            slot,
            started: Instant::now(),
            home: Home::default(),
            identity: None,
            backends: Vec::new(),
            latest: Arc::new(Tick::beginning()),
            awaited: None,
            commits: Commits::default(),
            flushed: 0,
            generation: Generation::Stale,
            work: true,
            polled: true,
            polled_at: Now::ZERO,
            scheduled: Scheduled::default(),
            failed_streams: Vec::new(),
            leaving: Vec::new(),
            found: Vec::new(),
            settings_changed: false,
            is_stream_noted: false,
            nudged: false,
            asked_at: None,
            stale_since: None,
            ticked: false,
            patience: Patience::default(),
            troubles: Troubles::default(),
            pause_until: Now::ZERO,
            pace: Pace::default(),
            published_at: None,
            failing: Pieces::default(),
            fails_at: None,
            logged_error: None,
            waker: Arc::new(waker),
            woken,
            permits: SenderPermits::new(),
            questions: Vec::new(),
            tests: Vec::new(),
            rates: Rates::default(),
            turns: Turns::default(),
            purge: Purge::default(),
            passed: Passed::default(),
            mending: Mending::default(),
            mismatch_said: None,
            interest: Interest::Nobody,
        }
    }

    pub(super) fn now(&self) -> Now {
        self.started.elapsed()
    }
}
