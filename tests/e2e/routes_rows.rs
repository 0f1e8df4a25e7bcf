//! The rows of an event that routes send to several streams: one id, which is never used twice; all rows or none; each
//! with its own retries, retention and place in a dump.

use std::time::Duration;

use crate::routes::{run, start, taken};
use kit::{Ledger, Load, Postgres, Refused, Stack, wait_drained, wait_eq, wait_until};
use postgres::Client;
use uuid::Uuid;

const ID: &str = "'10000000-0000-4000-8000-000000000001'";

/// Both servers, and routes of all events to the backends `default`, `a` and `b`.
fn fanning() -> (Stack, Client) {
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "0")]);
    let mut client = stack.pg.client();
    run(
        &mut client,
        "insert into outbox.backends (name, stream_name) values ('a', 'sa'), ('b', 'sb');
         insert into outbox.routes (backend) values ('default'), ('a'), ('b')",
    );
    for backend in ["a", "b"] {
        stack.point(backend, &stack.redis);
    }
    (stack, client)
}

#[test]
fn a_used_id_is_refused_while_any_of_its_rows_is_left() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "insert into outbox.routes (event_type, backend) values ('t', 'a'), ('t', 'b'), ('t', 'c')",
    );
    let ways = [
        format!("select outbox.publish_event('t', 's', event_id => {ID})"),
        format!("select outbox.publish_event('other', 's', event_id => {ID})"),
        format!("select outbox.publish_event('other', 's', event_id => {ID}, scheduled_at => '2100-01-01')"),
        format!("insert into outbox.events (event_type, source, event_id) values ('other', 's', {ID})"),
        format!("insert into outbox.events (event_type, source, event_id, branch) values ('other', 's', {ID}, 9)"),
        format!(
            "select outbox.publish_events(jsonb_build_array(jsonb_build_object('event_type', 't', 'source', 's', 'event_id', {ID})))"
        ),
    ];
    for gone in ["false", "branch = 0", "branch <> 2"] {
        run(&mut c, &ways[0]);
        run(&mut c, &format!("delete from outbox.events where {gone}"));
        let rows: i64 = pg.one("select count(*) from outbox.events");
        for way in &ways {
            assert_eq!(Refused::of(c.execute(way, &[])).code, "23505", "{way}, without {gone}");
            // The same from within a function.
            let inner = format!(
                "do $$ begin {} ; end $$",
                way.replace("select outbox", "perform outbox")
            );
            assert_eq!(
                Refused::of(c.execute(&inner, &[])).code,
                "23505",
                "{inner}, without {gone}"
            );
        }
        for target in ["", "(event_id)"] {
            let sql = format!(
                "insert into outbox.events (event_type, source, event_id) values ('t', 's', {ID}) on conflict {target} do nothing"
            );
            assert_eq!(c.execute(&sql, &[]).expect("left out"), 0);
        }
        assert_eq!(pg.one::<i64>("select count(*) from outbox.events"), rows);
        run(&mut c, "delete from outbox.events");
    }
    // Also of a scheduled event.
    run(
        &mut c,
        &format!("select outbox.publish_event('t', 's', event_id => {ID}, scheduled_at => '2100-01-01')"),
    );
    for way in &ways {
        assert_eq!(Refused::of(c.execute(way, &[])).code, "23505", "{way}, scheduled");
    }
    assert_eq!(taken(&mut c), ["t>a", "t>b", "t>c"]);
}

