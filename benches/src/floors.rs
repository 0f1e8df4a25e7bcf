//! The limits that the parts set: Redis adding the same entries for `redis-benchmark -c 1 -P 500`, and Postgres
//! returning the same rows by COPY.

use kit::{Redis, Stack};
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Entries a second that Redis adds, with the fields of an entry of the relay.
pub(crate) fn redis_rate(redis: &Redis, entry: &[String], events: u64) -> f64 {
    redis.call(&["FLUSHALL"]);
    let (port, count) = (redis.port().to_string(), events.to_string());
    let start = Instant::now();
    let status = Command::new("redis-benchmark")
        .args([
            "-h",
            "127.0.0.1",
            "-p",
            &port,
            "-c",
            "1",
            "-P",
            "500",
            "-n",
            &count,
            "-q",
        ])
        .args(["XADD", "floor", "MAXLEN", "~", "10000", "*"])
        .args(entry)
        .stdout(Stdio::null())
        .status()
        .expect("redis-benchmark");
    assert!(status.success(), "redis-benchmark failed");
    events as f64 / start.elapsed().as_secs_f64()
}

/// Rows a second that Postgres returns.
pub(crate) fn copy_rate(stack: &Stack, events: u64) -> f64 {
    let mut client = stack.pg.client();
    let start = Instant::now();
    let mut rows = client
        .copy_out("copy outbox.events to stdout")
        .expect("cannot copy the rows");
    let mut buffer = vec![0; 64 * 1024];
    while rows.read(&mut buffer).expect("cannot read the rows") > 0 {}
    events as f64 / start.elapsed().as_secs_f64()
}
