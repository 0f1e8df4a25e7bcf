//! `outbox.metrics`: the figures for a monitoring system.

use kit::{Postgres, QUICK, Redis, Stack, UNTRIMMED, publish_many, tell, wait_drained, wait_eq, wait_until};
use std::time::Duration;

const DEFAULT: &str = r#"{"backend": "default"}"#;

fn metric(stack: &Stack, name: &str, labels: &str) -> f64 {
    stack.pg.one(&format!(
        "select value from outbox.metrics where name = '{name}' and labels = '{labels}'"
    ))
}

#[test]
fn each_metric_has_a_name_a_type_and_one_value_for_its_labels() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[("outbox_relay.max_retries", "1")]),
        Redis::start(),
    );
    publish_many(&mut stack.pg.client(), "default", "", "event", 3);
    wait_drained(&stack.pg, "default");
    assert_eq!(
        metric(&stack, "outbox_relay_published_total", r#"{"backend": "default"}"#),
        3.0
    );
    assert_eq!(
        metric(&stack, "outbox_relay_pending_events", r#"{"backend": "default"}"#),
        0.0
    );
    assert_eq!(metric(&stack, "outbox_relay_worker_up", "{}"), 1.0);
    let idle = r#"{"state": "idle", "backend": "default"}"#;
    assert_eq!(metric(&stack, "outbox_relay_backend_state", idle), 1.0);
    // The rules of Prometheus: names in its form, one type and one help for a name, one value for a name with its
    // labels.
    for wrong in [
        "select name from outbox.metrics where name !~ '^outbox_relay_[a-z_]+$' or type not in ('counter', 'gauge', 'histogram') or value is null or help = ''",
        "select name from outbox.metrics where (type = 'counter') <> (name like '%_total')",
        "select name from outbox.metrics where (type = 'histogram') <> (name ~ '_(bucket|sum|count)$')",
        "select name from outbox.metrics where (labels ? 'le') <> (name like '%_bucket')",
        "select 'state' from outbox.metrics where name like '%_state' group by name, labels ->> 'backend' having sum(value) <> 1",
        "select name from outbox.metrics group by name having count(distinct type) > 1 or count(distinct help) > 1",
        "select name from outbox.metrics group by name, labels having count(*) > 1",
    ] {
        let found = stack.pg.client().query(wrong, &[]).expect("the metrics");
        assert!(found.is_empty(), "{wrong}: {found:?}");
    }
    stack.redis.call(&["SET", "wrong", "no stream"]);
    stack
        .pg
        .exec("select outbox.publish_event('one', 'kit', stream => 'wrong')");
    wait_eq("failed events", 1.0, || {
        metric(&stack, "outbox_relay_failed_total", r#"{"backend": "default"}"#)
    });
    assert_eq!(metric(&stack, "outbox_relay_failed_events", "{}"), 1.0);
}

/// How many events of the default backend were acknowledged within this many seconds of their commit.
fn within(stack: &Stack, le: &str) -> f64 {
    let labels = format!(r#"{{"backend": "default", "le": "{le}"}}"#);
    metric(stack, "outbox_relay_commit_to_acknowledgement_seconds_bucket", &labels)
}

#[test]
fn a_histogram_counts_each_event_from_its_commit_to_its_acknowledgement() {
    let mut stack = Stack::of(Postgres::with(QUICK).with(&[UNTRIMMED]), Redis::start());
    publish_many(&mut stack.pg.client(), "default", "", "event", 500);
    wait_drained(&stack.pg, "default");
    // The time of the commit counts, not the time of publishing or a time in the row.
    let mut slow = stack.pg.client();
    slow.batch_execute("begin; select outbox.publish_event('slow', 'kit')")
        .expect("it publishes");
    std::thread::sleep(Duration::from_millis(1_300));
    slow.batch_execute("commit").expect("it commits");
    stack.pg.exec(
        "insert into outbox.events (created_at, event_type, source) values (now() - interval '1 day', 'old', 'kit'), \
            (now() + interval '1 day', 'new', 'kit')",
    );
    wait_eq("acknowledged events", 503.0, || within(&stack, "+Inf"));
    assert_eq!(within(&stack, "1"), 503.0, "none has taken longer than a second");
    let name = "outbox_relay_commit_to_acknowledgement_seconds";
    assert_eq!(metric(&stack, &format!("{name}_count"), DEFAULT), 503.0);
    let sum = metric(&stack, &format!("{name}_sum"), DEFAULT);
    assert!(sum > 0.0 && sum < 503.0, "{sum}");
    let falls: bool = stack.pg.one(&format!(
        "select bool_or(fell) from (select value < lag(value) over (order by (labels ->> 'le')::float8) as fell
            from outbox.metrics where name = '{name}_bucket') w"
    ));
    assert!(!falls, "each bucket has those below it");
    // An outage is part of it.
    let before = within(&stack, "0.5");
    stack.redis.shutdown();
    stack.publish("waits");
    std::thread::sleep(Duration::from_millis(1_300));
    stack.redis.start_again();
    stack.pg.exec("select outbox.wake()");
    wait_eq("acknowledged events", 504.0, || within(&stack, "+Inf"));
    assert_eq!(within(&stack, "1"), 503.0);
    assert_eq!(within(&stack, "0.5"), before);
}

#[test]
fn counters_outlive_the_worker_and_are_up_to_date() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[
            ("outbox_relay.max_retries", "2"),
            ("outbox_relay.published_retention", "0"),
        ]),
        Redis::start(),
    );
    stack.redis.call(&["SET", "wrong", "no stream"]);
    let value = |name: &str| metric(&stack, &format!("outbox_relay_{name}_total"), DEFAULT);
    publish_many(&mut stack.pg.client(), "default", "", "event", 100);
    stack
        .pg
        .exec("select outbox.publish_event('one', 'kit', stream => 'wrong')");
    wait_eq("failed events", 1.0, || value("failed"));
    assert_eq!(
        (value("refused"), value("retried"), value("published")),
        (2.0, 1.0, 100.0)
    );
    assert!(value("batches") >= 2.0 && value("bytes") > 10_000.0);
    wait_until("the events to be purged", || value("purged") >= 100.0);
    // The saved state of the worker is not needed: the worker cannot save now.
    let mut locker = stack.pg.client();
    locker
        .batch_execute("begin; lock table outbox.cursors in share mode")
        .expect("a lock");
    stack.publish("another");
    wait_eq("published events", 101.0, || value("published"));
    locker.batch_execute("rollback").expect("it ends");
    wait_drained(&stack.pg, "default");
    let names = [
        "published",
        "failed",
        "refused",
        "retried",
        "batches",
        "bytes",
        "purged",
        "reconnects",
    ];
    // With the row of the failed one.
    wait_eq("purged events", 102.0, || value("purged"));
    let before = names.map(value);
    let worker = || stack.pg.one::<Option<i32>>("select worker_pid from outbox.status");
    let old = worker().expect("a worker");
    stack.pg.exec(&format!("select pg_terminate_backend({old})"));
    wait_until("another worker", || worker().is_some_and(|pid| pid != old));
    assert_eq!(names.map(value), before);
    assert_eq!(metric(&stack, "outbox_relay_launcher_up", "{}"), 1.0);
    // A connection that is lost comes back.
    stack.publish("connected");
    wait_eq("published events", 102.0, || value("published"));
    tell(&mut stack.redis.conn(), &["CLIENT", "KILL", "TYPE", "normal"]);
    wait_eq("reconnects", before[7] + 1.0, || value("reconnects"));
}

