//! A backend in the mode `standalone` whose Redis is a node of a cluster: the error says so, and nothing is lost.

use kit::{Postgres, QUICK, Redis, Stack, UNTRIMMED, Way, backoff, ids, misconfigured, tell, wait_drained, wait_until};

const HINT: &str = "This Redis is a node of a cluster. Set the backend's mode to cluster";

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
    // For a moment after its start a node accepts no writes.
    let mut conn = node.conn();
    wait_until("a cluster that is up", || {
        let info: String = redis::cmd("CLUSTER")
            .arg("INFO")
            .query(&mut conn)
            .expect("CLUSTER INFO");
        info.contains("cluster_state:ok")
    });
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

/// It serves no slot until it is given some.
#[test]
fn a_cluster_that_is_down_fails_nothing() {
    let stack = stack(node(), "at_least_once");
    let trouble = backoff("CLUSTERDOWN", "The cluster does not serve all of its hash slots");
    let expected = stack.publish_into(&trouble, 150);
    serves(&stack.redis, 0..16_384);
    stack.assert_mended(&stack.redis, &expected);
}

/// The guard and the stream are in different slots: one transaction cannot have both.
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

/// The slot of the stream is being moved to another node.
#[test]
fn a_stream_that_moves_is_a_misconfiguration() {
    let (first, second) = pair(16_384);
    let stack = stack(first, "at_least_once");
    let slot = stack.redis.slot_of("events").to_string();
    stack
        .redis
        .call(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &second.node_id()]);
    let expected = stack.publish_into(&misconfigured("ASK", HINT), 150);
    stack.redis.call(&["CLUSTER", "SETSLOT", &slot, "STABLE"]);
    stack.assert_mended(&stack.redis, &expected);
}

/// Whether this server answers TRYAGAIN to an EXEC whose keys are on two nodes. Redis before version 7, and Valkey,
/// answer ASK.
fn says_try_again(conn: &mut redis::Connection) -> bool {
    let info: String = redis::cmd("INFO").arg("server").query(conn).expect("INFO");
    !info.contains("redis_version:6.") && !info.contains("valkey")
}

/// The guard moves to another node after Redis has queued a batch, and before the EXEC.
#[test]
fn a_slot_that_is_half_moved_is_waited_for() {
    let (first, second) = pair(16_384);
    let stack = stack(first, "exactly_once");
    // A refresh of the guard is a transaction, too.
    stack.pg.set("outbox_relay.poll_interval", "1h");
    let guard = stack.guard_key();
    // So it is in the slot of the guard.
    let stream = format!("{{{guard}}}");
    // Braces of a name are doubled in `stream_name`.
    let sql = format!("update outbox.backends set stream_name = '{{{stream}}}'");
    stack.pg.exec(&sql);
    let proxy = stack.through_proxy();
    let before = stack.publish("t");
    stack.redis.wait_entries(&stream, 1);
    let slot = stack.redis.slot_of(&guard).to_string();
    second.call(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &stack.redis.node_id()]);
    stack
        .redis
        .call(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &second.node_id()]);
    proxy.hold_behind(Way::ToServer, b"*1\r\n$4\r\nEXEC");
    let behind = stack.publish("t");
    proxy.wait_held(Way::ToServer, 2);
    let to_second = |key: &str| {
        let port = second.port().to_string();
        stack.redis.call(&["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]);
    };
    to_second(&guard);
    proxy.release();
    let mut conn = stack.redis.conn();
    let says_try_again = says_try_again(&mut conn);
    wait_until("TRYAGAIN, and ASK to whoever looks for the guard then", || {
        let said: String = redis::cmd("INFO").arg("errorstats").query(&mut conn).expect("INFO");
        let is_first = said.contains("errorstat_TRYAGAIN") || !says_try_again;
        is_first && said.contains("errorstat_ASK")
    });
    assert_eq!(stack.redis.xlen(&stream), 1);
    to_second(&stream);
    for node in [&second, &stack.redis] {
        node.call(&["CLUSTER", "SETSLOT", &slot, "NODE", &second.node_id()]);
    }
    stack.point("default", &second);
    assert_eq!(ids(&second.wait_entries(&stream, 2)), [before, behind]);
    wait_drained(&stack.pg, "default");
}

#[test]
fn a_cluster_has_one_database() {
    let stack = stack(node(), "at_least_once");
    serves(&stack.redis, 0..16_384);
    stack.pg.exec("update outbox.backends set db = 1");
    // Valkey 9 allows more databases in a cluster, but has one by default.
    let words = match tell(&mut stack.redis.conn(), &["CONFIG", "GET", "cluster-databases"]) {
        redis::Value::Array(found) if !found.is_empty() => "DB index is out of range",
        _ => "SELECT is not allowed in cluster mode",
    };
    let trouble = misconfigured(words, "Lower the backend's db");
    let expected = stack.publish_into(&trouble, 150);
    stack.pg.exec("update outbox.backends set db = 0");
    stack.assert_mended(&stack.redis, &expected);
}
