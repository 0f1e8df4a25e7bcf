//! What a publisher may pass: everything else is refused at once, with a clear error, and leaves nothing behind.

mod ids;

use kit::{Refused, Stack};
use postgres::Client;
use serde_json::Value;

const ANY_TEXT: &str = "Every event has a type and a source.";
const NAME_HINT: &str = "Pass a text of 1 to 255 characters.";
const CONFIG_DETAIL: &str = "Its keys and values become further fields of the stream entry.";
const CONFIG_HINT: &str = "Pass a flat JSON object such as {\"priority\": 1}.";

/// Runs a statement in a savepoint of the open transaction, which it must not break; returns the error.
#[track_caller]
fn refuse(client: &mut Client, sql: &str) -> Refused {
    client.batch_execute("savepoint refused").unwrap();
    let refused = Refused::of(client.simple_query(sql));
    client
        .batch_execute("rollback to savepoint refused; release savepoint refused")
        .unwrap();
    refused
}

/// The same event by publish_event, publish_events and a plain INSERT, as SQL; the values are SQL expressions.
fn all_ways(event_type: &str, source: &str, more: &[(&str, &str)]) -> [String; 3] {
    let named: String = more
        .iter()
        .map(|(name, value)| format!(", {name} => {value}"))
        .collect();
    let keys: String = more
        .iter()
        .map(|(name, value)| format!(", '{name}', {value}"))
        .collect();
    let names: String = more.iter().map(|(name, _)| format!(", {name}")).collect();
    let values: String = more.iter().map(|(_, value)| format!(", {value}")).collect();
    [
        format!("select outbox.publish_event({event_type}, {source}{named})"),
        format!(
            "select outbox.publish_events(jsonb_build_array(\
             jsonb_build_object('event_type', {event_type}, 'source', {source}{keys})))"
        ),
        format!("insert into outbox.events (event_type, source{names}) values ({event_type}, {source}{values})"),
    ]
}

/// event_type and source, further arguments, all as SQL, and the expected error.
type Case<'a> = (&'a str, &'a str, Vec<(&'a str, &'a str)>, Refused);

