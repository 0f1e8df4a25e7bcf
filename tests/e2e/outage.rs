//! Outages of a real Redis: during one, events wait, however long it lasts and whatever their max_retries, and then
//! they arrive.

use std::path::Path;
use std::time::{Duration, Instant};

use kit::{
    Postgres, QUICK, Redis, Stack, eventually, first_ids, ids, publish_many, standing, tell, types, wait_drained,
    wait_trouble, wait_until,
};

fn quick() -> Stack {
    Stack::of(Postgres::with(QUICK), Redis::start())
}

/// Nothing has failed, nothing is being retried, and nothing is pending.
#[track_caller]
fn assert_nothing_failed(pg: &Postgres, backend: &str) {
    wait_drained(pg, backend);
    assert_eq!(standing(pg, backend).failed, 0);
    let kept: i64 =
        pg.one("select (select count(*) from outbox.failed_events) + (select count(*) from outbox.refused_events)");
    assert_eq!(kept, 0, "events failed in an outage, or are still being tried again");
}

#[test]
fn events_published_before_redis_started_arrive_in_order() {
    let mut stack = quick();
    stack.redis.shutdown();
    let mut client = stack.pg.client();
    let mut expected = Vec::new();
    // max_retries = 1, and far more attempts to connect: an outage does not count as an attempt.
    stack.pg.exec("select outbox.publish_event('first', 'kit', max_retries => 1, event_id => '00000000-0000-7000-8000-000000000001')");
    expected.push("00000000-0000-7000-8000-000000000001".parse().unwrap());
    for n in 0..20 {
        expected.extend(publish_many(&mut client, "default", "", &format!("{n}."), 25));
    }
    let down = wait_trouble(&stack.pg, "default", "backoff", "refused");
    assert!(down.will_try_again);
    let tried = stack
        .pg
        .one::<chrono::DateTime<chrono::Utc>>("select next_attempt_at from outbox.backend_status");
    wait_until("several attempts", || {
        let next: Option<chrono::DateTime<chrono::Utc>> =
            stack.pg.one("select next_attempt_at from outbox.backend_status");
        next.is_some_and(|next| next > tried + chrono::Duration::milliseconds(1_000))
    });
    assert_eq!(standing(&stack.pg, "default").pending, 501);

    stack.redis.start_again();
    assert_eq!(ids(&stack.wait_events(501)), expected);
    assert_nothing_failed(&stack.pg, "default");
    let up = standing(&stack.pg, "default");
    assert_eq!(
        (up.state.as_str(), up.published, up.will_try_again),
        ("idle", 501, false)
    );
}

/// Longer than socket_timeout, so that the relay gives up the connection, whose bytes the frozen server still has.
#[test]
fn a_hanging_redis_loses_nothing_and_delays_no_other() {
    let stack = Stack::of(
        // The next attempt is late enough to be distinguished.
        Postgres::with(QUICK).with(&[
            ("outbox_relay.retry_delay", "1s"),
            ("outbox_relay.retry_max_delay", "1s"),
        ]),
        Redis::start(),
    );
    let other = Redis::start();
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port) values ('other', '127.0.0.1', {})",
        other.port()
    ));
    let mut client = stack.pg.client();
    let mut expected = publish_many(&mut client, "default", "", "before", 10);
    stack.wait_events(10);

    stack.redis.sigstop();
    expected.extend(publish_many(&mut client, "default", "", "meanwhile", 1_000));
    wait_trouble(&stack.pg, "default", "backoff", "timed out");
    wait_until("an attempt to be announced", || {
        standing(&stack.pg, "default").will_try_again
    });
    let next_s: f64 = stack.pg.one(
        "select extract(epoch from next_attempt_at - last_error_at)::float8 from outbox.backend_status \
         where backend = 'default'",
    );
    assert!(
        (0.0..5.0).contains(&next_s),
        "the next attempt is {next_s} s after the error"
    );
    for n in 1..=20 {
        let start = Instant::now();
        publish_many(&mut client, "other", "", &format!("{n}."), 1);
        let there = other.wait_entries("events", n);
        assert!(
            start.elapsed() < Duration::from_secs(1),
            "delayed by {:?}",
            start.elapsed()
        );
        assert_eq!(there.len(), n);
    }

    stack.redis.sigcont();
    expected.extend(publish_many(&mut client, "default", "", "after", 10));
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), expected);
    assert_nothing_failed(&stack.pg, "default");
}

