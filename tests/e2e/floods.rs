//! Floods by one publisher, who may only publish: their cost for all others.

use std::time::{Duration, Instant};

use kit::process::cpu_time;
use kit::{Stack, median_beside, wait_until};

const DEFAULT_USER: &str = "relay";

/// A role that may only publish.
fn publisher(stack: &Stack) -> postgres::Client {
    stack
        .pg
        .exec("create role somebody login; select outbox.grant_publisher('somebody')");
    stack.pg.client_as("somebody", "postgres")
}

/// Redis lets the relay write only to the stream `events` of the backend `default`.
fn allow_one_stream(stack: &Stack) {
    let keys = ["~events", "~outbox_relay:*", "+@all"];
    let user = ["ACL", "SETUSER", DEFAULT_USER, "on", ">secret"];
    stack.redis.call(&[&user[..], &keys[..]].concat());
    stack.pg.exec(&format!(
        "update outbox.backends set username = '{DEFAULT_USER}' where name = 'default';
         select outbox.set_backend_password('default', 'secret')"
    ));
    stack.publish("before");
    stack.wait_events(1);
}

fn waiting(stack: &Stack) -> i64 {
    stack
        .pg
        .one("select count(*) from outbox.refused_events where accepted_in is null")
}

/// The share of a processor that the worker uses within this time.
fn busy(stack: &Stack, time: Duration) -> f64 {
    let worker = stack.pg.wait_worker("postgres");
    let (before, start) = (cpu_time(worker), Instant::now());
    std::thread::sleep(time);
    (cpu_time(worker) - before).as_secs_f64() / start.elapsed().as_secs_f64()
}

/// The median latency of another backend's events, first alone and then while a publisher does `attack`.
fn beside(stack: &Stack, what: &str, attack: impl FnOnce(&mut postgres::Client)) -> [Duration; 2] {
    let mut client = publisher(stack);
    [
        median_beside(stack, "nobody", || std::thread::sleep(Duration::from_secs(1))),
        median_beside(stack, what, || attack(&mut client)),
    ]
}

/// Most events of others must not wait for a large task of the worker.
#[track_caller]
fn assert_most_meet_nothing([alone, with]: [Duration; 2]) {
    let most = alone * 2 + Duration::from_millis(6);
    assert!(with <= most, "median {with:?}, alone {alone:?}");
}

/// Each of many streams is refused, with the maximum number of attempts.
#[test]
fn refused_streams_by_the_thousand_cost_others_little() {
    const STREAMS: i64 = 20_000;
    let stack = Stack::start();
    allow_one_stream(&stack);
    beside(&stack, "refused streams", |client| {
        client
            .batch_execute(&format!(
                "select outbox.publish_event('flood', 'kit', stream => 'refused' || n, max_retries => 1000) from generate_series(1, {STREAMS}) n"
            ))
            .expect("published");
        let start = Instant::now();
        wait_until("all to be refused", || waiting(&stack) == STREAMS);
        println!("all refused after {:?}", start.elapsed());
        let attempts = || -> i64 { stack.pg.one("select sum(attempts)::bigint from outbox.refused_events") };
        let before = attempts();
        let share = busy(&stack, Duration::from_secs(4));
        println!(
            "worker takes {share:.2} of a processor, {} attempts a second",
            (attempts() - before) / 4
        );
        assert!(share < 0.5, "the worker takes {share:.2} of a processor");
        // Another publisher's stream that is refused for a moment does not wait for all of them.
        stack.redis.call(&["SET", "events", "a string"]);
        stack.publish("after");
        wait_until("it to be refused", || waiting(&stack) == STREAMS + 1);
        stack.redis.call(&["DEL", "events"]);
        let mended = Instant::now();
        stack.wait_events(1);
        println!("mended after {:?}", mended.elapsed());
    });
}

#[test]
fn many_scheduled_events_that_are_due_at_one_moment_delay_no_other_backend() {
    const COUNT: usize = 50_000;
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "0")]);
    let medians = beside(&stack, "events due at one moment", |client| {
        client
            .batch_execute(&format!(
                "select outbox.publish_event('flood', 'kit', scheduled_at => date_trunc('second', now()) + interval '4 s')
                 from generate_series(1, {COUNT})"
            ))
            .expect("scheduled");
        let start = Instant::now();
        kit::eventually("all to arrive", Duration::from_secs(60), || {
            (stack.redis.xlen("events") == COUNT).then_some(())
        });
        println!("arrived after {:?}", start.elapsed());
    });
    assert_most_meet_nothing(medians);
}

#[test]
fn many_events_that_fail_with_the_first_of_their_stream_delay_no_other_backend() {
    const COUNT: i64 = 30_000;
    let stack = Stack::start();
    stack.redis.call(&["SET", "refused", "a string"]);
    let medians = beside(&stack, "events that fail", |client| {
        client
            .batch_execute(&format!(
                "select outbox.publish_event('flood', 'kit', stream => 'refused', max_retries => 1) from generate_series(1, {COUNT})"
            ))
            .expect("published");
        kit::eventually("all to fail", Duration::from_secs(60), || {
            (stack.pg.one::<i64>("select count(*) from outbox.failed_events") == COUNT).then_some(())
        });
    });
    assert_most_meet_nothing(medians);
}

