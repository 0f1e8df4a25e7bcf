//! Crowds of sessions that do again and again what their roles may do: neither the worker nor the events of others
//! suffer.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use kit::process::memory_kb;
use kit::{Bystander, Stack, median_beside};

/// What a crowd did to a bystander: the medians, alone first.
struct Beside {
    alone: Duration,
    with: Duration,
}

/// Roles that may publish, look, and act, and a table of the publisher's.
fn stack(settings: &[(&str, &str)]) -> Stack {
    let stack = Stack::with(
        &[
            &[("max_connections", "150"), ("max_prepared_transactions", "10")],
            settings,
        ]
        .concat(),
    );
    stack.pg.exec(
        "create role publisher login; select outbox.grant_publisher('publisher');
         create role monitor login in role pg_monitor;
         create role operator login; grant usage on schema outbox to operator;
         grant execute on function outbox.test_backend(text), outbox.preview(uuid), outbox.wake() to operator;
         create schema theirs authorization publisher; create table theirs.own (a integer primary key);
         alter table theirs.own owner to publisher",
    );
    stack
}

/// So many sessions of a role repeat a statement for so long. How often it was done, and how often refused.
fn repeat(stack: &Stack, sessions: usize, role: &str, statement: &str, time: Duration) -> [usize; 2] {
    let (ends, done, refused) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..sessions {
            scope.spawn(|| {
                let mut client = stack.pg.client_as(role, "postgres");
                while !ends.load(Ordering::Relaxed) {
                    let count = match client.batch_execute(statement) {
                        Ok(()) => &done,
                        Err(_) => {
                            let _ = client.batch_execute("rollback");
                            &refused
                        }
                    };
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        std::thread::sleep(time);
        ends.store(true, Ordering::Relaxed);
    });
    [done, refused].map(AtomicUsize::into_inner)
}

/// A bystander's events beside each of these crowds, and alone.
#[track_caller]
fn beside(stack: &Stack, sessions: usize, crowds: &[(&str, &str)]) -> Vec<Beside> {
    let time = Duration::from_millis(1_500);
    let alone = median_beside(stack, "nobody", || std::thread::sleep(Duration::from_secs(1)));
    let outcome = |(role, statement): &(&str, &str)| {
        let with = median_beside(stack, &format!("{sessions} times {role}: {statement}"), || {
            let [done, refused] = repeat(stack, sessions, role, statement, time);
            println!("done {done} times, refused {refused} times");
        });
        Beside { alone, with }
    };
    crowds.iter().map(outcome).collect()
}

/// Sessions that only wait need next to nothing.
#[track_caller]
fn assert_unnoticed(outcomes: &[Beside]) {
    for Beside { alone, with } in outcomes {
        assert!(
            *with <= *alone * 2 + Duration::from_millis(20),
            "median {with:?}, alone {alone:?}"
        );
    }
}

#[test]
fn fifty_sessions_that_wait_for_their_events_hold_up_nobody() {
    let stack = stack(&[]);
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, stream_name, enabled) values ('paused', '127.0.0.1', {}, 'paused', false)",
        stack.redis.port()
    ));
    let mut client = stack.pg.client_as("publisher", "postgres");
    let id: uuid::Uuid = client
        .query_one("select outbox.publish_event('t', 's', backend => 'paused')", &[])
        .expect("published")
        .get(0);
    let wait = format!("select outbox.wait_published('{id}', '1 s')");
    let outcomes = beside(
        &stack,
        50,
        &[("publisher", &wait), ("monitor", "select outbox.drain('1 s')")],
    );
    assert_unnoticed(&outcomes);
}

/// They want the processors as whoever computes something does, and no more of the worker.
#[test]
fn sessions_that_look_and_test_in_loops_hold_up_nobody() {
    let stack = stack(&[]);
    let id = stack.publish("first");
    stack.wait_events(1);
    let worker = stack.pg.wait_worker("postgres");
    let before = memory_kb(worker);
    let preview = format!("select outbox.preview('{id}')");
    beside(
        &stack,
        8,
        &[
            ("operator", &preview),
            ("operator", "select outbox.test_backend('default')"),
            ("operator", "select outbox.wake()"),
            ("monitor", "select * from outbox.health()"),
            ("monitor", "select * from outbox.status"),
            ("monitor", "select * from outbox.metrics"),
            ("monitor", "select * from outbox.consumers"),
            ("publisher", "select * from outbox.published_here()"),
        ],
    );
    assert_eq!(stack.pg.wait_worker("postgres"), worker);
    let grown = memory_kb(worker).saturating_sub(before);
    assert!(grown < 16 * 1024, "the worker's memory has grown by {grown} KiB");
}

