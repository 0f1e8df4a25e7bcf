//! Loading: which backends there are, with which settings, and what has come by a restore.

use crate::server::database_slot::SlotState;
use crate::server::guc::LogLevel;
use crate::server::process::REPEAT_LOG_AFTER;
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
use crate::tables::{backends, cursors, refused, restores};
use crate::worker::backend::Whose;
use crate::worker::backend::{Backend, Home};
use crate::worker::leave::leave_process;
use crate::worker::recovery;
use crate::worker::state::Loaded;
use crate::worker::state::{SETTLE_AT_CHANGE, Worker};
use crate::worker::task::Task;
use pgrx::pg_sys;
use relay::delivery::Guarantee;
use relay::reading::role::Role;
use relay::reading::snapshot::{FIRST_NORMAL_XID, Tick};
use relay::redis::hash_slot::hash_slot_of;
use relay::time::Now;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What the tables say.
struct Rows {
    backends: Vec<BackendRow>,
    deleted: Vec<i32>,
    installation: String,
    /// There are restores that the newest tick does not see.
    more_restores: bool,
    /// The highest number that any event has.
    highest: i64,
    /// What the trigger of events is.
    triggers: Option<String>,
}

/// However often somebody asks for an attempt, settings are looked at for that no sooner than this again.
const LOOK_PAUSE: Duration = Duration::from_millis(100);

impl Worker {
    /// Somebody has called `outbox.wake()`.
    pub(super) fn heed_wishes(&mut self, now: Now) {
        if !self.slot.take_asked() {
            return;
        }
        self.backends.iter_mut().for_each(|b| b.delivery.retry_asked(now));
        if self.asked_at.is_none_or(|at| now >= at + LOOK_PAUSE) {
            (self.asked_at, self.nudged) = (Some(now), true);
        }
        // Somebody may be waiting to see how far it is.
        self.save_unsaved(now);
    }

    /// Whether backends and settings are to be loaded, now.
    pub(super) fn must_load(&mut self, now: Now) -> bool {
        self.nudged |= self.slot.take_nudge();
        self.nudged
            || self.settings_changed
            || self.generation == u64::MAX
            || self.backends.iter().any(|b| b.load_at().is_some_and(|at| at <= now))
    }

