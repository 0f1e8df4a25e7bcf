//! `outbox.retry_failed()`: failed events are published again, by backend, type or id, with their ids and in their
//! order.

use kit::{Postgres, QUICK, Redis, Stack, ids, publish_many, standing, types, wait_drained, wait_eq};
use uuid::Uuid;

/// A stack with a second backend, `other`, in the same Redis, whose keys `bad` and `bad2` are strings. One attempt in
/// all.
fn stack() -> Stack {
    let redis = Redis::start();
    redis.call(&["MSET", "bad", "a string", "bad2", "a string"]);
    let stack = Stack::of(Postgres::with(QUICK).with(&[("outbox_relay.max_retries", "1")]), redis);
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port) values ('other', '127.0.0.1', {})",
        stack.redis.port()
    ));
    stack
}

fn failed(pg: &Postgres) -> Vec<Uuid> {
    let rows = pg
        .client()
        .query("select event_id from outbox.failed_events order by seq", &[]);
    rows.expect("readable").iter().map(|row| row.get(0)).collect()
}

fn retry(pg: &Postgres, arguments: &str) -> i64 {
    pg.one(&format!("select outbox.retry_failed({arguments})"))
}

#[test]
fn failed_events_are_published_again_by_backend_type_and_id() {
    let stack = stack();
    let mut client = stack.pg.client();
    let first = publish_many(&mut client, "default", "bad", "a", 3);
    let second = publish_many(&mut client, "default", "bad", "b", 3);
    let third = publish_many(&mut client, "other", "bad2", "a", 3);
    wait_eq("failed events", 9, || failed(&stack.pg).len());
    assert_eq!(retry(&stack.pg, "event_type => 'z'"), 0);
    stack.redis.call(&["DEL", "bad", "bad2"]);

    assert_eq!(retry(&stack.pg, &format!("event_id => '{}'", second[2])), 1);
    assert_eq!(ids(&stack.redis.wait_entries("bad", 1)), [second[2]]);
    // Type a1 is of both backends.
    assert_eq!(retry(&stack.pg, "event_type => 'a1', backend => 'default'"), 1);
    assert_eq!(ids(&stack.redis.wait_entries("bad", 2)), [second[2], first[0]]);
    assert_eq!(retry(&stack.pg, "'other'"), 3);
    assert_eq!(ids(&stack.redis.wait_entries("bad2", 3)), third);
    assert_eq!(failed(&stack.pg), [first[1], first[2], second[0], second[1]]);

    assert_eq!((retry(&stack.pg, ""), retry(&stack.pg, "")), (4, 0));
    let all = [second[2], first[0], first[1], first[2], second[0], second[1]];
    assert_eq!(ids(&stack.redis.wait_entries("bad", 6)), all);
    assert_eq!(types(&stack.redis.entries("bad")), ["b3", "a1", "a2", "a3", "b1", "b2"]);
    for backend in ["default", "other"] {
        wait_drained(&stack.pg, backend);
    }
    let published = "select count(*) from outbox.event_status where status = 'published'";
    assert_eq!((failed(&stack.pg).len(), stack.pg.one::<i64>(published)), (0, 9));
}

#[test]
fn a_retry_that_is_refused_again_can_be_retried_again() {
    let stack = stack();
    let expected = publish_many(&mut stack.pg.client(), "default", "bad", "t", 2);
    for round in 1..=3 {
        wait_eq("failed events", expected.clone(), || failed(&stack.pg));
        wait_eq("failures in all", 2 * round, || standing(&stack.pg, "default").failed);
        assert_eq!(retry(&stack.pg, "backend => 'default'"), 2);
    }
    wait_eq("failed events", expected.clone(), || failed(&stack.pg));
    stack.redis.call(&["DEL", "bad"]);
    assert_eq!(retry(&stack.pg, ""), 2);
    assert_eq!(ids(&stack.redis.wait_entries("bad", 2)), expected);
}

