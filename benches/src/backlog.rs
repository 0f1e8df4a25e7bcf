//! Whether the size of the backlog affects the rate, the end of the drain, and the worker's memory.

use crate::options::Scale;
use crate::probe::anonymous_kb;
use crate::report::{Goal, Row, Series, Taken, thousands};
use crate::servers::{Backlog, DEFAULT, Drain};
use crate::stats::median;

const SMALL: u64 = 10_000;
/// A small backlog is drained in a moment, so several of them make one measurement.
const SMALL_DRAINS: usize = 3;

pub(crate) fn measure(scale: &Scale) -> Taken {
    let small = Backlog::of(SMALL, false);
    let mut large = Backlog::of(SMALL, false);
    let rate = |backlog: &Backlog| backlog.drain(DEFAULT).rate();
    let middle = |backlog: &Backlog, runs: usize| median(&(0..runs).map(|_| rate(backlog)).collect::<Vec<_>>());

    let mut by_size = vec![(SMALL as f64, middle(&small, scale.runs * SMALL_DRAINS))];
    let mut size = SMALL * 10;
    while size < scale.backlog {
        large.grow(size);
        by_size.push((size as f64, middle(&large, scale.runs)));
        eprintln!("backlog: {:.0}/s with {size} waiting", by_size[by_size.len() - 1].1);
        size *= 10;
    }
    // With nothing pending, after it has sent something.
    let idle_kb = anonymous_kb(small.stack.pg.wait_worker("postgres"));
    large.grow(scale.backlog);
    let (mut rates, mut smalls) = (Vec::new(), Vec::new());
    let mut drains: Vec<Drain> = Vec::new();
    for run in 0..scale.runs {
        let drain = large.drain(DEFAULT);
        rates.push(drain.rate());
        smalls.push(middle(&small, SMALL_DRAINS));
        eprintln!(
            "backlog {}: {:.0}/s with {} waiting, {:.0}/s with {SMALL}; last tenth {:.2} of first",
            run + 1,
            rates[run],
            scale.backlog,
            smalls[run],
            drain.progress.flatness()
        );
        drains.push(drain);
    }
    by_size.push((scale.backlog as f64, median(&rates)));
    let (of, than) = (thousands(scale.backlog), thousands(SMALL));
    let highest_kb = drains.iter().map(|d| d.memory_kb).max().unwrap_or(0);
    let flatness: Vec<f64> = drains.iter().map(|d| d.progress.flatness()).collect();
    Taken {
        rows: vec![
            Row::rate(
                format!("drain of {of} waiting beside {than}"),
                &rates,
                &smalls,
                Goal::AtLeast(0.95),
            ),
            Row::ratio(
                format!("drain of {of}: last tenth beside first"),
                median(&flatness),
                Goal::AtLeast(0.95),
            ),
            Row {
                floor: format!("{:.1} MiB idle", idle_kb as f64 / 1024.0),
                ..Row::plain(
                    format!("worker's memory above idle, {of} waiting"),
                    highest_kb.saturating_sub(idle_kb) as f64 / 1024.0,
                    1,
                    " MiB",
                    Goal::AtMost(32.0),
                )
            },
        ],
        series: vec![Series {
            name: "rate by size".to_owned(),
            points: by_size,
        }],
        ..Taken::default()
    }
}
