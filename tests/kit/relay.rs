//! The relay's own status, and publishing in bulk.

use std::time::{Duration, Instant};

use ::postgres::Client;
use uuid::Uuid;

use crate::{Entry, LIMIT, Postgres, wait_until};

/// Settings with which all waits and timeouts are a fraction of a second.
pub const QUICK: &[(&str, &str)] = &[
    ("outbox_relay.retry_delay", "50ms"),
    ("outbox_relay.retry_max_delay", "200ms"),
    ("outbox_relay.redis_connect_timeout", "300ms"),
    ("outbox_relay.redis_socket_timeout", "300ms"),
];

/// A row of `outbox.backend_status`, with the columns that tests use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    pub state: String,
    pub pending: i64,
    pub published: i64,
    pub failed: i64,
    pub last_error: Option<String>,
    /// Whether `next_attempt_at` is set.
    pub will_try_again: bool,
}

#[track_caller]
pub fn standing(pg: &Postgres, backend: &str) -> Standing {
    let row = pg
        .client()
        .query_one(
            "select state, pending, published_total, failed_total, last_error, next_attempt_at is not null \
             from outbox.backend_status where backend = $1",
            &[&backend],
        )
        .unwrap_or_else(|error| panic!("cannot look at backend {backend}: {error:?}"));
    Standing {
        state: row.get(0),
        pending: row.get(1),
        published: row.get(2),
        failed: row.get(3),
        last_error: row.get(4),
        will_try_again: row.get(5),
    }
}

/// Waits until a backend is in this state with an error that contains `error`.
#[track_caller]
pub fn wait_trouble(pg: &Postgres, backend: &str, state: &str, error: &str) -> Standing {
    let deadline = Instant::now() + LIMIT;
    loop {
        let last = standing(pg, backend);
        if last.state == state && last.last_error.as_ref().is_some_and(|e| e.contains(error)) {
            return last;
        }
        if Instant::now() >= deadline {
            panic!("waited {LIMIT:?} for backend {backend} to be {state} with {error:?}; it is {last:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until nothing of a backend is pending, according to its saved cursor.
#[track_caller]
pub fn wait_drained(pg: &Postgres, backend: &str) {
    wait_until(&format!("all events of {backend} to be delivered"), || {
        standing(pg, backend).pending == 0
    });
}

/// Publishes events of the types `<prefix>1` to `<prefix><count>` to a backend in one transaction; `stream` NULL if
/// empty.
#[track_caller]
pub fn publish_many(client: &mut Client, backend: &str, stream: &str, prefix: &str, count: i32) -> Vec<Uuid> {
    client
        .query(
            "select outbox.publish_event($1 || n, 'kit', backend => $2, stream => nullif($3, '')) \
             from pg_catalog.generate_series(1, $4) n order by n",
            &[&prefix, &backend, &stream, &count],
        )
        .unwrap_or_else(|error| panic!("cannot publish to {backend}: {error:?}"))
        .iter()
        .map(|row| row.get(0))
        .collect()
}

/// The event_ids of entries.
#[track_caller]
pub fn ids(entries: &[Entry]) -> Vec<Uuid> {
    let id = |entry: &Entry| entry.field("event_id").parse().expect("event_id is a uuid");
    entries.iter().map(id).collect()
}

/// Each event_id once, in the order of the first occurrences.
#[track_caller]
pub fn first_ids(entries: &[Entry]) -> Vec<Uuid> {
    let mut seen = std::collections::HashSet::new();
    ids(entries).into_iter().filter(|id| seen.insert(*id)).collect()
}

/// The event_types of entries.
#[track_caller]
pub fn types(entries: &[Entry]) -> Vec<&str> {
    entries.iter().map(|entry| entry.field("event_type")).collect()
}

/// Runs a statement that nothing of the relay may block. It takes some hundredths of a second, but machines are busy.
#[track_caller]
pub fn promptly(pg: &Postgres, sql: &str) {
    const LIMIT: Duration = Duration::from_secs(2);
    let start = Instant::now();
    pg.exec(sql);
    let took = start.elapsed();
    assert!(took < LIMIT, "{sql} took {took:?}");
}
