//! With the default delivery every event is in its stream once and in order, whatever is interrupted. (For processes
//! that are killed under load see `crash.rs`.)

use kit::{
    Dice, LIMIT, Ledger, Load, Postgres, Redis, Stack, UNTRIMMED, ids, publish_many, standing, wait_drained, wait_eq,
    wait_until,
};

/// Redis closes every connection except this one.
fn kill_clients(stack: &Stack) {
    stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
}

/// Each time, the batches on their way are in doubt.
#[test]
fn connections_that_redis_kills_under_load_repeat_nothing() {
    let stack = Stack::with(&[UNTRIMMED, ("outbox_relay.retry_delay", "10ms")]);
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 4, "");
    let mut dice = Dice::new(3);
    for _ in 0..25 {
        load.wait_more(dice.between(1, 40));
        kill_clients(&stack);
    }
    load.stop();
    let verdict = ledger.settle(&stack, LIMIT);
    assert!(verdict.committed > 100, "only {} events", verdict.committed);
    verdict.assert_exactly_once();
}

/// A backlog in large batches, several of them prepared: connections and worker end while it drains.
#[test]
fn a_backlog_that_is_interrupted_again_and_again_arrives_once_and_in_order() {
    const COUNT: i32 = 10_000;
    let stack = Stack::with(&[
        UNTRIMMED,
        ("outbox_relay.retry_delay", "10ms"),
        ("outbox_relay.batch_size", "500"),
    ]);
    stack.pg.exec("update outbox.backends set enabled = false");
    let published = publish_many(&mut stack.pg.client(), "default", "", "event", COUNT);
    stack.pg.exec("update outbox.backends set enabled = true");
    for goal in [1, 3, 4, 6, 8] {
        let goal = goal * COUNT as usize / 10;
        wait_until("a part of the backlog", || stack.redis.xlen("events") >= goal);
        match goal % 3 {
            0 => stack.pg.kill_worker(),
            _ => kill_clients(&stack),
        }
    }
    stack.wait_events(COUNT as usize);
    wait_drained(&stack.pg, "default");
    assert!(ids(&stack.events()) == published, "other events, or another order");
    assert_eq!(standing(&stack.pg, "default").published, i64::from(COUNT));
}

/// No process is killed and Redis is healthy, so neither delivery may repeat anything.
#[test]
fn switching_the_delivery_back_and_forth_under_load_repeats_nothing() {
    let stack = Stack::with(&[UNTRIMMED]);
    let ledger = Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 4, "");
    for delivery in ["at_least_once", "exactly_once"].repeat(4) {
        load.wait_more(60);
        stack
            .pg
            .exec(&format!("update outbox.backends set delivery = '{delivery}'"));
    }
    load.wait_more(60);
    load.stop();
    ledger.settle(&stack, LIMIT).assert_exactly_once();
}

/// Each has its own guard, and is interrupted together with the others.
#[test]
fn backends_that_share_a_redis_do_not_disturb_each_other() {
    const BACKENDS: [&str; 3] = ["default", "second", "third"];
    let stack = Stack::with(&[UNTRIMMED, ("outbox_relay.retry_delay", "10ms")]);
    for backend in &BACKENDS[1..] {
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port, stream_name) values ('{backend}', '127.0.0.1', {}, '{backend}')",
            stack.redis.port()
        ));
    }
    let mut published = [Vec::new(), Vec::new(), Vec::new()];
    let mut client = stack.pg.client();
    for round in 0..30 {
        for (backend, published) in BACKENDS.iter().zip(&mut published) {
            published.extend(publish_many(&mut client, backend, "", "event", 20));
        }
        if round % 3 == 0 {
            kill_clients(&stack);
        }
        if round % 7 == 0 {
            stack
                .pg
                .exec("update outbox.backends set enabled = not enabled where name = 'second'");
        }
    }
    stack.pg.exec("update outbox.backends set enabled = true");
    stack.pg.kill_worker();
    for (backend, published) in BACKENDS.iter().zip(&published) {
        let stream = if *backend == "default" { "events" } else { backend };
        stack.redis.wait_entries(stream, published.len());
        wait_drained(&stack.pg, backend);
        assert_eq!(ids(&stack.redis.entries(stream)), *published, "{backend}");
        let guard = stack
            .redis
            .guard(&stack.pg.one::<String>(&format!("select outbox.guard_key('{backend}')")));
        assert_eq!(guard.expect("a guard").number("total"), 600, "{backend}");
    }
}

/// Waiting events that Redis turns out to have: all of them are looked for, even if they are more than one comparison
/// takes.
#[test]
fn waiting_events_are_compared_piece_by_piece() {
    let stack = Stack::of(
        Postgres::with(&[
            UNTRIMMED,
            ("outbox_relay.retry_delay", "1h"),
            ("outbox_relay.retry_max_delay", "1h"),
        ])
        .faults(),
        Redis::start(),
    );
    stack.redis.call(&["SET", "bad", "a string"]);
    let mut expected = publish_many(&mut stack.pg.client(), "default", "bad", "waits", 7);
    wait_eq("events that wait", 7i64, || {
        stack.pg.one("select count(*) from outbox.refused_events")
    });
    stack.redis.call(&["DEL", "bad"]);
    let names = stack
        .pg
        .client()
        .query(
            r#"select event_id::text, to_char(created_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"') from outbox.events order by seq"#,
            &[],
        )
        .expect("events");
    for row in &names {
        stack
            .redis
            .call(&["XADD", "bad", "*", "event_id", row.get(0), "timestamp", row.get(1)]);
    }
    // A worker that compares two at a time.
    stack.pg.mutation("compare_by_two");
    let old = stack.pg.wait_worker("postgres");
    stack.pg.exec(&format!("select pg_terminate_backend({old})"));
    stack.pg.wait_new_worker(old);
    expected.extend(publish_many(&mut stack.pg.client(), "default", "bad", "after", 1));
    assert_eq!(ids(&stack.redis.wait_entries("bad", 8)), expected);
    wait_drained(&stack.pg, "default");
    assert_eq!(stack.redis.xlen("bad"), 8);
    assert_eq!(
        stack
            .pg
            .one::<i64>("select count(*) from outbox.refused_events where accepted_in is null"),
        0
    );
}
