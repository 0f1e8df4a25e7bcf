//! Instead of Redis there is another server, or none: timeouts hold, and no answer is mistaken for a delivery.

use std::time::{Duration, Instant};

use kit::{BlackHole, Garbage, Postgres, QUICK, Redis, Stack, standing, types, wait_trouble};

fn stack() -> Stack {
    Stack::of(Postgres::with(QUICK), Redis::start())
}

/// Each backend has its own timeouts: the one under test is short, the other far too long to be reached.
#[test]
fn the_timeouts_of_a_backend_hold() {
    let stack = Stack::with(&[
        ("outbox_relay.redis_connect_timeout", "1h"),
        ("outbox_relay.redis_socket_timeout", "1h"),
    ]);
    let (silent, login, gone) = (BlackHole::start(), BlackHole::start(), BlackHole::unreachable());
    let start = Instant::now();
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, connect_timeout, socket_timeout) values
            ('silent', '127.0.0.1', {}, '30s', '300ms'),
            ('login', '127.0.0.1', {}, '300ms', '30s'),
            ('gone', '127.0.0.1', {}, '300ms', '30s');
        select outbox.set_backend_password('login', 'secret');
        select outbox.publish_event('t', 'kit', backend => name) from outbox.backends;",
        silent.port(),
        login.port(),
        gone.port()
    ));
    for backend in ["silent", "login", "gone"] {
        let found = wait_trouble(&stack.pg, backend, "backoff", "timed out");
        assert_eq!((found.pending, found.published), (1, 0), "{backend}");
        let took: f64 = stack.pg.one(&format!(
            "select extract(epoch from last_error_at - created_at)::float8
            from outbox.backend_status join outbox.event_status using (backend) where backend = '{backend}'"
        ));
        assert!((0.3..2.0).contains(&took), "{backend}: {took} s");
    }
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert_eq!(stack.wait_events(1).len(), 1, "the backend that works goes on");
    assert_eq!((silent.accepted() > 0, login.accepted() > 0), (true, true));
}

/// An answer that is not Redis's is an error of the backend; the events wait, and arrive once there is a Redis.
#[test]
fn no_answer_of_another_server_is_a_delivery() {
    let stack = stack();
    let garbage = [
        Garbage::start(),
        Garbage::saying(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        Garbage::saying(b""),
    ];
    let mute = [
        // As if every command had succeeded: the two of the login, and all others.
        BlackHole::saying(&b"+OK\r\n".repeat(50)),
        BlackHole::saying(&b"+PONG\r\n+PONG\r\n:1\r\n$-1\r\n*0\r\n".repeat(5)),
    ];
    let ports = garbage
        .iter()
        .map(Garbage::port)
        .chain(mute.iter().map(BlackHole::port));
    for (n, port) in ports.enumerate() {
        let backend = format!("b{n}");
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port, stream_name) values ('{backend}', '127.0.0.1', {port}, '{backend}');
            select outbox.publish_event('t' || n, 'kit', backend => '{backend}') from generate_series(1, 3) n;"
        ));
        let found = wait_trouble(&stack.pg, &backend, "backoff", "");
        assert_eq!(
            (found.pending, found.published, found.failed),
            (3, 0, 0),
            "{backend}: {found:?}"
        );
        stack.point(&backend, &stack.redis);
        let arrived = stack.redis.wait_entries(&backend, 3);
        assert_eq!(types(&arrived), ["t1", "t2", "t3"], "{backend}");
    }
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.failed_events"), 0);
}

#[test]
fn a_host_that_does_not_exist_is_a_misconfiguration() {
    let stack = stack();
    stack.point_at("default", "no..such..host", 6379);
    stack.publish("t");
    wait_trouble(&stack.pg, "default", "misconfigured", "failed to lookup address");
    stack
        .pg
        .exec("update outbox.backends set unix_socket = '/nowhere/redis.sock'");
    // Redis removes the file when it stops: an outage.
    let found = wait_trouble(&stack.pg, "default", "backoff", "No such file");
    assert_eq!(found.pending, 1);
    stack.pg.exec("update outbox.backends set unix_socket = null");
    stack.point("default", &stack.redis);
    assert_eq!(types(&stack.wait_events(1)), ["t"]);
    assert_eq!(standing(&stack.pg, "default").failed, 0);
}

/// A Redis that has no XADD (older than 5, or renamed): nothing fails.
#[test]
fn a_redis_without_streams_is_a_misconfiguration() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::with(&["--rename-command", "XADD", ""]));
    let modern = Redis::start();
    stack
        .pg
        .exec("select outbox.publish_event('t', 'kit', max_retries => 1)");
    let found = wait_trouble(&stack.pg, "default", "misconfigured", "unknown command");
    assert_eq!((found.pending, found.failed), (1, 0));
    stack.point("default", &modern);
    assert_eq!(types(&modern.wait_entries("events", 1)), ["t"]);
}

/// An unknown error is not a success. It may be about the event, so attempts are counted, and other streams go on.
#[test]
fn an_unknown_error_is_no_delivery() {
    let stack = stack();
    stack.pg.exec("update outbox.backends set delivery = 'at_least_once'");
    let strange = BlackHole::saying(&[b"+OK\r\n+PONG\r\n".to_vec(), b"-STRANGE new\r\n".repeat(50)].concat());
    stack.point_at("default", "127.0.0.1", strange.port());
    let sql = "select outbox.publish_event('t' || n, 'kit', max_retries => 2) from generate_series(1, 3) n";
    stack.pg.exec(sql);
    let failed =
        "select coalesce(string_agg(event_type || ' ' || last_error, ',' order by seq), '') from outbox.failed_events";
    let expected = "t1 STRANGE new,t2 STRANGE new,t3 STRANGE new".to_string();
    kit::wait_eq("failed events", expected, || stack.pg.one(failed));
    assert_eq!(standing(&stack.pg, "default").published, 0);
    stack.point("default", &stack.redis);
    assert_eq!(stack.pg.one::<i64>("select outbox.retry_failed()"), 3);
    assert_eq!(types(&stack.wait_events(3)), ["t1", "t2", "t3"]);
}

/// An error on reading the guard cannot be about an event.
#[test]
fn an_unknown_error_about_the_guard_fails_nothing() {
    let stack = stack();
    let strange = BlackHole::saying(&[b"+OK\r\n+PONG\r\n".to_vec(), b"-STRANGE new\r\n".repeat(50)].concat());
    stack.point_at("default", "127.0.0.1", strange.port());
    let sql = "select outbox.publish_event('t' || n, 'kit', max_retries => 1) from generate_series(1, 3) n";
    stack.pg.exec(sql);
    let found = wait_trouble(&stack.pg, "default", "misconfigured", "STRANGE new");
    assert_eq!((found.pending, found.published, found.failed), (3, 0, 0));
    stack.point("default", &stack.redis);
    assert_eq!(types(&stack.wait_events(3)), ["t1", "t2", "t3"]);
}
