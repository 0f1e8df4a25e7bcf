//! A backend is changed while its batches are on their way: renamed, moved, switched, deleted. What it has sent stands
//! where it was sent, once.

use std::collections::BTreeMap;

use kit::{
    Entry, LIMIT, Ledger, Load, Postgres, Proxy, QUICK, Redis, Stack, Way, ids, publish_many, standing, wait_drained,
    wait_eq, wait_until,
};
use uuid::Uuid;

fn stack(settings: &[(&str, &str)]) -> Stack {
    let postgres = Postgres::with(QUICK).with(settings);
    Stack::of(
        postgres.with(&[("outbox_relay.poll_interval", "1s")]).faults(),
        Redis::with(&["--stream-node-max-entries", "5"]),
    )
}

const UNTRIMMED: &[(&str, &str)] = &[kit::UNTRIMMED];

/// How often each of these stands in any of those entries.
fn times(published: &[Uuid], entries: &[Entry]) -> BTreeMap<usize, usize> {
    let found = ids(entries);
    let mut times = BTreeMap::new();
    for id in published {
        let count = found.iter().filter(|other| *other == id).count();
        *times.entry(count).or_default() += 1;
    }
    times
}

/// An entry of the default backend's, in another database of the Redis.
fn entries_of_db(redis: &Redis, db: u32) -> Vec<Entry> {
    let mut conn = redis.conn();
    kit::tell(&mut conn, &["SELECT", &db.to_string()]);
    kit::entries(&mut conn, "events")
}

/// At random moments, with a load that never pauses.
#[test]
fn a_backend_that_is_changed_under_load_sends_each_event_once() {
    let stack = stack(UNTRIMMED);
    let ledger = Ledger::create(&stack.pg);
    let mut client = stack.pg.client();
    let load = Load::start(&stack.pg, 3, "");
    for round in 0..3 {
        for change in [
            "max_len = 100000, trim = 'read'",
            "max_len = null, trim = 'length'",
            "enabled = false",
            "enabled = true",
            "socket_timeout = '400 ms'",
            "socket_timeout = null",
            "wait_replicas = 0, static_fields = '{\"round\": 1}'",
        ] {
            load.wait_more(10);
            client
                .batch_execute(&format!("update outbox.backends set {change}"))
                .unwrap_or_else(|error| panic!("{change} in round {round}: {error:?}"));
        }
    }
    load.wait_more(20);
    load.stop();
    ledger.settle(&stack, LIMIT).assert_exactly_once();
}

/// Both go on where the other was, in one transaction; and back.
#[test]
fn two_backends_that_change_places_send_each_event_to_one_of_them() {
    let stack = stack(UNTRIMMED);
    let port = stack.redis.port();
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, db, stream_name) values ('b', '127.0.0.1', {port}, 1, 'events')"
    ));
    stack
        .pg
        .exec("update outbox.backends set db = 0 where name = 'default'");
    let mut client = stack.pg.client();
    let mut published: [Vec<Uuid>; 2] = [Vec::new(), Vec::new()];
    let mut publish = |client: &mut postgres::Client| {
        for (backend, published) in ["default", "b"].iter().zip(&mut published) {
            published.extend(publish_many(client, backend, "", "event", 50));
        }
    };
    publish(&mut client);
    for backend in ["default", "b"] {
        wait_drained(&stack.pg, backend);
    }
    publish(&mut client);
    client
        .batch_execute("update outbox.backends set db = 1 - db")
        .expect("they change places");
    publish(&mut client);
    for backend in ["default", "b"] {
        wait_drained(&stack.pg, backend);
    }
    let all: Vec<Entry> = [0, 1].iter().flat_map(|db| entries_of_db(&stack.redis, *db)).collect();
    for published in &published {
        // What was on its way just then may stand in both.
        let times = times(published, &all);
        assert_eq!(times.values().sum::<usize>(), 150);
        assert!(!times.contains_key(&0), "{times:?}");
        assert!(times[&1] >= 100, "{times:?}");
    }
}

