//! Payloads that are bytes: `data_bytes` of `publish_event`, `data_base64` of `publish_events`, and `binary_data()` for
//! a plain INSERT.

use kit::{Postgres, QUICK, Redis, Refused, Stack, wait_drained, wait_eq};
use serde_json::{Value, json};

/// All byte values, in base64 with padding, including bytes that text cannot hold.
const BYTES: [u8; 7] = [0, 255, 254, b'"', b'\r', b'\n', 200];
const HEX: &str = "\\x00fffe220d0ac8";
const BASE64: &str = "AP/+Ig0KyA==";

/// A backend of each format, each with a stream of that name.
fn with_formats(stack: &Stack) {
    for format in ["broadcaster", "cloudevents", "structured", "debezium"] {
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port, stream_name, format) values ('{format}', '127.0.0.1', {}, '{format}', '{format}')",
            stack.redis.port()
        ));
    }
}

/// Each way to publish the bytes to a backend.
fn ways(backend: &str) -> [String; 6] {
    [
        format!("select outbox.publish_event('t', 's', data_bytes => '{HEX}', backend => '{backend}')"),
        format!(
            "select outbox.publish_event('t', 's', null, data_bytes => '{HEX}'::bytea, backend => '{backend}', max_retries => 3::bigint)"
        ),
        format!("select outbox.publish_event('t', 's', outbox.binary_data('{HEX}'), backend => '{backend}')"),
        format!(
            "select outbox.publish_events('[{{\"event_type\": \"t\", \"source\": \"s\", \"data_base64\": \"{BASE64}\", \"backend\": \"{backend}\"}}]')"
        ),
        format!(
            "insert into outbox.events (event_type, source, data, backend) values ('t', 's', outbox.binary_data('{HEX}'), '{backend}')"
        ),
        format!(
            "select outbox.publish_event('t', 's', data_bytes => '{HEX}', backend => '{backend}', scheduled_at => clock_timestamp() + interval '1 s')"
        ),
    ]
}

/// The values of a field of a stream's entries.
fn values(stack: &Stack, stream: &str, field: &str) -> Vec<Vec<u8>> {
    let entries: Vec<(String, Vec<Vec<u8>>)> = redis::cmd("XRANGE")
        .arg(&[stream, "-", "+"])
        .query(&mut stack.redis.conn())
        .expect("a stream");
    let value = |fields: &Vec<Vec<u8>>| {
        let place = fields.chunks(2).find(|pair| pair[0] == field.as_bytes());
        place.unwrap_or_else(|| panic!("no {field} in {fields:?}"))[1].clone()
    };
    entries.iter().map(|(_, fields)| value(fields)).collect()
}

fn json_values(stack: &Stack, stream: &str, field: &str) -> Vec<Value> {
    let parsed = |text: &Vec<u8>| serde_json::from_slice(text).expect("JSON");
    values(stack, stream, field).iter().map(parsed).collect()
}

#[test]
fn bytes_reach_the_entry_in_each_format_however_they_are_published() {
    let stack = Stack::start();
    with_formats(&stack);
    let mut count = 0;
    for format in ["broadcaster", "cloudevents", "structured", "debezium"] {
        let ways = ways(format);
        count = ways.len();
        ways.iter().for_each(|sql| stack.pg.exec(sql));
    }
    for format in ["broadcaster", "cloudevents", "structured", "debezium"] {
        wait_eq("entries", count, || stack.redis.xlen(format));
    }
    assert_eq!(values(&stack, "cloudevents", "data"), vec![BYTES.to_vec(); count]);
    assert_eq!(
        values(&stack, "cloudevents", "content-type"),
        vec![b"application/octet-stream".to_vec(); count]
    );
    for format in ["broadcaster", "structured"] {
        for event in json_values(&stack, format, "cloud_event") {
            assert_eq!((&event["data_base64"], event.get("data")), (&json!(BASE64), None));
            assert_eq!(event["datacontenttype"], "application/octet-stream");
        }
    }
    for envelope in json_values(&stack, "debezium", "value") {
        assert_eq!(
            (&envelope["after"], &envelope["before"]),
            (&json!(BASE64), &Value::Null)
        );
    }
    // Empty bytes are a payload as well, and a string stays a string.
    stack
        .pg
        .exec("select outbox.publish_event('t', 's', data_bytes => '', backend => 'structured')");
    stack.pg.exec(&format!(
        "select outbox.publish_event('t', 's', to_jsonb('{BASE64}'::text), backend => 'structured')"
    ));
    stack
        .pg
        .exec("select outbox.publish_event('t', 's', data_bytes => null, backend => 'structured')");
    wait_eq("entries", count + 3, || stack.redis.xlen("structured"));
    let events = json_values(&stack, "structured", "cloud_event").split_off(count);
    assert_eq!(events[0]["data_base64"], "");
    assert_eq!(
        (&events[1]["data"], events[1].get("data_base64")),
        (&json!(BASE64), None)
    );
    assert_eq!((events[2].get("data"), events[2].get("data_base64")), (None, None));
}

