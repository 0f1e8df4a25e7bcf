//! `contrib/settings_to_sql.py`: settings of other outboxes become SQL that runs, names what it omits, and shows no
//! password.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use kit::{Postgres, env};

/// The output of the converter, or its error.
fn convert(arguments: &[&str], given: &str, environment: &[(&str, &str)]) -> Result<String, String> {
    let converter = Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib/settings_to_sql.py");
    let mut child = Command::new("python3")
        .arg(converter)
        .args(arguments)
        .envs(environment.iter().copied())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("python3 runs");
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(given.as_bytes()).expect("it reads");
    drop(stdin);
    let output = child.wait_with_output().expect("it ends");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    match output.status.success() {
        true => Ok(text(output.stdout)),
        false => Err(text(output.stderr)),
    }
}

#[track_caller]
fn run(pg: &Postgres, script: &str) {
    let ran = pg.run("psql", &["-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", "-"], script);
    assert!(ran.ok, "{script}\n{}", ran.stderr);
}

const DJANGO: &str = r#"{
    "OUTBOX_PUBLISHERS": {
        "kafka": {"BACKEND": "some.Kafka\n; drop table outbox.events"},
        "it's \"main\"": {"BACKEND": "django_broadcaster.backends.RedisStreamBackend",
            "OPTIONS": {"host": "redis.internal", "port": "6380", "db": 2, "password": "s3'cret", "stream_name": "users", "max_len": null, "socket_timeout": 2.5,
                "ssl\n; drop table outbox.events": true}},
        "plain": {"BACKEND": "django_broadcaster.backends.RedisStreamBackend"},
        "odd": {"BACKEND": "django_broadcaster.backends.RedisStreamBackend", "OPTIONS": {"port": 0, "max_len": 0, "connect_timeout": null}}
    },
    "OUTBOX_WORKER": {"BATCH_SIZE": 200, "SLEEP_TIME": 2, "MAX_RETRIES": 4, "RETRY_BACKOFF": false, "THREADS": 2},
    "OUTBOX_RETENTION": {"CLEANUP_PUBLISHED": false, "PUBLISHED_RETENTION_DAYS": null, "FAILED_RETENTION_DAYS": 1.5}
}"#;

#[test]
fn settings_of_django_broadcaster_become_sql_that_runs() {
    let pg = Postgres::start();
    pg.extension();
    let script = convert(&["django", "-"], DJANGO, &[]).expect("it converts");
    assert!(!script.contains("s3"), "{script}");
    for words in [
        "-- NOT CONVERTED: its BACKEND is 'some.Kafka\\n; drop table outbox.events'. outbox_relay writes only to Redis Streams.",
        "-- It has a password. After this script, set it by this command, which shows it in no log and no history:",
        "contrib/set_backend_password.sql",
        "-- CHECK: with max_len 0, django-broadcaster removes every entry.",
        "['port'] is 0, but must be from 1 to 65535 here.",
        "['connect_timeout'] is None, which means no limit. Here there is always a limit, and the default is kept.",
        "-- OUTBOX_WORKER['THREADS'] has no equivalent.",
    ] {
        assert!(script.contains(words), "{words} is not in\n{script}");
    }
    run(&pg, &script);
    let rows: String = pg.one(
        "select string_agg(concat_ws(' ', name, host, port, db, stream_name, max_len, connect_timeout, socket_timeout), E'\\n' order by number) from outbox.backends",
    );
    assert_eq!(
        rows,
        "it's \"main\" redis.internal 6380 2 users 0 00:00:05 00:00:02.5\n\
         plain localhost 6379 0 events 10000 00:00:05 00:00:05\n\
         odd localhost 0 events 0 00:00:05"
    );
    let settings: String = pg.one(
        "select string_agg(substr(name, 14) || '=' || setting, ' ' order by name) from pg_file_settings where name like 'outbox_relay.%' and sourcefile like '%auto.conf'",
    );
    assert_eq!(
        settings,
        "batch_size=200 cleanup_published=off default_backend=it's \"main\" failed_retention=2160min max_retries=4 poll_interval=2s \
         published_retention=-1 retry_backoff=off"
    );
    let refused: i64 = pg.one("select count(*) from pg_file_settings where error is not null");
    assert_eq!(refused, 0);
    // Running it twice changes nothing; and with passwords, if they are asked for.
    let script = convert(&["django", "-", "--passwords"], DJANGO, &[]).expect("it converts");
    run(&pg, &script.replace("delete from", "-- delete from"));
    assert_eq!(pg.one::<i64>("select count(*) from outbox.backends"), 3);
    assert_eq!(pg.one::<i64>("select count(*) from outbox.backend_passwords"), 1);
}

