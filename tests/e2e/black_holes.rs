//! Backends that never answer delay nothing: not the server's shutdown, not DROP DATABASE, not the other backends.
//!
//! `OUTBOX_BLACK_HOLE_ROUNDS=100` sets the rounds of the first two tests, `OUTBOX_HUNG_SECONDS=20` the duration of the
//! third; they print their results.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kit::{BlackHole, Mode, Postgres, Redis, wait_until};

/// Timeouts so long that waiting for one would be noticed.
const STUBBORN: &[(&str, &str)] = &[
    ("outbox_relay.redis_connect_timeout", "1min"),
    ("outbox_relay.redis_socket_timeout", "1min"),
    ("outbox_relay.retry_delay", "50ms"),
    ("outbox_relay.retry_max_delay", "200ms"),
];

/// One second is promised on an otherwise idle machine, so it applies only when the figures are measured.
fn limit() -> Duration {
    let is_measured = std::env::var_os("OUTBOX_BLACK_HOLE_ROUNDS").is_some();
    Duration::from_secs(if is_measured { 1 } else { 3 })
}

fn or<T: FromStr>(variable: &str, default: T) -> T {
    let given = std::env::var(variable).ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Every kind of backend that never answers.
struct Holes {
    /// Accepts connections, and never answers.
    silent: BlackHole,
    /// Never accepts connections.
    closed: BlackHole,
    /// Was frozen while events were on their way.
    frozen: Redis,
}

impl Holes {
    fn start() -> Self {
        Holes {
            silent: BlackHole::start(),
            closed: BlackHole::unreachable(),
            frozen: Redis::start(),
        }
    }

    /// Creates the backends, and waits until each hangs.
    fn occupy(&self, pg: &Postgres, db: &str) {
        self.frozen.sigcont();
        let accepted = self.silent.accepted();
        pg.exec_db(
            db,
            &format!(
                "delete from outbox.backends where name = 'default';
                insert into outbox.backends (name, host, port, max_len) values
                    ('silent', '127.0.0.1', {}, 0), ('closed', '127.0.0.1', {}, 0), ('frozen', '127.0.0.1', {}, 0),
                    -- Of a block that is kept for documents: nobody is there.
                    ('nowhere', '198.51.100.1', 6379, 0)",
                self.silent.port(),
                self.closed.port(),
                self.frozen.port()
            ),
        );
        self.stick(pg, db, accepted);
    }

    /// Waits until the existing backends hang with events.
    fn stick(&self, pg: &Postgres, db: &str, accepted: usize) {
        let publish =
            "select outbox.publish_event('t', 'kit', backend => name) from outbox.backends, generate_series(1, 500)";
        let before = self.frozen.xlen("events");
        pg.exec_db(db, "select outbox.publish_event('t', 'kit', backend => 'frozen')");
        wait_until("a Redis that takes events", || self.frozen.xlen("events") > before);
        self.frozen.sigstop();
        pg.exec_db(db, publish);
        wait_until("a connection", || self.silent.accepted() > accepted);
    }
}

fn report(what: &str, mut took: Vec<Duration>) {
    took.sort();
    let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize];
    println!(
        "{what}: {} times, median {:?}, longest {:?}",
        took.len(),
        at(0.5),
        at(1.0)
    );
}

#[test]
fn a_fast_stop_is_done_within_a_second() {
    let mut pg = Postgres::with(STUBBORN).start();
    pg.extension();
    let holes = Holes::start();
    holes.occupy(&pg, "postgres");
    let rounds = or("OUTBOX_BLACK_HOLE_ROUNDS", 3);
    let mut took = Vec::new();
    for round in 1..=rounds {
        let start = Instant::now();
        let stopped = pg.try_stop(Mode::Fast, limit());
        took.push(start.elapsed());
        assert!(
            stopped.is_some_and(|status| status.success()),
            "round {round} took more than {:?}",
            limit()
        );
        if round < rounds {
            holes.frozen.sigcont();
            let accepted = holes.silent.accepted();
            pg.start_again();
            holes.stick(&pg, "postgres", accepted);
        }
    }
    report("a fast stop", took);
    holes.frozen.sigcont();
}

#[test]
fn drop_database_is_done_within_a_second() {
    let pg = Postgres::with(STUBBORN).start();
    let holes = Holes::start();
    let mut admin = pg.client();
    let mut took = Vec::new();
    for round in 1..=or("OUTBOX_BLACK_HOLE_ROUNDS", 3) {
        admin.batch_execute("create database doomed").expect("a database");
        pg.exec_db("doomed", "create extension outbox_relay");
        holes.occupy(&pg, "doomed");
        let start = Instant::now();
        admin.batch_execute("drop database doomed").expect("nobody is in it");
        took.push(start.elapsed());
        assert!(start.elapsed() < limit(), "round {round} took {:?}", start.elapsed());
    }
    report("DROP DATABASE", took);
    holes.frozen.sigcont();
}

