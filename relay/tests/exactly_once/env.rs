//! What a schedule is made of: time and chance, Redis and its troubles, a worker that may be wrong.

use crate::lane::{HASH_SLOTS, hash_slot};
use crate::model::connection::Leftover;
use crate::model::redis::{Data, Redis};
use crate::model::{Rng, likely};
use crate::site::Image;
use relay::delivery::backoff::Backoff;
use relay::guard::claim::OnMissing;
use relay::redis::replicas::Replicas;
use relay::time::Now;
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
pub(crate) enum Mutant {
    None,
    /// Saves what was read, not what was acknowledged.
    SavesAhead,
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
    /// Believes the guard's position in any history.
    TrustsAnyHistory,
    /// Sends before what the guard said is durable.
    ComesUpUnflushed,
    /// Takes over from whoever is silent.
    CopiesTakeOver,
    /// Sends what a dump has brought without looking for it.
    SendsRestored,
    /// Heals as if nothing of a dump had come since.
    ForgetsRestores,
    /// Takes any history for its own when it is told to take over.
    TakesOverBlindly,
    /// Looks for half of the events that it should look for.
    ComparesLess,
    /// Begins a lane at the newest tick instead of where its finder stands.
    LaneBeginsAtNewest,
    /// Lets a finder go on before the lane is saved that it has found.
    LaneIsNotSaved,
    /// Once one lane has compared after a promotion, takes the guards of the others for its own history's.
    OneLaneComparesForAll,
    /// Compares nothing for a lane that was just made.
    NewLaneComparesNothing,
    /// Takes for delivered by all of a backend what its finder has come past.
    PurgesWithoutLanes,
}

/// How often what goes wrong.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Faults {
    pub(crate) troubled: f64,
    pub(crate) out_of_memory: f64,
    pub(crate) cuts: f64,
    pub(crate) crashes: f64,
    pub(crate) server_crashes: f64,
    /// Of the transactions that read.
    pub(crate) aborts: f64,
    pub(crate) tail_losses: f64,
    /// To what it once was; what it is now it may come back with.
    pub(crate) flips: f64,
    pub(crate) flushes: f64,
    pub(crate) guard_losses: f64,
    /// Of the standby, some state of which becomes another server.
    pub(crate) promotions: f64,
    /// Copies that are started beside the original.
    pub(crate) clones: f64,
    /// Of a stream, perhaps to nothing.
    pub(crate) trims: f64,
    /// Of a dump, whose events may have been sent since it was taken.
    pub(crate) restores: f64,
    /// Of what was delivered some time ago.
    pub(crate) purges: f64,
}

impl Faults {
    pub(crate) const NONE: Self = Self {
        troubled: 0.0,
        out_of_memory: 0.0,
        cuts: 0.0,
        crashes: 0.0,
        server_crashes: 0.0,
        aborts: 0.0,
        tail_losses: 0.0,
        flips: 0.0,
        flushes: 0.0,
        guard_losses: 0.0,
        promotions: 0.0,
        clones: 0.0,
        trims: 0.0,
        restores: 0.0,
        purges: 0.0,
    };

    fn random(rng: &mut Rng) -> Self {
        // Few at a time: together they leave nothing to lose.
        let mut some = |often: f64| if rng.u8(..) < 90 { rng.f64() * often } else { 0.0 };
        let faults = Self {
            troubled: some(0.1),
            out_of_memory: some(0.03),
            cuts: some(0.1),
            crashes: some(0.05),
            server_crashes: some(0.1),
            aborts: some(0.2),
            tail_losses: some(0.03),
            flips: some(0.05),
            flushes: some(0.01),
            guard_losses: some(0.01),
            promotions: some(0.02),
            clones: some(0.02),
            trims: 0.0,
            restores: some(0.05),
            purges: some(0.05),
        };
        let faults = Self {
            // Of what a standby has not heard, nobody here can say where it stood before.
            restores: if faults.promotions == 0.0 { faults.restores } else { 0.0 },
            ..faults
        };
        // What was trimmed cannot be found after a loss, nor told from what was refused.
        let doubts = [
            faults.troubled,
            faults.tail_losses,
            faults.flips,
            faults.flushes,
            faults.guard_losses,
            faults.promotions,
            faults.restores,
        ];
        let trims = if doubts == [0.0; 7] { some(0.3) } else { 0.0 };
        // What is retained no longer cannot be sent again.
        let has_losses = doubts[1..].iter().chain([&faults.clones]).any(|often| *often > 0.0);
        let purges = if !has_losses { faults.purges } else { 0.0 };
        Self {
            trims,
            purges,
            ..faults
        }
    }
}

