//! Every way to publish, and the entries that arrive.

use std::io::Write;
use std::time::{Duration, Instant};

use kit::{Postgres, Redis, Refused, Stack, types, wait_eq, wait_until};
use postgres::Client;
use serde_json::Value;
use uuid::Uuid;

/// The fields that an event of the test below must have, given the id and time that Postgres gave it.
fn expected_fields(client: &mut Client, id: Uuid, data: &str, config: &[(&str, &str)]) -> Vec<(String, String)> {
    let sql = "select to_char(created_at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"+00:00\"') \
               from outbox.events where event_id = $1";
    let time: String = client.query_one(sql, &[&id]).unwrap().get(0);
    let cloud_event = format!(
        "{{\"specversion\": \"1.0\", \"type\": \"order.placed\", \"source\": \"shop \\\"é\\\"\", \"id\": \"{id}\", \
         \"time\": \"{time}\", \"subject\": \"order/1\", \"datacontenttype\": \"application/json\", \
         \"dataschema\": \"https://example.org/s\", \"data\": {data}}}"
    );
    let mut fields = vec![
        ("event_id".to_string(), id.to_string()),
        ("event_type".to_string(), "order.placed".to_string()),
        ("source".to_string(), "shop \"é\"".to_string()),
        ("timestamp".to_string(), time),
        ("cloud_event".to_string(), cloud_event),
    ];
    fields.extend(config.iter().map(|(key, value)| (key.to_string(), value.to_string())));
    fields
}

/// publish_event, publish_events, INSERT with RETURNING, INSERT .. SELECT and COPY. The functions take jsonb, which
/// sorts its keys; the table's json columns keep the publisher's order.
#[test]
fn every_way_delivers_what_was_published() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    client
        .batch_execute("insert into outbox.backends (name, host, port, stream_name) select 'other', host, port, 'others' from outbox.backends")
        .unwrap();
    let (data, config) = (
        "{\"z\": [1, 2.50], \"a\": {\"é\": null}}",
        "{\"prio\": 7, \"a\": \"x y\", \"big\": 1.10, \"on\": true}",
    );
    let sorted = "{\"a\": {\"é\": null}, \"z\": [1, 2.50]}";
    let as_given = [("prio", "7"), ("a", "x y"), ("big", "1.10"), ("on", "true")];
    let by_length = [("a", "x y"), ("on", "true"), ("big", "1.10"), ("prio", "7")];

    let named = "select outbox.publish_event(data_schema => 'https://example.org/s', backend => 'other', \
                 data => $1::text::jsonb, subject => 'order/1', publisher_config => $2::text::jsonb, \
                 source => 'shop \"é\"', event_type => 'order.placed', stream => 'orders', max_retries => 5)";
    let by_event: Uuid = client.query_one(named, &[&data, &config]).unwrap().get(0);
    let list = "select outbox.publish_events(jsonb_build_array(jsonb_build_object('event_type', 'order.placed', \
                'source', 'shop \"é\"', 'data', $1::text::jsonb, 'subject', 'order/1', 'backend', 'other', 'stream', 'orders', \
                'publisher_config', $2::text::jsonb, 'data_schema', 'https://example.org/s', 'max_retries', 5)))";
    let by_list: Uuid = client.query_one(list, &[&data, &config]).unwrap().get(0);
    let columns = "(event_type, source, data, subject, backend, stream, publisher_config, data_schema, max_retries)";
    let insert = format!(
        "insert into outbox.events {columns} values ('order.placed', 'shop \"é\"', $1::text::json, 'order/1', 'other', \
         'orders', $2::text::json, 'https://example.org/s', 5) returning event_id"
    );
    let by_insert: Uuid = client.query_one(&insert, &[&data, &config]).unwrap().get(0);
    let chosen = Uuid::new_v4();
    let select = "insert into outbox.events (event_id, event_type, source, data, subject, backend, stream, publisher_config, \
                  data_schema, max_retries) select $1, event_type, source, data, subject, backend, stream, publisher_config, \
                  data_schema, max_retries from outbox.events where event_id = $2";
    client.execute(select, &[&chosen, &by_insert]).unwrap();
    let mut copy = client
        .copy_in(&format!("copy outbox.events {columns} from stdin"))
        .unwrap();
    writeln!(
        copy,
        "order.placed\tshop \"é\"\t{data}\torder/1\tother\torders\t{config}\thttps://example.org/s\t5"
    )
    .unwrap();
    assert_eq!(copy.finish().unwrap(), 1);
    let by_copy: Uuid = client
        .query_one("select event_id from outbox.events order by seq desc limit 1", &[])
        .unwrap()
        .get(0);

    let entries = stack.redis.wait_entries("orders", 5);
    let got: Vec<_> = entries.iter().map(|entry| entry.fields.clone()).collect();
    let expected: Vec<_> = [
        (by_event, sorted, by_length),
        (by_list, sorted, by_length),
        (by_insert, data, as_given),
        (chosen, data, as_given),
        (by_copy, data, as_given),
    ]
    .map(|(id, data, config)| expected_fields(&mut client, id, data, &config))
    .into();
    assert_eq!(got, expected);
    let kept: i64 = stack
        .pg
        .one("select count(*) from outbox.events where backend = 'other' and max_retries = 5");
    assert_eq!(kept, 5);
}

