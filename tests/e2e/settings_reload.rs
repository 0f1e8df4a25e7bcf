//! Every setting takes effect with a reload: the server is not restarted, and the worker only if the setting is about
//! that.

use std::time::{Duration, Instant};

use kit::{
    BlackHole, Postgres, QUICK, Redis, Stack, entries, ids, publish_many, standing, types, wait_drained, wait_eq,
    wait_trouble, wait_until,
};

/// Settings of a stack whose backend row is empty.
fn bare(redis: Redis) -> Stack {
    let stack = Stack::of(Postgres::with(QUICK), redis);
    stack.pg.exec("update outbox.backends set host = null, port = null");
    stack
}

fn set(stack: &Stack, settings: &[(&str, &str)]) {
    for (name, value) in settings {
        stack
            .pg
            .exec(&format!("alter system set outbox_relay.{name} = '{value}'"));
    }
    stack.pg.reload();
}

/// Waits until the worker has loaded the changed settings: it logs a warning about a short retention at each reload.
fn wait_reloaded(stack: &Stack, minutes: u32) {
    set(stack, &[("failed_retention", &minutes.to_string())]);
    stack
        .pg
        .wait_log(&format!("outbox_relay.failed_retention is only {minutes} minutes"));
}

#[test]
fn the_redis_settings() {
    let stack = bare(Redis::start());
    let worker = stack.pg.wait_worker("postgres");
    set(
        &stack,
        &[
            ("redis_host", "127.0.0.1"),
            ("redis_port", &stack.redis.port().to_string()),
        ],
    );
    stack.publish("one");
    assert_eq!(types(&stack.wait_events(1)), ["one"]);

    let other = Redis::with(&["--requirepass", "secret"]);
    let file = stack.pg.host().join("password");
    kit::env::server_file(&file, b"secret\n", 0o600);
    set(
        &stack,
        &[
            ("redis_port", &other.port().to_string()),
            ("redis_password_file", file.to_str().expect("UTF-8")),
        ],
    );
    stack.publish("two");
    assert_eq!(types(&other.wait_entries("events", 1)), ["two"]);

    set(&stack, &[("redis_stream_name", "renamed"), ("redis_max_len", "200")]);
    wait_reloaded(&stack, 50);
    let published = publish_many(&mut stack.pg.client(), "default", "", "t", 2_000);
    wait_drained(&stack.pg, "default");
    let kept = ids(&other.entries("renamed"));
    assert!(
        (200..=400).contains(&kept.len()) && published.ends_with(&kept),
        "{} entries",
        kept.len()
    );
    let shown: String = stack.pg.one("select distinct stream from outbox.event_status");
    assert_eq!(shown, "renamed");

    other.call(&["ACL", "SETUSER", "relay", "on", ">secret", "~*", "+@all"]);
    set(&stack, &[("redis_username", "relay"), ("redis_db", "2")]);
    stack.publish("three");
    let mut conn = other.conn();
    redis::cmd("SELECT").arg(2).exec(&mut conn).expect("SELECT");
    wait_until("an entry in database 2", || kit::xlen(&mut conn, "renamed") == 1);
    assert_eq!(types(&entries(&mut conn, "renamed")), ["three"]);
    let clients: String = redis::cmd("CLIENT").arg("LIST").query(&mut conn).expect("CLIENT LIST");
    assert!(clients.contains("user=relay"), "{clients}");
    assert_eq!((stack.redis.xlen("events"), other.xlen("events")), (1, 1));
    assert_eq!(stack.pg.wait_worker("postgres"), worker);
}

/// A running timeout is shortened by the reload.
#[test]
fn the_timeouts() {
    let stack = bare(Redis::start());
    let (silent, gone) = (BlackHole::start(), BlackHole::unreachable());
    let (long, short) = ("1h", "200ms");
    set(
        &stack,
        &[
            ("redis_host", "127.0.0.1"),
            ("redis_port", &silent.port().to_string()),
            ("redis_connect_timeout", long),
            ("redis_socket_timeout", long),
        ],
    );
    wait_until("a connection", || silent.accepted() > 0);
    stack.publish("t");
    set(&stack, &[("redis_socket_timeout", short)]);
    wait_trouble(&stack.pg, "default", "backoff", "timed out");
    set(
        &stack,
        &[("redis_socket_timeout", long), ("redis_port", &gone.port().to_string())],
    );
    wait_eq("the state", "idle".to_string(), || standing(&stack.pg, "default").state);
    set(&stack, &[("redis_connect_timeout", short)]);
    wait_trouble(&stack.pg, "default", "backoff", "timed out");
    set(&stack, &[("redis_port", &stack.redis.port().to_string())]);
    stack.wait_events(1);
}

