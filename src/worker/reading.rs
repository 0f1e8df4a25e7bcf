//! Reading: takes ticks, decides what may be sent of them, and scans for the backends that can take rows.

use crate::server::clock;
use crate::server::guc::{self, SendAfter};
use crate::server::process::{self, Aborted};
use crate::tables::care;
use crate::tables::catalog;
use crate::tables::events;
use crate::tables::events::EventsTable;
use crate::tables::ticks;
use crate::worker::backend::Backend;
use crate::worker::found::Found;
use crate::worker::pass::{self, Outcome};
use crate::worker::state::AwaitedTick;
use crate::worker::state::Generation;
use crate::worker::state::Loaded;
use crate::worker::state::Worker;
use crate::worker::task::Task;
use pgrx::pg_sys;
use relay::fault::{self, Mutation, Point};
use relay::reading::role::Role;
use relay::reading::schedule::{self, Group, Reader, Schedule, Supply, Way, Wish};
use relay::reading::snapshot::Tick;
use relay::time::Now;
use std::sync::Arc;
use std::time::Duration;

/// How soon to check whether standbys have flushed, and how much later at most for each further check.
const STANDBY_LOOK: Duration = Duration::from_millis(1);
const STANDBY_LONGEST_LOOK: Duration = Duration::from_millis(100);

/// If settings cannot be loaded, reading waits this long for them, and then goes on with those that were last loaded.
const STALE_READING: Duration = Duration::from_millis(500);

/// For this long after a commit, more commits are expected.
const PUBLISHING_TIME: Duration = Duration::from_secs(1);

/// For how long passes that find nothing may follow each other before other work is done.
const PASSING_TIME: Duration = Duration::from_millis(5);

impl Worker {
    /// Reads for each group of backends that stand at one place and can take rows. True: there is more to read now.
    pub(super) fn read(&mut self, now: Now) -> bool {
        self.work |= self.slot.has_work();
        self.look_at_standbys(now);
        // This poll can find nothing new.
        if self.polled && !self.slot.has_work() && !ticks::is_outdated(&self.latest) {
            (self.work, self.polled) = (false, false);
            self.commits.is_quiet(clock::wall_us());
        }
        self.tick_if_due(now);
        // Events that the tick sees may have been published for backends as they are now.
        let mut changed = false;
        if self.must_load(now) {
            match self.load_now(now) {
                Some(Loaded::Idle) => return true,
                Some(loaded) => {
                    changed = loaded == Loaded::Changed;
                    // Rows may have come while triggers were disabled.
                    self.mend(now);
                }
                // Another session has locked the table of backends.
                None if self.stale_since.is_some_and(|since| now < since + STALE_READING) => return false,
                None => {}
            }
        }
        self.grant(now);
        self.read_in_groups(now);
        self.add_lanes(now);
        let is_more = changed || self.schedule(now).reading().next().is_some();
        let is_all_read = self.awaited.is_none();
        for index in 0..self.backends.len() {
            let is_paced = self.backends[index].delivery.is_paced();
            let leads_on = self.way(index).leads_on();
            let waits = leads_on && (is_paced || self.is_ready(&self.backends[index], now));
            let backend = &mut self.backends[index];
            // A backend that is paused or cannot read now still has rows to read.
            let is_all_read = is_all_read && !leads_on && !backend.waits_to_compare();
            if !waits && backend.reads_for_redis() && backend.delivery.rest(is_all_read) {
                backend.note_recovery(now);
            }
        }
        is_more
    }

    /// Scans once for each group of backends that can read now. A scan moves its readers; a backend that waited for
    /// them reads in the next round.
    fn read_in_groups(&mut self, now: Now) {
        let mut waiting: Vec<usize> = self.schedule(now).reading().collect();
        while let Some(group) = Group::take(&mut waiting, |index| self.way(index)) {
            match self.read_group(&group, now) {
                Ok(has_found) => {
                    // Among many rows of other backends, its own next row is only sent when all of them are passed.
                    if !has_found && self.now() < now + PASSING_TIME {
                        let schedule = self.schedule(now);
                        let sends = |index: &usize| self.backends[*index].reads_for_redis();
                        let on_their_way = group.members.iter().copied();
                        waiting.extend(on_their_way.filter(|index| sends(index) && schedule.reads(*index)));
                    }
                }
                Err(error) if !self.read_apart(&group, &error, now) => break,
                Err(_) => {}
            }
        }
    }

