//! exactly_once against models of Postgres and Redis, over random schedules: crashes of worker and server, connections
//! that end anywhere and whose commands arrive late, refusals, and a Redis that loses what it had acknowledged.
//!
//! `SEED=n` replays a schedule and prints what happens; `SCHEDULES=n` runs n schedules, beginning with `FIRST=n`.

mod env;
mod lane;
#[path = "../model/mod.rs"]
mod model;
mod oracle;
mod reading;
mod recovery;
mod site;
mod tables;
mod world;

use env::{Faults, Mutant, Seen};
use model::{caught, for_each_seed};
use relay::fault::Mutation;
use relay::guard::claim::OnMissing;
use std::cell::RefCell;
use world::World;

fn schedule(seed: u64) -> Result<Seen, String> {
    World::new(seed, Mutant::None).run()
}

#[test]
fn an_event_stands_in_its_stream_exactly_once() {
    mutate(None);
    let all = RefCell::new(Seen::default());
    for_each_seed(1_500, |seed| {
        *all.borrow_mut() += schedule(seed)?;
        Ok(())
    });
    let seen = all.borrow();
    let enough = seen.is_lively() || std::env::var_os("SEED").is_some();
    assert!(enough, "too tame: {seen:?}");
    if std::env::var_os("SCHEDULES").is_some() {
        eprintln!("{seen:?}");
    }
}

/// Nothing is refused, so nothing may fail or wait.
#[test]
fn losses_and_crashes_fail_nothing() {
    mutate(None);
    for_each_seed(300, |seed| {
        let mut world = World::new(seed, Mutant::None);
        world.env.faults = Faults {
            out_of_memory: 0.02,
            cuts: 0.05,
            crashes: 0.02,
            server_crashes: 0.1,
            tail_losses: 0.01,
            ..Faults::NONE
        };
        let seen = world.run()?;
        let untouched = seen.parked == 0 && seen.failed == 0 && seen.retries == 0;
        untouched.then_some(()).ok_or(format!("{seen:?}"))
    });
}

/// What the oracle first reports about a faulty worker, in a world with these faults.
fn said_of(world: impl Fn(u64) -> World, mutation: Option<Mutation>, faults: Faults) -> String {
    mutate(mutation);
    caught(10_000, |seed| {
        let mut world = world(seed);
        world.env.faults = faults;
        world.env.on_missing = OnMissing::Continue;
        world.run().map(drop)
    })
}

