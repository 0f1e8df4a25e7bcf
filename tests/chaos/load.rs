//! Sessions that publish in every way and end their transactions in every way; each writes the same to the ledger.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use kit::postgres::{DB, USER};
use kit::{Dice, Postgres};
use postgres::{Client, Config, Error, NoTls, Statement};

use crate::hasty::Hasty;
use crate::site::{BACKENDS, CURSED, NAMED};

const KEYS: u64 = 64;

/// What the sessions did, as far as the server told them.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub commits: AtomicU64,
    pub aborts: AtomicU64,
    /// Events in transactions or savepoints that were rolled back on purpose.
    pub aborted_events: AtomicU64,
    pub savepoints: AtomicU64,
    pub prepared: AtomicU64,
    pub hasty: AtomicU64,
    /// Connections that did not end on purpose.
    pub thrown_out: AtomicU64,
    /// Refused statements by SQLSTATE, as the schedule causes them: see [`REFUSALS`].
    pub refused: Mutex<BTreeMap<String, u64>>,
    /// Other errors of statements: there should be none.
    pub errors: Mutex<BTreeMap<String, u64>>,
}

/// Deadlocks, lock timeouts, and a sequence that has a wrong state or has reached its end.
const REFUSALS: &[&str] = &["40P01", "55P03", "55000", "2200H"];

/// The classes of errors with which a server that is stopped, or has no resources, ends a session.
const THROWN_OUT: &[&str] = &["08", "53", "57"];

fn count_in(counters: &Mutex<BTreeMap<String, u64>>, name: String) {
    let mut counters = counters.lock().expect("nobody panics while counting");
    *counters.entry(name).or_default() += 1;
}

/// Whether sessions may connect to the database.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    closed: AtomicBool,
}

impl Gate {
    /// All sessions leave when they have ended their transactions.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    pub(crate) fn open(&self) {
        self.closed.store(false, Ordering::Relaxed);
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    finish: Arc<AtomicBool>,
    pub tally: Arc<Tally>,
    pub gate: Arc<Gate>,
    sessions: Vec<JoinHandle<()>>,
    resolver: Option<JoinHandle<()>>,
}

impl Load {
    pub(crate) fn start(pg: &Postgres, sessions: u64, seed: u64) -> Self {
        let (stop, finish) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (tally, gate) = (Arc::new(Tally::default()), Arc::new(Gate::default()));
        let mut config = pg.config(USER, DB);
        config.application_name("publisher");
        let threads: Vec<JoinHandle<()>> = (0..sessions)
            .map(|number| {
                let mut session = Session {
                    config: config.clone(),
                    socket_dir: pg.host().to_path_buf(),
                    number,
                    incarnation: 0,
                    turn: 0,
                    dice: Dice::of(seed, number),
                    tally: Arc::clone(&tally),
                    gate: Arc::clone(&gate),
                };
                let stop = Arc::clone(&stop);
                std::thread::spawn(move || session.live(&stop))
            })
            .collect();
        let resolver = {
            let (config, dice) = (pg.config(USER, DB), Dice::of(seed, sessions));
            let (finish, gate) = (Arc::clone(&finish), Arc::clone(&gate));
            std::thread::spawn(move || resolve(&config, dice, &finish, &gate))
        };
        Load {
            stop,
            finish,
            tally,
            gate,
            sessions: threads,
            resolver: Some(resolver),
        }
    }

    /// Ends the sessions, then all prepared transactions.
    pub(crate) fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for session in self.sessions.drain(..) {
            session.join().expect("a publisher panicked");
        }
        self.finish.store(true, Ordering::Relaxed);
        if let Some(resolver) = self.resolver.take() {
            resolver.join().expect("the resolver panicked");
        }
    }
}

struct Session {
    config: Config,
    socket_dir: PathBuf,
    number: u64,
    /// Each connection is a session of its own in the ledger: a session that was terminated during its COMMIT cannot
    /// know when the COMMIT took effect.
    incarnation: u64,
    turn: i64,
    dice: Dice,
    tally: Arc<Tally>,
    gate: Arc<Gate>,
}

