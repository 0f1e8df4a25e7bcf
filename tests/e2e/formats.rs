//! The layout of entries: `format` and `static_fields` of a backend.

use kit::{Entry, Postgres, Refused, Stack, wait_drained, wait_eq};
use serde_json::Value;

const FORMATS: [&str; 4] = ["broadcaster", "cloudevents", "structured", "debezium"];

/// A stack with a backend for each format, named after the format; each has a stream of that name.
fn with_a_backend_of_each() -> Stack {
    let stack = Stack::start();
    for format in FORMATS {
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port, stream_name, format, static_fields) \
             values ('{format}', '127.0.0.1', {}, '{format}', '{format}', '{{\"region\": \"eu\", \"version\": 1.50}}')",
            stack.redis.port()
        ));
    }
    stack
}

fn names(entry: &Entry) -> Vec<&str> {
    entry.fields.iter().map(|(name, _)| name.as_str()).collect()
}

fn json(entry: &Entry, field: &str) -> Value {
    serde_json::from_str(entry.field(field)).unwrap_or_else(|e| panic!("{field} is no JSON: {e}"))
}

#[test]
fn each_format_has_its_fields() {
    let stack = with_a_backend_of_each();
    let publish = |backend: &str| -> String {
        stack.pg.one(&format!(
            "select outbox.publish_event('orders.update', '/shop', '{{\"total\": 1.50}}', subject => '42', backend => '{backend}', \
             publisher_config => '{{\"region\": \"us\", \"tenant\": \"a\"}}')::text"
        ))
    };
    let of = |format: &str| {
        let id = publish(format);
        (id, stack.redis.wait_entries(format, 1).remove(0))
    };
    // The publisher's region replaces the backend's.
    let further = ["version", "region", "tenant"];

    let (id, entry) = of("cloudevents");
    let own = [
        "ce_specversion",
        "ce_id",
        "ce_type",
        "ce_source",
        "ce_time",
        "ce_subject",
        "content-type",
        "data",
    ];
    assert_eq!(names(&entry), [&own[..], &further].concat());
    assert_eq!((entry.field("ce_id"), entry.field("ce_subject")), (id.as_str(), "42"));
    assert_eq!(entry.field("data"), "{\"total\": 1.50}");
    assert_eq!((entry.field("version"), entry.field("region")), ("1.50", "us"));

    let (id, entry) = of("structured");
    assert_eq!(names(&entry), [&["cloud_event"], &further[..]].concat());
    let event = json(&entry, "cloud_event");
    assert_eq!(
        (&event["id"], &event["type"], event["data"]["total"].to_string()),
        (&id.into(), &"orders.update".into(), "1.50".to_owned())
    );

    let (id, entry) = of("debezium");
    assert_eq!(names(&entry), [&["key", "value"], &further[..]].concat());
    assert_eq!(json(&entry, "key"), "42");
    let value = json(&entry, "value");
    assert_eq!((&value["op"], &value["before"]), (&"u".into(), &Value::Null));
    assert_eq!(value["after"]["total"].to_string(), "1.50");
    assert_eq!(
        (&value["source"]["event_id"], &value["source"]["name"]),
        (&id.into(), &"/shop".into())
    );

    let (id, entry) = of("broadcaster");
    let own = ["event_id", "event_type", "source", "timestamp", "cloud_event"];
    assert_eq!(names(&entry), [&own[..], &further].concat());
    assert_eq!(entry.field("event_id"), id);
}

