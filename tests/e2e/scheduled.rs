//! Scheduled events are kept separately, and get their place in the order when they fall due.

use chrono::{DateTime, Utc};
use kit::{Refused, Stack, types, wait_eq};
use uuid::Uuid;

/// Publishes an event for a moment, an SQL expression.
fn schedule(stack: &Stack, event_type: &str, at: &str) -> Uuid {
    let sql = format!("select outbox.publish_event('{event_type}', 's', scheduled_at => {at})");
    stack.pg.one(&sql)
}

#[test]
fn an_event_waits_for_its_time_and_no_longer() {
    let stack = Stack::with(&[("outbox_relay.poll_interval", "1h")]);
    let id = schedule(&stack, "due", "clock_timestamp() + interval '1 s'");
    let sql = format!("select status, scheduled_at, attempts from outbox.event_status where event_id = '{id}'");
    let row = stack.pg.client().query_one(&sql, &[]).unwrap();
    let due_at: DateTime<Utc> = row.get(1);
    assert_eq!((row.get::<_, &str>(0), row.get::<_, i32>(2)), ("scheduled", 0));
    stack.publish("before");
    assert_eq!(types(&stack.wait_events(1)), ["before"]);
    assert_eq!(stack.pg.one::<i64>("select scheduled from outbox.status"), 1);
    let entries = stack.wait_events(2);
    assert_eq!(types(&entries), ["before", "due"]);
    // Redis's clock is this machine's.
    let sent_ms: i64 = entries[1].id.split('-').next().unwrap().parse().unwrap();
    let late_ms = sent_ms - due_at.timestamp_millis();
    assert!((0..1_000).contains(&late_ms), "sent {late_ms} ms after its time");
    // It keeps the time of its publishing.
    let created: String = stack.pg.one(&format!(
        "select to_char(created_at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"+00:00\"') \
         from outbox.events where event_id = '{id}'"
    ));
    assert_eq!(entries[1].field("timestamp"), created);
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.scheduled_events"), 0);
    wait_eq("its status", "published".to_string(), || {
        stack.pg.one(&format!(
            "select status from outbox.event_status where event_id = '{id}'"
        ))
    });
}

/// By an UPDATE of the table's owner, which wakes the worker by itself, or is woken for in the same transaction.
#[test]
fn an_event_that_is_rescheduled_is_sent_at_its_new_time() {
    let stack = Stack::with(&[("outbox_relay.poll_interval", "1h")]);
    for event_type in ["sooner", "woken", "later"] {
        schedule(&stack, event_type, "'2100-01-01'");
    }
    let reschedule = |event_type: &str, at: &str| {
        format!("update outbox.scheduled_events set scheduled_at = {at} where event_type = '{event_type}'")
    };
    stack.pg.exec(&reschedule("sooner", "now()"));
    assert_eq!(types(&stack.wait_events(1)), ["sooner"]);
    stack.pg.exec(&format!(
        "set session_replication_role = replica; {}; select outbox.wake()",
        reschedule("woken", "now()")
    ));
    assert_eq!(types(&stack.wait_events(2))[1], "woken");
    stack.pg.exec(&format!(
        "begin; select outbox.wake(); {}; select pg_sleep(0.3); commit",
        reschedule("later", "'-infinity'")
    ));
    assert_eq!(types(&stack.wait_events(3))[2], "later");
}

#[test]
fn a_past_time_means_now_and_infinity_is_refused() {
    let stack = Stack::start();
    for at in ["'2000-01-01'", "now()", "'-infinity'", "null"] {
        schedule(&stack, &at.replace('\'', ""), at);
    }
    assert_eq!(
        types(&stack.wait_events(4)),
        ["2000-01-01", "now()", "-infinity", "null"]
    );
    let expected = Refused::new(
        "22023",
        "scheduled_at must be a finite time",
        "An event that is scheduled for infinity would never be sent.",
        "Pass a time, or NULL to send at once.",
    );
    let mut client = stack.pg.client();
    let sql = "select outbox.publish_event('t', 's', scheduled_at => 'infinity')";
    assert_eq!(Refused::of(client.simple_query(sql)), expected);
    let sql =
        "select outbox.publish_events('[{\"event_type\": \"t\", \"source\": \"s\", \"scheduled_at\": \"infinity\"}]')";
    assert_eq!(Refused::of(client.simple_query(sql)), expected);
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.scheduled_events"), 0);
}

/// By time, and at the same time by publishing; an earlier one is not delayed by one that the worker already waits for.
#[test]
fn scheduled_events_are_sent_in_the_order_of_their_times() {
    let stack = Stack::with(&[
        ("outbox_relay.poll_interval", "1h"),
        ("outbox_relay.redis_max_len", "0"),
    ]);
    let base: String = stack.pg.one("select (clock_timestamp() + interval '1.5 s')::text");
    schedule(&stack, "far", "clock_timestamp() + interval '1 hour'");
    schedule(&stack, "last", &format!("timestamptz '{base}' + interval '0.3 s'"));
    stack.pg.exec(&format!(
        "do $$ begin for i in 1..3000 loop \
             perform outbox.publish_event('same ' || i, 's', scheduled_at => '{base}'); end loop; end $$"
    ));
    schedule(&stack, "first", &format!("timestamptz '{base}' - interval '0.1 s'"));
    stack
        .pg
        .exec("begin; select outbox.publish_event('gone', 's', scheduled_at => now() + interval '0.1 s'); rollback");
    let mut expected = vec!["first".to_string()];
    expected.extend((1..=3_000).map(|i| format!("same {i}")));
    expected.push("last".to_string());
    assert_eq!(types(&stack.wait_events(expected.len())), expected);
    assert_eq!(
        stack
            .pg
            .one::<String>("select string_agg(event_type, ',') from outbox.scheduled_events"),
        "far"
    );
}

