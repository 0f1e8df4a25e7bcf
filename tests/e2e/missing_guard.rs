//! The guard is missing or unreadable: the relay acts according to `on_missing_guard`, and loses nothing.

use kit::{
    LIMIT, Ledger, Load, Mode, Postgres, QUICK, Redis, Stack, UNTRIMMED, ids, publish_many, standing, wait_drained,
    wait_eq, wait_trouble, wait_until,
};
use uuid::Uuid;

use crate::health::wait_ill;

const MISSING: &str = "guard of backend \"default\" is missing";
const HALTED: &str = "its guard is missing: Redis has lost its data, or is another Redis";

/// A stack that checks its guard very often, and has delivered `count` events.
fn stack(on_missing: &str, count: i32) -> (Stack, Vec<Uuid>) {
    let postgres = Postgres::with(QUICK).with(&[UNTRIMMED, ("outbox_relay.poll_interval", "100ms")]);
    let stack = Stack::of(postgres, Redis::start());
    stack
        .pg
        .exec(&format!("update outbox.backends set on_missing_guard = '{on_missing}'"));
    let published = publish(&stack, count);
    stack.wait_events(published.len());
    wait_drained(&stack.pg, "default");
    (stack, published)
}

fn publish(stack: &Stack, count: i32) -> Vec<Uuid> {
    publish_many(&mut stack.pg.client(), "default", "", "event", count)
}

/// Waits until the stream holds exactly these events and the backend is healthy.
#[track_caller]
fn wait_exactly(stack: &Stack, expected: &[Uuid]) {
    stack.wait_events(expected.len());
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), expected);
    wait_eq("the state", "idle".to_string(), || standing(&stack.pg, "default").state);
}

#[test]
fn continue_sends_what_was_not_sent_and_says_that_something_is_lost() {
    let (stack, _) = stack("continue", 30);
    let mark = stack.pg.log().len();
    stack.redis.call(&["FLUSHALL"]);
    stack.pg.wait_log_after(mark, MISSING);
    wait_eq("a guard that knows what was sent", Some(30), || {
        Some(stack.redis.guard(&stack.guard_key())?.number("total"))
    });
    let after = publish(&stack, 20);
    wait_exactly(&stack, &after);
    let log = stack.pg.log();
    assert_eq!(log.matches(MISSING).count(), 1, "{log}");
    assert!(log[mark..].contains("Redis has lost its data, or this is another Redis."));
    // Events of one moment: Redis is emptied before it gets them.
    let mut conn = stack.redis.conn();
    kit::tell(&mut conn, &["FLUSHALL"]);
    let more = publish(&stack, 20);
    wait_exactly(&stack, &more);
    assert_eq!(standing(&stack.pg, "default").published, 70);
}

/// A Redis that evicts keys loses guard and streams again and again: the log does not fill, and health() says what to
/// do.
#[test]
fn a_redis_that_evicts_keys_is_named() {
    let (stack, _) = stack("continue", 3);
    let mark = stack.pg.log().len();
    stack.redis.call(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]);
    stack.redis.call(&["CONFIG", "SET", "maxmemory", "3mb"]);
    wait_until("Redis to evict the guard", || {
        stack.pg.exec(
            "select outbox.publish_event('event', 'kit', jsonb_build_object('x', repeat('y', 100000))) from generate_series(1, 10)",
        );
        stack.pg.log()[mark..].contains(MISSING)
    });
    for _ in 0..5 {
        stack.redis.call(&["DEL", &stack.guard_key()]);
        publish(&stack, 1);
        wait_drained(&stack.pg, "default");
    }
    let ill = wait_ill(&stack.pg, "backend default", "its guard was missing");
    assert_eq!(ill.status, "warn");
    assert!(
        ill.hint
            .is_some_and(|hint| hint.contains("CONFIG SET maxmemory-policy noeviction"))
    );
    let log = stack.pg.log();
    assert_eq!(log[mark..].matches(MISSING).count(), 1, "{log}");
}

/// The streams exist: their entries are recognised by their event ids, also those that no cursor covers.
#[test]
fn deleting_only_the_guard_repeats_nothing() {
    let (mut stack, mut published) = stack("continue", 30);
    stack.redis.call(&["DEL", &stack.guard_key()]);
    published.extend(publish(&stack, 20));
    wait_exactly(&stack, &published);
    // While the server is down, and its last work is not saved.
    for _ in 0..3 {
        published.extend(publish(&stack, 250));
        stack.wait_events(published.len());
        let key = stack.guard_key();
        stack.pg.stop(Mode::Immediate);
        stack.redis.call(&["DEL", &key]);
        let down = stack.events().len();
        stack.pg.start_again();
        published.extend(publish(&stack, 20));
        wait_exactly(&stack, &published);
        assert!(down >= 280, "{down}");
    }
    assert!(stack.pg.log().contains(MISSING));
    let found = standing(&stack.pg, "default");
    assert_eq!(found.failed, 0, "{found:?}");
}

