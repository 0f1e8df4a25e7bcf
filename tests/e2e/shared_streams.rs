//! Several parties write to one stream: backends, databases, other producers, administrators. None of them makes
//! another one's events stand there twice.

use std::collections::BTreeMap;

use kit::{Postgres, Proxy, QUICK, Redis, Stack, Way, publish_many, types, wait_drained, wait_eq, wait_until};
use postgres::Client;
use redis::{Value, cmd};

use crate::health::{follow, wait_ill, wait_well};

/// Entries of a node: streams are trimmed by whole nodes.
const NODE: &str = "5";

/// A server with a second backend for the same stream, which cuts it to almost nothing and is paused.
fn start() -> (Stack, Client) {
    // Where replies are held, no refresh may be in the way of a batch.
    start_with("1h")
}

fn start_with(poll_interval: &str) -> (Stack, Client) {
    let postgres = Postgres::with(QUICK).with(&[("outbox_relay.poll_interval", poll_interval)]);
    let stack = Stack::of(postgres, Redis::with(&["--stream-node-max-entries", NODE]));
    let client = stack.pg.client();
    add_other(&stack, "postgres");
    (stack, client)
}

/// In this database, a backend "other".
fn add_other(stack: &Stack, database: &str) {
    let port = stack.redis.port();
    stack.pg.exec_db(
        database,
        &format!(
            "insert into outbox.backends (name, host, port, stream_name, max_len, enabled)
            values ('other', '127.0.0.1', {port}, 'events', 1, false)"
        ),
    );
}

/// Pauses the other backend, or has it send what waits.
fn enable(client: &mut Client, enabled: bool) {
    let sql = format!("update outbox.backends set enabled = {enabled} where name = 'other'");
    client.batch_execute(&sql).expect("it is there");
}

/// How many entries were ever added to a stream, and how many are left.
#[track_caller]
fn counts(redis: &Redis, stream: &str) -> (i64, i64) {
    let info: BTreeMap<String, Value> = cmd("XINFO")
        .arg(&["STREAM", stream])
        .query(&mut redis.conn())
        .unwrap_or_else(|error| panic!("no stream {stream}: {error}"));
    let number = |field: &str| match info[field] {
        Value::Int(number) => number,
        ref other => panic!("{field} is {other:?}"),
    };
    (number("entries-added"), number("length"))
}

#[track_caller]
fn wait_added(stack: &Stack, count: i64) {
    wait_until(&format!("{count} entries that were added"), || {
        counts(&stack.redis, "events").0 >= count
    });
}

/// Nothing more than that was ever added, and nothing has failed or waits.
#[track_caller]
fn assert_added(stack: &Stack, database: &str, count: i64) {
    wait_added(stack, count);
    let mut client = stack.pg.client_db(database);
    let mut number = |sql: &str| -> i64 { client.query_one(sql, &[]).expect("a number").get(0) };
    wait_eq("events that wait", 0, || {
        number("select sum(pending)::bigint from outbox.backend_status")
    });
    assert_eq!(counts(&stack.redis, "events").0, count);
    let kept = "select (select count(*) from outbox.failed_events) + (select count(*) from outbox.refused_events)";
    assert_eq!(number(kept), 0);
}

/// Leads the backend `default` through a proxy; it has sent one event when this returns.
fn through_proxy(stack: &Stack) -> Proxy {
    let proxy = stack.through_proxy();
    stack.publish("first");
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    proxy
}

/// Publishes so many events of which Redis has the entries, and of which the relay never hears.
fn publish_unheard(stack: &Stack, proxy: &Proxy, client: &mut Client, count: i32) {
    let before = counts(&stack.redis, "events").0;
    proxy.hold_all(Way::ToClient);
    publish_many(client, "default", "", "unheard", count);
    wait_added(stack, before + i64::from(count));
}

/// The relay finds out what has become of the batch.
fn reconnect(proxy: &Proxy) {
    proxy.cut();
    proxy.release();
}

/// Its events are older than those that it trims away: by their times alone it would seem that nothing had come after
/// them.
#[test]
fn a_batch_that_another_backend_has_trimmed_away_is_not_repeated() {
    let (stack, mut client) = start();
    let proxy = through_proxy(&stack);
    let mut expected = 1;
    for count in [1, 3, 7] {
        publish_many(&mut client, "other", "", "older", 30);
        publish_unheard(&stack, &proxy, &mut client, count);
        enable(&mut client, true);
        expected += 30 + i64::from(count);
        wait_added(&stack, expected);
        let entries = stack.events();
        let left = types(&entries);
        assert!(!left.iter().any(|name| name.starts_with("unheard")), "{left:?}");
        wait_drained(&stack.pg, "other");
        enable(&mut client, false);
        reconnect(&proxy);
        assert_added(&stack, "postgres", expected);
    }
    publish_many(&mut client, "default", "", "event", 2);
    assert_added(&stack, "postgres", expected + 2);
}

