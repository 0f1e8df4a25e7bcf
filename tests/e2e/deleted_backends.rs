//! Deleted backends: nothing of them stays for ever, and the events that they have sent count as sent.

use kit::process::{descriptors, memory_kb};
use kit::{Postgres, Redis, Stack, publish_many, wait_eq, wait_until};

/// The number of backends in a round.
const MANY: usize = 500;

fn stack() -> Stack {
    let settings = &[
        ("outbox_relay.log_level", "debug"),
        ("outbox_relay.poll_interval", "1s"),
    ];
    Stack::of(Postgres::with(settings), Redis::start())
}

/// A backend of this name in the stack's Redis, with a stream of the same name.
fn add(stack: &Stack, name: &str) {
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, stream_name) values ('{name}', '127.0.0.1', {}, '{name}')",
        stack.redis.port()
    ));
}

/// Cursors of backends other than `default`.
fn cursors(stack: &Stack) -> i64 {
    stack
        .pg
        .one("select count(*) from outbox.cursors c where c.backend_number > 1")
}

fn wait_forgotten(stack: &Stack) {
    wait_eq("cursors of deleted backends", 0, || cursors(stack));
}

/// Creates backends, lets each send an event, and deletes them.
fn round(stack: &Stack, name: &str) {
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, stream_name)
         select '{name}' || n, '127.0.0.1', {}, '{name}' from generate_series(1, {MANY}) n",
        stack.redis.port()
    ));
    stack.pg.exec(&format!(
        "select outbox.publish_event('event', 'kit', backend => '{name}' || n) from generate_series(1, {MANY}) n"
    ));
    stack.redis.wait_entries(name, MANY);
    wait_eq("pending events", 0, || {
        stack.pg.one::<i64>("select pending from outbox.status")
    });
    stack.pg.exec("delete from outbox.backends where name <> 'default'");
}

#[test]
fn hundreds_of_deleted_backends_leave_nothing_behind() {
    let stack = stack();
    stack.publish("first");
    stack.wait_events(1);
    let worker = stack.pg.wait_worker("postgres");
    let idle = descriptors(worker);
    let mut memory = Vec::new();
    for name in ["a", "b", "c"] {
        round(&stack, name);
        wait_forgotten(&stack);
        // The worker forgets all deleted backends.
        wait_until("the senders to end", || descriptors(worker) < idle + 60);
        memory.push(memory_kb(worker));
    }
    println!("worker's memory after each round: {memory:?} KiB");
    assert!(memory[2] < memory[0] + 8 * 1024, "{memory:?} KiB");
    assert_eq!(stack.pg.wait_worker("postgres"), worker);
    let log = stack.pg.log();
    let said = log
        .lines()
        .filter(|line| line.contains("cursors of deleted backends are no longer needed"));
    let readers: usize = said
        .filter_map(|line| {
            line.split("LOG:")
                .nth(1)?
                .split_whitespace()
                .next()?
                .parse::<usize>()
                .ok()
        })
        .sum();
    assert_eq!(readers, 3 * MANY, "readers that have gone");
    // Shared memory, and the rows in tables.
    for of in [
        "outbox.meters() m where m.backend_number > 1",
        "outbox.metrics m where m.labels ->> 'backend' <> 'default'",
        "outbox.backend_passwords",
        "outbox.moved_backends",
    ] {
        assert_eq!(stack.pg.one::<i64>(&format!("select count(*) from {of}")), 0, "{of}");
    }
    // Adjacent numbers become one range.
    let kept: String = stack.pg.one("select deleted_backends::text from outbox.installation");
    assert_eq!(kept, format!("{{[2,{})}}", 2 + 3 * MANY));
    // Retention continues until everything is deleted.
    let left = || {
        let rows =
            "(select count(*) from outbox.events) + (select count(*) from outbox.ticks where backend_number > 1)";
        stack.pg.one::<i64>(&format!("select {rows}"))
    };
    assert!(left() >= 3 * MANY as i64);
    stack.pg.set("outbox_relay.published_retention", "0");
    wait_eq("events and ticks of deleted backends", 0, left);
}

