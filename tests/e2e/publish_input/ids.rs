//! An event id is used once.

use kit::{Refused, Stack};
use postgres::{Client, Row};
use uuid::Uuid;

fn insert_id(client: &mut Client, id: Uuid) -> Result<u64, postgres::Error> {
    client.execute(
        "insert into outbox.events (event_id, event_type, source) values ($1, 't', 's')",
        &[&id],
    )
}

fn publish_id(client: &mut Client, id: Uuid) -> Result<Row, postgres::Error> {
    client.query_one("select outbox.publish_event('t', 's', event_id => $1)", &[&id])
}

fn schedule_id(client: &mut Client, id: Uuid) -> Result<Row, postgres::Error> {
    let sql = "select outbox.publish_event('t', 's', event_id => $1, scheduled_at => now() + interval '1 hour')";
    client.query_one(sql, &[&id])
}

#[test]
fn an_event_id_is_used_once() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    let [published, scheduled] = [Uuid::new_v4(), Uuid::new_v4()];
    let taken = |id: Uuid| {
        Refused::new(
            "23505",
            "duplicate key value violates unique constraint \"events_event_id_idx\"",
            &format!("Key (event_id)=({id}) already exists."),
            "If this is the same event, do not publish it again. Otherwise omit event_id: the event then gets a new one.",
        )
    };
    // In one transaction, which the error aborts.
    client.batch_execute("begin").unwrap();
    publish_id(&mut client, published).unwrap();
    assert_eq!(Refused::of(publish_id(&mut client, published)), taken(published));
    client.batch_execute("rollback").unwrap();
    // Later, and with a scheduled event, in either way.
    let returned: Uuid = publish_id(&mut client, published).unwrap().get(0);
    assert_eq!(returned, published);
    schedule_id(&mut client, scheduled).unwrap();
    for _ in 0..2 {
        assert_eq!(Refused::of(publish_id(&mut client, published)), taken(published));
        assert_eq!(Refused::of(insert_id(&mut client, published)), taken(published));
        assert_eq!(Refused::of(schedule_id(&mut client, scheduled)), taken(scheduled));
        assert_eq!(Refused::of(schedule_id(&mut client, published)), taken(published));
        assert_eq!(Refused::of(publish_id(&mut client, scheduled)), taken(scheduled));
        assert_eq!(Refused::of(insert_id(&mut client, scheduled)), taken(scheduled));
        // Also after the event was delivered.
        assert_eq!(stack.wait_events(1).len(), 1);
    }
    let elements = format!(
        "select outbox.publish_events('[{{\"event_type\": \"t\", \"source\": \"s\", \"event_id\": \"{published}\"}}]')"
    );
    assert_eq!(Refused::of(client.simple_query(&elements)), taken(published));
    // Both in one transaction, and in the other order.
    let both = Uuid::new_v4();
    client.batch_execute("begin").unwrap();
    publish_id(&mut client, both).unwrap();
    assert_eq!(Refused::of(schedule_id(&mut client, both)), taken(both));
    client.batch_execute("rollback; begin").unwrap();
    schedule_id(&mut client, both).unwrap();
    assert_eq!(Refused::of(publish_id(&mut client, both)), taken(both));
    client.batch_execute("rollback").unwrap();
    assert_eq!(stack.events().len(), 1);
}

/// The second waits for the first, and fails once that has committed.
#[test]
fn two_sessions_cannot_use_one_event_id() {
    let stack = Stack::start();
    let id = Uuid::new_v4();
    let mut first = stack.pg.client();
    first.batch_execute("begin").unwrap();
    publish_id(&mut first, id).unwrap();
    let mut second = stack.pg.client();
    let waiting = std::thread::spawn(move || Refused::of(publish_id(&mut second, id)));
    kit::wait_eq("a session that waits for the first", 1i64, || {
        stack
            .pg
            .one("select count(*) from pg_stat_activity where wait_event_type = 'Lock'")
    });
    first.batch_execute("commit").unwrap();
    assert_eq!(waiting.join().unwrap().code, "23505");
    let entries = stack.wait_events(1);
    assert_eq!(
        (entries.len(), entries[0].field("event_id")),
        (1, id.to_string().as_str())
    );
}

/// By function, array, INSERT and COPY; whether the first one was published, scheduled, or is of the same transaction.
#[test]
fn a_repeated_id_is_one_report_by_all_ways() {
    let stack = Stack::start();
    let [published, scheduled] = [Uuid::new_v4(), Uuid::new_v4()];
    let mut client = stack.pg.client();
    publish_id(&mut client, published).unwrap();
    schedule_id(&mut client, scheduled).unwrap();
    for id in [published, scheduled] {
        let constraint = |error: &postgres::Error| {
            let said = error.as_db_error().expect("by the server");
            [said.schema(), said.table(), said.constraint()].map(|name| name.unwrap_or_default().to_owned())
        };
        let mut errors = Vec::new();
        for sql in [
            format!("select outbox.publish_event('t', 's', event_id => '{id}')"),
            format!("select outbox.publish_event('t', 's', '1'::json, event_id => '{id}')"),
            format!(
                "select outbox.publish_event('t', 's', event_id => '{id}', scheduled_at => now() + interval '1 hour')"
            ),
            format!(
                "select outbox.publish_events('[{{\"event_type\": \"t\", \"source\": \"s\", \"event_id\": \"{id}\"}}]')"
            ),
            format!("insert into outbox.events (event_type, source, event_id) values ('t', 's', '{id}')"),
            format!(
                "insert into outbox.events (event_type, source, event_id) select 't', 's', '{id}' returning event_id"
            ),
        ] {
            errors.push((sql.clone(), client.simple_query(&sql).expect_err(&sql)));
        }
        let mut copy = client
            .copy_in("copy outbox.events (event_type, source, event_id) from stdin")
            .unwrap();
        std::io::Write::write_all(&mut copy, format!("t\ts\t{id}\n").as_bytes()).unwrap();
        errors.push(("COPY".to_owned(), copy.finish().expect_err("COPY")));
        for (way, error) in errors {
            assert_eq!(constraint(&error), ["outbox", "events", "events_event_id_idx"], "{way}");
            let expected = Refused::new(
                "23505",
                "duplicate key value violates unique constraint \"events_event_id_idx\"",
                &format!("Key (event_id)=({id}) already exists."),
                "If this is the same event, do not publish it again. Otherwise omit event_id: the event then gets a new one.",
            );
            assert_eq!(Refused::of::<()>(Err(error)), expected, "{way}");
        }
    }
    let twice = Uuid::new_v4();
    let list = format!(
        "[{{\"event_type\": \"t\", \"source\": \"s\", \"event_id\": \"{twice}\"}}, {{\"event_type\": \"t\", \"source\": \"s\", \"event_id\": \"{twice}\"}}]"
    );
    let error = client
        .query("select outbox.publish_events($1::text::jsonb)", &[&list])
        .expect_err("twice");
    let said = error.as_db_error().expect("by the server");
    assert!(
        said.hint().is_some() && said.where_().is_some_and(|context| context.contains("element 1")),
        "{said:?}"
    );
    assert_eq!(stack.wait_events(1).len(), 1);
}
