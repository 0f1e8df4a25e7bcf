//! Redis loses acknowledged entries, by a crash or a failover, but not all: the relay finds its guard set back, and
//! appends exactly the missing entries.

use kit::{
    LIMIT, Ledger, Load, Postgres, QUICK, Redis, Stack, UNTRIMMED, ids, publish_many, standing, wait_drained, wait_eq,
    wait_until,
};
use uuid::Uuid;

/// A stack that checks its guard very often.
fn stack(redis: Redis) -> Stack {
    let postgres = Postgres::with(QUICK).with(&[UNTRIMMED, ("outbox_relay.poll_interval", "200ms")]);
    Stack::of(postgres, redis)
}

/// Publishes batches of three events, one after the other.
fn publish_batches(stack: &Stack, stream: &str, count: usize, published: &mut Vec<Uuid>) {
    let mut client = stack.pg.client();
    let name = if stream.is_empty() { "events" } else { stream };
    for _ in 0..count {
        let before = stack.redis.xlen(name);
        published.extend(publish_many(&mut client, "default", stream, "event", 3));
        stack.redis.wait_entries(name, before + 3);
    }
}

fn healings(pg: &Postgres) -> i64 {
    pg.one("select healings from outbox.backend_status where backend = 'default'")
}

fn enable(stack: &Stack, enabled: bool) {
    stack
        .pg
        .exec(&format!("update outbox.backends set enabled = {enabled}"));
}

/// Everything is in the stream once and in order, also according to the saved state.
#[track_caller]
fn wait_healed(stack: &Stack, published: &[Uuid], times: i64) {
    stack.wait_events(published.len());
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), published);
    wait_eq("healings", times, || healings(&stack.pg));
    assert_eq!(
        stack
            .pg
            .log()
            .matches("heals: Redis has lost what it acknowledged")
            .count() as i64,
        times
    );
    let found = standing(&stack.pg, "default");
    assert_eq!((found.state.as_str(), found.failed), ("idle", 0), "{found:?}");
}

#[test]
fn events_from_the_lost_end_of_an_append_only_file_are_appended_again() {
    let mut stack = stack(Redis::persistent("always"));
    let mut published = Vec::new();
    publish_batches(&stack, "", 20, &mut published);
    wait_drained(&stack.pg, "default");
    let last = stack.guard().number("number");
    // The backend is paused, so that the remaining entries can be seen.
    enable(&stack, false);
    stack.redis.crash_losing(6_000);
    let left = ids(&stack.events());
    assert!((3..57).contains(&left.len()), "{} entries are left", left.len());
    assert_eq!(left, published[..left.len()]);
    let lost = 20 - left.len() as u64 / 3;
    enable(&stack, true);
    wait_healed(&stack, &published, 1);
    let log = stack.pg.log();
    let number = last - lost;
    assert!(
        log.contains(&format!(
            "Its guard names batch {number}, but the last acknowledged batch is {last}."
        )),
        "{log}"
    );
    publish_batches(&stack, "", 3, &mut published);
    wait_healed(&stack, &published, 1);
}

/// Without a pause: the relay is connected when Redis dies, or in the middle of a batch.
#[test]
fn a_redis_that_crashes_under_load_and_loses_the_end_of_its_file_is_healed() {
    let mut stack = stack(Redis::persistent("no"));
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 3, "");
    for round in 1..=4 {
        load.wait_more(100);
        // Far more than is not acknowledged yet, far less than everything.
        stack.redis.crash_losing(30_000);
        wait_eq("healings", round, || healings(&stack.pg));
    }
    load.wait_more(50);
    load.stop();
    ledger.settle(&stack, LIMIT).assert_exactly_once();
    assert_eq!(healings(&stack.pg), 4);
}

#[test]
fn an_older_snapshot_of_redis_is_healed_again_and_again() {
    let mut stack = stack(Redis::start());
    let mut published = Vec::new();
    publish_batches(&stack, "", 5, &mut published);
    let saved = stack.redis.saved();
    for times in 1..=3 {
        publish_batches(&stack, "", 5, &mut published);
        stack.redis.crash_back_to(&saved);
        wait_healed(&stack, &published, times);
    }
    // Also with a worker, and a server, that were started after the snapshot.
    wait_drained(&stack.pg, "default");
    for times in 4..=5 {
        enable(&stack, false);
        stack.redis.crash_back_to(&saved);
        match times {
            4 => stack.pg.kill_worker(),
            _ => stack.pg.restart(),
        }
        enable(&stack, true);
        stack.wait_events(published.len());
        wait_drained(&stack.pg, "default");
        assert_eq!(ids(&stack.events()), published);
        // A healing that begins before the worker ends goes on in the next one, and may not be counted.
        assert!((3..=times).contains(&healings(&stack.pg)));
    }
}

