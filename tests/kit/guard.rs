//! The guard of a backend in Redis, and workers that die and come back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ::redis::cmd;

use crate::wait::{LIMIT, eventually};
use crate::{Postgres, Redis, Stack};

/// Streams that are never trimmed: each entry counts.
pub const UNTRIMMED: (&str, &str) = ("outbox_relay.redis_max_len", "0");

/// The fields of a guard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard(pub BTreeMap<String, String>);

impl Guard {
    #[track_caller]
    pub fn field(&self, name: &str) -> &str {
        match self.0.get(name) {
            Some(value) => value,
            None => panic!("no field {name} in {self:?}"),
        }
    }

    /// A field that is a number.
    #[track_caller]
    pub fn number(&self, name: &str) -> u64 {
        let text = self.field(name);
        text.parse()
            .unwrap_or_else(|_| panic!("{name} of the guard is no number: {text:?}"))
    }
}

impl Redis {
    /// The guard at this key, if there is one.
    #[track_caller]
    pub fn guard(&self, key: &str) -> Option<Guard> {
        let fields: BTreeMap<String, String> = cmd("HGETALL")
            .arg(key)
            .query(&mut self.conn())
            .unwrap_or_else(|error| panic!("cannot read the guard {key}: {error}"));
        (!fields.is_empty()).then_some(Guard(fields))
    }
}

impl Stack {
    /// The key of the guard of the backend `default`.
    #[track_caller]
    pub fn guard_key(&self) -> String {
        self.pg.one("select outbox.guard_key('default')")
    }

    /// The guard of the backend `default`, which must exist.
    #[track_caller]
    pub fn guard(&self) -> Guard {
        let key = self.guard_key();
        self.redis
            .guard(&key)
            .unwrap_or_else(|| panic!("there is no guard {key}"))
    }
}

impl Postgres {
    /// Waits until the database `postgres` has another worker than `old`. Returns how long that took.
    #[track_caller]
    pub fn wait_new_worker(&self, old: i32) -> Duration {
        let start = Instant::now();
        eventually("another worker", LIMIT, || {
            self.worker_pid(crate::postgres::DB).filter(|pid| *pid != old)
        });
        start.elapsed()
    }

    /// Waits until the server, which ends all sessions after a crash and recovers, accepts connections again. `mark`:
    /// `log().len()` before the crash.
    #[track_caller]
    pub fn wait_recovered(&self, mark: usize) {
        self.wait_log_after(mark, "all server processes terminated; reinitializing");
        self.wait_log_after(mark, "database system is ready to accept connections");
    }

    /// SIGKILL to the worker of the database `postgres`, which makes the server restart.
    #[track_caller]
    pub fn kill_worker(&self) {
        let mark = self.log().len();
        crate::process::signal(self.wait_worker(crate::postgres::DB), nix::sys::signal::Signal::SIGKILL);
        self.wait_recovered(mark);
    }
}
