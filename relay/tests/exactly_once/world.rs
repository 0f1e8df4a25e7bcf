//! The schedule: what happens when, and to which server.

use crate::env::{Env, Mutant, Seen, tell};
use crate::lane::Lane;
use crate::model::redis::{Data, Redis, Trouble};
use crate::recovery::INTERVAL;
use crate::site::{STREAMS, Site};
use relay::delivery::State;
use relay::failure::Failure;
use relay::guard::claim::OnMissing;
use relay::guard::epoch::epoch_of;
use relay::reading::range::Key;
use relay::reading::role::Role;
use std::collections::BTreeSet;

/// The state of the server whose standby was promoted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Over,
    /// It may come back.
    Frozen,
    GoesOn,
}

pub(crate) struct World {
    pub(crate) env: Env,
    pub(crate) site: Site,
    /// The server whose history differs from that of `site`.
    pub(crate) former: Option<Site>,
    /// A copy of a server, which is never taken over.
    pub(crate) clone: Option<Site>,
    /// Numbers of the events that a dump has.
    dump: Vec<i64>,
    /// Transactions that had not committed at the promotion: both servers may commit them.
    pub(crate) open: BTreeSet<u64>,
    life: Life,
}

impl World {
    pub(crate) fn new(seed: u64, mutant: Mutant) -> Self {
        Self::of(Env::new(seed, mutant, None))
    }

    /// A backend of a cluster.
    pub(crate) fn cluster(seed: u64, mutant: Mutant) -> Self {
        Self::of(Env::new(seed, mutant, Some(true)))
    }

    fn of(mut env: Env) -> Self {
        let site = Site::new(&mut env, "here");
        Self {
            env,
            site,
            former: None,
            clone: None,
            dump: Vec::new(),
            open: BTreeSet::new(),
            life: Life::GoesOn,
        }
    }

    pub(crate) fn run(&mut self) -> Result<Seen, String> {
        self.schedule().map_err(|e| format!("{e}\n{:?}", self.env.faults))?;
        for redis in &self.env.redis {
            self.env.seen.nils += redis.nils;
            self.env.seen.entries += redis.data.streams.values().map(|s| s.len() as u32).sum::<u32>();
        }
        Ok(self.env.seen)
    }

    fn schedule(&mut self) -> Result<(), String> {
        for _ in 0..self.env.rng.usize(20..500) {
            self.random_step()?;
            self.check_owners()?;
        }
        self.finish()?;
        self.check_end()
    }

    /// Nobody except the owner has appended.
    fn check_owners(&mut self) -> Result<(), String> {
        let mut violations = self.env.redis.iter_mut().filter_map(|redis| redis.violation.take());
        violations.next().map_or(Ok(()), Err)
    }

    fn random_step(&mut self) -> Result<(), String> {
        if self.clone.is_some() && self.env.likely(0.1) {
            self.clone_step();
            return Ok(());
        }
        let is_former = self.life == Life::GoesOn && self.env.likely(0.3);
        let Self { env, site, former, .. } = self;
        let (site, is_former) = match former.as_mut().filter(|_| is_former) {
            Some(former) => (former, true),
            None => (site, false),
        };
        match env.rng.u8(..100) {
            0..20 => {
                site.database.steps(&mut env.rng, 6);
                site.wal += 1;
            }
            20..28 => site.take_tick(env),
            28..83 => {
                for _ in 0..env.rng.usize(..30) {
                    let at = env.rng.usize(..site.lanes.len());
                    site.go_on(env, at);
                }
            }
            83..88 => {
                let at = env.rng.usize(..site.lanes.len());
                match env.rng.bool() {
                    true => site.save_all(env),
                    false => site.save(env, at),
                }
                if !is_former {
                    self.check_cursor()?;
                }
            }
            88..95 => {
                for _ in 0..env.rng.usize(..10) {
                    env.execute_late();
                }
            }
            95 => (0..site.lanes.len()).for_each(|at| site.refresh(at)),
            96 => {
                let image = Box::new(site.image());
                // The WAL writer has flushed everything.
                if site.image.is_some() {
                    site.image = Some(image);
                }
            }
            97 => env.now += env.backoff.delay.max(INTERVAL / 2).mul_f64(env.rng.f64() * 2.0),
            _ => {
                let at = env.rng.usize(..site.lanes.len());
                env.now = site.lanes[at].delivery.due_at().map_or(env.now, |due| env.now.max(due));
            }
        }
        self.disturb();
        Ok(())
    }

