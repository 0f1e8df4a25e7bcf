//! What a DBA does by hand: wait until everything is sent, discard failed events, look at the top view.

use kit::{Postgres, QUICK, Redis, Stack, publish_many, wait_drained, wait_eq};
use uuid::Uuid;

fn quick() -> Stack {
    Stack::of(Postgres::with(QUICK), Redis::start())
}

fn drain(stack: &Stack, timeout: &str) -> bool {
    stack.pg.one(&format!("select outbox.drain('{timeout}')"))
}

#[test]
fn drain_waits_for_all_that_was_committed_before_it() {
    let mut stack = quick();
    assert!(drain(&stack, "5 s"), "nothing was published");
    publish_many(&mut stack.pg.client(), "default", "", "event", 3_000);
    assert!(drain(&stack, "10 s"));
    assert_eq!(stack.events().len(), 3_000);
    // Uncommitted events of other sessions are not waited for.
    let mut open = stack.pg.client();
    open.batch_execute("begin; select outbox.publish_event('open', 'kit')")
        .expect("it publishes");
    assert!(drain(&stack, "10 s"));
    open.batch_execute("commit").expect("it commits");
    assert!(drain(&stack, "10 s"));
    assert_eq!(stack.events().len(), 3_001);
    stack.redis.kill9();
    stack.publish("waits");
    assert!(!drain(&stack, "100 ms"), "Redis is down");
    stack.redis.start_again();
    assert!(drain(&stack, "10 s"), "it wakes the worker");
}

#[test]
fn drain_does_not_take_a_refused_or_paused_event_for_sent() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[("outbox_relay.max_retries", "1000")]),
        Redis::start(),
    );
    stack.redis.call(&["SET", "wrong", "no stream"]);
    stack
        .pg
        .exec("select outbox.publish_event('refused', 'kit', stream => 'wrong')");
    wait_eq("refused events", 1, || {
        stack.pg.one::<i64>("select count(*) from outbox.refused_events")
    });
    assert!(!drain(&stack, "100 ms"));
    stack.redis.call(&["DEL", "wrong"]);
    assert!(drain(&stack, "10 s"));
    stack.pg.exec("update outbox.backends set enabled = false");
    stack.publish("paused");
    assert!(!drain(&stack, "100 ms"));
    stack.pg.exec("update outbox.backends set enabled = true");
    assert!(drain(&stack, "10 s"));
}

#[test]
fn discarded_events_are_gone_for_good() {
    let stack = quick();
    stack.fail("default", &["one", "one", "two"]);
    let failed = || stack.pg.one::<i64>("select count(*) from outbox.failed_events");
    stack.pg.exec("begin; select outbox.discard_failed(); rollback");
    assert_eq!(failed(), 3, "it is transactional");
    let discarded: i64 = stack.pg.one("select outbox.discard_failed(event_type => 'one')");
    assert_eq!((discarded, failed()), (2, 1));
    // They are not said to be published, and nothing sends them later.
    let statuses = "select string_agg(event_type || ' ' || status, ',') from outbox.event_status";
    assert_eq!(stack.pg.one::<String>(statuses), "two failed");
    stack.redis.call(&["DEL", "wrong"]);
    assert_eq!(stack.pg.one::<i64>("select outbox.replay('default', '-infinity')"), 0);
    stack
        .pg
        .exec("insert into outbox.backends (name, enabled) values ('other', false)");
    assert_eq!(stack.pg.one::<i64>("select outbox.discard_failed('other')"), 0);
    assert_eq!(stack.pg.one::<i64>("select outbox.discard_failed('default')"), 1);
    stack.pg.wait_log("2 failed events were discarded");
    assert_eq!(stack.pg.one::<i64>("select outbox.retry_failed()"), 0);
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.event_status"), 0);
    assert_eq!(stack.redis.xlen("wrong"), 0);
    stack.pg.exec("create role nobody login");
    let refused = stack
        .pg
        .client_as("nobody", "postgres")
        .execute("select outbox.discard_failed()", &[])
        .expect_err("it is not for everybody");
    assert_eq!(refused.code().map(|code| code.code()), Some("42501"));
}

