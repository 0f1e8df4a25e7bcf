//! Carries out the plan, one fault after the other, and repairs everything at the end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use chrono::Utc;

use crate::acts::{Act, CopyLife};
use crate::dba::Dba;
use crate::load::Gate;
use crate::plan::Fault;
use crate::site::{BACKENDS, Site};
use crate::{copies, dba_acts, postgres_faults, redis_faults, settings_faults};

/// A part that can be broken for a while. Each has at most one standing fault: the next fault ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Relay,
    Store(usize),
    Network(usize),
    /// What is held back on the network, for so long that another connection takes over meanwhile.
    Held(usize),
    Settings,
    Backend(&'static str),
    /// Paused backends, all of them.
    Backends,
}

/// How a lasting fault is ended.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Repair {
    ThawWorker(i32),
    Release,
    ThawRedis(usize),
    GiveMemory(usize),
    Writable(usize),
    NotAlone(usize),
    Undelay(usize),
    Accept(usize),
    LetGo(usize),
    Enable,
    Unpause(&'static str),
    UnpauseAll,
}

#[derive(Debug)]
struct Standing {
    part: Part,
    until: Instant,
    repair: Repair,
}

pub(crate) struct Nemesis<'a> {
    site: &'a mut Site,
    start: Instant,
    standing: Vec<Standing>,
    gate: Arc<Gate>,
    dba: Dba,
    /// The act of the DBA that is under way.
    work: Option<(Act, JoinHandle<Result<(), String>>)>,
    /// Acts that failed because of an obstacle, and the obstacle.
    pub hindered: Vec<String>,
    /// How often each fault happened.
    pub counts: BTreeMap<String, usize>,
    /// The log of the run: also printed when the run fails.
    pub log: Vec<String>,
    quiet: bool,
}

impl<'a> Nemesis<'a> {
    pub(crate) fn new(site: &'a mut Site, gate: &Arc<Gate>, quiet: bool) -> Self {
        Nemesis {
            dba: Dba::of(&site.pg),
            site,
            start: Instant::now(),
            standing: Vec::new(),
            gate: Arc::clone(gate),
            work: None,
            hindered: Vec::new(),
            counts: BTreeMap::new(),
            log: Vec::new(),
            quiet,
        }
    }

    pub(crate) fn run(&mut self, plan: &[(Duration, Fault)]) {
        for (pause, fault) in plan {
            self.wait_until(Instant::now() + *pause);
            self.befall(*fault);
        }
    }

    /// Ends the standing faults, and makes sure that every server runs.
    pub(crate) fn repair_all(&mut self) {
        self.wait_work();
        self.end_all();
        self.repair(Repair::Release);
        for backend in BACKENDS {
            self.repair(Repair::Unpause(backend.name));
        }
        self.repair(Repair::UnpauseAll);
        let mended = dba_acts::mend(&self.dba).and_then(|()| copies::remove_copy(&self.dba));
        self.hindered.extend(mended.err());
        self.note("all is repaired");
    }

    fn act(&mut self, act: Act) {
        // One act at a time; and exclusive acts wait for the one under way as well.
        if !matches!(act, Act::PauseAll(_)) {
            self.wait_work();
        }
        self.note(&format!("{act:?}"));
        let outcome = match act {
            Act::PauseAll(time) => {
                self.end(Part::Backends);
                self.end(Part::Relay);
                copies::enable_all(self.site, false);
                self.stand(Part::Backends, time, Repair::UnpauseAll);
                return;
            }
            Act::Stop(mode, time) => {
                self.end(Part::Relay);
                copies::stop(self.site, &self.gate, mode, time)
            }
            Act::CopyDatabase(life, time) => {
                self.end(Part::Relay);
                if matches!(life, CopyLife::TakenOver) {
                    // This waits for what is sent.
                    self.end_all();
                }
                copies::copy_database(self.site, &self.gate, life, time)
            }
            Act::CloneServer(original, time) => {
                self.end(Part::Relay);
                copies::clone_server(self.site, original, time)
            }
            _ => {
                self.work = Some((act, self.dba.start(act)));
                return;
            }
        };
        self.done(act, outcome);
    }

    fn done(&mut self, act: Act, outcome: Result<(), String>) {
        match outcome {
            Ok(()) => self.note(&format!("done: {act:?}")),
            Err(error) => {
                let case = format!("{act:?}: {error}");
                self.note(&format!("HINDERED: {case}"));
                self.hindered.push(case);
            }
        }
    }