    /// The copy does everything that a server does, and has enough time.
    fn clone_step(&mut self) {
        let Self { env, clone, .. } = self;
        let Some(clone) = clone else {
            return;
        };
        clone.database.steps(&mut env.rng, 6);
        clone.take_tick(env);
        for _ in 0..env.rng.usize(..60) {
            let at = env.rng.usize(..clone.lanes.len());
            clone.go_on(env, at);
        }
        let at = env.rng.usize(..clone.lanes.len());
        if env.likely(0.3) {
            env.now = clone.lanes[at]
                .delivery
                .due_at()
                .map_or(env.now, |due| env.now.max(due));
        }
        let held_off = matches!(clone.lanes[at].delivery.state(), State::Fenced | State::Copy);
        env.seen.copies_held_off += u32::from(held_off);
        env.seen.copied_lanes_held_off += u32::from(held_off && env.is_cluster);
    }

    fn disturb(&mut self) {
        if self.clone.is_none() && self.env.likely(self.env.faults.clones) {
            tell!(self.env, "a copy is started");
            let image = self.site.image();
            let mut clone = Site::of(&mut self.env, "elsewhere", image);
            clone.is_copy = true;
            self.clone = Some(clone);
        }
        if self.env.likely(self.env.faults.promotions) {
            self.promote();
        }
        self.dump_and_restore();
        if self.former.is_some() && self.env.likely(0.02) {
            self.site.ask_to_take_over();
        }
        if self.life == Life::Frozen && self.env.likely(0.05) {
            self.life = Life::GoesOn;
        }
        let Self { env, site, .. } = self;
        let faults = env.faults;
        let master = env.rng.usize(..env.redis.len());
        if env.likely(faults.out_of_memory) {
            env.redis[master].out_of_memory = !env.redis[master].out_of_memory;
        }
        if env.replicas.is_some() && env.likely(0.05) {
            env.redis[master].replicas_lag = !env.redis[master].replicas_lag;
        }
        let at = env.rng.usize(..site.lanes.len());
        if env.likely(faults.cuts)
            && let Some(connection) = &mut site.lanes[at].connection
        {
            connection.lose(Failure::backend("connection reset by peer"));
        }
        if env.likely(faults.crashes) {
            site.crash_worker(env);
        }
        if site.image.is_some() && env.likely(0.2) || env.likely(faults.server_crashes * 0.1) {
            site.crash_server(env);
        }
        if env.likely(faults.purges) {
            site.purge(env);
        }
        if env.likely(faults.troubled) {
            self.trouble();
        }
        if self.env.likely(faults.trims) {
            let (stream, length) = (self.env.rng.u8(..STREAMS), self.env.rng.usize(..3));
            tell!(self.env, "stream {stream} is trimmed to {length}");
            self.env.seen.trims += 1;
            let master = self.env.master_of(stream);
            self.env.redis[master].trim(stream, length);
        }
        self.lose_data();
    }

