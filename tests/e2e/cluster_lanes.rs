//! A backend of a cluster has lanes for 64 hash slots. One with nothing to do is given up for another hash slot, and
//! goes on when an event for it comes. Every guarantee holds meanwhile.

use kit::{
    Bystander, Cluster, LIMIT, Ledger, Load, Postgres, QUICK, Redis, Stack, UNTRIMMED, eventually, ids, publish_many,
    standing, wait_drained, wait_eq, wait_trouble, wait_until,
};
use std::time::Instant;
use uuid::Uuid;

const MOST_LANES: usize = 64;

/// A stack whose backend `default` uses this cluster; the stack's own Redis does nothing.
fn stack(cluster: &Cluster) -> Stack {
    let quick = [QUICK, &[("outbox_relay.poll_interval", "200ms")]].concat();
    let stack = Stack::of(Postgres::with(&quick).with(&[UNTRIMMED]), Redis::start());
    stack.pg.exec(&format!(
        "update outbox.backends set mode = 'cluster', nodes = '{}', host = null, port = null",
        cluster.addresses()
    ));
    stack
}

fn publish(stack: &Stack, stream: &str, count: i32) -> Vec<Uuid> {
    publish_many(&mut stack.pg.client(), "default", stream, "event", count)
}

/// Publishes an event to each stream, in one transaction.
fn publish_to_all(stack: &Stack, streams: &[String]) {
    stack.pg.exec(&format!(
        "select outbox.publish_event('event', 'kit', stream => s) from unnest('{{{}}}'::text[]) s",
        streams.join(",")
    ));
}

/// How many lanes there are, and how many were given up.
fn lanes(stack: &Stack) -> (i64, i64) {
    let count = |table: &str| {
        stack
            .pg
            .one(&format!("select count(*) from outbox.{table} where slot >= 0"))
    };
    (count("cursors"), count("former_lanes"))
}

/// Waits until each stream has this many entries, and not more.
#[track_caller]
fn wait_all(cluster: &Cluster, streams: &[String], count: usize) {
    for stream in streams {
        assert_eq!(cluster.wait_entries(stream, count).len(), count, "{stream}");
    }
}

fn assert_published(stack: &Stack, count: i64) {
    let found = standing(&stack.pg, "default");
    assert_eq!((found.published, found.failed, found.pending), (count, 0, 0));
    let published: i64 = stack
        .pg
        .one("select count(*) from outbox.event_status where status = 'published'");
    assert_eq!(published, count);
}

/// With each guarantee; whatever was given up goes on where it stood.
#[test]
fn more_hash_slots_than_lanes_take_turns() {
    let cluster = Cluster::start(0);
    let mut stack = stack(&cluster);
    let streams = cluster.streams(150);
    publish_to_all(&stack, &streams);
    wait_all(&cluster, &streams, 1);
    wait_drained(&stack.pg, "default");
    assert_eq!(lanes(&stack), (64, 86));
    assert_published(&stack, 150);
    publish_to_all(&stack, &streams);
    wait_all(&cluster, &streams, 2);
    wait_drained(&stack.pg, "default");
    assert_eq!(lanes(&stack), (64, 86));
    assert_published(&stack, 300);
    stack.pg.restart();
    publish_to_all(&stack, &streams);
    wait_all(&cluster, &streams, 3);
    stack.pg.exec("update outbox.backends set delivery = 'at_least_once'");
    publish_to_all(&stack, &streams);
    wait_all(&cluster, &streams, 4);
    wait_drained(&stack.pg, "default");
    assert_published(&stack, 600);
    // Nothing of a deleted backend stays.
    stack.pg.exec("delete from outbox.backends");
    wait_eq("lanes", (0, 0), || lanes(&stack));
}

#[test]
fn lanes_that_take_turns_lose_and_repeat_nothing_whatever_dies() {
    let cluster = Cluster::start(0);
    let mut stack = stack(&cluster);
    Ledger::create(&stack.pg);
    let streams: Vec<String> = (0..160).map(|n| format!("s{n}")).collect();
    for round in 0..4 {
        let load = Load::paced(&stack.pg, 400, "'s' || n % 2 + 2 * floor(80 * random())");
        load.wait_more(100);
        match round % 2 {
            0 => stack.pg.kill_worker(),
            _ => {
                stack.pg.crash();
                stack.pg.start_again();
            }
        }
        load.wait_more(100);
        load.stop();
    }
    wait_drained(&stack.pg, "default");
    let (there, former) = lanes(&stack);
    assert!(there == 64 && former > 20, "{there} lanes and {former} former ones");
    cluster.verdict(&stack.pg, "default", &streams).assert_exactly_once();
}