/// The publisher's check cannot see an event that another transaction has not committed yet.
#[test]
fn an_id_that_was_published_meanwhile_is_kept_as_failed() {
    let stack = Stack::start();
    let id = Uuid::new_v4();
    let mut first = stack.pg.client();
    first
        .batch_execute(&format!(
            "begin; select outbox.publish_event('first', 's', event_id => '{id}')"
        ))
        .unwrap();
    let at = "clock_timestamp() + interval '0.5 s'";
    stack.pg.exec(&format!(
        "select outbox.publish_event('second', 's', '{{\"kept\": true}}', event_id => '{id}', scheduled_at => {at}); \
         select outbox.publish_event('third', 's', scheduled_at => {at})"
    ));
    first.batch_execute("commit").unwrap();
    assert_eq!(types(&stack.wait_events(2)), ["first", "third"]);
    let row = stack
        .pg
        .client()
        .query_one(
            "select event_type, event_id, data->>'kept', attempts, last_error from outbox.failed_events",
            &[],
        )
        .unwrap();
    let row: (String, Uuid, String, i32, String) = (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4));
    let error = "an event with this event_id was already published".to_string();
    assert_eq!(row, ("second".to_string(), id, "true".to_string(), 0, error));
    assert_eq!(stack.pg.one::<i64>("select failed from outbox.status"), 1);
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.scheduled_events"), 0);
    stack.publish("marker");
    assert_eq!(types(&stack.wait_events(3)), ["first", "third", "marker"]);
}

#[test]
fn scheduled_events_survive_a_restart_and_a_crash() {
    let stack = Stack::with(&[("outbox_relay.poll_interval", "1h")]);
    let id = schedule(&stack, "after restart", "clock_timestamp() + interval '1.5 s'");
    schedule(&stack, "after crash", "clock_timestamp() + interval '3.5 s'");
    let Stack { mut pg, redis } = stack;
    pg.restart();
    assert_eq!(pg.one::<i64>("select scheduled from outbox.status"), 2);
    assert_eq!(redis.wait_entries("events", 1)[0].field("event_id"), id.to_string());
    wait_eq("the saved cursor", "published".to_string(), || {
        pg.one(&format!(
            "select status from outbox.event_status where event_id = '{id}'"
        ))
    });
    // An acknowledged event is in the WAL, whatever synchronous_commit says.
    pg.exec("select pg_switch_wal(); checkpoint");
    pg.crash();
    wait_eq("nobody", 1, || redis.xlen("events"));
    pg.start_again();
    assert_eq!(
        types(&redis.wait_entries("events", 2)),
        ["after restart", "after crash"]
    );
}

/// Two-phase, savepoints: a schedule is as transactional as an event.
#[test]
fn a_schedule_holds_only_if_it_commits() {
    let stack = Stack::with(&[("outbox_relay.poll_interval", "1h")]);
    stack.pg.exec(
        "begin; \
         select outbox.publish_event('kept', 's', scheduled_at => clock_timestamp() + interval '0.3 s'); \
         savepoint a; \
         select outbox.publish_event('gone', 's', scheduled_at => clock_timestamp() + interval '0.3 s'); \
         rollback to a; commit",
    );
    let mut client = stack.pg.client();
    client
        .batch_execute(
            "begin; select outbox.publish_event('prepared', 's', scheduled_at => clock_timestamp() + interval '0.1 s'); \
             prepare transaction 'p'",
        )
        .unwrap();
    assert_eq!(types(&stack.wait_events(1)), ["kept"]);
    client.batch_execute("commit prepared 'p'").unwrap();
    assert_eq!(types(&stack.wait_events(2)), ["kept", "prepared"]);
}

/// The worker waits for its lock, and then must see the rows as they are, not an empty table.
#[test]
fn an_event_that_is_due_while_its_table_is_rewritten_is_sent() {
    let stack = Stack::with(&[("outbox_relay.poll_interval", "1h")]);
    // From now on the worker keeps the plan of its look.
    schedule(&stack, "first", "clock_timestamp() + interval '100 ms'");
    stack.wait_events(1);
    for round in 1..=3 {
        schedule(&stack, "due", "clock_timestamp() + interval '1 s'");
        let mut client = stack.pg.client();
        client
            .batch_execute(
                "begin;
                set local statement_timeout = '20 s';
                alter table outbox.scheduled_events alter column published_by type oid using published_by::bigint::oid;
                do $$ begin loop
                    exit when exists (select from pg_locks l where not l.granted and l.relation = 'outbox.scheduled_events'::regclass);
                    perform pg_sleep(0.001);
                end loop; end $$;
                commit",
            )
            .expect("it waits for nobody");
        stack.wait_events(1 + round);
    }
}