    /// The standby becomes a server of its own. It cannot know what Redis has lost shortly before.
    fn promote(&mut self) {
        if !self.has_guards() || !self.is_whole() {
            return;
        }
        let Self { env, site, .. } = self;
        let Some(image) = env.standby.take() else {
            return;
        };
        tell!(env, "the standby is promoted at {} of {}", image.wal, site.wal);
        env.seen.promotions += 1;
        env.seen.promoted_clusters += u32::from(env.is_cluster);
        let mut promoted = Site::of(env, "there", *image);
        promoted.promoted_to = 2;
        let mut former = std::mem::replace(site, promoted);
        self.life = [Life::Over, Life::Frozen, Life::GoesOn][env.rng.usize(..3)];
        if self.life == Life::Over {
            former.drop_connections(env);
        }
        self.former = Some(former);
        let database = &self.site.database;
        let open = database.rows().filter(|key| database.is_open(key.seq));
        self.open = open.map(|key| database.row(key.seq).uid).collect();
        for uid in self.env.gone.clone() {
            if !self.is_known(uid) {
                self.env.in_doubt.insert(uid);
            }
        }
        // Two of these at once are more than a server can find out.
        let env = &mut self.env;
        let faults = &mut env.faults;
        (faults.tail_losses, faults.flips) = (0.0, 0.0);
        (faults.flushes, faults.guard_losses) = (0.0, 0.0);
        faults.promotions = 0.0;
        env.saved.iter_mut().for_each(Vec::clear);
        env.mend_streams();
    }

    /// A dump of the unsent events is taken, or restored: events were deleted meanwhile, sent or not.
    fn dump_and_restore(&mut self) {
        let Self { env, site, .. } = self;
        if self.former.is_some() || self.clone.is_some() {
            return;
        }
        let database = &site.database;
        let is_there = |key: &Key| {
            database.is_committed(key.seq)
                && !database.is_purged(key.seq)
                && !site.tables.is_written_down(database.row(key.seq).stream, key.seq)
        };
        if env.likely(env.faults.restores) {
            let unsent = database.rows().filter(is_there);
            let is_sent = |key: &Key| site.tables.has_passed(env, database.row(key.seq).stream, *key);
            let unsent = unsent.filter(|key| !is_sent(key));
            self.dump = unsent.map(|key| key.seq).collect();
        }
        // Here, results for the deleted rows that are being saved would be sent; the extension does not send them.
        let is_quiet = |lane: &Lane| {
            let is_idle = lane.delivery.is_idle() && lane.pending.is_empty();
            is_idle && !lane.recovery.has_claimed()
        };
        let is_quiet = site.lanes.iter().all(is_quiet);
        if self.dump.is_empty() || !is_quiet || !env.likely(0.1) {
            return;
        }
        let there: Vec<i64> = database.rows().filter(is_there).map(|key| key.seq).collect();
        self.dump.retain(|seq| there.contains(seq));
        for seq in &self.dump {
            let uid = site.database.row(*seq).uid;
            env.restored.insert(uid);
            if env.gone.contains(&uid) {
                env.in_doubt.insert(uid);
            }
        }
        tell!(env, "a dump is restored: {:?}", self.dump);
        let xid = site.database.restore(&std::mem::take(&mut self.dump));
        site.tables.restores.push(xid);
        env.mend_streams();
        site.wal += 1;
    }

    /// A stream is broken or corrected. A stream with events that are still to be looked for stays: nobody could find
    /// them otherwise.
    fn trouble(&mut self) {
        let stream = self.env.rng.u8(..STREAMS);
        let master = self.env.master_of(stream);
        let compares = self.env.redis[master].data.compares();
        if compares || self.is_abandoned(master) || self.may_look_for_restored() {
            return self.env.redis[master].troubled.clear();
        }
        let is_mended = self.env.redis[master].troubled.remove(&stream).is_some();
        if !is_mended && !self.has_unheard(stream) {
            let trouble = match self.env.rng.bool() {
                true => Trouble::WrongType,
                false => Trouble::Forbidden,
            };
            tell!(self.env, "stream {stream}: {trouble:?}");
            self.env.redis[master].troubled.insert(stream, trouble);
        }
    }

    /// Events of a dump are looked for, or may be by the next claim.
    fn may_look_for_restored(&self) -> bool {
        let tables = &self.site.tables;
        let is_up = self.site.lanes.iter().all(|lane| lane.delivery.is_up());
        !tables.restores.is_empty() || (tables.last_restore > 0 && !is_up)
    }

