//! `trim = 'read'`: no entry is trimmed that a consumer group has not acknowledged, and at `max_len` the backend waits.

use kit::{
    Cluster, Dice, Group, LIMIT, Ledger, Load, Postgres, QUICK, Redis, Refused, Stack, holds_for, ids, publish_many,
    standing, wait_drained, wait_eq, wait_trouble, wait_until, xreadgroup,
};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use uuid::Uuid;

fn stack(set: &str) -> Stack {
    let postgres = Postgres::with(QUICK)
        .with(&[("outbox_relay.poll_interval", "500ms")])
        .faults();
    let stack = Stack::of(postgres, Redis::start());
    stack
        .pg
        .exec(&format!("update outbox.backends set trim = 'read', {set}"));
    stack
}

fn publish(stack: &Stack, count: i32) -> Vec<Uuid> {
    publish_many(&mut stack.pg.client(), "default", "", "event", count)
}

fn state(stack: &Stack) -> String {
    standing(&stack.pg, "default").state
}

#[test]
fn a_stream_is_trimmed_up_to_what_all_groups_have_acknowledged() {
    for delivery in ["exactly_once", "at_least_once"] {
        let stack = stack(&format!("max_len = 0, delivery = '{delivery}'"));
        let mut conn = stack.redis.conn();
        let published = publish(&stack, 300);
        stack.wait_events(300);
        let mut one = Group::create(&mut conn, "events", "one");
        let mut two = Group::create(&mut conn, "events", "two");
        one.drain(&mut conn);
        let read = two.read(&mut conn, "c", 200);
        two.acknowledge(&mut conn, &read[..50]);
        two.acknowledge(&mut conn, &read[60..]);
        // Ten in the middle are pending, so all entries after them stay.
        wait_eq("the length", 250, || stack.redis.xlen("events"));
        holds_for(Duration::from_millis(2_500), "nothing more goes", || {
            stack.redis.xlen("events") == 250
        });
        two.acknowledge(&mut conn, &read[50..60]);
        // The entry that was delivered last stays.
        wait_eq("the length", 101, || stack.redis.xlen("events"));
        two.drain(&mut conn);
        wait_eq("the length", 1, || stack.redis.xlen("events"));
        assert_eq!(one.acknowledged, published);
        assert_eq!(two.acknowledged.iter().collect::<BTreeSet<_>>().len(), 300);
        // When everything is read, Redis is not asked any more.
        wait_drained(&stack.pg, "default");
        assert_eq!(state(&stack), "idle");
    }
}

#[test]
fn a_full_stream_holds_its_backend_and_names_the_group() {
    let stack = stack("max_len = 20");
    let mut conn = stack.redis.conn();
    let mut slow = Group::create(&mut conn, "events", "slow");
    let mut quick = Group::create(&mut conn, "events", "quick");
    let published = publish(&stack, 100);
    wait_trouble(&stack.pg, "default", "full", "has not acknowledged");
    quick.drain(&mut conn);
    let found = wait_trouble(
        &stack.pg,
        "default",
        "full",
        "its consumer group \"slow\" has not acknowledged",
    );
    assert!(
        found
            .last_error
            .is_some_and(|error| error.contains("stream \"events\" has 20 entries"))
    );
    assert_eq!((found.pending, found.failed, found.will_try_again), (80, 0, false));
    stack.pg.wait_log("backend \"default\" waits for consumers");
    stack.pg.wait_log("HINT:  Let the group read and acknowledge.");
    holds_for(Duration::from_millis(1_500), "it waits", || {
        (stack.redis.xlen("events"), state(&stack)) == (20, "full".to_owned())
    });
    let one_hot: String = stack.pg.one(
        "select labels ->> 'state' from outbox.metrics where name = 'outbox_relay_backend_state' and value = 1 and labels ->> 'backend' = 'default'",
    );
    assert_eq!(one_hot, "full");
    let hint: String = stack
        .pg
        .one("select hint from outbox.health() where \"check\" = 'backend default' and status = 'fail'");
    assert!(hint.contains("XGROUP DESTROY"), "{hint}");
    // A new worker finds the same state.
    stack.pg.kill_worker();
    wait_trouble(&stack.pg, "default", "full", "\"slow\"");
    assert_eq!(stack.redis.xlen("events"), 20);
    // As the group makes progress, so does the backend.
    let read = slow.read(&mut conn, "c", 10);
    slow.acknowledge(&mut conn, &read);
    wait_eq("the pending events", 71, || standing(&stack.pg, "default").pending);
    wait_until("both to go on", || {
        quick.drain(&mut conn);
        slow.drain(&mut conn);
        slow.acknowledged.len() >= 60
    });
    slow.destroy(&mut conn);
    quick.wait_acknowledged(&mut conn, 100);
    assert_eq!(quick.acknowledged, published);
    wait_drained(&stack.pg, "default");
    wait_eq("the state", "idle".to_owned(), || state(&stack));
    assert!(stack.redis.xlen("events") <= 20);
}