/// With every optional argument omitted: no subject, no schema, no data, the backend's own stream.
#[test]
fn the_least_event_has_five_fields() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    let least: Uuid = client
        .query_one("select outbox.publish_event('t', 's')", &[])
        .unwrap()
        .get(0);
    let sql = "insert into outbox.events (event_type, source, subject, data_schema, publisher_config) \
               values ('t', 's', '', '', '{}') returning event_id";
    let empty: Uuid = client.query_one(sql, &[]).unwrap().get(0);
    for (entry, id) in stack.wait_events(2).iter().zip([least, empty]) {
        let names: Vec<&str> = entry.fields.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["event_id", "event_type", "source", "timestamp", "cloud_event"]);
        assert_eq!(entry.field("event_id"), id.to_string());
        let cloud_event: Value = serde_json::from_str(entry.field("cloud_event")).unwrap();
        let keys: Vec<&String> = cloud_event.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["specversion", "type", "source", "id", "time", "datacontenttype"]);
        assert_eq!(cloud_event["time"], *entry.field("timestamp"));
    }
    // Ids are of version 7 and ascend, so that their index grows at one end.
    assert_eq!((least.get_version_num(), least < empty), (7, true));
}

#[test]
fn publish_events_takes_a_list_in_its_order() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    let given = Uuid::new_v4();
    let list = format!(
        "[{{\"event_type\": \"first\", \"source\": \"s\"}}, \
          {{\"event_type\": \"second\", \"source\": \"s\", \"event_id\": \"{given}\", \"data\": null}}, \
          {{\"event_type\": \"later\", \"source\": \"s\", \"scheduled_at\": \"2100-01-01 00:00:00+00\"}}, \
          {{\"event_type\": \"past\", \"source\": \"s\", \"scheduled_at\": \"2000-01-01T00:00:00Z\"}}, \
          {{\"event_type\": \"nulls\", \"source\": \"s\", \"subject\": null, \"backend\": null, \"stream\": null, \
            \"scheduled_at\": null, \"max_retries\": null, \"publisher_config\": null, \"data_schema\": null, \
            \"event_id\": null}}]"
    );
    let ids: Vec<Uuid> = client
        .query("select outbox.publish_events($1::text::jsonb)", &[&list])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!((ids.len(), ids[1]), (5, given));
    let entries = stack.wait_events(4);
    assert_eq!(types(&entries), ["first", "second", "past", "nulls"]);
    let delivered: Vec<&str> = entries.iter().map(|entry| entry.field("event_id")).collect();
    let published = [ids[0], ids[1], ids[3], ids[4]].map(|id| id.to_string());
    assert_eq!(delivered, published);
    let waiting = client
        .query_one(
            "select event_id, scheduled_at = '2100-01-01 00:00:00+00' from outbox.scheduled_events",
            &[],
        )
        .unwrap();
    assert_eq!((waiting.get::<_, Uuid>(0), waiting.get::<_, bool>(1)), (ids[2], true));
    assert_eq!(
        client.query("select outbox.publish_events('[]')", &[]).unwrap().len(),
        0
    );
    assert_eq!(
        client.query("select outbox.publish_events(null)", &[]).unwrap().len(),
        0
    );
}

