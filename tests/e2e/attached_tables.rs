//! Rows as events: rows that are inserted, updated, deleted or truncated in an attached table are published in the same
//! transaction, whatever the table looks like and whoever changes it; also dumped, restored and detached tables.

mod changed;
mod copied;
mod elsewhere;
mod meanwhile;
mod names;
mod owners;

use kit::{Postgres, Refused, Stack};
use postgres::Client;
use serde_json::{Value, json};

fn start() -> Postgres {
    let pg = Postgres::with(&[("outbox_relay.enabled", "off")]).start();
    pg.extension();
    pg
}

/// The events published since the last call: type, subject, data.
fn taken(client: &mut Client) -> Vec<(String, Option<String>, Value)> {
    let sql = "select event_type, subject, data::jsonb from outbox.events order by seq";
    let rows = client.query(sql, &[]).expect("events");
    client.batch_execute("delete from outbox.events").expect("a superuser");
    rows.iter()
        .map(|row| {
            let data: Option<Value> = row.get(2);
            (row.get(0), row.get(1), data.unwrap_or(Value::Null))
        })
        .collect()
}

/// The same without the data.
fn heads(client: &mut Client) -> Vec<String> {
    let taken = taken(client);
    taken
        .iter()
        .map(|(event_type, subject, _)| format!("{event_type} {}", subject.as_deref().unwrap_or("-")))
        .collect()
}

#[track_caller]
fn run(client: &mut Client, sql: &str) {
    client
        .batch_execute(sql)
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

fn event(event_type: &str, subject: &str, data: Value) -> (String, Option<String>, Value) {
    (event_type.to_owned(), Some(subject.to_owned()), data)
}

#[test]
fn rows_arrive_in_their_order_in_the_stream() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    run(
        &mut client,
        "create table orders (id int primary key, status text); select outbox.attach_table('orders')",
    );
    run(
        &mut client,
        "insert into orders select i, 'new' from generate_series(1, 300) i",
    );
    run(&mut client, "begin; update orders set status = 'gone'; rollback");
    run(&mut client, "update orders set status = 'paid' where id = 7");
    run(&mut client, "delete from orders where id = 8");
    let entries = stack.wait_events(302);
    let subjects: Vec<String> = entries
        .iter()
        .map(|entry| {
            let event: Value = serde_json::from_str(entry.field("cloud_event")).expect("JSON");
            format!(
                "{} {}",
                entry.field("event_type"),
                event["subject"].as_str().expect("a subject")
            )
        })
        .collect();
    let expected: Vec<String> = (1..=300)
        .map(|i| format!("orders.insert {i}"))
        .chain(["orders.update 7".to_owned(), "orders.delete 8".to_owned()])
        .collect();
    assert_eq!(subjects, expected);
    assert_eq!(entries[0].field("source"), "/postgres/public");
}

#[test]
fn every_kind_of_statement_is_published_with_the_payload_that_was_asked_for() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "create table t (id int primary key, a text, b int); select outbox.attach_table('t')",
    );
    run(&mut c, "insert into t values (1, 'x', 1), (2, 'y', 2)");
    run(
        &mut c,
        "insert into t values (2, 'z', 9), (3, 'w', 3) on conflict (id) do update set a = excluded.a",
    );
    run(
        &mut c,
        "merge into t using (values (3), (4)) v (id) on t.id = v.id when matched then delete when not matched then insert values (v.id, 'm', 4)",
    );
    run(
        &mut c,
        "truncate t; select 1 from t where false; update t set b = 0; delete from t",
    );
    assert_eq!(
        taken(&mut c),
        [
            event("t.insert", "1", json!({"id": 1, "a": "x", "b": 1})),
            event("t.insert", "2", json!({"id": 2, "a": "y", "b": 2})),
            // When a statement has several actions, Postgres calls the triggers one after the other.
            event("t.update", "2", json!({"id": 2, "a": "z", "b": 2})),
            event("t.insert", "3", json!({"id": 3, "a": "w", "b": 3})),
            event("t.delete", "3", json!({"id": 3, "a": "w", "b": 3})),
            event("t.insert", "4", json!({"id": 4, "a": "m", "b": 4})),
        ]
    );
    let copied = pg.run("psql", &["-c", "copy t from stdin"], "5\tcopied\t\\N\n6\ttoo\t6\n");
    assert!(copied.ok, "{}", copied.stderr);
    assert_eq!(heads(&mut c), ["t.insert 5", "t.insert 6"]);

    run(
        &mut c,
        "select outbox.attach_table('t', payload => 'both', columns => '{id,a}', operations => 'insert, UPDATE, delete,truncate', event_type => 'thing', source => 'shop')",
    );
    run(
        &mut c,
        "insert into t values (7, 'n', 0); update t set a = 'o' where id = 7; delete from t where id = 7; truncate t",
    );
    assert_eq!(
        taken(&mut c),
        [
            event("thing.insert", "7", json!({"old": null, "new": {"id": 7, "a": "n"}})),
            event(
                "thing.update",
                "7",
                json!({"old": {"id": 7, "a": "n"}, "new": {"id": 7, "a": "o"}})
            ),
            event("thing.delete", "7", json!({"old": {"id": 7, "a": "o"}, "new": null})),
            ("thing.truncate".to_owned(), None, Value::Null),
        ]
    );

    run(
        &mut c,
        "select outbox.attach_table('t', payload => 'changed', key => '{a,id}', columns => '{b}', operations => 'update')",
    );
    run(
        &mut c,
        "insert into t values (8, 'k', 1), (9, 'l', 2); update t set b = 2; update t set a = 'q' where id = 8",
    );
    assert_eq!(taken(&mut c), [event("t.update", "[\"k\", 8]", json!({"b": 2}))]);
}