#[test]
fn a_stream_without_groups_fills_up_and_keeps_all() {
    let stack = stack("max_len = 30");
    let published = publish(&stack, 50);
    wait_trouble(&stack.pg, "default", "full", "it has no consumer group");
    stack.pg.wait_log("HINT:  Create the group with XGROUP CREATE");
    assert_eq!(ids(&stack.events()), published[..30]);
    let mut conn = stack.redis.conn();
    let mut group = Group::create(&mut conn, "events", "g");
    group.wait_acknowledged(&mut conn, 50);
    assert_eq!(group.acknowledged, published);
    wait_drained(&stack.pg, "default");
}

#[test]
fn a_raised_limit_or_another_way_of_trimming_ends_the_wait_at_once() {
    let stack = stack("max_len = 10");
    let mut published = publish(&stack, 40);
    wait_trouble(&stack.pg, "default", "full", "no consumer group");
    stack.pg.exec("update outbox.backends set max_len = 25");
    wait_eq("the length", 25, || stack.redis.xlen("events"));
    wait_trouble(&stack.pg, "default", "full", "has 25 entries");
    stack.pg.exec("update outbox.backends set trim = 'length', max_len = 0");
    stack.wait_events(40);
    wait_drained(&stack.pg, "default");
    wait_eq("the state", "idle".to_owned(), || state(&stack));
    published.extend(publish(&stack, 5));
    assert_eq!(ids(&stack.wait_events(45)), published);
    for nonsense in [
        "trim = 'both'",
        "trim = null",
        "trim_ignore_idle = '0'",
        "trim_ignore_idle = '-1 s'",
    ] {
        let refused = Refused::of(
            stack
                .pg
                .client()
                .batch_execute(&format!("update outbox.backends set {nonsense}")),
        );
        assert!(
            ["23514", "23502"].contains(&refused.code.as_str()),
            "{nonsense}: {refused:?}"
        );
    }
}

#[test]
fn a_silent_group_is_left_out_with_a_warning() {
    let stack = stack("max_len = 20, trim_ignore_idle = '2 s'");
    let mut conn = stack.redis.conn();
    let mut dead = Group::create(&mut conn, "events", "dead");
    let mut alive = Group::create(&mut conn, "events", "alive");
    let published = publish(&stack, 60);
    stack.wait_events(5);
    let read = dead.read(&mut conn, "c", 5);
    dead.acknowledge(&mut conn, &read[..2]);
    alive.wait_acknowledged(&mut conn, 60);
    assert_eq!(alive.acknowledged, published);
    stack
        .pg
        .wait_log("WARNING:  backend \"default\" trims stream \"events\" regardless of consumer group \"dead\"");
    let log = stack.pg.log();
    assert!(log.contains("longer than trim_ignore_idle"), "{log}");
    // Before Redis 7, a group that has read everything counts as silent.
    if stack.redis.counts_lag() {
        assert!(!log.contains("regardless of consumer group \"alive\""), "{log}");
    }
    wait_drained(&stack.pg, "default");
    // When it reads again, it counts again.
    let mark = Instant::now();
    publish(&stack, 15);
    wait_until("all to be sent", || standing(&stack.pg, "default").pending == 0);
    let read = dead.read(&mut conn, "c", 1);
    assert!(mark.elapsed() < LIMIT && !read.is_empty());
    dead.owed = read.iter().map(|entry| entry.id.clone()).collect();
    alive.drain(&mut conn);
    holds_for(Duration::from_millis(1_500), "it is kept for it", || {
        dead.missing(&mut stack.redis.conn()).is_empty()
    });
}

