//! `outbox.take_over()` moves the ownership on purpose: at once, even if both servers are alive, and nothing is lost or
//! repeated on either side.

use std::time::{Duration, Instant};

use kit::owners::{PATIENCE, WATCHFUL, owns, publish, take_over, wait_caught_up, wait_fenced, wait_owner};
use kit::{
    Ledger, Load, Mode, Postgres, Proxy, Refused, Stack, Way, holds_for, ids, standing, wait_drained, wait_until,
};
use uuid::Uuid;

/// A primary and its promoted standby, both alive; the events of both are delivered.
fn both_alive(settings: &[(&str, &str)]) -> (Stack, Postgres, Vec<Uuid>) {
    let stack = Stack::of(Postgres::with(WATCHFUL).with(settings), kit::Redis::start());
    let standby = stack.pg.standby().start();
    let common = publish(&stack.pg, "common", 3);
    stack.wait_events(3);
    wait_drained(&stack.pg, "default");
    wait_caught_up(&stack.pg, &standby);
    standby.promote();
    wait_fenced(&standby, &stack.pg);
    (stack, standby, common)
}

/// Permits that were requested and not used yet.
fn permits(pg: &Postgres) -> i64 {
    pg.one("select count(*) from outbox.take_overs")
}

#[test]
fn a_take_over_moves_the_ownership_at_once_and_for_good() {
    let (mut stack, promoted, common) = both_alive(&[]);
    let of_promoted = publish(&promoted, "promoted", 2);
    let start = Instant::now();
    take_over(&promoted);
    stack.wait_events(5);
    let took = start.elapsed();
    assert!(took < PATIENCE, "it took {took:?}");
    wait_owner(&promoted, &stack.redis);
    wait_fenced(&stack.pg, &promoted);

    // The former owner does not know the new one, and waits: also after a restart, and after a crash.
    let of_old = publish(&stack.pg, "old", 2);
    for end in [Postgres::crash, |pg: &mut Postgres| {
        pg.stop(Mode::Fast);
    }] {
        end(&mut stack.pg);
        stack.pg.start_again();
        wait_fenced(&stack.pg, &promoted);
        assert_eq!(standing(&stack.pg, "default").pending, 2);
    }
    holds_for(2 * PATIENCE, "the promoted one owns the guard", || {
        owns(&promoted, &stack.redis)
    });
    assert_eq!(ids(&stack.events()), [common.clone(), of_promoted.clone()].concat());

    // Its events were not lost.
    take_over(&stack.pg);
    stack.wait_events(7);
    wait_drained(&stack.pg, "default");
    wait_fenced(&promoted, &stack.pg);
    assert_eq!(ids(&stack.events()), [common, of_promoted, of_old].concat());
    assert_eq!((permits(&stack.pg), permits(&promoted)), (0, 0));
}

/// Each server sends its own events, and the common ones are sent once, however often the ownership changes.
#[test]
fn ownership_that_changes_back_and_forth_loses_and_repeats_nothing() {
    let stack = Stack::of(Postgres::with(WATCHFUL), kit::Redis::start());
    let other = stack.pg.standby().start();
    // The standby has these events, but not the cursor after all of them: that is saved later.
    let mut expected = publish(&stack.pg, "common", 250);
    wait_caught_up(&stack.pg, &other);
    other.promote();
    stack.wait_events(250);
    wait_fenced(&other, &stack.pg);
    for round in 0..3 {
        for (owner, fenced, name) in [(&other, &stack.pg, "other"), (&stack.pg, &other, "old")] {
            let waiting = publish(owner, &format!("{name}{round}-waits"), 5);
            take_over(owner);
            wait_owner(owner, &stack.redis);
            wait_fenced(fenced, owner);
            let sent = publish(owner, &format!("{name}{round}-sends"), 5);
            expected.extend(waiting.into_iter().chain(sent));
            stack.wait_events(expected.len());
            wait_drained(owner, "default");
            assert_eq!(ids(&stack.events()), expected, "{name}, round {round}");
        }
    }
}

/// An active owner refreshes its guard all the time: that does not prevent a take-over.
#[test]
fn an_owner_under_load_can_be_taken_over() {
    let stack = Stack::of(Postgres::with(WATCHFUL), kit::Redis::start());
    let ledger = Ledger::create(&stack.pg);
    let promoted = stack.pg.standby().start();
    let load = Load::start(&stack.pg, 4, "");
    load.wait_more(50);
    promoted.promote();
    wait_fenced(&promoted, &stack.pg);
    let start = Instant::now();
    take_over(&promoted);
    wait_until("the guard to change hands", || owns(&promoted, &stack.redis));
    let took = start.elapsed();
    wait_fenced(&stack.pg, &promoted);
    assert!(took < Duration::from_secs(2), "it took {took:?}");
    load.wait_more(20);
    load.stop();
    wait_drained(&promoted, "default");
    // Back again: events that were pending meanwhile are sent, those that had been sent are not.
    take_over(&stack.pg);
    ledger.settle(&stack, kit::LIMIT).assert_exactly_once();
}