    /// Waits until the DBA has finished. Meanwhile ends the faults whose time is over.
    fn wait_work(&mut self) {
        while let Some((act, work)) = self.work.take() {
            if work.is_finished() {
                let outcome = work.join().expect("a DBA panicked");
                self.done(act, outcome);
            } else {
                self.work = Some((act, work));
                self.wait_until(Instant::now() + Duration::from_millis(10));
            }
        }
    }

    fn end_all(&mut self) {
        while let Some(standing) = self.standing.pop() {
            self.repair(standing.repair);
        }
        for store in &self.site.stores {
            store.proxy.pass();
        }
    }

    fn stand(&mut self, part: Part, time: Duration, repair: Repair) {
        self.standing.push(Standing {
            part,
            until: Instant::now() + time,
            repair,
        });
    }

    fn befall(&mut self, fault: Fault) {
        *self.counts.entry(fault.name()).or_default() += 1;
        if let Fault::Act(act) = fault {
            return self.act(act);
        }
        let part = part_of(fault);
        self.end(part);
        if needs_postgres(fault) {
            // A frozen or waiting worker could not answer.
            self.end(Part::Relay);
        }
        self.note(&format!("{fault:?}"));
        let lasting = match part {
            Part::Relay => postgres_faults::befall(self.site, fault),
            Part::Store(store) => redis_faults::befall(self.site, store, fault),
            Part::Network(store) | Part::Held(store) => redis_faults::befall_network(self.site, store, fault),
            Part::Settings | Part::Backend(_) | Part::Backends => settings_faults::befall(self.site, fault),
        };
        if let Some((time, repair)) = lasting {
            self.stand(part, time, repair);
        }
    }

    fn end(&mut self, part: Part) {
        while let Some(at) = self.standing.iter().position(|standing| standing.part == part) {
            let standing = self.standing.remove(at);
            self.repair(standing.repair);
        }
    }

    fn repair(&mut self, repair: Repair) {
        match repair {
            Repair::ThawWorker(_) | Repair::Release => postgres_faults::repair(self.site, repair),
            Repair::UnpauseAll => copies::enable_all(self.site, true),
            Repair::Enable | Repair::Unpause(_) => settings_faults::repair(self.site, repair),
            _ => redis_faults::repair(self.site, repair),
        }
    }

    /// Waits, and meanwhile ends the faults whose time is over.
    fn wait_until(&mut self, then: Instant) {
        loop {
            let due = self
                .standing
                .iter()
                .position(|standing| standing.until <= Instant::now());
            if let Some(at) = due {
                let standing = self.standing.remove(at);
                self.note(&format!("ends: {:?}", standing.repair));
                self.repair(standing.repair);
                continue;
            }
            let next = self.standing.iter().map(|standing| standing.until).min();
            let next = next.map_or(then, |next| next.min(then));
            let now = Instant::now();
            if now >= then {
                return;
            }
            std::thread::sleep(next.saturating_duration_since(now));
        }
    }

    fn note(&mut self, text: &str) {
        let (now, since) = (Utc::now(), self.start.elapsed());
        // Milliseconds since the epoch, as in the ids of entries.
        let line = format!(
            "{:8.3} s  {} ({})  {text}",
            since.as_secs_f64(),
            now.format("%H:%M:%S%.3f"),
            now.timestamp_millis()
        );
        if !self.quiet {
            eprintln!("{line}");
        }
        self.log.push(line);
    }
}

fn part_of(fault: Fault) -> Part {
    use Fault::*;
    match fault {
        KillWorker
        | TerminateWorker
        | FreezeWorker(..)
        | KillSession
        | TerminateSessions(..)
        | KillPostmaster
        | StopImmediately
        | Restart
        | Crash
        | CrashAt(..)
        | HoldAt(..)
        | KillAt(..) => Part::Relay,
        FreezeRedis(store, _)
        | KillRedis(store)
        | LoseTail(store, _)
        | Save(store)
        | GoBack(store)
        | Failover(store, _)
        | OutOfMemory(store, ..)
        | ReadOnly(store, _)
        | Alone(store, _)
        | Loading(store) => Part::Store(store),
        Delay(store, ..) | Cut(store) | CutAfter(store, ..) | CutBehindExec(store) | Refuse(store, _) => {
            Part::Network(store)
        }
        LateBehindExec(store, _) | Late(store, ..) | LateAll(store, ..) => Part::Held(store),
        BatchSize(_) | PollInterval(_) | RetryDelay(_) | Disable(_) => Part::Settings,
        Pause(backend, _) => Part::Backend(backend),
        Act(act) => unreachable!("{act:?} is no fault"),
    }
}

/// Whether the fault needs an answer of every process of the server.
fn needs_postgres(fault: Fault) -> bool {
    matches!(fault, Fault::Disable(_) | Fault::Pause(..))
}
