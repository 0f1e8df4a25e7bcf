//! Objects of the extension were dropped or renamed: whatever needs them fails with a clear error or waits, and goes on
//! when they are back.

use kit::{LIMIT, Ledger, Load, Postgres, QUICK, Redis, Refused, Stack, ids, publish_many, wait_drained, wait_until};

fn set(stack: &Stack, alter_system: &str) {
    stack.pg.exec(alter_system);
    stack.pg.exec("select pg_reload_conf()");
}

#[track_caller]
fn assert_same_worker(stack: &Stack, worker: i32) {
    assert_eq!(stack.pg.worker_pid("postgres"), Some(worker));
    for word in ["PANIC", "terminated by signal", "XX000"] {
        assert!(!stack.pg.log().contains(word), "{word} in the log");
    }
}

/// As a DBA swaps an index for a smaller one: created concurrently, the old one dropped, the new one renamed.
#[test]
fn indexes_are_swapped_under_a_load() {
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "0")]);
    let ledger = Ledger::create(&stack.pg);
    let worker = stack.pg.wait_worker("postgres");
    let load = Load::start(&stack.pg, 3, "");
    for statements in [
        &[
            "create index concurrently events_new on outbox.events (xid, seq)",
            "drop index outbox.events_xid_idx",
            "alter index outbox.events_new rename to events_xid_idx",
        ][..],
        &[
            "create unique index concurrently events_new on outbox.events (event_id, branch)",
            "drop index outbox.events_event_id_idx",
        ],
        &[
            "create unique index concurrently events_seq on outbox.events (seq)",
            "alter table outbox.events drop constraint events_pkey, add constraint events_key primary key using index events_seq",
        ],
        &["reindex table concurrently outbox.events"],
    ] {
        for statement in statements {
            load.wait_more(20);
            stack.pg.exec(statement);
        }
    }
    load.wait_more(50);
    load.stop();
    ledger.settle(&stack, LIMIT).assert_exactly_once();
    assert_same_worker(&stack, worker);
}

/// An index is swapped for another after a session has looked it up, and before the table is locked. Needs a library
/// built with the feature `faults`.
#[test]
fn an_index_is_swapped_just_before_the_table_is_locked() {
    let stack = Stack::of(Postgres::with(QUICK).faults(), Redis::start());
    let worker = stack.pg.wait_worker("postgres");
    // Publishing with a given id looks for the id in both tables.
    let table_of_schedule =
        "alter table outbox.scheduled_events drop constraint scheduled_events_pkey, add primary key (event_id, branch)";
    let publish = "select outbox.publish_event('t', 'kit', event_id => gen_random_uuid())";
    let ways = [
        ("create unique index e2 on outbox.events (event_id, branch); drop index outbox.events_event_id_idx", publish.replace("gen_random_uuid()", "gen_random_uuid(), scheduled_at => '2100-01-01'")),
        (table_of_schedule, publish.to_string()),
        (table_of_schedule, "select outbox.publish_events(jsonb_build_array(jsonb_build_object('event_type', 't', 'source', 'kit', 'event_id', gen_random_uuid())))".to_string()),
    ];
    let mut client = stack.pg.client();
    let mut count = 0;
    for (swap, sql) in &ways {
        // So that the session has cached the indexes.
        client.batch_execute(sql).expect("published");
        std::thread::scope(|scope| {
            stack.pg.hold_at("before_id_lock");
            let publisher = scope.spawn(|| client.batch_execute(sql));
            stack.pg.wait_reached();
            stack.pg.exec(swap);
            stack.pg.release();
            publisher
                .join()
                .expect("no panic")
                .unwrap_or_else(|error| panic!("{swap}: {error:?}"));
        });
        count += if sql.contains("scheduled_at") { 0 } else { 2 };
    }
    stack.wait_events(count);
    // The worker, which reads with the indexes on (seq) and (xid, seq).
    for swap in [
        "create index x2 on outbox.events (xid, seq); drop index outbox.events_xid_idx",
        "alter table outbox.events drop constraint events_pkey, add primary key (seq) include (backend_number)",
    ] {
        wait_drained(&stack.pg, "default");
        stack.pg.hold_at("before_read_lock");
        stack.publish("read");
        stack.pg.wait_reached();
        stack.pg.exec(swap);
        stack.pg.release();
        count += 1;
        stack.wait_events(count);
    }
    assert_same_worker(&stack, worker);
}