    /// Loads, unless that failed a moment ago: then all goes on with what was known.
    pub(super) fn load_now(&mut self, now: Now) -> Option<Loaded> {
        let nudged = std::mem::take(&mut self.nudged);
        let loaded = self.attempt(Task::Load, now, |worker| worker.load(nudged, now));
        match loaded {
            Some(Loaded::Idle) => {}
            Some(_) => {
                self.stale_since = None;
                if nudged {
                    // Somebody may be waiting to see how far it is.
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

    /// The newest tick, also one that standbys do not have yet.
    pub(super) fn newest(&self) -> Arc<Tick> {
        match &self.awaited {
            Some(awaited) => Arc::new(awaited.tick.clone()),
            None => self.latest.clone(),
        }
    }

    /// What the newest tick sees may have come past the trigger, with a number that nobody knew of then. Nobody has read of it yet.
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
        // A nudge may come before the invalidations of the commit that it tells of: they are sent last.
        let (known, all) = (self.generation, self.settings_changed);
        let changed = nudged || all || self.backends.iter().any(|b| b.load_at().is_some_and(|at| at <= now));
        let newest = self.newest();
        let loaded = process::transaction(|| {
            // Takes in invalidations, so that the generation is up to date.
            // SAFETY: within a transaction.
            unsafe { pg_sys::AcceptInvalidationMessages() };
            let relations = catalog::relations();
            let installed = relations.and_then(|_| backends::installed_version());
            let generation = catalog::generation();
            let is_ours = installed.as_deref() == Some(env!("CARGO_PKG_VERSION"));
            let rows = (is_ours && (generation != known || changed)).then(|| {
                says_trouble_of_sequence();
                Rows {
                    highest: numbers::vouch_anew(),
                    triggers: foreign::trigger_state(),
                    backends: backends::all(&newest.snapshot),
                    deleted: backends::deleted_backends(),
                    installation: backends::installation(),
                    more_restores: restores::has_later_restores(&newest.snapshot),
                }
            });
            // Reading them has taken in what was told meanwhile.
            let events = catalog::relations().map(|relations| relations.events);
            (installed, generation, rows, events)
        });
        let (installed, generation, rows, events) = loaded?;
        if rows.is_some() {
            self.events = events;
        }
        match installed.as_deref() {
            None => {
                let reason = "the extension was dropped";
                leave_process(self.slot, SlotState::Absent, &self.home.name, reason)
            }
            Some(version) if version != env!("CARGO_PKG_VERSION") => {
                self.rest_for_version(version, now);
                return Ok(Loaded::Idle);
            }
            Some(_) if self.slot.state() != SlotState::Running => {
                self.slot.set_state(SlotState::Running);
                // Others may be started.
                shmem::wake_launcher();
                log(
                    LogLevel::Info,
                    &format!("outbox_relay worker started in database \"{}\"", self.home.name),
                    None,
                    None,
                );
            }
            Some(_) => {}
        }
        let mut outcome = Loaded::Same;
        let mut next_generation = generation;
        if let Some(rows) = rows {
            self.raise_bound(rows.highest);
            if generation != self.generation {
                self.mending.look_again(rows.triggers.as_deref());
            }
            if self.settles_in(&rows.installation)? {
                return self.load(nudged, now);
            }
            if rows.more_restores {
                // They are for the next tick: before its rows are read, all is loaded again.
                (next_generation, self.work) = (u64::MAX, true);
            }
            outcome = self.take_over_rows(rows, all, now)?;
        }
        (self.generation, self.settings_changed) = (next_generation, false);
        for backend in &mut self.backends {
            if backend.delivery.guarantee() == Guarantee::AtLeastOnce
                && backend.is_restored()
                && backend.may_compare(now)
            {
                recovery::give_up_comparing(backend)?;
            }
        }
        Ok(outcome)
    }

    fn rest_for_version(&mut self, version: &str, now: Now) {
        if self.slot.state() != SlotState::Mismatched {
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
            // What was acknowledged is not to be sent again.
            self.settle(SETTLE_AT_CHANGE, Backend::is_sending);
            self.save_unsaved(now);
            self.backends.clear();
        }
        self.generation = u64::MAX;
    }

    /// This database may be new to the worker: is it a copy, and who are we to it? True: what was loaded is to be loaded again.
    fn settles_in(&mut self, installation: &str) -> Result<bool, Aborted> {
        // SAFETY: a plain read of the process's own variable.
        let database = unsafe { pg_sys::MyDatabaseId }.to_u32();
        let guard_prefix = format!("outbox_relay:guard:{installation}:{database}:");
        if guard_prefix != self.home.guard_prefix {
            // The extension was created anew: its tables have not heard of this run of the server, and begin at the first number.
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
        self.generation = u64::MAX;
        Ok(self.identity.is_some())
    }

    /// Takes over what has changed. `all`: settings have, which concern every backend.
    fn take_over_rows(&mut self, rows: Rows, all: bool, now: Now) -> Result<Loaded, Aborted> {
        let home = self.home.clone();
        let mut changed: Vec<(Whose, Option<BackendRow>)> = Vec::new();
        for backend in self
            .backends
            .iter_mut()
            .filter(|b| b.reads_for_redis() || b.is_finder())
        {
            let row = rows.backends.iter().find(|row| row.number == backend.number).cloned();
            let row = row.map(|row| backend.due_row(row, now));
            if all || backend.row != row {
                changed.push((backend.whose(), row));
            }
        }
        let is_known = |number: i32| self.backends.iter().any(|b| b.number == number);
        let numbers = rows.backends.iter().map(|row| row.number);
        let mut numbers = numbers.chain(rows.deleted.iter().copied()).chain([0]);
        if changed.is_empty() && numbers.all(is_known) {
            return Ok(Loaded::Same);
        }
        let row_of = |b: &Backend| {
            changed
                .iter()
                .find(|(whose, _)| *whose == b.whose())
                .map(|(_, row)| row.as_ref())
        };
        let stays = |b: &Backend| match row_of(b) {
            None => true,
            Some(row) => row.is_some_and(|row| b.keeps_sender(row, &home)),
        };
        self.settle(SETTLE_AT_CHANGE, |b| !stays(b) && b.is_sending());
        // Refused events are looked up by the new settings: those of the old ones must be there.
        self.save_unsaved(now);
        if changed.iter().any(|(whose, _)| {
            self.backends
                .iter()
                .any(|b| b.whose() == *whose && !b.records.is_empty())
        }) {
            return Err(Aborted::because("what was refused could not be written down"));
        }
        let backends = &mut self.backends;
        let reconciled = process::transaction(|| {
            for (whose, row) in changed {
                let Some(backend) = backends.iter_mut().find(|b| b.whose() == whose) else {
                    continue;
                };
                match row {
                    Some(row) => backend.reconfigure(row, &home, now),
                    None => backend.delete(),
                }
            }
            let mut missing: Vec<Backend> = Vec::new();
            for row in rows.backends {
                if !backends.iter().any(|b| b.number == row.number) {
                    let role = if row.is_cluster() { Role::Finder } else { Role::Redis };
                    missing.push(Backend::load(row.number, None, role, Some(row), &home));
                }
            }
            for number in rows.deleted {
                if !backends.iter().any(|b| b.number == number) {
                    missing.push(Backend::load(number, None, Role::Deleted, None, &home));
                }
            }
            if !backends.iter().any(|b| matches!(b.role, Role::Strays)) {
                missing.push(Backend::load(0, None, Role::Strays, None, &home));
            }
            let lanes = missing_lanes(backends.iter().chain(&missing), &home);
            missing.extend(lanes);
            missing
        });
        self.backends.extend(reconciled?);
        // Rows of a backend that was not known may be those of one that is.
        self.backends.iter_mut().for_each(|b| b.rests_until = Now::ZERO);
        self.share_positions();
        process::debug(|| {
            format!(
                "loaded the settings of {} backends",
                self.backends
                    .iter()
                    .filter(|b| b.row.is_some() && b.lane.is_none())
                    .count()
            )
        });
        self.work = true;
        Ok(Loaded::Changed)
    }

    /// Backends whose saved cursors are of equal ticks speak of the same: then one scan serves them.
    fn share_positions(&mut self) {
        for index in 1..self.backends.len() {
            let (before, rest) = self.backends.split_at_mut(index);
            let backend = &mut rest[0];
            if !backend.delivery.is_idle() {
                continue;
            }
            let mut position = backend.delivery.position().clone();
            let mut shares = false;
            for other in before.iter() {
                shares |= position.share(other.delivery.position());
            }
            if shares {
                backend.delivery.advanced(position);
            }
        }
    }
}

/// Nobody can publish, and what is scheduled waits; what is there is sent all the same. It is said once a minute. Whether there is such a
/// trouble: within a transaction.
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
    let is_new = |(text, at): &(String, Instant)| *text != trouble || at.elapsed() >= REPEAT_LOG_AFTER;
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

/// Lanes that a cluster's backends have by the tables, and that are not loaded.
fn missing_lanes<'a>(backends: impl Iterator<Item = &'a Backend> + Clone, home: &Home) -> Vec<Backend> {
    let mut missing = Vec::new();
    let with_lanes = |b: &&Backend| b.lane.is_none() && matches!(b.role, Role::Finder | Role::Deleted);
    for finder in backends.clone().filter(with_lanes) {
        let number = finder.number;
        let known: BTreeSet<u16> = backends
            .clone()
            .filter_map(|b| b.lane.filter(|_| b.number == number))
            .collect();
        let saved = cursors::lanes(number);
        for hash_slot in saved.iter().filter(|slot| !known.contains(slot)) {
            let (role, row) = (finder.role_of_lanes(), finder.row.clone());
            missing.push(Backend::load(number, Some(*hash_slot), role, row, home));
        }
        if !finder.is_finder() {
            continue;
        }
        // Events that wait as refused since before the backend was a cluster's: the finder has come past them.
        let waiting = refused::refused_streams(number, &finder.stream).into_iter();
        let waiting: BTreeSet<u16> = waiting.map(|(stream, _)| hash_slot_of(stream.as_bytes())).collect();
        for hash_slot in waiting {
            if !known.contains(&hash_slot) && !saved.contains(&hash_slot) {
                let mut lane = finder.new_lane(hash_slot, finder.delivery.acked().clone(), home);
                lane.save_new();
                missing.push(lane);
            }
        }
    }
    missing
}

/// Transactions that may run at once in this server.
fn running_at_most() -> usize {
    // SAFETY: set when the server started.
    let (sessions, prepared) = unsafe { (pg_sys::MaxBackends, unguarded::max_prepared_xacts) };
    sessions.max(0) as usize + prepared.max(0) as usize
}