#[test]
fn publish_events_names_the_wrong_element_and_publishes_none() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    let hint = "The keys are event_type, source, data, subject, backend, scheduled_at, max_retries, publisher_config, stream, \
                data_schema, event_id and data_base64, with values as outbox.publish_event takes them.";
    let at = |index: usize, message: &str| {
        Refused::new(
            "22023",
            &format!("invalid event in publish_events: {message}"),
            &format!("It is element {index} of the array, counted from 0."),
            hint,
        )
    };
    let good = "{\"event_type\": \"t\", \"source\": \"s\"}";
    let mut refuse = |list: &str| Refused::of(client.query("select outbox.publish_events($1::text::jsonb)", &[&list]));
    let with = |more: &str| format!("[{good}, {good}, {{\"event_type\": \"t\", \"source\": \"s\", {more}}}]");
    for (more, message) in [
        ("\"priority\": 1", "key \"priority\" is unknown"),
        ("\"subject\": 1", "subject must be a string"),
        ("\"backend\": {\"a\": 1}", "backend must be a string"),
        ("\"scheduled_at\": 5", "scheduled_at must be a string"),
        ("\"event_id\": true", "event_id must be a string"),
        ("\"max_retries\": true", "max_retries must be a number"),
        ("\"max_retries\": [1]", "max_retries must be a number"),
    ] {
        assert_eq!(refuse(&with(more)), at(2, message));
    }
    for element in ["3", "[]", "\"text\"", "null", "true"] {
        assert_eq!(
            refuse(&format!("[{good}, {element}]")),
            at(1, "it is not a JSON object")
        );
    }
    assert_eq!(
        refuse(&with("\"event_id\": \"12\"")).message,
        "invalid input syntax for type uuid: \"12\""
    );
    assert_eq!(refuse(&with("\"scheduled_at\": \"soon\"")).code, "22007");
    assert_eq!(refuse(&with("\"backend\": \"nowhere\"")).code, "42704");
    assert_eq!(
        refuse("[{\"event_type\": \"t\"}]").message,
        "source must not be null or empty"
    );
    let no_array = Refused::new(
        "22023",
        "publish_events expects a JSON array of objects",
        "Each object has the keys of outbox.publish_event.",
        "Pass for example [{\"event_type\": \"user.created\", \"source\": \"user-service\"}].",
    );
    for list in [good, "1", "\"list\"", "null"] {
        assert_eq!(refuse(list), no_array);
    }
    // As postgres.js sends JSON.stringify(...).
    for list in ["\"[]\"", "\"[{\\\"event_type\\\": \\\"t\\\"}]\""] {
        let encoded_twice = Refused::new(
            "22023",
            "publish_events expects a JSON array of objects",
            "It is a JSON string that holds JSON: it was encoded twice, by the application and by its driver.",
            "Pass the list itself, or its text as text.",
        );
        assert_eq!(refuse(list), encoded_twice);
    }
    stack.publish("marker");
    assert_eq!(types(&stack.wait_events(1)), ["marker"]);
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.events"), 1);
}

