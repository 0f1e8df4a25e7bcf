//! Many databases: those with the extension get their workers quickly, those without cost one look, and the reason for
//! a wait is reported.

use std::time::{Duration, Instant};

use kit::{Mode, Postgres, Redis, env, eventually, holds_for, ids, publish_many, wait_eq, wait_until};

/// Logs which processes are started.
const TALKATIVE: (&str, &str) = ("log_min_messages", "debug1");

fn starts(pg: &Postgres, database: &str) -> usize {
    let line = format!("starting background worker process \"outbox_relay worker {database}");
    pg.log().matches(&line).count()
}

fn served(pg: &Postgres) -> i64 {
    pg.one("select count(*) from pg_stat_activity where backend_type = 'outbox_relay worker'")
}

fn state(pg: &Postgres, database: &str) -> String {
    pg.one_db(database, "select state from outbox.status")
}

#[track_caller]
fn wait_state(pg: &Postgres, database: &str, expected: &str) {
    wait_eq("the state", expected.to_string(), || state(pg, database));
}

#[track_caller]
fn with_extension(pg: &Postgres, names: &[String]) {
    for name in names {
        pg.exec(&format!("create database {name}"));
        pg.exec_db(name, "create extension outbox_relay");
    }
}

fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{prefix}{n}")).collect()
}

/// Nor does another database, or one that is dropped or renamed, cost more; the extension starts a worker all the same.
#[test]
fn a_database_without_the_extension_is_looked_at_once() {
    let pg = Postgres::with(&[TALKATIVE]).start();
    // CREATE DATABASE ends a worker that still looks at the template. The next look would be one too many.
    for name in ["template1", "postgres"] {
        wait_eq("looks", 1, || starts(&pg, name));
    }
    wait_eq("workers", 0, || served(&pg));
    let without = names("without", 3);
    for name in &without {
        pg.exec(&format!("create database {name}"));
        wait_eq("looks", 1, || starts(&pg, name));
    }
    wait_eq("workers", 0, || served(&pg));
    for n in 0..10 {
        pg.set("work_mem", &format!("{}MB", 4 + n));
        wait_until("the reload", || {
            pg.one::<String>("show work_mem") == format!("{}MB", 4 + n)
        });
    }
    pg.exec("alter database without1 rename to renamed");
    pg.exec("drop database renamed");
    pg.exec("create database another");
    wait_eq("looks", 1, || starts(&pg, "another"));
    if !env::lacks(&["hstore"]) {
        pg.exec_db("without2", "create extension hstore");
    }
    for name in ["without0", "without1", "template1", "postgres"] {
        assert_eq!(starts(&pg, name), 1, "{name}");
    }
    assert_eq!(starts(&pg, "without2"), 1);
    pg.exec_db("without2", "create extension outbox_relay");
    pg.wait_worker("without2");
    assert_eq!(starts(&pg, "without2"), 2);
    pg.set("outbox_relay.databases", "another");
    wait_eq("workers", 0, || served(&pg));
    pg.set("outbox_relay.databases", "*");
    pg.wait_worker("without2");
    assert_eq!(starts(&pg, "without0"), 1);
}

/// The state that an interrupted DROP DATABASE leaves: nobody can connect to the database, and no worker tries.
#[test]
fn an_invalid_database_is_left_alone() {
    let mut pg = Postgres::with(&[TALKATIVE]).start();
    pg.exec("create database broken");
    pg.exec("create database closed with allow_connections false");
    pg.exec("update pg_database set datconnlimit = -2 where datname = 'broken'");
    pg.stop(Mode::Fast);
    let looked = starts(&pg, "broken");
    pg.start_again();
    wait_until("a look into the others", || starts(&pg, "postgres") == 2);
    pg.reload();
    holds_for(Duration::from_secs(1), "nothing is started there", || {
        starts(&pg, "broken") == looked && starts(&pg, "closed") == 0
    });
    // Somebody makes it valid again.
    pg.exec("alter database closed with allow_connections true");
    wait_eq("looks", 1, || starts(&pg, "closed"));
}

