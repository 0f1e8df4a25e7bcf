//! A backend in the mode `standalone` whose Redis is a node of a cluster: the user is told so, and nothing is lost.

use kit::{Postgres, QUICK, Redis, Stack, UNTRIMMED, backoff, misconfigured, tell, wait_until};

const HINT: &str = "This Redis is a node of a cluster: set the backend's mode to cluster";

fn node() -> Redis {
    Redis::with(&["--cluster-enabled", "yes", "--cluster-require-full-coverage", "no"])
}

fn serves(node: &Redis, slots: std::ops::Range<u16>) {
    if slots.is_empty() {
        return;
    }
    let slots: Vec<String> = slots.map(|slot| slot.to_string()).collect();
    let mut words = vec!["CLUSTER", "ADDSLOTS"];
    words.extend(slots.iter().map(String::as_str));
    node.call(&words);
    // For a moment after its start a node takes no writes.
    let mut conn = node.conn();
    wait_until("a cluster that is up", || {
        let info: String = redis::cmd("CLUSTER")
            .arg("INFO")
            .query(&mut conn)
            .expect("CLUSTER INFO");
        info.contains("cluster_state:ok")
    });
}

fn id(node: &Redis) -> String {
    redis::cmd("CLUSTER")
        .arg("MYID")
        .query(&mut node.conn())
        .expect("CLUSTER MYID")
}

/// Two nodes that know each other; the first serves all slots, or none.
fn pair(of_first: u16) -> (Redis, Redis) {
    let (first, second) = (node(), node());
    serves(&first, 0..of_first);
    serves(&second, of_first..16_384);
    first.call(&["CLUSTER", "MEET", "127.0.0.1", &second.port().to_string()]);
    for node in [&first, &second] {
        let mut conn = node.conn();
        wait_until("a cluster of both", || {
            let slots: Vec<redis::Value> = redis::cmd("CLUSTER").arg("SLOTS").query(&mut conn).unwrap_or_default();
            let info: String = redis::cmd("CLUSTER")
                .arg("INFO")
                .query(&mut conn)
                .expect("CLUSTER INFO");
            info.contains("cluster_known_nodes:2") && info.contains("cluster_state:ok") && !slots.is_empty()
        });
    }
    (first, second)
}

fn stack(redis: Redis, delivery: &str) -> Stack {
    let stack = Stack::of(Postgres::with(QUICK).with(&[UNTRIMMED]), redis);
    stack
        .pg
        .exec(&format!("update outbox.backends set delivery = '{delivery}'"));
    stack
}

/// It serves no slot until somebody gives it some.
#[test]
fn a_cluster_that_is_down_fails_nothing() {
    let stack = stack(node(), "at_least_once");
    let trouble = backoff("CLUSTERDOWN", "The cluster does not serve all of its slots");
    let expected = stack.publish_into(&trouble, 150);
    serves(&stack.redis, 0..16_384);
    stack.assert_mended(&stack.redis, &expected);
}

/// The guard and the stream lie in different slots: one transaction cannot have both.
#[test]
fn keys_of_different_slots_are_a_misconfiguration() {
    let stack = stack(node(), "exactly_once");
    serves(&stack.redis, 0..16_384);
    let expected = stack.publish_into(&misconfigured("CROSSSLOT", HINT), 150);
    assert_eq!(stack.redis.xlen("events"), 0);
    stack.pg.exec("update outbox.backends set delivery = 'at_least_once'");
    stack.assert_mended(&stack.redis, &expected);
}

#[test]
fn a_stream_of_another_node_is_a_misconfiguration() {
    let (first, second) = pair(0);
    for delivery in ["exactly_once", "at_least_once"] {
        let stack = stack(Redis::start(), delivery);
        stack.point("default", &first);
        let expected = stack.publish_into(&misconfigured("MOVED", HINT), 150);
        stack.point("default", &stack.redis);
        stack.assert_mended(&stack.redis, &expected);
    }
    drop(second);
}

/// The slot of the stream is on its way to another node.
#[test]
fn a_stream_that_moves_is_a_misconfiguration() {
    let (first, second) = pair(16_384);
    let stack = stack(first, "at_least_once");
    let mut conn = stack.redis.conn();
    let slot: u16 = redis::cmd("CLUSTER")
        .arg(&["KEYSLOT", "events"])
        .query(&mut conn)
        .expect("CLUSTER KEYSLOT");
    let slot = slot.to_string();
    tell(&mut conn, &["CLUSTER", "SETSLOT", &slot, "MIGRATING", &id(&second)]);
    let expected = stack.publish_into(&misconfigured("ASK", HINT), 150);
    tell(&mut conn, &["CLUSTER", "SETSLOT", &slot, "STABLE"]);
    stack.assert_mended(&stack.redis, &expected);
}

#[test]
fn a_cluster_has_one_database() {
    let stack = stack(node(), "at_least_once");
    serves(&stack.redis, 0..16_384);
    stack.pg.exec("update outbox.backends set db = 1");
    // Valkey 9 lets a cluster have more, but has one unless it is told otherwise.
    let words = match tell(&mut stack.redis.conn(), &["CONFIG", "GET", "cluster-databases"]) {
        redis::Value::Array(found) if !found.is_empty() => "DB index is out of range",
        _ => "SELECT is not allowed in cluster mode",
    };
    let trouble = misconfigured(words, "Lower the backend's db");
    let expected = stack.publish_into(&trouble, 150);
    stack.pg.exec("update outbox.backends set db = 0");
    stack.assert_mended(&stack.redis, &expected);
}