/// Streams that are never without events for long leave room for another one.
#[test]
fn a_new_hash_slot_gets_a_lane_while_all_are_in_use() {
    let cluster = Cluster::start(0);
    let stack = stack(&cluster);
    let streams = cluster.streams(MOST_LANES + 1);
    let (new, busy) = streams.split_last().expect("streams");
    publish_to_all(&stack, busy);
    wait_all(&cluster, busy, 1);
    let busy: Vec<String> = busy.iter().map(|s| format!("'{s}'")).collect();
    stack.pg.exec("create table ended ()");
    let mut publisher = stack.pg.client();
    let load = std::thread::spawn({
        let all = busy.join(",");
        move || {
            while publisher
                .query_one("select exists (select from pg_class where relname = 'ended')", &[])
                .expect("a row")
                .get::<_, bool>(0)
            {
                publisher
                    .batch_execute(&format!(
                        "select outbox.publish_event('event', 'kit', stream => s) from unnest(array[{all}]) s"
                    ))
                    .expect("published");
            }
        }
    });
    let published = publish(&stack, new, 3);
    let arrived = ids(&cluster.wait_entries(new, 3));
    stack.pg.exec("drop table ended");
    load.join().expect("the publisher ends");
    assert_eq!(arrived, published);
    wait_drained(&stack.pg, "default");
    let count: i64 = stack.pg.one("select count(*) from outbox.events");
    assert_published(&stack, count);
    let found: usize = streams.iter().map(|stream| cluster.entries(stream).len()).sum();
    assert_eq!(found as i64, count);
}

/// Only lanes without waiting events are given up.
#[test]
fn hash_slots_whose_lanes_all_wait_are_an_error_that_loses_nothing() {
    let cluster = Cluster::start(0);
    let stack = stack(&cluster);
    stack.pg.set("outbox_relay.max_retries", "1000");
    let streams = cluster.streams(MOST_LANES + 1);
    let (last, waiting) = streams.split_last().expect("streams");
    for stream in waiting {
        cluster.call(stream, &["SET", stream, "a string"]);
    }
    publish_to_all(&stack, waiting);
    wait_eq("what waits", 64i64, || {
        stack
            .pg
            .one("select count(*) from outbox.refused_events where accepted_in is null")
    });
    let published = publish(&stack, last, 1);
    wait_until("an error in the log", || {
        stack.pg.log().contains("64 others are in use")
    });
    wait_eq("its state", "misconfigured".to_string(), || {
        standing(&stack.pg, "default").state
    });
    assert_eq!(cluster.entries(last).len(), 0);
    let (first, others) = waiting.split_first().expect("streams");
    cluster.call(first, &["DEL", first]);
    assert_eq!(ids(&cluster.wait_entries(last, 1)), published);
    for stream in others {
        cluster.call(stream, &["DEL", stream]);
    }
    wait_all(&cluster, waiting, 1);
    wait_drained(&stack.pg, "default");
    wait_eq("its state", "idle".to_string(), || standing(&stack.pg, "default").state);
}

#[test]
fn what_a_former_lane_has_counted_is_counted_once() {
    let cluster = Cluster::start(0);
    let stack = stack(&cluster);
    let streams = cluster.streams(MOST_LANES + 1);
    let (bad, others) = streams.split_first().expect("streams");
    cluster.call(bad, &["SET", bad, "a string"]);
    let publish_bad = format!("select outbox.publish_event('event', 'kit', stream => '{bad}', max_retries => 1)");
    stack.pg.exec(&publish_bad);
    let metric = |name: &str| -> f64 {
        let value = "select value from outbox.metrics where name = $1 and labels->>'backend' = 'default'";
        stack.pg.client().query_one(value, &[&name]).expect("a value").get(0)
    };
    wait_eq("failed events", 1, || standing(&stack.pg, "default").failed);
    publish_to_all(&stack, others);
    wait_all(&cluster, others, 1);
    wait_eq("lanes", (64, 1), || lanes(&stack));
    cluster.call(bad, &["DEL", bad]);
    stack.pg.exec(&publish_bad);
    cluster.wait_entries(bad, 1);
    wait_drained(&stack.pg, "default");
    let found = standing(&stack.pg, "default");
    assert_eq!((found.published, found.failed), (65, 1));
    assert_eq!(metric("outbox_relay_failed_total"), 1.0);
    assert_eq!(metric("outbox_relay_published_total"), 65.0);
}

