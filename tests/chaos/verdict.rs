//! Compares the ledger with the streams at the end, and with all that was ever in them.

use std::collections::{HashMap, HashSet};

use kit::postgres::DB;
use kit::{Entry, Postgres};
use postgres::Client;
use serde_json::{Map, Value};

use crate::site::{BACKENDS, CURSED, STREAMS, Site, place_of};

/// One event of the ledger.
#[derive(Debug)]
pub(crate) struct Line {
    /// See [`place_of`].
    pub id: String,
    event_id: String,
    seq: i64,
    xid: String,
    session: String,
    turn: i64,
    detached: bool,
    scheduled: bool,
    backend: String,
    stream: String,
    key: String,
    version: i64,
    event_type: String,
    source: String,
    subject: Option<String>,
    data: Value,
    config: Option<Value>,
}

/// A class of violations, and the evidence.
#[derive(Debug)]
pub(crate) struct Sin {
    pub name: &'static str,
    pub cases: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Verdict {
    pub committed: usize,
    pub failed: usize,
    /// Events whose rows TRUNCATE removed, so that nothing proves whether they were sent.
    pub truncated: usize,
    /// Repeats with at_least_once, which allows them.
    pub repeats: usize,
    pub sins: Vec<Sin>,
}

impl Verdict {
    pub(crate) fn is_clean(&self) -> bool {
        self.sins.iter().all(|sin| sin.cases.is_empty())
    }