    /// Takes a tick if there may be something new for a backend.
    pub(super) fn tick_if_due(&mut self, now: Now) {
        self.work |= self.slot.has_work();
        // While all backends are down, publishers find the flag raised and do not wake the worker.
        let is_due = self.work && self.awaited.is_none() && (self.polled || self.is_tick_of_use(now));
        if self.ticked || !is_due || !self.patience.allows(Task::Read, now) {
            return;
        }
        if self.slot.has_work() && !self.pace.is_busy() {
            self.rouse();
        }
        self.ticked = true;
        if self.attempt(Task::Read, now, Self::take_tick).is_none() {
            self.work = true;
        }
    }

    /// Notes how reading for a backend has ended. `lacks_memory`: there was none for its next event. If batches are in
    /// flight, there is more when they are done.
    fn has_read_for(&mut self, index: usize, lacks_memory: bool, now: Now) {
        let backend = &mut self.backends[index];
        let task = Task::ReadFor(backend.whose());
        if !lacks_memory {
            return self.patience.succeeded(task);
        }
        backend.lacks_memory();
        if backend.delivery.is_idle() {
            self.failed(task, &Aborted::out_of_memory(), now);
        }
    }

    /// Called when a pass has failed. If the failure concerns one of its readers, only that reader waits. False: it
    /// concerns all.
    fn read_apart(&mut self, group: &Group, error: &Aborted, now: Now) -> bool {
        if error.lacks_memory() {
            let members = group.members.iter();
            members.for_each(|index| self.backends[*index].lacks_memory());
        }
        if !process::transaction(events::can_read).unwrap_or(false) {
            self.failed(Task::Read, error, now);
            return false;
        }
        let fails_for = |index: usize, error: &Aborted, worker: &mut Self| {
            let whose = worker.backends[index].whose();
            worker.failed(Task::ReadFor(whose), error, now);
        };
        if let [index] = group.members.as_slice() {
            fails_for(*index, error, self);
            return true;
        }
        for index in &group.members {
            let Some(alone) = Group::take(&mut vec![*index], |index| self.way(index)) else {
                continue;
            };
            if let Err(error) = self.read_group(&alone, now) {
                fails_for(*index, &error, self);
            }
        }
        true
    }

    /// Something was committed: wakes the sender that sent last, so that it is awake when the event has been read.
    fn rouse(&self) {
        if let Some(index) = self.likely_next() {
            self.backends[index].rouse();
        }
    }

    /// Of the backends that wait for events, the one that sent last.
    fn likely_next(&self) -> Option<usize> {
        let waits = |b: &Backend| b.is_keeping_up() && b.delivery.is_idle() && b.delivery.has_room();
        let waiting = (0..self.backends.len()).filter(|index| waits(&self.backends[*index]));
        waiting.max_by_key(|index| self.backends[*index].moved_at())
    }

    /// Called when an event is being published after a while without any. The code and data that will be needed after
    /// its commit may have left the processor's caches. So the worker fetches them now, by doing the same work with the
    /// event that was read last and dropping the result.
    pub(super) fn rehearse(&mut self) -> Result<(), Aborted> {
        if !self.slot.take_publishing() || self.slot.has_work() {
            return Ok(());
        }
        let Some(index) = self.likely_next() else {
            return Ok(());
        };
        let (backend, seq) = (&mut self.backends[index], self.latest.high_seq);
        let rehearsed = process::transaction(|| {
            // Not while another session has locked the table, which may be the one that publishes.
            if let Some(relations) = catalog::relations().filter(EventsTable::is_open_to_all) {
                ticks::take(&relations);
                pass::rehearse(backend, &relations, seq);
            }
        });
        match rehearsed {
            // An event that cannot be read has failed and cannot serve for the rehearsal.
            Err(error) if care::is_of_a_row(error.code) => Ok(()),
            rehearsed => rehearsed,
        }
    }

