//! The settings as users see them: names, defaults, units, contexts, and refused values.

use kit::{Postgres, Refused, Stack, types};

/// The name after the prefix, the default as SHOW prints it, the context, and a few values out of range.
const SETTINGS: &[(&str, &str, &str, &[&str])] = &[
    ("enabled", "on", "sighup", &["perhaps"]),
    ("databases", "*", "sighup", &[]),
    ("default_backend", "default", "user", &[]),
    ("batch_size", "100", "sighup", &["0", "-1", "many", "10s"]),
    ("poll_interval", "5s", "sighup", &["0", "-1", "2h", "soon"]),
    ("max_retries", "3", "sighup", &["0", "-1"]),
    ("retry_backoff", "on", "sighup", &["2"]),
    ("retry_delay", "1s", "sighup", &["0", "-1", "2h"]),
    ("retry_max_delay", "1min", "sighup", &["0", "-1", "2h"]),
    ("cleanup_published", "on", "sighup", &["maybe"]),
    ("published_retention", "7d", "sighup", &["-2", "1w"]),
    ("failed_retention", "30d", "sighup", &["-2", "1w"]),
    ("inbox_retention", "7d", "sighup", &["-2", "1w"]),
    ("traceparent", "", "user", &["garbage"]),
    ("tracestate", "", "user", &["garbage"]),
    ("max_event_size", "1MB", "superuser", &["0", "-1", "1GB"]),
    ("log_level", "info", "sighup", &["loud", "notice"]),
    ("redis_host", "localhost", "sighup", &[]),
    ("redis_port", "6379", "sighup", &["0", "65536", "-1"]),
    ("redis_db", "0", "sighup", &["-1", "65536"]),
    ("redis_username", "", "sighup", &[]),
    ("redis_password_file", "", "sighup", &[]),
    ("redis_stream_name", "events", "sighup", &[]),
    ("redis_max_len", "10000", "sighup", &["-1"]),
    ("redis_connect_timeout", "5s", "sighup", &["0", "-1", "2h"]),
    ("redis_socket_timeout", "5s", "sighup", &["0", "-1", "2h"]),
    (
        "allowed_hosts",
        "*",
        "sighup",
        &["a,,b", "redis:6379", "10.0.0.0/33", "10.*", "no name", ","],
    ),
    ("send_after", "local_flush", "sighup", &["remote_apply", "on", ""]),
    ("take_over", "standby", "sighup", &["on", "copy", ""]),
];

#[test]
fn defaults_and_contexts_are_as_documented() {
    let pg = Postgres::with(&[("outbox_relay.redis_port", "6379")]).start();
    let mut client = pg.client();
    for (name, shown, context, _) in SETTINGS {
        let row = client
            .query_one(&format!("show outbox_relay.{name}"), &[])
            .unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert_eq!(row.get::<_, &str>(0), *shown, "{name}");
        let row = client
            .query_one(
                "select context, short_desc <> '' from pg_settings where name = $1",
                &[&format!("outbox_relay.{name}")],
            )
            .unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert_eq!(
            (row.get::<_, &str>(0), row.get::<_, bool>(1)),
            (*context, true),
            "{name}"
        );
    }
}

#[test]
fn values_out_of_range_are_refused() {
    let pg = Postgres::with(&[("outbox_relay.redis_port", "6379")]).start();
    let mut client = pg.client();
    for (name, shown, _, wrong) in SETTINGS {
        for value in *wrong {
            let said = Refused::of(client.execute(&format!("alter system set outbox_relay.{name} = '{value}'"), &[]));
            assert_eq!(said.code, "22023", "{name} = {value}: {said:?}");
        }
        assert_eq!(pg.one::<String>(&format!("show outbox_relay.{name}")), *shown);
    }
    for (name, value, shown) in [
        ("published_retention", "-1", "-1"),
        ("published_retention", "0", "0"),
        ("published_retention", "90", "90min"),
        ("failed_retention", "36h", "36h"),
        ("redis_max_len", "0", "0"),
        ("poll_interval", "1500", "1500ms"),
        ("retry_delay", "2", "2ms"),
        ("max_event_size", "64", "64kB"),
        ("log_level", "WARNING", "warning"),
    ] {
        pg.set(&format!("outbox_relay.{name}"), value);
        kit::wait_eq(name, shown.to_string(), || pg.one(&format!("show outbox_relay.{name}")));
    }
}

