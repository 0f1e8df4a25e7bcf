//! `outbox.preview()`: exactly the entry that is sent.

use kit::{Postgres, QUICK, Redis, Refused, Stack, wait_eq};
use uuid::Uuid;

fn preview(stack: &Stack, id: Uuid) -> Option<Vec<String>> {
    stack.pg.one(&format!("select outbox.preview('{id}')"))
}

#[test]
fn the_preview_is_what_is_sent() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[("outbox_relay.max_retries", "1")]),
        Redis::start(),
    );
    stack.pg.exec("update outbox.backends set enabled = false");
    let published: [(Uuid, &str); 3] = [
        (stack.pg.one("select outbox.publish_event('t', 'kit')"), "events"),
        (
            stack.pg.one(
                r#"select outbox.publish_event('ü "t"', 'kit', '{"a": [1, 2.50, "ß\n"]}', subject => 'über', stream => 'named',
                    data_schema => 'http://s', publisher_config => '{"tenant": "x y", "n": 3}')"#,
            ),
            "named",
        ),
        (
            stack.pg.one("select outbox.publish_event('later', 'kit', stream => 'later', scheduled_at => now() + interval '2 s')"),
            "later",
        ),
    ];
    let previews = published.map(|(id, _)| preview(&stack, id).expect("it is there"));
    stack.pg.exec("update outbox.backends set enabled = true");
    for ((id, stream), preview) in published.iter().zip(&previews) {
        let entry = stack.redis.wait_entries(stream, 1).remove(0);
        assert_eq!(preview[..6], ["XADD", stream, "MAXLEN", "~", "10000", "*"]);
        let fields: Vec<String> = entry.fields.into_iter().flat_map(|(key, value)| [key, value]).collect();
        assert_eq!(preview[6..], fields);
        assert_eq!(self::preview(&stack, *id).as_ref(), Some(preview), "sent events, too");
    }
    stack
        .pg
        .exec("update outbox.backends set max_len = 0, stream_name = 'other'");
    assert_eq!(
        preview(&stack, published[0].0).expect("kept")[..3],
        ["XADD", "other", "*"]
    );
    assert_eq!(preview(&stack, Uuid::nil()), None);

    stack.redis.call(&["SET", "bad", "a string"]);
    let failed: Uuid = stack
        .pg
        .one("select outbox.publish_event('failed', 'kit', stream => 'bad')");
    wait_eq("failed events", 1, || {
        stack.pg.one::<i64>("select count(*) from outbox.failed_events")
    });
    stack
        .pg
        .exec(&format!("delete from outbox.events where event_id = '{failed}'"));
    assert_eq!(preview(&stack, failed).expect("kept")[..3], ["XADD", "bad", "*"]);
    stack
        .pg
        .exec("insert into outbox.backends (name) values ('new'); delete from outbox.backends where name = 'default'");
    let refused = Refused::of(
        stack
            .pg
            .client()
            .batch_execute(&format!("select outbox.preview('{failed}')")),
    );
    assert_eq!(
        (refused.code.as_str(), refused.message.as_str()),
        ("42704", "backend \"default\" does not exist")
    );
}

#[test]
fn the_rows_of_an_event_are_shown_by_backend_and_stream() {
    let pg = Postgres::with(&[("outbox_relay.enabled", "off")]).start();
    pg.extension();
    pg.exec(
        "insert into outbox.backends (name, stream_name, format) values ('a', 'sa', 'structured'), ('b', 'sb', 'broadcaster'), ('c', 'sc', 'broadcaster');
        insert into outbox.routes (backend, stream) values ('default', null), ('a', null), ('b', 'x'), ('b', null)",
    );
    let id: Uuid = pg.one("select outbox.publish_event('t', 'kit', '{}')");
    let shown =
        |arguments: &str| -> Option<Vec<String>> { pg.one(&format!("select outbox.preview('{id}'{arguments})")) };
    let stream = |arguments: &str| shown(arguments).map(|words| words[1].clone());
    for (arguments, expected) in [
        ("", Some("events")),
        (", null", Some("events")),
        (", 'default'", Some("events")),
        (", 'a'", Some("sa")),
        (", 'a', 'sa'", Some("sa")),
        (", 'b'", Some("x")),
        (", 'b', 'sb'", Some("sb")),
        (", backend => 'b', stream => 'x'", Some("x")),
        (", null, 'sb'", Some("sb")),
        (", 'a', 'x'", None),
        (", 'c'", None),
    ] {
        assert_eq!(stream(arguments).as_deref(), expected, "{arguments}");
    }
    // Each in its backend's format.
    assert_eq!(shown(", 'a'").map(|words| words[5..].len()), Some(3));
    assert_eq!(shown(", 'b'"), shown(", 'b', 'x'"));
    pg.exec("update outbox.backends set name = 'renamed' where name = 'a'");
    assert_eq!(stream(", 'renamed'").as_deref(), Some("sa"));
    let refused = |arguments: &str| {
        let sql = format!("select outbox.preview('{id}'{arguments})");
        Refused::of(pg.client().batch_execute(&sql))
    };
    let unknown = Refused::new(
        "42704",
        "backend \"a\" does not exist",
        "Backends are the rows of outbox.backends.",
        "Check the name, or create the backend first.",
    );
    assert_eq!(refused(", 'a'"), unknown);
    // Of a backend that is gone: by the name that it had.
    pg.exec("delete from outbox.routes where backend = 'renamed'; alter table outbox.backends disable trigger check_backend_deletion; delete from outbox.backends where name = 'renamed'");
    let gone = refused(", 'a'");
    assert_eq!(
        gone.detail.as_deref(),
        Some("It was deleted, so the event will not be sent.")
    );
    assert_eq!(
        pg.one::<Option<Vec<String>>>("select outbox.preview(null, 'b', 'x')"),
        None
    );
}

/// It shows the payload.
#[test]
fn only_who_is_granted_it_may_look() {
    let stack = Stack::with(QUICK);
    let id: Uuid = stack
        .pg
        .one("select outbox.publish_event('t', 'kit', '{\"secret\": 1}')");
    let sql = format!("select outbox.preview('{id}')");
    stack.pg.exec(
        "create role app login; create role watcher login in role pg_monitor, pg_read_all_data; select outbox.grant_publisher('app')",
    );
    for role in ["app", "watcher"] {
        let refused = Refused::of(stack.pg.client_as(role, "postgres").batch_execute(&sql));
        assert_eq!(refused.message, "permission denied for function preview");
        let refused = Refused::of(
            stack
                .pg
                .client_as(role, "postgres")
                .batch_execute(&format!("select outbox.preview('{id}', 'default')")),
        );
        assert_eq!(refused.message, "permission denied for function preview");
    }
    stack.pg.exec("grant execute on function outbox.preview(uuid) to app");
    let words: Vec<String> = stack
        .pg
        .client_as("app", "postgres")
        .query_one(&sql, &[])
        .expect("granted")
        .get(0);
    assert!(words.iter().any(|word| word.contains("secret")));
}