/// The position in the WAL, see `read_your_writes`.
#[test]
fn each_format_has_its_place_for_the_position() {
    let stack = with_a_backend_of_each();
    let publish = |backend: &str| -> String {
        stack.pg.one(&format!(
            "select outbox.publish_event('orders.update', '/shop', '1', backend => '{backend}', publisher_config => '{{\"tenant\": \"a\"}}')::text"
        ))
    };
    for format in FORMATS {
        publish(format);
        let entry = stack.redis.wait_entries(format, 1).remove(0);
        assert!(
            entry.fields.iter().all(|(_, value)| !value.contains("lsn")),
            "{entry:?}"
        );
    }
    stack.pg.exec("update outbox.backends set include_lsn = true");
    for format in FORMATS {
        let id = publish(format);
        let entry = stack.redis.wait_entries(format, 2).remove(1);
        let preview: Vec<String> = stack.pg.one(&format!("select outbox.preview('{id}')"));
        let (preview, of_entry) = (&preview[6..], entry.fields.len());
        assert_eq!(preview.len() / 2, of_entry);
        assert_eq!(
            preview.chunks(2).map(|pair| pair[0].as_str()).collect::<Vec<_>>(),
            names(&entry)
        );
        let told = match format {
            "structured" => json(&entry, "cloud_event")["lsn"].as_str().unwrap().to_owned(),
            "debezium" => {
                let number = json(&entry, "value")["source"]["lsn"].as_u64().unwrap();
                stack.pg.one(&format!("select ('0/0'::pg_lsn + {number})::text"))
            }
            _ => {
                let (name, value) = entry.fields.last().unwrap();
                assert_eq!(name, if format == "broadcaster" { "lsn" } else { "ce_lsn" });
                value.clone()
            }
        };
        let is_flushed = format!("select '{told}'::pg_lsn between '0/1' and pg_current_wal_flush_lsn()");
        assert!(stack.pg.one::<bool>(&is_flushed), "{told}");
    }
}

/// In the formats where it is a field, and only while entries have it.
#[test]
fn the_name_of_the_position_is_refused_while_entries_have_it() {
    let stack = with_a_backend_of_each();
    let mut client = stack.pg.client();
    for (format, field) in [("broadcaster", "lsn"), ("cloudevents", "ce_lsn")] {
        let publish = format!(
            "select outbox.publish_event('t', 's', backend => '{format}', publisher_config => '{{\"{field}\": 1}}')"
        );
        let include = |is: bool| format!("update outbox.backends set include_lsn = {is} where name = '{format}'");
        let fields = format!("update outbox.backends set static_fields = '{{\"{field}\": 1}}' where name = '{format}'");
        client.execute(&publish, &[]).unwrap();
        client.execute(&include(true), &[]).unwrap();
        let refused = Refused::of(client.execute(&publish, &[]));
        assert_eq!(refused.code, "22023", "{refused:?}");
        assert!(refused.message.contains(&format!("\"{field}\"")), "{refused:?}");
        assert_eq!(Refused::of(client.execute(&fields, &[])).code, "23514");
        client.execute(&include(false), &[]).unwrap();
        client.execute(&fields, &[]).unwrap();
        assert_eq!(Refused::of(client.execute(&include(true), &[])).code, "23514");
    }
    for format in ["structured", "debezium"] {
        client
            .execute(&format!("update outbox.backends set include_lsn = true, static_fields = '{{\"lsn\": 1}}' where name = '{format}'"), &[])
            .unwrap();
    }
}

/// `make test-debezium` compares them with those of Debezium itself.
#[test]
fn format_debezium_has_the_old_and_the_new_row_of_an_attached_table() {
    let stack = with_a_backend_of_each();
    stack.pg.exec(
        "create table orders (id int primary key, total numeric);
         select outbox.attach_table('orders', backend => 'debezium', payload => 'both')",
    );
    for statement in [
        "insert into orders values (7, 1.50)",
        "update orders set total = 2",
        "delete from orders",
    ] {
        stack.pg.exec(statement);
    }
    let entries = stack.redis.wait_entries("debezium", 3);
    let told = entries.iter().map(|entry| {
        let value = json(entry, "value");
        ["op", "before", "after"].map(|name| value[name].to_string())
    });
    let (first, second) = (r#"{"id":7,"total":1.50}"#, r#"{"id":7,"total":2}"#);
    assert_eq!(
        told.collect::<Vec<_>>(),
        [
            ["\"c\"", "null", first],
            ["\"u\"", first, second],
            ["\"d\"", second, "null"]
        ]
    );
}

#[test]
fn a_changed_format_counts_from_the_next_event_on() {
    let stack = Stack::start();
    stack.publish("before");
    stack.wait_events(1);
    stack
        .pg
        .exec("update outbox.backends set format = 'structured', static_fields = '{\"v\": 2}'");
    stack.publish("after");
    let entries = stack.wait_events(2);
    assert_eq!(names(&entries[1]), ["cloud_event", "v"]);
}

#[test]
fn invalid_formats_are_refused_when_the_row_is_written() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    for set in [
        "format = 'avro'",
        "static_fields = '[]'",
        "static_fields = '\"text\"'",
        "static_fields = '{\"a\": null}'",
        "static_fields = '{\"a\": [1]}'",
        "static_fields = '{\"a\": []}'",
        "static_fields = '{\"a\": {\"b\": 1}}'",
        "static_fields = '{\"event_id\": \"mine\"}'",
        "format = 'cloudevents', static_fields = '{\"data\": 1}'",
        "format = 'structured', static_fields = '{\"cloud_event\": 1}'",
        "format = 'debezium', static_fields = '{\"key\": 1}'",
        // All of a backend's texts together are in the memory of each session.
        "static_fields = jsonb_build_object('a', repeat('x', 70000))",
        "host = repeat('x', 40000), username = repeat('x', 40000)",
        "allowed_streams = array_fill(repeat('x', 1000), '{70}')",
    ] {
        let refused = Refused::of(client.execute(&format!("update outbox.backends set {set}"), &[]));
        assert_eq!(refused.code, "23514", "{set}");
    }
    // This name belongs to another format.
    client
        .execute(
            "update outbox.backends set format = 'debezium', static_fields = '{\"event_id\": \"mine\", \"data\": true}'",
            &[],
        )
        .unwrap();
}

