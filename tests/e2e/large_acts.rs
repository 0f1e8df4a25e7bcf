//! Large acts of an administrator: each ends within a second when it is cancelled, loses nothing, and does not take the
//! longer for each event the more there are.

use std::time::{Duration, Instant};

use kit::{Bystander, Stack, wait_drained, wait_until};

const COUNT: i64 = 30_000;
const OLD_TABLE: &str = include_str!("../django_broadcaster/schema.sql");
const OLD_ROWS: &str = "insert into outbox_events (id, spec_version, event_type, source, subject, data_content_type, data_schema, data, status,
        created_at, updated_at, scheduled_at, retry_count, max_retries, last_error, publisher_backend, publisher_config)
    select gen_random_uuid(), '1.0', 't', 's', '', 'application/json', '', '{}', 'pending', now(), now(), now(), 0, 3, '', '', '{}'
    from generate_series(1, $rows)";

/// Published events, as many failed ones, a table of another outbox, and an attached one.
fn stack() -> Stack {
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "1000")]);
    stack.pg.exec(&format!(
        "insert into outbox.events (event_type, source) select 'kept', 's' from generate_series(1, {COUNT})"
    ));
    wait_drained(&stack.pg, "default");
    stack.pg.exec(
        "insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend, attempts, last_error)
         select -seq, xid, created_at, gen_random_uuid(), backend_number, 'failed', source, backend, 1, 'e' from outbox.events",
    );
    stack.pg.exec(OLD_TABLE);
    stack.pg.exec(&OLD_ROWS.replace("$rows", &COUNT.to_string()));
    stack.pg.exec(&format!(
        "create table attached (id integer primary key, n integer); insert into attached select g, 0 from generate_series(1, {COUNT}) g;
         select outbox.attach_table('attached')"
    ));
    stack
}

/// Each as it was, and nothing on its way.
fn all(stack: &Stack) -> Vec<i64> {
    [
        "outbox.events where event_type = 'kept' and data is null",
        "outbox.events where event_type in ('t', 'failed', 'attached.update')",
        "outbox.failed_events",
        "outbox_events where status = 'pending'",
        "outbox.replays",
        "attached where n = 0",
    ]
    .iter()
    .map(|of| stack.pg.one(&format!("select count(*) from {of}")))
    .collect()
}

/// Cancels a statement of a session once `wait` has returned; how long it took to end then.
#[track_caller]
fn end_of_cancelled(stack: &Stack, sql: &str, wait: impl FnOnce()) -> Duration {
    let mut client = stack.pg.client();
    let token = client.cancel_token();
    std::thread::scope(|scope| {
        let session = scope.spawn(move || {
            let result = client.batch_execute(sql);
            (result, Instant::now())
        });
        wait();
        let at = Instant::now();
        token.cancel_query(postgres::NoTls).expect("cancelled");
        let (result, ended) = session.join().expect("no panic");
        let error = result.expect_err("it was cancelled");
        assert_eq!(error.code().map(|code| code.code()), Some("57014"), "{sql}: {error:?}");
        ended.saturating_duration_since(at)
    })
}

#[test]
fn a_large_act_that_is_cancelled_ends_at_once_and_changes_nothing() {
    let stack = stack();
    let bystander = Bystander::start(&stack);
    let before = all(&stack);
    for sql in [
        "select outbox.replay('default', '-infinity', event_type => 'kept')",
        "select outbox.retry_failed()",
        "select outbox.discard_failed(), pg_sleep(10)",
        "select count(*) from outbox.import_django_broadcaster('outbox_events', false)",
        "select count(*) from outbox.import_django_broadcaster('outbox_events')",
        "select outbox.erase(event_id) from outbox.events where event_type = 'kept'",
        "update attached set n = n + 1",
        "select outbox.publish_events(jsonb_agg('{\"event_type\": \"t\", \"source\": \"s\"}'::jsonb)) from generate_series(1, 300000)",
        "select outbox.wait_published(gen_random_uuid(), '1 min')",
    ] {
        let took = end_of_cancelled(&stack, sql, || std::thread::sleep(Duration::from_millis(150)));
        println!("{took:?}: {sql}");
        assert!(took < Duration::from_secs(1), "{took:?}: {sql}");
        let sql = format!("set statement_timeout = '100ms'; {sql}");
        let start = Instant::now();
        let result = stack.pg.client().batch_execute(&sql);
        let error = result.expect_err("it takes longer");
        assert_eq!(error.code().map(|code| code.code()), Some("57014"), "{sql}: {error:?}");
        assert!(
            start.elapsed() < Duration::from_millis(1_100),
            "{:?}: {sql}",
            start.elapsed()
        );
    }
    assert_eq!(all(&stack), before);
    bystander.stop(&stack).assert_undisturbed("large acts");
}

