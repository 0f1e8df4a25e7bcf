//! Each database with the extension has a worker, other databases cost no process, and no worker blocks statements that
//! need a database without other sessions.

use kit::{
    BlackHole, Ledger, Mode, Postgres, Redis, Refused, Stack, ids, promptly, publish_many, wait_drained, wait_eq,
    wait_until,
};
use uuid::Uuid;

/// The databases that have a worker, in the order of their names.
fn served(pg: &Postgres) -> Vec<String> {
    pg.one(
        // From 18 on a process that is starting has no database yet.
        "select coalesce(array_agg(datname::text order by datname), '{}') from pg_stat_activity \
         where backend_type = 'outbox_relay worker' and datname is not null",
    )
}

#[track_caller]
fn wait_served(pg: &Postgres, names: &[&str]) {
    let expected: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    wait_eq("served databases", expected, || served(pg));
}

/// A database with the extension, whose events go to the stream of its name.
#[track_caller]
fn database(pg: &Postgres, redis: &Redis, name: &str) {
    pg.exec(&format!("create database {name}"));
    pg.exec_db(name, "create extension outbox_relay");
    configure(pg, redis, name);
}

#[track_caller]
fn configure(pg: &Postgres, redis: &Redis, name: &str) {
    let port = redis.port();
    pg.exec_db(
        name,
        &format!("update outbox.backends set host = '127.0.0.1', port = {port}, stream_name = '{name}'"),
    );
}

#[track_caller]
fn publish(pg: &Postgres, database: &str, count: i32) -> Vec<Uuid> {
    publish_many(&mut pg.client_db(database), "default", "", "event", count)
}

#[track_caller]
fn wait_delivered(pg: &Postgres, database: &str) {
    wait_eq("pending", 0, || {
        pg.one_db::<i64>(database, "select pending from outbox.status")
    });
}

#[test]
fn each_database_with_the_extension_has_a_worker_and_no_other_has() {
    let mut pg = Postgres::start();
    let redis = Redis::start();
    for name in ["one", "two", "three"] {
        database(&pg, &redis, name);
    }
    pg.exec("create database without");
    for start in 0..2 {
        wait_served(&pg, &["one", "three", "two"]);
        for name in ["one", "two", "three"] {
            let published = publish(&pg, name, 2);
            let entries = redis.wait_entries(name, 2 * start + 2);
            assert_eq!(ids(&entries)[2 * start..], published, "of {name}");
        }
        if start == 0 {
            pg.restart();
        }
    }
    let refused = Refused::of(
        pg.client_db("without")
            .execute("select outbox.publish_event('a', 'b')", &[]),
    );
    assert_eq!(refused.code, "3F000");
}

/// CREATE DATABASE ... TEMPLATE of a database with the extension: its copy gets a worker, which sends nothing until
/// take_over(), and then only what was published in the copy. See `copies.rs`.
#[test]
fn a_copied_database_gets_a_worker_that_sends_what_is_its_own_once_it_is_told_to() {
    let pg = Postgres::start();
    let redis = Redis::start();
    database(&pg, &redis, "original");
    let sent = publish(&pg, "original", 3);
    redis.wait_entries("original", 3);
    wait_delivered(&pg, "original");
    pg.exec_db("original", "update outbox.backends set enabled = false");
    let pending = publish(&pg, "original", 3);

    promptly(&pg, "create database copy template original");
    wait_served(&pg, &["copy", "original"]);
    let after = publish(&pg, "copy", 2);
    for name in ["copy", "original"] {
        pg.exec_db(
            name,
            &format!("update outbox.backends set enabled = true, stream_name = '{name}'"),
        );
    }
    pg.exec_db("copy", "select outbox.take_over('default')");
    assert_eq!(ids(&redis.wait_entries("original", 6)), [sent, pending].concat());
    assert_eq!(ids(&redis.wait_entries("copy", 2)), after);
    for name in ["copy", "original"] {
        wait_delivered(&pg, name);
    }
    assert_eq!((redis.xlen("original"), redis.xlen("copy")), (6, 2));
}

#[test]
fn a_database_is_dropped_as_if_there_were_no_worker() {
    let pg = Postgres::start();
    let redis = Redis::start();
    let hole = BlackHole::start();
    for (name, force, port) in [
        ("idle", "", redis.port()),
        ("forced", " with (force)", redis.port()),
        ("stuck", "", hole.port()),
    ] {
        database(&pg, &redis, name);
        pg.exec_db(name, &format!("update outbox.backends set port = {port}"));
        publish(&pg, name, 3);
        pg.wait_worker(name);
        promptly(&pg, &format!("drop database {name}{force}"));
        assert_eq!(pg.worker_pid(name), None);
        assert_eq!(
            pg.one::<i64>(&format!("select count(*) from pg_database where datname = '{name}'")),
            0
        );
    }
    // Also while it works at full speed.
    database(&pg, &redis, "busy");
    publish(&pg, "busy", 20_000);
    promptly(&pg, "drop database busy");
    assert_eq!(served(&pg), Vec::<String>::new());
}

