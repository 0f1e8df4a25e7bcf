//! The extension's tables are replicated: the subscriber keeps the rows, and only one server sends them. The procedure
//! from an old server to a new one, as docs/blue-green.md describes it.

use std::time::Duration;

use kit::ledger::{Ledger, Load};
use kit::owners::{LOGICAL, wait_applied};
use kit::{Postgres, Stack, types, wait_drained, wait_eq, wait_until};

/// The new server, with the old one's schema and backends, and a subscription to everything.
fn subscribed(old: &Postgres) -> Postgres {
    subscribed_to(old, "all tables")
}

fn subscribed_to(old: &Postgres, what: &str) -> Postgres {
    let new = Postgres::with(LOGICAL).start();
    for args in [
        &["-d", "postgres", "--schema-only"][..],
        &[
            "-d",
            "postgres",
            "--data-only",
            "--table=outbox.backends",
            "--table=outbox.routes",
            "--table=outbox.publisher_limits",
            "--table=outbox.consumer_grants",
        ],
    ] {
        let ran = old.run("pg_dump", args, "");
        assert!(ran.ok, "{}", ran.stderr);
        new.restore("postgres", &ran.stdout);
    }
    old.exec(&format!("create publication everything for {what}"));
    new.exec(&format!(
        "create subscription old connection 'host={} port=5432 dbname=postgres user=postgres' publication everything",
        old.host().display()
    ));
    wait_until("the tables to be copied", || {
        new.one::<bool>("select count(*) > 0 and bool_and(srsubstate = 'r') from pg_subscription_rel")
    });
    new
}

/// The subscription has had no error.
fn assert_undisturbed(new: &Postgres) {
    let errors =
        "select coalesce(sum(apply_error_count + sync_error_count), 0)::bigint from pg_stat_subscription_stats";
    let log = new.log();
    let told: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("logical replication"))
        .filter(|line| !line.contains("LOG:") && !line.contains("NOTICE:"))
        .collect();
    assert_eq!(new.one::<i64>(errors), 0, "{}", told.join("\n"));
}

fn old_server() -> Stack {
    Stack::with(LOGICAL)
}

/// From the old server to the new one while clients publish: the old one has not sent some events.
#[test]
fn a_new_server_goes_on_where_the_old_one_stopped() {
    for leaves_a_rest in [false, true] {
        let old = old_server();
        old.pg.exec("update outbox.backends set max_len = 0");
        let ledger = Ledger::create(&old.pg);
        let load = Load::start(&old.pg, 2, "");
        load.wait_more(50);
        let new = subscribed(&old.pg);
        load.wait_more(100);
        if leaves_a_rest {
            old.pg.exec("update outbox.backends set enabled = false");
            load.wait_more(50);
        }
        load.stop();
        if !leaves_a_rest {
            wait_drained(&old.pg, "default");
            old.pg.exec("update outbox.backends set enabled = false");
        }
        wait_applied(&old.pg);
        let sent = old.redis.xlen(kit::stack::STREAM);
        let pending: i64 = old.pg.one("select pending from outbox.backend_status");
        assert_eq!(pending > 0, leaves_a_rest, "{pending}");
        assert_undisturbed(&new);
        new.exec("select outbox.take_over('default')");
        new.exec("alter table ledger alter seq restart with 1000000");
        let load = Load::start(&new, 2, "");
        load.wait_more(50);
        load.stop();
        new.exec("drop subscription old");
        assert_eq!(new.one::<i64>("select count(*) from outbox.held_events"), 0);
        let Stack { pg: old_pg, redis } = old;
        let stack = Stack { pg: new, redis };
        let verdict = ledger.settle(&stack, Duration::from_secs(20));
        verdict.assert_exactly_once();
        assert!(
            verdict.committed as i64 > sent as i64 + pending,
            "{}",
            verdict.committed
        );
        drop(old_pg);
    }
}

