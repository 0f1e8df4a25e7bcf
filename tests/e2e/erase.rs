//! `outbox.erase()`: the payload of a sent or failed event is deleted, and where the event is appended again there is a
//! tombstone.

use kit::{Entry, Mode, Postgres, QUICK, Redis, Refused, Stack, UNTRIMMED, ids, publish_many, wait_drained, wait_eq};
use uuid::Uuid;

fn stack() -> Stack {
    let settings = [UNTRIMMED, ("outbox_relay.max_retries", "1")];
    Stack::of(Postgres::with(QUICK).with(&settings), Redis::start())
}

const PUBLISH: &str =
    r#"select outbox.publish_event('signed.up', 'shop', '{"name": "Lovelace"}', subject => 'user/lovelace', "#;

fn published(stack: &Stack) -> Uuid {
    let id = stack.pg.one(&format!(
        r#"{PUBLISH} publisher_config => '{{"email": "lovelace@example.org"}}', data_schema => 'http://s')"#
    ));
    let sent: bool = stack.pg.one(&format!("select outbox.wait_published('{id}')"));
    assert!(sent);
    id
}

fn erase(stack: &Stack, id: Uuid) -> Result<bool, Refused> {
    match stack.pg.client().query_one("select outbox.erase($1)", &[&id]) {
        Ok(row) => Ok(row.get(0)),
        Err(error) => Err(Refused::of::<()>(Err(error))),
    }
}

#[track_caller]
fn assert_tombstone(entry: &Entry, id: Uuid) {
    assert_eq!(entry.field("event_id"), id.to_string());
    assert_eq!(entry.field("erased"), "true");
    let cloud: serde_json::Value = serde_json::from_str(entry.field("cloud_event")).expect("JSON");
    for gone in ["data", "subject"] {
        assert!(cloud.get(gone).is_none(), "{cloud}");
    }
    let text = format!("{:?}", entry.fields);
    assert!(!text.to_lowercase().contains("lovelace"), "{text}");
}

#[test]
fn an_erased_event_is_replayed_and_healed_as_a_tombstone() {
    let mut stack = stack();
    let (first, second) = (published(&stack), published(&stack));
    wait_drained(&stack.pg, "default");
    stack
        .pg
        .exec(&format!("begin; select outbox.erase('{first}'); rollback"));
    assert_eq!(stack.events().len(), 2);
    assert_eq!(erase(&stack, first), Ok(true));
    assert_eq!(erase(&stack, first), Ok(false), "nothing is left of it");
    assert_eq!(erase(&stack, Uuid::nil()), Ok(false), "there is none");
    stack.pg.wait_log(&format!("the payload of event {first} was erased"));
    let left: i64 = stack
        .pg
        .one("select count(*) from outbox.events e where e::text ~* 'lovelace'");
    assert_eq!(left, 1, "the other one");
    assert_eq!(stack.pg.one::<i64>("select outbox.replay('default', '-infinity')"), 2);
    let entries = stack.wait_events(4);
    assert_eq!(ids(&entries), [first, second, first, second]);
    assert_tombstone(&entries[2], first);
    assert_eq!(entries[3].fields, entries[1].fields);
    wait_drained(&stack.pg, "default");
    // Redis is empty, and gets all retained events.
    stack.pg.exec("update outbox.backends set on_missing_guard = 'replay'");
    stack.redis.kill9();
    stack.redis.start_again();
    let entries = stack.wait_events(2);
    assert_eq!(ids(&entries), [first, second]);
    assert_tombstone(&entries[0], first);
    assert_eq!(entries[1].field("email"), "lovelace@example.org");
}

#[test]
fn a_failed_event_is_retried_as_a_tombstone() {
    let stack = stack();
    stack.redis.call(&["SET", "bad", "a string"]);
    let id: Uuid = stack.pg.one(&format!("{PUBLISH} stream => 'bad')"));
    wait_eq("failed events", 1, || {
        stack.pg.one::<i64>("select count(*) from outbox.failed_events")
    });
    assert_eq!(erase(&stack, id), Ok(true));
    let left = "select (select count(*) from outbox.events e where e::text ~* 'lovelace')
        + (select count(*) from outbox.failed_events f where f::text ~* 'lovelace')";
    assert_eq!(stack.pg.one::<i64>(left), 0);
    stack.redis.call(&["DEL", "bad"]);
    assert_eq!(stack.pg.one::<i64>("select outbox.retry_failed()"), 1);
    assert_tombstone(&stack.redis.wait_entries("bad", 1)[0], id);
}

