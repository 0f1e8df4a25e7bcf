//! `outbox.health()`: servers that are broken on purpose. It names each fault with its cause; its hint, executed
//! literally, corrects it.

use kit::owners::{WATCHFUL, take_over, wait_fenced, wait_owner};
use kit::{Postgres, QUICK, Redis, Stack, eventually, publish_many, tell, wait_drained, wait_eq, wait_until};
use std::time::Duration;

/// Each fault is named within this time.
pub(crate) const NAMED_WITHIN: Duration = Duration::from_secs(10);

/// A row of `outbox.health()`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Check {
    pub name: String,
    pub status: String,
    pub detail: String,
    pub hint: Option<String>,
}

pub(crate) fn health_of(pg: &Postgres, db: &str, old: &str) -> Vec<Check> {
    let sql = format!("select \"check\", status, detail, hint from outbox.health('{old}')");
    let rows = pg.client_db(db).query(&sql, &[]).expect("its health");
    rows.iter()
        .map(|row| Check {
            name: row.get(0),
            status: row.get(1),
            detail: row.get(2),
            hint: row.get(3),
        })
        .collect()
}

pub(crate) fn health(pg: &Postgres) -> Vec<Check> {
    health_of(pg, "postgres", "10 min")
}

pub(crate) fn check(checks: &[Check], name: &str) -> Check {
    let found = checks.iter().find(|check| check.name == name);
    found
        .unwrap_or_else(|| panic!("no check {name} in {checks:#?}"))
        .clone()
}

/// Waits until a check is not ok and its detail has these words; returns the check.
#[track_caller]
pub(crate) fn wait_ill(pg: &Postgres, name: &str, words: &str) -> Check {
    eventually(&format!("health() to say of {name}: {words}"), NAMED_WITHIN, || {
        let found = check(&health(pg), name);
        (found.status != "ok" && found.detail.contains(words)).then_some(found)
    })
}

#[track_caller]
pub(crate) fn wait_well(pg: &Postgres, name: &str) {
    wait_eq(&format!("the status of {name}"), "ok".to_string(), || {
        check(&health(pg), name).status
    });
}

/// The statements of a hint, which begins with "Run ".
fn statements(hint: &str) -> Vec<String> {
    let from = hint.find("Run ").or_else(|| hint.find("run ")).expect("a command") + 4;
    let text = &hint[from..=hint.rfind(';').expect("a statement")];
    let text = text.split(" or ").next().expect("the first way");
    text.split_inclusive(';').map(|sql| sql.trim().to_owned()).collect()
}