/// If there is no other group, only as much is trimmed as necessary.
#[test]
fn silent_groups_alone_do_not_stop_a_backend() {
    let stack = stack("max_len = 40, trim_ignore_idle = '1 s'");
    let mut conn = stack.redis.conn();
    // It has never had a consumer.
    Group::create(&mut conn, "events", "unmanned");
    let published = publish(&stack, 100);
    wait_drained(&stack.pg, "default");
    let left = ids(&stack.events());
    assert!((10..=40).contains(&left.len()), "{}", left.len());
    assert_eq!(left, published[100 - left.len()..]);
}

#[test]
fn each_stream_of_a_backend_and_of_a_cluster_is_trimmed() {
    let cluster = Cluster::start(0);
    let stack = stack("max_len = 0");
    stack.pg.exec(&format!(
        "update outbox.backends set mode = 'cluster', nodes = '{}', host = null, port = null, stream_name = 's0'",
        cluster.addresses()
    ));
    let streams: Vec<String> = (0..6).map(|n| format!("s{n}")).collect();
    for stream in &streams {
        publish_many(&mut stack.pg.client(), "default", stream, "event", 50);
        cluster.wait_entries(stream, 50);
        cluster.call(stream, &["XGROUP", "CREATE", stream, "g", "0"]);
        cluster.call(stream, &xreadgroup("g", "c", &["NOACK", "COUNT", "30"], stream));
    }
    for stream in &streams {
        wait_eq("the length", 21, || cluster.entries(stream).len());
    }
    // Nothing is sent to these streams any more, and the worker has forgotten them.
    stack.pg.kill_worker();
    for stream in &streams {
        cluster.call(stream, &xreadgroup("g", "c", &["NOACK", "COUNT", "10"], stream));
        wait_eq("the length", 11, || cluster.entries(stream).len());
    }
}

/// A ledger whose sessions together publish some hundred events a second. In a second, a stream that is trimmed by
/// reading can take half of its `max_len`, so a faster load would leave a long backlog.
fn slow_ledger(pg: &Postgres) {
    Ledger::create(pg);
    pg.exec(
        "create function slow() returns trigger language plpgsql as $$ begin perform pg_sleep(0.004); return new; end $$;
        create trigger slow before insert on ledger for each row execute function slow()",
    );
}

/// Consumers die in the middle of their work, groups come and go, the worker is killed, connections are cut.
fn chaos(stack: &mut Stack, seconds: u64, seed: u64, mut interrupt: impl FnMut(&mut Stack, &mut Dice)) -> Group {
    let mut dice = Dice::new(seed);
    let mut conn = stack.redis.conn();
    let mut steady = Group::create(&mut conn, "events", "steady");
    let mut passing: Vec<Group> = Vec::new();
    let (mut made, until) = (0, Instant::now() + Duration::from_secs(seconds));
    while Instant::now() < until {
        conn = stack.redis.conn();
        match dice.between(0, 9) {
            0 | 1 if passing.len() < 4 => {
                made += 1;
                passing.push(Group::create(&mut conn, "events", &format!("passing{made}")));
            }
            2 if !passing.is_empty() => passing.remove(0).destroy(&mut conn),
            // A consumer dies without acknowledging what it has read; another one takes that over later.
            3 => drop(steady.read(&mut conn, &format!("victim{made}"), 20)),
            4 => {
                let claimed = steady.claim(&mut conn, "heir");
                steady.acknowledge(&mut conn, &claimed);
            }
            5 => interrupt(stack, &mut dice),
            _ => {
                steady.drain(&mut conn);
                for group in &mut passing {
                    let read = group.read(&mut conn, "c", 50);
                    let some = read.len() * dice.between(0, 4) as usize / 4;
                    group.acknowledge(&mut conn, &read[..some]);
                }
            }
        }
        let mut conn = stack.redis.conn();
        steady.assert_nothing_lost(&mut conn);
        passing.iter().for_each(|group| group.assert_nothing_lost(&mut conn));
        std::thread::sleep(Duration::from_millis(dice.between(1, 40)));
    }
    let mut conn = stack.redis.conn();
    passing.into_iter().for_each(|group| group.destroy(&mut conn));
    steady
}

