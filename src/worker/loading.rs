//! Loads the backends, their settings, and the restores that have brought events.

use crate::server::database_slot::SlotState;
use crate::server::guc::LogLevel;
use crate::server::meters;
use crate::server::process::repeat_log_after;
use crate::server::process::{self, Aborted, log};
use crate::server::shmem;
use crate::server::unguarded;
use crate::tables::backends::BackendRow;
use crate::tables::catalog;
use crate::tables::copies;
use crate::tables::foreign;
use crate::tables::identity::Identity;
use crate::tables::numbers;
use crate::tables::sequence;
use crate::tables::{backends, restores};
use crate::worker::backend::Backend;
use crate::worker::leave::leave_process;
use crate::worker::recovery;
use crate::worker::state::Generation;
use crate::worker::state::Loaded;
use crate::worker::state::{REPLIES_AT_CHANGE, Worker};
use crate::worker::task::Task;
use pgrx::pg_sys;
use relay::delivery::Guarantee;
use relay::reading::snapshot::{FIRST_NORMAL_XID, Tick};
use relay::time::Now;
use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What the tables contain.
struct LoadedRows {
    backends: Vec<BackendRow>,
    deleted: Vec<i32>,
    installation: String,
    /// Whether there are restores that the newest tick does not see.
    more_restores: bool,
    /// The highest number of any event.
    highest: i64,
    /// The state of the trigger of `outbox.events`.
    triggers: Option<String>,
}

/// The result of reading the database once.
struct DatabaseLook {
    /// The extension's version. `None`: it is not installed.
    version: Option<String>,
    generation: u64,
    /// `None`: the tables have not changed since they were last read.
    rows: Option<LoadedRows>,
    /// The OID of the table of events.
    events: Option<pg_sys::Oid>,
}

/// Calls of `outbox.wake()` cause settings to be loaded at most this often.
const LOOK_PAUSE: Duration = Duration::from_millis(100);

impl Worker {
    /// Acts on a call of `outbox.wake()`.
    pub(super) fn heed_wishes(&mut self, now: Now) {
        if !self.slot.take_asked() {
            return;
        }
        self.backends.iter_mut().for_each(|b| b.delivery.retry_asked(now));
        if self.asked_at.is_none_or(|at| now >= at + LOOK_PAUSE) {
            (self.asked_at, self.nudged) = (Some(now), true);
        }
        // A session may be waiting for the saved cursors to show progress.
        self.save_unsaved(now);
    }

    /// Whether backends and settings have to be loaded now.
    pub(super) fn must_load(&mut self, now: Now) -> bool {
        self.nudged |= self.slot.take_nudge();
        self.nudged || self.settings_changed || self.generation == Generation::Stale || self.is_restore_due(now)
    }

    /// Loads, unless that failed a moment ago: then the worker goes on with the settings that it has.
    pub(super) fn load_now(&mut self, now: Now) -> Option<Loaded> {
        process::show_activity("loading the settings of backends");
        let nudged = std::mem::take(&mut self.nudged);
        let loaded = self.attempt(Task::Load, now, |worker| worker.load(nudged, now));
        match loaded {
            Some(Loaded::Idle) => {}
            Some(_) => {
                self.stale_since = None;
                if nudged {
                    // A session may be waiting for the saved cursors to show progress.
                    self.save_unsaved(now);
                }
            }
            None => {
                self.nudged |= nudged;
                self.stale_since.get_or_insert(now);
            }
        }
        loaded
    }

    /// The newest tick, even if standbys do not have it yet.
    pub(super) fn newest(&self) -> Arc<Tick> {
        match &self.awaited {
            Some(awaited) => Arc::new(awaited.tick.clone()),
            None => self.latest.clone(),
        }
    }

    /// Rows that the newest tick sees may have been inserted without the trigger, with numbers above its bound. Then
    /// the bound is raised. That is safe because nothing of this tick was read yet.
    fn raise_bound(&mut self, highest: i64) {
        let is_low = |tick: &Tick| tick.next_xid > FIRST_NORMAL_XID && tick.high_seq < highest;
        if is_low(&self.latest) {
            Arc::make_mut(&mut self.latest).high_seq = highest;
        }
        if let Some(awaited) = self.awaited.as_mut().filter(|awaited| is_low(&awaited.tick)) {
            awaited.tick.high_seq = highest;
        }
    }

