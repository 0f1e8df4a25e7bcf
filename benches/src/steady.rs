//! Steady publishing for a long time while retention purges: the table's size, latency and throughput must not drift.

use crate::load::{self, Arrivals, Pace, Way};
use crate::options::Scale;
use crate::report::{Goal, Row, Series, Taken};
use crate::servers::SETTINGS;
use crate::stats::{median, quantile};
use kit::Stack;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const EVENTS_PER_SECOND: f64 = 5_000.0;
/// Events in one transaction.
const TOGETHER: usize = 5;
/// The number of parts of the run: the second is compared with the last.
const PARTS: usize = 5;

pub(crate) fn measure(scale: &Scale) -> Taken {
    let seconds = scale.steady_minutes * 60.0;
    // A minute of half an hour.
    let retention_s = (seconds / 30.0).round().max(1.0);
    let retention = format!("{retention_s}s");
    let stack = Stack::with(
        &[
            SETTINGS,
            // Vacuum has to keep up with the purge.
            &[
                ("autovacuum", "on"),
                (
                    "autovacuum_naptime",
                    &format!("{}s", (retention_s / 4.0).clamp(1.0, 60.0)),
                ),
                ("outbox_relay.published_retention", &retention),
                // As by default: a checkpoint or two in each fifth of half an hour.
                ("checkpoint_timeout", "5min"),
            ],
        ]
        .concat(),
    );
    let pace = Pace {
        clients: 8,
        transactions_per_second: EVENTS_PER_SECOND / TOGETHER as f64,
        events: TOGETHER,
        seconds,
    };
    let ended = AtomicBool::new(false);
    let (arrivals, sizes) = std::thread::scope(|scope| {
        let sizes = scope.spawn(|| sizes(&stack, &ended));
        let arrivals = load::run(&stack, &Way::ours(), pace);
        ended.store(true, Ordering::SeqCst);
        (arrivals, sizes.join().expect("looking at the size panicked"))
    });
    let fifth = |times: &[(f64, f64)], part: usize| -> Vec<f64> {
        let (from, to) = (
            seconds * part as f64 / PARTS as f64,
            seconds * (part + 1) as f64 / PARTS as f64,
        );
        let within = times.iter().filter(|(at, _)| (from..to).contains(at));
        within.map(|(_, value)| *value).collect()
    };
    let (second, last) = (1, PARTS - 1);
    let latency = |part: usize, share: f64| quantile(&fifth(&arrivals.times, part), share);
    let delivered = delivered(&arrivals);
    let rate = |part: usize| fifth(&delivered, part).len() as f64 / (seconds / PARTS as f64);
    let size = |part: usize| median(&fifth(&sizes, part));
    let what = format!(
        "steady {EVENTS_PER_SECOND:.0}/s for {} minutes, retention {retention}, last fifth beside second",
        scale.steady_minutes
    );
    let mut table = Row::ratio(
        format!("{what}: table with indexes"),
        size(last) / size(second),
        Goal::AtMost(1.05),
    );
    (table.ours, table.floor) = (mib(size(last)), mib(size(second)));
    Taken {
        rows: vec![
            table,
            Row::longer(
                format!("{what}: latency p50"),
                &[latency(last, 0.5)],
                &[latency(second, 0.5)],
                Goal::AtMost(1.05),
            ),
            Row::longer(
                format!("{what}: latency p99"),
                &[latency(last, 0.99)],
                &[latency(second, 0.99)],
                Goal::AtMost(1.05),
            ),
            Row::rate(
                format!("{what}: delivered"),
                &[rate(last)],
                &[rate(second)],
                Goal::AtLeast(0.98),
            ),
        ],
        series: vec![Series {
            name: "table size".to_owned(),
            points: sizes,
        }],
        ..Taken::default()
    }
}

/// When each event arrived, and its latency.
fn delivered(arrivals: &Arrivals) -> Vec<(f64, f64)> {
    let arrived = arrivals.times.iter().map(|(sent, ms)| (sent + ms / 1_000.0, *ms));
    arrived.collect()
}

/// Seconds and bytes of the table with its indexes, twice a second.
fn sizes(stack: &Stack, ended: &AtomicBool) -> Vec<(f64, f64)> {
    let (mut client, start, mut sizes) = (stack.pg.client(), Instant::now(), Vec::new());
    while !ended.load(Ordering::SeqCst) {
        let bytes: i64 = client
            .query_one("select pg_total_relation_size('outbox.events')", &[])
            .expect("cannot look at the size")
            .get(0);
        sizes.push((start.elapsed().as_secs_f64(), bytes as f64));
        std::thread::sleep(Duration::from_millis(500));
    }
    sizes
}

fn mib(bytes: f64) -> String {
    format!("{:.1} MiB", bytes / f64::from(1 << 20))
}