/// The new server's own worker saves a cursor for the first time at the moment when the old one's arrives.
#[test]
fn a_cursor_that_both_servers_insert_at_once_disturbs_nothing() {
    let old = old_server();
    let new = subscribed(&old.pg);
    let cursor = "insert into outbox.cursors (backend_number, from_snapshot, from_next_xid, from_low_seq, from_high_seq, saved_at, state,
            published_total)
        values (77, '3:3:', '3', 0, 0, now(), 'idle', $)";
    let mut worker = new.client();
    worker.batch_execute("begin").unwrap();
    worker.batch_execute(&cursor.replace('$', "1")).unwrap();
    old.pg.exec(&cursor.replace('$', "2"));
    wait_until("the subscription to wait for the worker", || {
        new.one::<bool>(
            "select exists (select from pg_stat_activity where backend_type like 'logical replication%' and wait_event = 'transactionid')",
        )
    });
    worker.batch_execute("commit").unwrap();
    wait_applied(&old.pg);
    assert_undisturbed(&new);
    let total = |table: &str| {
        new.one::<i64>(&format!(
            "select published_total from outbox.{table} where backend_number = 77"
        ))
    };
    assert_eq!((total("cursors"), total("held_cursors")), (1, 2));
    // Later changes of it still arrive.
    old.pg
        .exec("update outbox.cursors set published_total = 3 where backend_number = 77");
    wait_applied(&old.pg);
    assert_eq!((total("cursors"), total("held_cursors")), (1, 3));
}

/// Nothing is sent twice, no local state of the old server is taken over, and nothing stops the subscription.
#[test]
fn a_subscriber_holds_what_comes_and_keeps_what_it_has() {
    let old = old_server();
    old.redis.call(&["SET", "wrong", "no stream"]);
    let mut client = old.pg.client();
    let mut run = |sql: &str| client.batch_execute(sql).unwrap();
    run("select outbox.publish_event('before ' || i, 's') from generate_series(1, 20) i");
    run("select outbox.set_backend_password('default', 'secret')");
    run("select outbox.set_backend_password('default', null)");
    old.wait_events(20);
    let new = subscribed(&old.pg);
    // With the same numbers as the old one's.
    new.exec("select outbox.publish_event('own ' || i, 's', stream => 'own') from generate_series(1, 50) i");
    old.redis.wait_entries("own", 50);
    wait_drained(&new, "default");
    run("select outbox.publish_event('after ' || i, 's') from generate_series(1, 20) i");
    run("insert into outbox.events (event_type, source) values ('plain', 's')");
    run("select outbox.publish_event('failed', 's', stream => 'wrong', max_retries => 1)");
    run("select outbox.publish_event('soon', 's', scheduled_at => now() + interval '1 s')");
    run(
        "select outbox.publish_event('late', 's', scheduled_at => '2100-01-01', event_id => '018f0000-0000-7000-8000-000000000001')",
    );
    run(
        "select outbox.publish_event('never', 's', scheduled_at => '2100-01-01', event_id => '018f0000-0000-7000-8000-000000000002')",
    );
    run("insert into outbox.backends (name, enabled) values ('other', false)");
    run("select outbox.publish_event('waits', 's', backend => 'other')");
    run("select outbox.set_backend_password('other', 'secret')");
    run("select outbox.take_over('default')");
    wait_eq("a failed event", 1i64, || {
        old.pg.one("select count(*) from outbox.failed_events")
    });
    old.redis.call(&["DEL", "wrong"]);
    run("select outbox.retry_failed()");
    old.redis.wait_entries("wrong", 1);
    old.wait_events(42);
    wait_drained(&old.pg, "default");
    run("delete from outbox.scheduled_events where event_type = 'never'");
    run("update outbox.scheduled_events set scheduled_at = '2101-01-01' where event_type = 'late'");
    run("alter system set outbox_relay.published_retention = 0");
    run("select pg_reload_conf()");
    run("call outbox.purge()");
    wait_until("the old server to purge", || {
        old.pg.one::<i64>("select count(*) from outbox.events") < 5
    });
    run("select outbox.publish_event('last', 's')");
    old.wait_events(43);
    wait_drained(&old.pg, "default");
    wait_applied(&old.pg);
    assert_undisturbed(&new);

    // State that is not replicated is the new server's own.
    let count = |table: &str| new.one::<i64>(&format!("select count(*) from outbox.{table}"));
    assert_eq!(
        (count("backend_passwords"), count("installation"), count("backends")),
        (0, 1, 1)
    );
    assert_ne!(
        new.one::<String>("select id::text from outbox.installation"),
        old.pg.one::<String>("select id::text from outbox.installation")
    );
    assert_eq!(
        new.one::<i64>("select count(*) from outbox.events where event_type like 'own%'"),
        50
    );
    assert_eq!(
        (count("events"), count("restores"), count("refused_events")),
        (50, 0, 0)
    );
    new.exec("select outbox.publish_event('own 51', 's', stream => 'own')");
    old.redis.wait_entries("own", 51);
    assert_eq!(old.redis.xlen("own"), 51);
    old.pg
        .wait_log("WARNING:  publication \"everything\" has tables of outbox_relay that must not leave this server");

    // One scheduled event and one of a backend that is missing here are left.
    old.pg.exec("update outbox.backends set enabled = false");
    new.exec("insert into outbox.backends (name, host, port, stream_name) select 'other', host, port, 'other' from outbox.backends where name = 'default'");
    new.exec("select outbox.take_over('default')");
    new.exec("select outbox.take_over('other')");
    assert_eq!(types(&old.redis.wait_entries("other", 1)), ["waits"]);
    let scheduled =
        "select string_agg(event_type || ' ' || extract(year from scheduled_at), ',') from outbox.scheduled_events";
    assert_eq!(new.one::<String>(scheduled), "late 2101");
    new.exec("update outbox.scheduled_events set scheduled_at = now()");
    new.exec("select outbox.wake()");
    assert_eq!(types(&old.wait_events(44))[43], "late");
    assert_eq!((count("held_events"), count("held_scheduled")), (0, 0));
    assert_eq!(old.redis.xlen("wrong"), 1);
    assert_eq!(old.redis.xlen(kit::stack::STREAM), 44);
}