#[test]
fn without_an_index_events_are_published_and_the_index_is_named() {
    let stack = Stack::with(QUICK);
    let worker = stack.pg.wait_worker("postgres");
    stack.publish("first");
    stack.wait_events(1);
    let mut published = Vec::new();
    for (drop, said, hint) in [
        (
            "drop index outbox.events_xid_idx",
            "outbox.events has no index on (xid, seq)",
            "create index on outbox.events (xid, seq)",
        ),
        (
            "alter table outbox.events drop constraint events_pkey",
            "outbox.events has no index on (seq)",
            "alter table outbox.events add primary key (seq)",
        ),
    ] {
        stack.pg.exec(drop);
        published.extend(publish_many(&mut stack.pg.client(), "default", "", "event", 3));
        stack.pg.wait_log(&format!("outbox_relay worker: {said}"));
        assert!(
            stack
                .pg
                .log()
                .to_lowercase()
                .contains(&hint.replace("index on", "index events_xid_idx on"))
        );
        stack.pg.exec(hint);
        let entries = stack.wait_events(1 + published.len());
        assert_eq!(ids(&entries)[1..], published);
    }
    stack.pg.exec("drop index outbox.events_event_id_idx");
    published.extend(publish_many(&mut stack.pg.client(), "default", "", "event", 3));
    let refused = Refused::of(
        stack
            .pg
            .client()
            .batch_execute("select outbox.publish_event('t', 'kit', event_id => gen_random_uuid())"),
    );
    assert_eq!(
        (refused.code.as_str(), refused.message.as_str()),
        ("55000", "outbox.events has no unique index on (event_id, branch)")
    );
    assert_eq!(
        refused.hint.as_deref(),
        Some("Run CREATE UNIQUE INDEX events_event_id_idx ON outbox.events (event_id, branch);")
    );
    stack.wait_events(1 + published.len());
    assert_same_worker(&stack, worker);
}

fn saved_at(pg: &Postgres) -> Option<chrono::DateTime<chrono::Utc>> {
    pg.one("select saved_at from outbox.cursors where backend_number = 1")
}

#[test]
fn a_table_that_was_renamed_is_used_again_when_it_has_its_name_back() {
    let stack = Stack::with(QUICK);
    let worker = stack.pg.wait_worker("postgres");
    stack.publish("first");
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    let mut count = 1;
    for table in [
        "cursors",
        "ticks",
        "refused_events",
        "failed_events",
        "scheduled_events",
        "events",
        "backends",
    ] {
        let before = saved_at(&stack.pg);
        stack.pg.exec(&format!("alter table outbox.{table} rename to away"));
        let mut client = stack.pg.client();
        match table {
            "events" | "backends" => {
                let refused = Refused::of(client.batch_execute("select outbox.publish_event('t', 'kit')"));
                assert_eq!(
                    (refused.code.as_str(), refused.message),
                    ("55000", format!("table outbox.{table} is missing"))
                );
            }
            _ => {
                client
                    .batch_execute("select outbox.publish_event('t', 'kit')")
                    .expect(table);
                count += 1;
                stack.wait_events(count);
            }
        }
        stack.pg.exec(&format!("alter table outbox.away rename to {table}"));
        stack.publish("event");
        count += 1;
        stack.wait_events(count);
        wait_until(&format!("the cursor after {table} was back"), || {
            saved_at(&stack.pg) > before
        });
        wait_drained(&stack.pg, "default");
    }
    assert_eq!(stack.events().len(), count);
    assert_same_worker(&stack, worker);
}

#[test]
fn a_worker_that_ends_logs_the_reason() {
    let stack = Stack::start();
    stack.publish("first");
    stack.wait_events(1);
    stack.pg.exec("drop extension outbox_relay");
    stack
        .pg
        .wait_log("outbox_relay worker leaves database \"postgres\": the extension was dropped");
    stack.pg.extension();
    stack.pg.wait_worker("postgres");
    wait_until("a running worker", || {
        stack.pg.one::<String>("select state from outbox.status") == "running"
    });
    set(&stack, "alter system set outbox_relay.databases = 'no_such_database'");
    stack
        .pg
        .wait_log("outbox_relay worker leaves database \"postgres\": outbox_relay.enabled is off");
}