/// Redis refuses XADD in the middle of a batch because its memory is full. Nothing is sent twice.
#[test]
fn out_of_memory_fails_nothing_and_repeats_nothing() {
    let stack = quick();
    stack.pg.exec("update outbox.backends set max_len = 0");
    let publish = |count: i32| {
        stack.pg.client().execute(
            "select outbox.publish_event('t', 'kit', jsonb_build_object('text', repeat('x', 4000)), max_retries => 1) \
             from generate_series(1, $1)", &[&count]).expect("publishing does not depend on Redis");
    };
    publish(200);
    stack.wait_events(200);
    let used: usize = {
        let info: String = redis::cmd("INFO")
            .arg("memory")
            .query(&mut stack.redis.conn())
            .expect("INFO");
        let line = info.lines().find_map(|line| line.strip_prefix("used_memory:"));
        line.and_then(|n| n.trim().parse().ok())
            .expect("used_memory is a number")
    };
    stack.redis.call(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]);
    stack
        .redis
        .call(&["CONFIG", "SET", "maxmemory", &(used + 1_500_000).to_string()]);
    publish(1_000);
    publish(500);
    wait_trouble(&stack.pg, "default", "backoff", "OOM");
    let reached = stack.redis.xlen("events");
    assert!(
        (201..1_200).contains(&reached),
        "memory was to end in mid-stream, after {reached} entries"
    );
    stack.pg.wait_log("Raise Redis's maxmemory");

    stack.redis.call(&["CONFIG", "SET", "maxmemory", "0"]);
    wait_drained(&stack.pg, "default");
    let arrived = stack.wait_events(1_700);
    assert_eq!((arrived.len(), first_ids(&arrived).len()), (1_700, 1_700));
    assert_nothing_failed(&stack.pg, "default");
}

#[test]
fn a_redis_that_became_a_replica_fails_nothing() {
    let stack = quick();
    let mut client = stack.pg.client();
    let mut expected = publish_many(&mut client, "default", "", "before", 3);
    stack.wait_events(3);
    stack.redis.call(&["REPLICAOF", "127.0.0.1", "1"]);
    expected.extend(publish_many(&mut client, "default", "", "meanwhile", 300));
    wait_trouble(&stack.pg, "default", "backoff", "READONLY");
    stack.pg.wait_log("Point the backend to the primary");
    assert_eq!(stack.redis.xlen("events"), 3);

    stack.redis.call(&["REPLICAOF", "NO", "ONE"]);
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), expected);
    assert_nothing_failed(&stack.pg, "default");
}

/// While Redis loads its data at the start, it accepts connections and answers LOADING.
#[test]
fn a_redis_that_is_loading_fails_nothing() {
    let mut stack = quick();
    // While it loads, it answers after so many bytes; before 7.0 after each 2 MiB.
    let interval = "loading-process-events-interval-bytes";
    let is_settable = format!("{:?}", stack.redis.call(&["CONFIG", "GET", interval])).contains(interval);
    let option = format!("--{interval}");
    let mut args = vec![
        "--dbfilename",
        "dump.rdb",
        "--rdbcompression",
        "no",
        "--key-load-delay",
        "1000",
    ];
    if is_settable {
        args.extend([option.as_str(), "1024"]);
    }
    let mut slow = Redis::with(&args);
    stack.point("default", &slow);
    let mut fill = redis::pipe();
    for n in 0..1_500 {
        fill.cmd("SET").arg(n).arg("x".repeat(5_000)).ignore();
    }
    fill.exec(&mut slow.conn()).expect("filling Redis");
    let mut expected = publish_many(&mut stack.pg.client(), "default", "", "before", 3);
    slow.wait_entries("events", 3);
    slow.call(&["SAVE"]);
    slow.shutdown();
    expected.extend(publish_many(&mut stack.pg.client(), "default", "", "meanwhile", 100));
    wait_trouble(&stack.pg, "default", "backoff", "refused");
    slow.start_again();
    stack.redis = slow;
    assert_eq!(ids(&stack.wait_events(103)), expected);
    // Each says so of itself.
    let log = stack.pg.log();
    let says_so = |name: &str| log.contains(&format!("LOADING {name} is loading the dataset in memory"));
    assert!(says_so("Redis") || says_so("Valkey"), "{log}");
    assert_nothing_failed(&stack.pg, "default");
}

/// Redis writes each command to disk before it answers, and dies while 50,000 events are under way.
#[test]
fn a_redis_killed_in_mid_batch_loses_and_repeats_nothing() {
    let mut stack = Stack::of(
        Postgres::with(QUICK).with(&[("outbox_relay.batch_size", "1000")]),
        Redis::with(&["--appendonly", "yes", "--appendfsync", "always"]),
    );
    // At a pace that leaves time for the kill, also where Redis's files lie in memory.
    stack
        .pg
        .exec("update outbox.backends set max_len = 0, max_rate = 20000");
    let expected = publish_many(&mut stack.pg.client(), "default", "", "t", 50_000);
    stack.redis.wait_entries("events", 100);
    stack.redis.kill9();
    stack.redis.start_again();
    stack.pg.exec("update outbox.backends set max_rate = null");
    let survived = stack.redis.xlen("events");
    assert!(survived < 50_000, "killed too late: {survived} entries");
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), expected);
    assert_nothing_failed(&stack.pg, "default");
}

