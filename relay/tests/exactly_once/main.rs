//! exactly_once against models of Postgres and Redis, over random schedules: crashes of worker and server, connections
//! that end anywhere and whose commands arrive late, refusals, and a Redis that loses what it had acknowledged.
//!
//! `SEED=n` replays a schedule and tells what happens, `SCHEDULES=n` runs so many, from `FIRST=n` on.

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

/// The first thing that the oracle says about a worker that is wrong, where these things happen.
fn said_of(mutant: Mutant, mutation: Option<Mutation>, faults: Faults) -> String {
    mutate(mutation);
    caught(10_000, |seed| {
        let mut world = World::new(seed, mutant);
        world.env.faults = faults;
        world.env.on_missing = OnMissing::Continue;
        world.run().map(drop)
    })
}

macro_rules! catches {
    ($($(#[$meta:meta])* $name:ident: $mutant:ident, { $($fault:ident: $often:expr),* }, $says:expr;)*) => {$(
        $(#[$meta])*
        #[test]
        fn $name() {
            let said = said_of(Mutant::$mutant, None, Faults { $($fault: $often,)* ..Faults::NONE });
            assert!($says.iter().any(|says| said.contains(says)), "{said}");
        }
    )*};
}

catches! {
    the_oracle_catches_a_sender_that_goes_on_before_refusals_are_saved:
        ResumesUnsaved, { troubled: 0.1, crashes: 0.1 }, ["is lost", "which is nowhere"];
    the_oracle_catches_a_sender_that_goes_on_before_refusals_are_durable:
        ResumesUnflushed, { troubled: 0.1, server_crashes: 0.5 }, ["is lost", "which is nowhere", "times in its stream", "comes after"];
    the_oracle_catches_a_wrong_previous_position: WrongPrevious, { troubled: 0.1, crashes: 0.1 }, ["is lost", "which is nowhere"];
    the_oracle_catches_waiting_events_that_the_guard_does_not_name:
        ForgetsAgain, { troubled: 0.1, crashes: 0.1, trims: 0.3 }, ["times in its stream", "which is nowhere"];
    the_oracle_catches_a_last_batch_that_is_not_looked_for:
        AdoptsUnsettled, { troubled: 0.1, crashes: 0.1 }, ["is lost", "which is nowhere"];
    the_oracle_catches_a_missing_guard_without_comparing:
        ComparesNothing, { crashes: 0.05, guard_losses: 0.02 }, ["times in its stream"];
    the_oracle_catches_healing_that_does_not_look_for_what_is_written_down:
        ReadsBlindly, { troubled: 0.1, tail_losses: 0.02 }, ["times in its stream", "has failed and is in its stream"];
    the_oracle_catches_healing_that_forgets_what_had_waited:
        ForgetsAccepted, { troubled: 0.1, tail_losses: 0.02 }, ["is lost"];
    the_oracle_catches_trust_in_another_history: TrustsAnyHistory, { promotions: 0.05 }, ["is lost", "which is nowhere", "times in its stream"];
    the_oracle_catches_a_take_over_that_believes_any_guard:
        TakesOverBlindly, { promotions: 0.05 }, ["is lost", "which is nowhere", "times in its stream"];
    the_oracle_catches_a_dump_of_which_nothing_is_looked_for:
        SendsRestored, { restores: 0.2, crashes: 0.05 }, ["times in its stream"];
    the_oracle_catches_healing_that_forgets_what_a_dump_has_brought:
        ForgetsRestores, { restores: 0.2, tail_losses: 0.02 }, ["times in its stream"];
    the_oracle_catches_copies_that_take_over: CopiesTakeOver, { clones: 0.05, crashes: 0.05 }, ["is in no history", "is lost", "never committed", "times in its stream", "which is nowhere"];
    the_oracle_catches_a_batch_before_what_the_guard_said_is_durable:
        ComesUpUnflushed, { server_crashes: 1.0, guard_losses: 0.03 }, ["is lost", "times in its stream", "which is nowhere"];
    the_oracle_catches_what_is_sent_before_it_is_durable: SkipsFlush, { server_crashes: 0.5 }, ["never committed", "is in no history", "is lost", "which is nowhere"];
    the_oracle_catches_a_batch_behind_what_is_not_durable:
        ParksUnflushed, { troubled: 0.1, server_crashes: 0.5 }, ["is lost", "which is nowhere", "times in its stream", "nothing is due"];
}

/// The same for a backend of a cluster.
fn said_of_cluster(mutant: Mutant, faults: Faults) -> String {
    mutate(None);
    caught(10_000, |seed| {
        let mut world = World::cluster(seed, mutant);
        world.env.faults = faults;
        world.env.on_missing = OnMissing::Continue;
        world.run().map(drop)
    })
}

#[test]
fn the_oracle_catches_a_lane_that_begins_at_the_newest_tick() {
    let said = said_of_cluster(Mutant::LaneBeginsAtNewest, Faults::NONE);
    assert!(said.contains("is lost") || said.contains("which is nowhere"), "{said}");
}

#[test]
fn the_oracle_catches_a_finder_that_goes_on_before_its_lane_is_saved() {
    let crashes = Faults {
        crashes: 0.05,
        ..Faults::NONE
    };
    let said = said_of_cluster(Mutant::LaneIsNotSaved, crashes);
    assert!(said.contains("which has no lane"), "{said}");
}

#[test]
fn the_oracle_catches_retention_that_forgets_the_lanes() {
    let purges = Faults {
        purges: 0.2,
        cuts: 0.1,
        ..Faults::NONE
    };
    let said = said_of_cluster(Mutant::PurgesWithoutLanes, purges);
    assert!(said.contains("was purged, and is lost"), "{said}");
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

/// Clients flap between two histories of Redis, and replies are lost meanwhile. Each goes on from where it was left.
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

/// Each master fails over for itself.
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

/// One lane has looked for what a dump has brought, others have not, and its master fails over.
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

/// The standby of a server with lanes is promoted, and has some of them; what was the primary goes on, is frozen or
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

const PROMOTIONS: Faults = Faults {
    promotions: 0.05,
    ..Faults::NONE
};

#[test]
fn the_oracle_catches_a_lane_that_compares_for_all_after_a_promotion() {
    let said = said_of_cluster(Mutant::OneLaneComparesForAll, PROMOTIONS);
    let says = ["is lost", "which is nowhere", "times in its stream"];
    assert!(says.iter().any(|says| said.contains(says)), "{said}");
}

#[test]
fn the_oracle_catches_a_lane_made_after_a_promotion_that_compares_nothing() {
    let said = said_of_cluster(Mutant::NewLaneComparesNothing, PROMOTIONS);
    assert!(said.contains("times in its stream"), "{said}");
}

#[test]
fn the_oracle_catches_a_take_over_of_lanes_that_believes_any_guard() {
    let said = said_of_cluster(Mutant::TakesOverBlindly, PROMOTIONS);
    let says = ["is lost", "which is nowhere", "times in its stream"];
    assert!(says.iter().any(|says| said.contains(says)), "{said}");
}

#[test]
fn the_oracle_catches_a_copy_whose_lanes_take_over() {
    let faults = Faults {
        clones: 0.05,
        crashes: 0.05,
        ..Faults::NONE
    };
    let said = said_of_cluster(Mutant::CopiesTakeOver, faults);
    let says = [
        "is in no history",
        "is lost",
        "never committed",
        "times in its stream",
        "which is nowhere",
    ];
    assert!(says.iter().any(|says| said.contains(says)), "{said}");
}

/// Mutations of the conversation and of recovery themselves; see `relay::fault`.
#[cfg(feature = "faults")]
mod mutated {
    use super::*;

    const CRASHES: Faults = Faults {
        cuts: 0.1,
        crashes: 0.1,
        ..Faults::NONE
    };

    const CRASHES_ALONE: Faults = Faults {
        crashes: 0.05,
        ..Faults::NONE
    };

    #[test]
    fn the_oracle_catches_a_guard_that_is_ignored() {
        let said = said_of(Mutant::None, Some(Mutation::IgnoreGuard), CRASHES_ALONE);
        assert!(said.contains("times in its stream"), "{said}");
    }

    /// The guard would set it right.
    #[test]
    fn the_oracle_catches_a_cursor_ahead_of_what_was_acknowledged() {
        let said = said_of(Mutant::SavesAhead, Some(Mutation::IgnoreGuard), CRASHES_ALONE);
        assert!(
            said.contains("which is nowhere") || said.contains("times in its stream"),
            "{said}"
        );
    }

    /// Redis is back with what it had lost, and then without it again.
    #[test]
    fn the_oracle_catches_a_loss_that_goes_on_with_an_old_number() {
        let said = said_of(Mutant::None, Some(Mutation::KeepOldNumber), FLIPS);
        assert!(
            said.contains("is lost") || said.contains("times in its stream"),
            "{said}"
        );
    }

    #[test]
    fn the_oracle_catches_an_exec_before_the_token_was_read() {
        let said = said_of(Mutant::None, Some(Mutation::TwoExecs), CRASHES);
        assert!(said.contains("behind a newer claim"), "{said}");
    }

    #[test]
    fn the_oracle_catches_appending_without_a_fence() {
        let said = said_of(Mutant::None, Some(Mutation::NoWatch), CRASHES);
        assert!(said.contains("behind a newer claim"), "{said}");
    }

    #[test]
    fn the_oracle_catches_an_error_taken_for_success() {
        let faults = Faults {
            troubled: 0.1,
            ..Faults::NONE
        };
        let said = said_of(Mutant::None, Some(Mutation::IgnoreErrorReply), faults);
        assert!(said.contains("is lost") || said.contains("which is nowhere"), "{said}");
    }
}

#[cfg(feature = "faults")]
fn mutate(mutation: Option<Mutation>) {
    relay::fault::mutate(mutation);
}

#[cfg(not(feature = "faults"))]
fn mutate(_mutation: Option<Mutation>) {}
