//! `outbox.health()`: settings and states of the server that keep events back. The hint, executed as it stands, mends
//! it.

use kit::{Postgres, QUICK, Redis, Stack, env, eventually, wait_drained, wait_eq, wait_until};
use std::io::Write;

use crate::health::{Check, NAMED_WITHIN, check, follow, health_of, quick, wait_ill, wait_well};

#[test]
fn settings_that_make_sessions_read_only_are_named() {
    let stack = quick();
    stack
        .pg
        .exec("create role app login; select outbox.grant_publisher('app'); create role reader login");
    for (sql, words) in [
        (
            "alter database postgres set default_transaction_read_only = on",
            "is on for database postgres: publishing fails.",
        ),
        // As somebody writes it.
        (
            "alter database postgres set default_transaction_read_only = 'TRU'",
            "is on for database postgres: publishing fails.",
        ),
        (
            "alter role app set default_transaction_read_only = on",
            "is on for role app: publishing fails.",
        ),
        (
            "alter role app in database postgres set default_transaction_read_only = on",
            "is on for role app in database postgres: publishing fails.",
        ),
        (
            "alter system set default_transaction_read_only = on",
            "default_transaction_read_only is on: publishing fails.",
        ),
    ] {
        stack.pg.exec(sql);
        stack.pg.reload();
        let ill = wait_ill(&stack.pg, "read-only sessions", words);
        follow(&stack.pg, "postgres", &ill);
        wait_well(&stack.pg, "read-only sessions");
        stack.publish("more");
        wait_drained(&stack.pg, "default");
    }
    // Who publishes nothing may read as it likes.
    stack
        .pg
        .exec("alter role reader set default_transaction_read_only = on");
    wait_well(&stack.pg, "read-only sessions");
}

#[test]
fn activities_that_are_not_tracked_are_named() {
    let stack = quick();
    for (sql, words) in [
        (
            "alter role postgres set track_activities = off",
            "is off for role postgres:",
        ),
        (
            "alter database postgres set track_activities = 'OF'",
            "is off for database postgres:",
        ),
        ("alter system set track_activities = off", "track_activities is off:"),
    ] {
        stack.pg.exec(sql);
        stack.pg.reload();
        let ill = wait_ill(&stack.pg, "activity", words);
        // Since when a table is locked is not known then.
        let mut holder = stack.pg.client();
        holder
            .batch_execute("begin; lock table outbox.events")
            .expect("the lock");
        wait_ill(
            &stack.pg,
            "locks",
            "has held AccessExclusiveLock on outbox.events: nobody can",
        );
        holder.batch_execute("commit").expect("the end");
        follow(&stack.pg, "postgres", &ill);
        wait_well(&stack.pg, "activity");
    }
}

#[test]
fn a_synchronous_standby_that_is_not_there_is_named() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    stack.pg.set("synchronous_standby_names", "gone");
    wait_ill(&stack.pg, "synchronous standbys", "No synchronous standby is connected");
    let config = stack.pg.config("postgres", "postgres");
    let publisher = std::thread::spawn(move || {
        let mut client = config.connect(postgres::NoTls).expect("a session");
        client
            .execute("select outbox.publish_event('two', 'kit')", &[])
            .expect("it publishes");
    });
    let ill = wait_ill(&stack.pg, "synchronous standbys", "1 sessions wait, since");
    assert_eq!(ill.status, "fail");
    follow(&stack.pg, "postgres", &ill);
    publisher.join().expect("it has committed");
    wait_well(&stack.pg, "synchronous standbys");
    stack.wait_events(2);
}

#[test]
fn a_line_that_keeps_the_configuration_from_being_read_is_named() {
    let stack = quick();
    let file = stack.pg.data_dir().join("postgresql.auto.conf");
    let before = std::fs::read_to_string(&file).expect("the file");
    for (line, words) in [
        ("outbox_relay.enabled = perhaps", "outbox_relay.enabled"),
        ("no such thing", "syntax error"),
    ] {
        let mut open = std::fs::OpenOptions::new().append(true).open(&file).expect("the file");
        writeln!(open, "{line}").expect("it is written");
        stack.pg.reload();
        let ill = wait_ill(&stack.pg, "configuration files", words);
        assert!(ill.detail.contains("postgresql.auto.conf, line "), "{ill:?}");
        std::fs::write(&file, &before).expect("it is written");
        follow(&stack.pg, "postgres", &ill);
        wait_well(&stack.pg, "configuration files");
    }
}

/// A role may have been given little memory, and no temporary files.
#[test]
fn a_role_without_memory_is_told_all_the_same() {
    let stack = Stack::start();
    stack.pg.exec("create role watcher login; grant pg_monitor to watcher");
    for setting in ["work_mem = '64kB'", "hash_mem_multiplier = 1", "temp_file_limit = 0"] {
        stack.pg.exec(&format!("alter role watcher set {setting}"));
    }
    let faults = || {
        let sql = "select string_agg(detail, ' ') from outbox.health() where detail like 'This cannot be looked at%'";
        let row = stack.pg.client_as("watcher", "postgres").query_one(sql, &[]);
        row.expect("it answers").get::<_, Option<String>>(0)
    };
    assert_eq!(faults(), None);
    // That it can fail (Postgres 18 needs less memory):
    stack.pg.exec("alter function outbox.health(interval) reset work_mem");
    let lacks = faults().is_some_and(|faults| faults.contains("temp_file_limit"));
    assert!(lacks || env::postgres_major() >= 18);
}

