//! More backends than the server has file descriptors and threads for: the worker survives, and serves them all in
//! turn.

use std::time::{Duration, Instant};

use kit::process::{cpu_time, descriptors};
use kit::{BlackHole, Bystander, Postgres, Redis, Stack, eventually, wait_until};

/// How long an event of the backend `default` takes.
fn takes(stack: &Stack) -> Duration {
    let before = stack.redis.xlen("events");
    let start = Instant::now();
    stack.publish("event");
    wait_until("the event", || stack.redis.xlen("events") > before);
    start.elapsed()
}

/// Of three thousand backends, some have a Redis, and most have none.
#[test]
fn thousands_of_backends_neither_end_the_worker_nor_delay_others() {
    let stack = Stack::with(&[("max_files_per_process", "200")]);
    stack.publish("first");
    stack.wait_events(1);
    let worker = stack.pg.wait_worker("postgres");
    let bystander = Bystander::start(&stack);
    let port = stack.redis.port();
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, stream_name)
         select 'backend' || n, '127.0.0.1', case when n % 100 = 0 then {port} else 1 end, 'stream' || n from generate_series(1, 3000) n"
    ));
    let mut longest = Duration::ZERO;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(10) {
        longest = longest.max(takes(&stack));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(stack.pg.wait_worker("postgres"), worker, "the worker has ended");
    println!("longest {longest:?}");
    assert!(longest < Duration::from_secs(5), "{longest:?}");
    bystander.stop(&stack).assert_harmless("3,000 backends");
    stack.pg.wait_log("backends are waiting for their turn to connect");

    let (before, start) = (cpu_time(worker), Instant::now());
    let mut delays: Vec<Duration> = (0..40)
        .map(|_| {
            std::thread::sleep(Duration::from_millis(100));
            takes(&stack)
        })
        .collect();
    let share = (cpu_time(worker) - before).as_secs_f64() / start.elapsed().as_secs_f64();
    delays.sort();
    println!(
        "worker takes {share:.2} of a processor, median {:?}, longest {:?}",
        delays[20], delays[39]
    );

    // The backends at the end of the list have their turn.
    stack.pg.exec(
        "select outbox.publish_event('event', 'kit', backend => 'backend' || n * 100) from generate_series(1, 30) n",
    );
    let arrived = || {
        (1..=30)
            .filter(|n| stack.redis.xlen(&format!("stream{}", n * 100)) > 0)
            .count()
    };
    let start = Instant::now();
    eventually("all to have their turn", Duration::from_secs(120), || {
        (arrived() == 30).then_some(())
    });
    println!("all had their turn after {:?}", start.elapsed());
    assert_eq!(stack.pg.wait_worker("postgres"), worker, "the worker has ended");
}

/// Whoever makes backends whose servers never answer, with the longest timeouts, keeps nobody else's from connecting.
#[test]
fn backends_that_connect_for_ever_leave_turns_to_others() {
    let mut stack = Stack::of(
        Postgres::with(&[("max_files_per_process", "200")]).faults(),
        Redis::start(),
    );
    stack.pg.mutation("short_minutes");
    stack.pg.restart();
    stack.publish("first");
    stack.wait_events(1);
    let (hole, port) = (BlackHole::start(), stack.redis.port());
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, connect_timeout, socket_timeout)
             select 'hole' || n, '127.0.0.1', {}, '1 hour', '1 hour' from generate_series(1, 60) n;
         insert into outbox.backends (name, host, port, stream_name) values ('late', '127.0.0.1', {port}, 'late');
         select outbox.publish_event('event', 'kit', backend => name) from outbox.backends where name <> 'default'",
        hole.port()
    ));
    let start = Instant::now();
    eventually("the last one to have its turn", Duration::from_secs(60), || {
        (stack.redis.xlen("late") == 1).then_some(())
    });
    println!("it had its turn after {:?}", start.elapsed());
}

/// Sets a limit of a process; returns the value of before.
fn limit(pid: i32, what: &str, value: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/limits")).expect("the worker lives");
    let row = if what == "nofile" {
        "Max open files"
    } else {
        "Max processes"
    };
    let line = text.lines().find_map(|line| line.strip_prefix(row)).expect("a limit");
    let before = line.split_whitespace().next().expect("a value").to_owned();
    let ran = kit::env::server_command("prlimit")
        .args([&format!("--pid={pid}"), &format!("--{what}={value}:")])
        .output()
        .expect("prlimit runs");
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    before
}

/// Nothing can be opened, and no thread can be started: existing connections go on, and all others are made once that
/// is possible.
#[test]
fn a_worker_that_can_open_nothing_goes_on_with_what_it_has() {
    let stack = Stack::with(&[
        ("outbox_relay.retry_delay", "200ms"),
        ("outbox_relay.retry_max_delay", "500ms"),
    ]);
    stack.publish("first");
    stack.wait_events(1);
    let worker = stack.pg.wait_worker("postgres");
    for what in ["nofile", "nproc"] {
        let few = if what == "nofile" { descriptors(worker) } else { 1 };
        let before = limit(worker, what, &few.to_string());
        let port = stack.redis.port();
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port, stream_name)
             select '{what}' || n, '127.0.0.1', {port}, '{what}' || n from generate_series(1, 20) n;
             select outbox.publish_event('event', 'kit', backend => '{what}' || n) from generate_series(1, 20) n"
        ));
        let trouble = format!(
            "select count(*) from outbox.backend_status where backend like '{what}%' and last_error is not null"
        );
        wait_until("trouble", || stack.pg.one::<i64>(&trouble) > 0);
        let why: String = stack.pg.one(&format!(
            "select string_agg(distinct last_error, ',') from outbox.backend_status where backend like '{what}%'"
        ));
        println!("{what}: {why}");
        for _ in 0..20 {
            takes(&stack);
        }
        limit(worker, what, &before);
        let arrived = || (1..=20).filter(|n| stack.redis.xlen(&format!("{what}{n}")) > 0).count();
        wait_until("all to come up", || arrived() == 20);
        assert_eq!(stack.pg.wait_worker("postgres"), worker, "the worker has ended");
    }
}