/// How often what is rare happened, so that no test passes for want of it.
macro_rules! seen {
    ($($name:ident),*) => {
        #[derive(Clone, Copy, Debug, Default)]
        pub(crate) struct Seen {
            $(pub $name: u32),*
        }

        impl Seen {
            pub(crate) fn is_lively(&self) -> bool {
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
    restores,
    unfinished,
    replayed,
    promotions,
    promoted_clusters,
    copies_held_off,
    copied_lanes_held_off,
    taken_over,
    fenced,
    other_histories,
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
    flips,
    flushes,
    guard_losses,
    late_commands,
    trims,
    lanes,
    purged,
    not_compared,
    entries
);

pub(crate) struct Env {
    pub(crate) rng: Rng,
    /// One, or the masters of a cluster by their hash slots.
    pub(crate) redis: Vec<Redis>,
    pub(crate) is_cluster: bool,
    pub(crate) now: Now,
    pub(crate) mutant: Mutant,
    pub(crate) faults: Faults,
    pub(crate) seen: Seen,
    pub(crate) tells: bool,
    pub(crate) batch_size: usize,
    /// Waiting events that recovery looks for at a time.
    pub(crate) waiting_at_once: usize,
    /// Events behind the own position that recovery looks for at most.
    pub(crate) most_compared: usize,
    /// Of an event: up to this.
    pub(crate) max_attempts: u32,
    pub(crate) backoff: Backoff,
    pub(crate) replicas: Option<Replicas>,
    pub(crate) on_missing: OnMissing,
    /// With the master that they go to.
    pub(crate) leftovers: Vec<(usize, Leftover)>,
    pub(crate) clients: u64,
    pub(crate) tokens: u64,
    pub(crate) incarnations: u64,
    /// What each master may come back with.
    pub(crate) saved: Vec<Vec<Data>>,
    /// Was in the streams when somebody emptied them,
    pub(crate) gone: BTreeSet<u64>,
    /// and whoever sent it could not know.
    pub(crate) in_doubt: BTreeSet<u64>,
    /// Something that was acknowledged is not in Redis, and not healed.
    pub(crate) hurt: bool,
    /// Redis has come back with what it had lost.
    pub(crate) comes_back: bool,
    /// Rows that were purged.
    pub(crate) retired: BTreeSet<i64>,
    /// Events that were not looked for, since there were too many.
    pub(crate) not_compared: BTreeSet<u64>,
    /// Events that a dump has brought.
    pub(crate) restored: BTreeSet<u64>,
    /// What a standby has.
    pub(crate) standby: Option<Box<Image>>,
}

impl Env {
    pub(crate) fn new(seed: u64, mutant: Mutant, is_cluster: Option<bool>) -> Self {
        let mut rng = Rng::with_seed(seed);
        let is_cluster = is_cluster.unwrap_or(rng.u8(..) < 80);
        let masters = if is_cluster { HASH_SLOTS } else { 1 };
        let delay = [10, 1_000, 100_000][rng.usize(..3)];
        let waits = rng.u8(..) < 50;
        let replays = rng.u8(..) < 50;
        let mut faults = Faults::random(&mut rng);
        if replays {
            // All would be there twice, as was asked for.
            faults.guard_losses = 0.0;
        }
        Self {
            redis: (0..masters).map(|_| Redis::default()).collect(),
            is_cluster,
            now: Now::ZERO,
            mutant,
            faults,
            seen: Seen::default(),
            tells: std::env::var_os("SEED").is_some(),
            batch_size: rng.usize(1..10),
            waiting_at_once: rng.usize(1..6),
            most_compared: if rng.u8(..) < 30 { rng.usize(1..20) } else { usize::MAX },
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
            saved: vec![Vec::new(); masters],
            gone: BTreeSet::new(),
            in_doubt: BTreeSet::new(),
            hurt: false,
            comes_back: false,
            retired: BTreeSet::new(),
            not_compared: BTreeSet::new(),
            restored: BTreeSet::new(),
            standby: None,
            rng,
        }
    }

    pub(crate) fn likely(&mut self, probability: f64) -> bool {
        likely(&mut self.rng, probability)
    }

    /// The Redis that has a stream.
    pub(crate) fn master_of(&self, stream: u8) -> usize {
        match self.is_cluster {
            true => usize::from(hash_slot(stream)),
            false => 0,
        }
    }

    /// No stream is in trouble any more.
    pub(crate) fn mend_streams(&mut self) {
        self.redis.iter_mut().for_each(|redis| redis.troubled.clear());
    }

    /// Something of a connection that is no more arrives.
    pub(crate) fn execute_late(&mut self) -> bool {
        if self.leftovers.is_empty() {
            return false;
        }
        let index = self.rng.usize(..self.leftovers.len());
        let (master, leftover) = &mut self.leftovers[index];
        if leftover.execute(&mut self.redis[*master]) {
            self.seen.late_commands += 1;
        } else {
            self.leftovers.swap_remove(index);
        }
        true
    }
}