#[test]
fn events_that_redis_lost_are_counted() {
    let mut stack = Stack::of(
        Postgres::with(QUICK).with(&[UNTRIMMED, ("outbox_relay.poll_interval", "200ms")]),
        Redis::start(),
    );
    stack.publish("kept");
    wait_drained(&stack.pg, "default");
    stack.redis.call(&["SAVE"]);
    publish_many(&mut stack.pg.client(), "default", "", "event", 30);
    wait_drained(&stack.pg, "default");
    stack.redis.kill9();
    stack.redis.start_again();
    stack.pg.exec("select outbox.wake()");
    stack.wait_events(31);
    wait_eq("healings", 1.0, || {
        metric(&stack, "outbox_relay_healings_total", DEFAULT)
    });
    assert_eq!(metric(&stack, "outbox_relay_healed_total", DEFAULT), 30.0);
}

#[test]
fn a_backend_that_is_made_anew_counts_from_zero() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    let published = |name: &str| {
        metric(
            &stack,
            "outbox_relay_published_total",
            &format!(r#"{{"backend": "{name}"}}"#),
        )
    };
    let make = |name: &str| {
        let port = stack.redis.port();
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port, stream_name) values ('{name}', '127.0.0.1', {port}, '{name}')"
        ));
        publish_many(&mut stack.pg.client(), name, "", "event", 3);
        wait_drained(&stack.pg, name);
    };
    let batches = "select count(*) from outbox.metrics where name = 'outbox_relay_batches_total'";
    make("again");
    assert_eq!(published("again"), 3.0);
    stack.pg.exec("delete from outbox.backends where name = 'again'");
    wait_eq("backends that are counted", 1, || stack.pg.one::<i64>(batches));
    make("again");
    assert_eq!(published("again"), 3.0);
    // Also an extension that is created again, although its backends have the same numbers.
    stack.publish("one");
    wait_eq("published events", 1.0, || published("default"));
    stack
        .pg
        .exec("begin; drop extension outbox_relay cascade; create extension outbox_relay; commit");
    stack.point("default", &stack.redis);
    stack.publish("two");
    wait_eq("published events", 1.0, || published("default"));
    wait_eq("backends that are counted", 1, || stack.pg.one::<i64>(batches));
}