#[test]
fn two_sessions_with_one_id_publish_it_once() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "insert into outbox.routes (event_type, backend) values ('t', 'a'), ('t', 'b'), ('u', 'b'), ('u', 'a')",
    );
    let ways = [
        format!("select outbox.publish_event('t', 's', event_id => {ID})"),
        format!("insert into outbox.events (event_type, source, event_id) values ('t', 's', {ID})"),
        format!(
            "insert into outbox.events (event_type, source, event_id) values ('u', 's', {ID}) on conflict (event_id) do nothing"
        ),
        format!("select outbox.publish_event('default', 's', event_id => {ID})"),
    ];
    for first in &ways {
        for second in &ways {
            for commits in [true, false] {
                run(&mut c, "begin");
                run(&mut c, first);
                let mut other = pg.client();
                let sql = second.clone();
                let waiting = std::thread::spawn(move || other.batch_execute(&sql));
                wait_until("the second session to wait for the first", || {
                    pg.one::<bool>("select exists (select from pg_stat_activity where wait_event_type = 'Lock' and wait_event = 'transactionid')")
                });
                run(&mut c, if commits { "commit" } else { "rollback" });
                let outcome = waiting.join().expect("the second session");
                let rows = taken(&mut c);
                let way = format!("{first}, {second}, commits {commits}: {rows:?}");
                let expected_of = if commits { first } else { second };
                let (expected, fails) = (
                    match expected_of {
                        way if way.contains("'u'") => vec!["u>b", "u>a"],
                        way if way.contains("'default'") => vec!["default>default"],
                        _ => vec!["t>a", "t>b"],
                    },
                    commits && !second.contains("on conflict"),
                );
                assert_eq!(rows, expected, "{way}");
                match outcome {
                    Err(error) if fails => assert_eq!(error.code().expect("a code").code(), "23505", "{way}"),
                    outcome => outcome.unwrap_or_else(|error| panic!("{way}: {error:?}")),
                }
            }
        }
    }
}

#[test]
fn all_rows_of_an_event_are_there_or_none() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "insert into outbox.routes (event_type, backend) values ('t*', 'a'), ('t*', 'b');
         create function leave_out() returns trigger language plpgsql as $$ begin
             return case when new.event_type = 'tz' then null else new end; end $$;
         create trigger leave_out before insert on outbox.events for each row execute function leave_out()",
    );
    // If the first row is skipped, so are the others; because of a trigger on the table, a statement inserts them.
    for way in [
        "select outbox.publish_event('tz', 's')",
        "insert into outbox.events (event_type, source) values ('tz', 's')",
    ] {
        run(&mut c, way);
        assert_eq!(taken(&mut c), [""; 0], "{way}");
        run(&mut c, &way.replace("tz", "t"));
        assert_eq!(taken(&mut c), ["t>a", "t>b"], "{way}");
    }
    run(
        &mut c,
        "insert into outbox.events (event_type, source) values ('t1', 's'), ('tz', 's'), ('t2', 's')",
    );
    assert_eq!(taken(&mut c), ["t1>a", "t1>b", "t2>a", "t2>b"]);
    // If one of its rows is refused, the event fails, with the statement or its subtransaction.
    run(
        &mut c,
        "drop trigger leave_out on outbox.events;
         alter table outbox.events add constraint not_in_b check (not (event_type = 'tx' and backend = 'b'))",
    );
    for way in [
        "select outbox.publish_event('tx', 's')",
        "insert into outbox.events (event_type, source) values ('tx', 's')",
        "insert into outbox.events (event_type, source) values ('tx', 's'), ('t', 's')",
        "begin; select outbox.publish_event('tx', 's'); commit",
    ] {
        assert_eq!(Refused::of(c.batch_execute(way)).code, "23514", "{way}");
        run(&mut c, "rollback");
        run(
            &mut c,
            &format!(
                "begin; select outbox.publish_event('t1', 's');
                do $$ begin {}; exception when check_violation then null; end $$;
                insert into outbox.events (event_type, source) values ('t2', 's'); commit",
                way.replace("begin;", "")
                    .replace("; commit", "")
                    .replace("select outbox", "perform outbox")
            ),
        );
        assert_eq!(taken(&mut c), ["t1>a", "t1>b", "t2>a", "t2>b"], "{way}");
    }
    run(&mut c, "alter table outbox.events drop constraint not_in_b");
    // If the trigger that inserts them is missing, further rows would be lost.
    run(&mut c, "alter table outbox.events disable trigger fan_out");
    let refused = Refused::of(c.execute("insert into outbox.events (event_type, source) values ('t', 's')", &[]));
    assert_eq!(
        (refused.code.as_str(), refused.message.as_str()),
        ("55000", "the trigger fan_out is missing or disabled")
    );
    run(
        &mut c,
        "insert into outbox.events (event_type, source) values ('other', 's'); select outbox.publish_event('t', 's')",
    );
    assert_eq!(taken(&mut c), ["other>default", "t>a", "t>b"]);
    run(&mut c, "alter table outbox.events enable always trigger fan_out");
    // A trigger that publishes more events while a row of a statement is being inserted.
    run(
        &mut c,
        "create function publish_more() returns trigger language plpgsql as $$ begin
             if new.event_type = 't' and pg_trigger_depth() = 1 then
                 insert into outbox.events (event_type, source) values ('t inner', 's');
                 perform outbox.publish_event('t call', 's');
             end if;
             return new; end $$;
         create trigger publish_more before insert on outbox.events for each row execute function publish_more()",
    );
    run(
        &mut c,
        "insert into outbox.events (event_type, source) values ('t', 's'), ('t1', 's')",
    );
    let mut rows = taken(&mut c);
    rows.sort();
    let both = |name: &str| [format!("{name}>a"), format!("{name}>b")];
    // The further row of the first event fires the trigger again, at another depth.
    assert_eq!(rows, [both("t call"), both("t inner"), both("t1"), both("t")].concat());
}