/// Its directory is damaged: the attempts become rare, the log says so, and other databases are not affected.
#[test]
fn a_worker_that_cannot_start_is_tried_less_and_less() {
    let mut pg = Postgres::start();
    with_extension(&pg, &["damaged".to_string(), "sound".to_string()]);
    pg.wait_worker("damaged");
    let oid: u32 = pg.one("select oid from pg_database where datname = 'damaged'");
    pg.stop(Mode::Fast);
    let file = pg.data_dir().join(format!("base/{oid}/PG_VERSION"));
    let hidden = file.with_extension("hidden");
    std::fs::rename(&file, &hidden).unwrap();
    pg.start_again();
    let start = Instant::now();
    pg.wait_worker("sound");
    pg.wait_log("workers of outbox_relay end as soon as they are started");
    pg.wait_log("This happens in \"damaged\"");
    let wait = Duration::from_secs(6).saturating_sub(start.elapsed());
    holds_for(wait, "the other's worker", || pg.worker_pid("sound").is_some());
    let failed = pg.log().matches("is not a valid data directory").count();
    assert!((4..=9).contains(&failed), "{failed} attempts in six seconds");
    let said = pg.log().matches("end as soon as they are started").count();
    assert_eq!(said, 1);
    std::fs::rename(&hidden, &file).unwrap();
    eventually("a worker", Duration::from_secs(30), || pg.worker_pid("damaged"));
}

/// As many databases as there are processes.
#[test]
fn the_workers_of_many_databases_start_in_seconds() {
    const COUNT: usize = 30;
    let mut pg = Postgres::with(&[("max_worker_processes", "50")]).start();
    with_extension(&pg, &names("tenant", COUNT));
    wait_eq("workers", COUNT as i64, || served(&pg));
    pg.stop(Mode::Fast);
    let mark = pg.log().len();
    let start = Instant::now();
    pg.start_again();
    let took = eventually("all workers at work", Duration::from_secs(60), || {
        let log = pg.log();
        let at_work = log[mark..].matches("outbox_relay worker started in database").count();
        (at_work == COUNT).then(|| start.elapsed())
    });
    println!("{COUNT} workers were at work {took:?} after the server's start");
    // Starting two at once, and a second for each two, took 15 seconds.
    assert!(took < Duration::from_secs(8), "{took:?}");
}

#[test]
fn a_database_that_waits_for_a_process_says_so() {
    let mut pg = Postgres::with(&[("max_worker_processes", "3"), ("max_logical_replication_workers", "0")]).start();
    let redis = Redis::start();
    with_extension(&pg, &names("tenant", 3));
    for name in ["tenant0", "tenant1"] {
        wait_state(&pg, name, "running");
    }
    wait_state(&pg, "tenant2", "waiting for a background worker process");
    pg.wait_log("No worker could be started for \"tenant2\". The launcher tries again each second.");
    let port = redis.port();
    let point = format!("update outbox.backends set host = '127.0.0.1', port = {port}");
    pg.exec_db("tenant2", &point);
    let published = publish_many(&mut pg.client_db("tenant2"), "default", "", "event", 3);

    // After a restart nobody knows which databases have the extension; templates are not logged.
    pg.restart();
    pg.wait_log_after(0, "No worker could be started for ");
    wait_eq("workers", 2, || served(&pg));
    holds_for(Duration::from_secs(2), "no word of a template", || {
        !pg.log().contains("\"template1\"")
    });
    for name in ["tenant0", "tenant1", "tenant2"] {
        if state(&pg, name) == "running" {
            pg.exec_db(name, "drop extension outbox_relay");
            break;
        }
    }
    wait_eq("workers", 2, || served(&pg));
    if state(&pg, "tenant2") == "running" {
        assert_eq!(ids(&redis.wait_entries("events", 3)), published);
    }
}