/// Of every error, whoever raises it: as COPY names its line.
#[test]
fn the_context_of_an_error_says_which_element_it_is_about() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    client
        .batch_execute(
            "create function public.refuse() returns trigger language plpgsql as $$
            begin
                if new.event_type = 'trigger' then raise exception 'not this'; end if;
                return new;
            end $$",
        )
        .unwrap();
    let id = Uuid::new_v4();
    let good = format!("{{\"event_type\": \"t\", \"source\": \"s\", \"event_id\": \"{id}\"}}");
    let mut cases = vec![
        "\"source\": \"\"".to_owned(),
        "\"source\": \"s\", \"priority\": 1".to_owned(),
        "\"source\": \"s\", \"backend\": \"nowhere\"".to_owned(),
        "\"source\": \"s\", \"scheduled_at\": \"soon\"".to_owned(),
        "\"source\": \"s\", \"scheduled_at\": \"infinity\"".to_owned(),
        "\"source\": \"s\", \"event_id\": \"12\"".to_owned(),
        "\"source\": \"s\", \"max_retries\": 2.5".to_owned(),
        "\"source\": \"s\", \"stream\": \"outbox_relay:guard\"".to_owned(),
        "\"source\": \"s\", \"publisher_config\": [1]".to_owned(),
        format!("\"source\": \"s\", \"event_id\": \"{id}\""),
    ];
    let context = "publish_events, element 1 of the array, counted from 0";
    for step in ["alone", "with a trigger of somebody"] {
        for case in &cases {
            let list = format!("[{good}, {{\"event_type\": \"t\", {case}}}]");
            let error = client
                .query("select outbox.publish_events($1::text::jsonb)", &[&list])
                .unwrap_err();
            let error = error.as_db_error().unwrap();
            let shown = error.where_().unwrap_or_default();
            assert!(shown.lines().any(|line| line == context), "{step}, {case}: {error:?}");
            assert!(
                !error.message().contains('`') && !error.message().contains("expected"),
                "{error:?}"
            );
        }
        cases.push("\"source\": \"s\", \"event_type\": \"trigger\"".to_owned());
        let create =
            "create trigger refuse after insert on outbox.events for each row execute function public.refuse()";
        client.batch_execute(create).ok();
    }
    // Errors of other statements do not have it.
    let error = client.simple_query("select outbox.publish_event('t', '')").unwrap_err();
    assert_eq!(error.as_db_error().unwrap().where_(), None);
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.events"), 0);
}

/// The commit wakes the worker: it need not wait for `poll_interval`.
#[test]
fn a_commit_by_any_way_to_publish_wakes_the_worker() {
    let stack = Stack::with(&[("outbox_relay.poll_interval", "1h")]);
    stack.publish("connects");
    stack.wait_events(1);
    let mut client = stack.pg.client();
    client.batch_execute("create table orders (id integer)").unwrap();
    let ways = [
        "select outbox.publish_event('t', 's')",
        "insert into outbox.events (event_type, source) values ('t', 's')",
        "select outbox.publish_events('[{\"event_type\": \"t\", \"source\": \"s\"}]')",
        "begin; insert into orders values (1); select outbox.publish_event('t', 's'); commit",
        "do $$ begin perform outbox.publish_event('t', 's'); commit; end $$",
    ];
    for (number, sql) in ways.iter().enumerate() {
        let begin = Instant::now();
        client.batch_execute(sql).unwrap();
        stack.wait_events(number + 2);
        let took = begin.elapsed();
        assert!(took < Duration::from_secs(1), "{sql}: {took:?}");
    }
    assert_eq!(stack.events().len(), ways.len() + 1);
}

/// Also when the worker learns of both at once. (An event that is still pending at the time of the change may go either
/// way.)
#[test]
fn a_change_of_a_backend_counts_for_the_next_event() {
    let stack = Stack::with(&[("outbox_relay.poll_interval", "1h")]);
    let mut client = stack.pg.client();
    for i in 1..=200 {
        let change = format!("update outbox.backends set stream_name = 's{i}'");
        client.batch_execute(&change).unwrap();
        client
            .batch_execute(&format!("select outbox.publish_event('{i}', 's')"))
            .unwrap();
        if i % 3 == 0 {
            wait_until(&format!("event {i} in stream s{i}"), || {
                types(&stack.redis.entries(&format!("s{i}"))).contains(&i.to_string().as_str())
            });
        }
    }
}

