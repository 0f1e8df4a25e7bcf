//! Of several servers with the same history that can all reach Redis, one owns the streams: a live owner keeps them,
//! and a dead one is replaced by a server that has its history.

use std::time::{Duration, Instant};

use kit::owners::{PATIENCE, WATCHFUL, delivered, guard, owns, publish, wait_caught_up, wait_fenced, wait_owner};
use kit::{Mode, Postgres, Proxy, Stack, holds_for, ids, standing, wait_drained, wait_eq, wait_until};
use nix::sys::signal::Signal;
use uuid::Uuid;

/// A primary whose first three events are delivered, and a standby that has all of its data.
fn with_standby() -> (Stack, Postgres, Vec<Uuid>) {
    let stack = Stack::with(WATCHFUL);
    let standby = stack.pg.standby().start();
    let common = delivered(&stack, "common");
    wait_caught_up(&stack.pg, &standby);
    // The cursor is saved without waiting for the WAL flush, which follows a moment later.
    wait_drained(&standby, "default");
    (stack, standby, common)
}

#[test]
fn a_promoted_standby_is_fenced_while_the_old_primary_lives_and_says_who_that_is() {
    let (stack, promoted, common) = with_standby();
    promoted.promote();
    let waiting = publish(&promoted, "waits", 2);
    let fenced = wait_fenced(&promoted, &stack.pg);
    assert_eq!(fenced.pending, 2, "{fenced:?}");
    assert!(fenced.will_try_again, "{fenced:?}");
    let system: String = stack.pg.one("select system_identifier::text from pg_control_system()");
    let error = fenced.last_error.expect("an error");
    let said = format!("(system {system}, timeline 1)");
    assert!(error.starts_with("its guard belongs to the server at "), "{error}");
    assert!(error.ends_with(&said), "{error} should end with {said}");

    promoted.wait_log("WARNING:  backend \"default\" is fenced");
    let log = promoted.log();
    let (_, after) = log.split_once("backend \"default\" is fenced").expect("it is there");
    let lines: Vec<&str> = after.lines().skip(1).take(2).collect();
    let detail = format!("DETAIL:  Redis at 127.0.0.1:{}: {error}.", stack.redis.port());
    assert!(lines[0].ends_with(&detail), "{lines:?}");
    assert!(lines[1].contains("HINT:  "), "{lines:?}");
    assert!(lines[1].contains("outbox.take_over()"), "{lines:?}");

    // Meanwhile the owner goes on, and the other server touches nothing, however long it waits.
    let during = delivered(&stack, "during");
    holds_for(2 * PATIENCE, "the old primary owns the guard", || {
        owns(&stack.pg, &stack.redis)
    });
    assert_eq!(ids(&stack.events()), [common, during].concat());
    assert_eq!(standing(&promoted, "default").pending, waiting.len() as i64);
}

#[test]
fn when_the_old_primary_dies_the_promoted_one_takes_over_after_three_intervals() {
    let (mut stack, promoted, common) = with_standby();
    promoted.promote();
    wait_fenced(&promoted, &stack.pg);
    let waiting = publish(&promoted, "waits", 2);
    // Its last refresh of the guard is at most one interval old.
    let death = Instant::now();
    stack.pg.crash();
    let entries = stack.wait_events(5);
    let took = death.elapsed();
    assert!(took > PATIENCE - PATIENCE / 3, "the owner was given up after {took:?}");
    assert!(took < 5 * PATIENCE, "it took {took:?}");
    wait_owner(&promoted, &stack.redis);
    let later = delivered_by(&promoted, &stack, "later");
    assert_eq!(ids(&entries), [common.clone(), waiting.clone()].concat());
    assert_eq!(ids(&stack.events()), [common, waiting, later].concat());
    assert_eq!(guard(&promoted, &stack.redis).expect("a guard").field("timeline"), "2");
}

fn delivered_by(pg: &Postgres, stack: &Stack, prefix: &str) -> Vec<Uuid> {
    let there = stack.events().len();
    let sent = publish(pg, prefix, 3);
    stack.wait_events(there + 3);
    wait_drained(pg, "default");
    sent
}

