//! The faults between the two ends: drawn from the seed, carried out one after the other.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kit::postgres::{DB, USER};
use kit::{Dice, Mode, Postgres, process, wait_until};
use nix::sys::signal::Signal;
use postgres::NoTls;

use super::consumer::Consumers;
use super::{STREAMS, Site};

#[derive(Debug, Clone, Copy)]
enum Fault {
    KillConsumer(usize),
    FreezeConsumer(usize, Duration),
    KillWorker,
    KillSessions(End),
    KillPostmaster(End, Duration),
    Crash(End, Duration),
    StopImmediately(End, Duration),
    Restart(End),
    KillRedis(Duration),
    FreezeRedis(Duration),
}

#[derive(Debug, Clone, Copy)]
enum End {
    First,
    Second,
}

fn draw(dice: &mut Dice) -> Fault {
    let end = *dice.pick(&[End::First, End::Second]);
    let consumer = dice.below(STREAMS.len() as u64) as usize;
    match dice.below(20) {
        0..6 => Fault::KillConsumer(consumer),
        6..8 => Fault::FreezeConsumer(consumer, dice.millis(50, 1_500)),
        8..10 => Fault::KillWorker,
        10..12 => Fault::KillSessions(end),
        12 => Fault::KillPostmaster(end, dice.millis(0, 500)),
        13 => Fault::Crash(end, dice.millis(0, 500)),
        14 => Fault::StopImmediately(end, dice.millis(0, 500)),
        15 => Fault::Restart(end),
        16..19 => Fault::KillRedis(dice.millis(0, 700)),
        _ => Fault::FreezeRedis(dice.millis(100, 1_500)),
    }
}

pub(super) struct Nemesis {
    // Ended before the servers are.
    pub consumers: Consumers,
    pub site: Site,
    dice: Dice,
    quiet: bool,
    counts: BTreeMap<String, u64>,
}

impl Nemesis {
    pub(super) fn new(site: Site, consumers: Consumers, seed: u64, quiet: bool) -> Self {
        Nemesis {
            consumers,
            site,
            dice: Dice::new(seed),
            quiet,
            counts: BTreeMap::new(),
        }
    }

    pub(super) fn run(&mut self, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            let pause = match self.dice.one_in(6) {
                true => self.dice.millis(0, 60),
                false => self.dice.millis(100, 1_500),
            };
            std::thread::sleep(pause);
            let fault = draw(&mut self.dice);
            if !self.quiet {
                println!("{:7.2} s  {fault:?}", start.elapsed().as_secs_f64());
            }
            let name = format!("{fault:?}");
            let name = name.split('(').next().unwrap_or_default().to_owned();
            *self.counts.entry(name).or_default() += 1;
            self.befall(fault);
            self.consumers.revive();
        }
    }

    fn end(&mut self, end: End) -> &mut Postgres {
        match end {
            End::First => &mut self.site.first,
            End::Second => &mut self.site.second,
        }
    }

    fn befall(&mut self, fault: Fault) {
        match fault {
            Fault::KillConsumer(index) => self.consumers.kill(index),
            Fault::FreezeConsumer(index, time) => {
                self.consumers.freeze(index);
                std::thread::sleep(time);
                self.consumers.thaw();
                std::thread::sleep(time);
                self.consumers.end_frozen();
            }
            Fault::KillWorker => {
                let pids = process::pids_in(self.site.first.data_dir());
                let worker = pids
                    .into_iter()
                    .find(|pid| process::title(*pid).contains("outbox_relay worker"));
                if let Some(pid) = worker {
                    process::signal(pid, Signal::SIGKILL);
                }
            }
            Fault::KillSessions(end) => {
                // A server that is just starting cannot be asked.
                let client = self.end(end).config(USER, DB).connect(NoTls);
                let terminate = "select pg_terminate_backend(pid) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()";
                let _ = client.and_then(|mut client| client.batch_execute(terminate));
            }
            Fault::KillPostmaster(end, time) => {
                self.end(end).kill9();
                self.start_later(end, time);
            }
            Fault::Crash(end, time) => {
                self.end(end).crash();
                self.start_later(end, time);
            }
            Fault::StopImmediately(end, time) => {
                self.end(end).stop(Mode::Immediate);
                self.start_later(end, time);
            }
            Fault::Restart(end) => self.end(end).restart(),
            Fault::KillRedis(time) => {
                self.site.redis.kill9();
                std::thread::sleep(time);
                self.site.redis.start_again();
            }
            Fault::FreezeRedis(time) => {
                self.site.redis.sigstop();
                std::thread::sleep(time);
                self.site.redis.sigcont();
            }
        }
    }

    fn start_later(&mut self, end: End, time: Duration) {
        std::thread::sleep(time);
        self.end(end).start_again();
    }

    /// Ends all faults. A server whose worker was killed may still be recovering.
    pub(super) fn repair(&mut self) {
        for server in [&self.site.first, &self.site.second] {
            let connects = || server.config(USER, DB).connect(NoTls).is_ok();
            wait_until("a server to take connections", connects);
        }
        self.consumers.end_frozen();
        self.consumers.revive();
    }

    pub(super) fn told(&self) -> String {
        let counts: Vec<String> = self
            .counts
            .iter()
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        counts.join(", ")
    }
}