/// One call of chaos.publish().
struct Publication {
    key: String,
    count: i32,
    backend: &'static str,
    stream: Option<&'static str>,
    how: &'static str,
    padding: i32,
    due_in: Option<String>,
}

impl Session {
    fn live(&mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            if self.gate.is_closed() {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            }
            self.incarnation += 1;
            // Whatever ends the session, the ledger knows what was committed.
            if let Err(error) = self.connected(stop) {
                self.note(&error);
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    fn note(&self, error: &Error) {
        match error.as_db_error() {
            Some(said) if !THROWN_OUT.iter().any(|class| said.code().code().starts_with(class)) => {
                count_in(
                    &self.tally.errors,
                    format!("{}: {}", said.code().code(), said.message()),
                );
            }
            _ => count(&self.tally.thrown_out),
        }
    }

    fn name(&self) -> String {
        format!("s{}.{}", self.number, self.incarnation)
    }

    fn connected(&mut self, stop: &AtomicBool) -> Result<(), Error> {
        let mut client = self.config.connect(NoTls)?;
        client.batch_execute("set lock_timeout = '500ms'")?;
        if self.dice.one_in(2) {
            client.batch_execute("set synchronous_commit = off")?;
        }
        let publish =
            client.prepare("select chaos.publish($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::text::interval)")?;
        while !stop.load(Ordering::Relaxed) && !self.gate.is_closed() {
            self.turn += 1;
            if self.dice.one_in(30) {
                self.hasty_transaction();
            } else {
                self.transaction(&mut client, &publish)?;
            }
            std::thread::sleep(self.dice.millis(0, 50));
        }
        Ok(())
    }

    fn transaction(&mut self, client: &mut Client, publish: &Statement) -> Result<(), Error> {
        // The end is decided before the transaction begins: events of transactions that end at another time are ordered
        // only by their aggregates.
        let prepared = self.dice.one_in(8);
        client.batch_execute("begin")?;
        let mut events = 0;
        if let Err(error) = self.body(client, publish, prepared, &mut events) {
            return match error.code().map(postgres::error::SqlState::code) {
                Some(code) if REFUSALS.contains(&code) => {
                    count_in(&self.tally.refused, code.to_string());
                    client.batch_execute("rollback")
                }
                _ => Err(error),
            };
        }
        if self.dice.one_in(5) {
            client.batch_execute("rollback")?;
            count(&self.tally.aborts);
            self.tally.aborted_events.fetch_add(events, Ordering::Relaxed);
        } else if prepared {
            client.batch_execute(&format!("prepare transaction '{}.{}'", self.name(), self.turn))?;
            count(&self.tally.prepared);
        } else {
            client.batch_execute("commit")?;
            count(&self.tally.commits);
        }
        Ok(())
    }

    /// Statements, savepoints that are kept or rolled back, and now and then a long pause.
    fn body(
        &mut self,
        client: &mut Client,
        publish: &Statement,
        prepared: bool,
        events: &mut u64,
    ) -> Result<(), Error> {
        for _ in 0..self.dice.between(1, 4) {
            if self.dice.one_in(4) {
                count(&self.tally.savepoints);
                client.batch_execute("savepoint a")?;
                let outer = self.publish(client, publish, prepared)?;
                let mut inner = 0;
                if self.dice.one_in(3) {
                    client.batch_execute("savepoint b")?;
                    inner = self.publish(client, publish, prepared)?;
                    if self.dice.one_in(2) {
                        client.batch_execute("rollback to b")?;
                        self.tally.aborted_events.fetch_add(inner, Ordering::Relaxed);
                        inner = 0;
                    } else {
                        client.batch_execute("release b")?;
                    }
                }
                if self.dice.one_in(2) {
                    client.batch_execute("rollback to a")?;
                    self.tally.aborted_events.fetch_add(outer + inner, Ordering::Relaxed);
                } else {
                    client.batch_execute("release a")?;
                    *events += outer + inner;
                }
            } else {
                *events += self.publish(client, publish, prepared)?;
            }
            if self.dice.one_in(60) {
                // Others commit meanwhile, and the worker's cursor passes the number of this transaction.
                std::thread::sleep(self.dice.millis(20, 1_500));
            }
        }
        Ok(())
    }

    fn publish(&mut self, client: &mut Client, publish: &Statement, prepared: bool) -> Result<u64, Error> {
        let p = self.publication();
        client.execute(
            publish,
            &[
                &self.name(),
                &self.turn,
                &prepared,
                &p.key,
                &p.count,
                &p.backend,
                &p.stream,
                &p.how,
                &p.padding,
                &p.due_in,
            ],
        )?;
        Ok(p.count.unsigned_abs().into())
    }

    fn publication(&mut self) -> Publication {
        let dice = &mut self.dice;
        let backend = dice.pick(BACKENDS);
        let how = match backend.takes_rows() {
            true => "row",
            false if dice.one_in(8) => "routed",
            false => *dice.pick(&["call", "call", "insert", "batch"]),
        };
        let scheduled = how == "call" && dice.one_in(25);
        Publication {
            key: format!("k{}", dice.below(KEYS)),
            count: match how {
                "batch" if dice.one_in(40) => 500,
                "batch" => dice.between(1, 12) as i32,
                _ => dice.between(1, 3) as i32,
            },
            backend: backend.name,
            stream: match dice.below(60) {
                _ if backend.takes_rows() || how == "routed" => None,
                0 if !scheduled => Some(CURSED),
                1..12 => Some(NAMED),
                _ => None,
            },
            how,
            padding: if dice.one_in(10) { dice.below(5_000) as i32 } else { 0 },
            due_in: scheduled.then(|| format!("{} ms", dice.between(0, 2_500))),
        }
    }

    /// A transaction whose client leaves right after it has sent COMMIT.
    fn hasty_transaction(&mut self) {
        let p = self.publication();
        let text = |text: Option<&str>| text.map_or("null".to_string(), |text| format!("'{text}'"));
        let publish = format!(
            "begin; set local lock_timeout = '500ms'; \
             select chaos.publish('{}.hasty', {}, true, '{}', {}, '{}', {}, '{}', {}, {})",
            self.name(),
            self.turn,
            p.key,
            p.count,
            p.backend,
            text(p.stream),
            p.how,
            p.padding,
            text(p.due_in.as_deref()),
        );
        let sent = Hasty::connect(&self.socket_dir, USER, DB).and_then(|mut client| {
            client.run(&publish)?;
            client.send("commit")
        });
        if sent.is_ok() {
            count(&self.tally.hasty);
        }
    }
}

/// Ends prepared transactions at any later time, whichever session has prepared them and whatever has happened since.
fn resolve(config: &Config, mut dice: Dice, finish: &AtomicBool, gate: &Gate) {
    loop {
        let finishing = finish.load(Ordering::Relaxed);
        if gate.is_closed() {
            // Whoever closed the gate ends the prepared transactions.
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        // The server may be down; then again later.
        if let Ok(left) = config
            .connect(NoTls)
            .and_then(|mut client| resolve_some(&mut client, &mut dice, finishing))
            && finishing
            && left == 0
        {
            return;
        }
        std::thread::sleep(dice.millis(20, 150));
    }
}

/// Returns how many prepared transactions there were.
fn resolve_some(client: &mut Client, dice: &mut Dice, all: bool) -> Result<usize, Error> {
    let prepared = client.query("select gid from pg_catalog.pg_prepared_xacts order by prepared", &[])?;
    for row in &prepared {
        let gid: &str = row.get(0);
        if all || dice.one_in(4) {
            let end = if dice.one_in(3) { "rollback" } else { "commit" };
            client.batch_execute(&format!("{end} prepared '{gid}'"))?;
        }
    }
    Ok(prepared.len())
}
