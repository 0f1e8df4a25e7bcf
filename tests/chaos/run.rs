//! One seed: servers, load, faults, repair, verdict.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use redis::cmd;

use crate::groups::Groups;
use crate::load::{Load, Tally};
use crate::nemesis::Nemesis;
use crate::options::Options;
use crate::plan::{self, Fault};
use crate::postgres_faults::with_client;
use crate::site::{BACKENDS, CURSED, STREAMS, Site, place_of};
use crate::tail::Tail;
use crate::verdict::{self, Sin, Verdict};

/// By this time after the last fault, the backlog must be empty.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// How many violations of a kind are shown.
const SHOWN: usize = 3;

/// Returns whether nothing was violated.
pub(crate) fn run(seed: u64, time: Duration, options: &Options) -> bool {
    let plan = plan::draw(seed, time, &options.kinds);
    if options.plan_only {
        let faults: Vec<String> = plan
            .iter()
            .map(|(pause, fault)| format!("{pause:?} {fault:?}"))
            .collect();
        println!("seed {seed}: {}", faults.join("; "));
        return true;
    }
    let mut site = Site::start(
        options.faults,
        options.mutation.as_deref(),
        options.at_least_once,
        options.groups,
    );
    site.warm_up();
    let tail = Tail::start(&site);
    let mut load = Load::start(&site.pg, options.sessions, seed);
    let groups = options.groups.then(|| Groups::start(&site, seed));

    let mut nemesis = Nemesis::new(&mut site, &load.gate, options.quiet);
    nemesis.run(&plan);
    nemesis.repair_all();
    let (log, faults) = (std::mem::take(&mut nemesis.log), std::mem::take(&mut nemesis.counts));
    let hindered = std::mem::take(&mut nemesis.hindered);
    load.stop();
    groups.iter().for_each(Groups::finish);

    let redis_loses = site.exactly_once && plan.iter().any(|(_, fault)| fault.kind() == "losses");
    let drained = drain(&site, redis_loses);
    let ever = tail.stop();
    let (consumed, unread) = groups.map(|groups| groups.stop(&site)).unwrap_or_default();
    let mut verdict = verdict::judge(&site, &ever, site.exactly_once, redis_loses);
    let mut sin = |name, cases| verdict.sins.push(Sin { name, cases });
    unread.into_iter().for_each(|(name, cases)| sin(name, cases));
    sin("errors", counts(&load.tally.errors));
    sin("acts hindered", hindered);
    sin("stuck", drained.as_ref().err().cloned().into_iter().collect());
    let clean = verdict.is_clean();
    let faults: Vec<String> = faults.iter().map(|(name, count)| format!("{name} {count}")).collect();
    let drained = drained.map_or("not drained".to_string(), |time| {
        format!("drained in {:.1} s", time.as_secs_f64())
    });
    println!(
        "seed {seed}: {} in {} s; {} events committed ({} of them failed as they should, {} truncated), {}; {drained}, {}; faults: {}; acts: {}",
        if clean { "nothing violated" } else { "VIOLATED" },
        time.as_secs(),
        verdict.committed,
        verdict.failed,
        verdict.truncated,
        told(&load.tally),
        verdict.counts(),
        faults.join(", "),
        plan.iter().filter(|(_, fault)| matches!(fault, Fault::Act(_))).count()
    );
    if !consumed.is_empty() {
        println!("seed {seed}: {consumed}");
    }
    if !clean {
        show(&site, &verdict);
        if options.quiet {
            println!("--- faults\n{}", log.join("\n"));
        }
    }
    if let Some(dir) = &options.keep {
        keep(&site, &log, &dir.join(format!("seed-{seed}")));
    }
    clean
}

