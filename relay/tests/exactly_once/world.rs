//! What surrounds the servers: Redis and its troubles, time, the schedule.

use crate::model::connection::Leftover;
use crate::model::redis::{Data, Redis, Trouble};
use crate::model::{Rng, likely};
use crate::recovery::INTERVAL;
use crate::site::{STREAMS, Site};
use relay::backoff::Backoff;
use relay::claim::OnMissing;
use relay::classify::Failure;
use relay::conversation::Replicas;
use relay::delivery::Now;
use std::collections::BTreeSet;
use std::ops::AddAssign;
use std::time::Duration;

/// Tells what happens, when one schedule is replayed.
macro_rules! tell {
    ($env:expr, $($text:tt)*) => {
        if $env.tells {
            eprintln!($($text)*);
        }
    };
}
pub(crate) use tell;

/// A worker that is wrong in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    None,
    /// Saves what was read, not what was acknowledged, and believes that instead of the guard.
    SavesAhead,
    /// Believes its own cursor.
    IgnoresGuard,
    /// Goes on before what was refused is written down,
    ResumesUnsaved,
    /// or durable.
    ResumesUnflushed,
    /// Tells the guard no position before the batch.
    WrongPrevious,
    /// Does not tell the guard which waiting events it sends.
    ForgetsAgain,
    /// Takes all of a batch as accepted of which it has not heard.
    AdoptsUnsettled,
    /// Compares no event ids.
    ComparesNothing,
    /// Does not look whether a row is written down that it reads again.
    ReadsBlindly,
    /// Does not send again what waited when Redis has lost it.
    ForgetsAccepted,
    /// Sends what is not durable.
    SkipsFlush,
    /// Sends what lies behind events that were written down, but are not durable.
    ParksUnflushed,
    /// Sends before what the guard said is durable.
    ComesUpUnflushed,
}

/// How often what goes wrong.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    pub troubled: f64,
    pub out_of_memory: f64,
    pub cuts: f64,
    pub crashes: f64,
    pub server_crashes: f64,
    /// Of the transactions that read.
    pub aborts: f64,
    pub tail_losses: f64,
    pub flushes: f64,
    pub guard_losses: f64,
}

impl Faults {
    pub const NONE: Self = Self {
        troubled: 0.0,
        out_of_memory: 0.0,
        cuts: 0.0,
        crashes: 0.0,
        server_crashes: 0.0,
        aborts: 0.0,
        tail_losses: 0.0,
        flushes: 0.0,
        guard_losses: 0.0,
    };

    fn random(rng: &mut Rng) -> Self {
        // Few at a time: together they leave nothing to lose.
        let mut some = |often: f64| if rng.u8(..) < 90 { rng.f64() * often } else { 0.0 };
        Self {
            troubled: some(0.1),
            out_of_memory: some(0.03),
            cuts: some(0.1),
            crashes: some(0.05),
            server_crashes: some(0.1),
            aborts: some(0.2),
            tail_losses: some(0.03),
            flushes: some(0.01),
            guard_losses: some(0.01),
        }
    }
}

/// How often what is rare happened, so that no test passes for want of it.
macro_rules! seen {
    ($($name:ident),*) => {
        #[derive(Clone, Copy, Debug, Default)]
        pub struct Seen {
            $(pub $name: u32),*
        }

        impl Seen {
            pub fn is_lively(&self) -> bool {
                [$(self.$name),*].iter().all(|count| *count > 0)
            }
        }

        impl AddAssign for Seen {
            fn add_assign(&mut self, other: Self) {
                $(self.$name += other.$name;)*
            }
        }
    };
}
seen!(
    adopted,
    settled_missing,
    settled_again,
    heals,
    wait_again,
    compared,
    compared_found,
    unfinished,
    replayed,
    nils,
    aborted,
    stops,
    retries,
    parked,
    skipped,
    written_down,
    failed,
    accepted_after_waiting,
    crashes,
    server_crashes,
    lost_commits,
    tail_losses,
    flushes,
    guard_losses,
    late_commands,
    entries
);

pub struct Env {
    pub rng: Rng,
    pub redis: Redis,
    pub now: Now,
    pub mutant: Mutant,
    pub faults: Faults,
    pub seen: Seen,
    pub tells: bool,
    pub batch_size: usize,
    /// Of an event: up to this.
    pub max_attempts: u32,
    pub backoff: Backoff,
    pub replicas: Option<Replicas>,
    pub on_missing: OnMissing,
    pub leftovers: Vec<Leftover>,
    pub clients: u64,
    pub tokens: u64,
    pub incarnations: u64,
    /// What Redis may come back with.
    saved: Vec<Data>,
    /// Was in the streams when somebody emptied them,
    pub gone: BTreeSet<u64>,
    /// and whoever sent it could not know.
    pub in_doubt: BTreeSet<u64>,
    /// Something that was acknowledged is not in Redis, and not healed.
    pub hurt: bool,
}

