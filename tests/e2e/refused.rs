//! Events that Redis refuses because of their content: their stream waits, and then they fail; all other streams go on.

use kit::{
    Mode, Postgres, QUICK, Redis, Stack, ids, publish_many, standing, types, wait_drained, wait_eq, wait_trouble,
    wait_until,
};
use uuid::Uuid;

const WRONGTYPE: &str = "WRONGTYPE Operation against a key holding the wrong kind of value";

/// A stack whose Redis has a string at the key `bad`; the settings come last.
fn stack(settings: &[(&str, &str)]) -> Stack {
    let redis = Redis::start();
    redis.call(&["SET", "bad", "a string"]);
    Stack::of(Postgres::with(QUICK).with(settings), redis)
}

/// The failed events in their order: id, attempts, reason.
fn failed(pg: &Postgres) -> Vec<(Uuid, i32, String)> {
    let rows = pg.client().query(
        "select event_id, attempts, last_error from outbox.failed_events order by seq",
        &[],
    );
    rows.expect("readable")
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2)))
        .collect()
}

fn refused(pg: &Postgres) -> i64 {
    pg.one("select count(*) from outbox.refused_events where accepted_in is null")
}

/// The number of attempts for the event with this id.
fn attempts(pg: &Postgres, id: Uuid) -> i32 {
    pg.one(&format!(
        "select attempts from outbox.event_status where event_id = '{id}'"
    ))
}

#[test]
fn a_wrong_stream_fails_after_its_attempts_and_holds_up_no_other() {
    let stack = stack(&[
        ("outbox_relay.retry_delay", "400ms"),
        ("outbox_relay.retry_backoff", "off"),
    ]);
    let mut client = stack.pg.client();
    let mut transaction = client.transaction().expect("begin");
    for (name, stream) in [
        ("bad1", "bad"),
        ("good1", "good"),
        ("bad2", "bad"),
        ("plain", ""),
        ("good2", "good"),
    ] {
        let sql = "select outbox.publish_event($1, 'kit', stream => nullif($2, ''))";
        transaction.execute(sql, &[&name, &stream]).expect("publish");
    }
    transaction.commit().expect("commit");
    assert_eq!(types(&stack.redis.wait_entries("good", 2)), ["good1", "good2"]);
    assert_eq!(types(&stack.wait_events(1)), ["plain"]);
    wait_eq("refused events", 2, || refused(&stack.pg));
    let found = standing(&stack.pg, "default");
    assert_eq!((found.state.as_str(), found.pending), ("idle", 2), "{found:?}");
    let now = "select string_agg(event_type || ' ' || status || ' ' || attempts, ',' order by event_type) \
        from outbox.event_status where stream = 'bad'";
    assert_eq!(stack.pg.one::<String>(now), "bad1 pending 1,bad2 pending 1");
    // First behind the waiting events, and then together with them.
    stack
        .pg
        .exec("select outbox.publish_event('bad3', 'kit', stream => 'bad')");
    wait_eq("the third", 3, || refused(&stack.pg));

    wait_eq("failed events", 3, || failed(&stack.pg).len());
    let found: String = stack.pg.one(
        "select string_agg(event_type || ' ' || status || ' ' || last_error, ',' order by created_at) \
         from outbox.event_status where stream = 'bad'",
    );
    assert_eq!(
        found,
        ["bad1", "bad2", "bad3"]
            .map(|n| format!("{n} failed {WRONGTYPE}"))
            .join(",")
    );
    assert_eq!(failed(&stack.pg)[0].1, 3);
    // Two waits of 400 ms, no more and no less.
    let took: f64 = stack.pg.one("select extract(epoch from min(failed_at - created_at))::float8 from outbox.failed_events where event_type = 'bad1'");
    assert!((0.8..2.5).contains(&took), "failed after {took} s");
    wait_until("the books", || standing(&stack.pg, "default").pending == 0);
    let found = standing(&stack.pg, "default");
    assert_eq!(
        (found.state.as_str(), found.published, found.failed, refused(&stack.pg)),
        ("idle", 3, 3, 0)
    );
    assert_eq!(found.last_error.as_deref(), Some(WRONGTYPE));
}

