//! Databases in other encodings than UTF-8: text that cannot be sent is refused when it is published; older or damaged
//! rows fail alone; and messages are in the database's encoding.

use std::fs;

use kit::{Refused, Stack, env, ids, types, wait_drained, wait_eq, wait_until};
use postgres::Client;
use uuid::Uuid;

/// Encodings, each with bytes of a text that has no UTF-8 form, and the error.
const FOREIGN: [(&str, &str, &str); 3] = [
    ("WIN1252", "\\x81", "22P05"),
    ("EUC_JP", "\\xa9a1", "22P05"),
    ("SQL_ASCII", "\\xe9", "22021"),
];

/// A database in this encoding with the extension, whose events go to the stack's Redis.
fn database(stack: &Stack, encoding: &str) -> (String, Client) {
    let name = encoding.to_lowercase();
    stack.pg.exec(&format!(
        "create database {name} encoding '{encoding}' locale 'C' template template0"
    ));
    stack.pg.exec_db(&name, "create extension outbox_relay");
    let mut client = stack.pg.client_db(&name);
    client
        .batch_execute(&format!(
            "update outbox.backends set host = '127.0.0.1', port = {}, stream_name = '{name}'",
            stack.redis.port()
        ))
        .unwrap();
    (name, client)
}

#[test]
fn text_without_a_utf8_form_is_refused_by_every_way_in() {
    let stack = Stack::start();
    for (encoding, bytes, code) in FOREIGN {
        let (name, mut client) = database(&stack, encoding);
        let bad = format!("convert_from('{bytes}', '{encoding}')");
        let mut ways: Vec<(&str, String)> = Vec::new();
        for field in ["event_type", "source", "subject", "stream", "data_schema"] {
            let of = |name: &str| if field == name { bad.clone() } else { "'x'".to_owned() };
            let more = match field {
                "event_type" | "source" => String::new(),
                field => format!(", {field} => {bad}"),
            };
            ways.push((
                field,
                format!(
                    "select outbox.publish_event({}, {}{more})",
                    of("event_type"),
                    of("source")
                ),
            ));
        }
        ways.push((
            "data",
            format!("select outbox.publish_event('t', 's', jsonb_build_object('a', {bad}))"),
        ));
        ways.push((
            "publisher_config",
            format!("select outbox.publish_event('t', 's', publisher_config => jsonb_build_object('a', {bad}))"),
        ));
        ways.push((
            "source",
            format!("select outbox.publish_event('t', {bad}, scheduled_at => now() + interval '1 hour')"),
        ));
        ways.push((
            "source",
            format!("insert into outbox.events (event_type, source) values ('t', {bad})"),
        ));
        ways.push((
            "data",
            format!("insert into outbox.events (event_type, source, data) values ('t', 's', to_json({bad}))"),
        ));
        for (field, sql) in &ways {
            let refused = Refused::of(client.simple_query(sql));
            assert_eq!(
                (refused.code.as_str(), refused.message),
                (code, format!("{field} has no UTF-8 form")),
                "{encoding}: {sql}"
            );
            assert!(refused.detail.is_some() && refused.hint.is_some(), "{encoding}");
        }
        let list = format!(
            "select outbox.publish_events(jsonb_build_array(jsonb_build_object('event_type', 't', 'source', {bad})))"
        );
        let refused = Refused::of(client.simple_query(&list));
        assert_eq!(
            (refused.code.as_str(), refused.message.as_str()),
            (code, "events has no UTF-8 form"),
            "{encoding}"
        );
        assert!(refused.hint.is_some());
        let file = stack.pg.data_dir().join(format!("{name}.txt"));
        let raw: Vec<u8> = (2..bytes.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&bytes[i..i + 2], 16).unwrap())
            .collect();
        fs::write(&file, [b"t\t".as_slice(), &raw, b"\n"].concat()).unwrap();
        let copy = format!(
            "copy outbox.events (event_type, source) from '{}' encoding '{encoding}'",
            file.display()
        );
        // (The error that it cannot show that line to a client in UTF-8 has the same code.)
        assert_eq!(Refused::of(client.simple_query(&copy)).code, code, "{encoding}");

        client
            .batch_execute("select outbox.publish_event('good', 's')")
            .unwrap();
        assert_eq!(types(&stack.redis.wait_entries(&name, 1)), ["good"]);
        assert_eq!(
            client
                .query_one("select count(*) from outbox.events", &[])
                .unwrap()
                .get::<_, i64>(0),
            1
        );
    }
}

