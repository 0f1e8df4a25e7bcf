//! Retention: delivered events are deleted after their time, undelivered ones never.

use kit::{Refused, Stack, wait_eq, wait_until};
use std::time::{Duration, Instant};

fn kept(stack: &Stack) -> i64 {
    stack.pg.one("select count(*) from outbox.events")
}

fn publish(stack: &Stack, count: usize, more: &str) {
    stack.pg.exec(&format!(
        "select outbox.publish_event('n' || i, 's'{more}) from generate_series(1, {count}) i"
    ));
}

/// Makes the default backend's cursor a tick of an hour ago: everything delivered by now is that old for retention.
fn age_by_an_hour(stack: &Stack) {
    stack.pg.exec(
        "insert into outbox.ticks select backend_number, '-infinity', '3:3:', '3', 0, 0 from outbox.cursors \
             where backend_number = 1 on conflict do nothing; \
         insert into outbox.ticks select backend_number, now() - interval '1 hour', from_snapshot, from_next_xid, \
             from_low_seq, from_high_seq from outbox.cursors where backend_number = 1",
    );
}

#[track_caller]
fn wait_saved(stack: &Stack, total: i64) {
    wait_eq("delivered events in the saved cursor", total, || {
        stack
            .pg
            .one("select coalesce(max(published_total), 0) from outbox.cursors where backend_number = 1")
    });
}

/// Without help: the next poll is an hour away.
#[test]
fn with_a_retention_of_zero_delivered_events_go_soon() {
    let stack = Stack::with(&[
        ("outbox_relay.published_retention", "0"),
        ("outbox_relay.poll_interval", "1h"),
        ("outbox_relay.redis_max_len", "0"),
    ]);
    publish(&stack, 3_000, "");
    stack.wait_events(3_000);
    wait_eq("kept events", 0, || kept(&stack));
    stack.publish("one more");
    stack.wait_events(3_001);
    wait_eq("kept events", 0, || kept(&stack));
    let ticks: i64 = stack.pg.one("select count(*) from outbox.ticks");
    assert!(ticks <= 3, "{ticks} ticks are kept");
    // Its status is not known any more, its id may be used again, and nothing is sent twice.
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.event_status"), 0);
    let Stack { mut pg, redis } = stack;
    pg.restart();
    pg.exec("select outbox.publish_event('last', 's')");
    assert_eq!(redis.wait_entries("events", 3_002).len(), 3_002);
}

/// Of two backends, the one that is down keeps its rows, also those between the other's.
#[test]
fn undelivered_events_are_never_purged() {
    let stack = Stack::with(&[
        ("outbox_relay.published_retention", "0"),
        ("outbox_relay.retry_max_delay", "100ms"),
    ]);
    stack
        .pg
        .exec("insert into outbox.backends (name, host, port, stream_name) values ('down', '127.0.0.1', 1, 'late')");
    for round in 0..3 {
        publish(&stack, 400, "");
        publish(&stack, 200, ", backend => 'down'");
        stack.pg.exec(&format!(
            "select outbox.publish_event('soon {round}', 's', scheduled_at => now() + interval '1 hour')"
        ));
    }
    stack.wait_events(1_200);
    wait_eq("kept events", 600, || kept(&stack));
    stack.pg.exec("call outbox.purge()");
    let row = stack
        .pg
        .client()
        .query_one(
            "select count(*) filter (where backend = 'down'), count(*), (select count(*) from outbox.scheduled_events) from outbox.events",
            &[],
        )
        .unwrap();
    assert_eq!(
        (row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, i64>(2)),
        (600, 600, 3)
    );
    stack.point("down", &stack.redis);
    let late = stack.redis.wait_entries("late", 600);
    let types: Vec<&str> = late.iter().map(|entry| entry.field("event_type")).collect();
    let expected: Vec<String> = (0..3).flat_map(|_| (1..=200).map(|i| format!("n{i}"))).collect();
    assert_eq!(types, expected);
    wait_eq("kept events", 0, || kept(&stack));
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.scheduled_events"), 3);
}