/// Of a batch of seven, so many are left, or what was removed was not removed from the old end.
#[test]
fn a_batch_of_which_others_have_removed_entries_is_not_repeated() {
    let (stack, mut client) = start();
    let proxy = through_proxy(&stack);
    let mut expected = 1;
    let call = |words: &[&str]| stack.redis.call(words);
    let producer = |length: &str, count: usize| {
        for _ in 0..count {
            call(&[
                "XADD",
                "events",
                "MAXLEN",
                length,
                "*",
                "event_id",
                "1",
                "made",
                "elsewhere",
            ]);
        }
    };
    for removes in 0..6 {
        publish_unheard(&stack, &proxy, &mut client, 7);
        expected += 7;
        match removes {
            0 => drop(call(&["XTRIM", "events", "MAXLEN", "1"])),
            1 => drop(call(&["XTRIM", "events", "MAXLEN", "0"])),
            2 => {
                let last = stack.events().pop().expect("an entry").id;
                call(&["XDEL", "events", &last]);
            }
            3 => producer("1", 1),
            4 => producer("3", 5),
            _ => {
                producer("0", 1);
                call(&["XADD", "events", "*", "no", "event"]);
            }
        }
        expected += [0, 0, 0, 1, 5, 2][removes];
        reconnect(&proxy);
        publish_many(&mut client, "default", "", "event", 1);
        expected += 1;
        assert_added(&stack, "postgres", expected);
    }
}

/// Each has its own guard, and its own books.
#[test]
fn a_batch_that_another_database_has_trimmed_away_is_not_repeated() {
    let (stack, mut client) = start();
    stack.pg.exec("create database second");
    stack.pg.exec_db("second", "create extension outbox_relay");
    add_other(&stack, "second");
    let mut second = stack.pg.client_db("second");
    let proxy = through_proxy(&stack);
    publish_many(&mut second, "other", "", "older", 30);
    publish_unheard(&stack, &proxy, &mut client, 3);
    enable(&mut second, true);
    wait_added(&stack, 34);
    reconnect(&proxy);
    publish_many(&mut client, "default", "", "event", 1);
    assert_added(&stack, "postgres", 35);
}

/// Redis comes back to a state in which the last batch of an earlier connection was trimmed away.
#[test]
fn a_healing_does_not_repeat_what_another_backend_has_trimmed_away() {
    let (mut stack, mut client) = start_with("200ms");
    publish_many(&mut client, "default", "", "event", 3);
    stack.wait_events(3);
    wait_drained(&stack.pg, "default");
    publish_many(&mut client, "other", "", "event", 30);
    enable(&mut client, true);
    wait_added(&stack, 33);
    wait_drained(&stack.pg, "other");
    let saved = stack.redis.saved();
    stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    publish_many(&mut client, "default", "", "lost", 2);
    assert_added(&stack, "postgres", 35);
    stack.redis.crash_back_to(&saved);
    wait_eq("healings", 1, || {
        stack
            .pg
            .one::<i64>("select healings from outbox.backend_status where backend = 'default'")
    });
    assert_added(&stack, "postgres", 35);
}

/// What is on its way when the stream changes stands where it was sent.
#[test]
fn a_batch_whose_reply_was_lost_stays_in_the_stream_that_was_the_backends_own() {
    let (stack, mut client) = start();
    let proxy = through_proxy(&stack);
    let all = || -> usize {
        let streams = ["events", "second", "third"];
        streams.iter().map(|stream| stack.redis.xlen(stream)).sum()
    };
    for change in [
        "update outbox.backends set stream_name = 'second' where name = 'default'",
        "update outbox.backends set stream_name = null where name = 'default'",
        "alter system set outbox_relay.redis_stream_name = 'third'",
    ] {
        let before = all();
        let accepted = proxy.accepted();
        proxy.hold_all(Way::ToClient);
        publish_many(&mut client, "default", "", "unheard", 3);
        wait_eq("entries", before + 3, all);
        client.batch_execute(change).expect("a change");
        client.batch_execute("select pg_reload_conf()").expect("a change");
        publish_many(&mut client, "default", "", "event", 2);
        // The worker waits for the replies a moment.
        wait_until("another connection", || proxy.accepted() > accepted);
        reconnect(&proxy);
        wait_drained(&stack.pg, "default");
        assert_eq!(all(), before + 5, "{change}");
    }
    assert_eq!(
        ["events", "second", "third"].map(|stream| stack.redis.xlen(stream)),
        [1 + 3 + 2 + 3, 2 + 3, 2]
    );
}

/// Each alone keeps its promise; together they do not.
#[test]
fn backends_that_trim_one_stream_differently_are_named_by_health() {
    let (stack, mut client) = start();
    let stream = |sql: &str| stack.pg.exec(sql);
    wait_well(&stack.pg, "shared streams");
    enable(&mut client, true);
    let ill = wait_ill(
        &stack.pg,
        "shared streams",
        "\"default\" and \"other\" write to the stream \"events\"",
    );
    assert_eq!(ill.status, "warn");
    follow(&stack.pg, "postgres", &ill);
    wait_well(&stack.pg, "shared streams");
    stream("update outbox.backends set trim = 'read' where name = 'other'");
    wait_ill(&stack.pg, "shared streams", "trim it differently");
    // Another database of that Redis, another stream, a template: they share nothing.
    for apart in [
        "db = 1",
        "db = 0, stream_name = 'audit'",
        "stream_name = 'events{source}'",
    ] {
        stream(&format!("update outbox.backends set {apart} where name = 'other'"));
        wait_well(&stack.pg, "shared streams");
        stream("update outbox.backends set db = null, stream_name = null where name = 'other'");
        wait_ill(&stack.pg, "shared streams", "trim it differently");
    }
}
