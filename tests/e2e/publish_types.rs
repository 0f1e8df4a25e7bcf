//! Arguments with the types that drivers send: no cast is needed, and no call is ambiguous.

use kit::{Refused, Stack, types, wait_eq};
use postgres::{Client, NoTls};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use uuid::Uuid;

const ID: &str = "0190d1f0-0000-7000-8000-000000000001";

fn start() -> Stack {
    let stack = Stack::start();
    stack
        .pg
        .exec("create role publisher login; select outbox.grant_publisher('publisher')");
    stack
}

/// The stored row of one call by a publisher, which is rolled back.
fn stored(client: &mut Client, call: &str) -> (Option<Value>, Option<i32>, Option<Value>, Uuid) {
    let mut transaction = client.transaction().unwrap();
    transaction.batch_execute("set local role publisher").unwrap();
    let id: Uuid = transaction
        .query_one(call, &[])
        .unwrap_or_else(|error| panic!("{call}: {error:?}"))
        .get(0);
    transaction.batch_execute("reset role").unwrap();
    let sql =
        "select data::jsonb, max_retries, publisher_config::jsonb, event_id from outbox.events where event_id = $1";
    let row = transaction.query_one(sql, &[&id]).unwrap();
    let row = (row.get(0), row.get(1), row.get(2), row.get(3));
    transaction.rollback().unwrap();
    row
}

#[test]
fn json_of_any_type_is_data() {
    let stack = start();
    let mut client = stack.pg.client();
    let expected = (Some(json!({"a": 1})), None, None, Uuid::nil());
    for data in [
        "'{\"a\": 1}'",
        "'{\"a\": 1}'::json",
        "'{\"a\": 1}'::jsonb",
        "'{\"a\": 1}'::text",
        "'{\"a\": 1}'::varchar",
        "'{\"a\": 1}'::varchar(50)",
        "'{\"a\": 1}'::char(20)",
        "'{\"a\": 1}'::bytea",
        "json_build_object('a', 1)",
        "(select row_to_json(x) from (select 1 as a) x)",
        "format('{\"a\": %s}', 1)",
    ] {
        for call in [
            format!("select outbox.publish_event('t', 's', {data})"),
            format!("select outbox.publish_event('t'::text, 's'::text, {data})"),
            format!("select outbox.publish_event('t'::varchar, 's'::varchar, {data})"),
            format!("select outbox.publish_event(event_type => 't', source => 's', data => {data})"),
            format!("select outbox.publish_event('t', 's', data => {data}, backend => 'default')"),
            format!("select outbox.publish_event('t', 's', {data}, null, null, null, null, null, null, null, null)"),
            format!("select * from outbox.publish_event('t', 's', {data}, subject => null, publisher_config => null)"),
        ] {
            let row = stored(&mut client, &call);
            assert_eq!(
                (row.0, row.1, row.2),
                (expected.0.clone(), expected.1, expected.2.clone()),
                "{call}"
            );
        }
        let config = format!("select outbox.publish_event('t', 's', publisher_config => {data})");
        assert_eq!(stored(&mut client, &config).2, Some(json!({"a": 1})), "{config}");
    }
}

#[test]
fn numbers_and_truth_values_are_data() {
    let stack = start();
    let mut client = stack.pg.client();
    for (data, expected) in [
        ("7", json!(7)),
        ("7::smallint", json!(7)),
        ("7::bigint", json!(7)),
        ("7.5", json!(7.5)),
        ("7.5::real", json!(7.5)),
        ("7.5::float8", json!(7.5)),
        ("true", json!(true)),
        ("1 > 2", json!(false)),
    ] {
        for call in [
            format!("select outbox.publish_event('t', 's', {data})"),
            format!("select outbox.publish_event('t'::varchar, 's'::text, data => {data}, subject => 7)"),
        ] {
            assert_eq!(stored(&mut client, &call).0, Some(expected.clone()), "{call}");
        }
    }
    let infinite = "select outbox.publish_event('t', 's', 'Infinity'::float8)";
    assert_eq!(Refused::of(client.simple_query(infinite)).code, "22P02");
}