/// The entries that it has found in the stream are remembered until the backend is resumed.
#[test]
fn a_healing_while_the_backend_is_paused_repeats_nothing() {
    let mut stack = stack(Redis::start());
    let mut published = Vec::new();
    publish_batches(&stack, "", 3, &mut published);
    let saved = stack.redis.saved();
    publish_batches(&stack, "", 2, &mut published);
    // The first leads to another epoch, which knows nothing of the guard's last batch.
    stack.redis.crash_back_to(&saved);
    wait_healed(&stack, &published, 1);
    enable(&stack, false);
    published.extend(publish_many(&mut stack.pg.client(), "default", "", "event", 3));
    stack.redis.crash_back_to(&saved);
    wait_eq("healings", 2, || healings(&stack.pg));
    enable(&stack, true);
    stack.wait_events(published.len());
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), published);
}

/// The worker dies together with Redis, and has not saved its cursor.
#[test]
fn a_crash_of_both_loses_nothing() {
    let mut stack = stack(Redis::start());
    let mut published = Vec::new();
    publish_batches(&stack, "", 5, &mut published);
    wait_drained(&stack.pg, "default");
    let saved = stack.redis.saved();
    for _ in 0..3 {
        publish_batches(&stack, "", 5, &mut published);
        stack.redis.kill9();
        stack.pg.crash();
        stack.redis.start_again();
        stack.redis.crash_back_to(&saved);
        stack.pg.start_again();
        stack.wait_events(published.len());
        wait_drained(&stack.pg, "default");
        assert_eq!(ids(&stack.events()), published);
    }
}

/// A healing may be interrupted.
#[test]
fn a_worker_that_is_killed_while_it_heals_appends_nothing_twice() {
    const COUNT: i32 = 5_000;
    let mut stack = stack(Redis::start());
    stack.publish("first");
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    let mut published = ids(&stack.events());
    let saved = stack.redis.saved();
    published.extend(publish_many(&mut stack.pg.client(), "default", "", "event", COUNT));
    stack.wait_events(published.len());
    wait_drained(&stack.pg, "default");
    stack.redis.crash_back_to(&saved);
    for part in [5, 2] {
        let goal = published.len() / part;
        wait_until("a part of it", || stack.redis.xlen("events") >= goal);
        stack.pg.kill_worker();
    }
    stack.wait_events(published.len());
    wait_drained(&stack.pg, "default");
    assert!(ids(&stack.events()) == published, "other events, or another order");
}

/// Repeatedly, under load: each time, entries that the new primary does not have are lost. OUTBOX_FAILOVERS sets how
/// often.
#[test]
fn failovers_to_a_replica_that_lags_lose_nothing() {
    let rounds = std::env::var("OUTBOX_FAILOVERS").map_or(5, |text| text.parse().expect("a number"));
    let mut stack = stack(Redis::start());
    let proxy = stack.through_proxy();
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 3, "");
    load.wait_more(20);
    let mut replica = Redis::replica_of(&stack.redis);
    for round in 1..=rounds {
        load.wait_more(20);
        replica.lag();
        let behind = replica.xlen("events");
        load.wait_more(40);
        wait_until("entries that the replica has not", || {
            stack.redis.xlen("events") > behind + 10
        });
        replica.promote();
        proxy.point_to(replica.port());
        proxy.cut();
        std::mem::swap(&mut stack.redis, &mut replica);
        // The old primary comes back as a replica of the new one.
        wait_eq("healings", round, || healings(&stack.pg));
        replica.follow(&stack.redis);
    }
    load.wait_more(20);
    load.stop();
    ledger.settle(&stack, LIMIT).assert_exactly_once();
    assert_eq!(healings(&stack.pg), rounds);
}

