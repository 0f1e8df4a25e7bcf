//! The ledger: what each transaction published, recorded in that transaction, and a verdict on the entries in the
//! streams.
//!
//! (The idea of Jepsen's checker `total-queue`: every committed id is accounted for as delivered, duplicated or lost,
//! and every delivered one as committed or a phantom.)

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::postgres::{Client, Config, NoTls};

use crate::postgres::{DB, USER};
use crate::stack::STREAM;
use crate::{Postgres, Redis, Stack};

/// Keys that publishers use in turn, `k0` and up: so few that publishers meet.
pub const KEYS: usize = 32;

const SCHEMA: &str = "
create table aggregates (key text primary key, version bigint not null default 0);
create table ledger (
    event_id uuid not null,
    seq      bigint generated always as identity,
    xid      xid8 not null default pg_current_xact_id(),
    backend  text not null,
    key      text not null,
    version  bigint not null,
    stream   text,
    primary key (event_id, backend)
);
-- The backends that an event goes to which names none.
create table routed (backend text);
-- Locks the aggregate's row, then publishes: so the events of one aggregate are in the order of their versions.
create function publish_logged(key text, backend text default $default, plain boolean default false, stream text default null)
    returns void
    language plpgsql as $$
declare
    v bigint;
    id uuid;
begin
    update aggregates a set version = a.version + 1 where a.key = publish_logged.key returning a.version into strict v;
    if plain then
        insert into outbox.events (event_type, source, data, subject, backend, stream)
            values ('changed', 'ledger', jsonb_build_object('version', v), key, backend, stream) returning event_id into id;
    else
        id := outbox.publish_event('changed', 'ledger', jsonb_build_object('version', v), key, backend, stream => stream);
    end if;
    insert into ledger (event_id, backend, key, version, stream)
        select id, b.name, publish_logged.key, v, publish_logged.stream
        from (select publish_logged.backend as name union all select r.backend from routed r where publish_logged.backend is null) b
        where b.name is not null;
end
$$;";

/// How the events of one backend are found.
#[derive(Debug, Clone)]
struct Stream {
    backend: String,
    name: String,
}

/// The tables `ledger` and `aggregates` of the database `postgres`, with a function `publish_logged(key, backend,
/// plain)`.
#[derive(Debug, Clone)]
pub struct Ledger {
    streams: Vec<Stream>,
}

impl Ledger {
    /// For the backend `default`.
    #[track_caller]
    pub fn create(pg: &Postgres) -> Self {
        Self::of(pg, "'default'")
    }

    /// For events that name no backend, and go by routes to `default` and to these backends, each with its stream.
    #[track_caller]
    pub fn of_routes(pg: &Postgres, further: &[(&str, &str)]) -> Self {
        let mut ledger = Self::of(pg, "null");
        pg.exec("insert into routed values ('default')");
        for (backend, stream) in further {
            pg.exec(&format!("insert into routed values ('{backend}')"));
            ledger = ledger.and(backend, stream);
        }
        ledger
    }

    /// `default`: the backend of events that are logged without naming one, as SQL.
    #[track_caller]
    fn of(pg: &Postgres, default: &str) -> Self {
        pg.exec(&SCHEMA.replace("$default", default));
        pg.exec(&format!(
            "insert into aggregates select 'k' || n from generate_series(0, {}) n",
            KEYS - 1
        ));
        let ledger = Ledger { streams: Vec::new() };
        ledger.and("default", STREAM)
    }

    /// And for another backend, in the same Redis.
    #[must_use]
    pub fn and(mut self, backend: &str, stream: &str) -> Self {
        self.streams.push(Stream {
            backend: backend.to_string(),
            name: stream.to_string(),
        });
        self
    }

