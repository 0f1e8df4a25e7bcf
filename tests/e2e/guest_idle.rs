//! An idle worker does nothing: no queries, no WAL, hardly a wake-up.

use std::time::{Duration, Instant};

use kit::{Stack, publish_many, wait_drained, wait_eq, wait_until};

/// Nothing else writes WAL or wakes the worker.
const QUIET: &[(&str, &str)] = &[
    ("autovacuum", "off"),
    ("checkpoint_timeout", "1d"),
    ("wal_level", "minimal"),
    ("max_wal_senders", "0"),
];

/// One event is delivered, and the state is saved.
#[track_caller]
fn idle(settings: &[(&str, &str)]) -> (Stack, i32) {
    let all: Vec<(&str, &str)> = [QUIET, settings].concat();
    let stack = Stack::with(&all);
    publish_many(&mut stack.pg.client(), "default", "", "event", 10);
    stack.wait_events(10);
    wait_drained(&stack.pg, "default");
    let worker = stack.pg.wait_worker("postgres");
    (stack, worker)
}

/// How often the worker's main thread has gone to sleep.
fn sleeps(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the worker lives");
    let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .expect("Linux counts them")
}

/// Processor time of all its threads, in hundredths of a second.
fn computed_ticks(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the worker lives");
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    // utime and stime are fields 14 and 15 of the line; two fields were removed before.
    [11, 12]
        .map(|index: usize| fields[index].parse::<u64>().expect("a number"))
        .iter()
        .sum()
}

fn wait_polls(pid: i32, count: u64) -> Duration {
    let (start, goal) = (Instant::now(), sleeps(pid) + count);
    wait_until("some polls", || sleeps(pid) >= goal);
    start.elapsed()
}

#[test]
fn polling_without_events_writes_no_wal_and_takes_no_transaction_id() {
    let (stack, worker) = idle(&[("outbox_relay.poll_interval", "100ms")]);
    let mut client = stack.pg.client();
    let mut look = || {
        let row = client
            .query_one(
                "select pg_current_wal_insert_lsn()::text, pg_snapshot_xmax(pg_current_snapshot())::text",
                &[],
            )
            .unwrap();
        (row.get::<_, String>(0), row.get::<_, String>(1))
    };
    wait_polls(worker, 3);
    let before = look();
    wait_polls(worker, 12);
    assert_eq!(look(), before);
}

#[test]
fn looking_at_the_status_writes_no_wal_either() {
    let (stack, _) = idle(&[]);
    let mut client = stack.pg.client();
    let position = "select pg_current_wal_insert_lsn()::text";
    let views = "select * from outbox.status; select * from outbox.backend_status; \
                 select * from outbox.event_status where event_id = '00000000-0000-0000-0000-000000000000'";
    client.batch_execute(views).unwrap();
    let before: String = client.query_one(position, &[]).unwrap().get(0);
    for _ in 0..5 {
        client.batch_execute(views).unwrap();
    }
    assert_eq!(client.query_one(position, &[]).unwrap().get::<_, String>(0), before);
}

#[test]
fn an_idle_worker_wakes_only_for_its_polls() {
    let (_stack, worker) = idle(&[("outbox_relay.poll_interval", "200ms")]);
    wait_polls(worker, 3);
    let computed = computed_ticks(worker);
    let took = wait_polls(worker, 10);
    // Ten polls of 200 ms; a wake-up between them would have shortened the time.
    assert!(took > Duration::from_millis(1_500), "ten wake-ups in {took:?}");
    let computed = computed_ticks(worker) - computed;
    assert!(computed <= 10, "ten polls took {computed} hundredths of a second");
}

/// Between two polls the worker sleeps all the time.
#[test]
fn an_idle_worker_with_a_long_poll_interval_does_not_wake() {
    let (stack, worker) = idle(&[("outbox_relay.poll_interval", "1h")]);
    let before = sleeps(worker);
    let start = Instant::now();
    // Other sessions work meanwhile, and publish nothing.
    stack.pg.exec("create table t (n integer)");
    while start.elapsed() < Duration::from_secs(2) {
        stack.pg.exec("insert into t select generate_series(1, 100)");
    }
    let slept = sleeps(worker) - before;
    assert!(slept <= 2, "it woke {slept} times");
}

/// Autovacuum uses the statistics: they must have the worker's changes while it lives.
#[test]
fn writes_of_the_worker_are_in_the_statistics() {
    let stack = Stack::with(&[("autovacuum", "off")]);
    let mut client = stack.pg.client();
    for _ in 0..4 {
        let count = stack.events().len();
        publish_many(&mut client, "default", "", "event", 1);
        stack.wait_events(count + 1);
        wait_drained(&stack.pg, "default");
    }
    wait_eq("rows of cursors written", true, || {
        stack.pg.one(
            "select n_tup_ins + n_tup_upd >= 2 from pg_stat_user_tables \
             where schemaname = 'outbox' and relname = 'cursors'",
        )
    });
}
