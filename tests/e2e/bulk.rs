//! One transaction of a million events, and one backlog of them: streamed, not gathered.

use std::collections::HashMap;
use std::time::Duration;

use kit::{Redis, Stack, eventually};
use redis::cmd;

const EVENTS: usize = 1_000_000;

/// The private memory of a process in kB (its share of Postgres's buffers is not its own).
fn private_kb(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let values: HashMap<&str, u64> = status
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name, value.trim().strip_suffix(" kB")?.parse().ok()?))
        })
        .collect();
    values["RssAnon"]
}

/// Reads a stream in pieces and checks that its sources count from 1.
#[track_caller]
fn assert_in_order(redis: &Redis, stream: &str, count: usize) {
    let mut conn = redis.conn();
    let mut from = "-".to_string();
    let mut next = 1;
    loop {
        let piece: Vec<(String, Vec<String>)> = cmd("XRANGE")
            .arg(stream)
            .arg(&from)
            .arg("+")
            .arg("COUNT")
            .arg(10_000)
            .query(&mut conn)
            .unwrap();
        let Some((last, _)) = piece.last() else { break };
        from = format!("({last}");
        for (id, fields) in &piece {
            let at = fields.iter().position(|field| field == "source").unwrap();
            assert_eq!(fields[at + 1], next.to_string(), "entry {id}");
            next += 1;
        }
    }
    assert_eq!(next - 1, count);
}

#[test]
fn a_million_events_of_one_insert_arrive_in_order_in_bounded_memory() {
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "0"), ("max_wal_size", "4GB")]);
    stack.publish("warm-up");
    stack.wait_events(1);
    stack.redis.call(&["DEL", "events"]);
    let worker = stack.pg.wait_worker("postgres");
    let before = private_kb(worker);
    stack.pg.exec(&format!(
        "insert into outbox.events (event_type, source, data) \
         select 'bulk', i::text, '{{\"n\": 1}}' from generate_series(1, {EVENTS}) i"
    ));
    let mut most = 0;
    let mut conn = stack.redis.conn();
    eventually("a million entries", Duration::from_secs(120), || {
        most = most.max(private_kb(worker));
        (kit::xlen(&mut conn, "events") >= EVENTS).then_some(())
    });
    assert_eq!(stack.pg.worker_pid("postgres"), Some(worker));
    assert_in_order(&stack.redis, "events", EVENTS);
    let grown_kb = most.saturating_sub(before);
    assert!(
        grown_kb < 48 * 1_024,
        "the worker grew by {grown_kb} kB, from {before} kB"
    );
}
