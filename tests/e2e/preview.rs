//! `outbox.preview()`: what is sent, word for word.

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