    /// Waits until nothing is pending or missing, and compares. Events that are missing after `limit` are lost.
    #[track_caller]
    pub fn settle(&self, stack: &Stack, limit: Duration) -> Verdict {
        let deadline = Instant::now() + limit;
        loop {
            let pending: i64 = stack.pg.one("select sum(pending)::bigint from outbox.backend_status");
            if pending == 0 || Instant::now() >= deadline {
                let verdict = self.verdict(&stack.pg, &stack.redis);
                if verdict.lost.is_empty() || Instant::now() >= deadline {
                    return verdict;
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Compares the ledger with the streams in their present state.
    #[track_caller]
    pub fn verdict(&self, pg: &Postgres, redis: &Redis) -> Verdict {
        let mut verdict = Verdict::default();
        let mut client = pg.client();
        for stream in &self.streams {
            let committed = committed(&mut client, &stream.backend);
            let arrived: Vec<String> = redis
                .entries(&stream.name)
                .iter()
                .map(|entry| entry.field("event_id").to_string())
                .collect();
            verdict.add(stream, &committed.iter().collect::<Vec<_>>(), &arrived);
        }
        verdict
    }
}

impl Ledger {
    /// Compares the events published to each of these streams of a backend with those that `read` finds there (event
    /// ids).
    #[track_caller]
    pub fn verdict_of(pg: &Postgres, backend: &str, streams: &[String], read: impl Fn(&str) -> Vec<String>) -> Verdict {
        let mut verdict = Verdict::default();
        let mut client = pg.client();
        let committed = committed(&mut client, backend);
        for name in streams {
            let stream = Stream {
                backend: backend.to_string(),
                name: name.clone(),
            };
            let of_stream: Vec<&Line> = committed.iter().filter(|l| l.stream.as_ref() == Some(name)).collect();
            verdict.add(&stream, &of_stream, &read(name));
        }
        assert_eq!(
            verdict.committed,
            committed.len(),
            "events of streams that were not named"
        );
        verdict
    }
}

/// One line of the ledger.
#[derive(Debug)]
struct Line {
    id: String,
    seq: i64,
    xid: String,
    key: String,
    version: i64,
    stream: Option<String>,
}

fn committed(client: &mut Client, backend: &str) -> Vec<Line> {
    let rows = client
        .query(
            "select event_id::text, seq, xid::text, key, version, stream from ledger where backend = $1",
            &[&backend],
        )
        .unwrap_or_else(|error| panic!("cannot read the ledger: {error:?}"));
    rows.iter()
        .map(|row| Line {
            id: row.get(0),
            seq: row.get(1),
            xid: row.get(2),
            key: row.get(3),
            version: row.get(4),
            stream: row.get(5),
        })
        .collect()
}

/// The result of the comparison.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub committed: usize,
    /// Committed, but not in the stream.
    pub lost: Vec<String>,
    /// In the stream, but not committed (or not in the history that survived).
    pub phantoms: Vec<String>,
    /// In the stream more than once.
    pub duplicates: Vec<String>,
    /// First occurrences in another order than their transaction or their aggregate has.
    pub disorder: Vec<String>,
}

impl Verdict {
    fn add(&mut self, stream: &Stream, committed: &[&Line], arrived: &[String]) {
        self.committed += committed.len();
        let lines: HashMap<&str, &Line> = committed.iter().map(|line| (line.id.as_str(), *line)).collect();
        let mut seen = HashSet::new();
        let mut of_key: HashMap<&str, &Line> = HashMap::new();
        let mut of_transaction: HashMap<&str, &Line> = HashMap::new();
        for id in arrived {
            let Some(line) = lines.get(id.as_str()) else {
                self.phantoms.push(format!("{} {id}", stream.name));
                continue;
            };
            if !seen.insert(id.as_str()) {
                self.duplicates.push(format!("{} {line:?}", stream.name));
                continue;
            }
            if let Some(before) = of_key.insert(&line.key, line)
                && before.version >= line.version
            {
                self.disorder
                    .push(format!("{} {before:?} before {line:?}", stream.name));
            }
            if let Some(before) = of_transaction.insert(&line.xid, line)
                && before.seq >= line.seq
            {
                self.disorder
                    .push(format!("{} {before:?} before {line:?}", stream.name));
            }
        }
        let missing = committed.iter().filter(|line| !seen.contains(line.id.as_str()));
        self.lost
            .extend(missing.map(|line| format!("{} {line:?}", stream.name)));
    }

    /// All are in the streams, nothing else is, and in order; some may be repeated.
    #[track_caller]
    pub fn assert_at_least_once(&self) {
        let sins = [
            ("lost", &self.lost),
            ("phantoms", &self.phantoms),
            ("out of order", &self.disorder),
        ];
        for (sin, events) in sins {
            let shown: Vec<&String> = events.iter().take(5).collect();
            assert!(
                events.is_empty(),
                "{} of {} events are {sin}: {shown:#?}",
                events.len(),
                self.committed
            );
        }
    }

    /// The same, and none is repeated.
    #[track_caller]
    pub fn assert_exactly_once(&self) {
        self.assert_at_least_once();
        let shown: Vec<&String> = self.duplicates.iter().take(5).collect();
        assert!(
            self.duplicates.is_empty(),
            "{} repeats: {shown:#?}",
            self.duplicates.len()
        );
    }
}

/// Sessions that publish with `publish_logged` until they are told to stop, and connect again whenever they are
/// terminated.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    transactions: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// `setup` is run at the start of each session: `set synchronous_commit = off`.
    pub fn start(pg: &Postgres, sessions: usize, setup: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let transactions = Arc::new(AtomicU64::new(0));
        let threads = (0..sessions)
            .map(|session| {
                let (stop, transactions) = (Arc::clone(&stop), Arc::clone(&transactions));
                let (config, setup) = (pg.config(USER, DB), setup.to_string());
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        // Whatever ends the session, the ledger knows what was committed.
                        if run_session(&config, &setup, session, &stop, &transactions).is_err() {
                            std::thread::sleep(Duration::from_millis(10));
                        }
                    }
                })
            })
            .collect();
        Load {
            stop,
            transactions,
            threads,
        }
    }

    /// One session that commits 100 transactions a second, which publish `rate` events in all; `stream`: an expression
    /// of their number `n`.
    pub fn paced(pg: &Postgres, rate: usize, stream: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let transactions = Arc::new(AtomicU64::new(0));
        let thread = {
            let (stop, transactions) = (Arc::clone(&stop), Arc::clone(&transactions));
            let config = pg.config(USER, DB);
            let (keys, count) = (KEYS, rate / 100);
            let logged = format!("publish_logged('k' || n % {keys}, stream => {stream})");
            let publish = format!("select count({logged}) from generate_series(1, {count}) n");
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if run_paced(&config, &publish, &stop, &transactions).is_err() {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                }
            })
        };
        Load {
            stop,
            transactions,
            threads: vec![thread],
        }
    }

    /// Commits by all sessions so far, as far as they were confirmed.
    pub fn transactions(&self) -> u64 {
        self.transactions.load(Ordering::Relaxed)
    }

    /// Waits until there are this many more commits.
    #[track_caller]
    pub fn wait_more(&self, count: u64) {
        let goal = self.transactions() + count;
        crate::wait_until(&format!("{count} more transactions"), || self.transactions() >= goal);
    }

    #[track_caller]
    pub fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("a publisher panicked");
        }
        self.transactions()
    }
}

