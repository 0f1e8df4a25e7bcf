//! A bridge: each new row of the old table becomes an event in its transaction.

use kit::{Entry, Refused, Stack, types, wait_drained, wait_eq};
use postgres::Client;

use super::{id, import, run, with_old_table};

/// With a bridge, and the application's role, which has rights only on its table.
fn bridged() -> (Stack, Client) {
    let stack = with_old_table();
    stack.pg.exec("create role app login; grant all on outbox_events to app; select outbox.bridge_django_broadcaster('outbox_events')");
    let app = stack.pg.client_as("app", "postgres");
    (stack, app)
}

#[test]
fn a_new_row_of_the_old_table_becomes_an_event_in_its_transaction() {
    let (stack, mut app) = bridged();
    run(
        &mut app,
        "begin; insert into outbox_events (event_type) values ('taken.back'); rollback",
    );
    run(
        &mut app,
        "begin;
        insert into outbox_events (event_type) values ('first');
        savepoint s; insert into outbox_events (event_type) values ('not'); rollback to s;
        insert into outbox_events (event_type, status) values ('done', 'published');
        insert into outbox_events (id, event_type, source, subject, data, data_schema, publisher_config, max_retries)
            values ('00000000-0000-4000-8000-000000000001', 'whole', 'src', 'sub', '{\"n\": [1, null]}', 'https://x/y', '{\"k\": 1}', 7);
        insert into outbox_events (event_type, data, max_retries) select 'many.' || i, 'null', 100000 from generate_series(1, 3) i;
        commit",
    );
    let entries = stack.wait_events(5);
    assert_eq!(types(&entries), ["first", "whole", "many.1", "many.2", "many.3"]);
    let whole: &Entry = &entries[1];
    assert_eq!(whole.field("event_id"), id(1).to_string());
    assert_eq!(whole.field("k"), "1");
    for part in [
        r#""subject": "sub""#,
        r#""dataschema": "https://x/y""#,
        r#""data": {"n": [1, null]}"#,
    ] {
        assert!(whole.field("cloud_event").contains(part), "{part}");
    }
    let same: bool = stack.pg.one(
        "select count(*) = 5 and bool_and(o.created_at = e.created_at and o.status = 'processing' and o.last_error like 'moved to outbox_relay at %')
        from outbox_events o join outbox.events e on e.event_id = o.id",
    );
    assert!(same);
    let most: i32 = stack.pg.one("select max(max_retries) from outbox.events");
    assert_eq!(most, 1_000);
    // The import leaves these rows; the row from before the bridge is not part of it.
    assert!(
        import(&mut stack.pg.client(), ", false")
            .iter()
            .all(|row| !row.contains("pending"))
    );
    // No second entry: the row was sent by the old worker.
    assert_eq!(stack.events().len(), 5);
}

/// An object in the application's memory still says 'pending', and so does "retry" in the admin.
#[test]
fn a_moved_row_stays_marked() {
    let (stack, mut app) = bridged();
    run(&mut app, "insert into outbox_events (event_type) values ('once')");
    run(
        &mut app,
        "update outbox_events set status = 'pending', last_error = '', subject = 'changed'",
    );
    let row: String = stack
        .pg
        .one("select status || ' ' || subject || ' ' || (last_error like 'moved%') from outbox_events");
    assert_eq!(row, "processing changed true");
    assert_eq!(stack.wait_events(1).len(), 1);
}

/// Their trigger for INSERT runs, although the old row is updated.
#[test]
fn an_upsert_of_an_old_row_leaves_it_to_the_old_worker() {
    let stack = with_old_table();
    let insert = format!("insert into outbox_events (id, event_type) values ('{}', 'old')", id(1));
    stack.pg.exec(&insert);
    stack
        .pg
        .exec("select outbox.bridge_django_broadcaster('outbox_events')");
    stack.pg.exec(&format!(
        "{insert} on conflict (id) do update
            set status = excluded.status, last_error = excluded.last_error, subject = 'changed'"
    ));
    let row = "select status || ' ' || subject || ' ' || (last_error like 'moved%') from outbox_events";
    assert_eq!(stack.pg.one::<String>(row), "pending changed false");
    import(&mut stack.pg.client(), ", false");
    assert_eq!(stack.pg.one::<String>(row), "processing changed true");
    assert_eq!(types(&stack.wait_events(1)), ["old"]);
}

#[test]
fn deleting_a_scheduled_row_takes_its_event_back_and_a_new_time_moves_it() {
    let (stack, mut app) = bridged();
    run(
        &mut app,
        "insert into outbox_events (event_type, scheduled_at) values
            ('cancelled', now() + interval '1 h'), ('sooner', now() + interval '1 h'), ('later', now() + interval '2 h')",
    );
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.scheduled_events"), 3);
    run(&mut app, "delete from outbox_events where event_type = 'cancelled'");
    run(
        &mut app,
        "update outbox_events set scheduled_at = now() where event_type = 'sooner'",
    );
    run(
        &mut app,
        "update outbox_events set scheduled_at = scheduled_at + interval '1 h' where event_type = 'later'",
    );
    assert_eq!(types(&stack.wait_events(1)), ["sooner"]);
    let left: String = stack.pg.one(
        "select string_agg(s.event_type || ' ' || (s.scheduled_at = o.scheduled_at), ', ') from outbox.scheduled_events s join outbox_events o on o.id = s.event_id",
    );
    assert_eq!(left, "later true");
}

