//! `outbox.replay()`: published events are appended once more, each exactly once for each call.

use kit::{
    LIMIT, Mode, Postgres, QUICK, Redis, Refused, Stack, UNTRIMMED, ids, publish_many, types, wait_drained, wait_eq,
};
use uuid::Uuid;

fn quick() -> Stack {
    Stack::of(Postgres::with(QUICK).with(&[UNTRIMMED]), Redis::start())
}

fn replay(pg: &Postgres, arguments: &str) -> i64 {
    pg.one(&format!("select outbox.replay({arguments})"))
}

/// Publishes and waits until the event is known as published.
fn published(stack: &Stack, prefix: &str, count: i32) -> Vec<Uuid> {
    let before = stack.events().len();
    let published = publish_many(&mut stack.pg.client(), "default", "", prefix, count);
    stack.wait_events(before + published.len());
    wait_drained(&stack.pg, "default");
    published
}

#[test]
fn published_events_are_appended_once_more_in_order_and_as_they_were() {
    let stack = quick();
    let first = published(&stack, "a", 3);
    let second = published(&stack, "b", 3);
    let time = |id: Uuid| format!("(select created_at from outbox.events where event_id = '{id}')");
    let (since, until) = (time(first[1]), time(second[1]));
    // From "since" on, and before "until".
    assert_eq!(replay(&stack.pg, &format!("'default', {since}, {until}")), 3);
    let all = stack.wait_events(9);
    assert_eq!(ids(&all)[6..], [first[1], first[2], second[0]]);
    for (entry, again) in [(1, 6), (2, 7), (3, 8)] {
        assert_eq!(all[entry].fields, all[again].fields, "the entry is the same");
    }
    wait_drained(&stack.pg, "default");
    // By type; up to now.
    assert_eq!(replay(&stack.pg, "'default', '-infinity', event_type => 'b2'"), 1);
    assert_eq!(ids(&stack.wait_events(10))[9..], [second[1]]);
    wait_drained(&stack.pg, "default");
    assert_eq!(replay(&stack.pg, "'default', '-infinity', 'infinity'"), 6);
    let order = [first.clone(), second.clone()].concat();
    assert_eq!(sorted(ids(&stack.wait_events(16))[10..].to_vec()), sorted(order));
    wait_drained(&stack.pg, "default");
    stack
        .pg
        .wait_log("6 published events of backend \"default\" are appended again");
    for arguments in [
        "'default', now() + interval '1 hour'",
        "'default', '-infinity', event_type => 'none'",
    ] {
        assert_eq!(replay(&stack.pg, arguments), 0);
    }
}

fn sorted(mut ids: Vec<Uuid>) -> Vec<Uuid> {
    ids.sort_unstable();
    ids
}

#[test]
fn only_published_events_are_replayed_and_only_if_the_transaction_commits() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[UNTRIMMED, ("outbox_relay.max_retries", "1")]),
        Redis::start(),
    );
    let sent = published(&stack, "sent", 2);
    stack.redis.call(&["SET", "bad", "a string"]);
    stack
        .pg
        .exec("select outbox.publish_event('failed', 'kit', stream => 'bad')");
    wait_eq("failed events", 1, || {
        stack.pg.one::<i64>("select count(*) from outbox.failed_events")
    });
    wait_drained(&stack.pg, "default");
    stack.pg.exec("update outbox.backends set enabled = false");
    stack.pg.exec(
        "select outbox.publish_event('pending', 'kit');
         select outbox.publish_event('scheduled', 'kit', scheduled_at => now() + interval '1 day')",
    );
    stack
        .pg
        .exec("begin; select outbox.replay('default', '-infinity'); rollback");
    assert_eq!(replay(&stack.pg, "'default', '-infinity'"), 2);
    assert_eq!(replay(&stack.pg, "'default', '-infinity'"), 0, "they wait");
    stack.pg.exec("update outbox.backends set enabled = true");
    let all = stack.wait_events(5);
    assert_eq!(types(&all)[2..], ["pending", "sent1", "sent2"]);
    assert_eq!(ids(&all)[3..], sent);
    let refused = |sql: &str| Refused::of(stack.pg.client().batch_execute(sql)).code;
    assert_eq!(refused("select outbox.replay('none', '-infinity')"), "42704");
    assert_eq!(refused("select outbox.replay('default', null)"), "22004");
    assert_eq!(refused("select outbox.replay('default', now(), now())"), "22023");
    stack
        .pg
        .exec("create role app login; select outbox.grant_publisher('app')");
    let app = stack
        .pg
        .client_as("app", "postgres")
        .batch_execute("select outbox.replay('default', '-infinity')");
    assert_eq!(Refused::of(app).code, "42501");
}