    /// `lost 0, phantom 0, ...`
    pub(crate) fn counts(&self) -> String {
        let counts: Vec<String> = self
            .sins
            .iter()
            .map(|sin| format!("{} {}", sin.name, sin.cases.len()))
            .collect();
        let repeats = if self.repeats > 0 {
            format!(", repeated {}", self.repeats)
        } else {
            String::new()
        };
        counts.join(", ") + &repeats
    }
}

/// The findings, in the order of the report.
#[derive(Default)]
struct Findings {
    lost: Vec<String>,
    phantom: Vec<String>,
    duplicated: Vec<String>,
    disorder: Vec<String>,
    altered: Vec<String>,
    failed: Vec<String>,
}

/// The ledger of committed events.
pub(crate) fn ledger(pg: &Postgres) -> HashMap<String, Line> {
    let mut client = pg.client_db(DB);
    let rows = client
        .query(
            "select event_id::text, seq, xid::text, session, turn, detached, scheduled, backend, stream, key, version, event_type, \
                 source, subject, data, config, place \
             from chaos.ledger",
            &[],
        )
        .unwrap_or_else(|error| panic!("cannot read the ledger: {error:?}"));
    let lines = rows.iter().map(|row| {
        let backend: String = row.get(7);
        let (event_type, subject): (String, Option<String>) = (row.get(11), row.get(13));
        let default = || {
            let backend = BACKENDS
                .iter()
                .find(|known| known.name == backend)
                .expect("a backend of ours");
            backend.stream_of(&event_type, subject.as_deref())
        };
        Line {
            id: row.get(16),
            event_id: row.get(0),
            seq: row.get(1),
            xid: row.get(2),
            session: row.get(3),
            turn: row.get(4),
            detached: row.get(5),
            scheduled: row.get(6),
            stream: row.get::<_, Option<String>>(8).unwrap_or_else(default),
            backend,
            key: row.get(9),
            version: row.get(10),
            event_type,
            source: row.get(12),
            subject,
            data: row.get(14),
            config: row.get(15),
        }
    });
    lines.map(|line| (line.id.clone(), line)).collect()
}

/// Events that may be missing: TRUNCATE removed them before a cursor had passed them, or before Redis lost them.
pub(crate) fn dispensable(pg: &Postgres, redis_loses: bool) -> HashSet<String> {
    let mut client = pg.client_db(DB);
    let rows = client
        .query(
            "select l.place from chaos.truncated t \
                 join chaos.ledger l on l.event_id = t.event_id and (l.place = l.event_id::text or l.stream = t.stream) \
             where $1 or not t.delivered or l.stream = $2",
            &[&redis_loses, &CURSED],
        )
        .unwrap_or_else(|error| panic!("cannot read what was truncated: {error:?}"));
    rows.iter().map(|row| row.get(0)).collect()
}

/// `ever`: every event_id that was in a stream at any time. `once`: whether repeats are violations. `redis_loses`:
/// whether Redis lost anything.
pub(crate) fn judge(site: &Site, ever: &HashSet<String>, once: bool, redis_loses: bool) -> Verdict {
    let ledger = ledger(&site.pg);
    let mut dispensable = dispensable(&site.pg, redis_loses);
    let truncated = dispensable.len();
    // Even then, no event may be missing that a cursor had passed and that was never in a stream.
    let undelivered = self::dispensable(&site.pg, false);
    dispensable.retain(|id| undelivered.contains(id) || ever.contains(id));
    let mut findings = Findings::default();
    let mut arrived = HashSet::new();
    for (number, store) in site.stores.iter().enumerate() {
        for stream in STREAMS {
            let entries = site.entries(store, stream);
            judge_stream(number, stream, &entries, &ledger, &mut arrived, &mut findings);
        }
    }
    let failed = judge_failed(&mut site.pg.client_db(DB), &ledger, &mut findings);
    for line in ledger.values() {
        let arrived = arrived.contains(line.id.as_str()) || failed.contains(&line.id);
        if !arrived && !dispensable.contains(&line.id) {
            findings.lost.push(format!("{line:?}"));
        }
    }
    let phantoms = ever.iter().filter(|id| !ledger.contains_key(*id));
    findings
        .phantom
        .extend(phantoms.map(|id| format!("{id} stood there at some time")));
    let mut repeats = 0;
    if !once {
        repeats = findings.duplicated.len();
        findings.duplicated.clear();
    }
    let log = site.pg.log();
    let broken = log.lines().filter(|line| {
        ["PANIC:", "by signal 6", "by signal 11", "panicked at"]
            .iter()
            .any(|sign| line.contains(sign))
    });
    let sin = |name, cases| Sin { name, cases };
    Verdict {
        committed: ledger.len(),
        truncated,
        failed: failed.len(),
        repeats,
        sins: vec![
            sin("lost", findings.lost),
            sin("phantom", findings.phantom),
            sin("duplicated", findings.duplicated),
            sin("out of order", findings.disorder),
            sin("altered", findings.altered),
            sin("failed wrongly", findings.failed),
            sin("unlogged", unlogged(&site.pg)),
            sin("panics", broken.map(str::to_string).collect()),
        ],
    }
}

fn judge_stream<'a>(
    store: usize,
    stream: &str,
    entries: &[Entry],
    ledger: &'a HashMap<String, Line>,
    arrived: &mut HashSet<&'a str>,
    findings: &mut Findings,
) {
    // The last event of each aggregate, transaction and session, for each backend: nothing orders the events of two
    // backends in one stream.
    let mut of_key: HashMap<(&str, &str), (&Line, &str)> = HashMap::new();
    let mut of_transaction: HashMap<(&str, &str), (&Line, &str)> = HashMap::new();
    let mut of_session: HashMap<(&str, &str), (&Line, &str)> = HashMap::new();
    for entry in entries {
        let place = format!("{stream} {}", entry.id);
        let Some(line) = entry.get("event_id").and_then(|id| ledger.get(&place_of(id, stream))) else {
            findings.phantom.push(format!("{place}: {:?}", entry.fields));
            continue;
        };
        if !arrived.insert(&line.id) {
            findings.duplicated.push(format!("{place}: {line:?}"));
            continue;
        }
        if let Some(difference) = difference(line, entry, stream, store) {
            findings
                .altered
                .push(format!("{place}: {difference}: {:?}, {line:?}", entry.fields));
        }
        // Scheduled events are ordered by the moment when they fall due.
        if line.scheduled {
            continue;
        }
        let backend = line.backend.as_str();
        let mut check = |before: Option<(&Line, &str)>, what: &str, in_order: fn(&Line, &Line) -> bool| {
            if let Some((before, id)) = before
                && !in_order(before, line)
            {
                let case = format!("by {what}: {stream} {id}: {before:?}\n        stands before {place}: {line:?}");
                findings.disorder.push(case);
            }
        };
        let here = (line, entry.id.as_str());
        check(of_key.insert((backend, &line.key), here), "aggregate", |a, b| {
            a.version < b.version
        });
        check(
            of_transaction.insert((backend, &line.xid), here),
            "transaction",
            |a, b| a.seq < b.seq,
        );
        if !line.detached {
            check(of_session.insert((backend, &line.session), here), "session", |a, b| {
                a.turn <= b.turn
            });
        }
    }
}