    fn load(&mut self, nudged: bool, now: Now) -> Result<Loaded, Aborted> {
        // A nudge may come before the invalidations of its commit, which are sent last: then the generation does not
        // show the change yet.
        let all = self.settings_changed;
        let found = self.look(nudged || all || self.is_restore_due(now))?;
        if found.rows.is_some() {
            catalog::note_served(found.events);
        }
        if !self.serves(found.version.as_deref(), now) {
            return Ok(Loaded::Idle);
        }
        let mut outcome = Loaded::Same;
        let mut generation = Generation::Loaded(found.generation);
        if let Some(rows) = found.rows {
            self.raise_bound(rows.highest);
            if generation != self.generation {
                self.mending.look_again(rows.triggers.as_deref());
            }
            if self.identify(&rows.installation)? {
                return self.load(nudged, now);
            }
            if rows.more_restores {
                // They belong to the next tick. Everything is loaded again before that tick's rows are read.
                (generation, self.work) = (Generation::Stale, true);
            }
            outcome = self.apply_rows(rows.backends, rows.deleted, all, now)?;
        }
        (self.generation, self.settings_changed) = (generation, false);
        self.give_up_comparing(now)?;
        Ok(outcome)
    }

    /// Remembers the stream of the settings, for a time when the setting is a template.
    pub(super) fn note_stream(&mut self, now: Now) {
        if !self.is_stream_noted {
            let noted = self.attempt(Task::NoteStream, now, |_| {
                process::transaction(backends::note_common_stream)
            });
            self.is_stream_noted = noted.is_some();
        }
    }

    /// Whether restored events of some backend are due to be compared.
    fn is_restore_due(&self, now: Now) -> bool {
        self.backends.iter().any(|b| b.load_at().is_some_and(|at| at <= now))
    }

    /// Reads the tables if they have changed since they were last read, or if they may have (`changed`).
    fn look(&self, changed: bool) -> Result<DatabaseLook, Aborted> {
        let newest = self.newest();
        process::transaction(|| {
            // Processes invalidations, so that the generation is up to date. SAFETY: within a transaction.
            unsafe { pg_sys::AcceptInvalidationMessages() };
            let relations = catalog::relations();
            let version = relations.and_then(|_| backends::installed_version());
            let generation = catalog::generation();
            let is_ours = version.as_deref() == Some(env!("CARGO_PKG_VERSION"));
            let is_new = self.generation != Generation::Loaded(generation);
            let rows = (is_ours && (is_new || changed)).then(|| {
                says_trouble_of_sequence();
                LoadedRows {
                    highest: numbers::vouch_anew(),
                    triggers: foreign::trigger_state(),
                    backends: backends::all(&newest.snapshot),
                    deleted: backends::deleted_backends(),
                    installation: backends::installation(),
                    more_restores: restores::has_later_restores(&newest.snapshot),
                }
            });
            DatabaseLook {
                version,
                generation,
                rows,
                // Looked up again, because reading the tables has processed further invalidations.
                events: catalog::relations().map(|relations| relations.events),
            }
        })
    }

    /// Whether the extension is installed in the library's version. If it is not installed at all, the worker leaves
    /// the database.
    fn serves(&mut self, version: Option<&str>, now: Now) -> bool {
        match version {
            None => {
                // SAFETY: a plain read of the process's own variable.
                meters::keep_only(unsafe { pg_sys::MyDatabaseId }, |_| false);
                let reason = "the extension was dropped";
                leave_process(self.slot, SlotState::Absent, &self.home.name, reason)
            }
            Some(version) if version != env!("CARGO_PKG_VERSION") => {
                self.rest_for_version(version, now);
                return false;
            }
            Some(_) => self.mismatch_said = None,
        }
        if self.slot.state() != SlotState::Running {
            self.slot.set_state(SlotState::Running);
            // The launcher may be able to start other workers now.
            shmem::wake_launcher();
            let message = format!("outbox_relay worker started in database \"{}\"", self.home.name);
            log(LogLevel::Info, &message, None, None);
        }
        true
    }

