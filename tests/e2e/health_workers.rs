//! `outbox.health()`: why a database has no worker that works, whatever has happened to the server. The hint, executed
//! as it stands, mends it.

use kit::{Postgres, QUICK, Redis, Stack, eventually, process, wait_drained, wait_eq};
use nix::sys::signal::Signal;
use std::time::Duration;

use crate::health::{NAMED_WITHIN, check, follow, health, health_of, quick, wait_ill, wait_well};

#[test]
fn a_database_that_was_renamed_is_named() {
    let stack = quick();
    stack.pg.set("outbox_relay.databases", "postgres,shop");
    stack.pg.exec("create database shop");
    stack.pg.exec_db("shop", "create extension outbox_relay");
    stack.pg.wait_worker("shop");
    stack.pg.exec("alter database shop rename to store");
    let worker = || check(&health_of(&stack.pg, "store", "1 h"), "worker");
    let named = || {
        let found = worker();
        found.detail.contains("which leaves out \"store\"").then_some(found)
    };
    let ill = eventually("the setting to be named", NAMED_WITHIN, named);
    let state = "select s.state || ' ' || b.state from outbox.status s, outbox.backend_status b";
    let state: String = stack.pg.one_db("store", state);
    assert_eq!(state, "database not in outbox_relay.databases stopped");
    follow(&stack.pg, "store", &ill);
    wait_eq("the worker", "ok".to_owned(), || worker().status);
}

#[test]
fn a_name_that_takes_the_database_out_is_taken_away() {
    let mut stack = quick();
    for (setting, mended) in [
        ("*,!postgres", "*"),
        ("!postgres", "postgres"),
        ("!post*, !other", "!other"),
        ("shop,!postgres", "shop,postgres"),
        ("", "postgres"),
    ] {
        stack.pg.set("outbox_relay.databases", setting);
        // Also of a server that has had no worker there.
        stack.pg.restart();
        let ill = wait_ill(&stack.pg, "worker", "which leaves out \"postgres\"");
        let hint = ill.hint.clone().unwrap_or_default();
        assert!(hint.contains(&format!("databases = '{mended}';")), "{setting}: {hint}");
        follow(&stack.pg, "postgres", &ill);
        wait_well(&stack.pg, "worker");
    }
}

#[test]
fn a_database_that_allows_no_connections_is_named() {
    let stack = quick();
    stack.pg.exec("create database shop");
    stack.pg.exec_db("shop", "create extension outbox_relay");
    let worker = stack.pg.wait_worker("shop");
    let mut inside = stack.pg.client_db("shop");
    stack.pg.exec("alter database shop allow_connections false");
    process::signal(worker, Signal::SIGTERM);
    let mut ask = |column: &str| -> String {
        let sql = format!("select {column} from outbox.health() where \"check\" = 'worker'");
        inside.query_one(&sql, &[]).expect("a row").get(0)
    };
    wait_eq(
        "the cause",
        "Connections to \"shop\" are not allowed, so no worker can come.".to_owned(),
        || ask("detail"),
    );
    let hint = ask("hint");
    stack.pg.exec(hint.strip_prefix("Run ").expect("a command"));
    wait_eq("the worker", "ok".to_owned(), || ask("status"));
}

#[test]
fn a_launcher_that_hangs_is_named() {
    let stack = quick();
    let launcher: i32 = stack.pg.one("select outbox.launcher_pid()");
    let worker = stack.pg.wait_worker("postgres");
    process::signal(launcher, Signal::SIGSTOP);
    process::signal(worker, Signal::SIGTERM);
    let said = format!("Process {launcher} (\"outbox_relay launcher\") should have started");
    let ill = eventually(
        "the launcher to be named",
        NAMED_WITHIN + Duration::from_secs(5),
        || {
            let found = check(&health(&stack.pg), "worker");
            found.detail.contains(&said).then_some(found)
        },
    );
    let cure = format!("kill -CONT {launcher}");
    assert!(ill.hint.is_some_and(|hint| hint.contains(&cure)));
    process::signal(launcher, Signal::SIGCONT);
    wait_well(&stack.pg, "worker");
}

