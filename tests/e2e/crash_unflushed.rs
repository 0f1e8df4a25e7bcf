//! Crashes under `synchronous_commit = off`: commits that sessions saw are lost, and their transaction ids and numbers
//! are used again. No event that reached Redis may be among the lost ones, and events that reuse such numbers must
//! reach Redis.

use kit::{LIMIT, Ledger, Load, Mode, Postgres, Redis, Stack, ids, publish_many, wait_drained, wait_until};
use postgres::Client;
use uuid::Uuid;

/// Nothing writes WAL before it is necessary: commits stay unflushed for long. (Full pages are written early, hence few
/// and small records.)
const LAZY: &[(&str, &str)] = &[
    ("wal_writer_delay", "10s"),
    ("wal_writer_flush_after", "1GB"),
    ("wal_buffers", "16MB"),
    ("full_page_writes", "off"),
    ("autovacuum", "off"),
    ("checkpoint_timeout", "1d"),
    ("bgwriter_lru_maxpages", "0"),
    ("outbox_relay.redis_max_len", "0"),
    ("outbox_relay.poll_interval", "1h"),
];

fn start(settings: &[(&str, &str)]) -> Stack {
    Stack::of(Postgres::with(LAZY).with(settings), Redis::start())
}

/// A crash at the moment when an event is seen in Redis: the event must have survived.
#[test]
fn events_that_reached_redis_are_on_disk_in_postgres() {
    let mut stack = start(&[]);
    let ledger = Ledger::create(&stack.pg);
    let mut total = 0;
    for round in 0..4 {
        let mut client = stack.pg.client();
        client.batch_execute("set synchronous_commit = off").unwrap();
        for _ in 0..5 {
            client.execute("select publish_logged('k0')", &[]).unwrap();
            total += 1;
            wait_until("the event in its stream", || ids(&stack.events()).len() == total);
        }
        if round % 2 == 0 {
            stack.pg.stop(Mode::Immediate);
        } else {
            stack.pg.crash();
        }
        stack.pg.start_again();
        let verdict = ledger.settle(&stack, LIMIT);
        verdict.assert_exactly_once();
        assert_eq!(verdict.committed, total);
    }
}

/// Without the relay the same crash does lose commits; otherwise the test above would prove nothing.
#[test]
fn without_the_relays_flush_such_a_crash_loses_commits() {
    let mut stack = start(&[("outbox_relay.enabled", "off")]);
    Ledger::create(&stack.pg);
    let mut client = stack.pg.client();
    client.batch_execute("set synchronous_commit = off").unwrap();
    for _ in 0..5 {
        client.execute("select publish_logged('k0')", &[]).unwrap();
    }
    assert_eq!(stack.pg.one::<i64>("select count(*) from ledger"), 5);
    stack.pg.stop(Mode::Immediate);
    stack.pg.start_again();
    // Those in a full page of WAL may have been written.
    let survivors: i64 = stack.pg.one("select count(*) from ledger");
    assert!(survivors < 5, "nothing was lost");
}

/// The last moment for a transaction to be seen by a tick: `meanwhile` runs there, nothing flushes it, and the server
/// dies at the moment when `count` events are in their stream. Returns, after the recovery, the events in the stream.
fn dies_at_the_tick(mutation: &str, meanwhile: impl FnOnce(&mut Client), count: usize) -> (Stack, Vec<Uuid>) {
    let mut stack = Stack::of(Postgres::with(LAZY).faults(), Redis::start());
    stack.pg.stop(Mode::Fast);
    stack.pg.mutation(mutation);
    stack.pg.start_again();
    // The claim of the guard, which flushes too, is complete.
    stack.publish("first");
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    let mut client = stack.pg.client();
    client.batch_execute("set synchronous_commit = off").unwrap();
    stack.pg.hold_at("before_snapshot");
    stack.publish("wakes the worker");
    stack.pg.wait_reached();
    meanwhile(&mut client);
    // The next tick, which a commit triggers, would flush it.
    stack.pg.hold_at("before_tick");
    let sent = ids(&stack.wait_events(count));
    stack.pg.crash();
    stack.pg.release();
    stack.pg.start_again();
    (stack, sent)
}

/// How many events reach Redis that the recovered database does not have.
fn made_up(mutation: &str) -> usize {
    let unflushed = |client: &mut Client| drop(publish_many(client, "default", "", "unflushed", 1));
    let (stack, sent) = dies_at_the_tick(mutation, unflushed, 3);
    let survived = |id: &&Uuid| {
        stack.pg.one::<bool>(&format!(
            "select exists (select from outbox.events where event_id = '{id}')"
        ))
    };
    sent.len() - sent.iter().filter(survived).count()
}

#[test]
fn a_commit_between_the_wake_up_and_the_snapshot_is_flushed_before_it_is_sent() {
    assert_eq!(made_up(""), 0);
}

