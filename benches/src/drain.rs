//! How fast a backlog is drained, compared with the slower of two upper bounds in the same run.

use crate::floors::{copy_rate, redis_rate};
use crate::options::Scale;
use crate::report::{Goal, Row, Series, Taken, thousands};
use crate::servers::{BACKENDS, Backlog, DEFAULT, Drain, STREAMS, Way};
use crate::stats::{median, median_ratio};

/// Ways to drain into one stream: name, way, goal as a share of the bound.
const WAYS: [(&str, Way, Goal); 4] = [
    (
        "at_least_once, batch_size 1000",
        Way {
            delivery: "at_least_once",
            batch_size: 1_000,
        },
        Goal::AtLeast(0.95),
    ),
    (
        "exactly_once, batch_size 1000",
        Way {
            delivery: "exactly_once",
            batch_size: 1_000,
        },
        Goal::AtLeast(0.85),
    ),
    ("default settings", DEFAULT, Goal::AtLeast(0.75)),
    (
        "at_least_once, batch_size 100",
        Way {
            delivery: "at_least_once",
            batch_size: 100,
        },
        Goal::None,
    ),
];
const PLAIN_1000: usize = 0;
const EXACT_1000: usize = 1;
const DEFAULTS: usize = 2;
const PLAIN_100: usize = 3;

pub(crate) fn measure(scale: &Scale) -> Taken {
    let one = Backlog::of(scale.events, false);
    let mut drains: [Vec<Drain>; WAYS.len()] = Default::default();
    let (mut redis, mut copies) = (Vec::new(), Vec::new());
    for run in 1..=scale.runs {
        for ((name, way, _), drains) in WAYS.iter().zip(&mut drains) {
            let drain = one.drain(*way);
            eprintln!("drain {run}: {:.0}/s, {name}", drain.rate());
            drains.push(drain);
        }
        let entry = one.one_entry();
        redis.push(redis_rate(&one.stack.redis, &entry, scale.events));
        copies.push(copy_rate(&one.stack, scale.events));
        eprintln!(
            "drain {run}: floors {:.0}/s of Redis, {:.0}/s of COPY",
            redis[run - 1],
            copies[run - 1]
        );
    }
    let floor: Vec<f64> = redis.iter().zip(&copies).map(|(a, b)| a.min(*b)).collect();
    let rates = |way: usize| drains[way].iter().map(Drain::rate).collect::<Vec<_>>();
    let what = format!("drain of {} waiting events", thousands(scale.events));
    let mut rows: Vec<Row> = WAYS
        .iter()
        .enumerate()
        .map(|(index, (name, _, goal))| Row::rate(format!("{what}, {name}"), &rates(index), &floor, *goal))
        .collect();
    for (exact, plain, size) in [(EXACT_1000, PLAIN_1000, 1_000), (DEFAULTS, PLAIN_100, 100)] {
        rows.push(Row::rate(
            format!("exactly_once beside at_least_once, batch_size {size}"),
            &rates(exact),
            &rates(plain),
            Goal::AtLeast(0.85),
        ));
    }
    for (way, name) in [(DEFAULTS, "default settings"), (EXACT_1000, "batch_size 1000")] {
        let of = |cost: fn(&Drain) -> f64| median(&drains[way].iter().map(cost).collect::<Vec<_>>());
        let one_us = Goal::AtMost(1.0);
        rows.push(Row::plain(
            format!("reader's CPU an event, {name}"),
            of(|d| d.reader_us),
            2,
            " us",
            one_us,
        ));
        rows.push(Row::plain(
            format!("sender's CPU an event, {name}"),
            of(|d| d.sender_us),
            2,
            " us",
            one_us,
        ));
        rows.push(Row::plain(
            format!("WAL an event, {name}"),
            of(|d| d.wal),
            2,
            " bytes",
            Goal::AtMost(2.0),
        ));
    }
    rows.push(Row::ratio(
        format!("{what}, default settings: last tenth beside first"),
        median(
            &drains[DEFAULTS]
                .iter()
                .map(|d| d.progress.flatness())
                .collect::<Vec<_>>(),
        ),
        Goal::AtLeast(0.95),
    ));
    eprintln!("drain: Redis is {:.2} of COPY", median_ratio(&redis, &copies));
    let bar = |name: &str, rates: &[f64]| Series {
        name: name.to_owned(),
        points: vec![(0.0, median(rates))],
    };
    Taken {
        series: vec![
            bar("at_least_once, batch_size 1000", &rates(PLAIN_1000)),
            bar("exactly_once, batch_size 1000", &rates(EXACT_1000)),
            bar("exactly_once, default settings", &rates(DEFAULTS)),
            bar("redis-benchmark -c 1 -P 500", &redis),
            bar("COPY TO STDOUT", &copies),
        ],
        rows,
        ..Taken::default()
    }
}

/// Many streams and backends, with as many events as one has.
pub(crate) fn measure_spread(scale: &Scale) -> Taken {
    let (one, spread) = (Backlog::of(scale.events, false), Backlog::of(scale.events, true));
    let (mut ones, mut spreads) = (Vec::new(), Vec::new());
    for run in 0..scale.runs {
        for turn in 0..2 {
            match (run + turn) % 2 {
                0 => spreads.push(spread.drain(DEFAULT).rate()),
                _ => ones.push(one.drain(DEFAULT).rate()),
            }
        }
        eprintln!(
            "spread {}: {:.0}/s, {:.0}/s into one stream",
            run + 1,
            spreads[run],
            ones[run]
        );
    }
    let events = thousands(scale.events);
    Taken {
        rows: vec![Row::rate(
            format!("drain of {events} into {STREAMS} streams by {BACKENDS} backends beside one, default settings"),
            &spreads,
            &ones,
            Goal::AtLeast(0.9),
        )],
        ..Taken::default()
    }
}