/// What a Redis has lost of a former lane is appended again with the next event.
#[test]
fn a_former_lane_heals() {
    let cluster = Cluster::start(0);
    let stack = stack(&cluster);
    let streams = cluster.streams(MOST_LANES + 1);
    let (last, others) = streams.split_last().expect("streams");
    let first = &others[0];
    let mut published = publish(&stack, first, 1);
    cluster.wait_entries(first, 1);
    wait_drained(&stack.pg, "default");
    let dump = |key: &str| cluster.call(first, &["DUMP", key]);
    let guard: String = stack
        .pg
        .client()
        .query_one("select outbox.guard_key('default', $1)", &[first])
        .expect("a key")
        .get(0);
    let saved = [first.clone(), guard].map(|key| (dump(&key), key));
    published.extend(publish(&stack, first, 2));
    cluster.wait_entries(first, 3);
    wait_drained(&stack.pg, "default");
    publish_to_all(&stack, &others[1..]);
    wait_all(&cluster, &others[1..], 1);
    wait_drained(&stack.pg, "default");
    publish(&stack, last, 1);
    wait_eq("lanes", (64, 1), || lanes(&stack));
    for (data, key) in saved {
        let ::redis::Value::BulkString(data) = data else {
            panic!("{key}: {data:?}")
        };
        let mut conn = cluster.nodes[cluster.master_of(first)].conn();
        ::redis::cmd("RESTORE")
            .arg(&key)
            .arg(0)
            .arg(data)
            .arg("REPLACE")
            .exec(&mut conn)
            .expect("RESTORE");
    }
    assert_eq!(cluster.entries(first).len(), 1);
    published.extend(publish(&stack, first, 1));
    assert_eq!(ids(&cluster.wait_entries(first, 4)), published);
    let healings: i64 = stack.pg.one("select healings from outbox.backend_status");
    assert_eq!(healings, 1);
}

/// Lanes that are given up take over when they go on.
#[test]
fn a_take_over_concerns_former_lanes_too() {
    let cluster = Cluster::start(0);
    let stack = stack(&cluster);
    stack.pg.exec("update outbox.backends set on_missing_guard = 'halt'");
    let streams = cluster.streams(MOST_LANES + 6);
    publish_to_all(&stack, &streams);
    wait_all(&cluster, &streams, 1);
    wait_drained(&stack.pg, "default");
    let former: Vec<i32> = stack.pg.one("select array_agg(slot) from outbox.former_lanes");
    let is_former = |stream: &&String| former.contains(&i32::from(cluster.slot_of(stream)));
    let former: Vec<&String> = streams.iter().filter(is_former).collect();
    assert_eq!(former.len(), 6);
    for stream in &former {
        let guard: String = stack
            .pg
            .client()
            .query_one("select outbox.guard_key('default', $1)", &[stream])
            .expect("a key")
            .get(0);
        let released = || cluster.call(stream, &["HGET", &guard, "released"]);
        wait_until("its guard to be released", || {
            released() == ::redis::Value::BulkString(b"1".to_vec())
        });
    }
    for node in &cluster.nodes {
        node.call(&["FLUSHALL"]);
    }
    wait_trouble(&stack.pg, "default", "misconfigured", "its guard is missing");
    stack.pg.exec("select outbox.take_over('default')");
    wait_eq("take-overs that were asked for", 0i64, || {
        stack.pg.one("select count(*) from outbox.take_overs")
    });
    // Lanes that have done it wait for the others, and do not do it again.
    let claims: i64 = stack.pg.one("select max(epoch) from outbox.cursors");
    assert!(claims < 10, "{claims} claims");
    for stream in former {
        let published = publish(&stack, stream, 1);
        let arrived = eventually("its entry", LIMIT, || {
            Some(ids(&cluster.entries(stream))).filter(|arrived| !arrived.is_empty())
        });
        assert_eq!(arrived, published, "{stream}");
    }
}

/// A publisher that names streams of ever other hash slots: those of others wait for their turn, and no longer.
#[test]
fn a_publisher_with_hundreds_of_hash_slots_holds_up_nobody() {
    const COUNT: usize = 800;
    let cluster = Cluster::start(0);
    let stack = stack(&cluster);
    let streams = cluster.streams(COUNT + 1);
    let (honest, others) = streams.split_last().expect("streams");
    let bystander = Bystander::start(&stack);
    let start = Instant::now();
    publish_to_all(&stack, others);
    let published = publish(&stack, honest, 1);
    let arrived = ids(&cluster.wait_entries(honest, 1));
    let took = start.elapsed();
    println!("{COUNT} hash slots took turns in {took:?}");
    assert_eq!(arrived, published);
    wait_drained(&stack.pg, "default");
    wait_all(&cluster, others, 1);
    bystander.stop(&stack).assert_undisturbed("hundreds of hash slots");
}