impl Drop for Load {
    /// A test that fails must not leave them running.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn run_paced(
    config: &Config,
    publish: &str,
    stop: &AtomicBool,
    transactions: &AtomicU64,
) -> Result<(), ::postgres::Error> {
    let mut client = config.connect(NoTls)?;
    let publish = client.prepare(publish)?;
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        client.execute(&publish, &[])?;
        transactions.fetch_add(1, Ordering::Relaxed);
        next += Duration::from_millis(10);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

fn run_session(
    config: &Config,
    setup: &str,
    session: usize,
    stop: &AtomicBool,
    transactions: &AtomicU64,
) -> Result<(), ::postgres::Error> {
    let mut client = config.connect(NoTls)?;
    client.batch_execute(setup)?;
    let publish = client.prepare("select publish_logged('k' || $1::bigint, plain => $2)")?;
    let mut turn = session as i64;
    while !stop.load(Ordering::Relaxed) {
        // Two events of one aggregate, and every third time an aborted transaction before them.
        if turn % 3 == 0 {
            let mut aborted = client.transaction()?;
            aborted.execute(&publish, &[&(turn % KEYS as i64), &false])?;
            aborted.rollback()?;
        }
        let mut transaction = client.transaction()?;
        for plain in [false, true] {
            transaction.execute(&publish, &[&(turn % KEYS as i64), &plain])?;
        }
        transaction.commit()?;
        transactions.fetch_add(1, Ordering::Relaxed);
        turn += 1;
    }
    Ok(())
}
