//! `ALTER EXTENSION outbox_relay UPDATE` under load, and a library beside an extension of another version: it says so,
//! sends nothing, and loses nothing. The test makes the scripts of the next and the last version itself, because there
//! is only one version yet.

use kit::{LIMIT, Ledger, Load, Postgres, Redis, Stack, UNTRIMMED, env, wait_eq, wait_until};

const OURS: &str = env!("CARGO_PKG_VERSION");
const OLDER: &str = "0.0.9";
const NEWER: &str = "99.0.0";

/// What a typical update does: it takes exclusive locks, changes a table, and replaces a function.
const UPDATE: &str = "
    lock table outbox.backends, outbox.events, outbox.cursors in access exclusive mode;
    alter table outbox.events set (fillfactor = 100);
    alter table outbox.cursors add column of_another_version integer;
    alter table outbox.cursors drop column of_another_version;
    create or replace function outbox.of_another_version() returns integer language sql return 1;
    drop function outbox.of_another_version();";

/// Installs these scripts: `older` is the present version under another name.
fn provide_scripts() {
    let dir = env::extension_dir();
    let put = |name: String, text: &str| {
        let unique = dir.join(format!("{name}.{}", std::process::id()));
        env::server_file(&unique, text.as_bytes(), 0o644);
        std::fs::rename(unique, dir.join(name)).expect("rename");
    };
    let ours = std::fs::read_to_string(dir.join(format!("outbox_relay--{OURS}.sql"))).expect("our script");
    put(format!("outbox_relay--{OLDER}.sql"), &ours);
    for (from, to) in [(OLDER, OURS), (OURS, OLDER), (OURS, NEWER), (NEWER, OURS)] {
        put(format!("outbox_relay--{from}--{to}.sql"), UPDATE);
    }
}

#[track_caller]
fn wait_state(pg: &Postgres, state: &str) {
    wait_eq("the state", state.to_string(), || {
        pg.one("select state from outbox.status")
    });
}

#[track_caller]
fn wait_idle_with_words(pg: &Postgres, version: &str) {
    pg.wait_log("outbox_relay worker is idle: library and extension have different versions");
    pg.wait_log(&format!("The library has version {OURS}, the extension {version}."));
    pg.wait_log("Run ALTER EXTENSION outbox_relay UPDATE, or restart the server with the matching library.");
    wait_state(pg, "version mismatch");
}

/// The extension as an older version has created it, with the present library.
fn older() -> Stack {
    provide_scripts();
    let stack = Stack {
        pg: Postgres::with(&[UNTRIMMED]).start(),
        redis: Redis::start(),
    };
    stack
        .pg
        .exec(&format!("create extension outbox_relay version '{OLDER}'"));
    stack.point("default", &stack.redis);
    stack
}

/// A new library was installed, and the server restarted; the extension is updated later, under load.
#[test]
fn an_update_under_load_loses_and_repeats_nothing() {
    let stack = older();
    let ledger = Ledger::create(&stack.pg);
    let load = Load::paced(&stack.pg, 500, "null");
    wait_idle_with_words(&stack.pg, OLDER);
    load.wait_more(50);
    assert_eq!(stack.redis.xlen("events"), 0, "the worker serves another version");
    stack.pg.exec("alter extension outbox_relay update");
    wait_state(&stack.pg, "running");
    wait_until("the first events", || stack.redis.xlen("events") > 0);
    load.wait_more(50);
    load.stop();
    ledger.settle(&stack, LIMIT).assert_exactly_once();
    let version: String = stack
        .pg
        .one("select extversion from pg_extension where extname = 'outbox_relay'");
    assert_eq!(version, OURS);
}

/// The extension is updated before the server has the library: the worker idles until their versions agree; here the
/// extension is updated back and forth.
#[test]
fn an_extension_that_is_newer_than_the_library_idles_it_and_loses_nothing() {
    provide_scripts();
    let stack = Stack::with(&[UNTRIMMED]);
    let ledger = Ledger::create(&stack.pg);
    let load = Load::paced(&stack.pg, 500, "null");
    wait_until("the first events", || stack.redis.xlen("events") > 0);
    for version in [NEWER, OLDER] {
        stack
            .pg
            .exec(&format!("alter extension outbox_relay update to '{version}'"));
        wait_idle_with_words(&stack.pg, version);
        let sent = stack.redis.xlen("events");
        load.wait_more(50);
        assert_eq!(stack.redis.xlen("events"), sent, "the worker serves another version");
        stack
            .pg
            .exec(&format!("alter extension outbox_relay update to '{OURS}'"));
        wait_state(&stack.pg, "running");
        wait_until("more events", || stack.redis.xlen("events") > sent);
    }
    load.stop();
    ledger.settle(&stack, LIMIT).assert_exactly_once();
}