/// TRUNCATE is replicated, too: it removes rows that the old server has sent, and no row of the new server.
#[test]
fn a_truncate_of_the_old_server_leaves_the_rows_of_the_new_one() {
    let old = old_server();
    let new = subscribed(&old.pg);
    new.exec("update outbox.backends set enabled = false");
    new.exec(
        "select outbox.publish_event('own ' || i, 's', '{\"a\":  1}', stream => 'own') from generate_series(1, 20) i",
    );
    new.exec("select outbox.publish_event('soon', 's', stream => 'own', scheduled_at => '2100-01-01')");
    new.exec("select outbox.set_backend_password('default', null)");
    old.pg
        .exec("select outbox.publish_event('old ' || i, 's') from generate_series(1, 20) i");
    old.wait_events(20);
    wait_drained(&old.pg, "default");
    let tables: Vec<String> = [
        "events",
        "scheduled_events",
        "failed_events",
        "refused_events",
        "backends",
        "backend_passwords",
        "installation",
        "incarnations",
        "ticks",
        "take_overs",
        "restores",
    ]
    .map(|table| format!("(select coalesce(string_agg(t::text, ',' order by t::text), '') from outbox.{table} t)"))
    .to_vec();
    let all = format!("select concat_ws('|', {})", tables.join(", "));
    let before: String = new.one(&all);
    for table in [
        "events",
        "scheduled_events",
        "failed_events",
        "refused_events",
        "cursors",
        "ticks",
        "restores",
        "take_overs",
        "incarnations",
    ] {
        old.pg.exec(&format!("truncate outbox.{table}"));
    }
    wait_applied(&old.pg);
    assert_undisturbed(&new);
    assert_eq!(new.one::<String>(&all), before);
    assert_eq!(new.one::<i64>("select count(*) from outbox.held_events"), 0);
    new.exec("update outbox.backends set enabled = true");
    let expected: Vec<String> = (1..=20).map(|i| format!("own {i}")).collect();
    assert_eq!(types(&old.redis.wait_entries("own", 20)), expected);
}