/// Executes the hint, statement by statement, as somebody at a prompt would.
#[track_caller]
pub(crate) fn follow(pg: &Postgres, db: &str, check: &Check) {
    let hint = check.hint.as_deref().expect("a hint");
    let mut client = pg.client_db(db);
    for sql in statements(hint).iter().filter(|sql| !sql.starts_with("and ")) {
        client
            .batch_execute(sql)
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
}

pub(crate) fn quick() -> Stack {
    Stack::of(Postgres::with(QUICK), Redis::start())
}

#[test]
fn all_is_well_where_nothing_is_wrong() {
    let stack = quick();
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    let checks = health(&stack.pg);
    for check in &checks {
        assert_eq!((check.status.as_str(), &check.hint), ("ok", &None), "{check:?}");
    }
    // Also for a role that may only read the views.
    stack.pg.exec("create role watcher login; grant pg_monitor to watcher");
    let seen = stack
        .pg
        .client_as("watcher", "postgres")
        .query("select * from outbox.health()", &[])
        .expect("a monitor may look");
    assert_eq!(seen.len(), checks.len());
}

#[test]
fn a_redis_that_is_down_or_hangs_is_named_with_its_address() {
    let mut stack = Stack::of(
        Postgres::with(QUICK).with(&[("outbox_relay.redis_socket_timeout", "300ms")]),
        Redis::start(),
    );
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    let address = format!("127.0.0.1:{}", stack.redis.port());
    stack.redis.sigstop();
    stack.publish("two");
    wait_ill(&stack.pg, "backend default", &address);
    stack.redis.sigcont();
    wait_well(&stack.pg, "backend default");
    stack.redis.kill9();
    stack.publish("three");
    let ill = wait_ill(&stack.pg, "backend default", "1 events wait");
    assert!(
        ill.detail.contains(&address) && ill.detail.contains("Connection refused"),
        "{ill:?}"
    );
    stack.redis.start_again();
    stack.pg.exec("select outbox.wake()");
    wait_well(&stack.pg, "backend default");
}

#[test]
fn the_statement_in_the_hint_corrects_a_wrong_password() {
    let stack = quick();
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    let mut admin = stack.redis.conn();
    tell(&mut admin, &["CONFIG", "SET", "requirepass", "right"]);
    tell(&mut admin, &["AUTH", "right"]);
    tell(&mut admin, &["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    stack.publish("two");
    let mut ill = wait_ill(&stack.pg, "backend default", "NOAUTH");
    ill.hint = ill.hint.map(|hint| hint.replace("...", "right"));
    follow(&stack.pg, "postgres", &ill);
    wait_well(&stack.pg, "backend default");
}

#[test]
fn a_session_that_keeps_events_in_an_old_transaction_is_named() {
    let stack = Stack::with(&[("max_prepared_transactions", "2")]);
    let mut forgotten = stack.pg.client();
    forgotten
        .batch_execute("begin; select outbox.publish_event('one', 'kit')")
        .expect("it publishes");
    let old = || health_of(&stack.pg, "postgres", "1 ms");
    let ill = check(&old(), "open transactions");
    assert_eq!(ill.status, "warn");
    let pid: i32 = forgotten
        .query_one("select pg_backend_pid()", &[])
        .expect("its pid")
        .get(0);
    assert!(ill.detail.contains(&format!("Process {pid} ")), "{ill:?}");
    assert_eq!(check(&health(&stack.pg), "open transactions").status, "ok");
    follow(&stack.pg, "postgres", &ill);
    wait_eq("open transactions", "ok".to_string(), || {
        check(&old(), "open transactions").status
    });
    stack
        .pg
        .exec("begin; select outbox.publish_event('two', 'kit'); prepare transaction 'left'");
    let ill = check(&old(), "prepared transactions");
    assert_eq!(ill.status, "warn");
    assert!(ill.detail.contains("'left'"), "{ill:?}");
    follow(&stack.pg, "postgres", &ill);
    assert_eq!(check(&old(), "prepared transactions").status, "ok");
    stack.wait_events(1);
}

#[test]
fn a_library_that_is_not_preloaded_is_named() {
    let mut pg = Postgres::with(&[("shared_preload_libraries", "")]).start();
    pg.extension();
    let ill = check(&health(&pg), "worker");
    assert_eq!(ill.status, "fail");
    assert_eq!(check(&health(&pg), "backend default").status, "fail");
    let state: String = pg.one("select state from outbox.backend_status");
    assert_eq!(state, "stopped");
    follow(&pg, "postgres", &ill);
    pg.restart();
    wait_well(&pg, "worker");
}

#[test]
fn settings_that_leave_the_database_out_are_named() {
    let stack = quick();
    for (setting, value) in [("outbox_relay.enabled", "off"), ("outbox_relay.databases", "other")] {
        stack.pg.set(setting, value);
        let ill = wait_ill(&stack.pg, "worker", setting);
        follow(&stack.pg, "postgres", &ill);
        wait_well(&stack.pg, "worker");
    }
}

#[test]
fn a_server_without_a_process_left_is_named() {
    let mut pg = Postgres::with(&[("max_worker_processes", "1"), ("max_logical_replication_workers", "0")]).start();
    pg.extension();
    let ill = wait_ill(&pg, "worker", "background worker processes are in use");
    follow(&pg, "postgres", &ill);
    pg.restart();
    wait_well(&pg, "worker");
}

/// With room for as many databases as half of `max_worker_processes`.
#[test]
fn a_server_without_a_slot_left_is_named() {
    let mut pg = Postgres::builder().faults().stopped();
    pg.mutation("few_database_slots");
    pg.start_again();
    let names: Vec<String> = (0..5).map(|n| format!("tenant{n}")).collect();
    for name in &names {
        pg.exec(&format!("create database {name}"));
        pg.exec_db(name, "create extension outbox_relay");
    }
    let worker = |name: &str| check(&health_of(&pg, name, "1 h"), "worker");
    let without = || {
        names
            .iter()
            .find(|name| worker(name).detail.contains("slots in shared memory"))
    };
    let ill = eventually("a database without a slot to be named", NAMED_WITHIN, || {
        without().map(|name| worker(name))
    });
    assert_eq!(ill.status, "fail");
    follow(&pg, "postgres", &ill);
    pg.restart();
    for name in &names {
        wait_eq(&format!("the worker of {name}"), "ok".to_string(), || {
            check(&health_of(&pg, name, "1 h"), "worker").status
        });
    }
}

#[test]
fn health_says_whether_the_lag_grows() {
    let stack = quick();
    stack.pg.exec("update outbox.backends set enabled = false");
    let publish = || publish_many(&mut stack.pg.client(), "default", "", "event", 3);
    publish();
    wait_ill(&stack.pg, "backend default", "3 events wait");
    wait_ill(&stack.pg, "backend default", "The lag does not grow: as many waited");
    publish();
    wait_ill(&stack.pg, "backend default", "The lag grows: 3 more wait than");
}

#[test]
fn the_cause_that_keeps_old_events_is_named() {
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[
            ("outbox_relay.published_retention", "1h"),
            ("outbox_relay.max_retries", "1000"),
        ]),
        Redis::start(),
    );
    stack.redis.call(&["SET", "wrong", "no stream"]);
    stack.pg.exec(
        "insert into outbox.events (xid, created_at, event_type, source, stream) values ('3', now() - interval '3 days', 'old', 'kit', 'wrong')",
    );
    let ill = wait_ill(&stack.pg, "retention", "Backend \"default\" has refused events");
    assert_eq!(ill.status, "warn");
    let refused = wait_ill(&stack.pg, "refused events", "WRONGTYPE");
    stack.redis.call(&["DEL", "wrong"]);
    stack.pg.exec("select outbox.wake()");
    wait_well(&stack.pg, "refused events");
    assert!(refused.hint.is_some_and(|hint| hint.contains("outbox.wake()")));
    follow(&stack.pg, "postgres", &ill);
}

#[test]
fn failed_events_are_named() {
    let stack = quick();
    stack.fail("default", &["one"]);
    let ill = wait_ill(&stack.pg, "failed events", "1 events have failed");
    stack.redis.call(&["DEL", "wrong"]);
    follow(&stack.pg, "postgres", &ill);
    wait_well(&stack.pg, "failed events");
    assert_eq!(stack.redis.wait_entries("wrong", 1).len(), 1);
}

#[test]
fn a_server_that_was_fenced_and_a_copied_database_are_named() {
    let stack = Stack::with(WATCHFUL);
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    let clone = stack.pg.base_backup().start();
    wait_fenced(&clone, &stack.pg);
    let ill = wait_ill(&clone, "backend default", "Another server owns its streams");
    assert!(
        ill.detail.contains(&stack.pg.data_dir().display().to_string()),
        "it says by whom: {ill:?}"
    );
    follow(&clone, "postgres", &ill);
    wait_owner(&clone, &stack.redis);
    wait_well(&clone, "backend default");
    // A take-over while the server still believes that it owns the streams is executed at once, and has no effect.
    wait_fenced(&stack.pg, &clone);
    take_over(&stack.pg);
    wait_owner(&stack.pg, &stack.redis);
    stack.pg.exec("create database copied template postgres");
    let copied = || check(&health_of(&stack.pg, "copied", "1 h"), "backend default");
    wait_until("the copy to be named", || copied().detail.contains("is a copy"));
    follow(&stack.pg, "copied", &copied());
    wait_eq("the copy", "ok".to_string(), || copied().status);
}

#[test]
fn objects_that_somebody_has_changed_are_named() {
    let stack = quick();
    for (sql, name, words) in [
        (
            "alter sequence outbox.events_seq_seq cache 50",
            "sequence",
            "other parameters",
        ),
        (
            "drop index outbox.events_event_id_idx",
            "indexes",
            "no index on (event_id, branch)",
        ),
        (
            "create function public.f() returns trigger language plpgsql as 'begin return new; end'; create trigger mine before insert on outbox.events for each row execute function public.f()",
            "foreign triggers",
            "\"mine\"",
        ),
        (
            "create publication all_of_it for table outbox.backends",
            "publications",
            "outbox.backends",
        ),
        (
            "create role plain superuser; update pg_extension set extowner = 'plain'::regrole where extname = 'outbox_relay'; alter role plain nosuperuser",
            "owner",
            "plain",
        ),
    ] {
        stack.pg.exec(sql);
        let ill = check(&health(&stack.pg), name);
        assert_ne!(ill.status, "ok", "{sql}");
        assert!(ill.detail.contains(words), "{ill:?}");
        follow(&stack.pg, "postgres", &ill);
        assert_eq!(check(&health(&stack.pg), name).status, "ok", "after {:?}", ill.hint);
    }
    stack.pg.exec("alter table outbox.ticks rename to clocks");
    let ill = check(&health(&stack.pg), "tables");
    assert_eq!(
        (ill.status.as_str(), ill.detail.as_str()),
        ("fail", "outbox.ticks is missing.")
    );
    stack.pg.exec("alter table outbox.clocks rename to ticks");
    wait_well(&stack.pg, "tables");
}

#[test]
fn a_paused_backend_is_named() {
    let stack = quick();
    stack.pg.exec("update outbox.backends set enabled = false");
    publish_many(&mut stack.pg.client(), "default", "", "event", 3);
    let ill = wait_ill(&stack.pg, "backend default", "3 events wait");
    assert_eq!(ill.status, "warn");
    follow(&stack.pg, "postgres", &ill);
    wait_well(&stack.pg, "backend default");
    wait_drained(&stack.pg, "default");
}
