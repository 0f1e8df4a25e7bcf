//! The answers of a real Redis that is not ready for events, or not for one of them: docs/FAILURES.md has the whole
//! list, and names the tests of the other answers (outage.rs, refused.rs, redis_rights.rs, backend_login.rs,
//! hostile.rs, wait_replicas.rs).

use std::net::UdpSocket;

use kit::{
    Postgres, QUICK, Redis, Stack, UNTRIMMED, backoff, env, ids, misconfigured, publish_many, standing, tell, types,
    wait_drained, wait_eq, wait_until,
};

const BOTH: [&str; 2] = ["exactly_once", "at_least_once"];

fn quick(redis: Redis) -> Stack {
    Stack::of(Postgres::with(QUICK).with(&[UNTRIMMED]), redis)
}

fn deliver(stack: &Stack, delivery: &str) {
    stack
        .pg
        .exec(&format!("update outbox.backends set delivery = '{delivery}'"));
}

/// With one value of a setting Redis refuses all writes, with another it accepts them; for both kinds of delivery.
#[track_caller]
fn refuses_while(setting: &str, [refuses, accepts]: [&str; 2], error: &str, hint: &str) {
    let stack = quick(Redis::start());
    let mut expected = Vec::new();
    for delivery in BOTH {
        deliver(&stack, delivery);
        expected.extend(publish_many(&mut stack.pg.client(), "default", "", "before", 3));
        stack.assert_mended(&stack.redis, &expected);
        stack.redis.call(&["CONFIG", "SET", setting, refuses]);
        expected.extend(stack.publish_into(&backoff(error, hint), 150));
        assert_eq!(stack.redis.xlen("events"), expected.len() - 150);
        stack.redis.call(&["CONFIG", "SET", setting, accepts]);
        stack.assert_mended(&stack.redis, &expected);
    }
}

#[test]
fn too_few_replicas_fail_nothing() {
    let hint = "Bring Redis's replicas back, or require fewer";
    refuses_while(
        "min-replicas-to-write",
        ["1", "0"],
        "NOREPLICAS Not enough good replicas",
        hint,
    );
}

#[test]
fn no_memory_fails_nothing() {
    refuses_while(
        "maxmemory",
        ["1", "0"],
        "OOM command not allowed",
        "Raise Redis's maxmemory",
    );
}

/// A replica that has lost its primary, and may not answer with its old data.
#[test]
fn a_replica_without_its_primary_fails_nothing() {
    for delivery in BOTH {
        let stack = quick(Redis::with(&["--replica-serve-stale-data", "no"]));
        deliver(&stack, delivery);
        let mut expected = publish_many(&mut stack.pg.client(), "default", "", "before", 3);
        stack.assert_mended(&stack.redis, &expected);
        stack.redis.call(&["REPLICAOF", "127.0.0.1", "1"]);
        // XADD is refused because it is a write; a worker that first reads the guard gets the error about the primary.
        let (error, hint) = match delivery {
            "exactly_once" => (
                "MASTERDOWN Link with MASTER is down",
                "The backend's host is a replica that has lost its primary",
            ),
            _ => ("", "The backend's host is a replica"),
        };
        stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
        expected.extend(stack.publish_into(&backoff(error, hint), 150));
        stack.redis.call(&["REPLICAOF", "NO", "ONE"]);
        stack.assert_mended(&stack.redis, &expected);
    }
}

/// A script that has written can only be ended together with its server, which comes back with the data that it had
/// saved.
#[test]
fn a_script_that_cannot_be_killed_fails_nothing() {
    let redis = Redis::with(&[
        "--appendonly",
        "yes",
        "--appendfsync",
        "always",
        "--lua-time-limit",
        "20",
    ]);
    let mut stack = quick(redis);
    let mut expected = publish_many(&mut stack.pg.client(), "default", "", "before", 3);
    stack.assert_mended(&stack.redis, &expected);
    let mut conn = stack.redis.conn();
    let script = std::thread::spawn(move || {
        let text = "redis.call('set', 'x', 1) while true do end";
        redis::cmd("EVAL").arg(text).arg(0).exec(&mut conn)
    });
    let mut admin = stack.redis.conn();
    wait_until("a script that cannot be killed", || {
        let killed = redis::cmd("SCRIPT").arg("KILL").exec(&mut admin);
        killed.is_err_and(|error| error.code() == Some("UNKILLABLE"))
    });
    expected.extend(stack.publish_into(
        &backoff("BUSY", "A script keeps Redis busy. End it with SCRIPT KILL"),
        150,
    ));
    stack.redis.kill9();
    assert!(script.join().expect("no panic").is_err());
    stack.redis.start_again();
    stack.assert_mended(&stack.redis, &expected);
}

