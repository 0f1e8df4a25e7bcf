//! The command line.

use relay::fault::Mutation;
use std::path::PathBuf;
use std::time::Duration;

use crate::acts;
use crate::plan::KINDS;

pub(crate) const USAGE: &str = "\
usage: chaos [OPTION]...
  --seed N          the first seed (default: by chance); a seed names a schedule of faults
  --seeds N         so many seeds, one after the other (default: 1, or what --minutes has time for)
  --minutes N       seeds, one after the other, until so much time has passed
  --seconds N       time of faults for each seed (default: 60)
  --sessions N      publishers (default: 8)
  --kinds A,B       faults of these kinds alone: postgres, points, redis, losses, network, settings;
                    and what people do: index, repack, truncate, sequence, locks, pause, stop, copy, clone
                    (or acts: all of these)
  --mutation NAME   break a promise of the relay (see relay/src/fault.rs); the run should fail
  --shipped         the library as it is shipped, without crash points
  --at-least-once   delivery = 'at_least_once': repeats are no violation, and Redis loses nothing
  --groups          trim = 'read', with consumer groups that are made and destroyed, and consumers that die
  --end-to-end      the other scenario: from a transaction of one Postgres to one of another, by consumers with an inbox
  --careless        of that scenario: consumers that do not ask the inbox; the run should fail
  --keep DIR        leave logs, streams and ledger there
  --plan            print the schedule, and do nothing
  --quiet           print faults only when something was violated";

pub(crate) struct Options {
    pub seed: u64,
    pub seeds: Option<u64>,
    pub total: Option<Duration>,
    pub time: Duration,
    pub sessions: u64,
    pub kinds: Vec<String>,
    pub mutation: Option<String>,
    pub faults: bool,
    pub at_least_once: bool,
    pub groups: bool,
    pub end_to_end: bool,
    pub careless: bool,
    pub keep: Option<PathBuf>,
    pub plan_only: bool,
    pub quiet: bool,
}

impl Options {
    pub(crate) fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Options {
            // Short enough to be typed.
            seed: uuid::Uuid::new_v4().as_u64_pair().0 % 1_000_000,
            seeds: None,
            total: None,
            time: Duration::from_secs(60),
            sessions: 8,
            kinds: all_kinds().map(str::to_string).collect(),
            mutation: None,
            faults: kit::env::has_faults(),
            at_least_once: false,
            groups: false,
            end_to_end: false,
            careless: false,
            keep: None,
            plan_only: false,
            quiet: false,
        };
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or(format!("{word} needs a value"));
            match word.as_str() {
                "--seed" => options.seed = number(&value()?)?,
                "--seeds" => options.seeds = Some(number(&value()?)?),
                "--minutes" => options.total = Some(Duration::from_secs(60 * number(&value()?)?)),
                "--seconds" => options.time = Duration::from_secs(number(&value()?)?),
                "--sessions" => options.sessions = number(&value()?)?,
                "--kinds" => options.kinds = kinds(&value()?)?,
                "--mutation" => options.mutation = Some(value()?.parse::<Mutation>()?.name().to_owned()),
                "--shipped" => options.faults = false,
                "--at-least-once" => options.at_least_once = true,
                "--groups" => options.groups = true,
                "--end-to-end" => options.end_to_end = true,
                "--careless" => options.careless = true,
                "--keep" => options.keep = Some(value()?.into()),
                "--plan" => options.plan_only = true,
                "--quiet" => options.quiet = true,
                "--help" => return Err("breaks everything around the relay at random".to_string()),
                _ => return Err(format!("{word} is no option")),
            }
        }
        if options.mutation.is_some() && !options.faults {
            return Err("a mutation needs the library built with the feature faults".to_string());
        }
        Ok(options)
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text} is no number"))
}

fn all_kinds() -> impl Iterator<Item = &'static str> {
    KINDS.iter().chain(acts::KINDS).copied()
}

fn kinds(text: &str) -> Result<Vec<String>, String> {
    let mut kinds = Vec::new();
    for kind in text.split(',') {
        if kind == "acts" {
            kinds.extend(acts::KINDS.iter().map(|kind| kind.to_string()));
        } else if all_kinds().any(|known| known == kind) {
            kinds.push(kind.to_string());
        } else {
            let known: Vec<&str> = all_kinds().collect();
            return Err(format!("{kind} is none of {}, acts", known.join(", ")));
        }
    }
    Ok(kinds)
}