#[test]
fn everything_is_kept_when_asked_to() {
    let stack = Stack::with(&[("outbox_relay.published_retention", "-1")]);
    publish(&stack, 10, "");
    stack.wait_events(10);
    wait_saved(&stack, 10);
    age_by_an_hour(&stack);
    let change = |name: &str, value: &str| {
        let mark = stack.pg.log().len();
        stack.pg.set(name, value);
        stack.pg.wait_log_after(mark, "reloading configuration files");
        wait_eq(name, value.to_string(), || stack.pg.one(&format!("show {name}")));
    };
    stack.pg.exec("call outbox.purge()");
    assert_eq!(kept(&stack), 10);
    change("outbox_relay.cleanup_published", "off");
    change("outbox_relay.published_retention", "0");
    stack.pg.exec("call outbox.purge()");
    stack.pg.exec("select outbox.wake()");
    publish(&stack, 1, "");
    stack.wait_events(11);
    wait_saved(&stack, 11);
    assert_eq!(kept(&stack), 11);
    // It was due all the time.
    change("outbox_relay.cleanup_published", "on");
    wait_eq("kept events", 0, || kept(&stack));
}

/// Failed events have their own retention, whatever that of the others.
#[test]
fn failed_events_go_after_their_own_retention() {
    let stack = Stack::with(&[
        ("outbox_relay.failed_retention", "-1"),
        ("outbox_relay.published_retention", "-1"),
    ]);
    stack.redis.call(&["SET", "wrong", "no stream"]);
    stack
        .pg
        .exec("select outbox.publish_event('failed ' || i, 's', stream => 'wrong', max_retries => 1) from generate_series(1, 3) i");
    let failed = || stack.pg.one::<i64>("select count(*) from outbox.failed_events");
    wait_eq("failed events", 3, failed);
    stack.pg.exec(
        "update outbox.failed_events set failed_at = failed_at - interval '2 days' where event_type <> 'failed 3'",
    );
    stack.pg.exec("call outbox.purge()");
    assert_eq!(failed(), 3);
    stack.pg.set("outbox_relay.failed_retention", "1d");
    wait_eq("failed events", 1, failed);
    stack.pg.set("outbox_relay.failed_retention", "0");
    wait_eq("failed events", 0, failed);
    assert_eq!(kept(&stack), 3);
}

#[test]
fn purge_deletes_failed_events_too() {
    let stack = Stack::with(&[("outbox_relay.failed_retention", "1d"), ("outbox_relay.enabled", "off")]);
    stack.pg.exec(
        "insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend, \
             attempts, last_error, failed_at) \
         select i, '5', now(), gen_random_uuid(), 1, 't', 's', 'default', 3, 'e', now() - i * interval '1 hour' \
         from generate_series(1, 2500) i",
    );
    stack.pg.exec("call outbox.purge()");
    assert_eq!(stack.pg.one::<i64>("select max(seq) from outbox.failed_events"), 23);
}

/// The second thousand waits for a lock; the first is already deleted for all sessions.
#[test]
fn purge_commits_as_it_goes() {
    let stack = Stack::with(&[
        ("outbox_relay.published_retention", "-1"),
        ("outbox_relay.redis_max_len", "0"),
    ]);
    publish(&stack, 2_500, "");
    stack.wait_events(2_500);
    wait_saved(&stack, 2_500);
    stack.pg.set("outbox_relay.enabled", "off");
    wait_eq("the worker", None, || stack.pg.worker_pid("postgres"));
    age_by_an_hour(&stack);
    stack.pg.set("outbox_relay.published_retention", "30min");
    wait_eq("the setting", "30min".to_string(), || {
        stack.pg.one("show outbox_relay.published_retention")
    });
    let mut locker = stack.pg.client();
    locker
        .batch_execute("begin; select 1 from outbox.events where event_type = 'n1500' for update")
        .unwrap();
    let mut purger = stack.pg.client();
    let purging = std::thread::spawn(move || purger.batch_execute("call outbox.purge()"));
    wait_eq("kept events", 1_500, || kept(&stack));
    assert!(!purging.is_finished());
    locker.batch_execute("rollback").unwrap();
    purging.join().unwrap().unwrap();
    assert_eq!(kept(&stack), 0);
    let refused = Refused::of(stack.pg.client().batch_execute("begin; call outbox.purge()"));
    assert_eq!(refused.code, "2D000");
}

