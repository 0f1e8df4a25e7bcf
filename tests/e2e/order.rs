//! G3: in one stream, events whose transactions lock the same row are in order, and a transaction's events stay
//! together.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use kit::{Stack, types, wait_eq};
use postgres::Client;

fn lock(client: &mut Client) -> Result<(), postgres::Error> {
    client.batch_execute("update accounts set balance = balance + 1 where id = 1")
}

/// Session A begins and gets its transaction id first in all rounds; which session gets the row first alternates, and
/// each publishes another event before it asks for the row.
#[test]
fn the_second_transaction_to_lock_a_row_comes_second() {
    let stack = Stack::start();
    stack
        .pg
        .exec("create table accounts (id integer primary key, balance integer); insert into accounts values (1, 0)");
    for (round, first_is_a) in [true, false, true, false].into_iter().enumerate() {
        let (mut a, mut b) = (stack.pg.client(), stack.pg.client());
        for (session, name) in [(&mut a, 'a'), (&mut b, 'b')] {
            let sql = format!("begin; select outbox.publish_event('{round} {name} begins', 's', stream => 'own')");
            session.batch_execute(&sql).unwrap();
        }
        let (mut first, mut second) = if first_is_a { (a, b) } else { (b, a) };
        lock(&mut first).unwrap();
        let waiting = std::thread::spawn(move || {
            lock(&mut second).unwrap();
            let sql = format!("select outbox.publish_event('{round} second', 's'); commit");
            second.batch_execute(&sql).unwrap();
        });
        wait_eq("the second to wait for the row", 1i64, || {
            stack
                .pg
                .one("select count(*) from pg_stat_activity where wait_event_type = 'Lock'")
        });
        let sql = format!(
            "select outbox.publish_event('{round} first', 's'); \
             insert into outbox.events (event_type, source) values ('{round} first too', 's'); commit"
        );
        first.batch_execute(&sql).unwrap();
        waiting.join().unwrap();
    }
    let expected: Vec<String> = (0..4)
        .flat_map(|round| ["first", "first too", "second"].map(|name| format!("{round} {name}")))
        .collect();
    assert_eq!(types(&stack.wait_events(12)), expected);
    assert_eq!(stack.redis.wait_entries("own", 8).len(), 8);
}

/// A small generator whose seed is printed when the test fails.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// One transaction of random work: some keys, each with a new version under the row's lock and its event, also recorded
/// in the ledger; with savepoints that are rolled back, pauses, aborts, and two-phase commits.
fn work(client: &mut Client, random: &mut Random, serial: &AtomicU64) {
    client.batch_execute("begin").unwrap();
    let mut keys: Vec<u64> = (0..1 + random.below(3)).map(|_| random.below(6)).collect();
    // All sessions use one order, or they would deadlock.
    keys.sort_unstable();
    for key in keys {
        let bump = format!(
            "with v as (update keys set version = version + 1 where key = {key} returning key, version) \
             insert into ledger select key, version from v returning version"
        );
        let publish = |version: i64, random: &mut Random| match random.below(2) {
            0 => format!("select outbox.publish_event('{key}', '{version}')"),
            _ => format!("insert into outbox.events (event_type, source) values ('{key}', '{version}')"),
        };
        if random.below(4) == 0 {
            client.batch_execute("savepoint s").unwrap();
            let version: i64 = client.query_one(&bump, &[]).unwrap().get(0);
            client.batch_execute(&publish(version, random)).unwrap();
            client.batch_execute("rollback to s").unwrap();
        }
        let version: i64 = client.query_one(&bump, &[]).unwrap().get(0);
        client.batch_execute(&publish(version, random)).unwrap();
        if random.below(10) == 0 {
            client.batch_execute("select pg_sleep(0.005)").unwrap();
        }
    }
    match random.below(10) {
        0 => client.batch_execute("rollback").unwrap(),
        1 => {
            let name = serial.fetch_add(1, Ordering::Relaxed);
            client.batch_execute(&format!("prepare transaction 'p{name}'")).unwrap();
            let end = if random.below(3) == 0 { "rollback" } else { "commit" };
            client.batch_execute(&format!("{end} prepared 'p{name}'")).unwrap();
        }
        _ => client.batch_execute("commit").unwrap(),
    }
}

/// The ledger, written in the same transactions, holds the truth: every version of every key once, in order.
#[test]
fn every_key_stays_in_order_under_eight_sessions() {
    const SESSIONS: u64 = 8;
    const TRANSACTIONS: u64 = 150;
    let stack = Stack::with(&[("outbox_relay.redis_max_len", "0"), ("max_prepared_transactions", "20")]);
    stack.pg.exec(
        "create table keys (key bigint primary key, version bigint not null default 0); \
         insert into keys select generate_series(0, 5); \
         create table ledger (key bigint, version bigint, primary key (key, version))",
    );
    let seed = u64::from_le_bytes(uuid::Uuid::new_v4().as_bytes()[..8].try_into().unwrap()) | 1;
    println!("seed {seed}");
    let serial = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for session in 0..SESSIONS {
            let (stack, serial) = (&stack, &serial);
            scope.spawn(move || {
                let mut random = Random(seed.wrapping_mul(2 * session + 1));
                let mut client = stack.pg.client();
                for _ in 0..TRANSACTIONS {
                    work(&mut client, &mut random, serial);
                }
            });
        }
    });
    let mut ledger: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let rows = stack
        .pg
        .client()
        .query(
            "select key::text, version::text from ledger order by key, ledger.version",
            &[],
        )
        .unwrap();
    for row in &rows {
        ledger.entry(row.get(0)).or_default().push(row.get(1));
    }
    assert!(rows.len() > 1_000, "only {} events", rows.len());
    let mut streamed: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for entry in stack.wait_events(rows.len()) {
        streamed
            .entry(entry.field("event_type").to_string())
            .or_default()
            .push(entry.field("source").to_string());
    }
    assert_eq!(streamed, ledger);
}
