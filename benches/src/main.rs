//! `make bench`: each figure beside its bound, measured alternately within one run, because the speed of machines
//! varies. Medians.
//!
//! - [`options`], [`report`], [`stats`] how much is done, the table, one number of several
//! - [`servers`], [`probe`], [`machine`], [`floors`], [`bare`], [`load`] what is measured, seen from outside, and
//!   beside what
//! - [`drain`], [`backlog`], [`publish`], [`guests`], [`latency`], [`cost`], [`others`], [`acts`], [`admin`],
//!   [`footprint`], [`steady`], [`attached`], [`rivals`], [`views`] the figures
//! - [`plots`], [`chart`] pictures of them in `docs/`

mod acts;
mod admin;
mod attached;
mod backlog;
mod bare;
mod chart;
mod cost;
mod drain;
mod floors;
mod footprint;
mod guests;
mod latency;
mod load;
mod machine;
mod options;
mod others;
mod plots;
mod probe;
mod publish;
mod report;
mod rivals;
mod servers;
mod stats;
mod steady;
mod views;

use options::{Options, Scale};
use report::{Row, Shelf, Taken};
use std::time::Instant;

type Measure = fn(&Scale) -> Taken;

/// In the order of the table.
const FIGURES: [(&str, Measure); 23] = [
    ("drain", drain::measure),
    ("spread", drain::measure_spread),
    ("backlog", backlog::measure),
    ("publish", publish::measure),
    ("bulk", publish::measure_bulk),
    ("latency", latency::measure),
    ("cost", cost::measure),
    ("publishers", guests::measure),
    ("open", guests::measure_open),
    ("scheduled", others::measure_scheduled),
    ("purge", others::measure_purge),
    ("beside_bulk", others::measure_beside_bulk),
    ("refused", others::measure_refused),
    ("acts", acts::measure),
    ("admin", admin::measure),
    ("looking", others::measure_looking),
    ("views", views::measure),
    ("attached", attached::measure),
    ("inbox", attached::measure_inbox),
    ("memory", footprint::measure_memory),
    ("idle", footprint::measure_idle),
    ("steady", steady::measure),
    ("rivals", rivals::measure),
];
/// Draws, prints or writes into the document what was measured, now or before.
const OTHERS: [&str; 3] = ["plots", "table", "document"];

fn main() {
    let known: Vec<&str> = FIGURES.iter().map(|(name, _)| *name).chain(OTHERS).collect();
    let options = match Options::parse(std::env::args().skip(1), &known) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("bench: {error}");
            std::process::exit(2);
        }
    };
    let shelf = Shelf::new(options.quick);
    let given: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !known.contains(&a.as_str()))
        .collect();
    let mut rows: Vec<Row> = Vec::new();
    for (name, measure) in FIGURES.iter().filter(|(name, _)| options.wants(name)) {
        let start = Instant::now();
        // A figure that fails must not lose the results of the others, which took an hour.
        match std::panic::catch_unwind(|| measure(&options.scale)) {
            Ok(mut taken) => {
                taken.options = given.join(" ");
                shelf.save(name, &taken);
                rows.extend(taken.rows);
            }
            Err(_) => rows.push(Row::missing(*name, "failed: see above")),
        }
        eprintln!("{name} took {:.0} s", start.elapsed().as_secs_f64());
    }
    if options.wants("plots") {
        plots::draw(&shelf);
    }
    if options.names("table") || options.names("document") {
        let (machine, kept) = (machine::describe(), kept(&shelf));
        rows = kept.iter().flat_map(|(_, taken)| taken.rows.clone()).collect();
        if options.names("document") {
            report::write_document(&format!("{machine}\n\n{}\n{}", report::table(&rows), commands(&kept)));
        }
    }
    println!("\n{}", report::table(&rows));
}

/// All measurements, in the order of the table.
fn kept(shelf: &Shelf) -> Vec<(&'static str, Taken)> {
    FIGURES
        .iter()
        .filter_map(|(name, _)| Some((*name, shelf.load(name)?)))
        .collect()
}

/// How to measure it again.
fn commands(kept: &[(&str, Taken)]) -> String {
    let mut text =
        "Each comes from `make bench` with these BENCH_ARGS, medians of the runs named there (5 where none is):"
            .to_owned();
    for (name, taken) in kept {
        text += &format!(" `{}`", format!("{} {name}", taken.options).trim());
    }
    text + ".\n"
}
