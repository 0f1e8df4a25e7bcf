//! Models of Postgres and Redis, and the code that runs thousands of random schedules over them, each from a seed that
//! can be replayed.

// Each test uses only a part.
#![allow(dead_code, unused_imports)]

pub(crate) mod connection;
pub(crate) mod database;
pub(crate) mod redis;
pub(crate) mod transaction;
pub(crate) mod view;

pub(crate) use database::{Database, Numbering, READINGS, Reading};
pub(crate) use fastrand::Rng;
pub(crate) use view::{Rows, View};

use relay::failure::{Class, Failure};
use std::env;
use std::panic::{self, AssertUnwindSafe};

pub(crate) fn wrong_type() -> Failure {
    Failure::new(
        Class::Event,
        "WRONGTYPE Operation against a key holding the wrong kind of value",
    )
}

pub(crate) fn out_of_memory() -> Failure {
    Failure::backend("OOM command not allowed")
}

/// Something happens with this probability.
pub(crate) fn likely(rng: &mut Rng, probability: f64) -> bool {
    rng.f64() < probability
}

/// Runs a schedule for each of the first `count` seeds. `SEED=n` runs only this seed, `SCHEDULES=n` runs n, beginning
/// with `FIRST=n`.
pub(crate) fn for_each_seed(count: u64, schedule: impl Fn(u64) -> Result<(), String>) {
    let number = |name| env::var(name).ok().map(|v| v.parse::<u64>().expect("a number"));
    let seeds = match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let first = number("FIRST").unwrap_or(0);
            first..first + number("SCHEDULES").unwrap_or(count)
        }
    };
    for seed in seeds {
        let replay = format!("replay it with SEED={seed}");
        match panic::catch_unwind(AssertUnwindSafe(|| schedule(seed))) {
            Ok(Ok(())) => {}
            Ok(Err(violation)) => panic!("{violation}\n{replay}"),
            Err(panicked) => {
                eprintln!("{replay}");
                panic::resume_unwind(panicked);
            }
        }
    }
}

/// The first violation that a mutant shows within `count` seeds; the tests assert that there is one.
pub(crate) fn caught<V>(count: u64, schedule: impl Fn(u64) -> Result<(), V>) -> V {
    let caught = (0..count).find_map(|seed| schedule(seed).err());
    caught.unwrap_or_else(|| panic!("not caught within {count} schedules"))
}
