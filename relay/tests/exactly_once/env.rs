//! The elements of a schedule: time and chance, Redis and its faults, faults put into the worker.

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

/// Prints what happens when a single schedule is replayed.
macro_rules! tell {
    ($env:expr, $($text:tt)*) => {
        if $env.tells {
            eprintln!($($text)*);
        }
    };
}
pub(crate) use tell;

/// A fault that is put into the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    None,
    /// Saves the position that was read, not the acknowledged one.
    SavesAhead,
    /// Continues before the refusals are saved,
    ResumesUnsaved,
    /// or durable.
    ResumesUnflushed,
    /// Gives the guard no position before the batch.
    WrongPrevious,
    /// Does not tell the guard which waiting events it sends.
    ForgetsAgain,
    /// Takes all of a batch with an unknown result as accepted.
    AdoptsUnsettled,
    /// Compares no event ids.
    ComparesNothing,
    /// Does not check whether a row that it reads again is saved as refused.
    ReadsBlindly,
    /// Does not send a waiting event again when Redis has lost it.
    ForgetsAccepted,
    /// Sends events that are not durable.
    SkipsFlush,
    /// Sends events after saved refusals that are not durable.
    ParksUnflushed,
    /// Believes the guard's position in any history.
    TrustsAnyHistory,
    /// Sends before the state read from the guard is durable.
    ComesUpUnflushed,
    /// Takes over from any owner that is silent.
    CopiesTakeOver,
    /// Sends the events of a dump without looking for them.
    SendsRestored,
    /// Heals as if there had been no restore since.
    ForgetsRestores,
    /// Takes any history for its own in a take-over.
    TakesOverBlindly,
    /// Looks for half of the events that it should look for.
    ComparesLess,
    /// Begins a lane at the newest tick instead of its finder's position.
    LaneBeginsAtNewest,
    /// Lets a finder continue before the lane that it has found is saved.
    LaneIsNotSaved,
    /// Once one lane has compared after a promotion, takes the guards of the others for guards of its own history.
    OneLaneComparesForAll,
    /// Compares nothing for a new lane.
    NewLaneComparesNothing,
    /// Takes everything that the finder has passed for delivered by the whole backend.
    PurgesWithoutLanes,
    /// The reader of a lane that does not send passes a row of its own, too.
    PassesItsOwn,
    /// Gives up a lane that has events to send.
    GivesUpAnyLane,
    /// Lets a lane that was given up begin where its finder stands, though it may have sent more.
    FormerLaneBeginsAtFinder,
}

/// How often each fault happens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Faults {
    pub(crate) troubled: f64,
    pub(crate) out_of_memory: f64,
    pub(crate) cuts: f64,
    pub(crate) crashes: f64,
    pub(crate) server_crashes: f64,
    /// The share of reading transactions that abort.
    pub(crate) aborts: f64,
    pub(crate) tail_losses: f64,
    /// To what it once was; what it is now it may come back with.
    pub(crate) flips: f64,
    pub(crate) flushes: f64,
    pub(crate) guard_losses: f64,
    /// Promotions of a standby, an older state of which becomes another server.
    pub(crate) promotions: f64,
    /// Copies that are started beside the original.
    pub(crate) clones: f64,
    /// Trims of a stream, perhaps to nothing.
    pub(crate) trims: f64,
    /// Restores of a dump, whose events may have been sent since it was taken.
    pub(crate) restores: f64,
    /// Purges of events that were delivered some time ago.
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
        // Few at a time: together they would leave nothing to lose.
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
            // Nobody here can say where the events that a standby did not receive stood before.
            restores: if faults.promotions == 0.0 { faults.restores } else { 0.0 },
            ..faults
        };
        // Trimmed entries cannot be found after a loss, nor be distinguished from refused events.
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

/// Counts of rare events, so that no test passes because they did not happen.
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
    lanes_given_up,
    lanes_again,
    passed_by,
    purged,
    not_compared,
    entries
);

pub(crate) struct Env {
    pub(crate) rng: Rng,
    /// One, or the masters of a cluster by their hash slots.
    pub(crate) redis: Vec<Redis>,
    pub(crate) is_cluster: bool,
    /// How many lanes there may be.
    pub(crate) most_lanes: usize,
    pub(crate) now: Now,
    pub(crate) mutant: Mutant,
    pub(crate) faults: Faults,
    pub(crate) seen: Seen,
    pub(crate) tells: bool,
    pub(crate) batch_size: usize,
    /// The waiting events that recovery looks for at a time.
    pub(crate) waiting_at_once: usize,
    /// The maximum of events after the own position that recovery looks for.
    pub(crate) most_compared: usize,
    /// The maximum of an event.
    pub(crate) max_attempts: u32,
    pub(crate) backoff: Backoff,
    pub(crate) replicas: Option<Replicas>,
    pub(crate) on_missing: OnMissing,
    /// With the master that they are sent to.
    pub(crate) leftovers: Vec<(usize, Leftover)>,
    pub(crate) clients: u64,
    pub(crate) tokens: u64,
    pub(crate) incarnations: u64,
    /// The states with which each master may come back.
    pub(crate) saved: Vec<Vec<Data>>,
    /// Events that were in the streams when somebody emptied them,
    pub(crate) gone: BTreeSet<u64>,
    /// and whose sender could not know that.
    pub(crate) in_doubt: BTreeSet<u64>,
    /// An acknowledged entry is not in Redis, and not healed.
    pub(crate) hurt: bool,
    /// Redis has come back with entries that it had lost.
    pub(crate) comes_back: bool,
    /// Rows that were purged.
    pub(crate) retired: BTreeSet<i64>,
    /// Events that were not looked for because there were too many.
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
            // All would be in the streams twice, as configured.
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
            most_lanes: rng.usize(1..=HASH_SLOTS),
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

    /// Corrects all streams.
    pub(crate) fn mend_streams(&mut self) {
        self.redis.iter_mut().for_each(|redis| redis.troubled.clear());
    }

    /// Some bytes of a closed connection arrive.
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
