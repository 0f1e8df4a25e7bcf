//! Publishing inside transactions of every kind: committed events arrive, others never do.

use std::time::{Duration, Instant};

use kit::{Refused, Stack, ids, types};
use postgres::Client;

/// Publishes a marker and returns the stream up to it: all events before it have arrived.
#[track_caller]
fn stream_up_to_marker(stack: &Stack) -> Vec<String> {
    let marker = stack.publish("marker");
    kit::wait_until("the marker to arrive", || ids(&stack.events()).last() == Some(&marker));
    types(&stack.events()).iter().map(|name| name.to_string()).collect()
}

#[test]
fn ten_thousand_events_of_one_transaction_arrive_in_order() {
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "0")]);
    let mut client = stack.pg.client();
    client.batch_execute("begin").unwrap();
    client
        .batch_execute(
            "do $$ begin for i in 1..5000 loop perform outbox.publish_event('n' || i, 's'); end loop; end $$",
        )
        .unwrap();
    client
        .batch_execute(
            "insert into outbox.events (event_type, source) select 'n' || i, 's' from generate_series(5001, 9000) i",
        )
        .unwrap();
    client
        .batch_execute(
            "select outbox.publish_events((select jsonb_agg(jsonb_build_object('event_type', 'n' || i, 'source', 's') order by i) \
             from generate_series(9001, 10000) i))",
        )
        .unwrap();
    assert_eq!(stack.events().len(), 0);
    client.batch_execute("commit").unwrap();
    let entries = stack.wait_events(10_000);
    let expected: Vec<String> = (1..=10_000).map(|i| format!("n{i}")).collect();
    assert_eq!(types(&entries), expected);
}

#[test]
fn events_of_a_rolled_back_savepoint_never_arrive() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    client
        .batch_execute(
            "begin; \
             select outbox.publish_event('1', 's'); \
             savepoint a; select outbox.publish_event('gone a', 's'); \
             savepoint b; insert into outbox.events (event_type, source) values ('gone b', 's'); \
             rollback to a; \
             select outbox.publish_event('2', 's'); \
             savepoint c; select outbox.publish_event('3', 's'); release c; \
             savepoint d; savepoint e; select outbox.publish_event('gone e', 's'); release e; rollback to d; \
             insert into outbox.events (event_type, source) values ('4', 's'); \
             commit; \
             begin; select outbox.publish_event('gone', 's'); rollback; \
             begin; savepoint f; select outbox.publish_event('gone f', 's'); rollback to f; commit",
        )
        .unwrap();
    // An ERROR ends the transaction, whatever was published before.
    client
        .batch_execute("begin; select outbox.publish_event('gone too', 's')")
        .unwrap();
    assert_eq!(Refused::of(client.batch_execute("select 1 / 0")).code, "22012");
    client.batch_execute("commit").unwrap();
    assert_eq!(stream_up_to_marker(&stack), ["1", "2", "3", "4", "marker"]);
}

