//! `outbox.health()`: settings and states of the server that keep events back. The hint, executed as it stands, mends
//! it.

use kit::{Postgres, QUICK, Redis, Stack, wait_drained};
use std::io::Write;

use crate::health::{follow, quick, wait_ill, wait_well};

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
    // That it can fail:
    stack.pg.exec("alter function outbox.health(interval) reset work_mem");
    assert!(faults().is_some_and(|faults| faults.contains("temp_file_limit")));
}