#[test]
fn backends_beyond_the_room_for_metrics_are_sent_to_and_listed_as_uncounted() {
    let redis = Redis::start();
    let mut pg = Postgres::with(QUICK).faults().stopped();
    pg.mutation("few_database_slots");
    pg.start_again();
    pg.extension();
    let stack = Stack { pg, redis };
    stack.point("default", &stack.redis);
    for name in ["b", "c", "d", "e"] {
        let port = stack.redis.port();
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port, stream_name) values ('{name}', '127.0.0.1', {port}, '{name}')"
        ));
        publish_many(&mut stack.pg.client(), name, "", "event", 3);
        wait_drained(&stack.pg, name);
        let labels = format!(r#"{{"backend": "{name}"}}"#);
        assert_eq!(metric(&stack, "outbox_relay_published_total", &labels), 3.0);
    }
    assert_eq!(metric(&stack, "outbox_relay_unmetered_backends", "{}"), 2.0);
    stack.pg.exec("delete from outbox.backends where name in ('b', 'c')");
    wait_eq("uncounted backends", 0.0, || {
        metric(&stack, "outbox_relay_unmetered_backends", "{}")
    });
}

#[test]
fn counters_outlive_a_restart_and_a_monitor_may_read_them() {
    let mut stack = Stack::of(Postgres::with(QUICK), Redis::start());
    publish_many(&mut stack.pg.client(), "default", "", "event", 3);
    wait_drained(&stack.pg, "default");
    stack.pg.restart();
    stack.publish("four");
    wait_eq("published in all", 4.0, || {
        metric(&stack, "outbox_relay_published_total", r#"{"backend": "default"}"#)
    });
    stack.pg.exec("create role watcher login; grant pg_monitor to watcher");
    let rows = stack
        .pg
        .client_as("watcher", "postgres")
        .query("select * from outbox.metrics", &[])
        .expect("a monitor may look");
    assert!(!rows.is_empty());
    stack.redis.kill9();
    stack.publish("waits");
    let backoff = r#"{"state": "backoff", "backend": "default"}"#;
    wait_until("the state to be backoff", || {
        metric(&stack, "outbox_relay_backend_state", backoff) > 0.5
    });
    assert_eq!(
        metric(&stack, "outbox_relay_pending_events", r#"{"backend": "default"}"#),
        1.0
    );
}

// A server compiles (JIT) what looks expensive, and that takes longer than the query itself.
#[test]
fn the_views_are_cheap_in_the_planners_eyes() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    let limit: f64 = stack
        .pg
        .one("select current_setting('jit_above_cost')::double precision");
    for view in ["metrics", "backend_status", "status", "top", "event_status"] {
        let rows = stack
            .pg
            .client()
            .query(&format!("explain select * from outbox.{view}"), &[])
            .expect("a plan");
        let plan: String = rows[0].get(0);
        let cost = plan
            .split_once("..")
            .and_then(|(_, rest)| rest.split_once(' '))
            .and_then(|(cost, _)| cost.parse::<f64>().ok())
            .expect("a plan with its cost");
        assert!(cost < limit, "{view}: {plan}");
    }
    let health: Vec<String> = stack
        .pg
        .one("select proconfig from pg_proc where oid = 'outbox.health(interval)'::regprocedure");
    assert!(health.iter().any(|setting| setting == "jit=off"), "{health:?}");
}