/// Each delay is twice the last (less jitter), up to retry_max_delay.
#[test]
fn attempts_back_off() {
    let stack = stack(&[
        ("outbox_relay.retry_delay", "200ms"),
        ("outbox_relay.retry_max_delay", "400ms"),
        ("outbox_relay.max_retries", "5"),
    ]);
    stack
        .pg
        .exec("select outbox.publish_event('t', 'kit', stream => 'bad')");
    wait_eq("failed events", 1, || failed(&stack.pg).len());
    assert_eq!(failed(&stack.pg)[0].1, 5);
    // 200, 400, 400, 400 ms, each shortened by up to a half.
    let took: f64 = stack
        .pg
        .one("select extract(epoch from failed_at - created_at)::float8 from outbox.failed_events");
    assert!((0.7..3.0).contains(&took), "failed after {took} s");
}

#[test]
fn max_retries_of_an_event_are_attempts_in_all() {
    // A second attempt would come in an hour.
    let stack = stack(&[
        ("outbox_relay.retry_delay", "1h"),
        ("outbox_relay.retry_max_delay", "1h"),
    ]);
    stack.redis.call(&["SET", "bad0", "a string"]);
    let one: Uuid = stack
        .pg
        .one("select outbox.publish_event('one', 'kit', stream => 'bad', max_retries => 1)");
    let none: Uuid = stack
        .pg
        .one("select outbox.publish_event('none', 'kit', stream => 'bad0', max_retries => 0)");
    wait_eq("failed events", 2, || failed(&stack.pg).len());
    let reason = WRONGTYPE.to_string();
    assert_eq!(failed(&stack.pg), [(one, 1, reason.clone()), (none, 1, reason)]);
    stack
        .pg
        .exec("select outbox.publish_event('two', 'kit', stream => 'other', max_retries => 2)");
    assert_eq!(stack.redis.wait_entries("other", 1).len(), 1);
}

/// When a stream has failed, its next event has one attempt; after a success, all events have their usual number.
#[test]
fn a_stream_that_failed_is_forgiven_when_it_works_again() {
    let stack = stack(&[("outbox_relay.max_retries", "3")]);
    let publish = || -> Uuid { stack.pg.one("select outbox.publish_event('t', 'kit', stream => 'bad')") };
    publish();
    wait_eq("failed events", 1, || failed(&stack.pg).len());
    publish();
    wait_eq("failed events", 2, || failed(&stack.pg).len());
    assert_eq!(failed(&stack.pg).iter().map(|f| f.1).collect::<Vec<_>>(), [3, 1]);
    stack.redis.call(&["DEL", "bad"]);
    let accepted = publish();
    assert_eq!(ids(&stack.redis.wait_entries("bad", 1)), [accepted]);
    stack.redis.call(&["DEL", "bad"]);
    stack.redis.call(&["SET", "bad", "a string"]);
    publish();
    wait_eq("failed events", 3, || failed(&stack.pg).len());
    assert_eq!(failed(&stack.pg)[2].1, 3);
}

#[test]
fn a_stream_corrected_in_time_gets_everything_in_order() {
    let stack = stack(&[("outbox_relay.max_retries", "1000")]);
    let mut client = stack.pg.client();
    let mut expected = publish_many(&mut client, "default", "bad", "first", 250);
    wait_until("attempts", || attempts(&stack.pg, expected[0]) >= 3);
    expected.extend(publish_many(&mut client, "default", "bad", "second", 250));
    let others = publish_many(&mut client, "default", "", "other", 250);
    assert_eq!(ids(&stack.wait_events(250)), others);
    wait_eq("refused events", 500, || refused(&stack.pg));
    stack.redis.call(&["DEL", "bad"]);
    expected.extend(publish_many(&mut client, "default", "bad", "third", 250));
    assert_eq!(ids(&stack.redis.wait_entries("bad", 750)), expected);
    wait_eq("refused events", 0, || refused(&stack.pg));
    wait_drained(&stack.pg, "default");
    let found = standing(&stack.pg, "default");
    assert_eq!((found.published, found.failed, failed(&stack.pg).len()), (1_000, 0, 0));
}