/// The old server is gone, and nobody knows which events it had sent: they are looked for in the streams.
#[test]
fn events_that_a_lost_server_had_sent_are_found_and_not_repeated() {
    let mut old = old_server();
    let new = subscribed_to(&old.pg, "table outbox.events");
    let expected: Vec<String> = (1..=110).map(|i| format!("n{i}")).collect();
    for event in &expected[..100] {
        old.publish(event);
    }
    old.wait_events(100);
    old.pg.exec("update outbox.backends set enabled = false");
    for event in &expected[100..] {
        old.publish(event);
    }
    wait_applied(&old.pg);
    old.pg.crash();
    assert_eq!(new.one::<i64>("select count(*) from outbox.held_events"), 110);
    new.exec("select outbox.take_over('default')");
    assert_eq!(types(&old.wait_events(110)), expected);
    new.wait_log(
        "100 of the events after its saved position are already in the streams and are not repeated; 10 are sent",
    );
    new.exec("select outbox.publish_event('new', 's')");
    assert_eq!(types(&old.wait_events(111))[110], "new");
}

/// With routes of all events to the backends `default`, `a` and `b`.
fn fanning() -> Stack {
    let old = old_server();
    old.pg.exec(
        "insert into outbox.backends (name, stream_name) values ('a', 'sa'), ('b', 'sb'); update outbox.backends set max_len = 0;
        insert into outbox.routes (backend) values ('default'), ('a'), ('b')",
    );
    for backend in ["a", "b"] {
        old.point(backend, &old.redis);
    }
    old
}

/// They are taken over one after the other.
#[test]
fn each_row_of_an_event_of_several_backends_is_sent_by_one_server() {
    let old = fanning();
    let ledger = Ledger::of_routes(&old.pg, &[("a", "sa"), ("b", "sb")]);
    let load = Load::start(&old.pg, 2, "");
    load.wait_more(30);
    let new = subscribed(&old.pg);
    assert_eq!(new.one::<i64>("select count(*) from outbox.routes"), 3);
    load.wait_more(50);
    old.pg
        .exec("update outbox.backends set enabled = false where name = 'a'");
    load.wait_more(50);
    old.pg.exec(
        "insert into ledger (event_id, backend, key, version) select e.id, b, 'soon', 1
        from (select outbox.publish_event('soon', 'ledger', scheduled_at => '2100-01-01') as id) e, unnest('{default,a,b}'::text[]) b",
    );
    load.stop();
    wait_drained(&old.pg, "b");
    old.pg.exec("update outbox.backends set enabled = false");
    wait_applied(&old.pg);
    assert_undisturbed(&new);
    let count = |sql: &str| new.one::<i64>(&format!("select count(*) from {sql}"));
    assert!(count("outbox.held_events where backend = 'a' and branch = 1") > 90);
    assert_eq!(
        (
            count("outbox.held_scheduled"),
            count("outbox.scheduled_events where scheduled_at = '9999-12-31'"),
            count("outbox.events")
        ),
        (3, 3, 0)
    );
    new.exec("select outbox.take_over('a')");
    assert_eq!(count("outbox.events where backend <> 'a' or branch <> 1"), 0);
    assert_eq!(
        (
            count("outbox.held_events where backend = 'a'"),
            count("outbox.held_scheduled")
        ),
        (0, 2)
    );
    new.exec("select outbox.take_over('default'); select outbox.take_over('b')");
    assert_eq!((count("outbox.held_events"), count("outbox.held_scheduled")), (0, 0));
    new.exec("update outbox.scheduled_events set scheduled_at = now()");
    new.exec("alter table ledger alter seq restart with 1000000");
    let load = Load::start(&new, 2, "");
    load.wait_more(50);
    load.stop();
    new.exec("drop subscription old");
    let Stack { pg: old_pg, redis } = old;
    let stack = Stack { pg: new, redis };
    let verdict = ledger.settle(&stack, Duration::from_secs(20));
    verdict.assert_exactly_once();
    assert_eq!(verdict.committed % 3, 0);
    drop(old_pg);
}