/// A server without the flush does send events that were not committed; otherwise the test above would prove nothing.
#[test]
fn a_flush_before_the_snapshot_or_no_flush_sends_events_that_were_not_committed() {
    for mutation in ["flush_before_snapshot", "skip_flush"] {
        assert_eq!(made_up(mutation), 1, "{mutation}");
    }
}

/// Numbers and ids that a tick took for used, and that a crash made unused, are used again: the relay must take them
/// for new.
fn nothing_is_taken_for_known(meanwhile: impl FnOnce(&mut Client)) {
    let (stack, mut published) = dies_at_the_tick("", meanwhile, 2);
    for n in 0..40 {
        published.push(stack.publish(&format!("again{n}")));
    }
    stack.assert_mended(&stack.redis, &published);
    // Nor may another server with this one's history have used them: then the ends of the streams would have to prove
    // it.
    assert!(!stack.pg.log().contains("goes on after another history"));
}

#[test]
fn transactions_that_aborted_just_before_the_snapshot_are_not_taken_for_the_next_of_their_ids() {
    nothing_is_taken_for_known(|client| {
        // The worker itself needs some of the ids when it comes back. The sessions write little: a full page of WAL is
        // flushed.
        for _ in 0..20 {
            client
                .batch_execute("begin; select pg_current_xact_id(); rollback")
                .unwrap();
        }
    });
}

#[test]
fn numbers_drawn_just_before_the_snapshot_are_not_drawn_again() {
    nothing_is_taken_for_known(|client| {
        client.batch_execute("begin").unwrap();
        // More than a sequence draws in advance of its last record in the WAL.
        publish_many(client, "default", "", "running", 40);
    });
}

fn crash_rounds(settings: &[(&str, &str)], rounds: usize) {
    let mut stack = start(settings);
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 6, "set synchronous_commit = off");
    for round in 0..rounds {
        load.wait_more(150);
        if round % 2 == 0 {
            stack.pg.stop(Mode::Immediate);
        } else {
            stack.pg.crash();
        }
        stack.pg.start_again();
    }
    load.wait_more(150);
    load.stop();
    let verdict = ledger.settle(&stack, LIMIT);
    assert!(
        verdict.committed > 100 * rounds,
        "only {} events survived",
        verdict.committed
    );
    verdict.assert_exactly_once();
}

#[test]
fn crashes_under_asynchronous_commits_lose_no_event_and_send_only_committed_ones() {
    let as_in_production = [
        ("fsync", "on"),
        ("full_page_writes", "on"),
        ("wal_writer_delay", "200ms"),
        ("wal_writer_flush_after", "1MB"),
    ];
    crash_rounds(&as_in_production, 3);
}

#[test]
fn crashes_while_the_wal_writer_sleeps_lose_no_event_and_send_only_committed_ones() {
    crash_rounds(&[], 8);
}

/// The highest transaction id that a session can see as assigned.
fn next_xid(pg: &Postgres) -> i64 {
    pg.one("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
}

/// A session publishes and aborts, nothing of that is flushed, and after the crash other transactions get its
/// transaction id and its numbers.
#[test]
fn ids_of_aborted_transactions_that_are_used_again_after_a_crash_belong_to_the_new_events() {
    let mut stack = start(&[]);
    let mut published = publish_many(&mut stack.pg.client(), "default", "", "before", 3);
    stack.wait_events(3);
    wait_drained(&stack.pg, "default");
    let mut used_again = 0;
    for round in 0..6 {
        let mut client = stack.pg.client();
        for _ in 0..3 {
            client.batch_execute("begin").unwrap();
            publish_many(&mut client, "default", "", "aborted", 1);
            client.batch_execute("rollback").unwrap();
        }
        let before = next_xid(&stack.pg);
        let seen = round % 2 == 1;
        if seen {
            // The worker's tick sees the aborted transactions: then their ids must not come again.
            client.batch_execute("set synchronous_commit = off").unwrap();
            published.extend(publish_many(&mut client, "default", "", "seen", 1));
            wait_until("the event in its stream", || ids(&stack.events()) == published);
        }
        stack.pg.stop(Mode::Immediate);
        stack.pg.start_again();
        let again = next_xid(&stack.pg) < before;
        assert!(!(seen && again), "the worker had seen what is used again");
        used_again += i32::from(again);
        published.extend(publish_many(
            &mut stack.pg.client(),
            "default",
            "",
            &format!("round{round}-"),
            2,
        ));
        stack.wait_events(published.len());
        wait_drained(&stack.pg, "default");
        assert_eq!(ids(&stack.events()), published);
    }
    // Not each time: a full page of WAL is written at once.
    assert!(used_again > 0, "no transaction id was ever used again");
}