/// Events belong to their backend, whatever it is called, as `retry_failed` and the views have it.
#[test]
fn failed_events_of_a_renamed_backend_are_discarded_by_its_new_name() {
    let stack = quick();
    stack.fail("default", &["one"]);
    stack.pg.exec(
        "update outbox.backends set name = 'renamed' where name = 'default';
         insert into outbox.backends (name, enabled) values ('default', false)",
    );
    let of = |backend: &str| {
        let status =
            format!("select count(*) from outbox.event_status where status = 'failed' and backend = '{backend}'");
        let discard = format!("select outbox.discard_failed(backend => '{backend}')");
        (stack.pg.one::<i64>(&status), stack.pg.one::<i64>(&discard))
    };
    assert_eq!((of("default"), of("renamed")), ((0, 0), (1, 1)));
    // What is left of a deleted backend has the name that this had.
    stack.fail("renamed", &["two"]);
    stack.pg.exec("delete from outbox.backends where name = 'renamed'");
    assert_eq!((of("default"), of("renamed")), ((0, 0), (1, 1)));
}

#[test]
fn one_screen_shows_what_each_backend_is_doing() {
    let stack = quick();
    stack.pg.exec(
        "insert into outbox.backends (name, host, port, stream_name) values
            (repeat('a', 63), repeat('h', 63), 1, 's')",
    );
    publish_many(&mut stack.pg.client(), "default", "", "event", 10);
    wait_drained(&stack.pg, "default");
    wait_eq("the state of the other", "misconfigured".to_string(), || {
        stack
            .pg
            .one::<String>("select state from outbox.top where backend like 'aaa%'")
    });
    let shown = stack
        .pg
        .psql(&["-d", "postgres", "-c", "select * from outbox.top"])
        .stdout;
    assert!(shown.contains("default"), "{shown}");
    for line in shown.lines() {
        assert!(line.chars().count() <= 100, "{} columns: {line}", line.chars().count());
    }
}

/// Names in other scripts or with control characters, long states and rates.
#[test]
fn one_screen_is_enough_whatever_backends_are_called() {
    let stack = quick();
    stack.pg.exec(
        "insert into outbox.backends (name, host, port, stream_name, max_rate) values
            (repeat('a', 63), repeat('h', 63), 1, 's', 2147483647), (repeat('日', 20), '127.0.0.1', 1, 's', null),
            (E'a\\nb\\x1b\\u009f' || repeat('x', 20), '127.0.0.1', 1, 's', null), (repeat('é', 20), '127.0.0.1', 1, 's', null)",
    );
    let states = "select count(*) from outbox.top where state in ('misconfigured', 'backoff')";
    wait_eq("the states", 4, || stack.pg.one::<i64>(states));
    stack.pg.exec(
        "alter table outbox.cursors disable trigger all; update outbox.cursors set events_per_second = 99999, saved_at = now()",
    );
    let shown = stack
        .pg
        .psql(&["-d", "postgres", "-c", "select * from outbox.top"])
        .stdout;
    for line in shown.lines() {
        let wide = line.chars().filter(|letter| *letter == '日').count();
        let columns = line.chars().count() + wide;
        assert!(columns <= 100, "{columns} columns: {line}");
    }
    for name in ["日日日日日 ", "éééééééééé", "a?b??xxxxx"] {
        assert!(shown.contains(name), "{name}: {shown}");
    }
}

