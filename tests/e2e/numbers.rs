//! The sequence that numbers events goes back, jumps, is cached or is changed: all the same, every event arrives once,
//! and in order.

use kit::{LIMIT, Ledger, Load, Mode, Postgres, Redis, Stack, UNTRIMMED, eventually, ids, wait_drained, wait_eq};
use postgres::{Client, NoTls};
use uuid::Uuid;

/// Ways to set the numbers back. The first also removes the rows, as tools that clean up after tests do.
pub(crate) const BACK: [&str; 4] = [
    "truncate outbox.events restart identity",
    "select setval('outbox.events_seq_seq', 1, false)",
    "alter sequence outbox.events_seq_seq restart",
    // As an old dump does.
    "select setval('outbox.events_seq_seq', 7)",
];

pub(crate) const PAUSE: &str = "update outbox.backends set enabled = false";
pub(crate) const RESUME: &str = "update outbox.backends set enabled = true";

/// A session that publishes in every way in turn, each event in a separate transaction.
pub(crate) struct Publisher {
    pub(crate) client: Client,
    pub(crate) published: Vec<Uuid>,
}

impl Publisher {
    pub(crate) fn of(pg: &Postgres) -> Self {
        Self {
            client: pg.client(),
            published: Vec::new(),
        }
    }

    pub(crate) fn run(&mut self, sql: &str) {
        self.client
            .batch_execute(sql)
            .unwrap_or_else(|error| panic!("{sql}\nfailed: {error:?}"));
    }

    pub(crate) fn one(&mut self) {
        let id = match self.published.len() % 4 {
            0 => self.of_query("select outbox.publish_event('e', 's')"),
            1 => self.of_query("insert into outbox.events (event_type, source) values ('e', 's') returning event_id"),
            2 => self.of_query("select outbox.publish_events('[{\"event_type\": \"e\", \"source\": \"s\"}]')"),
            _ => self.of_copy(),
        };
        self.published.push(id);
    }

    pub(crate) fn of_query(&mut self, sql: &str) -> Uuid {
        match self.client.query_one(sql, &[]) {
            Ok(row) => row.get(0),
            Err(error) => panic!("event {}: {sql}\nfailed: {error:?}", self.published.len()),
        }
    }

    pub(crate) fn of_copy(&mut self) -> Uuid {
        use std::io::Write;
        let id = Uuid::from_u128(0xc0_0000 + self.published.len() as u128);
        let copy = "copy outbox.events (event_id, event_type, source) from stdin";
        let mut rows = self.client.copy_in(copy).expect("COPY");
        writeln!(rows, "{id}\te\ts").expect("COPY");
        rows.finish()
            .unwrap_or_else(|error| panic!("event {}: {copy}\nfailed: {error:?}", self.published.len()));
        id
    }

    pub(crate) fn many(&mut self, count: usize) {
        (0..count).for_each(|_| self.one());
    }

    /// The rows that were published before and not sent are deleted.
    pub(crate) fn forget_from(&mut self, first: usize, back: &str) {
        if back.starts_with("truncate") {
            self.published.truncate(first);
        }
    }
}

/// All published events are in the stream once, in order; the views agree, and nothing is pending.
#[track_caller]
pub(crate) fn assert_arrived(stack: &Stack, published: &[Uuid], what: &str) {
    wait_eq(&format!("all events, after {what}"), published.len(), || {
        stack.redis.xlen("events")
    });
    assert_eq!(ids(&stack.events()), published, "{what}");
    wait_drained(&stack.pg, "default");
    let unknown: i64 = stack
        .pg
        .one("select count(*) from outbox.event_status where status <> 'published'");
    assert_eq!(unknown, 0, "{what}");
}

/// While nothing can be sent, only events that are in the stream count as published.
#[track_caller]
pub(crate) fn assert_claims_only(stack: &Stack, sent: usize, what: &str) {
    let claimed: i64 = stack
        .pg
        .one("select count(*) from outbox.event_status where status = 'published'");
    assert!(
        claimed <= sent as i64,
        "{claimed} events are called published, {sent} are: {what}"
    );
}

#[test]
fn numbers_that_go_back_while_all_is_well() {
    for back in BACK {
        let stack = Stack::start();
        let mut publisher = Publisher::of(&stack.pg);
        publisher.many(20);
        stack.wait_events(20);
        publisher.run(back);
        publisher.many(40);
        assert_arrived(&stack, &publisher.published, back);
        stack.pg.wait_log("numbers of events went on");
    }
}

#[test]
fn numbers_that_go_back_while_the_backend_is_paused() {
    for back in BACK {
        let stack = Stack::start();
        let mut publisher = Publisher::of(&stack.pg);
        publisher.many(20);
        stack.wait_events(20);
        wait_drained(&stack.pg, "default");
        publisher.run(PAUSE);
        publisher.many(10);
        publisher.run(back);
        publisher.forget_from(20, back);
        // Beyond the number where it had been.
        publisher.many(60);
        assert_claims_only(&stack, 20, back);
        publisher.run(RESUME);
        assert_arrived(&stack, &publisher.published, back);
    }
}