/// Accepted, psycopg's [1] would be a list, and its [] an object: it sends '{}' for that.
#[test]
fn arrays_and_times_are_refused_in_words() {
    let stack = start();
    let mut client = stack.pg.client_as("publisher", "postgres");
    for (value, kind) in [
        ("array[1, 2]", "integer[]"),
        ("array[1, 2]::smallint[]", "smallint[]"),
        ("array['a', null]", "text[]"),
        ("array['a']::varchar[]", "character varying[]"),
        ("array['1'::jsonb]", "jsonb[]"),
        ("'{}'::float8[]", "double precision[]"),
        ("now()", "timestamp with time zone"),
        ("localtimestamp", "timestamp without time zone"),
        ("current_date", "date"),
    ] {
        for argument in ["data", "publisher_config"] {
            let call = format!("select outbox.publish_event('t', 's', {argument} => {value})");
            let refused = Refused::of(client.simple_query(&call));
            let message = format!("a value of type {kind} is not JSON");
            assert_eq!((refused.code.as_str(), refused.message), ("42804", message), "{call}");
            let hint = refused.hint.unwrap_or_default();
            assert!(hint.contains("to_jsonb"), "{call}: {hint}");
        }
    }
}

/// Whoever publishes may also have it done by a view, a default, or a function whose body is parsed.
#[test]
fn a_publisher_may_store_a_call_with_arguments_of_any_types() {
    let stack = start();
    stack.pg.exec("grant create on schema public to publisher");
    let mut client = stack.pg.client_as("publisher", "postgres");
    client
        .batch_execute(
            "create function parsed(value json) returns uuid begin atomic
                select outbox.publish_event('parsed', 's', value, subject => 7, scheduled_at => null, max_retries => 3::bigint);
            end;
            create view viewed as select outbox.publish_event('viewed', 's', '{}'::json, 7::bigint) as id;
            create table defaulted (id int, event uuid default outbox.publish_event('defaulted', 's', '{}'::text));
            select parsed('{}');
            select id from viewed;
            insert into defaulted values (1)",
        )
        .unwrap();
    assert_eq!(types(&stack.wait_events(3)), ["parsed", "viewed", "defaulted"]);
}

#[test]
fn a_subject_may_be_a_number_or_a_uuid() {
    let stack = start();
    let mut client = stack.pg.client_as("publisher", "postgres");
    let uuid = format!("'{ID}'::uuid");
    for (subject, expected) in [
        ("7", "7"),
        ("7::smallint", "7"),
        ("7::bigint", "7"),
        ("7.50", "7.50"),
        (uuid.as_str(), ID),
        ("'order/7'::name", "order/7"),
        ("'order/7'::varchar", "order/7"),
    ] {
        for data in ["null", "'1'", "'1'::json", "'1'::jsonb"] {
            let sql = format!(
                "select subject from outbox.publish_event('t', 's', {data}, subject => {subject}), outbox.published_here()"
            );
            let row = client
                .query_one(&sql, &[])
                .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
            assert_eq!(row.get::<_, Option<&str>>(0), Some(expected), "{sql}");
        }
    }
}

#[test]
fn a_time_may_be_a_text_or_a_date() {
    let stack = start();
    let mut client = stack.pg.client();
    client
        .batch_execute("set timezone = 'Asia/Tokyo'; set datestyle = 'SQL, DMY'")
        .unwrap();
    for time in [
        "'2100-02-01'",
        "'2100-02-01'::date",
        "'2100-02-01'::timestamp",
        "'2100-02-01'::timestamptz",
        "'2100-02-01'::text",
        "'2100-02-01 00:00:00'::varchar",
        "'2100-01-31T15:00:00Z'::text",
        "'01/02/2100'::text",
    ] {
        for data in ["'1'", "'1'::json"] {
            let mut transaction = client.transaction().unwrap();
            transaction
                .batch_execute(&format!(
                    "set local role publisher; select outbox.publish_event('t', 's', {data}, scheduled_at => {time}); reset role"
                ))
                .unwrap_or_else(|error| panic!("{time}: {error:?}"));
            let due: bool = transaction
                .query_one(
                    "select scheduled_at = '2100-01-31T15:00:00Z' from outbox.scheduled_events",
                    &[],
                )
                .unwrap()
                .get(0);
            assert!(due, "{time}");
            transaction.rollback().unwrap();
        }
    }
    let wrong = ["", "::text"].map(|cast| {
        let call = format!("select outbox.publish_event('t', 's', scheduled_at => 'soon'{cast})");
        Refused::of(client.simple_query(&call))
    });
    assert_eq!((wrong[0].code.as_str(), &wrong[0]), ("22007", &wrong[1]));
}

