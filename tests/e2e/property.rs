//! Sessions do at random whatever a transaction can do, backends are paused and the worker is ended at random, and a
//! ledger kept in the same transactions says which events must have arrived, in which order.
//!
//! `OUTBOX_PROPERTY_SEED` repeats a failure (but for the timing of the processes), `OUTBOX_PROPERTY_SECONDS` sets the
//! duration.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kit::ledger::KEYS;
use kit::postgres::{DB, USER};
use kit::{Dice, LIMIT, Ledger, Stack, Verdict};
use postgres::{Client, Config, Error, NoTls};

const SESSIONS: usize = 6;
const BACKENDS: [&str; 3] = ["default", "second", "third"];

/// Counts of what the sessions have done, to check that the schedule was varied.
#[derive(Debug, Default)]
struct Tally {
    commits: AtomicUsize,
    aborts: AtomicUsize,
    savepoints: AtomicUsize,
    prepared: AtomicUsize,
    long: AtomicUsize,
    /// Deadlocks, which the schedule causes and not the relay.
    refused: AtomicUsize,
}

fn count(counter: &AtomicUsize) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

/// One statement of a transaction: one to three events of one key, by function or by INSERT.
fn publish(client: &mut Client, dice: &mut Dice) -> Result<(), Error> {
    let key = format!("k{}", dice.below(KEYS as u64));
    let backend = BACKENDS[dice.below(3) as usize];
    let (plain, count) = (dice.one_in(3), 1 + dice.below(3) as i32);
    client.execute(
        "select publish_logged($1, $2, $3) from generate_series(1, $4)",
        &[&key, &backend, &plain, &count],
    )?;
    Ok(())
}

/// The inner part of a transaction: events, savepoints that are kept or rolled back, and pauses.
fn body(client: &mut Client, dice: &mut Dice, tally: &Tally) -> Result<(), Error> {
    for _ in 0..=dice.below(4) {
        if dice.one_in(4) {
            count(&tally.savepoints);
            client.batch_execute("savepoint a")?;
            publish(client, dice)?;
            if dice.one_in(3) {
                client.batch_execute("savepoint b")?;
                publish(client, dice)?;
                client.batch_execute(if dice.one_in(2) { "rollback to b" } else { "release b" })?;
            }
            client.batch_execute(if dice.one_in(2) { "rollback to a" } else { "release a" })?;
        } else {
            publish(client, dice)?;
        }
        if dice.one_in(60) {
            // Others commit meanwhile, and the worker's cursor passes the number of this transaction.
            count(&tally.long);
            std::thread::sleep(Duration::from_millis(20 + dice.below(300)));
        }
    }
    Ok(())
}

fn transaction(client: &mut Client, dice: &mut Dice, tally: &Tally, name: &str) -> Result<(), Error> {
    client.batch_execute("begin")?;
    if let Err(error) = body(client, dice, tally) {
        count(&tally.refused);
        client.batch_execute("rollback")?;
        // A deadlock is caused by the schedule; any other error is not.
        return match error.code().map(postgres::error::SqlState::code) {
            Some("40P01") => Ok(()),
            _ => Err(error),
        };
    }
    match dice.below(10) {
        0..2 => {
            count(&tally.aborts);
            client.batch_execute("rollback")
        }
        2..4 => {
            count(&tally.prepared);
            client.batch_execute(&format!("prepare transaction '{name}'"))?;
            if dice.one_in(3) {
                std::thread::sleep(Duration::from_millis(dice.below(50)));
            }
            let end = if dice.one_in(3) { "rollback" } else { "commit" };
            client.batch_execute(&format!("{end} prepared '{name}'"))
        }
        _ => {
            count(&tally.commits);
            client.batch_execute("commit")
        }
    }
}

fn session(config: Config, number: usize, seed: u64, stop: Arc<AtomicBool>, tally: Arc<Tally>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut dice = Dice::of(seed, number as u64);
        let mut client = config.connect(NoTls).expect("a session");
        if dice.one_in(2) {
            client.batch_execute("set synchronous_commit = off").expect("a setting");
        }
        let name = format!("session{number}");
        while !stop.load(Ordering::Relaxed) {
            transaction(&mut client, &mut dice, &tally, &name)
                .unwrap_or_else(|error| panic!("session {number} failed: {error:?}"));
        }
    })
}

/// Runs the schedule for `time` and returns the ledger's verdict. `harass` is called repeatedly meanwhile.
fn run(name: &str, time: Duration, mut harass: impl FnMut(&Stack, &mut Dice)) -> Verdict {
    let seed = setting("OUTBOX_PROPERTY_SEED").unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
    let time = setting("OUTBOX_PROPERTY_SECONDS").map_or(time, Duration::from_secs);
    eprintln!("{name}: OUTBOX_PROPERTY_SEED={seed}");
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "0"), ("deadlock_timeout", "20ms")]);
    let mut ledger = Ledger::create(&stack.pg);
    for backend in &BACKENDS[1..] {
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port, stream_name) values ('{backend}', '127.0.0.1', {}, '{backend}')",
            stack.redis.port()
        ));
        ledger = ledger.and(backend, backend);
    }
    let (stop, tally) = (Arc::new(AtomicBool::new(false)), Arc::new(Tally::default()));
    let sessions: Vec<JoinHandle<()>> = (0..SESSIONS)
        .map(|number| {
            let config = stack.pg.config(USER, DB);
            session(config, number, seed, Arc::clone(&stop), Arc::clone(&tally))
        })
        .collect();
    let mut dice = Dice::new(seed);
    let start = Instant::now();
    while start.elapsed() < time && !sessions.iter().any(JoinHandle::is_finished) {
        harass(&stack, &mut dice);
        std::thread::sleep(Duration::from_millis(20 + dice.below(200)));
    }
    stop.store(true, Ordering::Relaxed);
    for session in sessions {
        session.join().expect("a session failed");
    }
    stack
        .pg
        .exec("update outbox.backends set enabled = true where not enabled");
    let verdict = ledger.settle(&stack, LIMIT);
    eprintln!(
        "{name}: {} events, {} repeats, {tally:?}",
        verdict.committed,
        verdict.duplicates.len()
    );
    for (what, counter) in [
        ("commits", &tally.commits),
        ("aborts", &tally.aborts),
        ("savepoints", &tally.savepoints),
        ("prepared", &tally.prepared),
        ("long", &tally.long),
    ] {
        assert!(counter.load(Ordering::Relaxed) > 0, "no {what} in {tally:?}");
    }
    assert!(!stack.pg.log().contains("reinitializing"), "the server restarted");
    verdict
}

/// Nothing may be repeated either: no process is killed, and Redis is healthy.
#[test]
fn any_schedule_of_transactions_arrives_once_and_in_order() {
    run("transactions", Duration::from_secs(10), |_, _| {}).assert_exactly_once();
}

#[test]
fn any_schedule_arrives_whatever_becomes_of_backends_and_worker() {
    let verdict = run("harassed", Duration::from_secs(12), |stack, dice| {
        if dice.one_in(2) {
            // Any one of them, or the last one, which was paused for long.
            let backend = BACKENDS[1 + dice.below(2) as usize];
            stack.pg.exec(&format!(
                "update outbox.backends set enabled = not enabled where name = '{backend}'"
            ));
        }
        if dice.one_in(3)
            && let Some(worker) = stack.pg.worker_pid("postgres")
        {
            stack.pg.exec(&format!("select pg_terminate_backend({worker})"));
        }
    });
    verdict.assert_exactly_once();
}