/// Failed events stay failed; an event that had waited and was accepted later is appended again, after the events
/// before it.
#[test]
fn healing_neither_repeats_nor_loses_an_event_that_was_refused_once() {
    let redis = Redis::start();
    for key in ["bad", "late"] {
        redis.call(&["SET", key, "a string"]);
    }
    let mut stack = stack(redis);
    let mut plain = Vec::new();
    publish_batches(&stack, "", 2, &mut plain);
    // Redis now has a string at both keys.
    let saved = stack.redis.saved();
    let publish = |stream: &str, retries: i32| -> Uuid {
        stack.pg.one(&format!(
            "select outbox.publish_event('refused', 'kit', stream => '{stream}', max_retries => {retries})"
        ))
    };
    let failed: Vec<Uuid> = (0..3).map(|_| publish("bad", 1)).collect();
    let failures = || -> Vec<Uuid> {
        let rows = stack
            .pg
            .client()
            .query("select event_id from outbox.failed_events order by seq", &[]);
        rows.expect("readable").iter().map(|row| row.get(0)).collect()
    };
    wait_eq("failed events", failed.clone(), failures);
    let mut late: Vec<Uuid> = (0..5).map(|_| publish("late", 1_000)).collect();
    let waiting = || -> i64 {
        stack
            .pg
            .one("select count(*) from outbox.refused_events where accepted_in is null")
    };
    wait_eq("refused events", 5, waiting);
    publish_batches(&stack, "", 2, &mut plain);
    stack.redis.call(&["DEL", "late"]);
    assert_eq!(ids(&stack.redis.wait_entries("late", 5)), late);
    wait_eq("refused events", 0, waiting);
    publish_batches(&stack, "late", 1, &mut late);
    publish_batches(&stack, "", 2, &mut plain);
    wait_drained(&stack.pg, "default");

    enable(&stack, false);
    stack.redis.crash_back_to(&saved);
    // If events were sent again, they would be accepted now.
    stack.redis.call(&["DEL", "bad"]);
    enable(&stack, true);
    stack.wait_events(plain.len());
    let waiting = || -> i64 {
        stack
            .pg
            .one("select count(*) from outbox.refused_events where accepted_in is null")
    };
    // And the other stream is unchanged.
    wait_eq("refused events", 8, waiting);
    stack.redis.call(&["DEL", "late"]);
    assert_eq!(ids(&stack.redis.wait_entries("late", 8)), late);
    wait_drained(&stack.pg, "default");
    assert_eq!((ids(&stack.events()), ids(&stack.redis.entries("late"))), (plain, late));
    assert_eq!((stack.redis.xlen("bad"), healings(&stack.pg)), (0, 1));
    assert_eq!(standing(&stack.pg, "default").failed, 3);
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.failed_events"), 3);
}

/// Clients alternate between a lagging replica and the old primary: events that wait as refused at the one had been
/// accepted by the other.
#[test]
fn a_redis_that_comes_back_with_what_it_had_lost_gets_nothing_twice() {
    let redis = Redis::start();
    redis.call(&["SET", "late", "a string"]);
    let mut stack = stack(redis);
    stack.pg.set("outbox_relay.max_retries", "1000");
    let mut plain = Vec::new();
    publish_batches(&stack, "", 2, &mut plain);
    wait_drained(&stack.pg, "default");
    let lagging = stack.redis.saved();
    stack.redis.call(&["DEL", "late"]);
    let mut late = Vec::new();
    publish_batches(&stack, "late", 2, &mut late);
    publish_batches(&stack, "", 1, &mut plain);
    wait_drained(&stack.pg, "default");
    let primary = stack.redis.saved();

    let waiting = |stack: &Stack| -> i64 {
        stack
            .pg
            .one("select count(*) from outbox.refused_events where accepted_in is null")
    };
    for times in 1..=2 {
        enable(&stack, false);
        stack.redis.crash_back_to(&lagging);
        enable(&stack, true);
        wait_eq("those that the replica refuses", late.len() as i64, || waiting(&stack));
        wait_eq("healings", 2 * times - 1, || healings(&stack.pg));
        enable(&stack, false);
        stack.redis.crash_back_to(&primary);
        enable(&stack, true);
        wait_eq("those that were found", 0, || waiting(&stack));
        wait_drained(&stack.pg, "default");
        assert_eq!(ids(&stack.events()), plain);
        assert_eq!(ids(&stack.redis.entries("late")), late);
    }
    publish_batches(&stack, "late", 1, &mut late);
    assert_eq!(ids(&stack.redis.wait_entries("late", late.len())), late);
}
