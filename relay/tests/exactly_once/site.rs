//! A Postgres server and its worker, which does the same as the extension's.

use crate::env::{Env, Mutant, tell};
use crate::lane::{HASH_SLOTS, Lane, hash_slot, seq_of};
use crate::model::database::Database;
use crate::tables::{Saved, Tables};
use relay::delivery::Cursor;
use relay::delivery::former::GivesUp;
use relay::delivery::refusal::Record;
use relay::reading::range::{Key, Position};
use relay::reading::role::Role;
use relay::reading::snapshot::Tick;
use std::collections::BTreeSet;
use std::sync::Arc;

pub(crate) const STREAMS: u8 = 4;

/// What a crash brings back.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) database: Database,
    pub(crate) tables: Tables,
    pub(crate) wal: u64,
}

pub(crate) struct Site {
    pub(crate) place: String,
    /// Its timeline, if it was promoted; 0: it was not.
    pub(crate) promoted_to: u32,
    /// It was started beside the original.
    pub(crate) is_copy: bool,
    pub(crate) database: Database,
    pub(crate) tables: Tables,
    /// Position of the WAL, and up to where it is surely on disk.
    pub(crate) wal: u64,
    pub(crate) flushed: u64,
    /// How it was at the last flush or later.
    pub(crate) image: Option<Box<Image>>,
    /// The newest tick of this life of the worker.
    pub(crate) latest: Option<Arc<Tick>>,
    /// What was delivered some time ago.
    old: Option<Arc<Tick>>,
    /// Its backend; or the finder of a cluster, and behind it the lanes that it has.
    pub(crate) lanes: Vec<Lane>,
}

impl Site {
    pub(crate) fn new(env: &mut Env, place: &str) -> Self {
        let image = Image {
            database: Database::new(&mut env.rng, STREAMS),
            tables: Tables::new(),
            wal: 1,
        };
        Self::of(env, place, image)
    }

    /// A server that finds this on its disk.
    pub(crate) fn of(env: &mut Env, place: &str, image: Image) -> Self {
        let Image {
            mut database,
            mut tables,
            wal,
        } = image;
        database.crash();
        env.incarnations += 1;
        tables.incarnations.push((format!("run-{}", env.incarnations), wal));
        Self {
            place: place.to_owned(),
            promoted_to: 0,
            is_copy: false,
            lanes: Lane::load_all(env, &tables),
            database,
            tables,
            wal: wal + 1,
            flushed: wal + 1,
            image: None,
            latest: None,
            old: None,
        }
    }

    pub(crate) fn image(&self) -> Image {
        Image {
            database: self.database.clone(),
            tables: self.tables.clone(),
            wal: self.wal,
        }
    }

    // --- durability

    /// What has happened so far is on disk.
    pub(crate) fn flush(&mut self, env: &mut Env) {
        self.flushed = self.wal;
        let may_crash = env.likely(env.faults.server_crashes);
        self.image = may_crash.then(|| Box::new(self.image()));
        if env.faults.promotions > 0.0 && !self.is_copy && env.likely(0.1) {
            env.standby = Some(Box::new(self.image()));
        }
    }

    /// The server dies and comes back with what was on disk.
    pub(crate) fn crash_server(&mut self, env: &mut Env) {
        self.drop_connections(env);
        let now = self.image();
        let image = match self.image.take() {
            Some(image) if env.rng.bool() => *image,
            _ => now,
        };
        env.seen.lost_commits += u32::from(image.wal < self.wal);
        env.seen.server_crashes += 1;
        tell!(env, "the server crashes, and is back at {} of {}", image.wal, self.wal);
        let (place, promoted_to) = (std::mem::take(&mut self.place), self.promoted_to);
        *self = Self::of(env, &place, image);
        self.promoted_to = promoted_to;
    }

    /// The worker dies and comes back.
    pub(crate) fn crash_worker(&mut self, env: &mut Env) {
        tell!(env, "the worker crashes");
        env.seen.crashes += 1;
        self.drop_connections(env);
        self.lanes = Lane::load_all(env, &self.tables);
        self.latest = None;
    }

    pub(crate) fn drop_connections(&mut self, env: &mut Env) {
        (0..self.lanes.len()).for_each(|at| self.drop_connection(env, at));
    }

    /// Saves the refusals of a lane and its position.
    pub(crate) fn save(&mut self, env: &mut Env, at: usize) {
        for record in std::mem::take(&mut self.lanes[at].pending) {
            self.record(env, at, record);
        }
        let lane = &self.lanes[at];
        let position = match env.mutant {
            Mutant::SavesAhead => lane.delivery.position(),
            _ => lane.delivery.acked(),
        };
        let cursor = Cursor {
            position: position.clone(),
            number: lane.delivery.number(),
        };
        let saved = Saved::at(Position::beginning());
        self.tables.saved.entry(lane.slot).or_insert(saved).cursor = cursor;
        self.wal += 1;
    }

