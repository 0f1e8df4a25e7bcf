//! From commit to a consumer, compared with an application that commits and then XADDs itself.

use crate::bare;
use crate::load::{self, Pace, Way};
use crate::options::Scale;
use crate::probe::fsync_ms;
use crate::report::{Goal, Row, Series, Taken};
use crate::servers::stack;
use crate::stats::{median, quantile};

/// Name, clients, transactions a second.
const PACES: [(&str, usize, f64); 2] = [("50/s", 1, 50.0), ("2,000/s from 8 clients", 8, 2_000.0)];

pub(crate) fn measure(scale: &Scale) -> Taken {
    let stack = stack();
    stack.pg.exec(bare::TABLE);
    let mut taken = Taken::default();
    let mut fsyncs: Vec<f64> = Vec::new();
    for (name, clients, rate) in PACES {
        let pace = Pace {
            clients,
            transactions_per_second: rate,
            events: 1,
            // A hundredth of them should be more than one event.
            seconds: f64::from(scale.seconds).max(150.0 / rate),
        };
        let (mut ours, mut floor) = (Vec::new(), Vec::new());
        for run in 0..scale.runs {
            fsyncs.extend(fsync_ms(stack.pg.data_dir()));
            for turn in 0..2 {
                match (run + turn) % 2 {
                    0 => ours.push(load::run(&stack, &Way::ours(), pace)),
                    _ => floor.push(load::run(&stack, &Way::by_itself(), pace)),
                }
            }
            eprintln!(
                "latency {} at {name}: p50 {:.2} ms, p99 {:.2} ms; by itself p50 {:.2} ms, p99 {:.2} ms",
                run + 1,
                ours[run].ms(0.5),
                ours[run].ms(0.99),
                floor[run].ms(0.5),
                floor[run].ms(0.99)
            );
        }
        let of = |runs: &[load::Arrivals], share: f64| runs.iter().map(|r| r.ms(share)).collect::<Vec<_>>();
        let fsync = match clients {
            1 => 0.0,
            _ => median(&fsyncs),
        };
        let what = |share: &str| format!("commit to consumer at {name}, {share}");
        taken.rows.push(Row::later(
            what("p50"),
            &of(&ours, 0.5),
            &of(&floor, 0.5),
            Goal::AtMost(0.1 + fsync),
        ));
        let floor_p99 = median(&of(&floor, 0.99));
        taken.rows.push(Row::longer(
            what("p99"),
            &of(&ours, 0.99),
            &of(&floor, 0.99),
            Goal::AtMost(1.5 + fsync / floor_p99),
        ));
        for (who, runs) in [("ours", &ours), ("by itself", &floor)] {
            let all: Vec<f64> = runs.iter().flat_map(|r| r.times.iter().map(|t| t.1)).collect();
            taken.series.push(Series {
                name: format!("{who}, {clients}"),
                points: distribution(&all),
            });
        }
    }
    for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
        taken.rows.push(Row::plain(
            format!("this machine's write and fdatasync of 8 KiB, {name}"),
            quantile(&fsyncs, share),
            2,
            " ms",
            Goal::None,
        ));
    }
    taken
}

/// Milliseconds within which this many hundredths of the events have arrived.
pub(crate) fn distribution(times_ms: &[f64]) -> Vec<(f64, f64)> {
    let mut sorted = times_ms.to_vec();
    sorted.sort_by(f64::total_cmp);
    let shares = (1..=99).map(f64::from).chain([99.5, 99.9]);
    shares.map(|share| (quantile(&sorted, share / 100.0), share)).collect()
}