/// Inserts a row as a version without the check, or a dump, has left it: with this source, an SQL expression.
fn insert_unchecked(client: &mut Client, event_type: &str, source: &str, data: &str) -> Uuid {
    client
        .batch_execute("begin; alter table outbox.events disable trigger complete_event; alter table outbox.events disable trigger \"~confirm_event\"")
        .unwrap();
    let id = client
        .query_one(
            &format!(
                "with x as materialized (select pg_current_xact_id() as xid)
                 insert into outbox.events (seq, xid, created_at, event_id, backend_number, event_type, source, backend, data)
                 select nextval('outbox.events_seq_seq'), x.xid, now(), gen_random_uuid(), 1, '{event_type}', {source}, 'default', {data}
                 from x returning event_id"
            ),
            &[],
        )
        .unwrap()
        .get(0);
    client
        .batch_execute(
            "alter table outbox.events enable always trigger complete_event; alter table outbox.events enable always trigger \"~confirm_event\"; \
             select outbox.publish_event('after', 's'); commit",
        )
        .unwrap();
    id
}

#[test]
fn a_row_that_cannot_be_converted_fails_alone() {
    let stack = Stack::start();
    for (encoding, bytes, _) in FOREIGN {
        let (name, mut client) = database(&stack, encoding);
        let bad = format!("convert_from('{bytes}', '{encoding}')");
        client
            .batch_execute("select outbox.publish_event('before', 's')")
            .unwrap();
        let first = insert_unchecked(&mut client, "bad", &bad, "null");
        let second = insert_unchecked(&mut client, "worse", "'s'", &format!("json_build_object('a', {bad})"));
        // Also of scheduled events.
        client
            .batch_execute(&format!(
                "begin; alter table outbox.scheduled_events disable trigger user;
                 insert into outbox.scheduled_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend, scheduled_at)
                 select nextval('outbox.events_seq_seq'), '3', now(), gen_random_uuid(), 1, 'late', {bad}, 'default', now();
                 alter table outbox.scheduled_events enable trigger user;
                 do $$ declare t record; begin
                     for t in select tgname from pg_trigger where tgrelid = 'outbox.scheduled_events'::regclass and not tgisinternal loop
                         execute format('alter table outbox.scheduled_events enable always trigger %I', t.tgname);
                     end loop; end $$; commit;
                 select outbox.publish_event('due', 's', scheduled_at => now() + interval '0.2 s')"
            ))
            .unwrap();
        let entries = stack.redis.wait_entries(&name, 4);
        assert_eq!(types(&entries), ["before", "after", "after", "due"], "{encoding}");
        let failed = |client: &mut Client| -> Vec<(String, Option<String>, i32)> {
            let rows = client
                .query(
                    "select event_type, last_error, attempts from outbox.failed_events order by seq",
                    &[],
                )
                .unwrap();
            rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect()
        };
        wait_eq("failed events", 3, || failed(&mut client).len());
        for (event_type, error, attempts) in failed(&mut client) {
            assert!(["bad", "worse", "late"].contains(&event_type.as_str()));
            assert!(
                error.is_some_and(|e| e.contains("UTF")) && attempts == 0,
                "{encoding} {event_type}"
            );
        }
        // All of it is retained.
        let kept: i64 = client
            .query_one(
                "select count(*) from outbox.failed_events f join outbox.events e using (event_id, seq)
                 where f.source = e.source and coalesce(f.data::text, '') = coalesce(e.data::text, '') and event_id in ($1, $2)",
                &[&first, &second],
            )
            .unwrap()
            .get(0);
        assert_eq!(kept, 2);
        // Retried, they fail again, and others are sent.
        client
            .batch_execute(
                "insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend, attempts, last_error)
                 values (0, '3', now(), gen_random_uuid(), 1, 'again', 's', 'default', 1, 'e')",
            )
            .unwrap();
        let retried: i64 = client.query_one("select outbox.retry_failed()", &[]).unwrap().get(0);
        assert_eq!((retried, failed(&mut client).len()), (1, 3), "{encoding}");
        assert_eq!(types(&stack.redis.wait_entries(&name, 5))[4], "again");
        // After a restart nothing is repeated, and nothing fails twice.
        let pid = stack.pg.wait_worker(&name);
        client
            .batch_execute(&format!("select pg_terminate_backend({pid})"))
            .unwrap();
        client
            .batch_execute("select outbox.publish_event('restarted', 's')")
            .unwrap();
        assert_eq!(types(&stack.redis.wait_entries(&name, 6))[5], "restarted");
        assert_eq!(failed(&mut client).len(), 3);
        // Views and dumps do not fail because of it.
        client
            .batch_execute("select count(e.status), count(s.state) from outbox.event_status e, outbox.status s")
            .unwrap();
        assert!(stack.pg.run("pg_dump", &["-d", &name], "").ok);
    }
}

