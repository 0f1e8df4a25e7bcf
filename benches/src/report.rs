//! The table, and the results of a run below `target/bench`, so that figures can be measured one by one and shown
//! together.

use crate::stats::{median, median_difference, median_ratio};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The goal of a figure.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
    /// Only shown.
    None,
}

impl Goal {
    fn reached(self, value: f64) -> Option<bool> {
        match self {
            Goal::AtLeast(goal) => Some(value >= goal),
            Goal::AtMost(goal) => Some(value <= goal),
            Goal::None => None,
        }
    }
}

/// One line of the table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Row {
    pub figure: String,
    pub ours: String,
    pub floor: String,
    pub ratio: String,
    pub goal: String,
    pub reached: Option<bool>,
}

impl Row {
    /// Rates compared with a bound, measured alternately; higher is better.
    pub(crate) fn rate(figure: impl Into<String>, ours: &[f64], floor: &[f64], goal: Goal) -> Self {
        let ratio = median_ratio(ours, floor);
        Row {
            figure: figure.into(),
            ours: per_second(median(ours)),
            floor: per_second(median(floor)),
            ratio: share(ratio),
            goal: text(goal, 2, ""),
            reached: goal.reached(ratio),
        }
    }

    /// Times in milliseconds as a difference.
    pub(crate) fn later(figure: impl Into<String>, ours: &[f64], floor: &[f64], goal: Goal) -> Self {
        let difference = median_difference(ours, floor);
        Row {
            figure: figure.into(),
            ours: format!("{:.2} ms", median(ours)),
            floor: format!("{:.2} ms", median(floor)),
            ratio: format!("{difference:+.2} ms"),
            goal: text(goal, 2, " ms"),
            reached: goal.reached(difference),
        }
    }

    /// Times in milliseconds as a ratio.
    pub(crate) fn longer(figure: impl Into<String>, ours: &[f64], floor: &[f64], goal: Goal) -> Self {
        let ratio = median_ratio(ours, floor);
        Row {
            figure: figure.into(),
            ours: format!("{:.2} ms", median(ours)),
            floor: format!("{:.2} ms", median(floor)),
            ratio: share(ratio),
            goal: text(goal, 2, ""),
            reached: goal.reached(ratio),
        }
    }

    /// A figure without a comparison.
    pub(crate) fn plain(figure: impl Into<String>, value: f64, digits: usize, unit: &str, goal: Goal) -> Self {
        Row {
            figure: figure.into(),
            ours: format!("{value:.digits$}{unit}"),
            floor: String::new(),
            ratio: String::new(),
            goal: text(goal, digits.min(2), unit),
            reached: goal.reached(value),
        }
    }

    /// A share or ratio of two figures of the relay.
    pub(crate) fn ratio(figure: impl Into<String>, ratio: f64, goal: Goal) -> Self {
        Row {
            figure: figure.into(),
            ours: String::new(),
            floor: String::new(),
            ratio: share(ratio),
            goal: text(goal, 2, ""),
            reached: goal.reached(ratio),
        }
    }

    /// A figure that could not be measured, and the reason.
    pub(crate) fn missing(figure: impl Into<String>, why: &str) -> Self {
        Row {
            figure: figure.into(),
            ours: why.to_owned(),
            floor: String::new(),
            ratio: String::new(),
            goal: String::new(),
            reached: None,
        }
    }
}

/// Points of a plot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// The results of one family of figures.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Taken {
    pub rows: Vec<Row>,
    pub series: Vec<Series>,
    /// The options of the run.
    #[serde(default)]
    pub options: String,
}

impl Taken {
    pub(crate) fn series(&self, name: &str) -> Option<&[(f64, f64)]> {
        let found = self.series.iter().find(|s| s.name == name)?;
        Some(&found.points)
    }
}

/// Where results and pictures are kept. Those of a quick run are kept separately: they are not for readers.
pub(crate) struct Shelf {
    results: PathBuf,
    pub pictures: PathBuf,
}

impl Shelf {
    pub(crate) fn new(quick: bool) -> Self {
        let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or("target".into());
        let results = PathBuf::from(target).join(if quick { "bench/quick" } else { "bench" });
        Self {
            pictures: if quick { results.clone() } else { "docs".into() },
            results,
        }
    }

    pub(crate) fn save(&self, family: &str, taken: &Taken) {
        std::fs::create_dir_all(&self.results).expect("cannot make a directory for the results");
        let text = serde_json::to_string(taken).expect("it can be written as JSON");
        std::fs::write(self.place(family), text).expect("cannot keep what was measured");
    }

    /// The results of this run or an earlier one.
    pub(crate) fn load(&self, family: &str) -> Option<Taken> {
        let text = std::fs::read_to_string(self.place(family)).ok()?;
        serde_json::from_str(&text).ok()
    }

    fn place(&self, family: &str) -> PathBuf {
        self.results.join(format!("{family}.json"))
    }
}

pub(crate) fn table(rows: &[Row]) -> String {
    let mut text =
        "| figure | ours | floor | ratio or difference | goal | reached |\n|---|---|---|---|---|---|\n".to_owned();
    for row in rows {
        let reached = match row.reached {
            Some(true) => "yes",
            Some(false) => "**no**",
            None => "",
        };
        let cells = [&row.figure, &row.ours, &row.floor, &row.ratio, &row.goal];
        for cell in cells {
            text += &format!("| {cell} ");
        }
        text += &format!("| {reached} |\n");
    }
    text
}

const BEGIN: &str = "<!-- figures: written by `make bench BENCH_ARGS=document` -->\n";
const END: &str = "<!-- end of figures -->\n";

/// Where figures are shown.
const DOCUMENT: &str = "docs/performance.md";

/// Puts a text between the marks in the document.
pub(crate) fn write_document(figures: &str) {
    let document = std::fs::read_to_string(DOCUMENT).expect("run it at the top of the checkout");
    let (before, rest) = document.split_once(BEGIN).expect("it has a place for figures");
    let (_, after) = rest.split_once(END).expect("which ends");
    std::fs::write(DOCUMENT, format!("{before}{BEGIN}{figures}{END}{after}")).expect("cannot write the document");
}

/// `1234567` as `1,234,567`.
pub(crate) fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).expect("digits"))
        .collect();
    groups.join(",")
}

fn share(ratio: f64) -> String {
    match ratio < 0.1 {
        true => format!("{ratio:.4}"),
        false => format!("{ratio:.2}"),
    }
}

fn per_second(rate: f64) -> String {
    format!("{}/s", thousands(rate.round() as u64))
}

fn text(goal: Goal, digits: usize, unit: &str) -> String {
    match goal {
        Goal::AtLeast(value) => format!("≥ {value:.digits$}{unit}"),
        Goal::AtMost(value) => format!("≤ {value:.digits$}{unit}"),
        Goal::None => String::new(),
    }
}
