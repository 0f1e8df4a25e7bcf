//! Moving in from an outbox table that Debezium's event router reads: the import and the bridge.

use kit::{Refused, Stack, types};

const TABLE: &str = "
create table outbox_table (id uuid primary key, aggregatetype varchar(255) not null, aggregateid varchar(255) not null, type varchar(255) not null, payload jsonb);
create role app login; grant all on outbox_table to app";
const INSERT: &str = "insert into outbox_table values (gen_random_uuid(), 'Order', '7', 'OrderCreated', '{\"n\": 1}')";

fn start() -> Stack {
    let stack = Stack::start();
    stack.pg.exec(TABLE);
    stack
}

fn rows(stack: &Stack) -> i64 {
    stack.pg.one("select count(*) from outbox_table")
}

#[test]
fn a_row_becomes_an_event_in_its_transaction() {
    let stack = start();
    stack.pg.exec("select outbox.bridge_debezium('outbox_table')");
    let mut app = stack.pg.client_as("app", "postgres");
    app.batch_execute(&format!("begin; {INSERT}; rollback"))
        .expect("as before");
    // As applications do that keep the table empty.
    app.batch_execute(&format!("begin; {INSERT}; delete from outbox_table; commit"))
        .expect("as before");
    app.batch_execute(INSERT).expect("as before");
    let entries = stack.wait_events(2);
    assert_eq!(types(&entries), ["OrderCreated", "OrderCreated"]);
    assert_eq!(entries[1].field("source"), "Order");
    let id: String = stack.pg.one("select id::text from outbox_table");
    assert_eq!(entries[1].field("event_id"), id);
    for part in [r#""subject": "7""#, r#""data": {"n": 1}"#] {
        assert!(entries[1].field("cloud_event").contains(part), "{part}");
    }
    stack.pg.exec("select outbox.end_bridge('outbox_table')");
    app.batch_execute(INSERT).expect("as before");
    assert_eq!((rows(&stack), stack.events().len()), (2, 2));
}

#[test]
fn a_row_that_is_not_kept_reaches_no_connector() {
    let stack = start();
    stack
        .pg
        .exec("insert into outbox.backends (name, host, port) select 'orders', host, port from outbox.backends");
    stack.pg.exec(
        "select outbox.bridge_debezium('outbox_table', 'orders', 'outbox.event.', event_source => 'shop', keep_rows => false)",
    );
    let mut app = stack.pg.client_as("app", "postgres");
    assert_eq!(app.execute(INSERT, &[]).expect("it is left out"), 0);
    let entries = stack.redis.wait_entries("outbox.event.Order", 1);
    assert_eq!(entries[0].field("source"), "shop");
    assert_eq!(rows(&stack), 0);
    assert_eq!(stack.pg.one::<String>("select backend from outbox.events"), "orders");
}

#[test]
fn a_bridge_to_a_backend_that_was_renamed_is_named() {
    let stack = start();
    stack
        .pg
        .exec("insert into outbox.backends (name) values ('orders \\\"é'), ('order')");
    stack
        .pg
        .exec("select outbox.bridge_debezium('outbox_table', 'orders \\\"é')");
    let found = || -> String {
        stack.pg.one(
            "select status || ' ' || coalesce(detail, '') from outbox.health() where \"check\" = 'attached tables'",
        )
    };
    assert!(found().starts_with("ok"), "{}", found());
    stack
        .pg
        .exec("update outbox.backends set name = 'renamed' where name <> 'default' and name <> 'order'");
    let said = Refused::of(stack.pg.client_as("app", "postgres").simple_query(INSERT));
    assert_eq!(said.code, "42704");
    let named = "The bridge of public.outbox_table names a backend that does not exist: INSERTs into it fail.";
    assert!(found().contains(named) && !found().starts_with("ok"), "{}", found());
}

/// A connector would also send the events: the change happens in one transaction.
#[test]
fn a_table_that_is_published_is_not_bridged() {
    let stack = start();
    stack.pg.exec("create publication dbz for table outbox_table");
    let mut client = stack.pg.client();
    let said = Refused::of(client.simple_query("select outbox.bridge_debezium('outbox_table')"));
    assert_eq!(
        (said.code.as_str(), said.message.as_str()),
        ("55000", "public.outbox_table is published by dbz")
    );
    assert!(
        said.hint
            .expect("a hint")
            .starts_with("Run ALTER PUBLICATION ... DROP TABLE public.outbox_table;")
    );
    client
        .batch_execute("begin; alter publication dbz drop table outbox_table; select outbox.bridge_debezium('outbox_table'); commit")
        .expect("the table changes hands");
    let said = Refused::of(client.simple_query("select outbox.bridge_debezium('outbox_table', 'none')"));
    assert_eq!(said.code, "42704");
}