/// A dump that has such a row is restored completely, and only that row fails there.
#[test]
fn a_dump_with_a_row_that_cannot_be_converted_is_restored() {
    let stack = Stack::start();
    let (name, mut client) = database(&stack, "WIN1252");
    client
        .batch_execute("update outbox.backends set enabled = false")
        .unwrap();
    client
        .batch_execute("select outbox.publish_event('before', 's')")
        .unwrap();
    insert_unchecked(&mut client, "bad", "convert_from('\\x81', 'WIN1252')", "null");
    let file = stack.pg.data_dir().join("dump.sql");
    let file = file.to_str().unwrap();
    let dumped = stack.pg.run("pg_dump", &["-d", &name, "-f", file], "");
    assert!(dumped.ok, "{}", dumped.stderr);
    stack
        .pg
        .exec("create database other encoding 'WIN1252' locale 'C' template template0");
    let restored = stack
        .pg
        .run("psql", &["-q", "-v", "ON_ERROR_STOP=1", "-d", "other", "-f", file], "");
    assert!(restored.ok, "{}", restored.stderr);
    stack.pg.exec_db(
        "other",
        "update outbox.backends set enabled = true, stream_name = 'other'",
    );
    assert_eq!(types(&stack.redis.wait_entries("other", 2)), ["before", "after"]);
    wait_eq("failed events", 1i64, || {
        stack.pg.one_db(
            "other",
            "select count(*) from outbox.failed_events where event_type = 'bad'",
        )
    });
}

/// Destroys the values in the TOAST table, as a damaged disk does.
fn damage(stack: &Stack, table: &str) {
    stack.pg.exec("create extension if not exists pg_surgery");
    let toast: String = stack.pg.one(&format!(
        "select reltoastrelid::regclass::text from pg_class where oid = '{table}'::regclass"
    ));
    stack.pg.exec(&format!(
        "select heap_force_kill('{toast}'::regclass, array(select ctid from {toast}))"
    ));
}

const LARGE: &str = "(select jsonb_build_object('a', string_agg(md5(n::text || clock_timestamp()::text), '')) from generate_series(1, 500) n)";

#[test]
fn a_damaged_row_fails_alone() {
    if env::lacks(&["pg_surgery"]) {
        return;
    }
    let stack = Stack::start();
    stack.pg.exec("update outbox.backends set enabled = false");
    let large = format!("select outbox.publish_event('large', 's', {LARGE})");
    stack.publish("first");
    stack.pg.exec(&large);
    stack.pg.exec(&large);
    stack.publish("second");
    damage(&stack, "outbox.events");
    stack
        .pg
        .exec(&format!("select outbox.publish_event('whole', 's', {LARGE})"));
    stack.pg.exec("update outbox.backends set enabled = true");
    let entries = stack.wait_events(3);
    assert_eq!(types(&entries), ["first", "second", "whole"]);
    let failed: i64 = stack
        .pg
        .one("select count(*) from outbox.failed_events where event_type = 'large' and data is null and last_error like '%missing chunk%'");
    assert_eq!(failed, 2);
    stack.pg.wait_log("an event cannot be processed");

    // A scheduled event.
    stack.pg.exec(&format!(
        "select outbox.publish_event('late', 's', {LARGE}, scheduled_at => now() + interval '0.5 s')"
    ));
    damage(&stack, "outbox.scheduled_events");
    stack
        .pg
        .exec("select outbox.publish_event('due', 's', scheduled_at => now() + interval '0.6 s')");
    assert_eq!(types(&stack.wait_events(4))[3], "due");
    wait_eq("failed events", 3i64, || {
        stack.pg.one("select count(*) from outbox.failed_events")
    });
    wait_drained(&stack.pg, "default");
    // When its retention is over, it is purged with the others.
    stack.pg.set("outbox_relay.published_retention", "0");
    wait_eq("rows that are left", 0i64, || {
        stack.pg.one("select count(*) from outbox.events")
    });
}