/// All ways give the same error, and the transaction goes on.
#[test]
fn bad_input_is_refused_in_words_and_the_transaction_goes_on() {
    let stack = Stack::start();
    let missing = |field: &str| {
        Refused::new(
            "22023",
            &format!("{field} must not be null or empty"),
            ANY_TEXT,
            NAME_HINT,
        )
    };
    let too_long = |field: &str, length: usize, limit: usize| {
        let detail = format!("It has {length} characters; at most {limit} are allowed.");
        Refused::new(
            "22023",
            &format!("{field} is too long"),
            &detail,
            "Put longer texts into data.",
        )
    };
    let config = |message: &str| Refused::new("22023", message, CONFIG_DETAIL, CONFIG_HINT);
    let not_flat = config("publisher_config key \"a\" has a value that is not a string, number or boolean");
    let not_object = config("publisher_config must be a JSON object");
    let no_backend = Refused::new(
        "42704",
        "backend \"nowhere\" does not exist",
        "Backends are the rows of outbox.backends.",
        "Check the name, or outbox_relay.default_backend if none was given.",
    );
    let (good, none) = ("'t'", Vec::new());
    let mut cases: Vec<Case<'_>> = vec![
        ("null", good, none.clone(), missing("event_type")),
        ("''", good, none.clone(), missing("event_type")),
        (good, "null", none.clone(), missing("source")),
        (good, "''", none.clone(), missing("source")),
        ("repeat('x', 256)", good, none.clone(), too_long("event_type", 256, 255)),
        (
            "repeat('😀', 256)",
            good,
            none.clone(),
            too_long("event_type", 256, 255),
        ),
        (good, "repeat('é', 300)", none.clone(), too_long("source", 300, 255)),
        (
            good,
            good,
            vec![("subject", "repeat('x', 1025)")],
            too_long("subject", 1025, 1024),
        ),
        (
            good,
            good,
            vec![("data_schema", "repeat('x', 1025)")],
            too_long("data_schema", 1025, 1024),
        ),
        (
            good,
            good,
            vec![("stream", "repeat('x', 1025)")],
            too_long("stream", 1025, 1024),
        ),
        (good, good, vec![("backend", "'nowhere'")], no_backend.clone()),
        (good, good, vec![("publisher_config", "'[1]'")], not_object.clone()),
        (good, good, vec![("publisher_config", "'3'")], not_object.clone()),
        (good, good, vec![("publisher_config", "'\"text\"'")], not_object),
        (
            good,
            good,
            vec![("publisher_config", "'{\"a\": {\"b\": 1}}'")],
            not_flat.clone(),
        ),
        (
            good,
            good,
            vec![("publisher_config", "'{\"a\": [1]}'")],
            not_flat.clone(),
        ),
        (good, good, vec![("publisher_config", "'{\"a\": null}'")], not_flat),
        (
            good,
            good,
            vec![("max_retries", "-1")],
            Refused::new(
                "22023",
                "max_retries must not be negative",
                "It is -1.",
                "Pass the total number of attempts, or NULL for outbox_relay.max_retries.",
            ),
        ),
        (
            good,
            good,
            vec![("max_retries", "1001")],
            Refused::new(
                "22023",
                "max_retries is too high",
                "It is 1001; at most 1000 are allowed.",
                "Pass the total number of attempts, or NULL for outbox_relay.max_retries.",
            ),
        ),
    ];
    let built_in = ["event_id", "event_type", "source", "timestamp", "cloud_event"].map(|field| {
        (
            format!("'{{\"other\": 1, \"{field}\": \"x\"}}'"),
            format!("publisher_config must not name the built-in field \"{field}\""),
        )
    });
    for (value, message) in &built_in {
        cases.push((good, good, vec![("publisher_config", value)], config(message)));
    }

    let mut client = stack.pg.client();
    client.batch_execute("begin").unwrap();
    for (number, (event_type, source, more, expected)) in cases.iter().enumerate() {
        for (way, sql) in all_ways(event_type, source, more).into_iter().enumerate() {
            // In jsonb, a string that holds JSON is not an object: an element of publish_events gives the object
            // itself.
            let sql = match way {
                1 => sql.replace("'publisher_config', '", "'publisher_config', jsonb '"),
                _ => sql,
            };
            assert_eq!(&refuse(&mut client, &sql), expected, "case {number}: {sql}");
        }
    }
    client
        .batch_execute("set local outbox_relay.default_backend = 'nowhere'")
        .unwrap();
    for sql in all_ways(good, good, &[]) {
        assert_eq!(refuse(&mut client, &sql), no_backend, "{sql}");
    }
    client
        .batch_execute(
            "set local outbox_relay.default_backend = 'default'; \
             select outbox.publish_event('goes.on', 'test'); commit",
        )
        .unwrap();
    let entries = stack.wait_events(1);
    assert_eq!(
        entries.iter().map(|e| e.field("event_type")).collect::<Vec<_>>(),
        ["goes.on"]
    );
    let kept: i64 = stack.pg.one(
        "select (select count(*) from outbox.events) + (select count(*) from outbox.scheduled_events) \
         + (select count(*) from outbox.failed_events)",
    );
    assert_eq!(kept, 1);
}

#[test]
fn names_of_255_characters_pass_whatever_they_weigh() {
    let stack = Stack::start();
    let names = [
        "x".repeat(255),
        "😀".repeat(255),
        "a".to_string(),
        " ".to_string(),
        "a\n\t\"\\b".to_string(),
    ];
    let mut client = stack.pg.client();
    for name in &names {
        client.execute("select outbox.publish_event($1, $1)", &[name]).unwrap();
        client
            .execute(
                "insert into outbox.events (event_type, source) values ($1, $1)",
                &[name],
            )
            .unwrap();
    }
    let expected: Vec<&String> = names.iter().flat_map(|name| [name, name]).collect();
    let entries = stack.wait_events(expected.len());
    assert_eq!(entries.len(), expected.len());
    for (entry, name) in entries.iter().zip(expected) {
        assert_eq!((entry.field("event_type"), entry.field("source")), (&**name, &**name));
        let cloud_event: Value = serde_json::from_str(entry.field("cloud_event")).unwrap();
        assert_eq!(cloud_event["type"], **name);
    }
}