#[test]
fn sinks_of_sequin_become_sql_that_runs() {
    let pg = Postgres::start();
    pg.extension();
    let sinks = include_str!("../moving/sequin.yaml");
    // With PyYAML, if it is installed, and without.
    let without = env::server_dir("yaml");
    std::fs::write(without.path().join("yaml.py"), "raise ImportError").expect("it can be written");
    let path = without.path().display().to_string();
    let variables = [("REDIS_HOST", "from.environment"), ("PYTHONPATH", path.as_str())];
    let script = convert(&["sequin", "-"], sinks, &variables).expect("it converts");
    assert_eq!(
        convert(&["sequin", "-"], sinks, &variables[..1]).expect("it converts"),
        script
    );
    assert!(!script.contains("s3cret"), "{script}");
    for words in [
        "-- CHECK: its transform 'my-transform' is a function of Sequin and is not converted.",
        "-- Its 'annotations' has no equivalent.",
        "-- NOT CONVERTED: its destination is 'webhook'.",
        "select outbox.attach_table('public.users', backend => 'user-changes', operations => 'insert,update', payload => 'both');",
        "select outbox.attach_table('public.\"Weird Name\"', backend => 'user-changes', ",
        r#"condition => '"status" in (''paid'', ''it''''s'') and "metadata" #>> array[''type'', ''name''] = ''premium'' and "a" is null');"#,
    ] {
        assert!(script.contains(words), "{words} is not in\n{script}");
    }
    assert!(
        script.contains("-- CHECK: 'orders' was attached for the sink 'paid orders' above."),
        "{script}"
    );
    pg.exec(
        "create table users (id int primary key); create table \"Weird Name\" (id int primary key);
        create table orders (id int primary key, status text, metadata jsonb, a int)",
    );
    run(&pg, &script);
    let rows: String = pg.one(
        "select string_agg(concat_ws(' ', name, enabled, host, port, db, username, tls, stream_name, max_len), E'\\n' order by number) from outbox.backends where name <> 'default'",
    );
    assert_eq!(
        rows,
        "user-changes t from.environment 6380 2 relay t users 0\npaid orders f localhost 6379 0 f orders 0\nagain t localhost 6379 0 f again 0"
    );
    // YAML that its own reader does not support is refused.
    for unknown in [
        "sinks: &all []",
        "sinks:\n  - a\n c: 1",
        "sinks: [1",
        "sinks: {a: 1}",
        "sinks:\n  - name: a\n    actions:\n      - - insert",
        "sinks:\n  - na\"me: a",
        "nothing",
    ] {
        let said = convert(&["sequin", "-"], unknown, &variables).expect_err("it is refused");
        assert!(said.starts_with("settings_to_sql.py: "), "{said}");
    }
}