#[test]
fn a_database_whose_dropping_failed_keeps_its_worker() {
    let pg = Postgres::start();
    let redis = Redis::start();
    database(&pg, &redis, "kept");
    pg.wait_worker("kept");
    let mut occupant = pg.client_db("kept");
    let refused = Refused::of(pg.client().batch_execute("drop database kept"));
    assert_eq!(refused.code, "55006");
    assert_eq!(
        refused.detail.as_deref(),
        Some("There is 1 other session using the database.")
    );
    let published = publish_many(&mut occupant, "default", "", "event", 3);
    assert_eq!(ids(&redis.wait_entries("kept", 3)), published);
    pg.wait_worker("kept");
}

#[test]
fn a_database_is_renamed_moved_and_copied_as_if_there_were_no_worker() {
    let pg = Postgres::start();
    let redis = Redis::start();
    let _space = pg.make_tablespace("elsewhere");
    database(&pg, &redis, "old");
    let mut published = publish(&pg, "old", 2);
    pg.wait_worker("old");
    // Afterwards the backend has another stream.
    redis.wait_entries("old", 2);

    promptly(&pg, "alter database old rename to new");
    pg.wait_worker("new");
    configure(&pg, &redis, "new");
    published.truncate(0);
    published.extend(publish(&pg, "new", 2));
    assert_eq!(ids(&redis.wait_entries("new", 2)), published);

    promptly(&pg, "alter database new set tablespace elsewhere");
    published.extend(publish(&pg, "new", 2));
    assert_eq!(ids(&redis.wait_entries("new", 4)), published);
    pg.wait_worker("new");

    promptly(&pg, "create database twin template new");
    published.extend(publish(&pg, "new", 2));
    assert_eq!(ids(&redis.wait_entries("new", 6)), published);
    wait_served(&pg, &["new", "twin"]);

    promptly(&pg, "alter database new set tablespace pg_default");
    promptly(&pg, "drop database twin");
    promptly(&pg, "drop database new");
    pg.exec("drop tablespace elsewhere");
}

/// The session dies while the worker has left for it; only the launcher can start the worker again.
#[test]
fn a_session_that_dies_while_it_holds_a_database_gives_it_back() {
    let pg = Postgres::start();
    let redis = Redis::start();
    database(&pg, &redis, "held");
    let old = pg.wait_worker("held");
    // Another session in the database makes ALTER DATABASE wait for it (up to 5 s).
    let mut occupant = pg.client_db("held");
    let mut holder = pg.client();
    let pid: i32 = holder.query_one("select pg_backend_pid()", &[]).unwrap().get(0);
    let thread = std::thread::spawn(move || holder.batch_execute("alter database held rename to other"));
    wait_until("the worker to leave", || kit::process::title(old).is_empty());
    pg.exec(&format!("select pg_terminate_backend({pid})"));
    thread.join().unwrap().expect_err("it was terminated");
    let published = publish_many(&mut occupant, "default", "", "event", 3);
    assert_eq!(ids(&redis.wait_entries("held", 3)), published);
}

/// One process for the launcher, one for a worker; the second database waits until the first needs none.
#[test]
fn without_a_free_process_the_launcher_says_so_and_goes_on_trying() {
    let pg = Postgres::with(&[("max_worker_processes", "2"), ("max_logical_replication_workers", "0")]).start();
    let redis = Redis::start();
    database(&pg, &redis, "first");
    pg.wait_worker("first");
    database(&pg, &redis, "second");
    let waiting = publish(&pg, "second", 2);
    pg.wait_log("too few background worker processes for outbox_relay");
    wait_until("the database in the log", || {
        let log = pg.log();
        let detail = log
            .lines()
            .rfind(|line| line.contains("No worker could be started for "));
        detail.is_some_and(|line| line.contains("\"second\"") && !line.contains("\"first\""))
    });
    pg.wait_log(
        "Raise max_worker_processes: each database with the extension needs one, and the launcher needs one more.",
    );
    let published = publish(&pg, "first", 2);
    assert_eq!(ids(&redis.wait_entries("first", 2)), published);
    assert_eq!(served(&pg), ["first"]);
    pg.exec_db("first", "drop extension outbox_relay");
    assert_eq!(ids(&redis.wait_entries("second", 2)), waiting);
    assert_eq!(served(&pg), ["second"]);
    let said = pg.log().matches("too few background worker processes").count();
    assert!(said <= 3, "it said so {said} times");
}