#[test]
fn invalid_text_is_never_stored() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    client.batch_execute("begin").unwrap();
    let invalid = refuse(
        &mut client,
        "select outbox.publish_event(convert_from('\\xc328', 'UTF8'), 's')",
    );
    assert_eq!(invalid.code, "22021");
    client.batch_execute("savepoint bytes").unwrap();
    let zero = Refused::of(client.execute("select outbox.publish_event($1, 's')", &[&"a\0b"]));
    assert_eq!(
        (zero.code.as_str(), zero.message.as_str()),
        ("22021", "invalid byte sequence for encoding \"UTF8\": 0x00")
    );
    client.batch_execute("rollback to savepoint bytes").unwrap();
    let escaped = refuse(
        &mut client,
        "select outbox.publish_event('t', 's', '{\"a\": \"\\u0000\"}')",
    );
    assert_eq!(escaped.code, "22P05");
    let no_json = refuse(&mut client, "select outbox.publish_event('t', 's', '{\"a\": ')");
    assert_eq!(no_json.code, "22P02");
    let no_json = refuse(
        &mut client,
        "insert into outbox.events (event_type, source, data) values ('t', 's', 'x')",
    );
    assert_eq!(no_json.code, "22P02");
    // The type json accepts half a surrogate pair, which no text can hold.
    let half =
        "insert into outbox.events (event_type, source, publisher_config) values ('t', 's', '{\"a\": \"\\ud800\"}')";
    let half = refuse(&mut client, half);
    assert_eq!(
        (half.code.as_str(), half.detail.as_deref()),
        ("22P02", Some("Unicode low surrogate must follow a high surrogate."))
    );
    client.batch_execute("commit").unwrap();
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.events"), 0);
}

#[test]
fn any_json_is_delivered_as_it_is() {
    let stack = Stack::start();
    let nested = format!("{}1{}", "[".repeat(1_000), "]".repeat(1_000));
    let objects = format!("{}1{}", "{\"a\": ".repeat(1_000), "}".repeat(1_000));
    let texts = [
        "null",
        "true",
        "0",
        "-1.50",
        "12345678901234567890.1234567890",
        "\"\"",
        "\"text \\\" \\\\ \\n é 😀\"",
        "[]",
        "{}",
        "[1, \"two\", null, {\"three\": 3}]",
        "{\"\": null, \"é\": \"😀\"}",
        &nested,
        &objects,
    ];
    let mut client = stack.pg.client();
    for text in texts {
        let sql = "select outbox.publish_event('t', 's', $1::text::jsonb)";
        client.execute(sql, &[&text]).unwrap();
        let sql = "select outbox.publish_events(jsonb_build_array(\
                   jsonb_build_object('event_type', 't', 'source', 's', 'data', $1::text::jsonb)))";
        client.execute(sql, &[&text]).unwrap();
        let sql = "insert into outbox.events (event_type, source, data) values ('t', 's', $1::text::json)";
        client.execute(sql, &[&text]).unwrap();
    }
    let entries = stack.wait_events(texts.len() * 3);
    for (chunk, text) in entries.chunks(3).zip(texts) {
        for entry in chunk {
            let cloud_event = entry.field("cloud_event");
            // JSON null means "no data", as for the consumers of django-broadcaster.
            let end = match text {
                "null" => "\"datacontenttype\": \"application/json\"}".to_string(),
                text => format!("\"datacontenttype\": \"application/json\", \"data\": {text}}}"),
            };
            assert!(cloud_event.ends_with(&end), "{text}: {cloud_event}");
        }
    }
    assert_eq!(entries.len(), texts.len() * 3);
}

