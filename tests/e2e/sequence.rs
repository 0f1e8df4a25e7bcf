//! The sequence that numbers events is cached, limited, locked, truncated or created again: publishers get clear
//! errors, and nothing is lost.

use crate::numbers::{PAUSE, Publisher, RESUME, assert_arrived};
use kit::{LIMIT, Ledger, Load, Stack, UNTRIMMED, ids, wait_eq, wait_until};
use uuid::Uuid;

const MEND: &str = "alter sequence outbox.events_seq_seq as bigint increment 1 no maxvalue cache 1 no cycle";

#[test]
fn a_sequence_with_other_parameters_is_refused_in_words() {
    let stack = Stack::start();
    let mut publisher = Publisher::of(&stack.pg);
    let mut other = stack.pg.client();
    publisher.many(4);
    stack.wait_events(4);
    for (change, detail) in [
        ("cache 50", "It has CACHE 50: sessions would draw numbers in advance."),
        ("cycle", "It has CYCLE: numbers would be given again."),
        ("increment 2", "It has INCREMENT 2 instead of 1."),
        ("increment -1", "It has INCREMENT -1 instead of 1."),
        ("as integer", "It is of type integer instead of bigint."),
    ] {
        let mark = stack.pg.log().len();
        // A session that has used it, and the session that changes it, within the same transaction.
        for own in [false, true] {
            let alter = format!("alter sequence outbox.events_seq_seq {change}");
            if own {
                publisher.run("begin");
                publisher.run(&alter);
            } else {
                other.batch_execute(&alter).unwrap();
            }
            for sql in [
                "select outbox.publish_event('e', 's')",
                "insert into outbox.events (event_type, source) values ('e', 's')",
                "select outbox.publish_event('e', 's', scheduled_at => 'tomorrow')",
            ] {
                if own {
                    publisher.run("savepoint s");
                }
                let refused = kit::Refused::of(publisher.client.batch_execute(sql));
                let expected = kit::Refused::new(
                    "55000",
                    "sequence outbox.events_seq_seq cannot number events",
                    detail,
                    &format!(
                        "Run {}.",
                        MEND.replace("alter sequence", "ALTER SEQUENCE")
                            .replace(" as ", " AS ")
                            .replace("increment", "INCREMENT")
                            .replace("no maxvalue", "NO MAXVALUE")
                            .replace("cache", "CACHE")
                            .replace("no cycle", "NO CYCLE")
                    ),
                );
                assert_eq!(refused, expected, "{change}: {sql}");
                if own {
                    publisher.run("rollback to savepoint s");
                }
            }
            if own {
                publisher.run("rollback");
            } else {
                stack
                    .pg
                    .wait_log_after(mark, "WARNING:  sequence outbox.events_seq_seq cannot number events");
                other.batch_execute(MEND).unwrap();
            }
        }
        publisher.many(4);
    }
    assert_arrived(&stack, &publisher.published, "changed parameters");
}

/// The correction is noticed, and scheduled events go on.
#[test]
fn pending_events_are_sent_while_the_sequence_is_refused() {
    let to_its_end = "do $$ declare n bigint; begin select last_value into n from outbox.events_seq_seq; \
        execute 'alter sequence outbox.events_seq_seq maxvalue ' || n; end $$";
    for change in ["alter sequence outbox.events_seq_seq cache 50", to_its_end] {
        let stack = Stack::with(&[("outbox_relay.poll_interval", "1s")]);
        let mut publisher = Publisher::of(&stack.pg);
        let soon = "now() + interval '2 s'";
        let scheduled = publisher.of_query(&format!(
            "select outbox.publish_event('later', 's', scheduled_at => {soon})"
        ));
        publisher.run(PAUSE);
        publisher.many(40);
        publisher.run(change);
        publisher.run("select pg_sleep_until(scheduled_at + interval '0.1 s') from outbox.scheduled_events");
        publisher.run(RESUME);
        stack.wait_events(40);
        // Its loops end, and it checks again.
        publisher.run("select pg_sleep(1.5)");
        let waiting: i64 = stack.pg.one("select count(*) from outbox.scheduled_events");
        assert_eq!(waiting, 1, "{change}");
        stack
            .pg
            .wait_log("WARNING:  sequence outbox.events_seq_seq cannot number events");
        assert!(!stack.pg.log().contains("outbox_relay worker: "), "{change}");
        publisher.run(MEND);
        publisher.published.push(scheduled);
        assert_arrived(&stack, &publisher.published, change);
    }
}

#[test]
fn a_lock_on_the_sequence_delays_only_publishers() {
    let stack = Stack::start();
    let mut publisher = Publisher::of(&stack.pg);
    publisher.run(PAUSE);
    publisher.many(20);
    let mut other = stack.pg.client();
    other
        .batch_execute("begin; alter sequence outbox.events_seq_seq rename to other")
        .unwrap();
    publisher.run(RESUME);
    let mark = stack.pg.log().len();
    stack.wait_events(20);
    assert!(!stack.pg.log()[mark..].contains("lock timeout"));
    other.batch_execute("rollback").unwrap();
    publisher.many(4);
    assert_arrived(&stack, &publisher.published, "a lock");
}