#[test]
fn numbers_that_go_back_while_redis_is_down() {
    for back in BACK {
        let mut stack = Stack::of(Postgres::with(kit::QUICK), Redis::persistent("always"));
        let mut publisher = Publisher::of(&stack.pg);
        publisher.many(20);
        stack.wait_events(20);
        wait_drained(&stack.pg, "default");
        stack.redis.kill9();
        publisher.many(10);
        publisher.run(back);
        publisher.forget_from(20, back);
        publisher.many(30);
        assert_claims_only(&stack, 20, back);
        stack.redis.start_again();
        assert_arrived(&stack, &publisher.published, back);
    }
}

/// The memory of processes is lost: once before, and once after the numbers went back.
#[test]
fn numbers_that_go_back_around_a_crash_of_the_server() {
    for back in BACK {
        for crashes_after in [false, true] {
            let what = format!("{back}, crash after: {crashes_after}");
            let mut stack = Stack::start();
            let mut publisher = Publisher::of(&stack.pg);
            publisher.many(20);
            stack.wait_events(20);
            wait_drained(&stack.pg, "default");
            if crashes_after {
                publisher.run(PAUSE);
                publisher.run(back);
                publisher.many(5);
            }
            let mut published = std::mem::take(&mut publisher.published);
            stack.pg.crash();
            stack.pg.start_again();
            let mut publisher = Publisher::of(&stack.pg);
            if crashes_after {
                publisher.published = published.clone();
                publisher.many(30);
            } else {
                publisher.run(PAUSE);
                publisher.run(back);
                publisher.published = published.clone();
                publisher.many(30);
            }
            publisher.run(RESUME);
            published = publisher.published;
            assert_arrived(&stack, &published, &what);
        }
    }
}

/// Without the library in shared_preload_libraries, publishing only queues.
#[test]
fn numbers_that_go_back_while_the_library_is_not_preloaded() {
    for back in BACK {
        let mut stack = Stack::start();
        let mut publisher = Publisher::of(&stack.pg);
        publisher.many(20);
        stack.wait_events(20);
        wait_drained(&stack.pg, "default");
        let published = publisher.published;
        stack.pg.stop(Mode::Fast);
        stack.pg.configure(&[("shared_preload_libraries", "")]);
        stack.pg.start_again();
        let mut publisher = Publisher::of(&stack.pg);
        publisher.published = published;
        publisher.run(back);
        publisher.many(10);
        let mut other = Publisher::of(&stack.pg);
        other.run(back);
        other.published = publisher.published;
        if back.starts_with("truncate") {
            other.published.truncate(20);
        }
        other.many(10);
        let published = other.published;
        assert_claims_only(&stack, 20, back);
        stack.pg.stop(Mode::Fast);
        stack.pg.configure(&[("shared_preload_libraries", "outbox_relay")]);
        stack.pg.start_again();
        assert_arrived(&stack, &published, back);
    }
}

/// Rows that another version of the library, or no trigger, has numbered: the saved cursor covers their numbers, but
/// the worker has not read them.
#[test]
fn rows_whose_numbers_a_cursor_has_passed_are_sent() {
    let stack = Stack::start();
    let mut publisher = Publisher::of(&stack.pg);
    publisher.many(20);
    stack.wait_events(20);
    wait_drained(&stack.pg, "default");
    stack.pg.set("outbox_relay.enabled", "off");
    wait_eq("no worker", None::<i32>, || {
        stack.pg.one("select worker_pid from outbox.status")
    });
    publisher.run("delete from outbox.events where seq in (3, 4, 5)");
    publisher.run("alter table outbox.events disable trigger complete_event");
    for seq in [4, 3, 5] {
        let id = publisher.of_query(&format!(
            "insert into outbox.events (seq, xid, created_at, event_id, backend_number, event_type, source, backend) \
             select {seq}, pg_current_xact_id(), now(), gen_random_uuid(), number, 'e', 's', name \
             from outbox.backends returning event_id"
        ));
        publisher.published.push(id);
    }
    publisher.run("alter table outbox.events enable always trigger complete_event");
    publisher.many(5);
    stack.pg.set("outbox_relay.enabled", "on");
    // In the order of their numbers.
    let n = publisher.published.len();
    publisher.published.swap(n - 8, n - 7);
    assert_arrived(&stack, &publisher.published, "rows with numbers of the past");
}

#[test]
fn numbers_that_go_back_within_the_transaction_that_publishes() {
    let stack = Stack::start();
    let mut publisher = Publisher::of(&stack.pg);
    publisher.many(20);
    stack.wait_events(20);
    // The transaction commits, is rolled back to a savepoint, is rolled back, or is prepared.
    for back in &BACK[1..] {
        publisher.run("begin");
        publisher.many(4);
        publisher.run(back);
        publisher.many(4);
        publisher.run("savepoint s");
        publisher.run(back);
        let before = publisher.published.len();
        publisher.many(4);
        publisher.run("rollback to savepoint s");
        publisher.published.truncate(before);
        publisher.many(4);
        publisher.run("commit");
        publisher.run("begin");
        publisher.run(back);
        let before = publisher.published.len();
        publisher.many(4);
        publisher.run("rollback");
        publisher.published.truncate(before);
        publisher.many(4);
        publisher.run("begin");
        publisher.run(back);
        publisher.many(4);
        publisher.run("prepare transaction 'p'");
        publisher.run("commit prepared 'p'");
        publisher.many(4);
        assert_arrived(&stack, &publisher.published, back);
    }
}

