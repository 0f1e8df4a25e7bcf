//! Changes without SQL (rows of a publisher and of the worker, numbers of the sequence) lead to the same pages on a
//! standby: Postgres compares each page during replay.

use kit::owners::wait_caught_up;
use kit::{Stack, wait_drained, wait_eq, wait_until};

#[test]
fn a_standby_replays_each_page_as_the_primary_has_it() {
    let stack = Stack::with(&[
        ("wal_consistency_checking", "all"),
        ("outbox_relay.retry_delay", "10ms"),
        ("outbox_relay.published_retention", "-1"),
    ]);
    stack.redis.call(&["SET", "wrong", "no stream"]);
    let standby = stack.pg.standby().start();
    let mut client = stack.pg.client();
    let mut run = |sql: &str| client.batch_execute(sql).expect(sql);
    run(
        "select outbox.publish_event('by the function ' || i, 's', jsonb_build_object('text', repeat('x', i))) from generate_series(1, 500) i",
    );
    run("select outbox.publish_events('[{\"event_type\": \"by an array\", \"source\": \"s\"}]')");
    run("insert into outbox.events (event_type, source) select 'plain', 's' from generate_series(1, 100)");
    // One row with a TOASTed value, and one that is rolled back.
    run("select outbox.publish_event('large', 's', (select jsonb_agg(md5(i::text)) from generate_series(1, 3000) i))");
    run(
        "begin; savepoint s; select outbox.publish_event('never', 's'); rollback to s; select outbox.publish_event('after', 's'); commit",
    );
    run("select outbox.publish_event('soon', 's', scheduled_at => now() + interval '50 ms')");
    run("select outbox.publish_event('refused', 's', stream => 'wrong', max_retries => 1)");
    stack.wait_events(604);
    wait_eq("a failed event", 1i64, || {
        stack.pg.one("select count(*) from outbox.failed_events")
    });
    stack.redis.call(&["DEL", "wrong"]);
    run("select outbox.retry_failed()");
    stack.redis.wait_entries("wrong", 1);
    wait_drained(&stack.pg, "default");
    run("alter system set outbox_relay.published_retention = 0");
    run("select pg_reload_conf()");
    wait_until("the events to be purged", || {
        stack.pg.one::<i64>("select count(*) from outbox.events") < 100
    });
    run("vacuum outbox.events");
    wait_caught_up(&stack.pg, &standby);
    assert!(!standby.log().contains("inconsistent page"), "{}", standby.log());
    // The purge may continue.
    let count = "select count(*) from outbox.events";
    wait_until("the standby to have the same events", || {
        standby.one::<i64>(count) == stack.pg.one::<i64>(count)
    });
}