#[test]
fn a_transaction_that_was_open_at_the_deletion_is_waited_for() {
    let stack = stack();
    add(&stack, "b");
    publish_many(&mut stack.pg.client(), "b", "", "event", 1);
    stack.redis.wait_entries("b", 1);
    let mut open = stack.pg.client();
    open.batch_execute("begin").expect("begun");
    publish_many(&mut open, "b", "", "late", 1);
    wait_eq("pending events", 0, || {
        stack.pg.one::<i64>("select pending from outbox.status")
    });
    stack.pg.exec("delete from outbox.backends where name = 'b'");
    for n in 1..=5 {
        stack.publish("event");
        stack.wait_events(n);
        std::thread::sleep(std::time::Duration::from_millis(300));
    }
    assert_eq!(cursors(&stack), 1, "it may still be needed");
    open.batch_execute("commit").expect("committed");
    wait_forgotten(&stack);
    assert_eq!(
        stack
            .pg
            .one::<String>("select string_agg(event_type || ': ' || last_error, ', ') from outbox.failed_events"),
        "late1: its backend was deleted"
    );
}

/// Without its cursor, the sent events of a deleted backend must not look pending.
#[test]
fn events_of_a_forgotten_backend_count_as_sent() {
    let stack = stack();
    add(&stack, "b");
    let id = publish_many(&mut stack.pg.client(), "b", "", "event", 1)[0];
    stack.redis.wait_entries("b", 1);
    wait_eq("pending events", 0, || {
        stack.pg.one::<i64>("select pending from outbox.status")
    });
    stack.pg.exec("delete from outbox.backends where name = 'b'");
    wait_forgotten(&stack);
    assert_eq!(
        stack
            .pg
            .one::<String>("select string_agg(status || ' ' || backend, ', ') from outbox.event_status"),
        "published b"
    );
    assert!(
        !stack.pg.pg_dump("postgres").contains(&id.to_string()),
        "sent events are not dumped"
    );
    assert!(stack.pg.one::<bool>(&format!("select outbox.erase('{id}')")));
}

/// A restore of the table of backends brings it back, with its number.
#[test]
fn a_forgotten_backend_that_comes_back_repeats_nothing() {
    let stack = stack();
    let add_again = |number: i32| {
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, number, host, port, stream_name, delivery) overriding system value
             values ('b', {number}, '127.0.0.1', {}, 'b', 'at_least_once')",
            stack.redis.port()
        ));
    };
    add_again(7);
    stack.pg.exec("select setval('outbox.backends_number_seq', 7)");
    publish_many(&mut stack.pg.client(), "b", "", "event", 3);
    stack.redis.wait_entries("b", 3);
    wait_eq("pending events", 0, || {
        stack.pg.one::<i64>("select pending from outbox.status")
    });
    stack.pg.exec("delete from outbox.backends where name = 'b'");
    wait_forgotten(&stack);
    add_again(7);
    let new = publish_many(&mut stack.pg.client(), "b", "", "event", 1);
    let entries = stack.redis.wait_entries("b", 4);
    assert_eq!(kit::ids(&entries)[3..], new);
    stack.pg.exec("delete from outbox.events");
    wait_eq("pending events", 0, || {
        stack.pg.one::<i64>("select pending from outbox.status")
    });
    stack.pg.exec("delete from outbox.backends where name = 'b'");
    wait_forgotten(&stack);
    // No other backend gets its number, even after the sequence was set back.
    stack.pg.exec("create role keeper login; grant usage on schema outbox to keeper; grant select, insert on outbox.backends to keeper");
    stack.pg.exec("select setval('outbox.backends_number_seq', 6)");
    let mut keeper = stack.pg.client_as("keeper", "postgres");
    keeper
        .batch_execute("insert into outbox.backends (name) values ('c')")
        .expect("granted");
    assert_eq!(
        stack
            .pg
            .one::<i32>("select number from outbox.backends where name = 'c'"),
        8
    );
}

#[test]
fn the_guard_of_a_deleted_backend_is_named_in_the_log_and_may_be_removed() {
    let stack = stack();
    let mut sent = Vec::new();
    for removes in [false, true, false] {
        add(&stack, "b");
        sent.extend(publish_many(&mut stack.pg.client(), "b", "", "event", 2));
        assert_eq!(kit::ids(&stack.redis.wait_entries("b", sent.len())), sent);
        let key: String = stack.pg.one("select outbox.guard_key('b')");
        stack.pg.exec("delete from outbox.backends where name = 'b'");
        stack
            .pg
            .wait_log(&format!("HINT:  To remove it, run: redis-cli DEL '{key}'"));
        assert!(
            stack.redis.guard(&key).is_some(),
            "it is there for whoever gets the backend back"
        );
        if removes {
            stack.redis.call(&["DEL", &key]);
        }
        wait_forgotten(&stack);
        // Nobody has written it again.
        assert_eq!(stack.redis.guard(&key).is_some(), !removes);
    }
}