/// Tests that the oracle reports a fault put into the models (`Mutant`) or into the crate (`Mutation`), for a backend
/// with one guard (`new`) or with lanes (`cluster`).
macro_rules! catches {
    ($($(#[$meta:meta])*
    $name:ident: $world:ident($mutant:ident $(, $mutation:ident)?), { $($fault:ident: $often:expr),* }, $says:expr;)*) => {$(
        $(#[$meta])*
        #[test]
        fn $name() {
            let mutation = None$(.or(Some(Mutation::$mutation)))?;
            let faults = Faults { $($fault: $often,)* ..Faults::NONE };
            let said = said_of(|seed| World::$world(seed, Mutant::$mutant), mutation, faults);
            assert!($says.iter().any(|says| said.contains(says)), "{said}");
        }
    )*};
}

catches! {
    the_oracle_catches_a_sender_that_goes_on_before_refusals_are_saved:
        new(ResumesUnsaved), { troubled: 0.1, crashes: 0.1 }, ["is lost", "which is nowhere", "comes after"];
    the_oracle_catches_a_sender_that_goes_on_before_refusals_are_durable:
        new(ResumesUnflushed), { troubled: 0.1, server_crashes: 0.5 }, ["is lost", "which is nowhere", "times in its stream", "comes after"];
    the_oracle_catches_a_wrong_previous_position: new(WrongPrevious), { troubled: 0.1, crashes: 0.1 }, ["is lost", "which is nowhere"];
    the_oracle_catches_waiting_events_that_the_guard_does_not_name:
        new(ForgetsAgain), { troubled: 0.1, crashes: 0.1, trims: 0.3 }, ["times in its stream", "which is nowhere"];
    the_oracle_catches_a_last_batch_that_is_not_looked_for:
        new(AdoptsUnsettled), { troubled: 0.1, crashes: 0.1 }, ["is lost", "which is nowhere"];
    the_oracle_catches_a_missing_guard_without_comparing:
        new(ComparesNothing), { crashes: 0.05, guard_losses: 0.02 }, ["times in its stream"];
    the_oracle_catches_healing_that_does_not_look_for_what_is_written_down:
        new(ReadsBlindly), { troubled: 0.1, tail_losses: 0.02 }, ["times in its stream", "has failed and is in its stream"];
    the_oracle_catches_healing_that_forgets_what_had_waited:
        new(ForgetsAccepted), { troubled: 0.1, tail_losses: 0.02 }, ["is lost"];
    the_oracle_catches_trust_in_another_history: new(TrustsAnyHistory), { promotions: 0.05 }, ["is lost", "which is nowhere", "times in its stream"];
    the_oracle_catches_a_take_over_that_believes_any_guard:
        new(TakesOverBlindly), { promotions: 0.05 }, ["is lost", "which is nowhere", "times in its stream"];
    the_oracle_catches_a_dump_of_which_nothing_is_looked_for:
        new(SendsRestored), { restores: 0.2, crashes: 0.05 }, ["times in its stream"];
    the_oracle_catches_healing_that_forgets_what_a_dump_has_brought:
        new(ForgetsRestores), { restores: 0.2, tail_losses: 0.02 }, ["times in its stream"];
    the_oracle_catches_copies_that_take_over: new(CopiesTakeOver), { clones: 0.05, crashes: 0.05 }, ["is in no history", "is lost", "never committed", "times in its stream", "which is nowhere"];
    the_oracle_catches_a_batch_before_what_the_guard_said_is_durable:
        new(ComesUpUnflushed), { server_crashes: 1.0, guard_losses: 0.03 }, ["is lost", "times in its stream", "which is nowhere"];
    the_oracle_catches_what_is_sent_before_it_is_durable: new(SkipsFlush), { server_crashes: 0.5 }, ["never committed", "is in no history", "is lost", "which is nowhere"];
    the_oracle_catches_a_batch_behind_what_is_not_durable:
        new(ParksUnflushed), { troubled: 0.1, server_crashes: 0.5 }, ["is lost", "which is nowhere", "times in its stream", "nothing is due"];

    the_oracle_catches_a_lane_that_begins_at_the_newest_tick: cluster(LaneBeginsAtNewest), {}, ["is lost", "which is nowhere"];
    the_oracle_catches_a_finder_that_goes_on_before_its_lane_is_saved: cluster(LaneIsNotSaved), { crashes: 0.05 }, ["which has no lane"];
    the_oracle_catches_retention_that_forgets_the_lanes:
        cluster(PurgesWithoutLanes), { purges: 0.2, cuts: 0.1 }, ["was purged, and is lost"];
    the_oracle_catches_a_lane_that_does_not_send_and_passes_its_own_row:
        cluster(PassesItsOwn), { cuts: 0.05 }, ["is lost", "which is nowhere", "which has no lane"];
    the_oracle_catches_a_lane_that_is_given_up_with_events_to_send:
        cluster(GivesUpAnyLane), { cuts: 0.05 }, ["is lost", "which is nowhere", "does not cover"];
    the_oracle_catches_a_former_lane_that_forgets_what_it_has_sent:
        cluster(FormerLaneBeginsAtFinder), { cuts: 0.05 }, ["times in its stream"];
    the_oracle_catches_a_lane_that_compares_for_all_after_a_promotion:
        cluster(OneLaneComparesForAll), { promotions: 0.05 }, ["is lost", "which is nowhere", "times in its stream"];
    the_oracle_catches_a_lane_made_after_a_promotion_that_compares_nothing:
        cluster(NewLaneComparesNothing), { promotions: 0.05 }, ["times in its stream"];
    the_oracle_catches_a_take_over_of_lanes_that_believes_any_guard:
        cluster(TakesOverBlindly), { promotions: 0.05 }, ["is lost", "which is nowhere", "times in its stream"];
    the_oracle_catches_a_copy_whose_lanes_take_over: cluster(CopiesTakeOver), { clones: 0.05, crashes: 0.05 }, ["is in no history", "is lost", "never committed", "times in its stream", "which is nowhere"];
}

#[test]
fn the_oracle_catches_a_comparison_that_ends_before_its_limit() {
    mutate(None);
    let said = caught(10_000, |seed| {
        let mut world = World::new(seed, Mutant::ComparesLess);
        world.env.faults = Faults {
            crashes: 0.05,
            guard_losses: 0.02,
            ..Faults::NONE
        };
        (world.env.on_missing, world.env.most_compared) = (OnMissing::Continue, 8);
        world.run().map(drop)
    });
    assert!(said.contains("times in its stream"), "{said}");
}

/// Clients alternate between two histories of Redis, and replies are lost meanwhile. Each history continues where it
/// was left.
#[test]
fn a_redis_with_two_histories_loses_and_repeats_nothing() {
    mutate(None);
    for_each_seed(1_000, |seed| {
        let mut world = World::new(seed, Mutant::None);
        world.env.faults = FLIPS;
        world.run().map(drop)
    });
}

const FLIPS: Faults = Faults {
    cuts: 0.03,
    crashes: 0.02,
    flips: 0.1,
    ..Faults::NONE
};

/// Each master fails over separately.
#[test]
fn a_cluster_whose_masters_fail_over_loses_and_repeats_nothing() {
    mutate(None);
    for_each_seed(300, |seed| {
        let mut world = World::cluster(seed, Mutant::None);
        world.env.faults = Faults {
            cuts: 0.05,
            crashes: 0.02,
            server_crashes: 0.1,
            aborts: 0.2,
            tail_losses: 0.02,
            ..Faults::NONE
        };
        world.run().map(drop)
    });
}

/// One lane has looked in Redis for the events of a dump, other lanes have not, and its master fails over.
#[test]
fn a_cluster_that_restores_a_dump_loses_and_repeats_nothing() {
    mutate(None);
    for_each_seed(300, |seed| {
        let mut world = World::cluster(seed, Mutant::None);
        world.env.faults = Faults {
            cuts: 0.05,
            restores: 0.2,
            tail_losses: 0.05,
            ..Faults::NONE
        };
        world.run().map(drop)
    });
}

/// The standby of a server with lanes is promoted and has some of the lanes; the old primary continues, is frozen or is
/// gone. Each lane finds a guard of another history.
#[test]
fn a_promoted_standby_of_a_cluster_loses_and_repeats_nothing() {
    mutate(None);
    let all = RefCell::new(Seen::default());
    for_each_seed(600, |seed| {
        let mut world = World::cluster(seed, Mutant::None);
        world.env.faults = Faults {
            cuts: 0.05,
            crashes: 0.02,
            aborts: 0.1,
            promotions: 0.05,
            clones: 0.02,
            ..Faults::NONE
        };
        *all.borrow_mut() += world.run()?;
        Ok(())
    });
    let seen = all.borrow();
    let is_lively = seen.promoted_clusters > 0 && seen.other_histories > 0 && seen.copied_lanes_held_off > 0;
    let enough = is_lively || std::env::var_os("SEED").is_some();
    assert!(enough, "too tame: {seen:?}");
}

/// Mutations of the conversation and of recovery themselves; see `relay::fault`.
#[cfg(feature = "faults")]
mod mutated {
    use super::*;

    catches! {
        the_oracle_catches_a_guard_that_is_ignored: new(None, IgnoreGuard), { crashes: 0.05 }, ["times in its stream"];
        /// With the guard, the error would have no effect.
        the_oracle_catches_a_cursor_ahead_of_what_was_acknowledged:
            new(SavesAhead, IgnoreGuard), { crashes: 0.05 }, ["which is nowhere", "times in its stream"];
        /// Redis is back with entries that it had lost, and then without them again.
        the_oracle_catches_a_loss_that_goes_on_with_an_old_number:
            new(None, KeepOldNumber), { cuts: 0.03, crashes: 0.02, flips: 0.1 }, ["is lost", "times in its stream"];
        the_oracle_catches_an_exec_before_the_token_was_read: new(None, TwoExecs), { cuts: 0.1, crashes: 0.1 }, ["behind a newer claim"];
        the_oracle_catches_appending_without_a_fence: new(None, NoWatch), { cuts: 0.1, crashes: 0.1 }, ["behind a newer claim"];
        the_oracle_catches_an_error_taken_for_success: new(None, IgnoreErrorReply), { troubled: 0.1 }, ["is lost", "which is nowhere"];
    }
}

#[cfg(feature = "faults")]
fn mutate(mutation: Option<Mutation>) {
    relay::fault::mutate(mutation);
}

#[cfg(not(feature = "faults"))]
fn mutate(_mutation: Option<Mutation>) {}