/// Redis closes the connection because of an event that is larger than it accepts: that event fails, and no other does.
#[test]
fn an_event_that_is_too_large_for_redis_fails_alone() {
    for delivery in BOTH {
        let stack = quick(Redis::start());
        stack.pg.set("outbox_relay.max_event_size", "16MB");
        deliver(&stack, delivery);
        stack.redis.call(&["CONFIG", "SET", "proto-max-bulk-len", "1mb"]);
        stack.pg.exec(
            "select outbox.publish_event('before' || n, 'kit') from generate_series(1, 3) n;
             select outbox.publish_event('large', 'kit', jsonb_build_object('text', repeat('x', 4000000)), max_retries => 2, stream => 'large');
             select outbox.publish_event('after' || n, 'kit') from generate_series(1, 3) n;",
        );
        let failed = "select coalesce(string_agg(event_type || ' ' || attempts || ' ' || last_error, ','), '') from outbox.failed_events";
        let expected = "large 2 ERR Protocol error: invalid bulk length".to_string();
        wait_eq("failed events", expected, || stack.pg.one(failed));
        wait_drained(&stack.pg, "default");
        let arrived = stack.wait_events(6);
        assert_eq!(
            types(&arrived),
            ["before1", "before2", "before3", "after1", "after2", "after3"],
            "{delivery}"
        );
        stack.redis.call(&["CONFIG", "SET", "proto-max-bulk-len", "512mb"]);
        assert_eq!(stack.pg.one::<i64>("select outbox.retry_failed()"), 1);
        assert_eq!(types(&stack.redis.wait_entries("large", 1)), ["large"]);
    }
}

/// Redis closes the connection without an error when its query buffer is full: all events wait.
#[test]
fn a_query_buffer_that_is_too_small_fails_nothing() {
    for delivery in BOTH {
        let stack = quick(Redis::start());
        stack.pg.set("outbox_relay.max_event_size", "16MB");
        deliver(&stack, delivery);
        stack.redis.call(&["CONFIG", "SET", "client-query-buffer-limit", "1mb"]);
        stack.pg.exec("select outbox.publish_event('large', 'kit', jsonb_build_object('text', repeat('x', 4000000)), max_retries => 1)");
        kit::wait_trouble(&stack.pg, "default", "backoff", "");
        stack.pg.wait_log(
            "HINT:  If this continues, look in Redis's log for the reason, such as client-query-buffer-limit",
        );
        assert!(stack.redis.log().contains("reached max query buffer length"));
        let found = standing(&stack.pg, "default");
        assert_eq!((found.pending, found.failed), (1, 0), "{delivery}: {found:?}");
        stack.redis.call(&["CONFIG", "SET", "client-query-buffer-limit", "1gb"]);
        stack.wait_events(1);
        wait_drained(&stack.pg, "default");
        assert_eq!(types(&stack.events()), ["large"], "{delivery}");
    }
}

/// Redis closes the connection because the replies to an executed transaction, or to a check of the streams, are too
/// long: all events wait, and the guard proves what was appended.
#[test]
fn an_output_limit_that_is_too_small_repeats_nothing() {
    let stack = quick(Redis::start());
    stack.pg.set("outbox_relay.batch_size", "5000");
    stack
        .redis
        .call(&["CONFIG", "SET", "client-output-buffer-limit", "normal 1 0 0"]);
    let expected = publish_many(&mut stack.pg.client(), "default", "", "t", 4_000);
    // Before 7.0 it has more room that does not count, and accepts everything.
    let is_closed = || stack.redis.log().contains("overcoming of output buffer limits");
    wait_until("Redis to close the connection", || {
        is_closed() || stack.redis.xlen("events") == 4_000
    });
    if is_closed() {
        stack
            .pg
            .wait_log("HINT:  If this continues, look in Redis's log for the reason");
    }
    stack
        .redis
        .call(&["CONFIG", "SET", "client-output-buffer-limit", "normal 0 0 0"]);
    stack.assert_mended(&stack.redis, &expected);
}