#[test]
fn a_publisher_may_not_name_a_field_of_the_format_by_any_way_in() {
    let stack = with_a_backend_of_each();
    let mut client = stack.pg.client();
    for (backend, field) in [
        ("broadcaster", "timestamp"),
        ("cloudevents", "ce_id"),
        ("cloudevents", "data"),
        ("structured", "cloud_event"),
        ("debezium", "value"),
    ] {
        let config = format!("{{\"{field}\": 1}}");
        for sql in [
            format!("select outbox.publish_event('t', 's', backend => '{backend}', publisher_config => '{config}')"),
            format!(
                "select outbox.publish_events('[{{\"event_type\": \"t\", \"source\": \"s\", \"backend\": \"{backend}\", \
                 \"publisher_config\": {config}}}]')"
            ),
            format!(
                "insert into outbox.events (event_type, source, backend, publisher_config) values ('t', 's', '{backend}', '{config}')"
            ),
        ] {
            let refused = Refused::of(client.query(&sql, &[]));
            assert_eq!(refused.code, "22023", "{sql}");
            assert!(refused.message.contains(field), "{refused:?}");
        }
    }
    for (backend, field) in [
        ("structured", "event_id"),
        ("broadcaster", "data"),
        ("debezium", "ce_id"),
    ] {
        let config = format!("{{\"{field}\": 1}}");
        let sql =
            format!("select outbox.publish_event('t', 's', backend => '{backend}', publisher_config => '{config}')");
        client.query(&sql, &[]).unwrap();
        assert_eq!(stack.redis.wait_entries(backend, 1)[0].field(field), "1");
    }
}

/// Recovery recognises the event of an entry in any format: events that a source has sent are not repeated after its
/// dump was restored elsewhere.
#[test]
fn events_are_found_in_their_streams_whatever_their_format() {
    for format in ["cloudevents", "structured", "debezium"] {
        let stack = Stack::start();
        stack.pg.exec(&format!(
            "update outbox.backends set host = '127.0.0.1', port = {}, format = '{format}'",
            stack.redis.port()
        ));
        // Longer than a search remembers of a value.
        let publish = "select outbox.publish_event('n' || i, 's', to_jsonb(repeat('x', 500)))";
        stack.pg.exec(&format!("{publish} from generate_series(1, 100) i"));
        stack.wait_events(100);
        wait_drained(&stack.pg, "default");
        // Nothing saves the cursor any more: in the dump all events are unsent.
        stack.pg.set("outbox_relay.enabled", "off");
        wait_eq("the worker", None::<i32>, || {
            stack.pg.one("select worker_pid from outbox.status")
        });
        stack.pg.exec("delete from outbox.cursors");
        stack.pg.exec(&format!("{publish} from generate_series(101, 105) i"));
        let target = Postgres::start();
        target.exec("create database copy");
        target.restore("copy", &stack.pg.pg_dump("postgres"));
        stack.wait_events(105);
        target.wait_log(
            "100 of the events after its saved position are already in the streams and are not repeated; 5 are sent",
        );
        wait_eq("nothing is left to compare", 0i64, || {
            target.one_db("copy", "select count(*) from outbox.restores where not is_looked_for")
        });
        assert_eq!(stack.redis.xlen("events"), 105, "{format}");
    }
}
