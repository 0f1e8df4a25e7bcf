//! Loading: which backends there are, with which settings, and what has come by a restore.

use super::{REPEAT_LOG_AFTER, SETTLE_AT_CHANGE, Worker, leave_process, save};
use crate::backend::{Backend, Home, Role};
use crate::error::{MEND_SEQUENCE, PublishError};
use crate::guc::LogLevel;
use crate::process::{self, Aborted, log};
use crate::shmem::{self, SlotState};
use crate::{catalog, numbers, outbox, recovery, refused, sequence};
use pgrx::pg_sys;
use relay::delivery::{Mode, Now};
use relay::slot::slot_of;
use relay::snapshot::Tick;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

impl Worker {
    /// Loads backends and settings if they may have changed. False: this database has nothing to serve now.
    pub(super) fn load(&mut self, nudged: bool) -> Result<bool, Aborted> {
        // A nudge may come before the invalidations of the commit that it tells of: they are sent last.
        let (known, changed) = (self.generation, self.settings_changed || nudged);
        let home = self.home.clone();
        let loaded = process::transaction(|| {
            // Takes in invalidations, so that the generation is up to date.
            // SAFETY: within a transaction.
            unsafe { pg_sys::AcceptInvalidationMessages() };
            let relations = catalog::relations();
            let installed = relations.and_then(|_| outbox::installed_version());
            let generation = catalog::generation();
            let rows = (installed.is_some() && (generation != known || changed)).then(|| {
                says_trouble_of_sequence();
                let backends = (outbox::backends(), outbox::deleted_backends());
                (backends, outbox::installation())
            });
            (installed, generation, rows)
        });
        let (installed, generation, rows) = loaded?;
        match installed.as_deref() {
            None => leave_process(self.slot, SlotState::Absent),
            Some(version) if version != env!("CARGO_PKG_VERSION") => {
                if self.slot.state() != SlotState::Mismatched {
                    log(
                        LogLevel::Error,
                        "outbox_relay worker is idle: library and extension have different versions",
                        Some(&format!(
                            "The library has version {}, the extension {version}.",
                            env!("CARGO_PKG_VERSION")
                        )),
                        Some(
                            "Run ALTER EXTENSION outbox_relay UPDATE, or restart the server with the matching library.",
                        ),
                    );
                }
                self.slot.set_state(SlotState::Mismatched);
                shmem::wake_launcher();
                self.backends.clear();
                self.generation = u64::MAX;
                return Ok(false);
            }
            Some(_) if self.slot.state() != SlotState::Running => {
                self.slot.set_state(SlotState::Running);
                // Others may be started.
                shmem::wake_launcher();
                log(
                    LogLevel::Info,
                    &format!("outbox_relay worker started in database \"{}\"", home.name),
                    None,
                    None,
                );
            }
            Some(_) => {}
        }
        if let Some(((rows, deleted), installation)) = rows {
            // SAFETY: a plain read of the process's own variable.
            let database = unsafe { pg_sys::MyDatabaseId }.to_u32();
            let guard_prefix = format!("outbox_relay:guard:{installation}:{database}:");
            if guard_prefix != self.home.guard_prefix {
                // The extension was created anew: its tables have not heard of this run of the server, and begin at the first number.
                (self.home.guard_prefix, self.identity) = (guard_prefix, None);
                self.backends.clear();
                (self.latest, self.awaited) = (Arc::new(Tick::beginning()), None);
                // As at the start: claims wait for a tick, and a tick for somebody who is up.
                self.polled = true;
            }
            let home = self.home.clone();
            let stays = |b: &Backend| {
                rows.iter()
                    .any(|row| row.number == b.number && b.keeps_sender(row, &home))
            };
            self.settle(SETTLE_AT_CHANGE, |b| !stays(b) && b.is_sending());
            // Refused events are looked up by the new settings: those of the old ones must be there.
            let now = self.started.elapsed();
            save(&mut self.backends, now)?;
            let backends = &mut self.backends;
            let reconciled = process::transaction(|| {
                numbers::vouch_anew();
                for backend in backends.iter_mut().filter(|b| b.reads_for_redis() || b.is_finder()) {
                    match rows.iter().find(|r| r.number == backend.number) {
                        Some(row) => backend.reconfigure(row.clone(), &home, now),
                        None => backend.delete(),
                    }
                }
                let mut missing: Vec<Backend> = Vec::new();
                for row in rows {
                    if !backends.iter().any(|b| b.number == row.number) {
                        let role = if row.is_cluster() { Role::Finder } else { Role::Redis };
                        missing.push(Backend::load(row.number, None, role, Some(row), &home));
                    }
                }
                for number in deleted {
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
            self.work = true;
        }
        if generation != self.generation {
            self.mending.look_again();
        }
        (self.generation, self.settings_changed) = (generation, false);
        self.look_at_restores()?;
        Ok(true)
    }

    /// Events of a dump may stand in the streams already: a claim looks for them, with a tick that sees them. Without one, they are sent.
    fn look_at_restores(&mut self) -> Result<(), Aborted> {
        if !self.backends.iter().any(Backend::is_restored) {
            return Ok(());
        }
        for backend in self
            .backends
            .iter_mut()
            .filter(|b| b.delivery.mode() == Mode::AtLeastOnce)
        {
            recovery::give_up_comparing(backend)?;
        }
        self.take_tick()
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
        static SAID: Cell<Option<Instant>> = const { Cell::new(None) };
    }
    let trouble = catalog::relations()
        .map(|relations| relations.sequence)
        .and_then(|sequence| sequence::trouble(sequence).or_else(|| sequence::end_reached(sequence)));
    let Some(trouble) = trouble else {
        SAID.set(None);
        return false;
    };
    if SAID.get().is_none_or(|at| at.elapsed() >= REPEAT_LOG_AFTER) {
        SAID.set(Some(Instant::now()));
        log(
            LogLevel::Warning,
            &PublishError::Sequence(trouble.clone()).to_string(),
            Some(&trouble),
            Some(MEND_SEQUENCE),
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
        let saved = outbox::lanes(number);
        for slot in saved.iter().filter(|slot| !known.contains(slot)) {
            let (role, row) = (finder.role_of_lanes(), finder.row.clone());
            missing.push(Backend::load(number, Some(*slot), role, row, home));
        }
        if !finder.is_finder() {
            continue;
        }
        // Events that wait as refused since before the backend was a cluster's: the finder has come past them.
        let waiting = refused::refused_streams(number, &finder.stream).into_iter();
        let waiting: BTreeSet<u16> = waiting.map(|(stream, _)| slot_of(stream.as_bytes())).collect();
        for slot in waiting {
            if !known.contains(&slot) && !saved.contains(&slot) {
                let mut lane = finder.new_lane(slot, finder.delivery.acked().clone(), home);
                lane.save_new();
                missing.push(lane);
            }
        }
    }
    missing
}