#[test]
fn the_largest_event_passes_and_a_byte_more_is_refused() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    // Of the event's texts: 't', 's' and the string with its quotes.
    let room = 1_024 * 1_024 - 4;
    let too_large = |size: usize, limit: usize| {
        Refused::new(
            "54000",
            "event is too large",
            &format!("It has {size} bytes; at most {limit} are allowed."),
            "Put large payloads elsewhere and publish a reference, or raise outbox_relay.max_event_size.",
        )
    };
    client.batch_execute("begin").unwrap();
    for (way, sql) in all_ways("'t'", "'s'", &[("data", "to_jsonb(repeat('x', ROOM))")])
        .iter()
        .enumerate()
    {
        let at_most = |room: usize| sql.replace("ROOM", &room.to_string());
        assert_eq!(
            refuse(&mut client, &at_most(room + 1)),
            too_large(1_048_577, 1_048_576),
            "way {way}"
        );
        client.batch_execute(&at_most(room)).unwrap();
    }
    client.batch_execute("commit").unwrap();
    let entries = stack.wait_events(3);
    assert_eq!(entries.len(), 3);
    for entry in &entries {
        let cloud_event: Value = serde_json::from_str(entry.field("cloud_event")).unwrap();
        assert_eq!(cloud_event["data"].as_str().unwrap(), "x".repeat(room));
    }

    // All texts count, and the limit can be changed.
    client
        .batch_execute("begin; set local outbox_relay.max_event_size = '1kB'")
        .unwrap();
    let rest = 1_024 - "t".len() - "s".len() - "[1]".len() - "{\"k\": \"v\"}".len() - "str".len() - "http://s".len();
    let sql = |subject: usize| {
        format!(
            "select outbox.publish_event('t', 's', '[1]', repeat('x', {subject}), stream => 'str', \
             publisher_config => '{{\"k\": \"v\"}}', data_schema => 'http://s')"
        )
    };
    assert_eq!(refuse(&mut client, &sql(rest + 1)), too_large(1_025, 1_024));
    client.batch_execute(&sql(rest)).unwrap();
    client.batch_execute("rollback").unwrap();
}

#[test]
fn a_stream_must_match_the_backends_patterns() {
    let stack = Stack::start();
    let allow = |patterns: &str| {
        stack.pg.exec(&format!(
            "update outbox.backends set allowed_streams = '{patterns}' where name = 'default'"
        ));
    };
    let mut client = stack.pg.client();
    let mut named = stack.pg.client();
    let mut named = |stream: &str| named.query_one("select outbox.publish_event('t', 's', stream => $1)", &[&stream]);
    let mut publish = |stream: &str| client.query_one("select outbox.publish_event($1, 's', stream => $1)", &[&stream]);
    allow("{orders,user.*,log-?}");
    for stream in ["orders", "user.", "user.created", "log-1"] {
        publish(stream).unwrap();
    }
    for stream in ["order", "orders2", "users", "log-", "log-10", "events"] {
        let expected = Refused::new(
            "42501",
            &format!("backend \"default\" does not allow the stream \"{stream}\""),
            "No pattern in the backend's allowed_streams matches.",
            "Ask the administrator to extend allowed_streams.",
        );
        assert_eq!(Refused::of(publish(stream)), expected);
    }
    // The backend's own stream needs no permission, and a change applies at once.
    stack.publish("own");
    allow("{}");
    assert_eq!(Refused::of(publish("orders")).code, "42501");
    allow("{order*}");
    publish("orders2").unwrap();
    // An empty name means the backend's own stream.
    named("").unwrap();
    for stream in ["orders", "user.", "user.created", "log-1", "orders2"] {
        let entries = stack.redis.wait_entries(stream, 1);
        assert_eq!(
            entries.iter().map(|e| e.field("event_type")).collect::<Vec<_>>(),
            [stream]
        );
    }
    let own = stack.wait_events(2);
    assert_eq!([own[0].field("event_type"), own[1].field("event_type")], ["own", "t"]);
}