    /// With at_least_once, restored events are sent without comparing them with the streams.
    fn give_up_comparing(&mut self, now: Now) -> Result<(), Aborted> {
        for backend in &mut self.backends {
            let gives_up = backend.delivery.guarantee() == Guarantee::AtLeastOnce && backend.is_restored();
            if gives_up && backend.may_compare(now) {
                recovery::give_up_comparing(backend)?;
            }
        }
        Ok(())
    }

    fn rest_for_version(&mut self, version: &str, now: Now) {
        let is_said = |at: Now| now < at + repeat_log_after();
        if !self.mismatch_said.is_some_and(is_said) {
            self.mismatch_said = Some(now);
            log(
                LogLevel::Error,
                "outbox_relay worker is idle: library and extension have different versions",
                Some(&format!(
                    "The library has version {}, the extension {version}.",
                    env!("CARGO_PKG_VERSION")
                )),
                Some("Run ALTER EXTENSION outbox_relay UPDATE, or restart the server with the matching library."),
            );
        }
        self.slot.set_state(SlotState::Mismatched);
        shmem::wake_launcher();
        if !self.backends.is_empty() {
            // Wait for replies, so that acknowledged events are not sent again.
            self.await_replies(REPLIES_AT_CHANGE, Backend::is_sending);
            self.save_unsaved(now);
            self.backends.clear();
        }
        self.generation = Generation::Stale;
    }

    /// Finds out whether this database is a copy, and saves this run's identity, unless that was done already. True:
    /// everything has to be loaded again.
    fn identify(&mut self, installation: &str) -> Result<bool, Aborted> {
        // SAFETY: a plain read of the process's own variable.
        let database = unsafe { pg_sys::MyDatabaseId }.to_u32();
        let guard_prefix = format!("outbox_relay:guard:{installation}:{database}:");
        if guard_prefix != self.home.guard_prefix {
            // The extension was created again: its tables do not know this run of the server, and numbers start from
            // the beginning.
            (self.home.guard_prefix, self.identity) = (guard_prefix, None);
            self.backends.clear();
            (self.latest, self.awaited) = (Arc::new(Tick::beginning()), None);
            (self.work, self.polled, self.ticked) = (true, true, false);
        }
        if self.identity.is_some() {
            return Ok(false);
        }
        process::transaction(copies::note_copy)?;
        self.identity = Identity::establish()?;
        relay::resp::bounds::expect_running(running_at_most());
        self.generation = Generation::Stale;
        Ok(self.identity.is_some())
    }
}

/// Logs once a minute if something is wrong with the sequence of event numbers. While it is, nobody can publish and
/// scheduled events wait, but existing events are sent. Returns whether something is wrong. Within a transaction.
pub(super) fn says_trouble_of_sequence() -> bool {
    thread_local! {
        static SAID: RefCell<Option<(String, Instant)>> = const { RefCell::new(None) };
    }
    let trouble = catalog::relations()
        .map(|relations| relations.sequence)
        .and_then(|sequence| sequence::trouble(sequence).or_else(|| sequence::end_reached(sequence)));
    let Some(trouble) = trouble else {
        SAID.set(None);
        return false;
    };
    let is_new = |(text, at): &(String, Instant)| *text != trouble || at.elapsed() >= repeat_log_after();
    if SAID.with_borrow(|said| said.as_ref().is_none_or(is_new)) {
        SAID.set(Some((trouble.clone(), Instant::now())));
        log(
            LogLevel::Warning,
            sequence::MESSAGE,
            Some(&trouble),
            Some(sequence::MEND),
        );
    }
    true
}

/// How many transactions can run at the same time in this server.
fn running_at_most() -> usize {
    // SAFETY: set when the server started.
    let (sessions, prepared) = unsafe { (pg_sys::MaxBackends, unguarded::max_prepared_xacts) };
    sessions.max(0) as usize + prepared.max(0) as usize
}
