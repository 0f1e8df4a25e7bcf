//! Statements that need a database without other sessions: its worker leaves only for the statements that are allowed,
//! and is back at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kit::{Postgres, Redis, Refused, env, eventually, ids, process, promptly, publish_many, wait_until};

/// A database with the extension, whose events go to the stream of its name.
#[track_caller]
fn database(pg: &Postgres, redis: &Redis, name: &str) -> i32 {
    pg.exec(&format!("create database {name}"));
    pg.exec_db(name, "create extension outbox_relay");
    let port = redis.port();
    pg.exec_db(
        name,
        &format!("update outbox.backends set host = '127.0.0.1', port = {port}, stream_name = '{name}'"),
    );
    pg.wait_worker(name)
}

/// Each event arrives within a second of its commit.
#[track_caller]
fn assert_prompt(pg: &Postgres, redis: &Redis, name: &str, count: usize) {
    let mut client = pg.client_db(name);
    for _ in 0..count {
        let before = redis.xlen(name);
        let start = Instant::now();
        publish_many(&mut client, "default", "", "event", 1);
        eventually("the event", Duration::from_secs(5), || {
            (redis.xlen(name) > before).then_some(())
        });
        let took = start.elapsed();
        assert!(took < Duration::from_secs(1), "an event took {took:?}");
    }
}

/// A role that may not run the statement does not disturb the relay, however often it tries.
#[test]
fn a_statement_that_is_not_allowed_disturbs_no_worker() {
    let pg = Postgres::start();
    let redis = Redis::start();
    let _space = pg.make_tablespace("elsewhere");
    let worker = database(&pg, &redis, "app");
    pg.exec("create role nobody login; create role maker login createdb");
    for (role, statement, code) in [
        ("nobody", "drop database app", "42501"),
        ("nobody", "drop database app with (force)", "42501"),
        ("nobody", "alter database app rename to other", "42501"),
        ("nobody", "alter database app set tablespace elsewhere", "42501"),
        ("nobody", "create database copy template app", "42501"),
        ("maker", "create database copy template app", "42501"),
        ("maker", "alter database app rename to other", "42501"),
    ] {
        let stop = Arc::new(AtomicBool::new(false));
        let loops: Vec<_> = (0..2)
            .map(|_| {
                let (mut client, stop) = (pg.client_as(role, "postgres"), stop.clone());
                thread::spawn(move || {
                    let mut count = 0;
                    while !stop.load(Ordering::Relaxed) {
                        // Another statement of its kind may hold the database's lock for the moment.
                        assert_eq!(Refused::of(client.batch_execute(statement)).code, code, "{statement}");
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        let before = redis.xlen("app");
        // Sessions that begin meanwhile wait for the loops' locks; this session has begun before.
        let mut publisher = pg.client_db("app");
        for n in 1..=50 {
            let start = Instant::now();
            publish_many(&mut publisher, "default", "", "event", 1);
            wait_until("the event", || redis.xlen("app") >= before + n);
            let took = start.elapsed();
            assert!(took < Duration::from_secs(1), "{statement}: an event took {took:?}");
        }
        stop.store(true, Ordering::Relaxed);
        let tried: i32 = loops.into_iter().map(|l| l.join().unwrap()).sum();
        assert!(tried > 20, "{statement} was tried {tried} times");
        assert_eq!(pg.worker_pid("app"), Some(worker), "{statement}");
    }
    pg.exec("drop tablespace elsewhere");
}

/// Another session is in the database: the statement fails after the five seconds that Postgres waits, and the worker
/// is back at once. With another library's hooks before and after the relay's, in sessions that go on.
#[test]
fn after_a_statement_that_failed_the_worker_is_back_at_once() {
    if env::lacks(&["pg_stat_statements"]) {
        return;
    }
    for libraries in ["outbox_relay, pg_stat_statements", "pg_stat_statements, outbox_relay"] {
        let pg = Postgres::with(&[("shared_preload_libraries", libraries)]).start();
        let redis = Redis::start();
        database(&pg, &redis, "app");
        let mut occupant = pg.client_db("app");
        occupant.batch_execute("select 1").unwrap();
        let mut client = pg.client();
        // Postgres waits for five seconds each time.
        let statements: &[&str] = match libraries.starts_with("outbox") {
            true => &["alter database app rename to other"],
            false => &["create database copy template app", "drop database app"],
        };
        for statement in statements {
            assert_eq!(
                Refused::of(client.batch_execute(statement)).code,
                "55006",
                "{statement}"
            );
            let failed = Instant::now();
            eventually("a worker", Duration::from_secs(5), || pg.worker_pid("app"));
            let before = redis.xlen("app");
            publish_many(&mut occupant, "default", "", "event", 1);
            wait_until("the event", || redis.xlen("app") > before);
            let took = failed.elapsed();
            assert!(
                took < Duration::from_millis(1_500),
                "{libraries}: {statement}: back after {took:?}"
            );
        }
        for word in ["PANIC", "reinitializing"] {
            assert!(!pg.log().contains(word), "{word} in the log");
        }
    }
}

/// The owner of a database is no superuser, and may not terminate a superuser's process; the worker leaves by itself.
#[test]
fn an_owner_without_other_rights_drops_renames_and_copies_its_database() {
    let pg = Postgres::start();
    let redis = Redis::start();
    pg.exec("create role tenant login createdb");
    for statement in ["drop database app", "drop database app with (force)"] {
        let worker = database(&pg, &redis, "app");
        pg.exec("alter database app owner to tenant");
        let mut client = pg.client_as("tenant", "postgres");
        client.batch_execute("alter database app rename to other").unwrap();
        client.batch_execute("alter database other rename to app").unwrap();
        client.batch_execute("create database copy template app").unwrap();
        let worker = eventually("a worker", Duration::from_secs(5), || {
            pg.worker_pid("app").filter(|pid| *pid != worker)
        });
        let start = Instant::now();
        client.batch_execute(statement).unwrap();
        let took = start.elapsed();
        assert!(took < Duration::from_secs(2), "{statement} took {took:?}");
        assert!(process::title(worker).is_empty(), "{statement}");
        promptly(&pg, "drop database copy");
    }
}

/// Repeatedly, with events in between.
#[test]
fn repeated_renaming_takes_only_moments() {
    let pg = Postgres::start();
    let redis = Redis::start();
    database(&pg, &redis, "app");
    for _ in 0..5 {
        for (from, to) in [("app", "other"), ("other", "app")] {
            promptly(&pg, &format!("alter database {from} rename to {to}"));
            let before = redis.xlen("app");
            let published = publish_many(&mut pg.client_db(to), "default", "", "event", 2);
            let start = Instant::now();
            let entries = redis.wait_entries("app", before + 2);
            let took = start.elapsed();
            assert_eq!(ids(&entries)[before..], published);
            assert!(took < Duration::from_secs(2), "the events took {took:?}");
        }
    }
    assert_prompt(&pg, &redis, "app", 5);
}