/// How the entry differs from what was published.
fn difference(line: &Line, entry: &Entry, stream: &str, store: usize) -> Option<String> {
    let backend = BACKENDS.iter().find(|backend| backend.name == line.backend)?;
    if (backend.store, line.stream.as_str()) != (store, stream) {
        return Some(format!("it belongs into {} of store {}", line.stream, backend.store));
    }
    let mut expected: Vec<(String, String)> = vec![
        ("event_id".to_string(), line.event_id.clone()),
        ("event_type".to_string(), line.event_type.clone()),
        ("source".to_string(), line.source.clone()),
    ];
    if let Some(Value::Object(config)) = &line.config {
        for (name, value) in config {
            expected.push((name.clone(), value.as_str().unwrap_or_default().to_string()));
        }
    }
    for (name, value) in &expected {
        if entry.get(name) != Some(value) {
            return Some(format!("{name} is {:?}", entry.get(name)));
        }
    }
    // And timestamp and cloud_event.
    if entry.fields.len() != expected.len() + 2 {
        return Some(format!("it has {} fields", entry.fields.len()));
    }
    let Ok(Value::Object(event)) = serde_json::from_str(entry.get("cloud_event").unwrap_or_default()) else {
        return Some("cloud_event is no object".to_string());
    };
    let mut parts = Map::new();
    for (name, value) in [
        ("id", &line.event_id),
        ("type", &line.event_type),
        ("source", &line.source),
    ] {
        parts.insert(name.to_string(), Value::from(value.as_str()));
    }
    parts.insert("data".to_string(), line.data.clone());
    if let Some(subject) = &line.subject {
        parts.insert("subject".to_string(), Value::from(subject.as_str()));
    }
    for name in ["id", "type", "source", "data", "subject"] {
        if event.get(name) != parts.get(name) {
            return Some(format!("{name} of cloud_event is {:?}", event.get(name)));
        }
    }
    None
}

/// Rows of `outbox.events` that differ from what a trigger for each INSERT has logged.
fn unlogged(pg: &Postgres) -> Vec<String> {
    let rows = pg
        .client_db(DB)
        .query(
            "select event_id::text, seq, logged from chaos.unlogged order by seq",
            &[],
        )
        .unwrap_or_else(|error| panic!("cannot read what was not logged: {error:?}"));
    let case = |row: &postgres::Row| {
        let (id, seq, logged): (String, i64, Option<String>) = (row.get(0), row.get(1), row.get(2));
        format!("{id} with seq {seq}, logged: {logged:?}")
    };
    rows.iter().map(case).collect()
}

/// Events for the key that holds no stream must have failed, once each, and no others. Returns the ids of all that
/// failed as they should.
fn judge_failed(client: &mut Client, ledger: &HashMap<String, Line>, findings: &mut Findings) -> HashSet<String> {
    let rows = client
        .query("select event_id::text, last_error from outbox.failed_events", &[])
        .unwrap_or_else(|error| panic!("cannot read failed_events: {error:?}"));
    let mut failed = HashSet::new();
    for row in rows {
        let (id, error): (String, String) = (row.get(0), row.get(1));
        match ledger.get(&id) {
            Some(line) if line.stream == CURSED => drop(failed.insert(id)),
            Some(line) => findings.failed.push(format!("{error}: {line:?}")),
            None => findings.phantom.push(format!("{id} in failed_events: {error}")),
        }
    }
    failed
}
