//! `make bench`: each figure beside its floor, measured in turn within one run, since machines are noisy. Medians.
//!
//! - [`options`], [`report`], [`stats`] how much is done, the table, one number of several
//! - [`servers`], [`probe`], [`floors`], [`bare`], [`load`] what is measured, seen from outside, and beside what
//! - [`drain`], [`backlog`], [`publish`], [`guests`], [`latency`], [`footprint`], [`steady`], [`rivals`] the figures
//! - [`plots`], [`chart`] pictures of them in `docs/`

mod backlog;
mod bare;
mod chart;
mod drain;
mod floors;
mod footprint;
mod guests;
mod latency;
mod load;
mod options;
mod plots;
mod probe;
mod publish;
mod report;
mod rivals;
mod servers;
mod stats;
mod steady;

use options::{Options, Scale};
use report::{Row, Taken};
use std::time::Instant;

type Measure = fn(&Scale) -> Taken;

/// In the order of the table.
const FIGURES: [(&str, Measure); 12] = [
    ("drain", drain::measure),
    ("spread", drain::measure_spread),
    ("backlog", backlog::measure),
    ("publish", publish::measure),
    ("bulk", publish::measure_bulk),
    ("latency", latency::measure),
    ("publishers", guests::measure),
    ("open", guests::measure_open),
    ("memory", footprint::measure_memory),
    ("idle", footprint::measure_idle),
    ("steady", steady::measure),
    ("rivals", rivals::measure),
];
/// Draws what was measured, now or before; prints what was measured before.
const OTHERS: [&str; 2] = ["plots", "table"];

fn main() {
    let known: Vec<&str> = FIGURES.iter().map(|(name, _)| *name).chain(OTHERS).collect();
    let options = match Options::parse(std::env::args().skip(1), &known) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("bench: {error}");
            std::process::exit(2);
        }
    };
    let mut rows: Vec<Row> = Vec::new();
    for (name, measure) in FIGURES {
        if options.wants(name) {
            let start = Instant::now();
            // One that fails must not take with it what the others took an hour for.
            match std::panic::catch_unwind(|| measure(&options.scale)) {
                Ok(taken) => {
                    taken.save(name);
                    rows.extend(taken.rows);
                }
                Err(_) => rows.push(Row::missing(name, "failed: see above")),
            }
            eprintln!("{name} took {:.0} s", start.elapsed().as_secs_f64());
        } else if options.wants("table") {
            rows.extend(Taken::load(name).unwrap_or_default().rows);
        }
    }
    if options.wants("plots") {
        plots::draw();
    }
    if !rows.is_empty() {
        report::print_table(&rows);
    }
}