#[test]
fn a_damaged_row_that_waits_as_refused_fails_alone() {
    if env::lacks(&["pg_surgery"]) {
        return;
    }
    let stack = Stack::with(&[
        ("outbox_relay.max_retries", "1000"),
        ("outbox_relay.retry_delay", "100ms"),
        ("outbox_relay.retry_backoff", "off"),
    ]);
    stack.redis.call(&["SET", "bad", "a string"]);
    stack.pg.exec(&format!(
        "select outbox.publish_event('large', 's', {LARGE}, stream => 'bad')"
    ));
    stack
        .pg
        .exec("select outbox.publish_event('behind', 's', stream => 'bad')");
    wait_eq("events that wait", 2i64, || {
        stack.pg.one("select count(*) from outbox.refused_events")
    });
    damage(&stack, "outbox.events");
    stack.redis.call(&["DEL", "bad"]);
    assert_eq!(types(&stack.redis.wait_entries("bad", 1)), ["behind"]);
    wait_eq("failed events", 1i64, || {
        stack
            .pg
            .one("select count(*) from outbox.failed_events where event_type = 'large' and data is null")
    });
    // After take_over(), the worker compares pending events, and a damaged one is not in the way.
    stack.publish("other");
    assert_eq!(types(&stack.wait_events(1)), ["other"]);
}

/// When a constraint of others refuses a due event, only that event fails.
#[test]
fn a_scheduled_event_that_a_constraint_refuses_fails_alone() {
    let stack = Stack::start();
    stack.pg.exec(
        "select outbox.publish_event('bad', 's', scheduled_at => now() + interval '0.4 s');
         select outbox.publish_event('good', 's', scheduled_at => now() + interval '0.5 s');
         alter table outbox.events add constraint no_bad check (event_type <> 'bad')",
    );
    assert_eq!(types(&stack.wait_events(1)), ["good"]);
    wait_eq("failed events", 1i64, || {
        stack
            .pg
            .one("select count(*) from outbox.failed_events where event_type = 'bad' and last_error like '%no_bad%'")
    });
    stack.pg.exec("alter table outbox.events drop constraint no_bad");
    assert_eq!(stack.pg.one::<i64>("select outbox.retry_failed()"), 1);
    assert_eq!(types(&stack.wait_events(2))[1], "bad");
}

#[test]
fn messages_are_in_the_encoding_of_the_database() {
    let stack = Stack::start();
    for (encoding, word) in [
        ("LATIN1", "é"),
        ("WIN1252", "é"),
        ("EUC_JP", "日本"),
        ("SQL_ASCII", "é"),
        ("LATIN9", "€"),
    ] {
        let (name, mut client) = database(&stack, encoding);
        let refused = |client: &mut Client, sql: &str| Refused::of(client.simple_query(sql));
        let sql = format!("select outbox.publish_event('t', 's', backend => '{word}')");
        let expected = (String::from("42704"), format!("backend \"{word}\" does not exist"));
        let found = refused(&mut client, &sql);
        assert_eq!((found.code, found.message), expected, "{encoding}");
        let sql = format!("insert into outbox.events (event_type, source, backend) values ('t', 's', '{word}')");
        let found = refused(&mut client, &sql);
        assert_eq!((found.code, found.message), expected, "{encoding}");
        let sql = format!(
            "select outbox.publish_events('[{{\"event_type\": \"t\", \"source\": \"s\", \"backend\": \"{word}\"}}]')"
        );
        let found = refused(&mut client, &sql);
        assert_eq!((found.code, found.message), expected, "{encoding}");
        // In the log, bytes of the database's encoding.
        client
            .batch_execute(&format!("update outbox.backends set name = '{word}', port = 1"))
            .unwrap();
        // So is a setting of the session.
        client
            .batch_execute(&format!(
                "set outbox_relay.default_backend = '{word}'; select outbox.publish_event('t', 's')"
            ))
            .unwrap();
        let bytes: Vec<u8> = client
            .query_one(
                &format!("select convert_to('backend \"{word}\" cannot be reached', '{encoding}')"),
                &[],
            )
            .unwrap()
            .get(0);
        wait_until(&format!("the log line in {encoding}"), || {
            let log = fs::read(stack.pg.log_path()).unwrap();
            log.windows(bytes.len()).any(|window| window == bytes)
        });
        stack.pg.exec(&format!("drop database {name} with (force)"));
    }
}

