//! Which faults happen when: all of it is drawn from the seed before anything starts, so that a seed names a schedule.

use std::time::Duration;

use kit::faults::POINTS;
use kit::{Dice, Way};

use crate::acts::{self, Act};
use crate::site::BACKENDS;

/// Something that goes wrong. A lasting fault ends after its time, or when the next fault hits the same part.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    // --- Postgres
    KillWorker,
    TerminateWorker,
    FreezeWorker(Duration),
    KillSession,
    TerminateSessions(u64),
    KillPostmaster,
    StopImmediately,
    Restart,
    /// All processes are killed at once, as when the machine dies.
    Crash,
    CrashAt(&'static str),
    HoldAt(&'static str, Duration),
    /// The worker is killed while it waits at this point.
    KillAt(&'static str),

    // --- a store's Redis
    FreezeRedis(usize, Duration),
    KillRedis(usize),
    /// The last bytes of the append-only file are lost.
    LoseTail(usize, u64),
    /// What Redis holds now is kept for [`Fault::GoBack`].
    Save(usize),
    /// Redis is killed, and started with the data that were saved some time ago.
    GoBack(usize),
    Failover(usize, Failover),
    /// After this many more bytes, Redis is full.
    OutOfMemory(usize, u64, Duration),
    ReadOnly(usize, Duration),
    /// Redis has too few replicas for a write.
    Alone(usize, Duration),
    Loading(usize),

    // --- the network between
    Delay(usize, Duration, Duration),
    Cut(usize),
    CutAfter(usize, Way, u64),
    /// The connection is cut when a whole transaction was sent: its reply never arrives.
    CutBehindExec(usize),
    /// What follows a transaction is kept back for longer than the relay's timeouts, and arrives late.
    LateBehindExec(usize, Duration),
    /// What the present connections of the relay send is kept back for longer than its timeouts, and arrives late.
    Late(usize, Way, Duration),
    /// Also what later connections send.
    LateAll(usize, Way, Duration),
    Refuse(usize, Duration),

    // --- settings
    BatchSize(u64),
    PollInterval(u64),
    RetryDelay(u64),
    Disable(Duration),
    Pause(&'static str, Duration),

    // --- what people do
    Act(Act),
}

/// How a replica takes over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Failover {
    /// For how long the replica had heard nothing of the primary.
    pub lag: Duration,
    /// Whether clients' connections to the old primary are cut.
    pub cut: bool,
    /// For how long the old primary still accepts writes.
    pub zombie: Duration,
}

/// Kinds of faults, for the command line and for counting, beside [`acts::KINDS`].
pub(crate) const KINDS: &[&str] = &["postgres", "points", "redis", "losses", "network", "settings"];

impl Fault {
    pub(crate) fn kind(&self) -> &'static str {
        use Fault::*;
        match self {
            KillWorker
            | TerminateWorker
            | FreezeWorker(..)
            | KillSession
            | TerminateSessions(..)
            | KillPostmaster
            | StopImmediately
            | Restart
            | Crash => "postgres",
            CrashAt(..) | HoldAt(..) | KillAt(..) => "points",
            FreezeRedis(..) | KillRedis(..) | Save(..) | OutOfMemory(..) | ReadOnly(..) | Alone(..) | Loading(..) => {
                "redis"
            }
            LoseTail(..) | GoBack(..) | Failover(..) => "losses",
            Delay(..) | Cut(..) | CutAfter(..) | CutBehindExec(..) | LateBehindExec(..) | Late(..) | LateAll(..)
            | Refuse(..) => "network",
            BatchSize(..) | PollInterval(..) | RetryDelay(..) | Disable(..) | Pause(..) => "settings",
            Act(act) => act.kind(),
        }
    }

    /// Its name without what was drawn for it.
    pub(crate) fn name(&self) -> String {
        let text = match self {
            Fault::Act(act) => format!("{act:?}"),
            _ => format!("{self:?}"),
        };
        text.split('(').next().unwrap_or_default().to_string()
    }
}

/// Draws the faults of `time`, each with the pause before it.
pub(crate) fn draw(seed: u64, time: Duration, kinds: &[String]) -> Vec<(Duration, Fault)> {
    let mut dice = Dice::new(seed);
    let acts: Vec<&str> = kinds
        .iter()
        .map(String::as_str)
        .filter(|kind| acts::KINDS.contains(kind))
        .collect();
    let mut plan = Vec::new();
    let mut at = Duration::ZERO;
    loop {
        // Sometimes faults overlap.
        let pause = if dice.one_in(8) {
            dice.millis(0, 100)
        } else {
            dice.millis(300, 2_500)
        };
        at += pause;
        if at > time {
            return plan;
        }
        // As many acts as faults. Without acts, a seed names the same schedule as before there were acts.
        let fault = if !acts.is_empty() && (acts.len() == kinds.len() || dice.one_in(2)) {
            Fault::Act(acts::draw(&mut dice, &acts))
        } else {
            loop {
                let fault = any(&mut dice);
                if kinds.iter().any(|kind| kind == fault.kind()) {
                    break fault;
                }
            }
        };
        plan.push((pause, fault));
    }
}

fn any(dice: &mut Dice) -> Fault {
    use Fault::*;
    let store = dice.below(2) as usize;
    let way = *dice.pick(&[Way::ToServer, Way::ToClient]);
    let point = *dice.pick(POINTS);
    match dice.below(43) {
        0..2 => KillWorker,
        2 => TerminateWorker,
        3 => FreezeWorker(dice.millis(200, 2_000)),
        4 => KillSession,
        5 => TerminateSessions(dice.between(1, 6)),
        6 => KillPostmaster,
        7 => StopImmediately,
        8 => Restart,
        9 => Crash,
        10..14 => CrashAt(point),
        14 => HoldAt(point, dice.millis(100, 1_500)),
        15 => KillAt(point),
        16 => FreezeRedis(store, dice.millis(100, 2_000)),
        17 => KillRedis(1),
        18..20 => LoseTail(1, dice.between(1, 20_000)),
        20..22 => GoBack(0),
        22 => Save(0),
        23..26 => Failover(
            0,
            self::Failover {
                lag: dice.millis(0, 1_000),
                cut: dice.one_in(2),
                zombie: if dice.one_in(2) {
                    Duration::ZERO
                } else {
                    dice.millis(1, 1_000)
                },
            },
        ),
        26 => OutOfMemory(store, dice.below(100_000), dice.millis(100, 1_500)),
        27 => ReadOnly(store, dice.millis(100, 1_500)),
        28 => Alone(store, dice.millis(100, 1_000)),
        29 => Loading(store),
        30 => Delay(store, dice.millis(1, 600), dice.millis(200, 2_000)),
        31 => Cut(store),
        32..34 => CutAfter(
            store,
            way,
            dice.below(if way == Way::ToServer { 20_000 } else { 2_000 }),
        ),
        34..36 => Late(store, way, dice.millis(700, 3_000)),
        36 => LateAll(store, way, dice.millis(200, 2_000)),
        37 => Refuse(store, dice.millis(100, 1_500)),
        38 => CutBehindExec(store),
        39..41 => LateBehindExec(store, dice.millis(700, 2_500)),
        41 => match dice.below(3) {
            0 => BatchSize(*dice.pick(&[1, 2, 7, 20, 100, 1_000])),
            1 => PollInterval(*dice.pick(&[100, 200, 500, 1_000])),
            _ => RetryDelay(*dice.pick(&[1, 20, 50, 200])),
        },
        _ => match dice.below(3) {
            0 => Disable(dice.millis(100, 1_500)),
            _ => Pause(dice.pick(BACKENDS).name, dice.millis(100, 2_000)),
        },
    }
}