impl Env {
    fn new(seed: u64, mutant: Mutant) -> Self {
        let mut rng = Rng::with_seed(seed);
        let delay = [10, 1_000, 100_000][rng.usize(..3)];
        let waits = rng.u8(..) < 50;
        let replays = rng.u8(..) < 50;
        let mut faults = Faults::random(&mut rng);
        if replays {
            // All would be there twice, as was asked for.
            faults.guard_losses = 0.0;
        }
        Self {
            redis: Redis::default(),
            now: Now::ZERO,
            mutant,
            faults,
            seen: Seen::default(),
            tells: std::env::var_os("SEED").is_some(),
            batch_size: rng.usize(1..10),
            max_attempts: rng.u32(1..5),
            backoff: Backoff {
                exponential: rng.bool(),
                delay: Duration::from_millis(delay),
                max_delay: Duration::from_millis(delay * 20),
            },
            replicas: waits.then_some(Replicas { count: 1, wait_ms: 10 }),
            on_missing: if replays {
                OnMissing::Replay
            } else {
                OnMissing::Continue
            },
            leftovers: Vec::new(),
            clients: 0,
            tokens: 0,
            incarnations: 0,
            saved: Vec::new(),
            gone: BTreeSet::new(),
            in_doubt: BTreeSet::new(),
            hurt: false,
            rng,
        }
    }

    pub fn likely(&mut self, probability: f64) -> bool {
        likely(&mut self.rng, probability)
    }

    /// Something of a connection that is no more arrives.
    fn execute_late(&mut self) -> bool {
        if self.leftovers.is_empty() {
            return false;
        }
        let index = self.rng.usize(..self.leftovers.len());
        if self.leftovers[index].execute(&mut self.redis) {
            self.seen.late_commands += 1;
        } else {
            self.leftovers.swap_remove(index);
        }
        true
    }
}

pub struct World {
    pub env: Env,
    pub site: Site,
}

impl World {
    pub fn new(seed: u64, mutant: Mutant) -> Self {
        let mut env = Env::new(seed, mutant);
        let site = Site::new(&mut env, "here");
        Self { env, site }
    }

    pub fn run(&mut self) -> Result<Seen, String> {
        self.schedule().map_err(|e| format!("{e}\n{:?}", self.env.faults))?;
        self.env.seen.nils = self.env.redis.nils;
        self.env.seen.entries = self.env.redis.data.streams.values().map(|s| s.len() as u32).sum();
        Ok(self.env.seen)
    }

    fn schedule(&mut self) -> Result<(), String> {
        for _ in 0..self.env.rng.usize(20..500) {
            self.random_step()?;
            if let Some(violation) = self.env.redis.violation.take() {
                return Err(violation);
            }
        }
        self.finish()?;
        self.check_end()
    }

    fn random_step(&mut self) -> Result<(), String> {
        let Self { env, site } = self;
        match env.rng.u8(..100) {
            0..20 => {
                site.database.steps(&mut env.rng, 6);
                site.wal += 1;
            }
            20..28 => site.take_tick(env),
            28..83 => {
                for _ in 0..env.rng.usize(..30) {
                    site.go_on(env);
                }
            }
            83..88 => {
                site.save(env);
                self.check_cursor()?;
            }
            88..95 => {
                for _ in 0..env.rng.usize(..10) {
                    env.execute_late();
                }
            }
            95 => site.refresh(),
            96 => {
                let image = Box::new(site.image());
                // The WAL writer was here.
                if site.image.is_some() {
                    site.image = Some(image);
                }
            }
            97 => env.now += env.backoff.delay.max(INTERVAL / 2).mul_f64(env.rng.f64() * 2.0),
            _ => env.now = site.delivery.due_at().map_or(env.now, |due| env.now.max(due)),
        }
        self.disturb();
        Ok(())
    }

    fn disturb(&mut self) {
        let Self { env, site } = self;
        let faults = env.faults;
        if env.likely(faults.out_of_memory) {
            env.redis.out_of_memory = !env.redis.out_of_memory;
        }
        if env.replicas.is_some() && env.likely(0.05) {
            env.redis.replicas_lag = !env.redis.replicas_lag;
        }
        if env.likely(faults.cuts)
            && let Some(connection) = &mut site.connection
        {
            connection.lose(Failure::backend("connection reset by peer"));
        }
        if env.likely(faults.crashes) {
            site.crash_worker(env);
        }
        if site.image.is_some() && env.likely(0.2) || env.likely(faults.server_crashes * 0.1) {
            site.crash_server(env);
        }
        if env.likely(faults.troubled) {
            self.trouble();
        }
        self.lose_data();
    }

