//! Each of our functions may be called for many rows in one transaction. A session's memory must not grow with the
//! number of calls.

use kit::process::memory_kb;
use kit::{Stack, wait_drained};
use postgres::Client;

const CALLS: i64 = 400;
/// An exception block of PL/pgSQL keeps 8 kB until the transaction ends, which is Postgres's own.
const MOST_BYTES: i64 = 9_000;

/// Calls of one kind, `$calls` of them, after `$from` others.
const CALLS_OF_EACH: [&str; 20] = [
    "select count(outbox.publish_event('t', 's', '{\"n\": 1}'::jsonb)) from generate_series(1, $calls)",
    "select count(outbox.publish_event('t', 's', '{\"n\": 1}'::jsonb, scheduled_at => now() + interval '1 day')) from generate_series(1, $calls)",
    "select count(*) from generate_series(1, $calls), outbox.publish_events('[{\"event_type\": \"t\", \"source\": \"s\"}]')",
    "select count(n) from (select (select count(*) from outbox.published_here()) n from generate_series(1, $calls)) s",
    "do $do$ begin for n in 1..$calls loop insert into outbox.events (event_type, source) values ('t', 's'); end loop; end $do$",
    "do $do$ begin for n in 1..$calls loop update attached set n = attached.n + 1 where id = 1; end loop; end $do$",
    "select count(outbox.wait_published(event_id)) from (select event_id from outbox.events where event_type = 'kept' offset $from limit $calls) e",
    "select count(outbox.waits(event_id)) from (select event_id from outbox.events where event_type = 'kept' offset $from limit $calls) e",
    "select count(*) from (select event_id from outbox.events where event_type = 'kept' offset $from limit $calls) e, outbox.preview(event_id)",
    "select count(outbox.erase(event_id)) from (select event_id from outbox.events where event_type = 'kept' offset $from limit $calls) e",
    "select count(outbox.retry_failed(event_id => event_id)) from (select event_id from outbox.failed_events limit $calls) e",
    "select count(outbox.discard_failed(event_id => event_id)) from (select event_id from outbox.failed_events limit $calls) e",
    "select count(outbox.replay('default', now() + interval '1 day')) from generate_series(1, $calls)",
    "select count(outbox.consume_once('c', gen_random_uuid())) from generate_series(1, $calls)",
    "select count(outbox.set_backend_password('other', 'p' || g)) from generate_series(1, $calls) g",
    "do $do$ begin for n in 1..$calls loop update outbox.backends set max_len = 100 + n % 9 where name = 'other'; end loop; end $do$",
    "insert into outbox.backends (name, stream_name, enabled) select 'b' || g, 's', false from generate_series($from + 1, $from + $calls) g",
    "do $do$ begin for n in 1..$calls / 10 loop perform from outbox.health(); perform from outbox.metrics; perform from outbox.status; end loop; end $do$",
    "select count(outbox.wake()) from generate_series(1, $calls)",
    // A call grants some thirty rights.
    "do $do$ begin for n in 1..$calls / 20 loop perform outbox.grant_publisher('granted'); perform outbox.revoke_publisher('granted'); end loop; end $do$",
];

/// Of all memory contexts of the session, in bytes.
fn memory(client: &mut Client) -> i64 {
    let sql = "select sum(total_bytes)::bigint from pg_backend_memory_contexts";
    client.query_one(sql, &[]).expect("a superuser").get(0)
}

#[test]
fn a_sessions_memory_does_not_grow_with_the_number_of_calls() {
    let stack = Stack::start();
    stack.pg.exec(
        "insert into outbox.backends (name, stream_name, enabled) values ('other', 'other', false);
         create table attached (id integer primary key, n integer);
         insert into attached values (1, 0);
         create role granted;
         select outbox.attach_table('attached');
         insert into outbox.events (event_type, source) select 'kept', 's' from generate_series(1, 2000)",
    );
    wait_drained(&stack.pg, "default");
    stack.pg.exec(
        "insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend, attempts, last_error)
         select -seq, xid, created_at, gen_random_uuid(), backend_number, 'failed', source, backend, 1, 'e' from outbox.events",
    );
    let mut grown = Vec::new();
    for sql in CALLS_OF_EACH {
        let mut client = stack.pg.client();
        client.batch_execute("begin").expect("begun");
        let mut calls = |from: i64, calls: i64| {
            let sql = sql
                .replace("$from", &from.to_string())
                .replace("$calls", &calls.to_string());
            client
                .batch_execute(&sql)
                .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
            memory(&mut client)
        };
        let warm = calls(0, 50);
        let bytes = (calls(50, CALLS) - warm) / CALLS;
        println!("{bytes} bytes a call: {sql}");
        if bytes > MOST_BYTES {
            grown.push(format!("{bytes} bytes a call: {sql}"));
        }
    }
    assert!(grown.is_empty(), "{}", grown.join("\n"));
}

/// Memory that our code has taken without Postgres's memory contexts shows only in the process.
#[test]
fn a_sessions_memory_does_not_grow_with_what_is_converted_to_utf8() {
    const BYTES: usize = 100_000;
    const CALLS: u64 = 50;
    let stack = Stack::start();
    stack
        .pg
        .exec("create database latin encoding 'LATIN1' locale 'C' template template0");
    stack.pg.exec_db("latin", "create extension outbox_relay");
    let events = format!("jsonb_build_object('event_type', 'é', 'source', 's', 'data', repeat('é', {BYTES}))");
    for call in [
        format!("perform from outbox.publish_events(jsonb_build_array({events}))"),
        format!("perform outbox.publish_event('é', 's', {events})"),
        format!("insert into outbox.events (event_type, source, data) values ('é', 's', {events}::json)"),
        format!("begin perform from outbox.publish_events({events}); exception when others then null; end"),
        format!(
            "begin perform outbox.publish_event('é', 's', {events}, backend => 'é'); exception when others then null; end"
        ),
    ] {
        let mut client = stack.pg.client_db("latin");
        let pid: i32 = client.query_one("select pg_backend_pid()", &[]).unwrap().get(0);
        let mut calls = || {
            let sql = format!("do $do$ begin for n in 1..{CALLS} loop {call}; commit; end loop; end $do$");
            client
                .batch_execute(&sql)
                .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
            memory_kb(pid) * 1024
        };
        let warm = calls();
        let bytes = calls().saturating_sub(warm) / CALLS;
        println!("{bytes} bytes a call: {call}");
        assert!(bytes < BYTES as u64 / 2, "{bytes} bytes a call: {call}");
    }
}
