//! The delivery (at_least_once) against models of Postgres and Redis, over random schedules with outages, refusals and
//! crashes.

#[path = "../model/mod.rs"]
mod model;
mod oracle;
mod redis;
mod sender;
mod tables;
mod worker;
mod world;

use model::{Database, Rng, Rows, caught, for_each_seed, likely, out_of_memory, wrong_type};
use redis::{Command, Connection, Redis, Sent};
use relay::delivery::backoff::Backoff;
use relay::delivery::batch::{BuiltBatch, OpenBatch};
use relay::delivery::cut::{Backends, Collector, Limits, NotEncoded, Offer, Pass, Source};
use relay::delivery::flight::{BatchedEvent, Contents, PIPELINED_BATCHES, Refusal, WINDOW_BATCHES, is_backends};
use relay::delivery::refusal::{Record, Retry, Streams};
use relay::delivery::{Cursor, Delivery, Guarantee};
use relay::failure::{Class, Failure};
use relay::reading::range::Position;
use relay::reading::role::Role;
use relay::reading::schedule::{Group, Way};
use relay::reading::snapshot::Tick;
use relay::sender::orders::Report;
use relay::time::Now;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::ops::AddAssign;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tables::Tables;
use world::{Faults, Mutant, Seen, World, delivery};

/// The number of the model's backend.
const NUMBER: i32 = 1;
/// A 256th of the real sizes.
const WINDOW_BYTES: usize = 8 * 1024;
const BATCH_BYTES: usize = 1024;
const STREAMS: u8 = 5;

fn name(stream: u8) -> Rc<str> {
    Rc::from(format!("stream-{stream}"))
}

/// Prints what happens when a single schedule is replayed.
macro_rules! tell {
    ($world:expr, $($text:tt)*) => {
        if $world.tells {
            eprintln!($($text)*);
        }
    };
}
pub(crate) use tell;

/// The room that an event takes on its way: mostly little, sometimes much, or more than a window.
fn bytes(seq: i64) -> usize {
    match seq % 97 {
        13 | 57 => 2_800,
        31 => 12 * 1024,
        n => 1 + n as usize / 50,
    }
}

fn schedule(seed: u64, mutant: Mutant) -> Result<Seen, String> {
    run_world(World::new(seed, mutant))
}

fn run_world(mut world: World) -> Result<Seen, String> {
    run(&mut world).map_err(|e| format!("{e}\n{:?}", world.faults))?;
    Ok(world.seen)
}

fn run(world: &mut World) -> Result<(), String> {
    for _ in 0..world.rng.usize(20..600) {
        world.random_step()?;
    }
    world.check_cursor()?;
    world.finish()?;
    world.check_end()
}

#[test]
fn loses_and_repeats_nothing() {
    let all = RefCell::new(Seen::default());
    for_each_seed(2_000, |seed| {
        *all.borrow_mut() += schedule(seed, Mutant::None)?;
        Ok(())
    });
    let seen = *all.borrow();
    let counts = [
        seen.parked,
        seen.skipped,
        seen.failed,
        seen.failed_streams,
        seen.accepted_after_waiting,
        seen.lost_in_mid_batch,
        seen.crashes,
        seen.full_windows,
        seen.late,
    ];
    let enough = counts.iter().all(|count| *count > 0) || std::env::var_os("SEED").is_some();
    assert!(enough, "too tame: {seen:?}");
}

/// What the oracle first reports about a faulty worker.
fn said_of(mutant: Mutant) -> String {
    caught(300, |seed| schedule(seed, mutant).map(drop))
}

#[test]
fn the_oracle_catches_a_cursor_ahead_of_what_was_acknowledged() {
    let said = said_of(Mutant::SavesRead);
    assert!(said.contains("which is nowhere"), "{said}");
}

#[test]
fn the_oracle_catches_a_cursor_ahead_of_the_records() {
    let said = said_of(Mutant::SavesBeforeRecords);
    assert!(said.contains("which is nowhere"), "{said}");
}

#[test]
fn the_oracle_catches_refused_events_that_are_not_written_down() {
    let said = said_of(Mutant::ForgetsRefused);
    assert!(said.contains("is nowhere"), "{said}");
}

#[test]
fn the_oracle_catches_waiting_events_that_are_not_written_down() {
    let said = said_of(Mutant::ForgetsParked);
    assert!(said.contains("is nowhere"), "{said}");
}

#[test]
fn the_oracle_catches_waiting_events_that_are_written_down_before_the_first() {
    let said = caught(2_000, |seed| {
        let mut world = World::new(seed, Mutant::ParksBeforeRecords);
        world.faults = Faults {
            sick: 0.2,
            crashes: 0.03,
            tidy: true,
            ..Faults::NONE
        };
        run_world(world).map(drop)
    });
    assert!(said.contains("comes after"), "{said}");
}

#[test]
fn an_outage_alone_fails_nothing() {
    for_each_seed(300, |seed| {
        let mut world = World::new(seed, Mutant::None);
        world.faults = Faults {
            trouble: 0.1,
            losses: 0.05,
            ..Faults::NONE
        };
        world.redis.fickle = 0.0;
        world.max_attempts = 1;
        let seen = run_world(world)?;
        let untouched = seen.parked == 0 && seen.failed == 0 && seen.failed_streams == 0;
        untouched.then_some(()).ok_or(format!("{seen:?}"))
    });
}

/// Nothing is ever in doubt, so nothing may be repeated, whatever Redis refuses.
#[test]
fn refusals_alone_repeat_nothing() {
    for_each_seed(300, |seed| {
        let mut world = World::new(seed, Mutant::None);
        world.faults = Faults {
            sick: 0.02,
            trouble: 0.1,
            aborts: 0.1,
            ..Faults::NONE
        };
        world.redis.fickle = 0.3;
        run_world(world).map(drop)
    });
}
