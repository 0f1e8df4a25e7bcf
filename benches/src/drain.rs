//! How fast a backlog is drained, beside the slower of two floors, measured in the same run: Redis adding the same entries for
//! `redis-benchmark -c 1 -P 500`, and Postgres handing out the same rows by COPY.

use crate::{Figure, Scale, median, poll_until, stack};
use kit::{Redis, Stack};
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

/// 200 bytes of JSON.
const DATA: &str = "json_build_object('n', 1000000 + g, 'pad', repeat('x', 174))";
const STREAMS: u32 = 10;
const BACKENDS: u32 = 5;

/// A way to drain.
struct Way {
    name: &'static str,
    delivery: &'static str,
    batch_size: u32,
    /// Over several backends and streams.
    spread: bool,
    goal: &'static str,
}

const WAYS: [Way; 5] = [
    Way {
        name: "default settings",
        delivery: "exactly_once",
        batch_size: 100,
        spread: false,
        goal: "0.75",
    },
    Way {
        name: "at_least_once, batch_size 1000",
        delivery: "at_least_once",
        batch_size: 1_000,
        spread: false,
        goal: "0.95",
    },
    Way {
        name: "exactly_once, batch_size 1000",
        delivery: "exactly_once",
        batch_size: 1_000,
        spread: false,
        goal: "0.85",
    },
    Way {
        name: "at_least_once, batch_size 100",
        delivery: "at_least_once",
        batch_size: 100,
        spread: false,
        goal: "",
    },
    Way {
        name: "default settings, 10 streams and 5 backends",
        delivery: "exactly_once",
        batch_size: 100,
        spread: true,
        goal: "",
    },
];
const DEFAULT: usize = 0;
const PLAIN: usize = 3;
const SPREAD: usize = 4;

