//! Chaos: sessions publish in every way, everything around the relay is killed, frozen, disconnected and set back at
//! random, and then each committed event must be in its stream exactly once, in order and unchanged, and nothing else
//! anywhere.
//!
//! - [`options`] the command line
//! - [`plan`] which faults happen when, drawn from a seed
//! - [`site`] the servers; [`load`] and [`hasty`] the publishers; [`tail`] reads all streams all the time
//! - [`nemesis`] carries out the plan, by [`postgres_faults`], [`redis_faults`], [`settings_faults`]
//! - [`acts`] what people do to a server in ordinary weeks: [`dba`] does [`dba_acts`] beside everything else,
//!   [`copies`] are acts that must be alone
//! - [`groups`] consumer groups that come, go and die, with `trim = 'read'`
//! - [`end_to_end`] the other scenario: from one Postgres to another, with consumers in between
//! - [`verdict`] compares the ledger with the streams; [`run`] one seed from start to verdict
//!
//! A seed repeats the schedule, not the timing of the processes. `scripts/chaos` prepares what this needs.

mod acts;
mod copies;
mod dba;
mod dba_acts;
mod end_to_end;
mod groups;
mod hasty;
mod load;
mod nemesis;
mod options;
mod plan;
mod postgres_faults;
mod redis_faults;
mod run;
mod settings_faults;
mod site;
mod tail;
mod verdict;

use std::process::ExitCode;
use std::time::Instant;

use options::{Options, USAGE};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let Some((first, rest)) = words.split_first()
        && first == end_to_end::consumer::WORD
    {
        end_to_end::consumer::main(rest);
    }
    let options = match Options::parse(words.into_iter()) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("chaos: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let start = Instant::now();
    let mut violated = Vec::new();
    for turn in 0.. {
        let enough = match (options.seeds, options.total) {
            (Some(seeds), _) => turn >= seeds,
            (None, Some(total)) => start.elapsed() >= total,
            (None, None) => turn >= 1,
        };
        if enough {
            break;
        }
        let seed = options.seed + turn;
        let clean = match options.end_to_end {
            true => end_to_end::run(seed, &options),
            false => run::run(seed, options.time, &options),
        };
        if !clean {
            violated.push(seed.to_string());
        }
    }
    if violated.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("violated by the seeds {}", violated.join(", "));
    ExitCode::FAILURE
}