#[test]
fn functions_triggers_and_exception_blocks_publish_what_survives() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    client
        .batch_execute(
            "create table orders (id integer primary key); \
             create function announce() returns trigger language plpgsql as $$ begin \
                 perform outbox.publish_event('trigger ' || new.id, 's'); return null; end $$; \
             create trigger announce after insert on orders for each row execute function announce(); \
             create function at_commit() returns trigger language plpgsql as $$ begin \
                 insert into outbox.events (event_type, source) values ('at commit ' || new.id, 's'); return null; end $$; \
             create constraint trigger at_commit after insert on orders deferrable initially deferred \
                 for each row execute function at_commit(); \
             create function place(id integer) returns uuid language sql as $$ \
                 select outbox.publish_event('sql ' || id, 's') $$",
        )
        .unwrap();
    client
        .batch_execute(
            "do $$ begin \
                 insert into orders values (1); \
                 begin \
                     insert into orders values (2); \
                     perform outbox.publish_event('gone', 's'); \
                     insert into orders values (1); \
                 exception when unique_violation then perform outbox.publish_event('caught', 's'); end; \
                 begin perform outbox.publish_event('', 's'); \
                 exception when invalid_parameter_value then perform outbox.publish_event('refused', 's'); end; \
                 perform place(3); \
             end $$",
        )
        .unwrap();
    assert_eq!(
        stream_up_to_marker(&stack),
        ["trigger 1", "caught", "refused", "sql 3", "at commit 1", "marker"]
    );
    client
        .batch_execute(
            "create procedure steps() language plpgsql as $$ begin \
                 for i in 1..4 loop \
                     perform outbox.publish_event('step ' || i, 's'); \
                     if i % 2 = 0 then rollback; else commit; end if; \
                 end loop; end $$",
        )
        .unwrap();
    client.batch_execute("call steps()").unwrap();
    assert_eq!(stream_up_to_marker(&stack)[6..], ["step 1", "step 3", "marker"]);
}

fn prepare(client: &mut Client, name: &str) {
    let sql = format!("begin; select outbox.publish_event('{name}', 's'); prepare transaction '{name}'");
    client.batch_execute(&sql).unwrap();
}

/// Any session can commit it, after any restart, and the commit wakes the worker: `poll_interval` is long.
#[test]
fn a_prepared_transaction_is_sent_when_it_is_committed() {
    let stack = Stack::with(&[("outbox_relay.poll_interval", "1h")]);
    let Stack { mut pg, redis } = stack;
    let mut client = pg.client();
    for name in ["kept", "gone", "later", "late gone"] {
        prepare(&mut client, name);
    }
    client
        .batch_execute("select outbox.publish_event('others', 's')")
        .unwrap();
    assert_eq!(types(&redis.wait_entries("events", 1)), ["others"]);
    client.batch_execute("rollback prepared 'gone'").unwrap();
    let begin = Instant::now();
    client.batch_execute("commit prepared 'kept'").unwrap();
    assert_eq!(types(&redis.wait_entries("events", 2)), ["others", "kept"]);
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "it waited for {:?}",
        begin.elapsed()
    );
    drop(client);
    pg.restart();
    pg.wait_worker("postgres");
    pg.exec("select outbox.publish_event('after', 's')");
    assert_eq!(types(&redis.wait_entries("events", 3)), ["others", "kept", "after"]);
    pg.exec("rollback prepared 'late gone'");
    pg.exec("commit prepared 'later'");
    let entries = redis.wait_entries("events", 4);
    assert_eq!(types(&entries)[3], "later");
    pg.exec("select outbox.publish_event('last', 's')");
    assert_eq!(types(&redis.wait_entries("events", 5))[4], "last");
}

