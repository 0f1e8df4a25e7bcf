//! exactly_once against models of Postgres and Redis, over random schedules: crashes of worker and server, connections that end
//! anywhere, refusals, and a Redis that loses what it had acknowledged.

#[path = "../model/mod.rs"]
mod model;
mod oracle;
mod recovery;
mod site;
mod world;

use model::{caught, for_each_seed};
use std::cell::RefCell;
use world::{Mutant, Seen, World};

fn schedule(seed: u64, mutant: Mutant) -> Result<Seen, String> {
    World::new(seed, mutant).run()
}

#[test]
fn an_event_stands_in_its_stream_exactly_once() {
    mutate(None);
    for_each_seed(2_000, |seed| schedule(seed, Mutant::None).map(drop));
}

// SURVEY
#[test]
#[ignore]
fn survey() {
    mutate(None);
    let n = |name: &str, d: u64| std::env::var(name).map_or(d, |v| v.parse().unwrap());
    let mut all: std::collections::BTreeMap<String, (u64, Vec<u64>)> = Default::default();
    let start = std::time::Instant::now();
    let (first, count) = (n("FIRST", 0), n("SCHEDULES", 10_000));
    let mut total = vec![];
    for seed in first..first + count {
        let r = std::panic::catch_unwind(|| schedule(seed, Mutant::None));
        let e = match r {
            Ok(Ok(seen)) => {
                total.push(seen);
                continue;
            }
            Ok(Err(e)) => e.lines().next().unwrap().to_owned(),
            Err(p) => format!(
                "panic {:?}",
                p.downcast_ref::<String>()
                    .cloned()
                    .or(p.downcast_ref::<&str>().map(|s| s.to_string()))
            ),
        };
        let key: String = e.chars().filter(|c| !c.is_ascii_digit()).collect();
        let entry = all.entry(key).or_default();
        entry.0 += 1;
        entry.1.push(seed);
        entry.1.truncate(12);
    }
    for (k, v) in all {
        println!("{k}: {v:?}");
    }
    println!("{count} in {:?}", start.elapsed());
    if n("SUM", 0) == 1 {
        for s in total.iter().take(50) {
            println!("{s:?}");
        }
    }
}

#[cfg(feature = "faults")]
fn mutate(mutation: Option<&'static str>) {
    relay::fault::mutate(mutation);
}

#[cfg(not(feature = "faults"))]
fn mutate(_mutation: Option<&'static str>) {}
