//! Applies what loading has found: backends that were changed, created or deleted, and their lanes.

use crate::server::meters;
use crate::server::process::{self, Aborted};
use crate::tables::backends::BackendRow;
use crate::tables::{cursors, refused};
use crate::worker::backend::duty::Duty;
use crate::worker::backend::{Backend, Home, Whose};
use crate::worker::state::{Loaded, REPLIES_AT_CHANGE, Worker};
use pgrx::pg_sys;
use relay::reading::role::Role;
use relay::redis::hash_slot::hash_slot_of;
use relay::time::Now;
use std::collections::BTreeSet;

/// A backend or lane with its present row. `None`: the row was deleted.
type Change = (Whose, Option<BackendRow>);

impl Worker {
    /// Applies changes. `all`: settings that concern every backend have changed.
    pub(super) fn apply_rows(
        &mut self,
        rows: Vec<BackendRow>,
        deleted: Vec<i32>,
        all: bool,
        now: Now,
    ) -> Result<Loaded, Aborted> {
        let changes = self.changes(&rows, all, now);
        let is_known = |number: i32| self.backends.iter().any(|b| b.number == number);
        // SAFETY: a plain read of the process's own variable.
        meters::keep_only(unsafe { pg_sys::MyDatabaseId }, |number| {
            rows.iter().any(|row| row.number == number)
        });
        let mut numbers = rows
            .iter()
            .map(|row| row.number)
            .chain(deleted.iter().copied())
            .chain([0]);
        if changes.is_empty() && numbers.all(is_known) {
            return Ok(Loaded::Same);
        }
        self.finish_changed(&changes, now)?;
        let (backends, home) = (&mut self.backends, &self.home);
        let missing = process::transaction(|| {
            for (whose, row) in changes {
                let backend = backends.iter_mut().find(|b| b.whose() == whose);
                match (backend, row) {
                    (Some(backend), Some(row)) => backend.reconfigure(row, home, now),
                    (Some(backend), None) => backend.delete(),
                    (None, _) => {}
                }
            }
            let mut missing = missing(backends, rows, deleted, home);
            // There may be more backends than meters.
            let all = backends.iter_mut().chain(&mut missing);
            let _ = all.map(|b| b.find_meter(home)).take_while(|found| *found).count();
            missing
        })?;
        self.backends.extend(missing);
        // Rows whose backend was unknown may belong to a backend that is known now.
        self.backends.iter_mut().for_each(|b| b.rests_until = Now::ZERO);
        self.share_positions();
        process::debug(|| {
            let has_row = |b: &&Backend| b.row().is_some() && b.lane().is_none();
            let count = self.backends.iter().filter(has_row).count();
            format!("loaded the settings of {count} backends")
        });
        self.work = true;
        Ok(Loaded::Changed)
    }

    /// The backends that have changed.
    fn changes(&mut self, rows: &[BackendRow], all: bool, now: Now) -> Vec<Change> {
        let mut changes = Vec::new();
        let with_row = |b: &&mut Backend| b.reads_for_redis() || b.is_finder();
        for backend in self.backends.iter_mut().filter(with_row) {
            let row = rows.iter().find(|row| row.number == backend.number).cloned();
            let row = row.map(|row| backend.due_row(row, now));
            if all || backend.row() != row.as_ref() {
                changes.push((backend.whose(), row));
            }
        }
        changes
    }

    /// Waits a moment for replies to senders that are about to end, and saves what is known.
    fn finish_changed(&mut self, changes: &[Change], now: Now) -> Result<(), Aborted> {
        let home = self.home.clone();
        let goes = |b: &Backend| {
            let change = changes.iter().find(|(whose, _)| *whose == b.whose());
            let stays = |row: &Option<BackendRow>| row.as_ref().is_some_and(|row| b.keeps_sender(row, &home));
            change.is_some_and(|(_, row)| !stays(row))
        };
        self.await_replies(REPLIES_AT_CHANGE, |b| goes(b) && b.is_sending());
        // Refused events will be looked up with the new settings, so all known refusals must be in the table.
        self.save_unsaved(now);
        let is_changed = |b: &&Backend| changes.iter().any(|(whose, _)| *whose == b.whose());
        match self
            .backends
            .iter()
            .filter(is_changed)
            .all(|b| b.books.records.is_empty())
        {
            true => Ok(()),
            false => Err(Aborted::because("what was refused could not be written down")),
        }
    }

    /// Gives backends whose saved cursors have equal ticks one shared tick, so that one scan serves them all.
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

/// Backends that are in the tables but not in the worker, including deleted ones, lanes, and the reader of strays.
fn missing(backends: &[Backend], rows: Vec<BackendRow>, deleted: Vec<i32>, home: &Home) -> Vec<Backend> {
    let is_known = |number: i32| backends.iter().any(|b| b.number == number);
    let mut missing: Vec<Backend> = Vec::new();
    let numbers = rows.iter().map(|row| row.number).chain(deleted.iter().copied());
    let numbers: Vec<i32> = numbers.filter(|number| !is_known(*number)).collect();
    let written_down = refused::highest_written_down_of(numbers);
    let load = |number: i32, duty| Backend::load(number, duty, written_down.get(&number).copied().unwrap_or(0));
    for row in rows.into_iter().filter(|row| !is_known(row.number)) {
        let has_lanes = row.options.mode.is_err() && !cursors::lanes(row.number).is_empty();
        missing.push(load(row.number, Duty::of(row, has_lanes, home)));
    }
    for number in deleted.into_iter().filter(|number| !is_known(*number)) {
        missing.push(load(number, Duty::of_deleted(None)));
    }
    if !backends.iter().any(|b| b.role() == Role::Strays) {
        missing.push(load(0, Duty::Strays));
    }
    let lanes = missing_lanes(backends.iter().chain(&missing), home);
    missing.extend(lanes);
    missing
}

/// Lanes of cluster backends that are in the tables but not in the worker.
fn missing_lanes<'a>(backends: impl Iterator<Item = &'a Backend> + Clone, home: &Home) -> Vec<Backend> {
    let mut missing = Vec::new();
    let may_have_lanes = |b: &&Backend| b.lane().is_none() && matches!(b.role(), Role::Finder | Role::Deleted);
    let finders: Vec<&Backend> = backends.clone().filter(may_have_lanes).collect();
    if finders.is_empty() {
        return missing;
    }
    // Many backends may have been deleted, but few of them were a cluster's.
    let with_lanes = cursors::with_lanes();
    let concerned = |b: &&Backend| b.is_finder() || with_lanes.contains(&b.number);
    for finder in finders.into_iter().filter(concerned) {
        let number = finder.number;
        let known: BTreeSet<u16> = backends
            .clone()
            .filter_map(|b| b.lane().filter(|_| b.number == number))
            .collect();
        let saved = cursors::lanes(number);
        let written_down = match saved.iter().all(|slot| known.contains(slot)) {
            true => 0,
            false => refused::highest_written_down(number),
        };
        for hash_slot in saved.iter().filter(|slot| !known.contains(slot)) {
            missing.push(Backend::load(
                number,
                finder.duty.of_lane(*hash_slot, home),
                written_down,
            ));
        }
        if !finder.is_finder() {
            continue;
        }
        // Events that were refused before the backend became a cluster's: the finder has already passed them.
        let waiting = refused::refused_streams(number, finder.stream()).into_iter();
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