#[test]
fn any_number_is_a_number_of_attempts() {
    let stack = start();
    let mut client = stack.pg.client();
    let numbers = [
        "7",
        "7::smallint",
        "7::integer",
        "7::bigint",
        "7::numeric",
        "7.0",
        "7::real",
        "7::double precision",
        "'7'",
        "7e0",
        "'7'::text",
        "'7'::varchar",
    ];
    for number in numbers {
        for call in [
            format!("select outbox.publish_event('t', 's', max_retries => {number})"),
            format!("select outbox.publish_event('t', 's', null, null, null, null, {number})"),
            format!("select outbox.publish_event('t'::varchar, 's', '1'::json, max_retries => {number})"),
        ] {
            assert_eq!(stored(&mut client, &call).1, Some(7), "{call}");
        }
    }
    for number in ["7", "7.0", "7e0", "\"7\""] {
        let list = format!(
            "select outbox.publish_events('[{{\"event_type\": \"t\", \"source\": \"s\", \"max_retries\": {number}}}]')"
        );
        assert_eq!(stored(&mut client, &list).1, Some(7), "{list}");
    }
    let refused = |message: &str, shown: &str| {
        Refused::new(
            "22023",
            message,
            &format!("It is {shown}."),
            "Pass the total number of attempts, or NULL for outbox_relay.max_retries.",
        )
    };
    for (number, expected) in [
        ("-1::bigint", refused("max_retries must not be negative", "-1")),
        (
            "1001::bigint",
            refused("max_retries is too high", "1001; at most 1000 are allowed"),
        ),
        (
            "99999999999",
            refused("max_retries is too high", "99999999999; at most 1000 are allowed"),
        ),
        ("2.5", refused("max_retries must be a whole number", "2.5")),
        ("'NaN'::float8", refused("max_retries must be a whole number", "NaN")),
        ("'many'::text", refused("max_retries must be a whole number", "many")),
    ] {
        let call = format!("select outbox.publish_event('t', 's', max_retries => {number})");
        assert_eq!(Refused::of(client.simple_query(&call)), expected, "{call}");
    }
    let many =
        "select outbox.publish_events('[{\"event_type\": \"t\", \"source\": \"s\", \"max_retries\": \"many\"}]')";
    assert_eq!(
        Refused::of(client.simple_query(many)),
        refused("max_retries must be a whole number", "many")
    );
}

#[test]
fn an_id_may_be_a_text() {
    let stack = start();
    let mut client = stack.pg.client();
    for id in [
        "",
        "::uuid",
        "::text",
        "::varchar",
        "::uuid, data => '1'::json",
        "::text, data => '1'::jsonb",
    ] {
        let call = format!("select outbox.publish_event('t', 's', event_id => '{ID}'{id})");
        assert_eq!(stored(&mut client, &call).3.to_string(), ID, "{call}");
    }
    let wrong = ["", "::text"].map(|cast| {
        let call = format!("select outbox.publish_event('t', 's', event_id => '12'{cast})");
        Refused::of(client.simple_query(&call))
    });
    assert_eq!((wrong[0].code.as_str(), &wrong[0]), ("22P02", &wrong[1]));
}

#[test]
fn text_that_is_no_json_is_refused_as_jsonb_refuses_it() {
    let stack = start();
    let mut client = stack.pg.client();
    for bad in [
        "{\"a\": ",
        "",
        "hello",
        "{\"a\": \"\\u0000\"}",
        "\"\\ud800\"",
        "{'a': 1}",
        "1e400000",
    ] {
        for argument in ["data", "publisher_config"] {
            let refused = ["", "::text", "::varchar", "::bytea"].map(|cast| {
                let bad = if cast == "::bytea" {
                    bad.replace('\\', "\\\\")
                } else {
                    bad.to_owned()
                };
                let bad = bad.replace('\'', "''");
                let sql = format!("select outbox.publish_event('t', 's', {argument} => '{bad}'{cast})");
                Refused::of(client.simple_query(&sql))
            });
            for other in &refused[1..] {
                assert_eq!(&refused[0], other, "{bad} as {argument}");
            }
            assert!(
                ["22P02", "22P05", "22003"].contains(&refused[0].code.as_str()),
                "{refused:?}"
            );
        }
    }
    // Bytes that are no text belong into another argument.
    for bytes in ["\\xff", "\\x2200622200"] {
        let sql = format!("select outbox.publish_event('t', 's', '{bytes}'::bytea)");
        let refused = Refused::of(client.simple_query(&sql));
        assert_eq!(refused.code, "22021", "{refused:?}");
        assert!(
            refused.hint.as_deref().is_some_and(|hint| hint.contains("data_bytes")),
            "{refused:?}"
        );
    }
}