    pub(crate) fn save_all(&mut self, env: &mut Env) {
        (0..self.lanes.len()).for_each(|at| self.save(env, at));
    }

    fn record(&mut self, env: &mut Env, at: usize, record: Record) {
        tell!(env, "  {record:?}");
        match &record {
            Record::Park { .. } => env.seen.parked += 1,
            Record::Fail { .. } => env.seen.failed += 1,
            Record::Accepted { .. } => env.seen.accepted_after_waiting += 1,
            Record::RefusedAgain { .. } => {}
        }
        let stream = self.database.row(seq_of(&record)).stream;
        self.tables
            .record(stream, record, self.lanes[at].delivery.accepted_in());
        self.wal += 1;
    }

    /// Deletes events that the whole backend has delivered some time ago.
    pub(crate) fn purge(&mut self, env: &mut Env) {
        if self.tables.waiting().next().is_some() {
            return;
        }
        if let Some(old) = &self.old {
            let is_old = |key: &Key| old.snapshot.sees(key.xid) && !self.database.is_purged(key.seq);
            let rows: Vec<i64> = self.database.rows().filter(is_old).map(|key| key.seq).collect();
            let retired = rows.into_iter().filter(|seq| self.database.is_committed(*seq));
            let retired: BTreeSet<i64> = retired.collect();
            tell!(env, "purge {retired:?}");
            env.seen.purged += retired.len() as u32;
            self.database.purge(|key| retired.contains(&key.seq));
            env.retired.extend(retired);
        }
        let counts = |slot: &Option<u16>| env.mutant != Mutant::PurgesWithoutLanes || slot.is_none();
        let saved = self.tables.saved.iter().filter(|(slot, _)| counts(slot));
        let delivered = saved.map(|(_, saved)| saved.cursor.position.from.clone());
        self.old = delivered.reduce(|lowest, tick| match tick.snapshot.includes(&lowest.snapshot) {
            true => lowest,
            false => tick,
        });
        self.wal += 1;
    }

    // --- the worker

    pub(crate) fn take_tick(&mut self, env: &mut Env) {
        let tick = self.database.tick(&mut env.rng);
        self.wal += 1;
        if env.mutant != Mutant::SkipsFlush {
            self.flush(env);
        }
        let before: Vec<usize> = (0..self.lanes.len()).map(|at| self.restores_seen(at)).collect();
        self.latest = Some(Arc::new(tick));
        for (at, before) in before.into_iter().enumerate() {
            let is_news = self.restores_seen(at) > before && self.lanes[at].connection.is_some();
            if is_news && env.mutant != Mutant::SendsRestored {
                tell!(env, "events of a dump have come");
                self.let_go(env, at);
            }
        }
    }

    /// Restores that are visible to the newest tick, and whose events a lane has not all looked for.
    pub(crate) fn restores_seen(&self, at: usize) -> usize {
        let seen = |xid: &u64| self.latest.as_ref().is_some_and(|tick| tick.snapshot.sees(*xid));
        let is_due = |xid: &&u64| seen(xid) && !self.lanes[at].compared.contains(xid);
        self.tables.restores.iter().filter(is_due).count()
    }

    // --- its lanes

    /// `outbox.take_over()` is called. The finder's request stays until all lanes have done it.
    pub(crate) fn ask_to_take_over(&mut self) {
        self.lanes.iter_mut().for_each(|lane| lane.take_over = true);
    }

    /// The lane that sends the events of a stream, if there is one.
    pub(crate) fn lane_of(&self, stream: u8) -> Option<&Lane> {
        self.lanes
            .iter()
            .find(|lane| lane.role == Role::Redis && lane.serves(stream))
    }

    /// The lanes that are connected to a master.
    pub(crate) fn at_master(&self, master: usize) -> Option<&Lane> {
        let mut sending = self.lanes.iter().filter(|lane| lane.role == Role::Redis);
        sending.find(|lane| lane.master() == master)
    }

