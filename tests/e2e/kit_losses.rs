//! The kit can make a Redis lose entries that it acknowledged.

use kit::{Redis, tell, xlen};

fn add(redis: &Redis, count: usize) {
    let mut conn = redis.conn();
    for _ in 0..count {
        tell(&mut conn, &["XADD", "s", "*", "field", "value"]);
    }
}

#[test]
fn a_persistent_redis_survives_sigkill_and_loses_the_end_of_its_file() {
    let mut redis = Redis::persistent("always");
    add(&redis, 100);
    redis.kill9();
    redis.start_again();
    assert_eq!(redis.xlen("s"), 100);
    let cut = redis.crash_losing(1_000);
    assert!((1_000..1_200).contains(&cut), "{cut} bytes were cut");
    let left = redis.xlen("s");
    assert!((60..95).contains(&left), "{left} are left");
    // It goes on from there, and transactions are lost completely.
    let mut conn = redis.conn();
    let mut batch = redis::pipe();
    batch.atomic();
    for _ in 0..10 {
        batch.cmd("XADD").arg(&["s", "*", "field", "value"]).ignore();
    }
    batch.exec(&mut conn).expect("a transaction");
    redis.crash_losing(1);
    assert_eq!(redis.xlen("s"), left);
    // None of the lost entries come back.
    add(&redis, 1);
    redis.kill9();
    redis.start_again();
    assert_eq!(redis.xlen("s"), left + 1);
    redis.crash_losing(1 << 30);
    assert_eq!(redis.xlen("s"), 0);
}

#[test]
fn a_redis_goes_back_to_what_it_had_saved() {
    let mut redis = Redis::start();
    add(&redis, 3);
    let saved = redis.saved();
    add(&redis, 5);
    redis.crash_back_to(&saved);
    assert_eq!(redis.xlen("s"), 3);
    redis.crash_losing_everything();
    assert_eq!(redis.xlen("s"), 0);
    redis.crash_back_to(&saved);
    assert_eq!(redis.xlen("s"), 3);
}

#[test]
fn a_replica_falls_behind_and_takes_over() {
    let primary = Redis::start();
    add(&primary, 3);
    let replica = Redis::replica_of(&primary);
    add(&primary, 1);
    replica.wait_caught_up(&primary);
    assert_eq!(replica.xlen("s"), 4);
    replica.lag();
    add(&primary, 5);
    assert_eq!((primary.xlen("s"), replica.xlen("s")), (9, 4));
    // Connections stay open, and find the server read-only.
    let mut open = primary.conn();
    replica.take_over_from(&primary);
    assert_eq!((xlen(&mut open, "s"), replica.xlen("s")), (4, 4));
    let refused = redis::cmd("XADD")
        .arg(&["s", "*", "f", "v"])
        .exec(&mut open)
        .expect_err("a replica");
    assert_eq!(refused.code(), Some("READONLY"));
    add(&replica, 1);
    primary.wait_caught_up(&replica);
    assert_eq!(primary.xlen("s"), 5);
}