#[test]
fn a_backend_is_known_as_soon_as_it_is_there() {
    let stack = Stack::start();
    let port = stack.redis.port();
    let create = |name: &str| {
        format!(
            "insert into outbox.backends (name, host, port, stream_name) values ('{name}', '127.0.0.1', {port}, '{name}')"
        )
    };
    let publish = |name: &str| format!("select outbox.publish_event('{name}', 's', backend => '{name}')");
    let mut client = stack.pg.client();
    client
        .batch_execute("select outbox.publish_event('fills the cache', 's')")
        .unwrap();
    // Created after the snapshot was taken.
    for isolation in ["repeatable read", "serializable"] {
        let name = isolation.replace(' ', "_");
        client
            .batch_execute(&format!(
                "begin isolation level {isolation}; select count(*) from outbox.backends"
            ))
            .unwrap();
        assert_eq!(
            Refused::of(client.batch_execute(&format!("savepoint s; {}", publish(&name)))).code,
            "42704"
        );
        client.batch_execute("rollback to s").unwrap();
        stack.pg.exec(&create(&name));
        client.batch_execute(&format!("{}; commit", publish(&name))).unwrap();
        assert_eq!(types(&stack.redis.wait_entries(&name, 1)), [name]);
    }
    // Created in this transaction; after its rollback it is unknown again.
    client
        .batch_execute(&format!("begin; {}; {}", create("mine"), publish("mine")))
        .unwrap();
    client.batch_execute("rollback").unwrap();
    assert_eq!(Refused::of(client.batch_execute(&publish("mine"))).code, "42704");
    client
        .batch_execute(&format!(
            "begin; savepoint s; {}; {}; rollback to s",
            create("mine"),
            publish("mine")
        ))
        .unwrap();
    assert_eq!(Refused::of(client.batch_execute(&publish("mine"))).code, "42704");
    client.batch_execute("rollback").unwrap();
    client
        .batch_execute(&format!("begin; {}; {}; commit", create("mine"), publish("mine")))
        .unwrap();
    assert_eq!(types(&stack.redis.wait_entries("mine", 1)), ["mine"]);
    // Nobody else sees it before the commit, and nobody after its deletion.
    let mut other = stack.pg.client();
    client.batch_execute(&format!("begin; {}", create("soon"))).unwrap();
    assert_eq!(Refused::of(other.batch_execute(&publish("soon"))).code, "42704");
    client.batch_execute("commit").unwrap();
    other.batch_execute(&publish("soon")).unwrap();
    assert_eq!(types(&stack.redis.wait_entries("soon", 1)), ["soon"]);
    client
        .batch_execute("delete from outbox.backends where name = 'soon'")
        .unwrap();
    assert_eq!(Refused::of(other.batch_execute(&publish("soon"))).code, "42704");
}

#[test]
fn a_read_only_transaction_cannot_publish() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    let refused = |sql: &str, what: &str| {
        let mut client = stack.pg.client();
        client.batch_execute("begin read only").unwrap();
        let expected = Refused::new(
            "25006",
            &format!("cannot execute {what} in a read-only transaction"),
            "",
            "",
        );
        assert_eq!(Refused::of(client.simple_query(sql)), expected, "{sql}");
    };
    refused("select outbox.publish_event('t', 's')", "outbox.publish_event()");
    refused(
        "select outbox.publish_event('t', 's', scheduled_at => '2100-01-01')",
        "outbox.publish_event()",
    );
    refused(
        "select outbox.publish_events('[{\"event_type\": \"t\", \"source\": \"s\"}]')",
        "outbox.publish_event()",
    );
    refused(
        "insert into outbox.events (event_type, source) values ('t', 's')",
        "INSERT",
    );
    client
        .batch_execute("begin isolation level serializable; select outbox.publish_event('ok', 's'); commit")
        .unwrap();
    assert_eq!(stream_up_to_marker(&stack), ["ok", "marker"]);
}

/// Its events arrive after its commit, together, behind those that were committed meanwhile.
#[test]
fn an_open_transaction_delays_no_other() {
    let stack = Stack::start();
    let mut open = stack.pg.client();
    open.batch_execute("begin; select outbox.publish_event('open 1', 's')")
        .unwrap();
    let mut idle = stack.pg.client();
    idle.batch_execute("begin isolation level repeatable read; create table t (); select 1")
        .unwrap();
    let mut others = stack.pg.client();
    for i in 1..=300 {
        others
            .batch_execute(&format!("select outbox.publish_event('other {i}', 's')"))
            .unwrap();
    }
    let others: Vec<String> = (1..=300).map(|i| format!("other {i}")).collect();
    assert_eq!(types(&stack.wait_events(300)), others);
    open.batch_execute("select outbox.publish_event('open 2', 's'); commit")
        .unwrap();
    assert_eq!(types(&stack.wait_events(302))[300..], ["open 1", "open 2"]);
    idle.batch_execute("insert into outbox.events (event_type, source) values ('idle', 's'); commit")
        .unwrap();
    assert_eq!(types(&stack.wait_events(303))[302], "idle");
}