#[test]
fn an_event_that_waits_is_refused_with_what_helps() {
    let stack = stack();
    let scheduled: Uuid = stack
        .pg
        .one(&format!("{PUBLISH} scheduled_at => now() + interval '1 day')"));
    stack.pg.exec("update outbox.backends set enabled = false");
    let pending: Uuid = stack.pg.one(&format!("{PUBLISH} stream => 'x')"));
    for id in [scheduled, pending] {
        let refused = erase(&stack, id).expect_err("it waits");
        assert_eq!(
            (refused.code.as_str(), refused.message),
            ("55000", format!("event {id} waits to be sent"))
        );
        let hint = refused.hint.expect("a hint");
        assert!(hint.contains("outbox.wait_published"), "{hint}");
        assert!(
            hint.contains(&format!("DELETE FROM outbox.events WHERE event_id = '{id}'")),
            "{hint}"
        );
    }
    stack
        .pg
        .exec(&format!("delete from outbox.events where event_id = '{pending}'"));
    assert_eq!(erase(&stack, pending), Ok(false));
    stack.pg.exec("update outbox.backends set enabled = true");
    // Nobody else may change an event.
    published(&stack);
    let update = "update outbox.events set data = null, publisher_config = '{\"erased\": true}', subject = null";
    for more in [
        ", source = 'x'",
        ", seq = seq + 1",
        ", data_schema = 'x'",
        ", published_by = 0",
    ] {
        let refused = Refused::of(stack.pg.client().batch_execute(&format!("{update}{more}")));
        assert_eq!(refused.message, "rows of outbox.events are never updated", "{more}");
    }
    stack
        .pg
        .exec("create role app login; select outbox.grant_publisher('app')");
    let refused = stack
        .pg
        .client_as("app", "postgres")
        .batch_execute(&format!("select outbox.erase('{pending}')"));
    assert_eq!(Refused::of(refused).code, "42501");
}

/// The worker looks for rows that were inserted while its triggers were off: an erased row is none of them.
#[test]
fn an_erased_event_is_not_taken_for_one_of_another_cluster() {
    let mut stack = stack();
    let all: Vec<Uuid> = (0..3).map(|_| published(&stack)).collect();
    wait_drained(&stack.pg, "default");
    stack.pg.exec(&format!(
        "begin; {}; commit",
        all[..2]
            .iter()
            .map(|id| format!("select outbox.erase('{id}')"))
            .collect::<Vec<_>>()
            .join(";")
    ));
    for act in ["disable", "enable always"] {
        stack
            .pg
            .exec(&format!("alter table outbox.events {act} trigger complete_event"));
    }
    let more = publish_many(&mut stack.pg.client(), "default", "", "more", 2);
    stack.wait_events(5);
    stack.pg.stop(Mode::Fast);
    stack.pg.start_again();
    let last = publish_many(&mut stack.pg.client(), "default", "", "last", 1);
    assert_eq!(ids(&stack.wait_events(6)), [all, more, last].concat());
    wait_drained(&stack.pg, "default");
    let known = "select count(*) from outbox.known_triggers k, outbox.trigger_state() s where k.triggers = s.triggers";
    wait_eq("that the rows were looked at", 1, || stack.pg.one::<i64>(known));
    wait_drained(&stack.pg, "default");
    assert_eq!(stack.events().len(), 6);
}

/// Whoever has locked a failed event is about to delete its row among the others.
#[test]
fn erasing_a_failed_event_waits_for_its_retry_without_a_deadlock() {
    let stack = stack();
    stack.fail("default", &["personal"]);
    let id: Uuid = stack.pg.one("select event_id from outbox.failed_events");
    stack.redis.call(&["DEL", "wrong"]);
    let mut admin = stack.pg.client();
    let mut retry = admin.transaction().expect("it begins");
    retry
        .batch_execute("select from outbox.failed_events for update")
        .expect("the lock");
    std::thread::scope(|scope| {
        let erasing = scope.spawn(|| erase(&stack, id));
        wait_eq("sessions that wait for the lock", 1, || {
            stack.pg.one::<i64>(
                "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%erase%'",
            )
        });
        let retried = retry.query_one("select outbox.retry_failed()", &[]);
        assert_eq!(retried.expect("no deadlock").get::<_, i64>(0), 1);
        retry.commit().expect("it commits");
        assert!(erasing.join().expect("it does not panic").expect("it was sent"));
    });
    assert_eq!(stack.redis.wait_entries("wrong", 1).len(), 1);
}