#[test]
fn one_stream_that_refuses_an_event_fails_that_row_alone() {
    let (stack, mut client) = fanning();
    stack.redis.call(&["SET", "sb", "no stream"]);
    let id: Uuid = client
        .query_one(
            "select outbox.publish_event('t', 's', '{\"a\": 1}', max_retries => 1)",
            &[],
        )
        .expect("published")
        .get(0);
    wait_eq("one row to fail", 1, || {
        stack
            .pg
            .one::<i64>("select count(*) from outbox.failed_events where backend = 'b' and branch = 2")
    });
    wait_eq("the others", (1, 1), || {
        (stack.events().len(), stack.redis.entries("sa").len())
    });
    let waited = |limit: &str| {
        stack
            .pg
            .one::<bool>(&format!("select outbox.wait_published('{id}', '{limit}')"))
    };
    assert!(!waited("300 ms"), "one row has failed");
    let statuses = "select string_agg(backend || ' ' || status, ', ' order by backend) from outbox.event_status";
    wait_eq(
        "the statuses",
        "a published, b failed, default published".to_owned(),
        || stack.pg.one::<String>(statuses),
    );
    // The retry of one row neither waits for another nor affects any.
    run(
        &mut client,
        "update outbox.backends set enabled = false where name = 'a'",
    );
    let other: Uuid = client
        .query_one("select outbox.publish_event('u', 's', max_retries => 1)", &[])
        .expect("published")
        .get(0);
    wait_eq("it to fail there, too", 2, || {
        stack
            .pg
            .one::<i64>("select count(*) from outbox.failed_events where backend = 'b'")
    });
    stack.redis.call(&["DEL", "sb"]);
    let retried: i64 = stack.pg.one("select outbox.retry_failed(backend => 'b')");
    assert_eq!(retried, 2);
    assert_eq!(stack.redis.wait_entries("sb", 2).len(), 2);
    assert!(waited("10 s"));
    assert!(
        !stack
            .pg
            .one::<bool>(&format!("select outbox.wait_published('{other}', '300 ms')"))
    );
    run(&mut client, "update outbox.backends set enabled = true");
    assert!(
        stack
            .pg
            .one::<bool>(&format!("select outbox.wait_published('{other}')"))
    );
    for stream in ["events", "sa", "sb"] {
        let ids: Vec<String> = stack
            .redis
            .entries(stream)
            .iter()
            .map(|e| e.field("event_id").to_owned())
            .collect();
        assert_eq!(ids, [id.to_string(), other.to_string()], "{stream}");
    }
    // A question by id is about all rows.
    let preview: Vec<String> = stack.pg.one(&format!("select outbox.preview('{id}')"));
    assert_eq!(preview[..2], ["XADD", "events"]);
    assert_eq!(stack.pg.one::<i64>("select outbox.replay('a', '-infinity')"), 2);
    assert_eq!(stack.redis.wait_entries("sa", 4).len(), 4);
    wait_drained(&stack.pg, "a");
    assert!(stack.pg.one::<bool>(&format!("select outbox.erase('{id}')")));
    assert_eq!(
        stack.pg.one::<i64>(&format!(
            "select count(*) from outbox.events where event_id = '{id}' and data is null"
        )),
        3
    );
    assert_eq!((stack.events().len(), stack.redis.entries("sb").len()), (2, 2));
}

