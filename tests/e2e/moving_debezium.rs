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