    /// A stream is spoiled or mended. One with events that are still to be looked for there stays: nobody could find them.
    fn trouble(&mut self) {
        if self.env.redis.data.compares() {
            return self.env.redis.troubled.clear();
        }
        let stream = self.env.rng.u8(..STREAMS);
        if self.env.redis.troubled.remove(&stream).is_none() && !self.has_unheard(stream) {
            let trouble = match self.env.rng.bool() {
                true => Trouble::WrongType,
                false => Trouble::Forbidden,
            };
            tell!(self.env, "stream {stream}: {trouble:?}");
            self.env.redis.troubled.insert(stream, trouble);
        }
    }

    fn has_unheard(&self, stream: u8) -> bool {
        let entries = self.env.redis.data.streams.get(&stream);
        entries.is_some_and(|entries| entries.iter().any(|uid| !self.is_known(*uid)))
    }

    fn lose_data(&mut self) {
        let faults = self.env.faults;
        if faults.tail_losses > 0.0 && self.env.redis.data.has_guard() && self.env.likely(0.05) {
            let data = self.env.redis.data.clone();
            self.env.saved.push(data);
        }
        if !self.env.saved.is_empty() && self.env.likely(faults.tail_losses) {
            let index = self.env.rng.usize(..self.env.saved.len());
            self.env.saved.truncate(index + 1);
            let data = self.env.saved[index].clone();
            tell!(self.env, "Redis is back at {:?}", data.number());
            self.env.seen.tail_losses += 1;
            self.env.hurt = true;
            if data.compares() {
                self.env.redis.troubled.clear();
            }
            self.env.redis.restart(data);
            self.env.leftovers.clear();
            if let Some(connection) = &mut self.site.connection {
                connection.lose(Failure::backend("connection refused"));
            }
        }
        if self.env.likely(faults.flushes) {
            tell!(self.env, "Redis is emptied");
            self.env.seen.flushes += 1;
            self.env.saved.clear();
            let kept = self.env.on_missing == OnMissing::Continue;
            self.env.hurt |= !kept;
            for uid in self.env.redis.appended.clone().into_iter().filter(|_| kept) {
                let lost = !self.env.redis.holds(uid);
                if lost || !self.is_known(uid) {
                    self.env.in_doubt.insert(uid);
                }
                self.env.gone.insert(uid);
            }
            self.env.redis.flush();
        }
        // Nobody can heal what was lost before.
        if self.env.likely(faults.guard_losses) && self.is_whole() {
            tell!(self.env, "the guard is deleted");
            self.env.seen.guard_losses += 1;
            self.env.saved.clear();
            self.env.redis.delete_guard();
        }
    }

    /// Redis has all that was ever appended.
    fn is_whole(&self) -> bool {
        let redis = &self.env.redis;
        let mut appended = redis.appended.iter();
        appended.all(|uid| self.env.gone.contains(uid) || redis.holds(*uid))
    }

    // --- the end

    /// Goes on without faults until nothing is left to do at this time.
    fn run_dry(&mut self) -> Result<(), String> {
        let Self { env, site } = self;
        for _ in 0..100_000 {
            let did = [
                site.tend(env),
                site.write(),
                site.execute(env),
                site.read_reply(),
                site.take_report(env),
                site.resume(env),
                site.retry(env),
                site.read_on(env),
                env.execute_late(),
            ];
            if !did.contains(&true) {
                return Ok(());
            }
        }
        Err("does not come to an end".to_owned())
    }

    fn finish(&mut self) -> Result<(), String> {
        let Self { env, site } = self;
        if env.mutant == Mutant::ResumesUnsaved {
            // The damage is done; it would not come to an end.
            env.mutant = Mutant::None;
        }
        (env.faults.aborts, env.faults.server_crashes) = (0.0, 0.0);
        site.image = None;
        site.database.finish(&mut env.rng);
        site.take_tick(env);
        env.redis.out_of_memory = false;
        env.redis.replicas_lag = false;
        for round in 0..2_000 {
            self.run_dry()?;
            if let Some(violation) = self.env.redis.violation.take() {
                return Err(violation);
            }
            let Self { env, site } = self;
            let waits = site.tables.waiting().next().is_some();
            let is_up = site.delivery.has_room();
            if is_up && !waits && site.delivery.is_idle() {
                return Ok(());
            }
            if round == 5 && env.rng.bool() {
                env.redis.troubled.clear();
            }
            match site.delivery.due_at() {
                Some(due) => env.now = env.now.max(due),
                None => return Err("something waits, and nothing is due".to_owned()),
            }
        }
        Err("does not come to rest".to_owned())
    }
}