/// Tools that clean up after tests, beside publishers: neither makes the other fail.
#[test]
fn truncating_under_load_fails_no_publisher() {
    let stack = Stack::with(&[UNTRIMMED]);
    let _ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 6, "");
    for _ in 0..60 {
        load.wait_more(5);
        stack.pg.exec("truncate outbox.events restart identity");
    }
    load.stop();
    let log = stack.pg.log();
    assert!(
        !log.contains("deadlock detected") && !log.contains("duplicate key"),
        "{log}"
    );
    let mut publisher = Publisher::of(&stack.pg);
    publisher.many(4);
    wait_until("the last events", || {
        ids(&stack.events()).ends_with(&publisher.published)
    });
}

/// Publishers are refused, and none of the cached numbers is used, neither then nor later.
#[test]
fn a_cache_under_load_loses_nothing() {
    let stack = Stack::with(&[UNTRIMMED]);
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 6, "select nextval('outbox.events_seq_seq')");
    let mut client = stack.pg.client();
    for cache in [50, 1, 1000, 1, 2, 1] {
        if cache > 1 {
            load.wait_more(30);
        }
        client
            .batch_execute(&format!("alter sequence outbox.events_seq_seq cache {cache}"))
            .unwrap();
        if cache > 1 {
            // Terminated sessions come back, and cache numbers again.
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
    }
    load.wait_more(30);
    load.stop();
    let verdict = ledger.settle(&stack, LIMIT);
    assert!(verdict.committed > 200, "only {} events", verdict.committed);
    verdict.assert_exactly_once();
}

/// There is no room above the numbers in use.
#[test]
fn a_maximum_below_the_numbers_that_were_given_is_refused_in_words() {
    let stack = Stack::start();
    let mut publisher = Publisher::of(&stack.pg);
    publisher.many(20);
    stack.wait_events(20);
    publisher.run("alter sequence outbox.events_seq_seq maxvalue 10 restart");
    let refused = kit::Refused::of(publisher.client.batch_execute("select outbox.publish_event('e', 's')"));
    assert_eq!(
        (refused.code.as_str(), refused.message.as_str()),
        ("55000", "sequence outbox.events_seq_seq cannot number events")
    );
    assert_eq!(
        refused.detail.as_deref(),
        Some("Its MAXVALUE is 10, and numbers up to 20 were given.")
    );
    publisher.run(MEND);
    publisher.many(10);
    assert_arrived(&stack, &publisher.published, "a maximum");
}

/// A new installation in the same database starts with 1, without a message.
#[test]
fn an_extension_that_is_created_again_numbers_its_events() {
    let stack = Stack::start();
    let mut publisher = Publisher::of(&stack.pg);
    publisher.many(20);
    stack.wait_events(20);
    publisher.run("drop extension outbox_relay");
    publisher.run("create extension outbox_relay");
    stack.point("default", &stack.redis);
    publisher.many(20);
    assert_arrived_here(&stack, &publisher.published);
    assert!(!stack.pg.log().contains("numbers of events went on"));
}

#[track_caller]
fn assert_arrived_here(stack: &Stack, published: &[Uuid]) {
    wait_until("all events", || stack.redis.xlen("events") >= published.len());
    assert_eq!(ids(&stack.events()), published);
}

/// Publishers take their locks in the order of TRUNCATE, which locks the table before the sequence: a session that
/// waits for the table has not locked the sequence.
#[test]
fn a_truncation_that_restarts_the_numbers_meets_no_deadlock() {
    let stack = Stack::start();
    for publish in [
        "select outbox.publish_event('e', 's')",
        "select outbox.publish_events('[{\"event_type\": \"e\", \"source\": \"s\"}]')",
        "select outbox.publish_event('e', 's', scheduled_at => now() + interval '1 hour')",
        "insert into outbox.events (event_type, source) values ('e', 's')",
    ] {
        let mut cleaner = stack.pg.client();
        let mut transaction = cleaner.transaction().expect("begin");
        transaction.batch_execute("lock table outbox.events").expect("the lock");
        let mut publisher = stack.pg.client();
        let waiting = std::thread::spawn(move || publisher.batch_execute(publish));
        wait_eq("publishers that wait", 1, || {
            let count = "select count(*) from pg_locks where not granted and mode = 'RowExclusiveLock'";
            stack.pg.one::<i64>(count)
        });
        transaction
            .batch_execute("truncate outbox.events restart identity")
            .unwrap_or_else(|error| panic!("beside {publish}: {error:?}"));
        transaction.commit().expect("commit");
        waiting
            .join()
            .expect("no panic")
            .unwrap_or_else(|error| panic!("{publish}: {error:?}"));
    }
}
