//! The views in each state of a relay.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use kit::{Redis, Refused, Stack, eventually, wait_eq};
use postgres::Row;
use uuid::Uuid;

/// One row of outbox.backend_status.
#[derive(Debug)]
struct Shown {
    state: String,
    pending: i64,
    age_s: Option<f64>,
    published: i64,
    failed: i64,
    last_published_at: Option<DateTime<Utc>>,
    last_error: Option<String>,
    last_error_at: Option<DateTime<Utc>>,
    next_attempt_at: Option<DateTime<Utc>>,
}

fn shown(stack: &Stack, backend: &str) -> Shown {
    let sql = "select state, pending, extract(epoch from oldest_pending_age)::float8, published_total, failed_total, \
               last_published_at, last_error, last_error_at, next_attempt_at from outbox.backend_status where backend = $1";
    let row = stack.pg.client().query_one(sql, &[&backend]).unwrap();
    Shown {
        state: row.get(0),
        pending: row.get(1),
        age_s: row.get(2),
        published: row.get(3),
        failed: row.get(4),
        last_published_at: row.get(5),
        last_error: row.get(6),
        last_error_at: row.get(7),
        next_attempt_at: row.get(8),
    }
}

/// The backend's row once it has this state.
#[track_caller]
fn wait_shown(stack: &Stack, backend: &str, state: &str, holds: impl Fn(&Shown) -> bool) -> Shown {
    let mut last = None;
    eventually(&format!("{backend} to be {state} as expected"), kit::LIMIT, || {
        let now = shown(stack, backend);
        let there = now.state == state && holds(&now);
        if !there && last.as_ref() != Some(&now.state) {
            println!("{now:?}");
            last = Some(now.state.clone());
        }
        there.then_some(now)
    })
}

#[test]
fn the_views_have_the_promised_columns() {
    let stack = Stack::start();
    let sql = "select table_name::text, string_agg(column_name || ' ' || data_type, ', ' order by ordinal_position) \
               from information_schema.columns where table_schema = 'outbox' \
               and table_name in ('status', 'backend_status', 'event_status') group by 1";
    let found: BTreeMap<String, String> = stack
        .pg
        .client()
        .query(sql, &[])
        .unwrap()
        .iter()
        .map(|row: &Row| (row.get(0), row.get(1)))
        .collect();
    let expected = [
        (
            "backend_status",
            "backend text, state text, pending bigint, oldest_pending_age interval, published_total bigint, \
             failed_total bigint, last_published_at timestamp with time zone, last_error text, \
             last_error_at timestamp with time zone, next_attempt_at timestamp with time zone, healings bigint, address text, max_rate integer",
        ),
        (
            "event_status",
            "event_id uuid, event_type text, source text, subject text, backend text, stream text, \
             created_at timestamp with time zone, scheduled_at timestamp with time zone, status text, attempts integer, \
             last_error text",
        ),
        (
            "status",
            "worker_pid integer, state text, backends bigint, pending bigint, oldest_pending_age interval, \
             scheduled bigint, failed bigint, published_total bigint, events_per_second real",
        ),
    ];
    assert_eq!(
        found,
        expected
            .map(|(view, columns)| (view.to_string(), columns.to_string()))
            .into()
    );
}

#[test]
fn an_idle_relay_shows_what_it_has_done() {
    let stack = Stack::start();
    let before: DateTime<Utc> = stack.pg.one("select clock_timestamp()");
    stack
        .pg
        .exec("select outbox.publish_event('t', 's') from generate_series(1, 7)");
    stack.wait_events(7);
    let idle = wait_shown(&stack, "default", "idle", |shown| shown.published == 7);
    assert_eq!(
        (idle.pending, idle.age_s, idle.failed, idle.next_attempt_at),
        (0, None, 0, None)
    );
    assert!(idle.last_published_at.unwrap() >= before);
    let sql = "select worker_pid, state, backends, pending, oldest_pending_age is null, scheduled, failed, published_total, \
               events_per_second from outbox.status";
    let row = stack.pg.client().query_one(sql, &[]).unwrap();
    let counts: [i64; 5] = [row.get(2), row.get(3), row.get(5), row.get(6), row.get(7)];
    assert_eq!(counts, [1, 0, 0, 0, 7]);
    assert_eq!(
        (row.get(0), row.get(1), row.get(4)),
        (stack.pg.worker_pid("postgres"), "running", true)
    );
    assert!(row.get::<_, f32>(8) > 0.0);
    stack.pg.set("outbox_relay.enabled", "off");
    wait_eq("its state", ("disabled".to_string(), None), || {
        let row = stack
            .pg
            .client()
            .query_one("select state, worker_pid from outbox.status", &[])
            .unwrap();
        (row.get(0), row.get::<_, Option<i32>>(1))
    });
}