/// Processor time of a process with all its threads.
fn busy(pid: i32) -> Duration {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the worker is gone");
    let of_thread = |path: std::path::PathBuf| -> u64 {
        let text = std::fs::read_to_string(path.join("schedstat")).unwrap_or_default();
        text.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0)
    };
    Duration::from_nanos(threads.filter_map(|t| Some(of_thread(t.ok()?.path()))).sum())
}

/// A purge blocks nobody, but it uses the worker's time, for which events wait.
#[test]
fn a_large_purge_leaves_the_worker_idle_most_of_the_time() {
    let stack = Stack::with(&[("outbox_relay.published_retention", "-1")]);
    publish(&stack, 40_000, "");
    wait_saved(&stack, 40_000);
    age_by_an_hour(&stack);
    let worker = stack.pg.wait_worker("postgres");
    stack.pg.set("outbox_relay.published_retention", "30min");
    let is_gone = |seq: i64| {
        let sql = format!("select not exists (select from outbox.events where seq = {seq})");
        stack.pg.one::<bool>(&sql)
    };
    wait_until("the first to be purged", || is_gone(2_000));
    let (before, start) = (busy(worker), Instant::now());
    wait_until("the last to be purged", || is_gone(40_000));
    let (spent, took) = (busy(worker) - before, start.elapsed());
    assert!(spent < took / 4, "{spent:?} of {took:?}");
}

/// A snapshot that is held for hours stays valid, and neither purge nor relay waits for it.
#[test]
fn a_held_snapshot_blocks_neither_purge_nor_relay() {
    let stack = Stack::with(&[("outbox_relay.published_retention", "0")]);
    stack.pg.exec("update outbox.backends set enabled = false");
    publish(&stack, 500, "");
    let mut holder = stack.pg.client();
    holder.batch_execute("begin isolation level repeatable read").unwrap();
    let seen = |holder: &mut postgres::Client| {
        holder
            .query_one("select count(*) from outbox.events", &[])
            .unwrap()
            .get::<_, i64>(0)
    };
    assert_eq!(seen(&mut holder), 500);
    stack.pg.exec("update outbox.backends set enabled = true");
    stack.wait_events(500);
    wait_eq("kept events", 0, || kept(&stack));
    for round in 1..=20 {
        stack.publish("goes on");
        stack.wait_events(500 + round);
    }
    stack.pg.exec("call outbox.purge()");
    wait_eq("kept events", 0, || kept(&stack));
    assert_eq!(seen(&mut holder), 500);
    assert!(stack.pg.psql(&["-c", "vacuum outbox.events"]).ok);
}

#[test]
fn a_retention_without_a_unit_causes_a_warning() {
    let stack = Stack::start();
    assert_eq!(stack.pg.one::<String>("show outbox_relay.published_retention"), "7d");
    assert_eq!(stack.pg.one::<String>("show outbox_relay.failed_retention"), "30d");
    stack.pg.wait_worker("postgres");
    assert!(!stack.pg.log().contains("retention is only"));
    for name in ["published_retention", "failed_retention", "inbox_retention"] {
        let mark = stack.pg.log().len();
        stack.pg.set(&format!("outbox_relay.{name}"), "7");
        stack
            .pg
            .wait_log_after(mark, &format!("WARNING:  outbox_relay.{name} is only 7 minutes"));
        stack.pg.wait_log_after(
            mark,
            "HINT:  A number without a unit means minutes; write for example '7d'.",
        );
        wait_eq("the setting", "7min".to_string(), || {
            stack.pg.one(&format!("show outbox_relay.{name}"))
        });
        stack.pg.set(&format!("outbox_relay.{name}"), "7d");
        wait_until("the setting", || {
            stack.pg.one::<String>(&format!("show outbox_relay.{name}")) == "7d"
        });
    }
}

/// Retention counts from the delivery, not from the publishing, and the clock of a new worker runs at once.
#[test]
fn the_clock_of_retention_starts_with_the_first_delivery() {
    let stack = Stack::start();
    publish(&stack, 5, "");
    stack.wait_events(5);
    wait_saved(&stack, 5);
    wait_eq("a tick of what was delivered", 5i64, || {
        stack.pg.one("select coalesce(max(high_seq), 0) from outbox.ticks")
    });
    assert_eq!(kept(&stack), 5);
}
