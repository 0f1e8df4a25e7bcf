//! Large works of the worker while somebody keeps an old snapshot. Rows that have gone cannot be removed from the
//! indexes then. A piece of the work must not pass those of all pieces before it: that would take the longer the more
//! there are, and everybody's events would wait for it.

use std::time::Duration;

use kit::{Bystander, Stack, eventually};

const COUNT: i64 = 30_000;

/// Entries of an index that scans have returned, dead ones too.
fn entries_read(stack: &Stack, index: &str) -> i64 {
    stack.pg.one(&format!(
        "select coalesce(sum(idx_tup_read), 0)::bigint from pg_stat_user_indexes where indexrelname = '{index}'"
    ))
}

/// Does a work until nothing is left of it, beside a publisher's snapshot that is older. Each entry of the index is
/// read a few times.
#[track_caller]
fn assert_each_is_passed_a_few_times(stack: &Stack, index: &str, work: &str, left: &str) {
    stack
        .pg
        .exec("create role somebody login; select outbox.grant_publisher('somebody')");
    let bystander = Bystander::start(stack);
    let mut holder = stack.pg.client_as("somebody", "postgres");
    holder
        .batch_execute("begin isolation level repeatable read; select outbox.published_here()")
        .expect("a snapshot");
    let before = entries_read(stack, index);
    for statement in work.split(';') {
        stack.pg.exec(statement);
    }
    eventually(left, Duration::from_secs(100), || {
        (stack.pg.one::<i64>(left) == 0).then_some(())
    });
    bystander.stop(stack).assert_undisturbed(work);
    // Statistics are reported with a delay.
    std::thread::sleep(Duration::from_millis(1_500));
    let each = (entries_read(stack, index) - before) as f64 / COUNT as f64;
    println!("{index}: each entry was passed {each:.1} times");
    // Scheduled events are all looked at now and then, for a hundredth of the time.
    let most = if index.starts_with("scheduled") { 60.0 } else { 12.0 };
    assert!(each < most, "each entry of {index} was passed {each:.1} times");
    holder.batch_execute("commit").expect("an end");
}

/// That looks at no index of them.
fn left_to_send() -> String {
    format!("select {COUNT} - published_total from outbox.backend_status where backend = 'default'")
}

fn fail_many(stack: &Stack) {
    stack.pg.exec(&format!(
        "insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend, attempts, last_error)
         select -g, '3', now(), gen_random_uuid(), 1, 't', 's', 'default', 1, 'e' from generate_series(1, {COUNT}) g"
    ));
}

#[test]
fn scheduled_events_are_moved_in_time_that_does_not_grow() {
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "1000")]);
    stack.pg.exec(&format!(
        "select outbox.publish_event('t', 's', scheduled_at => now() + interval '1 hour') from generate_series(1, {COUNT})"
    ));
    assert_each_is_passed_a_few_times(
        &stack,
        "scheduled_events_due_idx",
        "update outbox.scheduled_events set scheduled_at = now() - interval '1 s' + seq * interval '1 us'; select outbox.wake()",
        &left_to_send(),
    );
}

#[test]
fn events_that_fail_with_the_first_of_their_stream_do_so_in_time_that_does_not_grow() {
    let stack = Stack::start();
    stack.redis.call(&["SET", "refused", "a string"]);
    let publish = format!(
        "select outbox.publish_event('t', 's', stream => 'refused', max_retries => 2) from generate_series(1, {COUNT})"
    );
    let left = format!("select {COUNT} - count(*) from outbox.failed_events");
    assert_each_is_passed_a_few_times(&stack, "refused_events_stream_idx", &publish, &left);
}

#[test]
fn events_that_follow_one_that_was_mended_do_so_in_time_that_does_not_grow() {
    let stack = Stack::with(&[
        ("outbox_relay.redis_max_len", "1000"),
        ("outbox_relay.retry_backoff", "off"),
    ]);
    stack.redis.call(&["SET", "refused", "a string"]);
    stack.pg.exec(&format!(
        "select outbox.publish_event('t', 's', stream => 'refused', max_retries => 1000) from generate_series(1, {COUNT})"
    ));
    let waiting = "select count(*) from outbox.refused_events where accepted_in is null";
    eventually("all to wait", Duration::from_secs(60), || {
        (stack.pg.one::<i64>(waiting) == COUNT).then_some(())
    });
    // Mended a moment after the snapshot is taken.
    let (redis, work) = (&stack.redis, "select pg_sleep(0.5)");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            eventually("the snapshot", Duration::from_secs(20), || {
                let held =
                    "select count(*) from pg_stat_activity where usename = 'somebody' and backend_xmin is not null";
                (stack.pg.one::<i64>(held) == 1).then_some(())
            });
            redis.call(&["DEL", "refused"]);
        });
        assert_each_is_passed_a_few_times(&stack, "refused_events_stream_idx", work, &left_to_send());
    });
}

#[test]
fn failed_events_are_purged_in_time_that_does_not_grow() {
    let stack = Stack::start();
    fail_many(&stack);
    assert_each_is_passed_a_few_times(
        &stack,
        "failed_events_failed_at_idx",
        "alter system set outbox_relay.failed_retention = 0; select pg_reload_conf()",
        "select count(*) from (select from outbox.failed_events limit 1) f",
    );
}

#[test]
fn the_inbox_is_purged_in_time_that_does_not_grow() {
    let stack = Stack::start();
    stack.pg.exec(&format!(
        "select outbox.consume_once('c', gen_random_uuid()) from generate_series(1, {COUNT})"
    ));
    assert_each_is_passed_a_few_times(
        &stack,
        "inbox_consumed_at_idx",
        "alter system set outbox_relay.inbox_retention = 0; select pg_reload_conf()",
        "select count(*) from (select from outbox.inbox limit 1) i",
    );
}

/// Whenever something changes, the worker loads the backends. Failed events are none of that.
#[test]
fn loading_the_backends_reads_no_failed_events() {
    let stack = Stack::start();
    stack.publish("first");
    stack.wait_events(1);
    fail_many(&stack);
    let read = || -> i64 {
        stack.pg.one(
            "select (seq_tup_read + idx_tup_fetch)::bigint from pg_stat_user_tables where relid = 'outbox.failed_events'::regclass",
        )
    };
    std::thread::sleep(Duration::from_millis(1_500));
    let before = read();
    for n in 1..=5 {
        stack.pg.exec("select outbox.wake()");
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port, stream_name) select 'more{n}', host, port, 'more' from outbox.backends where name = 'default'"
        ));
        let publish = format!("select outbox.publish_event('t', 's', backend => 'more{n}')");
        stack.pg.exec(&publish);
        stack.redis.wait_entries("more", n);
    }
    std::thread::sleep(Duration::from_millis(1_500));
    let rows = read() - before;
    println!("{rows} rows were read");
    assert!(rows < COUNT / 10, "{rows} rows were read");
}