#[test]
fn an_outage_shows_as_backoff() {
    let mut stack = Stack::with(&[
        ("outbox_relay.retry_delay", "300ms"),
        ("outbox_relay.retry_max_delay", "300ms"),
    ]);
    let port = stack.redis.port();
    stack.publish("before");
    wait_shown(&stack, "default", "idle", |shown| shown.published == 1);
    let log = stack.pg.log();
    assert!(
        !log.contains(&format!("127.0.0.1:{port}: Connection refused")),
        "blamed for the default address"
    );
    stack.redis.kill9();
    stack
        .pg
        .exec("select outbox.publish_event('t', 's') from generate_series(1, 3)");
    let down = wait_shown(&stack, "default", "backoff", |shown| shown.next_attempt_at.is_some());
    assert_eq!((down.pending, down.failed), (3, 0));
    assert!(down.age_s.is_some_and(|age| (0.0..20.0).contains(&age)));
    assert_eq!(down.last_error.as_deref(), Some("Connection refused (os error 111)"));
    assert!(down.last_error_at <= down.next_attempt_at);
    let (pending, aged): (i64, bool) = {
        let row = stack
            .pg
            .client()
            .query_one("select pending, oldest_pending_age > '0' from outbox.status", &[])
            .unwrap();
        (row.get(0), row.get(1))
    };
    assert_eq!((pending, aged), (3, true));
    stack.redis.start_again();
    stack.wait_events(3);
    let up = wait_shown(&stack, "default", "idle", |shown| shown.published == 4);
    assert_eq!((up.pending, up.age_s, up.next_attempt_at), (0, None, None));
}

#[test]
fn a_paused_backend_shows_its_pending_events() {
    let stack = Stack::start();
    stack.pg.exec("update outbox.backends set enabled = false");
    stack
        .pg
        .exec("select outbox.publish_event('t', 's') from generate_series(1, 5)");
    let paused = wait_shown(&stack, "default", "paused", |shown| shown.pending == 5);
    assert!(paused.age_s.is_some());
    assert_eq!(paused.next_attempt_at, None);
    assert_eq!(stack.events().len(), 0);
    stack.pg.exec("update outbox.backends set enabled = true");
    stack.wait_events(5);
    wait_shown(&stack, "default", "idle", |shown| shown.pending == 0);
}

/// Beyond what is counted, the estimate goes by the share that the backend has in what was looked at.
#[test]
fn many_pending_events_among_those_of_others_are_estimated() {
    let stack = Stack::start();
    stack
        .pg
        .exec("insert into outbox.backends (name, stream_name, enabled) values ('paused', 's', false)");
    stack.pg.exec(
        "insert into outbox.events (event_type, source, backend)
        select 't', 's', case when g % 6 = 0 then 'paused' else 'default' end from generate_series(1, 72000) g",
    );
    let pending = shown(&stack, "paused").pending;
    assert!((11_900..=12_100).contains(&pending), "{pending}");
}

#[test]
fn a_missing_password_shows_as_misconfigured() {
    let stack = Stack::of(kit::Postgres::builder(), Redis::with(&["--requirepass", "hush"]));
    stack.publish("t");
    let shut = wait_shown(&stack, "default", "misconfigured", |shown| shown.last_error.is_some());
    assert!(shut.last_error.as_ref().unwrap().starts_with("NOAUTH"), "{shut:?}");
    assert!(shut.next_attempt_at.is_some());
    assert_eq!(shut.pending, 1);
    stack.pg.exec("select outbox.set_backend_password('default', 'wrong')");
    wait_shown(&stack, "default", "misconfigured", |shown| {
        shown
            .last_error
            .as_ref()
            .is_some_and(|error| error.starts_with("WRONGPASS"))
    });
    stack.pg.exec("select outbox.set_backend_password('default', 'hush')");
    stack.wait_events(1);
    wait_shown(&stack, "default", "idle", |shown| shown.published == 1);
    assert!(!stack.pg.log().contains("hush\n"), "the password is logged");
}

