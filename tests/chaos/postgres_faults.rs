//! Faults of Postgres.

use std::time::{Duration, Instant};

use kit::postgres::{DB, USER};
use kit::{LIMIT, Mode, process};
use nix::sys::signal::Signal;
use postgres::{Client, Error, NoTls};

use crate::nemesis::Repair;
use crate::plan::Fault;
use crate::site::Site;

type Lasting = Option<(Duration, Repair)>;

/// Does something in a session of its own; repeats it if the server was just starting.
pub(crate) fn with_client<T>(site: &Site, what: &str, mut deed: impl FnMut(&mut Client) -> Result<T, Error>) -> T {
    let config = site.pg.config(USER, DB);
    let deadline = Instant::now() + LIMIT * 2;
    loop {
        let outcome = config.connect(NoTls).and_then(|mut client| {
            client.batch_execute("set statement_timeout = '5s'")?;
            deed(&mut client)
        });
        match outcome {
            Ok(value) => return value,
            Err(error) if Instant::now() >= deadline => panic!("cannot {what}: {error:?}"),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

pub(crate) fn sql(site: &Site, sql: &str) {
    with_client(site, sql, |client| client.batch_execute(sql));
}

pub(crate) fn befall(site: &mut Site, fault: Fault) -> Lasting {
    match fault {
        Fault::KillWorker => signal_worker(site, Signal::SIGKILL),
        Fault::TerminateWorker => signal_worker(site, Signal::SIGTERM),
        Fault::FreezeWorker(time) => {
            let pid = worker(site)?;
            process::signal(pid, Signal::SIGSTOP);
            return Some((time, Repair::ThawWorker(pid)));
        }
        Fault::KillSession => {
            if let Some(pid) = sessions(site, 1).first() {
                process::signal(*pid, Signal::SIGKILL);
            }
        }
        Fault::TerminateSessions(count) => {
            for pid in sessions(site, count) {
                process::signal(pid, Signal::SIGTERM);
            }
        }
        Fault::KillPostmaster => {
            site.pg.kill9();
            site.pg.start_again();
        }
        Fault::StopImmediately => {
            site.pg.stop(Mode::Immediate);
            site.pg.start_again();
        }
        Fault::Restart => site.pg.restart(),
        Fault::Crash => {
            site.pg.crash();
            site.pg.start_again();
        }
        // A library without fault points is killed at any point.
        Fault::CrashAt(_) | Fault::KillAt(_) if !site.faults => signal_worker(site, Signal::SIGKILL),
        Fault::HoldAt(_, time) if !site.faults => return befall(site, Fault::FreezeWorker(time)),
        Fault::CrashAt(point) => site.pg.crash_at(point),
        Fault::HoldAt(point, time) => {
            site.pg.hold_at(point);
            return Some((time, Repair::Release));
        }
        Fault::KillAt(point) => {
            site.pg.hold_at(point);
            std::thread::sleep(Duration::from_millis(300));
            signal_worker(site, Signal::SIGKILL);
            site.pg.release();
        }
        _ => unreachable!("{fault:?} is none of Postgres"),
    }
    None
}

pub(crate) fn repair(site: &Site, repair: Repair) {
    match repair {
        Repair::ThawWorker(pid) => process::signal(pid, Signal::SIGCONT),
        Repair::Release if site.faults => site.pg.release(),
        Repair::Release => {}
        _ => unreachable!("{repair:?} is none of Postgres"),
    }
}

fn signal_worker(site: &Site, signal: Signal) {
    if let Some(pid) = worker(site) {
        process::signal(pid, signal);
    }
}

/// `None`: there is no worker for a while, because the relay is switched off.
fn worker(site: &Site) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        let found = with_client(site, "find the worker", |client| {
            client.query_opt(
                "select pid from pg_catalog.pg_stat_activity where backend_type = 'outbox_relay worker'",
                &[],
            )
        });
        if found.is_some() || Instant::now() >= deadline {
            return found.map(|row| row.get(0));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Some sessions of publishers.
fn sessions(site: &Site, count: u64) -> Vec<i32> {
    let count = i64::try_from(count).expect("a small number");
    with_client(site, "find publishers", |client| {
        let rows = client.query(
            "select pid from pg_catalog.pg_stat_activity where application_name = 'publisher' order by backend_start limit $1",
            &[&count],
        )?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    })
}