#[test]
fn a_retry_that_is_rolled_back_changes_nothing() {
    let stack = stack();
    let expected = publish_many(&mut stack.pg.client(), "default", "bad", "t", 2);
    wait_eq("failed events", expected.clone(), || failed(&stack.pg));
    stack.redis.call(&["DEL", "bad"]);
    stack.pg.exec("begin; select outbox.retry_failed(); rollback");
    let marker = publish_many(&mut stack.pg.client(), "default", "", "marker", 1);
    assert_eq!(ids(&stack.wait_events(1)), marker);
    assert_eq!((failed(&stack.pg), stack.redis.xlen("bad")), (expected, 0));
}

/// The entry is the same as it would have been, with the time of the first publishing.
#[test]
fn a_retried_event_is_unchanged() {
    let stack = stack();
    let id: Uuid = stack.pg.one(
        r#"select outbox.publish_event('t', 'kit', '{"a": [1, 2.50]}', subject => 'über', stream => 'bad', data_schema => 'http://s',
            publisher_config => '{"tenant": "x"}')"#,
    );
    let row = "to_jsonb(e) - '{seq,xid,attempts,last_error,failed_at}'::text[]";
    let before: serde_json::Value = stack.pg.one(&format!("select {row} from outbox.events e"));
    wait_eq("failed events", vec![id], || failed(&stack.pg));
    assert_eq!(
        stack
            .pg
            .one::<serde_json::Value>(&format!("select {row} from outbox.failed_events e")),
        before
    );
    stack.redis.call(&["DEL", "bad"]);
    assert_eq!(retry(&stack.pg, ""), 1);
    let entry = stack.redis.wait_entries("bad", 1).remove(0);
    assert_eq!(
        stack
            .pg
            .one::<serde_json::Value>(&format!("select {row} from outbox.events e")),
        before
    );
    let cloud: serde_json::Value = serde_json::from_str(entry.field("cloud_event")).expect("JSON");
    assert_eq!(
        (
            entry.get("tenant"),
            cloud["subject"].as_str(),
            cloud["dataschema"].as_str()
        ),
        (Some("x"), Some("über"), Some("http://s"))
    );
    let time: String = stack.pg.one(
        r#"select to_char(created_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"') from outbox.events"#,
    );
    assert_eq!(entry.field("timestamp"), time);
}

/// Retrying a large number is not one long transaction: each 1,000 are committed, and on their way before the last is
/// done.
#[test]
fn a_large_retry_commits_in_pieces() {
    let stack = stack();
    let published = publish_many(&mut stack.pg.client(), "default", "bad", "t", 2_500);
    wait_eq("failed events", published.len(), || failed(&stack.pg).len());
    let mut admin = stack.pg.client();
    // Within a transaction it cannot commit.
    let refused = admin.batch_execute("begin; call outbox.retry_all_failed()");
    assert_eq!(
        refused.expect_err("it commits").code().map(|code| code.code()),
        Some("2D000")
    );
    admin.batch_execute("rollback").expect("rolled back");
    assert_eq!(failed(&stack.pg).len(), published.len());
    // Events that fail again meanwhile are left.
    admin.batch_execute("call outbox.retry_all_failed()").expect("it ends");
    wait_eq("failed again", 2 * published.len() as i64, || {
        standing(&stack.pg, "default").failed
    });
    wait_eq("failed events", published.clone(), || failed(&stack.pg));
    stack.redis.call(&["DEL", "bad"]);
    // The second piece waits for a lock, and the first is sent.
    let mut holder = stack.pg.client();
    holder
        .batch_execute(&format!(
            "begin; select from outbox.failed_events where event_id = '{}' for update",
            published[1_500]
        ))
        .expect("a lock");
    let caller = std::thread::spawn(move || admin.batch_execute("call outbox.retry_all_failed(backend => 'default')"));
    assert_eq!(ids(&stack.redis.wait_entries("bad", 1_000)), published[..1_000]);
    holder.batch_execute("rollback").expect("rolled back");
    caller.join().expect("no panic").expect("it ends");
    assert_eq!(ids(&stack.redis.wait_entries("bad", 2_500)), published);
    stack.pg.wait_log("2500 failed events are published again");
    assert_eq!(failed(&stack.pg).len(), 0);
}