/// Events of the backend's own stream wait for it under the name that it has now.
#[test]
fn changing_the_stream_name_corrects_a_wrong_default_stream() {
    let stack = stack(&[
        ("outbox_relay.retry_delay", "1h"),
        ("outbox_relay.retry_max_delay", "1h"),
    ]);
    stack.redis.call(&["SET", "events", "a string"]);
    let mut client = stack.pg.client();
    let mut expected = publish_many(&mut client, "default", "", "t", 5);
    wait_eq("refused events", 5, || refused(&stack.pg));
    let named = publish_many(&mut client, "default", "named", "t", 5);
    assert_eq!(ids(&stack.redis.wait_entries("named", 5)), named);
    stack.pg.exec("update outbox.backends set stream_name = 'mended'");
    expected.extend(publish_many(&mut client, "default", "", "t", 5));
    assert_eq!(ids(&stack.redis.wait_entries("mended", 10)), expected);
    wait_eq("refused events", 0, || refused(&stack.pg));
}

/// Also while it is being retried, an event does not fail because of an outage.
#[test]
fn an_outage_is_no_attempt_of_a_refused_event() {
    let mut stack = stack(&[
        ("outbox_relay.max_retries", "2"),
        ("outbox_relay.retry_delay", "500ms"),
        ("outbox_relay.retry_backoff", "off"),
    ]);
    let expected = publish_many(&mut stack.pg.client(), "default", "bad", "t", 3);
    wait_eq("refused events", 3, || refused(&stack.pg));
    stack.redis.shutdown();
    wait_trouble(&stack.pg, "default", "backoff", "refused");
    let attempt = || -> Option<chrono::DateTime<chrono::Utc>> {
        stack.pg.one("select next_attempt_at from outbox.backend_status")
    };
    for _ in 0..3 {
        let before = attempt();
        wait_until("another attempt to connect", || attempt() != before);
    }
    assert_eq!((attempts(&stack.pg, expected[0]), failed(&stack.pg).len()), (1, 0));
    // Without the key that was in the way.
    stack.redis.start_again();
    assert_eq!(ids(&stack.redis.wait_entries("bad", 3)), expected);
    wait_eq("refused events", 0, || refused(&stack.pg));
}

/// Restarts of the worker and of the server, orderly or not, neither lose refused events nor reset their attempts.
#[test]
fn refused_events_survive_restarts() {
    let mut stack = stack(&[
        ("outbox_relay.max_retries", "4"),
        ("outbox_relay.retry_delay", "1h"),
        ("outbox_relay.retry_max_delay", "1h"),
    ]);
    let expected = publish_many(&mut stack.pg.client(), "default", "bad", "t", 5);
    wait_eq("attempts", 1, || attempts(&stack.pg, expected[0]));
    let worker = stack.pg.wait_worker("postgres");
    stack.pg.exec(&format!("select pg_terminate_backend({worker})"));
    // Each start is an attempt.
    wait_eq("attempts", 2, || attempts(&stack.pg, expected[0]));
    // Changes saved a moment ago may be lost in a crash and are made again; this one is not.
    stack.pg.exec("checkpoint");
    stack.pg.stop(Mode::Immediate);
    stack.pg.start_again();
    wait_eq("attempts", 3, || attempts(&stack.pg, expected[0]));
    assert_eq!((refused(&stack.pg), failed(&stack.pg).len()), (5, 0));
    stack.redis.call(&["DEL", "bad"]);
    stack.pg.restart();
    assert_eq!(ids(&stack.redis.wait_entries("bad", 5)), expected);
    wait_eq("refused events", 0, || refused(&stack.pg));

    stack.redis.call(&["DEL", "bad"]);
    stack.redis.call(&["SET", "bad", "a string"]);
    let lost = publish_many(&mut stack.pg.client(), "default", "bad", "t", 2);
    for n in 1..=3 {
        wait_eq("attempts", n, || attempts(&stack.pg, lost[0]));
        stack.pg.restart();
    }
    wait_eq("failed events", 2, || failed(&stack.pg).len());
    assert_eq!(failed(&stack.pg)[0], (lost[0], 4, WRONGTYPE.to_string()));
}