/// While it is not committed, other sessions do not wait, and see the old numbers.
#[test]
fn a_prepared_transaction_that_has_published_survives_numbers_that_go_back_and_a_crash() {
    let mut stack = Stack::start();
    let mut publisher = Publisher::of(&stack.pg);
    publisher.many(20);
    stack.wait_events(20);
    publisher.run("begin");
    publisher.many(3);
    publisher.run("prepare transaction 'p'");
    let of_prepared = publisher.published.split_off(20);
    publisher.run("select setval('outbox.events_seq_seq', 7)");
    publisher.many(5);
    stack.wait_events(25);
    wait_drained(&stack.pg, "default");
    let mut published = std::mem::take(&mut publisher.published);
    stack.pg.crash();
    stack.pg.start_again();
    let mut publisher = Publisher::of(&stack.pg);
    publisher.published = published;
    publisher.run("select setval('outbox.events_seq_seq', 7)");
    publisher.many(5);
    stack.wait_events(30);
    publisher.run("commit prepared 'p'");
    published = publisher.published;
    published.extend(of_prepared);
    assert_arrived(&stack, &published, "a prepared transaction");
}

#[test]
fn numbers_that_go_back_again_and_again_under_load() {
    let stack = Stack::with(&[UNTRIMMED]);
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 6, "");
    for turn in 0..40 {
        load.wait_more(10);
        let sql = match turn % 4 {
            0 => "select setval('outbox.events_seq_seq', 7)",
            1 => "alter sequence outbox.events_seq_seq restart",
            2 => {
                "begin; alter sequence outbox.events_seq_seq restart; select outbox.publish_event('aborted', 's'); rollback"
            }
            _ => "select setval('outbox.events_seq_seq', last_value + 5000) from outbox.events_seq_seq",
        };
        stack.pg.client().batch_execute(sql).unwrap();
        if turn % 10 == 9 {
            // The whole server starts again.
            stack.pg.kill_worker();
            eventually("the server", LIMIT, || {
                stack.pg.config("postgres", "postgres").connect(NoTls).ok()
            });
        }
    }
    load.stop();
    let verdict = ledger.settle(&stack, LIMIT);
    assert!(verdict.committed > 400, "only {} events", verdict.committed);
    verdict.assert_exactly_once();
}

#[test]
fn scheduled_events_move_when_the_numbers_have_gone_back() {
    for back in BACK {
        let stack = Stack::start();
        let mut publisher = Publisher::of(&stack.pg);
        publisher.many(20);
        stack.wait_events(20);
        let at = "now() + interval '1 s'";
        for i in 0..20 {
            if i == 10 {
                publisher.run(back);
            }
            let id = publisher.of_query(&format!(
                "select outbox.publish_event('later', 's', scheduled_at => {at})"
            ));
            publisher.published.push(id);
        }
        publisher.run(back);
        assert_arrived(&stack, &publisher.published, back);
    }
}

/// The sequence comes from the dump.
#[test]
fn a_dump_of_the_data_alone_goes_into_a_database_that_has_published() {
    for preloaded in [true, false] {
        let stack = Stack::start();
        stack.pg.exec(PAUSE);
        let mut publisher = Publisher::of(&stack.pg);
        publisher.many(3);
        let ran = stack.pg.run(
            "pg_dump",
            &[
                "-d",
                "postgres",
                "--data-only",
                "-t",
                "outbox.events",
                "-t",
                "outbox.events_seq_seq",
            ],
            "",
        );
        assert!(ran.ok, "{}", ran.stderr);
        let library = if preloaded { "outbox_relay" } else { "" };
        let target = Postgres::with(&[("shared_preload_libraries", library)]).start();
        target.extension();
        target.exec(PAUSE);
        let mut publisher = Publisher::of(&target);
        for _ in 0..9 {
            publisher.run("select outbox.publish_event('own', 's')");
        }
        target.restore("postgres", &ran.stdout);
        for _ in 0..5 {
            publisher.run("select outbox.publish_event('after', 's')");
        }
        let mut fresh = Publisher::of(&target);
        fresh.run("select outbox.publish_event('after', 's')");
        assert_eq!(target.one::<i64>("select count(*) from outbox.events"), 9 + 3 + 6);
        let order: String = target.one(
            "select string_agg(event_type, ',' order by seq) from outbox.events where event_type in ('own', 'after')",
        );
        assert_eq!(
            order,
            format!("{}after,after,after,after,after,after", "own,".repeat(9))
        );
    }
}