/// With room for four, and one database more; and one after the other, with the extension or without.
#[test]
fn a_slot_is_free_again_when_its_database_has_gone() {
    let mut pg = Postgres::builder().faults().stopped();
    pg.mutation("few_database_slots");
    pg.start_again();
    for n in 0..6 {
        pg.exec(&format!("create database plain{n}"));
        with_extension(&pg, &[format!("tenant{n}")]);
        pg.wait_worker(&format!("tenant{n}"));
        pg.exec(&format!("drop database tenant{n}"));
    }
    let kept = names("kept", 5);
    with_extension(&pg, &kept);
    wait_eq("workers", 4, || served(&pg));
    wait_state(&pg, "kept4", "no slot in shared memory");
    pg.wait_log("too many databases for outbox_relay");
    pg.wait_log("No worker could be started for \"kept4\".");
    pg.exec("drop database kept0");
    wait_state(&pg, "kept4", "running");
}

/// CREATE EXTENSION of another extension that needs this one; and other statements that remove this one.
#[test]
fn the_extension_comes_and_goes_by_other_statements_too() {
    let pg = Postgres::start();
    let redis = Redis::start();
    let said: String = pg.one("select setting from pg_config where name = 'SHAREDIR'");
    let share = std::path::Path::new(&said).join("extension");
    let write = |name: &str, text: &str| std::fs::write(share.join(name), text).unwrap();
    write(
        "needs_outbox.control",
        "default_version = '1'\nrequires = 'outbox_relay'\nrelocatable = true\n",
    );
    write("needs_outbox--1.sql", "select 1;\n");
    let port = redis.port();
    for drop in [
        "drop extension outbox_relay cascade",
        "drop schema outbox cascade",
        "drop owned by administrator cascade",
    ] {
        pg.exec("drop role if exists administrator; create role administrator superuser login");
        let mut client = pg.client_as("administrator", "postgres");
        client.batch_execute("create extension needs_outbox cascade").unwrap();
        let worker = pg.wait_worker("postgres");
        client
            .batch_execute(&format!("update outbox.backends set host = '127.0.0.1', port = {port}"))
            .unwrap();
        let before = redis.xlen("events");
        let published = publish_many(&mut client, "default", "", "event", 2);
        assert_eq!(ids(&redis.wait_entries("events", before + 2))[before..], published);
        client.batch_execute(drop).unwrap();
        wait_until(drop, || kit::process::title(worker).is_empty());
        drop_role(&pg);
    }
}

fn drop_role(pg: &Postgres) {
    pg.exec("drop owned by administrator cascade; drop role administrator");
}

/// Dropped and created again in one transaction: the worker changes to the new extension at once.
#[test]
fn an_extension_that_is_made_anew_in_one_transaction_is_served_at_once() {
    let pg = Postgres::start();
    let redis = Redis::start();
    let port = redis.port();
    pg.extension();
    let point = format!("update outbox.backends set host = '127.0.0.1', port = {port}");
    pg.exec(&point);
    publish_many(&mut pg.client(), "default", "", "event", 3);
    redis.wait_entries("events", 3);
    for round in 1..=4 {
        let mut client = pg.client();
        let start = Instant::now();
        let anew = format!("begin; drop extension outbox_relay; create extension outbox_relay; {point}");
        client.batch_execute(&anew).unwrap();
        let published = publish_many(&mut client, "default", "", "event", 2);
        client.batch_execute("commit").unwrap();
        let more = publish_many(&mut client, "default", "", "event", 1);
        let entries = redis.wait_entries("events", 3 + round * 3);
        let took = start.elapsed();
        assert_eq!(ids(&entries)[round * 3..], [published, more].concat());
        assert!(took < Duration::from_secs(3), "it took {took:?}");
    }
}