    pub(super) fn way(&self, index: usize) -> Way<'_> {
        let backend = &self.backends[index];
        Way {
            position: backend.delivery.position(),
            goal: backend.goal(&self.latest),
            role: backend.role(),
        }
    }

    /// Whether rows can be read for a backend now.
    fn is_ready(&self, backend: &Backend, now: Now) -> bool {
        let may_fail = || self.fails_at.is_none();
        backend.is_ready(now)
            && (!backend.role().fails_its_rows() || may_fail())
            && self.patience.allows(Task::Read, now)
            && self.patience.allows(Task::ReadFor(backend.whose()), now)
    }

    /// What the schedule has to know about a backend; `None`: it has nothing to read.
    fn reader(&self, index: usize, now: Now) -> Option<Reader<'_>> {
        let way = self.way(index);
        let backend = &self.backends[index];
        way.leads_on().then(|| Reader {
            index,
            way,
            is_ready: self.is_ready(backend, now),
            // Nobody waits for a backend that keeps to a pace.
            is_well: self.is_well(backend) && backend.max_rate().is_none(),
            supply: match way.role {
                Role::Redis => backend.delivery.supply(),
                Role::Finder | Role::Deleted | Role::Strays => Supply::Low,
            },
        })
    }

    fn is_well(&self, backend: &Backend) -> bool {
        backend.is_keeping_up() && self.patience.retry_at(Task::ReadFor(backend.whose())).is_none()
    }

    fn schedule(&self, now: Now) -> Schedule<'_> {
        Schedule::of((0..self.backends.len()).filter_map(|index| self.reader(index, now)))
    }

    /// Whether no healthy backend waits for room.
    pub(super) fn has_read_all(&self) -> bool {
        let is_behind = |index: usize| {
            let backend = &self.backends[index];
            self.way(index).leads_on() && self.is_well(backend) && !backend.delivery.is_paced()
        };
        !(0..self.backends.len()).any(is_behind)
    }

    /// Whether some backend can use a new tick now.
    fn is_tick_of_use(&self, now: Now) -> bool {
        schedule::is_tick_of_use(self.backends.iter().map(|b| Wish {
            number: b.number,
            role: b.role(),
            is_lane: b.lane().is_some(),
            wants_tick: b.wants_tick(now),
        }))
    }

    /// Whether sessions are publishing, besides what the worker itself does.
    pub(super) fn is_beside_others(&self) -> bool {
        self.published_at.is_some_and(|at| self.now() < at + PUBLISHING_TIME)
    }

    /// Takes a tick if anything has happened since the last one, and makes what it sees durable.
    pub(super) fn take_tick(&mut self) -> Result<(), Aborted> {
        fault::reach(Point::BeforeTick);
        let committed_at_us = self.slot.take_work();
        self.commits.looks(committed_at_us, clock::wall_us());
        self.pace.looks(self.now());
        if committed_at_us.is_some() {
            self.published_at = Some(self.now());
        }
        (self.work, self.polled) = (false, false);
        let tick = process::transaction(|| {
            let relations = catalog::relations()?;
            let early = fault::is_mutated(Mutation::FlushBeforeSnapshot).then(ticks::flush);
            fault::reach(Point::BeforeSnapshot);
            let taken = ticks::take(&relations);
            let wal = match early {
                Some(wal) => wal,
                None if fault::is_mutated(Mutation::SkipFlush) => 0,
                None => ticks::flush_seen(&taken, &self.latest.snapshot),
            };
            fault::reach(Point::AfterFlush);
            // A transaction is seen before its invalidations are sent, and keeps its locks until they are.
            let is_settled = catalog::is_settled(&relations);
            // SAFETY: within a transaction.
            unsafe { pg_sys::AcceptInvalidationMessages() };
            Some((taken.0, wal, catalog::generation(), is_settled))
        })?;
        match tick {
            Some((tick, wal, generation, is_settled)) => {
                self.use_tick(tick, wal);
                match self.generation == Generation::Loaded(generation) {
                    true if is_settled => self.mending.is_clean_at(&self.latest),
                    true => {}
                    false => self.generation = Generation::Stale,
                }
            }
            // The extension was dropped; the next round notices it.
            None => self.generation = Generation::Stale,
        }
        Ok(())
    }

    /// What a tick sees may be sent, at once or when the standbys have it.
    fn use_tick(&mut self, tick: Tick, wal: u64) {
        if guc::SEND_AFTER.get() == SendAfter::StandbyFlush && !ticks::standbys_have(wal) {
            let look_at = self.now() + STANDBY_LOOK;
            self.awaited = Some(AwaitedTick {
                tick,
                wal,
                look_at,
                pause: STANDBY_LOOK,
            });
            return;
        }
        self.flushed = self.flushed.max(wal);
        let is_same = tick == *self.latest;
        self.commits.follow(&self.latest, is_same);
        if !is_same {
            self.latest = Arc::new(tick);
        }
    }

    /// Checks whether the standbys have what is awaited. Until then no other tick is taken.
    fn look_at_standbys(&mut self, now: Now) {
        let Some(mut awaited) = self.awaited.take() else {
            return;
        };
        let waits = guc::SEND_AFTER.get() == SendAfter::StandbyFlush && !ticks::standbys_have(awaited.wal);
        if !waits {
            self.flushed = self.flushed.max(awaited.wal);
            self.commits.follow(&self.latest, false);
            self.latest = Arc::new(awaited.tick);
            return;
        }
        if now >= awaited.look_at {
            awaited.pause = (awaited.pause * 2).min(STANDBY_LONGEST_LOOK);
            awaited.look_at = now + awaited.pause;
        }
        self.awaited = Some(awaited);
    }

    /// Makes durable what was written down: the next batch, and so the guard, has a position after it.
    pub(super) fn flush(&mut self) {
        self.flushed = self.flushed.max(ticks::flush());
        self.backends.iter_mut().for_each(|b| b.books.is_unflushed = false);
    }

    /// One scan for a group of backends. Returns whether it found something for one of them.
    fn read_group(&mut self, group: &Group, now: Now) -> Result<bool, Aborted> {
        let began_at = self.now();
        let (backends, slot) = (&mut self.backends, self.slot);
        for index in &group.members {
            let backend = &mut backends[*index];
            backend.metered.committed_after_us = self.commits.after(&backend.delivery.position().from);
            backend.tell_lsn(self.flushed);
        }
        let sending = backends.iter().filter(|b| b.reads_for_redis()).count();
        // A reader that is alone delays no other.
        let is_wanted = || sending > 1 && slot.has_work();
        let sweep = self.mending.sweep.as_ref();
        let outcomes =
            care::transaction(|| catalog::is_served().then(|| pass::read(backends, group, sweep, &is_wanted)))?;
        let Some(outcomes) = outcomes else {
            self.generation = Generation::Stale;
            return Ok(true);
        };
        let has_found = outcomes.iter().any(|o| o.has_found);
        for outcome in outcomes.iter().filter(|o| o.wrote) {
            let backend = &mut self.backends[outcome.reader.index];
            backend.books.is_unflushed = true;
            if backend.role().fails_its_rows() {
                self.failing.begins(began_at);
            }
        }
        // A pass that only writes events down as waiting need not wait for the disk.
        let tells = |o: &Outcome| !o.reader.built.is_empty() && self.backends[o.reader.index].books.is_unflushed;
        if outcomes.iter().any(tells) {
            self.flush();
        }
        for Outcome { reader, failed, .. } in outcomes {
            let backend = &mut self.backends[reader.index];
            backend.failed(failed);
            backend.skipped(&reader.skipped, now);
            let sent: usize = reader.built.iter().map(|b| b.batch.entries.len()).sum();
            backend.send(reader.built, self.flushed);
            if let (Some(stream), Some(readership)) = (reader.full, backend.delivery.readership_mut()) {
                readership.fills_up(stream);
            }
            if reader.awaits_sweep {
                backend.rests_until = self.mending.sweep_at;
            } else if backend.role() == Role::Strays && reader.is_stopped {
                backend.rests_until = now + guc::millis(&guc::POLL_INTERVAL_MS);
            }
            let end = reader.end.clone();
            backend.advanced(reader.end, now);
            self.has_read_for(reader.index, reader.lacks_memory, now);
            let backend = &mut self.backends[reader.index];
            self.pace.finds(sent);
            if sent > 0 {
                let activity = format!("sending {sent} events to {}", backend.name());
                process::show_activity(&activity);
                process::debug(|| format!("sent {sent} events to backend \"{}\"", backend.name()));
            }
            match reader.found {
                Some(hash_slot) => self.found.push(Found {
                    finder: reader.index,
                    hash_slot,
                    at: end,
                }),
                None if backend.is_finder() => backend.goes_on(now),
                None => {}
            }
        }
        Ok(has_found)
    }
}