/// A consumer that keeps the rows by key must not delete a row that has come under the key meanwhile.
#[test]
fn deletes_of_old_keys_come_before_inserts_of_new_keys() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "create table t (id int, n text, primary key (id) deferrable initially deferred)",
    );
    run(
        &mut c,
        "insert into t values (1, 'a'), (2, 'b'), (3, 'c'); select outbox.attach_table('t')",
    );
    run(
        &mut c,
        "update t set id = case when n = 'c' then 3 else id + 1 end; delete from t where n = 'c'",
    );
    assert_eq!(
        heads(&mut c),
        [
            "t.delete 1",
            "t.delete 2",
            "t.insert 2",
            "t.insert 3",
            "t.update 3",
            "t.delete 3"
        ]
    );
}

#[test]
fn a_condition_sees_the_row_and_what_it_was() {
    let pg = start();
    let mut c = pg.client();
    run(&mut c, "create table t (id int primary key, status text, n int)");
    run(
        &mut c,
        "select outbox.attach_table('t', condition => $$status = 'paid' and old.status is distinct from new.status -- so$$)",
    );
    run(
        &mut c,
        "insert into t values (1, 'new', 0), (2, 'paid', 0); update t set n = n + 1; update t set status = 'paid'; delete from t where id = 2",
    );
    assert_eq!(heads(&mut c), ["t.insert 2", "t.update 1", "t.delete 2"]);
    run(
        &mut c,
        "alter table t add column \"50%\" int; alter table t add column \"%1$s\" int; update t set status = 'open'",
    );
    let percent = "select outbox.attach_table('t', condition => 'id % 2 = 1 and \"50%\" is null', columns => '{id,50%}', key => '{id,%1$s}')";
    run(&mut c, percent);
    taken(&mut c);
    run(&mut c, "insert into t values (3, 'x', 1), (4, 'x', 1)");
    assert_eq!(
        taken(&mut c),
        [event("t.insert", "[3, null]", json!({"id": 3, "50%": null}))]
    );
    run(&mut c, &percent.replace("{id,%1$s}", "{%1$s}"));
    run(&mut c, "update t set \"%1$s\" = 7 where id = 3");
    assert_eq!(heads(&mut c), ["t.delete -", "t.insert 7"]);
}

#[test]
fn an_invalid_condition_is_refused() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "create table t (id int primary key, status text, n int); insert into t values (1, 'paid', 1)",
    );
    run(
        &mut c,
        "select outbox.attach_table('t', condition => $$status = 'paid'$$)",
    );
    for (condition, code) in [
        ("nonsense > 1", "42703"),
        ("n", "42804"),
        ("true); drop table t; select (true", "42601"),
        ("unknown_function(n)", "42883"),
    ] {
        let said = Refused::of(c.execute("select outbox.attach_table('t', condition => $1)", &[&condition]));
        assert_eq!(said.code, code, "{condition}: {}", said.message);
    }
    run(&mut c, "update t set status = 'open'; update t set status = 'paid'");
    assert_eq!(heads(&mut c), ["t.update 1"], "what was attached stays");
}

