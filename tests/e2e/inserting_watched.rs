//! Observers of the table see every row: logical decoding, and tools that rebuild a table under load.

use crate::inserting::{LOG_TRIGGER, ways};
use kit::{LIMIT, Ledger, Load, Stack, env, wait_drained, wait_eq, wait_until};

/// A reader of the WAL sees all rows that are inserted and deleted, whoever writes them.
#[test]
fn logical_decoding_sees_every_row() {
    if env::lacks(&["test_decoding"]) {
        return;
    }
    let stack = Stack::with(&[("wal_level", "logical")]);
    stack
        .pg
        .exec("select pg_create_logical_replication_slot('seen', 'test_decoding')");
    for sql in ways("t") {
        stack.pg.exec(&sql);
    }
    stack
        .pg
        .exec("select outbox.publish_event('due', 's', scheduled_at => now() + interval '0.2 s')");
    stack.wait_events(5);
    wait_drained(&stack.pg, "default");
    stack.pg.set("outbox_relay.published_retention", "0");
    wait_eq("rows that are left", 0i64, || {
        stack.pg.one("select count(*) from outbox.events")
    });
    let count = |what: &str| -> i64 {
        stack.pg.one(&format!(
            "select count(*) from pg_logical_slot_peek_changes('seen', null, null) where data like 'table outbox.{what}:%'"
        ))
    };
    // The worker's commits are flushed a moment later.
    wait_eq("rows of events in the WAL", (5, 5), || {
        (count("events: INSERT"), count("events: DELETE"))
    });
    wait_eq("rows of scheduled events in the WAL", (1, 1), || {
        (count("scheduled_events: INSERT"), count("scheduled_events: DELETE"))
    });
}

/// Streams that are never trimmed: each entry counts.
const UNTRIMMED: &[(&str, &str)] = &[("outbox_relay.redis_max_len", "0")];

/// Tools that rebuild a table under load copy it, and apply the changes in a log since then.
#[test]
fn the_log_of_a_loaded_table_has_every_event() {
    let stack = Stack::with(UNTRIMMED);
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 4, "");
    wait_until("some events", || stack.redis.xlen("events") > 100);
    stack.pg.exec(LOG_TRIGGER);
    // Later transactions find the trigger; CREATE TRIGGER has waited for all others.
    let copied: i64 = stack.pg.one("select count(*) from outbox.events");
    wait_until("more events", || {
        stack.pg.one::<i64>("select count(*) from outbox.events") > copied + 500
    });
    load.stop();
    let verdict = ledger.settle(&stack, LIMIT);
    verdict.assert_exactly_once();
    let missing: i64 = stack.pg.one(&format!(
        "select (select count(*) from outbox.events) - (select count(*) from public.log where tg_op = 'INSERT') - {copied}"
    ));
    assert!(missing <= 0, "{missing} are missing in the log");
}

/// With the real pg_repack, where it is installed.
#[test]
fn pg_repack_under_load_loses_nothing() {
    let stack = Stack::with(UNTRIMMED);
    if !stack
        .pg
        .one::<bool>("select exists (select from pg_available_extensions where name = 'pg_repack')")
    {
        env::not_run("pg_repack is not installed");
        return;
    }
    stack.pg.exec("create extension pg_repack");
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 4, "");
    wait_until("some events", || stack.redis.xlen("events") > 300);
    for _ in 0..3 {
        let before = stack.redis.xlen("events");
        let ran = stack.pg.run(
            "pg_repack",
            &["-t", "outbox.events", "-t", "outbox.scheduled_events"],
            "",
        );
        assert!(ran.ok, "{}", ran.stderr);
        wait_until("more events", || stack.redis.xlen("events") > before + 100);
    }
    load.stop();
    let verdict = ledger.settle(&stack, LIMIT);
    verdict.assert_exactly_once();
    let gone: i64 = stack.pg.one(
        "select count(*) from ledger l where not exists (select from outbox.events e where e.event_id = l.event_id)",
    );
    assert_eq!((gone, verdict.committed > 600), (0, true));
}