    /// The events of a dump have been looked for once all lanes have done so and the finder has passed them: so no lane
    /// can be created for them later.
    pub(crate) fn finish_lanes(&mut self, env: &mut Env) -> bool {
        let Some(latest) = self.latest.clone().filter(|_| env.is_cluster) else {
            return false;
        };
        self.lanes[0].take_over &= self.lanes[1..].iter().any(|lane| lane.take_over);
        let finder = self.lanes[0].delivery.acked();
        let has_found_all = Arc::ptr_eq(&finder.from, &latest) && finder.under_way.is_none();
        let is_any_due = (1..self.lanes.len()).any(|at| self.restores_seen(at) > 0);
        if !has_found_all || is_any_due || self.restores_seen(0) == 0 {
            return false;
        }
        let tables = &mut self.tables;
        for xid in tables.restores.extract_if(.., |xid| latest.snapshot.sees(*xid)) {
            tables.last_restore = tables.last_restore.max(xid);
            env.seen.restores += 1;
        }
        self.wal += 1;
        true
    }

    /// Creates a lane for a hash slot that has none, at its finder's position: it is saved before the finder continues.
    pub(crate) fn add_lane(&mut self, env: &mut Env, slot: u16, at: Position) {
        if env.likely(env.faults.aborts) {
            return;
        }
        let former = match self.lanes.len() > env.most_lanes {
            true => self.least_needed(env),
            false => None,
        };
        if self.lanes.len() > env.most_lanes && former.is_none() {
            return;
        }
        let at = match env.mutant {
            Mutant::LaneBeginsAtNewest => Position::at(self.latest.clone().expect("somebody reads to it")),
            _ => at,
        };
        tell!(env, "a lane for {slot}, at {at}");
        env.seen.lanes += 1;
        let saved = match self.tables.former.remove(&slot) {
            None => Saved::at(at),
            Some(former) => {
                env.seen.lanes_again += 1;
                let position = match env.mutant {
                    Mutant::FormerLaneBeginsAtFinder => at,
                    _ => former.cursor.position.goes_on_from(at),
                };
                let number = former.cursor.number;
                let cursor = Cursor { position, number };
                Saved { cursor, ..former }
            }
        };
        let mut lane = Lane::new(env, &self.tables, Some(slot), &saved);
        lane.delivery.begins_where(&self.lanes[0].delivery);
        lane.take_over = self.lanes[0].take_over;
        lane.is_new = true;
        match former {
            None => self.lanes.push(lane),
            Some(former) => {
                self.give_up(env, former);
                self.lanes[former] = lane;
            }
        }
        if env.mutant != Mutant::LaneIsNotSaved {
            self.tables.saved.insert(Some(slot), saved);
        }
        self.wal += 1;
    }
}

impl Site {
    /// A lane that can be given up.
    fn least_needed(&self, env: &mut Env) -> Option<usize> {
        let finder = self.lanes[0].delivery.acked();
        let can_be = |at: &usize| {
            let lane = &self.lanes[*at];
            let is_done = lane.delivery.gives_up(finder) == GivesUp::Now || env.mutant == Mutant::GivesUpAnyLane;
            is_done && lane.pending.is_empty() && self.restores_seen(*at) == 0 && !lane.take_over
        };
        let all: Vec<usize> = (1..self.lanes.len()).filter(can_be).collect();
        (!all.is_empty()).then(|| all[env.rng.usize(..all.len())])
    }

    fn give_up(&mut self, env: &mut Env, at: usize) {
        env.seen.lanes_given_up += 1;
        self.drop_connection(env, at);
        self.save(env, at);
        let slot = self.lanes[at].slot.expect("a finder stays");
        let saved = self.tables.saved.remove(&Some(slot)).expect("it is saved");
        tell!(env, "lane {slot} is given up at {}", saved.cursor.position);
        self.tables.former.insert(slot, saved);
    }

    /// Events come for all lanes that were given up.
    pub(crate) fn restore_former(&mut self, env: &mut Env) {
        env.most_lanes = HASH_SLOTS;
        let slots: Vec<u16> = self.tables.former.keys().copied().collect();
        let finder = self.lanes[0].delivery.acked().clone();
        slots
            .into_iter()
            .for_each(|slot| self.add_lane(env, slot, finder.clone()));
    }
}

impl Tables {
    /// Whether an event of a stream was delivered, as far as is saved.
    pub(crate) fn has_passed(&self, env: &Env, stream: u8, key: Key) -> bool {
        let slot = env.is_cluster.then(|| hash_slot(stream));
        let passed = |saved: Option<&Saved>| saved.is_some_and(|saved| saved.cursor.position.covers(key));
        match slot.and_then(|slot| self.former.get(&slot)) {
            Some(former) => passed(Some(former)) || passed(self.saved.get(&None)),
            None => passed(self.saved.get(&slot)),
        }
    }

    /// Whether the events of a stream have a lane, or had one.
    pub(crate) fn has_lane(&self, stream: u8) -> bool {
        let slot = hash_slot(stream);
        self.saved.contains_key(&Some(slot)) || self.former.contains_key(&slot)
    }
}
