//! The pictures in `docs/`, of what was measured in this run or before.

use crate::chart::{Axis, Bar, Colour, Line, Scale, bars, lines};
use crate::report::{Shelf, Taken, thousands};
use std::path::Path;

const OURS: Colour = Colour(0);
const FLOOR: Colour = Colour(1);
const OURS_TOO: Colour = Colour(6);
/// The colour of the first rival. There are four colours for rivals.
const RIVALS: usize = 2;

pub(crate) fn draw(shelf: &Shelf) {
    let rivals = shelf.load("rivals").unwrap_or_default();
    if let Some(taken) = shelf.load("drain") {
        write(&shelf.pictures, "drain", &drain(&taken, &rivals));
    }
    if let Some(svg) = shelf.load("latency").and_then(|taken| latency(&taken, &rivals)) {
        write(&shelf.pictures, "latency", &svg);
    }
    if let Some(svg) = shelf.load("backlog").and_then(|taken| backlog(&taken)) {
        write(&shelf.pictures, "backlog", &svg);
    }
}

fn write(directory: &Path, name: &str, svg: &str) {
    std::fs::create_dir_all(directory).expect("cannot make a directory for pictures");
    let path = directory.join(format!("{name}.svg"));
    std::fs::write(&path, svg).unwrap_or_else(|error| panic!("cannot write {path:?}: {error}"));
    eprintln!("{} drawn", path.display());
}

/// Points with their name and colour.
type Named<'a> = (&'a str, Colour, &'a [(f64, f64)]);

/// The rivals that were measured, with their colours: `NAME, WHAT` is a series.
fn rivals_of<'a>(rivals: &'a Taken, what: &str) -> Vec<Named<'a>> {
    let ends = format!(", {what}");
    let named = rivals
        .series
        .iter()
        .filter_map(|s| Some((s.name.strip_suffix(&ends)?, s.points.as_slice())));
    named
        .enumerate()
        .map(|(index, (name, points))| (name, Colour(RIVALS + index), points))
        .collect()
}

fn drain(taken: &Taken, rivals: &Taken) -> String {
    let bar = |name: &str, colour: Colour, points: &[(f64, f64)]| {
        let value = points.first().map_or(0.0, |point| point.1);
        Bar {
            name: name.to_owned(),
            colour,
            value,
            text: format!("{}/s", thousands(value.round() as u64)),
        }
    };
    let floor = ["redis-benchmark -c 1 -P 500", "COPY TO STDOUT"]
        .into_iter()
        .filter_map(|name| Some(bar(name, FLOOR, taken.series(name)?)))
        .min_by(|a, b| a.value.total_cmp(&b.value));
    let ours = [
        ("at_least_once, batch_size 1000", OURS_TOO),
        ("exactly_once, batch_size 1000", OURS_TOO),
        ("exactly_once, default settings", OURS),
    ];
    let ours = ours
        .into_iter()
        .filter_map(|(name, colour)| Some(bar(name, colour, taken.series(name)?)));
    let others = rivals_of(rivals, "drain");
    let others = others.iter().map(|(name, colour, points)| bar(name, *colour, points));
    let all: Vec<Bar> = floor.into_iter().chain(ours).chain(others).collect();
    bars(
        "Draining a backlog into a Redis stream",
        "events a second, 200 bytes of data each; grey: what Redis takes from redis-benchmark",
        &all,
    )
}

fn latency(taken: &Taken, rivals: &Taken) -> Option<String> {
    let mut all = vec![
        ("outbox_relay", OURS, taken.series("ours, 1")?),
        ("the application's XADD", FLOOR, taken.series("by itself, 1")?),
    ];
    all.extend(rivals_of(rivals, "latency"));
    let values = || all.iter().flat_map(|(_, _, points)| points.iter().map(|p| p.0));
    let (least, most) = (values().fold(f64::MAX, f64::min), values().fold(0.0, f64::max));
    let decades = (least.max(0.01).log10().floor() as i32)..=(most.log10().ceil() as i32);
    let y = Axis {
        label: "ms, from COMMIT to the consumer".to_owned(),
        scale: Scale::Log,
        from: 10f64.powi(*decades.start()),
        to: 10f64.powi(*decades.end()),
        ticks: decades.map(|d| (10f64.powi(d), plain(10f64.powi(d)))).collect(),
    };
    let percent = |share: f64| (share, format!("{share} %"));
    let x = Axis {
        label: "of the events had arrived within so many milliseconds".to_owned(),
        scale: Scale::Nines,
        from: 0.0,
        to: 99.9,
        ticks: [0.0, 50.0, 90.0, 99.0, 99.9].map(percent).to_vec(),
    };
    let drawn: Vec<Line> = all
        .iter()
        .map(|(name, colour, points)| Line {
            name: (*name).to_owned(),
            colour: *colour,
            points: points.iter().map(|&(ms, share)| (share, ms)).collect(),
            dots: false,
        })
        .collect();
    Some(lines(
        "Latency at 50 events a second",
        "lower is better; both axes are logarithmic",
        &x,
        &y,
        &drawn,
    ))
}

fn backlog(taken: &Taken) -> Option<String> {
    let points = taken.series("rate by size")?;
    let (first, last) = (points.first()?.0, points.last()?.0);
    let most = points.iter().map(|p| p.1).fold(0.0, f64::max);
    // A round number of hundred thousands above.
    let top = (most * 1.15 / 1e5).ceil() * 1e5;
    let x = Axis {
        label: "waiting events".to_owned(),
        scale: Scale::Log,
        from: first * 0.8,
        to: last * 1.25,
        ticks: points.iter().map(|p| (p.0, thousands(p.0 as u64))).collect(),
    };
    let y = Axis {
        label: String::new(),
        scale: Scale::Linear,
        from: 0.0,
        to: top,
        ticks: (0..=(top / 1e5) as u64)
            .map(|n| (n as f64 * 1e5, thousands(n * 100_000)))
            .collect(),
    };
    let line = Line {
        name: "default settings".to_owned(),
        colour: OURS,
        points: points.to_vec(),
        dots: true,
    };
    Some(lines(
        "Throughput over backlog",
        "events a second of a drain, exactly_once at default settings",
        &x,
        &y,
        &[line],
    ))
}

fn plain(value: f64) -> String {
    format!("{value}")
}