#[test]
fn a_scheduled_event_is_routed_when_it_is_published() {
    let (stack, mut client) = fanning();
    run(
        &mut client,
        "select outbox.publish_event('soon', 's', scheduled_at => now() + interval '1 s');
         select outbox.publish_event('far', 's', scheduled_at => '2100-01-01');
         delete from outbox.routes where backend = 'b'; insert into outbox.routes (backend, stream) values ('a', 'later')",
    );
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.scheduled_events"), 6);
    for stream in ["events", "sa", "sb"] {
        assert_eq!(stack.redis.wait_entries(stream, 1)[0].field("event_type"), "soon");
    }
    assert_eq!(stack.redis.xlen("later"), 0);
    run(
        &mut client,
        "update outbox.scheduled_events set scheduled_at = now() where branch = 1",
    );
    // After that has committed.
    run(&mut client, "select outbox.wake()");
    assert_eq!(stack.redis.wait_entries("sa", 2)[1].field("event_type"), "far");
    run(&mut client, "update outbox.scheduled_events set scheduled_at = now()");
    // After that has committed.
    run(&mut client, "select outbox.wake()");
    for stream in ["events", "sb"] {
        assert_eq!(stack.redis.wait_entries(stream, 2)[1].field("event_type"), "far");
    }
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.failed_events"), 0);
}

#[test]
fn a_dump_brings_the_routes_and_each_row_once() {
    for arguments in [&["-d", "postgres"][..], &["-d", "postgres", "--inserts"]] {
        let (stack, mut client) = fanning();
        run(
            &mut client,
            "update outbox.backends set enabled = false where name <> 'default'",
        );
        for i in 1..=20 {
            run(&mut client, &format!("select outbox.publish_event('t{i}', 's')"));
        }
        run(
            &mut client,
            "select outbox.publish_event('soon', 's', scheduled_at => '2100-01-01')",
        );
        stack.wait_events(20);
        wait_drained(&stack.pg, "default");
        let dump = stack.pg.run("pg_dump", arguments, "");
        assert!(dump.ok, "{}", dump.stderr);
        // Sent there after the dump was taken: the copy finds it.
        run(
            &mut client,
            "update outbox.backends set enabled = true where name = 'a'",
        );
        stack.redis.wait_entries("sa", 20);
        wait_drained(&stack.pg, "a");
        stack.pg.set("outbox_relay.enabled", "off");
        let new = Postgres::start();
        new.exec("create database other");
        new.restore("other", &dump.stdout);
        let counts = "select format('%s %s %s', (select count(*) from outbox.routes), (select count(*) from outbox.events), (select count(*) from outbox.scheduled_events))";
        assert_eq!(new.one_db::<String>("other", counts), "3 40 3");
        new.exec_db(
            "other",
            "update outbox.backends set enabled = true; select outbox.take_over(name) from outbox.backends",
        );
        assert_eq!(stack.redis.wait_entries("sb", 20).len(), 20);
        new.exec_db("other", "select outbox.publish_event('after', 's')");
        for (stream, count) in [("events", 21), ("sa", 21), ("sb", 21)] {
            let entries = stack.redis.wait_entries(stream, count);
            assert_eq!(entries.len(), count, "{stream}");
            assert_eq!(entries[count - 1].field("event_type"), "after");
        }
        assert_eq!(
            new.one_db::<i64>("other", "select max(number)::bigint from outbox.routes"),
            3
        );
        new.exec_db(
            "other",
            "insert into outbox.routes (event_type, backend) values ('next', 'a')",
        );
    }
}

#[test]
fn a_killed_worker_or_server_loses_and_repeats_no_row_of_any_stream() {
    let (mut stack, client) = fanning();
    let ledger = Ledger::of_routes(&stack.pg, &[("a", "sa"), ("b", "sb")]);
    drop(client);
    let load = Load::start(&stack.pg, 3, "");
    for round in 0..4 {
        load.wait_more(100);
        if round % 2 == 0 {
            stack.pg.kill_worker();
        } else {
            stack.pg.kill9();
            stack.pg.start_again();
        }
        stack.pg.wait_worker("postgres");
    }
    load.wait_more(100);
    load.stop();
    let verdict = ledger.settle(&stack, Duration::from_secs(60));
    verdict.assert_exactly_once();
    assert_eq!(verdict.committed % 3, 0);
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.failed_events"), 0);
}