#[test]
fn no_entry_is_trimmed_before_it_is_acknowledged_or_repeated_after_crashes() {
    // A fast machine must not fill the stream: a full backend reaches no crash point.
    let mut stack = stack("max_len = 100000");
    slow_ledger(&stack.pg);
    let load = Load::start(&stack.pg, 2, "");
    let mut steady = chaos(&mut stack, 20, 7, |stack, dice| match dice.between(0, 3) {
        0 => stack.pg.kill_worker(),
        1 => {
            let mark = stack.pg.log().len();
            stack
                .pg
                .crash_at(["after_exec", "after_write", "before_save"][dice.between(0, 2) as usize]);
            stack.pg.wait_recovered(mark);
        }
        _ => drop(stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"])),
    });
    stack.pg.forget_points();
    load.stop();
    let mut conn = stack.redis.conn();
    wait_until("all to be delivered", || {
        let left = steady.claim(&mut conn, "heir");
        steady.acknowledge(&mut conn, &left);
        steady.drain(&mut conn);
        standing(&stack.pg, "default").pending == 0
    });
    steady.drain(&mut conn);
    steady.assert_nothing_lost(&mut conn);
    let got: BTreeSet<Uuid> = steady.acknowledged.iter().copied().collect();
    assert_eq!(got.len(), steady.acknowledged.len(), "some came twice");
    let published: i64 = stack.pg.one("select count(*) from outbox.events");
    assert_eq!((got.len() as i64, published > 200), (published, true));
    wait_until("it to be trimmed", || stack.redis.xlen("events") <= 1);
}

/// A replica that lags is promoted, repeatedly: the entries that it lacks are appended again.
#[test]
fn failovers_of_redis_lose_nothing_that_is_not_acknowledged() {
    let mut stack = stack("max_len = 4000");
    slow_ledger(&stack.pg);
    let replica = Redis::replica_of(&stack.redis);
    let load = Load::start(&stack.pg, 2, "");
    let mut conn = stack.redis.conn();
    let mut steady = Group::create(&mut conn, "events", "steady");
    let mut dice = Dice::new(11);
    let (mut primary, mut other) = (&stack.redis, &replica);
    for _ in 0..6 {
        let until = Instant::now() + Duration::from_millis(dice.between(1_200, 3_000));
        let mut conn = primary.conn();
        while Instant::now() < until {
            let read = steady.read(&mut conn, "c", 100);
            let some = read.len() * dice.between(2, 4) as usize / 4;
            steady.acknowledge(&mut conn, &read[..some]);
            let left = steady.claim(&mut conn, "c");
            steady.acknowledge(&mut conn, &left);
            steady.assert_nothing_lost(&mut conn);
        }
        // Entries that are acknowledged from here on are lost with the primary.
        other.wait_caught_up(primary);
        other.lag();
        load.wait_more(dice.between(1, 30));
        steady.drain(&mut conn);
        other.promote();
        stack.point("default", other);
        // The group keeps its state: entries of the lost end are appended again, under other ids.
        let there: BTreeSet<String> = other.entries("events").into_iter().map(|entry| entry.id).collect();
        steady.owed.retain(|id| there.contains(id));
        primary.follow(other);
        std::mem::swap(&mut primary, &mut other);
    }
    load.stop();
    let mut conn = primary.conn();
    wait_until("all to be delivered", || {
        let left = steady.claim(&mut conn, "c");
        steady.acknowledge(&mut conn, &left);
        steady.drain(&mut conn);
        standing(&stack.pg, "default").pending == 0
    });
    steady.drain(&mut conn);
    let got: BTreeSet<Uuid> = steady.acknowledged.iter().copied().collect();
    let published: i64 = stack.pg.one("select count(*) from outbox.events");
    assert_eq!(got.len() as i64, published, "each event came to the group");
    stack.pg.stop(kit::Mode::Fast);
}

/// Consumers acknowledge everything at once, and the worker dies before it learns the result of its batch. The batch's
/// entries are looked for in the stream, and must not have been trimmed.
#[test]
fn entries_of_the_last_batch_stay_until_another_one_is_appended() {
    let stack = stack("max_len = 0");
    // No refresh of the guard may reach the point first.
    stack.pg.set("outbox_relay.poll_interval", "1min");
    stack.pg.reload();
    let mut conn = stack.redis.conn();
    let mut group = Group::create(&mut conn, "events", "g");
    let mut published = Vec::new();
    for round in 0..5 {
        published.extend(publish(&stack, 20));
        group.wait_acknowledged(&mut conn, published.len());
        wait_until("it to be trimmed", || stack.redis.xlen("events") <= 1);
        let mark = stack.pg.log().len();
        stack.pg.crash_at("after_exec");
        // The session may be terminated with the worker, before it learns that it has committed.
        let late = "select outbox.publish_event('late', 'kit') from generate_series(1, 20)";
        let _ = stack.pg.client().batch_execute(late);
        // It is appended and acknowledged, and the worker has not read the reply.
        group.wait_acknowledged(&mut conn, published.len() + 20);
        stack.pg.wait_recovered(mark);
        published = stack
            .pg
            .one("select array_agg(event_id order by seq) from outbox.events");
        wait_drained(&stack.pg, "default");
        assert_eq!(group.acknowledged, published, "round {round}");
        stack.pg.forget_points();
    }
}

/// `XGROUP SETID`, or an id of its own when it was created. The last entry stays, by which a search for the last
/// batch's events knows the end of the stream.
#[test]
fn a_group_that_was_set_ahead_of_the_end_leaves_the_last_entry() {
    let stack = stack("max_len = 0");
    let published = publish(&stack, 10);
    stack.wait_events(10);
    stack
        .redis
        .call(&["XGROUP", "CREATE", "events", "ahead", "9999999999999-0"]);
    wait_until("it to be trimmed", || stack.redis.xlen("events") <= 1);
    holds_for(Duration::from_millis(2_500), "the last one stays", || {
        ids(&stack.events()) == published[9..]
    });
    let more = publish(&stack, 10);
    wait_until("more to be trimmed", || ids(&stack.events()) == more[9..]);
    // A group that has read them all is not ahead.
    let mut conn = stack.redis.conn();
    let mut group = Group::create(&mut conn, "events", "g");
    group.drain(&mut conn);
    let last = publish(&stack, 10);
    let has_last = || ids(&stack.events()).ends_with(&last);
    wait_until("them", has_last);
    holds_for(Duration::from_millis(2_500), "it has not read them", has_last);
    group.wait_acknowledged(&mut conn, 11);
}

/// Shows that the tests of this file can fail.
#[test]
fn the_test_notices_a_relay_that_trims_pending_entries() {
    let mut stack = stack("max_len = 0");
    stack.pg.mutation("trim_unread");
    stack.pg.restart();
    let mut conn = stack.redis.conn();
    publish(&stack, 30);
    stack.wait_events(30);
    let mut group = Group::create(&mut conn, "events", "g");
    group.read(&mut conn, "c", 20);
    wait_eq("entries that are gone", 19, || {
        group.missing(&mut stack.redis.conn()).len()
    });
}