    /// A master is in a state in which its owner may never have seen it: the result of its last batch is to be looked
    /// for.
    fn is_abandoned(&self, master: usize) -> bool {
        let Some(lane) = self.site.at_master(master) else {
            return self.env.redis[master].data.has_guard();
        };
        // No reply of a later one may be on its way.
        let epoch = match lane.delivery.is_idle() && !lane.recovery.has_claimed() {
            true => epoch_of(lane.delivery.number()),
            false => self.site.tables.saved.get(&lane.slot).map_or(0, |saved| saved.epoch),
        };
        let found = self.env.redis[master].data.number();
        found.is_some_and(|found| epoch_of(found) < epoch)
    }

    fn is_up(&self, master: usize) -> bool {
        self.site.at_master(master).is_some_and(|lane| lane.delivery.is_up())
    }

    fn has_unheard(&self, stream: u8) -> bool {
        let entries = self.env.redis[self.env.master_of(stream)].data.streams.get(&stream);
        entries.is_some_and(|entries| entries.iter().any(|uid| !self.is_known(*uid)))
    }

    /// A master fails over, is emptied, or loses its guard.
    fn lose_data(&mut self) {
        let faults = self.env.faults;
        let master = self.env.rng.usize(..self.env.redis.len());
        let saves = faults.tail_losses > 0.0 || faults.flips > 0.0;
        if saves && self.env.redis[master].data.has_guard() && self.env.likely(0.05) {
            let data = self.env.redis[master].data.clone();
            self.env.saved[master].push(data);
        }
        if !self.env.saved[master].is_empty() && self.env.likely(faults.tail_losses) {
            self.lose_tail(master);
        }
        if !self.env.saved[master].is_empty() && self.env.likely(faults.flips) {
            self.flip(master);
        }
        if self.env.likely(faults.flushes) {
            self.empty(master);
        }
        // Nobody can heal what was lost before.
        if self.env.likely(faults.guard_losses) && self.is_whole() {
            tell!(self.env, "the guard of {master} is deleted");
            self.env.seen.guard_losses += 1;
            self.env.saved[master].clear();
            self.env.redis[master].delete_guard();
        }
    }

    /// It comes back with the data that it had saved.
    fn lose_tail(&mut self, master: usize) {
        let index = self.env.rng.usize(..self.env.saved[master].len());
        // Mostly its later saves are lost, too; otherwise it may still come back with one of them.
        match self.env.likely(0.7) {
            true => self.env.saved[master].truncate(index + 1),
            false => self.env.comes_back = true,
        }
        let data = self.env.saved[master][index].clone();
        self.env.seen.tail_losses += 1;
        self.restart(master, data);
    }

    /// Clients flap between two that call themselves the primary: each goes on with what it has.
    fn flip(&mut self, master: usize) {
        let index = self.env.rng.usize(..self.env.saved[master].len());
        let other = self.env.saved[master].swap_remove(index);
        if self.env.redis[master].data.has_guard() {
            let data = self.env.redis[master].data.clone();
            self.env.saved[master].push(data);
        }
        self.env.comes_back = true;
        self.env.seen.flips += 1;
        self.restart(master, other);
    }

    fn restart(&mut self, master: usize, data: Data) {
        tell!(self.env, "Redis {master} is back at {:?}", data.number());
        self.env.hurt = true;
        let compares = data.compares();
        self.env.redis[master].restart(data);
        // The guard that it has read before may still make it go back.
        if compares || self.is_abandoned(master) || !self.is_up(master) || self.site.tables.last_restore > 0 {
            self.env.redis[master].troubled.clear();
        }
        let unheard: Vec<u8> = (0..STREAMS).filter(|stream| self.has_unheard(*stream)).collect();
        self.env.redis[master]
            .troubled
            .retain(|stream, _| !unheard.contains(stream));
        self.env.leftovers.retain(|(of, _)| *of != master);
        for lane in self.site.lanes.iter_mut().filter(|lane| lane.master() == master) {
            if let Some(connection) = &mut lane.connection {
                connection.lose(Failure::backend("connection refused"));
            }
        }
    }

