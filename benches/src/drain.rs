//! How fast a backlog is drained, beside `redis-benchmark -c 1 -P 500` doing the same XADD.

use crate::{Figure, Scale, median, poll_until, stack};
use kit::{Redis, Stack};
use std::process::Command;
use std::time::Instant;

/// 200 bytes of JSON.
const DATA: &str = "json_build_object('n', 1000000 + g, 'pad', repeat('x', 174))";

pub fn measure(scale: &Scale) -> Vec<Figure> {
    let stack = stack();
    let (mut exactly, mut at_least, mut floor) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..scale.runs {
        let mut entry = Vec::new();
        for (delivery, rates) in [("at_least_once", &mut at_least), ("exactly_once", &mut exactly)] {
            fill(&stack, scale.events, delivery);
            entry = drained_in(&stack, scale.events, rates);
        }
        floor.push(floor_rate(&stack.redis, &entry, scale.events));
        eprintln!(
            "drain {}: exactly_once {:.0}/s, at_least_once {:.0}/s, floor {:.0}/s",
            run + 1,
            exactly[run],
            at_least[run],
            floor[run],
        );
    }
    let figure = |name: &str, ours: &[f64], floor: &[f64], goal| Figure {
        name: format!("drain of {} waiting events, {name}", scale.events),
        ours: format!("{:.0}/s", median(ours.to_vec())),
        floor: format!("{:.0}/s", median(floor.to_vec())),
        ratio: format!("{:.2}", median(ours.iter().zip(floor).map(|(a, b)| a / b).collect())),
        goal,
    };
    vec![
        figure("default settings (exactly_once)", &exactly, &floor, "0.6"),
        figure("at_least_once", &at_least, &floor, "0.6"),
        figure("exactly_once beside at_least_once", &exactly, &at_least, "0.85"),
    ]
}

/// Lets events wait behind a paused backend.
pub fn fill(stack: &Stack, events: u64, delivery: &str) {
    stack.pg.exec(&format!(
        "update outbox.backends set enabled = false, delivery = '{delivery}'"
    ));
    stack.pg.exec("truncate outbox.events");
    let mut client = stack.pg.client();
    for first in (1..=events).step_by(1_000_000) {
        let last = (first + 999_999).min(events);
        let sql = format!(
            "insert into outbox.events (event_type, source, data)
             select 'bench.drain', 'bench', {DATA} from generate_series({first}, {last}) g"
        );
        client.batch_execute(&sql).expect("cannot fill the outbox");
    }
    for settle in ["vacuum outbox.events", "checkpoint"] {
        client.batch_execute(settle).expect("cannot settle");
    }
}

/// Drains, pushes the rate, and returns the arguments of the last entry.
fn drained_in(stack: &Stack, events: u64, rates: &mut Vec<f64>) -> Vec<String> {
    // The guard stays: without it, the relay would look for what it finds there no more.
    stack.redis.call(&["DEL", "events"]);
    stack.redis.call(&["CONFIG", "RESETSTAT"]);
    let start = Instant::now();
    stack.pg.exec("update outbox.backends set enabled = true");
    poll_until(|| xadds(&stack.redis) >= events);
    rates.push(events as f64 / start.elapsed().as_secs_f64());
    let mut conn = stack.redis.conn();
    let newest: Vec<(String, Vec<String>)> = redis::cmd("XREVRANGE")
        .arg("events")
        .arg("+")
        .arg("-")
        .arg("COUNT")
        .arg(1)
        .query(&mut conn)
        .expect("no entry");
    newest.into_iter().next().expect("no entry").1
}

/// How many XADDs Redis has executed.
fn xadds(redis: &Redis) -> u64 {
    let info: String = redis::cmd("INFO")
        .arg("commandstats")
        .query(&mut redis.conn())
        .expect("INFO");
    let line = info.lines().find_map(|l| l.strip_prefix("cmdstat_xadd:calls="));
    line.and_then(|l| l.split(',').next()?.parse().ok()).unwrap_or(0)
}

fn floor_rate(redis: &Redis, entry: &[String], events: u64) -> f64 {
    redis.call(&["DEL", "events", "floor"]);
    let start = Instant::now();
    let status = Command::new("redis-benchmark")
        .args([
            "-h",
            "127.0.0.1",
            "-p",
            &redis.port().to_string(),
            "-c",
            "1",
            "-P",
            "500",
            "-n",
            &events.to_string(),
            "-q",
        ])
        .args(["XADD", "floor", "MAXLEN", "~", "10000", "*"])
        .args(entry)
        .stdout(std::process::Stdio::null())
        .status()
        .expect("redis-benchmark");
    assert!(status.success(), "redis-benchmark failed");
    events as f64 / start.elapsed().as_secs_f64()
}