/// Commits to four backends in turn, and records how long after sending COMMIT each event arrived.
fn measure(pg: &Postgres, redises: &[Redis], seconds: f64, hung: bool) -> Vec<Duration> {
    let sent: Mutex<HashMap<String, Instant>> = Mutex::new(HashMap::new());
    let arrived: Mutex<Vec<(String, Instant)>> = Mutex::new(Vec::new());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for redis in redises {
            let (arrived, done) = (&arrived, &done);
            let mut conn = redis.conn();
            let mut last: String = redis
                .entries("events")
                .last()
                .map_or("0-0".to_string(), |e| e.id.clone());
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    type Streams = Option<Vec<(String, Vec<(String, HashMap<String, String>)>)>>;
                    let mut command = redis::cmd("XREAD");
                    command.arg("BLOCK").arg(100).arg("STREAMS").arg("events").arg(&last);
                    let found: Streams = command.query(&mut conn).expect("XREAD");
                    let now = Instant::now();
                    for (id, fields) in found.into_iter().flatten().flat_map(|(_, entries)| entries) {
                        arrived
                            .lock()
                            .expect("no panic")
                            .push((fields["event_id"].clone(), now));
                        last = id;
                    }
                }
            });
        }
        let mut client = pg.client();
        let deadline = Instant::now() + Duration::from_secs_f64(seconds);
        let mut turn = 0;
        let pace = Duration::from_millis(4);
        let mut next = Instant::now();
        while Instant::now() < deadline {
            let backend = format!("b{}", turn % redises.len());
            turn += 1;
            let mut transaction = client.transaction().expect("begin");
            let sql = "select outbox.publish_event('t', 'kit', backend => $1)::text";
            let id: String = transaction.query_one(sql, &[&backend]).expect("publish").get(0);
            // The hanging backend gets as many events as each of the others; without it, another backend gets them, so
            // that Postgres has the same work.
            if turn % redises.len() == 0 {
                let other = if hung { "hung" } else { "off" };
                transaction.query_one(sql, &[&other]).expect("publish");
            }
            sent.lock().expect("no panic").insert(id, Instant::now());
            transaction.commit().expect("commit");
            next += pace;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        wait_until("the last events", || arrived.lock().expect("no panic").len() >= turn);
        done.store(true, Ordering::Relaxed);
    });
    let sent = sent.into_inner().expect("no panic");
    let arrived = arrived.into_inner().expect("no panic");
    arrived
        .iter()
        .map(|(id, at)| at.saturating_duration_since(sent[id]))
        .collect()
}

/// Four backends beside one whose Redis hangs, and beside one that is paused: the p99 from COMMIT to arrival is the
/// same.
#[test]
fn a_hung_backend_does_not_slow_the_others() {
    let pg = Postgres::with(&[
        ("outbox_relay.redis_socket_timeout", "1s"),
        ("outbox_relay.redis_connect_timeout", "1s"),
        ("outbox_relay.retry_delay", "100ms"),
        ("outbox_relay.retry_max_delay", "1s"),
    ])
    .start();
    pg.extension();
    let redises: Vec<Redis> = (0..4).map(|_| Redis::start()).collect();
    let hole = BlackHole::start();
    pg.exec(&format!(
        "delete from outbox.backends; insert into outbox.backends (name, host, port, enabled) values ('hung', '127.0.0.1', {}, false), ('off', null, null, false)",
        hole.port()
    ));
    for (n, redis) in redises.iter().enumerate() {
        let sql = format!(
            "insert into outbox.backends (name, host, port) values ('b{n}', '127.0.0.1', {})",
            redis.port()
        );
        pg.exec(&sql);
    }
    let seconds: f64 = or("OUTBOX_HUNG_SECONDS", 4.0);
    measure(&pg, &redises, 1.0, false);
    let mut times = [Vec::new(), Vec::new()];
    // Alternating every few seconds, because the speed of a machine changes.
    let turns = (seconds / 4.0).max(4.0) as usize;
    for turn in 0..turns {
        for hung in [turn % 2 == 0, turn % 2 != 0] {
            pg.exec(&format!(
                "update outbox.backends set enabled = {hung} where name = 'hung'"
            ));
            let accepted = hole.accepted();
            wait_until("a hung connection", || !hung || hole.accepted() > accepted);
            times[usize::from(hung)].extend(measure(&pg, &redises, seconds / turns as f64, hung));
        }
    }
    let mut p99 = [0.0; 2];
    for (index, times) in times.iter_mut().enumerate() {
        times.sort();
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
        let what = ["without", "with"][index];
        println!(
            "{what} a hung backend: {} events, p50 {:.2} ms, p99 {:.2} ms",
            times.len(),
            at(0.5),
            at(0.99)
        );
        p99[index] = at(0.99);
    }
    println!("p99 with beside without: {:.2}", p99[1] / p99[0]);
    // Other load on the machine must not fail this test; a wait for the hanging backend would take a second.
    assert!(p99[1] < 3.0 * p99[0] + 100.0, "{p99:?} ms");
}