#[test]
fn the_prefix_is_reserved() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    for sql in [
        "set outbox_relay.nonsense = 1",
        "alter system set outbox_relay.batchsize = 1",
        "alter role postgres set outbox_relay.nonsense = 1",
    ] {
        let said = Refused::of(client.execute(sql, &[]));
        assert!(["42602", "42704"].contains(&said.code.as_str()), "{sql}: {said:?}");
    }
    let unknown: i64 = stack
        .pg
        .one("select count(*) from pg_settings where name like 'outbox\\_relay.%' and category = 'Customized Options'");
    assert_eq!(unknown, SETTINGS.len() as i64, "SETTINGS here is complete");
}

/// A misspelt line in postgresql.conf is dropped with a warning, and the server starts.
#[test]
fn a_misspelt_setting_is_dropped_with_a_warning() {
    let stack = Stack::with(&[("outbox_relay.nonsense", "1")]);
    stack
        .pg
        .wait_log("invalid configuration parameter name \"outbox_relay.nonsense\", removing it");
    stack.publish("t");
    assert_eq!(types(&stack.wait_events(1)), ["t"]);
}

#[test]
fn a_session_may_choose_its_default_backend() {
    let stack = Stack::start();
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, stream_name) values ('mine', '127.0.0.1', {}, 'mine');
        create role app login; select outbox.grant_publisher('app')",
        stack.redis.port()
    ));
    let mut app = stack.pg.client_as("app", "postgres");
    let publish = "select outbox.publish_event('t', 'kit')";
    app.batch_execute("set outbox_relay.default_backend = 'mine'")
        .expect("everybody may");
    app.execute(publish, &[]).expect("publish");
    app.execute(
        "insert into outbox.events (event_type, source) values ('plain', 'kit')",
        &[],
    )
    .expect("insert");
    assert_eq!(types(&stack.redis.wait_entries("mine", 2)), ["t", "plain"]);
    app.batch_execute("set outbox_relay.default_backend = 'none'")
        .expect("set");
    let said = Refused::of(app.execute(publish, &[]));
    assert_eq!(
        (said.code.as_str(), said.message.as_str()),
        ("42704", "backend \"none\" does not exist")
    );
    app.batch_execute("reset outbox_relay.default_backend").expect("reset");
    app.execute(publish, &[]).expect("publish");
    assert_eq!(types(&stack.wait_events(1)), ["t"]);
    // For a role, as an administrator would.
    stack
        .pg
        .exec("alter role app set outbox_relay.default_backend = 'mine'");
    stack
        .pg
        .client_as("app", "postgres")
        .execute(publish, &[])
        .expect("publish");
    assert_eq!(stack.redis.wait_entries("mine", 3).len(), 3);
    for (setting, code) in [
        ("max_event_size = '2MB'", "42501"),
        ("batch_size = 1", "55P02"),
        ("enabled = off", "55P02"),
    ] {
        assert_eq!(
            Refused::of(app.batch_execute(&format!("set outbox_relay.{setting}"))).code,
            code,
            "{setting}"
        );
    }
}

#[test]
fn only_a_superuser_sets_max_event_size_and_it_is_enforced() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    let publish = "select outbox.publish_event('t', 'kit', to_jsonb(repeat('x', 3000)))";
    client
        .batch_execute("set outbox_relay.max_event_size = '2kB'")
        .expect("a superuser may");
    let said = Refused::of(client.execute(publish, &[]));
    assert_eq!(
        (said.code.as_str(), said.message.as_str()),
        ("54000", "event is too large")
    );
    client
        .batch_execute("set outbox_relay.max_event_size = '4kB'")
        .expect("a superuser may");
    client.execute(publish, &[]).expect("it fits now");
    stack.wait_events(1);
}