/// A Redis user that may not touch one key: only that stream is affected, or one publisher could stop a backend.
#[test]
fn a_forbidden_key_affects_only_its_stream() {
    let stack = stack(&[("outbox_relay.max_retries", "2")]);
    stack.redis.call(&[
        "ACL",
        "SETUSER",
        "relay",
        "on",
        ">secret",
        "~events",
        "~good",
        "~outbox_relay:*",
        "+@all",
    ]);
    stack
        .pg
        .exec("update outbox.backends set username = 'relay'; select outbox.set_backend_password('default', 'secret')");
    let mut client = stack.pg.client();
    publish_many(&mut client, "default", "forbidden", "no", 2);
    publish_many(&mut client, "default", "good", "yes", 2);
    assert_eq!(types(&stack.redis.wait_entries("good", 2)), ["yes1", "yes2"]);
    wait_eq("failed events", 2, || failed(&stack.pg).len());
    let found = failed(&stack.pg);
    assert!(
        found[0].1 == 2 && found[0].2.starts_with("NOPERM") && found[1].2 == found[0].2,
        "{found:?}"
    );
    assert_ne!(standing(&stack.pg, "default").state, "misconfigured");
    stack.publish("plain");
    assert_eq!(types(&stack.wait_events(1)), ["plain"]);
}

/// A Redis user without XADD: nothing can be sent at all, so no event is at fault.
#[test]
fn a_forbidden_command_is_a_misconfiguration() {
    let stack = stack(&[("outbox_relay.max_retries", "1")]);
    stack
        .redis
        .call(&["ACL", "SETUSER", "relay", "on", ">secret", "~*", "+ping"]);
    stack
        .pg
        .exec("update outbox.backends set username = 'relay'; select outbox.set_backend_password('default', 'secret')");
    let expected = publish_many(&mut stack.pg.client(), "default", "", "t", 150);
    let found = wait_trouble(&stack.pg, "default", "misconfigured", "NOPERM");
    assert_eq!((found.pending, found.failed), (150, 0));
    stack.pg.wait_log(
        "HINT:  Allow the backend's Redis user XADD on its streams, and for exactly_once what docs/guarantees.md lists",
    );
    stack.redis.call(&["ACL", "SETUSER", "relay", "+@all", "-xadd"]);
    stack.pg.exec("select outbox.wake()");
    let found = wait_trouble(&stack.pg, "default", "misconfigured", "'xadd'");
    assert_eq!((found.pending, found.failed), (150, 0));
    stack.redis.call(&["ACL", "SETUSER", "relay", "+xadd"]);
    assert_eq!(ids(&stack.wait_events(150)), expected);
    wait_drained(&stack.pg, "default");
    assert_eq!(failed(&stack.pg), []);
}

/// A stream that has reached the last possible entry id.
#[test]
fn an_exhausted_stream_fails_alone() {
    let stack = stack(&[("outbox_relay.max_retries", "2")]);
    stack
        .redis
        .call(&["XADD", "full", "18446744073709551615-18446744073709551615", "a", "b"]);
    stack
        .pg
        .exec("select outbox.publish_event('t', 'kit', stream => 'full')");
    stack.publish("plain");
    assert_eq!(types(&stack.wait_events(1)), ["plain"]);
    wait_eq("failed events", 1, || failed(&stack.pg).len());
    let found = failed(&stack.pg);
    assert!(
        found[0].1 == 2 && found[0].2.contains("exhausted the last possible ID"),
        "{found:?}"
    );
}
