//! Reading: ticks, what may be sent of them, and scans for the backends that can take rows.

use crate::server::guc::{self, SendAfter};
use crate::server::process::{self, Aborted};
use crate::tables::care;
use crate::tables::catalog;
use crate::tables::events;
use crate::tables::events::EventsTable;
use crate::tables::ticks;
use crate::worker::backend::{Backend, MOST_LANES, Role};
use crate::worker::pass::{self, Group};
use crate::worker::state::Awaited;
use crate::worker::state::Loaded;
use crate::worker::state::Worker;
use crate::worker::task::Task;
use pgrx::pg_sys;
use relay::fault::{self, Mutation, Point};
use relay::reading::range::Position;
use relay::reading::snapshot::{FIRST_NORMAL_XID, Tick};
use relay::time::Now;
use std::sync::Arc;
use std::time::Duration;

/// How soon it is looked whether standbys have flushed, and at most how much later each time.
const STANDBY_LOOK: Duration = Duration::from_millis(1);
const STANDBY_LONGEST_LOOK: Duration = Duration::from_millis(100);

/// Settings that may be old count for so long, and then what was known goes on to count, while they cannot be loaded.
const STALE_READING: Duration = Duration::from_millis(500);

/// While a lane cannot be made.
const LANE_PAUSE: Duration = Duration::from_millis(100);

/// Backends that are further behind are not waited for.
const WAITED_FOR_SEQS: i64 = 100_000;

/// How long passes follow each other that find nothing, before the others are looked at again.
const PASSING_TIME: Duration = Duration::from_millis(5);

impl Worker {
    /// Reads for every group of backends that stand at one place and can take rows. True: there is more to read now.
    pub(super) fn read(&mut self, now: Now) -> bool {
        self.work |= self.slot.has_work();
        self.look_at_standbys(now);
        // A poll that can find nothing.
        if self.polled && !self.slot.has_work() && !ticks::is_outdated(&self.latest) {
            (self.work, self.polled) = (false, false);
        }
        self.tick_if_due(now);
        // What the tick sees may have been published for backends as they are now.
        let mut changed = false;
        if self.must_load(now) {
            match self.load_now(now) {
                Some(Loaded::Idle) => return true,
                Some(loaded) => {
                    changed = loaded == Loaded::Changed;
                    // Rows may have come while triggers were off.
                    self.mend(now);
                }
                // Somebody has the table of backends to himself.
                None if self.stale_since.is_some_and(|since| now < since + STALE_READING) => return false,
                None => {}
            }
        }
        // A pass moves its readers, and who waited for them then waits no more: that is for the next round.
        let mut waiting: Vec<usize> = (0..self.backends.len()).filter(|i| self.reads_now(*i, now)).collect();
        while !waiting.is_empty() {
            let group = Group::take(&self.backends, &mut waiting, &self.latest);
            match self.read_group(&group, now) {
                Ok(has_found) => {
                    group.members.iter().for_each(|index| self.has_read_for(*index));
                    // Among many rows of others: none of its own is sent before it has come through.
                    if !has_found && self.now() < now + PASSING_TIME {
                        let is_on_its_way =
                            |index: &usize| self.backends[*index].reads_for_redis() && self.reads_now(*index, now);
                        waiting.extend(group.members.iter().copied().filter(is_on_its_way));
                    }
                }
                Err(error) if !self.read_apart(&group, &error, now) => break,
                Err(_) => {}
            }
        }
        let mut more = changed;
        let is_all_read = self.awaited.is_none();
        for index in 0..self.backends.len() {
            let (waits, reads) = (self.waits(index, now), self.reads_now(index, now));
            let backend = &mut self.backends[index];
            more |= reads;
            let is_all_read = is_all_read && !backend.is_held();
            if !waits && backend.reads_for_redis() && backend.delivery.rest(is_all_read) {
                backend.note_recovery(now);
            }
        }
        more
    }

    /// Takes a tick if there may be something new for somebody.
    pub(super) fn tick_if_due(&mut self, now: Now) {
        self.work |= self.slot.has_work();
        // While all are down, publishers find the flag raised and wake nobody.
        let is_due = self.work && self.awaited.is_none() && (self.polled || self.is_any_ready(now));
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

    fn has_read_for(&mut self, index: usize) {
        self.patience.succeeded(Task::ReadFor(self.backends[index].whose()));
    }

    /// A pass has failed. If that concerns one of its readers, only that one waits. False: it concerns all.
    fn read_apart(&mut self, group: &Group, error: &Aborted, now: Now) -> bool {
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
            let alone = Group::take(&self.backends, &mut vec![*index], &self.latest);
            match self.read_group(&alone, now) {
                Ok(_) => self.has_read_for(*index),
                Err(error) => fails_for(*index, &error, self),
            }
        }
        true
    }

    /// Something was committed: whoever sent last is awake when it has been read.
    fn rouse(&self) {
        if let Some(index) = self.likely_next() {
            self.backends[index].rouse();
        }
    }