#[test]
fn an_invalid_payload_is_refused_at_once() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    let item =
        |more: &str| format!("select outbox.publish_events('[{{\"event_type\": \"t\", \"source\": \"s\", {more}}}]')");
    for (sql, code, said) in [
        ("select outbox.publish_event('t', 's', '{}', data_bytes => 'x')".to_owned(), "22023", "data and data_bytes exclude each other"),
        ("select outbox.publish_event('t', 's', 'null', data_bytes => 'x')".to_owned(), "22023", "data and data_bytes exclude each other"),
        (item("\"data\": 1, \"data_base64\": \"AAAA\""), "22023", "data and data_base64 exclude each other"),
        (item("\"data_base64\": \"AA\""), "22023", "data_base64 must be base64"),
        (item("\"data_base64\": \"AA-_\""), "22023", "data_base64 must be base64"),
        (item("\"data_base64\": 1"), "22023", "data_base64 must be a string"),
        (
            "select outbox.publish_event('t', 's', data_bytes => convert_to(repeat('x', 800000), 'utf8'))".to_owned(),
            "54000",
            "event is too large",
        ),
        (
            "insert into outbox.events (event_type, source, data) select 't', 's', outbox.binary_data(convert_to(repeat('x', 800000), 'utf8'))".to_owned(),
            "54000",
            "event is too large",
        ),
    ] {
        let refused = Refused::of(client.execute(&sql, &[]));
        assert_eq!(refused.code, code, "{sql}: {refused:?}");
        assert!(refused.message.contains(said), "{sql}: {refused:?}");
    }
    client
        .execute(&item("\"data\": null, \"data_base64\": \"AAAA\""), &[])
        .unwrap();
    client
        .execute(
            "select outbox.publish_event('t', 's', data_bytes => convert_to(repeat('x', 780000), 'utf8'))",
            &[],
        )
        .unwrap();
    stack.wait_events(2);
}

/// Failed, retried, replayed, restored and erased: this code does not depend on the kind of payload.
#[test]
fn binary_payloads_survive_failure_retry_replay_restore_and_erasure() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[("outbox_relay.max_retries", "1")]),
        Redis::start(),
    );
    with_formats(&stack);
    let expected = |times: usize| vec![BYTES.to_vec(); times];
    stack.redis.call(&["SET", "bad", "a string"]);
    let id: String = stack.pg.one(&format!(
        "select outbox.publish_event('t', 's', data_bytes => '{HEX}', backend => 'cloudevents', stream => 'bad')::text"
    ));
    wait_eq("failed events", 1i64, || {
        stack.pg.one("select count(*) from outbox.failed_events")
    });
    let preview: Vec<String> = stack.pg.one(&format!("select outbox.preview('{id}')"));
    assert_eq!(preview[preview.len() - 2..], ["data", HEX]);
    stack.redis.call(&["DEL", "bad"]);
    assert_eq!(stack.pg.one::<i64>("select outbox.retry_failed()"), 1);
    wait_eq("entries", 1, || stack.redis.xlen("bad"));
    wait_drained(&stack.pg, "cloudevents");
    assert_eq!(
        stack.pg.one::<i64>("select outbox.replay('cloudevents', '-infinity')"),
        1
    );
    wait_eq("entries", 2, || stack.redis.xlen("bad"));
    assert_eq!(values(&stack, "bad", "data"), expected(2));
    wait_drained(&stack.pg, "cloudevents");
    assert!(stack.pg.one::<bool>(&format!("select outbox.erase('{id}')")));
    stack.pg.exec("select outbox.replay('cloudevents', '-infinity')");
    wait_eq("entries", 3, || stack.redis.xlen("bad"));
    let fields: redis::Value = redis::cmd("XREVRANGE")
        .arg(&["bad", "+", "-", "COUNT", "1"])
        .query(&mut stack.redis.conn())
        .unwrap();
    assert!(!format!("{fields:?}").contains("octet-stream"), "{fields:?}");

    let mut client = stack.pg.client();
    client.batch_execute("begin").unwrap();
    client
        .batch_execute(&format!("select outbox.publish_event('t', 's', data_bytes => '{HEX}')"))
        .unwrap();
    let shown: Value = client
        .query_one("select data from outbox.published_here()", &[])
        .unwrap()
        .get(0);
    client.batch_execute("rollback").unwrap();
    assert_eq!(shown, json!(BASE64));

    stack.pg.exec("update outbox.backends set enabled = false");
    stack.pg.exec(&format!(
        "select outbox.publish_event('t', 's', data_bytes => '{HEX}', backend => 'cloudevents', stream => 'moved')"
    ));
    let target = Postgres::start();
    target.exec("create database copy");
    target.restore("copy", &stack.pg.pg_dump("postgres"));
    target.exec_db(
        "copy",
        "update outbox.backends set enabled = true where name = 'cloudevents'",
    );
    wait_eq("entries", 1, || stack.redis.xlen("moved"));
    assert_eq!(values(&stack, "moved", "data"), expected(1));
}

/// Rows of other events are as wide as before: bytes have no column of their own.
#[test]
fn a_publisher_may_publish_binary_payloads_in_each_way() {
    let stack = Stack::start();
    stack
        .pg
        .exec("create role app login; select outbox.grant_publisher('app')");
    let mut app = stack.pg.client_as("app", "postgres");
    for sql in ways("default") {
        app.batch_execute(&sql).unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    }
    stack.wait_events(ways("default").len());
}