#[test]
fn changing_an_attached_table_needs_no_right_to_publish_and_gives_none() {
    let pg = start();
    pg.exec("create role shop login; create role clerk login; create role other login; grant create on schema public to shop, other; select outbox.grant_publisher('shop')");
    let mut shop = pg.client_as("shop", "postgres");
    run(
        &mut shop,
        "create table orders (id int primary key, n int); grant all on orders to clerk",
    );
    run(
        &mut shop,
        "create function whoami() returns boolean language plpgsql as $$ begin raise notice 'as %', current_user; return current_user = 'shop'; end $$",
    );
    run(
        &mut shop,
        "select outbox.attach_table('orders', condition => 'public.whoami()')",
    );
    let mut clerk = pg.client_as("clerk", "postgres");
    run(
        &mut clerk,
        "insert into orders values (1, 1); update orders set n = 2; delete from orders",
    );
    let mut c = pg.client();
    assert_eq!(heads(&mut c), ["orders.insert 1", "orders.update 1", "orders.delete 1"]);
    for sql in [
        "select outbox.publish_event('t', 's')",
        "insert into outbox.events (event_type, source) values ('t', 's')",
        "select outbox.attach_table('orders')",
        "select public.outbox_events_of_orders()",
    ] {
        let code = Refused::of(clerk.simple_query(sql)).code;
        assert_eq!(code, "42501", "{sql}");
    }
    // A table of the role's own, without the right to publish; then the right to publish, and another role's table.
    let mut other = pg.client_as("other", "postgres");
    run(&mut other, "create table mine (id int primary key)");
    assert_eq!(
        Refused::of(other.simple_query("select outbox.attach_table('mine')")).code,
        "42501"
    );
    assert_eq!(
        Refused::of(shop.simple_query("select outbox.attach_table('mine')")).code,
        "42501"
    );
    pg.exec("select outbox.grant_publisher('other')");
    assert_eq!(
        Refused::of(other.simple_query("select outbox.attach_table('orders')")).code,
        "42501"
    );
    assert_eq!(
        Refused::of(other.simple_query("select outbox.detach_table('orders')")).code,
        "42501"
    );
    // A superuser attaches in the owner's name: code of the owner gets no superuser's rights.
    pg.exec("select outbox.attach_table('orders', condition => 'public.whoami()')");
    run(&mut clerk, "insert into orders values (1, 1)");
    assert_eq!(heads(&mut c), ["orders.insert 1"]);
    assert_eq!(
        pg.one::<String>("select publisher::text from outbox.attached_tables"),
        "shop"
    );
    // A role that lost the right to publish does not publish.
    pg.exec("select outbox.revoke_publisher('shop')");
    assert_eq!(
        Refused::of(clerk.simple_query("insert into orders values (2, 2)")).code,
        "42501"
    );
    let said: String =
        pg.one("select hint from outbox.health() where \"check\" = 'attached tables' and status = 'warn'");
    assert!(said.contains("grant_publisher('shop')"), "{said}");
    // A new owner is in nobody's name.
    pg.exec("select outbox.grant_publisher('shop'); alter table orders owner to other");
    let said: String =
        pg.one("select detail from outbox.health() where \"check\" = 'attached tables' and status = 'warn'");
    assert_eq!(said, "public.orders belongs to \"other\", and publishes as \"shop\".");
    assert_eq!(
        Refused::of(clerk.simple_query("insert into orders values (2, 2)")).code,
        "42501"
    );
    run(
        &mut other,
        "select outbox.attach_table('orders'); insert into orders values (2, 2)",
    );
    assert_eq!(heads(&mut c), ["orders.insert 2"]);
    assert_eq!(
        pg.one::<i64>("select count(*) from outbox.health() where \"check\" = 'attached tables' and status = 'ok'"),
        1
    );
    run(&mut other, "drop table orders");
}

#[test]
fn an_event_that_is_refused_fails_the_statement() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "create table t (id int primary key, a text); select outbox.attach_table('t')",
    );
    let error = c
        .batch_execute("insert into t values (1, repeat('x', 2000000))")
        .expect_err("too large");
    let said = error.as_db_error().expect("of the server");
    assert_eq!((said.code().code(), said.message()), ("54000", "event is too large"));
    assert!(
        said.where_().expect("a context").contains("outbox_events_of_t()"),
        "{said:?}"
    );
    assert_eq!(pg.one::<i64>("select count(*) from t"), 0);
    for sql in [
        "select outbox.attach_table('t', operations => 'insert,upsert')",
        "select outbox.attach_table('t', operations => '')",
        "select outbox.attach_table('t', payload => 'old')",
        "select outbox.attach_table('t', columns => '{}')",
    ] {
        assert_eq!(Refused::of(c.simple_query(sql)).code, "22023", "{sql}");
    }
    assert_eq!(
        Refused::of(c.simple_query("select outbox.attach_table('t', columns => '{id,nope}')")).code,
        "42703"
    );
    for sql in [
        "select outbox.attach_table('outbox.events')",
        "select outbox.attach_table('outbox.status')",
    ] {
        assert_eq!(Refused::of(c.simple_query(sql)).code, "42809", "{sql}");
    }
}