/// INSERT, COPY and arrays accept the same JSON as the function's jsonb.
#[test]
fn json_that_jsonb_refuses_is_refused_by_all_ways() {
    let stack = start();
    let mut client = stack.pg.client();
    for bad in [
        "{\"a\": \"\\u0000\"}",
        "{\"\\u0000\": 1}",
        "\"\\ud800\"",
        "{\"a\": \"\\udc00\"}",
        "{\"a\": \"\\ud800\\ud800\"}",
        "[1e400000]",
    ] {
        for argument in ["data", "publisher_config"] {
            let function = format!("select outbox.publish_event('t', 's', {argument} => '{bad}')");
            let said = Refused::of(client.simple_query(&function));
            assert!(["22P02", "22P05", "22003"].contains(&said.code.as_str()), "{said:?}");
            let insert =
                format!("insert into outbox.events (event_type, source, {argument}) values ('t', 's', '{bad}')");
            assert_eq!(Refused::of(client.simple_query(&insert)), said, "{insert}");
            let array = format!(
                "select outbox.publish_events('[{{\"event_type\": \"t\", \"source\": \"s\", \"{argument}\": {bad}}}]')"
            );
            assert_eq!(Refused::of(client.simple_query(&array)).code, said.code, "{array}");
            let mut copy = client
                .copy_in(&format!(
                    "copy outbox.events (event_type, source, {argument}) from stdin"
                ))
                .unwrap();
            std::io::Write::write_all(&mut copy, format!("t\ts\t{}\n", bad.replace('\\', "\\\\")).as_bytes()).unwrap();
            assert_eq!(Refused::of(copy.finish()), said, "{bad} by COPY");
        }
    }
    // Valid text is stored unchanged.
    let good = "{\"b\": \"\\u00e9 \\ud83d\\ude00 3e5\", \"a\": 1e3, \"a\": \"\\\\u0000\"}";
    client
        .execute(
            "insert into outbox.events (event_type, source, data) values ('good', 's', $1::text::json)",
            &[&good],
        )
        .unwrap();
    assert_eq!(stack.pg.one::<String>("select data::text from outbox.events"), good);
    assert_eq!(types(&stack.wait_events(1)), ["good"]);
}

/// The values that ORMs send for an absent one, in each way to publish; stored as NULL.
#[test]
fn empty_texts_and_json_null_count_as_absent() {
    let stack = start();
    let mut client = stack.pg.client();
    let given = "subject, backend, stream, data_schema, publisher_config";
    client
        .batch_execute(&format!(
            "select outbox.publish_event('t', 's', null, '', '', publisher_config => 'null', stream => '', data_schema => '');
            select outbox.publish_event('t', 's', '1'::json, '', '', publisher_config => 'null'::json, stream => '', data_schema => '');
            select outbox.publish_events('[{{\"event_type\": \"t\", \"source\": \"s\", \"subject\": \"\", \"backend\": \"\", \"stream\": \"\", \
                \"data_schema\": \"\", \"publisher_config\": null}}]');
            insert into outbox.events (event_type, source, {given}) values ('t', 's', '', '', '', '', ' null ');
            select outbox.publish_event('later', 's', null, '', '', '2100-01-01', publisher_config => 'null', stream => '', data_schema => '')"
        ))
        .unwrap();
    let mut copy = client
        .copy_in(&format!("copy outbox.events (event_type, source, {given}) from stdin (format csv, force_not_null (subject, backend, stream, data_schema))"))
        .unwrap();
    std::io::Write::write_all(&mut copy, b"t,s,,,,,null\n").unwrap();
    copy.finish().unwrap();
    let rows: i64 = stack.pg.one(
        "select count(*) from (select subject, backend, stream, data_schema, publisher_config::text from outbox.events
            union all select subject, backend, stream, data_schema, publisher_config::text from outbox.scheduled_events) e
            where num_nonnulls(subject, stream, data_schema, publisher_config) = 0 and backend = 'default'",
    );
    assert_eq!(rows, 6);
    assert_eq!(types(&stack.wait_events(5)), ["t"; 5]);
    // A setting of the session counts as if nothing had been reported yet.
    stack.pg.exec("insert into outbox.backends (name, host, port, stream_name) select 'other', host, port, 'others' from outbox.backends");
    client
        .batch_execute(
            "set outbox_relay.default_backend = 'other'; select outbox.publish_event('o', 's', backend => '')",
        )
        .unwrap();
    wait_eq("its stream", 1, || stack.redis.xlen("others"));
}