/// Its guard is where it was, unless somebody has removed it.
#[test]
fn a_backend_that_comes_back_to_a_redis_appends_what_that_has_not_unless_its_guard_is_removed() {
    let stack = stack(UNTRIMMED);
    let mut client = stack.pg.client();
    let mut sent = [0, 0];
    let mut round = |db: usize, stack: &Stack| {
        stack.pg.exec(&format!("update outbox.backends set db = {db}"));
        publish_many(&mut client, "default", "", "event", 4);
        wait_drained(&stack.pg, "default");
        sent[db] += 4;
        sent
    };
    let lengths = || [0, 1].map(|db| entries_of_db(&stack.redis, db).len());
    round(0, &stack);
    wait_eq("entries", [4, 0], lengths);
    round(1, &stack);
    wait_eq("entries", [4, 4], lengths);
    let key: String = stack.pg.one("select outbox.guard_key('default')");
    stack.redis.call(&["DEL", &key]);
    round(0, &stack);
    wait_eq("entries", [8, 4], lengths);
    // What has gone to the first since is missing in the second.
    round(1, &stack);
    wait_eq("entries", [8, 12], lengths);
    let found = ids(&entries_of_db(&stack.redis, 1));
    let distinct: std::collections::BTreeSet<_> = found.iter().collect();
    assert_eq!(distinct.len(), 12);
}

/// The first claim was made, and nobody heard of it. What at_least_once has sent since is in no guard.
#[test]
fn what_at_least_once_has_sent_behind_an_unheard_claim_is_not_sent_again() {
    let stack = stack(&[("outbox_relay.redis_max_len", "10")]);
    stack.publish("first");
    stack.wait_events(1);
    stack.pg.hold_at("after_claim");
    add(&stack, stack.redis.port(), "exactly_once");
    let key: String = stack.pg.one("select outbox.guard_key('b')");
    stack.pg.wait_reached();
    assert!(stack.redis.guard(&key).is_some());
    deliver(&stack, "at_least_once", || stack.pg.release());
    switch_back(&stack);
}

/// The same of the first batch of a connection.
#[test]
fn what_at_least_once_has_sent_behind_an_unheard_batch_is_not_sent_again() {
    let stack = stack(&[("outbox_relay.redis_max_len", "10")]);
    let proxy = Proxy::to(stack.redis.port());
    add(&stack, proxy.port(), "exactly_once");
    let mut client = stack.pg.client();
    publish_many(&mut client, "b", "", "first", 1);
    stack.redis.wait_entries("s", 1);
    wait_drained(&stack.pg, "b");
    let key: String = stack.pg.one("select outbox.guard_key('b')");
    let guard = || stack.redis.guard(&key).expect("a guard");
    let token = guard().field("token").to_owned();
    proxy.cut();
    wait_until("another claim, and a refresh", || {
        guard().field("token") != token && guard().number("beat") > 0
    });
    proxy.hold_all(Way::ToClient);
    publish_many(&mut client, "b", "", "unheard", 1);
    stack.redis.wait_entries("s", 2);
    proxy.refuse();
    deliver(&stack, "at_least_once", || proxy.cut());
    switch_back(&stack);
}

/// A backend `b`, whose stream is `s`.
fn add(stack: &Stack, port: u16, delivery: &str) {
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, stream_name, delivery)
        values ('b', '127.0.0.1', {port}, 's', '{delivery}')"
    ));
}

/// It sends, in another way, what would be far too much to be found in the stream.
fn deliver(stack: &Stack, delivery: &str, then: impl FnOnce()) {
    let port = stack.redis.port();
    stack.pg.exec(&format!(
        "update outbox.backends set delivery = '{delivery}', port = {port} where name = 'b'"
    ));
    then();
    publish_many(&mut stack.pg.client(), "b", "", "event", 200);
    wait_drained(&stack.pg, "b");
}

fn switch_back(stack: &Stack) {
    let before = added(&stack.redis);
    stack
        .pg
        .exec("update outbox.backends set delivery = 'exactly_once' where name = 'b'");
    publish_many(&mut stack.pg.client(), "b", "", "event", 3);
    wait_until("three more", || added(&stack.redis) >= before + 3);
    wait_drained(&stack.pg, "b");
    assert_eq!(added(&stack.redis), before + 3);
    assert_eq!(standing(&stack.pg, "b").state, "idle");
}

/// How many entries the stream `s` was ever given.
fn added(redis: &Redis) -> i64 {
    let info: BTreeMap<String, redis::Value> = redis::cmd("XINFO")
        .arg(&["STREAM", "s"])
        .query(&mut redis.conn())
        .expect("a stream");
    match info["entries-added"] {
        redis::Value::Int(number) => number,
        ref other => panic!("entries-added is {other:?}"),
    }
}