#[test]
fn functions_refuse_null_arguments_with_a_message_or_return_null() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    assert_eq!(
        client
            .query("select * from outbox.purge_piece(null, null, null)", &[])
            .unwrap()
            .len(),
        0
    );
    for sql in [
        "select outbox.publish_event(null, null)",
        "select outbox.publish_events(null)",
        "select outbox.has_waiting_events(null)",
        "select outbox.backlog(null)",
        "select outbox.hash_slot(null)",
        "select outbox.hash_tag(null)",
        "select outbox.is_delivered(null, null, null)",
        "select outbox.wait_published(null)",
        "select outbox.wait_published(gen_random_uuid(), null)",
        "select outbox.retry_failed(null, null, null)",
        "select outbox.publish_failed(null, null)",
        "select outbox.expect_backend(null)",
        "select outbox.guard_key(null)",
        "select outbox.guard_key(null, null)",
        "select outbox.take_over(null)",
        "select outbox.set_backend_password(null, null)",
        "select outbox.grant_publisher(null)",
    ] {
        if let Err(error) = client.simple_query(sql) {
            let error = error
                .as_db_error()
                .unwrap_or_else(|| panic!("{sql}: {error:?}"))
                .clone();
            assert!(!["XX000", "42601"].contains(&error.code().code()), "{sql}: {error:?}");
        }
    }
}

/// An id may be used again once its first event was deleted from `events`.
#[test]
fn both_events_of_an_id_that_was_used_again_are_kept() {
    let stack = Stack::with(&[("outbox_relay.max_retries", "1"), ("outbox_relay.redis_max_len", "0")]);
    stack.redis.call(&["SET", "bad", "a string"]);
    let id = Uuid::new_v4();
    let publish = |event_type: &str| {
        stack.pg.exec(&format!(
            "select outbox.publish_event('{event_type}', 's', event_id => '{id}', stream => 'bad')"
        ));
    };
    let failed = || {
        let rows = stack
            .pg
            .client()
            .query(
                "select event_type from outbox.failed_events where event_id = $1 order by seq",
                &[&id],
            )
            .unwrap();
        rows.iter().map(|row| row.get(0)).collect::<Vec<String>>()
    };
    publish("first");
    wait_eq("failed events", vec!["first".to_owned()], failed);
    stack.pg.exec("delete from outbox.events");
    publish("second");
    wait_eq("failed events", vec!["first".to_owned(), "second".to_owned()], failed);
    stack.pg.exec("delete from outbox.events");

    // A third one waits: it is not touched.
    stack.pg.exec("update outbox.backends set enabled = false");
    stack.redis.call(&["DEL", "bad"]);
    publish("third");
    let retry = || {
        stack
            .pg
            .one::<i64>(&format!("select outbox.retry_failed(event_id => '{id}')"))
    };
    assert_eq!(retry(), 0);
    assert_eq!(failed(), ["first", "second"]);
    let statuses: String = stack.pg.one(&format!(
        "select string_agg(event_type || ' ' || status, ', ' order by event_type) from outbox.event_status where event_id = '{id}'"
    ));
    assert_eq!(statuses, "first failed, second failed, third pending");
    stack.pg.exec("update outbox.backends set enabled = true");
    let entries = stack.redis.wait_entries("bad", 1);
    assert_eq!((types(&entries), ids(&entries)), (vec!["third"], vec![id]));
    // Each at its position.
    for (count, event_type) in [(2, "first"), (3, "second")] {
        wait_drained(&stack.pg, "default");
        assert_eq!(retry(), 1);
        let entries = stack.redis.wait_entries("bad", count);
        assert_eq!((types(&entries)[count - 1], ids(&entries)[count - 1]), (event_type, id));
    }
    assert_eq!(failed(), Vec::<String>::new());
}
