//! Whatever Redis does, Postgres and its worker stop at once, and nothing is lost.

use std::time::{Duration, Instant};

use kit::{
    BlackHole, Mode, Postgres, Redis, Stack, eventually, ids, publish_many, wait_drained, wait_trouble, wait_until,
};
use uuid::Uuid;

/// The limit of a whole fast stop, including the server's own part.
const STOP_LIMIT: Duration = Duration::from_millis(1_500);

/// Timeouts so long that waiting for one would be noticed.
const STUBBORN: &[(&str, &str)] = &[
    ("outbox_relay.redis_connect_timeout", "1min"),
    ("outbox_relay.redis_socket_timeout", "1min"),
    ("outbox_relay.retry_delay", "50ms"),
    ("outbox_relay.retry_max_delay", "200ms"),
];

/// What keeps the worker's sender busy.
enum Redises {
    /// Connects, and never gets an answer.
    Silent(BlackHole),
    /// Never gets a connection.
    Unreachable(BlackHole),
    /// Its Redis was frozen while events were on their way.
    Frozen,
    /// Drains a long backlog.
    Draining,
}

/// Brings a stack into this condition, and returns `count` events that were published then.
fn occupy(stack: &Stack, condition: &Redises, count: i32) -> Vec<Uuid> {
    let publish = || publish_many(&mut stack.pg.client(), "default", "", "t", count);
    stack.pg.exec("update outbox.backends set max_len = 0");
    match condition {
        Redises::Silent(hole) => {
            stack.point_at("default", "127.0.0.1", hole.port());
            wait_until("a connection", || hole.accepted() > 0);
            publish()
        }
        Redises::Unreachable(hole) => {
            stack.point_at("default", "127.0.0.1", hole.port());
            publish()
        }
        Redises::Frozen => {
            wait_connected(stack);
            stack.redis.sigstop();
            publish()
        }
        Redises::Draining => {
            wait_connected(stack);
            let published = publish();
            wait_until("the drain to begin", || stack.redis.xlen("events") > 0);
            published
        }
    }
}

fn wait_connected(stack: &Stack) {
    stack.pg.wait_log(&format!(
        "backend \"default\" is connected to Redis at 127.0.0.1:{}",
        stack.redis.port()
    ));
}

/// Lets a Redis that was frozen or unreachable accept the pending events, and checks that all of them arrived, in
/// order.
#[track_caller]
fn assert_all_arrive(stack: &Stack, expected: &[Uuid]) {
    stack.redis.sigcont();
    stack.point("default", &stack.redis);
    wait_drained(&stack.pg, "default");
    let arrived = ids(&stack.events());
    assert_eq!(arrived.len(), expected.len());
    assert!(arrived == expected, "out of order");
}

fn stops_at_once(condition: Redises, count: i32) {
    let mut stack = Stack::with(STUBBORN);
    let expected = occupy(&stack, &condition, count);
    let start = Instant::now();
    let stopped = stack.pg.try_stop(Mode::Fast, STOP_LIMIT);
    assert!(
        stopped.is_some_and(|status| status.success()),
        "a fast stop takes more than {:?}",
        start.elapsed()
    );
    stack.pg.start_again();
    assert_all_arrive(&stack, &expected);
}

#[test]
fn a_fast_stop_does_not_wait_for_a_silent_redis() {
    stops_at_once(Redises::Silent(BlackHole::start()), 1_000);
}

#[test]
fn a_fast_stop_does_not_wait_for_an_unreachable_redis() {
    stops_at_once(Redises::Unreachable(BlackHole::unreachable()), 1_000);
}

#[test]
fn a_fast_stop_does_not_wait_for_a_frozen_redis() {
    stops_at_once(Redises::Frozen, 5_000);
}

#[test]
fn a_fast_stop_does_not_wait_for_the_end_of_a_backlog() {
    let mut stack = Stack::with(STUBBORN);
    let expected = occupy(&stack, &Redises::Draining, 200_000);
    // The server's own part is not measured.
    stack.pg.exec("checkpoint");
    let stopped = stack.pg.try_stop(Mode::Fast, STOP_LIMIT);
    assert!(
        stopped.is_some_and(|status| status.success()),
        "a fast stop takes more than {STOP_LIMIT:?}"
    );
    let reached = stack.redis.xlen("events");
    assert!(reached < 200_000, "it was over before the stop: {reached}");
    stack.pg.start_again();
    assert_all_arrive(&stack, &expected);
}

/// A worker that is told to end does so, and another one takes its place.
#[test]
fn a_worker_told_to_end_leaves_at_once_and_comes_back() {
    let conditions = [
        (Redises::Silent(BlackHole::start()), 500),
        (Redises::Unreachable(BlackHole::unreachable()), 500),
        (Redises::Frozen, 5_000),
        (Redises::Draining, 50_000),
    ];
    for (condition, count) in conditions {
        let stack = Stack::with(STUBBORN);
        let mut expected = occupy(&stack, &condition, count);
        let old = stack.pg.wait_worker("postgres");
        let start = Instant::now();
        stack.pg.exec(&format!("select pg_terminate_backend({old})"));
        wait_until("the worker to leave", || {
            !std::path::Path::new(&format!("/proc/{old}")).exists()
        });
        let left = start.elapsed();
        assert!(left < Duration::from_secs(1), "it left after {left:?}");
        let new = eventually("another worker", Duration::from_secs(5), || {
            stack.pg.worker_pid("postgres").filter(|pid| *pid != old)
        });
        assert_ne!(new, old);
        expected.extend(publish_many(&mut stack.pg.client(), "default", "", "t", 10));
        assert_all_arrive(&stack, &expected);
    }
}

/// Many backends, each of which hangs in another way.
#[test]
fn a_fast_stop_does_not_wait_for_many_backends() {
    let (silent, gone) = (BlackHole::start(), BlackHole::unreachable());
    let mut stack = Stack::of(Postgres::with(STUBBORN), Redis::start());
    for n in 0..20 {
        let port = [silent.port(), gone.port()][n % 2];
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port) values ('b{n}', '127.0.0.1', {port})"
        ));
    }
    wait_until("ten connections", || silent.accepted() == 10);
    stack
        .pg
        .exec("select outbox.publish_event('t', 'kit', backend => name) from outbox.backends");
    assert_eq!(stack.wait_events(1).len(), 1);
    let stopped = stack.pg.try_stop(Mode::Fast, STOP_LIMIT);
    assert!(stopped.is_some_and(|status| status.success()));
    stack.pg.start_again();
    let mark = stack.publish("after");
    assert_eq!(ids(&stack.wait_events(2))[1], mark);
}

/// Events that were delivered before an orderly stop are not sent again after it, although the cursor is saved only
/// from time to time.
#[test]
fn an_orderly_stop_repeats_nothing() {
    let mut stack = Stack::with(STUBBORN);
    let mut expected = Vec::new();
    for round in 1..=3 {
        expected.extend(publish_many(&mut stack.pg.client(), "default", "", "t", 100));
        stack.wait_events(100 * round);
        stack.pg.restart();
    }
    stack.redis.shutdown();
    expected.extend(publish_many(&mut stack.pg.client(), "default", "", "t", 100));
    wait_trouble(&stack.pg, "default", "backoff", "refused");
    stack.pg.restart();
    stack.redis.start_again();
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), expected[300..]);
}