/// A backend is deleted while a transaction is open that has published for it.
#[test]
fn many_events_of_a_deleted_backend_delay_no_other_backend() {
    const COUNT: i64 = 50_000;
    let stack = Stack::start();
    stack.pg.exec(
        "insert into outbox.backends (name, host, port, stream_name)
         select 'gone', host, port, 'gone' from outbox.backends where name = 'default'",
    );
    let medians = beside(&stack, "events of a deleted backend", |client| {
        let mut late = client.transaction().expect("a transaction");
        late.batch_execute(&format!(
            "select outbox.publish_event('flood', 'kit', backend => 'gone') from generate_series(1, {COUNT})"
        ))
        .expect("published");
        stack.pg.exec("delete from outbox.backends where name = 'gone'");
        late.commit().expect("committed");
        kit::eventually("all to fail", Duration::from_secs(60), || {
            (stack.pg.one::<i64>("select count(*) from outbox.failed_events") == COUNT).then_some(())
        });
    });
    assert_most_meet_nothing(medians);
}

/// As `pg_restore --disable-triggers` does. The worker examines all rows and publishes them anew.
#[test]
fn many_rows_that_are_restored_without_triggers_delay_no_other_backend() {
    const COUNT: usize = 50_000;
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "0")]);
    let medians = beside(&stack, "rows restored without triggers", |_| {
        stack.pg.exec(&format!(
            "begin; alter table outbox.events disable trigger complete_event;
             insert into outbox.events (seq, xid, created_at, event_id, backend_number, event_type, source, backend)
                 select nextval('outbox.events_seq_seq'), '5', now(), gen_random_uuid(), 1, 'restored', 'kit', 'default'
                 from generate_series(1, {COUNT});
             alter table outbox.events enable always trigger complete_event; commit"
        ));
        kit::eventually("all to arrive", Duration::from_secs(60), || {
            (stack.redis.xlen("events") == COUNT).then_some(())
        });
    });
    assert_most_meet_nothing(medians);
}

#[test]
fn many_healthy_streams_delay_no_other_backend() {
    const COUNT: i64 = 50_000;
    let stack = Stack::start();
    beside(&stack, "many streams", |client| {
        client
            .batch_execute(&format!(
                "select outbox.publish_event('flood', 'kit', stream => 'stream' || n) from generate_series(1, {COUNT}) n"
            ))
            .expect("published");
        wait_until("the last to arrive", || {
            stack.redis.xlen(&format!("stream{COUNT}")) == 1
        });
    });
}

#[test]
fn large_events_in_a_loop_delay_no_other_backend() {
    let stack = Stack::start();
    stack.pg.exec("update outbox.backends set max_len = 20");
    beside(&stack, "large events", |client| {
        for _ in 0..150 {
            client
                .batch_execute("select outbox.publish_event('flood', 'kit', to_jsonb(repeat('x', 1000000)))")
                .expect("published");
        }
    });
}

#[test]
fn a_long_transaction_with_many_events_and_savepoints_delays_no_other_backend() {
    let stack = Stack::start();
    stack.pg.exec("update outbox.backends set max_len = 1000");
    beside(&stack, "a long transaction", |client| {
        client.batch_execute("begin").expect("begun");
        for _ in 0..10 {
            client
                .batch_execute("select outbox.publish_event('flood', 'kit') from generate_series(1, 10000)")
                .expect("published");
        }
        client
            .batch_execute(
                "do $$ begin for i in 1..10000 loop
                    begin
                        perform outbox.publish_event('flood', 'kit');
                        if i % 2 = 0 then raise division_by_zero; end if;
                    exception when division_by_zero then null;
                    end;
                end loop; end $$",
            )
            .expect("published");
        client.batch_execute("commit").expect("committed");
    });
    kit::wait_drained(&stack.pg, "default");
    assert_eq!(
        stack
            .pg
            .one::<i64>("select published_total from outbox.backend_status where backend = 'default'"),
        105_000
    );
}

#[test]
fn pending_events_of_a_paused_backend_cost_nothing() {
    const COUNT: i64 = 200_000;
    let stack = Stack::start();
    stack
        .pg
        .exec("update outbox.backends set enabled = false where name = 'default'");
    beside(&stack, "events of a paused backend", |client| {
        for _ in 0..10 {
            client
                .batch_execute(&format!(
                    "select outbox.publish_event('flood', 'kit') from generate_series(1, {})",
                    COUNT / 10
                ))
                .expect("published");
        }
        std::thread::sleep(Duration::from_secs(2));
    });
    let share = busy(&stack, Duration::from_secs(3));
    println!("worker takes {share:.3} of a processor");
    assert!(share < 0.1, "the worker takes {share:.2} of a processor");
}