/// Severities and messages.
type Notices = Arc<Mutex<Vec<(String, String)>>>;

/// A client that keeps the server's notices.
fn noticing(stack: &Stack) -> (Client, Notices) {
    let said = Arc::new(Mutex::new(Vec::new()));
    let heard = said.clone();
    let mut config = stack.pg.config("postgres", "postgres");
    config.notice_callback(move |notice| {
        let hint = notice.hint().unwrap_or_default();
        assert!(
            notice.detail().is_some() && hint.ends_with("This warning appears once in a session."),
            "{notice:?}"
        );
        heard
            .lock()
            .unwrap()
            .push((notice.severity().to_owned(), notice.message().to_owned()));
    });
    (config.connect(NoTls).unwrap(), said)
}

#[test]
fn json_that_was_encoded_twice_is_reported_once_in_a_session() {
    let stack = Stack::start();
    let expected = vec![("WARNING".to_owned(), "data is a JSON string that holds JSON".to_owned())];
    for publish in [
        "select outbox.publish_event('t', 's', to_jsonb('{\"a\": 1}'::text))",
        "select outbox.publish_event('t', 's', to_json('{\"a\": 1}'::text))",
        "select outbox.publish_events(jsonb_build_array(jsonb_build_object('event_type', 't', 'source', 's', 'data', '{\"a\": 1}'::text)))",
        "insert into outbox.events (event_type, source, data) values ('t', 's', to_json('{\"a\": 1}'::text))",
    ] {
        let (mut client, said) = noticing(&stack);
        for harmless in ["'\"words\"'", "'\"{words}\"'", "'{\"a\": \"{}\"}'", "'1'", "null"] {
            client
                .batch_execute(&format!("select outbox.publish_event('t', 's', {harmless})"))
                .unwrap();
        }
        assert_eq!(*said.lock().unwrap(), [], "before {publish}");
        client.batch_execute(publish).unwrap();
        client.batch_execute(publish).unwrap();
        assert_eq!(*said.lock().unwrap(), expected, "{publish}");
    }
    let mut client = stack.pg.client();
    let config = "select outbox.publish_event('t', 's', publisher_config => to_jsonb('{\"a\": 1}'::text))";
    assert_eq!(
        Refused::of(client.simple_query(config)),
        Refused::new(
            "22023",
            "publisher_config must be a JSON object",
            "It is a JSON string that holds an object: it was encoded twice.",
            "Pass a flat JSON object such as {\"priority\": 1}."
        )
    );
}

#[test]
fn a_source_that_is_no_uri_reference_is_reported_once_in_a_session() {
    let stack = Stack::start();
    for publish in [
        "select outbox.publish_event('t', 'user service')",
        "select outbox.publish_events('[{\"event_type\": \"t\", \"source\": \"user service\"}]')",
        "insert into outbox.events (event_type, source) values ('t', 'user service')",
    ] {
        let (mut client, said) = noticing(&stack);
        client
            .batch_execute("select outbox.publish_event('t', '/a/b?c#d')")
            .unwrap();
        client.batch_execute(publish).unwrap();
        client.batch_execute(publish).unwrap();
        let expected = [(
            "WARNING".to_owned(),
            "source \"user service\" is not a URI reference".to_owned(),
        )];
        assert_eq!(*said.lock().unwrap(), expected, "{publish}");
    }
    assert_eq!(stack.wait_events(9).len(), 9);
}