#[test]
fn halt_waits_for_a_take_over_and_resends_nothing() {
    let (mut stack, _) = stack("halt", 30);
    for round in 0..2 {
        let mark = stack.pg.log().len();
        stack.redis.call(&["FLUSHALL"]);
        let waiting = publish(&stack, 20);
        let found = wait_trouble(&stack.pg, "default", "misconfigured", HALTED);
        assert_eq!((found.pending, found.failed), (20, 0), "{found:?}");
        stack.pg.wait_log_after(mark, HALTED);
        stack
            .pg
            .wait_log_after(mark, "HINT:  Run outbox.take_over() to continue without it.");
        // Neither time nor a restart changes that.
        match round {
            0 => stack.pg.restart(),
            _ => stack.pg.kill_worker(),
        }
        wait_trouble(&stack.pg, "default", "misconfigured", HALTED);
        let before = stack
            .pg
            .one::<Option<chrono::DateTime<chrono::Utc>>>("select next_attempt_at from outbox.backend_status");
        wait_until("another attempt", || {
            stack
                .pg
                .one::<Option<chrono::DateTime<chrono::Utc>>>("select next_attempt_at from outbox.backend_status")
                > before
        });
        assert_eq!(
            (stack.redis.xlen("events"), standing(&stack.pg, "default").pending),
            (0, 20)
        );
        stack.pg.exec("select outbox.take_over('default')");
        wait_exactly(&stack, &waiting);
        wait_eq("orders to take over", 0, || {
            stack.pg.one::<i64>("select count(*) from outbox.take_overs")
        });
        let more = publish(&stack, 5);
        wait_exactly(&stack, &[waiting, more].concat());
    }
}

/// Nothing was ever sent, so no guard is missing.
#[test]
fn a_first_connection_does_not_halt() {
    let (stack, published) = stack("halt", 3);
    wait_exactly(&stack, &published);
    assert!(!stack.pg.log().contains("missing"));
}

#[test]
fn replay_sends_again_all_that_is_retained() {
    let (stack, mut published) = stack("replay", 250);
    published.extend(publish(&stack, 50));
    stack.wait_events(300);
    wait_drained(&stack.pg, "default");
    for _ in 0..2 {
        stack.redis.call(&["FLUSHALL"]);
        published.extend(publish(&stack, 20));
        wait_exactly(&stack, &published);
    }
    wait_until("healings", || {
        stack.pg.one::<i64>("select healings from outbox.backend_status") == 2
    });
    assert!(
        stack
            .pg
            .log()
            .contains("Because of on_missing_guard, all retained events are sent again.")
    );
    // As documented: if the streams still exist, all retained events are in them twice.
    stack.redis.call(&["DEL", &stack.guard_key()]);
    let expected = [published.clone(), published].concat();
    wait_exactly(&stack, &expected);
}

#[test]
fn a_replay_that_is_interrupted_goes_on_where_it_was() {
    let (stack, published) = stack("replay", 3_000);
    stack.redis.call(&["FLUSHALL"]);
    wait_until("a part of it", || stack.redis.xlen("events") >= 300);
    stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    wait_until("more of it", || stack.redis.xlen("events") >= 1_000);
    stack.pg.kill_worker();
    stack.wait_events(3_000);
    wait_drained(&stack.pg, "default");
    assert!(ids(&stack.events()) == published, "other events, or another order");
}

/// Whatever is at the guard's key, nothing is sent, and the error names the cause.
#[test]
fn an_unreadable_guard_stops_everything_and_loses_nothing() {
    let (stack, mut published) = stack("continue", 10);
    let key = stack.guard_key();
    let restore = |guard: &kit::Guard| {
        stack.redis.call(&["DEL", &key]);
        let fields = guard
            .0
            .iter()
            .flat_map(|(field, value)| [field.as_str(), value.as_str()]);
        let words: Vec<&str> = ["HSET", &key].into_iter().chain(fields).collect();
        stack.redis.call(&words);
    };
    let spoil: [(&[&str], &str); 7] = [
        (&["SET", &key, "a string"], "WRONGTYPE"),
        (&["RPUSH", &key, "a list"], "WRONGTYPE"),
        (&["HSET", &key, "number", "many"], "the guard has no readable number"),
        (
            &["HSET", &key, "position", "somewhere"],
            "the guard has no readable position",
        ),
        (&["HSET", &key, "again", "1,2,x"], "the guard has no readable again"),
        (&["HDEL", &key, "incarnation"], "the guard has no readable incarnation"),
        (&["HSET", &key, "number", "-1"], "the guard has no readable number"),
    ];
    for (command, message) in spoil {
        // The last refresh may be under way; nothing else is.
        let mark = stack.pg.log().len();
        let guard = stack.guard();
        if command[0] != "HSET" && command[0] != "HDEL" {
            stack.redis.call(&["DEL", &key]);
        }
        stack.redis.call(command);
        stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
        let waiting = publish(&stack, 10);
        let found = wait_trouble(&stack.pg, "default", "misconfigured", message);
        assert_eq!((found.pending, found.failed), (10, 0), "{found:?}");
        stack.pg.wait_log_after(mark, message);
        stack.pg.wait_log_after(mark, &key);
        assert_eq!(stack.redis.xlen("events"), published.len());
        published.extend(waiting);
        restore(&guard);
        wait_exactly(&stack, &published);
    }
    assert_eq!(stack.pg.one::<i64>("select count(*) from outbox.failed_events"), 0);
}

/// Redis is emptied repeatedly under load.
#[test]
fn a_redis_that_is_emptied_under_load_gets_all_that_comes_after() {
    let (stack, _) = stack("replay", 1);
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 3, "");
    for _ in 0..4 {
        load.wait_more(80);
        stack.redis.call(&["FLUSHALL"]);
    }
    load.wait_more(80);
    load.stop();
    let mut verdict = ledger.settle(&stack, LIMIT);
    // The event from before the ledger.
    assert_eq!(verdict.phantoms.len(), 1, "{:?}", verdict.phantoms);
    verdict.phantoms.clear();
    verdict.assert_exactly_once();
}
