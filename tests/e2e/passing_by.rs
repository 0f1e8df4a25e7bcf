//! Backends that do not send: their readers pass what is for others, up to the first event of their own.

use kit::{BlackHole, Redis, Stack, eventually, holds_for, publish_many, types, wait_drained, wait_eq, wait_until};
use std::time::Duration;

const COUNT: i32 = 3_000;

fn stack() -> Stack {
    Stack::with(&[("outbox_relay.poll_interval", "100ms")])
}

/// How many rows of others a look at the backend meets behind its saved cursor.
fn behind(stack: &Stack, backend: &str) -> i64 {
    // Cursors that only passed events of others are saved after half a minute otherwise.
    stack.pg.exec("select outbox.wake()");
    stack.pg.one(&format!(
        "select count(*) from outbox.events e join outbox.backends b on b.name = '{backend}'
            left join outbox.cursors c on c.backend_number = b.number
        where outbox.is_delivered(c, e.xid, e.seq) is not true"
    ))
}

#[track_caller]
fn assert_comes_up(stack: &Stack, backend: &str) {
    for _ in 0..2 {
        publish_many(&mut stack.pg.client(), "default", "", "of others", COUNT);
        wait_drained(&stack.pg, "default");
        wait_eq("events of others behind the cursor", 0, || behind(stack, backend));
    }
}

#[test]
fn a_paused_backend_passes_the_events_of_others() {
    let stack = stack();
    stack
        .pg
        .exec("insert into outbox.backends (name, stream_name, enabled) values ('paused', 's', false)");
    assert_comes_up(&stack, "paused");
}

#[test]
fn a_backend_whose_redis_is_down_passes_the_events_of_others() {
    let stack = stack();
    let (mut gone, hole) = (Redis::start(), BlackHole::unreachable());
    let (gone_port, hole_port) = (gone.port(), hole.port());
    gone.shutdown();
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, delivery) values
            ('gone', '127.0.0.1', {gone_port}, 'exactly_once'), ('once', '127.0.0.1', {gone_port}, 'at_least_once'),
            ('hole', '127.0.0.1', {hole_port}, 'exactly_once');
        update outbox.backends set connect_timeout = '200 ms' where name = 'hole'"
    ));
    assert_comes_up(&stack, "gone");
    wait_eq("events of others behind the cursor", 0, || behind(&stack, "once"));
    wait_eq("events of others behind the cursor", 0, || behind(&stack, "hole"));
}

/// Late rows, too: their transaction was open when the reader came by.
#[test]
fn a_paused_backend_passes_none_of_its_own_events() {
    let stack = stack();
    stack
        .pg
        .exec("insert into outbox.backends (name, host, port, stream_name) select 'paused', host, port, 's' from outbox.backends");
    let publish = |kind: &str| format!("select outbox.publish_event('{kind}', 'kit', backend => 'paused')");
    stack.pg.exec(&publish("sent"));
    wait_until("an event to be sent", || stack.redis.xlen("s") == 1);
    stack
        .pg
        .exec("update outbox.backends set enabled = false where name = 'paused'");
    let mut late = stack.pg.client();
    late.batch_execute(&format!("begin; {}", publish("late"))).unwrap();
    publish_many(&mut stack.pg.client(), "default", "", "of others", COUNT);
    wait_drained(&stack.pg, "default");
    wait_eq("events behind the cursor", 0, || behind(&stack, "paused"));
    late.batch_execute("commit").unwrap();
    stack.pg.exec(&publish("new"));
    publish_many(&mut stack.pg.client(), "default", "", "of others", COUNT);
    wait_drained(&stack.pg, "default");
    let pending = || {
        stack
            .pg
            .one::<i64>("select pending from outbox.backend_status where backend = 'paused'")
    };
    holds_for(Duration::from_secs(1), "both events to be pending", || {
        stack.pg.exec("select outbox.wake()");
        pending() == 2
    });
    // A worker that comes back goes on from the saved cursor.
    let worker = stack.pg.wait_worker("postgres");
    stack.pg.exec(&format!("select pg_terminate_backend({worker})"));
    stack
        .pg
        .exec("update outbox.backends set enabled = true where name = 'paused'");
    wait_until("all to be sent", || stack.redis.xlen("s") == 3);
    wait_eq("pending events", 0, pending);
    let sent = stack.redis.entries("s");
    assert_eq!(types(&sent), ["sent", "late", "new"]);
}

/// Once it has come up, nothing is read or saved for it, whether or not it has an event of its own.
#[test]
fn a_paused_backend_does_nothing_while_nobody_publishes() {
    // With this retention, what was delivered is recorded each two seconds.
    let stack = Stack::with(&[
        ("outbox_relay.poll_interval", "100ms"),
        ("outbox_relay.published_retention", "3min"),
        ("autovacuum", "off"),
    ]);
    stack.pg.exec(
        "insert into outbox.backends (name, stream_name, enabled) values ('paused', 's', false), ('waits', 's', false)",
    );
    assert_comes_up(&stack, "paused");
    stack
        .pg
        .exec("select outbox.publish_event('t', 'kit', backend => 'waits')");
    assert_comes_up(&stack, "paused");
    let sql = "select (select array_agg(c.saved_at order by c.backend_number) from outbox.cursors c where c.backend_number > 1)::text
            || (select count(*) from outbox.ticks t where t.backend_number > 1)";
    let state = || stack.pg.one::<String>(sql);
    let mut last = state();
    // The last ticks are recorded.
    eventually("the worker to be at rest", kit::LIMIT, || {
        std::thread::sleep(Duration::from_millis(2_500));
        let before = std::mem::replace(&mut last, state());
        (before == last).then_some(())
    });
    holds_for(Duration::from_secs(3), "nothing to be saved", || state() == last);
}