/// Redis down for one, and a crash for all: no worker waits for another.
#[test]
fn the_workers_of_databases_are_independent() {
    let mut stack = Stack::start();
    let ledger = Ledger::create(&stack.pg);
    let hole = BlackHole::unreachable();
    database(&stack.pg, &stack.redis, "stuck");
    stack
        .pg
        .exec_db("stuck", &format!("update outbox.backends set port = {}", hole.port()));
    let waiting = publish(&stack.pg, "stuck", 5);
    stack.pg.wait_worker("stuck");
    stack.pg.exec("select publish_logged('k0') from generate_series(1, 20)");
    stack.wait_events(20);
    wait_drained(&stack.pg, "default");
    stack.pg.stop(Mode::Immediate);
    stack.pg.start_again();
    stack.pg.exec("select publish_logged('k0') from generate_series(1, 20)");
    ledger.settle(&stack, kit::LIMIT).assert_exactly_once();
    configure(&stack.pg, &stack.redis, "stuck");
    stack.redis.wait_entries("stuck", 5);
    wait_delivered(&stack.pg, "stuck");
    assert_eq!(ids(&stack.redis.entries("stuck")), waiting);
}

/// Whatever is set for a database or the superuser's role.
#[test]
fn settings_of_a_database_or_a_role_do_not_stop_its_relay() {
    let pg = Postgres::start();
    let redis = Redis::start();
    pg.exec("create role nobody");
    // Renamed in 16.
    let parallel = match kit::env::postgres_major() {
        15 => "force_parallel_mode = on",
        _ => "debug_parallel_query = on",
    };
    // Those that not all releases have.
    let later = [
        ("restrict_nonsystem_relation_kind", "'view, foreign-table'"),
        ("transaction_timeout", "'5ms'"),
        ("event_triggers", "off"),
    ];
    let exists = |name: &str| pg.one::<i64>(&format!("select count(*) from pg_settings where name = '{name}'")) == 1;
    let later: Vec<String> = later
        .iter()
        .filter(|(name, _)| exists(name))
        .map(|(name, value)| format!("{name} = {value}"))
        .collect();
    let later: Vec<&str> = later.iter().map(String::as_str).collect();
    let groups: [&[&str]; 4] = [
        &["session_authorization = 'nobody'"],
        &["role = 'nobody'", "search_path = 'nowhere'", "row_security = off"],
        &later,
        &[
            "statement_timeout = '1ms'",
            "lock_timeout = '1ms'",
            "idle_in_transaction_session_timeout = '1ms'",
            "default_transaction_read_only = on",
            "default_transaction_isolation = 'serializable'",
            "default_transaction_deferrable = on",
            "session_replication_role = 'local'",
            "standard_conforming_strings = off",
            "datestyle = 'German'",
            "intervalstyle = 'iso_8601'",
            "timezone = 'Asia/Kathmandu'",
            "bytea_output = 'escape'",
            "extra_float_digits = -15",
            "client_encoding = 'sjis'",
            "default_tablespace = 'nowhere'",
            "temp_tablespaces = 'nowhere'",
            parallel,
            "enable_indexscan = off",
            "idle_session_timeout = '1ms'",
            "local_preload_libraries = 'nowhere'",
        ],
    ];
    for (n, settings) in groups.iter().enumerate() {
        let name = format!("set{n}");
        database(&pg, &redis, &name);
        let worker = pg.wait_worker(&name);
        // Sessions that begin later have the settings, too.
        let (mut publisher, mut other) = (pg.client_db(&name), pg.client_db("template1"));
        for setting in *settings {
            for whose in [format!("database {name}"), "role postgres".to_string()] {
                let set = format!("alter {whose} set {setting}");
                other.batch_execute(&set).unwrap_or_else(|e| panic!("{set}: {e:?}"));
            }
        }
        other
            .execute("select pg_terminate_backend($1)", &[&worker])
            .expect("a session that was there before");
        wait_until("another worker", || {
            let found = other.query_opt(
                "select pid from pg_stat_activity where backend_type = 'outbox_relay worker' and datname = $1 and pid <> $2",
                &[&name, &worker],
            );
            found.expect("it reads").is_some()
        });
        let published = publish_many(&mut publisher, "default", "", "event", 3);
        assert_eq!(ids(&redis.wait_entries(&name, 3)), published, "{settings:?}");
        publisher.batch_execute("alter role postgres reset all").unwrap();
    }
}

/// With `exit_on_error` each ERROR ends its session. Those of a worker are often: it waits for no lock for long.
#[test]
fn a_database_in_which_errors_end_sessions_keeps_its_worker() {
    let pg = Postgres::start();
    let redis = Redis::start();
    database(&pg, &redis, "strict");
    let first = pg.wait_worker("strict");
    let mut session = pg.client_db("strict");
    pg.exec("alter database strict set exit_on_error = on");
    session
        .execute("select pg_terminate_backend($1)", &[&first])
        .expect("it ends");
    wait_until("another worker", || {
        pg.worker_pid("strict").is_some_and(|pid| pid != first)
    });
    let worker = pg.wait_worker("strict");
    let published = publish_many(&mut session, "default", "", "event", 3);
    redis.wait_entries("strict", 3);
    let mark = pg.log().len();
    session
        .batch_execute("begin; lock table outbox.cursors; select pg_sleep(2); commit")
        .expect("it is locked");
    pg.wait_log_after(mark, "canceling statement due to lock timeout");
    assert_eq!(pg.worker_pid("strict"), Some(worker), "{}", pg.log());
    assert_eq!(ids(&redis.entries("strict")), published);
}