/// With transaction ids and numbers from the publisher, a row would be read again for ever, or never.
#[test]
fn forged_numbers_do_not_count() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    stack.publish("before");
    for (xid, seq, event_type) in [
        ("3", "1", "low"),
        ("9000000000000000000", "9000000000000000000", "high"),
    ] {
        let sql = format!(
            "insert into outbox.events (xid, seq, backend_number, event_type, source) \
             values ('{xid}', {seq}, 77, '{event_type}', 'insert')"
        );
        client.batch_execute(&sql).unwrap();
        let sql = "copy outbox.events (xid, seq, backend_number, backend, event_type, source) from stdin";
        let mut copy = client.copy_in(sql).unwrap();
        writeln!(copy, "{xid}\t{seq}\t1\tdefault\t{event_type}\tcopy").unwrap();
        copy.finish().unwrap();
    }
    stack.publish("after");
    let entries = stack.wait_events(6);
    assert_eq!(types(&entries), ["before", "low", "low", "high", "high", "after"]);
    let real: bool = stack.pg.one(
        "select bool_and(seq between 1 and 100 and xid < pg_current_xact_id() and backend_number = 1) from outbox.events",
    );
    assert!(real);
    // Nothing is sent again when the worker reads from its saved cursor.
    let Stack { mut pg, redis } = stack;
    pg.restart();
    pg.exec("select outbox.publish_event('restarted', 's')");
    let entries = redis.wait_entries("events", 7);
    assert_eq!(types(&entries)[6..], ["restarted"]);
}

#[test]
fn text_of_another_encoding_arrives_as_utf8() {
    let stack = Stack::start();
    stack
        .pg
        .exec("create database latin encoding 'LATIN1' locale 'C' template template0");
    stack.pg.exec_db("latin", "create extension outbox_relay");
    let mut client = stack.pg.client_db("latin");
    let port = stack.redis.port();
    let sql = format!(
        "update outbox.backends set name = 'défaut', host = '127.0.0.1', port = {port}, allowed_streams = '{{é*}}'"
    );
    client.batch_execute(&sql).unwrap();
    let texts = "'é.type', 'sôurce', '{\"clé\": \"ü\"}', 'sübject', 'défaut', stream => 'études', publisher_config => '{\"ñ\": \"ß\"}'";
    client
        .batch_execute(&format!("select outbox.publish_event({texts})"))
        .unwrap();
    let insert = "insert into outbox.events (event_type, source, data, subject, backend, stream, publisher_config) \
                  values ('é.type', 'sôurce', '{\"clé\": \"ü\"}', 'sübject', 'défaut', 'études', '{\"ñ\": \"ß\"}')";
    client.batch_execute(insert).unwrap();
    let list = "select outbox.publish_events('[{\"event_type\": \"é.type\", \"source\": \"sôurce\", \"data\": {\"clé\": \"ü\"}, \
                \"subject\": \"sübject\", \"backend\": \"défaut\", \"stream\": \"études\", \"publisher_config\": {\"ñ\": \"ß\"}}]')";
    client.batch_execute(list).unwrap();
    let entries = stack.redis.wait_entries("études", 3);
    assert_eq!(entries.len(), 3);
    for entry in entries {
        assert_eq!(
            (entry.field("event_type"), entry.field("source"), entry.field("ñ")),
            ("é.type", "sôurce", "ß")
        );
        let cloud_event: Value = serde_json::from_str(entry.field("cloud_event")).unwrap();
        assert_eq!(cloud_event["subject"], "sübject");
        assert_eq!(cloud_event["data"].to_string(), "{\"clé\":\"ü\"}");
    }
    let refused = Refused::of(
        client.simple_query("select outbox.publish_event('t', 's', stream => 'ètudes', backend => 'défaut')"),
    );
    assert_eq!(refused.code, "42501");
    // A character that the database's encoding does not have is refused by Postgres.
    let refused = Refused::of(client.simple_query("select outbox.publish_event('€', 's', backend => 'défaut')"));
    assert_eq!(refused.code, "22P05");
    assert_eq!(
        client
            .query_one("select backend from outbox.events limit 1", &[])
            .unwrap()
            .get::<_, &str>(0),
        "défaut"
    );
}