    /// Of the backends that wait for events, that which sent last.
    fn likely_next(&self) -> Option<usize> {
        let waits = |b: &Backend| b.is_keeping_up() && b.delivery.is_idle() && b.delivery.has_room();
        let waiting = (0..self.backends.len()).filter(|index| waits(&self.backends[*index]));
        waiting.max_by_key(|index| self.backends[*index].moved_at())
    }

    /// An event is being published, after a while without any. What is needed once it is committed has left the processor's caches by
    /// then, and is fetched now: by doing the same with the event that was read last, for nothing.
    pub(super) fn rehearse(&mut self) -> Result<(), Aborted> {
        if !self.slot.take_publishing() || self.slot.has_work() {
            return Ok(());
        }
        let Some(index) = self.likely_next() else {
            return Ok(());
        };
        let (backend, seq) = (&mut self.backends[index], self.latest.high_seq);
        let rehearsed = process::transaction(|| {
            // Not if somebody has the table to himself, such as whoever publishes.
            if let Some(relations) = catalog::relations().filter(EventsTable::is_open_to_all) {
                ticks::take(&relations);
                pass::rehearse(backend, &relations, seq);
            }
        });
        match rehearsed {
            // One that cannot be read has failed, and is nothing to rehearse with.
            Err(error) if care::is_of_a_row(error.code) => Ok(()),
            rehearsed => rehearsed,
        }
    }

    /// Whether a backend can take rows now, and there may be some.
    fn waits(&self, index: usize, now: Now) -> bool {
        let backend = &self.backends[index];
        self.has_way_to_go(index)
            && backend.is_ready(now)
            && self.patience.allows(Task::Read, now)
            && self.patience.allows(Task::ReadFor(backend.whose()), now)
    }

    fn has_way_to_go(&self, index: usize) -> bool {
        let backend = &self.backends[index];
        let position = backend.delivery.position();
        // Before the first tick there is nowhere to go, and certainly not back.
        let is_ticked = self.latest.next_xid > FIRST_NORMAL_XID;
        let goes_on = is_ticked && !Arc::ptr_eq(&position.from, backend.goal(&self.latest));
        position.under_way.is_some() || goes_on
    }

    /// Whether a backend that is well is on its way, or would be if it had room.
    fn comes_up(&self, index: usize) -> bool {
        let backend = &self.backends[index];
        let is_able = || self.patience.retry_at(Task::ReadFor(backend.whose())).is_none();
        backend.is_keeping_up() && self.has_way_to_go(index) && is_able()
    }

    /// Whether no backend that is well waits for room.
    pub(super) fn has_read_all(&self) -> bool {
        !(0..self.backends.len()).any(|index| self.comes_up(index))
    }

    /// Whether a pass is worth while for a backend: it takes rows, and not just a few of them.
    fn takes(&self, index: usize, now: Now) -> bool {
        let backend = &self.backends[index];
        self.waits(index, now) && (!backend.reads_for_redis() || backend.delivery.is_worth_reading())
    }

    /// Whether a backend is to read now. Who can wait lets those that are behind on the same way come up, so that one scan serves all
    /// again; since its sender has enough to do meanwhile, a slow or hung one holds up nobody.
    fn reads_now(&self, index: usize, now: Now) -> bool {
        if !self.takes(index, now) {
            return false;
        }
        let backend = &self.backends[index];
        // Behind a slow lane, the first event of a hash slot that has none is not to wait.
        if backend.is_finder() || (backend.reads_for_redis() && !backend.delivery.can_wait()) {
            return true;
        }
        let position = backend.delivery.position();
        let holds = |(other, b): (usize, &Backend)| {
            let theirs = b.delivery.position();
            let behind = position.place() - theirs.place();
            other != index
                && self.comes_up(other)
                && Arc::ptr_eq(b.goal(&self.latest), backend.goal(&self.latest))
                && ((1..=WAITED_FOR_SEQS).contains(&behind) || (behind == 0 && !self.takes(other, now)))
        };
        !self.backends.iter().enumerate().any(holds)
    }

    /// Whether there is anybody for whom a tick is of use now: while a cluster has no lane, its finder is.
    fn is_any_ready(&self, now: Now) -> bool {
        let has_lanes = |number: i32| self.backends.iter().any(|b| b.number == number && b.lane.is_some());
        let counts = |b: &Backend| b.reads_for_redis() || (b.is_finder() && !has_lanes(b.number));
        self.backends.iter().any(|b| b.wants_tick(now) && counts(b))
    }

    /// A lane for a hash slot that has none, where its finder stands: saved before that goes on.
    fn add_lane(&mut self, finder: usize, hash_slot: u16, at: Position, now: Now) -> Result<(), Aborted> {
        let number = self.backends[finder].number;
        let lanes = self.backends.iter().filter(|b| b.number == number && b.lane.is_some());
        if lanes.count() >= MOST_LANES {
            let wait = guc::millis(&guc::POLL_INTERVAL_MS);
            self.backends[finder].no_lane_left(hash_slot, wait, now);
            return Ok(());
        }
        let (finder, home) = (&self.backends[finder], &self.home);
        let lane = process::transaction(|| {
            let mut lane = finder.new_lane(hash_slot, at, home);
            lane.save_new();
            lane
        })?;
        self.backends.push(lane);
        Ok(())
    }