/// Without a backend to go to, events of the application would be refused.
#[test]
fn the_default_backend_stays_if_no_other_is_converted() {
    let pg = Postgres::with(&[("outbox_relay.enabled", "off")]).start();
    pg.extension();
    let long = "x".repeat(64);
    let redis = r#"{"BACKEND": "django_broadcaster.backends.RedisStreamBackend"}"#;
    for (publishers, backends, default) in [
        (r#""kafka": {"BACKEND": "some.Kafka"}"#.to_owned(), "default", None),
        (format!(r#""{long}": {redis}"#), "default", None),
        (format!(r#""{long}": {redis}, "main": {redis}"#), "main", Some("main")),
    ] {
        let given = format!(r#"{{"OUTBOX_PUBLISHERS": {{{publishers}}}}}"#);
        let script = convert(&["django", "-"], &given, &[]).expect("it converts");
        run(&pg, &script);
        assert_eq!(
            pg.one::<String>("select string_agg(name, ' ') from outbox.backends"),
            backends
        );
        let set = "select max(setting) from pg_file_settings where name = 'outbox_relay.default_backend'";
        assert_eq!(pg.one::<Option<String>>(set).as_deref(), default, "{script}");
    }
}

/// A converted filter selects the rows that Sequin would select, and fails no statement of the application.
#[test]
fn filters_of_sequin_select_the_same_rows() {
    let pg = Postgres::with(&[("outbox_relay.enabled", "off")]).start();
    pg.extension();
    pg.exec("create table people (id int primary key, \"user\" text, \"Group\" int, info jsonb)");
    let rows = r#"(1, 'ann', 1, '{"age": 40, "a,b": "x"}'), (2, 'bob', 2, '{"age": "old"}'), (3, null, null, null), (4, 'cid', 3, '{"age": 7, "vip": true}')"#;
    for (filter, expected) in [
        ("column_name: user, operator: '=', comparison_value: ann", "1"),
        ("column_name: user, operator: '!=', comparison_value: ann", "2 3 4"),
        (
            "column_name: user, operator: not in, comparison_value: [ann, bob]",
            "3 4",
        ),
        ("column_name: user, operator: IS NOT NULL", "1 2 4"),
        ("column_name: Group, operator: '>=', comparison_value: 2", "2 4"),
        (
            "column_name: info, field_path: age, field_type: number, operator: '>', comparison_value: 9",
            "1",
        ),
        (
            "column_name: info, field_path: age, field_type: number, operator: '!=', comparison_value: 7",
            "1 2 3",
        ),
        (
            "column_name: info, field_path: age, field_type: number, operator: in, comparison_value: [7, 40]",
            "1 4",
        ),
        (
            "column_name: info, field_path: 'a,b', operator: '=', comparison_value: x",
            "1",
        ),
        (
            "column_name: info, field_path: vip, field_type: boolean, operator: '=', comparison_value: true",
            "4",
        ),
        ("column_name: info, field_path: vip, operator: is null", "1 2 3"),
        // These have no equivalent.
        ("column_name: user, operator: '=', comparison_value: null", "1 2 3 4"),
        ("column_name: user, operator: in, comparison_value: []", "1 2 3 4"),
        (
            "column_name: user, operator: like, comparison_value: 2026-01-31",
            "1 2 3 4",
        ),
        ("operator: '=', comparison_value: x", "1 2 3 4"),
    ] {
        let sinks = format!(
            "sinks:\n- name: people\n  table: people\n  destination: {{type: redis_stream, host: localhost}}\n  filters:\n    - {{{filter}}}\n"
        );
        let script = convert(&["sequin", "-"], &sinks, &[]).expect("it converts");
        let is_left_out = script.contains("ALL rows become events");
        assert_eq!(is_left_out, expected == "1 2 3 4", "{script}");
        run(&pg, &script);
        run(
            &pg,
            &format!(
                "insert into people values {rows}; delete from outbox.events where event_type <> 'people.insert'; delete from people"
            ),
        );
        let taken = "select coalesce(string_agg(subject, ' ' order by seq), '') from outbox.events where event_type = 'people.insert'";
        assert_eq!(pg.one::<String>(taken), expected, "{script}");
        pg.exec("delete from outbox.events");
    }
}

#[test]
fn settings_that_cannot_be_read_are_reported_in_one_line() {
    for (arguments, given, words) in [
        (
            ["django", "-"],
            "{}",
            "- has none of OUTBOX_PUBLISHERS, OUTBOX_WORKER, OUTBOX_RETENTION",
        ),
        (["django", "-"], "[1]", "expected an object with the keys"),
        (["django", "-"], "{", "Expecting property name"),
        (
            ["django", "-"],
            r#"{"OUTBOX_WORKER": [1]}"#,
            "OUTBOX_WORKER is not a dictionary",
        ),
        (
            ["django", "-"],
            r#"{"OUTBOX_PUBLISHERS": {"a": {"BACKEND": "django_broadcaster.backends.RedisStreamBackend", "OPTIONS": [1]}}}"#,
            "OUTBOX_PUBLISHERS['a']['OPTIONS'] is not a dictionary",
        ),
        (["sequin", "-"], "sinks: [users]", "a sink is not a dictionary"),
        (
            ["sequin", "-"],
            "sinks: [{name: a, destination: redis}]",
            "destination is not a dictionary",
        ),
        (["django", "no.such.module"], "", "No module named"),
        (["sequin", "/nowhere.yaml"], "", "No such file"),
    ] {
        let said = convert(&arguments, given, &[]).expect_err("it is refused");
        assert!(said.contains(words) && said.lines().count() == 1, "{said}");
    }
}

/// Ordinary settings modules look up their environment, and fail in their own ways where it is not set.
#[test]
fn a_settings_module_that_fails_is_reported_in_one_line() {
    let dir = env::server_dir("settings");
    let redis = "OUTBOX_PUBLISHERS = {'main': {'BACKEND': 'django_broadcaster.backends.RedisStreamBackend', 'OPTIONS': {'host': HOST}}}";
    for (name, text, words) in [
        (
            "key",
            "import os\nos.environ['NOT_SET_ANYWHERE']",
            "cannot be loaded: KeyError: 'NOT_SET_ANYWHERE'",
        ),
        (
            "own",
            "class ImproperlyConfigured(Exception): pass\nraise ImproperlyConfigured('set it')",
            "cannot be loaded: ImproperlyConfigured: set it",
        ),
        ("syntax", "OUTBOX_PUBLISHERS = {", "cannot be loaded: SyntaxError: "),
        ("relative", "from .base import *", "cannot be loaded: ImportError: "),
    ] {
        let path = dir.path().join(format!("{name}.py"));
        std::fs::write(&path, text).expect("it can be written");
        let said = convert(&["django", path.to_str().expect("UTF-8")], "", &[]).expect_err("it is refused");
        assert!(said.contains(words) && said.lines().count() == 1, "{said}");
    }
    let path = dir.path().join("good.py");
    let nested =
        format!("import os\nHOST = os.environ.get('NOT_SET_ANYWHERE', os.environ.get('A_HOST', 'x'))\n{redis}\n");
    std::fs::write(&path, nested).expect("it can be written");
    let script = convert(
        &["django", path.to_str().expect("UTF-8")],
        "",
        &[("A_HOST", "redis.internal")],
    )
    .expect("it converts");
    assert!(script.contains("'redis.internal'"), "{script}");
}

#[test]
fn an_own_backend_of_django_broadcaster_is_not_taken_for_another_broker() {
    let given = r#"{"OUTBOX_PUBLISHERS": {"tls": {"BACKEND": "shop.TlsRedisBackend", "OPTIONS": {"host": "rediss://redis.internal:6380/0"}},
        "url": {"BACKEND": "django_broadcaster.backends.RedisStreamBackend", "OPTIONS": {"host": "rediss://redis.internal:6380/0"}}}}"#;
    let script = convert(&["django", "-"], given, &[]).expect("it converts");
    for words in [
        "If that is a RedisStreamBackend of your own, name django_broadcaster.backends.RedisStreamBackend instead, and convert again.",
        "-- CHECK: the host 'rediss://redis.internal:6380/0' is a URL. Set host, port, db, username and tls of the backend from it.",
    ] {
        assert!(script.contains(words), "{words} is not in\n{script}");
    }
}

fn sink(destination: &str) -> String {
    format!("sinks:\n- name: s\n  database: db\n  table: t\n  destination: {{type: redis_stream, {destination}}}\n")
}

/// What would change where events go, or how they are protected, is not left out silently.
#[test]
fn what_a_sink_of_sequin_lacks_or_has_besides_is_named() {
    for (destination, words) in [
        (
            "stream_key: s",
            "-- CHECK: its destination has no host: outbox_relay.redis_host is used.",
        ),
        (
            "host: h",
            "-- CHECK: its destination has no stream_key: events go to the stream outbox_relay.redis_stream_name.",
        ),
        (
            "host: h, stream_key: s, url: 'rediss://h'",
            "-- CHECK: its destination's 'url' is not converted.",
        ),
        (
            "host: 'rediss://h', stream_key: s",
            "-- CHECK: the host 'rediss://h' is a URL.",
        ),
        (
            "host: h, stream_key: s, tls: 'maybe'",
            "-- CHECK: tls is 'maybe', but must be true or false. It is taken for true.",
        ),
        (
            "host: '${NO_SUCH_HOST}', stream_key: s",
            "-- CHECK: these environment variables are not set: NO_SUCH_HOST.",
        ),
    ] {
        let script = convert(&["sequin", "-"], &sink(destination), &[]).expect("it converts");
        assert!(script.contains(words), "{words} is not in\n{script}");
    }
    for (tls, expected) in [
        ("true", true),
        ("'1'", true),
        ("'true'", true),
        ("True", true),
        ("false", false),
        ("'0'", false),
        ("''", false),
    ] {
        let script = convert(
            &["sequin", "-"],
            &sink(&format!("host: h, stream_key: s, tls: {tls}")),
            &[],
        )
        .expect("it converts");
        assert_eq!(script.contains("tls = excluded.tls"), expected, "{tls}: {script}");
        assert!(!script.contains("CHECK"), "{script}");
    }
}

#[test]
fn variables_in_a_configuration_of_sequin_are_replaced_as_it_does() {
    let variables = [("A_HOST", "first"), ("EMPTY", "")];
    for (given, expected) in [
        ("${A_HOST}", "first"),
        ("${A_HOST:-other}", "first"),
        ("${NOT_SET_1:-other}", "other"),
        ("${NOT_SET_1-other}", "other"),
        ("${EMPTY:-other}", "other"),
        ("${NOT_SET_1:-${A_HOST}}", "first"),
        ("${NOT_SET_1:-${NOT_SET_2:-other}}", "other"),
        ("a-${A_HOST}-${NOT_SET_1:-b}", "a-first-b"),
    ] {
        let script = convert(
            &["sequin", "-"],
            &sink(&format!("host: \"{given}\", stream_key: s")),
            &variables,
        )
        .expect("it converts");
        assert!(script.contains(&format!("'{expected}', 6379")), "{given}: {script}");
        assert!(!script.contains("CHECK"), "{script}");
    }
}

/// Each table is attached in its own database.
#[test]
fn sinks_of_several_databases_run_in_each_of_them() {
    let pg = Postgres::with(&[("outbox_relay.enabled", "off")]).start();
    let sinks = r#"
databases:
  - {name: shop, database: "Shop one"}
  - {name: crm, database: crm}
sinks:
  - {name: orders, database: shop, table: orders, destination: {type: redis_stream, host: h, stream_key: orders}}
  - {name: people, database: crm, table: people, destination: {type: redis_stream, host: h, stream_key: people}}
  - {name: bills, database: shop, table: bills, destination: {type: redis_stream, host: h, stream_key: bills}}
"#;
    pg.exec("create database \"Shop one\"");
    pg.exec("create database crm");
    for (database, tables) in [("Shop one", &["orders", "bills"][..]), ("crm", &["people"])] {
        pg.exec_db(database, "create extension outbox_relay");
        for table in tables {
            pg.exec_db(database, &format!("create table {table} (id int primary key)"));
        }
    }
    let script = convert(&["sequin", "-"], sinks, &[]).expect("it converts");
    run(&pg, &script);
    let attached = |database: &str| {
        let sql = "select string_agg(relation::text, ', ' order by relation::text) from outbox.attached_tables
            where exists (select from outbox.backends b where b.name = relation::text)";
        pg.one_db::<Option<String>>(database, sql)
    };
    assert_eq!(attached("Shop one").as_deref(), Some("bills, orders"));
    assert_eq!(attached("crm").as_deref(), Some("people"));
}