/// MISCONF: the last snapshot could not be written, here because a directory has the name of its file.
#[test]
fn a_redis_that_cannot_save_fails_nothing() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::with(&["--dbfilename", "taken.rdb"]));
    stack.redis.call(&["CONFIG", "SET", "save", "3600 1"]);
    let directory = stack.redis.socket().with_file_name("taken.rdb");
    let save = |status: &str| {
        stack.redis.call(&["BGSAVE"]);
        eventually(&format!("a snapshot to end with {status}"), kit::LIMIT, || {
            let info: String = redis::cmd("INFO")
                .arg("persistence")
                .query(&mut stack.redis.conn())
                .ok()?;
            (info.contains("rdb_bgsave_in_progress:0") && info.contains(&format!("rdb_last_bgsave_status:{status}")))
                .then_some(())
        });
    };
    std::fs::create_dir_all(Path::new(&directory).join("full")).expect("a directory in the way");
    save("err");
    let expected = publish_many(&mut stack.pg.client(), "default", "", "t", 200);
    wait_trouble(&stack.pg, "default", "backoff", "MISCONF");
    stack.pg.wait_log("Redis cannot save to disk. See its log.");
    assert_eq!(stack.redis.xlen("events"), 0);
    std::fs::remove_dir_all(&directory).expect("out of the way");
    save("ok");
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), expected);
    assert_nothing_failed(&stack.pg, "default");
}

/// BUSY: a script runs for longer than Redis allows.
#[test]
fn a_redis_that_is_busy_with_a_script_fails_nothing() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::with(&["--lua-time-limit", "20"]));
    let expected = std::thread::scope(|scope| {
        let mut conn = stack.redis.conn();
        let script = scope.spawn(move || redis::cmd("EVAL").arg("while true do end").arg(0).exec(&mut conn));
        let mut other = stack.redis.conn();
        wait_until("Redis to be busy", || {
            let pong = redis::cmd("PING").exec(&mut other);
            pong.is_err_and(|error| error.code() == Some("BUSY"))
        });
        let expected = publish_many(&mut stack.pg.client(), "default", "", "t", 100);
        wait_trouble(&stack.pg, "default", "backoff", "BUSY");
        redis::cmd("SCRIPT").arg("KILL").exec(&mut other).expect("SCRIPT KILL");
        assert!(script.join().expect("no panic").is_err());
        expected
    });
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.events()), expected);
    assert_nothing_failed(&stack.pg, "default");
}

#[test]
fn a_redis_without_a_free_connection_fails_nothing() {
    let stack = quick();
    let mut only = stack.redis.conn();
    publish_many(&mut stack.pg.client(), "default", "", "before", 1);
    stack.wait_events(1);
    tell(&mut only, &["CONFIG", "SET", "maxclients", "1"]);
    tell(&mut only, &["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    publish_many(&mut stack.pg.client(), "default", "", "meanwhile", 100);
    wait_trouble(&stack.pg, "default", "backoff", "max number of clients reached");
    tell(&mut only, &["CONFIG", "SET", "maxclients", "100"]);
    wait_drained(&stack.pg, "default");
    let arrived = stack.events();
    assert_eq!((arrived.len(), types(&arrived)[100]), (101, "meanwhile100"));
    assert_nothing_failed(&stack.pg, "default");
}

/// A connection that had worked may have been closed because it was idle: that is no outage, and causes no wait.
#[test]
fn a_connection_that_redis_closed_is_replaced_at_once() {
    let stack = Stack::with(&[
        ("outbox_relay.retry_delay", "1h"),
        ("outbox_relay.retry_max_delay", "1h"),
    ]);
    for n in 0..5 {
        stack.publish("t");
        stack.wait_events(2 * n + 1);
        stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal"]);
        let start = Instant::now();
        stack.publish("t");
        stack.wait_events(2 * n + 2);
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    }
    assert_eq!(stack.events().len(), 10);
    // The log would report an outage like this.
    let trouble = format!("Redis at 127.0.0.1:{}: ", stack.redis.port());
    assert!(
        !stack.pg.log().contains(&trouble),
        "an idle connection's end is no trouble"
    );
}