#[test]
fn batch_size() {
    let stack = Stack::start();
    let batches = || -> f64 {
        stack
            .pg
            .one("select value from outbox.metrics where name = 'outbox_relay_batches_total' and labels ->> 'backend' = 'default'")
    };
    publish_many(&mut stack.pg.client(), "default", "", "t", 100);
    stack.wait_events(100);
    wait_eq("one batch", 1.0, batches);
    set(&stack, &[("batch_size", "1")]);
    wait_reloaded(&stack, 50);
    publish_many(&mut stack.pg.client(), "default", "", "t", 100);
    stack.wait_events(200);
    wait_eq("a batch for each event", 101.0, batches);
}

/// Rows that arrive without a signal (here the trigger that wakes the worker is off) are found by its poll.
#[test]
fn poll_interval() {
    let stack = Stack::start();
    let insert = || {
        stack.pg.exec(
            "begin; alter table outbox.events disable trigger complete_event;
            insert into outbox.events (seq, xid, created_at, event_id, backend_number, event_type, source, backend)
                select nextval('outbox.events_seq_seq'), x, now(), gen_random_uuid(), number, 't', 'kit', name
                from pg_current_xact_id() x, outbox.backends;
            alter table outbox.events enable always trigger complete_event; commit",
        );
    };
    set(&stack, &[("poll_interval", "100ms")]);
    wait_reloaded(&stack, 50);
    let start = Instant::now();
    insert();
    stack.wait_events(1);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    set(&stack, &[("poll_interval", "1h")]);
    wait_reloaded(&stack, 51);
    wait_drained(&stack.pg, "default");
    insert();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(stack.redis.xlen("events"), 1, "nothing but polling was to find it");
    stack.pg.exec("select outbox.wake()");
    stack.wait_events(2);
}

#[test]
fn the_retry_settings() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    // (attempts, seconds from publishing to failing) of an event whose stream is a string.
    let fails = |stream: &str| -> (i32, f64) {
        stack.redis.call(&["SET", stream, "a string"]);
        stack.pg.exec(&format!(
            "select outbox.publish_event('t', 'kit', stream => '{stream}')"
        ));
        let failed = format!("select count(*) from outbox.failed_events where stream = '{stream}'");
        wait_eq("failed events", 1, || stack.pg.one::<i64>(&failed));
        let row = stack.pg.client().query_one(
            "select attempts, extract(epoch from failed_at - created_at)::float8 from outbox.failed_events where stream = $1",
            &[&stream],
        );
        let row = row.expect("it is there");
        (row.get(0), row.get(1))
    };
    assert_eq!(fails("a").0, 3);
    set(
        &stack,
        &[
            ("max_retries", "6"),
            ("retry_delay", "100ms"),
            ("retry_max_delay", "1h"),
            ("retry_backoff", "off"),
        ],
    );
    wait_reloaded(&stack, 50);
    let (attempts, took) = fails("b");
    assert!(
        attempts == 6 && (0.5..1.5).contains(&took),
        "{attempts} attempts in {took} s"
    );
    // 100, 200, 400, 800, 1600 ms, each shortened by up to a half.
    set(&stack, &[("retry_backoff", "on")]);
    wait_reloaded(&stack, 51);
    let (attempts, took) = fails("c");
    assert!(
        attempts == 6 && (1.5..5.0).contains(&took),
        "{attempts} attempts in {took} s"
    );
    set(&stack, &[("retry_max_delay", "100ms")]);
    wait_reloaded(&stack, 52);
    let (attempts, took) = fails("d");
    assert!(
        attempts == 6 && (0.25..1.5).contains(&took),
        "{attempts} attempts in {took} s"
    );
    set(&stack, &[("max_retries", "1")]);
    wait_reloaded(&stack, 53);
    assert_eq!(fails("e").0, 1);
}

/// A lower retry_delay also applies to retries that already wait.
#[test]
fn a_shorter_retry_delay_applies_to_waiting_retries() {
    let mut stack = Stack::with(&[
        ("outbox_relay.retry_delay", "1h"),
        ("outbox_relay.retry_max_delay", "1h"),
    ]);
    stack.publish("before");
    stack.wait_events(1);
    stack.redis.shutdown();
    stack.publish("t");
    wait_trouble(&stack.pg, "default", "backoff", "refused");
    stack.redis.start_again();
    set(&stack, &[("retry_delay", "100ms"), ("retry_max_delay", "100ms")]);
    stack.wait_events(1);
    stack.redis.call(&["SET", "bad", "a string"]);
    set(
        &stack,
        &[
            ("retry_delay", "1h"),
            ("retry_max_delay", "1h"),
            ("max_retries", "1000"),
        ],
    );
    wait_reloaded(&stack, 50);
    stack
        .pg
        .exec("select outbox.publish_event('t', 'kit', stream => 'bad')");
    wait_eq("refused events", 1, || {
        stack.pg.one::<i64>("select count(*) from outbox.refused_events")
    });
    stack.redis.call(&["DEL", "bad"]);
    set(&stack, &[("retry_delay", "100ms"), ("retry_max_delay", "100ms")]);
    stack.redis.wait_entries("bad", 1);
}

