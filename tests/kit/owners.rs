//! Several Postgres servers that share one Redis and, up to some point, their history: which of them owns the guard.

use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::relay::{publish_many, standing, wait_drained, wait_trouble};
use crate::wait::{wait_eq, wait_until};
use crate::{Guard, Postgres, Redis, Stack, Standing};

/// Settings with which a silent owner counts as dead after [`PATIENCE`], and streams are never trimmed: each entry
/// counts.
pub const WATCHFUL: &[(&str, &str)] = &[
    ("outbox_relay.poll_interval", "200ms"),
    ("outbox_relay.redis_max_len", "0"),
    ("outbox_relay.retry_delay", "50ms"),
    ("outbox_relay.retry_max_delay", "200ms"),
];

/// Settings of a publisher and its subscriber.
pub const LOGICAL: &[(&str, &str)] = &[
    ("wal_level", "logical"),
    ("wal_receiver_status_interval", "1s"),
    // On a loaded machine, Postgres must not give up because of a timeout.
    ("wal_sender_timeout", "0"),
    ("wal_receiver_timeout", "0"),
    ("max_replication_slots", "40"),
];

/// Three of the owner's intervals.
pub const PATIENCE: Duration = Duration::from_millis(600);

/// The guard of a server's backend `default`, if there is one.
#[track_caller]
pub fn guard(pg: &Postgres, redis: &Redis) -> Option<Guard> {
    redis.guard(&pg.one::<String>("select outbox.guard_key('default')"))
}

/// Whether the guard names this server.
#[track_caller]
pub fn owns(pg: &Postgres, redis: &Redis) -> bool {
    let place = format!("{}#", pg.data_dir().display());
    guard(pg, redis).is_some_and(|guard| guard.field("place").contains(&place))
}

/// Waits until this server owns the guard and has no error. Returns how long that took.
#[track_caller]
pub fn wait_owner(pg: &Postgres, redis: &Redis) -> Duration {
    let start = Instant::now();
    wait_until(&format!("{} to own the guard", pg.data_dir().display()), || {
        owns(pg, redis)
    });
    wait_eq("the owner's state", "idle".to_string(), || {
        standing(pg, "default").state
    });
    start.elapsed()
}

/// Waits until the backend `default` of `pg` is fenced because `owner` has the guard.
#[track_caller]
pub fn wait_fenced(pg: &Postgres, owner: &Postgres) -> Standing {
    wait_trouble(pg, "default", "fenced", &format!("{}#", owner.data_dir().display()))
}

/// Waits until the standby has replayed all commits of the primary.
#[track_caller]
pub fn wait_caught_up(primary: &Postgres, standby: &Postgres) {
    // Its commit flushes earlier commits that did not wait, such as those of the cursors. (The commit of a transaction
    // that wrote nothing flushes nothing.)
    primary.exec("select pg_logical_emit_message(true, 'kit', '')");
    let lsn: String = primary.one("select pg_current_wal_flush_lsn()::text");
    wait_until("the standby to have caught up", || {
        standby.one::<bool>(&format!("select pg_last_wal_replay_lsn() >= '{lsn}'"))
    });
}

/// Waits until the one subscriber has everything that this server has committed.
#[track_caller]
pub fn wait_applied(publisher: &Postgres) {
    let lsn: String = publisher.one("select pg_current_wal_lsn()::text");
    wait_until("the subscriber to catch up", || {
        publisher.one::<bool>(&format!(
            "select coalesce(bool_and(confirmed_flush_lsn >= '{lsn}'), false) from pg_replication_slots where slot_name in ('old', 'move')"
        ))
    });
}

/// `outbox.take_over('default')`.
#[track_caller]
pub fn take_over(pg: &Postgres) {
    pg.exec("select outbox.take_over('default')");
}

/// Events of the types `<prefix>1` and so on for the backend `default`, in one transaction.
#[track_caller]
pub fn publish(pg: &Postgres, prefix: &str, count: i32) -> Vec<Uuid> {
    publish_many(&mut pg.client(), "default", "", prefix, count)
}

/// Publishes three events and waits until they are delivered, also according to the saved cursor.
#[track_caller]
pub fn delivered(stack: &Stack, prefix: &str) -> Vec<Uuid> {
    let there = stack.events().len();
    let sent = publish(&stack.pg, prefix, 3);
    stack.wait_events(there + 3);
    wait_drained(&stack.pg, "default");
    sent
}