    fn empty(&mut self, master: usize) {
        tell!(self.env, "Redis {master} is emptied");
        self.env.seen.flushes += 1;
        self.env.saved[master].clear();
        let kept = self.env.on_missing == OnMissing::Continue;
        self.env.hurt |= !kept;
        // Also because of the guard that it has read before.
        let compares = self.env.redis[master].data.compares();
        let looks = self.is_abandoned(master) || compares || !self.is_up(master);
        for uid in self.env.redis[master].appended.clone().into_iter().filter(|_| kept) {
            // Otherwise nobody would have known before the comparison was complete.
            let lost = !self.env.redis[master].holds(uid) || looks;
            if lost || !self.is_known(uid) {
                self.env.in_doubt.insert(uid);
            }
            self.env.gone.insert(uid);
        }
        self.env.redis[master].flush();
    }

    /// If somebody has appended to a Redis, somebody has a guard there.
    fn has_guards(&self) -> bool {
        let mut all = self.env.redis.iter();
        let is_any = all.clone().any(|redis| redis.data.has_guard());
        is_any && all.all(|redis| redis.data.has_guard() || redis.appended.is_empty())
    }

    /// Checks that each Redis has everything that was ever appended to it.
    fn is_whole(&self) -> bool {
        let is_there = |redis: &Redis, uid: &u64| self.env.gone.contains(uid) || redis.holds(*uid);
        let mut all = self.env.redis.iter();
        all.all(|redis| redis.appended.iter().all(|uid| is_there(redis, uid)))
    }

    // --- the end

    /// Continues without faults until nothing is left to do at this time.
    fn run_dry(&mut self) -> Result<(), String> {
        let Self { env, site, .. } = self;
        for _ in 0..100_000 {
            let mut did = [site.read_on(env), site.finish_lanes(env), env.execute_late()].contains(&true);
            for at in 0..site.lanes.len() {
                let steps = [
                    site.tend(env, at),
                    site.write(at),
                    site.execute(env, at),
                    site.read_reply(at),
                    site.take_report(env, at),
                    site.resume(env, at),
                    site.retry(env, at),
                ];
                did |= steps.contains(&true);
            }
            if !did {
                return Ok(());
            }
        }
        Err("does not come to an end".to_owned())
    }

    fn finish(&mut self) -> Result<(), String> {
        let Self {
            env,
            site,
            former,
            clone,
            ..
        } = self;
        if let Some(former) = former {
            former.drop_connections(env);
        }
        if let Some(clone) = clone {
            clone.drop_connections(env);
        }
        if env.mutant == Mutant::ResumesUnsaved {
            // The damage is done; it would never end.
            env.mutant = Mutant::None;
        }
        (env.faults.aborts, env.faults.server_crashes) = (0.0, 0.0);
        site.image = None;
        site.database.finish(&mut env.rng);
        site.take_tick(env);
        for redis in &mut env.redis {
            (redis.out_of_memory, redis.replicas_lag) = (false, false);
        }
        self.run_dry()?;
        self.site.restore_former(&mut self.env);
        self.run_dry()?;
        // A loss of Redis is noticed at the next refresh.
        (0..self.site.lanes.len()).for_each(|at| self.site.refresh(at));
        for round in 0..2_000 {
            self.run_dry()?;
            self.check_owners()?;
            let Self { env, site, .. } = self;
            for lane in &mut site.lanes {
                // Nobody else is there any more.
                lane.take_over |= lane.delivery.state() == State::Fenced;
            }
            let waits = site.tables.waiting().next().is_some();
            let rests =
                |lane: &Lane| lane.role == Role::Finder || (lane.delivery.has_room() && lane.delivery.is_idle());
            if !waits && site.lanes.iter().all(rests) {
                return Ok(());
            }
            if round == 5 && env.rng.bool() {
                env.mend_streams();
            }
            let sending = site.lanes.iter().filter(|lane| lane.role == Role::Redis);
            match sending.filter_map(|lane| lane.delivery.due_at()).min() {
                Some(due) => env.now = env.now.max(due),
                None => return Err("something waits, and nothing is due".to_owned()),
            }
        }
        Err("does not come to rest".to_owned())
    }
}