#[test]
fn cleanup_and_retentions() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[("outbox_relay.max_retries", "1")]),
        Redis::start(),
    );
    stack.redis.call(&["SET", "bad", "a string"]);
    let rows = || {
        (
            stack.pg.one::<i64>("select count(*) from outbox.events"),
            stack.pg.one::<i64>("select count(*) from outbox.failed_events"),
        )
    };
    stack.publish("t");
    stack
        .pg
        .exec("select outbox.publish_event('t', 'kit', stream => 'bad')");
    wait_eq("events and failed events", (2, 1), rows);
    wait_drained(&stack.pg, "default");
    set(
        &stack,
        &[
            ("cleanup_published", "off"),
            ("published_retention", "0"),
            ("failed_retention", "-1"),
        ],
    );
    stack.publish("t");
    stack.wait_events(2);
    std::thread::sleep(Duration::from_millis(1_500));
    assert_eq!(rows(), (3, 1));
    set(&stack, &[("cleanup_published", "on"), ("published_retention", "-1")]);
    std::thread::sleep(Duration::from_millis(1_500));
    assert_eq!(rows(), (3, 1));
    set(&stack, &[("published_retention", "0")]);
    wait_eq("events", 0, || rows().0);
    assert_eq!(rows().1, 1);
    set(&stack, &[("failed_retention", "0")]);
    wait_eq("failed events", 0, || rows().1);
}

#[test]
fn enabled() {
    let stack = Stack::start();
    stack.publish("one");
    stack.wait_events(1);
    set(&stack, &[("enabled", "off")]);
    wait_eq("the worker", None, || stack.pg.worker_pid("postgres"));
    wait_eq("the state", "disabled".to_string(), || {
        stack.pg.one("select state from outbox.status")
    });
    let queued = publish_many(&mut stack.pg.client(), "default", "", "t", 20);
    assert_eq!(stack.pg.one::<i64>("select pending from outbox.status"), 20);
    assert_eq!(stack.redis.xlen("events"), 1);
    set(&stack, &[("enabled", "on")]);
    assert_eq!(ids(&stack.wait_events(21))[1..], queued);
    wait_eq("the state", "running".to_string(), || {
        stack.pg.one("select state from outbox.status")
    });
}

#[test]
fn databases() {
    let stack = Stack::with(&[]);
    stack.pg.exec("create database a");
    stack.pg.exec("create database b");
    for db in ["a", "b"] {
        stack.pg.exec_db(db, &format!("create extension outbox_relay; update outbox.backends set host = '127.0.0.1', port = {}, stream_name = '{db}'", stack.redis.port()));
        stack.pg.wait_worker(db);
    }
    let publish = |db: &str| stack.pg.exec_db(db, "select outbox.publish_event('t', 'kit')");
    let workers = || -> String {
        stack.pg.one("select coalesce(string_agg(datname, ' ' order by datname), '') from pg_stat_activity where backend_type = 'outbox_relay worker'")
    };
    for (list, served) in [
        ("a", "a"),
        ("b, postgres", "b postgres"),
        ("", ""),
        ("nowhere", ""),
        ("*,!a", "b postgres"),
        ("! b , *", "a postgres"),
        ("!post*", "a b"),
        ("?", "a b"),
        ("p*s, a, !?", "postgres"),
        ("*", "a b postgres"),
        ("!*", ""),
        ("!a,!nowhere", "b postgres"),
        ("*,!*_*", "a b postgres"),
        (" postgres ,a", "a postgres"),
    ] {
        set(&stack, &[("databases", list)]);
        wait_eq(&format!("the workers of {list:?}"), served.to_string(), workers);
    }
    publish("a");
    publish("b");
    stack.redis.wait_entries("a", 1);
    assert_eq!(stack.redis.xlen("b"), 0);
    set(&stack, &[("databases", "*")]);
    stack.redis.wait_entries("b", 1);
}

/// The worker reads its settings when it gets the signal; a reload during an outage does no harm.
#[test]
fn many_reloads_lose_nothing() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    let mut expected = Vec::new();
    for n in 0..30 {
        expected.extend(publish_many(
            &mut stack.pg.client(),
            "default",
            "",
            &format!("{n}."),
            20,
        ));
        set(
            &stack,
            &[
                ("batch_size", &(n % 7 + 1).to_string()),
                ("redis_max_len", &(10_000 + n).to_string()),
            ],
        );
    }
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), expected);
}