/// The events that the old primary sent after the promotion are in the stream and in nobody's history: the new owner
/// logs that it continues after another server.
#[test]
fn the_old_primary_comes_back_too_late_and_stays_fenced() {
    let (mut stack, promoted, common) = with_standby();
    promoted.promote();
    let lost = delivered(&stack, "lost");
    wait_fenced(&promoted, &stack.pg);
    stack.pg.crash();
    let after = publish(&promoted, "after", 2);
    stack.wait_events(8);
    promoted.wait_log("WARNING:  backend \"default\" goes on after another history of this database");
    wait_owner(&promoted, &stack.redis);

    stack.pg.start_again();
    wait_fenced(&stack.pg, &promoted);
    let orphaned = publish(&stack.pg, "orphaned", 2);
    // Also when the owner dies or stops in order: this server does not have the owner's history.
    let mut promoted = promoted;
    promoted.crash();
    holds_for(3 * PATIENCE, "the old primary is fenced", || {
        standing(&stack.pg, "default").state == "fenced"
    });
    promoted.start_again();
    let last = delivered_by(&promoted, &stack, "last");
    promoted.stop(Mode::Fast);
    assert_eq!(guard(&stack.pg, &stack.redis).expect("a guard").field("released"), "1");
    stack.pg.restart();
    wait_fenced(&stack.pg, &promoted);
    holds_for(3 * PATIENCE, "the old primary is fenced", || {
        standing(&stack.pg, "default").state == "fenced"
    });
    // And the sent events whose cursor was lost in the crash.
    assert!(standing(&stack.pg, "default").pending >= orphaned.len() as i64);
    assert_eq!(ids(&stack.events()), [common, lost, after, last].concat());
}

/// The primary crashes and restarts before another server takes it for dead.
#[test]
fn the_old_primary_restarts_in_time_and_stays_owner() {
    let (mut stack, promoted, common) = with_standby();
    promoted.promote();
    wait_fenced(&promoted, &stack.pg);
    for round in 0..3 {
        // The guard names the place already before the restarted server claims it.
        let before = stack.guard().field("token").to_owned();
        stack.pg.crash();
        stack.pg.start_again();
        let start = Instant::now();
        wait_until("the restarted server to claim", || {
            stack.guard().field("token") != before
        });
        wait_owner(&stack.pg, &stack.redis);
        let took = start.elapsed();
        assert!(
            took < PATIENCE,
            "round {round}: a restart claims at once, not after {took:?}"
        );
    }
    let after = delivered(&stack, "after");
    wait_fenced(&promoted, &stack.pg);
    assert_eq!(ids(&stack.events()), [common, after].concat());
}

/// However long the original is away: its absence proves nothing to its copies.
#[test]
fn the_restored_server_that_is_told_to_take_over_owns_the_streams() {
    let mut stack = Stack::with(WATCHFUL);
    let common = delivered(&stack, "common");
    let mut clones: Vec<Postgres> = (0..2).map(|_| stack.pg.base_backup().stopped()).collect();
    stack.pg.stop(Mode::Fast);
    clones.iter_mut().for_each(Postgres::start_again);
    for clone in &clones {
        wait_fenced(clone, &stack.pg);
    }
    let (owner, other) = (0, 1);
    let waiting = publish(&clones[other], "waits", 3);
    holds_for(3 * PATIENCE, "nobody appends", || stack.events().len() == 3);
    kit::owners::take_over(&clones[owner]);
    let sent = delivered_by(&clones[owner], &stack, "owner");
    wait_fenced(&clones[other], &clones[owner]);
    holds_for(2 * PATIENCE, "one owns", || owns(&clones[owner], &stack.redis));
    assert_eq!(ids(&stack.events()), [common.clone(), sent.clone()].concat());

    // The owner's run began after the backup: the other server does not know it and waits for take_over(), whatever
    // happens to the owner.
    clones[owner].crash();
    holds_for(3 * PATIENCE, "the other is fenced", || {
        standing(&clones[other], "default").state == "fenced"
    });
    kit::owners::take_over(&clones[other]);
    stack.wait_events(9);
    wait_drained(&clones[other], "default");
    assert_eq!(ids(&stack.events()), [common, sent, waiting].concat());
}

/// The original is alive: both copies are fenced, also the one that was made while it ran.
#[test]
fn copies_of_a_live_owner_are_fenced_however_they_were_made() {
    let mut stack = Stack::with(WATCHFUL);
    let common = delivered(&stack, "common");
    let backup = stack.pg.base_backup().stopped();
    stack.pg.stop(Mode::Fast);
    let copy = Postgres::copy_of(stack.pg.data_dir()).stopped();
    stack.pg.start_again();
    wait_owner(&stack.pg, &stack.redis);
    for mut clone in [backup, copy] {
        clone.start_again();
        wait_fenced(&clone, &stack.pg);
        publish(&clone, "never", 2);
        holds_for(2 * PATIENCE, "the original owns the guard", || {
            owns(&stack.pg, &stack.redis)
        });
    }
    let after = delivered(&stack, "after");
    assert_eq!(ids(&stack.events()), [common, after].concat());
}