/// All states of an event, with a stream that refuses some events.
#[test]
fn event_status_follows_an_event() {
    let stack = Stack::with(&[
        ("outbox_relay.retry_delay", "1h"),
        ("outbox_relay.retry_max_delay", "1h"),
    ]);
    stack.redis.call(&["SET", "wrong", "no stream"]);
    let publish = |more: &str| -> Uuid {
        stack
            .pg
            .one(&format!("select outbox.publish_event('t', 's', '1', 'subject'{more})"))
    };
    let row_of = |id: Uuid| {
        let sql = "select status, attempts, last_error, stream, backend, scheduled_at is not null, event_type, source, subject \
                   from outbox.event_status where event_id = $1";
        let row = stack.pg.client().query_one(sql, &[&id]).unwrap();
        let common: [String; 4] = [row.get(4), row.get(6), row.get(7), row.get(8)];
        assert_eq!(common, ["default", "t", "s", "subject"]);
        let shown: (String, i32, Option<String>, String, bool) =
            (row.get(0), row.get(1), row.get(2), row.get(3), row.get(5));
        shown
    };
    let state = |status: &str, attempts: i32, error: Option<&str>, stream: &str, scheduled: bool| {
        (
            status.to_string(),
            attempts,
            error.map(str::to_string),
            stream.to_string(),
            scheduled,
        )
    };
    let wrong = "WRONGTYPE Operation against a key holding the wrong kind of value";
    let published = publish("");
    let scheduled = publish(", scheduled_at => now() + interval '1 hour', stream => 'later'");
    let retried = publish(", stream => 'wrong', max_retries => 2");
    let behind = publish(", stream => 'wrong', max_retries => 1");
    stack.redis.call(&["SET", "wrong too", "no stream"]);
    let failed = publish(", stream => 'wrong too', max_retries => 1");
    wait_eq(
        "the published one",
        state("published", 1, None, "events", false),
        || row_of(published),
    );
    wait_eq(
        "the retried one",
        state("pending", 1, Some(wrong), "wrong", false),
        || row_of(retried),
    );
    wait_eq(
        "the failed one",
        state("failed", 1, Some(wrong), "wrong too", false),
        || row_of(failed),
    );
    assert_eq!(row_of(scheduled), state("scheduled", 0, None, "later", true));
    let (status, _, error, ..) = row_of(behind);
    assert_eq!((status.as_str(), error.is_some()), ("pending", true));
    let refusing = wait_shown(&stack, "default", "idle", |shown| shown.failed == 1);
    assert_eq!((refusing.pending, refusing.published), (2, 1));
    assert_eq!(refusing.last_error.as_deref(), Some(wrong));
    stack.pg.exec("update outbox.backends set enabled = false");
    let waiting = publish("");
    assert_eq!(row_of(waiting), state("pending", 0, None, "events", false));

    let sql = "select event_type, source, subject, data::text, stream, backend, attempts, last_error, max_retries, \
               failed_at between created_at and clock_timestamp() from outbox.failed_events where event_id = $1";
    let row = stack.pg.client().query_one(sql, &[&failed]).unwrap();
    let texts: Vec<&str> = (0..6).map(|column| row.get(column)).collect();
    assert_eq!(texts, ["t", "s", "subject", "1", "wrong too", "default"]);
    assert_eq!((row.get(6), row.get(7), row.get(8), row.get(9)), (1, wrong, 1, true));
    // Kept in failed_events for longer than in events.
    stack
        .pg
        .exec(&format!("delete from outbox.events where event_id = '{failed}'"));
    assert_eq!(row_of(failed), state("failed", 1, Some(wrong), "wrong too", false));
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.event_status"), 6);
    assert_eq!(stack.pg.one::<i64>("select failed from outbox.status"), 1);
}

/// Up to 10,000 each event is counted; above it is an estimate, which a mixture of backends must not make very wrong.
#[test]
fn pending_is_exact_below_ten_thousand() {
    let stack = Stack::start();
    stack.pg.exec(
        "update outbox.backends set enabled = false; \
         insert into outbox.backends (name, enabled) values ('other', false)",
    );
    let publish = |backend: &str, count: u32| {
        stack.pg.exec(&format!(
            "insert into outbox.events (event_type, source, backend) select 't', 's', '{backend}' from generate_series(1, {count})"
        ));
    };
    let pending = |backend: &str| shown(&stack, backend).pending;
    stack.pg.exec(
        "begin; insert into outbox.events (event_type, source) select 't', 's' from generate_series(1, 500); rollback",
    );
    publish("default", 9_990);
    publish("other", 300);
    assert_eq!((pending("default"), pending("other")), (9_990, 300));
    publish("default", 9);
    assert_eq!((pending("default"), pending("other")), (9_999, 300));
    let mut open = stack.pg.client();
    open.batch_execute("begin; select outbox.publish_event('uncommitted', 's')")
        .unwrap();
    assert_eq!(pending("default"), 9_999);
    for _ in 0..20 {
        publish("default", 1_500);
        publish("other", 500);
    }
    let estimate = pending("default");
    assert!(
        (30_000..60_000).contains(&estimate),
        "39,999 wait, {estimate} are shown"
    );
    let other = pending("other");
    assert!((10_000..16_000).contains(&other), "10,300 wait, {other} are shown");
    assert_eq!(
        stack.pg.one::<i64>("select pending from outbox.status"),
        estimate + other
    );
}

#[test]
fn an_event_is_never_updated() {
    let stack = Stack::start();
    stack.publish("t");
    let expected = Refused::new(
        "55000",
        "rows of outbox.events are never updated",
        "",
        "Publish another event.",
    );
    let mut client = stack.pg.client();
    for sql in [
        "update outbox.events set source = 'x'",
        "insert into outbox.events (event_id, event_type, source) select event_id, 't', 's' from outbox.events \
         on conflict (event_id) do update set source = 'x'",
    ] {
        assert_eq!(Refused::of(client.simple_query(sql)), expected);
    }
}
