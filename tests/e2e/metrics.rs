//! `outbox.metrics`: what a monitoring system is told.

use kit::{Postgres, QUICK, Redis, Stack, publish_many, wait_drained, wait_eq, wait_until};

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
    // What Prometheus wants: names in its form, one type and one help for a name, one value for a name and its labels.
    for wrong in [
        "select name from outbox.metrics where name !~ '^outbox_relay_[a-z_]+$' or type not in ('counter', 'gauge') or value is null or help = ''",
        "select name from outbox.metrics where (type = 'counter') <> (name like '%_total')",
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
