//! `make bench`: each figure beside its floor, measured in turn within one run, since machines are noisy. Medians.
//!
//! `bench [--runs N] [--events N] [FIGURE...]`; figures: drain, publish, latency, memory, idle.

mod drain;
mod footprint;
mod latency;
mod publish;

use kit::Stack;

/// How much to do.
pub struct Scale {
    /// Interleaved runs of each pair.
    pub runs: usize,
    /// Waiting events of a drain.
    pub events: u64,
    /// Waiting events while memory is measured.
    pub backlog: u64,
    /// Seconds of one pgbench run.
    pub seconds: u32,
    /// Transactions of one latency run.
    pub transactions: usize,
}

/// One line of the table.
pub struct Figure {
    pub name: String,
    pub ours: String,
    pub floor: String,
    pub ratio: String,
    pub goal: &'static str,
}

fn main() {
    let mut scale = Scale {
        runs: 5,
        events: 1_000_000,
        backlog: 10_000_000,
        seconds: 10,
        transactions: 500,
    };
    let mut wanted: Vec<String> = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|n| n.parse::<u64>().ok()).expect("a number");
        match argument.as_str() {
            "--runs" => scale.runs = number() as usize,
            "--events" => scale.events = number(),
            "--backlog" => scale.backlog = number(),
            "--seconds" => scale.seconds = number() as u32,
            "--transactions" => scale.transactions = number() as usize,
            figure => wanted.push(figure.to_owned()),
        }
    }
    let wants = |figure: &str| wanted.is_empty() || wanted.iter().any(|w| w == figure);
    let mut figures: Vec<Figure> = Vec::new();
    if wants("drain") {
        figures.extend(drain::measure(&scale));
    }
    if wants("publish") {
        figures.extend(publish::measure(&scale));
    }
    if wants("latency") {
        figures.extend(latency::measure(&scale));
    }
    if wants("memory") {
        figures.push(footprint::memory(&scale));
    }
    if wants("idle") {
        figures.extend(footprint::idle());
    }
    println!("\n| figure | ours | floor | ratio or difference | goal |\n|---|---|---|---|---|");
    for f in figures {
        println!("| {} | {} | {} | {} | {} |", f.name, f.ours, f.floor, f.ratio, f.goal);
    }
}

/// Servers as a user would run them: durable, with room for the load.
pub fn stack() -> Stack {
    Stack::with(&[
        ("fsync", "on"),
        ("shared_buffers", "512MB"),
        ("max_wal_size", "16GB"),
        ("checkpoint_timeout", "1h"),
        ("autovacuum", "off"),
    ])
}

/// The middle of some measurements.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The value below which a share (0 to 1) of the measurements lies.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() as f64 * share).ceil() as usize).saturating_sub(1)]
}

/// Waits for something to happen without disturbing it much.
pub fn poll_until(mut done: impl FnMut() -> bool) {
    while !done() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