#[test]
fn columns_may_have_other_names_and_types() {
    let stack = start();
    stack.pg.exec(
        "create table events_out (event_uuid text, kind text, topic text, key bigint, body text, n serial);
        select outbox.bridge_debezium('events_out', id_column => 'event_uuid', type_column => 'kind', route_column => 'topic',
            key_column => 'key', payload_column => 'body')",
    );
    let insert = |body: &str, kind: &str| {
        format!("insert into events_out values ('11111111-1111-1111-1111-111111111111', '{kind}', 't', 42, '{body}')")
    };
    let mut client = stack.pg.client();
    assert_eq!(Refused::of(client.simple_query(&insert("not json", "k"))).code, "22P02");
    client.batch_execute(&insert("{\"a\": 1}", "k")).expect("an event");
    let entry = &stack.wait_events(1)[0];
    assert!(entry.field("cloud_event").contains(r#""subject": "42""#), "{entry:?}");
    assert_eq!(entry.field("event_id"), "11111111-1111-1111-1111-111111111111");
    let said = Refused::of(client.simple_query("select outbox.bridge_debezium('events_out')"));
    assert_eq!(
        said.detail.as_deref(),
        Some("It lacks these columns: id, type, aggregatetype, aggregateid, payload.")
    );
}

#[test]
fn an_import_moves_the_chosen_rows() {
    let stack = start();
    for kind in ["first", "second", ""] {
        stack.pg.exec(&format!(
            "insert into outbox_table values (gen_random_uuid(), 'Order', '7', '{kind}', '{{\"n\": 1}}')"
        ));
    }
    let mut client = stack.pg.client();
    let mut import = |arguments: &str| -> Vec<String> {
        let sql = format!("select event_type || ' ' || becomes from outbox.import_debezium('outbox_table'{arguments})");
        client
            .query(&sql, &[])
            .expect("it tells")
            .iter()
            .map(|row| row.get(0))
            .collect()
    };
    assert_eq!(import(""), ["first ambiguous", "second ambiguous", " refused"]);
    assert_eq!(import(", false"), ["first ambiguous", "second ambiguous", " refused"]);
    assert_eq!(
        import(", true, 'send'"),
        ["first pending", "second pending", " refused"]
    );
    assert_eq!(rows(&stack), 3);
    assert_eq!(
        import(", false, 'send', stream_prefix => 'x.', order_column => 'type'"),
        [" refused", "first pending", "second pending"]
    );
    assert_eq!(types(&stack.redis.wait_entries("x.Order", 2)), ["first", "second"]);
    assert_eq!(rows(&stack), 1);
    assert_eq!(import(", false, 'send'"), [" refused"]);
    // A row that was already imported is deleted, and causes no second event.
    stack.pg.exec("insert into outbox_table select event_id, 'Order', '7', event_type, '{}' from outbox.events where event_type = 'first'");
    assert_eq!(import(", false, 'send'"), [" refused", "first moved"]);
    assert_eq!((rows(&stack), stack.redis.xlen("x.Order")), (1, 2));
    assert_eq!(
        Refused::of(
            stack
                .pg
                .client()
                .simple_query("select outbox.import_debezium('outbox_table', ambiguous => 'look')")
        )
        .code,
        "22023"
    );
}

#[test]
fn rows_that_cannot_be_events_are_refused_one_by_one() {
    let stack = Stack::start();
    stack.pg.exec(
        "create table t (id text, aggregatetype text, aggregateid text, type text, payload text);
        insert into t values
            (gen_random_uuid(), 'o', '1', 'good', '{\"a\": 1}'), (gen_random_uuid(), 'o', '1', 'no json', 'plain text'),
            (gen_random_uuid(), 'o', '1', 'no text', '\"\\u0000\"'), (gen_random_uuid(), 'o', '1', 'deep', repeat('[', 100000)),
            ('7', 'o', '1', 'no uuid', '{}'), (gen_random_uuid(), 'o', '1', 'none', null), (gen_random_uuid(), 'o', '1', 'empty', 'null')",
    );
    let mut client = stack.pg.client();
    let mut import = |arguments: &str| -> Vec<String> {
        let sql = format!(
            "select event_type || ' ' || becomes, why from outbox.import_debezium('t'{arguments}, ambiguous => 'send')"
        );
        let rows = client.query(&sql, &[]).expect("it tells");
        rows.iter()
            .map(|row| {
                let (said, why): (String, String) = (row.get(0), row.get(1));
                assert!(!said.ends_with("refused") || why.contains("is not"), "{said}: {why}");
                said
            })
            .collect()
    };
    let expected = [
        "good pending",
        "no json refused",
        "no text refused",
        "deep refused",
        "no uuid refused",
        "none pending",
        "empty pending",
    ];
    assert_eq!(import(""), expected);
    assert_eq!(import(", dry_run => false"), expected);
    assert_eq!(types(&stack.wait_events(3)), ["good", "none", "empty"]);
    assert_eq!(stack.pg.one::<i64>("select count(*) from t"), 4);
}

/// Otherwise the application's INSERTs would fail.
#[test]
fn a_table_whose_columns_have_other_types_is_not_bridged() {
    let stack = Stack::start();
    stack.pg.exec(
        "create type kind as enum ('Order'); create domain name_of as varchar(20); create domain kind_of as name_of;
        create table good (id uuid, aggregatetype kind_of, aggregateid numeric, type text, payload json);
        create table bytes (id uuid, aggregatetype text, aggregateid text, type text, payload bytea);
        create table kinds (id uuid, aggregatetype kind, aggregateid text, type text, payload json);
        create table ids (id bigint, aggregatetype text, aggregateid text, type text, payload json)",
    );
    let mut client = stack.pg.client();
    for (table, detail) in [
        (
            "bytes",
            "Column \"payload\" has type bytea; expected is json, jsonb or a text.",
        ),
        (
            "kinds",
            "Column \"aggregatetype\" has type public.kind; expected is a text, a number or uuid.",
        ),
        ("ids", "Column \"id\" has type bigint; expected is uuid or a text."),
    ] {
        let said = Refused::of(client.simple_query(&format!("select outbox.bridge_debezium('{table}')")));
        assert_eq!((said.code.as_str(), said.detail.as_deref()), ("42804", Some(detail)));
        assert!(said.hint.is_some(), "{said:?}");
    }
    // A literal takes the place of the column.
    client
        .batch_execute(
            "select outbox.bridge_debezium('good'); select outbox.bridge_debezium('kinds', event_source => 'shop');
            insert into good values (gen_random_uuid(), 'Order', 7, 'k', '{}');
            insert into kinds values (gen_random_uuid(), 'Order', '7', 'k', '{}')",
        )
        .expect("they are bridged");
    stack.wait_events(2);
}