#[test]
fn each_row_becomes_an_event_once() {
    let (stack, mut app) = bridged();
    let insert = format!(
        "insert into outbox_events (id, event_type) values ('{}', 'once')",
        id(1)
    );
    run(&mut app, &insert);
    run(&mut app, &format!("{insert} on conflict do nothing"));
    run(
        &mut app,
        &format!("{insert} on conflict (id) do update set subject = 'again'"),
    );
    // A dump of the table's rows is restored, with and without triggers.
    run(
        &mut stack.pg.client(),
        "create table copied as table outbox_events; truncate outbox_events; insert into outbox_events table copied",
    );
    // The row is deleted, and its id is used again: refused as in every other way to publish.
    run(&mut app, "delete from outbox_events");
    let said = Refused::of(app.simple_query(&insert));
    assert_eq!(
        (said.code.as_str(), said.detail.as_deref()),
        (
            "23505",
            Some(format!("Key (event_id)=({}) already exists.", id(1)).as_str())
        )
    );
    run(&mut app, "insert into outbox_events (event_type) values ('last')");
    assert_eq!(types(&stack.wait_events(2)), ["once", "last"]);
}

#[test]
fn a_row_that_cannot_be_sent_fails_the_applications_transaction() {
    let (stack, mut app) = bridged();
    for (columns, values, code, message) in [
        (
            "publisher_backend",
            "'none'",
            "42704",
            "backend \"none\" does not exist",
        ),
        (
            "data_content_type",
            "'text/xml'",
            "22023",
            "an event with this spec_version or data_content_type cannot be sent",
        ),
        (
            "spec_version",
            "'0.3'",
            "22023",
            "an event with this spec_version or data_content_type cannot be sent",
        ),
        ("event_type", "''", "22023", "event_type must not be null or empty"),
    ] {
        let said = Refused::of(app.simple_query(&format!("insert into outbox_events ({columns}) values ({values})")));
        assert_eq!((said.code.as_str(), said.message.as_str()), (code, message));
        assert!(said.detail.is_some() && said.hint.is_some());
    }
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox_events"), 0);
}

#[test]
fn a_bridge_ends() {
    let (stack, mut app) = bridged();
    let said = Refused::of(stack.pg.client().simple_query("drop extension outbox_relay"));
    assert_eq!(said.code, "2BP01");
    run(&mut app, "insert into outbox_events (event_type) values ('bridged')");
    stack.pg.exec("select outbox.end_bridge('outbox_events')");
    run(&mut app, "insert into outbox_events (event_type) values ('old way')");
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    let left: String = stack
        .pg
        .one("select string_agg(event_type || ' ' || status, ', ' order by created_at) from outbox_events");
    assert_eq!(left, "bridged processing, old way pending");
    assert_eq!(
        stack
            .pg
            .one::<i64>("select count(*) from pg_trigger where tgrelid = 'outbox_events'::regclass"),
        0
    );
    stack.pg.exec("drop extension outbox_relay");
}

/// The table's owner changes a column: types whose functions belong to the owner are refused.
#[test]
fn a_table_that_has_changed_is_refused_in_words() {
    let (stack, mut app) = bridged();
    stack.pg.exec("create type mine as (n int)");
    stack
        .pg
        .exec("alter table outbox_events rename column subject to theme");
    let said = Refused::of(app.simple_query("insert into outbox_events (event_type) values ('t')"));
    assert_eq!(
        said,
        Refused::new(
            "55000",
            "rows of \"outbox_events\" can no longer become events: column \"subject\" is not there",
            "A bridge of outbox_relay reads this table. The table was changed after the bridge was made.",
            "Run outbox.end_bridge(), and make the bridge again with the columns that the table has now."
        )
    );
    stack.pg.exec("alter table outbox_events rename column theme to subject; alter table outbox_events alter data type mine using null");
    let said = Refused::of(app.simple_query("insert into outbox_events (event_type, data) values ('t', row(1))"));
    assert_eq!(
        said.message,
        "rows of \"outbox_events\" can no longer become events: column \"data\" has a type that is not expected there"
    );
    run(&mut app, "insert into outbox_events (event_type) values ('without')");
    wait_eq("events", 1, || stack.events().len());
}

/// A row that moves to another partition is to triggers a deleted one and a new one.
#[test]
fn a_table_whose_rows_change_their_partition_is_not_bridged() {
    let (stack, _) = bridged();
    let mut client = stack.pg.client();
    for (key, is_refused) in [
        ("status", true),
        ("scheduled_at", true),
        ("last_error", true),
        ("created_at", false),
    ] {
        run(
            &mut client,
            &format!(
                "create table parts (like outbox_events including defaults) partition by list ({key}); create table part partition of parts default"
            ),
        );
        let bridge = client.simple_query("select outbox.bridge_django_broadcaster('parts')");
        if is_refused {
            let said = Refused::of(bridge);
            assert_eq!(said.code, "0A000", "{said:?}");
            assert!(
                said.message.contains(key) && said.detail.is_some() && said.hint.is_some(),
                "{said:?}"
            );
        } else {
            bridge.expect("it is bridged");
            run(
                &mut client,
                "insert into parts (event_type, scheduled_at) values ('a', now()), ('b', now() + interval '1 h');
                update parts set scheduled_at = now() + interval '2 h' where event_type = 'b'; delete from parts where event_type = 'b'",
            );
            assert_eq!(kit::types(&stack.wait_events(1)), ["a"]);
            assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.scheduled_events"), 0);
        }
        run(&mut client, "drop table parts");
    }
}