#[test]
fn publishers_wait_for_their_own_events_and_learn_nothing_of_others() {
    let stack = quick();
    stack.pg.exec(
        "create role app login; create role other login; create role team login; create role colleague login in role team;
         create role watcher login in role pg_monitor; create role wrapper login;
         select outbox.grant_publisher(r) from unnest('{app,other,team,colleague,wrapper}'::text[]) r;
         create function public.by_wrapper() returns uuid language sql security definer as $$
            select outbox.publish_event('wrapped', 'kit') $$;
         alter function public.by_wrapper() owner to wrapper",
    );
    let publish = |role: &str, sql: &str| -> Uuid {
        let mut client = stack.pg.client_as(role, "postgres");
        client.query_one(sql, &[]).expect("it publishes").get(0)
    };
    let sees = |role: &str, id: Uuid| -> bool {
        let mut client = stack.pg.client_as(role, "postgres");
        let sql = "select outbox.wait_published($1, '0')";
        client.query_one(sql, &[&id]).expect("it may ask").get(0)
    };
    let of_app = publish("app", "select outbox.publish_event('by call', 'kit')");
    let inserted = Uuid::new_v4();
    let insert = "insert into outbox.events (event_id, event_type, source) values ($1, 'by insert', 'kit')";
    let mut app = stack.pg.client_as("app", "postgres");
    app.execute(insert, &[&inserted]).expect("it publishes");
    let scheduled = publish(
        "app",
        "select outbox.publish_event('by time', 'kit', scheduled_at => now() + interval '300 ms')",
    );
    let wrapped = publish("app", "select public.by_wrapper()");
    let of_team = publish("team", "select outbox.publish_event('of a team', 'kit')");
    // From another session than the one that published.
    for id in [of_app, inserted, scheduled, wrapped] {
        let mut client = stack.pg.client_as("app", "postgres");
        let sent: bool = client
            .query_one("select outbox.wait_published($1)", &[&id])
            .expect("its own")
            .get(0);
        assert!(sent);
    }
    wait_drained(&stack.pg, "default");
    for id in [of_app, inserted, scheduled, wrapped] {
        assert!(!sees("other", id) && !sees("wrapper", id) && sees("watcher", id));
    }
    assert!(sees("colleague", of_team) && sees("team", of_team) && !sees("app", of_team));
    // A replayed or retried event still belongs to its publisher.
    assert_eq!(stack.pg.one::<i64>("select outbox.replay('default', '-infinity')"), 5);
    wait_eq("the replay", true, || sees("app", of_app));
    assert!(!sees("other", of_app));
    // With SET ROLE, the session counts as the role that is set.
    let mut admin = stack.pg.client();
    admin.batch_execute("set role other").expect("a superuser may");
    let row = admin
        .query_one("select outbox.wait_published($1, '0')", &[&of_app])
        .expect("it may ask");
    assert!(!row.get::<_, bool>(0));
    let refused = stack
        .pg
        .client_as("other", "postgres")
        .batch_execute("select published_by from outbox.events");
    assert_eq!(
        refused.expect_err("no right").code().map(|code| code.code()),
        Some("42501")
    );
}

/// As a statement of its own, in a database whose transactions have this isolation: its snapshot is as old as the call.
#[test]
fn waiting_sees_what_is_sent_meanwhile_in_any_isolation() {
    let stack = quick();
    for isolation in ["read committed", "repeatable read", "serializable"] {
        stack.pg.exec("update outbox.backends set enabled = false");
        let id = stack.publish(isolation);
        let ask = |call: &str| {
            let mut client = stack.pg.client();
            let set = format!("set default_transaction_isolation = '{isolation}'");
            client.batch_execute(&set).expect("it is set");
            let query = format!("select outbox.{call}");
            std::thread::spawn(move || client.query_one(&query, &[]).map(|row| row.get::<_, bool>(0)))
        };
        let waiting = [ask("drain('5 s')"), ask(&format!("wait_published('{id}', '5 s')"))];
        let waits = "select count(*) from pg_stat_activity where state = 'active' and query ~ '^select outbox'";
        wait_eq("sessions that wait", 2, || stack.pg.one::<i64>(waits));
        stack.pg.exec("update outbox.backends set enabled = true");
        for waiting in waiting {
            let sent = waiting.join().expect("it does not panic");
            assert!(sent.expect("it waits"), "{isolation}");
        }
    }
}