#[test]
fn each_event_is_appended_once_more_whatever_is_killed() {
    let mut stack = quick();
    let count = 3_000;
    let sent = published(&stack, "event", count);
    for round in 1..=3 {
        assert_eq!(replay(&stack.pg, "'default', '-infinity'"), i64::from(count));
        match round {
            1 => stack.pg.kill_worker(),
            2 => {
                stack.pg.kill9();
                stack.pg.start_again();
            }
            _ => {
                stack.pg.stop(Mode::Immediate);
                stack.pg.start_again();
            }
        }
        let all = ids(&stack.wait_events(sent.len() * (round + 1)));
        wait_drained(&stack.pg, "default");
        assert_eq!(stack.events().len(), sent.len() * (round + 1));
        assert_eq!(all[sent.len() * round..], sent);
    }
    // A replay that was not committed leaves nothing.
    let mut client = stack.pg.client();
    client
        .batch_execute("begin; select outbox.replay('default', '-infinity')")
        .expect("it replays");
    stack.pg.kill9();
    stack.pg.start_again();
    let more = published(&stack, "more", 1);
    assert_eq!(ids(&stack.events())[sent.len() * 4..], more);
}

/// The first entries are in the stream with the same ids and times. They are not taken for the second ones.
#[test]
fn a_pending_replay_is_not_taken_for_delivered_by_a_comparison() {
    let mut stack = quick();
    let sent = published(&stack, "event", 5);
    stack.pg.exec("update outbox.backends set enabled = false");
    assert_eq!(replay(&stack.pg, "'default', '-infinity'"), 5);
    let key = stack.guard_key();
    stack.pg.stop(Mode::Fast);
    stack.redis.call(&["DEL", &key]);
    stack.pg.start_again();
    stack.pg.exec("update outbox.backends set enabled = true");
    stack.pg.wait_log("guard of backend \"default\" is missing");
    assert_eq!(ids(&stack.wait_events(10)), [sent.clone(), sent.clone()].concat());
    wait_drained(&stack.pg, "default");

    // Refused, and corrected by what had been there before.
    stack.redis.call(&["RENAME", "events", "away"]);
    stack.redis.call(&["SET", "events", "a string"]);
    stack.pg.set("outbox_relay.max_retries", "1000");
    stack.pg.reload();
    assert_eq!(replay(&stack.pg, "'default', '-infinity'"), 5);
    wait_eq("waiting events", 5, || {
        stack
            .pg
            .one::<i64>("select count(*) from outbox.refused_events where accepted_in is null")
    });
    stack.pg.stop(Mode::Fast);
    stack.redis.call(&["DEL", "events"]);
    stack.redis.call(&["RENAME", "away", "events"]);
    stack.pg.start_again();
    assert_eq!(ids(&stack.wait_events(15)), [sent.clone(), sent.clone(), sent].concat());
    wait_drained(&stack.pg, "default");
    kit::holds_for(LIMIT / 60, "no other entry", || stack.events().len() == 15);
}

/// Redis fails over to a replica that lacks the replayed entries.
#[test]
fn a_replay_that_redis_has_lost_is_healed() {
    let mut stack = Stack::of(
        Postgres::with(QUICK).with(&[UNTRIMMED]),
        Redis::with(&["--save", "", "--appendonly", "no"]),
    );
    let sent = published(&stack, "event", 20);
    stack.redis.call(&["SAVE"]);
    assert_eq!(replay(&stack.pg, "'default', '-infinity'"), 20);
    stack.wait_events(40);
    wait_drained(&stack.pg, "default");
    stack.redis.kill9();
    stack.redis.start_again();
    assert_eq!(ids(&stack.wait_events(40)), [sent.clone(), sent].concat());
    wait_drained(&stack.pg, "default");
    assert_eq!(stack.events().len(), 40);
    stack.pg.wait_log("heals: Redis has lost what it acknowledged");
}