#[test]
fn what_a_publisher_can_lock_or_repeat_holds_up_nobody() {
    let stack = stack(&[]);
    stack.publish("first");
    stack.wait_events(1);
    let mut statements = vec![
        "begin; select outbox.publish_event('t', 's'); rollback".to_owned(),
        "begin; savepoint a; select outbox.publish_event('t', 's'); rollback to a; release a; commit".to_owned(),
        "begin; select outbox.publish_event('t', 's'); prepare transaction 'p'; rollback prepared 'p'".to_owned(),
        "listen outbox; notify outbox, 'x'; unlisten *".to_owned(),
        "select pg_try_advisory_lock(hashtext('outbox'), n) from generate_series(1, 500) n; select pg_advisory_unlock_all()".to_owned(),
        "select pg_try_advisory_lock('outbox.events'::regclass::bigint); select pg_advisory_unlock_all()".to_owned(),
        "select outbox.attach_table('theirs.own'); select outbox.detach_table('theirs.own')".to_owned(),
        "select outbox.publish_event('t', 's', backend => 'nope')".to_owned(),
        "analyze outbox.events; vacuum outbox.events".to_owned(),
        // Refused with a WARNING, and yet written to the catalog.
        "grant insert (event_type) on outbox.events to publisher; grant execute on function outbox.publish_events(jsonb) to publisher".to_owned(),
        "begin; truncate theirs.own; create temp table x on commit drop as select 1; commit".to_owned(),
    ];
    for table in [
        "events",
        "backends",
        "cursors",
        "scheduled_events",
        "refused_events",
        "routes",
    ] {
        for mode in [
            "access share",
            "row exclusive",
            "share update exclusive",
            "access exclusive",
        ] {
            statements.push(format!(
                "begin; lock table outbox.{table} in {mode} mode; select pg_sleep(0.2); commit"
            ));
        }
    }
    let of_publisher: Vec<(&str, &str)> = statements.iter().map(|sql| ("publisher", sql.as_str())).collect();
    let (loops, locks) = of_publisher.split_at(11);
    beside(&stack, 4, loops);
    let bystander = Bystander::start(&stack);
    for (role, lock) in locks {
        let [done, _] = repeat(&stack, 1, role, lock, Duration::from_millis(50));
        assert_eq!(done, 0, "{lock}");
    }
    bystander.stop(&stack).assert_undisturbed("locks");
}

/// An event for each of many backends, again and again.
#[test]
fn events_that_routes_send_to_hundreds_of_backends_hold_up_nobody() {
    const BACKENDS: usize = 400;
    let stack = stack(&[("outbox_relay.redis_max_len", "1000")]);
    // The bystander's comes first.
    Bystander::start(&stack).stop(&stack);
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, stream_name)
            select 'many' || n, '127.0.0.1', {}, 'many' || n from generate_series(1, {BACKENDS}) n;
         insert into outbox.routes (event_type, backend) select 'fan', 'many' || n from generate_series(1, {BACKENDS}) n",
        stack.redis.port()
    ));
    let worker = stack.pg.wait_worker("postgres");
    let mut client = stack.pg.client_as("publisher", "postgres");
    let publish = "select outbox.publish_event('fan', 's')";
    client.batch_execute(publish).expect("published");
    let count = || -> i64 {
        stack
            .pg
            .one("select count(*) from outbox.backend_status where published_total > 0")
    };
    kit::eventually("all to have sent one", Duration::from_secs(120), || {
        (count() >= BACKENDS as i64).then_some(())
    });
    let bystander = Bystander::start(&stack);
    for _ in 0..20 {
        client.batch_execute(publish).expect("published");
    }
    kit::eventually("the last to arrive", Duration::from_secs(120), || {
        let missing = (1..=BACKENDS).any(|n| stack.redis.xlen(&format!("many{n}")) < 21);
        (!missing).then_some(())
    });
    // Twenty events become thousands of transactions of Redis within a second.
    bystander.stop(&stack).assert_undisturbed("hundreds of backends");
    assert_eq!(stack.pg.wait_worker("postgres"), worker);
}

#[test]
fn a_transaction_with_very_large_payloads_holds_up_nobody() {
    let stack = stack(&[("outbox_relay.redis_max_len", "20")]);
    let mut client = stack.pg.client_as("publisher", "postgres");
    let bystander = Bystander::start(&stack);
    client
        .batch_execute(
            "select outbox.publish_event('t', 's', to_jsonb(repeat('x', 1000000))) from generate_series(1, 120)",
        )
        .expect("published");
    let fields = "select jsonb_object_agg('k' || n, n) from generate_series(1, 40000) n";
    client
        .batch_execute(&format!(
            "select outbox.publish_event('t', 's', publisher_config => ({fields})) from generate_series(1, 20)"
        ))
        .expect("published");
    kit::eventually("all to be sent", Duration::from_secs(60), || {
        let sql = "select published_total from outbox.backend_status where backend = 'default'";
        (stack.pg.one::<i64>(sql) >= 140).then_some(())
    });
    let noticed = bystander.stop(&stack);
    noticed.assert_undisturbed("large payloads");
    let grown = noticed.grown_kb();
    assert!(grown < 64 * 1024, "the worker's memory has grown by {grown} KiB");
}