#[test]
fn without_the_library_preloaded_events_queue() {
    let redis = Redis::start();
    let mut pg = Postgres::with(&[("shared_preload_libraries", "")]).start();
    pg.extension();
    let port = redis.port();
    pg.exec(&format!("update outbox.backends set host = '127.0.0.1', port = {port}"));
    pg.exec("select outbox.publish_event('first', 's')");
    pg.exec("insert into outbox.events (event_type, source) values ('second', 's')");
    pg.exec("select outbox.publish_event('due', 's', scheduled_at => now() + interval '0.2 s')");
    let status: String = pg.one("select state from outbox.status");
    assert_eq!(status, "library not in shared_preload_libraries");
    assert_eq!(pg.one::<i64>("select pending from outbox.status"), 2);
    assert_eq!(
        Refused::of(pg.client().simple_query("select outbox.publish_event('t', '')")).code,
        "22023"
    );
    wait_eq("the time of the scheduled event", true, || {
        pg.one("select scheduled_at < now() from outbox.scheduled_events")
    });
    assert_eq!(redis.xlen("events"), 0);
    pg.configure(&[("shared_preload_libraries", "outbox_relay")]);
    pg.restart();
    assert_eq!(types(&redis.wait_entries("events", 3)), ["first", "second", "due"]);
}

/// For tests of applications, which roll back.
#[test]
fn a_transaction_sees_what_it_has_published_and_nothing_of_others() {
    let stack = Stack::start();
    stack
        .pg
        .exec("create role publisher login; select outbox.grant_publisher('publisher')");
    stack.publish("before");
    let mut other = stack.pg.client();
    other
        .batch_execute("begin; select outbox.publish_event('other', 's')")
        .unwrap();
    let mut client = stack.pg.client_as("publisher", "postgres");
    type Published = (String, String, Option<String>, String, String, Option<Value>);
    let here = |client: &mut Client| -> Vec<Published> {
        let rows = client.query("select * from outbox.published_here()", &[]).unwrap();
        let row = |row: &postgres::Row| (row.get(1), row.get(2), row.get(3), row.get(4), row.get(5), row.get(6));
        rows.iter().map(row).collect()
    };
    assert_eq!(here(&mut client), []);
    client
        .batch_execute(
            "begin;
            select outbox.publish_event('one', 's', '{\"a\": 1}', subject => 'x');
            select outbox.publish_event('later', 's', scheduled_at => now() + interval '1 hour');
            savepoint gone; select outbox.publish_event('gone', 's'); rollback to savepoint gone;
            savepoint kept; insert into outbox.events (event_type, source, stream) values ('two', 's', 'orders'); release savepoint kept",
        )
        .unwrap();
    let event = |event_type: &str, subject: Option<&str>, stream: &str, data: Option<Value>| {
        let [event_type, source, backend, stream] = [event_type, "s", "default", stream].map(str::to_owned);
        (event_type, source, subject.map(str::to_owned), backend, stream, data)
    };
    let expected = [
        event("one", Some("x"), "events", Some(serde_json::json!({"a": 1}))),
        event("later", None, "events", None),
        event("two", None, "orders", None),
    ];
    assert_eq!(here(&mut client), expected);
    client.batch_execute("rollback").unwrap();
    assert_eq!(here(&mut client), []);
    client
        .batch_execute("select outbox.publish_event('committed', 's')")
        .unwrap();
    assert_eq!(here(&mut client), []);
}