#[test]
fn a_row_that_failed_is_retried_on_the_new_server_alone() {
    let old = fanning();
    old.pg
        .exec("update outbox.routes set stream = 'wrong' where backend = 'a'");
    let new = subscribed(&old.pg);
    old.redis.call(&["SET", "wrong", "no stream"]);
    old.pg.exec("select outbox.publish_event('t', 's', max_retries => 1)");
    wait_eq("a failed row", 1i64, || {
        old.pg.one("select count(*) from outbox.failed_events")
    });
    for backend in ["default", "b"] {
        wait_drained(&old.pg, backend);
    }
    wait_applied(&old.pg);
    assert_undisturbed(&new);
    let failed = "select string_agg(format('%s %s %s', f.backend, f.branch, b.name), ',') from outbox.failed_events f left join outbox.backends b on b.number = f.backend_number";
    assert_eq!(new.one::<String>(failed), "a 1 a");
    old.pg.exec("update outbox.backends set enabled = false");
    wait_applied(&old.pg);
    new.exec("select outbox.take_over(name) from outbox.backends");
    old.redis.call(&["DEL", "wrong"]);
    assert_eq!(new.one::<i64>("select outbox.retry_failed()"), 1);
    assert_eq!(types(&old.redis.wait_entries("wrong", 1)), ["t"]);
    new.exec("select outbox.publish_event('last', 's')");
    for stream in ["events", "wrong", "sb"] {
        assert_eq!(types(&old.redis.wait_entries(stream, 2)), ["t", "last"], "{stream}");
    }
}

/// The old server runs on for a while after the take-over, and moves events that are due, as the new one does.
#[test]
fn an_event_that_becomes_due_on_both_servers_is_sent_once_and_not_held() {
    let old = old_server();
    let soon = "select outbox.publish_event('soon ' || i, 's', scheduled_at => now() + interval '1 day') from generate_series(1, 5) i";
    old.pg.exec(soon);
    let new = subscribed(&old.pg);
    old.pg.exec("update outbox.backends set enabled = false");
    wait_applied(&old.pg);
    new.exec("select outbox.take_over('default')");
    let due = |pg: &Postgres| {
        pg.exec("update outbox.scheduled_events set scheduled_at = now()");
        pg.exec("select outbox.wake()");
    };
    let left = |pg: &Postgres| pg.one::<i64>("select count(*) from outbox.scheduled_events");
    due(&old.pg);
    wait_eq("what is scheduled", 0, || left(&old.pg));
    wait_applied(&old.pg);
    assert_eq!(left(&new), 5);
    assert_eq!(new.one::<i64>("select count(*) from outbox.held_events"), 0);
    due(&new);
    wait_eq("what is scheduled", 0, || left(&new));
    let expected: Vec<String> = (1..=5).map(|i| format!("soon {i}")).collect();
    let entries = old.wait_events(5);
    let mut sent = types(&entries);
    sent.sort();
    assert_eq!(sent, expected);
    new.exec("select outbox.take_over('default')");
    new.exec("select outbox.publish_event('last', 's')");
    assert_eq!(types(&old.wait_events(6))[5], "last");
}

/// The options differ on the new server. What it refuses fails alone, and is published once it is accepted.
#[test]
fn an_event_that_the_new_server_refuses_does_not_stop_the_take_over() {
    let old = old_server();
    let new = subscribed(&old.pg);
    old.pg.exec("update outbox.backends set enabled = false");
    for (event, stream) in [("first", "null"), ("elsewhere", "'elsewhere'"), ("last", "null")] {
        old.pg.exec(&format!(
            "select outbox.publish_event('{event}', 's', stream => {stream})"
        ));
    }
    wait_applied(&old.pg);
    new.exec("update outbox.backends set allowed_streams = '{events}'");
    new.exec("select outbox.take_over('default')");
    assert_eq!(types(&old.wait_events(2)), ["first", "last"]);
    let failed: String = new.one("select string_agg(event_type || ': ' || last_error, ', ') from outbox.failed_events");
    assert!(
        failed.starts_with("elsewhere: ") && failed.contains("\"elsewhere\""),
        "{failed}"
    );
    assert_eq!(new.one::<i64>("select count(*) from outbox.held_events"), 0);
    new.exec("update outbox.backends set allowed_streams = default");
    assert_eq!(new.one::<i64>("select outbox.retry_failed()"), 1);
    assert_eq!(types(&old.redis.wait_entries("elsewhere", 1)), ["elsewhere"]);
}