/// Waits until nothing is pending. `Err`: what is still pending, in words.
fn drain(site: &Site, redis_loses: bool) -> Result<Duration, String> {
    let start = Instant::now();
    loop {
        let left = left(site, redis_loses);
        if left.is_empty() {
            return Ok(start.elapsed());
        }
        if start.elapsed() > DRAIN_LIMIT {
            return Err(left);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn left(site: &Site, redis_loses: bool) -> String {
    let row = with_client(site, "look at the backlog", |client| {
        client.query_one(
            "select (select coalesce(sum(pending), 0)::bigint from outbox.backend_status), \
                 (select count(*) from outbox.scheduled_events), \
                 (select count(*) from chaos.ledger where stream is distinct from $1), \
                 (select count(*) from chaos.ledger where stream = $1), (select count(*) from outbox.failed_events), \
                 (select string_agg(backend || ' is ' || state || coalesce(': ' || last_error, ''), '; ') \
                     from outbox.backend_status)",
            &[&CURSED],
        )
    });
    let (pending, scheduled, expected): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
    let (cursed, failed): (i64, i64) = (row.get(3), row.get(4));
    let arrived: usize = site
        .stores
        .iter()
        .flat_map(|store| STREAMS.iter().map(|stream| site.arrived(store, stream)))
        .sum();
    let quiet = pending == 0 && scheduled == 0;
    if quiet && arrived as i64 >= expected && failed >= cursed {
        return String::new();
    }
    // Truncated events need not arrive. They are looked for one by one once nothing else is pending.
    if quiet && nothing_missing(site, redis_loses) {
        return String::new();
    }
    format!(
        "{pending} pending, {scheduled} scheduled, {arrived} of {expected} arrived, {failed} of {cursed} failed; {}",
        row.get::<_, Option<String>>(5).unwrap_or_default()
    )
}

fn nothing_missing(site: &Site, redis_loses: bool) -> bool {
    let dispensable = verdict::dispensable(&site.pg, redis_loses);
    if dispensable.is_empty() {
        return false;
    }
    let mut missing = verdict::ledger(&site.pg);
    missing.retain(|id, _| !dispensable.contains(id));
    let failed = with_client(site, "look at failed events", |client| {
        client.query("select event_id::text from outbox.failed_events", &[])
    });
    for row in &failed {
        missing.remove(row.get::<_, &str>(0));
    }
    for store in &site.stores {
        for stream in STREAMS {
            for entry in site.entries(store, stream) {
                entry
                    .get("event_id")
                    .and_then(|id| missing.remove(&place_of(id, stream)));
            }
        }
    }
    missing.is_empty()
}

fn counts(counters: &Mutex<BTreeMap<String, u64>>) -> Vec<String> {
    let counters = counters.lock().expect("nobody panics while counting");
    counters
        .iter()
        .map(|(name, count)| format!("{name} ({count})"))
        .collect()
}

fn told(tally: &Tally) -> String {
    let n = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    format!(
        "{} commits, {} prepared, {} hasty, {} aborts and {} savepoints with {} events aborted, refused: {}, {} thrown out",
        n(&tally.commits),
        n(&tally.prepared),
        n(&tally.hasty),
        n(&tally.aborts),
        n(&tally.savepoints),
        n(&tally.aborted_events),
        counts(&tally.refused).join(" "),
        n(&tally.thrown_out)
    )
}

/// Shows the first violations, what the guards hold, and what the server logged about backends.
fn show(site: &Site, verdict: &Verdict) {
    for sin in verdict.sins.iter().filter(|sin| !sin.cases.is_empty()) {
        println!("--- {} {}", sin.cases.len(), sin.name);
        for case in sin.cases.iter().take(SHOWN) {
            println!("    {case}");
        }
    }
    println!("--- guards");
    for backend in BACKENDS {
        println!("    {}: {}", backend.name, guard(site, backend.name, backend.store));
    }
    println!("--- the server's log of the relay");
    let log = site.pg.log();
    let said: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("outbox_relay") || line.contains("backend \""))
        .collect();
    for line in &said[said.len().saturating_sub(60)..] {
        println!("    {line}");
    }
}

fn guard(site: &Site, backend: &str, store: usize) -> String {
    let key = with_client(site, "ask for a guard", |client| {
        // Versions without guards have no such function.
        let known = client.query_one("select to_regprocedure('outbox.guard_key(text)') is not null", &[])?;
        if known.get(0) {
            let row = client.query_one("select outbox.guard_key($1)", &[&backend])?;
            return row.try_get::<_, Option<String>>(0);
        }
        Ok(None)
    });
    let Some(key) = key else { return "none".to_string() };
    let fields: Vec<String> = cmd("HGETALL")
        .arg(&key)
        .query(&mut site.stores[store].primary().conn())
        .unwrap_or_else(|error| vec![error.to_string()]);
    format!("{key} {}", fields.join(" "))
}

/// Keeps what is needed to understand a failure after the servers are gone.
fn keep(site: &Site, log: &[String], dir: &Path) {
    std::fs::create_dir_all(dir).unwrap_or_else(|error| panic!("cannot make {}: {error}", dir.display()));
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    };
    write("faults.log", &log.join("\n"));
    write("postgres.log", &site.pg.log());
    for (number, store) in site.stores.iter().enumerate() {
        for (node, redis) in store.nodes.iter().enumerate() {
            write(&format!("redis-{number}-{node}.log"), &redis.log());
        }
        for stream in STREAMS {
            let entries = site.entries(store, stream);
            let lines: Vec<String> = entries
                .iter()
                .map(|entry| format!("{} {}", entry.id, entry.get("event_id").unwrap_or_default()))
                .collect();
            write(&format!("stream-{number}-{stream}.txt"), &lines.join("\n"));
        }
    }
    let mut ledger: Vec<String> = verdict::ledger(&site.pg)
        .values()
        .map(|line| format!("{line:?}"))
        .collect();
    ledger.sort();
    write("ledger.txt", &ledger.join("\n"));
}