    /// Takes a tick if anything has happened since the last, and makes what it sees durable.
    pub(super) fn take_tick(&mut self) -> Result<(), Aborted> {
        fault::reach(Point::BeforeTick);
        self.slot.take_work();
        self.pace.looks(self.now());
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
            // Takes in what was told before anything that the tick sees.
            // SAFETY: within a transaction.
            unsafe { pg_sys::AcceptInvalidationMessages() };
            Some((taken.0, wal, catalog::generation()))
        })?;
        match tick {
            Some((tick, wal, generation)) => {
                self.take_over_tick(tick, wal);
                match generation == self.generation {
                    true => self.mending.is_clean_at(&self.latest),
                    false => self.generation = u64::MAX,
                }
            }
            // The extension was dropped: the next round finds out.
            None => self.generation = u64::MAX,
        }
        Ok(())
    }

    /// What a tick sees may be sent, at once or when the standbys have it.
    fn take_over_tick(&mut self, tick: Tick, wal: u64) {
        if guc::SEND_AFTER.get() == SendAfter::StandbyFlush && !ticks::standbys_have(wal) {
            let look_at = self.now() + STANDBY_LOOK;
            self.awaited = Some(Awaited {
                tick,
                wal,
                look_at,
                pause: STANDBY_LOOK,
            });
            return;
        }
        self.flushed = self.flushed.max(wal);
        if tick != *self.latest {
            self.latest = Arc::new(tick);
        }
    }

    /// Looks whether the standbys have what is waited for; until then no other tick is taken.
    fn look_at_standbys(&mut self, now: Now) {
        let Some(mut awaited) = self.awaited.take() else {
            return;
        };
        let waits = guc::SEND_AFTER.get() == SendAfter::StandbyFlush && !ticks::standbys_have(awaited.wal);
        if !waits {
            self.flushed = self.flushed.max(awaited.wal);
            self.latest = Arc::new(awaited.tick);
            return;
        }
        if now >= awaited.look_at {
            awaited.pause = (awaited.pause * 2).min(STANDBY_LONGEST_LOOK);
            awaited.look_at = now + awaited.pause;
        }
        self.awaited = Some(awaited);
    }

    /// Makes durable what was written down: the next batch lies behind it, also in the guard's words.
    pub(super) fn flush(&mut self) {
        self.flushed = self.flushed.max(ticks::flush());
        self.backends.iter_mut().for_each(|b| b.is_unflushed = false);
    }

    /// One scan for a group of backends. Whether it found something for one of them.
    fn read_group(&mut self, group: &Group, now: Now) -> Result<bool, Aborted> {
        let (backends, events, slot) = (&mut self.backends, self.events, self.slot);
        let sending = backends.iter().filter(|b| b.reads_for_redis()).count();
        // Who is alone waits for nobody.
        let is_wanted = || sending > 1 && slot.has_work();
        // The extension may have been dropped and created again since the backends were loaded: its events are not for those.
        let is_known = || events.is_some() && catalog::relations().map(|relations| relations.events) == events;
        let readers = care::transaction(|| is_known().then(|| pass::read(backends, group, &is_wanted)))?;
        let Some(readers) = readers else {
            self.generation = u64::MAX;
            return Ok(true);
        };
        let has_found = readers.iter().any(pass::Reader::has_found);
        for reader in readers.iter().filter(|r| r.wrote) {
            self.backends[reader.index].is_unflushed = true;
        }
        // Each pass that only parks need not wait for the disk.
        let tells = |r: &pass::Reader| !r.built.is_empty() && self.backends[r.index].is_unflushed;
        if readers.iter().any(tells) {
            self.flush();
        }
        for reader in readers {
            let backend = &mut self.backends[reader.index];
            backend.failed(reader.failed);
            backend.skipped(&reader.skipped, now);
            let sent: usize = reader.built.iter().map(|b| b.batch.entries.len()).sum();
            backend.send(reader.built, self.flushed);
            if matches!(backend.role, Role::Strays) && reader.stopped {
                backend.rests_until = now + guc::millis(&guc::POLL_INTERVAL_MS);
            }
            let end = reader.end.clone();
            backend.advanced(reader.end, now);
            self.pace.finds(sent);
            if sent > 0 {
                let activity = format!("publishing {sent} events to {}", backend.name());
                self.shown_busy = true;
                process::show_activity(Some(&activity));
            }
            match reader.found {
                Some(hash_slot) => {
                    let task = Task::AddLane(self.backends[reader.index].whose());
                    if self
                        .attempt(task, now, |w| w.add_lane(reader.index, hash_slot, end, now))
                        .is_none()
                    {
                        self.backends[reader.index].rests_until = now + LANE_PAUSE;
                    }
                }
                None if backend.is_finder() => backend.goes_on(now),
                None => {}
            }
        }
        Ok(has_found)
    }
}