/// What VACUUM cannot remove is kept for somebody, who is named; transactions of other databases keep nothing here.
#[test]
fn dead_rows_are_named_with_what_keeps_them() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[("max_prepared_transactions", "5"), ("autovacuum", "off")]),
        Redis::start(),
    );
    stack.pg.exec("create database other");
    stack
        .pg
        .exec_db("other", "begin; create table t (); prepare transaction 'elsewhere'");
    let fill =
        "insert into outbox.inbox (consumer, event_id) select 'c', gen_random_uuid() from generate_series(1, 110000)";
    stack.pg.exec(fill);
    let old = || check(&health_of(&stack.pg, "postgres", "1 ms"), "bloat");
    let dead = || {
        eventually("dead rows to be named", NAMED_WITHIN, || {
            Some(old()).filter(|found| found.status == "warn")
        })
    };
    let mended = |ill: &Check| {
        follow(&stack.pg, "postgres", ill);
        wait_eq("bloat", "ok".to_owned(), || old().status);
        stack.pg.exec(fill);
    };
    // Kept for nobody.
    stack.pg.exec("delete from outbox.inbox");
    let ill = dead();
    assert!(!ill.detail.contains("may still see"), "{ill:?}");
    assert_eq!(ill.hint.as_deref(), Some("Run VACUUM outbox.inbox;"));
    mended(&ill);
    // For a session.
    let mut reader = stack.pg.client();
    reader
        .batch_execute("begin isolation level repeatable read; select from outbox.inbox limit 1")
        .expect("a snapshot");
    stack.pg.exec("delete from outbox.inbox");
    let ill = dead();
    let pid: i32 = reader
        .query_one("select pg_backend_pid()", &[])
        .expect("its pid")
        .get(0);
    assert!(
        ill.detail
            .contains(&format!("process {pid}, whose transaction is open since")),
        "{ill:?}"
    );
    mended(&ill);
    // For a prepared transaction.
    stack
        .pg
        .exec("begin; create table t (); prepare transaction 'here'; delete from outbox.inbox");
    let ill = dead();
    assert!(ill.detail.contains("the prepared transaction 'here'"), "{ill:?}");
    let hint = ill.hint.clone().expect("a hint");
    assert!(
        hint.ends_with("ROLLBACK PREPARED 'here'; Then run VACUUM outbox.inbox;"),
        "{hint}"
    );
    stack.pg.exec("rollback prepared 'here'");
    mended(&dead());
    // For a slot that nobody uses.
    stack
        .pg
        .exec("select pg_create_physical_replication_slot('left', true)");
    let standby = stack
        .pg
        .standby()
        .with(&[
            ("primary_slot_name", "left"),
            ("hot_standby_feedback", "on"),
            ("wal_receiver_status_interval", "1s"),
        ])
        .start();
    wait_until("the slot to keep rows", || {
        stack
            .pg
            .one("select xmin is not null from pg_replication_slots where slot_name = 'left'")
    });
    drop(standby);
    wait_until("the slot to be free", || {
        stack
            .pg
            .one("select not active from pg_replication_slots where slot_name = 'left'")
    });
    stack.pg.exec("delete from outbox.inbox");
    let ill = dead();
    assert!(ill.detail.contains("the replication slot \"left\""), "{ill:?}");
    mended(&ill);
}

/// ALTER SYSTEM changes nothing that the command line says, as it does in many containers.
#[test]
fn a_hint_says_where_the_command_line_has_priority() {
    let with = |name: &str, value: &str| {
        let pg = Postgres::with(QUICK).argument(name, value).start();
        pg.extension();
        pg
    };
    let pg = with("outbox_relay.enabled", "off");
    let ill = wait_ill(&pg, "worker", "outbox_relay.enabled is off");
    let hint = ill.hint.expect("a hint");
    assert!(
        hint.starts_with("The command line that starts the server (-c) sets this"),
        "{hint}"
    );
    let pg = with("autovacuum", "off");
    let ill = wait_ill(&pg, "autovacuum", "autovacuum is off");
    let hint = ill.hint.expect("a hint");
    assert!(
        hint.contains("change it there, and restart the server. Otherwise: Run ALTER SYSTEM SET autovacuum = on;"),
        "{hint}"
    );
    if pg.one::<i64>("select count(*) from pg_settings where name = 'allow_alter_system'") == 1 {
        pg.configure(&[("allow_alter_system", "off"), ("default_transaction_read_only", "on")]);
        pg.reload();
        let ill = wait_ill(&pg, "read-only sessions", "is on");
        assert!(
            ill.hint
                .is_some_and(|hint| hint.starts_with("ALTER SYSTEM is switched off here"))
        );
    }
}