/// A server is copied to another directory and is to go on there, by take_over().
#[test]
fn a_copied_data_directory_goes_on_when_it_is_told_to_and_the_original_is_fenced_when_it_comes_back() {
    let mut stack = Stack::with(WATCHFUL);
    let common = delivered(&stack, "common");
    stack.pg.stop(Mode::Fast);
    let moved = Postgres::copy_of(stack.pg.data_dir()).start();
    wait_fenced(&moved, &stack.pg);
    kit::owners::take_over(&moved);
    let start = Instant::now();
    let sent = delivered_by(&moved, &stack, "moved");
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "it took {:?}",
        start.elapsed()
    );
    stack.pg.start_again();
    wait_fenced(&stack.pg, &moved);
    assert_eq!(ids(&stack.events()), [common, sent].concat());
}

/// The directory itself is renamed: there is no other one.
#[test]
fn a_renamed_data_directory_goes_on_at_once() {
    let mut stack = Stack::with(WATCHFUL);
    let common = delivered(&stack, "common");
    stack.pg.stop(Mode::Fast);
    stack.pg.move_data("renamed");
    stack.pg.start_again();
    let took = wait_owner(&stack.pg, &stack.redis);
    assert!(took < PATIENCE, "it took {took:?}");
    let sent = delivered(&stack, "renamed");
    assert_eq!(ids(&stack.events()), [common, sent].concat());
}

/// A server that hangs (its machine is suspended) loses the guard; when it wakes up it notices that before it writes
/// anything.
#[test]
fn an_owner_that_was_frozen_writes_nothing_after_the_take_over() {
    let (stack, promoted, common) = with_standby();
    promoted.promote();
    wait_fenced(&promoted, &stack.pg);
    let worker = stack.pg.wait_worker("postgres");
    kit::process::signal(worker, Signal::SIGSTOP);
    let waiting = publish(&stack.pg, "frozen", 2);
    wait_owner(&promoted, &stack.redis);
    let sent = delivered_by(&promoted, &stack, "promoted");
    kit::process::signal(worker, Signal::SIGCONT);
    wait_fenced(&stack.pg, &promoted);
    assert_eq!(standing(&stack.pg, "default").pending, waiting.len() as i64);
    assert_eq!(ids(&stack.events()), [common, sent].concat());
}

/// A terminated worker is back in a moment: no server may take that for the end of its server.
#[test]
fn only_the_end_of_the_server_gives_up_ownership() {
    let (mut stack, promoted, common) = with_standby();
    promoted.promote();
    wait_fenced(&promoted, &stack.pg);
    for _ in 0..3 {
        let old = stack.pg.wait_worker("postgres");
        assert!(stack.pg.one::<bool>(&format!("select pg_terminate_backend({old})")));
        wait_until("the worker's end", || stack.pg.worker_pid("postgres") != Some(old));
        assert_eq!(guard(&stack.pg, &stack.redis).expect("a guard").field("released"), "0");
        stack.pg.wait_new_worker(old);
    }
    let after = delivered(&stack, "after");
    assert!(owns(&stack.pg, &stack.redis));
    stack.pg.stop(Mode::Fast);
    let took = wait_owner(&promoted, &stack.redis);
    assert!(took < PATIENCE, "it took {took:?}");
    assert_eq!(ids(&stack.events()), [common, after].concat());
}

/// The guard says how often its owner refreshes it; when that interval changes, waiting servers must know before they
/// take the owner for dead.
#[test]
fn an_owner_with_a_longer_poll_interval_is_not_taken_for_dead() {
    let (stack, promoted, _) = with_standby();
    stack.pg.set("outbox_relay.poll_interval", "10s");
    let interval = || guard(&stack.pg, &stack.redis).map(|guard| guard.field("interval_ms").to_string());
    wait_eq("the interval in the guard", Some("10000".to_string()), interval);
    promoted.promote();
    promoted.wait_worker("postgres");
    holds_for(3 * PATIENCE, "the old primary owns the guard", || {
        owns(&stack.pg, &stack.redis)
    });
}

/// While no server reaches Redis, none refreshes the guard: that proves nothing about the owner.
#[test]
fn an_outage_of_redis_changes_no_owner() {
    let stack = Stack::with(WATCHFUL);
    let proxy = Proxy::to(stack.redis.port());
    stack.point_at("default", "127.0.0.1", proxy.port());
    let promoted = stack.pg.standby().start();
    let common = delivered(&stack, "common");
    wait_caught_up(&stack.pg, &promoted);
    promoted.promote();
    wait_fenced(&promoted, &stack.pg);
    for _ in 0..4 {
        proxy.refuse();
        proxy.cut();
        holds_for(2 * PATIENCE, "Redis is away", || proxy.connections() == 0);
        proxy.accept();
        wait_fenced(&promoted, &stack.pg);
        wait_owner(&stack.pg, &stack.redis);
    }
    let after = delivered(&stack, "after");
    assert_eq!(ids(&stack.events()), [common, after].concat());
}