#[test]
fn a_server_without_a_process_for_the_launcher_is_named() {
    let mut pg = Postgres::with(&[("max_worker_processes", "0"), ("max_logical_replication_workers", "0")]).start();
    pg.extension();
    pg.exec("select outbox.publish_event('one', 'kit')");
    let ill = wait_ill(&pg, "worker", "the process \"outbox_relay launcher\" has none");
    follow(&pg, "postgres", &ill);
    pg.restart();
    wait_well(&pg, "worker");
}

#[test]
fn the_library_is_added_to_others_that_are_preloaded() {
    if kit::env::lacks(&["auto_explain", "pg_prewarm"]) {
        return;
    }
    let mut pg = Postgres::with(&[("shared_preload_libraries", "auto_explain, pg_prewarm")]).start();
    pg.extension();
    let ill = wait_ill(&pg, "worker", "The library is not preloaded");
    follow(&pg, "postgres", &ill);
    pg.restart();
    wait_well(&pg, "worker");
    let preloaded: String = pg.one("show shared_preload_libraries");
    assert_eq!(preloaded, "auto_explain, pg_prewarm, outbox_relay");
}

/// Whatever it is that the worker cannot do: it says so where `health()` looks.
#[test]
fn a_worker_that_cannot_work_says_why() {
    let mut stack = Stack::of(Postgres::with(QUICK), Redis::start());
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    // While it is at work, and one that begins.
    stack
        .pg
        .exec("alter table outbox.cursors add constraint never check (backend_number > 1000) not valid");
    stack.publish("two");
    let ill = wait_ill(&stack.pg, "worker", "violates check constraint \"never\"");
    assert_eq!(ill.status, "fail");
    assert!(ill.detail.contains("The worker was saving cursors"), "{ill:?}");
    stack.pg.exec("alter table outbox.cursors drop constraint never");
    wait_well(&stack.pg, "worker");
    stack
        .pg
        .exec("alter table outbox.backends rename column host to hostname");
    stack.pg.restart();
    let ill = wait_ill(&stack.pg, "worker", "cannot begin: ");
    assert!(ill.detail.contains("The worker was loading the backends"), "{ill:?}");
    assert_eq!(ill.status, "fail");
    let states: String = stack
        .pg
        .one("select s.state || ' ' || b.state from outbox.status s, outbox.backend_status b");
    assert_eq!(states, "failing to start stopped");
    follow(&stack.pg, "postgres", &check(&health(&stack.pg), "columns"));
    wait_well(&stack.pg, "worker");
    stack.publish("three");
    stack.wait_events(3);
}

/// Test frameworks empty all tables. A guard's name without an id would be that of other servers, too.
#[test]
fn an_installation_without_its_id_is_named_and_claims_no_guard() {
    let mut stack = quick();
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    stack.pg.exec("delete from outbox.installation");
    // It delivers as before.
    wait_ill(&stack.pg, "installation", "outbox.installation is empty");
    stack.publish("two");
    stack.wait_events(2);
    wait_drained(&stack.pg, "default");
    let shown: i64 = stack.pg.one("select count(*) from outbox.backend_status");
    assert_eq!(shown, 1);
    stack.pg.restart();
    stack.publish("three");
    let ill = wait_ill(&stack.pg, "worker", "outbox.installation is empty");
    assert_eq!(
        ill.hint.as_deref(),
        check(&health(&stack.pg), "installation").hint.as_deref()
    );
    let guards: Vec<String> = redis::cmd("KEYS")
        .arg("outbox_relay:guard:*")
        .query(&mut stack.redis.conn())
        .expect("KEYS");
    assert_eq!(guards.len(), 1, "{guards:?}");
    follow(&stack.pg, "postgres", &ill);
    wait_well(&stack.pg, "worker");
    wait_well(&stack.pg, "installation");
    stack.wait_events(3);
    wait_drained(&stack.pg, "default");
    assert_eq!(stack.events().len(), 3);
}