#[test]
fn a_password_that_redis_does_not_want_is_a_misconfiguration() {
    let stack = quick(Redis::start());
    stack.pg.exec("select outbox.set_backend_password('default', 'secret')");
    let trouble = misconfigured("without any password configured", "This Redis requires no password");
    let expected = stack.publish_into(&trouble, 150);
    assert!(!stack.pg.log().contains("'secret'\n"), "only the statement may have it");
    stack.pg.exec("select outbox.set_backend_password('default', null)");
    stack.assert_mended(&stack.redis, &expected);
}

#[test]
fn a_database_that_redis_does_not_have_is_a_misconfiguration() {
    let stack = quick(Redis::start());
    stack.pg.exec("update outbox.backends set db = 99");
    let trouble = misconfigured("DB index is out of range", "Lower the backend's db");
    let expected = stack.publish_into(&trouble, 150);
    stack.pg.exec("update outbox.backends set db = 0");
    stack.assert_mended(&stack.redis, &expected);
}

/// The connection comes from another address than the loopback of its machine.
#[test]
fn a_redis_in_protected_mode_is_a_misconfiguration() {
    // Nothing is sent: this only looks up the route.
    let away = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect("203.0.113.1:9")?;
        socket.local_addr()
    });
    let Some(address) = away.ok().map(|a| a.ip()).filter(|a| !a.is_loopback()) else {
        env::not_run("this machine has no address but its loopback's");
        return;
    };
    let stack = quick(Redis::with(&["--bind", "0.0.0.0", "--protected-mode", "yes"]));
    let from_away = redis::Client::open(format!("redis://{address}:{}", stack.redis.port())).expect("an address");
    if from_away.get_connection().is_ok() {
        env::not_run("this Redis is not protected when it is told where to listen (before 7.0)");
        return;
    }
    stack.point_at("default", &address.to_string(), stack.redis.port());
    let expected = stack.publish_into(&misconfigured("DENIED", "Redis is in protected mode"), 150);
    stack.redis.call(&["CONFIG", "SET", "protected-mode", "no"]);
    stack.assert_mended(&stack.redis, &expected);
}

/// MULTI and EXEC are renamed, as on a hardened server or behind a proxy without transactions.
#[test]
fn a_redis_without_transactions_is_a_misconfiguration_for_exactly_once() {
    for command in ["WATCH", "MULTI", "EXEC"] {
        let stack = quick(Redis::with(&["--rename-command", command, ""]));
        let trouble = misconfigured(
            "unknown command",
            "exactly_once needs transactions (WATCH, MULTI, EXEC)",
        );
        let expected = stack.publish_into(&trouble, 150);
        assert_eq!(stack.redis.xlen("events"), 0);
        deliver(&stack, "at_least_once");
        stack.assert_mended(&stack.redis, &expected);
    }
}

#[test]
fn a_redis_without_streams_is_named_as_such() {
    for delivery in BOTH {
        let stack = quick(Redis::with(&["--rename-command", "XADD", ""]));
        deliver(&stack, delivery);
        let modern = Redis::start();
        let expected = stack.publish_into(&misconfigured("unknown command", "This server has no streams"), 150);
        stack.point("default", &modern);
        stack.assert_mended(&modern, &expected);
    }
}

/// The key holds a string, and is corrected: the pending events arrive in order.
#[test]
fn a_guard_of_another_type_is_a_misconfiguration() {
    let stack = quick(Redis::start());
    let mut expected = publish_many(&mut stack.pg.client(), "default", "", "before", 3);
    stack.assert_mended(&stack.redis, &expected);
    let key: String = stack.pg.one("select outbox.guard_key('default')");
    stack.redis.call(&["SET", &key, "something else"]);
    stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    let trouble = misconfigured(
        "WRONGTYPE",
        "Something else has written to that key of Redis. Delete the key",
    );
    expected.extend(stack.publish_into(&trouble, 150));
    stack.redis.call(&["DEL", &key]);
    stack.assert_mended(&stack.redis, &expected);
}

/// All of its connections are in use at login; an administrator's stays open.
#[test]
fn a_redis_without_a_free_connection_gets_a_hint() {
    let stack = quick(Redis::start());
    let mut admin = stack.redis.conn();
    tell(&mut admin, &["CONFIG", "SET", "maxclients", "1"]);
    tell(&mut admin, &["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    let trouble = backoff("max number of clients reached", "Raise Redis's maxclients");
    let expected = stack.publish_into(&trouble, 150);
    tell(&mut admin, &["CONFIG", "SET", "maxclients", "100"]);
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), expected);
}