/// A name, which it is, its unit and its goal.
type Cost = (&'static str, fn(&Drain) -> f64, &'static str, &'static str);

/// How one drain went.
struct Drain {
    rate: f64,
    /// Rate of the last tenth over that of the first.
    flatness: f64,
    /// Time on a processor of the worker's main thread and of its senders, microseconds an event.
    reader_us: f64,
    sender_us: f64,
    /// Bytes of WAL an event.
    wal: f64,
}

pub fn measure(scale: &Scale) -> Vec<Figure> {
    let stack = stack();
    let mut drains: [Vec<Drain>; WAYS.len()] = Default::default();
    let mut floors: Vec<f64> = Vec::new();
    for run in 1..=scale.runs {
        let entry = one_entry(&stack);
        for (way, drains) in WAYS.iter().zip(&mut drains) {
            fill(&stack, scale.events, way.delivery, way.spread);
            stack.pg.set("outbox_relay.batch_size", &way.batch_size.to_string());
            let drain = drain(&stack, scale.events, way.spread);
            eprintln!("drain {run}: {:.0}/s, {}", drain.rate, way.name);
            drains.push(drain);
        }
        let redis = redis_rate(&stack.redis, &entry, scale.events);
        let copy = copy_rate(&stack, scale.events);
        eprintln!("drain {run}: floors {redis:.0}/s of Redis, {copy:.0}/s of COPY");
        floors.push(redis.min(copy));
    }
    let rates = |way: usize| drains[way].iter().map(|d| d.rate).collect::<Vec<_>>();
    let figure = |name: String, ours: &[f64], floor: &[f64], goal| Figure {
        name: format!("drain of {} waiting events, {name}", scale.events),
        ours: format!("{:.0}/s", median(ours.to_vec())),
        floor: format!("{:.0}/s", median(floor.to_vec())),
        ratio: format!("{:.2}", median(ours.iter().zip(floor).map(|(a, b)| a / b).collect())),
        goal,
    };
    let beside_floor = WAYS.iter().enumerate().filter(|(_, way)| !way.goal.is_empty());
    let mut figures: Vec<Figure> = beside_floor
        .map(|(index, way)| figure(way.name.to_owned(), &rates(index), &floors, way.goal))
        .collect();
    figures.push(figure(
        "exactly_once beside at_least_once, batch_size 100".to_owned(),
        &rates(DEFAULT),
        &rates(PLAIN),
        "0.85",
    ));
    figures.push(figure(
        format!("{STREAMS} streams and {BACKENDS} backends beside one stream"),
        &rates(SPREAD),
        &rates(DEFAULT),
        "0.9",
    ));
    let costs: [Cost; 3] = [
        ("worker's main thread", |d| d.reader_us, "us", "1 us"),
        ("sender", |d| d.sender_us, "us", "1 us"),
        ("WAL of the relay", |d| d.wal, "bytes", "2 bytes"),
    ];
    for (name, cost, unit, goal) in costs {
        figures.push(Figure {
            name: format!("{name} for an event, default settings"),
            ours: format!("{:.2} {unit}", median(drains[DEFAULT].iter().map(cost).collect())),
            floor: String::new(),
            ratio: String::new(),
            goal,
        });
    }
    figures.push(Figure {
        name: format!("flatness of a drain of {}, last tenth beside first", scale.events),
        ours: String::new(),
        floor: String::new(),
        ratio: format!("{:.2}", median(drains[DEFAULT].iter().map(|d| d.flatness).collect())),
        goal: "0.95",
    });
    figures
}

/// Lets events wait behind paused backends.
pub fn fill(stack: &Stack, events: u64, delivery: &str, spread: bool) {
    stack.pg.exec("truncate outbox.events cascade");
    stack.pg.exec(&format!(
        "update outbox.backends set enabled = false, delivery = '{delivery}'"
    ));
    let (backend, stream) = match spread {
        true => {
            stack.pg.exec(&format!(
                "insert into outbox.backends (name, host, port, delivery, enabled)
                 select 'b' || n, host, port, delivery, false from outbox.backends, generate_series(0, {}) n where name = 'default'
                 on conflict do nothing",
                BACKENDS - 1
            ));
            (format!("'b' || g % {BACKENDS}"), format!("'s' || g % {STREAMS}"))
        }
        false => ("'default'".to_owned(), "null".to_owned()),
    };
    let mut client = stack.pg.client();
    for first in (1..=events).step_by(1_000_000) {
        let last = (first + 999_999).min(events);
        let sql = format!(
            "insert into outbox.events (event_type, source, backend, stream, data)
             select 'bench.drain', 'bench', {backend}, {stream}, {DATA} from generate_series({first}, {last}) g"
        );
        client.batch_execute(&sql).expect("cannot fill the outbox");
    }
    for settle in ["vacuum outbox.events", "checkpoint"] {
        client.batch_execute(settle).expect("cannot settle");
    }
}

fn drain(stack: &Stack, events: u64, spread: bool) -> Drain {
    // The guards stay: a missing one would be looked into first.
    let streams = (0..STREAMS).map(|n| format!("s{n}"));
    for stream in streams.chain(["events".to_owned()]) {
        stack.redis.call(&["DEL", &stream]);
    }
    stack.redis.call(&["CONFIG", "RESETSTAT"]);
    let mut conn = stack.redis.conn();
    let (mut first_tenth, mut last_tenth) = (None, None);
    let (pid, wal) = (stack.pg.wait_worker("postgres"), wal(stack));
    let before = Busy::of(pid);
    let start = Instant::now();
    stack.pg.exec(&format!(
        "update outbox.backends set enabled = true where (name <> 'default') = {spread}"
    ));
    poll_until(|| {
        let done = xadds(&mut conn);
        let at = (start.elapsed().as_secs_f64(), done);
        if done >= events / 10 && first_tenth.is_none() {
            first_tenth = Some(at);
        }
        if done >= events / 10 * 9 && last_tenth.is_none() {
            last_tenth = Some(at);
        }
        done >= events
    });
    let took = start.elapsed().as_secs_f64();
    let busy = Busy::of(pid);
    poll_until(|| stack.pg.one::<i64>("select pending from outbox.status") == 0);
    let (first, last) = first_tenth.zip(last_tenth).expect("it came past them");
    let last_rate = (events - last.1) as f64 / (took - last.0);
    Drain {
        rate: events as f64 / took,
        flatness: last_rate / (first.1 as f64 / first.0),
        reader_us: (busy.reader - before.reader) * 1e6 / events as f64,
        sender_us: (busy.senders - before.senders) * 1e6 / events as f64,
        wal: (self::wal(stack) - wal) as f64 / events as f64,
    }
}

/// WAL written so far, in bytes.
fn wal(stack: &Stack) -> i64 {
    stack
        .pg
        .one("select (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint")
}

/// Seconds that a worker's threads have been on a processor.
struct Busy {
    reader: f64,
    senders: f64,
}

impl Busy {
    fn of(pid: i32) -> Self {
        let mut busy = Self {
            reader: 0.0,
            senders: 0.0,
        };
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))
            .expect("the worker runs")
            .flatten()
        {
            // Nanoseconds on a processor come first.
            let Ok(text) = std::fs::read_to_string(task.path().join("schedstat")) else {
                continue;
            };
            let seconds = text
                .split(' ')
                .next()
                .and_then(|n| n.parse::<f64>().ok())
                .unwrap_or(0.0)
                / 1e9;
            match task.file_name().to_str() == Some(&pid.to_string()) {
                true => busy.reader += seconds,
                false => busy.senders += seconds,
            }
        }
        busy
    }
}

/// The fields of an entry.
fn one_entry(stack: &Stack) -> Vec<String> {
    fill(stack, 1, "exactly_once", false);
    drain(stack, 1, false);
    let newest: Vec<(String, Vec<String>)> = redis::cmd("XREVRANGE")
        .arg("events")
        .arg("+")
        .arg("-")
        .arg("COUNT")
        .arg(1)
        .query(&mut stack.redis.conn())
        .expect("no entry");
    newest.into_iter().next().expect("no entry").1
}

/// How many XADDs Redis has executed.
fn xadds(conn: &mut redis::Connection) -> u64 {
    let info: String = redis::cmd("INFO").arg("commandstats").query(conn).expect("INFO");
    let line = info.lines().find_map(|l| l.strip_prefix("cmdstat_xadd:calls="));
    line.and_then(|l| l.split(',').next()?.parse().ok()).unwrap_or(0)
}

fn redis_rate(redis: &Redis, entry: &[String], events: u64) -> f64 {
    redis.call(&["DEL", "events", "floor"]);
    let start = Instant::now();
    let (port, events_text) = (redis.port().to_string(), events.to_string());
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
            &events_text,
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

fn copy_rate(stack: &Stack, events: u64) -> f64 {
    let mut client = stack.pg.client();
    let start = Instant::now();
    let mut rows = client
        .copy_out("copy outbox.events to stdout")
        .expect("cannot copy the rows");
    let mut buffer = vec![0; 64 * 1024];
    while rows.read(&mut buffer).expect("cannot read the rows") > 0 {}
    events as f64 / start.elapsed().as_secs_f64()
}
