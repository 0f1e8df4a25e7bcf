//! A worker that has been idle rehearses when an event is being published: that sends nothing, and delays nobody.

use std::time::{Duration, Instant};

use kit::{Postgres, QUICK, Redis, Stack, types, wait_until};
use postgres::Client;

/// The worker has sent one event, and then nothing for a while.
fn idle() -> Stack {
    let stack = Stack::of(Postgres::with(QUICK).faults(), Redis::start());
    stack.publish("first");
    stack.wait_events(1);
    let start = Instant::now();
    wait_until("a while to pass", || start.elapsed() > Duration::from_millis(50));
    stack
}

/// Publishes an event, and ends the transaction while the worker is held in its rehearsal.
fn rehearsed(stack: &Stack, event_type: &str) -> Client {
    let mut publisher = stack.pg.client();
    stack.pg.hold_at("at_rehearsal");
    publisher
        .batch_execute(&format!("begin; select outbox.publish_event('{event_type}', 'kit')"))
        .unwrap();
    stack.pg.wait_reached();
    publisher
}

#[test]
fn uncommitted_events_are_rehearsed_and_sent_once_they_are_committed() {
    let stack = idle();
    let mut publisher = rehearsed(&stack, "second");
    assert_eq!(types(&stack.events()), ["first"]);
    publisher.batch_execute("commit").unwrap();
    assert_eq!(types(&stack.events()), ["first"], "the worker is held");
    stack.pg.release();
    assert_eq!(types(&stack.wait_events(2)), ["first", "second"]);
}

#[test]
fn rehearsed_events_that_are_rolled_back_are_not_sent() {
    let stack = idle();
    let mut publisher = rehearsed(&stack, "aborted");
    publisher.batch_execute("rollback").unwrap();
    stack.pg.release();
    stack.publish("second");
    assert_eq!(types(&stack.wait_events(2)), ["first", "second"]);
}

#[test]
fn a_rehearsal_does_not_wait_for_a_locked_table() {
    let stack = idle();
    let mut publisher = stack.pg.client();
    publisher
        .batch_execute("begin; lock table outbox.events; select outbox.publish_event('second', 'kit')")
        .unwrap();
    // The worker still reacts to others. (It must not need the table for that.)
    stack.pg.set("outbox_relay.log_level", "debug");
    stack.pg.exec("update outbox.backends set max_len = 1000");
    stack.pg.wait_log("loaded the settings of 1 backends");
    publisher.batch_execute("commit").unwrap();
    assert_eq!(types(&stack.wait_events(2)), ["first", "second"]);
    assert!(
        !stack.pg.log().contains("lock timeout"),
        "the worker waited for the table"
    );
}
