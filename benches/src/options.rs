//! How much is measured, and which figures: `bench [--quick] [--runs N] [--events N] ... [FIGURE...]`.

/// How much to do.
#[derive(Debug, Clone)]
pub(crate) struct Scale {
    /// Interleaved runs of each pair.
    pub runs: usize,
    /// Waiting events of a drain.
    pub events: u64,
    /// Waiting events of the largest backlog.
    pub backlog: u64,
    /// Seconds of one load: of pgbench, and of paced publishers.
    pub seconds: u32,
    /// Events in one bulk statement.
    pub bulk: u64,
    /// Seconds for which an idle worker is watched.
    pub idle_seconds: u32,
    /// Minutes of steady publishing; 0: none.
    pub steady_minutes: f64,
    /// Pending events of a rival's drain; django-broadcaster, which sends one at a time, gets a 50th.
    pub rival_events: u64,
}

impl Scale {
    /// The options for the figures of docs/performance.md.
    const FULL: Self = Self {
        runs: 5,
        events: 1_000_000,
        backlog: 10_000_000,
        seconds: 10,
        bulk: 100_000,
        idle_seconds: 60,
        steady_minutes: 30.0,
        rival_events: 200_000,
    };

    /// For daily use: ten minutes.
    const QUICK: Self = Self {
        runs: 1,
        events: 100_000,
        backlog: 200_000,
        seconds: 1,
        bulk: 30_000,
        idle_seconds: 5,
        steady_minutes: 0.15,
        rival_events: 20_000,
    };
}

pub(crate) struct Options {
    pub quick: bool,
    pub scale: Scale,
    /// Names of figures; none: all.
    pub wanted: Vec<String>,
}

impl Options {
    /// From the command line; `known`: the names of all figures.
    pub(crate) fn parse(arguments: impl Iterator<Item = String>, known: &[&str]) -> Result<Self, String> {
        let arguments: Vec<String> = arguments.collect();
        let quick = arguments.iter().any(|a| a == "--quick");
        let mut scale = if quick { Scale::QUICK } else { Scale::FULL };
        let mut wanted = Vec::new();
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut number = || -> Result<f64, String> {
                let value = arguments.next().ok_or(format!("{argument} needs a number"))?;
                value.parse().map_err(|_| format!("{argument} {value}: not a number"))
            };
            match argument.as_str() {
                "--quick" => {}
                "--runs" => scale.runs = (number()? as usize).max(1),
                "--events" => scale.events = number()? as u64,
                "--backlog" => scale.backlog = number()? as u64,
                "--seconds" => scale.seconds = number()? as u32,
                "--bulk" => scale.bulk = number()? as u64,
                "--idle-seconds" => scale.idle_seconds = number()? as u32,
                "--steady-minutes" => scale.steady_minutes = number()?,
                "--rival-events" => scale.rival_events = number()? as u64,
                figure if known.contains(&figure) => wanted.push(figure.to_owned()),
                other => return Err(format!("{other}: neither an option nor one of {}", known.join(", "))),
            }
        }
        Ok(Self { quick, scale, wanted })
    }

    pub(crate) fn wants(&self, figure: &str) -> bool {
        // Installing rivals takes longer than the rest of a quick run.
        let is_usual = !(self.quick && figure == "rivals");
        (self.wanted.is_empty() && is_usual) || self.names(figure)
    }

    /// Whether it was asked for by name.
    pub(crate) fn names(&self, figure: &str) -> bool {
        self.wanted.iter().any(|w| w == figure)
    }
}
