//! Batches for a sender that cannot send them as fast: no batch may be lost between the worker and its sender.

use std::time::Duration;

use kit::{Postgres, Redis, Stack, ids, publish_many, standing, wait_drained, wait_until};

/// Redis refuses an event in the first of many batches. The sender drops the batches behind it, but only after some
/// replies; by then the worker has saved the refusal and hands all of them over again.
#[test]
fn batches_handed_over_again_after_a_refusal_have_room() {
    let stack = Stack::of(
        Postgres::with(&[
            ("outbox_relay.batch_size", "10"),
            ("outbox_relay.redis_max_len", "0"),
            ("outbox_relay.retry_delay", "1ms"),
            ("outbox_relay.max_retries", "1"),
        ]),
        Redis::start(),
    );
    stack.redis.call(&["SET", "bad", "a string"]);
    let proxy = stack.through_proxy();
    stack.pg.exec("update outbox.backends set enabled = false");
    let mut client = stack.pg.client();
    publish_many(&mut client, "default", "bad", "refused", 1);
    let expected = publish_many(&mut client, "default", "", "t", 1_000);
    proxy.delay(Duration::from_millis(50));
    stack.pg.exec("update outbox.backends set enabled = true");
    wait_until("the refusal", || standing(&stack.pg, "default").failed == 1);
    proxy.pass();
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), expected);
}

/// An idle worker refreshes its guard at each poll. While Redis does not answer, refreshes must not take the place of
/// events that are published then.
#[test]
fn refreshes_of_the_guard_do_not_pile_up_before_events() {
    let stack = Stack::with(&[
        ("outbox_relay.poll_interval", "100ms"),
        ("outbox_relay.redis_socket_timeout", "1min"),
    ]);
    let mut expected = vec![stack.publish("before")];
    stack.wait_events(1);
    stack.redis.sigstop();
    // Nothing shows a waiting refresh; there were 40 orders at most.
    std::thread::sleep(Duration::from_millis(4_500));
    expected.push(stack.publish("meanwhile"));
    expected.push(stack.publish("and another"));
    stack.redis.sigcont();
    expected.push(stack.publish("after"));
    stack.wait_events(4);
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), expected);
}
