//! The processor time of the worker's threads and of Redis for each event, while events come one by one.

use crate::load::{self, Pace, Way};
use crate::options::Scale;
use crate::probe::{Busy, busy_seconds};
use crate::report::{Goal, Row, Taken};
use crate::servers::stack;
use crate::stats::median;
use kit::Stack;
use std::path::Path;

/// Name, clients, transactions a second, events in each, and the allowed share of a processor.
const PACES: [(&str, usize, f64, usize, Goal); 3] = [
    ("1,000/s", 4, 1_000.0, 1, Goal::None),
    ("5,000/s", 8, 5_000.0, 1, Goal::AtMost(30.0)),
    ("20,000/s in tens", 8, 2_000.0, 10, Goal::None),
];

/// One load: microseconds of each for an event, and the median latency.
struct Cost {
    reader_us: f64,
    senders_us: f64,
    redis_us: f64,
    p50_ms: f64,
}

impl Cost {
    fn us(&self) -> f64 {
        self.reader_us + self.senders_us + self.redis_us
    }
}

pub(crate) fn measure(scale: &Scale) -> Taken {
    let stack = stack();
    let mut taken = Taken::default();
    for (name, clients, rate, events, goal) in PACES {
        let pace = Pace {
            clients,
            transactions_per_second: rate,
            events,
            seconds: f64::from(scale.seconds),
        };
        let costs: Vec<Cost> = (0..scale.runs).map(|_| cost_of(&stack, pace)).collect();
        for (run, cost) in costs.iter().enumerate() {
            eprintln!(
                "cost at {name} {}: main thread {:.1}, senders {:.1}, Redis {:.1} us an event; p50 {:.3} ms",
                run + 1,
                cost.reader_us,
                cost.senders_us,
                cost.redis_us,
                cost.p50_ms
            );
        }
        let of = |get: fn(&Cost) -> f64| median(&costs.iter().map(get).collect::<Vec<_>>());
        let percent = of(Cost::us) * rate * events as f64 / 1e4;
        let what = format!("worker, senders and Redis at {name}");
        taken.rows.extend([
            Row::plain(format!("{what}: time an event"), of(Cost::us), 1, " us", Goal::None),
            Row::plain(format!("{what}: of a processor"), percent, 1, " %", goal),
            Row::plain(
                format!("commit to consumer at {name}, p50"),
                of(|c| c.p50_ms),
                2,
                " ms",
                Goal::None,
            ),
        ]);
    }
    taken
}

fn cost_of(stack: &Stack, pace: Pace) -> Cost {
    let (worker, redis) = (stack.pg.wait_worker("postgres"), stack.redis.pid());
    let redis = format!("/proc/{redis}");
    let of_redis = || busy_seconds(Path::new(&redis)).expect("Redis has gone");
    let (before, redis_before) = (Busy::of(worker), of_redis());
    let arrivals = load::run(stack, &Way::ours(), pace);
    let (after, redis_after) = (Busy::of(worker), of_redis());
    let events = pace.transactions_per_second * pace.seconds * pace.events as f64;
    let us = |seconds: f64| seconds * 1e6 / events;
    Cost {
        reader_us: us(after.reader - before.reader),
        senders_us: us(after.senders - before.senders),
        redis_us: us(redis_after - redis_before),
        p50_ms: arrivals.ms(0.5),
    }
}