/// A batch that the former owner had on its way arrives after the claim of the new one, from a connection that is long
/// dead.
#[test]
fn a_late_write_of_the_former_owner_changes_nothing() {
    // The guard is not refreshed: the held bytes are a batch.
    let rare = &[("outbox_relay.poll_interval", "60s")];
    let mut stack = Stack::of(Postgres::with(WATCHFUL).with(rare), kit::Redis::start());
    let proxy = Proxy::to(stack.redis.port());
    stack.point_at("default", "127.0.0.1", proxy.port());
    let common = publish(&stack.pg, "common", 3);
    stack.wait_events(3);
    wait_drained(&stack.pg, "default");
    let mut promoted = stack.pg.standby().start();
    wait_caught_up(&stack.pg, &promoted);
    // The standby never gets the following transactions.
    promoted.stop(Mode::Fast);
    proxy.hold(Way::ToServer);
    let late = publish(&stack.pg, "late", 3);
    // A batch with its EXEC.
    proxy.wait_held(Way::ToServer, 1_000);
    stack.pg.crash();
    wait_until("the dead connection", || proxy.abandoned() == 1);
    promoted.start_again();
    promoted.promote();
    take_over(&promoted);
    wait_owner(&promoted, &stack.redis);
    proxy.release();
    wait_until("the late write to have arrived", || {
        proxy.held(Way::ToServer) == 0 && proxy.connections() == 1
    });
    let sent = publish(&promoted, "promoted", 3);
    stack.wait_events(6);
    wait_drained(&promoted, "default");
    assert_eq!(ids(&stack.events()), [common, sent].concat());
    // They wait on the server where they were committed.
    stack.pg.start_again();
    wait_fenced(&stack.pg, &promoted);
    assert_eq!(standing(&stack.pg, "default").pending, late.len() as i64);
}

/// If the owner itself is asked, the call succeeds and leaves nothing behind: neither for later nor for a copy of the
/// database.
#[test]
fn taking_over_an_owned_stream_leaves_no_permit_behind() {
    let stack = Stack::with(WATCHFUL);
    let standby = stack.pg.standby().start();
    publish(&stack.pg, "one", 1);
    stack.wait_events(1);
    take_over(&stack.pg);
    wait_until("the permit to be used up", || permits(&stack.pg) == 0);
    wait_caught_up(&stack.pg, &standby);
    standby.promote();
    wait_fenced(&standby, &stack.pg);
    assert!(owns(&stack.pg, &stack.redis));
}

/// A permit counts on the server where it was requested, not on those that replay its WAL.
#[test]
fn a_take_over_counts_before_the_new_owner_is_noticed() {
    // The former owner checks its guard so rarely that it does not know.
    let (stack, promoted, _) = both_alive(&[("outbox_relay.poll_interval", "10s")]);
    take_over(&promoted);
    wait_owner(&promoted, &stack.redis);
    assert_eq!(standing(&stack.pg, "default").state, "idle", "it has not noticed");
    take_over(&stack.pg);
    wait_owner(&stack.pg, &stack.redis);
    publish(&stack.pg, "again", 2);
    stack.wait_events(5);
    wait_until("the permit to be used", || permits(&stack.pg) == 0);
}

#[test]
fn a_permit_that_was_not_used_is_not_inherited() {
    let stack = Stack::with(WATCHFUL);
    let standby = stack.pg.standby().start();
    publish(&stack.pg, "one", 1);
    stack.wait_events(1);
    // Nothing uses the permit: the backend is paused.
    stack.pg.exec("update outbox.backends set enabled = false");
    take_over(&stack.pg);
    assert_eq!(permits(&stack.pg), 1);
    wait_caught_up(&stack.pg, &standby);
    standby.promote();
    stack.pg.exec("update outbox.backends set enabled = true");
    wait_owner(&stack.pg, &stack.redis);
    standby.exec("update outbox.backends set enabled = true");
    wait_fenced(&standby, &stack.pg);
}

#[test]
fn only_a_permitted_role_takes_over_and_only_existing_backends() {
    let stack = Stack::with(WATCHFUL);
    let refused = Refused::of(stack.pg.client().query("select outbox.take_over('nosuch')", &[]));
    assert_eq!(
        (refused.code.as_str(), refused.message.as_str()),
        ("42704", "backend \"nosuch\" does not exist")
    );
    stack.pg.exec(
        "create role nobody_much login; create role publisher login; select outbox.grant_publisher('publisher');
         create role watcher login; grant pg_monitor to watcher",
    );
    for role in ["nobody_much", "publisher", "watcher"] {
        for statement in [
            "select outbox.take_over('default')",
            "insert into outbox.take_overs (backend_number) values (1)",
        ] {
            let refused = Refused::of(stack.pg.client_as(role, "postgres").query(statement, &[]));
            assert_eq!(refused.code, "42501", "{role}: {statement}: {refused:?}");
        }
    }
    assert_eq!(permits(&stack.pg), 0);
}
