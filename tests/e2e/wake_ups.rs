//! Who can make the worker retry a waiting backend: only permitted roles, and with a limited frequency.

use std::time::{Duration, Instant};

use kit::hostile::Garbage;
use kit::{Bystander, Stack, wait_until};

/// A backend whose server closes each connection, a role without any rights on the extension, and one that may publish.
fn failing(settings: &[(&str, &str)], attempts: usize) -> (Stack, Garbage) {
    let stack = Stack::with(settings);
    let refuser = Garbage::resetting();
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, stream_name) values ('failing', '127.0.0.1', {}, 'failing');
         create role nobody login; create role publisher login; create schema theirs authorization nobody;
         create table theirs.own (a integer); alter table theirs.own owner to nobody;
         select outbox.grant_publisher('publisher')",
        refuser.port()
    ));
    stack.publish("first");
    stack.wait_events(1);
    wait_until("some attempts", || refuser.accepted() >= attempts);
    (stack, refuser)
}

/// How often a backend is tried while a role repeats a statement.
fn attempts_during(stack: &Stack, refuser: &Garbage, role: &str, statement: &str, time: Duration) -> usize {
    let mut client = stack.pg.client_as(role, "postgres");
    let (before, start, mut count) = (refuser.accepted(), Instant::now(), 0);
    while start.elapsed() < time {
        // Some of the statements are refused.
        let _ = client.batch_execute(statement);
        count += 1;
    }
    let attempts = refuser.accepted() - before;
    println!("{role}, {count} times: {statement}: {attempts} attempts");
    attempts
}

/// Whatever a role does that may not request an attempt, the backoff grows as if it did nothing.
#[test]
fn only_a_role_with_the_right_makes_a_backend_try_again() {
    let (stack, refuser) = failing(
        &[("outbox_relay.retry_delay", "2s"), ("max_prepared_transactions", "10")],
        2,
    );
    let bystander = Bystander::start(&stack);
    for (role, statement) in [
        ("nobody", "drop schema if exists nope"),
        ("nobody", "drop schema if exists nope, outbox"),
        ("nobody", "drop extension outbox_relay"),
        ("nobody", "alter extension outbox_relay update"),
        ("nobody", "create temp table t (a integer); drop table t"),
        ("nobody", "create table theirs.t (a integer); drop table theirs.t"),
        (
            "nobody",
            "grant select on theirs.own to public; revoke select on theirs.own from public",
        ),
        ("nobody", "analyze"),
        ("nobody", "analyze theirs.own"),
        ("nobody", "listen outbox; notify outbox; unlisten *"),
        ("nobody", "set outbox_relay.default_backend = 'failing'; reset all"),
        ("nobody", "select pg_advisory_lock(1); select pg_advisory_unlock_all()"),
        ("nobody", "select outbox.wake()"),
        ("nobody", "select pg_reload_conf()"),
        ("nobody", "update outbox.backends set enabled = true where false"),
        (
            "nobody",
            "begin; update theirs.own set a = 1; savepoint a; rollback to a; commit",
        ),
        // Refused with a WARNING, and yet written to the catalog.
        (
            "publisher",
            "grant insert (event_type) on outbox.events to publisher; grant usage on schema outbox to publisher",
        ),
        (
            "publisher",
            "grant execute on function outbox.publish_events(jsonb) to publisher",
        ),
        (
            "publisher",
            "begin; select outbox.publish_event('t', 's', backend => 'failing'); rollback",
        ),
        (
            "publisher",
            "begin; savepoint a; select outbox.publish_event('t', 's', backend => 'failing'); rollback to a; commit",
        ),
        (
            "publisher",
            "select outbox.publish_event('t', 's', backend => 'failing')",
        ),
        (
            "publisher",
            "select outbox.publish_event('t', 's', scheduled_at => '2100-01-01')",
        ),
        (
            "publisher",
            "insert into outbox.events (event_type, source, backend) values ('t', 's', 'failing')",
        ),
    ] {
        let time = Duration::from_millis(500);
        // One attempt may just be due.
        let attempts = attempts_during(&stack, &refuser, role, statement, time);
        assert!(attempts <= 2, "{attempts} attempts");
    }
    let mut client = stack.pg.client_as("nobody", "postgres");
    let (before, start) = (refuser.accepted(), Instant::now());
    while start.elapsed() < Duration::from_secs(1) {
        client.batch_execute("begin").expect("begun");
        client.batch_execute("prepare transaction 'p'").expect("prepared");
        client.batch_execute("commit prepared 'p'").expect("committed");
    }
    assert!(
        refuser.accepted() - before <= 2,
        "{} attempts",
        refuser.accepted() - before
    );
    bystander.stop(&stack).assert_undisturbed("wake-ups");
}

/// Roles that may request an attempt get one, at most once a second, and the backoff stays as it was.
#[test]
fn roles_that_may_request_attempts_get_one_a_second() {
    let (stack, refuser) = failing(
        &[
            ("outbox_relay.retry_delay", "30s"),
            ("outbox_relay.retry_backoff", "off"),
        ],
        1,
    );
    stack.pg.exec(
        "grant usage on schema outbox to nobody; grant execute on function outbox.wake(), outbox.retry_failed(text, text, uuid),
            outbox.set_backend_password(text, text), outbox.take_over(text) to nobody;
         grant execute on function pg_reload_conf() to nobody; grant select, update on outbox.backends to nobody",
    );
    let next = || -> Option<chrono::DateTime<chrono::Utc>> {
        stack
            .pg
            .one("select next_attempt_at from outbox.backend_status where backend = 'failing'")
    };
    wait_until("a wait", || next().is_some());
    let bystander = Bystander::start(&stack);
    for (statement, most) in [
        ("select outbox.wake()", 5),
        ("select pg_reload_conf()", 5),
        ("update outbox.backends set enabled = enabled where false", 1),
        ("update outbox.backends set enabled = enabled", 1),
        ("select outbox.retry_failed()", 1),
        // Each of these changes something: five attempts at once, and then one a second.
        ("select outbox.set_backend_password('failing', 'the same')", 9),
        ("select outbox.set_backend_password('failing', md5(random()::text))", 9),
        (
            "update outbox.backends set max_len = (random() * 1000)::integer where name = 'failing'",
            9,
        ),
        (
            "update outbox.backends set connect_timeout = random() * interval '1 s' + interval '1 s' where name = 'failing'",
            9,
        ),
        (
            "update outbox.backends set enabled = not enabled where name = 'failing'",
            9,
        ),
        ("select outbox.take_over('failing')", 9),
    ] {
        // The requested attempts are over.
        std::thread::sleep(Duration::from_millis(2_500));
        let attempts = attempts_during(&stack, &refuser, "nobody", statement, Duration::from_secs(3));
        assert!(attempts <= most, "{attempts} attempts");
    }
    std::thread::sleep(Duration::from_millis(1_100));
    let before = refuser.accepted();
    let asked = Instant::now();
    stack.pg.exec("select outbox.wake()");
    wait_until("an attempt", || refuser.accepted() > before);
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    bystander.stop(&stack).assert_undisturbed("wake-ups");
}