/// What it has committed is done, and it goes on when it is called again.
#[test]
fn a_large_act_that_commits_as_it_goes_can_be_cancelled_and_called_again() {
    let stack = stack();
    let failed = || -> i64 { stack.pg.one("select count(*) from outbox.failed_events") };
    let has_begun = || wait_until("a first piece", || failed() < COUNT);
    let took = end_of_cancelled(&stack, "call outbox.retry_all_failed()", has_begun);
    assert!(took < Duration::from_secs(1), "{took:?}");
    let left = failed();
    println!("{took:?}, {left} left");
    assert!(0 < left && left < COUNT, "{left} left");
    stack.pg.exec("call outbox.retry_all_failed()");
    assert_eq!(failed(), 0);
    let published = || -> i64 {
        stack
            .pg
            .one("select count(*) from outbox.events where event_type = 'failed'")
    };
    assert_eq!(published(), COUNT);
    let sent = || -> i64 {
        stack
            .pg
            .one("select published_total from outbox.backend_status where backend = 'default'")
    };
    wait_until("all to be sent", || sent() == 2 * COUNT);
}

/// The planner knows nothing of a table that has just grown. What is asked for each event, or again and again, must not
/// read all of it.
#[test]
fn no_event_is_looked_up_by_reading_all_of_them() {
    let stack = stack();
    let id: uuid::Uuid = stack.pg.one("select event_id from outbox.events order by seq limit 1");
    stack
        .pg
        .exec("delete from outbox_events where id not in (select id from outbox_events limit 20)");
    let read = || -> i64 {
        let sql = "select sum(seq_tup_read)::bigint from pg_stat_user_tables
            where relid in ('outbox.events'::regclass, 'outbox.failed_events'::regclass, 'outbox.refused_events'::regclass)";
        stack.pg.one(sql)
    };
    for sql in [
        format!("select outbox.wait_published('{id}')"),
        format!("select outbox.waits('{id}')"),
        format!("select outbox.erase('{id}')"),
        format!("select outbox.preview('{id}')"),
        "select outbox.wait_published(gen_random_uuid(), '100 ms')".to_owned(),
        "select outbox.drain()".to_owned(),
        "select outbox.retry_failed(event_id => gen_random_uuid())".to_owned(),
        "select outbox.retry_failed(event_type => 'failed')".to_owned(),
        "select count(*) from outbox.import_django_broadcaster('outbox_events', false)".to_owned(),
        "select outbox.published_here()".to_owned(),
        "insert into attached values (-1, 0); update attached set n = 5 where id = -1".to_owned(),
    ] {
        let before = read();
        stack.pg.exec(&sql);
        let rows = read() - before;
        println!("{rows} rows were read: {sql}");
        assert!(rows < COUNT / 10, "{rows} rows were read: {sql}");
    }
}

/// A paused backend's cursor stays where it is. Whoever looks at the others must not compare all events since then with
/// their cursors.
#[test]
fn a_paused_backend_does_not_make_looking_at_the_others_slow() {
    const COUNT: i64 = 2_000;
    let stack = Stack::start();
    stack
        .pg
        .exec("insert into outbox.backends (name, stream_name, enabled) values ('paused', 's', false)");
    stack.publish("first");
    wait_drained(&stack.pg, "paused");
    stack.pg.exec(&format!(
        "insert into outbox.events (event_type, source) select 't', 's' from generate_series(1, {COUNT})"
    ));
    wait_drained(&stack.pg, "default");
    assert!(stack.pg.one::<bool>("select outbox.drain()"));
    // It is called for each event that is compared with a cursor.
    let sql = "select coalesce(sum(calls), 0)::bigint from pg_stat_xact_user_functions
        where schemaname = 'outbox' and funcname = 'hash_slot'";
    let mut client = stack.pg.client();
    for looks in [
        "select outbox.drain()",
        "select count(*) from outbox.event_status where status = 'pending'",
    ] {
        client
            .batch_execute(&format!("begin; set local track_functions = 'all'; {looks}"))
            .unwrap();
        let compared: i64 = client.query_one(sql, &[]).unwrap().get(0);
        assert!(compared < COUNT / 10, "{compared} events were compared: {looks}");
        client.batch_execute("commit").unwrap();
    }
    // Its own events are still waited for.
    client
        .batch_execute("select outbox.publish_event('t', 's', backend => 'paused')")
        .unwrap();
    assert!(!stack.pg.one::<bool>("select outbox.drain('100 ms')"));
    let pending = "select count(*) from outbox.event_status where status = 'pending'";
    assert_eq!(stack.pg.one::<i64>(pending), 1);
}
