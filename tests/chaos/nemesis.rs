//! Carries out the plan, one fault after the other, and repairs everything at the end.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chrono::Utc;

use crate::plan::Fault;
use crate::site::{BACKENDS, Site};
use crate::{postgres_faults, redis_faults, settings_faults};

/// What is broken for a while. Each has one standing fault at most: the next one ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Relay,
    Store(usize),
    Network(usize),
    /// What is held back on the network: so long that another connection takes over meanwhile.
    Held(usize),
    Settings,
    Backend(&'static str),
}

/// How a fault that lasts is ended.
#[derive(Debug, Clone, Copy)]
pub enum Repair {
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
}

#[derive(Debug)]
struct Standing {
    part: Part,
    until: Instant,
    repair: Repair,
}

pub struct Nemesis<'a> {
    site: &'a mut Site,
    start: Instant,
    standing: Vec<Standing>,
    /// How often each fault befell.
    pub counts: BTreeMap<String, usize>,
    /// Its log: also printed when the run fails.
    pub log: Vec<String>,
    quiet: bool,
}

impl<'a> Nemesis<'a> {
    pub fn new(site: &'a mut Site, quiet: bool) -> Self {
        Nemesis {
            site,
            start: Instant::now(),
            standing: Vec::new(),
            counts: BTreeMap::new(),
            log: Vec::new(),
            quiet,
        }
    }

    pub fn run(&mut self, plan: &[(Duration, Fault)]) {
        for (pause, fault) in plan {
            self.wait_until(Instant::now() + *pause);
            self.befall(*fault);
        }
    }

    /// Ends what stands, and sees that every server runs.
    pub fn repair_all(&mut self) {
        while let Some(standing) = self.standing.pop() {
            self.repair(standing.repair);
        }
        for store in 0..self.site.stores.len() {
            self.site.stores[store].proxy.pass();
        }
        self.repair(Repair::Release);
        for backend in BACKENDS {
            self.repair(Repair::Unpause(backend.name));
        }
        self.note("all is repaired");
    }

    fn befall(&mut self, fault: Fault) {
        let part = part_of(fault);
        self.end(part);
        if needs_postgres(fault) {
            // A frozen worker or one that waits could not answer.
            self.end(Part::Relay);
        }
        self.note(&format!("{fault:?}"));
        *self.counts.entry(fault.name()).or_default() += 1;
        let lasting = match part {
            Part::Relay => postgres_faults::befall(self.site, fault),
            Part::Store(store) => redis_faults::befall(self.site, store, fault),
            Part::Network(store) | Part::Held(store) => redis_faults::befall_network(self.site, store, fault),
            Part::Settings | Part::Backend(_) => settings_faults::befall(self.site, fault),
        };
        if let Some((time, repair)) = lasting {
            self.standing.push(Standing {
                part,
                until: Instant::now() + time,
                repair,
            });
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
            Repair::Enable | Repair::Unpause(_) => settings_faults::repair(self.site, repair),
            _ => redis_faults::repair(self.site, repair),
        }
    }

    /// Waits, and ends meanwhile what has lasted its time.
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
        // Milliseconds of the epoch, as in the ids of entries.
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
    }
}

/// Whether it waits for something that every process of the server has to answer.
fn needs_postgres(fault: Fault) -> bool {
    matches!(fault, Fault::Disable(_) | Fault::Pause(..))
}
